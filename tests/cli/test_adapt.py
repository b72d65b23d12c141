"""`zeda adapt` as its users run it: in a process of its own, to its end, killed, and again."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.recipe_files import (
  REPOSITORY,
  arguments,
  assert_same_tensors,
  everything,
  write_prompts,
  write_teacher,
  zeda,
)
from zeda_jax.cli.main import main
from zeda_jax.data.jsonl import JsonLines
from zeda_jax.distill.trainer import StoppedEarly

STAGES = ("rollout", "sft", "opd", "export", "evaluate")

# `zeda`, with one stage slowed down to a second or more and announced by a file, so that it can be met.
SLOWED = """
import pathlib, sys, time
from zeda_jax.checkpoint import safetensors_io
from zeda_jax.cli.main import main
from zeda_jax.distill import adapt, metrics
from zeda_jax.rollout.engine import Engine

where, marker = sys.argv[1], pathlib.Path(sys.argv[2])
places = {
  "rollout": (Engine, "step", 0.3),
  "sft": (metrics.MetricWriter, "write", 0.15),
  "opd": (metrics.MetricWriter, "write", 0.5),
  "export": (safetensors_io, "_write_all", 0.1),
  "evaluate": (adapt, "evaluate", 0.5),
}
place, name, seconds = places[where]
original = getattr(place, name)

def slowed(*args, **options):
  if where in ("sft", "opd") and args[0]._label != where:
    return original(*args, **options)
  marker.touch()
  time.sleep(seconds / 2)
  result = original(*args, **options)
  time.sleep(seconds / 2)
  return result

setattr(place, name, slowed)
sys.exit(main(["adapt", *sys.argv[3:]]))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  directory = tmp_path_factory.mktemp("files")
  write_teacher(directory / "teacher")
  write_prompts(directory / "prompts.jsonl")
  return directory


@pytest.fixture(scope="module")
def uninterrupted(files, tmp_path_factory):
  """(workdir, finished process) of a run that nobody disturbed."""
  workdir = tmp_path_factory.mktemp("uninterrupted") / "w"
  return workdir, zeda("adapt", *arguments(files, workdir))


def interrupt(stage, number, files, workdir, delay):
  """Runs the recipe until `delay` seconds into a stage, and sends the signal; returns (exit status, stdout, stderr)."""
  marker = workdir.parent / f"{stage}-{number}"
  command = [sys.executable, "-c", SLOWED, stage, str(marker), *arguments(files, workdir)]
  process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 300
  while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(delay)
  process.send_signal(number)
  out, err = process.communicate(timeout=300)
  assert marker.exists(), err
  return process.returncode, out, err


def assert_same_run(one: pathlib.Path, two: pathlib.Path):
  """The same tensors, rollouts, metric rows and results, whatever happened on the way."""
  assert_same_tensors(one / "student", two / "student")
  names = sorted(path.name for path in (one / "rollouts").iterdir())
  assert names == sorted(path.name for path in (two / "rollouts").iterdir())
  for name in names:
    assert (one / "rollouts" / name).read_bytes() == (two / "rollouts" / name).read_bytes()
  for stage in ("sft", "opd"):
    rows = [
      [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
      for workdir in (one, two)
    ]
    timeless = [[{k: v for k, v in row.items() if "second" not in k} for row in part] for part in rows]
    assert timeless[0] == timeless[1]
  for row in ("teacher", "injected", "sft", "student"):
    first, second = (json.loads((workdir / "evaluate" / f"{row}.json").read_text()) for workdir in (one, two))
    assert first | {"seconds": 0} == second | {"seconds": 0}


def test_runs_through_and_is_quiet(uninterrupted):
  workdir, process = uninterrupted
  assert (process.returncode, process.stderr) == (0, "")
  assert "WARNING" not in process.stdout and "Traceback" not in process.stdout
  lines = process.stdout.splitlines()
  assert lines[0].startswith("teacher ") and any(line.startswith("sft 1/") for line in lines)
  assert len(lines) < 60
  # the table and its rows are not broken into pieces
  for label in ("teacher", "injected, untrained", "SFT", "student (exported)"):
    assert any(line.strip().startswith(f"{label}  ") and line.rstrip()[-1].isdigit() for line in lines)
  assert lines[-1] == f"of OPD: {workdir / 'opd'}"


@pytest.mark.parametrize(
  "stages",
  [("rollout", "opd", "export"), pytest.param(STAGES, marks=pytest.mark.slow)],
  ids=["what each kind of stage writes", "every stage"],
)
def test_killed_it_ends_the_same(files, uninterrupted, tmp_path, stages):
  workdir, delays = tmp_path / "w", random.Random(0)
  prompts = JsonLines(files / "prompts.jsonl")
  for stage in stages:
    status, _, err = interrupt(stage, signal.SIGKILL, files, workdir, delays.uniform(0, 0.9))
    assert status == -signal.SIGKILL, err
    for shard in (workdir / "rollouts").glob("*.jsonl"):  # what counts as finished is whole
      assert all(prompts[record["index"]]["source"] == record["source"] for record in JsonLines(shard))
    assert not (workdir / "student").exists() or stage == "evaluate"
  process = zeda("adapt", *arguments(files, workdir))
  assert (process.returncode, process.stderr) == (0, "")
  assert_same_run(uninterrupted[0], workdir)
  answered = [record["index"] for shard in (workdir / "rollouts").glob("*.jsonl") for record in JsonLines(shard)]
  assert len(answered) == len(set(answered)) == 200 - 32
  assert not [name for name in everything(workdir) if "partial" in name or "tmp" in name]


def test_sigterm_exits_0_with_a_sentence(files, tmp_path):
  """The other stages are met in tests/distill/test_adapt.py, without new processes."""
  status, out, err = interrupt("rollout", signal.SIGTERM, files, tmp_path / "w", 0.1)
  assert (status, err) == (0, "")
  assert out.splitlines()[-1].startswith("zeda adapt: stopped ")
  assert out.splitlines()[-1].endswith("; run the same command again to go on.")


@pytest.mark.parametrize("variable, status", [(None, 0), ("75", 75)])
def test_a_launcher_can_tell_stopped_from_finished(monkeypatch, tmp_path, variable, status):
  def stop(*args, **kwargs):
    raise StoppedEarly("stopped after step 3.")

  monkeypatch.setattr("zeda_jax.distill.adapt.adapt", stop)
  monkeypatch.delenv("ZEDA_EXIT_WHEN_STOPPED", raising=False)
  if variable is not None:
    monkeypatch.setenv("ZEDA_EXIT_WHEN_STOPPED", variable)
  assert main(["adapt", "--config=configs/tiny.py", f"--config.workdir={tmp_path}"]) == status


@pytest.mark.slow
def test_a_terminal_gets_bars_and_a_table(files, tmp_path):
  """A whole run on a pseudo-terminal: no log lines between the bars."""
  import pty

  parent, child = pty.openpty()
  command = [sys.executable, "-m", "zeda_jax.cli.main", "adapt", *arguments(files, tmp_path / "w")]
  process = subprocess.Popen(command, cwd=REPOSITORY, stdout=child, stderr=child)
  os.close(child)
  text = b""
  while True:
    try:
      part = os.read(parent, 65536)
    except OSError:  # how Linux tells that the other end is closed
      break
    if not part:
      break
    text += part
  assert process.wait() == 0
  os.close(parent)
  assert b"held-out prompts" in text and b"WARNING" not in text and b"Traceback" not in text
