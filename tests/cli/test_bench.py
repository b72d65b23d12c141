"""`zeda bench`: the two tables at toy size, files, and errors as sentences."""

import os
import subprocess
import sys

import pytest

from tests.bench.tiny import SCALE, hasty
from tests.recipe_files import REPOSITORY
from zeda_jax.cli import main as cli

TOY = ["--shapes=demo", "--ratios=0,0.5", f"--scale={SCALE}", "--repeats=1", "--backends=tiled"]


@pytest.mark.parametrize("what", ["kernel", "layer"])
def test_table_and_files(what, tmp_path, capsys):
  arguments = ["bench", what, *TOY, f"--output={tmp_path}"]
  with hasty():
    assert cli.main(arguments) == 0
    found = capsys.readouterr().out
    assert f"zeda bench {what}" in found and "tiled" in found and "scaled by 0.005" in found
    assert all(f"written: {tmp_path / what}.{ending}" in found for ending in ("csv", "md"))
    rows = (tmp_path / f"{what}.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * (2 if what == "kernel" else 1)  # ratios, columns, products
    assert cli.main(arguments) == 2
    assert "already exists" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (["kernels"], "'kernels' is nothing to measure; expected kernel, layer or model."),
    (["kernel", "--shapes=tiny"], "shape 'tiny' is unknown"),
    (["kernel", "--shapes="], "nothing to measure"),
    (["kernel", "--ratios=0,half"], "--ratios=0,half is no list of numbers"),
    (["layer", "--ratios=1"], "zero ratio 1 is"),
    (["layer", "--scale=0"], "scale is 0"),
    (["layer", "--repeats=0"], "repeats is 0"),
    (["kernel", "--dtype=int8"], "dtype is 'int8'"),
    (["kernel", "--check", "--shapes=demo"], "--check has its own sizes and columns: leave out --shapes."),
  ],
)
def test_refuses_before_jax_is_there(arguments, expected, capsys):
  assert cli.main(["bench", *arguments]) == 2
  found = capsys.readouterr()
  assert found.out == "" and expected in found.err and found.err.count("\n") == 1


def test_unknown_backend(capsys):
  assert cli.main(["bench", "kernel", *TOY[:-1], "--backends=cublas"]) == 2
  assert "backend 'cublas' is unknown; expected some of pallas_tpu, pallas_gpu, tiled" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["grouped_matmul", "moe_layer"])
def test_scripts_are_the_command(script):
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  command = [sys.executable, f"benchmarks/{script}.py", "--ratios=2"]
  result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
  assert result.returncode == 2 and result.stderr.startswith("zeda bench: zero ratio 2")
