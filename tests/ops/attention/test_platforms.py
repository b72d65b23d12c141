"""What is chosen on which platform, read from lowered programs; memory of long rows, read from compiled ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused  # what stands for a GPU in these tests

from zeda_jax.errors import ZedaError
from zeda_jax.ops.attention import attention, cudnn


def program(length, backend=None, segmented=True, dtype=jnp.bfloat16, heads=(4, 2, 64, 64), batch=1):
  """A jitted forward and backward pass and its argument shapes."""
  n, m, d, v = heads
  shape = lambda *tail, dtype=dtype: jax.ShapeDtypeStruct((batch, length, *tail), dtype)

  def run(query, key, value, segments, grad):
    ids = segments if segmented else None
    out, pullback = jax.vjp(lambda *qkv: attention(*qkv, ids, backend=backend), query, key, value)
    return out, *pullback(grad)

  return jax.jit(run), (shape(n, d), shape(m, d), shape(m, v), shape(dtype=jnp.int32), shape(n, v))


def lowered(platform, *arguments, **options):
  run, shapes = program(*arguments, **options)
  return run.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def test_temporaries_grow_with_the_length_not_with_its_square():
  def temporaries(length):
    run, shapes = program(length, dtype=jnp.float32)
    return run.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  small, middle, large = (temporaries(length) for length in (8192, 16384, 32768))
  assert large - middle < 2.1 * (middle - small)
  operands = 32768 * 64 * (4 + 2 + 2 + 4) * 4  # of query, key, value and the gradient
  assert large < 4 * operands


def test_a_row_of_32k_tokens_has_no_array_of_its_square():
  for platform in ("cpu", "tpu", "cuda"):
    assert "32768x32768" not in lowered(platform, 32768)


def test_splash_on_tpus():
  text = lowered("tpu", 2048)
  assert text.count("tpu_custom_call") == 3 and "splash_mha_fwd_segmented" in text
  assert "tpu_custom_call" not in lowered("tpu", 512)


@pytest.mark.parametrize("check_vma", [False, True])
def test_splash_inside_shard_map(check_vma):
  run, shapes = program(2048)
  mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.PartitionSpec("rows")
  run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 5, out_specs=rows, check_vma=check_vma))
  assert run.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3


def lowered_for_cuda(*arguments, **options):
  """In a shard_map: elsewhere, JAX wants to know the GPUs for which it partitions cuDNN's calls."""
  run, shapes = program(*arguments, **options)
  mesh, rows = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec()
  run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 5, out_specs=rows, check_vma=False))
  return run.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def hopper(monkeypatch):
  monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)
  monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
  monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)


def test_cudnn_on_gpus(hopper):
  text = lowered_for_cuda(2048, segmented=False)
  assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
  assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in lowered_for_cuda(2048)


def test_cudnn_takes_long_packed_rows_in_blocks_and_pads_what_it_needs(hopper):
  text = lowered_for_cuda(3 * cudnn.BLOCK - 1, heads=(2, 1, 60, 40))
  assert text.count("__cudnn$fmhaScaleBiasSoftmaxBackward(") == 3
  assert f"{cudnn.BLOCK}x{3 * cudnn.BLOCK}xbf16" in text  # the last mask


@pytest.mark.parametrize(
  ("options", "words"),
  [({"dtype": jnp.float32}, "not in float32"), ({"heads": (2, 2, 320, 320)}, "head dim must be <= 256")],
)
def test_what_cudnn_refuses_runs_in_chunks(hopper, options, words):
  assert "cudnn" not in lowered_for_cuda(2048, **options)
  with pytest.raises(ZedaError, match=f"does not take these operands .*{words}"):
    lowered_for_cuda(2048, backend="cudnn", **options)


def test_without_cudnn_it_runs_in_chunks():
  assert "cudnn" not in lowered_for_cuda(2048)


@pytest.mark.parametrize(("backend", "platform"), [("splash", "tpu"), ("cudnn", "cuda")])
def test_a_backend_of_another_platform_names_those_that_run_here(backend, platform):
  words = f"backend '{backend}' runs on {platform}, and this program is compiled for cpu; .* plain, chunked"
  with pytest.raises(ZedaError, match=words):
    lowered("cpu", 64, backend=backend)


def test_cudnn_s_blocks_are_the_whole(monkeypatch):
  """The blocks of queries and their masks, with JAX's own XLA attention in cuDNN's place."""
  monkeypatch.setattr(cudnn, "BLOCK", 32)
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal((2, 99, *shape)), jnp.float32)
  query, key, value = draw(4, 8), draw(2, 8), draw(2, 4)
  segments = jnp.asarray(np.sort(rng.integers(1, 6, (2, 99))).astype(np.int32))
  expected = attention(query, key, value, segments, backend="plain")
  real = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: real(*a, **k))
  run = functools.partial(cudnn.forward, scale=8**-0.5)
  np.testing.assert_allclose(run(query, key, value, segments)[0], expected, rtol=0, atol=1e-5)
  whole = attention(query, key, value, backend="plain")
  np.testing.assert_allclose(run(query, key, value)[0], whole, rtol=0, atol=1e-5)
  grad = jnp.ones_like(expected)
  found = cudnn.backward(query, key, value, None, None, grad, segments, scale=8**-0.5)
  wanted = jax.vjp(lambda *qkv: attention(*qkv, segments, backend="plain"), query, key, value)[1](grad)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), found, wanted)
