"""Results as tables, on a terminal and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from zeda_jax.evaluate.comparison import Comparison
from zeda_jax.evaluate.tasks import GROUPS, TASKS

Table = tuple[list[str], list[list[str]]]  # header, rows


def results_table(results: Mapping[str, Any]) -> Table:
  """Scores in percent with their standard errors, lengths in tokens, r_ZE per response, response token and token."""
  header = [
    "task",
    "problems",
    "metric",
    "score",
    "pass@n",
    "tokens",
    "cut off",
    "r_ZE resp.",
    "r_ZE token",
    "r_ZE all",
  ]
  rows = []
  failed = bool(results["average"]["num_failed"])
  for task in results["tasks"].values():
    n, ratio = task["num_samples"], task["zero_ratio"]
    row = [task["title"], str(task["num_problems"]), f"avg@{n}", _score(task), _percent(task["pass_at"][str(n)])]
    row += [_number(task["length"], ".0f"), _percent(task["truncated"])]
    row += [_number(ratio[name], ".3f") for name in ("response", "token", "all")]
    rows.append([*row, str(task["num_failed"])] if failed else row)
  average = results["average"]
  if len(rows) > 1:
    row = ["average", "", "", _score(average), "", _number(average["length"], ".0f"), ""]
    row += [_number(average["zero_ratio"][name], ".3f") for name in ("response", "token", "all")]
    rows.append([*row, str(average["num_failed"])] if failed else row)
  return ([*header, "not graded"] if failed else header), rows


def comparison_table(comparisons: Mapping[str, Comparison], names: Sequence[str]) -> Table:
  """Both scores, the difference with its 95 % interval, and the p-value."""
  header = ["task", "problems", *names, "difference", "95 % interval", "p", "better", "worse"]
  rows = []
  for task, c in comparisons.items():
    interval = "" if c.low is None or c.high is None else f"{100 * c.low:+.2f} … {100 * c.high:+.2f}"
    title = TASKS[task].title if task in TASKS else task
    row = [title, str(c.num_problems), f"{100 * c.mean_a:.2f}", f"{100 * c.mean_b:.2f}", f"{100 * c.difference:+.2f}"]
    rows.append([*row, interval, f"{c.p_value:.4f}", str(c.wins), str(c.losses)])
  return header, rows


def tasks_table() -> Table:
  header = ["task", "title", "samples", "grader", "source", "groups"]
  groups = {name: [group for group, names in GROUPS.items() if name in names] for name in TASKS}
  return header, [
    [t.name, t.title, str(t.samples), t.grader, t.source or "", ", ".join(groups[t.name])] for t in TASKS.values()
  ]


def show(console: rich.console.Console, title: str, table: Table) -> None:
  header, rows = table
  drawn = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
  for place, name in enumerate(header):
    drawn.add_column(name, justify="right" if place else "left", no_wrap=place > 0)
  for row in rows:
    drawn.add_row(*row)
  if not console.is_terminal:  # a file or a pipe has no width to fit
    console = rich.console.Console(file=console.file, width=200)
  console.print(drawn)


def markdown(table: Table) -> str:
  header, rows = table
  lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
  return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _number(value: float | None, form: str) -> str:
  return "" if value is None else format(value, form)


def _percent(value: float | None) -> str:
  return "" if value is None else f"{100 * value:.2f}"


def _score(task: Mapping[str, Any]) -> str:
  error = task["standard_error"]
  return _percent(task["mean"]) + ("" if error is None else f" ± {100 * error:.2f}")
