"""The sampling distribution against an independent numpy that removes one token after another."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zeda_jax.errors import ZedaError
from zeda_jax.rollout.sampling import RowSampling, Sampling, filter_rows, sample_rows


def plain_distribution(logits, temperature, top_k, top_p, min_p=0.0):
  """Probabilities of one row's tokens, in float64."""
  scaled = np.asarray(logits, np.float64) / temperature
  order = list(np.argsort(-scaled, kind="stable"))
  if top_k:
    order = order[:top_k]
  probabilities = np.exp(scaled[order] - scaled[order].max())
  probabilities /= probabilities.sum()
  kept, mass = 0, 0.0
  while kept < len(order) and (kept == 0 or mass < top_p):
    mass += probabilities[kept]
    kept += 1
  kept = max(1, sum(probabilities[:kept] >= min_p * probabilities[0]))
  out = np.zeros(len(scaled))
  out[order[:kept]] = probabilities[:kept] / probabilities[:kept].sum()
  return out


SETTINGS = [
  (1.0, 0, 1.0),
  (0.6, 0, 1.0),
  (2.0, 3, 1.0),
  (1.0, 0, 0.7),
  (0.6, 5, 0.95),
  (1.0, 1, 1.0),
  (1.0, 0, 1e-6),
  (1.0, 99, 1.0),
  (1.3, 0, 1.0, 0.2),
  (0.7, 6, 0.9, 0.05),
]


def row_sampling(settings):
  temperature, top_k, top_p, min_p = zip(*((*s, *(0.0,) * (4 - len(s))) for s in settings), strict=True)
  wide = lambda column: np.array(column, np.float32)
  return RowSampling(wide(temperature), np.array(top_k, np.int32), wide(top_p), wide(min_p))


FILTER = jax.jit(filter_rows)
SAMPLE = jax.jit(sample_rows)


def test_the_distribution_equals_numpy():
  logits = 2 * np.random.default_rng(0).standard_normal((len(SETTINGS), 6, 12)).astype(np.float32)
  for i in range(6):
    found = jax.nn.softmax(FILTER(logits[:, i], row_sampling(SETTINGS)), axis=-1)
    expected = np.stack(
      [plain_distribution(row, *setting) for row, setting in zip(logits[:, i], SETTINGS, strict=True)]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(found) > 0, expected > 0)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 2**16), steps=st.sampled_from([4, 1000]), scale=st.sampled_from([0.1, 2.0, 20.0]))
def test_any_logits_and_settings(seed, steps, scale):
  rng = np.random.default_rng(seed)
  settings = [SETTINGS[i] for i in rng.integers(0, len(SETTINGS), 5)]
  logits = np.stack([rng.permutation(12) for _ in range(5)]) + rng.integers(0, steps, (5, 12)) / (2.0 * steps)
  logits = (scale / 12 * (logits - 5)).astype(np.float32)  # all different, and both signs
  kept = np.isfinite(FILTER(logits, row_sampling(settings)))
  for row, keep, setting in zip(logits, kept, settings, strict=True):
    np.testing.assert_array_equal(keep, plain_distribution(row, *setting) > 0)


def test_equal_tokens_are_kept_together():
  logits = np.array([[1.0, 1.0, 0.0, -0.0, 3.0, 1.0]], np.float32)
  best, ones, zeros = logits[0] == 3, logits[0] == 1, logits[0] == 0
  cases = {
    (1.0, 1, 1.0): best,
    (1.0, 2, 1.0): best | ones,
    (1.0, 0, 0.75): best | ones,  # the best one has 0.67 of the mass
    (1.0, 5, 0.9): best | ones,
    (1.0, 5, 1.0): best | ones | zeros,
  }
  for setting, kept in cases.items():
    found = FILTER(logits, row_sampling([setting]))[0]
    np.testing.assert_array_equal(found, np.where(kept, logits[0], -np.inf))


def test_samples_follow_the_distribution():
  logits = np.random.default_rng(0).standard_normal(8).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 20000)
  tokens, logprobs, _ = SAMPLE(jnp.tile(logits, (20000, 1)), keys, row_sampling([(0.8, 5, 0.9)] * 20000))
  frequency = np.bincount(tokens, minlength=8) / 20000
  np.testing.assert_allclose(frequency, plain_distribution(logits, 0.8, 5, 0.9), atol=0.015)
  # Log-probabilities are the model's own: temperature 1, nothing cut off.
  expected = np.log(plain_distribution(logits, 1.0, 0, 1.0))[np.asarray(tokens)]
  np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_greedy_takes_the_best_and_the_first_among_equals():
  logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 2.0, 2.0]])
  tokens, logprobs, _ = SAMPLE(logits, jax.random.split(jax.random.key(0), 2), row_sampling([(0.0, 0, 1.0)] * 2))
  np.testing.assert_array_equal(tokens, [1, 0])
  assert tokens.dtype == jnp.int32
  np.testing.assert_allclose(logprobs, [jax.nn.log_softmax(logits[0])[1], -np.log(3)], rtol=1e-6)


def test_a_row_draws_from_its_own_key():
  keys = jax.random.split(jax.random.key(3), 5)
  logits = jnp.zeros((5, 50))
  tokens, *_ = SAMPLE(logits, keys, row_sampling([(1.0, 0, 1.0)] * 5))
  alone, *_ = SAMPLE(logits[2:3], keys[2:3], row_sampling([(1.0, 0, 1.0)]))
  assert alone[0] == tokens[2]
  assert len(set(tokens.tolist())) > 1


def test_rows_with_their_own_settings_draw_what_jax_draws_from_numpys_distribution():
  settings = [*SETTINGS, (0.0, 0, 1.0), (0.0, 3, 0.5)]
  logits = 2 * np.random.default_rng(0).standard_normal((len(settings), 50)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), len(settings))
  tokens, logprobs, drawn = SAMPLE(logits, keys, row_sampling(settings))
  for i, setting in enumerate(settings):
    expected, under = logits[i].argmax(), 0.0
    if setting[0] > 0:
      with np.errstate(divide="ignore"):
        kept = np.log(plain_distribution(logits[i], *setting)).astype(np.float32)
      expected = jax.random.categorical(keys[i], kept)
      under = kept[tokens[i]]
    assert tokens[i] == expected
    np.testing.assert_allclose(logprobs[i], jax.nn.log_softmax(logits[i])[tokens[i]], rtol=0, atol=1e-5)
    np.testing.assert_allclose(drawn[i], under, rtol=0, atol=1e-5)
  greedy = row_sampling([(0.0, 0, 1.0)] * len(settings))
  np.testing.assert_array_equal(SAMPLE(logits, keys, greedy)[0], logits.argmax(axis=1))


@pytest.mark.parametrize(
  ("setting", "words"),
  [
    ({"temperature": -0.1}, "temperature is -0.1; expected 0"),
    ({"temperature": float("nan")}, "temperature is nan; expected 0"),
    ({"temperature": float("inf")}, "temperature is inf; expected 0"),
    ({"top_k": -1}, "top_k is -1; expected 0"),
    ({"top_p": 0.0}, "top_p is 0.0; expected more than 0 and at most 1"),
    ({"top_p": 1.5}, "top_p is 1.5; expected more than 0"),
    ({"top_p": float("nan")}, "top_p is nan; expected more than 0"),
    ({"min_p": -0.1}, "min_p is -0.1; expected 0"),
  ],
  ids=str,
)
def test_bad_settings(setting, words):
  with pytest.raises(ZedaError, match=words):
    Sampling(**setting)
