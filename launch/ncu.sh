#!/usr/bin/env bash
# Profile the kernels of one step of a training run with Nsight Compute: what bounds each of them. Each kernel is run
# many times over, so a step takes minutes: keep to one GPU, one step and, with KERNELS, to what you look for.
#
#   launch/ncu.sh --ds_config zero2 --model MPDiT-XL/4-2 --data DIR --out OUT [arguments of launch/train.py]
#
# --profile-steps chooses another step than 10. From the environment:
#   REPORT   where the report goes: REPORT.ncu-rep (default: profile-ncu and the time, in the current folder)
#   KERNELS  kernels to profile, as ncu's --kernel-name takes them, for example "regex:forward|backward"
#   RANGE    only kernels launched in this range, for example forward (the names are in docs/profiling.md)
#   COUNT    most kernels profiled (default 200)
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "error: no arguments: give those of launch/train.py, for example --ds_config zero2" >&2
    exit 2
fi
if ! command -v ncu > /dev/null; then
    echo "error: ncu is not installed: get Nsight Compute from https://developer.nvidia.com/nsight-compute" >&2
    exit 2
fi
filters=()
[ -z "${KERNELS:-}" ] || filters+=(--kernel-name "$KERNELS")
# A slash behind the name: the ranges are pushed and popped.
[ -z "${RANGE:-}" ] || filters+=(--nvtx-include "$RANGE/")
train=$(dirname "$0")/train.py

# One process: with more, a kernel that is run again would wait for its partners of the other ranks.
exec ncu --profile-from-start off --nvtx --target-processes all --launch-count "${COUNT:-200}" \
    -o "${REPORT:-profile-ncu-$(date +%Y%m%d-%H%M%S)}" ${filters[@]+"${filters[@]}"} \
    deepspeed --num_accelerators 1 "$train" --profile ncu --profile-steps 10:10 "$@"
