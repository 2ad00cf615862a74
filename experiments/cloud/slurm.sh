#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
#SBATCH --open-mode=append
# Submits an experiment to Slurm, with one process for each GPU. Before its time limit and at a preemption the run saves
# a checkpoint and ends with exit code 75. The job is then queued again and resumes from the checkpoint.
#
#   experiments/cloud/slurm.sh [options] -- experiments.sop --flagfile=FILE --workdir=DIR ...
#
#   --nodes=1
#   --gpus_per_node=1   0: one process on each node, on its CPUs
#   --cpus_per_task=4   CPUs of each process; give the experiment as many --threads
#   --time=1-00:00:00   time limit of one turn in the queue
#   --job_name=NAME     by default the name of the experiment
#   --python=python     the Python of the environment to use, on the nodes
#   --dry_run           print the command and submit nothing
#
# Give other options of sbatch by its variables, such as SBATCH_PARTITION and SBATCH_ACCOUNT. Submit from the folder of
# README.md. That folder, the data and DIR must lie on a file system that all nodes share.
set -euo pipefail

# The job runs this file as its batch script. Slurm has copied the file to a folder without common.sh.
if [[ ${1-} == --in_job ]]; then
  shift
  # shellcheck source-path=SCRIPTDIR source=common.sh
  source experiments/cloud/common.sh
  # shellcheck disable=SC2329 # `supervise` calls it
  pass_on() { scancel --signal=TERM "$SLURM_JOB_ID"; } # signals the job's steps; srun itself would kill them
  code=0
  supervise pass_on srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$@" || code=$?
  # The state is not RUNNING if the job was cancelled, or if Slurm queues it again by itself.
  if ((code == 75)) && [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
fi

script_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nodes=1 gpus_per_node=1 cpus_per_task=4 time=1-00:00:00 job_name="" python=python
options="nodes gpus_per_node cpus_per_task time job_name python" switches=""
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$script_folder/common.sh"
parse_options "$@"
require nodes '[1-9][0-9]*' 1
require gpus_per_node '[0-9]+' 8
require cpus_per_task '[1-9][0-9]*' 4
require time '[0-9:-]+' 1-00:00:00
cd "$script_folder/../.."

tasks_per_node=$((gpus_per_node > 0 ? gpus_per_node : 1)) platform=cpu
tasks=(--nodes="$nodes" --ntasks-per-node="$tasks_per_node" --cpus-per-task="$cpus_per_task")
if ((gpus_per_node > 0)); then
  tasks+=(--gpus-per-node="$gpus_per_node")
  platform=cuda
fi
run sbatch --job-name="${job_name:-${experiment[0]}}" --time="$time" "${tasks[@]}" \
  experiments/cloud/slurm.sh --in_job \
  env "JAX_PLATFORMS=${JAX_PLATFORMS:-$platform}" "$python" -m "${experiment[@]}" --multihost
