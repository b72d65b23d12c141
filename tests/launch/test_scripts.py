"""What all launch scripts have in common."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.launch.machine import ADAPT, LAUNCH

SCRIPTS = {
  "local.sh": ["--program=/bin/true"],
  "tpu_queued_resources.sh": [
    "--name=half",
    "--project=my-project",
    "--zone=us-east5-a",
    "--topology=v5p:4x4x4",
    "--storage=gs://bucket",
  ],
  "gke.sh": ["--name=half", "--image=eu/zeda:1", "--topology=v5p:4x4x4", "--storage=10.0.0.2:/share"],
  "slurm.sh": ["--name=half", "--nodes=2", "--gpus-per-node=8", "--program=/bin/true"],
}


def test_shellcheck_is_clean():
  found = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
  assert found, "shellcheck is missing: pip install -e '.[dev]'"
  scripts = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
  assert {"lib.sh", "on_worker.sh", *SCRIPTS} <= {script.name for script in scripts}
  result = subprocess.run([found, "--external-sources", *scripts], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_a_screen_and_names_every_option(script, machine):
  result = machine.run(script, "--help")
  assert (result.returncode, result.stderr) == (0, "")
  assert max(map(len, result.stdout.splitlines())) <= 120 and len(result.stdout.splitlines()) <= 40
  text = (LAUNCH / script).read_text()
  options = text.split("parse_options ")[1].split("$@")[0].replace("\\\n", " ").replace('"', " ").split()
  assert len(options) > 3
  for option in [*options, "dry-run"]:
    assert f"--{option}" in result.stdout
  assert "Exit codes: 0 " in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_runs_nothing(script, machine):
  for tool in ("gcloud", "kubectl", "sbatch", "squeue", "scontrol", "git", "tar"):
    machine.tool(tool, "exit 1")
  result = machine.run(script, "--dry-run", *SCRIPTS[script], "--", *ADAPT)
  assert (result.returncode, result.stderr) == (0, "")
  assert machine.calls() == []
  assert not list(machine.home.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
  ("options", "command", "complaint"),
  [
    (["--nmae=x"], ADAPT, "--nmae is no option"),
    (["surplus"], ADAPT, "'surplus' is no option"),
  ],
)
def test_bad_options_are_refused(script, options, command, complaint, machine):
  result = machine.run(script, *SCRIPTS[script], *options, "--", *command)
  assert result.returncode == 2 and complaint in result.stderr and result.stdout == ""


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "local.sh"])
@pytest.mark.parametrize(
  ("options", "command", "complaint"),
  [
    ([], [], "nothing to run"),
    ([], ["demo"], "'demo' is no command to launch"),
    ([], ["adapt"], "--config is missing"),
    ([], ["adapt", "--config"], "--config needs a value"),
    ([], ["adapt", "--config=configs/nosuch.py"], "configs/nosuch.py does not exist"),
    ([], ["adapt", "--config", "configs/nosuch.py:a"], "configs/nosuch.py does not exist"),
    ([], ["adapt", "--config=/etc/passwd"], "outside the clone"),
    ([], ["adapt", "--config=configs/tiny.py", "--config.workdir=gs://b/run"], "not buckets"),
    ([], ["adapt", "--config=configs/tiny.py", "--config.teacher", "teacher"], "absolute path"),
    (["--name=Half"], ADAPT, "--name=Half is no name"),
    (["--name=" + 41 * "x"], ADAPT, "at most 40"),
    (["--name"], ADAPT, "--name needs a value"),
    (["--poll=soon"], ADAPT, "--poll=soon is no number"),
    (["--max-restarts=0"], ADAPT, "is no number above 0"),
  ],
)
def test_bad_input_is_refused(script, options, command, complaint, machine):
  for tool in ("gcloud", "kubectl", "sbatch", "squeue"):
    machine.tool(tool, "exit 1")
  result = machine.run(script, *SCRIPTS[script], *options, "--", *command)
  assert (result.returncode, result.stdout) == (2, "")
  assert complaint in result.stderr and len(result.stderr.splitlines()) == 1
  assert machine.calls() == []


@pytest.mark.parametrize("script", ["tpu_queued_resources.sh", "gke.sh"])
@pytest.mark.parametrize(
  ("options", "complaint"),
  [
    (["--topology=v5p"], "is no topology"),
    (["--topology=v5p:4x4x"], "is no topology"),
    (["--topology=v9:4x4"], "'v9' is no kind of TPU"),
    (["--topology=v5e:3x3"], "v5e has 1x1"),
    (["--topology=v5p:8x4x4"], "A <= B <= C"),
    (["--topology=v5p:4x4"], "v5p has 2x2x1"),
    (["--storage=bucket"], "neither a bucket"),
    (["--storage=gs://bucket/path"], "neither a bucket"),
    (["--storage=10.0.0.2:share"], "neither a bucket"),
  ],
)
def test_bad_topologies_and_storage_are_refused(script, options, complaint, machine):
  result = machine.run(script, *SCRIPTS[script], *options, "--dry-run", "--", *ADAPT)
  assert (result.returncode, result.stdout) == (2, "") and complaint in result.stderr


@pytest.mark.parametrize("script", ["tpu_queued_resources.sh", "gke.sh"])
def test_paths_are_below_the_mounted_storage(script, machine):
  result = machine.run(script, *SCRIPTS[script], "--dry-run", "--", *ADAPT[:2], "--config.workdir=/home/jane/run")
  assert (result.returncode, result.stdout) == (2, "") and "Put it below /mnt/zeda" in result.stderr


@pytest.mark.parametrize(
  ("script", "tool"), [("tpu_queued_resources.sh", "gcloud"), ("gke.sh", "kubectl"), ("slurm.sh", "sbatch")]
)
def test_missing_tools_are_named(script, tool, machine):
  # PATH has the basics alone, not what this machine may have installed beside them.
  for basic in ("bash", "env", "basename", "dirname", "id", "cat", "git", "seq", "head"):
    (machine.root / "bin" / basic).symlink_to(shutil.which(basic))
  result = machine.run(script, *SCRIPTS[script], "--", *ADAPT, PATH=str(machine.root / "bin"))
  assert result.returncode == 2 and f"{tool} is not installed" in result.stderr
