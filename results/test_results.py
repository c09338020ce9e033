"""Tests of the scripts in results/: faults, logistic regression, initial weights, experiments, speed."""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import experiments
import faults
import inits
import logistic
import mutants
import onepfrac as op
import speed

ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_faults_lose_nothing_and_leave_no_traceback():
    """A few of each; results/faults.py tries many."""
    counts = dict(kills=3, stops=1, disk=3, checkpoints=16, weights=6, images=22, folders=7, outputs=3)
    code = f"import faults, json; print(json.dumps({{k: faults.study(k, n, 1) for k, n in {counts}.items()}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, env=ALONE)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    stops = found.pop("stops")
    assert stops.keys() == {"pre-training", "fine-tuning"} and found["kills"]["kills"] == counts["kills"]
    for part in (*stops.values(), *found.values()):
        assert all(number == 0 for key, number in part.items() if key in faults.ZERO), part
    for name in ("checkpoints", "images"):
        refused, read = found[name]["refused_in_one_line"], found[name]["read"]
        assert refused + read == counts[name] and refused > counts[name] / 4


def test_logistic_regression_reaches_the_optimum():
    x, labels = torch.randn(200, 5, generator=seeded()), torch.randint(3, (200,), generator=seeded(1))
    x[:, 0] += 2 * labels
    x = F.pad(x.double(), (0, 1), value=1.0)
    weight = logistic.fit_logistic(x, labels, 3, decay=0.05)
    v = torch.zeros_like(weight).requires_grad_()               # plain gradient descent ends there too
    for _ in range(1000):
        loss = F.cross_entropy(x @ v, labels) + 0.025 * v[:-1].square().sum()
        gradient, = torch.autograd.grad(loss, v)
        v = (v - 0.6 * gradient).detach().requires_grad_()
    assert gradient.abs().max() < 1e-5 and (x @ (v - weight)).std(0).max() < 1e-2
    assert logistic.fit_logistic(x, labels, 3, 5.0)[:-1].norm() < weight[:-1].norm()


def test_regularisation_is_chosen_without_the_test_set():
    labels = torch.arange(120) % 3
    x = torch.randint(60, (120, 3, 4, 4), generator=seeded(1)) + 30 * labels.view(-1, 1, 1, 1)
    args = argparse.Namespace(device="cpu", seed=0)
    data, tests, swapped = (op.Data(those, lambda i: x[i].to(torch.uint8), args)
                            for those in (labels, labels[:30], (labels[:30] + 1) % 3))
    right, wrong = (logistic.logistic_probe(lambda images: images.flatten(1).float(), data, those, 3)
                    for those in (tests, swapped))
    assert right["decay"] == wrong["decay"] and right["test_top1"] > 60 > wrong["test_top1"]


def test_logistic_regression_writes_its_result(tmp_path, capsys):
    faults.pictures(tmp_path / "images")                        # of two colours
    logistic.main(["--device", "cpu", "--data", "folder", "--root", str(tmp_path / "images"), "--batch-size", "16",
                   "--probe", "6", "--out", str(tmp_path / "run")])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert printed["test_top1"] == kept["test_top1"] == 100 and printed["probe"] == 6


def test_mimetic_weights_have_the_products_of_the_paper():
    """One head: query times key is 0.7 Z + 0.7 I, value times output 0.4 Z - 0.4 I, where Z ~ N(0, 1 / dim)."""
    torch.manual_seed(0)
    model = inits.mimetic(op.ViT(32, 8, 10, 128, 2, 1))
    query, key, value = model.blocks[1].attn.qkv.weight.detach().view(3, 128, 128)
    for product, alpha, beta in ((query.T @ key, 0.7, 0.7), (value.T @ model.blocks[1].attn.proj.weight.T, 0.4, -0.4)):
        z = (product - beta * torch.eye(128)) / alpha * 128 ** 0.5
        assert abs(z.mean()) < 0.05 and 0.97 < z.std() < 1.03
    attention = inits.mimetic(op.ViT(32, 8, 10, 128, 2, 2)).blocks[0].attn          # a head has half of the ranks
    query, key, _ = attention.qkv.weight.detach().view(3, 2, 64, 128)
    heads = query.transpose(1, 2) @ key
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


def stripes(folder):
    """A dataset of two classes: stripes across, and down."""
    for split, n in (("train", 40), ("test", 10)):
        for k in range(2 * n):
            image = torch.randint(60, (16, 16), generator=seeded(k)) + 120 * (torch.arange(16) // 2 % 2)
            path = folder / split / ("down", "across")[k % 2] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image if k % 2 == 0 else image.T).to(torch.uint8).numpy()).save(path)
    return folder


def test_experiments_run_what_is_missing_keep_it_and_show_it(tmp_path, monkeypatch, capsys):
    data = f"--data folder --root {stripes(tmp_path / 'data')}"
    quick = "--batch-size 16 --img-size 16 --device cpu --precision fp32 --log-every 1"
    monkeypatch.setattr(experiments, "RECORDS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiments, "TABLES", {"tiny": (
        "three starts", 1, f"{quick} --steps 3 --L 4 --canvas 32 --points 500", f"{quick} --epochs 2 --eval-epochs 1", [
            ("fractal", 84.2, "", ""), ("scratch", None, None, ""), ("mimetic", None, "mimetic", "")])})

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["experiments.py", *words, "--data", data])
        experiments.main()
        return capsys.readouterr()

    plan = call("--plan").out.splitlines()
    assert [line.split()[0] for line in plan].count("finetune") == 3 and len(plan) == 5
    assert "| fractal | 84.2 | not run | 0 of 1 |" in call("tiny").out
    captured = call("--run")
    assert not captured.err and call("--plan").out.split() == []
    records = experiments.read_records()
    assert len(records) == 4                                    # the weights of mimetic initialisation are no run
    for name, record in records.items():
        log = [json.loads(line) for line in (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()]
        assert record["log"][-1] == {key: round(value, 6) for key, value in log[-1].items()}
        assert record["machine"]["threads"] == 1 and record["settings"]["seed"] == int(name[-1])
    [scratch] = [record for name, record in records.items() if "/scratch/" in name]
    with experiments.RECORDS.open("a") as file:                 # another seed, as if it had been run
        other = scratch | dict(name=scratch["name"][:-1] + "1", settings=scratch["settings"] | dict(seed=1))
        file.write(json.dumps(other | dict(log=[dict(test_top1=scratch["log"][-1]["test_top1"] + 2)])) + "\n")
    title, seeds, before, after, rows = experiments.TABLES["tiny"]
    experiments.TABLES["tiny"] = title, 2, before, after, rows          # only what is missing is run
    assert f"({2 ** 0.5:.1f}) | 2 of 2 |" in call("tiny").out
    plan = call("--plan").out.splitlines()
    assert len(plan) == 4 and all("--seed 1" in line for line in plan)
    experiments.TABLES["grid"] = title, 2, before, after, [("2 epochs / scratch", None, None, ""),
        ("2 epochs / fractal", None, "", ""), ("3 epochs / fractal", None, "", "--epochs 3")]
    *_, header, _, two, three = call("grid").out.splitlines()
    [fractal] = [record["log"][-1]["test_top1"] for name, record in records.items()
                 if name.endswith("points-500/0") and record["command"].startswith("finetune")]
    assert header == "|  | fine-tuning | scratch | fractal |" and three == "| 3 epochs | `--epochs 3` |  | not run |"
    assert two == f"| 2 epochs |  | {scratch['log'][-1]['test_top1'] + 1:.1f} (1.4) | {fractal:.1f}, 1 of 2 |"
    monkeypatch.setattr(op, "RECIPES", op.RECIPES | {"nano": ({**op.RECIPES["nano"][0], "clip_grad": 0.5},
                                                               *op.RECIPES["nano"][1:])})
    experiments.settings.cache_clear()
    assert "| fractal | 84.2 | not run | 0 of 2 |" in call("tiny").out       # a record of other settings is not shown
    experiments.settings.cache_clear()


def test_the_figure_has_a_dot_for_each_run_whatever_seeds_there_are(tmp_path, monkeypatch):
    dots = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axis, x, y, *_, **__: dots.append((x, y)))
    records = experiments.read_records()
    experiments.draw_learned(tmp_path / "today.png", records)
    starts = {name.split("/")[1] for name, record in records.items()
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


def test_every_row_of_every_table_is_a_command_and_a_name_is_one_run():
    runs = {}
    for name, (_, seeds, _, _, rows) in experiments.TABLES.items():
        assert seeds >= 1 and len({row[0] for row in rows}) == len(rows)
        for row in rows:
            for run, command in experiments.commands(name, row, 0).items():
                assert runs.setdefault(run, command) == command
                if not command.startswith(experiments.INITS):
                    assert op.parse(command.split()).recipe == "nano"
    assert len(runs) > 100 and len(set(runs.values())) == len(runs)
    usual = op.parse(["pretrain"])                              # a sweep's row of nano's value has no flag
    for name, flag in (("table5", "delta"), ("table6", "sigma"), ("table7", "L")):
        assert [float(row[0]) for row in experiments.TABLES[name][-1] if not row[2]] == [getattr(usual, flag)]
    by_label = {row[0]: row for row in experiments.TABLES["table9"][-1]}
    assert by_label["with mixup"][1] == 83.3 and experiments.TABLES["table5"][-1][0][1] == 1.2       # of the paper


def test_the_command_of_a_record_repeats_its_settings_whatever_the_recipe():
    for flags in ("pretrain --recipe small --optimizer adamw --no-cutmix", "finetune --recipe paper --epochs 3 --lr 0.1",
                  "pretrain --delta 0.2", "finetune --optimizer sgd --no-flip"):
        args = vars(op.parse(flags.split()))
        assert experiments.settings(experiments.words(args)) == experiments.decisive(args)


def test_recipe_small_is_what_ran_on_a_gpu():
    """Its length apart, and jitter, which has no effect with RandAugment. A change of it needs a new run."""
    records = experiments.read_records()
    for name, command in (("fractal", "pretrain"), ("final-fractal", "finetune")):
        known, today = records[f"gpu/{name}"]["settings"], experiments.settings(f"{command} --recipe small")
        assert {k for k in today if today[k] != known[k]} <= {"steps", "epochs", "jitter"} and len(today) > 20


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


def test_speed_sets_every_part_beside_a_limit(monkeypatch):
    monkeypatch.setattr(speed, "SOURCES", {name: speed.SOURCES[name] for name in ("1p-frac", "RCDB", "photograph")})
    result = speed.limits(argparse.Namespace(
        flags="--device cpu --recipe nano --precision fp32 --img-size 16 --steps 2 --log-every 1 --batch-size 8 "
              "--canvas 32 --points 500 --L 4"))
    assert set(result["sources"]) == set(speed.SOURCES)
    assert all(rate > 0 for source in result["sources"].values() for rate in source.values())
    for part in ("render", "augment", "step", "pretrain"):
        assert result[part]["images_per_s"] > 0 and result[part]["share"] >= 0
    assert result["step"]["share"] < 1 and result["render"]["share"] < 1         # nothing beats its limit
    assert 0.1 < result["peak_gb"] < 20 and json.dumps(result)


def test_speed_counts_the_operations_of_a_step():
    """2 FLOPs a product, forwards and twice backwards: the sum over layers, by hand."""
    B, N, D, classes = 2, 17, 32, 10
    args = argparse.Namespace(precision="fp32", clip_grad=0.0, optimizer="sgd", lr=0.1, weight_decay=0.0)
    x, target = torch.randn(B, 3, 16, 16), torch.full((B, classes), 0.1)
    block = N * 12 * D * D + 2 * N * N * D
    patches, head = (N - 1) * D * 48, D * classes
    assert speed.flops(op.ViT(16, 4, classes, D, 3, 2), args, x, target) == 2 * B * (
        3 * 3 * block + 2 * patches + 3 * head)                 # images need no gradient
