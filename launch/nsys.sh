#!/usr/bin/env bash
# Profile a few steps of a training run with Nsight Systems: where the time goes on CPU and GPU.
#
#   launch/nsys.sh --ds_config zero2 --model MPDiT-XL/4-2 --data DIR --out OUT [arguments of launch/train.py]
#
# --profile-steps A:B (10:12 by default) and --profile-ranks choose what is captured. From the environment:
#   REPORT     where the report goes: REPORT.nsys-rep (default: profile-nsys and the time, in the current folder)
#   DEEPSPEED  options of the deepspeed command, for example "--num_accelerators 1"
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "error: no arguments: give those of launch/train.py, for example --ds_config zero2" >&2
    exit 2
fi
if ! command -v nsys > /dev/null; then
    echo "error: nsys is not installed: get Nsight Systems from https://developer.nvidia.com/nsight-systems" >&2
    exit 2
fi
read -ra options <<< "${DEEPSPEED:-}"
train=$(dirname "$0")/train.py

# The ranks are children of the launcher: those are followed by themselves, their forks only when asked for.
exec nsys profile -s none -t nvtx,cuda --trace-fork-before-exec=true \
    --capture-range=cudaProfilerApi --capture-range-end=stop \
    -o "${REPORT:-profile-nsys-$(date +%Y%m%d-%H%M%S)}" \
    deepspeed ${options[@]+"${options[@]}"} "$train" --profile nsys "$@"
