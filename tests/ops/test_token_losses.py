"""Chunked losses against naive full-logit versions: values against numpy, gradients against jax's own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.multiprocess import run_everywhere
from zeda_jax.errors import ZedaError
from zeda_jax.ops.token_losses import (
  CHUNK_BYTES,
  TokenLosses,
  default_chunk_size,
  masked_mean,
  sampled_token_loss,
  token_losses,
)
from zeda_jax.sharding import Sharding, make_mesh

T, H, G, V = 13, 12, 20, 50  # G: the teacher's width
WITH_TEACHER = ("logprob", "entropy", "teacher_logprob", "forward_kl", "reverse_kl")
CHUNKS = [10, 16, 128, 1, None]  # divide V, don't, larger than V, single columns, the default


def make_inputs(seed=0, dtype=jnp.float32, scale=0.7):
  rng = np.random.default_rng(seed)
  hidden, head = rng.normal(size=(T, H)) * scale, rng.normal(size=(H, V))
  teacher_hidden, teacher_head = rng.normal(size=(T, G)) * scale, rng.normal(size=(G, V))
  targets = rng.integers(0, V, size=T)
  targets[:2] = 0, V - 1
  arrays = (jnp.asarray(a, dtype) for a in (hidden, head, teacher_hidden, teacher_head))
  hidden, head, teacher_hidden, teacher_head = arrays
  return hidden, head, jnp.asarray(targets, jnp.int32), teacher_hidden, teacher_head


def numpy_losses(hidden, head, targets, teacher_hidden=None, teacher_head=None):
  """In float64, straight from the definitions."""

  def log_softmax(x, w):
    logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return np.log(exp / exp.sum(-1, keepdims=True))

  rows, targets = np.arange(len(targets)), np.asarray(targets)
  s = log_softmax(hidden, head)
  out = {"logprob": s[rows, targets], "entropy": -(np.exp(s) * s).sum(-1)}
  if teacher_hidden is None:
    return out | dict.fromkeys(WITH_TEACHER[2:], np.zeros(len(rows)))
  t = log_softmax(teacher_hidden, teacher_head)
  return out | {
    "teacher_logprob": t[rows, targets],
    "forward_kl": (np.exp(t) * (t - s)).sum(-1),
    "reverse_kl": (np.exp(s) * (s - t)).sum(-1),
  }


def naive_losses(hidden, head, targets, teacher_hidden, teacher_head):
  """With the full logits, for jax to differentiate."""
  s = jax.nn.log_softmax(hidden @ head)
  t = jax.lax.stop_gradient(jax.nn.log_softmax(teacher_hidden @ teacher_head))
  pick = lambda x: jnp.take_along_axis(x, targets[:, None], axis=1)[:, 0]
  p, q = jnp.exp(s), jnp.exp(t)
  return TokenLosses(pick(s), -(p * s).sum(-1), pick(t), (q * (t - s)).sum(-1), (p * (s - t)).sum(-1))


def weighted(losses, names, seed=1):
  """A scalar with another weight for every token of every named loss."""
  rng = np.random.default_rng(seed)
  weights = {name: jnp.asarray(rng.normal(size=T), jnp.float32) for name in WITH_TEACHER}
  return sum(jnp.sum(getattr(losses, name) * weights[name]) for name in names)


def naive_gradients(inputs, names):
  """Of the weighted sum, in student hidden and head, in float64."""
  with jax.enable_x64(True):
    wide = (np.asarray(a, np.int32 if a.dtype == jnp.int32 else np.float64) for a in inputs)
    grads = jax.jit(jax.grad(lambda *a: weighted(naive_losses(*a), names), argnums=(0, 1)))(*map(jnp.asarray, wide))
    assert all(g.dtype == jnp.float64 and jnp.abs(g).max() > 0.1 for g in grads)
    return [np.asarray(g) for g in grads]


def assert_close(got, expected, rtol=1e-5, atol=1e-5):
  np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=rtol, atol=atol)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_values_equal_numpy(chunk_size):
  inputs = make_inputs()
  losses = jax.jit(lambda *a: token_losses(*a, chunk_size=chunk_size))(*inputs)
  expected = numpy_losses(*inputs)
  for name in WITH_TEACHER:
    assert getattr(losses, name).dtype == jnp.float32 and getattr(losses, name).shape == (T,)
    assert_close(getattr(losses, name), expected[name])


def test_values_without_teacher_equal_numpy():
  inputs = make_inputs()[:3]
  losses = token_losses(*inputs, chunk_size=16)
  expected = numpy_losses(*inputs)
  for name in WITH_TEACHER:
    assert_close(getattr(losses, name), expected[name])
  assert not np.any(losses.forward_kl) and not np.any(losses.reverse_kl) and not np.any(losses.teacher_logprob)


@pytest.mark.parametrize("ascending", [True, False])
def test_large_logits_do_not_overflow(ascending):
  # The running maximum rises in every chunk, or is found in the first: both sides of the rescaling.
  hidden, head, targets, teacher_hidden, teacher_head = make_inputs()
  ramp = jnp.linspace(-1.0, 1.0, V) * (1 if ascending else -1)
  hidden, head = hidden.at[:, 0].set(200.0), head.at[0].set(ramp)
  teacher_hidden, teacher_head = teacher_hidden.at[:, 0].set(-180.0), teacher_head.at[0].set(ramp)
  inputs = hidden, head, targets, teacher_hidden, teacher_head
  losses, expected = token_losses(*inputs, chunk_size=16), numpy_losses(*inputs)
  for name in ("entropy", "forward_kl", "reverse_kl"):
    assert_close(getattr(losses, name), expected[name], rtol=1e-5, atol=1e-4)


def test_equal_models_have_exactly_no_divergence():
  hidden, head, targets, *_ = make_inputs()

  def total(hidden):
    losses = token_losses(hidden, head, targets, jax.lax.stop_gradient(hidden), head, chunk_size=16)
    return losses.forward_kl.sum() + losses.reverse_kl.sum()

  value, grad = jax.jit(jax.value_and_grad(total))(hidden)
  assert value == 0.0
  assert_close(grad, np.zeros_like(grad), atol=1e-6)


def check_gradients(names, chunk_size):
  inputs = make_inputs()
  chunked = lambda *a: weighted(token_losses(*a, chunk_size=chunk_size), names)
  got = jax.jit(jax.grad(chunked, argnums=(0, 1)))(*inputs)
  for g, e in zip(got, naive_gradients(inputs, names), strict=True):
    assert g.dtype == jnp.float32
    assert_close(g, e)


@pytest.mark.parametrize("name", ["logprob", "entropy", "forward_kl", "reverse_kl"])
def test_gradients_of_each_loss_equal_naive(name):
  check_gradients((name,), chunk_size=16)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_gradients_do_not_depend_on_the_chunks(chunk_size):
  check_gradients(WITH_TEACHER, chunk_size)


def test_gradients_without_teacher_equal_naive():
  inputs = make_inputs()
  names = ("logprob", "entropy")
  got = jax.grad(lambda x, w: weighted(token_losses(x, w, inputs[2], chunk_size=16), names), (0, 1))(*inputs[:2])
  for g, e in zip(got, naive_gradients(inputs, names), strict=True):
    assert_close(g, e)


def test_nothing_flows_to_the_teacher():
  hidden, head, targets, teacher_hidden, teacher_head = make_inputs()
  total = lambda x, w: weighted(token_losses(hidden, head, targets, x, w, chunk_size=16), WITH_TEACHER)
  for grad in jax.grad(total, argnums=(0, 1))(teacher_hidden, teacher_head):
    assert not np.any(grad)


def test_sampled_distillation_gradient_is_the_reverse_kl_gradient_in_expectation():
  # d KL(pi || teacher) = E_pi[-(log teacher - log pi) * d log pi]: summed over the vocabulary, not sampled.
  hidden, head, _, teacher_hidden, teacher_head = (a[:1] if a.shape[0] == T else a for a in make_inputs())
  every = jnp.arange(V)
  repeat = lambda x: jnp.broadcast_to(x, (V, x.shape[1]))

  def expected_policy_loss(hidden):
    losses = token_losses(repeat(hidden), head, every, repeat(teacher_hidden), teacher_head, chunk_size=16)
    advantage = losses.teacher_logprob - losses.logprob
    probs = jax.lax.stop_gradient(jnp.exp(losses.logprob))
    return jnp.sum(probs * sampled_token_loss(losses.logprob, jax.lax.stop_gradient(losses.logprob), advantage))

  exact = lambda x: token_losses(x, head, every[:1], teacher_hidden, teacher_head).reverse_kl.sum()
  assert_close(jax.jit(jax.grad(expected_policy_loss))(hidden), jax.jit(jax.grad(exact))(hidden), atol=2e-5)


@pytest.mark.parametrize(
  "student, teacher", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_dtypes_may_differ(student, teacher):
  hidden, head, targets, teacher_hidden, teacher_head = make_inputs()
  hidden, head = hidden.astype(student), head.astype(student)
  inputs = hidden, head, targets, teacher_hidden.astype(teacher), teacher_head.astype(teacher)
  # Products of bf16 numbers are exact in fp32, so the values are as good as in fp32.
  losses, expected = token_losses(*inputs, chunk_size=16), numpy_losses(*inputs)
  for name in WITH_TEACHER:
    assert_close(getattr(losses, name), expected[name])
  got = jax.jit(jax.grad(lambda *a: weighted(token_losses(*a, chunk_size=16), WITH_TEACHER), (0, 1)))(*inputs)
  expected_grads = naive_gradients(inputs, WITH_TEACHER)
  unit = 2.0**-8 if student == "bfloat16" else 1e-6
  for g, e in zip(got, expected_grads, strict=True):
    assert g.dtype == jnp.dtype(student)
    assert np.linalg.norm(np.asarray(g, np.float32) - e) < unit * np.linalg.norm(e)


def test_fp32_head_under_bf16_hidden_keeps_an_fp32_gradient():
  hidden, head, targets, *_ = make_inputs()
  hidden = hidden.astype(jnp.bfloat16)
  grads = jax.grad(lambda x, w: token_losses(x, w, targets, chunk_size=16).logprob.sum(), (0, 1))(hidden, head)
  assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
  assert_close(
    token_losses(hidden, head, targets).logprob, numpy_losses(hidden, head.astype(jnp.bfloat16), targets)["logprob"]
  )


@pytest.mark.parametrize("mask_dtype", [jnp.bool_, jnp.float32])
@pytest.mark.parametrize("poison", [np.nan, 1e30])
def test_masked_rows_poison_nothing(poison, mask_dtype):
  hidden, head, targets, teacher_hidden, teacher_head = make_inputs()
  mask = jnp.asarray(np.arange(T) % 3 != 1, mask_dtype)
  bad = mask == 0
  dirty = (
    jnp.where(bad[:, None], poison, hidden),
    head,
    jnp.where(bad, -7, targets),
    jnp.where(bad[:, None], poison, teacher_hidden),
    teacher_head,
  )
  clean = hidden, head, targets, teacher_hidden, teacher_head

  def total(hidden, head, rest):
    losses = token_losses(hidden, head, *rest, mask=mask, chunk_size=16)
    return weighted(losses, WITH_TEACHER), losses

  run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
  (d_hidden, d_head), losses = run(*dirty[:2], dirty[2:])
  (clean_d_hidden, clean_d_head), clean_losses = run(*clean[:2], clean[2:])
  for got, expected in zip(losses, clean_losses, strict=True):
    assert np.all(np.asarray(got)[np.asarray(bad)] == 0.0)
    np.testing.assert_array_equal(got, expected)
  assert np.all(np.asarray(d_hidden)[np.asarray(bad)] == 0.0)
  np.testing.assert_array_equal(d_hidden, clean_d_hidden)
  np.testing.assert_array_equal(d_head, clean_d_head)
  keep = np.flatnonzero(~np.asarray(bad))
  expected = numpy_losses(hidden[keep], head, targets[keep], teacher_hidden[keep], teacher_head)
  assert_close(losses.reverse_kl[keep], expected["reverse_kl"])


def test_nan_in_a_real_row_is_not_hidden():
  hidden, head, targets, teacher_hidden, teacher_head = make_inputs()
  hidden = hidden.at[4, 2].set(jnp.nan)
  losses = token_losses(hidden, head, targets, teacher_hidden, teacher_head, mask=jnp.ones(T, bool), chunk_size=16)
  for name in ("logprob", "entropy", "forward_kl", "reverse_kl"):
    np.testing.assert_array_equal(np.isnan(getattr(losses, name)), np.arange(T) == 4)


@pytest.mark.parametrize("target", [-1, V])
def test_target_outside_the_vocabulary_is_nan(target):
  hidden, head, targets, *_ = make_inputs()
  losses = token_losses(hidden, head, targets.at[3].set(target), chunk_size=16)
  np.testing.assert_array_equal(np.isnan(losses.logprob), np.arange(T) == 3)


def compiled_gradient(num_tokens, vocab_size, chunk_size, argnums=0, width=32):
  def total(hidden, head, targets, teacher_hidden, teacher_head):
    losses = token_losses(hidden, head, targets, teacher_hidden, teacher_head, chunk_size=chunk_size)
    return sum(jnp.mean(loss) for loss in losses)

  x, w = jax.ShapeDtypeStruct((num_tokens, width), "float32"), jax.ShapeDtypeStruct((width, vocab_size), "float32")
  y = jax.ShapeDtypeStruct((num_tokens,), "int32")
  lowered = jax.jit(jax.value_and_grad(total, argnums=argnums)).lower(x, w, y, x, w)
  return lowered, lowered.compile()


@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_memory_does_not_grow_with_the_vocabulary(argnums):
  num_tokens, chunk_size = 512, 256
  temp = {}
  for vocab_size in (4096, 32768, 32768 + 100):
    lowered, compiled = compiled_gradient(num_tokens, vocab_size, chunk_size, argnums)
    for text in (lowered.as_text(), compiled.as_text()):
      sizes = [np.prod([int(n) for n in re.findall(r"\d+", s)]) for s in re.findall(r"[\[<](\d+(?:[,x]\d+)+)", text)]
      assert max(sizes) == 32 * vocab_size  # the head; [T, V] would be 16 times that
    temp[vocab_size] = compiled.memory_analysis().temp_size_in_bytes
  assert temp[32768] <= 1.01 * temp[4096]
  assert temp[32768 + 100] <= 1.01 * temp[4096]
  assert temp[32768] < 6 * num_tokens * chunk_size * 4 < num_tokens * 32768 * 4 / 16


def test_default_chunk_bounds_memory_for_any_number_of_tokens():
  for num_tokens in (1, 1000, 8192, 32768, 131072):
    columns = default_chunk_size(num_tokens, 151936)
    assert columns >= 128 and (columns * num_tokens * 4 <= CHUNK_BYTES)
  assert default_chunk_size(10**7, 151936) == 128
  assert default_chunk_size(1, 151936) == 151936
  assert default_chunk_size(8192, 1000) == 1000
  for num_tokens in (8192, 32768):
    _, compiled = compiled_gradient(num_tokens, 32768, None, width=8)
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * CHUNK_BYTES < num_tokens * 32768 * 4


def check_on_mesh():
  """Runs in a process with four devices: each walks the vocabulary for its own tokens."""
  sharding = Sharding(make_mesh(2, 2))
  inputs = tuple(jnp.tile(a, (4,) + (1,) * (a.ndim - 1)) if a.shape[0] == T else a for a in make_inputs())
  mask = jnp.asarray(np.random.default_rng(0).random(4 * T) < 0.7)

  def run(sharding, inputs):
    total = lambda *a: sum((w * x).sum() for w, x in enumerate(token_losses(*a, mask=mask, sharding=sharding), 1))
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(*inputs)

  narrow = (inputs[0][:, :-1], inputs[1][:-1], *inputs[2:])  # a width that the devices do not divide
  for given in (inputs, narrow, inputs[:3]):
    expected = run(None, given)
    where = (sharding.batch(given[0]), sharding.parameter((), given[1].shape))
    placed = (*jax.device_put(given[:2], where), *given[2:])
    for g, e in zip(jax.tree.leaves(run(sharding, placed)), jax.tree.leaves(expected), strict=True):
      assert_close(g, e, atol=1e-4)  # sums over four times the tokens, in another order
  program = jax.jit(lambda *a: token_losses(*a, sharding=sharding, chunk_size=16)).lower(*inputs).compile().as_text()
  assert "all-gather" in program and f"f32[{H},{V}]" not in program  # no device has a whole head


def check_sharded():
  """Runs in a process with four devices: tokens sharded, the head over the vocabulary or over its width."""
  assert len(jax.devices()) == 4
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  inputs = tuple(jnp.tile(a, (4,) + (1,) * (a.ndim - 1)) if a.shape[0] == T else a for a in make_inputs())
  inputs = tuple(a[:, :48] if a.shape[-1] == V else a % 48 if a.ndim == 1 else a for a in inputs)
  run = jax.jit(jax.value_and_grad(lambda *a: sum(x.sum() for x in token_losses(*a, chunk_size=20)), argnums=(0, 1)))
  expected = run(*inputs)
  rows = PartitionSpec("data")
  for head in (PartitionSpec(None, "data"), PartitionSpec("data", None)):
    specs = rows, head, rows, rows, head
    placed = (jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(inputs, specs, strict=True))
    for g, e in zip(jax.tree.leaves(run(*placed)), jax.tree.leaves(expected), strict=True):
      assert_close(g, e, atol=1e-4)  # sums over four times the tokens, in another order


def test_sharded_jit():
  run_everywhere("tests.ops.test_token_losses:check_on_four_devices", 1, 4)


def check_on_four_devices():
  check_sharded()
  check_on_mesh()


def test_bad_arguments_are_refused():
  hidden, head, targets, teacher_hidden, teacher_head = make_inputs()
  with pytest.raises(ZedaError, match="49 entries and the student's 50"):
    token_losses(hidden, head, targets, teacher_hidden, teacher_head[:, :-1])
  with pytest.raises(ZedaError, match="only one of"):
    token_losses(hidden, head, targets, teacher_hidden)
  with pytest.raises(ZedaError, match="chunk_size is 0"):
    token_losses(hidden, head, targets, chunk_size=0)


@pytest.mark.parametrize(
  "ratio, advantage, loss, slope",  # slope: d loss / d logprob
  [
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),  # clipped at 1 + 0.2: no further push up
    (0.5, 2.0, -1.0, -1.0),
    (0.5, -2.0, 1.6, 0.0),  # clipped at 1 - 0.2: no further push down
    (1.5, -2.0, 3.0, 3.0),
  ],
)
def test_sampled_token_loss(ratio, advantage, loss, slope):
  old = jnp.array([-1.0])
  new, advantage = old + np.log(ratio), jnp.array([advantage])
  assert_close(sampled_token_loss(new, old, advantage), [loss])
  grads = jax.grad(lambda *a: sampled_token_loss(*a).sum(), argnums=(0, 1, 2))(new, old, advantage)
  assert_close(grads[0], [slope])
  assert not np.any(grads[1]) and not np.any(grads[2])


def test_sampled_token_loss_clip_bounds_and_huge_ratios():
  ones = jnp.ones(1)
  assert_close(sampled_token_loss(np.log(1.4) * ones, 0 * ones, ones, clip_low=0.1, clip_high=0.3), [-1.3])
  assert_close(sampled_token_loss(np.log(0.5) * ones, 0 * ones, -ones, clip_low=0.1, clip_high=0.3), [0.9])
  value, grad = jax.value_and_grad(lambda x: sampled_token_loss(x, -1000 * ones, 0 * ones).sum())(0 * ones)
  assert value == 0.0 and not np.any(grad)


def test_masked_mean():
  values = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.inf, 6.0]])
  mask = jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
  assert masked_mean(values, mask) == 3.0
  assert masked_mean(values, mask.astype(bool)) == 3.0
  assert masked_mean(values, jnp.zeros_like(mask)) == 0.0
  grad = jax.grad(masked_mean)(values, mask)
  assert_close(grad, mask / 3)
