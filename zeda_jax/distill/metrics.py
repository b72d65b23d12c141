"""Training metrics: console, CSV, JSON lines and TensorBoard from one dictionary per step."""

import csv
import io
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
import tensorboardX

from zeda_jax.errors import ZedaError

# What the progress line shows, under which label and how; the files hold everything.
CONSOLE = {
  "loss": ("loss", "{:.4f}"),
  "zero_ratio": ("r_ZE", "{:.3f}"),
  "learning_rate": ("lr", "{:.2e}"),
  "grad_norm": ("grad", "{:.2f}"),
  "tokens_per_second": ("tok/s", "{:,.0f}"),
}


def flatten_metrics(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
  """Scalars by name: nested dictionaries join with "/", a vector `x` becomes x_00, x_01, ...

  So {"zero_ratio": {"layer": [L]}} and {"zero_ratio/layer": [L]} both give zero_ratio/layer_00 and so on.
  """
  flat: dict[str, float] = {}
  for name, value in metrics.items():
    if isinstance(value, Mapping):
      flat |= flatten_metrics(value, f"{prefix}{name}/")
      continue
    array = np.asarray(value)
    if array.ndim > 1:
      raise ValueError(f"metric {prefix}{name} has shape {array.shape}; expected a scalar or a vector.")
    convert = int if array.dtype.kind in "iub" else float
    if array.ndim == 0:
      flat[prefix + name] = convert(array)
    else:
      flat |= {f"{prefix}{name}_{i:02d}": convert(x) for i, x in enumerate(array)}
  return flat


class MetricWriter:
  """Writes `metrics.csv`, `metrics.jsonl` and `tensorboard/` in a directory, and a progress bar or plain lines.

  Every row is on disk when `write` returns, so that all rows up to a checkpoint survive a killed process. `start`
  drops the rows after the step it goes on from (and a half-written last line): each step is there once.

  Args:
    directory: of the files; None for the console alone.
    label: what the progress line starts with, "sft" say.
    console: rich console; the bar appears only if it is a terminal, else about ten plain lines in all.
    tensorboard: also write event files.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str] | None,
    label: str = "train",
    console: rich.console.Console | None = None,
    tensorboard: bool = True,
  ):
    self._primary = jax.process_index() == 0
    self._directory = pathlib.Path(directory) if directory is not None and self._primary else None
    self._label = label
    self._console = console or rich.console.Console()
    self._tensorboard = tensorboard
    self._columns: list[str] = []
    self._events: tensorboardX.SummaryWriter | None = None
    self._bar: rich.progress.Progress | None = None
    self._num_steps = self._step = self._start = 0

  def start(self, step: int, num_steps: int) -> None:
    """Opens everything to go on after `step` finished steps of `num_steps`; earlier rows stay."""
    self._num_steps, self._step, self._start = num_steps, step, step
    if self._directory is not None:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._columns = _keep_csv(self._directory / "metrics.csv", step)
      _keep_jsonl(self._directory / "metrics.jsonl", step)
      if self._tensorboard:
        # purge_step hides the events that a killed run wrote after the step it is resumed from.
        folder = str(self._directory / "tensorboard")
        self._events = tensorboardX.SummaryWriter(folder, purge_step=step + 1)
    if self._primary and self._console.is_terminal:
      count, left = rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn()
      columns = ("{task.description}", rich.progress.BarColumn(), count, "{task.fields[text]}", left)
      self._bar = rich.progress.Progress(*columns, console=self._console)
      self._bar.start()
      self._bar.add_task(self._label, total=num_steps, completed=step, text="")

  def write(self, step: int, metrics: Mapping[str, Any], seconds_left: float | None = None) -> None:
    """Adds the row of `step`, which is later than those before it.

    Raises:
      ZedaError: the files cannot be written.
    """
    if not self._primary:
      return
    row = flatten_metrics(metrics)
    if self._directory is not None:
      try:
        self._write_files(self._directory, step, row)
      except OSError as error:
        raise ZedaError(
          f"cannot write the metrics of step {step} in {self._directory} ({error.strerror or error}): mend that and "
          "run the same command again to go on from the last checkpoint."
        ) from error
    self._show(step, row, seconds_left)
    self._step = step

  def close(self) -> None:
    """Flushes and closes everything; the writer can be started again."""
    if self._events is not None:
      self._events.close()
      self._events = None
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  def _write_files(self, directory: pathlib.Path, step: int, row: Mapping[str, float]) -> None:
    new = [name for name in row if name not in self._columns]
    if new:
      self._columns += new
      _rewrite_csv(directory / "metrics.csv", self._columns)
    _append(directory / "metrics.csv", _csv_line([step, *(_text(row.get(name)) for name in self._columns)]))
    # JSON has no NaN: null.
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    _append(directory / "metrics.jsonl", json.dumps({"step": step, **finite}) + "\n")
    if self._events is not None:
      for name, value in row.items():
        self._events.add_scalar(name, value, step)

  def _show(self, step: int, row: Mapping[str, float], seconds_left: float | None) -> None:
    text = "  ".join(f"{label} {form.format(row[key])}" for key, (label, form) in CONSOLE.items() if key in row)
    if self._bar is not None:
      self._bar.update(self._bar.task_ids[0], completed=step, text=text)
      return
    every = max(self._num_steps // 10, 1)
    if step // every == self._step // every and self._step != self._start and step != self._num_steps:
      return
    left = "" if seconds_left is None else f"  {_duration(seconds_left)} left"
    line = f"{self._label} {step}/{self._num_steps}  {text}{left}"
    self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _append(path: pathlib.Path, line: str) -> None:
  # One write call a line: a kill leaves the whole line or none of it (on a full disk a part, which resuming cuts).
  with path.open("a", newline="") as file:
    file.write(line)


def _text(value: float | None) -> str:
  return "" if value is None else str(value) if isinstance(value, int) else f"{value:.9g}"


def _csv_line(cells: list[Any]) -> str:
  buffer = io.StringIO(newline="")
  csv.writer(buffer, lineterminator="\n").writerow(cells)
  return buffer.getvalue()


def _complete_lines(path: pathlib.Path) -> list[str]:
  text = path.read_text() if path.exists() else ""
  return text[: text.rfind("\n") + 1].splitlines()


def _replace(path: pathlib.Path, text: str) -> None:
  temporary = path.with_name(f".{path.name}.tmp")
  with temporary.open("w", newline="") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def _keep_csv(path: pathlib.Path, last_step: int) -> list[str]:
  """Drops the rows after `last_step` and broken lines; returns the metric columns."""
  rows = list(csv.reader(_complete_lines(path)))
  if not rows:
    path.unlink(missing_ok=True)  # at most a broken header
    return []
  width = len(rows[0])
  kept = [row for row in rows[1:] if len(row) == width and row[0].isdigit() and int(row[0]) <= last_step]
  _replace(path, "".join(map(_csv_line, [rows[0], *kept])))
  return rows[0][1:]


def _keep_jsonl(path: pathlib.Path, last_step: int) -> None:
  """Drops the rows after `last_step` and broken lines."""

  def keeps(line: str) -> bool:
    try:
      return json.loads(line)["step"] <= last_step
    except (ValueError, TypeError, KeyError):
      return False

  if path.exists():
    _replace(path, "".join(line + "\n" for line in _complete_lines(path) if keeps(line)))


def _rewrite_csv(path: pathlib.Path, columns: list[str]) -> None:
  """Gives the file a header of `columns`, of which its present header is a prefix; old rows get empty cells."""
  rows = list(csv.reader(_complete_lines(path)))[1:]
  padded = [row + [""] * (1 + len(columns) - len(row)) for row in rows]
  _replace(path, "".join(map(_csv_line, [["step", *columns], *padded])))


def _duration(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
