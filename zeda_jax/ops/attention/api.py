"""The public function, its gradient, and the choice of a backend.

A backend is two plain functions (see `Backend`); what they share is here: the checks, padding, the custom gradient,
vmap, meshes and the choice by platform.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from zeda_jax.errors import ZedaError
from zeda_jax.ops.attention import chunked, cudnn, splash
from zeda_jax.ops.attention.plain import masked_attention, packed_mask
from zeda_jax.ops.platforms import by_backend
from zeda_jax.ops.varying import vary_alike

LONG = 1024  # tokens of a row from which the [B, N, T, T] logits are never made
SAVED = "attention"  # checkpoint name of what the backward pass needs beside query, key and value


class Backend(NamedTuple):
  """One way to attend within long rows. Of padding, only that the results are finite is asked.

  Attributes:
    forward: (query [B, T, N, D], key [B, T, M, D], value [B, T, M, V], segment_ids [B, T] = None, *, scale) -> output
      [B, T, N, V] in value's type and an fp32 [B, N, T] that `backward` wants back.
    backward: (query, key, value, output, that array, gradient of the output, segment_ids = None, *, scale) ->
      gradients of query, key and value.
    platforms: of JAX, where it runs; None means all.
  """

  forward: Callable[..., tuple[Array, Array]]
  backward: Callable[..., tuple[Array, Array, Array]]
  platforms: tuple[str, ...] | None = None


BACKENDS = {
  "splash": Backend(splash.forward, splash.backward, ("tpu",)),
  "cudnn": Backend(cudnn.forward, cudnn.backward, ("cuda",)),
  "chunked": Backend(chunked.forward, chunked.backward),
}
# The best backend of a platform; every platform that is not named takes the last one.
DEFAULTS = {"tpu": "splash", "cuda": "cudnn"}
ELSEWHERE = "chunked"
PLAIN = "plain"  # the fourth name: ordinary XLA with a mask, and its own gradient


def attention(
  query: Float[Array, "B T N D"],
  key: Float[Array, "B T M D"],
  value: Float[Array, "B T M V"],
  segment_ids: Int[Array, "B T"] | None = None,
  *,
  scale: float | None = None,
  backend: str | None = None,
) -> Float[Array, "B T N V"]:
  """softmax(scale q k) v within packed rows, softmax and sums in fp32; N query heads share M key/value heads.

  Query t sees key s where s <= t and both lie in the same segment. Padding comes out as 0, whatever it holds that is
  finite, and no gradient passes through it. Memory is linear in T, but for the plain backend, which short rows take.

  Under jit on a mesh that `jax.set_mesh` has set, rows are attended to where they lie: the batch is split over as many
  of the mesh's automatic axes as divide it. (The compiler cannot split a TPU kernel by itself.)

  Args:
    query: of N heads, N a multiple of M.
    key: of M heads.
    value: of M heads, whose width may be another than the queries'.
    segment_ids: 1, 2, ... for the sequences packed into a row, 0 for padding; None means one sequence a row.
    scale: of the logits; None means 1 / sqrt(D).
    backend: "plain" or a name in BACKENDS. None takes the plain one for rows of less than LONG tokens; for longer
      ones the best of the platform that the program is compiled for: splash attention on TPUs, cuDNN on NVIDIA GPUs
      where it takes the operands (see cudnn.supports), chunks elsewhere.

  Raises:
    ZedaError: shapes or types do not fit each other, the backend is unknown, or (when the program is lowered) it does
      not run on the platform or does not take the operands.
  """
  _check(query, key, value, segment_ids, backend)
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  if backend == PLAIN or (backend is None and query.shape[1] < LONG):
    out = masked_attention(query, key, value, packed_mask(segment_ids, query.shape[1]), scale)
  else:
    out = _on_mesh(functools.partial(_flash, _Options(backend, scale)), query, key, value, segment_ids)
  return out if segment_ids is None else jnp.where((segment_ids > 0)[:, :, None, None], out, 0)


class _Options(NamedTuple):
  backend: str | None
  scale: float


def _check(query: Array, key: Array, value: Array, segment_ids: Array | None, backend: str | None) -> None:
  shapes = f"{query.shape}, {key.shape} and {value.shape}"
  if {query.ndim, key.ndim, value.ndim} != {4}:
    raise ZedaError(f"attention: expected query [B, T, N, D], key [B, T, M, D] and value [B, T, M, V]; found {shapes}.")
  if not (query.shape[:2] == key.shape[:2] == value.shape[:2] and key.shape[2] == value.shape[2]):
    raise ZedaError(
      f"attention: query, key and value are {shapes}; expected the same batch and length for all, and as many heads of "
      "values as of keys."
    )
  if query.shape[3] != key.shape[3] or query.shape[2] % key.shape[2]:
    raise ZedaError(
      f"attention: query {query.shape} and key {key.shape} do not fit: expected heads of the same width, and in the "
      "query a multiple of the key's heads."
    )
  if segment_ids is not None and segment_ids.shape != query.shape[:2]:
    raise ZedaError(f"attention: segment_ids is {segment_ids.shape}; expected [B, T], which is {query.shape[:2]}.")
  if not query.dtype == key.dtype == value.dtype:
    types = f"{query.dtype}, {key.dtype} and {value.dtype}"
    raise ZedaError(f"attention: query, key and value are {types}; expected one type: cast two of them.")
  if backend not in (None, PLAIN, *BACKENDS):
    raise ZedaError(f"attention: backend is {backend!r}; expected None or one of {PLAIN}, {', '.join(BACKENDS)}.")


def _on_mesh(
  run: Callable[..., Array], query: Array, key: Array, value: Array, segment_ids: Array | None
) -> Float[Array, "B T N V"]:
  """run(...) on each device's own rows, where a mesh with automatic axes is set."""
  operands = (query, key, value) if segment_ids is None else (query, key, value, segment_ids)
  mesh = jax.sharding.get_abstract_mesh()
  automatic = [a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
  if math.prod(mesh.shape[a] for a in automatic) == 1:
    return run(*operands)
  axes: list[str] = []
  for axis in automatic:
    if query.shape[0] % math.prod(mesh.shape[a] for a in (*axes, axis)) == 0:
      axes.append(axis)
  rows = PartitionSpec(tuple(axes))
  # The library's kernels do not say over which axes their results vary, which check_vma would ask of them.
  mapped = jax.shard_map(
    run, in_specs=(rows,) * len(operands), out_specs=rows, axis_names=set(automatic), check_vma=False
  )
  return mapped(*operands)


def _dispatch(function: str, options: _Options, operands: tuple[Array, ...], result: Any) -> Any:
  """Runs a function of the backend; None is resolved when the program is lowered, by its platform."""

  def run(name: str, *arrays: Array) -> Any:
    reason = cudnn.supports(*arrays[:3]) if name == "cudnn" else ""
    if reason and options.backend is not None:
      raise ZedaError(f"attention: backend 'cudnn' does not take these operands ({reason}); leave backend=None.")
    return getattr(BACKENDS[ELSEWHERE if reason else name], function)(*arrays, scale=options.scale)

  name = options.backend
  return by_backend(
    *operands,
    name=name,
    platforms=None if name is None else BACKENDS[name].platforms,
    of=lambda backend: functools.partial(run, backend),
    defaults=DEFAULTS,
    elsewhere=ELSEWHERE,
    result=result,
    what="attention",
    anywhere=f"{PLAIN}, {ELSEWHERE}",
  )


def _shape(x: Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _forward(options: _Options, operands: tuple[Array, ...]) -> tuple[Array, Array]:
  query, _, value, *_ = operands
  batch, length, heads, _ = query.shape
  out = jax.ShapeDtypeStruct((batch, length, heads, value.shape[-1]), value.dtype)
  lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
  return _dispatch("forward", options, operands, (out, lse))


@functools.partial(jax.jit, static_argnums=0)  # one trace per shape, also where the caller is not compiled
def _flash(options: _Options, *operands: Array) -> Float[Array, "B T N V"]:
  return _differentiable(options, vary_alike(*operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(options: _Options, operands: tuple[Array, ...]) -> Float[Array, "B T N V"]:
  return _forward(options, operands)[0]


def _keep(options: _Options, operands: tuple[Array, ...]) -> tuple[Array, Any]:
  out, lse = (checkpoint_name(x, SAVED) for x in _forward(options, operands))
  return out, (operands, out, lse)


def _gradients(options: _Options, residuals: Any, grad: Array) -> tuple[tuple[Array | None, ...]]:
  (query, key, value, *segment_ids), out, lse = residuals
  arrays = vary_alike(query, key, value, out, lse, grad.astype(out.dtype), *segment_ids)
  found = _dispatch("backward", options, arrays, tuple(map(_shape, (query, key, value))))
  return ((*found, *[None] * len(segment_ids)),)


_differentiable.defvjp(_keep, _gradients)
