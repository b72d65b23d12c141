"""Measuring a model: accuracy on gradable prompts, distance to the teacher, expert work left."""
