"""One face for records on disk, whether JSONL or array_record."""

import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol

from grain.sources import ArrayRecordDataSource

from zeda_jax.data import jsonl
from zeda_jax.errors import ZedaError


class Records(Protocol):
  """A sequence of JSON objects on disk, each with a place to name in errors. Picklable, and safe in threads."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...

  def __iter__(self) -> Iterator[dict[str, Any]]: ...

  def location(self, index: int) -> str:
    """Where the record stands, as "file:line"."""
    ...


class ArrayRecords:
  """array_record files as one sequence of objects.

  A payload is the JSON text itself, or a tf.Example written by `builder.JsonRecords` (read without TensorFlow).

  Raises:
    ZedaError: a file is missing, damaged or empty.
  """

  def __init__(self, paths: jsonl.Paths):
    self.files = jsonl.find_files(paths)
    try:
      self._source = ArrayRecordDataSource([os.fspath(file) for file in self.files])
    except Exception as error:  # the C++ reader raises whatever its status code maps to
      names = ", ".join(map(str, self.files))
      raise ZedaError(
        f"{names}: not readable as array_record ({_first_line(error)}): write the files again."
      ) from error
    if not len(self._source):
      raise ZedaError(f"{', '.join(map(str, self.files))} is empty: expected array_record files with records.")

  def __len__(self) -> int:
    return len(self._source)

  def location(self, index: int) -> str:
    """The line the record was built from, if it was written by `builder.JsonRecords`; else its number."""
    return self._payload(index)[1]

  def _payload(self, index: int) -> tuple[bytes, str]:
    """(JSON text, where it stands)."""
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    where = f"{self.files[0]}{' and following' if len(self.files) > 1 else ''}, record {index}"
    try:
      payload = self._source[index]
    except Exception as error:
      raise ZedaError(f"{where}: damaged ({_first_line(error)}): write the file again.") from error
    if payload[:1] == b"{":
      return payload, where
    try:
      example = example_features().deserialize_example_np(payload)
    except Exception as error:
      raise ZedaError(
        f"{where}: neither a JSON object nor a record of zeda_jax.data.builder: build it anew."
      ) from error
    return example["json"], example["source"].decode() or where

  def __getitem__(self, index: int) -> dict[str, Any]:
    return jsonl.parse_object(*self._payload(index))

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return (self[index] for index in range(len(self)))


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]


@functools.cache
def example_features() -> Any:
  """The tfds features of a record: its JSON text and the file:line it came from."""
  import tensorflow_datasets as tfds  # a second to import, and most runs read JSONL

  return tfds.features.FeaturesDict({"json": tfds.features.Text(), "source": tfds.features.Text()})


def open_records(paths: jsonl.Paths) -> Records:
  """Opens JSONL files, array_record files or a directory of either.

  A directory stands for its *.jsonl files, or, when it has none, for its *.array_record* files (the version directory
  of a tfds data set, for one).

  Raises:
    ZedaError: nothing is found, a file is empty, or the two kinds are mixed.
  """
  given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
  files = [file for path in given for file in _expand_directory(os.fspath(path))]
  files = [os.fspath(file) for file in jsonl.find_files(files)]
  kinds = {".array_record" in os.path.basename(file) for file in files}
  if len(kinds) == 2:
    raise ZedaError(f"{', '.join(files)} mix JSONL with array_record: give files of one kind.")
  return ArrayRecords(files) if kinds == {True} else jsonl.JsonLines(files)


def _expand_directory(path: str) -> list[str]:
  if not os.path.isdir(path):
    return [path]
  for pattern in ("*.jsonl", "*.array_record*"):
    if files := sorted(map(os.fspath, pathlib.Path(path).glob(pattern))):
      return files
  raise ZedaError(f"{path} is a directory without *.jsonl or *.array_record* files: give it some or name the files.")
