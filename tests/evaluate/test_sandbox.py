"""What programs can do in the sandbox, and what they cannot."""

import dataclasses
import os
import pathlib
import threading
import time

import pytest

from zeda_jax.errors import ZedaError
from zeda_jax.evaluate import sandbox
from zeda_jax.evaluate.sandbox import Limits, run

SHORT = Limits(cpu_seconds=1, wall_seconds=1.5)
HERE = pathlib.Path(__file__).resolve()


def processes_of(directory="zeda-sandbox-"):
  """Command lines of sandboxed processes that are alive."""
  found = []
  for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      found.append(entry.read_bytes())
    except OSError:
      continue
  return [line for line in found if directory.encode() in line]


@pytest.mark.parametrize(
  ("program", "status", "stdout"),
  [
    ("print(input() * 2)", "passed", "abab\n"),
    ("import sys; print(1); sys.exit()", "exited", "1\n"),
    ("import sys; sys.exit('no')", "failed", ""),
    ("import os; os._exit(0)", "exited", ""),
    ("assert False", "failed", ""),
    ("1 +", "failed", ""),
    ("class A:\n  pass\nassert A.__module__ == '__main__' == __name__", "passed", ""),
    ("import dataclasses\n@dataclasses.dataclass\nclass A:\n  x: int\nprint(A(1))", "passed", "A(x=1)\n"),
    ("import threading; t = threading.Thread(target=print, args=(3,)); t.start(); t.join()", "passed", "3\n"),
    ("open('a', 'w').write('x'); print(open('a').read())", "passed", "x\n"),
    ("import numpy; print(int(numpy.eye(3).sum()))", "passed", "3\n"),
  ],
)
def test_ordinary_programs(program, status, stdout):
  outcome = run(program, stdin="ab\n")
  assert (outcome.status, outcome.stdout) == (status, stdout), outcome.stderr


def test_an_error_is_told():
  assert "ZeroDivisionError" in run("1 / 0").stderr


def test_values_are_reported_apart_from_output():
  outcome = run("import os; print('noise'); os.write(RESULTS, b'42')")
  assert (outcome.status, outcome.report, outcome.stdout) == ("passed", "42", "noise\n")


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_endless_programs_are_stopped(program):
  start = time.monotonic()
  assert run(program, limits=SHORT).status in ("killed", "timeout")
  assert time.monotonic() - start < 20
  assert not processes_of()


def test_processor_time_decides_however_busy_the_machine_is():
  assert run("while True: pass", limits=Limits(cpu_seconds=1, wall_seconds=60)).status == "killed"


def test_a_program_cannot_refuse_to_stop():
  program = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
  assert run(program, limits=Limits(cpu_seconds=1, wall_seconds=60)).status == "killed"


@pytest.mark.parametrize(
  "program",
  [
    "import os\nwhile True: os.fork()",
    "import subprocess; subprocess.run(['true'])",
    "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "import multiprocessing as m; p = m.Process(target=print); p.start(); p.join(); assert p.exitcode == 0",
  ],
)
def test_no_processes(program):
  outcome = run(program, limits=SHORT)
  assert outcome.status == "failed" and "not permitted" in outcome.stderr
  assert not processes_of()


def test_memory():
  outcome = run("x = bytearray(10 << 30); x[::4096] = b'1' * len(x[::4096])")
  assert outcome.status == "failed" and "MemoryError" in outcome.stderr


def test_many_threads_run_into_the_memory_limit():
  program = "import threading, time\nfor _ in range(100000): threading.Thread(target=time.sleep, args=(99,)).start()"
  assert run(program, limits=SHORT).status in ("failed", "killed", "timeout")
  assert not processes_of()


def test_writing_outside(tmp_path):
  for place in (tmp_path, HERE.parent, pathlib.Path("/tmp"), pathlib.Path.home(), pathlib.Path("/dev/shm")):
    target = place / "written-by-a-sandboxed-program"
    outcome = run(f"open({str(target)!r}, 'w').write('x')")
    assert outcome.status == "failed" and not target.exists(), place


def test_deleting_and_changing_outside(tmp_path):
  kept = tmp_path / "kept"
  kept.write_text("as it was")
  for program in ("os.remove(p)", "os.truncate(p, 0)", "os.rename(p, 'x')", "os.chmod(p, 0)", "os.symlink(p, p + '2')"):
    assert run(f"import os; p = {str(kept)!r}; {program}").status == "failed", program
  assert kept.read_text() == "as it was" and os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize("size", ["x = b'1' * (60 << 20); open('a', 'wb').write(x)", "while True: print('x' * 10000)"])
def test_files_are_bounded(size):
  outcome = run(size, limits=dataclasses.replace(Limits(), cpu_seconds=5))
  assert outcome.status in ("failed", "killed") and len(outcome.stdout) <= Limits().file_bytes


def test_the_disk_is_bounded():
  if "mounts" not in sandbox.check():
    pytest.skip("no namespaces on this machine: each file is bounded, their number is not")
  outcome = run("for i in range(20): open(f'{i}', 'wb').write(b'1' * (8 << 20))")
  assert outcome.status == "failed" and "No space left" in outcome.stderr


@pytest.mark.parametrize(
  "program",
  [
    "import socket; socket.socket()",
    "import socket; socket.create_connection(('127.0.0.1', 80))",
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1')",
  ],
)
def test_no_network(program):
  outcome = run(program)
  assert outcome.status == "failed" and "not permitted" in outcome.stderr


@pytest.mark.parametrize(
  "program",
  [
    "os.kill(os.getppid(), 9)",
    "os.kill(TESTS, 0)",
    "os.killpg(os.getpgid(os.getppid()), 9)",
    "open(HERE)",
    "open(f'/proc/{TESTS}/environ', 'rb').read()",
    "os.listdir(os.path.expanduser('~root'))",
  ],
)
def test_others_are_out_of_reach(program):
  outcome = run(f"import os; TESTS, HERE = {os.getpid()}, {str(HERE)!r}; {program}")
  assert outcome.status == "failed" and "NameError" not in outcome.stderr


def test_the_environment_is_not_passed_on(monkeypatch):
  monkeypatch.setenv("SECRET_TOKEN", "secret")
  assert "secret" not in run("import os; print(dict(os.environ))").stdout


def test_several_at_once():
  outcomes = {}
  threads = [
    threading.Thread(
      target=lambda i=i: outcomes.update({i: run(f"open('a', 'w').write('{i}'); print(open('a').read())")})
    )
    for i in range(8)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [outcomes[i].stdout for i in range(8)] == [f"{i}\n" for i in range(8)]


@pytest.mark.parametrize("layers", [("seccomp", "landlock"), ("seccomp", "mounts")])
def test_either_layer_protects_files(layers, tmp_path):
  if not set(layers) <= set(sandbox.check()):
    pytest.skip("this machine does not have both")
  target = tmp_path / "x"
  outcome = run(f"open({str(target)!r}, 'w')", layers=layers)
  assert outcome.layers == tuple(layer for layer in sandbox.LAYERS if layer in layers)
  assert outcome.status == "failed" and not target.exists()
  assert run("open('a', 'w').write('x')", layers=layers).status == "passed"


@pytest.mark.parametrize("layers", [(), ("seccomp",), ("landlock", "mounts")])
def test_too_few_layers_are_refused(layers):
  with pytest.raises(ZedaError, match="--allow-weak-sandbox"):
    run("pass", layers=layers)
  assert run("print(1)", layers=layers, allow_weak=True).stdout == "1\n"


def test_a_process_that_does_not_start_is_no_verdict(monkeypatch):
  monkeypatch.setattr(sandbox, "_CHILD", pathlib.Path("/nonexistent.py"))
  with pytest.raises(sandbox.SandboxFailure, match="did not start"):
    run("pass")
