"""`zeda report`: one page on what an adapted model skips, where and at what price."""

import argparse
import pathlib
import shutil
from typing import Any

from zeda_jax.errors import ZedaError

_USAGE = """zeda report WORKDIR
       zeda report --teacher=DIR --student=DIR --prompts=FILE --out=DIR     (no teacher: no gap)"""
_EPILOG = """Numbers are measured once and kept in OUT/data; the same command again draws from them, or goes on.
Labelled prompts are graded at every point of the dial; others are compared by KL to the teacher."""


def run(command: str, args: list[str]) -> int:
  flags = _parser(command).parse_args(args)
  _check(flags)
  # Late: `--help` and a wrong option should not wait for JAX.
  import rich.console

  from zeda_jax.analysis.collect import Budget, collect
  from zeda_jax.analysis.subject import recipe_directory
  from zeda_jax.report import report as reports

  console = rich.console.Console()
  main = recipe_directory(flags.workdir) if flags.workdir else None
  out = flags.out or flags.workdir / "report"
  _check_out(out, flags.overwrite)
  subject = _subject(flags)
  if flags.bench:
    from zeda_jax.report.speed import read_bench

    read_bench(flags.bench)  # refused now rather than after the measurement
  if flags.overwrite:
    shutil.rmtree(out / "data", ignore_errors=True)
  budget = Budget(_biases(flags.biases), flags.num_tokens, flags.examples)
  collected = collect(subject, out / "data", budget, console)
  name = flags.name or _name(subject)
  report = reports.gather(collected, flags.workdir, main, flags.bench, name)
  files = reports.write(report, out)
  for line in (f"report: {files[0]}", f"figures: {out}/*.png and *.csv", f"numbers: {out / 'data'}"):
    console.print(line, highlight=False, soft_wrap=True)
  return 0


def _parser(command: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=f"zeda {command}",
    usage=_USAGE,
    description=__doc__,
    epilog=_EPILOG,
    formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=24, width=100),
  )
  add, path = parser.add_argument, pathlib.Path
  add("workdir", nargs="?", type=path, metavar="WORKDIR", help="of a finished zeda adapt or zeda demo")
  add("--student", type=path, metavar="DIR", help="dynamic checkpoint, in place of a workdir")
  add("--teacher", type=path, metavar="DIR", help="static checkpoint (default: the workdir's)")
  add("--prompts", type=path, metavar="FILE", help="JSONL or array_record (default: the held-out ones)")
  add("--out", type=path, metavar="DIR", help="directory of the report (default: WORKDIR/report)")
  add("--name", help="of the model, for the title")
  add("--bench", type=path, metavar="FILE", help="CSV of `zeda bench model --output=DIR`")
  add("--biases", metavar="LIST", help="of the dial, such as --biases=-inf,-1,0,1 (default: searched for)")
  add("--num-prompts", type=int, default=0, metavar="N", help="at most so many (default: all)")
  add("--num-tokens", type=int, default=2**18, metavar="N", help="measured one by one (default: 262144)")
  add("--examples", type=int, default=9, metavar="N", help="responses shown (default: 9)")
  # None: as the workdir's evaluation did, or the paper's protocol.
  add("--max-new-tokens", type=int, metavar="N", help="default: as the workdir's evaluation; else 2048")
  add("--temperature", type=float, metavar="T", help="likewise; else 0.6")
  add("--top-p", type=float, metavar="P", help="likewise; else 0.95")
  add("--top-k", type=int, metavar="K", help="likewise; else 20")
  add("--seed", type=int, metavar="S", help="likewise; else 0")
  add("--batch-size", type=int, metavar="B", help="likewise; else 64")
  add("--grader", help="exact or number; likewise; else exact")
  add("--dtype", help="of parameters and activations (default: as on disk)")
  add("--expert-devices", type=int, default=0, metavar="N", help="over which the experts are spread")
  add("--overwrite", action="store_true", help="measure again in a directory that has a report")
  return parser


def _check(flags: argparse.Namespace) -> None:
  if flags.workdir is None and not (flags.student and flags.prompts and flags.out):
    raise ZedaError(
      "give the workdir of a finished `zeda adapt` or `zeda demo`, or checkpoints with --student, --prompts and --out."
    )
  if flags.workdir is not None and flags.student:
    raise ZedaError("--student is given beside a workdir, which has its own: leave out one of them.")
  least = {"num_tokens": 1, "num_prompts": 0, "examples": 1, "max_new_tokens": 1, "batch_size": 1, "expert_devices": 0}
  least |= {"seed": 0, "temperature": 0, "top_k": 0}
  for name, minimum in least.items():
    value = getattr(flags, name)
    if value is not None and value < minimum:
      raise ZedaError(f"--{name.replace('_', '-')} is {value}; expected at least {minimum}.")
  if flags.top_p is not None and not 0 < flags.top_p <= 1:
    raise ZedaError(f"--top-p is {flags.top_p}; expected more than 0 and at most 1.")
  _biases(flags.biases)


def _biases(text: str | None) -> tuple[float, ...]:
  if text is None:
    return ()
  try:
    biases = tuple(float(part) for part in text.split(",") if part.strip())
  except ValueError:
    biases = ()
  if not biases or any(bias != bias or bias == float("inf") for bias in biases):
    raise ZedaError(f"--biases={text} is no list of numbers; expected e.g. --biases=-inf,-1,0,1.")
  return biases


def _check_out(out: pathlib.Path, overwrite: bool) -> None:
  if out.is_file():
    raise ZedaError(f"--out: {out} is a file; expected a directory that is new or holds a report.")
  if out.is_dir() and any(out.iterdir()) and not (out / "data" / "settings.json").is_file():
    raise ZedaError(f"--out: {out} is not empty and holds no report of this command: give a new directory.")


def _subject(flags: argparse.Namespace) -> Any:
  from zeda_jax.analysis.subject import from_checkpoints, from_workdir
  from zeda_jax.evaluate.graders import GRADERS

  if flags.grader is not None and flags.grader not in GRADERS:
    raise ZedaError(f"--grader is {flags.grader!r}; expected one of {', '.join(GRADERS)}.")
  names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "batch_size", "grader")
  common = {
    "num_prompts": flags.num_prompts,
    "expert_devices": flags.expert_devices,
    "changes": {name: getattr(flags, name) for name in names},
  }
  if flags.workdir is not None:
    return from_workdir(flags.workdir, teacher=flags.teacher, prompts=flags.prompts, **common)
  return from_checkpoints(flags.student, flags.teacher, flags.prompts, dtype=flags.dtype or "", **common)


def _name(subject: Any) -> str:
  """What the teacher's directory is called; the demo's is just "teacher"."""
  path = (subject.teacher_path or subject.student_path).resolve()
  return "the demo model" if path.name == "teacher" and path.parent.name == "demo" else path.name
