"""`zeda generate`: answers to prompts, with the share of expert work that was skipped."""

import argparse

from zeda_jax.errors import ZedaError


def run(command: str, args: list[str]) -> int:
  parser = argparse.ArgumentParser(prog=f"zeda {command}", description=__doc__)
  parser.add_argument("model", help="Hugging Face directory, static or dynamic")
  parser.add_argument("prompt", nargs="*", help="prompts as text")
  parser.add_argument("--prompts", help="file of prompts (JSONL)")
  parser.add_argument("--max-new-tokens", type=int, default=256)
  parser.add_argument("--temperature", type=float, default=0.6)
  parser.add_argument("--top-k", type=int, default=20)
  parser.add_argument("--top-p", type=float, default=0.95)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--zero-expert-bias", type=float, default=0.0, help="added to the zero logits; --zero-expert-bias=-inf: the teacher"
  )
  parser.add_argument("--batch-size", type=int, default=16)
  flags = parser.parse_args(args)
  if not flags.prompt and not flags.prompts:
    raise ZedaError("no prompt is given: add one as text, or a file of them with --prompts=FILE.")
  for name in ("max_new_tokens", "batch_size"):
    if getattr(flags, name) < 1:
      raise ZedaError(f"--{name.replace('_', '-')} is {getattr(flags, name)}; expected at least 1.")
  if flags.seed < 0:
    raise ZedaError(f"--seed is {flags.seed}; expected at least 0.")
  _generate(flags)
  return 0


def _generate(flags: argparse.Namespace) -> None:
  # Late: `--help` should not wait for JAX.
  from zeda_jax.checkpoint.huggingface import load_hf
  from zeda_jax.config import read_config
  from zeda_jax.data.chat import check_lengths, eos_ids, load_tokenizer, render_prompt
  from zeda_jax.data.prompts import open_prompts
  from zeda_jax.rollout.generate import generate

  config = read_config(flags.model)
  tokenizer = load_tokenizer(flags.model)
  prompts = [render_prompt(tokenizer, {"prompt": text}, "the prompt") for text in flags.prompt]
  if flags.prompts:
    records = open_prompts(flags.prompts)
    check_lengths(records, tokenizer, flags.max_new_tokens, config.max_position_embeddings)
    prompts += [render_prompt(tokenizer, record, records.location(i)) for i, record in enumerate(records)]
  samples = generate(
    load_hf(flags.model),
    prompts,
    flags.max_new_tokens,
    flags.temperature,
    flags.top_k,
    flags.top_p,
    flags.seed,
    eos_ids(flags.model, tokenizer),
    zero_expert_bias=flags.zero_expert_bias,
    batch_size=min(flags.batch_size, len(prompts)),
  )
  for prompt, sample in zip(prompts, samples, strict=True):
    print(f"> {tokenizer.decode(prompt)}")
    print(tokenizer.decode(sample.tokens, skip_special_tokens=True))
    print(f"  [{len(sample.tokens)} tokens, {100 * sample.zero_ratio:.0f} % of expert work skipped]\n")
