"""Grouped (ragged) matmul whose cost follows the rows that are there: typed functions over several backends."""

from zeda_jax.ops.grouped_matmul.api import BACKENDS, Backend, grouped_matmul, grouped_swiglu

__all__ = ["BACKENDS", "Backend", "grouped_matmul", "grouped_swiglu"]
