"""What shard_map's check_vma asks of a function that makes arrays of its own: to say over which mesh axes they vary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
  """The arrays, all varying over every mesh axis that any of them varies over. Outside shard_map: unchanged."""
  axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))

  def widened(x: Array) -> Array:
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return tuple(widened(x) for x in arrays)


def zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *, like: Array) -> Array:
  """jnp.zeros that vary over the mesh axes that `like` varies over."""
  axes = tuple(sorted(jax.typeof(like).manual_axis_type.varying))
  out = jnp.zeros(shape, dtype)
  return jax.lax.pcast(out, axes, to="varying") if axes else out


def out_struct(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *, like: Array) -> jax.ShapeDtypeStruct:
  """The shape of a kernel's result that varies over the mesh axes that `like` varies over."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
