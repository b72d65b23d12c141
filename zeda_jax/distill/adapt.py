"""`zeda adapt`: inject, rollout, SFT, OPD, export, evaluate, summary; finished stages are skipped."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np
import rich.console

from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.config import ModelConfig, read_config
from zeda_jax.data import chat
from zeda_jax.data.jsonl import atomic_writer
from zeda_jax.data.prompts import Prompts, open_prompts
from zeda_jax.distill import summary
from zeda_jax.distill.recipe import check_config, claim_workdir
from zeda_jax.distill.stages import Stage, run_opd, run_sft
from zeda_jax.errors import ZedaError
from zeda_jax.evaluate.runner import evaluate, teacher_distance
from zeda_jax.models.decoder import Decoder, inject
from zeda_jax.models.params import reconfigured
from zeda_jax.rollout.stage import is_finished, sample_rollouts

STAGES = ("rollout", "sft", "opd", "export", "evaluate")


@dataclasses.dataclass(frozen=True)
class Job:
  """Everything checked and opened before the first stage runs."""

  config: ml_collections.ConfigDict
  model: ModelConfig
  tokenizer: Any
  prompts: Prompts
  train: np.ndarray  # numbers of the prompts to learn from
  held_out_prompts: Prompts
  held_out: np.ndarray  # numbers of the prompts to evaluate on
  longest: int  # tokens of the longest training prompt
  console: rich.console.Console

  @property
  def workdir(self) -> pathlib.Path:
    return pathlib.Path(self.config.workdir)

  def render(self, index: int) -> list[int]:
    return chat.render_prompt(self.tokenizer, self.prompts[index], self.prompts.location(index))

  def render_held_out(self, index: int) -> list[int]:
    prompts = self.held_out_prompts
    return chat.render_prompt(self.tokenizer, prompts[index], prompts.location(index))

  def decode(self, tokens: Sequence[int]) -> str:
    return self.tokenizer.decode(tokens, skip_special_tokens=True)

  @functools.cached_property
  def teacher(self) -> Decoder:
    """The static model, read once; students share its arrays until they are trained."""
    return reconfigured(load_hf(self.config.teacher, self.config.dtype or None), remat=self.config.remat)

  def student(self, settings: ml_collections.ConfigDict | None = None) -> Decoder:
    """The untrained student: the teacher with zero experts, or a static one with fewer picks (a baseline)."""
    settings = self.config.student if settings is None else settings
    student = self.teacher
    if settings.num_zero_experts != 0:
      student = inject(student, settings.num_zero_experts, self.config.seed)
    if settings.num_experts_per_tok is not None:
      student = reconfigured(student, num_experts_per_tok=settings.num_experts_per_tok)
    return student

  def stage(self, name: str) -> Stage:
    return Stage(name, self.teacher, self.config[name], self.workdir / name, self.config.seed, self.console)


def open_job(config: ml_collections.ConfigDict, console: rich.console.Console | None = None) -> Job:
  """Checks the whole recipe; nothing is written and no weights are read.

  Raises:
    ZedaError: names the setting, file or line that does not fit.
  """
  check_config(config)
  model = read_config(config.teacher)
  if model.is_dynamic:
    raise ZedaError(f"config.teacher: {config.teacher} already has zero experts; expected the static model.")
  zero = config.student.num_zero_experts
  if zero is not None and zero < 0:
    raise ZedaError(
      f"config.student.num_zero_experts is {zero}; expected a positive number, or 0 for a static student."
    )
  tokenizer = chat.load_tokenizer(config.teacher)
  chat.check_vocabulary(tokenizer, model.vocab_size, config.teacher)
  prompts = open_prompts(config.prompts)
  longest_answer = max(config.rollout.max_new_tokens, config.opd.max_new_tokens if config.opd.steps else 0)
  lengths = chat.check_lengths(prompts, tokenizer, longest_answer, model.max_position_embeddings)
  train, held_out_prompts, held_out = _split(config, prompts)
  if held_out_prompts is not prompts:
    chat.check_lengths(held_out_prompts, tokenizer, config.evaluate.max_new_tokens, model.max_position_embeddings)
  longest = int(lengths[train].max())
  return Job(
    config, model, tokenizer, prompts, train, held_out_prompts, held_out, longest, console or rich.console.Console()
  )


def _split(config: ml_collections.ConfigDict, prompts: Prompts) -> tuple[np.ndarray, Prompts, np.ndarray]:
  """Training prompts, and the held-out ones: their own file, or a seeded part of the same one."""
  if config.evaluate.prompts:
    held_out = open_prompts(config.evaluate.prompts)
    count = min(config.evaluate.num_prompts, len(held_out))
    return np.arange(len(prompts)), held_out, np.arange(count)
  count = config.evaluate.num_prompts
  if count >= len(prompts):
    raise ZedaError(
      f"config.evaluate.num_prompts is {count}, but {config.prompts} has only {len(prompts)} prompts: lower it, or "
      "name a file of held-out prompts as config.evaluate.prompts."
    )
  order = np.random.default_rng(config.seed).permutation(len(prompts))
  return np.sort(order[count:]), prompts, np.sort(order[:count])


def adapt(
  config: ml_collections.ConfigDict, console: rich.console.Console | None = None, until: str = "evaluate"
) -> pathlib.Path:
  """Runs the recipe up to and including the stage `until`; run again, it goes on where it was.

  Args:
    config: see `recipe.default_config`.
    console: where progress is shown.
    until: one of STAGES.

  Returns:
    The workdir: rollouts/, sft/, opd/, student/ (the dynamic Hugging Face directory), evaluate/, summary.md.

  Raises:
    ZedaError: the recipe does not fit the files, before anything is written.
    StoppedEarly: SIGTERM or Ctrl-C; everything is saved.
  """
  job = open_job(config, console)
  workdir = claim_workdir(config)
  summary.describe(job.console, config, job.model, len(job.train), len(job.held_out))
  wanted = STAGES[: STAGES.index(until) + 1]
  if "rollout" in wanted:
    rollout_stage(job)
  if "sft" in wanted and not _exported(job):
    _train_and_export(job, wanted)
  if "evaluate" in wanted:
    measure(job, "student", lambda: load_hf(workdir / "student", config.dtype or None))
    summary.write(job.console, workdir, summary.LABELS)
  return workdir


def _exported(job: Job) -> bool:
  return (job.workdir / "student" / "config.json").is_file()


def rollout_stage(job: Job) -> None:
  """The teacher's answers to all training prompts, in workdir/rollouts."""
  directory, settings = job.workdir / "rollouts", job.config.rollout
  if is_finished(directory, len(job.train), settings.shard_size):
    return
  with summary.progress(job.console, "rollout") as progress:
    sample_rollouts(
      job.teacher, job.prompts, job.train.tolist(), job.render, directory, settings, job.config.seed, progress
    )


def rollout_files(job: Job) -> list[pathlib.Path]:
  return sorted((job.workdir / "rollouts").glob("rollouts-*.jsonl"))


def _train_and_export(job: Job, wanted: Sequence[str]) -> None:
  config, student = job.config, job.student()
  if "evaluate" in wanted:
    measure(job, "teacher", lambda: job.teacher)
    measure(job, "injected", lambda: student)
  if config.sft.epochs:
    student = run_sft(job.stage("sft"), student, rollout_files(job))
    if "evaluate" in wanted:
      measure(job, "sft", lambda: student)
  if "opd" in wanted and config.opd.steps:
    student = run_opd(job.stage("opd"), student, job.train.tolist(), job.render, job.longest)
  if "export" in wanted:
    if config.export.plain:
      save_hf(student, job.workdir / "student-plain", format="plain", overwrite=True)
    save_hf(student, job.workdir / "student")
    job.console.print(f"exported to {job.workdir / 'student'}", highlight=False)


def measure(job: Job, name: str, model: Callable[[], Decoder]) -> None:
  """Evaluates a model on the held-out prompts into evaluate/{name}.json, unless that is there or not wanted."""
  settings = job.config.evaluate
  file = job.workdir / "evaluate" / f"{name}.json"
  if file.is_file() or name not in settings.models or not len(job.held_out):
    return
  prompts = [job.render_held_out(int(i)) for i in job.held_out]
  records = [job.held_out_prompts[int(i)] for i in job.held_out]
  student = model()
  result, samples = evaluate(
    student,
    prompts,
    records,
    job.decode,
    max_new_tokens=settings.max_new_tokens,
    temperature=settings.temperature,
    seed=job.config.seed,
    batch_size=settings.batch_size,
    grader=settings.grader,
    teacher_top_k=job.model.num_experts_per_tok,
  )
  responses = [s.tokens for s in samples]
  teacher_file = job.workdir / "evaluate" / "teacher-responses.json"
  if name == "teacher":
    _write_json(teacher_file, responses)
  elif teacher_file.is_file():
    responses = json.loads(teacher_file.read_text())
  distance = teacher_distance(student, job.teacher, prompts, responses)
  averages = {"average": result.average, "standard_error": result.standard_error}
  _write_json(file, dataclasses.asdict(result) | averages | {"distance": distance})


def _write_json(file: pathlib.Path, value: Any) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  with atomic_writer(file, overwrite=True) as out:
    out.write(json.dumps(value, indent=2).encode())
