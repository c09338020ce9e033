"""Tests of reproduce.sh and of the scripts in results/, but for gpu.py."""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import controls
import experiments
import faults
import inits
import mutants
import onepfrac as op
import speed
import why

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_faults_lose_nothing_and_leave_no_traceback():
    """A few of each; results/faults.py tries many."""
    counts = {"kills, pre-training": 2, "bad input: checkpoints": 6, "bad input: images": 6,
              "bad input: folders": 4, "bad input: flags": 12}
    code = f"import faults, json; print(json.dumps([faults.study(k, n, 1) for k, n in {counts}.items()]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    kills, *bad = json.loads(done.stdout.splitlines()[-1])
    assert kills["ended_at_random"] >= 2 and kills["runs"] >= 1
    assert all(part[key] == 0 for part in (kills, *bad) for key in part.keys() & faults.ZERO)
    assert [part["runs"] for part in bad] == [6, 6, 4, 12] and min(part["refused_in_one_line"] for part in bad) > 0


def test_how_far_heads_look():
    """Heads that look everywhere alike, against a plain loop; heads that look at their own place alone."""
    side, model = 4, op.ViT(32, 8, 10, 96, 2, 3)
    places = [(i, j) for i in range(side) for j in range(side)]
    mean = sum(math.dist(a, b) for a in places for b in places) / len(places) ** 2
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
        assert why.attention_distances(model, x).sub(mean).abs().max() < 1e-5
        model.pos_embed[0, 1:, :side ** 2] = 1_000 * torch.eye(side ** 2)
        for block in model.blocks:
            for rows in block.attn.qkv.weight[:2 * 96].split(32):           # queries and keys of all heads
                rows[:, :32] = 10 * torch.eye(32)
        assert why.attention_distances(model, x).shape == (2, 3)
        assert why.attention_distances(model, x).max() < 1e-3


def test_filters_are_what_a_patch_embedding_sees():
    """A matrix whose two filters are known; its colours."""
    seen = torch.zeros(2, 3, 8, 8)
    seen[0, :, 0, 0], seen[1, 0, 2, 5] = -1, 1                              # a grey dot; a red one
    weight = torch.zeros(96, 3, 8, 8)
    weight[4], weight[7] = 5 * seen[0], 3 * seen[1]
    first, second = why.filters(weight, 2)
    assert first.shape == (8, 8, 3) and first[0, 0].tolist() in ([1, 1, 1], [255, 255, 255])
    assert second[2, 5].tolist() in ([1, 128, 128], [255, 128, 128])
    assert (first.flatten()[3:] == 128).all() and (second != 128).sum() == 1
    assert why.grey(weight) == pytest.approx((25 * 3 + 9 / 3) / (25 * 3 + 9))


@pytest.mark.parametrize("scale", [1, 0.2])
def test_mimetic_weights_have_the_products_of_the_paper(scale):
    """One head: query times key is 0.7 Z + 0.7 I, value times output 0.4 Z - 0.4 I, where Z ~ N(0, 1 / dim)."""
    torch.manual_seed(0)
    model = inits.mimetic(op.ViT(32, 8, 10, 128, 2, 1), scale)
    query, key, value = model.blocks[1].attn.qkv.weight.detach().view(3, 128, 128)
    for product, alpha, beta in ((query.T @ key, 0.7, 0.7), (value.T @ model.blocks[1].attn.proj.weight.T, 0.4, -0.4)):
        z = (product / scale - beta * torch.eye(128)) / alpha * 128 ** 0.5
        assert abs(z.mean()) < 0.05 and 0.97 < z.std() < 1.03
    attention = inits.mimetic(op.ViT(32, 8, 10, 128, 2, 2), scale).blocks[0].attn   # a head has half of the ranks
    query, key, _ = attention.qkv.weight.detach().view(3, 2, 64, 128)
    heads = query.transpose(1, 2) @ key / scale
    assert (torch.linalg.matrix_rank(heads) == 64).all() and not heads[0].allclose(heads[1], atol=0.1)
    assert (heads.diagonal(dim1=1, dim2=2).mean(1) > 0.3).all()
    position = F.normalize(model.pos_embed[0, 1:].detach(), dim=1)
    near = (position @ position.T).view(4, 4, 4, 4)
    assert near[1, 1, 1, 2] > near[1, 1, 3, 3]                  # neighbours are alike


@pytest.mark.parametrize("dim, heads, patch", [(96, 3, 8), (192, 3, 4), (144, 9, 8)])     # nano; larger; all offsets
def test_impulse_weights_look_at_neighbours(dim, heads, patch):
    """Each patch at the one next to it that its head is for, if only some of what a token holds is not its position."""
    torch.manual_seed(0)
    model, side = inits.impulse(op.ViT(32, patch, 10, dim, 2, heads)), 32 // patch
    token = model.pos_embed[0].detach().clone()
    assert 0.3 < token.std() < 0.4
    token[1:] += 0.15 * torch.randn(side * side, dim)
    token = (token - token.mean(1, True)) / token.std(1, keepdim=True)
    offsets = [(0, 0), (-1, 0), (0, 1), (0, -1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]
    for block in model.blocks:
        weight = block.attn.qkv.weight.detach()
        query, key, _ = (token @ weight.T).view(-1, 3, heads, dim // heads).permute(1, 2, 0, 3)
        attention = (query @ key.mT / (dim // heads) ** 0.5).softmax(2)         # (heads, 1 + patches, 1 + patches)
        for seen, (down, right) in zip(attention, offsets):
            for row in range(side):
                for column in range(side):
                    here = seen[1 + row * side + column]
                    if 0 <= row + down < side and 0 <= column + right < side:
                        assert here[1 + (row + down) * side + column + right] > 0.8
                    else:
                        assert here.max() < 0.7
        rest = weight.view(3, heads, dim // heads, dim)[:2, :, side * side:]
        assert (rest.norm(dim=3) > 0.1).all()                                   # zeros would stay zero
        product = weight[2 * dim:].T @ block.attn.proj.weight.detach().T
        assert -0.5 < product.diagonal().mean() < -0.3                          # as in mimetic weights
    first, second = (block.attn.qkv.weight for block in model.blocks)
    assert not first[:dim].allclose(second[:dim], atol=1e-3)


def test_controls_are_made_of_images_that_no_run_trains_on(tmp_path, monkeypatch):
    faults.pictures(tmp_path / "data")                          # 12 images of each of two classes
    args = op.parse(["finetune", "--data", "folder", "--root", str(tmp_path / "data"), "--train-per-class", "8",
                     "--img-size", "16"])
    monkeypatch.setattr(controls, "USED", 8)
    controls.make(tmp_path / "made", args)
    used = {image.numpy().tobytes() for image in op.downstream_data(args)[0].images}
    for name, n in ("others", 4), ("photographs", 1):
        made = op.Folder(tmp_path / "made" / name)
        pixels = {op.T.pil_to_tensor(image).numpy().tobytes() for image, _ in made}
        assert made.targets == [0] * n + [1] * n and len(pixels) == 2 * n and len(used) == 16 and not pixels & used
    assert op.main(["pretrain", "--source", "folder", "--root", str(tmp_path / "made" / "others"), "--steps", "2",
                    "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path / "run")]) == 0


def reproduce(folder, *tables, **environment):
    """Start reproduce.sh with tiny runs, on two classes of plain pictures."""
    faults.pictures(folder / "data")
    flags = "--batch-size 8 --img-size 16 --device cpu --precision fp32"
    return subprocess.Popen(
        ["bash", HERE.parent / "reproduce.sh", *tables], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | dict(RUNS=str(folder / "runs"), DATA=f"--data folder --root {folder / 'data'}", SEEDS="0 1",
                              PRE=f"{flags} --L 4 --canvas 32 --points 500 --steps 60 --log-every 10",
                              TUNE=f"{flags} --train-per-class 8 --epochs 1", PYTHON=sys.executable) | environment)


def test_reproduce_goes_on_after_a_stop_and_its_records_give_its_table(tmp_path, monkeypatch, capsys):
    """SIGTERM in the first run, kill -9 in it too; then all of it. The records of its runs make the same table."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        script = reproduce(tmp_path, "few", SEEDS="0")
        while not script.stdout.readline().startswith("step "):
            pass
        script.send_signal(number)
        script.wait()
    script, start = reproduce(tmp_path, "few", SEEDS="0"), tmp_path / "runs" / "starts" / "nano" / "0"
    output, _ = script.communicate()
    assert script.returncode == 0 and "waits for its end" in output and not (start / "pid").exists()
    steps = [json.loads(line)["step"] for line in (start / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 60           # one process at a time wrote it
    monkeypatch.setattr(experiments, "RECORDS", tmp_path / "runs.jsonl")
    for _ in range(2):                                          # again: nothing new
        experiments.keep(tmp_path / "runs")
    records = experiments.read_records()
    assert len(experiments.RECORDS.read_text().splitlines()) == len(records) == 3
    for name, record in records.items():
        log = [json.loads(line) for line in (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()]
        assert record["log"][-1] == {key: round(value, 6) for key, value in log[-1].items()}
        assert record["machine"]["torch"] == torch.__version__ and record["settings"]["seed"] == 0
        assert "--batch-size 8" in record["command"] and op.parse(record["command"].split()).seed == 0
    experiments.show("few", records)
    theirs = [line.split("|")[3].strip() for line in output.splitlines() if line.startswith("| from ")]
    ours = [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| from ")]
    assert len(ours) == 2 and ours == theirs


def test_reproduce_says_what_is_wrong_and_stops(tmp_path):
    script = reproduce(tmp_path, "few", "table1")
    output, _ = script.communicate()
    assert script.returncode == 2 and "no table table1; there are: transfer fp32 fair fair15" in output and "few**" not in output
    script = reproduce(tmp_path, "few", PYTHON="false")         # a command that fails
    output, _ = script.communicate()
    assert script.returncode == 1 and output.count("onepfrac.py") == 1 and "|" not in output


def test_tables_have_mean_deviation_and_seeds(tmp_path, monkeypatch, capsys):
    scratch, fractal = (dict(log=[dict(top1=50.0, test_top1=k)], settings=dict(lr=0.1, seed=0)) for k in (10.0, 20.0))
    title, seeds, before, after, _ = "tiny", 2, "--L 4", "--epochs 2", ""
    monkeypatch.setitem(experiments.TABLES, "tiny", (
        title, seeds, before, after, "fractal | 84.2 | --lr 3; scratch || scratch; other || --delta 1"))
    records = {"epochs-2/L-4-lr-3/0": fractal, "starts/L-4-lr-3/0": fractal, "epochs-2/scratch/0": scratch,
               "epochs-2/scratch/1": dict(scratch, log=[dict(test_top1=12.0)])}

    def printed():
        experiments.show("tiny", records)
        return capsys.readouterr().out

    assert "| fractal | 84.2 | 20.0 | 1 of 2 | 50% |" in printed() and "| other |  | not run | 0 of 2 |  |" in printed()
    assert f"| scratch |  | 11.0 ({2 ** 0.5:.1f}) | 2 of 2 |  |" in printed() and "Not comparable" not in printed()
    records["epochs-2/scratch/1"]["settings"] = dict(lr=0.1, seed=1, warmup=0.2)         # with another recipe
    assert "Not comparable" not in printed()                    # it has a setting more
    records["epochs-2/scratch/0"] = dict(scratch, settings=dict(lr=0.2, seed=0, warmup=0.1))
    assert "runs differ in warmup." in printed()                # a row names lr
    experiments.TABLES["tiny"] = title, seeds, before, after, (
        "2 epochs / scratch || scratch; 2 epochs / fractal || --lr 3; 3 epochs / fractal || --lr 3 | --epochs 3")
    *_, header, _, two, three = printed().splitlines()
    assert header == "|  | fine-tuning | scratch | fractal |" and three == "| 3 epochs | `--epochs 3` |  | not run |"
    assert two == "| 2 epochs |  | 11.0 (1.4) | 20.0, 1 of 2 |"


def test_the_figure_has_a_dot_for_each_run_whatever_seeds_there_are(tmp_path, monkeypatch):
    dots = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axis, x, y, *_, **__: dots.append((x, y)))
    records = experiments.read_records()
    experiments.draw_learned(tmp_path / "today.png", records)
    starts = {name.split("/")[1] for name in records
              if name.startswith("train-per-class-250-epochs-3/") and "/scratch/" not in name}
    assert len(dots) == len(starts) > 30 and (tmp_path / "today.png").exists()
    today, dots[:] = dots[:], []
    more = {}
    for name, record in records.items():                        # one seed more of everything, two points better
        more[f"{name.rpartition('/')[0]}/1"] = record | dict(
            settings=record["settings"] | dict(seed=1), log=[{k: v + 2 for k, v in record["log"][-1].items()}])
    experiments.draw_learned(tmp_path / "more.png", records | more)
    assert len(dots) == len(today) and dots != today
    dots.clear()
    experiments.draw_learned(tmp_path / "none.png", {})
    assert not dots and (tmp_path / "none.png").exists()


def test_reproduce_trains_what_the_tables_show():
    """The names of runs, and their commands, are those that a row's record would have."""
    tables = [table for table in experiments.TABLES if table != "try"]          # whose commands are in README
    done = subprocess.run(["bash", HERE.parent / "reproduce.sh", *tables], capture_output=True, text=True,
                          env=os.environ | dict(DRY="1", SEEDS="0", RUNS="runs"))
    trained = {}
    for line in done.stdout.splitlines():
        command, _, name = line.partition("onepfrac.py ")[2].partition(" --out runs/")
        assert trained.setdefault(name, command) == command and op.parse(command.split()).recipe == "nano"
    assert done.returncode == 0 and len(trained) > 100 and len(set(trained.values())) == len(trained)
    shown = {name for table in tables for row in experiments.rows_of(table)
             for name in experiments.names(table, *row[2:], 0)
             if name and "/mimetic" not in name and "/impulse/" not in name}
    assert shown - {*trained} == {"train-per-class-250-batch-size-128-lr-3e-3/nano/0"}       # the fractal's own best
    first = {experiments.names(table, "", "", 0)[0] for table in tables for row in experiments.rows_of(table)
             if row[2].startswith("fractal ")}                  # before their other fine-tuning
    assert {*trained} <= shown | first and first <= {*trained}
    usual = op.parse(["pretrain"])                              # a sweep's row of nano's value has no flag
    for name, flag in (("table5", "delta"), ("table6", "sigma"), ("table7", "L")):
        assert [float(row[0]) for row in experiments.rows_of(name) if not row[2]] == [getattr(usual, flag)]


def test_the_command_of_a_record_repeats_its_settings_whatever_the_recipe():
    for flags in ("pretrain --recipe small --optimizer adamw --no-cutmix", "finetune --recipe paper --lr 0.1",
                  "pretrain --delta 0.2", "finetune --optimizer sgd --no-flip"):
        args = vars(op.parse(flags.split()))
        assert vars(op.parse(experiments.command_of(args).split())) == args


def test_recipe_small_is_what_ran_on_a_gpu():
    """Its length apart, and jitter, which has no effect with RandAugment. A change of it needs a new run."""
    records = experiments.read_records()
    for name, command in (("fractal", "pretrain"), ("final-fractal", "finetune")):
        known, today = records[f"gpu/{name}"]["settings"], vars(op.parse(f"{command} --recipe small".split()))
        differ = {key for key in known.keys() & today.keys() if today[key] != known[key]}
        assert differ <= {"steps", "epochs", "jitter"} and len(known.keys() & today.keys()) > 20


def test_the_tables_of_the_page_are_those_of_the_records(capsys):
    """Each table that results/README.md shows is what the records give today, line by line."""
    page = (HERE / "README.md").read_text()
    records = experiments.read_records()
    for name in experiments.TABLES:
        experiments.show(name, records)
        printed = capsys.readouterr().out
        if f"**{name}:" in page:
            assert printed.strip() in page, f"{name}: run `python results/experiments.py {name}`"


def test_every_fault_of_mutants_can_be_planted():
    text = Path(op.__file__).read_text()
    assert len(mutants.MUTANTS) >= 30 and all(text.count(old) == 1 and old != new for _, old, new in mutants.MUTANTS)


def test_the_plain_ways_of_speed_do_what_the_file_does():
    x, number = torch.randint(256, (64, 1, 16, 16), generator=seeded()).float(), torch.randint(op.NONE + 1, (64,))
    level = 2 * torch.rand(64, generator=seeded()) - 1
    assert torch.equal(speed.in_a_loop(x, number, level), op.apply_op(x, number, level))
    matrices = torch.randn(3, 8, 24, generator=seeded())
    assert torch.allclose(speed.plain_orthogonalise(matrices), op.orthogonalise(matrices), atol=1e-4)
    torch.manual_seed(0)
    fused, x = speed.Fused(96, 3), torch.randn(2, 17, 96)
    written = op.Attention(96, 3)
    written.load_state_dict(fused.state_dict())
    assert torch.allclose(fused(x), written(x), atol=1e-5)
    after = []
    for kind in (op.Muon, speed.OneByOne):
        torch.manual_seed(0)
        p = [torch.nn.Parameter(torch.randn(8, 24)) for _ in range(3)]
        for q in p:
            q.grad = torch.randn(8, 24)
        kind([dict(params=p, muon_dtype=torch.float32)], 0.1).step()
        after.append(torch.stack([q.detach() for q in p]))
    assert torch.allclose(*after, atol=1e-5)
    assert speed.randaug_operations(speed.in_a_loop) > 1.5 * speed.randaug_operations(op.apply_op)


def test_faster_is_told_from_slower():
    seconds = speed.take_turns({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, 2)
    assert [len(some) for some in seconds.values()] == [2, 2] and min(seconds["slow"]) >= 0.02 > min(seconds["fast"])
