"""Many groups of few rows: one batched product of their first rows, and a loop over what is left."""

import jax.numpy as jnp
import numpy as np
import pytest

from zeda_jax.ops.grouped_matmul import grouped_matmul, grouped_swiglu

GROUPS, ROWS = 40, 150


def sizes_of(kind: str) -> np.ndarray:
  rng = np.random.default_rng(0)
  probabilities = np.full(GROUPS, 1 / GROUPS) if kind != "skewed" else 0.5 ** (1 + np.arange(GROUPS))
  total = {"all": ROWS, "half": ROWS // 2, "few": 20, "none": 0, "skewed": ROWS}[kind]
  return rng.multinomial(total, probabilities / probabilities.sum()).astype(np.int32)


@pytest.mark.parametrize("kind", ["all", "half", "few", "none", "skewed"])
@pytest.mark.parametrize("function", [grouped_matmul, grouped_swiglu])
def test_equals_the_reference_however_many_rows_there_are(function, kind):
  rng = np.random.default_rng(1)
  sizes = jnp.asarray(sizes_of(kind))
  lhs = jnp.asarray(rng.normal(size=(ROWS, 8)), jnp.float32).at[int(sizes.sum()) :].set(jnp.nan)
  rhs = jnp.asarray(rng.normal(size=(GROUPS, 8, 12)), jnp.float32)
  found = function(lhs, rhs, sizes, backend="tiled")
  expected = function(jnp.nan_to_num(lhs), rhs, sizes, backend="reference")
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
  assert (np.asarray(found)[int(sizes.sum()) :] == 0).all()
