"""Compiling in a process of its own. The TPU compiler ends its process where it meets a case that it does not foresee;
the plan must not end with it.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from zeda_jax.errors import ZedaError
from zeda_jax.plan.aot import ENVIRONMENT, TOO_FEW_TO_BE_QUICK, Compiled
from zeda_jax.plan.program import Sent
from zeda_jax.plan.worker import Job

_WORKER = "zeda_jax.plan.worker"


class CompilerCrash(Exception):
  """The TPU compiler ended its process; the text says with what words."""


def compile_apart(job: Job, devices: int) -> Compiled:
  """What the compiler says of a job; `job.quickly` is decided here.

  The compiler is asked to be quick first, where that is known to work, and once more in full if it crashes.

  Raises:
    ZedaError: the compiler takes no such program or topology.
    CompilerCrash: it crashed each time.
  """
  quick = [True] if devices > TOO_FEW_TO_BE_QUICK else []
  crash = CompilerCrash()
  for quickly in (*quick, False):
    try:
      return _run(dataclasses.replace(job, quickly=quickly))
    except CompilerCrash as error:
      crash = error
  raise crash


def _run(job: Job) -> Compiled:
  with tempfile.TemporaryDirectory(prefix="zeda-plan-") as scratch:
    answer = pathlib.Path(scratch) / "answer.json"
    root = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    child = subprocess.run(
      [sys.executable, "-m", _WORKER, str(answer)],
      input=json.dumps(dataclasses.asdict(job)),
      env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      errors="replace",
      check=False,
    )
    if child.returncode < 0:
      raise CompilerCrash(crash_reason(child.stderr, -child.returncode))
    if child.returncode or not answer.is_file():
      lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
      raise ZedaError(f"The program cannot be compiled: {lines[-1][:400]}")
    found = json.loads(answer.read_text())
  if "error" in found:
    raise ZedaError(found["error"])
  traffic = found.pop("traffic")
  return Compiled(**found, traffic=None if traffic is None else [Sent(*sent) for sent in traffic])


def crash_note(crash: CompilerCrash) -> str:
  """What the plan says beside an estimate that should have been compiled."""
  return f"The TPU compiler crashed on this plan ({crash}): these numbers are an estimate from shapes."


def crash_reason(output: str, signal: int) -> str:
  """In a few words, what the compiler said before it ended."""
  if signal == 9:
    return "killed, as where memory runs out"
  found = re.search(r"Check fail(?:ed|ure)[^\n]*", output)
  return " ".join(found[0].split())[:160] if found else f"signal {signal}"
