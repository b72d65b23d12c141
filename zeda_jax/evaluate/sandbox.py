"""Untrusted programs in processes of their own: bounded, without network, and unable to change anything outside.

A program runs in a fresh Python process (`sandbox_child.py`, which lists what contains it) in a session and a temporary
directory of its own, with an empty environment. Its output goes to files of bounded size. When its time is over, the
whole session is killed. Nothing of it is imported, unpickled or evaluated here.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Literal

from zeda_jax.errors import ZedaError
from zeda_jax.evaluate.sandbox_child import UNCONTAINED

LAYERS = ("mounts", "landlock", "seccomp")
_CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one program may use.

  Attributes:
    cpu_seconds: of all its threads; what decides whether a program is too slow, whatever else the machine does.
    wall_seconds: after which it is killed, for programs that wait.
    memory_bytes: of address space.
    file_bytes: of one file, of its output and of what it reports.
    disk_bytes: of all files in its working directory, which lie in memory (where namespaces are to be had).
    open_files: at once.
  """

  cpu_seconds: int = 10
  wall_seconds: float = 30.0
  memory_bytes: int = 4 << 30
  file_bytes: int = 16 << 20
  disk_bytes: int = 64 << 20
  open_files: int = 64

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      if getattr(self, field.name) <= 0:
        raise ZedaError(f"{field.name} is {getattr(self, field.name)}; expected more than 0.")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a program ended.

  Attributes:
    status: "passed": it ran to its end without an exception. "exited": it called exit with 0. "failed": an exception,
      or another exit status. "killed": by a signal, as for too much CPU time. "timeout": killed after wall_seconds.
    stdout, stderr: what it wrote, as far as the limit.
    report: what it wrote to the file descriptor RESULTS, a global of the program.
    layers: of LAYERS, those it ran in.
    seconds: from start to end.
  """

  status: Literal["passed", "exited", "failed", "killed", "timeout"]
  stdout: str
  stderr: str
  report: str
  layers: tuple[str, ...]
  seconds: float


class SandboxFailure(Exception):
  """The machine, not the program: no process, no directory, or no start in time. Worth another try."""


def run(
  program: str,
  stdin: str = "",
  limits: Limits | None = None,
  *,
  layers: Sequence[str] = LAYERS,
  allow_weak: bool = False,
) -> Outcome:
  """Runs a Python program and waits for it. Safe to call from several threads.

  Args:
    program: source text; what it does at its end is seen in `Outcome`.
    stdin: what it can read.
    limits: None means the defaults.
    layers: to try.
    allow_weak: run it though the machine offers too few layers to contain it (see `check`).

  Raises:
    SandboxFailure: it could not be started.
    ZedaError: the machine cannot contain it, and allow_weak is false.
  """
  limits = limits or Limits()
  try:
    with tempfile.TemporaryDirectory(prefix="zeda-sandbox-", ignore_cleanup_errors=True) as name:
      return _run_in(pathlib.Path(name).resolve(), program, stdin, limits, layers, allow_weak)
  except OSError as error:
    raise SandboxFailure(f"{type(error).__name__}: {error}") from error


def _run_in(
  place: pathlib.Path, program: str, stdin: str, limits: Limits, layers: Sequence[str], allow_weak: bool
) -> Outcome:
  directory = place / "work"
  directory.mkdir()
  files = {name: place / name for name in ("program", "specification", "stdin", "stdout", "stderr", "results")}
  files["program"].write_text(program, encoding="utf-8", errors="surrogatepass")
  files["stdin"].write_text(stdin, encoding="utf-8", errors="replace")
  token = secrets.token_hex(16)
  environment = {
    "PATH": os.defpath,
    "HOME": str(directory),
    "TMPDIR": str(directory),
    "LANG": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
  }
  start = time.monotonic()
  with (
    open(files["stdin"], "rb") as inputs,
    open(files["stdout"], "wb") as out,
    open(files["stderr"], "wb") as err,
    open(files["results"], "w+b") as results,
  ):
    specification = {
      "program": str(files["program"]),
      "directory": str(directory),
      "limits": dataclasses.asdict(limits),
      "results": results.fileno(),
      "token": token,
      "layers": list(layers),
      "allow_weak": allow_weak,
    }
    files["specification"].write_text(json.dumps(specification))
    process = subprocess.Popen(
      [sys.executable, "-I", "-X", "utf8", str(_CHILD), str(files["specification"])],
      stdin=inputs,
      stdout=out,
      stderr=err,
      pass_fds=(results.fileno(),),
      cwd=directory,
      env=environment,
      start_new_session=True,
    )
    has_ended = _wait(process, limits.wall_seconds)
  report = _read(files["results"], limits)
  stderr = _read(files["stderr"], limits)
  if not report.startswith("ready "):
    raise SandboxFailure(f"the process did not start: exit status {process.returncode}. {stderr[-500:]}")
  head, _, report = report.partition("\n")
  if process.returncode == UNCONTAINED and not allow_weak:
    raise ZedaError(_weak(head.removeprefix("ready ")))
  passed = report.endswith(token)
  if not has_ended:
    status = "timeout"
  elif process.returncode < 0:
    status = "killed"
  elif process.returncode:
    status = "failed"
  else:
    status = "passed" if passed else "exited"
  return Outcome(
    status,  # type: ignore[arg-type]
    _read(files["stdout"], limits),
    stderr,
    report.removesuffix(token),
    tuple(filter(None, head.removeprefix("ready ").split(","))),
    time.monotonic() - start,
  )


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
  """Waits for the process, then kills its session. False if its time was over."""
  is_late = threading.Event()

  def stop() -> None:
    is_late.set()
    _kill(process)

  timer = threading.Timer(seconds, stop)
  timer.start()
  try:
    process.wait()  # without a timeout, which would poll
  finally:
    timer.cancel()
    _kill(process)
    process.wait()
  return not is_late.is_set()


def _kill(process: subprocess.Popen[bytes]) -> None:
  with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of it
    os.killpg(process.pid, signal.SIGKILL)


def _read(file: pathlib.Path, limits: Limits) -> str:
  with open(file, "rb") as stream:
    return stream.read(limits.file_bytes).decode("utf-8", errors="replace")


def _weak(layers: str) -> str:
  found = layers.replace(",", ", ") or "none"
  return (
    f"programs cannot be contained here: of {', '.join(LAYERS)} this machine offers {found}; expected seccomp, and "
    "mounts or landlock (Linux 5.13 or newer on x86_64 or aarch64). Run code tasks on such a machine, or, where "
    "nothing can be lost, with --allow-weak-sandbox."
  )


@functools.cache
def check(allow_weak: bool = False) -> tuple[str, ...]:
  """The layers that contain programs on this machine.

  Raises:
    ZedaError: too few of them, and allow_weak is false; or no process can be started at all.
  """
  try:
    return run("pass", allow_weak=allow_weak).layers
  except SandboxFailure as error:
    raise ZedaError(f"no sandboxed process can be started on this machine: {error}") from error
