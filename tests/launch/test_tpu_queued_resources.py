"""TPU pods by queued resources, against a made-up gcloud that keeps the state of one project."""

import os
import pathlib
import signal
import subprocess
import tarfile
import time

import pytest

from tests.launch.machine import ADAPT, LAUNCH, commands

OPTIONS = ["--name=half", "--project=my-project", "--zone=us-east5-a", "--topology=v5p:4x4x4", "--poll=1"]
THERE = ["--project=my-project", "--zone=us-east5-a"]
# $FAKE/resource: "STATE,OWNER" of `half`. $FAKE/runs: what each run of zeda comes to, one a line: an exit code, or
# `preempt` (the TPU goes away under it), or `preempt-node` (the state of the node says so first).
GCLOUD = r"""
resource=$FAKE/resource
state() { [[ ! -e $resource ]] || cut -d, -f1 "$resource"; }
become() { printf '%s,%s\n' "$1" "$(cut -d, -f2 "$resource")" >"$resource"; }
case "$*" in
  "storage buckets describe gs://missing "*) echo "ERROR: not found: 404" >&2; exit 1 ;;
  "storage buckets describe "*) echo bucket ;;
  *"queued-resources create half "*)
    [[ ! -e $resource ]] || { echo "ALREADY_EXISTS" >&2; exit 1; }
    for word; do [[ $word != --labels=zeda_launch=* ]] || owner=${word##*=}; done
    echo "WAITING_FOR_RESOURCES,$owner" >"$resource" ;;
  *"queued-resources list "*)
    echo "other,ACTIVE,bob"
    [[ ! -e $resource ]] || echo "half,$(cat "$resource")"
    case $(state) in # what the next question will find
      WAITING_FOR_RESOURCES) become "$(cat "$FAKE/after-waiting" 2>/dev/null || echo PROVISIONING)" ;;
      PROVISIONING) become ACTIVE ;;
      SUSPENDING) become SUSPENDED ;;
    esac ;;
  *"queued-resources delete half "*)
    [[ -e $resource ]] || { echo "NOT_FOUND" >&2; exit 1; }
    rm "$resource" "$FAKE/node" 2>/dev/null ;;
  *"tpu-vm describe half "*) cat "$FAKE/node" 2>/dev/null || echo READY ;;
  *"tpu-vm scp "*" half:"*) cp "$4" "$5" 2>/dev/null || cp "$5" "$FAKE/archive" ;;
  *"tpu-vm ssh half "*" run half "*)
    [[ $(state) == ACTIVE ]] || { echo "ssh: no route to host" >&2; exit 255; }
    result=$(head -n 1 "$FAKE/runs")
    sed -i 1d "$FAKE/runs"
    echo "[0] step"
    case $result in
      preempt) become SUSPENDING; exit 255 ;;
      preempt-node) echo PREEMPTED >"$FAKE/node"; exit 255 ;;
      hang) exec /bin/sleep 60 ;;
      *) exit "$result" ;;
    esac ;;
  *"tpu-vm ssh half "*) [[ ! -e $FAKE/setup-fails ]] || exit 1 ;;
  *) echo "unexpected: $*" >&2; exit 99 ;;
esac
exit 0
"""


@pytest.fixture
def cloud(machine):
  machine.tool("gcloud", GCLOUD)
  return machine


def launch(cloud, *options, command=ADAPT, **more):
  return cloud.run("tpu_queued_resources.sh", *OPTIONS, *options, "--", *command, **more)


def verbs(cloud):
  """What was done, in order: create, scp, setup, run, delete."""
  done = []
  for call in cloud.calls():
    for verb in ("create", "delete", "scp"):
      done += [verb] if verb in call else []
    if "ssh" in call:
      done.append("run" if " run half " in call[-1] else "setup")
  return done


def test_dry_run_is_the_whole_way(cloud):
  options = ["--dry-run", "--spot", "--storage=gs://bucket"]
  bucket, create, watch, pack, copy, setup, run, delete = commands(launch(cloud, *options).stdout)
  assert bucket[:5] == ["gcloud", "storage", "buckets", "describe", "gs://bucket"]
  assert create == [
    *("gcloud", "compute", "tpus", "queued-resources", "create", "half", "--node-id=half", *THERE),
    *("--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--labels=zeda_launch=jane-doe"),
    *("--spot", "--quiet"),
  ]
  assert watch[:-1] == ["gcloud", "compute", "tpus", "queued-resources", "list", *THERE]
  assert pack[:2] == ["git", "-C"] and pack[-1] == "zeda-jax.tgz"
  copied = ["zeda-jax.tgz", "half:zeda-jax.tgz", *THERE, "--worker=all", "--quiet"]
  assert copy == ["gcloud", "compute", "tpus", "tpu-vm", "scp", *copied]
  everywhere = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "half", *THERE, "--worker=all", "--quiet"]
  assert setup[:-1] == run[:-1] == everywhere
  assert "on_worker.sh setup 'gs://bucket'" in setup[-1]
  assert run[-1] == (
    "--command=bash zeda-jax/launch/on_worker.sh run half adapt --config=configs/tiny.py "
    "--config.teacher=/mnt/zeda/teacher '--config.workdir=/mnt/zeda/a run'"
  )
  assert delete == ["gcloud", "compute", "tpus", "queued-resources", "delete", "half", *THERE, "--force", "--quiet"]
  assert cloud.calls() == []


def test_from_nothing_to_finished(cloud):
  cloud.file("runs", "0\n")
  result = launch(cloud)
  assert result.returncode == 0, result.stderr
  assert "[0] step" in result.stdout and "finished" in result.stderr
  assert verbs(cloud) == ["create", "scp", "setup", "run", "delete"]
  assert cloud.file("resource") == ""


def test_the_clone_is_what_the_workers_get(cloud):
  cloud.file("runs", "0\n")
  assert launch(cloud).returncode == 0
  with tarfile.open(cloud.root / "archive") as archive:
    names = archive.getnames()
  assert {"configs/tiny.py", "zeda_jax/cli/main.py", "pyproject.toml", "launch/on_worker.sh"} <= set(names)
  assert not [name for name in names if name.startswith((".git/", ".venv/")) or "__pycache__" in name]


@pytest.mark.parametrize("how", ["preempt", "preempt-node"])
def test_preempted_it_is_requested_again_and_goes_on(cloud, how):
  cloud.file("runs", f"{how}\n75\n0\n")
  result = launch(cloud, "--spot")
  assert result.returncode == 0, result.stderr
  once = ["create", "scp", "setup", "run"]
  # The second time zeda saved and stopped, and the TPU is still there: the same command again.
  assert verbs(cloud) == [*once, "delete", *once, "scp", "setup", "run", "delete"]
  runs = [call[-1] for call in cloud.calls("ssh") if " run half " in call[-1]]
  assert len(set(runs)) == 1
  assert "was preempted" in result.stderr


def test_preempted_while_waiting(cloud):
  cloud.file("runs", "0\n")
  cloud.file("resource", "SUSPENDED,jane-doe\n")
  assert launch(cloud).returncode == 0
  assert verbs(cloud) == ["delete", "create", "scp", "setup", "run", "delete"]


def test_it_gives_up_after_too_many_preemptions(cloud):
  cloud.file("runs", "preempt\n" * 5)
  result = launch(cloud, "--max-restarts=2")
  assert result.returncode == 75 and "restarted 2 times" in result.stderr
  assert verbs(cloud).count("create") == 3


def test_workers_that_die_again_and_again_are_not_started_for_ever(cloud):
  cloud.file("runs", "75\n" * 9)
  result = launch(cloud)
  assert result.returncode == 75 and "five times in a row" in result.stderr
  assert verbs(cloud).count("run") == 5 and "delete" not in verbs(cloud)


@pytest.mark.parametrize("code", [1, 2, 99])
def test_a_failure_keeps_the_tpu_and_says_how_to_delete_it(cloud, code):
  cloud.file("runs", f"{code}\n")
  result = launch(cloud)
  assert result.returncode == code
  assert verbs(cloud) == ["create", "scp", "setup", "run"]
  assert f"queued-resources delete half {' '.join(THERE)} --force" in result.stderr
  assert cloud.file("resource") == "ACTIVE,jane-doe\n"


def test_a_failed_setup_keeps_the_tpu(cloud):
  cloud.file("setup-fails", "")
  assert launch(cloud).returncode == 1
  assert verbs(cloud) == ["create", "scp", "setup"]


def test_a_request_that_cannot_be_met_is_not_repeated(cloud):
  cloud.file("after-waiting", "FAILED")
  result = launch(cloud)
  assert result.returncode == 1 and "the request failed" in result.stderr
  assert verbs(cloud) == ["create"]


def test_keep(cloud):
  cloud.file("runs", "0\n")
  result = launch(cloud, "--keep")
  assert result.returncode == 0 and "is kept, and costs" in result.stderr
  assert "delete" not in verbs(cloud)


def test_its_own_resource_is_taken_up_again(cloud):
  cloud.file("runs", "0\n")
  cloud.file("resource", "ACTIVE,jane-doe\n")
  assert launch(cloud).returncode == 0
  assert verbs(cloud) == ["scp", "setup", "run", "delete"]


@pytest.mark.parametrize("state", ["ACTIVE", "SUSPENDED", "FAILED", "WAITING_FOR_RESOURCES"])
@pytest.mark.parametrize("owner", ["", "bob", "jane"])
def test_what_others_made_is_never_touched(cloud, state, owner):
  cloud.file("resource", f"{state},{owner}\n")
  result = launch(cloud)
  assert result.returncode == 2 and "half exists and is not yours" in result.stderr
  assert verbs(cloud) == [] and cloud.file("resource") != ""


def test_a_foreign_resource_that_took_the_name_meanwhile_is_not_deleted(cloud):
  """Ours is gone and somebody else's is there under the name when the run has ended."""
  cloud.tool("gcloud", GCLOUD.replace('*) exit "$result" ;;', '*) echo ACTIVE,bob >"$resource"; exit "$result" ;;'))
  cloud.file("runs", "0\n")
  result = launch(cloud)
  assert result.returncode == 2 and "is not yours" in result.stderr
  assert "delete" not in verbs(cloud)


def test_a_missing_bucket_is_found_before_anything_is_created(cloud):
  result = launch(cloud, "--storage=gs://missing")
  assert result.returncode == 2 and "404" in result.stderr and "--storage=gs://missing cannot be read" in result.stderr
  assert verbs(cloud) == []


@pytest.mark.parametrize(
  ("options", "complaint"),
  [
    (["--project=P"], "--project=P is no project id"),
    (["--zone=us-east5"], "is no zone"),
    (["--accelerator-type=v5p-128"], "give one of them"),
    (["--topology=tpu7x:2x2x1"], "use launch/gke.sh"),
    (["--topology=v5p:4x4x16"], "queued resources make 4x8x8"),
  ],
)
def test_bad_input_is_refused(cloud, options, complaint):
  result = launch(cloud, *options)
  assert (result.returncode, cloud.calls()) == (2, []) and complaint in result.stderr


@pytest.mark.parametrize(
  ("topology", "accelerator", "runtime"),
  [
    ("v4:2x2x4", "v4-32", "tpu-ubuntu2204-base"),
    ("v5e:16x16", "v5litepod-256", "v2-alpha-tpuv5-lite"),
    ("v5p:2x2x1", "v5p-8", "v2-alpha-tpuv5"),
    ("v5p:4x8x8", "v5p-512", "v2-alpha-tpuv5"),
    ("v6e:8x8", "v6e-64", "v2-alpha-tpuv6e"),
  ],
)
def test_topologies_by_the_names_of_cloud_tpu(cloud, topology, accelerator, runtime):
  create = commands(launch(cloud, f"--topology={topology}", "--dry-run").stdout)[0]
  assert {f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"} <= set(create)


def test_an_interrupted_launch_leaves_the_run_alone(cloud):
  cloud.file("runs", "hang\n")
  command = [LAUNCH / "tpu_queued_resources.sh", *OPTIONS, "--", *ADAPT]
  launcher = subprocess.Popen(
    command, env=cloud.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
  )
  assert launcher.stdout.readline() == "[0] step\n"
  # As a terminal does: to the launcher and the gcloud that it waits for.
  os.killpg(launcher.pid, signal.SIGINT)
  _, err = launcher.communicate(timeout=20)
  assert launcher.returncode == 130 and "the same command attaches again" in err
  assert cloud.file("resource") == "ACTIVE,jane-doe\n"


def test_stop_asks_the_workers_and_nothing_else(cloud):
  result = cloud.run("tpu_queued_resources.sh", *OPTIONS[:3], "--stop")
  assert result.returncode == 0, result.stderr
  stop = "--command=bash zeda-jax/launch/on_worker.sh stop half"
  everywhere = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "half", *THERE, "--worker=all", "--quiet"]
  assert cloud.calls() == [[*everywhere, stop]]


def test_stopped_on_purpose_it_is_not_started_again(cloud):
  cloud.file("runs", "76\n0\n")
  result = launch(cloud)
  assert result.returncode == 75 and "stopped by --stop, and saved; half is kept" in result.stderr
  assert verbs(cloud) == ["create", "scp", "setup", "run"]


# What happens on a worker: the same script, run here.

ZEDA = """
trap 'echo saved; exit "$ZEDA_EXIT_WHEN_STOPPED"' TERM
echo "zeda $*"
[[ $1 != once ]] || exit "$2"
while true; do sleep 0.02; done
"""


@pytest.fixture
def worker(machine):
  (machine.root / "bin" / "sleep").unlink()
  machine.env.update(ZEDA=str(machine.tool("zeda", ZEDA)), ZEDA_POLL="0.2", HOSTNAME="t1v-n-0123-w-3")
  return machine


def log_of(worker):
  file = worker.home / ".zeda-runs" / "half" / "log"
  return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("code", [0, 1, 75])
def test_on_a_worker_the_exit_code_of_zeda_is_returned(worker, code):
  result = worker.run("on_worker.sh", "run", "half", "once", str(code), "two words")
  assert (result.returncode, result.stdout) == (code, f"[3] zeda once {code} two words\n"), result.stderr


def test_on_a_worker_a_second_run_attaches_and_stop_saves(worker):
  script = LAUNCH / "on_worker.sh"
  first = subprocess.Popen(
    [script, "run", "half", "adapt"], env=worker.env, stdout=subprocess.PIPE, text=True, start_new_session=True
  )
  assert first.stdout.readline() == "[3] zeda adapt\n"
  assert worker.run("on_worker.sh", "running", "half").returncode == 0
  os.killpg(first.pid, signal.SIGKILL)  # the connection breaks, and takes all of it along
  first.wait(timeout=20)
  second = subprocess.Popen([script, "run", "half", "adapt"], env=worker.env, stdout=subprocess.PIPE, text=True)
  assert second.stdout.readline() == "[3] attached to the run that goes on\n"
  assert worker.run("on_worker.sh", "stop", "half").returncode == 0
  out, _ = second.communicate(timeout=20)
  assert (second.returncode, out) == (76, "[3] zeda adapt\n[3] saved\n")
  assert log_of(worker) == "zeda adapt\nsaved\n"
  assert worker.run("on_worker.sh", "running", "half").returncode == 1


def test_on_a_worker_a_preemption_is_not_a_stop(worker):
  first = subprocess.Popen(
    [LAUNCH / "on_worker.sh", "run", "half", "adapt"], env=worker.env, stdout=subprocess.PIPE, text=True
  )
  assert first.stdout.readline() == "[3] zeda adapt\n"
  os.kill(int((worker.home / ".zeda-runs" / "half" / "pid").read_text()), signal.SIGTERM)
  assert first.communicate(timeout=20)[0] == "[3] saved\n" and first.returncode == 75


def test_on_a_worker_stop_without_a_run_kills_nothing(worker):
  sleeping = subprocess.Popen(["/bin/sleep", "60"])
  directory = pathlib.Path(worker.home, ".zeda-runs", "half")
  directory.mkdir(parents=True)
  (directory / "lock").touch()
  (directory / "pid").write_text(f"{sleeping.pid}\n")  # left behind by a run before the machine's last start
  result = worker.run("on_worker.sh", "stop", "half")
  time.sleep(0.1)
  assert "no run half goes on here" in result.stderr and sleeping.poll() is None
  sleeping.send_signal(signal.SIGKILL)
  sleeping.wait()


@pytest.mark.parametrize(("storage", "mount"), [("gs://bucket", "gcsfuse"), ("10.0.0.2:/share", "mount"), ("", None)])
def test_on_a_worker_setup_mounts_and_installs(worker, storage, mount):
  """The order of things; what the tools do is theirs."""
  for tool in ("sudo", "gcsfuse", "mount"):
    worker.tool(tool, '[[ ${0##*/} != sudo ]] || [[ $1 != mount ]] || "$@"')
  worker.tool("mountpoint", "exit 1")
  worker.tool("python3", "")
  (worker.home / ".local" / "bin").mkdir(parents=True)
  (worker.home / ".local" / "bin" / "uv").symlink_to(worker.tool("uv", ""))
  result = worker.run("on_worker.sh", "setup", storage)
  assert result.returncode == 0, result.stderr
  names = [call[0] for call in worker.calls()]
  assert [name for name in names if name in ("gcsfuse", "mount")] == [mount] * bool(mount)
  if mount:
    assert worker.calls(mount)[0][-1] == "/mnt/zeda"
    assert worker.calls(mount)[0][-2] == storage.removeprefix("gs://")
  environment, package = worker.calls("uv")
  assert environment[1:] == ["venv", "--quiet", "--python=3.12", f"{worker.home}/zeda-venv"]
  assert package[-2:] == ["--editable", f"{LAUNCH.parent}[tpu]"]
