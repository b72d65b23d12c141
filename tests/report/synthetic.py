"""Made-up numbers of a report, with known answers, and what a run leaves in its workdir."""

import csv
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from tests import tiny_models
from zeda_jax.analysis.collect import Collected
from zeda_jax.analysis.measure import Texts, TokenMeasurements

CONFIG = tiny_models.CONFIG.replace(
  num_experts=8,
  num_zero_experts=4,
  num_experts_per_tok=4,
  moe_layers=(False, True, True, True),
  max_position_embeddings=4096,
)
FAMILIES = ("code", "math")
RATIOS = (0.0, 0.2, 0.4, 0.5, 0.65, 0.8)  # of the dial
BIASES = ("-inf", "-1", "-0.5", "0", "0.5", "1")


def collected(num_texts: int = 80, labelled: bool = True, teacher: bool = True, **changes: Any) -> Collected:
  """r_ZE falls with entropy in "math" and not in "code"; the dial rises."""
  rng = np.random.default_rng(0)
  prompts = [[1] * int(n) for n in rng.integers(2, 9, num_texts)]
  responses = [[2] * int(n) for n in rng.integers(3, 30, num_texts)]
  texts = Texts.of(prompts, responses)
  family = np.arange(num_texts) % 2
  total, passes = len(texts.tokens), texts.is_pass
  entropy = np.exp(rng.normal(-4, 2, total))
  unsure = (np.log(entropy) + 4) / 2
  chance = np.where(family[texts.text] == 1, 1 / (1 + np.exp(1.2 * unsure)), 0.55)
  zero = np.where(passes, rng.binomial(4, np.clip(chance, 0, 1), (3, total)), 0).astype(np.uint8)
  number = lambda values: np.where(passes, values, np.nan).astype(np.float32)
  nothing = np.full(total, np.nan, np.float32)
  gap = number(entropy * np.exp(rng.normal(0, 1, total)))
  tokens = TokenMeasurements(
    zero_picks=zero,
    entropy=number(entropy),
    logprob=number(-entropy),
    teacher_logprob=number(-entropy) - gap if teacher else nothing,
    forward_kl=number(0.5 * entropy) if teacher else nothing,
    reverse_kl=number(0.6 * entropy) if teacher else nothing,
    load=rng.integers(1, 100, (3, 12)),
    teacher_load=rng.integers(1, 100, (3, 8)) if teacher else None,
  )
  examples = [
    {"text": i, "family": FAMILIES[i % 2], "pieces": ["<a&b>", *["w "] * (int(texts.lengths[i]) - 1)]} for i in range(4)
  ]
  settings = {
    "student": "/models/student",
    "teacher": "/models/teacher" if teacher else None,
    "num_prompts": num_texts,
    "labelled": labelled,
    "max_new_tokens": 32,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "seed": 0,
    "grader": "exact",
  }
  made = Collected(
    CONFIG, settings, _dial(labelled, teacher), texts, rng.integers(0, 6, total).astype(np.uint8), family, FAMILIES,
    tokens, examples, None,
  )  # fmt: skip
  return dataclasses.replace(made, **changes)


def _dial(labelled: bool, teacher: bool) -> list[dict[str, Any]]:
  points = []
  for bias, ratio in zip(BIASES, RATIOS, strict=True):
    kl = [0.01 + ratio**4, 0.008 + ratio**4, 0.013 + ratio**4] if teacher else [None] * 3
    same = {"ratio": [ratio] * 3, "ratio_response": [ratio] * 3, "forward_kl": kl, "reverse_kl": kl, "entropy": kl}
    points.append({"bias": bias, "graded": row(0.9 - 0.1 * ratio**2, ratio) if labelled else None, "same_texts": same})
  return points


def row(average: float, ratio: float, **changes: Any) -> dict[str, Any]:
  """What evaluate/NAME.json holds."""
  return {
    "accuracy": {"code": average + 0.01, "math": average - 0.01},
    "num_graded": {"code": 40, "math": 40},
    "skipped": ratio,
    "skipped_response": ratio,
    "expert_flops_left": 1 - ratio,
    "response_length": 12.0,
    "seconds": 10 - 4 * ratio,
    "average": average,
    "standard_error": 0.01,
    "distance": {},
    **changes,
  }


ROWS = {
  "teacher": row(0.91, 0.0),
  "injected": row(0.5, 0.3),
  "sft": row(0.89, 0.5),
  "student": row(0.9, 0.5),
  "my-baseline": row(0.86, 0.5),
}


def write_workdir(directory: pathlib.Path) -> pathlib.Path:
  """The files of a finished `zeda adapt` that a report reads, without checkpoints."""
  (directory / "evaluate").mkdir(parents=True)
  for name, value in ROWS.items():
    (directory / "evaluate" / f"{name}.json").write_text(json.dumps(value))
  (directory / "evaluate" / "settings.json").write_text("{}")
  (directory / "evaluate" / "teacher-responses.json").write_text("[[1]]")
  recipe = {"sft.balance": "group", "sft.weight": 2.0, "opd.balance": "none", "opd.weight": 2.0}
  (directory / "recipe.json").write_text(json.dumps(recipe))
  for stage, steps in (("sft", 8), ("opd", 5)):
    (directory / stage).mkdir()
    with (directory / stage / "metrics.csv").open("w", newline="") as file:
      names = ["step", "loss_distill", "reverse_kl", "zero_ratio", "zero_ratio/response"]
      names += [f"zero_ratio/layer_{i:02d}" for i in range(3)]
      writer = csv.writer(file)
      writer.writerow(names)
      for step in range(1, steps + 1):
        writer.writerow([step, 1 / step, 0.5 / step, 0.4, 0.45, 0.3, "", 0.5])
  return directory
