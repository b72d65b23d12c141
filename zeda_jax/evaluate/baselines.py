"""Training-free baselines on any static model: each is the same parameters under another routing configuration."""

from collections.abc import Sequence

import jax
import numpy as np

from zeda_jax.distributed import on_mesh, spread_rows, to_host
from zeda_jax.models.decoder import Decoder
from zeda_jax.models.params import merge_model, reconfigured, split_model


def truncated(model: Decoder, top_k: int) -> Decoder:
  """Static truncation: the best `top_k` experts, weights normalised over them."""
  return reconfigured(model, num_experts_per_tok=top_k)


def halved(model: Decoder, top_k: int) -> Decoder:
  """Training-free halving (arXiv 2609.04575): run the best `top_k`, weights normalised over all K picks."""
  return reconfigured(model, execute_top_k=top_k)


def dynamic_skipping(model: Decoder, threshold: float) -> Decoder:
  """Drop the picks whose probability is below threshold x the best pick's, renormalise the others."""
  return reconfigured(model, skip_threshold=threshold)


def matched_threshold(
  model: Decoder, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], ratio: float
) -> float:
  """The dynamic-skipping threshold that drops the share `ratio` of all picks made while predicting `responses`.

  The threshold is a quantile of (probability of a pick / probability of the token's best pick), read off one forward
  pass of the unchanged model; what is skipped then differs a little, since dropping picks changes later layers.
  """
  length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
  graphdef, params = split_model(model)
  weights_of = jax.jit(lambda params, *inputs: merge_model(graphdef, params).hidden(*inputs).pick_weights)
  sharding = model.config.sharding
  rows = 64 if sharding is None else -(-64 // sharding.num_devices) * sharding.num_devices
  shares = []
  for first in range(0, len(prompts), rows):
    tokens = np.zeros((rows, length), np.int32)
    response = np.zeros((rows, length), bool)
    segments = np.zeros((rows, length), np.int32)
    for row, (p, r) in enumerate(zip(prompts[first : first + rows], responses[first : first + rows], strict=True)):
      tokens[row, : len(p) + len(r)] = [*p, *r]
      segments[row, : len(p) + len(r)] = 1
      response[row, len(p) - 1 : len(p) + len(r) - 1] = True
    with on_mesh(sharding):
      inputs = (tokens, segments) if sharding is None else spread_rows((tokens, segments), sharding)
      weights = to_host(weights_of(params, *inputs))[:, response]
    shares.append((weights / weights.max(axis=-1, keepdims=True)).reshape(-1))
  return float(np.quantile(np.concatenate(shares), ratio))
