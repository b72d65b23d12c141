"""Settings every test shares. They must be made before jax is imported, and processes that tests start inherit them."""

import hashlib
import os
import pathlib
import platform

import pytest


def _processor() -> str:
  """Names the kind of processor: compiled programs may not be reused on another."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    features = next(line for line in lines if line.lower().startswith(("flags", "features")))
  except (OSError, StopIteration):
    features = platform.processor()
  return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
# Most of the suite's time is compilation; programs are kept between runs. JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
_cache = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax" / _processor()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture(scope="module", autouse=True)
def release_compiled_programs():
  """Programs live as long as JAX's caches, and thousands of them in one process exhaust its memory mappings."""
  yield
  import jax

  jax.clear_caches()
