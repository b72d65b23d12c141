"""The decoder: embedding, runs of stacked layers that are scanned, final norm, head. Static and dynamic alike."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from zeda_jax.config import ModelConfig
from zeda_jax.distributed import to_host
from zeda_jax.errors import ZedaError
from zeda_jax.models.attention import Attention
from zeda_jax.models.layers import DenseMLP, Embedding, Linear, RMSNorm, rope_tables
from zeda_jax.models.mla import MLA
from zeda_jax.models.moe import MoELayer
from zeda_jax.models.paged_cache import PagedCache
from zeda_jax.ops.attention import SAVED
from zeda_jax.sharding import Exchange
from zeda_jax.zero_experts import Routing, new_router_rows

# (routing of one layer, real-token mask [T]) -> scalar; summed over layers by the objective.
AuxLoss = Callable[[Routing, Bool[Array, " T"]], Float[Array, ""]]


# What of a layer is kept for the backward pass, by ModelConfig.remat; None keeps nothing.
_REMAT_POLICIES = {
  "layer": None,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(SAVED)
  ),
}


@struct.dataclass
class HiddenOutput:
  """What the layers give: `hidden` is after the final norm; the rest is stacked over MoE layers."""

  hidden: Float[Array, "B T H"]
  picks: Int[Array, "L B T K"]
  pick_weights: Float[Array, "L B T K"]
  aux_loss: Float[Array, " L"]
  cache: PagedCache | None
  exchange: Exchange | None = None  # what was sent between devices; None where the model has no sharding
  replaced: Int[Array, "L B T"] | None = None  # own picks that replay left out; None without replay


@struct.dataclass
class DecoderOutput:
  logits: Float[Array, "B T V"]
  picks: Int[Array, "L B T K"]  # ids >= num_experts are zero experts
  pick_weights: Float[Array, "L B T K"]


@dataclasses.dataclass(frozen=True)
class _Shared:
  """What every layer of one forward pass sees."""

  rope: tuple[Array, Array]
  segment_ids: Int[Array, "B T"] | None
  positions: Int[Array, "B T"]
  live: Bool[Array, "B T"]
  zero_expert_bias: float | Array
  aux_loss: AuxLoss | None


class _Routed(NamedTuple):
  """What a MoE layer's router did; stacked over layers in HiddenOutput."""

  picks: Int[Array, "B T K"]
  weights: Float[Array, "B T K"]
  aux_loss: Float[Array, ""]
  exchange: Exchange | None
  replaced: Int[Array, "B T"] | None


class DecoderLayer(nnx.Module):
  def __init__(self, config: ModelConfig, is_moe: bool, rngs: nnx.Rngs):
    self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    self.attention = Attention(config, rngs) if config.mla is None else MLA(config, rngs)
    self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    self.mlp = MoELayer(config, rngs) if is_moe else DenseMLP(config, rngs)

  def __call__(
    self,
    x: Float[Array, "B T H"],
    layer: Int[Array, ""],
    cache: PagedCache | None,
    shared: _Shared,
    replay: Int[Array, "B T K"] | None = None,
  ) -> tuple[Float[Array, "B T H"], PagedCache | None, _Routed | None]:
    with jax.named_scope("attention"):
      out, cache = self.attention(self.input_norm(x), shared.rope, shared.segment_ids, shared.positions, layer, cache)
      x = x + out
    normed = self.post_attention_norm(x)
    if isinstance(self.mlp, DenseMLP):
      with jax.named_scope("mlp"):
        return x + self.mlp(normed), cache, None
    with jax.named_scope("moe"):
      live = shared.live.reshape(-1)
      flat = lambda a: a.reshape(-1, a.shape[-1])
      given = None if replay is None else flat(replay)
      out, routing = self.mlp(flat(normed), shared.zero_expert_bias, live, given)
      aux = jnp.zeros(()) if shared.aux_loss is None else shared.aux_loss(routing, live)
      by_token = lambda a: a.reshape(*x.shape[:2], -1)
      replaced = None if routing.replaced is None else routing.replaced.reshape(x.shape[:2])
      routed = _Routed(by_token(routing.picks), by_token(routing.weights), aux, routing.exchange, replaced)
      return x + out.reshape(x.shape), cache, routed


def _stacked_layers(config: ModelConfig, is_moe: bool, length: int, rngs: nnx.Rngs) -> DecoderLayer:
  """`length` layers as one module whose parameters have a leading layer axis."""

  def init(key: Array) -> nnx.State:
    return nnx.state(DecoderLayer(config, is_moe, nnx.Rngs(key)))

  graphdef = nnx.graphdef(nnx.eval_shape(lambda: DecoderLayer(config, is_moe, nnx.Rngs(0))))
  return nnx.merge(graphdef, jax.vmap(init)(jax.random.split(rngs.params(), length)))


class Decoder(nnx.Module):
  """A decoder-only MoE transformer. `config.num_zero_experts` > 0 makes it dynamic; nothing else differs."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.embed = Embedding(config.vocab_size, config.hidden_size, rngs, config.sharding)
    self.runs = nnx.List([_stacked_layers(config, run.is_moe, run.length, rngs) for run in config.layer_runs])
    self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    tied = config.tie_word_embeddings
    self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    zero_expert_bias: float | Array = 0.0,
  ) -> DecoderOutput:
    """Logits of every position.

    Args:
      tokens: token ids.
      segment_ids: 1, 2, ... for the sequences packed into a row, 0 for padding; None means one sequence a row.
      positions: of each token in its own sequence; None derives them from segment_ids.
      zero_expert_bias: added to the zero experts' router logits. -inf gives the static teacher, bit for bit; other
        values trade quality for speed on one adapted model.
    """
    out = self.hidden(tokens, segment_ids, positions, zero_expert_bias)
    return DecoderOutput(self.logits(out.hidden), out.picks, out.pick_weights)

  def head(self) -> Float[Array, "H V"]:
    return self.embed.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]

  def logits(self, hidden: Float[Array, "*b H"]) -> Float[Array, "*b V"]:
    """fp32 logits of final hidden states."""
    return jnp.matmul(hidden, self.head().astype(hidden.dtype), preferred_element_type=jnp.float32)

  def hidden(
    self,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    zero_expert_bias: float | Array = 0.0,
    *,
    cache: PagedCache | None = None,
    aux_loss: AuxLoss | None = None,
    replay: Int[Array, "L B T K"] | None = None,
  ) -> HiddenOutput:
    """Everything but the head, for losses and samplers that never want all logits at once.

    With a cache, each row is one sequence: segment_ids are 1 for its tokens and 0 for padding. It begins with this pass
    (`PagedCache.fresh`), or it is one token that sees what the cache holds of it.
    `replay` are picks of the L MoE layers to take instead of the routers' own (see `zero_experts.route`).
    """
    if positions is None:
      positions = segment_positions(segment_ids, tokens.shape)
    live = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
    rope = rope_tables(self.config.rope, self.config.rope_dim, positions)
    shared = _Shared(rope, segment_ids, positions, live, zero_expert_bias, aux_loss)

    x = self.embed(tokens, jnp.dtype(self.config.dtype))
    routed: list[_Routed] = []
    first = 0  # MoE layers before this run
    for run, layers in zip(self.config.layer_runs, self.runs, strict=True):
      given = None if replay is None or not run.is_moe else replay[first : first + run.length]
      x, cache, out = _scan_layers(layers, run, x, cache, shared, given, self.config)
      if out is not None:
        routed.append(out)
        first += run.length
    all = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routed)
    return HiddenOutput(self.final_norm(x), all.picks, all.weights, all.aux_loss, cache, all.exchange, all.replaced)


def _scan_layers(layers, run, x, cache, shared, replay, config):
  """One scan over a run of stacked layers: compile time does not grow with depth."""
  graphdef, state = nnx.split(layers)

  def body(carry, inputs):
    x, cache = carry
    state, layer, given = inputs
    if config.sharding is not None:  # else the compiler may spread activations as it likes parameters to be
      x = config.sharding.keep_rows(x)
    x, cache, routed = nnx.merge(graphdef, state)(x, layer, cache, shared, given)
    return (x, cache), routed

  if config.remat != "none":
    body = jax.checkpoint(body, policy=_REMAT_POLICIES[config.remat])
  inputs = (state, run.start + jnp.arange(run.length), replay)
  (x, cache), routed = jax.lax.scan(body, (x, cache), inputs, unroll=config.scan_unroll)
  return x, cache, routed


def segment_positions(segment_ids: Int[Array, "B T"] | None, shape: tuple[int, ...]) -> Int[Array, "B T"]:
  """Positions that restart at 0 where the segment id changes."""
  index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
  if segment_ids is None:
    return index
  starts = jnp.concatenate([jnp.ones((shape[0], 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
  # cummax of the start indices = index of the latest start at or before each position
  return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def abstract_decoder(config: ModelConfig) -> Decoder:
  """A Decoder whose parameters are shapes only; nothing is allocated."""
  return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def inject(model: Decoder, num_zero_experts: int | None = None, seed: int = 0) -> Decoder:
  """The dynamic twin of a static model: every MoE router gets rows for zero experts; all else is shared with `model`.

  Args:
    model: a static decoder; where it is sharded, so are the new rows, which are the same.
    num_zero_experts: N_Z; None means half the experts.
    seed: of the new router rows.

  Raises:
    ZedaError: the model is dynamic already, or num_zero_experts is not positive.
  """
  config = model.config
  if config.is_dynamic:
    raise ZedaError(f"The model already has {config.num_zero_experts} zero experts; inject takes a static model.")
  count = config.num_experts // 2 if num_zero_experts is None else num_zero_experts
  graphdef, target = nnx.split(abstract_decoder(_with_zero_experts(config, count)))
  state = nnx.to_pure_dict(nnx.state(model))
  for number, run in enumerate(config.layer_runs):
    if run.is_moe:
      router = state["runs"][number]["mlp"]["router"]
      for name in ("weight", "correction_bias"):
        if name in router:
          rows = to_host(router[name])
          new = np.stack([new_router_rows(rows[i], count, seed, run.start + i) for i in range(run.length)])
          router["zero_" + name] = _placed(new, ("runs", number, "mlp", "router", "zero_" + name), config, router[name])
  nnx.replace_by_pure_dict(target, state)
  return nnx.merge(graphdef, target)


def _placed(value: np.ndarray, path: tuple[str | int, ...], config: ModelConfig, beside: jax.Array) -> jax.Array:
  """A parameter that every process has whole, where the model's sharding wants it, or like the one beside it."""
  if config.sharding is None:
    # Programs are compiled again for arrays that are not bound to a device as the others are.
    return jax.device_put(value, beside.sharding) if beside.committed else jnp.asarray(value)
  where = config.sharding.parameter(path, value.shape)
  return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def _with_zero_experts(config: ModelConfig, count: int) -> ModelConfig:
  if count <= 0:
    raise ZedaError(f"num_zero_experts is {count}; expected a positive number (half the experts is usual).")
  return config.replace(num_zero_experts=count)
