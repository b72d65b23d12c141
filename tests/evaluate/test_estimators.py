"""Means, errors and pass@k against formulas written out with NumPy."""

import itertools
import math

import numpy as np
import pytest

from zeda_jax.evaluate.estimators import overall, pass_at_k, standard_error, summarize

RNG = np.random.default_rng(0)


def sample(problem, number, score, tokens=10, prompt=5, zero=0.5, zero_all=0.4, reason="stop"):
  return {
    "id": problem,
    "sample": number,
    "score": score,
    "num_tokens": tokens,
    "num_prompt_tokens": prompt,
    "zero_ratio": zero,
    "zero_ratio_all": zero_all,
    "finish_reason": reason,
  }


@pytest.mark.parametrize(("n", "c"), [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, c):
  right = [1] * c + [0] * (n - c)
  for k in range(1, n + 1):
    subsets = [max(subset) for subset in itertools.combinations(right, k)]
    assert pass_at_k(n, c, k) == pytest.approx(np.mean(subsets))


def test_pass_at_k_as_a_product():
  for n, c, k in [(200, 13, 10), (32, 5, 8), (32, 32, 1), (32, 0, 32)]:
    product = 1.0 if n - c < k else 1 - np.prod(1 - k / np.arange(n - c + 1, n + 1))
    assert pass_at_k(n, c, k) == pytest.approx(product)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_so_many_samples(k):
  with pytest.raises(ValueError, match="expected 1 to 4"):
    pass_at_k(4, 2, k)


def test_pass_at_k_is_unbiased():
  p, n, k = 0.3, 6, 3
  draws = RNG.random((20000, n)) < p
  assert np.mean([pass_at_k(n, c, k) for c in draws.sum(axis=1)]) == pytest.approx(1 - (1 - p) ** k, abs=0.01)


def test_a_task():
  scores = (RNG.random((7, 4)) < 0.6).astype(float)
  tokens, prompts = RNG.integers(1, 50, (7, 4)), RNG.integers(1, 9, 7)
  zero, zero_all = RNG.random((7, 4)), RNG.random((7, 4))
  samples = [
    sample(
      f"p{i}",
      j,
      scores[i, j],
      int(tokens[i, j]),
      int(prompts[i]),
      zero[i, j],
      zero_all[i, j],
      "stop" if j else "length",
    )
    for i in range(7)
    for j in range(4)
  ]
  found = summarize(samples, 4)
  means = scores.mean(axis=1)
  assert found["mean"] == pytest.approx(scores.mean())
  # clustered by problem: residuals are summed within a problem, with the correction G / (G - 1)
  residuals = (scores - scores.mean()).sum(axis=1)
  assert found["standard_error"] == pytest.approx(math.sqrt(7 / 6 * (residuals**2).sum()) / 28)
  assert found["pass_at"]["1"] == pytest.approx(scores.mean())
  assert found["pass_at"]["4"] == pytest.approx(scores.max(axis=1).mean())
  assert list(found["pass_at"]) == ["1", "2", "4"]
  assert found["pass_at"]["2"] == pytest.approx(np.mean([pass_at_k(4, int(m * 4), 2) for m in means]))
  assert found["length"] == pytest.approx(tokens.mean()) and found["truncated"] == 0.25
  assert found["zero_ratio"]["response"] == pytest.approx(zero.mean())
  assert found["zero_ratio"]["token"] == pytest.approx((zero * tokens).sum() / tokens.sum())
  passes = tokens + prompts[:, None] - 1
  assert found["zero_ratio"]["all"] == pytest.approx((zero_all * passes).sum() / passes.sum())
  assert (found["num_problems"], found["num_graded"], found["num_failed"]) == (7, 28, 0)


def test_what_failed_counts_nowhere():
  samples = [sample("a", 0, 1.0), sample("a", 1, None), sample("b", 0, 0.0), sample("b", 1, 1.0), sample("c", 0, None)]
  found = summarize(samples, 2)
  assert (found["mean"], found["num_graded"], found["num_failed"], found["num_problems"]) == (0.75, 3, 2, 3)
  assert found["pass_at"] == {"1": 0.75, "2": 1.0}  # only b has two graded samples
  nothing = summarize([sample("a", 0, None)], 1)
  assert nothing["mean"] is None and nothing["standard_error"] is None and nothing["pass_at"] == {"1": None}


def test_standard_errors():
  assert standard_error([0.0, 1.0, 1.0, 1.0]) == pytest.approx(np.std([0, 1, 1, 1], ddof=1) / 2)
  assert standard_error([1.0]) is None


def test_the_average_over_tasks():
  tasks = {
    "x": summarize([sample(i, 0, float(i % 2), zero=0.2) for i in range(10)], 1),
    "y": summarize([sample(i, 0, 1.0, zero=0.6) for i in range(30)], 1),
  }
  found = overall(tasks)
  assert found["mean"] == pytest.approx(0.75)
  assert found["standard_error"] == pytest.approx(math.sqrt(0.25 * 10 / 9 / 10) / 2)
  assert found["zero_ratio"]["token"] == pytest.approx(0.4)
