"""A small packed batch, as data.packing lays it out, and the weights of its balance loss."""

import jax.numpy as jnp
import numpy as np

from tests.tiny_models import random_tokens

ROWS, LENGTH, W, ALPHA = 4, 16, 2.0, 0.5
BALANCE = {"weight": jnp.float32(W), "coefficient": jnp.float32(ALPHA)}


def make_batch(seed=0):
  """Packed rows by hand: two examples in row 0, padding at the end of row 1, row 3 has only padding."""
  segments = np.ones((ROWS, LENGTH), np.int32)
  segments[0, 9:], segments[1, 11:], segments[3] = 2, 0, 0
  positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
  positions[0, 9:] -= 9
  mask = np.zeros((ROWS, LENGTH), np.float32)
  mask[0, 3:8] = mask[0, 11:15] = mask[1, 5:10] = mask[2, 1:15] = 1
  rng = np.random.default_rng(seed)
  return {
    "tokens": random_tokens((ROWS, LENGTH), seed),
    "targets": random_tokens((ROWS, LENGTH), seed + 1),
    "loss_mask": mask,
    "segment_ids": segments,
    "positions": positions,
    "old_logprobs": (-4 + rng.standard_normal((ROWS, LENGTH)) * mask).astype(np.float32),
  }
