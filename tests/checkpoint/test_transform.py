import json
import os
import shutil

import numpy as np
import pytest

from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.checkpoint.transform import inject_directory, to_plain_directory
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import inject

MIXED = {"mlp_only_layers": [1], "dtype": "bfloat16", "shard": "20KB"}


def test_only_routers_change_and_only_below_their_old_rows(make_checkpoint, read_all, tmp_path):
  source = make_checkpoint(**MIXED)
  inject_directory(source, tmp_path / "out", num_zero_experts=4, seed=3)
  before, after = read_all(source), read_all(tmp_path / "out")
  assert before.keys() == after.keys()
  changed = {name for name in before if before[name] != after[name]}
  assert changed == {"model.layers.0.mlp.gate.weight", "model.layers.2.mlp.gate.weight"}
  for name in changed:
    assert after[name][:2] == ("BF16", (10, 32))
    assert after[name][2].startswith(before[name][2])
  raw, old = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", source))
  assert raw["zce_nums"] == [4] and raw["architectures"] == ["Qwen3MoePlusPlusForCausalLM"]
  assert [key for key in raw if key in old] == list(old)
  assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_the_default_is_half_the_experts_and_the_seed_decides(make_checkpoint, read_all, tmp_path):
  source, router = make_checkpoint(), "model.layers.0.mlp.gate.weight"
  found = []
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    inject_directory(source, tmp_path / name, seed=seed)
    found.append(read_all(tmp_path / name)[router])
  assert found[0] == found[1] != found[2]
  assert found[0][1] == (9, 32)


@pytest.mark.parametrize("options", [{}, MIXED, {"tie_word_embeddings": True}], ids=["fp32", "mixed bf16", "tied"])
def test_streaming_and_in_memory_injection_agree_bit_for_bit(make_checkpoint, read_all, tmp_path, options):
  source = make_checkpoint(**options)
  inject_directory(source, tmp_path / "streamed", seed=5)
  save_hf(inject(load_hf(source), seed=5), tmp_path / "loaded")
  assert read_all(tmp_path / "streamed") == read_all(tmp_path / "loaded")
  assert (tmp_path / "streamed/config.json").read_bytes() == (tmp_path / "loaded/config.json").read_bytes()


@pytest.mark.parametrize("options", [{}, MIXED], ids=["fp32", "mixed bf16"])
def test_streaming_and_in_memory_plain_export_agree_bit_for_bit(make_checkpoint, read_all, tmp_path, options):
  inject_directory(make_checkpoint(**options), tmp_path / "dynamic", num_zero_experts=2)
  to_plain_directory(tmp_path / "dynamic", tmp_path / "streamed", max_shard_bytes=30_000)
  save_hf(load_hf(tmp_path / "dynamic"), tmp_path / "loaded", format="plain")
  found = read_all(tmp_path / "streamed")
  assert found == read_all(tmp_path / "loaded")
  zero = {name: data for name, (_, _, data) in found.items() if ".experts.6." in name or ".experts.7." in name}
  assert len(zero) == 2 * 3 * (2 if options else 3)
  assert not any(any(data) for data in zero.values())
  assert (tmp_path / "streamed/config.json").read_bytes() == (tmp_path / "loaded/config.json").read_bytes()
  assert json.loads((tmp_path / "streamed/config.json").read_text())["num_local_experts"] == 8


def test_plain_of_a_static_directory_is_a_copy(make_checkpoint, read_all, tmp_path):
  to_plain_directory(make_checkpoint(**MIXED), tmp_path / "out")
  assert read_all(tmp_path / "out") == read_all(make_checkpoint(**MIXED))


def test_layers_past_the_model_stay_untouched(make_checkpoint, read_all, tmp_path):
  source = tmp_path / "in"
  shutil.copytree(make_checkpoint(), source)
  raw = json.loads((source / "config.json").read_text())
  (source / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 2}))
  inject_directory(source, tmp_path / "out")
  before, after = read_all(source), read_all(tmp_path / "out")
  changed = {name for name in before if before[name] != after[name]}
  assert changed == {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"}


def test_nothing_but_one_tensor_is_in_memory(make_checkpoint, tmp_path, monkeypatch):
  read = []
  from zeda_jax.checkpoint.safetensors_io import StoredTensor

  real = StoredTensor._read_bytes
  monkeypatch.setattr(StoredTensor, "_read_bytes", lambda self, *args: read.append(self.name) or real(self, *args))
  inject_directory(make_checkpoint(), tmp_path / "out")
  assert read == [f"model.layers.{i}.mlp.gate.weight" for i in range(3)]


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ({"num_zero_experts": 0}, "num_zero_experts is 0"),
    ({"num_zero_experts": -3}, "num_zero_experts is -3"),
    ({"seed": -1}, "seed is -1"),
  ],
)
def test_bad_arguments(make_checkpoint, tmp_path, arguments, words):
  with pytest.raises(ZedaError, match=words):
    inject_directory(make_checkpoint(), tmp_path / "out", **arguments)
  assert not list(tmp_path.iterdir())


def test_a_dynamic_source_is_refused(make_checkpoint, tmp_path):
  inject_directory(make_checkpoint(), tmp_path / "one")
  with pytest.raises(ZedaError, match="has 3 zero experts already"):
    inject_directory(tmp_path / "one", tmp_path / "two")
  assert not (tmp_path / "two").exists()


def test_bad_targets(make_checkpoint, tmp_path):
  source = tmp_path / "in"
  shutil.copytree(make_checkpoint(), source)
  before = sorted(source.rglob("*"))
  for convert in (inject_directory, to_plain_directory):
    with pytest.raises(ZedaError, match="is not empty"):
      convert(source, source)
    for target in (source, source / "out", tmp_path):
      with pytest.raises(ZedaError, match="overlaps"):
        convert(source, target, overwrite=True)
  assert sorted(source.rglob("*")) == before
  assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("spoil", ["truncate", "remove a shard", "config without num_experts"])
def test_bad_sources_are_refused_before_anything_is_written(make_checkpoint, tmp_path, spoil):
  source = tmp_path / "in"
  shutil.copytree(make_checkpoint(**MIXED), source)
  last = sorted(source.glob("*.safetensors"))[-1]
  if spoil == "truncate":
    os.truncate(last, last.stat().st_size - 1)
    words = "is truncated"
  elif spoil == "remove a shard":
    last.unlink()
    words = "is not in"
  else:
    raw = json.loads((source / "config.json").read_text())
    del raw["num_local_experts"]
    (source / "config.json").write_text(json.dumps(raw))
    words = "num_experts or num_local_experts is missing"
  for convert in (inject_directory, to_plain_directory):
    with pytest.raises(ZedaError, match=words):
      convert(source, tmp_path / "out")
  assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_new_rows_have_the_spread_of_the_old_ones(make_checkpoint, tmp_path):
  inject_directory(make_checkpoint(), tmp_path / "out", num_zero_experts=4000)
  rows = np.asarray(load_hf(tmp_path / "out").runs[0].mlp.router.zero_weight[...])[0]
  old = np.asarray(load_hf(make_checkpoint()).runs[0].mlp.router.weight[...])[0]
  np.testing.assert_allclose(rows.mean(0), old.mean(0), atol=5 * old.std(0, ddof=1).max() / 4000**0.5)
  np.testing.assert_allclose(rows.std(0), old.std(0, ddof=1), rtol=0.06)
