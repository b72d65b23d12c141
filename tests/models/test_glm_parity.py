"""GLM-4.7-Flash against stock transformers, which is the truth for every option of the architecture."""

import json

import numpy as np
import pytest
import torch
from transformers import Glm4MoeLiteForCausalLM

from tests.tiny_models import forward, hf_logits, hf_model, layer_of, random_tokens, to_old_dialect
from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.models.decoder import inject

ATOL = 2e-4
TOKENS = random_tokens((2, 40))
DENSE, SPARSE = "dense", "sparse"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

OPTIONS = {
  "plain": {},
  "direct queries, two shared experts, no dense layer": {
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "mlp_layer_types": [SPARSE],
    "num_hidden_layers": 1,
  },
  "two dense layers, three picks, not normalised": {
    "mlp_layer_types": [DENSE, DENSE, SPARSE, SPARSE],
    "num_hidden_layers": 4,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
  },
  "attention bias, tied, another scale": {
    "attention_bias": True,
    "tie_word_embeddings": True,
    "routed_scaling_factor": 0.7,
    "rms_norm_eps": 1e-3,
  },
  "groups": {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 3, "mlp_layer_types": [SPARSE, SPARSE]},
  "halves rotated, yarn, direct queries with bias": {
    "rope_interleave": False,
    "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "q_lora_rank": None,
    "attention_bias": True,
  },
}


def glm(**options):
  return hf_model(model_type="glm4_moe_lite", **options)


@pytest.mark.parametrize("dialect", ["transformers 5", "transformers 4"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_equal_those_of_transformers(saved, options, dialect):
  stock = glm(**options)
  path = saved(stock)
  if dialect == "transformers 4":
    to_old_dialect(path)
    raw = json.loads((path / "config.json").read_text())
    assert "mlp_layer_types" not in raw and "rope_parameters" not in raw
    assert raw["first_k_dense_replace"] == stock.config.mlp_layer_types.count(DENSE)
  expected = hf_logits(stock, TOKENS)
  assert expected.std() > 0.5  # the tolerance means something
  np.testing.assert_allclose(forward(load_hf(path), TOKENS).logits, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("options", [{}, OPTIONS["groups"]], ids=["bias", "groups"])
def test_the_correction_bias_and_the_groups_decide_picks_and_no_weights(saved, options):
  """Pick by pick against transformers' router, and that it would have picked otherwise without them."""
  stock = glm(**options)
  layer = stock.model.layers[-1].mlp.gate
  model = load_hf(saved(stock))
  x = np.random.default_rng(0).standard_normal((200, 32)).astype(np.float32)
  with torch.no_grad():
    logits, weights, picks = layer(torch.tensor(x))
  found = layer_of(model.runs[-1].mlp.router, -1)(x)
  order, ours = np.argsort(picks.numpy(), axis=1), np.argsort(found.picks, axis=1)
  np.testing.assert_array_equal(np.take_along_axis(np.asarray(found.picks), ours, 1), np.sort(picks.numpy(), axis=1))
  np.testing.assert_allclose(
    np.take_along_axis(np.asarray(found.weights), ours, 1), np.take_along_axis(weights.numpy(), order, 1), rtol=1e-5
  )
  scores = torch.sigmoid(logits).numpy()
  np.testing.assert_allclose(found.scores, scores / scores.sum(axis=1, keepdims=True), rtol=1e-5)
  unbiased = np.sort(np.argsort(-scores, axis=1)[:, : picks.shape[1]], axis=1)
  assert (unbiased != np.sort(picks.numpy(), axis=1)).any(axis=1).mean() > 0.1


def test_bf16_and_sharded_on_disk_and_the_correction_bias_stays_float32(saved):
  path = saved(glm(dtype="bfloat16", num_experts_per_tok=6), shard="20KB")  # all picked, so that none can flip
  assert len(list(path.glob("*.safetensors"))) > 3
  wide, narrow = (Glm4MoeLiteForCausalLM.from_pretrained(path, dtype=dtype) for dtype in ("float32", "bfloat16"))
  exact = hf_logits(wide, TOKENS)
  np.testing.assert_allclose(forward(load_hf(path, dtype="float32"), TOKENS).logits, exact, rtol=0, atol=ATOL)
  model = load_hf(path)
  assert model.config.dtype == "bfloat16"
  assert model.runs[1].mlp.router.weight.dtype == "bfloat16"
  assert model.runs[1].mlp.router.correction_bias.dtype == "float32"
  ours = np.abs(np.asarray(forward(model, TOKENS).logits) - exact).mean()
  theirs = np.abs(hf_logits(narrow, TOKENS) - exact).mean()
  assert 0 < ours < 1.25 * theirs


DYNAMIC = {
  "half": {},
  "direct queries, two shared experts, not normalised": {
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "mlp_layer_types": [SPARSE, SPARSE],
  },
}


@pytest.mark.parametrize("options", DYNAMIC.values(), ids=DYNAMIC)
def test_dynamic_logits_equal_the_plain_export_in_transformers(saved, tmp_path, options):
  model = inject(load_hf(saved(glm(**options))), seed=1)
  save_hf(model, tmp_path / "dynamic")
  again = load_hf(tmp_path / "dynamic")
  assert again.config.num_zero_experts == 3
  save_hf(again, tmp_path / "plain", format="plain")
  stock, info = Glm4MoeLiteForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
  assert stock.config.n_routed_experts == 9
  out, out_again = forward(model, TOKENS), forward(again, TOKENS)
  assert 0.1 < float((out.picks >= 6).mean()) < 0.9
  np.testing.assert_array_equal(out.logits, out_again.logits)
  np.testing.assert_allclose(out_again.logits, hf_logits(stock, TOKENS), rtol=0, atol=ATOL)
