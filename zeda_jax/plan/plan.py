"""One plan: a training stage of the recipe on a topology, compiled or estimated. (Generation: engine.py.)"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_collections
from flax import traverse_util

from zeda_jax.config import ModelConfig
from zeda_jax.errors import ZedaError
from zeda_jax.plan import estimate, work
from zeda_jax.plan.aot import Compiled
from zeda_jax.plan.apart import CompilerCrash, compile_apart, crash_note
from zeda_jax.plan.chips import Topology
from zeda_jax.plan.generation import ahead_bytes
from zeda_jax.plan.program import Sent
from zeda_jax.plan.roofline import Times, step_times
from zeda_jax.plan.steps import (
  Batch,
  Models,
  abstract_models,
  make_sharding,
  stage_batch,
  stage_objective,
  train_arguments,
)
from zeda_jax.plan.worker import Job
from zeda_jax.sharding import ragged_exchange

RATIOS = (0.0, 0.5)  # r_ZE, for which times are given


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one device needs and does in a step. Bytes and FLOPs are one device's."""

  model: str
  stage: str
  topology: str
  chips: int
  devices: int
  mesh: dict[str, int]
  settings: dict[str, Any]  # those that decide memory
  source: str  # "compiled" or "estimate"
  note: str  # why it is an estimate though the compiler was asked; "" otherwise
  rows: int  # that the recipe asks for
  padded_rows: int
  row_length: int
  memory: dict[str, float]  # bytes by kind
  needed: float
  available: float
  flops: dict[str, dict[str, float]]  # r_ZE -> kind -> FLOPs
  traffic: list[Sent]  # at r_ZE 0
  times: dict[str, Times]  # by r_ZE
  tokens: int  # real rows' tokens in a step: of all devices

  @property
  def fits(self) -> bool:
    return self.needed <= self.available

  def step_flops(self, ratio: str) -> float:
    """Of the real rows, on all devices."""
    return sum(self.flops[ratio].values()) * self.devices * self.rows / self.padded_rows

  @property
  def idle_devices(self) -> int:
    """Devices that have rows of padding alone."""
    return max(self.devices - self.rows, 0)

  def tokens_per_second_per_chip(self, ratio: str) -> float:
    return self.tokens / self.times[ratio].step / self.chips


def make_plan(
  config: ml_collections.ConfigDict,
  name: str,
  model: ModelConfig,
  topology: Topology,
  stage: str,
  prompt_tokens: int,
  compiling: bool,
) -> Plan:
  """The plan of `config` as it is.

  Raises:
    ZedaError: the mesh, the experts or the rows do not fit the topology; or the compiler takes no such program.
  """
  sharding = make_sharding(config, model, topology.name, stage)
  batch = stage_batch(config, stage, prompt_tokens)
  if batch.length > model.max_position_embeddings:
    raise ZedaError(
      f"Rows of {batch.length} tokens exceed the model's context of {model.max_position_embeddings}: lower "
      f"config.{stage}.{'row_length' if stage == 'sft' else 'max_new_tokens'}."
    )
  models = abstract_models(config, model, sharding, config[stage].trainable)
  state = train_arguments(config, stage, models, batch, sharding)[0]
  kinds = estimate.arguments(models, sharding, state.opt_state)
  kinds |= estimate.train_temporaries(models, batch, sharding)
  ahead = ahead_bytes(config, models, prompt_tokens, sharding) if stage == "opd" else {}
  ragged = ragged_exchange(topology.chip.kind, topology.devices)
  runs = stage_objective(config, stage).needs_teacher
  traffic = estimate.train_traffic(models, batch, sharding, ragged, runs)
  source, note, needed = "estimate", "", sum(kinds.values())
  if compiling:
    try:
      compiled = compile_apart(job_of(config, model, topology, stage, prompt_tokens, "step"), topology.devices)
      source, kinds = "compiled", _measured(kinds, compiled)
      needed = needed_bytes(compiled, kinds, topology.memory)
      traffic = traffic if compiled.traffic is None else compiled.traffic
    except CompilerCrash as crash:
      note = crash_note(crash)
  kinds, needed = kinds | ahead, needed + sum(ahead.values())
  flops = {str(r): _flops(config, stage, models, batch, topology.devices, r) for r in RATIOS}
  devices = topology.devices
  times = {}
  for ratio in RATIOS:
    total = sum(flops[str(ratio)].values()) / devices
    moved = estimate.train_memory_traffic(models, batch, sharding, ratio, runs)
    times[str(ratio)] = step_times(topology, total, moved, _with_ratio(traffic, ratio, runs))
  return Plan(
    model=name,
    stage=stage,
    topology=topology.name,
    chips=topology.chips,
    devices=devices,
    mesh=dict(sharding.mesh.shape),
    settings=deciding_settings(config, stage),
    source=source,
    note=note,
    rows=batch.rows,
    padded_rows=batch.padded(devices),
    row_length=batch.length,
    memory=kinds,
    needed=needed,
    available=topology.memory,
    flops={r: {kind: value / devices for kind, value in by.items()} for r, by in flops.items()},
    traffic=traffic,
    times=times,
    tokens=batch.rows * batch.length,
  )


def deciding_settings(config: ml_collections.ConfigDict, stage: str) -> dict[str, Any]:
  """The settings that decide memory, by the name of their flag."""
  names = ["remat", "mesh.data", "mesh.expert", "mesh.capacity"]
  more = {
    "sft": ("batch_size", "row_length", "accumulate", "trainable", "loss", "teacher_metrics"),
    "opd": ("prompts_per_step", "samples_per_prompt", "max_new_tokens", "accumulate", "trainable", "loss", "overlap"),
    "rollout": ("batch_size", "max_new_tokens"),
  }[stage]
  values = config.to_dict()
  found = {}
  for name in (*names, *(f"{stage}.{m}" for m in more)):
    value: Any = values
    for part in name.split("."):
      value = value[part]
    found[name] = value
  return found


def job_of(
  config: ml_collections.ConfigDict,
  model: ModelConfig,
  topology: Topology,
  stage: str,
  prompt_tokens: int,
  program: str,
  dynamic: bool = False,
) -> Job:
  """What a process needs to know to compile one program."""
  settings = traverse_util.flatten_dict(config.to_dict(), sep=".")
  raw = dict(model.hf_config)
  return Job(settings, raw, topology.name, stage, prompt_tokens, program, dynamic, quickly=False)


def needed_bytes(compiled: Compiled, kinds: dict[str, float], available: float) -> float:
  """Bytes of one device, by what the compiler tells; more than there are where it refuses the program."""
  needed = compiled.needed or sum(kinds.values())
  return needed if compiled.traffic is not None else max(needed, math.nextafter(available, math.inf))


def _measured(kinds: dict[str, float], compiled: Compiled) -> dict[str, float]:
  """Bytes by kind, with what the compiler says in place of the estimated temporaries.

  Arrays that student and teacher share are two arguments of the program and one in memory: arguments are counted from
  the shapes, which the compiler's own number differs from by the batch and by padding of small arrays.
  """
  temporaries = compiled.temporaries + compiled.outputs
  if not temporaries:  # refused, and not told
    return kinds
  chosen = lambda names: {name: kinds[name] for name in names if name in kinds}
  named = chosen(("gradients", "activations"))
  scale = min(1.0, temporaries / max(sum(named.values()), 1.0))
  named = {name: value * scale for name, value in named.items()}
  rest = {"temporaries": temporaries - sum(named.values())}
  return {**chosen(("parameters", "optimizer", "teacher")), **named, **rest}


def _flops(
  config: ml_collections.ConfigDict, stage: str, models: Models, batch: Batch, devices: int, ratio: float
) -> dict[str, float]:
  """Of all rows on all devices, by kind; empty rows too, since a device with rows of its own is what takes longest."""
  rows = batch.padded(devices)
  runs = stage_objective(config, stage).needs_teacher
  return work.training(models.config, rows, batch.length, config[stage].trainable, ratio, runs)._asdict()


def _with_ratio(traffic: list[Sent], ratio: float, teacher_runs: bool) -> list[Sent]:
  """The student's rows fall with 1 - r_ZE; the teacher's, weights and whole buffers are always sent."""
  left = estimate.exchanges(ratio, teacher_runs) / estimate.exchanges(0.0, teacher_runs)
  return [s._replace(bytes=s.bytes * left) if s.kind == "ragged-all-to-all" else s for s in traffic]


def changed(config: ml_collections.ConfigDict, changes: dict[str, Any]) -> ml_collections.ConfigDict:
  """A copy of the configuration with other values, by dotted name."""
  copy = config.copy_and_resolve_references()
  copy.update_from_flattened_dict(changes)
  return copy


def suggestions(
  plan: Plan, config: ml_collections.ConfigDict, model: ModelConfig, again: Callable[..., Plan]
) -> tuple[dict[str, Any], Plan] | None:
  """The cheapest change that makes a misfit fit, and the plan with it; None where none of those tried does.

  Tried one after the other, each on top of those before that helped: remat, parts of a batch, sampling and training in
  turn, more devices for the experts, training the routers alone. `again(config, compiling)` makes a plan; what the
  estimate calls hopeless is not compiled.
  """
  compiling = plan.source == "compiled"
  changes: dict[str, Any] = {}
  best = again(config, False).needed
  for name, value in _candidates(plan, config, model):
    trial = {**changes, name: value} | ({"mesh.data": -1} if name == "mesh.expert" else {})
    estimated = again(changed(config, trial), False)
    if estimated.needed >= best:
      continue
    changes, best = trial, estimated.needed
    if compiling and estimated.needed > 1.25 * plan.available:
      continue
    found = again(changed(config, trial), True) if compiling else estimated
    if found.fits:
      return changes, found
  return None


def faster_mesh(config: ml_collections.ConfigDict, plan: Plan, again: Callable[..., Plan]) -> Plan | None:
  """The plan, estimated, of the mesh whose steps are shortest at r_ZE 0.5; None if it saves less than a twentieth."""
  found = []
  for expert in (2**i for i in range(12)):
    try:
      found.append(again(changed(config, {"mesh.expert": expert, "mesh.data": -1}), False))
    except ZedaError:  # neither divides the devices nor the experts
      continue
  time = lambda p: p.times[str(RATIOS[-1])].step
  now = again(config, False)
  fitting = [p for p in found if p.needed < 0.9 * p.available and time(p) < 0.95 * time(now)]
  return min(fitting, key=time, default=None)


def _candidates(plan: Plan, config: ml_collections.ConfigDict, model: ModelConfig) -> list[tuple[str, Any]]:
  found: list[tuple[str, Any]] = []
  expert = plan.mesh["expert"]
  wider = [
    ("mesh.expert", n)
    for n in (2**i for i in range(1, 12))
    if n > expert and plan.devices % n == 0 and model.num_experts % n == 0
  ]
  if config.remat != "layer":
    found.append(("remat", "layer"))
  rows = -(-plan.rows // plan.devices)
  parts = config[plan.stage].accumulate
  found += [(f"{plan.stage}.accumulate", n) for n in range(parts + 1, rows + 1) if rows % n == 0 and plan.rows % n == 0]
  if plan.stage == "opd" and config.opd.overlap:
    found.append(("opd.overlap", False))
  found += wider
  if config[plan.stage].trainable != "router":
    found.append((f"{plan.stage}.trainable", "router"))
  return found
