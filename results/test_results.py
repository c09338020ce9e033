"""Tests of the scripts in results/: faults, initial weights, logistic regression, tables, reproduce.sh, speed."""
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
import faults
import inits
import logistic
import onepfrac as op
import speed
import tables

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


def test_logistic_regression_leaves_a_record_for_the_tables(tmp_path, capsys):
    faults.pictures(tmp_path / "images")                        # of two colours
    for k in (1, 6):
        logistic.main(["--device", "cpu", "--data", "folder", "--root", str(tmp_path / "images"), "--batch-size", "16",
                       "--probe", str(k), "--out", str(tmp_path / "runs" / str(k))])
    first, last = tables.of_folders(tmp_path / "runs")
    assert (first["command"], first["settings"]["probe"], last["settings"]["probe"]) == ("logistic", 1, 6)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [first["test_top1"], last["test_top1"]] == [line["test_top1"] for line in printed] == [100, 100]


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


def record_of(recipe, row, seed, top1, data="cifar100", without=(), **changes):
    _, second, pretraining, _, settings = tables.planned(recipe, row, seed)
    if pretraining:
        pretraining = {k: v for k, v in (pretraining | changes).items() if k not in without}
    return dict(command=second.split()[0], recipe=recipe, seed=seed, test_top1=top1, seconds=120, device="cpu",
                commit="abc", pretrain=pretraining, settings=settings | dict(data=data),
                pretext_top1=top1 / 2 if pretraining else None)


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_tables_print_what_is_measured_and_plan_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "HERE", tmp_path / "results")
    rows = {row[0]: row for row in tables.tables("nano")["table5"][2]}
    write_records(tmp_path / "results" / "records.jsonl", [
        *(record_of("nano", rows["0.1"], seed, top1) for seed, top1 in ((0, 20.0), (1, 22.0), (2, 27.0))),
        record_of("nano", rows["0.2"], 0, 30.0),
        record_of("nano", rows["0.05"], 0, 40.0, lr=0.5),           # another setting
        record_of("small", rows["0.05"], 0, 50.0),                  # another recipe
        record_of("nano", rows["0.05"], 0, 60.0, "cifar10"),        # other data
        record_of("nano", rows["0.05"], 0, 70.0, steps=100),        # stopped halfway
        record_of("nano", rows["0.05"], 0, 80.0, without=["delta"]),        # then 0.1
        record_of("nano", rows["1.0"], 0, 90.0) | {"pretrain": {"recipe": None, "weights": "timm.pt"}}])
    common = ["--recipe", "nano", "--runs", str(tmp_path / "runs")]
    tables.main(["table5", *common])
    printed = capsys.readouterr().out
    assert "| 0.1 | 84.2 | 43.00 (32.14) | 3 | 22% |" in printed    # seed 0: the later record counts
    assert "| 0.2 | 83.4 | 30.00 | 1 of 3 | 15% |" in printed
    assert "| 0.05 | 83.0 | not run | 0 of 3 | - |" in printed and "| 1.0 | 82.6 | not run | 0 of 3 |" in printed
    assert "table7" not in printed and not (tmp_path / "results" / "tables").exists()
    tables.main(common)
    assert (tmp_path / "results" / "tables" / "nano.md").read_text().strip() in capsys.readouterr().out
    assert Image.open(tmp_path / "results" / "tables" / "nano.png").size[0] > 500
    tables.main(["table5", *common, "--plan"])
    captured = capsys.readouterr()
    plan = captured.out.splitlines()
    assert "14 runs to do, about 28 minutes" in captured.err and len(set(plan)) == len(plan) == 28
    assert not any("/1p-frac/" in line or "delta-0.2/0" in line for line in plan)
    for first, second in zip(plan[::2], plan[1::2]):                # every line is a command
        assert op.parse(first.split()).command == "pretrain" and op.parse(second.split()).command == "finetune"
    with pytest.raises(SystemExit):
        tables.main(["table99"])


def test_tables_read_run_folders_and_outlive_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "HERE", tmp_path / "results")
    (tmp_path / "results").mkdir()
    rows = {row[0]: row for row in tables.tables("nano")["table6"][2]}
    _, _, pretraining, _, settings = tables.planned("nano", rows["4.0"], 0)
    for name, command, of_run, log in (
            ("p", "pretrain", pretraining, dict(step=pretraining["steps"], images=7, seconds=60.0, top1=80.5)),
            ("f", "finetune", settings, dict(step=1, images=5, seconds=2.0, test_top1=33.0)),
            ("unfinished", "finetune", settings, dict(step=1, images=5, seconds=2.0, test_top1=44.0))):
        (tmp_path / name).mkdir()
        args = dict(command=command, ckpt=str(tmp_path / "p/last.pt") if name == "f" else None, commit="abc",
                    device="cpu", processor="x", threads=1)
        (tmp_path / name / "args.json").write_text(json.dumps(of_run | args))
        (tmp_path / name / "log.jsonl").write_text(json.dumps(log) + "\n")
        if name != "unfinished":
            (tmp_path / name / "curve.png").touch()
    tables.main(["table6", "--runs", str(tmp_path), "--collect"])
    assert "| 4.0 | 82.8 | 33.00 | 1 | 80% |" in capsys.readouterr().out
    [record] = tables.read_records(tmp_path / "results" / "records.jsonl")
    assert record["images"] == 12 and record["seconds"] == 62 and record["pretrain"]["sigma"] == 4.0
    tables.main(["table6", "--runs", str(tmp_path / "none"), "--collect"])
    assert "| 4.0 | 82.8 | 33.00 | 1 |" in capsys.readouterr().out
    assert tables.read_records(tmp_path / "results" / "records.jsonl") == [record]


def test_records_of_older_versions_keep_their_rows():
    """--fresh-texture is now --texture fresh, and the command `probe` finetune --probe K."""
    rows = {name: rows for name, (_, _, rows) in tables.tables("nano").items()}
    fresh, probe, tuned = rows["table13"][3], rows["fig3"][2], rows["table5"][3]
    old_fresh, old_probe, old_tuned = (record_of("nano", row, 0, 10.0) for row in (fresh, probe, tuned))
    old_fresh["pretrain"] |= dict(texture="random", fresh_texture=True)
    old_probe["settings"] |= dict(command="probe", layers=[3])
    for settings in (old_fresh["settings"], old_probe["settings"], old_tuned["settings"]):
        del settings["probe"]
    found = [tables.measured("nano", [fresh, probe, tuned], [record]) for record in (old_fresh, old_probe, old_tuned)]
    assert [[len(row) for row in rows] for rows in found] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert tables.measured("nano", rows["fig3"], [old_probe])[3] == {}          # of other blocks
    kept = tables.read_records(HERE / "records.jsonl")
    of_rows = [record for _, _, rows in tables.tables("nano").values() for row in tables.measured("nano", rows, kept)
               for record in row.values()]
    assert all(record in of_rows for record in kept)            # each still stands in a table


def test_every_row_of_every_table_is_a_command_at_every_recipe():
    for recipe in op.RECIPES:
        folders = {}
        for _, _, rows in tables.tables(recipe).values():
            for row in rows:
                first, second, pretraining, usual, settings = tables.planned(recipe, row, 0)
                assert (first is None) == (row[2] is None) and settings["recipe"] == recipe
                folders.setdefault(second.split("--out ")[1], set()).add((first, second))
                if first:
                    assert (usual != pretraining) == ("/1p-frac/" not in first)
                    assert tables.decisive(vars(op.parse(first.split()))) == pretraining        # nothing is refused
        assert all(len(runs) == 1 for runs in folders.values())     # one setting a folder
    deit = {row[2]: row for row in tables.tables("paper")["table9"][2]}
    assert deit["--no-crop"][1] == 80.1 and deit["--no-mixup --no-cutmix"][1] == 80.4
    assert "/1p-frac/" in tables.planned("paper", deit["--no-jitter"], 0)[0]    # RandAugment does it: the recipe itself
    assert ("with mixup", None, "--mixup", "finetune") in tables.tables("nano")["table9"][2]


def fake_python(folder, script):
    """A stand-in for Python that notes the commands, and an environment in which reproduce.sh uses it."""
    (folder / "fake.sh").write_text(f"""#!/bin/bash
if [ "$1" = results/tables.py ] && [[ "$*" != *--collect* ]]; then exec {sys.executable} "$@"; fi
echo "$@" >> commands.txt
{script}""")
    os.chmod(folder / "fake.sh", 0o755)
    (folder / "reproduce.sh").write_text((HERE.parent / "reproduce.sh").read_text())
    return ALONE | {"PYTHON": f"{folder}/fake.sh"}, lambda: (folder / "commands.txt").read_text().splitlines()


def test_reproduce_runs_what_is_not_measured_and_goes_on(tmp_path):
    environment, commands = fake_python(tmp_path, r"""
if [ "$2" = resume ]; then out=$3; else out=$(echo "$@" | sed 's/.*--out \([^ ]*\).*/\1/'); fi
mkdir -p $out; touch $out/last.pt
[ "$(wc -l < commands.txt)" != 2 ]
""")
    (tmp_path / "results").mkdir()
    for name in ("onepfrac.py", "results/tables.py"):
        (tmp_path / name).write_text((HERE.parent / name).read_text())
    write_records(tmp_path / "results" / "records.jsonl", [
        record_of("nano", row, 0, 10.0) for row in tables.tables("nano")["table12"][2][1:]])

    def reproduce(*names):
        return subprocess.run(["bash", "reproduce.sh", *names], cwd=tmp_path, capture_output=True, text=True,
                              env=environment)
    interrupted = reproduce("table12")                          # at its second command
    assert interrupted.returncode == 1 and "1 runs to do, about 2 minutes" in interrupted.stderr
    assert [c.split()[1] for c in commands()] == ["pretrain", "finetune"] and "canny" in commands()[0]
    assert commands()[1].endswith("--data cifar100")
    again = reproduce("nano", "table12")
    assert again.returncode == 0 and "| elastic | 37.0 | 10.00 | 1 |" in again.stdout
    outs = [c.split("--out ")[1].split()[0] for c in commands()[:2]]
    assert commands()[2:-1] == [f"onepfrac.py resume {out}" for out in outs] and "--collect" in commands()[-1]


def test_reproduce_gives_each_half_of_the_classes_its_own_folder_by_commands_that_parse(tmp_path):
    environment, commands = fake_python(tmp_path, "")
    for path in ("train/b c", "train/a", "train/d", "test/b c", "test/a", "test/d"):
        (tmp_path / "data" / path).mkdir(parents=True)
    subprocess.run(["bash", "reproduce.sh", "controls"], cwd=tmp_path, check=True, timeout=60,
                   env=environment | {"DATA": "--data folder --root data"})
    for half, classes in (("even", ["a", "d"]), ("odd", ["b c"])):
        for split in ("train", "test"):
            links = sorted((tmp_path / "runs" / "half" / half / split).iterdir())
            assert [link.resolve() for link in links] == [tmp_path / "data" / split / name for name in classes]
    trained, tested = ([c for c in commands() if start in c] for start in
                       ("pretrain --out runs/real", "finetune --out runs/half-"))
    assert len(trained) == 3 and all("--root runs/half/even/train" in c for c in trained)
    assert len(tested) == 15 and all("--root runs/half/odd " in c for c in tested)
    assert all(("--ckpt runs/real-" in c) == ("half-real" in c) for c in tested)
    for command in commands():
        script, *words = command.split()
        if script == "onepfrac.py":
            assert op.parse(words).recipe == "nano"


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
