"""Three exactly gradable task families with disjoint training and held-out prompts.

* math: additions and subtractions of one to three digits and one to two;
* code: what a one-line Python program prints;
* instruction: write a word in a given case, order and layout, or arrange a list of words.

Every prompt has one right response, computed here in plain Python. A prompt belongs to the held-out part by a hash of
its text, so no training set of any size or seed can contain a held-out prompt.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

from zeda_jax.errors import ZedaError

FAMILIES = ("math", "code", "instruction")
HELD_OUT_PERCENT = 10

# English words that instruction prompts are written with: invented words must not be one of them, or the tokenizer
# would see an invented word as a single token.
RESERVED_WORDS = frozenset("write uppercase reversed sorted twice times with dashes quotes brackets list order".split())
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
# Repeated prompts in a row after which a family counts as exhausted; far beyond chance for any sensible count.
MAX_MISSES = 20000

Task = tuple[str, str]  # prompt, label
Split = Literal["train", "held_out"]


def is_held_out(prompt: str) -> bool:
  """Whether the prompt's text belongs to the held-out part, about HELD_OUT_PERCENT of all prompts."""
  return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def draws(family: str, split: Split, seed: int = 0) -> Iterator[Task]:
  """Yields endless (prompt, label) pairs of one part of a family as its generator draws them, repetitions included.

  Raises:
    ZedaError: an unknown family or split, or a part in which no prompt is found.
  """
  if family not in FAMILIES:
    raise ZedaError(f"task family is {family!r}; expected one of {', '.join(FAMILIES)}.")
  if split not in ("train", "held_out"):
    raise ZedaError(f"split is {split!r}; expected 'train' or 'held_out'.")
  rng = random.Random(f"{family}/{split}/{seed}")
  draw = _DRAW[family]
  while True:
    prompt, label = draw(rng)
    if is_held_out(prompt) == (split == "held_out"):
      yield prompt, label


def tasks(family: str, split: Split, seed: int = 0) -> Iterator[Task]:
  """Yields distinct pairs, in an order fixed by the seed; ends when the family has no new prompt left."""
  seen: set[str] = set()
  misses = 0
  for prompt, label in draws(family, split, seed):
    misses += 1
    if prompt not in seen:
      misses = 0
      seen.add(prompt)
      yield prompt, label
    elif misses >= MAX_MISSES:
      return


def generate_tasks(family: str, split: Split, count: int, seed: int = 0) -> list[dict[str, Any]]:
  """`count` distinct records of one family: {"prompt": chat messages, "label": the response, "family": the family}.

  Raises:
    ZedaError: an unknown family or split, or a family that has fewer than `count` prompts.
  """
  records = [record(family, *task) for task in itertools.islice(tasks(family, split, seed), count)]
  if len(records) < count:
    raise ZedaError(f"family {family} has only {len(records)} {split} prompts; {count} were asked for, ask for fewer.")
  return records


def mixed_tasks(split: Split, per_family: int, seed: int = 0) -> list[dict[str, Any]]:
  """Records of all families, `per_family` each, interleaved (math, code, instruction, math, ...)."""
  columns = [generate_tasks(family, split, per_family, seed) for family in FAMILIES]
  return [record for row in zip(*columns, strict=True) for record in row]


def record(family: str, prompt: str, label: str) -> dict[str, Any]:
  return {"prompt": [{"role": "user", "content": prompt}], "label": label, "family": family}


def grade(family: str, label: str, response: str) -> bool:
  """Whether a decoded response (special tokens removed) is exactly right.

  Whitespace around the response does not count. Math is compared as text too: "042" is not an answer for "42".
  """
  if family not in FAMILIES:
    raise ZedaError(f"task family is {family!r}; expected one of {', '.join(FAMILIES)}.")
  return response.strip() == label


def _number(rng: random.Random, most_digits: int) -> int:
  """An operand of each length equally often: the short ones teach the carry before the long ones need it."""
  digits = rng.randint(1, most_digits)
  return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def draw_math(rng: random.Random) -> Task:
  a, b = _number(rng, 3), _number(rng, 2)
  if rng.random() < 0.5:
    a, b = rng.choice(((a, b), (b, a)))
    return f"What is {a}+{b}?", str(a + b)
  a, b = max(a, b), min(a, b)
  return f"What is {a}-{b}?", str(a - b)


def draw_code(rng: random.Random) -> Task:
  snippet, output = rng.choice((_code_string, _code_string, _code_list, _code_list, _code_loop))(rng)
  return f"Run: {snippet}", output


def _letters(rng: random.Random, shortest: int, longest: int) -> str:
  return "".join(rng.choices(LETTERS, k=rng.randint(shortest, longest)))


def _code_string(rng: random.Random) -> Task:
  text = _letters(rng, 3, 5)
  other = _letters(rng, 2, 3)
  start = rng.randrange(0, len(text) - 1)
  stop = rng.randrange(start + 1, len(text) + 1)
  times = rng.randint(2, 4)
  return rng.choice(
    (
      (f'print("{text}"[::-1])', text[::-1]),
      (f'print("{text}"[{start}:{stop}])', text[start:stop]),
      (f'print("{text}".upper()+"{other}")', text.upper() + other),
      (f'print("{text}"+"{other}"[::-1])', text + other[::-1]),
      (f'print("{other}"*{times})', other * times),
      (f'print("".join(sorted("{text}")))', "".join(sorted(text))),
    )
  )


def _code_list(rng: random.Random) -> Task:
  numbers = [rng.randrange(10) for _ in range(rng.randint(2, 4))]
  new = rng.randrange(10)
  source = "[" + ",".join(map(str, numbers)) + "]"
  return rng.choice(
    (
      (f"print({source}[::-1])", str(numbers[::-1])),
      (f"print(sorted({source}))", str(sorted(numbers))),
      (f"print(max({source}))", str(max(numbers))),
      (f"print(min({source}))", str(min(numbers))),
      (f"x={source};x.append({new});print(x)", str([*numbers, new])),
      (f"x={source};x[1]={new};print(x)", str([numbers[0], new, *numbers[2:]])),
    )
  )


def _code_loop(rng: random.Random) -> Task:
  start, stop = sorted(rng.sample(range(20), 2))
  stop = min(stop, start + 6)
  text = _letters(rng, 2, 4)
  digits = [rng.randrange(9) for _ in range(rng.randint(2, 4))]
  source = "[" + ",".join(map(str, digits)) + "]"
  return rng.choice(
    (
      (f'for c in "{text}":print(c*2,end="")', "".join(c * 2 for c in text)),
      (f'for c in "{text}":print(c,end="-")', "".join(c + "-" for c in text)),
      (f'for i in range({start},{stop}):print(i,end="")', "".join(map(str, range(start, stop)))),
      (f'for i in {source}:print(i+1,end="")', "".join(str(i + 1) for i in digits)),
    )
  )


def _word(rng: random.Random, length: int) -> str:
  """An invented word of alternating consonants and vowels, such as "mip" or "orake"."""
  offset = rng.randrange(2) if length > 3 else 0
  while True:
    word = "".join(rng.choice(VOWELS if (i + offset) % 2 else CONSONANTS) for i in range(length))
    if word not in RESERVED_WORDS:
      return word


def draw_instruction(rng: random.Random) -> Task:
  return (_instruction_list if rng.random() < 0.25 else _instruction_word)(rng)


def _instruction_word(rng: random.Random) -> Task:
  """Case x order x layout: "Write mip in uppercase, reversed, with dashes." -> "P-I-M"."""
  word = _word(rng, rng.randint(3, 5))
  text = word
  asks = []
  if rng.random() < 0.5:
    text, asks = text.upper(), [" in uppercase"]
  order = rng.randrange(3)
  if order == 1:
    text, asks = text[::-1], [*asks, " reversed"]
  elif order == 2:
    text, asks = "".join(sorted(text)), [*asks, " sorted"]
  layout = rng.randrange(6)
  if layout == 1 or (layout == 2 and len(word) > 3):
    text, asks = f"{text},{text}", [*asks, " twice"]
  elif layout == 2:
    text, asks = f"{text},{text},{text}", [*asks, " 3 times"]
  elif layout == 3:
    text, asks = "-".join(text), [*asks, " with dashes"]
  elif layout == 4:
    text, asks = f'"{text}"', [*asks, " in quotes"]
  elif layout == 5:
    text, asks = f"[{text}]", [*asks, " in brackets"]
  return f"Write {word}{','.join(asks)}.", text


def _instruction_list(rng: random.Random) -> Task:
  """Order x layout: "List mip, dol in reversed order, numbered." -> "1.dol 2.mip"."""
  count = rng.randint(2, 3)
  initials = rng.sample(CONSONANTS, count)  # distinct, so that the first letter decides the alphabetical order
  words = [initial + rng.choice(VOWELS) + rng.choice(CONSONANTS) for initial in initials]
  if RESERVED_WORDS.intersection(words):
    return _instruction_list(rng)
  orders = [("", words), (" in reversed order", words[::-1])]
  if count == 2:
    orders.append((" in sorted order", sorted(words)))
  order, arranged = rng.choice(orders)
  prompt = f"List {', '.join(words)}{order}"
  if count == 2 and rng.random() < 0.5:
    return f"{prompt}, numbered.", " ".join(f"{i}.{word}" for i, word in enumerate(arranged, 1))
  return f"{prompt}.", ",".join(arranged)


_DRAW: dict[str, Callable[[random.Random], Task]] = {
  "math": draw_math,
  "code": draw_code,
  "instruction": draw_instruction,
}
