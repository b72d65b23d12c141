"""Choosing the next token: temperature, top-k, top-p, min-p, with one rng stream per sequence.

Every row has settings of its own, as arrays, so that sequences with different settings share a program.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from zeda_jax.errors import ZedaError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those filters off."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0  # keep the tokens that are at least this share as likely as the best one

  def __post_init__(self) -> None:
    if not 0 <= self.temperature < math.inf:  # NaN is neither
      raise ZedaError(f"temperature is {self.temperature}; expected 0 (greedy) or more.")
    if self.top_k < 0:
      raise ZedaError(f"top_k is {self.top_k}; expected 0 (off) or more.")
    if not 0 < self.top_p <= 1:
      raise ZedaError(f"top_p is {self.top_p}; expected more than 0 and at most 1.")
    if not 0 <= self.min_p <= 1:
      raise ZedaError(f"min_p is {self.min_p}; expected 0 (off) to 1.")


@struct.dataclass
class RowSampling:
  """The fields of `Sampling`, one per row."""

  temperature: Float[Array, " B"]
  top_k: Int[Array, " B"]
  top_p: Float[Array, " B"]
  min_p: Float[Array, " B"]


def sample_rows(
  logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: RowSampling
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
  """The next token of each row, its log-probability under the model (temperature 1, unfiltered), and the one under the
  distribution that it was drawn from, which is 0 for greedy rows.

  Every row draws from its own key, so what it samples does not depend on its neighbours. What no row asks for is not
  computed: random numbers, and the search for where top-k and top-p cut.
  """
  best = _argmax(logits)
  of_token = lambda logits, tokens: jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]

  def draw() -> tuple[Array, Array]:
    filtered = filter_rows(logits, sampling)
    tokens = jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
    greedy = sampling.temperature == 0
    return jnp.where(greedy, best, tokens), jnp.where(greedy, 0.0, of_token(filtered, tokens))

  tokens, drawn = jax.lax.cond((sampling.temperature > 0).any(), draw, lambda: (best, jnp.zeros(best.shape)))
  return tokens, of_token(logits, tokens), drawn


def _argmax(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
  """jnp.argmax of numbers, as two plain reductions: XLA's reduction of pairs is a slow loop on a CPU."""
  last = logits.shape[-1] - 1
  places = jnp.where(logits == logits.max(axis=-1, keepdims=True), jnp.arange(last + 1, dtype=jnp.int32), last)
  return places.min(axis=-1)


def filter_rows(logits: Float[Array, "B V"], sampling: RowSampling) -> Float[Array, "B V"]:
  """Logits of the sampling distributions: scaled, with -inf where top-k, top-p or min-p cut (in that order).

  Tokens as likely as the last one kept are kept as well. A greedy row's logits come back as they are.
  """
  drawn = sampling.temperature > 0
  logits = logits / jnp.where(drawn, sampling.temperature, 1.0)[:, None]
  top_k = jnp.where(drawn & (sampling.top_k > 0), jnp.minimum(sampling.top_k, logits.shape[-1]), logits.shape[-1])
  top_p = jnp.where(drawn, sampling.top_p, 1.0)
  cut = lambda: _cut_top(logits, top_k, top_p)
  logits = jax.lax.cond(((top_k < logits.shape[-1]) | (top_p < 1)).any(), cut, lambda: logits)
  least = logits.max(axis=-1) + jnp.where(drawn, jnp.log(sampling.min_p), -jnp.inf)
  return jnp.where(logits < least[:, None], -jnp.inf, logits)


def _cut_top(logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]) -> Float[Array, "B V"]:
  """Without sorting, which takes far longer than 64 passes over the logits."""
  order = _ordered(logits)
  # The k-th largest is the largest value that k tokens reach.
  kth = _last_true(lambda least: (order >= least[:, None]).sum(axis=-1) >= top_k, top_k.shape[0])
  logits = jnp.where(order < kth[:, None], -jnp.inf, logits)
  # A token stays if those above it have less than top_p of the mass: all values after the last for which they have it.
  probabilities = jax.nn.softmax(logits, axis=-1)
  above = lambda least: jnp.where(order > least[:, None], probabilities, 0).sum(axis=-1)
  least = _last_true(lambda least: above(least) >= top_p, top_k.shape[0])
  return jnp.where((order <= least[:, None]) & (top_p < 1)[:, None], -jnp.inf, logits)


def _ordered(x: Float[Array, "*b"]) -> Int[Array, "*b"]:
  """Integers in the same order as the numbers."""
  limits = jnp.iinfo(jnp.int32)
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  bits = jnp.where(bits == limits.min, 0, bits)  # -0.0 equals 0.0
  return jnp.where(bits < 0, bits ^ limits.max, bits)


def _last_true(holds: Callable[[Int[Array, " B"]], Bool[Array, " B"]], rows: int) -> Int[Array, " B"]:
  """The largest int32 of each row for which `holds`, which is true up to some number and false above; by halving."""
  limits = jnp.iinfo(jnp.int32)

  def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = ends
    middle = (low & high) + ((low ^ high) >> 1)  # their mean, which cannot overflow
    right = holds(middle)
    return jnp.where(right, middle, low), jnp.where(right, high, middle)

  return jax.lax.fori_loop(0, 32, halve, (jnp.full(rows, limits.min), jnp.full(rows, limits.max)))[0]
