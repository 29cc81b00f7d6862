#!/bin/bash
# Trains on a SLURM cluster: one task for each node, which drives all of its GPUs.
#
#   sbatch --nodes=8 launch/slurm.sh configs/mixtral_8x7b.py /shared/runs/8x7b --config.data.source=jsonl ...
#
# Everything after the config and the workdir goes to train.py. The workdir and the token cache must be on a file system
# that all nodes share. The job finds its other processes by itself, from SLURM's environment.
#
# SLURM sends SIGTERM five minutes ahead of the end; train.py then finishes its step, saves, and ends with status 143, and
# the job goes back into the queue. The same command continues from its last checkpoint, also on another number of nodes.
#SBATCH --job-name=mixtral_jax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail
if [ $# -lt 2 ]; then
  echo "usage: sbatch --nodes=N launch/slurm.sh CONFIG WORKDIR [flags of train.py]" >&2
  exit 2
fi
config=$1
workdir=$2
shift 2
cd "${SLURM_SUBMIT_DIR:-.}"

# jax takes three quarters of a GPU's memory unless told otherwise.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}

# Without --kill-on-bad-exit the processes end by themselves when one dies, and say which.
srun --kill-on-bad-exit=0 .venv/bin/python train.py --config="$config" --workdir="$workdir" "$@"
status=$?
if [ "$status" -eq 143 ]; then # stopped by SIGTERM, and saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
