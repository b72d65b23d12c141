"""Several processes as one: who writes, where they wait for each other, and how arrays pass between host and mesh.

In one process every function here does the plain thing at once, so the code that calls them need not ask.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zeda_jax.distributed.start import describe_process, initialize, leave, wait_for_news
from zeda_jax.sharding import Sharding

__all__ = [
  "Vote",
  "any_process",
  "describe_process",
  "initialize",
  "is_primary",
  "leave",
  "on_mesh",
  "rows_on_mesh",
  "same_for_all",
  "spread_rows",
  "to_host",
  "wait_for_all",
  "wait_for_news",
]


def is_primary() -> bool:
  """Whether this process is the one that writes files and shows progress."""
  return jax.process_index() == 0


def wait_for_all(point: str) -> None:
  """Returns once all processes have come to the same point of the program."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(point)


def same_for_all(tree: Any) -> Any:
  """What the primary process has, on all of them: a tree of numpy arrays or numbers of the same shapes everywhere."""
  return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


def any_process(flag: bool) -> bool:
  """Whether `flag` holds in any of the processes; all must ask, and all get the same answer."""
  return bool(multihost_utils.process_allgather(np.asarray(flag)).any()) if jax.process_count() > 1 else flag


class Vote:
  """`any_process` for every step of a loop, without waiting for the devices: the answer is that of the step before."""

  def __init__(self) -> None:
    self._asked: jax.Array | None = None

  def __call__(self, flag: bool, wait: bool = False) -> bool:
    """Whether any process had its flag set, the same answer in all of them.

    Args:
      flag: of this process.
      wait: answer for this call rather than for the one before, once the devices have done what was given them.
    """
    if jax.process_count() == 1:
      return flag
    before, self._asked = self._asked, _any_on_devices(flag)
    asked = self._asked if wait else before
    return asked is not None and bool(np.asarray(asked))


@functools.cache
def _all_devices() -> tuple[NamedSharding, Any]:
  """One number a device, and the program that gives every device whether any is true."""
  mesh = Mesh(np.asarray(jax.devices()), "all")
  return NamedSharding(mesh, PartitionSpec("all")), jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _any_on_devices(flag: bool) -> jax.Array:
  places, any_of = _all_devices()
  return any_of(jax.make_array_from_process_local_data(places, np.full(jax.local_device_count(), flag)))


def on_mesh(sharding: Sharding | None) -> contextlib.AbstractContextManager[Any]:
  """Context in which programs for a sharded model are traced and run: some kernels ask what the mesh is."""
  return contextlib.nullcontext() if sharding is None else jax.set_mesh(sharding.mesh)


def to_host(tree: Any) -> Any:
  """The whole arrays as numpy on every process, however they are sharded; for small ones."""

  def whole(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)

  return jax.tree.map(whole, tree)


def rows_on_mesh(tree: Any, sharding: Sharding) -> Any:
  """A batch over all devices, from the rows that each process has: those of process 0 come first."""
  rows = NamedSharding(sharding.mesh, PartitionSpec(sharding.rules.tokens))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), tree)


def spread_rows(tree: Any, sharding: Sharding) -> Any:
  """A batch over all devices, from all its rows, which every process has; each places those of its own devices."""
  rows = NamedSharding(sharding.mesh, PartitionSpec(sharding.rules.tokens))

  def place(x: Any) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, rows, lambda index: x[index])

  return jax.tree.map(place, tree)
