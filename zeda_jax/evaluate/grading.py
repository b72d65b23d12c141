"""Grading many responses at once: each in the place that suits it, with retries, and failures that are not scores."""

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from zeda_jax.errors import ZedaError
from zeda_jax.evaluate import code, instructions, mathematics, sandbox
from zeda_jax.evaluate.answers import chosen_letter
from zeda_jax.evaluate.graders import GRADERS
from zeda_jax.evaluate.problems import Problem

ATTEMPTS = 3
_IN_WORKER = ("math", "ifeval", "ifbench")
_WORKER_SECONDS = 120.0  # for one response; the first also pays for imports


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What became of grading one response.

  Attributes:
    score: 1 right, 0 wrong; None: it could not be graded.
    detail: why it is wrong, where the grader says so.
    failure: why it could not be graded.
    attempts: how often it was tried.
  """

  score: float | None
  detail: str = ""
  failure: str = ""
  attempts: int = 1


class GraderFailure(Exception):
  """The grader, not the response, is at fault. Worth another try."""


def check_graders(graders: Sequence[str], problems: Sequence[Problem], allow_weak_sandbox: bool = False) -> None:
  """Makes sure, before anything is generated, that all that will be needed is there.

  Args:
    graders: of each problem.
    problems: to be graded.
    allow_weak_sandbox: see `sandbox.run`.

  Raises:
    ZedaError: a library, a model of one, or the means to contain programs are missing.
  """
  kinds = set(graders)
  if "math" in kinds:
    mathematics.require()
  for benchmark in kinds & set(instructions.REGISTRIES):
    asked = (p.answer["instructions"] for p, grader in zip(problems, graders, strict=True) if grader == benchmark)
    instructions.check_known(benchmark, (name for names in asked for name in names))
  if kinds & {"function", "contest"}:
    sandbox.check(allow_weak_sandbox)


class Graders:
  """Grades responses in the background. A context manager: what it started ends with it.

  Args:
    num_workers: responses graded at once. None: one for each processor.
    limits: of a program's run.
    allow_weak_sandbox: see `sandbox.run`.
    attempts: before a response counts as failed.
  """

  def __init__(
    self,
    num_workers: int | None = None,
    limits: sandbox.Limits | None = None,
    allow_weak_sandbox: bool = False,
    attempts: int = ATTEMPTS,
  ):
    self.limits, self.allow_weak, self.attempts = limits or sandbox.Limits(), allow_weak_sandbox, attempts
    self._threads = ThreadPoolExecutor(num_workers or os.cpu_count() or 1, "grader")
    self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

  def __enter__(self) -> "Graders":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._threads.shutdown(wait=True, cancel_futures=kind is not None)
    with contextlib.suppress(queue.Empty):
      while True:
        self._idle.get_nowait().stop()

  def submit(self, grader: str, problem: Problem, response: str) -> "Future[Verdict]":
    """Grades one response (without its reasoning); the future never raises but for a ZedaError."""
    return self._threads.submit(self._grade, grader, problem, response)

  def _grade(self, grader: str, problem: Problem, response: str) -> Verdict:
    failure = ""
    for attempt in range(1, self.attempts + 1):
      try:
        right, detail = self._once(grader, problem.answer, response)
        return Verdict(float(right), detail, attempts=attempt)
      except ZedaError:  # nothing can be graded on this machine
        raise
      except (GraderFailure, sandbox.SandboxFailure) as error:
        failure = str(error)
      except Exception as error:  # a grader's own mistake on one response must not end the others' work
        failure = f"{type(error).__name__}: {error}"
    return Verdict(None, failure=failure, attempts=self.attempts)

  def _once(self, grader: str, answer: Any, response: str) -> tuple[bool, str]:
    if grader == "function":
      return code.grade_function(answer, response, self.limits, self.allow_weak)
    if grader == "contest":
      return code.grade_contest(answer, response, self.limits, self.allow_weak)
    if grader == "choice":
      letter = chosen_letter(response, answer["letters"])
      return letter == answer["letter"], "" if letter else "no letter found"
    if grader in _IN_WORKER:
      return self._in_worker({"grader": grader, "answer": answer, "response": response})
    return GRADERS[grader](response, answer), ""

  def _in_worker(self, task: dict[str, Any]) -> tuple[bool, str]:
    try:
      worker = self._idle.get_nowait()
    except queue.Empty:
      worker = _Worker()
    try:
      verdict = worker.ask(task)
    except BaseException:
      worker.stop()
      raise
    self._idle.put(worker)
    if "failure" in verdict:
      raise GraderFailure(verdict["failure"])
    return bool(verdict["score"]), verdict["detail"]


class _Worker:
  """A process of worker.py."""

  def __init__(self) -> None:
    self._process = subprocess.Popen(
      [sys.executable, "-m", "zeda_jax.evaluate.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

  def ask(self, task: dict[str, Any]) -> dict[str, Any]:
    """Its verdict.

    Raises:
      GraderFailure: it died or took too long.
    """
    process, is_late = self._process, threading.Event()
    assert process.stdin is not None and process.stdout is not None

    def stop() -> None:
      is_late.set()
      process.kill()

    timer = threading.Timer(_WORKER_SECONDS, stop)
    timer.start()
    try:
      process.stdin.write(json.dumps(task) + "\n")
      process.stdin.flush()
      line = process.stdout.readline()
    except OSError as error:
      raise GraderFailure(f"the grader's process is gone ({error})") from error
    finally:
      timer.cancel()
    if not line.endswith("\n"):
      why = f"no verdict within {_WORKER_SECONDS:g} s" if is_late.is_set() else f"it died ({process.wait()})"
      raise GraderFailure(f"the grader's process: {why}")
    return json.loads(line)

  def stop(self) -> None:
    self._process.kill()
    self._process.wait()
    for stream in (self._process.stdin, self._process.stdout):
      if stream is not None:
        with contextlib.suppress(OSError):
          stream.close()
