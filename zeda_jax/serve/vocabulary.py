"""Single tokens as text and bytes, for lists of log-probabilities."""

import re
from typing import Any

_UNKNOWN = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_character() -> dict[str, int]:
  """The characters by which byte-level tokenizers (GPT-2 and after) write bytes."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Vocabulary:
  """Texts and bytes of tokens, each made once."""

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    self._bytes_of = _byte_of_character()
    self.special = frozenset(tokenizer.all_special_ids)
    self._known: dict[int, tuple[str, list[int]]] = {}

  def text(self, token: int) -> str:
    """A part of a character is written as OpenAI does, for example "bytes:\\xe2\\x82"."""
    return self._entry(token)[0]

  def bytes(self, token: int) -> list[int]:
    return self._entry(token)[1]

  def _entry(self, token: int) -> tuple[str, list[int]]:
    found = self._known.get(token)
    if found is None:
      found = self._known[token] = self._make(token)
    return found

  def _make(self, token: int) -> tuple[str, list[int]]:
    text = self._tokenizer.decode([token], skip_special_tokens=False)
    if _UNKNOWN not in text:
      return text, list(text.encode())
    piece = self._tokenizer.convert_ids_to_tokens(token) or ""
    if match := _BYTE.fullmatch(piece):
      data = [int(match[1], 16)]
    elif all(character in self._bytes_of for character in piece):
      data = [self._bytes_of[character] for character in piece]
    else:
      return text, list(text.encode())
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


class Offsets:
  """Where the tokens of one text begin, in characters.

  Args:
    vocabulary: of the tokens.
    start: characters before the first.
    with_special: whether the text holds special tokens.
  """

  def __init__(self, vocabulary: Vocabulary, start: int = 0, with_special: bool = False):
    self._vocabulary, self._next, self._with_special = vocabulary, start, with_special

  def place(self, token: int) -> int:
    """Takes the next token; its place. A token that goes on with a character begins where that begins."""
    if not self._with_special and token in self._vocabulary.special:
      return self._next
    data = self._vocabulary.bytes(token)
    continues = [byte & 0xC0 == 0x80 for byte in data]  # bytes of UTF-8 that begin no character
    start = self._next
    self._next += continues.count(False)
    return max(start - 1, 0) if continues[:1] == [True] else start
