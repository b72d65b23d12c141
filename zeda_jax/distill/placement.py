"""A batch of any number of rows on the devices of a mesh: empty rows make up what does not divide.

Neither losses nor gradients nor metrics see an empty row: none of its positions is a token, and sums are divided by
numbers of tokens. Rows keep their order, and a row is in the same part of the batch (see step.split_rows) whatever the
mesh and the number of processes: row i always stands at a place that is i modulo the number of parts.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from zeda_jax.distributed import rows_on_mesh, spread_rows
from zeda_jax.sharding import Sharding

Rows = Mapping[str, Shaped[np.ndarray, "B *rest"]]


def place_whole(batch: Rows, sharding: Sharding | None, parts: int) -> Any:
  """A batch that every process has, over all devices; as it is where there is one device."""
  if sharding is None:
    return batch
  return spread_rows(_padded(batch, 0, _num_rows(batch), sharding.num_devices * parts), sharding)


def place_local(batch: Rows, sharding: Sharding | None, parts: int) -> Any:
  """The same of a batch of which every process has equally many rows, those of process 0 first."""
  if sharding is None:
    return batch
  rows, processes = _num_rows(batch), jax.process_count()
  before = [process * rows % parts for process in range(processes)]  # row i stands at a place that is i modulo parts
  devices = sharding.num_devices // processes
  return rows_on_mesh(_padded(batch, before[jax.process_index()], max(before) + rows, devices * parts), sharding)


def _num_rows(batch: Rows) -> int:
  return next(iter(batch.values())).shape[0]


def _padded(batch: Rows, before: int, least: int, multiple: int) -> Rows:
  """The batch with `before` empty rows before its own, and behind them as many as a multiple of at least `least` wants.

  Zeros are an empty row: no segment, no loss.
  """
  total = -(-least // multiple) * multiple

  def pad(x: Shaped[np.ndarray, "B *rest"]) -> Shaped[np.ndarray, "C *rest"]:
    return np.pad(x, ((before, total - before - x.shape[0]), *((0, 0),) * (x.ndim - 1)))

  return {name: pad(x) for name, x in batch.items()}
