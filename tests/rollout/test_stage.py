"""Rollouts: every prompt once, in shards that are whole or absent, the same however often the stage is stopped."""

import types

import pytest

from tests.recipe_files import everything
from tests.tiny_models import tiny_model
from zeda_jax.data.jsonl import JsonLines, write_jsonl
from zeda_jax.data.prompts import open_prompts
from zeda_jax.errors import ZedaError
from zeda_jax.rollout import stage
from zeda_jax.rollout.stage import is_finished, num_shards, sample_rollouts

CHOSEN = [n for n in range(23) if n % 4]  # numbers of the prompts to answer: 17 of 23


@pytest.fixture(scope="module")
def model():
  return tiny_model(eos_token_ids=(5,))


@pytest.fixture
def prompts(tmp_path):
  file = tmp_path / "prompts.jsonl"
  write_jsonl(file, ({"prompt": f"prompt {n}", "label": n} for n in range(23)))
  return open_prompts(file)


def settings(**changes):
  values = {"max_new_tokens": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "batch_size": 4}
  values |= {"shard_size": 6, "cache_tokens": 0}
  return types.SimpleNamespace(**(values | changes))


def render(number):
  return [1 + number, 2, 3]


def run(model, prompts, directory, progress=lambda done, total, note="": None, seed=0, **changes):
  sample_rollouts(model, prompts, CHOSEN, render, 3, directory, settings(**changes), seed, progress)


def contents(directory):
  return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_every_chosen_prompt_once_in_order(model, prompts, tmp_path):
  seen = []
  run(model, prompts, tmp_path / "r", lambda done, total, note="": seen.append((done, total)))
  assert sorted(contents(tmp_path / "r")) == [f"rollouts-0000{i}-of-00003.jsonl" for i in range(3)]
  records = [r for file in sorted((tmp_path / "r").iterdir()) for r in JsonLines(file)]
  assert [r["index"] for r in records] == CHOSEN
  for record in records:
    assert record["prompt_tokens"] == render(record["index"])
    assert (record["prompt"], record["label"]) == (f"prompt {record['index']}", record["index"])
    assert 1 <= len(record["response_tokens"]) == len(record["logprobs"]) <= 4
    assert record["finished"] == (record["response_tokens"][-1] == 5)
  assert is_finished(tmp_path / "r", 17, 6)
  dones = [done for done, _ in seen]
  assert dones == sorted(dones) and dones[0] == 0 and dones[-1] == 17 and {total for _, total in seen} == {17}


def test_the_batch_size_changes_nothing(model, prompts, tmp_path):
  run(model, prompts, tmp_path / "a")
  run(model, prompts, tmp_path / "b", batch_size=7)
  for file in (tmp_path / "a").iterdir():
    pairs = zip(JsonLines(file), JsonLines(tmp_path / "b" / file.name), strict=True)
    for one, two in pairs:
      assert one["response_tokens"] == two["response_tokens"]
      assert one["logprobs"] == pytest.approx(two["logprobs"], abs=1e-5)


def test_the_seed_changes_the_answers(model, prompts, tmp_path):
  run(model, prompts, tmp_path / "a")
  run(model, prompts, tmp_path / "b", seed=1)
  assert contents(tmp_path / "a") != contents(tmp_path / "b")


@pytest.mark.parametrize("calls", range(2, 8))
def test_stopped_anywhere_and_continued(model, prompts, tmp_path, calls):
  """Whatever progress raises leaves whole shards only; the next run fills in the rest."""
  run(model, prompts, tmp_path / "whole")
  left = calls

  def stops(done, total, note=""):
    nonlocal left
    left -= 1
    if not left:
      raise InterruptedError

  with pytest.raises(InterruptedError):
    run(model, prompts, tmp_path / "r", stops)
  whole = contents(tmp_path / "whole")
  assert contents(tmp_path / "r").items() <= whole.items()
  assert not is_finished(tmp_path / "r", 17, 6) or len(contents(tmp_path / "r")) == 3
  run(model, prompts, tmp_path / "r")
  assert contents(tmp_path / "r") == whole


def test_what_a_killed_run_left_is_replaced(model, prompts, tmp_path):
  run(model, prompts, tmp_path / "r")
  whole = contents(tmp_path / "r")
  (tmp_path / "r" / "rollouts-00001-of-00003.jsonl").unlink()
  (tmp_path / "r" / ".rollouts-00001-of-00003.jsonl.partial").write_text('{"index": 6, "prom')
  assert not is_finished(tmp_path / "r", 17, 6)
  run(model, prompts, tmp_path / "r")
  assert contents(tmp_path / "r") == whole


def test_finished_work_is_not_done_again(model, prompts, tmp_path, monkeypatch):
  run(model, prompts, tmp_path / "r")
  monkeypatch.setattr(stage, "engine_for", lambda *args, **options: pytest.fail("sampled again"))
  run(model, prompts, tmp_path / "r")


def test_another_number_of_shards_is_refused(model, prompts, tmp_path):
  run(model, prompts, tmp_path / "r")
  before = everything(tmp_path)
  with pytest.raises(ZedaError, match="3 shards"):
    run(model, prompts, tmp_path / "r", shard_size=17)
  assert everything(tmp_path) == before


@pytest.mark.parametrize(("count", "size", "expected"), [(1, 512, 1), (512, 512, 1), (513, 512, 2), (7, 1, 7)])
def test_number_of_shards(count, size, expected):
  assert num_shards(count, size) == expected
