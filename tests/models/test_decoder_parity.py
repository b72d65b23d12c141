"""The decoder against stock transformers, which is the truth for every option of the architecture."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import Qwen3MoeForCausalLM

from tests.tiny_models import forward, hf_logits, hf_model, random_tokens, to_old_dialect
from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.models.decoder import inject

ATOL = 2e-4
TOKENS = random_tokens((2, 40))
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

OPTIONS = {
  "plain": {},
  "dense layer in the middle": {"mlp_only_layers": [1], "num_hidden_layers": 3},
  "every other layer dense": {"decoder_sparse_step": 2},
  "both kinds of dense": {"decoder_sparse_step": 2, "mlp_only_layers": [1], "num_hidden_layers": 4},
  "tied": {"tie_word_embeddings": True, "num_hidden_layers": 1},
  "attention bias": {"attention_bias": True},
  "head_dim is not hidden / heads": {"head_dim": 12, "num_attention_heads": 6, "num_key_value_heads": 2},
  "weights not normalised": {"norm_topk_prob": False, "num_experts_per_tok": 3},
  "one expert, one head per key": {"num_experts_per_tok": 1, "num_key_value_heads": 4, "num_hidden_layers": 1},
  "another eps and theta": {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
  "yarn": {"rope_parameters": YARN},
  "yarn, mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}, "num_hidden_layers": 1},
}


@pytest.mark.parametrize("dialect", ["transformers 5", "transformers 4"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_equal_those_of_transformers(saved, options, dialect):
  stock = hf_model(**options)
  path = saved(stock)
  if dialect == "transformers 4":
    to_old_dialect(path)
    assert "rope_parameters" not in json.loads((path / "config.json").read_text())
  expected = hf_logits(stock, TOKENS)
  assert expected.std() > 0.5  # the tolerance means something
  np.testing.assert_allclose(forward(load_hf(path), TOKENS).logits, expected, rtol=0, atol=ATOL)


def test_tensors_may_lie_in_any_shard(saved):
  """Gate, up and down of one expert, and the experts of one layer, in files drawn by lot."""
  stock = hf_model(num_hidden_layers=1)
  path = saved(stock)
  tensors = load_file(path / "model.safetensors")
  (path / "model.safetensors").unlink()
  lot = np.random.default_rng(0).permutation(np.arange(len(tensors)) % 4)
  weight_map = {name: f"model-0000{1 + shard}-of-00004.safetensors" for name, shard in zip(tensors, lot, strict=True)}
  for file in set(weight_map.values()):
    save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, path / file, {"format": "pt"})
  index = {"metadata": {}, "weight_map": weight_map}
  (path / "model.safetensors.index.json").write_text(json.dumps(index))
  np.testing.assert_allclose(forward(load_hf(path), TOKENS).logits, hf_logits(stock, TOKENS), rtol=0, atol=ATOL)


def test_bf16_weights_are_read_exactly_and_bf16_activations_stay_near_fp32(saved):
  path = saved(hf_model(dtype="bfloat16", attention_bias=True, num_experts_per_tok=6))  # all picked, so none can flip
  wide, narrow = (Qwen3MoeForCausalLM.from_pretrained(path, dtype=dtype) for dtype in ("float32", "bfloat16"))
  exact = hf_logits(wide, TOKENS)
  np.testing.assert_allclose(forward(load_hf(path, dtype="float32"), TOKENS).logits, exact, rtol=0, atol=ATOL)
  model = load_hf(path)
  assert model.config.dtype == "bfloat16"
  ours = np.abs(np.asarray(forward(model, TOKENS).logits) - exact).mean()
  theirs = np.abs(hf_logits(narrow, TOKENS) - exact).mean()
  assert 0 < ours < 1.25 * theirs


def test_long_positions_and_given_positions(saved):
  stock = hf_model(rope_parameters=YARN)
  tokens = random_tokens((1, 128), seed=3)
  model = load_hf(saved(stock))
  expected = hf_logits(stock, tokens)
  np.testing.assert_allclose(forward(model, tokens).logits, expected, rtol=0, atol=ATOL)
  # Only differences of positions matter.
  shifted = forward(model, tokens, positions=jnp.arange(128)[None] + 1000)
  np.testing.assert_allclose(shifted.logits, expected, rtol=0, atol=1e-3)


DYNAMIC = {
  "half": {},
  "dense layers": {"mlp_only_layers": [0], "num_hidden_layers": 3},
  "three picks, not normalised": {"norm_topk_prob": False, "num_experts_per_tok": 3},
  "bias and tied": {"attention_bias": True, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("options", DYNAMIC.values(), ids=DYNAMIC)
def test_dynamic_logits_equal_the_plain_export_in_transformers(saved, tmp_path, options):
  model = inject(load_hf(saved(hf_model(**options))), seed=1)
  save_hf(model, tmp_path / "dynamic")
  again = load_hf(tmp_path / "dynamic")
  assert again.config.num_zero_experts == 3
  save_hf(again, tmp_path / "plain", format="plain")
  stock, info = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
  assert stock.config.num_experts == 9
  out, out_again = forward(model, TOKENS), forward(again, TOKENS)
  assert 0.1 < float((out.picks >= 6).mean()) < 0.9
  np.testing.assert_array_equal(out.logits, out_again.logits)
  np.testing.assert_allclose(out_again.logits, hf_logits(stock, TOKENS), rtol=0, atol=ATOL)
