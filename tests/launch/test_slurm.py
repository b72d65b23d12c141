"""GPU clusters, against made-up tools of Slurm; the batch script itself runs here."""

import pathlib
import shutil

import pytest

from tests.launch.machine import ADAPT, LAUNCH, commands

OPTIONS = ["--name=half", "--nodes=2", "--gpus-per-node=4", "--poll=1"]
# $FAKE/states: what scontrol finds, one a line: a state and an exit code; the last stays.
SCONTROL = r"""
case "$1 $2" in
  "show job")
    read -r state code <"$FAKE/states"
    [[ $(wc -l <"$FAKE/states") == 1 ]] || sed -i 1d "$FAKE/states"
    [[ $state != gone ]] || exit 1
    echo "JobId=77 JobName=half JobState=$state Reason=None ExitCode=$code:0 DerivedExitCode=9:0" ;;
  "requeue 77") ;;
  *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""
# Starts the tasks as srun does, and returns the highest exit code.
SRUN = r"""
while [[ $1 == --* ]]; do shift; done
worst=0
for ((i = 0; i < 2; i++)); do
  code=0
  SLURM_PROCID=$i "$@" || code=$?
  ((code <= worst)) || worst=$code
done
exit "$worst"
"""


@pytest.fixture
def slurm(machine, tmp_path):
  """A clone of its own: the job's output is written below it."""
  clone = tmp_path / "clone"
  (clone / "configs").mkdir(parents=True)
  shutil.copytree(LAUNCH, clone / "launch", ignore=shutil.ignore_patterns("colab"))
  (clone / "configs" / "tiny.py").touch()
  machine.tool("squeue", '[[ ! -e $FAKE/queued ]] || cat "$FAKE/queued"')
  machine.tool("sbatch", 'echo "[0] step" >"$FAKE/clone/runs/half.log"; echo "77;cluster"')
  machine.tool("scontrol", SCONTROL)
  machine.tool("srun", SRUN)
  machine.clone = clone
  machine.program = machine.tool("zeda", 'echo "$SLURM_PROCID: $*"; exit "$(cat "$FAKE/code" 2>/dev/null || echo 0)"')
  return machine


def launch(slurm, *options, command=ADAPT):
  script = slurm.clone / "launch" / "slurm.sh"
  return slurm.run(str(script), *OPTIONS, f"--program={slurm.program}", *options, "--", *command)


def batch(slurm, **env):
  env = {"SLURM_JOB_ID": "77", "ZEDA_MAX_RESTARTS": "3", **env}
  return slurm.run("slurm.sbatch", str(slurm.program), *ADAPT, **env)


def test_dry_run(slurm):
  result = launch(slurm, "--dry-run", "--partition=gpu", "--account=my account")
  queued, directory, submit = commands(result.stdout)
  assert queued == ["squeue", "--noheader", "--me", "--name=half", "--format=%i"]
  assert directory == ["mkdir", "-p", f"{slurm.clone}/runs"]
  assert submit == [
    *("env", "ZEDA_MAX_RESTARTS=100", "sbatch", "--parsable", "--job-name=half"),
    *(f"--output={slurm.clone}/runs/half.log", f"--chdir={slurm.clone}", "--nodes=2", "--gpus-per-node=4"),
    *("--time=24:00:00", "--partition=gpu", "--account=my account"),
    *(f"{slurm.clone}/launch/slurm.sbatch", str(slurm.program), *ADAPT),
  ]
  assert "'--account=my account'" in result.stdout
  assert slurm.calls() == [] and not (slurm.clone / "runs").exists()


def test_from_queued_to_finished(slurm):
  slurm.file("states", "PENDING 0\nRUNNING 0\nREQUEUED 0\nPENDING 0\ngone 0\nRUNNING 0\nCOMPLETED 0\n")
  result = launch(slurm)
  assert result.returncode == 0, result.stderr
  assert "job 77 is queued" in result.stderr and "finished" in result.stderr
  (submit,) = slurm.calls("sbatch")
  assert submit[-len(ADAPT) :] == ADAPT and not slurm.calls("scancel")


def test_its_output_is_shown(slurm):
  (slurm.root / "bin" / "sleep").unlink()
  slurm.file("states", "RUNNING 0\nCOMPLETED 0\n")
  slurm.tool("sbatch", '(/bin/sleep 0.5; echo "0: step" >>"$FAKE/clone/runs/half.log") >/dev/null 2>&1 & echo 77')
  assert launch(slurm).stdout == "0: step\n"


@pytest.mark.parametrize(
  ("states", "code"), [("FAILED 7", 7), ("FAILED 75", 75), ("CANCELLED 0", 1), ("TIMEOUT 0", 1), ("gone 0", 1)]
)
def test_other_ends(slurm, states, code):
  slurm.file("states", f"RUNNING 0\n{states}\n")
  assert launch(slurm).returncode == code


def test_a_job_of_the_same_name_is_refused(slurm):
  slurm.file("queued", "41\n42\n")
  result = launch(slurm)
  assert result.returncode == 2 and "41, 42, named half, is queued or runs" in result.stderr
  assert not slurm.calls("sbatch")


@pytest.mark.parametrize(
  ("options", "complaint"),
  [
    (["--nodes=two"], "--nodes=two is no number"),
    (["--gpus-per-node=0"], "--gpus-per-node=0 is no number"),
    (["--time=soon"], "--time=soon is no time"),
    (["--program=/nosuch"], "--program=/nosuch does not exist"),
  ],
)
def test_bad_input_is_refused(slurm, options, complaint):
  result = launch(slurm, *options)
  assert (result.returncode, slurm.calls()) == (2, []) and complaint in result.stderr


def test_a_refused_job(slurm):
  slurm.tool("sbatch", 'echo "sbatch: error: invalid partition" >&2; exit 1')
  result = launch(slurm)
  assert result.returncode == 2 and "sbatch refuses the job" in result.stderr


def test_batch_script_starts_one_process_a_node(slurm):
  slurm.tool("zeda", 'echo "$SLURM_PROCID $ZEDA_EXIT_WHEN_STOPPED $*"')
  result = batch(slurm)
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines() == [f"{i} 75 {' '.join(ADAPT)}" for i in range(2)]
  (srun,) = slurm.calls("srun")
  assert {"--kill-on-bad-exit=0", "--wait=120", "--cpu-bind=none"} <= set(srun)


def test_batch_script_is_requeued_by_slurm_and_warned_before_the_limit():
  text = pathlib.Path(LAUNCH / "slurm.sbatch").read_text()
  directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
  assert {"--requeue", "--signal=TERM@120", "--open-mode=append", "--ntasks-per-node=1"} <= set(directives)


@pytest.mark.parametrize(
  ("code", "restarts", "requeued"), [("75", "0", True), ("75", "3", False), ("0", "0", False), ("1", "0", False)]
)
def test_stopped_and_saved_is_queued_again(slurm, code, restarts, requeued):
  slurm.file("code", code)
  result = batch(slurm, SLURM_RESTART_COUNT=restarts)
  assert result.returncode == int(code)
  assert bool(slurm.calls("requeue", "77")) == requeued
  assert ("queued again" in result.stdout) == requeued


def test_batch_script_alone_says_how_it_is_run(slurm):
  result = slurm.run("slurm.sbatch", "x")
  assert result.returncode != 0 and "run this by launch/slurm.sh" in result.stderr
