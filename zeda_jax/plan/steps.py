"""The real programs of the recipe's training stages, as shapes: a step of the student with its teacher."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx, traverse_util
from jax.sharding import AbstractMesh

from zeda_jax.config import ModelConfig
from zeda_jax.distill.objectives import Objective
from zeda_jax.distill.optimizer import make_optimizer
from zeda_jax.distill.recipe import optimizer_config
from zeda_jax.distill.step import Reference, TrainState, make_train_step
from zeda_jax.models.decoder import abstract_decoder
from zeda_jax.models.params import Params, combine, partition, split_model, trainable_partition
from zeda_jax.plan.chips import parse_topology
from zeda_jax.sharding import MESH_AXES, Sharding, make_mesh, mesh_sizes

STAGES = ("sft", "opd", "rollout")
_STEPS = 1000  # of the schedule; changes no shape


@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of one step. Rows are padded with empty ones to a multiple of devices x parts."""

  rows: int  # that the recipe asks for
  length: int  # tokens of a row
  parts: int = 1  # that are run one after the other

  def padded(self, devices: int) -> int:
    multiple = devices * self.parts
    return -(-self.rows // multiple) * multiple

  def rows_at_once(self, devices: int) -> int:
    """On one device."""
    return self.padded(devices) // devices // self.parts


def stage_batch(config: ml_collections.ConfigDict, stage: str, prompt_tokens: int) -> Batch:
  """The batch that a stage of the recipe trains on."""
  if stage == "sft":
    return Batch(config.sft.batch_size, config.sft.row_length, config.sft.accumulate)
  length = -(-(prompt_tokens + config.opd.max_new_tokens) // 16) * 16
  return Batch(config.opd.prompts_per_step * config.opd.samples_per_prompt, length, config.opd.accumulate)


def make_sharding(
  config: ml_collections.ConfigDict,
  model: ModelConfig,
  topology: str,
  stage: str,
  devices: Sequence[Any] | None = None,
) -> Sharding:
  """How a stage spreads the model over the slice; over no real devices where none are given.

  Raises:
    ZedaError: the mesh does not fit the slice or the experts.
  """
  sizes = mesh_sizes(parse_topology(topology).devices, config.mesh.data, config.mesh.expert, model.num_experts)
  mesh: Any = AbstractMesh(sizes, MESH_AXES)
  if devices is not None:
    mesh = make_mesh(*sizes, num_experts=model.num_experts, devices=devices)
  sharding = Sharding(mesh, capacity=config.mesh.capacity)
  return sharding.for_generation(model.num_experts) if stage == "rollout" else sharding


@dataclasses.dataclass(frozen=True)
class Models:
  """Structures and shapes of teacher and student."""

  teacher: nnx.GraphDef
  teacher_params: Params
  student: nnx.GraphDef
  trained: Params
  frozen: Params
  config: ModelConfig  # the student's

  def own(self) -> Params:
    """The student's parameters that are not the teacher's arrays: those in training, and rows of zero experts."""
    teachers = traverse_util.flatten_dict(self.teacher_params)
    shared = lambda path: path in teachers
    return combine(self.trained, partition(self.frozen, shared)[1])


def abstract_models(
  config: ml_collections.ConfigDict, model: ModelConfig, sharding: Sharding, trainable: str = "all"
) -> Models:
  """Teacher and student as the recipe makes them of a checkpoint with this config.json; nothing is allocated."""
  model = model.replace(
    dtype=config.dtype or model.dtype, remat=config.remat, scan_unroll=config.scan_unroll, sharding=sharding
  )
  zero, picks = config.student.num_zero_experts, config.student.num_experts_per_tok
  dynamic = model.replace(num_zero_experts=model.num_experts // 2 if zero is None else zero)
  student = dynamic if picks is None else dynamic.replace(num_experts_per_tok=picks)

  def typed(params: Params) -> Params:
    def leaf(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      kept = "correction_bias" in path[-1].key  # fp32 beside narrower weights
      return jax.ShapeDtypeStruct(x.shape, jnp.float32 if kept else model.dtype)

    return jax.tree_util.tree_map_with_path(leaf, params)

  teacher_def, teacher_params = split_model(abstract_decoder(model))
  student_def, student_params = split_model(abstract_decoder(student))
  trained, frozen = trainable_partition(typed(student_params), trainable)
  return Models(teacher_def, typed(teacher_params), student_def, trained, frozen, student)


def stage_objective(config: ml_collections.ConfigDict, stage: str) -> Objective:
  """What a training stage of the recipe minimises."""
  settings = config[stage]
  if stage == "opd":
    options = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
  else:
    options = {"teacher_metrics": settings.teacher_metrics}
  return Objective(settings.loss, settings.balance, settings.balance_tokens, **options)


def train_program(
  config: ml_collections.ConfigDict, stage: str, models: Models, batch: Batch, sharding: Sharding
) -> tuple[Any, tuple[Any, ...]]:
  """(the jitted step, its arguments as shapes that lie where they will)"""
  settings = config[stage]
  optimizer = optimizer_config(settings)
  objective = stage_objective(config, stage)
  step = make_train_step(models.student, models.teacher, objective, optimizer, _STEPS, settings.accumulate)
  arguments = train_arguments(config, stage, models, batch, sharding)
  return step, tuple(placed(tree, sharding, rows=i == 2) for i, tree in enumerate(arguments))


def train_arguments(
  config: ml_collections.ConfigDict, stage: str, models: Models, batch: Batch, sharding: Sharding
) -> tuple[TrainState, Reference, dict[str, Any]]:
  """Shapes of state, reference and batch."""
  transform = make_optimizer(optimizer_config(config[stage]), _STEPS)
  scalar: Any = lambda dtype: jax.ShapeDtypeStruct((), dtype)
  opt_state, key = jax.eval_shape(transform.init, models.trained), jax.eval_shape(lambda: jax.random.key(0))
  state = TrainState(models.trained, opt_state, scalar(jnp.int32), key)
  number = scalar(jnp.float32)
  reference = Reference(models.frozen, models.teacher_params, {"weight": number, "coefficient": number})
  types = {"tokens": jnp.int32, "targets": jnp.int32, "loss_mask": jnp.float32, "segment_ids": jnp.int32}
  types |= {"positions": jnp.int32} | ({"old_logprobs": jnp.float32} if stage == "opd" else {})
  shape = batch.padded(sharding.num_devices), batch.length
  return state, reference, {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}


def placed(tree: Any, sharding: Sharding, rows: bool = False) -> Any:
  """The shapes with where they live: those of a batch by rows, others by the rules of parameters."""
  where = sharding.batch(tree) if rows else sharding.state(tree)
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, where)


def bytes_per_device(tree: Any, sharding: Sharding) -> float:
  """Of parameters, optimizer state and the like, as the rules spread them."""
  leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(sharding.state(tree)), strict=True)
  size = lambda x: 4 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
  return float(sum(math.prod(place.shard_shape(x.shape)) * size(x) for x, place in leaves))
