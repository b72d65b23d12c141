"""From work and traffic to a time. The rule, for one step:

  compute   FLOPs / (EFFICIENCY x the chip's bfloat16 rate)
  memory    bytes to and from HBM / its rate
  weights   bytes of gathers and sums / the links they can use
  rows      bytes of the exchange between experts' devices, times the hops they make, / the links they can use
  step      max(compute, memory, weights) + rows

Gathers can run beside other layers' products, the rows of a layer cannot run beside the experts that wait for them. The
efficiency is an assumption, not a measurement.
"""

from collections.abc import Iterable
from typing import NamedTuple

from zeda_jax.plan.chips import Topology
from zeda_jax.plan.program import Sent

EFFICIENCY = 0.5  # of the chip's peak, in products


class Times(NamedTuple):
  """Seconds."""

  compute: float
  memory: float
  weights: float
  rows: float

  @property
  def step(self) -> float:
    return max(self.compute, self.memory, self.weights) + self.rows

  @property
  def bound(self) -> str:
    return max(("compute", "memory", "weights", "rows"), key=lambda name: getattr(self, name))


def step_times(topology: Topology, flops: float, memory_bytes: float, traffic: Iterable[Sent]) -> Times:
  """Of one device's FLOPs, bytes of HBM and bytes sent."""
  chip = topology.chip
  times = {True: 0.0, False: 0.0}
  for sent in traffic:
    times["all-to-all" in sent.kind] += _seconds(topology, sent)
  return Times(
    compute=flops * chip.devices / (EFFICIENCY * chip.flops),
    memory=memory_bytes * chip.devices / chip.memory_rate,
    weights=times[False],
    rows=times[True],
  )


def _seconds(topology: Topology, sent: Sent) -> float:
  paths = topology.paths(sent.group)
  if not paths:  # halves of one chip
    return sent.bytes / topology.chip.memory_rate
  rate = sum(links for _, links in paths) * topology.chip.link_rate / topology.chip.devices
  if "all-to-all" not in sent.kind:  # neighbours pass parts on: every link is busy with new bytes
    return sent.bytes / rate
  # What crosses the middle of a ring or a line, which every pair of devices on its two sides shares.
  hops = sum(length / 4 for length, _ in paths)
  return sent.bytes * sent.group / (sent.group - 1) * hops / rate
