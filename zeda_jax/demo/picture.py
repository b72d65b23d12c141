"""The demo's table as a picture: accuracy against the share of expert work that is skipped."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

_TRAINED, _UNTRAINED, _TEACHER = "#1f6f8b", "#c8553d", "#333333"


def draw(measured: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str], file: pathlib.Path) -> None:
  """Writes a PNG: one point per row with its standard error, x the share skipped on response tokens.

  Args:
    measured: results by name, with "average", "standard_error" (fractions) and "skipped_response".
    labels: what each row is called; a label with "untrained" is drawn as such.
    file: of the picture.
  """
  figure, axes = plt.subplots(figsize=(8, 5), dpi=150)
  points = []
  for name, row in measured.items():
    color = _TEACHER if name == "teacher" else _UNTRAINED if "untrained" in labels[name] else _TRAINED
    x, y, error = 100 * row["skipped_response"], 100 * row["average"], 100 * row["standard_error"]
    axes.errorbar(x, y, yerr=error, fmt="o", color=color, capsize=3, markersize=6)
    points.append((x, y, labels[name], color))
  _annotate(axes, points)
  teacher = measured.get("teacher")
  if teacher:
    level = 100 * teacher["average"]
    axes.axhline(level, color=_TEACHER, linewidth=0.8, linestyle=":")
    axes.axhspan(level - 1, level, color=_TRAINED, alpha=0.08, label="within one point of the teacher")
    axes.legend(loc="lower left", frameon=False)
  axes.set_xlabel("expert work skipped on response tokens (% of the teacher's picks)")
  axes.set_ylabel("accuracy, mean of three families (%)")
  axes.set_xlim(-4, 104)
  axes.spines[["top", "right"]].set_visible(False)
  figure.tight_layout()
  figure.savefig(file)
  plt.close(figure)


def _annotate(axes: Any, points: list[tuple[float, float, str, str]]) -> None:
  """Writes the names beside their points, moving them apart vertically where points lie close together."""
  low, high = axes.get_ylim()
  gap = (high - low) * 0.045
  taken: list[tuple[float, float]] = []
  for x, y, label, color in sorted(points, key=lambda p: -p[1]):
    left = x > 60
    height = y
    while any(abs(x - other_x) < 45 and abs(height - other_y) < gap for other_x, other_y in taken):
      height -= gap
    taken.append((x, height))
    axes.annotate(
      label,
      (x, y),
      xytext=(x - 2 if left else x + 2, height),
      ha="right" if left else "left",
      va="center",
      color=color,
      fontsize=8,
    )
