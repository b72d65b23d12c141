"""The expert computation against the plain einsum that runs every expert on every token."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_zero_experts import plain_group_loss
from tests.tiny_models import GLM, layer_of, tiny_config, tiny_model
from zeda_jax.models import experts
from zeda_jax.models.experts import run_experts
from zeda_jax.models.moe import MoELayer
from zeda_jax.zero_experts import group_balance_loss

TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 150, 3, 5, 8, 6


def plain_experts(x, picks, weights, gate_up, down):
  """The docstring of run_experts, word for word."""
  one_hot = (picks[:, :, None] == jnp.arange(EXPERTS)).astype(x.dtype)
  gate, up = jnp.split(jnp.einsum("th,nhf->tnf", x, gate_up), 2, axis=-1)
  expert = jnp.einsum("tnf,nfh->tnh", jax.nn.silu(gate) * up, down)
  return jnp.einsum("tnh,tkn,tk->th", expert, one_hot, weights)


def with_gradients(function):
  def run(x, picks, weights, gate_up, down, grad):
    out, pullback = jax.vjp(lambda *floats: function(floats[0], picks, *floats[1:]), x, weights, gate_up, down)
    return out, *pullback(grad)

  return jax.jit(run)


OURS, PLAIN = with_gradients(run_experts), with_gradients(plain_experts)


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  matrices = draw(EXPERTS, HIDDEN, 2 * INNER), draw(EXPERTS, INNER, HIDDEN)
  return rng, draw(TOKENS, HIDDEN), np.abs(draw(TOKENS, TOP_K)), *matrices, draw(TOKENS, HIDDEN)


def distinct_picks(rng, zero_share):
  """[T, K] distinct normal experts per token; a pick is a zero expert (any id >= N) with the given probability."""
  picks = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).astype(np.int32)
  is_zero = rng.random(picks.shape) < zero_share
  return np.where(is_zero, EXPERTS + rng.integers(0, 9, picks.shape), picks).astype(np.int32), is_zero


@pytest.mark.parametrize("zero_share", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_values_and_gradients_equal_the_plain_einsum(zero_share):
  rng, x, weights, gate_up, down, grad = inputs()
  picks, is_zero = distinct_picks(rng, zero_share)
  arguments = x, picks, weights, gate_up, down, grad
  found, expected = OURS(*arguments), PLAIN(*arguments)
  for got, want in zip(found, expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  nothing = is_zero.all(axis=1)
  np.testing.assert_array_equal(found[0][nothing], 0)  # a token without experts: exactly 0, no gradient
  np.testing.assert_array_equal(found[1][nothing], 0)
  np.testing.assert_array_equal(np.asarray(found[2])[is_zero], 0)


def test_all_tokens_on_one_expert_and_the_same_pick_twice():
  _, x, weights, gate_up, down, grad = inputs(1)
  for picks in (np.full((TOKENS, TOP_K), 2, np.int32), np.tile(np.int32([[4, 7, 4]]), (TOKENS, 1))):
    arguments = x, picks, weights, gate_up, down, grad
    for got, want in zip(OURS(*arguments), PLAIN(*arguments), strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-4)


def test_a_token_with_nan_does_not_touch_the_others():
  rng, x, weights, gate_up, down, grad = inputs(2)
  picks, _ = distinct_picks(rng, 0.5)
  picks[10] = EXPERTS  # like padding: it takes no expert
  poisoned, bad_grad = x.copy(), grad.copy()
  poisoned[10] = bad_grad[10] = np.nan
  found = OURS(poisoned, picks, weights, gate_up, down, bad_grad)
  expected = OURS(x, picks, weights, gate_up, down, grad)
  others = np.arange(TOKENS) != 10
  for i in range(3):
    np.testing.assert_array_equal(found[i][others], expected[i][others])
  for i in (3, 4):
    np.testing.assert_array_equal(found[i], expected[i])


def test_work_follows_the_picks_that_are_left(monkeypatch):
  """Both products get group sizes that count the picks of normal experts, and nothing else."""
  seen = []

  def counting(function):
    def counted(lhs, rhs, group_sizes, **options):
      jax.debug.callback(lambda sizes: seen.append(np.asarray(sizes)), group_sizes)
      return function(lhs, rhs, group_sizes, **options)

    return counted

  monkeypatch.setattr(experts, "grouped_swiglu", counting(experts.grouped_swiglu))
  monkeypatch.setattr(experts, "grouped_matmul", counting(experts.grouped_matmul))
  run = jax.jit(lambda *args: run_experts(*args))
  rng, x, weights, gate_up, down, _ = inputs()
  for zero_share in (0.0, 0.5, 0.9, 1.0):
    picks, is_zero = distinct_picks(rng, zero_share)
    seen.clear()
    jax.block_until_ready(run(x, picks, weights, gate_up, down))
    jax.effects_barrier()
    per_expert = np.bincount(picks[~is_zero], minlength=EXPERTS)
    assert len(seen) == 2
    for sizes in seen:
      np.testing.assert_array_equal(sizes, per_expert)


def test_no_array_of_all_slots_of_all_tokens_but_the_sorted_rows():
  """The [T * K, H] rows and results exist once each; no [T, K, H] array and no [T * K, 2F] product beside them."""
  _, x, weights, gate_up, down, _ = inputs()
  picks = np.zeros((TOKENS, TOP_K), np.int32)
  program = jax.jit(run_experts).lower(x, picks, weights, gate_up, down).as_text()
  assert f"tensor<{TOKENS}x{TOP_K}x{HIDDEN}xf32>" not in program
  assert f"tensor<{TOKENS * TOP_K}x{2 * INNER}xf32>" not in program


def test_the_router_sees_every_token_and_padding_takes_no_expert():
  layer = MoELayer(tiny_config(num_zero_experts=3), nnx.Rngs(0))
  x = np.random.default_rng(0).standard_normal((7, 32)).astype(np.float32)
  live = np.array([1, 1, 0, 1, 0, 0, 1], bool)
  run = nnx.jit(lambda layer, live: layer(x, 0.0, live))
  out, routing = run(layer, live)
  everything, same = run(layer, np.ones(7, bool))
  np.testing.assert_array_equal(routing.picks, same.picks)
  np.testing.assert_array_equal(out[~live], 0)
  np.testing.assert_allclose(out[live], everything[live], rtol=1e-5, atol=1e-6)
  assert routing.scores.shape == (7, 9)
  assert routing.scores.dtype == routing.weights.dtype == jnp.float32


def test_the_router_works_in_fp32_on_bf16_activations():
  router = MoELayer(tiny_config(), nnx.Rngs(0)).router
  x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 32)), jnp.bfloat16)
  logits = np.asarray(x, np.float64) @ np.asarray(router.weight[...], np.float64).T
  expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(router(x).scores, expected, rtol=1e-5)


def test_copy_experts_add_the_token_itself():
  layers = [MoELayer(tiny_config(num_zero_experts=3, zero_expert_type=kind), nnx.Rngs(0)) for kind in ("zero", "copy")]
  x = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
  (zero, routing), (copy, same) = (layer(x) for layer in layers)
  np.testing.assert_array_equal(routing.picks, same.picks)
  is_copy = np.asarray(routing.picks) >= 6
  weight = np.where(is_copy, routing.weights, 0.0).sum(axis=1)
  assert 0 < is_copy.mean() < 1
  np.testing.assert_allclose(copy, zero + weight[:, None] * x, rtol=1e-5, atol=1e-6)


# --- sigmoid routers, shared experts ------------------------------------------------------------------------------


def sigmoid_layer(**changes):
  layer = layer_of(tiny_model(**{**GLM, "moe_layers": (True,), "num_zero_experts": 3, **changes}).runs[0].mlp)
  return layer, np.random.default_rng(0).standard_normal((50, 32)).astype(np.float32)


def test_the_balance_loss_sees_normalised_sigmoid_scores_and_the_real_picks():
  layer, x = sigmoid_layer()
  routing = layer.router(x)
  rows = np.concatenate([layer.router.weight[...], layer.router.zero_weight[...]]).astype(np.float64)
  bias = np.concatenate([layer.router.correction_bias[...], layer.router.zero_correction_bias[...]])
  scores = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ rows.T))
  best = lambda a: np.argsort(-a, axis=1, kind="stable")[:, :2]
  picks = best(scores + bias)
  np.testing.assert_array_equal(routing.picks, picks)
  assert (picks != best(scores)).any()  # without the bias the loss would count other picks
  shares = scores / scores.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(routing.scores, shares, rtol=1e-5)
  mask = np.arange(50) % 5 > 0
  expected = plain_group_loss(shares, picks, 6, 2.0, 0.1, mask)
  found = group_balance_loss(routing.scores, routing.picks, 6, 2.0, 0.1, mask)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert abs(found - plain_group_loss(shares, best(scores), 6, 2.0, 0.1, mask)) > 1e-4


def test_shared_experts_are_one_mlp_that_every_token_takes():
  layer, x = sigmoid_layer(num_shared_experts=2)
  assert layer.shared_experts.gate_proj.kernel.shape == (32, 2 * 24)
  out, routing = layer(x)
  routed = layer.experts(x, routing.picks, routing.weights)
  np.testing.assert_allclose(out, routed + layer.shared_experts(x), rtol=1e-6, atol=1e-7)
  everywhere_zero, routing = layer(x, 1e4)
  assert (np.asarray(routing.scores)[:, 6:] > 0.1).all()
  assert np.abs(layer.shared_experts(x)).max() > 1e-5
  skipped = (np.asarray(routing.picks) >= 6).all(axis=1)
  assert skipped.any()
  np.testing.assert_allclose(everywhere_zero[skipped], layer.shared_experts(x)[skipped], rtol=1e-6, atol=1e-7)
