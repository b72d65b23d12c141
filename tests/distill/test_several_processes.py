"""Training in two real processes: the same losses as in one, and what is left when one is killed or told to stop."""

import json
import re
import signal
import sys
import time

import numpy as np
import pytest

from tests.multiprocess import REPOSITORY, start

WORKER = [sys.executable, str(REPOSITORY / "tests" / "distributed" / "worker.py")]
STEPS = 8
DIED = 75


def worker(directory, *options, processes=1, devices=1, mesh="1x1", **settings):
  directory.mkdir(exist_ok=True)
  command = [*WORKER, str(directory), f"--mesh={mesh}", f"--steps={STEPS}", *options]
  return start(command, processes, devices, **settings)


def rows(directory):
  return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def checkpoints(directory):
  """Names in the directory of checkpoints: numbers, if all of them are whole."""
  return sorted(path.name for path in (directory / "checkpoints").iterdir())


def assert_same_training(found, expected):
  assert [row["step"] for row in found] == list(range(1, STEPS + 1))
  assert [row["data"] for row in found] == [row["data"] for row in expected]
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose([r[name] for r in found], [r[name] for r in expected], rtol=1e-5)


def finish(directory, **where):
  """Runs the training to its end; gives the step that it went on from, 0 if nothing was saved."""
  with worker(directory, **where) as group:
    results = group.wait(170)
  assert [result.status for result in results] == [0] * len(results), "\n".join(r.output for r in results)
  found = re.search(r"starts after step (\d+|None)", results[0].output)[1]
  return 0 if found == "None" else int(found)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
  """The rows of a run that nothing interrupts, in one process on one device."""
  directory = tmp_path_factory.mktemp("expected")
  with worker(directory) as group:
    (result,) = group.wait(170)
  assert result.status == 0, result.output
  return rows(directory)


def run_and_kill(directory, victim, moment, *options, pause=0.3, wait=25):
  """Kills one of two processes (2 devices each) when its output shows `moment`; the survivor's result and seconds."""
  with worker(directory, f"--pause={pause}", *options, processes=2, devices=2, mesh="2x2") as group:
    group.wait_for(victim, moment, 170)
    time.sleep(0.1)
    began = time.monotonic()
    group.send(victim, signal.SIGKILL)
    results = group.wait(wait + 20)
  survivor = results[1 - victim]
  seconds = survivor.ended - began
  print(f"process {1 - victim} stopped {seconds:.2f} s after process {victim} was killed {moment!r}")
  assert results[victim].status == -signal.SIGKILL
  assert survivor.status == DIED, survivor.output
  sentence = rf"zeda: process {1 - victim} of 2: process {victim} \(\S+\) has died .*run the same command again"
  assert re.search(sentence, survivor.output.splitlines()[-1]), survivor.output
  assert seconds < 30
  return survivor, seconds


def test_two_processes_train_as_one_and_survive_a_kill(tmp_path, expected):
  run_and_kill(tmp_path, 1, "made step 5")
  # Steps 2 and 4 have been saved, but the second of them in the background, perhaps not to its end.
  assert finish(tmp_path, devices=2, mesh="1x2") in (2, 4)
  assert_same_training(rows(tmp_path), expected)
  assert checkpoints(tmp_path)[-1] == str(STEPS)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_one_checkpoint(tmp_path, expected):
  options = ("--save-every=100", "--pause=0.2")
  with worker(tmp_path, *options, processes=2, devices=2, mesh="2x2") as group:
    group.wait_for(1, "made step 2", 170)
    group.send(1, signal.SIGTERM)
    first, second = group.wait(60)
  assert (first.status, second.status) == (0, 0), first.output + second.output
  stopped = re.search(r"training stopped after step (\d) of 8, saved in (\S+); run the same command", first.output)
  assert stopped, first.output
  assert "stopped" not in second.output
  assert checkpoints(tmp_path) == [stopped[1]]
  assert finish(tmp_path, processes=2, devices=2, mesh="2x2") == int(stopped[1])
  assert_same_training(rows(tmp_path), expected)


@pytest.mark.slow
@pytest.mark.parametrize("where", [{"devices": 4, "mesh": "2x2"}, {"processes": 2, "devices": 1, "mesh": "1x2"}])
def test_losses_do_not_depend_on_processes_and_devices(tmp_path, expected, where):
  with worker(tmp_path, **where) as group:
    results = group.wait(170)
  assert all(result.status == 0 for result in results), results[0].output
  assert_same_training(rows(tmp_path), expected)


@pytest.mark.slow
def test_killed_coordinator_stops_the_other(tmp_path, expected):
  run_and_kill(tmp_path, 0, "made step 5")
  assert finish(tmp_path, processes=2, devices=1, mesh="1x2") in (2, 4)
  assert_same_training(rows(tmp_path), expected)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_kill_within_a_save_leaves_no_checkpoint_that_counts(tmp_path, expected, victim):
  # The second "saving" is the save of step 4; a process sleeps in it before its share is complete.
  moment = r"saving\n(.*\n)*saving"
  run_and_kill(tmp_path, victim, moment, f"--slow-saves={victim}:3", pause=0)
  left = checkpoints(tmp_path)
  assert "2" in left and "4" not in left, left
  assert any("tmp" in name for name in left), left
  assert finish(tmp_path, devices=2, mesh="1x2") == 2
  assert_same_training(rows(tmp_path), expected)
  assert checkpoints(tmp_path) == ["2", "4", "6", "8"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_break_the_save(tmp_path, expected, number):
  options = ("--save-every=100", "--pause=0.2", "--slow-saves=0:3")
  with worker(tmp_path, *options, processes=2, devices=2, mesh="2x2") as group:
    group.wait_for(0, "made step 2", 170)
    group.send(0, number)  # as a terminal does
    group.send(1, number)
    group.wait_for(0, "saving", 60)
    group.send(0, signal.SIGTERM)
    group.send(1, signal.SIGTERM)
    results = group.wait(60)
  assert [result.status for result in results] == [0, 0], results[0].output + results[1].output
  (saved,) = checkpoints(tmp_path)
  assert finish(tmp_path, devices=2, mesh="1x2") == int(saved)
  assert_same_training(rows(tmp_path), expected)


@pytest.mark.slow
def test_the_vote_waits_where_batches_are_made_from_the_state(tmp_path):
  with worker(tmp_path, "--make-batch", "--pause=0.5", processes=2, devices=1, mesh="1x2") as group:
    group.wait_for(1, "made step 3", 170)
    group.send(1, signal.SIGTERM)
    results = group.wait(60)
  assert [result.status for result in results] == [0, 0], results[0].output + results[1].output
  assert "stopped after step 3 of 8" in results[0].output


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize(
  ("how", "status", "reason"),
  [("fail", 2, "this process fails on purpose."), ("crash", 1, "RuntimeError: this process crashes on purpose")],
)
def test_an_error_in_one_process_stops_both(tmp_path, process, how, status, reason):
  with worker(tmp_path, f"--{how}={process}:3", processes=2, devices=1, mesh="1x2") as group:
    results = group.wait(170)
  assert [result.status for result in results] == [status] * 2, results[0].output + results[1].output
  own, other = results[process].output, results[1 - process].output
  assert own.splitlines()[-1] == f"zeda worker: process {process} of 2: {reason}"
  assert re.search(
    rf"zeda: process {1 - process} of 2: stopped, because process {process} \(\S+\) stopped with an error: "
    + re.escape(reason),
    other.splitlines()[-1],
  ), other
