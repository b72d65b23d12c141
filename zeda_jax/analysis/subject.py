"""What a report is about: a student, its teacher, prompts, and how answers are sampled and graded."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from zeda_jax.checkpoint.huggingface import load_hf
from zeda_jax.config import ModelConfig, read_config
from zeda_jax.data import chat
from zeda_jax.data.prompts import Prompts, open_prompts
from zeda_jax.distill.job import split_prompts
from zeda_jax.distill.recipe import default_config
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder
from zeda_jax.models.params import reconfigured
from zeda_jax.sharding import Sharding, make_mesh


@dataclasses.dataclass(frozen=True)
class Answering:
  """How answers are sampled; the paper's protocol by default."""

  max_new_tokens: int = 2048
  temperature: float = 0.6
  top_k: int = 20
  top_p: float = 0.95
  seed: int = 0
  batch_size: int = 64
  grader: str = "exact"


@dataclasses.dataclass(frozen=True)
class Subject:
  """Checkpoint directories and prompts, checked; weights are read when they are first asked for."""

  student_path: pathlib.Path
  teacher_path: pathlib.Path | None
  config: ModelConfig  # the student's
  records: Sequence[Mapping[str, Any]]
  prompts: Sequence[Sequence[int]]  # their tokens
  tokenizer: Any
  eos_ids: tuple[int, ...]
  answering: Answering
  main: pathlib.Path | None = None  # the recipe's workdir, where there is one
  dtype: str = ""
  expert_devices: int = 1

  @functools.cached_property
  def student(self) -> Decoder:
    return self._load(self.student_path)

  @functools.cached_property
  def teacher(self) -> Decoder | None:
    return None if self.teacher_path is None else self._load(self.teacher_path)

  @property
  def labelled(self) -> bool:
    return any(record.get("label") is not None for record in self.records)

  def decode(self, tokens: Sequence[int]) -> str:
    return self.tokenizer.decode(tokens, skip_special_tokens=True)

  @functools.cached_property
  def sharding(self) -> Sharding | None:
    if len(jax.devices()) == 1:
      return None
    return Sharding(make_mesh(-1, self.expert_devices, num_experts=self.config.num_experts))

  def _load(self, path: pathlib.Path) -> Decoder:
    sharding = self.sharding
    model = load_hf(path, self.dtype or None, None if sharding is None else sharding.parameter)
    return reconfigured(model, eos_token_ids=self.eos_ids, sharding=sharding)


def recipe_directory(workdir: pathlib.Path) -> pathlib.Path:
  """Where the recipe's own output lies below what was given to `zeda adapt` or `zeda demo`.

  Raises:
    ZedaError: there is no finished run.
  """
  main = workdir / "main" if (workdir / "main" / "recipe.json").is_file() else workdir
  if not workdir.is_dir():
    raise ZedaError(f"{workdir} does not exist: give the workdir of a finished `zeda adapt` or `zeda demo`.")
  if not (main / "recipe.json").is_file():
    raise ZedaError(
      f"{workdir} holds no run of `zeda adapt` or `zeda demo` (no recipe.json): give its workdir, or two checkpoints "
      "with --teacher, --student, --prompts and --out."
    )
  if not (main / "student" / "config.json").is_file():
    raise ZedaError(f"{main} has no student/ yet: run the same `zeda adapt` again until it has exported the student.")
  return main


def from_workdir(
  workdir: pathlib.Path,
  *,
  teacher: pathlib.Path | None = None,
  prompts: pathlib.Path | None = None,
  num_prompts: int = 0,
  expert_devices: int = 0,
  changes: Mapping[str, Any] | None = None,
) -> Subject:
  """The subject of a finished run: its exported student, its teacher and its held-out prompts.

  Args:
    workdir: of `zeda adapt` or `zeda demo`.
    teacher: its directory, where the recorded one has moved.
    prompts: a file of prompts instead of the held-out ones.
    num_prompts: at most so many, evenly spaced; 0 takes all.
    expert_devices: devices over which experts are spread; 0 means as the run did, if these devices can.
    changes: fields of Answering that differ from what the run's evaluation used.

  Raises:
    ZedaError: no finished run, or one whose teacher or prompts are unknown or gone.
  """
  main = recipe_directory(workdir)
  config = _recorded_config(main)
  if teacher is None:
    teacher = _recorded(config, "teacher", main)
  if prompts is None:
    config.prompts = str(_recorded(config, "prompts", main))
    _, source, held_out = split_prompts(config, open_prompts(config.prompts))
    records = _Chosen(source, held_out)
  else:
    records = _Chosen(open_prompts(prompts))
  settings = {field.name: config.evaluate.get(field.name) for field in dataclasses.fields(Answering)}
  settings["seed"] = config.seed
  given = {name: value for name, value in (changes or {}).items() if value is not None}
  return _checked(
    main / "student",
    teacher,
    records.first(num_prompts),
    Answering(**(settings | given)),
    main=main,
    dtype=config.dtype,
    expert_devices=expert_devices or config.mesh.expert,
  )


def from_checkpoints(
  student: pathlib.Path,
  teacher: pathlib.Path | None,
  prompts: pathlib.Path,
  *,
  num_prompts: int = 0,
  expert_devices: int = 0,
  dtype: str = "",
  changes: Mapping[str, Any] | None = None,
) -> Subject:
  """The subject made of checkpoint directories; without a teacher there is no gap, and no load before.

  Raises:
    ZedaError: a directory is no checkpoint, or the prompts do not fit it.
  """
  given = {name: value for name, value in (changes or {}).items() if value is not None}
  records = _Chosen(open_prompts(prompts)).first(num_prompts)
  return _checked(student, teacher, records, Answering(**given), dtype=dtype, expert_devices=expert_devices or 1)


class _Chosen:
  """Some records of a file of prompts, in order."""

  def __init__(self, source: Prompts, numbers: np.ndarray | None = None):
    self._source = source
    self._numbers = np.arange(len(source)) if numbers is None else numbers

  def first(self, count: int) -> "_Chosen":
    if not 0 < count < len(self._numbers):
      return self
    return _Chosen(self._source, self._numbers[np.linspace(0, len(self._numbers) - 1, count).astype(int)])

  def __iter__(self):
    return ((self._source[int(i)], self._source.location(int(i))) for i in self._numbers)


def _checked(
  student: pathlib.Path, teacher: pathlib.Path | None, chosen: _Chosen, answering: Answering, **others: Any
) -> Subject:
  config = read_config(student)
  if not config.is_dynamic:
    raise ZedaError(
      f"{student} is a static model: a report is about one with zero experts. `zeda adapt` makes it from this one, and "
      "`zeda inject` an untrained one."
    )
  if teacher is not None:
    static = read_config(teacher)
    if static.is_dynamic:
      raise ZedaError(f"--teacher: {teacher} has zero experts; expected the static model that the student came from.")
    if (static.num_layers, static.num_experts, static.vocab_size) != (
      config.num_layers,
      config.num_experts,
      config.vocab_size,
    ):
      raise ZedaError(
        f"{teacher} has {static.num_layers} layers, {static.num_experts} experts and {static.vocab_size} tokens, but "
        f"{student} has {config.num_layers}, {config.num_experts} and {config.vocab_size}: give the student's own "
        "teacher."
      )
  tokenizer = chat.load_tokenizer(student)
  chat.check_vocabulary(tokenizer, config.vocab_size, str(student))
  records, prompts = [], []
  for record, where in chosen:
    tokens = chat.render_prompt(tokenizer, record, where)
    total = len(tokens) + answering.max_new_tokens
    if total > config.max_position_embeddings:
      raise ZedaError(
        f"{where}: the prompt has {len(tokens)} tokens, which with {answering.max_new_tokens} new tokens makes "
        f"{total}, more than the context of {config.max_position_embeddings}: shorten it or lower --max-new-tokens."
      )
    records.append(record)
    prompts.append(tokens)
  eos_ids = chat.eos_ids(student, tokenizer)
  return Subject(student, teacher, config, records, prompts, tokenizer, eos_ids, answering, **others)


def _recorded_config(main: pathlib.Path) -> ml_collections.ConfigDict:
  """The run's settings as its evaluation left them; the defaults where it was not evaluated."""
  config, file = default_config(), main / "evaluate" / "config.json"
  if file.is_file():
    try:
      values = json.loads(file.read_text())
    except ValueError as error:
      raise ZedaError(f"{file} is not valid JSON ({error}): remove it and run the same `zeda adapt` again.") from error
    with config.unlocked():  # a run of another version may know other settings
      config.update(values)
  return config


def _recorded(config: ml_collections.ConfigDict, name: str, main: pathlib.Path) -> pathlib.Path:
  value = config[name]
  if not value:
    raise ZedaError(
      f"{main} does not say where its {name} lies (no evaluate/config.json): give --{name}=PATH, or run the same "
      "`zeda adapt` again, which writes it."
    )
  path = pathlib.Path(value)
  if not path.exists():
    raise ZedaError(f"{main} was made with {name} {path}, which is gone: give its new place as --{name}=PATH.")
  return path
