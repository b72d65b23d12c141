"""samples.jsonl: every response and its score, appended as they come, so that a run that was cut off goes on.

A line with a response is followed, later, by a line with its score; the lines of one sample, by ("task", "id",
"sample"), are merged, the last one first. A line that was being written when the process died is cut off at the next
start. `compact` leaves one line per sample, in order.
"""

import fcntl
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from zeda_jax.data.jsonl import parse_object, write_jsonl
from zeda_jax.errors import ZedaError

Key = tuple[str, str, int]  # task, problem, number of the sample


def key_of(record: Mapping[str, Any], where: str = "samples") -> Key:
  """Which sample a line is about.

  Raises:
    ZedaError: it does not say.
  """
  task, problem, sample = (record.get(name) for name in ("task", "id", "sample"))
  if not (isinstance(task, str) and isinstance(problem, str) and isinstance(sample, int)):
    raise ZedaError(f"{where}: expected 'task' and 'id', both texts, and 'sample', a number: restore the file.")
  return task, problem, sample


class SampleLog:
  """The samples of a run, in a file that only grows. A context manager.

  Args:
    path: of samples.jsonl; made if it is not there.

  Raises:
    ZedaError: a line before the last is broken, or another process writes the file.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    self._stream = open(self.path, "ab")  # noqa: SIM115 - closed by close()
    try:
      fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._stream.close()
      raise ZedaError(
        f"{self.path} is being written by another process: wait for it, or use another --output."
      ) from None
    try:
      self.samples, complete = read_samples(self.path)
      self._stream.truncate(complete)
    except BaseException:
      self._stream.close()
      raise

  def add(self, record: Mapping[str, Any]) -> None:
    """Appends a line, which survives whatever happens to this process."""
    key = key_of(record)
    self._stream.write(json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n")
    self._stream.flush()
    self.samples[key] = self.samples.get(key, {}) | dict(record)

  def of_task(self, task: str) -> list[dict[str, Any]]:
    return [sample for key, sample in self.samples.items() if key[0] == task]

  def compact(self, order: Iterable[Key]) -> None:
    """Replaces the file, at once, by one line per sample: those of `order` first."""
    self.close()
    first = {key: self.samples[key] for key in order if key in self.samples}
    self.samples = first | self.samples
    write_jsonl(self.path, self.samples.values(), overwrite=True)

  def close(self) -> None:
    if not self._stream.closed:
      self._stream.flush()
      os.fsync(self._stream.fileno())
      self._stream.close()

  def __enter__(self) -> "SampleLog":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.close()


def read_samples(path: str | os.PathLike[str]) -> tuple[dict[Key, dict[str, Any]], int]:
  """The merged samples of a file, and the bytes of its complete lines.

  Raises:
    ZedaError: a complete line is broken; file:line is named.
  """
  samples: dict[Key, dict[str, Any]] = {}
  complete = 0
  with open(path, "rb") as stream:
    for number, line in enumerate(stream, start=1):
      if not line.endswith(b"\n"):
        break
      record = parse_object(line, f"{path}:{number}")
      key = key_of(record, f"{path}:{number}")
      samples[key] = samples.get(key, {}) | record
      complete += len(line)
  return samples, complete
