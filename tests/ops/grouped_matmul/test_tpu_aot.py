"""The default backend, compiled ahead of time for real TPUs by benchmarks/tpu_aot.py in a process of its own."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[3] / "benchmarks" / "tpu_aot.py"
HAS_LIBTPU = (pathlib.Path(sys.prefix) / "libtpu").is_dir() or importlib.util.find_spec("libtpu") is not None

pytestmark = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed; `make test-tpu-aot` installs it")


def check(topologies, shapes, backends, programs):
  """Runs the script; every program of ours compiles to kernels alone, with the FLOPs of the product and no more."""
  command = [
    sys.executable,
    SCRIPT,
    "--json",
    "--topologies",
    *topologies,
    "--shapes",
    *shapes,
    "--backends",
    *backends,
  ]
  run = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1], check=False)
  assert run.returncode == 0, run.stderr[-2000:]
  records = json.loads(run.stdout)
  ours = [record for record in records if record["backend"] == "default"]
  assert len(ours) == programs * len(topologies) * len(shapes)
  for record in ours:
    assert "error" not in record, record
    # The rest is the list of visits: some thousand numbers.
    assert record["useful_flops"] <= record["flops"] <= 1.02 * record["useful_flops"], record
    assert record["kernels"] == {"forward": 1, "forward and backward": 3, "swiglu": 1}[record["program"]], record
    assert record["temporary_bytes"] < 2e6, record
  return records


def test_one_chip_forward_and_backward():
  check(["v5e:2x2"], ["qwen3_30b_a3b"], ["default"], programs=5)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_chip_and_model_beside_the_peers(topology):
  shapes = ["qwen3_30b_a3b", "glm_4_7_flash", "qwen3_30b_a3b decode"]
  records = check([topology], shapes, ["default", "megablox", "ragged_dot"], programs=5)
  # ragged_dot's weight gradient multiplies every row with every expert: what our kernel is there to avoid.
  peers = [r for r in records if r["backend"] == "ragged_dot" and r["program"] == "forward and backward"]
  assert peers and all(r["flops"] > 2 * r["useful_flops"] for r in peers if "error" not in r)
