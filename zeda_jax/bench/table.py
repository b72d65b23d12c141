"""Results as rows, and rows as a terminal's table, Markdown and CSV."""

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import rich.box
import rich.console
import rich.table

from zeda_jax.bench.timing import Timing
from zeda_jax.data.jsonl import atomic_writer
from zeda_jax.errors import ZedaError

DENSE = "dense"
LEGEND = (
  "cells: median / minimum time; share of the dense product's rate; r0: time at r_ZE 0 in the same column (ratios "
  "are of minima); FLOP/s and bytes/s of what must be done: live rows, and weights of the experts that have any"
)

_GOAL_HEADER = ("ratio of times", "goal", "measured")


class Row(NamedTuple):
  """One piece of work and what each column made of it.

  Attributes:
    shape: its name.
    work: "gate_up forward", "layer forward + backward" and so on.
    zero_ratio: share of zero picks there really is.
    rows: live rows.
    touched: experts that have rows.
    busiest: rows of the busiest expert relative to the mean.
    flops: of the work, a multiply-add being 2.
    bytes: read and written, each array once.
    dense_bytes: the same for the dense product, which reads a single matrix.
    roofline: seconds, max(FLOPs / dense rate, bytes of touched weights / copy rate).
    bound: what decides the roofline, "FLOPs" or "weights".
    cells: column -> time, or why there is none.
  """

  shape: str
  tokens: int
  work: str
  zero_ratio: float
  rows: int
  touched: int
  busiest: float
  flops: float
  bytes: float
  dense_bytes: float
  roofline: float
  bound: str
  cells: dict[str, Timing | str]


class Figures(NamedTuple):
  """What a cell says; seconds, ratios and rates per second. `relative` is None where ratio 0 was not measured."""

  median: float
  minimum: float
  of_dense: float
  flops_rate: float
  bytes_rate: float
  relative: float | None


class Goal(NamedTuple):
  """A ratio of times with its goal, e.g. "≤ 1.6", and what was measured, or why it was not."""

  what: str
  goal: str
  measured: float | str

  @property
  def texts(self) -> list[str]:
    return [self.what, self.goal, self.measured if isinstance(self.measured, str) else f"{self.measured:.3g}"]


class Report(NamedTuple):
  """All that is printed and written: lines about the run, the table's columns and rows, goals where there are any."""

  title: str
  lines: tuple[str, ...]
  columns: tuple[str, ...]
  rows: tuple[Row, ...]
  goals: tuple[Goal, ...] = ()


def figures(report: Report, row: Row, column: str) -> Figures | None:
  """None where the column was not measured."""
  timing = row.cells.get(column)
  if not isinstance(timing, Timing):
    return None
  dense, full = row.cells[DENSE], _at_zero(report, row, column)
  assert isinstance(dense, Timing)  # the dense product runs everywhere
  seconds = timing.minimum
  num_bytes = row.dense_bytes if column == DENSE else row.bytes
  relative = None if full is None else seconds / full.minimum
  return Figures(timing.median, seconds, dense.minimum / seconds, row.flops / seconds, num_bytes / seconds, relative)


def _at_zero(report: Report, row: Row, column: str) -> Timing | None:
  for other in report.rows:
    timing = other.cells.get(column)
    if (other.shape, other.work, other.zero_ratio) == (row.shape, row.work, 0.0) and isinstance(timing, Timing):
      return timing
  return None


def quantity(value: float, unit: str) -> str:
  """Three digits and a prefix: 1.23 ms, 456 GB/s."""
  for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ")):
    if value >= 0.9995 * factor:
      return (
        f"{value / factor:.3g} {prefix}{unit}" if value < 999.5 * factor else f"{value / factor:.0f} {prefix}{unit}"
      )
  return f"{value * 1e9:.3g} n{unit}"


def cell(report: Report, row: Row, column: str) -> list[str]:
  """The lines of one cell."""
  found = figures(report, row, column)
  if found is None:
    return [str(row.cells.get(column, ""))]
  shares = [] if column == DENSE else [f"{100 * found.of_dense:.0f} % of dense"]
  if found.relative is not None and row.zero_ratio > 0:
    shares.append(f"{found.relative:.2f} × r0")
  rates = f"{quantity(found.flops_rate, 'FLOP/s')}, {quantity(found.bytes_rate, 'B/s')}"
  times = f"{quantity(found.median, 's')} / {quantity(found.minimum, 's')}"
  return [times, *([", ".join(shares)] if shares else []), rates]


def cells(report: Report) -> tuple[list[str], list[list[list[str]]]]:
  """(header, rows of cells of lines)."""
  header = ["work", "r_ZE", "rows", "roofline", *report.columns]
  body = []
  for row in report.rows:
    rows = [f"{row.rows} live", f"{row.touched} experts", f"busiest {row.busiest:.1f} × mean"]
    roof = [quantity(row.roofline, "s"), row.bound]
    first = [row.shape, f"{row.tokens} tokens", row.work]
    body.append([first, [f"{row.zero_ratio:.3f}"], rows, roof, *(cell(report, row, name) for name in report.columns)])
  return header, body


def show(report: Report, console: rich.console.Console) -> None:
  if not console.is_terminal:  # a file or a pipe has no width to fit
    console = rich.console.Console(file=console.file, width=200)
  table = rich.table.Table(
    title=report.title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_lines=True
  )
  header, body = cells(report)
  for i, name in enumerate(header):
    table.add_column(name, justify="left" if i in (0, 2) else "right")
  for line in body:
    table.add_row(*("\n".join(lines) for lines in line))
  console.print(table)
  for text in (LEGEND, *report.lines):
    console.print(text, highlight=False, markup=False, soft_wrap=True)
  if report.goals:
    goals = rich.table.Table(*_GOAL_HEADER, box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for goal in report.goals:
      goals.add_row(*goal.texts)
    console.print(goals)


def markdown(report: Report) -> str:
  header, body = cells(report)
  parts = [f"# {report.title}", *report.lines, LEGEND]
  parts.append(markdown_table(header, [["<br>".join(lines) for lines in row] for row in body]))
  if report.goals:
    parts.append(markdown_table(_GOAL_HEADER, [goal.texts for goal in report.goals]))
  return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], body: list[list[str]]) -> str:
  """A table of Markdown."""
  lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
  return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def comma_separated(report: Report) -> str:
  """One line per cell, in seconds and rates per second; `note` says why a time is missing."""
  fields = [name for name in Row._fields if name not in ("cells", "dense_bytes")]
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow([*fields, "column", *Figures._fields, "note"])
  for row in report.rows:
    for column in report.columns:
      found = figures(report, row, column)
      values = row._replace(bytes=row.dense_bytes) if column == DENSE else row
      numbers = ["" if x is None else f"{x:.6g}" for x in (found or [None] * len(Figures._fields))]
      note = "" if found else row.cells.get(column, "")
      writer.writerow([*(plain(getattr(values, name)) for name in fields), column, *numbers, note])
  return out.getvalue()


def plain(value: object) -> object:
  """A value as CSV has it."""
  return f"{value:.6g}" if isinstance(value, float) else value


def targets(directory: str | pathlib.Path, name: str, overwrite: bool) -> list[pathlib.Path]:
  """The files that `write` makes; asked for before measuring, so that minutes are not spent on what can't be kept.

  Raises:
    ZedaError: one exists and may not be overwritten.
  """
  files = [pathlib.Path(directory) / f"{name}.{ending}" for ending in ("csv", "md")]
  for file in files:
    if file.exists() and not overwrite:
      raise ZedaError(f"{file} already exists: choose another --output or give --overwrite.")
  return files


def write(report: Report, directory: str | pathlib.Path, name: str, overwrite: bool = False) -> list[pathlib.Path]:
  """Writes NAME.csv and NAME.md; returns their paths."""
  return write_texts((comma_separated(report), markdown(report)), directory, name, overwrite)


def write_texts(
  texts: tuple[str, str], directory: str | pathlib.Path, name: str, overwrite: bool
) -> list[pathlib.Path]:
  """Writes NAME.csv and NAME.md with these texts; returns their paths."""
  files = targets(directory, name, overwrite)
  pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
  for file, text in zip(files, texts, strict=True):
    with atomic_writer(file, overwrite) as stream:
      stream.write(text.encode())
  return files
