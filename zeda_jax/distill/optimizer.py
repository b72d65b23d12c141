"""AdamW and the learning-rate schedules of both distillation stages (paper, section 4), from optax pieces."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zeda_jax.errors import ZedaError

SCHEDULES = ("cosine", "constant", "linear")
_NOT_DECAYED = {"scale", "bias"}  # by name: stacked over layers, a norm's scale is a [L, H] matrix too


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Defaults are the paper's SFT stage; OPD is schedule="constant", warmup_fraction=0, learning_rate=5e-6."""

  learning_rate: float = 2e-5
  schedule: str = "cosine"  # cosine to 0, constant, or linear to 0; each after a linear warm-up from 0
  warmup_fraction: float = 0.1  # of all steps
  decay_fraction: float = 1.0  # linear only: the last part of all steps in which the rate falls (constant before)
  b1: float = 0.9
  b2: float = 0.98
  eps: float = 1e-8
  weight_decay: float = 0.1
  decay_all: bool = False  # also decay norm scales and biases
  clip_norm: float | None = 1.0  # global gradient norm; None or 0 turns clipping off
  master_weights: bool = True  # keep a float32 copy of parameters of a narrower type in the optimizer state


def make_schedule(config: Any, num_steps: int) -> optax.Schedule:
  """Learning rate as a function of the number of updates done so far.

  Args:
    config: OptimizerConfig, or any object with its fields (an ml_collections ConfigDict).
    num_steps: length of the training; the rate reaches 0 there (cosine, linear).

  Raises:
    ZedaError: unknown schedule, or a fraction outside 0..1.
  """
  if config.schedule not in SCHEDULES:
    raise ZedaError(f"optimizer.schedule is {config.schedule!r}; expected one of {', '.join(SCHEDULES)}.")
  for name in ("warmup_fraction", "decay_fraction"):
    if not 0 <= getattr(config, name) <= 1:
      raise ZedaError(f"optimizer.{name} is {getattr(config, name)}; expected a fraction between 0 and 1.")
  peak = config.learning_rate
  warmup = round(config.warmup_fraction * num_steps)
  left = max(num_steps - warmup, 1)
  if config.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, left)
  elif config.schedule == "linear":
    decay = max(min(round(config.decay_fraction * num_steps), left), 1)
    after = optax.linear_schedule(peak, 0.0, decay, transition_begin=left - decay)
  else:
    after = optax.constant_schedule(peak)
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make_optimizer(config: Any, num_steps: int) -> optax.GradientTransformation:
  """AdamW behind global-norm clipping; moments and arithmetic in float32 whatever the parameters' type.

  Weight decay is decoupled and scaled by the learning rate (optax.adamw). It applies to embeddings and matrices, not
  to norm scales and biases, as is customary (the paper gives only the number); `decay_all` includes them.

  Args:
    config: OptimizerConfig, or any object with its fields.
    num_steps: length of the training, for the schedule.
  """
  adamw = optax.adamw(
    make_schedule(config, num_steps),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=None if config.decay_all else decay_mask,
  )
  clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  return _in_float32(optax.chain(*clip, adamw), config.master_weights)


def decay_mask(params: Any) -> Any:
  """Tree of bools: True where weight decay applies (all but norm scales and biases, found by name)."""

  def decays(path: tuple[Any, ...], _: Any) -> bool:
    names = {str(getattr(key, "key", getattr(key, "name", ""))) for key in path}
    return not names & _NOT_DECAYED

  return jax.tree_util.tree_map_with_path(decays, params)


class Float32State(NamedTuple):
  master: Any  # float32 parameters where the parameters are narrower, None elsewhere
  inner: optax.OptState


def _in_float32(inner: optax.GradientTransformation, master_weights: bool) -> optax.GradientTransformation:
  """Runs `inner` in float32; small updates to bfloat16 parameters would otherwise be rounded away."""

  def widen(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

  def narrow(x: jax.Array) -> bool:
    return master_weights and x.dtype != jnp.float32

  def init(params: Any) -> Float32State:
    master = jax.tree.map(lambda p: p.astype(jnp.float32) if narrow(p) else None, params)
    return Float32State(master, inner.init(widen(params)))

  def update(grads: Any, state: Float32State, params: Any = None) -> tuple[Any, Float32State]:
    weights = jax.tree.map(lambda p, m: p.astype(jnp.float32) if m is None else m, params, state.master)
    updates, inner_state = inner.update(widen(grads), state.inner, weights)
    master = jax.tree.map(lambda p, w, u: w + u if narrow(p) else None, params, weights, updates)
    # optax.apply_updates adds in float32 and rounds to the parameter's type: parameters = rounded master.
    updates = jax.tree.map(lambda p, u, m: u if m is None else m - p.astype(jnp.float32), params, updates, master)
    return updates, Float32State(master, inner_state)

  return optax.GradientTransformation(init, update)
