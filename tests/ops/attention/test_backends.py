"""Every backend that runs here, forward and backward, against float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention import oracle
from zeda_jax.errors import ZedaError
from zeda_jax.ops.attention import BACKENDS, api, attention, chunked, splash
from zeda_jax.ops.attention.plain import masked_attention, packed_mask

# heads, key/value heads, width of queries and keys, width of values
HEADS = {"grouped": (4, 2, 16, 16), "one": (3, 1, 8, 8), "latent": (2, 2, 24, 16), "wide values": (2, 1, 8, 20)}


@pytest.fixture(autouse=True)
def interpreted_splash(monkeypatch):
  run = lambda f: functools.partial(f, interpret=True)
  monkeypatch.setitem(BACKENDS, "interpreted", api.Backend(run(splash.forward), run(splash.backward)))
  monkeypatch.setattr(splash, "BLOCK", 128)
  monkeypatch.setattr(chunked, "BLOCK", 128)


def inputs(length, heads="grouped", batch=2, seed=0):
  n, m, d, v = HEADS[heads]
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal((batch, length, *shape), np.float32)
  return draw(n, d), draw(m, d), draw(m, v), draw(n, v)


def packed(length, *rows):
  """Rows of segment lengths as segment ids, padding at the end; a negative length is padding, too."""
  out = np.zeros((len(rows), length), np.int32)
  for row, lengths in zip(out, rows, strict=True):
    start = 0
    for i, size in enumerate(lengths):
      row[start : start + abs(size)] = (i + 1) * (size > 0)
      start += abs(size)
  return out


def found(backend, query, key, value, segments, grad, scale=None):
  @jax.jit
  def run(query, key, value, grad):
    out, pullback = jax.vjp(lambda *qkv: attention(*qkv, segments, scale=scale, backend=backend), query, key, value)
    return out, *pullback(grad)

  return run(query, key, value, grad)


def check(backend, length, segments, heads="grouped", scale=None):
  *qkv, grad = inputs(length, heads)
  ids = np.ones((2, length), np.int32) if segments is None else segments
  expected = oracle.attention(*qkv, ids, grad, HEADS[heads][2] ** -0.5 if scale is None else scale)
  for got, want in zip(found(backend, *qkv, segments, grad, scale), expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5)


RUNS_HERE = ["plain", "chunked", "interpreted"]


@pytest.mark.parametrize("backend", RUNS_HERE)
@pytest.mark.parametrize("heads", HEADS)
def test_one_sequence_a_row(backend, heads):
  check(backend, 301, None, heads)


@pytest.mark.parametrize("backend", RUNS_HERE)
@pytest.mark.parametrize("heads", ["grouped", "latent"])
def test_packed_rows(backend, heads):
  check(backend, 301, packed(301, (1, 70, 30, 150, 50), (301,)), heads)


@pytest.mark.parametrize("backend", RUNS_HERE)
@pytest.mark.parametrize(
  "rows",
  {
    "padding inside, at the start and at the end": ((-20, 90, -130, 40), (257, -3)),
    "one token each": ((1,) * 260, (1,) * 129),
    "a row of padding": ((), (260,)),
    "padding alone": ((), ()),
  }.items(),
  ids=lambda item: item[0],
)
def test_segments_and_padding(backend, rows):
  check(backend, 260, packed(260, *rows[1]))


@pytest.mark.parametrize("backend", ["chunked", "interpreted"])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 256])
def test_lengths_around_a_block(backend, length):
  check(backend, length, packed(length, (length,), (length // 2, length // 3)))


@pytest.mark.parametrize("backend", ["chunked", "interpreted"])
def test_a_scale_of_its_own_and_large_logits(backend):
  check(backend, 200, None, scale=0.7)
  *qkv, grad = inputs(200)
  qkv[0] *= 1e3
  out, *gradients = found(backend, *qkv, None, grad)
  np.testing.assert_allclose(out, oracle.attention(*qkv, np.ones((2, 200), int), grad, 0.25)[0], rtol=0, atol=1e-3)
  assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("backend", RUNS_HERE)
def test_nothing_passes_from_or_to_padding(backend):
  """Huge padding changes no bit of the rest, comes out as 0, gets no gradient, and its gradient goes nowhere."""
  segments = packed(260, (100, -60, 40), (30, 1))
  *qkv, grad = inputs(260)
  padding = (segments == 0)[:, :, None, None]
  clean = found(backend, *(np.where(padding, 0, x) for x in qkv), segments, np.where(padding, 0, grad))
  dirty = found(backend, *(np.where(padding, 1e18, x) for x in qkv), segments, np.where(padding, np.inf, grad))
  for a, b in zip(clean, dirty, strict=True):
    np.testing.assert_array_equal(a, b)
    assert np.isfinite(b).all() and not np.where(padding, b, 0).any()


@pytest.mark.parametrize("backend", RUNS_HERE)
def test_bfloat16(backend):
  *qkv, grad = (jnp.asarray(x, jnp.bfloat16) for x in inputs(260))
  segments = packed(260, (200, 60), (30, 100))
  results = found(backend, *qkv, segments, grad)
  expected = oracle.attention(*qkv, segments, grad, 0.25)
  for got, want in zip(results, expected, strict=True):
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got, float) - want).max() / np.abs(want).max()
    assert error < 0.015, error


def test_chunks_are_the_default_of_long_rows_and_inside_vmap_and_remat(monkeypatch):
  monkeypatch.setattr(api, "LONG", 200)
  *qkv, grad = inputs(260)
  segments = packed(260, (200, 60), (30, 100))
  default, chunks = found(None, *qkv, segments, grad), found("chunked", *qkv, segments, grad)
  jax.tree.map(np.testing.assert_array_equal, default, chunks)
  attend = lambda *row: attention(*(x[None] for x in row))[0]
  loss = lambda *rows: (jax.checkpoint(jax.vmap(attend))(*rows, segments) * grad).sum()
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
    jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv),
    chunks[1:],
  )


@pytest.mark.parametrize("check_vma", [False, True])
def test_chunks_inside_shard_map(check_vma):
  *qkv, grad = inputs(260)
  segments = packed(260, (200, 60), (30, 100))
  rows = jax.sharding.PartitionSpec("rows")
  mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

  def run(query, key, value, segments, grad):
    out, pullback = jax.vjp(lambda *qkv: attention(*qkv, segments, backend="chunked"), query, key, value)
    return out, *pullback(grad)

  mapped = jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 5, out_specs=rows, check_vma=check_vma)
  jax.tree.map(
    np.testing.assert_array_equal, jax.jit(mapped)(*qkv, segments, grad), found("chunked", *qkv, segments, grad)
  )


def test_short_rows_are_the_plain_backend_bit_for_bit():
  query, key, value, _ = inputs(60)
  segments = packed(60, (20, 30), (60,))
  plain = jax.jit(masked_attention)(query, key, value, packed_mask(segments, 60), 0.25)
  live = segments > 0
  np.testing.assert_array_equal(np.asarray(jax.jit(attention)(query, key, value, segments))[live], plain[live])


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"key": (2, 9, 2, 8)}, "do not fit"),
    ({"key": (2, 8, 2, 16)}, "the same batch and length"),
    ({"key": (2, 9, 3, 16), "value": (2, 9, 3, 16)}, "do not fit: .* a multiple of the key's heads"),
    ({"query": (9, 4, 16)}, r"expected query \[B, T, N, D\]"),
    ({"segment_ids": (2, 8)}, "segment_ids is"),
    ({"backend": "flash"}, "backend is 'flash'; expected None or one of plain, splash, cudnn, chunked"),
  ],
)
def test_errors(change, words):
  shapes = {"query": (2, 9, 4, 16), "key": (2, 9, 2, 16), "value": (2, 9, 2, 16), **change}
  given = {name: jnp.zeros(shape) if isinstance(shape, tuple) else shape for name, shape in shapes.items()}
  with pytest.raises(ZedaError, match=words):
    attention(**given)


def test_mixed_types_are_an_error():
  query, key, value, _ = inputs(9)
  with pytest.raises(ZedaError, match="expected one type"):
    attention(query, key, value.astype(jnp.bfloat16))
