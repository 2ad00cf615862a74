#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
#SBATCH --open-mode=append
# Submits an experiment to Slurm, one process for each GPU. Before its time is up, or when it is preempted, the run saves a
# checkpoint and ends with exit code 75; the job is then queued again and goes on.
#
#   experiments/cloud/slurm.sh [options] -- experiments.sop --flagfile=FILE --workdir=DIR ...
#
#   --nodes=1
#   --gpus_per_node=1   0: one process a node, on its CPUs
#   --cpus_per_task=4   for each process; its --threads
#   --time=1-00:00:00   of one turn in the queue
#   --job_name=NAME     the experiment's by default
#   --python=python     of the environment to use, on the nodes
#   --dry_run           prints the command and submits nothing
#
# Other options of sbatch go in by its variables, such as SBATCH_PARTITION and SBATCH_ACCOUNT. Submit from the folder of README.md.
# It, the data and DIR lie on a file system that all nodes share.
set -euo pipefail

if [[ ${1-} == --in_job ]]; then # this file once more, as the batch script; Slurm has copied it away from common.sh
  shift
  # shellcheck source-path=SCRIPTDIR source=common.sh
  source experiments/cloud/common.sh
  # shellcheck disable=SC2329 # by supervise
  pass_on() { scancel --signal=TERM "$SLURM_JOB_ID"; } # to the steps: srun itself would kill them
  code=0
  supervise pass_on srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$@" || code=$?
  # A job that was cancelled, or that Slurm queues again by itself, is not RUNNING any more.
  if ((code == 75)) && [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nodes=1 gpus_per_node=1 cpus_per_task=4 time=1-00:00:00 job_name="" python=python
options="nodes gpus_per_node cpus_per_task time job_name python" switches=""
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"
parse "$@"
need nodes '[1-9][0-9]*' 1
need gpus_per_node '[0-9]+' 8
need cpus_per_task '[1-9][0-9]*' 4
need time '[0-9:-]+' 1-00:00:00
cd "$here/../.."

tasks=(--nodes="$nodes" --ntasks-per-node="$((gpus_per_node > 0 ? gpus_per_node : 1))" --cpus-per-task="$cpus_per_task")
platform=cpu
if ((gpus_per_node > 0)); then
  tasks+=(--gpus-per-node="$gpus_per_node")
  platform=cuda
fi
run sbatch --job-name="${job_name:-${experiment[0]}}" --time="$time" "${tasks[@]}" experiments/cloud/slurm.sh --in_job \
  env "JAX_PLATFORMS=${JAX_PLATFORMS:-$platform}" "$python" -m "${experiment[@]}" --multihost
