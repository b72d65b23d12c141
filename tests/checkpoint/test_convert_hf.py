"""The scripts in tools/convert_hf."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

TOOLS = pathlib.Path(__file__).parents[2] / "tools/convert_hf"


def run(tool: str, *arguments: object) -> int:
  spec = importlib.util.spec_from_file_location(f"convert_hf_{tool}", TOOLS / f"{tool}.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def dynamic(make_checkpoint, tmp_path_factory):
  path = tmp_path_factory.mktemp("tools") / "dynamic"
  assert run("inject", make_checkpoint(), path, "--num-zero-experts", 4, "--seed", 1) == 0
  return path


def test_injected_and_masked_is_the_original_bit_for_bit(make_checkpoint, dynamic, capsys):
  assert run("verify", make_checkpoint(), dynamic, "--zero-expert-bias=-inf", "--tolerance", 0) == 0
  assert "max abs difference 0.000e+00, argmax agreement 100.00% over 64 tokens" in capsys.readouterr().out


def test_verify_fails_on_models_that_differ(make_checkpoint, dynamic):
  assert run("verify", make_checkpoint(), dynamic, "--tokens", 16) == 1


def test_plain_export_has_the_same_logits(dynamic, tmp_path):
  assert run("to_hf", dynamic, tmp_path / "plain", "--format", "plain") == 0
  assert run("verify", dynamic, tmp_path / "plain", "--tokens", 16) == 0


def test_there_and_back_through_orbax(make_checkpoint, read_all, dynamic, tmp_path):
  for name, source in (("static", make_checkpoint(dtype="bfloat16")), ("dynamic", dynamic)):
    assert run("to_orbax", source, tmp_path / f"{name}-orbax") == 0
    assert run("to_hf", tmp_path / f"{name}-orbax", tmp_path / name) == 0
    assert read_all(tmp_path / name) == read_all(source)
    assert (tmp_path / name / "config.json").read_bytes().split() == (source / "config.json").read_bytes().split()
    assert (tmp_path / name / "tokenizer.json").is_file()


def test_errors_are_one_sentence_and_exit_code_2(make_checkpoint, dynamic, tmp_path, capsys):
  other = make_checkpoint(vocab_size=50)
  capsys.readouterr()
  calls = [
    ("inject", tmp_path / "nowhere", tmp_path / "out"),
    ("inject", dynamic, tmp_path / "out"),
    ("inject", make_checkpoint(), dynamic),
    ("to_orbax", tmp_path / "nowhere", tmp_path / "out"),
    ("to_orbax", make_checkpoint(), dynamic),
    ("to_orbax", make_checkpoint(), tmp_path / "out", "--dtype", "int4"),
    ("to_hf", tmp_path / "nowhere", tmp_path / "out"),
    ("to_hf", tmp_path / "nowhere", tmp_path / "out", "--format", "plain"),
    ("to_hf", make_checkpoint(), tmp_path / "out"),
    ("to_hf", dynamic, make_checkpoint(), "--format", "plain"),
    ("verify", dynamic, tmp_path / "nowhere"),
    ("verify", dynamic, other),
    ("verify", dynamic, dynamic, "--tokens", 129),
  ]
  for call in calls:
    assert run(*call) == 2, call
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, (call, message)
  assert not list(tmp_path.iterdir())


def test_runs_as_a_script(make_checkpoint, tmp_path):
  command = [sys.executable, str(TOOLS / "inject.py"), str(make_checkpoint()), str(tmp_path / "out")]
  root = str(TOOLS.parents[1])
  subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": root})
  assert (tmp_path / "out/config.json").is_file()
