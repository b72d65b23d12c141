"""Records of each publisher as problems, and what is said of broken ones."""

import base64
import json
import pathlib
import pickle
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeda_jax.errors import ZedaError
from zeda_jax.evaluate.problems import Problem, fingerprint, read_problem
from zeda_jax.evaluate.sources import load_problems
from zeda_jax.evaluate.tasks import TASKS, Task


def read(task, record):
  return read_problem(record, TASKS[task], 7, "file:3")


MATH_PROMPT = "What is 1+1?\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize(
  ("record", "answer"),
  [
    ({"prompt": "What is 1+1?", "answer": "2"}, "2"),
    ({"question": "What is 1+1?", "answer": "One and one is <<1+1=2>>2.\n#### 2"}, "2"),
    ({"problem": "What is 1+1?", "solution": "It is $\\boxed{2}$.", "answer": "2", "unique_id": "test/1"}, "2"),
    ({"problem": "What is 1+1?", "answer": 2}, "2"),
    ({"text": "What is 1+1?", "expected_answer": "2"}, "2"),
    ({"prompt": "What is 1+1?", "label": "2", "metadata": {"id": "a"}}, "2"),
  ],
)
def test_mathematics(record, answer):
  problem = read("gsm8k", record)
  assert (problem.prompt, problem.answer) == (MATH_PROMPT, answer)
  assert problem.id in ("#7", "test/1", "a")


def test_the_authors_format():
  messages = [{"role": "user", "content": "What is 1+1? Box it."}]
  assert read("aime24", {"prompt": messages, "label": "2", "id": 3}) == Problem("3", messages, "2")
  assert (
    read("aime24", {"messages": [*messages, {"role": "assistant", "content": "2"}], "label": "2"}).prompt == messages
  )
  metadata = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"x": None}], "record_id": 9}
  assert read("ifeval", {"prompt": messages, "label": "", "metadata": metadata}) == Problem(
    "9", messages, {"instructions": ["punctuation:no_comma"], "kwargs": [{}], "prompt": "What is 1+1? Box it."}
  )
  metadata = {"choices": ["a", "b"], "correct_letter": "B"}
  assert read("gpqa_diamond", {"prompt": messages, "label": "b", "metadata": metadata}).answer["letter"] == "B"


def test_choices():
  record = {"question": "Where?", "choices": ["here", "there", "nowhere", "all"], "answer": 2}
  problem = read("mmlu_redux", record)
  assert problem.answer == {"letter": "C", "letters": "ABCD"}
  assert problem.prompt.startswith("Where?\n\nA. here\nB. there\nC. nowhere\nD. all\n\n")
  for answer in ("C", "(c)", "2"):
    assert read("mmlu_redux", record | {"answer": answer}).answer == problem.answer
  gpqa = {"Question": "Where?", "Correct Answer": "here\n", **{f"Incorrect Answer {i}": f"no {i}" for i in (1, 2, 3)}}
  problem = read("gpqa_diamond", gpqa)
  assert f"{problem.answer['letter']}. here\n" in problem.prompt + "\n" and problem == read("gpqa_diamond", gpqa)
  letters = {read("gpqa_diamond", gpqa | {"Question": f"Where {i}?"}).answer["letter"] for i in range(40)}
  assert letters == set("ABCD")


LIVE = {"question_content": "Add.", "question_id": "q1", "starter_code": "", "metadata": "{}"}
TESTS = [{"input": "1 2", "output": "3", "testtype": "stdin"}]


def packed(value):
  return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_livecodebench():
  public = json.dumps(TESTS)
  private = packed(json.dumps([{"input": "4 5", "output": "9", "testtype": "stdin"}]))
  problem = read("livecodebench_v6", LIVE | {"public_test_cases": public, "private_test_cases": private})
  assert problem.id == "q1" and "standard input" in problem.prompt
  assert problem.answer["tests"] == [{"input": "1 2", "output": "3"}, {"input": "4 5", "output": "9"}]
  record = LIVE | {"metadata": '{"func_name": "add"}', "starter_code": "class Solution:\n  def add(self):"}
  problem = read("livecodebench_v6", record | {"public_test_cases": public, "private_test_cases": "[]"})
  assert problem.answer["function"] == "add" and "class Solution:\n  def add(self):" in problem.prompt
  label = json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]})
  assert read("livecodebench_v6", {"prompt": "Add.", "label": label}).answer == {
    "tests": [{"input": "1\n2", "output": "3"}],
    "function": "add",
  }


class Evil:
  def __reduce__(self):
    return (print, ("executed",))


@pytest.mark.parametrize("value", [Evil(), ["[]", "[]"], b"[]", {"a": "[]"}, 5])
def test_packed_tests_are_never_unpickled(value, capsys):
  with pytest.raises(ZedaError, match="'private_test_cases' cannot be unpacked"):
    read("livecodebench_v6", LIVE | {"private_test_cases": packed(value)})
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["AAAA", "not base64!", base64.b64encode(zlib.compress(b"x" * 99)[:-3]).decode()])
def test_damaged_tests(text):
  with pytest.raises(ZedaError, match="cannot be unpacked"):
    read("livecodebench_v6", LIVE | {"private_test_cases": text})


@pytest.mark.parametrize(
  ("task", "record", "message"),
  [
    ("gsm8k", {"answer": "2"}, "file:3: no problem: expected a text in 'prompt'"),
    ("gsm8k", {"prompt": " ", "answer": "2"}, "no problem"),
    ("gsm8k", {"prompt": "x"}, "'answer' \\(or 'label'\\) is missing"),
    ("gsm8k", {"prompt": "x", "answer": ["2"]}, "is a list; expected the right answer"),
    ("gsm8k", {"prompt": [], "answer": "2"}, "is an empty list"),
    ("gsm8k", {"prompt": [{"role": "user"}], "answer": "2"}, "content' is missing"),
    (
      "mmlu_redux",
      {"prompt": "x", "choices": ["a", "b"], "answer": 2},
      "'answer' is 2; expected one of the letters AB",
    ),
    ("mmlu_redux", {"prompt": "x", "choices": "ab", "answer": "A"}, "'choices' is a string"),
    ("mmlu_redux", {"prompt": "x", "choices": ["a", "b"]}, "'answer' is None"),
    ("humaneval_plus", {"prompt": "x"}, "'test' is null; expected a Python program"),
    ("humaneval_plus", {"prompt": "x", "test": "y", "entry_point": "a b"}, "'entry_point' is 'a b'"),
    ("livecodebench_v5", {"prompt": "x"}, "no tests"),
    ("livecodebench_v5", {"prompt": "x", "tests": [{"input": 1}]}, "'tests\\[0\\]' is"),
    ("livecodebench_v5", {"prompt": "x", "tests": "[{]"}, "'tests' is not valid JSON"),
    ("ifeval", {"prompt": "x", "kwargs": []}, "'instruction_id_list' is null"),
    (
      "ifeval",
      {"prompt": "x", "instruction_id_list": ["a"], "kwargs": []},
      "'kwargs' is a list; expected a list with an",
    ),
  ],
)
def test_broken_records(task, record, message):
  with pytest.raises(ZedaError, match=message):
    read(task, record)


def write(file, records):
  file.write_text("".join(json.dumps(record) + "\n" for record in records))
  return file


def test_files(tmp_path):
  records = [{"prompt": f"{i}?", "answer": i, "id": f"p{i}"} for i in range(5)]
  write(tmp_path / "gsm8k.jsonl", records)
  found = load_problems(TASKS["gsm8k"], tmp_path)
  assert [problem.id for problem in found] == ["p0", "p1", "p2", "p3", "p4"]
  assert load_problems(TASKS["gsm8k"], tmp_path, limit=2) == found[:2]
  (tmp_path / "aime24").mkdir()
  write(tmp_path / "aime24" / "a.jsonl", records[:2])
  write(tmp_path / "aime24" / "b.jsonl", records[2:])
  assert [problem.id for problem in load_problems(TASKS["aime24"], tmp_path)] == [problem.id for problem in found]
  assert load_problems(TASKS["aime25"], None, str(tmp_path / "gsm8k.jsonl"), 1)[0].answer == "0"
  with pytest.raises(ZedaError, match=r"math500.jsonl nor .*--source=math500=FILE"):
    load_problems(TASKS["math500"], tmp_path)
  with pytest.raises(ZedaError, match="is no directory"):
    load_problems(TASKS["math500"], tmp_path / "nowhere")
  write(tmp_path / "math500.jsonl", [*records, records[1]])
  with pytest.raises(ZedaError, match=r"math500.jsonl:6: the id 'p1' is also that of .*math500.jsonl:2"):
    load_problems(TASKS["math500"], tmp_path)


def test_questions_that_reviewers_found_wrong_are_left_out(tmp_path):
  record = {"question": "Where?", "choices": ["a", "b"], "answer": 0}
  kinds = ("ok", "wrong_groundtruth", "ok")
  write(tmp_path / "mmlu_redux.jsonl", [record | {"error_type": kind, "id": i} for i, kind in enumerate(kinds)])
  assert [problem.id for problem in load_problems(TASKS["mmlu_redux"], tmp_path)] == ["0", "2"]


def test_families_of_the_demo():
  found = load_problems(TASKS["demo_math"], limit=5)
  assert len(found) == 5 and all(isinstance(problem.prompt, list) for problem in found)


def test_without_a_network_the_place_is_named(monkeypatch):
  datasets = pytest.importorskip("datasets")

  def offline(*_, **__):
    raise ConnectionError("no route to host")

  monkeypatch.setattr(datasets, "load_dataset", offline)
  with pytest.raises(ZedaError, match=r"hf:openai/gsm8k:main:test cannot be loaded \(no route to host\).*--data=DIR"):
    load_problems(TASKS["gsm8k"])


def test_the_hub_by_name(monkeypatch):
  datasets = pytest.importorskip("datasets")
  asked = []

  def table(name, config, split):
    asked.append((name, config, split))
    return [{"question": f"{config}?", "choices": ["a", "b"], "answer": 1}]

  monkeypatch.setattr(datasets, "load_dataset", table)
  monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["law", "art"])
  assert [p.id for p in load_problems(TASKS["mmlu_redux"])] == ["law/0", "art/0"]
  assert asked == [("edinburgh-dawg/mmlu-redux-2.0", name, "test") for name in ("law", "art")]


def test_tfds_by_name(monkeypatch):
  import numpy as np
  import tensorflow_datasets as tfds

  record = {"question": b"1+1?", "answer": b"#### 2", "number": np.int64(3), "list": np.array([b"a"])}
  monkeypatch.setattr(tfds, "data_source", lambda name, split: [record] if (name, split) == ("gsm8k", "train") else [])
  assert load_problems(TASKS["gsm8k"], source="tfds:gsm8k/train")[0].answer == "2"


def test_a_changed_problem_has_another_fingerprint():
  prints = {fingerprint(p) for p in (Problem("a", "x", "1"), Problem("a", "y", "1"), Problem("a", "x", "2"))}
  assert len(prints) == 3 and fingerprint(Problem("a", "x", "1")) in prints


def test_unknown_graders_are_refused():
  with pytest.raises(ZedaError, match="grader is 'taste'"):
    Task("mine", "Mine", "taste", "{problem}")


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
  max_leaves=8,
)
FIELDS = st.sampled_from(
  "id prompt problem question messages answer label metadata choices test test_list entry_point tests kwargs "
  "instruction_id_list public_test_cases private_test_cases starter_code error_type Question function options".split()
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(FIELDS, JSON, max_size=6), st.sampled_from(sorted(TASKS)))
def test_any_record_is_a_problem_or_an_error_that_names_its_place(record, name):
  try:
    problem = read(name, record)
  except ZedaError as error:
    assert "file:3" in str(error)
  else:
    assert problem.id and (isinstance(problem.prompt, str) or problem.prompt[-1]["role"] != "assistant")
    fingerprint(problem)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=8), st.integers(0, 3))
def test_any_texts_survive_a_file(tmp_path_factory, pairs, blank):
  pairs = [
    (problem, answer) for problem, answer in pairs if problem.strip() and answer.strip() and "####" not in answer
  ]
  if not pairs:
    return
  file = tmp_path_factory.mktemp("any") / "mine.jsonl"
  lines = [json.dumps({"prompt": problem, "answer": answer}) + "\n" * (1 + blank) for problem, answer in pairs]
  file.write_text("".join(lines), encoding="utf-8")
  found = load_problems(Task("mine", "Mine", "exact", "{problem}"), source=str(file))
  assert [(p.prompt, p.answer) for p in found] == [(problem.strip("\n"), answer.strip()) for problem, answer in pairs]


def test_the_examples_of_the_documentation():
  page = pathlib.Path(__file__).parents[2].joinpath("docs", "evaluate.md").read_text()
  lines = page.partition("```json\n")[2].partition("```")[0].splitlines()
  tasks = ("aime24", "aime24", "gpqa_diamond", "livecodebench_v6")
  problems = [read(name, json.loads(line)) for name, line in zip(tasks, lines, strict=True)]
  assert [problem.id for problem in problems] == ["aime-1", "aime-1", "#7", "#7"]
  assert problems[1].answer == "204" and problems[2].answer["letter"] == "A"
