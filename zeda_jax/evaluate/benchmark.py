"""Evaluation of a checkpoint on benchmarks: plan, generate, grade, sum up; each sample is kept as soon as it is there.

results = run("model", select("aime24,code"), "evaluations/model", Settings(data="benchmarks"))
"""

import dataclasses
import json
import math
import os
import pathlib
import queue
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from zeda_jax.data import chat
from zeda_jax.data.jsonl import atomic_writer
from zeda_jax.errors import ZedaError
from zeda_jax.evaluate import estimators, tasks
from zeda_jax.evaluate.answers import without_reasoning
from zeda_jax.evaluate.checkpoint import checkpoint_fingerprint, open_engine
from zeda_jax.evaluate.grading import Graders, Verdict, check_graders
from zeda_jax.evaluate.problems import Problem, fingerprint
from zeda_jax.evaluate.samples import Key, SampleLog
from zeda_jax.evaluate.sandbox import Limits
from zeda_jax.evaluate.sources import load_problems
from zeda_jax.rollout.requests import Completion, Request
from zeda_jax.rollout.sampling import Sampling

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to evaluate; the defaults are the paper's.

  Attributes:
    data, sources: see `sources.load_problems`; sources by the task's name.
    limit: only the first so many problems of each task.
    temperature, max_new_tokens: of sampling. None: the task's own; 0.6, and 38912 or what the model's
      context leaves.
    top_p, top_k: of sampling.
    zero_expert_bias: see `Decoder.__call__`.
    seed: of sampling; same seed, same responses.
    template_options: variables of the chat template, such as {"enable_thinking": False}.
    batch_size: responses decoded together.
    cache_tokens: see `Engine`; None: enough for the longest response, and for 2048 tokens of each.
    dtype: of the parameters and activations; None: the checkpoint's.
    grade_workers: responses graded at once; None: one per processor.
    limits: of a program's run.
    allow_weak_sandbox: see `sandbox.run`.
  """

  data: str | os.PathLike[str] | None = None
  sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
  limit: int | None = None
  temperature: float | None = None
  top_p: float = tasks.TOP_P
  top_k: int = tasks.TOP_K
  max_new_tokens: int | None = None
  zero_expert_bias: float = 0.0
  seed: int = 0
  template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  batch_size: int = 16
  cache_tokens: int | None = None
  dtype: str | None = None
  grade_workers: int | None = None
  limits: Limits = dataclasses.field(default_factory=Limits)
  allow_weak_sandbox: bool = False

  def __post_init__(self) -> None:
    Sampling(self.temperature or 0.0, self.top_k, self.top_p)
    for name in ("limit", "max_new_tokens", "batch_size", "cache_tokens", "grade_workers"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ZedaError(f"{name} is {value}; expected at least 1.")
    if self.seed < 0:
      raise ZedaError(f"seed is {self.seed}; expected at least 0.")
    if math.isnan(self.zero_expert_bias):
      raise ZedaError("zero_expert_bias is NaN; expected a number, or -inf to switch the zero experts off.")


@dataclasses.dataclass(frozen=True)
class Item:
  """A problem in the run's order, with its prompt as tokens."""

  task: tasks.Task
  problem: Problem
  prompt: list[int]
  max_new_tokens: int
  opens_reasoning: bool

  def samples(self) -> list[Key]:
    return [(self.task.name, self.problem.id, sample) for sample in range(self.task.samples)]


@dataclasses.dataclass
class Plan:
  """What is to be done, checked."""

  directory: pathlib.Path
  output: pathlib.Path
  settings: Settings
  items: list[Item]
  tokenizer: chat.Tokenizer
  stop_ids: tuple[int, ...]
  log: SampleLog
  record: dict[str, Any]  # of settings.json

  @property
  def num_samples(self) -> int:
    return sum(item.task.samples for item in self.items)


def run(
  directory: str | os.PathLike[str],
  chosen: Sequence[tasks.Task],
  output: str | os.PathLike[str],
  settings: Settings | None = None,
  *,
  progress: Progress | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Evaluates a Hugging Face directory, or goes on where an earlier run into `output` was.

  Args:
    directory: a static or dynamic checkpoint with its tokenizer.
    chosen: tasks.
    output: gets settings.json, samples.jsonl and results.json.
    settings: None means the paper's.
    progress: called with (responses generated or found, responses in all).
    say: called with a line about what will be done.

  Returns:
    What results.json holds: for each task `estimators.summarize`, their "average", and whether it is "complete".

  Raises:
    ZedaError: before anything is generated, if something is missing or the output belongs to another run.
  """
  plan = make_plan(directory, chosen, output, settings or Settings())
  with plan.log:
    missing = requests_of(plan)
    found = plan.num_samples - sum(request.n for _, request in missing)
    say(
      f"{len(plan.items)} problems of {len(chosen)} tasks, {plan.num_samples} responses"
      + (f", {found} of them found in {plan.output}" if found else "")
    )
    start = time.perf_counter()
    engine = None
    if missing:
      longest = max(len(request.prompt) + request.max_new_tokens for _, request in missing)
      engine = open_engine(plan.directory, plan.settings, longest)
    with Graders(plan.settings.grade_workers, plan.settings.limits, plan.settings.allow_weak_sandbox) as graders:
      _generate_and_grade(plan, engine, missing, graders, progress, found)
    plan.log.compact(key for item in plan.items for key in item.samples())
    results = sum_up(plan)
    if engine is not None:
      results["seconds"] = time.perf_counter() - start
    write_json(plan.output / "results.json", results)
  return results


def make_plan(
  directory: str | os.PathLike[str], chosen: Sequence[tasks.Task], output: str | os.PathLike[str], settings: Settings
) -> Plan:
  """Loads the problems and checks everything that can be checked without the model's weights."""
  from zeda_jax.config import read_config

  place, target = pathlib.Path(directory), pathlib.Path(output)
  config = read_config(place)
  tokenizer = chat.load_tokenizer(place)
  chat.check_vocabulary(tokenizer, config.vocab_size, str(place))
  stop_ids = chat.eos_ids(place, tokenizer)
  unknown = settings.sources.keys() - {task.name for task in chosen}
  if unknown:
    raise ZedaError(f"--source: {', '.join(sorted(unknown))} is not among the tasks of this run.")
  problems = [
    (task, problem)
    for task in chosen
    for problem in load_problems(task, settings.data, settings.sources.get(task.name), settings.limit)
  ]
  check_graders(
    [task.grader for task, _ in problems], [problem for _, problem in problems], settings.allow_weak_sandbox
  )
  items = [_item(task, problem, tokenizer, settings, config.max_position_embeddings) for task, problem in problems]
  record = _settings_record(place, settings, items)
  log = _open_output(target, record)
  try:
    _check_problems(log, items)
    write_json(target / "settings.json", record)
  except BaseException:
    log.close()
    raise
  return Plan(place, target, settings, items, tokenizer, stop_ids, log, record)


def _item(task: tasks.Task, problem: Problem, tokenizer: chat.Tokenizer, settings: Settings, context: int) -> Item:
  where = f"{task.name}, problem {problem.id}"
  prompt = chat.render_prompt(tokenizer, {"prompt": problem.prompt}, where, settings.template_options)
  room = context - len(prompt)
  wanted = settings.max_new_tokens or task.max_new_tokens
  if room < 1 or (settings.max_new_tokens is not None and wanted is not None and wanted > room):
    raise ZedaError(
      f"{where}: the prompt has {len(prompt)} tokens, which leaves {max(room, 0)} of the model's context of {context} "
      f"for the answer; {wanted or 'at least one'} were asked for: lower --max-new-tokens, or leave the problem out."
    )
  opens = tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")
  return Item(task, problem, prompt, min(wanted or tasks.MAX_NEW_TOKENS, room), opens)


def _settings_record(directory: pathlib.Path, settings: Settings, items: Sequence[Item]) -> dict[str, Any]:
  """What decides the responses, and what was asked."""
  names = ("temperature", "top_p", "top_k", "max_new_tokens", "seed", "template_options", "dtype")
  record = {name: getattr(settings, name) for name in names}
  record["template_options"] = dict(settings.template_options)
  record["zero_expert_bias"] = str(settings.zero_expert_bias)  # JSON has no infinity
  asked: dict[str, Any] = {}
  for item in items:
    entry = asked.setdefault(item.task.name, {"title": item.task.title, "samples": item.task.samples, "problems": 0})
    entry["problems"] += 1
  return record | {"model": str(directory), "checkpoint": checkpoint_fingerprint(directory), "tasks": asked}


def _open_output(output: pathlib.Path, record: dict[str, Any]) -> SampleLog:
  """Makes the directory, or checks that it belongs to a run with the same settings; adds the tasks it had."""
  file = output / "settings.json"
  if file.is_file():
    try:
      before: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
      raise ZedaError(f"{file} is not valid JSON ({error}): restore it, or use another --output.") from error
    for name in record.keys() - {"tasks", "model"}:
      if before.get(name) != record[name]:
        raise ZedaError(
          f"{output} holds a run with {name} {before.get(name)!r}; this one has {record[name]!r}: use another --output."
        )
    record["tasks"] = before.get("tasks", {}) | record["tasks"]
  elif output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise ZedaError(f"{output} is not empty and holds no run of this command: give a new directory as --output.")
  output.mkdir(parents=True, exist_ok=True)
  write_json(file, record)
  return SampleLog(output / "samples.jsonl")


def _check_problems(log: SampleLog, items: Sequence[Item]) -> None:
  for item in items:
    digest = fingerprint(item.problem)
    for key in item.samples():
      if key in log.samples and log.samples[key].get("problem", digest) != digest:
        raise ZedaError(
          f"{log.path}: problem {item.problem.id} of {item.task.name} was another one when this run began: restore the "
          "data, or use another --output."
        )


def requests_of(plan: Plan) -> list[tuple[Item, Request]]:
  """What is left to generate; consecutive samples of one problem share a request.

  Sample i of a problem has a random stream that depends on the seed, the task, the problem's id and i, and on nothing
  else: not on what else is evaluated, nor on what was found of an earlier run.
  """
  settings, requests = plan.settings, []
  for item in plan.items:
    missing = [key[2] for key in item.samples() if "response" not in plan.log.samples.get(key, {})]
    temperature = next(t for t in (settings.temperature, item.task.temperature, tasks.TEMPERATURE) if t is not None)
    for first, count in _stretches(missing):
      request = Request(
        prompt=item.prompt,
        max_new_tokens=item.max_new_tokens,
        temperature=temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=zlib.crc32(f"{settings.seed}/{item.task.name}/{item.problem.id}".encode()),
        stream=first,
        n=count,
        stop_ids=plan.stop_ids,
        zero_expert_bias=settings.zero_expert_bias,
      )
      requests.append((item, request))
  return requests


def _stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
  """(first, count) of each run of consecutive numbers."""
  start = 0
  for place in range(1, len(numbers) + 1):
    if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
      yield numbers[start], place - start
      start = place


def _generate_and_grade(
  plan: Plan,
  engine: Any,
  missing: Sequence[tuple[Item, Request]],
  graders: Graders,
  progress: Progress | None,
  found: int,
) -> None:
  """Grading runs beside generation; only this thread writes the log."""
  verdicts: queue.SimpleQueue[tuple[Key, Future[Verdict]]] = queue.SimpleQueue()
  waiting = 0

  def grade(item: Item, key: Key) -> None:
    nonlocal waiting
    answer = without_reasoning(plan.log.samples[key]["response"], item.opens_reasoning)
    waiting += 1
    graders.submit(item.task.grader, item.problem, answer).add_done_callback(lambda f: verdicts.put((key, f)))

  def drain(block: bool) -> None:
    nonlocal waiting
    while waiting and (block or not verdicts.empty()):
      key, future = verdicts.get()
      waiting -= 1
      verdict = future.result()
      plan.log.add({"task": key[0], "id": key[1], "sample": key[2], **dataclasses.asdict(verdict)})

  for item in plan.items:  # graded in vain before, or never
    for key in item.samples():
      sample = plan.log.samples.get(key, {})
      if "response" in sample and sample.get("score") is None:
        grade(item, key)
  if missing:
    note = progress and (lambda done, total: progress(found + done, found + total))
    for place, completion in engine.run([request for _, request in missing], note):
      item, request = missing[place]
      key = (item.task.name, item.problem.id, request.stream + completion.index)
      plan.log.add(_sample(plan, item, key, completion))
      grade(item, key)
      drain(block=False)
  drain(block=True)


def _sample(plan: Plan, item: Item, key: Key, completion: Completion) -> dict[str, Any]:
  return {
    "task": key[0],
    "id": key[1],
    "sample": key[2],
    "problem": fingerprint(item.problem),
    "response": decode(plan.tokenizer, completion.tokens),
    "num_tokens": len(completion.tokens),
    "num_prompt_tokens": len(item.prompt),
    "finish_reason": completion.finish_reason,
    "zero_ratio": completion.zero_ratio,
    "zero_ratio_all": completion.zero_ratio_all,
  }


def decode(tokenizer: chat.Tokenizer, tokens: Sequence[int]) -> str:
  """Text without special tokens, but with those that end the reasoning, which some tokenizers call special."""
  kept = {tokenizer.convert_tokens_to_ids(name) for name in ("<think>", "</think>")} - {tokenizer.unk_token_id}
  dropped = set(tokenizer.all_special_ids) - kept
  return tokenizer.decode([token for token in tokens if token not in dropped], skip_special_tokens=False)


def sum_up(plan: Plan) -> dict[str, Any]:
  """What results.json holds, of all tasks that the output directory has."""
  now = {item.task.name for item in plan.items}
  wanted = {key for item in plan.items for key in item.samples()}
  summaries = {}
  for name, asked in plan.record["tasks"].items():
    samples = [s for key, s in plan.log.samples.items() if key[0] == name and (name not in now or key in wanted)]
    if samples:
      summaries[name] = {"title": asked["title"], **estimators.summarize(samples, asked["samples"])}
  return {
    "model": plan.record["model"],
    "settings": {name: value for name, value in plan.record.items() if name not in ("model", "tasks")},
    "tasks": summaries,
    "average": estimators.overall(summaries),
    "complete": not any(summary["num_failed"] for summary in summaries.values()),
  }


def write_json(file: pathlib.Path, value: Any) -> None:
  """Writes JSON complete or not at all, over what was there."""
  write_text(file, json.dumps(value, indent=2, allow_nan=False))


def write_text(file: pathlib.Path, text: str) -> None:
  """Writes a file complete or not at all, over what was there."""
  with atomic_writer(file, overwrite=True) as out:
    out.write(text.encode())
