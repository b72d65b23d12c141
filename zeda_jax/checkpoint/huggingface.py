"""Models from and to Hugging Face directories."""

import pathlib
from typing import Any

from flax import nnx

from zeda_jax.checkpoint.params import ShardingRule, load_params, save_params
from zeda_jax.models.decoder import Decoder, abstract_decoder


def load_hf(path: str | pathlib.Path, dtype: Any = None, sharding: ShardingRule | None = None) -> Decoder:
  """Loads a static or dynamic directory of a supported architecture, by its config.json.

  Args:
    path: the directory.
    dtype: of all parameters and of the activations ("bfloat16", jnp.float32, ...); None keeps the parameters as on disk
      and the activations as in config.json. Routers' correction biases stay float32.
    sharding: (parameter path, shape) -> Sharding; None means the default device.

  Raises:
    ZedaError: the directory is not a complete checkpoint of a supported model.
  """
  config, params = load_params(path, dtype, sharding)
  graphdef, state = nnx.split(abstract_decoder(config))
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graphdef, state)


def save_hf(model: Decoder, path: str | pathlib.Path, format: str = "dynamic", overwrite: bool = False) -> None:
  """Saves a model as a Hugging Face directory, with the tokenizer and other files of the directory it came from.

  Args:
    model: static or dynamic.
    path: the directory to make.
    format: "dynamic" (a static model stays static), or "plain": a static checkpoint with N + N_Z experts, whose last
      N_Z have all-zero tensors and which any engine that knows the base model loads.
    overwrite: replace a directory that is not empty.

  Raises:
    ZedaError: the directory cannot be written; nothing of it is left then.
  """
  save_params(model.config, nnx.to_pure_dict(nnx.state(model, nnx.Param)), path, format, overwrite)
