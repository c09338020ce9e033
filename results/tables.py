"""What `python onepfrac.py table` knows: the rows of the paper's tables, the runs that fill them, and how they look."""
import json
import sys
from pathlib import Path

import torch

import onepfrac as op


def tables(recipe):
    """What `table` knows of the paper, at the size of a recipe: name -> (title, seeds, rows), a row
    (label, CIFAR-100 top-1 in the paper, flags of pre-training or None for scratch[, of a probe]).
    """
    L, on = op.RECIPES[recipe]["pretrain"]["L"], op.RECIPES[recipe]["pretrain"]["augment"].split()
    scratch, ours = ("scratch", 64.2, None), ("1p-frac", 84.2, "")
    many, few = f"--categories {L} --instances {L}", f"--categories {L}"

    def sweep(flag, top1):
        return [(str(value), paper, f"--{flag} {value}") for value, paper in top1.items()]

    def turn(top1, *names):                     # off what the recipe has on, and the reverse
        off = [name in on for name in names]
        return (" and ".join(f"without {n}" if o else f"with {n}" for n, o in zip(names, off)),
                top1 if all(off) else None,
                " ".join(f"--no-{n}" if o else f"--{n}" for n, o in zip(names, off)))

    def probes(label, flags, top1=(None,) * 5, classifier=""):
        return [(f"{label}, k = {k}", paper, flags, f"--layers {k}{classifier}")
                for k, paper in zip((1, 2, 3, 4, 6), top1)]

    return {
        "table2": ("FractalDB, OFDB and 1p-frac", 3, [
            scratch, ("FractalDB", 81.6, many), ("OFDB", 84.0, few), ours]),
        "table3": ("contours", 1, [
            ("RCDB", 81.6, "--source rcdb " + many), ("RCDB, one a category", 80.4,
                                                      "--source rcdb " + few),
            ("RCDB, one image", 82.5, "--source rcdb"), ("Visual Atoms", 84.9,
                                                         "--source va " + many),
            ("Visual Atoms, one a category", 82.1, "--source va " + few),
            ("Visual Atoms, one image", 82.6, "--source va"), ours]),
        "table4": ("one image of noise, in random 3x3 masks", 1, [
            ("Gaussian", 1.1, "--source gaussian --texture random"),
            ("uniform", 2.0, "--source uniform --texture random"),
            ("1p-frac", 84.2, "--texture random"), scratch]),
        "table5": ("perturbation degree Delta", 3, sweep("delta", {
            0.001: 1.2, 0.01: 19.9, 0.05: 83.0, 0.1: 84.2, 0.2: 83.4, 1.0: 82.6})),
        "table6": ("sigma-factor", 1, sweep("sigma", {
            3.5: 84.2, 4.0: 82.8, 4.5: 81.9, 5.0: 82.2, 6.0: 81.3})),
        "table7": ("number of perturbations L", 1, sweep("L", {
            16: 78.7, 64: 82.3, 512: 82.4, 1000: 84.2})),
        "table9": ("augmentation, the recipe with one switch turned", 1, [
            ours, turn(83.4, "randaug"), turn(80.1, "crop"), turn(83.6, "aspect"),
            turn(84.0, "erase"), turn(83.6, "mixup"), turn(83.3, "cutmix"),
            turn(80.4, "mixup", "cutmix"), turn(84.3, "flip"), turn(84.2, "jitter")]),
        "table11": ("one photograph (the paper: mean of five) under affine warps", 1, [
            ("RGB", 81.6, "--source image"), ("edges", 82.2, "--source image --edges canny")]),
        "table12": ("the edges of one photograph (the paper: mean of five) under warps", 1, [
            ("affine", 81.9, "--source image --edges canny"),
            *((warp, top1, f"--source image --edges canny --warp {warp}") for warp, top1 in (
                ("homography", None), ("elastic", 37.0), ("polynomial", 81.3)))]),
        "table13": ("random patch augmentation", 1, [
            (label + aug, top1, f"{flags} --texture random {fresh}".strip())
            for aug, fresh, tops in (("", "", (84.0, 84.2)),
                                     (" w/ Aug.", "--fresh-texture", (85.3, 84.7)))
            for label, flags, top1 in zip(("OFDB", "1p-frac"), (few, ""), tops)]),
        "fractals": ("which fractal, --fractal-seed (not in the paper)", 1,
                     sweep("fractal-seed", dict.fromkeys((32, 0, 1, 2, 3, 4)))),
        "fig3": ("linear probes of the first k blocks, and by L-BFGS", 1, [
            *probes("1p-frac", "", (11.7, 15.5, 14.4, 13.8, 17.7)), *probes("random weights", None),
            *probes("1p-frac, L-BFGS", "", classifier=" --classifier lbfgs"),
            *probes("random weights, L-BFGS", None, classifier=" --classifier lbfgs")]),
    }


TABLE_RUNS = {  # how long the tables' runs are: flags of pretrain, finetune and probe
    "nano": ("--steps 2000", "--train-per-class 250 --epochs 3", "--train-per-class 250"),
    "small": ("", "", ""), "paper": ("", "", "")}


def planned(recipe, row, seed):
    """The runs of a row of `tables`: command lines (pretrain or None, finetune or probe), and what
    a record of them must have: pairs (settings, settings with no flag of the row)."""
    flags, probing, (before, after, probed) = row[2], " ".join(row[3:]), TABLE_RUNS[recipe]
    common, folder = f"--recipe {recipe} --seed {seed}", f"runs/tables/{recipe}/"

    def settings(line):
        args = op.make_parser().parse_args(line.split())
        op.fill_in(args)
        return json.loads(json.dumps(op.result_settings(vars(args))))

    def name(*words):
        return "-".join(" ".join(words).replace("--", "").split())

    first, ckpt, pretraining, usual = None, "", None, None
    if flags is None:
        folder += f"scratch/{seed}"
    else:
        line = f"pretrain {common} {before}".strip()
        pretraining, usual = settings(f"{line} {flags}"), settings(line)
        if pretraining == usual:                # rows that are the recipe itself share a run
            flags = ""
        folder += f"{name(flags) or '1p-frac'}/{seed}"
        first = f"{line} {flags}".strip() + f" --out {folder}/pretrain"
        ckpt = f"--ckpt {folder}/pretrain/last.pt "
    line = f"probe {common} {probed} {probing}" if probing else f"finetune {common} {after}"
    second = f"{' '.join(line.split())} {ckpt}--out {folder}/{name(line.split()[0], probing)}"
    return first, second, (pretraining, usual), (settings(line), settings(line))


def matches(record, pretraining, settings):
    """Whether a record has these settings. A flag that came later counts as left out then; a
    folder counts as CIFAR-100, since nothing tells what is in it."""
    def same(old, new, usual):
        return (old is None) == (new is None) and all(
            old.get(k, usual[k]) == new[k] for k in new or () if k not in ("precision", "data"))
    return (same(record["pretrain"], *pretraining) and same(record["settings"], *settings)
            and record["settings"]["data"] in ("cifar100", "folder"))


def table(args):
    """The paper's numbers beside the measured ones, from the runs' records (all tables: into --out
    as well); or, with --plan, the commands that are still to be run."""
    out, path, known = Path(args.out), Path(args.records), tables(args.recipe)
    for name in args.names:
        if name not in known:
            raise op.InputError(f"NAME {name}: there is no such table; there are {', '.join(known)}")
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        whole = all({"recipe", "seed", "seconds", "test_top1", "device", "commit", "pretrain",
                     "settings"} <= set(r) for r in records)
    except (ValueError, TypeError):
        whole = False
    if not whole:
        raise op.InputError(f"--records {path}: not records of runs, a JSON object a line")
    records = [r for r in records if r["recipe"] == args.recipe]
    plan, used, body, measured = {}, [], [], {}
    for name, (title, seeds, rows) in known.items():
        if args.names and name not in args.names:
            continue
        body += [f"## {name}: {title}", "", "| | paper | here | seeds |", "|---|---|---|---|"]
        for row in rows:
            values = []
            for seed in sorted({*range(seeds), *(r["seed"] for r in records)}):
                first, second, *settings = planned(args.recipe, row, seed)
                found = [r for r in records if r["seed"] == seed and matches(r, *settings)][-1:]
                values += [r["test_top1"] for r in found]
                used += found
                if not found and seed < seeds:
                    plan |= {line: None for line in (first, second) if line}
            number = f"{sum(values) / len(values):.2f}" if values else "not run"
            if len(values) > 1:
                number += f" ({torch.tensor(values).std():.2f})"
            paper = "-" if row[1] is None else row[1]
            asked = f" of {seeds}" if len(values) < seeds else ""
            body.append(f"| {row[0]} | {paper} | {number} | {len(values)}{asked} |")
            measured.setdefault(name, []).append((row[0], row[1], values))
        body.append("")
    missing = sum(not line.startswith("pretrain") for line in plan)
    if args.plan:
        print(*plan, sep="\n")
        minutes = sum(r["seconds"] for r in records) / max(1, len(records)) / 60
        about = f", about {missing * minutes:.0f} minutes by the records" if records else ""
        print(f"{missing} runs to do{about}", file=sys.stderr)
        return
    before, after, probed = (flags or "as the recipe" for flags in TABLE_RUNS[args.recipe])
    each = {key: ", ".join(sorted({str((r | r["settings"])[key]) for r in used})) or "none yet"
            for key in ("device", "commit", "data")}
    head = [f"# The paper's tables at `{args.recipe}`", "",
            "Top-1 on CIFAR-100's test set in percent, last epoch; mean (standard deviation over "
            "seeds).", "",
            f"pretrain: {before} · finetune: {after} · probe: {probed}  ",
            f"data: {each['data']} · device: {each['device']} · commit: {each['commit']}  ",
            f"missing: {missing} runs", ""]
    print("\n".join(head + body))
    if not args.names:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{args.recipe}.md").write_text("\n".join(head + body))
        draw_tables(out, args.recipe, measured)


def draw_tables(out, recipe, measured):
    """Accuracy over delta, sigma and L, and of the probes over k: the paper's and ours."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    scratch = next((v for row, _, v in measured.get("table2", ()) if row == "scratch"), ())
    for axis, (name, label) in zip(axes, (("table5", "$\\Delta$"), ("table6", "$\\sigma$"),
                                          ("table7", "$L$"), ("fig3", "$k$"))):
        right = axis.twinx()
        series = {}
        for row, paper, values in measured.get(name, ()):
            line, _, x = row.rpartition(", k = ")
            series.setdefault(line or "1p-frac", []).append((float(x), paper, values))
        for k, (line, points) in enumerate(series.items()):
            ours = [(x, sum(v) / len(v)) for x, _, v in points if v]
            axis.plot(*zip(*ours) if ours else ((), ()), color=f"C{k}", marker="o", label=line)
            axis.scatter([x for x, _, v in points for _ in v], [y for _, _, v in points for y in v],
                         color=f"C{k}", s=6)
            theirs = [(x, paper) for x, paper, _ in points if paper is not None]
            right.plot(*zip(*theirs) if theirs else ((), ()), color="0.6", marker="s", ls="--")
        axis.set_xlabel(label)
        if name in ("table5", "table7"):
            axis.set_xscale("log")
        else:
            axis.set_xticks(sorted({x for points in series.values() for x, _, _ in points}))
        axis.set_zorder(1)
        axis.patch.set_visible(False)
        if scratch and name != "fig3":
            axis.axhline(sum(scratch) / len(scratch), color="C1", lw=1, label="scratch")
        axis.legend(fontsize=7)
    axes[0].set_ylabel(f"top-1 (%) at {recipe}")
    right.set_ylabel("paper (grey)")
    figure.savefig(out / f"{recipe}.png", dpi=150)
    print(out / f"{recipe}.png")
