"""Static and dynamic twins for `zeda bench model`: random weights in a model's sizes, or a checkpoint's."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array

from zeda_jax.bench.machine import free_bytes
from zeda_jax.config import ModelConfig
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import abstract_decoder
from zeda_jax.models.params import Params, split_model, unstacked

GIB = 2**30
_ZERO = ("zero_weight", "zero_correction_bias")  # what a static router does not have


class Twin(NamedTuple):
  """One of the two models, as the engine holds it."""

  config: ModelConfig
  graphdef: nnx.GraphDef
  params: Params


def random_twins(config: ModelConfig) -> tuple[Twin, Twin]:
  """(static, dynamic) with the same random weights of config.dtype; N/2 zero experts.

  Raises:
    ZedaError: the parameters do not fit into memory.
  """
  dynamic = config.replace(num_zero_experts=config.num_experts // 2)
  graphdef, shapes = split_model(abstract_decoder(dynamic))
  needed = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) * jnp.dtype(config.dtype).itemsize
  check_memory(needed, "the parameters")
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  drawn = [_draw(path, x.shape, config.dtype, seed) for seed, (path, x) in enumerate(leaves)]
  return _twins(graphdef, jax.tree.unflatten(jax.tree.structure(shapes), drawn), dynamic)


def checkpoint_twins(directory: str, layers: int | None, dtype: str, unstack: bool) -> tuple[Twin, Twin]:
  """(static, dynamic) of a checkpoint: a static one is injected, of a dynamic one the zero experts are left out.

  Args:
    layers: how many of its first layers; None means all.
    unstack: as the engine has it on a CPU.
  """
  from zeda_jax.checkpoint.huggingface import load_hf
  from zeda_jax.models.decoder import inject

  model = load_hf(directory, dtype=dtype)
  graphdef, params = split_model(model if model.config.is_dynamic else inject(model))
  config = model.config.replace(num_zero_experts=model.config.num_zero_experts or model.config.num_experts // 2)
  if layers is not None and layers < config.num_layers:
    params = params | {"runs": _first(params["runs"], config, layers)}
    config = config.replace(moe_layers=config.moe_layers[:layers])
    graphdef, _ = split_model(abstract_decoder(config))
  if unstack:
    graphdef, params = unstacked(graphdef, params)
    config = config.replace(stack_layers=False)
  return _twins(graphdef, params, config)


def check_memory(needed: float, what: str) -> None:
  """Raises ZedaError if there is not so much memory left."""
  free = free_bytes()
  if needed > free:
    raise ZedaError(
      f"{what} need {needed / GIB:.1f} GiB and {free / GIB:.1f} are free: give fewer --layers, shorter --lengths or "
      "fewer --slots."
    )


def _first(runs: Params, config: ModelConfig, layers: int) -> Params:
  """The first layers of stacked runs."""
  kept = {}
  for number, run in enumerate(config.layer_runs):
    count = min(run.length, layers - run.start)
    if count > 0:
      kept[number] = jax.tree.map(lambda leaf, count=count: leaf[:count], runs[number])
  return kept


def _twins(graphdef: nnx.GraphDef, params: Params, config: ModelConfig) -> tuple[Twin, Twin]:
  static = config.replace(num_zero_experts=0)
  flat = traverse_util.flatten_dict(params)
  without = traverse_util.unflatten_dict({path: x for path, x in flat.items() if path[-1] not in _ZERO})
  return Twin(static, split_model(abstract_decoder(static))[0], without), Twin(config, graphdef, params)


def _draw(path: tuple[Any, ...], shape: tuple[int, ...], dtype: str, seed: int) -> Array:
  """Weights that keep the size of what passes through them; norms are ones, correction biases 0."""
  name = jax.tree_util.keystr(path)
  if "correction_bias" in name:
    return jnp.zeros(shape, jnp.float32)
  if "norm" in name:
    return jnp.ones(shape, dtype)
  # The rows of routers and of the embedding lie in the last axis; tokens are as large as what a norm makes of them.
  inputs = 1 if "embed" in name else shape[-1] if "router" in name else shape[-2] if len(shape) > 1 else shape[-1]
  return _noise(shape, inputs**-0.5, dtype, seed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _noise(shape: tuple[int, ...], std: float, dtype: str, seed: Array) -> Array:
  """Uniform numbers, each made from its own place alone, so that tens of gigabytes need no memory beside them."""
  mixed = jnp.full(shape, jnp.uint32(seed) * jnp.uint32(0x9E3779B9))
  for axis in range(len(shape)):
    mixed = (mixed ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
  uniform = (mixed >> 8).astype(jnp.float32) / 2**24
  return ((uniform - 0.5) * (std * 12**0.5)).astype(dtype)
