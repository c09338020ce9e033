"""onepfrac: pre-train a Vision Transformer on perturbed copies of one fractal.

A single-file reference of "Scaling Backwards: Minimal Synthetic Pre-training?" (Nakamura et al.,
ECCV 2024). The paper calls its dataset 1p-frac, "1-parameter Fractal as Data". The idea:

    An image is drawn from a few numbers. A class is one small perturbation of them.
    Pre-training is telling the perturbations apart.

    python onepfrac.py pretrain --delta 0.1 --sigma 3.5         # one fractal -> a ViT
    python onepfrac.py finetune --ckpt runs/pretrain/last.pt    # that ViT -> CIFAR-100
    python onepfrac.py finetune --out runs/scratch              # the same from scratch

Result of recipe nano on CIFAR-100, 250 images a class, three seeds: top-1 35.4% from the fractal
(standard deviation 0.6), 23.1% (0.4) from scratch. Pre-training saw 1.3 million crops of 64 images.

Part One is the whole method, to be read from top to bottom:
    1 fractals       what an iterated function system is, and how complex it is
    2 drawing        from a system to an image: the chaos game, the raster, the texture
    3 classes        why one fractal makes a thousand classes: the LIEP distribution, the LPCE loss
    4 network        a Vision Transformer
    5 augmentation   crops, flips, erasing, mixup and cutmix, on the device
    6 training       one step, the loop around it, evaluation
    7 commands       pretrain and finetune
Part Two is the rest, to be looked up:
    A RandAugment and colour jitter      B other images      C downstream datasets
    D runs: folder, checkpoint, resume   E probe, render     F settings
"""
import argparse
import contextlib
import ctypes
import functools
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
# If the maps contract, exactly one shape is made of its own images under the maps. This shape is
# the attractor, a fractal: it consists of small distorted copies of itself.

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
    for j in range(num_maps):
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
# The chaos game draws the attractor. For one system, point by point:
#
#     v = (0, 0)
#     for step in range(500 + points):
#         j = random map, chosen with probability p_j         # in proportion to |det A_j|
#         v = A_j v + t_j
#         if step >= 500:                                     # (0, 0) is forgotten by now
#             plot(v)
#
# Why it works: the maps take points of the attractor to points of the attractor, and they contract,
# so other points come closer with each step. The less a map shrinks areas, the more often it is
# chosen, so the dots lie evenly. (A perturbed map may expand and throw some points far out.) Each
# image is stretched to its own box, to fill the canvas wherever and however large the shape is. All
# images share one random sequence of maps. With its own each would have its own pattern of dots,
# and the network could know it by that and ignore the shape. (So does a fixed texture: section 3.)
#
# For speed, many short orbits (paths of a point) run side by side, all through one table of random
# maps: at each step orbit k uses entry offset + k, with a new random offset. (0, 0) is forgotten
# only after hundreds of steps, as systems that fill a canvas have a map near a rotation. A short
# orbit cannot spend them one by one, so it first runs through four "words", products of 128 maps.

ORBIT = 150  # steps of each orbit that are drawn
DOUBLINGS = 7  # a word is a product of 2^7 = 128 random maps
BURN_IN = 3  # words after the first, so (1 + 3) x 128 = 512 steps
PLACES = 1024  # an offset is in 1..1024
GREY = 127  # of the dots
# At most so many numbers in the orbits, and so many points plus pixels in the rasters, at once.
IN_FLIGHT = {"cpu": (28_000_000, 3_000_000), "cuda": (70_000_000, 100_000_000)}


def map_table(probs, points, generator=None):
    """A table j (..., M) of indices of random maps, and a list of offsets: one for each doubling,
    each word of the burn-in, each step. M is the number of orbits plus PLACES. Stratified: map i
    fills its share of probs (..., N) of the table, up to rounding: below 1 / M it may not occur."""
    M = -(-points // ORBIT) + PLACES
    draws = torch.rand(M, generator=generator, dtype=torch.float64)
    draws = (torch.randperm(M, generator=generator) + draws) / M
    offsets = 1 + torch.randint(PLACES, (DOUBLINGS + BURN_IN + ORBIT,), generator=generator)
    ends = probs.cpu().double().clamp(min=1e-9).cumsum(-1)
    draws = draws.expand(*ends.shape[:-1], M).contiguous()
    return torch.searchsorted(ends / ends[..., -1:], draws, right=True), offsets.tolist()


def chaos_game(maps, j, offsets):
    """Orbits of B systems at once: maps (B, N, 2, 3) -> points (2, B, ORBIT, K), K orbits each.
    j (M,) or (B, M) and offsets come from `map_table`."""
    B, M, K = len(maps), j.shape[-1], j.shape[-1] - PLACES
    out = maps.new_empty(2, B, ORBIT, K)
    index = j.to(maps.device).expand(3, 2, B, M)
    table = maps.permute(3, 2, 0, 1).gather(3, index)  # (3, 2, B, M): the columns of [A t]
    words = table[..., :max(K, 128)]  # 128 or more for a word
    for offset in offsets[:DOUBLINGS]:  # apply word[k], then word[k + offset]
        A_x, A_y, t = words.roll(-offset, -1)
        words = (A_x * words[:, :1]).addcmul_(A_y, words[:, 1:])
        words[2] += t
    A_x, A_y, v = words  # v: where the first word takes (0, 0)
    for offset in offsets[DOUBLINGS:DOUBLINGS + BURN_IN]:  # on another orbit's point
        x, y = v.roll(offset, -1)
        v = torch.addcmul(words[2], A_x, x).addcmul_(A_y, y)
    v = v[..., :K]
    for step, offset in enumerate(offsets[DOUBLINGS + BURN_IN:]):
        A_x, A_y, t = table[..., offset:offset + K]  # (2, B, K) each
        v = torch.addcmul(t, A_x, v[0], out=out[:, :, step]).addcmul_(A_y, v[1])
    return out


def rasterize(points, size, low, high, clip):
    """Points (2, B, P) -> images (B, size, size) uint8, GREY where a point hits, y upwards. The box
    from low to high (2, B) is stretched to fill the canvas but for a margin of 6 pixels in 512.
    clip: do not draw points that lie outside, or are infinite. The points are overwritten."""
    margin = max(1, 6 * size // 512)
    scale = (size - 1 - 2 * margin) / (high - low).clamp(min=1e-6)  # (2, B)
    scale[1] *= -1  # image rows grow downwards
    corner = torch.stack([low[0], high[1]])  # the upper left one
    pixel = points.sub_(corner[..., None]).mul_(scale[..., None]).round_()
    inside = ((pixel >= 0) & (pixel < size - 2 * margin)).all(0) if clip else None
    cell = pixel[0].add_(pixel[1], alpha=size).long()  # exact below 2^24
    if clip:
        cell.masked_fill_(~inside, size - 2 * margin)  # cleared below
    hits = torch.zeros(points.shape[1], size ** 2, dtype=torch.uint8, device=points.device)
    canvas = hits[:, margin * (size + 1):]  # where pixel (0, 0) is
    canvas.scatter_(1, cell, hits.new_full((1, 1), GREY).expand(cell.shape))
    canvas[:, size - 2 * margin] = 0
    return hits.view(-1, size, size)


def dilate(images, out=None):
    """Each lit pixel grows to its 3x3 neighbourhood: images (B, S, S) uint8 -> the same."""
    rows = F.pad(images, (1, 1, 1, 1))
    rows = (rows[:, :-2] | rows[:, 1:-1]).bitwise_or_(rows[:, 2:])
    return torch.bitwise_or(rows[:, :, :-2] | rows[:, :, 1:-1], rows[:, :, 2:], out=out)


def stamp(images, generator=None):
    """Give dilated images (B, S, S) their random texture, in place.

    The authors stamp each point with one of the 511 non-empty 3x3 masks, and later stamps overwrite
    earlier ones. So a covered pixel is a coin flip, lit with probability 256/511. Here it is 1/2:
    an image is the dilated points times a mask of coin flips, and a new texture is a new mask.
    """
    bit = 2 ** torch.arange(8, dtype=torch.uint8, device=images.device)
    pixels = images[0].numel()
    size = max(1, 2 ** 20 // pixels)
    for group in images.split(size):
        # Always draw a full group: an image's texture must not depend on the number of images.
        draw = torch.empty(-(-size * pixels // 64), dtype=torch.int64, device=images.device)
        draw = draw.random_(-2 ** 63, None, generator=generator).view(torch.uint8)
        coin = (draw & bit[:, None]).ne_(0)
        group.mul_(coin.view(-1)[:group.numel()].view_as(group))


def render_ifs(maps, size=512, points=100_000, texture="random", generator=None, probs=None):
    """Draw attractors: maps (L, N, 2, 3) -> grey images (L, size, size) uint8 on maps.device.

    texture: "random" 3x3 masks (the authors), "fill" whole 3x3 stamps, "point" single pixels.
    generator (CPU): of the shared sequence of maps and the texture. probs (N,) or (L, N): of the
    maps, by default in proportion to the mean |det A|. To draw in parts, give each the same probs,
    an equal generator and "fill", then `stamp` all. A system without an attractor runs away in the
    burn-in and gives a nearly blank image. Points are rounded up to whole orbits.
    """
    if maps.ndim != 4 or maps.shape[2:] != (2, 3) or not len(maps) or not maps.isfinite().all():
        raise ValueError("need finite maps (L, N, 2, 3)")
    probs = maps[..., :2].cpu().det().abs().mean(0) if probs is None else probs
    if probs.shape not in (maps.shape[:2], maps.shape[1:2]) or not 8 <= size <= 4096 \
            or points < 1 or texture not in ("random", "fill", "point"):
        raise ValueError("need probs (N,) or (L, N), size 8 to 4096, points >= 1, and a texture")
    j, offsets = map_table(probs, points, generator)
    images = torch.empty(len(maps), size, size, dtype=torch.uint8, device=maps.device)
    numbers, dots = IN_FLIGHT.get(maps.device.type, IN_FLIGHT["cpu"])
    group = max(1, numbers // (2 * points + 6 * j.shape[-1]))
    part = max(1, dots // (points + size ** 2))
    for first in range(0, len(maps), group):
        table = j if j.ndim == 1 else j[first:first + group]
        orbits = chaos_game(maps[first:first + group], table, offsets).flatten(2)
        for cloud, out in zip(orbits.split(part, 1), images[first:first + group].split(part)):
            low, high = cloud.amin(2), cloud.amax(2)
            clip = not (high - low).isfinite().all()  # an orbit ran away
            hits = rasterize(cloud, size, low, high, clip)
            out.copy_(hits) if texture == "point" else dilate(hits, out=out)
    if texture == "random":
        seed = int(torch.randint(2 ** 24, (), generator=generator))  # alike in all torch versions
        stamp(images, torch.Generator(maps.device).manual_seed(seed))
    return images


# ==== 3 · Classes: the LIEP distribution and the LPCE loss (Eq. 6-9) ==============================
# To copy `perturb` and `lpce_loss`: import torch, torch.nn.functional as F
#
# One image is one class, and with one class there is nothing to learn (Eq. 6). So the paper draws L
# perturbations eps of the fractal's numbers and makes each a class. The paper names this the LIEP
# distribution, "locally integrated empirical": it is uniform over pairs (image of maps + eps, eps),
# with eps from a cube of side Delta (Eq. 7). The loss, LPCE or "locally perturbed cross entropy"
# (Eq. 8), is plain cross entropy whose classes are the perturbations. Labels are arbitrary numbers,
# 0 to L - 1: the network names the index of eps, and never predicts eps itself.
#
# Each class has exactly one image. All variety within a class comes from augmentation, above all
# from random crops: telling them apart takes features that hold at every place and scale. Without
# crops nano learns its task to 100% and transfers less; the paper's 84.2% falls to 80.1%.
#
# A fixed random texture gives a class away: its coin flips differ from image to image and never
# change. The authors use one, and recipe small as well. New coins at each step: `--fresh-texture`,
# and images that do not fit into KEEP_BYTES. Whole stamps (recipe nano) have no texture.
#
# FractalDB and OFDB, older datasets of fractals, are the same program at other settings: they have
# many fractals ("categories"), and the label is the category. FractalDB has 1,000 images of each,
# OFDB one (section B).

def perturb(maps, delta, L, generator=None, noise="additive"):
    """L draws from the cube around a system: maps (N, 2, 3) -> (L, N, 2, 3), Eq. 9; any shape.

    noise: "additive" (the paper): each number plus U(-delta/2, delta/2). "multiplicative" (the
    authors' code): each number times U(1 - delta, 1 + delta). Draw k is the same for every L.
    """
    if noise not in ("additive", "multiplicative"):
        raise ValueError(f"noise must be additive or multiplicative, got {noise!r}")
    unit = torch.rand(L, *maps.shape, generator=generator).to(maps.device) - 0.5
    return maps + delta * unit if noise == "additive" else maps * (1 + 2 * delta * unit)


def lpce_loss(logits, target):
    """Locally perturbed cross entropy, Eq. 8: -E log p(eps | image). logits (B, L); target (B,),
    the indices of the perturbations, or (B, L), soft labels after mixup and cutmix."""
    return F.cross_entropy(logits, target)


KEEP_BYTES = 6 * 2 ** 30  # what fits in here is drawn once and kept


class Data:
    """n labelled images. data[i], for indices i (B,) on the CPU: uint8 images (B, S, S) or
    (B, C, S, S) and labels (B,), on the device.

    draw(i) makes the images, once if all fit into KEEP_BYTES, else each time. texture: what `stamp`
    adds, "random" when images are drawn, "fresh" at each data[i]. numbers: kept in omega.json.
    """

    def __init__(self, labels, draw, device, texture=None, **numbers):
        self.labels, self.draw, self.device = labels.to(device), draw, device
        self.numbers, self.images = numbers, None
        first = draw(torch.arange(1))
        self.group = max(1, min(500, 2 ** 25 // first.numel()))
        if len(labels) * first.numel() <= KEEP_BYTES:
            self.images = first.new_empty(len(labels), *first.shape[1:])
            for i in torch.arange(len(labels)).split(self.group):
                self.images[i[0]:i[-1] + 1] = draw(i)
            if texture == "random":
                stamp(self.images)  # seeded in B
        self.fresh = texture == "fresh" or (texture == "random" and self.images is None)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        [index] = send(self.device, i)  # section 5
        images = torch.cat([self.draw(k) for k in i.split(self.group)]) \
            if self.images is None else self.images.index_select(0, index)
        if self.fresh:
            stamp(images)
        return images, self.labels[index]


def base_ifs(num_maps, sigma, seed):
    """The one fractal of a run -> maps (N, 2, 3), with a sigma-factor within 0.1 of sigma. It fills
    at least a fifth of a canvas. The authors drew theirs without a seed and never published it."""
    if sigma > 3 * num_maps:
        raise InputError(f"--sigma {sigma}: at most 3 x --num-maps = {3 * num_maps}")
    generator = seeded(seed)  # section 6
    def propose():
        target = 0
        while not 0 < target < 3 * num_maps:
            target = sigma + 0.2 * (torch.rand((), generator=generator).item() - 0.5)
        return sample_ifs(num_maps, target, generator)[None]
    def draw(maps):
        return render_ifs(maps, 512, 100_000, "fill", seeded(seed))
    return first_filled(1, propose, draw, 0.2, f"--sigma {sigma}")[0]  # rejection: B


def draw_ifs(maps, probs, args):
    """The images of systems (B, N, 2, 3), all drawn from the same random numbers."""
    texture = "point" if args.texture == "point" else "fill"  # `Data` adds random masks
    return render_ifs(maps, args.canvas, args.points, texture, seeded(args.seed, "maps"), probs)


def fractal_data(args):
    """1p-frac: L perturbed copies of one fractal, each a class of its own -> Data."""
    base = base_ifs(args.num_maps, args.sigma, args.fractal_seed)
    probs = base[..., :2].det().abs()  # before perturbation
    draw = functools.partial(draw_ifs, probs=probs, args=args)
    # An eps whose image covers less than 5% is rejected, as by the authors; 10% if masks will light
    # half of it. The CPU decides, so that all devices agree.
    generator = seeded(args.seed, "eps")
    propose = functools.partial(perturb, base, args.delta, 128, generator, args.noise)
    share = 0.1 if args.texture in ("random", "fresh") else 0.05
    maps = first_filled(args.L, propose, draw, share, f"--delta {args.delta}, --points")
    return Data(torch.arange(args.L), lambda i: draw(maps[i].to(args.device)), args.device,
                args.texture, base=base, eps=maps - base)


# ==== 4 · Network: a Vision Transformer (Dosovitskiy et al., 2021), parameter names as in timm ====
# To copy this section: import torch, torch.nn as nn, torch.nn.functional as F
#
# The image is cut into patches. Each patch becomes a vector, a token, and a position embedding is
# added to it. One more token, cls, stands for the whole image: the classifier reads it at the end.

MODELS = {"vit_nano": (96, 6, 3), "vit_tiny": (192, 12, 3),  # dim, depth, heads
          "vit_small": (384, 12, 6), "vit_base": (768, 12, 12)}


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
        self.img_size = img_size
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
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)  # (B, D, H, W) -> (B, HW, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)  # (B, 1 + HW, D)
        return x + self.pos_embed

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x)))[:, 0])


# ==== 5 · Augmentation: DeiT's (arXiv 2012.12877), on a batch that is already on the device =======
# To copy this section (with A): import math, torch, torch.nn.functional as F
#                                from torchvision.transforms.v2 import functional as T
#
# Every sample gets its own crop, flips, RandAugment and erased box. Crops of random place and scale
# make the task of section 3 hard. Mixup and cutmix blend each image, and its target, with another
# image of the batch. What is done, and where, is chosen on the CPU, and the pixels stay on the
# device, so nothing waits for a GPU. All random numbers come from torch's default generators, which
# the loop of section 6 seeds at each step.

def send(device, *tensors):
    """CPU tensors to the device. With CUDA the copies are queued and the CPU does not wait."""
    return [t.to(device, non_blocking=torch.device(device).type == "cuda") for t in tensors]


def resample_rows(x, start, length, size):
    """Antialiased cubic resampling of the rows [start, start + length) of each image:
    (B, C, H, W) -> (B, C, size, W).

    start, length (B,): whole pixels. length < 0 is a flip: rows [start + length, start) backwards.
    Keys' kernel, a = -0.5, widened to shrink, cut off at the box, normalised: as torchvision does.
    """
    B, C, H, W = x.shape
    start, length = start[:, None], length[:, None]
    scale = length / size
    centre = start - 0.5 + (torch.arange(size, device=x.device) + 0.5) * scale  # (B, size)
    width = scale.abs().clamp(min=1)
    taps = min(H, math.ceil(4 * max(1, H / size)))  # rows under the widest kernel
    first = (centre - 2 * width).ceil_().clamp_(0, H - taps)
    row = first[..., None] + torch.arange(taps, device=x.device)  # (B, size, taps)
    d = (row - centre[..., None]).div_(width[..., None]).abs_()
    # With u = max(2 - d, 0) and v = max(u - 1, 0) the kernel's two pieces are one polynomial.
    u = (2 - d).clamp_(min=0)
    v = (u - 1).clamp_(min=0)
    weight = u * u * (u - 1) + v * v * (2 - 4 * v)  # twice the kernel
    middle = start + (length - 1) / 2
    weight *= (row - middle[..., None]).abs_() < length.abs()[..., None] / 2  # in the box
    weight /= weight.sum(-1, keepdim=True)
    # embedding_bag, made for word vectors, is PyTorch's weighted sum of some rows of a matrix.
    image = torch.arange(B * C, device=x.device).view(B, C, 1, 1)
    row, weight = row.long()[:, None] + H * image, weight[:, None].expand(B, C, size, taps)
    return F.embedding_bag(row.view(-1, taps), x.reshape(B * C * H, W), mode="sum",
                           per_sample_weights=weight.reshape(-1, taps)).view(B, C, size, W)


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
        if self.randaug:
            x = rand_augment(x)  # section A
        if self.jitter:
            x = color_jitter(x, self.jitter)
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
        [(mean, std)] = send(x.device, 255 * torch.tensor([self.mean, self.std]).view(2, 3, 1, 1))
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
        flip = (torch.rand(2, B) < torch.tensor(self.flip[::-1])[:, None]) & random  # rows, columns
        boxes = torch.stack([start + flip * length, torch.where(flip, -length, length)], 1)
        [boxes] = send(x.device, boxes)
        for start, length in boxes:
            x = resample_rows(x, start, length, self.img_size).transpose(2, 3)
        return x.contiguous().clamp_(0, 255).round_()

    def random_erase(self, x):
        """A box of 2% to a third of each square becomes N(0, 1) noise, in place (Zhong et al.)."""
        B, C, S, _ = x.shape
        start, length = random_boxes(B, S, (0.02, 1 / 3), (0.3, 1 / 0.3))
        length *= torch.rand(B) < self.erase  # else a box without pixels
        noise = torch.randn(C * int(length.long().prod(0).sum()), device=x.device)
        start, end = send(x.device, start[..., None], (start + length)[..., None])  # (2, B, 1)
        pixel = torch.arange(S, device=x.device)
        rows, columns = (pixel >= start) & (pixel < end)
        return x.masked_scatter_(rows[:, None, :, None] & columns[:, None, None], noise)

    def mix(self, x, target):
        """Mixup: lambda x + (1 - lambda) x.flip(0). Cutmix, in place: a box of x.flip(0) in x. One
        lambda ~ Beta for the batch. After cutmix it is the share of the image outside the box."""
        S = x.shape[-1]
        cut = self.cutmix and (not self.mixup or bool(torch.rand(()) < 0.5))
        alpha = torch.tensor(float(self.cutmix if cut else self.mixup))
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
# where rank is 0 to world - 1 if several processes share the images out. No generator has a state
# that lasts longer than a step, and images are drawn again from the flags. So with the weights,
# optimizer state, step and log of a checkpoint a resumed run has the same bits on a CPU as one
# without a break. (On a GPU some sums depend on the order of threads.) Rank 0, the lead, writes.

def seed_for(*key):
    """A 31-bit seed from any key of numbers and strings, the same on every machine."""
    return zlib.crc32(repr(key).encode()) >> 1


def seeded(*key):
    """A generator on the CPU, seeded by a number as it is, or by any longer key."""
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
    """AdamW, or SGD with Nesterov momentum. Only weight matrices decay: no biases, norms, cls token
    or position embeddings."""
    groups = [dict(params=[], weight_decay=args.weight_decay), dict(params=[], weight_decay=0.0)]
    for key, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim <= 1 or key in ("cls_token", "pos_embed")]["params"].append(p)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.999), fused=True)


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up over `warmup` steps, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def predict(network, x, args):
    """Logits of images (B, 3, S, S), computed in --precision -> (B, C) float32."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        return network(x).float()


def train_step(network, optimizer, x, target, rate, args):
    """One step on images (B, 3, S, S) and soft targets (B, C) -> loss, logits (B, C)."""
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
    optimizer, network = make_optimizer(model, args), accelerate(model, args)  # section D
    warmup = round(args.warmup * steps)
    model.train()
    with Run(args, model, optimizer, steps) as run:  # log, checkpoint, Ctrl-C: D
        for step in range(run.step, steps):
            i = batch_indices(len(data), args.batch_size, step, args.seed)[args.rank::args.world]
            torch.manual_seed(seed_for(args.seed, "step", step, args.rank))
            images, labels = data[i]
            x, target = augment(images, labels)
            rate = learning_rate(step, steps, warmup, args.lr)
            loss, logits = train_step(network, optimizer, x, target, rate, args)
            if step == 0:
                run.save_samples(x, augment)
            run.log_step(loss, logits, target, rate)  # and run.step += 1
            if tests and run.at(max(1, round(args.eval_epochs * len(data) / args.batch_size))):
                top1 = evaluate(model, tests, augment, args)
                run.report(f"test top-1 {top1:.2f}%", test_top1=top1)
            run.save_or_stop()


@torch.no_grad()
def evaluate(model, data, augment, args):
    """Top-1 accuracy in percent, each rank testing its share of the images."""
    model.eval()
    right = torch.zeros((), device=args.device)
    for i in torch.arange(len(data))[args.rank::args.world].split(500):
        images, labels = data[i]
        right += (predict(model, augment.plain(images), args).argmax(1) == labels).sum()
    if args.world > 1:
        torch.distributed.all_reduce(right)
    model.train()
    return 100 * right.item() / len(data)


# ==== 7 · Commands: pretrain and finetune =========================================================
#
# Both make labelled images, a network and an augmentation, and train. Fine-tuning takes real images
# and a checkpoint's weights (all but the head, the classifier on top), and tests. Up-down flips go,
# boxes are erased half as often, and some defaults differ (section F).

def make_model(args, classes):
    """The network with its initial weights."""
    dim, depth, heads = MODELS[args.model]
    torch.manual_seed(seed_for(args.seed, "weights"))
    with blaming("--patch-size"):  # makes it one line: D
        return ViT(args.img_size, args.patch_size, classes, dim, depth, heads, args.drop_path)


def make_augment(args, classes, **more):
    """The augmentation that the switches of Table 9, 0 or 1, ask for; more: what a command adds."""
    return Augment(
        args.img_size, classes, args.crop, args.aspect, (args.min_crop, 1), randaug=args.randaug,
        jitter=0.4 * args.jitter, mixup=0.8 * args.mixup, cutmix=1.0 * args.cutmix,
        smoothing=args.smoothing, **more)


def pretrain(args):
    """Pre-train on the images of --source, by default L perturbed copies of one fractal."""
    open_run(args)
    data = source_data(args)  # section 3, or B
    if args.lead and not args.resume:
        write_json(Path(args.out) / "omega.json", data.numbers)
    classes = int(data.labels.max()) + 1
    augment = make_augment(args, classes, flip=(args.flip / 2,) * 2, erase=args.erase / 2)
    train(args, make_model(args, classes).to(args.device), data, augment, args.steps)


def finetune(args, layers=None):
    """Fine-tune a checkpoint on --data, or train from scratch without one."""
    open_run(args)
    data, tests, classes = downstream_data(args)  # section C
    model = make_model(args, classes)
    if args.ckpt and not args.resume:
        load_weights(model, args.ckpt)  # all but the head: D
    if layers:  # `probe`, section E
        model = Probe(model, layers, classes)
    augment = make_augment(args, classes, flip=(args.flip / 2, 0), erase=args.erase / 4, **IMAGENET)
    steps = math.ceil(args.epochs * len(data) / args.batch_size)
    train(args, model.to(args.device), data, augment, steps, tests)


# ################# END OF PART ONE: this is the whole method. PART TWO: the rest ##################

# ==== A · RandAugment and colour jitter (for `Augment`, section 5) ================================
# To copy this section: with 5
#
# Of the fifteen operations six change each pixel for itself, four blend with a degenerate image,
# five are affine maps. Images are floats that hold 0..255. Choices are on the CPU.

PIXEL_OPS = {  # of x (B, C, H, W), op and level (B, 1, 1, 1) in 0..1
    "autocontrast": lambda x, op, level: T.autocontrast(x.to(torch.uint8)).float(),
    "equalize": lambda x, op, level: T.equalize(x.to(torch.uint8)).float(),
    "invert": lambda x, op, level: 255 - x,
    "posterize": lambda x, op, level: x - x % 2 ** (4 + (4 * level).floor()),  # to 4 .. 0 bits
    "solarize": lambda x, op, level: torch.where(x < 256 - (256 * level).floor(), x, 255 - x),
    "solarize_add": lambda x, op, level: (x + (x < 128) * (110 * level).floor()).clamp(max=255),
}
BLEND_OPS = ("brightness", "color", "contrast", "sharpness")
AFFINE_OPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPS = (*PIXEL_OPS, *BLEND_OPS, *AFFINE_OPS)


def to_grey(x):
    """ITU-R 601 luma as Pillow rounds it: (B, C, H, W) -> (B, 1, H, W). Grey images pass."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, 1)
    return ((19595 * red + 38470 * green + 7471 * blue) / 65536 + 0.5).floor()


def blend(x, op, factor):
    """degenerate + factor (x - degenerate). factor (B, 1, 1, 1); op (B,) indexes BLEND_OPS."""
    degenerate, sharpen = to_grey(x), (op == 3).any()
    [op] = send(x.device, op.view(-1, 1, 1, 1))
    mean = (degenerate.mean((2, 3), keepdim=True) + 0.5).floor()
    degenerate = torch.where(op == 1, degenerate, mean * (op == 2))
    if sharpen:  # [[1,1,1],[1,5,1],[1,1,1]] / 13
        smooth, inner = x.clone(), x[..., 1:-1, 1:-1]
        rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
        ring = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        smooth[..., 1:-1, 1:-1] = ((ring + 4 * inner) / 13 + 0.5).floor()
        degenerate = torch.where(op == 3, smooth, degenerate)
    return torch.lerp(degenerate, x, factor).clamp_(0, 255).floor_()


def apply_affine(x, op, level, fill=128):
    """Rotate 30 degrees, shear 0.3, translate 0.45, each times level -1..1, as Pillow does.
    level (B, 1, 1, 1); op (B,) indexes AFFINE_OPS."""
    most = torch.tensor([math.radians(30), 0.3, 0.3, 0.9, 0.9])  # grid_sample's width is 2
    [most] = send(x.device, (op[:, None] == torch.arange(5)) * most)
    angle, shear_x, shear_y, shift_x, shift_y = (most * level[:, 0, 0]).unbind(1)  # one is not 0
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos, shear_x - sin, shear_x + shift_x,  # Pillow shears about the corner
                          sin + shear_y, cos, shear_y + shift_y], 1).view(-1, 2, 3, 1, 1)
    row, column = ((torch.arange(n, device=x.device) + 0.5) * (2 / n) - 1 for n in x.shape[2:])
    grid = matrix[:, :, 0] * column + (matrix[:, :, 1] * row[:, None] + matrix[:, :, 2])
    x = F.grid_sample(x - fill, grid.permute(0, 2, 3, 1), align_corners=False)
    return x.add_(fill + 1e-3).floor_()


def apply_op(x, op, magnitude, sign):
    """One operation per sample: x (B, C, S, S), squares of floats 0..255; on the CPU op (B,), which
    indexes OPS (its length: none), magnitude (B,) in 0..10, sign (B,) +-1. Scales: timm's "inc"."""
    level, x = magnitude / 10, x.clone()
    kinds = [(f, k, k, level) for k, f in enumerate(PIXEL_OPS.values())]
    kinds.append((blend, 6, 9, (1 + 0.9 * sign * level).clamp(min=0.1)))
    kinds.append((apply_affine, 10, 14, sign * level))
    for function, first, last, amount in kinds:
        some = ((op >= first) & (op <= last)).nonzero()[:, 0]
        if len(some):
            index, amount = send(x.device, some, amount[some].view(-1, 1, 1, 1))
            new = function(x.index_select(0, index), op[some] - first, amount)
            x.index_copy_(0, index, new)
    return x


def rand_augment(x, layers=2, magnitude=9.0, std=0.5):
    """timm's rand-m9-mstd0.5-inc1: two of the operations, each with probability 0.5."""
    B = len(x)
    for _ in range(layers):
        op = torch.where(torch.rand(B) < 0.5, torch.randint(len(OPS), (B,)), len(OPS))
        sign = torch.randint(2, (B,)) * 2 - 1
        x = apply_op(x, op, (magnitude + std * torch.randn(B)).clamp(0, 10), sign)
    return x


def color_jitter(x, jitter):
    """Brightness, saturation, contrast by U(1 - jitter, 1 + jitter), in an order per sample."""
    order = torch.rand(len(x), 3).argsort(1)  # of the first three BLEND_OPS
    [factor] = send(x.device, 1 + jitter * (2 * torch.rand(len(x), 3, 1, 1, 1) - 1))
    for k in range(3):
        x = blend(x, order[:, k], factor[:, k])
    return x


# ==== B · Other images (for Tables 2, 3, 4, 11, 12, and for training on a folder) =================
#
# A source is a function from settings to `Data`. Contours, clouds and a warped photograph are drawn
# from other numbers than maps, here `params`. params + eps is a class, as with the fractal.

def first_filled(n, propose, draw, share, flag, background=0):
    """Rejection sampling: the first n candidates whose image is filled to a share of its pixels.
    propose() gives the next candidates (B, ...), draw(candidates) their images. InputError if less
    than one in a thousand passes."""
    kept, tried = [], 0
    while len(kept) < n:
        if tried > 1000 * max(1, len(kept)):
            raise InputError(f"{flag}: {len(kept)} of {tried} images cover {share:.0%}; change it")
        batch = propose()
        lit = (draw(batch) != background).flatten(1).float().mean(1).cpu()
        kept += batch[lit >= share]
        tried += len(batch)
    return torch.stack(kept[:n])


def fractaldb_data(args):
    """Table 2. FractalDB: --categories random fractals of 2 to 7 maps, --instances images of each.
    OFDB: one image of each. Kataoka et al., Pre-training without Natural Images (ACCV 2020).

    A category is kept if its points light a fifth of a 512 canvas. An instance is one of 25
    weightings of a parameter in all maps, 4 flips and, with random masks, a texture of its own.
    """
    generator = seeded(args.fractal_seed)
    def propose():  # a map that is not used is 0, and so is its probability
        maps = 2 * torch.rand(50, 7, 2, 3, generator=generator) - 1
        used = torch.arange(7) < torch.randint(2, 8, (50, 1), generator=generator)
        return maps * used[..., None, None]
    def search(maps):
        probs = maps[..., :2].det().abs()
        return render_ifs(maps, 512, 100_000, "point", seeded(args.fractal_seed), probs)
    def draw(i):
        k, m = i // args.instances, i % args.instances
        maps = (systems[k] * weights[m % 25].view(-1, 1, 2, 3)).to(args.device)
        images = draw_ifs(maps, systems[k][..., :2].det().abs(), args)
        for axis, flip in ((1, m // 25 % 2 == 1), (2, m // 50 % 2 == 1)):
            images = torch.where(flip.to(args.device)[:, None, None], images.flip(axis), images)
        return images
    n, weights = torch.arange(24), torch.ones(25, 6)  # the first one is the original
    weights[n + 1, n // 4] = torch.tensor([0.2, 0.6, 1.4, 1.8])[n % 4]
    systems = first_filled(args.categories, propose, search, 0.2, "--categories")
    labels = torch.arange(args.categories).repeat_interleave(args.instances)
    return Data(labels, draw, args.device, args.texture, systems=systems)


def perturbed(base, draw, args, texture=None, **numbers):
    """base params of any shape, perturbed into L classes -> Data; draw(params (B, ...)): images."""
    params = perturb(base, args.delta, args.L, seeded(args.seed, "eps"), args.noise)
    return Data(torch.arange(args.L), lambda i: draw(params[i]), args.device, texture,
                base=base, eps=params - base, **numbers)


def cloud_data(args):
    """Table 4: a cloud of Gaussian or uniform noise, whose mean and covariance, or bounds, move.
    Nothing is published about the images. Here: N(0, I) in a window of +-3, or U(-1, 1)^2 in one of
    +-1.5, the same random numbers for all images, in the fractals' stamps."""
    gaussian = args.source == "gaussian"
    base = torch.tensor([[0., 1, 0], [0, 0, 1]] if gaussian else [[-1., 1], [-1, 1]])
    random = torch.randn if gaussian else torch.rand
    unit = random(2, args.points, generator=seeded(args.fractal_seed)).to(args.device)
    def draw(params):
        first, rest = params[:, :, :1], params[:, :, 1:]  # (B, 2, 1), (B, 2, 2 or 1)
        if gaussian:  # z -> mean + C^(1/2) z
            value, vector = torch.linalg.eigh((rest + rest.mT) / 2)
            spread = vector * value.clamp(min=0).sqrt()[:, None] @ vector.mT
        else:  # u -> low + (high - low) u
            spread = (rest - first)[..., 0].diag_embed()
        points = (first.to(args.device) + spread.to(args.device) @ unit).transpose(0, 1)
        edge = points.new_full((2, len(params)), 3 if gaussian else 1.5)
        hits = rasterize(points, args.canvas, -edge, edge, clip=True)
        return hits if args.texture == "point" else dilate(hits)
    return perturbed(base, draw, args, args.texture)


def perlin_noise(shape, rng):
    """1-D Perlin noise at random positions, as `pnoise1` of the package `noise`: half of its slopes
    are -1, the others 1 to 8."""
    slope = np.where(rng.random_sample((2, *shape)) < 0.5, -1, rng.randint(1, 9, (2, *shape)))
    f = rng.random_sample(shape)
    fade = f ** 3 * (f * (6 * f - 15) + 10)
    return 0.4 * (slope[0] * f * (1 - fade) + slope[1] * (f - 1) * fade)


def contour(kind, seed, category, instance):
    """Nested polygons -> offsets (P, V, 2) from a centre (2,), greys (P,), for a 512 canvas.

    From one polygon to the next each vertex moves outwards by noise, and by two sine waves in a
    Visual Atom. Numbers of masora1030's make_rcdb.py and make_VisualAtom.sh (GitHub).
    """
    shared = np.random.RandomState(seed_for(seed, kind, category))
    own = np.random.RandomState(seed_for(seed, kind, category, instance))
    rcdb, V, P = kind == "rcdb", 0, shared.randint(1, 201)
    while rcdb and not 3 <= V <= 200:
        V = int(shared.exponential(100))
    V = V or shared.randint(200, 1001)
    c, step = shared.uniform(0, 4), shared.uniform(0, 0.1)
    shape = own if rcdb else shared  # RCDB varies the ellipse within a category
    radius = shape.randint(*(0, 101) if rcdb else (10, 61)) * shape.uniform(1, 2, 2)  # of x and y
    centre = own.uniform(56, 456, 2) if rcdb else own.uniform(0, 512, 2)
    angle = np.arange(V) * (2 * math.pi / V)
    grow = c + step - c * (2 if rcdb else 1) * perlin_noise((P, V, 2), own)
    if not rcdb:
        waves = shared.choice(21, (2, 1), replace=False)
        grow += 0.5 * np.sin(waves * angle).sum(0)[:, None]
    offsets = np.stack([np.cos(angle), np.sin(angle)], 1) * (radius + grow.cumsum(0))
    return offsets, centre, own.randint(0, 256, P)


def draw_contour(offsets, centre, greys, size, background):
    """Closed lines, 1 pixel wide, later ones over earlier ones -> image (size, size) uint8."""
    image = Image.new("L", (size, size), background)
    pen, corners = ImageDraw.Draw(image), (centre + offsets) * (size / 512)
    for polygon, grey in zip(corners.astype(np.float32), greys.tolist()):
        pen.polygon(polygon, outline=grey)
    return torch.from_numpy(np.array(image))


def contour_data(args):
    """Table 3: RCDB's nested polygons on white, or Visual Atoms' waves on black.

    One category: the first that fills a fifth of the canvas; the radii of each polygon are
    multiplied by 1 + eps (the paper gives no formula). Pillow is faster here than a GPU.
    """
    background, ids = 255 * (args.source == "rcdb"), iter(range(10 ** 6))
    def numbers(k):  # k = category * instances + instance
        return contour(args.source, args.fractal_seed, *divmod(int(k), args.instances))
    def draw(pictures):
        images = [draw_contour(*picture, args.canvas, background) for picture in pictures]
        return torch.stack(images).to(args.device)
    def draw_all(i):
        return draw(map(numbers, i))
    if args.categories > 1:
        labels = torch.arange(args.categories * args.instances) // args.instances
        return Data(labels, draw_all, args.device)
    [k] = first_filled(1, lambda: torch.tensor([next(ids)]), draw_all, 0.2, "--source", background)
    offsets, centre, greys = numbers(k)
    return perturbed(torch.ones(len(greys)), lambda scales: draw(
        (offsets * s, centre, greys) for s in scales[..., None, None].numpy()), args, category=k)


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
    before, after = (around.gather(2, torch.tensor(n)[sector][..., None])[..., 0]
                     for n in ((3, 0, 1, 2), (5, 8, 7, 6)))
    thin = (strength > before) & (strength > after - (sector % 2 == 0).float() / 2)
    weak = thin & (strength > low)
    edge, grown = None, weak & (strength > high)
    while edge is None or (edge != grown).any():
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
    image = image.to(args.device).float()
    def draw(params):
        grid = warp_grid(args.warp, params.to(args.device), args.canvas)
        warped = F.grid_sample(image.expand(len(params), -1, -1, -1), grid, align_corners=False)
        return warped.add_(0.5).to(torch.uint8)
    return perturbed(WARPS[args.warp], draw, args)


SOURCES = {"fractal": fractal_data, "rcdb": contour_data, "va": contour_data,
           "gaussian": cloud_data, "uniform": cloud_data, "image": image_data,
           "folder": lambda args: folder_data(open_folder(args.root), None, args)}


def source_data(args):
    """The images of --source -> Data. InputError if flags exclude each other."""
    source, many = args.source, args.categories > 1
    if (args.instances > 1 or many) and not (many and source in ("fractal", "rcdb", "va")):
        raise InputError("--categories above 1: for fractal, rcdb, va; --instances: only with it")
    if source != "image" and (args.image, args.edges, args.warp) != (None, "none", "affine"):
        raise InputError("--image, --edges, --warp: only with --source image")
    if args.fresh_texture and source not in ("fractal", "gaussian", "uniform"):
        raise InputError(f"--fresh-texture: --source {source} has no texture")
    args.texture = "fresh" if args.fresh_texture else args.texture
    torch.manual_seed(seed_for(args.seed, "texture"))
    return (fractaldb_data if source == "fractal" and many else SOURCES[source])(args)


# ==== C · Downstream datasets: torchvision's by name, or a folder (for `finetune`, `probe`) =======

DATASETS = {  # name: torchvision's class (by default the training set), split to test on
    "cifar10": ("CIFAR10", False), "cifar100": ("CIFAR100", False), "pcam": ("PCAM", "test"),
    "flowers102": ("Flowers102", "test"), "dtd": ("DTD", "test"), "food101": ("Food101", "test"),
    "stanford_cars": ("StanfordCars", "test"), "pets": ("OxfordIIITPet", "test"),
    "aircraft": ("FGVCAircraft", "test"), "svhn": ("SVHN", "test"), "stl10": ("STL10", "test"),
    "places365": ("Places365", "val"), "clevr": ("CLEVRClassification", "val"),
    "eurosat": ("EuroSAT", None), "sun397": ("SUN397", None),  # a fifth is held out
}


def read_image(file):
    """An image file as a PIL image in RGB. 16-bit grey is scaled. (`main` makes Pillow's warning of
    decompression bombs an error.)"""
    with Image.open(file) as image:
        if image.mode.startswith("I"):
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        return image.convert("RGB")


def square(image, side):
    """The middle of a PIL image, resized -> uint8 (3, side, side)."""
    return T.pil_to_tensor(ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR))


def open_folder(root):
    """torchvision's ImageFolder, one folder a class."""
    with blaming(f"--root {root}"):
        for folder in (Path(f) for f, *_ in os.walk(Path(root).resolve(), followlinks=True)):
            if folder.is_symlink() and folder.resolve() in map(Path.resolve, folder.parents):
                raise ValueError(f"{folder} links to a folder that it is in")
        return torchvision.datasets.ImageFolder(root, loader=read_image)


def open_datasets(args):
    """--data -> two torchvision datasets, to train and to test on, downloaded if they must be."""
    if args.data == "folder":
        test = "test" if Path(args.root, "test").is_dir() else "val"
        sets = open_folder(f"{args.root}/train"), open_folder(f"{args.root}/{test}")
        if sets[0].classes != sets[1].classes:
            raise InputError(f"--root {args.root}: the classes of train/ and {test}/ differ")
        return sets
    kind, split = DATASETS[args.data]
    test = {} if split is None else {"split" if split else "train": split}
    more = dict(small=True) if args.data == "places365" else {}
    make = functools.partial(getattr(torchvision.datasets, kind), args.root, **more)
    args.holdout = args.holdout or 0.2 * (split is None)
    with blaming(f"--data {args.data}: is not in --root {args.root} and cannot be downloaded; put "
                 "it there, or use --data folder"):
        try:
            return make(), make(**test)
        except RuntimeError:
            return make(download=True), make(**test, download=True)


@functools.lru_cache(maxsize=4)
def labels_of(dataset):
    """All labels (n,) of a torchvision dataset, if possible without reading its images."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return torch.as_tensor(getattr(dataset, name)).long()
    return torch.tensor([int(pair[1]) for pair in getattr(dataset, "_samples", None) or dataset])


def balanced_subset(labels, per_class=None, holdout=0.0):
    """A fixed choice of per_class images of each class -> indices to train on, indices held out.
    holdout: the fraction of the chosen images of a class that is kept for choosing settings."""
    order, parts = torch.randperm(len(labels), generator=seeded(0)), []
    for label in labels.unique():
        members = order[labels[order] == label][:per_class]
        if per_class and len(members) < per_class:
            raise InputError(f"--train-per-class {per_class}: class {label} has {len(members)}")
        cut = round(holdout * len(members))
        parts.append((members[cut:], members[:cut]))
    return [torch.cat(part).sort().values for part in zip(*parts)]


def folder_data(dataset, chosen, args):
    """Chosen images of a torchvision dataset (None: all) -> Data.

    If they are small squares of one size (sixteen are looked at) they stay as they are. Else they
    are resized and cropped to 8/7 of img_size (256 for 224). Threads read them.
    """
    files, pool = getattr(dataset, "samples", None), ThreadPoolExecutor()
    chosen = torch.arange(len(dataset)) if chosen is None else chosen
    def read(k, use=lambda image: square(image, side)):
        with blaming(f"--root: cannot read {files[k][0] if files else f'image {k}'}"):
            return use(dataset[k][0].convert("RGB"))
    def draw(i):
        return torch.stack(list(pool.map(read, chosen[i].tolist()))).to(args.device)
    sizes = {read(k, lambda image: image.size) for k in chosen[::-(-len(chosen) // 16)].tolist()}
    side = args.img_size * 8 // 7
    if len(sizes) == 1 and len(set(*sizes)) == 1:
        side = min(side, *sizes.pop())
    return Data(labels_of(dataset)[chosen], draw, args.device)


def downstream_data(args):
    """Training and test images of --data, with its subset and split, and the number of classes."""
    for lead in (True, False):  # the lead downloads first
        if lead == args.lead:
            train, test = open_datasets(args)
        if args.world > 1:
            torch.distributed.barrier()
    chosen, held = balanced_subset(labels_of(train), args.train_per_class, args.holdout)
    if args.batch_size > len(chosen) or (args.holdout and not len(held)):
        raise InputError(f"--batch-size, --holdout: only {len(chosen)} and {len(held)} images")
    classes = len(getattr(train, "classes", ())) or int(labels_of(train).max()) + 1
    tests = folder_data(train, held, args) if args.holdout else folder_data(test, None, args)
    return folder_data(train, chosen, args), tests, classes


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
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{what}: {type(error).__name__}, {reason}") from error


def replace_file(path, data):
    """Write a file beside it, flush to disk, rename: at any moment there is one whole file."""
    with open(f"{path}.part", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.part", path)


def write_json(path, content):
    """Plain values and tensors, these as lists, into a file that is whole at any moment."""
    replace_file(path, (json.dumps(content, default=torch.Tensor.tolist) + "\n").encode())


def load_checkpoint(path, flag="--ckpt"):
    """Our checkpoint, the authors' {"model": ...}, timm's {"state_dict": ...} or a bare state dict
    -> a dict with the weights under "model". Code in it is never run."""
    with blaming(f"{flag} {path}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error says it in one line
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")  # torch.load compares none
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        content = content if "model" in content else {"model": content.get("state_dict", content)}
        content["model"] = {k.removeprefix("module."): t for k, t in content["model"].items()}
        if not all(t.isfinite().all() for t in content["model"].values()):
            raise ValueError("a weight is not finite")
    return content


def load_weights(model, path):
    """Copy a checkpoint into a ViT, all but the head; position embeddings are interpolated."""
    own, state = model.state_dict(), load_checkpoint(path)["model"]
    with blaming(f"--ckpt {path}: does not fit --model and --patch-size"):
        pos = state["pos_embed"].float()
        new, old = (math.isqrt(p.shape[1] - 1) for p in (own["pos_embed"], pos))
        grid = pos[:, 1:].view(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, old, old)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
        state["pos_embed"] = torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], 1)
        model.load_state_dict(state | {n: own[n] for n in ("head.weight", "head.bias")})


def open_run(args):
    """Make the run folder, or see that --resume finds one. Refuses to overwrite a run."""
    out, last = Path(args.out), Path(args.out) / "last.pt"
    if last.exists() != args.resume:
        raise InputError(f"--resume: there is no {last}; check --out" if args.resume else
                         f"--out {out}: holds a run; give another --out, or --resume it")
    if args.lead:
        out.mkdir(parents=True, exist_ok=True)


@blaming("WORLD_SIZE: start it by torchrun")
def join_ranks(args):
    """Read torchrun's environment. With several ranks, meet the others (nccl, or gloo)."""
    args.rank, args.world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    args.lead = args.rank == 0  # the lead writes and prints
    if args.world == 1:
        return
    if args.command not in ("pretrain", "finetune") or args.batch_size % args.world:
        raise InputError("--batch-size: a multiple of the processes, of pretrain or finetune")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    torch.distributed.init_process_group("gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl")


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
        except Exception as error:  # no Triton, no C compiler
            print("onepfrac: not compiled:", *str(error).splitlines()[:2], file=sys.stderr)
        model.zero_grad()
    return network


# Settings that may differ when a run is resumed. (The run's precision stays.)
FREE = "out root device resume save_every log_every precision rank lead".split()


class Run:
    """A run and its folder. last.pt holds all that --resume needs, the log included."""

    def __init__(self, args, model, optimizer, steps):
        self.args, self.model, self.optimizer, self.steps = args, model, optimizer, steps
        self.out, self.live, self.signals = Path(args.out), sys.stdout.isatty(), []
        self.step, self.seconds, self.log, self.handlers = 0, 0.0, [], {}
        self.total = torch.zeros(3, device=args.device)  # loss, right, steps
        if args.resume:
            self.load(self.out / "last.pt")
        elif args.lead:
            git = f'git -C "{Path(__file__).parent}" describe --always --dirty 2>&-'
            gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
            write_json(self.out / "args.json", vars(args) | dict(
                processor=gpu or torch.backends.cpu.get_cpu_capability(), torch=torch.__version__,
                threads=torch.get_num_threads(), commit=subprocess.getoutput(git)))
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            print(f"recipe {args.recipe}: {args.model} ({millions:.1f}M parameters), {args.device} "
                  f"x{args.world}, {args.precision}, {steps} steps of {args.batch_size}")
        self.tick, self.ticked = time.perf_counter(), self.step
        self.write_log()

    def load(self, last):
        """Take over a checkpoint. All of it is consumed here, inside one boundary."""
        saved, optimizer = load_checkpoint(last, "--resume"), self.optimizer
        with blaming(f"--resume: {last} is no run of this version; --ckpt starts from its weights"):
            for name, now in vars(self.args).items():
                if name not in FREE and saved["args"][name] != now:
                    raise InputError(f"--resume: --{name.replace('_', '-')} is {now}, and was "
                                     f"{saved['args'][name]}; repeat the flags of that run")
            self.args.precision = saved["args"]["precision"]  # on whatever machine it began
            self.step, self.seconds = int(saved["step"]), float(saved["seconds"])
            self.log = [dict(r, step=int(r["step"]), images=int(r["images"])) for r in saved["log"]]
            self.total.copy_(saved["total"])
            self.model.load_state_dict(saved["model"])
            state = saved["optimizer"]["state"]
            optimizer.load_state_dict(optimizer.state_dict() | dict(state=state))
            names = "momentum_buffer" if self.args.optimizer == "sgd" else "exp_avg exp_avg_sq step"
            for p, name in ((p, n) for p in self.model.parameters() if p.requires_grad
                            for n in names.split()):
                moment = optimizer.state[p][name]
                if moment.shape not in (p.shape, ()) or not moment.isfinite().all():
                    raise ValueError("the optimizer state is of other weights")

    def __enter__(self):
        """Signals are noted for the end of the step. A second one acts at once."""
        def note(number, frame):
            self.signals.append(number)
            signal.signal(number, self.handlers.get(number, signal.SIG_DFL))
        self.handlers |= {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)
                          if signal.getsignal(n) != signal.SIG_IGN}  # as under nohup
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        print(end="\n" * self.live)
        if self.args.lead and kind is None:
            self.save_curve()

    def at(self, every):
        """Is something due that happens at every so many steps, and at the end?"""
        return self.step % every == 0 or self.step == self.steps

    def report(self, text, **numbers):
        """Add a line to the log and print it; on a terminal a training line updates in place."""
        now, images = time.perf_counter(), self.step * self.args.batch_size
        self.seconds, self.tick, self.ticked = self.seconds + now - self.tick, now, self.step
        self.log.append(dict(step=self.step, images=images, seconds=round(self.seconds, 1),
                             **numbers))
        self.write_log()
        if self.args.lead:
            text = f"step {self.step}/{self.steps}  {text}"
            print(f"\r{text:<99}" if self.live else text, flush=True,
                  end="" if self.live and "loss" in numbers else "\n")

    def write_log(self):
        if self.args.lead:
            (self.out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in self.log))

    def log_step(self, loss, logits, target, rate):
        """Count a step. Every --log-every steps write the mean loss, accuracy and speed."""
        right = (logits.argmax(1) == target.argmax(1)).float().mean()
        self.total += torch.stack([loss, right, torch.ones_like(loss)])
        self.step += 1
        if not self.at(self.args.log_every):
            return
        self.check_finite()
        loss, right, steps = self.total.tolist()
        loss, top1, batch = loss / steps, 100 * right / steps, self.args.batch_size
        speed = (self.step - self.ticked) * batch / (time.perf_counter() - self.tick)
        left = int((self.steps - self.step) * batch / speed)
        self.report(f"loss {loss:.3f}  top-1 {top1:.1f}%  lr {rate:.2e}  {speed:.0f} images/s  "
                    f"{left // 60}:{left % 60:02d} left", loss=loss, top1=top1, lr=rate,
                    images_per_s=round(speed, 1))
        self.total.zero_()

    def check_finite(self):
        if not (self.total.sum() + sum(p.sum() for p in self.model.parameters())).isfinite():
            raise InputError(f"--lr {self.args.lr}: the loss or a weight at step {self.step} is "
                             "not finite, nothing is saved; lower --lr")

    def save_or_stop(self):
        """Save every --save-every steps. After a signal on any rank, save and stop on all."""
        stopping, args = torch.tensor(len(self.signals)), self.args
        if args.world > 1:
            torch.distributed.all_reduce(stopping)
        if stopping or self.at(args.save_every):
            self.check_finite()
            seconds, file = self.seconds + time.perf_counter() - self.tick, io.BytesIO()
            if args.lead:
                torch.save(dict(args=vars(args), step=self.step, seconds=seconds, log=self.log,
                                total=self.total.cpu(), model=self.model.state_dict(),
                                optimizer=self.optimizer.state_dict()), file)
                replace_file(self.out / "last.pt", file.getbuffer())
        if stopping:
            if args.world > 1:
                torch.distributed.barrier()  # until the lead has saved
            if args.lead:
                print(f"onepfrac: stopped after step {self.step} of {self.steps}; the same command "
                      "with --resume continues", file=sys.stderr)
            raise SystemExit(128 + (self.signals or [signal.SIGTERM])[0])  # as shells expect

    def save_samples(self, x, augment):
        """samples.png: what the network sees, the first images of a batch (B, 3, S, S)."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (augment.mean, augment.std))
        if self.args.lead:
            x = (x[:64].float().cpu() * std + mean).clamp(0, 1)
            torchvision.utils.save_image(x, self.out / "samples.png")

    def save_curve(self):
        """curve.png: the loss, and test accuracy if any, over the images seen."""
        names = [n for n in ("loss", "test_top1") if any(n in r for r in self.log)] or ["loss"]
        figure = Figure(figsize=(6, 3 * len(names)), layout="constrained")
        for axis, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names):
            axis.plot(*zip(*[(r["images"], r[name]) for r in self.log if name in r]))
            axis.set(xlabel="images seen", ylabel=name)
        figure.savefig(self.out / "curve.png", dpi=120)


# ==== E · probe and render (for Fig. 3, and for other programs that want the images) ==============

class Probe(nn.Module):
    """A linear classifier on the first k blocks of a ViT, frozen: images -> logits. It sees the
    mean of the patch tokens, each feature normalised by its batch (as in MAE's probe)."""

    def __init__(self, model, k, classes):
        super().__init__()
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


def probe(args):
    """Linear classifiers on frozen features of the first k blocks (Fig. 3), in OUT/layerK."""
    out, resume, depth = Path(args.out), args.resume, MODELS[args.model][1]
    if max(args.layers) > depth or args.batch_size == 1:
        raise InputError(f"--layers: at most {depth}; --batch-size: at least 2")
    for k in sorted(set(args.layers)):
        args.out = str(out / f"layer{k}")
        args.resume = resume and (k == min(args.layers) or Path(args.out, "last.pt").exists())
        finetune(args, layers=k)


def render(args):
    """Write the images of --source to OUT/<class>/<number>.png, as ImageFolder reads them."""
    out = Path(args.out)
    if args.source == "folder" or Path(f"{out}.json").exists() or any(out.glob("*")):
        raise InputError(f"--out {out}: must be empty, without {out}.json; --source: not folder")
    data = source_data(args)
    for i in torch.arange(len(data)).split(1000):
        for number, image, label in zip(i.tolist(), *(t.cpu() for t in data[i])):
            folder = out / f"{label:05d}"  # alphabetical is numerical
            folder.mkdir(parents=True, exist_ok=True)
            T.to_pil_image(image).save(folder / f"{number}.png")
    write_json(f"{out}.json", data.numbers)
    print(f"{len(data)} images in {out}, what they were drawn from in {out}.json")


# ==== F · Settings: recipes, flags, main (to look up a flag or its default) =======================
#
# Three defaults in round brackets belong to the recipes: nano, two CPU cores and minutes; small,
# one GPU; paper, its numbers. In square brackets they belong to pretrain, finetune,
# probe; None there: the command has no such flag. A kind is a list of choices, bool, or a type.

def number(kind, low, high=10 ** 9):
    """An argparse type: a number in [low, high]."""
    def number(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from {low} to {high}")
    return number


RECIPES, TRAIN, DRAW = ("nano", "small", "paper"), "pretrain finetune probe", "pretrain render"
whole, real = functools.partial(number, int), functools.partial(number, float)
any_seed, positive, on, off = whole(0, 2 ** 62), real(1e-9), True, False
FLAGS = [  # commands, heading ("one of": exclusive), flags: name, default, kind, help
    (f"{TRAIN} render", "general",
     ("recipe", RECIPES, RECIPES, "defaults; without: nano, on a GPU small"),
     ("seed", 0, any_seed, "of all but --fractal-seed and subsets"),
     ("device", "auto", ("auto", "cuda", "cpu"), "where it runs"),
     ("out", None, str, "folder to write to; None: runs/COMMAND"),
     ("root", "data", str, "images and downloads")),
    (TRAIN, "the run",
     ("resume", off, bool, "continue the run in --out, exactly"),
     ("save_every", 1000, whole(1), "steps between checkpoints"),
     ("log_every", 50, whole(1), "steps between lines of the log"),
     ("precision", "auto", ("auto", "bf16", "fp32"), "auto: bf16 where it is fast")),
    (DRAW, "Tables 2, 3, 4: what is drawn",
     ("source", "fractal", tuple(SOURCES), "of the images"),
     ("categories", 1, whole(1), "1: one image, perturbed; more: many"),
     ("instances", 1, whole(1, 1000), "images of each category")),
    (DRAW, "Tables 5, 6, 7, 8: the LIEP distribution, for --categories 1",
     ("delta", 0.1, real(0), "side of the cube that eps is drawn from"),
     ("sigma", 3.5, positive, "sigma-factor of the fractal"),
     ("L", (64, 1000, 1000), whole(2), "perturbations, the classes"),
     ("noise", "additive", ("additive", "multiplicative"), "the paper's, or the authors'")),
    (DRAW, "Tables 11, 12: with --source image",
     ("image", None, str, "a file; None: matplotlib's photograph"),
     ("edges", "none", ("none", "canny"), "canny: draw its edges instead"),
     ("warp", "affine", tuple(WARPS), "what eps does to it")),
    (DRAW, "the picture",
     ("fractal_seed", 32, any_seed, "which fractal or other image"),
     ("num_maps", 2, whole(2), "N of Eq. 1"),
     ("canvas", (128, 128, 512), whole(16, 4096), "pixels a side, as drawn"),
     ("points", (20_000, 100_000, 100_000), whole(1), "of the chaos game, for an image")),
    (DRAW, "the texture (random masks, whole 3x3 stamps, single pixels): one of",
     ("texture", ("fill", "random", "random"), ("random", "fill", "point"), "of the dots"),
     ("fresh_texture", off, bool, 'new masks each step (Table 13, "w/ Aug.")')),
    (TRAIN, "network",
     ("model", ("vit_nano", "vit_tiny", "vit_tiny"), tuple(MODELS), "Vision Transformer"),
     ("img_size", (32, 32, 224), whole(1), "pixels a side, as the network sees"),
     ("patch_size", (8, 4, 16), whole(1), "pixels a side of a patch"),
     ("drop_path", (0.0, 0.0, 0.1), real(0, 0.99), "stochastic depth")),
    ("finetune probe", "Tables 13, 14, Fig. 3: downstream",
     ("ckpt", None, str, "weights to start from; None: random"),
     ("data", "cifar100", ("folder", *DATASETS), "dataset"),
     ("train_per_class", None, whole(1), "a fixed balanced subset; None: all"),
     ("holdout", 0.0, real(0, 0.9), "share of the training images to test on"),
     ("eval_epochs", 5.0, positive, "epochs between tests"),
     ("layers", [None, None, [1, 2, 3, 4, 6]], whole(1), "blocks that are kept")),
    (TRAIN, "optimisation",
     ("steps", [(21_000, 20_000, 240_000), None, None], whole(1), "length of pre-training"),
     ("epochs", [None, (8, 100, 1000), (4, 30, 36)], positive, "over the training images"),
     ("batch_size", [(64, 512, 256), (64, 256, 768), 256], whole(1), "on all ranks together"),
     ("lr", [(1e-3, 1e-3, 5e-4), (0.2, 0.05, 0.015), 0.3], positive, "peak learning rate"),
     ("weight_decay", [0.05, 1e-4, 0.0], real(0), "of weight matrices"),
     ("warmup", [(0.02, 0.05, 6.25e-5), (0.05, 0.05, 0.01), 0.0], real(0, 0.9), "share of steps"),
     ("optimizer", ["adamw", "sgd", "sgd"], ("adamw", "sgd"), "sgd: Nesterov momentum 0.9"),
     ("clip_grad", [(1.0, 1.0, 0.0), (1.0, 1.0, 0.0), 0.0], real(0), "norm; 0: not clipped"),
     ("smoothing", [(0.0, 0.0, 0.1), (0.0, 0.1, 0.1), 0.0], real(0, 1), "of labels")),
    (TRAIN, "Table 9: augmentation",
     ("randaug", [(off, off, on), (off, on, on), off], bool, "RandAugment"),
     ("crop", on, bool, "random resized crops"),
     ("min_crop", [(0.1, 0.2, 0.08), (0.7, 0.4, 0.08), 0.4], real(1e-9, 1), "area of a crop"),
     ("aspect", on, bool, "crops of aspect 3/4 to 4/3"),
     ("erase", [(off, off, on), (off, on, on), off], bool, "random erasing"),
     ("mixup", [(off, off, on), (off, on, on), off], bool, "blend pairs of images"),
     ("cutmix", [(off, on, on), (off, on, on), off], bool, "paste a box of another image"),
     ("flip", [(off, off, on), on, on], bool, "left-right; in pre-training up-down too"),
     ("jitter", [(on, off, on), (off, off, on), off], bool, "only without randaug")),
]


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        self.exit(2, f"onepfrac: {message.removeprefix('argument ')}\n")


def make_parser(recipe):
    """All commands with their FLAGS and the defaults of a recipe."""
    parser = Parser(prog="onepfrac.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for column, (name, function) in enumerate(COMMANDS.items()):
        command = commands.add_parser(
            name, help=function.__doc__, description=function.__doc__, allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for names, title, *rows in (part for part in FLAGS if name in part[0].split()):
            group = command.add_argument_group(title)
            group = group.add_mutually_exclusive_group() if title.endswith("one of") else group
            for flag, default, kind, text in rows:
                if isinstance(default, list) and default[column] is None:
                    continue
                default = default[column] if isinstance(default, list) else default
                default = default[RECIPES.index(recipe)] if isinstance(default, tuple) else default
                how = dict(choices=kind) if isinstance(kind, tuple) else dict(type=kind)
                how = dict(action=argparse.BooleanOptionalAction) if kind is bool else how
                how |= dict(nargs="+", metavar="K") if isinstance(default, list) else {}
                group.add_argument(f"--{flag.replace('_', '-')}", help=text, default=default, **how)
    return parser


def parse(argv=None):
    """A command line -> settings. Device and recipe are read first: the defaults depend on them."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--device", default="auto")
    first.add_argument("--recipe")
    known = first.parse_known_args(argv)[0]
    there = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    device = there[0] if known.device == "auto" else known.device
    recipe = known.recipe if known.recipe in RECIPES else "small" if device == "cuda" else "nano"
    args = make_parser(recipe).parse_args(argv)
    if device not in there:
        raise InputError(f"--device {device}: there is none here; try --device auto")
    args.device, args.recipe, args.out = device, recipe, args.out or f"runs/{args.command}"
    if getattr(args, "precision", None) == "auto":  # bf16 if the processor multiplies it
        fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        fast |= device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in (
            "_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        args.precision = "bf16" if fast else "fp32"
    join_ranks(args)
    return args


def keep_memory():
    """Tell glibc to keep what is freed: page faults cost up to a third of the time on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX


COMMANDS = dict(pretrain=pretrain, finetune=finetune, probe=probe, render=render)


def main(argv=None):
    """Run one command -> exit status."""
    keep_memory()
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 90 million pixels
    try:
        args = parse(argv)
        COMMANDS[args.command](args)
        if args.world > 1:  # after an error others may wait
            torch.distributed.destroy_process_group()
        return 0
    except InputError as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        reason = "--batch-size, --canvas: the GPU is full; lower one"
    except OSError as error:  # a full disk, no permission
        reason = f"--out or --root: {error}"
    except KeyboardInterrupt:  # before the run, or a second Ctrl-C
        return 130
    print(f"onepfrac: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
