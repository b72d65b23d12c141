"""Orbax checkpoints: exact round trips, other shardings, killed saves, and complaints that name the array."""

import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zeda_jax.checkpoint.orbax import CheckpointStore, load_params, save_params
from zeda_jax.config import ModelConfig
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder


class Moments(NamedTuple):
  mean: jax.Array
  empty: tuple[()]


@flax.struct.dataclass
class State:
  params: dict
  opt: tuple
  step: jax.Array
  key: jax.Array


def make_state(seed=0):
  rng = np.random.default_rng(seed)
  params = {
    "runs": {0: {"kernel": jnp.asarray(rng.normal(size=(2, 8, 8)), jnp.bfloat16)}, 10: {"scale": jnp.ones(3)}},
    "frozen": None,
  }
  opt = (Moments(jnp.asarray(rng.normal(size=(8, 8)), jnp.float32), ()), jnp.int32(seed))
  return State(params, opt, jnp.int32(seed), jax.random.split(jax.random.key(seed), 3))


def assert_identical(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_in_a_fresh_store(tmp_path):
  data_state = {"index": 3, "nested": [1, {"a": "ü"}]}
  with CheckpointStore(tmp_path / "c") as store:
    assert store.latest_step() is None
    store.save(5, make_state(5), data_state, {"stage": "sft"})
  with CheckpointStore(tmp_path / "c") as store:
    found = store.restore(jax.eval_shape(make_state))
  assert found.step == 5
  assert found.data_state == data_state
  assert found.metadata == {"stage": "sft"}
  assert_identical(found.state, make_state(5))


def test_keeps_the_newest(tmp_path):
  with CheckpointStore(tmp_path, keep=2) as store:
    for step in (1, 2, 3, 4):
      store.save(step, make_state(step), step)
    store.save(4, make_state(99), 99)  # is there already
    store.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    assert_identical(store.restore(make_state()).state, make_state(4))
    assert_identical(store.restore(make_state(), step=3).state, make_state(3))


def test_state_may_be_donated_while_it_is_written(tmp_path):
  change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  make = jax.jit(lambda: {"a": jnp.arange(4_000_000, dtype=jnp.float32).reshape(2000, 2000)})
  with CheckpointStore(tmp_path) as store:
    state = make()
    store.save(1, state)
    for _ in range(5):
      state = change(state)
    jax.block_until_ready(state)
    assert_identical(store.restore(state).state, make())


def test_grain_iterators_go_on_where_they_were(tmp_path):
  def dataset_iterator():
    return iter(grain.MapDataset.range(20).shuffle(seed=1).batch(2).to_iter_dataset())

  def loader_iterator():
    sampler = grain.samplers.IndexSampler(20, grain.sharding.NoSharding(), shuffle=True, seed=1, num_epochs=1)
    return iter(grain.DataLoader(data_source=range(20), sampler=sampler, operations=[grain.transforms.Batch(2)]))

  for name, make in (("dataset", dataset_iterator), ("loader", loader_iterator)):
    first, again = make(), make()
    before = [next(first).tolist() for _ in range(3)]
    with CheckpointStore(tmp_path / name) as store:
      store.save(3, make_state(), first.get_state())
      again.set_state(store.restore(make_state()).data_state)
    rest = [batch.tolist() for batch in first]
    assert [batch.tolist() for batch in again] == rest
    assert sorted(i for batch in before + rest for i in batch) == list(range(20))


def test_mismatches_are_named(tmp_path):
  with CheckpointStore(tmp_path) as store:
    with pytest.raises(ZedaError, match="no complete checkpoint"):
      store.restore(make_state())
    store.save(1, {"a": jnp.ones((2, 3)), "b": jnp.ones(2)})
    for other, complaint in (
      ({"a": jnp.ones((3, 3)), "b": jnp.ones(2)}, r"a is float32\[2, 3\], expected float32\[3, 3\]"),
      ({"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(2)}, r"a is float32\[2, 3\], expected bfloat16"),
      ({"a": jnp.ones((2, 3))}, "b is not expected"),
      ({"a": jnp.ones((2, 3)), "b": jnp.ones(2), "c": {"d": jnp.ones(1)}}, "c.d is missing"),
    ):
      with pytest.raises(ZedaError, match=rf"{tmp_path}/1 does not fit this run \({complaint}"):
        store.restore(other)


def test_damaged_checkpoint_is_a_sentence(tmp_path):
  with CheckpointStore(tmp_path) as store:
    store.save(1, make_state(1), 1)
    store.save(2, make_state(2), 2)
  for damage in (lambda p: shutil.rmtree(p / "state" / "d"), lambda p: (p / "state" / "_METADATA").unlink()):
    damage(tmp_path / "2")
    with CheckpointStore(tmp_path) as store, pytest.raises(ZedaError, match=f"cannot read checkpoint {tmp_path}/2 .*"):
      store.restore(make_state())
  shutil.rmtree(tmp_path / "2")
  with CheckpointStore(tmp_path) as store:
    assert_identical(store.restore(make_state()).state, make_state(1))


def test_position_of_older_versions_is_read_if_it_was_one(tmp_path):
  with CheckpointStore(tmp_path) as store:
    store.save(1, make_state(1), 1)
  data = tmp_path / "1" / "data"
  shutil.rmtree(data)
  data.mkdir()
  for process in (0, 1):  # as two processes wrote it
    (data / f"process_{process}-of-2.json").write_text('{"json": {"next_index": 7}}')
  with CheckpointStore(tmp_path) as store:
    found = store.restore(make_state())
    assert found.data_state == {"next_index": 7}
    assert_identical(found.state, make_state(1))
    (data / "process_1-of-2.json").write_text('{"json": {"next_index": 8}}')
    with pytest.raises(ZedaError, match=f"{data} holds different data positions of 2 processes"):
      store.restore(make_state())


def test_unwritable_directory_is_a_sentence(tmp_path):
  with CheckpointStore(tmp_path / "c") as store:
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "c").write_text("a file")
    with pytest.raises(ZedaError, match=f"cannot write checkpoint {tmp_path}/c/1 "):
      store.save(1, make_state(1))
      store.wait()


def test_full_disk_is_a_sentence_and_leaves_no_rest(tmp_path, monkeypatch):
  def full(*args, **kwargs):
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    raise ValueError(
      "RESOURCE_EXHAUSTED: Failed writing: " + "x" * 500 + ": No space left on device [os_error_code='28']"
    )

  with CheckpointStore(tmp_path) as store:
    store.save(1, make_state(1))
    store.wait()
    monkeypatch.setattr(store._manager, "save", full)
    with pytest.raises(
      ZedaError, match=r"/2 \(ValueError: No space left on device\): free some space and run the same"
    ):
      store.save(2, make_state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def in_subprocess(code, *arguments, devices=1, **options):
  flags = f"--xla_force_host_platform_device_count={devices}"
  repository = str(pathlib.Path(__file__).parents[2])
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": repository}
  return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True, **options)


RESHARD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from zeda_jax.checkpoint.orbax import CheckpointStore

def mesh(*shape):
  return jax.make_mesh(shape, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)

assert jax.device_count() == 8
values = {"w": np.arange(16 * 8, dtype=np.float32).reshape(16, 8), "b": np.arange(8, dtype=np.float32)}
first = {"w": NamedSharding(mesh(8, 1), P("data")), "b": NamedSharding(mesh(8, 1), P())}
state = {**jax.tree.map(jax.device_put, values, first), "key": jax.random.key(3)}
with CheckpointStore(sys.argv[1]) as store:
  store.save(1, state)
  store.wait()
  for shape, spec in (((2, 4), P("expert", "data")), ((4, 2), P(None, "expert")), ((1, 8), P(("data", "expert")))):
    wanted = {"w": NamedSharding(mesh(*shape), spec), "b": NamedSharding(mesh(*shape), P("data"))}
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=wanted[k]) for k, v in values.items()}
    found = store.restore({**abstract, "key": jax.random.key(0)}).state
    for name, value in values.items():
      assert found[name].sharding.is_equivalent_to(wanted[name], value.ndim), (name, found[name].sharding)
      np.testing.assert_array_equal(found[name], value)
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(state["key"])).all()
"""


def test_restores_onto_other_shardings(tmp_path):
  process = in_subprocess(RESHARD, tmp_path, devices=8, stderr=subprocess.PIPE)
  output = process.communicate(timeout=120)[1]
  assert process.returncode == 0, output
  with CheckpointStore(tmp_path) as store:  # and onto this process's single device
    abstract = {"w": jnp.zeros((16, 8)), "b": jnp.zeros(8), "key": jax.random.key(0)}
    found = store.restore(abstract).state
  np.testing.assert_array_equal(found["w"], np.arange(16 * 8).reshape(16, 8))
  assert found["w"].sharding == abstract["w"].sharding


SAVE_FOREVER = """
import sys
import jax.numpy as jnp
from zeda_jax.checkpoint.orbax import CheckpointStore
with CheckpointStore(sys.argv[1]) as store:
  for step in range((store.latest_step() or 0) + 1, 10_000):
    store.save(step, {f"array{i}": jnp.full((300, 300), step, jnp.float32) for i in range(20)}, step)
"""


def test_killed_saves_leave_only_whole_checkpoints(tmp_path):
  choose = random.Random(os.urandom(8))
  abstract = {f"array{i}": jnp.zeros((300, 300)) for i in range(20)}
  last = 0
  for _ in range(3):
    process = in_subprocess(SAVE_FOREVER, tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / str(last + 2)).exists():
      assert process.poll() is None
      assert time.monotonic() < deadline
      time.sleep(0.001)
    time.sleep(choose.uniform(0, 0.2))
    process.kill()
    process.wait()
    with CheckpointStore(tmp_path) as store:
      found = store.restore(abstract)
      assert [path.name for path in tmp_path.iterdir() if not path.name.isdigit()] == []
    assert found.step >= last + 2
    assert found.data_state == found.step
    assert all((array == found.step).all() for array in found.state.values())
    last = found.step


CONFIG = ModelConfig(
  model_type="qwen3_moe",
  vocab_size=32,
  hidden_size=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  intermediate_size=24,
  moe_intermediate_size=12,
  num_experts=4,
  num_experts_per_tok=2,
  moe_layers=(True, False, True),
  num_zero_experts=2,
)


def pure(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_round_trip(tmp_path, dtype):
  (tmp_path / "source").mkdir()
  (tmp_path / "source" / "tokenizer.json").write_text("{}")
  model = Decoder(CONFIG.replace(dtype=dtype, source=str(tmp_path / "source")), rngs=nnx.Rngs(0))
  nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model, nnx.Param)))
  save_params(tmp_path / "out", model)
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "params", "tokenizer.json"]
  found = load_params(tmp_path / "out")
  assert found.config == model.config
  assert_identical(pure(found), pure(model))


def test_model_directory_is_never_overwritten_unasked(tmp_path):
  model = Decoder(CONFIG, rngs=nnx.Rngs(0))
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine.txt").write_text("mine")
  with pytest.raises(ZedaError, match="is not empty"):
    save_params(tmp_path / "out", model)
  assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
  save_params(tmp_path / "out", model, overwrite=True)
  assert_identical(pure(load_params(tmp_path / "out")), pure(model))


def test_model_that_is_not_there_or_does_not_fit(tmp_path):
  with pytest.raises(ZedaError, match=r"config.json does not exist"):
    load_params(tmp_path)
  save_params(tmp_path / "out", Decoder(CONFIG, rngs=nnx.Rngs(0)))
  file = tmp_path / "out" / "config.json"
  file.write_text(file.read_text().replace('"vocab_size": 32', '"vocab_size": 33'))
  with pytest.raises(ZedaError, match=r"does not fit its config.json \(embed.embedding is float32\[32, 16\], expected"):
    load_params(tmp_path / "out")
  shutil.rmtree(tmp_path / "out" / "params")
  with pytest.raises(ZedaError, match="has no readable params/"):
    load_params(tmp_path / "out")
