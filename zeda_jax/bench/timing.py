"""How time is taken: everything compiled first, then rounds in which every column runs once."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

# On accelerators a sample is this long at least: one call may be shorter than what starting and awaiting it costs.
_SAMPLE_SECONDS = 0.01
_MAX_CALLS = 1000
# Rounds go on beyond `repeats` until this much has been spent, so that calls of microseconds are not judged by three.
_ROUNDS_SECONDS = 0.2
_MAX_ROUNDS = 200

# After a call the threads of XLA and of PyTorch wait awake for milliseconds and would slow down the next column.
_PAUSE_SECONDS = 0.01


class Timing(NamedTuple):
  """Seconds per call: the median of the samples shows what to expect, the minimum what the machine can do.

  Ratios are taken between minima, which the other work of a machine disturbs least.
  """

  median: float
  minimum: float


def measure(functions: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, Timing]:
  """Times functions that were called before (so nothing is compiled here), in interleaved rounds.

  Args:
    functions: key -> function without arguments; what it returns is waited for.
    repeats: rounds at least. In each, every function is sampled once, so that a slow moment of the machine hits all.
  """
  # The CPU backend runs independent calls side by side, which would make the time of each look shorter.
  on_cpu = jax.default_backend() == "cpu"
  calls = {key: 1 if on_cpu else _calls(function) for key, function in functions.items()}
  samples: dict[Any, list[float]] = {key: [] for key in functions}
  start = time.perf_counter()
  rounds = 0
  while rounds < repeats or (rounds < _MAX_ROUNDS and time.perf_counter() - start < _ROUNDS_SECONDS * len(functions)):
    for key, function in functions.items():
      time.sleep(_PAUSE_SECONDS if on_cpu else 0)
      samples[key].append(_sample(function, calls[key]))
    rounds += 1
  return {key: Timing(statistics.median(times), min(times)) for key, times in samples.items()}


def _sample(function: Callable[[], Any], calls: int) -> float:
  start = time.perf_counter()
  for _ in range(calls):
    result = function()  # in order on the device, so the last one's end is the end of all
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / calls


def _calls(function: Callable[[], Any]) -> int:
  return min(_MAX_CALLS, max(1, math.ceil(_SAMPLE_SECONDS / _sample(function, 1))))
