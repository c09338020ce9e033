"""Test of gpu.sh and gpu.py: all parts on a CPU, and what is left when they are ended."""
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import faults
import onepfrac as op


def environment(folder):
    faults.pictures(folder / "cifar100")
    return os.environ | dict(DEVICE="cpu", OUT=str(folder / "out"), WORK=str(folder / "work"), OMP_NUM_THREADS="1",
                             DATA=str(folder / "cifar100"), PYTHON=sys.executable)


def numbers(folder):
    return {line["name"]: line for line in map(json.loads, open(folder / "out" / "gpu.jsonl"))}


def test_all_parts_of_ten_minutes_with_a_gpu_run_on_a_cpu(tmp_path):
    """With a second for all: each part does the least it can, and nothing is stopped or left out for being late."""
    code = "import gpu; gpu.PATIENCE, gpu.late = 600, lambda until: False; raise SystemExit(gpu.main(1))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                          env=environment(tmp_path))
    assert done.returncode == 0 and not done.stderr, (done.stdout, done.stderr)       # no FAIL
    parts = [line.split(",")[0] for line in done.stdout.splitlines()]
    assert [p for p in parts if " " not in p] == ["check", "speed", "pretrain", "finetune", "extras"]
    checks = (tmp_path / "out" / "check.txt").read_text().splitlines()
    assert len(checks) > 12 and all(line.startswith("ok  ") for line in checks)
    found = numbers(tmp_path)
    for recipe in ("small", "paper"):
        speed = found[f"speed {recipe}"]
        assert min(speed[f"{part}_images_per_s"] for part in ("step", "whole", "batch")) > 0 and speed["target"]
    assert found["final-fractal, 12 a class"]["test_top1"] >= 0 and found["final-scratch, 12 a class"]["commit"]
    for name in ("fractal", "final-fractal", "final-scratch"):
        op.load_weights(op.ViT(32, 4, 2, *op.MODELS["vit_nano"]), tmp_path / "out" / f"{name}.pt")
    with zipfile.ZipFile(tmp_path / "out" / "logs.zip") as archive:
        assert {"check.txt", "fractal/log.jsonl", "final-scratch/args.json"} <= set(archive.namelist())
    assert "three steps" in (tmp_path / "out" / "profile.txt").read_text()


def test_what_ended_before_a_kill_is_there_and_nothing_goes_on(tmp_path):
    script = subprocess.Popen(["bash", HERE / "gpu.sh", "600", "extras", "train"], stdout=subprocess.PIPE, text=True,
                              env=environment(tmp_path), start_new_session=True)
    first = script.stdout.readline()
    while not (tmp_path / "work" / "probe").exists():
        time.sleep(0.1)
    os.killpg(script.pid, signal.SIGKILL)
    script.wait()
    assert first.startswith("extras") and "rendering 8, 500 together" in numbers(tmp_path)
    assert zipfile.is_zipfile(tmp_path / "out" / "logs.zip")
    time.sleep(1)
    with op.claimed(tmp_path / "out"):                          # by none of its processes any more
        pass
