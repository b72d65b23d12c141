"""What each token cost and how sure the models were of it: one forward pass of student and teacher over given texts.

Everything is counted by *passes*: the pass that reads token t predicts token t + 1. The last token of a text is never
read while it is generated, so it has no pass of its own and counts nowhere. Texts are packed into rows, the vocabulary
is walked in chunks (ops/token_losses.py), and on a mesh each device has rows of its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from zeda_jax.data.packing import pack_row, plan_rows
from zeda_jax.distributed import on_mesh, spread_rows, to_host
from zeda_jax.models.decoder import Decoder
from zeda_jax.models.params import Params, merge_model, split_model
from zeda_jax.ops.token_losses import token_losses

_ROW_MULTIPLE = 128
_TOKENS_PER_DEVICE = 8192  # of one batch, unless a single row is longer


@dataclasses.dataclass(frozen=True)
class Texts:
  """S prompts with their responses, T tokens in all: text s is `tokens[starts[s] : starts[s + 1]]`."""

  tokens: Int[np.ndarray, " T"]
  starts: Int[np.ndarray, " S1"]  # S + 1 entries
  prompt_lengths: Int[np.ndarray, " S"]

  @classmethod
  def of(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> "Texts":
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    tokens = [t for p, r in zip(prompts, responses, strict=True) for t in (*p, *r)]
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return cls(np.asarray(tokens, np.int32), starts, np.asarray([len(p) for p in prompts], np.int32))

  def __len__(self) -> int:
    return len(self.prompt_lengths)

  @property
  def lengths(self) -> Int[np.ndarray, " S"]:
    return np.diff(self.starts)

  @property
  def text(self) -> Int[np.ndarray, " T"]:
    """Which text each token belongs to."""
    return np.repeat(np.arange(len(self)), self.lengths)

  @property
  def position(self) -> Int[np.ndarray, " T"]:
    """Of each token in its own text, from 0."""
    return np.arange(len(self.tokens)) - np.repeat(self.starts[:-1], self.lengths)

  @property
  def is_pass(self) -> Bool[np.ndarray, " T"]:
    """Whether the token is read by a pass: all but the last of each text."""
    return self.position < np.repeat(self.lengths, self.lengths) - 1

  @property
  def in_response(self) -> Bool[np.ndarray, " T"]:
    """Whether the pass that reads the token predicts a token of the response."""
    return self.is_pass & (self.position >= np.repeat(self.prompt_lengths, self.lengths) - 1)


@dataclasses.dataclass(frozen=True)
class TokenMeasurements:
  """By the pass that reads token t; L are the MoE layers. NaN where there is no pass, or no teacher for what needs one.

  Entropy and divergences are in nats; `logprob` is that of the next token of the text.
  """

  zero_picks: UInt8[np.ndarray, "L T"]  # of the K picks of each layer; 0 where there is no pass
  entropy: Float[np.ndarray, " T"]  # of the student
  logprob: Float[np.ndarray, " T"]
  teacher_logprob: Float[np.ndarray, " T"]
  forward_kl: Float[np.ndarray, " T"]  # KL(teacher || student)
  reverse_kl: Float[np.ndarray, " T"]  # KL(student || teacher)
  load: Int[np.ndarray, "L E"]  # picks of each expert over all passes, zero experts last
  teacher_load: Int[np.ndarray, "L N"] | None

  @property
  def gap(self) -> Float[np.ndarray, " T"]:
    """|log pi_teacher(y) - log pi_student(y)| of the next token y."""
    return np.abs(self.teacher_logprob - self.logprob)


def measure_texts(
  student: Decoder,
  texts: Texts,
  teacher: Decoder | None = None,
  zero_expert_bias: float = 0.0,
  progress: Callable[[int, int], None] | None = None,
) -> TokenMeasurements:
  """Runs the student, and the teacher if there is one, over all texts.

  Args:
    student: any decoder; a static one has no zero picks.
    texts: tokens below the vocabulary's size, each text at least one.
    teacher: over the same vocabulary and on the same mesh; its zero experts, if it has any, are masked.
    zero_expert_bias: of the student, see `Decoder.__call__`.
    progress: called with (rows done, rows in all) after each batch.
  """
  config = student.config
  row_length = -(-int(max(texts.lengths.max(), _ROW_MULTIPLE)) // _ROW_MULTIPLE) * _ROW_MULTIPLE
  plan = plan_rows(texts.lengths, row_length, seed=0)
  devices = 1 if config.sharding is None else config.sharding.num_devices
  batch_size = max(_TOKENS_PER_DEVICE // row_length, 1) * devices
  models = (*split_model(student), *((None, None) if teacher is None else split_model(teacher)))
  layers, total = sum(config.moe_layers), len(texts.tokens)
  zero_picks = np.zeros((layers, total), np.uint8)
  numbers = np.full((len(_NUMBERS), total), np.nan, np.float32)
  loads: list[np.ndarray] = [np.zeros((layers, config.num_experts + config.num_zero_experts), np.int64)]
  if teacher is not None:
    loads.append(np.zeros((layers, teacher.config.num_experts), np.int64))
  for first in range(0, len(plan), batch_size):
    rows = [plan[r] for r in range(first, min(first + batch_size, len(plan)))]
    batch = _batch(texts, rows, batch_size, row_length)
    with on_mesh(config.sharding):
      placed = batch if config.sharding is None else spread_rows(batch, config.sharding)
      zero, found, counts = to_host(_measure(*models, placed, np.float32(zero_expert_bias)))
    for row, examples in enumerate(rows):
      _copy_row(texts, examples, zero[:, row], found[:, row], zero_picks, numbers)
    for load, count in zip(loads, counts, strict=True):
      load += count
    if progress is not None:
      progress(min(first + batch_size, len(plan)), len(plan))
  numbers[:, ~texts.is_pass] = np.nan
  zero_picks[:, ~texts.is_pass] = 0
  if teacher is None:
    numbers[[_NUMBERS.index(n) for n in ("teacher_logprob", "forward_kl", "reverse_kl")]] = np.nan
  values = dict(zip(_NUMBERS, numbers, strict=True))
  return TokenMeasurements(zero_picks, **values, load=loads[0], teacher_load=loads[1] if teacher is not None else None)


_NUMBERS = ("logprob", "entropy", "teacher_logprob", "forward_kl", "reverse_kl")  # TokenLosses, in its order


def _batch(texts: Texts, rows: Sequence[np.ndarray], batch_size: int, row_length: int) -> dict[str, np.ndarray]:
  def example(i: int) -> dict[str, np.ndarray]:
    tokens = texts.tokens[texts.starts[i] : texts.starts[i + 1]]
    return {"prompt_tokens": tokens[: texts.prompt_lengths[i]], "response_tokens": tokens[texts.prompt_lengths[i] :]}

  packed = [pack_row([example(int(i)) for i in row], row_length) for row in rows]
  packed += [pack_row([], row_length)] * (batch_size - len(packed))
  names = ("tokens", "targets", "segment_ids", "positions")
  return {name: np.stack([row[name] for row in packed]) for name in names}


def _copy_row(
  texts: Texts,
  examples: np.ndarray,
  zero: np.ndarray,
  found: np.ndarray,
  zero_picks: np.ndarray,
  numbers: np.ndarray,
) -> None:
  """Copies the numbers of one packed row to the places of its texts."""
  at = 0
  for i in examples:
    start, length = int(texts.starts[i]), int(texts.lengths[i])
    zero_picks[:, start : start + length] = zero[:, at : at + length]
    numbers[:, start : start + length] = found[:, at : at + length]
    at += length


@functools.partial(jax.jit, static_argnums=(0, 2))
def _measure(
  student_graphdef: nnx.GraphDef,
  student_params: Params,
  teacher_graphdef: nnx.GraphDef | None,
  teacher_params: Params | None,
  batch: dict[str, Int[Array, "B T"]],
  bias: Float[Array, ""],
) -> tuple[UInt8[Array, "L B T"], Float[Array, "5 B T"], list[Int[Array, "L E"]]]:
  student = merge_model(student_graphdef, student_params)
  config = student.config
  segments = batch["segment_ids"]
  inputs = (segments, batch["positions"])
  following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
  live = (segments > 0) & (following == segments)
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  out = student.hidden(batch["tokens"], *inputs, bias)
  loads = [_load(out.picks, live, config.num_experts + config.num_zero_experts)]
  judged: tuple[Array, Array] | tuple[None, None] = (None, None)
  if teacher_graphdef is not None and teacher_params is not None:
    teacher = merge_model(teacher_graphdef, teacher_params)
    judge = teacher.hidden(batch["tokens"], *inputs, -jnp.inf)
    loads.append(_load(judge.picks, live, teacher.config.num_experts))
    judged = flat(judge.hidden), teacher.head()
  targets = flat(batch["targets"])
  losses = token_losses(flat(out.hidden), student.head(), targets, *judged, mask=flat(live), sharding=config.sharding)
  zero = (out.picks >= config.num_experts).sum(axis=-1).astype(jnp.uint8)
  return zero, jnp.stack(losses).reshape(len(losses), *segments.shape), loads


def _load(picks: Int[Array, "L B T K"], live: Bool[Array, "B T"], num_experts: int) -> Int[Array, "L E"]:
  ids = jnp.where(live[..., None], picks, num_experts).reshape(picks.shape[0], -1)
  count = lambda row: jnp.bincount(row, length=num_experts + 1)[:num_experts]
  return jax.vmap(count)(ids)


def token_ratio(measured: TokenMeasurements, top_k: int) -> Float[np.ndarray, " T"]:
  """r_ZE of each pass, over all layers; NaN where there is no pass."""
  ratio = measured.zero_picks.mean(axis=0, dtype=np.float64) / top_k
  return np.where(np.isnan(measured.entropy), np.nan, ratio)
