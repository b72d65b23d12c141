"""Grading programs: in the sandbox, against tests that the problem brings."""

import decimal
import json
import re
from collections.abc import Mapping
from typing import Any

from zeda_jax.evaluate.answers import code_of
from zeda_jax.evaluate.sandbox import Limits, run

# What contest solutions are used to find imported.
_CONTEST_HEADER = """
import sys
sys.setrecursionlimit(50000)
import bisect, collections, copy, datetime, functools, heapq, itertools, math, operator, random, re, string, statistics
from string import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from typing import *
from builtins import *
"""
_FUTURE = re.compile(r"^from __future__ import .*$", re.M)
_CALL = """
def _zeda_call(name, lines):
  import json as _json
  import os as _os
  target = globals().get(name)
  if target is None:
    target = getattr(Solution(), name)
  _os.write(RESULTS, _json.dumps(target(*[_json.loads(line) for line in lines])).encode() + b"\\n")
"""


def grade_function(answer: Mapping[str, Any], response: str, limits: Limits, allow_weak: bool) -> tuple[bool, str]:
  """(right, why not): the solution and then the problem's test program run to their end without an exception.

  Args:
    answer: {"test", "entry_point", "header", "prompt"}; with an entry point, the test defines check(function).
    response: without its reasoning.
    limits: of the run.
    allow_weak: see `sandbox.run`.
  """
  entry = answer["entry_point"]
  code = code_of(response, [entry] if entry else ())
  if entry and not re.search(rf"\bdef\s+{entry}\b|\b{entry}\s*=", code) and answer["prompt"]:
    code = f"{answer['prompt']}{code}"  # a completion of the function's body
  elif answer["header"]:
    code = _after(answer["header"], code)
  call = f"\ncheck({entry})\n" if entry and "def check(" in answer["test"] else "\n"
  outcome = run(f"{code}\n\n{answer['test']}{call}", limits=limits, allow_weak=allow_weak)
  if outcome.status == "passed":
    return True, ""
  return False, f"{outcome.status}: {_last_line(outcome.stderr)}"


def grade_contest(answer: Mapping[str, Any], response: str, limits: Limits, allow_weak: bool) -> tuple[bool, str]:
  """(right, why not): every test's output, or the function's value, is as expected. Stops at the first that is not.

  Args:
    answer: {"tests", "function"}.
    response: without its reasoning.
    limits: of the run of each test.
    allow_weak: see `sandbox.run`.
  """
  function = answer["function"]
  code = _after(_CONTEST_HEADER, code_of(response, [function] if function else ()))
  for number, test in enumerate(answer["tests"], start=1):
    if function:
      lines = [line for line in test["input"].splitlines() if line.strip()]
      outcome = run(f"{code}\n{_CALL}\n_zeda_call({function!r}, {lines!r})\n", limits=limits, allow_weak=allow_weak)
      right = outcome.status == "passed" and _same_value(outcome.report, test["output"])
    else:
      outcome = run(code, test["input"], limits, allow_weak=allow_weak)
      right = outcome.status in ("passed", "exited") and same_output(outcome.stdout, test["output"])
    if not right:
      reason = "wrong output" if outcome.status in ("passed", "exited") else _last_line(outcome.stderr)
      return False, f"test {number} of {len(answer['tests'])}, {outcome.status}: {reason}"
  return True, ""


def _after(header: str, code: str) -> str:
  """The code with a header before it, but for what Python wants first of all."""
  first = _FUTURE.findall(code)
  return "\n".join([*first, header, _FUTURE.sub("", code)])


def _same_value(report: str, expected: str) -> bool:
  try:
    return json.loads(report) == json.loads(expected)
  except (ValueError, RecursionError):
    return False


def same_output(found: str, expected: str) -> bool:
  """Line by line the same text, but for white space around it, or the same decimal numbers."""
  lines, wanted = ([line.strip() for line in text.strip().splitlines()] for text in (found, expected))
  return len(lines) == len(wanted) and all(a == b or _same_numbers(a, b) for a, b in zip(lines, wanted, strict=True))


def _same_numbers(a: str, b: str) -> bool:
  try:
    return [decimal.Decimal(x) for x in a.split()] == [decimal.Decimal(x) for x in b.split()]
  except decimal.InvalidOperation:
    return False


def _last_line(text: str) -> str:
  lines = text.strip().splitlines()
  return lines[-1][:200] if lines else ""
