"""The router rows of new zero experts: plain numpy, so that a converter need not wait for JAX."""

import numpy as np
from jaxtyping import Float

from zeda_jax.errors import ZedaError


def new_router_rows(
  rows: Float[np.ndarray, "N *H"], num_zero_experts: int, seed: int, layer: int
) -> Float[np.ndarray, "Z *H"]:
  """Router rows of the zero experts of one layer: Normal(mean, std) of the layer's N old rows, per hidden dimension.

  A correction bias [N] is widened the same way, by the mean and deviation of its N numbers. The standard deviation has
  the N-1 denominator (paper section 3.1). Seeded by (seed, layer), so that one layer can be drawn without the others
  and a streaming converter gives the same rows as `inject`.

  Raises:
    ZedaError: num_zero_experts is not positive.
  """
  if num_zero_experts <= 0:
    raise ZedaError(f"num_zero_experts is {num_zero_experts}; expected a positive number (half the experts is usual).")
  old = np.asarray(rows, np.float32)
  stream = [seed, layer] if old.ndim > 1 else [seed, layer, 1]  # the bias does not repeat the rows' numbers
  noise = np.random.default_rng(stream).standard_normal((num_zero_experts, *old.shape[1:]), np.float32)
  return (old.mean(axis=0) + old.std(axis=0, ddof=1) * noise).astype(rows.dtype)
