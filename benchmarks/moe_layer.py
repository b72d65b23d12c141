"""Speed of the MoE layer: every backend beside the dense product and PyTorch's block. The same as `zeda bench layer`.

python benchmarks/moe_layer.py --help
"""

import sys

from zeda_jax.cli.main import main

if __name__ == "__main__":
  sys.exit(main(["bench", "layer", *sys.argv[1:]]))
