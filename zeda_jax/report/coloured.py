"""Responses coloured token by token (paper, Figure 4), as data for the page."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from zeda_jax.analysis.collect import Collected


@dataclasses.dataclass(frozen=True)
class Token:
  """A token of a text.

  Attributes:
    text: what it adds to the text.
    ratio: r_ZE of the pass that predicted it; None for the first token of all.
    shade: -1 (more expert work than the mean answer token) .. 1 (less); None where ratio is.
    tip: numbers for the reader who points at it.
    in_response: whether the student wrote it.
  """

  text: str
  ratio: float | None
  shade: float | None
  tip: str
  in_response: bool


@dataclasses.dataclass(frozen=True)
class Coloured:
  family: str
  tokens: Sequence[Token]
  ratio: float  # mean of the answer


def scale(collected: Collected) -> tuple[float, float]:
  """(mean, half width) of the colours: the answers' mean r_ZE, and two standard deviations around it."""
  ratio = collected.ratio[collected.texts.in_response]
  return float(ratio.mean()), max(2 * float(ratio.std()), 1e-6)


def coloured(collected: Collected) -> list[Coloured]:
  """The kept examples, every token with the numbers of the pass that predicted it."""
  middle, width = scale(collected)
  texts, tokens, ratios = collected.texts, collected.tokens, collected.ratio
  found = []
  for example in collected.examples:
    start, prompt = int(texts.starts[example["text"]]), int(texts.prompt_lengths[example["text"]])
    line = []
    for place, piece in enumerate(example["pieces"]):
      before = start + place - 1
      if not place:
        line.append(Token(piece, None, None, "read first: no pass predicted it", False))
        continue
      ratio = float(ratios[before])
      tip = f"r_ZE {100 * ratio:.0f} %, entropy {tokens.entropy[before]:.2g} nats"
      if np.isfinite(tokens.teacher_logprob[before]):
        tip += f", log π: student {tokens.logprob[before]:.2g}, teacher {tokens.teacher_logprob[before]:.2g}"
      shade = float(np.clip((ratio - middle) / width, -1, 1))
      line.append(Token(piece, ratio, shade, tip, place >= prompt))
    answer = [t.ratio for t in line if t.in_response and t.ratio is not None]
    found.append(Coloured(example["family"], line, float(np.mean(answer)) if answer else float("nan")))
  return found


def as_rows(examples: Sequence[Coloured]) -> list[dict[str, object]]:
  """The same for a CSV."""
  return [
    {
      "example": number,
      "family": example.family,
      "place": place,
      "token": token.text,
      "part": "answer" if token.in_response else "prompt",
      "r_ze": "" if token.ratio is None else token.ratio,
    }
    for number, example in enumerate(examples, start=1)
    for place, token in enumerate(example.tokens)
  ]
