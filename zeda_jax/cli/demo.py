"""`zeda demo`: the embedded teacher, adapted, beside its baselines."""

import argparse


def run(command: str, args: list[str]) -> int:
  parser = argparse.ArgumentParser(prog=f"zeda {command}", description=__doc__)
  parser.add_argument("--workdir", default="demo-output", help="everything is written below it (default: %(default)s)")
  parser.add_argument("--seed", type=int, default=0)
  flags = parser.parse_args(args)
  from zeda_jax.demo.run import run_demo  # late: `--help` should not wait for JAX
  from zeda_jax.distill.trainer import StoppedEarly

  try:
    run_demo(flags.workdir, flags.seed)
  except StoppedEarly as stopped:
    print(f"zeda {command}: {stopped}")
  return 0
