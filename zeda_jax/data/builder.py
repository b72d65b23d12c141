"""A tfds builder that turns prompt or rollout files into array_record; needs no TensorFlow.

    builder = JsonRecords(source="rollouts/*.jsonl", data_dir="data")
    builder.download_and_prepare()
    rollouts.RolloutSource(builder.data_dir)      # or prompts.open_prompts(...), or builder.as_data_source("all")

Importing this module imports tensorflow_datasets (about a second), so nothing else in the package does at the top.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from zeda_jax.data import jsonl, records

# tfds holds a split in memory until it is written, and needs TensorFlow for splits above 1 GB.
MAX_SPLIT_BYTES = 128 * 2**20


class JsonRecords(tfds.core.GeneratorBasedBuilder):
  """JSONL files as array_record: `json` is the text of a record, `source` the file:line it stood at.

  The order of the records is kept. They lie in splits train00000, train00001, ... of bounded size; "all" is the whole.

  Args:
    source: JSONL files, as for `jsonl.JsonLines`.
    max_split_bytes: bounds the memory needed for writing.
    **options: of tfds builders, `data_dir` above all.

  Raises:
    ZedaError: a file is missing or empty, or (while preparing) a line is not a JSON object.
  """

  VERSION = tfds.core.Version("1.0.0")
  # tfds would find it through importlib_resources, which it does not declare as a dependency.
  code_path = epath.Path(__file__)

  def __init__(self, *, source: jsonl.Paths, max_split_bytes: int = MAX_SPLIT_BYTES, **options: Any):
    self._lines = jsonl.JsonLines(source)
    self._max_split_bytes = max_split_bytes
    super().__init__(**{"file_format": "array_record"} | options)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Prompts or rollouts of zeda-jax, one JSON object per record.",
      features=records.example_features(),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    del dl_manager  # nothing is downloaded
    return {f"train{i:05d}": self._generate_examples(part) for i, part in enumerate(self._parts())}

  def _parts(self) -> list[range]:
    """Record ranges of at most `max_split_bytes`, or of one record."""
    bounds, size = [0], 0
    for index in range(len(self._lines)):
      size += self._lines.size(index)
      if size > self._max_split_bytes and index > bounds[-1]:
        bounds.append(index)
        size = self._lines.size(index)
    bounds.append(len(self._lines))
    return [range(start, end) for start, end in itertools.pairwise(bounds)]

  def _generate_examples(self, part: range) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in part:
      line, where = self._lines.raw(index), self._lines.location(index)
      jsonl.parse_object(line, where)
      yield index, {"json": line.strip(), "source": where}
