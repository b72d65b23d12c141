"""Every backend against one independent oracle: numpy, float64, one group after another."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zeda_jax.errors import ZedaError
from zeda_jax.ops.grouped_matmul import BACKENDS, grouped_matmul

# (rows, inner, columns, groups): several tiles of rows; odd and smaller than a tile; a single number.
SHAPES = [(300, 5, 7, 4), (17, 3, 2, 3), (1, 1, 1, 1)]
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=sorted(BACKENDS))
def backend(request) -> str:
  return request.param


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


@functools.cache
def compiled(backend, **options):
  @jax.jit
  def run(lhs, rhs, sizes, grad):
    out, pullback = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes, backend=backend, **options), lhs, rhs)
    return out, *pullback(grad)

  return run


def inputs(shape, dtype=np.float32, seed=0):
  rows, inner, columns, groups = shape
  rng = np.random.default_rng(seed)
  draw = lambda *size: jnp.asarray(rng.standard_normal(size, np.float32), dtype)
  return draw(rows, inner), draw(groups, inner, columns), draw(rows, columns)


def poisoned(x, live: int):
  """x with NaN in the rows from `live` on."""
  return jnp.where(jnp.arange(x.shape[0])[:, None] < live, x, jnp.nan)


def check(backend, shape, sizes, dtype=np.float32, seed=0, **tolerance):
  lhs, rhs, grad = inputs(shape, dtype, seed)
  live = int(np.sum(sizes))
  assert live <= shape[0]
  arguments = poisoned(lhs, live), rhs, jnp.asarray(sizes, jnp.int32), poisoned(grad, live)
  found = compiled(backend)(*arguments)
  for got, expected, like in zip(found, oracle(lhs, rhs, sizes, grad), (lhs, lhs, rhs), strict=True):
    assert got.dtype == like.dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, **(tolerance or EXACT))
  for got in found[:2]:
    np.testing.assert_array_equal(got[live:], 0)
  for group in np.flatnonzero(np.asarray(sizes) == 0):
    np.testing.assert_array_equal(found[2][group], 0)


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pattern_of_empty_groups(backend, shape):
  for sizes in partitions(shape):
    check(backend, shape, sizes)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_one_giant_group(backend, groups):
  shape = (300, 5, 7, 4)
  sizes = np.zeros(4, int)
  for rest in (0, 1, groups - 1):
    sizes[:] = [rest if g != groups - 1 else 300 - 3 * rest for g in range(4)]
    check(backend, shape, sizes)


def test_every_sum_from_nothing_to_all(backend):
  for live in range(18):
    check(backend, (17, 3, 2, 3), [live // 2, 0, live - live // 2])


@pytest.mark.parametrize("edge", [127, 128, 129])
def test_groups_that_end_at_the_edges_of_tiles(backend, edge):
  for sizes in ([edge, 0, 0, 300 - edge], [1, edge, 1, edge], [0, edge, edge, 0], [edge, 1, 0, 0]):
    check(backend, (300, 5, 7, 4), sizes)


def test_bfloat16_accumulates_in_float32(backend):
  # Results are rounded once, to 8 bits; sums of 300 rows accumulated in bfloat16 would be far off.
  for sizes in ([300, 0, 0, 0], [0, 40, 0, 222], [1, 2, 3, 4]):
    check(backend, (300, 64, 7, 4), sizes, jnp.bfloat16, rtol=2**-8, atol=2**-8)


def test_preferred_element_type(backend):
  lhs, rhs, grad = inputs((17, 64, 2, 3), jnp.bfloat16)
  sizes = jnp.array([3, 0, 9])
  wide = grad.astype(jnp.float32)
  out, d_lhs, d_rhs = compiled(backend, preferred_element_type=jnp.float32)(lhs, rhs, sizes, wide)
  expected, expected_lhs, expected_rhs = oracle(lhs, rhs, [3, 0, 9], grad)
  assert (out.dtype, d_lhs.dtype, d_rhs.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(np.asarray(d_lhs, float), expected_lhs, rtol=2**-8, atol=2**-8)
  np.testing.assert_allclose(np.asarray(d_rhs, float), expected_rhs, rtol=2**-8, atol=2**-8)


def test_vmap_of_everything_and_of_the_groups_alone(backend):
  shape = (17, 3, 2, 3)
  many = [inputs(shape, seed=seed) for seed in range(3)]
  lhs, rhs, grad = (jnp.stack(parts) for parts in zip(*many, strict=True))
  sizes = np.array([[17, 0, 0], [0, 0, 0], [2, 5, 4]])
  run = jax.jit(jax.vmap(compiled(backend)))
  for i, expected in enumerate(zip(*run(lhs, rhs, sizes, grad), strict=True)):
    for got, want in zip(expected, oracle(*many[i][:2], sizes[i], many[i][2]), strict=True):
      np.testing.assert_allclose(got, want, **EXACT)
  if backend == "ragged_dot":
    return  # JAX has no batching rule for it with shared operands
  only_sizes = jax.jit(jax.vmap(compiled(backend), in_axes=(None, None, 0, None)))
  for i, out in enumerate(only_sizes(lhs[0], rhs[0], sizes, grad[0])[0]):
    np.testing.assert_allclose(out, oracle(lhs[0], rhs[0], sizes[i], grad[0])[0], **EXACT)


def test_without_jit_and_inside_scan(backend):
  lhs, rhs, grad = inputs((17, 3, 2, 3))
  sizes = np.array([[4, 0, 9], [0, 17, 0]])
  run = functools.partial(grouped_matmul, backend=backend)
  _, scanned = jax.lax.scan(lambda carry, s: (carry, run(lhs, rhs, s)), None, jnp.asarray(sizes))
  for s, out in zip(sizes, scanned, strict=True):
    np.testing.assert_allclose(out, oracle(lhs, rhs, s, grad)[0], **EXACT)
    np.testing.assert_allclose(run(lhs, rhs, jnp.asarray(s)), out, **EXACT)


def test_no_rows(backend):
  out = grouped_matmul(jnp.zeros((0, 3)), jnp.ones((2, 3, 4)), jnp.zeros(2, jnp.int32), backend=backend)
  assert out.shape == (0, 4)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
  cuts=st.lists(st.integers(0, 300), min_size=4, max_size=4),
  seed=st.integers(0, 2**32 - 1),
  name=st.sampled_from(sorted(BACKENDS)),
)
def test_any_sizes(cuts, seed, name):
  sizes = np.diff([0, *sorted(cuts)])
  check(name, (300, 5, 7, 4), sizes, seed=seed)


def test_the_default_backend_is_one_of_them():
  lhs, rhs, grad = inputs((17, 3, 2, 3))
  out = grouped_matmul(lhs, rhs, jnp.array([5, 5, 5]))
  np.testing.assert_allclose(out, oracle(lhs, rhs, [5, 5, 5], grad)[0], **EXACT)


@pytest.mark.parametrize(
  ("shapes", "words"),
  [
    (((2, 3, 4), (2, 3, 4), (2,)), r"expected lhs \[M, K\].*found \(2, 3, 4\)"),
    (((8, 3), (2, 4, 4), (2,)), "do not fit"),
    (((8, 3), (2, 3, 4), (3,)), "do not fit"),
  ],
)
def test_shapes_that_do_not_fit(shapes, words):
  lhs, rhs, sizes = (jnp.zeros(shape) for shape in shapes)
  with pytest.raises(ZedaError, match=words):
    grouped_matmul(lhs, rhs, sizes.astype(jnp.int32))


def test_an_unknown_backend():
  lhs, rhs, _ = inputs((17, 3, 2, 3))
  with pytest.raises(ZedaError, match=r"backend is .cuda.; expected one of .*tiled"):
    grouped_matmul(lhs, rhs, jnp.zeros(3, jnp.int32), backend="cuda")
