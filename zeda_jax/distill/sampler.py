"""The rollouts of OPD: one engine for the whole stage, which takes the parameters of the student anew each step."""

import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import safetensors.numpy
from jaxtyping import Int

from zeda_jax.data.jsonl import atomic_writer
from zeda_jax.data.packing import pack_row
from zeda_jax.distributed.agreement import from_primary, together
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder
from zeda_jax.models.params import split_model
from zeda_jax.rollout.engine import Engine
from zeda_jax.rollout.generate import engine_for
from zeda_jax.rollout.requests import Completion, Request

_ROW_MULTIPLE = 16  # rows are as long as the longest sequence may get, rounded up to this


class Sampler:
  """Makes the batches of OPD.

  Args:
    settings: the recipe's `opd` section.
    seed: of the recipe; each step samples with a seed made of it and the step's number.
    indices: numbers of the prompts to sample from.
    render: prompt number -> token ids.
    longest: tokens of the longest prompt; with max_new_tokens it fixes the shape of a batch.
  """

  def __init__(
    self,
    settings: ml_collections.ConfigDict,
    seed: int,
    indices: Sequence[int],
    render: Callable[[int], list[int]],
    longest: int,
  ):
    self._settings, self._seed, self._indices, self._render = settings, seed, indices, render
    self._longest = longest
    self._length = -(-(longest + settings.max_new_tokens) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    self._engine: Engine | None = None

  def __call__(self, student: Decoder, raw: Sequence[int], step: int) -> dict[str, np.ndarray]:
    """The batch of a step, sampled by `student`; between two calls the engine holds no memory.

    Args:
      student: its parameters go to the engine as they are, but for those that a mesh wants elsewhere for decoding.
      raw: places of the prompts in `indices`.
      step: number of finished steps.
    """
    self.take(student)
    batch = self.sample(raw, step)
    assert self._engine is not None
    self._engine.release()
    return batch

  def take(self, student: Decoder) -> None:
    """Gives the engine these parameters, which must live until the next ones, or the end."""
    settings = self._settings
    if self._engine is None:
      rows = settings.prompts_per_step * settings.samples_per_prompt
      self._engine = engine_for(student, rows, self._longest, settings.max_new_tokens, settings.cache_tokens)
    else:
      self._engine.update(split_model(student)[1])

  def sample(self, raw: Sequence[int], step: int) -> dict[str, np.ndarray]:
    """The batch of a step, sampled with the parameters that were taken last."""
    assert self._engine is not None
    requests = self._requests(raw, step)
    found: dict[tuple[int, int], Completion] = {(place, c.index): c for place, c in self._engine.run(requests)}
    ordered = [found[place, i] for place, request in enumerate(requests) for i in range(request.n)]
    prompts = [request.prompt for request in requests for _ in range(request.n)]
    picks = [c.picks for c in ordered] if self._settings.routing_replay else None
    return on_policy_batch(prompts, [c.tokens for c in ordered], [c.logprobs for c in ordered], self._length, picks)

  def _requests(self, raw: Sequence[int], step: int) -> list[Request]:
    """One for each prompt, whose samples have random streams of their own."""
    settings, n = self._settings, self._settings.samples_per_prompt
    seed = int(np.random.SeedSequence([self._seed, step]).generate_state(1)[0] >> 1)
    options: dict[str, Any] = {"temperature": settings.temperature, "seed": seed, "n": n}
    options["record_picks"] = settings.routing_replay
    prompts = [self._render(int(self._indices[i])) for i in raw]
    return [Request(p, settings.max_new_tokens, stream=n * i, **options) for i, p in enumerate(prompts)]


class AheadSampler:
  """Samples each step's batch while the step before it is computing, with the parameters that this one started from.

  So batch k is sampled by the student as it was before step k - 1 (batch 0 by the first one): one step off-policy,
  which the clipped ratio to the probabilities of sampling corrects. All is dispatched by one thread: a result does not
  depend on what runs when.

  A batch that was made ahead is stored with each checkpoint, for the parameters that sampled it are gone: a training
  that goes on does so with the very same batch.

  Args:
    sampler: makes the batches.
    directory: for stored batches; on storage that all processes share.
    keep: how many of the newest ones stay.
  """

  def __init__(self, sampler: Sampler, directory: pathlib.Path, keep: int):
    self._sampler, self._directory, self._keep = sampler, directory, keep
    self._is_ahead = False

  def before_step(self, student: Decoder) -> None:
    """Takes a student whose arrays the coming step does not donate, for the batch after that step's."""
    self._sampler.take(student)
    self._is_ahead = True

  def __call__(self, student: Decoder, raw: Sequence[int], step: int) -> dict[str, np.ndarray]:
    """The batch of a step; `student` is used for the first one only.

    Raises:
      ZedaError: the training goes on, and the batch that was stored for this is gone.
    """
    if not self._is_ahead:
      if step:
        return together(lambda: self._read(step))
      self._sampler.take(student)
    return self._sampler.sample(raw, step)

  def store(self, step: int, batch: Mapping[str, np.ndarray]) -> None:
    """Keeps the batch that follows so many finished steps."""
    from_primary(lambda: self._write(step, batch))

  def clear(self) -> None:
    """Removes what was stored, once the training is complete."""
    from_primary(lambda: shutil.rmtree(self._directory, ignore_errors=True))

  def _file(self, step: int) -> pathlib.Path:
    return self._directory / f"{step}.safetensors"

  def _write(self, step: int, batch: Mapping[str, np.ndarray]) -> None:
    self._directory.mkdir(parents=True, exist_ok=True)
    with atomic_writer(self._file(step), overwrite=True) as out:
      out.write(safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in batch.items()}))
    steps = sorted(int(file.stem) for file in self._directory.glob("*.safetensors"))
    # One more than checkpoints, whose oldest goes when the new one is there.
    for old in steps[: -self._keep - 1]:
      self._file(old).unlink()

  def _read(self, step: int) -> dict[str, np.ndarray]:
    file = self._file(step)
    if not file.is_file():
      raise ZedaError(
        f"{file}, the rollouts made ahead of step {step + 1}, is gone: restore it, or start this stage anew."
      )
    return safetensors.numpy.load(file.read_bytes())


def on_policy_batch(
  prompts: Sequence[Sequence[int]],
  responses: Sequence[Sequence[int]],
  logprobs: Sequence[Sequence[float]],
  length: int,
  picks: Sequence[Int[np.ndarray, "S L K"] | None] | None = None,
) -> dict[str, np.ndarray]:
  """One row per sampled sequence, with the log-probs it was sampled with in `old_logprobs` [B, T].

  With `picks`, those of every sequence's tokens but the last, also `replay` [B, T, L, K], -1 where there are none.
  """
  rows: list[dict[str, np.ndarray]] = []
  for prompt, response, logprob in zip(prompts, responses, logprobs, strict=True):
    row = dict(pack_row([{"prompt_tokens": prompt, "response_tokens": response}], length))
    row["old_logprobs"] = np.zeros(length, np.float32)
    row["old_logprobs"][row["loss_mask"] > 0] = logprob
    if picks is not None:
      recorded = picks[len(rows)]
      assert recorded is not None
      row["replay"] = np.full((length, *recorded.shape[1:]), -1, np.int16)
      row["replay"][: len(recorded)] = recorded
    rows.append(row)
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
