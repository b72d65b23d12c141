"""Model directories appear whole or not at all: written beside the target, renamed when complete."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zeda_jax.checkpoint import safetensors_io
from zeda_jax.checkpoint.safetensors_io import PlannedTensor
from zeda_jax.errors import ZedaError

# Not carried over: weights of any kind, archives, and code, which is never executed or passed on.
_NOT_CARRIED = (
  *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".ggml"),
  *(".h5", ".msgpack", ".onnx", ".npz", ".pkl", ".pickle", ".zip", ".tar", ".gz", ".py", ".pyc", ".so"),
)


def check_target(target: str | pathlib.Path, overwrite: bool = False) -> pathlib.Path:
  """Resolves where a new directory is to appear.

  Raises:
    ZedaError: it cannot appear there, or something is there already and `overwrite` is false.
  """
  path = pathlib.Path(target).expanduser().resolve()
  if path.exists() and not path.is_dir():
    raise ZedaError(f"{path} is a file: the output must be a directory that is new or empty.")
  if path.is_mount():
    raise ZedaError(f"{path} is a mount point and cannot be put in place at once: name a directory inside it.")
  if path.is_dir() and any(path.iterdir()):
    if not overwrite:
      raise ZedaError(f"{path} is not empty: name another directory, or pass overwrite to replace it.")
    if any(kept == path or path in kept.parents for kept in (pathlib.Path.cwd(), pathlib.Path.home())):
      raise ZedaError(f"{path} holds the current or the home directory and is not replaced: name another directory.")
  return path


def check_apart(source: pathlib.Path, target: pathlib.Path) -> None:
  """Raises ZedaError if writing `target` would replace `source` or write into it."""
  source, target = source.resolve(), target.resolve()
  if source == target or source in target.parents or target in source.parents:
    raise ZedaError(f"{target} overlaps the source {source}: name an output directory apart from it.")


@contextlib.contextmanager
def new_directory(target: str | pathlib.Path, overwrite: bool = False, need_bytes: int = 0) -> Iterator[pathlib.Path]:
  """Yields a temporary sibling of `target` to write into; it takes the target's place when the block ends.

  If the block raises, the temporary directory is removed and the target stays as it was. What killed runs left for
  the same target is removed first. An existing target is replaced only after the new one is complete.

  Args:
    target: the directory to make.
    overwrite: replace a target that is not empty.
    need_bytes: how much will be written; checked against the free space.

  Raises:
    ZedaError: the target is not allowed (see check_target), or the file system refuses: no space, no permission.
  """
  path = check_target(target, overwrite)
  made: list[pathlib.Path] = []
  temporary: pathlib.Path | None = None
  lock: int | None = None
  try:
    made = _make_parents(path)
    _remove_leftovers(path)
    check_target(path, overwrite)  # a leftover may have come back as the target
    _check_space(path, need_bytes)
    temporary, lock = _make_locked(path)
    yield temporary
    _sync_directory(temporary)
    check_target(path, overwrite)  # another run may have finished first
    _move_into_place(temporary, path)
    made = []
  except OSError as error:
    raise _explained(path, error) from error
  finally:
    if temporary is not None and temporary.exists():
      shutil.rmtree(temporary, ignore_errors=True)
    if lock is not None:
      os.close(lock)
    for parent in reversed(made):
      with contextlib.suppress(OSError):
        parent.rmdir()


def write_model(
  target: str | pathlib.Path,
  plan: Sequence[PlannedTensor],
  config_json: Mapping[str, Any],
  side_files: Sequence[pathlib.Path] = (),
  overwrite: bool = False,
  max_shard_bytes: int = safetensors_io.MAX_SHARD_BYTES,
) -> None:
  """Writes a complete Hugging Face directory: weights, config.json and the files carried over.

  Raises:
    ZedaError: see new_directory.
  """
  need = sum(tensor.spec.nbytes + len(tensor.spec.name) + 200 for tensor in plan)
  need += sum(file.stat().st_size for file in side_files) + 100_000
  with new_directory(target, overwrite, need) as directory:
    safetensors_io.write_weights(directory, plan, max_shard_bytes)
    for file in side_files:
      shutil.copyfile(file, directory / file.name)
    safetensors_io.write_synced(directory / "config.json", json.dumps(config_json, indent=2, ensure_ascii=False) + "\n")


def list_side_files(source: str | pathlib.Path | None) -> list[pathlib.Path]:
  """Tokenizer, chat template, generation settings and the like of a model directory: all but weights and code."""
  if source is None or not pathlib.Path(source).is_dir():
    return []
  files = sorted(file for file in pathlib.Path(source).iterdir() if file.is_file())
  return [
    file
    for file in files
    if not file.name.startswith(".") and file.name != "config.json" and not file.name.lower().endswith(_NOT_CARRIED)
  ]


def _make_parents(path: pathlib.Path) -> list[pathlib.Path]:
  missing = [parent for parent in path.parents if not parent.exists()][::-1]
  for parent in missing:
    parent.mkdir(exist_ok=True)
  return missing


def _make_locked(path: pathlib.Path) -> tuple[pathlib.Path, int]:
  """A fresh sibling directory, locked while this process lives so that no other run takes it for a leftover."""
  while True:
    temporary = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
    temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY)
    if _try_lock(lock) is not False and temporary.exists():
      return temporary, lock
    os.close(lock)


def _try_lock(fd: int) -> bool | None:
  """Whether the lock was free, or None where the file system has no locks and nobody can tell."""
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:
    return None
  return True


def _remove_leftovers(path: pathlib.Path) -> None:
  for leftover in path.parent.glob(f".{_escaped(path.name)}.replaced-*"):
    # A run was killed between its two renames: the old directory comes back, unless the new one made it.
    if path.exists():
      shutil.rmtree(leftover, ignore_errors=True)
    else:
      os.rename(leftover, path)
  for leftover in path.parent.glob(f".{_escaped(path.name)}.partial-*"):
    try:
      lock = os.open(leftover, os.O_RDONLY)
    except FileNotFoundError:
      continue
    if _try_lock(lock):
      shutil.rmtree(leftover, ignore_errors=True)
    os.close(lock)


def _escaped(name: str) -> str:
  return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _check_space(path: pathlib.Path, need_bytes: int) -> None:
  free = shutil.disk_usage(path.parent).free
  if need_bytes > free:
    raise ZedaError(
      f"No space left for {path}: it needs {need_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
      "make room or write elsewhere."
    )


def _move_into_place(temporary: pathlib.Path, path: pathlib.Path) -> None:
  replaced = None
  if path.exists() and any(path.iterdir()):
    replaced = path.parent / f".{path.name}.replaced-{secrets.token_hex(4)}"
    os.rename(path, replaced)
  os.rename(temporary, path)
  _sync_directory(path.parent)
  if replaced is not None:
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_directory(directory: pathlib.Path) -> None:
  fd = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def _explained(path: pathlib.Path, error: OSError) -> ZedaError:
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    return ZedaError(f"No space left while writing {path}: nothing was kept; make room or write elsewhere.")
  return ZedaError(
    f"{path} could not be written ({error.strerror or error}): nothing was kept; mend that and run again."
  )
