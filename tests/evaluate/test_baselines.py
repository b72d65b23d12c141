"""Each baseline against a decoder that multiplies every expert with every token."""

import numpy as np
import pytest

from tests.tiny_models import GLM, forward, layer_of, random_tokens, tiny_model
from zeda_jax.evaluate.baselines import dynamic_skipping, halved, matched_threshold, truncated
from zeda_jax.rollout.generate import generate

TOKENS = random_tokens((4, 24))


@pytest.fixture(scope="module")
def model():
  """One MoE layer, whose router sees the same in every baseline, and a dense one that carries the difference on."""
  return tiny_model(num_experts_per_tok=4, moe_layers=(True, False))


def weights_of(out):
  return np.asarray(out.pick_weights, np.float64)[0]


def test_truncation_normalises_over_what_is_left(model):
  out, full = forward(truncated(model, 2), TOKENS), forward(model, TOKENS)
  weights = weights_of(full)[..., :2]
  np.testing.assert_allclose(weights_of(out), weights / weights.sum(axis=-1, keepdims=True), rtol=1e-5)
  np.testing.assert_array_equal(out.picks[0], full.picks[0, ..., :2])
  assert (out.logits != full.logits).any()


def test_halving_keeps_the_weights_of_all_picks(model):
  out, full = forward(halved(model, 2), TOKENS), forward(model, TOKENS)
  np.testing.assert_allclose(weights_of(out)[..., :2], weights_of(full)[..., :2], rtol=1e-6)
  np.testing.assert_array_equal(out.picks[0, ..., :2], full.picks[0, ..., :2])
  assert (np.asarray(out.picks)[..., 2:] >= 6).all()
  assert (np.asarray(out.pick_weights)[..., 2:] == 0).all()


def test_skipping_drops_what_is_below_the_best(model):
  out, full = forward(dynamic_skipping(model, 0.4), TOKENS), forward(model, TOKENS)
  weights = weights_of(full)
  keep = weights >= 0.4 * weights[..., :1]
  kept = np.where(keep, weights, 0)
  np.testing.assert_allclose(weights_of(out), kept / kept.sum(axis=-1, keepdims=True), rtol=1e-5)
  np.testing.assert_array_equal(np.asarray(out.picks)[0] >= 6, ~keep)
  assert 0.1 < (~keep).mean() < 0.9


def test_baselines_of_a_sigmoid_router():
  """The best picks are those that the router would choose first, by score plus bias; skipping compares weights."""
  model = tiny_model(**GLM | {"moe_layers": (True,), "num_experts_per_tok": 4})
  x = np.random.default_rng(0).standard_normal((100, 32)).astype(np.float32)
  models = (model, halved(model, 2), truncated(model, 2), dynamic_skipping(model, 0.8))
  full, half, short, skipping = (layer_of(m.runs[0].mlp.router)(x) for m in models)
  np.testing.assert_array_equal(half.picks[:, :2], full.picks[:, :2])
  np.testing.assert_array_equal(short.picks, full.picks[:, :2])
  np.testing.assert_array_equal(half.weights[:, :2], full.weights[:, :2])
  assert (half.picks[:, 2:] >= 6).all()
  np.testing.assert_allclose(short.weights.sum(axis=1), 1.8, rtol=1e-5)
  weights = np.asarray(full.weights)
  assert (weights.argmax(axis=1) > 0).any()  # the first choice need not have the largest weight
  keep = weights >= np.float32(0.8) * weights.max(axis=1, keepdims=True)
  np.testing.assert_array_equal(np.asarray(skipping.picks) < 6, keep)
  assert 0.1 < keep.mean() < 0.9
  np.testing.assert_allclose(np.asarray(skipping.weights).sum(axis=1), 1.8, rtol=1e-5)


def test_a_threshold_of_one_keeps_the_best_alone(model):
  out, top = forward(dynamic_skipping(model, 1.0), TOKENS), forward(truncated(model, 1), TOKENS)
  np.testing.assert_allclose(out.logits, top.logits, rtol=0, atol=1e-5)


def test_the_threshold_is_matched_on_response_passes():
  model, ratio = tiny_model(num_experts_per_tok=4), 0.4
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 64, n).tolist() for n in (3, 9, 17, 6, 11)]
  responses = [s.tokens for s in generate(model, prompts, 20, seed=3, eos_id=(), batch_size=5)]
  threshold = matched_threshold(model, prompts, responses, ratio)
  assert 0 < threshold < 1
  # It cuts exactly this share of the unchanged model's picks,
  rows = np.zeros((5, 37), np.int32)
  predicting = np.zeros((5, 37), bool)
  for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
    rows[i, : len(p) + len(r)] = p + r
    predicting[i, len(p) - 1 : len(p) + len(r) - 1] = True
  weights = np.asarray(forward(model, rows).pick_weights)[:, predicting]
  assert (weights < threshold * weights[..., :1]).mean() == pytest.approx(ratio, abs=0.01)
  # and about this share once skipping changes what later layers see.
  picks = np.asarray(forward(dynamic_skipping(model, threshold), rows).picks)[:, predicting]
  assert (picks >= 6).mean() == pytest.approx(ratio, abs=0.1)
