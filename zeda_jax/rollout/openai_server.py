"""An OpenAI-compatible server that was checked before any work: which model, whose tokenizer, what it can do."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zeda_jax.errors import ZedaError
from zeda_jax.rollout.openai_answers import Answer, Unverified, Verifier, choice_of, given_ids, usage_of
from zeda_jax.rollout.openai_client import Client, Refused

# Letters of several scripts, digits, spaces and breaks, code: what tokenizers of different models cut differently.
_PROBE_TEXT = (
  "The 1234567 quick brown foxes don't jump over 3.14159 lazy dogs;\n\n\tif (x_1 >= 10) { return f(x)**2; }  "
  "Größe, naïve café, Привет мир, 你好，世界, こんにちは, 🙂\n"
)
_PROBE_IDS = 64
_PROBE_TOKENS = 8
_WORD = re.compile(r" ?[A-Za-z]+")
_FIRST_RETRIES = 3  # of the first question: a wrong address should not take minutes to show
_NOT_UNDERSTOOD = (400, 422)
# Fields beyond OpenAI's, tried in this order: those of vLLM and SGLang, those of sampling alone, none.
_OF_SAMPLING = ("top_k", "min_p", "repetition_penalty")
_OF_TOKENS = ("stop_token_ids", "skip_special_tokens", "return_token_ids", "return_tokens_as_token_ids")
EXTENSIONS: tuple[tuple[str, ...], ...] = ((*_OF_SAMPLING, *_OF_TOKENS), _OF_SAMPLING, ())


@dataclasses.dataclass(frozen=True)
class Server:
  """What the requests of a run have in common.

  Attributes:
    client: the connection.
    model: its name on the server.
    verifier: of answers.
    sampling: max_new_tokens, temperature, top_k, top_p (the recipe's `rollout` section).
    extensions: fields beyond OpenAI's that it takes, one of EXTENSIONS.
    native: whether answers come from SGLang's own /generate, which gives token ids in all versions.
    keep_logprobs: whether the log-probs that it gives are those of the model at temperature 1.
  """

  client: Client
  model: str
  verifier: Verifier
  sampling: Any
  extensions: tuple[str, ...] = EXTENSIONS[0]
  native: bool = False
  keep_logprobs: bool = True

  async def answer(self, prompt: Sequence[int], seed: int, max_tokens: int | None = None) -> Answer | Unverified:
    """One response, of config.rollout.max_new_tokens at most; an unverified one is returned as such."""
    max_tokens = self.sampling.max_new_tokens if max_tokens is None else max_tokens

    def read(value: Any) -> Answer | Unverified:
      try:
        value = from_native(value) if self.native else value
        answer = self.verifier.read(value, prompt, max_tokens)
      except Unverified as reason:
        return reason
      return answer if self.keep_logprobs else dataclasses.replace(answer, logprobs=None)

    if self.native:
      address = self.client.url.removesuffix("/v1") + "/generate"
      return await self.client.post(address, self.native_body(prompt, max_tokens, seed), read)
    return await self.client.post("/completions", self.body(prompt, max_tokens, seed), read)

  def body(self, prompt: Sequence[int] | str, max_tokens: int, seed: int = 0) -> dict[str, Any]:
    """The request: everything that a server might take from the model's generation_config.json is said."""
    body: dict[str, Any] = {
      "model": self.model,
      "prompt": prompt if isinstance(prompt, str) else list(prompt),
      "max_tokens": max_tokens,
      "temperature": float(self.sampling.temperature),
      "top_p": float(self.sampling.top_p),
      "presence_penalty": 0.0,
      "frequency_penalty": 0.0,
      "seed": seed,
      "logprobs": 0,  # the sampled tokens' alone
    }
    values: dict[str, Any] = {
      "top_k": self.sampling.top_k or -1,
      "min_p": 0.0,
      "repetition_penalty": 1.0,
      "stop_token_ids": list(self.verifier.eos_ids),
      "skip_special_tokens": False,
      "return_token_ids": True,
      "return_tokens_as_token_ids": True,  # of vLLM before it had return_token_ids
    }
    body |= {name: values[name] for name in self.extensions}
    return body

  def native_body(self, prompt: Sequence[int], max_tokens: int, seed: int) -> dict[str, Any]:
    """The same request in the words of SGLang's /generate."""
    body = dataclasses.replace(self, extensions=EXTENSIONS[0]).body(prompt, max_tokens, seed)
    same = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    sampling = {name: body[name] for name in (*same, "stop_token_ids", "skip_special_tokens")}
    sampling |= {"max_new_tokens": max_tokens, "sampling_seed": seed}
    return {"input_ids": body["prompt"], "sampling_params": sampling, "return_logprob": True}


def from_native(answer: Any) -> Any:
  """An answer of SGLang's /generate in the words of /completions; what is no such answer comes back as it is."""
  meta = answer.get("meta_info") if isinstance(answer, Mapping) else None
  meta = meta if isinstance(meta, Mapping) else {}
  tokens = meta.get("output_token_logprobs")
  if not isinstance(tokens, list) or not all(isinstance(t, list) and len(t) >= 2 for t in tokens):
    return answer
  reason = meta.get("finish_reason")
  reason = reason if isinstance(reason, Mapping) else {}
  choice = {
    "text": answer.get("text"),
    "finish_reason": reason.get("type"),
    "matched_stop": reason.get("matched"),
    "token_ids": [t[1] for t in tokens],
    "logprobs": {"token_logprobs": [t[0] for t in tokens]},
  }
  return {"choices": [choice], "usage": meta}


async def check_server(
  client: Client, verifier: Verifier, sampling: Any, model: str, longest: int
) -> tuple[Server, str]:
  """Checks that the server has the model, the room and the tokenizer that the recipe needs.

  Args:
    client: open.
    verifier: the teacher's tokenizer.
    sampling: the recipe's `rollout` section.
    model: name on the server; "" for its only one.
    longest: tokens of the longest prompt.

  Returns:
    The server, and a line about it.

  Raises:
    ZedaError: it cannot be reached or does not fit; what was found and expected is said.
  """
  card = await _model_card(client, model)
  _check_room(client, card, longest, sampling.max_new_tokens)
  owner = str(card.get("owned_by", ""))
  # SGLang's log-probs are those of the distribution at the sampling temperature; vLLM's are the model's own.
  keep = sampling.temperature in (0, 1) or owner in ("vllm", "zeda-jax")
  server = Server(client, card["id"], verifier, sampling, keep_logprobs=keep)
  ids = probe_ids(verifier)
  server, gives_ids = await _with_extensions(server, ids)
  await _check_text(server)
  answer: Answer | None = None
  if owner == "sglang" and not gives_ids:  # its /completions gives them since return_token_ids of July 2026
    native = dataclasses.replace(server, native=True)
    try:
      answer, server = await _try_answer(native, ids), native
    except Refused as error:
      if error.status not in (403, 404, 405):  # a gateway may let /v1 pass alone
        raise
  answer = answer or await _try_answer(server, ids)
  how = "token ids come from the server" if answer.from_ids else "its text is tokenized again, which loses some answers"
  kept = "log-probs kept" if answer.logprobs is not None else "no log-probs"
  return server, f"{client.url}: model {server.model}{f' ({owner})' if owner else ''}; {how}; {kept}"


async def _with_extensions(server: Server, ids: list[int]) -> tuple[Server, bool]:
  """The server with the fields that it takes, and whether it gives token ids."""
  refusal: Refused | None = None
  for extensions in EXTENSIONS:
    server = dataclasses.replace(server, extensions=extensions)
    if server.sampling.top_k and "top_k" not in extensions:
      raise ZedaError(f"config.rollout.top_k is {server.sampling.top_k}, which the server does not take: {refusal}")
    try:
      return server, await _check_ids(server, ids)
    except Refused as error:
      if error.status not in _NOT_UNDERSTOOD or extensions == EXTENSIONS[-1]:
        raise
      refusal = error
  raise AssertionError(refusal)


async def _model_card(client: Client, model: str) -> Mapping[str, Any]:
  """What the server says of the model."""
  try:
    answer = await client.get("/models", retries=min(client.retries, _FIRST_RETRIES))
  except Refused as error:
    if model and error.status in (404, 405, 501):  # not every server has the list
      return {"id": model}
    raise
  data = answer.get("data") if isinstance(answer, Mapping) else None
  cards = {c["id"]: c for c in data or () if isinstance(c, Mapping) and isinstance(c.get("id"), str)}
  if model and model not in cards:
    raise ZedaError(f"config.rollout.model is {model!r}, but {client.url} has {_listed(cards)}.")
  if not model and len(cards) != 1:
    raise ZedaError(f"{client.url} has {_listed(cards)}: choose one as config.rollout.model.")
  return cards[model or next(iter(cards))]


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
  return ", ".join(map(repr, sorted(names))) or "no model"


def _check_room(client: Client, card: Mapping[str, Any], longest: int, max_new_tokens: int) -> None:
  room = card.get("max_model_len")  # vLLM's, SGLang's and zeda serve's
  if isinstance(room, int) and longest + max_new_tokens > room:
    raise ZedaError(
      f"{client.url} holds {room} tokens of one sequence, but the longest prompt has {longest} and "
      f"config.rollout.max_new_tokens is {max_new_tokens}: raise the server's context length (vLLM --max-model-len, "
      "SGLang --context-length, zeda serve --max-length) or lower max_new_tokens."
    )


def probe_ids(verifier: Verifier) -> list[int]:
  """Ids of plain words from the whole vocabulary: another tokenizer spells them differently."""
  order = np.random.default_rng(0).permutation(min(verifier.vocab_size, len(verifier.tokenizer)))
  ids: list[int] = []
  for token in order.tolist():
    if token not in verifier.eos_ids and _WORD.fullmatch(verifier.decode([token])):
      ids.append(token)
    if len(ids) == _PROBE_IDS:
      break
  return ids or verifier.encode("word")


def _other_tokenizer(server: Server, found: str) -> ZedaError:
  return ZedaError(
    f"{server.client.url} has another tokenizer than config.teacher: {found}. Serve the teacher itself, with the "
    "tokenizer files of that directory."
  )


async def _check_ids(server: Server, ids: list[int]) -> bool:
  """Checks that ids are read as they are, and spell the same text there as here; returns whether it gives ids, too."""
  body = {k: v for k, v in server.body(ids, 1).items() if k != "logprobs"} | {"echo": True}
  choice, usage = await _ask(server.client, body)
  read, count = choice.get("prompt_token_ids"), usage.get("prompt_tokens")
  if read is not None and list(read) != ids:
    raise _other_tokenizer(server, "it read a prompt given as token ids as other ids")
  if count is not None and count != len(ids):
    raise _other_tokenizer(server, f"it counts {count} tokens in a prompt of {len(ids)} ids")
  ours, text = server.verifier.decode(ids), choice["text"]
  # Not every server echoes; one that does not gives one token's text.
  if not text.startswith(ours) and len(text) > len(ours) // 2:
    raise _other_tokenizer(server, f"ids that spell {ours[:60]!r} here spell {text[:60]!r} there")
  return given_ids(choice) is not None


async def _check_text(server: Server) -> None:
  """A text has the same ids there as here."""
  tokenizer = server.verifier.tokenizer
  ours = [server.verifier.encode(_PROBE_TEXT), list(tokenizer(_PROBE_TEXT)["input_ids"])]  # without and with BOS
  choice, usage = await _ask(server.client, server.body(_PROBE_TEXT, 1))
  read, count = choice.get("prompt_token_ids"), usage.get("prompt_tokens")
  if read is not None:
    if list(read) not in ours:
      raise _other_tokenizer(
        server, f"it makes other ids of a text, of which there are {len(read)} and here {len(ours[0])}"
      )
  elif count is None:
    raise ZedaError(
      f"{server.client.url} gives neither token ids nor usage.prompt_tokens, so its tokenizer cannot be compared with "
      "config.teacher's: use vLLM, SGLang or zeda serve."
    )
  elif count not in map(len, ours):
    raise _other_tokenizer(server, f"it makes {count} tokens of a text that has {len(ours[0])} here")


async def _ask(client: Client, body: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, int]]:
  return await client.post("/completions", body, lambda answer: (choice_of(answer), usage_of(answer)))


async def _try_answer(server: Server, prompt: list[int]) -> Answer:
  """A short sampled answer, verified like those of the run; a few attempts, for a text may have several spellings."""
  for seed in range(4):
    found = await server.answer(prompt, seed, min(_PROBE_TOKENS, server.sampling.max_new_tokens))
    if isinstance(found, Answer):
      return found
  raise ZedaError(f"{server.client.url}: its answers cannot be verified, so they cannot be learned from: {found}.")
