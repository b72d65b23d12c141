"""What `zeda bench model` measures, and what the paper measured. Nothing here needs JAX, so that a wrong option is
refused at once.
"""

import dataclasses
import pathlib
from typing import NamedTuple

from zeda_jax.config import ModelConfig, from_hf, read_config
from zeda_jax.errors import ZedaError
from zeda_jax.plan.models import MODELS

STAGES = ("prefill", "decode")
LENGTHS = tuple(range(1024, 8193, 1024))


class PaperCell(NamedTuple):
  """Speed-ups at r_ZE 0.5."""

  theory: float
  measured: float


# Appendix D of the paper: Qwen3-30B-A3B on one H200 with SGLang. (stage, length) -> speed-up
PAPER_MODEL = "qwen3_30b_a3b"
PAPER_RATIO = 0.5
PAPER = {
  ("prefill", 1024): PaperCell(1.403, 1.141),
  ("prefill", 2048): PaperCell(1.341, 1.214),
  ("prefill", 3072): PaperCell(1.296, 1.203),
  ("prefill", 4096): PaperCell(1.261, 1.203),
  ("prefill", 5120): PaperCell(1.234, 1.202),
  ("prefill", 6144): PaperCell(1.212, 1.192),
  ("prefill", 7168): PaperCell(1.194, 1.176),
  ("prefill", 8192): PaperCell(1.178, 1.175),
  ("decode", 1024): PaperCell(1.443, 1.233),
  ("decode", 2048): PaperCell(1.403, 1.252),
  ("decode", 3072): PaperCell(1.370, 1.238),
  ("decode", 4096): PaperCell(1.341, 1.236),
  ("decode", 5120): PaperCell(1.317, 1.228),
  ("decode", 6144): PaperCell(1.296, 1.215),
  ("decode", 7168): PaperCell(1.278, 1.210),
  ("decode", 8192): PaperCell(1.261, 1.185),
}


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """What to measure. None stands for the platform's default, see `zeda_jax.bench.model.resolved`.

  Attributes:
    model: a name in MODELS, whose weights are then random, or a checkpoint's directory.
    layers: how many of the model's layers; None is all of them, on a CPU one.
    ratio: r_ZE to look for; what is found is reported.
    lengths: tokens, read at once (prefill) or generated one by one (decode).
    stages: of STAGES.
    slots: sequences that are decoded together.
    steps: decode steps to a sample.
    dtype: "float32" or "bfloat16".
    repeats: rounds, in each of which the static and the dynamic model run once.
  """

  model: str = PAPER_MODEL
  layers: int | None = None
  ratio: float = PAPER_RATIO
  lengths: tuple[int, ...] | None = None
  stages: tuple[str, ...] = STAGES
  slots: int = 1
  steps: int = 16
  dtype: str | None = None
  repeats: int | None = None

  def __post_init__(self) -> None:
    for name in ("layers", "slots", "steps", "repeats"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ZedaError(f"{name} is {value}; expected at least 1.")
    if not 0.0 < self.ratio < 1.0:
      raise ZedaError(f"ratio is {self.ratio:g}; expected a share of zero experts between 0 and 1, such as 0.5.")
    if self.lengths is not None and (not self.lengths or min(self.lengths) < 2):
      raise ZedaError("lengths are the numbers of tokens to read and to generate; expected some of 2 or more.")
    for stage in self.stages:
      if stage not in STAGES:
        raise ZedaError(f"stage {stage!r} is unknown; expected prefill or decode.")
    if not self.stages:
      raise ZedaError("nothing to measure: give prefill, decode or both as --stages.")
    if self.dtype not in (None, "float32", "bfloat16"):
      raise ZedaError(f"dtype is {self.dtype!r}; expected float32 or bfloat16.")


def find_geometry(model: str) -> tuple[str, ModelConfig]:
  """(its name, its config): of a known model, or of a checkpoint.

  Raises:
    ZedaError: neither a known name nor a directory with a config.json.
  """
  if model in MODELS:
    return model, from_hf(MODELS[model])
  if not pathlib.Path(model).is_dir():
    raise ZedaError(f"--model={model} is neither one of {', '.join(MODELS)} nor a checkpoint's directory.")
  return pathlib.Path(model).resolve().name, read_config(model)


def with_layers(config: ModelConfig, layers: int | None) -> ModelConfig:
  """The geometry with fewer layers, all of them MoE layers, and with as many fewer rows in the vocabulary, so that the
  head takes the same share of the time as it does in the whole model.

  Raises:
    ZedaError: the model has not so many layers.
  """
  if layers is None or layers == config.num_layers:
    return config
  if layers > config.num_layers:
    raise ZedaError(f"layers is {layers}; the model has {config.num_layers}.")
  vocabulary = max(config.vocab_size * layers // config.num_layers // 128 * 128, 128)
  return config.replace(moe_layers=(True,) * layers, vocab_size=vocabulary)
