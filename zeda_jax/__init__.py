"""zeda-jax: post-trained mixture-of-experts models that skip half of their expert work.

    model = zeda_jax.load_hf("Qwen3-30B-A3B")        # static or dynamic, by its config.json
    student = zeda_jax.inject(model)                 # zero experts in every MoE layer
    out = student(tokens, zero_expert_bias=0.0)      # out.logits, out.picks
    zeda_jax.save_hf(student, "Qwen3-30B-A3B-zeda")

The whole recipe is `zeda adapt` or `zeda_jax.adapt(config)`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from zeda_jax.analysis.flops import theoretical_speedup
  from zeda_jax.checkpoint.huggingface import load_hf, save_hf
  from zeda_jax.config import ModelConfig
  from zeda_jax.distill.adapt import adapt
  from zeda_jax.distill.recipe import default_config
  from zeda_jax.errors import ZedaError
  from zeda_jax.models.decoder import Decoder, inject
  from zeda_jax.ops.grouped_matmul import grouped_matmul, grouped_swiglu
  from zeda_jax.rollout.engine import Engine
  from zeda_jax.rollout.generate import generate
  from zeda_jax.rollout.requests import Completion, Request
  from zeda_jax.zero_experts import group_balance_loss, zero_expert_ratio

__version__ = "0.1.0"

# public name -> module; imported on first use, so that `zeda --help` does not wait for JAX.
_PUBLIC = {
  "Completion": "rollout.requests",
  "Decoder": "models.decoder",
  "Engine": "rollout.engine",
  "ModelConfig": "config",
  "Request": "rollout.requests",
  "ZedaError": "errors",
  "adapt": "distill.adapt",
  "default_config": "distill.recipe",
  "generate": "rollout.generate",
  "group_balance_loss": "zero_experts",
  "grouped_matmul": "ops.grouped_matmul",
  "grouped_swiglu": "ops.grouped_matmul",
  "inject": "models.decoder",
  "load_hf": "checkpoint.huggingface",
  "save_hf": "checkpoint.huggingface",
  "theoretical_speedup": "analysis.flops",
  "zero_expert_ratio": "zero_experts",
}

__all__ = [
  "Completion",
  "Decoder",
  "Engine",
  "ModelConfig",
  "Request",
  "ZedaError",
  "adapt",
  "default_config",
  "generate",
  "group_balance_loss",
  "grouped_matmul",
  "grouped_swiglu",
  "inject",
  "load_hf",
  "save_hf",
  "theoretical_speedup",
  "zero_expert_ratio",
]


def __getattr__(name: str) -> Any:
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
