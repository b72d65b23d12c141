"""The mixture-of-experts layer: route, run the picked experts, add the shared one."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from zeda_jax.config import ModelConfig
from zeda_jax.models.expert_parallel import parallel_experts
from zeda_jax.models.experts import run_experts
from zeda_jax.models.layers import DenseMLP, normal_init
from zeda_jax.zero_experts import Routing, route, router_scores


class Router(nnx.Module):
  """Scores of all experts in fp32. Zero experts keep their rows apart, so that they can be masked exactly.

  Sigmoid routers have a correction bias, which decides the picks and has no gradient: it is no trained parameter (see
  models/params.py), but what pre-training left there.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.weight = normal_init(rngs, (config.num_experts, config.hidden_size))
    zero = config.num_zero_experts
    self.zero_weight = normal_init(rngs, (zero, config.hidden_size)) if zero else None
    corrected = config.scoring == "sigmoid"
    self.correction_bias = nnx.Param(jnp.zeros(config.num_experts)) if corrected else None
    self.zero_correction_bias = nnx.Param(jnp.zeros(zero)) if corrected and zero else None

  def __call__(
    self,
    x: Float[Array, "T H"],
    zero_expert_bias: float | Array = 0.0,
    replay: Int[Array, "T K"] | None = None,
  ) -> Routing:
    config = self.config

    def logits(rows: nnx.Param) -> Float[Array, "T E"]:
      product = lambda x, rows: jnp.matmul(x.astype(jnp.float32), rows.astype(jnp.float32).T, precision="highest")
      return product(x, rows[...]) if config.sharding is None else config.sharding.on_rows(product, x, rows[...])

    zero_logits = None if self.zero_weight is None else logits(self.zero_weight)
    routing = route(
      router_scores(logits(self.weight), zero_logits, zero_expert_bias, config.scoring),
      config.num_experts_per_tok,
      config.num_experts,
      correction=self._correction(),
      num_groups=config.num_groups,
      top_groups=config.top_groups,
      normalize=config.norm_topk_prob,
      scaling=config.routed_scaling_factor,
      renormalize=config.renormalize,
      execute_top_k=config.execute_top_k,
      skip_threshold=config.skip_threshold,
      replay=replay,
    )
    if config.scoring == "softmax":
      return routing
    return routing._replace(scores=routing.scores / (routing.scores.sum(axis=-1, keepdims=True) + 1e-20))

  def _correction(self) -> Float[Array, " E"] | None:
    parts = [p[...].astype(jnp.float32) for p in (self.correction_bias, self.zero_correction_bias) if p is not None]
    return jnp.concatenate(parts) if parts else None


class Experts(nnx.Module):
  """The N normal experts, stacked. gate and up lie side by side in the last axis of `gate_up`, gate first."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    self.gate_up = normal_init(rngs, (experts, hidden, 2 * inner))
    self.down = normal_init(rngs, (experts, inner, hidden))

  def __call__(
    self, x: Float[Array, "T H"], picks: Int[Array, "T K"], weights: Float[Array, "T K"], backend: str | None = None
  ) -> Float[Array, "T H"]:
    return run_experts(x, picks, weights, *self.matrices(x.dtype), backend)

  def matrices(self, dtype: jnp.dtype) -> tuple[Float[Array, "N H 2F"], Float[Array, "N F H"]]:
    return self.gate_up[...].astype(dtype), self.down[...].astype(dtype)


class MoELayer(nnx.Module):
  """Router and experts, and the shared expert that every token takes. Padding picks no expert, whatever it scores."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.router = Router(config, rngs)
    self.experts = Experts(config, rngs)
    self.num_experts = config.num_experts
    self.sharding = config.sharding
    self.num_copies = config.num_zero_experts if config.zero_expert_type == "copy" else 0
    shared = config.num_shared_experts
    self.shared_experts = DenseMLP(config, rngs, shared * config.moe_intermediate_size) if shared else None

  def __call__(
    self,
    x: Float[Array, "T H"],
    zero_expert_bias: float | Array = 0.0,
    live: Bool[Array, " T"] | None = None,
    replay: Int[Array, "T K"] | None = None,
    backend: str | None = None,
  ) -> tuple[Float[Array, "T H"], Routing]:
    """The layer's output, and what its router decided; for `replay` see `route`, `backend` is grouped_matmul's."""
    routing = self.router(x, zero_expert_bias, replay)
    picks = routing.picks
    if live is not None:
      picks = jnp.where(live[:, None], picks, self.num_experts)
    if self.sharding is None:
      out = self.experts(x, picks, routing.weights, backend)
    else:
      matrices = self.experts.matrices(x.dtype)
      out, exchange = parallel_experts(x, picks, routing.weights, *matrices, self.sharding, backend)
      routing = routing._replace(exchange=exchange)
    if self.num_copies:
      is_copy = (picks >= self.num_experts) & (picks < self.num_experts + self.num_copies)
      out = out + x * jnp.where(is_copy, routing.weights, 0.0).sum(axis=-1, keepdims=True).astype(x.dtype)
    return (out if self.shared_experts is None else out + self.shared_experts(x)), routing
