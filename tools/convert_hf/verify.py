"""Compares the logits of two Hugging Face directories on random tokens; exits 1 where they differ too much.

python tools/convert_hf/verify.py Qwen3-30B-A3B Qwen3-30B-A3B-zeda --zero-expert-bias=-inf --tolerance 0
"""

import argparse
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from zeda_jax.checkpoint.huggingface import load_hf
from zeda_jax.checkpoint.names import check_tensors
from zeda_jax.checkpoint.safetensors_io import open_weights
from zeda_jax.config import ModelConfig, read_config
from zeda_jax.errors import ZedaError


def check_pair(first: str, second: str, num_tokens: int) -> ModelConfig:
  """Raises ZedaError if the two cannot be compared; returns the first one's config."""
  configs = []
  for path in (first, second):
    configs.append(read_config(path))
    check_tensors(open_weights(path), configs[-1], path)
  one, two = configs
  if one.vocab_size != two.vocab_size:
    raise ZedaError(
      f"{first} has {one.vocab_size} tokens and {second} has {two.vocab_size}: their logits do not compare."
    )
  longest = min(config.max_position_embeddings for config in configs)
  if not 1 <= num_tokens <= longest:
    raise ZedaError(f"--tokens is {num_tokens}; expected 1 to {longest}, the context of the models.")
  return one


def logits_of(path: str, tokens: np.ndarray, dtype: str | None, zero_expert_bias: float) -> np.ndarray:
  return np.asarray(load_hf(path, dtype)(jnp.asarray(tokens), zero_expert_bias=zero_expert_bias).logits)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("first")
  parser.add_argument("second")
  parser.add_argument("--tokens", type=int, default=64, help="length of the random sequence (default: 64)")
  parser.add_argument("--seed", type=int, default=0, help="of the tokens (default: 0)")
  parser.add_argument("--dtype", help="cast both to float32, bfloat16 or float16 (default: as on disk)")
  parser.add_argument("--zero-expert-bias", type=float, default=0.0, help="-inf masks all zero experts (default: 0)")
  parser.add_argument("--tolerance", type=float, default=2e-4, help="largest difference allowed (default: 2e-4)")
  args = parser.parse_args(argv)
  try:
    config = check_pair(args.first, args.second, args.tokens)
    tokens = np.random.default_rng(args.seed).integers(0, config.vocab_size, (1, args.tokens), np.int32)
    one = logits_of(args.first, tokens, args.dtype, args.zero_expert_bias)
    two = logits_of(args.second, tokens, args.dtype, args.zero_expert_bias)
  except ZedaError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  difference = float(np.max(np.abs(one - two)))
  agreement = float(np.mean(one.argmax(-1) == two.argmax(-1)))
  print(f"max abs difference {difference:.3e}, argmax agreement {agreement:.2%} over {args.tokens} tokens")
  return 0 if difference <= args.tolerance else 1  # not a number is too much, too


if __name__ == "__main__":
  sys.exit(main())
