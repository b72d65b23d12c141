"""Numbers as text, and the files they are written to."""

import csv
import io

import pytest
import rich.console

from zeda_jax.bench.table import DENSE, Goal, Report, Row, comma_separated, markdown, quantity, show, targets, write
from zeda_jax.bench.timing import Timing
from zeda_jax.errors import ZedaError


def row(ratio, seconds):
  return Row(
    shape="small",
    tokens=10,
    work="gate_up forward",
    zero_ratio=ratio,
    rows=20,
    touched=3,
    busiest=1.5,
    flops=4000,
    bytes=800,
    dense_bytes=200,
    roofline=1e-3,
    bound="weights",
    cells={DENSE: Timing(2e-3, 1e-3), "tiled": Timing(seconds, seconds), "other": "skipped: would take about 9.0 s"},
  )


REPORT = Report("title", ("a line",), (DENSE, "tiled", "other"), (row(0.0, 4e-3), row(0.5, 2e-3)))


@pytest.mark.parametrize(
  ("value", "text"),
  [(0.0123, "12.3 ms"), (0.9996, "1 s"), (999.7, "1 ks"), (2.5e-6, "2.5 µs"), (3e-9, "3 ns"), (1.234e12, "1.23 Ts")],
)
def test_quantity(value, text):
  assert quantity(value, "s") == text


def test_csv():
  lines = list(csv.DictReader(io.StringIO(comma_separated(REPORT))))
  assert [line["column"] for line in lines] == [DENSE, "tiled", "other"] * 2
  half = lines[4]
  assert {key: float(half[key]) for key in ("median", "minimum", "of_dense", "relative", "flops_rate")} == {
    "median": 2e-3,
    "minimum": 2e-3,
    "of_dense": 0.5,
    "relative": 0.5,
    "flops_rate": 2e6,
  }
  assert (float(half["bytes_rate"]), float(lines[3]["bytes_rate"])) == (4e5, 2e5)
  assert (lines[5]["median"], lines[5]["note"]) == ("", "skipped: would take about 9.0 s")
  assert (half["shape"], half["zero_ratio"], half["bound"], half["note"]) == ("small", "0.5", "weights", "")


def test_terminal_and_markdown():
  out = io.StringIO()
  report = REPORT._replace(goals=(Goal("a / b", "≤ 1.6", 1.23456), Goal("c / d", "≥ 2", "is not installed")))
  show(report, rich.console.Console(file=out))
  for text in (out.getvalue(), markdown(report)):
    for part in (
      "title",
      "a line",
      "2 ms / 2 ms",
      "50 % of dense, 0.50 × r0",
      "would take about",
      "busiest 1.5 × mean",
    ):
      assert part in text
    for part in ("≤ 1.6", "1.23", "≥ 2", "is not installed", "weights"):
      assert part in text
  table = [line for line in markdown(report).splitlines() if line.startswith("| ")]
  assert len({line.count("|") for line in table[:3]}) == 1


def test_files_are_not_overwritten(tmp_path):
  files = write(REPORT, tmp_path / "new", "kernel")
  assert [file.name for file in files] == ["kernel.csv", "kernel.md"]
  before = [file.read_bytes() for file in files]
  changed = REPORT._replace(title="changed")
  with pytest.raises(ZedaError, match=r"kernel\.csv already exists: choose another --output or give --overwrite"):
    write(changed, tmp_path / "new", "kernel")
  assert [file.read_bytes() for file in files] == before
  files[0].unlink()
  with pytest.raises(ZedaError, match=r"kernel\.md already exists"):
    targets(tmp_path / "new", "kernel", overwrite=False)
  write(changed, tmp_path / "new", "kernel", overwrite=True)
  assert files[1].read_text().startswith("# changed")
