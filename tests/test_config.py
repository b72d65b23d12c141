"""config.json in, config.json out; what is not implemented is refused in one sentence that names the field."""

import json

import pytest

from tests.tiny_models import GLM_4_7_FLASH
from zeda_jax.config import LayerRun, MLAConfig, ModelConfig, RopeConfig, from_hf, read_config, to_hf
from zeda_jax.errors import ZedaError

OLD = {  # as transformers 4 wrote Qwen3-30B-A3B
  "architectures": ["Qwen3MoeForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "decoder_sparse_step": 1,
  "eos_token_id": 151645,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "initializer_range": 0.02,
  "intermediate_size": 6144,
  "max_position_embeddings": 40960,
  "max_window_layers": 48,
  "mlp_only_layers": [],
  "model_type": "qwen3_moe",
  "moe_intermediate_size": 768,
  "norm_topk_prob": True,
  "num_attention_heads": 32,
  "num_experts": 128,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 48,
  "num_key_value_heads": 4,
  "output_router_logits": False,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 1000000.0,
  "router_aux_loss_coef": 0.001,
  "sliding_window": None,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.51.0",
  "use_cache": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
}
GLM = {  # the published GLM-4.7-Flash
  "architectures": ["Glm4MoeLiteForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "dtype": "bfloat16",
  "eos_token_id": [154820, 154827, 154829],
  "first_k_dense_replace": 1,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "intermediate_size": 10240,
  "kv_lora_rank": 512,
  "max_position_embeddings": 202752,
  "model_type": "glm4_moe_lite",
  "moe_intermediate_size": 1536,
  "n_group": 1,
  "n_routed_experts": 64,
  "n_shared_experts": 1,
  "norm_topk_prob": True,
  "num_attention_heads": 20,
  "num_experts_per_tok": 4,
  "num_hidden_layers": 47,
  "num_key_value_heads": 20,
  "num_nextn_predict_layers": 1,
  "pad_token_id": 154820,
  "partial_rotary_factor": 1.0,
  "q_lora_rank": 768,
  "qk_nope_head_dim": 192,
  "qk_rope_head_dim": 64,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "routed_scaling_factor": 1.8,
  "tie_word_embeddings": False,
  "topk_group": 1,
  "topk_method": "noaux_tc",
  "v_head_dim": 256,
  "vocab_size": 154880,
}
OLMOE = {  # OLMoE-1B-7B-0924
  "architectures": ["OlmoeForCausalLM"],
  "attention_bias": False,
  "clip_qkv": None,
  "eos_token_id": 50279,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "intermediate_size": 1024,
  "max_position_embeddings": 4096,
  "model_type": "olmoe",
  "norm_topk_prob": False,
  "num_attention_heads": 16,
  "num_experts": 64,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 16,
  "num_key_value_heads": 16,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "rope_theta": 10000.0,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "vocab_size": 50304,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


def new_dialect(old: dict) -> dict:
  new = {k: v for k, v in old.items() if k not in ("num_experts", "rope_theta", "rope_scaling", "torch_dtype")}
  rope = dict(old["rope_scaling"] or {"rope_type": "default"}) | {"rope_theta": old["rope_theta"]}
  return new | {"num_local_experts": old["num_experts"], "rope_parameters": rope, "dtype": old["torch_dtype"]}


def without(*names: str) -> dict:
  return {key: value for key, value in OLD.items() if key not in names}


def test_qwen3_30b_a3b():
  config = from_hf(OLD)
  assert config == ModelConfig(
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
    rope=RopeConfig(theta=1e6),
    max_position_embeddings=40960,
    dtype="bfloat16",
  )
  assert config.layer_runs == (LayerRun(True, 0, 48),)
  assert (config.num_layers, config.is_dynamic) == (48, False)


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN | {"rope_type": "yarn"}}, {"num_experts": 64}])
def test_both_dialects_mean_the_same(changes):
  assert from_hf(new_dialect(OLD | changes)) == from_hf(OLD | changes)


def test_yarn_in_every_spelling():
  expected = RopeConfig(theta=1e6, type="yarn", factor=4.0, original_max_position_embeddings=32768)
  assert from_hf(OLD | {"rope_scaling": YARN | {"rope_type": "yarn"}}).rope == expected
  assert from_hf(OLD | {"rope_scaling": YARN | {"type": "yarn"}}).rope == expected
  # Added by hand, as the model card says, to a file of the new dialect.
  by_hand = new_dialect(OLD) | {"rope_scaling": YARN | {"type": "yarn"}}
  assert from_hf(by_hand).rope == expected
  every = {"beta_fast": 16, "beta_slow": 2, "attention_factor": 0.5, "mscale": 1.0, "mscale_all_dim": 0.5}
  rope = from_hf(OLD | {"rope_scaling": YARN | {"rope_type": "yarn", "truncate": False} | every}).rope
  assert rope == RopeConfig(1e6, "yarn", 4.0, 32768, 16.0, 2.0, 0.5, 1.0, 0.5, False)


def test_the_factor_may_follow_from_the_lengths():
  rope = from_hf(OLD | {"max_position_embeddings": 65536, "rope_scaling": YARN | {"type": "yarn", "factor": None}}).rope
  assert rope.factor == 2.0


def test_defaults_are_those_of_transformers():
  config = from_hf(without("norm_topk_prob", "head_dim", "rope_theta", "decoder_sparse_step", "mlp_only_layers"))
  assert config.norm_topk_prob is False
  assert config.head_dim == 2048 // 32
  assert config.rope == RopeConfig(theta=10000.0)
  assert config.moe_layers == (True,) * 48
  assert from_hf(without("torch_dtype")).dtype == "float32"


def test_dense_layers():
  config = from_hf(OLD | {"num_hidden_layers": 7, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
  assert config.moe_layers == (False, True, False, False, False, True, False)
  assert config.layer_runs == (
    LayerRun(False, 0, 1),
    LayerRun(True, 1, 1),
    LayerRun(False, 2, 3),
    LayerRun(True, 5, 1),
    LayerRun(False, 6, 1),
  )


# --- GLM-4.7-Flash, OLMoE -----------------------------------------------------------------------------------------


def test_glm_4_7_flash():
  config = from_hf(GLM)
  assert config == GLM_4_7_FLASH
  assert config.layer_runs == (LayerRun(False, 0, 1), LayerRun(True, 1, 46))
  assert (config.rope_dim, config.mla.rope_interleave) == (64, True)


def glm_without(*names: str) -> dict:
  return {key: value for key, value in GLM.items() if key not in names}


def test_a_glm_of_transformers_5_means_the_same():
  new = glm_without("first_k_dense_replace", "rope_theta", "rope_scaling", "partial_rotary_factor", "topk_method")
  rope = {"rope_theta": 1000000, "rope_type": "default", "partial_rotary_factor": 1.0}
  new |= {"mlp_layer_types": ["dense"] + ["sparse"] * 46, "rope_parameters": rope, "rope_interleave": True}
  assert from_hf(new) == from_hf(GLM)


def test_dense_layers_of_a_glm():
  layers = lambda **changes: from_hf(GLM | {"num_hidden_layers": 3} | changes).moe_layers
  assert layers(first_k_dense_replace=0) == (True, True, True)
  assert layers(first_k_dense_replace=2) == (False, False, True)
  # What transformers 5 saves holds both, and it reads the types.
  assert layers(first_k_dense_replace=2, mlp_layer_types=["dense", "sparse", "sparse"]) == (False, True, True)
  assert from_hf(glm_without("first_k_dense_replace")).moe_layers == (False,) + (True,) * 46  # transformers' default


def test_defaults_of_a_glm_are_those_of_transformers():
  names = ("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "n_shared_experts", "rms_norm_eps")
  assert from_hf(glm_without(*names, "first_k_dense_replace")) == from_hf(GLM)
  assert from_hf(glm_without("q_lora_rank")).mla == MLAConfig(512, 192, 64, 256, None)


def test_olmoe():
  config = from_hf(OLMOE)
  assert (config.num_experts, config.moe_intermediate_size, config.moe_layers) == (64, 1024, (True,) * 16)
  assert (config.scoring, config.norm_topk_prob, config.qk_norm) == ("softmax", False, "projection")
  assert config.clip_qkv is None
  assert (config.head_dim, config.num_kv_heads, config.rms_norm_eps) == (128, 16, 1e-5)
  assert from_hf(OLMOE | {"num_key_value_heads": None}) == config
  assert from_hf(OLMOE | {"clip_qkv": 8}).clip_qkv == 8.0


@pytest.mark.parametrize("raw", [GLM, OLMOE], ids=["glm", "olmoe"])
def test_other_architectures_come_out_as_they_went_in(raw):
  assert to_hf(from_hf(raw)) == raw
  key = "n_routed_experts" if raw is GLM else "num_experts"
  config = from_hf(raw).replace(num_zero_experts=32)
  dynamic = to_hf(config)
  assert dynamic["model_type"] == raw["model_type"] + "_plus_plus"
  assert dynamic["architectures"] == [raw["architectures"][0].replace("ForCausalLM", "PlusPlusForCausalLM")]
  assert (dynamic[key], dynamic["zce_nums"]) == (64, [32])
  assert from_hf(dynamic) == config
  assert to_hf(config, format="plain") == raw | {key: 96}
  bare = config.replace(hf_config={})
  assert from_hf(to_hf(bare)) == config


def test_groups_have_no_plain_format():
  grouped = from_hf(GLM | {"n_group": 8, "topk_group": 4})
  assert (grouped.num_groups, grouped.top_groups) == (8, 4)
  assert to_hf(grouped, format="plain")["n_group"] == 8  # static: nothing to say
  with pytest.raises(ZedaError, match=r"picks from 4 of 8 groups of experts \(n_group\)"):
    to_hf(grouped.replace(num_zero_experts=32), format="plain")


# --- to_hf --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [OLD, new_dialect(OLD)], ids=["transformers 4", "transformers 5"])
def test_a_static_config_comes_out_as_it_went_in(raw):
  assert to_hf(from_hf(raw)) == raw
  assert to_hf(from_hf(raw), format="plain") == raw


@pytest.mark.parametrize("raw", [OLD, new_dialect(OLD)], ids=["transformers 4", "transformers 5"])
def test_dynamic_and_plain_formats(raw):
  config = from_hf(raw).replace(num_zero_experts=64)
  key = "num_experts" if raw is OLD else "num_local_experts"
  dynamic = to_hf(config)
  assert dynamic == raw | {
    "model_type": "qwen3_moe_plus_plus",
    "architectures": ["Qwen3MoePlusPlusForCausalLM"],
    "zce_nums": [64],
    "zce_types": ["zero"],
    "use_zce_mask": False,
  }
  assert from_hf(dynamic) == config
  assert to_hf(from_hf(dynamic)) == dynamic
  assert to_hf(from_hf(dynamic), format="plain") == raw | {key: 192}


def test_baselines_say_what_they_are():
  config = from_hf(OLD).replace(num_zero_experts=64, zero_expert_type="copy", renormalize=True)
  dynamic = to_hf(config)
  assert (dynamic["zce_types"], dynamic["zce_renormalize"]) == (["copy"], True)
  assert from_hf(dynamic) == config
  for changes in ({"zero_expert_type": "zero"}, {"renormalize": False}):
    with pytest.raises(ZedaError, match="which a static checkpoint cannot say"):
      to_hf(config.replace(**changes), format="plain")
  with pytest.raises(ZedaError, match="zero_expert_type is 'constant'; expected one of 'zero', 'copy'"):
    config.replace(zero_expert_type="constant")


def test_a_config_without_a_source_is_written_from_its_fields():
  config = from_hf(
    OLD | {"mlp_only_layers": [0], "attention_bias": True, "rope_scaling": YARN | {"rope_type": "yarn", "mscale": 0.5}}
  ).replace(num_zero_experts=4, hf_config={})
  assert from_hf(to_hf(config)) == config
  assert from_hf(to_hf(config, format="plain")) == config.replace(num_zero_experts=0, num_experts=132)


def test_picks_per_token_follow_the_model():
  assert to_hf(from_hf(OLD).replace(num_experts_per_tok=4))["num_experts_per_tok"] == 4


def test_an_unknown_format():
  with pytest.raises(ZedaError, match="format is 'gguf'; expected 'dynamic' or 'plain'"):
    to_hf(from_hf(OLD), format="gguf")


# --- bad input ----------------------------------------------------------------------------------------------------

DYNAMIC = OLD | {"model_type": "qwen3_moe_plus_plus", "zce_nums": [64], "zce_types": ["zero"]}

BAD = {
  "another model": (OLD | {"model_type": "llama"}, "model_type is 'llama'; supported are qwen3_moe, qwen3_moe_plus"),
  "no model type": (without("model_type"), "model_type is None"),
  "no experts": (without("num_experts"), "num_experts or num_local_experts is missing"),
  "fractional experts": (OLD | {"num_experts": 12.5}, "num_experts is 12.5; expected a whole number"),
  "true experts": (OLD | {"num_experts": True}, "num_experts is True; expected a whole number"),
  "no layers": (OLD | {"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number of at least 1"),
  "too many picks": (OLD | {"num_experts_per_tok": 129}, "num_experts_per_tok is 129, more than the 128 experts"),
  "heads": (OLD | {"num_key_value_heads": 5}, r"num_attention_heads \(32\) is not a multiple of num_key_value"),
  "activation": (OLD | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu"),
  "window": (OLD | {"use_sliding_window": True, "sliding_window": 4096}, "sliding-window attention is not supported"),
  "rope type": (OLD | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear'; supported are"),
  "dtype": (OLD | {"torch_dtype": "int8"}, "dtype is 'int8'"),
  "sparse step": (OLD | {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; expected a whole number"),
  "only dense layers": (OLD | {"mlp_only_layers": list(range(48))}, "leave no MoE layer"),
  "zero experts in a static model": (OLD | {"zce_nums": [64]}, r"zce_nums is \[64\] but model_type names a static"),
  "constant experts": (DYNAMIC | {"zce_types": ["constant"]}, r"zce_types is \['constant'\]; supported are"),
  "no zero experts": (DYNAMIC | {"zce_nums": [0]}, r"zce_nums is \[0\]; expected a list of one positive"),
  "glm without experts": (glm_without("n_routed_experts"), "n_routed_experts or num_local_experts is missing"),
  "glm without latents": (glm_without("kv_lora_rank"), "kv_lora_rank is missing; it is needed to read a glm4_moe_lite"),
  "glm rank": (GLM | {"q_lora_rank": 0}, "q_lora_rank is 0; expected a whole number of at least 1"),
  "glm key heads": (GLM | {"num_key_value_heads": 4}, "num_key_value_heads is 4, but latent attention has as many"),
  "glm odd rotation": (GLM | {"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; expected an even number"),
  "glm partial rotation": (GLM | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0 is"),
  "glm other router": (GLM | {"topk_method": "greedy"}, "topk_method is 'greedy'; only noaux_tc is supported"),
  "glm other scores": (GLM | {"scoring_func": "softmax"}, "scoring_func is 'softmax'; only sigmoid is supported"),
  "glm scale": (GLM | {"routed_scaling_factor": "1.8"}, "routed_scaling_factor is '1.8'; expected a number"),
  "glm unequal groups": (GLM | {"n_group": 7}, "n_group is 7; expected to split the 64 experts into equal groups"),
  "glm groups of one": (GLM | {"n_group": 64}, "n_group is 64; expected to split .* of at least 2"),
  "glm too many groups": (GLM | {"n_group": 4, "topk_group": 5}, "topk_group is 5, more than the 4 groups"),
  "glm small groups": (GLM | {"n_group": 32}, "topk_group is 1: so many groups hold 2 experts, fewer than the 4"),
  "glm layer types": (GLM | {"mlp_layer_types": ["dense"]}, "mlp_layer_types is .*expected 47 times 'dense' or"),
  "glm dense": (GLM | {"first_k_dense_replace": 47}, "mlp_layer_types or first_k_dense_replace leave no MoE layer"),
  "glm shared": (GLM | {"n_shared_experts": 0}, "n_shared_experts is 0; expected a whole number of at least 1"),
  "olmoe clip": (OLMOE | {"clip_qkv": True}, "clip_qkv is True; expected a number"),
  "two kinds": (DYNAMIC | {"zce_nums": [3, 4]}, r"zce_nums is \[3, 4\]; expected a list of one positive"),
}


@pytest.mark.parametrize(("raw", "words"), BAD.values(), ids=BAD)
def test_bad_configs_are_refused_in_one_sentence(raw, words):
  with pytest.raises(ZedaError, match=words) as caught:
    from_hf(raw, where="some/config.json")
  assert str(caught.value).startswith("some/config.json: ")
  assert "\n" not in str(caught.value)


def test_a_sliding_window_that_is_off_is_fine():
  assert from_hf(OLD | {"use_sliding_window": False, "sliding_window": 4096}) == from_hf(OLD)


# --- read_config --------------------------------------------------------------------------------------------------


def test_reading_a_directory(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(OLD))
  config = read_config(tmp_path)
  assert config == from_hf(OLD)
  assert config.eos_token_ids == (151645,)
  assert config.source == str(tmp_path.resolve())
  (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
  assert read_config(str(tmp_path)).eos_token_ids == (151645, 151643)
  (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
  assert read_config(tmp_path).eos_token_ids == (151645,)
  (tmp_path / "generation_config.json").unlink()
  (tmp_path / "config.json").write_text(json.dumps(OLD | {"eos_token_id": None}))
  assert read_config(tmp_path).eos_token_ids == ()


def test_unreadable_files(tmp_path):
  with pytest.raises(ZedaError, match=r"config.json does not exist"):
    read_config(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ZedaError, match=r"config.json is not valid JSON"):
    read_config(tmp_path)
  (tmp_path / "config.json").write_text("[]")
  with pytest.raises(ZedaError, match=r"config.json holds a list; expected a JSON object"):
    read_config(tmp_path)


def test_a_config_is_hashable_and_knows_its_identity():
  config = from_hf(OLD)
  assert len({config, from_hf(new_dialect(OLD)), config.replace(num_zero_experts=1)}) == 2
