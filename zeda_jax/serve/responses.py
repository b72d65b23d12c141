"""The bodies of responses, whole and in parts, as OpenAI's API has them; token ids and `stop_reason` as in vLLM's."""

import dataclasses
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from zeda_jax.serve.jobs import Delta, Finished, Job, TokenInfo
from zeda_jax.serve.protocol import Body, ChatBody, CompletionBody
from zeda_jax.serve.vocabulary import Offsets, Vocabulary


@dataclasses.dataclass
class Usage:
  """Sums over the choices of a request."""

  prompt_tokens: int
  completion_tokens: int = 0
  passes: int = 0
  zero_passes: float = 0.0

  def add(self, finished: Finished) -> None:
    self.completion_tokens += finished.num_tokens
    self.passes += finished.passes
    self.zero_passes += finished.zero_ratio * finished.passes

  def body(self) -> dict[str, Any]:
    return {
      "prompt_tokens": self.prompt_tokens,
      "completion_tokens": self.completion_tokens,
      "total_tokens": self.prompt_tokens + self.completion_tokens,
      "zero_expert_ratio": round(self.zero_passes / max(self.passes, 1), 6),
    }


@dataclasses.dataclass
class Whole:
  """All that came of one choice."""

  text: str = ""
  tokens: list[int] = dataclasses.field(default_factory=list)
  infos: list[TokenInfo] = dataclasses.field(default_factory=list)
  prompt_infos: list[TokenInfo] = dataclasses.field(default_factory=list)
  end: Finished | None = None


class Format(Protocol):
  """How one endpoint writes its answers."""

  def head(self, streamed: bool, is_first: bool = True) -> dict[str, Any]:
    """The fields beside the choices, of a whole answer or of a part."""

  def choice(self, index: int, whole: Whole) -> dict[str, Any]: ...

  def first(self) -> Iterator[dict[str, Any]]:
    """Choices that are sent before anything is known."""

  def delta(self, delta: Delta) -> dict[str, Any] | None:
    """A choice with what is new; None if that is nothing."""

  def end(self, finished: Finished) -> dict[str, Any]:
    """A choice that says why it ended."""


def _ending(end: Finished | None) -> dict[str, Any]:
  return {"finish_reason": end and end.reason, "stop_reason": end and end.stopped_by}


def _namer(body: Body, vocabulary: Vocabulary) -> Callable[[int], str]:
  """How tokens are written in lists of log-probabilities."""
  return (lambda token: f"token_id:{token}") if body.return_tokens_as_token_ids else vocabulary.text


class CompletionFormat:
  """Of /v1/completions.

  Args:
    body: what was asked.
    prompts: as tokens.
    echoed: the texts of the prompts, as far as answers hold them.
    vocabulary: of the model.
  """

  def __init__(self, body: CompletionBody, prompts: list[list[int]], echoed: list[str], vocabulary: Vocabulary):
    self._body, self._vocabulary, self._name = body, vocabulary, _namer(body, vocabulary)
    self._prompts, self._echoed = prompts, echoed
    self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    self._offsets: dict[int, Offsets] = {}
    self._started: set[int] = set()

  def head(self, streamed: bool, is_first: bool = True) -> dict[str, Any]:
    return {**self._head, "object": "text_completion"}

  def choice(self, index: int, whole: Whole) -> dict[str, Any]:
    delta = Delta(index, whole.text, whole.tokens, whole.infos, whole.prompt_infos)
    return {**(self.delta(delta) or self._choice(index, "")), **_ending(whole.end)}

  def first(self) -> Iterator[dict[str, Any]]:
    return iter(())

  def delta(self, delta: Delta) -> dict[str, Any] | None:
    text, index, ids = delta.text, delta.index, {}
    if self._body.return_token_ids:
      ids = {"token_ids": delta.tokens}
    if index not in self._started:
      text = self._echoed[index // self._body.n] + text
      ids |= {"prompt_token_ids": self._prompts[index // self._body.n]} if ids else {}
    if not (text or delta.infos or delta.prompt_infos or any(ids.values())):
      return None
    self._started.add(index)
    return self._choice(index, text, self._logprobs(delta)) | ids

  def end(self, finished: Finished) -> dict[str, Any]:
    return {**self._choice(finished.index, ""), **_ending(finished)}

  def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    made = {"index": index, "text": text, "logprobs": logprobs, **_ending(None)}
    return made | ({"token_ids": []} if self._body.return_token_ids else {})

  def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
    if self._body.logprobs is None:
      return None
    echoed = len(self._echoed[delta.index // self._body.n])
    offsets = self._offsets.setdefault(
      delta.index, Offsets(self._vocabulary, echoed, with_special=not self._body.skip_special_tokens)
    )
    of_prompt = Offsets(self._vocabulary, with_special=True)
    places = [of_prompt.place(info.id) for info in delta.prompt_infos]
    places += [offsets.place(info.id) for info in delta.infos]
    infos = [*delta.prompt_infos, *delta.infos]
    return {
      "tokens": [self._name(info.id) for info in infos],
      "token_logprobs": [info.logprob for info in infos],
      "top_logprobs": [self._top(info) for info in infos] if self._body.logprobs else None,
      "text_offset": places,
    }

  def _top(self, info: TokenInfo) -> dict[str, float] | None:
    """The alternatives, and the token itself. Of tokens with the same text the best one counts."""
    if info.logprob is None:
      return None
    found: dict[str, float] = {}
    for token, logprob in [*info.top, (info.id, info.logprob)]:
      found.setdefault(self._name(token), logprob)
    return found


class ChatFormat:
  """Of /v1/chat/completions; arguments as those of CompletionFormat."""

  def __init__(self, body: ChatBody, prompt: list[int], vocabulary: Vocabulary):
    self._body, self._vocabulary, self._name = body, vocabulary, _namer(body, vocabulary)
    self._prompt = prompt
    self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

  def head(self, streamed: bool, is_first: bool = True) -> dict[str, Any]:
    ids = {"prompt_token_ids": self._prompt} if is_first and self._body.return_token_ids else {}
    return {**self._head, "object": "chat.completion.chunk" if streamed else "chat.completion", **ids}

  def choice(self, index: int, whole: Whole) -> dict[str, Any]:
    message = {"role": "assistant", "content": whole.text, "refusal": None}
    logprobs = self._logprobs(whole.infos)
    return {"index": index, "message": message, "logprobs": logprobs, **_ending(whole.end), **self._ids(whole.tokens)}

  def first(self) -> Iterator[dict[str, Any]]:
    return (self._part(i, {"role": "assistant", "content": ""}) for i in range(self._body.n))

  def delta(self, delta: Delta) -> dict[str, Any] | None:
    if not (delta.text or delta.infos or (delta.tokens and self._body.return_token_ids)):
      return None
    part = self._part(delta.index, {"content": delta.text}, self._logprobs(delta.infos))
    return {**part, **self._ids(delta.tokens)}

  def end(self, finished: Finished) -> dict[str, Any]:
    return {**self._part(finished.index, {}), **_ending(finished), **self._ids([])}

  def _part(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, **_ending(None)}

  def _ids(self, tokens: list[int]) -> dict[str, Any]:
    return {"token_ids": tokens} if self._body.return_token_ids else {}

  def _logprobs(self, infos: list[TokenInfo]) -> dict[str, Any] | None:
    if not self._body.logprobs:
      return None
    entry = lambda token, logprob: {
      "token": self._name(token),
      "logprob": logprob,
      "bytes": self._vocabulary.bytes(token),
    }
    content = [{**entry(info.id, info.logprob), "top_logprobs": [entry(*pair) for pair in info.top]} for info in infos]
    return {"content": content, "refusal": None}


async def whole_body(job: Job, format: Format) -> dict[str, Any]:
  """The answer in one piece.

  Raises:
    ApiError: the job failed.
  """
  usage = Usage(sum(len(prompt.tokens) for prompt in job.prompts))
  choices = [Whole() for _ in range(sum(map(len, job.choices)))]
  async for event in job.events():
    choice = choices[event.index]
    if isinstance(event, Finished):
      choice.end = event
      usage.add(event)
    else:
      choice.text += event.text
      choice.tokens += event.tokens
      choice.infos += event.infos
      choice.prompt_infos += event.prompt_infos
  made = [format.choice(i, choice) for i, choice in enumerate(choices)]
  return {**format.head(False), "choices": made, "usage": usage.body()}


async def parts(job: Job, format: Format, with_usage: bool) -> Any:
  """The answer piece by piece; with `with_usage` a last piece has the usage and no choice.

  Raises:
    ApiError: the job failed.
  """
  usage = Usage(sum(len(prompt.tokens) for prompt in job.prompts))
  no_usage = {"usage": None} if with_usage else {}
  piece = lambda *choices, is_first=False: {**format.head(True, is_first), "choices": list(choices), **no_usage}
  has_begun = False
  async for event in job.events():
    if not has_begun:
      for i, choice in enumerate(format.first()):
        yield piece(choice, is_first=i == 0)
    has_begun = True
    if isinstance(event, Finished):
      usage.add(event)
      yield piece(format.end(event))
    elif (new := format.delta(event)) is not None:
      yield piece(new)
  if with_usage:
    yield {**piece(), "usage": usage.body()}
