# shellcheck shell=bash disable=SC2034
# Common parts of the launch scripts: sourced by them, not run.
#
# SC2034: what is set here is used there.
#
# Exit codes of all of them: 0 finished; 2 bad input, found before anything was started (or by zeda itself); 75 stopped
# and saved, or a process died: the same command goes on; 130 or 143 the script itself was interrupted; otherwise that
# of what failed.

readonly STOPPED=75 # EX_TEMPFAIL: what zeda returns with ZEDA_EXIT_WHEN_STOPPED=75, and when a peer died
readonly SHARED=/mnt/zeda # where --storage is mounted on every host
readonly RECIPE="adapt rollout sft opd export"
DRY_RUN='' # not empty: print commands instead of running them

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "bash $BASH_VERSION is too old: 4.4 or newer is needed (macOS: brew install bash)." >&2
  exit 2
}

note() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

die() {
  note "$*"
  exit 2
}

# quoted WORD...: the words as one line that a shell reads back as they are.
quoted() {
  local word line=''
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s\n' "${line# }"
}

# run WORD...: runs the command, or prints it in a dry run.
run() {
  if [[ -n $DRY_RUN ]]; then quoted "$@"; else "$@"; fi
}

# split_arguments ARG...: OPTIONS is what stands before --, with --name=value as two words; COMMAND is what follows.
split_arguments() {
  OPTIONS=() COMMAND=()
  while (($#)); do
    case $1 in
      --) COMMAND=("${@:2}"); return ;;
      --*=*) OPTIONS+=("${1%%=*}" "${1#*=}") ;;
      *) OPTIONS+=("$1") ;;
    esac
    shift
  done
}

# value_of OPTION [VALUE]: the value, which must be there.
value_of() {
  (($# > 1)) && [[ -n $2 && $2 != --* ]] || die "$1 needs a value: $1=VALUE."
  printf '%s\n' "$2"
}

# parse_options VALUES FLAGS ARG...: --name=value sets the variable name for the names in VALUES, --name sets it to yes
# for those in FLAGS (with _ for -). Sets COMMAND to what stands after --.
parse_options() {
  local values=" $1 " flags=" $2 " option value
  split_arguments "${@:3}"
  set -- "${OPTIONS[@]}"
  while (($#)); do
    option=${1#--}
    case $1 in
      -h | --help) help && exit 0 ;;
      --dry-run) DRY_RUN=yes ;;
      --*)
        if [[ $flags == *" $option "* ]]; then
          printf -v "${option//-/_}" yes
        elif [[ $values == *" $option "* ]]; then
          value=$(value_of "$@") || exit 2
          printf -v "${option//-/_}" '%s' "$value"
          shift
        else
          die "$1 is no option of $(basename "$0"); what zeda gets stands after --. See --help."
        fi
        ;;
      *) die "${1@Q} is no option of $(basename "$0"); what zeda gets stands after --. See --help." ;;
    esac
    shift
  done
}

check_number() { [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || die "$1=$2 is no number above 0."; }

check_name() {
  [[ $1 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "--name=$1 is no name: at most 40 lower-case letters, digits and hyphens, beginning with a letter."
}

need_tool() {
  [[ -n $DRY_RUN ]] || command -v "$1" >/dev/null || die "$1 is not installed or not on PATH: $2"
}

# owner: who runs this, as the value of a label.
owner() {
  local name=${USER:-$(id -un)}
  name=${name,,}
  name=${name//[^a-z0-9_-]/-}
  name=${name#"${name%%[a-z0-9]*}"} # labels of Kubernetes begin and end with a letter or digit
  name=${name:0:63}
  printf '%s\n' "${name%"${name##*[a-z0-9]}"}"
}

# check_command WHERE ARG...: a recipe command of zeda that can run on hosts that share only WHERE (/: any absolute
# path; empty: there is one host). Sets CONFIG to its configuration file.
check_command() {
  local where=$1 name value arg
  shift
  (($#)) || die "there is nothing to run: give a command of zeda after --, as in -- adapt --config=configs/tiny.py ..."
  [[ " $RECIPE " == *" $1 "* ]] || die "zeda ${1@Q} is no command to launch: expected one of ${RECIPE// /, }."
  shift
  CONFIG=''
  while (($#)); do
    arg=$1
    if [[ $arg == --config* && $arg != *=* ]]; then
      (($# > 1)) || die "$arg needs a value: $arg=VALUE."
      arg+="=$2"
      shift
    fi
    shift
    name=${arg%%=*} value=${arg#*=}
    [[ $value != gs://* ]] ||
      die "$arg: zeda reads and writes files, not buckets. Mount the bucket and give the path (see --help, storage)."
    case $name in
      --config) CONFIG=${value%%:*} ;;
      --config.teacher | --config.prompts | --config.workdir | --config.evaluate.prompts)
        [[ -z $where || $value == /* ]] || die "$arg: give an absolute path, on storage that every host sees."
        [[ -z $where || $value == "${where%/}"/* ]] ||
          die "$arg: not every host sees that. Put it below $where, where --storage is mounted."
        ;;
    esac
  done
  [[ -n $CONFIG ]] || die "--config is missing in the command of zeda; give a file such as --config=configs/tiny.py."
}

# check_config_in ROOT: CONFIG is a file of the clone, which is copied to the hosts.
check_config_in() {
  [[ $CONFIG != /* && $CONFIG != *..* ]] ||
    die "--config=$CONFIG is outside the clone, which is what the hosts get: copy it to configs/ and give that path."
  [[ -f $1/$CONFIG ]] || die "--config=$CONFIG does not exist in $1."
}

# check_storage VALUE: gs://BUCKET or HOST:/SHARE.
check_storage() {
  [[ $1 =~ ^gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$ || ($1 != gs:* && $1 =~ ^[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]+$) ]] ||
    die "--storage=$1 is neither a bucket (gs://BUCKET, without a path) nor an NFS share (HOST:/SHARE)."
}

# check_bucket VALUE: the bucket, if it is one, exists.
check_bucket() {
  [[ $1 == gs://* ]] || return 0
  if [[ -n $DRY_RUN ]]; then
    run gcloud storage buckets describe "$1" --format="value(name)"
  else
    gcloud storage buckets describe "$1" --format="value(name)" >/dev/null ||
      die "--storage=$1 cannot be read (gcloud says why above): make the bucket, or mend the name or your rights."
  fi
}

# parse_topology KIND:AxB[xC]: sets TPU_KIND, TPU_SHAPE, TPU_CHIPS, TPU_HOSTS and CHIPS_PER_HOST.
parse_topology() {
  local dims=() dim
  TPU_KIND=${1%%:*} TPU_SHAPE=${1#*:}
  [[ $1 == *:* && $TPU_SHAPE =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
    die "--topology=$1 is no topology: expected KIND:SHAPE such as v5p:4x4x4, v5e:16x16 or v6e:8x8."
  IFS=x read -r -a dims <<<"$TPU_SHAPE"
  case $TPU_KIND in
    v5e | v6e)
      [[ " 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16 " == *" $TPU_SHAPE "* ]] ||
        die "--topology=$1: $TPU_KIND has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 and 16x16."
      ;;
    v4 | v5p | tpu7x)
      local ok=''
      [[ " 2x2x1 2x2x2 2x2x4 2x4x4 " != *" $TPU_SHAPE "* ]] || ok=yes
      if ((${#dims[@]} == 3 && dims[0] % 4 == 0 && dims[1] % 4 == 0 && dims[2] % 4 == 0)) &&
        ((dims[0] <= dims[1] && dims[1] <= dims[2])); then ok=yes; fi
      [[ -n $ok ]] ||
        die "--topology=$1: $TPU_KIND has 2x2x1, 2x2x2, 2x2x4, 2x4x4 and AxBxC of multiples of 4 with A <= B <= C."
      ;;
    *) die "--topology=$1: ${TPU_KIND@Q} is no kind of TPU; expected v4, v5e, v5p, v6e or tpu7x." ;;
  esac
  TPU_CHIPS=1
  for dim in "${dims[@]}"; do TPU_CHIPS=$((TPU_CHIPS * dim)); done
  CHIPS_PER_HOST=$((TPU_CHIPS < 4 ? TPU_CHIPS : 4))
  TPU_HOSTS=$((TPU_CHIPS / CHIPS_PER_HOST))
}

# check_compact: the shape of parse_topology is the one that Cloud TPU makes of as many chips.
check_compact() {
  local a b c n=$((TPU_CHIPS / 64)) sum best=0 shape=$TPU_SHAPE
  for ((a = 1; a * a * a <= n; a++)); do
    for ((b = a; a * b * b <= n; b++)); do
      ((n % (a * b) == 0)) || continue
      c=$((n / (a * b))) sum=$((a + b + c))
      ((best && sum >= best)) || { best=$sum shape=$((a * 4))x$((b * 4))x$((c * 4)); }
    done
  done
  [[ $TPU_KIND != v4 && $TPU_KIND != v5p ]] || [[ $shape == "$TPU_SHAPE" ]] ||
    die "--topology=$TPU_KIND:$TPU_SHAPE: of $TPU_CHIPS chips, queued resources make $shape; take that, or gke.sh."
}
