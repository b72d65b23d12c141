"""Puts a report together: from collected numbers and what a run left behind, to files in one directory."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from zeda_jax.analysis.collect import Collected
from zeda_jax.data.jsonl import atomic_writer
from zeda_jax.distill.recipe import write_json
from zeda_jax.report import coloured, quality, routing, speed, style, tables, training, uncertainty
from zeda_jax.report.page import Section, Tile, render
from zeda_jax.report.picture import Picture, minus, percent, to_csv
from zeda_jax.zero_experts import target_ratio

PAGE = "index.html"


@dataclasses.dataclass(frozen=True)
class Report:
  """All of a report; `models` are rows of the headline table."""

  collected: Collected
  models: Sequence[quality.Model]
  stages: dict[str, list[training.Row]]
  targets: dict[str, float]
  evaluations: Sequence[tuple[str, tables.Table]]
  bench: Sequence[speed.Measured]
  correlations: Sequence[uncertainty.Line]
  name: str


def gather(
  collected: Collected, workdir: pathlib.Path | None, main: pathlib.Path | None, bench: pathlib.Path | None, name: str
) -> Report:
  """Reads what belongs to the report besides the collected numbers.

  Args:
    collected: from `analysis.collect`.
    workdir: of a run, or None.
    main: the recipe's own directory in it.
    bench: a result of `zeda bench model`.
    name: of the model, for the title.
  """
  found = tables.read_models(main) if main is not None else []
  if not found:
    found = _models_of_dial(collected)
  return Report(
    collected,
    found,
    {} if main is None else training.read_metrics(main),
    {} if main is None else _targets(collected, main),
    [] if workdir is None else tables.evaluation_tables(workdir),
    [] if bench is None else speed.read_bench(bench),
    uncertainty.correlation_lines(collected),
    name,
  )


def _models_of_dial(collected: Collected) -> list[quality.Model]:
  """Teacher and student of a report on two checkpoints, where their answers were graded."""
  models = []
  if collected.teacher_graded:
    models.append(quality.Model("teacher", "teacher", {"distance": {}, **collected.teacher_graded}))
  for entry in collected.dial:
    if float(entry["bias"]) == 0 and entry["graded"]:
      models.append(quality.Model("student", "student", {"distance": {}, **entry["graded"]}))
  return models


def _targets(collected: Collected, main: pathlib.Path) -> dict[str, float]:
  recipe, config = tables.read_json(main / "recipe.json"), collected.config
  return {
    stage: target_ratio(config.num_experts, config.num_zero_experts, float(recipe[f"{stage}.weight"]))
    for stage in training.STAGES
    if recipe.get(f"{stage}.balance") == "group"
  }


def write(report: Report, directory: pathlib.Path) -> list[pathlib.Path]:
  """Draws everything; returns the page and the files beside it."""
  with style.style():
    tiles, sections = _contents(report)
    pictures = [picture for section in sections for picture in section.pictures]
    title = f"What {report.name} skips"
    files = []
    for picture in pictures:
      files += [_write(directory / f"{picture.name}.png", style.png(picture.figure))]
      files += [_write(directory / f"{picture.name}.csv", to_csv(picture.rows))]
    examples = [example for section in sections for example in section.examples]
    files.append(_write(directory / "coloured-tokens.csv", to_csv(coloured.as_rows(examples))))
    page = render(title, _lead(report), tiles, sections)
  write_json(directory / "report.json", _summary(report))
  return [_write(directory / PAGE, page.encode()), directory / "report.json", *files]


def _write(file: pathlib.Path, content: bytes) -> pathlib.Path:
  with atomic_writer(file, overwrite=True) as out:
    out.write(content)
  return file


def _contents(report: Report) -> tuple[list[Tile], list[Section]]:
  collected = report.collected
  points = quality.dial_points(collected.dial)
  lines = report.correlations
  labelled = any(math.isfinite(p.accuracy) for p in points)
  at_zero = next(p for p in points if p.bias == 0)
  rows = speed.speedup_rows(collected.config, at_zero.ratio_all, at_zero.ratio, report.bench)
  curve = quality.quality_picture(report.models, points)
  sections = [
    Section("results", "Results", _results_text(report), _headline(report), [curve] if curve else []),
    Section("evaluation", "Evaluation", "From `zeda evaluate`. " + _EVALUATION, report.evaluations),
    Section("dial", "The dial", _DIAL, [("", tables.dial_table(points, labelled))], quality.dial_pictures(points)),
    Section("training", "Training", "", (), training.training_pictures(report.stages, report.targets)),
    Section("where", "Where work is skipped", _WHERE, (), _where(collected)),
    Section(
      "uncertainty",
      "Which tokens skip",
      _UNCERTAINTY,
      [("", tables.correlation_table(lines))],
      uncertainty.uncertainty_pictures(collected, lines),
    ),
    Section("tokens", "Token by token", _TOKENS, examples=coloured.coloured(collected)),
    Section("load", "Expert load", "", (), routing.load_pictures(collected)),
    _speed_section(report, rows, at_zero.ratio),
    Section("method", "How this was measured", "", facts=_facts(report)),
  ]
  return _tiles(report, at_zero, lines, rows), sections


def _where(collected: Collected) -> list[Picture]:
  return [*routing.layer_pictures(collected), routing.kinds_picture(collected)]


_DIAL = (
  "`zero_expert_bias` is added to the router logits of the zero experts at run time: one adapted checkpoint, several "
  "points of quality and speed, no training. Distances are means over the same answers at every setting, with 95 % "
  "intervals."
)
_WHERE = "r_ZE is the share of the K expert picks of a token that fall on zero experts, and so cost nothing."
_UNCERTAINTY = (
  "Does the student spend its experts where it is unsure? A negative correlation says yes: fewer picks are skipped "
  "where entropy, or the gap to the teacher, is high. Intervals are 95 % bootstraps over whole texts."
)
_TOKENS = (
  "Every token is coloured by the pass that predicted it, relative to the mean r_ZE of all answers. The texts are the "
  "first of each family, not chosen by what they show."
)
_EVALUATION = "Scores in percent with standard errors; r_ZE per response, per response token and over all tokens."


def _headline(report: Report) -> list[tuple[str, tables.Table]]:
  return [("", tables.headline(report.models))] if report.models else []


def _results_text(report: Report) -> str:
  if not report.models:
    return "The prompts have no labels, so answers were not graded: quality is the distance to the teacher, below."
  return (
    "Accuracy in percent on held-out prompts; r_ZE over all passes and over those that predict the answer; expert "
    "FLOPs relative to the teacher's; seconds to generate all answers, one run each."
  )


def _lead(report: Report) -> str:
  config = report.collected.config
  layers = sum(config.moe_layers)
  return (
    f"{layers} MoE layers, the best {config.num_experts_per_tok} of {config.num_experts} experts and "
    f"{config.num_zero_experts} zero experts per token. Measured on {len(report.collected.texts):,} texts with "
    f"{len(report.collected.texts.tokens):,} tokens."
  )


def _tiles(
  report: Report, at_zero: quality.DialPoint, lines: Sequence[uncertainty.Line], rows: Sequence[dict[str, Any]]
) -> list[Tile]:
  tiles = [Tile(percent(at_zero.ratio), "of expert picks skipped", "while answering (r_ZE)")]
  by_name = {m.name: m.row for m in report.models if m.row.get("average") is not None}
  if "student" in by_name:
    student, note = by_name["student"], ""
    if "teacher" in by_name:
      difference = 100 * (student["average"] - by_name["teacher"]["average"])
      note = minus(f"{difference:+.2f} against the teacher")
    tiles.append(Tile(f"{100 * student['average']:.2f} %", "accuracy", note))
  elif math.isfinite(at_zero.kl[0]):
    tiles.append(Tile(f"{at_zero.kl[0]:.2g}", "KL to the teacher", "nats per answer token"))
  tiles.append(Tile(percent(1 - at_zero.ratio_all, 0), "of expert FLOPs left", "over all passes"))
  decode = [row for row in rows if row["stage"] == "decode"]
  tiles.append(
    Tile(f"{decode[0]['theory']:.2f}×", "decode speed in theory", f"MoE layer, {decode[0]['length']} tokens")
  )
  entropy = next(line for line in lines if line.measure == "entropy" and line.among == "all")
  value, _, interval = uncertainty.signed(entropy.spearman).partition(" ")
  tiles.append(Tile(value, "correlation with entropy", f"Spearman, 95 % {interval}"))
  return tiles


def _speed_section(report: Report, rows: Sequence[dict[str, Any]], ratio: float) -> Section:
  measured = {m.name: m.row for m in report.models}
  text = speed.seconds_note(measured, {m.name: m.label for m in report.models})
  if report.bench:
    text = "Measured speed is that of `zeda bench model`: prefill and decode of the whole model, medians. " + text
  elif not text:
    text = "Speed was not measured; `zeda bench model` does that, and --bench shows its CSV here."
  pictures = speed.speed_pictures(report.collected.config, rows, ratio)
  return Section("speed", "FLOPs and speed", text, [("", tables.speed_table(rows))], pictures)


def _facts(report: Report) -> list[tuple[str, str]]:
  settings = report.collected.settings
  sampling = f"temperature {settings['temperature']:g}"
  if settings["temperature"]:
    sampling += f", top-p {settings['top_p']:g}, top-k {settings['top_k']}, seed {settings['seed']}"
  facts = [
    ("student", settings["student"]),
    ("teacher", settings["teacher"] or "none given: no gap, no load before"),
    ("prompts", f"{settings['num_prompts']:,}"),
    ("answers", f"{sampling}; at most {settings['max_new_tokens']:,} new tokens; grader {settings['grader']}"),
    ("texts", "prompts with the student's own answers at zero_expert_bias 0"),
    ("pass", "reads a token and predicts the next; the last token of an answer is never read"),
    ("gap", "|log π_teacher − log π_student| of the answer's next token"),
    ("intervals", "95 %, 2000 bootstrap resamples of whole texts"),
    ("data", "data/tokens.npz has every number by token; data/dial/ the settings of the dial"),
  ]
  return facts if settings["teacher"] else [fact for fact in facts if fact[0] != "gap"]


def _summary(report: Report) -> dict[str, Any]:
  """The headline numbers, for programs."""
  points = quality.dial_points(report.collected.dial)
  dial = [
    {
      "zero_expert_bias": f"{p.bias:g}",
      "r_ze_response": p.ratio,
      "r_ze_all": p.ratio_all,
      "accuracy": _finite(p.accuracy),
      "forward_kl": _finite(p.kl[0]),
    }
    for p in points
  ]
  correlations = [
    {
      "measure": line.measure,
      "among": line.among,
      "sign": line.verdict,
      "spearman": list(map(_finite, line.spearman[:3])),
      "pearson": list(map(_finite, line.pearson[:3])),
    }
    for line in report.correlations
  ]
  return {"dial": dial, "dial_is_monotone": quality.is_monotone(points), "correlations": correlations}


def _finite(value: float) -> float | None:
  return float(value) if math.isfinite(value) else None
