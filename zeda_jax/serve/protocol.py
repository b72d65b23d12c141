"""The bodies of requests, as OpenAI's API has them: checked in full, and what is not supported is refused.

Beside OpenAI's fields there are `zero_expert_bias` and some that vLLM and SGLang have, with their meaning: `top_k`,
`min_p`, `ignore_eos`, `stop_token_ids`, `skip_special_tokens`, `return_token_ids`, `return_tokens_as_token_ids` and
`chat_template_kwargs`.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from zeda_jax.serve.errors import ApiError
from zeda_jax.serve.scoring import MAX_TOP

MAX_STOPS = 16
MAX_BIAS = 1e4  # more would change nothing, and in the end overflow

# Fields of OpenAI's API that cannot change the answer here: accepted and not read.
_NOT_READ = frozenset(
  "user metadata safety_identifier prompt_cache_key prompt_cache_retention service_tier parallel_tool_calls".split()
)
# Fields that ask for what this server does not do, with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
  "audio": (),
  "frequency_penalty": (0,),
  "function_call": ("none", "auto"),
  "functions": ([],),
  "logit_bias": ({},),
  "modalities": (["text"],),
  "moderation": (),
  "prediction": (),
  "presence_penalty": (0,),
  "reasoning_effort": (),
  "repetition_penalty": (1,),
  "response_format": ({"type": "text"},),
  "store": (False,),
  "suffix": ("",),
  "tool_choice": ("none", "auto"),
  "tools": ([],),
  "verbosity": (),
  "web_search_options": (),
}
# What apply_chat_template takes beside the variables of a template.
_TEMPLATE_ARGUMENTS = frozenset(
  "add_generation_prompt chat_template continue_final_message conversation documents max_length messages padding "
  "return_assistant_tokens_mask return_dict return_tensors tokenize tokenizer_kwargs tools truncation".split()
)
_Body = TypeVar("_Body", bound="Body")
_Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


def _wrong(message: str, param: str | None = None) -> PydanticCustomError:
  return PydanticCustomError("zeda", "{message}", {"message": message, "param": param})


class StreamOptions(BaseModel):
  model_config = ConfigDict(strict=True, extra="forbid")
  include_usage: bool = False


class Body(BaseModel):
  """What completions and chat completions share."""

  model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

  model: str
  n: int = Field(1, ge=1, le=128)
  temperature: float = Field(1.0, ge=0)
  top_p: float = Field(1.0, gt=0, le=1)
  top_k: int = Field(0, ge=-1, le=2**31 - 1)  # -1 is vLLM's 0
  min_p: float = Field(0.0, ge=0, le=1)
  seed: int | None = Field(None, ge=-(2**63), lt=2**63)
  stop: list[Annotated[str, Field(min_length=1)]] = Field([], max_length=MAX_STOPS)
  stream: bool = False
  stream_options: StreamOptions | None = None
  ignore_eos: bool = False
  stop_token_ids: list[_Count] = Field([], max_length=MAX_STOPS)
  skip_special_tokens: bool = True
  return_token_ids: bool = False
  return_tokens_as_token_ids: bool = False
  zero_expert_bias: float | None = Field(None, allow_inf_nan=True)

  @pydantic.model_validator(mode="before")
  @classmethod
  def _without_nothing(cls, data: Any) -> Any:
    """Drops fields that say nothing, such as null; refuses those that ask for what is not done."""
    if not isinstance(data, dict):
      raise _wrong("The body is no JSON object; expected one.")
    kept = {}
    for name, value in data.items():
      if value is None or name in _NOT_READ:
        continue
      if name in _REFUSED and name not in cls.model_fields:
        if value not in _REFUSED[name]:
          raise _wrong(f"{name} is not supported by this server: leave it out.", name)
        continue
      kept[name] = value
    return kept

  @pydantic.field_validator("stop", mode="before")
  @classmethod
  def _stop_as_list(cls, value: Any) -> Any:
    return [value] if isinstance(value, str) else value

  @pydantic.field_validator("zero_expert_bias", mode="before")
  @classmethod
  def _bias(cls, value: Any) -> Any:
    value = float("-inf") if value in ("-inf", "-Infinity") else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and (value == float("-inf") or abs(value) <= MAX_BIAS)):
      raise _wrong(
        f'zero_expert_bias is {value!r}; expected a number from -{MAX_BIAS:g} to {MAX_BIAS:g}, or "-inf" to switch the '
        "zero experts off."
      )
    return float(value)

  @pydantic.model_validator(mode="after")
  def _stream_options_need_stream(self) -> Self:
    if self.stream_options is not None and not self.stream:
      raise _wrong("stream_options is given without stream: set stream to true, or leave it out.", "stream_options")
    return self


def _are_tokens(value: Any) -> bool:
  return isinstance(value, list) and len(value) > 0 and all(type(token) is int for token in value)


def _prompts(value: Any) -> list[str] | list[list[int]]:
  if isinstance(value, str) or _are_tokens(value):
    return [value]
  if isinstance(value, list) and value and (all(isinstance(p, str) for p in value) or all(map(_are_tokens, value))):
    return value
  raise _wrong("prompt is none of: a text, a list of texts, a list of token ids, a list of lists of token ids.")


# One validator for all forms: pydantic would try a union number by number, and name every one that is wrong.
Prompts = Annotated[list[str] | list[list[int]], pydantic.PlainValidator(_prompts)]


class CompletionBody(Body):
  """Of /v1/completions."""

  prompt: Prompts
  max_tokens: _Count = 16
  echo: bool = False
  logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
  best_of: int | None = None

  @pydantic.model_validator(mode="after")
  def _consistent(self) -> Self:
    if self.best_of is not None and self.best_of != self.n:
      raise _wrong("best_of other than n is not supported by this server: leave it out.", "best_of")
    if self.max_tokens == 0 and not self.echo:
      raise _wrong("max_tokens is 0; expected at least 1, or echo to be true.", "max_tokens")
    if self.max_tokens == 0 and self.n > 1:
      raise _wrong("n is more than 1, but max_tokens is 0: nothing is sampled.", "n")
    return self


class TextPart(BaseModel):
  model_config = ConfigDict(strict=True, extra="forbid")
  type: Literal["text"]
  text: str


class Message(BaseModel):
  """A turn; "developer" is OpenAI's newer name for "system", which chat templates know."""

  model_config = ConfigDict(strict=True, extra="forbid")
  role: Literal["system", "developer", "user", "assistant"]
  content: str
  name: str | None = None
  reasoning_content: str | None = None

  @pydantic.model_validator(mode="before")
  @classmethod
  def _without_nothing(cls, data: Any) -> Any:
    if not isinstance(data, dict):
      raise _wrong("a message is no JSON object; expected one with role and content.")
    kept = {name: value for name, value in data.items() if value is not None and value != []}
    if kept.get("role") in ("tool", "function") or "tool_calls" in kept or "function_call" in kept:
      raise _wrong("messages of tools are not supported by this server.")
    return kept

  @pydantic.field_validator("content", mode="before")
  @classmethod
  def _text_of_parts(cls, value: Any) -> Any:
    if not isinstance(value, list):
      return value
    if any(isinstance(part, dict) and part.get("type") != "text" for part in value):
      raise _wrong("content has parts other than text, which the model cannot read.")
    return "".join(TextPart.model_validate(part).text for part in value)


class ChatBody(Body):
  """Of /v1/chat/completions."""

  messages: list[Message] = Field(min_length=1)
  max_tokens: _Count | None = Field(None, ge=1)
  max_completion_tokens: _Count | None = Field(None, ge=1)
  logprobs: bool = False
  top_logprobs: int = Field(0, ge=0, le=MAX_TOP)
  chat_template_kwargs: dict[str, Any] = {}

  @pydantic.model_validator(mode="after")
  def _consistent(self) -> Self:
    if self.top_logprobs and not self.logprobs:
      raise _wrong("top_logprobs is given without logprobs: set logprobs to true.", "top_logprobs")
    if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
      raise _wrong("max_tokens and max_completion_tokens differ: give one of them.", "max_tokens")
    if reserved := sorted(_TEMPLATE_ARGUMENTS & self.chat_template_kwargs.keys()):
      raise _wrong(
        f"chat_template_kwargs has {reserved[0]}, which is no variable of the chat template.", "chat_template_kwargs"
      )
    return self

  @property
  def limit(self) -> int | None:
    return self.max_completion_tokens or self.max_tokens


def parse(kind: type[_Body], data: bytes) -> _Body:
  """A checked body.

  Raises:
    ApiError: 400, with the field and what is wrong with it.
  """
  try:
    return kind.model_validate_json(data)
  except pydantic.ValidationError as error:
    raise _as_api_error(error) from None


def _as_api_error(error: pydantic.ValidationError) -> ApiError:
  first = error.errors(include_url=False)[0]
  place = [str(part) for part in first["loc"] if not isinstance(part, str) or part.isidentifier()]
  param = ".".join(place) or None
  kind, message = first["type"], first["msg"]
  if kind == "json_invalid":
    return ApiError(400, f"The body is no valid JSON ({first.get('ctx', {}).get('error', message)}).", None)
  if kind == "extra_forbidden":
    return ApiError(400, f"Unrecognized request argument: {param}.", param, "unknown_parameter")
  if kind == "missing":
    return ApiError(400, f"{param} is missing.", param, "missing_required_parameter")
  if kind == "zeda":
    return ApiError(400, message, param or first["ctx"]["param"])
  return ApiError(400, f"{param or 'The body'}: {message}.", param)
