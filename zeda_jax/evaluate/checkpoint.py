"""A Hugging Face directory as an engine, and a fingerprint of it."""

import hashlib
import json
import os
import pathlib
from typing import TYPE_CHECKING

from zeda_jax.checkpoint.safetensors_io import open_weights

if TYPE_CHECKING:
  from zeda_jax.evaluate.benchmark import Settings
  from zeda_jax.models.decoder import Decoder
  from zeda_jax.rollout.engine import Engine

_TOKENS_PER_SLOT = 2048


def checkpoint_fingerprint(directory: str | os.PathLike[str]) -> str:
  """Changes with the config, the shapes of the tensors, the final norm or a router, which every training changes."""
  place = pathlib.Path(directory)
  stored = open_weights(place)
  digest = hashlib.sha256((place / "config.json").read_bytes())
  digest.update(json.dumps(sorted((n, str(t.dtype), list(t.shape)) for n, t in stored.items())).encode())
  for name in sorted(stored):
    if name == "model.norm.weight" or name.endswith("mlp.gate.weight"):
      digest.update(stored[name].read().tobytes())
  return digest.hexdigest()[:16]


def open_model(directory: str | os.PathLike[str], dtype: str | None = None) -> "Decoder":
  """The model, spread over all devices of this process where there are several, for generation."""
  import jax

  from zeda_jax.checkpoint.huggingface import load_hf
  from zeda_jax.config import read_config
  from zeda_jax.models.params import reconfigured
  from zeda_jax.sharding import Sharding, make_mesh

  if len(jax.devices()) == 1:
    return load_hf(pathlib.Path(directory), dtype)
  num_experts = read_config(pathlib.Path(directory)).num_experts
  sharding = Sharding(make_mesh()).for_generation(num_experts)
  return reconfigured(load_hf(pathlib.Path(directory), dtype, sharding.parameter), sharding=sharding)


def open_engine(directory: str | os.PathLike[str], settings: "Settings", longest: int) -> "Engine":
  """An engine for sequences of at most `longest` tokens."""
  from zeda_jax.rollout.engine import Engine

  model = open_model(directory, settings.dtype)
  devices = 1 if model.config.sharding is None else model.config.sharding.num_devices
  slots = -(-settings.batch_size // devices) * devices
  page = 64
  room = (-(-longest // page) + 1) * page * devices  # any device may have to hold the longest
  tokens = settings.cache_tokens or max(room, slots * min(longest, _TOKENS_PER_SLOT))
  return Engine(model, num_slots=slots, max_tokens=tokens, max_length=longest, page_size=page)
