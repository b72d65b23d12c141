"""One report with everything there can be, for all tests of this folder."""

import json

import pytest

from tests.report import synthetic
from zeda_jax.report import report as reports

BENCH = "stage,length,zero_ratio,speedup,theory\nprefill,1024,0.48,1.21,1.39\ndecode,1024,0.5,1.3,1.44\n"


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
  """(directory, collected) of a report of a workdir."""
  folder = tmp_path_factory.mktemp("whole")
  workdir = synthetic.write_workdir(folder / "run")
  task = {
    "title": "GSM8K",
    "num_problems": 100,
    "num_samples": 1,
    "mean": 0.9,
    "standard_error": 0.03,
    "length": 120.0,
    "pass_at": {"1": 0.9},
    "zero_ratio": {"response": 0.5, "token": 0.51, "all": 0.52},
  }
  (workdir / "evaluate-student").mkdir()
  (workdir / "evaluate-student" / "results.json").write_text(json.dumps({"tasks": {"gsm8k": task}, "average": task}))
  (folder / "model.csv").write_text(BENCH)
  (folder / "report").mkdir()
  collected = synthetic.collected()
  report = reports.gather(collected, workdir, workdir, folder / "model.csv", "a <model>")
  reports.write(report, folder / "report")
  return folder / "report", collected
