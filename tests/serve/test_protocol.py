"""What bodies are taken, and what the sentences say about the others."""

import json

import pytest

from zeda_jax.serve.errors import ApiError
from zeda_jax.serve.protocol import ChatBody, CompletionBody, parse

HELLO = [{"role": "user", "content": "Hello"}]


def completion(**fields):
  return parse(CompletionBody, json.dumps({"model": "m", "prompt": "a"} | fields).encode())


def chat(**fields):
  return parse(ChatBody, json.dumps({"model": "m", "messages": HELLO} | fields).encode())


@pytest.mark.parametrize(
  ("given", "expected"),
  [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_prompts(given, expected):
  assert completion(prompt=given).prompt == expected


@pytest.mark.parametrize("given", [[], [[]], {}, 5, [1, "a"], ["a", [1]], [1.5], [True], [[1], []], [[1, "a"]]])
def test_wrong_prompts(given):
  with pytest.raises(ApiError, match="prompt is none of: a text, a list of texts") as error:
    completion(prompt=given)
  assert (error.value.status, error.value.param) == (400, "prompt")


def test_defaults_are_those_of_openai():
  body = completion()
  assert (body.temperature, body.top_p, body.n, body.max_tokens, body.stream) == (1.0, 1.0, 1, 16, False)
  assert chat().limit is None and not chat().logprobs


def test_null_and_what_asks_for_nothing():
  nothing = {
    "stop": None,
    "seed": None,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "best_of": 1,
  }
  assert completion(user="me", suffix="", **nothing).stop == []
  assert chat(tools=[], tool_choice="none", response_format={"type": "text"}, store=False, metadata={"a": "b"}).n == 1
  message = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": [], "audio": None}
  assert chat(messages=[message]).messages[0].content == "x"


@pytest.mark.parametrize(
  ("make", "fields", "message", "param"),
  [
    (completion, {"foo": 1}, "Unrecognized request argument: foo.", "foo"),
    (completion, {"model": None}, "model is missing.", "model"),
    (completion, {"n": "2"}, "n: Input should be a valid integer.", "n"),
    (completion, {"n": True}, "n: Input should be a valid integer.", "n"),
    (completion, {"n": 0}, "n: Input should be greater than or equal to 1.", "n"),
    (completion, {"top_p": 0}, "top_p: Input should be greater than 0.", "top_p"),
    (completion, {"temperature": -1}, "temperature: Input should be greater than or equal to 0.", "temperature"),
    (completion, {"temperature": float("nan")}, "temperature: Input should be a finite number.", "temperature"),
    (completion, {"stop": ""}, "stop.0: String should have at least 1 character.", "stop.0"),
    (completion, {"stop": ["a"] * 17}, "stop: List should have at most 16 items", "stop"),
    (completion, {"logprobs": 21}, "logprobs: Input should be less than or equal to 20.", "logprobs"),
    (completion, {"max_tokens": 0}, "max_tokens is 0; expected at least 1, or echo to be true.", "max_tokens"),
    (completion, {"max_tokens": 0, "echo": True, "n": 2}, "n is more than 1, but max_tokens is 0", "n"),
    (completion, {"stop_token_ids": 5}, "stop_token_ids: Input should be a valid array.", "stop_token_ids"),
    (completion, {"stop_token_ids": ["5"]}, "Input should be a valid integer.", "stop_token_ids.0"),
    (chat, {"stop_token_ids": [-1]}, "Input should be greater than or equal to 0.", "stop_token_ids.0"),
    (chat, {"stop_token_ids": [5] * 17}, "stop_token_ids: List should have at most 16 items", "stop_token_ids"),
    (chat, {"return_token_ids": 1}, "return_token_ids: Input should be a valid boolean.", "return_token_ids"),
    (completion, {"best_of": 2}, "best_of other than n is not supported by this server", "best_of"),
    (completion, {"suffix": "b"}, "suffix is not supported by this server: leave it out.", "suffix"),
    (completion, {"presence_penalty": 0.5}, "presence_penalty is not supported", "presence_penalty"),
    (completion, {"zero_expert_bias": float("inf")}, "zero_expert_bias is inf; expected", "zero_expert_bias"),
    (completion, {"zero_expert_bias": "nan"}, "zero_expert_bias is 'nan'; expected", "zero_expert_bias"),
    (completion, {"zero_expert_bias": True}, "zero_expert_bias is True; expected", "zero_expert_bias"),
    (completion, {"stream_options": {}}, "stream_options is given without stream", "stream_options"),
    (chat, {"messages": []}, "messages: List should have at least 1 item", "messages"),
    (chat, {"messages": ["a"]}, "a message is no JSON object", "messages.0"),
    (chat, {"messages": [{"role": "user"}]}, "messages.0.content is missing.", "messages.0.content"),
    (chat, {"messages": [{"role": "king", "content": "a"}]}, "messages.0.role: Input should be", "messages.0.role"),
    (chat, {"messages": [{"role": "tool", "content": "a"}]}, "messages of tools are not supported", "messages.0"),
    (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts other than text", None),
    (chat, {"tools": [{"type": "function"}]}, "tools is not supported by this server: leave it out.", "tools"),
    (chat, {"response_format": {"type": "json_object"}}, "response_format is not supported", "response_format"),
    (chat, {"top_logprobs": 2}, "top_logprobs is given without logprobs", "top_logprobs"),
    (chat, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens and max_completion_tokens differ", "max_tokens"),
    (chat, {"chat_template_kwargs": {"tokenize": False}}, "has tokenize, which is no variable", "chat_template_kwargs"),
  ],
)
def test_refused(make, fields, message, param):
  with pytest.raises(ApiError) as error:
    make(**fields)
  assert error.value.status == 400 and message in error.value.message
  assert param is None or error.value.param == param


def test_zero_expert_bias():
  values = [completion(zero_expert_bias=bias).zero_expert_bias for bias in ("-inf", "-Infinity", -1, 0.5, None)]
  assert values == [float("-inf"), float("-inf"), -1.0, 0.5, None]
  assert parse(CompletionBody, b'{"model":"m","prompt":"a","zero_expert_bias":-Infinity}').zero_expert_bias == values[0]


@pytest.mark.parametrize(
  "body", [b"", b"{", b"nothing", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"[1]", b"null", b'"text"', b"1"]
)
def test_bodies_that_are_no_object(body):
  with pytest.raises(ApiError, match="The body is no") as error:
    parse(ChatBody, body)
  assert error.value.status == 400 and len(error.value.message) < 200
