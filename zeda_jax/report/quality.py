"""Quality against skipped work: every measured model, and the dial of one checkpoint."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from zeda_jax.report import style
from zeda_jax.report.picture import Picture, minus, percent


@dataclasses.dataclass(frozen=True)
class Model:
  """One row of the headline table."""

  name: str
  label: str
  row: Mapping[str, Any]  # as evaluate/NAME.json has it

  @property
  def color(self) -> str:
    return style.INK if self.name == "teacher" else style.BASELINE if "untrained" in self.label else style.STUDENT


@dataclasses.dataclass(frozen=True)
class DialPoint:
  """One value of zero_expert_bias, as fractions and nats per token; accuracy is NaN where nothing was graded."""

  bias: float
  ratio: float  # r_ZE of answers: of the graded ones, else of the same texts for all points
  ratio_all: float
  accuracy: float
  standard_error: float
  kl: tuple[float, float, float]  # KL(teacher || student) on the same texts, with its interval; NaN without a teacher
  seconds: float


def dial_points(dial: Sequence[Mapping[str, Any]]) -> list[DialPoint]:
  points = []
  for entry in dial:
    graded, same = entry["graded"] or {}, entry["same_texts"]
    points.append(
      DialPoint(
        bias=float(entry["bias"]),
        ratio=graded.get("skipped_response", same["ratio_response"][0]),
        ratio_all=graded.get("skipped", same["ratio"][0]),
        accuracy=_or_nan(graded.get("average")),
        standard_error=_or_nan(graded.get("standard_error")),
        kl=tuple(map(_or_nan, same["forward_kl"])),  # type: ignore[arg-type]
        seconds=_or_nan(graded.get("seconds")),
      )
    )
  return points


def is_monotone(points: Sequence[DialPoint]) -> bool:
  """Whether r_ZE rises with the bias, from each point to the next."""
  return all(a.ratio <= b.ratio for a, b in itertools.pairwise(points))


def quality_picture(models: Sequence[Model], points: Sequence[DialPoint]) -> Picture | None:
  """Accuracy against r_ZE: the models as numbered points, the dial as a line; None where nothing was graded."""
  graded = [m for m in models if m.row.get("average") is not None]
  line = [p for p in points if math.isfinite(p.accuracy)]
  if not graded and not line:
    return None
  figure, (axes,) = style.new_figure(7.0, 4.0)
  values = [100 * m.row["average"] for m in graded] + [100 * p.accuracy for p in line]
  bottom = _bottom(values)
  top = max(values)
  _draw_dial(axes, line, bottom)
  for number, model in enumerate(models, start=1):
    if model in graded:
      _draw_model(axes, number, model, bottom)
  teacher = [m for m in graded if m.name == "teacher"]
  if teacher:
    level = 100 * teacher[0].row["average"]
    axes.axhline(level, color=style.INK, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
  margin = max(0.09 * (top - bottom), 0.1)
  axes.set_ylim(bottom - margin, top + margin)
  axes.set_xlim(-4, max(80, *(100 * p.ratio for p in line), *(100 * m.row["skipped_response"] for m in graded)) + 4)
  axes.set_xlabel("expert picks skipped while answering, r_ZE (%)")
  axes.set_ylabel("accuracy, mean of families (%)")
  _legend(axes, graded, bool(line))
  rows = [{"model": m.label, **_numbers(m)} for m in graded]
  rows += [_dial_row(p) for p in line]
  caption = _quality_caption(graded, line, bottom)
  return Picture("quality", "Quality against skipped work", caption, figure, rows, wide=True)


def _bottom(values: Sequence[float]) -> float:
  """Down to where the better half can still be told apart; what lies lower is drawn at the edge, with its value."""
  best, half = max(values), float(np.median(values))
  return max(min(values), best - max(3.0, 3 * (best - half)))


def _draw_dial(axes: Axes, line: Sequence[DialPoint], bottom: float) -> None:
  inside = [p for p in line if 100 * p.accuracy >= bottom]
  x, y = [100 * p.ratio for p in inside], [100 * p.accuracy for p in inside]
  errors = [100 * p.standard_error for p in inside]
  axes.fill_between(x, np.subtract(y, errors), np.add(y, errors), color=style.GREEN, alpha=0.18, linewidth=0)
  axes.plot(x, y, color=style.GREEN, marker="o", markersize=3.5, zorder=2)
  for p in line:
    if 100 * p.accuracy < bottom:
      _draw_below(axes, 100 * p.ratio, 100 * p.accuracy, bottom, style.GREEN)


def _draw_model(axes: Axes, number: int, model: Model, bottom: float) -> None:
  x, y = 100 * model.row["skipped_response"], 100 * model.row["average"]
  if y < bottom:
    _draw_below(axes, x, y, bottom, model.color, f"{number}: ")
    return
  axes.errorbar(x, y, yerr=100 * model.row["standard_error"], color=model.color, linewidth=1, alpha=0.55, zorder=3)
  axes.scatter([x], [y], s=105, color=model.color, zorder=4, linewidth=0)
  axes.text(
    x, y, str(number), ha="center", va="center_baseline", fontsize=7, color=style.PAPER, zorder=5, weight="bold"
  )


def _draw_below(axes: Axes, x: float, y: float, bottom: float, color: str, prefix: str = "") -> None:
  axes.scatter([x], [bottom], marker="v", s=34, color=color, zorder=4)
  axes.annotate(
    f"{prefix}{y:.1f}", (x, bottom), (0, 6), textcoords="offset points", ha="center", fontsize=7.5, color=color
  )


def _legend(axes: Axes, graded: Sequence[Model], has_dial: bool) -> None:
  colors = {m.color for m in graded}
  kinds = {
    style.INK: "teacher",
    style.BASELINE: "cut without training",
    style.STUDENT: "trained",
  }
  for color, label in kinds.items():
    if color in colors:
      axes.scatter([], [], s=60, color=color, label=label, linewidth=0)
  if has_dial:
    axes.plot([], [], color=style.GREEN, marker="o", markersize=3.5, label="the dial: one checkpoint, other biases")
  style.legend_above(axes, columns=4)


def _numbers(model: Model) -> dict[str, Any]:
  row = model.row
  return {
    "r_ze_response": row["skipped_response"],
    "r_ze_all": row["skipped"],
    "accuracy": row["average"],
    "standard_error": row["standard_error"],
    **{f"accuracy/{name}": value for name, value in row["accuracy"].items()},
  }


def _dial_row(point: DialPoint) -> dict[str, Any]:
  return {
    "model": f"dial, zero_expert_bias {point.bias:g}",
    "zero_expert_bias": point.bias,
    "r_ze_response": point.ratio,
    "r_ze_all": point.ratio_all,
    "accuracy": point.accuracy,
    "standard_error": point.standard_error,
    "forward_kl": point.kl[0],
    "forward_kl_low": point.kl[1],
    "forward_kl_high": point.kl[2],
    "seconds": point.seconds,
  }


def _quality_caption(graded: Sequence[Model], line: Sequence[DialPoint], bottom: float) -> str:
  by_name = {m.name: m.row for m in graded}
  text = "Bars and band are one standard error. "
  if graded:
    text = "Numbers are rows of the table. " + text
  if "teacher" in by_name and "student" in by_name:
    lost = 100 * (by_name["teacher"]["average"] - by_name["student"]["average"])
    error = 100 * math.hypot(by_name["teacher"]["standard_error"], by_name["student"]["standard_error"])
    skipped = percent(by_name["student"]["skipped_response"])
    text += (
      f"The student skips {skipped} of its expert picks and is {lost:.2f} ± {error:.2f} points below its teacher. "
    )
  if any(100 * m.row["average"] < bottom for m in graded) or any(100 * p.accuracy < bottom for p in line):
    text += "Triangles lie below the axis, at the number beside them."
  return text.strip()


def dial_pictures(points: Sequence[DialPoint]) -> list[Picture]:
  """r_ZE against the bias, and the distance to the teacher against r_ZE."""
  pictures = [_bias_picture(points)]
  if all(math.isfinite(p.kl[0]) for p in points):
    pictures.append(_distance_picture(points))
  return pictures


def _bias_picture(points: Sequence[DialPoint]) -> Picture:
  figure, (axes,) = style.new_figure()
  finite = [p for p in points if math.isfinite(p.bias)]
  span = max((p.bias for p in finite), default=0) - min((p.bias for p in finite), default=0) or 1.0
  edge = min(p.bias for p in finite) - 0.16 * span
  x = [p.bias if math.isfinite(p.bias) else edge for p in points]
  y = [100 * p.ratio for p in points]
  first = 1 if len(points) > 1 and not math.isfinite(points[0].bias) else 0
  axes.plot(x[: first + 1], y[: first + 1], color=style.GREEN, linestyle=(0, (1, 2.5)))
  axes.plot(x[first:], y[first:], color=style.GREEN)
  axes.scatter(x, y, s=26, color=style.GREEN, zorder=3)
  for p, at, value in zip(points, x, y, strict=True):
    right = p.ratio < 0.5
    axes.annotate(
      f"{value:.0f} %",
      (at, value),
      (5 if right else -5, -8 if right else 5),
      textcoords="offset points",
      ha="left" if right else "right",
      fontsize=8,
    )
  axes.axvline(0, color=style.MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
  axes.set_ylim(-4, 104)
  ticks = [t for t in axes.get_xticks() if min(p.bias for p in finite) <= t <= max(p.bias for p in finite)]
  labels = [minus(f"{t:g}") for t in ticks]
  if first:
    ticks, labels = [edge, *ticks], ["−∞", *labels]
  axes.set_xticks(ticks, labels)
  axes.margins(x=0.08)
  axes.set_xlabel("zero_expert_bias, added to the zero experts' router logits")
  axes.set_ylabel("picks skipped, r_ZE (%)")
  rises = "rises with the bias at every point" if is_monotone(points) else "does not rise at every point"
  caption = (
    f"{len(points)} settings of one checkpoint, without training: r_ZE of its answers {rises}, from "
    f"{percent(points[0].ratio)} to {percent(points[-1].ratio)}. −∞ masks the zero experts."
  )
  return Picture("dial", "The dial", caption, figure, [_dial_row(p) for p in points])


def _distance_picture(points: Sequence[DialPoint]) -> Picture:
  figure, (axes,) = style.new_figure()
  x = [100 * p.ratio for p in points]
  y, low, high = (np.asarray([max(p.kl[i], 1e-7) for p in points]) for i in range(3))
  axes.fill_between(x, low, high, color=style.PURPLE, alpha=0.18, linewidth=0)
  axes.plot(x, y, color=style.PURPLE, marker="o", markersize=4)
  axes.set_yscale("log")
  axes.set_xlabel("picks skipped, r_ZE (%)")
  axes.set_ylabel("KL(teacher ‖ student), nats per token")
  at_zero = next(p for p in points if p.bias == 0)
  caption = (
    "Distance to the teacher on the same answers at every setting; the band is the 95 % interval. As trained (bias 0): "
    f"{at_zero.kl[0]:.2g} nats per token."
  )
  return Picture("dial-distance", "What the dial costs", caption, figure, [_dial_row(p) for p in points])


def _or_nan(value: float | None) -> float:
  return math.nan if value is None else float(value)
