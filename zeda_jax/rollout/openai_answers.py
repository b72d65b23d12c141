"""Answers of an OpenAI-compatible server as token ids of our tokenizer, verified or refused.

Ids that the server gives must spell its text and number as many as it says it sampled. Where it gives none, its text is
tokenized: a model may sample other ids than the tokenizer would choose for the same text, so the number of ids must be
that of the sampled tokens, and where the server spells out the tokens, each must be the same.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from zeda_jax.errors import ZedaError
from zeda_jax.rollout.openai_client import Garbled

_REPLACEMENT = "\ufffd"  # stands for bytes that are no UTF-8, on which two decoders need not agree
_ID_PREFIX = "token_id:"  # how vLLM spells tokens with return_tokens_as_token_ids


class Unverified(Exception):
  """An answer whose token ids are not known for sure; the text says why."""


@dataclasses.dataclass(frozen=True)
class Answer:
  """One response.

  Attributes:
    tokens: sampled ids, up to and including the first EOS.
    logprobs: of each token as the server gives them; None where it does not, or not for all.
    finished: whether it ended with EOS.
    from_ids: whether the server gave the ids (else its text was tokenized).
  """

  tokens: list[int]
  logprobs: list[float] | None
  finished: bool
  from_ids: bool


@dataclasses.dataclass(frozen=True)
class Verifier:
  """What answers are checked against: the teacher's tokenizer, the size of its vocabulary and its EOS tokens."""

  tokenizer: Any
  vocab_size: int
  eos_ids: tuple[int, ...]

  def read(self, answer: Any, prompt: Sequence[int], max_new_tokens: int) -> Answer:
    """The answer to a prompt, from a parsed response of /completions.

    Raises:
      Garbled: it is no answer, or one that the server broke off; another attempt may give one.
      Unverified: its token ids are not certain.
      ZedaError: the server ends answers earlier than it was asked to.
    """
    choice, usage = choice_of(answer), usage_of(answer)
    self._check_prompt(choice, usage, prompt)
    reason = choice.get("finish_reason")
    if reason in (None, "abort", "error"):
      raise Garbled(f"an unfinished answer (finish_reason {reason!r})")
    if reason not in ("stop", "length"):
      raise Unverified(f"finish_reason is {reason!r}; expected 'stop' or 'length'")
    sampled, given = usage.get("completion_tokens"), given_ids(choice)
    tokens = self._check_ids(given, choice["text"], sampled) if given is not None else self._tokenize(choice, sampled)
    logprobs = logprobs_of(choice)
    if reason == "stop":
      tokens = self._with_eos(tokens, choice, sampled)
    elif len(tokens) < max_new_tokens and not set(tokens) & set(self.eos_ids):
      raise ZedaError(
        f"the server ended an answer after {len(tokens)} tokens, for its length, but was asked for {max_new_tokens} "
        f"after a prompt of {len(prompt)}: raise its context length (vLLM --max-model-len, SGLang --context-length, "
        "zeda serve --max-length), or lower config.rollout.max_new_tokens."
      )
    if logprobs is not None and len(logprobs) != len(tokens):
      logprobs = None
    # A server may know fewer EOS tokens; what was sampled before one does not depend on what follows.
    end = next((i + 1 for i, token in enumerate(tokens) if token in self.eos_ids), len(tokens))
    if end > max_new_tokens or not tokens:
      raise Unverified(f"the answer has {len(tokens)} tokens; expected 1 to {max_new_tokens}")
    tokens, logprobs = tokens[:end], None if logprobs is None else logprobs[:end]
    return Answer(tokens, logprobs, tokens[-1] in self.eos_ids, given is not None)

  def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
    return self.tokenizer.decode(
      list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )

  def encode(self, text: str) -> list[int]:
    return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

  def _check_prompt(self, choice: Mapping[str, Any], usage: Mapping[str, Any], prompt: Sequence[int]) -> None:
    read, count = choice.get("prompt_token_ids"), usage.get("prompt_tokens")
    if read is not None and list(read) != list(prompt):
      raise Unverified("the server read another prompt than the ids that were sent")
    if count is not None and count != len(prompt):
      raise Unverified(f"the server read a prompt of {count} tokens, where {len(prompt)} ids were sent")

  def _check_ids(self, tokens: list[int], text: str, sampled: int | None) -> list[int]:
    """The server's own ids, if they are of our vocabulary, as many as it sampled, and spell its text."""
    if any(isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < self.vocab_size for t in tokens):
      raise Unverified(f"a token id is not one of the vocabulary's {self.vocab_size}")
    body = tokens[:-1] if tokens and tokens[-1] in self.eos_ids else tokens
    if sampled is not None and not len(body) <= sampled <= len(body) + 1:  # either may leave EOS out
      raise Unverified(f"the server gives {len(tokens)} token ids and says it sampled {sampled}")
    # The text may have the EOS or not, and special tokens or not.
    spellings = {_plain(self.decode(t, skip)) for t in (tokens, body) for skip in (False, True)}
    if _plain(text) not in spellings:
      raise Unverified("its token ids spell another text with our tokenizer")
    return tokens

  def _tokenize(self, choice: Mapping[str, Any], sampled: int | None) -> list[int]:
    text = choice["text"]
    if _REPLACEMENT in text:
      raise Unverified("its text holds bytes that are no UTF-8")
    tokens = self.encode(text)
    if self.decode(tokens) != text:
      raise Unverified("its text is another one after tokenization and back")
    spelled = _spelled_tokens(choice)
    sampled = len(spelled) if sampled is None and spelled else sampled
    if sampled is None:
      raise Unverified("the server gives neither token ids nor the number of sampled tokens")
    ended = tokens and tokens[-1] in self.eos_ids
    # EOS counts as sampled but is rarely part of the text.
    allowed = (len(tokens),) if choice["finish_reason"] == "length" or ended else (len(tokens), len(tokens) + 1)
    if sampled not in allowed:
      raise Unverified(f"its text has {len(tokens)} tokens, but {sampled} were sampled")
    for token, spelling in zip(tokens, spelled or (), strict=False):
      ours = self.decode([token])
      if _REPLACEMENT not in ours + spelling and not spelling.startswith("bytes:") and ours != spelling:
        raise Unverified(f"it sampled {spelling!r} where its text would be tokenized as {ours!r}")
    return tokens

  def _with_eos(self, tokens: list[int], choice: Mapping[str, Any], sampled: int | None) -> list[int]:
    """The ids of an answer that ended by itself, with its EOS."""
    if set(tokens) & set(self.eos_ids):
      return tokens
    stop = choice.get("stop_reason", choice.get("matched_stop"))  # vLLM's and SGLang's
    if stop is not None and stop not in self.eos_ids:
      raise Unverified(f"the server stopped at {stop!r}, which is no EOS of the teacher ({self.eos_ids})")
    if stop is None:  # not said which: the one that ends a turn
      own = self.tokenizer.eos_token_id
      stop = own if own in self.eos_ids else self.eos_ids[0]
    return [*tokens, int(stop)]


def choice_of(answer: Any) -> Mapping[str, Any]:
  """The one choice of a response; raises Garbled if there is none."""
  choices = answer.get("choices") if isinstance(answer, Mapping) else None
  if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
    raise Garbled("an answer without choices")
  if not isinstance(choices[0].get("text"), str):
    raise Garbled("a choice without a text")
  return choices[0]


def usage_of(answer: Mapping[str, Any]) -> dict[str, int]:
  """The counts of tokens that a response names."""
  usage = answer.get("usage")
  usage = usage if isinstance(usage, Mapping) else {}
  return {k: v for k, v in usage.items() if isinstance(v, int) and not isinstance(v, bool)}


def given_ids(choice: Mapping[str, Any]) -> list[int] | None:
  """The sampled ids, where the server gives them: `token_ids`, or vLLM's spelling of tokens as ids."""
  tokens = choice.get("token_ids")
  if isinstance(tokens, list):
    return tokens
  spelled = (choice.get("logprobs") or {}).get("tokens")
  if isinstance(spelled, list) and spelled and all(isinstance(t, str) and t.startswith(_ID_PREFIX) for t in spelled):
    digits = [t.removeprefix(_ID_PREFIX) for t in spelled]
    return [int(d) if d.isdecimal() else -1 for d in digits]
  return None


def logprobs_of(choice: Mapping[str, Any]) -> list[float] | None:
  """The log-probs of the sampled tokens; None where they are missing or no log-probs."""
  values = (choice.get("logprobs") or {}).get("token_logprobs")
  if not isinstance(values, list) or not values:
    return None
  if not all(isinstance(v, int | float) and math.isfinite(v) and v <= 1e-3 for v in values):
    return None
  return [min(float(v), 0.0) for v in values]


def _spelled_tokens(choice: Mapping[str, Any]) -> list[str] | None:
  tokens = (choice.get("logprobs") or {}).get("tokens")
  return tokens if isinstance(tokens, list) and all(isinstance(t, str) for t in tokens) else None


def _plain(text: str) -> str:
  return text.replace(_REPLACEMENT, "")
