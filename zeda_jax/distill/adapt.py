"""`zeda adapt`: inject, rollout, SFT, OPD, export, evaluate, summary; finished stages are skipped."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator

import ml_collections
import rich.console

from zeda_jax.checkpoint.huggingface import save_hf
from zeda_jax.checkpoint.transform import to_plain_directory
from zeda_jax.distill import summary
from zeda_jax.distill.job import Job, open_job
from zeda_jax.distill.recipe import claim_workdir, evaluation_settings, write_json
from zeda_jax.distill.shared_storage import check_same_inputs, check_shared
from zeda_jax.distill.stages import run_opd, run_sft
from zeda_jax.distributed import is_primary
from zeda_jax.distributed.agreement import from_primary, together
from zeda_jax.errors import ZedaError
from zeda_jax.evaluate.runner import evaluate, teacher_distance
from zeda_jax.models.decoder import Decoder
from zeda_jax.rollout.openai import sample_from_server
from zeda_jax.rollout.openai_answers import Verifier
from zeda_jax.rollout.stage import Progress, is_finished, sample_rollouts

__all__ = ["STAGES", "Job", "adapt", "measure", "open_job", "rollout_files"]

STAGES = ("rollout", "sft", "opd", "export", "evaluate")


def adapt(
  config: ml_collections.ConfigDict, console: rich.console.Console | None = None, until: str = "evaluate"
) -> pathlib.Path:
  """Runs the recipe up to and including the stage `until`; run again, it goes on where it was.

  It runs on all devices that there are (see config.mesh). Where there are several processes (jax.distributed), all must
  call this, with the same settings and a workdir that all of them see; the primary one writes and shows progress.

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
  if until not in STAGES:
    raise ZedaError(f"until is {until!r}; expected one of {', '.join(STAGES)}.")
  job = together(lambda: open_job(config, console))
  check_same_inputs(config, job.contents)
  from_primary(lambda: str(claim_workdir(config, job.contents)))
  workdir = job.workdir
  check_shared(workdir)
  summary.describe(job.console, config, job.model, len(job.train), len(job.held_out), job.sharding)
  wanted = STAGES[: STAGES.index(until) + 1]
  with job.stop, alone_in(workdir):
    if not _exported(job):
      if config.sft.epochs or until == "rollout":
        rollout_stage(job)
      if "sft" in wanted:
        student = _train(job, wanted)
        if "export" in wanted:
          save_hf(student, workdir / "student")
          job.console.print(f"exported to {workdir / 'student'}", highlight=False, soft_wrap=True)
    if "export" in wanted and config.export.plain and not _is_file(workdir / "student-plain" / "config.json"):
      job.check_stop("before the plain-engine export")
      from_primary(lambda: to_plain_directory(workdir / "student", workdir / "student-plain"))
    if "evaluate" in wanted:
      _evaluate_all(job)
  if "evaluate" in wanted:
    from_primary(lambda: summary.write(job.console, workdir, summary.LABELS))
  return workdir


@contextlib.contextmanager
def alone_in(workdir: pathlib.Path) -> Iterator[None]:
  """Holds a lock on the workdir, which ends with the process; of several processes the primary one holds it."""
  lock = os.open(workdir, os.O_RDONLY)

  def acquire() -> None:
    if is_primary():
      with contextlib.suppress(OSError):  # some file systems have no locks
        try:
          fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
          raise ZedaError(f"another process is working in {workdir}: wait for it, or stop it first.") from error

  try:
    together(acquire)
    yield
  finally:
    os.close(lock)


def _is_file(file: pathlib.Path) -> bool:
  """As the primary process sees it: storage may tell others later."""
  return from_primary(file.is_file)


def _exported(job: Job) -> bool:
  return _is_file(job.workdir / "student" / "config.json")


def rollout_stage(job: Job) -> None:
  """The teacher's answers to all training prompts, in workdir/rollouts."""
  directory, settings = job.workdir / "rollouts", job.config.rollout
  if is_finished(directory, len(job.train), settings.shard_size):
    return
  with summary.progress(job.console, "rollout") as show:

    def progress(done: int, total: int, note: str = "", /) -> None:
      show(done, total, note)
      if done < total:
        job.check_stop(f"with {done} of {total} prompts answered (those of finished files are kept)")

    if settings.engine == "openai":
      _ask_server(job, directory, progress)
      return
    sample_rollouts(
      job.teacher,
      job.prompts,
      job.train.tolist(),
      job.render,
      job.longest,
      directory,
      settings,
      job.config.seed,
      progress,
    )


def _ask_server(job: Job, directory: pathlib.Path, progress: Progress) -> None:
  """The teacher's answers from another engine, which config.rollout names; its weights are not read here."""
  verifier = Verifier(job.tokenizer, job.model.vocab_size, job.eos_ids)
  tell = lambda line: job.console.print(f"rollout   {line}", highlight=False, soft_wrap=True)
  train, settings, seed = job.train.tolist(), job.config.rollout, job.config.seed
  sample_from_server(verifier, job.prompts, train, job.render, job.longest, directory, settings, seed, progress, tell)


def rollout_files(job: Job) -> list[pathlib.Path]:
  names = from_primary(lambda: [file.name for file in (job.workdir / "rollouts").glob("rollouts-*.jsonl")])
  return [job.workdir / "rollouts" / name for name in sorted(names)]


def _train(job: Job, wanted: tuple[str, ...]) -> Decoder:
  config, student = job.config, job.student()
  if config.sft.epochs:
    job.check_stop("before SFT")
    student = run_sft(job.stage("sft"), student, rollout_files(job))
  if "opd" in wanted and config.opd.steps:
    job.check_stop("before OPD")
    student = run_opd(job.stage("opd"), student, job.train.tolist(), job.render, job.longest)
  job.check_stop("after training")
  return student


def _evaluate_all(job: Job) -> None:
  """Measures every model of the recipe that is wanted, from what the finished stages left on disk."""
  if not len(job.held_out):
    return
  file = job.workdir / "evaluate" / "settings.json"
  if not _is_file(file):
    from_primary(lambda: write_json(file, evaluation_settings(job.config, job.contents)))
  _note_config(job)
  measure(job, "teacher", lambda: job.teacher)
  measure(job, "injected", job.student)
  if _is_file(job.workdir / "sft" / "finished.json"):
    measure(job, "sft", lambda: job.stage("sft").restored(job.student()))
  measure(job, "student", lambda: job.load(job.workdir / "student"))


_NOTED = ("teacher", "prompts", "seed", "dtype", "mesh", "evaluate")


def _note_config(job: Job) -> None:
  """Leaves evaluate/config.json: where teacher and prompts lie, and how answers were made, for `zeda report`."""
  file = job.workdir / "evaluate" / "config.json"
  noted = {name: value for name, value in job.config.to_dict().items() if name in _NOTED}
  absolute = lambda path: str(pathlib.Path(path).resolve()) if path else ""
  for section, name in ((noted, "teacher"), (noted, "prompts"), (noted["evaluate"], "prompts")):
    section[name] = absolute(section[name])
  noted = json.loads(json.dumps(noted))
  if from_primary(lambda: not file.is_file() or json.loads(file.read_text()) != noted):
    from_primary(lambda: write_json(file, noted))


def measure(job: Job, name: str, model: Callable[[], Decoder]) -> None:
  """Evaluates a model on the held-out prompts into evaluate/{name}.json, unless that is there or not wanted.

  Distances to the teacher are measured on the teacher's answers, which its own row leaves behind (on the model's own
  where that row is not wanted).
  """
  settings = job.config.evaluate
  file = job.workdir / "evaluate" / f"{name}.json"
  if name not in settings.models or not len(job.held_out) or _is_file(file):
    return
  job.check_stop(f"before the evaluation of {name}")
  prompts = job.held_out_tokens
  records = [job.held_out_prompts[int(i)] for i in job.held_out]
  student = model()
  with summary.progress(job.console, f"evaluate {name}") as show:

    def progress(done: int, total: int) -> None:
      show(done, total)
      job.check_stop(f"during the evaluation of {name}")

    result, samples = evaluate(
      student,
      prompts,
      records,
      job.decode,
      max_new_tokens=settings.max_new_tokens,
      temperature=settings.temperature,
      top_k=settings.top_k,
      top_p=settings.top_p,
      seed=job.config.seed,
      batch_size=settings.batch_size,
      grader=settings.grader,
      teacher_top_k=job.model.num_experts_per_tok,
      progress=progress,
    )
  responses = [s.tokens for s in samples]
  teacher_file = job.workdir / "evaluate" / "teacher-responses.json"
  if name == "teacher":
    from_primary(lambda: write_json(teacher_file, responses))
  elif _is_file(teacher_file):
    responses = from_primary(lambda: json.loads(teacher_file.read_text()))
  distance = teacher_distance(student, job.teacher, prompts, responses) if settings.distance else {}
  averages = {"average": result.average, "standard_error": result.standard_error}
  row = dataclasses.asdict(result) | averages | {"distance": distance}
  row = {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()}
  from_primary(lambda: write_json(file, row))
