#!/usr/bin/env bash
# One command for a bare machine with a GPU and nothing but its own torch: checks against the CPU, measures, trains.
#
#   bash results/gpu.sh                     # check, measure, pretrain, choose, final; what is done is skipped
#   bash results/gpu.sh pretrain choose     # only these stages; `collect`: only bring OUT up to date
#   setsid bash results/gpu.sh pretrain > out.txt 2>&1 &    # where commands are ended after some minutes
#
# A stage that was stopped goes on where it was; SIGTERM saves first. Settings, in the environment:
#   WORK    folder of all that lasts from one call to the next: runs, packages (runs/gpu)
#   OUT     folder for four small files: gpu.jsonl, check.txt, texts.tgz (logs, profiles), fractal.pt ($WORK/out)
#   DATA    folder with train/ and test/ of CIFAR-100, in each a folder for a class (data/cifar100)
#   BUDGET  seconds of training in pretrain, and again in final (600); starting takes a minute more
#   EPOCHS  of each run of choose (15), which tries RATES for either arm;  CKPT  weights to use instead of pretrain
#   PRE TUNE BATCH  flags of pretrain (if its loss stays near ln 1000 = 6.9: --delta 0.2) and finetune, images a batch
#   DEVICE PYTHON WHEELS TESTS PROBE      (cuda, python3, wheels/, test_onepfrac.py, 600 steps to measure the speed)
# A copy without .git names its commit in a file COMMIT: git describe --always --dirty > COMMIT
set -um         # -m: a signal to all processes reaches this one, which passes it on; a second would stop a run unsaved
cd "$(dirname "$0")/.." || exit
work=$(realpath -m "${WORK:-runs/gpu}") data=${DATA:-data/cifar100}
budget=${BUDGET:-600} epochs=${EPOCHS:-15} batch=${BATCH:-512} probe=${PROBE:-600} rates=(${RATES:-5e-4 1e-3 2e-3})
device=${DEVICE:-cuda} python=${PYTHON:-python3} wheels=${WHEELS:-wheels} status=0
pre=${PRE:---recipe small --texture fresh --no-cutmix --jitter}
tune=${TUNE:---recipe small --optimizer adamw --weight-decay 0.05 --drop-path 0.1 --clip-grad 1 --warmup 0.05}
out=${OUT:-$work/out} ckpt=${CKPT:-$work/fractal/last.pt}
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} PYTHONUNBUFFERED=1
mkdir -p "$work/site" "$out"
declare -A running=()

start() {       # start NAME COMMAND ...: in the background, unless it has ended well before; output to NAME.txt
    [ -f "$work/$1.done" ] && return
    "${@:2}" > "$work/$1.txt" 2>&1 &
    running[$1]=$!
}
finish() {      # wait for all that was started
    for name in "${!running[@]}"; do
        wait "${running[$name]}" && touch "$work/$name.done" && continue
        echo "$name failed: $(tail -n 1 "$work/$name.txt")"
        failed=1
    done
    running=()
}
stop() {
    kill "${running[@]}" 2> /dev/null
    wait
    exit 143
}
collect() {
    cat "$work"/check-*.txt > "$out/check.txt" 2> /dev/null
    cp "$work"/gpu.jsonl "$work"/fractal.pt "$out" 2> /dev/null
    (cd "$work" && tar -czf - *.txt */args.json */log.jsonl */*.png) > "$out/texts.tgz" 2> /dev/null
}
trap stop TERM INT
trap collect EXIT

train() {       # train NAME COMMAND FLAGS: in $work/NAME, from where it stopped
    if [ -f "$work/$1/last.pt" ]; then start "$1" "$python" onepfrac.py resume "$work/$1"; return; fi
    start "$1" "$python" onepfrac.py "$2" --device "$device" --batch-size "$batch" --out "$work/$1" "${@:3}"
}
tuned() {       # tuned ARM NAME FLAGS: fine-tuning from the fractal, or from scratch
    [ "$1" = scratch ] || set -- "$@" --ckpt "$ckpt"
    train "$2-$1" finetune $tune --data folder --root "$data" "${@:3}"
}
last() {        # last FIELD NAME: its last value in a log
    grep -o "\"$1\": [0-9.]*" "$work/$2/log.jsonl" | tail -n 1 | cut -d' ' -f2
}
once() {        # once NAME EXPRESSION: computed only once, as a run is resumed only with the settings it has
    [ -s "$work/$1" ] || awk "BEGIN { print int(1 + $2) }" > "$work/$1"
    cat "$work/$1"
}

check() {       # all parts at once, as nothing is timed
    for part in renderer sources augmentation network resume; do
        start "check-$part" timeout 300 "$python" results/gpu.py check "$part" --device "$device"
    done
    if "$python" -c "import pytest" 2> /dev/null; then
        start check-tests timeout 500 env ONEPFRAC_DEVICE="$device" "$python" -m pytest -q ${TESTS:-test_onepfrac.py}
    fi
    finish
}
measure() {
    for part in rendering pretrain-small finetune-small pretrain-paper libraries-224 libraries-32; do
        start "measure-$part" timeout 300 "$python" results/gpu.py measure "$part" --device "$device" --out "$work"
        finish
    done
}
pretrain() {
    [ -n "${CKPT:-}" ] && return
    train speed pretrain $pre --steps "$probe" --log-every $((probe / 2))
    finish
    train fractal pretrain $pre --log-every 250 \
        --steps "$(once steps "$budget * $(last images_per_s speed) / $batch")"
    finish
}
choose() {      # on a fifth of the training images
    for lr in "${rates[@]}"; do
        for arm in fractal scratch; do
            tuned $arm "choose-$lr" --lr "$lr" --holdout 0.2 --epochs "$epochs" --eval-epochs "$epochs"
        done
    done
    finish
}
final() {       # on all training images, two runs at once, each with the rate that was best for its arm
    local one=choose-${rates[0]}-scratch n
    n=$(find -L "$data/train" -type f | wc -l)
    for arm in fractal scratch; do
        best=$(for lr in "${rates[@]}"; do echo "$(last test_top1 "choose-$lr-$arm") $lr"; done | sort -g | tail -n 1)
        tuned $arm final --lr "${best#* }" --eval-epochs 10 --epochs \
            "$(once epochs "$budget * ${#rates[@]} * $(last images "$one") / $(last seconds "$one") / $n")"
    done
    finish
}

if [ -d "$wheels" ] && [ ! -f "$work/installed" ]; then
    "$python" -m pip install -q --no-index --no-deps --upgrade --target "$work/site" "$wheels"/*.whl &&
        touch "$work/installed"
fi
if ! "$python" -c "import matplotlib.figure, matplotlib.cbook" 2> /dev/null; then
    echo "matplotlib is missing: a stand-in leaves out curve.png, and takes results/saw.png for the photograph"
    mkdir -p "$work/site/matplotlib"
    touch "$work/site/matplotlib/__init__.py"
    echo "from unittest.mock import MagicMock as Figure" > "$work/site/matplotlib/figure.py"
    echo "def get_sample_data(*_, **__): return '$PWD/results/saw.png'" > "$work/site/matplotlib/cbook.py"
fi
exec 9> "$work/lock"
[ "$*" = collect ] || flock -n 9 || { echo "$work is in use"; exit 1; }        # by a job in the background
for stage in ${*:-check measure pretrain choose final}; do
    [ "$stage" = collect ] || [ -f "$work/$stage.done" ] && continue
    declare -F "$stage" > /dev/null || { echo "$stage is no stage"; exit 2; }
    began=$SECONDS failed=0
    echo "$stage"
    "$stage"
    if [ $failed = 0 ]; then touch "$work/$stage.done"; else status=1; fi
    "$python" results/gpu.py record "$stage" $((SECONDS - began)) $(find "$work/fractal/last.pt" 2> /dev/null) \
        --device "$device" --out "$work"
done
exit $status
