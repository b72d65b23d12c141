"""OLMoE, the architecture added by README's "Add an architecture", against stock transformers."""

import numpy as np
import pytest
from transformers import OlmoeForCausalLM

from tests.tiny_models import forward, hf_logits, hf_model, random_tokens, to_old_dialect
from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.models.decoder import inject

ATOL = 2e-4
TOKENS = random_tokens((2, 40))
OPTIONS = {
  "plain": {},
  "normalised, clipped, attention bias": {"norm_topk_prob": True, "clip_qkv": 0.7, "attention_bias": True},
  "a key per query head": {"num_key_value_heads": None, "num_experts_per_tok": 3, "num_hidden_layers": 1},
}


@pytest.mark.parametrize("dialect", ["transformers 5", "transformers 4"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_equal_those_of_transformers(saved, options, dialect):
  stock = hf_model(model_type="olmoe", **options)
  path = saved(stock)
  if dialect == "transformers 4":
    to_old_dialect(path)
  expected = hf_logits(stock, TOKENS)
  assert expected.std() > 0.5
  np.testing.assert_allclose(forward(load_hf(path), TOKENS).logits, expected, rtol=0, atol=ATOL)


def test_dynamic_logits_equal_the_plain_export_in_transformers(saved, tmp_path):
  model = inject(load_hf(saved(hf_model(model_type="olmoe"))), seed=1)
  save_hf(model, tmp_path / "dynamic")
  again = load_hf(tmp_path / "dynamic")
  assert (again.config.model_type, again.config.num_zero_experts) == ("olmoe", 3)
  save_hf(again, tmp_path / "plain", format="plain")
  stock, info = OlmoeForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
  out = forward(again, TOKENS)
  assert 0.1 < float((out.picks >= 6).mean()) < 0.9
  np.testing.assert_allclose(out.logits, hf_logits(stock, TOKENS), rtol=0, atol=ATOL)
  static = forward(load_hf(saved(hf_model(model_type="olmoe"))), TOKENS)
  np.testing.assert_array_equal(forward(again, TOKENS, zero_expert_bias=-np.inf).logits, static.logits)
