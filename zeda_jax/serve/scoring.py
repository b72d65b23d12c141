"""Log-probabilities of given tokens, with the best alternatives at each place: one forward pass without a cache."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from zeda_jax.distributed import on_mesh, to_host
from zeda_jax.models.decoder import Decoder
from zeda_jax.models.params import Params, merge_model, split_model

MAX_TOP = 20
_SMALLEST_BUCKET = 64  # fewer programs are worth more than the padding of short prompts
_LOGITS_BYTES = 64 * 2**20  # logits are made for so many places at once that they take about this


@struct.dataclass
class Scores:
  """Of R rows of T tokens; place t is that of tokens[t + 1] after tokens[: t + 1]."""

  logprobs: Float[Array, "R T-1"]
  top_logprobs: Float[Array, "R T-1 A"]
  top_ids: Int[Array, "R T-1 A"]
  zero_picks: Int[Array, " R"]


@functools.partial(jax.jit, static_argnames=("graphdef", "top", "block"))
def score(
  graphdef: nnx.GraphDef,
  params: Params,
  tokens: Int[Array, "R T"],
  lengths: Int[Array, " R"],
  zero_expert_bias: Float[Array, " R"],
  *,
  top: int,
  block: int,
) -> Scores:
  """Scores right-padded rows; what is past a row's length means nothing, and rows of length 0 cost no expert work.

  Args:
    top: A, alternatives per place.
    block: places of a row whose logits are made at once; divides T.
  """
  model = merge_model(graphdef, params)
  config = model.config
  rows, width = tokens.shape
  index = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
  live = index < lengths[:, None]
  bias = jnp.repeat(zero_expert_bias, width)[:, None]
  out = model.hidden(tokens, live.astype(jnp.int32), index, bias)
  targets = jnp.roll(tokens, -1, axis=1)
  by_block = lambda x: x.reshape(rows, width // block, block, *x.shape[2:]).swapaxes(0, 1)

  def score_block(inputs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    hidden, target = inputs
    # Token and alternatives are read from the same array: equal tokens have equal numbers, bit for bit.
    logprobs = jax.nn.log_softmax(model.logits(hidden), axis=-1)
    best, ids = jax.lax.top_k(logprobs, top)
    return jnp.take_along_axis(logprobs, target[..., None], axis=-1)[..., 0], best, ids.astype(jnp.int32)

  parts = jax.lax.map(score_block, (by_block(out.hidden), by_block(targets)))
  whole = lambda x: x.swapaxes(0, 1).reshape(rows, width, *x.shape[3:])[:, :-1]
  zero = ((out.picks >= config.num_experts) & live[:, :, None]).sum(axis=(0, 2, 3))
  return Scores(whole(parts[0]), whole(parts[1]), whole(parts[2]), zero)


@dataclasses.dataclass(frozen=True)
class Scored:
  """One sequence of T tokens.

  Attributes:
    logprobs: of the tokens from the second on.
    top: (id, log-probability) of the best tokens at the same places, the best first.
    zero_ratio: share of the picks of all T forward passes that were zero experts.
  """

  logprobs: list[float]
  top: list[list[tuple[int, float]]]
  zero_ratio: float


class Scorer:
  """Scores sequences of any length with few compiled programs: lengths are padded to powers of two, and rows are one or
  as many as `max_tokens` holds; alternatives are 0, 1 or MAX_TOP.

  Args:
    model: with `config.sharding`, rows are shared out over the mesh.
    max_length: tokens of the longest sequence.
    max_tokens: about how many tokens are scored at once, padding included.
    max_rows: the most sequences scored at once.
  """

  def __init__(self, model: Decoder, max_length: int, max_tokens: int = 2048, max_rows: int = 16):
    self._graphdef, self._params = split_model(model)
    self._config = model.config
    self._max_tokens, self._max_rows = max_tokens, max_rows
    self._buckets = [_SMALLEST_BUCKET]
    while self._buckets[-1] < max_length:
      self._buckets.append(2 * self._buckets[-1])

  def bucket(self, length: int) -> int:
    return next(bucket for bucket in self._buckets if bucket >= length)

  def batch_size(self, bucket: int) -> int:
    """The most sequences of a bucket for one call."""
    shards = self._num_shards()
    return shards * min(self._max_rows, max(1, self._max_tokens // (bucket * shards)))

  def _num_shards(self) -> int:
    return 1 if self._config.sharding is None else self._config.sharding.num_devices

  def __call__(
    self, sequences: Sequence[Sequence[int]], zero_expert_bias: Sequence[float], num_top: int = 0
  ) -> list[Scored]:
    """Scores up to `batch_size` sequences of one bucket.

    Args:
      sequences: token ids.
      zero_expert_bias: of each.
      num_top: at least so many alternatives, at most MAX_TOP.
    """
    bucket, shards = self.bucket(max(map(len, sequences))), self._num_shards()
    rows = shards if len(sequences) <= shards else self.batch_size(bucket)
    tokens, lengths = np.zeros((rows, bucket), np.int32), np.zeros(rows, np.int32)
    bias = np.zeros(rows, np.float32)
    for i, sequence in enumerate(sequences):
      tokens[i, : len(sequence)], lengths[i], bias[i] = sequence, len(sequence), zero_expert_bias[i]
    top = min(next(size for size in (0, 1, MAX_TOP) if size >= num_top), self._config.vocab_size)
    places = max(1, _LOGITS_BYTES // (4 * self._config.vocab_size * max(1, rows // shards)))
    block = min(bucket, 1 << (places.bit_length() - 1))  # both are powers of two
    with on_mesh(self._config.sharding):
      scores: Scores = to_host(score(self._graphdef, self._params, tokens, lengths, bias, top=top, block=block))
    picks = sum(self._config.moe_layers) * self._config.num_experts_per_tok
    return [self._scored(scores, i, len(sequence), picks) for i, sequence in enumerate(sequences)]

  def _scored(self, scores: Scores, row: int, length: int, picks_per_token: int) -> Scored:
    best = np.asarray(scores.top_logprobs)[row, : length - 1].tolist()
    ids = np.asarray(scores.top_ids)[row, : length - 1].tolist()
    return Scored(
      logprobs=np.asarray(scores.logprobs)[row, : length - 1].tolist(),
      top=[list(zip(*pair, strict=True)) for pair in zip(ids, best, strict=True)],
      zero_ratio=int(scores.zero_picks[row]) / (length * picks_per_token),
    )
