"""The task families: right labels by independent means, deterministic, unique, held-out prompts never in training."""

import contextlib
import io
import re

import pytest

from zeda_jax.demo import families
from zeda_jax.errors import ZedaError

COUNT = 1600


def _content(record):
  (message,) = record["prompt"]
  assert message["role"] == "user"
  return message["content"]


@pytest.fixture(scope="module", params=families.FAMILIES)
def family(request):
  return request.param


def test_same_seed_gives_the_same_tasks_and_another_seed_others(family):
  first = families.generate_tasks(family, "train", 200, seed=3)
  assert first == families.generate_tasks(family, "train", 200, seed=3)
  assert first == families.generate_tasks(family, "train", 300, seed=3)[:200]
  assert first != families.generate_tasks(family, "train", 200, seed=4)


def test_first_tasks_are_fixed_across_versions():
  """The shipped teacher's split depends on these: a change here calls for a new teacher."""
  found = [_content(r) for r in families.mixed_tasks("held_out", 2)]
  assert found == EXPECTED_FIRST


EXPECTED_FIRST = [
  *("What is 4-1?", "Run: x=[2,9,4];x[1]=8;print(x)", "List hal, pul in reversed order, numbered."),
  *("What is 69+270?", 'Run: for c in "gf":print(c*2,end="")', "Write gunix in uppercase, sorted, twice."),
]


def test_prompts_are_unique_and_held_out_ones_are_in_no_training_set(family):
  held_out = {_content(r) for r in families.generate_tasks(family, "held_out", 2 * COUNT, seed=0)}
  assert len(held_out) == 2 * COUNT
  for seed in (0, 1):
    train = {_content(r) for r in families.generate_tasks(family, "train", 20000, seed=seed)}
    assert len(train) == 20000
    assert not train & held_out
    assert not any(families.is_held_out(prompt) for prompt in train)
  assert all(families.is_held_out(prompt) for prompt in held_out)


def test_math_labels():
  for record in families.generate_tasks("math", "held_out", COUNT):
    prompt = _content(record)
    a, b = map(int, re.findall(r"\d+", prompt))
    expected = a + b if "+" in prompt else a - b
    assert record["label"] == str(expected), prompt
    assert expected >= 0


def test_code_labels_are_what_python_prints():
  for record in families.generate_tasks("code", "held_out", COUNT):
    source = _content(record).removeprefix("Run: ")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(source, {})  # our own generator's one-liners
    assert printed.getvalue().removesuffix("\n") == record["label"], source


def _expected_word(prompt):
  word, *asks = re.fullmatch(r"Write (\w+),? ?(.*)\.", prompt).groups()
  asks = [ask for ask in re.split(r",\s*|(?<=uppercase)\s|(?<=reversed)\s|(?<=sorted)\s", asks[0]) if ask]
  for ask in asks:
    match ask:
      case "in uppercase":
        word = word.upper()
      case "reversed":
        word = "".join(reversed(word))
      case "sorted":
        word = "".join(sorted(word))
      case "twice":
        word = ",".join([word] * 2)
      case "3 times":
        word = ",".join([word] * 3)
      case "with dashes":
        word = "-".join(word)
      case "in quotes":
        word = f'"{word}"'
      case "in brackets":
        word = f"[{word}]"
      case _:
        raise AssertionError(f"unknown ask {ask!r} in {prompt!r}")
  return word


def _expected_list(prompt):
  words = re.findall(r"\b[a-z]{3}\b", prompt)
  if "reversed order" in prompt:
    words = words[::-1]
  elif "sorted order" in prompt:
    words = sorted(words)
  if "numbered" in prompt:
    return " ".join(f"{i + 1}.{word}" for i, word in enumerate(words))
  return ",".join(words)


def test_instruction_labels():
  kinds = set()
  for record in families.generate_tasks("instruction", "held_out", COUNT):
    prompt = _content(record)
    kinds.add(re.sub(r"\b[a-z]{3}\b|(?<=Write )\w+", "*", prompt))
    expected = _expected_list(prompt) if prompt.startswith("List") else _expected_word(prompt)
    assert record["label"] == expected, prompt
  assert len(kinds) > 40  # every case x order x layout, and the lists


def test_grading_is_exact(family):
  records = families.generate_tasks(family, "train", 50)
  for record in records:
    label = record["label"]
    assert families.grade(family, label, label)
    assert families.grade(family, label, f" {label}\n")
    assert not families.grade(family, label, label + "1")
    assert not families.grade(family, label, label[:-1])
    assert not families.grade(family, label, "")


def test_mixed_tasks_interleave_the_families():
  records = families.mixed_tasks("train", 5, seed=1)
  assert [r["family"] for r in records] == list(families.FAMILIES) * 5
  assert [r for r in records if r["family"] == "code"] == families.generate_tasks("code", "train", 5, seed=1)


def test_bad_requests_are_sentences(monkeypatch):
  with pytest.raises(ZedaError, match="task family is 'maths'"):
    families.generate_tasks("maths", "train", 1)
  with pytest.raises(ZedaError, match="split is 'test'"):
    families.generate_tasks("math", "test", 1)
  with pytest.raises(ZedaError, match="task family is 'maths'"):
    families.grade("maths", "1", "1")
  monkeypatch.setattr(families, "_DRAW", {"math": lambda rng: (f"{rng.randrange(10)}", "1")})
  with pytest.raises(ZedaError, match="math has only"):
    families.generate_tasks("math", "train", 100)
