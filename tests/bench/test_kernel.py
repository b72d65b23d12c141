"""The kernel's table: every row and column, counts by hand, and what is missing by name."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from tests.bench.tiny import tiny_bench
from zeda_jax.bench import kernel, peers
from zeda_jax.bench.columns import backend_names
from zeda_jax.bench.table import figures
from zeda_jax.bench.timing import Timing
from zeda_jax.errors import ZedaError
from zeda_jax.ops.grouped_matmul import grouped_matmul

WORK = ["gate_up forward", "gate_up forward + backward", "down forward", "down forward + backward"]


@pytest.fixture(scope="module")
def report():
  return tiny_bench("kernel", backward=True)


def test_rows_and_columns(report):
  expected = ["dense", *backend_names("cpu"), "jax.lax.ragged_dot"]
  expected += ["tokamax"] if not peers.missing("tokamax", "cpu") else []
  assert list(report.columns) == expected
  assert [(r.shape, r.work, r.zero_ratio) for r in report.rows] == [("demo", w, z) for w in WORK for z in (0, 0.5)]
  assert all(list(row.cells) == expected for row in report.rows)
  assert all(isinstance(row.cells[name], Timing) for row in report.rows for name in expected if name != "tokamax")


def test_what_is_said(report):
  text = "\n".join(report.lines)
  for part in (" threads, jax ", "float32", "dense product", "copy"):
    assert part in text
  assert "scaled by 0.005: demo 4096 → 20 tokens, 16 → 8 experts" in text
  assert "not measured: megablox runs on tpu only" in text


def test_counts_by_hand(report):
  # 20 tokens, top 4 of 8 experts, H = 96, F = 48: gate_up is [8, 96, 96], down [8, 48, 96]
  row = next(r for r in report.rows if r.work == "gate_up forward" and r.zero_ratio == 0.5)
  assert (row.rows, row.flops) == (40, 2 * 40 * 96 * 96)
  assert row.bytes == 4 * (40 * 96 + 40 * 96 + row.touched * 96 * 96)
  assert row.dense_bytes == 4 * (40 * 96 + 40 * 96 + 96 * 96)
  row = next(r for r in report.rows if r.work == "down forward + backward" and r.zero_ratio == 0)
  assert row.touched == 8
  forward = 80 * 48 + 8 * 48 * 96 + 80 * 96  # lhs, weights, out
  of_lhs = 80 * 96 + 8 * 48 * 96 + 80 * 48  # grad, weights, gradient of lhs
  of_weights = 80 * 48 + 80 * 96 + 8 * 48 * 96  # lhs, grad, gradient of the weights
  assert (row.rows, row.flops) == (80, 3 * 2 * 80 * 48 * 96)
  assert row.bytes == 4 * (forward + of_lhs + of_weights)


def test_figures_fit_together(report):
  for row in report.rows:
    dense = row.cells["dense"]
    full = next(r for r in report.rows if (r.work, r.zero_ratio) == (row.work, 0.0))
    for column in report.columns:
      timing, found = row.cells[column], figures(report, row, column)
      assert 0 < timing.minimum <= timing.median
      assert found.of_dense == pytest.approx(dense.minimum / timing.minimum)
      assert found.flops_rate * timing.minimum == pytest.approx(row.flops)
      assert found.bytes_rate * timing.minimum == pytest.approx(row.dense_bytes if column == "dense" else row.bytes)
      assert found.relative == pytest.approx(timing.minimum / full.cells[column].minimum)


def test_skipped_columns_say_why():
  report = tiny_bench("kernel", ratios=(0.0,), columns=("tiled", "reference", "megablox"), max_seconds=1e-9)
  for row in report.rows:
    assert isinstance(row.cells["dense"], Timing)
    assert row.cells["reference"].startswith("skipped: would take about ")
    assert row.cells["megablox"] == "runs on tpu only"
  assert report.columns == ("dense", "tiled", "reference", "megablox")


def test_unknown_column():
  with pytest.raises(ZedaError, match=r"backend 'torch-eager' is unknown; .*jax\.lax\.ragged_dot"):
    tiny_bench("kernel", columns=("torch-eager",))


def test_no_memory(monkeypatch):
  monkeypatch.setattr("zeda_jax.bench.run.free_bytes", lambda: 1e3)
  with pytest.raises(ZedaError, match=r"no shape could be measured .*demo: skipped: needs"):
    tiny_bench("kernel")


def test_backward_is_the_gradient():
  lhs, rhs = np.ones((3, 2), np.float32), np.full((2, 2, 4), 2, np.float32)
  sizes, grad = jnp.array([1, 2]), np.ones((3, 4), np.float32)
  out, of_lhs, of_rhs = kernel.differentiated(grouped_matmul)(lhs, rhs, sizes, grad)
  np.testing.assert_array_equal(out, np.full((3, 4), 4))
  np.testing.assert_array_equal(of_lhs, np.full((3, 2), 8))
  np.testing.assert_array_equal(of_rhs, np.stack([np.full((2, 4), 1), np.full((2, 4), 2)]))


def test_roofline(report):
  for row in report.rows:
    assert row.roofline > 0 and math.isfinite(row.roofline) and row.bound in ("FLOPs", "weights")


def test_megablox_takes_multiples_of_its_tiles():
  with pytest.raises(ZedaError, match="multiple of 128 rows, there are 32"):
    peers.megablox(np.ones((32, 128)), np.ones((2, 128, 128)), np.array([16, 16]))
  assert peers.missing("megablox", "tpu") == ""
