"""The goals this package set itself on a CPU, in float32, each beside what this machine makes of it. Nothing fails."""

import dataclasses
from collections.abc import Callable

import jax

from zeda_jax.bench import kernel, layer, torch_block
from zeda_jax.bench.inputs import make_layer, picks_at
from zeda_jax.bench.machine import header, this_machine
from zeda_jax.bench.run import is_small, routing_note
from zeda_jax.bench.shapes import SHAPES, Options, Shape, scaled, scaling_note
from zeda_jax.bench.table import DENSE, Goal, Report, Row
from zeda_jax.bench.timing import Timing
from zeda_jax.errors import ZedaError

_DTYPE = "float32"
_REPEATS = {"kernel": 10, "layer": 3}
# gate_up of the first is M = 4096 rows, K = N = 512, G = 32.
_SHAPES = {
  "kernel": Shape("M=4096 K=N=512 G=32", 1024, 512, 256, 32, 4),
  "layer": SHAPES["qwen3-30b-a3b/prefill"]._replace(name="qwen3-30b-a3b/4096", tokens=4096),
}


def check(
  kind: str, repeats: int | None = None, scale: float | None = None, say: Callable[[str], None] = lambda text: None
) -> Report:
  """Measures what the goals are about.

  Args:
    kind: "kernel" or "layer".
    repeats: rounds; None means 10 of the kernel's, 3 of the layer's.
    scale: shrinks the shape, see `shapes.scaled`; the goals are for 1, the default.
    say: told what is being measured.

  Raises:
    ZedaError: the platform is no CPU.
  """
  platform = jax.default_backend()
  if platform != "cpu":
    raise ZedaError(f"--check is about CPUs, and this platform is {platform}: set JAX_PLATFORMS=cpu, or leave it out.")
  full, scale = _SHAPES[kind], scale or 1.0
  shape = scaled(full, scale)
  machine = this_machine(_DTYPE, small=is_small(scale))
  say(f"{shape.name}: {shape.tokens} tokens, top {shape.top_k} of {shape.experts} experts")
  made = make_layer(shape, _DTYPE)
  picks = picks_at(made, (0.0, 0.5))
  # The goals compare with what is slow, so nothing is too slow here.
  options = Options(repeats=repeats or _REPEATS[kind], max_seconds=1e6)
  if kind == "kernel":
    columns = {"tiled": "", "ragged_dot": ""}
    rows = kernel.rows(made, picks, columns, options, machine, ("gate_up",))
    both = dataclasses.replace(options, backward=True)
    rows += kernel.rows(made, picks[:1], {"tiled": ""}, both, machine, ("gate_up",))[1:]
  else:
    columns = {"tiled": "", **dict.fromkeys(torch_block.TORCH, torch_block.missing(platform))}
    rows = layer.rows(made, picks, columns, options, machine)
  lines = (header(machine, _DTYPE), scaling_note([shape], scale, {full.name: full}), routing_note(kind))
  goals = _kernel_goals(rows) if kind == "kernel" else _layer_goals(rows)
  return Report(f"zeda bench {kind} --check", lines, (DENSE, *columns), tuple(rows), goals)


def _kernel_goals(rows: list[Row]) -> tuple[Goal, ...]:
  full, half, both = rows[0], rows[1], rows[2]  # of gate_up: forward at 0 and ½, forward + backward at 0
  return (
    Goal("tiled / dense, forward", "≤ 1.6", _ratio(full, "tiled", full, DENSE)),
    Goal("ragged_dot / tiled, forward", "≥ 30", _ratio(full, "ragged_dot", full, "tiled")),
    Goal("tiled, half the rows / all rows, forward", "≤ 0.58", _ratio(half, "tiled", full, "tiled")),
    Goal("tiled / dense, forward + backward", "≤ 1.8", _ratio(both, "tiled", both, DENSE)),
  )


def _layer_goals(rows: list[Row]) -> tuple[Goal, ...]:
  full, half = rows
  peers = [ratio for name in torch_block.TORCH if isinstance(ratio := _ratio(full, name, full, "tiled"), float)]
  faster = min(peers) if peers else _ratio(full, next(iter(torch_block.TORCH)), full, "tiled")
  return (
    Goal("layer, r_ZE ½ / r_ZE 0", "≤ 0.62", _ratio(half, "tiled", full, "tiled")),
    Goal("transformers' block on PyTorch (its faster form) / layer, r_ZE 0", "≥ 1.4", faster),
  )


def _ratio(above: Row, column: str, below: Row, other: str) -> float | str:
  """Of the minima; or why there is none."""
  for cell in (above.cells[column], below.cells[other]):
    if not isinstance(cell, Timing):
      return cell
  first, second = above.cells[column], below.cells[other]
  assert isinstance(first, Timing) and isinstance(second, Timing)
  return first.minimum / second.minimum
