"""SwiGLU as every backend computes it, so that fused and unfused forms round alike."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def swiglu(
  gate: Float[Array, "*shape"], up: Float[Array, "*shape"], dtype: jax.typing.DTypeLike
) -> Float[Array, "*shape"]:
  """silu(gate) * up in fp32, of gate and up rounded to `dtype`, which the unfused form stores them in."""
  gate, up = (x.astype(dtype).astype(jnp.float32) for x in (gate, up))
  return (gate * jax.nn.sigmoid(gate) * up).astype(dtype)


def swiglu_halves(gate_up: Float[Array, "M 2F"]) -> Float[Array, "M F"]:
  """SwiGLU of the two halves of the last axis, gate first, in their own type."""
  gate, up = jnp.split(gate_up, 2, axis=-1)
  return swiglu(gate, up, gate_up.dtype)
