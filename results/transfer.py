"""Tables and figure of the transfer experiment and of its controls: python results/transfer.py [RUNS]

With RUNS (the folder that `bash reproduce.sh transfer` and `controls` fill), first copies each run's arguments and log
from it to results/transfer/NAME.jsonl, the arguments as the first line. Then prints the tables of results/README.md on
it, in Markdown, and draws results/transfer.png, both from results/transfer/ alone.
"""
import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
KEPT = HERE / "transfer"
ARMS = {"fractal": "from one fractal", "mimetic": "mimetic initialisation", "scratch": "from scratch"}
CONTROLS = {"few": "25 images a class, 8 epochs", "all-8": "all 50,000 images, 8 epochs",
            "all-30": "all 50,000 images, 30 epochs", "half": "the odd classes, 250 images of each, 8 epochs"}
STARTS = {"real": "from the even classes, 320,000 crops", "mild": "the same, crops from 0.4 of an image",
          "short": "from one fractal, 320,000 crops", "fractal": "from one fractal", "scratch": "from scratch"}


def collect(runs):
    KEPT.mkdir(exist_ok=True)
    for run in sorted(p.parent for p in runs.glob("*/last.pt")):
        arguments = {k: v for k, v in json.loads((run / "args.json").read_text()).items() if k not in ("root", "out")}
        if arguments.get("ckpt"):
            arguments["ckpt"] = "/".join(Path(arguments["ckpt"]).parts[-2:])       # such as fractal-0/last.pt
        (KEPT / f"{run.name}.jsonl").write_text(json.dumps(arguments) + "\n" + (run / "log.jsonl").read_text())


def read(pattern):
    """{name: (arguments, test records)} of the kept runs that match."""
    found = {}
    for path in sorted(KEPT.glob(pattern)):
        arguments, *log = map(json.loads, path.read_text().splitlines())
        found[path.stem] = arguments, [r for r in log if "test_top1" in r], [r for r in log if "loss" in r]
    return found


def main():
    if sys.argv[1:]:
        collect(Path(sys.argv[1]))
    print("| learning rate | held out, from the fractal | held out, from scratch |\n|---|---|---|")
    rates = sorted({run[0]["lr"] for run in read("choose-*.jsonl").values()})
    for lr in rates:
        runs = [read(f"choose-{arm}-{lr:g}.jsonl").get(f"choose-{arm}-{lr:g}") for arm in ("fractal", "scratch")]
        row = ["%.2f" % run[1][-1]["test_top1"] if run else "not run" for run in runs]
        print(f"| {lr:g} | {' | '.join(row)} |")

    print("\n| CIFAR-100 test set | seeds 0, 1, 2 | top-1, mean (standard deviation) | best epoch |\n|---|---|---|---|")
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    means = {}
    for k, (arm, label) in enumerate(ARMS.items()):
        runs = read(f"from-{arm}-*.jsonl")
        if not runs:
            continue
        last = [tests[-1] for _, tests, _ in runs.values()]
        top1 = [r["test_top1"] for r in last]
        means[arm] = statistics.mean(top1)
        lr = {arguments["lr"] for arguments, _, _ in runs.values()}
        print(f"| {label}, lr {', '.join(f'{x:g}' for x in lr)} | {', '.join(f'{t:.2f}' for t in top1)} | "
              f"**{means[arm]:.2f}** ({statistics.stdev(top1):.2f}) | "
              f"{statistics.mean(max(r['test_top1'] for r in tests) for _, tests, _ in runs.values()):.2f} |")
        for _, tests, _ in runs.values():
            axis.plot([r["images"] / 1000 for r in tests], [r["test_top1"] for r in tests], f"C{k}.-")
        axis.annotate(label, (1, means[arm]), (3, 0), axis.get_yaxis_transform(), "offset points", color=f"C{k}",
                      va="center")
    print(f"| difference | | **{means['fractal'] - means['scratch']:+.2f}** | |")
    axis.set(xlabel="CIFAR-100 images seen in fine-tuning (thousands)", ylabel="top-1 on the test set (%)",
             title="Fine-tuning with recipe nano, three seeds each")
    axis.grid(alpha=0.3)
    figure.savefig(HERE / "transfer.png", dpi=130)

    print("\n| fine-tuning on | start | seeds | top-1, mean (standard deviation) |\n|---|---|---|---|")
    for name, what in CONTROLS.items():
        for start, label in STARTS.items():
            top1 = [tests[-1]["test_top1"] for _, tests, _ in read(f"{name}-{start}-*.jsonl").values()]
            if top1:
                spread = f" ({statistics.stdev(top1):.2f})" if len(top1) > 1 else ""
                print(f"| {what} | {label} | {', '.join(f'{t:.2f}' for t in top1)} | "
                      f"**{statistics.mean(top1):.2f}**{spread} |")

    print("\n| pre-training | images | last loss (ln 64 = 4.16) | pretext top-1 |\n|---|---|---|---|")
    for name, (_, _, log) in read("fractal-*.jsonl").items():
        print(f"| {name} | {log[-1]['images']:,} | {log[-1]['loss']:.3f} | {log[-1]['top1']:.1f}% |")


if __name__ == "__main__":
    main()
