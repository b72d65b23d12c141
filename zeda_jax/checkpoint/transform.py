"""From one Hugging Face directory to another without loading the model: bytes that do not change are copied."""

import pathlib

import numpy as np

from zeda_jax.checkpoint import directory, names
from zeda_jax.checkpoint.safetensors_io import (
  MAX_SHARD_BYTES,
  PlannedTensor,
  StoredTensor,
  TensorSpec,
  open_weights,
)
from zeda_jax.config import ModelConfig, read_config, to_hf
from zeda_jax.errors import ZedaError
from zeda_jax.router_rows import new_router_rows


def inject_directory(
  source: str | pathlib.Path,
  target: str | pathlib.Path,
  num_zero_experts: int | None = None,
  seed: int = 0,
  overwrite: bool = False,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Adds zero experts to a static checkpoint: only routers change, everything else is copied bit for bit.

  Args:
    source: a static Hugging Face directory.
    target: the dynamic directory to make.
    num_zero_experts: N_Z; half the experts by default.
    seed: of the new router rows; the same seed gives the same rows as `zeda_jax.inject`.
    overwrite: replace a target that is not empty.
    max_shard_bytes: largest size of one weights file.

  Raises:
    ZedaError: the source is not a complete static checkpoint, `num_zero_experts` is not positive, or the target
      cannot be written; nothing is written then.
  """
  config = read_config(source)
  if config.is_dynamic:
    raise ZedaError(
      f"{source} has {config.num_zero_experts} zero experts already: inject into the static checkpoint it came from."
    )
  count = config.num_experts // 2 if num_zero_experts is None else num_zero_experts
  if count <= 0:
    raise ZedaError(f"num_zero_experts is {count}; expected a whole number of at least 1.")
  if seed < 0:
    raise ZedaError(f"seed is {seed}; expected a whole number of at least 0.")
  stored, expected = _open(source, target, config, overwrite)
  routers = {name: t.layer for name, t in expected.items() if t.row.zero_path is not None and t.layer is not None}
  plan = [
    _widened(tensor, count, seed, routers[name]) if name in routers else PlannedTensor.copied(tensor)
    for name, tensor in stored.items()
  ]
  raw = to_hf(config.replace(num_zero_experts=count))
  directory.write_model(target, plan, raw, directory.list_side_files(source), overwrite, max_shard_bytes)


def to_plain_directory(
  source: str | pathlib.Path,
  target: str | pathlib.Path,
  overwrite: bool = False,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes a dynamic checkpoint as a static one with N + N_Z experts, whose last N_Z have all-zero tensors.

  Any engine that knows the base model gives the right output with it, without the speed. A static checkpoint is copied.

  Raises:
    ZedaError: the source is not a complete checkpoint or the target cannot be written; nothing is written then.
  """
  config = read_config(source)
  stored, expected = _open(source, target, config, overwrite)
  plan = [PlannedTensor.copied(tensor) for tensor in stored.values()]
  plan += [
    _zeros(tensor, stored) for name, tensor in names.hf_tensors(config, plain=True).items() if name not in expected
  ]
  raw = to_hf(config, "plain")
  directory.write_model(target, plan, raw, directory.list_side_files(source), overwrite, max_shard_bytes)


def _widened(tensor: StoredTensor, count: int, seed: int, layer: int) -> PlannedTensor:
  """A router with the rows of `count` zero experts below its own."""

  def rows() -> np.ndarray:
    old = tensor.read()
    return np.concatenate([old, new_router_rows(old, count, seed, layer)])

  shape = (tensor.shape[0] + count, *tensor.shape[1:])
  return PlannedTensor(TensorSpec(tensor.name, tensor.dtype, shape), rows)


def _zeros(tensor: names.HfTensor, stored: dict[str, StoredTensor]) -> PlannedTensor:
  """A zero expert's tensor: all zeros, in the dtype of expert 0's."""
  like = stored[tensor.row.name.format(layer=tensor.layer, expert=0)]
  return PlannedTensor(TensorSpec(tensor.name, like.dtype, tensor.shape), None)


def _open(
  source: str | pathlib.Path, target: str | pathlib.Path, config: ModelConfig, overwrite: bool
) -> tuple[dict[str, StoredTensor], dict[str, names.HfTensor]]:
  """Checks everything that can be checked before any work."""
  stored = open_weights(source)
  expected = names.check_tensors(stored, config, source)
  directory.check_apart(pathlib.Path(source), directory.check_target(target, overwrite))
  return stored, expected
