"""The training step: what it holds, what it changes, and that parts of a batch add up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.distill.batches import ALPHA, BALANCE, make_batch
from tests.tiny_models import GLM, tiny_model
from zeda_jax.distill.objectives import Objective, batch_loss
from zeda_jax.distill.optimizer import OptimizerConfig, make_optimizer
from zeda_jax.distill.step import Reference, _gradients, init_state, make_train_step
from zeda_jax.models.decoder import inject
from zeda_jax.models.params import combine, merge_model, split_model, trainable_partition

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_fraction=0.0)


def flat(tree):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def teacher():
  return tiny_model(moe_layers=(True,))


def setup(teacher, trainable, loss="forward_kl", accumulate=1, balance="group", steps=20):
  graphdef, params = split_model(inject(teacher, 3))
  teacher_graphdef, teacher_params = split_model(teacher)
  trained, frozen = trainable_partition(params, trainable)
  objective = Objective(loss, balance, chunk_size=16)
  step = make_train_step(graphdef, teacher_graphdef, objective, OPTIMIZER, steps, accumulate)
  return step, init_state(trained, make_optimizer(OPTIMIZER, steps), 0), Reference(frozen, teacher_params, BALANCE)


def test_router_training_holds_routers_alone_and_shares_the_rest(teacher):
  step, state, reference = setup(teacher, "router", "reverse_kl")
  names = {"['runs'][0]['mlp']['router']['weight']", "['runs'][0]['mlp']['router']['zero_weight']"}
  assert flat(state.params).keys() == names
  router_size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
  assert moments == 2 * router_size  # fp32: no master copy
  frozen, teachers = flat(reference.frozen), flat(reference.teacher)
  assert frozen.keys() == teachers.keys() - names
  assert all(frozen[name] is teachers[name] for name in frozen)
  assert all(frozen[name].unsafe_buffer_pointer() == teachers[name].unsafe_buffer_pointer() for name in frozen)
  teachers_before = {name: np.array(leaf) for name, leaf in teachers.items()}
  start = {name: np.array(leaf) for name, leaf in flat(state.params).items()}

  state, _ = step(state, reference, make_batch())
  assert int(state.step) == 1
  assert all((np.asarray(leaf) != start[name]).any() for name, leaf in flat(state.params).items())
  for name, leaf in flat(reference.teacher).items():  # neither changed nor donated, the teacher's router included
    np.testing.assert_array_equal(leaf, teachers_before[name])


def test_a_sigmoid_router_trains_and_its_correction_bias_stays():
  """Everything of a GLM learns but the biases, decay included; the balance loss counts the picks the biases made."""
  teacher = tiny_model(**GLM | {"moe_layers": (True,)})
  step, state, reference = setup(teacher, "all")
  biases = {f"['runs'][0]['mlp']['router']['{name}']" for name in ("correction_bias", "zero_correction_bias")}
  assert flat(reference.frozen).keys() == biases
  frozen = {name: np.array(leaf) for name, leaf in flat(reference.frozen).items()}
  start = {name: np.array(leaf) for name, leaf in flat(state.params).items()}
  state, metrics = step(state, reference, make_batch())
  assert all((np.asarray(leaf) != start[name]).any() for name, leaf in flat(state.params).items())
  for name, leaf in flat(reference.frozen).items():
    np.testing.assert_array_equal(leaf, frozen[name])
  assert 0 < metrics["zero_ratio"] < 1
  assert 0 < metrics["loss_balance"] < 4 * ALPHA


def test_norms_join_the_routers(teacher):
  _, state, reference = setup(teacher, "router+norms")
  assert {name.split("'")[-2] for name in flat(state.params)} == {"weight", "zero_weight", "scale"}
  teachers = flat(reference.teacher)
  assert all(leaf is teachers[name] for name, leaf in flat(reference.frozen).items())


@pytest.mark.parametrize(("trainable", "loss"), [("all", "forward_kl"), ("router", "reverse_kl")])
def test_a_few_steps_reduce_the_loss(teacher, trainable, loss):
  step, state, reference = setup(teacher, trainable, loss)
  batch = make_batch()
  history = []
  for i in range(20):
    state, metrics = step(state, reference, batch)
    history.append({name: np.asarray(value) for name, value in metrics.items()})
    assert int(state.step) == i + 1
  losses = [float(m["loss"]) for m in history]
  assert losses[-1] < losses[0] - 0.02
  assert all(m["learning_rate"] == np.float32(3e-3) for m in history)
  assert all(np.isfinite(m["grad_norm"]) and m["grad_norm"] > 0 for m in history)
  assert history[0]["tokens"] == (batch["segment_ids"] > 0).sum()
  assert history[0]["zero_ratio/layer"].shape == (1,)


@pytest.fixture(scope="module")
def batch_gradients(teacher):
  """batch_gradients(batch, accumulate, coefficient) -> (gradients, metrics)."""
  graphdef, params = split_model(inject(teacher, 3))
  objective = Objective("forward_kl", chunk_size=16)

  def loss_fn(params, balance, part, tokens, accumulate):
    return batch_loss(objective, merge_model(graphdef, params), teacher, part, balance, tokens, accumulate)

  @functools.partial(jax.jit, static_argnums=1)
  def run(batch, accumulate, coefficient):
    balance = {"weight": jnp.float32(2), "coefficient": coefficient}
    loss = lambda *args: loss_fn(*args, accumulate)
    return _gradients(loss, params, balance, batch, accumulate)

  return run


def assert_same_gradients(found, expected):
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
  assert scale > 1e-3
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), found, expected)


def test_parts_of_a_batch_add_up(batch_gradients):
  """The rows have 9, 5, 14 and 0 response tokens: every token weighs the same, whatever part it is in."""
  batch = make_batch()
  assert batch["loss_mask"].sum(axis=1).tolist() == [9, 5, 14, 0]
  whole, metrics = batch_gradients(batch, 1, 0.0)
  parts, parts_metrics = batch_gradients(batch, 4, 0.0)
  assert_same_gradients(parts, whole)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(parts))
  for name in ("loss", "cross_entropy", "entropy", "forward_kl", "reverse_kl", "tokens"):
    np.testing.assert_allclose(parts_metrics[name], metrics[name], rtol=1e-5, err_msg=name)


def test_the_balance_loss_of_parts_is_their_mean(batch_gradients):
  """It is a product of means over tokens, so it does not add up exactly; equal parts give exactly the whole."""
  batch = {name: np.tile(value[1:2], (4, 1)) for name, value in make_batch().items()}
  whole, metrics = batch_gradients(batch, 1, 0.5)
  parts, parts_metrics = batch_gradients(batch, 4, 0.5)
  assert_same_gradients(parts, whole)
  for name in ("loss", "loss_balance", "zero_ratio", "zero_ratio/response", "zero_ratio/layer"):
    np.testing.assert_allclose(parts_metrics[name], metrics[name], rtol=1e-5, err_msg=name)


def test_bf16_parameters_train(teacher):
  graphdef, params = split_model(inject(teacher, 3))
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  teacher_graphdef, teacher_params = split_model(teacher)
  step = make_train_step(graphdef, teacher_graphdef, Objective("forward_kl", chunk_size=16), OPTIMIZER, 20)
  state = init_state(params, make_optimizer(OPTIMIZER, 20), 0)
  reference = Reference({}, teacher_params, BALANCE)
  losses = []
  for _ in range(10):
    state, metrics = step(state, reference, make_batch())
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0]
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))
  assert combine(reference.frozen, state.params).keys() == params.keys()


def test_a_step_is_made_once_per_setting(teacher):
  assert setup(teacher, "router")[0] is setup(teacher, "router")[0]
  assert setup(teacher, "router")[0] is not setup(teacher, "router", steps=21)[0]


def test_a_fresh_state_owns_its_arrays(teacher):
  _, params = split_model(teacher)
  state = init_state(params, make_optimizer(OPTIMIZER, 1), seed=3)
  assert all(
    a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True)
  )
  assert int(state.step) == 0
  assert jax.random.key_data(state.key).tolist() == jax.random.key_data(jax.random.key(3)).tolist()
