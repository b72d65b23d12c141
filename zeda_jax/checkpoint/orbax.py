"""Orbax checkpoints: the state of a running training, and a model's parameters alone."""

import base64
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from zeda_jax.checkpoint.directory import list_side_files, new_directory
from zeda_jax.checkpoint.params import ShardingRule
from zeda_jax.checkpoint.safetensors_io import write_synced
from zeda_jax.config import read_config, to_hf
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder, abstract_decoder


class Restored(NamedTuple):
  """What `CheckpointStore.restore` brings back."""

  step: int
  state: Any  # the structure, dtypes and shardings of the abstract state
  data_state: Any  # what the iterator's get_state gave when it was saved
  metadata: dict[str, Any]


class CheckpointStore:
  """Training checkpoints under one directory, `{directory}/{step}`, written in the background.

  A checkpoint holds the train state (any pytree of arrays, PRNG keys included), the position of the data iterator and
  a small JSON of metadata. It is built under a temporary name and renamed when every process has written its part, so
  processes killed while saving leave nothing that counts as a checkpoint; such remains are removed on start.

  With several processes all call the same methods at the same points, with the same data position. What they save is
  restored by any number of processes onto any mesh.

  Args:
    directory: where the checkpoints go; created if needed.
    keep: how many of the newest checkpoints stay.
    async_save: write in the background; `save` returns as soon as the arrays are copied to the host.
  """

  def __init__(self, directory: str | os.PathLike[str], keep: int = 2, async_save: bool = True):
    if keep < 1:
      raise ZedaError(f"keep is {keep}; expected at least 1 checkpoint to be kept.")
    directory = os.fspath(directory)
    self.directory = directory if "://" in directory else str(pathlib.Path(directory).absolute())
    self._writing: int | None = None
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=async_save,
        # Directories made in the background report a failure only after a timeout of minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "metadata": ocp.JsonCheckpointHandler(),
      },
    )

  def latest_step(self) -> int | None:
    """The newest step saved (or being saved), None if there is none."""
    return self._manager.latest_step()

  def step_directory(self, step: int) -> str:
    return f"{self.directory}/{step}"

  def save(self, step: int, state: Any, data_state: Any = None, metadata: Mapping[str, Any] | None = None) -> None:
    """Starts saving; a step that is saved already is left as it is.

    Args:
      step: number of finished steps, larger than every saved one.
      state: pytree of arrays; may be donated or changed as soon as this returns.
      data_state: JSON-able or bytes, as a grain iterator's `get_state()` gives it; the same in all processes.
      metadata: small and JSON-able; comes back on restore.

    Raises:
      ZedaError: writing this checkpoint, or the one before it in the background, failed; or the processes do not
        stand at the same place of the data.
    """
    if step == self.latest_step():
      return
    position = _encode(data_state)
    _check_same_position(position)
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(_flatten(state)),
      data=ocp.args.JsonSave(position),
      metadata=ocp.args.JsonSave(dict(metadata or {})),
    )
    self.wait()  # so that a failure is told with the right step; orbax would wait here, too
    self._writing = step
    try:
      self._manager.save(step, args=items)
    except Exception as error:
      raise self._cannot("write", step, error) from error

  def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
    """Reads a checkpoint into the structure of `abstract_state`.

    Args:
      abstract_state: pytree of arrays or jax.ShapeDtypeStruct; their shardings are the ones restored to, whatever
        devices the checkpoint was written from.
      step: which one; the newest by default.

    Raises:
      ZedaError: there is no checkpoint, it cannot be read, or it does not have the arrays of `abstract_state`.
    """
    self.wait()
    step = self.latest_step() if step is None else step
    if step is None:
      raise ZedaError(f"{self.directory} has no complete checkpoint to restore.")
    abstract = {name: _abstract(leaf) for name, leaf in _flatten(abstract_state).items()}
    try:
      saved = self._manager.item_metadata(step)["state"].tree
    except Exception as error:
      raise self._cannot("read", step, error) from error
    _check_same_arrays(abstract, saved, f"{self.step_directory(step)} does not fit this run", _OTHER_RUN)
    items = {"state": ocp.args.StandardRestore(abstract), "metadata": ocp.args.JsonRestore()}
    position = self._position_of_each_process(step)
    if position is None:
      items["data"] = ocp.args.JsonRestore()
    try:
      found = self._manager.restore(step, args=ocp.args.Composite(**items))
      position = found["data"] if position is None else position
    except Exception as error:
      raise self._cannot("read", step, error) from error
    treedef = jax.tree.structure(abstract_state)
    state = jax.tree.unflatten(treedef, [found["state"][name] for name in abstract])
    return Restored(step, state, _decode(position), dict(found["metadata"] or {}))

  def wait(self) -> None:
    """Blocks until the checkpoint being written is complete; raises ZedaError if it could not be written."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._cannot("write", self._writing, error) from error

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._manager.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  def _position_of_each_process(self, step: int) -> dict[str, Any] | None:
    """The data position of a checkpoint in which every process had a file of its own; None in today's form.

    Raises:
      ZedaError: the positions differ, so that they mean nothing to another number of processes.
    """
    folder = epath.Path(self.step_directory(step)) / "data"
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("process_*-of-*.json"))]
    if any(position != found[0] for position in found):
      raise ZedaError(
        f"{folder} holds different data positions of {len(found)} processes, which this version cannot go on from: "
        "delete that checkpoint to go on from the one before it, or start again in another directory."
      )
    return found[0] if found else None

  def _cannot(self, verb: str, step: int | None, error: Exception) -> ZedaError:
    if isinstance(error, ZedaError):
      return error
    reason = " ".join(str(error).split())
    if verb == "write" and "://" not in self.directory:
      shutil.rmtree(f"{self.step_directory(step or 0)}.orbax-checkpoint-tmp", ignore_errors=True)
    if "No space left" in reason:
      reason = "No space left on device"
      advice = "free some space and run the same command again; the checkpoints before it are intact"
    elif verb == "write":
      advice = "check that the directory is writable, then run the same command again"
    else:
      advice = "delete that directory to go on from the checkpoint before it"
    return ZedaError(
      f"cannot {verb} checkpoint {self.directory}/{step} ({type(error).__name__}: {reason[:300]}): {advice}."
    )


def save_params(path: str | os.PathLike[str], model: Decoder, overwrite: bool = False) -> None:
  """Writes a model as an Orbax directory: `params/`, config.json, and the files beside the weights it came from.

  Args:
    path: the directory to make.
    model: static or dynamic; parameters may be sharded over the devices of this process.
    overwrite: replace a directory that is not empty.

  Raises:
    ZedaError: the directory cannot be written (nothing of it is left then), or there are several processes.
  """
  if jax.process_count() > 1:
    raise ZedaError(f"save_params runs in one process, found {jax.process_count()}: convert on a single host.")
  raw = to_hf(model.config)
  raw["dtype" if "dtype" in raw else "torch_dtype"] = model.config.dtype
  flat = _flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  with new_directory(pathlib.Path(path), overwrite, sum(leaf.nbytes for leaf in flat.values())) as directory:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(directory / "params", flat)
    for file in list_side_files(model.config.source):
      shutil.copyfile(file, directory / file.name)
    write_synced(directory / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")


def load_params(path: str | os.PathLike[str], sharding: ShardingRule | None = None) -> Decoder:
  """Reads a model that `save_params` wrote, each parameter in the type it was saved in.

  Args:
    path: the directory.
    sharding: (parameter path, shape) -> Sharding; None means the default device.

  Raises:
    ZedaError: the directory is not a complete Orbax directory of a supported model.
  """
  directory = pathlib.Path(path).absolute()
  config = read_config(directory)
  graphdef, state = nnx.split(abstract_decoder(config))
  params = nnx.to_pure_dict(state)
  default = jax.numpy.empty(()).sharding
  with ocp.StandardCheckpointer() as checkpointer:
    try:
      saved = checkpointer.metadata(directory / "params").item_metadata.tree
    except (OSError, ValueError, AttributeError) as error:
      raise ZedaError(f"{directory} has no readable params/: expected a directory made by to_orbax.") from error
    abstract = {
      names: jax.ShapeDtypeStruct(
        leaf.shape,
        saved[names].dtype if names in saved else leaf.dtype,
        sharding=sharding(tuple(key.key for key in keys), leaf.shape) if sharding else default,
      )
      for (keys, leaf), names in zip(jax.tree.leaves_with_path(params), _flatten(params), strict=True)
    }
    _check_same_arrays(abstract, saved, f"{directory / 'params'} does not fit its config.json", "convert it again")
    try:
      found = checkpointer.restore(directory / "params", abstract)
    except (OSError, ValueError) as error:
      raise ZedaError(f"{directory / 'params'} cannot be read ({error}): convert it again.") from error
  leaves = [found[name] for name in abstract]
  nnx.replace_by_pure_dict(state, jax.tree.unflatten(jax.tree.structure(params), leaves))
  return nnx.merge(graphdef, state)


def _encode(data_state: Any) -> dict[str, Any]:
  # grain's Dataset iterators give dicts, its DataLoader iterators bytes.
  if isinstance(data_state, bytes):
    return {"base64": base64.b64encode(data_state).decode()}
  return {"json": data_state}


def _decode(position: Mapping[str, Any]) -> Any:
  return base64.b64decode(position["base64"]) if "base64" in position else position["json"]


def _check_same_position(position: Mapping[str, Any]) -> None:
  """Raises a ZedaError unless all processes have the same one, for one is saved for all."""
  if jax.process_count() > 1:
    checksum = zlib.crc32(json.dumps(position, sort_keys=True).encode())
    if len(set(multihost_utils.process_allgather(np.uint32(checksum)).tolist())) > 1:
      raise ZedaError(
        "the processes stand at different places of the data, so that nothing was saved: every process needs an "
        "iterator whose position is that of the whole run, as data.pipeline makes them."
      )


def _flatten(tree: Any) -> dict[str, Any]:
  """{"params.runs.0.input_norm.scale": leaf, ...} in the tree's own order.

  A flat dictionary of names keeps the checkpoint independent of the containers (tuples, dataclasses, nnx.State,
  integer keys) that hold the arrays today.
  """
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
  if len(flat) != len(paths):
    raise ValueError("two leaves of the state have the same path.")
  return flat


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  if not hasattr(leaf, "dtype"):
    leaf = np.asarray(leaf)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


_OTHER_RUN = "it was written with another model or configuration; use another output directory"


def _check_same_arrays(
  expected: Mapping[str, jax.ShapeDtypeStruct], saved: Mapping[str, Any], complaint: str, advice: str
) -> None:
  """Raises a ZedaError that names the first arrays that differ; orbax itself would cast and crop silently."""
  differ = [f"{name} is missing" for name in expected if name not in saved]
  differ += [f"{name} is not expected" for name in saved if name not in expected]
  for name, leaf in expected.items():
    if name in saved:
      is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # stored as its words: shape and dtype differ
      found = (tuple(saved[name].shape), str(saved[name].dtype))
      if not is_key and found != (leaf.shape, str(leaf.dtype)):
        differ.append(f"{name} is {found[1]}{list(found[0])}, expected {leaf.dtype}{list(leaf.shape)}")
  if differ:
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    raise ZedaError(f"{complaint} ({'; '.join(differ[:3])}{more}): {advice}.")
