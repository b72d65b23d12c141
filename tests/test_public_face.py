"""The names that other programs rely on: they exist, with these parameters and defaults, and do what they say."""

import inspect
import subprocess
import sys

import numpy as np
import pytest

import zeda_jax
from tests.tiny_models import QWEN3_30B_A3B, random_tokens, tiny_model

NOTHING = inspect.Parameter.empty
# name -> its parameters in order, with defaults
SIGNATURES = {
  "load_hf": {"path": NOTHING, "dtype": None},
  "save_hf": {"model": NOTHING, "path": NOTHING, "format": "dynamic", "overwrite": False},
  "inject": {"model": NOTHING, "num_zero_experts": None, "seed": 0},
  "group_balance_loss": {
    "scores": NOTHING,
    "picks": NOTHING,
    "num_experts": NOTHING,
    "weight": 2.0,
    "coefficient": 0.1,
    "mask": None,
  },
  "zero_expert_ratio": {"picks": NOTHING, "num_experts": NOTHING, "mask": None},
  "generate": {
    "model": NOTHING,
    "prompts": NOTHING,
    "max_new_tokens": NOTHING,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "seed": 0,
    "eos_id": None,
  },
  "theoretical_speedup": {"config": NOTHING, "length": NOTHING, "zero_ratio": 0.5, "stage": "prefill"},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
  found = inspect.signature(getattr(zeda_jax, name)).parameters
  expected = SIGNATURES[name]
  assert list(found)[: len(expected)] == list(expected)
  assert {key: found[key].default for key in expected} == expected
  assert all(p.default is not NOTHING for key, p in found.items() if key not in expected)
  assert all(p.kind == p.POSITIONAL_OR_KEYWORD for key, p in found.items() if key in expected)


def test_model_call_signature():
  found = inspect.signature(zeda_jax.Decoder.__call__).parameters
  expected = {"self": NOTHING, "tokens": NOTHING, "segment_ids": None, "positions": None, "zero_expert_bias": 0.0}
  assert {key: p.default for key, p in found.items()} == expected


def test_all_names_are_there_and_documented():
  for name in zeda_jax.__all__:
    assert inspect.getdoc(getattr(zeda_jax, name)), name
  assert set(zeda_jax.__all__) <= set(dir(zeda_jax))
  with pytest.raises(AttributeError, match="no_such_name"):
    _ = zeda_jax.no_such_name


def test_import_does_not_wait_for_jax():
  code = "import sys, zeda_jax; print('jax' in sys.modules, 'torch' in sys.modules)"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert result.stdout.split() == ["False", "False"]


def test_from_model_to_directory_and_back(tmp_path):
  model = tiny_model()
  student = zeda_jax.inject(model)
  assert student.config.num_zero_experts == model.config.num_experts // 2
  tokens = random_tokens((2, 5))
  out = student(tokens, zero_expert_bias=0.0)
  assert (out.logits.shape, out.logits.dtype) == ((2, 5, 64), np.float32)
  assert (out.picks.shape, out.picks.dtype) == ((2, 2, 5, 2), np.int32)
  ratio = zeda_jax.zero_expert_ratio(out.picks, num_experts=model.config.num_experts)
  assert ratio == pytest.approx((np.asarray(out.picks) >= model.config.num_experts).mean())
  assert 0 < ratio < 1

  zeda_jax.save_hf(student, tmp_path / "student")
  loaded = zeda_jax.load_hf(tmp_path / "student")
  np.testing.assert_array_equal(loaded(tokens).logits, out.logits)
  zeda_jax.save_hf(student, tmp_path / "plain", format="plain")
  assert zeda_jax.load_hf(tmp_path / "plain").config.num_experts == model.config.num_experts * 3 // 2
  with pytest.raises(zeda_jax.ZedaError, match="not empty"):
    zeda_jax.save_hf(student, tmp_path / "student")
  zeda_jax.save_hf(student, tmp_path / "student", overwrite=True)


def test_generate_stops_at_an_eos_of_either_form():
  model = tiny_model(moe_layers=(True,))
  free = zeda_jax.generate(model, [[1, 2, 3]], 6, temperature=0.0)[0]
  assert len(free.tokens) == len(free.logprobs) == 6 and free.zero_ratio == 0.0
  end = free.tokens[2]
  first = free.tokens.index(end) + 1
  for eos_id in (end, [end], np.int32(end)):
    assert zeda_jax.generate(model, [[1, 2, 3]], 6, temperature=0.0, eos_id=eos_id)[0].tokens == free.tokens[:first]


def test_losses_and_speed():
  scores, picks = np.full((4, 3), 1 / 3, np.float32), np.array([[0], [1], [2], [2]])
  loss = zeda_jax.group_balance_loss(scores, picks, num_experts=2, weight=2.0, coefficient=0.1)
  # T=4, K=1, N=2, N_Z=1: f_E = f_Z = 1/2, P_E = 2/3, P_Z = 1/3
  assert loss == pytest.approx(0.1 * (2 + 2) * (0.5 * (2 / 3) / 2 + 0.5 * (1 / 3) / 2), rel=1e-6)
  config = QWEN3_30B_A3B
  assert zeda_jax.theoretical_speedup(config, 1024) == pytest.approx(1.403, abs=5e-4)
  assert zeda_jax.theoretical_speedup(config, 8192, stage="decode") == pytest.approx(1.261, abs=5e-4)
