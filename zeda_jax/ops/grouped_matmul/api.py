"""The two public functions, their gradients, and the choice of a backend.

A backend is three plain functions (see `Backend`); everything they share is here: the checks, the custom gradients,
vmap, shard_map and the choice by platform. So a backend sees int32 group sizes that fit into the rows, at least one
row, and operands that vary over the same mesh axes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zeda_jax.errors import ZedaError
from zeda_jax.ops.grouped_matmul import pallas_gpu, pallas_tpu, ragged_dot, reference, tiled
from zeda_jax.ops.grouped_matmul.activation import swiglu_halves
from zeda_jax.ops.platforms import by_backend
from zeda_jax.ops.varying import vary_alike


class Backend(NamedTuple):
  """One way to compute the products. All accumulate in fp32 and write exact zeros where no row contributes.

  Attributes:
    product: (lhs [M, K], rhs [G, K, N], group_sizes [G], *, transpose_rhs, precision, dtype) -> [M, N]; with
      transpose_rhs, rhs is [G, N, K] and row i becomes lhs[i] @ rhs[g].T.
    weight_product: (lhs [M, K], grad [M, N], group_sizes [G], *, precision, dtype) -> [G, K, N], group g being
      lhs[rows of g].T @ grad[rows of g].
    swiglu: (lhs [M, K], gate_up [G, K, 2F], group_sizes [G], *, precision, dtype) -> [M, F], equal to
      activation.swiglu_halves of the product, which is what None means.
    platforms: of JAX, where it runs; None means all.
  """

  product: Callable[..., Array]
  weight_product: Callable[..., Array]
  swiglu: Callable[..., Array] | None = None
  platforms: tuple[str, ...] | None = None


# A plain dictionary: an entry of your own, say one with other tiles for a kernel, can be named as a backend as well.
BACKENDS = {
  "pallas_tpu": Backend(pallas_tpu.product, pallas_tpu.weight_product, pallas_tpu.swiglu, ("tpu",)),
  "pallas_gpu": Backend(pallas_gpu.product, pallas_gpu.weight_product, pallas_gpu.swiglu, ("cuda",)),
  "tiled": Backend(tiled.product, tiled.weight_product, tiled.swiglu),
  "ragged_dot": Backend(ragged_dot.product, ragged_dot.weight_product),
  "reference": Backend(reference.product, reference.weight_product),
}
# The best backend of a platform; every platform that is not named takes the last one.
DEFAULTS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
ELSEWHERE = "tiled"


def grouped_matmul(
  lhs: Float[Array, "M K"],
  rhs: Float[Array, "G K N"],
  group_sizes: Int[Array, " G"],
  *,
  backend: str | None = None,
  precision: jax.lax.PrecisionLike = None,
  preferred_element_type: jax.typing.DTypeLike | None = None,
) -> Float[Array, "M N"]:
  """out[i] = lhs[i] @ rhs[g], where g is the group that row i falls into when groups lie one after another.

  Rows past sum(group_sizes) are never used: they come out exactly 0, get gradient exactly 0 and may hold NaN; neither
  they nor empty groups cost a product. Accumulation is in fp32. Differentiable in lhs and rhs (reverse mode), also
  under jit, vmap, scan and shard_map.

  Args:
    lhs: rows sorted by group.
    rhs: one matrix per group, of lhs's type.
    group_sizes: rows per group. The sum is meant to be at most M; that cannot be checked under jit, so the groups are
      cut at row M: whatever lies past it does not exist, and nothing is read out of bounds. Negative sizes count as 0.
    backend: a name in BACKENDS; None picks the best for the platform that the program is compiled for, which under
      ahead-of-time compilation need not be the one it is compiled on.
    precision: of the products, as in jax.lax.dot.
    preferred_element_type: of the result; None means the operands' type.

  Raises:
    ZedaError: ranks, shapes or types do not fit each other, the backend is unknown, or (when the program is lowered)
      it does not run on the platform.
  """
  _check("grouped_matmul", "rhs", lhs, rhs, group_sizes, backend)
  dtype = jnp.dtype(preferred_element_type or lhs.dtype)
  if lhs.shape[0] == 0:
    return jnp.zeros((0, rhs.shape[2]), dtype)
  operands = vary_alike(lhs, rhs, _cut(group_sizes, lhs.shape[0]))
  return _jitted(_grouped_matmul, *operands, _Options(backend, _hashable(precision), dtype))


def grouped_swiglu(
  lhs: Float[Array, "M K"],
  gate_up: Float[Array, "G K 2F"],
  group_sizes: Int[Array, " G"],
  *,
  backend: str | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "M F"]:
  """silu(gate) * up, where gate and up are the halves of grouped_matmul(lhs, gate_up, group_sizes), gate first.

  Where nothing is differentiated, the Pallas backends do it in one pass and never write the [M, 2F] product. Under
  differentiation the product is written, since the backward pass needs it.

  Arguments and errors: as in `grouped_matmul`.
  """
  _check("grouped_swiglu", "gate_up", lhs, gate_up, group_sizes, backend)
  if gate_up.shape[2] % 2:
    raise ZedaError(
      f"grouped_swiglu: gate_up is {gate_up.shape}; expected an even last axis, gate and up side by side."
    )
  if lhs.shape[0] == 0:
    return jnp.zeros((0, gate_up.shape[2] // 2), lhs.dtype)
  operands = vary_alike(lhs, gate_up, _cut(group_sizes, lhs.shape[0]))
  return _jitted(_grouped_swiglu, *operands, _Options(backend, _hashable(precision), lhs.dtype))


class _Options(NamedTuple):
  backend: str | None
  precision: Any
  dtype: jnp.dtype


def _check(function: str, rhs_name: str, lhs: Array, rhs: Array, group_sizes: Array, backend: str | None) -> None:
  if lhs.ndim != 2 or rhs.ndim != 3 or group_sizes.ndim != 1:
    raise ZedaError(
      f"{function}: expected lhs [M, K], {rhs_name} [G, K, N] and group_sizes [G]; found {lhs.shape}, {rhs.shape} "
      f"and {group_sizes.shape}."
    )
  if lhs.shape[1] != rhs.shape[1]:
    raise ZedaError(
      f"{function}: lhs {lhs.shape} has K = {lhs.shape[1]} and {rhs_name} {rhs.shape} has K = {rhs.shape[1]}; they "
      "must be equal."
    )
  if rhs.shape[0] != group_sizes.shape[0]:
    raise ZedaError(
      f"{function}: group_sizes has {group_sizes.shape[0]} entries; expected one per matrix in {rhs_name} {rhs.shape}, "
      f"which are {rhs.shape[0]}."
    )
  if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
    raise ZedaError(f"{function}: group_sizes is {group_sizes.dtype}; expected an integer type, such as int32.")
  if lhs.dtype != rhs.dtype or not jnp.issubdtype(lhs.dtype, jnp.floating):
    raise ZedaError(
      f"{function}: lhs is {lhs.dtype} and {rhs_name} is {rhs.dtype}; expected one floating type for both: cast one."
    )
  if backend is not None and backend not in BACKENDS:
    raise ZedaError(f"{function}: backend is {backend!r}; expected None or one of {', '.join(BACKENDS)}.")


def _cut(group_sizes: Int[Array, " G"], num_rows: int) -> Int[Array, " G"]:
  """The sizes as int32, with every group cut at row `num_rows`."""
  ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes, 0).astype(jnp.int32)), num_rows)
  return jnp.diff(ends, prepend=0)


def _hashable(precision: Any) -> Any:
  return tuple(precision) if isinstance(precision, list) else precision


def _dispatch(
  function: str, options: _Options, operands: tuple[Array, Array, Array], shape: tuple[int, ...], **more: Any
) -> Array:
  """Runs a function of the backend; None is resolved when the program is lowered, by its platform."""

  def of(name: str) -> Callable[..., Array]:
    arguments = {"precision": options.precision, "dtype": options.dtype, **more}
    if function == "swiglu" and BACKENDS[name].swiglu is None:
      product = functools.partial(BACKENDS[name].product, transpose_rhs=False, **arguments)
      return lambda *operands: swiglu_halves(product(*operands))
    return functools.partial(getattr(BACKENDS[name], function), **arguments)

  name = options.backend
  return by_backend(
    *operands,
    name=name,
    platforms=None if name is None else BACKENDS[name].platforms,
    of=of,
    defaults=DEFAULTS,
    elsewhere=ELSEWHERE,
    result=jax.ShapeDtypeStruct(shape, options.dtype),
    what="grouped_matmul",
    anywhere=", ".join(other for other, backend in BACKENDS.items() if backend.platforms is None),
  )


def _product(lhs: Array, rhs: Array, group_sizes: Array, options: _Options, *, transpose_rhs: bool = False) -> Array:
  shape = lhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
  return _dispatch("product", options, (lhs, rhs, group_sizes), shape, transpose_rhs=transpose_rhs)


def _product_gradients(
  options: _Options, residuals: tuple[Array, Array, Array], grad: Array
) -> tuple[Array, Array, None]:
  """d_lhs is a grouped product with the matrices transposed, d_rhs a transposed grouped product."""
  lhs, rhs, group_sizes = residuals
  grad, options = grad.astype(lhs.dtype), options._replace(dtype=lhs.dtype)
  d_lhs = _product(grad, rhs, group_sizes, options, transpose_rhs=True)
  return d_lhs, _dispatch("weight_product", options, (lhs, grad, group_sizes), rhs.shape), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(lhs, rhs, group_sizes, options):
  return _product(lhs, rhs, group_sizes, options)


_grouped_matmul.defvjp(lambda *arguments: (_product(*arguments), arguments[:3]), _product_gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_swiglu(lhs, gate_up, group_sizes, options):
  return _dispatch("swiglu", options, (lhs, gate_up, group_sizes), (lhs.shape[0], gate_up.shape[2] // 2))


def _swiglu_forward(lhs, gate_up, group_sizes, options):
  both = _product(lhs, gate_up, group_sizes, options)
  return swiglu_halves(both), (lhs, gate_up, group_sizes, both)


def _swiglu_backward(options, residuals, grad):
  (d_both,) = jax.vjp(swiglu_halves, residuals[3])[1](grad)
  return _product_gradients(options, residuals[:3], d_both)


_grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)

# One trace per shape, also where the caller is not compiled.
_jitted = jax.jit(lambda function, *arguments: function(*arguments), static_argnums=(0, 4))
