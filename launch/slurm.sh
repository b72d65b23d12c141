#!/usr/bin/env bash
# zeda on the GPU nodes of a Slurm cluster.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=lib.sh
source "$here/lib.sh"

help() {
  cat <<'END'
Queues zeda on GPU nodes of a Slurm cluster and follows it until it is finished. Run it on a login node, in the clone,
which all nodes see under the same path.

usage: launch/slurm.sh --name=NAME --nodes=8 --gpus-per-node=8 [options] \
         -- adapt --config=configs/qwen3_30b_a3b.py --config.teacher=/shared/... [...]

  --name=NAME            of the job; its output is runs/NAME.log
  --nodes=N              nodes, each with one process that has all its GPUs
  --gpus-per-node=G      GPUs of a node
  --time=TIME            limit of one allocation, as sbatch takes it (24:00:00)
  --partition, --account, --qos, --constraint    as sbatch takes them
  --program=FILE         zeda on the nodes; by default that of .venv in the clone, or of PATH
  --max-restarts=N       (100)
  --poll=SECONDS         between questions about the state (15)
  --dry-run              prints the command and runs nothing

Before the time limit, and on preemption, zeda gets SIGTERM, saves and exits, and the job is queued again and goes on
from the last checkpoint. Ctrl-C and a lost connection end the watching, not the job. To stop a job: scancel JOB; the
same command goes on. A job of yours of the same name that is queued or runs is refused, and so never runs twice.

Exit codes: 0 finished; 2 bad input, before anything is queued; 75 stopped and saved after the last restart; 130, 143
interrupted, the job goes on; otherwise that of zeda, or 1 where Slurm ended the job.
END
}

name='' nodes='' gpus_per_node='' time=24:00:00 partition='' account='' qos='' constraint='' program=''
max_restarts=100 poll=15
parse_options "name nodes gpus-per-node time partition account qos constraint program max-restarts poll" "" "$@"

root=$(cd "$here/.." && pwd)
check_name "$name"
check_number --nodes "$nodes"
check_number --gpus-per-node "$gpus_per_node"
check_number --max-restarts "$max_restarts"
check_number --poll "$poll"
[[ $time =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || die "--time=$time is no time; expected one such as 24:00:00 or 2-00."
check_command / "${COMMAND[@]}"
check_config_in "$root"
if [[ -z $program ]]; then
  program=$root/.venv/bin/zeda
  [[ -x $program ]] || program=$(command -v zeda) ||
    die "zeda is neither in $root/.venv/bin nor on PATH: install it (README.md, Install) or give --program=FILE."
fi
[[ -x $program ]] || die "--program=$program does not exist or cannot be executed."
need_tool sbatch "run this on a login node of the cluster."

log=$root/runs/$name.log
submit() {
  run env "ZEDA_MAX_RESTARTS=$max_restarts" sbatch --parsable "--job-name=$name" \
    "--output=$log" "--chdir=$root" "--nodes=$nodes" "--gpus-per-node=$gpus_per_node" "--time=$time" \
    ${partition:+"--partition=$partition"} ${account:+"--account=$account"} ${qos:+"--qos=$qos"} \
    ${constraint:+"--constraint=$constraint"} "$here/slurm.sbatch" "$program" "${COMMAND[@]}"
}

queued() { run squeue --noheader --me "--name=$name" --format=%i; } # jobs of this name, which there must not be
if [[ -n $DRY_RUN ]]; then
  queued
  run mkdir -p "$root/runs"
  submit
  exit 0
fi
job=$(queued) || die "squeue fails (it says why above)."
[[ -z $job ]] || die "your job ${job//$'\n'/, }, named $name, is queued or runs: give another --name, or scancel it."
mkdir -p "$root/runs"
job=$(submit) || die "sbatch refuses the job (it says why above)."
job=${job%%;*} # with several clusters the cluster's name follows
note "job $job is queued; its output is $log."

touch "$log"
tail -n 0 -F "$log" 2>/dev/null &
follower=$!
trap 'kill "$follower" 2>/dev/null || true' EXIT
# shellcheck disable=SC2329 # the traps below call it
interrupted() {
  note "no longer watching. Job $job goes on; scancel $job ends it."
  exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM HUP

errors=0
while true; do
  # The controller forgets a job some minutes after its end, and may be away for a while.
  if shown=$(scontrol show job --oneliner "$job" 2>/dev/null); then
    errors=0
  else
    ((++errors < 20)) || { note "scontrol no longer knows job $job: see $log." && exit 1; }
    shown=''
  fi
  state='' code=''
  [[ $shown =~ JobState=([A-Z_]+) ]] && state=${BASH_REMATCH[1]}
  [[ $shown =~ \ ExitCode=([0-9]+): ]] && code=${BASH_REMATCH[1]}
  case $state in
    COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL | OUT_OF_MEMORY | BOOT_FAIL | DEADLINE | REVOKED) break ;;
  esac
  sleep "$poll"
done
sleep 1 # tail looks once a second
[[ $state != COMPLETED ]] || { note "finished." && exit 0; }
note "job $job: $state, exit code $code."
((code)) || code=1
exit "$code"
