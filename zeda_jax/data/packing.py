"""Packing of examples of unequal length into rows of equal length: the plan from lengths alone, then the arrays."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class RowPlan:
  """Which examples share a row: row r holds `examples[starts[r]:starts[r + 1]]`, in this order."""

  examples: Int[np.ndarray, " N"]
  starts: Int[np.ndarray, " R1"]  # R + 1 entries
  num_truncated: int  # examples longer than a row, whose end is cut off
  num_tokens: int  # tokens in rows, without padding and without what is cut off

  def __len__(self) -> int:
    return len(self.starts) - 1

  def __getitem__(self, row: int) -> Int[np.ndarray, " n"]:
    if not 0 <= row < len(self):
      raise IndexError(f"row {row} of {len(self)}")
    return self.examples[self.starts[row] : self.starts[row + 1]]


def plan_rows(
  lengths: Int[np.ndarray, " N"] | Sequence[int], row_length: int, seed: int, epoch: int = 0, open_rows: int = 64
) -> RowPlan:
  """Distributes N examples over rows: seeded shuffle, then first fit into at most `open_rows` rows at a time.

  Each example is in exactly one row; no row exceeds `row_length`, except that an example longer than that has a row to
  itself and is cut when packed (`num_truncated` counts them). The same arguments give the same plan. When an example
  fits no open row and no more may be opened, the fullest is closed: O(N * open_rows) time, O(N) memory.

  Args:
    lengths: tokens of each example, at least 1.
    row_length: tokens of a row.
    seed: of the shuffle, with `epoch`: another epoch is another shuffle.
    epoch: number of the pass over the data.
    open_rows: more rows waste fewer tokens and take longer.

  Raises:
    ValueError: an example without tokens, or row_length or open_rows below 1.
  """
  lengths = np.asarray(lengths, np.int64)
  if row_length < 1 or open_rows < 1 or (len(lengths) and lengths.min() < 1):
    raise ValueError("row_length, open_rows and all lengths must be at least 1")
  clipped = np.minimum(lengths, row_length)
  rng = np.random.default_rng([seed, epoch])
  room = np.zeros(open_rows, np.int64)  # left in each open row; 0 where there is none, which no example fits
  rows: list[list[int]] = [[] for _ in range(open_rows)]
  closed: list[list[int]] = []
  for example in rng.permutation(len(lengths)).tolist():
    length = clipped[example]
    slot = int(np.argmax(room >= length))
    if room[slot] < length:
      slot = int(np.argmin(room))
      if rows[slot]:
        closed.append(rows[slot])
      rows[slot], room[slot] = [], row_length
    rows[slot].append(example)
    room[slot] -= length
  closed += [row for row in rows if row]
  # The rows closed last are the emptiest; shuffled, every batch has about the same number of tokens.
  order = rng.permutation(len(closed))
  starts = np.zeros(len(closed) + 1, np.int64)
  np.cumsum([len(closed[row]) for row in order], out=starts[1:])
  examples = np.fromiter((example for row in order for example in closed[row]), np.int64, count=len(lengths))
  return RowPlan(examples, starts, int((lengths > row_length).sum()), int(clipped.sum()))


def join_plans(plans: Sequence[RowPlan]) -> RowPlan:
  """The rows of several plans (epochs) one after another."""
  ends = np.cumsum([0] + [len(plan.examples) for plan in plans])
  starts = [plan.starts[:-1] + end for plan, end in zip(plans, ends[:-1], strict=True)]
  return RowPlan(
    np.concatenate([plan.examples for plan in plans]),
    np.concatenate([*starts, ends[-1:]]),
    sum(plan.num_truncated for plan in plans),
    sum(plan.num_tokens for plan in plans),
  )


def pack_row(
  examples: Sequence[Mapping[str, Any]], row_length: int
) -> dict[str, Int[np.ndarray, " T"] | Float[np.ndarray, " T"]]:
  """Lays examples side by side in one row of T = row_length tokens.

  Args:
    examples: each with `prompt_tokens` and `response_tokens`; one longer than the row loses its end.
    row_length: T.

  Returns:
    int32 `tokens`; `targets` (the next token of the same example, 0 where there is none); float32 `loss_mask` (1 where
    the target is a response token: from the last prompt token to the last but one of the response); `segment_ids` (1,
    2, ... per example, 0 = padding); `positions` (from 0 in each example).

  Raises:
    ValueError: the examples need more than one row.
  """
  row = {key: np.zeros(row_length, np.int32) for key in ("tokens", "targets", "segment_ids", "positions")}
  loss_mask = np.zeros(row_length, np.float32)
  start = 0
  for segment, example in enumerate(examples, start=1):
    prompt_length = len(example["prompt_tokens"])
    tokens = np.concatenate([example["prompt_tokens"], example["response_tokens"]])[:row_length]
    end = start + len(tokens)
    if end > row_length:
      raise ValueError(f"{len(examples)} examples need more than the {row_length} tokens of a row")
    row["tokens"][start:end] = tokens
    row["targets"][start : end - 1] = tokens[1:]
    row["segment_ids"][start:end] = segment
    row["positions"][start:end] = np.arange(len(tokens))
    loss_mask[start + max(prompt_length, 1) - 1 : end - 1] = 1.0
    start = end
  return row | {"loss_mask": loss_mask}
