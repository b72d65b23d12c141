"""grain pipelines whose whole position is one number, the global step."""

import sys
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from zeda_jax.data import packing
from zeda_jax.errors import ZedaError


class ExampleSource(Protocol):
  """Tokenized examples with random access, such as `rollouts.RolloutSource`."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...

  def lengths(self) -> Int[np.ndarray, " N"]: ...


class BatchIterator(grain.DatasetIterator):
  """Iterates over a dataset of batches; element s is the batch of global step s.

  The state is {"next_index": s, "data": fingerprint}. It is the same on every process and for any number of processes
  and workers, so a state saved by any process of one run restores any process of another. Orbax and grain's checkpoint
  handlers save it like any grain iterator.

  Args:
    dataset: random access to batches by step.
    fingerprint: of all that decides which batch belongs to a step; a state of other data is refused.
    worker_count: processes that prepare batches; 0 prepares them in a thread.
    plan: how the rows were packed, if they were.
  """

  def __init__(
    self,
    dataset: grain.MapDataset,
    fingerprint: str,
    worker_count: int = 0,
    plan: packing.RowPlan | None = None,
  ):
    super().__init__()
    self.plan = plan
    self._dataset = dataset
    self._fingerprint = fingerprint
    self._worker_count = worker_count
    self._step = 0
    self._inner: grain.DatasetIterator | None = None

  @property
  def num_batches(self) -> int:
    """Steps from the first to the last batch; a huge number for endless data."""
    return len(self._dataset)

  @property
  def step(self) -> int:
    """The step whose batch comes next."""
    return self._step

  def __next__(self) -> Any:
    if self._step >= self.num_batches:
      raise StopIteration
    if self._inner is None:
      self._inner = self._start()
    batch = next(self._inner)
    self._step += 1
    return batch

  def _start(self) -> grain.DatasetIterator:
    # Few batches ahead: grain's default of 500 would hold gigabytes of long rows.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    dataset = self._dataset.slice(slice(self._step, None)).to_iter_dataset(options)
    if self._worker_count:
      if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which only absl.app parses
        flags.FLAGS.mark_as_parsed()
      dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=self._worker_count, per_worker_buffer_size=1)
      )
    return iter(dataset)

  def get_state(self) -> dict[str, Any]:
    return {"next_index": self._step, "data": self._fingerprint}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues from a state of `get_state`, or from {"next_index": global step} alone.

    Raises:
      ZedaError: the state was saved with other data, batch size or seed, where the same step is another batch.
    """
    if state.get("data", self._fingerprint) != self._fingerprint:
      raise ZedaError(
        "the saved data position belongs to other data: the files, batch size, row length, epochs and seed must be "
        "those of the run that is resumed; restore them or start a new run."
      )
    step = int(state["next_index"])
    if not 0 <= step <= self.num_batches:
      raise ZedaError(
        f"the saved data position is step {step}, but there are {self.num_batches} steps: start a new run."
      )
    self._stop()
    self._step = step

  def _stop(self) -> None:
    if self._inner is not None:
      self._inner.close()
    self._inner = None

  def close(self) -> None:
    self._stop()
    super().close()


class _LocalRows:
  """The rows of one process: `rows[step * local + j]` is its row j of the batch of that step."""

  def __init__(
    self, source: ExampleSource, plan: packing.RowPlan, row_length: int, batch_size: int, process: tuple[int, int]
  ):
    self._source, self._plan, self._row_length = source, plan, row_length
    self._batch_size = batch_size
    self._process_index, process_count = process
    self._local = batch_size // process_count

  def __len__(self) -> int:
    return -(-len(self._plan) // self._batch_size) * self._local

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    step, row = divmod(int(index), self._local)
    row += step * self._batch_size + self._process_index * self._local
    examples: Sequence[int] = self._plan[row].tolist() if row < len(self._plan) else []  # past the end: padding
    return packing.pack_row([self._source[example] for example in examples], self._row_length)


def sft_batches(
  source: ExampleSource,
  batch_size: int,
  row_length: int,
  seed: int,
  epochs: int = 1,
  process_index: int = 0,
  process_count: int = 1,
  worker_count: int = 0,
) -> BatchIterator:
  """Packed batches of `epochs` passes over the examples, each reshuffled and repacked.

  Each example is used exactly once per epoch. The last batch is filled with empty rows (segment_ids 0). Process p of P
  gets rows [p B/P, (p+1) B/P) of each global batch of B rows, so the global sequence of batches does not depend on P.

  Args:
    source: N examples with `prompt_tokens` and `response_tokens`.
    batch_size: B, rows of the global batch.
    row_length: T, tokens of a row; longer examples are cut (`iterator.plan.num_truncated` counts them).
    seed: of the shuffles.
    epochs: passes over the data.
    process_index: p.
    process_count: P.
    worker_count: processes that read and pack; 0 reads in a thread.

  Returns:
    An iterator of dicts of [B/P, T] arrays (see `packing.pack_row`) with `num_batches`.

  Raises:
    ZedaError: no examples, B not a multiple of P, or a number that is not positive.
  """
  _check_positive(batch_size=batch_size, row_length=row_length, epochs=epochs)
  _check_processes(batch_size, process_index, process_count)
  if not len(source):
    raise ZedaError("there are no rollouts to train on: expected at least one.")
  lengths = source.lengths()
  plan = packing.join_plans([packing.plan_rows(lengths, row_length, seed, epoch) for epoch in range(epochs)])
  rows = _LocalRows(source, plan, row_length, batch_size, (process_index, process_count))
  dataset = grain.MapDataset.source(rows).batch(batch_size // process_count)
  fingerprint = _fingerprint(lengths, plan.examples, plan.starts, np.asarray([batch_size, row_length]))
  return BatchIterator(dataset, fingerprint, worker_count, plan)


class _ShuffledNumbers:
  """0..N-1 in a new order each epoch, as one endless sequence of batches.

  grain's own shuffle finds a number of a small range by trial, 5 ms each below a dozen prompts.
  """

  def __init__(self, count: int, batch_size: int, seed: int, mine: slice):
    self._count, self._batch_size, self._seed, self._mine = count, batch_size, seed, mine
    self._epochs: dict[int, np.ndarray] = {}

  def __len__(self) -> int:
    return sys.maxsize // self._batch_size

  def __getitem__(self, step: int) -> np.ndarray:
    start = int(step) * self._batch_size
    epochs, places = np.divmod(np.arange(start, start + self._batch_size), self._count)
    return np.asarray([self._order(e)[place] for e, place in zip(epochs.tolist(), places, strict=True)])[self._mine]

  def _order(self, epoch: int) -> np.ndarray:
    order = self._epochs.get(epoch)
    if order is None:
      order = np.random.default_rng([self._seed, epoch]).permutation(self._count)
      self._epochs = {epoch: order}  # the last one used is enough, whatever the number of epochs
    return order


def prompt_batches(
  num_prompts: int, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
  """Endless batches of prompt numbers: one epoch after another, each a new permutation of all prompts.

  No prompt comes twice within an epoch and none is left out. Where an epoch ends inside a batch, the batch goes on with
  the next epoch. Process p of P gets its B/P numbers of each global batch.

  Args:
    num_prompts: N.
    batch_size: B, prompts of the global batch.
    seed: of the permutations.
    process_index: p.
    process_count: P.

  Returns:
    An iterator of int64 [B/P] arrays.

  Raises:
    ZedaError: B is not a multiple of P, or a number is not positive.
  """
  _check_positive(num_prompts=num_prompts, batch_size=batch_size)
  _check_processes(batch_size, process_index, process_count)
  local = batch_size // process_count
  mine = slice(process_index * local, (process_index + 1) * local)
  dataset = grain.MapDataset.source(_ShuffledNumbers(num_prompts, batch_size, seed, mine))
  return BatchIterator(dataset, _fingerprint(np.asarray([num_prompts, batch_size, seed])))


def _fingerprint(*arrays: np.ndarray) -> str:
  checksum = 0
  for values in arrays:
    checksum = zlib.crc32(np.ascontiguousarray(values, np.int64).tobytes(), checksum)
  return f"{checksum:08x}"


def _check_positive(**values: int) -> None:
  for name, value in values.items():
    if value < 1:
      raise ZedaError(f"{name} is {value}; expected a whole number of at least 1.")


def _check_processes(batch_size: int, process_index: int, process_count: int) -> None:
  if batch_size % process_count:
    raise ZedaError(f"batch_size is {batch_size}, not a multiple of the {process_count} processes: choose one that is.")
  if not 0 <= process_index < process_count:
    raise ZedaError(f"process_index is {process_index}; expected 0 to {process_count - 1}.")
