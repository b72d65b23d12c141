"""Columns that are skipped, refused or thrown out, and why; the backend that a layer takes."""

import re

import numpy as np
import pytest

from tests.bench.tiny import hasty
from zeda_jax.bench import columns
from zeda_jax.bench.machine import Machine
from zeda_jax.bench.shapes import Options
from zeda_jax.bench.timing import Timing
from zeda_jax.errors import ZedaError
from zeda_jax.ops.grouped_matmul import BACKENDS, grouped_matmul

MACHINE = Machine("cpu", "cpu", 2, dense_rate=1e9, copy_rate=1e9)
LHS, RHS, SIZES = np.ones((64, 32), np.float32), np.ones((16, 32, 32), np.float32), np.full(16, 4, np.int32)


def product(backend):
  return lambda *arguments: grouped_matmul(*arguments, backend=backend)


def test_too_slow_is_foreseen():
  # `reference` does all 16 products on all rows: 16 * 2 * 64 * 32 * 32 FLOPs at 1e6 FLOP/s is 2.1 s, and the rest
  slow = MACHINE._replace(dense_rate=1e6)
  for backend in ("reference", "ragged_dot"):
    reason = columns.compiled(product(backend), (LHS, RHS, SIZES), slow, 2.0)
    assert re.fullmatch(r"skipped: would take about 2\.[1-3] s", reason)
    assert callable(columns.compiled(product(backend), (LHS, RHS, SIZES), slow, 3.0))
  assert callable(columns.compiled(product("tiled"), (LHS, RHS, SIZES), slow, 0.5))


def test_too_large_is_foreseen(monkeypatch):
  monkeypatch.setattr(columns, "free_bytes", lambda: 1e4)
  found = columns.compiled(product("reference"), (LHS, RHS, SIZES), MACHINE, 10.0)
  assert found.startswith("skipped: needs 0.0 GB")


def test_what_does_not_compile_is_a_reason():
  def fails(*arguments):
    raise ZedaError("this shape cannot be done")

  assert columns.compiled(fails, (LHS,), MACHINE, 1.0) == "failed: ZedaError: this shape cannot be done"


def test_only_equal_results_are_timed():
  good, live = np.ones((4, 2), np.float32), 3
  beyond, wrong, poisoned = good.copy(), good.copy(), good.copy()
  beyond[3], wrong[2], poisoned[0] = 7, 1.5, np.nan

  def breaks():
    raise RuntimeError("no such device")

  calls = {
    "dense": lambda: (np.zeros(5),),
    "first": lambda: (good, np.zeros((2, 2))),
    "beyond": lambda: (beyond, np.zeros((2, 2))),
    "wrong": lambda: (wrong, np.zeros((2, 2))),
    "poisoned": lambda: (poisoned, np.zeros((2, 2))),
    "breaks": breaks,
    "absent": "is not installed",
  }
  with hasty():
    (cells,) = columns.timed([calls], [live], 1, MACHINE, "float32")
    (spared,) = columns.timed([{k: calls[k] for k in ("first", "wrong")}], [live], 1, MACHINE, "float32", {"wrong": 1})
  assert [k for k, v in cells.items() if isinstance(v, Timing)] == ["dense", "first", "beyond"]
  assert cells["wrong"] == "not timed: differs from first by 0.5 of the largest value"
  assert cells["poisoned"].startswith("not timed: differs from first by nan")
  assert cells["breaks"] == "failed: RuntimeError: no such device"
  assert cells["absent"] == "is not installed"
  assert isinstance(spared["wrong"], Timing)


def test_backends_of_a_platform(monkeypatch):
  anywhere = [name for name, backend in BACKENDS.items() if backend.platforms is None]
  assert {"tiled", "ragged_dot", "reference"} <= set(anywhere)
  monkeypatch.setitem(BACKENDS, "mosaic", BACKENDS["tiled"]._replace(platforms=("tpu",)))
  monkeypatch.setitem(BACKENDS, "triton", BACKENDS["tiled"]._replace(platforms=("cuda",)))
  assert "mosaic" in columns.backend_names("tpu") and "triton" not in columns.backend_names("tpu")
  assert "triton" in columns.backend_names("gpu") and "mosaic" not in columns.backend_names("gpu")
  assert not {"triton", "mosaic"} & set(columns.backend_names("cpu"))
  found = columns.chosen(Options(columns=("mosaic", "tiled", "peer")), MACHINE, ["peer"])
  assert found == {"mosaic": "runs on tpu only", "tiled": "", "peer": ""}
  with pytest.raises(ZedaError, match=r"backend 'tilde' is unknown; expected some of pallas_tpu, .*peer"):
    columns.chosen(Options(columns=("tilde",)), MACHINE, ["peer"])
