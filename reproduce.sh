#!/usr/bin/env bash
# What README reports, run again: bash reproduce.sh [transfer]
#
# Pre-trains on the fractal with three seeds, lets a fifth of the training images choose the learning
# rate for fine-tuning from it and for training from scratch (the same grid for both), then runs both
# with three seeds on all of them and tests on the test set. Each run keeps its folder under runs/;
# an interrupted script goes on where it stopped, and finished runs are not run again.
#
#   DATA="--data folder --root DIR" bash reproduce.sh     # other data than torchvision's CIFAR-100
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
data=${DATA:---data cifar100}
seeds="0 1 2"
rates=${RATES:-0.05 0.1 0.2 0.4}
subset="--train-per-class 250 --eval-epochs 2"

once() {    # once COMMAND FOLDER FLAGS: run, or go on with, the run in that folder
    local command=$1 out=$2; shift 2
    if [ -f "$out/last.pt" ]; then set -- "$@" --resume; fi
    "$python" onepfrac.py "$command" --out "$out" "$@"
}

best() {    # best ARM: the learning rate with the highest held-out accuracy
    for lr in $rates; do
        echo "$(grep -o '"test_top1": [0-9.]*' "runs/choose-$1-$lr/log.jsonl" | tail -n 1 | cut -d' ' -f2) $lr"
    done | sort -g | tail -n 1 | cut -d' ' -f2
}

transfer() {
    for seed in $seeds; do
        once pretrain "runs/fractal-$seed" --recipe nano --delta 0.1 --sigma 3.5 --seed "$seed"
    done
    for lr in $rates; do
        once finetune "runs/choose-fractal-$lr" --recipe nano --ckpt runs/fractal-0/last.pt \
            $data $subset --holdout 0.2 --lr "$lr"
        once finetune "runs/choose-scratch-$lr" --recipe nano $data $subset --holdout 0.2 --lr "$lr"
    done
    for seed in $seeds; do
        once finetune "runs/from-fractal-$seed" --recipe nano --ckpt "runs/fractal-$seed/last.pt" \
            $data $subset --lr "$(best fractal)" --seed "$seed"
        once finetune "runs/from-scratch-$seed" --recipe nano $data $subset \
            --lr "$(best scratch)" --seed "$seed"
    done
    tail -qn 1 runs/from-*/log.jsonl
}

case ${1:-transfer} in
    transfer) transfer ;;
    *) echo "reproduce.sh: unknown table $1; there is: transfer" >&2; exit 2 ;;
esac
