"""Rows of a batch on a mesh: padding that nothing sees, parts that do not depend on the mesh, rows that stay."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.distill.batches import BALANCE, make_batch
from tests.processes import run_everywhere
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
from zeda_jax.rollout.generate import generate, generate_batch
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


def test_empty_rows_change_nothing():
  """Loss, gradients and metrics of a batch with empty rows before, between and behind are those without, parts or not.

  Of the two parts one has more tokens, and the part of row 3 has rows of padding only.
  """
  teacher = tiny_model(moe_layers=(True,))
  graphdef, params = split_model(inject(teacher, 3))
  batch = make_batch()
  padded = placement._padded(batch, 2, 9, 4)  # 2 before, 6 behind
  assert len(padded["tokens"]) == 12
  for loss, balance_tokens in (("forward_kl", "all"), ("sampled", "response")):
    objective = Objective(loss, "group", balance_tokens)

    @functools.partial(jax.jit, static_argnums=1)
    def run(batch, parts, objective=objective):
      loss_fn = lambda p, _, part, tokens: batch_loss(
        objective, merge_model(graphdef, p), teacher, part, BALANCE, tokens, parts
      )
      return _gradients(loss_fn, params, None, batch, parts)

    for parts in (1, 2):
      (grads, metrics), (found, found_metrics) = run(batch, parts), run(padded, parts)
      scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * scale), found, grads)  # noqa: B023
      assert metrics["loss_balance"] > 0 and found_metrics.keys() == metrics.keys()
      for name, value in metrics.items():
        np.testing.assert_allclose(found_metrics[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


# --- eight devices, in a process of their own ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp("models")
  save_hf(tiny_model(num_experts=8, moe_layers=(True,)), path / "qwen3")
  save_hf(tiny_model(num_experts=8, **GLM), path / "glm")
  return path


def test_eight_devices(directory):
  run_everywhere(f"{THIS}:check_eight", 1, 8, directory)


def check_eight(directory):
  sharding = Sharding(make_mesh(2, 4), rules=Rules(replicated_below=0))
  check_rows_stay(sharding)
  for family in ("qwen3", "glm"):
    static = load_hf(pathlib.Path(directory) / family)
    placed = load_hf(pathlib.Path(directory) / family, sharding=sharding.parameter)
    placed = reconfigured(placed, sharding=sharding)
    check_state(inject(static), inject(placed), sharding)
    check_generation(inject(static), inject(placed))
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


def check_generation(static, placed):
  prompts = [random_tokens((n,), seed=n).tolist() for n in (3, 9, 5, 12, 7)]
  for temperature, top_k in ((0.0, 0), (1.0, 0), (0.8, 5)):
    options = {"max_new_tokens": 6, "temperature": temperature, "top_k": top_k, "seed": 2**31 + 3, "eos_id": 7}
    expected = generate(static, prompts, batch_size=3, **options)
    before = generate_batch._cache_size()
    found = generate(placed, prompts, batch_size=3, **options)
    assert generate_batch._cache_size() == before + 1
    assert generate(placed, prompts, batch_size=3, **options) == found
    assert generate_batch._cache_size() == before + 1  # the second batch and the second call compile nothing
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
