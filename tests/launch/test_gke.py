"""The JobSet manifest, field by field, and the launcher against a made-up kubectl.

Fields and their values are those of the schema of jobset.x-k8s.io/v1alpha2 and of batch/v1 Job.
"""

import re

import pytest
import yaml

from tests.launch.machine import ADAPT, commands

OPTIONS = ["--name=half", "--image=eu.gcr.io/p/zeda:1.0", "--topology=v5p:4x4x4", "--poll=1"]
NFS = "--storage=10.0.0.2:/share"
# $FAKE/jobset: "OWNER CONDITIONS". $FAKE/follows: what following the logs once comes to, one a line: the conditions
# that hold afterwards, or `broken`, or `deleted`.
KUBECTL = r"""
case "$*" in
  *"get jobset half "*)
    [[ ! -e $FAKE/unreachable ]] || exit 1
    [[ ! -e $FAKE/jobset ]] || echo "$(cat "$FAKE/jobset") " ;;
  *" create "*) cat >"$FAKE/manifest"; [[ ! -e $FAKE/refuses ]] || exit 1; echo "jane-doe " >"$FAKE/jobset" ;;
  *" logs "*)
    next=$(head -n 1 "$FAKE/follows"); sed -i 1d "$FAKE/follows"
    echo "[pod/half-slice-job-0-0/zeda] step"
    case $next in
      broken) exit 1 ;;
      deleted) rm "$FAKE/jobset" ;;
      *) echo "jane-doe $next" >"$FAKE/jobset" ;;
    esac ;;
  *) echo "unexpected: $*" >&2; exit 99 ;;
esac
exit 0
"""


@pytest.fixture
def cluster(machine):
  machine.tool("kubectl", KUBECTL)
  machine.tool("gcloud", '[[ "$*" != *gs://missing* ]]')
  return machine


def launch(cluster, *options, command=ADAPT):
  return cluster.run("gke.sh", *OPTIONS, NFS, *options, "--", *command)


def manifest(cluster, *options, command=ADAPT):
  result = launch(cluster, "--dry-run", *options, command=command)
  assert result.returncode == 0, result.stderr
  return yaml.safe_load(result.stdout.split("<<'END'\n")[1].split("\nEND\n")[0])


def pod_of(jobset):
  return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_jobset(cluster):
  jobset = manifest(cluster)
  assert (jobset.pop("apiVersion"), jobset.pop("kind")) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert jobset.pop("metadata") == {
    "name": "half",
    "namespace": "default",
    "labels": {"xpk.google.com/workload": "half", "zeda_launch": "jane-doe"},
    "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
  }
  spec = jobset.pop("spec")
  assert jobset == {}
  assert spec.pop("ttlSecondsAfterFinished") == 86400
  assert spec.pop("network") == {"enableDNSHostnames": True, "subdomain": "half"}
  policy = spec.pop("failurePolicy")
  (rule,) = policy["rules"]
  assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule.pop("name"))
  assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  assert policy["maxRestarts"] == 50 and set(policy) == {"maxRestarts", "rules"}
  (job,) = spec.pop("replicatedJobs")
  assert spec == {}
  assert (job.pop("name"), job.pop("replicas")) == ("slice-job", 1)
  assert set(job) == {"template"} and set(job["template"]) == {"spec"}


def test_job_has_a_pod_for_every_host(cluster):
  job = manifest(cluster)["spec"]["replicatedJobs"][0]["template"]["spec"]
  template = job.pop("template")
  assert job == {
    "parallelism": 16,
    "completions": 16,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [{"action": "FailJob", "onExitCodes": {"containerName": "zeda", "operator": "In", "values": [2]}}]
    },
  }
  assert template["metadata"]["labels"] == {"xpk.google.com/workload": "half"}
  assert all(isinstance(value, str) for value in template["metadata"]["annotations"].values())
  # Names of pods are labels: half-slice-job-0-15
  assert len("x" * 40 + "-slice-job-0-9999") <= 63


def test_pod(cluster):
  pod = pod_of(manifest(cluster))
  (container,) = pod.pop("containers")
  assert pod.pop("volumes") == [
    {"name": "shm", "emptyDir": {"medium": "Memory"}},
    {"name": "shared", "nfs": {"server": "10.0.0.2", "path": "/share"}},
  ]
  assert pod == {
    "restartPolicy": "Never",  # which a podFailurePolicy requires
    "hostNetwork": True,
    "dnsPolicy": "ClusterFirstWithHostNet",
    "terminationGracePeriodSeconds": 300,
    "nodeSelector": {
      "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
      "cloud.google.com/gke-tpu-topology": "4x4x4",
    },
    "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
  }
  assert container == {
    "name": "zeda",
    "image": "eu.gcr.io/p/zeda:1.0",
    "args": ADAPT,
    "env": [{"name": "ZEDA_EXIT_WHEN_STOPPED", "value": "75"}, {"name": "PYTHONUNBUFFERED", "value": "1"}],
    "ports": [{"containerPort": 8471}, {"containerPort": 8482}],
    "securityContext": {"privileged": True},
    "resources": {"limits": {"google.com/tpu": 4}},
    "volumeMounts": [{"name": "shared", "mountPath": "/mnt/zeda"}, {"name": "shm", "mountPath": "/dev/shm"}],
  }


def test_what_options_add(cluster):
  options = ["--spot", "--queue=multislice-queue", "--service-account=trainer", "--namespace=team", "--max-restarts=7"]
  jobset = manifest(cluster, *options, "--storage=gs://my-bucket")
  assert jobset["metadata"]["namespace"] == "team"
  assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "multislice-queue"
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
  pod = pod_of(jobset)
  assert pod["serviceAccountName"] == "trainer"
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert pod["tolerations"][1] == {
    "key": "cloud.google.com/gke-spot",
    "operator": "Equal",
    "value": "true",
    "effect": "NoSchedule",
  }
  template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  assert pod["volumes"][1] == {
    "name": "shared",
    "csi": {
      "driver": "gcsfuse.csi.storage.gke.io",
      "volumeAttributes": {"bucketName": "my-bucket", "mountOptions": "implicit-dirs"},
    },
  }
  claim = pod_of(manifest(cluster, "--storage=pvc:shared"))["volumes"][1]
  assert claim == {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}}


@pytest.mark.parametrize(
  ("topology", "accelerator", "hosts", "chips"),
  [
    ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
    ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
    ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
    ("v5p:2x2x1", "tpu-v5p-slice", 1, 4),
    ("v5p:4x4x16", "tpu-v5p-slice", 64, 4),
    ("v6e:8x8", "tpu-v6e-slice", 16, 4),
    ("tpu7x:4x4x4", "tpu7x", 16, 4),
  ],
)
def test_topologies(cluster, topology, accelerator, hosts, chips):
  jobset = manifest(cluster, f"--topology={topology}")
  job, pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"], pod_of(jobset)
  assert job["parallelism"] == job["completions"] == hosts
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.split(":")[1]
  assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_arguments_arrive_as_they_are(cluster):
  words = ["--config.a=two words", '--config.b="q" \\ it\'s', "--config.c=@NAME@ & # x: y", "--config.d=Käse"]
  arguments = pod_of(manifest(cluster, command=[*ADAPT, *words]))["containers"][0]["args"]
  assert arguments == [*ADAPT, *words]
  # Kubernetes reads $(X) as a variable, and $$(X) as what it says.
  arguments = pod_of(manifest(cluster, command=[*ADAPT, "--config.a=$(X)"]))["containers"][0]["args"]
  assert arguments[-1] == "--config.a=$$(X)"


def test_names_that_yaml_would_read_otherwise_stay_names(cluster):
  jobset = manifest(cluster, "--name=true", "--namespace=123")
  assert (jobset["metadata"]["name"], jobset["metadata"]["namespace"]) == ("true", "123")


def test_dry_run_names_the_commands(cluster):
  text = launch(cluster, "--dry-run", "--context=ctx", "--storage=gs://b-1", "--service-account=sa").stdout
  head, rest = text.split("<<'END'\n")
  bucket, create = commands(head)
  assert bucket == ["gcloud", "storage", "buckets", "describe", "gs://b-1", "--format=value(name)"]
  kubectl = ["kubectl", "--context=ctx", "--namespace=default"]
  assert create == [*kubectl, "create", "--filename=-"]
  (logs,) = commands(rest.split("\nEND\n")[1])
  assert logs[:7] == [*kubectl, "logs", "--follow", "--prefix", "--container=zeda"]
  assert logs[7:] == ["--max-log-requests=16", "--selector=jobset.sigs.k8s.io/jobset-name=half"]
  assert cluster.calls() == []


def test_from_nothing_to_completed(cluster):
  cluster.file("follows", "\nbroken\nStartupPolicyCompleted\nCompleted\n")
  result = launch(cluster)
  assert result.returncode == 0, result.stderr
  assert result.stdout.count("step") == 4 and "finished" in result.stderr
  assert len(cluster.calls("create")) == 1 and not cluster.calls("delete")
  assert yaml.safe_load(cluster.file("manifest")) == manifest(cluster)


def test_failed(cluster):
  cluster.file("follows", "Failed\n")
  result = launch(cluster)
  assert result.returncode == 1 and "JobSet half failed" in result.stderr


def test_deleted_meanwhile(cluster):
  cluster.file("follows", "deleted\n")
  result = launch(cluster)
  assert result.returncode == 1 and "was deleted; the same command goes on" in result.stderr


def test_its_own_jobset_is_watched_and_not_made_again(cluster):
  cluster.file("jobset", "jane-doe ")
  cluster.file("follows", "Completed\n")
  result = launch(cluster)
  assert result.returncode == 0 and "watching it" in result.stderr
  assert not cluster.calls("create")


@pytest.mark.parametrize(
  ("jobset", "complaint"),
  [
    ("bob ", "not yours"),
    (" ", "not yours"),
    ("bob Completed", "not yours"),
    ("jane-doe Completed", "has ended already"),
    ("jane-doe Failed", "has ended already"),
  ],
)
def test_what_is_there_is_not_touched(cluster, jobset, complaint):
  cluster.file("jobset", jobset)
  result = launch(cluster)
  assert result.returncode == 2 and complaint in result.stderr
  assert len(cluster.calls()) == 1 and cluster.calls("get")


@pytest.mark.parametrize(
  ("options", "complaint"),
  [
    (["--image=zeda"], "no image with a tag"),
    (["--image=eu/Zeda image:1"], "no image with a tag"),
    (["--namespace=Team"], "--namespace=Team is no name"),
    (["--service-account=a b"], "is no name of Kubernetes"),
    (["--queue=q_1"], "is no name of Kubernetes"),
    (["--storage=pvc:A"], "is no name of Kubernetes"),
    (["--storage=gs://bucket"], "needs --service-account"),
  ],
)
def test_bad_input_is_refused(cluster, options, complaint):
  result = launch(cluster, *options)
  assert (result.returncode, cluster.calls()) == (2, []) and complaint in result.stderr


def test_what_only_the_cloud_knows_is_asked_before_anything_is_created(cluster):
  result = launch(cluster, "--storage=gs://missing", "--service-account=sa")
  assert result.returncode == 2 and "--storage=gs://missing cannot be read" in result.stderr
  cluster.file("unreachable", "")
  result = launch(cluster)
  assert result.returncode == 2 and "is JobSet installed" in result.stderr
  assert not cluster.calls("create")


def test_a_refused_manifest(cluster):
  cluster.file("refuses", "")
  result = launch(cluster)
  assert result.returncode == 2 and "cannot create the JobSet" in result.stderr
