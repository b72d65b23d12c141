"""Weights, tokens and routing of a shape: one MoE layer whose own router picks, as unevenly as real ones do.

Tokens are Gaussian around a common mean and router rows are Gaussian, so an expert's logit is N(0, 1) over the tokens
plus a popularity of its own, drawn from N(0, POPULARITY²): at K = 8 of 128 the busiest expert gets three to five times
the mean, some a third of it. The zero ratio is set with the layer's dial, zero_expert_bias.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from zeda_jax.bench.shapes import Shape
from zeda_jax.config import ModelConfig
from zeda_jax.models.moe import MoELayer

POPULARITY = 0.5  # standard deviation of the experts' mean logits
_BISECTIONS = 60
# Prime, so that a repeated block of noise gives every expert other weights. Time does not depend on the values, and
# drawing a billion of them would take longer than the benchmark.
_BLOCK = 1_000_003

Params = dict[str, Any]


class Layer(NamedTuple):
  """An MoE layer and its input.

  Attributes:
    graphdef: of the MoELayer, for `apply`.
    params: its arrays; the experts' are params["experts"]["gate_up"] [N, H, 2F] and ["down"] [N, F, H].
    x: tokens [T, H].
  """

  shape: Shape
  graphdef: nnx.GraphDef
  params: Params
  x: Float[Array, "T H"]


class Picks(NamedTuple):
  """What the router does at one zero ratio.

  Attributes:
    bias: zero_expert_bias that leads to it; -inf for a ratio of 0.
    zero_ratio: the share of zero picks there is.
    group_sizes: picks per normal expert, on the host.
  """

  bias: float
  zero_ratio: float
  group_sizes: Int[np.ndarray, " N"]

  @property
  def rows(self) -> int:
    """Picks of normal experts: the rows to compute."""
    return int(self.group_sizes.sum())

  @property
  def touched(self) -> int:
    """Experts with at least one row: those whose weights must be read."""
    return int(np.count_nonzero(self.group_sizes))

  @property
  def busiest(self) -> float:
    """Rows of the busiest expert, relative to the mean over all N."""
    return float(self.group_sizes.max() / max(self.group_sizes.mean(), 1e-9))


def layer_config(shape: Shape, dtype: str) -> ModelConfig:
  """Qwen3's routing in the shape's sizes; what is outside the layer does not matter here."""
  return ModelConfig(
    model_type="qwen3_moe",
    vocab_size=1,
    hidden_size=shape.hidden,
    num_heads=1,
    num_kv_heads=1,
    head_dim=shape.hidden,
    intermediate_size=shape.inner,
    moe_intermediate_size=shape.inner,
    num_experts=shape.experts,
    num_experts_per_tok=shape.top_k,
    moe_layers=(True,),
    num_zero_experts=shape.zero_experts,
    dtype=dtype,
  )


def noise(shape: tuple[int, ...], std: float, dtype: str, seed: int) -> Array:
  """Gaussian numbers, repeated after _BLOCK of them."""
  block = np.random.default_rng(seed).standard_normal(min(_BLOCK, int(np.prod(shape))), np.float32) * np.float32(std)
  return jnp.asarray(np.resize(block.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32), shape))


def make_layer(shape: Shape, dtype: str, seed: int = 0, params: Params | None = None) -> Layer:
  """A random layer and its tokens; `params` are those of a layer of the same sizes, to be shared."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: MoELayer(layer_config(shape, dtype), nnx.Rngs(0))))
  if params is None:

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
      # Every matrix keeps the size of what passes through it; the router's rows lie in the last axis.
      inputs = leaf.shape[-1] if "router" in jax.tree_util.keystr(path) else leaf.shape[-2]
      return noise(leaf.shape, inputs**-0.5, dtype, seed + len(jax.tree_util.keystr(path)))

    params = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))
  mean = POPULARITY * noise((1, shape.hidden), 1.0, "float32", seed + 1001)
  x = mean + noise((shape.tokens, shape.hidden), 1.0, "float32", seed + 1002)
  return Layer(shape, graphdef, params, x.astype(dtype))


def apply(
  graphdef: nnx.GraphDef, params: Params, x: Float[Array, "T H"], bias: float | Array, backend: str | None = None
) -> Any:
  """What the MoELayer returns: (out [T, H], Routing)."""
  module: Any = nnx.merge(graphdef, nnx.State(jax.tree.map(nnx.Param, params)))
  return module(x, bias, backend=backend)


def picks_at(layer: Layer, ratios: tuple[float, ...]) -> list[Picks]:
  """The router's picks at every ratio: as near to it as a whole number of zero picks allows."""
  sizes = _group_sizes(layer)
  return [_picks_at(layer.shape, sizes, ratio) for ratio in ratios]


def _group_sizes(layer: Layer) -> Callable[[float], np.ndarray]:
  """bias -> picks per normal expert."""
  experts = layer.shape.experts
  router: Any = nnx.eval_shape(lambda: MoELayer(layer_config(layer.shape, str(layer.x.dtype)), nnx.Rngs(0))).router
  graphdef = nnx.split(router)[0]

  @jax.jit
  def counts(params: Params, x: Array, bias: Array) -> Array:
    module: Any = nnx.merge(graphdef, nnx.State(jax.tree.map(nnx.Param, params)))
    return jnp.bincount(jnp.minimum(module(x, bias).picks, experts).reshape(-1), length=experts + 1)[:experts]

  return lambda bias: np.asarray(counts(layer.params["router"], layer.x, jnp.float32(bias)))


def _picks_at(shape: Shape, group_sizes: Callable[[float], np.ndarray], ratio: float) -> Picks:
  wanted = round(shape.picks * (1.0 - ratio))
  low, high = -100.0, 100.0  # far beyond every logit
  bias = -np.inf if ratio == 0.0 else 0.0
  best = group_sizes(bias)
  # The higher the bias, the fewer rows: nothing else about the routing is chosen here.
  for _ in range(_BISECTIONS):
    if best.sum() == wanted:
      break
    middle = (low + high) / 2
    sizes = group_sizes(middle)
    low, high = (middle, high) if sizes.sum() > wanted else (low, middle)
    if abs(sizes.sum() - wanted) < abs(best.sum() - wanted):
      best, bias = sizes, middle
  return Picks(float(bias), 1.0 - best.sum() / shape.picks, best)
