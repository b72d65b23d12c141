"""A process that grades what needs a main thread or may hang: mathematics and instructions.

Reads one JSON object per line, {"grader", "answer", "response"}, and writes one for each, {"score", "detail"} or
{"failure"}. Started and watched by grading.py.
"""

import json
import os
import resource
import sys
from typing import Any

from zeda_jax.errors import ZedaError

_MEMORY = 8 << 30


def grade(grader: str, answer: Any, response: str) -> dict[str, Any]:
  """{"score", "detail"} of one response.

  Raises:
    ZedaError: what it needs is not installed.
  """
  if grader == "math":
    from zeda_jax.evaluate.mathematics import same_answer

    right, detail = same_answer(answer, response)
    return {"score": float(right), "detail": detail}
  from zeda_jax.evaluate.instructions import follows

  verdicts = follows(grader, answer, response)
  missed = [name for name, followed in zip(answer["instructions"], verdicts, strict=True) if not followed]
  return {"score": float(not missed), "detail": f"not followed: {', '.join(missed)}" if missed else ""}


def main() -> None:
  if sys.platform == "linux":  # a worker that SymPy drives out of bounds dies alone
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard), hard))
  # Libraries print; only verdicts may go where they are read.
  out = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)
  for line in sys.stdin:
    task = json.loads(line)
    try:
      verdict = grade(task["grader"], task["answer"], task["response"])
    except ZedaError as error:
      verdict = {"failure": str(error)}
    except Exception as error:
      verdict = {"failure": f"{type(error).__name__}: {error}"}
    out.write(json.dumps(verdict) + "\n")
    out.flush()


if __name__ == "__main__":
  main()
