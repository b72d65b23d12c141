"""`zeda inject`: a static Hugging Face directory in, its untrained dynamic twin out, tensor by tensor."""

import argparse


def run(command: str, args: list[str]) -> int:
  parser = argparse.ArgumentParser(prog=f"zeda {command}", description=__doc__)
  parser.add_argument("source", help="Hugging Face directory of the static model")
  parser.add_argument("target", help="directory to write")
  parser.add_argument("--num-zero-experts", type=int, help="N_Z; half the experts by default")
  parser.add_argument("--seed", type=int, default=0, help="of the new router rows")
  parser.add_argument("--overwrite", action="store_true", help="replace the target once the new one is complete")
  flags = parser.parse_args(args)
  from zeda_jax.checkpoint.transform import inject_directory  # late: `--help` should not wait for JAX

  inject_directory(flags.source, flags.target, flags.num_zero_experts, flags.seed, flags.overwrite)
  print(f"written: {flags.target}")
  return 0
