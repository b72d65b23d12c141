"""The MoE layer's benchmark: routing, dispatch, products and combine with each backend, beside PyTorch's block."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zeda_jax.bench import torch_block
from zeda_jax.bench.columns import PASSES, bound, compiled, failure, make_row, timed
from zeda_jax.bench.inputs import Layer, Params, Picks, apply, noise
from zeda_jax.bench.machine import Machine
from zeda_jax.bench.shapes import Options, Shape
from zeda_jax.bench.table import DENSE, Row
from zeda_jax.ops.grouped_matmul.activation import swiglu_halves

# Share of the tokens whose output may differ from PyTorch's: where two experts' probabilities agree to the last digits,
# the two routers may pick differently.
_NEAR_TIES = 0.001

Call = Callable[[], Any] | str


def missing(platform: str) -> dict[str, str]:
  """Peers that cannot be measured here -> why."""
  reason = torch_block.missing(platform)
  return dict.fromkeys(torch_block.TORCH, reason) if reason else {}


def rows(layer: Layer, picks: list[Picks], columns: Mapping[str, str], options: Options, machine: Machine) -> list[Row]:
  """The table rows of one shape: forward and, if asked for, forward + backward, at every ratio."""
  found = []
  itemsize = layer.x.dtype.itemsize
  copies = 2 if options.backward else 1
  wants_torch = any(name in torch_block.TORCH and not reason for name, reason in columns.items())
  block = torch_block.torch_block(layer, machine.threads, copies) if wants_torch else ""
  spare = dict.fromkeys(torch_block.TORCH, int(_NEAR_TIES * layer.shape.tokens))
  for backward in options.passes:
    calls = _jax_calls(layer, picks, columns, backward, options.max_seconds, machine)
    for name, reason in columns.items():
      if name in torch_block.TORCH:
        for of_ratio, p in zip(calls, picks, strict=True):
          of_ratio[name] = reason or _torch_call(layer, block, name, p, backward)
    cells = timed(calls, [layer.shape.tokens] * len(picks), options.repeats or 1, machine, str(layer.x.dtype), spare)
    for p, cell in zip(picks, cells, strict=True):
      counts = {
        "flops": flops(layer.shape, p.rows),
        "bytes": num_bytes(layer.shape, p.touched, itemsize),
        "dense_bytes": num_bytes(layer.shape._replace(tokens=p.rows), 1, itemsize),
        "weight_bytes": itemsize * p.touched * layer.shape.expert_weights,
      }
      work = f"layer {PASSES[backward]}"
      found.append(make_row(layer.shape, work, p, machine, cell, times=3 if backward else 1, **counts))
  return found


def flops(shape: Shape, rows: int) -> int:
  """Of the experts' forward pass; the router's are left out, about a hundredth of the experts'."""
  return 2 * rows * shape.expert_weights


def num_bytes(shape: Shape, touched: int, itemsize: int) -> int:
  """The weights of the experts that have rows, the tokens and the output; what lies between could stay on the chip."""
  return itemsize * (touched * shape.expert_weights + 2 * shape.tokens * shape.hidden)


def dense_mlp(params: Params, x: Float[Array, "M H"]) -> Float[Array, "M H"]:
  """The work of the same FLOPs without routing: one expert for all live rows."""
  return swiglu_halves(x @ params["gate_up"]) @ params["down"]


def _jax_calls(
  layer: Layer,
  picks: list[Picks],
  columns: Mapping[str, str],
  backward: bool,
  max_seconds: float,
  machine: Machine,
) -> list[dict[str, Call]]:
  """Per ratio: column -> function that runs it, or why there is none; without those of PyTorch."""
  limit = max_seconds * (3 if backward else 1)

  def forward(backend: str, params: Params, x: Array, bias: Array) -> Array:
    return apply(layer.graphdef, params, x, bias, backend)[0]

  def program(function: Callable[..., Array], arguments: tuple[Any, ...], limit: float) -> Call | Callable[..., Any]:
    def run(params: Params, x: Array, *rest: Array) -> tuple[Any, ...]:
      if not backward:
        return (function(params, x, *rest),)
      out, pullback = jax.vjp(lambda params, x: function(params, x, *rest[:-1]), params, x)
      of_params, of_x = pullback(rest[-1])
      return out, of_x, of_params

    return compiled(run, arguments, machine, limit)

  grads = (noise(layer.x.shape, 1.0, str(layer.x.dtype), 2),) if backward else ()
  operands = [(layer.params, layer.x, jnp.float32(p.bias), *grads) for p in picks]
  programs: dict[str, Any] = {}
  for name, reason in columns.items():
    if name not in torch_block.TORCH:
      programs[name] = reason or program(functools.partial(forward, name), operands[0], limit)
  one = {name: value[0] for name, value in layer.params["experts"].items()}
  calls = []
  for p, arguments in zip(picks, operands, strict=True):
    x = noise((p.rows, layer.shape.hidden), 1.0, str(layer.x.dtype), 3)
    smaller = (one, x, x) if backward else (one, x)
    of_ratio: dict[str, Call] = {DENSE: bound(program(dense_mlp, smaller, math.inf), *smaller)}
    calls.append(of_ratio | {name: bound(run, *arguments) for name, run in programs.items()})
  return calls


def _torch_call(layer: Layer, block: Any, name: str, picks: Picks, backward: bool) -> Call:
  if isinstance(block, str):
    return block
  if np.isfinite(picks.bias):
    return "has no zero experts"
  try:
    x = torch_block.to_torch(layer.x)
    experts = torch_block.TORCH[name]
    if not backward:
      return torch_block.forward(block, experts, x)
    grad = noise(layer.x.shape, 1.0, str(layer.x.dtype), 2)
    return torch_block.forward_backward(block, experts, x, torch_block.to_torch(grad))
  except Exception as error:  # as in `compiled`
    return failure(error)
