"""Topologies: their names, and the links that groups of devices can use."""

import pytest

from zeda_jax.errors import ZedaError
from zeda_jax.plan.chips import parse_topology


def test_devices_and_memory():
  pod = parse_topology("v5p:4x4x4")
  assert (pod.chips, pod.devices, pod.sides) == (64, 64, (4, 4, 4))
  halves = parse_topology("tpu7x:2x2x1")
  assert (halves.chips, halves.devices) == (4, 8)
  assert halves.memory == halves.chip.memory / 2


@pytest.mark.parametrize(
  "name, group, paths",
  [
    ("v5p:4x4x4", 4, [(4, 2)]),  # a whole side is a ring
    ("v5p:4x4x4", 16, [(4, 2), (4, 2)]),
    ("v5p:8x8x8", 4, [(4, 1)]),  # half a side is a line
    ("v5e:16x16", 256, [(16, 2), (16, 2)]),
    ("v6e:8x8", 8, [(8, 1)]),  # too short for a ring
    ("v5p:2x2x1", 4, [(2, 1), (2, 1)]),
    ("tpu7x:2x2x1", 2, []),  # both halves of one chip
  ],
)
def test_paths_of_a_group(name, group, paths):
  assert parse_topology(name).paths(group) == paths


@pytest.mark.parametrize(
  "name, message",
  [
    ("v9:2x2", "'v9' is no kind of TPU; expected one of v4:2x2x1"),
    ("v5p:4x4", "such as v5p:4x4x4"),
    ("v5e:4xfour", "such as v5e:4x4"),
    ("v5e", "such as v5e:4x4"),
  ],
)
def test_unknown_topologies_are_named(name, message):
  with pytest.raises(ZedaError, match=message):
    parse_topology(name)
