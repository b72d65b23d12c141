"""Rows of a batch on a mesh: padding that nothing sees, parts that do not depend on the mesh, rows that stay."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.distill.batches import BALANCE, make_batch
from tests.multiprocess import run_everywhere
from tests.tiny_models import GLM, random_tokens, tiny_model
from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.distill import placement
from zeda_jax.distill.objectives import Objective, batch_loss
from zeda_jax.distill.optimizer import OptimizerConfig, make_optimizer
from zeda_jax.distill.placement import place_local, place_whole
from zeda_jax.distill.step import _gradients, abstract_state, init_state, split_rows
from zeda_jax.evaluate.runner import teacher_distance
from zeda_jax.models.decoder import inject
from zeda_jax.models.params import merge_model, reconfigured, split_model
from zeda_jax.rollout import decoding
from zeda_jax.rollout.generate import generate
from zeda_jax.sharding import Rules, Sharding, make_mesh

THIS = "tests.distill.test_placement"


def test_row_i_is_in_part_i_modulo_parts_whatever_the_processes(monkeypatch):
  """The rows of every process as they would lie on its devices, for batches that divide and others."""
  for processes, local_devices, rows, parts in ((1, 4, 6, 2), (2, 2, 3, 2), (3, 1, 5, 4), (4, 2, 1, 3), (2, 4, 8, 1)):
    placed = []
    monkeypatch.setattr(placement, "rows_on_mesh", lambda batch, sharding, to=placed: to.append(batch["x"]))
    monkeypatch.setattr(jax, "process_count", lambda p=processes: p)
    for process in range(processes):
      monkeypatch.setattr(jax, "process_index", lambda p=process: p)
      numbers = 1 + process * rows + np.arange(rows)  # 0 is an empty row
      sharding = type("Mesh", (), {"num_devices": processes * local_devices})()
      place_local({"x": numbers[:, None]}, sharding, parts)
    assert len({len(x) for x in placed}) == 1 and len(placed[0]) % (local_devices * parts) == 0
    assert len(placed[0]) < rows + parts + local_devices * parts
    everything = np.concatenate(placed)[:, 0]
    np.testing.assert_array_equal(everything[everything > 0], 1 + np.arange(processes * rows))
    by_part = np.asarray(split_rows({"x": everything}, parts)["x"])
    for part, found in enumerate(by_part):
      assert ((found[found > 0] - 1) % parts == part).all()


@pytest.mark.parametrize(
  "loss, balance_tokens, parts",
  [
    ("sampled", "response", 2),
    pytest.param("sampled", "response", 1, marks=pytest.mark.slow),
    pytest.param("forward_kl", "all", 2, marks=pytest.mark.slow),
    pytest.param("reverse_kl", "all", 4, marks=pytest.mark.slow),
  ],
)
def test_empty_rows_change_nothing(loss, balance_tokens, parts):
  """Loss, gradients and metrics of a batch with empty rows before and behind are those without.

  Row 3 has padding only, so of four parts one is empty, and of two one has more tokens.
  """
  teacher = tiny_model(moe_layers=(True,))
  graphdef, params = split_model(inject(teacher, 3))
  batch = make_batch()
  padded = placement._padded(batch, 4, 9, 4)  # 4 before, 4 behind
  assert [int(row.sum() > 0) for row in padded["segment_ids"]] == [0] * 4 + [1, 1, 1, 0] + [0] * 4

  @jax.jit
  def run(batch):
    def loss_fn(params, _, part, tokens):
      student = merge_model(graphdef, params)
      return batch_loss(Objective(loss, "group", balance_tokens), student, teacher, part, BALANCE, tokens, parts)

    return _gradients(loss_fn, params, None, batch, parts)

  (grads, metrics), (found, found_metrics) = run(batch), run(padded)
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
  assert scale > 1e-3
  # Sums over more rows are rounded in another order.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale), found, grads)
  assert metrics["loss_balance"] > 0 and found_metrics.keys() == metrics.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(found_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


# --- eight devices, in a process of their own ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp("models")
  save_hf(tiny_model(num_experts=8, moe_layers=(True,)), path / "qwen3")
  save_hf(tiny_model(num_experts=8, **GLM), path / "glm")
  return path


SAMPLED, OTHERS = ((0.8, 5),), ((0.0, 0), (1.0, 0))  # temperature, top_k


def test_eight_devices(directory):
  run_everywhere(f"{THIS}:check_eight", 1, 8, directory, ["qwen3"], SAMPLED)


@pytest.mark.slow
def test_eight_devices_with_both_families_and_every_way_of_sampling(directory):
  run_everywhere(f"{THIS}:check_eight", 1, 8, directory, ["glm", "qwen3"], SAMPLED + OTHERS)


def check_eight(directory, families, ways):
  sharding = Sharding(make_mesh(2, 4), rules=Rules(replicated_below=0))
  check_rows_stay(sharding)
  for family in families:
    static = load_hf(pathlib.Path(directory) / family)
    placed = load_hf(pathlib.Path(directory) / family, sharding=sharding.parameter)
    placed = reconfigured(placed, sharding=sharding)
    check_state(inject(static), inject(placed), sharding)
    check_generation(inject(static), inject(placed), ways)
    if len(ways) > 1:
      check_distance(static, placed)


def check_rows_stay(sharding):
  """Splitting a batch into parts sends nothing between devices."""
  batch = place_whole(make_batch(), sharding, parts=2)
  assert batch["tokens"].shape == (16, 16)
  compiled = jax.jit(lambda b: split_rows(b, 2, sharding)).lower(batch).compile()
  text = compiled.as_text()
  assert not [name for name in ("all-", "collective", "permute") if name in text], text
  rows = sharding.num_devices * 2
  np.testing.assert_array_equal(compiled(batch)["tokens"].reshape(rows, -1)[:2], batch["tokens"][:4:2])


def check_state(static, placed, sharding):
  """The state is made, and described, where the rules want it, and holds the same numbers."""
  optimizer = make_optimizer(OptimizerConfig(), 10)
  (_, params), (_, placed_params) = split_model(static), split_model(placed)
  expected = init_state(params, optimizer, 5)
  state = init_state(placed_params, optimizer, 5, sharding)
  described = abstract_state(placed_params, optimizer, sharding)
  plain = abstract_state(params, optimizer)

  def check(leaf, want, shape, plain_shape, where):
    assert leaf.sharding.is_equivalent_to(where, leaf.ndim) and shape.sharding == where
    assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype) == (plain_shape.shape, plain_shape.dtype)
    assert plain_shape.sharding == want.sharding
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf, want = jax.random.key_data(leaf), jax.random.key_data(want)
    np.testing.assert_array_equal(leaf, want)

  jax.tree.map(check, state, expected, described, plain, sharding.state(state))
  largest = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
  assert largest.addressable_shards[0].data.size == largest.size // 8
  assert all(a is not b for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(placed_params), strict=True))
  jax.tree.map(lambda leaf: leaf.delete(), state)
  jax.tree.map(np.asarray, placed_params)  # the model's own arrays are not those of the state


def check_generation(static, placed, ways):
  prompts = [random_tokens((n,), seed=n).tolist() for n in (3, 9, 5, 12, 7)]
  for number, (temperature, top_k) in enumerate(ways):
    options = {"max_new_tokens": 6, "temperature": temperature, "top_k": top_k, "seed": 2**31 + 3, "eos_id": 7}
    expected = generate(static, prompts, batch_size=3, **options)
    programs = lambda: (decoding.prefill._cache_size(), decoding.decode._cache_size())
    before = programs()
    found = generate(placed, prompts, batch_size=3, **options)
    made = programs()
    assert (made[1] - before[1], made[0] > before[0]) == ((0, False) if number else (1, True))  # one for all settings
    assert generate(placed, prompts, batch_size=3, **options) == found
    assert programs() == made  # the second call compiles nothing
    for one, two in zip(found, expected, strict=True):
      assert (one.tokens, one.finished) == (two.tokens, two.finished)
      np.testing.assert_allclose(one.logprobs, two.logprobs, rtol=1e-5, atol=1e-5)
      np.testing.assert_allclose([one.zero_ratio, one.zero_ratio_all], [two.zero_ratio, two.zero_ratio_all], rtol=1e-5)


def check_distance(static, placed):
  prompts = [random_tokens((n,), seed=n).tolist() for n in (3, 9, 5)]
  expected = teacher_distance(inject(static), static, prompts, prompts, batch_size=2)
  found = teacher_distance(inject(placed), placed, prompts, prompts, batch_size=2)
  assert expected["forward_kl"] > 1e-3
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5)
