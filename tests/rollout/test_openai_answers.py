"""What counts as a verified answer, field by field; and the small parts of the client."""

import datetime
import email.utils
import math

import pytest

from tests.recipe_files import write_tokenizer
from zeda_jax.data import chat
from zeda_jax.errors import ZedaError
from zeda_jax.rollout.openai_answers import Unverified, Verifier
from zeda_jax.rollout.openai_client import Garbled, base_url, check_variable, read_key, retry_after

PROMPT = [11, 12, 13]
SIZE = 400


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tokenizer")
  write_tokenizer(directory)
  tokenizer = chat.load_tokenizer(directory)
  return Verifier(tokenizer, SIZE, (tokenizer.eos_token_id, 0))


def answer(text, reason="stop", usage=None, spelled=None, logprobs=None, **fields):
  choice = {"text": text, "finish_reason": reason, **fields}
  if spelled is not None or logprobs is not None:
    choice["logprobs"] = {"tokens": spelled, "token_logprobs": logprobs}
  return {"choices": [choice], "usage": usage or {}}


def test_ids_are_kept_as_they_are(verifier):
  """Ids that the tokenizer would not choose for their text, and bytes that are no text at all."""
  eos = verifier.eos_ids[0]
  split = [t for t in range(3, SIZE) if "\ufffd" in verifier.decode([t])][:2]
  for ids in ([*verifier.encode("a"), *verifier.encode("b"), eos], [*split, eos], [eos]):
    found = verifier.read(
      answer(verifier.decode(ids[:-1]), usage={"completion_tokens": len(ids)}, token_ids=ids), PROMPT, 9
    )
    assert (found.tokens, found.finished, found.from_ids, found.logprobs) == (ids, True, True, None)


@pytest.mark.parametrize("with_special", [True, False])
def test_special_tokens_may_be_part_of_the_text_or_not(verifier, with_special):
  ids = [*verifier.encode("one"), 1, *verifier.encode("two"), verifier.eos_ids[0]]
  text = "one<|im_start|>two" if with_special else "onetwo"
  assert verifier.read(answer(text, token_ids=ids), PROMPT, 20).tokens == ids


def test_eos_that_the_server_leaves_out(verifier):
  own, other = verifier.eos_ids
  ids = verifier.encode("some text")
  for fields, expected in (
    ({}, own),  # not said which: the tokenizer's
    ({"stop_reason": None}, own),
    ({"stop_reason": other}, other),
    ({"matched_stop": other}, other),
  ):
    usage = {"completion_tokens": len(ids) + 1}
    for token_ids in ({"token_ids": ids}, {}):
      found = verifier.read(answer("some text", usage=usage, **fields, **token_ids), PROMPT, 20)
      assert found.tokens == [*ids, expected] and found.finished
  with pytest.raises(Unverified, match="stopped at 77, which is no EOS"):
    verifier.read(answer("some text", token_ids=ids, stop_reason=77), PROMPT, 20)
  with pytest.raises(Unverified, match="stopped at '###'"):
    verifier.read(answer("some text", token_ids=ids, matched_stop="###"), PROMPT, 20)


def test_what_follows_the_first_eos_is_cut(verifier):
  own, other = verifier.eos_ids
  ids = [*verifier.encode("a"), other, *verifier.encode("b"), own]
  logprobs = [-float(i) for i in range(len(ids))]
  found = verifier.read(answer(verifier.decode(ids[:-1]), token_ids=ids, logprobs=logprobs), PROMPT, 20)
  assert found.tokens == ids[:2] and found.logprobs == logprobs[:2] and found.finished


def test_text_is_tokenized_where_there_are_no_ids(verifier):
  ids = verifier.encode("returns the value")
  spelled = [verifier.decode([t]) for t in ids]
  logprobs = [-0.25] * len(ids)
  found = verifier.read(
    answer("returns the value", "length", {"completion_tokens": len(ids)}, spelled, logprobs), PROMPT, len(ids)
  )
  assert (found.tokens, found.logprobs, found.finished, found.from_ids) == (ids, logprobs, False, False)
  # Without a count, the spelled tokens are one.
  assert verifier.read(answer("returns the value", "length", None, spelled), PROMPT, len(ids)).tokens == ids


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"usage": {"completion_tokens": 40}}, "tokens, but 40 were sampled"),
    ({"usage": {"completion_tokens": 1}}, "tokens, but 1 were sampled"),
    ({"usage": {"prompt_tokens": 4}}, "read a prompt of 4 tokens, where 3 ids"),
    ({"usage": {}}, "neither token ids nor the number"),
    ({"text": "returns \ufffd"}, "no UTF-8"),
    ({"reason": "content_filter"}, "finish_reason is 'content_filter'"),
    ({"token_ids": [SIZE]}, "not one of the vocabulary's 400"),
    ({"token_ids": [-1]}, "not one of the vocabulary's"),
    ({"token_ids": [True]}, "not one of the vocabulary's"),
    ({"token_ids": ["5"]}, "not one of the vocabulary's"),
    ({"token_ids": [5, 6, 7]}, "spell another text"),
    ({"prompt_token_ids": [11, 12, 14]}, "read another prompt"),
  ],
)
def test_unverified(verifier, change, reason):
  text = "returns the value"
  fields = {"text": text, "usage": {"completion_tokens": len(verifier.encode(text))}} | change
  if "token_ids" in change:
    fields["usage"] = {"completion_tokens": len(change["token_ids"])}
  with pytest.raises(Unverified, match=reason):
    verifier.read(answer(**fields), PROMPT, 30)


def test_as_many_tokens_but_others(verifier):
  ids = verifier.encode("the value")
  spelled = [verifier.decode([t]) for t in ids]
  cut = next(i for i, token in enumerate(spelled[:-1]) if len(token) > 1)
  other = [*spelled[:cut], spelled[cut][:-1], spelled[cut][-1] + spelled[cut + 1], *spelled[cut + 2 :]]
  assert len(other) == len(spelled) and "".join(other) == "the value"
  with pytest.raises(Unverified, match="where its text would be tokenized as"):
    verifier.read(answer("the value", usage={"completion_tokens": len(ids)}, spelled=other), PROMPT, 30)


@pytest.mark.parametrize(
  "value",
  [
    *([], {}, None, "text", {"choices": []}, {"choices": [None]}, {"choices": [{"text": None}]}),
    *({"choices": [{"text": "a", "finish_reason": reason}]} for reason in (None, "abort", "error")),
  ],
)
def test_garbled(verifier, value):
  with pytest.raises(Garbled):
    verifier.read(value, PROMPT, 4)


@pytest.mark.parametrize("logprobs", [[-1.0], [-1.0, None], [-1.0, math.nan], [-1.0, 0.5], [-1.0, -math.inf], "x", []])
def test_logprobs_that_are_none(verifier, logprobs):
  ids = [*verifier.encode("ab")[:1], verifier.eos_ids[0]]
  assert verifier.read(answer(verifier.decode(ids[:1]), token_ids=ids, logprobs=logprobs), PROMPT, 4).logprobs is None


def test_too_long_or_too_short(verifier):
  ids = verifier.encode("returns the value of it")
  with pytest.raises(Unverified, match="expected 1 to 2"):
    verifier.read(answer("returns the value of it", "length", token_ids=ids), PROMPT, 2)
  with pytest.raises(ZedaError, match=r"ended an answer after \d+ tokens, for its length, but was asked for 50"):
    verifier.read(answer("returns the value of it", "length", token_ids=ids), PROMPT, 50)


@pytest.mark.parametrize(
  ("value", "expected"), [("3", 3.0), ("0.5", 0.5), ("-2", 0.0), (None, None), ("soon", None), ("", None)]
)
def test_retry_after(value, expected):
  assert retry_after(value) == expected


def test_retry_after_a_date():
  later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
  assert retry_after(email.utils.format_datetime(later, usegmt=True)) == pytest.approx(90, abs=3)
  assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


@pytest.mark.parametrize(
  ("url", "expected"),
  [
    ("http://localhost:8000", "http://localhost:8000/v1"),
    ("http://localhost:8000/", "http://localhost:8000/v1"),
    ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
    ("https://host/api/openai", "https://host/api/openai"),
    ("http://[::1]:30000", "http://[::1]:30000/v1"),
  ],
)
def test_addresses(url, expected):
  assert base_url(url) == expected


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "host", "http://[::1"])
def test_no_addresses(url):
  with pytest.raises(ZedaError, match=r"config.rollout.url is .*such as http://localhost:8000/v1"):
    base_url(url)


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "http://host/v1?key=secret", "http://host/v1#secret"])
def test_secrets_in_addresses(url):
  with pytest.raises(ZedaError, match=r"config.rollout.url holds") as error:
    base_url(url)
  assert "secret" not in str(error.value)


def test_a_key_is_never_repeated(monkeypatch):
  for key in ("sk-abc123", "hf_abcdef", "abc def"):
    with pytest.raises(ZedaError, match="no name of an environment variable") as error:
      check_variable(key)
    assert key not in str(error.value)
  assert read_key("") == ""
  monkeypatch.setenv("SOME_KEY", " sk-abc \n")
  assert read_key("SOME_KEY") == "sk-abc"
  monkeypatch.setenv("SOME_KEY", "sk-ä")
  with pytest.raises(ZedaError, match="SOME_KEY has characters") as error:
    read_key("SOME_KEY")
  assert "sk-" not in str(error.value)
