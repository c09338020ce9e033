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
from the fractal (standard deviation 0.6), 36.4% (0.3) from scratch. In equal total time, with
smaller patches, which are better for scratch, the fractal is 0.8 points ahead after 7 minutes with
the same images, 3.3 after 15, and 0.9 with all images after 33 (README). The paper has 84.2% and
64.2% with all images, a larger network and a far longer training: `--recipe paper` has its
settings.

Ctrl-C saves. The same command again goes on.

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
    D runs: log, checkpoint, ranks       E Muon, probe, render     F settings, G speed
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
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SCRIPT = __name__ == "__main__" and "__file__" in globals()  # and not a notebook's cell
if SCRIPT:  # these are read when torch and matplotlib are imported
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # a thread that waits soon lets its core go
    os.environ["MPLBACKEND"] = "agg"  # figures are files; a notebook's backend may not be there

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import cbook
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn
from torchvision.transforms.v2 import functional as T

# ###################################### PART ONE: THE METHOD ######################################
#
# Who calls whom, what is handed on, and which section explains it:
#
#     pretrain                                                                                   7
#         source_data -> Data: images uint8 (n, S, S), labels (n,)                               3
#             fractal_data                                                                       3
#                 base_ifs -> maps (N, 2, 3)              the one fractal; by sample_ifs         1
#                 liep_data -> maps + eps (L, N, 2, 3)    by perturb                             3
#                     draw_ifs -> images                  by render_ifs                          2
#         make_model -> ViT                                                                      4
#         train                                                                                  6
#             Augment -> x (B, 3, 32, 32), target (B, L)  from a batch of Data                   5
#             train_step -> loss                          by lpce_loss                           3
#     finetune: the same, but downstream_data (C) for source_data, the checkpoint's weights by
#         load_weights (D), and evaluate (6)

# ==== 1 · Fractals (Eq. 1-2) ======================================================================
# To copy this section: import math, torch
#
# An iterated function system (IFS) is a handful of affine maps of the plane, each with a
# probability to be chosen: {w_1 .. w_N; p_1 .. p_N}. A map is w_j(v) = A_j v + t_j, stored as two
# rows [a b e; c d f], where A = [a b; c d] and t = (e, f). So N maps have shape (N, 2, 3).
# If the maps contract, exactly one shape (closed, bounded, not empty) is the union of its own
# copies under the maps. This shape is the attractor, a fractal: it consists of distorted copies of
# itself. For example, the Sierpinski triangle consists of three copies of itself, each half as
# large, in three corners:
#
#     corners = torch.tensor([[0, 0], [0.5, 0], [0.25, 0.5]])                         # t_1 .. t_3
#     maps = torch.cat([0.5 * torch.eye(2).expand(3, 2, 2), corners[:, :, None]], 2)   # (3, 2, 3)
#
# How strongly does a system contract? A matrix A_j turns a circle of radius 1 into an ellipse of
# radii s_j1 >= s_j2, its singular values. The map contracts if s_j1 < 1. The sigma-factor is the
# sum over j of s_j1 + 2 s_j2. We sample no singular value above 1, so sigma is at most 3 N, where
# no map contracts and there is no attractor. Why is s_j2 counted twice? No theory says so: Anderson
# & Farrell (Improving Fractal Pre-training, WACV 2022) saw that this sum tells good pictures from
# bad ones. (A small s_j2 flattens a copy to a line, and lines fill nothing.)
#
# Why sample systems of a given sigma? To ask whether complexity matters: the smaller sigma is, the
# more "complex" the paper calls the shape (more structure, less of an even cloud). In its Table 6
# sigma 3.5 has 84.2 on CIFAR-100, and 6.0 has 81.3. In our short trainings (1,500 steps, 3 epochs,
# one seed each) 3.5 has 30.8, and 6.0 (drawn just below it, as two maps reach no more) 30.9;
# scratch has 24.3. The sigmas between show no trend.
#
# What does 3.5 look like? Shared evenly, all four singular values are 3.5 / 6 = 0.58. Then each
# copy has 0.58^2 = 0.34 of the area of the whole, both together 0.68, their copies 0.68^2, and so
# on: the shape becomes thin so fast that its dots, squares of 3x3 pixels, cover about 6% of the
# canvas (the square image). We take fractals that cover a fifth or more (`base_ifs`), so the areas
# of the copies, s_j1 s_j2 each, must add up to nearly 1. At sigma 3.5 this takes one map that
# contracts strongly and one that hardly does. In the default fractal their singular values are
# 0.33, 0.18 and 0.985, 0.946 (sigma 3.6), so the copies have 0.06 and 0.93 of the area of the
# whole.

def sigma_factor(maps):
    """sum_j (s_j1 + 2 s_j2) over the singular values of the matrices A_j of a system.

    maps (..., N, 2, 3) -> (...). Small: together the maps contract strongly, to a sparse shape.
    Large: a diffuse cloud. At 3 N nothing contracts, there is no attractor.
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
        need = left - 3 * (num_maps - 1 - j)  # later maps take at most 3 each; s1 + 2 s2 <= 3 s1
        s1 = uniform(max(0.0, need / 3), min(1.0, left)).item()
        s2 = uniform(max(0.0, (need - s1) / 2), min(s1, (left - s1) / 2)).item()
        s[j, 0], s[j, 1] = s1, s2  # for the last map s2 has one possible value
        left -= s1 + 2 * s2
    angle = uniform(-math.pi, math.pi, 2, num_maps)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], -1).view(2, num_maps, 2, 2)
    signs = uniform(-1, 1, 2, num_maps, 2).sign()  # -1 and 1: a reflection
    u, v = rotation @ signs.diag_embed()
    linear = u @ s.diag_embed() @ v
    return torch.cat([linear, uniform(-1, 1, num_maps, 2, 1)], -1).float()


# ==== 2 · Drawing: chaos game, raster, texture ====================================================
# To copy this section: import torch, torch.nn.functional as F
#
# The chaos game draws the attractor. With one system and one moving point it is
#
#     probs = maps[:, :, :2].det().abs()                     # see below
#     v, dots = torch.zeros(2), []
#     for j in probs.multinomial(20_500, replacement=True):  # pick a random map
#         v = maps[j, :, :2] @ v + maps[j, :, 2]             # move to A_j v + t_j
#         dots.append(v)                                     # each place is a dot
#     dots = dots[500:]                                      # but for the first ones, see below
#
# The larger a copy is, the more often its map is picked (p_j is proportional to |det A_j|). So a
# copy of twice the area gets twice the dots, and they lie about evenly.
#
# Why it works. The maps take the attractor into itself, and they contract, so the moving point
# comes closer to it with each step. And it comes near every place there. Such a place lies in a
# copy of a copy of a copy, as small as we like. Some finite sequence of maps takes the whole
# attractor into this copy, and an endless random sequence contains every finite one again and
# again.
#
# Why the first 500 steps are not drawn. (0, 0) is usually outside, and each step only brings the
# point closer. In fractals of sigma 3.5 that cover a canvas one map hardly contracts (section 1),
# and it is picked most of the time, so it takes hundreds of steps until nothing is seen of the
# start. (The authors' code draws them.)
#
# The same for many at once: K orbits (paths of a moving point) of each of B systems run side by
# side, and each leaves up to 500 dots. Each orbit picks maps for itself, but orbit k uses the same
# random numbers in all B systems. Else each image would have its own pattern of dots, and a network
# could know an image by that alone.

BURN_IN, ORBIT = 500, 500  # steps of an orbit that are skipped; then at most so many are drawn
GREY = 127  # of the dots


def choose_maps(probs, points, generator=None):
    """Which map each orbit picks in each step -> j (BURN_IN + steps, K) on the CPU, with enough
    orbits K for `points` dots. probs (N,), or (B, N) -> j (BURN_IN + steps, K, B) for systems with
    probabilities of their own (FractalDB's, section B); they need not sum to 1."""
    K = -(-points // ORBIT)  # rounded up
    u = torch.rand(BURN_IN + -(-points // K), K, generator=generator).double()
    ends = probs.cpu().double().cumsum(-1)
    ends = ends / ends[..., -1:]  # map j is chosen if ends[j - 1] <= u < ends[j]
    u = u if probs.ndim == 1 else u[..., None]
    return sum((u >= end).long() for end in ends.unbind(-1))  # j: how many ends u has reached


def chaos_game(maps, j):
    """Orbits of B systems: maps (B, N, 2, 3), j of `choose_maps` -> dots (2, B, steps, K)."""
    B, steps, K = len(maps), len(j) - BURN_IN, j.shape[1]
    table = maps.permute(1, 2, 3, 0).contiguous()  # (N, 2, 3, B): row j holds map j of all systems
    v = maps.new_zeros(K, 2, B)
    dots = maps.new_empty(2, B, steps, K)
    for step, rows in enumerate(j.to(maps.device), -BURN_IN):
        if rows.ndim == 1:
            picked = table.index_select(0, rows)  # (K, 2, 3, B); as table[rows], but faster
        else:
            picked = table.gather(0, rows[:, None, None].expand(K, 2, 3, B))  # of each its own j
        A_x, A_y, t = picked.unbind(2)  # the columns of A, and t: (K, 2, B) each
        v = torch.addcmul(t, A_x, v[:, :1]).addcmul_(A_y, v[:, 1:])  # A v + t
        if step >= 0:
            dots[:, :, step] = v.permute(1, 2, 0)
    return dots


def rasterize(dots, size, low, high):
    """Dots (2, B, P) -> images (B, size, size) uint8, GREY where a dot lies, y upwards.

    The box from low to high (2, B) is stretched to fill the canvas but for a margin of 6 pixels in
    512. So an image does not tell where a shape lies and how large it is. Dots that lie outside (as
    some of the clouds in section B) or are not finite are left out.
    """
    margin = max(1, 6 * size // 512)
    last = size - 1 - 2 * margin
    scale = last / (high - low).clamp(min=1e-6)  # (2, B)
    x, y = ((dots - low[..., None]) * scale[..., None]).round()
    inside = (x >= 0) & (x <= last) & (y >= 0) & (y <= last)
    cell = (size - 1 - margin - y) * size + margin + x  # floats are exact below 2^24
    cell = torch.where(inside, cell, size ** 2).long()  # one more cell, which is cut off
    hits = torch.zeros(len(cell), size ** 2 + 1, dtype=torch.uint8, device=dots.device)
    return hits.scatter_(1, cell, GREY)[:, :-1].view(-1, size, size)


def dilate(images):
    """Each lit pixel grows to its 3x3 neighbourhood: images (B, S, S) uint8, 0 or GREY -> the
    same."""
    x = F.pad(images, (1, 1, 1, 1))
    x = x[:, :-2] | x[:, 1:-1] | x[:, 2:]
    return x[:, :, :-2] | x[:, :, 1:-1] | x[:, :, 2:]


def render_ifs(maps, size=512, points=100_000, dilated=True, generator=None, probs=None):
    """Draw attractors: maps (B, N, 2, 3) -> grey images (B, size, size) uint8 on maps.device.

    points: dots of an image, rounded up to whole steps of all orbits. Each dot takes 40 bytes, so
    draw a thousand images in parts: with the same probs, and a generator of the same seed for each
    part, the images are the same. dilated: a dot is a 3x3 square (`stamp` gives it a texture), else
    a pixel. generator (CPU): draws which maps the orbits pick, for all images alike. probs (N,) or
    (B, N): of the maps, by default the mean of |det A_j| over the B systems. A system without an
    attractor runs away, to a nearly blank image. ValueError if an argument is unfit.
    """
    if maps.ndim != 4 or maps.shape[2:] != (2, 3) or not len(maps) or not maps.isfinite().all():
        raise ValueError("need finite maps (B, N, 2, 3)")
    probs = maps[..., :2].det().abs().mean(0) if probs is None else probs
    if probs.shape not in (maps.shape[:2], maps.shape[1:2]) or not 8 <= size <= 4096 or points < 1:
        raise ValueError("need probs (N,) or (B, N), size 8 to 4096, and points >= 1")
    dots = chaos_game(maps, choose_maps(probs, points, generator)).flatten(2)  # (2, B, P)
    images = rasterize(dots, size, dots.amin(2), dots.amax(2))
    return dilate(images) if dilated else images


def stamp(images, generator=None):
    """Give dilated images (B, S, S) a random texture, in place -> the same.

    The authors stamp each dot with one of the 511 non-empty 3x3 masks, and later stamps overwrite
    earlier ones. So a covered pixel is a coin flip, lit with probability 256/511. Here it is 1/2:
    an image is the dilated dots times a mask of coin flips, and a new texture is a new mask.
    """
    words = -(-images[0].numel() // 64)  # a random number of 64 bits is 64 coins
    draws = torch.empty(len(images), words, dtype=torch.int64, device=images.device)
    draws.random_(-2 ** 63, None, generator=generator)  # None: all 64 bits are random
    bit = torch.arange(8, dtype=torch.uint8, device=images.device)
    coins = (draws.view(torch.uint8)[:, None] >> bit[:, None]) & 1  # (B, 8, 8 * words)
    return images.mul_(coins.flatten(1)[:, :images[0].numel()].view_as(images))


# ==== 3 · Classes: the LIEP distribution and the LPCE loss (Eq. 6-9) ==============================
# To copy `perturb` and `lpce_loss`: import torch, torch.nn.functional as F
#
# In the paper's letters: I is the image of the fractal, x an image, y its label, p_theta the
# softmax of a network's logits, theta are its weights, and v is a point of the plane. point(z) is
# the distribution of a z that is always 0. (It is Dirac's delta, but we have Delta and --delta
# already.)
#
#     (6)  p_data(x, y)  = point(x - I) point(y)                    one image; y is always 0
#     (7)  p_Delta(x, y) = mean over eps of point(x - I_eps) point(y - eps)    each eps a class
#     (8)  loss          = -E log p_theta(y | x)     for x and y that are drawn from p_Delta
#     (9)  w_j(v; eps_j) = ([A_j t_j] + eps_j) [v; 1]     the maps whose attractor is I_eps
#
# With one image and one class (6) there is nothing to learn. So the paper adds noise: to each of
# the 6 N numbers of the maps a small random one (9). All of them together, one point of a cube of
# side Delta around 0 in 6 N dimensions, are called eps. Each eps is a class: the image of
# maps + eps. If it is nearly blank, another eps is drawn. (The authors' code does not add, but
# multiplies each number by a factor from 1 - Delta to 1 + Delta, `--noise multiplicative`. The
# defaults, additive noise and Delta = 0.1, are the paper's.)
#
# Is there a picture for each eps? Nearly half of the perturbations of the default fractal have a
# map that stretches in one direction (a singular value above 1). What section 1 says holds only if
# every map contracts. But at Delta = 0.1 a long random sequence of maps contracts on average, so
# the dots settle to one shape. (Now and then a dot lies far out, and the rest is drawn smaller.)
#
# What is Delta for? As Delta goes to 0 the data become one single image. So with Delta the paper
# asks how narrow data may be before pre-training fails: in its Table 5 it fails at 0.01 and below.
#
# What does LIEP mean? In theory there are as many classes as points in the cube, and the data are
# an integral over all of them (Eq. 7): a "locally integrated empirical" distribution. In practice,
# the paper says, the integral is a sample: L random eps, drawn once, make L classes (1,000 in the
# paper, 64 in nano) with one image each. A label is the index of an eps in this list, 0 to L - 1;
# the numbers of eps are never predicted. The loss, LPCE or "locally perturbed cross entropy" (Eq.
# 8), is then plain cross entropy.
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
# its shape. At Delta = 0 all shapes are the same, and nano with such masks (without cutmix) still
# learns to name 10% of its crops in 1,500 steps (guessing: 1.6%); CIFAR-100 gains nothing.
# `--texture fresh` draws new masks at each step, our reading of "w/ Aug." in the paper's Table 13.
# Without masks, `--texture fill` (nano) draws a dot as a square of 3x3 pixels, `--texture point` as
# a single pixel.
#
# FractalDB and OFDB, older datasets of fractals, are the same program at other settings: they have
# many fractals ("categories"), and the label is the category. FractalDB has 1,000 images of each,
# OFDB one (section B).
#
# Seeds (`seeded`, `seed_for`) are explained in section 6.

def perturb(base, delta, L, generator=None, noise="additive"):
    """L perturbed copies of base, numbers of any shape (...) -> (L, ...), Eq. 9.

    noise: "additive" (the paper): each number plus U(-delta/2, delta/2). "multiplicative" (the
    authors' code): each number times U(1 - delta, 1 + delta).
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


KEPT = 6 * 2 ** 30  # bytes of images that are kept in memory; more are made again at each step


class Data:
    """n labelled images. data[i], for indices i (B,) on the CPU: uint8 images (B, S, S) or
    (B, C, S, S) and labels (B,), on the device.

    draw(i) makes images, once if they are not too many to be kept, else at each data[i]. texture:
    the masks that `stamp` adds, "random" (of each image its own, always the same) or "fresh" (new
    at each data[i]). classes: their names, if they have any. omega: the numbers that images are
    drawn from (the paper's name), as a record.
    fingerprint: of all labels and the images that are kept, or else of the first 64.
    """

    def __init__(self, labels, draw, args, texture=None, classes=None, **omega):
        self.labels, self.draw, self.seed = labels.to(args.device), draw, args.seed
        self.texture, self.classes, self.omega = texture, classes, omega
        self.images, known = None, self.make(torch.arange(min(64, len(labels))))
        if len(labels) * known[0].numel() <= KEPT:
            self.images = known = known.new_empty(len(labels), *known.shape[1:])
            for i, some in zip(torch.arange(len(labels)).split(64), known.split(64)):
                some.copy_(self.make(i))
        crc = zlib.crc32(known.cpu().contiguous().numpy(), zlib.crc32(labels.cpu().numpy()))
        self.fingerprint = f"{crc:08x}"

    def make(self, i):
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
        images = self.make(i) if self.images is None else self.images.index_select(0, index)
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
        params = perturb(base, args.delta, 32, generator, args.noise)  # the next 32 to try
        share = covered(draw_params(params), background)
        kept.extend(params[(share > 0) & (share >= least)])
        tried += len(params)
        if tried > 1000 * (1 + len(kept)):
            raise InputError(f"--delta {args.delta}: {tried - len(kept)} of {tried} images are "
                             f"blank, or cover less than {least:.0%} of the canvas; lower it, or "
                             "give more --points or another --image")
    params = torch.stack(kept[:args.L])
    return Data(torch.arange(args.L), lambda i: draw_params(params[i].to(args.device)), args,
                texture, base=base, eps=params - base, **omega)


def base_ifs(num_maps, sigma, seed):
    """The one fractal of a run -> maps (N, 2, 3). Its sigma-factor is within 0.1 of sigma, as with
    the authors, and it covers a fifth of a canvas. They drew theirs unseeded, and published its
    pictures alone."""
    generator = seeded(seed)
    for _ in range(300):  # at sigma 3.5 about one in five covers enough
        target = sigma + 0.2 * (torch.rand((), generator=generator).item() - 0.5)
        if 0 < target < 3 * num_maps:
            maps = sample_ifs(num_maps, target, generator)
            if covered(render_ifs(maps[None], generator=seeded(seed))) >= 0.2:
                return maps
    raise InputError(f"--sigma {sigma}, --num-maps {num_maps}: none of 300 such fractals covers a "
                     f"fifth of the canvas; give a larger sigma, but below 3 num_maps")


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
    probs = base[..., :2].det().abs()  # of the unperturbed maps, so that all images pick the same
    return liep_data(base, lambda maps: draw_ifs(maps, probs, args), args, args.texture,
                     least=0.1 if args.texture in ("random", "fresh") else 0.05)


# ==== 4 · Network: a Vision Transformer (Dosovitskiy et al., 2021), parameter names as in timm ====
# To copy this section: import torch, torch.nn as nn, torch.nn.functional as F
#
# The image is cut into patches. Each patch becomes a vector, a token, and a position embedding is
# added to it. One more token, cls, stands for the whole image: the classifier reads it at the end.
# The tokens pass through blocks. A block does two things in turn, and adds each result to the
# tokens. Attention: each token compares its query with the keys of all tokens, and takes the mean
# of their values, weighted by how well they match. MLP: a small network works on each token alone.

MODELS = {  # dim, depth, heads
    "vit_pico": (64, 6, 2),
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
        else:  # the same, written out: faster on a CPU
            weight = (q * (D // self.heads) ** -0.5) @ k.transpose(2, 3)  # (B, heads, N, N)
            x = weight.softmax(-1).to(v.dtype) @ v  # autocast's softmax is in float32
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
        B, C, P, n = *x.shape[:2], self.patch_size, self.img_size // self.patch_size
        x = x.view(B, C, n, P, n, P).permute(0, 2, 4, 1, 3, 5)  # (B, n, n, C, P, P): the patches
        proj = self.patch_embed.proj  # holds timm's weights; its convolution is one matrix product
        x = x.reshape(B, n * n, C * P * P)
        x = F.linear(x, proj.weight.flatten(1), proj.bias)  # (B, n^2, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], 1)  # (B, 1 + n^2, D)
        return x + self.pos_embed

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x)))[:, 0])


# ==== 5 · Augmentation: DeiT's (arXiv 2012.12877), on a batch that is already on the device =======
# To copy this section (with A): import functools, math, torch, torch.nn.functional as F
#                                from torchvision.transforms.v2 import functional as T
#
# Every sample gets its own crop, flips, colours and erased box. Crops of random place and scale
# make the task of section 3 hard. Mixup and cutmix blend each image with its partner, that is the
# image at the same place of the reversed batch, and their targets in the same proportion. What is
# done, and where, is chosen on the CPU, so that a GPU is never waited for. All random numbers come
# from torch's default generators, which the loop of section 6 seeds at each step.
#
# Resizing is linear: each output pixel is a weighted sum of input pixels. So a row of pixels times
# a matrix of weights is the resized row, and each sample has the matrix of its own box. A row of
# four pixels, halved:
#
#     resize_matrix(torch.tensor([0]), torch.tensor([4]), 4, 2)[0]  =    0.46 -0.04
#                                                                        0.46  0.12
#                                                                        0.12  0.46
#                                                                       -0.04  0.46
#     [0, 0, 100, 100] times it = [8, 92]
#
# Why not F.grid_sample? It mixes only the pixels next to one place, so when an image shrinks most
# pixels have no weight (no antialiasing). F.interpolate antialiases, but takes one box for a whole
# batch.

def resize_matrix(start, length, pixels, size):
    """Column j of a matrix (B, pixels, size) has the weights of output pixel j.

    start, length (B,): whole pixels. The box [start, start + length) of each image becomes `size`
    pixels. length < 0 is a flip: the box [start + length, start) backwards.
    The bicubic kernel (Keys, a = -0.5) is widened when the image shrinks (antialiasing), cut off at
    the box, and normalised, as torchvision does.
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / size  # negative in a flip
    outputs = (torch.arange(size, device=start.device) + 0.5) * scale  # from `start`, in pixels
    inputs = torch.arange(pixels, device=start.device)[:, None] + 0.5 - start
    share = inputs / length  # of the way through the box
    inputs = torch.where((share > 0) & (share < 1), inputs, math.inf)  # not in the box: far away
    d = (inputs - outputs).abs() / scale.abs().clamp(min=1)  # in output pixels if it shrinks
    # Twice the kernel is 3 d^3 - 5 d^2 + 2 up to 1, then (1 - d) (2 - d)^2 up to 2, then 0. The
    # first is 0 at 1, the second at 1 and 2. So it is their sum, each with d held in its range.
    near, far = d.clamp(max=1), d.clamp(1, 2)
    weight = (3 * near - 5) * near * near + 2 + (1 - far) * (2 - far) ** 2
    return weight / weight.sum(1, keepdim=True)


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
        self.randaug, self.jitter, self.erase = randaug, jitter, erase
        self.mixup, self.cutmix, self.smoothing = mixup, cutmix, smoothing

    def __call__(self, images, labels):
        x = self.resized_crop(images)
        if self.randaug:
            x = rand_augment(x)  # section A
        elif self.jitter:
            x = color_jitter(x, self.jitter)  # section A
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
        box = torch.stack([start, length], 1).to(x.device, non_blocking=True)  # (2 axes, 2, B)
        for axis in range(2):  # height, then width
            # x.mT has the height last, and the product resizes the last axis. The second pass turns
            # the image back and resizes the width.
            x = x.mT @ resize_matrix(*box[axis], S, self.img_size)[:, None]
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
# optimizer state and the step of a checkpoint, the same command reaches the same bits on a CPU as
# if it had never been stopped. (On a GPU some sums have no fixed order.)
#
# The authors' code pre-trains with AdamW and fine-tunes with SGD; the paper does not say. The
# recipes nano and small (section F) have Muon for the weight matrices of the blocks, in both, and
# AdamW for the rest. The momentum of a weight matrix, a running mean of its gradients, is a matrix
# U S V^T with singular values S. Muon steps along about U V^T: all directions equally far. So a
# direction with a small singular value (asked for weakly, or by few images) moves as far as any
# other.

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
    groups = [dict(params=[], weight_decay=args.weight_decay),
              dict(params=[], weight_decay=args.weight_decay),
              dict(params=[], weight_decay=0.0)]
    in_blocks, matrices, rest = groups
    for name, p in model.named_parameters():
        vector = p.ndim == 1 or name in ("cls_token", "pos_embed")
        group = rest if vector else in_blocks if name.startswith("blocks.") else matrices
        group["params"].append(p)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True)
    if args.optimizer == "muon":  # section E; for the group that has a "muon_dtype"
        in_blocks["muon_dtype"] = torch.bfloat16 if args.precision == "bf16" else torch.float32
        return Muon(groups, args.lr, betas=(0.9, 0.999), fused=True)
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.999), fused=True)


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up over `warmup` steps, then half a cosine towards zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


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


def train(args, run, model, data, augment, steps, tests=None):
    """Train until `steps`, from step 0 or from where this run was stopped. Test on the images
    `tests` every --eval-epochs, and at the end."""
    optimizer = make_optimizer(model, args)
    run.begin(model, optimizer, steps, data, tests)  # or goes on: section D
    network = accelerate(model, args)  # the same weights, compiled or in parallel: section D
    warmup = round(args.warmup * steps)
    if tests is not None:
        test_every = steps / max(1, round(args.epochs / args.eval_epochs))
    model.train()
    with noted_signals(args) as signals:  # Ctrl-C, for the end of a step: section D
        for step in range(run.step, steps):
            i = batch_indices(len(data), args.batch_size, step, args.seed)
            i = i[args.rank::args.world_size]
            torch.manual_seed(seed_for(args.seed, "step", step, args.rank))
            images, labels = data[i]
            x, target = augment(images, labels)
            rate = learning_rate(step, steps, warmup, args.lr)
            loss, logits = train_step(network, optimizer, x, target, rate, args)
            if step == 0:
                run.save_samples(x, augment)
            run.step = step + 1
            run.count(loss, logits, target)
            testing = tests is not None and run.due(test_every)  # due: also at the last step
            stopping = bool(signals)
            saving = stopping or run.due(args.save_every)
            if testing or saving or run.due(args.log_every):
                run.log_training(rate)
            if testing:
                run.report(test_top1=evaluate(model, tests, augment, args))
            if saving:
                run.save()
            if stopping and run.step < steps:
                run.stop(signals)
        run.save_curve()


@torch.no_grad()
def evaluate(model, data, augment, args):
    """Top-1 accuracy in percent, each rank testing its share of the images."""
    model.eval()
    right = torch.zeros((), device=args.device)
    for i in torch.arange(len(data))[args.rank::args.world_size].split(500):
        images, labels = data[i]
        right += (predict(model, augment.plain(images), args).argmax(1) == labels).sum()
    model.train()
    return 100 * over_ranks(right, args).item() / len(data)


# ==== 7 · Commands: pretrain and finetune =========================================================
#
# Both make labelled images, a network and an augmentation, and train. Fine-tuning starts from a
# checkpoint's weights, but with a new head (the classifier on top), and tests as it goes. The
# settings of both (section F has all):
#
#                   paper: pre-training -> fine-tuning    nano: pre-training -> fine-tuning
#     length        240,000 steps -> 1,000 epochs         4,700 steps -> 8 epochs
#     optimizer     AdamW -> SGD                          Muon -> Muon
#     peak rate     5e-4 -> 0.015                         2e-3 -> 2e-3
#     weight decay  0.05 -> 1e-4                          0.05 -> 0.05
#     warm-up       15 steps (sic) -> 1% of the steps     2% -> 5% of the steps
#     batch         256 -> 768                            128 -> 64
#     label smooth. 0.1 -> 0.1                            none -> 0.1
#     least crop    8% -> 8% of the area                  10% -> 70%
#     flips         left-right, up-down -> left-right     none -> left-right
#     mixup, cutmix both -> both                          cutmix -> none
#     erased boxes  50% -> 25% of the images              none -> none
#     RandAugment   on -> on                              none -> none
#     jitter        none (RandAugment does it)            on -> none
#     pixels        (x - 0.5) / 0.5 -> ImageNet's mean and standard deviation, for both

def make_model(args, num_classes):
    """The network with its initial weights."""
    dim, depth, heads = MODELS[args.model]
    torch.manual_seed(seed_for(args.seed, "weights"))
    with blaming("--img-size, --patch-size"):  # an error of one line: section D
        return ViT(args.img_size, args.patch_size, num_classes, dim, depth, heads, args.drop_path)


def make_augment(args, num_classes, **more):
    """The augmentation that the switches of the paper's Table 9 ask for; more: what a command adds.
    A switch is 0 or 1, so jitter is 0 or 0.4."""
    return Augment(
        args.img_size, num_classes, args.crop, args.aspect, (args.min_crop, 1),
        randaug=args.randaug, jitter=0.4 * args.jitter, mixup=0.8 * args.mixup,
        cutmix=1.0 * args.cutmix, smoothing=args.smoothing, **more)


def pretrain(args):
    """Pre-train on the images of --source, by default L perturbed copies of one fractal."""
    run = Run(args)  # its folder, log and checkpoint: section D
    data = source_data(args)  # section 3, or B
    num_classes = int(data.labels.max()) + 1
    augment = make_augment(args, num_classes, flip=(0.5 * args.flip,) * 2, erase=0.5 * args.erase)
    train(args, run, make_model(args, num_classes).to(args.device), data, augment, args.steps)


def finetune(args):
    """Fine-tune a checkpoint on --data, or train from scratch without one. With --probe K train
    only a linear classifier on the first K blocks."""
    run = Run(args)
    if args.ckpt and run.step == 0:
        with blaming(f"--ckpt {args.ckpt}"):  # an error of one line: section D
            load_file(args.ckpt)  # a wrong path is told before the data are downloaded
    data, tests = downstream_data(args)  # section C
    num_classes = len(data.classes)
    model = make_model(args, num_classes)
    if args.ckpt and run.step == 0:
        load_weights(model, args.ckpt)  # all but the head: section D
    if args.probe:
        model = Probe(model, args.probe, num_classes)  # section E
    augment = make_augment(args, num_classes, flip=(0.5 * args.flip, 0), erase=0.25 * args.erase,
                           **IMAGENET)
    steps = math.ceil(args.epochs * len(data) / args.batch_size)
    train(args, run, model.to(args.device), data, augment, steps, tests)


# ################# END OF PART ONE: this is the whole method. PART TWO: the rest ##################

# ==== A · RandAugment and colour jitter (for `Augment`, section 5) ================================
# To copy this section: with 5
#
# Each operation is a function of x (B, C, H, W), floats that hold 0..255, and of a level or factor
# (B, 1, 1, 1). It agrees with Pillow's to one grey level, and so with timm's. (But for the moves:
# they are bilinear, timm's often bicubic; and the edge of a moved image is blended with the grey
# around, in Pillow not.)

def to_grey(x):
    """ITU-R 601 luma as Pillow rounds it: (B, C, H, W) -> (B, 1, H, W). Grey images pass."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, 1)
    return ((19595 * red + 38470 * green + 7471 * blue) / 65536 + 0.5).floor()


def smooth(x):
    """Filtered by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13, but for the border."""
    out, inner = x.clone(), x[..., 1:-1, 1:-1]
    sums = F.avg_pool2d(x, 3, stride=1, divisor_override=1)  # of each 3x3 square
    out[..., 1:-1, 1:-1] = ((sums + 4 * inner) / 13 + 0.5).floor()
    return out


DEGENERATE = {  # an image without brightness, and so on
    "brightness": torch.zeros_like,
    "color": to_grey,
    "contrast": lambda x: (to_grey(x).mean((2, 3), keepdim=True) + 0.5).floor(),
    "sharpness": smooth,
}


def enhance(x, level, kind, size=0.9):
    """Factor 0 gives the degenerate image, 1 gives x; between and beyond, a line through both. The
    factor is 1 + size * level. (timm's "inc": 1 +- 0.9 at full magnitude.)"""
    return torch.lerp(DEGENERATE[kind](x), x, 1 + size * level).clamp_(0, 255).floor_()


def move(x, by, fill=128):
    """Turn, shear, shift images, bilinear as Pillow. by (B, 5): of each, the numbers of MOVES."""
    angle, shear_x, shear_y, shift_x, shift_y = by.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([  # Pillow shears about the corner
        cos, shear_x - sin, shear_x + shift_x,
        sin + shear_y, cos, shear_y + shift_y], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    moved = F.grid_sample(x - fill, grid, align_corners=False)
    return moved.add_(fill + 1e-3).floor_()  # 1e-3: rounding must not cost a grey level


OPS = {  # timm's fifteen operations: ten that change greys
    "autocontrast": lambda x, level: T.autocontrast(x.to(torch.uint8)).float(),
    "equalize": lambda x, level: T.equalize(x.to(torch.uint8)).float(),
    "invert": lambda x, level: 255 - x,
    "posterize": lambda x, level: x - x % 2 ** (4 + (4 * level.abs()).floor()),  # to 4 .. 0 bits
    "solarize": lambda x, level: torch.where(x < 256 - (256 * level.abs()).floor(), x, 255 - x),
    "solarize_add": lambda x, level: (x + (x < 128) * (110 * level.abs()).floor()).clamp(max=255),
    **{kind: functools.partial(enhance, kind=kind) for kind in DEGENERATE},
}
MOVES = {  # and five that move; at level 1: angle; shear of x, of y; shift of x, of y
    "rotate": (math.radians(30), 0, 0, 0, 0),
    "shear_x": (0, 0.3, 0, 0, 0),
    "shear_y": (0, 0, 0.3, 0, 0),
    "translate_x": (0, 0, 0, 0.9, 0),  # of grid_sample's width, which is 2
    "translate_y": (0, 0, 0, 0, 0.9),
}
NONE = len(OPS) + len(MOVES)  # an operation is a number: first OPS, then MOVES, then none


def apply_op(x, op, level):
    """One operation per sample: x (B, C, S, S); on the CPU op (B,) in 0..NONE, level (B,) in -1..1.

    Samples are sorted by operation, so each operation changes one slice of them, and all moves are
    one operation. Then each goes back to its place.
    """
    order = op.argsort(stable=True)
    op, level = op[order], level[order]
    by = F.pad(torch.tensor([*MOVES.values()]), (0, 0, len(OPS), 1))  # 0 for OPS and for NONE
    by = by[op] * level[:, None]  # (B, 5)
    sizes = op.bincount(minlength=NONE + 1).tolist()
    sizes[len(OPS):NONE] = [sum(sizes[len(OPS):NONE])]  # all moves are one part, after OPS
    order, level, by = (t.to(x.device, non_blocking=True) for t in (order, level, by))
    parts, levels = x[order].split(sizes), level.view(-1, 1, 1, 1).split(sizes)
    done = [change(part, level) for change, part, level in zip(OPS.values(), parts, levels)
            if len(part)]
    if len(parts[-2]):
        done.append(move(parts[-2], by.split(sizes)[-2]))
    done.append(parts[-1])  # without an operation
    return torch.empty_like(x).index_copy_(0, order, torch.cat(done))


def rand_augment(x, layers=2, magnitude=9.0, std=0.5):
    """timm's rand-m9-mstd0.5-inc1: two of the operations, each with probability 0.5."""
    B = len(x)
    for _ in range(layers):
        op = torch.where(torch.rand(B) < 0.5, torch.randint(NONE, (B,)), NONE)
        level = (magnitude + std * torch.randn(B)).clamp(0, 10) / 10
        x = apply_op(x, op, level * (torch.randint(2, (B,)) * 2 - 1))
    return x


def color_jitter(x, jitter):
    """Brightness, saturation and contrast by U(1 - jitter, 1 + jitter), in an order that the batch
    shares."""
    levels = (2 * torch.rand(3, len(x), 1, 1, 1) - 1).to(x.device, non_blocking=True)
    for k in torch.randperm(3).tolist():
        x = enhance(x, levels[k], ("brightness", "color", "contrast")[k], jitter)
    return x


# ==== B · Other images (for Tables 2, 3, 4, 11, 12, and for training on a folder) =================
#
# A source is a function from settings to `Data`; a new one needs a line in SOURCES, at the end of
# this section. Contours, clouds and a warped photograph are drawn from other numbers than maps:
# from `params`. params + eps is a class, as with the fractal.

def many_data(draw, args, texture=None, **omega):
    """--categories, and --instances images of each: draw(categories (B,), instances (B,)) -> Data.
    The label is the category."""
    labels = torch.arange(args.categories).repeat_interleave(args.instances)
    return Data(labels, lambda i: draw(i // args.instances, i % args.instances), args, texture,
                **omega)


def fractaldb_data(args):
    """Table 2. FractalDB: --categories random fractals of 2 to 7 maps, --instances images of each.
    OFDB: one image of each. Kataoka et al., Pre-training without Natural Images (ACCV 2020).

    A category is kept if its dots light a fifth of a 512 canvas. An instance is one of 25
    weightings of a parameter in all maps, 4 flips and, with random masks, a texture of its own.
    (So with other textures only 100 instances differ.)
    """
    generator, systems = seeded(args.fractal_seed), []
    while len(systems) < args.categories:
        maps = 2 * torch.rand(50, 7, 2, 3, generator=generator) - 1
        used = torch.arange(7) < torch.randint(2, 8, (50, 1), generator=generator)
        maps = maps * used[..., None, None]  # a map that is not used is 0: never chosen
        images = render_ifs(maps, dilated=False, generator=seeded(args.fractal_seed),
                            probs=maps[..., :2].det().abs())
        systems.extend(maps[covered(images) >= 0.2])
    systems = torch.stack(systems[:args.categories])
    weights = torch.ones(25, 6)  # the first one is the original
    for n in range(24):
        weights[1 + n, n // 4] = (0.2, 0.6, 1.4, 1.8)[n % 4]

    def draw(category, instance):
        maps = systems[category] * weights[instance % 25].view(-1, 1, 2, 3)
        probs = systems[category, ..., :2].det().abs()
        images = draw_ifs(maps.to(args.device), probs, args)
        for axis, flip in ((1, instance // 25 % 2 == 1), (2, instance // 50 % 2 == 1)):
            images = torch.where(flip.to(args.device)[:, None, None], images.flip(axis), images)
        return images

    return many_data(draw, args, args.texture, systems=systems)


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
        dots = (first + spread @ unit.to(params.device)).transpose(0, 1)
        edge = dots.new_full((2, len(params)), 3 if gaussian else 1.5)
        hits = rasterize(dots, args.canvas, -edge, edge)
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
    amplitude, step = shared.uniform(0, 4), shared.uniform(0, 0.1)
    radius = own.randint(0, 101) * own.uniform(1, 2, 2)  # of x and y
    centre = own.uniform(56, 456, 2)
    growth = amplitude + step - 2 * amplitude * perlin_noise((P, V, 2), own)
    return polygons(V, radius, growth), centre, own.randint(0, 256, P)


def visual_atom(seed, category, instance):
    """Visual Atoms: as RCDB, but two sine waves move the vertices too, and the ellipse is shared by
    a category. As in masora1030's make_VisualAtom.sh."""
    shared = np.random.RandomState(seed_for(seed, "va", category))
    own = np.random.RandomState(seed_for(seed, "va", category, instance))
    P, V = shared.randint(1, 201), shared.randint(200, 1001)
    amplitude, step = shared.uniform(0, 4), shared.uniform(0, 0.1)
    radius = shared.randint(10, 61) * shared.uniform(1, 2, 2)
    waves = shared.choice(21, (2, 1), replace=False)
    centre = own.uniform(0, 512, 2)
    growth = amplitude + step - amplitude * perlin_noise((P, V, 2), own)
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

    def paint(pictures):
        images = [draw_contour(*picture, args.canvas, background) for picture in pictures]
        return torch.stack(images).to(args.device)

    def draw_many(categories, instances):
        pairs = zip(categories.tolist(), instances.tolist())
        return paint(numbers(args.fractal_seed, *pair) for pair in pairs)

    if args.categories > 1:
        return many_data(draw_many, args, fractal_seed=args.fractal_seed)
    for category in itertools.count():
        offsets, centre, greys = numbers(args.fractal_seed, category, 0)
        image = draw_contour(offsets, centre, greys, 512, background)  # whatever the canvas is
        if covered(image[None], background) >= 0.2:
            break

    def draw_scaled(params):  # (B, P)
        scales = params.cpu()[..., None, None].numpy()
        return paint((offsets * scale, centre, greys) for scale in scales)

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
    straight = sector % 2 == 0  # there OpenCV asks for >= after, of whole numbers
    thin = (strength > before) & (strength > after - straight.float() / 2)
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
    """Any images, one folder a class, in --root or in its train/ (unless that is a class itself: it
    holds no folders)."""
    train = Path(args.root, "train")
    inside = train.iterdir() if train.is_dir() else ()
    split = any(entry.is_dir() and not is_extra(entry.name) for entry in inside)
    return photographs(open_folder(train if split else args.root), None, args)  # section C


LIEP = "delta L noise "  # flags of the sources that are perturbed
MANY = "categories instances "  # of those that can have many categories
SOURCES = {  # name: function, flags that have an effect on it
    "fractal": (fractal_data, LIEP + MANY + "sigma num-maps fractal-seed canvas points texture"),
    "rcdb": (contour_data, LIEP + MANY + "fractal-seed canvas"),
    "va": (contour_data, LIEP + MANY + "fractal-seed canvas"),
    "gaussian": (cloud_data, LIEP + "fractal-seed canvas points texture"),
    "uniform": (cloud_data, LIEP + "fractal-seed canvas points texture"),
    "image": (image_data, LIEP + "canvas image edges warp"),
    "folder": (image_folder_data, "root"),
}


def source_data(args):
    """The images of --source -> Data."""
    return SOURCES[args.source][0](args)


# ==== C · Downstream datasets: torchvision's by name, or a folder (for `finetune`) ================

DATASETS = {  # name: torchvision's class
    "cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "dtd": "DTD",
    "food101": "Food101", "pets": "OxfordIIITPet", "aircraft": "FGVCAircraft"}


def read_image(file):
    """An image file in RGB as a viewer shows it: upright by its EXIF tag, over white where it is
    transparent, 16 bits of grey as 8."""
    with open(file, "rb") as opened, Image.open(opened) as image:  # by name it scrambles some TIFFs
        image.load()  # a broken image fails here,
        with contextlib.suppress(Exception):  # while broken tags are forgiven
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] == "I":  # convert() would clip it at 255
            grey = np.asarray(image) / 257 + 0.5
            image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        if image.mode[-1] in "Aa" or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def square(image, side):
    """The middle of a PIL image, resized -> uint8 (3, side, side)."""
    return T.pil_to_tensor(ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR))


class Folder(torchvision.datasets.ImageFolder):
    """One folder a class. Hidden files and folders and thumbnails are left out at any level."""

    def __init__(self, root):
        def is_image(file):
            parts = Path(file).relative_to(root).parts
            return torchvision.datasets.folder.is_image_file(file) and not any(map(is_extra, parts))

        super().__init__(root, loader=read_image, is_valid_file=is_image)

    def find_classes(self, directory):
        names = [name for name in super().find_classes(directory)[0] if not is_extra(name)]
        if len(names) < 2:
            raise ValueError(f"needs two folders or more, one a class, and has: {', '.join(names)}")
        return names, {name: k for k, name in enumerate(names)}


def is_extra(name):
    """Whether systems put it beside images: .ipynb_checkpoints, ._1.png, @eaDir, __MACOSX."""
    return name.startswith((".", "@eaDir", "__MACOSX"))


def open_folder(root):
    """A torchvision dataset of the images in a folder, or one line that says what is wrong."""
    with blaming(f"--root {root}"):
        return Folder(root)


def open_datasets(args):
    """--data -> two torchvision datasets, to train and to test on, downloaded if they must be."""
    if args.data == "folder":
        test = "test" if Path(args.root, "test").is_dir() else "val"
        test = "train" if args.holdout else test  # of which a share is held out
        sets = open_folder(f"{args.root}/train"), open_folder(f"{args.root}/{test}")
        if sets[0].classes != sets[1].classes:
            raise InputError(f"--root {args.root}: the classes of train/ and {test}/ differ")
        return sets
    dataset = getattr(torchvision.datasets, DATASETS[args.data])
    test = dict(train=False) if args.data.startswith("cifar") else dict(split="test")
    with blaming(f"--data {args.data}: neither whole in --root {args.root} nor downloaded (if a "
                 "download was interrupted, remove what it has left)"):
        return dataset(args.root, download=True), dataset(args.root, download=True, **test)


def labels_of(dataset):
    """All labels (n,) of a torchvision dataset, without reading its images."""
    name = next(name for name in ("targets", "labels", "_labels") if hasattr(dataset, name))
    return torch.as_tensor(getattr(dataset, name)).long()


def read(dataset, k, args):
    """Image k of a torchvision dataset, in RGB."""
    file = (dataset.samples[k][0] if isinstance(dataset, Folder)
            else f"image {k} (if a download was interrupted, remove what it has left)")
    with blaming(f"--root {args.root}: cannot read {file}"):
        return dataset[k][0].convert("RGB")


def order_by_pixels(dataset, args):
    """A permutation (n,) of a dataset's images that all copies of the dataset share, whatever the
    files are called and in which order they come."""
    def key(k):
        image = read(dataset, k, args)
        return zlib.crc32(image.tobytes(), zlib.crc32(repr(image.size).encode()))

    with ThreadPoolExecutor() as pool:
        return torch.tensor(list(pool.map(key, range(len(dataset))))).argsort()


def balanced_subset(labels, order, per_class=None, holdout=0.0):
    """A fixed choice of per_class images of each class -> indices to train on, indices held out.

    labels (n,); order (n,): a permutation, the first images of a class in it are chosen. holdout:
    the share of the chosen images of a class that is kept for choosing settings.
    """
    chosen, held = [], []
    for label in labels.unique():
        members = order[labels[order] == label][:per_class]
        if per_class and len(members) < per_class:
            raise InputError(f"--train-per-class {per_class}: class {label} has only "
                             f"{len(members)} images; give a smaller one")
        cut = min(round(holdout * len(members)), len(members) - 1)
        held.append(members[:cut])
        chosen.append(members[cut:])
    return torch.cat(chosen), torch.cat(held)


def photographs(dataset, chosen, args):
    """Images of a torchvision dataset (chosen: their indices, None: all) -> Data. They are cropped
    to squares of 8/7 of img_size (256 for 224), or smaller ones if all of a sample of the images
    are small. Threads read them."""
    labels, pool = labels_of(dataset), ThreadPoolExecutor()
    chosen = torch.arange(len(labels)) if chosen is None else chosen
    sample = range(0, len(labels), -(-len(labels) // 20))
    largest = max(min(read(dataset, k, args).size) for k in sample)
    side = min(args.img_size * 8 // 7, largest)

    def read_square(k):
        return square(read(dataset, k, args), side)

    def draw(i):
        return torch.stack([*pool.map(read_square, chosen[i].tolist())]).to(args.device)

    return Data(labels[chosen], draw, args, classes=list(dataset.classes))


def downstream_data(args):
    """--data -> images to train on, images to test on."""
    if not args.lead:
        torch.distributed.barrier()  # until the lead has downloaded them
    train, test = open_datasets(args)
    if args.lead and args.world_size > 1:
        torch.distributed.barrier()
    labels = labels_of(train)
    some = args.train_per_class or args.holdout
    order = order_by_pixels(train, args) if some else torch.arange(len(labels))
    chosen, held = balanced_subset(labels, order, args.train_per_class, args.holdout)
    if args.holdout and not len(held):
        raise InputError(f"--holdout {args.holdout}: leaves no images to test on")
    data = photographs(train, chosen, args)
    return data, photographs(train, held, args) if args.holdout else photographs(test, None, args)


# ==== D · Runs: errors, folder, log, checkpoint, signals, ranks (for every command) ===============

class InputError(Exception):
    """A mistake in the input. main() prints its one line and exits with status 2."""


@contextlib.contextmanager
def blaming(what):
    """Whatever goes wrong inside becomes an InputError of one line: what, and the reason."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__} "
        raise InputError(f"{what}: {kind}{str(error)[:300]}") from error


def say(text):
    """Print. A reader that is gone (Ctrl-C in `| tee`) must not end a run."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def to_json(content):
    """Plain values and tensors, these as lists."""
    return json.dumps(content, default=torch.Tensor.tolist)


def load_file(path):
    """The dict that torch.save wrote. Code in a file is never run, so it may hold no objects."""
    if not Path(path).is_file():
        raise ValueError("there is no such file")
    with torch.serialization.safe_globals([argparse.Namespace]):  # of timm's training
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError("no whole file from torch.save, or more than a state dict in it: save "
                             "that") from error
    if not isinstance(saved, dict):
        raise ValueError(f"holds no weights by their names, but one {type(saved).__name__}")
    return saved


def load_weights(model, path):
    """Copy a checkpoint into a ViT, all but the head; position embeddings are interpolated. Files
    of ours, the authors, timm and Lightning fit, of compiled and of parallel networks too."""
    own = model.state_dict()
    with blaming(f"--ckpt {path}"):
        saved = load_file(path)
        for key in ("model", "state_dict", "model_state_dict"):
            saved = saved[key] if isinstance(saved.get(key), dict) else saved
        state = {  # without what is counted in whole numbers: n_averaged, num_batches_tracked
            re.sub(r"^((module|_orig_mod|model)\.)+", "", str(name)): t
            for name, t in saved.items() if torch.is_tensor(t) and t.is_floating_point()}
        if "pos_embed" not in state:
            raise ValueError(f"holds no Vision Transformer, but {', '.join(map(str, saved))}")
        if not all(t.isfinite().all() for t in state.values()):
            raise ValueError("a weight is not finite")
    with blaming(f"--ckpt {path}: does not fit --model and --patch-size"):
        pos = state["pos_embed"].float()
        new, old = (math.isqrt(p.shape[1] - 1) for p in (own["pos_embed"], pos))
        grid = pos[:, 1:].view(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, old, old)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
        state["pos_embed"] = torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], 1)
        model.load_state_dict(state | {name: own[name] for name in ("head.weight", "head.bias")})


def machine(args):
    """What a result may depend on besides its settings, as a record."""
    commit, cuda = None, args.device.startswith("cuda")
    with contextlib.suppress(NameError, OSError, subprocess.CalledProcessError):
        here = Path(__file__).parent  # in a notebook's cell: a NameError
        commit = subprocess.check_output(["git", "-C", here, "describe", "--always", "--dirty"],
                                         stderr=subprocess.DEVNULL, text=True).strip()
    processor = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    return dict(commit=commit, torch=torch.__version__, processor=processor,
                threads=torch.get_num_threads())


# Settings that may change when a run goes on: where it is and runs, how often it reports, saves and
# tests. (`begin` compares the images themselves, so they may move. A run that has ended never
# reaches `begin`, so its command must name the same root and image.)
FREE = {*"out root image device compile rank lead log_every save_every eval_epochs".split()}


class Run:
    """A training in its folder. A checkpoint, last.pt, makes the folder a run's: the same command
    goes on from there, another one is refused. Before the first checkpoint any command may begin.
    Beside it are args.json (the settings, for people), omega.json (what images were drawn from),
    log.jsonl, and the pictures."""

    def __init__(self, args):
        self.args, self.out, self.last = args, Path(args.out), Path(args.out, "last.pt")
        self.step, self.steps, self.log, self.settings, self.saved = 0, None, [], {}, None
        self.sums = torch.zeros(3, device=args.device)  # loss, right, steps since the last line
        with blaming(f"--out {args.out}: cannot go on from its last.pt; give another --out"):
            if self.last.exists():
                self.saved = load_file(self.last)
                self.settings, self.log = dict(self.saved["args"]), list(self.saved["log"])
                self.step, self.steps = int(self.saved["step"]), int(self.saved["steps"])
            ended = self.step == self.steps
            self.agree(vars(args), FREE - {"root", "image"} if ended else FREE)
            if args.world_size > 1:
                total = over_ranks(torch.tensor(self.step, device=args.device), args)
                if total != self.step * args.world_size:
                    raise ValueError("machines have different ones; it must be a folder they share")
        if ended:
            self.say(f"onepfrac: --out {args.out}: this run has ended; give another --out")
            sys.exit()
        self.say(f"recipe {args.recipe}: {args.model}, {args.device} x{args.world_size}, "
                 f"{args.precision}, in {args.out}; first the images are drawn or read")

    def say(self, text):
        if self.args.lead:
            say(text)

    def agree(self, known, free=()):
        """Note what is known of this run. InputError if the run in the folder differs."""
        differ = [f"{name} {self.settings[name]}, not {value}" for name, value in known.items()
                  if name not in free and self.settings.get(name, value) != value]
        if differ:
            raise InputError(f"--out {self.args.out}: holds a run with {'; '.join(differ)}; "
                             "give the run's own, or another --out")
        self.settings.update(known)

    def begin(self, model, optimizer, steps, data, tests):
        """Take over the checkpoint, if there is one. Write what is known before the first step."""
        self.model, self.optimizer, self.steps = model, optimizer, steps
        images = [f"{len(some)} ({some.fingerprint})" for some in (data, tests) if some]
        self.agree({f"images_{self.args.device[:4]}": images})  # a GPU may draw them otherwise
        if self.saved:
            with blaming(f"--out {self.args.out}: cannot go on from its last.pt; give another"):
                model.load_state_dict(self.saved["model"])
                optimizer.load_state_dict(self.saved["optimizer"])
            self.saved = None  # it would need as much memory again
        self.tick = time.perf_counter()
        self.start = self.tick - (self.log[-1]["seconds"] if self.log else 0)
        if self.args.lead:
            self.out.mkdir(parents=True, exist_ok=True)
            record = self.settings | dict(classes=data.classes) | machine(self.args)
            (self.out / "args.json").write_text(to_json(record))
            if data.omega:
                (self.out / "omega.json").write_text(to_json(data.omega))
            self.write_log(self.log, "w")  # without lines that came after the checkpoint
        self.say(f"{' + '.join(images)} images, steps {self.step} to {steps} of "
                 f"{self.args.batch_size}")

    def due(self, every):
        """Whether it is time for what is done every so many steps (maybe a fraction), and at the
        last one."""
        return self.step % every < 1 or self.step == self.steps

    def count(self, loss, logits, target):
        """Add a step to the means of the next line. Nothing here waits for a GPU."""
        right = (logits.argmax(1) == target.argmax(1)).float().mean()
        self.sums += torch.stack([loss, right, torch.ones_like(loss)])

    def log_training(self, rate):
        """Mean loss and accuracy of the whole batch, and speed, since the last line."""
        loss, right, steps = over_ranks(self.sums, self.args).tolist()
        self.refuse_infinite(self.sums)
        batches, seconds = steps / self.args.world_size, time.perf_counter() - self.tick
        speed = batches * self.args.batch_size / seconds
        left = (self.steps - self.step) * self.args.batch_size / speed / 60
        self.report(loss=loss / steps, top1=100 * right / steps, lr=rate, images_per_s=speed,
                    minutes_left=left)
        self.sums.zero_()

    def report(self, **numbers):
        """A line of the log, printed and written."""
        self.tick, images = time.perf_counter(), self.step * self.args.batch_size
        self.log.append(dict(step=self.step, images=images,
                             seconds=round(self.tick - self.start, 1), **numbers))
        if self.args.lead:
            self.write_log(self.log[-1:], "a")
        text = "".join(f"  {name} {value:.4g}" for name, value in numbers.items())
        self.say(f"step {self.step}/{self.steps}{text}")

    def write_log(self, records, mode):
        with open(self.out / "log.jsonl", mode) as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def refuse_infinite(self, *tensors):
        """InputError unless all numbers are finite, before last.pt would be overwritten."""
        if not all(t.isfinite().all() for t in tensors):
            raise InputError(f"--lr {self.args.lr}: the loss or a weight is not finite at step "
                             f"{self.step}; give a lower one, and another --out")

    def save(self):
        """Write last.pt, from which the run can go on, so that at any moment there is a whole one:
        write a file beside it, flush it to disk, rename it."""
        self.refuse_infinite(*self.model.parameters())
        if self.args.lead:
            part, content = self.out / "last.pt.part", io.BytesIO()
            torch.save(dict(args=self.settings, step=self.step, steps=self.steps, log=self.log,
                            model=self.model.state_dict(),
                            optimizer=self.optimizer.state_dict()), content)
            with open(part, "wb") as file:
                file.write(content.getbuffer())  # torch.save would hide that a disk is full
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.last)

    def stop(self, signals):
        self.say(f"onepfrac: saved step {self.step} of {self.steps}; the same command goes on")
        sys.exit(128 + signals[0][0])  # as shells expect

    def save_samples(self, x, augment):
        """samples.png: what the network sees, the first images of a batch (B, 3, S, S)."""
        if self.args.lead:
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (augment.mean, augment.std))
            torchvision.utils.save_image(x[:64].cpu() * std + mean, self.out / "samples.png")

    def save_curve(self):
        """curve.png: accuracy on the batches, and on the test images if any."""
        if not self.args.lead:
            return
        figure = Figure(layout="constrained")
        axis = figure.subplots()
        for name in ("top1", "test_top1"):
            records = [record for record in self.log if name in record]
            if records:  # pre-training has no tests
                x, y = [r["images"] for r in records], [r[name] for r in records]
                axis.plot(x, y, ".-", label=name)
        axis.set(xlabel="images seen", ylabel="accuracy in percent")
        axis.legend()
        figure.savefig(self.out / "curve.png", dpi=120)


@contextlib.contextmanager
def noted_signals(args):
    """Ctrl-C, `kill` and the end of a terminal are noted in a list, as (number, time), for the end
    of a step. One wish to stop may come twice at once (from `uv run`, SLURM, systemd), so only a
    Ctrl-C a second after the first signal acts at once. (With several ranks a signal ends the
    processes; the last checkpoint counts.)"""
    signals, before = [], {}

    def note(number, frame):
        signals.append((number, time.monotonic()))
        if number == signal.SIGINT and signals[-1][1] > signals[0][1] + 1:
            raise KeyboardInterrupt

    own = args.world_size == 1 and threading.current_thread() is threading.main_thread()
    for name in ("SIGINT", "SIGTERM", "SIGHUP") if own else ():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            before[number] = signal.signal(number, note) or signal.SIG_DFL
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@blaming("WORLD_SIZE, RANK: start several processes by torchrun")
def join_ranks(args):
    """Several processes, started by torchrun, share each batch. The lead writes and prints."""
    args.rank, args.world_size = 0, int(os.environ.get("WORLD_SIZE", 1))
    if args.world_size > 1:
        alone = args.command == "render" or args.command == "finetune" and args.probe
        if alone or args.batch_size % args.world_size:
            raise InputError("several processes: for pretrain and finetune without --probe, with a "
                             "--batch-size that is a multiple of them")
        args.rank = int(os.environ["RANK"])
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group()
    args.lead = args.rank == 0


def over_ranks(x, args):
    """x becomes its sum over all ranks."""
    if args.world_size > 1:
        torch.distributed.all_reduce(x)
    return x


def accelerate(model, args):
    """The network that is trained: parallel with several ranks, compiled on a GPU."""
    network = nn.parallel.DistributedDataParallel(model) if args.world_size > 1 else model
    if not args.compile or args.device == "cpu":
        return network
    torch.compiler.reset()  # what earlier runs of a program left
    with blaming("--compile, which --no-compile leaves out"):
        return torch.compile(network)


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
            matrices = [p for p in group["params"] if "muon_dtype" in group and p.grad is not None]
            for shape in dict.fromkeys(p.shape for p in matrices):
                self.update([p for p in matrices if p.shape == shape], **group)
        super().step()  # passes over parameters without a gradient

    def update(self, matrices, lr, weight_decay, muon_dtype, momentum=0.95, **_):
        """One step of n matrices of one shape, all at once."""
        state, grads = self.state[matrices[0]], torch.stack([p.grad for p in matrices])
        if not state:  # one for all n, with the "step" that loading an AdamW needs
            state.update(step=torch.tensor(0.0), momentum_buffer=torch.zeros_like(grads))
        buffers = state["momentum_buffer"].lerp_(grads, 1 - momentum)
        updates = grads.lerp(buffers, momentum)  # Nesterov
        updates = orthogonalise(updates.to(muon_dtype)).to(grads.dtype)
        size = 0.2 * max(matrices[0].shape) ** 0.5  # the root mean square of an update is 0.2
        for p, update in zip(matrices, updates):
            p.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * size)
            p.grad = None


def orthogonalise(x, steps=5):
    """Matrices (n, rows, columns) with their singular values moved to about 0.7 to 1.2, by Newton
    and Schulz: x -> a x + b (x x^T) x + c (x x^T)^2 x, with Jordan's a, b, c."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):  # baddbmm(z, x, y) is beta z + alpha x y
        gram = wide @ wide.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.baddbmm(wide, gram, wide, beta=3.4445)
    return wide if x.shape[1] <= x.shape[2] else wide.mT


class Probe(nn.Module):
    """A linear classifier on the first k blocks of a ViT, frozen: images -> logits. It sees the
    mean of the patch tokens, each feature normalised by its batch (as in MAE's probe)."""

    def __init__(self, model, k, num_classes):
        super().__init__()
        if k > len(model.blocks):
            raise InputError(f"--probe {k}: the network has {len(model.blocks)} blocks")
        self.frozen, self.k, dim = model.requires_grad_(False), k, model.pos_embed.shape[2]
        for block in model.blocks:
            block.drop_path = 0
        self.normalise = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        with torch.no_grad():
            x = self.frozen.blocks[:self.k](self.frozen.embed(x))[:, 1:].mean(1)  # (B, D)
        return self.head(self.normalise(x))


def render(args):
    """Write the images of --source to OUT/<class>/<number>.png, as ImageFolder reads them, and the
    numbers that they are drawn from to OUT.json."""
    out, numbers = Path(args.out), Path(f"{Path(args.out)}.json")
    if out.exists() or numbers.exists():
        raise InputError(f"--out {out}: it or {numbers} is there already; give a new folder")
    data = source_data(args)
    out.mkdir(parents=True)
    for i in torch.arange(len(data)).split(64):
        for k, image, label in zip(i.tolist(), *(t.cpu() for t in data[i])):
            folder = out / f"{label:05d}"  # alphabetical is numerical
            folder.mkdir(exist_ok=True)
            T.to_pil_image(image).save(folder / f"{k}.png")
    numbers.write_text(to_json(data.omega))
    say(f"{len(data)} images in {out}, what they were drawn from in {numbers}")


# ==== F · Settings: recipes, flags, main (to look up a flag or its default) =======================
#
# A flag's own default is the paper's in pre-training, or the authors' code's where it is silent.
# FINETUNE has what they change to fine-tune, RECIPES what a recipe changes: in every command, in
# pretrain, in finetune. A flag on the command line comes last.

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
    """An argparse type: a number from low to high."""
    def number(text):  # argparse's errors have this name
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text}: give a number from {low} to {high}")
    return number


def path(text):
    """An argparse type: a path, not an empty one (as of a variable that is not set)."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; leave the flag out, or give a path")
    return os.path.expanduser(text)  # shells leave the ~ of --out=~/runs


whole, real = functools.partial(number, int), functools.partial(number, float)


def general_flags(command):
    """Of every command."""
    add = command.add_argument_group("general").add_argument
    add("--seed", default=0, type=whole(0, 2 ** 62), help="of all but --fractal-seed and subsets")
    there = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    add("--device", default=there[0], choices=there, help="where it runs")
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
    add("--fractal-seed", default=32, type=whole(0, 2 ** 32 - 1),
        help="which fractal or other image")
    add("--num-maps", default=2, type=whole(2, 1000), help="N of Eq. 1")
    add("--canvas", default=512, type=whole(16, 4096), help="pixels a side, as drawn")
    add("--points", default=100_000, type=whole(1, 10 ** 8), help="dots of an image")
    add("--texture", default="random", choices=("random", "fresh", "fill", "point"),
        help="of the dots: random masks; fresh ones at each step (Table 13, \"w/ Aug.\"); whole "
             "3x3 squares; single pixels")


def pretrain_flags(command):
    """Of pretrain alone."""
    add = command.add_argument_group("pre-training").add_argument
    add("--steps", default=240_000, type=whole(1), help="length")
    add("--root", default="data", type=path, help="of --source folder: one folder a class")


def training_flags(command):
    """Of pretrain and finetune."""
    switch = argparse.BooleanOptionalAction
    add = command.add_argument_group("the run").add_argument
    add("--save-every", default=1000, type=whole(1), help="steps between checkpoints")
    add("--log-every", default=50, type=whole(1), help="steps between lines of the log")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"),
        help="auto: bf16 where it is fast")
    add("--compile", default=True, action=switch, help="torch.compile, on a GPU")

    add = command.add_argument_group("network").add_argument
    add("--model", default="vit_tiny", choices=MODELS, help="Vision Transformer")
    add("--img-size", default=224, type=whole(3, 4096), help="pixels a side, as the network sees")
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


def fast_bf16(device):
    """Whether a GPU, or an x86 processor, multiplies bfloat16 itself."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        raise InputError(message.removeprefix("argument "))


def parse(words):
    """A command line -> settings, and the rank of this process. The recipe is read first, as the
    defaults depend on it."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="nano", choices=RECIPES,
                       help="a set of defaults; small: for a GPU")
    both, pretraining, finetuning = RECIPES[first.parse_known_args(words)[0].recipe]
    parser = Parser(prog="onepfrac.py", allow_abbrev=False, description="Pre-train a Vision "
                    "Transformer on perturbed copies of one fractal.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function, flags, defaults in (
            (pretrain, (picture_flags, pretrain_flags, training_flags), both | pretraining),
            (finetune, (finetune_flags, training_flags), FINETUNE | both | finetuning),
            (render, (picture_flags,), both)):
        command = commands.add_parser(
            function.__name__, help=function.__doc__, description=function.__doc__, parents=[first],
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for add_flags in (general_flags, *flags):
            add_flags(command)
        known = {action.dest for action in command._actions}
        command.set_defaults(**{k: v for k, v in defaults.items() if k in known})
    args = parser.parse_args(words)
    refuse_idle_flags(args, words)
    if getattr(args, "precision", None) == "auto":
        args.precision = "bf16" if fast_bf16(args.device) else "fp32"
    join_ranks(args)  # section D
    if getattr(args, "probe", None) and args.batch_size == 1:
        raise InputError("--batch-size 1: with --probe two or more, to normalise over them")
    return args


def refuse_idle_flags(args, words):
    """An ablation by a flag that has no effect beside the others would look like a finding."""
    of = vars(args).get
    rules = [  # flags, whether they have none, and why
        ("instances", of("categories") == 1, "without --categories above 1"),
        ("delta L noise sigma num-maps", of("categories", 1) > 1, "with --categories above 1"),
        ("drop-path", of("probe"), "with --probe"),
        ("optimizer", of("probe") and of("optimizer") == "muon", "with --probe if it is muon"),
        ("noise", of("noise") == "multiplicative" and of("warp") == "elastic",
         "with --warp elastic, whose numbers are 0, if it is multiplicative"),
        ("compile", of("device") == "cpu", "on a CPU"),
        ("jitter", of("randaug"), "with --randaug"),
        ("min-crop aspect", not of("crop"), "with --no-crop")]
    if "source" in args:
        others = {name for _, names in SOURCES.values() for name in names.split()}
        others -= {*SOURCES[args.source][1].split()}
        rules.append((" ".join(others), True, f"with --source {args.source}"))
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        for names, idle, why in rules:
            if idle and re.sub("^--(no-)?", "", flag) in names.split():
                raise InputError(f"{flag}: has no effect {why}; leave it out")


def main(words=None):
    """Run one command -> exit status."""
    try:
        args = parse(sys.argv[1:] if words is None else words)
        with torch.random.fork_rng(range(torch.cuda.device_count())):  # a program keeps its own
            torch.manual_seed(args.seed)
            {"pretrain": pretrain, "finetune": finetune, "render": render}[args.command](args)
        if args.world_size > 1:
            torch.distributed.destroy_process_group()
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        where = {InputError: "", torch.OutOfMemoryError: "--batch-size: "}.get(
            type(error), "--out or --root: ")  # a full disk
        print(f"onepfrac: {where}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        return 130
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        why = " ".join(str(error).split())[:300]  # no compiler, or no triton
        print(f"onepfrac: --compile: {why}; give --no-compile", file=sys.stderr)
        return 2
    except SystemExit as stop:  # --help, a signal, a run that has ended
        return stop.code or 0
    return 0


# ==== G · Speed: why some lines are not the plainest ==============================================
#
#     GOMP_SPINCOUNT (top)    threads that wait would spin, and keep a core that others need
#     chaos_game              table[rows] takes 5 times as long as index_select on a CPU
#     stamp                   64 coins from a number: 12 times as fast as random_(2) for each pixel
#     Attention               on CPUs the fused attention is slow in bf16
#     Augment, Run.count      what is random is chosen on the CPU and sent there (non_blocking), and
#                             nothing is read back, so the loop never waits for a GPU
#     apply_op                half the operations of a loop over all kinds (297 and not 609 a step)
#     Muon.update             many small operations take longer than one on all matrices
#     orthogonalise           baddbmm: 0.9 of the time on a CPU
#     keep_memory             page faults take a fifth of the time on a CPU

def keep_memory():
    """Tell glibc to keep what is freed."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX


if SCRIPT:
    keep_memory()
    PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26  # a PNG's colour profile may be large
    with contextlib.suppress(AttributeError):  # no standard output, or a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters of a path
    sys.exit(main())
