"""onepfrac: pre-train a Vision Transformer on perturbed copies of one fractal.

A single-file reference of "Scaling Backwards: Minimal Synthetic Pre-training?" (Nakamura et al.,
ECCV 2024). One idea holds the file together:

    an image is render(theta), a class is a point theta + eps near it,
    and pre-training is telling those points apart.

    python onepfrac.py pretrain --delta 0.1 --sigma 3.5         # one fractal -> a ViT
    python onepfrac.py finetune --ckpt runs/pretrain/last.pt    # that ViT -> CIFAR-100
    python onepfrac.py finetune                                 # the same from scratch
    python onepfrac.py show                                     # the paper's Figs. 2b and 2c

Measured (README): eight epochs of CIFAR-100, 250 images a class, end at 29.9% from the fractal and
at 24.0% from scratch (means of three seeds), after about eight minutes on two CPU cores.

Read it from top to bottom: 1 iterated function systems, 2 the renderer, 3 the LIEP distribution
and the LPCE loss, 5 augmentation, 6 the ViT, 7 downstream data, 8 training, 9 commands, 10 flags.
Sections 1, 2, 5, 6, and `perturb` and `lpce_loss` of 3, need torch and the standard library and
nothing from one another, so each can be copied.
"""
import argparse
import functools
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# Literal numbers of the three scales; any flag overrides its number. `augment` names the switches
# of Table 9 that are on; warm-up is a fraction of the steps; every other name is a flag. `paper`
# holds what the paper and the authors' code say; jitter acts there once RandAugment is off.
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
            augment="crop aspect flip", crop_scale=(0.4, 1.0), smoothing=0.0)),
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
            smoothing=0.1)),
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
            smoothing=0.1)),
}
SWITCHES = ("randaug", "crop", "aspect", "erase", "mixup", "cutmix", "flip", "jitter")    # Table 9


class InputError(Exception):
    """A mistake in the input. main() prints its one line and exits with status 2."""


# ==================================================================================================
# 1 · IFS and sigma-factor (Eq. 1-2)
#
# An iterated function system Omega = {w_1 .. w_N; p_1 .. p_N} is a handful of affine maps
#     w_j(v) = A_j v + t_j,   stored as rows [a b e; c d f], so maps are (N, 2, 3).
# If the maps contract, there is exactly one shape that they leave unchanged: the fractal.
# ==================================================================================================

def sigma_factor(maps):
    """sum_j (s_j1 + 2 s_j2), singular values of the 2x2 parts: maps (..., N, 2, 3) -> (...).

    Small sigma: strong contractions and a sparse, intricate shape. Large: a diffuse cloud; at the
    largest, 3 N, every singular value is 1 and nothing contracts any more.
    Anderson & Farrell, Improving Fractal Pre-training (WACV 2022).
    """
    s = torch.linalg.svdvals(maps[..., :2])                         # (..., N, 2), larger one first
    return (s[..., 0] + 2 * s[..., 1]).sum(-1)


def sample_ifs(num_maps, sigma, generator=None):
    """Random affine maps whose sigma-factor is exactly sigma -> maps (N, 2, 3) float32 on the CPU.

    A_j = U diag(s1, s2) V with U, V random rotations or reflections, 1 >= s1 >= s2 >= 0, and
    translations U(-1, 1). Raises ValueError unless num_maps >= 2 and 0 < sigma <= 3 num_maps.
    Sampling order of the singular values: Anderson & Farrell (WACV 2022), Algorithm 1.
    """
    if num_maps < 2 or not 0 < sigma <= 3 * num_maps:
        raise ValueError(f"need num_maps >= 2 and 0 < sigma <= 3 num_maps, "
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
# One orbit is a long chain of tiny steps, so here a thousand short orbits run side by side. All
# images share the sequence, so an orbit needs the same map j of every image: with the images along
# the last axis, that is one contiguous row, and a step is one copy of rows and two products.
# ==================================================================================================

ORBIT = 100      # plotted steps of each orbit
BURN_IN = 30     # steps before, to reach the attractor from the origin; they are not plotted
GREY = 127       # colour of a stamp
POINTS_IN_FLIGHT, PIXELS_IN_FLIGHT = 3_000_000, 2 ** 24    # of the images rendered as a group


def map_sequence(probs, points, generator=None):
    """The random choices of the chaos game, shared by all images: (steps, K) map indices.

    K orbits of BURN_IN + ORBIT steps give at least `points` points to plot. probs: (N,).
    """
    orbits, steps = -(-points // ORBIT), BURN_IN + ORBIT
    draws = torch.multinomial(probs.cpu().double(), steps * orbits, True, generator=generator)
    return draws.view(steps, orbits)


def chaos_game(maps, sequence, out=None):
    """Orbits of B systems at once: maps (B, N, 2, 3), sequence (steps, K) -> points (T, 2, K, B).

    `out` is memory to write the points into; fresh memory for each group would cost a sixth more.
    Steps of the burn-in go to scratch memory.
    """
    (steps, K), B = sequence.shape, len(maps)
    if out is None or out.shape != (steps - BURN_IN, 2, K, B):
        out = maps.new_empty(steps - BURN_IN, 2, K, B)
    numbers = maps.permute(2, 3, 1, 0).flatten(0, 1).contiguous()   # (6, N, B)
    x, y = maps.new_zeros(2, K, B)
    for step, j in enumerate(sequence.to(maps.device)):
        a, b, e, c, d, f = (number.index_select(0, j) for number in numbers)    # (K, B) each
        place = out[step - BURN_IN] if step >= BURN_IN else torch.empty_like(out[0])
        x, y = (torch.addcmul(e, a, x, out=place[0]).addcmul_(b, y),
                torch.addcmul(f, c, x, out=place[1]).addcmul_(d, y))
    return out


def rasterize(points, size, expands):
    """Points (T, 2, K, B) -> images (B, size, size) uint8, GREY where hit, y upwards.

    The bounding box is stretched to fill the canvas but for a margin of 6 pixels in 512. A system
    with a map that expands (B,) may throw a few points far out: its box follows the central 98% of
    the points where the full one is over twice as large, and what lies outside is not drawn.
    """
    K, B = points.shape[2:]
    low, high = points.amin(0).amin(1), points.amax(0).amax(1)      # (2, B), NaN if a point is
    wild = expands.new_zeros(B)
    if expands.any():
        sample = points[:, :, ::max(1, K // 20)]                    # enough for two quantiles
        sample = sample.permute(1, 3, 0, 2).flatten(2).nan_to_num(1e30, 1e30, -1e30)
        core = torch.quantile(sample, sample.new_tensor([0.01, 0.99]), dim=2)   # (2, 2, B)
        wild = expands & ~(high - low <= 2 * (core[1] - core[0]))   # true for NaN as well
        low, high = torch.where(wild, core[0], low), torch.where(wild, core[1], high)

    margin, canvas = max(1, 6 * size // 512), size * size
    scale = (size - 1 - 2 * margin) / (high - low).clamp(min=1e-6)
    corner = torch.stack([low[0], high[1]])[:, None]                # (2, 1, B), the upper left one
    scale = torch.stack([scale[0], -scale[1]])[:, None]             # image rows grow downwards
    image = torch.arange(B, device=points.device) * canvas
    hits = torch.zeros(B * canvas + 1, dtype=torch.uint8, device=points.device)
    for few in points.split(10):                                    # pieces that stay in the cache
        pixel = (few - corner).mul_(scale).add_(margin + 0.5).floor_()          # (10, 2, K, B)
        cell = torch.add(pixel[:, 0], pixel[:, 1], alpha=size).long().add_(image)
        if wild.any():
            inside = ((few >= low[:, None]) & (few <= high[:, None])).all(1)
            cell.masked_fill_(~inside, B * canvas)                  # a spare cell behind the last
        hits[cell.view(-1)] = GREY
    return hits[:-1].view(B, size, size)


def dilate(images):
    """Each lit pixel grows to its 3x3 neighbourhood: images (B, S, S) uint8 -> the same."""
    rows = F.pad(images, (1, 1, 1, 1))
    rows = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return rows[:, :, :-2] | rows[:, :, 1:-1] | rows[:, :, 2:]


def stamp(coverage, texture, generator=None):
    """Give whole stamps (B, S, S) their texture: images of `ifs_coverage` -> grey images uint8.

    The authors stamp each point with one of the 511 non-empty 3x3 masks, later stamps overwriting
    earlier ones. A covered pixel shows the bit of the last stamp on it, set in 256 of 511 masks:
    so the picture is the covered area times independent coin flips, and a fresh texture for an
    image that is kept on the device costs one random mask. The generator is on its device.
    """
    if texture != "random":
        return coverage
    # Eight coins from each random byte: 1/2 for 256/511, and an eighth of the random numbers.
    images = torch.empty_like(coverage)
    bit = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=images.device)
    draws = 16 * coverage[0].numel() // 64 + 1                      # also for a short last group
    for out, group in zip(images.split(16), coverage.split(16)):    # pieces that stay in the cache
        draw = torch.empty(draws, dtype=torch.int64, device=images.device)
        draw = draw.random_(-2 ** 63, None, generator=generator).view(torch.uint8)
        coin = (draw & bit[:, None]).view(-1)[:group.numel()].view_as(group) != 0
        torch.mul(group, coin.view(torch.uint8), out=out)
    return images


def ifs_coverage(maps, size, points, texture, probs=None, generator=None):
    """Maps (L, N, 2, 3) -> what whole stamps cover (L, size, size), 0 or GREY, on maps.device.

    probs (N,) are the map probabilities, by default in proportion to the mean |det A| of `maps`;
    pre-training passes the unperturbed system's. The generator, on the CPU, draws the one map
    sequence of all images.
    """
    if probs is None:
        probs = maps[..., :2].det().abs().mean(0)
    sequence = map_sequence(probs.clamp(min=1e-9), points, generator)
    coverage = torch.empty(len(maps), size, size, dtype=torch.uint8, device=maps.device)
    orbits = None
    group = max(1, min(POINTS_IN_FLIGHT // points, PIXELS_IN_FLIGHT // size ** 2))
    for first in range(0, len(maps), group):
        members = maps[first:first + group]
        expands = (torch.linalg.svdvals(members[..., :2]) > 1).any(2).any(1)
        orbits = chaos_game(members, sequence, orbits)
        hits = rasterize(orbits, size, expands)
        coverage[first:first + group] = hits if texture == "point" else dilate(hits)
    return coverage


def render_ifs(maps, size=512, points=100_000, texture="random", generator=None, probs=None):
    """Draw IFS attractors: maps (L, N, 2, 3) -> grey images (L, size, size) uint8 on maps.device.

    texture: "random" 3x3 masks (the paper), "fill" whole 3x3 stamps, "point" single pixels.
    generator: on the CPU; draws the map sequence and seeds the texture. Systems without an
    attractor give blank or nearly blank images, never NaN. Raises ValueError on bad arguments.
    """
    if maps.ndim != 4 or maps.shape[2:] != (2, 3) or not len(maps) or size < 8 or points < 1 \
            or (probs is not None and probs.shape != maps.shape[1:2]):
        raise ValueError(f"need maps (L, N, 2, 3) with L >= 1, probs (N,), size >= 8, points >= 1; "
                         f"got {tuple(maps.shape)}, {probs}, {size}, {points}")
    if texture not in ("random", "fill", "point"):
        raise ValueError(f"texture must be random, fill or point, got {texture!r}")
    coverage = ifs_coverage(maps, size, points, texture, probs, generator)
    seed = int(torch.randint(2 ** 31, (), generator=generator))
    return stamp(coverage, texture, torch.Generator(maps.device).manual_seed(seed))


# ==================================================================================================
# 3 · LIEP distribution and LPCE loss (Eq. 6-9)
#
# With one image there is one class and nothing to learn (Eq. 6). So the label becomes the
# perturbation: p_Delta(x, y) is uniform over (render(theta + eps), eps) for eps in a cube of side
# Delta (Eq. 7), approximated by L fixed draws of eps, each of them a class.
# ==================================================================================================

def perturb(maps, delta, L, generator=None, noise="additive"):
    """L draws from the cube around one system: maps (N, 2, 3) -> (L, N, 2, 3), Eq. 9.

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
        maps = sample_ifs(num_maps, min(max(target, 1e-3), 3 * num_maps), generator)
        drawn = ifs_coverage(maps[None], 512, 100_000, "fill", None,
                             torch.Generator().manual_seed(seed))
        if (drawn > 0).float().mean() >= min_fill:
            return maps
    raise InputError(f"--sigma {sigma}: none of {tries} draws of {num_maps} maps fills "
                     f"{min_fill:.0%} of the canvas; raise --sigma or --num-maps")


def liep_images(base, delta, L, size, points, texture, noise, seed, device, min_fill=0.05):
    """Render L points of the LIEP distribution -> coverage (L, size, size), maps (L, N, 2, 3).

    Candidates come in one fixed order; those that light fewer than min_fill of the pixels are
    passed over, as the authors redraw them (random masks light half of what stamps cover). All
    images share one map sequence and the unperturbed map probabilities.
    """
    generator = torch.Generator().manual_seed(seed)
    probs, lit = base[:, :, :2].det().abs(), 0.5 if texture == "random" else 1.0
    images = torch.empty(L, size, size, dtype=torch.uint8, device=device)
    maps, drawn, found = base.new_empty(L, *base.shape), 0, 0
    while found < L:
        if drawn >= 20 * L + 1000:
            raise InputError(f"--delta {delta}: only {found} of {drawn} perturbed systems give an "
                             f"image that is filled {min_fill:.0%}; lower --delta, raise --points")
        candidates = perturb(base, delta, min(L - found, 250), generator, noise)
        drawn += len(candidates)
        covered = ifs_coverage(candidates.to(device), size, points, texture, probs,
                               torch.Generator().manual_seed(seed))
        keep = lit * (covered > 0).flatten(1).float().mean(1).cpu() >= min_fill
        new = slice(found, found + int(keep.sum()))
        images[new], maps[new], found = covered[keep.to(device)], candidates[keep], new.stop
    return images, maps


# ==================================================================================================
# 5 · Augmentation: DeiT's, per sample, on a batch that is already on the device
#
# Geometry is linear algebra. A crop, with its flips, is one resampling matrix for the rows and one
# for the columns: out = R_y @ image @ R_x^T. And RandAugment's fifteen operations are three:
# six are tables of 256 entries, four are blends with a degenerate image, five are 2x3 matrices.
# Mixup and cutmix are one formula with two masks. Inside, images are floats that hold 0..255.
# ==================================================================================================

def resample_matrix(start, length, size_in, size_out, flip):
    """Antialiased cubic resampling of [start, start + length) as matrices (B, size_out, size_in).

    start, length, flip: (B,). Keys' kernel with a = -0.5, widened when shrinking, cut off outside
    the box and normalised, as Pillow and torchvision's resize(antialias=True) do it.
    """
    grid = torch.arange(size_out, device=start.device) + 0.5
    scale = (length / size_out)[:, None]                            # input pixels per output pixel
    centre = start[:, None] + grid * scale
    centre = torch.where(flip[:, None], centre.flip(1), centre)     # (B, out)
    pixel = torch.arange(size_in, device=start.device) + 0.5
    d = (pixel - centre[..., None]).mul_(1 / scale.clamp(min=1)[..., None]).abs_()  # (B, out, in)
    # With u = max(2 - d, 0) and v = max(1 - d, 0) the kernel's two pieces are one polynomial.
    u, v = (2 - d).clamp_(min=0), (1 - d).clamp_(min=0)
    weight = (u - 1).mul_(u).mul_(u).mul_(0.5).add_((1 - 2 * v).mul_(v).mul_(v))
    weight *= (pixel > start[:, None, None]) & (pixel < (start + length)[:, None, None])
    return weight.div_(weight.sum(2, keepdim=True))


def random_boxes(B, size, scale, ratio, generator, device, tries=10):
    """torchvision's RandomResizedCrop.get_params, batched -> top, left, height, width (B,) floats.

    Area U(scale) of size x size, log-uniform aspect in `ratio`, whole pixels; of ten tries the
    first that fits, else the whole image.
    """
    def uniform(low, high):
        return low + (high - low) * torch.rand(B, tries, generator=generator, device=device)

    area = uniform(*scale) * size * size
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1])).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width <= size) & (height <= size) & (width >= 1) & (height >= 1)
    pick = fits.int().argmax(1, keepdim=True)                       # the first that fits
    width, height = (torch.where(fits.gather(1, pick), x.gather(1, pick), size)[:, 0]
                     for x in (width, height))
    where = torch.rand(2, B, generator=generator, device=device)
    top, left = (where[0] * (size - height + 1)).floor(), (where[1] * (size - width + 1)).floor()
    return top, left, height, width


TABLE_OPS = ("autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add")
BLEND_OPS = ("brightness", "color", "contrast", "sharpness")
AFFINE_OPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPS = TABLE_OPS + BLEND_OPS + AFFINE_OPS


def apply_tables(x, op, level):
    """Look each pixel up in its sample's table. x (B, C, H, W), op (B,), level (B,) in 0..1."""
    B, C, H, W = x.shape
    pixel = x.long().reshape(B * C, H * W)
    histogram = x.new_zeros(B * C, 256).scatter_add_(1, pixel, x.new_ones(()).expand(pixel.shape))
    i = torch.arange(256., device=x.device).expand(B * C, 256)
    op, level = (t.repeat_interleave(C)[:, None] for t in (op, level))          # (B * C, 1)

    seen = histogram > 0
    low = seen.float().argmax(1, keepdim=True)                      # darkest and brightest values
    high = 255 - seen.flip(1).float().argmax(1, keepdim=True)
    stretch = 255 / (high - low).clamp(min=1)
    autocontrast = torch.where(high > low, (i * stretch - low * stretch).clamp(0, 255).floor(), i)

    step = ((H * W - histogram.gather(1, high)) / 255).floor()      # Pillow's integer equalisation
    below = histogram.cumsum(1) - histogram
    equalize = ((step / 2).floor() + below) / step.clamp(min=1)
    equalize = torch.where(step > 0, equalize.floor().clamp(0, 255), i)

    grain = 2. ** (4 + (level * 4).floor())                         # posterize to 4 .. 0 bits
    threshold, add = 256 - (level * 256).floor(), (level * 110).floor()
    tables = (autocontrast, equalize, 255 - i, (i / grain).floor() * grain,
              torch.where(i < threshold, i, 255 - i),
              torch.where(i < 128, (i + add).clamp(max=255), i))
    table = i
    for k, new in enumerate(tables):
        table = torch.where(op == k, new, table)
    return table.gather(1, pixel).view(B, C, H, W)


def to_grey(x):
    """ITU-R 601 luma as Pillow rounds it: (B, C, H, W) -> (B, 1, H, W); grey images pass."""
    if x.shape[1] == 1:
        return x
    weight = x.new_tensor([19595, 38470, 7471]).view(1, 3, 1, 1)
    return ((x * weight).sum(1, keepdim=True) / 65536 + 0.5).floor()


def blend(x, op, factor):
    """degenerate + factor (x - degenerate): op (B,) indexes BLEND_OPS, factor (B,) 1 is x."""
    grey = to_grey(x)
    smooth = x.clone()                                              # [[1,1,1],[1,5,1],[1,1,1]] / 13
    inner = x[..., 1:-1, 1:-1]
    smooth[..., 1:-1, 1:-1] = ((9 * F.avg_pool2d(x, 3, 1) + 4 * inner) / 13 + 0.5).floor()
    mean = (grey.mean((2, 3), keepdim=True) + 0.5).floor()
    op, factor = op.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1)
    degenerate = torch.where(op == 1, grey, torch.where(op == 2, mean, 0 * mean)).expand_as(x)
    degenerate = torch.where(op == 3, smooth, degenerate)
    return (degenerate + factor * (x - degenerate)).clamp(0, 255).floor()


def apply_affine(x, op, level, fill=128):
    """Rotate 30, shear 0.3, translate 0.45, each times level (B,) -1..1; bilinear, grey fill."""
    a, zero, one = level * math.radians(30), torch.zeros_like(level), torch.ones_like(level)
    f, shift = 0.3 * level, 0.9 * level                             # 0.45 of a width of 2
    rows = {"rotate": (a.cos(), -a.sin(), zero, a.sin(), a.cos(), zero),
            "shear_x": (one, f, f, zero, one, zero),                # shears start at the corner
            "shear_y": (one, zero, zero, f, one, f),
            "translate_x": (one, zero, shift, zero, one, zero),
            "translate_y": (one, zero, zero, zero, one, shift)}
    theta = torch.stack((one, zero, zero, zero, one, zero), 1)
    for k, name in enumerate(AFFINE_OPS):
        theta = torch.where((op == k)[:, None], torch.stack(rows[name], 1), theta)
    grid = F.affine_grid(theta.view(-1, 2, 3), x.shape, align_corners=False)
    return (F.grid_sample(x - fill, grid, align_corners=False) + fill + 0.5).floor()


def apply_op(x, op, magnitude, sign):
    """One RandAugment operation per sample: x (B, C, H, W) floats holding 0..255, op (B,) indexes
    OPS (len(OPS): none), magnitude (B,) in 0..10, sign (B,) +-1. Scales of timm's "increasing" set.
    """
    level = magnitude / 10
    first_blend, first_affine = len(TABLE_OPS), len(TABLE_OPS) + len(BLEND_OPS)
    x = apply_tables(x, op, level)
    is_blend = (op >= first_blend) & (op < first_affine)
    factor = torch.where(is_blend, (1 + 0.9 * sign * level).clamp(min=0.1), 1.0)
    x = blend(x, op - first_blend, factor)
    return apply_affine(x, op - first_affine, sign * level)


class Augment:
    """DeiT-style augmentation (arXiv 2012.12877) of a whole batch, every sample drawn for itself.

    images (B, C, S, S) or (B, S, S) uint8, grey or RGB, and labels (B,) on one device -> normalised
    (B, 3, img_size, img_size) floats and soft targets (B, num_classes). With every switch off it
    resizes and normalises: the evaluation transform. flip: probabilities (horizontal, vertical);
    jitter acts only where randaug is off, as in timm. generator: on the device.
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

    def rand(self, x, *shape):
        return torch.rand(shape, generator=self.generator, device=x.device)

    def __call__(self, images, labels):
        x = (images if images.ndim == 4 else images[:, None]).float()       # (B, C, S, S)
        x = self.resized_crop(x)
        if self.randaug:
            x = self.rand_augment(x)
        if self.jitter:
            x = self.color_jitter(x)
        x = x.expand(-1, 3, -1, -1)                                 # grey was one channel till here
        x = (x - x.new_tensor(self.mean).view(3, 1, 1) * 255) / (
            x.new_tensor(self.std).view(3, 1, 1) * 255)
        if self.erase:
            x = self.random_erase(x)
        target = F.one_hot(labels, self.num_classes).to(x.dtype)
        target = target * (1 - self.smoothing) + self.smoothing / self.num_classes
        if self.mixup or self.cutmix:
            x, target = self.mix(x, target)
        return x, target

    def resized_crop(self, x):
        """RandomResizedCrop and flips: (B, C, S, S) -> (B, C, img_size, img_size), rounded."""
        B, _, S, _ = x.shape
        if self.crop:
            top, left, height, width = random_boxes(B, S, self.crop_scale, self.ratio,
                                                    self.generator, x.device)
        else:
            top = left = x.new_zeros(B)
            height = width = x.new_full((B,), S)
        flip_x, flip_y = self.rand(x, B) < self.flip[0], self.rand(x, B) < self.flip[1]
        rows = resample_matrix(top, height, S, self.img_size, flip_y)[:, None]    # (B, 1, out, S)
        columns = resample_matrix(left, width, S, self.img_size, flip_x)[:, None]
        x = rows @ x @ columns.transpose(2, 3)
        return x.clamp(0, 255).add(0.5).floor()

    def rand_augment(self, x, layers=2, magnitude=9.0, std=0.5):
        """timm's rand-m9-mstd0.5-inc1: two of fifteen operations, each with probability 0.5."""
        B = len(x)
        for _ in range(layers):
            op = torch.randint(len(OPS), (B,), generator=self.generator, device=x.device)
            op = torch.where(self.rand(x, B) < 0.5, op, len(OPS))
            noise = torch.randn(B, generator=self.generator, device=x.device)
            sign = (self.rand(x, B) < 0.5).float() * 2 - 1
            x = apply_op(x, op, (magnitude + std * noise).clamp(0, 10), sign)
        return x

    def color_jitter(self, x):
        """Brightness, saturation, contrast by U(1 - jitter, 1 + jitter), in an order per sample."""
        B = len(x)
        order = self.rand(x, B, 3).argsort(1)                       # of the first three BLEND_OPS
        factor = 1 + self.jitter * (2 * self.rand(x, B, 3) - 1)
        for k in range(3):
            x = blend(x, order[:, k], factor[:, k])
        return x

    def random_erase(self, x):
        """A box of 2% to a third of the area becomes N(0, 1) a pixel. Zhong et al., pixel mode."""
        B, _, S, _ = x.shape
        top, left, height, width = (t.view(B, 1, 1, 1) for t in random_boxes(
            B, S, (0.02, 1 / 3), (0.3, 1 / 0.3), self.generator, x.device))
        chosen = self.rand(x, B, 1, 1, 1) < self.erase
        at = torch.arange(S, device=x.device)
        row, column = at.view(S, 1), at.view(1, S)
        inside = ((row >= top) & (row < top + height) & (column >= left) & (column < left + width))
        noise = torch.randn(x.shape, generator=self.generator, device=x.device)
        return torch.where(inside & chosen, noise, x)

    def mix(self, x, target):
        """Mixup and cutmix as one: m x + (1 - m) x.flip(0), m a constant or a box of zeros.

        One lambda per batch, each chosen with probability 0.5 where both are on; the target's
        weight is the mean of m, cutmix's lambda after the box was cut off at the border.
        """
        S = x.shape[-1]
        both = self.mixup and self.cutmix
        use_cutmix = self.rand(x) < (0.5 if both else float(bool(self.cutmix)))
        alpha = torch.where(use_cutmix, float(self.cutmix or 1), float(self.mixup or 1))
        u, v = self.rand(x, 2, 64) ** (1 / alpha)                   # Johnk: Beta(alpha, alpha) by
        first = (u + v <= 1).int().argmax()                         # rejection, without a sync
        lam = (u / (u + v).clamp(min=1e-12)).index_select(0, first[None])[0]
        centre, side = (self.rand(x, 2) * S).floor(), ((1 - lam).sqrt() * S).floor()
        at = torch.arange(S, device=x.device)
        low, high = centre - (side / 2).floor(), centre + (side / 2).floor()
        row, column = ((at >= low[k]) & (at < high[k]) for k in (0, 1))
        m = torch.where(use_cutmix, 1 - (row[:, None] & column[None]).float(), lam)   # (S, S)
        return m * x + (1 - m) * x.flip(0), m.mean() * target + (1 - m.mean()) * target.flip(0)


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

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)     # (B, D, H, W) -> (B, HW, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)            # (B, 1 + HW, D)
        x = self.blocks(x + self.pos_embed)
        return self.head(self.norm(x)[:, 0])


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
ON_DEVICE_BYTES = 4 * 2 ** 30    # sets up to this size live on the device


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
        try:
            train, test = (datasets.ImageFolder(d) for d in (root / "train", tests[0]))
        except OSError as error:
            raise InputError(f"--root {root}: {str(error).splitlines()[0]}") from None
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
    """All labels (n,) of a torchvision dataset, without reading its images."""
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


class Images(torch.utils.data.Dataset):
    """Chosen images of a torchvision dataset, square, as batches of uint8 on the device.

    Small square pictures stay as they are, others are resized and cropped to 8/7 of img_size (256
    for 224). Up to ON_DEVICE_BYTES they are read once and stay on the device; a larger set streams
    through a DataLoader with `workers` processes, in the same order.
    """

    def __init__(self, dataset, indices, img_size, device, workers):
        self.dataset, self.indices, self.side = dataset, indices.tolist(), img_size * 8 // 7
        self.labels, self.device, self.workers = labels_of(dataset)[indices], device, workers
        width, height = self.read(0).size
        if width == height and width < self.side:
            self.side = width
        self.on_device = len(indices) * 3 * self.side ** 2 <= ON_DEVICE_BYTES
        if self.on_device:
            loader = torch.utils.data.DataLoader(self, 256, num_workers=workers)
            self.images = torch.cat([images for images, _ in loader]).to(device)
            self.labels = self.labels.to(device)

    def __len__(self):
        return len(self.indices)

    def read(self, i):
        try:
            return self.dataset[self.indices[i]][0].convert("RGB")
        except Exception as error:
            files = getattr(self.dataset, "samples", None)
            where = files[self.indices[i]][0] if files else f"image {self.indices[i]}"
            raise InputError(f"--root: cannot read {where} ({type(error).__name__}); mend or "
                             "remove it") from None

    def __getitem__(self, i):
        from torchvision.transforms import functional as T
        image = self.read(i)
        if image.size != (self.side, self.side):
            image = T.center_crop(T.resize(image, self.side, antialias=True), self.side)
        return T.pil_to_tensor(image), self.labels[i]

    def batches(self, index_lists):
        """For each tensor of indices: images uint8 (B, 3, side, side) and labels (B,)."""
        if self.on_device:
            for i in index_lists:
                yield self.images[i.to(self.device)], self.labels[i.to(self.device)]
            return
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=index_lists, num_workers=self.workers,
            pin_memory=self.device.type == "cuda")
        for images, labels in loader:
            yield (images.to(self.device, non_blocking=True),
                   labels.to(self.device, non_blocking=True))


# ==================================================================================================
# 8 · Training: one loop for pre-training and fine-tuning
#
# All randomness of a step is a function of (seed, step, rank), and which images it sees of (seed,
# step, number of ranks). So a run that is
# resumed at a step goes on exactly, with no generator to store; and ranks see different images.
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
        groups[p.ndim <= 1 or key in ("cls_token", "pos_embed")]["params"].append(p)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), fused=True)


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up over `warmup` steps, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pick_precision(device):
    """bf16 where it pays: CUDA GPUs that have it, CPUs whose bf16 product is measurably faster."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu" or "WORLD_SIZE" in os.environ:          # processes must agree
        return "fp32"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(4096, 96, dtype=dtype), torch.randn(96, 384, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return "bf16" if seconds[torch.bfloat16] < 0.67 * seconds[torch.float32] else "fp32"


def autocast(device, precision):
    """The context of a forward pass in "bf16" or "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def save_checkpoint(path, **content):
    """Write beside the file, flush to disk, rename: at any moment there is one whole checkpoint."""
    beside = Path(f"{path}.part")
    with open(beside, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_checkpoint(path):
    """Read our checkpoint, the authors' {"model": ...}, timm's {"state_dict": ...} or a bare state
    dict -> a dict with the weights under "model".

    Only tensors and plain values are read (weights_only), never code.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):           # plain settings
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"--ckpt {path}: no such file") from None
    except Exception as error:
        raise InputError(f"--ckpt {path}: not a readable checkpoint of plain tensors "
                         f"({type(error).__name__})") from None
    if isinstance(content, dict) and "model" not in content:
        content = {"model": content.get("state_dict", content)}
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(
            isinstance(t, torch.Tensor) for t in state.values()):
        raise InputError(f"--ckpt {path}: holds no state dict of a model")
    content["model"] = {k.removeprefix("module."): t for k, t in state.items()}
    return content


def load_weights(model, state, path, head=False):
    """Copy a state dict into the model, the head only on demand: its classes are others. Position
    embeddings are interpolated to the image size. InputError names every mismatch."""
    own, state = model.state_dict(), dict(state)
    pos = state.get("pos_embed")
    if pos is not None and pos.ndim == 3 and pos.shape[-1] == own["pos_embed"].shape[-1]:
        state["pos_embed"] = resize_pos_embed(pos, own["pos_embed"].shape[1])
    if not head:
        state |= {name: own[name] for name in ("head.weight", "head.bias")}
    wrong = [f"{k} is missing" for k in own if k not in state]
    wrong += [f"{k} is unknown" for k in state if k not in own]
    wrong += [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own
              if k in state and state[k].shape != own[k].shape]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"--ckpt {path}: does not fit --model, --img-size and --patch-size: "
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
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(device, rank, world)


def train(args, team, model, batches, augment, steps, checkpoint=None, test=None, test_every=1):
    """Train to `steps`, from the checkpoint's step on, logging and saving into args.out.

    batches(start): yields this rank's (images, labels) of each step. test(): returns top-1 and
    top-5; called every `test_every` steps and at the end.
    """
    out, start = Path(args.out), checkpoint["step"] if checkpoint else 0
    optimizer = make_optimizer(model, args.optimizer, args.lr, args.weight_decay)
    if checkpoint:
        load_weights(model, checkpoint["model"], args.out, head=True)
        optimizer.load_state_dict(checkpoint["optimizer"])
    network = nn.parallel.DistributedDataParallel(model) if team.world > 1 else model
    augment.generator = torch.Generator(team.device)
    total, seen = torch.zeros(2, device=team.device), 0
    best = max([r["test_top1"] for r in read_log(out) if "test_top1" in r], default=0.0)
    lead = team.rank == 0                                           # the one that writes and prints

    def report(text, **record):
        if lead:
            record = dict(step=done, images=done * args.batch_size, **record)
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            print(f"step {done}/{steps}  {text}", flush=True)

    model.train()
    tick = time.perf_counter()
    for step, (images, labels) in zip(range(start, steps), batches(start)):
        key = seed_for(args.seed, "step", step, team.rank)
        if args.drop_path:                                          # its masks are torch's default
            torch.manual_seed(key)
        augment.generator.manual_seed(key ^ 1)
        x, target = augment(images, labels)
        if step == 0 and lead:
            save_samples(out / "samples.png", x, augment)
        lr = learning_rate(step, steps, round(args.warmup * steps), args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast(team.device, args.precision):
            logits = network(x)
        loss = lpce_loss(logits.float(), target)
        loss.backward()
        if args.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            right = (logits.argmax(1) == target.argmax(1)).float().sum()
            total += torch.stack([loss.detach() * len(x), right])
        seen += len(x)

        done = step + 1
        last = done == steps
        logging, saving = (last or done % n == 0 for n in (args.log_every, args.save_every))
        if (logging or saving) and not math.isfinite(loss.item()):
            file = out / "last.pt"
            kept = f"; {file} is the last good state" if file.exists() else ""
            raise InputError(f"--lr {args.lr}: the loss at step {done} is not finite (rate "
                             f"{lr:.2e}); lower --lr, or set --clip-grad{kept}")
        if logging:
            mean_loss, accuracy = (total / seen).tolist()
            speed = seen * team.world / (time.perf_counter() - tick)
            minutes, seconds = divmod(int((steps - done) * args.batch_size / speed), 60)
            report(f"loss {mean_loss:.3f}  top-1 {100 * accuracy:.1f}%  lr {lr:.2e}  {speed:.0f} "
                   f"images/s  {minutes}:{seconds:02d} left",
                   loss=mean_loss, top1=100 * accuracy, lr=lr, images_per_s=round(speed, 1))
            total.zero_()
            seen, tick = 0, time.perf_counter()
        if test and lead and (last or done % test_every == 0):
            paused = time.perf_counter()
            top1, top5 = test()
            best = max(best, top1)
            report(f"test top-1 {top1:.2f}%  top-5 {top5:.2f}%  (best top-1 {best:.2f}%)",
                   test_top1=top1, test_top5=top5, best_top1=best)
            tick += time.perf_counter() - paused
        if saving and lead:
            save_checkpoint(out / "last.pt", model=model.state_dict(), step=done,
                            args=json.loads(json.dumps(vars(args))),        # tuples become lists
                            optimizer=optimizer.state_dict())
    if lead:
        save_curve(out)


def read_log(out):
    """The records of out/log.jsonl; a last line that was cut off is left out."""
    lines = (out / "log.jsonl").read_text().split("\n") if (out / "log.jsonl").exists() else []
    return [json.loads(line) for line in lines[:-1]]


def save_samples(path, x, augment, rows=8):
    """A grid of what the network saw: the first images of an augmented batch (B, 3, S, S)."""
    from torchvision.utils import save_image
    x = x[:rows * rows].float().cpu()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (augment.mean, augment.std))
    save_image((x * std + mean).clamp(0, 1), path, nrow=rows, padding=2, pad_value=1)


def save_curve(out):
    """Loss, and test accuracy if any, over the images seen: out/log.jsonl -> out/curve.png."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    records = read_log(out)
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    loss = [(r["images"], r["loss"]) for r in records if "loss" in r]
    axis.plot(*zip(*loss), color="C0", lw=1)
    axis.set(xlabel="images seen", ylabel="training loss")
    test = [(r["images"], r["test_top1"]) for r in records if "test_top1" in r]
    if test:
        right = axis.twinx()
        right.plot(*zip(*test), color="C1", marker=".")
        right.set_ylabel("test top-1 (%)", color="C1")
    figure.savefig(out / "curve.png", dpi=120)
    plt.close(figure)


# ==================================================================================================
# 9 · Commands
# ==================================================================================================

def make_augment(args, num_classes, mean, std, vertical_flip):
    """The augmentation that the flags of Table 9 ask for."""
    return Augment(
        args.img_size, num_classes, crop=args.crop, aspect=args.aspect, crop_scale=args.crop_scale,
        flip=(0.5 * args.flip, 0.5 * args.flip * vertical_flip), randaug=args.randaug,
        jitter=0.4 * args.jitter, erase=0.5 * args.erase, mixup=0.8 * args.mixup,
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


def fractal_images(args, device):
    """The base system of --fractal-seed and its L perturbations -> base, maps, coverage."""
    base = base_ifs(args.num_maps, args.sigma, args.fractal_seed)
    coverage, maps = liep_images(base, args.delta, args.L, args.canvas, args.points, args.texture,
                                 args.noise, seed_for(args.seed, "eps"), device)
    return base, maps, coverage


def save_fractal(path, base, maps):
    """What the authors never kept: the base system, its sigma-factor and every eps."""
    path.write_text(json.dumps(dict(sigma=sigma_factor(base).item(), base=base.tolist(),
                                    eps=(maps - base).tolist())) + "\n")


def start_run(args, team):
    """Make the run folder, or find what --resume goes on with -> (checkpoint or None)."""
    out = Path(args.out)
    last = out / "last.pt"
    if args.resume:
        if not last.exists():
            raise InputError(f"--resume: there is no {last} to go on with; check --out")
        checkpoint = load_checkpoint(last)
        if "args" not in checkpoint:
            raise InputError(f"--resume: {last} holds weights alone; give them to --ckpt instead")
        free = {"resume", "out", "device", "save_every", "log_every", "workers", "root"}
        for name, value in json.loads(json.dumps(vars(args))).items():
            saved = checkpoint["args"].get(name)
            if name == "precision":
                args.precision = saved                              # it was measured, not given
            elif name not in free and value != saved:
                raise InputError(f"--resume: --{name.replace('_', '-')} was {saved} in {out}, now "
                                 f"it is {value}; repeat the flags of that run")
        if team.rank == 0:
            (out / "log.jsonl").write_text("".join(
                json.dumps(r) + "\n" for r in read_log(out) if r["step"] <= checkpoint["step"]))
        return checkpoint
    if last.exists():
        raise InputError(f"--out {out}: holds a finished or stopped run; give another --out, or "
                         "--resume to go on with it")
    if team.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n")
        (out / "log.jsonl").unlink(missing_ok=True)
    return None


def rank_batches(n, args, team, start, steps):
    """This rank's share of the indices of each step, from `start` on."""
    for step in range(start, steps):
        yield batch_indices(n, args.batch_size, step, args.seed)[team.rank::team.world]


def pretrain(args, team):
    """Pre-train on L perturbed copies of one fractal: everything stays on the device."""
    checkpoint = start_run(args, team)
    device = team.device
    base, maps, images = fractal_images(args, device)
    if team.rank == 0 and not checkpoint:
        save_fractal(Path(args.out) / "fractal.json", base, maps)
    texture = torch.Generator(device).manual_seed(seed_for(args.seed, "texture"))
    if not args.fresh_texture:
        images = stamp(images, args.texture, texture)

    def batches(start):
        for step, i in enumerate(rank_batches(args.L, args, team, start, args.steps), start):
            batch = images[i.to(device)]
            if args.fresh_texture:
                texture.manual_seed(seed_for(args.seed, "texture", step, team.rank))
                batch = stamp(batch, args.texture, texture)
            yield batch, i.to(device)

    model = make_model(args, team, args.L, args.steps, f"1 fractal, {args.L}")
    augment = make_augment(args, args.L, HALF, HALF, True)
    train(args, team, model, batches, augment, args.steps, checkpoint)


def finetune(args, team):
    """Fine-tune a checkpoint, or train from scratch without one; report the last epoch."""
    checkpoint, device = start_run(args, team), team.device
    for turn in (True, False):              # rank 0 downloads first, then the others find it
        if turn == (team.rank == 0):
            train_set, test_set = open_datasets(args.data, args.root)
        if team.world > 1:
            torch.distributed.barrier()
    labels = labels_of(train_set)
    chosen, held = balanced_subset(labels, args.train_per_class, args.holdout)
    if args.holdout and not len(held):
        raise InputError(f"--holdout {args.holdout}: leaves no image of any class to test on")
    if not args.holdout:
        held = torch.arange(len(test_set))
    images = Images(train_set, chosen, args.img_size, device, args.workers)
    tests = Images(train_set if args.holdout else test_set, held, args.img_size, device,
                   args.workers)

    classes = len(getattr(train_set, "classes", ())) or int(labels.max()) + 1
    steps = math.ceil(args.epochs * len(images) / args.batch_size)
    model = make_model(args, team, classes, steps, f"{args.data}, {len(images)}")
    if args.ckpt and not checkpoint:
        load_weights(model, load_checkpoint(args.ckpt)["model"], args.ckpt)
    transform = plain(args.img_size, classes, IMAGENET_MEAN, IMAGENET_STD)
    train(args, team, model,
          lambda start: images.batches(rank_batches(len(images), args, team, start, steps)),
          make_augment(args, classes, IMAGENET_MEAN, IMAGENET_STD, False), steps, checkpoint,
          lambda: evaluate(model, tests, transform, device, args.precision),
          max(1, round(args.eval_epochs * len(images) / args.batch_size)))


def render(args, team):
    """Write the perturbed images to OUT/<class>/0.png, a folder that ImageFolder reads."""
    from torchvision.io import write_png
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out}: is not empty; give another folder")
    base, maps, coverage = fractal_images(args, team.device)
    texture = torch.Generator(team.device).manual_seed(seed_for(args.seed, "texture"))
    for i, image in enumerate(stamp(coverage, args.texture, texture).cpu()):
        folder = out / f"{i:0{len(str(args.L - 1))}d}"              # alphabetical is numerical
        folder.mkdir(parents=True)
        write_png(image[None], str(folder / "0.png"))
    save_fractal(out.parent / f"{out.name}.json", base, maps)
    print(f"{args.L} images of {args.canvas}x{args.canvas} in {out}, their maps in {out}.json")


def show(args, team):
    """Draw the paper's Fig. 2b (rows of delta, their average) and Fig. 2c (columns of sigma)."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    def draw(name, title, rows):
        columns = max(len(images) for _, images in rows)
        figure = Figure(figsize=(columns, len(rows) + 0.4), layout="constrained")
        for axis, (label, images) in zip(figure.subplots(len(rows), 1), rows):
            strip = make_grid(images[:, None].float() / (2 * GREY), columns, pad_value=1)
            axis.imshow(strip.permute(1, 2, 0).cpu())
            axis.set(xticks=[], yticks=[])
            axis.set_ylabel(label, rotation=0, ha="right", va="center")
        figure.suptitle(title)
        figure.savefig(out / name, dpi=150, bbox_inches="tight")
        print(out / name)

    def textured(coverage):
        return stamp(coverage, args.texture, torch.Generator(team.device).manual_seed(args.seed))

    rows = []
    for args.delta in (0.001, 0.01, 0.05, 0.1, 0.2, 1.0):
        args.L = 100
        images = textured(fractal_images(args, team.device)[2])
        mean = images.float().mean(0, keepdim=True).to(images.dtype)
        rows.append((f"$\\Delta$ = {args.delta:g}", torch.cat([images[:7], mean])))
    draw("fig2b.png", "7 of 100 perturbations, and the average of all 100", rows)

    rows, sigmas = [], (3.5, 4.0, 4.5, 5.0, 6.0)
    for seed in range(args.fractal_seed, args.fractal_seed + 4):
        systems = [base_ifs(args.num_maps, sigma, seed).to(team.device) for sigma in sigmas]
        rows.append((f"fractal {seed}", torch.cat([textured(ifs_coverage(
            maps[None], args.canvas, args.points, args.texture,
            generator=torch.Generator().manual_seed(0))) for maps in systems])))
    draw("fig2c.png", "$\\sigma$ = " + ", ".join(f"{sigma:g}" for sigma in sigmas), rows)


# ==================================================================================================
# 10 · Flags
# ==================================================================================================

def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite number in [low, high], or (low, high] with above=True."""
    def convert(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None
        if not finite or not value <= high or not (low < value if above else low <= value):
            border = f"above {low}" if above else f"at least {low}"
            upper = " and finite" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {border}{upper}")
        return value
    return convert


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        self.exit(2, f"onepfrac: {message.removeprefix('argument ')}\n")


def make_parser():
    """All commands and flags; a number whose default is None comes from the recipe (`resolve`)."""
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

    def add_fractal(command, perturbed=True):
        group = command.add_argument_group("Tables 5, 6, 7: the LIEP distribution")
        if perturbed:
            group.add_argument("--delta", type=rate(0), default=0.1, help="side of the cube of eps")
            group.add_argument("--L", type=whole(2), help="perturbations, which are the classes")
        group.add_argument("--sigma", type=rate(0, above=True), default=3.5, help="sigma-factor")
        group.add_argument("--noise", choices=("additive", "multiplicative"), default="additive",
                           help="additive: the paper; multiplicative: the authors' code")
        group = command.add_argument_group("the fractal and its picture")
        group.add_argument("--fractal-seed", type=whole(0, 2 ** 63 - 1), default=32, help="which")
        group.add_argument("--num-maps", type=whole(2), default=2, help="N of Eq. 1")
        group.add_argument("--canvas", type=whole(16), help="pixels a side that are rendered")
        group.add_argument("--points", type=whole(1), help="points of the chaos game an image")
        group.add_argument("--texture", choices=("random", "fill", "point"))

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

    command, run = add("pretrain", pretrain.__doc__)
    run.add_argument("--steps", type=whole(1))
    add_fractal(command)
    add_training(command, run)
    group = command.add_argument_group('Table 13: "w/ Aug."')
    group.add_argument("--fresh-texture", action="store_true", help="a new 3x3 texture every step")

    add_fractal(add("render", render.__doc__)[0])
    add_fractal(add("show", show.__doc__)[0], perturbed=False)

    command, run = add("finetune", finetune.__doc__)
    run.add_argument("--ckpt", help="weights to start from; without: from scratch")
    run.add_argument("--epochs", type=rate(0, above=True))
    add_training(command, run)
    group = command.add_argument_group("Tables 13, 14: data")
    group.add_argument("--data", choices=("folder", *DATASETS), default="cifar100")
    group.add_argument("--root", default="data", help="where the data is, or is downloaded to")
    group.add_argument("--train-per-class", type=whole(1), help="a fixed balanced subset")
    group.add_argument("--holdout", type=rate(0, 0.9), default=0.0,
                       help="fraction of the training images to test on instead of the test set")
    group.add_argument("--eval-epochs", type=rate(0, above=True), default=5, help="test this often")
    group.add_argument("--workers", type=whole(0), default=2, help="processes that read images")
    return parser


def resolve(args):
    """Fill in the device, the precision and the recipe's numbers where no flag was given."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if args.device == "auto":
        args.device = next(name for name, there in available.items() if there)
    elif not available[args.device]:
        raise InputError(f"--device {args.device}: there is none here; try --device auto")
    chosen = args.recipe is None
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    args.recipe = args.recipe or ("small" if args.device == "cuda" else "nano")
    recipe = RECIPES[args.recipe]
    if getattr(args, "ckpt", None):                                 # the network that was saved
        saved = load_checkpoint(args.ckpt).get("args", {})
        recipe = recipe | {k: saved[k] for k in ("model", "img_size", "patch_size") if k in saved}
    numbers = recipe | recipe.get(args.command, recipe["pretrain"])
    numbers |= {name: name in numbers["augment"].split() for name in SWITCHES}
    for name, value in numbers.items():
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, value)
    if getattr(args, "precision", None) == "auto":
        args.precision = pick_precision(torch.device(args.device))
    if hasattr(args, "patch_size") and args.img_size % args.patch_size:
        raise InputError(f"--patch-size {args.patch_size}: must divide --img-size {args.img_size}")
    if hasattr(args, "crop_scale") and args.crop_scale[0] > args.crop_scale[1]:
        raise InputError("--crop-scale: LOW must not be above HIGH")
    if hasattr(args, "batch_size") and args.batch_size % args.world:
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of the "
                         f"{args.world} processes")
    if hasattr(args, "sigma") and args.sigma > 3 * args.num_maps:
        raise InputError(f"--sigma {args.sigma}: at most 3 for each map, so 3 x --num-maps "
                         f"= {3 * args.num_maps}")
    if os.environ.get("RANK", "0") == "0":
        print(f"recipe {args.recipe}" + (" (chosen for this device)" if chosen else ""), flush=True)
    return torch.device(args.device)


def main(argv=None):
    """Run one command -> exit status."""
    args = make_parser().parse_args(argv)
    try:
        globals()[args.command](args, join_team(resolve(args)))
    except InputError as error:     # one from a worker process comes wrapped in its traceback
        print(f"onepfrac: {str(error).strip().split('InputError: ')[-1]}", file=sys.stderr)
        return 2
    except OSError as error:        # a full disk, a file where a folder should be, no permission
        print(f"onepfrac: --out {args.out}: cannot be written ({error})", file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
