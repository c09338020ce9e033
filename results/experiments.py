"""Every reported run: what is run, the records, and the tables and figures that are made of them.

    python results/experiments.py                   # print all tables from results/runs.jsonl, draw the figures
    python results/experiments.py transfer table5   # print two tables
    python results/experiments.py --plan table5     # print the commands whose records are missing
    python results/experiments.py --run table5      # run them, two at a time with one thread each; again: goes on
    python results/experiments.py --keep FOLDER     # keep the records of all finished runs under a folder

--data says where CIFAR-100 is: "--data cifar100" (downloaded) or "--data folder --root DIR". A run has its folder
under runs/, by its name. When it has ended, its record becomes a line of runs.jsonl: name, command, settings, commit,
machine, log. A record counts as a table's if it has the name and the settings that the table gives it today.
"""
import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import onepfrac as op

RECORDS, RUNS, INITS = HERE / "runs.jsonl", Path("runs"), ("mimetic", "impulse")
MACHINE = "device processor precision threads torch world".split()
# Not compared: where it ran, how often it saved and tested, and what the name tells.
BESIDE = {*MACHINE, *"command out root device resume save_every log_every rank lead eval_epochs commit classes images "
          "data ckpt".split()}

# ---- What is run. A table: title, seeds, flags of every pre-training, flags of every fine-tuning, rows. A row: label,
# ---- CIFAR-100 top-1 in the paper, flags of pre-training (None: from scratch; "mimetic", "impulse": weights of
# ---- inits.py), flags of fine-tuning. Rows "A / B" are shown as a grid, A down and B across.

SGD, ADAMW = "--optimizer sgd --lr 0.2 --weight-decay 1e-4", "--optimizer adamw --lr 1e-3"
OWN = "--batch-size 128 --lr 3e-3"             # the fractal's own best on held-out training images
LONG = f"--epochs 60 --eval-epochs 10 {OWN} --min-crop 0.5 --randaug"
C250 = "--train-per-class 250"                 # images of CIFAR-100
SHORT, BRIEF = "--steps 1500 --no-cutmix", f"{C250} --epochs 3"      # the paper's tables: five minutes a row
MANY = "--categories 64 --instances 64"


def alike(*rows):
    """Rows whose fine-tuning is that of the table."""
    return [(*row, "") for row in rows]


def sweep(flag, usual, top1):
    """Rows of several values of a flag, usual: that of nano."""
    return alike(*((str(value), paper, f"--{flag} {value}" if value != usual else "") for value, paper in top1.items()))


def both(label, flags):
    """The two rows of a comparison, with flags of fine-tuning."""
    return [(f"{label}from one fractal", None, "", flags), (f"{label}from scratch", None, None, flags)]


def by_hand(label, flags):
    """Rows of initialisations without training."""
    return [(f"{label}{kind} initialisation", None, kind, flags) for kind in INITS]


TABLES = {
    "transfer": ("250 images a class, 8 epochs", 3, "", C250, [
        *both("", ""), *by_hand("", ""), ("from one fractal, its own best", None, "", OWN)]),
    "time": ("250 images a class; pre-training and 8 epochs take as long as 28 epochs", 1, "", C250,
             both("8 epochs / ", "") + both("28 epochs / ", "--epochs 28")),
    "optimizers": ("250 images a class, 8 epochs", 1, "", C250, [
        row for label, flags in (("SGD / ", SGD), ("AdamW / ", ADAMW), ("Muon / ", ""))
        for row in both(label, flags) + by_hand(label, flags)]),
    "try": ("README's experiments", 1, "--steps 1000", "--train-per-class 250 --epochs 2", [
        *alike(("the default", None, ""), ("Delta 0.001", None, "--delta 0.001"), ("without crops", None, "--no-crop"),
               ("noise", None, "--source gaussian --texture random"), ("another fractal", None, "--fractal-seed 0"),
               ("edges of a photograph", None, "--source image --edges canny")),
        ("from scratch", None, None, "")]),
    "few": ("25 images a class, 8 epochs", 3, "", "--train-per-class 25", both("", "")),
    "length": ("all 50,000 images", 3, "", "", [
        row for epochs, flags in ((8, OWN), (20, f"--epochs 20 {OWN}"), (60, LONG))
        for row in both(f"{epochs} epochs / ", flags)]),
    "longer": ("pre-training four times as long", 1, "", "", [
        row for label, flags in (("250 images a class, 8 epochs / ", C250), ("all images, 8 epochs / ", OWN))
        for row in ((f"{label}from 4,700 steps", None, "", flags),
                    (f"{label}from 18,800 steps", None, "--steps 18800", flags),
                    (f"{label}from scratch", None, None, flags))]),
    "fig3": ("a linear classifier on the first K blocks, frozen; 250 images a class, 8 epochs", 1, "", C250, [
        row for k in (1, 2, 3, 4, 6) for row in both(f"K = {k} / ", f"--probe {k}")]),
    "table2": ("FractalDB, OFDB and 1p-frac", 3, SHORT, BRIEF, alike(
        ("scratch", 64.2, None), ("FractalDB, 64 x 64 images", 81.6, MANY),
        ("OFDB, 64 images", 84.0, "--categories 64"), ("1p-frac", 84.2, ""))),
    "fractals": ("other fractals", 1, SHORT, BRIEF, alike(
        ("--fractal-seed 32, the default", None, ""),
        *((f"--fractal-seed {seed}", None, f"--fractal-seed {seed}") for seed in (0, 1, 2)))),
    "table3": ("contours", 1, SHORT, BRIEF, alike(
        ("RCDB, 64 x 64 images", 81.6, f"--source rcdb {MANY}"),
        ("RCDB, 64 images", 80.4, "--source rcdb --categories 64"), ("RCDB, one image", 82.5, "--source rcdb"),
        ("Visual Atoms, 64 x 64 images", 84.9, f"--source va {MANY}"),
        ("Visual Atoms, 64 images", 82.1, "--source va --categories 64"),
        ("Visual Atoms, one image", 82.6, "--source va"))),
    "table4": ("noise, its dots drawn as fixed random 3x3 masks", 1, f"{SHORT} --texture random", BRIEF, alike(
        ("Gaussian", 1.1, "--source gaussian"), ("uniform", 2.0, "--source uniform"), ("1p-frac", 84.2, ""))),
    "table5": ("perturbation degree Delta", 3, SHORT, BRIEF, sweep("delta", 0.1, {
        0.001: 1.2, 0.01: 19.9, 0.05: 83.0, 0.1: 84.2, 0.2: 83.4, 1.0: 82.6})),
    "table6": ("sigma-factor", 1, SHORT, BRIEF, sweep("sigma", 3.5, {
        3.5: 84.2, 4.0: 82.8, 4.5: 81.9, 5.0: 82.2, 6.0: 81.3})),
    "table7": ("number of perturbations L", 3, SHORT, BRIEF, sweep("L", 64, {
        16: 78.7, 64: 82.3, 512: 82.4, 1000: 84.2})),
    "table9": ("augmentation of pre-training (the paper's rows: with all else of DeiT's)", 1, "--steps 1500",
               BRIEF, alike(
                   ("crops and jitter", 80.4, "--no-cutmix"), ("without crops", None, "--no-cutmix --no-crop"),
                   ("without changes of aspect", None, "--no-cutmix --no-aspect"),
                   ("without jitter", None, "--no-cutmix --no-jitter"),
                   ("RandAugment in place of jitter", None, "--no-cutmix --randaug"),
                   ("with erasing", None, "--no-cutmix --erase"), ("with flips", None, "--no-cutmix --flip"),
                   ("with cutmix", 83.6, ""), ("with mixup", 83.3, "--no-cutmix --mixup"),
                   ("with both", 84.2, "--mixup"))),
    "table11": ("one photograph (the paper: mean of five) under affine warps", 1, SHORT, BRIEF, alike(
        ("RGB", 81.6, "--source image"), ("edges", 82.2, "--source image --edges canny"))),
    "table12": ("the edges of one photograph (the paper: mean of five) under warps", 1,
                f"{SHORT} --source image --edges canny", BRIEF, alike(
                    ("affine", 81.9, ""), *((warp, top1, f"--warp {warp}") for warp, top1 in (
                        ("homography", None), ("elastic", 37.0), ("polynomial", 81.3))))),
    "table13": ("random patches: masks, fixed or (w/ Aug.) new at each step", 1, SHORT, BRIEF, alike(
        ("OFDB", 84.0, "--categories 64 --texture random"), ("1p-frac", 84.2, "--texture random"),
        ("OFDB w/ Aug.", 85.3, "--categories 64 --texture fresh"), ("1p-frac w/ Aug.", 84.7, "--texture fresh"),
        ("fixed masks alone, Delta 0", None, "--texture random --delta 0"))),
}


# ---- Runs, by name

def slug(flags):
    return "-".join(flags.replace("--", "").split())


def commands(table, row, seed):
    """{name: command} of a row: its pre-training, if it has one, then its fine-tuning."""
    before, after = TABLES[table][2:4]
    _, _, start, tune = row
    runs, name, ckpt = {}, "scratch", ""
    if start is not None:
        command = start if start in INITS else f"pretrain {before} {start}"
        name = start if start in INITS else slug(f"{before} {start}") or "nano"
        ckpt = f"--ckpt {RUNS}/starts/{name}/{seed}/last.pt"
        runs[f"starts/{name}/{seed}"] = " ".join(f"{command} --seed {seed}".split())
    runs[f"{slug(f'{after} {tune}') or 'nano'}/{name}/{seed}"] = " ".join(
        f"finetune {after} {tune} --seed {seed} {ckpt}".split())
    return runs


@functools.cache
def settings(command):
    """The settings that the result of a command depends on."""
    return decisive(vars(op.parse(command.split())))


def decisive(args):
    return {name: value for name, value in args.items() if name not in BESIDE}


def fits(known, command):
    """Whether known settings are those of a command today. (Initial weights have none.)"""
    return command.startswith(INITS) or all(known.get(k) == v for k, v in settings(command).items())


def measured(runs, records):
    """The records of the runs of a row, or None: one is missing, or of other settings."""
    if all(fits(records.get(name, {}).get("settings", {}), command) for name, command in runs.items()):
        return [records[name] for name in runs if name in records]


def read_records():
    """{name: record}"""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def words(args):
    """The command line of a run's settings, without what the recipe says."""
    line = [args["command"]] + ["--recipe", args["recipe"]] * (args["recipe"] != "nano")
    for name, usual in vars(op.parse(line)).items():
        value, flag = args.get(name), name.replace("_", "-")
        if name in BESIDE or value == usual:
            continue
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            line += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
    if args.get("ckpt"):
        line += ["--ckpt", args["ckpt"][max(0, args["ckpt"].find(f"{RUNS}/")):]]
    return " ".join(line)


def keep(folder, name):
    """Add the record of a finished run to runs.jsonl. Of the log it keeps tests, and some twenty other lines."""
    args = json.loads((folder / "args.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    every = -(-len(log) // 20)
    log = [line for k, line in enumerate(log) if "test_top1" in line or k % every == 0 or k == len(log) - 1]
    log = [{key: round(value, 6) for key, value in line.items()} for line in log]
    record = dict(name=name, command=words(args), settings=decisive(args) | dict(images=args.get("images")),
                  commit=args["commit"], machine={k: args[k] for k in MACHINE}, log=log)
    with RECORDS.open("a") as file:
        file.write(json.dumps(record) + "\n")


# ---- Running

def plan(names, records):
    """{name: command} of the rows that are not measured, what others start from first."""
    runs = {}
    for table in names:
        for row in TABLES[table][-1]:
            for seed in range(TABLES[table][1]):
                if not measured(commands(table, row, seed), records):
                    runs |= commands(table, row, seed)
    return runs


def run(name, command, data):
    """Run a command in its folder, or go on with it; one thread."""
    folder, (kind, *flags) = RUNS / name, command.split()
    folder.mkdir(parents=True, exist_ok=True)
    if kind in INITS:
        words = [HERE / "inits.py", kind, folder / "last.pt", *flags]
    elif (folder / "args.json").exists():
        if not fits(json.loads((folder / "args.json").read_text()), command):
            print(f"{folder} holds a run of other settings; remove it", file=sys.stderr)
            return
        words = [HERE.parent / "onepfrac.py", "resume", folder]
    else:
        words = [HERE.parent / "onepfrac.py", kind, *flags, *(data.split() if kind == "finetune" else ()),
                 "--out", folder]
    print(name, flush=True)
    done = subprocess.run([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        print(f"{name} failed: {done.stderr}", file=sys.stderr, flush=True)
    elif not measured({name: command}, read_records()) and kind not in INITS:
        keep(folder, name)


def run_all(runs, data, workers):
    """Run first what others start from."""
    first = {name for name in runs if any(f"{RUNS}/{name}/" in command for command in runs.values())}
    for some in (first, runs.keys() - first):
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda name: run(name, runs[name], data), [name for name in runs if name in some]))


# ---- Showing

def spread(values):
    """Mean (standard deviation), or one value, or that there is none."""
    text = f"{statistics.mean(values):.1f}" if values else "not run"
    return text + (f" ({statistics.stdev(values):.1f})" if len(values) > 1 else "")


def found(table, row, records):
    """Of each seed that is measured: the record, and that of its pre-training (or None)."""
    all_seeds = [measured(commands(table, row, seed), records) for seed in range(TABLES[table][1])]
    return [(kept[-1], kept[0] if len(kept) > 1 else None) for kept in all_seeds if kept]


def show(table, records):
    """A table in Markdown."""
    title, seeds, before, after, rows = TABLES[table]
    grid = all(" / " in row[0] for row in rows)
    lines = (as_grid if grid else as_rows)(table, records)
    title += f", {seeds} seed{'s' * (seeds > 1)}" * grid
    shown = [k for k in range(len(lines[0])) if k == 0 or any(line[k] for line in lines[1:])]       # no empty columns
    print(f"\n**{table}: {title}.** Pre-training: `{before or 'nano'}`. Fine-tuning: `{after or 'nano'}`.\n")
    lines.insert(1, ["---"] * len(lines[0]))
    print(*(f"| {' | '.join(line[k] for k in shown)} |" for line in lines), sep="\n")


def as_rows(table, records):
    """A header, and a line for each row: mean and standard deviation over seeds, and what pre-training learned of its
    own task."""
    lines = [["", "fine-tuning", "paper", "top-1", "seeds", "own task"]]
    for row in TABLES[table][-1]:
        (label, paper, _, tune), pairs = row, found(table, row, records)
        own = [start["log"][-1]["top1"] for _, start in pairs if start]
        lines.append([label, f"`{tune}`" * bool(tune), str(paper or ""), spread([last(tested) for tested, _ in pairs]),
                      f"{len(pairs)} of {TABLES[table][1]}", f"{statistics.mean(own):.0f}%" if own else ""])
    return lines


def as_grid(table, records):
    """Of rows "A / B": a line for each A, a column for each B, top-1 alone."""
    cells, seeds = {}, TABLES[table][1]
    for row in TABLES[table][-1]:
        (label, _, _, tune), pairs = row, found(table, row, records)
        down, _, across = label.partition(" / ")
        top1 = spread([last(tested) for tested, _ in pairs])
        if 0 < len(pairs) < seeds:
            top1 += f", {len(pairs)} of {seeds}"
        cells.setdefault((down, f"`{tune}`" * bool(tune)), {})[across] = top1
    columns = dict.fromkeys(across for line in cells.values() for across in line)
    return [["", "fine-tuning", *columns],
            *([*key, *(line.get(across, "") for across in columns)] for key, line in cells.items())]


def last(record):
    return record["log"][-1]["test_top1"]


def show_search(records):
    """Run by run, what was tried: pre-training, and fine-tuning on training images with others held out."""
    for kind, what in ("pretrain", "own task"), ("finetune", "top-1, held-out training images"):
        print(f"\n| {kind} | command, from today's recipe | {what} | commit |\n|---|---|---|---|")
        for name, record in sorted(records.items()):
            if name.startswith("search/") and record["command"].startswith(kind):
                end = record["log"][-1]
                print(f"| {name.removeprefix('search/')} | `{record['command']}` | "
                      f"{end.get('test_top1', end.get('top1')):.1f} | {record['commit']} |")


def figure_of(panels, width=4, height=3.6):
    """An empty figure with panels side by side, for accuracies on CIFAR-100 -> figure, axes."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, panels, figsize=(1.5 + width * panels, height), layout="constrained",
                                squeeze=False)
    axes[0, 0].set_ylabel("top-1 on CIFAR-100 (%)")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, axes[0]


def draw(path, panels):
    """A row of panels (title, x label, lines), lines: {label: [(x, [top-1 of each seed])]}."""
    figure, axes = figure_of(len(panels))
    for axis, (title, x_label, lines) in zip(axes, panels):
        for k, (label, points) in enumerate(lines.items()):
            axis.plot([x for x, _ in points], [statistics.mean(y) for _, y in points], f"C{k}o-", ms=4, label=label)
            axis.plot([x for x, ys in points for _ in ys], [y for _, ys in points for y in ys], f"C{k}.", ms=3)
        axis.set(title=title, xlabel=x_label)
        if lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def draw_learned(path, records):
    """What pre-training learned of its own task, and what that is worth: a dot for each row of the paper's tables."""
    figure, [axis] = figure_of(1, 7.5, 5)
    rows = {}                   # of the run's name, as a row may be in several tables: the one with most seeds
    for table in sorted(TABLES, key=lambda table: TABLES[table][1]):
        for row in TABLES[table][-1]:
            if TABLES[table][3] == BRIEF and found(table, row, records):
                *_, run = commands(table, row, 0)
                rows[run] = table, row
    for table, row in rows.values():
        pairs = found(table, row, records)
        top1 = statistics.mean(last(tested) for tested, _ in pairs)
        if row[2] is None:
            axis.axhline(top1, color="grey", ls="--")
            axis.annotate("from scratch", (70, top1), va="bottom", color="grey", fontsize=8)
            continue
        own = statistics.mean(start["log"][-1]["top1"] for _, start in pairs)
        axis.plot(own, top1, "C0o", ms=5, alpha=0.6)
        if top1 < 29:           # above, the dots are too close for labels
            shift, side = (-5, "right") if own > 80 else (5, "left")
            label = f"{table.removeprefix('table')}: {row[0].partition(',')[0]}"
            axis.annotate(label, (own, top1), (shift, -2), ha=side, fontsize=8, textcoords="offset points")
    axis.set(xlabel="own task (%)", xlim=(0, 104))
    figure.savefig(path, dpi=130)


def curves(table, records):
    """Test accuracy over the course of fine-tuning: the lines of a panel, of rows with all seeds."""
    lines = {}
    for row in TABLES[table][-1]:
        tests = [[line for line in tested["log"] if "test_top1" in line] for tested, _ in found(table, row, records)]
        if len(tests) == TABLES[table][1]:
            lines[row[0]] = [(some[0]["images"] / 1000, [line["test_top1"] for line in some]) for some in zip(*tests)]
    return lines


def ends(table, records):
    """Test accuracy at the end over the epochs of fine-tuning, of a grid: the lines of a panel."""
    lines = {}
    for row in TABLES[table][-1]:
        tested = [tested for tested, _ in found(table, row, records)]
        if tested:
            point = tested[0]["settings"]["epochs"], [last(record) for record in tested]
            lines.setdefault(row[0].partition(" / ")[2], []).append(point)
    return lines


def draw_figures(records):
    draw(HERE / "transfer.png", [
        ("250 images a class, 8 epochs (a dot: a seed)", "thousands of images seen", curves("transfer", records)),
        ("all 50,000 images (a dot: a training)", "epochs of fine-tuning", ends("length", records))])
    draw_learned(HERE / "learned.png", records)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}, search; default: all")
    parser.add_argument("--plan", action="store_true", help="print the commands of what is missing")
    parser.add_argument("--run", action="store_true", help="run them")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the records of the runs under it")
    parser.add_argument("--data", default="--data cifar100", help="flags: where CIFAR-100 is")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    if unknown := {*args.names} - {*TABLES, *["search"] * (not args.plan and not args.run)}:
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}, search")
    records = read_records()
    names = [name for name in args.names or TABLES if name in TABLES]
    if args.workers < 1:
        parser.error("--workers: one or more")
    if args.keep:
        if not args.keep.is_dir():
            parser.error(f"--keep {args.keep}: is no folder")
        for file in sorted(args.keep.rglob("curve.png")):       # a run draws it when it ends
            name = str(file.parent.relative_to(args.keep))
            if name not in records:
                keep(file.parent, name)
    elif args.plan or args.run:
        runs = plan(names, records)
        if args.run:
            run_all(runs, args.data, args.workers)
        else:
            print(*(f"{command} --out {RUNS}/{name}" for name, command in runs.items()), sep="\n")
    else:
        for name in names:
            show(name, records)
        if not args.names or "search" in args.names:
            show_search(records)
        if not args.names:
            draw_figures(records)


if __name__ == "__main__":
    main()
