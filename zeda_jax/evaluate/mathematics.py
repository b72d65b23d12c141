"""Grading mathematical answers by the library math-verify.

It stops what takes too long by signals, which only a process's main thread may set: call this from one (see worker.py).
"""

from collections.abc import Iterator

from zeda_jax.errors import ZedaError

SECONDS = 5  # for each step of one comparison


def require() -> None:
  """Raises ZedaError if math-verify is not installed."""
  try:
    import math_verify  # noqa: F401
  except ImportError as error:
    raise ZedaError(
      f"math-verify is not installed, which grades mathematics ({error}): pip install 'zeda-jax[evaluate]'."
    ) from error


def same_answer(answer: str, response: str) -> tuple[bool, str]:
  """(right, note): whether the last answer of a response equals the right one.

  Args:
    answer: LaTeX or plain text, such as "\\\\frac{1}{2}" or "0.5".
    response: without its reasoning; a boxed answer is preferred.

  Raises:
    ValueError: the right answer cannot be read.
  """
  from math_verify import parse, verify
  from math_verify.errors import TimeoutException

  wanted = parse(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}", parsing_timeout=SECONDS)
  if not wanted:
    raise ValueError(f"math-verify cannot read the right answer {answer!r}")
  try:
    for text in _readings(response):
      found = parse(text, parsing_timeout=SECONDS, raise_on_error=True)
      if found and verify(wanted, found, timeout_seconds=SECONDS, raise_on_error=True):
        return True, ""
    return False, "" if found else "no answer found"
  except TimeoutException:
    return False, f"the comparison took more than {SECONDS} s"
  except Exception as error:  # an answer that SymPy cannot take is no right answer
    return False, f"{type(error).__name__}: {error}"[:200]


def _readings(response: str) -> Iterator[str]:
  """The response, of whose boxes math-verify makes one set; and its end from its last box on, which may correct it."""
  yield response
  if response.count("\\boxed") > 1:
    yield response[response.rindex("\\boxed") :]
