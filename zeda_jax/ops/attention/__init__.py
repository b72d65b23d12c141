"""Causal attention over grouped query heads: packed rows of any length, or a key/value cache."""

from zeda_jax.ops.attention.api import BACKENDS, SAVED, attention, cached_attention

__all__ = ["BACKENDS", "SAVED", "attention", "cached_attention"]
