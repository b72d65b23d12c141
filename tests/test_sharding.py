"""The mesh and the rules: what is cut along which axis. Meshes without devices suffice for most of it."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests.tiny_models import GLM_4_7_FLASH, QWEN3_30B_A3B, tiny_model
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import abstract_decoder
from zeda_jax.models.params import split_model
from zeda_jax.sharding import MESH_AXES, Rules, Sharding, make_mesh, mesh_sizes, ragged_exchange

BOTH = ("data", "expert")


def sharding_of(data, expert, **options):
  return Sharding(AbstractMesh((data, expert), MESH_AXES), **options)


def flat_specs(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, jax.sharding.NamedSharding))
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.spec for path, leaf in leaves}


@pytest.mark.parametrize("config, mesh", [(QWEN3_30B_A3B, (16, 4)), (GLM_4_7_FLASH, (16, 16)), (QWEN3_30B_A3B, (1, 4))])
def test_every_large_parameter_of_the_real_models_is_held_once(config, mesh):
  params = split_model(abstract_decoder(config.replace(num_zero_experts=config.num_experts // 2)))[1]
  sharding = sharding_of(*mesh)
  per_device = whole = 0
  for leaf, where in zip(jax.tree.leaves(params), jax.tree.leaves(sharding.state(params)), strict=True):
    per_device += np.prod(where.shard_shape(leaf.shape))
    whole += leaf.size
  assert whole / sharding.num_devices <= per_device < 1.01 * whole / sharding.num_devices


def test_which_axis_is_cut():
  params = split_model(abstract_decoder(QWEN3_30B_A3B.replace(num_zero_experts=64)))[1]
  specs = flat_specs(sharding_of(16, 4).state(params))
  assert specs["embed.embedding"] == PartitionSpec("data", "expert")  # 151936 rows are no whole tiles for 64 devices
  assert specs["runs.0.mlp.experts.gate_up"] == PartitionSpec(None, "expert", "data", None)
  assert specs["runs.0.mlp.experts.down"] == PartitionSpec(None, "expert", "data", None)
  assert specs["runs.0.mlp.router.weight"] == PartitionSpec(None, "data", "expert")
  assert specs["runs.0.attention.q_proj.kernel"] == PartitionSpec(None, BOTH, None)
  assert specs["runs.0.input_norm.scale"] == PartitionSpec(None, None)  # small: every device has it


def test_a_side_that_both_axes_do_not_divide_is_cut_along_one():
  sharding = sharding_of(3, 4, rules=Rules(replicated_below=0))
  assert sharding.spec(("embed", "embedding"), (24, 36)) == PartitionSpec(None, BOTH)
  assert sharding.spec(("embed", "embedding"), (9, 10)) == PartitionSpec("data", None)
  assert sharding.spec(("embed", "embedding"), (10, 16)) == PartitionSpec(None, "expert")
  assert sharding.spec(("embed", "embedding"), (7, 5)) == PartitionSpec(None, None)
  assert sharding.spec(("runs", 0, "x"), (12, 7)) == PartitionSpec(None, None)  # layers are never cut


def test_the_optimizers_state_lies_beside_its_parameters():
  params = split_model(tiny_model())[1]
  sharding = sharding_of(2, 3, rules=Rules(replicated_below=0))
  state = flat_specs(sharding.state(optax.adamw(1e-3).init(params)))
  of_params = flat_specs(sharding.state(params))
  for moment in ("mu", "nu"):
    found = {name.split(f".{moment}.")[1]: spec for name, spec in state.items() if f".{moment}." in name}
    assert found == of_params
  assert any(spec == PartitionSpec() for spec in state.values())  # the count


def test_batches_are_shared_out_by_rows():
  sharding = sharding_of(2, 4)
  specs = jax.tree.map(lambda where: where.spec, sharding.batch({"tokens": np.zeros((16, 5)), "weight": np.zeros(8)}))
  assert specs == {"tokens": PartitionSpec(BOTH), "weight": PartitionSpec(BOTH)}
  with pytest.raises(ZedaError, match=r"12 rows.*8 devices.*data=2 x expert=4.*multiple of 8"):
    sharding.batch(np.zeros((12, 5)))


def test_meshes():
  mesh = make_mesh(devices=jax.devices()[:1])
  assert mesh.axis_names == MESH_AXES and dict(mesh.shape) == {"data": 1, "expert": 1}
  assert hash(Sharding(mesh)) == hash(Sharding(make_mesh(1, -1, devices=jax.devices()[:1])))


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((3, 4), "data=3 x expert=4 does not fit the 8 devices"),
    ((-1, 3), "product is 8"),
    ((2, 2), "does not fit the 8 devices"),
    ((-1, -1), "-1 for one"),
    ((0, 8), "positive numbers"),
    ((1, 8), "12 experts.*expert=8 devices: choose one of 1, 2, 3, 4, 6, 12"),
  ],
)
def test_meshes_that_cannot_be(arguments, message):
  with pytest.raises(ZedaError, match=message):
    make_mesh(*arguments, num_experts=12, devices=jax.devices()[:1] * 8)


def test_settings_that_cannot_be():
  with pytest.raises(ZedaError, match="capacity is 0"):
    sharding_of(2, 2, capacity=0)
  with pytest.raises(ZedaError, match="make_mesh"):
    Sharding(AbstractMesh((2, 2), ("data", "model")))
  with pytest.raises(ZedaError, match=r"6 experts.*expert=4"):
    sharding_of(2, 4).spec(("experts", "down"), (6, 4, 8))


@pytest.mark.parametrize(
  "kind, devices, ragged", [("TPU v5 lite", 16, True), ("TPU v5 lite", 32, False), ("TPU v6 lite", 256, True)]
)
def test_slices_whose_compiler_refuses_ragged_exchanges(kind, devices, ragged):
  assert ragged_exchange(kind, devices) is ragged


def test_sizes_of_a_mesh_without_devices():
  assert mesh_sizes(64, -1, 4) == (16, 4) and mesh_sizes(64, 8, -1) == (8, 8) and mesh_sizes(6, 2, 3) == (2, 3)


def test_parts_of_whole_tiles_come_first():
  sharding = sharding_of(16, 4, rules=Rules(replicated_below=0))
  assert sharding.spec((), (512, 1024)) == PartitionSpec(BOTH, None)  # 8 rows
  assert sharding.spec((), (500, 8192)) == PartitionSpec(None, BOTH)  # 128 columns
  assert sharding.spec((), (128, 512)) == PartitionSpec("data", "expert")
  assert sharding.spec((), (100, 640)) == PartitionSpec(None, BOTH)  # none: the longest side
  assert sharding.spec(("experts",), (4, 100, 2048)) == PartitionSpec("expert", None, "data")


@pytest.mark.parametrize(
  "config, mesh, expert, share",
  [
    (QWEN3_30B_A3B, (16, 4), 64, 2 / 128),
    (QWEN3_30B_A3B, (64, 4), 128, 1 / 128),
    (GLM_4_7_FLASH, (256, 1), 64, 1 / 64),
  ],
)
def test_generation_gathers_no_matrix(config, mesh, expert, share):
  sharding = sharding_of(*mesh).for_generation(config.num_experts)
  assert dict(sharding.mesh.shape) == {"data": mesh[0] * mesh[1] // expert, "expert": expert}
  params = split_model(abstract_decoder(config.replace(sharding=None)))[1]
  for path, place in jax.tree_util.tree_leaves_with_path(sharding.state(params)):
    shape = (48, config.num_experts, 64, 64)
    if any(getattr(key, "key", None) == "experts" for key in path):
      assert np.prod(place.shard_shape(shape)) == share * np.prod(shape)
    else:
      assert place.is_fully_replicated
