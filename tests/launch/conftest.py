import signal
import sys

import pytest

from tests.launch.machine import Machine

# The scripts are for hosts with Linux, and local.sh and --dry-run for any bash from 4.4 on, which macOS does not bring.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def interruptible():
  """A shell gives what it starts in the background an ignored SIGINT, which scripts inherit and cannot trap."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)
