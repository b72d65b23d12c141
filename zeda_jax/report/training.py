"""Training curves of the recipe, from the metrics.csv of its stages."""

import csv
import math
import pathlib
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes

from zeda_jax.report import style
from zeda_jax.report.picture import Picture, percent

STAGES = ("sft", "opd")
Row = dict[str, float]


def read_metrics(main: pathlib.Path) -> dict[str, list[Row]]:
  """Rows of metrics.csv by stage, in order of steps; stages that were not run are left out."""
  found = {}
  for stage in STAGES:
    file = main / stage / "metrics.csv"
    if file.is_file():
      with file.open(newline="") as lines:
        rows = [{k: float(v) for k, v in row.items() if k and v} for row in csv.DictReader(lines)]
      if rows:
        found[stage] = rows
  return found


def training_pictures(stages: dict[str, list[Row]], targets: dict[str, float]) -> list[Picture]:
  """Loss, r_ZE and r_ZE by layer over the steps of all stages, one after the other.

  Args:
    stages: from `read_metrics`.
    targets: r_ZE at which each stage's balance loss is in equilibrium, by stage; may be empty.
  """
  if not stages:
    return []
  pictures = [_loss_picture(stages), _ratio_picture(stages, targets)]
  if len(_layer_names(stages)) > 1:
    pictures.append(_layer_picture(stages))
  return pictures


def _series(stages: dict[str, list[Row]], name: str) -> dict[str, tuple[list[float], list[float]]]:
  """(steps counted over all stages, values) by stage, where the metric was written."""
  series, offset = {}, 0.0
  for stage, rows in stages.items():
    pairs = [(offset + row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    series[stage] = ([x for x, _ in pairs], [y for _, y in pairs])
    offset += rows[-1]["step"]
  return series


def _csv(stages: dict[str, list[Row]], names: Sequence[str]) -> list[dict[str, float | str]]:
  return [
    {"stage": stage, "step": int(row["step"]), **{n: row[n] for n in names if n in row}}
    for stage, rows in stages.items()
    for row in rows
  ]


def _mark_stages(axes: Axes, stages: dict[str, list[Row]]) -> None:
  start = 0.0
  for stage, rows in stages.items():
    end = start + rows[-1]["step"]
    if start:
      axes.axvline(start, color=style.MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
    if len(stages) > 1:
      transform = axes.get_xaxis_transform()
      axes.text((start + end) / 2, 0.015, stage.upper(), transform=transform, ha="center", color=style.MUTED)
    start = end
  axes.set_xlabel("training step")
  axes.set_xlim(0, start)


def _loss_picture(stages: dict[str, list[Row]]) -> Picture:
  figure, (axes,) = style.new_figure()
  names = {
    "loss_distill": (style.STUDENT, "what the stage trains on"),
    "reverse_kl": (style.PURPLE, "KL(student ‖ teacher)"),
  }
  positive = []
  for name, (color, label) in names.items():
    for number, (x, y) in enumerate(_series(stages, name).values()):
      axes.plot(x, y, color=color, label=label if number == 0 else None)
      positive += y
  if positive and min(positive) > 0:
    axes.set_yscale("log")
  _mark_stages(axes, stages)
  axes.set_ylabel("nats per response token")
  style.legend_above(axes)
  last = {stage: _series(stages, "reverse_kl")[stage][1][-1:] for stage in stages}
  ends = ", ".join(f"{value[0]:.2g} at the end of {stage.upper()}" for stage, value in last.items() if value)
  caption = f"Distillation loss and distance to the teacher, on each step's own batch.{f' KL: {ends}.' if ends else ''}"
  columns = ("loss", "loss_distill", "loss_balance", "forward_kl", "reverse_kl", "cross_entropy", "grad_norm")
  rows = _csv(stages, columns)
  return Picture("training-loss", "Training: loss", caption, figure, rows)


def _ratio_picture(stages: dict[str, list[Row]], targets: dict[str, float]) -> Picture:
  figure, (axes,) = style.new_figure()
  names = {"zero_ratio": (style.GREY, "all tokens"), "zero_ratio/response": (style.STUDENT, "response tokens")}
  for name, (color, label) in names.items():
    for number, (x, y) in enumerate(_series(stages, name).values()):
      axes.plot(x, [100 * v for v in y], color=color, label=label if number == 0 else None)
  start = 0.0
  for stage, rows in stages.items():
    if stage in targets:
      label = "_" if start else "target of the balance loss"
      ends = [start, start + rows[-1]["step"]]
      level = [100 * targets[stage]] * 2
      axes.plot(ends, level, color=style.BASELINE, linestyle=(0, (2, 2)), linewidth=1.2, label=label)
    start += rows[-1]["step"]
  _mark_stages(axes, stages)
  axes.set_ylabel("picks skipped, r_ZE (%)")
  style.legend_above(axes)
  last = [values[1][-1] for values in _series(stages, "zero_ratio/response").values() if values[1]]
  end = f" It ends at {percent(last[-1])} of the response's picks." if last else ""
  caption = "Share of picks that fall on zero experts, batch by batch." + end
  table = _csv(stages, ("zero_ratio", "zero_ratio/response"))
  return Picture("training-ratio", "Training: skipped work", caption, figure, table)


def _layer_names(stages: dict[str, list[Row]]) -> list[str]:
  every = {name for rows in stages.values() for row in rows for name in row}
  return sorted(name for name in every if name.startswith("zero_ratio/layer_"))


def _layer_picture(stages: dict[str, list[Row]]) -> Picture:
  figure, (axes,) = style.new_figure()
  names = _layer_names(stages)
  colors = style.DEPTH
  for place, name in enumerate(names):
    color = colors(place / max(len(names) - 1, 1))
    for x, y in _series(stages, name).values():
      axes.plot(x, [100 * v for v in y], color=color, linewidth=1.1 if len(names) > 8 else 1.6)
  _mark_stages(axes, stages)
  axes.set_ylabel("picks skipped, r_ZE (%)")
  scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, len(names) - 1), colors)
  bar = axes.figure.colorbar(scale, ax=axes, pad=0.02, aspect=30)
  bar.outline.set_visible(False)
  bar.set_label("MoE layer")
  bar.set_ticks(sorted({0, (len(names) - 1) // 2, len(names) - 1}))
  final = [rows[-1][n] for rows in list(stages.values())[-1:] for n in names if n in rows[-1]]
  span = f" At the end they lie between {percent(min(final))} and {percent(max(final))}." if final else ""
  return Picture(
    "training-layers", "Training: layer by layer", "r_ZE of every MoE layer." + span, figure, _csv(stages, names)
  )
