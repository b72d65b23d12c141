"""The layer's table, PyTorch's block beside it with the same weights, and the roofline by hand."""

import numpy as np
import pytest

from tests.bench.tiny import SCALE, tiny_bench
from zeda_jax.bench import torch_block
from zeda_jax.bench.columns import backend_names, make_row
from zeda_jax.bench.inputs import Picks, apply, make_layer
from zeda_jax.bench.layer import flops, num_bytes
from zeda_jax.bench.machine import Machine
from zeda_jax.bench.shapes import SHAPES, scaled
from zeda_jax.bench.timing import Timing

TINY = scaled(SHAPES["demo"], SCALE)  # 20 tokens, top 4 of 8 experts, H = 96, F = 48


@pytest.fixture(scope="module")
def report():
  pytest.importorskip("torch")
  return tiny_bench("layer", backward=True)


def test_rows_and_columns(report):
  backends = backend_names("cpu")
  assert report.columns == ("dense", *backends, "torch-eager", "torch-grouped_mm")
  assert [(r.work, r.zero_ratio) for r in report.rows] == [
    (work, ratio) for work in ("layer forward", "layer forward + backward") for ratio in (0, 0.5)
  ]
  for row in report.rows:
    assert all(isinstance(row.cells[name], Timing) for name in ("dense", *backends))
    for name in torch_block.TORCH:
      # timed, so its output was ours
      assert isinstance(row.cells[name], Timing) if row.zero_ratio == 0 else row.cells[name] == "has no zero experts"


def test_counts_by_hand(report):
  row = report.rows[1]
  assert (row.tokens, row.rows) == (20, 40)
  assert row.flops == 40 * (2 * 96 * 2 * 48 + 2 * 48 * 96)
  assert row.bytes == 4 * (row.touched * (96 * 2 * 48 + 48 * 96) + 20 * 96 + 20 * 96)
  assert row.dense_bytes == 4 * ((96 * 2 * 48 + 48 * 96) + 40 * 96 + 40 * 96)
  assert report.rows[3].flops == 3 * row.flops


def test_roofline_by_hand():
  shape = SHAPES["qwen3-30b-a3b/decode-32"]
  sizes = np.zeros(128, int)
  sizes[:100] = 1
  picks = Picks(0.0, 1 - 100 / 256, sizes)
  machine = Machine("cpu", "cpu", 2, dense_rate=1e11, copy_rate=1e10)
  weights = 4 * 100 * 3 * 2048 * 768
  counts = {
    "flops": flops(shape, picks.rows),
    "bytes": num_bytes(shape, picks.touched, 4),
    "dense_bytes": 0,
    "weight_bytes": weights,
  }
  row = make_row(shape, "layer forward", picks, machine, {}, times=1, **counts)
  assert (row.bound, row.roofline) == ("weights", pytest.approx(weights / 1e10))
  assert row.bytes == weights + 4 * 2 * 32 * 2048
  fast = machine._replace(copy_rate=1e15)
  row = make_row(shape, "layer forward", picks, fast, {}, times=3, **counts)
  assert (row.bound, row.roofline) == ("FLOPs", pytest.approx(3 * 100 * 6 * 2048 * 768 / 1e11))


@pytest.mark.parametrize("experts", torch_block.TORCH.values())
def test_the_block_is_ours(experts):
  torch = pytest.importorskip("torch")
  layer = make_layer(TINY, "float32")
  block = torch_block.torch_block(layer, 1, 1)
  assert torch.get_num_threads() == 1
  (found,) = torch_block.forward(block, experts, torch_block.to_torch(layer.x))()
  expected = apply(layer.graphdef, layer.params, layer.x, -np.inf)[0]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_missing_pieces_are_named(monkeypatch):
  assert torch_block.missing("tpu") == "is compared on the CPU only"
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  assert torch_block.missing("cpu").startswith("PyTorch is not installed")
  report = tiny_bench("layer", ratios=(0.0,), columns=("tiled", "torch-eager"))
  assert report.rows[0].cells["torch-eager"].startswith("PyTorch is not installed")
  assert any(line.startswith("not measured: torch-eager PyTorch is not installed") for line in report.lines)


def test_not_enough_memory_for_a_second_copy(monkeypatch):
  pytest.importorskip("torch")
  monkeypatch.setattr(torch_block, "free_bytes", lambda: 1e3)
  assert torch_block.torch_block(make_layer(TINY, "float32"), 1, 2).startswith("skipped: needs 0.0 GB")
