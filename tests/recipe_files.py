"""What a user brings to `zeda adapt`, made here, and ways to run the command on it.

A random tiny Qwen3-MoE of stock transformers, a BPE tokenizer trained on the standard library's own documentation, and
prompts about it.
"""

import argparse
import asyncio
import collections
import email
import inspect
import json
import logging
import os
import pathlib
import statistics
import subprocess
import sys
import textwrap
from typing import Any

import ml_collections
import numpy as np

REPOSITORY = pathlib.Path(__file__).parents[1]
VOCAB_SIZE = 400
CHAT_TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODEL = {
  "vocab_size": VOCAB_SIZE,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "head_dim": 8,
  "num_experts": 4,
  "num_experts_per_tok": 2,
  "moe_intermediate_size": 8,
  "max_position_embeddings": 96,
  "norm_topk_prob": True,
}
# Two shards of rollouts, a few steps of each stage.
SETTINGS: dict[str, Any] = {
  "rollout.max_new_tokens": 8,
  "rollout.batch_size": 64,
  "rollout.shard_size": 128,
  "sft.epochs": 1,
  "sft.batch_size": 16,
  "sft.row_length": 96,
  "sft.save_every": 3,
  "opd.steps": 4,
  "opd.prompts_per_step": 8,
  "opd.max_new_tokens": 8,
  "opd.save_every": 2,
  "evaluate.num_prompts": 32,
  "evaluate.max_new_tokens": 8,
  "evaluate.batch_size": 32,
}


def documents() -> list[str]:
  """The docstrings of some modules of the standard library."""
  modules = (argparse, asyncio, collections, email, inspect, json, logging, pathlib, statistics, textwrap)
  texts = (inspect.getdoc(thing) for module in modules for _, thing in inspect.getmembers(module))
  return sorted({text for text in texts if text})


def write_tokenizer(directory: pathlib.Path) -> Any:
  """A byte-level BPE tokenizer with a chat template, trained on the documents."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
  from transformers import PreTrainedTokenizerFast

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB_SIZE,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(documents(), trainer)
  fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
  fast.chat_template = CHAT_TEMPLATE
  fast.save_pretrained(directory)
  return fast


def write_teacher(directory: pathlib.Path, shard: str = "5GB", **changes: Any) -> pathlib.Path:
  """A random model of stock transformers with its tokenizer, as save_pretrained leaves them."""
  import torch
  from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

  torch.manual_seed(0)
  tokenizer = write_tokenizer(directory)
  config = Qwen3MoeConfig(**(MODEL | {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None} | changes))
  model = Qwen3MoeForCausalLM(config)
  for name, parameter in model.named_parameters():
    if "norm" not in name:
      parameter.data.normal_(0, 0.2)
  model.save_pretrained(directory, max_shard_size=shard)
  return directory


def write_prompts(file: pathlib.Path, count: int = 200) -> pathlib.Path:
  """Prompts in the authors' format: messages, a label, and a key of one's own."""
  lines = []
  for number, text in enumerate(documents()[:count]):
    message = {"role": "user", "content": f"Explain: {text.splitlines()[0][:40]}"}
    field = "prompt" if number % 3 else "messages"
    lines.append(json.dumps({field: [message], "label": "it", "source": f"docs-{number}"}))
  assert len(lines) == count
  file.write_text("\n".join(lines) + "\n")
  return file


def arguments(files: pathlib.Path, workdir: pathlib.Path, **changes: Any) -> list[str]:
  """The flags of `zeda adapt` for teacher/ and prompts.jsonl in `files`; `changes` by dotted name, _ for the dots."""
  settings = {
    "teacher": files / "teacher",
    "prompts": files / "prompts.jsonl",
    "workdir": workdir,
    **SETTINGS,
    **changes,
  }
  flags = [f"--config.{name}={value}" for name, value in settings.items()]
  return [f"--config={REPOSITORY / 'configs' / 'tiny.py'}", *flags]


def settings(files: pathlib.Path, workdir: pathlib.Path, changes: dict[str, Any] | None = None) -> Any:
  """The same recipe as a ConfigDict."""
  from configs import tiny

  config: ml_collections.ConfigDict = tiny.get_config()
  config.update(teacher=str(files / "teacher"), prompts=str(files / "prompts.jsonl"), workdir=str(workdir))
  config.update_from_flattened_dict(SETTINGS | (changes or {}))
  return config


def zeda(*args: Any, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
  """`zeda` in a process of its own, with further variables in its environment."""
  command = [sys.executable, "-m", "zeda_jax.cli.main", *map(str, args)]
  variables = os.environ | environment
  return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=timeout)


def tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a Hugging Face directory, by the safetensors library."""
  from safetensors.numpy import load_file

  found: dict[str, np.ndarray] = {}
  for file in sorted(directory.glob("*.safetensors")):
    found |= load_file(file)
  assert found
  return found


def assert_same_tensors(first: pathlib.Path, second: pathlib.Path) -> None:
  one, two = tensors(first), tensors(second)
  assert one.keys() == two.keys()
  for name, array in one.items():
    assert array.dtype == two[name].dtype, name
    assert array.tobytes() == two[name].tobytes(), name


def everything(directory: pathlib.Path) -> list[str]:
  """Names of all that lies under a directory, hidden things included."""
  return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
