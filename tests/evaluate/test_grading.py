"""Many responses graded at once, by graders that crash and hang."""

import os
import signal

import pytest

from zeda_jax.errors import ZedaError
from zeda_jax.evaluate import grading, sandbox
from zeda_jax.evaluate.grading import GraderFailure, Graders, Verdict, check_graders
from zeda_jax.evaluate.problems import Problem


def problem(answer):
  return Problem("p", "prompt", answer)


NO_COMMA = problem({"instructions": ["punctuation:no_comma"], "kwargs": [{}], "prompt": ""})
FUNCTION = problem({"test": "assert f() == 1", "entry_point": None, "header": "", "prompt": None})


def test_each_grader_in_its_place(punkt):
  letters = {"letter": "B", "letters": "ABCD"}
  contest = {"tests": [{"input": "2", "output": "4"}], "function": None}
  cases = [
    ("exact", problem("a"), " a ", "b"),
    ("number", problem("12"), "It is 12.0", "It is 13"),
    ("math", problem("1/2"), "\\boxed{0.5}", "\\boxed{0.6}"),
    ("choice", problem(letters), "Answer: B", "Answer: C"),
    ("function", FUNCTION, "```python\nf = lambda: 1\n```", "```python\nf = lambda: 2\n```"),
    ("contest", problem(contest), "```python\nprint(2 * int(input()))\n```", "```python\nprint(5)\n```"),
    ("ifeval", NO_COMMA, "One two.", "One, two."),
  ]
  with Graders(num_workers=2) as graders:
    futures = [(graders.submit(name, task, good), graders.submit(name, task, bad)) for name, task, good, bad in cases]
    for (name, *_), (good, bad) in zip(cases, futures, strict=True):
      assert good.result() == Verdict(1.0), name
      assert (bad.result().score, bad.result().failure, bad.result().attempts) == (0.0, "", 1), name


def test_a_failure_is_tried_again_and_is_no_score(monkeypatch):
  calls = []

  def fails(self, grader, answer, response):
    calls.append(response)
    if response == "always" or len(calls) < 3:
      raise GraderFailure("the grader broke")
    return True, ""

  monkeypatch.setattr(Graders, "_once", fails)
  with Graders(num_workers=1) as graders:
    assert graders.submit("exact", problem("a"), "at last").result() == Verdict(1.0, attempts=3)
    assert len(calls) == 3
    failed = graders.submit("exact", problem("a"), "always").result()
  assert failed == Verdict(None, failure="the grader broke", attempts=3) and len(calls) == 6


def test_a_graders_own_mistake_is_a_failure(monkeypatch):
  monkeypatch.setattr(Graders, "_once", lambda *_: 1 / 0)
  with Graders(num_workers=1) as graders:
    found = graders.submit("exact", problem("a"), "a").result()
  assert found == Verdict(None, failure="ZeroDivisionError: division by zero", attempts=3)


def test_a_worker_that_dies_is_replaced(monkeypatch):
  ask = grading._Worker.ask
  killed = []

  def kill_first(self, task):
    if not killed:
      killed.append(self._process.pid)
      os.kill(self._process.pid, signal.SIGKILL)
      self._process.wait()
    return ask(self, task)

  monkeypatch.setattr(grading._Worker, "ask", kill_first)
  with Graders(num_workers=1) as graders:
    assert graders.submit("math", problem("2"), "\\boxed{2}").result() == Verdict(1.0, attempts=2)
  with pytest.raises(ProcessLookupError):
    os.kill(killed[0], 0)


def test_a_worker_that_hangs_is_killed(monkeypatch):
  monkeypatch.setattr(grading, "_WORKER_SECONDS", 0.2)
  worker = grading._Worker()
  try:
    os.kill(worker._process.pid, signal.SIGSTOP)
    with pytest.raises(GraderFailure, match=r"no verdict within 0\.2 s"):
      worker.ask({"grader": "math", "answer": "2", "response": "2"})
  finally:
    worker.stop()
  assert worker._process.returncode == -signal.SIGKILL


def test_a_sandbox_that_does_not_start_is_a_failure(monkeypatch):
  def broken(*_, **__):
    raise sandbox.SandboxFailure("no process")

  monkeypatch.setattr("zeda_jax.evaluate.code.run", broken)
  with Graders(num_workers=1, attempts=2) as graders:
    found = graders.submit("function", FUNCTION, "x").result()
  assert found == Verdict(None, failure="no process", attempts=2)


def test_a_grader_that_refuses_its_problem_is_a_failure():
  with Graders(num_workers=1, attempts=1) as graders:
    found = graders.submit("math", problem(""), "2").result()
  assert found.score is None and "cannot read the right answer" in found.failure


def test_what_is_missing_is_said_before(monkeypatch, punkt):
  check_graders(["ifeval", "math", "choice"], [NO_COMMA, problem("1"), problem({})])
  unknown = problem({"instructions": ["keywords:unknown"], "kwargs": [{}], "prompt": ""})
  with pytest.raises(ZedaError, match="no verifier for keywords:unknown"):
    check_graders(["ifeval"], [unknown])
  monkeypatch.setattr(sandbox, "LAYERS", ())
  monkeypatch.setattr(sandbox, "run", lambda program, **options: real(program, layers=(), **options))
  sandbox.check.cache_clear()
  with pytest.raises(ZedaError, match="cannot be contained here"):
    check_graders(["function"], [FUNCTION])
  check_graders(["function"], [FUNCTION], allow_weak_sandbox=True)
  sandbox.check.cache_clear()


real = sandbox.run
