#!/usr/bin/env bash
# Train on several nodes under SLURM; launch/train.py's arguments follow. Submit from the repository's folder:
#
#   sbatch --nodes 4 launch/slurm.sh --config launch/imagenet256_xl.yaml --data latents/imagenet256
#
# One task a GPU is started by srun: no hostfile and no ssh. All nodes must see repository, data and the run's folder
# under the same paths. The job goes back into the queue before its time is up, when it is pre-empted and when a node
# fails, and continues from the newest checkpoint, as always when the same command is given again; so --time may be
# short, but must be longer than --checkpoint-every steps take. Cancel it by scancel.
#
# GPUs a node are --gpus-per-node, for both: sbatch --gpus-per-node 4 --ntasks-per-node 4 launch/slurm.sh ...
# From the environment:
#   PYTHON       the interpreter (default: .venv/bin/python where there is one, else python)
#   SRUN         more options of srun, for example "--cpu-bind=cores"
#   MASTER_PORT  a port that is free on the first node (default: one made from the job's number)
#
#SBATCH --job-name=mpdit
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#SBATCH --signal=B:USR1@120
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: this is no SLURM job: submit it, sbatch --nodes N launch/slurm.sh ARGUMENTS" >&2
    exit 2
fi
if [ $# -eq 0 ]; then
    echo "error: no arguments: give those of launch/train.py, for example --config launch/imagenet256_xl.yaml" >&2
    exit 2
fi
# SLURM runs a copy of this script from elsewhere, in the folder it was submitted from.
if [ ! -f launch/train.py ]; then
    echo "error: $PWD has no launch/train.py: submit from the repository's folder" >&2
    exit 2
fi
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python
python=${PYTHON:-$python}

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}

# Two minutes before the end SLURM tells this shell, and no other process.
requeue() {
    told=yes
    echo "the time is nearly up: back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID" || echo "warning: SLURM refused to requeue the job: submit it again" >&2
}
trap requeue USR1

# A rank that fails ends the others. Ranks, and their number, are read from what srun sets.
read -ra options <<< "${SRUN:-}"
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" ${options[@]+"${options[@]}"} \
    "$python" launch/train.py "$@" &
step=$!
# The signal ends `wait`, not the step.
while told='' status=0; wait "$step" || status=$?; [ -n "$told" ]; do :; done
exit "$status"
