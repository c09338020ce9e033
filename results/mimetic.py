"""Initial weights without any training: python results/mimetic.py OUT.pt [FLAGS of `onepfrac.py finetune`]

Mimetic initialisation (Trockman & Kolter 2023, arXiv 2305.09828) gives the self-attention of an untrained network
what that of trained ones has in common: tokens look at similar tokens (the product of query and key weights is near
the identity), and take away from themselves what they see (the product of value and output weights is near minus the
identity). Position embeddings are sinusoids, but for the cls token's. `finetune --ckpt OUT.pt` starts from the
result, so it can be compared with pre-training: is the fractal more than a better initialisation? For other weights,
give both commands another --seed.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import onepfrac as op


def factors(alpha, beta, dim):
    """Two matrices (dim, dim) of equal size whose product is alpha Z + beta I, with Z ~ N(0, 1 / dim)."""
    u, s, v = torch.linalg.svd(alpha * torch.randn(dim, dim) / dim ** 0.5 + beta * torch.eye(dim))
    return u * s.sqrt(), s.sqrt()[:, None] * v


def sinusoids(side, dim):
    """Positions of side x side patches, as in MAE -> (side * side, dim)."""
    angle = torch.arange(side)[:, None] / 10_000 ** (torch.arange(dim // 4) / (dim // 4))      # (side, dim / 4)
    row = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([row.repeat_interleave(side, 0), row.repeat(side, 1)], 1)


@torch.no_grad()
def mimetic(model):
    """Set attention and positions of a ViT. The constants are the paper's for ViT-Tiny."""
    for block in model.blocks:
        attention = block.attn
        dim = attention.proj.weight.shape[0]
        size = dim // attention.heads
        query, key, value = attention.qkv.weight.chunk(3)       # (dim, dim) each, views
        for rows in torch.arange(dim).split(size):
            left, right = factors(0.7, 0.7, dim)
            query[rows], key[rows] = left[:, :size].T, right[:size]
        left, right = factors(0.4, -0.4, dim)
        value.copy_(left.T)
        attention.proj.weight.copy_(right.T)
    side = round((model.pos_embed.shape[1] - 1) ** 0.5)
    model.pos_embed[0, 1:] = sinusoids(side, model.pos_embed.shape[2])
    return model


def main():
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    path, *flags = sys.argv[1:]
    args = op.parse(["finetune", *flags])
    model = op.make_model(args, 100)                            # seeds torch's generator
    torch.save({"model": mimetic(model).state_dict()}, path)


if __name__ == "__main__":
    main()
