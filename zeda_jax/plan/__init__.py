"""Before a pod is rented: whether a stage of the recipe fits its memory, and about how fast it can be.

The real step is compiled for the topology by the TPU compiler, on any machine (needs libtpu, not a TPU). Without it the
same numbers are estimated from shapes alone.
"""
