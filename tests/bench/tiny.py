"""The smallest benchmark there is: 20 tokens through 8 experts of the demo model, each column timed once."""

import contextlib
from unittest import mock

from zeda_jax.bench.run import bench
from zeda_jax.bench.shapes import Options

SCALE = 0.005


@contextlib.contextmanager
def hasty():
  """Neither pauses nor rounds beyond those asked for."""
  with mock.patch("zeda_jax.bench.timing._PAUSE_SECONDS", 0), mock.patch("zeda_jax.bench.timing._ROUNDS_SECONDS", 0):
    yield


def tiny_bench(kind, **options):
  defaults = {"shapes": ("demo",), "ratios": (0.0, 0.5), "scale": SCALE, "repeats": 2, "max_seconds": 100.0}
  with hasty():
    return bench(kind, Options(**(defaults | options)))
