"""The goals: which they are, and that they are printed beside the measured ratios, whatever those are."""

import pytest

from tests.bench.tiny import SCALE, hasty
from zeda_jax.bench.check import _SHAPES, check
from zeda_jax.bench.timing import Timing


def test_kernel():
  with hasty():
    report = check("kernel", repeats=1, scale=SCALE)
  assert [goal.goal for goal in report.goals] == ["≤ 1.6", "≥ 30", "≤ 0.58", "≤ 1.8"]
  full, half, both = report.rows
  assert (full.work, half.rows * 2, both.work) == ("gate_up forward", full.rows, "gate_up forward + backward")
  ratio = lambda above, below: above.minimum / below.minimum
  assert [goal.measured for goal in report.goals] == [
    ratio(full.cells["tiled"], full.cells["dense"]),
    ratio(full.cells["ragged_dot"], full.cells["tiled"]),
    ratio(half.cells["tiled"], full.cells["tiled"]),
    ratio(both.cells["tiled"], both.cells["dense"]),
  ]
  assert "M=4096 K=N=512 G=32 1024 → 5 tokens, 32 → 8 experts" in report.lines[1]


def test_layer(monkeypatch):
  pytest.importorskip("torch")
  small = _SHAPES["layer"]._replace(hidden=32, inner=16)
  monkeypatch.setitem(_SHAPES, "layer", small)
  with hasty():
    report = check("layer", repeats=1, scale=SCALE)
  full, half = report.rows
  assert isinstance(full.cells["tiled"], Timing) and isinstance(half.cells["tiled"], Timing)
  torch = min(full.cells[name].minimum for name in ("torch-eager", "torch-grouped_mm"))
  assert [(goal.goal, goal.measured) for goal in report.goals] == [
    ("≤ 0.62", half.cells["tiled"].minimum / full.cells["tiled"].minimum),
    ("≥ 1.4", torch / full.cells["tiled"].minimum),
  ]


def test_sizes():
  kernel, layer = _SHAPES["kernel"], _SHAPES["layer"]
  assert (kernel.picks, kernel.hidden, 2 * kernel.inner, kernel.experts) == (4096, 512, 512, 32)
  assert layer[1:] == (4096, 2048, 768, 128, 8)
