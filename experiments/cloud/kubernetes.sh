#!/usr/bin/env bash
# Runs an experiment on Kubernetes as a JobSet (jobset.yaml), on one or several hosts. Whenever a host ends with exit code 75
# (interrupted, checkpoint saved) or is lost, all start again and go on; exit code 2, a mistake, ends the JobSet.
#
#   experiments/cloud/kubernetes.sh --name=NAME --image=IMAGE --claim=CLAIM [options] -- \
#     experiments.sop --flagfile=FILE --workdir=/data/RUN ...
#
#   --accelerator=gpu      or tpu (of GKE), or cpu
#   --hosts=1              pods; of a TPU slice, all its hosts
#   --chips=1              GPUs or TPU chips of each host
#   --tpu_type=TYPE        such as tpu-v6e-slice, with --tpu_topology=4x4
#   --claim=CLAIM          a PersistentVolumeClaim (ReadWriteMany) to have at /data, or
#   --bucket=BUCKET        on GKE, a Cloud Storage bucket, by the Cloud Storage FUSE CSI driver
#   --service_account=default
#   --namespace=default
#   --max_restarts=100
#   --dry_run              prints the command with its manifest and applies nothing
#
# --workdir must lie under /data: what is in the container goes away with it. The image is that of Containerfile.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name="" image="" accelerator=gpu hosts=1 chips=1 tpu_type="" tpu_topology="" claim="" bucket="" service_account=default namespace=default max_restarts=100
options="name image accelerator hosts chips tpu_type tpu_topology claim bucket service_account namespace max_restarts" switches=""
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"
parse "$@"
label='[a-z0-9]([-a-z0-9]*[a-z0-9])?'
need name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' my-run
need image '[[:alnum:]][[:alnum:]._/:@-]+' europe-docker.pkg.dev/project/images/rll_jax:cuda13
need accelerator 'gpu|tpu|cpu' gpu
need hosts '[1-9][0-9]*' 2
need chips '[1-9][0-9]*' 4
need service_account "$label" default
need namespace "$label" default
need max_restarts '[0-9]+' 100
[[ ! $claim || ! $bucket ]] || mistake "--claim and --bucket: only one can be at /data"
if [[ ! $claim$bucket ]] || ! under /data; then
  mistake "--workdir=$workdir goes away with the pod: use --claim or --bucket, and /data/..."
fi

if [[ $claim ]]; then
  need claim "$label" data
  data="persistentVolumeClaim: {claimName: '$claim'}" pod_annotations=""
else # no cache of metadata: hosts see each other's files at once; a checkpoint ends with a folder's renaming, refused by default
  need_bucket
  fuse=implicit-dirs,rename-dir-limit=200000,metadata-cache:ttl-secs:0,uid=1000,gid=1000
  data="csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: {bucketName: '$bucket', mountOptions: '$fuse'}}"
  pod_annotations="gke-gcsfuse/volumes: 'true', gke-gcsfuse/memory-limit: 2Gi"
fi
annotations="" selector="" limits="" platform=cpu
args=("${experiment[@]//\$(/\$\$(}") # Kubernetes would fill in $(NAME)
if [[ $accelerator == tpu ]]; then # JAX finds the other hosts by itself
  need tpu_type '[a-z0-9-]+' tpu-v6e-slice
  need tpu_topology '[0-9]+(x[0-9]+){1,2}' 4x4
  platform=tpu limits="google.com/tpu: $chips"
  annotations="alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
  selector="cloud.google.com/gke-tpu-accelerator: '$tpu_type', cloud.google.com/gke-tpu-topology: '$tpu_topology'"
  args+=(--multihost)
else
  if [[ $accelerator == gpu ]]; then platform=cuda limits="nvidia.com/gpu: $chips"; fi
  if ((hosts > 1)); then
    # shellcheck disable=SC2016
    args+=(--multihost "--coordinator_address=$name-run-0-0.$name:8476" "--num_processes=$hosts" '--process_id=$(PROCESS_ID)')
  fi
fi
list=""
for argument in "${args[@]}"; do
  [[ $argument != *[[:cntrl:]]* ]] || mistake "a flag has a line break or the like in it: $(quote "$argument")"
  list+="${list:+, }'${argument//\'/\'\'}'"
done

fill() { manifest=${manifest//"__$1__"/"$2"}; }
manifest=$(grep -v '^#' "$here/jobset.yaml")
fill NAME "'$name'"; fill IMAGE "'$image'"; fill HOSTS "$hosts"; fill MAX_RESTARTS "$max_restarts"
fill SERVICE_ACCOUNT "'$service_account'"; fill PLATFORM "$platform"
fill ANNOTATIONS "{$annotations}"; fill POD_ANNOTATIONS "{$pod_annotations}"; fill NODE_SELECTOR "{$selector}"; fill LIMITS "{$limits}"
fill DATA "{name: data, $data}"; fill ARGS "[$list]" # last: what a user wrote is not filled in
command=(kubectl apply --namespace="$namespace" --filename=-)
if $dry_run; then
  echo "$(quote "${command[@]}") <<'MANIFEST'"$'\n'"$manifest"$'\n'MANIFEST
else
  "${command[@]}" <<<"$manifest"
fi
