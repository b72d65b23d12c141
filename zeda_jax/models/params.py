"""A model as (graphdef, params): a plain nested dict of arrays, which pure functions can split and mix."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx, traverse_util

from zeda_jax.config import ModelConfig
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
  """A sharded `model` with its parameters where another sharding of the same devices wants them."""
  graphdef, params = split_model(reconfigured(model, sharding=sharding))
  return merge_model(graphdef, moved(params, sharding.state(params)))


def moved(params: Params, places: Any) -> Params:
  """The parameters at other places of the same devices; those that lie there already are not copied.

  Args:
    params: as `split_model` gives them.
    places: a tree of shardings alike.
  """
  leaves, targets = jax.tree.leaves(params), jax.tree.leaves(places)
  pairs = list(enumerate(zip(leaves, targets, strict=True)))
  away = [i for i, (x, place) in pairs if not x.sharding.is_equivalent_to(place, x.ndim)]
  if away:
    for i, leaf in zip(away, _move([leaves[i] for i in away], tuple(targets[i] for i in away)), strict=True):
      leaves[i] = leaf
  return jax.tree.unflatten(jax.tree.structure(params), list(map(_renamed, leaves, targets)))


def _renamed(x: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
  """The same buffers under the given name of where they lie: jit knows programs by these names."""
  if x.sharding == place:
    return x
  return jax.make_array_from_single_device_arrays(x.shape, place, [shard.data for shard in x.addressable_shards])


@functools.partial(jax.jit, static_argnames="places")
def _move(leaves: list[jax.Array], places: tuple[jax.sharding.Sharding, ...]) -> list[jax.Array]:
  return [jax.lax.with_sharding_constraint(x, place) for x, place in zip(leaves, places, strict=True)]


def unstacked(graphdef: nnx.GraphDef, params: Params) -> tuple[nnx.GraphDef, Params]:
  """The same model with `stack_layers` False: a scan copies the parameters of each layer out of the stack, which costs
  much where a pass is over few tokens and reads few of the experts. Copies the parameters of stacked layers once."""
  config = merge_model(graphdef, params).config
  layers = [
    jax.tree.map(lambda leaf, place=place: leaf[place : place + 1], params["runs"][number])
    for number, run in enumerate(config.layer_runs)
    for place in range(run.length)
  ]
  return _structure(config.replace(stack_layers=False)), params | {"runs": dict(enumerate(layers))}


@functools.lru_cache(maxsize=16)
def _structure(config: ModelConfig) -> nnx.GraphDef:
  return nnx.split(abstract_decoder(config))[0]


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
