"""Memory and traffic of one device from shapes alone: what is known without a compiler.

Arguments of the step are exact. Temporaries and traffic are those of the arrays that dominate in compiled steps: what
is kept between layers, gradients, gathered matrices, and the buffers in which rows travel. See docs/plan.md for how far
off that is.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from zeda_jax.config import ModelConfig
from zeda_jax.ops.token_losses import CHUNK_BYTES
from zeda_jax.plan.program import Sent
from zeda_jax.plan.steps import Batch, Models, bytes_per_device
from zeda_jax.sharding import Sharding

_STUDENT_EXCHANGES, _TEACHER_EXCHANGES = 5, 2  # of rows in a layer: there and back; backward there twice and back


def _numbers(tree: Any) -> float:
  return float(sum(math.prod(x.shape) for x in jax.tree.leaves(tree)))


def _sizes(sharding: Sharding) -> tuple[int, int]:
  data, expert = sharding.mesh.shape.values()
  return data, expert


def _parts(params: Any) -> tuple[float, float]:
  """(numbers in experts, in all other matrices of the layers)"""
  leaves = jax.tree_util.tree_leaves_with_path(params["runs"])
  names = lambda path: [getattr(key, "key", None) for key in path]
  experts = sum(math.prod(x.shape) for path, x in leaves if "experts" in names(path))
  return float(experts), _numbers(params["runs"]) - experts


def numbers_by_kind(params: Any) -> dict[str, float]:
  """How many numbers the layers have: in "experts", and in all "others"."""
  return dict(zip(("experts", "others"), _parts(params), strict=True))


def kept_activations(config: ModelConfig, tokens: int) -> float:
  """Bytes that the forward pass of `tokens` tokens leaves for the backward pass."""
  width, size = config.num_heads * config.head_dim, jnp.dtype(config.dtype).itemsize
  per_layer = config.hidden_size
  if config.remat != "layer":  # projections, and attention's output
    per_layer += 2 * config.hidden_size + 2 * width + 2 * config.num_kv_heads * config.head_dim
  if config.remat == "none":  # norms, rotary embedding, shared experts
    per_layer += 8 * config.hidden_size + 2 * width
  return float(config.num_layers * tokens * per_layer * size)


def _exchange_rows(config: ModelConfig, sharding: Sharding, tokens: int) -> float:
  """Rows of the buffers of one exchange, or of the sorted picks where every device has all experts."""
  capacity = sharding.capacity if sharding.expert_devices > 1 else 1.0
  return tokens * config.num_experts_per_tok * capacity


def expert_buffers(config: ModelConfig, sharding: Sharding, tokens: int, backward: bool = True) -> float:
  """Bytes at work in the experts of one layer: rows, products and gathered matrices."""
  hidden, inner, size = config.hidden_size, config.moe_intermediate_size, jnp.dtype(config.dtype).itemsize
  rows = _exchange_rows(config, sharding, tokens)
  matrices = 3 * config.num_experts / sharding.expert_devices * hidden * inner
  if not backward:
    return size * (rows * (3 * hidden + 3 * inner) + matrices)
  return size * (rows * (4 * hidden + 6 * inner) + 3 * matrices)


def train_temporaries(models: Models, batch: Batch, sharding: Sharding) -> dict[str, float]:
  """Bytes by kind: gradients, activations, and the rest."""
  config, devices = models.config, sharding.num_devices
  tokens = batch.rows_at_once(devices) * batch.length
  size = jnp.dtype(config.dtype).itemsize
  trained = _numbers(models.trained) / devices
  gradients = trained * (4 + size) + (4 * trained if batch.parts > 1 else 0)
  activations = kept_activations(config, tokens)
  table = 2 * config.vocab_size * config.hidden_size * size
  working = expert_buffers(config, sharding, tokens) + 6 * CHUNK_BYTES + table
  optimizer = 4 * trained  # updates in fp32, when nothing of the passes is alive any more
  rest = max(working, optimizer - activations)
  return {"gradients": gradients, "activations": activations, "temporaries": rest}


def exchanges(zero_ratio: float, teacher_runs: bool) -> float:
  """How often the rows of a static model's picks travel in a layer: the student's fall with 1 - r_ZE."""
  return (1 - zero_ratio) * _STUDENT_EXCHANGES + teacher_runs * _TEACHER_EXCHANGES


def train_traffic(
  models: Models, batch: Batch, sharding: Sharding, ragged: bool = True, teacher_runs: bool = True
) -> list[Sent]:
  """What one device sends in a step in which no pick is a zero expert.

  `ragged` tells whether the rows travel alone, or in buffers with room for `sharding.capacity` times as many.
  """
  config, (data, expert) = models.config, _sizes(sharding)
  size = jnp.dtype(config.dtype).itemsize
  experts, others = _parts(models.teacher_params)
  ends = 2.0 * config.vocab_size * config.hidden_size
  of = lambda group, numbers: (group - 1) / group * numbers
  everything = data * expert
  # Student forward and again in the backward pass, teacher forward; the head for each pass of both models.
  layers = (2 + teacher_runs) * (of(data, experts / expert) + of(everything, others)) * size * batch.parts
  head = (4 + 2 * teacher_runs) * of(everything, ends / 2) * size * batch.parts
  gathered = layers + head
  summed = 0.0
  if _numbers(models.trained) > experts:  # all of them, not the routers alone
    summed = (of(data, experts / expert) + of(everything, others)) * size + of(everything, ends / 2) * (4 + size)
  rows = batch.padded(everything) // everything * batch.length * config.num_experts_per_tok
  times = sum(config.moe_layers) * exchanges(0.0, teacher_runs)
  exchanged = times * of(expert, rows * config.hidden_size) * size
  found = [
    Sent("all-gather", data if data > 1 else everything, gathered),
    Sent("reduce-scatter", data if data > 1 else everything, summed * batch.parts),
    row_traffic(expert, exchanged, sharding, ragged),
  ]
  return [s for s in found if s.bytes > 0]


def row_traffic(group: int, size: float, sharding: Sharding, ragged: bool) -> Sent:
  """`size` bytes of rows that travel, in buffers with room for more of them where they can't travel alone."""
  return Sent("ragged-all-to-all", group, size) if ragged else Sent("all-to-all", group, size * sharding.capacity)


def train_memory_traffic(
  models: Models, batch: Batch, sharding: Sharding, zero_ratio: float = 0.0, teacher_runs: bool = True
) -> float:
  """Bytes between one device's memory and its compute units in a step, about: what does not fit on the chip."""
  config, devices = models.config, sharding.num_devices
  size = jnp.dtype(config.dtype).itemsize
  tokens = batch.padded(devices) // devices * batch.length
  experts, others = _parts(models.teacher_params)
  whole = experts / sharding.expert_devices + others
  matrices = 2 * (3 + teacher_runs) * whole * size * batch.parts  # written and read: gathers, one gradient
  wide = 30 * config.hidden_size + 6 * config.num_heads * config.head_dim  # of a layer's arrays, for one pass
  layers = config.num_layers * tokens * wide * size * (4 + teacher_runs)
  kept = exchanges(zero_ratio, teacher_runs)
  rows = sum(config.moe_layers) * tokens * config.num_experts_per_tok * config.hidden_size * size * 5 * kept
  logits = tokens * config.vocab_size * 4.0 * 10
  optimizer = _numbers(models.trained) / devices * (2 * (12 + size) + 8)
  return matrices + layers + rows + logits + optimizer


def arguments(models: Models, sharding: Sharding, optimizer_state: Any) -> dict[str, float]:
  """Bytes of what lives between steps, by kind. What student and teacher share counts once, as the teacher's."""
  teacher = bytes_per_device(models.teacher_params, sharding)
  return {
    "parameters": bytes_per_device(models.own(), sharding),
    "optimizer": bytes_per_device(optimizer_state, sharding),
    "teacher": teacher,
  }
