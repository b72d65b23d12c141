"""What of a response is its answer: without its reasoning, a chosen letter, a block of code."""

import re
from collections.abc import Sequence

_THINK, _END_THINK = "<think>", "</think>"
_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\(?([A-J])\)?[.:)]?\s*\}")
_STATED = re.compile(
  r"\banswer\b(?:\s+is|\s*[:=])[\s:*_$({\\]*(?:(?:boxed|text|textbf|mathrm)\s*\{\s*)*\(?([A-J])\b", re.I
)
_ALONE = re.compile(r"^[\s*_$(\[]*([A-J])(?:[\s*_$)\].:]*$|[.:)]\s)")
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.S | re.M)
_OPEN_FENCE = re.compile(r"^[ \t]*```[ \t]*[\w+-]*[^\n`]*\n(.*)\Z", re.S | re.M)


def without_reasoning(response: str, prompt_opens_reasoning: bool = False) -> str:
  """What follows the reasoning; nothing if the reasoning never ended.

  Args:
    response: decoded.
    prompt_opens_reasoning: the chat template ended with <think>, so the response begins inside it.
  """
  _, end, after = response.rpartition(_END_THINK)
  if end:
    return after.strip()
  if prompt_opens_reasoning or response.lstrip().startswith(_THINK):
    return ""
  return response


def chosen_letter(answer: str, letters: str) -> str | None:
  """The letter that a text chooses: its last boxed one, else its last "answer is X", else the last line's."""
  for pattern in (_BOXED, _STATED):
    found = [letter.upper() for letter in pattern.findall(answer) if letter.upper() in letters]
    if found:
      return found[-1]
  lines = [line for line in answer.splitlines() if line.strip()]
  for line in (lines[-1], lines[0]) if lines else ():
    match = _ALONE.match(line)
    if match and match[1] in letters:
      return match[1]
  return None


def code_of(answer: str, wanted: Sequence[str] = ()) -> str:
  """The last block of Python, if possible one that defines what is `wanted`; all of the text if there is no block.

  A block that was cut off (no closing fence) counts if it is the only one.
  """
  blocks = _FENCE.findall(answer)
  named = [text for language, text in blocks if language.lower() in ("python", "python3", "py", "")]
  candidates = named or [text for _, text in blocks]
  defining = [
    text for text in candidates if all(re.search(rf"\b(?:def|class)\s+{re.escape(w)}\b", text) for w in wanted)
  ]
  if wanted and defining:
    return defining[-1]
  if candidates:
    return candidates[-1]
  cut = _OPEN_FENCE.search(answer)
  return cut[1] if cut else answer
