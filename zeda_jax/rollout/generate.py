"""Generation for a list of prompts: a call of the engine, with sizes that let many such calls share programs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder
from zeda_jax.rollout.engine import Engine
from zeda_jax.rollout.pages import pages_for
from zeda_jax.rollout.requests import Completion, Request
from zeda_jax.rollout.sampling import Sampling

_PAGE_SIZE = 64
_ROW = 256  # shorter rows of prompts are padded to it: another program costs more than the padding


@dataclasses.dataclass(frozen=True)
class Sample:
  """One response: its tokens (EOS included where it ended by itself) and what was measured while sampling."""

  tokens: list[int]
  logprobs: list[float]  # under the model at temperature 1
  zero_ratio: float  # share of picks, over the forward passes that predicted these tokens, that were zero experts
  zero_ratio_all: float  # the same over all forward passes, the prompt's included
  finished: bool  # ended with EOS rather than at the length limit


def to_sample(completion: Completion) -> Sample:
  c = completion
  return Sample(c.tokens, c.logprobs, c.zero_ratio, c.zero_ratio_all, c.finish_reason == "stop")


def cache_tokens_for(longest: int, max_new_tokens: int) -> int:
  """Tokens of cache that `engine_for` sets aside for one response; less than this a device must not have."""
  return pages_for(longest + max_new_tokens, _PAGE_SIZE) * _PAGE_SIZE


def engine_for(model: Decoder, batch_size: int, longest: int, max_new_tokens: int, cache_tokens: int = 0) -> Engine:
  """An engine for prompts of up to `longest` tokens; its arrays, and so its programs, are alike for like lengths.

  Args:
    model: static or dynamic decoder, sharded or not.
    batch_size: responses decoded together, rounded up to the devices of a mesh.
    longest: tokens of the longest prompt.
    max_new_tokens: the most tokens of a response.
    cache_tokens: room in the cache for all responses together; 0 gives each all that it could need.
  """
  sharding = model.config.sharding
  devices = 1 if sharding is None else sharding.num_devices
  num_slots = -(-batch_size // devices) * devices
  max_length = cache_tokens_for(longest, max_new_tokens)
  return Engine(
    model,
    num_slots=num_slots,
    max_length=max_length,
    max_tokens=cache_tokens or num_slots * max_length,
    page_size=_PAGE_SIZE,
    smallest_bucket=min(num_slots // devices * longest, _ROW),
  )


def generate(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  eos_id: int | Sequence[int] | None = None,
  *,
  min_p: float = 0.0,
  zero_expert_bias: float = 0.0,
  batch_size: int = 64,
  stream_ids: Sequence[int] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
  """Samples one response per prompt.

  A sharded model's sequences are shared out over all devices, and a copy of its parameters is spread for this
  (`Sharding.for_generation`). Where there are several processes, all must call this with the same arguments, and all
  get all samples.

  Args:
    model: static or dynamic decoder.
    prompts: token ids of each prompt (see `zeda_jax.data.chat` for chat templates).
    max_new_tokens: the most tokens to sample for each.
    temperature: 0 is greedy.
    top_k: keep the k best tokens; 0 keeps all.
    top_p: keep the smallest set of tokens with at least this mass.
    seed: of the sampling; the same seed gives the same tokens, whatever else is in the batch.
    eos_id: stop token(s); None means the checkpoint's own (`model.config.eos_token_ids`).
    min_p: keep the tokens that are at least this share as likely as the best one.
    zero_expert_bias: see `Decoder.__call__`.
    batch_size: sequences decoded together; where one ends, the next one begins.
    stream_ids: number of each prompt's rng stream; None numbers them 0, 1, ...
    progress: called with (prompts answered, prompts in all) after each step of the engine; what it raises ends the
      generation.

  Raises:
    ZedaError: a prompt is empty, holds a token outside the vocabulary, or does not leave room for max_new_tokens in the
      model's context.
  """
  if max_new_tokens < 1:
    raise ZedaError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
  Sampling(temperature, top_k, top_p, min_p)  # refused before what prompts may have wrong
  _check(model, prompts, max_new_tokens)
  stop_ids = tuple(int(t) for t in np.atleast_1d(model.config.eos_token_ids if eos_id is None else eos_id))
  streams = range(len(prompts)) if stream_ids is None else stream_ids
  settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
  settings |= {"stop_ids": stop_ids, "zero_expert_bias": zero_expert_bias}
  requests = [
    Request(prompt, max_new_tokens, stream=int(stream), **settings)
    for prompt, stream in zip(prompts, streams, strict=True)
  ]
  if not requests:
    return []
  engine = engine_for(model, batch_size, max(map(len, prompts)), max_new_tokens)
  samples = {place: to_sample(completion) for place, completion in engine.run(requests, progress)}
  return [samples[place] for place in range(len(requests))]


def _check(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
  """Says which prompt does not fit; requests know no numbers."""
  context = model.config.max_position_embeddings
  vocab_size = model.config.vocab_size
  for i, prompt in enumerate(prompts):
    if len(prompt) == 0:
      raise ZedaError(f"Prompt {i} has no tokens; expected at least one.")
    # JAX would clamp such an id to another token without a word.
    if min(prompt) < 0 or max(prompt) >= vocab_size:
      token = min(prompt) if min(prompt) < 0 else max(prompt)
      raise ZedaError(
        f"Prompt {i} holds the token {token}, which is outside the model's vocabulary of {vocab_size}: use the "
        "tokenizer of this model."
      )
    if len(prompt) + max_new_tokens > context:
      raise ZedaError(
        f"Prompt {i} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} it exceeds the model's context of "
        f"{context}: shorten it or ask for fewer new tokens."
      )
