#!/usr/bin/env bash
# Creates a Cloud TPU VM or a pod slice, installs this commit on all its hosts, mounts a Cloud Storage bucket on each,
# runs an experiment there, and deletes the TPU.
# After exit code 75 (interrupted, checkpoint saved) the experiment runs again. A spot slice that was preempted is
# created again. An existing TPU of this name is used and not deleted.
#
#   experiments/cloud/tpu.sh --name=NAME --zone=ZONE --accelerator_type=v6e-16 --bucket=BUCKET [options] -- \
#     experiments.sop --flagfile=FILE --workdir=/mnt/BUCKET/RUN ...
#
#   --bucket=BUCKET               the name alone; gcsfuse mounts it at /mnt/BUCKET, and --workdir must lie there
#   --project=PROJECT             by default gcloud's own
#   --runtime_version=VERSION     by default v2-alpha-tpuv6e; `gcloud compute tpus tpu-vm versions list` lists them
#   --queued                      wait in the queue for the TPU (queued-resources)
#   --spot                        use spot capacity, queued too
#   --git=URL                     install a clone of this URL instead of the commit here, which is copied with scp
#   --setup=COMMAND               run on each host after installing, such as 'cp -r /mnt/BUCKET/sop .'
#   --keep                        do not delete the TPU at the end; without --spot, --bucket may then be left out
#   --max_restarts=100
#   --dry_run                     print the commands and run nothing
set -euo pipefail
script_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name="" zone="" accelerator_type="" bucket="" project="" runtime_version=v2-alpha-tpuv6e
git="" setup="" max_restarts=100 queued=false spot=false keep=false
options="name zone accelerator_type bucket project runtime_version git setup max_restarts" switches="queued spot keep"
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$script_folder/common.sh"
parse_options "$@"
require name '[a-z]([-a-z0-9]{0,60}[a-z0-9])?' my-tpu
require zone '[a-z]+-[a-z]+[0-9]+-[a-z]' us-east5-b
require accelerator_type 'v[0-9]+[a-z]*-[0-9]+' v6e-16
require max_restarts '[0-9]+' 100
if $spot; then queued=true; fi
mount="" hold=""
if [[ $bucket ]] || ! $keep || $spot; then
  lost="--workdir=$workdir is lost when the TPU is deleted"
  [[ $bucket ]] || usage_error "$lost: give --bucket=BUCKET and a --workdir under /mnt/BUCKET"
  require_bucket
  workdir_is_under "/mnt/$bucket" || usage_error "$lost: give a --workdir under /mnt/$bucket"
  # Root creates the folder, so that nothing can be written beneath it while the bucket is not mounted. Metadata are not
  # cached, so that each host sees what another wrote. Renaming folders, which ends a checkpoint, is refused by default.
  gcsfuse="sudo gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 -o allow_other \
--uid=\$(id -u) --gid=\$(id -g) $bucket /mnt/$bucket"
  mount="if ! mountpoint -q /mnt/$bucket; then sudo mkdir -p /mnt/$bucket && $gcsfuse; fi && "
  # The open folder keeps gcsfuse from unmounting at the SIGTERM of a shutdown, before the run has saved.
  hold=" 9</mnt/$bucket"
fi
cd "$script_folder/../.."

where=(--zone="$zone")
if [[ $project ]]; then where+=(--project="$project"); fi
kind=tpu-vm shape=(--version="$runtime_version") removal=(--quiet)
if $queued; then
  kind=queued-resources shape=(--node-id="$name" --runtime-version="$runtime_version") removal=(--force --quiet)
fi
if $spot; then shape+=(--spot); fi
created=false present=false installed=false archive=/tmp/rll_jax.tgz

tpus() { run gcloud compute tpus "$1" "$2" "$name" "${where[@]}" "${@:3}"; }
# Ends with the exit code of the first host that failed.
on_all_hosts() { tpus tpu-vm ssh --worker=all --command="$1"; }
node_state() {
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null || true
}
delete() { tpus "$kind" delete "${removal[@]}"; }
clean_up() {
  $dry_run || rm -f "$archive"
  if $created && ! $keep; then
    delete || echo "tpu.sh: $name could not be deleted: it may still exist and cost money" >&2
  fi
}
if ! $dry_run; then
  archive=$(mktemp)
  trap clean_up EXIT
fi

create() {
  created=true
  tpus "$kind" create --accelerator-type="$accelerator_type" "${shape[@]}" || {
    code=$? created=false
    exit "$code"
  }
  while $queued; do
    state=$(tpus queued-resources describe --format='value(state.state)' || true)
    case $state in
      ACTIVE) break ;;
      SUSPEND*) return 75 ;; # preempted before it was ready
      FAILED)
        echo "tpu.sh: the request for $name failed" >&2
        exit 1
        ;;
      gcloud*) # the command that --dry_run prints
        echo "$state"
        break
        ;;
    esac
    sleep 30
  done
}

install() {
  local source="mkdir -p rll_jax && tar -xzf rll_jax.tgz -C rll_jax" fuse=""
  local apt=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  if [[ $bucket ]]; then
    # `until`: the automatic updates of a new machine may hold apt's lock
    fuse="if ! command -v gcsfuse >/dev/null; then curl -fsS $apt/doc/apt-key.gpg | sudo tee $key >/dev/null && \
echo \"deb [signed-by=$key] $apt gcsfuse-\$(lsb_release -cs) main\" | \
sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null && timeout 600 bash -c \
'until sudo apt-get -qq update && sudo apt-get -qqy install gcsfuse; do sleep 10; done'; fi && "
  fi
  if [[ $git ]]; then
    source="{ test -d rll_jax || git clone --depth=1 $(quote "$git") rll_jax; }"
  else
    run git archive --format=tar.gz --output="$archive" HEAD || return
    run gcloud compute tpus tpu-vm scp "$archive" "$name:rll_jax.tgz" "${where[@]}" --worker=all || return
  fi
  # uv installs a Python: the image's own may be older than 3.11
  on_all_hosts "$fuse$mount$source && cd rll_jax && python3 -m pip install -q --user uv && \
python3 -m uv venv -q --allow-existing --python=3.12 ~/venv && \
python3 -m uv pip install -q --python ~/venv 'jax[tpu]' -r requirements.txt${setup:+ && $setup}"
}

attempt() {
  if ! $present; then
    if $dry_run || $created || [[ $(node_state) != READY ]]; then create || return; fi
    present=true
  fi
  if ! $installed; then install || return; fi
  installed=true
  on_all_hosts "${mount}cd rll_jax && exec env JAX_PLATFORMS=tpu ~/venv/bin/python -m \
$(quote "${experiment[@]}") --multihost$hold"
}

for ((restarts = 0; ; restarts++)); do
  code=0
  attempt || code=$?
  if $dry_run; then clean_up; fi
  if $dry_run || ((code == 0 || code == 2)); then exit "$code"; fi
  if $spot && [[ $(node_state) != READY ]]; then
    echo "tpu.sh: $name was preempted: requesting another" >&2
    ((restarts == max_restarts)) || delete || true
    created=true present=false installed=false code=75
    sleep 30
  fi
  # 255: ssh lost the connection
  if ((code != 75 && code != 255)) || ((restarts == max_restarts)); then exit "$code"; fi
  echo "tpu.sh: running the experiment again from its last checkpoint" >&2
done
