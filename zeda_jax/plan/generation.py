"""The rollout engine on a slice: the programs it runs, as shapes, and what a plan of them says.

The engine (rollout/engine.py) runs two programs over and over: it reads a bucket of prompts, and it decodes a chunk of
steps for all slots. Both hold the parameters and the pages of the cache; what they need beyond them is never needed at
the same time.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx, traverse_util

from zeda_jax.config import ModelConfig
from zeda_jax.errors import ZedaError
from zeda_jax.models.paged_cache import init_pages, page_bytes, pages_sharding
from zeda_jax.models.params import Params, combine
from zeda_jax.plan.program import Sent
from zeda_jax.plan.roofline import Times
from zeda_jax.plan.steps import Models, placed
from zeda_jax.rollout.decoding import decode, prefill
from zeda_jax.rollout.inputs import make_rows, make_slots
from zeda_jax.rollout.pages import pages_for
from zeda_jax.rollout.requests import Request
from zeda_jax.rollout.scheduler import Plan, PromptToRead, Scheduler
from zeda_jax.sharding import Sharding

PROGRAMS = ("prefill", "decode")
_SMALLEST_BUCKET = 16
_STOP_IDS = 4


@dataclasses.dataclass(frozen=True)
class Load:
  """What the engine is to hold and do; the last three are the engine's own defaults.

  Attributes:
    slots: responses decoded together, on all devices.
    prompt: tokens of the longest prompt.
    new: tokens of the longest response.
    cache_tokens: for which the pages of all slots together have room; 0: for all slots at full length.
  """

  slots: int
  prompt: int
  new: int
  cache_tokens: int = 0
  page_size: int = 64
  chunk_steps: int = 16
  prefill_tokens: int = 2048

  @property
  def length(self) -> int:
    return self.prompt + self.new

  def prompts_at_once(self, devices: int) -> int:
    """Of the longest prompts, how many a device reads together. The last token of each is the first input of
    decoding."""
    return min(self.slots // devices, max(1, self.prefill_tokens // devices // max(self.prompt - 1, 1)))

  def bucket(self, devices: int) -> int:
    """Tokens of the row that they are packed into."""
    return max(_SMALLEST_BUCKET, 1 << (self.prompts_at_once(devices) * max(self.prompt - 1, 1) - 1).bit_length())

  @property
  def pages_per_slot(self) -> int:
    return pages_for(self.length, self.page_size)

  def pages(self, devices: int) -> int:
    """Of the cache, on all devices; as many on each."""
    asked = pages_for(self.cache_tokens, self.page_size) or self.slots * self.pages_per_slot
    return -(-asked // devices) * devices

  def padded(self, devices: int) -> "Load":
    """With as many slots on every device."""
    return dataclasses.replace(self, slots=-(-self.slots // devices) * devices)

  def scheduler(self, devices: int) -> Scheduler:
    """The engine's."""
    sizes = (self.page_size, [self.bucket(devices)], self.prefill_tokens, self.chunk_steps)
    return Scheduler(self.slots, self.pages(devices), *sizes, devices)


@dataclasses.dataclass(frozen=True)
class Program:
  """One program's part of a plan. Bytes and FLOPs are one device's, in one run of it: a bucket read, or one step.

  Attributes:
    tokens: read or made in a run, of all devices.
    temporaries: bytes beside parameters and pages.
    flops, times: by r_ZE.
    traffic: at r_ZE 0.
  """

  tokens: int
  temporaries: float
  flops: dict[str, dict[str, float]]
  traffic: list[Sent]
  times: dict[str, Times]


@dataclasses.dataclass(frozen=True)
class EnginePlan:
  """What one device holds while the engine generates, and what its two programs do. Bytes are one device's.

  Attributes:
    source: "compiled" or "estimate".
    note: why it is an estimate though the compiler was asked; "" otherwise.
    slots: on all devices; `asked` before they were filled up to as many on every device.
    bucket: tokens of a row of prompts.
    prompts: read at once, on all devices.
    token_bytes: of the cache, for one token.
  """

  model: str
  stage: str
  kind: str  # "static" or "dynamic"
  topology: str
  chips: int
  devices: int
  mesh: dict[str, int]
  settings: dict[str, Any]
  source: str
  note: str
  asked: int
  slots: int
  prompt: int
  new: int
  bucket: int
  prompts: int
  memory: dict[str, float]  # bytes by kind
  needed: float
  available: float
  token_bytes: float
  page_size: int
  programs: dict[str, Program]

  @property
  def fits(self) -> bool:
    return self.needed <= self.available

  @property
  def room(self) -> dict[str, int]:
    """Tokens of cache for which there is memory, on all devices, and slots that they fill at full length.

    With the temporaries of this plan: they grow with the slots, by little.
    """
    free = self.available - self.memory["parameters"] - self.memory["temporaries"]
    pages = max(int(free // (self.token_bytes * self.page_size)), 0)
    per_slot = pages_for(self.prompt + self.new, self.page_size)
    return {"tokens": pages * self.page_size * self.devices, "slots": pages // per_slot * self.devices}

  def tokens_per_second_per_chip(self, program: str, ratio: str) -> float:
    found = self.programs[program]
    return found.tokens / found.times[ratio].step / self.chips


def stage_load(config: ml_collections.ConfigDict, prompt_tokens: int) -> Load:
  """What the recipe's rollout stage asks of the engine."""
  settings = config.rollout
  return Load(settings.batch_size, prompt_tokens, settings.max_new_tokens, settings.get("cache_tokens", 0))


def check_load(load: Load, model: ModelConfig) -> None:
  """Raises ZedaError if the model's context is too short for it."""
  if load.length > model.max_position_embeddings:
    raise ZedaError(
      f"Rows of {load.length} tokens exceed the model's context of {model.max_position_embeddings}: lower "
      "config.rollout.max_new_tokens."
    )


def cache_bytes(load: Load, model: ModelConfig, devices: int) -> float:
  """Of one device's pages."""
  return float(load.pages(devices) // devices * page_bytes(model, load.page_size))


def ahead_bytes(
  config: ml_collections.ConfigDict, models: Models, prompt_tokens: int, sharding: Sharding
) -> dict[str, float]:
  """Bytes that one device holds beside the steps of OPD where `opd.overlap` samples while they run, by kind.

  The engine has copies of the parameters in training, for the step donates its own, and of those that decoding wants at
  other places of a mesh than training does. The others it shares.

  Args:
    config: the recipe.
    models: teacher and student.
    prompt_tokens: of the longest prompt.
    sharding: of training.
  """
  settings = config.opd
  if not settings.overlap:
    return {}
  params = combine(models.trained, models.frozen)
  decoding = sharding.for_generation(models.config.num_experts)
  flat, training, there = map(traverse_util.flatten_dict, (params, sharding.state(params), decoding.state(params)))
  trained = traverse_util.flatten_dict(models.trained).keys()
  parameters = 0.0
  for path, x in flat.items():
    shape = there[path].shard_shape(x.shape)
    if path in trained or shape != training[path].shard_shape(x.shape):
      parameters += math.prod(shape) * x.dtype.itemsize
  rows = settings.prompts_per_step * settings.samples_per_prompt
  load = Load(rows, prompt_tokens, settings.max_new_tokens, settings.cache_tokens).padded(sharding.num_devices)
  return {"engine's parameters": parameters, "engine's cache": cache_bytes(load, models.config, sharding.num_devices)}


def engine_model(models: Models, dynamic: bool) -> tuple[nnx.GraphDef, Params, ModelConfig]:
  """(structure, shapes of the parameters, config) of the adapted model, or of the static teacher."""
  if dynamic:
    return models.student, combine(models.trained, models.frozen), models.config
  return models.teacher, models.teacher_params, models.config.replace(num_zero_experts=0)


def engine_program(
  name: str, models: Models, load: Load, sharding: Sharding, dynamic: bool
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
  """(the engine's jitted function, its arguments as shapes that lie where they will, its static arguments)

  Args:
    name: of PROGRAMS.
    models: whose config has the sharding.
    load: with as many slots on every device.
    sharding: for generation.
    dynamic: the student, else the teacher.
  """
  graphdef, params, config = engine_model(models, dynamic)
  scheduler = load.scheduler(sharding.num_devices)
  count = load.pages(sharding.num_devices)
  pages = jax.eval_shape(lambda: init_pages(config.replace(sharding=None), count, load.page_size))
  where = pages_sharding(sharding)
  pages = tuple(jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=where) for p in pages)
  first = (graphdef, placed(params, sharding), pages)
  if name == "prefill":
    rows, _ = make_rows(_full_rows(load, scheduler), scheduler)
    return prefill, (*first, *_shapes(rows)), {"with_picks": False}
  slots = make_slots([], scheduler, _STOP_IDS, load.pages_per_slot)
  steps = jax.ShapeDtypeStruct((), jnp.int32)
  return decode, (*first, _shapes(slots), steps), {"size": load.chunk_steps, "with_picks": False}


def _full_rows(load: Load, scheduler: Scheduler) -> Plan:
  """As many of the longest prompts as are read at once, on each device."""
  length = load.prompt - 1
  request = Request([0] * load.prompt, load.new)
  pages = [0] * pages_for(length, load.page_size)
  shards = scheduler.num_shards
  count = load.prompts_at_once(shards)
  prompts = [PromptToRead(shard, [0] * length, pages, request, None) for shard in range(shards) for _ in range(count)]
  return Plan(load.bucket(shards), prompts)


def _shapes(tree: Any) -> Any:
  # As the engine passes them: arrays of the host, for the compiler to put where it wants them.
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
