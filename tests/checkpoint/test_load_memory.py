"""Several processes that load a checkpoint onto a mesh hold their own shares only, measured by the benchmark."""

import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_each_process_holds_its_share_of_a_large_checkpoint(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
  import convert_memory
  import load_memory

  config = convert_memory.synthetic_config(6.0)
  convert_memory.write_synthetic(config, tmp_path / "model", 2 * 10**9)
  total = convert_memory.num_bytes(config)
  assert total >= 6e9
  for record in load_memory.measure(tmp_path / "model", processes=2, devices=4, experts=4):
    assert record["held"] < 0.51 * total  # the routers and norms are held by all
    assert record["peak"] < 1.3 * record["held"] + 1e9
