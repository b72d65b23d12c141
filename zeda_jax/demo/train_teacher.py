"""Trains the demo's teacher from scratch: `python -m zeda_jax.demo.train_teacher --out DIR --seed 0`.

A Qwen3-MoE of 1 M parameters learns the three task families (families.py) by next-token prediction on response tokens,
with the usual Qwen3 load-balance loss, and is written as a Hugging Face directory. About 25 minutes on two CPU cores.
"""

import argparse
import functools
import itertools
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from zeda_jax.checkpoint.directory import check_target
from zeda_jax.checkpoint.huggingface import save_hf
from zeda_jax.config import ModelConfig, to_hf
from zeda_jax.demo import families
from zeda_jax.demo.tokenizer import ASSISTANT, END, PAD, USER, build_backend, save_tokenizer, vocabulary
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder
from zeda_jax.zero_experts import expert_balance_loss

# Share of each family in the examples: math is learnt last and its responses are the shortest.
SHARES = {"math": 0.5, "code": 0.25, "instruction": 0.25}
# Training examples per family and epoch, as drawn: distinct ones would leave math few of the short operands that the
# long ones are learnt from.
TRAIN_EXAMPLES = {"math": 120_000, "code": 80_000, "instruction": 80_000}
STEPS, DECAY_STEPS = 6000, 600
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
BALANCE_COEFFICIENT = 0.01
MAX_NEW_TOKENS = 16  # the longest response has 13

Batch = dict[str, np.ndarray]
Encoded = tuple[list[int], int]  # tokens of prompt and response, length of the prompt


def teacher_config() -> ModelConfig:
  return ModelConfig(
    model_type="qwen3_moe",
    vocab_size=-(-len(vocabulary()) // 8) * 8,
    hidden_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    intermediate_size=192,
    moe_intermediate_size=48,
    num_experts=16,
    num_experts_per_tok=4,
    moe_layers=(True,) * 4,
    norm_topk_prob=True,
    max_position_embeddings=256,
  )


def init_decoder(config: ModelConfig, seed: int) -> Decoder:
  """A Decoder with matrices of standard deviation 1/sqrt(fan-in): the usual 0.02 is slow to leave at this width."""
  model = Decoder(config, rngs=nnx.Rngs(seed))
  state = nnx.to_pure_dict(nnx.state(model))

  def rescale(path: tuple[Any, ...], leaf: Array) -> Array:
    name = path[-1].key
    return leaf * (leaf.shape[-2] ** -0.5 / 0.02) if name in ("kernel", "gate_up", "down") else leaf

  nnx.update(model, jax.tree_util.tree_map_with_path(rescale, state))
  return model


def encode(tasks: list[families.Task]) -> list[Encoded]:
  """Tokens of whole one-turn conversations, as the tokenizer's chat template writes them."""
  tokenizer = build_backend()
  prompts = tokenizer.encode_batch_fast([USER + prompt + END + ASSISTANT for prompt, _ in tasks])
  responses = tokenizer.encode_batch_fast([label + END for _, label in tasks])
  return [(p.ids + r.ids, len(p.ids)) for p, r in zip(prompts, responses, strict=True)]


def pack(examples: Iterator[Encoded], rows: int, length: int) -> Batch:
  """Fills a batch of `rows` x `length` tokens with whole examples, row after row; rows end in padding (segment 0)."""
  names = ("tokens", "targets", "segment_ids", "positions")
  batch: Batch = {name: np.zeros((rows, length), np.int32) for name in names}
  batch["loss_mask"] = np.zeros((rows, length), np.float32)
  row, start, segment = 0, 0, 1
  for tokens, prompt_length in examples:
    size = len(tokens) - 1  # the last token is only a target
    if start + size > length:
      row, start, segment = row + 1, 0, 1
      if row == rows:
        break
    here = slice(start, start + size)
    batch["tokens"][row, here] = tokens[:-1]
    batch["targets"][row, here] = tokens[1:]
    batch["segment_ids"][row, here] = segment
    batch["positions"][row, here] = np.arange(size)
    batch["loss_mask"][row, start + prompt_length - 1 : start + size] = 1.0
    start, segment = start + size, segment + 1
  return batch


def example_stream(examples: dict[str, list[Encoded]], rng: np.random.Generator) -> Iterator[Encoded]:
  """Endless examples of all families in their shares; within a family every example once per epoch, reshuffled."""

  def family_stream(items: list[Encoded]) -> Iterator[Encoded]:
    while True:
      for i in rng.permutation(len(items)):
        yield items[i]

  streams = [family_stream(examples[family]) for family in SHARES]
  while True:
    for i in rng.choice(len(streams), size=1024, p=list(SHARES.values())):
      yield next(streams[i])


def loss_function(model: Decoder, batch: dict[str, Array]) -> tuple[Float[Array, ""], dict[str, Array]]:
  balance = functools.partial(_balance, coefficient=BALANCE_COEFFICIENT)
  out = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"], aux_loss=balance)
  losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(out.hidden), batch["targets"])
  mask = batch["loss_mask"]
  # Prompts are random text: a loss on them would be noise to what the responses teach.
  response_loss = (losses * mask).sum() / mask.sum()
  metrics = {"response_loss": response_loss, "balance": out.aux_loss.mean() / BALANCE_COEFFICIENT}
  return response_loss + out.aux_loss.sum(), metrics


def _balance(routing, live, coefficient):
  return expert_balance_loss(routing.scores, routing.picks, coefficient, live)


def make_optimizer(steps: int, decay_steps: int) -> optax.GradientTransformation:
  """AdamW with a short warm-up, a constant rate and a linear decay to 0 over the last `decay_steps`."""
  warmup_steps = min(WARMUP_STEPS, steps // 4)
  schedule = optax.join_schedules(
    [
      optax.linear_schedule(0.0, LEARNING_RATE, warmup_steps),
      optax.constant_schedule(LEARNING_RATE),
      optax.linear_schedule(LEARNING_RATE, 0.0, decay_steps),
    ],
    [warmup_steps, steps - decay_steps],
  )
  is_stacked_matrix = lambda params: jax.tree.map(lambda p: p.ndim > 2, params)
  # Norms, embedding and head are not decayed.
  adamw = optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.1, mask=is_stacked_matrix)
  return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def exact_accuracy(graphdef: Any, params: Any, examples: list[Encoded], rows: int = 256, length: int = 48) -> float:
  """Share of examples whose whole response is the greedy choice, token by token.

  Feeding the right prefix is enough: greedy generation leaves it exactly where the first choice is wrong.
  """
  right = total = 0
  for start in range(0, len(examples), rows):
    part = examples[start : start + rows]
    # One example a row: one that ended a row early would otherwise start the next.
    batches = [pack(iter([example]), 1, length) for example in part]
    batch = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    short = rows - len(part)
    batch = {name: np.pad(array, ((0, short), (0, 0))) for name, array in batch.items()}
    right += int(_rows_right(graphdef, params, batch)[: len(part)].sum())
    total += len(part)
  return right / total


@functools.partial(jax.jit, static_argnums=0)
def _rows_right(graphdef, params, batch):
  out = nnx.merge(graphdef, params)(batch["tokens"], batch["segment_ids"], batch["positions"])
  return ((out.logits.argmax(axis=-1) == batch["targets"]) | (batch["loss_mask"] == 0)).all(axis=1)


def train(
  steps: int = STEPS,
  decay_steps: int = DECAY_STEPS,
  rows: int = 16,
  length: int = 96,
  seed: int = 0,
  train_examples: Mapping[str, int] = TRAIN_EXAMPLES,
  log_every: int = 100,
) -> Decoder:
  """Trains a teacher; the same arguments on the same machine give the same parameters."""
  examples = {family: encode(_draws(family, count)) for family, count in train_examples.items()}
  held_out = {family: encode(_held_out(family, 512)) for family in families.FAMILIES}
  graphdef, params = nnx.split(init_decoder(teacher_config(), seed))
  optimizer = make_optimizer(steps, min(decay_steps, steps // 2))
  opt_state = optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params, opt_state, batch):
    loss = lambda params: loss_function(nnx.merge(graphdef, params), batch)
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, metrics

  stream = example_stream(examples, np.random.default_rng(seed))
  started = time.monotonic()
  for step in range(1, steps + 1):
    params, opt_state, metrics = train_step(params, opt_state, pack(stream, rows, length))
    if step % log_every == 0 or step == steps:
      shown = "  ".join(f"{name} {float(value):.4f}" for name, value in metrics.items())
      if step % (5 * log_every) == 0 or step == steps:
        accuracy = {family: exact_accuracy(graphdef, params, held_out[family]) for family in families.FAMILIES}
        shown += "  " + "  ".join(f"{family} {100 * value:.2f}%" for family, value in accuracy.items())
      print(f"step {step}  {time.monotonic() - started:.0f} s  {shown}", flush=True)
  return nnx.merge(graphdef, params)


def save_teacher(model: Decoder, path: str | pathlib.Path, card: str, overwrite: bool = False) -> None:
  """Writes the teacher as a Hugging Face directory for stock transformers: weights, tokenizer, settings, card."""
  ids = vocabulary()
  special = {"bos_token_id": None, "eos_token_id": ids[END], "pad_token_id": ids[PAD]}
  with tempfile.TemporaryDirectory() as side:
    save_tokenizer(side, model.config.max_position_embeddings)
    generation = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, **special}
    (pathlib.Path(side) / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (pathlib.Path(side) / "README.md").write_text(card)
    # save_hf carries over whatever lies beside the weights of the model's source.
    model.config = model.config.replace(source=side, hf_config={**to_hf(model.config), **special})
    save_hf(model, path, overwrite=overwrite)


def model_card(accuracy: dict[str, float], per_family: int, command: str) -> str:
  rows = "\n".join(f"| {family} | {100 * value:.2f} % |" for family, value in accuracy.items())
  average = 100 * sum(accuracy.values()) / len(accuracy)
  return f"""# A tiny post-trained Qwen3-MoE

The teacher of `zeda demo`: 1.03 M parameters, 4 layers, 16 experts of which each token runs 4. It answers short
questions of three kinds: sums and differences, what a line of Python prints, and writing words as told. It knows
nothing else.

Made by `{command}`.

Greedy, whole response right, {per_family} held-out prompts per family:

| family | accuracy |
|---|---|
{rows}
| average | {average:.2f} % |
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", required=True, help="directory to make")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--steps", type=int, default=STEPS)
  parser.add_argument("--per-family", type=int, default=1500, help="held-out prompts per family for the final accuracy")
  parser.add_argument("--overwrite", action="store_true", help="replace a directory that is not empty")
  args = parser.parse_args()
  try:
    check_target(args.out, args.overwrite)
    model = train(args.steps, seed=args.seed)
    graphdef, params = nnx.split(model)
    accuracy = {
      family: exact_accuracy(graphdef, params, encode(_held_out(family, args.per_family)))
      for family in families.FAMILIES
    }
    command = f"python -m zeda_jax.demo.train_teacher --seed {args.seed} --steps {args.steps}"
    card = model_card(accuracy, args.per_family, command)
    save_teacher(model, args.out, card, args.overwrite)
  except ZedaError as error:
    raise SystemExit(f"error: {error}") from None
  print(card)


def _draws(family: str, count: int) -> list[families.Task]:
  return list(itertools.islice(families.draws(family, "train"), count))


def _held_out(family: str, count: int) -> list[families.Task]:
  return list(itertools.islice(families.tasks(family, "held_out"), count))


if __name__ == "__main__":
  main()
