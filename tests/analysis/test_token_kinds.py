"""Kinds of tokens and pieces of text, with the demo's tokenizer and a byte-level BPE."""

import pytest

from tests.recipe_files import write_tokenizer
from zeda_jax.analysis.token_kinds import KINDS, TokenKinds, pieces
from zeda_jax.demo.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def kinds(tokenizer, text):
  tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
  found = TokenKinds(tokenizer)(tokens)
  return list(zip(pieces(tokenizer, tokens), [KINDS[k] for k in found], strict=True))


def test_demo_vocabulary():
  assert kinds(build_tokenizer(), "<|im_start|>userWrite bat, sorted.\n12<|im_end|>") == [
    ("<|im_start|>user", "special"),
    ("Write", "word start"),
    (" ", "whitespace"),
    ("b", "word start"),
    ("a", "word continuation"),
    ("t", "word continuation"),
    (",", "punctuation"),
    (" sorted", "word start"),
    (".", "punctuation"),
    ("\n", "whitespace"),
    ("1", "digits"),
    ("2", "digits"),
    ("<|im_end|>", "special"),
  ]


def test_byte_level_vocabulary(bpe):
  found = kinds(bpe, "<|im_start|>The zebras, 7 of them\n<|im_end|>")
  assert "".join(text for text, _ in found) == "<|im_start|>The zebras, 7 of them\n<|im_end|>"
  assert found[0][1] == found[-1][1] == "special"
  for place, (text, kind) in enumerate(found[1:-1], start=1):
    if text.strip().isalpha():
      before = "".join(text for text, _ in found[1:place])
      begins = text.startswith(" ") or not before[-1:].isalpha()
      assert kind == ("word start" if begins else "word continuation"), text
    elif text.strip().isdigit():
      assert kind == "digits"
    elif not text.strip():
      assert kind == "whitespace"
    else:
      assert kind == "punctuation", text
  assert {kind for _, kind in found} >= {"word start", "word continuation", "punctuation", "digits"}


@pytest.mark.parametrize("text", ["naïve 数学 🙂 end", "  two  spaces\n\n\tand tabs", "a" * 30])
def test_pieces_are_the_text(bpe, text):
  tokens = bpe(text, add_special_tokens=False)["input_ids"]
  found = pieces(bpe, tokens)
  assert len(found) == len(tokens)
  assert "".join(found) == text


def test_parts_of_characters(bpe):
  found = kinds(bpe, "🙂")
  assert [kind for _, kind in found] == ["other"] * len(found)
  assert [text for text, _ in found] == [""] * (len(found) - 1) + ["🙂"]


def test_a_text_that_ends_inside_a_character(bpe):
  tokens = bpe("a🙂", add_special_tokens=False)["input_ids"][:-1]
  assert "".join(pieces(bpe, tokens)) == bpe.decode(tokens)
