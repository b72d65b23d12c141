"""Causal attention over grouped query heads: packed rows of any length."""

from zeda_jax.ops.attention.api import BACKENDS, SAVED, attention

__all__ = ["BACKENDS", "SAVED", "attention"]
