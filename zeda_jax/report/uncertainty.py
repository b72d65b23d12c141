"""r_ZE against the student's entropy and its gap to the teacher (paper, Figure 3), with correlations and intervals."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from zeda_jax.analysis.collect import Collected
from zeda_jax.analysis.statistics import Correlation, correlation, means, quantile_bins
from zeda_jax.report import style
from zeda_jax.report.picture import Picture, minus, percent, power_of_ten

_BINS = 14
_FLOOR = 1e-7  # nats; smaller values are drawn there
_FEWEST_TEXTS = 10  # of a family that has a line of its own
MEASURES = {
  "entropy": ("student entropy", "entropy of the student (nats)"),
  "gap": ("teacher–student gap", "|log π_teacher − log π_student| (nats)"),
  "reverse_kl": ("KL to the teacher", "KL(student ‖ teacher) (nats)"),
}


@dataclasses.dataclass(frozen=True)
class Line:
  """One row of the table of correlations."""

  measure: str
  among: str  # "all", "within families" or the name of a family
  spearman: Correlation
  pearson: Correlation

  @property
  def verdict(self) -> str:
    """Sign of Spearman's coefficient, where the interval leaves no doubt."""
    low, high = self.spearman.low, self.spearman.high
    return "negative" if high < 0 else "positive" if low > 0 else "undecided"


def correlation_lines(collected: Collected) -> list[Line]:
  """Correlations with r_ZE over the passes that predict the response: all, within families, and family by family."""
  texts, ratio = collected.texts, collected.ratio
  family = collected.family[texts.text]
  lines = []
  for name in _measures(collected):
    x = np.where(texts.in_response, getattr(collected.tokens, name), np.nan)
    cases: list[tuple[str, np.ndarray, np.ndarray | None]] = [("all", x, None)]
    large = [i for i in range(len(collected.families)) if (collected.family == i).sum() >= _FEWEST_TEXTS]
    if len(collected.families) > 1:
      cases.append(("within families", x, family))
      cases += [(collected.families[i], np.where(family == i, x, np.nan), None) for i in large]
    for among, values, groups in cases:
      spearman = correlation(values, ratio, texts.text, groups=groups)
      pearson = correlation(values, ratio, texts.text, ranks=False, groups=groups)
      lines.append(Line(name, among, spearman, pearson))
  return lines


def _measures(collected: Collected) -> list[str]:
  return [name for name in MEASURES if np.isfinite(getattr(collected.tokens, name)).any()]


def uncertainty_pictures(collected: Collected, lines: Sequence[Line]) -> list[Picture]:
  pictures = [_curve(collected, name, lines) for name in _measures(collected) if name != "reverse_kl"]
  return [*pictures, _forest(lines)]


def _curve(collected: Collected, name: str, lines: Sequence[Line]) -> Picture:
  """Density of the tokens, and the mean in bins of equally many."""
  texts, ratio = collected.texts, 100 * collected.ratio
  title, label = MEASURES[name]
  x = np.where(texts.in_response, getattr(collected.tokens, name), np.nan)
  bins, count = quantile_bins(x, _BINS)
  values = means(ratio, texts.text, bins, count)
  centers = np.asarray([np.median(x[bins == b]) for b in range(count)])
  figure, (axes,) = style.new_figure()
  drawn = np.log10(np.maximum(x[bins >= 0], _FLOOR))
  low, high = drawn.min() - 0.1, drawn.max() + 0.1
  steps = min(collected.config.num_experts_per_tok * len(collected.tokens.zero_picks), 40)
  half = 50 / steps  # r_ZE comes in steps, which each get a row of the picture
  density, _, _ = np.histogram2d(
    drawn, ratio[bins >= 0], bins=[48, steps + 1], range=[[low, high], [-half, 100 + half]]
  )
  shade = np.sqrt(density / max(density.max(), 1)).T
  extent = (low, high, -half, 100 + half)
  axes.imshow(
    style.tint(shade, style.MUTED, 0.55), aspect="auto", origin="lower", extent=extent, interpolation="none", zorder=1
  )
  at = np.log10(np.maximum(centers, _FLOOR))
  y = np.asarray([[v.value, v.low, v.high] for v in values])
  axes.fill_between(at, y[:, 1], y[:, 2], color=style.STUDENT, alpha=0.25, linewidth=0, zorder=3)
  axes.plot(at, y[:, 0], color=style.STUDENT, marker="o", markersize=4, zorder=4)
  decades = range(math.ceil(low), math.floor(high) + 1)
  ticks = [d for d in decades if (d - decades[0]) % max(1, len(decades) // 5) == 0]
  axes.set_xticks(ticks, [("≤" if 10.0**d <= 1.01 * _FLOOR else "") + power_of_ten(d) for d in ticks])
  axes.set_xlim(low, high)
  axes.set_ylim(-half, 100 + half)
  axes.set_xlabel(label)
  axes.set_ylabel("picks skipped, r_ZE (%)")
  rows = [
    {"median_" + name: float(c), "r_ze": v.value / 100, "low": v.low / 100, "high": v.high / 100,
     "tokens": int((bins == b).sum())}
    for b, (c, v) in enumerate(zip(centers, values, strict=True))
  ]  # fmt: skip
  line = next(line for line in lines if line.measure == name and line.among == "all")
  caption = (
    f"Line: mean of r_ZE in {count} bins of equally many answer tokens, with 95 % intervals; shade: where tokens lie. "
    f"From {percent(values[0].value / 100)} in the lowest bin to {percent(values[-1].value / 100)} in the highest. "
    f"Spearman {signed(line.spearman)}: {line.verdict}."
  )
  return Picture(f"ratio-{name.replace('_', '-')}", f"r_ZE against {title}", caption, figure, rows)


def signed(value: Correlation) -> str:
  """A coefficient with its interval."""
  return minus(f"{value.value:+.2f} [{value.low:+.2f}, {value.high:+.2f}]")


def _forest(lines: Sequence[Line]) -> Picture:
  among = list(dict.fromkeys(line.among for line in lines))
  measures = list(dict.fromkeys(line.measure for line in lines))
  figure, (axes,) = style.new_figure(4.4, max(3.1, 1.1 + 0.36 * len(among)))
  for number, (measure, color) in enumerate(zip(measures, (style.STUDENT, style.BASELINE, style.PURPLE), strict=False)):
    mine = [line for line in lines if line.measure == measure]
    at = [among.index(line.among) + (number - (len(measures) - 1) / 2) * 0.24 for line in mine]
    v = np.asarray([line.spearman[:3] for line in mine])
    spread = [v[:, 0] - v[:, 1], v[:, 2] - v[:, 0]]
    axes.errorbar(
      v[:, 0], at, xerr=np.maximum(spread, 0), fmt="o", color=color, markersize=4.5, label=MEASURES[measure][0]
    )
  axes.axvline(0, color=style.MUTED, linewidth=0.9)
  axes.set_yticks(range(len(among)), among)
  axes.set_ylim(len(among) - 0.5, -0.5)
  axes.set_xlabel("Spearman correlation with r_ZE")
  style.legend_above(axes)
  rows = [
    {
      "measure": line.measure,
      "among": line.among,
      **{f"spearman{s}": v for s, v in zip(("", "_low", "_high"), line.spearman[:3], strict=True)},
      **{f"pearson{s}": v for s, v in zip(("", "_low", "_high"), line.pearson[:3], strict=True)},
      "tokens": line.spearman.tokens,
      "texts": line.spearman.texts,
    }
    for line in lines
  ]
  caption = (
    "Over the passes that predict the answer, with 95 % intervals of a bootstrap over texts. “Within families” "
    "compares tokens of the same family only, and says nothing about differences between families."
    if "within families" in among
    else "Over the passes that predict the answer, with 95 % intervals of a bootstrap over texts."
  )
  return Picture("correlations", "Signs and sizes", caption, figure, rows)
