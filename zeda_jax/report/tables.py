"""The report's tables, as header and rows of text."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zeda_jax.distill import summary
from zeda_jax.errors import ZedaError
from zeda_jax.report.quality import DialPoint, Model
from zeda_jax.report.uncertainty import MEASURES, Line, signed


class Table(NamedTuple):
  """What a page shows; `marked` are the rows that stand out."""

  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  marked: Sequence[int] = ()

  def is_text(self, column: int) -> bool:
    """Whether a column holds words rather than numbers."""
    cells = [row[column] for row in self.rows if row[column]]
    return any(cell[0].isalpha() for cell in cells) if cells else False


def read_models(main: pathlib.Path) -> list[Model]:
  """The measured rows of a run: in the order of the demo's or the recipe's table, then the others by name."""
  from zeda_jax.demo.run import LABELS  # late: it imports the recipe

  folder = main / "evaluate"
  names = {file.stem for file in folder.glob("*.json")} if folder.is_dir() else set()
  is_demo = (main.parent / "data" / "held-out.jsonl").is_file() and main.name == "main"
  labels = LABELS if is_demo else summary.LABELS
  ordered = [n for n in labels if n in names] + sorted(names - labels.keys())
  models = []
  for name in ordered:
    row = read_json(folder / f"{name}.json")
    if isinstance(row, dict) and {"accuracy", "skipped_response"} <= row.keys():
      models.append(Model(name, labels.get(name, name), row))
  return models


def headline(models: Sequence[Model]) -> Table:
  """The table of the recipe's summary, with a number for each row of the figure."""
  measured = {m.name: m.row for m in models}
  header, rows = summary.table_cells(measured, {m.name: m.label for m in models})
  marked = [i for i, m in enumerate(models) if m.name == "student"]
  return Table(["", *header], [[str(i), *row] for i, row in enumerate(rows, start=1)], marked)


def dial_table(points: Sequence[DialPoint], labelled: bool) -> Table:
  header = ["zero_expert_bias", "r_ZE resp.", "r_ZE all", *(["accuracy"] if labelled else []), "KL to teacher"]
  rows = []
  for p in points:
    bias = f"{p.bias:g}".replace("-inf", "−∞").replace("-", "−")
    accuracy = [f"{100 * p.accuracy:.2f} ± {100 * p.standard_error:.2f}"] if labelled else []
    kl = "" if p.kl[0] != p.kl[0] else f"{p.kl[0]:.2g} [{p.kl[1]:.2g}, {p.kl[2]:.2g}]"
    rows.append([bias, f"{p.ratio:.3f}", f"{p.ratio_all:.3f}", *accuracy, kl])
  return Table(header, rows, [i for i, p in enumerate(points) if p.bias == 0])


def correlation_table(lines: Sequence[Line]) -> Table:
  header = ["r_ZE against", "among", "Spearman [95 %]", "sign", "Pearson [95 %]", "tokens", "texts"]
  rows = [
    [
      MEASURES[line.measure][0],
      line.among,
      signed(line.spearman),
      line.verdict,
      signed(line.pearson),
      f"{line.spearman.tokens:,}",
      f"{line.spearman.texts:,}",
    ]
    for line in lines
  ]
  return Table(header, rows, [i for i, line in enumerate(lines) if line.among == "all"])


def speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
  """The paper's Table 13 for this model."""
  measured = any("measured" in row for row in rows)
  header = ["tokens", "stage", "theory, r_ZE 0.5", "r_ZE here", "theory here"]
  header += ["measured at r_ZE", "theory there", "measured", "measured ÷ theory"] * measured
  table = []
  for row in sorted(rows, key=lambda r: (r["length"], r["stage"] != "prefill")):
    cells = [
      str(row["length"]),
      row["stage"],
      f"{row['theory_at_half']:.3f}",
      f"{row['r_ze']:.3f}",
      f"{row['theory']:.3f}",
    ]
    if measured and "measured" in row:
      theory, speed = row["theory_of_measured"], row["measured"]
      cells += [f"{row['measured_r_ze']:.3f}", f"{theory:.3f}", f"{speed:.3f}", f"{speed / theory:.2f}"]
    elif measured:
      cells += [""] * 4
    table.append(cells)
  return Table(header, table)


def evaluation_tables(workdir: pathlib.Path) -> list[tuple[str, Table]]:
  """Results of `zeda evaluate` below the workdir, in evaluate*/ and evaluations/*/: (whose, table) of each."""
  patterns = ("evaluate*/results.json", "evaluate*/*/results.json", "evaluations/*/results.json")
  files = sorted({file for pattern in patterns for file in workdir.glob(pattern)})
  return [(str(file.parent.relative_to(workdir)), _evaluation(read_json(file), file)) for file in files]


def _evaluation(results: Any, file: pathlib.Path) -> Table:
  header = ["task", "problems", "metric", "score", "pass@n", "tokens", "r_ZE resp.", "r_ZE token", "r_ZE all"]
  try:
    tasks = [(name, task) for name, task in results["tasks"].items()]
    rows = [
      [
        str(task.get("title", name)),
        str(task["num_problems"]),
        f"avg@{task['num_samples']}",
        _score(task),
        _number((task.get("pass_at") or {}).get(str(task["num_samples"])), 100, ".2f"),
        _number(task.get("length"), 1, ".0f"),
        *(_number((task.get("zero_ratio") or {}).get(of), 1, ".3f") for of in ("response", "token", "all")),
      ]
      for name, task in tasks
    ]
    average = results.get("average")
    if average and len(rows) > 1:
      ratios = [_number((average.get("zero_ratio") or {}).get(of), 1, ".3f") for of in ("response", "token", "all")]
      rows.append(["average", "", "", _score(average), "", _number(average.get("length"), 1, ".0f"), *ratios])
  except (AttributeError, KeyError, TypeError) as error:
    raise ZedaError(
      f"{file} is not a result of `zeda evaluate` ({error!r}): remove it, or run `zeda evaluate` again."
    ) from error
  return Table(header, rows, [len(rows) - 1] if len(rows) > len(tasks) else [])


def _score(task: Mapping[str, Any]) -> str:
  score, error = _number(task.get("mean"), 100, ".2f"), _number(task.get("standard_error"), 100, ".2f")
  return f"{score} ± {error}" if score and error else score


def _number(value: float | None, factor: float, form: str) -> str:
  return "" if value is None else format(factor * value, form)


def read_json(file: pathlib.Path) -> Any:
  """The value of a JSON file that a command of this package wrote."""
  try:
    return json.loads(file.read_text())
  except ValueError as error:
    raise ZedaError(f"{file} is not valid JSON ({error}): restore it, or remove it and measure again.") from error
