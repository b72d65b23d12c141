#!/usr/bin/env bash
# Several processes on this machine's CPU as one run of zeda.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
Runs zeda in several processes on this machine's CPU, as one run: what a pod does, without one.

usage: launch/local.sh [--processes=2] [--devices=4] [options] -- COMMAND [ARGUMENTS]

  launch/local.sh --processes=2 --devices=4 -- adapt --config=configs/tiny.py --config.teacher=DIR ...

  --processes=N      processes (2)
  --devices=M        CPU devices of each process (4)
  --port=PORT        of the coordinator on localhost; a free one by default
  --grace=SECONDS    from the failure of one process until the others are killed (30)
  --program=FILE     what is started instead of zeda, with the same arguments
  --dry-run          prints the commands and runs nothing

Lines of process i begin with [i]. When one process fails, the others get SIGTERM, and SIGKILL after the grace time.
SIGTERM and Ctrl-C are passed on as SIGTERM: zeda saves and exits; a second one kills. Only processes started here are
signalled. Exit codes: 0 all processes ended with 0; 2 bad input; otherwise that of the first process that failed.
END
}

processes=2 devices=4 port='' grace=30 program=''
parse_options "processes devices port grace program" "" "$@"

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

check_number --processes "$processes"
check_number --devices "$devices"
check_number --grace "$grace"
program=(${program:+"$program"})
if ((${#program[@]} == 0)); then
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [[ -x $root/.venv/bin/zeda ]]; then
    program=("$root/.venv/bin/zeda")
  elif command -v zeda >/dev/null; then
    program=(zeda)
  elif [[ -x $root/.venv/bin/python ]]; then
    program=("$root/.venv/bin/python" -m zeda_jax.cli.main)
  else
    die "zeda is neither in $root/.venv nor on PATH: install it (README.md, Install) or give --program=FILE."
  fi
  check_command '' "${COMMAND[@]}"
  [[ -f $CONFIG ]] || die "--config=$CONFIG does not exist."
fi
command -v "${program[0]}" >/dev/null || die "--program=${program[0]} does not exist or cannot be executed."
if [[ -n $port ]]; then
  check_number --port "$port"
  ! listens "$port" || die "--port=$port is in use: give another, or none."
else
  for _ in {1..50}; do
    port=$((10000 + RANDOM % 20000)) # below the ports that the system hands out to clients
    listens "$port" || break
  done
fi

process() { # INDEX: the words that start it
  WORDS=(env JAX_PLATFORMS=cpu
    "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$1"
    PYTHONUNBUFFERED=1 "${program[@]}" "${COMMAND[@]}")
}

if [[ -n $DRY_RUN ]]; then
  for ((i = 0; i < processes; i++)); do
    process "$i"
    printf '%s &\n' "$(quoted "${WORDS[@]}")"
  done
  echo wait
  exit 0
fi

declare -A running=() # pid -> index
first=0 deadline=0 asked=0

stop() { # SIGNAL: to the processes that still run; SIGKILL to what they started as well
  local pid
  for pid in "${!running[@]}"; do
    if [[ $1 == KILL ]]; then kill -KILL -- "-$pid" 2>/dev/null || true; else kill "-$1" "$pid" 2>/dev/null || true; fi
  done
}

# shellcheck disable=SC2329 # the trap below calls it
asked_to_stop() {
  asked=$((asked + 1))
  if ((asked == 1)); then
    note "stopping: zeda saves and exits. Once more kills."
    stop TERM
  else
    stop KILL
  fi
}
trap asked_to_stop TERM INT HUP

prefixed() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT
readers=()
set -m # every process gets a group of its own, which Ctrl-C in a terminal does not reach
for ((i = 0; i < processes; i++)); do
  process "$i"
  mkfifo "$pipes/$i"
  prefixed "$i" <"$pipes/$i" &
  readers+=("$!")
  "${WORDS[@]}" >"$pipes/$i" 2>&1 </dev/null &
  running[$!]=$i
done
((asked == 0)) || stop TERM # asked before all were there

while (("${#running[@]}")); do
  for pid in "${!running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then continue; fi
    code=0
    wait "$pid" || code=$?
    i=${running[$pid]}
    unset "running[$pid]"
    ((code)) || continue
    note "process $i ended with exit code $code."
    if ((first == 0)); then
      first=$code deadline=$((SECONDS + grace))
      (("${#running[@]}")) && note "stopping the others (at most $grace s)."
      stop TERM
    fi
  done
  if ((deadline && SECONDS >= deadline)); then stop KILL; fi
  sleep 0.1
done

for ((waited = 0; waited < 20; waited++)); do # the last lines, unless something keeps a pipe open
  kill -0 "${readers[@]}" 2>/dev/null || break
  sleep 0.1
done
kill "${readers[@]}" 2>/dev/null || true
exit "$first"
