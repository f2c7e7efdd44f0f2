#!/usr/bin/env bash
# Train on several nodes under SLURM; launch/train.py's arguments follow. Submit from the repository's folder:
#
#   sbatch --nodes 4 launch/slurm.sh --config launch/imagenet256_xl.yaml --data latents/imagenet256
#
# One task a GPU is started by srun: no hostfile and no ssh. All nodes must see repository, data and the run's folder
# under the same paths. Before its time is up, or when it is pre-empted with a time of grace, the run is saved after the
# step that it is at, and the job goes back into the queue; so it does when a node fails, and then continues from the
# newest checkpoint. Cancel it by scancel: it is saved too, but not queued again. To stop it in the same way and have it
# continue, scancel --signal=USR1 --batch JOB.
#
# GPUs a node are --gpus-per-node, for both: sbatch --gpus-per-node 4 --ntasks-per-node 4 launch/slurm.sh ...
# From the environment:
#   PYTHON       the interpreter (default: .venv/bin/python where there is one, else python)
#   SRUN         more options of srun, for example "--cpu-bind=cores"
#   MASTER_PORT  a port that is free on the first node (default: one made from the job's number)
#   REQUEUES     how often the job may go back into the queue (default: 1000)
#   SAVING       seconds that the run is given to save and end (default: 90; less than SLURM's 120 of --signal below)
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

# The run's code when it was stopped and saved, as mpdit/training/safety/stop.py has it.
saved=75
# A rank that ends has a minute before srun ends the others: time to save, or to say what went wrong. Ranks, and their
# number, are read from what srun sets.
read -ra options <<< "${SRUN:-}"
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" ${options[@]+"${options[@]}"} \
    "$python" launch/train.py "$@" &
step=$!

# SLURM tells this shell, and no other process, that the time is nearly up (USR1), or that the job is to end (TERM).
told=''
trap 'told=time' USR1
trap 'told=end' TERM
runs() { kill -0 "$step" 2> /dev/null; }
# A signal ends `wait`, not the step.
while status=0; wait "$step" || status=$?; [ -z "$told" ] && runs; do :; done
if runs; then
    kill -USR1 "$step" # which srun hands on to all ranks; a SIGTERM would make it kill them
    for ((left = ${SAVING:-90}; left > 0; left--)); do
        runs || break
        sleep 1
    done
    if [ "$told" = end ] || ! runs; then
        status=0
        wait "$step" || status=$?
    fi
fi

requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${REQUEUES:-1000}" ]; then
        echo "not queued again, as it was $SLURM_RESTART_COUNT times: give more REQUEUES, or submit it again" >&2
    else
        echo "$1: back into the queue" >&2
        scontrol requeue "$SLURM_JOB_ID" || echo "warning: SLURM refused to requeue the job: submit it again" >&2
    fi
}
# A job that was cancelled is not running any more.
runs_still() { [[ "$(scontrol -o show job "$SLURM_JOB_ID" 2> /dev/null)" == *" JobState=RUNNING "* ]]; }
if [ "$told" = time ] && runs; then
    requeue "the run could not be saved in ${SAVING:-90} s and will go on from its newest checkpoint"
elif [ "$status" -eq "$saved" ] && { [ "$told" = time ] || runs_still; }; then
    requeue "the run was stopped and saved"
fi
exit "$status"
