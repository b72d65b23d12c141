"""Long rows of the real models' attention, compiled ahead of time for TPUs by benchmarks/tpu_attention.py."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[3] / "benchmarks" / "tpu_attention.py"
HAS_LIBTPU = (pathlib.Path(sys.prefix) / "libtpu").is_dir() or importlib.util.find_spec("libtpu") is not None

pytestmark = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed; `make test-tpu-aot` installs it")


def check(topology, *flags):
  """Runs the script; everything compiles to the three kernels, with temporaries of a few copies of the operands."""
  command = [sys.executable, SCRIPT, "--json", "--topologies", topology, *flags]
  run = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1], check=False)
  assert run.returncode == 0, run.stderr[-2000:]
  records = json.loads(run.stdout)
  for record in records:
    assert "error" not in record, record
    assert record["kernels"] == 3, record
    assert record["temporary_bytes"] < 8 * record["operand_bytes"], record
  return records


def test_a_short_row_of_qwen3_on_one_chip():
  assert len(check("v5e:2x2", "--models", "qwen3_30b_a3b", "--lengths", "2048", "--devices", "1")) == 1


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_rows_of_32k_tokens_on_one_chip_and_on_four(topology):
  records = check(topology, "--lengths", "32768", "--devices", "1", "4")
  assert {(r["model"], r["devices"]) for r in records} == {
    (model, devices) for model in ("qwen3_30b_a3b", "glm_4_7_flash") for devices in (1, 4)
  }
