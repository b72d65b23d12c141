"""What a set of scores says: means, pass@k, their standard errors, and the expert work that was skipped."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
  """Unbiased estimate of the chance that one of k samples is right, from n >= k samples of which c are.

  1 - C(n - c, k) / C(n, k), arXiv 2107.03374.
  """
  if not 1 <= k <= num_samples:
    raise ValueError(f"k is {k}; expected 1 to {num_samples}, the number of samples")
  return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def standard_error(values: Float[np.ndarray, " problems"] | Sequence[float]) -> float | None:
  """Of the mean of one value per problem. None for fewer than two.

  With the problems' mean scores this is the error clustered by problem: samples of one problem are not independent.
  """
  return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def by_problem(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
  """Scores of each problem, without samples that could not be graded."""
  scores: dict[str, list[float]] = {}
  for sample in samples:
    if sample.get("score") is not None:
      scores.setdefault(sample["id"], []).append(float(sample["score"]))
  return scores


def summarize(samples: Sequence[Mapping[str, Any]], num_samples: int) -> dict[str, Any]:
  """The numbers of one task.

  Args:
    samples: one record per response: "id", "score" (None: not graded), "num_tokens", "num_prompt_tokens", "zero_ratio",
      "zero_ratio_all", "finish_reason".
    num_samples: n of mean@n and pass@n.

  Returns:
    "mean" (over problems, of the mean over a problem's samples) and its "standard_error"; "pass_at": by k, powers of
    two and n, over the problems with so many graded samples; "length"s in tokens; "zero_ratio": averaged over
    "response"s, over response "token"s, and over "all" tokens, the prompts' included. None where there is nothing to
    average.
  """
  scores = by_problem(samples)
  means = [float(np.mean(values)) for values in scores.values()]
  lengths = np.array([s["num_tokens"] for s in samples], np.float64)
  passes = lengths + np.array([s["num_prompt_tokens"] for s in samples], np.float64) - 1
  zero, zero_all = (np.array([s[name] for s in samples], np.float64) for name in ("zero_ratio", "zero_ratio_all"))
  return {
    "num_problems": len({s["id"] for s in samples}),
    "num_samples": num_samples,
    "num_graded": sum(map(len, scores.values())),
    "num_failed": sum(s.get("score") is None for s in samples),
    "mean": float(np.mean(means)) if means else None,
    "standard_error": standard_error(means),
    "pass_at": {str(k): _pass_at(scores, k) for k in _powers(num_samples)},
    "length": float(lengths.mean()) if len(samples) else None,
    "length_median": float(np.median(lengths)) if len(samples) else None,
    "truncated": float(np.mean([s["finish_reason"] == "length" for s in samples])) if len(samples) else None,
    "zero_ratio": {
      "response": float(zero.mean()) if len(samples) else None,
      "token": float(np.average(zero, weights=lengths)) if lengths.sum() else None,
      "all": float(np.average(zero_all, weights=passes)) if passes.sum() else None,
    },
  }


def _powers(n: int) -> list[int]:
  return sorted({n, *(1 << i for i in range(n.bit_length()))})


def _pass_at(scores: Mapping[str, Sequence[float]], k: int) -> float | None:
  estimates = [pass_at_k(len(v), sum(x == 1 for x in v), k) for v in scores.values() if len(v) >= k]
  return float(np.mean(estimates)) if estimates else None


def overall(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The average over tasks, each counting the same, with the error that the tasks' errors give it."""
  means = [t["mean"] for t in tasks.values() if t["mean"] is not None]
  errors = [t["standard_error"] for t in tasks.values() if t["mean"] is not None]
  known = bool(means) and all(error is not None for error in errors)
  ratios = [t["zero_ratio"] for t in tasks.values()]
  mean_of = lambda values: float(np.mean(values)) if values and None not in values else None
  return {
    "mean": float(np.mean(means)) if means else None,
    "standard_error": math.sqrt(sum(error**2 for error in errors)) / len(means) if known else None,
    "zero_ratio": {name: mean_of([r[name] for r in ratios]) for name in ("response", "token", "all")},
    "length": mean_of([t["length"] for t in tasks.values()]),
    "num_failed": sum(t["num_failed"] for t in tasks.values()),
  }
