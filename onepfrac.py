"""onepfrac: pre-train a Vision Transformer on perturbed copies of one fractal.

A single-file reference of "Scaling Backwards: Minimal Synthetic Pre-training?" (Nakamura et al.,
ECCV 2024). The paper calls its dataset 1p-frac, "1-parameter Fractal as Data", as one set of
parameters, one fractal, is all of it. The idea:

    An image is drawn from a few numbers. A class is one small perturbation of them.
    Pre-training is telling the perturbations apart.

    python onepfrac.py pretrain --delta 0.1 --sigma 3.5           # one fractal -> a ViT
    python onepfrac.py finetune --ckpt runs/pretrain/last.pt --train-per-class 250  # -> CIFAR-100
    python onepfrac.py finetune --out runs/scratch --train-per-class 250    # the same from scratch

These commands use the default recipe, nano: 64 classes, a network of 0.7 million parameters, images
of 32x32 pixels, minutes on two CPU cores. Their result on the test set, three seeds: top-1 42.9%
from the fractal (standard deviation 0.6), 36.4% (0.3) from scratch. (results/README.md has the
records.) The paper has 84.2% and 64.2% for all images, a larger network and a far longer training:
`--recipe paper` has its settings.

Part One is the whole method, to be read from top to bottom:
    1 fractals       what an iterated function system is, and how complex it is
    2 drawing        from a system to an image: the chaos game, the raster, the texture
    3 classes        why one fractal makes many classes: the LIEP distribution, the LPCE loss
    4 network        a Vision Transformer
    5 augmentation   crops, flips, jitter, erasing, mixup and cutmix, on the device
    6 training       one step, the loop around it, evaluation
    7 commands       pretrain and finetune
Part Two is the rest, to be looked up:
    A RandAugment and colour jitter      B other images            C downstream datasets
    D runs: folder, checkpoint, resume   E Muon, probe, render     F settings
"""
import argparse
import contextlib
import ctypes
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # these are read when torch and matplotlib are imported
    # Threads that wait for each other soon stop spinning (unless the user says how long): spinning
    # keeps a core busy that other work may need.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ["MPLBACKEND"] = "agg"  # figures are files; a notebook's backend may not be installed

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import cbook
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.transforms.v2 import functional as T

# ###################################### PART ONE: THE METHOD ######################################

# ==== 1 · Fractals (Eq. 1-2) ======================================================================
# To copy this section: import math, torch
#
# An iterated function system (IFS) is a handful of affine maps of the plane, each with a
# probability to be chosen: {w_1 .. w_N; p_1 .. p_N}. A map is w_j(v) = A_j v + t_j, stored as two
# rows [a b e; c d f], where A = [a b; c d] and t = (e, f). So N maps have shape (N, 2, 3).
# If the maps contract, exactly one shape is the union of its own copies under the maps. This shape
# is the attractor, a fractal: it consists of distorted copies of itself. For example, the
# Sierpinski triangle consists of three copies of itself, each half as large, in three corners:
#
#     corners = torch.tensor([[0, 0], [0.5, 0], [0.25, 0.5]])                         # t_1 .. t_3
#     maps = torch.cat([0.5 * torch.eye(2).expand(3, 2, 2), corners[:, :, None]], 2)   # (3, 2, 3)

def sigma_factor(maps):
    """sum_j (s_j1 + 2 s_j2) over the singular values of the matrices A_j of a system.

    maps (..., N, 2, 3) -> (...). Small: the maps contract strongly, to a sparse shape ("complex" in
    the paper). Large: a diffuse cloud. At 3 N nothing contracts, there is no attractor.
    An empirical measure of Anderson & Farrell, Improving Fractal Pre-training (WACV 2022).
    """
    s = torch.linalg.svdvals(maps[..., :2])  # (..., N, 2), larger one first
    return (s[..., 0] + 2 * s[..., 1]).sum(-1)


def sample_ifs(num_maps, sigma, generator=None):
    """A random system whose sigma-factor is exactly sigma -> maps (N, 2, 3) float32 on the CPU.

    A_j = U diag(s1, s2) V with U, V random rotations or reflections and 1 >= s1 >= s2 >= 0.
    Translations are uniform in (-1, 1). Anderson & Farrell (WACV 2022), Algorithm 1. ValueError
    unless num_maps >= 2 and 0 < sigma < 3 num_maps.
    """
    if num_maps < 2 or not 0 < sigma < 3 * num_maps:
        raise ValueError(f"need {num_maps=} >= 2 and 0 < {sigma=} < 3 num_maps")

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    left, s = float(sigma), torch.zeros(num_maps, 2, dtype=torch.float64)
    for j in range(num_maps):  # s1 + 2 s2 lies between `need` and `left`, where 0 <= s2 <= s1 <= 1
        need = left - 3 * (num_maps - 1 - j)  # the later maps take at most 3 each
        s1 = uniform(max(0.0, need / 3), min(1.0, left)).item()
        s2 = uniform(max(0.0, (need - s1) / 2), min(s1, (left - s1) / 2)).item()
        s[j, 0], s[j, 1] = s1, s2  # for the last map s2 has one possible value
        left -= s1 + 2 * s2
    angle = uniform(-math.pi, math.pi, 2, num_maps)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], -1).view(2, num_maps, 2, 2)
    u, v = rotation @ uniform(-1, 1, 2, num_maps, 2).sign().diag_embed()
    linear = u @ s.diag_embed() @ v
    return torch.cat([linear, uniform(-1, 1, num_maps, 2, 1)], -1).float()


# ==== 2 · Drawing: chaos game, raster, texture ====================================================
# To copy this section: import torch, torch.nn.functional as F
#
# The chaos game draws the attractor. A point starts at (0, 0). In each step it picks a random map j
# and moves to A_j v + t_j. Each place that it comes to is a dot. The less a map shrinks areas, the
# more often it is picked (p_j is proportional to |det A_j|), so the dots lie evenly.
#
# Why it works. The maps take points of the attractor to points of the attractor, and they contract,
# so a point outside comes closer with each step. But (0, 0) is usually outside, and then so are the
# places that follow. At sigma 3.5, of two maps whose fractal fills a canvas one hardly contracts,
# so it takes hundreds of steps until nothing is seen of the start. (In the default fractal, that of
# --fractal-seed 32, it multiplies lengths by 0.95 to 0.99.) Therefore the first 500 steps are not
# drawn. The authors' code draws them.
#
# For speed, K orbits (paths of a moving point) of each of B systems run side by side, and each
# leaves up to 500 dots. Each orbit picks maps for itself, but orbit k uses the same random numbers
# in all B systems. Else each image would have its own pattern of dots, and a network could know an
# image by that alone.

BURN_IN, ORBIT = 500, 500  # steps of an orbit: not drawn, and then drawn, at most
GREY = 127  # of the dots


def choose_maps(probs, points, generator=None):
    """Which map each orbit picks in each step -> j (BURN_IN + steps, K) on the CPU, with enough
    orbits K for `points` dots. probs (N,), or (B, N) -> j (BURN_IN + steps, K, B) for systems with
    probabilities of their own; they need not sum to 1."""
    K = -(-points // ORBIT)  # rounded up
    u = torch.rand(BURN_IN + -(-points // K), K, generator=generator)
    ends = probs.cpu().double().cumsum(-1)
    ends = ends / ends[..., -1:]  # map j is chosen if ends[j - 1] <= u < ends[j]
    u = u[..., None] if probs.ndim == 1 else u[..., None, None]
    return (u >= ends).sum(-1)


def chaos_game(maps, j):
    """Orbits of B systems: maps (B, N, 2, 3), j of `choose_maps` -> dots (2, B, steps, K)."""
    B, steps, K = len(maps), len(j) - BURN_IN, j.shape[1]
    table = maps.permute(1, 2, 3, 0).contiguous()  # (N, 2, 3, B): row j holds map j of all systems
    v = maps.new_zeros(K, 2, B)
    dots = maps.new_empty(2, B, steps, K)
    for step, rows in enumerate(j.to(maps.device), -BURN_IN):
        if rows.ndim == 1:
            picked = table.index_select(0, rows)  # (K, 2, 3, B); table[rows] takes 6 times as long
        else:
            picked = table.gather(0, rows[:, None, None].expand(K, 2, 3, B))
        A_x, A_y, t = picked.unbind(2)  # the columns of A, and t: (K, 2, B) each
        v = torch.addcmul(t, A_x, v[:, :1]).addcmul_(A_y, v[:, 1:])  # A v + t
        if step >= 0:
            dots[:, :, step] = v.permute(1, 2, 0)
    return dots


def rasterize(dots, size, low, high, clip=True):
    """Dots (2, B, P) -> images (B, size, size) uint8, GREY where a dot lies, y upwards.

    The box from low to high (2, B) is stretched to fill the canvas but for a margin of 6 pixels in
    512. So an image does not tell where a shape lies and how large it is. clip: leave out dots that
    lie outside or are not finite; without it, there must be no such dots. `dots` is overwritten.
    """
    margin = max(1, 6 * size // 512)
    last = size - 1 - 2 * margin
    scale = last / (high - low).clamp(min=1e-6)  # (2, B)
    x, y = dots.sub_(low[..., None]).mul_(scale[..., None]).round_()
    origin = (size - 1 - margin) * size + margin  # the cell where x = y = 0
    cell = x.add(y, alpha=-size).add_(origin).long()  # floats are exact below 2^24
    if clip:
        inside = (x >= 0) & (x <= last) & (y >= 0) & (y <= last)
        cell = torch.where(inside, cell, size ** 2)  # one more cell, which is cut off
    hits = torch.zeros(len(cell), size ** 2 + 1, dtype=torch.uint8, device=dots.device)
    grey = hits.new_full((1, 1), GREY).expand(cell.shape)  # a plain number: half as fast on CPUs
    hits.scatter_(1, cell, grey)
    return hits[:, :-1].view(-1, size, size)


def dilate(images):
    """Each lit pixel grows to its 3x3 neighbourhood: images (B, S, S) uint8, 0 or GREY -> the
    same."""
    x = F.pad(images, (1, 1, 1, 1))
    x = x[:, :-2] | x[:, 1:-1] | x[:, 2:]
    return x[:, :, :-2] | x[:, :, 1:-1] | x[:, :, 2:]


def render_ifs(maps, size=512, points=100_000, dilated=True, generator=None, probs=None):
    """Draw attractors: maps (B, N, 2, 3) -> grey images (B, size, size) uint8 on maps.device.

    points: dots of an image, rounded up to whole steps of all orbits. dilated: a dot is a 3x3
    square (`stamp` gives it a texture), else a pixel. generator (CPU): of the maps that orbits
    pick, in all images alike. probs (N,) or (B, N): of the maps, by default in proportion to the
    mean |det A| (a map with det A = 0 is then never picked). To draw in parts, give each the same
    probs and a generator of the same seed. A system without an attractor runs away and gives a
    nearly blank image. ValueError if an argument does not fit.
    """
    if maps.ndim != 4 or maps.shape[2:] != (2, 3) or not len(maps) or not maps.isfinite().all():
        raise ValueError("need finite maps (B, N, 2, 3)")
    probs = maps[..., :2].det().abs().mean(0) if probs is None else probs
    if probs.shape not in (maps.shape[:2], maps.shape[1:2]) or not 8 <= size <= 4096 or points < 1:
        raise ValueError("need probs (N,) or (B, N), size 8 to 4096, and points >= 1")
    j = choose_maps(probs, points, generator)
    images = torch.empty(len(maps), size, size, dtype=torch.uint8, device=maps.device)
    group = max(1, 40_000_000 // points)  # bounds the memory of the orbits, and of the rasters
    part = max(1, 2_000_000 // (points + size ** 2)) if maps.device.type == "cpu" else 64
    for first in range(0, len(maps), group):
        some = slice(first, first + group)
        orbits = chaos_game(maps[some], j if j.ndim == 2 else j[..., some]).flatten(2)
        for dots, out in zip(orbits.split(part, 1), images[some].split(part)):
            low, high = dots.amin(2), dots.amax(2)
            runaway = not (high - low).isfinite().all()
            hits = rasterize(dots, size, low, high, clip=runaway)
            out.copy_(dilate(hits) if dilated else hits)
    return images


def stamp(images, generator=None):
    """Give dilated images (B, S, S) a random texture, in place -> the same.

    The authors stamp each point with one of the 511 non-empty 3x3 masks, and later stamps overwrite
    earlier ones. So a covered pixel is a coin flip, lit with probability 256/511. Here it is 1/2:
    an image is the dilated points times a mask of coin flips, and a new texture is a new mask.
    """
    # A random number of 64 bits is 64 coins: 10 times as fast as random_(2) for each pixel.
    words = -(-images[0].numel() // 64)
    draws = torch.empty(len(images), words, dtype=torch.int64, device=images.device)
    draws.random_(-2 ** 63, None, generator=generator)
    bit = torch.arange(8, dtype=torch.uint8, device=images.device)
    coins = draws.view(torch.uint8)[:, None] >> bit[:, None] & 1  # (B, 8, 8 * words)
    return images.mul_(coins.flatten(1)[:, :images[0].numel()].view_as(images))


# ==== 3 · Classes: the LIEP distribution and the LPCE loss (Eq. 6-9) ==============================
# To copy `perturb` and `lpce_loss`: import torch, torch.nn.functional as F
#
# One image is one class, and with one class there is nothing to learn (Eq. 6). So the paper adds
# noise: to each of the 6 N numbers of the maps a small random one. All of them together, one point
# of a cube of side Delta around 0 in 6 N dimensions, are called eps (Eq. 9). Each eps is a class:
# the image of maps + eps. If this is nearly blank, another eps is drawn. (The authors' code does
# not add. It multiplies each number by one from 1 - Delta to 1 + Delta, `--noise multiplicative`.
# The default is the paper's, and its Delta, 0.1.)
#
# Is there a picture for each eps? Nearly half of the perturbations of the default fractal have a
# map that stretches in one direction (a singular value above 1). They still have an attractor: a
# long random sequence of the maps contracts on average. (Now and then the sequence throws a dot far
# out, and then the picture is smaller.)
#
# What is Delta for? As Delta goes to 0 the data become one single image. So with Delta the paper
# asks how narrow data may be before pre-training fails: in its Table 5 it fails at 0.01 and below.
#
# What is integrated? In theory there are as many classes as points in the cube, and the data are an
# integral over all of them (Eq. 7). Hence the name LIEP, "locally integrated empirical"
# distribution. In practice, the paper says, the integral is a sample: L random eps, drawn once,
# make L classes (1,000 in the paper, 64 in nano) with one image each. A label is the index of an
# eps in this list, 0 to L - 1; the numbers of eps are never predicted. The loss, LPCE or "locally
# perturbed cross entropy" (Eq. 8), is then plain cross entropy.
#
# Where does variety within a class come from? As each class has one image, it comes from
# augmentation (section 5), or from a fresh texture (below). The recipe nano has crops, jitter and
# cutmix in pre-training, and nothing else. In the paper no single kind makes all of the gain:
#
#     pre-training                top-1 on CIFAR-100 (Tables 2 and 9)
#     all augmentation            84.2
#     without mixup and cutmix    80.4
#     without random crops        80.1
#     no pre-training             64.2
#
# Can you see the difference between classes? The paper says that most of its shapes cannot be told
# apart by eye. Those of our default fractal can, at Delta = 0.1: see results/fig2b.png.
#
# And the texture (`stamp` of section 2)? The authors' code gives each image random masks, once
# (`--texture random`, as in recipe paper). As they never change, they can give a class away without
# its shape: at Delta = 0 nano with such masks, without cutmix, learns its task to 10% in 1,500
# steps (guessing: 1.6%), and CIFAR-100 no better than from scratch. (We have not measured it at 224
# pixels.) `--texture fresh` draws new ones at each step, our reading of "w/ Aug." in the paper's
# Table 13. Without masks, `--texture fill` (nano) draws a dot as a square of 3x3 pixels, `--texture
# point` as one.
#
# FractalDB and OFDB, older datasets of fractals, are the same program at other settings: they have
# many fractals ("categories"), and the label is the category. FractalDB has 1,000 images of each,
# OFDB one (section B).
#
# Seeds (`seeded`, `seed_for`) are explained in section 6, errors (`InputError`) in section D.

def perturb(base, delta, L, generator=None, noise="additive"):
    """L perturbed copies of base, numbers of any shape (...) -> (L, ...), Eq. 9.

    noise: "additive" (the paper): each number plus U(-delta/2, delta/2). "multiplicative" (the
    authors' code): each number times U(1 - delta, 1 + delta). Draw k is the same for every L.
    """
    if noise not in ("additive", "multiplicative"):
        raise ValueError(f"noise must be additive or multiplicative, got {noise!r}")
    unit = torch.rand(L, *base.shape, generator=generator).to(base.device) - 0.5
    return base + delta * unit if noise == "additive" else base * (1 + 2 * delta * unit)


def lpce_loss(logits, target):
    """Locally perturbed cross entropy, Eq. 8: -E log p(index of eps | image). logits (B, L); target
    (B,), these indices, or (B, L), soft labels after mixup and cutmix. (Fine-tuning has the same
    loss, where an index is a class of the dataset.)"""
    return F.cross_entropy(logits, target)


class Data:
    """n labelled images. data[i], for indices i (B,) on the CPU: uint8 images (B, S, S) or
    (B, C, S, S) and labels (B,), on the device.

    draw(i) makes images, once if memory can keep them all, else at each data[i]. texture: the masks
    that `stamp` adds, "random" (of each image its own, always the same) or "fresh" (new at each
    data[i]). omega: the numbers that images are drawn from (the paper's name), for omega.json.
    """

    def __init__(self, labels, draw, args, texture=None, **omega):
        self.labels, self.draw, self.seed = labels.to(args.device), draw, args.seed
        self.texture, self.omega, self.images = texture, omega, None
        first = draw(torch.arange(1))
        if len(labels) * first.numel() <= memory_for_images(args.device):  # section D
            images = first.new_empty(len(labels), *first.shape[1:])
            for i, some in zip(torch.arange(len(labels)).split(100), images.split(100)):
                some.copy_(self.drawn(i))
            self.images = images

    def drawn(self, i):
        images = self.draw(i)
        if self.texture == "random":
            for k, image in zip(i.tolist(), images):
                generator = torch.Generator(image.device)
                stamp(image[None], generator.manual_seed(seed_for(self.seed, "texture", k)))
        return images

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        index = i.to(self.labels.device, non_blocking=True)
        images = self.drawn(i) if self.images is None else self.images.index_select(0, index)
        if self.texture == "fresh":
            images = stamp(images)  # in place, but these are copies
        return images, self.labels[index]


def covered(images, background=0):
    """The share of each image (B, ...) that is not background -> (B,), on the CPU."""
    return (images != background).flatten(1).sum(1).cpu() / images[0].numel()


def liep_data(base, draw_params, args, texture=None, least=0.0, background=0, **omega):
    """The LIEP distribution: L perturbations of the numbers `base`, each a class -> Data.

    draw_params(params (B, ...)) -> images, on the device of params. A perturbation is rejected if
    its image covers less than the share `least` of the canvas, by default if it is blank. The CPU
    draws for this, so that all devices agree. InputError if hardly one in a thousand is kept.
    """
    generator, kept, tried = seeded(args.seed, "eps"), [], 0
    while len(kept) < args.L:
        params = perturb(base, args.delta, 32, generator, args.noise)
        share = covered(draw_params(params), background)
        kept += params[(share > 0) & (share >= least)]
        tried += len(params)
        if tried > 1000 * (1 + len(kept)):
            what = f"cover {least:.0%} of the canvas" if least else "are not blank"
            raise InputError(f"--delta {args.delta}: only {len(kept)} of {tried} perturbed images "
                             f"{what}; lower it" + ", or draw more --points" * (least > 0))
    params = torch.stack(kept[:args.L])

    def draw(i):
        return draw_params(params[i].to(args.device))

    return Data(torch.arange(args.L), draw, args, texture, base=base, eps=params - base, **omega)


def base_ifs(num_maps, sigma, seed):
    """The one fractal of a run -> maps (N, 2, 3). Its sigma-factor is within 0.1 of sigma, as with
    the authors, and it covers a fifth of a canvas. They drew theirs unseeded, and never published
    it."""
    generator = seeded(seed)
    for _ in range(300):  # at sigma 3.5 about one in six does
        target = sigma + 0.2 * (torch.rand((), generator=generator).item() - 0.5)
        if 0 < target < 3 * num_maps:
            maps = sample_ifs(num_maps, target, generator)
            if covered(render_ifs(maps[None], generator=seeded(seed))) >= 0.2:
                return maps
    raise InputError(f"--sigma {sigma}, --num-maps {num_maps}: none of 300 such fractals covers a "
                     f"fifth of the canvas; sigma must be below 3 num_maps, and 3.5 is usual for 2")


def draw_ifs(maps, probs, args):
    """The images of systems (B, N, 2, 3), all drawn from the same random numbers."""
    return render_ifs(maps, args.canvas, args.points, args.texture != "point",
                      seeded(args.seed, "maps"), probs)


def fractal_data(args):
    """1p-frac: one fractal, perturbed -> Data. An image must cover 5% of the canvas, as with the
    authors, or 10% if random masks will put out half of it."""
    if args.categories > 1:
        return fractaldb_data(args)  # section B
    base = base_ifs(args.num_maps, args.sigma, args.fractal_seed)
    probs = base[..., :2].det().abs()  # of the unperturbed maps, as with the authors
    draw_maps = functools.partial(draw_ifs, probs=probs, args=args)
    return liep_data(base, draw_maps, args, args.texture,
                     least=0.1 if args.texture in ("random", "fresh") else 0.05)


# ==== 4 · Network: a Vision Transformer (Dosovitskiy et al., 2021), parameter names as in timm ====
# To copy this section: import torch, torch.nn as nn, torch.nn.functional as F
#
# The image is cut into patches. Each patch becomes a vector, a token, and a position embedding is
# added to it. One more token, cls, stands for the whole image: the classifier reads it at the end.
# The tokens pass through blocks. Each does two things, and adds the results to them. Attention:
# each token compares its query with the keys of all tokens, and takes the mean of their values,
# weighted by how well they match. MLP: a small network works on each token alone.

MODELS = {  # dim, depth, heads
    "vit_nano": (96, 6, 3),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
}


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if x.is_cuda:
            x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        else:  # the same: on CPUs the fused one is slow in bf16
            weight = (q * (D // self.heads) ** -0.5) @ k.transpose(2, 3)  # (B, heads, N, N)
            x = weight.softmax(-1).to(v.dtype) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth (drop path): (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = drop_path

    def drop(self, x):
        """Leave a whole branch out for some samples. Scale up the rest: the mean stays the same."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep) / keep

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))


class ViT(nn.Module):
    """Vision Transformer classifier: images (B, 3, img_size, img_size) -> logits (B, num_classes).
    The head starts at zero, so the first loss is exactly ln(num_classes). ValueError if the patch
    does not divide the image, the heads do not divide dim, or images have another size."""

    def __init__(self, img_size=224, patch_size=16, num_classes=1000, dim=192, depth=12, heads=3,
                 drop_path=0.0):
        super().__init__()
        if img_size % patch_size or dim % heads:
            raise ValueError(f"{patch_size=} must divide {img_size=}, and {heads=} {dim=}")
        self.img_size, self.patch_size = img_size, patch_size
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, drop_path * i / max(1, depth - 1))
                                      for i in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.zeros_(self.head.weight)

    def embed(self, x):
        if x.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(f"need {self.img_size} pixels, got {tuple(x.shape)}")
        B, C, S, _ = x.shape
        n = S // self.patch_size  # patches a side
        x = x.view(B, C, n, S // n, n, S // n).permute(0, 2, 4, 1, 3, 5)  # (B, n, n, C, P, P)
        proj = self.patch_embed.proj  # timm's convolution is a matrix product of each patch
        x = F.linear(x.reshape(B, n * n, -1), proj.weight.flatten(1), proj.bias)  # (B, n^2, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)  # (B, 1 + n^2, D)
        return x + self.pos_embed

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x)))[:, 0])


# ==== 5 · Augmentation: DeiT's (arXiv 2012.12877), on a batch that is already on the device =======
# To copy this section (with A): import functools, math, torch, torch.nn.functional as F
#                                from torchvision.transforms.v2 import functional as T
#
# Every sample gets its own crop, flips, colours and erased box. Crops of random place and scale
# make the task of section 3 hard. Mixup and cutmix blend each image, and its target, with another
# image of the batch. What is done, and where, is chosen on the CPU, and the pixels stay on the
# device, so nothing waits for a GPU. All random numbers come from torch's default generators, which
# the loop of section 6 seeds at each step.

def resize_matrix(start, length, pixels, size):
    """Resizing is linear: column j of the matrix (B, pixels, size) has the weights of output j.

    start, length (B,): whole pixels. The box [start, start + length) of each image becomes `size`
    pixels. length < 0 is a flip: the box [start + length, start) backwards.
    The bicubic kernel (Keys, a = -0.5) is widened when the image shrinks (antialiasing), cut off at
    the box, and normalised, as torchvision does.
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / size
    output = (torch.arange(size, device=start.device) + 0.5) * scale  # from `start`, in pixels
    pixel = torch.arange(pixels, device=start.device)[:, None] + 0.5 - start
    share = pixel / length  # of the way through the box
    pixel = torch.where((share > 0) & (share < 1), pixel, math.inf)  # not in the box: far away
    d = (pixel - output).abs_().div_(scale.abs().clamp(min=1))  # in output pixels if larger
    # Twice the kernel is 3 d^3 - 5 d^2 + 2 up to 1, then (1 - d) (2 - d)^2 up to 2, then 0. Both
    # pieces are 0 where they end, so it is their sum, each with d held in its range. In place, as
    # new memory takes longer than the arithmetic on a CPU.
    near, far = d.clamp(max=1), d.clamp_(1, 2)
    weight = (3 * near - 5).mul_(near).mul_(near).add_(2)
    weight += (1 - far).mul_((2 - far).square_())
    return weight.div_(weight.sum(1, keepdim=True))


def random_boxes(B, size, scale, ratio, tries=10):
    """torchvision's RandomResizedCrop.get_params, batched -> start, length (2, B): rows, columns.
    Area U(scale), log-uniform aspect in `ratio`: the first try that fits, else the whole image."""
    area = torch.empty(B, tries).uniform_(*scale) * size * size
    aspect = torch.empty(B, tries).uniform_(math.log(ratio[0]), math.log(ratio[1])).exp()
    length = torch.stack([area / aspect, area * aspect]).sqrt().round()  # (2, B, tries)
    fits = ((length >= 1) & (length <= size)).all(0)
    first = fits.int().argmax(1, keepdim=True)
    length = torch.where(fits, length, size).gather(2, first.expand(2, B, 1))[..., 0]
    return (torch.rand(2, B) * (size - length + 1)).floor(), length


IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Augment:
    """images (B, C, S, S) or (B, S, S) uint8, grey or RGB, and labels (B,) int64, on one device ->
    normalised (B, 3, img_size, img_size) floats and soft targets (B, num_classes).

    flip: probabilities (horizontal, vertical). erase: a probability. mixup, cutmix: alpha of their
    Beta distribution. jitter acts only if randaug is off, as in timm. 0: off. The defaults are the
    authors' for fractals; for photographs flip=(0.5, 0), erase=0.25, **IMAGENET.
    """

    def __init__(self, img_size, num_classes, crop=True, aspect=True, crop_scale=(0.08, 1.0),
                 flip=(0.5, 0.5), randaug=True, jitter=0.4, erase=0.5, mixup=0.8, cutmix=1.0,
                 smoothing=0.1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
        self.img_size, self.num_classes, self.mean, self.std = img_size, num_classes, mean, std
        self.crop, self.crop_scale, self.flip = crop, crop_scale, flip
        self.ratio = (3 / 4, 4 / 3) if aspect else (1, 1)
        self.randaug, self.jitter, self.erase = randaug, 0 if randaug else jitter, erase
        self.mixup, self.cutmix, self.smoothing = mixup, cutmix, smoothing

    def __call__(self, images, labels):
        x = self.resized_crop(images)
        if self.jitter:
            x = color_jitter(x, self.jitter)  # section A
        if self.randaug:
            x = rand_augment(x)  # section A
        x = self.normalise(x)
        if self.erase:
            x = self.random_erase(x)
        target = F.one_hot(labels, self.num_classes) * (1 - self.smoothing)
        target = target + self.smoothing / self.num_classes
        if self.mixup or self.cutmix:
            x, target = self.mix(x, target)
        return x, target

    def plain(self, images):
        """Only resize and normalise."""
        return self.normalise(self.resized_crop(images, random=False))

    def normalise(self, x):
        numbers = 255 * torch.tensor([self.mean, self.std]).view(2, 3, 1, 1)
        mean, std = numbers.to(x.device, non_blocking=True)
        return (x - mean) / std  # grey becomes three channels

    def resized_crop(self, images, random=True):
        """RandomResizedCrop and flips -> (B, C, img_size, img_size), whole numbers 0..255."""
        x = (images if images.ndim == 4 else images[:, None]).float()  # (B, C, S, S)
        B, _, S, width = x.shape
        if S != width or images.dtype != torch.uint8:
            raise ValueError(f"need square uint8, got {tuple(images.shape)} {images.dtype}")
        start, length = torch.zeros(2, B), torch.full((2, B), float(S))
        if random and self.crop:
            start, length = random_boxes(B, S, self.crop_scale, self.ratio)
        if random:
            flip = torch.rand(2, B) < torch.tensor(self.flip[::-1])[:, None]  # of rows, of columns
            start, length = start + flip * length, torch.where(flip, -length, length)
        for start, length in torch.stack([start, length], 1).to(x.device, non_blocking=True):
            # x.mT has the rows last, where a matrix product resizes them; the second pass resizes
            # the columns and turns the image back.
            x = x.mT @ resize_matrix(start, length, S, self.img_size)[:, None]
        return x.clamp_(0, 255).round_()

    def random_erase(self, x):
        """In a share `erase` of the images a box of 2% to a third of the area becomes N(0, 1) noise
        (Zhong et al.)."""
        B, _, S, _ = x.shape
        start, length = random_boxes(B, S, (0.02, 1 / 3), (0.3, 1 / 0.3))
        length *= torch.rand(B) < self.erase  # else a box without pixels
        box = torch.stack([start, start + length])[..., None].to(x.device, non_blocking=True)
        pixel = torch.arange(S, device=x.device)
        rows, columns = (pixel >= box[0]) & (pixel < box[1])  # (B, S) each
        inside = rows[:, None, :, None] & columns[:, None, None]
        return torch.where(inside, torch.randn_like(x), x)

    def mix(self, x, target):
        """Mixup: lambda x + (1 - lambda) x.flip(0). Cutmix, in place: a box of x.flip(0) in x. One
        lambda ~ Beta for the batch. After cutmix it is the share of the image outside the box. If
        both are on, a coin chooses one for the batch."""
        S = x.shape[-1]
        cut = self.cutmix and (not self.mixup or bool(torch.rand(()) < 0.5))
        alpha = self.cutmix if cut else self.mixup
        lam = torch.distributions.Beta(alpha, alpha).sample().item()
        if cut:
            half, centre = int(math.sqrt(1 - lam) * S) // 2, torch.randint(S, (2,)).tolist()
            rows, columns = (slice(max(0, c - half), c + half) for c in centre)
            box = x[:, :, rows, columns]
            box.copy_(box.flip(0))
            lam = 1 - box[0, 0].numel() / S ** 2
        else:
            x = torch.lerp(x.flip(0), x, lam)
        return x, torch.lerp(target.flip(0), target, lam)


# ==== 6 · Training: one loop for pre-training and fine-tuning =====================================
#
# Which images a step takes depends on (seed, step), and its random numbers on (seed, step, rank),
# where rank is 0 to world - 1 if several processes share a batch. No generator has a state that
# lasts longer than a step, and images are drawn again from the settings. So from the weights, the
# optimizer state and the step of a checkpoint, `python onepfrac.py resume runs/pretrain` reaches
# the same bits on a CPU as a run without a break. (On a GPU some sums have no fixed order.)

def seed_for(*key):
    """A 31-bit seed from any key of numbers and strings, the same on every machine."""
    return zlib.crc32(repr(key).encode()) >> 1


def seeded(*key):
    """A generator on the CPU. One number is its seed; a longer key goes through `seed_for`."""
    return torch.Generator().manual_seed(key[0] if len(key) == 1 else seed_for(*key))


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order of n images in one epoch."""
    return torch.randperm(n, generator=seeded(seed, "order", epoch))


def batch_indices(n, batch_size, step, seed):
    """The batch of a step: one permutation after another, cut into batches -> indices (B,)."""
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // n, (last - 1) // n + 1)
    return torch.cat([permutation(n, seed, e)[max(0, first - e * n):last - e * n] for e in epochs])


def make_optimizer(model, args):
    """AdamW, SGD with Nesterov momentum, or Muon for the weight matrices of the blocks and AdamW
    for the rest. Only weight matrices decay: no biases, norms, cls token, position embeddings."""
    blocks, matrices, rest = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim == 1 or name in ("cls_token", "pos_embed"):
            rest.append(p)
        elif name.startswith("blocks."):
            blocks.append(p)
        else:
            matrices.append(p)
    groups = [dict(params=blocks, weight_decay=args.weight_decay),
              dict(params=matrices, weight_decay=args.weight_decay),
              dict(params=rest, weight_decay=0.0)]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True)
    if args.optimizer == "muon":  # section E
        groups[0]["muon_dtype"] = torch.bfloat16 if args.precision == "bf16" else torch.float32
        return Muon(groups, args.lr, betas=(0.9, 0.999), fused=True)
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.999), fused=True)


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up over `warmup` steps, then half a cosine towards zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def predict(network, x, args):
    """Logits of images (B, 3, S, S), computed in --precision -> (B, classes) float32."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        return network(x).float()


def train_step(network, optimizer, x, target, rate, args):
    """One step on images (B, 3, S, S) and soft targets (B, classes) -> loss, logits."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    logits = predict(network, x, args)
    loss = lpce_loss(logits, target)
    loss.backward()
    if args.clip_grad:
        nn.utils.clip_grad_norm_(network.parameters(), args.clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), logits.detach()


def train(args, model, data, augment, steps, tests=None):
    """Train until `steps`, from step 0 or from where a resumed run stopped. Test on the images
    `tests` every --eval-epochs, and at the end."""
    optimizer = make_optimizer(model, args)
    network = accelerate(model, args)  # the same weights, compiled or in parallel: section D
    warmup = round(args.warmup * steps)
    test_every = max(1, round(args.eval_epochs * len(data) / args.batch_size)) if tests else None
    model.train()
    with Run(args, model, optimizer, steps) as run:  # log, checkpoint, Ctrl-C: D
        if tests and run.misses_test(test_every):
            run.log_test(evaluate(model, tests, augment, args))
        for step in range(run.step, steps):
            i = batch_indices(len(data), args.batch_size, step, args.seed)[args.rank::args.world]
            torch.manual_seed(seed_for(args.seed, "step", step, args.rank))
            images, labels = data[i]
            x, target = augment(images, labels)
            rate = learning_rate(step, steps, warmup, args.lr)
            loss, logits = train_step(network, optimizer, x, target, rate, args)
            if step == 0:
                run.save_samples(x, augment)
            run.count(loss, logits, target)  # and run.step += 1
            if run.due(args.log_every) or run.due(args.save_every):  # a log line before each save
                run.log_training(rate)
            if tests and run.due(test_every):
                run.log_test(evaluate(model, tests, augment, args))
            if run.due(args.save_every) or run.signal:
                run.save()
            if run.signal:
                run.stop()


@torch.no_grad()
def evaluate(model, data, augment, args):
    """Top-1 accuracy in percent, each rank testing its share of the images."""
    model.eval()
    right = torch.zeros((), device=args.device)
    for i in torch.arange(len(data))[args.rank::args.world].split(500):
        images, labels = data[i]
        right += (predict(model, augment.plain(images), args).argmax(1) == labels).sum()
    model.train()
    return 100 * over_ranks(right, args).item() / len(data)


# ==== 7 · Commands: pretrain and finetune =========================================================
#
# Both make labelled images, a network and an augmentation, and train. Fine-tuning starts from a
# checkpoint's weights, but with a new head (the classifier on top), and tests as it goes.
# What it changes otherwise (section F has all numbers):
#
#                   paper: pre-training -> fine-tuning    nano: pre-training -> fine-tuning
#     length        240,000 steps -> 1,000 epochs         4,700 steps -> 8 epochs
#     optimizer     AdamW -> SGD                          Muon -> Muon
#     peak rate     5e-4 -> 0.015                         2e-3 -> 2e-3
#     weight decay  0.05 -> 1e-4                          0.05 -> 0.05
#     warm-up       15 steps -> 1% of the steps           2% -> 5% of the steps
#     batch         256 -> 768                            128 -> 64
#     smoothing     0.1 -> 0.1 of a label                 none -> 0.1
#     least crop    8% -> 8% of the area                  10% -> 70%
#     flips         left-right, up-down -> left-right     none -> left-right
#     mixup, cutmix both -> both                          cutmix -> none
#     erased boxes  50% -> 25% of the images              none -> none
#     jitter        none (RandAugment does it)            on -> off
#     pixels        (x - 0.5) / 0.5 -> ImageNet's mean and standard deviation, for both
#
# All else stays. nano has no RandAugment in either.

def make_model(args, classes):
    """The network with its initial weights."""
    dim, depth, heads = MODELS[args.model]
    torch.manual_seed(seed_for(args.seed, "weights"))
    with blaming("--img-size or --patch-size"):  # turns a ValueError into one line: section D
        return ViT(args.img_size, args.patch_size, classes, dim, depth, heads, args.drop_path)


def make_augment(args, classes, **more):
    """The augmentation that the switches of the paper's Table 9 ask for; more: what a command adds.
    A switch is 0 or 1, so flip / 2 is a probability of 0 or 0.5."""
    return Augment(
        args.img_size, classes, args.crop, args.aspect, (args.min_crop, 1), randaug=args.randaug,
        jitter=0.4 * args.jitter, mixup=0.8 * args.mixup, cutmix=1.0 * args.cutmix,
        smoothing=args.smoothing, **more)


def pretrain(args):
    """Pre-train on the images of --source, by default L perturbed copies of one fractal."""
    data = source_data(args)  # section 3, or B
    if args.lead and not args.resume:  # rank 0
        write_json(Path(args.out) / "omega.json", data.omega)
    classes = int(data.labels.max()) + 1
    augment = make_augment(args, classes, flip=(args.flip / 2,) * 2, erase=args.erase / 2)
    train(args, make_model(args, classes).to(args.device), data, augment, args.steps)


def finetune(args):
    """Fine-tune a checkpoint on --data, or train from scratch without one. With --probe K train
    only a linear classifier on the first K blocks."""
    data, tests, classes = downstream_data(args)  # section C
    model = make_model(args, classes)
    if args.ckpt and not args.resume:
        load_weights(model, args.ckpt)  # all but the head: D
    if args.probe:
        if args.batch_size == args.world:
            raise InputError("--batch-size: with --probe two or more, to normalise over them")
        model = Probe(model, args.probe, classes)  # section E
    augment = make_augment(args, classes, flip=(args.flip / 2, 0), erase=args.erase / 4, **IMAGENET)
    steps = math.ceil(args.epochs * len(data) / args.batch_size)
    train(args, model.to(args.device), data, augment, steps, tests)


# ################# END OF PART ONE: this is the whole method. PART TWO: the rest ##################

# ==== A · RandAugment and colour jitter (for `Augment`, section 5) ================================
# To copy this section: with 5
#
# Each operation is a function of x (B, C, H, W), floats that hold 0..255, and of a level or factor
# (B, 1, 1, 1). It agrees with Pillow's to one grey level, and so with timm's. (But Pillow does not
# blend the edge of an image that is moved with the grey around it.)

def to_grey(x):
    """ITU-R 601 luma as Pillow rounds it: (B, C, H, W) -> (B, 1, H, W). Grey images pass."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, 1)
    return ((19595 * red + 38470 * green + 7471 * blue) / 65536 + 0.5).floor()


def blend(degenerate, x, factor):
    """factor 0: the degenerate image, 1: x; between and beyond, a line through both."""
    return torch.lerp(degenerate, x, factor).clamp_(0, 255).floor_()


def brightness(x, factor):
    """0: black."""
    return blend(torch.zeros_like(x), x, factor)


def color(x, factor):
    """0: grey."""
    return blend(to_grey(x), x, factor)


def contrast(x, factor):
    """0: the mean grey everywhere."""
    return blend((to_grey(x).mean((2, 3), keepdim=True) + 0.5).floor(), x, factor)


def sharpness(x, factor):
    """0: smoothed, but for the border."""
    if min(x.shape[2:]) < 3:  # all border
        return x
    smooth, inner = x.clone(), x[..., 1:-1, 1:-1]  # by [[1,1,1],[1,5,1],[1,1,1]] / 13
    sums = F.avg_pool2d(x, 3, stride=1, divisor_override=1)  # of each 3x3 square
    smooth[..., 1:-1, 1:-1] = ((sums + 4 * inner) / 13 + 0.5).floor()
    return blend(smooth, x, factor)


def affine(x, level, angle=0.0, shear_x=0.0, shear_y=0.0, shift_x=0.0, shift_y=0.0, fill=128):
    """Each at level 1; one of them is not 0. Bilinear, as Pillow's."""
    level = level[:, 0, 0, 0]
    cos, sin = (angle * level).cos(), (angle * level).sin()
    matrix = torch.stack([  # Pillow shears about the corner
        cos, shear_x * level - sin, (shear_x + shift_x) * level,
        sin + shear_y * level, cos, (shear_y + shift_y) * level], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    x = F.grid_sample(x - fill, grid, align_corners=False)
    return x.add_(fill + 1e-3).floor_()


def enhance(function):
    """timm's "inc": a factor of 1 +- 0.9 at full magnitude."""
    return lambda x, level: function(x, 1 + 0.9 * level)


OPS = {  # timm's fifteen operations
    "autocontrast": lambda x, level: T.autocontrast(x.to(torch.uint8)).float(),
    "equalize": lambda x, level: T.equalize(x.to(torch.uint8)).float(),
    "invert": lambda x, level: 255 - x,
    "posterize": lambda x, level: x - x % 2 ** (4 + (4 * level.abs()).floor()),  # to 4 .. 0 bits
    "solarize": lambda x, level: torch.where(x < 256 - (256 * level.abs()).floor(), x, 255 - x),
    "solarize_add": lambda x, level: (x + (x < 128) * (110 * level.abs()).floor()).clamp(max=255),
    "brightness": enhance(brightness),
    "color": enhance(color),
    "contrast": enhance(contrast),
    "sharpness": enhance(sharpness),
    "rotate": functools.partial(affine, angle=math.radians(30)),
    "shear_x": functools.partial(affine, shear_x=0.3),
    "shear_y": functools.partial(affine, shear_y=0.3),
    "translate_x": functools.partial(affine, shift_x=0.9),  # of grid_sample's width, which is 2
    "translate_y": functools.partial(affine, shift_y=0.9),
}


def apply_op(x, op, level):
    """One operation per sample: x (B, C, S, S); on the CPU op (B,), which indexes OPS (its length:
    none), and level (B,) in -1..1."""
    x = x.clone()
    for k, function in enumerate(OPS.values()):
        some = (op == k).nonzero()[:, 0]
        if len(some):
            index, amount = (t.to(x.device, non_blocking=True) for t in (some, level[some]))
            x[index] = function(x[index], amount.view(-1, 1, 1, 1))
    return x


def rand_augment(x, layers=2, magnitude=9.0, std=0.5):
    """timm's rand-m9-mstd0.5-inc1: two of the operations, each with probability 0.5."""
    B = len(x)
    for _ in range(layers):
        op = torch.where(torch.rand(B) < 0.5, torch.randint(len(OPS), (B,)), len(OPS))
        level = (magnitude + std * torch.randn(B)).clamp(0, 10) / 10
        x = apply_op(x, op, level * (torch.randint(2, (B,)) * 2 - 1))
    return x


def color_jitter(x, jitter):
    """Brightness, saturation and contrast by U(1 - jitter, 1 + jitter), in an order that the batch
    shares."""
    factors = 1 + jitter * (2 * torch.rand(3, len(x), 1, 1, 1) - 1)
    factors, ops = factors.to(x.device, non_blocking=True), (brightness, color, contrast)
    for k in torch.randperm(3).tolist():
        x = ops[k](x, factors[k])
    return x


# ==== B · Other images (for Tables 2, 3, 4, 11, 12, and for training on a folder) =================
#
# A source is a function from settings to `Data`; a new one needs a line in SOURCES, at the end of
# this section. Contours, clouds and a warped photograph are drawn from other numbers than maps:
# from `params`. params + eps is a class, as with the fractal.

def fractaldb_data(args):
    """Table 2. FractalDB: --categories random fractals of 2 to 7 maps, --instances images of each.
    OFDB: one image of each. Kataoka et al., Pre-training without Natural Images (ACCV 2020).

    A category is kept if its points light a fifth of a 512 canvas. An instance is one of 25
    weightings of a parameter in all maps, 4 flips and, with random masks, a texture of its own.
    (So without masks only 100 instances differ.)
    """
    generator, systems = seeded(args.fractal_seed), []
    while len(systems) < args.categories:
        maps = 2 * torch.rand(50, 7, 2, 3, generator=generator) - 1
        used = torch.arange(7) < torch.randint(2, 8, (50, 1), generator=generator)
        maps = maps * used[..., None, None]  # a map that is not used is 0: never chosen
        images = render_ifs(maps, dilated=False, generator=seeded(args.fractal_seed),
                            probs=maps[..., :2].det().abs())
        systems += maps[covered(images) >= 0.2]
    systems = torch.stack(systems[:args.categories])
    weights = torch.ones(25, 6)  # the first one is the original
    for n in range(24):
        weights[1 + n, n // 4] = (0.2, 0.6, 1.4, 1.8)[n % 4]

    def draw(i):
        category, instance = i // args.instances, i % args.instances
        maps = systems[category] * weights[instance % 25].view(-1, 1, 2, 3)
        probs = systems[category, ..., :2].det().abs()
        images = draw_ifs(maps.to(args.device), probs, args)
        for axis, flip in ((1, instance // 25 % 2 == 1), (2, instance // 50 % 2 == 1)):
            images = torch.where(flip.to(args.device)[:, None, None], images.flip(axis), images)
        return images

    labels = torch.arange(args.categories).repeat_interleave(args.instances)
    return Data(labels, draw, args, args.texture, systems=systems)


def cloud_data(args):
    """Table 4: a cloud of Gaussian or uniform noise, whose mean and covariance, or bounds, move.
    Nothing is published about the images. Here: N(0, I) in a window of +-3, or U(-1, 1)^2 in one of
    +-1.5, the same random numbers for all images, in the fractals' stamps."""
    gaussian = args.source == "gaussian"
    base = torch.tensor([[0., 1, 0], [0, 0, 1]] if gaussian else [[-1., 1], [-1, 1]])
    random = torch.randn if gaussian else torch.rand
    unit = random(2, args.points, generator=seeded(args.fractal_seed))

    def draw(params):
        first, rest = params[:, :, :1], params[:, :, 1:]  # (B, 2, 1), (B, 2, 2 or 1)
        if gaussian:  # z -> mean + C^(1/2) z
            value, vector = torch.linalg.eigh((rest + rest.mT) / 2)
            spread = vector * value.clamp(min=0).sqrt()[:, None] @ vector.mT
        else:  # u -> low + (high - low) u
            spread = (rest - first)[..., 0].diag_embed()
        points = (first + spread @ unit.to(params.device)).transpose(0, 1)
        edge = points.new_full((2, len(params)), 3 if gaussian else 1.5)
        hits = rasterize(points, args.canvas, -edge, edge)
        return hits if args.texture == "point" else dilate(hits)

    return liep_data(base, draw, args, args.texture)


def perlin_noise(shape, rng):
    """1-D Perlin noise at random positions, as `pnoise1` of the package `noise`: half of its slopes
    are -1, the others 1 to 8."""
    slope = np.where(rng.random_sample((2, *shape)) < 0.5, -1, rng.randint(1, 9, (2, *shape)))
    f = rng.random_sample(shape)
    fade = f ** 3 * (f * (6 * f - 15) + 10)
    return 0.4 * (slope[0] * f * (1 - fade) + slope[1] * (f - 1) * fade)


def rcdb(seed, category, instance):
    """RCDB: nested polygons whose vertices move outwards by noise from one to the next -> offsets
    (P, V, 2) from a centre (2,), greys (P,), for a 512 canvas. As in masora1030's make_rcdb.py."""
    shared = np.random.RandomState(seed_for(seed, "rcdb", category))
    own = np.random.RandomState(seed_for(seed, "rcdb", category, instance))
    P, V = shared.randint(1, 201), 0
    while not 3 <= V <= 200:
        V = int(shared.exponential(100))
    noise, step = shared.uniform(0, 4), shared.uniform(0, 0.1)
    radius = own.randint(0, 101) * own.uniform(1, 2, 2)  # of x and y
    centre = own.uniform(56, 456, 2)
    growth = noise + step - 2 * noise * perlin_noise((P, V, 2), own)
    return polygons(V, radius, growth), centre, own.randint(0, 256, P)


def visual_atom(seed, category, instance):
    """Visual Atoms: as RCDB, but two sine waves move the vertices too, and the ellipse is shared by
    a category. As in masora1030's make_VisualAtom.sh."""
    shared = np.random.RandomState(seed_for(seed, "va", category))
    own = np.random.RandomState(seed_for(seed, "va", category, instance))
    P, V = shared.randint(1, 201), shared.randint(200, 1001)
    noise, step = shared.uniform(0, 4), shared.uniform(0, 0.1)
    radius = shared.randint(10, 61) * shared.uniform(1, 2, 2)
    waves = shared.choice(21, (2, 1), replace=False)
    centre = own.uniform(0, 512, 2)
    growth = noise + step - noise * perlin_noise((P, V, 2), own)
    growth += 0.5 * np.sin(waves * np.arange(V) * (2 * math.pi / V)).sum(0)[:, None]
    return polygons(V, radius, growth), centre, own.randint(0, 256, P)


def polygons(V, radius, growth):
    """Vertices (P, V, 2) of nested ellipses: growth (P, V, 2) is added to the radii, one by one."""
    angle = np.arange(V) * (2 * math.pi / V)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * (radius + growth.cumsum(0))


def draw_contour(offsets, centre, greys, size, background):
    """Closed lines, 1 pixel wide, later ones over earlier ones -> image (size, size) uint8."""
    image = Image.new("L", (size, size), background)
    pen, corners = ImageDraw.Draw(image), (centre + offsets) * (size / 512)
    for polygon, grey in zip(corners.astype(np.float32), greys.tolist()):
        pen.polygon(polygon, outline=grey)
    return torch.from_numpy(np.array(image))


def contour_data(args):
    """Table 3: RCDB's nested polygons on white, or Visual Atoms' waves on black. Pillow is faster
    here than a GPU.

    One category: the first that fills a fifth of the canvas; the radii of each polygon are
    multiplied by 1 + eps (the paper gives no formula).
    """
    numbers, background = {"rcdb": (rcdb, 255), "va": (visual_atom, 0)}[args.source]

    def draw(pictures, device):
        images = [draw_contour(*p, args.canvas, background) for p in pictures]
        return torch.stack(images).to(device)

    def draw_instances(i):  # category * instances + instance
        pairs = [divmod(k, args.instances) for k in i.tolist()]
        return draw([numbers(args.fractal_seed, *pair) for pair in pairs], args.device)

    if args.categories > 1:
        labels = torch.arange(args.categories).repeat_interleave(args.instances)
        return Data(labels, draw_instances, args)
    for category in itertools.count():
        offsets, centre, greys = numbers(args.fractal_seed, category, 0)
        image = draw_contour(offsets, centre, greys, 512, background)  # whatever the canvas is
        if covered(image[None], background) >= 0.2:
            break

    def draw_scaled(params):  # (B, P)
        scales = params.cpu()[..., None, None].numpy()
        return draw([(offsets * scale, centre, greys) for scale in scales], params.device)

    return liep_data(torch.ones(len(greys)), draw_scaled, args, background=background,
                     category=category)


def canny(image, low=100, high=200):
    """Canny's edges: grey image (S, S) uint8 -> (S, S) uint8, 0 or 255.

    Smoothing, Sobel gradients with |g| = |gx| + |gy|, non-maximum suppression in four directions,
    then edges above `low` that touch one above `high` (hysteresis), pixel for pixel as cv2.Canny.
    """
    x = F.pad(T.gaussian_blur(image[None], 5).float()[None], (1, 1, 1, 1), "replicate")
    sobel = x.new_tensor([[-1., 0, 1], [-2, 0, 2], [-1, 0, 1]])
    gx, gy = F.conv2d(x, torch.stack([sobel, sobel.T])[:, None])[0]
    strength = gx.abs() + gy.abs()
    # The two neighbours along the gradient, which is horizontal, falling, vertical or rising.
    sector = (torch.atan2(gy, gx) / (math.pi / 4)).round().long() % 4
    around = F.pad(strength, (1, 1, 1, 1)).unfold(0, 3, 1).unfold(1, 3, 1).flatten(2)  # (S, S, 9)
    both = torch.tensor([[3, 5], [0, 8], [1, 7], [2, 6]])[sector]  # (S, S, 2)
    before, after = around.gather(2, both).unbind(2)
    thin = (strength > before) & (strength > after - (sector % 2 == 0).float() / 2)
    weak = thin & (strength > low)
    edge, grown = torch.zeros_like(weak), weak & (strength > high)
    while (edge != grown).any():
        edge, grown = grown, dilate(grown[None].to(torch.uint8))[0].bool() & weak
    return 255 * edge.to(torch.uint8)


WARPS = {"affine": torch.eye(2, 3), "homography": torch.eye(3),  # the params that do nothing
         "elastic": torch.zeros(2, 8, 8), "polynomial": torch.eye(2, 6)}


def warp_grid(kind, params, size):
    """Where each pixel of a warped image comes from: params (B, *WARPS[kind].shape) -> (B, size,
    size, 2) for grid_sample. polynomial: of second degree; homography: a quotient of affine maps;
    elastic: shifts of an 8 x 8 lattice, interpolated by cubics."""
    at = (torch.arange(size, device=params.device) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    if kind == "elastic":
        shift = F.interpolate(params, (size, size), mode="bicubic", align_corners=True)
        return (torch.stack([x, y]) + shift).permute(0, 2, 3, 1)
    terms = torch.stack([x, y, torch.ones_like(x), x * x, x * y, y * y][:params.shape[2]])
    grid = torch.einsum("bij,jhw->bhwi", params, terms)
    return grid[..., :2] / grid[..., 2:].clamp(min=1e-3) if kind == "homography" else grid


def image_data(args):
    """Tables 11, 12: one photograph (matplotlib's by default), or its edges, under L warps."""
    if args.noise == "multiplicative" and args.warp == "elastic":
        raise InputError("--noise multiplicative: cannot change --warp elastic, all zeros")
    file = args.image or cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with blaming(f"--image {file}"):
        image = square(read_image(file), args.canvas)
    if args.edges == "canny":
        image = canny(to_grey(image[None].float())[0, 0].to(torch.uint8))[None]

    def draw(params):
        grid = warp_grid(args.warp, params, args.canvas)
        batch = image.to(params.device).float().expand(len(params), -1, -1, -1)
        return F.grid_sample(batch, grid, align_corners=False).add_(0.5).to(torch.uint8)

    return liep_data(WARPS[args.warp], draw, args)


def image_folder_data(args):
    """Any images, one folder a class."""
    folder = open_folder(args.root)
    data = folder_data(folder, None, args)
    note_images(args, folder, data)  # section D
    return data


LIEP = "delta L noise "  # flags of the sources that are perturbed
MANY = "categories instances "  # of those that can have many categories
SOURCES = {  # name: function, flags that have an effect on it
    "fractal": (fractal_data, LIEP + MANY + "sigma num_maps fractal_seed canvas points texture"),
    "rcdb": (contour_data, LIEP + MANY + "fractal_seed canvas"),
    "va": (contour_data, LIEP + MANY + "fractal_seed canvas"),
    "gaussian": (cloud_data, LIEP + "fractal_seed canvas points texture"),
    "uniform": (cloud_data, LIEP + "fractal_seed canvas points texture"),
    "image": (image_data, LIEP + "canvas image edges warp"),
    "folder": (image_folder_data, "root"),
}


def source_data(args):
    """The images of --source -> Data."""
    return SOURCES[args.source][0](args)


# ==== C · Downstream datasets: torchvision's by name, or a folder (for `finetune`) ================

DATASETS = {  # name: torchvision's class, how it is asked for its test images
    "cifar10": ("CIFAR10", dict(train=False)),
    "cifar100": ("CIFAR100", dict(train=False)),
    "stl10": ("STL10", dict(split="test")),
    "dtd": ("DTD", dict(split="test")),
    "food101": ("Food101", dict(split="test")),
    "pets": ("OxfordIIITPet", dict(split="test")),
    "aircraft": ("FGVCAircraft", dict(split="test")),
}


def read_image(file):
    """An image file as a PIL image in RGB, as a viewer shows it: upright by its EXIF tag, over
    white where it is transparent, greys of any depth scaled; ValueError if they are negative or
    above 16 bits. (`main` makes Pillow's warning of decompression bombs an error.)"""
    if not Path(file).is_file():
        raise ValueError("is no file")  # a pipe would wait for ever
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16 or 32 bits, or floats: no file says which is white
            grey = np.asarray(image, np.float64)
            if not (grey.min() >= 0 and grey.max() <= 65535):
                raise ValueError(f"greys from {grey.min():g} to {grey.max():g}")
            whites = 1.1, 255, 1023, 4095, 16383, 65535  # resampled floats pass 1 a little
            white = math.floor(min(white for white in whites if grey.max() <= white))
            image = Image.fromarray((grey * (255 / white) + 0.5).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def square(image, side):
    """The middle of a PIL image, resized -> uint8 (3, side, side)."""
    return T.pil_to_tensor(ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR))


class Folder(torchvision.datasets.ImageFolder):
    """One folder a class; hidden folders are none. left_out: the number of files that are no images
    of a class."""

    def __init__(self, root):
        def refuse(error):
            raise error
        found = 0
        for path, _, files in os.walk(Path(root).resolve(), onerror=refuse, followlinks=True):
            found += len(files)
            if Path(path).is_symlink() and Path(path).resolve() in Path(path).parents:
                raise ValueError(f"{path} links to a folder that it is in")
        super().__init__(root, loader=read_image,  # macOS packs ._x.png beside each x.png
                         is_valid_file=lambda file: not Path(file).name.startswith(".")
                         and torchvision.datasets.folder.is_image_file(file))
        self.left_out = found - len(self.samples)

    def find_classes(self, directory):
        names, _ = super().find_classes(directory)
        names = [name for name in names if not name.startswith(".")]
        parts = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}
        if len(names) < 2 or len({name.lower() for name in names} & parts) > 1:
            raise ValueError(f"need two or more folders, one a class, and not: {' '.join(names)}")
        return names, {name: k for k, name in enumerate(names)}


def open_folder(root):
    """A folder of images, or one line that says what is wrong with it."""
    with blaming(f"--root {root}"):
        return Folder(root)


def open_datasets(args):
    """--data -> two torchvision datasets, to train and to test on, downloaded if they must be."""
    if args.data == "folder":
        test = "test" if Path(args.root, "test").is_dir() else "val"
        if not (Path(args.root, "train").is_dir() and Path(args.root, test).is_dir()):
            raise InputError(f"--root {args.root}: needs folders train/ and test/ (or val/), in "
                             "each a folder for a class")
        sets = open_folder(f"{args.root}/train"), open_folder(f"{args.root}/{test}")
        if sets[0].classes != sets[1].classes:
            raise InputError(f"--root {args.root}: the classes of train/ and {test}/ differ")
        return sets
    name, test = DATASETS[args.data]
    make = functools.partial(getattr(torchvision.datasets, name), args.root)
    with blaming(f"--data {args.data}: is not in --root {args.root} and cannot be downloaded; put "
                 "it there, or use --data folder"):
        try:
            return make(), make(**test)
        except RuntimeError:
            return make(download=True), make(**test, download=True)


def labels_of(dataset):
    """All labels (n,) of a torchvision dataset, without reading its images."""
    name = next(name for name in ("targets", "labels", "_labels") if hasattr(dataset, name))
    return torch.as_tensor(getattr(dataset, name)).long()


def read(dataset, k):
    """Image k of a torchvision dataset, in RGB."""
    file = dataset.samples[k][0] if isinstance(dataset, Folder) else f"image {k}"
    with blaming(f"--root: cannot read {file}"):
        return dataset[k][0].convert("RGB")


def pixel_key(image):
    """A number that depends on the pixels alone, not on the name or format of a file."""
    return zlib.crc32(image.tobytes(), zlib.crc32(repr(image.size).encode()))


def order_by_pixels(dataset):
    """A permutation (n,) of a dataset's images that all copies of the dataset share, whatever the
    files are called and in which order they come."""
    with ThreadPoolExecutor() as pool:
        keys = list(pool.map(lambda k: pixel_key(read(dataset, k)), range(len(dataset))))
    return torch.tensor(keys).argsort()


def balanced_subset(labels, order, per_class=None, holdout=0.0):
    """A fixed choice of per_class images of each class -> indices to train on, indices held out.

    labels (n,); order (n,): a permutation, the first images of a class in it are chosen. holdout:
    the share of the chosen images of a class that is kept for choosing settings.
    """
    chosen, held = [], []
    for label in labels.unique():
        members = order[labels[order] == label][:per_class]
        if per_class and len(members) < per_class:
            raise InputError(f"--train-per-class {per_class}: class {label} has {len(members)}")
        cut = min(round(holdout * len(members)), len(members) - 1)
        held.append(members[:cut])
        chosen.append(members[cut:])
    return torch.cat(chosen), torch.cat(held)


def folder_data(dataset, chosen, args):
    """Chosen images of a torchvision dataset (None: all) -> Data, with a fingerprint.

    If they are small squares of one size (sixteen are looked at) they stay as they are. Else they
    are resized and cropped to 8/7 of img_size (256 for 224). Threads read them. The fingerprint is
    of all labels and pixels, in whatever order; above 6 GiB of the pixels of sixteen at most.
    """
    chosen = torch.arange(len(dataset)) if chosen is None else chosen
    pool, keys = ThreadPoolExecutor(), torch.zeros(len(chosen), dtype=torch.long)

    def read_square(n):
        image = read(dataset, int(chosen[n]))
        keys[n] = pixel_key(image)
        return square(image, side)

    def draw(i):
        return torch.stack(list(pool.map(read_square, i.tolist()))).to(args.device)

    sixteen = range(0, len(chosen), -(-len(chosen) // 16))
    sides = {n for k in sixteen for n in read(dataset, int(chosen[k])).size}
    side = args.img_size * 8 // 7
    if len(sides) == 1:
        side = min(side, *sides)
    data = Data(labels_of(dataset)[chosen], draw, args)
    if data.images is None:  # memory cannot keep them now; if they are few, it may when resumed
        few = len(chosen) * 3 * side ** 2 <= MOST_MEMORY
        list(pool.map(read_square, range(len(chosen)) if few else sixteen))
    pairs = (data.labels.cpu() * 2 ** 32 + keys).sort().values
    data.fingerprint = zlib.crc32(pairs.numpy().tobytes())
    return data


def downstream_data(args):
    """Training and test images of --data, with its subset and split, and the number of classes."""
    for lead in (True, False):  # the lead downloads first
        if lead == args.lead:
            train, test = open_datasets(args)
        if args.world > 1:
            torch.distributed.barrier()
    labels = labels_of(train)
    some = args.train_per_class or args.holdout
    order = order_by_pixels(train) if some else torch.arange(len(labels))
    chosen, held = balanced_subset(labels, order, args.train_per_class, args.holdout)
    if args.holdout and not len(held):
        raise InputError(f"--holdout {args.holdout}: leaves no images to test on")
    if args.batch_size > len(chosen):
        raise InputError(f"--batch-size {args.batch_size}: there are only {len(chosen)} images to "
                         "train on; give a smaller one")
    tests = folder_data(train, held, args) if args.holdout else folder_data(test, None, args)
    data = folder_data(train, chosen, args)
    note_images(args, train, data, tests)  # section D
    return data, tests, int(labels.max()) + 1


# ==== D · Runs: errors of one line, folder, log, checkpoint, resume, ranks (for every command) ====
#
# What others wrote (checkpoints, images, folders, downloads) passes one boundary, `blaming`: all
# that goes wrong inside it becomes one line that names the flag to look at.

class InputError(Exception):
    """A mistake in the input. main() prints its one line and exits with status 2."""


@contextlib.contextmanager
def blaming(what):
    """Whatever goes wrong inside becomes an InputError of one line: what, and the reason."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or memory_is_full(error):
            raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}, "
        raise InputError(f"{what}: {kind}{' '.join(str(error).split())[:200]}") from error


def memory_is_full(error):
    """Whether an exception says so, of a GPU or a CPU."""
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return full or "allocate memory" in str(error)  # torch, of a CPU's memory


def say(text, end="\n", file=None):
    """Print. A reader that is gone (`| head`, Ctrl-C in `| tee`) must not end a run."""
    file = file or sys.stdout
    try:
        print(text, end=end, file=file, flush=True)
    except UnicodeEncodeError:  # a name that the terminal cannot show
        print(ascii(text), end=end, file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def replace_file(path, data):
    """Write a file beside it, flush to disk, rename: at any moment there is one whole file."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a full disk
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


def write_json(path, content):
    """Plain values and tensors, these as lists, into a file that is whole at any moment."""
    replace_file(path, (json.dumps(content, default=torch.Tensor.tolist) + "\n").encode())


def load_file(path, flag):
    """What torch.save wrote into a file; code in it is never run. Else an InputError says what it
    is."""
    with blaming(f"{flag} {path}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error says it in one line
        if not Path(path).is_file():
            raise ValueError("there is no such file")
        with open(path, "rb") as file:
            start = file.read(100)
        if not start:
            raise ValueError("the file is empty")
        if start.startswith(b"version https://git-lfs"):
            raise ValueError("this is a pointer of Git LFS; `git lfs pull` fetches the file")
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            checksums = any(part.CRC for part in archive.infolist())  # torch can leave them out
            if checksums and archive.testzip():
                raise ValueError("a checksum is wrong")  # torch.load compares none
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # in the authors' files
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            names = re.findall(r"GLOBAL ([\w.]+)", str(error))
            raise ValueError(f"has a Python object ({names[0]}), which is not loaded, as that can "
                             "run code; save the state dict alone" if names
                             else "is no file that torch.save wrote, or is spoilt") from None


def load_weights(model, path):
    """Copy a checkpoint into a ViT, all but the head; position embeddings are interpolated. Files
    of ours, the authors, timm and Lightning fit, of compiled and of parallel networks too."""
    own, state = model.state_dict(), load_file(path, "--ckpt")
    with blaming(f"--ckpt {path}"):
        for key in ("model", "state_dict", "model_state_dict"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        if not isinstance(state, dict):
            raise ValueError(f"holds no weights by their names, but one {type(state).__name__}")
        state = {re.sub(r"^((module|_orig_mod|model)\.)+", "", str(k)): t for k, t in state.items()}
        if "pos_embed" not in state:
            raise ValueError(f"holds no Vision Transformer; its keys: {', '.join(state)}")
    with blaming(f"--ckpt {path}: does not fit --model and --patch-size"):
        pos = state["pos_embed"].float()
        new, old = (math.isqrt(p.shape[1] - 1) for p in (own["pos_embed"], pos))
        grid = pos[:, 1:].view(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, old, old)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
        state["pos_embed"] = torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], 1)
        state |= {name: own[name] for name in ("head.weight", "head.bias")}
        bad = [name for name, t in state.items() if not (torch.is_tensor(t) and t.isfinite().all()
                                                         and t.is_floating_point())]
        if bad:
            raise ValueError(f"not finite numbers: {', '.join(bad)}")
        model.load_state_dict(state)


@blaming("WORLD_SIZE: start it by torchrun")
def join_ranks(args):
    """Read torchrun's environment. With several ranks, meet the others (nccl, or gloo)."""
    args.rank, args.world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    args.lead = args.rank == 0  # the lead writes and prints
    if not 0 <= args.rank < args.world:
        raise ValueError(f"RANK is {args.rank} of {args.world}")
    if args.world == 1:
        return
    if args.command == "render" or args.batch_size % args.world:
        raise InputError("--batch-size: a multiple of the processes, of pretrain or finetune")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    torch.distributed.init_process_group("gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl")


def over_ranks(x, args):
    """The sum of x over all ranks."""
    if args.world > 1:
        torch.distributed.all_reduce(x)
    return x


def accelerate(model, args):
    """The network that is trained: DistributedDataParallel with several ranks, and compiled on a
    GPU if that works on one batch."""
    network = nn.parallel.DistributedDataParallel(model) if args.world > 1 else model
    if args.device.startswith("cuda"):
        compiled = torch.compile(network)
        shape = args.batch_size // args.world, 3, args.img_size, args.img_size
        try:
            predict(compiled, torch.zeros(shape, device=args.device), args).sum().backward()
            network = compiled
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no Triton, no C compiler
            say(f"onepfrac: not compiled: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        model.zero_grad()
        if isinstance(model, Probe):
            model.normalise.reset_running_stats()  # of the zeros
    return network


@contextlib.contextmanager
def claimed(folder):
    """Make a folder, and lock it until the end, or until this process ends in whatever way."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    claim = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {folder}: another process is at work in it") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(claim)


@contextlib.contextmanager
def open_run(args):
    """The folder of a run, for this process and its ranks alone. A new run writes its settings to
    args.json: they are all that `resume` needs besides last.pt. No run is overwritten."""
    out = Path(args.out)
    with claimed(out) if args.lead else contextlib.nullcontext():
        if args.lead and not args.resume:
            if any((out / name).exists() for name in ("last.pt", "curve.png")):
                raise InputError(f"--out {out}: holds a run; give another --out, or `resume {out}`")
            gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
            settings = {k: v for k, v in vars(args).items() if k not in ("resume", "rank", "lead")}
            write_json(out / "args.json", settings | dict(
                processor=gpu or torch.backends.cpu.get_cpu_capability(), commit=git_commit(),
                torch=torch.__version__, threads=torch.get_num_threads()))
        yield


def note_images(args, dataset, *sets):
    """Print and record which images a run trains and tests on. A resumed run must find the same."""
    counts = " + ".join(f"{len(data):,}" for data in sets)
    fingerprint = zlib.crc32(repr([data.fingerprint for data in sets]).encode())
    text = f"{len(dataset.classes)} classes, {counts} images, fingerprint {fingerprint:08x}"
    if not args.lead:
        return
    left_out = getattr(dataset, "left_out", 0)
    say(text + f" ({left_out} files left out: no images, or of no class)" * (left_out > 0))
    with blaming(f"resume {args.out}: args.json"):
        file = Path(args.out) / "args.json"
        saved = json.loads(file.read_text())
        if args.resume and saved["images"] != text:
            raise InputError(f"resume {args.out}: these are other images. Then: {saved['images']}. "
                             f"Now: {text}")
        write_json(file, saved | dict(images=text, classes=list(dataset.classes)))


MOST_MEMORY = 6 * 2 ** 30  # bytes of images that are kept


def memory_for_images(device):
    """How many bytes of images may be kept: half of what is free, MOST_MEMORY at most."""
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = 2 ** 34  # where it is not told
        with contextlib.suppress(OSError, ValueError):
            [available] = re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())
            free = 1024 * int(available) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return min(MOST_MEMORY, free // 2)


def git_commit():
    """The commit of this file, or None."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, no repository
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()


class Run:
    """A training run: what it prints, its log.jsonl, its last.pt, and a stop by a signal."""

    def __init__(self, args, model, optimizer, steps):
        self.args, self.model, self.optimizer, self.steps = args, model, optimizer, steps
        self.out, self.live = Path(args.out), sys.stdout is not None and sys.stdout.isatty()
        self.signal, self.handlers = None, {}
        self.step, self.seconds, self.log = 0, 0.0, []
        self.sums = torch.zeros(3, device=args.device)  # loss, right, steps since the last line
        if args.resume:
            self.load(self.out / "last.pt")
        if args.lead:
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            small = args.recipe == "nano" and args.device != "cpu"
            say(f"recipe {args.recipe}: {args.model} ({millions:.1f}M parameters), {args.device} "
                f"x{args.world}, {args.precision}, {steps} steps of {args.batch_size}"
                + f", from step {self.step}" * args.resume
                + small * "; for a GPU there is --recipe small")
        self.tick, self.ticked = time.perf_counter(), self.step
        self.write_log()

    def load(self, last):
        """Take over a checkpoint. All of it is consumed here, inside one boundary."""
        saved = load_file(last, "resume")
        with blaming(f"resume: {last} is no run of this version; --ckpt starts from its weights"):
            if not all(t.isfinite().all() for t in saved["model"].values()):
                raise ValueError("a weight is not finite")
            place = ("out", "root", "device", "resume", "rank", "lead")
            other = [name for name, value in vars(self.args).items()
                     if name not in place and value != saved["args"].get(name)]
            if other or not 0 <= saved["step"] <= self.steps:
                raise ValueError(f"its {', '.join(other) or 'step'} is not that of args.json")
            self.step, self.seconds = int(saved["step"]), float(saved["seconds"])
            self.log = [dict(r, step=int(r["step"]), images=int(r["images"])) for r in saved["log"]]
            json.dumps(self.log)  # plain values, or an error
            self.sums.copy_(saved["sums"])
            self.model.load_state_dict(saved["model"])
            state, optimizer = saved["optimizer"]["state"], self.optimizer
            optimizer.load_state_dict(optimizer.state_dict() | dict(state=state))
            for p, moments in optimizer.state.items():
                for moment in moments.values():
                    if moment.shape not in (p.shape, ()) or not moment.isfinite().all():
                        raise ValueError("the optimizer state is of other weights")

    def __enter__(self):
        """A signal is noted for the end of the step. A second one acts at once. (With several ranks
        signals end the processes, and the last checkpoint counts.)"""
        def note(number, frame):
            self.signal = number
            signal.signal(number, self.handlers[number])

        for name in ("SIGINT", "SIGTERM", "SIGHUP") if self.args.world == 1 else ():
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self.handlers[number] = signal.signal(number, note) or signal.SIG_DFL
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.live and self.args.lead:
            say("")
        if kind is InputError:  # an image cannot be read
            self.save()
        if self.args.lead and kind is None:
            self.save_curve()

    def due(self, every):
        """Is it time for what happens at every so many steps, and at the end?"""
        return self.step % every == 0 or self.step == self.steps

    def count(self, loss, logits, target):
        """A step is done. Nothing here waits for a GPU."""
        right = (logits.argmax(1) == target.argmax(1)).float().mean()
        self.sums += torch.stack([loss, right, torch.ones_like(loss)])
        self.step += 1

    def report(self, text, **numbers):
        """Add a line to the log and print it; on a terminal a training line updates in place."""
        now, images = time.perf_counter(), self.step * self.args.batch_size
        self.seconds, self.tick, self.ticked = self.seconds + now - self.tick, now, self.step
        self.log.append(dict(step=self.step, images=images, seconds=round(self.seconds, 1),
                             **numbers))
        self.write_log()
        if self.args.lead:
            text = f"step {self.step}/{self.steps}  {text}"
            width = shutil.get_terminal_size().columns - 1
            say(f"\r{text[:width]:<{width}}" if self.live else text,
                end="" if self.live and "loss" in numbers else "\n")

    def write_log(self):
        if self.args.lead:
            (self.out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in self.log))

    def log_training(self, rate):
        """Mean loss and accuracy of the whole batch, and speed, since the last line."""
        loss, right, steps = over_ranks(self.sums.clone(), self.args).tolist()
        if not math.isfinite(loss):
            self.refuse()
        self.sums.zero_()
        loss, top1, batch = loss / steps, 100 * right / steps, self.args.batch_size
        speed = (self.step - self.ticked) * batch / (time.perf_counter() - self.tick)
        left = int((self.steps - self.step) * batch / speed)
        self.report(f"loss {loss:.3f}  top-1 {top1:.1f}%  lr {rate:.2e}  {speed:.0f} images/s  "
                    f"{left // 60}:{left % 60:02d} left", loss=loss, top1=top1, lr=rate,
                    images_per_s=round(speed, 1))

    def misses_test(self, every):
        """Did the run end before the test of this step, as an image could not be read?"""
        tested = [record["step"] for record in self.log if "test_top1" in record]
        return self.step > 0 and self.due(every) and self.step not in tested

    def log_test(self, top1):
        self.report(f"test top-1 {top1:.2f}%", test_top1=top1)

    def refuse(self):
        raise InputError(f"--lr {self.args.lr}: the loss or a weight at step {self.step} is not "
                         "finite, nothing is saved; lower --lr or --weight-decay")

    def save(self):
        """last.pt, if all weights are finite."""
        if not (self.sums.sum() + sum(p.sum() for p in self.model.parameters())).isfinite():
            self.refuse()
        if self.args.lead:
            file = io.BytesIO()
            torch.save(dict(
                args=vars(self.args), step=self.step, log=self.log, sums=self.sums.cpu(),
                seconds=self.seconds + time.perf_counter() - self.tick,
                model=self.model.state_dict(), optimizer=self.optimizer.state_dict()), file)
            replace_file(self.out / "last.pt", file.getbuffer())

    def stop(self):
        say(f"onepfrac: stopped after step {self.step} of {self.steps}; "
            f"`python onepfrac.py resume {self.out}` continues", file=sys.stderr)
        raise SystemExit(128 + self.signal)  # as shells expect

    def save_samples(self, x, augment):
        """samples.png: what the network sees, the first images of a batch (B, 3, S, S)."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (augment.mean, augment.std))
        if self.args.lead:
            x = (x[:64].float().cpu() * std + mean).clamp(0, 1)
            torchvision.utils.save_image(x, self.out / "samples.png")

    def save_curve(self):
        """curve.png: the loss, and test accuracy if any, over the images seen."""
        names = ["loss"] + ["test_top1"] * any("test_top1" in r for r in self.log)
        figure = Figure(figsize=(6, 3 * len(names)), layout="constrained")
        for axis, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names):
            records = [r for r in self.log if name in r]
            axis.plot([r["images"] for r in records], [r[name] for r in records])
            axis.set(xlabel="images seen", ylabel=name)
        figure.savefig(self.out / "curve.png", dpi=120)


# ==== E · Muon, linear probe, render ==============================================================

class Muon(torch.optim.AdamW):
    """Muon for the group of matrices with a "muon_dtype", to compute in, AdamW for the others. Both
    share rate and schedule: an update of Muon is scaled to the usual size of one of AdamW.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) takes the momentum of a matrix and
    moves all its singular values near 1. So an update changes every direction of a matrix alike,
    the rare ones too. Scale, and decay apart from it, are those of Liu et al. (arXiv 2502.16982).
    torch.optim.Muon does the same, but in bfloat16 only, which many CPUs are slow at.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"] if "muon_dtype" in group else ():
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for matrices in shapes.values():
                self.move(matrices, **group)
        super().step()  # passes over parameters without a gradient

    def move(self, matrices, lr, weight_decay, muon_dtype, momentum=0.95, **_):
        """One step of n matrices of one shape, all at once, since many small operations are slow.
        (torch._foreach_x_ does x_ to each tensor of a list.)"""
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:  # AdamW looks for "step" in what it loads
                self.state[p] = dict(step=torch.tensor(0.0), momentum_buffer=torch.zeros_like(p))
        buffers = [self.state[p]["momentum_buffer"] for p in matrices]
        grads = [p.grad for p in matrices]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum)  # Nesterov
        updates = orthogonalise(torch.stack(updates).to(muon_dtype)).to(matrices[0].dtype)
        size = 0.2 * max(matrices[0].shape) ** 0.5  # the root mean square of an update is 0.2
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_sub_(matrices, updates.unbind(), alpha=lr * size)
        for p in matrices:
            p.grad = None


def orthogonalise(x, steps=5):
    """Matrices (n, rows, columns) with their singular values moved to about 0.7 to 1.2, by Newton
    and Schulz: x -> a x + b (x x^T) x + c (x x^T)^2 x, with Jordan's a, b, c."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):  # baddbmm(z, x, y) is beta z + alpha x y: 0.8 of the time on a CPU
        gram = wide @ wide.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.baddbmm(wide, gram, wide, beta=3.4445)
    return wide if x.shape[1] <= x.shape[2] else wide.mT


class Probe(nn.Module):
    """A linear classifier on the first k blocks of a ViT, frozen: images -> logits. It sees the
    mean of the patch tokens, each feature normalised by its batch (as in MAE's probe)."""

    def __init__(self, model, k, classes):
        super().__init__()
        if k > len(model.blocks):
            raise InputError(f"--probe {k}: the network has {len(model.blocks)} blocks")
        self.frozen, self.k, dim = model.requires_grad_(False), k, model.pos_embed.shape[2]
        for block in model.blocks:
            block.drop_path = 0
        self.normalise = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        with torch.no_grad():
            x = self.frozen.blocks[:self.k](self.frozen.embed(x))[:, 1:].mean(1)  # (B, D)
        return self.head(self.normalise(x))


def render(args):
    """Write the images of --source to OUT/<class>/<number>.png, as ImageFolder reads them."""
    out = Path(args.out).resolve()
    with claimed(out):
        if Path(f"{out}.json").exists() or any(out.iterdir()):
            raise InputError(f"--out {out}: must be empty, without {out}.json")
        data = source_data(args)
        for i in torch.arange(len(data)).split(1000):
            for number, image, label in zip(i.tolist(), *(t.cpu() for t in data[i])):
                folder = out / f"{label:05d}"  # alphabetical is numerical
                folder.mkdir(exist_ok=True)
                T.to_pil_image(image).save(folder / f"{number}.png")
        write_json(f"{out}.json", data.omega)
    say(f"{len(data)} images in {out}, what they were drawn from in {out}.json")


# ==== F · Settings: recipes, flags, main (to look up a flag or its default) =======================
#
# A flag's own default is the paper's in pre-training. FINETUNE has what the paper changes to
# fine-tune, RECIPES what a recipe changes: in every command, in pretrain, in finetune. A flag on
# the command line comes last.

FINETUNE = dict(batch_size=768, optimizer="sgd", lr=0.015, weight_decay=1e-4, warmup=0.01)
RECIPES = {
    "nano": (  # two CPU cores, minutes
        dict(L=64, canvas=128, points=20_000, texture="fill", model="vit_nano", img_size=32,
             patch_size=8, drop_path=0.0, optimizer="muon", lr=2e-3, weight_decay=0.05,
             clip_grad=1.0, randaug=False, erase=False, mixup=False),
        dict(steps=4700, batch_size=128, warmup=0.02, min_crop=0.1, flip=False, smoothing=0.0),
        dict(epochs=8, batch_size=64, warmup=0.05, min_crop=0.7, jitter=False, cutmix=False,
             eval_epochs=2)),
    "small": (  # one GPU, minutes
        dict(canvas=128, texture="fill", img_size=32, patch_size=4, batch_size=512,
             optimizer="muon", lr=2e-3, weight_decay=0.05, warmup=0.05, clip_grad=1.0),
        dict(steps=3200, drop_path=0.0, min_crop=0.2, flip=False, randaug=False, erase=False,
             mixup=False, smoothing=0.0),
        dict(epochs=100, min_crop=0.4)),
    "paper": ({}, {}, {}),
}


def number(kind, low, high=10 ** 9):
    """An argparse type: a number in [low, high]. (argparse's errors name the inner function.)"""
    def number(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from {low} to {high}")
    return number


def path(text):
    """An argparse type: a path, not an empty one (as from a variable that is not set)."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; leave the flag out, or give a path")
    return os.path.expanduser(text)  # shells leave the ~ of --out=~/runs


whole, real = functools.partial(number, int), functools.partial(number, float)


def general_flags(command):
    """Of every command but resume."""
    add = command.add_argument_group("general").add_argument
    add("--recipe", default="nano", choices=RECIPES, help="a set of defaults; small: for a GPU")
    add("--seed", default=0, type=whole(0, 2 ** 62), help="of all but --fractal-seed and subsets")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="where it runs")
    add("--out", default=f"runs/{command.prog.split()[-1]}", type=path, help="folder to write to")


def picture_flags(command):
    """Of pretrain and render."""
    add = command.add_argument_group("Tables 2, 3, 4: what is drawn").add_argument
    sources = [name for name in SOURCES if name != "folder" or "render" not in command.prog]
    add("--source", default="fractal", choices=sources, help="of the images")
    add("--categories", default=1, type=whole(1), help="1: one image, perturbed; more: many")
    add("--instances", default=1, type=whole(1, 1000), help="images of each of several categories")

    add = command.add_argument_group("Tables 5, 6, 7, 8: the LIEP distribution").add_argument
    add("--delta", default=0.1, type=real(0, 100), help="side of the cube that eps is drawn from")
    add("--sigma", default=3.5, type=real(1e-9), help="sigma-factor of the fractal")
    add("--L", default=1000, type=whole(2), help="perturbations, the classes")
    add("--noise", default="additive", choices=("additive", "multiplicative"),
        help="the paper's, or the authors'")

    add = command.add_argument_group("Tables 11, 12: with --source image").add_argument
    add("--image", type=path, help="a file; None: matplotlib's photograph")
    add("--edges", default="none", choices=("none", "canny"), help="canny: draw its edges instead")
    add("--warp", default="affine", choices=WARPS, help="what eps does to it")

    add = command.add_argument_group("the picture").add_argument
    add("--fractal-seed", default=32, type=whole(0, 2 ** 62), help="which fractal or other image")
    add("--num-maps", default=2, type=whole(2, 1000), help="N of Eq. 1")
    add("--canvas", default=512, type=whole(16, 4096), help="pixels a side, as drawn")
    add("--points", default=100_000, type=whole(1, 10 ** 8), help="dots of an image")
    add("--texture", default="random", choices=("random", "fresh", "fill", "point"),
        help="of the dots: random masks; fresh ones at each step (Table 13, \"w/ Aug.\"); whole "
             "3x3 squares; single pixels")


def training_flags(command):
    """Of pretrain and finetune."""
    switch = argparse.BooleanOptionalAction
    add = command.add_argument_group("the run").add_argument
    add("--save-every", default=1000, type=whole(1), help="steps between checkpoints")
    add("--log-every", default=50, type=whole(1), help="steps between lines of the log")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"),
        help="auto: bf16 where it is fast")

    add = command.add_argument_group("network").add_argument
    add("--model", default="vit_tiny", choices=MODELS, help="Vision Transformer")
    add("--img-size", default=224, type=whole(1, 4096), help="pixels a side, as the network sees")
    add("--patch-size", default=16, type=whole(1), help="pixels a side of a patch")
    add("--drop-path", default=0.1, type=real(0, 0.99), help="stochastic depth")

    add = command.add_argument_group("optimisation").add_argument
    add("--batch-size", default=256, type=whole(1, 10 ** 6), help="on all ranks together")
    add("--optimizer", default="adamw", choices=("adamw", "sgd", "muon"),
        help="sgd: Nesterov momentum 0.9; muon: for matrices in blocks, adamw for the rest")
    add("--lr", default=5e-4, type=real(1e-9), help="peak learning rate")
    add("--weight-decay", default=0.05, type=real(0), help="of weight matrices")
    add("--warmup", default=6.25e-5, type=real(0, 0.9), help="share of the steps")
    add("--clip-grad", default=0.0, type=real(0), help="norm; 0: not clipped")
    add("--smoothing", default=0.1, type=real(0, 1), help="of labels")

    add = command.add_argument_group("Table 9: augmentation").add_argument
    add("--crop", default=True, action=switch, help="random resized crops")
    add("--min-crop", default=0.08, type=real(1e-9, 1), help="least area of a crop")
    add("--aspect", default=True, action=switch, help="crops of aspect 3/4 to 4/3")
    add("--flip", default=True, action=switch, help="left-right; in pre-training up-down too")
    add("--randaug", default=True, action=switch, help="RandAugment")
    add("--jitter", default=True, action=switch, help="of colours; only without randaug")
    add("--erase", default=True, action=switch, help="random erasing")
    add("--mixup", default=True, action=switch, help="blend pairs of images")
    add("--cutmix", default=True, action=switch, help="paste a box of another image")


def pretrain_flags(command):
    """Of pretrain alone."""
    add = command.add_argument_group("pre-training").add_argument
    add("--steps", default=240_000, type=whole(1), help="length")
    add("--root", default="data", type=path, help="of --source folder: one folder a class")


def finetune_flags(command):
    """Of finetune alone."""
    add = command.add_argument_group("Tables 13, 14, Fig. 3: downstream").add_argument
    add("--ckpt", type=path, help="weights to start from; None: random")
    add("--data", default="cifar100", choices=("folder", *DATASETS), help="dataset")
    add("--root", default="data", type=path, help="where it is, or is downloaded to")
    add("--train-per-class", type=whole(1), help="a fixed balanced subset; None: all")
    add("--holdout", default=0.0, type=real(0, 0.9), help="share of training images to test on")
    add("--eval-epochs", default=5.0, type=real(1e-9), help="epochs between tests")
    add("--epochs", default=1000.0, type=real(1e-9), help="over the training images")
    add("--probe", type=whole(1), metavar="K", help="train a linear classifier on K frozen blocks")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        self.exit(2, f"onepfrac: {' '.join(message.removeprefix('argument ').split())}\n")


def make_parser(recipe):
    """All commands with their flags and the defaults of a recipe."""
    parser = Parser(prog="onepfrac.py", allow_abbrev=False, description="Pre-train a Vision "
                    "Transformer on perturbed copies of one fractal.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    both, pretraining, finetuning = RECIPES[recipe]

    def add_command(name, text, *flags, **defaults):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for add_flags in flags:
            add_flags(command)
        known = {action.dest for action in command._actions}
        command.set_defaults(**{k: v for k, v in defaults.items() if k in known})
        return command

    add_command("pretrain", pretrain.__doc__, general_flags, picture_flags, training_flags,
                pretrain_flags, **both | pretraining)
    add_command("finetune", finetune.__doc__, general_flags, finetune_flags, training_flags,
                **FINETUNE | both | finetuning)
    add_command("render", render.__doc__, general_flags, picture_flags, **both)
    resume = add_command("resume", "Go on with a run, from its last checkpoint, with its settings.")
    resume.add_argument("folder", type=path, help="the run's")
    resume.add_argument("--root", type=path, help="where the data are now, if they were moved")
    return parser


def refuse_idle_flags(args, words):
    """InputError if a flag among the words has no effect beside the others: an ablation that
    changes nothing would look like a finding."""
    rules = []  # flags, when they have no effect, and that in words
    if args.command != "finetune":
        used = SOURCES[args.source][1].split()
        of_sources = {name for _, names in SOURCES.values() for name in names.split()}
        rules += [(name, name not in used, f"with --source {args.source}") for name in of_sources]
        many = args.categories > 1
        rules += [("instances", not many, "without --categories above 1"),
                  ("delta L noise sigma num_maps", many, "with --categories above 1")]
    if args.command == "finetune" and args.probe:
        rules += [("drop_path", True, "with --probe"),
                  ("optimizer", args.optimizer == "muon", "(muon) with --probe")]
    if args.command != "render":
        rules += [("jitter", args.randaug, "with --randaug"),
                  ("min_crop aspect", not args.crop, "with --no-crop")]
    for word in words:
        flag = word.partition("=")[0]
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        for names, idle, where in rules:
            if idle and flag.startswith("--") and name in names.split():
                raise InputError(f"{flag}: has no effect {where}; leave it out")


def words_of_run(folder, root):
    """The command line that repeats the settings of the run in a folder."""
    with blaming(f"resume {folder}: has no settings of this version"):
        saved = json.loads((Path(folder) / "args.json").read_text()) | dict(out=folder)
        if root and saved["command"] == "pretrain" and saved["source"] != "folder":
            raise InputError("--root: has no effect on this run; leave it out")
        saved |= dict(root=root) if root else {}
        world, device = int(os.environ.get("WORLD_SIZE", 1)), saved["device"].partition(":")[0]
        if world != saved["world"]:
            raise InputError(f"resume {folder}: the run has {saved['world']} processes and not "
                             f"{world}: torchrun --nproc_per_node={saved['world']} starts them")
        if device == "cuda" and not torch.cuda.is_available():
            say("onepfrac: the run began on a GPU, here is none: it goes on on the CPU",
                file=sys.stderr)
            device = "cpu"
        saved |= dict(device=device)
        if saved["command"] not in ("pretrain", "finetune"):
            raise ValueError(f"its command is {saved['command']}")
        words = [saved["command"]]
        for name, usual in vars(parse_words(words)).items():
            flag, value = name.replace("_", "-"), saved[name]
            if isinstance(usual, bool) != isinstance(value, bool) or (
                    usual is not None and value is None):
                raise ValueError(f"{name} is {value}")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None and name != "command":
                words.append(f"--{flag}={value}")
    return words


def parse_words(words):
    """The recipe is read first: the defaults depend on it."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="nano")
    recipe = first.parse_known_args(words)[0].recipe
    args = make_parser(recipe if str(recipe) in RECIPES else "nano").parse_args(words)
    for name, value in vars(args).items():
        if value == []:  # argparse's reading of --seed=--
            raise InputError(f"--{name.replace('_', '-')}: '--' is no value; give one")
    return args


def parse(argv=None):
    """A command line -> settings, the rank of this process among them. `resume FOLDER` becomes the
    command that began the run."""
    words = sys.argv[1:] if argv is None else argv
    args, resume = parse_words(words), False
    if args.command == "resume":
        resume = os.path.lexists(f"{args.folder}/last.pt")  # else the run begins again
        args = parse_words(words_of_run(args.folder, args.root))
    else:
        refuse_idle_flags(args, words)
    args.resume = resume
    there = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    if args.device == "auto":
        args.device = there[0]
    if args.device not in there:
        raise InputError(f"--device {args.device}: there is none here; try --device auto")
    if getattr(args, "precision", None) == "auto":
        args.precision = "bf16" if fast_bf16(args.device) else "fp32"
    join_ranks(args)
    return args


def fast_bf16(device):
    """Whether the processor multiplies bfloat16 itself."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every torch
    return any(getattr(torch.cpu, name)() for name in checks if hasattr(torch.cpu, name))


def keep_memory():
    """Tell glibc to keep what is freed: page faults cost up to a third of the time on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX


def main(argv=None):
    """Run one command -> exit status."""
    keep_memory()
    warnings.filterwarnings("ignore", module="PIL")  # of a broken EXIF tag
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 90 million pixels
    args = None
    try:
        args = parse(argv)
        if args.command == "render":
            render(args)
        else:
            with open_run(args):
                pretrain(args) if args.command == "pretrain" else finetune(args)
        if args.world > 1:  # after an error others may wait
            torch.distributed.destroy_process_group()
        return 0
    except InputError as error:
        reason = str(error)
    except OSError as error:  # a full disk, no permission
        reason = f"--out or --root: {error}"
    except (RuntimeError, MemoryError) as error:
        if not memory_is_full(error):
            raise
        sizes = [f for f in ("batch_size", "img_size", "canvas", "points", "L") if hasattr(args, f)]
        reason = f"memory is full; lower --{', --'.join(sizes).replace('_', '-')}"
    except KeyboardInterrupt:  # before the run, or a second Ctrl-C
        return 130
    say(f"onepfrac: {' '.join(reason.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
