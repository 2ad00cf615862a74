#!/usr/bin/env bash
# Runs an experiment on this machine's NVIDIA GPUs, and again each time it ends with exit code 75 (interrupted, checkpoint saved).
#
#   experiments/cloud/gpu.sh [options] -- experiments.sop --flagfile=FILE --workdir=DIR ...
#
# DIR is any path, local or mounted.
#
#   --gpus=0,1         these GPUs alone; all by default
#   --install          first installs the JAX wheel of --cuda and the requirements, by pip
#   --cuda=13          or 12
#   --python=python    of the environment to use
#   --max_restarts=100
#   --dry_run          prints the commands and runs nothing
#
# SIGTERM and Ctrl-C let the run finish its step and save; the script then ends with 75 too. JAX_PLATFORMS=cuda
# is set, so that JAX does not fall back to the CPU; what you set yourself stays.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gpus=all cuda=13 python=python max_restarts=100 install=false
options="gpus cuda python max_restarts" switches="install"
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"
parse "$@"
need gpus 'all|[0-9]+(,[0-9]+)*' 0,1
need cuda '12|13' 13
need max_restarts '[0-9]+' 100
cd "$here/../.."

if $install; then
  run "$python" -m pip install "jax[cuda$cuda]" -r requirements.txt
fi
command=(env "JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}")
if [[ $gpus != all ]]; then command+=("CUDA_VISIBLE_DEVICES=$gpus"); fi
command+=("$python" -m "${experiment[@]}")
if $dry_run; then
  quote "${command[@]}"
  exit 0
fi

pass_on() { kill -TERM "$child"; }
for ((restarts = 0; ; restarts++)); do
  code=0
  supervise pass_on "${command[@]}" || code=$?
  if ((code != 75)) || $signalled || ((restarts == max_restarts)); then
    exit "$code"
  fi
  echo "gpu.sh: interrupted at a checkpoint; running again" >&2
done
