"""Correlations, means and their intervals against scipy and against resampling written out."""

import numpy as np
import pytest
import scipy.stats

from zeda_jax.analysis import statistics
from zeda_jax.analysis.statistics import correlation, means, quantile_bins

RNG = np.random.default_rng(0)
TEXT = np.repeat(np.arange(60), RNG.integers(1, 12, 60))
X = RNG.standard_normal(len(TEXT)) + 0.5 * RNG.standard_normal(60)[TEXT]
Y = np.round(-0.4 * X + RNG.standard_normal(len(TEXT)), 1)  # with ties


def test_values_are_scipys():
  assert correlation(X, Y, TEXT).value == pytest.approx(scipy.stats.spearmanr(X, Y).statistic)
  assert correlation(X, Y, TEXT, ranks=False).value == pytest.approx(scipy.stats.pearsonr(X, Y).statistic)


def test_interval_is_that_of_resampled_texts():
  """The same draws with the tokens of each drawn text repeated, one resample after the other."""
  found = correlation(X, Y, TEXT, ranks=False, resamples=200)
  drawn = []
  for counts in statistics._counts(60, 200, 0):
    times = counts[TEXT]
    drawn.append(scipy.stats.pearsonr(np.repeat(X, times), np.repeat(Y, times)).statistic)
  assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
  assert found.low < found.value < found.high < 0


def test_draws_are_bootstraps():
  counts = statistics._counts(60, 400, 3)
  assert (counts.sum(axis=1) == 60).all()
  assert counts.var() == pytest.approx(59 / 60, rel=0.05)  # of a multinomial's counts


def test_interval_covers_the_truth():
  """Independent x and y whose texts differ: 95 % intervals miss 0 rarely, though a token-wise interval would often."""
  missed = 0
  for seed in range(60):
    rng = np.random.default_rng(seed)
    text = np.repeat(np.arange(80), 10)
    x, y = (rng.standard_normal(80)[text] + 0.3 * rng.standard_normal(800) for _ in range(2))
    found = correlation(x, y, text, resamples=300)
    missed += not found.low <= 0 <= found.high
  assert missed <= 10


def test_within_groups_ignores_differences_between_them():
  group = TEXT % 3
  shifted_x, shifted_y = X + 50 * group, Y + 90 * group
  assert correlation(shifted_x, shifted_y, TEXT).value > 0.8
  within = correlation(shifted_x, shifted_y, TEXT, groups=group)
  assert within.value == pytest.approx(correlation(X, Y, TEXT, groups=group).value)
  assert within.high < 0


def test_tokens_without_a_number_do_not_count():
  x = X.copy()
  x[::7] = np.nan
  kept = np.isfinite(x)
  found = correlation(x, Y, TEXT)
  assert found.value == pytest.approx(scipy.stats.spearmanr(x[kept], Y[kept]).statistic)
  assert found.tokens == kept.sum()


def test_what_is_undefined_is_nan():
  assert np.isnan(correlation(np.ones(len(TEXT)), Y, TEXT).value)
  assert correlation(np.full(len(TEXT), np.nan), Y, TEXT).tokens == 0


def test_means_by_cell():
  cell = np.where(X > 0.5, 1, 0)
  cell[:5] = -1
  found = means(Y, TEXT, cell, 3, resamples=300)
  for c in range(2):
    assert found[c].value == pytest.approx(Y[cell == c].mean())
    assert found[c].low < found[c].value < found[c].high
  assert np.isnan(found[2]).all()
  masked = means(Y, TEXT, cell, 2, mask=TEXT < 20, resamples=50)
  assert masked[1].value == pytest.approx(Y[(cell == 1) & (TEXT < 20)].mean())


def test_mean_interval_is_that_of_resampled_texts():
  found = means(Y, TEXT, np.zeros(len(Y), int), 1, resamples=200)[0]
  drawn = [np.average(Y, weights=counts[TEXT]) for counts in statistics._counts(60, 200, 0)]
  assert found[1:] == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))


def test_quantile_bins():
  x = np.concatenate([np.zeros(50), np.linspace(1, 2, 50), [np.nan, np.inf]])
  bins, count = quantile_bins(x, 10)
  assert (bins[-2:] == -1).all()
  assert len({*bins[:50].tolist()}) == 1
  assert sorted({*bins[:100].tolist()}) == list(range(count))
  assert (np.diff(bins[50:100]) >= 0).all()
  assert quantile_bins(np.full(3, np.nan), 4)[1] == 0
