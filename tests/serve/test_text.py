"""Text that comes in parts is the text of the whole, whatever the parts; stop strings are found across them."""

import random

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from zeda_jax.serve.text import Detokenizer, ResponseText, StopFinder
from zeda_jax.serve.vocabulary import Offsets, Vocabulary

TEXT = "Größe: 3 €, 語 und 🙂🙂 – naïve façade.\n"


@pytest.fixture(scope="module")
def tokenizer():
  """A byte-level BPE, as of Qwen and GLM, too small for most characters beyond ASCII: they are several tokens."""
  backend = Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
  backend.train_from_iterator(["der die das und the of and in is es war " * 20], trainer)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=False
  )


def decoder(tokenizer):
  return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)


def parts(tokens, rng):
  tokens = list(tokens)
  while tokens:
    size = rng.randint(1, 5)
    yield tokens[:size]
    tokens = tokens[size:]


@pytest.mark.parametrize("seed", range(20))
def test_parts_make_the_whole(tokenizer, seed):
  rng = random.Random(seed)
  tokens = tokenizer(TEXT)["input_ids"]
  if seed % 2:  # not even UTF-8
    tokens = [rng.randrange(len(tokenizer)) for _ in range(60)]
  decode = decoder(tokenizer)
  detokenizer, found = Detokenizer(decode), []
  for part in parts(tokens, rng):
    found.append(detokenizer.add(part))
    assert not found[-1].endswith("\ufffd")
  assert "".join([*found, detokenizer.finish()]) == decode(tokens)
  assert seed % 2 or "\ufffd" not in "".join(found)


def test_half_a_character_is_held_back(tokenizer):
  tokens = tokenizer("a🙂b")["input_ids"]
  assert len(tokens) == 6  # the emoji is four of them
  detokenizer = Detokenizer(decoder(tokenizer))
  assert [detokenizer.add([token]) for token in tokens] == ["a", "", "", "", "🙂", "b"]
  assert detokenizer.add(tokens[1:3]) == "" and detokenizer.finish() == "\ufffd"


def cut(text, stops):
  """The truth, character by character."""
  for end in range(len(text) + 1):
    starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
    if starts:
      return text[: min(starts)], True
  return text, False


@pytest.mark.parametrize("seed", range(200))
def test_stop_strings(seed):
  rng = random.Random(seed)
  text = "".join(rng.choice("abc") for _ in range(12))
  stops = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
  finder, found = StopFinder(stops), ""
  expected, stopped = cut(text, stops)
  for part in parts(text, rng):
    found += finder.add("".join(part))
    assert expected.startswith(found)  # nothing is sent that would have to be taken back
  assert (found + finder.finish(), finder.found is not None) == (expected, stopped)
  assert not stopped or (finder.found in stops and text.startswith(expected + finder.found))


def test_tokens_up_to_the_stop(tokenizer):
  tokens = tokenizer("in the war und the war is")["input_ids"]
  decode = decoder(tokenizer)
  expected = next(i for i in range(len(tokens)) if "war un" in decode(tokens[:i]))
  for size in (1, 2, len(tokens)):
    response, text, count = ResponseText(decode, ["war un", "nowhere"]), "", 0
    for start in range(0, len(tokens), size):
      new, used = response.add(tokens[start : start + size])
      text, count = text + new, count + used
      if response.stopped:
        break
    assert (text, count, response.finish()) == ("in the ", expected, "")


def test_what_was_held_back_comes_at_the_end(tokenizer):
  response = ResponseText(decoder(tokenizer), ["the end"])
  assert response.add(tokenizer("in the")["input_ids"])[0] == "in "
  assert response.finish() == "the" and not response.stopped
  response = ResponseText(decoder(tokenizer), ["\ufffd"])  # complete only once it is known that no more bytes come
  response.add(tokenizer("a🙂")["input_ids"][:3])
  assert response.finish() == "" and response.stopped


def test_vocabulary(tokenizer):
  vocabulary = Vocabulary(tokenizer)
  tokens = tokenizer(TEXT)["input_ids"]
  assert bytes(byte for token in tokens for byte in vocabulary.bytes(token)) == TEXT.encode()
  first = next(token for token in tokens if vocabulary.text(token).startswith("bytes:"))
  assert vocabulary.text(first) == "bytes:\\xc3" and vocabulary.bytes(first) == [0xC3]
  assert vocabulary.text(tokenizer.eos_token_id) == "<end>"


def test_offsets(tokenizer):
  tokens = [tokenizer.eos_token_id, *tokenizer("a🙂 the")["input_ids"]]
  vocabulary = Vocabulary(tokenizer)
  offsets = Offsets(vocabulary, start=10)
  assert [offsets.place(token) for token in tokens] == [10, 10, 11, 11, 11, 11, 12]
  offsets = Offsets(vocabulary, with_special=True)
  assert [offsets.place(token) for token in tokens] == [0, 5, 6, 6, 6, 6, 7]
