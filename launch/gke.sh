#!/usr/bin/env bash
# zeda on a TPU slice of a GKE cluster, by JobSet.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=lib.sh
source "$here/lib.sh"

help() {
  cat <<'END'
Runs zeda as a JobSet on a TPU slice of the GKE cluster that kubectl talks to, and follows it until it is finished.

usage: launch/gke.sh --name=NAME --image=IMAGE --topology=v5p:4x4x4 --storage=WHAT [options] \
         -- adapt --config=configs/qwen3_30b_a3b.py --config.teacher=/mnt/zeda/... [...]

  --name=NAME              of the JobSet
  --image=IMAGE            with zeda and configs/, by tag or digest:
                           docker build -f launch/Dockerfile -t IMAGE . && docker push IMAGE
  --topology=KIND:SHAPE    as in `zeda plan`: v4:2x2x4, v5e:16x16, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4
  --storage=WHAT           gs://BUCKET (Cloud Storage FUSE CSI driver), HOST:/SHARE (NFS, Filestore) or pvc:NAME (a
                           ReadWriteMany claim), mounted at /mnt/zeda in every pod
  --namespace=NAMESPACE    (default)
  --context=CONTEXT        of kubectl; its current one by default
  --service-account=NAME   of Kubernetes; a bucket needs one that may read and write it
  --queue=NAME             LocalQueue of Kueue; clusters made by XPK have multislice-queue
  --spot                   on spot nodes
  --max-restarts=N         after preemptions and failures (50)
  --poll=SECONDS           between questions about the state (15)
  --dry-run                prints the commands and the manifest and runs nothing

The cluster has JobSet 0.6 or newer and a node pool of that topology (or makes one). Ctrl-C and a lost connection
end the watching, not the run: the same command watches again. It changes no JobSet that exists: --name of one that does
not carry your label zeda_launch is refused. The JobSet is removed a day after its end. To stop a run:
kubectl delete jobset NAME; zeda saves on SIGTERM, and another launch with the same command goes on.

Exit codes: 0 finished; 2 bad input, before anything is created; 130, 143 interrupted, the run goes on; 1 failed.
END
}

name='' image='' topology='' storage='' namespace=default context='' service_account='' queue='' spot=''
max_restarts=50 poll=15
parse_options "name image topology storage namespace context service-account queue max-restarts poll" "spot" "$@"

object() { # OPTION VALUE: a name that Kubernetes takes
  [[ $2 =~ ^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$ ]] || die "$1=$2 is no name of Kubernetes: a-z, 0-9, hyphens and dots."
}

check_name "$name"
[[ $image =~ ^[a-z0-9][A-Za-z0-9._/:-]*(:[A-Za-z0-9._-]+|@sha256:[0-9a-f]{64})$ ]] ||
  die "--image=$image is no image with a tag or a digest."
parse_topology "$topology"
object --namespace "$namespace"
[[ -z $service_account ]] || object --service-account "$service_account"
[[ -z $queue ]] || object --queue "$queue"
check_number --max-restarts "$max_restarts"
check_number --poll "$poll"
check_command "$SHARED" "${COMMAND[@]}"
check_config_in "$(cd "$here/.." && pwd)"
[[ -n $storage ]] || die "--storage is missing: teacher, prompts and workdir lie on it (see --help)."
[[ $storage == pvc:* ]] && object --storage "${storage#pvc:}"
[[ $storage == pvc:* ]] || check_storage "$storage"
[[ $storage != gs://* || -n $service_account ]] ||
  die "--storage=$storage needs --service-account=NAME: a bucket is read and written in its name (Workload Identity)."
need_tool kubectl "https://kubernetes.io/docs/tasks/tools/"
[[ $storage != gs://* ]] || need_tool gcloud "https://cloud.google.com/sdk/docs/install"

json() { # WORD...: as a JSON list, which YAML reads as well
  local word list=''
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || die "${word@Q} has control characters."
    word=${word//\\/\\\\}
    # shellcheck disable=SC2016 # nor shall Kubernetes expand it
    word=${word//'$('/'$$('}
    list+=", \"${word//\"/\\\"}\""
  done
  printf '[%s]\n' "${list#, }"
}

render() {
  local text line key value
  local -A values=([NAME]=$name [NAMESPACE]=$namespace [OWNER]=$(owner) [IMAGE]=$image [SHAPE]=$TPU_SHAPE
    [HOSTS]=$TPU_HOSTS [CHIPS_PER_HOST]=$CHIPS_PER_HOST [MAX_RESTARTS]=$max_restarts [ARGUMENTS]=$(json "${COMMAND[@]}")
    [QUEUE]=${queue:+kueue.x-k8s.io/queue-name: $queue}
    [SERVICE_ACCOUNT]=${service_account:+serviceAccountName: $service_account}
    [SPOT_SELECTOR]=${spot:+'cloud.google.com/gke-spot: "true"'}
    [SPOT_TOLERATION]=${spot:+'{key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'}
    [POD_ANNOTATION]='gke-gcsfuse/volumes: "false"')
  [[ -z $spot ]] || values[SPOT_TOLERATION]="- ${values[SPOT_TOLERATION]}"
  case $TPU_KIND in
    v4) values[ACCELERATOR]=tpu-v4-podslice ;;
    v5e) values[ACCELERATOR]=tpu-v5-lite-podslice ;;
    v5p) values[ACCELERATOR]=tpu-v5p-slice ;;
    v6e) values[ACCELERATOR]=tpu-v6e-slice ;;
    tpu7x) values[ACCELERATOR]=tpu7x ;;
  esac
  case $storage in
    gs://*)
      values[POD_ANNOTATION]='gke-gcsfuse/volumes: "true"'
      value="{driver: gcsfuse.csi.storage.gke.io, volumeAttributes: "
      values[VOLUME]="csi: $value{bucketName: ${storage#gs://}, mountOptions: implicit-dirs}}"
      ;;
    pvc:*) values[VOLUME]="persistentVolumeClaim: {claimName: ${storage#pvc:}}" ;;
    *) values[VOLUME]="nfs: {server: ${storage%%:*}, path: ${storage#*:}}" ;;
  esac
  while IFS= read -r line; do
    text=$line
    [[ $text != '#'* ]] || continue
    for key in "${!values[@]}"; do text=${text//"@$key@"/"${values[$key]}"}; done
    [[ $text =~ ^\ *$ ]] || printf '%s\n' "$text" # what is left out leaves an empty line
  done <"$here/gke_jobset.yaml"
}

kube=(kubectl ${context:+"--context=$context"} "--namespace=$namespace")
manifest=$(render)
if [[ -n $DRY_RUN ]]; then
  echo "# once, before anything is created:"
  check_bucket "$storage"
  echo "# unless there is one:"
  printf "%s <<'END'\n%s\nEND\n" "$(quoted "${kube[@]}" create --filename=-)" "$manifest"
  echo "# until it is completed or has failed, every $poll s:"
fi

found=''
look() { # sets found to "OWNER CONDITION ... " of the JobSet, or to nothing where there is none
  found=$("${kube[@]}" get jobset "$name" --ignore-not-found \
    --output='jsonpath={.metadata.labels.zeda_launch} {.status.conditions[?(@.status=="True")].type} ') || return 1
}

follow() { # [SINCE]: prints what all pods write, until they end or the connection breaks
  run "${kube[@]}" logs --follow --prefix --container=zeda "--max-log-requests=$TPU_HOSTS" ${1:+"--since-time=$1"} \
    "--selector=jobset.sigs.k8s.io/jobset-name=$name"
}

if [[ -n $DRY_RUN ]]; then
  follow
  exit 0
fi
check_bucket "$storage"
look || die "kubectl cannot ask for JobSets (it says why above): is JobSet installed, and the context the right one?"
if [[ -n $found && ${found%% *} != "$(owner)" ]]; then
  die "there is a JobSet $name in namespace $namespace that is not yours (label zeda_launch): give another --name."
elif [[ $found == *" Completed "* || $found == *" Failed "* ]]; then
  die "JobSet $name has ended already. To run again: kubectl --namespace=$namespace delete jobset $name, then this."
elif [[ -z $found ]]; then
  "${kube[@]}" create --filename=- <<<"$manifest" || die "kubectl cannot create the JobSet (it says why above)."
else
  note "JobSet $name is there already: watching it."
fi

# shellcheck disable=SC2329 # the traps below call it
interrupted() {
  note "no longer watching. JobSet $name goes on; the same command watches again."
  exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM HUP
since='' errors=0
while true; do
  if look; then
    errors=0
    [[ -n $found ]] || { note "JobSet $name was deleted; the same command goes on." && exit 1; }
    case $found in *" Completed "* | *" Failed "*) break ;; esac
    # Fails while the pods are not there yet, and between two starts.
    if follow "$since" 2>/dev/null; then since=$(date -u +%Y-%m-%dT%H:%M:%SZ); fi
  else
    ((++errors < 20)) || { note "kubectl no longer answers; the run is left as it is." && exit 1; }
  fi
  sleep "$poll"
done
[[ $found == *" Completed "* ]] || { note "JobSet $name failed: kubectl describe jobset $name" && exit 1; }
note "finished."
