"""Accuracy, skipped work and distances as the summary reports them, recomputed by hand."""

import math

import jax
import numpy as np
import pytest

from tests.tiny_models import forward, tiny_model
from zeda_jax.evaluate.baselines import truncated
from zeda_jax.evaluate.runner import Result, evaluate, teacher_distance
from zeda_jax.models.decoder import inject
from zeda_jax.rollout.generate import generate

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 64, n).tolist() for n in (3, 9, 14, 6)]
SETTINGS = {"max_new_tokens": 12, "seed": 0, "batch_size": 4}


def decode(tokens):
  return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def teacher():
  return tiny_model(moe_layers=(True,))


@pytest.fixture(scope="module")
def student(teacher):
  return inject(teacher, 3)


def test_accuracy_by_family(student):
  responses = [decode(s.tokens) for s in generate(student, PROMPTS, 12, temperature=0.0, batch_size=4)]
  records = [
    {"label": responses[0], "family": "math"},
    {"label": "wrong", "family": "math"},
    {"label": responses[2]},
    {"prompt": "without a label", "family": "code"},
  ]
  result, samples = evaluate(student, PROMPTS, records, decode, **SETTINGS)
  assert [decode(s.tokens) for s in samples] == responses
  assert result.accuracy == {"all": 1.0, "math": 0.5}
  assert result.num_graded == {"all": 1, "math": 2}
  assert result.average == 0.75
  assert result.standard_error == pytest.approx(math.sqrt(0.25 / 2) / 2)
  assert result.response_length == 12
  assert result.seconds > 0


def test_without_labels_there_is_no_accuracy(student):
  result, _ = evaluate(student, PROMPTS, [{}] * 4, decode, **SETTINGS)
  assert result.accuracy == {}
  assert math.isnan(result.average)


def test_skipped_work_is_weighted_by_token(student):
  result, samples = evaluate(student, PROMPTS, [{}] * 4, decode, temperature=1.0, **SETTINGS)
  zero = counted = zero_response = counted_response = 0
  for prompt, s in zip(PROMPTS, samples, strict=True):
    row = np.zeros((1, 32), np.int32)
    row[0, : len(prompt) + len(s.tokens)] = prompt + s.tokens
    picks = np.asarray(forward(student, row).picks)[:, 0, : len(prompt) + len(s.tokens) - 1] >= 6
    zero, counted = zero + picks.sum(), counted + picks.size
    response = picks[:, len(prompt) - 1 :]
    zero_response, counted_response = zero_response + response.sum(), counted_response + response.size
  assert result.skipped == pytest.approx(zero / counted, abs=1e-6)
  assert result.skipped_response == pytest.approx(zero_response / counted_response, abs=1e-6)
  assert result.expert_flops_left == pytest.approx(1 - result.skipped)
  assert 0 < result.skipped < 1


def test_fewer_picks_than_the_teacher_are_skipped_work(teacher):
  half = truncated(teacher, 1)
  result, _ = evaluate(half, PROMPTS, [{}] * 4, decode, teacher_top_k=2, **SETTINGS)
  assert (result.skipped, result.skipped_response, result.expert_flops_left) == (0.5, 0.5, 0.5)


def test_standard_error_is_that_of_the_average():
  result = Result({"a": 0.9, "b": 0.5}, {"a": 100, "b": 400}, 0, 0, 1, 1, 1)
  assert result.average == pytest.approx(0.7)
  assert result.standard_error == pytest.approx(math.sqrt(0.9 * 0.1 / 100 + 0.25 / 400) / 2)


def test_distance_equals_full_distributions(student, teacher):
  responses = [RNG.integers(0, 64, n).tolist() for n in (5, 12, 1, 8)]
  found = teacher_distance(student, teacher, PROMPTS, responses, batch_size=2)
  totals = np.zeros(3)
  for prompt, response in zip(PROMPTS, responses, strict=True):
    row = np.zeros((1, 32), np.int32)
    row[0, : len(prompt) + len(response)] = prompt + response
    where = np.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    log_p, log_q = (
      np.asarray(jax.nn.log_softmax(forward(model, row).logits[0, where], axis=-1), np.float64)
      for model in (student, teacher)
    )
    totals += (
      (np.exp(log_q) * (log_q - log_p)).sum(),
      (np.exp(log_p) * (log_p - log_q)).sum(),
      -log_p[np.arange(len(response)), response].sum(),
    )
  expected = dict(zip(("forward_kl", "reverse_kl", "cross_entropy"), totals / 26, strict=True))
  assert found == pytest.approx(expected, rel=1e-4)
  assert found["forward_kl"] > 0.01


def test_the_teacher_is_at_no_distance_from_itself(teacher):
  found = teacher_distance(teacher, teacher, PROMPTS, PROMPTS, batch_size=2)
  assert found["forward_kl"] == pytest.approx(0, abs=1e-6)
  assert found["reverse_kl"] == pytest.approx(0, abs=1e-6)
