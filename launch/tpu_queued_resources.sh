#!/usr/bin/env bash
# zeda on a Cloud TPU pod, by queued resources.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
Runs zeda on all workers of a Cloud TPU pod that it requests itself, until the run is finished.

usage: launch/tpu_queued_resources.sh --name=NAME --project=PROJECT --zone=ZONE --topology=v5p:4x4x4 [options] \
         -- adapt --config=configs/qwen3_30b_a3b.py --config.teacher=/mnt/zeda/... [...]

  --name=NAME              of the queued resource and of its TPU
  --project, --zone        where
  --topology=KIND:SHAPE    as in `zeda plan`: v4:2x2x4, v5e:16x16, v5p:4x4x4, v6e:8x8
  --accelerator-type=TYPE  instead of --topology: v5p-128
  --runtime-version=V      of the TPU's software; by default the one that Google names for this kind of TPU
  --spot                   cheaper, and may be preempted at any time
  --storage=WHAT           gs://BUCKET (gcsfuse) or HOST:/SHARE (NFS, Filestore), mounted at /mnt/zeda on every worker
  --keep                   leave the TPU there after success (it costs until it is deleted)
  --stop                   ends the run: SIGTERM on all workers, zeda saves and exits; the TPU stays, and costs
  --max-restarts=N         after preemptions (100)
  --poll=SECONDS           between questions about the state (30)
  --dry-run                prints the commands and runs nothing

Creates the queued resource, or takes the one of that name if it carries your label zeda_launch; waits until it is
ACTIVE; copies this clone to all workers (uncommitted and untracked files too, ignored ones not), so the paths of
configs/ hold there; installs it; runs the command on all workers. Preempted, it deletes what it made, requests it again
and runs the same command, which goes on from the last checkpoint. A failure leaves the TPU there, for you to look at.
It never deletes what does not carry the label. Ctrl-C and a lost connection end the watching, not the run: the same
command attaches again. gcloud needs its key in the ssh agent: ssh-add ~/.ssh/google_compute_engine.

Exit codes: 0 finished; 2 bad input, before anything is created or found by zeda; 75 ended before it was finished, by
--stop, too often, or because workers died: the same command goes on; 130, 143 interrupted, the run goes on; otherwise
that of zeda or gcloud.
END
}

name='' project='' zone='' topology='' accelerator_type='' runtime_version='' spot='' storage='' keep='' stop=''
max_restarts=100 poll=30
parse_options "name project zone topology accelerator-type runtime-version storage max-restarts poll" \
  "spot keep stop" "$@"

check_name "$name"
[[ $project =~ ^[a-z][a-z0-9.:-]{4,60}[a-z0-9]$ ]] || die "--project=$project is no project id."
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone=$zone is no zone; expected one such as us-east5-a."
check_number --max-restarts "$max_restarts"
check_number --poll "$poll"
tpu=(gcloud compute tpus)
there=("--project=$project" "--zone=$zone")
label=zeda_launch=$(owner)
on_all() { run "${tpu[@]}" tpu-vm ssh "$name" "${there[@]}" --worker=all --quiet "--command=$1"; }
worker=zeda-jax/launch/on_worker.sh

if [[ -z $stop ]]; then
  [[ -z $topology || -z $accelerator_type ]] || die "--topology and --accelerator-type say the same: give one of them."
  if [[ -n $topology ]]; then
    parse_topology "$topology"
    [[ $TPU_KIND != tpu7x ]] || die "--topology=$topology: there are no queued resources of tpu7x; use launch/gke.sh."
    check_compact
    case $TPU_KIND in
      v5e) accelerator_type=v5litepod-$TPU_CHIPS ;;
      v6e) accelerator_type=v6e-$TPU_CHIPS ;;
      *) accelerator_type=$TPU_KIND-$((TPU_CHIPS * 2)) ;; # counted in cores
    esac
  fi
  case $accelerator_type in
    v4-*) : "${runtime_version:=tpu-ubuntu2204-base}" ;;
    v5litepod-*) : "${runtime_version:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${runtime_version:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${runtime_version:=v2-alpha-tpuv6e}" ;;
  esac
  [[ $accelerator_type =~ ^(v4|v5litepod|v5p|v6e)-[1-9][0-9]*$ ]] ||
    die "--accelerator-type=$accelerator_type is none; expected one such as v5p-128 or v5litepod-256, or --topology."
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  check_command "${storage:+$SHARED}" "${COMMAND[@]}"
  [[ -n $storage ]] || check_command / "${COMMAND[@]}"
  check_config_in "$root"
  [[ -z $storage ]] || check_storage "$storage"
  [[ -e $root/.git ]] || die "$root is no git clone: its files are what the workers get."
fi
need_tool gcloud "https://cloud.google.com/sdk/docs/install"

STATE='' OWNER=''
fields='csv[no-heading](name.basename(),state.state,tpu.nodeSpec[0].node.labels.zeda_launch)'
list_all() { run "${tpu[@]}" queued-resources list "${there[@]}" "--format=$fields"; }

look() { # sets STATE and OWNER of the queued resource; both are empty where there is none
  local listed line found
  STATE='' OWNER=''
  listed=$(list_all) || return 1
  while IFS= read -r line; do
    IFS=, read -r found STATE OWNER <<<"$line"
    [[ $found != "$name" ]] || return 0
  done <<<"$listed"
  STATE='' OWNER=''
}

require_ours() {
  [[ zeda_launch=$OWNER == "$label" ]] ||
    die "$name exists and is not yours (its label zeda_launch is ${OWNER:-missing}): give another --name."
}

fresh='' # whether it was requested just now, and has not been ACTIVE yet
create() {
  fresh=yes
  run "${tpu[@]}" queued-resources create "$name" "--node-id=$name" "${there[@]}" \
    "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version" "--labels=$label" \
    ${spot:+--spot} --quiet
}

remove() { # the queued resource and its TPU, if they are ours
  if [[ -z $DRY_RUN ]]; then
    look || return 1
    [[ -n $STATE ]] || return 0
    require_ours
  fi
  run "${tpu[@]}" queued-resources delete "$name" "${there[@]}" --force --quiet
}

give_up() { # SENTENCE EXIT-CODE
  note "$1; $name is kept for you to look at, and may cost. To delete it:"
  quoted "${tpu[@]}" queued-resources delete "$name" "${there[@]}" --force >&2
  exit "$2"
}

wait_until_active() { # creates it where there is none, and again where it was suspended or failed
  local before='' errors=0
  while true; do
    if ! look; then
      ((++errors < 10)) || die "gcloud cannot list the queued resources (it says why above); the TPU is left as it is."
      sleep "$poll"
      continue
    fi
    [[ -z $STATE ]] || require_ours
    [[ $STATE == "$before" ]] || note "$name: ${STATE:-there is none}"
    before=$STATE
    case $STATE in
      ACTIVE) fresh='' && return ;;
      FAILED) [[ -z $fresh ]] || give_up "the request failed" 1 ;;&
      '') create || die "gcloud cannot create $name (it says why above)." ;;
      SUSPENDED | FAILED)
        count_restart
        remove
        sleep "$poll"
        ;;
      *) sleep "$poll" ;;
    esac
  done
}

restarts=0
count_restart() {
  restarts=$((restarts + 1))
  ((restarts <= max_restarts)) && return
  note "restarted $max_restarts times: stopping here. The same command goes on."
  exit "$STOPPED"
}

install() { # the clone, on all workers; nothing where the run goes on already
  local archive=$1 unpack
  unpack="bash $worker running $name 2>/dev/null || { mkdir -p zeda-jax && tar -xzf zeda-jax.tgz -C zeda-jax && "
  unpack+="bash $worker setup ${storage@Q}; }"
  run "${tpu[@]}" tpu-vm scp "$archive" "$name:zeda-jax.tgz" "${there[@]}" --worker=all --quiet && on_all "$unpack"
}

pack() { # ARCHIVE
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    tar -C "$root" --null --files-from=- --ignore-failed-read -czf "$1"
}

lost() { # whether the TPU went away; the state says so some time after the connection broke
  local node
  ((code != 2)) || return 1 # bad input, found by zeda
  for _ in {1..6}; do
    if look && [[ $STATE != ACTIVE ]]; then return 0; fi
    node=$("${tpu[@]}" tpu-vm describe "$name" "${there[@]}" "--format=value(state)" 2>/dev/null) || node=''
    case $node in PREEMPTED | TERMINATED | STOPPED | STOPPING | REPAIRING) return 0 ;; esac
    sleep "$poll"
  done
  return 1
}

command_line="bash $worker run $name $(quoted "${COMMAND[@]}")"
if [[ -n $stop ]]; then
  on_all "bash $worker stop $name"
  exit 0
fi
if [[ -n $DRY_RUN ]]; then
  echo "# once, before anything is created:"
  check_bucket "$storage"
  echo "# unless there is one; until it is ACTIVE, every $poll s; again after a preemption:"
  create
  list_all
  echo "# on all workers:"
  echo "git -C $(quoted "$root") ls-files -z --cached --others --exclude-standard |" \
    "tar -C $(quoted "$root") --null --files-from=- --ignore-failed-read -czf zeda-jax.tgz"
  install zeda-jax.tgz
  on_all "$command_line"
  [[ -n $keep ]] || { echo "# after success:" && remove; }
  exit 0
fi

check_bucket "$storage"
look || die "gcloud cannot list the queued resources of $project in $zone (it says why above)."
[[ -z $STATE ]] || require_ours
# shellcheck disable=SC2329 # the traps below call it
interrupted() {
  note "no longer watching. $name is left as it is; the same command attaches again, --stop ends the run."
  exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM HUP
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pack "$work/zeda-jax.tgz"

short=0 # runs in a row that ended within ten minutes, with the TPU still there
while true; do
  wait_until_active
  code=0 started=$SECONDS
  { install "$work/zeda-jax.tgz" && on_all "$command_line"; } || code=$?
  ((code)) || break
  ((code != 76)) || give_up "stopped by --stop, and saved" "$STOPPED"
  note "the command ended with exit code $code; looking whether the TPU is still there."
  if lost; then
    count_restart
    note "$name was preempted (${STATE:-gone}): requesting it again."
    remove || give_up "it could not be deleted" 1
  elif ((code == STOPPED || code == 255)); then # saved on SIGTERM, a peer died, or the connection broke: again
    short=$((SECONDS - started < 600 ? short + 1 : 0))
    ((short < 5)) || give_up "ended five times in a row within ten minutes" "$code"
    count_restart
  else
    give_up "failed" "$code"
  fi
done
note "finished."
if [[ -z $keep ]]; then
  remove || give_up "it could not be deleted" 1
else
  note "$name is kept, and costs until it is deleted."
fi
