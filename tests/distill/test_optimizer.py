"""The optimizer against closed forms and an AdamW written out in numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from zeda_jax.distill.optimizer import OptimizerConfig, decay_mask, make_optimizer, make_schedule
from zeda_jax.errors import ZedaError


def rates(config, num_steps):
  schedule = make_schedule(config, num_steps)
  return np.array([schedule(step) for step in range(num_steps + 1)])


def test_cosine_warms_up_for_a_tenth_and_ends_at_zero():
  found = rates(OptimizerConfig(learning_rate=2e-5), 100)
  expected = [2e-5 * s / 10 if s < 10 else 1e-5 * (1 + math.cos(math.pi * (s - 10) / 90)) for s in range(101)]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)


def test_constant_without_warm_up():
  config = OptimizerConfig(learning_rate=5e-6, schedule="constant", warmup_fraction=0)
  np.testing.assert_allclose(rates(config, 20), 5e-6, rtol=1e-6)


def test_linear_falls_in_its_last_part():
  config = OptimizerConfig(learning_rate=3e-3, schedule="linear", warmup_fraction=0.1, decay_fraction=0.3)
  steps = np.arange(101)
  expected = 3e-3 * np.minimum(np.minimum(steps / 10, 1), (100 - steps) / 30)
  np.testing.assert_allclose(rates(config, 100), expected, rtol=1e-5, atol=1e-9)
  whole = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_fraction=0.2)
  expected = np.minimum(steps / 20, (100 - steps) / 80)
  np.testing.assert_allclose(rates(whole, 100), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_shortest_runs_have_finite_rates(schedule, num_steps):
  assert np.isfinite(rates(OptimizerConfig(schedule=schedule), num_steps)).all()


def test_wrong_values_are_sentences():
  with pytest.raises(ZedaError, match=r"optimizer.schedule is 'cosin'; expected one of cosine, constant, linear\."):
    make_schedule(OptimizerConfig(schedule="cosin"), 10)
  with pytest.raises(ZedaError, match=r"optimizer.warmup_fraction is 10; expected a fraction"):
    make_schedule(OptimizerConfig(warmup_fraction=10), 10)


def params_and_grads(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = {"norm": {"scale": (2, 3)}, "proj": {"kernel": (2, 3, 4), "bias": (2, 4)}, "router": {"weight": (5, 3)}}
  params, *grads = (
    jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))
    for _ in range(4)
  )
  return params, grads


def numpy_adamw(config, params, grads, num_steps):
  """Plain AdamW with global-norm clipping in float64, list of parameters after each step."""
  schedule = make_schedule(config, num_steps)
  decay = {"kernel": 1, "weight": 1, "scale": config.decay_all, "bias": config.decay_all}
  flat = {jax.tree_util.keystr(k): (k[-1].key, np.float64(v)) for k, v in jax.tree_util.tree_leaves_with_path(params)}
  mean, square = (dict.fromkeys(flat, 0.0) for _ in range(2))
  for step, grad in enumerate(grads):
    flat_grad = {jax.tree_util.keystr(k): np.float64(g) for k, g in jax.tree_util.tree_leaves_with_path(grad)}
    norm = math.sqrt(sum((g**2).sum() for g in flat_grad.values()))
    scale = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
    for k, (name, value) in flat.items():
      g = flat_grad[k] * scale
      mean[k] = config.b1 * mean[k] + (1 - config.b1) * g
      square[k] = config.b2 * square[k] + (1 - config.b2) * g**2
      m_hat, v_hat = mean[k] / (1 - config.b1 ** (step + 1)), square[k] / (1 - config.b2 ** (step + 1))
      change = m_hat / (np.sqrt(v_hat) + config.eps) + config.weight_decay * decay[name] * value
      flat[k] = (name, value - float(schedule(step)) * change)
  return {k: value for k, (_, value) in flat.items()}


@pytest.mark.parametrize(
  "changes", [{}, {"decay_all": True}, {"clip_norm": None}, {"clip_norm": 0.1, "weight_decay": 0.5}]
)
def test_equals_adamw_written_out(changes):
  config = OptimizerConfig(learning_rate=0.1, warmup_fraction=0, **changes)
  params, grads = params_and_grads()
  expected = numpy_adamw(config, params, grads, 3)
  optimizer = make_optimizer(config, 3)
  state = optimizer.init(params)
  for grad in grads:
    updates, state = optimizer.update(grad, state, params)
    params = optax.apply_updates(params, updates)
  for path, value in jax.tree_util.tree_leaves_with_path(params):
    np.testing.assert_allclose(value, expected[jax.tree_util.keystr(path)], rtol=2e-5, atol=2e-6)


def test_takes_a_config_dict():
  config = ml_collections.ConfigDict(dataclasses.asdict(OptimizerConfig(schedule="constant", warmup_fraction=0.0)))
  params, grads = params_and_grads()
  updates, _ = make_optimizer(config, 3).update(grads[0], make_optimizer(config, 3).init(params), params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_moments_and_master_weights_are_float32():
  params, _ = params_and_grads(jnp.bfloat16)
  state = make_optimizer(OptimizerConfig(), 3).init(params)
  sizes = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
  assert sizes == {np.dtype(np.float32)}
  assert len([leaf for leaf in jax.tree.leaves(state) if leaf.ndim]) == 3 * len(jax.tree.leaves(params))
  wide, _ = params_and_grads()
  state = make_optimizer(OptimizerConfig(), 3).init(wide)  # no second copy of float32 parameters
  assert len([leaf for leaf in jax.tree.leaves(state) if leaf.ndim]) == 2 * len(jax.tree.leaves(wide))


@pytest.mark.parametrize("master_weights", [True, False])
def test_bfloat16_follows_float32_only_with_master_weights(master_weights):
  config = OptimizerConfig(
    learning_rate=1e-4, schedule="constant", warmup_fraction=0, weight_decay=0, master_weights=master_weights
  )
  optimizer = make_optimizer(config, 100)
  params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
  state = optimizer.init(params)

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update({"kernel": jnp.ones((4, 4), jnp.bfloat16)}, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(100):  # each moves by 1e-4, far below bfloat16's spacing of 2^-8 under 1
    params, state = step(params, state)
  assert params["kernel"].dtype == jnp.bfloat16
  expected = jnp.bfloat16(1 - 100 * 1e-4) if master_weights else jnp.bfloat16(1)
  assert (params["kernel"] == expected).all()


def test_decay_mask_goes_by_name():
  params, _ = params_and_grads()
  expected = {"norm": {"scale": False}, "proj": {"kernel": True, "bias": False}, "router": {"weight": True}}
  assert decay_mask(params) == expected
