"""Sampling as plainly as can be: a full forward pass for every token, no cache, no batch; numpy draws what is left."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.rollout.test_sampling import plain_distribution
from tests.tiny_models import forward

LENGTH = 64  # of the rows of all passes, so that one program serves them


@dataclasses.dataclass(frozen=True)
class Answer:
  tokens: list[int]
  logprobs: list[float]
  zero_ratio: float
  zero_ratio_all: float
  finished: bool


def sample_plainly(
  model, prompt, new, *, seed=0, stream=0, temperature=1.0, top_k=0, top_p=1.0, stop=(), zero_expert_bias=0.0
):
  """One response; the random numbers are those that the engine promises: a key for each (seed, stream, token)."""
  key = jax.random.fold_in(jax.random.key(seed), stream)
  known, logprobs = list(prompt), []
  for step in range(new):
    row = np.array([known + [0] * (LENGTH - len(known))], np.int32)
    out = forward(model, row, None, None, zero_expert_bias)
    logits = np.asarray(out.logits[0, len(known) - 1])
    if temperature:
      with np.errstate(divide="ignore"):
        kept = jnp.asarray(np.log(plain_distribution(logits, temperature, top_k, top_p)), jnp.float32)
      token = int(jax.random.categorical(jax.random.fold_in(key, step), kept))
    else:
      token = int(logits.argmax())
    logprobs.append(float(jax.nn.log_softmax(logits)[token]))
    known.append(token)
    if token in stop:
      break
  zero = (np.asarray(out.picks)[:, 0, : len(known) - 1] >= model.config.num_experts).mean(axis=(0, 2))
  mean = zero[len(prompt) - 1 :].mean()
  return Answer(known[len(prompt) :], logprobs, mean, zero.mean(), known[-1] in stop)
