#!/usr/bin/env bash
# Runs an experiment on Kubernetes as a JobSet (jobset.yaml), on one or several hosts. If a host is lost or ends with
# exit code 75 (interrupted, checkpoint saved), all hosts start again and resume from the last checkpoint. Exit code 2,
# a mistake in the flags, ends the JobSet.
#
#   experiments/cloud/kubernetes.sh --name=NAME --image=IMAGE --claim=CLAIM [options] -- \
#     experiments.sop --flagfile=FILE --workdir=/data/RUN ...
#
#   --accelerator=gpu      gpu, tpu (on GKE) or cpu
#   --hosts=1              number of pods; for a TPU slice, all its hosts
#   --chips=1              GPUs or TPU chips of each host
#   --tpu_type=TYPE        such as tpu-v6e-slice, with --tpu_topology=4x4
#   --claim=CLAIM          mount this PersistentVolumeClaim (ReadWriteMany) at /data; or
#   --bucket=BUCKET        on GKE, mount this Cloud Storage bucket at /data, by the Cloud Storage FUSE CSI driver
#   --service_account=default
#   --namespace=default
#   --max_restarts=100
#   --dry_run              print the command with its manifest and apply nothing
#
# --workdir must lie under /data: files in the container are lost with it. IMAGE is built from Containerfile.
set -euo pipefail
script_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name="" image="" accelerator=gpu hosts=1 chips=1 tpu_type="" tpu_topology="" claim="" bucket=""
service_account=default namespace=default max_restarts=100
options="name image accelerator hosts chips tpu_type tpu_topology claim bucket service_account namespace max_restarts"
switches=""
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$script_folder/common.sh"
parse_options "$@"
label='[a-z0-9]([-a-z0-9]*[a-z0-9])?'
require name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' my-run
require image '[[:alnum:]][[:alnum:]._/:@-]+' europe-docker.pkg.dev/project/images/rll_jax:cuda13
require accelerator 'gpu|tpu|cpu' gpu
require hosts '[1-9][0-9]*' 2
require chips '[1-9][0-9]*' 4
require service_account "$label" default
require namespace "$label" default
require max_restarts '[0-9]+' 100
[[ ! $claim || ! $bucket ]] || usage_error "--claim and --bucket: give only one of them, it is mounted at /data"
if [[ ! $claim$bucket ]] || ! workdir_is_under /data; then
  usage_error "--workdir=$workdir is lost when the pod ends: give --claim or --bucket, and a --workdir under /data"
fi

if [[ $claim ]]; then
  require claim "$label" data
  data="persistentVolumeClaim: {claimName: '$claim'}" pod_annotations=""
else
  # Metadata are not cached, so that hosts see each other's files at once. Renaming folders, which ends a checkpoint, is
  # refused by default.
  require_bucket
  fuse=implicit-dirs,rename-dir-limit=200000,metadata-cache:ttl-secs:0,uid=1000,gid=1000
  attributes="{bucketName: '$bucket', mountOptions: '$fuse'}"
  data="csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: $attributes}"
  pod_annotations="gke-gcsfuse/volumes: 'true', gke-gcsfuse/memory-limit: 2Gi"
fi
annotations="" selector="" limits="" platform=cpu
args=("${experiment[@]//\$(/\$\$(}") # Kubernetes would replace $(NAME)
if [[ $accelerator == tpu ]]; then # JAX finds the other hosts by itself
  require tpu_type '[a-z0-9-]+' tpu-v6e-slice
  require tpu_topology '[0-9]+(x[0-9]+){1,2}' 4x4
  platform=tpu limits="google.com/tpu: $chips"
  annotations="alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
  selector="cloud.google.com/gke-tpu-accelerator: '$tpu_type', cloud.google.com/gke-tpu-topology: '$tpu_topology'"
  args+=(--multihost)
else
  if [[ $accelerator == gpu ]]; then platform=cuda limits="nvidia.com/gpu: $chips"; fi
  if ((hosts > 1)); then
    args+=(--multihost "--coordinator_address=$name-run-0-0.$name:8476" "--num_processes=$hosts")
    # shellcheck disable=SC2016 # Kubernetes replaces it
    args+=('--process_id=$(PROCESS_ID)')
  fi
fi
list=""
for argument in "${args[@]}"; do
  [[ $argument != *[[:cntrl:]]* ]] ||
    usage_error "$(printf %q "$argument"): expected a flag without a line break or another control character"
  list+="${list:+, }'${argument//\'/\'\'}'"
done

fill() { manifest=${manifest//"__$1__"/"$2"}; }
manifest=$(grep -v '^#' "$script_folder/jobset.yaml")
fill NAME "'$name'"
fill IMAGE "'$image'"
fill HOSTS "$hosts"
fill MAX_RESTARTS "$max_restarts"
fill SERVICE_ACCOUNT "'$service_account'"
fill PLATFORM "$platform"
fill ANNOTATIONS "{$annotations}"
fill POD_ANNOTATIONS "{$pod_annotations}"
fill NODE_SELECTOR "{$selector}"
fill LIMITS "{$limits}"
fill DATA "{name: data, $data}"
fill ARGS "[$list]" # last, so that nothing in the user's flags is filled in
command=(kubectl apply --namespace="$namespace" --filename=-)
if $dry_run; then
  echo "$(quote "${command[@]}") <<'MANIFEST'"$'\n'"$manifest"$'\n'MANIFEST
else
  "${command[@]}" <<<"$manifest"
fi
