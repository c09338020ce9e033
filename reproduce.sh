#!/usr/bin/env bash
# What README reports, run again: bash reproduce.sh [nano|small|paper] [transfer|controls|all|NAME ...]
#
#   bash reproduce.sh                    # transfer at nano: the fractal against training from scratch
#   bash reproduce.sh controls           # other starts, more images, more epochs (results/transfer.py)
#   bash reproduce.sh table5 fig3        # tables of the paper, by the names of `python results/tables.py -h`
#   bash reproduce.sh small all          # all of them on a GPU
#   DATA="--data folder --root DIR" bash reproduce.sh ...    # other data than torchvision's CIFAR-100
#
# A table's run that is in results/records.jsonl or has its folder under runs/ is not run again. An interrupted script
# continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
data=${DATA:---data cifar100}

once() {    # once COMMAND FOLDER FLAGS: run it, or resume the run in that folder
    local command=$1 out=$2; shift 2
    if [ -f "$out/last.pt" ]; then set -- resume "$out"; else set -- "$command" --out "$out" "$@"; fi
    "$python" onepfrac.py "$@"
}

tables() {    # tables NAMES: run what is not measured yet
    local plan command flags
    plan=$("$python" results/tables.py "$@" --recipe "$recipe" --plan)
    echo "$plan"
    while read -r command flags; do
        case $command in
            pretrain) once pretrain "${flags##*--out }" ${flags%--out *} ;;
            finetune) once finetune "${flags##*--out }" ${flags%--out *} $data ;;
            logistic) "$python" results/logistic.py $flags $data ;;
        esac
    done <<< "$plan"
    "$python" results/tables.py --recipe "$recipe" --collect > /dev/null    # writes results/tables/
    "$python" results/tables.py "$@" --recipe "$recipe"
}

# Pre-trains on the fractal with three seeds, lets a fifth of the training images choose the learning
# rate for fine-tuning from it and for training from scratch (the same grid for both), then runs both
# with three seeds on all of them and tests on the test set.
seeds="0 1 2"
rates=${RATES:-0.05 0.1 0.2 0.4}
subset="--train-per-class 250 --eval-epochs 2"

best() {    # best ARM: the learning rate with the highest held-out accuracy
    for lr in $rates; do
        echo "$(grep -o '"test_top1": [0-9.]*' "runs/choose-$1-$lr/log.jsonl" | tail -n 1 | cut -d' ' -f2) $lr"
    done | sort -g | tail -n 1 | cut -d' ' -f2
}

fractals() {
    for seed in $seeds; do
        once pretrain "runs/fractal-$seed" --recipe "$recipe" --delta 0.1 --sigma 3.5 --seed "$seed"
    done
}

transfer() {
    fractals
    for lr in $rates; do
        once finetune "runs/choose-fractal-$lr" --recipe "$recipe" --ckpt runs/fractal-0/last.pt \
            $data $subset --holdout 0.2 --lr "$lr"
        once finetune "runs/choose-scratch-$lr" --recipe "$recipe" $data $subset --holdout 0.2 --lr "$lr"
    done
    for seed in $seeds; do
        once finetune "runs/from-fractal-$seed" --recipe "$recipe" --ckpt "runs/fractal-$seed/last.pt" \
            $data $subset --lr "$(best fractal)" --seed "$seed"
        once finetune "runs/from-scratch-$seed" --recipe "$recipe" $data $subset \
            --lr "$(best scratch)" --seed "$seed"
    done
    tail -qn 1 runs/from-*/log.jsonl
}

# What else could explain the gain? Attention that is set by hand; a head start that more images and more epochs make up
# for; real images that would have done as well (the even classes of a folder, tested on the odd ones).
controls() {
    fractals
    for seed in $seeds; do
        "$python" results/inits.py mimetic "runs/mimetic-$seed.pt" --recipe "$recipe" --seed "$seed"
        once finetune "runs/from-mimetic-$seed" --recipe "$recipe" --ckpt "runs/mimetic-$seed.pt" $data $subset \
            --seed "$seed"
        once finetune "runs/few-fractal-$seed" --recipe "$recipe" --ckpt "runs/fractal-$seed/last.pt" $data \
            --train-per-class 25 --seed "$seed"
        once finetune "runs/few-scratch-$seed" --recipe "$recipe" $data --train-per-class 25 --seed "$seed"
    done
    for lr in 0.1 0.2 0.4; do                       # is the recipe's rate the best with all images too?
        once finetune "runs/choose8-fractal-$lr" --recipe "$recipe" --ckpt runs/fractal-0/last.pt $data \
            --holdout 0.2 --lr "$lr"
        once finetune "runs/choose8-scratch-$lr" --recipe "$recipe" $data --holdout 0.2 --lr "$lr"
    done
    for epochs in 8 30; do
        once finetune "runs/all-$epochs-fractal-0" --recipe "$recipe" --ckpt runs/fractal-0/last.pt $data \
            --epochs "$epochs"
        once finetune "runs/all-$epochs-scratch-0" --recipe "$recipe" $data --epochs "$epochs"
    done
    local root=${data##*--root } split class half n short odd start
    [ -d "$root/train" ] || { echo "halves of the classes: only with DATA='--data folder --root DIR'"; return; }
    for split in train test; do
        n=0
        mkdir -p runs/half/{even,odd}/$split
        for class in "$root/$split"/*; do
            if [ $((n++ % 2)) = 0 ]; then half=even; else half=odd; fi
            ln -sfn "$(realpath "$class")" "runs/half/$half/$split/$(basename "$class")"
        done
    done
    for seed in $seeds; do
        short="--recipe $recipe --seed $seed --steps 5000"
        odd="--recipe $recipe --seed $seed --data folder --root runs/half/odd $subset"
        once pretrain "runs/real-$seed" $short --source folder --root runs/half/even/train
        once pretrain "runs/mild-$seed" $short --source folder --root runs/half/even/train --min-crop 0.4
        once pretrain "runs/short-$seed" $short
        for start in real mild short fractal; do
            once finetune "runs/half-$start-$seed" $odd --ckpt "runs/$start-$seed/last.pt"
        done
        once finetune "runs/half-scratch-$seed" $odd
    done
}

recipe=nano
case ${1:-} in nano | small | paper) recipe=$1; shift ;; esac
case ${1:-transfer} in
    transfer) transfer ;;
    controls) controls ;;
    all) tables ;;
    *) tables "$@" ;;
esac
