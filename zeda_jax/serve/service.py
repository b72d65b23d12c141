"""From checked bodies to jobs: tokens, limits, and how much may wait. Lives in the event loop."""

import asyncio
import concurrent.futures
import copy
import dataclasses
import functools
import math
import os
import time
from typing import Any

from zeda_jax.data.chat import render_prompt
from zeda_jax.errors import ZedaError
from zeda_jax.rollout.requests import Request
from zeda_jax.serve.errors import ApiError
from zeda_jax.serve.jobs import Job, Prompt
from zeda_jax.serve.protocol import Body, ChatBody, CompletionBody
from zeda_jax.serve.vocabulary import Vocabulary
from zeda_jax.serve.worker import Worker

_GREEDY_BELOW = 1e-4  # colder than this, logits overflow; the best token is drawn anyway
_UINT32 = 2**32


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """What the event loop knows of the model.

  Attributes:
    name: by which clients ask for it.
    tokenizer: the checkpoint's; used from one thread at a time.
    eos_ids: tokens that end a response.
    longest: tokens of prompt and response together.
    vocab_size: of the model.
    is_dynamic: whether it has zero experts.
    zero_expert_bias: of requests that give none.
  """

  name: str
  tokenizer: Any
  eos_ids: tuple[int, ...]
  longest: int
  vocab_size: int
  is_dynamic: bool
  zero_expert_bias: float = 0.0


class Service:
  """Makes jobs and hands them to the worker.

  Args:
    model: what is served.
    worker: runs the jobs.
    capacity: responses that may run and wait together; more are refused with 429.
  """

  def __init__(self, model: ServedModel, worker: Worker, capacity: int):
    self.model, self.worker, self.capacity = model, worker, capacity
    self.in_flight = 0  # responses admitted and not yet let go by the worker
    self.created = int(time.time())
    tokenizer = model.tokenizer
    self.vocabulary = Vocabulary(tokenizer)
    # Encoding may change a tokenizer's state, and the worker decodes at the same time.
    for_worker = copy.deepcopy(tokenizer)
    self._decode = for_worker.decode
    self._encoder = concurrent.futures.ThreadPoolExecutor(1, "tokenizer")

  # --- jobs ---------------------------------------------------------------------------------------------------------

  async def start(self, body: Body) -> Job:
    """A job that runs from now on; it must be read to its end, or canceled.

    Raises:
      ApiError: the request is wrong, or the server is full.
    """
    self.check_model(body.model)
    self._check_bias(body.zero_expert_bias)
    self._check_stop_tokens(body.stop_token_ids)
    count = body.n * (len(body.prompt) if isinstance(body, CompletionBody) else 1)
    self._admit(count)
    try:
      prompts = await asyncio.get_running_loop().run_in_executor(self._encoder, self._prompts, body)
    except BaseException:
      self._release(count)
      raise
    decode = functools.partial(self._decode, skip_special_tokens=body.skip_special_tokens)
    job = Job(prompts, body.stream, decode, lambda: self._release(count))
    self.worker.submit(job)
    return job

  def _admit(self, count: int) -> None:
    """Takes room for `count` responses.

    Raises:
      ApiError: 429 if the server is full now, 400 if it never has so much room.
    """
    if count > self.capacity:
      raise ApiError(
        400, f"The request asks for {count} responses; this server takes at most {self.capacity} at once: send fewer."
      )
    if self.in_flight + count > self.capacity:
      raise ApiError(
        429,
        f"The server is full: {self.in_flight} responses run or wait, of at most {self.capacity}: try again later.",
        code="server_full",
      )
    self.in_flight += count

  def _release(self, count: int) -> None:
    self.in_flight -= count

  def check_model(self, name: str) -> None:
    """Raises ApiError for a model that is not served."""
    if name != self.model.name:
      message = f"The model {name!r} does not exist here; this server has {self.model.name!r}."
      raise ApiError(404, message, "model", "model_not_found")

  def _check_bias(self, bias: float | None) -> None:
    if bias and math.isfinite(bias) and not self.model.is_dynamic:
      raise ApiError(400, "zero_expert_bias is given, but the model has no zero experts.", "zero_expert_bias")

  def _check_stop_tokens(self, tokens: list[int]) -> None:
    if (worst := max(tokens, default=0)) >= (vocab_size := self.model.vocab_size):
      message = f"stop_token_ids holds the token {worst}; the model's vocabulary has {vocab_size}."
      raise ApiError(400, message, "stop_token_ids")

  def _prompts(self, body: Body) -> list[Prompt]:
    if isinstance(body, CompletionBody):
      return self._completion(body)
    assert isinstance(body, ChatBody)
    return self._chat(body)

  def _completion(self, body: CompletionBody) -> list[Prompt]:
    encode = lambda text: list(self.model.tokenizer(text)["input_ids"])
    prompts = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]
    made, seed = [], self._seed(body)
    for i, tokens in enumerate(prompts):
      self._check(tokens, body.max_tokens, "prompt")
      made.append(
        Prompt(
          tokens,
          self._request(body, tokens, body.max_tokens, seed, i * body.n) if body.max_tokens else None,
          self._bias(body),
          tuple(body.stop),
          self._stop_tokens(body),
          with_infos=body.logprobs is not None,
          with_prompt_infos=body.echo and body.logprobs is not None,
          num_top=body.logprobs or 0,
        )
      )
    return made

  def _chat(self, body: ChatBody) -> list[Prompt]:
    if not self.model.tokenizer.chat_template:
      raise ApiError(400, "The model has no chat template: use /v1/completions.", "messages")
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    for message in messages:
      message["role"] = "system" if message["role"] == "developer" else message["role"]
    try:
      tokens = render_prompt(self.model.tokenizer, {"prompt": messages}, "messages", body.chat_template_kwargs)
    except ZedaError as error:
      raise ApiError(400, str(error), "messages") from error
    self._check(tokens, body.limit or 1, "messages")
    count = body.limit or self.model.longest - len(tokens)
    request = self._request(body, tokens, count, self._seed(body), 0)
    stops, stop_tokens = tuple(body.stop), self._stop_tokens(body)
    return [
      Prompt(tokens, request, self._bias(body), stops, stop_tokens, body.logprobs, False, num_top=body.top_logprobs)
    ]

  def _check(self, tokens: list[int], max_tokens: int, param: str) -> None:
    if not tokens:
      raise ApiError(400, "The prompt has no tokens; expected at least one.", param)
    if (worst := max(tokens)) >= self.model.vocab_size or (worst := min(tokens)) < 0:
      vocab_size = self.model.vocab_size
      raise ApiError(400, f"The prompt holds the token {worst}; the model's vocabulary has {vocab_size}.", param)
    if len(tokens) + max_tokens > self.model.longest:
      raise ApiError(
        400,
        f"The prompt has {len(tokens)} tokens, which with {max_tokens} new ones exceeds the {self.model.longest} that "
        "this server holds of one sequence: shorten it or ask for fewer new tokens.",
        param,
        "context_length_exceeded",
      )

  def _seed(self, body: Body) -> int:
    return int.from_bytes(os.urandom(4)) if body.seed is None else body.seed % _UINT32

  def _bias(self, body: Body) -> float:
    return self.model.zero_expert_bias if body.zero_expert_bias is None else body.zero_expert_bias

  def _request(self, body: Body, tokens: list[int], max_new_tokens: int, seed: int, stream: int) -> Request:
    return Request(
      tokens,
      max_new_tokens,
      body.temperature if body.temperature >= _GREEDY_BELOW else 0.0,
      max(body.top_k, 0),
      body.top_p,
      body.min_p,
      seed,
      stream,
      body.n,
      (*self._eos(body), *self._stop_tokens(body)),
      self._bias(body),
    )

  def _eos(self, body: Body) -> tuple[int, ...]:
    return () if body.ignore_eos else self.model.eos_ids

  def _stop_tokens(self, body: Body) -> tuple[int, ...]:
    """The request's own, each once."""
    return tuple(token for token in dict.fromkeys(body.stop_token_ids) if token not in self._eos(body))

  def echoed(self, body: CompletionBody) -> list[str]:
    """Texts of the prompts, as they were given or as their tokens are."""
    decode = lambda tokens: self.model.tokenizer.decode(tokens, skip_special_tokens=False)
    return [prompt if isinstance(prompt, str) else decode(prompt) for prompt in body.prompt]

  def close(self) -> None:
    self._encoder.shutdown(wait=False, cancel_futures=True)
