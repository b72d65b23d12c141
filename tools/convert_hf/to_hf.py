"""Turns an Orbax directory into a Hugging Face checkpoint, or a dynamic checkpoint into one any engine loads.

python tools/convert_hf/to_hf.py Qwen3-30B-A3B-orbax Qwen3-30B-A3B-zeda
python tools/convert_hf/to_hf.py Qwen3-30B-A3B-zeda Qwen3-30B-A3B-plain --format plain
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from zeda_jax.checkpoint.directory import check_target
from zeda_jax.checkpoint.huggingface import save_hf
from zeda_jax.checkpoint.orbax import load_params
from zeda_jax.checkpoint.transform import to_plain_directory
from zeda_jax.errors import ZedaError


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("source", help="Orbax directory made by to_orbax.py, or a dynamic Hugging Face directory")
  parser.add_argument("target", help="Hugging Face directory to make")
  parser.add_argument(
    "--format",
    choices=("dynamic", "plain"),
    default="dynamic",
    help="plain: a static checkpoint whose zero experts are stored as all-zero experts (default: dynamic)",
  )
  parser.add_argument("--overwrite", action="store_true", help="replace a target that is not empty")
  args = parser.parse_args(argv)
  try:
    if args.format == "plain" and not (pathlib.Path(args.source) / "params").is_dir():
      to_plain_directory(args.source, args.target, args.overwrite)
    else:
      check_target(args.target, args.overwrite)
      save_hf(load_params(args.source), args.target, args.format, args.overwrite)
  except ZedaError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
