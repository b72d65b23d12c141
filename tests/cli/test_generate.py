"""`zeda inject` and `zeda generate` on a directory of one's own."""

import json

import pytest

from tests.recipe_files import assert_same_tensors, tensors, write_prompts, write_teacher
from zeda_jax.cli import main as cli


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  directory = tmp_path_factory.mktemp("files")
  write_teacher(directory / "teacher")
  write_prompts(directory / "prompts.jsonl", 1)
  return directory


def test_inject(files, tmp_path, capsys):
  source, target = files / "teacher", tmp_path / "out"
  assert cli.main(["inject", str(source), str(target)]) == 0
  assert capsys.readouterr().out == f"written: {target}\n"
  assert json.loads((target / "config.json").read_text())["zce_nums"] == [2]
  assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
  before, after = tensors(source), tensors(target)
  router = "model.layers.0.mlp.gate.weight"
  assert after[router].shape == (6, 16) and (after[router][:4] == before[router]).all()
  assert all(after[name].tobytes() == before[name].tobytes() for name in before if name != router)

  assert cli.main(["inject", str(source), str(target)]) == 2
  assert "is not empty" in capsys.readouterr().err
  assert cli.main(["inject", str(source), str(target), "--overwrite", "--seed=1"]) == 0
  assert (tensors(target)[router][4:] != after[router][4:]).all()


def test_generate(files, tmp_path, capsys):
  arguments = ["--max-new-tokens=4", "--temperature=0"]
  assert cli.main(["generate", str(files / "teacher"), "What is a list?", *arguments]) == 0
  plain = capsys.readouterr().out
  assert plain.startswith("> <|im_start|>user\nWhat is a list?<|im_end|>") and "0 % of expert work skipped" in plain
  assert cli.main(["inject", str(files / "teacher"), str(tmp_path / "out")]) == 0
  capsys.readouterr()
  # with its zero experts switched off the student is the teacher
  off = ["--zero-expert-bias=-inf"]
  assert cli.main(["generate", str(tmp_path / "out"), "What is a list?", *arguments, *off]) == 0
  assert capsys.readouterr().out == plain
  flags = [f"--prompts={files / 'prompts.jsonl'}", *arguments]
  assert cli.main(["generate", str(tmp_path / "out"), *flags]) == 0
  found = capsys.readouterr().out
  assert found.count("% of expert work skipped]") == 1 and found.count("Explain: ") == 1


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    ([], "no prompt is given"),
    (["hello", "--max-new-tokens=0"], "--max-new-tokens is 0"),
    (["hello", "--batch-size=-1"], "--batch-size is -1"),
    (["hello", "--seed=-1"], "--seed is -1"),
    (["hello", "--temperature=-1"], "temperature is -1"),
    (["hello", "--top-p=0"], "top_p is 0"),
    (["hello", "--max-new-tokens=96"], "context of 96"),
    (["--prompts=nowhere.jsonl"], "nowhere.jsonl matches no file"),
  ],
)
def test_generate_refuses(files, capsys, arguments, expected):
  assert cli.main(["generate", str(files / "teacher"), *arguments]) == 2
  found = capsys.readouterr()
  assert found.out == "" and expected in found.err and found.err.count("\n") == 1


def test_generate_without_a_model(tmp_path, capsys):
  assert cli.main(["generate", str(tmp_path), "hello"]) == 2
  assert "config.json does not exist" in capsys.readouterr().err


def test_same_seed_same_model(files, tmp_path):
  for name in ("a", "b"):
    assert cli.main(["inject", str(files / "teacher"), str(tmp_path / name), "--seed=5"]) == 0
  assert_same_tensors(tmp_path / "a", tmp_path / "b")
