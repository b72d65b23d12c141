#!/usr/bin/env bash
# What launch/tpu_queued_resources.sh does on every worker of a TPU pod; copied there with the clone.
#
#   on_worker.sh setup [STORAGE]      mounts STORAGE (gs://BUCKET or HOST:/SHARE) at /mnt/zeda, installs zeda
#   on_worker.sh running NAME         whether the run NAME goes on here
#   on_worker.sh run NAME ARGUMENTS   starts zeda, or attaches to the run NAME, and returns its exit code
#   on_worker.sh stop NAME            SIGTERM to the run NAME, which saves and exits; run returns 76
#
# A run does not end with the connection it was started over: its output goes to a file, which `run` follows.
set -euo pipefail

clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$HOME/zeda-venv
shared=/mnt/zeda

mount_storage() { # STORAGE
  mountpoint -q "$shared" && return
  sudo mkdir -p "$shared"
  if [[ $1 == gs://* ]]; then
    if ! command -v gcsfuse >/dev/null; then
      echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt" \
        "gcsfuse-$(lsb_release -c -s) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
        sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
      sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
      sudo apt-get -qq -y -o DPkg::Lock::Timeout=300 install gcsfuse
    fi
    sudo chown "$(id -u):$(id -g)" "$shared"
    gcsfuse --implicit-dirs "${1#gs://}" "$shared"
  else
    sudo apt-get -qq -y -o DPkg::Lock::Timeout=300 install nfs-common
    sudo mount -t nfs -o hard,timeo=600 "$1" "$shared"
    mkdir -p "$shared" && [[ -w $shared ]] || sudo chown "$(id -u):$(id -g)" "$shared"
  fi
}

setup() { # [STORAGE]
  [[ -z ${1-} ]] || mount_storage "$1"
  # The system's Python may be older than 3.11: uv brings one.
  [[ -x $HOME/.local/bin/uv ]] || python3 -m pip install --quiet --user --upgrade uv
  [[ -x $venv/bin/python ]] || "$HOME/.local/bin/uv" venv --quiet --python=3.12 "$venv"
  "$HOME/.local/bin/uv" pip install --quiet --python="$venv/bin/python" --editable "${clone}[tpu]"
}

run_directory() { # NAME
  printf '%s\n' "$HOME/.zeda-runs/$1"
}

running() { # NAME: the run holds a lock as long as it lives
  [[ -e $(run_directory "$1")/lock ]] && ! flock -n "$(run_directory "$1")/lock" true
}

run() { # NAME ARGUMENTS
  local directory log from follower code
  directory=$(run_directory "$1")
  log=$directory/log
  mkdir -p "$directory"
  if running "$1"; then
    echo "attached to the run that goes on"
    from=$(($(wc -l <"$log") > 20 ? $(wc -l <"$log") - 19 : 1))
  else
    touch "$log" "$directory/lock"
    from=$(($(wc -l <"$log") + 1))
    rm -f "$directory/exit" "$directory/pid" "$directory/stopped"
    (
      cd "$clone"
      export ZEDA_EXIT_WHEN_STOPPED=75 PYTHONUNBUFFERED=1
      # shellcheck disable=SC2016 # expanded by that shell
      setsid flock "$directory/lock" bash -c '
        "${@:2}" >>"$1/log" 2>&1 </dev/null &
        echo "$!" >"$1/pid"
        code=0; wait "$!" || code=$?
        echo "$code" >"$1/exit"' run "$directory" "${ZEDA:-$venv/bin/zeda}" "${@:2}" >/dev/null 2>&1 </dev/null &
    )
    for _ in {1..100}; do # until it holds the lock, or has already ended
      if [[ -s $directory/pid ]]; then break; fi
      sleep 0.1
    done
  fi
  tail --pid="$$" -n "+$from" -f "$log" &
  follower=$!
  trap 'kill "$follower" 2>/dev/null || true' EXIT
  while running "$1"; do sleep "${ZEDA_POLL:-2}"; done
  sleep "${ZEDA_POLL:-1}" # tail looks once a second, where it is not told at once
  code=1  # nothing was written: the machine went down under it
  [[ -s $directory/exit ]] && code=$(<"$directory/exit")
  ((code != 75)) || [[ ! -e $directory/stopped ]] || code=76 # not preempted: the launcher shall not start it again
  exit "$code"
}

stop() { # NAME
  if running "$1"; then
    touch "$(run_directory "$1")/stopped"
    kill -TERM "$(<"$(run_directory "$1")/pid")"
  else
    echo "no run $1 goes on here" >&2
  fi
}

case ${1-} in
  run)
    # The number of the worker, which its host name ends with, stands before every line.
    set +e
    run "${@:2}" 2>&1 | sed -u "s/^/[${HOSTNAME##*-}] /"
    exit "${PIPESTATUS[0]}"
    ;;
  setup | running | stop) "$@" ;;
  *) sed -n 's/^# \{0,1\}//p' "$0" | sed -n 2,10p ;;
esac
