import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from zeda_jax.checkpoint import directory
from zeda_jax.checkpoint.directory import check_apart, list_side_files, new_directory, write_model
from zeda_jax.checkpoint.safetensors_io import PlannedTensor, TensorSpec
from zeda_jax.errors import ZedaError

ROOT = pathlib.Path(__file__).parents[2]
PLAN = [PlannedTensor(TensorSpec("a", "F32", (4,)), lambda: np.ones(4, np.float32))]


def names_in(path: pathlib.Path) -> list[str]:
  return sorted(entry.name for entry in path.iterdir())


def test_appears_complete_at_the_end(tmp_path):
  with new_directory(tmp_path / "out") as temporary:
    (temporary / "file").write_text("x")
    assert not (tmp_path / "out").exists()
    assert temporary.parent == tmp_path
  assert names_in(tmp_path) == ["out"]
  assert names_in(tmp_path / "out") == ["file"]


def test_an_empty_target_is_taken(tmp_path):
  (tmp_path / "out").mkdir()
  write_model(tmp_path / "out", PLAN, {})
  assert names_in(tmp_path / "out") == ["config.json", "model.safetensors"]


def test_a_full_target_is_refused_and_left_alone(tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out/mine").write_text("x")
  with pytest.raises(ZedaError, match="is not empty"):
    write_model(tmp_path / "out", PLAN, {})
  assert names_in(tmp_path) == ["out"]
  assert names_in(tmp_path / "out") == ["mine"]


def test_overwrite_replaces_the_old_one_only_when_complete(tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out/old").write_text("x")
  with new_directory(tmp_path / "out", overwrite=True) as temporary:
    (temporary / "new").write_text("x")
    assert names_in(tmp_path / "out") == ["old"]
  assert names_in(tmp_path) == ["out"]
  assert names_in(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_and_keeps_the_old_one(tmp_path, error):
  (tmp_path / "out").mkdir()
  (tmp_path / "out/old").write_text("x")
  with pytest.raises(error), new_directory(tmp_path / "out", overwrite=True) as temporary:
    (temporary / "new").write_text("x")
    raise error
  assert names_in(tmp_path) == ["out"]
  assert names_in(tmp_path / "out") == ["old"]


def test_a_failure_takes_back_the_parents_it_made(tmp_path):
  with pytest.raises(RuntimeError), new_directory(tmp_path / "a/b/out"):
    raise RuntimeError
  assert names_in(tmp_path) == []
  write_model(tmp_path / "a/b/out", PLAN, {})
  assert (tmp_path / "a/b/out/config.json").is_file()


def test_the_other_of_two_runs_that_finish_is_told(tmp_path):
  with pytest.raises(ZedaError, match="is not empty"), new_directory(tmp_path / "out") as temporary:
    (temporary / "second").write_text("x")
    write_model(tmp_path / "out", PLAN, {})
  assert names_in(tmp_path) == ["out"]
  assert names_in(tmp_path / "out") == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("at", ["weights", "config.json", "side file"])
def test_no_space_left_half_way(tmp_path, monkeypatch, at):
  side = tmp_path / "tokenizer.json"
  side.write_text("x")

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

  if at == "weights":
    real = os.write
    calls = []
    # The header fits, the tensor does not.
    monkeypatch.setattr(os, "write", lambda fd, data: full() if calls else (calls.append(1), real(fd, data))[1])
  elif at == "config.json":
    monkeypatch.setattr(directory.safetensors_io, "write_synced", full)
  else:
    monkeypatch.setattr(shutil, "copyfile", full)
  with pytest.raises(ZedaError, match="No space left while writing"):
    write_model(tmp_path / "x/out", PLAN, {}, [side])
  assert names_in(tmp_path) == ["tokenizer.json"]


def test_no_space_left_from_the_start(tmp_path):
  plan = [PlannedTensor(TensorSpec("a", "F32", (1 << 50,)), None)]
  with pytest.raises(ZedaError, match=r"No space left .* needs 4503599\.\d+ GB"):
    write_model(tmp_path / "x/out", plan, {})
  assert names_in(tmp_path) == []


def test_other_refusals_of_the_file_system_are_sentences(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("x")
  with pytest.raises(ZedaError, match="is a file"):
    write_model(tmp_path / "file", PLAN, {})
  with pytest.raises(ZedaError, match="could not be written"):
    write_model(tmp_path / "file/out", PLAN, {})
  with pytest.raises(ZedaError, match="mount point"):
    write_model("/", PLAN, {}, overwrite=True)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ZedaError, match="current or the home"):
    write_model(tmp_path, PLAN, {}, overwrite=True)
  assert names_in(tmp_path) == ["file"]


KILLED = """
import os, signal, sys
from zeda_jax.checkpoint.directory import new_directory
with new_directory(sys.argv[1], overwrite=True) as temporary:
  (temporary / "half").write_text("x")
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_left_goes_with_the_next_one(tmp_path):
  result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out[1]")], check=False, cwd=ROOT)
  assert result.returncode == -signal.SIGKILL
  assert len(names_in(tmp_path)) == 1 and ".partial-" in names_in(tmp_path)[0]
  write_model(tmp_path / "out[1]", PLAN, {})
  assert names_in(tmp_path) == ["out[1]"]


def test_a_run_that_is_still_going_is_left_alone(tmp_path):
  with pytest.raises(ZedaError, match="is not empty"), new_directory(tmp_path / "out") as first:
    write_model(tmp_path / "out", PLAN, {})
    assert first.is_dir()


def test_an_old_directory_comes_back_after_a_kill_between_the_renames(tmp_path):
  (tmp_path / ".out.replaced-1").mkdir()
  (tmp_path / ".out.replaced-1/old").write_text("x")
  with pytest.raises(ZedaError, match="is not empty"):
    write_model(tmp_path / "out", PLAN, {})
  assert names_in(tmp_path) == ["out"]
  assert names_in(tmp_path / "out") == ["old"]


def test_source_and_target_must_lie_apart(tmp_path):
  for source, target in (("m", "m"), ("m", "m/out"), ("m/in", "m")):
    with pytest.raises(ZedaError, match="overlaps"):
      check_apart(tmp_path / source, tmp_path / target)
  check_apart(tmp_path / "m", tmp_path / "m2")


def test_side_files_are_all_but_weights_code_and_hidden_ones(tmp_path):
  carried = ["chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json", "vocab.json"]
  left = ["config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "x.PT", "y.pth"]
  left += ["pytorch_model.bin.index.json", "z.gguf", "modeling.py", ".gitattributes"]
  for name in carried + left:
    (tmp_path / name).write_text("x")
  (tmp_path / "original").mkdir()
  assert [file.name for file in list_side_files(tmp_path)] == carried
  assert list_side_files(None) == list_side_files(tmp_path / "gone") == []
