"""Batched generation: one jitted function that prefills a cache and decodes until every row has stopped."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, Key

from zeda_jax.distributed import on_mesh, spread_rows, to_host
from zeda_jax.errors import ZedaError
from zeda_jax.models.cache import Cache, init_cache
from zeda_jax.models.decoder import Decoder, HiddenOutput
from zeda_jax.models.params import resharded
from zeda_jax.rollout.sampling import Sampling, sample
from zeda_jax.sharding import Sharding

_BUCKET = 16  # prompt lengths are padded up to a multiple, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Sample:
  """One response: its tokens (EOS included where it ended by itself) and what was measured while sampling."""

  tokens: list[int]
  logprobs: list[float]  # under the model at temperature 1
  zero_ratio: float  # share of picks, over the forward passes that predicted these tokens, that were zero experts
  zero_ratio_all: float  # the same over all forward passes, the prompt's included
  finished: bool  # ended with EOS rather than at the length limit


@struct.dataclass
class _Decoding:
  step: Int[Array, ""]
  token: Int[Array, " B"]
  done: Bool[Array, " B"]
  cache: Cache
  tokens: Int[Array, "B S"]
  logprobs: Float[Array, "B S"]
  zero_picks: Float[Array, " B"]
  lengths: Int[Array, " B"]


def _is_eos(token: Int[Array, " B"], eos_ids: tuple[int, ...]) -> Bool[Array, " B"]:
  return functools.reduce(jnp.logical_or, [token == e for e in eos_ids], jnp.zeros(token.shape, bool))


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "sampling", "eos_ids"))
def generate_batch(
  graphdef: nnx.GraphDef,
  state: nnx.State,
  prompts: Int[Array, "B P"],
  lengths: Int[Array, " B"],
  keys: Key[Array, " B"],
  zero_expert_bias: float | Array,
  *,
  max_new_tokens: int,
  sampling: Sampling,
  eos_ids: tuple[int, ...],
) -> tuple[Int[Array, "B S"], Int[Array, " B"], Float[Array, "B S"], Float[Array, " B"], Float[Array, " B"]]:
  """Samples `max_new_tokens` (S) tokens or up to EOS after each right-padded prompt; rows of length 0 stay empty.

  Returns:
    tokens [B, S], their number per row [B], log-probs [B, S], and the share of zero picks per row [B], over the forward
    passes that predicted the response and over all.
  """
  model: Decoder = nnx.merge(graphdef, state)
  config = model.config
  batch, width = prompts.shape
  picks_per_token = sum(config.moe_layers) * config.num_experts_per_tok
  step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))

  def record(d: _Decoding, out: HiddenOutput, at: Int[Array, " B"]) -> _Decoding:
    """Samples the next token from the hidden state at index `at` of each row."""
    rows = jnp.arange(batch)
    token, logprob = sample(model.logits(out.hidden[rows, at]), step_keys(keys, d.step), sampling)
    zero = (out.picks[:, rows, at] >= config.num_experts).sum(axis=(0, 2)) / picks_per_token
    live = ~d.done
    assert out.cache is not None
    return dataclasses.replace(
      d,
      step=d.step + 1,
      token=token,
      done=d.done | _is_eos(token, eos_ids),
      cache=out.cache,
      tokens=d.tokens.at[:, d.step].set(jnp.where(live, token, 0)),
      logprobs=d.logprobs.at[:, d.step].set(jnp.where(live, logprob, 0.0)),
      zero_picks=d.zero_picks + jnp.where(live, zero, 0.0),
      lengths=d.lengths + live,
    )

  def decode(d: _Decoding) -> _Decoding:
    positions = (lengths + d.step - 1)[:, None]
    live = (~d.done).astype(jnp.int32)[:, None]
    out = model.hidden(d.token[:, None], live, positions, zero_expert_bias, cache=d.cache)
    return record(d, out, jnp.zeros(batch, jnp.int32))

  index = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompts.shape)
  cache = init_cache(config, batch, width + max_new_tokens)
  prefilled = model.hidden(prompts, (index < lengths[:, None]).astype(jnp.int32), index, zero_expert_bias, cache=cache)
  empty = jnp.zeros((batch, max_new_tokens))
  if config.sharding is not None:  # what the loop carries; the compiler might else give every device all rows
    empty = config.sharding.keep_rows(empty)
  start = _Decoding(
    step=jnp.zeros((), jnp.int32),
    token=jnp.zeros(batch, jnp.int32),
    done=lengths == 0,
    cache=cache,
    tokens=empty.astype(jnp.int32),
    logprobs=empty,
    zero_picks=jnp.zeros(batch),
    lengths=jnp.zeros(batch, jnp.int32),
  )
  start = record(start, prefilled, jnp.maximum(lengths - 1, 0))
  end = jax.lax.while_loop(lambda d: (d.step < max_new_tokens) & ~d.done.all(), decode, start)
  # The passes that predicted the response are the prompt's last one and all decode steps.
  prompt_zero = (prefilled.picks >= config.num_experts).sum(axis=(0, 3)) / picks_per_token
  earlier = jnp.where(index < lengths[:, None] - 1, prompt_zero, 0.0).sum(axis=1)
  passes = jnp.maximum(lengths - 1, 0) + end.lengths
  ratio, ratio_all = end.zero_picks / jnp.maximum(end.lengths, 1), (earlier + end.zero_picks) / jnp.maximum(passes, 1)
  return end.tokens, end.lengths, end.logprobs, ratio, ratio_all


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
  zero_expert_bias: float = 0.0,
  batch_size: int = 64,
  stream_ids: Sequence[int] | None = None,
  width: int = 0,
  progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
  """Samples one response per prompt.

  With a sharded model the sequences are shared out over all devices, and a copy of its parameters is spread for this
  (`Sharding.for_generation`). Where there are several processes, all
  must call this with the same arguments, and all get all samples.

  Args:
    model: static or dynamic decoder.
    prompts: token ids of each prompt (see `zeda_jax.data.chat` for chat templates).
    max_new_tokens: the most tokens to sample for each.
    temperature: 0 is greedy.
    top_k: keep the k best tokens; 0 keeps all.
    top_p: keep the smallest set of tokens with at least this mass.
    seed: of the sampling; the same seed gives the same tokens, whatever else is in the batch.
    eos_id: stop token(s); None means the checkpoint's own (`model.config.eos_token_ids`).
    zero_expert_bias: see `Decoder.__call__`.
    batch_size: sequences decoded together.
    stream_ids: number of each prompt's rng stream; None numbers them 0, 1, ...
    width: prompts are padded at least to this many tokens; one width for all calls compiles once.
    progress: called with (prompts answered, prompts in all) after each batch; what it raises ends the generation.

  Raises:
    ZedaError: a prompt is empty, holds a token outside the vocabulary, or does not leave room for max_new_tokens in the
      model's context.
  """
  sampling = Sampling(temperature, top_k, top_p)
  _check(model, prompts, max_new_tokens)
  eos = model.config.eos_token_ids if eos_id is None else eos_id
  eos_ids = tuple(int(token) for token in np.atleast_1d(eos))
  sharding = model.config.sharding
  if sharding is not None:
    sharding = sharding.for_generation(model.config.num_experts)
    model = resharded(model, sharding)
  graphdef, state = nnx.split(model)
  rows = batch_size if sharding is None else -(-batch_size // sharding.num_devices) * sharding.num_devices
  base = jax.random.key(seed)
  streams = np.arange(len(prompts)) if stream_ids is None else np.asarray(stream_ids)
  # Longest first: a batch then holds prompts of like length, and a too large batch fails at once rather than late.
  order = np.argsort([-len(p) for p in prompts], kind="stable")
  samples: dict[int, Sample] = {}
  for first in range(0, len(prompts), batch_size):
    chunk = order[first : first + batch_size]
    tokens, lengths = _pad([prompts[i] for i in chunk], rows, width)
    ids = np.zeros(rows, np.uint32)
    ids[: len(chunk)] = streams[chunk]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(base, jnp.asarray(ids))
    with on_mesh(sharding):
      out = generate_batch(
        graphdef,
        state,
        *_placed(tokens, lengths, keys, sharding),
        np.float32(zero_expert_bias),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
      )
    out_tokens, counts, logprobs, ratios, ratios_all = to_host(out)
    for row, i in enumerate(chunk):
      ids_row = out_tokens[row, : counts[row]].tolist()
      samples[int(i)] = Sample(
        tokens=ids_row,
        logprobs=logprobs[row, : counts[row]].tolist(),
        zero_ratio=float(ratios[row]),
        zero_ratio_all=float(ratios_all[row]),
        finished=bool(ids_row) and ids_row[-1] in eos_ids,
      )
    if progress is not None:
      progress(len(samples), len(prompts))
  return [samples[i] for i in range(len(prompts))]


def _check(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
  if max_new_tokens < 1:
    raise ZedaError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
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


def _placed(tokens: np.ndarray, lengths: np.ndarray, keys: Key[Array, " B"], sharding: Sharding | None) -> Any:
  """The rows of a batch where the model wants them."""
  if sharding is None:
    return tokens, lengths, keys
  words = spread_rows(np.asarray(jax.random.key_data(keys)), sharding)
  return *spread_rows((tokens, lengths), sharding), jax.random.wrap_key_data(words, impl=jax.random.key_impl(keys))


def _pad(prompts: Sequence[Sequence[int]], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Right-pads to a bucketed width and adds empty rows."""
  width = -(-max(width, *(len(p) for p in prompts)) // _BUCKET) * _BUCKET
  tokens = np.zeros((rows, width), np.int32)
  lengths = np.zeros(rows, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
    lengths[row] = len(prompt)
  return tokens, lengths
