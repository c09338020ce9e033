"""The paper's numbers beside the measured ones: python results/tables.py [NAME ...]

    python results/tables.py table5 fig3        # print two tables
    python results/tables.py --plan table5      # print the commands whose results are missing
    python results/tables.py --collect          # keep what the run folders say in results/records.jsonl
    python results/tables.py                    # print all tables, write results/tables/RECIPE.md and RECIPE.png

The measured numbers come from the run folders under --runs and from results/records.jsonl. Tables of older commits,
with other pictures and settings, lie in results/old/ as they were.
"""
import argparse
import functools
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import onepfrac as op

# What a result does not depend on.
BESIDE = set("out root device resume save_every log_every precision rank lead ckpt world eval_epochs commit torch "
             "threads processor".split())
# How long the tables' runs are, and how probes are trained: flags by command.
LINEAR = ("--batch-size 256 --lr 0.3 --weight-decay 0 --warmup 0 --clip-grad 0 --smoothing 0 --min-crop 0.4 "
          "--no-randaug --no-jitter --no-erase --no-mixup --no-cutmix")
LENGTH = {"nano": dict(pretrain="--steps 5000", finetune="--train-per-class 250 --epochs 3",
                       probe=f"--train-per-class 250 --epochs 4 {LINEAR}", logistic="--train-per-class 250"),
          "small": dict(probe=f"--epochs 30 {LINEAR}"), "paper": dict(probe=f"--epochs 36 {LINEAR}")}


def decisive(args):
    """The settings that a result depends on, by the names of today."""
    if args.get("fresh_texture"):
        args = args | dict(texture="fresh")
    if "layers" in args:                        # of a command `probe`, now finetune --probe K
        args = args | dict(command=args["command"].replace("probe", "finetune"), probe=args["layers"][0])
    elif args.get("command") == "finetune":
        args = dict(probe=None) | args
    return {k: v for k, v in args.items() if k not in BESIDE}


@functools.cache
def settings(line):
    """The decisive settings of a command line. `logistic` has the flags of `finetune`."""
    command, *flags = line.split()
    args = op.parse(["finetune" if command == "logistic" else command, *flags])
    return decisive(vars(args) | {"command": command})


def tables(recipe):
    """name -> (title, seeds, rows). A row: label, CIFAR-100 top-1 in the paper, flags of pre-training or None for
    scratch, and what follows it: finetune, or logistic, with more flags."""
    usual = settings(f"pretrain --recipe {recipe} {LENGTH[recipe].get('pretrain', '')}")
    scratch, ours = ("scratch", 64.2, None, "finetune"), ("1p-frac", 84.2, "", "finetune")
    few = f"--categories {usual['L']}"
    many = f"{few} --instances {usual['L']}"

    def tuned(*rows):
        return [(*row, "finetune") for row in rows]

    def sweep(flag, top1):
        return tuned(*((str(value), paper, f"--{flag} {value}") for value, paper in top1.items()))

    def turn(top1, *names):                     # off what the recipe has on, and the reverse
        on = [usual[name] for name in names]
        return (" and ".join(f"without {n}" if o else f"with {n}" for n, o in zip(names, on)),
                top1 if all(on) else None,
                " ".join(f"--no-{n}" if o else f"--{n}" for n, o in zip(names, on)), "finetune")

    def longer():                               # each length has a schedule of its own
        lengths = sorted({2 * usual["steps"] // 5, usual["steps"], settings(f"pretrain --recipe {recipe}")["steps"]})
        return tuned(*(
            (f"{label}, {steps * usual['batch_size']:,} images", None,
             f"{flags} --steps {steps}" if steps != usual["steps"] else flags)
            for label, flags in (
                (f"Delta 0.1, L = {usual['L']:,}", ""), *((f"Delta {d}", f"--delta {d}") for d in (0.05, 0.2, 1.0)),
                *((f"L = {n:,}", f"--L {n}") for n in (16, 256, 1000)), ("OFDB", few), ("FractalDB", many))
            for steps in lengths))

    def probes(command, label, flags, top1=(None,) * 5):
        return [(f"{label}, k = {k}", paper, flags, f"{command} --probe {k}")
                for k, paper in zip((1, 2, 3, 4, 6), top1)]

    return {
        "table2": ("FractalDB, OFDB and 1p-frac", 3, [
            scratch, *tuned(("FractalDB", 81.6, many), ("OFDB", 84.0, few)), ours]),
        "table3": ("contours", 1, [*tuned(
            ("RCDB", 81.6, f"--source rcdb {many}"), ("RCDB, one a category", 80.4, f"--source rcdb {few}"),
            ("RCDB, one image", 82.5, "--source rcdb"), ("Visual Atoms", 84.9, f"--source va {many}"),
            ("Visual Atoms, one a category", 82.1, f"--source va {few}"),
            ("Visual Atoms, one image", 82.6, "--source va")), ours]),
        "table4": ("one image of noise, in random 3x3 masks", 1, [*tuned(
            ("Gaussian", 1.1, "--source gaussian --texture random"),
            ("uniform", 2.0, "--source uniform --texture random"),
            ("1p-frac", 84.2, "--texture random")), scratch]),
        "table5": ("perturbation degree Delta", 3, sweep("delta", {
            0.001: 1.2, 0.01: 19.9, 0.05: 83.0, 0.1: 84.2, 0.2: 83.4, 1.0: 82.6})),
        "table6": ("sigma-factor", 1, sweep("sigma", {
            3.5: 84.2, 4.0: 82.8, 4.5: 81.9, 5.0: 82.2, 6.0: 81.3})),
        "table7": ("number of perturbations L", 1, sweep("L", {16: 78.7, 64: 82.3, 512: 82.4, 1000: 84.2})),
        "table9": ("augmentation, the recipe with one switch turned", 1, [
            ours, turn(83.4, "randaug"), turn(80.1, "crop"), turn(83.6, "aspect"),
            turn(84.0, "erase"), turn(83.6, "mixup"), turn(83.3, "cutmix"),
            turn(80.4, "mixup", "cutmix"), turn(84.3, "flip"), turn(84.2, "jitter")]),
        "table11": ("one photograph (the paper: mean of five) under affine warps", 1, tuned(
            ("RGB", 81.6, "--source image"), ("edges", 82.2, "--source image --edges canny"))),
        "table12": ("the edges of one photograph (the paper: mean of five) under warps", 1, tuned(
            ("affine", 81.9, "--source image --edges canny"),
            *((warp, top1, f"--source image --edges canny --warp {warp}") for warp, top1 in (
                ("homography", None), ("elastic", 37.0), ("polynomial", 81.3))))),
        "table13": ("random patch augmentation", 1, tuned(
            ("OFDB", 84.0, f"{few} --texture random"), ("1p-frac", 84.2, "--texture random"),
            ("OFDB w/ Aug.", 85.3, f"{few} --texture fresh"), ("1p-frac w/ Aug.", 84.7, "--texture fresh"))),
        "fractals": ("which fractal, --fractal-seed (not in the paper)", 1,
                     sweep("fractal-seed", dict.fromkeys((32, 0, 1, 2, 3, 4)))),
        "length": ("how long pre-training is (not in the paper)", 1, longer()),
        "fig3": ("linear probes of the first k blocks", 1, [
            *probes("finetune", "1p-frac", "", (11.7, 15.5, 14.4, 13.8, 17.7)),
            *probes("finetune", "random weights", None)]),
        "logistic": ("logistic regression on the first k blocks (not in the paper)", 1, [
            *probes("logistic", "1p-frac", ""), *probes("logistic", "random weights", None)]),
    }


@functools.cache
def planned(recipe, row, seed, runs="runs"):
    """The runs of a row: two command lines (the first None for scratch), the settings of the first, these without
    the flags of the row, and the settings of the second."""
    _, _, flags, (command, *probing) = *row[:3], row[3].split()
    folder = f"{runs}/tables/{recipe}/"

    def start(command, kind):
        return f"{command} --recipe {recipe} --seed {seed} {LENGTH[recipe].get(kind, '')}".strip()

    def name(*words):
        return "-".join(" ".join(words).replace("--", "").split())

    first, ckpt, pretraining, usual = None, "", None, None
    if flags is None:
        folder += f"scratch/{seed}"
    else:
        usual = settings(start("pretrain", "pretrain"))
        try:
            pretraining = settings(f"{start('pretrain', 'pretrain')} {flags}")
        except op.InputError as error:          # the switch turns nothing at this recipe
            assert "has no effect" in str(error), error
            pretraining = usual
        if pretraining == usual:                # rows that are the recipe itself share a run
            flags = ""
        folder += f"{name(flags) or '1p-frac'}/{seed}"
        first = " ".join(f"{start('pretrain', 'pretrain')} {flags} --out {folder}/pretrain".split())
        ckpt = f" --ckpt {folder}/pretrain/last.pt"
    kind = "probe" if probing and command == "finetune" else command
    second = " ".join([start(command, kind), *probing])
    return (first, f"{second}{ckpt} --out {folder}/{name(kind, *probing[1:])}", pretraining, usual, settings(second))


def fits(record, pretraining, usual, second):
    """Whether a record has these settings. A flag that came later counts as left out then. The data of a folder
    count as CIFAR-100, since nothing tells what is in it."""
    def same(old, new, usual):
        if old is None or new is None:
            return old is new
        old = decisive(old)
        return all(old.get(k, usual[k]) == new[k] for k in new if k != "data")
    return (record["settings"]["data"] in ("cifar100", "folder")
            and same(record["pretrain"], pretraining, usual) and same(record["settings"], second, second))


def measured(recipe, rows, records):
    """For each row its records, {seed: the last one that fits}."""
    return [{r["seed"]: r for r in records if fits(r, *planned(recipe, row, r["seed"])[2:])} for row in rows]


def read_run(folder):
    """Settings and log of a run folder."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return json.loads((folder / "args.json").read_text()), [json.loads(line) for line in lines]


def of_folders(runs):
    """Records of the finished runs under a folder that tested something. Images and seconds are those of the run and
    of its pre-training."""
    for path in sorted(Path(runs).rglob("args.json")):
        folder, args = path.parent, json.loads(path.read_text())
        # `Run` draws curve.png when it ends, and logistic.py writes its log then.
        end = folder / ("log.jsonl" if args["command"] == "logistic" else "curve.png")
        if args["command"] == "pretrain" or not end.exists():
            continue
        last, ckpt, before, own = read_run(folder)[1][-1], HERE.parent / (args["ckpt"] or ""), None, None
        if args["ckpt"]:
            before = dict(recipe=None, weights=ckpt.name)           # somebody else's
            if (ckpt.parent / "args.json").exists():
                before, log = read_run(ckpt.parent)
                before = decisive(before) | dict(steps=log[-1]["step"])
                own = log[-1].get("top1")
                last |= {k: last[k] + log[-1][k] for k in ("images", "seconds")}
        yield dict(command=args["command"], recipe=args["recipe"], seed=args["seed"], commit=args["commit"],
                   device=f"{args['device']} ({args['processor']}, {args['threads']} threads)",
                   **{k: last[k] for k in ("images", "seconds", "test_top1")},
                   settings=decisive(args), pretrain=before, pretext_top1=own)


def read_records(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collect(runs):
    """Add the records of the run folders to results/records.jsonl, each once."""
    path = HERE / "records.jsonl"
    lines = dict.fromkeys(map(json.dumps, read_records(path) + list(of_folders(runs))))
    path.write_text("".join(line + "\n" for line in lines))


def page(recipe, shown):
    """Markdown of tables, shown: {name: (title, seeds, rows, found)}. Pretext: the accuracy of pre-training itself."""
    used = [record for *_, found in shown.values() for row in found for record in row.values()]
    each = {key: ", ".join(sorted({str((r | r["settings"])[key]) for r in used})) or "none yet"
            for key in ("device", "commit", "data")}
    length = " · ".join(f"{command}: {LENGTH[recipe].get(command) or 'as the recipe'}"
                        for command in ("pretrain", "finetune", "probe"))
    lines = [f"# The paper's tables at `{recipe}`", "",
             "Top-1 on CIFAR-100's test set in percent after the last epoch, the mean and (standard deviation over "
             "seeds). Pretext: top-1 of the pre-training's own task on its last crops (mixed ones where it mixes), the "
             "mean over seeds.", "",
             "The paper's numbers are of its own setting: L = 1,000 (but Table 7), ViT-T, 224 pixels, far longer training.",
             "", f"{length}  ",
             f"data: {each['data']} · device: {each['device']} · commit: {each['commit']}", ""]
    for name, (title, seeds, rows, found) in shown.items():
        lines += [f"## {name}: {title}", "", "| | paper | here | seeds | pretext |", "|---|---|---|---|---|"]
        for row, records in zip(rows, found):
            values = [r["test_top1"] for r in records.values()]
            here = f"{statistics.mean(values):.2f}" if values else "not run"
            here += f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
            count = f"{len(values)} of {seeds}" if len(values) < seeds else len(values)
            own = [r["pretext_top1"] for r in records.values() if r["pretext_top1"] is not None]
            own = f"{statistics.mean(own):.0f}%" if own else "-"
            lines.append(f"| {row[0]} | {'-' if row[1] is None else row[1]} | {here} | {count} | {own} |")
        lines.append("")
    return "\n".join(lines)


def draw(path, recipe, shown):
    """Accuracy over Delta, sigma and L, and of the probes over k: ours above, the paper's below. Small dots are
    single seeds."""
    from matplotlib.figure import Figure
    scratch = [r["test_top1"] for r in shown["table2"][3][0].values()]
    panels = {"$\\Delta$": ("table5",), "$\\sigma$": ("table6",), "$L$": ("table7",),
              "first $k$ blocks, frozen": ("fig3", "logistic")}
    panels = {label: names for label, names in panels.items()
              if sum(map(bool, sum((shown[name][3] for name in names), []))) > 1}
    if not panels:
        return
    figure = Figure(figsize=(2 + 3 * len(panels), 6), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex="col", squeeze=False)
    for (here, theirs), (label, names) in zip(axes.T, panels.items()):
        lines = {}
        for name in names:
            for row, records in zip(*shown[name][2:]):
                line, _, x = row[0].rpartition(", k = ")
                values = [r["test_top1"] for r in records.values()]
                line = (line or "1p-frac") + ",\nlogistic" * (name == "logistic")
                lines.setdefault(line, []).append((float(x), row[1], values))
        for k, (line, points) in enumerate(lines.items()):
            ours = [(x, statistics.mean(values)) for x, _, values in points if values]
            paper = [(x, top1) for x, top1, _ in points if top1 is not None]
            for axis, color, curve in ((here, f"C{k}", ours), (theirs, "0.4", paper)):
                if curve:
                    axis.plot(*zip(*curve), color=color, marker="o")
                    axis.annotate(line, curve[-1], (14, 0), textcoords="offset points", color=color, va="center")
            here.scatter([x for x, _, values in points for _ in values],
                         [y for *_, values in points for y in values], color=f"C{k}", s=6)
        if scratch and "fig3" not in names:
            level = statistics.mean(scratch)
            here.axhline(level, color="C1", lw=1)
            here.annotate("from\nscratch", (1, level), (3, 0), here.get_yaxis_transform(), "offset points",
                          color="C1", va="center")
        if label in ("$\\Delta$", "$L$"):
            theirs.set_xscale("log")
        ticks = [x for x, *_ in points]
        theirs.set_xticks(ticks, [f"{x:g}" for x in ticks], rotation=45)
        theirs.minorticks_off()
        theirs.set_xlabel(label)
        here.set_title(f"{names[0]}: {shown[names[0]][0]}", size=10)
    axes[0, 0].set_ylabel(f"top-1 (%) here, at {recipe}")
    axes[1, 0].set_ylabel("top-1 (%) in the paper")
    figure.savefig(path, dpi=120)


def draw_lengths(path, recipe, shown):
    """Accuracy over the images of pre-training, a line for each kind of it, and over the accuracy of its own task."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lines = {}
    for row, records in zip(*shown["length"][2:]):
        kind, _, images = row[0].removesuffix(" images").rpartition(", ")
        if records:
            each = [(r["test_top1"], r["pretext_top1"]) for r in records.values()]
            lines.setdefault(kind, []).append((int(images.replace(",", "")), *map(statistics.mean, zip(*each))))
    labels = []
    for k, (kind, points) in enumerate(lines.items()):
        images, top1, pretext = zip(*points)
        for axis, x in ((left, images), (right, pretext)):
            axis.plot(x, top1, f"C{k}o-", lw=1.2, ms=4)
        labels.append((top1[-1], kind, f"C{k}"))
    scratch = [r["test_top1"] for r in shown["table2"][3][0].values()]
    if scratch:
        for axis in (left, right):
            axis.axhline(statistics.mean(scratch), color="0.5", lw=1)
        labels.append((statistics.mean(scratch), "from scratch", "0.4"))
    low, high = left.get_ylim()
    place = low
    for top1, kind, color in sorted(labels):                 # from below, none over another
        place = max(top1, place + (high - low) / 22)
        left.annotate(kind, (1.02, place), xycoords=left.get_yaxis_transform(), color=color, va="center", size=9)
    seen = sorted({n for points in lines.values() for n, *_ in points})
    left.set_xscale("log")
    left.set_xticks(seen, [f"{n:,}" for n in seen])
    left.minorticks_off()
    left.set(xlabel="images seen in pre-training", ylabel=f"top-1 (%) of CIFAR-100, at {recipe}")
    right.set(xlabel="top-1 (%) of the pre-training's own task")
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(tables('nano'))}; default: all")
    parser.add_argument("--recipe", default="nano", choices=op.RECIPES)
    parser.add_argument("--runs", default="runs", help="where run folders are")
    parser.add_argument("--plan", action="store_true", help="print what is still to be run")
    parser.add_argument("--collect", action="store_true", help="keep the run folders' records")
    args = parser.parse_args(argv)
    known = tables(args.recipe)
    for name in args.names:
        if name not in known:
            parser.error(f"NAME {name}: there are {', '.join(known)}")
    if args.collect:
        collect(args.runs)
    records = [r for r in [*read_records(HERE / "records.jsonl"), *of_folders(args.runs)]
               if r["recipe"] == args.recipe]
    plan, shown = {}, {}
    for name in args.names or known:
        title, seeds, rows = known[name]
        found = measured(args.recipe, rows, records)
        for row, there in zip(rows, found):
            for seed in set(range(seeds)) - set(there):
                plan |= dict.fromkeys(planned(args.recipe, row, seed, args.runs)[:2])
        shown[name] = title, seeds, rows, found
    plan.pop(None, None)                        # the first command from scratch
    if args.plan:
        print(*plan, sep="\n")
        missing = sum(not line.startswith("pretrain") for line in plan)
        minutes = missing * statistics.mean(r["seconds"] for r in records) / 60 if records else 0
        print(f"{missing} runs to do" + f", about {minutes:.0f} minutes by the records" * bool(records),
              file=sys.stderr)
        return
    some = shown if args.names else {name: table for name, table in shown.items() if sum(map(bool, table[3])) > 1}
    text = page(args.recipe, some)
    if len(some) < len(shown):
        text += f"\nNot measured at this setting yet: {', '.join(name for name in shown if name not in some)}.\n"
    print(text)
    if not args.names:
        out = HERE / "tables"
        out.mkdir(exist_ok=True)
        (out / f"{args.recipe}.md").write_text(text)
        draw(out / f"{args.recipe}.png", args.recipe, shown)
        if any(shown["length"][3]):
            draw_lengths(out / f"{args.recipe}_length.png", args.recipe, shown)


if __name__ == "__main__":
    main()
