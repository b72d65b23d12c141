"""How several processes fail, decide and write as one: an error in one of them is an error in all.

A process that raised alone would leave the others waiting for it in the next exchange between devices. So what may fail
in some processes only (files above all) is done inside `together`, or on the primary process alone by `from_primary`.
In one process these functions do the plain thing.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from zeda_jax.distributed import is_primary, same_for_all
from zeda_jax.errors import ZedaError

T = TypeVar("T")
_MESSAGE_BYTES = 2048


def raise_together(error: Exception | None = None) -> None:
  """Returns if no process has an error; else raises in all, in each its own or one that tells of the others'.

  All processes must call it the same number of times.

  Raises:
    Exception: `error`, where there is one.
    ZedaError: another process has one.
  """
  if jax.process_count() == 1:
    if error is not None:
      raise error
    return
  message = np.zeros(_MESSAGE_BYTES, np.uint8)
  if error is not None:
    text = str(error) if isinstance(error, ZedaError) else f"{type(error).__name__}: {error}"
    data = np.frombuffer((text or "failed").encode()[:_MESSAGE_BYTES], np.uint8)
    message[: len(data)] = data
  messages = np.asarray(multihost_utils.process_allgather(message))
  if error is None:
    failed = np.flatnonzero(messages[:, 0])
    if not len(failed):
      return
    first = int(failed[0])
    text = bytes(messages[first]).rstrip(b"\0").decode(errors="replace")
    error = ZedaError(f"process {first} of {jax.process_count()} stopped: {text}")
  error.told_to_all = True  # type: ignore[attr-defined]
  raise error


def together(action: Callable[[], T]) -> T:
  """The result of `action`, which every process runs; if it fails in one, this raises in all (see raise_together).

  The action may itself call `raise_together`, as often in all processes: one that fails leaves it early.
  """
  if jax.process_count() == 1:
    return action()
  try:
    result = action()
  except Exception as error:
    if getattr(error, "told_to_all", False):
      raise
    raise_together(error)
    raise
  raise_together()
  return result


def from_primary(action: Callable[[], Any]) -> Any:
  """What `action` gives on the primary process, which alone runs it, in all of them.

  It must return something that JSON can carry, and compute nothing on devices. Once this returns, all processes know
  that the files it wrote are there. What it raises is raised in all.
  """
  if jax.process_count() == 1:
    return action()
  value = together(lambda: json.dumps(action()) if is_primary() else "").encode()
  size = int(same_for_all(np.int32(len(value))))
  buffer = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)  # few sizes: each compiles a program
  buffer[: len(value)] = np.frombuffer(value, np.uint8)
  return json.loads(bytes(np.asarray(same_for_all(buffer), np.uint8)[:size]))
