"""The embedded demo: a tiny real post-trained teacher and three exactly gradable task families."""

import pathlib

from zeda_jax.demo.families import FAMILIES, generate_tasks, grade, mixed_tasks

__all__ = ["FAMILIES", "TEACHER", "generate_tasks", "grade", "mixed_tasks"]

# The shipped teacher: a Hugging Face directory, made by `python -m zeda_jax.demo.train_teacher`.
TEACHER = pathlib.Path(__file__).parent / "teacher"
