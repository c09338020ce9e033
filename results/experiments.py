"""The records of all reported runs, and the tables and figures that are made of them.

    python results/experiments.py                   # print all tables from results/runs.jsonl, draw the figures
    python results/experiments.py transfer table5   # print two tables
    python results/experiments.py --keep FOLDER     # keep the records of all finished runs under a folder

`bash reproduce.sh TABLE` trains, into folders whose names are those of the records. A record is a line of runs.jsonl:
name, command, settings, commit, machine, log. A name has the flags; beside them the defaults of recipe nano count. So
if the recipe changes, runs before and after could meet in a table: `mixed` tells.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import onepfrac as op

RECORDS = HERE / "runs.jsonl"
MACHINE = "device processor precision threads torch world_size".split()
# No settings of a record: where it ran, how often it saved and tested, and what its name tells.
BESIDE = {*MACHINE, *"command out root rank lead save_every log_every eval_epochs commit classes data ckpt".split()}

# A table: title, seeds, flags of every pre-training, flags of every fine-tuning, rows. A row: label | top-1 in the
# paper | flags of pre-training (scratch: there is none; mimetic, mimetic-0.2, impulse: weights of inits.py; finetune:
# another fine-tuning, with all its flags; fractal finetune: it starts from the fractal) | flags of fine-tuning; a ";"
# is a new line. Rows "A / B" are shown as a grid, A down and B across.
C250 = "--train-per-class 250"                 # images of CIFAR-100
OWN = "--batch-size 128 --lr 3e-3"             # the fractal's own best on held-out training images
LONG = f"--epochs 60 --eval-epochs 10 {OWN} --min-crop 0.5 --randaug"
PICO = "--model vit_pico --patch-size 4"       # smaller, and better for scratch
FAIR = f"{OWN} --weight-decay 0.5"             # scratch's own best with it, on held-out training images
SHORT, BRIEF = "--steps 1500 --no-cutmix", f"{C250} --epochs 3"      # the paper's tables: five minutes a row


def arms(label, flags, starts=("", "scratch")):
    """Rows of a grid: the same fine-tuning from several starts."""
    names = {"": "from one fractal", "scratch": "from scratch"}
    return "\n".join(f"{label} / {names.get(s, f'{s} initialisation')} || {s} | {flags}" for s in starts)


SMALL = f"finetune {PICO} {FAIR} --img-size 16"        # on small copies of the photographs
FOUR = "", "scratch", "mimetic", "impulse"
TABLES = {
    "transfer": ("250 images a class, 8 epochs", 3, "", C250, f"""
        from one fractal; from scratch || scratch
        mimetic initialisation || mimetic; mimetic, a fifth as strong || mimetic-0.2
        impulse initialisation || impulse
        from one fractal, its own best ||| {OWN}"""),
    "fp32": ("the same in float32", 3, "--precision fp32", f"{C250} --precision fp32", """
        from one fractal; from scratch || scratch"""),
    "fair": ("first at 16x16 pixels, then at 32x32; rows with as many images a class take the same time", 3,
             f"{PICO} --img-size 16 --steps 2300", PICO, f"""
        25 a class: the fractal ||| {FAIR} --train-per-class 25 --epochs 40
        25 a class: small copies || {SMALL} --train-per-class 25 --epochs 40 | {FAIR} --train-per-class 25 --epochs 81
        250 a class: the fractal, then small copies || fractal {SMALL} {C250} --epochs 12 | {FAIR} {C250} --epochs 9.5
        250 a class: small copies || {SMALL} {C250} --epochs 12 | {FAIR} {C250} --epochs 15
        250 a class: the fractal, then small copies, its own best || fractal finetune {PICO} --weight-decay 0.2 \
            --img-size 16 {C250} --epochs 12 | --weight-decay 0.2 {C250} --epochs 7.5
        all images: the fractal, then small copies || fractal {SMALL} --epochs 10 | {FAIR} --epochs 10
        all images: small copies || {SMALL} --epochs 10 | {FAIR} --epochs 12.8"""),
    "fair15": ("250 images a class; 900 computed seconds each", 3, f"{PICO} --img-size 16 --steps 9200",
               f"{PICO} {FAIR} {C250}", f"""
        the fractal, then small copies || fractal {SMALL} {C250} --epochs 12 | --epochs 15.5
        small copies || {SMALL} {C250} --epochs 24 | --epochs 33.4 --randaug"""),
    "few15": ("25 images a class; 900 computed seconds each", 3, f"{PICO} --img-size 16 --steps 4600",
              f"{PICO} {OWN} --weight-decay 0.2 --train-per-class 25", f"""
        the fractal ||| --epochs 307 --eval-epochs 25 --randaug --mixup --cutmix
        small copies || {SMALL} --train-per-class 25 --epochs 40 | \
            --epochs 404 --eval-epochs 25 --randaug --mixup --cutmix"""),
    "all33": ("all 50,000 images; 2,000 computed seconds each", 3, "--patch-size 4 --img-size 16 --steps 4600",
              f"--patch-size 4 {FAIR} --eval-epochs 10", f"""
        the fractal, then small copies || fractal finetune --patch-size 4 {FAIR} --img-size 16 --epochs 8 | --epochs 22.3
        small copies || finetune --patch-size 4 {FAIR} --img-size 16 --epochs 12 | --epochs 26.4"""),
    "time": ("250 images a class; pre-training and 8 epochs take as long as 28 epochs", 3, "", C250, f"""
        {arms("8 epochs", "")}
        {arms("28 epochs", "--epochs 28")}"""),
    "controls": ("what else can be learned in as many steps as the fractal", 3, "", C250, """
        from one fractal; Delta 0.001 || --delta 0.001; from 64 fractals || --categories 64
        clouds of Gaussian dots || --source gaussian --texture random
        from 64 photographs as 64 classes || --source folder --root controls/photographs
        supervised, 250 other images a class || --source folder --root controls/others; from scratch || scratch"""),
    "optimizers": ("250 images a class, 8 epochs", 1, "", C250, f"""
        {arms("SGD", "--optimizer sgd --lr 0.2 --weight-decay 1e-4", FOUR)}
        {arms("AdamW", "--optimizer adamw --lr 1e-3", FOUR)}
        {arms("Muon", "", FOUR)}"""),
    "try": ("README's experiments", 1, "--steps 1000", "--train-per-class 250 --epochs 2", """
        the default; Delta 0.001 || --delta 0.001; without crops || --no-crop
        noise || --source gaussian --texture random; another fractal || --fractal-seed 0
        edges of a photograph || --source image --edges canny; from scratch || scratch"""),
    "few": ("25 images a class, 8 epochs", 3, "", "--train-per-class 25", """
        from one fractal; from scratch || scratch"""),
    "fewtime": ("25 images a class; pre-training and 40 epochs take as long as 240 epochs", 3, "",
                "--train-per-class 25", """
        from one fractal, 40 epochs ||| --epochs 40; from scratch, 240 epochs || scratch | --epochs 240"""),
    "length": ("all 50,000 images", 3, "", "", f"""
        {arms("8 epochs", OWN)}
        {arms("20 epochs", f"--epochs 20 {OWN}")}
        {arms("60 epochs", LONG)}"""),
    "longer": ("pre-training four times as long", 1, "", "", f"""
        250 images a class, 8 epochs / from 4,700 steps ||| {C250}
        250 images a class, 8 epochs / from 18,800 steps || --steps 18800 | {C250}
        250 images a class, 8 epochs / from scratch || scratch | {C250}
        all images, 8 epochs / from 4,700 steps ||| {OWN}
        all images, 8 epochs / from 18,800 steps || --steps 18800 | {OWN}
        all images, 8 epochs / from scratch || scratch | {OWN}"""),
    "fig3": ("a linear classifier on the first K blocks, frozen; 250 images a class, 8 epochs", 1, "", C250,
             "\n".join(arms(f"K = {k}", f"--probe {k}") for k in (1, 2, 3, 4, 6))),
    "table2": ("FractalDB, OFDB and 1p-frac", 3, SHORT, BRIEF, """
        scratch | 64.2 | scratch; FractalDB, 64 x 64 images | 81.6 | --categories 64 --instances 64
        OFDB, 64 images | 84.0 | --categories 64; 1p-frac | 84.2
        64 photographs || --source folder --root controls/photographs
        supervised, 250 other images a class || --source folder --root controls/others"""),
    "fractals": ("other fractals", 1, SHORT, BRIEF, """
        --fractal-seed 32, the default; --fractal-seed 0 || --fractal-seed 0
        --fractal-seed 1 || --fractal-seed 1; --fractal-seed 2 || --fractal-seed 2"""),
    "table3": ("contours", 1, SHORT, BRIEF, """
        RCDB, 64 x 64 images | 81.6 | --source rcdb --categories 64 --instances 64
        RCDB, 64 images | 80.4 | --source rcdb --categories 64; RCDB, one image | 82.5 | --source rcdb
        Visual Atoms, 64 x 64 images | 84.9 | --source va --categories 64 --instances 64
        Visual Atoms, 64 images | 82.1 | --source va --categories 64
        Visual Atoms, one image | 82.6 | --source va"""),
    "table4": ("noise, its dots drawn as fixed random 3x3 masks", 1, f"{SHORT} --texture random", BRIEF, """
        Gaussian | 1.1 | --source gaussian; uniform | 2.0 | --source uniform; 1p-frac | 84.2"""),
    "table5": ("perturbation degree Delta", 3, SHORT, BRIEF, """
        0.001 | 1.2 | --delta 0.001; 0.01 | 19.9 | --delta 0.01; 0.05 | 83.0 | --delta 0.05
        0.1 | 84.2; 0.2 | 83.4 | --delta 0.2; 1.0 | 82.6 | --delta 1.0"""),
    "table6": ("sigma-factor", 1, SHORT, BRIEF, """
        3.5 | 84.2; 4.0 | 82.8 | --sigma 4.0; 4.5 | 81.9 | --sigma 4.5; 5.0 | 82.2 | --sigma 5.0
        6.0 | 81.3 | --sigma 6.0"""),
    "table7": ("number of perturbations L", 3, SHORT, BRIEF, """
        16 | 78.7 | --L 16; 64 | 82.3; 512 | 82.4 | --L 512; 1000 | 84.2 | --L 1000"""),
    "table9": ("augmentation of pre-training (the paper's rows: with all else of DeiT's)", 1, "--steps 1500", BRIEF, """
        crops and jitter | 80.4 | --no-cutmix; without crops || --no-cutmix --no-crop
        without changes of aspect || --no-cutmix --no-aspect; without jitter || --no-cutmix --no-jitter
        RandAugment in place of jitter || --no-cutmix --randaug
        with erasing || --no-cutmix --erase; with flips || --no-cutmix --flip
        with cutmix | 83.6; with mixup | 83.3 | --no-cutmix --mixup; with both | 84.2 | --mixup"""),
    "table11": ("one photograph (the paper: mean of five) under affine warps", 1, SHORT, BRIEF, """
        RGB | 81.6 | --source image; edges | 82.2 | --source image --edges canny"""),
    "table12": ("the edges of one photograph (the paper: mean of five) under warps", 1,
                f"{SHORT} --source image --edges canny", BRIEF, """
        affine | 81.9; homography || --warp homography
        elastic | 37.0 | --warp elastic; polynomial | 81.3 | --warp polynomial"""),
    "table13": ("random patches: masks, fixed or (w/ Aug.) new at each step", 1, SHORT, BRIEF, """
        OFDB | 84.0 | --categories 64 --texture random; 1p-frac | 84.2 | --texture random
        OFDB w/ Aug. | 85.3 | --categories 64 --texture fresh; 1p-frac w/ Aug. | 84.7 | --texture fresh
        fixed masks alone, Delta 0 || --texture random --delta 0"""),
}


# ---- Records

def rows_of(table):
    """-> label, top-1 in the paper, flags of pre-training, flags of fine-tuning, each as text"""
    lines = TABLES[table][4].strip().replace(";", "\n").splitlines()
    return [[*map(str.strip, line.split("|")), "", "", ""][:4] for line in lines]


def names(table, start, tune, seed):
    """The name of a pre-training, or None if there is none, and of a fine-tuning: their flags, as in reproduce.sh."""
    def name(*flags):
        return "-".join(" ".join(flags).replace("--", "").replace("/", "-").split()) or "nano"
    trained = start not in ("scratch", "mimetic", "mimetic-0.2", "impulse")
    if trained:
        before = "" if start.startswith("finetune ") else TABLES[table][2]
        start = name(before, start.removeprefix("fractal "))
    return f"starts/{start}/{seed}" if trained else None, f"{name(TABLES[table][3], tune)}/{start}/{seed}"


def found(table, row, records):
    """Of each seed that was run: the record, and that of its pre-training or None."""
    all_names = [names(table, *row[2:], seed) for seed in range(TABLES[table][1])]
    return [(records[tuned], records.get(start)) for start, tuned in all_names if tuned in records]


def mixed(table, records):
    """The settings in which runs of a table differ though no flag of it names them."""
    words = " ".join(" ".join(row[2:]) for row in rows_of(table)).split()
    named = {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in words} | {"seed"}
    values = {}
    for pair in (pair for row in rows_of(table) for pair in found(table, row, records)):
        for k, settings in enumerate(record["settings"] for record in pair if record):
            for key, value in settings.items():
                seen = values.setdefault((k, "epochs" in settings, key), set())     # a start may be a fine-tuning, too
                seen.add(value if isinstance(value, (int, float)) else str(value))
    return {key for (*_, key), several in values.items() if len(several) > 1 and not key.startswith("images")} - named


def read_records():
    """{name: record}"""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def command_of(args):
    """The command line of a run's settings, without what the recipe says."""
    line = [args["command"]] + ["--recipe", args["recipe"]] * (args["recipe"] != "nano")
    for name, usual in vars(op.parse(line)).items():
        value, flag = args.get(name, usual), name.replace("_", "-")
        if name in BESIDE or value == usual:
            continue
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            line += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
    if args.get("ckpt"):
        line += ["--ckpt", args["ckpt"][max(0, args["ckpt"].find("runs/")):]]
    return " ".join(line)


def record_of(folder, name):
    """The record of a run that has ended. Of the log it keeps tests, and some twenty other lines."""
    args = json.loads((folder / "args.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    every = -(-len(log) // 20)
    log = [{key: round(value, 6) for key, value in line.items()} for k, line in enumerate(log)
           if "test_top1" in line or k % every == 0 or k == len(log) - 1]
    return dict(name=name, command=command_of(args), settings={k: v for k, v in args.items() if k not in BESIDE},
                commit=args["commit"], machine={k: args[k] for k in MACHINE}, log=log)


def keep(folder):
    """Add the records of all runs under a folder that have ended, but for names that have one."""
    records = read_records()
    for file in sorted(folder.rglob("curve.png")):              # a run draws it at its end
        name = str(file.parent.relative_to(folder))
        if name not in records:
            with RECORDS.open("a") as out:
                out.write(json.dumps(record_of(file.parent, name)) + "\n")


# ---- Tables

def last_tests(pairs):
    return [tuned["log"][-1]["test_top1"] for tuned, _ in pairs]


def spread(pairs):
    """Top-1: mean (standard deviation), or one value, or that there is none."""
    top1 = last_tests(pairs)
    text = f"{statistics.mean(top1):.1f}" if top1 else "not run"
    return text + (f" ({statistics.stdev(top1):.1f})" if len(top1) > 1 else "")


def own_task(pairs):
    """What pre-training has learned of its own task: mean accuracy in percent, or None."""
    ends = [start["log"][-1] for _, start in pairs if start]
    own = [end["top1"] for end in ends if "top1" in end]        # a fine-tuning ends with a test
    return statistics.mean(own) if own else None


def show(table, records):
    """Print a table in Markdown."""
    title, seeds, before, after, _ = TABLES[table]
    grid = all(" / " in row[0] for row in rows_of(table))
    lines = (as_grid if grid else as_rows)(table, records)
    title += f", {seeds} seed{'s' * (seeds > 1)}" * grid
    shown = [k for k in range(len(lines[0])) if k == 0 or any(line[k] for line in lines[1:])]       # no empty columns
    print(f"\n**{table}: {title}.** Pre-training: `{before or 'nano'}`. Fine-tuning: `{after or 'nano'}`.\n")
    if differ := mixed(table, records):
        print(f"Not comparable: runs differ in {', '.join(sorted(differ))}.\n")
    lines.insert(1, ["---"] * len(lines[0]))
    print(*(f"| {' | '.join(line[k] for k in shown)} |" for line in lines), sep="\n")


def as_rows(table, records):
    """A header, and a line for each row."""
    lines = [["", "fine-tuning", "paper", "top-1", "seeds", "own task"]]
    for row in rows_of(table):
        (label, paper, _, tune), pairs = row, found(table, row, records)
        own = own_task(pairs)
        lines.append([label, f"`{tune}`" * bool(tune), paper, spread(pairs), f"{len(pairs)} of {TABLES[table][1]}",
                      "" if own is None else f"{own:.0f}%"])
    return lines


def as_grid(table, records):
    """Of rows "A / B": a line for each A, a column for each B, top-1 alone."""
    cells, seeds = {}, TABLES[table][1]
    for row in rows_of(table):
        (label, _, _, tune), pairs = row, found(table, row, records)
        down, _, across = label.partition(" / ")
        some = f", {len(pairs)} of {seeds}" * (0 < len(pairs) < seeds)
        cells.setdefault((down, f"`{tune}`" * bool(tune)), {})[across] = spread(pairs) + some
    columns = dict.fromkeys(across for line in cells.values() for across in line)
    return [["", "fine-tuning", *columns],
            *([*key, *(line.get(across, "") for across in columns)] for key, line in cells.items())]


def show_search(records):
    """Run by run, what was tried: pre-training, and fine-tuning on training images with others held out."""
    for kind, what in ("pretrain", "own task"), ("finetune", "top-1, held-out training images"):
        print(f"\n| {kind} | command, from today's recipe | {what} | commit |\n|---|---|---|---|")
        for name, record in sorted(records.items()):
            if name.startswith("search/") and record["command"].startswith(kind):
                end = record["log"][-1]
                print(f"| {name.removeprefix('search/')} | `{record['command']}` | "
                      f"{end.get('test_top1', end.get('top1')):.1f} | {record['commit']} |")


# ---- Figures

def panels(count, width=4, height=3.6):
    """An empty figure with panels side by side, for accuracies on CIFAR-100 -> figure, axes."""
    figure = Figure(figsize=(1.5 + width * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    axes[0].set_ylabel("top-1 on CIFAR-100 (%)")
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def plot(axis, title, x_label, lines, style="o-"):
    """lines: {label: [(x, [top-1 of each seed])]}"""
    for k, (label, points) in enumerate(lines.items()):
        axis.plot([x for x, _ in points], [statistics.mean(y) for _, y in points], f"C{k}{style}", ms=4, label=label)
        axis.plot([x for x, ys in points for _ in ys], [y for _, ys in points for y in ys], f"C{k}.", ms=3)
    axis.set(title=title, xlabel=x_label)
    axis.legend(fontsize=8)


def draw_transfer(path, records):
    """Left: test accuracy over the course of fine-tuning. Right: at the end, over its length."""
    figure, (left, right) = panels(2)
    lines = {}
    for row in rows_of("transfer"):
        tests = [[line for line in tuned["log"] if "test_top1" in line] for tuned, _ in found("transfer", row, records)]
        if len(tests) == TABLES["transfer"][1]:
            lines[row[0]] = [(some[0]["images"] / 1000, [line["test_top1"] for line in some]) for some in zip(*tests)]
    plot(left, "250 images a class, 8 epochs (a dot: a seed)", "thousands of images seen", lines)
    lines = {}
    for row in rows_of("length"):
        if pairs := found("length", row, records):
            point = pairs[0][0]["settings"]["epochs"], last_tests(pairs)
            lines.setdefault(row[0].partition(" / ")[2], []).append(point)
    plot(right, "all 50,000 images (60 epochs: with RandAugment)", "epochs of fine-tuning", lines, "o")
    figure.savefig(path, dpi=130)


def draw_learned(path, records):
    """What pre-training learned of its own task, and what that is worth: a dot for each row of the paper's tables."""
    figure, [axis] = panels(1, 7.5, 5)
    rows = {}                   # of the run's name, as a row may be in several tables: the one with most seeds
    for table in sorted(TABLES, key=lambda table: TABLES[table][1]):
        for row in rows_of(table):
            if TABLES[table][3] == BRIEF and found(table, row, records):
                rows[names(table, *row[2:], 0)[1]] = table, row
    for table, row in rows.values():
        pairs = found(table, row, records)
        top1, own = statistics.mean(last_tests(pairs)), own_task(pairs)
        if own is None:
            axis.axhline(top1, color="grey", ls="--")
            axis.annotate("from scratch", (70, top1), va="bottom", color="grey", fontsize=8)
            continue
        axis.plot(own, top1, "C0o", ms=5, alpha=0.6)
        if top1 < 29 or own < 50:               # elsewhere the dots are too close for labels
            shift, side = (-5, "right") if own > 80 else (5, "left")
            label = f"{table.removeprefix('table')}: {row[0].partition(',')[0]}"
            axis.annotate(label, (own, top1), (shift, -2), ha=side, fontsize=8, textcoords="offset points")
    axis.set(xlabel="own task (%)", xlim=(0, 104))
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE",
                        help=f"of {', '.join(TABLES)}, search; default: all")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the records of the runs under it")
    args = parser.parse_args()
    if unknown := {*args.tables} - {*TABLES, "search"}:
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}, search")
    if args.keep:
        return keep(args.keep)
    records = read_records()
    for table in args.tables or [*TABLES, "search"]:
        show_search(records) if table == "search" else show(table, records)
    if not args.tables:
        draw_transfer(HERE / "transfer.png", records)
        draw_learned(HERE / "learned.png", records)


if __name__ == "__main__":
    main()
