"""`zeda evaluate`: scores of a checkpoint on benchmarks, and two of them compared."""

import argparse
import json
import pathlib
from typing import Any

from zeda_jax.errors import ZedaError

_USAGE = """zeda evaluate DIR --tasks=aime24,code [--data=BENCHMARKS] [--output=DIR]
       zeda evaluate --compare RUN_A RUN_B
       zeda evaluate --list"""
_EPILOG = """Sampling is the paper's by default, with 32 samples for AIME, 8 for code, 1 for the rest. The same
command again goes on where it was. docs/evaluate.md has the file format, the tasks, and what
contains programs that models write."""


def run(command: str, args: list[str]) -> int:
  parser = _parser(command)
  if not args:
    parser.print_help()
    return 0
  flags = parser.parse_args(args)
  if flags.list:
    return _list()
  if flags.compare:
    if flags.model or flags.tasks:
      raise ZedaError("--compare takes two output directories and nothing else: a DIR or --tasks was given, too.")
    return _compare(flags.compare[0], flags.compare[1], flags.seed)
  if not flags.model:
    raise ZedaError(
      "no checkpoint is given: expected a Hugging Face directory, as in zeda evaluate DIR --tasks=aime24."
    )
  if not flags.tasks:
    raise ZedaError("--tasks is missing; give names or groups, such as --tasks=aime24,code (see --list).")
  return _evaluate(flags)


def _evaluate(flags: argparse.Namespace) -> int:
  import rich.console

  # Late: `--help` should not wait for JAX.
  from zeda_jax.distill.summary import progress
  from zeda_jax.evaluate import benchmark, tables, tasks
  from zeda_jax.evaluate.sandbox import Limits

  console = rich.console.Console()
  chosen = tasks.with_samples(tasks.select(flags.tasks), flags.samples)
  output = pathlib.Path(flags.output or pathlib.Path("evaluations") / pathlib.Path(flags.model).resolve().name)
  settings = benchmark.Settings(
    data=flags.data,
    sources=_sources(flags.source, chosen),
    limit=flags.limit,
    temperature=flags.temperature,
    top_p=flags.top_p,
    top_k=flags.top_k,
    max_new_tokens=flags.max_new_tokens,
    zero_expert_bias=flags.zero_expert_bias,
    seed=flags.seed,
    template_options=_options(flags.template_options),
    batch_size=flags.batch_size,
    cache_tokens=flags.cache_tokens,
    dtype=flags.dtype,
    grade_workers=flags.grade_workers,
    limits=Limits(cpu_seconds=flags.code_seconds, wall_seconds=3 * flags.code_seconds),
    allow_weak_sandbox=flags.allow_weak_sandbox,
  )
  say = lambda line: console.print(line, highlight=False, soft_wrap=True)
  with progress(console, "responses") as note:
    results = benchmark.run(flags.model, chosen, output, settings, progress=note, say=say)
  table = tables.results_table(results)
  tables.show(console, f"{flags.model}: scores in %, ± standard error", table)
  benchmark.write_text(output / "results.md", tables.markdown(table))
  for name, what in (("results.json", "all numbers"), ("results.md", "this table"), ("samples.jsonl", "responses")):
    say(f"{what}: {output / name}")
  if not results["complete"]:
    say(
      f"{results['average']['num_failed']} responses could not be graded and count nowhere; 'failure' in samples.jsonl "
      "says why. Run the same command again to retry them."
    )
    return 1
  return 0


def _compare(first: str, second: str, seed: int) -> int:
  import rich.console

  from zeda_jax.evaluate import comparison, tables

  console = rich.console.Console()
  found, notes = comparison.compare_runs(first, second, seed)
  names = [pathlib.Path(path).resolve().name for path in (first, second)]
  names = names if names[0] != names[1] else [first, second]
  tables.show(console, "paired by problem; scores in %", tables.comparison_table(found, names))
  for note in notes:
    console.print(f"note: {note}", highlight=False, soft_wrap=True)
  return 0


def _list() -> int:
  import rich.console

  from zeda_jax.evaluate import tables

  tables.show(rich.console.Console(), "tasks", tables.tasks_table())
  return 0


def _sources(given: list[str], chosen: Any) -> dict[str, str]:
  from zeda_jax.evaluate.tasks import select

  sources = {}
  for entry in given:
    name, equals, source = entry.partition("=")
    if not equals or not source:
      raise ZedaError(
        f"--source: {entry!r} has no place; expected TASK=FILE, TASK=hf:NAME:CONFIG:SPLIT or TASK=tfds:...."
      )
    sources[select(name)[0].name] = source
  return sources


def _options(text: str) -> dict[str, Any]:
  try:
    value = json.loads(text)
  except ValueError as error:
    raise ZedaError(
      f'--template-options is not valid JSON ({error}); expected {{"enable_thinking": false}}.'
    ) from error
  if not isinstance(value, dict):
    raise ZedaError(f'--template-options is {text}; expected a JSON object such as {{"enable_thinking": false}}.')
  return value


def _parser(command: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=f"zeda {command}",
    description=__doc__,
    usage=_USAGE,
    epilog=_EPILOG,
    formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100),
    allow_abbrev=False,
  )

  def add(name: str, help: str, metavar: str = "N", **options: Any) -> None:
    parser.add_argument(name, help=help, metavar=metavar, **options)

  parser.add_argument("model", nargs="?", metavar="DIR", help="Hugging Face directory, static or dynamic")
  add("--tasks", "names or groups, with commas (see --list)", "NAMES")
  add("--data", "directory with TASK.jsonl; default: the Hugging Face hub", "DIR")
  add("--source", "a file, hf:NAME:CONFIG:SPLIT or tfds:NAME/SPLIT", "TASK=PLACE", action="append", default=[])
  add("--output", "default: evaluations/NAME OF THE CHECKPOINT", "DIR")
  add("--limit", "only the first so many problems of each task", type=int)
  add("--samples", "of each problem: 4, or aime24=8,aime25=8; default: the paper's")
  add("--temperature", "default: 0.6; 0 is greedy", "X", type=float)
  add("--top-p", "default: %(default)s", "X", type=float, default=0.95)
  add("--top-k", "default: %(default)s", type=int, default=20)
  add("--max-new-tokens", "default: 38912, or what the model's context leaves", type=int)
  add("--zero-expert-bias", "added to the zero logits; =-inf: the teacher", "X", type=float, default=0.0)
  add("--seed", "of sampling", type=int, default=0)
  add("--template-options", 'of the chat template: {"enable_thinking": false}', "JSON", default="{}")
  add("--dtype", "of parameters and activations; default: the checkpoint's", "TYPE")
  add("--batch-size", "responses decoded together (default: %(default)s)", type=int, default=16)
  add("--cache-tokens", "tokens that the cache holds, of all responses together", type=int)
  add("--grade-workers", "responses graded at once; default: one per processor", type=int)
  add("--code-seconds", "CPU seconds of a program's run (default: %(default)s)", type=int, default=10)
  flag = parser.add_argument
  flag("--allow-weak-sandbox", action="store_true", help="run models' programs though nothing contains them")
  flag("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="paired test of two output directories")
  flag("--list", action="store_true", help="the tasks, and where their problems come from")
  return parser
