"""Real processes on this machine."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.machine import ADAPT, LAUNCH, commands

ROOT = pathlib.Path(__file__).parents[2]
PSUM = """
import os, sys
import jax
jax.distributed.initialize(
  os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
)
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
rows = NamedSharding(Mesh(jax.devices(), "x"), PartitionSpec("x"))
mine = jnp.arange(2.0) + 2 * jax.process_index()
total = jax.jit(jnp.sum)(jax.make_array_from_process_local_data(rows, mine))
print("processes", jax.process_count(), "devices", jax.device_count(), "sum", float(total), "arguments", sys.argv[1:])
"""
# Says when it is ready and when it is told to stop; "fail" fails in process 1, "deaf" ignores SIGTERM.
WAITING = """
trap 'echo stopping; [[ $1 == deaf ]] || exit 0' TERM
[[ $1 != fail || $JAX_PROCESS_ID != 1 ]] || exit 7
echo "ready $$"
while true; do sleep 0.05; done
"""


def program(machine, body, shell="/bin/bash"):
  file = machine.root / "program"
  file.write_text(f"#!{shell}\n{body}")
  file.chmod(0o755)
  return f"--program={file}"


def gone(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  return False


def test_two_processes_sum_over_their_devices(machine):
  command = ["--processes=2", "--devices=2", program(machine, PSUM, sys.executable), "--", "one", "two words"]
  result = machine.run("local.sh", *command, timeout=120)
  assert result.returncode == 0, result.stdout + result.stderr
  said = "processes 2 devices 4 sum 6.0 arguments ['one', 'two words']"
  assert {f"[0] {said}", f"[1] {said}"} <= set(result.stdout.splitlines())


def test_dry_run_prints_one_command_a_process(machine):
  result = machine.run("local.sh", "--dry-run", "--devices=2", "--port=12345", "--program=/bin/true", "--", *ADAPT)
  first, second, last = commands(result.stdout)
  expected = ["env", "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=2"]
  expected += ["JAX_COORDINATOR_ADDRESS=localhost:12345", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=0"]
  assert first == [*expected, "PYTHONUNBUFFERED=1", "/bin/true", *ADAPT, "&"]
  assert second == [*expected[:-1], "JAX_PROCESS_ID=1", "PYTHONUNBUFFERED=1", "/bin/true", *ADAPT, "&"]
  assert last == ["wait"]
  assert "'--config.workdir=/mnt/zeda/a run'" in result.stdout


def test_dry_run_can_be_pasted(machine):
  shown = program(machine, 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $1"')
  text = machine.run("local.sh", "--dry-run", shown, "--", "it's $HOME").stdout
  result = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
  assert sorted(result.stdout.splitlines()) == ["0 of 2: it's $HOME", "1 of 2: it's $HOME"]


def test_flags_of_xla_are_kept(machine):
  result = machine.run("local.sh", "--dry-run", "--program=/bin/true", XLA_FLAGS="--xla_a=1")
  assert "XLA_FLAGS=--xla_a=1 --xla_force_host_platform_device_count=4" in commands(result.stdout)[0]


def test_the_first_failure_stops_the_others_and_is_returned(machine):
  result = machine.run("local.sh", program(machine, WAITING), "--", "fail", PATH=os.environ["PATH"])
  assert result.returncode == 7
  assert "process 1 ended with exit code 7" in result.stderr
  assert "[0] stopping" in result.stdout.splitlines()


def test_what_does_not_stop_is_killed_after_the_grace_time(machine):
  body = "[[ $JAX_PROCESS_ID == 0 ]] || { sleep 0.3; exit 3; }\n" + WAITING
  result = machine.run("local.sh", "--grace=1", program(machine, body), "--", "deaf", PATH=os.environ["PATH"])
  assert result.returncode == 3
  pid = int(result.stdout.split("[0] ready ")[1].split()[0])
  assert "[0] stopping" in result.stdout and gone(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_only_its_own_processes(machine, number):
  mine = program(machine, WAITING)
  foreign = subprocess.Popen([mine.removeprefix("--program="), "foreign"], env={**os.environ, "JAX_PROCESS_ID": "1"})
  launcher = subprocess.Popen(
    [LAUNCH / "local.sh", mine, "--", "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  try:
    lines = [launcher.stdout.readline(), launcher.stdout.readline()]
    pids = [int(line.split("ready ")[1]) for line in lines]
    launcher.send_signal(number)
    out, err = launcher.communicate(timeout=20)
    assert launcher.returncode == 0, err  # both saved and ended with 0
    assert sorted(out.splitlines()) == ["[0] stopping", "[1] stopping"]
    assert "stopping: zeda saves and exits" in err
    assert all(map(gone, pids)) and foreign.poll() is None
  finally:
    for process in (launcher, launcher, foreign):  # the second signal kills what the launcher started
      process.terminate()
      time.sleep(0.2)
    launcher.kill()
    foreign.kill()
    foreign.wait()


def test_the_second_signal_kills(machine):
  launcher = subprocess.Popen(
    [LAUNCH / "local.sh", program(machine, WAITING), "--", "deaf"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
  )
  pids = [int(launcher.stdout.readline().split()[-1]) for _ in range(2)]
  launcher.terminate()
  assert {launcher.stdout.readline(), launcher.stdout.readline()} == {b"[0] stopping\n", b"[1] stopping\n"}
  launcher.terminate()
  assert launcher.wait(timeout=20) == 128 + signal.SIGKILL
  for _ in range(50):
    if all(map(gone, pids)):
      break
    time.sleep(0.1)
  assert all(map(gone, pids))


@pytest.mark.parametrize(
  ("args", "complaint"),
  [
    (["--processes=none", "--program=/bin/true"], "--processes=none is no number"),
    (["--devices=0", "--program=/bin/true"], "--devices=0 is no number"),
    (["--program=/nosuch", "--", "x"], "--program=/nosuch does not exist"),
    (["--", "generate", "model"], "'generate' is no command to launch"),
    (["--", "adapt", "--config=configs/nosuch.py"], "--config=configs/nosuch.py does not exist"),
    (["--", "adapt"], "--config is missing"),
  ],
)
def test_bad_input_is_refused(machine, args, complaint):
  machine.tool("zeda", "")
  result = machine.run("local.sh", *args)
  assert (result.returncode, result.stdout) == (2, "") and complaint in result.stderr
  assert machine.calls() == []


def test_a_port_in_use_is_refused(machine):
  import socket

  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    result = machine.run("local.sh", f"--port={port}", "--program=/bin/true")
  assert result.returncode == 2 and f"--port={port} is in use" in result.stderr


def test_runs_zeda_itself(machine):
  """The command line that the documents give, up to zeda's own complaint."""
  command = ["--processes=2", "--devices=1", "--", "adapt", "--config=configs/tiny.py", "--config.nosuch=1"]
  script = shlex.join([str(LAUNCH / "local.sh"), *command])
  env = {**machine.env, "PATH": f"{pathlib.Path(sys.executable).parent}:{machine.env['PATH']}", "PYTHONPATH": str(ROOT)}
  result = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
  assert result.returncode == 2, result.stdout + result.stderr
  assert "config.nosuch does not exist" in result.stdout
