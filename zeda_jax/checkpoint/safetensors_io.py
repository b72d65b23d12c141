"""Safetensors as byte ranges: headers are checked first, then tensors stream one at a time.

Files are read with `pread`, never mapped, so that the resident set stays at the tensors in hand instead of growing to
the size of the model.
"""

import collections
import dataclasses
import errno
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import ml_dtypes
import numpy as np

from zeda_jax.errors import ZedaError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9  # decimal, as transformers counts max_shard_size="5GB"

DTYPES: dict[str, np.dtype] = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U64": np.dtype(np.uint64),
  "U32": np.dtype(np.uint32),
  "U16": np.dtype(np.uint16),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_COPY_CHUNK_BYTES = 8 << 20
_PAGE_BYTES = 4096
# What copy_file_range answers where a kernel or file system cannot do it; reading and writing still works there.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


def dtype_code(dtype: Any) -> str:
  """The safetensors name of a numpy dtype ("BF16" for bfloat16)."""
  return _CODES[np.dtype(dtype)]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """Name, safetensors dtype and shape of one tensor."""

  name: str
  dtype: str
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class StoredTensor(TensorSpec):
  """A tensor in a file: `offset` is where its bytes begin, counted from the start of the file."""

  file: pathlib.Path
  offset: int

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Reads rows `start:stop` of the first axis (all of a scalar); returns a fresh, writable array."""
    if not self.shape:
      return self._read_bytes(0, ()).reshape(())
    stop = self.shape[0] if stop is None else stop
    row_bytes = math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
    return self._read_bytes(start * row_bytes, (stop - start, *self.shape[1:]))

  def _read_bytes(self, skip: int, shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty(shape, DTYPES[self.dtype])
    view = out.reshape(-1).view(np.uint8).data
    done = 0
    with open(self.file, "rb", buffering=0) as file:
      file.seek(self.offset + skip)
      while done < len(view):
        count = file.readinto(view[done:])
        if not count:
          raise _changed(self.file)
        done += count
    return out


def _changed(file: pathlib.Path) -> ZedaError:
  return ZedaError(f"{file} became shorter while it was being read: leave the source untouched and run again.")


def open_weights(directory: str | pathlib.Path) -> dict[str, StoredTensor]:
  """Lists the tensors of a Hugging Face directory after checking every shard's header against its size.

  Reads `model.safetensors` where there is one, else the shards that `model.safetensors.index.json` names.

  Raises:
    ZedaError: no safetensors weights, a shard that is missing, truncated or corrupt, or an index that names a tensor
      its shard does not hold.
  """
  directory = pathlib.Path(directory)
  single, index_file = directory / WEIGHTS_NAME, directory / INDEX_NAME
  if single.is_file():
    return {tensor.name: tensor for tensor in read_header(single)}
  if not index_file.is_file():
    raise _no_weights(directory)
  weight_map = _read_index(index_file)
  files = sorted(set(weight_map.values()))
  missing = [name for name in files if not (directory / name).is_file()]
  if missing:
    raise ZedaError(
      f"{index_file} names {_some(missing)} of {len(files)} shards, which {_is_or_are(missing)} not in {directory}: "
      "download the missing shards again."
    )
  tensors: dict[str, StoredTensor] = {}
  for name in files:
    for tensor in read_header(directory / name):
      # The index decides where a tensor lies that several shards hold.
      if weight_map.get(tensor.name, name) == name:
        tensors[tensor.name] = tensor
  absent = [name for name in weight_map if name not in tensors]
  if absent:
    raise ZedaError(
      f"{index_file} names tensors that their shards do not hold ({_some(absent)}): "
      "the index and the shards are of different checkpoints, so download both again."
    )
  return tensors


def _no_weights(directory: pathlib.Path) -> ZedaError:
  if not directory.is_dir():
    return ZedaError(f"{directory} is not a directory: expected a Hugging Face model directory.")
  names = sorted(entry.name for entry in directory.iterdir())
  shards = [name for name in names if name.endswith(".safetensors")]
  pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
  if shards:
    return ZedaError(f"{directory} has {_some(shards)} but no {INDEX_NAME}: download the index file, too.")
  if pickles:
    return ZedaError(
      f"{directory} has only pickled weights ({_some(pickles)}), which can run code and are not read: "
      "convert them to safetensors first."
    )
  return ZedaError(f"{directory} has no weights: expected {WEIGHTS_NAME} or {INDEX_NAME} with its shards.")


def _read_index(file: pathlib.Path) -> Mapping[str, str]:
  try:
    weight_map = json.loads(file.read_text())["weight_map"]
    good = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
  except (ValueError, KeyError, TypeError):
    good = False
  if not good or not weight_map:
    raise ZedaError(f"{file} is not a safetensors index (a JSON object with a weight_map): download it again.")
  outside = [shard for shard in weight_map.values() if pathlib.PurePath(shard).name != shard]
  if outside:
    raise ZedaError(f"{file} names {outside[0]!r}, which is not a file name: shards must lie beside the index.")
  return weight_map


def read_header(file: pathlib.Path) -> list[StoredTensor]:
  """The tensors of one safetensors file in the order of their bytes.

  Raises:
    ZedaError: the file is truncated or its header is not one of safetensors.
  """
  size = file.stat().st_size
  with open(file, "rb") as stream:
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length + 8 > size:
      raise ZedaError(f"{file} is truncated inside its header ({size} bytes long): download it again.")
    if length > _MAX_HEADER_BYTES:
      raise ZedaError(f"{file} is not a safetensors file (its header claims {length} bytes): download it again.")
    text = stream.read(length)
  try:
    header = json.loads(text)
    header.pop("__metadata__", None)
    tensors = [_stored(file, 8 + length, name, entry) for name, entry in header.items()]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    if isinstance(error, ZedaError):
      raise
    raise ZedaError(f"{file} has no valid safetensors header: download it again.") from error
  end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=8 + length)
  if end != size:
    kind = "truncated" if size < end else "longer than its header says"
    raise ZedaError(f"{file} is {kind} ({size} bytes where its header needs {end}): download it again.")
  return sorted(tensors, key=lambda tensor: tensor.offset)


def _stored(file: pathlib.Path, data_start: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
  if entry["dtype"] not in DTYPES:
    raise ZedaError(f"{file}: tensor {name} has dtype {entry['dtype']!r}; supported are {', '.join(DTYPES)}.")
  begin, end = entry["data_offsets"]
  tensor = StoredTensor(name, entry["dtype"], tuple(int(n) for n in entry["shape"]), file, data_start + begin)
  if begin < 0 or end - begin != tensor.nbytes:
    raise ZedaError(
      f"{file}: tensor {name} spans {end - begin} bytes, but {tensor.dtype} {list(tensor.shape)} takes "
      f"{tensor.nbytes}: the header is corrupt, so download the file again."
    )
  return tensor


def _some(names: Sequence[str], shown: int = 3) -> str:
  more = f" and {len(names) - shown} more" if len(names) > shown else ""
  return ", ".join(names[:shown]) + more


def _is_or_are(names: Sequence[str]) -> str:
  return "is" if len(names) == 1 else "are"


# --- writing ------------------------------------------------------------------------------------------------------

# Where a planned tensor's bytes come from: copied as they lie in another file, computed when their turn comes, or
# (None) all zeros, which become a hole in the file and then take neither time nor room.
TensorSource = StoredTensor | Callable[[], np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
  """A tensor to be written and where its bytes come from."""

  spec: TensorSpec
  source: TensorSource

  @classmethod
  def copied(cls, tensor: StoredTensor) -> "PlannedTensor":
    return cls(TensorSpec(tensor.name, tensor.dtype, tensor.shape), tensor)


def split_shards(plan: Sequence[PlannedTensor], max_shard_bytes: int) -> list[list[PlannedTensor]]:
  """Fills shards in the order of the plan; a tensor larger than a shard gets one of its own."""
  shards: list[list[PlannedTensor]] = [[]]
  size = 0
  for tensor in plan:
    if shards[-1] and size + tensor.spec.nbytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.spec.nbytes
  return shards


def write_order(plan: Sequence[PlannedTensor], max_shard_bytes: int) -> Iterator[PlannedTensor]:
  """The planned tensors in the order in which write_weights asks for them."""
  for shard in split_shards(plan, max_shard_bytes):
    yield from _ordered(shard)


def write_weights(
  directory: pathlib.Path, plan: Sequence[PlannedTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
  """Writes the planned tensors into `directory`: one `model.safetensors`, or shards and their index.

  Holds one tensor at a time. Names must be unique. Files are synced to disk before this returns.
  """
  shards = split_shards(plan, max_shard_bytes)
  names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
  if len(shards) == 1:
    names = [WEIGHTS_NAME]
  weight_map = {}
  with futures.ThreadPoolExecutor(1) as background:
    synced = []
    for name, shard in zip(names, shards, strict=True):
      _write_file(directory / name, shard)
      synced.append(background.submit(_sync, directory / name))  # while the next shard is written
      weight_map.update({tensor.spec.name: name for tensor in shard})
    for future in synced:
      future.result()
  if len(shards) == 1:
    return
  total = sum(tensor.spec.nbytes for tensor in plan)
  index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
  write_synced(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _sync(file: pathlib.Path) -> None:
  with open(file, "rb+") as stream:
    os.fsync(stream.fileno())


def write_synced(file: pathlib.Path, text: str) -> None:
  with open(file, "x", encoding="utf-8") as stream:
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())


def _ordered(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
  """Widest dtype first, which keeps every tensor aligned to its item size, as the format's own writer does."""
  return sorted(tensors, key=lambda tensor: -DTYPES[tensor.spec.dtype].itemsize)


def _write_file(file: pathlib.Path, tensors: Sequence[PlannedTensor]) -> None:
  ordered = _ordered(tensors)
  with open(file, "xb", buffering=0) as stream:
    _write_all(stream.fileno(), _header_bytes(ordered))
    for tensor in _merged(ordered):
      if tensor.source is None:
        stream.seek(tensor.spec.nbytes, os.SEEK_CUR)
        continue
      if isinstance(tensor.source, StoredTensor):
        copy_range(tensor.source, stream.fileno())
        continue
      array = tensor.source()
      if array.shape != tensor.spec.shape or array.dtype != DTYPES[tensor.spec.dtype]:
        raise ValueError(f"{tensor.spec} was planned, but its source gave {array.dtype} {array.shape}")
      _write_all(stream.fileno(), np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    stream.truncate()  # up to here: the last tensor may be a hole


def _merged(tensors: Sequence[PlannedTensor]) -> Iterator[PlannedTensor]:
  """Joins tensors that lie one behind the other in a source file, so that they are copied in one go."""
  run: StoredTensor | None = None
  for tensor in tensors:
    source = tensor.source
    if run is not None:
      if isinstance(source, StoredTensor) and (source.file, source.offset) == (run.file, run.offset + run.nbytes):
        run = StoredTensor(run.name, "U8", (run.nbytes + source.nbytes,), run.file, run.offset)
        continue
      yield PlannedTensor.copied(run)
      run = None
    if isinstance(source, StoredTensor):
      run = source
    else:
      yield tensor
  if run is not None:
    yield PlannedTensor.copied(run)


def _header_bytes(tensors: Sequence[PlannedTensor]) -> bytes:
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  begin = 0
  copied: collections.Counter[int] = collections.Counter()  # bytes to copy, by the data start that would align them
  for tensor in tensors:
    spec, end = tensor.spec, begin + tensor.spec.nbytes
    header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    if isinstance(tensor.source, StoredTensor):
      copied[(tensor.source.offset - begin) % _PAGE_BYTES] += spec.nbytes
    begin = end
  text = json.dumps(header, separators=(",", ":")).encode()
  # Bytes that keep their place within a memory page are copied at about twice the speed, and the format lets headers
  # end in any number of spaces. A source that breaks the format's own alignment is not followed.
  data_start = copied.most_common(1)[0][0] if copied else 0
  text += b" " * ((data_start // 8 * 8 - 8 - len(text)) % _PAGE_BYTES)
  return struct.pack("<Q", len(text)) + text


def _write_all(fd: int, data: bytes | memoryview) -> None:
  view = memoryview(data)
  while view:
    view = view[os.write(fd, view) :]


def copy_range(tensor: StoredTensor, target: int) -> None:
  """Appends a stored tensor's bytes to the open file `target`, inside the kernel where it can."""
  with open(tensor.file, "rb", buffering=0) as stream:
    done = _copy_in_kernel(stream.fileno(), target, tensor.offset, tensor.nbytes)
    for chunk in _chunks(stream.fileno(), tensor.offset + done, tensor.nbytes - done):
      if not chunk:
        raise _changed(tensor.file)
      _write_all(target, chunk)


def _copy_in_kernel(source: int, target: int, offset: int, count: int) -> int:
  """Copies up to `count` bytes and returns how many; the caller copies the rest."""
  done = 0
  while hasattr(os, "copy_file_range") and done < count:
    try:
      copied = os.copy_file_range(source, target, count - done, offset + done)
    except OSError as error:
      if error.errno in _NO_KERNEL_COPY:
        break
      raise
    if copied == 0:  # some file systems answer 0 where they mean "not supported"
      break
    done += copied
  return done


def _chunks(fd: int, offset: int, count: int) -> Iterator[bytes]:
  while count > 0:
    chunk = os.pread(fd, min(count, _COPY_CHUNK_BYTES), offset)
    yield chunk
    offset += len(chunk)
    count -= len(chunk)
