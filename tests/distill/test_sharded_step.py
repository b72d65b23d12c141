"""The training step on a mesh of eight fake devices, in a process of its own, equals the single device's."""

import jax
import numpy as np

from tests.distill.batches import BALANCE, make_batch
from tests.multiprocess import run_everywhere
from tests.tiny_models import tiny_model
from zeda_jax.distill.objectives import Objective
from zeda_jax.distill.optimizer import OptimizerConfig, make_optimizer
from zeda_jax.distill.step import Reference, init_state, make_train_step
from zeda_jax.models.decoder import inject
from zeda_jax.models.params import reconfigured, split_model, trainable_partition
from zeda_jax.sharding import Rules, Sharding, make_mesh

# With the usual eps, Adam turns the rounding of a gradient near 0 into an update as large as any; not so with this one.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0, eps=1e-3)


def run_steps(sharding):
  """Two steps; their metrics, and the last state."""
  teacher = reconfigured(tiny_model(num_experts=8, moe_layers=(True,)), sharding=sharding)
  (student, params), (frozen_def, teacher_params) = split_model(inject(teacher)), split_model(teacher)
  batch = jax.tree.map(lambda a: np.concatenate([a, a[::-1]]), make_batch())
  # Routing replay of half of the tokens.
  picks = np.argsort(np.random.default_rng(0).random((*batch["tokens"].shape, 1, 12)), axis=-1)[..., :2]
  batch["replay"] = np.where(batch["positions"][:, :, None, None] % 2, picks, -1).astype(np.int16)
  if sharding is not None:
    params, teacher_params = (jax.device_put(tree, sharding.state(tree)) for tree in (params, teacher_params))
    batch = jax.device_put(batch, sharding.batch(batch))
  trained, frozen = trainable_partition(params, "all")
  state = init_state(trained, make_optimizer(OPTIMIZER, 10), seed=0)
  step = make_train_step(student, frozen_def, Objective(), OPTIMIZER, 10)
  history = []
  for _ in range(2):
    state, metrics = step(state, Reference(frozen, teacher_params, BALANCE), batch)
    history.append(jax.tree.map(np.asarray, metrics))
  return history, state


def check_step():
  sharding = Sharding(make_mesh(2, 4), rules=Rules(replicated_below=0))
  expected, expected_state = run_steps(None)
  found, state = run_steps(sharding)
  for got, want in zip(found, expected, strict=True):
    assert got["sent/rows"] > 0 and got["sent/bytes"] == got["sent/rows"] * 2 * 32 * 4
    # 4 rows of padding and some zero picks keep at home what a static model would send.
    assert 0.3 < got["sent/rows"] / got["sent_static/rows"] < 1
    for name, value in want.items():
      np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, expected_state.params)
  places = sharding.state((state.params, state.opt_state))
  for leaf, where in zip(jax.tree.leaves((state.params, state.opt_state)), jax.tree.leaves(places), strict=True):
    assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


def test_steps_on_a_mesh_equal_those_of_one_device():
  run_everywhere("tests.distill.test_sharded_step:check_step", 1, 8)
