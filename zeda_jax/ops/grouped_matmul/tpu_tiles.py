"""How large the blocks of the TPU kernels are: a small model of vector memory (VMEM) and of the shapes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

MIB = 2**20
# v5e, v5p, v6e and tpu7x cores have 64 MiB of VMEM or more; the compiler's own temporaries need some of it. A chip with
# less (v4: 16 MiB) needs smaller tiles by hand.
VMEM_LIMIT = 56 * MIB
BLOCKS_BUDGET = 32 * MIB

LANES = 128
ROWS = (16, 512)  # least and most rows of a block: a packed bfloat16 tile; enough to hide a grid step behind its work
SUB_ROWS = 128  # rows multiplied at a time: the MXU's height, so the waste at a group's end stays below it


class Tiles(NamedTuple):
  """Block sizes. block_m is a multiple of sub_m; block_k and block_n are multiples of 128 or the whole axis.

  Attributes:
    block_m: rows fetched and written together.
    sub_m: rows multiplied together.
    block_k: of the contracted axis (of the result's rows in the weight product).
    block_n: columns.
  """

  block_m: int
  sub_m: int
  block_k: int
  block_n: int


def _row_tiles(size_m: int, num_groups: int) -> tuple[int, int]:
  """(block_m, sub_m): powers of two, unless all rows are fewer than one packed tile.

  Groups of few rows get small parts: their products are not worth a full MXU pass, and decoding waits for weights.
  """
  if size_m < ROWS[0]:
    return size_m, size_m
  block_m = min(ROWS[1], 2 ** (size_m.bit_length() - 1))
  per_group = pl.next_power_of_2(max(1, size_m // num_groups))
  return block_m, min(block_m, max(ROWS[0], min(SUB_ROWS, per_group)))


def _choices(size: int, *, halves: bool = False) -> list[int]:
  """Block sizes for an axis, largest first: all of it, then multiples of 128 that divide it, or any if none does.

  With `halves`, a long axis makes at least two blocks: the two cores of a v4 or v5p chip share the blocks of a parallel
  axis, and one block would leave one core idle.
  """
  multiples = range((size - 1) // LANES * LANES, 0, -LANES)
  blocks = [size, *([block for block in multiples if size % block == 0] or multiples)]
  return [block for block in blocks if not halves or size < 4 * LANES or 2 * block <= size]


def product_tiles(
  size_m: int,
  size_k: int,
  size_n: int,
  num_groups: int,
  dtype: jax.typing.DTypeLike,
  out_dtype: jax.typing.DTypeLike,
  num_rhs: int = 1,
) -> Tiles:
  """Tiles for [M, K] @ [G, K, N]: the widest columns with all of K, so that the rows are read as few times as possible
  and a group's matrix once; K is cut only where not even 256 columns fit."""
  block_m, sub_m = _row_tiles(size_m, num_groups)
  size, out_size = jnp.dtype(dtype).itemsize, jnp.dtype(out_dtype).itemsize

  def num_bytes(block_k: int, block_n: int) -> int:
    # Two of everything that moves, so that the next block arrives while this one is worked on; one fp32 total.
    moving = (block_m * block_k + num_rhs * block_k * block_n) * size + block_m * block_n * out_size
    return 2 * moving + num_rhs * block_m * block_n * 4

  # Fused halves are cut at multiples of block_n, so there it must divide N exactly.
  columns = [n for n in _choices(size_n, halves=True) if num_rhs == 1 or size_n % n == 0]
  for block_k in _choices(size_k):
    for block_n in columns:
      enough = block_n >= min(size_n, 2 * LANES) or block_k <= LANES
      if enough and num_bytes(block_k, block_n) <= BLOCKS_BUDGET:
        return Tiles(block_m, sub_m, block_k, block_n)
  return Tiles(block_m, sub_m, min(size_k, LANES), min(size_n, LANES))


def weight_product_tiles(
  size_m: int,
  size_k: int,
  size_n: int,
  num_groups: int,
  dtype: jax.typing.DTypeLike,
  out_dtype: jax.typing.DTypeLike,
) -> Tiles:
  """Tiles for [G, K, N] out of [M, K] and [M, N]: the largest result block, squarest among equals, since every further
  block reads the rows again."""
  block_m, sub_m = _row_tiles(size_m, num_groups)
  size, out_size = jnp.dtype(dtype).itemsize, jnp.dtype(out_dtype).itemsize

  def num_bytes(block_k: int, block_n: int) -> int:
    return 2 * block_m * (block_k + block_n) * size + block_k * block_n * (2 * out_size + 4)

  fitting = [
    (k, n) for k in _choices(size_k) for n in _choices(size_n, halves=True) if num_bytes(k, n) <= BLOCKS_BUDGET
  ]
  block_k, block_n = max(fitting, key=lambda kn: (kn[0] * kn[1], min(kn)))
  return Tiles(block_m, sub_m, block_k, block_n)
