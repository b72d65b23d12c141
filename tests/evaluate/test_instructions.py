"""Each kind of instruction on responses written for it: followed, and not followed."""

import sys
import types

import pytest

from zeda_jax.errors import ZedaError
from zeda_jax.evaluate import instructions
from zeda_jax.evaluate.instructions import check_known, follows, registry

pytestmark = pytest.mark.usefixtures("punkt")

ENGLISH = "this is a plain english sentence about the weather and the sea"
# instruction, its settings, a response that follows it, one that does not
CASES = [
  ("keywords:existence", {"keywords": ["sun", "sea"]}, "The sun over the sea.", "The sun over the lake."),
  ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "sea sea", "sea"),
  ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "less than"}, "sea", "sea sea"),
  ("keywords:forbidden_words", {"forbidden_words": ["rain"]}, "Sun.", "Sun and rain."),
  ("keywords:letter_frequency", {"letter": "a", "let_frequency": 3, "let_relation": "at least"}, "banana", "bench"),
  ("keywords:letter_frequency", {"letter": "a", "let_frequency": 3, "let_relation": "less than"}, "bench", "banana"),
  ("language:response_language", {"language": "de"}, "Das ist ein deutscher Satz über das Wetter.", ENGLISH),
  (
    "length_constraints:number_sentences",
    {"num_sentences": 3, "relation": "less than"},
    "It rained. It ended.",
    "It rained. It ended. We left.",
  ),
  (
    "length_constraints:number_sentences",
    {"num_sentences": 2, "relation": "at least"},
    "It rained. It ended.",
    "Rain.",
  ),
  ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\nTwo", "One\n\nTwo"),
  ("length_constraints:number_words", {"num_words": 4, "relation": "at least"}, "one two three four", "one two three"),
  ("length_constraints:number_words", {"num_words": 4, "relation": "less than"}, "one two three", "one two three four"),
  (
    "length_constraints:nth_paragraph_first_word",
    {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
    "First.\n\nThen second.",
    "Then first.\n\nSecond.",
  ),
  ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name] of [town]", "Dear [name]"),
  ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. More.", "Bye."),
  ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S. More.", "Bye.\nP.S. More."),
  ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two", "* one\n* two\n* three"),
  ("detectable_format:constrained_response", {}, "My answer is yes.", "Certainly."),
  ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and b"),
  (
    "detectable_format:multiple_sections",
    {"section_spliter": "Section", "num_sections": 2},
    "Section 1\na\nSection 2\nb",
    "Section 1\na",
  ),
  ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
  ("detectable_format:title", {}, "<<the sea>>\nIt is wet.", "The Sea\nIt is wet."),
  ("combination:two_responses", {}, "One.\n******\nTwo.", "One.\n******\nOne."),
  ("combination:repeat_prompt", {"prompt_to_repeat": "Write a poem."}, "Write a poem.\nThe sea.", "The sea."),
  ("startend:end_checker", {"end_phrase": "That is all."}, "Text. That is all.", "That is all. Text."),
  (
    "change_case:capital_word_frequency",
    {"capital_frequency": 2, "capital_relation": "at least"},
    "A BIG sea",
    "A sea",
  ),
  (
    "change_case:capital_word_frequency",
    {"capital_frequency": 1, "capital_relation": "less than"},
    "a sea",
    "A BIG sea",
  ),
  ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH.capitalize()),
  ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.capitalize()),
  ("punctuation:no_comma", {}, "One and two.", "One, two."),
  ("startend:quotation", {}, '"All of it."', "All of it."),
]


def answer(*wanted):
  names, kwargs = zip(*wanted, strict=True)
  return {"instructions": list(names), "kwargs": list(kwargs), "prompt": "the prompt"}


def test_every_kind_of_ifeval_has_a_case():
  assert {name for name, *_ in CASES} == registry("ifeval").keys() and len(registry("ifeval")) == 25


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), CASES)
def test_each_kind(name, kwargs, good, bad):
  assert follows("ifeval", answer((name, kwargs)), good) == [True]
  assert follows("ifeval", answer((name, kwargs)), bad) == [False]
  assert follows("ifeval", answer((name, kwargs)), "") == [False]


def test_several_instructions_of_one_prompt():
  wanted = answer(("punctuation:no_comma", {}), ("startend:quotation", {}))
  assert follows("ifeval", wanted, '"One, two"') == [False, True]


def test_the_same_as_the_publishers_own_function():
  from lm_eval.tasks.ifeval.utils import process_results

  for name, kwargs, *responses in CASES:
    for response in responses:
      doc = {"key": 0, "instruction_id_list": [name], "prompt": "the prompt", "kwargs": [kwargs]}
      theirs = process_results(doc, [response])["prompt_level_strict_acc"]
      assert follows("ifeval", answer((name, kwargs)), response) == [theirs], (name, response)


def test_loose_verdicts_forgive_a_first_and_a_last_line_and_asterisks(monkeypatch):
  """The rule of IFBench, with verifiers of IFEval in the place of its own."""
  monkeypatch.setattr(instructions, "registry", lambda _: registry("ifeval"))
  quoted = answer(("startend:quotation", {}))
  for response in ('"a"', 'Sure:\n"a"', '"a"\nBye', 'Sure:\n"a"\nBye', '*"a"*', 'Sure:\n**"a"**'):
    assert follows("ifbench", quoted, response) == [True], response
  for response in ("a", 'Sure: "a" it is', '\n\n"a"b\n\n', ""):
    assert follows("ifbench", quoted, response) == [False], response
  assert follows("ifeval", quoted, 'Sure:\n"a"') == [False]


def test_ifbench_verifiers_are_used_where_they_are_installed(monkeypatch):
  class Short:
    def __init__(self, name):
      self.name = name

    def build_description(self, *, most=None):
      self.most = most

    def get_instruction_args(self):
      return None

    def check_following(self, value):
      return len(value) <= self.most

  package, module = types.ModuleType("ifbench"), types.ModuleType("ifbench.instructions_registry")
  module.INSTRUCTION_DICT = {"count:short": Short}
  registry.cache_clear()
  monkeypatch.setitem(sys.modules, "ifbench", package)
  monkeypatch.setitem(sys.modules, "ifbench.instructions_registry", module)
  wanted = answer(("count:short", {"most": 3}))
  assert follows("ifbench", wanted, "abc") == [True] and follows("ifbench", wanted, "abcd") == [False]
  with pytest.raises(ZedaError, match="no verifier for count:long; known are count:short"):
    check_known("ifbench", ["count:short", "count:long"])
  registry.cache_clear()


def test_missing_verifiers_are_named(monkeypatch):
  registry.cache_clear()
  for name in instructions.REGISTRIES["ifbench"]:
    monkeypatch.setitem(sys.modules, name.partition(".")[0], None)
  with pytest.raises(ZedaError, match="pip install git"):
    registry("ifbench")
  registry.cache_clear()


def test_a_missing_sentence_model_is_named(monkeypatch):
  import nltk

  def nothing(path, *_, **__):
    raise LookupError(path)

  monkeypatch.setattr(nltk.data, "find", nothing)
  monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
  instructions.require_punkt.cache_clear()
  with pytest.raises(ZedaError, match="NLTK_DATA"):
    instructions.require_punkt()
  monkeypatch.undo()
  instructions.require_punkt()
