"""Speed of the grouped matmul: every backend beside the dense product and its peers. The same as `zeda bench kernel`.

python benchmarks/grouped_matmul.py --help
"""

import sys

from zeda_jax.cli.main import main

if __name__ == "__main__":
  sys.exit(main(["bench", "kernel", *sys.argv[1:]]))
