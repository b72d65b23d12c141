"""The demo's table as a picture: accuracy and skipped expert work of every row."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_TRAINED, _UNTRAINED, _TEACHER = "#1f6f8b", "#c8553d", "#333333"


def _color(name: str, label: str) -> str:
  return _TEACHER if name == "teacher" else _UNTRAINED if "untrained" in label else _TRAINED


def draw(measured: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str], file: pathlib.Path) -> None:
  """Writes a PNG with one line per row: accuracy with its standard error, and the share of expert work skipped.

  Args:
    measured: results by name, with "average", "standard_error" and "skipped_response" as fractions.
    labels: what each row is called; a label with "untrained" is drawn as such.
    file: of the picture.
  """
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.42 * len(measured) + 1.2), dpi=150, sharey=True)
  for line, (name, row) in enumerate(measured.items()):
    color, accuracy = _color(name, labels[name]), 100 * row["average"]
    left.errorbar(accuracy, line, xerr=100 * row["standard_error"], fmt="o", color=color, capsize=3)
    left.annotate(f"{accuracy:.2f}", (accuracy, line), (0, 7), textcoords="offset points", ha="center", fontsize=7)
    skipped = 100 * row["skipped_response"]
    right.barh(line, skipped, height=0.55, color=color)
    right.annotate(f"{skipped:.0f} %", (skipped, line), (4, 0), textcoords="offset points", va="center", fontsize=8)
  if "teacher" in measured:
    level = 100 * measured["teacher"]["average"]
    left.axvline(level, color=_TEACHER, linewidth=0.8, linestyle=":")
    left.axvspan(level - 1, level, color=_TRAINED, alpha=0.1, label="within one point of the teacher")
    left.legend(loc="lower left", frameon=False, fontsize=8)
  left.set_yticks(range(len(measured)), [labels[name] for name in measured])
  left.invert_yaxis()
  left.margins(y=0.08)
  left.set_xlabel("accuracy, mean of three families (%)")
  right.set_xlabel("expert work skipped on response tokens (%)")
  right.set_xlim(0, 100)
  for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
  figure.tight_layout()
  figure.savefig(file)
  plt.close(figure)
