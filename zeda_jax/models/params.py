"""A model as (graphdef, params): a plain nested dict of arrays, which pure functions can split and mix."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx, traverse_util

from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder, abstract_decoder
from zeda_jax.sharding import Sharding

Params = dict[Any, Any]
Path = tuple[Any, ...]


def split_model(model: Decoder) -> tuple[nnx.GraphDef, Params]:
  """The static structure and the arrays of a model, e.g. params["runs"][0]["mlp"]["router"]["weight"]."""
  graphdef, state = nnx.split(model)
  return graphdef, nnx.to_pure_dict(state)


def merge_model(graphdef: nnx.GraphDef, params: Params) -> Decoder:
  """The inverse of split_model; the arrays are shared, not copied."""
  return nnx.merge(graphdef, nnx.State(jax.tree.map(nnx.Param, params)))


def reconfigured(model: Decoder, **changes: object) -> Decoder:
  """`model` with other ModelConfig fields; the parameters are shared, so the fields may not change their shapes."""
  graphdef, _ = nnx.split(abstract_decoder(model.config.replace(**changes)))
  return merge_model(graphdef, split_model(model)[1])


def resharded(model: Decoder, sharding: Sharding) -> Decoder:
  """A copy of a sharded `model`, its parameters where another sharding of the same devices wants them."""
  graphdef, params = split_model(reconfigured(model, sharding=sharding))
  return merge_model(graphdef, _moved(params, sharding))


@functools.partial(jax.jit, static_argnames="sharding")
def _moved(params: Params, sharding: Sharding) -> Params:
  return jax.lax.with_sharding_constraint(params, sharding.state(params))


def unstacked(graphdef: nnx.GraphDef, params: Params) -> tuple[nnx.GraphDef, Params]:
  """The same model with `stack_layers` False: a scan copies the parameters of each layer out of the stack, which costs
  much where a pass is over few tokens and reads few of the experts. Copies the parameters of stacked layers once."""
  config = merge_model(graphdef, params).config
  layers = [
    jax.tree.map(lambda leaf, place=place: leaf[place : place + 1], params["runs"][number])
    for number, run in enumerate(config.layer_runs)
    for place in range(run.length)
  ]
  structure, _ = nnx.split(abstract_decoder(config.replace(stack_layers=False)))
  return structure, params | {"runs": dict(enumerate(layers))}


def partition(params: Params, chosen: Callable[[Path], bool]) -> tuple[Params, Params]:
  """(params whose path is chosen, the others); `combine` puts them together again."""
  flat = traverse_util.flatten_dict(params)
  yes = {path: leaf for path, leaf in flat.items() if chosen(path)}
  no = {path: leaf for path, leaf in flat.items() if path not in yes}
  return traverse_util.unflatten_dict(yes), traverse_util.unflatten_dict(no)


def combine(*parts: Params) -> Params:
  """The union of nested dicts; where a path occurs twice, the later part wins."""
  flat: dict[Path, Any] = {}
  for part in parts:
    flat |= traverse_util.flatten_dict(part)
  return traverse_util.unflatten_dict(flat)


def _is_router(path: Path) -> bool:
  return "router" in path


def _is_norm(path: Path) -> bool:
  return path[-1] == "scale"


def _is_buffer(path: Path) -> bool:
  """Correction biases decide picks only, so no gradient reaches them: held and saved, never trained or decayed."""
  return path[-1] in ("correction_bias", "zero_correction_bias")


TRAINABLE: dict[str, Callable[[Path], bool]] = {
  "all": lambda path: True,
  "router": _is_router,
  "router+norms": lambda path: _is_router(path) or _is_norm(path),
}


def trainable_partition(params: Params, trainable: str) -> tuple[Params, Params]:
  """(trained, frozen) parameters of the set named by `trainable`; correction biases are always frozen.

  Raises:
    ZedaError: the set is unknown.
  """
  if trainable not in TRAINABLE:
    raise ZedaError(f"trainable is {trainable!r}; expected one of {', '.join(TRAINABLE)}.")
  chosen = TRAINABLE[trainable]
  return partition(params, lambda path: chosen(path) and not _is_buffer(path))
