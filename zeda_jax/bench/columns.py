"""From a function to a column of the table: compiled, checked, or skipped with the reason in words."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from zeda_jax.bench.inputs import Picks
from zeda_jax.bench.machine import Machine, free_bytes
from zeda_jax.bench.shapes import Options, Shape
from zeda_jax.bench.table import DENSE, Row
from zeda_jax.bench.timing import Timing, measure
from zeda_jax.errors import ZedaError
from zeda_jax.ops.grouped_matmul import BACKENDS

# Largest difference to the first column that still counts as the same result, relative to the largest value.
_TOLERANCE = {("cpu", "float32"): 1e-4}
PASSES = {False: "forward", True: "forward + backward"}
_ROUNDED = 2e-2  # bfloat16, and float32 products that an accelerator makes of shorter numbers


def backend_names(platform: str) -> list[str]:
  """The backends of grouped_matmul that run on a platform; GPUs go by the names of their makers there."""
  mine = {platform} | ({"cuda", "rocm"} if platform == "gpu" else set())
  return [name for name, backend in BACKENDS.items() if backend.platforms is None or mine & set(backend.platforms)]


def chosen(options: Options, machine: Machine, peers: Sequence[str]) -> dict[str, str]:
  """The columns to measure beside dense: name -> "", or why it can't be.

  Raises:
    ZedaError: an unknown name was asked for.
  """
  running = backend_names(machine.platform)
  if options.columns is None:
    return dict.fromkeys([*running, *peers], "")
  for name in options.columns:
    if name not in BACKENDS and name not in peers:
      known = ", ".join(dict.fromkeys([*BACKENDS, *peers]))
      raise ZedaError(f"backend {name!r} is unknown; expected some of {known}.")

  def reason(name: str) -> str:
    if name in running or name in peers:
      return ""
    return f"runs on {' or '.join(BACKENDS[name].platforms or ())} only"

  return {name: reason(name) for name in options.columns}


def compiled(
  function: Callable[..., Any], arguments: Sequence[Any], machine: Machine, max_seconds: float
) -> Callable[..., Any] | str:
  """The compiled function, or why it is skipped: too slow, too large, or it does not compile.

  Slowness is foreseen from XLA's own count of FLOPs. It counts a loop's body once, so a backend that loops over what
  is there passes, and one that multiplies every row with every expert's matrix does not.
  """
  try:
    program = jax.jit(function).lower(*arguments).compile()
  except Exception as error:  # a backend or a library that cannot do this shape must not end the others' table
    return failure(error)
  cost = program.cost_analysis() or {}
  seconds = cost.get("flops", 0.0) / machine.dense_rate
  if seconds > max_seconds:
    return f"skipped: would take about {seconds:.2g} s"
  memory = program.memory_analysis()
  needed = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory is not None else 0
  if needed > free_bytes():
    return f"skipped: needs {needed / 1e9:.1f} GB, {free_bytes() / 1e9:.1f} GB are free"
  return program


def bound(run: Callable[..., Any] | str, *arguments: Any) -> Callable[[], Any] | str:
  """The function without arguments, or the reason as it is."""
  return run if isinstance(run, str) else functools.partial(run, *arguments)


def failure(error: Exception) -> str:
  words = " ".join(str(error).split())
  return f"failed: {type(error).__name__}: {words[:80]}".rstrip(": ")


def difference(found: Any, expected: Any, live_rows: int, spare: int = 0) -> float:
  """Largest difference over the rows that count but the `spare` worst, relative to the largest expected value."""
  live = (jnp.arange(expected.shape[0]) < live_rows)[:, None]
  wide = [jnp.where(live, jnp.asarray(x), 0).astype(jnp.float32) for x in (found, expected)]
  of_rows = jnp.sort(jnp.abs(wide[0] - wide[1]).max(axis=1))
  return float(of_rows[-1 - min(spare, of_rows.size - 1)] / jnp.maximum(jnp.abs(wide[1]).max(), 1e-30))


def disagreement(distance: float, other: str, machine: Machine, dtype: str) -> str:
  """Why a column is not timed whose result is `distance` away from column `other`'s; "" if it is near enough."""
  if distance <= _TOLERANCE.get((machine.platform, dtype), _ROUNDED):
    return ""
  return f"not timed: differs from {other} by {distance:.2g} of the largest value"


def timed(
  calls: Sequence[Mapping[str, Callable[[], Any] | str]],
  live_rows: Sequence[int],
  repeats: int,
  machine: Machine,
  dtype: str,
  spare: Mapping[str, int] | None = None,
) -> list[dict[str, Timing | str]]:
  """Runs every call once, compares the columns' results, then times all that agree, interleaved.

  Args:
    calls: per row of the table, column -> function, or why there is none. A function returns a tuple of
      arrays, of which the first two at most are [rows, ...] and compared; DENSE computes something else.
    live_rows: per row of the table, how many rows of those arrays count.
    repeats: see `timing.measure`.
    machine: it ran on.
    dtype: of the products.
    spare: column -> rows that may differ; PyTorch's router may break a near-tie between two experts differently.
  """
  cells: list[dict[str, Timing | str]] = [{} for _ in calls]
  functions: dict[tuple[int, str], Callable[[], Any]] = {}
  for i, columns in enumerate(calls):
    expected: tuple[str, Any] | None = None
    for name, call in columns.items():
      reason = call if isinstance(call, str) else ""
      try:
        found = None if isinstance(call, str) else jax.block_until_ready(call())
      except Exception as error:  # as in `compiled`
        reason = failure(error)
      if not reason and name != DENSE:
        found = tuple(found or ())[:2]  # the rows' own results; gradients of the matrices follow
        expected = expected or (name, found)
        distance = max(
          difference(a, b, live_rows[i], (spare or {}).get(name, 0)) for a, b in zip(found, expected[1], strict=True)
        )
        reason = disagreement(distance, expected[0], machine, dtype)
      cells[i][name] = reason
      if not reason:
        functions[i, name] = call  # type: ignore[assignment]
  for (i, name), timing in measure(functions, repeats).items():
    cells[i][name] = timing
  return cells


def make_row(
  shape: Shape,
  work: str,
  picks: Picks,
  machine: Machine,
  cells: dict[str, Timing | str],
  *,
  times: int,
  flops: int,
  bytes: int,
  dense_bytes: int,
  weight_bytes: int,
) -> Row:
  """A row of the table from the counts of its forward pass.

  Args:
    times: 1, or 3 for forward + backward: each product has two in the backward pass, of the same FLOPs, and they move
      the same arrays in other roles.
    weight_bytes: of the experts that have rows.
  """
  compute, copy = times * flops / machine.dense_rate, times * weight_bytes / machine.copy_rate
  return Row(
    shape=shape.name,
    tokens=shape.tokens,
    work=work,
    zero_ratio=picks.zero_ratio,
    rows=picks.rows,
    touched=picks.touched,
    busiest=picks.busiest,
    flops=times * flops,
    bytes=times * bytes,
    dense_bytes=times * dense_bytes,
    roofline=max(compute, copy),
    bound="FLOPs" if compute >= copy else "weights",
    cells=cells,
  )
