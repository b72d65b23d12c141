"""Token ids to text as they come: never half a character, never a part of a stop string."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_UNKNOWN = "\ufffd"  # how decoders write bytes that are not (yet) a character


class Detokenizer:
  """Joins the texts of tokens that come in parts; what all calls give together is `decode` of all tokens.

  Text that ends in an incomplete character is held back until the tokens that complete it are there.
  """

  def __init__(self, decode: Decode):
    self._decode = decode
    self._context: list[int] = []  # the tokens before, which some decoders need to place spaces
    self._new: list[int] = []

  def add(self, tokens: Sequence[int]) -> str:
    self._new += tokens
    text = self._pending()
    if text.endswith(_UNKNOWN):
      return ""
    self._keep(text)
    return text

  def finish(self) -> str:
    """What is held back, with U+FFFD for what is no character."""
    text = self._pending()
    self._keep(text)
    return text

  def _keep(self, text: str) -> None:
    self._context, self._new = self._new if text else self._context + self._new, []

  def _pending(self) -> str:
    if not self._new:
      return ""
    before = self._decode(self._context) if self._context else ""
    return self._decode(self._context + self._new)[len(before) :]


class StopFinder:
  """Cuts a text at the first stop string to be complete, however the text is cut into parts."""

  def __init__(self, stops: Sequence[str]):
    self._stops = [stop for stop in stops if stop]
    self._held = ""
    self.found: str | None = None

  def add(self, text: str) -> str:
    """What of the text so far is certain to come before any stop string, less what was given before."""
    if not self._stops:
      return text
    if self.found:
      return ""
    self._held += text
    ends = [(start + len(stop), start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
    if ends:
      _, start, self.found = min(ends)
      return self._take(start)
    return self._take(len(self._held) - max(self._overlap(stop) for stop in self._stops))

  def finish(self) -> str:
    return self._take(len(self._held))

  def _overlap(self, stop: str) -> int:
    """Length of the longest beginning of a stop string that the text ends with."""
    longest = min(len(stop) - 1, len(self._held))
    return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

  def _take(self, length: int) -> str:
    text, self._held = self._held[:length], "" if self.found else self._held[length:]
    return text


class ResponseText:
  """The text of one response.

  Args:
    decode: token ids to text.
    stops: strings that end the response, which does not hold them.
  """

  def __init__(self, decode: Decode, stops: Sequence[str] = ()):
    self._detokenizer, self._finder = Detokenizer(decode), StopFinder(stops)
    self._by_token = bool(stops)

  @property
  def stopped(self) -> str | None:
    """The stop string that ended it."""
    return self._finder.found

  def add(self, tokens: Sequence[int]) -> tuple[str, int]:
    """Text to be sent, and how many of the tokens belong to the response: all, or up to the one that completes a stop
    string."""
    if not self._by_token:
      return self._detokenizer.add(tokens), len(tokens)
    text = ""
    for count, token in enumerate(tokens, start=1):
      text += self._finder.add(self._detokenizer.add([token]))
      if self.stopped:
        return text, count
    return text, len(tokens)

  def finish(self) -> str:
    """What was held back, once no more tokens come."""
    text = self._finder.add(self._detokenizer.finish())
    return text if self.stopped else text + self._finder.finish()
