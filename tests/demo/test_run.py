"""The whole demo, made small: every row is measured, and the exported directory is the model of its row."""

import json

import pytest
import rich.console

import zeda_jax
from zeda_jax.data.chat import load_tokenizer, render_prompt
from zeda_jax.demo.run import LABELS, run_demo
from zeda_jax.evaluate.runner import evaluate

pytestmark = pytest.mark.slow  # two dozen programs to compile

SMALL = {
  "evaluate.num_prompts": 48,
  "evaluate.batch_size": 48,
  "rollout.batch_size": 48,
  "sft.epochs": 1,
  "sft.batch_size": 8,
  "opd.steps": 2,
  "opd.prompts_per_step": 8,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("demo")
  with open(path / "console.txt", "w") as out:
    return run_demo(path / "out", overrides=SMALL, train_per_family=32, console=rich.console.Console(file=out))


def _row(workdir, name):
  return json.loads((workdir / "main" / "evaluate" / f"{name}.json").read_text())


def test_every_row_is_measured_on_all_families(workdir):
  for name in LABELS:
    row = _row(workdir, name)
    assert set(row["accuracy"]) == {"math", "code", "instruction"}, name
    assert sum(row["num_graded"].values()) == 48, name


def test_rows_skip_what_their_names_say(workdir):
  assert _row(workdir, "teacher")["skipped"] == 0
  for name in ("truncated", "halved", "truncated-trained"):
    assert _row(workdir, name)["skipped"] == pytest.approx(0.5)
  student = _row(workdir, "student")["skipped_response"]
  assert _row(workdir, "skipping")["skipped_response"] == pytest.approx(student, abs=0.1)
  assert _row(workdir, "student-70")["skipped_response"] > student


def test_table_and_picture_are_written(workdir):
  table = (workdir / "main" / "summary.md").read_text()
  assert all(label in table for label in LABELS.values())
  assert (workdir / "main" / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_exported_directory_gives_the_accuracy_of_its_row(workdir):
  directory = workdir / "main" / "student"
  tokenizer = load_tokenizer(directory)
  records = [json.loads(line) for line in (workdir / "data" / "held-out.jsonl").read_text().splitlines()]
  result, _ = evaluate(
    zeda_jax.load_hf(directory),
    [render_prompt(tokenizer, record) for record in records],
    records,
    lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
    max_new_tokens=16,
    batch_size=48,
  )
  row = _row(workdir, "student")
  assert result.accuracy == row["accuracy"]
  assert result.skipped_response == pytest.approx(row["skipped_response"], abs=1e-6)


def test_a_second_run_only_prints_the_table(workdir, tmp_path):
  before = {path: path.stat().st_mtime_ns for path in (workdir / "main" / "evaluate").iterdir()}
  with open(tmp_path / "console.txt", "w") as out:
    run_demo(workdir, overrides=SMALL, train_per_family=32, console=rich.console.Console(file=out))
  assert {path: path.stat().st_mtime_ns for path in (workdir / "main" / "evaluate").iterdir()} == before
  assert "zero experts" in (tmp_path / "console.txt").read_text()
