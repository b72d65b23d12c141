"""What one device of a compiled program sends: collectives by kind, counted through loops.

The optimized HLO text is read: a computation's instructions count as often as the loops around them run. A loop of
known length compares its counter with a constant; the exchange's loop of further rounds, which has none, usually makes
no round and counts as none; any other counts once.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

from zeda_jax.models.expert_parallel import FURTHER_ROUNDS

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}  # else 4
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?(%?[\w.\-]+(?:, ?%?[\w.\-]+)*)")


class Sent(NamedTuple):
  """What a device sends to others of its groups."""

  kind: str
  group: int  # devices that exchange with each other
  bytes: float


def sent(text: str, exchange_capacity: float = 1.0) -> list[Sent]:
  """All collectives of a program, summed by kind and size of group.

  Args:
    text: optimized HLO.
    exchange_capacity: of the buffers of ragged exchanges, relative to the rows they hold (`Sharding.capacity`).
  """
  computations, entry = _computations(text)
  total: dict[tuple[str, int], float] = defaultdict(float)

  def walk(name: str, times: float) -> None:
    for line in computations.get(name, ()):
      match = _INSTRUCTION.match(line)
      if match is None:
        continue
      operation = match[2].removesuffix("-start")
      if operation in KINDS:
        # The TPU's reduce-scatter is a fusion of this name around an all-reduce.
        kind = "reduce-scatter" if "all-reduce-scatter" in name else operation
        group = _group_size(line)
        size = _size(match[1]) / (2 if match[2].endswith("-start") and operation == "all-gather" else 1)
        if kind == "ragged-all-to-all":
          size /= exchange_capacity
        total[kind, group] += times * _sent_of(kind, operation, size, group)
      elif operation == "while":
        body, condition = _named(line, "body"), _named(line, "condition")
        walk(body, times * _trips(line, computations.get(condition, ())))
      elif operation != "all-reduce" and (called := _CALLED.search(line)):
        for callee in called[1].split(","):
          walk(callee.strip().lstrip("%"), times)

  walk(entry, 1.0)
  return [Sent(kind, group, size) for (kind, group), size in sorted(total.items()) if size > 0]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """(instructions by computation, name of the entry computation)"""
  found: dict[str, list[str]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
      name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
      current = found.setdefault(name, [])
      entry = name if line.startswith("ENTRY") else entry
    elif line.rstrip() == "}":
      current = None
    elif current is not None:
      current.append(line)
  return found, entry


def _named(line: str, what: str) -> str:
  found = re.search(rf"{what}=%?([\w.\-]+)", line)
  return found[1] if found else ""


def _trips(line: str, condition: list[str] | tuple[str, ...]) -> float:
  known = re.search(r'known_trip_count[^\d]*"?(\d+)', line)
  if known:
    return int(known[1])
  if FURTHER_ROUNDS in line:
    return 0
  bounds = [int(n) for text in condition for n in re.findall(r"= s32\[\][^ ]* constant\((\d+)\)", text)]
  return max(bounds, default=1)


def _size(shapes: str) -> float:
  """Bytes of a result, a tuple's summed."""
  parts = re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", shapes))
  return sum(_BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in parts)


def _group_size(line: str) -> int:
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", mesh[2]))
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return listed[1].count(",") + 1
  if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
    return int(iota[1])
  return 2


def _sent_of(kind: str, operation: str, result: float, group: int) -> float:
  """Bytes that one device sends, from the bytes of its result."""
  if kind == "collective-permute":
    return result
  others = (group - 1) / group
  if kind == "all-reduce":
    return 2 * others * result
  # The result of a reduce-scatter proper is a part; what is named so above has a whole one.
  return others * result * (group if operation == "reduce-scatter" else 1)
