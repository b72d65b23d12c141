import errno
import json
import os
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from zeda_jax.checkpoint import safetensors_io
from zeda_jax.checkpoint.safetensors_io import PlannedTensor, TensorSpec, dtype_code, open_weights, write_weights
from zeda_jax.errors import ZedaError


def planned(name: str, array: np.ndarray) -> PlannedTensor:
  return PlannedTensor(TensorSpec(name, dtype_code(array.dtype), array.shape), lambda: array)


def some_arrays() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    "odd_bytes": rng.integers(0, 255, 3).astype(np.uint8),
    "half": rng.standard_normal((5, 3)).astype(ml_dtypes.bfloat16),
    "single": rng.standard_normal((4, 2, 3)).astype(np.float32),
    "scalar": np.asarray(2.5, np.float32),
    "empty": np.zeros((0, 7), np.float16),
    "transposed": rng.standard_normal((6, 4)).astype(np.float32).T,
  }


def write(directory: pathlib.Path, arrays: dict[str, np.ndarray], max_shard_bytes: int = 10**9) -> None:
  directory.mkdir(exist_ok=True)
  write_weights(directory, [planned(name, array) for name, array in arrays.items()], max_shard_bytes)


def test_the_formats_own_library_reads_what_is_written(tmp_path):
  write(tmp_path, some_arrays())
  assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
  found = load_file(tmp_path / "model.safetensors")
  assert found.keys() == some_arrays().keys()
  for name, array in some_arrays().items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)


def test_reads_what_the_formats_own_library_writes(tmp_path):
  save_file({k: np.array(v, order="C") for k, v in some_arrays().items()}, tmp_path / "model.safetensors")
  stored = open_weights(tmp_path)
  for name, array in some_arrays().items():
    got = stored[name].read()
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(got, array)
    assert got.flags.writeable


def test_reads_rows(tmp_path):
  write(tmp_path, some_arrays())
  np.testing.assert_array_equal(open_weights(tmp_path)["single"].read(1, 3), some_arrays()["single"][1:3])


def test_tensors_are_aligned_to_their_items(tmp_path):
  write(tmp_path, some_arrays())
  for tensor in open_weights(tmp_path).values():
    assert tensor.offset % safetensors_io.DTYPES[tensor.dtype].itemsize == 0


@pytest.mark.parametrize("spaces", [0, 8, 1000, 3])
def test_copied_bytes_keep_their_place_within_a_page_and_their_alignment(tmp_path, spaces):
  header = b'{"a":{"dtype":"F32","shape":[50],"data_offsets":[0,200]}}'
  header += b" " * (-len(header) % 8 + spaces)
  (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(range(200)))
  source = open_weights(tmp_path)["a"]
  (tmp_path / "out").mkdir()
  plan = [planned("first", np.ones(2, np.float32)), PlannedTensor.copied(source)]
  write_weights(tmp_path / "out", plan)
  found = open_weights(tmp_path / "out")
  assert found["a"].offset % 4096 == source.offset // 8 * 8
  np.testing.assert_array_equal(found["a"].read(), source.read())
  np.testing.assert_array_equal(load_file(tmp_path / "out/model.safetensors")["first"], 1)


def test_shards_fill_up_to_the_limit_and_the_index_adds_up(tmp_path):
  arrays = {f"t{i}": np.full(100, i, np.float32) for i in range(5)} | {"large": np.ones(1000, np.float32)}
  write(tmp_path, arrays, max_shard_bytes=800)
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == 400 * 5 + 4000
  of = {name: int(file.split("-")[1]) for name, file in index["weight_map"].items()}
  assert of == {"t0": 1, "t1": 1, "t2": 2, "t3": 2, "t4": 3, "large": 4}
  assert (tmp_path / "model-00004-of-00004.safetensors").is_file()
  for name, tensor in open_weights(tmp_path).items():
    np.testing.assert_array_equal(tensor.read(), arrays[name])


@pytest.mark.parametrize("kernel_copy", ["works", "refuses", "does nothing", "stops half-way", "is missing"])
def test_copies_bytes_with_and_without_the_kernel(tmp_path, monkeypatch, kernel_copy):
  write(tmp_path / "a", some_arrays())
  calls = []
  real = os.copy_file_range

  def fake(source, target, count, offset):
    calls.append(count)
    if kernel_copy == "refuses" or (kernel_copy == "stops half-way" and len(calls) % 2 == 0):
      raise OSError(errno.EXDEV, "no")
    return 0 if kernel_copy == "does nothing" else real(source, target, (count + 1) // 2, offset)

  if kernel_copy == "is missing":
    monkeypatch.delattr(os, "copy_file_range")
  elif kernel_copy != "works":
    monkeypatch.setattr(os, "copy_file_range", fake)
  (tmp_path / "b").mkdir()
  write_weights(tmp_path / "b", [PlannedTensor.copied(tensor) for tensor in open_weights(tmp_path / "a").values()])
  assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_zeros_without_a_source_are_a_hole(tmp_path):
  plan = [
    planned("before", np.ones(3, np.float32)),
    PlannedTensor(TensorSpec("hole", "F32", (1 << 20,)), None),
    planned("after", np.ones(3, np.float32)),
    PlannedTensor(TensorSpec("last", "F32", (1 << 20,)), None),
  ]
  write_weights(tmp_path, plan)
  found = load_file(tmp_path / "model.safetensors")
  assert found["hole"].shape == found["last"].shape == (1 << 20,)
  assert not found["hole"].any() and not found["last"].any()
  assert found["before"].all() and found["after"].all()
  with open(tmp_path / "probe", "wb") as probe:
    probe.truncate(1 << 20)
  if (tmp_path / "probe").stat().st_blocks == 0:  # this file system has holes
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 < 1 << 20


def test_a_source_that_breaks_its_plan_is_caught(tmp_path):
  plan = [PlannedTensor(TensorSpec("a", "F32", (2,)), lambda: np.zeros(3, np.float32))]
  with pytest.raises(ValueError, match="planned"):
    write_weights(tmp_path, plan)


def test_the_index_decides_between_two_shards_with_one_name(tmp_path):
  save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model-00001-of-00002.safetensors")
  save_file({"a": np.ones(2, np.float32), "b": np.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
  files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
  assert not open_weights(tmp_path)["a"].read().any()


# --- bad input ----------------------------------------------------------------------------------------------------


def expect_refusal(directory: pathlib.Path, words: str) -> None:
  with pytest.raises(ZedaError, match=words) as caught:
    open_weights(directory)
  assert "\n" not in str(caught.value)
  assert str(caught.value).endswith(".")


@pytest.fixture
def sharded(tmp_path):
  write(tmp_path / "m", {f"t{i}": np.ones(100, np.float32) for i in range(4)}, max_shard_bytes=800)
  return tmp_path / "m"


def edit_index(directory: pathlib.Path, change) -> None:
  file = directory / "model.safetensors.index.json"
  index = json.loads(file.read_text())
  change(index)
  file.write_text(json.dumps(index))


def test_no_directory(tmp_path):
  expect_refusal(tmp_path / "nowhere", "is not a directory")


def test_no_weights(tmp_path):
  expect_refusal(tmp_path, "has no weights")


def test_only_pickles(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
  expect_refusal(tmp_path, r"only pickled weights \(pytorch_model.bin\)")


def test_shards_without_index(sharded):
  (sharded / "model.safetensors.index.json").unlink()
  expect_refusal(sharded, "no model.safetensors.index.json")


def test_missing_shard(sharded):
  (sharded / "model-00002-of-00002.safetensors").unlink()
  expect_refusal(sharded, "model-00002-of-00002.safetensors of 2 shards, which is not in")


def test_index_names_a_tensor_that_is_not_there(sharded):
  edit_index(sharded, lambda index: index["weight_map"].update(ghost="model-00001-of-00002.safetensors"))
  expect_refusal(sharded, r"do not hold \(ghost\)")


def test_index_leads_outside(sharded):
  edit_index(sharded, lambda index: index["weight_map"].update(t0="../elsewhere.safetensors"))
  expect_refusal(sharded, "not a file name")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\udcff"])
def test_broken_index(sharded, text):
  (sharded / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
  expect_refusal(sharded, "is not a safetensors index")


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_truncated_shard(sharded, keep):
  file = sharded / "model-00002-of-00002.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  expect_refusal(sharded, "00002-of-00002.safetensors is truncated")


def test_shard_with_something_behind(sharded):
  with open(sharded / "model-00001-of-00002.safetensors", "ab") as file:
    file.write(b"x")
  expect_refusal(sharded, "longer than its header says")


def test_absurd_header_length(tmp_path, monkeypatch):
  monkeypatch.setattr(safetensors_io, "_MAX_HEADER_BYTES", 10)
  write(tmp_path, some_arrays())
  expect_refusal(tmp_path, "not a safetensors file")


@pytest.mark.parametrize(
  ("header", "words"),
  [
    (b"not json", "no valid safetensors header"),
    (b"\xff\xfe", "no valid safetensors header"),
    (b"[]", "no valid safetensors header"),
    (b'{"a": 1}', "no valid safetensors header"),
    (b'{"a": {"dtype": "F32", "shape": [1]}}', "no valid safetensors header"),
    (b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}', "dtype 'F4'"),
    (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"spans 4 bytes, but F32 \[2\] takes 8"),
    (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "header is corrupt"),
  ],
)
def test_broken_header(tmp_path, header, words):
  (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
  expect_refusal(tmp_path, words)


def test_source_that_shrinks_while_being_read(tmp_path):
  write(tmp_path / "a", {"t": np.ones(100, np.float32)})
  stored = open_weights(tmp_path / "a")
  os.truncate(tmp_path / "a/model.safetensors", 200)
  with pytest.raises(ZedaError, match="became shorter"):
    stored["t"].read()
  (tmp_path / "b").mkdir()
  with pytest.raises(ZedaError, match="became shorter"):
    write_weights(tmp_path / "b", [PlannedTensor.copied(stored["t"])])
