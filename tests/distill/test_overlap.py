"""Rollouts made ahead: the losses of a loop that samples with parameters of one step earlier, stopped or not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from tests.tiny_models import tiny_model
from zeda_jax.data.pipeline import prompt_batches
from zeda_jax.distill.metrics import MetricWriter
from zeda_jax.distill.objectives import Objective
from zeda_jax.distill.optimizer import make_optimizer
from zeda_jax.distill.recipe import default_config, optimizer_config
from zeda_jax.distill.sampler import Sampler
from zeda_jax.distill.stages import Stage, run_opd
from zeda_jax.distill.step import Reference, init_state, make_train_step
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import inject
from zeda_jax.models.params import combine, merge_model, split_model, trainable_partition

STEPS, INDICES, LONGEST = 5, [3, 5, 7, 9], 3


def render(index):
  return [index, 1, 2]


@pytest.fixture(scope="module")
def teacher():
  return tiny_model(moe_layers=(True,))


def stage(teacher, directory, overlap=True):
  settings = default_config().opd
  settings.update(loss="sampled", steps=STEPS, prompts_per_step=3, samples_per_prompt=2, max_new_tokens=5)
  settings.update(save_every=2, overlap=overlap)
  settings.optimizer.update(learning_rate=1e-2)  # so that a step changes what is sampled
  return Stage("opd", teacher, settings, directory, 0, rich.console.Console(quiet=True))


def run(part):
  return run_opd(part, inject(part.teacher), INDICES, render, LONGEST)


def losses(directory):
  return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
  directory = tmp_path_factory.mktemp("whole")
  return directory, split_model(run(stage(teacher, directory)))[1]


def one_step_late(part):
  """The losses of a plain loop."""
  settings = part.settings
  graphdef, params = split_model(inject(part.teacher))
  teacher_graphdef, teacher_params = split_model(part.teacher)
  trained, frozen = trainable_partition(params, "all")
  optimizer = optimizer_config(settings)
  objective = Objective("sampled", settings.balance, settings.balance_tokens)
  step = make_train_step(graphdef, teacher_graphdef, objective, optimizer, STEPS)
  balance = {name: np.float32(settings[name]) for name in ("weight", "coefficient")}
  reference = Reference(frozen, teacher_params, balance)
  state = init_state(trained, make_optimizer(optimizer, STEPS), part.seed)
  batches = prompt_batches(len(INDICES), settings.prompts_per_step, part.seed)
  sampler, before, found = Sampler(settings, part.seed, INDICES, render, LONGEST), trained, []
  for number in range(STEPS):
    batch = sampler(merge_model(graphdef, combine(frozen, before)), next(batches), number)
    before = jax.tree.map(jnp.copy, state.params)
    state, metrics = step(state, reference, batch)
    found.append(float(metrics["loss"]))
  return found


def test_losses_are_those_of_sampling_with_parameters_of_one_step_earlier(teacher, whole, tmp_path):
  directory, _ = whole
  np.testing.assert_allclose(losses(directory), one_step_late(stage(teacher, tmp_path)), rtol=1e-6)
  assert not (directory / "ahead").exists()
  run(stage(teacher, tmp_path / "on-policy", overlap=False))
  on_policy = losses(tmp_path / "on-policy")
  assert on_policy[0] == losses(directory)[0] and on_policy[1:] != losses(directory)[1:]


def stop_at(monkeypatch, step):
  """A process that is killed: nothing is written from this step's metrics on."""
  write = MetricWriter.write

  def dies(self, number, *rest):
    if number == step:
      raise InterruptedError
    write(self, number, *rest)

  monkeypatch.setattr(MetricWriter, "write", dies)


def test_a_killed_run_goes_on_with_the_batch_that_was_made_ahead(teacher, whole, tmp_path, monkeypatch):
  expected_directory, expected = whole
  with monkeypatch.context() as patch, pytest.raises(InterruptedError):
    stop_at(patch, 4)
    run(stage(teacher, tmp_path))
  assert sorted(file.name for file in (tmp_path / "ahead").iterdir()) == ["2.safetensors"]
  found = split_model(run(stage(teacher, tmp_path)))[1]
  assert losses(tmp_path) == losses(expected_directory)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_batch_that_is_gone_is_told(teacher, tmp_path, monkeypatch):
  with monkeypatch.context() as patch, pytest.raises(InterruptedError):
    stop_at(patch, 4)
    run(stage(teacher, tmp_path))
  (tmp_path / "ahead" / "2.safetensors").unlink()
  with pytest.raises(ZedaError, match=r"2.safetensors, the rollouts made ahead of step 3, is gone"):
    run(stage(teacher, tmp_path))
