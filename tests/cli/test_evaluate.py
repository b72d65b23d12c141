"""`zeda evaluate` as its users call it."""

import json

import pytest

from zeda_jax.cli import main as cli
from zeda_jax.demo.run import TEACHER


@pytest.mark.slow
def test_the_demos_families(tmp_path, capsys):
  command = ["evaluate", str(TEACHER), "--tasks=demo_math,demo_code", "--limit=6", f"--output={tmp_path / 'a'}"]
  assert cli.main(command) == 0
  out = capsys.readouterr().out
  assert "12 problems of 2 tasks, 12 responses" in out and "demo: math" in out and "avg@1" in out
  for name in ("results.json", "results.md", "samples.jsonl"):
    assert str(tmp_path / "a" / name) in out.replace("\n", "") and (tmp_path / "a" / name).is_file()
  results = json.loads((tmp_path / "a" / "results.json").read_text())
  assert results["average"]["mean"] > 0.9  # 99.4 on all of its prompts
  assert (tmp_path / "a" / "results.md").read_text().count("\n") == 5

  half = [*command[:-1], f"--output={tmp_path / 'b'}", "--temperature=2", "--top-k=0", "--top-p=1"]
  assert cli.main(half) == 0
  capsys.readouterr()
  assert cli.main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
  out = capsys.readouterr().out
  assert "95 % interval" in out and "average" in out and "note: temperature: None and 2.0" in out


def test_the_list_of_tasks(capsys):
  assert cli.main(["evaluate", "--list"]) == 0
  out = capsys.readouterr().out
  assert "AIME 26" in out and "hf:openai/gsm8k:main:test" in out and "livecodebench_v6" in out


def test_help_does_not_wait_for_jax(capsys):
  assert cli.main(["evaluate"]) == 0
  assert "zeda evaluate DIR --tasks=aime24,code" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (["--tasks=demo"], "no checkpoint is given"),
    ([str(TEACHER)], "--tasks is missing"),
    ([str(TEACHER), "--tasks=nothing"], "task 'nothing' is unknown"),
    ([str(TEACHER), "--tasks=demo", "--limit=0"], "limit is 0"),
    ([str(TEACHER), "--tasks=demo", "--samples=x"], "--samples: 'x' has no number"),
    ([str(TEACHER), "--tasks=demo", "--top-p=0"], "top_p is 0"),
    ([str(TEACHER), "--tasks=demo", "--source=demo_math"], "has no place; expected TASK=FILE"),
    ([str(TEACHER), "--tasks=demo", "--source=gsm8k=x"], "gsm8k is not among the tasks"),
    ([str(TEACHER), "--tasks=demo", "--template-options=x"], "is not valid JSON"),
    ([str(TEACHER), "--tasks=demo", "--template-options=[]"], "expected a JSON object"),
    ([str(TEACHER), "--tasks=demo", "--code-seconds=0"], "cpu_seconds is 0"),
    ([str(TEACHER), "--tasks=gsm8k", "--data=nowhere"], "nowhere is no directory"),
    (["nowhere", "--tasks=demo"], "config.json does not exist"),
    (["--compare", "a", "b"], "a has no settings.json"),
    (["x", "--compare", "a", "b"], "--compare takes two output directories and nothing else"),
  ],
)
def test_refuses(tmp_path, monkeypatch, capsys, arguments, expected):
  monkeypatch.chdir(tmp_path)
  assert cli.main(["evaluate", *arguments]) == 2
  found = capsys.readouterr()
  assert expected in found.err and found.err.count("\n") == 1
  assert not list(tmp_path.iterdir())
