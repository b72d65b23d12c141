"""The loops of the tiled backend run once per tile that holds a live row, and nothing else runs."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.grouped_matmul.contract import Contract
from zeda_jax.ops.grouped_matmul import grouped_matmul, grouped_swiglu, tiled


class TestTiled(Contract):
  backend = "tiled"


@jax.jit
def visits(group_sizes):
  """(times each of 100 rows was visited as live, rows computed, groups visited), by tiles of 32 and 8 rows."""

  def group(group, start, end, carry):
    def tile(rows, mine, carry):
      times, computed = carry
      live = jnp.ones(rows.shape[0], jnp.int32) if mine is None else mine[:, 0].astype(jnp.int32)
      return times.at[rows].add(live), computed + rows.shape[0]

    times, computed, groups = carry
    times, computed = tiled._over_tiles((32, 8), 100, start, end, tile, (times, computed))
    return times, computed, groups + 1

  return tiled._over_groups(group_sizes, group, (jnp.zeros(100, jnp.int32), 0, 0))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(cuts=st.lists(st.integers(0, 100), min_size=5, max_size=5))
def test_every_live_row_is_computed_once_and_little_else(cuts):
  sizes = np.diff([0, *sorted(cuts)])
  times, computed, groups = visits(jnp.asarray(sizes))
  np.testing.assert_array_equal(times, np.arange(100) < sizes.sum())
  assert int(groups) == np.count_nonzero(sizes)
  assert int(computed) == sum(-(-size // 8) * 8 for size in sizes)


@pytest.mark.parametrize("live", [0, 24, 48, 96])
def test_work_is_proportional_to_the_live_rows(live):
  assert int(visits(jnp.full(3, live // 3))[1]) == live


def test_tiles_larger_than_the_array_shrink_to_it():
  seen = []
  tiled._over_tiles((128, 16), 5, jnp.int32(0), jnp.int32(5), lambda rows, mine, c: seen.append(rows.shape) or c, 0)
  assert seen and set(seen) == {(5,)}


def test_the_products_run_in_loops_of_dynamic_length():
  def loss(lhs, rhs, sizes):
    return grouped_matmul(lhs, rhs, sizes, backend="tiled").sum()

  shapes = jnp.zeros((300, 5)), jnp.zeros((4, 5, 7)), jnp.zeros(4, jnp.int32)
  text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).as_text()
  # One product per tile size, in the gradient of each side, all inside loops.
  sizes = len(tiled.PRODUCT_TILES["small"]) + len(tiled.WEIGHT_PRODUCT_TILES)
  assert text.count("stablehlo.dot_general") == sizes
  assert "stablehlo.while" in text


@pytest.mark.parametrize("function", [grouped_matmul, grouped_swiglu])
def test_no_loop_copies_what_it_fills(function):
  """A copy of the result in every group would be most of the time of a layer of 128 experts."""

  def loss(lhs, rhs, sizes):
    return function(lhs, rhs, sizes, backend="tiled").sum()

  shapes = jnp.zeros((1536, 8)), jnp.zeros((32, 8, 48)), jnp.zeros(32, jnp.int32)
  for run in (loss, jax.grad(loss, argnums=(0, 1))):
    program = jax.jit(run).lower(*shapes).compile().as_text()
    assert " while(" in program
    copied = {match[1] for match in re.finditer(r"f32\[([\d,]+)\]\S* copy\(", program)}
    assert not copied & {"1536,48", "1536,24", "1536,8", "32,8,48"}
