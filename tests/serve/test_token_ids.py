"""Token ids in requests and answers, as clients of vLLM and SGLang use them; rollouts from this server."""

import types

import numpy as np
import openai
import pytest

import zeda_jax
from zeda_jax.data.chat import eos_ids, render_prompt
from zeda_jax.data.jsonl import JsonLines, write_jsonl
from zeda_jax.data.prompts import open_prompts
from zeda_jax.demo import generate_tasks
from zeda_jax.rollout.openai import sample_from_server
from zeda_jax.rollout.openai_answers import Verifier

QUESTIONS = [task["prompt"][0]["content"] for f in ("math", "code") for task in generate_tasks(f, "held_out", 2)]
IDS = {"return_token_ids": True}
SAMPLED = {"model": "half", "temperature": 1.2, "seed": 7, "max_tokens": 20, "n": 2}


@pytest.fixture
def client(server):
  with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120) as client:
    yield client


@pytest.fixture(scope="module")
def prompts(tokenizer):
  return [render_prompt(tokenizer, {"prompt": question}) for question in QUESTIONS]


@pytest.fixture(scope="module")
def greedy(model, prompts):
  return [sample.tokens for sample in zeda_jax.generate(model, prompts, 12, temperature=0.0)]


def messages(question):
  return [{"role": "user", "content": question}]


def test_completions(client, tokenizer, prompts, greedy):
  options = {"model": "half", "max_tokens": 12, "temperature": 0, "extra_body": IDS}
  for given in (prompts, [tokenizer.decode(prompt) for prompt in prompts]):
    choices = client.completions.create(prompt=given, **options).choices
    assert [choice.token_ids for choice in choices] == greedy
    assert [choice.prompt_token_ids for choice in choices] == prompts
  assert any(tokens[-1] == tokenizer.eos_token_id for tokens in greedy)
  assert [choice.text for choice in choices] == [tokenizer.decode(t, skip_special_tokens=True) for t in greedy]
  echoed = client.completions.create(model="half", prompt=prompts[0], max_tokens=0, echo=True, extra_body=IDS)
  assert (echoed.choices[0].prompt_token_ids, echoed.choices[0].token_ids) == (prompts[0], [])
  assert echoed.choices[0].text == tokenizer.decode(prompts[0])
  for nothing in ({}, {"return_token_ids": False}, {"return_token_ids": None}):
    answer = client.completions.create(model="half", prompt="a", max_tokens=1, extra_body=nothing)
    assert not {"token_ids", "prompt_token_ids"} & answer.choices[0].model_dump().keys()


@pytest.mark.parametrize("logprobs", [None, 1])
def test_streamed_completions(client, prompts, logprobs):
  options = SAMPLED | {"prompt": prompts[:2], "logprobs": logprobs, "extra_body": IDS | {"ignore_eos": True}}
  whole = client.completions.create(**options).choices
  tokens, texts, read, named = [[] for _ in whole], ["" for _ in whole], {}, [[] for _ in whole]
  for part in client.completions.create(stream=True, **options):
    (choice,) = part.choices
    found = choice.model_dump()
    assert ("prompt_token_ids" in found) == (choice.index not in read)  # with the first part of each choice
    read.setdefault(choice.index, found.get("prompt_token_ids"))
    tokens[choice.index] += choice.token_ids
    texts[choice.index] += choice.text
    named[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert not logprobs or len(choice.token_ids) == len(choice.logprobs.tokens if choice.logprobs else [])
  assert tokens == [choice.token_ids for choice in whole] and {len(t) for t in tokens} == {20}
  assert texts == [choice.text for choice in whole]
  assert [read[i] for i in range(4)] == [choice.prompt_token_ids for choice in whole]
  assert [read[i] for i in range(4)] == [prompts[0], prompts[0], prompts[1], prompts[1]]
  assert not logprobs or named == [choice.logprobs.tokens for choice in whole]


def test_chat(client, prompts, greedy):
  options = {"model": "half", "max_tokens": 12, "extra_body": IDS}
  answer = client.chat.completions.create(messages=messages(QUESTIONS[0]), temperature=0, **options)
  assert (answer.prompt_token_ids, answer.choices[0].token_ids) == (prompts[0], greedy[0])
  options |= {"messages": messages(QUESTIONS[1]), "n": 2, "seed": 3, "temperature": 1.2}
  whole = client.chat.completions.create(**options)
  tokens, texts = [[], []], ["", ""]
  for number, part in enumerate(client.chat.completions.create(stream=True, **options)):
    assert part.model_dump().get("prompt_token_ids") == (prompts[1] if number == 0 else None)
    (choice,) = part.choices
    tokens[choice.index] += choice.model_dump().get("token_ids", [])
    texts[choice.index] += choice.delta.content or ""
  assert whole.prompt_token_ids == prompts[1] and tokens == [choice.token_ids for choice in whole.choices]
  assert texts == [choice.message.content for choice in whole.choices]
  assert sum(map(len, tokens)) == whole.usage.completion_tokens
  plain = client.chat.completions.create(model="half", messages=messages("a"), max_tokens=1)
  assert "prompt_token_ids" not in plain.model_dump() and "token_ids" not in plain.choices[0].model_dump()


def test_tokens_named_by_their_ids(client, tokenizer, prompts):
  name = lambda tokens: [f"token_id:{token}" for token in tokens]
  extra = IDS | {"return_tokens_as_token_ids": True}
  options = SAMPLED | {"prompt": prompts[0], "echo": True, "logprobs": 3, "n": 1}
  (choice,) = client.completions.create(extra_body=extra, **options).choices
  assert choice.logprobs.tokens == name([*prompts[0], *choice.token_ids])
  (plain,) = client.completions.create(**options).choices
  for found, known in zip(choice.logprobs.top_logprobs[1:], plain.logprobs.top_logprobs[1:], strict=True):
    texts = {}
    for key, value in found.items():  # of tokens with the same text, the best one stands in the other list
      texts.setdefault(tokenizer.decode([int(key.removeprefix("token_id:"))]), value)
    assert texts == pytest.approx(known, abs=1e-4) and len(found) in (3, 4)
  assert choice.logprobs.text_offset == plain.logprobs.text_offset
  options = {"model": "half", "messages": messages(QUESTIONS[0]), "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
  (choice,) = client.chat.completions.create(temperature=0, extra_body=extra, **options).choices
  assert [entry.token for entry in choice.logprobs.content] == name(choice.token_ids)
  assert bytes(choice.logprobs.content[0].bytes).decode() == choice.message.content[0]  # the true ones
  for entry in choice.logprobs.content:
    assert entry.top_logprobs[0].token == entry.token and entry.top_logprobs[1].token.startswith("token_id:")


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_tokens(client, tokenizer, greedy, prompts, streamed):
  """A stop token ends the answer, is one of its ids, and is not in its text."""

  tokens, eos = greedy[3], tokenizer.eos_token_id
  text, stop = tokenizer.decode(tokens[:-1]), tokens[2]
  assert len(text) == 4 and tokens[-1] == eos and stop not in tokens[:2]

  def ask(**changes):
    options = {"model": "half", "prompt": prompts[3], "max_tokens": 12, "temperature": 0} | changes
    options["extra_body"] = IDS | options["extra_body"]
    if not streamed:
      (choice,) = client.completions.create(**options).choices
      return choice.token_ids, choice.text, choice.finish_reason, choice.stop_reason
    parts = [part.choices[0] for part in client.completions.create(stream=True, **options)]
    assert all(part.stop_reason is None for part in parts[:-1])
    found = [token for part in parts for token in part.token_ids]
    return found, "".join(part.text for part in parts), parts[-1].finish_reason, parts[-1].stop_reason

  for extra in ({"stop_token_ids": [stop, stop, 0]}, {"stop_token_ids": [stop], "ignore_eos": True}):
    assert ask(extra_body=extra) == (tokens[:3], text[:2], "stop", stop)
  for extra in ({}, {"stop_token_ids": [eos]}, {"stop_token_ids": [eos], "skip_special_tokens": False}):
    assert ask(extra_body=extra) == (tokens, text, "stop", None)
  assert ask(extra_body={"stop_token_ids": [eos], "ignore_eos": True}) == (tokens, text, "stop", eos)
  assert ask(stop=["nowhere", text[2]], extra_body={}) == (tokens[:3], text[:2], "stop", text[2])
  assert ask(max_tokens=2, extra_body={"stop_token_ids": [stop]}) == (tokens[:2], text[:2], "length", None)


def test_special_tokens_in_the_text(client, tokenizer):
  options = SAMPLED | {"prompt": "Z", "temperature": 2.0, "max_tokens": 60, "logprobs": 0}
  seen = []
  for skip in (True, False):
    extra = IDS | {"ignore_eos": True, "skip_special_tokens": skip}
    choices = client.completions.create(extra_body=extra, **options).choices
    for choice in choices:
      assert choice.text == tokenizer.decode(choice.token_ids, skip_special_tokens=skip)
      places = [*choice.logprobs.text_offset, len(choice.text)]
      for token, start, end in zip(choice.token_ids, places, places[1:], strict=False):
        assert choice.text[start:end] == tokenizer.decode([token], skip_special_tokens=skip)
    seen.append([choice.token_ids for choice in choices])
  assert seen[0] == seen[1] and any(set(tokens) & set(tokenizer.all_special_ids) for tokens in seen[0])


def test_unknown_stop_tokens(client):
  with pytest.raises(openai.BadRequestError, match="stop_token_ids holds the token 128; the model's vocabulary"):
    client.completions.create(model="half", prompt="a", extra_body={"stop_token_ids": [5, 128]})


def test_rollouts_from_this_server(server, model_path, tokenizer, logprobs_of, tmp_path):
  """`rollout.engine=openai` gets the very tokens that were sampled: their log-probabilities are the model's."""
  rng = np.random.default_rng(0)
  words = ["".join(rng.choice(list("abcdefgh 0123456789+-="), 6)) for _ in range(16)]
  write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": word} for word in words))
  prompts, lines = open_prompts(tmp_path / "prompts.jsonl"), []
  render = lambda number: render_prompt(tokenizer, prompts[number])
  settings = {"url": server.url, "model": "half", "key_variable": "", "concurrency": 8, "retries": 0, "timeout": 60.0}
  settings |= {"max_new_tokens": 24, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "shard_size": 8, "max_dropped": 0.0}
  verifier = Verifier(tokenizer, 128, eos_ids(model_path, tokenizer))
  sample_from_server(
    verifier, prompts, range(16), render, 10, tmp_path, types.SimpleNamespace(**settings), 0, tell=lines.append
  )
  (line,) = lines
  assert line.endswith("model half (zeda-jax); token ids come from the server; log-probs kept")
  records = [record for file in sorted(tmp_path.glob("rollouts-*")) for record in JsonLines(file)]
  assert len(records) == 16 and {record["finished"] for record in records} == {True, False}
  for record in records:
    prompt, response = record["prompt_tokens"], record["response_tokens"]
    assert prompt == render(record["index"])
    expected = logprobs_of([*prompt, *response])[np.arange(len(prompt) - 1, len(prompt) + len(response) - 1), response]
    np.testing.assert_allclose(record["logprobs"], expected, rtol=0, atol=1e-4)
