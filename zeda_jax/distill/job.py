"""One recipe with its files: everything is opened and checked before the first stage runs."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import rich.console

from zeda_jax.checkpoint import names
from zeda_jax.checkpoint.huggingface import load_hf
from zeda_jax.checkpoint.safetensors_io import StoredTensor, open_weights
from zeda_jax.config import ModelConfig, read_config, to_hf
from zeda_jax.data import chat
from zeda_jax.data.prompts import Prompts, open_prompts
from zeda_jax.distill.recipe import check_config
from zeda_jax.distill.stages import Stage
from zeda_jax.distill.trainer import StoppedEarly, StopSignal
from zeda_jax.distributed import any_process, is_primary
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder, inject
from zeda_jax.models.params import reconfigured
from zeda_jax.rollout.generate import cache_tokens_for
from zeda_jax.sharding import Sharding, make_mesh


@dataclasses.dataclass(frozen=True)
class Job:
  """A checked recipe. Weights are read when `teacher` is first asked for."""

  config: ml_collections.ConfigDict
  model: ModelConfig
  tokenizer: Any
  eos_ids: tuple[int, ...]
  prompts: Prompts
  train: np.ndarray  # numbers of the prompts to learn from
  held_out_prompts: Prompts
  held_out: np.ndarray  # numbers of the prompts to evaluate on
  longest: int  # tokens of the longest training prompt
  contents: Mapping[str, str]  # fingerprints of teacher and prompts
  console: rich.console.Console
  stop: StopSignal = dataclasses.field(default_factory=StopSignal)

  @property
  def workdir(self) -> pathlib.Path:
    return pathlib.Path(self.config.workdir)

  def render(self, index: int) -> list[int]:
    return chat.render_prompt(self.tokenizer, self.prompts[index], self.prompts.location(index))

  @functools.cached_property
  def held_out_tokens(self) -> list[list[int]]:
    prompts = self.held_out_prompts
    return [chat.render_prompt(self.tokenizer, prompts[int(i)], prompts.location(int(i))) for i in self.held_out]

  def decode(self, tokens: Sequence[int]) -> str:
    return self.tokenizer.decode(tokens, skip_special_tokens=True)

  @functools.cached_property
  def sharding(self) -> Sharding | None:
    """Over all devices of all processes, as config.mesh says; None where there is one device."""
    if len(jax.devices()) == 1:
      return None
    mesh = self.config.mesh
    try:
      return Sharding(
        make_mesh(mesh.data, mesh.expert, num_experts=self.model.num_experts), capacity=float(mesh.capacity)
      )
    except ZedaError as error:
      raise ZedaError(f"config.mesh: {error}") from error

  def load(self, path: str | pathlib.Path) -> Decoder:
    """A model of this recipe, from its Hugging Face directory; each process reads what its devices hold."""
    sharding, config = self.sharding, self.config
    model = load_hf(path, config.dtype or None, None if sharding is None else sharding.parameter)
    changes = {"remat": config.remat, "scan_unroll": config.scan_unroll, "eos_token_ids": self.eos_ids}
    return reconfigured(model, **changes, sharding=sharding)

  @functools.cached_property
  def teacher(self) -> Decoder:
    """The static model, read once; students share its arrays until they are trained."""
    return self.load(self.config.teacher)

  def student(self, settings: ml_collections.ConfigDict | None = None) -> Decoder:
    """The untrained student: the teacher with zero experts, or a static one with fewer picks (a baseline)."""
    settings = self.config.student if settings is None else settings
    student = self.teacher
    if settings.num_zero_experts != 0:
      student = inject(student, settings.num_zero_experts, self.config.seed)
      student = reconfigured(student, zero_expert_type=settings.zero_expert_type, renormalize=settings.renormalize)
    if settings.num_experts_per_tok is not None:
      student = reconfigured(student, num_experts_per_tok=settings.num_experts_per_tok)
    return student

  def stage(self, name: str) -> Stage:
    return Stage(name, self.teacher, self.config[name], self.workdir / name, self.config.seed, self.console)

  def check_stop(self, where: str) -> None:
    """Raises StoppedEarly in all processes if SIGTERM or Ctrl-C came to one of them; all look at the same places."""
    if any_process(self.stop.requested):
      raise StoppedEarly(f"stopped {where}; run the same command again to go on.")


def open_job(config: ml_collections.ConfigDict, console: rich.console.Console | None = None) -> Job:
  """Checks the whole recipe and the headers of the weights; nothing is written.

  Only the primary process will show anything on its console.

  Raises:
    ZedaError: names the setting, file or line that does not fit.
  """
  check_config(config)
  _check_processes(config)
  model = read_config(config.teacher)
  if model.is_dynamic:
    raise ZedaError(f"config.teacher: {config.teacher} already has zero experts; expected the static model.")
  if config.export.plain:
    to_hf(model.replace(num_zero_experts=1), "plain")  # refused now rather than after the training
  stored = open_weights(config.teacher)
  names.check_tensors(stored, model, config.teacher)
  tokenizer = chat.load_tokenizer(config.teacher)
  chat.check_vocabulary(tokenizer, model.vocab_size, config.teacher)
  eos_ids = chat.eos_ids(config.teacher, tokenizer)
  prompts = open_prompts(config.prompts)
  train, held_out_prompts, held_out = split_prompts(config, prompts)
  _check_picks(config, model)
  longest = _check_lengths(config, model, tokenizer, prompts, train, held_out_prompts)
  contents = {
    "teacher": _teacher_fingerprint(pathlib.Path(config.teacher), tokenizer, stored),
    "prompts": _prompts_fingerprint(prompts, train),
    "held-out prompts": _prompts_fingerprint(held_out_prompts, held_out),
  }
  if not is_primary():
    console = rich.console.Console(quiet=True)
  console = console or rich.console.Console()
  job = Job(config, model, tokenizer, eos_ids, prompts, train, held_out_prompts, held_out, longest, contents, console)
  _check_cache(config, longest, 1 if job.sharding is None else job.sharding.num_devices)
  return job


def _check_cache(config: ml_collections.ConfigDict, longest: int, devices: int) -> None:
  """Refuses a cache in which some device has no room for the longest prompt and answer."""
  for name in ("rollout", "opd"):
    settings = config[name]
    least = devices * cache_tokens_for(longest, settings.max_new_tokens)
    if 0 < settings.cache_tokens < least:
      on_each = f" on each of {devices} devices" if devices > 1 else ""
      raise ZedaError(
        f"config.{name}.cache_tokens is {settings.cache_tokens}, too few for the longest prompt and its answer"
        f"{on_each}: expected 0 (room for all) or at least {least}."
      )


def _check_processes(config: ml_collections.ConfigDict) -> None:
  processes = jax.process_count()
  if config.sft.epochs and config.sft.batch_size % processes:
    raise ZedaError(
      f"config.sft.batch_size is {config.sft.batch_size}, which {processes} processes cannot share out evenly: choose "
      "a multiple, or another number of processes."
    )


def split_prompts(config: ml_collections.ConfigDict, prompts: Prompts) -> tuple[np.ndarray, Prompts, np.ndarray]:
  """Training prompts, and the held-out ones: their own file, or a seeded part of the same one."""
  count = config.evaluate.num_prompts
  if config.evaluate.prompts:
    held_out = open_prompts(config.evaluate.prompts)
    return np.arange(len(prompts)), held_out, np.arange(min(count, len(held_out)))
  if count >= len(prompts):
    raise ZedaError(
      f"config.evaluate.num_prompts is {count}, but {config.prompts} has only {len(prompts)} prompts: lower it, or "
      "name a file of held-out prompts as config.evaluate.prompts."
    )
  order = np.random.default_rng(config.seed).permutation(len(prompts))
  return np.sort(order[count:]), prompts, np.sort(order[:count])


def _check_picks(config: ml_collections.ConfigDict, model: ModelConfig) -> None:
  zero, picks = config.student.num_zero_experts, config.student.num_experts_per_tok
  if zero is None and model.num_experts < 2:
    raise ZedaError(
      f"{config.teacher} has {model.num_experts} expert, of which half is none: give config.student.num_zero_experts."
    )
  if picks is not None and picks > model.num_experts:
    raise ZedaError(
      f"config.student.num_experts_per_tok is {picks}, but the teacher has only {model.num_experts} experts."
    )


def _check_lengths(
  config: ml_collections.ConfigDict,
  model: ModelConfig,
  tokenizer: Any,
  prompts: Prompts,
  train: np.ndarray,
  held_out_prompts: Prompts,
) -> int:
  """Checks that every prompt leaves room for its answers; returns the tokens of the longest training prompt."""
  answers = [config.rollout.max_new_tokens]
  if config.opd.steps:
    answers.append(config.opd.max_new_tokens)
    if config.opd.prompts_per_step > len(train):
      raise ZedaError(
        f"config.opd.prompts_per_step is {config.opd.prompts_per_step}, more than the {len(train)} prompts to learn "
        "from: lower it or give more prompts."
      )
  context, evaluated = model.max_position_embeddings, config.evaluate.num_prompts > 0
  if evaluated and held_out_prompts is prompts:
    answers.append(config.evaluate.max_new_tokens)
  lengths = chat.check_lengths(prompts, tokenizer, max(answers), context)[train]
  if evaluated and held_out_prompts is not prompts:
    chat.check_lengths(held_out_prompts, tokenizer, config.evaluate.max_new_tokens, context)
  longest = int(lengths.argmax())
  if config.sft.epochs and lengths[longest] >= config.sft.row_length:
    raise ZedaError(
      f"{prompts.location(int(train[longest]))}: the prompt has {lengths[longest]} tokens, so a row of "
      f"config.sft.row_length={config.sft.row_length} has no room for its answer: raise row_length."
    )
  return int(lengths[longest])


def _teacher_fingerprint(directory: pathlib.Path, tokenizer: Any, stored: Mapping[str, StoredTensor]) -> str:
  """Of all but the bulk of the weights: config, tokenizer, the tensors' shapes and the final norm."""
  digest = hashlib.sha256((directory / "config.json").read_bytes())
  tensors = sorted((name, tensor.dtype, tensor.shape) for name, tensor in stored.items())
  for part in (tokenizer.get_vocab(), tokenizer.chat_template, tensors):
    digest.update(json.dumps(part, sort_keys=True).encode())
  digest.update(stored["model.norm.weight"].read().tobytes())
  return digest.hexdigest()[:16]


def _prompts_fingerprint(prompts: Prompts, numbers: np.ndarray) -> str:
  """Of the chosen records and their places; one record in memory at a time."""
  chosen, digest = set(numbers.tolist()), hashlib.sha256()
  for number, record in enumerate(prompts):
    if number in chosen:
      digest.update(f"{number} {json.dumps(record, sort_keys=True)}\n".encode())
  return digest.hexdigest()[:16]
