"""What every backend must do, against one independent oracle: numpy, float64, one group after another.

`Contract` is the shared test base: each backend's test file has one subclass of it that names the backend.
"""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zeda_jax.ops.grouped_matmul import grouped_matmul, grouped_swiglu

# (rows, inner, columns, groups): several tiles of rows; odd and smaller than a tile; a single number.
SHAPES = [(300, 5, 7, 4), (17, 3, 2, 3), (1, 1, 1, 1)]
EXACT = {"rtol": 1e-5, "atol": 1e-5}
ROUNDED = {"rtol": 2**-8, "atol": 2**-8}  # bfloat16 results that were rounded once, to 8 bits


def oracle(lhs, rhs, sizes, grad):
  """(out, gradient of lhs, gradient of rhs) for the cotangent `grad`; rows past the sum are not looked at."""
  lhs, rhs, grad = (np.asarray(a, np.float64) for a in (lhs, rhs, grad))
  out, d_lhs, d_rhs = np.zeros((len(lhs), rhs.shape[2])), np.zeros(lhs.shape), np.zeros(rhs.shape)
  start = 0
  for group, size in enumerate(sizes):
    rows = slice(start, start + size)
    out[rows] = lhs[rows] @ rhs[group]
    d_lhs[rows] = grad[rows] @ rhs[group].T
    d_rhs[group] = lhs[rows].T @ grad[rows]
    start += size
  return out, d_lhs, d_rhs


def swiglu_oracle(lhs, rhs, sizes, grad):
  """The same three for silu(gate) * up of the two halves of the product."""
  both = oracle(lhs, rhs, sizes, np.zeros((len(lhs), rhs.shape[2])))[0]
  gate, up = np.split(both, 2, axis=1)
  sigmoid = 1 / (1 + np.exp(-gate))
  grad = np.asarray(grad, np.float64)
  d_gate = grad * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
  d_both = np.concatenate([d_gate, grad * gate * sigmoid], axis=1)
  return gate * sigmoid * up, *oracle(lhs, rhs, sizes, d_both)[1:]


@functools.cache
def compiled(backend, function=grouped_matmul, **options):
  """Result and gradients."""

  @jax.jit
  def run(lhs, rhs, sizes, grad):
    out, pullback = jax.vjp(lambda a, b: function(a, b, sizes, backend=backend, **options), lhs, rhs)
    return out, *pullback(grad)

  return run


@functools.cache
def compiled_forward(backend, function=grouped_swiglu):
  """The result alone: where nothing is differentiated, a backend may fuse."""
  return jax.jit(functools.partial(function, backend=backend))


def inputs(shape, dtype=np.float32, seed=0):
  rows, inner, columns, groups = shape
  rng = np.random.default_rng(seed)
  draw = lambda *size: jnp.asarray(rng.standard_normal(size, np.float32), dtype)
  return draw(rows, inner), draw(groups, inner, columns), draw(rows, columns)


def poisoned(x, live: int):
  """x with NaN in the rows from `live` on."""
  return jnp.where(jnp.arange(x.shape[0])[:, None] < live, x, jnp.nan)


def check(backend, shape, sizes, dtype=np.float32, seed=0, **tolerance):
  """grouped_matmul and its gradients, dead rows poisoned, against the oracle."""
  lhs, rhs, grad = inputs(shape, dtype, seed)
  live = int(np.sum(sizes))
  assert live <= shape[0]
  found = compiled(backend)(poisoned(lhs, live), rhs, jnp.asarray(sizes, jnp.int32), poisoned(grad, live))
  for got, expected, like in zip(found, oracle(lhs, rhs, sizes, grad), (grad, lhs, rhs), strict=True):
    assert got.dtype == like.dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, **(tolerance or EXACT))
  for got in found[:2]:
    np.testing.assert_array_equal(got[live:], 0)
  for group in np.flatnonzero(np.asarray(sizes) == 0):
    np.testing.assert_array_equal(found[2][group], 0)


def check_swiglu(backend, shape, sizes, dtype=np.float32, seed=0, **tolerance):
  """grouped_swiglu, fused and differentiated, dead rows poisoned, against the oracle."""
  lhs, rhs, grad = inputs(shape, dtype, seed)
  live, grad = int(np.sum(sizes)), grad[:, : shape[2] // 2]
  lhs, sizes_array = poisoned(lhs, live), jnp.asarray(sizes, jnp.int32)
  expected = swiglu_oracle(lhs, rhs, sizes, grad)
  found = compiled(backend, grouped_swiglu)(lhs, rhs, sizes_array, poisoned(grad, live))
  fused = compiled_forward(backend)(lhs, rhs, sizes_array)
  for got, want in zip((fused, *found), (expected[0], *expected), strict=True):
    assert got.dtype == lhs.dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, **(tolerance or {"rtol": 1e-4, "atol": 1e-4}))
  for got in (fused, *found[:2]):
    np.testing.assert_array_equal(got[live:], 0)


def partitions(shape):
  """For every pattern of empty groups: all rows used, some used, few used."""
  rows, *_, groups = shape
  rng = np.random.default_rng(1)
  for pattern in itertools.product([0, 1], repeat=groups):
    filled = np.flatnonzero(pattern)
    if filled.size == 0:
      yield np.zeros(groups, int)
      continue
    for total in {rows, (2 * rows) // 3, filled.size}:
      if filled.size <= total <= rows:
        cuts = np.sort(rng.choice(np.arange(1, total), filled.size - 1, replace=False))
        sizes = np.zeros(groups, int)
        sizes[filled] = np.diff([0, *cuts, total])
        yield sizes


class Contract:
  """The tests of one backend."""

  backend: str | None

  @pytest.mark.parametrize("shape_index", range(len(SHAPES)))
  def test_every_pattern_of_empty_groups(self, shape_index):
    for sizes in partitions(SHAPES[shape_index]):
      check(self.backend, SHAPES[shape_index], sizes)

  @pytest.mark.parametrize("groups", [1, 2, 3, 4])
  def test_one_giant_group(self, groups):
    rows = SHAPES[0][0]
    for rest in (0, 1, groups - 1):
      check(self.backend, SHAPES[0], [rest if g != groups - 1 else rows - 3 * rest for g in range(4)])

  def test_every_sum_from_nothing_to_all(self):
    for live in range(18):
      check(self.backend, (17, 3, 2, 3), [live // 2, 0, live - live // 2])

  @pytest.mark.parametrize("edge", [127, 128, 129])
  def test_groups_that_end_at_the_edges_of_tiles(self, edge):
    for sizes in ([edge, 0, 0, 300 - edge], [1, edge, 1, edge], [0, edge, edge, 0], [edge, 1, 0, 0]):
      check(self.backend, (300, 5, 7, 4), sizes)

  def test_bfloat16_accumulates_in_float32(self):
    # Sums of 300 rows accumulated in bfloat16 would be far off.
    for sizes in ([300, 0, 0, 0], [0, 40, 0, 222], [1, 2, 3, 4]):
      check(self.backend, (300, 64, 7, 4), sizes, jnp.bfloat16, **ROUNDED)

  def test_swiglu_fused_and_differentiated(self):
    for sizes in ([300, 0, 0, 0], [0, 40, 0, 222], [1, 2, 3, 4], [0, 0, 0, 0]):
      check_swiglu(self.backend, (300, 5, 8, 4), sizes)
    lhs, rhs, _ = inputs((300, 64, 8, 4), jnp.bfloat16)
    sizes = jnp.array([100, 0, 7, 90])
    two_steps = compiled(self.backend, grouped_swiglu)(lhs, rhs, sizes, jnp.zeros((300, 4), jnp.bfloat16))[0]
    fused = compiled_forward(self.backend)(lhs, rhs, sizes)
    np.testing.assert_allclose(fused.astype(float), two_steps.astype(float), rtol=2**-7, atol=2**-8)

  def test_preferred_element_type(self):
    lhs, rhs, grad = inputs((17, 64, 2, 3), jnp.bfloat16)
    sizes = jnp.array([3, 0, 9])
    wide = grad.astype(jnp.float32)
    out, d_lhs, d_rhs = compiled(self.backend, preferred_element_type=jnp.float32)(lhs, rhs, sizes, wide)
    expected, expected_lhs, expected_rhs = oracle(lhs, rhs, [3, 0, 9], grad)
    assert (out.dtype, d_lhs.dtype, d_rhs.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(d_lhs, float), expected_lhs, **ROUNDED)
    np.testing.assert_allclose(np.asarray(d_rhs, float), expected_rhs, **ROUNDED)

  def test_vmap_of_everything_and_of_the_groups_alone(self):
    many = [inputs((17, 3, 2, 3), seed=seed) for seed in range(3)]
    lhs, rhs, grad = (jnp.stack(parts) for parts in zip(*many, strict=True))
    sizes = np.array([[17, 0, 0], [0, 0, 0], [2, 5, 4]])
    run = jax.jit(jax.vmap(compiled(self.backend)))
    for i, found in enumerate(zip(*run(lhs, rhs, sizes, grad), strict=True)):
      for got, want in zip(found, oracle(*many[i][:2], sizes[i], many[i][2]), strict=True):
        np.testing.assert_allclose(got, want, **EXACT)
    only_sizes = jax.jit(jax.vmap(compiled(self.backend), in_axes=(None, None, 0, None)))
    for i, found in enumerate(zip(*only_sizes(lhs[0], rhs[0], sizes, grad[0]), strict=True)):
      for got, want in zip(found, oracle(lhs[0], rhs[0], sizes[i], grad[0]), strict=True):
        np.testing.assert_allclose(got, want, **EXACT)

  def test_without_jit_and_inside_scan(self):
    lhs, rhs, grad = inputs((17, 3, 2, 3))
    sizes = np.array([[4, 0, 9], [0, 17, 0]])
    run = functools.partial(grouped_matmul, backend=self.backend)
    _, scanned = jax.lax.scan(lambda carry, s: (carry, run(lhs, rhs, s)), None, jnp.asarray(sizes))
    for s, out in zip(sizes, scanned, strict=True):
      np.testing.assert_allclose(out, oracle(lhs, rhs, s, grad)[0], **EXACT)
      np.testing.assert_allclose(run(lhs, rhs, jnp.asarray(s)), out, **EXACT)

  def test_no_rows(self):
    out = grouped_matmul(jnp.zeros((0, 3)), jnp.ones((2, 3, 4)), jnp.zeros(2, jnp.int32), backend=self.backend)
    assert out.shape == (0, 4)

  def test_groups_that_reach_past_the_rows_are_cut(self):
    lhs, rhs, grad = inputs((17, 3, 2, 3))
    for sizes, cut in (([9, 20, 4], [9, 8, 0]), ([18, 1, 1], [17, 0, 0]), ([2, -5, 3], [2, 0, 3])):
      found = compiled(self.backend)(lhs, rhs, jnp.array(sizes), grad)
      for got, want in zip(found, oracle(lhs, rhs, cut, grad), strict=True):
        np.testing.assert_allclose(got, want, **EXACT)

  @pytest.mark.parametrize("check_vma", [False, True])
  def test_inside_shard_map(self, check_vma):
    lhs, rhs, grad = inputs((17, 3, 2, 3))
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    run = jax.jit(
      jax.shard_map(
        compiled(self.backend), mesh=mesh, in_specs=(rows, whole, whole, rows), out_specs=(rows, rows, whole),
        check_vma=check_vma,
      )
    )  # fmt: skip
    for got, want in zip(run(lhs, rhs, jnp.array([4, 0, 9]), grad), oracle(lhs, rhs, [4, 0, 9], grad), strict=True):
      np.testing.assert_allclose(got, want, **EXACT)

  def test_any_sizes(self):
    @hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
    @hypothesis.given(cuts=st.lists(st.integers(0, 300), min_size=4, max_size=4), seed=st.integers(0, 2**32 - 1))
    def any_sizes(cuts, seed):
      check(self.backend, (300, 5, 7, 4), np.diff([0, *sorted(cuts)]), seed=seed)

    any_sizes()
