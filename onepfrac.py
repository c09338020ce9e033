"""onepfrac: pre-train a Vision Transformer on perturbed copies of one fractal.

A single-file reference of "Scaling Backwards: Minimal Synthetic Pre-training?" (Nakamura et al.,
ECCV 2024). One idea holds the file together:

    an image is render(theta), a class is a point theta + eps near it,
    and pre-training is telling those points apart.

    python onepfrac.py pretrain --delta 0.1 --sigma 3.5         # one fractal -> a ViT
    python onepfrac.py finetune --ckpt runs/pretrain/last.pt    # that ViT -> CIFAR-100
    python onepfrac.py finetune --out runs/scratch              # the same from scratch
    python onepfrac.py pretrain --source rcdb --out runs/rcdb   # contours, noise, a photograph ...
    python onepfrac.py table                                    # the paper's tables beside ours

Measured (README): eight epochs of CIFAR-100, 250 images a class, end at 29.9% from the fractal and
at 24.0% from scratch (means of three seeds), after about eight minutes on two CPU cores.

Read it from top to bottom: 1 iterated function systems, 2 the renderer, 3 the LIEP distribution
and the LPCE loss, 4 other image sources, 5 augmentation, 6 the ViT, 7 downstream data, 8 training,
9 commands, 10 flags.
Sections 1, 2, 5, 6, and `perturb` and `lpce_loss` of 3, need torch and the standard library and
nothing from one another, so each can be copied.
"""
import argparse
import contextlib
import ctypes
import functools
import io
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")   # on the CPU what an older one lacks
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

# Literal numbers of the three scales; any flag overrides its number. `augment` names the switches
# of Table 9 that are on; warm-up is a fraction of the steps; every other name is a flag. `paper`
# holds what the paper and the authors' code say; jitter acts there once RandAugment is off.
PROBE = dict(
    batch_size=256, optimizer="sgd", lr=0.3, weight_decay=0.0, warmup=0.0, clip_grad=0.0,
    augment="crop aspect flip", crop_scale=(0.4, 1.0), smoothing=0.0)
RECIPES = {
    "nano": dict(                                       # two CPU cores and minutes
        model="vit_nano", img_size=32, patch_size=4, drop_path=0.0,
        pretrain=dict(
            L=64, canvas=128, points=20_000, texture="fill", steps=7000, batch_size=64,
            optimizer="adamw", lr=1e-3, weight_decay=0.05, warmup=0.02, clip_grad=1.0,
            augment="crop aspect", crop_scale=(0.1, 1.0), smoothing=0.0),
        finetune=dict(
            epochs=8, batch_size=64,
            optimizer="sgd", lr=0.1, weight_decay=1e-4, warmup=0.05, clip_grad=1.0,
            augment="crop aspect flip", crop_scale=(0.4, 1.0), smoothing=0.0),
        probe=PROBE | dict(epochs=4)),
    "small": dict(                                      # one GPU and minutes
        model="vit_tiny", img_size=32, patch_size=4, drop_path=0.0,
        pretrain=dict(
            L=1000, canvas=128, points=100_000, texture="random", steps=20_000, batch_size=512,
            optimizer="adamw", lr=1e-3, weight_decay=0.05, warmup=0.05, clip_grad=1.0,
            augment="crop aspect cutmix", crop_scale=(0.2, 1.0), smoothing=0.0),
        finetune=dict(
            epochs=100, batch_size=256,
            optimizer="sgd", lr=0.05, weight_decay=1e-4, warmup=0.05, clip_grad=1.0,
            augment="randaug crop aspect erase mixup cutmix flip", crop_scale=(0.4, 1.0),
            smoothing=0.1),
        probe=PROBE | dict(epochs=30)),
    "paper": dict(
        model="vit_tiny", img_size=224, patch_size=16, drop_path=0.1,
        pretrain=dict(
            L=1000, canvas=512, points=100_000, texture="random", steps=240_000, batch_size=256,
            optimizer="adamw", lr=5e-4, weight_decay=0.05, warmup=6.25e-5, clip_grad=0.0,
            augment="randaug crop aspect erase mixup cutmix flip jitter", crop_scale=(0.08, 1.0),
            smoothing=0.1),
        finetune=dict(
            epochs=1000, batch_size=768,
            optimizer="sgd", lr=0.015, weight_decay=1e-4, warmup=0.01, clip_grad=0.0,
            augment="randaug crop aspect erase mixup cutmix flip jitter", crop_scale=(0.08, 1.0),
            smoothing=0.1),
        probe=PROBE | dict(epochs=36, crop_scale=(0.08, 1.0))),
}
SWITCHES = ("randaug", "crop", "aspect", "erase", "mixup", "cutmix", "flip", "jitter")    # Table 9


class InputError(Exception):
    """A mistake in the input. main() prints its one line and exits with status 2."""


class Stopped(Exception):
    """A signal ended a run whose state is saved. Arguments: the line to print, the signal."""


# ==================================================================================================
# 1 · IFS and sigma-factor (Eq. 1-2)
#
# An iterated function system Omega = {w_1 .. w_N; p_1 .. p_N} is a handful of affine maps
#     w_j(v) = A_j v + t_j,   stored as rows [a b e; c d f], so maps are (N, 2, 3).
# If the maps contract, there is exactly one shape that they leave unchanged: the fractal.
# ==================================================================================================

def sigma_factor(maps):
    """sum_j (s_j1 + 2 s_j2), singular values of the 2x2 parts: maps (..., N, 2, 3) -> (...).

    Small sigma: strong contractions and a sparse, intricate shape. Large: a diffuse cloud. At 3 N
    every singular value is 1, nothing contracts, and there is no attractor.
    Anderson & Farrell, Improving Fractal Pre-training (WACV 2022).
    """
    s = torch.linalg.svdvals(maps[..., :2])                         # (..., N, 2), larger one first
    return (s[..., 0] + 2 * s[..., 1]).sum(-1)


def sample_ifs(num_maps, sigma, generator=None):
    """Random affine maps whose sigma-factor is exactly sigma -> maps (N, 2, 3) float32 on the CPU.

    A_j = U diag(s1, s2) V with U, V random rotations or reflections, 1 >= s1 >= s2 >= 0, and
    translations U(-1, 1). Raises ValueError unless num_maps >= 2 and 0 < sigma < 3 num_maps.
    Sampling order of the singular values: Anderson & Farrell (WACV 2022), Algorithm 1.
    """
    if num_maps < 2 or not 0 < sigma < 3 * num_maps:
        raise ValueError(f"need num_maps >= 2 and 0 < sigma < 3 num_maps, "
                         f"got num_maps={num_maps}, sigma={sigma}")

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    left, s = float(sigma), torch.zeros(num_maps, 2, dtype=torch.float64)
    for j in range(num_maps):
        need = left - 3 * (num_maps - 1 - j)    # what the maps after this one cannot take
        s1 = uniform(max(0.0, need / 3), min(1.0, left)).item()
        s2 = uniform(max(0.0, (need - s1) / 2), min(s1, (left - s1) / 2)).item()
        s[j, 0], s[j, 1] = s1, s2               # for the last map both ends of s2 coincide
        left -= s1 + 2 * s2

    angle = uniform(-math.pi, math.pi, 2, num_maps)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], -1).view(2, num_maps, 2, 2)
    mirror = torch.diag_embed(uniform(-1, 1, 2, num_maps, 2).sign())
    u, v = rotation @ mirror
    linear = u @ torch.diag_embed(s) @ v
    return torch.cat([linear, uniform(-1, 1, num_maps, 2, 1)], -1).float()


# ==================================================================================================
# 2 · Renderer: the chaos game, a canvas, 3x3 stamps
#
# v_{t+1} = w_j(v_t) from v_0 = (0, 0), the map j drawn anew each step with p_j proportional to
# |det A_j| (the paper calls the drawn index sigma_t, which is not the sigma-factor).
# One orbit is a long chain of tiny steps, so here hundreds of short orbits of every image run side
# by side. All images share the sequence of maps. It is read from a table of random maps: at each
# step, orbit k uses table[start + k], with a new random start.
# An orbit must forget the origin before it is drawn. The fractals that fill a canvas are nearly
# rotations, and forget it after hundreds of steps. So the burn-in applies words: products of maps.
# ==================================================================================================

ORBIT = 150      # steps of each orbit that are drawn
DOUBLINGS = 7    # a word is a product of 2^7 = 128 random maps
BURN_IN = 3      # words after the first: an orbit is drawn after 512 steps
PLACES = 1024    # start is in 1..1024
GREY = 127       # colour of a stamp
# What is drawn at once: numbers of the orbits, and then points and pixels of the rasters. On a CPU
# a raster should fit its cache, and a step of the orbits be worth starting two threads.
IN_FLIGHT = {"cpu": (28_000_000, 3_000_000), "cuda": (70_000_000, 100_000_000)}


def determinant(maps):
    """Of the 2x2 parts: maps (..., 2, 3) -> (...)."""
    return maps[..., 0, 0] * maps[..., 1, 1] - maps[..., 0, 1] * maps[..., 1, 0]


def map_table(probs, points, generator=None):
    """A table j (..., M) of random maps, and starts, a list of the places from which it is read:
    for each doubling, each word of the burn-in, each step. M is the number of orbits plus PLACES.

    Stratified: map i fills a fraction probs[..., i] of the table, up to rounding.
    """
    M = -(-points // ORBIT) + PLACES
    draws = torch.rand(M, generator=generator, dtype=torch.float64)
    draws = (torch.randperm(M, generator=generator) + draws) / M
    starts = 1 + torch.randint(PLACES, (DOUBLINGS + BURN_IN + ORBIT,), generator=generator)
    ends = probs.cpu().double().clamp(min=1e-9).cumsum(-1)
    draws = draws.expand(*ends.shape[:-1], M).contiguous()
    return torch.searchsorted(ends / ends[..., -1:], draws, right=True), starts.tolist()


def chaos_game(maps, j, starts, out=None):
    """Orbits of B systems at once: maps (B, N, 2, 3) -> points (2, B, ORBIT, K).

    j (M,) or (B, M) and starts: of `map_table`. K = M - PLACES orbits. `out` is memory to write to.
    """
    B, M = len(maps), j.shape[-1]
    K = M - PLACES
    if out is None or out.shape != (2, B, ORBIT, K):
        out = maps.new_empty(2, B, ORBIT, K)
    index = j.to(maps.device).expand(3, 2, B, M)
    table = maps.permute(3, 2, 0, 1).gather(3, index)       # (3, 2, B, M): the columns of [A t]
    words = table[..., :max(K, 128)]
    for start in starts[:DOUBLINGS]:                        # word[k + start] comes after word[k]
        A_x, A_y, t = words.roll(-start, -1)
        words = (A_x * words[:, :1]).addcmul_(A_y, words[:, 1:])
        words[2] += t
    A_x, A_y, t = words
    v = t                                                   # the first word takes (0, 0) there
    for start in starts[DOUBLINGS:DOUBLINGS + BURN_IN]:     # each orbit goes on with another's word
        x, y = v.roll(start, -1)
        v = torch.addcmul(t, A_x, x).addcmul_(A_y, y)
    v = v[..., :K]
    for step, start in enumerate(starts[DOUBLINGS + BURN_IN:]):
        A_x, A_y, t = table[..., start:start + K]           # (2, B, K) each
        v = torch.addcmul(t, A_x, v[0], out=out[:, :, step]).addcmul_(A_y, v[1])
    return out


def bounding_box(points, expands, trim=True):
    """Corners low, high (2, B) of points (2, B, P), and whether any point may lie outside.

    A system with a map that expands (B,) may throw a few points far out: with trim its box follows
    the central 98% of the points where the full one is over twice as large.
    """
    low, high = full = points.amin(2), points.amax(2)               # (2, B), NaN if a point is
    if trim and expands.any():
        full_low, full_high, low, high = *(t[:, expands] for t in full), low.clone(), high.clone()
        sample = points[:, :, ::points.shape[2] // 2000 | 1][:, expands]
        sample = sample.nan_to_num(1e30, 1e30, -1e30)
        rank = sample.shape[2] // 100 + 1
        core_low, core_high = (sample.topk(rank, 2, top).values[..., -1] for top in (False, True))
        tame = full_high - full_low <= 2 * (core_high - core_low)   # false for NaN
        low[:, expands] = torch.where(tame, full_low, core_low)
        high[:, expands] = torch.where(tame, full_high, core_high)
    inside = (full[0] >= low) & (full[1] <= high) & (high - low).isfinite()
    return low, high, not inside.all()


def rasterize(points, size, low, high, clip):
    """Points (2, B, P) -> images (B, size, size) uint8, GREY where hit, y upwards.

    The box from low to high (2, B) is stretched to fill the canvas but for a margin of 6 pixels in
    512; clip says whether points may lie outside, which are not drawn. The points are overwritten.
    """
    margin = max(1, 6 * size // 512)
    scale = (size - 1 - 2 * margin) / (high - low).clamp(min=1e-6)  # (2, B)
    scale[1] *= -1                                                  # image rows grow downwards
    corner = torch.stack([low[0], high[1]])                         # the upper left one
    pixel = points.sub_(corner[..., None]).mul_(scale[..., None]).round_()
    inside = ((pixel >= 0) & (pixel < size - 2 * margin)).all(0) if clip else None
    x, y = pixel
    cell = x.add_(y, alpha=size).long()                             # (B, P), exact to 4096 x 4096
    if clip:
        cell.masked_fill_(~inside, size - 2 * margin)               # a pixel of the right margin
    hits = torch.zeros(points.shape[1], size ** 2, dtype=torch.uint8, device=points.device)
    picture = hits[:, margin * (size + 1):]                         # where pixel (0, 0) is
    picture.scatter_(1, cell, hits.new_full((1, 1), GREY).expand(cell.shape))
    picture[:, size - 2 * margin] = 0
    return hits.view(-1, size, size)


def dilate(images, out=None):
    """Each lit pixel grows to its 3x3 neighbourhood: images (B, S, S) uint8 -> the same."""
    rows = F.pad(images, (1, 1, 1, 1))
    rows = (rows[:, :-2] | rows[:, 1:-1]).bitwise_or_(rows[:, 2:])
    return torch.bitwise_or(rows[:, :, :-2] | rows[:, :, 1:-1], rows[:, :, 2:], out=out)


def stamp(images, texture, generator=None):
    """Give whole stamps (B, S, S) of `ifs_coverage` their texture, in place -> images.

    The authors stamp each point with one of the 511 non-empty 3x3 masks, later stamps overwriting
    earlier ones. A covered pixel shows the bit of the last stamp on it, set in 256 of 511 masks:
    so the picture is the covered area times independent coin flips, and a fresh texture for an
    image that is kept on the device costs one random mask. The generator is on its device.
    """
    if texture != "random":
        return images
    # Eight coins from each random byte: 1/2 for 256/511, and an eighth of the random numbers.
    bit = 2 ** torch.arange(8, dtype=torch.uint8, device=images.device)
    pixels = images[0].numel()
    few = max(1, 2 ** 20 // pixels)                                 # pieces that stay in the cache
    for group in images.split(few):     # as many draws for a short one: its images keep theirs
        draw = torch.empty(-(-few * pixels // 64), dtype=torch.int64, device=images.device)
        draw = draw.random_(-2 ** 63, None, generator=generator).view(torch.uint8)
        coin = (draw & bit[:, None]).ne_(0)
        group.mul_(coin.view(-1)[:group.numel()].view_as(group))
    return images


def ifs_coverage(maps, size, points, texture, probs=None, generator=None, trim=True):
    """Maps (L, N, 2, 3) -> what whole stamps cover (L, size, size), 0 or GREY, on maps.device.

    probs: the map probabilities of all systems (N,) or of each (L, N), by default in proportion to
    the mean |det A| of `maps`; pre-training passes the unperturbed system's. The generator, on the
    CPU, draws the table of maps and where each step reads it, for all images.
    """
    if probs is None:
        probs = determinant(maps).abs().mean(0)
    j, starts = map_table(probs, points, generator)
    orbits = None
    coverage = torch.empty(len(maps), size, size, dtype=torch.uint8, device=maps.device)
    numbers, dots = IN_FLIGHT.get(maps.device.type, IN_FLIGHT["cpu"])
    group = max(1, numbers // (2 * points + 6 * j.shape[-1]))
    few = max(1, dots // (points + size ** 2))
    for first in range(0, len(maps), group):
        members = maps[first:first + group]
        square, det = members[..., :2].square().sum((2, 3)), determinant(members)
        expands = ((square > 1 + det ** 2) | (square > 2)).any(1)   # a singular value above 1
        table = j if j.ndim == 1 else j[first:first + group]
        orbits = chaos_game(members, table, starts, orbits)
        for cloud, wide, out in zip(orbits.flatten(2).split(few, 1), expands.split(few),
                                    coverage[first:first + group].split(few)):
            hits = rasterize(cloud, size, *bounding_box(cloud, wide, trim))
            out.copy_(hits) if texture == "point" else dilate(hits, out=out)
    return coverage


def render_ifs(maps, size=512, points=100_000, texture="random", generator=None, probs=None):
    """Draw IFS attractors: maps (L, N, 2, 3) -> grey images (L, size, size) uint8 on maps.device.

    texture: "random" 3x3 masks (the paper), "fill" whole 3x3 stamps, "point" single pixels.
    generator: on the CPU; draws the map sequence and seeds the texture. Systems that expand on
    average run away within the 512 steps of the burn-in: like all systems without an attractor they
    give blank or nearly blank images, never NaN. Raises ValueError on bad arguments.
    """
    if maps.ndim != 4 or maps.shape[2:] != (2, 3) or not len(maps) or not 8 <= size <= 4096 \
            or points < 1 or not maps.isfinite().all() or (
                probs is not None and probs.shape not in (maps.shape[:2], maps.shape[1:2])):
        raise ValueError(f"need finite maps (L, N, 2, 3) with L >= 1, probs (N,) or (L, N), size 8 "
                         f"to 4096, points >= 1; got {tuple(maps.shape)}, {probs}, {size}, "
                         f"{points}")
    if texture not in ("random", "fill", "point"):
        raise ValueError(f"texture must be random, fill or point, got {texture!r}")
    coverage = ifs_coverage(maps, size, points, texture, probs, generator)
    seed = int(torch.randint(2 ** 24, (), generator=generator))     # alike in all torch's versions
    return stamp(coverage, texture, torch.Generator(maps.device).manual_seed(seed))


# ==================================================================================================
# 3 · LIEP distribution and LPCE loss (Eq. 6-9)
#
# With one image there is one class and nothing to learn (Eq. 6). So the label becomes the
# perturbation: p_Delta(x, y) is uniform over (render(theta + eps), eps) for eps in a cube of side
# Delta (Eq. 7), approximated by L fixed draws of eps, each of them a class.
# ==================================================================================================

def perturb(maps, delta, L, generator=None, noise="additive"):
    """L draws from the cube around one theta: maps (N, 2, 3) -> (L, N, 2, 3), Eq. 9; any shape.

    noise: "additive", the paper: eps ~ U(-delta/2, delta/2) added to all six numbers of each map;
    "multiplicative", the authors' code: each number times U(1 - delta, 1 + delta).
    The first k of L draws are the same for every L. The generator is on the CPU.
    """
    if noise not in ("additive", "multiplicative"):
        raise ValueError(f"noise must be additive or multiplicative, got {noise!r}")
    unit = torch.rand(L, *maps.shape, generator=generator).to(maps.device) - 0.5
    return maps + delta * unit if noise == "additive" else maps * (1 + 2 * delta * unit)


def lpce_loss(logits, target):
    """Locally perturbed cross-entropy, Eq. 8: -E log p(eps | x). logits (B, L).

    target: indices of the perturbations (B,), or soft labels (B, L) after mixup and cutmix.
    """
    return F.cross_entropy(logits, target)


def base_ifs(num_maps, sigma, seed, min_fill=0.2, tries=1000):
    """The single fractal Omega of a run -> maps (N, 2, 3), sigma within +-0.1 of the asked value.

    The authors drew theirs without a seed and never published it. Here `seed` names it; draws
    whose 3x3 stamps reach less than min_fill of a 512 canvas (sticks, dust) are passed over.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tries):
        target = sigma + 0.2 * (torch.rand((), generator=generator).item() - 0.5)
        if not 0 < target < 3 * num_maps:       # at 3 a map nothing contracts
            continue
        maps = sample_ifs(num_maps, target, generator)
        drawn = ifs_coverage(maps[None], 512, 100_000, "fill", None,
                             torch.Generator().manual_seed(seed))
        if (drawn > 0).float().mean() >= min_fill:
            return maps
    raise InputError(f"--sigma {sigma}: none of {tries} draws of {num_maps} maps fills "
                     f"{min_fill:.0%} of the canvas; raise --sigma or --num-maps")


def filled(images, background=0):
    """The share of pixels of each image (B, S, S) that are not background -> (B,) on the CPU."""
    return (images != background).flatten(1).float().mean(1).cpu()


def liep_maps(base, delta, L, noise, seed, render, min_fill):
    """L systems of the LIEP distribution -> maps (L, N, 2, 3).

    Candidates come in one fixed order; those whose picture, by render(maps), is filled less than
    min_fill are passed over, as the authors redraw them.
    """
    generator, kept, drawn, found = torch.Generator().manual_seed(seed), [], 0, 0
    while found < L:
        if drawn >= 20 * L + 1000:
            raise InputError(f"--delta {delta}: only {found} of {drawn} perturbed systems give an "
                             f"image that is filled {min_fill:.0%}; lower --delta, raise --points")
        candidates = perturb(base, delta, min(L - found, 250), generator, noise)
        kept.append(candidates[filled(render(candidates)) >= min_fill])
        drawn, found = drawn + len(candidates), found + len(kept[-1])
    return torch.cat(kept)


# ==================================================================================================
# 4 · Image sources: what a class is, and how it is drawn
#
# A source has a length, labels (n,) and batches(index_lists), which yields uint8 images and labels.
# Nearly all draw an image from theta. With one category theta + eps is a class of its own (LPCE, L
# of them); with several, theta is the class and its instances are variations:
#
#     FractalDB: C categories x M instances    OFDB: C x 1    1p-frac: 1 category, L perturbations
#
# Contours, noise and one warped photograph are other thetas with other ways to draw them.
# ==================================================================================================

def around(base, args):
    """The L thetas of a run around a base of any shape -> (L, *base.shape)."""
    generator = torch.Generator().manual_seed(seed_for(args.seed, "eps"))
    return perturb(base, args.delta, args.L, generator, args.noise)


class Drawn:
    """A source of n images that draw(i) makes on the device from indices i (B,): uint8 (B, S, S) or
    (B, 3, S, S). What fits into ON_DEVICE_BYTES is drawn once and kept, else again at every step.

    dots: the images are 0 or GREY and take a texture. theta: numbers to keep beside the run.
    """

    def __init__(self, labels, draw, device, dots=False, **theta):
        self.labels, self.draw, self.dots, self.theta = labels.to(device), draw, dots, theta
        first = draw(torch.arange(1))[0]
        self.stored = len(labels) * first.numel() <= ON_DEVICE_BYTES
        if self.stored:
            self.images = first.new_empty(len(labels), *first.shape)
            for i in torch.arange(len(labels)).split(1000):
                self.images[i[0]:i[-1] + 1] = draw(i)

    def __len__(self):
        return len(self.labels)

    def batches(self, index_lists):
        for i in index_lists:
            [at] = send(self.labels.device, i)
            yield self.images.index_select(0, at) if self.stored else self.draw(i), self.labels[at]


def fractaldb_maps(C, seed, min_fill=0.2):
    """C random categories of 2 to 7 maps -> maps (C, 7, 2, 3), probs (C, 7), 0 for unused maps.

    All six numbers U(-1, 1); kept where 100,000 points light min_fill of a 512 canvas over their
    whole bounding box, which systems that scatter do not. One fixed order of candidates.
    Kataoka et al., Pre-training without Natural Images (ACCV 2020).
    """
    generator, kept = torch.Generator().manual_seed(seed), []
    while len(kept) < C:
        maps = 2 * torch.rand(50, 7, 2, 3, generator=generator) - 1
        used = torch.arange(7) < torch.randint(2, 8, (50, 1), generator=generator)
        probs = determinant(maps).abs() * used
        fill = filled(ifs_coverage(maps, 512, 100_000, "point", probs,
                                   torch.Generator().manual_seed(seed), trim=False))
        maps *= (probs > 0)[:, :, None, None]                       # what is not used, not kept
        kept += [(m, p) for m, p, f in zip(maps, probs, fill) if f >= min_fill]
    maps, probs = zip(*kept[:C])
    return torch.stack(maps), torch.stack(probs)


def fractal_source(args, device):
    """1p-frac, or FractalDB and OFDB with several categories."""
    seed = seed_for(args.seed, "eps")

    def cover(maps, probs, where=device):
        return ifs_coverage(maps.to(where), args.canvas, args.points, args.texture, probs,
                            torch.Generator().manual_seed(seed))

    if args.categories == 1:
        base = base_ifs(args.num_maps, args.sigma, args.fractal_seed)
        probs = determinant(base).abs()         # of the unperturbed system, for all
        # Random masks light half of what whole stamps cover, and 5% of the picture must be lit.
        min_fill = 0.1 if args.texture == "random" else 0.05
        maps = liep_maps(base, args.delta, args.L, args.noise, seed,
                         lambda maps: cover(maps, probs, "cpu"), min_fill)     # as on any device
        return Drawn(torch.arange(args.L), lambda i: cover(maps[i], probs), device, dots=True,
                     sigma=sigma_factor(base).item(), base=base, eps=maps - base)

    maps, probs = fractaldb_maps(args.categories, args.fractal_seed)
    # An instance m: one of 25 weightings of a parameter in all maps, of 4 flips, and, where the
    # texture is random, a texture of its own, which pre-training stamps.
    weights = torch.ones(25, 6)
    for k in range(24):
        weights[k + 1, k // 4] = (0.2, 0.6, 1.4, 1.8)[k % 4]

    def draw(i):
        category, m = i // args.instances, i % args.instances
        images = cover(maps[category] * weights[m % 25].view(-1, 1, 2, 3), probs[category])
        for axis, flipped in ((1, m // 25 % 2 == 1), (2, m // 50 % 2 == 1)):
            images = torch.where(flipped.to(device)[:, None, None], images.flip(axis), images)
        return images

    labels = torch.arange(args.categories).repeat_interleave(args.instances)
    return Drawn(labels, draw, device, dots=True, maps=maps, probs=probs)


def cloud_source(args, device):
    """Table 4: a cloud of Gaussian or uniform noise, whose mean and covariance, or bounds, move.

    Nothing is published about their figures. Here: N(0, I) in a window of +-3, or U(-1, 1)^2 in
    one of +-1.5, the same random numbers for all images, in the fractals' stamps.
    """
    gaussian = args.source == "gaussian"
    base = torch.tensor([[0., 1, 0], [0, 0, 1]] if gaussian else [[-1., 1], [-1, 1]])
    theta, generator = around(base, args), torch.Generator().manual_seed(args.fractal_seed)
    unit = torch.randn if gaussian else torch.rand
    unit = unit(2, args.points, generator=generator).to(device)

    def draw(i):
        images = []
        for some in theta[i].split(max(1, 3_000_000 // args.points)):
            if gaussian:                        # z -> mean + C^(1/2) z
                covariance = (some[:, :, 1:] + some[:, :, 1:].mT) / 2
                value, vector = torch.linalg.eigh(covariance)
                root = vector * value.clamp(min=0).sqrt()[:, None] @ vector.mT
                points = some[:, :, 0, None].to(device) + root.to(device) @ unit
            else:
                low, high = some[:, :, None].to(device).unbind(3)               # (B, 2, 1) each
                points = low + (high - low) * unit
            points = points.transpose(0, 1)                                     # (2, B, P)
            edge = points.new_full((2, len(some)), 3 if gaussian else 1.5)
            hits = rasterize(points, args.canvas, -edge, edge, clip=True)
            images.append(hits if args.texture == "point" else dilate(hits))
        return torch.cat(images)

    return Drawn(torch.arange(args.L), draw, device, dots=True, base=base, eps=theta - base)


def perlin_noise(shape, random):
    """1-D Perlin noise at random positions, as `pnoise1` of the package `noise`: half of its slopes
    are -1, the others 1 to 8.
    """
    slope = np.where(random.random_sample((2, *shape)) < 0.5, -1, random.randint(1, 9, (2, *shape)))
    f = random.random_sample(shape)
    fade = f ** 3 * (f * (6 * f - 15) + 10)
    return 0.4 * (slope[0] * f * (1 - fade) + slope[1] * (f - 1) * fade)


def contour(kind, seed, category, instance):
    """One image of nested polygons -> offsets (P, V, 2) from a centre (2,), greys (P,).

    Pixels of a 512 canvas. From one of the P polygons to the next each vertex moves outwards by
    noise, and by two sine waves in a Visual Atom. Numbers of masora1030/CVPR2022-Pretrained-ViT-
    PyTorch (make_rcdb.py) and masora1030/CVPR2023-FDSL-on-VisualAtom (make_VisualAtom.sh).
    """
    shared = np.random.RandomState(seed_for(seed, kind, category))      # its stream never changes
    own = np.random.RandomState(seed_for(seed, kind, category, instance))
    rcdb, V, P = kind == "rcdb", 0, shared.randint(1, 201)
    while rcdb and not 3 <= V <= 200:
        V = int(shared.exponential(100))
    V = V or shared.randint(200, 1001)
    c, step = shared.uniform(0, 4), shared.uniform(0, 0.1)
    shape = own if rcdb else shared             # RCDB varies the ellipse within a category
    radius = shape.randint(0, 101) if rcdb else shape.randint(10, 61)
    radius = radius * shape.uniform(1, 2, 2)                            # (2,), x and y
    centre = own.uniform(56, 456, 2) if rcdb else own.uniform(0, 512, 2)

    angle = np.arange(V) * (2 * math.pi / V)
    grow = c + step - c * (2 if rcdb else 1) * perlin_noise((P, V, 2), own)
    if not rcdb:
        waves = shared.choice(21, (2, 1), replace=False)
        grow += 0.5 * np.sin(waves * angle).sum(0)[:, None]
    offsets = np.stack([np.cos(angle), np.sin(angle)], 1) * (radius + grow.cumsum(0))
    return offsets, centre, own.randint(0, 256, P)


def draw_contour(offsets, centre, greys, size, background, scale=1.0):
    """Closed lines, 1 pixel wide, later ones over earlier ones -> image (size, size) uint8.

    scale: a number, or one for each polygon (P, 1, 1), by which its radii are multiplied.
    """
    image = Image.new("L", (size, size), background)
    pen, corners = ImageDraw.Draw(image), (centre + offsets * scale) * (size / 512)
    for polygon, grey in zip(corners.astype(np.float32), greys.tolist()):
        pen.polygon(polygon, outline=grey)
    return torch.from_numpy(np.array(image))


def contour_source(args, device):
    """Table 3: RCDB's nested polygons on white, or Visual Atoms' waves on black.

    One category: its first draw that fills a fifth of the canvas, and eps scales the radii of each
    polygon by 1 + eps, the perturbation that the paper names without a formula. Drawn on the CPU,
    where Pillow is faster than a GPU would be.
    """
    kind, size, background = args.source, args.canvas, 255 * (args.source == "rcdb")

    if args.categories > 1:
        def draw_instances(i):
            return torch.stack([draw_contour(*contour(kind, args.fractal_seed, *divmod(
                k, args.instances)), size, background) for k in i.tolist()]).to(device)
        labels = torch.arange(args.categories).repeat_interleave(args.instances)
        return Drawn(labels, draw_instances, device)

    category = next(c for c in range(10 ** 9) if filled(draw_contour(
        *contour(kind, args.fractal_seed, c, 0), size, background)[None], background) >= 0.2)
    base = contour(kind, args.fractal_seed, category, 0)
    ones = torch.ones(len(base[0]), 1, 1)
    scale = around(ones, args)

    def draw_scaled(i):
        return torch.stack([draw_contour(*base, size, background, one)
                            for one in scale[i].numpy()]).to(device)

    return Drawn(torch.arange(args.L), draw_scaled, device, category=category,
                 eps=(scale - ones).flatten(1))


def canny(image, low=100, high=200):
    """Canny's edges: grey image (S, S) uint8 -> (S, S) uint8, 0 or 255.

    Gaussian smoothing (5x5, sigma 1.1), Sobel gradients with |g| = |gx| + |gy|, non-maximum
    suppression in four directions, then edges above `low` that touch one above `high` through
    other edges (hysteresis). But for the smoothing, pixel for pixel cv2.Canny.
    """
    from torchvision.transforms.functional import gaussian_blur
    x = F.pad(gaussian_blur(image[None], 5).float()[None], (1, 1, 1, 1), "replicate")
    sobel = x.new_tensor([[-1., 0, 1], [-2, 0, 2], [-1, 0, 1]])
    gx, gy = F.conv2d(x, torch.stack([sobel, sobel.T])[:, None])[0]
    strength = gx.abs() + gy.abs()
    around = F.pad(strength, (1, 1, 1, 1))

    def beside(dy, dx):                         # the strength of the neighbour there
        return around[1 + dy:around.shape[0] - 1 + dy, 1 + dx:around.shape[1] - 1 + dx]

    flat = gy.abs() < math.tan(math.pi / 8) * gx.abs()              # the gradient is horizontal
    steep = gy.abs() > math.tan(3 * math.pi / 8) * gx.abs()
    falling = gx * gy >= 0                      # towards the lower right, or the upper left
    thin = torch.where(
        flat, (strength > beside(0, -1)) & (strength >= beside(0, 1)), torch.where(
            steep, (strength > beside(-1, 0)) & (strength >= beside(1, 0)), torch.where(
                falling, (strength > beside(-1, -1)) & (strength > beside(1, 1)),
                (strength > beside(-1, 1)) & (strength > beside(1, -1)))))
    weak = thin & (strength > low)
    edge, grown = weak & (strength > high), None
    while grown is None or (grown != edge).any():
        edge = edge if grown is None else grown
        grown = dilate(edge[None].to(torch.uint8))[0].bool() & weak
    return 255 * edge.to(torch.uint8)


WARPS = {"affine": torch.eye(2, 3), "homography": torch.eye(3),     # the thetas that do nothing
         "elastic": torch.zeros(2, 8, 8), "polynomial": torch.eye(2, 6)}


def warp_grid(kind, theta, size):
    """Where each pixel of a warped image comes from: theta (B, *WARPS[kind].shape) -> (B, size,
    size, 2) for grid_sample, x and y in -1..1.

    affine: a x + b y + e; polynomial: of second degree; homography: a quotient of affine maps;
    elastic: shifts of an 8 x 8 lattice, interpolated by cubics.
    """
    at = (torch.arange(size, device=theta.device) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    if kind == "elastic":
        shift = F.interpolate(theta, (size, size), mode="bicubic", align_corners=True)
        return (torch.stack([x, y]) + shift).permute(0, 2, 3, 1)
    terms = torch.stack([x, y, torch.ones_like(x), x * x, x * y, y * y][:theta.shape[2]])
    grid = torch.einsum("bij,jhw->bhwi", theta, terms)
    return grid[..., :2] / grid[..., 2:].clamp(min=1e-3) if kind == "homography" else grid


def photograph(file, size, device):
    """The middle of an image file, by default of the one in matplotlib -> (3, size, size) uint8."""
    if file is None:
        from matplotlib import cbook
        file = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    try:
        return square(read_image(file), size).to(device)
    except Exception as error:
        raise InputError(f"--image {file}: cannot be read ({type(error).__name__})") from None


def image_source(args, device):
    """Tables 11, 12: one photograph, or its edges, under L small warps."""
    image = photograph(args.image, args.canvas, device)
    if args.edges == "canny":
        image = canny(to_grey(image[None].float())[0, 0].to(torch.uint8))[None]
    base = WARPS[args.warp]
    theta = around(base, args)

    def draw(i):
        grid = warp_grid(args.warp, theta[i].to(device), args.canvas)
        pixels = image.float().expand(len(i), -1, -1, -1)
        return F.grid_sample(pixels, grid, align_corners=False).add_(0.5).to(torch.uint8)

    return Drawn(torch.arange(args.L), lambda i: torch.cat([draw(some) for some in i.split(100)]),
                 device, base=base, eps=theta - base)


def folder_source(args, device):
    """Any folder of labelled images, one folder a class, through the same loop."""
    dataset = open_folder(args.root)
    return Images(dataset, torch.arange(len(dataset)), args.img_size, device, args.workers)


SOURCES = {"fractal": fractal_source, "rcdb": contour_source, "va": contour_source,
           "gaussian": cloud_source, "uniform": cloud_source, "image": image_source,
           "folder": folder_source}


# ==================================================================================================
# 5 · Augmentation: DeiT's, per sample, on a batch that is already on the device
#
# Which operation, how strong and where is drawn on the CPU: so the program never waits for the GPU,
# and an operation runs only on the images that drew it. The pixels stay on the device.
# A crop, with its flips, is two resamplings, of rows and then of columns. And RandAugment's fifteen
# operations are of three kinds: six are tables of 256 entries, four are blends with a degenerate
# image, five are 2x3 matrices. Inside, images are floats that hold 0..255.
# ==================================================================================================

def send(device, *tensors):
    """CPU tensors to the device. With CUDA the copies are queued and the CPU does not wait."""
    return [t.to(device, non_blocking=torch.device(device).type == "cuda") for t in tensors]


def resample_rows(x, start, length, size):
    """Antialiased cubic resampling of the rows [start, start + length) of each image:
    (B, C, H, W) -> (B, C, size, W).

    start, length (B,): whole pixels; with a negative length the rows are read backwards from start,
    which is then one past the last row, and so flipped. Keys' kernel, a = -0.5, widened when
    shrinking, cut off outside the box and normalised, as torchvision's resize(antialias=True).
    """
    B, C, H, W = x.shape
    start, length = start[:, None], length[:, None]
    scale = length / size                                           # rows in for each row out
    centre = start - 0.5 + (torch.arange(size, device=x.device) + 0.5) * scale  # (B, size)
    width = scale.abs().clamp(min=1)
    taps = min(H, math.ceil(4 * max(1, H / size)))                  # rows under the widest kernel
    first = (centre - 2 * width).ceil_().clamp_(0, H - taps)
    row = first[..., None] + torch.arange(taps, device=x.device)    # (B, size, taps)
    d = (row - centre[..., None]).div_(width[..., None]).abs_()
    # With u = max(2 - d, 0) and v = max(u - 1, 0) the kernel's two pieces are one polynomial.
    u = (2 - d).clamp_(min=0)
    v = (u - 1).clamp_(min=0)
    weight = u * u * (u - 1) + v * v * (2 - 4 * v)                  # twice the kernel
    middle = start + (length - 1) / 2
    weight *= (row - middle[..., None]).abs_() < length.abs()[..., None] / 2    # in the box
    weight /= weight.sum(-1, keepdim=True)
    # PyTorch has the weighted sum of some rows of a matrix as embedding_bag, made for word vectors.
    image = torch.arange(B * C, device=x.device).view(B, C, 1, 1)
    row, weight = row.long()[:, None] + H * image, weight[:, None].expand(B, C, size, taps)
    return F.embedding_bag(row.view(-1, taps), x.reshape(B * C * H, W), mode="sum",
                           per_sample_weights=weight.reshape(-1, taps)).view(B, C, size, W)


def random_boxes(B, size, scale, ratio, generator, tries=10):
    """torchvision's RandomResizedCrop.get_params, batched -> start, length (2, B): rows, columns.

    Area U(scale) of size x size, log-uniform aspect in `ratio`, whole pixels; of ten tries the
    first that fits, else the whole image.
    """
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator)

    area = uniform(*scale, B, tries) * size * size
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1]), B, tries).exp()
    length = torch.stack([area / aspect, area * aspect]).sqrt().round()         # (2, B, tries)
    fits = ((length >= 1) & (length <= size)).all(0)
    first = fits.int().argmax(1, keepdim=True)
    length = torch.where(fits, length, size).gather(2, first.expand(2, B, 1))[..., 0]
    return (uniform(0, 1, 2, B) * (size - length + 1)).floor(), length


TABLE_OPS = ("autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add")
BLEND_OPS = ("brightness", "color", "contrast", "sharpness")
AFFINE_OPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPS = TABLE_OPS + BLEND_OPS + AFFINE_OPS


def apply_tables(x, op, level):
    """Look each pixel up in its sample's table: x (B, C, H, W); op (B,) indexes TABLE_OPS, level
    (B,) in 0..1, both on the CPU.
    """
    B, C, H, W = x.shape
    op, level = send(x.device, op, level.view(B, 1, 1))
    pixel, i = x.flatten(2).long(), torch.arange(256., device=x.device)
    histogram = x.new_zeros(B, C, 256).scatter_add_(2, pixel, x.new_ones(()).expand(pixel.shape))
    low, high = (m(x, (2, 3)).unsqueeze(2) for m in (torch.amin, torch.amax))   # (B, C, 1)

    autocontrast = ((i - low) * 255 / (high - low).clamp(min=1)).clamp(0, 255).floor()
    autocontrast = torch.where(high > low, autocontrast, i)

    brightest = histogram.gather(2, high.long())
    step = ((H * W - brightest) / 255).floor()                      # Pillow's integer equalisation
    below = histogram.cumsum(2) - histogram
    equalize = ((step / 2).floor() + below) / step.clamp(min=1)
    equalize = torch.where(step > 0, equalize.floor().clamp(max=255), i)

    grain = 2. ** (4 + (level * 4).floor())                         # posterize to 4 .. 0 bits
    threshold, add = 256 - (level * 256).floor(), (level * 110).floor()
    tables = torch.stack(torch.broadcast_tensors(
        autocontrast, equalize, 255 - i, (i / grain).floor() * grain,
        torch.where(i < threshold, i, 255 - i),
        torch.where(i < 128, (i + add).clamp(max=255), i)), 1)      # (B, 6, C, 256)
    table = tables[torch.arange(B, device=x.device), op]            # (B, C, 256)
    return table.gather(2, pixel).view(B, C, H, W)


def to_grey(x):
    """ITU-R 601 luma as Pillow rounds it: (B, C, H, W) -> (B, 1, H, W); grey images pass."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, 1)
    return ((19595 * red + 38470 * green + 7471 * blue) / 65536 + 0.5).floor()


def blend(x, op, factor):
    """degenerate + factor (x - degenerate): x (B, C, H, W); op (B,) indexes BLEND_OPS and factor
    (B,), where 1 gives x back, are on the CPU.
    """
    degenerate, sharpen = to_grey(x), (op == 3).any()
    op, factor = send(x.device, op.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1))
    mean = (degenerate.mean((2, 3), keepdim=True) + 0.5).floor()
    degenerate = torch.where(op == 1, degenerate, mean * (op == 2))
    if sharpen:
        smooth, inner = x.clone(), x[..., 1:-1, 1:-1]               # [[1,1,1],[1,5,1],[1,1,1]] / 13
        rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
        ring = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        smooth[..., 1:-1, 1:-1] = ((ring + 4 * inner) / 13 + 0.5).floor()
        degenerate = torch.where(op == 3, smooth, degenerate)
    return torch.lerp(degenerate, x, factor).clamp_(0, 255).floor_()


def apply_affine(x, op, level, fill=128):
    """Rotate 30, shear 0.3, translate 0.45, each times level -1..1; bilinear, grey fill, and the
    fraction cut off, as in Pillow. x (B, C, H, W); op (B,) indexes AFFINE_OPS, level (B,): CPU.
    """
    most = torch.tensor([math.radians(30), 0.3, 0.3, 0.9, 0.9])     # grid_sample's width is 2
    amount = (op[:, None] == torch.arange(5)) * most * level[:, None]
    angle, shear_x, shear_y, shift_x, shift_y = amount.unbind(1)    # (B,) each, one of them not 0
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([cos, shear_x - sin, shear_x + shift_x,     # Pillow shears about the corner
                         sin + shear_y, cos, shear_y + shift_y], 1)
    [theta] = send(x.device, theta.view(-1, 2, 3, 1, 1))
    row, column = ((torch.arange(n, device=x.device) + 0.5) * (2 / n) - 1 for n in x.shape[2:])
    grid = theta[:, :, 0] * column + (theta[:, :, 1] * row[:, None] + theta[:, :, 2])
    grid = grid.permute(0, 2, 3, 1)                                 # (B, H, W, 2)
    x = F.grid_sample(x - fill, grid, align_corners=False)
    return x.add_(fill + 1e-3).floor_()


def apply_op(x, op, magnitude, sign):
    """One RandAugment operation per sample: x (B, C, H, W) floats holding 0..255, op (B,) indexes
    OPS (len(OPS): none), magnitude (B,) in 0..10, sign (B,) +-1; these three on the CPU. Scales of
    timm's "increasing" set.
    """
    level, first = magnitude / 10, 0
    for names, function, amount in (
            (TABLE_OPS, apply_tables, level),
            (BLEND_OPS, blend, (1 + 0.9 * sign * level).clamp(min=0.1)),
            (AFFINE_OPS, apply_affine, sign * level)):
        some = ((op >= first) & (op < first + len(names))).nonzero()[:, 0]
        if len(some):
            [at] = send(x.device, some)
            new = function(x.index_select(0, at), op[some] - first, amount[some])
            x = x.index_copy(0, at, new)
        first += len(names)
    return x


class Augment:
    """DeiT-style augmentation (arXiv 2012.12877) of a whole batch, every sample drawn for itself.

    images (B, C, S, S) or (B, S, S) uint8, grey or RGB, and labels (B,) on one device -> normalised
    (B, 3, img_size, img_size) floats and soft targets (B, num_classes). With every switch off it
    resizes and normalises: the evaluation transform. flip: probabilities (horizontal, vertical);
    jitter acts only where randaug is off, as in timm. generator: on the CPU; None: torch's default.
    ValueError where the images are not square.
    """

    def __init__(self, img_size, num_classes, crop=True, aspect=True, crop_scale=(0.08, 1.0),
                 flip=(0.5, 0.5), randaug=True, jitter=0.4, erase=0.5, mixup=0.8, cutmix=1.0,
                 smoothing=0.1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), generator=None):
        self.img_size, self.num_classes, self.generator = img_size, num_classes, generator
        self.crop, self.crop_scale, self.flip = crop, crop_scale, flip
        self.ratio = (3 / 4, 4 / 3) if aspect else (1, 1)
        self.randaug, self.jitter, self.erase = randaug, 0 if randaug else jitter, erase
        self.mixup, self.cutmix, self.smoothing = mixup, cutmix, smoothing
        self.mean, self.std = mean, std

    def rand(self, *shape):
        return torch.rand(shape, generator=self.generator)

    def seed(self):
        """A seed for another generator, below 2^24, where all versions of torch draw alike."""
        return int(torch.randint(2 ** 24, (), generator=self.generator))

    def __call__(self, images, labels):
        if images.shape[-1] != images.shape[-2]:
            raise ValueError(f"need square images, got {tuple(images.shape)}")
        x = (images if images.ndim == 4 else images[:, None]).float()       # (B, C, S, S)
        x = self.resized_crop(x)
        if self.randaug:
            x = self.rand_augment(x)
        if self.jitter:
            x = self.color_jitter(x)
        [(mean, std)] = send(x.device, 255 * torch.tensor([self.mean, self.std]).view(2, 3, 1, 1))
        x = (x - mean) / std                                        # grey becomes three channels
        if self.erase:
            x = self.random_erase(x)
        rest = self.smoothing / self.num_classes
        target = x.new_full((len(x), self.num_classes), rest)
        target.scatter_(1, labels[:, None], 1 - self.smoothing + rest)
        if self.mixup or self.cutmix:
            x, target = self.mix(x, target)
        return x, target

    def resized_crop(self, x):
        """RandomResizedCrop and flips: (B, C, S, S) -> (B, C, img_size, img_size), rounded."""
        B, _, S, _ = x.shape
        start, length = torch.zeros(2, B), torch.full((2, B), float(S))
        if self.crop:
            start, length = random_boxes(B, S, self.crop_scale, self.ratio, self.generator)
        flip = self.rand(2, B) < torch.tensor(self.flip[::-1])[:, None]         # rows, columns
        boxes = torch.stack([start + flip * length, torch.where(flip, -length, length)], 1)
        [boxes] = send(x.device, boxes)                             # (2, 2, B)
        for start, length in boxes:                                 # of the rows, of the columns
            x = resample_rows(x, start, length, self.img_size).transpose(2, 3)
        return x.contiguous().clamp_(0, 255).add_(0.5).floor_()

    def rand_augment(self, x, layers=2, magnitude=9.0, std=0.5):
        """timm's rand-m9-mstd0.5-inc1: two of fifteen operations, each with probability 0.5."""
        B = len(x)
        for _ in range(layers):
            op = torch.randint(len(OPS), (B,), generator=self.generator)
            op = torch.where(self.rand(B) < 0.5, op, len(OPS))
            noise = torch.randn(B, generator=self.generator)
            sign = (self.rand(B) < 0.5).float() * 2 - 1
            x = apply_op(x, op, (magnitude + std * noise).clamp(0, 10), sign)
        return x

    def color_jitter(self, x):
        """Brightness, saturation, contrast by U(1 - jitter, 1 + jitter), in an order per sample."""
        B = len(x)
        order = self.rand(B, 3).argsort(1)                          # of the first three BLEND_OPS
        factor = 1 + self.jitter * (2 * self.rand(B, 3) - 1)
        for k in range(3):
            x = blend(x, order[:, k], factor[:, k])
        return x

    def random_erase(self, x):
        """With probability `erase` a box of 2% to a third of the area becomes N(0, 1) a pixel, in
        place. Zhong et al., pixel mode."""
        B, C, S, _ = x.shape
        start, length = random_boxes(B, S, (0.02, 1 / 3), (0.3, 1 / 0.3), self.generator)
        length *= self.rand(B) < self.erase                         # else a box without pixels
        noise = torch.randn(C * int(length.long().prod(0).sum()), device=x.device,
                            generator=torch.Generator(x.device).manual_seed(self.seed()))
        start, end = send(x.device, start[..., None], (start + length)[..., None])  # (2, B, 1)
        pixel = torch.arange(S, device=x.device)
        rows, columns = (pixel >= start) & (pixel < end)            # (B, S) each
        return x.masked_scatter_(rows[:, None, :, None] & columns[:, None, None], noise)

    def mix(self, x, target):
        """Mixup, lambda x + (1 - lambda) x.flip(0), or cutmix, a box of x.flip(0) in x, in place.

        One lambda ~ Beta per batch; each way with probability 0.5 where both are on. The target's
        weight after cutmix is what the box, cut off at the border, has left of the image.
        """
        S = x.shape[-1]
        cut = bool(self.cutmix and (not self.mixup or self.rand() < 0.5))
        alpha = self.cutmix if cut else self.mixup
        lam = random.Random(self.seed()).betavariate(alpha, alpha)  # torch's takes no generator
        if cut:
            half, centre = int(math.sqrt(1 - lam) * S) // 2, (self.rand(2) * S).int().tolist()
            rows, columns = (slice(max(0, c - half), c + half) for c in centre)
            box = x[:, :, rows, columns]
            box.copy_(box.flip(0))
            lam = 1 - box[0, 0].numel() / S ** 2
        else:
            x = torch.lerp(x.flip(0), x, lam)
        return x, torch.lerp(target.flip(0), target, lam)


# ==================================================================================================
# 6 · Vision Transformer (Dosovitskiy et al., 2021), parameter names as in timm
# ==================================================================================================

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
            x = F.scaled_dot_product_attention(q, k, v)             # (B, heads, N, D / heads)
        else:   # the same, written out: on CPUs the fused kernel's backward is 10x slower in bf16
            weight = (q * (D // self.heads) ** -0.5) @ k.transpose(2, 3)        # (B, heads, N, N)
            x = weight.softmax(-1).to(v.dtype) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two layers, four times as wide inside, exact GELU: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = drop_path

    def drop(self, x):
        """Leave a whole branch out for some samples, scale the rest up so that the mean stays."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep) / keep

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision Transformer classifier: images (B, 3, img_size, img_size) -> logits (B, num_classes).

    The head starts at zero, so that the first loss is exactly ln(num_classes). Raises ValueError
    where the patch does not divide the image or the heads do not divide dim.
    """

    def __init__(self, img_size=224, patch_size=16, num_classes=1000, dim=192, depth=12, heads=3,
                 drop_path=0.0):
        super().__init__()
        if img_size % patch_size or dim % heads:
            raise ValueError(f"patch_size {patch_size} must divide img_size {img_size}, and "
                             f"heads {heads} must divide dim {dim}")
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch_size, patch_size)
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
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)     # (B, D, H, W) -> (B, HW, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)            # (B, 1 + HW, D)
        return x + self.pos_embed

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x)))[:, 0])


class Probe(nn.Module):
    """A linear classifier on the frozen embedding and first k blocks: images -> logits.

    It sees the mean of the patch tokens, each feature normalised by its batch (as in MAE's probe).
    """

    def __init__(self, model, k, num_classes):
        super().__init__()
        self.frozen, self.k = model.requires_grad_(False).eval(), k
        dim = model.pos_embed.shape[2]
        self.normalise = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()                                          # no stochastic depth
        return self

    @torch.no_grad()
    def features(self, x):
        x = self.frozen.blocks[:self.k](self.frozen.embed(x))
        return x[:, 1:].mean(1)                                     # (B, 1 + HW, D) -> (B, D)

    def forward(self, x):
        return self.head(self.normalise(self.features(x)))


def resize_pos_embed(pos_embed, tokens):
    """Interpolate position embeddings (1, 1 + h * h, D) to (1, tokens, D), not the cls token's."""
    old, new = math.isqrt(pos_embed.shape[1] - 1), math.isqrt(tokens - 1)
    if old == new or pos_embed.shape[1] != 1 + old * old:           # of another architecture
        return pos_embed
    grid = pos_embed[:, 1:].view(1, old, old, -1).permute(0, 3, 1, 2)           # (1, D, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)


# ==================================================================================================
# 7 · Downstream data: torchvision's sets by name, or any folder of images
# ==================================================================================================

DATASETS = {  # name: torchvision class, arguments for training images, arguments for test images
    "cifar10": ("CIFAR10", dict(train=True), dict(train=False)),
    "cifar100": ("CIFAR100", dict(train=True), dict(train=False)),
    "flowers102": ("Flowers102", dict(split="train"), dict(split="test")),
    "stanford_cars": ("StanfordCars", dict(split="train"), dict(split="test")),
    "places365": ("Places365", dict(split="train-standard", small=True),
                  dict(split="val", small=True)),
    "dtd": ("DTD", dict(split="train"), dict(split="test")),
    "eurosat": ("EuroSAT", {}, {}),
    "pets": ("OxfordIIITPet", dict(split="trainval"), dict(split="test")),
    "food101": ("Food101", dict(split="train"), dict(split="test")),
    "aircraft": ("FGVCAircraft", dict(split="trainval"), dict(split="test")),
    "sun397": ("SUN397", {}, {}),
    "pcam": ("PCAM", dict(split="train"), dict(split="test")),
    "clevr": ("CLEVRClassification", dict(split="train"), dict(split="val")),
    "svhn": ("SVHN", dict(split="train"), dict(split="test")),
    "stl10": ("STL10", dict(split="train"), dict(split="test")),
}
ON_DEVICE_BYTES = 6 * 2 ** 30    # sets up to this size live on the device: 21,000 of 512x512 do


def square(image, side):
    """The middle of a PIL image, resized -> uint8 (3, side, side)."""
    from torchvision.transforms import functional as T
    if image.size != (side, side):
        longest = 8 * min(image.size)           # what is longer would blow up when resized
        image = T.center_crop(image, [min(n, longest) for n in image.size[::-1]])
        image = T.center_crop(T.resize(image, side, antialias=True), side)
    return T.pil_to_tensor(image)


def read_image(path):
    """An image file as a PIL image in RGB: 16-bit grey is scaled, bombs are not decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)          # 90 million pixels
        image = Image.open(path)
    with image:
        if image.mode.startswith("I"):
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        return image.convert("RGB")


def open_folder(root):
    """torchvision's ImageFolder, one folder a class, by `read_image`."""
    from torchvision.datasets import ImageFolder
    for folder, folders, _ in os.walk(root, followlinks=True):
        for link in (path for path in map(Path(folder).joinpath, folders) if path.is_symlink()):
            if link.resolve() in {above.resolve() for above in link.parents}:
                raise InputError(f"--root {root}: {link} links to a folder that it is in")
    try:
        return ImageFolder(root, loader=read_image)
    except OSError as error:
        raise InputError(f"--root {root}: {str(error).splitlines()[0]}") from None


def open_datasets(name, root):
    """The training and test set of a name in DATASETS, or of "folder" -> two torchvision datasets.

    Sets without an official split are split 4 to 1 by a fixed permutation.
    """
    from torchvision import datasets
    root = Path(root)
    if name == "folder":
        tests = [root / d for d in ("test", "val") if (root / d).is_dir()]
        if not (root / "train").is_dir() or not tests:
            raise InputError(f"--root {root}: need the folders train/ and test/ (or val/) in it")
        train, test = open_folder(root / "train"), open_folder(tests[0])
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise InputError(f"--root {root}: train/ and {tests[0].name}/ differ in {odd[:3]}")
        return train, test
    kind, *splits = DATASETS[name]

    def make(download):
        return [getattr(datasets, kind)(root, download=download, **split) for split in splits]

    try:
        try:
            train, test = make(download=False)
        except RuntimeError:        # not there yet
            train, test = make(download=True)
    except Exception as error:      # no network, a dead link, a broken file, a missing reader
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--data {name}: cannot be downloaded to {root} ({reason}); put its files "
                         f"there as torchvision.datasets.{kind} expects, or use --data folder"
                         ) from None
    if splits[0] == splits[1]:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        cut = len(order) * 4 // 5
        train, test = (torch.utils.data.Subset(train, part) for part in (order[:cut], order[cut:]))
    return train, test


def labels_of(dataset):
    """All labels (n,) of a torchvision dataset, if it can be without reading its images."""
    if isinstance(dataset, torch.utils.data.Subset):
        return labels_of(dataset.dataset)[dataset.indices]
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return torch.as_tensor(getattr(dataset, name)).long()
    if hasattr(dataset, "_samples"):
        return torch.tensor([label for _, label in dataset._samples])
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])


def balanced_subset(labels, per_class=None, holdout=0.0):
    """A fixed choice of per_class images of each class -> indices to train on, indices held out.

    holdout: the fraction of the chosen images of each class that is kept for choosing settings.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held = [], []
    for label in labels.unique().tolist():
        members = order[labels[order] == label]
        if per_class and len(members) < per_class:
            raise InputError(f"--train-per-class {per_class}: class {label} has {len(members)}")
        members = members[:per_class]
        cut = round(holdout * len(members))
        held.append(members[:cut])
        train.append(members[cut:])
    return torch.cat(train).sort().values, torch.cat(held).sort().values


def leave_signals(worker):
    """A worker that reads images leaves signals to the process that trains, and ends with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Images(torch.utils.data.Dataset):
    """Chosen images of a torchvision dataset, square, as batches of uint8 on the device.

    Where all are small squares of one size (sixteen are looked at) they stay as they are, else they
    are resized and cropped to 8/7 of img_size (256 for 224). Up to ON_DEVICE_BYTES they are read
    once and stay on the device; more streams through a DataLoader with `workers` processes.
    """
    dots, theta = False, {}                     # as a source of section 4

    def __init__(self, dataset, indices, img_size, device, workers):
        self.dataset, self.indices, self.side = dataset, indices.tolist(), img_size * 8 // 7
        self.labels, self.device, self.workers = labels_of(dataset)[indices], device, workers
        sizes = {self.read(i, lambda image: image.size)
                 for i in range(0, len(self), -(-len(self) // 16))}
        if len(sizes) == 1 and len(set(*sizes)) == 1:
            self.side = min(self.side, *sizes.pop())
        self.on_device = len(indices) * 3 * self.side ** 2 <= ON_DEVICE_BYTES
        if self.on_device:
            batches = [images for images, _ in self.loader(batch_size=256)]
            self.images = torch.cat(batches).to(device)
            self.labels = self.labels.to(device)

    def loader(self, **how):
        return torch.utils.data.DataLoader(
            self, num_workers=self.workers, worker_init_fn=leave_signals,
            pin_memory=self.device.type == "cuda", **how)

    def __len__(self):
        return len(self.indices)

    def read(self, i, use):
        """use(image i), an RGB PIL image."""
        try:
            return use(self.dataset[self.indices[i]][0].convert("RGB"))
        except Exception as error:
            files = getattr(self.dataset, "samples", None)
            where = files[self.indices[i]][0] if files else f"image {self.indices[i]}"
            raise InputError(f"--root: cannot read {where} ({type(error).__name__}); mend or "
                             "remove it") from None

    def __getitem__(self, i):
        return self.read(i, lambda image: square(image, self.side)), self.labels[i]

    def batches(self, index_lists):
        """For each tensor of indices: images uint8 (B, 3, side, side) and labels (B,)."""
        if self.on_device:
            for i in index_lists:
                [at] = send(self.device, i)
                yield self.images.index_select(0, at), self.labels[at]
            return
        for images, labels in self.loader(batch_sampler=index_lists):
            yield send(self.device, images, labels)


# ==================================================================================================
# 8 · Training: one loop for pre-training and fine-tuning
#
# All randomness of a step is a function of (seed, step, rank), and which images it sees of (seed,
# step, number of ranks). So a run that is resumed at a step goes on exactly, with no generator to
# store; and ranks see different images.
# ==================================================================================================

def seed_for(*key):
    """A 31-bit seed from any key of numbers and strings, the same on every machine."""
    return zlib.crc32(repr(key).encode()) >> 1


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order of n images in one epoch."""
    generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
    return torch.randperm(n, generator=generator)


def batch_indices(n, batch_size, step, seed):
    """Which images of n make the batch of a step: one fresh permutation after another, cut up."""
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // n, (last - 1) // n + 1)
    return torch.cat([permutation(n, seed, e)[max(0, first - e * n):last - e * n] for e in epochs])


def make_optimizer(model, name, lr, weight_decay):
    """AdamW, or SGD with Nesterov momentum; biases, norms, cls token and positions do not decay."""
    groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)]
    for key, p in model.named_parameters():
        if not p.requires_grad:
            continue
        groups[p.ndim <= 1 or key in ("cls_token", "pos_embed")]["params"].append(p)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), fused=True)


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up over `warmup` steps, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pick_precision(device):
    """bf16 where the processor multiplies it, else fp32: the same for every run on a machine."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and any(
            getattr(torch.cpu, name, bool)()                        # torch names them privately
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if fast else "fp32"


def autocast(device, precision):
    """The context of a forward pass in "bf16" or "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def replace_file(path, data):
    """Write beside the file, flush to disk, rename: at any moment there is one whole file."""
    beside = Path(f"{path}.part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:                                                 # a full disk
        beside.unlink(missing_ok=True)
        raise


def save_checkpoint(path, **content):
    """Tensors and plain values to a file that is whole at any moment. OSError on a full disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace_file(path, buffer.getbuffer())


def load_checkpoint(path, flag="--ckpt"):
    """Read our checkpoint, the authors' {"model": ...}, timm's {"state_dict": ...} or a bare state
    dict -> a dict with the weights under "model", and, if this version wrote it, "args".

    Only tensors and plain values are read (weights_only), never code, and none is believed.
    """
    def sound(tensor):              # a counter of BatchNorm is the one that is whole
        return (tensor.device.type == "cpu" and tensor.layout == torch.strided
                and (tensor.is_floating_point() or tensor.dtype == torch.int64)
                and bool(tensor.isfinite().all()))

    try:
        if zipfile.is_zipfile(path):                                # torch checks no sums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # the error says it in one line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{flag} {path}: no such file") from None
    except Exception as error:
        raise InputError(f"{flag} {path}: not a readable checkpoint of plain tensors "
                         f"({type(error).__name__})") from None
    try:
        content = content if "model" in content else {"model": content.get("state_dict", content)}
        content["model"] = {k.removeprefix("module."): t for k, t in content["model"].items()}
        good = content["model"] and all(map(sound, content["model"].values()))
    except Exception:
        good = False
    if not good:
        raise InputError(f"{flag} {path}: holds no state dict of a model, of finite numbers")

    args, whole = content.get("args"), lambda value: type(value) is int and 0 < value < 2 ** 31
    try:
        json.dumps(args)
        ours = (args["model"] in MODELS and whole(content["step"]) and whole(content["seen"] + 1)
                and all(whole(args[name]) for name in ("img_size", "patch_size", "batch_size"))
                and args["img_size"] % args["patch_size"] == 0
                and type(content["seconds"]) is float and isinstance(content["optimizer"], dict)
                and sound(content["total"]) and content["total"].shape == (2,)
                and content["total"].dtype == torch.float32)
    except Exception:               # others keep other things there, or nothing
        ours = False
    if not ours:
        content.pop("args", None)
    return content


def load_optimizer(optimizer, saved, path):
    """Take over the moments of every weight; what else an optimizer has comes from the flags."""
    names = {"momentum_buffer"} if "momentum" in optimizer.defaults else {
        "step", "exp_avg", "exp_avg_sq"}
    try:
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=saved["state"]))
        good = all(set(optimizer.state[p]) == names and all(
            t.shape == (() if name == "step" else p.shape) and t.is_floating_point()
            and t.isfinite().all() for name, t in optimizer.state[p].items())
            for group in optimizer.param_groups for p in group["params"])
    except Exception:
        good = False
    if not good:
        raise InputError(f"--resume: the optimizer's state in {path} does not fit; give it to "
                         "--ckpt to start from its weights")


def load_weights(model, state, source, head=False):
    """Copy a state dict into the model, the head only on demand: its classes are others. Position
    embeddings are interpolated to the image size. InputError names the source, every mismatch."""
    own, state = model.state_dict(), dict(state)
    pos = state.get("pos_embed")
    if pos is not None and pos.ndim == 3 and len(pos) == 1 and pos.shape[1] > 1 \
            and pos.shape[2] == own["pos_embed"].shape[2]:
        state["pos_embed"] = resize_pos_embed(pos.float(), own["pos_embed"].shape[1])
    if not head:
        state |= {name: own[name] for name in ("head.weight", "head.bias")}
    wrong = [f"{k} is missing" for k in own if k not in state]
    wrong += [f"{k} is unknown" for k in state if k not in own]
    wrong += [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own
              if k in state and state[k].shape != own[k].shape]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{source}: does not fit --model, --img-size and --patch-size: "
                         f"{'; '.join(wrong[:3])}{more}")
    model.load_state_dict(state)


@torch.no_grad()
def evaluate(model, data, transform, device, precision, batch_size=500):
    """Top-1 and top-5 accuracy in percent of a set of `Images`."""
    model.eval()
    top1 = top5 = 0
    for images, labels in data.batches(torch.arange(len(data)).split(batch_size)):
        x, _ = transform(images, labels)
        with autocast(device, precision):
            logits = model(x).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        top1, top5 = top1 + ranked[:, 0].sum(), top5 + ranked.sum()
    model.train()
    return 100 * int(top1) / len(data), 100 * int(top5) / len(data)


class Team(NamedTuple):
    """Where a process trains: alone, or as one of those that torchrun started."""
    device: torch.device
    rank: int
    world: int


def join_team(device):
    """Read torchrun's environment; with several processes, meet the others (nccl, or gloo)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Team(device, rank, world)


@contextlib.contextmanager
def signals_noted():
    """SIGINT and SIGTERM leave their number in a list, for after the step; a second Ctrl-C acts."""
    noted, before = [], {}

    def note(number, frame):
        noted.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:              # as under nohup
            before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(yes, team):
    """Whether it is so on any of the processes, which must stop after the same step."""
    if team.world == 1:
        return yes
    flag = torch.tensor(int(yes))
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def train_step(network, optimizer, x, target, args):
    """One step on images (B, 3, S, S) and soft targets (B, C) -> loss, logits (B, C)."""
    with autocast(x.device, args.precision):
        logits = network(x)
    logits = logits.float()
    loss = lpce_loss(logits, target)
    loss.backward()
    if args.clip_grad:
        nn.utils.clip_grad_norm_(network.parameters(), args.clip_grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), logits.detach()


def train(args, team, model, batches, augment, steps, checkpoint=None, test=None, test_every=1):
    """Train to `steps`, from the checkpoint's step on, logging and saving into args.out.

    batches(start): yields this rank's (images, labels) of each step. test(): returns top-1 and
    top-5; called every `test_every` steps and at the end. Returns the last line of the log. A
    signal saves and raises Stopped; a loss or a weight that is not finite raises InputError.
    """
    out, start = Path(args.out), checkpoint["step"] if checkpoint else 0
    optimizer = make_optimizer(model, args.optimizer, args.lr, args.weight_decay)
    total, seen = torch.zeros(2, device=team.device), 0             # since the last line of the log
    if checkpoint:
        load_weights(model, checkpoint["model"], f"--resume: {out / 'last.pt'}", head=True)
        load_optimizer(optimizer, checkpoint["optimizer"], out / "last.pt")
        total += checkpoint["total"].to(team.device)
        seen = checkpoint["seen"]
    network = nn.parallel.DistributedDataParallel(model) if team.world > 1 else model
    augment.generator = torch.Generator()
    best = max([r["test_top1"] for r in read_log(out) if "test_top1" in r], default=0.0)
    lead = team.rank == 0                                           # the one that writes and prints
    began = time.perf_counter() - (checkpoint["seconds"] if checkpoint else 0)

    def report(text, **record):
        if lead:
            record = dict(step=done, images=done * args.batch_size,
                          seconds=round(time.perf_counter() - began, 1), **record)
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            print(f"step {done}/{steps}  {text}", flush=True)

    def check_finite():
        weights = sum(p.detach().sum() for p in model.parameters())
        if not (loss + weights).isfinite():
            file = out / "last.pt"
            kept = f"; {file} is the last good state" if file.exists() else ""
            raise InputError(f"--lr {args.lr}: the loss or a weight at step {done} is not finite "
                             f"(rate {lr:.2e}); lower --lr, or set --clip-grad{kept}")

    model.train()
    tick, fresh = time.perf_counter(), 0                            # images since then
    with signals_noted() as signals:
        for step, (images, labels) in zip(range(start, steps), batches(start)):
            key = seed_for(args.seed, "step", step, team.rank)
            if args.drop_path:                                      # its masks are torch's default
                torch.manual_seed(key)
            augment.generator.manual_seed(key ^ 1)
            x, target = augment(images, labels)
            if step == start and x.is_cuda:
                with torch.random.fork_rng():                       # its masks are of this step
                    network = compiled(network, x, target, args)
            if step == 0 and lead:
                save_samples(out / "samples.png", x, augment)
            lr = learning_rate(step, steps, round(args.warmup * steps), args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, logits = train_step(network, optimizer, x, target, args)
            right = (logits.argmax(1) == target.argmax(1)).float().sum()
            total += torch.stack([loss * len(x), right])
            seen, fresh = seen + len(x), fresh + len(x)

            done = step + 1
            last, stopping = done == steps, any_rank(bool(signals), team)
            logging, saving = (last or done % n == 0 for n in (args.log_every, args.save_every))
            saving |= stopping
            if logging or saving:
                check_finite()
            if logging:
                mean_loss, accuracy = (total / seen).tolist()
                speed = fresh * team.world / (time.perf_counter() - tick)
                minutes, seconds = divmod(int((steps - done) * args.batch_size / speed), 60)
                report(f"loss {mean_loss:.3f}  top-1 {100 * accuracy:.1f}%  lr {lr:.2e}  "
                       f"{speed:.0f} images/s  {minutes}:{seconds:02d} left",
                       loss=mean_loss, top1=100 * accuracy, lr=lr, images_per_s=round(speed, 1))
                total.zero_()
                seen, fresh, tick = 0, 0, time.perf_counter()
            if test and lead and (last or done % test_every == 0):
                paused = time.perf_counter()
                top1, top5 = test()
                best = max(best, top1)
                report(f"test top-1 {top1:.2f}%  top-5 {top5:.2f}%  (best top-1 {best:.2f}%)",
                       test_top1=top1, test_top5=top5, best_top1=best)
                tick += time.perf_counter() - paused
            if saving and lead:
                save_checkpoint(out / "last.pt", model=model.state_dict(), step=done,
                                seconds=time.perf_counter() - began, total=total.cpu(), seen=seen,
                                args=json.loads(json.dumps(vars(args))),        # tuples, as lists
                                optimizer=optimizer.state_dict())
            if stopping or (last and any_rank(bool(signals), team)):            # while it saved
                if team.world > 1:
                    torch.distributed.barrier()                     # till the first has saved
                raise Stopped(f"stopped after step {done} of {steps}, saved in {out}; the same "
                              "command with --resume goes on", (signals or [signal.SIGTERM])[0])
    if lead:
        records = read_log(out)
        if not records:
            raise InputError(f"--resume: {out} has weights, but its log.jsonl is gone")
        save_curve(out)
        return records[-1]


def read_log(out):
    """The records of out/log.jsonl, without what was cut off or spoilt."""
    file, records = out / "log.jsonl", []
    for line in file.read_text(errors="replace").split("\n")[:-1] if file.exists() else ():
        try:
            record = json.loads(line)
            record["step"] + record["images"]
        except (ValueError, TypeError, KeyError):
            continue
        records.append(record)
    return records


def save_samples(path, x, augment, rows=8):
    """A grid of what the network saw: the first images of an augmented batch (B, 3, S, S)."""
    from torchvision.utils import save_image
    x = x[:rows * rows].float().cpu()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (augment.mean, augment.std))
    save_image((x * std + mean).clamp(0, 1), path, nrow=rows, padding=2, pad_value=1)


def save_curve(out):
    """Loss, and test accuracy if any, over the images seen: out/log.jsonl -> out/curve.png."""
    from matplotlib.figure import Figure
    records, figure = read_log(out), Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    loss = [(r["images"], r["loss"]) for r in records if "loss" in r]
    axis.plot(*zip(*loss), color="C0", lw=1)
    axis.set(xlabel="images seen", ylabel="training loss")
    test = [(r["images"], r["test_top1"]) for r in records if "test_top1" in r]
    if test:
        right = axis.twinx()
        right.plot(*zip(*test), color="C1", marker=".")
        right.set_ylabel("test top-1 (%)", color="C1")
    figure.savefig(out / "curve.png", dpi=120)


# ==================================================================================================
# 9 · Commands
# ==================================================================================================

def make_augment(args, num_classes, mean, std, vertical_flip, erase):
    """The augmentation that the flags of Table 9 ask for; erase: the probability of `--erase`."""
    return Augment(
        args.img_size, num_classes, crop=args.crop, aspect=args.aspect, crop_scale=args.crop_scale,
        flip=(0.5 * args.flip, 0.5 * args.flip * vertical_flip), randaug=args.randaug,
        jitter=0.4 * args.jitter, erase=erase * args.erase, mixup=0.8 * args.mixup,
        cutmix=1.0 * args.cutmix, smoothing=args.smoothing, mean=mean, std=std)


def plain(img_size, num_classes, mean, std):
    """The evaluation transform: an `Augment` with everything switched off."""
    return Augment(img_size, num_classes, crop=False, flip=(0, 0), randaug=False, jitter=0, erase=0,
                   mixup=0, cutmix=0, smoothing=0, mean=mean, std=std)


HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_model(args, team, num_classes, steps, images):
    """The network with its initial weights on the device; says what will be trained, and how."""
    dim, depth, heads = MODELS[args.model]
    torch.manual_seed(seed_for(args.seed, "weights"))
    model = ViT(args.img_size, args.patch_size, num_classes, dim, depth, heads, args.drop_path)
    if team.rank == 0:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{args.model} ({millions:.1f}M parameters) at {args.img_size}x{args.img_size}, "
              f"patch {args.patch_size}, on {team.device} x{team.world}, {args.precision}\n"
              f"{images} images, {steps} steps of {args.batch_size} (global), {args.optimizer}, "
              f"peak lr {args.lr:g}, warm-up {round(args.warmup * steps)} steps, weight decay "
              f"{args.weight_decay:g}; run folder {args.out}", flush=True)
    return model.to(team.device)


def compiled(network, x, target, args):
    """The network compiled, if that works on one batch, else as it is: Triton, a C compiler and a
    GPU from sm_70 on are needed. It takes half a minute, once."""
    fast = torch.compile(network)
    try:
        with autocast(x.device, args.precision):
            lpce_loss(fast(x).float(), target).backward()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"onepfrac: not compiled, slower: {reason[:200]}", file=sys.stderr, flush=True)
        fast = network
    network.zero_grad(set_to_none=True)
    return fast


def textured(images, args, *key):
    """Whole stamps with their texture, a function of --seed and the key."""
    seed = seed_for(args.seed, "texture", *key)
    return stamp(images, args.texture, torch.Generator(images.device).manual_seed(seed))


def save_theta(path, source):
    """What the authors never kept: the base and every eps, or the maps of every category. (The
    contours of a category follow from --fractal-seed: `contour`.)"""
    theta = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in source.theta.items()}
    replace_file(path, (json.dumps(theta) + "\n").encode())


# Settings that a result does not depend on; a resumed run may change them.
BESIDE = {"out", "root", "ckpt", "record", "device", "workers", "resume", "save_every", "log_every",
          "eval_epochs"}


def start_run(args, team):
    """Make the run folder, or find what --resume goes on with -> (checkpoint or None)."""
    out = Path(args.out)
    last = out / "last.pt"
    try:
        import matplotlib.figure                # now: curve.png is drawn when hours have passed
    except ImportError as error:
        raise InputError(f"curve.png: {error}; pip install -r requirements.txt") from None
    if args.resume:
        if not last.exists():
            raise InputError(f"--resume: there is no {last} to go on with; check --out")
        checkpoint = load_checkpoint(last, "--resume:")
        if "args" not in checkpoint:
            raise InputError(f"--resume: {last} holds weights, but no run of this version; give "
                             "them to --ckpt to start from them")
        for name, value in json.loads(json.dumps(vars(args))).items():
            saved = checkpoint["args"].get(name)
            if name == "precision":
                args.precision = saved                              # on whatever machine it began
            elif (name == "ckpt" or name not in BESIDE) and value != saved:
                raise InputError(f"--resume: --{name.replace('_', '-')} was {saved} in {out}, now "
                                 f"it is {value}; repeat the flags of that run")
        if team.rank == 0:
            replace_file(out / "log.jsonl", "".join(
                json.dumps(r) + "\n" for r in read_log(out) if r["step"] <= checkpoint["step"]
            ).encode())
        return checkpoint
    if last.exists():
        raise InputError(f"--out {out}: holds a finished or stopped run; give another --out, or "
                         "--resume to go on with it")
    if team.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "args.json", (json.dumps(vars(args), indent=1) + "\n").encode())
        (out / "log.jsonl").unlink(missing_ok=True)
    return None


def result_settings(args):
    """The settings that a result depends on."""
    return {k: v for k, v in args.items() if k not in BESIDE}


def add_record(args, last, **more):
    """Append a run to the file of --record, one line of JSON: all its settings, those of the
    pre-training it started from, and what was measured; images and seconds are of both."""
    if not args.record or not last:                                 # not asked for, or not rank 0
        return
    before, pretraining = load_checkpoint(args.ckpt) if args.ckpt else {}, None
    if "args" in before:
        pretraining = result_settings(before["args"]) | dict(steps=before["step"])
        last["images"] += before["step"] * pretraining["batch_size"]
        last["seconds"] += before["seconds"]
    elif before:
        pretraining = dict(recipe=None, weights=Path(args.ckpt).name)           # somebody else's
    settings = result_settings(vars(args)) | ({"layers": [more["layer"]]} if more else {})
    measured = {k: last[k] for k in ("images", "seconds", "test_top1", "test_top5", "best_top1",
                                     "decay") if k in last}

    def git(*words):
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False,
                              cwd=Path(__file__).resolve().parent)

    try:
        head = git("describe", "--always")
        changed = bool(git("diff", "--quiet", "HEAD", "--", "onepfrac.py").returncode)
        commit = None if head.returncode else head.stdout.strip() + "-dirty" * changed
    except OSError:                                                 # there is no git
        commit = None
    record = dict(command=args.command, recipe=args.recipe, seed=args.seed, **more, **measured,
                  commit=commit, pretrain=pretraining, settings=settings,
                  device=device_name(args.device))
    with open(args.record, "a") as file:
        file.write(json.dumps(record) + "\n")


def rank_batches(n, args, team, start, steps):
    """This rank's share of the indices of each step, from `start` on."""
    for step in range(start, steps):
        yield batch_indices(n, args.batch_size, step, args.seed)[team.rank::team.world]


def pretrain(args, team):
    """Pre-train on what --source draws, by default L perturbed copies of one fractal."""
    checkpoint = start_run(args, team)
    source = SOURCES[args.source](args, team.device)
    if team.rank == 0 and not checkpoint:
        save_theta(Path(args.out) / "theta.json", source)
    fresh = source.dots and (args.fresh_texture or not source.stored)
    if source.dots and not fresh:
        source.images = textured(source.images, args)

    def batches(start):
        lists = rank_batches(len(source), args, team, start, args.steps)
        for step, (images, labels) in enumerate(source.batches(lists), start):
            yield textured(images, args, step, team.rank) if fresh else images, labels

    classes = int(source.labels.max()) + 1
    model = make_model(args, team, classes, args.steps,
                       f"{args.source}: {classes} classes, {len(source)}")
    augment = make_augment(args, classes, HALF, HALF, True, 0.5)
    train(args, team, model, batches, augment, args.steps, checkpoint)


def open_data(args, team):
    """Training and test images of --data, with its subset and split, and the number of classes."""
    if args.record:
        Path(args.record).parent.mkdir(parents=True, exist_ok=True)
        open(args.record, "a").close()          # better now than after hours
    for turn in (True, False):              # rank 0 downloads first, then the others find it
        if turn == (team.rank == 0):
            train_set, test_set = open_datasets(args.data, args.root)
        if team.world > 1:
            torch.distributed.barrier()
    labels = labels_of(train_set)
    chosen, held = balanced_subset(labels, args.train_per_class, args.holdout)
    if not len(chosen):
        raise InputError(f"--holdout {args.holdout}: leaves no image to train on")
    if args.holdout and not len(held):
        raise InputError(f"--holdout {args.holdout}: leaves no image of any class to test on")
    if not args.holdout:
        held = torch.arange(len(test_set))
    images = Images(train_set, chosen, args.img_size, team.device, args.workers)
    tests = Images(train_set if args.holdout else test_set, held, args.img_size, team.device,
                   args.workers)
    return images, tests, len(getattr(train_set, "classes", ())) or int(labels.max()) + 1


def finetune(args, team):
    """Fine-tune a checkpoint, or train from scratch without one; report the last epoch."""
    checkpoint = start_run(args, team)
    images, tests, classes = open_data(args, team)
    if args.batch_size > len(images):
        raise InputError(f"--batch-size {args.batch_size}: there are {len(images)} images")
    steps = math.ceil(args.epochs * len(images) / args.batch_size)
    model = make_model(args, team, classes, steps, f"{args.data}, {len(images)}")
    if args.ckpt and not checkpoint:
        load_weights(model, load_checkpoint(args.ckpt)["model"], f"--ckpt {args.ckpt}")
    last = train_on(args, team, model, images, tests, classes, steps, checkpoint)
    add_record(args, last)


def train_on(args, team, model, images, tests, classes, steps, checkpoint=None):
    """Train a model on `Images` and test it on others -> the last line of the log."""
    transform = plain(args.img_size, classes, IMAGENET_MEAN, IMAGENET_STD)
    return train(
        args, team, model,
        lambda start: images.batches(rank_batches(len(images), args, team, start, steps)),
        make_augment(args, classes, IMAGENET_MEAN, IMAGENET_STD, False, 0.25), steps, checkpoint,
        lambda: evaluate(model, tests, transform, team.device, args.precision),
        max(1, round(args.eval_epochs * len(images) / args.batch_size)))


def fit_logistic(x, labels, num_classes, decay, weight=None, iterations=200):
    """Multinomial logistic regression by L-BFGS: features x (n, D) -> weight (D, num_classes).

    Minimises the mean cross-entropy plus decay / 2 times the squared weights, from `weight` on. The
    last feature is a one and its weights, the biases, do not decay.
    """
    weight = x.new_zeros(x.shape[1], num_classes) if weight is None else weight.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=iterations, tolerance_grad=1e-6,
                                  tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight, labels) + 0.5 * decay * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def logistic_probe(probe, images, tests, classes, args, team):
    """Frozen features of whole images, logistic regression, the strength of its regularisation
    chosen on a fifth of the training images, then fitted to all -> test accuracies, decay."""
    transform = plain(args.img_size, classes, IMAGENET_MEAN, IMAGENET_STD)
    exact = "cpu" if team.device.type == "mps" else team.device     # float64 for the line search

    def features(data):
        x = [probe.features(transform(batch, labels)[0])
             for batch, labels in data.batches(torch.arange(len(data)).split(500))]
        return torch.cat(x).to(exact).double(), data.labels.to(exact)

    def accuracy(weight, x, labels, k=1):
        ranked = (x @ weight).topk(min(k, classes)).indices == labels[:, None]
        return 100 * ranked.sum().item() / len(labels)

    (x, labels), (x_test, labels_test) = features(images), features(tests)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_test = (F.pad((t - mean) / std, (0, 1), value=1.0) for t in (x, x_test))
    fit, check = balanced_subset(labels.cpu(), holdout=0.2)
    if not len(check):
        raise InputError("--classifier lbfgs: needs at least three training images of a class, to "
                         "choose its regularisation on some")
    best, weight = (-1.0, 0.0), None
    for decay in (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):          # each starts from the last
        weight = fit_logistic(x[fit], labels[fit], classes, decay, weight)
        best = max(best, (accuracy(weight, x[check], labels[check]), decay))
    weight = fit_logistic(x, labels, classes, best[1])
    return dict(test_top1=accuracy(weight, x_test, labels_test),
                test_top5=accuracy(weight, x_test, labels_test, 5), decay=best[1])


def probe(args, team):
    """Linear classifiers on frozen features of the first k blocks (Fig. 3), or, by L-BFGS, the
    transfer protocol of arXiv 2212.08420."""
    depth, out, resume = MODELS[args.model][1], Path(args.out), args.resume
    for k in args.layers:
        if k > depth:
            raise InputError(f"--layers {k}: {args.model} has {depth} blocks")
    if args.classifier == "sgd" and args.batch_size == 1:
        raise InputError("--batch-size 1: a batch is what features are normalised by; give more")
    images, tests, classes = open_data(args, team)
    steps = math.ceil(args.epochs * len(images) / args.batch_size)
    for k in args.layers:
        args.out = str(out / f"layer{k}")
        args.resume = resume and (Path(args.out) / "last.pt").exists()
        checkpoint = start_run(args, team)
        model = make_model(args, team, classes, steps, f"first {k} blocks frozen; {args.data}, "
                                                       f"{len(images)}")
        if args.ckpt:
            load_weights(model, load_checkpoint(args.ckpt)["model"], f"--ckpt {args.ckpt}")
        model, began = Probe(model, k, classes).to(team.device), time.perf_counter()
        if args.classifier == "sgd":
            last = train_on(args, team, model, images, tests, classes, steps, checkpoint)
        else:
            last = logistic_probe(model, images, tests, classes, args, team)
            last |= dict(images=len(images), seconds=time.perf_counter() - began)
        print(f"first {k} blocks: test top-1 {last['test_top1']:.2f}%", flush=True)
        add_record(args, last, layer=k)


def render(args, team):
    """Write the source's images to OUT/<class>/<number>.png, a folder that ImageFolder reads."""
    from torchvision.io import encode_png
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out}: is not empty; give another folder")
    source = SOURCES[args.source](args, team.device)
    number, width = 0, len(str(int(source.labels.max())))           # alphabetical is numerical
    for part, (images, labels) in enumerate(source.batches(torch.arange(len(source)).split(1000))):
        images = textured(images, args, part) if source.dots else images
        for image, label in zip(images.cpu(), labels.tolist()):
            folder = out / f"{label:0{width}d}"
            folder.mkdir(parents=True, exist_ok=True)
            png = encode_png(image.view(-1, *image.shape[-2:]))
            (folder / f"{number}.png").write_bytes(png.numpy().tobytes())
            number += 1
    save_theta(out.parent / f"{out.name}.json", source)
    print(f"{number} images in {out}, what they were drawn from in {out}.json")


SHEET = {       # for `show` and `bench`: flags of every source
    "1p-frac": dict(),
    "OFDB": dict(categories=16),
    "FractalDB": dict(categories=16, instances=16),
    "RCDB": dict(source="rcdb", categories=16),
    "RCDB, LPCE": dict(source="rcdb"),
    "Visual Atoms": dict(source="va", categories=16),
    "Visual Atoms, LPCE": dict(source="va"),
    "Gaussian": dict(source="gaussian"),
    "uniform": dict(source="uniform"),
    "photograph": dict(source="image"),
    "its edges": dict(source="image", edges="canny"),
}


def show(args, team):
    """Draw the paper's Fig. 2b (rows of delta), Fig. 2c (columns of sigma), Fig. 4 (warps), and a
    sheet of every source."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    def draw(name, title, rows):                # rows of (label, images (n, C, S, S) or (n, S, S))
        columns = max(len(images) for _, images in rows)
        figure = Figure(figsize=(columns, len(rows) + 0.4), layout="constrained")
        for axis, (label, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows):
            images = images.view(len(images), -1, *images.shape[-2:]).float() / 255
            axis.imshow(make_grid(images, columns, pad_value=0.5).permute(1, 2, 0).cpu())
            axis.set(xticks=[], yticks=[])
            axis.set_ylabel(label, rotation=0, ha="right", va="center")
        figure.suptitle(title)
        figure.savefig(out / name, dpi=150, bbox_inches="tight")
        print(out / name)

    def source(**flags):
        flags = argparse.Namespace(**vars(args) | flags)
        made = SOURCES[flags.source](flags, team.device)
        return textured(made.images, flags) if made.dots else made.images

    rows = []
    for delta in (0.001, 0.01, 0.05, 0.1, 0.2, 1.0):
        images = source(delta=delta, L=100)
        mean = images.float().mean(0, keepdim=True).to(images.dtype)
        rows.append((f"$\\Delta$ = {delta:g}", torch.cat([images[:7], mean])))
    draw("fig2b.png", "7 of 100 perturbations, and the average of all 100", rows)

    sigmas = (3.5, 4.0, 4.5, 5.0, 6.0)
    draw("fig2c.png", "$\\sigma$ = " + ", ".join(f"{sigma:g}" for sigma in sigmas), [
        (f"fractal {seed}", torch.cat([source(sigma=sigma, delta=0.0, L=2, fractal_seed=seed)[:1]
                                       for sigma in sigmas]))
        for seed in range(args.fractal_seed, args.fractal_seed + 4)])

    lines = torch.zeros(3, args.canvas, args.canvas, dtype=torch.uint8)
    for k in range(args.canvas // 16, args.canvas, args.canvas // 8):
        lines[:, k], lines[:, :, k] = 255, 255
    rows = []
    photo = photograph(None, args.canvas, "cpu")
    for label, image in (("grid", lines), ("photograph", photo)):
        images = [image[None].float()]
        for kind, base in WARPS.items():
            theta = perturb(base, 0.4, 1, torch.Generator().manual_seed(args.seed))
            grid = warp_grid(kind, theta, args.canvas)
            images.append(F.grid_sample(images[0], grid, align_corners=False).clamp(0, 255))
        rows.append((label, torch.cat(images)))
    draw("fig4.png", f"as it is, {', '.join(WARPS)} ($\\Delta$ = 0.4)", rows)

    draw("sources.png", "eight classes of every source, but of FractalDB eight instances", [
        (label, source(L=16, **SHEET[label])[:8]) for label in SHEET])


def device_name(device):
    """What a record says of the machine: kind of device, processor, threads."""
    processor = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return f"{device} ({processor}, {torch.get_num_threads()} threads)"


def bench(args, team):
    """Speed beside what this machine can do, all measured in one run: the renderer, augmentation,
    the training step, whole pre-training, and pre-training on every source."""
    import resource
    from torch.utils.flop_counter import FlopCounterMode
    device, S, cuda = team.device, args.canvas, team.device.type == "cuda"
    args.steps += args.steps % 2
    args.log_every = args.steps // 2                                # the second half counts
    result = dict(recipe=args.recipe, device=device_name(args.device), torch=torch.__version__)

    def say(*columns):
        if not args.json:
            print("".join(f"{c:<40}" if isinstance(c, str) else f"{c:12.2f}" if c < 10 else
                          f"{c:12.0f}" for c in columns), flush=True)

    def rate(function, work):                                       # a second, the median of 1 s
        function()
        seconds = []
        while sum(seconds) < 1:
            began = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return work / sorted(seconds)[len(seconds) // 2]

    def row(key, name, speed, limit, of):
        result[key] = dict(images_per_s=round(speed, 1), share=round(speed / limit, 3))
        say(name, speed, speed / limit, f"  of {of}")

    def whole(**flags):
        with tempfile.TemporaryDirectory() as folder:
            try:
                with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
                    pretrain(argparse.Namespace(**vars(args) | flags | dict(out=folder)), team)
            except Stopped:
                raise KeyboardInterrupt from None                   # there is nothing to go on with
            return read_log(Path(folder))[-1]["images_per_s"]

    whole()                                                         # warms up
    unit = 1 if sys.platform == "darwin" else 1024
    peak = torch.cuda.max_memory_allocated() if cuda else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    data = torch.ones(2, 2 ** 28, dtype=torch.uint8, device=device)
    copy = rate(lambda: data[0].copy_(data[1]), data.numel())
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    square = torch.randn(2, *2 * [8192 if cuda else 2048], device=device).to(dtype)
    product = rate(lambda: square[0] @ square[1], 2 * square.shape[1] ** 3)
    del data, square
    result |= dict(peak_gb=peak / 1e9, copy_gb_per_s=copy / 1e9, product_tflop_per_s=product / 1e12)
    say(f"limits: copy {copy / 1e9:.0f} GB/s, {args.precision} product {product / 1e12:.2f} "
        f"TFLOP/s; peak memory of pre-training {peak / 1e9:.2f} GB\n")
    say(f"{'':40}    images/s       share")

    base = base_ifs(args.num_maps, args.sigma, args.fractal_seed)
    maps = perturb(base, args.delta, 1000, torch.Generator().manual_seed(0)).to(device)
    probs = determinant(base).abs()
    row("render", "render 512 x 512, 100,000 points",
        rate(lambda: render_ifs(maps, 512, 100_000, "random", None, probs), len(maps)),
        copy / (16 * 100_000 + 512 ** 2), "writing and reading the points, writing the pixels")
    with contextlib.redirect_stdout(None):
        model = make_model(args, team, args.L, args.steps, args.L)
    augment = make_augment(args, args.L, HALF, HALF, True, 0.5)
    images = torch.full((args.batch_size, S, S), GREY, dtype=torch.uint8, device=device)
    labels = torch.arange(args.batch_size, device=device) % args.L
    row("augment", f"texture and augment, {S} to {args.img_size}",
        rate(lambda: augment(textured(images, args), labels), len(images)),
        copy / (S ** 2 + 12 * args.img_size ** 2), "reading and writing them")

    optimizer = make_optimizer(model, args.optimizer, args.lr, args.weight_decay)
    x, target = augment(images, labels)
    if cuda:
        model = compiled(model, x, target, args)

    def step():
        train_step(model, optimizer, x, target, args)

    with FlopCounterMode(display=False) as count, torch.compiler.set_stance("force_eager"):
        step()
    turns = [(rate(step, len(x)), whole()) for _ in range(3)]
    bare, trained = (max(speeds) for speeds in zip(*turns))
    row("step", "training step, on one fixed batch", bare, product * len(x) /
        count.get_total_flops(), "the product")
    row("pretrain", "pre-training, as a whole", trained, bare, "the step")

    say(f"\n{'source':40}     drawn/s   trained/s     of the step")
    result["sources"] = {}
    for label, flags in SHEET.items():
        run = argparse.Namespace(**vars(args) | flags)
        source = SOURCES[run.source](run, device)
        some, began = torch.arange(min(len(source), 64)), time.perf_counter()
        source.draw(some).sum().item()                              # a GPU is done by then
        drawn = len(some) / (time.perf_counter() - began)
        trained = whole(**flags)
        result["sources"][label] = dict(drawn_per_s=round(drawn), trained_per_s=round(trained))
        say(label, drawn, trained, trained / bare)
    if args.json:
        print(json.dumps(result))


def table(args, team):
    """The paper's numbers beside the measured ones, from the runs' records (all tables: into --out
    as well); or, with --plan, the commands that are still to be run."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "results"))
    sys.modules["onepfrac"] = sys.modules[__name__]                 # for its own import of this
    try:
        import tables
    except ImportError:
        raise InputError("table: needs results/tables.py, beside this file") from None
    tables.table(args)


# ==================================================================================================
# 10 · Flags
# ==================================================================================================

def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite number in [low, high], or (low, high] with above=True."""
    def convert(text):
        try:
            value = kind(text)
            good = low <= value <= high and math.isfinite(value) and not (above and value == low)
        except (ValueError, OverflowError):
            good = False
        if not good:
            raise argparse.ArgumentTypeError(
                f"{text!r}: give a {'whole ' * (kind is int)}number {'above' if above else 'from'} "
                f"{low}" + f" to {high}" * (high < math.inf))
        return value
    return convert


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        self.exit(2, f"onepfrac: {message.removeprefix('argument ')}\n")


@functools.lru_cache
def make_parser():
    """All commands and flags; a number whose default is None comes from the recipe (`fill_in`)."""
    parser = Parser(prog="onepfrac.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    whole, rate = functools.partial(number, int), functools.partial(number, float)

    def add(name, text):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        run = command.add_argument_group("run")
        run.add_argument("--recipe", choices=RECIPES, help="default: nano on a CPU, small on a GPU")
        run.add_argument("--seed", type=whole(0, 2 ** 63 - 1), default=0)
        run.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
        run.add_argument("--out", default=f"runs/{name}", help="folder for what the command writes")
        return command, run

    def add_source(command):
        group = command.add_argument_group("Tables 2, 3, 4: what is drawn")
        group.add_argument("--source", choices=SOURCES, default="fractal")
        group.add_argument("--categories", type=whole(1), default=1,
                           help="1: one image and its perturbations; more: a data base (Table 2)")
        group.add_argument("--instances", type=whole(1, 1000), default=1, help="of each category")
        group = command.add_argument_group("Tables 5, 6, 7: the LIEP distribution")
        group.add_argument("--delta", type=rate(0), default=0.1, help="side of the cube of eps")
        group.add_argument("--sigma", type=rate(0, above=True), default=3.5, help="sigma-factor")
        group.add_argument("--L", type=whole(2), help="perturbations, which are the classes")
        group.add_argument("--noise", choices=("additive", "multiplicative"), default="additive",
                           help="additive: the paper; multiplicative: the authors' code")
        group = command.add_argument_group("Tables 11, 12: one real image (--source image)")
        group.add_argument("--image", metavar="FILE", help="default: matplotlib's photograph")
        group.add_argument("--edges", choices=("none", "canny"))
        group.add_argument("--warp", choices=WARPS)
        group = command.add_argument_group("the picture")
        group.add_argument("--fractal-seed", type=whole(0, 2 ** 63 - 1), default=32,
                           help="which fractal, contour, cloud or data base")
        group.add_argument("--num-maps", type=whole(2), default=2, help="N of Eq. 1")
        group.add_argument("--canvas", type=whole(16, 4096), help="pixels a side that are drawn")
        group.add_argument("--points", type=whole(1), help="points of the chaos game an image")
        group.add_argument("--texture", choices=("random", "fill", "point"), help="of each point")

    def add_reading(group):
        group.add_argument("--root", default="data", help="where the images are, or are put")
        group.add_argument("--workers", type=whole(0), default=2, help="processes that read images")

    def add_training(command, run):
        run.add_argument("--resume", action="store_true", help="go on with the run in --out")
        run.add_argument("--save-every", type=whole(1), default=1000, help="steps")
        run.add_argument("--log-every", type=whole(1), default=50, help="steps")
        run.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
        group = command.add_argument_group("network")
        group.add_argument("--model", choices=MODELS)
        group.add_argument("--img-size", type=whole(1))
        group.add_argument("--patch-size", type=whole(1))
        group.add_argument("--drop-path", type=rate(0, 0.99))
        group = command.add_argument_group("optimisation (literal numbers, global batch)")
        group.add_argument("--batch-size", type=whole(1))
        group.add_argument("--lr", type=rate(0, above=True), help="peak, used as it is")
        group.add_argument("--weight-decay", type=rate(0))
        group.add_argument("--warmup", type=rate(0, 0.9), help="fraction of the steps")
        group.add_argument("--optimizer", choices=("adamw", "sgd"))
        group.add_argument("--clip-grad", type=rate(0), help="norm; 0: none")
        group = command.add_argument_group("Table 9: augmentation")
        for name in SWITCHES:
            group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
        group.add_argument("--crop-scale", type=rate(0, 1, above=True), nargs=2,
                           metavar=("LOW", "HIGH"), help="area of the crop")
        group.add_argument("--smoothing", type=rate(0, 1), help="label smoothing")

    def add_pretraining(name, text, steps=None):
        command, run = add(name, text)
        run.add_argument("--steps", type=whole(1), default=steps)
        add_source(command)
        add_training(command, run)
        group = command.add_argument_group('Tables 13, 14: "w/ Aug.", and --source folder')
        group.add_argument("--fresh-texture", action="store_true",
                           help="new random 3x3 masks every step")
        add_reading(group)
        return run

    def add_transfer(name, text):
        command, run = add(name, text)
        run.add_argument("--ckpt", help="weights to start from; without: random ones")
        run.add_argument("--epochs", type=rate(0, above=True))
        run.add_argument("--record", metavar="FILE", help="append this run to it as a line of JSON")
        add_training(command, run)
        group = command.add_argument_group("Tables 13, 14: data")
        group.add_argument("--data", choices=("folder", *DATASETS), default="cifar100")
        add_reading(group)
        group.add_argument("--train-per-class", type=whole(1), help="a fixed balanced subset")
        group.add_argument("--holdout", type=rate(0, 0.9), default=0.0,
                           help="share of the training images to test on instead of the test set")
        group.add_argument("--eval-epochs", type=rate(0, above=True), default=5,
                           help="test this often")
        return command

    add_pretraining("pretrain", pretrain.__doc__)
    add_transfer("finetune", finetune.__doc__)
    group = add_transfer("probe", probe.__doc__).add_argument_group("Fig. 3: linear probing")
    group.add_argument("--layers", type=whole(1), nargs="+", metavar="k", default=[1, 2, 3, 4, 6])
    group.add_argument("--classifier", choices=("sgd", "lbfgs"), default="sgd",
                       help="sgd with augmentation (Fig. 3), or logistic regression by L-BFGS, its "
                            "regularisation chosen on a fifth of the training images")
    command, run = add("render", render.__doc__)
    add_source(command)
    add_reading(run)
    add_source(add("show", show.__doc__)[0])
    run = add_pretraining("bench", bench.__doc__, steps=40)
    run.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    run = add("table", table.__doc__)[1]
    run.add_argument("names", nargs="*", metavar="NAME",
                     help="as table5, fig3, fractals; default: all")
    run.add_argument("--records", metavar="FILE", default="results/runs.jsonl")
    run.add_argument("--plan", action="store_true", help="print the commands that are missing")
    run.set_defaults(out="results/tables")
    return parser


def check_source(args):
    """Refuse what --source cannot do."""
    if args.command in ("show", "bench") and (args.source != "fractal" or args.categories > 1):
        raise InputError(f"--source, --categories: {args.command} goes through all by itself")
    for name, default in (("image", None), ("edges", "none"), ("warp", "affine")):
        if args.source != "image" and getattr(args, name) is not None:
            raise InputError(f"--{name}: only with --source image")
        setattr(args, name, getattr(args, name) or default)
    if getattr(args, "fresh_texture", False) and (
            args.source not in ("fractal", "gaussian", "uniform") or args.texture != "random"):
        raise InputError("--fresh-texture: there is no texture to draw anew; it needs a source of "
                         "dots, and no --texture but random")
    if args.categories > 1 and args.source not in ("fractal", "rcdb", "va"):
        raise InputError(f"--categories: --source {args.source} has none to count; leave it out")
    if args.instances > 1 and args.categories == 1:
        raise InputError("--instances: needs --categories above 1; perturbations of one image are "
                         "counted by --L")
    if args.noise == "multiplicative" and args.warp == "elastic":
        raise InputError("--noise multiplicative: leaves the zeros of --warp elastic what they are")
    if args.command == "render" and args.source == "folder":
        raise InputError("--source folder: its images are files already")


def fill_in(args):
    """Give every flag that was left out its number from the recipe, and refuse what cannot be."""
    recipe = RECIPES[args.recipe]
    if getattr(args, "ckpt", None):                                 # the network that was saved
        saved = load_checkpoint(args.ckpt).get("args", {})
        recipe = recipe | {k: saved[k] for k in ("model", "img_size", "patch_size") if k in saved}
    numbers = recipe | recipe.get(args.command, recipe["pretrain"])
    if getattr(args, "fresh_texture", False):                       # masks are what can be fresh
        numbers |= dict(texture="random")
    numbers |= {name: name in numbers["augment"].split() for name in SWITCHES}
    for name, value in numbers.items():
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, value)
    if hasattr(args, "patch_size") and args.img_size % args.patch_size:
        raise InputError(f"--patch-size {args.patch_size}: must divide --img-size {args.img_size}")
    if hasattr(args, "crop_scale") and args.crop_scale[0] > args.crop_scale[1]:
        raise InputError("--crop-scale: LOW must not be above HIGH")
    if hasattr(args, "source"):
        check_source(args)
    if hasattr(args, "sigma") and args.sigma > 3 * args.num_maps:
        raise InputError(f"--sigma {args.sigma}: at most 3 for each map, so 3 x --num-maps "
                         f"= {3 * args.num_maps}")


def resolve(args):
    """Choose the device, the precision and the recipe where no flag did, and fill in the rest."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if args.device == "auto":
        args.device = next(name for name, there in available.items() if there)
    elif not available[args.device]:
        raise InputError(f"--device {args.device}: there is none here; try --device auto")
    chosen = args.recipe is None
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    if args.world > 1 and args.command not in ("pretrain", "finetune"):
        raise InputError(f"{args.command}: runs in one process; start it without torchrun")
    args.recipe = args.recipe or ("small" if args.device == "cuda" else "nano")
    fill_in(args)
    if getattr(args, "precision", None) == "auto":
        args.precision = pick_precision(torch.device(args.device))
    if hasattr(args, "batch_size") and args.batch_size % args.world:
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of the "
                         f"{args.world} processes")
    if os.environ.get("RANK", "0") == "0" and args.command != "table":
        print(f"recipe {args.recipe}" + (" (chosen for this device)" if chosen else ""), flush=True)
    return torch.device(args.device)


def keep_memory():
    """Tell glibc to keep what is freed. Else large blocks go back to the system, and each page of
    the next one is a fault: on two cores a tenth of a training step, a third of rendering."""
    with contextlib.suppress(OSError, AttributeError):              # another C library
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-1, 2 ** 31 - 1), (-4, 0)):          # M_TRIM_THRESHOLD, M_MMAP_MAX
            libc.mallopt(option, value)


def main(argv=None):
    """Run one command -> exit status."""
    args = make_parser().parse_args(argv)
    keep_memory()
    try:
        globals()[args.command](args, join_team(resolve(args)))
    except InputError as error:     # one from a worker process comes wrapped in its traceback
        print(f"onepfrac: {str(error).strip().split('InputError: ')[-1]}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"onepfrac: {stopped.args[0]}", file=sys.stderr)
        return 128 + stopped.args[1]                                # what shells expect
    except KeyboardInterrupt:       # before there was anything to save
        print("onepfrac: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:         # whoever read the output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except torch.OutOfMemoryError:
        print("onepfrac: --batch-size: the GPU's memory is full; lower it", file=sys.stderr)
        return 2
    except OSError as error:        # a full disk, a file where a folder should be, no permission
        file = str(error.filename or args.out)
        flags = [f"--{name} {value}" for name in ("record", "records", "root", "out")
                 if (value := getattr(args, name, None)) and value in file]
        print(f"onepfrac: {(*flags, '--out')[0]}: {error}", file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
