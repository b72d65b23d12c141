"""The rollout stage: the teacher answers every prompt, in shards that are each written complete or not at all."""

import collections
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from zeda_jax.data.prompts import Prompts
from zeda_jax.data.rollouts import finished_shards, make_record, shard_range, write_shard
from zeda_jax.distributed import is_primary
from zeda_jax.distributed.agreement import from_primary, raise_together, together
from zeda_jax.models.decoder import Decoder
from zeda_jax.rollout.generate import generate

Progress = Callable[[int, int], None]  # (prompts answered, prompts in all)


def num_shards(num_prompts: int, shard_size: int) -> int:
  return max(1, -(-num_prompts // shard_size))


def is_finished(directory: pathlib.Path, num_prompts: int, shard_size: int) -> bool:
  shards = num_shards(num_prompts, shard_size)
  return len(_finished(directory, shards)) == shards


def _finished(directory: pathlib.Path, shards: int) -> list[int]:
  return from_primary(lambda: finished_shards(directory, shards))


def sample_rollouts(
  model: Decoder,
  prompts: Prompts,
  indices: Sequence[int],
  render: Callable[[int], list[int]],
  directory: pathlib.Path,
  settings: Any,
  seed: int,
  progress: Progress = lambda done, total: None,
) -> None:
  """Writes one response per prompt to rollouts-*.jsonl, going on after the shards that exist.

  Each prompt's sampling is seeded by its own number, so a resumed run gives the same rollouts. Where there are several
  processes, all must call this with the same arguments; the primary one writes.

  Args:
    model: the teacher.
    prompts: records; their fields are carried into the rollouts.
    indices: which of them to answer.
    render: prompt number -> token ids.
    directory: of the shards.
    settings: the recipe's `rollout` section.
    seed: of the sampling.
    progress: called between batches; may raise to stop, which drops the unfinished shard.
  """
  shards = num_shards(len(indices), settings.shard_size)
  done = set(_finished(directory, shards))
  answered = sum(len(shard_range(s, shards, len(indices))) for s in done)
  progress(answered, len(indices))
  for shard in range(shards):
    if shard in done:
      continue
    mine = [int(indices[i]) for i in shard_range(shard, shards, len(indices))]
    records = _answer(model, prompts, mine, render, settings, seed, lambda n: progress(answered + n, len(indices)))  # noqa: B023
    together(lambda: _write(directory, shard, shards, records))  # noqa: B023
    answered += len(mine)
    progress(answered, len(indices))


def _write(directory: pathlib.Path, shard: int, shards: int, records: Iterator[dict[str, Any]]) -> None:
  """Writes the shard on the primary process; the others only take part in making its records."""
  if is_primary():
    write_shard(directory, shard, shards, records)
  else:
    collections.deque(records, maxlen=0)


def _answer(
  model: Decoder,
  prompts: Prompts,
  indices: Sequence[int],
  render: Callable[[int], list[int]],
  settings: Any,
  seed: int,
  progress: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
  for first in range(0, len(indices), settings.batch_size):
    raise_together()  # if the records before these could not be written
    if first:  # the last batch is reported once its shard is on disk
      progress(first)
    batch = indices[first : first + settings.batch_size]
    tokens = [render(i) for i in batch]
    samples = generate(
      model,
      tokens,
      settings.max_new_tokens,
      settings.temperature,
      settings.top_k,
      settings.top_p,
      seed,
      batch_size=settings.batch_size,
      stream_ids=batch,
    )
    for index, prompt, sample in zip(batch, tokens, samples, strict=True):
      yield make_record(prompts[index], index, prompt, sample.tokens, sample.logprobs, finished=sample.finished)
