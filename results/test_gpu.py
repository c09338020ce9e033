"""Test of gpu.sh and gpu.py: all parts on a CPU."""
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")                   # before torch is imported

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import faults
import onepfrac as op


def environment(folder):
    faults.pictures(folder / "cifar100")
    return os.environ | dict(DEVICE="cpu", OUT=str(folder / "out"), WORK=str(folder / "work"), OMP_NUM_THREADS="1",
                             DATA=str(folder / "cifar100"), PYTHON=sys.executable)


def test_all_parts_of_ten_minutes_with_a_gpu_run_on_a_cpu(tmp_path):
    """As if a third of a second were always left: each training takes about as long, and nothing is late."""
    code = "import gpu; gpu.PATIENCE, gpu.left = 600, lambda until: 0.3; raise SystemExit(gpu.main(60))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                          env=environment(tmp_path))
    assert done.returncode == 0 and " 0 FAIL," in done.stdout, (done.stdout, done.stderr)
    checks = (tmp_path / "out" / "check.txt").read_text().splitlines()
    assert len(checks) > 12 and all(line.startswith("ok  ") for line in checks)
    found = {line["name"]: line for line in map(json.loads, open(tmp_path / "out" / "gpu.jsonl"))}
    for recipe in ("small", "paper"):
        speed = found[f"speed {recipe}"]
        assert min(speed[f"{part}_images_per_s"] for part in ("step", "whole", "batch")) > 0 and speed["target"]
        assert speed["strides_of_batches"] == 1 and speed["graphs_whole_images_per_s"] > 0
        assert all(found[f"step {recipe}, {way}"]["ms"] > 0 for way in ("compiled", "graphs", "eager"))
    assert {"sorted", "in_a_loop"} <= found["batch of paper"].keys() and found["rendering 8"]["together_seconds"] > 0
    assert {"together", "one_by_one"} <= found["Muon, all matrices of vit_nano"].keys()
    fractal, scratch = (found[f"final-{arm}, 12 a class"] for arm in ("fractal", "scratch"))
    assert fractal["planned_epochs"] == scratch["planned_epochs"] and scratch["commit"] and scratch["test_top1"] >= 0
    for name in ("fractal", "final-fractal", "final-scratch"):
        op.load_weights(op.ViT(32, 4, 2, *op.MODELS["vit_nano"]), tmp_path / "out" / f"{name}.pt")
    with zipfile.ZipFile(tmp_path / "out" / "logs.zip") as archive:
        assert {"tests.txt", "fractal/log.jsonl", "final-scratch/args.json"} <= set(archive.namelist())
    assert "batch of paper, sorted, 1 calls" in (tmp_path / "out" / "profile.txt").read_text()


def test_what_fails_or_is_late_is_said_and_does_not_stop_the_rest(tmp_path):
    """Rendering fails, a step does not end, and then there is no time for the rest."""
    code = """import gpu, time
def rendering(): 1 / 0
def ways_of_muon(): time.sleep(60)
gpu.rendering, gpu.ways_of_muon, gpu.PATIENCE = rendering, ways_of_muon, 0.5
raise SystemExit(gpu.main(9 + time.time() - gpu.START, "speed"))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=60,
                          env=environment(tmp_path))
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert done.returncode == 1 and zipfile.is_zipfile(tmp_path / "out" / "logs.zip")
    assert failed == ["FAIL rendering: ZeroDivisionError: division by zero",
                      "FAIL ways_of_muon: TimeoutError: did not end in time", "FAIL no time for ways_of_randaugment",
                      "FAIL no time for steps small", "FAIL no time for steps paper"]
