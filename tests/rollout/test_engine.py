"""The engine against transformers' generate and full forward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.rollout.reference import sample_plainly
from tests.rollout.test_sampling import plain_distribution
from tests.tiny_models import forward, hf_model, tiny_model
from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import inject
from zeda_jax.models.params import split_model
from zeda_jax.rollout import decoding
from zeda_jax.rollout.engine import Engine
from zeda_jax.rollout.requests import Request

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 64, length).tolist() for length in (5, 16, 1, 17, 30, 9)]
NEW = 20
# The same for all, and picks always recorded where no other truth is needed: every other shape is compiled anew.
SIZES = {"num_slots": 4, "page_size": 4, "chunk_steps": 8, "max_length": 56, "prefill_tokens": 64}
SIZES |= {"unstack_layers": False}
ask = functools.partial(Request, record_picks=True)


def answers(engine, requests):
  """Responses by request, in order of their index."""
  found = [[None] * request.n for request in requests]
  for place, completion in engine.run(requests):
    found[place][completion.index] = completion
  return found


def firsts(engine, requests):
  return [responses[0] for responses in answers(engine, requests)]


# --- transformers -------------------------------------------------------------------------------------------------

FAMILIES = {
  "qwen3_moe": {"mlp_only_layers": [1], "num_hidden_layers": 3},
  "glm4_moe_lite": {},
}


def hf_generate(stock, prompts, eos):
  """Greedy responses of transformers to left-padded prompts, EOS included."""
  width = max(map(len, prompts))
  tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
  mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
  options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
  with torch.no_grad():
    rows = stock.generate(tokens, attention_mask=mask, **options)[:, width:].tolist()
  ends = [next((i + 1 for i, token in enumerate(row) if token in eos), NEW) for row in rows]
  return [row[:end] for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [pytest.param("static", marks=pytest.mark.slow), "dynamic"])
def test_greedy_equals_transformers_for_forty_prompts_at_once(tmp_path, family, kind):
  stock = hf_model(model_type=family, **FAMILIES[family])
  stock.save_pretrained(tmp_path / "stock")
  model = load_hf(tmp_path / "stock")
  if kind == "dynamic":
    model = inject(model, 3, seed=1)
    save_hf(model, tmp_path / "plain", format="plain")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="float32").eval()
  prompts = [RNG.integers(0, 64, 1 + 29 * i // 39).tolist() for i in RNG.permutation(40)]
  expected = hf_generate(stock, prompts, [3, 4])
  engine = Engine(model, num_slots=32, page_size=4, chunk_steps=8, max_length=56, prefill_tokens=64)
  found = firsts(engine, [Request(p, NEW, temperature=0.0, stop_ids=(3, 4)) for p in prompts])
  assert [c.tokens for c in found] == expected
  assert {c.finish_reason for c in found} == {"stop", "length"}
  assert all((c.finish_reason == "stop") == (c.tokens[-1] in (3, 4)) for c in found)
  statistics = engine.statistics()
  assert statistics.pages_used == 0
  ratios = statistics.zero_ratio_by_layer
  assert (ratios == 0).all() if kind == "static" else ((ratios > 0.05) & (ratios < 0.95)).all()


# --- our own truths -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
  return inject(tiny_model(moe_layers=(True, False, True)), 3)


def requests_of(prompts, **options):
  return [ask(p, NEW, stream=i, **({"seed": 1, "stop_ids": (7,)} | options)) for i, p in enumerate(prompts)]


def plainly(model, prompts, **options):
  return [sample_plainly(model, p, NEW, stream=i, stop=(7,), **options) for i, p in enumerate(prompts)]


@pytest.fixture(scope="module")
def sampled(model):
  return firsts(Engine(model, **SIZES), requests_of(PROMPTS))


def test_mixed_settings_in_one_batch_equal_plain_sampling_with_each(model):
  settings = [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8}, {"temperature": 0.0}]
  mixed = [ask(PROMPTS[1], NEW, seed=5, n=2, stop_ids=(7,), **setting) for setting in settings]
  found = answers(Engine(model, **SIZES), mixed)
  assert found[2][0].tokens == found[2][1].tokens != found[0][0].tokens
  for setting, responses in zip(settings, found, strict=True):
    for ours, theirs in zip(responses, plainly(model, [PROMPTS[1]] * 2, **setting, seed=5), strict=True):
      assert ours.tokens == theirs.tokens
      np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
      assert ours.zero_ratio == pytest.approx(theirs.zero_ratio, abs=1e-6)
      assert ours.zero_ratio_all == pytest.approx(theirs.zero_ratio_all, abs=1e-6)
      assert (ours.finish_reason == "stop") == theirs.finished


def test_what_was_measured_equals_a_full_forward_pass(model, sampled):
  assert {c.finish_reason for c in sampled} == {"stop", "length"}
  rows = np.zeros((len(PROMPTS), 64), np.int32)
  for row, prompt, c in zip(rows, PROMPTS, sampled, strict=True):
    row[: len(prompt) + len(c.tokens)] = prompt + c.tokens
  out = forward(model, rows)
  logprobs, picks = np.asarray(jax.nn.log_softmax(out.logits)), np.asarray(out.picks)
  for i, (prompt, c) in enumerate(zip(PROMPTS, sampled, strict=True)):
    predicting = np.arange(len(prompt) - 1, len(prompt) + len(c.tokens) - 1)
    np.testing.assert_allclose(c.logprobs, logprobs[i, predicting, c.tokens], rtol=0, atol=1e-4)
    np.testing.assert_allclose(c.sampling_logprobs, c.logprobs, rtol=0, atol=1e-5)  # nothing is cut at temperature 1
    mine = picks[:, i, : predicting[-1] + 1].swapaxes(0, 1)
    assert c.picks.dtype == np.int16
    np.testing.assert_array_equal(c.picks, mine)
    assert c.zero_ratio == pytest.approx((mine[len(prompt) - 1 :] >= 6).mean(), abs=1e-6)
    assert c.zero_ratio_all == pytest.approx((mine >= 6).mean(), abs=1e-6)


def test_log_probabilities_under_the_sampling_distribution(model):
  setting = {"temperature": 0.8, "top_k": 9, "top_p": 0.9}
  (c,) = firsts(Engine(model, **SIZES), requests_of(PROMPTS[:1], **setting))
  logits = np.asarray(forward(model, np.array([PROMPTS[0] + c.tokens + [0] * (64 - len(c.tokens) - 5)])).logits[0])
  for i, token in enumerate(c.tokens):
    expected = np.log(plain_distribution(logits[len(PROMPTS[0]) - 1 + i], *setting.values())[token])
    assert c.sampling_logprobs[i] == pytest.approx(expected, abs=1e-4)
  assert all(a > b for a, b in zip(c.sampling_logprobs, c.logprobs, strict=True))


COMPANY = {
  "alone": ([3], 0, {}),
  "others, another order": ([5, 3, 4, 0, 3], 0, {}),
  "single steps and larger pages": ([3, 2], 0, {"chunk_steps": 1, "page_size": 16}),
  "set back again and again": ([0, 1, 2, 3, 4, 5], 42, {}),
}


@pytest.mark.parametrize(("order", "pages_gone", "options"), COMPANY.values(), ids=COMPANY)
def test_a_request_samples_the_same_in_any_company(model, sampled, order, pages_gone, options):
  engine = Engine(model, **(SIZES | options))
  engine._scheduler.pools[0].take(pages_gone)  # of 56
  asked = requests_of(PROMPTS)
  for i, found in zip(order, firsts(engine, [asked[i] for i in order]), strict=True):
    assert found.tokens == sampled[i].tokens
    np.testing.assert_allclose(found.logprobs, sampled[i].logprobs, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found.picks, sampled[i].picks)
    assert found.zero_ratio_all == sampled[i].zero_ratio_all
  assert (engine.statistics().preemptions > 0) == (pages_gone > 0)


def test_what_the_cache_held_before_reaches_nothing(model, sampled):
  engine = Engine(model, **SIZES)
  engine._pages = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), engine._pages)
  found = firsts(engine, requests_of(PROMPTS))
  assert [c.logprobs for c in found] == [c.logprobs for c in sampled]


def test_responses_to_one_prompt_share_its_pages_and_differ(model):
  engine = Engine(model, **SIZES)
  request = ask(PROMPTS[4], NEW, seed=2, n=6, stop_ids=(7,))
  engine.add(request)
  assert engine.step() == []
  # 29 tokens are read once: 7 whole pages for all, and for each of 4 slots one page of its own and 2 to go on.
  statistics = engine.statistics()
  assert statistics.prompt_tokens == 29 and statistics.running == 4 and statistics.queue == 2
  assert statistics.pages_used == 7 + 1 + 4 * (1 + 2)
  updates = []
  while not engine.is_idle:
    updates += engine.step()
  found = [u.completion for u in updates if u.completion]
  assert engine.statistics().prompt_tokens == 29 and engine.statistics().pages_used == 0
  expected = plainly(model, [PROMPTS[4]] * 6, seed=2)
  assert [c.tokens for c in sorted(found, key=lambda c: c.index)] == [s.tokens for s in expected]
  assert len({tuple(c.tokens) for c in found}) == 6
  for c in found:  # the updates hold every token once, in order
    mine = [u for u in updates if u.index == c.index]
    assert [token for u in mine for token in u.tokens] == c.tokens
    assert [logprob for u in mine for logprob in u.logprobs] == c.logprobs
    assert all(u.completion is None for u in mine[:-1])


def test_the_bias_is_each_requests_own(model):
  biases = (-np.inf, 0.0, 1e4)
  requests = [ask(PROMPTS[1], NEW, seed=1, stop_ids=(7,), zero_expert_bias=b) for b in biases]
  for bias, found in zip(biases, firsts(Engine(model, **SIZES), requests), strict=True):
    (expected,) = plainly(model, [PROMPTS[1]], seed=1, zero_expert_bias=bias)
    assert found.tokens == expected.tokens
    assert found.zero_ratio_all == pytest.approx(expected.zero_ratio_all, abs=1e-6)


def test_new_parameters_need_no_compiling_and_running_requests_go_on_with_them(model):
  other = inject(tiny_model(seed=1, moe_layers=(True, False, True)), 3)
  engine = Engine(model, **SIZES)
  engine.add(ask(PROMPTS[1], NEW, temperature=0.0, stop_ids=()))
  engine.step()
  (first,) = engine.step()
  counts = decoding.decode._cache_size(), decoding.prefill._cache_size()
  params = split_model(other)[1]
  engine.update(params)
  assert all(a is b for a, b in zip(*map(jax.tree.leaves, (params, engine._params)), strict=True))
  updates = []
  while not engine.is_idle:
    updates += engine.step()
  (expected,) = firsts(Engine(other, **SIZES), [ask(PROMPTS[1] + first.tokens, NEW - 8, 0.0, stop_ids=())])
  assert updates[-1].completion.tokens == first.tokens + expected.tokens
  assert (decoding.decode._cache_size(), decoding.prefill._cache_size() <= counts[1] + 1) == (counts[0], True)
  with pytest.raises(ZedaError, match=r"update: parameter .*router.zero_weight is missing; expected float32"):
    engine.update(split_model(tiny_model(moe_layers=(True, False, True)))[1])


def test_cancelling_frees_everything_at_once(model):
  engine = Engine(model, **SIZES)
  ids = [engine.add(ask(p, NEW, n=2, stop_ids=())) for p in PROMPTS]
  engine.step()
  engine.step()
  assert engine.statistics().running == 4
  assert all(engine.cancel(id) for id in ids) and not engine.cancel(ids[0]) and not engine.cancel(99)
  statistics = engine.statistics()
  assert engine.is_idle and statistics.pages_used == statistics.running == statistics.queue == 0
  assert engine.step() == []


def test_leaving_a_run_cancels_what_is_left_and_progress_counts(model):
  engine = Engine(model, **SIZES)
  seen = []
  for _ in engine.run(requests_of(PROMPTS), lambda *numbers: seen.append(numbers)):
    break
  assert engine.is_idle and seen[-1] == (4, 6) and set(seen[:-1]) == {(0, 6)}  # after a chunk, after prompts
  firsts(engine, requests_of(PROMPTS[:3]))
  statistics = engine.statistics()
  assert statistics.tokens_per_second > 0 and 0 < statistics.occupancy <= 1


BAD = {
  "empty": (lambda: Request([], 4), "prompt has no tokens"),
  "no new tokens": (lambda: Request([1], 0), "max_new_tokens is 0; expected at least 1"),
  "min_p": (lambda: Request([1], 4, min_p=1.5), "min_p is 1.5; expected 0"),
  "seed": (lambda: Request([1], 4, seed=-1), "seed is -1; expected 0 to 4294967295"),
  "bias": (lambda: Request([1], 4, zero_expert_bias=np.nan), "zero_expert_bias is NaN"),
  "vocabulary": (lambda: Request([1, 64], 4), "64.* vocabulary of 64"),
  "length": (lambda: Request([1] * 50, 7), "50 tokens; with max_new_tokens 7 .* 56 tokens"),
  "cache": (lambda: Request([1] * 30, 10), "need 39 places in the cache, which has 32"),
}


@pytest.mark.parametrize(("make", "words"), BAD.values(), ids=BAD)
def test_bad_requests(model, make, words):
  with pytest.raises(ZedaError, match=words) as caught:
    Engine(model, **SIZES, max_tokens=32).add(make())
  assert "\n" not in str(caught.value)


def test_bad_sizes(model):
  with pytest.raises(ZedaError, match="chunk_steps is 0; expected at least 1"):
    Engine(model, chunk_steps=0)
