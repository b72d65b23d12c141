"""Rollouts from servers of OpenAI's API: the right token ids or none, whatever the server and the connection do."""

import json
import pathlib
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

from tests.recipe_files import REPOSITORY, write_tokenizer
from tests.rollout.openai_stub import BARE, Stub, serving
from zeda_jax.data import chat
from zeda_jax.data.jsonl import JsonLines, write_jsonl
from zeda_jax.data.prompts import open_prompts
from zeda_jax.data.rollouts import RolloutSource
from zeda_jax.errors import ZedaError
from zeda_jax.rollout import openai_client
from zeda_jax.rollout.openai import request_seed, sample_from_server
from zeda_jax.rollout.openai_answers import Verifier
from zeda_jax.rollout.stage import is_finished

CHOSEN = [n for n in range(23) if n % 4]  # numbers of the prompts to answer: 17 of 23
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tokenizer")
  write_tokenizer(directory)
  return chat.load_tokenizer(directory)


@pytest.fixture(scope="module")
def other_tokenizer(tokenizer, tmp_path_factory):
  """The same tokens under other ids."""
  directory = tmp_path_factory.mktemp("other")
  tokenizer.save_pretrained(directory)
  file = directory / "tokenizer.json"
  content = json.loads(file.read_text())
  vocabulary = content["model"]["vocab"]
  special = {t["content"] for t in content["added_tokens"]}
  names = [n for n in vocabulary if n not in special]
  ids = [vocabulary[n] for n in names]
  vocabulary.update(zip(names, ids[7:] + ids[:7], strict=True))
  file.write_text(json.dumps(content))
  return chat.load_tokenizer(directory)


@pytest.fixture
def prompts(tmp_path):
  file = tmp_path / "prompts.jsonl"
  write_jsonl(file, ({"prompt": f"prompt {n}", "label": n} for n in range(23)))
  return open_prompts(file)


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch):
  monkeypatch.setattr(openai_client.Client, "first_pause", 0.01)
  monkeypatch.setattr(openai_client.Client.__init__, "__defaults__", ("", 3600.0, 12, 0.01))


def render(number):
  return [10 + number, 12, 13]


def rollout(url, **changes):
  values = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "shard_size": 6, "url": url}
  values |= {"model": "", "key_variable": "", "concurrency": 4, "retries": 4, "timeout": 20.0, "max_dropped": 0.0}
  return types.SimpleNamespace(**(values | changes))


def run(stub, prompts, directory, progress=lambda done, total: None, tokenizer=None, longest=3, seed=0, **changes):
  """Runs the stage against the stub; returns the lines that it told."""
  tokenizer = tokenizer or stub.tokenizer
  verifier = Verifier(tokenizer, 400, (tokenizer.eos_token_id,))
  lines = []
  with serving(stub) as url:
    sample_from_server(
      verifier, prompts, CHOSEN, render, longest, directory, rollout(url, **changes), seed, progress, lines.append
    )
  return lines


def contents(directory):
  return {path.name: path.read_bytes() for path in sorted(directory.glob("*.jsonl"))}


def records_of(directory):
  return [r for file in sorted(directory.glob("*.jsonl")) for r in JsonLines(file)]


@pytest.mark.parametrize("kind", ["vllm", "vllm-old", "sglang", "sglang-old", *BARE])
def test_every_prompt_once_with_the_ids_that_were_sampled(kind, tokenizer, prompts, tmp_path):
  stub, seen = Stub(tokenizer, kind), []
  lines = run(stub, prompts, tmp_path / "r", lambda done, total: seen.append((done, total)))
  assert len(lines) == 1 and "teacher" in lines[0] and "log-probs kept" in lines[0]
  assert ("tokenized again" in lines[0]) == (kind in BARE)
  records = records_of(tmp_path / "r")
  assert [r["index"] for r in records] == CHOSEN
  for record in records:
    index = record["index"]
    sampled = stub.sample(render(index), request_seed(0, index), NEW_TOKENS)
    assert record["response_tokens"] == sampled
    assert record["logprobs"] == pytest.approx([-0.5 - i for i in range(len(sampled))])
    assert record["finished"] == (sampled[-1] == tokenizer.eos_token_id)
    assert (record["prompt_tokens"], record["label"], record["zero_ratio"]) == (render(index), index, None)
  if kind not in BARE:
    assert {r["finished"] for r in records} == {True, False}
    assert any(
      tokenizer(stub.decode(r["response_tokens"][:-1]))["input_ids"] != r["response_tokens"][:-1] for r in records
    )
  assert RolloutSource(sorted((tmp_path / "r").iterdir())).lengths(vocab_size=400).min() > 3
  assert is_finished(tmp_path / "r", 17, 6)
  dones = [done for done, _ in seen]
  assert dones == sorted(dones) and dones[-1] == 17 and {total for _, total in seen} == {17}
  assert stub.most_at_work <= 4


def test_what_is_asked(tokenizer, prompts, tmp_path, monkeypatch):
  """Nothing is left to what the server takes from generation_config.json."""
  monkeypatch.setenv("STUB_KEY", "sesame")
  stub = Stub(tokenizer, "vllm")
  stub.key = "sesame"
  run(stub, prompts, tmp_path / "r", temperature=0.6, top_p=0.95, seed=3, key_variable="STUB_KEY")
  bodies = {body["seed"]: body for body in stub.sampled}
  assert bodies.keys() == {request_seed(3, i) for i in CHOSEN} and len(stub.sampled) == 17
  body = bodies[request_seed(3, 5)]
  assert (body["prompt"], body["max_tokens"], body["model"]) == (render(5), NEW_TOKENS, "teacher")
  assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.6, 0.95, -1, 0.0)
  assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)
  assert body["stop_token_ids"] == [tokenizer.eos_token_id]
  assert set(stub.keys) == {"Bearer sesame"}
  assert min(bodies) >= 0 and max(bodies) < 2**31


def test_logprobs_of_another_temperature_are_not_kept(tokenizer, prompts, tmp_path):
  run(Stub(tokenizer, "sglang"), prompts, tmp_path / "sglang", temperature=0.6)
  assert {r["logprobs"] is None for r in records_of(tmp_path / "sglang")} == {True}
  run(Stub(tokenizer, "vllm"), prompts, tmp_path / "vllm", temperature=0.6)  # the model's own
  assert {r["logprobs"] is None for r in records_of(tmp_path / "vllm")} == {False}


@pytest.mark.parametrize(
  "fault", [(429, {}), (503, {}), (502, {}), "reset", "close", "garbled", "half", 1.0], ids=lambda f: str(f)
)
def test_what_passes_is_tried_again(fault, tokenizer, prompts, tmp_path):
  stub = Stub(tokenizer)
  run(stub, prompts, tmp_path / "undisturbed")
  stub, asked = Stub(tokenizer), []

  def twice(number, body):
    asked.append(body.get("seed"))
    return fault if number % 3 == 0 and asked.count(body.get("seed")) < 3 else None

  stub.fault = twice
  run(stub, prompts, tmp_path / "r", timeout=0.5)
  assert contents(tmp_path / "r") == contents(tmp_path / "undisturbed")
  assert len(stub.requests) > 17 + 3


def test_an_aborted_answer_is_asked_again(tokenizer, prompts, tmp_path):
  stub = Stub(tokenizer, "sglang")
  first = set()

  def change(choice, usage, body):
    if body["seed"] not in first:
      first.add(body["seed"])
      choice.update(finish_reason="abort", token_ids=choice["token_ids"][:1])

  stub.change = change
  run(stub, prompts, tmp_path / "r")
  run(Stub(tokenizer, "sglang"), prompts, tmp_path / "undisturbed")
  assert contents(tmp_path / "r") == contents(tmp_path / "undisturbed")


def test_retry_after_is_honoured(tokenizer, prompts, tmp_path):
  stub = Stub(tokenizer)
  stub.fault = lambda number, body: (429, {"Retry-After": "1"}) if number == 5 else None
  run(stub, prompts, tmp_path / "r")
  again = [t for t, body in zip(stub.times, stub.requests, strict=True) if body == stub.requests[5]]
  assert len(again) == 2 and again[1] - again[0] >= 1.0


def test_retry_after_that_is_too_long(tokenizer, prompts, tmp_path):
  stub = Stub(tokenizer)
  stub.fault = lambda number, body: (503, {"Retry-After": "7200"}) if number > 8 else None
  with pytest.raises(ZedaError, match=r"asks to come back in 7200 s, later than config.rollout.timeout=20"):
    run(stub, prompts, tmp_path / "r")


def test_retries_come_to_an_end(tokenizer, prompts, tmp_path):
  stub = Stub(tokenizer)
  stub.fault = lambda number, body: (503, {}) if body["prompt"] == render(11) else None
  with pytest.raises(ZedaError, match=r"prompts.jsonl:12: .*asked 5 times without success; .*503 .*not now"):
    run(stub, prompts, tmp_path / "r", concurrency=1)
  assert sum(body["prompt"] == render(11) for body in stub.requests) == 5
  assert list(contents(tmp_path / "r")) == ["rollouts-00000-of-00003.jsonl"]  # what was finished stays
  stub.fault = lambda number, body: None
  run(stub, prompts, tmp_path / "r")
  run(Stub(tokenizer), prompts, tmp_path / "undisturbed")
  assert contents(tmp_path / "r") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("status", [400, 403, 404, 501])
def test_a_refusal_is_not_tried_again(status, tokenizer, prompts, tmp_path, monkeypatch):
  monkeypatch.setenv("STUB_KEY", "sesame")
  stub = Stub(tokenizer)
  stub.fault = lambda number, body: (status, {}) if body["seed"] == request_seed(0, 9) else None
  with pytest.raises(ZedaError, match=rf"prompts.jsonl:10: .*refuses the request: status {status} ") as error:
    run(stub, prompts, tmp_path / "r", key_variable="STUB_KEY")
  assert sum(body["seed"] == request_seed(0, 9) for body in stub.requests) == 1
  assert "sesame" not in str(error.value) and "Bearer (key)" in str(error.value)


def test_a_wrong_key(tokenizer, prompts, tmp_path, monkeypatch):
  monkeypatch.setenv("STUB_KEY", "mustard")
  stub = Stub(tokenizer)
  stub.key = "sesame"
  with pytest.raises(ZedaError, match="status 401") as error:
    run(stub, prompts, tmp_path / "r", key_variable="STUB_KEY")
  assert "mustard" not in str(error.value)
  monkeypatch.delenv("STUB_KEY")
  with pytest.raises(ZedaError, match="STUB_KEY is not set"):
    run(stub, prompts, tmp_path / "r", key_variable="STUB_KEY")


def test_no_server(tokenizer, prompts, tmp_path):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{probe.getsockname()[1]}"
  verifier = Verifier(tokenizer, 400, (tokenizer.eos_token_id,))
  with pytest.raises(ZedaError, match=r"/v1/models was asked 4 times without success; .*ConnectError"):
    sample_from_server(verifier, prompts, CHOSEN, render, 3, tmp_path / "r", rollout(url, retries=100), 0)
  assert not (tmp_path / "r").exists()


def test_which_model(tokenizer, prompts, tmp_path):
  stub = Stub(tokenizer)
  stub.models = ["teacher", "adapter"]
  with pytest.raises(ZedaError, match=r"has 'adapter', 'teacher': choose one as config.rollout.model"):
    run(stub, prompts, tmp_path / "r")
  with pytest.raises(ZedaError, match=r"config.rollout.model is 'student', but .* has 'adapter', 'teacher'"):
    run(stub, prompts, tmp_path / "r", model="student")
  run(stub, prompts, tmp_path / "r", model="adapter")
  assert {body["model"] for body in stub.requests} == {"adapter"}


def test_room_for_prompt_and_answer(tokenizer, prompts, tmp_path):
  stub = Stub(tokenizer)
  stub.max_model_len = 3 + NEW_TOKENS
  run(stub, prompts, tmp_path / "r")
  with pytest.raises(ZedaError, match=r"holds 19 tokens .* longest prompt has 4 .*max_new_tokens is 16"):
    run(stub, prompts, tmp_path / "other", longest=4)


def test_an_answer_cut_short_is_an_error(tokenizer, prompts, tmp_path):
  stub = Stub(tokenizer)

  def change(choice, usage, body):
    if choice["finish_reason"] == "length" and body["max_tokens"] == NEW_TOKENS:
      choice.update(token_ids=choice["token_ids"][:9], text=stub.decode(choice["token_ids"][:9]))
      usage["completion_tokens"] = 9

  stub.change = change
  with pytest.raises(ZedaError, match=r"prompts.jsonl:\d+: the server ended an answer after 9 tokens"):
    run(stub, prompts, tmp_path / "r")


@pytest.mark.parametrize("kind", ["vllm", "sglang", "bare", "strict"])
def test_another_tokenizer_is_refused_before_any_work(kind, tokenizer, other_tokenizer, prompts, tmp_path):
  stub = Stub(other_tokenizer, kind)
  with pytest.raises(ZedaError, match=r"has another tokenizer than config.teacher: ids that spell"):
    run(stub, prompts, tmp_path / "r", tokenizer=tokenizer)
  assert not stub.sampled and not (tmp_path / "r").exists()


@pytest.mark.parametrize("kind", ["vllm", "bare"])
def test_a_server_that_adds_tokens_to_prompts_is_refused(kind, tokenizer, prompts, tmp_path):
  stub = Stub(tokenizer, kind)
  stub.bos = [1]
  with pytest.raises(ZedaError, match=r"another tokenizer than config.teacher: it (read a prompt|counts 65 tokens)"):
    run(stub, prompts, tmp_path / "r")


def test_a_text_tokenized_otherwise_is_refused(tokenizer, prompts, tmp_path):
  """The same vocabulary, merged otherwise: only a text shows it."""
  stub = Stub(tokenizer, "vllm")
  stub.change = lambda choice, usage, body: (
    choice["prompt_token_ids"].append(5) if isinstance(body["prompt"], str) else None
  )
  with pytest.raises(ZedaError, match="it makes other ids of a text"):
    run(stub, prompts, tmp_path / "r")


def test_a_server_that_tells_nothing_is_refused(tokenizer, prompts, tmp_path):
  stub = Stub(tokenizer, "bare")
  stub.gives_usage = False
  with pytest.raises(ZedaError, match=r"gives neither token ids nor usage\.prompt_tokens"):
    run(stub, prompts, tmp_path / "r")


def test_top_k_that_the_server_does_not_take(tokenizer, prompts, tmp_path):
  with pytest.raises(ZedaError, match=r"config.rollout.top_k is 20, which the server does not take: .*Unrecognized"):
    run(Stub(tokenizer, "strict"), prompts, tmp_path / "r", top_k=20)
  stub = Stub(tokenizer, "sampling")
  run(stub, prompts, tmp_path / "r", top_k=20)
  assert {body["top_k"] for body in stub.sampled} == {20}


def test_unverified_answers_are_left_out_and_counted(tokenizer, prompts, tmp_path):
  stub = Stub(tokenizer, "bare")

  def change(choice, usage, body):
    if body["prompt"] in (render(5), render(18)):
      usage["completion_tokens"] += 3  # it sampled other ids than those of its text

  stub.change = change
  lines = run(stub, prompts, tmp_path / "r", max_dropped=0.12)
  assert [r["index"] for r in records_of(tmp_path / "r")] == [n for n in CHOSEN if n not in (5, 18)]
  assert lines[-1].startswith("2 of 17 answers were left out: their token ids could not be verified")
  assert is_finished(tmp_path / "r", 17, 6)
  with pytest.raises(ZedaError, match=r"2 answers could not be verified, more than .*max_dropped=0.1 of 17; .*tokens"):
    run(stub, prompts, tmp_path / "less", max_dropped=0.1)
  # Those that an earlier run left out count too.
  (tmp_path / "r" / "rollouts-00002-of-00003.jsonl").unlink()
  with pytest.raises(ZedaError, match=r"2 answers could not be verified"):
    run(stub, prompts, tmp_path / "r", max_dropped=0.1)


@pytest.mark.parametrize("done_at_least", [0, 2, 7, 13])
def test_stopped_anywhere_and_continued(tokenizer, prompts, tmp_path, done_at_least):
  """Whatever progress raises leaves whole shards only, no request goes on, and the next run fills in the rest."""
  run(Stub(tokenizer), prompts, tmp_path / "whole")

  def stops(done, total):
    if done >= done_at_least:
      raise InterruptedError

  stub = Stub(tokenizer)
  stub.delay = 0.02
  threads = threading.active_count()
  with pytest.raises(InterruptedError):
    run(stub, prompts, tmp_path / "r", stops)
  whole, before = contents(tmp_path / "whole"), contents(tmp_path / "r")
  assert before.items() <= whole.items() and len(before) < 3
  stub = Stub(tokenizer)
  run(stub, prompts, tmp_path / "r")
  assert contents(tmp_path / "r") == whole
  assert len(stub.sampled) == 17 - sum(len(data.splitlines()) for data in before.values())
  assert threading.active_count() <= threads + 1


def test_stopped_while_the_server_does_not_answer(tokenizer, prompts, tmp_path):
  stub = Stub(tokenizer)
  stub.fault = lambda number, body: 30.0
  began = time.monotonic()

  def stops(done, total):
    raise InterruptedError

  with pytest.raises(InterruptedError):
    run(stub, prompts, tmp_path / "r", stops)
  assert time.monotonic() - began < 10


def test_finished_work_asks_nothing(tokenizer, prompts, tmp_path):
  run(Stub(tokenizer), prompts, tmp_path / "r")
  stub = Stub(tokenizer)
  run(stub, prompts, tmp_path / "r")
  assert not stub.sampled


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "httpx", None)
  with pytest.raises(ZedaError, match=r"needs the package httpx: pip install 'zeda-jax\[openai\]'"):
    openai_client.Client("http://localhost:1/v1")


def test_importing_the_recipe_does_not_need_it():
  code = "import sys; sys.modules['httpx'] = None; import zeda_jax.rollout.openai_server, zeda_jax.distill.recipe"
  assert pathlib.Path(REPOSITORY, "zeda_jax").is_dir()
  subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=120)
