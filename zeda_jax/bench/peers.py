"""Other people's grouped matmuls, to compare with: (lhs [M, K], rhs [G, K, N], group_sizes [G]) -> [M, N].

Their rows past sum(group_sizes) are undefined or cost something; only live rows are compared.
"""

import importlib.util
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from zeda_jax.errors import ZedaError


def lax_ragged_dot(
  lhs: Float[Array, "M K"], rhs: Float[Array, "G K N"], group_sizes: Int[Array, " G"]
) -> Float[Array, "M N"]:
  return jax.lax.ragged_dot(lhs, rhs, group_sizes)


def megablox(
  lhs: Float[Array, "M K"], rhs: Float[Array, "G K N"], group_sizes: Int[Array, " G"]
) -> Float[Array, "M N"]:
  from jax.experimental.pallas.ops.tpu.megablox import gmm

  # Its row tiles must divide M; the rest is the tiling that TPU users of it start from.
  rows = next((size for size in (512, 256, 128) if lhs.shape[0] % size == 0), None)
  if rows is None:
    raise ZedaError(f"megablox needs a multiple of 128 rows, there are {lhs.shape[0]}")
  tiling = (rows, min(1024, rhs.shape[1]), min(768, rhs.shape[2]))
  return gmm(lhs, rhs, group_sizes, lhs.dtype, tiling)


def tokamax(lhs: Float[Array, "M K"], rhs: Float[Array, "G K N"], group_sizes: Int[Array, " G"]) -> Float[Array, "M N"]:
  import tokamax as library

  return library.ragged_dot(lhs, rhs, group_sizes)


PEERS: dict[str, Callable[[Array, Array, Array], Array]] = {
  "jax.lax.ragged_dot": lax_ragged_dot,
  "megablox": megablox,
  "tokamax": tokamax,
}


def missing(name: str, platform: str) -> str:
  """Why a peer cannot be measured here; "" if it can."""
  if name == "megablox" and platform != "tpu":
    return "runs on tpu only"
  if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
    return "is not installed"
  return ""
