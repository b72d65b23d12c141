"""What the engine is asked for and what it answers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from zeda_jax.errors import ZedaError
from zeda_jax.rollout.sampling import Sampling

_UINT32 = 2**32


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt, how many tokens to sample after it at most, and how.

  Attributes:
    prompt: token ids.
    max_new_tokens: the most tokens to sample for each response.
    temperature, top_k, top_p, min_p: see `Sampling`.
    seed: same seed (and stream), same tokens, whatever else the engine does; up to the rounding of sums that a batch of
      another shape or other neighbours among an expert's rows may change.
    stream: number of the random stream of the first response; response i takes stream + i. The streams of
      `zeda_jax.generate` are the same.
    n: responses to sample; the prompt is read once for all of them.
    stop_ids: tokens that end a response, which holds them; None means the checkpoint's EOS.
    zero_expert_bias: see `Decoder.__call__`.
    record_picks: also give the experts that each token picked, for routing replay.

  Raises:
    ZedaError: a value is out of range.
  """

  prompt: Sequence[int]
  max_new_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int = 0
  stream: int = 0
  n: int = 1
  stop_ids: Sequence[int] | None = None
  zero_expert_bias: float = 0.0
  record_picks: bool = False

  def __post_init__(self) -> None:
    Sampling(self.temperature, self.top_k, self.top_p, self.min_p)
    if len(self.prompt) == 0:
      raise ZedaError("The prompt has no tokens; expected at least one.")
    for name in ("max_new_tokens", "n"):
      if getattr(self, name) < 1:
        raise ZedaError(f"{name} is {getattr(self, name)}; expected at least 1.")
    for name, last in (("seed", self.seed), ("stream", self.stream + self.n - 1)):
      if not 0 <= getattr(self, name) <= last < _UINT32:
        raise ZedaError(f"{name} is {getattr(self, name)}; expected 0 to {_UINT32 - 1}.")
    if math.isnan(self.zero_expert_bias):
      raise ZedaError("zero_expert_bias is NaN; expected a number, or -inf to switch the zero experts off.")


@dataclasses.dataclass(frozen=True)
class Completion:
  """One finished response.

  Attributes:
    id: of the request.
    index: which of the request's n responses.
    tokens: sampled tokens, the one that stopped it included.
    logprobs: of each token under the model at temperature 1.
    sampling_logprobs: of each token under the distribution it was drawn from; 0 for greedy ones.
    zero_ratio: share of picks, over the forward passes that predicted these tokens, that were zero experts.
    zero_ratio_all: the same over all forward passes, the prompt's included.
    finish_reason: "stop" if a stop token ended it, else "length".
    picks: ids of the experts that every token but the last one picked, the prompt's included, by MoE layer; those from
      the number of experts on are zero experts. None where the request did not ask for them.
  """

  id: int
  index: int
  tokens: list[int]
  logprobs: list[float]
  sampling_logprobs: list[float]
  zero_ratio: float
  zero_ratio_all: float
  finish_reason: Literal["stop", "length"]
  picks: Int[np.ndarray, "P+S-1 L K"] | None = None


@dataclasses.dataclass(frozen=True)
class Update:
  """New tokens of one response, and the whole of it once it is complete."""

  id: int
  index: int
  tokens: list[int]
  logprobs: list[float]
  completion: Completion | None = None


def check_fits(request: Request, vocab_size: int, max_length: int) -> None:
  """Raises ZedaError if the model cannot take the request."""
  prompt = request.prompt
  if min(prompt) < 0 or max(prompt) >= vocab_size:  # JAX would clamp such an id to another token without a word
    token = min(prompt) if min(prompt) < 0 else max(prompt)
    raise ZedaError(
      f"The prompt holds the token {token}, which is outside the model's vocabulary of {vocab_size}: use the tokenizer "
      "of this model."
    )
  if len(prompt) + request.max_new_tokens > max_length:
    raise ZedaError(
      f"The prompt has {len(prompt)} tokens; with max_new_tokens {request.max_new_tokens} it exceeds the {max_length} "
      "tokens that the engine holds of one sequence: shorten it or ask for fewer new tokens."
    )
