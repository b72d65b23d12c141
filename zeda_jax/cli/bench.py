"""`zeda bench`: speed of the grouped matmul, the MoE layer and a whole model on this machine."""

import argparse

from zeda_jax.bench.shapes import SHAPES, Options
from zeda_jax.cli import bench_model
from zeda_jax.cli.lists import listed
from zeda_jax.errors import ZedaError

_KINDS = ("kernel", "layer")
_EPILOG = """shapes: {shapes}
models: `zeda bench model --help` has the flags of whole models
threads: those the process may use; fewer with e.g. `taskset -c 0,1 zeda bench kernel`"""


def run(command: str, args: list[str]) -> int:
  if args[:1] == ["model"]:
    return bench_model.run(command, args[1:])
  flags = _parser(command).parse_args(args)
  if flags.what not in _KINDS:
    raise ZedaError(f"{flags.what!r} is nothing to measure; expected kernel, layer or model.")
  options = Options(
    shapes=tuple(SHAPES) if flags.shapes is None else listed("shapes", flags.shapes, str),
    ratios=Options.ratios if flags.ratios is None else listed("ratios", flags.ratios, float),
    columns=None if flags.backends is None else listed("backends", flags.backends, str),
    dtype=flags.dtype,
    scale=flags.scale,
    repeats=flags.repeats,
    backward=flags.backward,
    max_seconds=flags.max_seconds,
  )
  given = [f for f in ("shapes", "ratios", "backends", "dtype") if getattr(flags, f) is not None]
  if flags.check and given:
    raise ZedaError(f"--check has its own sizes and columns: leave out {', '.join('--' + name for name in given)}.")
  import rich.console  # late, as all that follows: `--help` and a wrong option should not wait for JAX

  from zeda_jax.bench import table

  console = rich.console.Console()
  name = f"{flags.what}-check" if flags.check else flags.what
  if flags.output:
    table.targets(flags.output, name, flags.overwrite)
  say = lambda text: console.print(text, highlight=False)
  if flags.check:
    from zeda_jax.bench.check import check

    report = check(flags.what, flags.repeats, flags.scale, say)
  else:
    from zeda_jax.bench.run import bench

    report = bench(flags.what, options, say)
  table.show(report, console)
  files = table.write(report, flags.output, name, flags.overwrite) if flags.output else []
  for file in files:
    console.print(f"written: {file}", highlight=False, soft_wrap=True)
  return 0


def _parser(command: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=f"zeda {command}",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=_EPILOG.format(shapes="\n  ".join(["", *SHAPES])),
  )
  parser.add_argument("what", metavar="kernel|layer|model", help="the grouped matmul, the MoE layer, or all layers")
  parser.add_argument("--shapes", help="comma-separated, all by default")
  parser.add_argument("--ratios", help="zero ratios (default: 0,0.25,0.5,0.75)")
  parser.add_argument("--backends", help="columns beside dense: backends and peers (default: all that run here)")
  parser.add_argument("--dtype", help="float32 or bfloat16 (default: float32 on a CPU)")
  parser.add_argument("--scale", type=float, help="factor on the tokens (default: 0.0625 on a CPU, else 1)")
  parser.add_argument("--repeats", type=int, help="rounds (default: 3 on a CPU, else 10)")
  parser.add_argument("--backward", action="store_true", help="forward + backward, too")
  parser.add_argument(
    "--max-seconds", type=float, default=Options.max_seconds, help="skip what takes longer (default: %(default)s)"
  )
  parser.add_argument("--check", action="store_true", help="the CPU goals of this package, beside what is measured")
  parser.add_argument("--output", metavar="DIR", help="also write a CSV and a Markdown file there")
  parser.add_argument("--overwrite", action="store_true", help="replace files of an earlier run")
  return parser
