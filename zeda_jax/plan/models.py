"""Shapes of the models that the shipped configurations are for, so that a plan needs no checkpoint."""

import pathlib

from zeda_jax.config import ModelConfig, from_hf, read_config
from zeda_jax.errors import ZedaError

# What their published config.json files say of shapes.
MODELS = {
  "qwen3_30b_a3b": {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
  },
  "glm_4_7_flash": {
    "model_type": "glm4_moe_lite",
    "vocab_size": 154880,
    "hidden_size": 2048,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000,
    "max_position_embeddings": 202752,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
  },
}


def find_model(name: str | None, teacher: str, config_file: str) -> tuple[str, ModelConfig]:
  """(what to call it, the static model): the named one, that of config.teacher, or the one the file is for.

  Raises:
    ZedaError: none of the three says which model.
  """
  if name is not None and name not in MODELS:
    raise ZedaError(f"--model={name} is not known; expected one of {', '.join(MODELS)}, or a --config.teacher=DIR.")
  if name is None and teacher:
    config = read_config(teacher)
    if config.is_dynamic:
      raise ZedaError(f"config.teacher: {teacher} already has zero experts; expected the static model.")
    return teacher, config
  name = name or pathlib.Path(config_file.split(":")[0]).stem
  if name not in MODELS:
    raise ZedaError(
      f"Which model is it? Give --config.teacher=DIR with its config.json, or --model={'|'.join(MODELS)}."
    )
  return name, from_hf(MODELS[name])
