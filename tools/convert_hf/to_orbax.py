"""Turns a Hugging Face checkpoint into an Orbax directory.

python tools/convert_hf/to_orbax.py Qwen3-30B-A3B Qwen3-30B-A3B-orbax
"""

import argparse
import sys
from collections.abc import Sequence

from zeda_jax.checkpoint.directory import check_target
from zeda_jax.checkpoint.huggingface import load_hf
from zeda_jax.checkpoint.orbax import save_params
from zeda_jax.errors import ZedaError


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("source", help="static or dynamic Hugging Face directory")
  parser.add_argument("target", help="Orbax directory to make")
  parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as on disk)")
  parser.add_argument("--overwrite", action="store_true", help="replace a target that is not empty")
  args = parser.parse_args(argv)
  try:
    check_target(args.target, args.overwrite)
    save_params(args.target, load_hf(args.source, args.dtype), overwrite=args.overwrite)
  except ZedaError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
