"""What the six base fractals of README's study look like in numbers: python results/fractals.py

For each --fractal-seed, over the 64 images of `nano` (seed 0): the share of lit pixels, of edges (neighbours
that differ, rows and columns averaged), and the singular values of the two maps. Prints a JSON object a line.
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import onepfrac as op

for seed in (32, 0, 1, 2, 3, 4):
    args = op.parse(f"pretrain --recipe nano --device cpu --fractal-seed {seed}".split())
    data = op.source_data(args)
    lit = data.images > 0
    edges = ((lit[:, 1:] != lit[:, :-1]).float().mean() + (lit[:, :, 1:] != lit[:, :, :-1]).float().mean()) / 2
    singular = torch.linalg.svdvals(data.omega["base"][:, :, :2])
    print(json.dumps(dict(fractal_seed=seed, lit=round(lit.float().mean().item(), 3), edges=round(edges.item(), 3),
                          singular_values=[[round(s, 3) for s in pair] for pair in singular.tolist()])))
