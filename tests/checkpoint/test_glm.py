"""GLM checkpoints: latent attention, float32 correction biases beside bfloat16, a layer outside the model."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny_models import hf_model
from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.checkpoint.orbax import load_params, save_params
from zeda_jax.checkpoint.transform import inject_directory, to_plain_directory
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import inject
from zeda_jax.router_rows import new_router_rows

LAYERS = 3
BIASES = [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)]
ROUTERS = [f"model.layers.{i}.mlp.gate.weight" for i in (1, 2)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """bfloat16 with float32 correction biases, sharded, with the tensors of a multi-token-prediction layer."""
  import torch

  path = tmp_path_factory.mktemp("glm") / "model"
  model = hf_model(model_type="glm4_moe_lite", num_hidden_layers=LAYERS, dtype="bfloat16")
  model.save_pretrained(path, max_shard_size="20KB")
  (path / "tokenizer.json").write_text("{}")
  index_file = path / "model.safetensors.index.json"
  index = json.loads(index_file.read_text())
  extra = {}
  for name, shard in index["weight_map"].items():
    if name.startswith(f"model.layers.{LAYERS - 1}."):
      with safe_open(path / shard, "pt") as file:
        extra[name.replace(f"layers.{LAYERS - 1}.", f"layers.{LAYERS}.")] = file.get_tensor(name) + 1
  for name in ("eh_proj.weight", "enorm.weight", "hnorm.weight", "embed_tokens.weight", "shared_head.head.weight"):
    extra[f"model.layers.{LAYERS}.{name}"] = torch.randn(5, 7).to(torch.bfloat16)
  save_file(extra, path / "mtp.safetensors", {"format": "pt"})
  index["weight_map"] |= dict.fromkeys(extra, "mtp.safetensors")
  index_file.write_text(json.dumps(index))
  assert len(list(path.glob("*.safetensors"))) > 3
  return path


def is_mtp(name: str) -> bool:
  return name.startswith(f"model.layers.{LAYERS}.")


def test_load_then_save_changes_no_bit(source, read_all, tmp_path):
  before = read_all(source)
  assert {before[name][0] for name in BIASES} == {"F32"}
  assert {data[0] for name, data in before.items() if not name.endswith("correction_bias")} == {"BF16"}
  assert sum(map(is_mtp, before)) > 20
  model = load_hf(source)
  assert model.config.num_layers == LAYERS
  save_hf(model, tmp_path / "out")
  assert read_all(tmp_path / "out") == before
  assert (tmp_path / "out/config.json").read_text().split() == (source / "config.json").read_text().split()


def test_only_routers_and_their_biases_are_widened_and_never_those_of_the_mtp_layer(source, read_all, tmp_path):
  inject_directory(source, tmp_path / "out", num_zero_experts=4, seed=3)
  before, after = read_all(source), read_all(tmp_path / "out")
  assert before.keys() == after.keys()
  assert {name for name in before if before[name] != after[name]} == {*ROUTERS, *BIASES}
  for layer, router, bias in zip((1, 2), ROUTERS, BIASES, strict=True):
    assert (after[router][:2], after[bias][:2]) == (("BF16", (10, 32)), ("F32", (10,)))
    assert after[router][2].startswith(before[router][2])
    old, new = np.frombuffer(before[bias][2], np.float32), np.frombuffer(after[bias][2], np.float32)
    np.testing.assert_array_equal(new[:6], old)
    np.testing.assert_array_equal(new[6:], new_router_rows(old, 4, 3, layer))
  raw = json.loads((tmp_path / "out/config.json").read_text())
  assert (raw["model_type"], raw["architectures"]) == ("glm4_moe_lite_plus_plus", ["Glm4MoeLitePlusPlusForCausalLM"])
  assert (raw["n_routed_experts"], raw["zce_nums"]) == (6, [4])


def test_streaming_and_in_memory_conversions_agree_bit_for_bit(source, read_all, tmp_path):
  inject_directory(source, tmp_path / "streamed", seed=5)
  save_hf(inject(load_hf(source), seed=5), tmp_path / "loaded")
  assert read_all(tmp_path / "streamed") == read_all(tmp_path / "loaded")
  assert (tmp_path / "streamed/config.json").read_bytes() == (tmp_path / "loaded/config.json").read_bytes()
  dynamic = load_hf(tmp_path / "loaded")
  save_hf(dynamic, tmp_path / "again")
  assert read_all(tmp_path / "again") == read_all(tmp_path / "loaded")
  to_plain_directory(tmp_path / "streamed", tmp_path / "streamed-plain")
  save_hf(dynamic, tmp_path / "loaded-plain", format="plain")
  plain = read_all(tmp_path / "loaded-plain")
  assert read_all(tmp_path / "streamed-plain") == plain
  assert {name for name in plain if is_mtp(name)} == {name for name in read_all(source) if is_mtp(name)}
  raw = json.loads((tmp_path / "loaded-plain/config.json").read_text())
  assert (raw["model_type"], raw["n_routed_experts"]) == ("glm4_moe_lite", 9)


def test_a_cast_leaves_the_biases_in_float32(source, read_all, tmp_path):
  for dtype, code in (("float32", "F32"), ("float16", "F16")):
    model = load_hf(source, dtype=dtype)
    assert model.runs[1].mlp.router.correction_bias.dtype == jnp.float32
    save_hf(model, tmp_path / code)
    found = {name: data for name, data in read_all(tmp_path / code).items() if not is_mtp(name)}
    assert {data[0] for name, data in found.items() if name not in BIASES} == {code}
    assert all(found[name] == read_all(source)[name] for name in BIASES)


def test_through_orbax_and_back_changes_no_bit(source, read_all, tmp_path):
  dynamic = inject(load_hf(source))
  save_params(tmp_path / "orbax", dynamic)
  save_hf(load_params(tmp_path / "orbax"), tmp_path / "out")
  save_hf(dynamic, tmp_path / "direct")
  direct = {name: data for name, data in read_all(tmp_path / "direct").items() if not is_mtp(name)}
  assert {name: data for name, data in read_all(tmp_path / "out").items() if not is_mtp(name)} == direct


def test_a_bias_that_does_not_fit_is_refused(source, tmp_path):
  path = tmp_path / "in"
  shutil.copytree(source, path)
  shard = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][BIASES[0]]
  tensors = load_file(path / shard)
  tensors[BIASES[0]] = tensors[BIASES[0]][:5].clone()
  save_file(tensors, path / shard, {"format": "pt"})
  with pytest.raises(ZedaError, match=r"layers.1.mlp.gate.e_score_correction_bias \[5\] instead of \[6\]"):
    load_hf(path)


def test_groups_have_no_plain_export(tmp_path):
  hf_model(model_type="glm4_moe_lite", n_group=2).save_pretrained(tmp_path / "in")
  inject_directory(tmp_path / "in", tmp_path / "dynamic")
  for export in (
    lambda: save_hf(load_hf(tmp_path / "dynamic"), tmp_path / "plain", format="plain"),
    lambda: to_plain_directory(tmp_path / "dynamic", tmp_path / "plain"),
  ):
    with pytest.raises(ZedaError, match=r"1 of 2 groups of experts \(n_group\).*export the dynamic format"):
      export()
  assert not (tmp_path / "plain").exists()
