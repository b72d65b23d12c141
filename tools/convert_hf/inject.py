"""Adds zero experts to a static Hugging Face checkpoint, streaming: only the routers change.

python tools/convert_hf/inject.py Qwen3-30B-A3B Qwen3-30B-A3B-zeda
"""

import argparse
import sys
from collections.abc import Sequence

from zeda_jax.checkpoint.transform import inject_directory
from zeda_jax.errors import ZedaError


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("source", help="static Hugging Face directory")
  parser.add_argument("target", help="dynamic directory to make")
  parser.add_argument("--num-zero-experts", type=int, help="default: half the experts")
  parser.add_argument("--seed", type=int, default=0, help="of the new router rows (default: 0)")
  parser.add_argument("--overwrite", action="store_true", help="replace a target that is not empty")
  args = parser.parse_args(argv)
  try:
    inject_directory(args.source, args.target, args.num_zero_experts, args.seed, args.overwrite)
  except ZedaError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
