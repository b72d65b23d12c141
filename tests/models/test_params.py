import jax
import numpy as np
import pytest

from tests.tiny_models import GLM, forward, random_tokens, tiny_model
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import inject
from zeda_jax.models.params import (
  combine,
  merge_model,
  partition,
  reconfigured,
  split_model,
  trainable_partition,
  unstacked,
)

PATHS = {
  "router": {"weight", "zero_weight"},
  "router+norms": {"weight", "zero_weight", "scale"},
}


def leaves(params):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def test_split_and_merge_share_the_arrays():
  model = inject(tiny_model(moe_layers=(True, False)), 3)
  graphdef, params = split_model(model)
  before = leaves(params)
  after = leaves(split_model(merge_model(graphdef, params))[1])
  assert before.keys() == after.keys()
  assert all(after[path] is before[path] for path in before)


@pytest.mark.parametrize("name", PATHS)
def test_trainable_sets(name):
  _, params = split_model(inject(tiny_model(moe_layers=(True, False)), 3))
  trained, frozen = trainable_partition(params, name)
  assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)} == PATHS[name]
  assert not PATHS[name] & {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(frozen)}
  whole, again = leaves(params), leaves(combine(trained, frozen))
  assert whole.keys() == again.keys()
  assert all(again[path] is whole[path] for path in whole)


def test_training_everything_freezes_nothing():
  _, params = split_model(tiny_model())
  trained, frozen = trainable_partition(params, "all")
  assert frozen == {}
  assert leaves(trained).keys() == leaves(params).keys()


@pytest.mark.parametrize("name", ["all", "router", "router+norms"])
def test_correction_biases_are_never_trained(name):
  _, params = split_model(inject(tiny_model(**GLM), 3))
  trained, frozen = trainable_partition(params, name)
  biases = {"['runs'][1]['mlp']['router']['correction_bias']", "['runs'][1]['mlp']['router']['zero_correction_bias']"}
  assert not biases & leaves(trained).keys()
  assert biases <= leaves(frozen).keys()
  assert (leaves(frozen).keys() == biases) == (name == "all")


def test_an_unknown_set_is_an_error():
  with pytest.raises(ZedaError, match=r"trainable is 'experts'; expected one of all, router, router\+norms"):
    trainable_partition({}, "experts")


def test_later_parts_win():
  yes, no = partition({"a": {"b": 1, "c": 2}}, lambda path: path == ("a", "b"))
  assert (yes, no) == ({"a": {"b": 1}}, {"a": {"c": 2}})
  assert combine({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_reconfigured_shares_the_arrays_and_changes_the_routing():
  model = tiny_model()
  other = reconfigured(model, num_experts_per_tok=1)
  before, after = (leaves(split_model(m)[1]) for m in (model, other))
  assert all(after[path] is before[path] for path in before)
  assert (model.config.num_experts_per_tok, other.config.num_experts_per_tok) == (2, 1)
  assert jax.eval_shape(other, random_tokens((1, 8))).picks.shape == (2, 1, 8, 1)


def test_unstacked_layers_compute_the_same():
  model = tiny_model(moe_layers=(False, True, True, True))
  graphdef, params = unstacked(*split_model(model))
  other = merge_model(graphdef, params)
  assert [run.length for run in other.config.layer_runs] == [1] * 4
  assert params["runs"][3]["mlp"]["router"]["weight"].shape == (1, 6, 32)
  tokens = random_tokens((2, 9))
  np.testing.assert_allclose(forward(other, tokens).logits, forward(model, tokens).logits, rtol=1e-5, atol=1e-5)
