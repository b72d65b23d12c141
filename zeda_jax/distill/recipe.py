"""The recipe's settings: every value of `zeda adapt`, with the paper's defaults, as one locked ConfigDict."""

import json
import pathlib
from typing import Any

import ml_collections
from ml_collections import config_dict

from zeda_jax.data.jsonl import atomic_writer
from zeda_jax.distill.optimizer import OptimizerConfig
from zeda_jax.errors import ZedaError

# Settings that change neither the parameters nor the rollouts: a run may go on with other values.
_FREE = ("workdir", "export", "evaluate", "rollout.batch_size", "log_every", "save_every", "keep")


def default_config() -> ml_collections.ConfigDict:
  """The paper's settings for Qwen3-30B-A3B, both stages; configs/*.py start from here."""
  stage = {
    "trainable": "all",  # all | router | router+norms
    "balance": "group",  # group (L_GA) | expert (L_A, ablation) | none
    "weight": 2.0,  # w: target zero-expert ratio = w N_Z / (N + w N_Z)
    "coefficient": 0.1,  # alpha of the balance loss
    "accumulate": 1,  # parts a batch is run in, one after the other
    "save_every": 50,
    "log_every": 1,
    "keep": 2,  # checkpoints that stay
  }
  optimizer = {"weight_decay": 0.1, "b1": 0.9, "b2": 0.98, "eps": 1e-8, "clip_norm": 1.0, "warmup_fraction": 0.1}
  return ml_collections.ConfigDict(
    {
      "teacher": "",  # Hugging Face directory of the static model
      "prompts": "",  # JSONL or array_record: prompt or messages, optional label
      "workdir": "",  # everything is written below it
      "seed": 0,
      "dtype": "",  # of parameters and activations; empty keeps the checkpoint's
      "remat": True,  # recompute layers in the backward pass
      "student": {
        "num_zero_experts": config_dict.placeholder(int),  # N_Z; None means N // 2, 0 a static student
        "num_experts_per_tok": config_dict.placeholder(int),  # K; None keeps the teacher's
      },
      "rollout": {
        "max_new_tokens": 32768,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "batch_size": 64,
        "shard_size": 512,  # prompts per finished file; a killed run repeats at most one
      },
      "sft": {
        **stage,
        "loss": "cross_entropy",  # cross_entropy | forward_kl
        "epochs": 1,
        "batch_size": 128,  # packed rows
        "row_length": 32768,
        "optimizer": {**optimizer, "learning_rate": 2e-5, "schedule": "cosine"},
      },
      "opd": {
        **stage,
        "loss": "sampled",  # sampled | reverse_kl
        "clip_low": 0.2,
        "clip_high": 0.2,
        "steps": 320,
        "prompts_per_step": 16,
        "samples_per_prompt": 2,
        "max_new_tokens": 32768,
        "temperature": 1.0,
        "save_every": 10,
        "optimizer": {**optimizer, "learning_rate": 5e-6, "schedule": "constant", "warmup_fraction": 0.0},
      },
      "export": {"plain": False},  # also write the plain-engine format
      "evaluate": {
        "prompts": "",  # held-out prompts; empty holds out `num_prompts` of the recipe's own
        "num_prompts": 256,
        "grader": "exact",  # exact | number; used where records have a label
        "max_new_tokens": 32768,
        "temperature": 0.0,
        "batch_size": 64,
        "models": ("teacher", "injected", "sft", "student"),  # rows of the summary
      },
    }
  ).lock()


def optimizer_config(section: ml_collections.ConfigDict) -> OptimizerConfig:
  """The hashable settings that a jitted step is made for."""
  return OptimizerConfig(**section.optimizer.to_dict())


def check_config(config: ml_collections.ConfigDict) -> None:
  """Checks the paths and numbers that need no model.

  Raises:
    ZedaError: names the setting.
  """
  for name in ("teacher", "prompts", "workdir"):
    if not config[name]:
      raise ZedaError(f"config.{name} is empty; give it as --config.{name}=PATH.")
  positive = {
    "rollout": ("max_new_tokens", "batch_size", "shard_size"),
    "sft": ("batch_size", "row_length", "accumulate", "save_every", "log_every"),
    "opd": ("prompts_per_step", "samples_per_prompt", "max_new_tokens", "accumulate", "save_every", "log_every"),
  }
  for section, names in positive.items():
    for name in names:
      if config[section][name] < 1:
        raise ZedaError(f"config.{section}.{name} is {config[section][name]}; expected at least 1.")
  for section, rows in (
    ("sft", config.sft.batch_size),
    ("opd", config.opd.prompts_per_step * config.opd.samples_per_prompt),
  ):
    if rows % config[section].accumulate:
      raise ZedaError(
        f"config.{section}.accumulate is {config[section].accumulate}, which does not divide {rows} rows."
      )


def claim_workdir(config: ml_collections.ConfigDict) -> pathlib.Path:
  """Makes the workdir, or checks that it was begun with the same settings, so that finished stages can be reused.

  Raises:
    ZedaError: it holds other files, or a run with another value of a setting that matters.
  """
  workdir = pathlib.Path(config.workdir)
  file = workdir / "recipe.json"
  settings = _binding(config.to_dict())
  if file.is_file():
    before = json.loads(file.read_text())
    for name in sorted(before.keys() | settings.keys()):
      if before.get(name) != settings.get(name):
        raise ZedaError(
          f"{workdir} was begun with config.{name}={before.get(name)!r}, now it is {settings.get(name)!r}: use another "
          "--config.workdir, or the old value to go on."
        )
    return workdir
  if workdir.is_dir() and any(workdir.iterdir()):
    raise ZedaError(f"{workdir} is not empty and holds no run of this command: give a new directory as config.workdir.")
  workdir.mkdir(parents=True, exist_ok=True)
  with atomic_writer(file) as out:
    out.write(json.dumps(settings, indent=2).encode())
  return workdir


def _binding(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Settings by dotted name, without those a run may change."""
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    path = prefix + name
    if path in _FREE or name in _FREE:
      continue
    flat |= _binding(value, path + ".") if isinstance(value, dict) else {path: value}
  return flat
