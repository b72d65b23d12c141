"""Teacher training: packed batches are what the chat template says, accuracy is exact match, and the loss falls."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tiny_models import GLM, tiny_model
from zeda_jax.checkpoint.huggingface import load_hf
from zeda_jax.demo import families, tiny_glm, train_teacher
from zeda_jax.demo.tokenizer import END, PAD, vocabulary
from zeda_jax.models.decoder import Decoder
from zeda_jax.zero_experts import Routing

# The real thing in small, so that a step compiles and runs in seconds.
EVEN = dict.fromkeys(families.FAMILIES, 1 / 3)
TINY = train_teacher.teacher_config().replace(hidden_size=32, moe_layers=(True,), num_experts=4, num_experts_per_tok=2)


@pytest.fixture(scope="module")
def examples():
  return train_teacher.encode(train_teacher._draws("instruction", 200))


def test_pack_keeps_whole_examples_apart(examples):
  batch = train_teacher.pack(iter(examples), rows=3, length=64)
  found = []
  for row in range(3):
    segments = batch["segment_ids"][row]
    assert (np.diff(segments[segments > 0]) >= 0).all()
    for segment in range(1, segments.max() + 1):
      here = segments == segment
      tokens = [*batch["tokens"][row, here], batch["targets"][row, here][-1]]
      assert (batch["positions"][row, here] == np.arange(here.sum())).all()
      assert (batch["targets"][row, here][:-1] == tokens[1:-1]).all()
      # The first prediction counted is made at the last prompt token, the last one is the end of the turn.
      prompt_length = int(here.sum()) + 1 - int(batch["loss_mask"][row, here].sum())
      found.append(([int(t) for t in tokens], prompt_length))
  assert found == examples[: len(found)] and len(found) >= 6
  padding = batch["segment_ids"] == 0
  assert padding.any() and not batch["loss_mask"][padding].any() and not batch["tokens"][padding].any()


def test_stream_draws_families_in_their_shares_and_repeats_nothing_within_an_epoch():
  examples = {family: [([i, j], 1) for j in range(5000)] for i, family in enumerate(families.FAMILIES)}
  shares = {"math": 0.5, "code": 0.3, "instruction": 0.2}
  stream = train_teacher.example_stream(examples, shares, np.random.default_rng(0))
  drawn = [tuple(next(stream)[0]) for _ in range(6000)]
  assert len(set(drawn)) == 6000
  for i, family in enumerate(families.FAMILIES):
    assert abs(sum(d[0] == i for d in drawn) / 6000 - shares[family]) < 0.03


def test_accuracy_counts_whole_responses(examples, monkeypatch):
  """A stand-in model that knows every target but errs on one response token of every fourth example."""
  calls = []

  def rows_right(graphdef, params, batch):
    guesses = batch["targets"].copy()
    for row in range(0, len(guesses), 4):
      last = np.flatnonzero(batch["loss_mask"][row])[-1:]
      guesses[row, last] += 1
    guesses[batch["loss_mask"] == 0] = -1  # what is predicted inside the prompt does not matter
    calls.append(len(guesses))
    return ((guesses == batch["targets"]) | (batch["loss_mask"] == 0)).all(axis=1)

  monkeypatch.setattr(train_teacher, "_rows_right", rows_right)
  assert train_teacher.exact_accuracy(None, None, examples[:40], rows=16) == 30 / 40
  assert calls == [16, 16, 16]  # the last batch is padded to the same shape


def test_routing_loss_is_load_balance_plus_peak():
  rng = np.random.default_rng(0)
  scores = rng.dirichlet(np.ones(8), size=20).astype(np.float32)
  picks = np.argsort(-scores, axis=1)[:, :2]
  live = np.arange(20) < 15
  kept = scores[:15]
  counts = np.bincount(picks[:15].ravel(), minlength=8)
  balance = 8 * ((counts / (15 * 2)) * kept.mean(axis=0)).sum()
  peak = 8 * (kept**2).sum(axis=1).mean()
  expected = train_teacher.BALANCE_COEFFICIENT * balance + train_teacher.PEAK_COEFFICIENT * peak
  weights = jnp.zeros((20, 2))
  found = train_teacher.routing_loss(Routing(jnp.asarray(scores), jnp.asarray(picks), weights), jnp.asarray(live))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_correction_bias_of_the_less_used_experts_rises():
  model = tiny_model(**GLM | {"num_experts": 16, "moe_layers": (False, True, False, True)})
  before = [np.array(model.runs[run].mlp.router.correction_bias[...])[0] for run in (1, 3)]
  picks = np.full((2, 3, 5, 4), 16)  # of two MoE layers; padding picks nothing
  picks[0, 0, 0] = [0, 1, 2, 3]
  picks[1, 1, :2] = [7, 8, 9, 10]
  params = nnx.to_pure_dict(train_teacher.balance_correction(model.config, nnx.state(model), jnp.asarray(picks)))
  first, second = (params["runs"][run]["mlp"]["router"]["correction_bias"][0] for run in (1, 3))
  rate = np.float32(train_teacher.CORRECTION_RATE)
  np.testing.assert_array_equal(first, before[0] + np.where(np.arange(16) < 4, -rate, rate))
  np.testing.assert_array_equal(second, before[1] + np.where((np.arange(16) > 6) & (np.arange(16) < 11), -rate, rate))
  softmax = nnx.state(tiny_model())
  assert train_teacher.balance_correction(tiny_model().config, softmax, jnp.asarray(picks)) is softmax


@pytest.mark.slow
def test_a_tiny_glm_learns_the_tasks_and_skips_half_of_its_experts(tmp_path):
  assert tiny_glm.run(tmp_path) == 0
  summary = (tmp_path / "main" / "summary.md").read_text()
  assert "student (exported)" in summary
  assert json.loads((tmp_path / "main/student/config.json").read_text())["model_type"] == "glm4_moe_lite_plus_plus"


@pytest.mark.slow
def test_training_lowers_the_loss_and_is_repeatable(monkeypatch, capsys):
  monkeypatch.setattr(train_teacher, "teacher_config", lambda: TINY)
  arguments = {
    "phases": [train_teacher.Phase(30, 10, 3e-3, EVEN), train_teacher.Phase(10, 5, 1e-3, EVEN)],
    "rows": 4,
    "length": 64,
    "train_examples": dict.fromkeys(families.FAMILIES, 300),
    "log_every": 10,
  }
  first, second = (train_teacher.train(**arguments) for _ in range(2))
  lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("phase")]
  losses = [float(line.split("response_loss ")[1].split()[0]) for line in lines]
  assert len(losses) == 8 and losses[3] < 0.9 * losses[0]
  assert losses[:4] == losses[4:]
  for a, b in zip(jax.tree.leaves(nnx.state(first)), jax.tree.leaves(nnx.state(second)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_saved_teacher_loads_with_its_settings(tmp_path):
  model = Decoder(TINY, rngs=nnx.Rngs(0))
  train_teacher.save_teacher(model, tmp_path / "out", "the card\n")
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  ids = vocabulary()
  assert (config["eos_token_id"], config["pad_token_id"]) == (ids[END], ids[PAD])
  assert config["num_experts"] == 4 and config["architectures"] == ["Qwen3MoeForCausalLM"]
  generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert generation["eos_token_id"] == ids[END] and generation["do_sample"] is False
  assert (tmp_path / "out" / "README.md").read_text() == "the card\n"
  loaded = load_hf(tmp_path / "out")
  for a, b in zip(jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(nnx.state(model)), strict=True):
    np.testing.assert_array_equal(a, b)
