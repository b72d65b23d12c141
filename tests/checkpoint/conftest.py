"""Tiny random checkpoints written by stock transformers, and small readers that share no code with the package."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

TINY = {
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "num_experts": 6,
  "num_experts_per_tok": 2,
  "moe_intermediate_size": 24,
  "max_position_embeddings": 128,
  "norm_topk_prob": True,
}

MakeCheckpoint = Callable[..., pathlib.Path]
ReadAll = Callable[[pathlib.Path], dict[str, tuple[str, tuple[int, ...], bytes]]]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
  """make_checkpoint(shard="5GB", dtype="float32", **config) -> directory; built once per set of arguments."""
  import torch
  from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

  made: dict[str, pathlib.Path] = {}

  def make(shard: str = "5GB", dtype: str = "float32", **changes: Any) -> pathlib.Path:
    key = json.dumps([shard, dtype, changes], sort_keys=True)
    if key not in made:
      torch.manual_seed(0)
      model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(TINY | changes))).to(getattr(torch, dtype))
      for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
      path = tmp_path_factory.mktemp("checkpoint") / "model"
      model.save_pretrained(path, max_shard_size=shard)
      (path / "tokenizer.json").write_text('{"not": "read here"}')
      made[key] = path
    return made[key]

  return make


@pytest.fixture(scope="session")
def read_all() -> ReadAll:
  """read_all(directory) -> {name: (dtype, shape, bytes)}, straight from the file format."""

  def read(directory: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for file in sorted(directory.glob("*.safetensors")):
      data = file.read_bytes()
      start = 8 + int.from_bytes(data[:8], "little")
      for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
          continue
        assert name not in found
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], tuple(entry["shape"]), data[start + begin : start + end])
    return found

  return read
