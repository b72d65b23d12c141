"""Problems of a benchmark, read from the records of many publishers into one shape.

The project's own schema is the first alternative of each field (docs/evaluate.md lists them all); the authors' format
has `prompt` (chat messages), `label` and `metadata`, whose entries count as fields.
"""

import base64
import binascii
import dataclasses
import hashlib
import json
import pickletools
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zeda_jax.data.jsonl import type_name
from zeda_jax.data.prompts import check_record
from zeda_jax.errors import ZedaError
from zeda_jax.evaluate.tasks import Task

LETTERS = "ABCDEFGHIJ"
_IDS = ("id", "task_id", "question_id", "unique_id", "record_id", "key", "Record ID")
_TEXTS = ("prompt", "problem", "question", "Question", "question_content", "text")
_ANSWERS = ("answer", "label", "expected_answer", "correct_letter", "solution")
_MOST_TEST_BYTES = 1 << 30  # of one problem's unpacked tests

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
  """One problem.

  Attributes:
    id: unique in its benchmark.
    prompt: the user message, or chat messages.
    answer: what its grader compares with; see the functions below.
  """

  id: str
  prompt: str | list[Message]
  answer: Any


def read_problem(record: Mapping[str, Any], task: Task, index: int, where: str) -> Problem:
  """One record as a problem of `task`.

  Args:
    record: a parsed line.
    task: whose template and grader decide what is needed.
    index: of the record, which names it where it has no id.
    where: "file:line", for errors.

  Raises:
    ZedaError: a field is missing or of the wrong type; place and field are named.
  """
  metadata = record.get("metadata")
  fields = {**metadata, **record} if isinstance(metadata, Mapping) else dict(record)
  answer, extra = _ANSWER_OF[task.grader](fields, where)
  messages = fields.get("prompt") if isinstance(fields.get("prompt"), list) else None
  if messages is None and not any(isinstance(fields.get(name), str) for name in _TEXTS):
    messages = fields.get("messages")
  if messages is not None:
    check_record({"messages": messages}, where)
    while messages and messages[-1]["role"] == "assistant":
      messages = messages[:-1]
    return Problem(_id(fields, index), messages, answer)
  text = _first(fields, _TEXTS)
  if not isinstance(text, str) or not text.strip():
    raise ZedaError(
      f"{where}: no problem: expected a text in 'prompt' (or {', '.join(_TEXTS[1:])}), or chat messages in 'prompt' or "
      "'messages'."
    )
  return Problem(_id(fields, index), task.template.format(problem=text.strip("\n"), **extra), answer)


def fingerprint(problem: Problem) -> str:
  """Changes if the problem does."""
  return hashlib.sha256(json.dumps(dataclasses.astuple(problem), sort_keys=True).encode()).hexdigest()[:12]


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
  return next((fields[name] for name in names if fields.get(name) is not None), None)


def _texts(fields: Mapping[str, Any], name: str, where: str) -> list[str]:
  found = fields.get(name) or []
  if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
    raise ZedaError(f"{where}: '{name}' is {type_name(found)}; expected a list of texts.")
  return found


def _id(fields: Mapping[str, Any], index: int) -> str:
  found = _first(fields, _IDS)
  return str(found) if isinstance(found, (str, int)) and str(found) else f"#{index}"


def _text_answer(fields: Mapping[str, Any], where: str) -> tuple[str, dict[str, str]]:
  """The right answer as text; of GSM8K's worked solutions, what follows the last ####."""
  found = _first(fields, _ANSWERS)
  if isinstance(found, bool) or not isinstance(found, (str, int, float)) or not str(found).strip():
    kind = "missing" if found is None else type_name(found)
    raise ZedaError(f"{where}: 'answer' (or 'label') is {kind}; expected the right answer, a text or a number.")
  return str(found).rpartition("####")[2].strip(), {}


def _choice(fields: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
  """{"letter", "letters"}: the right letter, and how many there are."""
  if (
    "Correct Answer" in fields
  ):  # GPQA's own columns: the choices are put in an order that depends on the question only
    choices = [
      str(fields.get(name)).strip() for name in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    ]
    right = choices[0]
    random.Random(str(fields.get("Question"))).shuffle(choices)
    found: Any = choices.index(right)
  else:
    choices = fields.get("choices") or fields.get("options") or []
    if not isinstance(choices, list) or len(choices) > len(LETTERS):
      raise ZedaError(f"{where}: 'choices' is {type_name(choices)}; expected a list of at most {len(LETTERS)} texts.")
    found = _first(fields, ("correct_letter", *_ANSWERS))
  letters = LETTERS[: len(choices)] or "".join(_texts(fields, "valid_letters", where)) or "ABCD"
  if isinstance(found, str) and found.strip().isdigit():
    found = int(found)
  if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < len(letters):
    found = letters[found]
  letter = found.strip().strip("()").upper() if isinstance(found, str) else ""
  if len(letter) != 1 or letter not in letters:
    raise ZedaError(f"{where}: 'answer' is {found!r}; expected one of the letters {letters}, or its number from 0.")
  options = "\n".join(f"{name}. {text}" for name, text in zip(letters, choices, strict=False))
  return {"letter": letter, "letters": letters}, {"options": options}


def _function(fields: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
  """{"test", "entry_point", "header"}: a program that raises if the solution is wrong, and what stands before it."""
  tests = _texts(fields, "test_list", where)
  test = _first(fields, ("test", "label"))
  if test is None and tests:
    test = "\n".join([*_texts(fields, "test_imports", where), *tests])
  if not isinstance(test, str) or not test.strip():
    raise ZedaError(f"{where}: 'test' is {type_name(test)}; expected a Python program, or 'test_list' with assertions.")
  entry = fields.get("entry_point")
  if entry is not None and not (isinstance(entry, str) and entry.isidentifier()):
    raise ZedaError(f"{where}: 'entry_point' is {entry!r}; expected the name of a function.")
  prompt = fields.get("prompt")
  header = ""
  if entry and isinstance(prompt, str):  # the imports and helpers that the function may use
    header = prompt.rpartition(f"def {entry}(")[0]
  answer = {"test": test, "entry_point": entry, "header": header, "prompt": prompt if entry else None}
  return answer, {"example": tests[0] if tests else test.strip().splitlines()[0]}


def _contest(fields: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
  """{"tests": [{"input", "output"}], "function"}: by standard input, or calls of a function where it is named."""
  tests, function = _tests(fields, where)
  if not tests:
    raise ZedaError(f"{where}: no tests: expected 'tests' with {{'input', 'output'}}, or LiveCodeBench's columns.")
  for i, test in enumerate(tests):
    if not isinstance(test, Mapping) or not all(isinstance(test.get(key), str) for key in ("input", "output")):
      raise ZedaError(f"{where}: 'tests[{i}]' is {test!r:.60}; expected {{'input', 'output'}}, both texts.")
  metadata = fields.get("metadata")
  if isinstance(metadata, str):
    metadata = _json(metadata, "metadata", where)
  function = (
    function or fields.get("function") or (metadata.get("func_name") if isinstance(metadata, Mapping) else None)
  )
  starter = fields.get("starter_code")
  if function:
    form = f"Complete this code, in one markdown code block:\n```python\n{starter or f'def {function}():'}\n```"
  else:
    form = "Read from standard input and write to standard output. Put the program in one markdown code block."
  kept = [{"input": test["input"], "output": test["output"]} for test in tests]
  return {"tests": kept, "function": function or None}, {"format": form}


def _tests(fields: Mapping[str, Any], where: str) -> tuple[list[Any], str | None]:
  tests = _first(fields, ("tests", "label"))
  if isinstance(tests, str):
    tests = _json(tests, "tests", where)
  if isinstance(tests, list):
    return tests, None
  if isinstance(tests, Mapping):  # {"inputs": [...], "outputs": [...], "fn_name": ...}
    function = tests.get("fn_name")
    plain = lambda x: x if isinstance(x, str) else json.dumps(x)
    call = lambda x: "\n".join(json.dumps(a) for a in x) if function and isinstance(x, list) else plain(x)
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
      raise ZedaError(f"{where}: 'tests' has no 'inputs' and 'outputs' that are lists of one length.")
    pairs = zip(inputs, outputs, strict=True)
    return [{"input": call(i), "output": plain(o)} for i, o in pairs], function
  found: list[Any] = []
  for name in ("public_test_cases", "private_test_cases"):
    value = fields.get(name)
    if isinstance(value, str) and value:
      value = _json(value if value.lstrip().startswith("[") else _unpack(value, name, where), name, where)
    if value is not None and not isinstance(value, list):
      raise ZedaError(f"{where}: '{name}' is {type_name(value)}; expected a list of tests.")
    found += value or []
  return found, None


def _json(text: str, field: str, where: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ZedaError(f"{where}: '{field}' is not valid JSON ({error}): download the file again.") from error


def _unpack(text: str, field: str, where: str) -> str:
  """LiveCodeBench packs its tests as base64 of zlib of a pickled text. The text is read off; nothing is unpickled."""
  harmless = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
  try:
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text, validate=True), _MOST_TEST_BYTES)
    if not unpacker.eof:
      raise ValueError("it is cut off or too large")
    found = []
    for code, argument, _ in pickletools.genops(data):
      if "UNICODE" in code.name:
        found.append(argument)
      elif code.name not in harmless:
        raise ValueError(f"it holds {code.name}, not just a text")
    if len(found) != 1 or not isinstance(found[0], str):
      raise ValueError(f"it holds {len(found)} texts")
  except (ValueError, binascii.Error, zlib.error) as error:
    raise ZedaError(f"{where}: '{field}' cannot be unpacked ({error}): download the file again.") from error
  return found[0]


def _instructions(fields: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
  """{"instructions", "kwargs", "prompt"}: the names of what is asked, their settings, and the text that asks it."""
  names, kwargs = fields.get("instruction_id_list"), fields.get("kwargs")
  if isinstance(kwargs, str):
    kwargs = _json(kwargs, "kwargs", where)
  if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
    raise ZedaError(f"{where}: 'instruction_id_list' is {type_name(names)}; expected a list of instruction names.")
  kwargs = [entry or {} for entry in kwargs] if isinstance(kwargs, list) else kwargs
  if not isinstance(kwargs, list) or len(kwargs) != len(names) or not all(isinstance(k, dict) for k in kwargs):
    raise ZedaError(f"{where}: 'kwargs' is {type_name(kwargs)}; expected a list with an object for each instruction.")
  prompt = fields.get("prompt_text") or fields.get("prompt")
  if isinstance(prompt, list):
    last = prompt[-1] if prompt else None
    prompt = last.get("content") if isinstance(last, Mapping) else None
  kept = [{key: value for key, value in entry.items() if value is not None} for entry in kwargs]
  return {"instructions": names, "kwargs": kept, "prompt": prompt if isinstance(prompt, str) else ""}, {}


_ANSWER_OF: dict[str, Callable[[Mapping[str, Any], str], tuple[Any, dict[str, str]]]] = {
  "exact": _text_answer,
  "number": _text_answer,
  "math": _text_answer,
  "choice": _choice,
  "function": _function,
  "contest": _contest,
  "ifeval": _instructions,
  "ifbench": _instructions,
}
