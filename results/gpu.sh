#!/usr/bin/env bash
# One command for a machine with a GPU and little time: bash results/gpu.sh SECONDS [PART ...]
# SECONDS (540): all has ended by then. PART: check, speed, train; by default all. What they do: results/gpu.py.
# In the environment:
#   OUT      folder of the results (runs/gpu/out); WORK  of all else, emptied at the start (runs/gpu/work)
#   DATA     folder with train/ and test/, in each a folder for a class (data/cifar100). If there is none,
#   ZIP      these zip files, which hold cifar100/train/ and cifar100/test/, are unpacked there (data/cifar100-*.zip)
#   PRE TUNE more flags of pretrain and of finetune;  CKPT  weights to fine-tune, instead of pre-training
#   DEVICE   cuda, or cpu: the same path with small numbers, to test this script;  PYTHON  (python3)
# A copy without .git names its commit in a file COMMIT: git describe --always --dirty > COMMIT
cd "$(dirname "$0")/.." || exit
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} GOMP_SPINCOUNT=10000
seconds=${1:-540}
exec timeout -k 5 "$((seconds + 5))" "${PYTHON:-python3}" results/gpu.py "$seconds" "${@:2}"
