"""Stage losses against the naive computation that makes the logits [B, T, V] of both models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.distill.batches import ALPHA, BALANCE, LENGTH, ROWS, W, make_batch
from tests.tiny_models import forward as tiny_forward
from tests.tiny_models import tiny_model
from zeda_jax.distill.objectives import BALANCE_TOKENS, LOSSES, Objective, aux_loss, batch_loss
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import inject
from zeda_jax.models.params import merge_model, split_model
from zeda_jax.zero_experts import Routing, adamoe_balance_loss, expert_balance_loss, group_balance_loss


def moved_student(teacher):
  graphdef, params = split_model(inject(teacher, 3))
  rng = np.random.default_rng(1)
  moved = jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape).astype(np.float32), params)
  return merge_model(graphdef, moved)


@pytest.fixture(scope="module")
def models():
  """A student that has moved away from its teacher, and the teacher."""
  teacher = tiny_model(moe_layers=(True,))
  return moved_student(teacher), teacher


def naive_losses(student, teacher, batch):
  """The four losses, in the order of LOSSES."""
  forward = batch["tokens"], batch["segment_ids"], batch["positions"]
  real = batch["segment_ids"] > 0

  def group(routing, live):
    return group_balance_loss(routing.scores, routing.picks, 6, W, ALPHA, real.reshape(-1))

  out = student.hidden(*forward, aux_loss=group)
  log_p = jax.nn.log_softmax(student.logits(out.hidden), axis=-1)
  log_q = jax.lax.stop_gradient(jax.nn.log_softmax(teacher(*forward).logits, axis=-1))
  of_target = lambda log: jnp.take_along_axis(log, batch["targets"][..., None], axis=-1)[..., 0]
  advantage = of_target(log_q) - batch["old_logprobs"]
  ratio = jnp.exp(of_target(log_p) - batch["old_logprobs"])
  per_token = {
    "cross_entropy": -of_target(log_p),
    "forward_kl": (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1),
    "sampled": -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.3) * advantage),
    "reverse_kl": (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1),
  }
  mean = lambda values: (values * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
  return jnp.stack([mean(per_token[loss]) for loss in LOSSES]) + out.aux_loss.sum()


@pytest.fixture(scope="module")
def naive(models):
  """naive(loss) -> (value, gradients); one program for all losses."""
  student, teacher = models
  graphdef, params = split_model(student)

  @jax.jit
  @jax.value_and_grad
  def run(params, chosen):
    return naive_losses(merge_model(graphdef, params), teacher, make_batch()) @ chosen

  return lambda loss: run(params, np.float32(np.array(LOSSES) == loss))


@functools.cache
def objective(loss):
  return Objective(loss, clip_low=0.2, clip_high=0.3, chunk_size=10)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_equal_the_naive_ones(models, naive, loss):
  student, teacher = models
  graphdef, params = split_model(student)
  batch = make_batch()
  tokens = batch["loss_mask"].sum()

  @jax.jit
  @jax.value_and_grad
  def ours(params):
    return batch_loss(objective(loss), merge_model(graphdef, params), teacher, batch, BALANCE, tokens)[0]

  (value, gradients), (expected, expected_gradients) = ours(params), naive(loss)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_gradients))
  assert scale > 1e-3
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * scale), gradients, expected_gradients
  )


@pytest.fixture(scope="module")
def run(models):
  """run(objective, batch) -> (loss, metrics); one program per objective."""
  student, teacher = models
  program = jax.jit(
    lambda chosen, b: batch_loss(chosen, student, teacher, b, BALANCE, b["loss_mask"].sum()), static_argnums=0
  )
  return program


def test_metrics_are_what_they_are_called():
  teacher = tiny_model()
  student = moved_student(teacher)
  batch = make_batch()
  tokens = batch["loss_mask"].sum()
  loss, metrics = jax.jit(lambda: batch_loss(objective("forward_kl"), student, teacher, batch, BALANCE, tokens))()
  sums, means = metrics["sums"], metrics["means"]
  np.testing.assert_allclose(loss, sums["loss_distill"] + means["loss_balance"], rtol=1e-6)
  np.testing.assert_allclose(sums["loss_distill"], sums["forward_kl"], rtol=1e-6)
  forward = batch["tokens"], batch["segment_ids"], batch["positions"]
  out = tiny_forward(student, *forward)
  masked = batch["loss_mask"] > 0
  log_p = np.asarray(jax.nn.log_softmax(out.logits, axis=-1), np.float64)[masked]
  log_q = np.asarray(jax.nn.log_softmax(tiny_forward(teacher, *forward).logits, axis=-1), np.float64)[masked]
  expected = {
    "cross_entropy": -log_p[np.arange(len(log_p)), batch["targets"][masked]].mean(),
    "entropy": -(np.exp(log_p) * log_p).sum(axis=-1).mean(),
    "forward_kl": (np.exp(log_q) * (log_q - log_p)).sum(axis=-1).mean(),
    "reverse_kl": (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean(),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(sums[name], value, rtol=1e-4, err_msg=name)
  zero = np.asarray(out.picks) >= 6
  real = batch["segment_ids"] > 0
  np.testing.assert_allclose(means["zero_ratio"], zero[:, real].mean(), rtol=1e-6)
  np.testing.assert_allclose(means["zero_ratio/response"], zero[:, masked].mean(), rtol=1e-6)
  np.testing.assert_allclose(means["zero_ratio/layer"], zero[:, real].mean(axis=(1, 2)), rtol=1e-6)


def test_what_is_masked_does_not_count(run):
  batch = make_batch()
  padding = batch["segment_ids"] == 0
  garbage = {
    "tokens": np.where(padding, 63, batch["tokens"]),
    "targets": np.where(batch["loss_mask"] == 0, 10**6, batch["targets"]),
    "old_logprobs": np.where(batch["loss_mask"] == 0, np.nan, batch["old_logprobs"]).astype(np.float32),
  }
  for loss in ("cross_entropy", "sampled"):
    expected, found = run(objective(loss), batch), run(objective(loss), batch | garbage)
    np.testing.assert_array_equal(found[0], expected[0])


def test_a_batch_without_response_tokens_has_only_the_balance_loss(run):
  batch = make_batch() | {"loss_mask": np.zeros((ROWS, LENGTH), np.float32)}
  loss, metrics = run(objective("reverse_kl"), batch)
  assert metrics["sums"]["loss_distill"] == 0
  np.testing.assert_allclose(loss, metrics["means"]["loss_balance"])
  assert loss > 0


def test_a_dynamic_teacher_runs_masked(models):
  student, teacher = models
  batch = make_batch()
  run = lambda t: jax.jit(lambda: batch_loss(objective("forward_kl"), student, t, batch, BALANCE, 10.0)[0])()
  assert run(inject(teacher, 3, seed=9)) == run(teacher)


def test_there_may_be_nothing_to_balance(models):
  student, teacher = models
  everything = np.ones(ROWS * LENGTH, bool)
  assert aux_loss(Objective(), student.config, BALANCE, everything) is not None
  assert aux_loss(Objective(balance="none"), student.config, BALANCE, everything) is None
  assert aux_loss(Objective(), teacher.config, BALANCE, everything) is None  # a static student


@pytest.mark.parametrize("tokens", BALANCE_TOKENS)
@pytest.mark.parametrize("balance", ["group", "expert", "adamoe"])
def test_balance_losses_count_the_tokens_they_name(models, balance, tokens):
  student, _ = models
  rng = np.random.default_rng(0)
  scores = rng.dirichlet(np.ones(9), 40).astype(np.float32)
  routing = Routing(scores, np.argsort(-scores, axis=1)[:, :2], None)
  live, response = rng.random(40) < 0.8, rng.random(40) < 0.3
  response &= live
  found = aux_loss(Objective(balance=balance, balance_tokens=tokens), student.config, BALANCE, response)(routing, live)
  counted = {"all": live, "response": response}[tokens]
  only = routing.scores[counted], routing.picks[counted]
  expected = {
    "group": lambda: group_balance_loss(*only, 6, W, ALPHA),
    "expert": lambda: expert_balance_loss(*only, ALPHA),
    "adamoe": lambda: adamoe_balance_loss(*only, 6, ALPHA),
  }[balance]()
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_response_is_the_passes_that_predict_it(models):
  """With balance_tokens="response", what the routers do elsewhere has no gradient."""
  student, teacher = models
  batch = make_batch()
  chosen = Objective("cross_entropy", balance_tokens="response", teacher_metrics=False)
  _, metrics = jax.jit(lambda: batch_loss(chosen, student, teacher, batch, BALANCE, 10.0))()
  forward = batch["tokens"], batch["segment_ids"], batch["positions"]
  seen = []
  student.hidden(*forward, aux_loss=lambda routing, live: jax.debug.callback(seen.append, routing) or jnp.zeros(()))
  jax.effects_barrier()
  (routing,) = seen
  mask = batch["loss_mask"].reshape(-1) > 0
  expected = group_balance_loss(routing.scores[mask], routing.picks[mask], 6, W, ALPHA)
  np.testing.assert_allclose(metrics["means"]["loss_balance"], expected, rtol=1e-5)


def test_the_teacher_is_not_run_for_nothing(models):
  student, _ = models
  assert not Objective("cross_entropy", teacher_metrics=False).needs_teacher
  assert Objective("cross_entropy").needs_teacher
  assert all(Objective(loss, teacher_metrics=False).needs_teacher for loss in LOSSES if loss != "cross_entropy")
  _, metrics = jax.eval_shape(
    lambda: batch_loss(
      Objective("cross_entropy", teacher_metrics=False), student, None, make_batch(), BALANCE, jnp.float32(1)
    )
  )
  assert "cross_entropy" in metrics["sums"] and not {"forward_kl", "reverse_kl"} & metrics["sums"].keys()


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"loss": "kl"}, "loss is 'kl'; expected one of cross_entropy"),
    ({"balance": "all"}, "balance is 'all'; expected one of group"),
    ({"balance_tokens": "prompt"}, "balance_tokens is 'prompt'; expected one of all, response"),
  ],
  ids=str,
)
def test_unknown_names(options, words):
  with pytest.raises(ZedaError, match=words):
    Objective(**options)
