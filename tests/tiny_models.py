"""Tiny random models for the tests, of both libraries, and truths that share no code with the package."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zeda_jax.config import MLAConfig, ModelConfig, RopeConfig
from zeda_jax.models.decoder import Decoder, DecoderOutput, abstract_decoder
from zeda_jax.models.params import merge_model, split_model

QWEN3_30B_A3B = ModelConfig(
  model_type="qwen3_moe",
  vocab_size=151936,
  hidden_size=2048,
  num_heads=32,
  num_kv_heads=4,
  head_dim=128,
  intermediate_size=6144,
  moe_intermediate_size=768,
  num_experts=128,
  num_experts_per_tok=8,
  moe_layers=(True,) * 48,
)

GLM_4_7_FLASH = ModelConfig(
  model_type="glm4_moe_lite",
  vocab_size=154880,
  hidden_size=2048,
  num_heads=20,
  num_kv_heads=20,
  head_dim=256,
  mla=MLAConfig(kv_lora_rank=512, nope_head_dim=192, rope_head_dim=64, v_head_dim=256, q_lora_rank=768),
  intermediate_size=10240,
  moe_intermediate_size=1536,
  num_experts=64,
  num_experts_per_tok=4,
  num_shared_experts=1,
  moe_layers=(False,) + (True,) * 46,
  scoring="sigmoid",
  routed_scaling_factor=1.8,
  rms_norm_eps=1e-5,
  rope=RopeConfig(theta=1e6),
  max_position_embeddings=202752,
  dtype="bfloat16",
)

_ANY = {
  "vocab_size": 64,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_experts_per_tok": 2,
  "max_position_embeddings": 128,
}
# transformers' config by model_type
TINY = {
  "qwen3_moe": {
    **_ANY,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 6,
    "norm_topk_prob": True,
  },
  "glm4_moe_lite": {
    **_ANY,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "bos_token_id": None,
    "eos_token_id": None,
  },
  "olmoe": {
    **_ANY,
    "intermediate_size": 24,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "pad_token_id": None,
    "eos_token_id": None,
  },
}

CONFIG = ModelConfig(
  model_type="qwen3_moe",
  vocab_size=64,
  hidden_size=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  intermediate_size=48,
  moe_intermediate_size=24,
  num_experts=6,
  num_experts_per_tok=2,
  moe_layers=(True, True),
  max_position_embeddings=128,
)


GLM: dict[str, Any] = {  # what makes CONFIG a GLM
  "model_type": "glm4_moe_lite",
  "num_kv_heads": 4,
  "head_dim": 18,
  "mla": MLAConfig(kv_lora_rank=20, nope_head_dim=10, rope_head_dim=8, v_head_dim=14, q_lora_rank=12),
  "moe_layers": (False, True),
  "scoring": "sigmoid",
  "routed_scaling_factor": 1.8,
  "num_shared_experts": 1,
}


def tiny_config(**changes: Any) -> ModelConfig:
  return dataclasses.replace(CONFIG, **changes)


def tiny_model(seed: int = 0, **changes: Any) -> Decoder:
  """A decoder whose every parameter matters: matrices as large as trained ones, biases and norms away from 0 and 1."""
  graphdef, params = split_model(abstract_decoder(tiny_config(**changes)))
  rng = np.random.default_rng(seed)

  def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    noise = rng.standard_normal(leaf.shape, np.float32)
    if path[-1].key == "scale":
      return jnp.asarray(1 + np.float32(0.3) * noise)
    if "correction_bias" in path[-1].key:
      return jnp.asarray(np.float32(0.2) * noise)
    return jnp.asarray(np.float32(0.5 if "router" in jax.tree_util.keystr(path) else 0.2) * noise)

  return merge_model(graphdef, jax.tree_util.tree_map_with_path(draw, params))


def layer_of(stacked: Any, place: int = 0) -> Any:
  """One layer of the stacked modules that a run of a decoder holds."""
  graphdef, state = nnx.split(stacked)
  return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[place], state))


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, *inputs):
  return merge_model(graphdef, params)(*inputs)


def forward(
  model: Decoder, tokens: Any, segment_ids: Any = None, positions: Any = None, zero_expert_bias: float = 0.0
) -> DecoderOutput:
  """model(...), jitted: models of one configuration share one compiled program."""
  return _forward(*split_model(model), tokens, segment_ids, positions, zero_expert_bias)


def hf_model(seed: int = 0, dtype: str = "float32", model_type: str = "qwen3_moe", **changes: Any) -> Any:
  """A stock transformers model in evaluation mode; biases and norm scales are perturbed, for they start at 0 and 1.

  Correction biases are as large as differences of scores, and float32 whatever the dtype, as in real checkpoints.
  """
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM

  torch.manual_seed(seed)
  model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(TINY[model_type] | changes)))
  for name, parameter in model.named_parameters():
    parameter.data.normal_(0, 0.3 if "norm" in name else 0.2)
    if "norm" in name:
      parameter.data.add_(1)
  model = model.to(getattr(torch, dtype)).eval()
  for name, buffer in model.named_buffers():
    if name.endswith("e_score_correction_bias"):
      buffer.data = torch.empty_like(buffer, dtype=torch.float32).normal_(0, 0.2)
  return model


def hf_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
  import torch

  with torch.no_grad():
    return model(torch.tensor(np.asarray(tokens, np.int64))).logits.float().numpy()


def to_old_dialect(path: pathlib.Path) -> None:
  """Rewrites the config.json of transformers 5 as transformers 4 wrote it."""
  raw = json.loads((path / "config.json").read_text())
  rope = raw.pop("rope_parameters")
  raw["rope_theta"] = rope.pop("rope_theta")
  raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope | {"type": rope.pop("rope_type")}
  if "num_local_experts" in raw:
    raw["num_experts"] = raw.pop("num_local_experts")
  if "mlp_layer_types" in raw:
    dense = raw["mlp_layer_types"].count("dense")
    assert raw.pop("mlp_layer_types") == ["dense"] * dense + ["sparse"] * (raw["num_hidden_layers"] - dense)
    raw["first_k_dense_replace"] = dense
  raw["torch_dtype"] = raw.pop("dtype")
  (path / "config.json").write_text(json.dumps(raw))


def random_tokens(shape: tuple[int, ...], seed: int = 0, vocab_size: int = 64) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)
