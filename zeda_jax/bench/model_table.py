"""Results of `zeda bench model` as a terminal's table, Markdown and CSV."""

import csv
import io
import pathlib
from typing import NamedTuple

import rich.box
import rich.console
import rich.table

from zeda_jax.bench.model_options import PaperCell
from zeda_jax.bench.table import markdown_table, plain, quantity, write_texts
from zeda_jax.bench.timing import Timing

GOAL = 0.9  # of the theoretical speed-up
LEGEND = (
  "times: median / minimum, of one prefill or one decode step; theory: FLOPs of the static over those of the dynamic "
  "layer at the measured r_ZE (paper, Appendix D: attention, router and experts; no head); paper: Qwen3-30B-A3B on one "
  "H200 with SGLang at r_ZE 0.5, with the theory there"
)
_HEADER = (
  "stage",
  "tokens",
  "static",
  "dynamic",
  "r_ZE",
  "speed-up",
  "theory",
  "measured ÷ theory",
  "paper: theory",
  "paper: measured",
  "paper: measured ÷ theory",
)


class ModelRow(NamedTuple):
  """One stage at one length; seconds are those of one prefill, or of one decode step of all sequences.

  Attributes:
    zero_ratio: the share of zero picks that was measured.
    theory: speed-up by FLOPs at that share.
    paper: the paper's speed-ups for this cell, where it has one.
  """

  stage: str
  length: int
  zero_ratio: float
  static: Timing
  dynamic: Timing
  theory: float
  paper: PaperCell | None = None

  @property
  def speedup(self) -> float:
    return self.static.median / self.dynamic.median

  @property
  def of_theory(self) -> float:
    return self.speedup / self.theory


class ModelReport(NamedTuple):
  """All that is printed and written."""

  title: str
  lines: tuple[str, ...]
  rows: tuple[ModelRow, ...]


def cells(row: ModelRow) -> list[str]:
  """The texts of one row."""
  time = lambda t: f"{quantity(t.median, 's')} / {quantity(t.minimum, 's')}"
  measured = [f"{row.zero_ratio:.3f}", f"{row.speedup:.3f}", f"{row.theory:.3f}", f"{row.of_theory:.2f}"]
  paper = ["", "", ""]
  if row.paper is not None:
    theory, speedup = row.paper
    paper = [f"{theory:.3f}", f"{speedup:.3f}", f"{speedup / theory:.2f}"]
  return [row.stage, str(row.length), time(row.static), time(row.dynamic), *measured, *paper]


def summary(report: ModelReport) -> str:
  """How many cells reach the goal and the paper's measurement, in a sentence."""
  rows = report.rows
  reached = sum(row.of_theory >= GOAL for row in rows)
  text = f"{reached} of {len(rows)} cells reach {GOAL:g} of the theoretical speed-up"
  known = [row for row in rows if row.paper is not None]
  if known:
    above = sum(row.speedup > row.paper.measured for row in known if row.paper is not None)
    text += f"; {above} of {len(known)} lie above the paper's measured speed-up"
  return text


def show(report: ModelReport, console: rich.console.Console) -> None:
  if not console.is_terminal:  # a file or a pipe has no width to fit
    console = rich.console.Console(file=console.file, width=200)
  table = rich.table.Table(title=report.title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for name in _HEADER:
    table.add_column(name, justify="left" if name == "stage" else "right")
  for row in report.rows:
    table.add_row(*cells(row))
  console.print(table)
  for text in (summary(report), LEGEND, *report.lines):
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def markdown(report: ModelReport) -> str:
  table = markdown_table(_HEADER, [cells(row) for row in report.rows])
  return "\n\n".join([f"# {report.title}", *report.lines, LEGEND, table, summary(report)]) + "\n"


def comma_separated(report: ModelReport) -> str:
  """One line per row, in seconds."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  times = [f"{kind}_{which}" for kind in ("static", "dynamic") for which in Timing._fields]
  writer.writerow(["stage", "length", "zero_ratio", *times, "speedup", "theory", "paper_theory", "paper_measured"])
  for row in report.rows:
    values = [row.stage, row.length, row.zero_ratio, *row.static, *row.dynamic, row.speedup, row.theory]
    writer.writerow([plain(value) for value in (*values, *(row.paper or ("", "")))])
  return out.getvalue()


def write(report: ModelReport, directory: str | pathlib.Path, name: str, overwrite: bool = False) -> list[pathlib.Path]:
  """Writes NAME.csv and NAME.md; returns their paths."""
  return write_texts((comma_separated(report), markdown(report)), directory, name, overwrite)
