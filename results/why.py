"""What has pre-training learned, and where does it sit? Parts of its weights in a fresh network; pictures of filters.

    python results/why.py make PRETRAINED SEED FOLDER      # FOLDER/SEED/<part>/start.pt, one for each part
    python results/why.py look LABEL=CHECKPOINT ...        # how far heads look, and filters, to why.json; no file: fresh
    python results/why.py draw                             # why.png, from runs.jsonl and why.json

After `make` each is trained, `onepfrac.py finetune --ckpt FOLDER/SEED/<part>/start.pt --seed SEED --train-per-class 250
--epochs 3 --out FOLDER/SEED/<part>/run`, and `experiments.py --keep` takes the records. The rest of a network is what
this command would start from without --ckpt.
"""
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import experiments
import onepfrac as op

SHOWN = "fresh", "the fractal's", "64 photographs'", "scratch, fine-tuned", "the fractal's, fine-tuned"    # filters
EMBEDDING = ("patch_embed", "cls_token", "pos_embed")
PARTS = {       # what is taken over: of name, number of the block (-1: embedding; depth: the last norm), depth
    "all weights": lambda name, k, depth: True,
    "embedding and first half": lambda name, k, depth: k < depth // 2,
    "second half": lambda name, k, depth: k >= depth // 2,
    "embedding": lambda name, k, depth: k < 0,
    "blocks without embedding": lambda name, k, depth: k >= 0,
    "attention": lambda name, k, depth: ".attn." in name or ".norm1." in name,
    "MLPs": lambda name, k, depth: ".mlp." in name or ".norm2." in name,
}


def block_of(name, depth):
    if name.startswith("blocks."):
        return int(name.split(".")[1])
    return -1 if name.startswith(EMBEDDING) else depth


def shuffled(learned, fresh, generator):
    """The learned numbers of each tensor in random order: its distribution alone."""
    return learned.flatten()[torch.randperm(learned.numel(), generator=generator)].view_as(learned)


def spectrum(learned, fresh, generator):
    """The learned singular values, with the singular vectors of fresh weights."""
    if learned.ndim < 2 or learned.shape[0] == 1:       # no matrices: cls token, positions, biases, norms
        return fresh
    u, _, v = torch.linalg.svd(fresh.flatten(1), full_matrices=False)
    return (u * torch.linalg.svdvals(learned.flatten(1)) @ v).view_as(learned)


def make(pretrained, args, folder):
    """start.pt of each part."""
    learned = op.load_file(pretrained)["model"]
    fresh = op.make_model(args, 1).state_dict()
    depth, generator = op.MODELS[args.model][1], torch.Generator().manual_seed(args.seed)
    bodies = [name for name in fresh if not name.startswith("head.")]
    starts = {part: {name: (learned if takes(name, block_of(name, depth), depth) else fresh)[name] for name in bodies}
              for part, takes in PARTS.items()}
    for part, change in ("shuffled", shuffled), ("spectrum", spectrum):
        starts[part] = {name: change(learned[name], fresh[name], generator) for name in bodies}
    for part, state in starts.items():
        out = Path(folder, str(args.seed), part.replace(" ", "-"))
        out.mkdir(parents=True, exist_ok=True)
        torch.save(state, out / "start.pt")


@torch.no_grad()
def attention_distances(model, x):
    """For each block and head the mean distance, in patches, from a patch to where it looks -> (depth, heads)."""
    distance, found, x = distances(model.img_size // model.patch_size), [], model.embed(x)
    for block in model.blocks:
        B, N, D = x.shape
        heads = block.attn.heads
        q, k, _ = block.attn.qkv(block.norm1(x)).view(B, N, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        weight = (q @ k.mT * (D // heads) ** -0.5)[:, :, 1:, 1:].softmax(-1)    # of patches to patches
        found.append((weight * distance).sum(-1).mean((0, 2)))
        x = block(x)
    return torch.stack(found)


def distances(n):
    """Between all patches of an image with n a side -> (n^2, n^2)"""
    at = torch.cartesian_prod(torch.arange(n), torch.arange(n)).float()
    return torch.cdist(at, at)


def filters(weight, count=12):
    """Of a patch embedding (dim, 3, p, p) the first right singular vectors: the patches that move its output most, each
    with 128 for 0 and its largest number at 1 or 255 -> (count, p, p, 3)"""
    _, _, rows = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    rows = rows[:count] / rows[:count].abs().amax(1, keepdim=True)
    return (128 + 127 * rows).round().int().view(-1, *weight.shape[1:]).movedim(1, -1)


def grey(weight):
    """Of a patch embedding (dim, 3, p, p) the share of its squares that red, green and blue have in common."""
    return (3 * weight.mean(1).square().sum() / weight.square().sum()).item()


def look(named, args):
    """To why.json, for each label: distances of blocks and heads on 500 test images, filters, the share of grey."""
    _, tests = op.downstream_data(args)
    x = op.make_augment(args, 1, **op.IMAGENET).plain(tests[torch.arange(500)][0])
    found = json.loads((HERE / "why.json").read_text())
    for label, _, file in (word.partition("=") for word in named):
        model = op.make_model(args, 1).eval()
        if file:
            op.load_weights(model, file)
        weight, heads = model.patch_embed.proj.weight.detach(), attention_distances(model, x)
        found[label] = dict(distances=heads.tolist(), filters=filters(weight).tolist(), grey=grey(weight))
        print(f"| {label} |", *(f"{block:.2f} |" for block in heads.mean(1)), f"{100 * grey(weight):.0f}% |")
    (HERE / "why.json").write_text(json.dumps(found) + "\n")


def draw():
    """Bars: top-1 after fine-tuning of each part. Patches: the first filters of the patch embedding."""
    records, bars = experiments.read_records(), {}
    for part in (*PARTS, "shuffled", "spectrum", "scratch"):
        names = (f"why/{seed}/{part.replace(' ', '-')}/run" for seed in range(3))
        bars[part] = [records[name]["log"][-1]["test_top1"] for name in names if name in records]
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
    for k, (part, top1) in enumerate(reversed(bars.items())):
        left.barh(k, statistics.mean(top1), color="grey" if part == "scratch" else "C0", alpha=0.7)
        left.plot(top1, [k] * len(top1), "k.", ms=4)
    shown = dict(shuffled="all, shuffled", spectrum="singular values alone", scratch="nothing (scratch)")
    left.set_yticks(range(len(bars)), [shown.get(part, part) for part in reversed(bars)])
    left.axvline(statistics.mean(bars["scratch"]), color="grey", ls="--")
    left.set(title="which weights a fresh network takes over",
             xlabel="top-1 on CIFAR-100 after 3 epochs (%); a dot: a seed")
    looks = json.loads((HERE / "why.json").read_text())
    tiles = [F.pad(torch.tensor(looks[label]["filters"]), (0, 0, 1, 1, 1, 1), value=255) for label in SHOWN]
    side = tiles[0].shape[1]
    right.imshow(torch.cat([torch.cat([*row], 1) for row in tiles]))
    right.set_yticks([side * (k + 0.5) - 0.5 for k in range(len(SHOWN))], SHOWN)
    right.tick_params(left=False, bottom=False, labelbottom=False)
    right.spines[:].set_visible(False)
    right.set(title="the patches (8x8 pixels) that move the patch embedding most")
    figure.savefig(HERE / "why.png", dpi=110)


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "make":
        make(words[0], op.parse(["finetune", "--seed", words[1]]), words[2])
    elif command == "look":
        flags = [word for word in words if "=" not in word]             # --data folder --root DIR
        look([word for word in words if "=" in word], op.parse(["finetune", *flags]))
    else:
        draw()
