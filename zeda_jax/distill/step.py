"""The training step: a pure function (state, reference, batch) -> (state, metrics) with the teacher inside it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from zeda_jax.distill.objectives import Objective, batch_loss
from zeda_jax.distill.optimizer import OptimizerConfig, make_optimizer, make_schedule
from zeda_jax.models.params import Params, combine, merge_model
from zeda_jax.sharding import Sharding

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


@struct.dataclass
class TrainState:
  """Everything that training changes; what a checkpoint holds."""

  params: Params  # the trained parameters only
  opt_state: optax.OptState
  step: Int[Array, ""]
  key: Key[Array, ""]


@struct.dataclass
class Reference:
  """Everything that training only reads. Arrays that student and teacher share are the same buffers, held once."""

  frozen: Params  # the student's parameters outside TrainState.params
  teacher: Params  # all parameters of the teacher
  balance: Mapping[str, Array]  # "weight" and "coefficient" of the balance loss


def init_state(
  params: Params, optimizer: optax.GradientTransformation, seed: int, sharding: Sharding | None = None
) -> TrainState:
  """A fresh state, on a mesh made in place on every device. Parameters are copied, since steps donate their state."""
  make = functools.partial(_fresh_state, optimizer=optimizer, seed=seed)
  # Without a mesh, too, one program makes it: all of it then lies where a step leaves it, which is compiled once.
  places = None if sharding is None else sharding.state(jax.eval_shape(make, params))
  return jax.jit(make, out_shardings=places)(params)


def abstract_state(
  params: Params, optimizer: optax.GradientTransformation, sharding: Sharding | None = None
) -> TrainState:
  """Shapes, types and places of what init_state makes, for a checkpoint to be read into; nothing is allocated."""
  state = jax.eval_shape(functools.partial(_fresh_state, optimizer=optimizer, seed=0), params)
  places = jax.tree.map(lambda _: jnp.empty(()).sharding, state) if sharding is None else sharding.state(state)
  return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, places)


def _fresh_state(params: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
  params = jax.tree.map(jnp.copy, params)
  return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(seed))


@functools.cache
def make_train_step(
  student: nnx.GraphDef,
  teacher: nnx.GraphDef,
  objective: Objective,
  optimizer: OptimizerConfig,
  num_steps: int,
  accumulate: int = 1,
) -> Callable[[TrainState, Reference, Batch], tuple[TrainState, Metrics]]:
  """A jitted step, made once per set of arguments.

  Args:
    student: structure of the model in training.
    teacher: structure of the frozen model (it may differ, e.g. in the number of experts per token).
    objective: the loss.
    optimizer: AdamW and its schedule.
    num_steps: length of the training, for the schedule.
    accumulate: the batch's rows are run in this many equal parts, whose gradients are added; row i is in part i modulo
      this, so that devices that hold neighbouring rows have some of every part.

  Returns:
    (state, reference, batch) -> (state, metrics); donates the state.
  """
  transform = make_optimizer(optimizer, num_steps)

  def loss_fn(params: Params, reference: Reference, part: Batch, response_tokens: Array) -> tuple[Array, Any]:
    model = merge_model(student, combine(reference.frozen, params))
    frozen = merge_model(teacher, jax.lax.stop_gradient(reference.teacher))
    return batch_loss(objective, model, frozen, part, reference.balance, response_tokens, accumulate)

  schedule = make_schedule(optimizer, num_steps)

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state: TrainState, reference: Reference, batch: Batch) -> tuple[TrainState, Metrics]:
    sharding = merge_model(student, combine(reference.frozen, state.params)).config.sharding
    grads, metrics = _gradients(loss_fn, state.params, reference, batch, accumulate, sharding)
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {"grad_norm": optax.global_norm(grads), "learning_rate": schedule(state.step)}
    params, opt_state = _keep_places((params, opt_state), sharding)
    state = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
    return state, _everywhere(metrics, sharding)

  return train_step


def _keep_places(tree: Any, sharding: Sharding | None) -> Any:
  """The tree with each array where the rules want it: the compiler would else choose, and each step start elsewhere."""
  return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding.state(tree))


def _everywhere(metrics: Metrics, sharding: Sharding | None) -> Metrics:
  """The metrics, whole on every device, so that every process can read them."""
  if sharding is None:
    return metrics
  return jax.lax.with_sharding_constraint(metrics, NamedSharding(sharding.mesh, PartitionSpec()))


def split_rows(batch: Batch, parts: int, sharding: Sharding | None = None) -> Batch:
  """[B, ...] -> [parts, B / parts, ...] with row i in part i % parts, where no row leaves its device."""

  def split(x: Array) -> Array:
    x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    if sharding is None:
      return x
    where = NamedSharding(sharding.mesh, PartitionSpec(None, sharding.rules.tokens))
    return jax.lax.with_sharding_constraint(x, where)

  return jax.tree.map(split, dict(batch))


def _gradients(
  loss_fn: Callable[..., Any],
  params: Params,
  reference: Reference,
  batch: Batch,
  accumulate: int,
  sharding: Sharding | None = None,
) -> tuple[Params, Metrics]:
  """Gradients (fp32) and metrics of the batch, as the sum over `accumulate` parts of its rows."""
  response_tokens = batch["loss_mask"].sum()

  def part_gradients(part: Batch) -> tuple[Params, Any]:
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params, reference, part, response_tokens)
    return _keep_places(jax.tree.map(lambda g: g.astype(jnp.float32), grads), sharding), metrics

  if accumulate == 1:
    grads, metrics = part_gradients(batch)
  else:
    parts = split_rows(batch, accumulate, sharding)
    shapes = jax.eval_shape(part_gradients, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(
      lambda total, part: (jax.tree.map(jnp.add, total, part_gradients(part)), None), zeros, parts
    )
    grads, metrics = total
  means = {name: value / accumulate for name, value in metrics["means"].items()}
  metrics = {**metrics["sums"], **means, "tokens": (batch["segment_ids"] > 0).sum()}
  return grads, {"loss": metrics["loss_distill"] + metrics["loss_balance"], **metrics}
