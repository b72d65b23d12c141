"""Routing replay: given picks take the place of the routers' own, with the weights that the scores give them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.distill.batches import BALANCE, make_batch
from tests.tiny_models import GLM, random_tokens, tiny_model
from zeda_jax.distill.objectives import Objective, batch_loss
from zeda_jax.distill.recipe import default_config
from zeda_jax.distill.sampler import Sampler
from zeda_jax.models.decoder import inject
from zeda_jax.models.params import merge_model, split_model
from zeda_jax.zero_experts import route

N, NZ, K = 6, 3, 2


def draw_picks(shape, seed=0):
  """Distinct picks of normal and zero experts; every third token has none recorded."""
  rng = np.random.default_rng(seed)
  picks = np.argsort(rng.random((*shape, N + NZ)), axis=-1)[..., :K].astype(np.int16)
  picks[..., ::3, :] = -1
  return picks


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_are_those_of_the_given_picks(normalize):
  rng = np.random.default_rng(0)
  scores = rng.dirichlet(np.ones(N + NZ), 40).astype(np.float32)
  given = draw_picks((40,))
  found = route(jnp.asarray(scores), K, N, normalize=normalize, scaling=1.8, replay=jnp.asarray(given))
  for t in range(40):
    own = np.argsort(-scores[t], kind="stable")[:K]
    picks = own if given[t, 0] < 0 else given[t]
    weights = scores[t, picks].astype(np.float64)
    np.testing.assert_array_equal(found.picks[t], picks)
    np.testing.assert_allclose(found.weights[t], 1.8 * weights / (weights.sum() if normalize else 1.0), rtol=1e-5)
    assert found.replaced[t] == len(set(own) - set(picks))
  assert found.picks.dtype == jnp.int32 and 0 < found.replaced.sum() < 40 * K
  assert route(jnp.asarray(scores), K, N).replaced is None


def values(graphdef, params, batch, replay=None):
  model = merge_model(graphdef, params)
  out = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"], replay=replay)
  real = (batch["segment_ids"] > 0)[..., None]
  return jnp.where(real, out.hidden, 0.0), out


with_gradients = jax.jit(
  jax.value_and_grad(
    lambda params, graphdef, batch, replay: (jnp.sin(values(graphdef, params, batch, replay)[0])).sum()
  ),
  static_argnums=1,
)


@pytest.mark.parametrize("kind", ["qwen3", "glm"])
def test_replaying_the_own_picks_changes_nothing(kind):
  changes = {"moe_layers": (True, False, True)} if kind == "qwen3" else GLM
  graphdef, params = split_model(tiny_model(num_zero_experts=NZ, **changes))
  batch = make_batch()
  hidden, out = jax.jit(values, static_argnums=0)(graphdef, params, batch)
  again, replayed = jax.jit(values, static_argnums=0)(graphdef, params, batch, out.picks.astype(jnp.int16))
  np.testing.assert_allclose(again, hidden, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(replayed.picks, out.picks)
  assert not replayed.replaced.any()
  if kind == "glm":
    return  # the gradients of one kind are enough, of one run of layers
  graphdef, params = split_model(tiny_model(num_zero_experts=NZ, moe_layers=(True,)))
  out = jax.jit(values, static_argnums=0)(graphdef, params, batch)[1]
  (loss, grads), (other, others) = (with_gradients(params, graphdef, batch, r) for r in (None, out.picks))
  np.testing.assert_allclose(other, loss, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), others, grads)


def test_foreign_picks_go_to_their_layers():
  """Layer by layer: what the model picked is what was given, where something was given."""
  graphdef, params = split_model(tiny_model(num_zero_experts=NZ, moe_layers=(True, False, True)))
  batch = make_batch()
  given = draw_picks((2, *batch["tokens"].shape))
  own = jax.jit(values, static_argnums=0)(graphdef, params, batch)[1].picks
  out = jax.jit(values, static_argnums=0)(graphdef, params, batch, given)[1]
  recorded = given[..., :1] >= 0
  np.testing.assert_array_equal(np.where(recorded, out.picks, 0), np.where(recorded, given, 0))
  first = ~recorded[0, ..., 0]  # in the first layer, tokens without a record route as always
  np.testing.assert_array_equal(np.asarray(out.picks[0])[first], np.asarray(own[0])[first])
  assert out.replaced.shape == given.shape[:3] and not np.asarray(out.replaced)[0][first].any()


def opd_settings():
  settings = default_config().opd
  settings.update(prompts_per_step=3, samples_per_prompt=2, max_new_tokens=9, routing_replay=True)
  return settings


def test_what_was_picked_while_sampling_is_what_training_picks():
  teacher = tiny_model(moe_layers=(True, True))
  student = inject(teacher, NZ)
  prompts = [random_tokens((length,), seed=length).tolist() for length in (4, 7, 11)]
  sampler = Sampler(opd_settings(), 0, range(3), prompts.__getitem__, 11)
  batch = sampler(student, [0, 1, 2], 0)
  assert batch["replay"].shape == (6, 32, 2, K) and batch["replay"].dtype == np.int16
  lengths = (batch["segment_ids"] > 0).sum(axis=1)
  for row, length in enumerate(lengths):
    assert (batch["replay"][row, : length - 1] >= 0).all() and (batch["replay"][row, length - 1 :] == -1).all()

  graphdef, params = split_model(student)

  @jax.jit
  def differs(params):
    objective = Objective("reverse_kl", chunk_size=64)
    model = merge_model(graphdef, params)
    return batch_loss(objective, model, teacher, batch, BALANCE, jnp.float32(9))[1]["means"]["replay_differs"]

  assert differs(params) == 0
  rng = np.random.default_rng(0)
  moved = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), params)
  assert 0.01 < differs(moved) < 0.9


def test_the_setting_is_off_unless_it_is_asked_for():
  assert default_config().opd.routing_replay is False
  settings = opd_settings()
  settings.routing_replay = False
  sampler = Sampler(settings, 0, [0], lambda _: [1, 2], 2)
  assert "replay" not in sampler(inject(tiny_model(moe_layers=(True,)), NZ), [0, 0, 0], 0)
