"""What the plan knows of TPU chips and of the slices they come in.

Sources, as published in 2025: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} for memory, its bandwidth and the rate
of bfloat16 products; links and their one-way rates as in jax-ml.github.io/scaling-book/tpus (the documents' "interchip
interconnect" is the sum over a chip's links). tpu7x: the published rate is for 8-bit products, twice bfloat16's.
"""

import dataclasses
import math
from typing import NamedTuple

from zeda_jax.errors import ZedaError

GIB = 2**30


class Chip(NamedTuple):
  name: str
  memory: float  # bytes of HBM that the compiler lets a program have
  flops: float  # bfloat16 FLOP/s
  memory_rate: float  # bytes/s
  link_rate: float  # bytes/s of one link in one direction
  kind: str  # as JAX calls it
  torus_dims: int  # of the network; two links along each
  devices: int = 1  # that JAX shows for a chip
  ring_of: int = 4  # shortest side of a slice that is closed to a ring


CHIPS = {
  "v4": Chip("v4", 30.75 * GIB, 275e12, 1228e9, 45e9, "TPU v4", 3),
  "v5e": Chip("v5e", 15.75 * GIB, 197e12, 819e9, 45e9, "TPU v5 lite", 2, ring_of=16),
  "v5p": Chip("v5p", 95.0 * GIB, 459e12, 2765e9, 90e9, "TPU v5", 3),
  "v6e": Chip("v6e", 31.25 * GIB, 918e12, 1640e9, 90e9, "TPU v6 lite", 2, ring_of=16),
  "tpu7x": Chip("tpu7x", 190.0 * GIB, 2307e12, 7370e9, 90e9, "TPU7x", 3, devices=2),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice, such as v5p:4x4x4. What JAX calls a device is a chip, or half of one (tpu7x)."""

  name: str
  chip: Chip
  sides: tuple[int, ...]

  @property
  def chips(self) -> int:
    return math.prod(self.sides)

  @property
  def devices(self) -> int:
    return self.chips * self.chip.devices

  @property
  def memory(self) -> float:
    """Bytes of one device."""
    return self.chip.memory / self.chip.devices

  def paths(self, group: int) -> list[tuple[int, int]]:
    """(chips, links of each chip) along the sides over which a group of so many neighbouring devices lies, about.

    A whole side that is long enough is closed to a ring and has two links a chip, a part of one is a line.
    """
    found, chips = [], max(group // self.chip.devices, 1)
    for side in sorted(s for s in self.sides if s > 1):
      if chips > 1:
        length = min(side, chips)
        found.append((length, 2 if length == side >= self.chip.ring_of else 1))
        chips = -(-chips // side)
    return found


def parse_topology(name: str) -> Topology:
  """`v5p:4x4x4` as a Topology.

  Raises:
    ZedaError: another kind of chip, or sides that are not two or three numbers as the chip wants them.
  """
  kind, _, shape = name.partition(":")
  known = "v4:2x2x1 ... 8x8x8, v5e:2x2 ... 16x16, v5p:2x2x1 ... 8x8x8, v6e:2x2 ... 16x16, tpu7x:2x2x1 ..."
  if kind not in CHIPS:
    raise ZedaError(f"--topology={name}: {kind!r} is no kind of TPU; expected one of {known}.")
  sides = shape.split("x")
  if len(sides) != CHIPS[kind].torus_dims or not all(s.isdigit() and int(s) > 0 for s in sides):
    wanted = "x".join(["4"] * CHIPS[kind].torus_dims)
    raise ZedaError(f"--topology={name}: expected a slice such as {kind}:{wanted}; known are {known}.")
  return Topology(name, CHIPS[kind], tuple(map(int, sides)))
