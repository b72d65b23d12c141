"""Choosing the next token: temperature, top-k, top-p, with one rng stream per sequence."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from zeda_jax.errors import ZedaError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self) -> None:
    if not 0 <= self.temperature < math.inf:  # NaN is neither
      raise ZedaError(f"temperature is {self.temperature}; expected 0 (greedy) or more.")
    if self.top_k < 0:
      raise ZedaError(f"top_k is {self.top_k}; expected 0 (off) or more.")
    if not 0 < self.top_p <= 1:
      raise ZedaError(f"top_p is {self.top_p}; expected more than 0 and at most 1.")


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
  """Logits of the sampling distribution: scaled, with -inf where top-k or top-p cut (in that order, as usual)."""
  logits = logits / sampling.temperature
  if 0 < sampling.top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    # A token stays while the mass of the tokens before it is below top_p; so the best one always stays.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def sample(
  logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """The next token of each row and its log-probability under the model (temperature 1, unfiltered).

  Every row draws from its own key, so what it samples does not depend on its neighbours.
  """
  if sampling.temperature == 0:
    tokens = jnp.argmax(logits, axis=-1)
  else:
    tokens = jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling))
  tokens = tokens.astype(jnp.int32)
  logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, None], axis=-1)[:, 0]
  return tokens, logprobs
