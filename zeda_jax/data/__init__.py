"""Prompts and rollouts: reading, tokenizing, packing and the grain pipelines over them."""
