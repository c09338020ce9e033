#!/usr/bin/env bash
# Repeat what README and results/README.md report: pre-training and fine-tuning by onepfrac.py, then the tables.
#
#     bash reproduce.sh                                    # README's row with 42.9, three seeds
#     bash reproduce.sh table5 table6                      # tables of the paper, small: five minutes a row and seed
#     DRY=1 bash reproduce.sh table5                       # only print the commands
#     SEEDS="0 1" bash reproduce.sh table5                 # other seeds than the table's own
#     DATA="--data folder --root DIR" bash reproduce.sh    # where CIFAR-100 is; without it, it is downloaded
#
# Stop it whenever you like. The same line again goes on: what has ended is passed over, what was stopped continues.
# Also in the environment: PYTHON; RUNS, the folder of the runs; PRE and TUNE, more flags of pretrain and of finetune.
set -euo pipefail
cd "$(dirname "$0")"

# The flags of that row: of pre-training, of fine-tuning. Where none are, the recipe's default counts.
BEFORE="" AFTER="--train-per-class 250"
# Of fine-tuning on all images.
WHOLE="--batch-size 128 --lr 3e-3"
# And of the paper's tables in five minutes a row.
SHORT="--steps 1500 --no-cutmix" BRIEF="--train-per-class 250 --epochs 3"
# A smaller network, which is better for scratch, and the fine-tuning of it that is best for scratch.
PICO="--model vit_pico --patch-size 4" FAIR="$WHOLE --weight-decay 0.5"
ALL="transfer fp32 fair fair15 few15 all33 few time fewtime length longer optimizers controls fractals fig3
     table2 table3 table4 table5 table6 table7 table9 table11 table12 table13"

python=.venv/bin/python
[ -x "$python" ] || python=python3
python=${PYTHON:-$python} runs=${RUNS:-runs/reproduce} child="" tables=""
PHOTOGRAPHS="--source folder --root $runs/controls/photographs" OTHERS="--source folder --root $runs/controls/others"
trap '[ -z "$child" ] || { kill "$child" && wait "$child"; } 2>/dev/null || true' EXIT    # it saves first
trap 'exit 130' INT
trap 'exit 143' TERM HUP

run() {    # FOLDER COMMAND FLAGS...: a run, or the rest of it
    local out=$runs/$1
    shift
    set -- "$@" --seed "$seed" --out "$out"
    echo "$python onepfrac.py $*"
    [ -z "${DRY:-}" ] || return 0
    mkdir -p "$out"
    if living "$out"; then    # this script was ended by `kill -9`, which its run survived
        echo "process $(cat "$out/pid") is at it, from an earlier start; this one waits for its end"
        while living "$out"; do sleep 2; done
    fi
    "$python" onepfrac.py "$@" &
    child=$!
    echo "$child" > "$out/pid"
    wait "$child"
    child=""
    rm -f "$out/pid"
}

living() {    # FOLDER: does the process that began this run still live?
    [ -e "$1/pid" ] && [[ "$(ps -ww -p "$(cat "$1/pid")" -o command= 2>/dev/null)" == *"--out $1" ]]
}

photographs() {    # training images that no run with 250 a class trains on, as folders (results/controls.py)
    [ -n "${DRY:-}" ] || [ -d "$runs/controls" ] || {
        rm -rf "$runs/controls.part"
        "$python" results/controls.py "$runs/controls.part" ${DATA:-}
        mv "$runs/controls.part" "$runs/controls"
    }
}

name() {    # FLAGS...: "--L 16 --no-crop" -> "L-16-no-crop"
    local flags="$*"
    flags=${flags//$runs\//}    # of --root
    flags=${flags//--/}
    flags=${flags//[ \/]/-}
    echo "${flags:-nano}"
}

row() {    # LABEL TOP-1-IN-THE-PAPER FLAGS: pre-train with the flags, then fine-tune. "scratch": do not pre-train;
           # "finetune FLAGS": fine-tune with these flags first; "fractal finetune FLAGS": from the fractal
    local label=$1 paper=${2:-} flags=${3:-} start ckpt end logs="" seed
    for seed in ${SEEDS:-$seeds}; do
        start=scratch ckpt=""
        case $flags in
        scratch) ;;
        finetune\ *) stage "$(name $flags)" $flags ${DATA:-} ${TUNE:-} ;;
        fractal\ *)
            stage "$(name $before)" pretrain $before ${PRE:-}
            stage "$(name $before ${flags#fractal })" ${flags#fractal } ${DATA:-} ${TUNE:-} ;;
        *) stage "$(name $before $flags)" pretrain $before $flags ${PRE:-} ;;
        esac
        end=$(name $after)/$start/$seed
        run "$end" finetune $after ${DATA:-} ${TUNE:-} $ckpt
        logs+=" $runs/$end/log.jsonl"
    done
    [ -n "${DRY:-}" ] || tables+="| $label | $paper | $(summary $logs) |"$'\n'
}

stage() {    # NAME COMMAND FLAGS...: a training from which the next one of this row starts: sets its start and ckpt
    start=$1
    shift
    run "starts/$start/$seed" "$@" $ckpt
    ckpt="--ckpt $runs/starts/$start/$seed/last.pt"
}

summary() {    # LOG...: mean (standard deviation) | the last test of each
    LC_ALL=C awk '
        FNR == 1 { n++ }
        match($0, /"test_top1": [0-9.]+/) { top1[n] = substr($0, RSTART + 13, RLENGTH - 13) }
        END {
            for (k = 1; k <= n; k++) { mean += top1[k] / n; all = all sprintf("%s%.2f", k > 1 ? ", " : "", top1[k]) }
            for (k = 1; k <= n; k++) square += (top1[k] - mean) ^ 2
            printf "%.1f", mean
            if (n > 1) printf " (%.1f)", sqrt(square / (n - 1))
            print " | " all
        }' "$@"
}

both() {    # LABEL FLAGS-OF-FINE-TUNING
    after=$2
    row "$1from one fractal"
    row "$1from scratch" "" scratch
}

sweep() {    # FLAG VALUE TOP-1-IN-THE-PAPER VALUE TOP-1...: a row for each value
    local flag=$1
    shift
    while [ $# -gt 0 ]; do
        row "${flag#--} $1" "$2" "$flag $1"
        shift 2
    done
}

for table in "${@:-transfer}"; do
    case " $(echo $ALL) " in *" $table "*) ;; *)
        echo "reproduce.sh: there is no table $table; there are: $(echo $ALL)" >&2
        exit 2
    esac
done
for table in "${@:-transfer}"; do
    before=$SHORT after=$BRIEF seeds="0"
    tables+=$'\n'"**$table**"$'\n\n'"| | the paper | top-1 (standard deviation) | seeds |"$'\n'"|---|---|---|---|"$'\n'
    case $table in
    transfer) before=$BEFORE seeds="0 1 2"; both "" "$AFTER" ;;
    fp32)     before="--precision fp32" seeds="0 1 2"; both "" "$AFTER --precision fp32" ;;
    fair)     before="$PICO --img-size 16 --steps 2300" small="finetune $PICO $FAIR --img-size 16" seeds="0 1 2"
        after="$PICO $FAIR --train-per-class 25 --epochs 40"; row "25 a class: the fractal"
        after="$PICO $FAIR --train-per-class 25 --epochs 81"
        row "25 a class: small copies" "" "$small --train-per-class 25 --epochs 40"
        after="$PICO $FAIR $AFTER --epochs 9.5"
        row "250 a class: the fractal, then small copies" "" "fractal $small $AFTER --epochs 12"
        after="$PICO $FAIR $AFTER --epochs 15"
        row "250 a class: small copies" "" "$small $AFTER --epochs 12"
        after="$PICO --weight-decay 0.2 $AFTER --epochs 7.5"
        row "250 a class: the fractal, then small copies, its own best" "" \
            "fractal finetune $PICO --weight-decay 0.2 --img-size 16 $AFTER --epochs 12"
        after="$PICO $FAIR --epochs 10"
        row "all images: the fractal, then small copies" "" "fractal $small --epochs 10"
        after="$PICO $FAIR --epochs 12.8"; row "all images: small copies" "" "$small --epochs 10" ;;
    fair15)   before="$PICO --img-size 16 --steps 9200" small="finetune $PICO $FAIR --img-size 16 $AFTER" seeds="0 1 2"
        after="$PICO $FAIR $AFTER --epochs 15.5"; row "the fractal, then small copies" "" "fractal $small --epochs 12"
        after="$PICO $FAIR $AFTER --epochs 33.4 --randaug"; row "small copies" "" "$small --epochs 24" ;;
    few15)    before="$PICO --img-size 16 --steps 4600" few="--train-per-class 25 --epochs" seeds="0 1 2"
        strong="--eval-epochs 25 --randaug --mixup --cutmix" small="finetune $PICO $FAIR --img-size 16 $few 40"
        after="$PICO $WHOLE --weight-decay 0.2 $few 307 $strong"; row "the fractal"
        after="$PICO $WHOLE --weight-decay 0.2 $few 404 $strong"; row "small copies" "" "$small" ;;
    all33)    before="--patch-size 4 --img-size 16 --steps 4600" small="finetune --patch-size 4 $FAIR --img-size 16"
        seeds="0 1 2" after="--patch-size 4 $FAIR --eval-epochs 10 --epochs 22.3"
        row "the fractal, then small copies" "" "fractal $small --epochs 8"
        after="--patch-size 4 $FAIR --eval-epochs 10 --epochs 26.4"
        row "small copies" "" "$small --epochs 12" ;;
    few)      before=$BEFORE seeds="0 1 2"; both "" "--train-per-class 25" ;;
    time)     before=$BEFORE seeds="0 1 2"; both "8 epochs, " "$AFTER"; both "28 epochs, " "$AFTER --epochs 28" ;;
    fewtime)  before=$BEFORE after="--train-per-class 25 --epochs 40" seeds="0 1 2"; row "from one fractal, 40 epochs"
        after="--train-per-class 25 --epochs 240"; row "from scratch, 240 epochs" "" scratch ;;
    length)   before=$BEFORE seeds="0 1 2"
        both "all images, 8 epochs, " "$WHOLE"
        both "all images, 20 epochs, " "--epochs 20 $WHOLE"
        both "all images, 60 epochs, " "--epochs 60 --eval-epochs 10 $WHOLE --min-crop 0.5 --randaug" ;;
    longer)   before=$BEFORE
        both "" "$AFTER"; row "from 18,800 steps" "" "--steps 18800"
        both "all images, " "$WHOLE"; row "all images, from 18,800 steps" "" "--steps 18800" ;;
    optimizers) before=$BEFORE
        both "SGD, " "$AFTER --optimizer sgd --lr 0.2 --weight-decay 1e-4"
        both "AdamW, " "$AFTER --optimizer adamw --lr 1e-3"
        both "Muon, " "$AFTER" ;;
    controls) before=$BEFORE after=$AFTER seeds="0 1 2"
        photographs
        row "from one fractal"; row "Delta 0.001" "" "--delta 0.001"; row "from 64 fractals" "" "--categories 64"
        row "clouds of Gaussian dots" "" "--source gaussian --texture random"
        row "from 64 photographs as 64 classes" "" "$PHOTOGRAPHS"
        row "supervised, 250 other images a class" "" "$OTHERS"; row "from scratch" "" scratch ;;
    fractals) row "fractal 32" ""; for k in 0 1 2; do row "fractal $k" "" "--fractal-seed $k"; done ;;
    fig3)     before=$BEFORE; for k in 1 2 3 4 6; do both "$k blocks, " "$AFTER --probe $k"; done ;;
    table2)   seeds="0 1 2"
        row "scratch" 64.2 scratch
        row "FractalDB, 64 x 64 images" 81.6 "--categories 64 --instances 64"
        row "OFDB, 64 images" 84.0 "--categories 64"
        row "1p-frac" 84.2
        photographs
        row "64 photographs" "" "$PHOTOGRAPHS"; row "supervised, 250 other images a class" "" "$OTHERS" ;;
    table3)
        row "RCDB, 64 x 64 images" 81.6 "--source rcdb --categories 64 --instances 64"
        row "RCDB, 64 images" 80.4 "--source rcdb --categories 64"
        row "RCDB, one image" 82.5 "--source rcdb"
        row "Visual Atoms, 64 x 64 images" 84.9 "--source va --categories 64 --instances 64"
        row "Visual Atoms, 64 images" 82.1 "--source va --categories 64"
        row "Visual Atoms, one image" 82.6 "--source va" ;;
    table4)   before="$SHORT --texture random"
        row "Gaussian" 1.1 "--source gaussian"; row "uniform" 2.0 "--source uniform"; row "1p-frac" 84.2 ;;
    table5)   seeds="0 1 2"
        row "delta 0.1" 84.2; sweep --delta 0.001 1.2  0.01 19.9  0.05 83.0  0.2 83.4  1.0 82.6 ;;
    table6)   row "sigma 3.5" 84.2; sweep --sigma 4.0 82.8  4.5 81.9  5.0 82.2  6.0 81.3 ;;
    table7)   seeds="0 1 2"; row "L 64" 82.3; sweep --L 16 78.7  512 82.4  1000 84.2 ;;
    table9)   row "crops and jitter" 80.4
        for flag in --no-crop --no-aspect --no-jitter --randaug --erase --flip; do row "$flag" "" $flag; done
        before="--steps 1500"
        row "cutmix" 83.6; row "mixup" 83.3 "--no-cutmix --mixup"; row "both" 84.2 --mixup ;;
    table11)  row "one photograph" 81.6 "--source image"; row "its edges" 82.2 "--source image --edges canny" ;;
    table12)  before="$SHORT --source image --edges canny"
        row "affine" 81.9
        row "homography" "" "--warp homography"
        row "elastic" 37.0 "--warp elastic"
        row "polynomial" 81.3 "--warp polynomial" ;;
    table13)
        row "OFDB" 84.0 "--categories 64 --texture random"; row "1p-frac" 84.2 "--texture random"
        row "OFDB w/ Aug." 85.3 "--categories 64 --texture fresh"; row "1p-frac w/ Aug." 84.7 "--texture fresh"
        row "fixed masks alone" "" "--texture random --delta 0" ;;
    esac
done
[ -n "${DRY:-}" ] || echo "$tables"
