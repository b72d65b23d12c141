"""Where problems come from: files, data sets of Hugging Face and TensorFlow Datasets, and the demo's families."""

import importlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from zeda_jax.data.jsonl import JsonLines
from zeda_jax.errors import ZedaError
from zeda_jax.evaluate.problems import Problem, read_problem
from zeda_jax.evaluate.tasks import Task

_DEMO_PROBLEMS = 1500


def load_problems(
  task: Task, data: str | os.PathLike[str] | None = None, source: str | None = None, limit: int | None = None
) -> list[Problem]:
  """The problems of a task, checked.

  Args:
    task: what to load.
    data: directory with NAME.jsonl (or NAME/*.jsonl); a task whose file is not there comes from its own source.
    source: instead of both: a file, a pattern, or "hf:...", "tfds:...", "demo:..." as in `Task.source`.
    limit: only the first so many.

  Raises:
    ZedaError: nothing is found, a record is broken, or two problems have the same id.
  """
  problems: list[Problem] = []
  lines: dict[str, str] = {}
  for index, (where, record) in enumerate(_records(task, data, source)):
    if record.get("error_type", "ok") != "ok":  # MMLU-Redux: a question that its reviewers found to be wrong
      continue
    problem = read_problem(record, task, index, where)
    if problem.id in lines:
      raise ZedaError(f"{where}: the id {problem.id!r} is also that of {lines[problem.id]}: ids must be unique.")
    lines[problem.id] = where
    problems.append(problem)
    if limit is not None and len(problems) == limit:
      break
  if not problems:
    raise ZedaError(f"task {task.name}: no problem was found; expected at least one.")
  return problems


def _records(
  task: Task, data: str | os.PathLike[str] | None, source: str | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """("file:line", record) one by one."""
  if source is None and data is not None:
    source = _file_in(pathlib.Path(data), task)
  source = source or task.source
  if source is None:
    raise ZedaError(f"task {task.name} has no source of its own: give --data=DIR with {task.name}.jsonl in it.")
  kind, _, name = source.partition(":")
  if kind == "demo":
    from zeda_jax.demo.families import generate_tasks

    yield from _numbered(source, generate_tasks(name, "held_out", _DEMO_PROBLEMS))
  elif kind == "tfds":
    yield from _numbered(source, _from_tfds(name, task))
  elif kind == "hf" and "@" in name:
    yield from _from_files(_downloaded(name, task))
  elif kind == "hf":
    yield from _numbered(source, _from_hub(name, task))
  else:
    yield from _from_files(source)


def _file_in(directory: pathlib.Path, task: Task) -> str | None:
  """What a data directory has for a task; None if nothing, and the task is found elsewhere."""
  if not directory.is_dir():
    raise ZedaError(f"--data: {directory} is no directory; expected one with files such as {task.name}.jsonl.")
  if (directory / f"{task.name}.jsonl").is_file():
    return str(directory / f"{task.name}.jsonl")
  if any((directory / task.name).glob("*.jsonl")):
    return str(directory / task.name / "*.jsonl")
  if task.source is None or not task.source.startswith("demo:"):
    raise ZedaError(
      f"{directory} has neither {task.name}.jsonl nor {task.name}/*.jsonl: add it, name its place with "
      f"--source={task.name}=FILE, or leave --data away to download it."
    )
  return None


def _from_files(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
  lines = JsonLines(path)
  for index, record in enumerate(lines):
    yield lines.location(index), record


def _numbered(name: str, records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
  for index, record in enumerate(records):
    yield f"{name}, record {index}", record


def _from_hub(name: str, task: Task) -> Iterator[Mapping[str, Any]]:
  parts = [*name.split(":"), "", ""][:3]
  repository, config, split = parts[0], parts[1] or None, parts[2] or "test"
  datasets = _library("datasets", task)
  with _network(task, f"hf:{name}"):
    configs = datasets.get_dataset_config_names(repository) if config == "*" else [config]
    tables = [datasets.load_dataset(repository, each, split=split) for each in configs]
  for each, table in zip(configs, tables, strict=True):
    for index, record in enumerate(table):
      yield record if len(configs) == 1 else {"id": f"{each}/{index}", **record}


def _downloaded(name: str, task: Task) -> str:
  repository, _, file = name.partition("@")
  from huggingface_hub import hf_hub_download

  with _network(task, f"hf:{name}"):
    return hf_hub_download(repository, file, repo_type="dataset")


def _from_tfds(name: str, task: Task) -> Iterator[Mapping[str, Any]]:
  name, _, split = name.rpartition("/")
  tfds = _library("tensorflow_datasets", task)
  with _network(task, f"tfds:{name}"):
    source = tfds.data_source(name, split=split or "test")
  for record in source:
    yield {key: value.decode() if isinstance(value, bytes) else _plain(value) for key, value in record.items()}


def _plain(value: Any) -> Any:
  """NumPy's scalars and arrays as Python's; texts in them as texts."""
  value = value.tolist() if hasattr(value, "tolist") else value
  if isinstance(value, bytes):
    return value.decode()
  return [_plain(item) for item in value] if isinstance(value, list) else value


def _library(name: str, task: Task) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ZedaError(
      f"task {task.name}: {name} is not installed, which reads data sets of the network: pip install "
      "'zeda-jax[evaluate]', or give --data=DIR."
    ) from error


class _network:
  """Turns what data libraries raise, of many types, into one sentence."""

  def __init__(self, task: Task, source: str):
    self.task, self.source = task, source

  def __enter__(self) -> None:
    pass

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    if isinstance(error, Exception):
      reason = (str(error) or type(error).__name__).splitlines()[0]
      raise ZedaError(
        f"task {self.task.name}: {self.source} cannot be loaded ({reason}): check the network (and that you may see "
        f"the data set), or give --data=DIR with {self.task.name}.jsonl in it."
      ) from error
