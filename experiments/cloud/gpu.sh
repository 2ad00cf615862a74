#!/usr/bin/env bash
# Runs an experiment on this machine's NVIDIA GPUs. If the run ends with exit code 75 (interrupted, checkpoint saved),
# the script runs it again.
#
#   experiments/cloud/gpu.sh [options] -- experiments.sop --flagfile=FILE --workdir=DIR ...
#
# DIR is any path, local or mounted.
#
#   --gpus=0,1         use only these GPUs; by default all of them
#   --install          first install the JAX wheel of --cuda and the requirements, with pip
#   --cuda=13          13 or 12
#   --python=python    the Python of the environment to use
#   --max_restarts=100
#   --dry_run          print the commands and run nothing
#
# At SIGTERM or Ctrl-C the run finishes its step and saves a checkpoint; the script then ends with exit code 75, too.
# The script sets JAX_PLATFORMS=cuda, so that JAX does not fall back to the CPU. A value that you have set is kept.
set -euo pipefail
script_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gpus=all cuda=13 python=python max_restarts=100 install=false
options="gpus cuda python max_restarts" switches="install"
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$script_folder/common.sh"
parse_options "$@"
require gpus 'all|[0-9]+(,[0-9]+)*' 0,1
require cuda '12|13' 13
require max_restarts '[0-9]+' 100
cd "$script_folder/../.."

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
  echo "gpu.sh: the run was interrupted and has saved a checkpoint; running it again" >&2
done
