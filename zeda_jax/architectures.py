"""The supported architectures, by the words of their config.json.

One `Architecture` per model_type: the name of its class, the keys that count its experts, and what its other keys mean
as fields of `ModelConfig`. What all architectures spell alike is read in config.py; the tensors' names are the tables
of checkpoint/names.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from zeda_jax.errors import ZedaError

if TYPE_CHECKING:
  from zeda_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class MLAConfig:
  """Multi-head latent attention: queries, keys and values of all heads are read off small latent vectors.

  A head's query and key have `nope_head_dim` dimensions without rotary embedding and then `rope_head_dim` with it.
  """

  kv_lora_rank: int
  nope_head_dim: int
  rope_head_dim: int
  v_head_dim: int
  q_lora_rank: int | None = None  # None: queries are projected straight from the hidden states
  rope_interleave: bool = True  # rotary pairs are (0, 1), (2, 3), ... instead of (0, D/2), (1, D/2 + 1), ...


@dataclasses.dataclass(frozen=True)
class Fields:
  """A parsed config.json; everything it raises names the file and the field."""

  raw: Mapping[str, Any]
  where: str

  def error(self, message: str) -> ZedaError:
    return ZedaError(f"{self.where}: {message}")

  def need(self, *names: str) -> Any:
    """The value under the first of several names for one field."""
    for name in names:
      if self.raw.get(name) is not None:
        return self.raw[name]
    raise self.error(f"{' or '.join(names)} is missing; it is needed to read a {self.raw.get('model_type')} model.")

  def whole(self, *names: str, least: int = 1, default: int | None = None) -> int:
    if default is not None and all(self.raw.get(name) is None for name in names):
      return default
    value = self.need(*names)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      raise self.error(f"{names[0]} is {value!r}; expected a whole number of at least {least}.")
    return value

  def number(self, name: str, default: float) -> float:
    value = self.raw.get(name)
    if value is None:
      return default
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise self.error(f"{name} is {value!r}; expected a number.")
    return float(value)

  def only(self, name: str, *supported: Any) -> None:
    """Refuses values of an optional field that are not implemented."""
    value = self.raw.get(name)
    if value is not None and value not in supported:
      raise self.error(f"{name} is {value!r}; only {' and '.join(map(str, supported))} is supported.")


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One model_type.

  Attributes:
    name: its class in transformers is {name}ForCausalLM; with zero experts it is {name}PlusPlusForCausalLM.
    experts_keys: the keys that may hold the number of experts; the first is written where none is there.
    read: config.json -> the fields of ModelConfig that config.py does not read for every architecture.
    write: the inverse, for models that did not come from a directory.
  """

  name: str
  experts_keys: tuple[str, ...]
  read: Callable[[Fields], dict[str, Any]]
  write: Callable[["ModelConfig"], dict[str, Any]]

  def class_name(self, dynamic: bool) -> str:
    return f"{self.name}{'PlusPlus' if dynamic else ''}ForCausalLM"


# --- qwen3_moe ----------------------------------------------------------------------------------------------------


def _read_qwen3_moe(fields: Fields) -> dict[str, Any]:
  raw = fields.raw
  if raw.get("use_sliding_window") and raw.get("sliding_window"):
    raise fields.error("use_sliding_window is true; sliding-window attention is not supported.")
  return {
    "num_kv_heads": fields.whole("num_key_value_heads"),
    "head_dim": raw.get("head_dim") or fields.whole("hidden_size") // fields.whole("num_attention_heads"),
    "intermediate_size": fields.whole("intermediate_size"),
    "moe_intermediate_size": fields.whole("moe_intermediate_size"),
    "moe_layers": _sparse_steps(fields),
    "norm_topk_prob": bool(raw.get("norm_topk_prob", False)),
    "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
  }


def _sparse_steps(fields: Fields) -> tuple[bool, ...]:
  dense = fields.raw.get("mlp_only_layers") or []
  step = fields.raw.get("decoder_sparse_step", 1)
  if not isinstance(step, int) or step < 1:
    raise fields.error(f"decoder_sparse_step is {step!r}; expected a whole number of at least 1.")
  layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(fields.whole("num_hidden_layers")))
  if not any(layers):
    raise fields.error("mlp_only_layers and decoder_sparse_step leave no MoE layer, so there is nothing to skip.")
  return layers


def _write_qwen3_moe(config: "ModelConfig") -> dict[str, Any]:
  return {
    "head_dim": config.head_dim,
    "intermediate_size": config.intermediate_size,
    "moe_intermediate_size": config.moe_intermediate_size,
    "mlp_only_layers": [i for i, moe in enumerate(config.moe_layers) if not moe],
    "decoder_sparse_step": 1,
  }


# --- glm4_moe_lite ------------------------------------------------------------------------------------------------


def _read_glm4_moe_lite(fields: Fields) -> dict[str, Any]:
  raw = fields.raw
  fields.only("topk_method", "noaux_tc")
  fields.only("scoring_func", "sigmoid")
  for section in (raw, raw.get("rope_parameters") or {}):
    Fields(section, fields.where).only("partial_rotary_factor", 1.0)
  heads, kv_heads = fields.whole("num_attention_heads"), fields.whole("num_key_value_heads")
  if heads != kv_heads:
    raise fields.error(
      f"num_key_value_heads is {kv_heads}, but latent attention has as many as num_attention_heads, which is {heads}."
    )
  mla = MLAConfig(
    kv_lora_rank=fields.whole("kv_lora_rank"),
    nope_head_dim=fields.whole("qk_nope_head_dim"),
    rope_head_dim=fields.whole("qk_rope_head_dim"),
    v_head_dim=fields.whole("v_head_dim"),
    q_lora_rank=None if raw.get("q_lora_rank") is None else fields.whole("q_lora_rank"),
    rope_interleave=bool(raw.get("rope_interleave", True)),
  )
  if mla.rope_head_dim % 2:
    raise fields.error(f"qk_rope_head_dim is {mla.rope_head_dim}; expected an even number.")
  groups, top_groups = _expert_groups(fields)
  return {
    "num_kv_heads": kv_heads,
    "head_dim": mla.nope_head_dim + mla.rope_head_dim,
    "intermediate_size": fields.whole("intermediate_size"),
    "moe_intermediate_size": fields.whole("moe_intermediate_size"),
    "moe_layers": _mlp_layer_types(fields),
    "norm_topk_prob": bool(raw.get("norm_topk_prob", True)),
    "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
    "mla": mla,
    "scoring": "sigmoid",
    "routed_scaling_factor": fields.number("routed_scaling_factor", 1.8),
    "num_groups": groups,
    "top_groups": top_groups,
    "num_shared_experts": fields.whole("n_shared_experts", default=1),
  }


def _expert_groups(fields: Fields) -> tuple[int, int]:
  groups, top_groups = fields.whole("n_group", default=1), fields.whole("topk_group", default=1)
  experts, picks = fields.whole("n_routed_experts", "num_local_experts"), fields.whole("num_experts_per_tok")
  if experts % groups or (groups > 1 and experts // groups < 2):
    raise fields.error(f"n_group is {groups}; expected to split the {experts} experts into equal groups of at least 2.")
  if top_groups > groups:
    raise fields.error(f"topk_group is {top_groups}, more than the {groups} groups there are.")
  if top_groups * (experts // groups) < picks:
    raise fields.error(
      f"topk_group is {top_groups}: so many groups hold {top_groups * (experts // groups)} experts, fewer than the "
      f"{picks} of num_experts_per_tok."
    )
  return groups, top_groups


def _mlp_layer_types(fields: Fields) -> tuple[bool, ...]:
  # transformers 5 has a word for each layer and ignores first_k_dense_replace, which older files have alone. Where both
  # are there, the weights were written by transformers 5.
  num_layers, types = fields.whole("num_hidden_layers"), fields.raw.get("mlp_layer_types")
  if types is None:
    dense = fields.whole("first_k_dense_replace", least=0, default=1)
    layers = tuple(i >= dense for i in range(num_layers))
  else:
    if not isinstance(types, list) or len(types) != num_layers or not set(types) <= {"dense", "sparse"}:
      raise fields.error(f"mlp_layer_types is {types!r}; expected {num_layers} times 'dense' or 'sparse'.")
    layers = tuple(kind == "sparse" for kind in types)
  if not any(layers):
    raise fields.error("mlp_layer_types or first_k_dense_replace leave no MoE layer, so there is nothing to skip.")
  return layers


def _write_glm4_moe_lite(config: "ModelConfig") -> dict[str, Any]:
  mla = config.mla
  assert mla is not None
  return {
    "intermediate_size": config.intermediate_size,
    "moe_intermediate_size": config.moe_intermediate_size,
    "mlp_layer_types": ["sparse" if moe else "dense" for moe in config.moe_layers],
    "q_lora_rank": mla.q_lora_rank,
    "kv_lora_rank": mla.kv_lora_rank,
    "qk_nope_head_dim": mla.nope_head_dim,
    "qk_rope_head_dim": mla.rope_head_dim,
    "v_head_dim": mla.v_head_dim,
    "rope_interleave": mla.rope_interleave,
    "n_shared_experts": config.num_shared_experts,
    "routed_scaling_factor": config.routed_scaling_factor,
    "n_group": config.num_groups,
    "topk_group": config.top_groups,
  }


# --- olmoe --------------------------------------------------------------------------------------------------------


def _read_olmoe(fields: Fields) -> dict[str, Any]:
  raw, heads = fields.raw, fields.whole("num_attention_heads")
  clip = raw.get("clip_qkv")
  return {
    "num_kv_heads": fields.whole("num_key_value_heads", default=heads),
    "head_dim": fields.whole("hidden_size") // heads,
    "intermediate_size": fields.whole("intermediate_size"),
    "moe_intermediate_size": fields.whole("intermediate_size"),  # of each expert; there are no dense layers
    "moe_layers": (True,) * fields.whole("num_hidden_layers"),
    "norm_topk_prob": bool(raw.get("norm_topk_prob", False)),
    "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
    "qk_norm": "projection",
    "clip_qkv": None if clip is None else fields.number("clip_qkv", 0.0),
  }


def _write_olmoe(config: "ModelConfig") -> dict[str, Any]:
  return {"intermediate_size": config.moe_intermediate_size, "clip_qkv": config.clip_qkv}


ARCHITECTURES: dict[str, Architecture] = {
  "qwen3_moe": Architecture("Qwen3Moe", ("num_experts", "num_local_experts"), _read_qwen3_moe, _write_qwen3_moe),
  "glm4_moe_lite": Architecture(
    "Glm4MoeLite", ("n_routed_experts", "num_local_experts"), _read_glm4_moe_lite, _write_glm4_moe_lite
  ),
  "olmoe": Architecture("Olmoe", ("num_experts", "num_local_experts"), _read_olmoe, _write_olmoe),
}
