"""Parameters between a Hugging Face directory and (possibly sharded) JAX arrays, one tensor at a time."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zeda_jax.checkpoint import directory, names
from zeda_jax.checkpoint.names import HfTensor, Path, Piece
from zeda_jax.checkpoint.safetensors_io import (
  DTYPES,
  MAX_SHARD_BYTES,
  PlannedTensor,
  StoredTensor,
  TensorSpec,
  dtype_code,
  open_weights,
  write_order,
)
from zeda_jax.config import ModelConfig, from_hf, read_config, to_hf
from zeda_jax.distributed import is_primary, to_host
from zeda_jax.distributed.agreement import raise_together, together
from zeda_jax.errors import ZedaError

# (parameter path, shape) -> where the parameter lives.
ShardingRule = Callable[[Path, tuple[int, ...]], jax.sharding.Sharding]

_ALIGNMENT = 64  # of host buffers that the CPU backend uses as they are, without a second copy


# --- reading ------------------------------------------------------------------------------------------------------


def load_params(
  path: str | pathlib.Path, dtype: Any = None, sharding: ShardingRule | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
  """Reads the parameters of a Hugging Face directory as a nested dict of arrays (layer runs keyed by number).

  Each process reads the slices that its devices hold, tensor by tensor, straight into the stacked parameter.

  Args:
    path: a static or dynamic directory, by its config.json.
    dtype: of all parameters and of the activations; None keeps the parameters as on disk and the activations as in
      config.json. Routers' correction biases, which live in float32 beside bfloat16 weights, are read as float32.
    sharding: where each parameter lives; None means the default device.

  Raises:
    ZedaError: the directory is not a complete checkpoint of a supported model.
  """
  config = read_config(path)
  wanted = None if dtype is None else _float_dtype(dtype)
  stored = open_weights(path)
  tensors = names.check_tensors(stored, config, path)
  grouped = names.parameter_pieces(tensors)
  dtypes = {key: _parameter_dtype(wanted, pieces, stored) for key, pieces in grouped.items()}
  params: dict[str, Any] = {}
  for key, pieces in grouped.items():
    shape = names.parameter_shape(pieces)
    where = jnp.empty(()).sharding if sharding is None else sharding(key, shape)
    read = functools.partial(_read_slice, shape, pieces, stored, dtypes[key])
    _insert(params, key, jax.make_array_from_callback(shape, where, read))
  return (config if wanted is None else config.replace(dtype=wanted.name)), params


def _float_dtype(dtype: Any) -> np.dtype:
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise ZedaError(
      f"dtype is {dtype!r}; supported are float32, bfloat16 and float16, or None to keep what is on disk."
    )
  return found


def _parameter_dtype(
  wanted: np.dtype | None, pieces: Sequence[tuple[HfTensor, Piece]], stored: Mapping[str, StoredTensor]
) -> np.dtype:
  if wanted is None:
    return _disk_dtype(pieces, stored)
  return np.dtype(np.float32) if pieces[0][0].row.float32 else wanted


def _disk_dtype(pieces: Sequence[tuple[HfTensor, Piece]], stored: Mapping[str, StoredTensor]) -> np.dtype:
  found = {stored[tensor.name].dtype: tensor.name for tensor, _ in pieces}
  if len(found) > 1:
    # Stacked layers share one array; widening some of them unasked would change what a later save writes.
    listed = ", ".join(f"{name} is {code}" for code, name in found.items())
    raise ZedaError(f"Layers of one kind are stored in several dtypes ({listed}): pass dtype to read them as one.")
  dtype = DTYPES[next(iter(found))]
  if dtype == np.float64:
    raise ZedaError(f"{pieces[0][0].name} is stored in float64, which JAX does not keep: pass dtype to read it.")
  return dtype


def _read_slice(
  shape: tuple[int, ...],
  pieces: Sequence[tuple[HfTensor, Piece]],
  stored: Mapping[str, StoredTensor],
  dtype: np.dtype,
  index: tuple[slice, ...],
) -> np.ndarray:
  """Reads `parameter[index]`, touching only the tensors (and rows of them) that it holds."""
  bounds = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
  out = _aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
  for tensor, piece in pieces:
    lead = len(piece.index)
    if not all(start <= i < stop for i, (start, stop) in zip(piece.index, bounds[:lead], strict=True)):
      continue
    inner = out[tuple(i - start for i, (start, _) in zip(piece.index, bounds[:lead], strict=True))]
    first, last = piece.columns
    start, stop = max(bounds[-1][0], first), min(bounds[-1][1], last)
    if start < stop:
      block = _read_block(stored[tensor.name], piece, [*bounds[lead:-1], (start - first, stop - first)])
      _assign(inner[..., start - bounds[-1][0] : stop - bounds[-1][0]], block)
  return out


def _read_block(tensor: StoredTensor, piece: Piece, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
  """The part of a tensor that lies in `bounds`, given and returned in the parameter's order of axes."""
  on_disk = list(bounds)[::-1] if piece.transpose else list(bounds)
  (start, stop), rest = on_disk[0], on_disk[1:]
  rows = tensor.read(piece.first_row + start, piece.first_row + stop)
  block = rows[(slice(None), *(slice(*bound) for bound in rest))]
  return block.T if piece.transpose else block


def _assign(target: np.ndarray, block: np.ndarray) -> None:
  if target.dtype == block.dtype:
    # numpy moves native integers several times faster than the custom bfloat16.
    bits = np.dtype(f"u{target.dtype.itemsize}")
    target.view(bits)[...] = block.view(bits)
  else:
    target[...] = block


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  size = int(np.prod(shape)) * dtype.itemsize
  raw = np.empty(size + _ALIGNMENT, np.uint8)
  skip = -raw.ctypes.data % _ALIGNMENT
  return raw[skip : skip + size].view(dtype).reshape(shape)


def _insert(tree: dict[Any, Any], path: Path, leaf: Any) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = leaf


# --- writing ------------------------------------------------------------------------------------------------------


def save_params(
  config: ModelConfig,
  params: Mapping[str, Any],
  path: str | pathlib.Path,
  format: str = "dynamic",
  overwrite: bool = False,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes parameters (as load_params gives them) as a Hugging Face directory; holds one layer on the host.

  Files beside the weights come from `config.source`, and so do tensors that are not part of the model, such as layers
  past num_hidden_layers. With several processes, all must call this; the first one writes.

  Args:
    config: the model's.
    params: nested dict of arrays, sharded or not.
    path: the directory to make.
    format: "dynamic", or "plain" for a static checkpoint whose zero experts are stored as all-zero experts.
    overwrite: replace a directory that is not empty.
    max_shard_bytes: largest size of one weights file.

  Raises:
    ZedaError: the directory cannot be written; nothing of it is left then. Raised in all processes.
  """
  raw = _config_json(config, format)

  def write() -> None:
    plan = _plan(config, params, _LayerFetcher(params), plain=format == "plain")
    if is_primary():
      side_files = directory.list_side_files(config.source)
      directory.write_model(path, plan, raw, side_files, overwrite, max_shard_bytes)
      return
    for tensor in write_order(plan, max_shard_bytes):  # takes part in gathering what is sharded over processes
      if callable(tensor.source):
        tensor.source()

  together(write)


def _config_json(config: ModelConfig, format: str) -> dict[str, Any]:
  raw = to_hf(config, format)
  if from_hf(raw).dtype != config.dtype:  # the model was cast while it was read
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = config.dtype
  return raw


def _plan(config: ModelConfig, params: Mapping[str, Any], fetch: "_LayerFetcher", plain: bool) -> list[PlannedTensor]:
  tensors = names.hf_tensors(config, plain)
  for key, pieces in names.parameter_pieces(tensors).items():
    found, expected = np.shape(_leaf(params, key)), names.parameter_shape(pieces)
    if found != expected:
      raise ZedaError(f"Parameter {'.'.join(map(str, key))} has shape {found}, but the config asks for {expected}.")
  plan = []
  for tensor in tensors.values():
    like = tensor if tensor.pieces else tensors[tensor.row.name.format(layer=tensor.layer, expert=0)]
    dtype = np.dtype(_leaf(params, like.pieces[0].path).dtype)
    spec = TensorSpec(tensor.name, dtype_code(dtype), tensor.shape)
    source = functools.partial(_assemble, tensor, fetch) if tensor.pieces else None
    plan.append(PlannedTensor(spec, source))
  return plan + _kept_from_source(config, tensors, params)


def _kept_from_source(
  config: ModelConfig, tensors: Mapping[str, HfTensor], params: Mapping[str, Any]
) -> list[PlannedTensor]:
  """Tensors of the source directory that are no parameters: copied, but a tied head follows the embedding."""
  if config.source is None or not pathlib.Path(config.source).is_dir():
    return []
  try:
    stored = open_weights(config.source)
  except ZedaError:  # the source was moved or rewritten since; the model does not need it
    return []
  plan = []
  for name, tensor in stored.items():
    if name in tensors or not names.is_ignored(name, config):
      continue
    if name == "lm_head.weight":
      embedding = params["embed"]["embedding"]
      spec = TensorSpec(name, dtype_code(embedding.dtype), embedding.shape)
      plan.append(PlannedTensor(spec, functools.partial(_to_host, embedding, None)))
    else:
      plan.append(PlannedTensor.copied(tensor))
  return plan


def _assemble(tensor: HfTensor, fetch: "_LayerFetcher") -> np.ndarray:
  """One tensor as it is stored: the pieces' rows, transposed back."""
  blocks = [fetch(piece) for piece in tensor.pieces]
  return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


class _LayerFetcher:
  """Brings parameters to the host one layer at a time and keeps that layer until another is asked for."""

  def __init__(self, params: Mapping[str, Any]):
    self._params = params
    self._layer: dict[Path, np.ndarray] = {}
    self._at: int | None = None

  def __call__(self, piece: Piece) -> np.ndarray:
    """The tensor's rows that `piece` holds, on the host, in the order of the disk."""
    at = piece.index[0] if piece.index else None
    if at != self._at:
      self._layer.clear()
      self._at = at
    if piece.path not in self._layer:
      self._layer[piece.path] = _to_host(_leaf(self._params, piece.path), at)
    block = self._layer[piece.path][piece.index[1:]]
    block = block[..., slice(*piece.columns)] if block.shape[-1] != piece.columns[1] - piece.columns[0] else block
    if not piece.transpose:
      return block
    bits = np.dtype(f"u{block.dtype.itemsize}")
    return np.ascontiguousarray(block.view(bits).T).view(block.dtype)


def _leaf(tree: Mapping[Any, Any], path: Path) -> Any:
  for key in path:
    tree = tree[key]
  return tree


def _to_host(array: Any, layer: int | None) -> np.ndarray:
  """`array[layer]` (all of it for None) as numpy, gathered from all devices and processes that hold parts."""
  if not isinstance(array, jax.Array):
    return np.asarray(array) if layer is None else np.asarray(array)[layer]
  if len(array.devices()) == 1 and next(iter(array.devices())).platform == "cpu":
    whole = np.asarray(array)  # a view, not a copy
    return whole if layer is None else whole[layer]
  raise_together()  # if the primary process could not write what it had; the others would gather without it
  return to_host(array if layer is None else _take_layer(array, layer))


@jax.jit
def _take_layer(array: jax.Array, layer: int) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(array, layer, 0, keepdims=False)
