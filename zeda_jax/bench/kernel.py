"""The grouped matmul's benchmark: each backend and peer on the two products of an MoE layer."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from zeda_jax.bench import peers
from zeda_jax.bench.columns import PASSES, bound, compiled, make_row, timed
from zeda_jax.bench.inputs import Layer, Picks, noise
from zeda_jax.bench.machine import Machine
from zeda_jax.bench.shapes import Options
from zeda_jax.bench.table import DENSE, Row
from zeda_jax.ops.grouped_matmul import BACKENDS, grouped_matmul

PRODUCTS = ("gate_up", "down")

Product = Callable[[Array, Array, Array], Array]


def missing(platform: str) -> dict[str, str]:
  """Peers that cannot be measured here -> why."""
  return {name: reason for name in peers.PEERS if (reason := peers.missing(name, platform))}


def rows(
  layer: Layer,
  picks: list[Picks],
  columns: Mapping[str, str],
  options: Options,
  machine: Machine,
  products: tuple[str, ...] = PRODUCTS,
) -> list[Row]:
  """The table rows of one shape: both products, forward and, if asked for, forward + backward, at every ratio."""
  found = []
  for product in products:
    _, inner, outer = layer.params["experts"][product].shape
    itemsize = layer.x.dtype.itemsize
    for backward in options.passes:
      calls = _calls(layer, product, picks, columns, backward, options.max_seconds, machine)
      cells = timed(calls, [p.rows for p in picks], options.repeats or 1, machine, str(layer.x.dtype))
      found += [
        make_row(
          layer.shape,
          f"{product} {PASSES[backward]}",
          p,
          machine,
          cell,
          times=3 if backward else 1,
          flops=flops(p.rows, inner, outer),
          bytes=num_bytes(p.rows, inner, outer, p.touched, itemsize),
          dense_bytes=num_bytes(p.rows, inner, outer, 1, itemsize),
          weight_bytes=itemsize * p.touched * inner * outer,
        )
        for p, cell in zip(picks, cells, strict=True)
      ]
  return found


def flops(rows: int, inner: int, outer: int) -> int:
  """Of a product [rows, inner] @ [inner, outer]; its backward pass has twice as many."""
  return 2 * rows * inner * outer


def num_bytes(rows: int, inner: int, outer: int, matrices: int, itemsize: int) -> int:
  """Live rows read and written, and the matrices that are used, once each. The two products of the backward pass move
  the same three arrays in other roles."""
  return itemsize * (rows * (inner + outer) + matrices * inner * outer)


def differentiated(function: Product) -> Callable[..., tuple[Array, ...]]:
  """(lhs, rhs, group_sizes, grad) -> (out, gradient of lhs, gradient of rhs)"""

  def run(lhs: Array, rhs: Array, group_sizes: Array, grad: Array) -> tuple[Array, ...]:
    out, pullback = jax.vjp(lambda lhs, rhs: function(lhs, rhs, group_sizes), lhs, rhs)
    return out, *pullback(grad)

  return run


def dense(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
  """The product of the same FLOPs: all live rows with one matrix."""
  return jnp.dot(lhs, rhs)


def _function(name: str) -> Product:
  return functools.partial(grouped_matmul, backend=name) if name in BACKENDS else peers.PEERS[name]


def _calls(
  layer: Layer,
  product: str,
  picks: list[Picks],
  columns: Mapping[str, str],
  backward: bool,
  max_seconds: float,
  machine: Machine,
) -> list[dict[str, Callable[[], Any] | str]]:
  """Per ratio: column -> function that runs it, or why there is none."""
  rhs = layer.params["experts"][product]
  _, inner, outer = rhs.shape
  dtype = str(rhs.dtype)
  lhs, grad = noise((layer.shape.picks, inner), 1.0, dtype, 1), noise((layer.shape.picks, outer), 1.0, dtype, 2)

  def operands(p: Picks) -> tuple[Array, ...]:
    sizes = jnp.asarray(p.group_sizes, jnp.int32)
    return (lhs, rhs, sizes, grad) if backward else (lhs, rhs, sizes)

  def program(function: Product, arguments: tuple[Array, ...], limit: float) -> Callable[..., Any] | str:
    results = differentiated(function) if backward else lambda *arrays: (function(*arrays),)
    return compiled(results, arguments, machine, limit)

  limit = max_seconds * (3 if backward else 1)
  # Only the group sizes differ between the ratios, so each backend is one program.
  programs = {name: reason or program(_function(name), operands(picks[0]), limit) for name, reason in columns.items()}
  calls = []
  for p in picks:
    arguments = operands(p)
    smaller = lhs[: p.rows], rhs[0], *arguments[2:3], *(g[: p.rows] for g in arguments[3:])
    of_ratio = {DENSE: bound(program(dense, smaller, math.inf), *smaller)}
    calls.append(of_ratio | {name: bound(run, *arguments) for name, run in programs.items()})
  return calls
