"""Two models on the same problems: the paired difference of their scores, its interval, and a test against chance."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from zeda_jax.errors import ZedaError
from zeda_jax.evaluate.estimators import by_problem
from zeda_jax.evaluate.samples import read_samples

_RESAMPLES = 9999
_BATCH = 512  # resamples in memory at once


@dataclasses.dataclass(frozen=True)
class Comparison:
  """B against A.

  Attributes:
    num_problems: those that both were graded on.
    mean_a, mean_b: of the problems' mean scores; over several tasks, of the tasks' means.
    difference: mean_b - mean_a.
    low, high: 95 % interval of the difference, by bootstrap over problems, within each task. None for one problem.
    p_value: of a difference as large, in either direction, if it were chance which model gave which of a problem's two
      scores (paired permutation test).
    wins, losses: problems on which B scored higher, and lower.
  """

  num_problems: int
  mean_a: float
  mean_b: float
  difference: float
  low: float | None
  high: float | None
  p_value: float
  wins: int
  losses: int


def compare(
  a: Sequence[Float[np.ndarray, " problems"]], b: Sequence[Float[np.ndarray, " problems"]], seed: int = 0
) -> Comparison:
  """Compares two models by their problems' mean scores.

  Args:
    a, b: for each task, one value per problem, in the same order.
    seed: of resampling.

  Raises:
    ValueError: no task, one without problems, or different lengths.
  """
  if not a or any(len(x) == 0 or len(x) != len(y) for x, y in zip(a, b, strict=True)):
    raise ValueError("expected at least one task, with as many problems of A as of B and at least one")
  differences = [np.asarray(y, np.float64) - np.asarray(x, np.float64) for x, y in zip(a, b, strict=True)]
  flat = np.concatenate(differences)
  # Of the average over tasks, which count the same, each problem's part.
  parts = np.concatenate([d / (len(d) * len(differences)) for d in differences])
  low, high = _interval(differences, seed)
  mean = lambda values: float(np.mean([np.mean(v) for v in values]))
  return Comparison(
    num_problems=len(flat),
    mean_a=mean(a),
    mean_b=mean(b),
    difference=float(parts.sum()),
    low=low,
    high=high,
    p_value=_p_value(parts, seed),
    wins=int((flat > 0).sum()),
    losses=int((flat < 0).sum()),
  )


def _interval(differences: Sequence[np.ndarray], seed: int) -> tuple[float | None, float | None]:
  if any(len(d) < 2 for d in differences):
    return None, None
  mean = lambda *tasks, axis: sum(task.mean(axis=axis) for task in tasks) / len(tasks)
  options: dict[str, Any] = {"n_resamples": _RESAMPLES, "batch": _BATCH, "vectorized": True, "method": "percentile"}
  found = stats.bootstrap(tuple(differences), mean, rng=np.random.default_rng(seed), **options).confidence_interval
  return float(found.low), float(found.high)


def _p_value(parts: np.ndarray, seed: int) -> float:
  parts = parts[parts != 0]  # whichever model such a problem's scores belong to, nothing changes
  if len(parts) < 2:  # one difference is as large in the other direction
    return 1.0
  total = lambda x, axis: x.sum(axis=axis)
  options: dict[str, Any] = {"permutation_type": "samples", "n_resamples": _RESAMPLES, "batch": _BATCH}
  rng = np.random.default_rng(seed)
  return float(stats.permutation_test((parts,), total, vectorized=True, rng=rng, **options).pvalue)


def compare_runs(
  first: str | os.PathLike[str], second: str | os.PathLike[str], seed: int = 0
) -> tuple[dict[str, Comparison], list[str]]:
  """Compares the runs of two output directories of `zeda evaluate` on the problems that both have.

  Returns:
    By task, and "average" where there are several; and what a reader must know: settings that differ, problems that
    only one of them has.

  Raises:
    ZedaError: a directory holds no run, the runs have no task in common, or other problems under the same names.
  """
  runs = [_load(directory) for directory in (first, second)]
  settings = [run["settings"] for run in runs]
  common = [name for name in settings[0]["tasks"] if name in settings[1]["tasks"]]
  if not common:
    names = [", ".join(s["tasks"]) or "none" for s in settings]
    raise ZedaError(f"{first} and {second} have no task in common: {names[0]} and {names[1]}.")
  notes = [
    f"{key}: {settings[0].get(key)} and {settings[1].get(key)}"
    for key in ("temperature", "top_p", "top_k", "max_new_tokens")
    if settings[0].get(key) != settings[1].get(key)
  ]
  found: dict[str, Comparison] = {}
  pairs: list[tuple[np.ndarray, np.ndarray]] = []
  for name in common:
    scores = [by_problem(run["samples"][name]) for run in runs]
    ids = [problem for problem in scores[0] if problem in scores[1]]
    _check_same(name, [run["samples"][name] for run in runs], ids)
    alone = len(scores[0].keys() ^ scores[1].keys())
    if alone:
      notes.append(f"{name}: {alone} problems that only one of the runs has are left out")
    if not ids:
      continue
    a, b = (np.array([np.mean(s[problem]) for problem in ids]) for s in scores)
    pairs.append((a, b))
    found[name] = compare([a], [b], seed)
  if not pairs:
    raise ZedaError(f"{first} and {second} have no graded problem in common.")
  if len(pairs) > 1:
    found["average"] = compare([a for a, _ in pairs], [b for _, b in pairs], seed)
  return found, notes


def _check_same(task: str, samples: Sequence[Sequence[Mapping[str, Any]]], ids: Sequence[str]) -> None:
  first, second = ({sample["id"]: sample.get("problem") for sample in run} for run in samples)
  changed = [problem for problem in ids if first[problem] != second[problem]]
  if changed:
    raise ZedaError(
      f"{task}: {len(changed)} problems, {changed[0]!r} among them, differ between the runs: their prompts or answers "
      "are not the same; evaluate both models on the same file."
    )


def _load(directory: str | os.PathLike[str]) -> dict[str, Any]:
  place = pathlib.Path(directory)
  missing = [name for name in ("settings.json", "samples.jsonl") if not (place / name).is_file()]
  if missing:
    raise ZedaError(f"{place} has no {missing[0]}: expected an output directory of `zeda evaluate`.")
  try:
    settings: Mapping[str, Any] = json.loads((place / "settings.json").read_text())
    if not isinstance(settings["tasks"], dict):
      raise TypeError("'tasks' is no object")
  except (ValueError, KeyError, TypeError) as error:
    raise ZedaError(f"{place / 'settings.json'} is no file of `zeda evaluate` ({error}): restore it.") from error
  samples: dict[str, list[dict[str, Any]]] = {name: [] for name in settings["tasks"]}
  for key, sample in read_samples(place / "samples.jsonl")[0].items():
    samples.setdefault(key[0], []).append(sample)
  return {"settings": settings, "samples": samples}
