"""From options to a report: resolves the platform's defaults, goes through the shapes, says what is left out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from zeda_jax.bench import kernel, layer, peers, torch_block
from zeda_jax.bench.columns import chosen
from zeda_jax.bench.inputs import POPULARITY, Layer, make_layer, picks_at
from zeda_jax.bench.machine import free_bytes, header, this_machine
from zeda_jax.bench.shapes import SHAPES, Options, scaled, scaling_note
from zeda_jax.bench.table import DENSE, Report
from zeda_jax.errors import ZedaError

# kind -> (module with `rows` and `missing`, names of its peers)
KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
  "kernel": (kernel, tuple(peers.PEERS)),
  "layer": (layer, tuple(torch_block.TORCH)),
}
# A CPU does in a second what an accelerator does in a few milliseconds.
_CPU = {"dtype": "float32", "scale": 0.0625, "repeats": 3}
_ACCELERATOR = {"dtype": "bfloat16", "scale": 1.0, "repeats": 10}
_SMALL = 0.01  # a scale below which only the program is tried out, and the rates are not worth seconds


def resolved(options: Options) -> Options:
  """The options with the platform's defaults in place of None."""
  defaults = _CPU if jax.default_backend() == "cpu" else _ACCELERATOR
  changes: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(options, name) is None}
  return dataclasses.replace(options, **changes)


def is_small(scale: float) -> bool:
  return scale < _SMALL


def bench(kind: str, options: Options, say: Callable[[str], None] = lambda text: None) -> Report:
  """Measures what `options` asks for.

  Args:
    kind: a name in KINDS.
    options: see there.
    say: told what is being measured.

  Raises:
    ZedaError: an unknown backend, or no shape fits into memory.
  """
  options = resolved(options)
  dtype, scale = str(options.dtype), float(options.scale or 1)
  module, names = KINDS[kind]
  missing = module.missing(jax.default_backend())
  machine = this_machine(dtype, small=is_small(scale))
  columns = chosen(options, machine, names)
  asked = options.columns or ()
  columns = {
    name: missing.get(name, reason) for name, reason in columns.items() if name in asked or name not in missing
  }
  shapes = [scaled(SHAPES[name], scale) for name in options.shapes]
  lines = [header(machine, dtype), scaling_note(shapes, scale), routing_note(kind)]
  lines += [f"not measured: {name} {reason}" for name, reason in missing.items()]
  rows: list[Any] = []
  previous: Layer | None = None
  for shape in shapes:
    same = previous is not None and previous.shape._replace(name="", tokens=0) == shape._replace(name="", tokens=0)
    params = previous.params if previous is not None and same else None
    previous = None
    weights = shape.experts * shape.expert_weights * (4 if dtype == "float32" else 2)
    # Once as it is, once on its way to the device; gradients are as large as the weights.
    needed = (3 if options.backward else 2) * weights
    if params is None and needed > free_bytes():
      lines.append(f"{shape.name}: skipped: needs {needed / 1e9:.1f} GB, {free_bytes() / 1e9:.1f} GB are free")
      continue
    say(f"{shape.name}: {shape.tokens} tokens, top {shape.top_k} of {shape.experts} experts")
    previous = make_layer(shape, dtype, params=params)
    del params
    picks = picks_at(previous, options.ratios)
    rows += module.rows(previous, picks, columns, options, machine)
  if not rows:
    raise ZedaError(f"no shape could be measured ({'; '.join(lines[3:])}): give a smaller --scale.")
  return Report(f"zeda bench {kind}", tuple(lines), (DENSE, *columns), tuple(rows))


def routing_note(kind: str) -> str:
  text = (
    "routing: softmax router over N experts and N/2 zero experts, Gaussian tokens and router rows; experts' mean "
    f"logits differ with a standard deviation of {POPULARITY:g}, so their loads do; zero_expert_bias sets r_ZE"
  )
  return text if kind == "kernel" else text + "; the time includes routing, dispatch and combine"
