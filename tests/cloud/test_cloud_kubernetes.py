"""kubernetes.sh and its manifest; the stand-ins are those of test_cloud."""

from tests.helpers.cloud import DATA, RUN, manifest


def test_kubernetes_applies_what_it_prints(machine):
    arguments = [
        "--name=run",
        "--image=host/rll_jax:cuda13",
        "--hosts=2",
        "--chips=8",
        "--namespace=mine",
        "--bucket=some.bucket",
        *DATA,
    ]
    shown = machine.run("kubernetes.sh", "--dry_run", *arguments)
    assert machine.calls() == []
    first, *lines, last = shown.stdout.splitlines()
    assert (
        first == "kubectl apply --namespace=mine --filename=- <<'MANIFEST'" and last == "MANIFEST"
    )
    assert machine.run("kubernetes.sh", *arguments).returncode == 0
    assert machine.calls() == [["kubectl", "apply", "--namespace=mine", "--filename=-"]]
    assert (machine.folder / "manifest").read_text().splitlines() == lines
    assert "__NAME__" not in shown.stdout and "__HOSTS__" not in shown.stdout


FLAGS = [flag.replace("$(", "$$(") for flag in DATA[1:]]  # Kubernetes makes $( of it
SHM = {"name": "shm", "emptyDir": {"medium": "Memory"}}


def made(machine, *options):
    """Returns the job set, the job, the pod and the container of a dry run's manifest."""
    shown = machine.run(
        "kubernetes.sh", "--dry_run", "--name=run", "--image=host/rll_jax:a", *options, *DATA
    )
    assert shown.returncode == 0, shown.stderr
    jobset = manifest("\n".join(shown.stdout.splitlines()[1:-1]))
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
        "shm": "/dev/shm",
        "data": "/data",
    }
    return jobset, spec, spec["template"]["spec"], container


def test_kubernetes_manifest_of_gpus(machine):
    jobset, job, pod, container = made(
        machine, "--hosts=2", "--chips=8", "--claim=data", "--max_restarts=7"
    )
    assert (jobset["apiVersion"], jobset["kind"], jobset["metadata"]["name"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
        "run",
    )
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    (rule,) = job["podFailurePolicy"]["rules"]  # 2 ends it, and 2 alone
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }
    assert (job["completions"], job["parallelism"], job["backoffLimit"], job["completionMode"]) == (
        2,
        2,
        0,
        "Indexed",
    )
    assert pod["restartPolicy"] == "Never" and pod["securityContext"]["runAsNonRoot"]
    assert (
        container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
        and container["image"] == "host/rll_jax:a"
    )
    coordinator = "--coordinator_address=run-run-0-0.run:8476"
    assert container["args"] == [
        *FLAGS,
        "--multihost",
        coordinator,
        "--num_processes=2",
        "--process_id=$(PROCESS_ID)",
    ]
    assert "PROCESS_ID" in [variable["name"] for variable in container["env"]]
    assert pod["volumes"] == [SHM, {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
    assert job["template"]["metadata"]["annotations"] == jobset["metadata"]["annotations"] == {}


def test_kubernetes_manifest_of_tpus_and_a_bucket(machine):
    jobset, job, pod, container = made(
        machine,
        "--bucket=some.bucket",
        "--accelerator=tpu",
        "--tpu_type=tpu-v6e-slice",
        "--tpu_topology=4x4",
        "--hosts=4",
        "--chips=4",
    )
    assert container["args"] == [*FLAGS, "--multihost"] and container["resources"] == {
        "limits": {"google.com/tpu": 4}
    }
    assert set(pod["nodeSelector"].values()) == {"tpu-v6e-slice", "4x4"}
    fuse = "implicit-dirs,rename-dir-limit=200000,metadata-cache:ttl-secs:0,uid=1000,gid=1000"
    attributes = {"bucketName": "some.bucket", "mountOptions": fuse}
    assert pod["volumes"] == [
        SHM,
        {
            "name": "data",
            "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes},
        },
    ]
    assert pod["securityContext"]["runAsUser"] == 1000
    assert job["template"]["metadata"]["annotations"] == {
        "gke-gcsfuse/volumes": "true",
        "gke-gcsfuse/memory-limit": "2Gi",
    }
    assert [*jobset["metadata"]["annotations"].values()] == ["cloud.google.com/gke-nodepool"]


def test_kubernetes_manifest_of_cpus(machine):
    *_, container = made(machine, "--accelerator=cpu", "--claim=data")
    assert container["args"] == FLAGS and container["resources"] == {"limits": {}}


def test_kubernetes_wants_a_place_that_stays(machine):
    named = ["--name=run", "--image=aa"]
    for options, words in (
        (["--claim=data", *RUN, "--workdir=runs/a"], "is lost when the pod ends"),
        (DATA, "is lost when the pod ends"),
        (["--claim=data", "--bucket=bucket", *DATA], "give only one of them"),
        (["--bucket=gs://bucket", *DATA], "--bucket=gs://bucket: expected"),
        (["--claim=data", *DATA, "--note=two\nlines"], "expected a flag without a line break"),
    ):
        result = machine.run("kubernetes.sh", *named, *options)
        assert result.returncode == 2 and words in result.stderr
