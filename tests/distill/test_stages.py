"""The training stages: on-policy batches, and a finished stage that is only read back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import rich.console

from tests.tiny_models import tiny_model
from zeda_jax.data.rollouts import make_record, write_shard
from zeda_jax.distill.recipe import default_config
from zeda_jax.distill.sampler import on_policy_batch
from zeda_jax.distill.stages import Stage, run_opd, run_sft
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import inject
from zeda_jax.models.params import merge_model, split_model
from zeda_jax.rollout import decoding
from zeda_jax.rollout.engine import Engine


@pytest.fixture(scope="module")
def teacher():
  return tiny_model(moe_layers=(True,))


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
  rng = np.random.default_rng(0)
  draw = lambda low, high: rng.integers(0, 64, rng.integers(low, high)).tolist()
  records = (make_record({"prompt": "x"}, i, draw(2, 6), draw(1, 9)) for i in range(24))
  return [write_shard(tmp_path_factory.mktemp("rollouts"), 0, 1, records)]


def stage(teacher, directory, name="sft"):
  settings = default_config()[name]
  settings.save_every = 2
  if name == "sft":
    settings.update(loss="forward_kl", epochs=1, batch_size=4, row_length=16)
    settings.optimizer.learning_rate = 1e-3
  else:
    settings.update(loss="reverse_kl", steps=2, prompts_per_step=3, samples_per_prompt=2, max_new_tokens=5)
  return Stage(name, teacher, settings, directory, 0, rich.console.Console(quiet=True))


def assert_same_parameters(one, two):
  jax.tree.map(np.testing.assert_array_equal, split_model(one)[1], split_model(two)[1])


def test_on_policy_batch():
  prompts, responses = [[7, 8, 9], [4]], [[1, 2], [5, 6, 3]]
  logprobs = [[-0.1, -0.2], [-0.3, -0.4, -0.5]]
  batch = on_policy_batch(prompts, responses, logprobs, 8)
  np.testing.assert_array_equal(batch["tokens"], [[7, 8, 9, 1, 2, 0, 0, 0], [4, 5, 6, 3, 0, 0, 0, 0]])
  np.testing.assert_array_equal(batch["targets"], [[8, 9, 1, 2, 0, 0, 0, 0], [5, 6, 3, 0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
  np.testing.assert_array_equal(batch["loss_mask"], [[0, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]])
  # each log-prob stands where its token is the target
  expected = np.float32([[0, 0, -0.1, -0.2, 0, 0, 0, 0], [-0.3, -0.4, -0.5, 0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(batch["old_logprobs"], expected)


def test_a_finished_stage_is_only_read_back(teacher, rollouts, tmp_path, monkeypatch):
  part = stage(teacher, tmp_path)
  part.settings.trainable = "router"
  trained = run_sft(part, inject(teacher), rollouts)
  before, after = split_model(teacher)[1], split_model(trained)[1]
  router = lambda params: params["runs"][0]["mlp"]["router"]["weight"]
  assert not np.array_equal(router(before), router(after))
  # the router sets need no second copy of the model, and store none
  assert after["runs"][0]["mlp"]["experts"]["gate_up"] is before["runs"][0]["mlp"]["experts"]["gate_up"]
  assert after["embed"]["embedding"] is before["embed"]["embedding"]
  stored = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*") if "ocdbt" in str(file))
  assert stored < sum(leaf.nbytes for leaf in jax.tree.leaves(before))
  steps = json.loads((tmp_path / "finished.json").read_text())["steps"]
  assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == steps

  monkeypatch.setattr("zeda_jax.distill.stages.run_training", lambda **options: pytest.fail("trained again"))
  assert_same_parameters(run_sft(part, inject(teacher), rollouts), trained)
  assert_same_parameters(part.restored(inject(teacher)), trained)


def test_checkpoints_that_are_gone_are_told(teacher, tmp_path):
  with pytest.raises(ZedaError, match=r"checkpoints is gone"):
    stage(teacher, tmp_path).restored(inject(teacher))


def render(index):
  return [index, 1, 2]


def test_on_policy_sampling_follows_seed_and_step(teacher, tmp_path, monkeypatch):
  """Each step samples the prompts of its own batch, with another seed each step, the same in another run."""
  calls, run = [], Engine.run

  def record(self, requests, *rest):
    calls.append([(tuple(r.prompt), r.seed, r.stream, r.n) for r in requests])
    return run(self, requests, *rest)

  monkeypatch.setattr(Engine, "run", record)
  for name in ("a", "b"):
    run_opd(stage(teacher, tmp_path / name, "opd"), inject(teacher), [3, 5, 7, 9], render, longest=3)
  assert calls[:2] == calls[2:]
  first, second = calls[:2]
  assert {seed for _, seed, *_ in first} != {seed for _, seed, *_ in second}
  for requests in (first, second):
    assert len({seed for _, seed, *_ in requests}) == 1
    assert [streams for _, _, *streams in requests] == [[0, 2], [2, 2], [4, 2]]  # two samples of each of three prompts
  assert {p[0] for p, *_ in first} <= {3, 5, 7, 9} and len({p[0] for p, *_ in first}) == 3
  rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("a", "b")]
  assert [json.loads(line)["loss"] for line in rows[0]] == [json.loads(line)["loss"] for line in rows[1]]


def test_the_engine_takes_the_student_s_own_arrays_and_compiles_once(teacher, tmp_path, monkeypatch):
  """One engine for all steps; between them it holds neither parameters nor cache."""
  engines, update, release = [], Engine.update, Engine.release

  def check_update(self, params):
    assert self._params is None and self._pages is None
    update(self, params)
    assert all(mine is given for mine, given in zip(*map(jax.tree.leaves, (self._params, params)), strict=True))

  def check_release(self):
    assert not self._pages[0].is_deleted()
    engines.append((self, decoding.prefill._cache_size(), decoding.decode._cache_size()))
    release(self)

  monkeypatch.setattr(Engine, "update", check_update)
  monkeypatch.setattr(Engine, "release", check_release)
  monkeypatch.setattr("zeda_jax.rollout.engine.unstacked", lambda graphdef, params: (graphdef, params))
  part = stage(teacher, tmp_path, "opd")
  part.settings.steps = 4
  before = decoding.decode._cache_size()
  # as a checkpoint's arrays are: bound to a device
  graphdef, params = split_model(teacher)
  bound = merge_model(graphdef, jax.device_put(params, jax.devices()[0]))
  run_opd(dataclasses.replace(part, teacher=bound), inject(bound), [3, 5, 7, 9], render, longest=3)
  assert len(engines) == 4 and len(set(engines)) == 1
  assert decoding.decode._cache_size() == before + 1
