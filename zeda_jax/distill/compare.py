"""`zeda compare`: the recipe's own result beside baselines, in one table.

A baseline is another routing of the teacher, or the recipe's own training with other settings; all share the teacher,
its rollouts and the held-out prompts. None has code of its own in the layers: see ModelConfig's fields from
`zero_expert_type` on.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import rich.console

from zeda_jax.distill import summary
from zeda_jax.distill.adapt import adapt, alone_in, measure, rollout_files
from zeda_jax.distill.job import Job, open_job
from zeda_jax.distill.stages import Stage, run_opd, run_sft
from zeda_jax.distributed.agreement import from_primary, together
from zeda_jax.errors import ZedaError
from zeda_jax.evaluate.baselines import dynamic_skipping, halved, matched_threshold, truncated
from zeda_jax.models.decoder import Decoder

_MATCHED_ON = 960  # responses from which dynamic skipping's threshold is read


@dataclasses.dataclass(frozen=True)
class Variant:
  """One row of the table: a routing of the teacher, or training with other settings.

  Attributes:
    label: its name in the table.
    untrained: makes it of the teacher.
    changes: dotted settings of the recipe; None where nothing is trained.
  """

  label: str
  untrained: Callable[[Job], Decoder] | None = None
  changes: Mapping[str, Any] | None = None


def _half(job: Job) -> int:
  return max(1, job.model.num_experts_per_tok // 2)


def matched_skipping(job: Job) -> Decoder:
  """Dynamic skipping with the threshold that skips as much of the response as the trained student does.

  Raises:
    ZedaError: the teacher or the student was not evaluated.
  """
  file = job.workdir / "evaluate" / "teacher-responses.json"
  results = from_primary(lambda: summary.results(job.workdir, ["student"]))
  if "student" not in results or not from_primary(file.is_file):
    raise ZedaError(
      f"{job.workdir / 'evaluate'} lacks the teacher's or the student's results, which dynamic skipping is matched to: "
      "evaluate both (config.evaluate.models)."
    )
  responses = from_primary(lambda: json.loads(file.read_text()))[:_MATCHED_ON]
  ratio = results["student"]["skipped_response"]
  prompts = job.held_out_tokens[:_MATCHED_ON]
  return dynamic_skipping(job.teacher, matched_threshold(job.teacher, prompts, responses, ratio))


_STATIC: dict[str, Any] = {"student.num_zero_experts": 0, "student.num_experts_per_tok": "half"}
_ADAMOE: dict[str, Any] = {"sft.balance": "adamoe", "opd.balance": "adamoe", "student.renormalize": True}

VARIANTS = {
  "truncated": Variant("static K/2, untrained", lambda job: truncated(job.teacher, _half(job))),
  "halved": Variant("top K/2 of K, untrained", lambda job: halved(job.teacher, _half(job))),
  "skipping": Variant("dynamic skipping, untrained", matched_skipping),
  "truncated-sft": Variant("static K/2, SFT", changes={**_STATIC, "opd.steps": 0}),
  "truncated-trained": Variant("static K/2, SFT→OPD", changes=_STATIC),
  "router": Variant("zero experts, router only", changes={"sft.trainable": "router", "opd.trainable": "router"}),
  "adamoe": Variant("AdaMoE: null experts, their balance loss", changes=_ADAMOE),
  "expert-balance": Variant(
    "zero experts, expert-level balance", changes={"sft.balance": "expert", "opd.balance": "expert"}
  ),
  "copy": Variant("copy experts", changes={"student.zero_expert_type": "copy"}),
  "renormalized": Variant("zero experts, renormalised", changes={"student.renormalize": True}),
}
LABELS = summary.LABELS | {name: variant.label for name, variant in VARIANTS.items()}


def compare(
  config: ml_collections.ConfigDict,
  variants: Sequence[str] = tuple(VARIANTS),
  console: rich.console.Console | None = None,
) -> pathlib.Path:
  """Runs the recipe and the named baselines, and writes one table; run again, it goes on where it was.

  Args:
    config: see `recipe.default_config`. Variants change only what they are named after.
    variants: names in VARIANTS.
    console: where progress is shown.

  Returns:
    The workdir: as `adapt` leaves it, with the training of the baselines in variants/ and all rows in summary.md.

  Raises:
    ZedaError: a variant is unknown or does not fit the teacher, before any work; or as `adapt` does.
    StoppedEarly: SIGTERM or Ctrl-C; everything is saved.
  """
  for name in variants:
    if name not in VARIANTS:
      raise ZedaError(f"variant {name!r} is not known; expected some of {', '.join(VARIANTS)}.")
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.evaluate.models = tuple(dict.fromkeys((*config.evaluate.models, *variants)))
  job = together(lambda: open_job(config, console))
  for name in variants:
    changed(job, VARIANTS[name].changes or {})
  if not len(job.held_out):
    raise ZedaError("There are no held-out prompts to compare on: give config.evaluate.num_prompts or .prompts.")
  adapt(config, console)
  with job.stop, alone_in(job.workdir):
    for name in variants:
      measure(job, name, lambda v=VARIANTS[name], n=name: _model(job, v, job.workdir / "variants" / n))  # type: ignore[misc]
  from_primary(lambda: summary.write(job.console, job.workdir, LABELS))
  return job.workdir


def _model(job: Job, variant: Variant, directory: pathlib.Path) -> Decoder:
  if variant.untrained is not None:
    return variant.untrained(job)
  return trained_variant(job, directory, variant.changes or {})


def changed(job: Job, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The recipe with other settings; "half" stands for half of the teacher's picks."""
  config = job.config.copy_and_resolve_references()
  config.update_from_flattened_dict({key: _half(job) if value == "half" else value for key, value in changes.items()})
  return config


def trained_variant(job: Job, directory: pathlib.Path, changes: Mapping[str, Any]) -> Decoder:
  """The recipe's training with other settings, on the same teacher and rollouts; goes on where it was."""
  config = changed(job, changes)
  student = job.student(config.student)

  def stage(name: str) -> Stage:
    return Stage(name, job.teacher, config[name], directory / name, config.seed, job.console)

  if config.sft.epochs:
    job.check_stop(f"before the training of {directory.name}")
    student = run_sft(stage("sft"), student, rollout_files(job))
  if config.opd.steps:
    job.check_stop(f"before the OPD of {directory.name}")
    student = run_opd(stage("opd"), student, job.train.tolist(), job.render, job.longest)
  return student
