import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tests.tiny_models import CONFIG, GLM
from zeda_jax.checkpoint import names
from zeda_jax.checkpoint.safetensors_io import TensorSpec
from zeda_jax.config import ModelConfig
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import abstract_decoder

STATIC = CONFIG.replace(moe_layers=(True, True, True))
CONFIGS = {
  "static": STATIC,
  "dynamic": STATIC.replace(num_zero_experts=3),
  "dense layers": STATIC.replace(moe_layers=(False, True, True, False, True), num_zero_experts=1),
  "bias, tied": STATIC.replace(attention_bias=True, tie_word_embeddings=True),
  "glm": STATIC.replace(**GLM, attention_bias=True),
  "glm, direct queries": STATIC.replace(
    **GLM | {"mla": dataclasses.replace(GLM["mla"], q_lora_rank=None), "num_shared_experts": 2}, num_zero_experts=2
  ),
  "olmoe": STATIC.replace(model_type="olmoe", qk_norm="projection", num_zero_experts=3),
}


def stored_for(config: ModelConfig) -> dict[str, TensorSpec]:
  return {name: TensorSpec(name, "BF16", tensor.shape) for name, tensor in names.hf_tensors(config).items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_table_covers_every_parameter_of_the_model(config):
  leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(abstract_decoder(config), nnx.Param)))
  model = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
  grouped = names.parameter_pieces(names.hf_tensors(config))
  assert {path: names.parameter_shape(pieces) for path, pieces in grouped.items()} == model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_pieces_fill_each_parameter_exactly_once(config):
  for pieces in names.parameter_pieces(names.hf_tensors(config)).values():
    filled = np.zeros(names.parameter_shape(pieces), int)
    for tensor, piece in pieces:
      block = filled[piece.index][..., slice(*piece.columns)]
      assert block.shape == names.piece_shape(tensor, piece)
      block += 1
    assert (filled == 1).all()


def test_plain_adds_the_zero_experts_only():
  config = CONFIGS["dense layers"]
  extra = [t for name, t in names.hf_tensors(config, plain=True).items() if name not in names.hf_tensors(config)]
  assert [t.name for t in extra] == [
    f"model.layers.{i}.mlp.experts.6.{part}_proj.weight" for i in (1, 2, 4) for part in ("gate", "up", "down")
  ]
  assert not any(tensor.pieces for tensor in extra)


def test_a_fitting_checkpoint_passes():
  for config in CONFIGS.values():
    assert names.check_tensors(stored_for(config), config, "here").keys() == stored_for(config).keys()


def test_every_finding_is_in_one_sentence():
  stored = stored_for(STATIC)
  for expert in range(4):
    del stored[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
  stored["model.layers.0.surprise"] = TensorSpec("model.layers.0.surprise", "F32", (1,))
  router = "model.layers.2.mlp.gate.weight"
  stored[router] = TensorSpec(router, "BF16", (9, 32))
  stored["model.norm.weight"] = dataclasses.replace(stored["model.norm.weight"], dtype="F8_E4M3")
  with pytest.raises(ZedaError) as caught:
    names.check_tensors(stored, STATIC, "/my/model")
  message = str(caught.value)
  assert "The tensors in /my/model do not fit its config.json: 4 missing (model.layers.1.mlp.experts.0." in message
  assert "experts.2.up_proj.weight, …), 1 unexpected (model.layers.0.surprise)" in message
  assert "1 of the wrong shape (model.layers.2.mlp.gate.weight [9, 32] instead of [6, 32])" in message
  assert "1 of a dtype that is not supported (model.norm.weight F8_E4M3)" in message
  assert "\n" not in message


def test_what_a_checkpoint_may_hold_besides():
  stored = stored_for(STATIC)
  for name in ("model.layers.3.mlp.gate.weight", "model.layers.12.eh_proj.weight", "model.rotary_emb.inv_freq"):
    stored[name] = TensorSpec(name, "F32", (1,))
  names.check_tensors(stored, STATIC, "here")
  tied = STATIC.replace(tie_word_embeddings=True)
  names.check_tensors(stored_for(STATIC), tied, "here")
  with pytest.raises(ZedaError, match="1 missing"):
    names.check_tensors(stored_for(tied), STATIC, "here")
