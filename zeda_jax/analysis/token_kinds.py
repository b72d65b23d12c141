"""Kinds of tokens: what a token is made of, and whether it begins a word. Works on any Hugging Face tokenizer."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

KINDS = ("special", "whitespace", "digits", "punctuation", "word start", "word continuation", "other")
_SPACE_MARKS = ("Ġ", "▁")  # how byte-level and SentencePiece vocabularies write a leading space
_BROKEN = "\ufffd"  # what bytes that are no whole character decode to


class TokenKinds:
  """The kind of each token of a text, as an index into KINDS.

  A word starts where letters follow white space, punctuation, digits or a special token; letters that follow letters
  without a space go on with the word. "other" is what has neither: parts of characters, mixtures such as "a1".
  """

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    self._special = frozenset(tokenizer.all_special_ids) | {token for token, text in added.items() if text.special}
    self._text = functools.lru_cache(maxsize=2**18)(self._decode)

  def _decode(self, token: int) -> str:
    symbol = self._tokenizer.convert_ids_to_tokens(token)
    text = self._tokenizer.decode([token])
    marked = isinstance(symbol, str) and symbol.startswith(_SPACE_MARKS)
    return " " + text if marked and not text[:1].isspace() else text

  def __call__(self, tokens: Sequence[int]) -> UInt8[np.ndarray, " T"]:
    kinds, in_word = np.zeros(len(tokens), np.uint8), False
    for i, token in enumerate(int(t) for t in tokens):
      if token in self._special:
        kinds[i], in_word = KINDS.index("special"), False
        continue
      text = self._text(token)
      kinds[i] = KINDS.index(_kind(text, in_word))
      in_word = bool(text) and text[-1].isalpha()
    return kinds


def _kind(text: str, in_word: bool) -> str:
  body = text.strip()
  if not body:
    return "whitespace" if text else "other"
  if _BROKEN in body:
    return "other"
  if body.isdigit():
    return "digits"
  if body[0].isalpha():
    if not all(c.isalpha() or not c.isalnum() for c in body):
      return "other"
    return "word continuation" if in_word and not text[0].isspace() else "word start"
  return "punctuation" if not any(c.isalnum() for c in body) else "other"


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
  """The text that each token adds to those before it; joined, they are the whole text.

  A token that ends inside a character adds nothing, and the one that completes it adds the character.
  """
  out: list[str] = []
  before: list[int] = []  # the last tokens whose text is out; what follows may need them for its spaces
  pending: list[int] = []
  for token in (int(t) for t in tokens):
    pending.append(token)
    shown = tokenizer.decode(before)
    text = tokenizer.decode(before + pending)[len(shown) :]
    if text.endswith(_BROKEN) and len(pending) < 4:
      out.append("")
      continue
    out.append(text)
    before, pending = pending, []
  if pending:
    out[-1] += tokenizer.decode(before + pending)[len(tokenizer.decode(before)) :]
  return out
