"""Which values of `zero_expert_bias` to look at: how far a number moves the routing depends on the model's logits."""

import math
from collections.abc import Callable, Sequence

_CLOSE = 0.015  # r_ZE
_FARTHEST = 64.0  # logits; a router that is not moved by this is not moved by any number
_DIGITS = 3
_MOST_TRIALS = 12  # of one target


def target_ratios(ratio: float) -> list[float]:
  """Ratios below and above the one at bias 0, closer where quality starts to fall."""
  return [ratio / 3, 2 * ratio / 3, *(ratio + share * (1 - ratio) for share in (0.15, 0.3, 0.5))]


def find_biases(ratio_at: Callable[[float], float], targets: Sequence[float] | None = None) -> list[float]:
  """Biases, of few digits, at which r_ZE comes close to each target, and -inf and 0 among them, in rising order.

  A target that no bias reaches is left out: one expert more or less may change the ratio at once, and a sigmoid router
  moves by at most 1.

  Args:
    ratio_at: r_ZE at a bias, on some texts; it rises with the bias.
    targets: None means `target_ratios` of the ratio at 0.
  """
  known = {0.0: ratio_at(0.0)}

  def ratio(bias: float) -> float:
    if bias not in known:
      known[bias] = ratio_at(bias)
    return known[bias]

  found = {-math.inf, 0.0}
  for target in target_ratios(known[0.0]) if targets is None else targets:
    bias = _search(ratio, target, known)
    if bias is not None:
      found.add(bias)
  return sorted(found)


def _search(ratio: Callable[[float], float], target: float, known: dict[float, float]) -> float | None:
  """Bisection, once the target lies between two known ratios."""
  reach = 0.25
  while not min(known.values()) <= target <= max(known.values()):
    if reach > _FARTHEST:
      return None
    ratio(reach if target > known[0.0] else -reach)
    reach *= 2
  for _ in range(_MOST_TRIALS):
    best = min(known, key=lambda bias: abs(known[bias] - target))
    if abs(known[best] - target) <= _CLOSE:
      return best
    low = max(bias for bias, value in known.items() if value <= target)
    high = min(bias for bias, value in known.items() if value >= target)
    middle = _rounded((low + high) / 2)
    if middle in known:  # no number of so few digits lies between them
      return None
    ratio(middle)
  return None


def _rounded(bias: float) -> float:
  return float(f"{bias:.{_DIGITS}g}")
