"""Rollouts on disk: written shard by shard, each complete or absent, and read one at a time for training."""

import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from zeda_jax.data import jsonl, records
from zeda_jax.errors import ZedaError

_SHARD_NAME = re.compile(r"rollouts-(\d{5})-of-(\d{5})\.jsonl")


def make_record(
  prompt: Mapping[str, Any],
  index: int,
  prompt_tokens: Sequence[int],
  response_tokens: Sequence[int],
  logprobs: Sequence[float] | None = None,
  sample: int = 0,
  zero_ratio: float | None = None,
  finished: bool = True,
) -> dict[str, Any]:
  """One rollout as a JSON object, with the prompt record's own fields carried along.

  Args:
    prompt: the record of the prompt file; a key that names a field of the rollout is replaced by it.
    index: the prompt's number in the prompt data set.
    prompt_tokens: the rendered prompt.
    response_tokens: what was sampled, including the EOS token if it ended.
    logprobs: of each response token; None if unknown (answers that came as text).
    sample: number of the sample among those of this prompt.
    zero_ratio: share of picks that were zero experts; None for a static model.
    finished: whether the response ended with EOS.
  """
  if logprobs is not None:
    # The shortest decimals that give back the same fp32: half the bytes of a double's.
    logprobs = np.asarray(logprobs, np.float32).astype(str).astype(np.float64).tolist()
  return dict(prompt) | {
    "index": int(index),
    "sample": int(sample),
    "prompt_tokens": np.asarray(prompt_tokens, np.int64).tolist(),
    "response_tokens": np.asarray(response_tokens, np.int64).tolist(),
    "logprobs": logprobs,
    "zero_ratio": None if zero_ratio is None else float(zero_ratio),
    "finished": bool(finished),
  }


def shard_name(shard: int, num_shards: int) -> str:
  return f"rollouts-{shard:05d}-of-{num_shards:05d}.jsonl"


def shard_range(shard: int, num_shards: int, num_prompts: int) -> range:
  """The prompt indices of a shard: a fixed, contiguous part; sizes of shards differ by at most one.

  Raises:
    ValueError: more shards than prompts, or no such shard.
  """
  if not 0 <= shard < num_shards <= num_prompts:
    raise ValueError(f"shard {shard} of {num_shards} over {num_prompts} prompts")
  return range(shard * num_prompts // num_shards, (shard + 1) * num_prompts // num_shards)


def finished_shards(directory: str | os.PathLike[str], num_shards: int) -> list[int]:
  """Numbers of the shards that need no more work: a shard's file exists only once it is complete.

  Raises:
    ZedaError: the directory holds shards of a run with another number of shards, hence other prompts in each.
  """
  finished = []
  for file in sorted(pathlib.Path(directory).glob("rollouts-*.jsonl")):
    match = _SHARD_NAME.fullmatch(file.name)
    if match is None:
      continue
    if int(match[2]) != num_shards:
      raise ZedaError(
        f"{file} is of a run with {int(match[2])} shards, this one has {num_shards}: use the same number, or another "
        "directory."
      )
    finished.append(int(match[1]))
  return finished


def write_shard(
  directory: str | os.PathLike[str], shard: int, num_shards: int, rollouts: Iterable[Mapping[str, Any]]
) -> pathlib.Path:
  """Writes one shard, complete or not at all; `rollouts` may be a generator, one record is in memory at a time.

  Raises:
    ZedaError: the shard exists already, or the disk is full.
  """
  pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
  path = pathlib.Path(directory) / shard_name(shard, num_shards)
  jsonl.write_jsonl(path, map(dict, rollouts))
  return path


class RolloutSource:
  """Rollouts as a random-access source for grain, from JSONL or array_record files.

  `source[i]` is the record with `prompt_tokens` and `response_tokens` as int32 arrays and `logprobs` as float32 (or
  None). Only offsets and lengths are held in memory. Picklable, for grain's worker processes.

  Raises:
    ZedaError: no file, an empty file, or (when a record is read) a field that is missing or wrong, with file:line.
  """

  def __init__(self, paths: jsonl.Paths):
    self._source = records.open_records(paths)
    self._lengths: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = int(index)
    return self._checked(self._source[index], index)

  def location(self, index: int) -> str:
    """Where rollout `index` stands, as "file:line"."""
    return self._source.location(index)

  def lengths(self, vocab_size: int | None = None) -> Int[np.ndarray, " N"]:
    """Tokens of each rollout, prompt + response, from one streaming pass that checks every record; then remembered.

    Args:
      vocab_size: if given, token ids must lie below it.

    Raises:
      ZedaError: a broken record; file:line is named.
    """
    if self._lengths is None or vocab_size is not None:
      lengths = np.zeros(len(self), np.int32)
      for index, record in enumerate(self._source):
        rollout = self._checked(record, index)
        prompt, response = rollout["prompt_tokens"], rollout["response_tokens"]
        lengths[index] = len(prompt) + len(response)
        largest = max(prompt.max(), response.max())
        if vocab_size is not None and largest >= vocab_size:
          raise ZedaError(
            f"{self.location(index)}: token id {largest} is not below vocab_size {vocab_size}: the rollouts are of "
            "another model."
          )
      self._lengths = lengths
    return self._lengths

  def _checked(self, record: dict[str, Any], index: int) -> dict[str, Any]:
    for field in ("prompt_tokens", "response_tokens"):
      tokens = _as_tokens(record.get(field))
      if tokens is None:
        raise ZedaError(
          f"{self.location(index)}: '{field}' is {'wrong' if field in record else 'missing'}; expected a non-empty "
          "list of token ids."
        )
      record[field] = tokens
    if record.get("logprobs") is not None:
      record["logprobs"] = self._logprobs(record, index)
    return record

  def _logprobs(self, record: dict[str, Any], index: int) -> np.ndarray:
    try:
      logprobs = np.asarray(record["logprobs"], np.float32)
    except (TypeError, ValueError):
      logprobs = np.zeros(0, np.float32)
    if logprobs.shape != record["response_tokens"].shape:
      raise ZedaError(
        f"{self.location(index)}: 'logprobs' is wrong; expected a list of {len(record['response_tokens'])} numbers, "
        "one per response token, or null."
      )
    return logprobs


def _as_tokens(value: Any) -> np.ndarray | None:
  """int32 [n] of a non-empty list of token ids; None if it is anything else."""
  if not isinstance(value, list) or not value:
    return None
  try:
    tokens = np.asarray(value)
  except (ValueError, OverflowError):  # ragged lists
    return None
  if tokens.ndim != 1 or tokens.dtype.kind != "i" or tokens.min() < 0 or tokens.max() > np.iinfo(np.int32).max:
    return None
  return tokens.astype(np.int32)
