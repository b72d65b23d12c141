import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import Qwen3MoeForCausalLM

from zeda_jax.checkpoint import params
from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.checkpoint.safetensors_io import open_weights
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import inject

ROOT = pathlib.Path(__file__).parents[2]

OPTIONS = {
  "plain": {},
  "one layer, bf16, many shards": {"num_hidden_layers": 1, "dtype": "bfloat16", "shard": "20KB"},
  "dense first": {"mlp_only_layers": [0]},
  "every other layer dense, tied": {"decoder_sparse_step": 2, "tie_word_embeddings": True, "num_hidden_layers": 4},
  "attention bias, fp16, wide heads": {"attention_bias": True, "head_dim": 24, "dtype": "float16"},
}


def copy_of(path: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  shutil.copytree(path, target)
  return target


def edit_config(path: pathlib.Path, **changes) -> None:
  raw = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(raw | changes))


def rewrite(path: pathlib.Path, change) -> None:
  """Applies `change` to the tensors of a single-file checkpoint."""
  tensors = load_file(path / "model.safetensors")
  change(tensors)
  save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_load_then_save_changes_no_bit(make_checkpoint, read_all, tmp_path, options):
  source = make_checkpoint(**options)
  save_hf(load_hf(source), tmp_path / "out")
  assert read_all(tmp_path / "out") == read_all(source)
  assert (tmp_path / "out/config.json").read_text().split() == (source / "config.json").read_text().split()
  for name in ("generation_config.json", "tokenizer.json"):
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_load_then_save_of_a_dynamic_model_changes_no_bit(make_checkpoint, read_all, tmp_path):
  save_hf(inject(load_hf(make_checkpoint(mlp_only_layers=[1])), 4), tmp_path / "one")
  model = load_hf(tmp_path / "one")
  assert model.config.num_zero_experts == 4
  save_hf(model, tmp_path / "two")
  assert read_all(tmp_path / "two") == read_all(tmp_path / "one")
  assert (tmp_path / "two/config.json").read_bytes() == (tmp_path / "one/config.json").read_bytes()
  raw = json.loads((tmp_path / "one/config.json").read_text())
  assert raw["model_type"] == "qwen3_moe_plus_plus"
  assert (raw["num_local_experts"], raw["zce_nums"], raw["zce_types"]) == (6, [4], ["zero"])
  assert not any(".experts.6." in name for name in read_all(tmp_path / "one"))


def test_logits_equal_those_of_transformers(make_checkpoint):
  path = make_checkpoint(mlp_only_layers=[1], attention_bias=True, shard="20KB")
  assert len(list(path.glob("*.safetensors"))) > 3
  tokens = np.random.default_rng(0).integers(0, 64, (2, 20))
  with torch.no_grad():
    expected = Qwen3MoeForCausalLM.from_pretrained(path)(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(load_hf(path)(jnp.asarray(tokens)).logits, expected, atol=2e-4)


def test_plain_loads_in_transformers_with_the_dynamic_models_logits(make_checkpoint, tmp_path):
  model = inject(load_hf(make_checkpoint()))
  save_hf(model, tmp_path / "plain", format="plain")
  other, info = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
  assert other.config.num_experts == 9
  tokens = np.random.default_rng(0).integers(0, 64, (2, 20))
  with torch.no_grad():
    expected = other(torch.tensor(tokens)).logits.numpy()
  out = model(jnp.asarray(tokens))
  assert (out.picks >= 6).any()
  np.testing.assert_allclose(out.logits, expected, atol=2e-4)


def test_plain_of_a_static_model_is_the_model(make_checkpoint, read_all, tmp_path):
  save_hf(load_hf(make_checkpoint()), tmp_path / "plain", format="plain")
  assert read_all(tmp_path / "plain") == read_all(make_checkpoint())


def test_dtype_casts_parameters_and_activations_and_is_saved(make_checkpoint, read_all, tmp_path):
  path = make_checkpoint()
  model = load_hf(path, dtype="bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}
  assert model.config.dtype == "bfloat16"
  save_hf(model, tmp_path / "out")
  assert {dtype for dtype, _, _ in read_all(tmp_path / "out").values()} == {"BF16"}
  assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
  expected = open_weights(path)["lm_head.weight"].read().astype(jnp.bfloat16)
  np.testing.assert_array_equal(open_weights(tmp_path / "out")["lm_head.weight"].read(), expected)
  with pytest.raises(ZedaError, match="dtype is 'int8'"):
    load_hf(path, dtype="int8")
  with pytest.raises(ZedaError, match="dtype is 'floaty'"):
    load_hf(path, dtype="floaty")


def test_parameters_of_their_own_dtype_keep_it(make_checkpoint, read_all, tmp_path):
  path = copy_of(make_checkpoint(dtype="bfloat16"), tmp_path / "in")

  def widen_routers(tensors):
    tensors.update({k: v.astype(np.float32) for k, v in tensors.items() if k.endswith("mlp.gate.weight")})

  rewrite(path, widen_routers)
  save_hf(load_hf(path), tmp_path / "out")
  assert read_all(tmp_path / "out") == read_all(path)
  router = "model.layers.1.mlp.gate.weight"
  rewrite(path, lambda tensors: tensors.update({router: tensors[router].astype(np.float16)}))
  with pytest.raises(ZedaError, match=r"several dtypes .*layers.1.mlp.gate.weight is F16.*pass dtype"):
    load_hf(path)
  load_hf(path, dtype="float32")


def test_float64_needs_a_dtype(make_checkpoint, tmp_path):
  path = copy_of(make_checkpoint(), tmp_path / "in")
  rewrite(path, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].astype(np.float64)}))
  with pytest.raises(ZedaError, match="float64"):
    load_hf(path)


def test_a_tied_head_is_saved_only_where_the_source_had_one(make_checkpoint, read_all, tmp_path):
  path = copy_of(make_checkpoint(tie_word_embeddings=True), tmp_path / "in")
  assert "lm_head.weight" not in read_all(path)
  rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
  model = load_hf(path)
  assert model.lm_head is None
  save_hf(model, tmp_path / "out")
  assert read_all(tmp_path / "out") == read_all(path)
  # It follows the embedding when that was trained.
  model.embed.embedding[...] = model.embed.embedding[...] + 1
  save_hf(model, tmp_path / "trained")
  found = read_all(tmp_path / "trained")
  assert found["lm_head.weight"] == found["model.embed_tokens.weight"] != read_all(path)["lm_head.weight"]


def test_layers_past_the_model_are_ignored_and_kept(make_checkpoint, read_all, tmp_path):
  path = copy_of(make_checkpoint(), tmp_path / "in")
  edit_config(path, num_hidden_layers=2)
  model = load_hf(path)
  assert model.config.num_layers == 2
  save_hf(model, tmp_path / "out")
  assert read_all(tmp_path / "out") == read_all(path)
  save_hf(inject(model), tmp_path / "dynamic")
  last_router = "model.layers.2.mlp.gate.weight"
  assert read_all(tmp_path / "dynamic")[last_router] == read_all(path)[last_router]


def test_saves_after_the_source_is_gone_and_over_the_source(make_checkpoint, read_all, tmp_path):
  source = make_checkpoint()
  path = copy_of(source, tmp_path / "in")
  model = load_hf(path)
  save_hf(model, path, overwrite=True)
  assert read_all(path) == read_all(source)
  assert (path / "tokenizer.json").is_file()
  shutil.rmtree(path)
  save_hf(model, tmp_path / "out")
  assert read_all(tmp_path / "out") == read_all(source)
  with pytest.raises(ZedaError, match="is not empty"):
    save_hf(model, tmp_path / "out")
  with pytest.raises(ZedaError, match="format is 'gguf'"):
    save_hf(model, tmp_path / "new", format="gguf")
  assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]


def test_saving_splits_into_shards(make_checkpoint, read_all, tmp_path):
  model = load_hf(make_checkpoint())
  tree = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  params.save_params(model.config, tree, tmp_path / "out", max_shard_bytes=30_000)
  assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
  assert read_all(tmp_path / "out") == read_all(make_checkpoint())


def test_parameters_that_do_not_fit_the_config_are_refused(make_checkpoint, tmp_path):
  model = load_hf(make_checkpoint())
  tree = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  tree["final_norm"]["scale"] = tree["final_norm"]["scale"][:5]
  with pytest.raises(ZedaError, match=r"final_norm.scale has shape \(5,\)"):
    params.save_params(model.config, tree, tmp_path / "out")
  assert not list(tmp_path.iterdir())


def test_one_host_buffer_holds_a_parameter_on_the_cpu(make_checkpoint, monkeypatch):
  made = []
  real = params._aligned_empty
  monkeypatch.setattr(params, "_aligned_empty", lambda *args: made.append(real(*args)) or made[-1])
  model = load_hf(make_checkpoint())
  leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert {leaf.unsafe_buffer_pointer() for leaf in leaves} == {buffer.ctypes.data for buffer in made}


SHARDED = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from flax import nnx
from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.checkpoint.safetensors_io import StoredTensor

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "expert"))
def rule(path, shape):
  if path[-1] == "gate_up": return NamedSharding(mesh, P(None, "expert", None, "data"))
  if path[-1] == "down": return NamedSharding(mesh, P(None, "expert", "data"))
  if path[-1] == "kernel": return NamedSharding(mesh, P(*[None] * (len(shape) - 2), "data", "expert"))
  return NamedSharding(mesh, P())

read = []
real = StoredTensor._read_bytes
StoredTensor._read_bytes = lambda self, skip, shape: read.append((self.name, shape)) or real(self, skip, shape)
model = load_hf(sys.argv[1], sharding=rule)
gate_up = model.runs[0].mlp.experts.gate_up[...]
assert gate_up.sharding.spec == P(None, "expert", None, "data") and len(gate_up.devices()) == 4
assert gate_up.addressable_shards[0].data.shape == (3, 3, 32, 24)
# Each device holds the gate or the up half of its experts: every such tensor is read once, whole.
gates = [name for name, shape in read if name.endswith(("gate_proj.weight", "up_proj.weight"))]
assert len(gates) == len(set(gates)) == 3 * 6 * 2
# A kernel sharded on both axes is read by rows: half the tensor for each device.
assert {shape for name, shape in read if name.endswith("q_proj.weight")} == {(32, 32)}
save_hf(model, sys.argv[2])
"""


def test_sharded_parameters_read_their_slices_and_save_the_same_bits(make_checkpoint, read_all, tmp_path):
  source = make_checkpoint()
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  subprocess.run([sys.executable, "-c", SHARDED, str(source), str(tmp_path / "out")], env=env, check=True, cwd=ROOT)
  assert read_all(tmp_path / "out") == read_all(source)


# --- bad input ----------------------------------------------------------------------------------------------------


def bad_shape(path):
  rewrite(path, lambda tensors: tensors.update({"model.norm.weight": np.ones(33, np.float32)}))


def missing_tensor(path):
  rewrite(path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.down_proj.weight"))


def truncated(path):
  os.truncate(path / "model.safetensors", 5000)


BAD = {
  "wrong shape": (bad_shape, r"1 of the wrong shape \(model.norm.weight \[33\] instead of \[32\]\)"),
  "missing tensor": (missing_tensor, r"1 missing \(model.layers.1.mlp.experts.3.down_proj.weight\)"),
  "truncated": (truncated, "is truncated"),
  "no weights": (lambda path: (path / "model.safetensors").unlink(), "has no weights"),
  "pickle only": (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "only pickled"),
  "no config": (lambda path: (path / "config.json").unlink(), "config.json does not exist"),
  "more experts promised": (lambda path: edit_config(path, num_local_experts=8), "of the wrong shape"),
  "unknown model": (lambda path: edit_config(path, model_type="llama"), "model_type is 'llama'"),
}


@pytest.mark.parametrize(("spoil", "words"), BAD.values(), ids=BAD)
def test_bad_directories_are_refused_in_one_sentence(make_checkpoint, tmp_path, spoil, words):
  path = copy_of(make_checkpoint(), tmp_path / "in")
  spoil(path)
  with pytest.raises(ZedaError, match=words) as caught:
    load_hf(path)
  assert "\n" not in str(caught.value)
