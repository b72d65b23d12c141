"""Checkpoints on disk.

`huggingface` reads and writes models as Hugging Face directories, `transform` turns one directory into another
without loading the model, `names` is the table of tensor names behind both, `safetensors_io` the byte level.
"""
