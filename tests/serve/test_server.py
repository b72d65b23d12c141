"""The `openai` client against a real `zeda serve` process; answers equal those of `zeda_jax.generate`."""

import json
import re

import httpx
import numpy as np
import openai
import pytest

import zeda_jax
from tests.serve.server_process import CONTEXT, REPOSITORY, SLOTS
from zeda_jax.data.chat import render_prompt
from zeda_jax.demo import generate_tasks

QUESTIONS = [task["prompt"][0]["content"] for f in ("math", "code") for task in generate_tasks(f, "held_out", 4)]


@pytest.fixture
def client(server):
  with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120) as client:
    yield client


@pytest.fixture(scope="module")
def prompts(tokenizer):
  return [render_prompt(tokenizer, {"prompt": question}) for question in QUESTIONS]


@pytest.fixture(scope="module")
def greedy(model, prompts):
  return zeda_jax.generate(model, prompts, 12, temperature=0.0)


def ask(question):
  return [{"role": "user", "content": question}]


def test_models(client, server):
  (model,) = client.models.list().data
  assert (model.id, model.owned_by) == ("half", "zeda-jax") and client.models.retrieve("half") == model
  with pytest.raises(
    openai.NotFoundError, match="The model 'other' does not exist here; this server has 'half'"
  ) as error:
    client.completions.create(model="other", prompt="a")
  assert error.value.code == "model_not_found"
  assert httpx.get(f"{server.root}/health").text == "ok"


def test_greedy_completions_are_those_of_generate(client, tokenizer, prompts, greedy):
  expected = [tokenizer.decode(sample.tokens, skip_special_tokens=True) for sample in greedy]
  texts = [tokenizer.decode(prompt) for prompt in prompts]
  options = {"model": "half", "max_tokens": 12, "temperature": 0}
  for given in (prompts, texts):
    answer = client.completions.create(prompt=given, **options)
    assert [choice.text for choice in answer.choices] == expected
    assert [c.finish_reason for c in answer.choices] == ["stop" if s.finished else "length" for s in greedy]
  assert answer.usage.prompt_tokens == sum(map(len, prompts))
  passes = sum(len(sample.tokens) for sample in greedy)
  assert answer.usage.completion_tokens == passes
  ratio = sum(sample.zero_ratio * len(sample.tokens) for sample in greedy) / passes
  assert answer.usage.zero_expert_ratio == pytest.approx(ratio, abs=1e-3) and 0.2 < ratio < 0.8
  for given in (prompts[0], texts[0]):
    assert client.completions.create(prompt=given, **options).choices[0].text == expected[0]


def test_chat(client, tokenizer, greedy):
  for question, sample in zip(QUESTIONS, greedy, strict=True):
    answer = client.chat.completions.create(
      model="half", messages=ask(question), max_completion_tokens=12, temperature=0, logprobs=True
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == tokenizer.decode(sample.tokens, skip_special_tokens=True)
    content = choice.logprobs.content
    assert [entry.token for entry in content] == [tokenizer.decode([token]) for token in sample.tokens]
    assert bytes(content[0].bytes).decode() == content[0].token
    np.testing.assert_allclose([entry.logprob for entry in content], sample.logprobs, rtol=0, atol=1e-4)
  parts = [{"type": "text", "text": QUESTIONS[-1][:3]}, {"type": "text", "text": QUESTIONS[-1][3:]}]
  again = client.chat.completions.create(model="half", messages=ask(parts), max_tokens=12, temperature=0)
  assert again.choices[0].message.content == choice.message.content


def test_seed_and_n(client, model, tokenizer):
  options = {"temperature": 1.5, "top_p": 0.95, "seed": 11}
  prompt = tokenizer("What is")["input_ids"]
  expected = zeda_jax.generate(model, [prompt] * 4, 12, top_k=20, **options)
  texts = [tokenizer.decode(sample.tokens, skip_special_tokens=True) for sample in expected]
  assert len(set(texts)) > 1
  for _ in range(2):
    answer = client.completions.create(
      model="half", prompt="What is", max_tokens=12, n=4, extra_body={"top_k": 20}, **options
    )
    assert [choice.text for choice in answer.choices] == texts
  assert answer.usage.completion_tokens == sum(len(sample.tokens) for sample in expected)
  unseeded = [
    client.completions.create(model="half", prompt="Z", max_tokens=16, temperature=2.0, extra_body={"min_p": 0.001})
    for _ in range(2)
  ]
  assert unseeded[0].choices[0].text != unseeded[1].choices[0].text


@pytest.mark.parametrize("top", [None, 2])
def test_streamed_parts_make_the_whole(client, top):
  options = {"model": "half", "messages": ask(QUESTIONS[1]), "n": 2, "seed": 3, "max_tokens": 60, "temperature": 1.2}
  options |= {"logprobs": top is not None, "top_logprobs": top, "extra_body": {"ignore_eos": True}}
  whole = client.chat.completions.create(**options)
  texts, roles, reasons, infos, usages, pieces = ["", ""], {}, {}, [[], []], [], 0
  for part in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options):
    assert part.object == "chat.completion.chunk"
    usages += [part.usage] if part.usage else []
    for choice in part.choices:
      assert not part.usage
      pieces += bool(choice.delta.content)
      texts[choice.index] += choice.delta.content or ""
      infos[choice.index] += choice.logprobs.content if choice.logprobs else []
      roles |= {choice.index: choice.delta.role} if choice.delta.role else {}
      reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
  assert texts == [choice.message.content for choice in whole.choices] and pieces > 4
  assert roles == {0: "assistant", 1: "assistant"} and reasons == {0: "length", 1: "length"}
  assert [usage.model_dump() for usage in usages] == [whole.usage.model_dump()]
  for found, choice in zip(infos, whole.choices, strict=True):
    assert len(found) == (60 if top else 0)
    for mine, theirs in zip(found, choice.logprobs.content if top else [], strict=True):
      assert (mine.token, len(mine.top_logprobs)) == (theirs.token, 2)
      assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("streamed", [False, True])
def test_stop(client, streamed):
  options = {"model": "half", "prompt": "Z", "seed": 5, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
  full = client.completions.create(**options).choices[0].text
  stop = full[20:25]  # five characters are several tokens
  before = full[: full.index(stop)]
  options |= {"stop": [stop, "nowhere"]}
  if streamed:
    parts = [part.choices[0] for part in client.completions.create(stream=True, **options)]
    text, reason = "".join(part.text for part in parts), parts[-1].finish_reason
  else:
    answer = client.completions.create(**options)
    text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert 0 < answer.usage.completion_tokens < 200
    assert 0.2 < answer.usage.zero_expert_ratio < 0.8
  assert (text, reason) == (before, "stop")


def test_one_of_several_stops(client, server):
  options = {"model": "half", "prompt": "Z", "n": 4, "seed": 5, "max_tokens": 100, "extra_body": {"ignore_eos": True}}
  full = [choice.text for choice in client.completions.create(**options).choices]
  stop = full[2][10:14]
  assert sum(stop in text for text in full) < 4
  cut = client.completions.create(stop=stop, **options).choices
  assert [choice.text for choice in cut] == [text.split(stop)[0] for text in full]
  assert [c.finish_reason for c in cut] == ["stop" if stop in text else "length" for text in full]
  assert server.wait_until_idle()["zeda_cache_pages_used"] == 0


def test_prompt_logprobs(client, logprobs_of, tokenizer, prompts):
  answer = client.completions.create(model="half", prompt=prompts, max_tokens=1, temperature=0, echo=True, logprobs=1)
  for prompt, choice in zip(prompts, answer.choices, strict=True):
    found, tokens = choice.logprobs, [*prompt, *tokenizer(choice.logprobs.tokens[-1])["input_ids"]]
    logprobs = logprobs_of(tokens)
    expected = logprobs[np.arange(len(tokens) - 1), tokens[1:]]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    np.testing.assert_allclose(found.token_logprobs[1:], expected, rtol=0, atol=1e-4)
    for place, top in enumerate(found.top_logprobs[1:]):
      assert set(top) == {tokenizer.decode([logprobs[place].argmax()]), found.tokens[place + 1]}
    assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values())
    assert [choice.text[a:b] for a, b in zip(found.text_offset, [*found.text_offset[1:], None], strict=True)] == [
      token if token != "<|im_end|>" or place < len(prompt) else "" for place, token in enumerate(found.tokens)
    ]
  nothing = client.completions.create(model="half", prompt=prompts[0], max_tokens=0, echo=True, logprobs=0)
  assert nothing.choices[0].text == tokenizer.decode(prompts[0]) and nothing.usage.completion_tokens == 0
  np.testing.assert_allclose(
    nothing.choices[0].logprobs.token_logprobs[1:], answer.choices[0].logprobs.token_logprobs[1:-1], rtol=0, atol=1e-4
  )


def test_zero_expert_bias(client):
  options = {"model": "half", "prompt": "What is", "max_tokens": 60, "seed": 1}
  ratios = []
  for bias in ("-inf", -0.3, 0, 2):
    answer = client.completions.create(extra_body={"zero_expert_bias": bias}, **options)
    ratios.append(answer.usage.zero_expert_ratio)
  assert ratios[0] == 0 and ratios == sorted(set(ratios))
  assert ratios[2] == client.completions.create(**options).usage.zero_expert_ratio


def test_metrics(client, server):
  before = server.metrics()
  client.completions.create(model="half", prompt=[1, 2, 3, 4, 5], max_tokens=20, extra_body={"ignore_eos": True})
  after = server.wait_until_idle()
  grown = {name: after[name] - value for name, value in before.items()}
  assert (grown["zeda_generated_tokens_total"], grown["zeda_prompt_tokens_total"]) == (20, 4)
  assert grown["zeda_expert_picks_total"] == 24 * 4
  assert all(0 < grown[f"zeda_zero_expert_picks_total{{{layer}}}"] < 24 * 4 for layer in range(4))
  assert 0 < after["zeda_zero_expert_ratio{0}"] < 1 and after["zeda_generated_tokens_per_second"] > 0
  assert grown["zeda_http_requests_total{/v1/completions}{200}"] == 1
  assert (after["zeda_slots"], after["zeda_running_responses"], after["zeda_queue_responses"]) == (SLOTS, 0, 0)


def test_refusals(client, server):
  tool = {"type": "function", "function": {"name": "f"}}
  with pytest.raises(openai.BadRequestError, match="tools is not supported by this server: leave it out"):
    client.chat.completions.create(model="half", messages=ask("a"), tools=[tool])
  with pytest.raises(openai.BadRequestError, match="logit_bias is not supported") as error:
    client.completions.create(model="half", prompt="a", logit_bias={"5": 1})
  assert (error.value.param, error.value.type) == ("logit_bias", "invalid_request_error")
  with pytest.raises(openai.BadRequestError, match="exceeds the 1024 that this server holds") as error:
    client.completions.create(model="half", prompt=[1] * 1000, max_tokens=25)
  assert error.value.code == "context_length_exceeded" and CONTEXT > 1024
  with pytest.raises(openai.BadRequestError, match="The prompt holds the token 128; the model's vocabulary has 128"):
    client.completions.create(model="half", prompt=[128])
  with pytest.raises(openai.BadRequestError, match="The prompt has no tokens"):
    client.completions.create(model="half", prompt="")
  with pytest.raises(openai.BadRequestError, match="asks for 384 responses; this server takes at most 308"):
    client.completions.create(model="half", prompt=["a"] * 3, n=128)
  for method, path, status in [("GET", "/v1/completions", 405), ("POST", "/v1/embeddings", 404), ("GET", "/no", 404)]:
    answer = httpx.request(method, f"{server.root}{path}", json={} if method == "POST" else None)
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_examples_of_the_documentation(server, client):
  """What docs/serve.md shows, run as it stands there but for the address and the model's name."""
  text = (REPOSITORY / "docs" / "serve.md").read_text()
  bodies = re.findall(r"curl [^\n]*/v1/([\w/]+) [^\n]*\\\n[^']*'(\{.*?\})'\n", text, re.DOTALL)
  assert len(bodies) >= 2
  for path, body in bodies:
    answer = httpx.post(f"{server.url}/{path}", json=json.loads(body) | {"model": "half"}, timeout=120)
    assert answer.status_code == 200, answer.text
  (code,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
  code = code.replace("http://127.0.0.1:8000", server.root).replace("qwen3-half", "half")
  exec(compile(code, "docs/serve.md", "exec"), {})
