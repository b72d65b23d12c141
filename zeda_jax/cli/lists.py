"""Comma-separated values of flags."""

from collections.abc import Callable
from typing import TypeVar

from zeda_jax.errors import ZedaError

Value = TypeVar("Value")


def listed(flag: str, text: str, kind: Callable[[str], Value]) -> tuple[Value, ...]:
  """`a,b` as a tuple.

  Raises:
    ZedaError: a part is no such number.
  """
  try:
    return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
  except ValueError:
    example = "1024,2048" if kind is int else "0,0.5"
    raise ZedaError(f"--{flag}={text} is no list of numbers; expected e.g. --{flag}={example}.") from None
