"""A figure of the report with what belongs to it: its title, what it says, and its numbers."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Picture:
  """One figure.

  Attributes:
    name: of its files, NAME.png and NAME.csv.
    title: a few words.
    caption: what is to be seen, in plain words, with the numbers.
    figure: drawn with report.style.
    rows: the numbers drawn, for the CSV.
    wide: takes the whole width of the page.
  """

  name: str
  title: str
  caption: str
  figure: Figure
  rows: Sequence[Mapping[str, Any]]
  wide: bool = False


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
  """CSV of rows with the columns of all of them, in order of appearance."""
  columns = list(dict.fromkeys(name for row in rows for name in row))
  out = io.StringIO(newline="")
  writer = csv.DictWriter(out, columns, lineterminator="\n", restval="")
  writer.writeheader()
  writer.writerows([{name: _cell(value) for name, value in row.items()} for row in rows])
  return out.getvalue().encode()


def _cell(value: Any) -> Any:
  return f"{value:.9g}" if isinstance(value, float) else value


def percent(value: float, digits: int = 1) -> str:
  """A share in percent, kept on one line."""
  return f"{100 * value:.{digits}f}\N{NARROW NO-BREAK SPACE}%"


def minus(text: str) -> str:
  """Numbers with a typographic minus."""
  return text.replace("-", "\N{MINUS SIGN}")


def power_of_ten(exponent: int) -> str:
  """0.01 .. 100 as they are, others as 10 to a power."""
  if -3 < exponent < 3:
    return f"{10.0**exponent:g}"
  return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
