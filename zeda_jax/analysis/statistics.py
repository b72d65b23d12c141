"""Means and correlations over tokens, with intervals from resampling whole texts.

Tokens of one text are not independent, so texts are what is drawn. All intervals are percentile bootstraps. A resample
only changes how often each text counts, so sums are made once per text, and each resample is a weighted sum of those.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int, UInt8

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 100  # resamples whose weights are in memory together


class Interval(NamedTuple):
  """An estimate with its 95 % interval; NaN where it is undefined."""

  value: float
  low: float
  high: float


class Correlation(NamedTuple):
  """A correlation coefficient over tokens, with the 95 % interval of the bootstrap over texts."""

  value: float
  low: float
  high: float
  tokens: int
  texts: int


def correlation(
  x: Float[np.ndarray, " T"],
  y: Float[np.ndarray, " T"],
  text: Int[np.ndarray, " T"],
  *,
  ranks: bool = True,
  groups: Int[np.ndarray, " T"] | None = None,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> Correlation:
  """Spearman's rank correlation, or Pearson's, of the tokens where x and y are both finite.

  Args:
    x, y: one number a token.
    text: which text each token belongs to.
    ranks: Spearman (ties get their mean rank) rather than Pearson. Ranks are those of the whole sample in every
      resample.
    groups: correlate within these groups only: ranks are taken, and means subtracted, group by group.
    resamples: of the bootstrap.
    seed: of the bootstrap.
  """
  keep = np.isfinite(x) & np.isfinite(y)
  x, y, text = x[keep].astype(np.float64), y[keep].astype(np.float64), text[keep]
  group = np.zeros(len(x), np.int64) if groups is None else np.unique(groups[keep], return_inverse=True)[1]
  if not len(x):
    return Correlation(np.nan, np.nan, np.nan, 0, 0)
  for g in np.unique(group):
    mine = group == g
    for values in (x, y):
      if ranks:
        values[mine] = scipy.stats.rankdata(values[mine]) / mine.sum()
      values[mine] -= values[mine].mean()
  _, text = np.unique(text, return_inverse=True)
  num_texts = int(text.max()) + 1
  # Where groups are mixed by resampling, their means stay those of the whole sample; without groups the means move.
  columns = [x * x, y * y, x * y] if groups is not None else [x * x, y * y, x * y, x, y, np.ones(len(x))]
  sums = np.stack([np.bincount(text, column, num_texts) for column in columns], axis=1)
  value = float(_pearson(sums.sum(axis=0, keepdims=True))[0])
  drawn = np.concatenate([_pearson(weights @ sums) for weights in _weights(num_texts, resamples, seed)])
  low, high = _bounds(drawn)
  return Correlation(value, float(low), float(high), len(x), num_texts)


def _pearson(sums: Float[np.ndarray, "R C"]) -> Float[np.ndarray, " R"]:
  xx, yy, xy = sums[:, 0], sums[:, 1], sums[:, 2]
  if sums.shape[1] == 6:
    x, y, n = sums[:, 3], sums[:, 4], sums[:, 5]
    xx, yy, xy = xx - x * x / n, yy - y * y / n, xy - x * y / n
  with np.errstate(invalid="ignore", divide="ignore"):
    scale = np.sqrt(np.maximum(xx, 0) * np.maximum(yy, 0))
    return np.where(scale > 1e-12, xy / scale, np.nan)


def means(
  values: Float[np.ndarray, " T"],
  text: Int[np.ndarray, " T"],
  cell: Int[np.ndarray, " T"],
  num_cells: int,
  *,
  mask: Bool[np.ndarray, " T"] | None = None,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> list[Interval]:
  """The mean over the tokens of each cell (a kind of token, a bin), with its interval; NaN where a cell is empty."""
  keep = np.isfinite(values) & (cell >= 0)
  keep = keep if mask is None else keep & mask
  values, cell = values[keep], cell[keep]
  if not len(values):
    return [Interval(np.nan, np.nan, np.nan)] * num_cells
  _, text = np.unique(text[keep], return_inverse=True)
  num_texts = int(text.max()) + 1
  place = text * num_cells + cell
  totals = np.bincount(place, values, num_texts * num_cells).reshape(num_texts, num_cells)
  counts = np.bincount(place, minlength=num_texts * num_cells).reshape(num_texts, num_cells).astype(np.float64)
  with np.errstate(invalid="ignore"):
    mean = totals.sum(axis=0) / counts.sum(axis=0)
    drawn = np.concatenate([(w @ totals) / (w @ counts) for w in _weights(num_texts, resamples, seed)])
  low, high = _bounds(drawn)
  return [Interval(*map(float, three)) for three in zip(mean, low, high, strict=True)]


def quantile_bins(x: Float[np.ndarray, " T"], count: int) -> tuple[Int[np.ndarray, " T"], int]:
  """Which of at most `count` bins with equally many tokens each value falls into (-1 if not finite), and how many.

  Equal values share a bin, so there may be fewer bins than asked for.
  """
  finite = np.isfinite(x)
  if not finite.any():
    return np.full(len(x), -1), 0
  edges = np.unique(np.quantile(x[finite], np.linspace(0, 1, count + 1)[1:-1]))
  bins = np.searchsorted(edges, x, side="right")
  used, bins[finite] = np.unique(bins[finite], return_inverse=True)
  bins[~finite] = -1
  return bins, len(used)


def _weights(num_texts: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "R S"]]:
  """How often each text is drawn in each resample, some resamples at a time."""
  counts = _counts(num_texts, resamples, seed)
  for first in range(0, resamples, _AT_ONCE):
    yield counts[first : first + _AT_ONCE].astype(np.float64)


@functools.lru_cache(maxsize=4)  # most figures of a report resample the same texts
def _counts(num_texts: int, resamples: int, seed: int) -> UInt8[np.ndarray, "R S"]:
  rng = np.random.default_rng(seed)
  counts = np.empty((resamples, num_texts), np.uint8)  # 255 of one text in one resample does not happen
  for row in counts:
    row[:] = np.bincount(rng.integers(num_texts, size=num_texts), minlength=num_texts)
  return counts


def _bounds(drawn: Float[np.ndarray, "R *cells"]) -> tuple[np.ndarray, np.ndarray]:
  """Percentiles over resamples, without those where the estimate is undefined."""
  tail = 100 * (1 - LEVEL) / 2
  defined = np.isfinite(drawn)
  if defined.all():
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    return low, high
  columns = drawn.reshape(len(drawn), -1)
  bounds = lambda c: np.percentile(c, [tail, 100 - tail]) if len(c) else (np.nan, np.nan)
  low, high = np.asarray([bounds(c[np.isfinite(c)]) for c in columns.T]).T
  return low.reshape(drawn.shape[1:]), high.reshape(drawn.shape[1:])
