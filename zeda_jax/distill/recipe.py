"""The recipe's settings: every value of `zeda adapt`, with the paper's defaults, as one locked ConfigDict."""

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ml_collections
from ml_collections import config_dict

from zeda_jax.data.jsonl import atomic_writer
from zeda_jax.errors import ZedaError

if TYPE_CHECKING:
  from zeda_jax.distill.optimizer import OptimizerConfig

# Settings that change neither the parameters nor the rollouts: a run may go on with other values. Of the teacher and
# the prompts the content is binding, not the path.
_FREE = (
  *("teacher", "prompts", "workdir", "mesh", "export", "evaluate"),
  *("rollout.batch_size", "cache_tokens", "log_every", "save_every", "keep"),
  # The server that answers is the teacher's, wherever it runs and whatever it calls it.
  *(f"rollout.{name}" for name in ("url", "model", "key_variable", "concurrency", "retries", "timeout", "max_dropped")),
)
_FREE_IN_EVALUATION = ("prompts", "batch_size", "models")
# What a run that met NaN is told to lower; it may change until its stage is finished.
_MENDABLE = ("optimizer.learning_rate", "optimizer.clip_norm")

_INFINITY = math.inf
# setting -> (least, most)
_OPTIMIZER_RANGES = {
  **dict.fromkeys(("learning_rate", "weight_decay", "clip_norm", "eps"), (0, _INFINITY)),
  **dict.fromkeys(("warmup_fraction", "b1", "b2"), (0, 1)),
}
_STAGE_RANGES = {
  **dict.fromkeys(("accumulate", "save_every", "log_every", "keep"), (1, _INFINITY)),
  "coefficient": (0, _INFINITY),
  "optimizer": _OPTIMIZER_RANGES,
}
_SAMPLING_RANGES = {"max_new_tokens": (1, _INFINITY), "temperature": (0, _INFINITY)}
_FILTER_RANGES = {"top_k": (0, _INFINITY), "top_p": (0, 1)}
_RANGES: dict[str, Any] = {
  "seed": (0, 2**32 - 1),
  "scan_unroll": (1, _INFINITY),
  "mesh": {"data": (-1, _INFINITY), "expert": (-1, _INFINITY), "capacity": (0, _INFINITY)},
  "rollout": {
    **_SAMPLING_RANGES,
    **_FILTER_RANGES,
    "cache_tokens": (0, _INFINITY),
    **dict.fromkeys(("batch_size", "shard_size", "concurrency"), (1, _INFINITY)),
    "retries": (0, _INFINITY),
    "timeout": (1, _INFINITY),
    "max_dropped": (0, 1),
  },
  "sft": {**_STAGE_RANGES, "epochs": (0, _INFINITY), "batch_size": (1, _INFINITY), "row_length": (2, _INFINITY)},
  "opd": {
    **_STAGE_RANGES,
    **_SAMPLING_RANGES,
    **dict.fromkeys(("clip_low", "clip_high", "steps", "cache_tokens"), (0, _INFINITY)),
    **dict.fromkeys(("prompts_per_step", "samples_per_prompt"), (1, _INFINITY)),
  },
  "evaluate": {**_SAMPLING_RANGES, **_FILTER_RANGES, "num_prompts": (0, _INFINITY), "batch_size": (1, _INFINITY)},
}
_ABOVE_ZERO = ("mesh.capacity", "sft.weight", "opd.weight", "rollout.top_p", "evaluate.top_p")


def default_config() -> ml_collections.ConfigDict:
  """Every setting with its default, the paper's for Qwen3-30B-A3B; configs/*.py start from here.

  The dictionary is locked: unknown names are errors. `teacher`, `prompts` and `workdir` must be filled in before
  `zeda_jax.adapt(config)`.
  """
  stage = {
    "trainable": "all",  # all | router | router+norms; what is not trained exists once for student and teacher
    "balance": "group",  # group (L_GA) | expert (L_A, ablation) | adamoe (baseline) | none
    "balance_tokens": "all",  # all (the paper) | response: short answers after long prompts want their own balance
    "weight": 2.0,  # w: target zero-expert ratio = w N_Z / (N + w N_Z)
    "coefficient": 0.1,  # alpha of the balance loss
    "accumulate": 1,  # parts a batch is run in, one after the other; must divide its rows, and saves memory
    "save_every": 50,  # steps between checkpoints; a killed run repeats those after the last one
    "log_every": 1,  # steps between rows of the metrics (CSV, JSONL, TensorBoard)
    "keep": 2,  # checkpoints that stay
  }
  optimizer = {
    "weight_decay": 0.1,  # of AdamW, scaled by the learning rate; norms and biases do not decay
    "b1": 0.9,  # decay of the mean of gradients, 0 to 1
    "b2": 0.98,  # decay of the mean of their squares, 0 to 1
    "eps": 1e-8,  # of AdamW's denominator
    "clip_norm": 1.0,  # most that the norm of all gradients together may be; 0 clips nothing
    "warmup_fraction": 0.1,  # share of all steps in which the learning rate rises from 0
  }
  return ml_collections.ConfigDict(
    {
      "teacher": "",  # Hugging Face directory of the static model
      "prompts": "",  # JSONL or array_record: prompt or messages, optional label
      "workdir": "",  # everything is written below it
      "seed": 0,  # of the zero experts' router rows, sampling and data order; the same seed gives the same run
      "dtype": "",  # of parameters and activations; empty keeps the checkpoint's
      "remat": "layer",  # none | dots | layer: what the backward pass recomputes (see zeda_jax.config.REMAT)
      "scan_unroll": 1,  # layers per iteration of the layer scan; small models run faster unrolled
      "mesh": {  # over all devices of all processes; nothing is cut where there is one device
        "data": -1,  # -1: what `expert` leaves
        "expert": 1,  # devices over which the experts are spread
        "capacity": 1.25,  # room for rows sent between experts' devices, relative to an even share of all picks
      },
      "student": {
        "num_zero_experts": config_dict.placeholder(int),  # N_Z; None means N // 2, 0 a static student
        "num_experts_per_tok": config_dict.placeholder(int),  # K; None keeps the teacher's
        "zero_expert_type": "zero",  # zero | copy (a baseline: the token's own hidden state)
        "renormalize": False,  # a baseline: weights of normal picks scaled up to the sum of all K
      },
      "rollout": {
        "max_new_tokens": 32768,  # of an answer; with the prompt at most the model's context
        "temperature": 1.0,  # 0 is greedy; 1 samples from the teacher's own distribution
        "top_k": 0,  # only the k likeliest tokens are sampled; 0: all
        "top_p": 1.0,  # only the likeliest tokens with this share of the probability are sampled; 1: all
        "batch_size": 64,  # responses sampled together
        "cache_tokens": 0,  # room in the cache, for all of these together; 0: for the longest that each could get
        "shard_size": 512,  # prompts per finished file; a killed run repeats those that were not finished
        "engine": "jax",  # jax | openai: a server with OpenAI's API, to which the settings below belong
        "url": "",  # of the server, such as http://localhost:8000/v1
        "model": "",  # its name there; empty takes the only one
        "key_variable": "",  # name of the environment variable that holds the API key; empty sends none
        "concurrency": 64,  # requests under way at a time
        "retries": 12,  # of a request that failed in a way that may pass, about six minutes in all
        "timeout": 3600.0,  # seconds of one attempt, for a whole answer
        "max_dropped": 0.01,  # share of answers that may be left out because their token ids cannot be verified
      },
      "sft": {
        **stage,
        "loss": "cross_entropy",  # cross_entropy (the paper) | forward_kl: of the teacher's whole distribution
        "teacher_metrics": True,  # run it for forward_kl and reverse_kl where the loss needs none: a quarter more work
        "epochs": 1,  # passes over the rollouts; 0 leaves the stage out
        "batch_size": 128,  # packed rows of a step
        "row_length": 32768,  # tokens of a row, into which answers are packed; those that do not fit are cut
        "optimizer": {
          **optimizer,
          "learning_rate": 2e-5,  # the highest, after the warm-up
          "schedule": "cosine",  # cosine | linear (both fall to 0) | constant
        },
      },
      "opd": {
        **stage,
        "loss": "sampled",  # sampled (the paper's policy gradient) | reverse_kl: exact, over the whole vocabulary
        "clip_low": 0.2,  # sampled only: the ratio of new to old probabilities is clipped at 1 - clip_low, as in PPO
        "clip_high": 0.2,  # and at 1 + clip_high
        "steps": 320,  # 0 leaves the stage out
        "prompts_per_step": 16,  # new ones each step; when all were used, they come again in another order
        "samples_per_prompt": 2,  # responses to each; a step has prompts_per_step times as many rows
        "routing_replay": False,  # train on the experts that were picked while sampling, not on those picked now
        "max_new_tokens": 32768,  # of a response; rows are as long as this and the longest prompt
        "temperature": 1.0,  # of the student's sampling; the loss takes it to be 1
        "cache_tokens": 0,  # as in rollout
        "overlap": False,  # sample the next batch while training on this one, with the parameters of one step earlier
        "save_every": 10,  # steps between checkpoints; a step takes longer than one of SFT
        "optimizer": {
          **optimizer,
          "learning_rate": 5e-6,  # the highest, after the warm-up
          "schedule": "constant",  # cosine | linear (both fall to 0) | constant
          "warmup_fraction": 0.0,  # share of all steps in which the learning rate rises from 0
        },
      },
      "export": {"plain": False},  # also write the plain-engine format
      "evaluate": {
        "prompts": "",  # held-out prompts; empty holds out `num_prompts` of the recipe's own
        "num_prompts": 256,  # that are held out and answered; 0: no evaluation
        "grader": "exact",  # exact | number; used where records have a label
        "max_new_tokens": 32768,  # of an answer; a longer one is cut there and graded as it is
        "temperature": 0.0,  # 0: greedy
        "top_k": 0,  # as in rollout
        "top_p": 1.0,  # as in rollout
        "batch_size": 64,  # answers sampled together; changes no result
        "distance": True,  # also measure KL divergences to the teacher
        "models": ("teacher", "injected", "sft", "student"),  # rows of the summary
      },
    }
  ).lock()


def optimizer_config(section: ml_collections.ConfigDict) -> "OptimizerConfig":
  """The hashable settings that a jitted step is made for."""
  from zeda_jax.distill.optimizer import OptimizerConfig  # late: reading a configuration should not wait for JAX

  return OptimizerConfig(**section.optimizer.to_dict())


def check_config(config: ml_collections.ConfigDict) -> None:
  """Checks all settings that need no file.

  Raises:
    ZedaError: names the setting, what it is and what was expected.
  """
  known, given = dict(_leaves(default_config().to_dict())), dict(_leaves(config.to_dict()))
  for name in (*(known.keys() - given.keys()), *(given.keys() - known.keys())):
    what = "is missing" if name in known else "is no setting"
    raise ZedaError(f"config.{name} {what}: start the configuration from zeda_jax.default_config().")
  for name in ("teacher", "prompts", "workdir"):
    if not given[name]:
      raise ZedaError(f"config.{name} is empty; give it as --config.{name}=PATH.")
  ranges = dict(_leaves(_RANGES))
  for name, value in given.items():
    if isinstance(value, int | float):
      _check_number(name, value, *ranges.get(name, (-_INFINITY, _INFINITY)))
  for name, choices in _choices().items():
    if given[name] not in choices:
      raise ZedaError(f"config.{name} is {given[name]!r}; expected one of {', '.join(map(repr, choices))}.")
  if not all(name.replace("-", "").isalnum() for name in given["evaluate.models"]):
    raise ZedaError(
      f"config.evaluate.models is {given['evaluate.models']!r}; expected names, as in "
      "--config.evaluate.models=\"('teacher','student')\"."
    )
  _check_student(config.student)
  _check_server(config.rollout)
  for section, rows in (
    ("sft", config.sft.batch_size),
    ("opd", config.opd.prompts_per_step * config.opd.samples_per_prompt),
  ):
    if rows % config[section].accumulate:
      raise ZedaError(
        f"config.{section}.accumulate is {config[section].accumulate}, which does not divide {rows} rows."
      )


def _check_number(name: str, value: float, least: float, most: float) -> None:
  if not math.isfinite(value):
    raise ZedaError(f"config.{name} is {value}; expected a finite number.")
  if name in _ABOVE_ZERO and value <= 0:
    raise ZedaError(f"config.{name} is {value}; expected more than 0.")
  if not least <= value <= most:
    expected = f"at least {least}" if value < least else f"at most {most}"
    raise ZedaError(f"config.{name} is {value}; expected {expected}.")


def _choices() -> dict[str, tuple[str, ...]]:
  from zeda_jax.config import REMAT, ZERO_EXPERT_TYPES
  from zeda_jax.distill.objectives import BALANCE_TOKENS, BALANCES
  from zeda_jax.distill.optimizer import SCHEDULES
  from zeda_jax.evaluate.graders import GRADERS
  from zeda_jax.models.params import TRAINABLE

  choices: dict[str, tuple[str, ...]] = {
    "dtype": ("", "float32", "bfloat16", "float16"),
    "remat": REMAT,
    "rollout.engine": ("jax", "openai"),
    "student.zero_expert_type": ZERO_EXPERT_TYPES,
    "sft.loss": ("cross_entropy", "forward_kl"),
    "opd.loss": ("sampled", "reverse_kl"),
    "evaluate.grader": tuple(GRADERS),
  }
  for stage in ("sft", "opd"):
    choices |= {
      f"{stage}.trainable": tuple(TRAINABLE),
      f"{stage}.balance": BALANCES,
      f"{stage}.balance_tokens": BALANCE_TOKENS,
    }
    choices[f"{stage}.optimizer.schedule"] = SCHEDULES
  return choices


def _check_student(settings: ml_collections.ConfigDict) -> None:
  zero, picks = settings.num_zero_experts, settings.num_experts_per_tok
  if zero is not None and (zero < 0 or (zero == 0 and picks is None)):
    raise ZedaError(
      f"config.student.num_zero_experts is {zero}; expected at least 1 (0 only for a static student, which "
      "config.student.num_experts_per_tok makes smaller than its teacher)."
    )
  if picks is not None and picks < 1:
    raise ZedaError(f"config.student.num_experts_per_tok is {picks}; expected at least 1.")


def _check_server(settings: ml_collections.ConfigDict) -> None:
  from zeda_jax.rollout.openai_client import base_url, check_variable

  check_variable(settings.key_variable)  # the settings are written down, so a key must not be among them
  if settings.url:
    base_url(settings.url)
  if settings.engine == "openai" and not settings.url:
    raise ZedaError("config.rollout.url is empty; config.rollout.engine=openai needs the address of the server.")


def claim_workdir(config: ml_collections.ConfigDict, contents: Mapping[str, str]) -> pathlib.Path:
  """Makes the workdir, or checks that it was begun with the same settings, so that finished stages can be reused.

  Args:
    config: the recipe.
    contents: fingerprints of the "teacher", the "prompts" to learn from and those "held out".

  Raises:
    ZedaError: it holds other files, cannot be written, or belongs to a run with another value of a setting that
      matters.
  """
  workdir = pathlib.Path(config.workdir)
  file, measured = workdir / "recipe.json", workdir / "evaluate" / "settings.json"
  settings = _binding(config.to_dict()) | {f"content of {name}": contents[name] for name in ("teacher", "prompts")}
  existed = workdir.exists()
  try:
    if file.is_file():
      # A setting that this run's version did not know had the value that is now its default.
      before = _binding(default_config().to_dict()) | _read_settings(file)
      mended = {name for name in settings if _is_mendable(workdir, name) and before.get(name) != settings[name]}
      _check_same(workdir, before, settings, mended)
      if measured.is_file():
        _check_same(workdir / "evaluate", _read_settings(measured), evaluation_settings(config, contents), set())
      if not mended:
        return workdir
    elif workdir.exists():
      _check_empty(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)
  except (OSError, ZedaError) as error:
    if not existed:
      with contextlib.suppress(OSError):
        workdir.rmdir()
    if isinstance(error, ZedaError):
      raise
    raise ZedaError(
      f"config.workdir: {workdir} cannot be written ({error.strerror or error}): give a directory that can."
    ) from error
  return workdir


def evaluation_settings(config: ml_collections.ConfigDict, contents: Mapping[str, str]) -> dict[str, Any]:
  """What decides the rows of the table, beside the models."""
  settings = {k: v for k, v in config.evaluate.to_dict().items() if k not in _FREE_IN_EVALUATION}
  named = {f"evaluate.{k}": v for k, v in settings.items()}
  return named | {"content of held-out prompts": contents["held-out prompts"]}


def write_json(file: pathlib.Path, value: Any) -> None:
  """Writes JSON complete or not at all, over what was there."""
  file.parent.mkdir(parents=True, exist_ok=True)
  with atomic_writer(file, overwrite=True) as out:
    out.write(json.dumps(value, indent=2).encode())


def _check_empty(workdir: pathlib.Path) -> None:
  if not workdir.is_dir():
    raise ZedaError(f"config.workdir: {workdir} is a file; expected a directory that is new or empty.")
  # A run killed at its very start leaves the unfinished file alone.
  if any(entry.name != ".recipe.json.partial" for entry in workdir.iterdir()):
    raise ZedaError(f"{workdir} is not empty and holds no run of this command: give a new directory as config.workdir.")


def _read_settings(file: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(file.read_text())
  except ValueError as error:
    raise ZedaError(f"{file} is not valid JSON ({error}): restore it, or use another --config.workdir.") from error
  return value if isinstance(value, dict) else {}


def _is_mendable(workdir: pathlib.Path, name: str) -> bool:
  stage, _, setting = name.partition(".")
  return setting in _MENDABLE and not (workdir / stage / "finished.json").is_file()


def _check_same(where: pathlib.Path, before: Mapping[str, Any], now: Mapping[str, Any], free: set[str]) -> None:
  now = json.loads(json.dumps(now))  # tuples become lists, as they did in the file
  for name in sorted((before.keys() | now.keys()) - free):
    if before.get(name) == now.get(name):
      continue
    if name.startswith("content of "):
      what = name.removeprefix("content of ")
      advice = "files, --config.evaluate.prompts and --config.evaluate.num_prompts" if "prompts" in what else "files"
      raise ZedaError(
        f"{where} was begun with another content of the {what} than now: use another --config.workdir, or the old "
        f"{advice} to go on."
      )
    old = f"config.{name}={before.get(name)!r}"
    if where.name == "evaluate":
      raise ZedaError(f"{where} was measured with {old}, now it is {now.get(name)!r}: rename it to measure again.")
    raise ZedaError(
      f"{where} was begun with {old}, now it is {now.get(name)!r}: use another --config.workdir, or the old value to "
      "go on."
    )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _binding(tree: dict[str, Any]) -> dict[str, Any]:
  """Settings by dotted name, without those a run may change."""
  return {
    name: value
    for name, value in _leaves(tree)
    if name not in _FREE and name.split(".")[0] not in _FREE and name.split(".")[-1] not in _FREE
  }
