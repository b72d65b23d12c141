"""Paired tests on cases with known results."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from zeda_jax.errors import ZedaError
from zeda_jax.evaluate.comparison import compare, compare_runs

RNG = np.random.default_rng(0)


def test_no_difference():
  same = RNG.random(50)
  found = compare([same], [same])
  assert (found.difference, found.low, found.high, found.p_value, found.wins, found.losses) == (0, 0, 0, 1, 0, 0)


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (2, 0.5), (5, 2 / 2**5), (10, 2 / 2**10)])
def test_always_better_by_one(n, p):
  """Of 2^n ways to swap, two are as extreme."""
  found = compare([np.zeros(n)], [np.ones(n)])
  assert (found.mean_a, found.mean_b, found.difference, found.wins, found.losses) == (0, 1, 1, n, 0)
  assert found.p_value == pytest.approx(p)
  assert (found.low, found.high) == ((None, None) if n == 1 else (1, 1))


def test_right_and_wrong_is_the_exact_sign_test():
  a = np.array([1.0] * 20 + [1, 1] + [0] * 9)
  b = np.array([1.0] * 20 + [0, 0] + [1] * 9)
  assert compare([a], [b]).p_value == pytest.approx(stats.binomtest(2, 11).pvalue)


def test_all_swaps_of_graded_scores():
  d = np.array([0.25, -0.5, 1.0, 0.75, 0.5])
  totals = [np.dot(signs, d) for signs in itertools.product((1, -1), repeat=5)]
  expected = np.mean(np.abs(totals) >= abs(d.sum()) - 1e-12)
  assert compare([np.zeros(5)], [d]).p_value == pytest.approx(expected)


def test_intervals_are_those_of_the_mean():
  d = RNG.normal(0.1, 1.0, 400)
  found = compare([np.zeros(400)], [d])
  half = 1.96 * d.std(ddof=1) / 20
  assert found.low == pytest.approx(d.mean() - half, abs=0.02) and found.high == pytest.approx(
    d.mean() + half, abs=0.02
  )
  assert found.p_value == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.02)


def test_tasks_count_the_same_and_are_resampled_apart():
  small, large = RNG.normal(1.0, 0.1, 20), RNG.normal(0.0, 0.1, 500)
  found = compare([np.zeros(20), np.zeros(500)], [small, large])
  assert found.difference == pytest.approx((small.mean() + large.mean()) / 2)
  error = np.sqrt(small.var(ddof=1) / 20 + large.var(ddof=1) / 500) / 2
  assert (found.high - found.low) / 3.92 == pytest.approx(error, rel=0.1)
  assert found.num_problems == 520 and found.p_value < 0.001


def test_chance_alone_is_seldom_significant():
  values = [compare([RNG.integers(0, 2, 30)], [RNG.integers(0, 2, 30)], seed=i).p_value for i in range(40)]
  assert sum(p < 0.05 for p in values) <= 6  # 2 expected; more than 6 in 40 happens once in 500 times


def test_the_same_seed_gives_the_same_numbers():
  a, b = RNG.random(30), RNG.random(30)
  assert compare([a], [b], seed=1) == compare([a], [b], seed=1)


@pytest.mark.parametrize(("a", "b"), [([], []), ([np.zeros(2)], [np.zeros(3)]), ([np.zeros(0)], [np.zeros(0)])])
def test_nothing_to_compare(a, b):
  with pytest.raises(ValueError, match="at least one task"):
    compare(a, b)


def write_run(directory, scores, digest="d", **settings):
  directory.mkdir()
  tasks = {task: {"title": task, "samples": 1, "problems": len(values)} for task, values in scores.items()}
  (directory / "settings.json").write_text(json.dumps({"tasks": tasks, "temperature": 0.6} | settings))
  lines = [
    {"task": task, "id": str(i), "sample": j, "score": score, "problem": digest}
    for task, values in scores.items()
    for i, row in enumerate(values)
    for j, score in enumerate(row)
  ]
  (directory / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return directory


def test_runs(tmp_path):
  a = write_run(tmp_path / "a", {"x": [[0, 1], [0, 0], [1, 1]], "y": [[0]] * 4, "z": [[1]]})
  b = write_run(tmp_path / "b", {"x": [[1, 1], [0, 1], [None, None]], "y": [[1]] * 4}, temperature=1.0)
  found, notes = compare_runs(a, b)
  assert list(found) == ["x", "y", "average"]
  assert (found["x"].num_problems, found["x"].mean_a, found["x"].mean_b) == (2, 0.25, 0.75)
  assert found["y"].p_value == pytest.approx(2 / 16)
  assert found["average"].difference == pytest.approx((0.5 + 1) / 2)
  assert notes == ["temperature: 0.6 and 1.0", "x: 1 problems that only one of the runs has are left out"]


def test_runs_that_cannot_be_compared(tmp_path):
  a = write_run(tmp_path / "a", {"x": [[1]]})
  with pytest.raises(ZedaError, match="no task in common: x and y"):
    compare_runs(a, write_run(tmp_path / "b", {"y": [[1]]}))
  with pytest.raises(ZedaError, match="1 problems, '0' among them, differ"):
    compare_runs(a, write_run(tmp_path / "c", {"x": [[1]]}, digest="e"))
  with pytest.raises(ZedaError, match=r"has no settings\.json"):
    compare_runs(a, tmp_path)
  with pytest.raises(ZedaError, match="no graded problem in common"):
    compare_runs(a, write_run(tmp_path / "f", {"x": [[None]]}))
