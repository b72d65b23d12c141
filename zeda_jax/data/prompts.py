"""The prompt data set: what users bring, checked once up front, read record by record afterwards."""

from collections.abc import Iterator, Mapping
from typing import Any

from zeda_jax.data import jsonl, records
from zeda_jax.errors import ZedaError

Message = dict[str, Any]


def prompt_of(record: Mapping[str, Any]) -> str | list[Message]:
  """The prompt of a record: its `prompt`, or its `messages` without the assistant turns at the end (the answer)."""
  prompt = record.get("prompt")
  if prompt is not None:
    return prompt
  messages = list(record["messages"])
  while messages and messages[-1]["role"] == "assistant":
    messages.pop()
  return messages


def check_record(record: Mapping[str, Any], where: str) -> None:
  """Checks the fields of one prompt record; keys other than `prompt` and `messages` are the user's own.

  Raises:
    ZedaError: `prompt` and `messages` are both missing, or one has the wrong type; `where` (file:line) is named.
  """
  prompt, messages = record.get("prompt"), record.get("messages")
  if prompt is None and messages is None:
    keys = ", ".join(map(repr, record)) or "none"
    raise ZedaError(f"{where}: neither 'prompt' nor 'messages' is there (keys: {keys}): add one of them.")
  if isinstance(prompt, str):
    if not prompt.strip():
      raise ZedaError(f"{where}: 'prompt' is empty: expected a text or a list of chat messages.")
  elif prompt is not None:
    _check_messages(prompt, "prompt", where)
  if messages is not None:
    _check_messages(messages, "messages", where)
    if prompt is None and not prompt_of(record):
      raise ZedaError(f"{where}: 'messages' has assistant turns only: expected a user turn to answer.")


def _check_messages(messages: Any, field: str, where: str) -> None:
  if not isinstance(messages, list):
    expected = "a text or a list of chat messages" if field == "prompt" else "a list of chat messages"
    raise ZedaError(f"{where}: '{field}' is {jsonl.type_name(messages)}; expected {expected}.")
  if not messages:
    raise ZedaError(f"{where}: '{field}' is an empty list; expected at least one chat message.")
  for i, message in enumerate(messages):
    if not isinstance(message, dict):
      raise ZedaError(f"{where}: '{field}[{i}]' is {jsonl.type_name(message)}; expected {{'role', 'content'}}.")
    for key in ("role", "content"):
      if not isinstance(message.get(key), str):
        found = jsonl.type_name(message[key]) if key in message else "missing"
        raise ZedaError(f"{where}: '{field}[{i}].{key}' is {found}; expected a text.")


class Prompts:
  """Checked prompt records; `prompts[i]` is the user's record, untouched. Use `prompt_of` for its prompt."""

  def __init__(self, source: records.Records):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._source[index]

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return iter(self._source)

  def location(self, index: int) -> str:
    """Where prompt `index` stands, as "file:line"."""
    return self._source.location(index)


def open_prompts(paths: jsonl.Paths) -> Prompts:
  """Opens prompt files (JSONL, array_record, a directory or a pattern) after checking every record in one pass.

  One record is in memory at a time.

  Raises:
    ZedaError: nothing found, an empty file, broken JSON, or a record without a usable prompt; file:line is named.
  """
  source = records.open_records(paths)
  for index, record in enumerate(source):
    try:
      check_record(record, "")
    except ZedaError as error:  # the place costs a look-up, so it is found only when it is needed
      raise ZedaError(source.location(index) + str(error)) from None
  return Prompts(source)
