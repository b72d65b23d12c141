"""Generation against transformers' generate and against full forward passes without a cache."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from tests.tiny_models import forward, hf_model, tiny_model
from zeda_jax.checkpoint.huggingface import load_hf
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import inject
from zeda_jax.rollout.generate import generate

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 64, length).tolist() for length in (5, 16, 1, 17, 30, 9)]
NEW = 20


@pytest.fixture(scope="module")
def stock_and_ours(tmp_path_factory):
  stock = hf_model(mlp_only_layers=[1], num_hidden_layers=3)
  path = tmp_path_factory.mktemp("stock")
  stock.save_pretrained(path)
  return stock, load_hf(path)


def hf_generate(stock, prompt, eos):
  """Greedy response of transformers, to one prompt, EOS included."""
  inputs = torch.tensor([prompt])
  with torch.no_grad():
    out = stock.generate(
      inputs,
      attention_mask=torch.ones_like(inputs),
      max_new_tokens=NEW,
      do_sample=False,
      eos_token_id=eos,
      pad_token_id=0,
    )
  return out[0, len(prompt) :].tolist()


def test_greedy_equals_transformers_token_by_token(stock_and_ours):
  stock, ours = stock_and_ours
  expected = [hf_generate(stock, prompt, None) for prompt in PROMPTS]
  found = generate(ours, PROMPTS, NEW, temperature=0.0, batch_size=6)
  assert [s.tokens for s in found] == expected
  assert all(len(tokens) == NEW for tokens in expected)
  assert not any(s.finished for s in found)
  assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


def test_greedy_stops_at_eos_as_transformers_does(stock_and_ours):
  stock, ours = stock_and_ours
  # Tokens that the responses hold at different places; some prompts end, some don't.
  free = [s.tokens for s in generate(ours, PROMPTS, NEW, temperature=0.0, batch_size=6)]
  eos = [free[0][3], free[1][10]]
  expected = [hf_generate(stock, prompt, eos) for prompt in PROMPTS]
  found = generate(ours, PROMPTS, NEW, temperature=0.0, batch_size=6, eos_id=eos)
  assert [s.tokens for s in found] == expected
  for s in found:
    assert s.finished == (s.tokens[-1] in eos)
    assert len(s.tokens) == len(s.logprobs)
    assert not set(s.tokens[:-1]) & set(eos)
  assert len({len(s.tokens) for s in found}) > 1


def test_greedy_through_the_latent_cache_equals_transformers_token_by_token(glm):
  stock, ours = glm
  expected = [hf_generate(stock, prompt, None) for prompt in PROMPTS]
  found = generate(ours, PROMPTS, NEW, temperature=0.0, batch_size=len(PROMPTS))
  assert [s.tokens for s in found] == expected
  assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
  stock = hf_model(model_type="glm4_moe_lite")
  path = tmp_path_factory.mktemp("glm")
  stock.save_pretrained(path)
  return stock, load_hf(path)


@pytest.fixture(scope="module")
def model():
  return inject(tiny_model(moe_layers=(True, False, True)), 3)


@pytest.fixture(scope="module")
def sampled(model):
  return generate(model, PROMPTS, NEW, seed=1, eos_id=7, batch_size=6)


def test_what_was_measured_equals_a_full_forward_pass(model, sampled):
  assert {s.finished for s in sampled} == {True, False}
  rows = np.zeros((len(PROMPTS), 64), np.int32)
  for row, prompt, s in zip(rows, PROMPTS, sampled, strict=True):
    row[: len(prompt) + len(s.tokens)] = prompt + s.tokens
  out = forward(model, rows)
  logprobs = np.asarray(jax.nn.log_softmax(out.logits, axis=-1))
  zero = (np.asarray(out.picks) >= 6).mean(axis=(0, 3))
  for i, (prompt, s) in enumerate(zip(PROMPTS, sampled, strict=True)):
    predicting = np.arange(len(prompt) - 1, len(prompt) + len(s.tokens) - 1)
    np.testing.assert_allclose(s.logprobs, logprobs[i, predicting, s.tokens], rtol=0, atol=1e-4)
    assert s.zero_ratio == pytest.approx(zero[i, predicting].mean(), abs=1e-6)
    assert s.zero_ratio_all == pytest.approx(zero[i, : predicting[-1] + 1].mean(), abs=1e-6)
  assert len({s.zero_ratio for s in sampled}) > 1


def test_a_prompt_samples_the_same_in_any_company(model, sampled):
  alone = generate(model, PROMPTS[3:4], NEW, seed=1, eos_id=7, batch_size=6, stream_ids=[3])
  assert alone[0].tokens == sampled[3].tokens
  order = [4, 3, 0]
  others = generate(model, [PROMPTS[i] for i in order], NEW, seed=1, eos_id=7, batch_size=6, stream_ids=order)
  assert [s.tokens for s in others] == [sampled[i].tokens for i in order]
  small = generate(model, PROMPTS, NEW, seed=1, eos_id=7, batch_size=4)
  assert [s.tokens for s in small] == [s.tokens for s in sampled]


def test_streams_and_seeds_differ(model, sampled):
  same_prompt = generate(model, [PROMPTS[0]] * 6, NEW, seed=1, eos_id=7, batch_size=6)
  assert len({tuple(s.tokens) for s in same_prompt}) == 6
  assert same_prompt[0].tokens == sampled[0].tokens
  other_seed = generate(model, PROMPTS, NEW, seed=2, eos_id=7, batch_size=6)
  assert all(a.tokens != b.tokens for a, b in zip(sampled, other_seed, strict=True))


def test_the_bias_reaches_every_pass(model):
  # -inf: the static teacher; large: no expert at all.
  static = generate(model, PROMPTS[:2], NEW, seed=1, eos_id=7, batch_size=6, zero_expert_bias=-np.inf)
  nothing = generate(model, PROMPTS[:2], NEW, seed=1, eos_id=7, batch_size=6, zero_expert_bias=1e4)
  assert all(s.zero_ratio == s.zero_ratio_all == 0 for s in static)
  assert all(s.zero_ratio == s.zero_ratio_all == 1 for s in nothing)


def test_the_checkpoints_own_eos_is_the_default(model, sampled):
  graph_model = inject(tiny_model(moe_layers=(True, False, True)), 3)
  graph_model.config = dataclasses.replace(graph_model.config, eos_token_ids=(7,))
  assert [s.tokens for s in generate(graph_model, PROMPTS, NEW, seed=1, batch_size=6)] == [s.tokens for s in sampled]


def test_no_prompts(model):
  assert generate(model, [], NEW) == []


BAD = {
  "empty prompt": (([[1], []], 4), {}, "Prompt 1 has no tokens"),
  "too long": (([[1], [1] * 120], 9), {}, "Prompt 1 has 120 tokens; with max_new_tokens 9 .* context of 128"),
  "no new tokens": (([[1]], 0), {}, "max_new_tokens is 0; expected at least 1"),
  "temperature": (([[1]], 4), {"temperature": -1.0}, "temperature is -1.0"),
  "top_p": (([[1]], 4), {"top_p": 0.0}, "top_p is 0.0"),
  "token outside the vocabulary": (([[1], [3, 64]], 4), {}, "Prompt 1 .*64.* vocabulary"),
  "negative token": (([[1, -1]], 4), {}, "Prompt 0 .*-1.* vocabulary"),
}


@pytest.mark.parametrize(("arguments", "options", "words"), BAD.values(), ids=BAD)
def test_bad_input(model, arguments, options, words):
  with pytest.raises(ZedaError, match=words) as caught:
    generate(model, *arguments, **options)
  assert "\n" not in str(caught.value)


def test_a_prompt_may_fill_the_context(model):
  (only,) = generate(model, [[1] * 108], NEW, temperature=0.0, eos_id=(), batch_size=1)
  assert len(only.tokens) == NEW
