"""The checkpoint's tokenizer and chat template: text in, token ids out, with the checks that belong to them."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from jaxtyping import Int

from zeda_jax.data import prompts, rollouts
from zeda_jax.errors import ZedaError

Tokenizer = Any  # transformers' tokenizer classes share no typed base over its versions 4 and 5

# Each set is enough to build a tokenizer.
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
  """The tokenizer of a Hugging Face directory; no network, no code from the directory.

  Raises:
    ZedaError: the directory has no tokenizer, or one that cannot be read.
  """
  directory = pathlib.Path(directory)
  if not any(all((directory / name).is_file() for name in names) for names in _TOKENIZER_FILES):
    looked_for = " or ".join(" + ".join(names) for names in _TOKENIZER_FILES)
    raise ZedaError(f"{directory} has no tokenizer: looked for {looked_for}; copy these files from the checkpoint.")
  try:
    with _quiet_transformers():
      return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
  except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise ZedaError(f"{directory}: the tokenizer cannot be read ({reason}): restore its files.") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
  """Silences the warning that a dynamic checkpoint's model_type is unknown to transformers; nothing depends on it."""
  before = transformers.logging.get_verbosity()
  transformers.logging.set_verbosity_error()
  try:
    yield
  finally:
    transformers.logging.set_verbosity(before)


def render_prompt(
  tokenizer: Tokenizer,
  record: Mapping[str, Any],
  where: str = "prompt",
  template_options: Mapping[str, Any] | None = None,
) -> list[int]:
  """Token ids of a prompt record, up to and including what opens the assistant's turn.

  Args:
    tokenizer: with a chat template, a text prompt becomes one user message; without, it is tokenized as it is.
    record: a checked prompt record (`prompts.check_record`).
    where: "file:line" of the record, for errors.
    template_options: further variables of the template, such as {"enable_thinking": False}.

  Raises:
    ZedaError: chat messages without a chat template, a template that refuses them, or no tokens at all.
  """
  prompt = prompts.prompt_of(record)
  if tokenizer.chat_template:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    tokens = _apply_template(tokenizer, messages, where, add_generation_prompt=True, **dict(template_options or {}))
  elif isinstance(prompt, str):
    tokens = list(tokenizer(prompt)["input_ids"])
  else:
    raise ZedaError(
      f"{where}: chat messages, but the tokenizer has no chat template: give 'prompt' as a text, or add "
      "chat_template.jinja to the checkpoint."
    )
  if not tokens:
    raise ZedaError(f"{where}: the prompt has no tokens after tokenization: remove it or write a text.")
  return tokens


def _apply_template(tokenizer: Tokenizer, messages: Any, where: str, **options: Any) -> list[int]:
  try:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))
  except Exception as error:  # templates raise whatever their author chose
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise ZedaError(f"{where}: the chat template refuses these messages ({reason}): change them.") from error


def render_answer(
  tokenizer: Tokenizer,
  record: Mapping[str, Any],
  eos: Sequence[int],
  where: str = "record",
  template_options: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
  """(prompt tokens, response tokens) of a text rollout: `messages` whose last turns are the assistant's.

  The response is what the template writes after the rendered prompt, up to and including the last EOS: the line break
  that templates put after it was never sampled by a model.

  Raises:
    ZedaError: no assistant turn at the end, no chat template, or a template that renders the prompt differently when
      the answer follows (then it is unknown which tokens are the answer).
  """
  messages = record.get("messages")
  prompts.check_record(record, where)
  if not messages or messages[-1]["role"] != "assistant":
    raise ZedaError(f"{where}: 'messages' does not end with an assistant turn: expected the answer to learn from.")
  options = dict(template_options or {})
  prompt = render_prompt(tokenizer, {"messages": messages}, where, options)
  full = _apply_template(tokenizer, messages, where, add_generation_prompt=False, **options)
  if full[: len(prompt)] != prompt:
    raise ZedaError(
      f"{where}: the chat template renders the prompt differently with its answer, so the answer's tokens are unknown: "
      "sample rollouts from the teacher instead."
    )
  response = full[len(prompt) :]
  ends = [i for i, token in enumerate(response) if token in eos]
  response = response[: ends[-1] + 1] if ends else response
  if not response:
    raise ZedaError(f"{where}: the answer has no tokens: remove the record.")
  return prompt, response


def text_rollouts(
  data: prompts.Prompts,
  tokenizer: Tokenizer,
  eos: Sequence[int],
  template_options: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
  """Rollout records from text: `messages` that end with the teacher's answer, as the authors release them.

  Write them with `rollouts.write_shard`; their log-probs and zero ratio are unknown (null).

  Raises:
    ZedaError: see `render_answer`; file:line is named.
  """
  for index, record in enumerate(data):
    try:
      prompt, response = render_answer(tokenizer, record, eos, "", template_options)
    except ZedaError as error:
      raise ZedaError(data.location(index) + str(error)) from None
    yield rollouts.make_record(record, index, prompt, response, finished=response[-1] in eos)


def check_lengths(
  data: prompts.Prompts,
  tokenizer: Tokenizer,
  max_new_tokens: int,
  context: int,
  template_options: Mapping[str, Any] | None = None,
) -> Int[np.ndarray, " N"]:
  """Token counts of all prompts, after checking that each leaves room for its answer; one prompt in memory at a time.

  Args:
    data: N prompts.
    tokenizer: the checkpoint's.
    max_new_tokens: tokens to be sampled per prompt.
    context: `config.max_position_embeddings`.
    template_options: see `render_prompt`.

  Raises:
    ZedaError: prompt + max_new_tokens exceeds the context; file:line and the numbers are named.
  """
  lengths = np.zeros(len(data), np.int32)
  for index, record in enumerate(data):
    try:
      lengths[index] = length = len(render_prompt(tokenizer, record, "", template_options))
    except ZedaError as error:
      raise ZedaError(data.location(index) + str(error)) from None
    if length + max_new_tokens > context:
      raise ZedaError(
        f"{data.location(index)}: the prompt has {length} tokens, which with {max_new_tokens} new tokens makes "
        f"{length + max_new_tokens}, more than the context of {context}: shorten it or lower max_new_tokens."
      )
  return lengths


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str = "the tokenizer") -> None:
  """Checks that each token id has an embedding row.

  Raises:
    ZedaError: the largest token id is not below `vocab_size` (the config's).
  """
  token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
  if largest >= vocab_size:
    raise ZedaError(
      f"{where}: token {token!r} has id {largest}, but vocab_size is {vocab_size}: the tokenizer is another model's."
    )


def check_same_vocabulary(
  teacher: str | os.PathLike[str] | Tokenizer, student: str | os.PathLike[str] | Tokenizer
) -> None:
  """Checks that teacher and student (directories or tokenizers) give each token the same id.

  Raises:
    ZedaError: they differ; the number of differing tokens and one of them are named.
  """
  names = [str(x) if isinstance(x, (str, os.PathLike)) else "its tokenizer" for x in (teacher, student)]
  first, second = (
    (load_tokenizer(x) if isinstance(x, (str, os.PathLike)) else x).get_vocab() for x in (teacher, student)
  )
  differing = sorted(token for token in first.keys() | second.keys() if first.get(token) != second.get(token))
  if differing:
    token = differing[0]
    found = ["no id" if v.get(token) is None else f"id {v[token]}" for v in (first, second)]
    raise ZedaError(
      f"the vocabularies of teacher ({names[0]}) and student ({names[1]}) differ in {len(differing)} tokens, for "
      f"example {token!r} ({found[0]} and {found[1]}): distillation needs two checkpoints with the same tokenizer."
    )


def eos_ids(directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> tuple[int, ...]:
  """Ids that end an answer: from generation_config.json, else config.json, else the tokenizer.

  Raises:
    ZedaError: a file is broken, eos_token_id has a wrong type, or none is given anywhere.
  """
  directory = pathlib.Path(directory)
  for name in ("generation_config.json", "config.json"):
    file = directory / name
    if not file.is_file():
      continue
    try:
      value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
      raise ZedaError(f"{file} is not valid JSON ({error}): download it again or restore it.") from error
    found = value.get("eos_token_id") if isinstance(value, dict) else None
    if found is None:
      continue
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
      raise ZedaError(f"{file}: eos_token_id is {found!r}; expected a token id or a list of them.")
    return tuple(ids)
  if tokenizer is None or tokenizer.eos_token_id is None:
    raise ZedaError(
      f"{directory} names no EOS token: looked for eos_token_id in generation_config.json, config.json and "
      "the tokenizer."
    )
  return (int(tokenizer.eos_token_id),)
