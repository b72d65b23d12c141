"""The search for biases, on curves whose answer is known."""

import math

import numpy as np
import pytest

from zeda_jax.analysis.dial import find_biases, target_ratios


def logistic(scale, middle=0.0):
  return lambda bias: 1 / (1 + math.exp(-(bias - middle) / scale)) if bias > -700 * scale else 0.0


@pytest.mark.parametrize("scale", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("start", [0.3, 0.52, 0.7])
def test_every_target_is_met(scale, start):
  ratio_at = logistic(scale, -scale * math.log(start / (1 - start)))
  biases = find_biases(ratio_at)
  assert len(biases) == 7
  assert biases[0] == -math.inf
  assert 0.0 in biases
  ratios = [ratio_at(bias) for bias in biases[1:]]
  assert ratios == sorted(ratios)
  wanted = sorted([*target_ratios(start), start])
  np.testing.assert_allclose(ratios, wanted, atol=0.016)


def test_biases_have_few_digits():
  assert all(float(f"{bias:.3g}") == bias for bias in find_biases(logistic(0.3)))


def test_few_trials():
  trials = []
  curve = logistic(0.05)
  find_biases(lambda bias: trials.append(bias) or curve(bias))
  assert len(trials) < 30
  assert len(set(trials)) == len(trials)


def test_targets_out_of_reach_are_left_out():
  """A sigmoid router: however large the number, the ratio stays between 0.4 and 0.6."""
  biases = find_biases(lambda bias: 0.5 + 0.1 * math.tanh(bias))
  assert biases[:2] == [-math.inf, 0.0]
  assert [0.5 + 0.1 * math.tanh(bias) for bias in biases[2:]] == [pytest.approx(0.575, abs=0.015)]


def test_a_jump_is_no_endless_search():
  assert find_biases(lambda bias: 0.5 if bias < 0.1 else 1.0) == [-math.inf, 0.0]
