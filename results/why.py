"""Where does what pre-training has learned sit? Parts of its weights are put into a fresh network and fine-tuned.

    python results/why.py make PRETRAINED SEED FOLDER [--model ...]    # FOLDER/<part>/start.pt, one for each of PARTS
    python results/why.py look LABEL=CHECKPOINT ... [--root DIR]       # mean attention distances -> why.json
    python results/why.py draw                                         # why.png, from runs.jsonl and why.json

Then `onepfrac.py finetune --ckpt FOLDER/<part>/start.pt --seed SEED ...` trains each. The rest of a network is what
`--seed SEED` would start from without a checkpoint.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import onepfrac as op

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
        out = Path(folder, part.replace(" ", "-"))
        out.mkdir(parents=True, exist_ok=True)
        torch.save(state, out / "start.pt")


@torch.no_grad()
def attention_distances(model, x):
    """For each block and head the mean distance, in patches, from a patch to where it looks -> (depth, heads)."""
    n = model.img_size // model.patch_size
    at = torch.cartesian_prod(torch.arange(n), torch.arange(n)).float()
    distance, found, x = torch.cdist(at, at), [], model.embed(x)
    for block in model.blocks:
        B, N, D = x.shape
        heads = block.attn.heads
        q, k, _ = block.attn.qkv(block.norm1(x)).view(B, N, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        weight = (q @ k.mT * (D // heads) ** -0.5)[:, :, 1:, 1:].softmax(-1)    # of patches to patches
        found.append((weight * distance).sum(-1).mean((0, 2)))
        x = block(x)
    return torch.stack(found)


def look(named, args, photographs):
    """{label: distances} of checkpoints; without a file ("scratch="): of fresh weights."""
    x = op.make_augment(args, 1, **op.IMAGENET).plain(photographs)
    found = {}
    for label, file in named:
        model = op.make_model(args, 1).eval()
        if file:
            op.load_weights(model, file)
        found[label] = attention_distances(model, x).tolist()
    n = args.img_size // args.patch_size
    at = torch.cartesian_prod(torch.arange(n), torch.arange(n)).float()
    return found | {"uniform": torch.cdist(at, at).mean().item()}


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "make":
        pretrained, seed, folder, *flags = words
        make(pretrained, op.parse(["finetune", "--seed", seed, *flags]), folder)
