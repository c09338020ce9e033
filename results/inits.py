"""Initial weights without training: python results/inits.py WAY OUT.pt [FLAGS of `onepfrac.py finetune`]

WAY is mimetic, mimetic-0.2 (constants a fifth as large, chosen on held-out training images) or impulse.

Two ways to set attention and positions by hand, each explained at its function; all else is as from scratch.
`finetune --ckpt OUT.pt` starts from the result, so it can be compared with pre-training: is the fractal more than a
better initialisation? For other weights, give both commands another --seed. README's row:

    python results/inits.py mimetic runs/mimetic.pt --seed 0
    python onepfrac.py finetune --train-per-class 250 --seed 0 --ckpt runs/mimetic.pt \\
        --out runs/reproduce/train-per-class-250/mimetic/0
"""
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import onepfrac as op

# (down, right): where heads 0 to 8 look. A tenth would begin again. The order is that of the authors' code.
OFFSETS = (0, 0), (-1, 0), (0, 1), (0, -1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)


def factors(alpha, beta, dim):
    """Two matrices (dim, dim) of equal size whose product is alpha Z + beta I, with Z ~ N(0, 1 / dim)."""
    u, s, v = torch.linalg.svd(alpha * torch.randn(dim, dim) / dim ** 0.5 + beta * torch.eye(dim))
    return u * s.sqrt(), s.sqrt()[:, None] * v


def sinusoids(side, dim):
    """Positions of side x side patches, as in MAE -> (side * side, dim)."""
    angle = torch.arange(side)[:, None] / 10_000 ** (torch.arange(dim // 4) / (dim // 4))      # (side, dim / 4)
    row = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([row.repeat_interleave(side, 0), row.repeat(side, 1)], 1)


def neighbours(side, offset):
    """1 where patch j lies at the offset from patch i, else 0 -> (side * side, side * side), a row for each i."""
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return (place - place[:, None] == torch.tensor(offset)).all(2).float()


def set_value_and_output(attention, scale=1.0):
    """Tokens take away from themselves what they see: the product of the two weights is near minus the identity."""
    left, right = factors(0.4 * scale, -0.4 * scale, attention.proj.weight.shape[0])
    attention.qkv.weight.chunk(3)[2].copy_(left.T)
    attention.proj.weight.copy_(right.T)


@torch.no_grad()
def mimetic(model, scale=1.0):
    """Mimetic initialisation (Trockman & Kolter 2023, arXiv 2305.09828) gives the self-attention of an untrained
    network what that of trained ones has in common: tokens look at similar tokens (the product of query and key weights
    is near the identity), and take away from themselves what they see. Position embeddings are sinusoids, but for the
    cls token's. The constants are the paper's for ViT-Tiny, times `scale`."""
    for block in model.blocks:
        dim = block.attn.proj.weight.shape[0]
        size = dim // block.attn.heads
        query, key, _ = block.attn.qkv.weight.chunk(3)          # (dim, dim) each, views
        for rows in torch.arange(dim).split(size):
            left, right = factors(0.7 * scale, 0.7 * scale, dim)
            query[rows], key[rows] = left[:, :size].T, right[:size]
        set_value_and_output(block.attn, scale)
    side = round((model.pos_embed.shape[1] - 1) ** 0.5)
    model.pos_embed[0, 1:] = sinusoids(side, model.pos_embed.shape[2])
    return model


@torch.no_grad()
def impulse(model):
    """Impulse initialisation (Zheng et al. 2025, arXiv 2505.19985; constants from the authors' code) starts attention
    as a convolution with a single 1 in each filter: in every block, head h looks at the patch OFFSETS[h] away, which it
    knows by its position; at no patch in particular where that is outside, or from the cls token. Value and output are
    as in mimetic initialisation. Positions stay random, but 18 times as large.

    The authors' patches outnumber the dimensions of a head. Here they may not (nano: 16 and 32). Then 16 dimensions do
    the work, and the rest keep their small random weights: from zeros they would never learn. The norm of query and
    key, 7 in ViT-Tiny, goes with the root of their size: at 7, nano would begin with attention near 0 or 1."""
    model.pos_embed *= 18
    place = F.layer_norm(model.pos_embed[0, 1:], model.pos_embed.shape[2:])     # (patches, dim), as attention sees it
    patches, dim = place.shape
    u, s, v = torch.linalg.svd(place, full_matrices=False)
    for block in model.blocks:
        size = dim // block.attn.heads
        rank, norm = min(size, patches), 7 * (size * dim / (64 * 192)) ** 0.5
        inverse = v[:rank].T / s[:rank] @ u[:, :rank].T         # (dim, patches): of place, its largest directions
        query, key, _ = block.attn.qkv.weight.chunk(3)          # (dim, dim) each, views
        for head, rows in enumerate(torch.arange(dim).split(size)):
            # place @ product @ place.T is what is wanted. A little noise makes each block different.
            wanted = neighbours(round(patches ** 0.5), OFFSETS[head % 9]) + 0.0018 * torch.randn(patches, patches)
            left, strength, right = torch.linalg.svd(inverse @ wanted @ inverse.T)
            root = strength[:rank].sqrt()[:, None]
            query[rows[:rank]] = norm * F.normalize(root * left.T[:rank], dim=(0, 1))
            key[rows[:rank]] = norm * F.normalize(root * right[:rank], dim=(0, 1))
        set_value_and_output(block.attn)
    return model


def main():
    ways = {"mimetic": mimetic, "mimetic-0.2": functools.partial(mimetic, scale=0.2), "impulse": impulse}
    if len(sys.argv) < 3 or sys.argv[1] not in ways or sys.argv[2].startswith("-"):
        sys.exit(__doc__)
    way, path, *flags = sys.argv[1:]
    args = op.parse(["finetune", *flags])
    model = op.make_model(args, 100)                            # seeds torch's generator
    torch.save({"model": ways[way](model).state_dict()}, path)


if __name__ == "__main__":
    main()
