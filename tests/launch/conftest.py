import sys

import pytest

from tests.launch.machine import Machine

# The scripts are for hosts with Linux, and local.sh and --dry-run for any bash from 4.4 on, which macOS does not bring.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)
