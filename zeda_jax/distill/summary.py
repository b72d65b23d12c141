"""What `zeda adapt` tells its user: the plan before, progress meanwhile, the table after."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import ml_collections
import rich.box
import rich.console
import rich.progress
import rich.table

from zeda_jax.config import ModelConfig
from zeda_jax.data.jsonl import atomic_writer
from zeda_jax.sharding import Sharding
from zeda_jax.zero_experts import target_ratio

LABELS = {"teacher": "teacher", "injected": "injected, untrained", "sft": "SFT", "student": "student (exported)"}


def describe(
  console: rich.console.Console,
  config: ml_collections.ConfigDict,
  model: ModelConfig,
  num_train: int,
  num_held_out: int,
  sharding: Sharding | None = None,
) -> None:
  """Says what will be done, before it is done; on which mesh, where there are several devices."""
  zero = config.student.num_zero_experts
  zero = model.num_experts // 2 if zero is None else zero
  target = target_ratio(model.num_experts, zero, config.sft.weight) if zero else 0.0
  lines = [
    f"teacher   {config.teacher}: {model.num_layers} layers, top {model.num_experts_per_tok} of {model.num_experts}",
    f"student   + {zero} zero experts per MoE layer, trains {config.sft.trainable}",
    f"data      {num_train} prompts to learn from, {num_held_out} held out",
    f"SFT       {config.sft.epochs} epoch(s), {config.sft.loss}, w={config.sft.weight:g} (target r_ZE {target:.2f})",
    f"OPD       {config.opd.steps} steps, {config.opd.loss}",
    f"output    {config.workdir}",
  ]
  if sharding is not None:
    sizes = " x ".join(f"{name}={size}" for name, size in sharding.mesh.shape.items())
    kind = sharding.mesh.devices.flat[0].device_kind
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    lines.append(f"mesh      {sizes}: {sharding.num_devices} devices ({kind}){processes}")
  for line in lines:
    console.print(line, highlight=False, soft_wrap=True)


class Show(Protocol):
  """(done, total, what else there is to say)"""

  def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


@contextlib.contextmanager
def progress(console: rich.console.Console, label: str) -> Iterator[Show]:
  """A progress bar on a terminal, at most a line every ten seconds elsewhere; yields what takes the news."""
  if console.is_terminal:
    columns = *rich.progress.Progress.get_default_columns(), rich.progress.TextColumn("{task.fields[note]}")
    with rich.progress.Progress(*columns, console=console) as bar:
      task = bar.add_task(label, total=None, note="")
      yield lambda done, total, note="", /: bar.update(task, completed=done, total=total, note=note)
    return
  printed = time.monotonic()

  def show(done: int, total: int, note: str = "", /) -> None:
    nonlocal printed
    if done == total or time.monotonic() - printed > 10:
      printed = time.monotonic()
      console.print(f"{label} {done}/{total}{note and ', ' + note}", highlight=False)

  yield show


def results(workdir: pathlib.Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
  """The measured results by name, in the given order; without those that are not there."""
  found = {name: workdir / "evaluate" / f"{name}.json" for name in names}
  return {name: json.loads(file.read_text()) for name, file in found.items() if file.is_file()}


def _cells(label: str, row: Mapping[str, Any], families: list[str], distances: bool) -> list[str]:
  values = [row["accuracy"].get(name) for name in families]
  cells = [label, *("" if v is None else f"{100 * v:.2f}" for v in values)]
  if families:
    cells.append(f"{100 * row['average']:.2f} ± {100 * row['standard_error']:.2f}")
  if distances:
    distance = row["distance"].get("forward_kl", math.nan)
    cells.append(f"{distance:.4f}")
  cells += [f"{row['skipped']:.3f}", f"{row['skipped_response']:.3f}"]
  return [*cells, f"{100 * row['expert_flops_left']:.0f} %", f"{row['seconds']:.1f}"]


def table_cells(
  measured: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
  """Header and rows of the summary table; accuracies in percent, KL(teacher || student) in nats per token."""
  families = sorted({name for row in measured.values() for name in row["accuracy"]})
  header = ["model", *families, *(["average"] if families else [])]
  distances = any(row["distance"] for row in measured.values())
  header += ["KL"] * distances + ["r_ZE all", "r_ZE resp.", "expert FLOPs", "seconds"]
  return header, [_cells(labels.get(name, name), row, families, distances) for name, row in measured.items()]


def markdown(header: list[str], body: list[list[str]]) -> str:
  lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
  return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)]) + "\n"


def print_table(console: rich.console.Console, title: str, header: list[str], body: list[list[str]]) -> None:
  table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
  for i, name in enumerate(header):
    # Two short lines of header leave room on a terminal; only the names may wrap.
    heading = name.replace(" ", "\n") if i else name
    table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
  for row in body:
    table.add_row(*row)
  if not console.is_terminal:  # a file or a pipe has no width to fit
    console = rich.console.Console(file=console.file, width=200, quiet=console.quiet)
  console.print(table)


def write(
  console: rich.console.Console, workdir: pathlib.Path, labels: Mapping[str, str], title: str = "held-out prompts"
) -> None:
  """Prints the table of the labelled results, writes it to summary.md and says where everything is."""
  header, body = table_cells(results(workdir, labels), labels)
  if body:
    print_table(console, title, header, body)
    with atomic_writer(workdir / "summary.md", overwrite=True) as out:
      out.write(markdown(header, body).encode())
  where = {"student": "the dynamic checkpoint", "summary.md": "this table", "sft": "metrics of SFT", "opd": "of OPD"}
  for name, what in where.items():
    if (workdir / name).exists():
      console.print(f"{what}: {workdir / name}", highlight=False, soft_wrap=True)
