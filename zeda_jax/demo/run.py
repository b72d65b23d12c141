"""`zeda demo`: the real recipe on the embedded teacher, and every baseline beside it in one table."""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import ml_collections
import rich.console

from zeda_jax.data.jsonl import write_jsonl
from zeda_jax.demo import picture
from zeda_jax.demo.families import Split, mixed_tasks
from zeda_jax.distill import summary
from zeda_jax.distill.adapt import Job, adapt, measure, open_job
from zeda_jax.distill.compare import matched_skipping, trained_variant
from zeda_jax.distill.recipe import default_config
from zeda_jax.evaluate.baselines import halved, truncated

TEACHER = pathlib.Path(__file__).parent / "teacher"

LABELS = {
  "teacher": "teacher",
  "truncated": "static K/2, untrained",
  "halved": "top K/2 of K, untrained",
  "skipping": "dynamic skipping, untrained",
  "injected": "injected, untrained",
  "truncated-trained": "static K/2, SFT→OPD",
  "sft": "zero experts, SFT",
  "student": "zero experts, SFT→OPD",
  "student-70": "zero experts, SFT→OPD, w for 70 %",
  "router": "zero experts, router only",
}


def demo_config(workdir: str | pathlib.Path, seed: int = 0) -> ml_collections.ConfigDict:
  """The recipe at the size of the embedded teacher: minutes on two CPU cores."""
  config = default_config()
  config.update(teacher=str(TEACHER), workdir=str(workdir), seed=seed, remat="none", scan_unroll=4)
  # The prompts here are longer than the answers, which is not so where skipping pays; so the answers are balanced.
  balance = {"weight": 2.2, "balance_tokens": "response"}
  config.rollout.update(max_new_tokens=16, batch_size=512, shard_size=4096)
  config.sft.update(loss="forward_kl", **balance, epochs=2, batch_size=32, row_length=64, save_every=200, log_every=10)
  config.sft.optimizer.update(learning_rate=2e-4, weight_decay=0.0)
  config.opd.update(
    loss="reverse_kl",
    **balance,
    steps=40,
    prompts_per_step=32,
    samples_per_prompt=1,
    max_new_tokens=16,
    save_every=200,
    log_every=10,
  )
  config.opd.optimizer.update(learning_rate=5e-5, schedule="cosine", weight_decay=0.0)
  config.evaluate.update(num_prompts=4500, max_new_tokens=16, batch_size=512, distance=False, models=tuple(LABELS))
  return config


def run_demo(
  workdir: str | pathlib.Path,
  seed: int = 0,
  overrides: Mapping[str, Any] | None = None,
  train_per_family: int = 1500,
  console: rich.console.Console | None = None,
) -> pathlib.Path:
  """Adapts the embedded teacher and its baselines; run again, it goes on where it was.

  Args:
    workdir: everything is written below it.
    seed: of injection, sampling and data order.
    overrides: dotted settings of `demo_config`.
    train_per_family: training prompts of each family.
    console: where progress is shown.

  Returns:
    The workdir: main/ (the recipe's own output, with the table and its picture), half/, w70/, router/ (the training of
    the other rows), data/.
  """
  console = console or rich.console.Console()
  start = time.perf_counter()
  workdir = pathlib.Path(workdir)
  data = workdir / "data"
  config = demo_config(workdir / "main", seed)
  config.prompts, config.evaluate.prompts = str(data / "train.jsonl"), str(data / "held-out.jsonl")
  config.update_from_flattened_dict(dict(overrides or {}))
  _write_prompts(data, config.evaluate.num_prompts // 3, train_per_family)
  job = open_job(config, console)
  adapt(config, console)
  _untrained_baselines(job)
  _trained_baselines(job, workdir)
  summary.write(console, job.workdir, LABELS, f"three task families, {len(job.held_out)} held-out prompts, greedy")
  picture.draw(summary.results(job.workdir, LABELS), LABELS, job.workdir / "summary.png")
  console.print(f"this table as a picture: {job.workdir / 'summary.png'}", highlight=False, soft_wrap=True)
  console.print(f"{time.perf_counter() - start:.0f} seconds in all", highlight=False)
  return workdir


def _write_prompts(data: pathlib.Path, held_out: int, train: int) -> None:
  data.mkdir(parents=True, exist_ok=True)
  splits: tuple[tuple[str, Split, int], ...] = (("train", "train", train), ("held-out", "held_out", held_out))
  for name, split, count in splits:
    file = data / f"{name}.jsonl"
    if not file.is_file():
      write_jsonl(file, mixed_tasks(split, count))


def _untrained_baselines(job: Job) -> None:
  half = job.model.num_experts_per_tok // 2
  measure(job, "truncated", lambda: truncated(job.teacher, half))
  measure(job, "halved", lambda: halved(job.teacher, half))
  measure(job, "skipping", lambda: matched_skipping(job))


def _trained_baselines(job: Job, workdir: pathlib.Path) -> None:
  half = {"student.num_zero_experts": 0, "student.num_experts_per_tok": job.model.num_experts_per_tok // 2}
  more = {"sft.weight": 5.0, "opd.weight": 5.0}
  router = {"sft.trainable": "router", "sft.optimizer.learning_rate": 2e-3, "opd.steps": 0}
  for name, directory, changes in (
    ("truncated-trained", "half", half),
    ("student-70", "w70", more),
    ("router", "router", router),
  ):
    measure(job, name, lambda d=workdir / directory, c=changes: trained_variant(job, d, c))  # type: ignore[misc]
