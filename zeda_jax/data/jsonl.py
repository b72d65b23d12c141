"""Large JSONL files: random access through a line index, errors with file:line, writing all or nothing."""

import array
import bisect
import contextlib
import errno
import glob
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from zeda_jax.errors import ZedaError

_TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def type_name(value: Any) -> str:
  """What a parsed JSON value is called in an error message."""
  return _TYPE_NAMES.get(type(value), "a number")


def find_files(paths: Paths) -> list[pathlib.Path]:
  """Expands a file, a glob pattern, or a list of them; matches of one pattern come sorted by name.

  Raises:
    ZedaError: a file does not exist, a pattern matches nothing, or a file is listed twice.
  """
  given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
  files: list[pathlib.Path] = []
  for path in (os.fspath(path) for path in given):
    if os.path.isfile(path):  # before globbing: a real file name may contain brackets
      files.append(pathlib.Path(path))
      continue
    matches = sorted(match for match in glob.glob(path) if os.path.isfile(match))
    if not matches:
      raise ZedaError(f"{path} matches no file: expected a data file or a pattern like data/*.jsonl.")
    files.extend(map(pathlib.Path, matches))
  if not files:
    raise ZedaError("no data file was given: expected at least one file or pattern.")
  seen: set[str] = set()
  for file in files:
    if os.path.realpath(file) in seen:
      raise ZedaError(f"{file} is listed twice, which would use its records twice: name each file once.")
    seen.add(os.path.realpath(file))
  return files


def parse_object(line: bytes, where: str) -> dict[str, Any]:
  """One JSON object from its bytes; `where` is the "file:line" for the error.

  Raises:
    ZedaError: not UTF-8, not JSON, or JSON that is not an object.
  """
  try:
    value = json.loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    raise ZedaError(f"{where}: not UTF-8 text (byte {error.start} of the line): save the file as UTF-8.") from error
  except json.JSONDecodeError as error:
    raise ZedaError(
      f"{where}: broken JSON ({error.msg} at column {error.colno}): expected one complete JSON object per line."
    ) from error
  except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
    raise ZedaError(f"{where}: JSON that cannot be read ({error}): simplify it.") from error
  if not isinstance(value, dict):
    raise ZedaError(f"{where}: found {type_name(value)}; expected one JSON object per line.")
  return value


def _scan(file: pathlib.Path) -> Iterator[tuple[int, int, bytes]]:
  """Yields (line number from 1, byte offset, line) of each line that is not blank, holding one line at a time."""
  offset = 0
  with open(file, "rb") as stream:
    for number, line in enumerate(stream, start=1):
      start, offset = offset, offset + len(line)
      if number == 1 and line.startswith(_BYTE_ORDER_MARK):
        start, line = start + len(_BYTE_ORDER_MARK), line[len(_BYTE_ORDER_MARK) :]
      if not line.isspace() and line:
        yield number, start, line


class JsonLines:
  """One or many JSONL files as one sequence of objects.

  Memory: 16 bytes a record (byte offset and line number); records are read from disk when asked for. Safe to use from
  several threads and to send to other processes: each read opens its file, so there is no handle to share. Blank lines
  are skipped.

  Args:
    paths: a file, a glob pattern, or a list of them.

  Raises:
    ZedaError: a file is missing or has no records.
  """

  def __init__(self, paths: Paths):
    self.files = find_files(paths)
    self._sizes = [os.path.getsize(file) for file in self.files]
    self._offsets: list[np.ndarray] = []
    self._lines: list[np.ndarray] = []
    for file in self.files:
      offsets, lines = array.array("q"), array.array("q")
      for number, offset, _ in _scan(file):
        offsets.append(offset)
        lines.append(number)
      if not offsets:
        raise ZedaError(f"{file} is empty: expected one JSON object per line.")
      self._offsets.append(np.frombuffer(offsets, np.int64))
      self._lines.append(np.frombuffer(lines, np.int64))
    self._ends = list(itertools.accumulate(len(offsets) for offsets in self._offsets))

  def __len__(self) -> int:
    return self._ends[-1]

  def _find(self, index: int) -> tuple[int, int]:
    """(file number, record number within the file)."""
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    file = bisect.bisect_right(self._ends, index)
    return file, int(index) - (self._ends[file - 1] if file else 0)

  def _span(self, file: int, record: int) -> tuple[int, int]:
    offsets = self._offsets[file]
    end = int(offsets[record + 1]) if record + 1 < len(offsets) else self._sizes[file]
    return int(offsets[record]), end

  def location(self, index: int) -> str:
    """Where a record stands, as "file:line"."""
    file, record = self._find(index)
    return f"{self.files[file]}:{self._lines[file][record]}"

  def size(self, index: int) -> int:
    """Bytes of a record on disk."""
    start, end = self._span(*self._find(index))
    return end - start

  def raw(self, index: int) -> bytes:
    """The bytes of a record's line, unparsed."""
    file, record = self._find(index)
    start, end = self._span(file, record)
    with open(self.files[file], "rb", buffering=0) as stream:
      data = os.pread(stream.fileno(), end - start, start)
      while len(data) < end - start:
        more = os.pread(stream.fileno(), end - start - len(data), start + len(data))
        if not more:
          raise ZedaError(f"{self.location(index)}: the file became shorter while it was read: restore it, run again.")
        data += more
    return data

  def __getitem__(self, index: int) -> dict[str, Any]:
    return parse_object(self.raw(index), self.location(index))

  def __iter__(self) -> Iterator[dict[str, Any]]:
    for file in self.files:
      for number, _, line in _scan(file):
        yield parse_object(line, f"{file}:{number}")


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[BinaryIO]:
  """A binary file that appears under `path` complete or not at all.

  The bytes go to a hidden file beside the target, which is flushed to disk and renamed when the block ends well and
  removed when it does not. A process killed half-way leaves that hidden file; the next attempt replaces it.

  Raises:
    ZedaError: the target exists and `overwrite` is false, or the disk is full.
  """
  target = pathlib.Path(path)
  partial = target.with_name(f".{target.name}.partial")
  if not overwrite and target.exists():
    raise ZedaError(f"{target} already exists and is not overwritten: remove it or choose another name.")
  try:
    with open(partial, "wb") as stream:
      yield stream
      stream.flush()
      os.fsync(stream.fileno())
    os.replace(partial, target)
    _sync_directory(target.parent)
  except BaseException as error:
    partial.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
      raise ZedaError(
        f"{target}: no space left to write it, nothing was written: free some space, run again."
      ) from error
    raise


def _sync_directory(directory: pathlib.Path) -> None:
  descriptor = os.open(directory, os.O_RDONLY)  # a rename survives a power cut only once its directory is on disk
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_jsonl(path: str | os.PathLike[str], records: Iterable[dict[str, Any]], overwrite: bool = False) -> int:
  """Writes one object per line, atomically, one record in memory at a time; returns the number of records.

  Raises:
    ZedaError: see `atomic_writer`.
    ValueError: a record holds NaN or infinity, which is not JSON.
  """
  count = 0
  with atomic_writer(path, overwrite) as stream:
    for record in records:
      # ASCII escapes, so that a lone surrogate in a user's text cannot make the file unreadable.
      stream.write(json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n")
      count += 1
  return count
