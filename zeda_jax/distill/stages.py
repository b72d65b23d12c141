"""The two training stages: each takes a student and gives it back trained, resuming from its own checkpoints."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import rich.console

from zeda_jax.checkpoint.orbax import CheckpointStore
from zeda_jax.data.pipeline import prompt_batches, sft_batches
from zeda_jax.data.rollouts import RolloutSource
from zeda_jax.distill.metrics import MetricWriter
from zeda_jax.distill.objectives import Objective
from zeda_jax.distill.optimizer import make_optimizer
from zeda_jax.distill.placement import place_local, place_whole
from zeda_jax.distill.recipe import optimizer_config, write_json
from zeda_jax.distill.sampler import AheadSampler, Sampler
from zeda_jax.distill.step import Reference, TrainState, abstract_state, init_state, make_train_step
from zeda_jax.distill.trainer import Batches, run_training
from zeda_jax.distributed import on_mesh
from zeda_jax.distributed.agreement import from_primary, together
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder
from zeda_jax.models.params import Params, combine, merge_model, split_model, trainable_partition


@dataclasses.dataclass(frozen=True)
class Stage:
  """What both stages share: the models, the settings and where things are written.

  All runs where the teacher's sharding says; several processes make the same calls.
  """

  name: str
  teacher: Decoder
  settings: ml_collections.ConfigDict
  directory: pathlib.Path
  seed: int
  console: rich.console.Console

  def train(
    self,
    student: Decoder,
    objective: Objective,
    batches: Batches,
    num_steps: int,
    make_batch: Callable[[Decoder, Any, int], Mapping[str, np.ndarray]] | None = None,
    ahead: AheadSampler | None = None,
  ) -> Decoder:
    """Trains the chosen parameters of `student` for `num_steps`; a finished stage is only read back.

    Arrays that the student shares with the teacher and that are not trained exist once.

    Args:
      student: where the training starts.
      objective: the loss.
      batches: give each process its rows of a batch, or where there is `make_batch` what that wants, to all the same.
      num_steps: of the whole stage.
      make_batch: (student, element of `batches`, finished steps) -> batch, all of its rows in every process.
      ahead: in the place of make_batch: makes each batch while the step before it is computing.
    """
    make_batch = ahead or make_batch
    if self._finished_steps() == num_steps:
      return self.restored(student)
    settings = self.settings
    graphdef, params = split_model(student)
    teacher_graphdef, teacher_params = split_model(self.teacher)
    trained, frozen = trainable_partition(params, settings.trainable)
    optimizer = optimizer_config(settings)
    step = make_train_step(graphdef, teacher_graphdef, objective, optimizer, num_steps, settings.accumulate)
    balance: dict[str, Any] = {name: np.float32(settings[name]) for name in ("weight", "coefficient")}
    sharding = self.teacher.config.sharding
    reference = Reference(frozen, teacher_params, balance)

    def student_of(state: TrainState) -> Decoder:
      return merge_model(graphdef, combine(frozen, state.params))

    def on_policy(state: TrainState, raw: Any, step: int) -> Mapping[str, np.ndarray]:
      assert make_batch is not None
      return make_batch(student_of(state), raw, step)

    def on_devices(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
      if ahead is not None:  # the step donates its state
        ahead.before_step(student_of(dataclasses.replace(state, params=_copied(state.params))))
      with on_mesh(sharding):
        return step(state, reference, batch)

    place = place_local if make_batch is None else place_whole
    store = CheckpointStore(self.directory / "checkpoints", keep=settings.keep)
    try:
      state = run_training(
        state=self._first_state(store, trained, make_optimizer(optimizer, num_steps)),
        step_fn=on_devices,
        batches=batches,
        num_steps=num_steps,
        store=store,
        save_every=settings.save_every,
        writer=MetricWriter(self.directory, self.name, self.console),
        log_every=settings.log_every,
        make_batch=on_policy if make_batch is not None else None,
        keep_ahead=ahead.store if ahead is not None else None,
        prepare=functools.partial(place, sharding=sharding, parts=settings.accumulate),
        label=self.name,
      )
    finally:
      store.close()
    from_primary(lambda: write_json(self._finished_file, {"steps": num_steps}))
    if ahead is not None:
      ahead.clear()
    return student_of(state)

  def _first_state(self, store: CheckpointStore, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Where the training starts; of one that goes on only the shapes, for it is read from its checkpoint."""
    sharding = self.teacher.config.sharding
    if store.latest_step() is not None:
      return abstract_state(params, optimizer, sharding)
    return init_state(params, optimizer, self.seed, sharding)

  @property
  def _finished_file(self) -> pathlib.Path:
    return self.directory / "finished.json"

  def _finished_steps(self) -> int | None:
    file = self._finished_file
    return from_primary(lambda: json.loads(file.read_text()).get("steps") if file.is_file() else None)

  def restored(self, student: Decoder) -> Decoder:
    """`student` with the parameters of the newest checkpoint.

    Raises:
      ZedaError: there is none, or it is of another model.
    """
    if not from_primary((self.directory / "checkpoints").is_dir):
      raise ZedaError(f"{self.directory / 'checkpoints'} is gone: restore it, or start again in a new workdir.")
    graphdef, params = split_model(student)
    trained, frozen = trainable_partition(params, self.settings.trainable)
    transform = make_optimizer(optimizer_config(self.settings), 1)  # the number of steps changes no shape
    with CheckpointStore(self.directory / "checkpoints", keep=self.settings.keep) as store:
      state = store.restore(abstract_state(trained, transform, self.teacher.config.sharding)).state
    return merge_model(graphdef, combine(frozen, state.params))


@jax.jit
def _copied(params: Params) -> Params:
  return jax.tree.map(jnp.copy, params)


def run_sft(stage: Stage, student: Decoder, rollouts: Sequence[pathlib.Path]) -> Decoder:
  """Supervised distillation on the teacher's rollouts (paper section 3.3, first stage)."""
  settings = stage.settings
  source = together(lambda: RolloutSource(list(rollouts)))
  together(lambda: source.lengths(student.config.vocab_size))
  process = jax.process_index(), jax.process_count()
  batches = sft_batches(source, settings.batch_size, settings.row_length, stage.seed, settings.epochs, *process)
  objective = Objective(
    settings.loss, settings.balance, settings.balance_tokens, teacher_metrics=settings.teacher_metrics
  )
  return stage.train(student, objective, batches, batches.num_batches)


def run_opd(
  stage: Stage, student: Decoder, indices: Sequence[int], render: Callable[[int], list[int]], longest: int
) -> Decoder:
  """On-policy distillation: the student samples, the teacher judges each token (paper section 3.3, second stage).

  Args:
    stage: models, settings, directory.
    student: as SFT left it.
    indices: numbers of the prompts to sample from.
    render: prompt number -> token ids.
    longest: tokens of the longest prompt; with max_new_tokens it fixes the shape of a batch.
  """
  settings = stage.settings
  batches = prompt_batches(len(indices), settings.prompts_per_step, stage.seed)
  sampler = Sampler(settings, stage.seed, indices, render, longest)
  objective = Objective(settings.loss, settings.balance, settings.balance_tokens, settings.clip_low, settings.clip_high)
  if settings.overlap:
    ahead = AheadSampler(sampler, stage.directory / "ahead", settings.keep)
    return stage.train(student, objective, batches, settings.steps, ahead=ahead)
  return stage.train(student, objective, batches, settings.steps, sampler)
