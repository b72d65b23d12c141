"""The rollout stage: the teacher answers every prompt, in shards that are each written complete or not at all."""

import collections
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from zeda_jax.data.prompts import Prompts
from zeda_jax.data.rollouts import finished_shards, make_record, shard_range, write_shard
from zeda_jax.distributed import is_primary
from zeda_jax.distributed.agreement import from_primary, raise_together, together
from zeda_jax.models.decoder import Decoder
from zeda_jax.rollout.engine import Engine
from zeda_jax.rollout.generate import engine_for, to_sample
from zeda_jax.rollout.requests import Completion, Request


class Progress(Protocol):
  """(prompts answered, prompts in all, what else may be shown)"""

  def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


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
  longest: int,
  directory: pathlib.Path,
  settings: Any,
  seed: int,
  progress: Progress = lambda done, total, note="", /: None,
) -> None:
  """Writes one response per prompt to rollouts-*.jsonl, going on after the shards that exist.

  Each prompt's sampling is seeded by its own number, so a resumed run gives the same rollouts. Where there are several
  processes, all must call this with the same arguments; the primary one writes.

  Args:
    model: the teacher.
    prompts: records; their fields are carried into the rollouts.
    indices: which of them to answer.
    render: prompt number -> token ids.
    longest: tokens of the longest prompt.
    directory: of the shards.
    settings: the recipe's `rollout` section.
    seed: of the sampling.
    progress: called now and then; may raise to stop, which drops the unfinished shard.
  """
  shards = num_shards(len(indices), settings.shard_size)
  done = set(_finished(directory, shards))
  left = [shard for shard in range(shards) if shard not in done]
  answered = sum(len(shard_range(s, shards, len(indices))) for s in done)
  progress(answered, len(indices))
  if not left:
    return
  engine = engine_for(model, settings.batch_size, longest, settings.max_new_tokens, settings.cache_tokens)
  speed = lambda: f"{engine.statistics().tokens_per_second:.0f} tokens/s"
  for shard in left:
    mine = [int(indices[i]) for i in shard_range(shard, shards, len(indices))]
    show = lambda n: progress(answered + n, len(indices), speed())  # noqa: B023
    records = _answer(engine, prompts, mine, render, settings, seed, show)
    together(lambda: _write(directory, shard, shards, records))  # noqa: B023
    answered += len(mine)
    progress(answered, len(indices), speed())


def _write(directory: pathlib.Path, shard: int, shards: int, records: Iterator[dict[str, Any]]) -> None:
  """Writes the shard on the primary process; the others only take part in making its records."""
  if is_primary():
    write_shard(directory, shard, shards, records)
  else:
    collections.deque(records, maxlen=0)


def _answer(
  engine: Engine,
  prompts: Prompts,
  indices: Sequence[int],
  render: Callable[[int], list[int]],
  settings: Any,
  seed: int,
  progress: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
  """The records of one shard. Its prompts share the slots; a shard does not begin before the last one is whole, so
  that a resumed run computes the very same."""
  tokens = [render(i) for i in indices]
  sampling = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}
  requests = [
    Request(prompt, settings.max_new_tokens, seed=seed, stream=i, **sampling)
    for i, prompt in zip(indices, tokens, strict=True)
  ]

  def show(done: int, total: int) -> None:
    if done < total:  # the last ones are reported once the shard is on disk
      progress(done)

  found: dict[int, Completion] = {}
  written = 0
  for place, completion in engine.run(requests, show):
    found[place] = completion
    while written in found:
      sample, index = to_sample(found.pop(written)), indices[written]
      yield make_record(
        prompts[index], index, tokens[written], sample.tokens, sample.logprobs, finished=sample.finished
      )
      written += 1
    raise_together()  # if a record could not be written; before all take part in the engine's next step
