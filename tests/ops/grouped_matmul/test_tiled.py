"""The work list of the tiled backend: one entry per tile that holds a live row, and nothing else runs."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zeda_jax.ops.grouped_matmul import tiled


def plain_tiles(sizes, tile):
  """(group, first row, end row) of every tile."""
  found, start = [], 0
  for group, size in enumerate(sizes):
    end = start + size
    found += [(group, first, min(first + tile, end)) for first in range(start, end, tile)]
    start = end
  return found


tiles = jax.jit(tiled._tiles, static_argnums=(1, 2))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(cuts=st.lists(st.integers(0, 100), min_size=5, max_size=5), tile=st.sampled_from([1, 8, 100]))
def test_the_work_list_covers_every_live_row_once(cuts, tile):
  sizes = np.diff([0, *sorted(cuts)])
  count, *columns = tiles(jnp.asarray(sizes), 100, tile)
  expected = plain_tiles(sizes, tile)
  assert int(count) == len(expected) <= columns[0].shape[0]
  rows = list(zip(*(np.asarray(column)[: len(expected)].tolist() for column in columns), strict=True))
  assert rows == expected


@pytest.mark.parametrize("live", [0, 128, 512, 1024])
def test_work_is_proportional_to_the_live_rows(live):
  sizes = jnp.full(4, live // 4)
  count, *_ = tiles(sizes, 1024, 32)
  assert int(count) == live // 32


def trip_counts(jaxpr) -> list[str]:
  """Names of the loop primitives of a program, nested ones included."""
  found = []
  for equation in jaxpr.eqns:
    found += [equation.primitive.name] * (equation.primitive.name in ("while", "scan"))
    for sub in jax.core.jaxprs_in_params(equation.params):
      found += trip_counts(sub)
  return found


def test_the_products_run_in_loops_of_dynamic_length():
  def loss(lhs, rhs, sizes):
    return tiled.grouped_matmul(lhs, rhs, sizes).sum()

  shapes = jnp.zeros((300, 5)), jnp.zeros((4, 5, 7)), jnp.zeros(4, jnp.int32)
  jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(*shapes)
  dots = [line for line in str(jaxpr).splitlines() if "dot_general" in line]
  assert len(dots) == 3
  assert trip_counts(jaxpr.jaxpr).count("while") == 3
