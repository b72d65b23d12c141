"""Trains the demo's teacher from scratch: `python -m zeda_jax.demo.train_teacher --out DIR --seed 0`.

A Qwen3-MoE of 1 M parameters learns the three task families (families.py) by next-token prediction on response tokens,
with the usual Qwen3 load-balance loss and a pull towards even routing weights, and is written as a Hugging Face
directory. About 45 minutes on two CPU cores.
"""

import argparse
import functools
import itertools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from zeda_jax.checkpoint.directory import check_target
from zeda_jax.checkpoint.huggingface import save_hf
from zeda_jax.config import ModelConfig, to_hf
from zeda_jax.demo import families
from zeda_jax.demo.tokenizer import ASSISTANT, END, PAD, USER, build_backend, save_tokenizer, vocabulary
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder
from zeda_jax.zero_experts import Routing, expert_balance_loss


class Phase(NamedTuple):
  """Training with an optimizer of its own: warm-up, constant learning rate, linear decay to 0 over `decay_steps`."""

  steps: int
  decay_steps: int
  learning_rate: float
  shares: Mapping[str, float]  # of each family in the examples


# Math is learnt last and has the shortest responses, so it gets most of the first phase; the second phase levels the
# families.
PHASES = (
  Phase(5000, 2500, 3e-3, {"math": 0.6, "code": 0.2, "instruction": 0.2}),
  Phase(4000, 3900, 2e-3, {"math": 0.34, "code": 0.36, "instruction": 0.3}),
)
# Training examples per family and epoch, as drawn: distinct ones would leave math few of the short operands that the
# long ones are learnt from.
TRAIN_EXAMPLES = {"math": 160_000, "code": 80_000, "instruction": 80_000}
WARMUP_STEPS = 100
BALANCE_COEFFICIENT = 0.01
PEAK_COEFFICIENT = 0.005
CORRECTION_RATE = 1e-3  # of sigmoid routers' correction bias, per step
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


def example_stream(
  examples: Mapping[str, list[Encoded]], shares: Mapping[str, float], rng: np.random.Generator
) -> Iterator[Encoded]:
  """Endless examples of all families in their shares; within a family every example once per epoch, reshuffled."""

  def family_stream(items: list[Encoded]) -> Iterator[Encoded]:
    while True:
      for i in rng.permutation(len(items)):
        yield items[i]

  streams = [family_stream(examples[family]) for family in shares]
  while True:
    for i in rng.choice(len(streams), size=1024, p=list(shares.values())):
      yield next(streams[i])


def loss_function(model: Decoder, batch: dict[str, Array]) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Cross-entropy of response tokens plus the routing losses, and what is logged.

  Prompts are random text: a loss on them would be noise to what the responses teach.
  """
  out = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"], aux_loss=routing_loss)
  losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(out.hidden), batch["targets"])
  response_loss = (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
  aux_loss = out.aux_loss.sum()
  picks = jnp.where(batch["segment_ids"][..., None] > 0, out.picks, model.config.num_experts)
  return response_loss + aux_loss, {"response_loss": response_loss, "routing_loss": aux_loss, "picks": picks}


def routing_loss(routing: Routing, live: Bool[Array, " T"]) -> Float[Array, ""]:
  """The Qwen3 load-balance loss of one layer, and a pull against peaked scores.

  Without the second term so small a router gives most of the weight to one expert, and the other picks could be left
  out untrained. It is the mean of N sum_i score_i^2, which is 1 for even scores and N for a single expert.
  """
  squares = jnp.where(live, (routing.scores**2).sum(axis=-1), 0.0).sum() / jnp.maximum(live.sum(), 1)
  balance = expert_balance_loss(routing.scores, routing.picks, BALANCE_COEFFICIENT, live)
  return balance + PEAK_COEFFICIENT * routing.scores.shape[-1] * squares


def balance_correction(config: ModelConfig, params: nnx.State, picks: Int[Array, "L B T K"]) -> nnx.State:
  """Auxiliary-loss-free balancing (arXiv 2408.15664): the bias of experts with less than the mean load rises a step.

  Softmax routers have no such bias and come back as they are.
  """
  if config.scoring == "softmax":
    return params
  # load[l, e] = how often expert e of MoE layer l was picked
  load = (picks[..., None] == jnp.arange(config.num_experts)).sum(axis=(1, 2, 3))
  step = CORRECTION_RATE * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
  state, first = nnx.to_pure_dict(params), 0
  for number, run in enumerate(config.layer_runs):
    if run.is_moe:
      router = state["runs"][number]["mlp"]["router"]
      router["correction_bias"] += step[first : first + run.length]
      first += run.length
  nnx.replace_by_pure_dict(params, state)
  return params


def make_optimizer(phase: Phase) -> optax.GradientTransformation:
  warmup_steps = min(WARMUP_STEPS, phase.steps // 4)
  schedule = optax.join_schedules(
    [
      optax.linear_schedule(0.0, phase.learning_rate, warmup_steps),
      optax.constant_schedule(phase.learning_rate),
      optax.linear_schedule(phase.learning_rate, 0.0, phase.decay_steps),
    ],
    [warmup_steps, phase.steps - phase.decay_steps],
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
  phases: Sequence[Phase] = PHASES,
  rows: int = 16,
  length: int = 96,
  seed: int = 0,
  train_examples: Mapping[str, int] = TRAIN_EXAMPLES,
  log_every: int = 100,
  config: ModelConfig | None = None,
) -> Decoder:
  """Trains a teacher, by default the demo's; the same arguments on the same machine give the same parameters."""
  config = teacher_config() if config is None else config
  examples = {family: encode(_draws(family, count)) for family, count in train_examples.items()}
  held_out = {family: encode(_held_out(family, 512)) for family in families.FAMILIES}
  graphdef, params = nnx.split(init_decoder(config, seed))
  started = time.monotonic()

  def log(number: int, step: int, metrics: dict[str, Array], evaluate: bool) -> None:
    shown = "  ".join(f"{name} {float(value):.4f}" for name, value in metrics.items())
    if evaluate:
      accuracy = {family: exact_accuracy(graphdef, params, held_out[family]) for family in families.FAMILIES}
      shown += "  " + "  ".join(f"{family} {100 * value:.2f}%" for family, value in accuracy.items())
    print(f"phase {number}  step {step}  {time.monotonic() - started:.0f} s  {shown}", flush=True)

  for number, phase in enumerate(phases):
    optimizer = make_optimizer(phase)
    opt_state = optimizer.init(params)
    train_step = _make_train_step(config, graphdef, optimizer)
    stream = example_stream(examples, phase.shares, np.random.default_rng(seed + number))
    for step in range(1, phase.steps + 1):
      params, opt_state, metrics = train_step(params, opt_state, pack(stream, rows, length))
      if step % log_every == 0 or step == phase.steps:
        log(number, step, metrics, evaluate=step % (5 * log_every) == 0 or step == phase.steps)
  return nnx.merge(graphdef, params)


def _make_train_step(
  config: ModelConfig, graphdef: Any, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any, Any]]:
  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params, opt_state, batch):
    loss = lambda params: loss_function(nnx.merge(graphdef, params), batch)
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = balance_correction(config, optax.apply_updates(params, updates), metrics.pop("picks"))
    return params, opt_state, metrics

  return train_step


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

The recipe is `{command}`. Rounding differs between
machines and versions, so a rerun gives a teacher of this kind, not these bytes.

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
  parser.add_argument("--per-family", type=int, default=1500, help="held-out prompts per family for the final accuracy")
  parser.add_argument("--overwrite", action="store_true", help="replace a directory that is not empty")
  args = parser.parse_args()
  try:
    check_target(args.out, args.overwrite)
    model = train(seed=args.seed)
    graphdef, params = nnx.split(model)
    accuracy = {
      family: exact_accuracy(graphdef, params, encode(_held_out(family, args.per_family)))
      for family in families.FAMILIES
    }
    command = f"python -m zeda_jax.demo.train_teacher --out DIR --seed {args.seed}"
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
