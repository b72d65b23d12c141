import json

import pytest

from zeda_jax.data import prompts
from zeda_jax.errors import ZedaError

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def write(path, *records):
  path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
  return path


def test_accepts_the_released_fields_and_carries_the_rest(tmp_path):
  records = [
    {"prompt": "2+2?", "id": 7},
    {"prompt": [USER], "label": {"answer": 4}},
    {"messages": [USER, ANSWER], "label": None},
    {"messages": [USER, ANSWER, USER, ANSWER, ANSWER], "source": [1, {"x": None}]},
    {"prompt": None, "messages": [USER]},
  ]
  data = prompts.open_prompts(write(tmp_path / "p.jsonl", *records))
  assert list(data) == records == [data[i] for i in range(len(data))]
  assert [prompts.prompt_of(record) for record in data] == ["2+2?", [USER], [USER], [USER, ANSWER, USER], [USER]]
  assert data.location(4) == f"{tmp_path}/p.jsonl:5"


@pytest.mark.parametrize(
  ("line", "reason"),
  [
    ('{"prompt": "x"', "broken JSON"),
    ({"text": "x", "id": 1}, "neither 'prompt' nor 'messages' is there (keys: 'text', 'id')"),
    ({}, "keys: none"),
    ({"prompt": " "}, "'prompt' is empty"),
    ({"prompt": 3}, "'prompt' is a number; expected a text or a list of chat messages"),
    ({"prompt": []}, "'prompt' is an empty list"),
    ({"prompt": ["x"]}, "'prompt[0]' is a string"),
    ({"prompt": [USER, {"content": "x"}]}, "'prompt[1].role' is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "'messages[0].content' is null"),
    ({"messages": "x"}, "'messages' is a string; expected a list of chat messages"),
    ({"messages": [ANSWER]}, "assistant turns only"),
    ("[]", "found a list"),
  ],
)
def test_a_bad_record_is_named_before_any_is_used(tmp_path, line, reason):
  path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, line, {"prompt": "fine"})
  with pytest.raises(ZedaError) as error:
    prompts.open_prompts(path)
  assert str(error.value).startswith(f"{path}:2: ") and reason in str(error.value)


def test_nothing_to_read_is_an_error(tmp_path):
  with pytest.raises(ZedaError, match="matches no file"):
    prompts.open_prompts(tmp_path / "none.jsonl")
  with pytest.raises(ZedaError, match="is empty"):
    prompts.open_prompts(write(tmp_path / "p.jsonl"))
  with pytest.raises(ZedaError, match="without"):
    (tmp_path / "d").mkdir()
    prompts.open_prompts(tmp_path / "d")


def test_a_directory_stands_for_its_files(tmp_path):
  write(tmp_path / "b.jsonl", {"prompt": "b"})
  write(tmp_path / "a.jsonl", {"prompt": "a"})
  (tmp_path / "notes.txt").write_text("not data")
  assert [record["prompt"] for record in prompts.open_prompts(tmp_path)] == ["a", "b"]
