"""The plan of the rollout engine: memory of parameters and pages, and time of its two programs."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_collections

from zeda_jax.config import ModelConfig
from zeda_jax.models.paged_cache import page_bytes
from zeda_jax.ops.token_losses import CHUNK_BYTES
from zeda_jax.plan import work
from zeda_jax.plan.apart import CompilerCrash, compile_apart, crash_note
from zeda_jax.plan.chips import Topology
from zeda_jax.plan.estimate import expert_buffers, numbers_by_kind, row_traffic
from zeda_jax.plan.generation import (
  PROGRAMS,
  EnginePlan,
  Load,
  Program,
  cache_bytes,
  check_load,
  engine_model,
  stage_load,
)
from zeda_jax.plan.plan import RATIOS, changed, deciding_settings, job_of, needed_bytes
from zeda_jax.plan.program import Sent
from zeda_jax.plan.roofline import step_times
from zeda_jax.plan.steps import abstract_models, bytes_per_device, make_sharding
from zeda_jax.sharding import Sharding, ragged_exchange


def make_engine_plan(
  config: ml_collections.ConfigDict,
  name: str,
  model: ModelConfig,
  topology: Topology,
  prompt_tokens: int,
  compiling: bool,
  dynamic: bool = False,
) -> EnginePlan:
  """The plan of the rollout stage of `config`: of the static teacher, or of the adapted model.

  Raises:
    ZedaError: the mesh does not fit the topology, or the rows the model; or the compiler takes no such program.
  """
  sharding = make_sharding(config, model, topology.name, "rollout")
  asked = stage_load(config, prompt_tokens)
  check_load(asked, model)
  devices = topology.devices
  load = asked.padded(devices)
  _, params, run = engine_model(abstract_models(config, model, sharding), dynamic)
  parameters, cache = bytes_per_device(params, sharding), cache_bytes(load, run, devices)
  beside = {program: _temporaries(program, run, load, sharding) for program in PROGRAMS}
  ragged = ragged_exchange(topology.chip.kind, devices)
  traffic = {program: _traffic(program, run, load, sharding, ragged) for program in PROGRAMS}
  source, note, needed = "estimate", "", 0.0
  if compiling:
    try:
      compiled = {p: compile_apart(job_of(config, model, topology, "rollout", prompt_tokens, p, dynamic), devices)
                  for p in PROGRAMS}  # fmt: skip
      source = "compiled"
      for program, found in compiled.items():
        beside[program] = found.temporaries + found.outputs or beside[program]
        kinds = {"held": parameters + cache, "temporaries": beside[program]}
        needed = max(needed, needed_bytes(found, kinds, topology.memory))
        traffic[program] = traffic[program] if found.traffic is None else found.traffic
    except CompilerCrash as crash:
      note = crash_note(crash)
  ratios = RATIOS if dynamic else RATIOS[:1]
  numbers = numbers_by_kind(params)
  programs = {}
  for program in PROGRAMS:
    flops = {str(r): _flops(program, run, load, devices, r) for r in ratios}
    times = {
      str(r): step_times(
        topology,
        sum(flops[str(r)].values()),
        _memory_traffic(program, run, load, sharding, numbers, r),
        [s._replace(bytes=s.bytes * (1 - r)) if s.kind == "ragged-all-to-all" else s for s in traffic[program]],
      )
      for r in ratios
    }
    programs[program] = Program(_tokens(program, load, devices), beside[program], flops, traffic[program], times)
  memory = {"parameters": parameters, "cache": cache, "temporaries": max(beside.values())}
  return EnginePlan(
    model=name,
    stage="rollout",
    kind="dynamic" if dynamic else "static",
    topology=topology.name,
    chips=topology.chips,
    devices=devices,
    mesh=dict(sharding.mesh.shape),
    settings=deciding_settings(config, "rollout"),
    source=source,
    note=note,
    asked=asked.slots,
    slots=load.slots,
    prompt=load.prompt,
    new=load.new,
    bucket=load.bucket(devices),
    prompts=load.prompts_at_once(devices) * devices,
    memory=memory,
    needed=max(needed, sum(memory.values())),
    available=topology.memory,
    token_bytes=page_bytes(run, load.page_size) / load.page_size,
    page_size=load.page_size,
    programs=programs,
  )


def fewer_slots(
  plan: EnginePlan, config: ml_collections.ConfigDict, again: Callable[..., EnginePlan]
) -> tuple[dict[str, Any], EnginePlan] | None:
  """The change that makes a misfit fit, and the plan with it: as many slots as there is room for; None if not for one
  on each device. `again(config, compiling)` makes a plan."""
  slots = min(plan.room["slots"], plan.slots - plan.devices)
  while slots >= plan.devices:
    changes = {"rollout.batch_size": slots}
    found = again(changed(config, changes), plan.source == "compiled")
    if found.fits:
      return changes, found
    slots = slots // 2 // plan.devices * plan.devices
  return None


def _tokens(program: str, load: Load, devices: int) -> int:
  """Of one run, on all devices."""
  return load.bucket(devices) * devices if program == "prefill" else load.slots


def _mean_length(load: Load) -> int:
  """Of a slot's sequence while it is decoded."""
  return load.prompt + load.new // 2


def _flops(program: str, config: ModelConfig, load: Load, devices: int, ratio: float) -> dict[str, float]:
  """Of one device in one run, by kind."""
  if program == "prefill":
    count = load.prompts_at_once(devices)  # the row's padding is counted with them
    one = work.forward(config, load.bucket(devices) // count, ratio)._replace(head=0.0)
    count *= devices
  else:
    one, count = work.decoded(config, _mean_length(load), 1, ratio), load.slots
  return {kind: value * count / devices for kind, value in one._asdict().items()}


def _temporaries(program: str, config: ModelConfig, load: Load, sharding: Sharding) -> float:
  """Bytes of one device beside parameters and pages, about."""
  tokens = _tokens(program, load, sharding.num_devices) // sharding.num_devices
  working = expert_buffers(config, sharding, tokens, backward=False)
  if program == "prefill":
    return working + 4 * CHUNK_BYTES
  return working + tokens * config.vocab_size * 4 * 4  # logits in fp32, and what the sampler makes of them


def _traffic(program: str, config: ModelConfig, load: Load, sharding: Sharding, ragged: bool) -> list[Sent]:
  """What one device sends in a run in which no pick is a zero expert: rows alone, for matrices stay where they are."""
  tokens, expert = _tokens(program, load, sharding.num_devices) // sharding.num_devices, sharding.expert_devices
  size = tokens * config.num_experts_per_tok * config.hidden_size * jnp.dtype(config.dtype).itemsize
  exchanged = 2 * sum(config.moe_layers) * (expert - 1) / expert * size
  return [row_traffic(expert, exchanged, sharding, ragged)] if exchanged else []


def _memory_traffic(
  program: str, config: ModelConfig, load: Load, sharding: Sharding, numbers: dict[str, float], ratio: float
) -> float:
  """Bytes between one device's memory and its compute units in a run: matrices once, those of experts that no token
  picked left out, with the picks spread evenly; what copies a layer's experts out of the stack that is scanned, which
  the compiled programs do whether they are picked or not; the cache; activations and rows."""
  size, devices = jnp.dtype(config.dtype).itemsize, sharding.num_devices
  tokens = _tokens(program, load, devices)
  picked = 1 - (1 - (1 - ratio) * config.num_experts_per_tok / config.num_experts) ** tokens
  matrices = (picked + 2) * numbers["experts"] / sharding.expert_devices + numbers["others"]
  mine = tokens // devices
  wide = 8 * config.hidden_size + 4 * config.num_heads * config.head_dim
  activations = config.num_layers * mine * wide
  rows = sum(config.moe_layers) * mine * (1 - ratio) * config.num_experts_per_tok
  rows *= 4 * config.hidden_size + 3 * config.moe_intermediate_size
  cache = page_bytes(config, load.page_size) / load.page_size * mine
  if program == "decode":
    matrices += config.vocab_size * config.hidden_size
    cache *= _mean_length(load)
  return float(size * (matrices + activations + rows) + cache)
