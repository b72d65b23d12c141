"""Benchmarks of the grouped matmul and of the MoE layer: what `zeda bench` and benchmarks/ run."""
