"""lm-eval's tasks on our engine: the model "zeda" of the library lm-eval.

    import zeda_jax.evaluate.harness          # registers it
    lm_eval.simple_evaluate(model="zeda", model_args={"pretrained": DIR}, tasks=[...])

or, with all the flags of the `lm_eval` command:

    python -m zeda_jax.evaluate.harness run --model zeda --model_args pretrained=DIR --tasks gsm8k
"""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zeda_jax.data import chat
from zeda_jax.distributed import on_mesh, spread_rows, to_host
from zeda_jax.errors import ZedaError
from zeda_jax.evaluate.checkpoint import open_model
from zeda_jax.models.params import merge_model, split_model
from zeda_jax.rollout.engine import Engine
from zeda_jax.rollout.requests import Request

try:
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
  from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
  raise ZedaError(f"lm-eval is not installed ({error}): pip install 'zeda-jax[evaluate]'.") from error

_SMALLEST_ROW = 64
_POSITIONS = 256  # of which logits are held at once
_KNOWN_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "seed")


@register_model("zeda")
class ZedaLM(TemplateLM):
  """A static or dynamic checkpoint.

  Args:
    pretrained: its Hugging Face directory.
    batch_size: sequences worked on together.
    max_length: tokens of one sequence; None: the model's context.
    max_gen_toks: new tokens where a task does not say how many.
    zero_expert_bias: see `Decoder.__call__`.
    dtype: of parameters and activations; None: the checkpoint's.
    seed: of sampling, where a task samples.
    chat_template_args: further variables of the chat template.
    device, max_batch_size: lm-eval's own, not used.

  Raises:
    ZedaError: the directory is no checkpoint, or a size is not positive.
  """

  def __init__(
    self,
    pretrained: str,
    batch_size: int | str = 16,
    max_length: int | None = None,
    max_gen_toks: int = 256,
    zero_expert_bias: float = 0.0,
    dtype: str | None = None,
    seed: int = 0,
    chat_template_args: Mapping[str, Any] | None = None,
    device: str | None = None,
    max_batch_size: int | None = None,
  ):
    super().__init__()
    self.model = open_model(pretrained, dtype)
    self.tokenizer = chat.load_tokenizer(pretrained)
    self.stop_ids = chat.eos_ids(pretrained, self.tokenizer)
    config = self.model.config
    devices = 1 if config.sharding is None else config.sharding.num_devices
    wanted = 16 if str(batch_size).startswith("auto") else int(batch_size)
    if wanted < 1:
      raise ZedaError(f"batch_size is {batch_size}; expected at least 1.")
    self.batch_size = -(-wanted // devices) * devices
    self.max_length = min(int(max_length or config.max_position_embeddings), config.max_position_embeddings)
    self.max_gen_toks, self.seed = int(max_gen_toks), int(seed)
    self.zero_expert_bias = float(zero_expert_bias)
    self.template_options = dict(chat_template_args or {})
    self._name = str(pathlib.Path(pretrained).resolve())
    self._parts = split_model(self.model)

  @property
  def eot_token_id(self) -> int:
    return self.stop_ids[0]

  @property
  def tokenizer_name(self) -> str:
    return self._name

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Token ids; None for add_special_tokens adds none, as chat templates and continuations need it."""
    return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    return self.tokenizer.apply_chat_template(
      chat_history,
      tokenize=False,
      add_generation_prompt=add_generation_prompt,
      continue_final_message=not add_generation_prompt,
      **self.template_options,
    )

  # --- likelihoods --------------------------------------------------------------------------------------------------

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
  ) -> list[tuple[float, bool]]:
    """(log-probability of the continuation, whether greedy decoding would give it) of each request.

    A context that is too long loses its beginning.
    """
    rows = []
    for _name, context, continuation in requests:
      if len(continuation) > self.max_length:
        raise ZedaError(
          f"a continuation has {len(continuation)} tokens; expected at most {self.max_length}, the longest sequence of "
          "this model: raise max_length."
        )
      rows.append((list(context) + list(continuation))[-(self.max_length + 1) :])
    found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    for first in range(0, len(order), self.batch_size):
      group = order[first : first + self.batch_size]
      length = max(len(rows[i]) - 1 for i in group)
      width = max(_SMALLEST_ROW, 1 << math.ceil(math.log2(max(length, 1))))
      tokens = np.zeros((self.batch_size, width), np.int32)
      targets, segments = tokens.copy(), tokens.copy()
      counted = np.zeros(tokens.shape, bool)
      for row, i in enumerate(group):
        n = len(rows[i]) - 1
        tokens[row, :n], targets[row, :n], segments[row, :n] = rows[i][:-1], rows[i][1:], 1
        counted[row, n - len(requests[i][2]) : n] = True
      logprobs, is_best = self._scores(tokens, targets, segments)
      for row, i in enumerate(group):
        chosen = counted[row]
        found[i] = float(logprobs[row][chosen].sum(dtype=np.float64)), bool(is_best[row][chosen].all())
    for (name, _, _), answer in zip(requests, found, strict=True):
      if name is not None:
        self.cache_hook.add_partial("loglikelihood", name, answer)
    return found

  def _scores(self, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sharding = self.model.config.sharding
    with on_mesh(sharding):
      placed = inputs if sharding is None else spread_rows(inputs, sharding)
      logprobs, is_best = _scores(*self._parts, *placed, self.zero_expert_bias)
      return to_host(logprobs), to_host(is_best)

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    """Log-probability of whole texts, each token with as much context as a window allows."""
    sums = []
    for request in requests:
      (text,) = request.args
      windows = get_rolling_token_windows(
        token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
      )
      parts = [(None, *make_disjoint_window(window)) for window in windows]
      sums.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(parts)))
      self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
    return sums

  # --- generation ---------------------------------------------------------------------------------------------------

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """Responses, cut at the stop texts of their tasks. Sampling only where a task sets do_sample or a temperature."""
    prepared = [self._request(place, *request.args) for place, request in enumerate(requests)]
    if not prepared:
      return []
    longest = max(len(request.prompt) + request.max_new_tokens for request, _ in prepared)
    engine = self._engine(1 << math.ceil(math.log2(longest)))
    texts = [""] * len(prepared)
    places = {engine.add(request): place for place, (request, _) in enumerate(prepared)}
    sampled: dict[int, list[int]] = {id: [] for id in places}
    while sampled:
      for update in engine.step():
        sampled[update.id] += update.tokens
        place = places[update.id]
        stop = prepared[place][1]
        text = self.tokenizer.decode(sampled[update.id], skip_special_tokens=True)
        if update.completion is not None or any(end in text for end in stop):
          engine.cancel(update.id)
          del sampled[update.id]
          texts[place] = postprocess_generated_text(text, stop=stop, think_end_token=None)
          self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
    return texts

  @functools.lru_cache(maxsize=1)  # noqa: B019 - one engine, as long as the model
  def _engine(self, length: int) -> Engine:
    length = min(length, self.max_length)
    devices = 1 if self.model.config.sharding is None else self.model.config.sharding.num_devices
    tokens = max(self.batch_size, devices) * (length + 64)
    return Engine(self.model, num_slots=self.batch_size, max_tokens=tokens, max_length=length)

  def _request(self, place: int, context: str, settings: Mapping[str, Any]) -> tuple[Request, list[str]]:
    known: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
    sampling = {name: known[name] for name in _KNOWN_SETTINGS if known.get(name) is not None}
    if not known["do_sample"]:
      sampling["temperature"] = 0.0
    new = min(known["max_gen_toks"], self.max_length - 1)
    prompt = self.tok_encode(context)[-(self.max_length - new) :] or [self.prefix_token_id]
    options: dict[str, Any] = {
      "seed": self.seed,
      "stream": place,
      "stop_ids": self.stop_ids,
      "zero_expert_bias": self.zero_expert_bias,
    }
    return Request(prompt, new, **(options | sampling)), [end for end in known["until"] if end]


@functools.partial(jax.jit, static_argnums=0)
def _scores(
  graphdef: Any,
  params: Any,
  tokens: Int[Array, "B T"],
  targets: Int[Array, "B T"],
  segments: Int[Array, "B T"],
  bias: Float[Array, ""],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
  """Log-probability of each target, and whether it is the most likely token; logits of few positions at once."""
  model = merge_model(graphdef, params)
  hidden = model.hidden(tokens, segments, zero_expert_bias=bias).hidden

  def score(part: tuple[Array, Array]) -> tuple[Array, Array]:
    logits = model.logits(part[0])
    chosen = jnp.take_along_axis(logits, part[1][..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == part[1]

  size = max(1, _POSITIONS // tokens.shape[0])
  size = min(size, tokens.shape[1])
  parts = -(-tokens.shape[1] // size)
  pad = parts * size - tokens.shape[1]
  cut = lambda x: jnp.moveaxis(
    jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)).reshape(x.shape[0], parts, size, *x.shape[2:]), 1, 0
  )
  joined = lambda x: jnp.moveaxis(x, 0, 1).reshape(tokens.shape[0], -1)[:, : tokens.shape[1]]
  return jax.tree.map(joined, jax.lax.map(score, (cut(hidden), cut(targets))))


def main() -> None:
  from lm_eval.__main__ import cli_evaluate

  cli_evaluate()


if __name__ == "__main__":
  main()
