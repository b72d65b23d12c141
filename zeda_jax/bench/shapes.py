"""What is measured: the MoE layers of real models at real numbers of tokens, and the same scaled down.

Nothing here needs JAX, so that a wrong option is refused at once.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from zeda_jax.errors import ZedaError

RATIOS = (0.0, 0.25, 0.5, 0.75)
# Experts shrink with the tokens below this scale: above it the weights of one layer fit into a small machine, and the
# rows per expert, which decide whether a product is bound by weights or by arithmetic, fall as the tokens do.
FULL_EXPERTS_SCALE = 0.125


class Shape(NamedTuple):
  """One MoE layer at one number of tokens: H = hidden, F = inner (per expert), N = experts, K = top_k."""

  name: str
  tokens: int
  hidden: int
  inner: int
  experts: int
  top_k: int

  @property
  def picks(self) -> int:
    """Rows that the grouped matmul is given, T * K; those of zero picks are at the end and not computed."""
    return self.tokens * self.top_k

  @property
  def zero_experts(self) -> int:
    """N_Z, the default of injection; at least K, or the highest zero ratios could not be reached."""
    return self.experts // 2

  @property
  def expert_weights(self) -> int:
    """Numbers in one expert: gate, up and down."""
    return 3 * self.hidden * self.inner


# name -> (H, F, N, K)
_MODELS = {"qwen3-30b-a3b": (2048, 768, 128, 8), "glm-4.7-flash": (2048, 1536, 64, 4)}
_STAGES = {"prefill": 8192, "decode-256": 256, "decode-32": 32}
SHAPES = {
  f"{model}/{stage}": Shape(f"{model}/{stage}", tokens, *sizes)
  for model, sizes in _MODELS.items()
  for stage, tokens in _STAGES.items()
}
SHAPES["demo"] = Shape("demo", 4096, 96, 48, 16, 4)  # the embedded teacher of zeda_jax/demo


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure. None stands for the platform's default, see `zeda_jax.bench.run.resolved`.

  Attributes:
    shapes: names in SHAPES.
    ratios: shares of the picks that are zero experts, 0 up to but not including 1.
    columns: names of backends and peers; the dense product is always measured.
    dtype: "float32" or "bfloat16".
    scale: factor on the number of tokens, see `scaled`.
    repeats: rounds, in each of which every column runs once.
    backward: measure forward + backward, too.
    max_seconds: a column that would need longer for one forward pass is skipped; three times as long with backward.
  """

  shapes: tuple[str, ...] = tuple(SHAPES)
  ratios: tuple[float, ...] = RATIOS
  columns: tuple[str, ...] | None = None
  dtype: str | None = None
  scale: float | None = None
  repeats: int | None = None
  backward: bool = False
  max_seconds: float = 0.1

  @property
  def passes(self) -> tuple[bool, ...]:
    """Whether with backward: each pass that is measured."""
    return (False, True) if self.backward else (False,)

  def __post_init__(self) -> None:
    for name in self.shapes:
      if name not in SHAPES:
        raise ZedaError(f"shape {name!r} is unknown; expected one of {', '.join(SHAPES)}.")
    for ratio in self.ratios:
      if not 0.0 <= ratio < 1.0:
        raise ZedaError(f"zero ratio {ratio:g} is no share of work to skip; expected numbers from 0 to below 1.")
    if not self.shapes or not self.ratios:
      raise ZedaError("nothing to measure: give at least one shape and one zero ratio.")
    if self.dtype not in (None, "float32", "bfloat16"):
      raise ZedaError(f"dtype is {self.dtype!r}; expected float32 or bfloat16.")
    if self.scale is not None and not 0.0 < self.scale <= 1.0:
      raise ZedaError(f"scale is {self.scale:g}; expected a factor above 0 and up to 1.")
    if self.repeats is not None and self.repeats < 1:
      raise ZedaError(f"repeats is {self.repeats}; expected at least 1.")
    if not self.max_seconds > 0.0 or math.isinf(self.max_seconds):
      raise ZedaError(f"max_seconds is {self.max_seconds:g}; expected a number of seconds above 0.")


def scaled(shape: Shape, scale: float) -> Shape:
  """The shape with tokens * scale, and below FULL_EXPERTS_SCALE with experts shrunk by the rest of the factor."""
  tokens = max(1, round(shape.tokens * scale))
  fewer = round(shape.experts * min(1.0, scale / FULL_EXPERTS_SCALE))
  # 2 K experts: half as many zero experts are then enough for all K picks of a token.
  return shape._replace(tokens=tokens, experts=min(shape.experts, max(2 * shape.top_k, fewer)))


def scaling_note(shapes: Sequence[Shape], scale: float, full_shapes: Mapping[str, Shape] = SHAPES) -> str:
  """What `scaled` did, in a sentence."""
  if scale == 1.0:
    return "full size (scale 1)"
  changes = []
  for shape in shapes:
    full = full_shapes[shape.name]
    change = f"{shape.name} {full.tokens} → {shape.tokens} tokens"
    changes.append(change + (f", {full.experts} → {shape.experts} experts" if full.experts != shape.experts else ""))
  return f"scaled by {scale:g}: {'; '.join(changes)}"
