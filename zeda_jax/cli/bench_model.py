"""`zeda bench model`: prefill and decode of a whole model, static against dynamic, beside what FLOPs promise."""

import argparse

from zeda_jax.bench.model_options import STAGES, ModelOptions
from zeda_jax.cli.lists import listed
from zeda_jax.plan.models import MODELS

_EPILOG = f"""models with random weights: {", ".join(MODELS)}
on a GPU with 80 GB or more, all 48 layers in bfloat16, beside the paper's table: zeda bench model --output=results"""


def run(command: str, args: list[str]) -> int:
  flags = _parser(command).parse_args(args)
  options = ModelOptions(
    model=flags.model,
    layers=flags.layers,
    ratio=flags.ratio,
    lengths=None if flags.lengths is None else listed("lengths", flags.lengths, int),
    stages=listed("stages", flags.stages, str),
    slots=flags.slots,
    steps=flags.steps,
    dtype=flags.dtype,
    repeats=flags.repeats,
  )
  import rich.console  # late, as all that follows: `--help` and a wrong option should not wait for JAX

  from zeda_jax.bench import model_table
  from zeda_jax.bench.table import targets

  if flags.output:
    targets(flags.output, "model", flags.overwrite)
  from zeda_jax.bench.model import bench_model

  console = rich.console.Console()
  report = bench_model(options, lambda text: console.print(text, highlight=False))
  model_table.show(report, console)
  files = model_table.write(report, flags.output, "model", flags.overwrite) if flags.output else []
  for file in files:
    console.print(f"written: {file}", highlight=False, soft_wrap=True)
  return 0


def _parser(command: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=f"zeda {command} model",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=_EPILOG,
  )
  default = ModelOptions()
  parser.add_argument(
    "--model", default=default.model, help="a name, or a checkpoint's directory (default: %(default)s)"
  )
  parser.add_argument("--layers", type=int, help="so many of them (default: 1 on a CPU, else all)")
  parser.add_argument("--ratio", type=float, default=default.ratio, help="r_ZE to look for (default: %(default)s)")
  parser.add_argument("--lengths", help="tokens (default: 1024,2048,4096,8192 on a CPU, else 1024,2048,3072,...,8192)")
  parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
  parser.add_argument(
    "--slots", type=int, default=default.slots, help="sequences decoded together (default: %(default)s)"
  )
  parser.add_argument(
    "--steps", type=int, default=default.steps, help="decode steps to a sample (default: %(default)s)"
  )
  parser.add_argument("--dtype", help="float32 or bfloat16 (default: float32 on a CPU)")
  parser.add_argument("--repeats", type=int, help="rounds (default: 3 on a CPU, else 10)")
  parser.add_argument("--output", metavar="DIR", help="also write a CSV and a Markdown file there")
  parser.add_argument("--overwrite", action="store_true", help="replace files of an earlier run")
  return parser
