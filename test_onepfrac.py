"""Tests of onepfrac.py against independent references: plain loops, Pillow, torchvision, nn.Module, float64.

    python -m pytest -q
    ONEPFRAC_DEVICE=cuda python -m pytest -q        # renderer, images, augmentation, network and runs on a GPU

What a result depends on is pinned by numbers that stand here, or by a reference with random numbers of its own.
The sections are those of onepfrac.py; the last one is about the file itself. Tests of scripts are in results/.
"""
import argparse
import ast
import base64
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tokenize
import warnings
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")                   # all is small: two threads wait for each other

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as T
from PIL import Image, ImageDraw, ImageEnhance, ImageOps, PngImagePlugin

import onepfrac as op
sys.path.insert(0, str(Path(op.__file__).parent / "results"))
import weights

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))       # if it was imported earlier, by tests of results/
SCRIPT = Path(op.__file__)
DEVICE = os.environ.get("ONEPFRAC_DEVICE", "cpu")
torch.backends.cudnn.allow_tf32 = False                         # convolutions in full precision
TINY = "--device cpu --img-size 16 --patch-size 4 --precision fp32".split()
QUICK = [*TINY, "--log-every", "3"]
SMALL = "--L 4 --canvas 32 --points 500 --batch-size 8".split()
PLACE = {"out", "root", "image", "device", "compile", "rank", "lead", "log_every", "save_every", "eval_epochs"}


def resolved(*arguments):
    """The settings of a command line."""
    return op.parse([str(a) for a in arguments])


def main(*arguments):
    """Run a command in this process -> exit status."""
    return op.main([str(a) for a in arguments])


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def saved(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def contents(folder):
    """Every file in it, and its bytes."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def stripes(root, parts=(("train", 40), ("test", 10))):
    """Two kinds of stripes as 16x16 PNGs, in each part a folder for either."""
    rng = np.random.default_rng(0)
    for part, n in parts:
        for label, name in enumerate(("across", "down")):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                wave = 127 + 100 * np.sin(np.arange(16) * rng.uniform(1, 2) + rng.uniform(0, 6))
                image = np.tile(wave, (16, 1)) if label else np.tile(wave[:, None], (1, 16))
                image = (image + rng.normal(0, 10, (16, 16))).clip(0, 255).astype(np.uint8)
                Image.fromarray(image).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    return stripes(tmp_path_factory.mktemp("images") / "stripes")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished pre-training of six steps; nobody may change it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main("pretrain", *SMALL, *QUICK, "--steps", 6, "--out", out) == 0
    return out


@pytest.fixture
def refused(capsys):
    """A command line that must end with status 2 and one line of ours, which is returned."""
    def refused(*arguments):
        capsys.readouterr()
        status, error = main(*arguments), capsys.readouterr().err
        assert status == 2 and error.startswith("onepfrac: ") and error.count("\n") == 1, (arguments, status, error)
        return error
    return refused


@contextlib.contextmanager
def at_step(step, action):
    """`action()` is called before the step (from 1) of any training in this process."""
    train_step, calls = op.train_step, []

    def spied(*inputs):
        calls.append(0)
        if len(calls) == step:
            action()
        return train_step(*inputs)
    op.train_step = spied
    try:
        yield calls
    finally:
        op.train_step = train_step


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def opened(*flags):
    """The images of these flags of `pretrain`, small pictures of few points if they say nothing else."""
    args = op.parse(["pretrain", "--device", DEVICE, *map(str, flags)])
    args.points = args.points if "--points" in flags else 2000
    args.canvas = args.canvas if "--canvas" in flags else 64
    return op.source_data(args)


@functools.lru_cache
def fractal(seed=32):
    """A base fractal; nobody may change it."""
    return op.base_ifs(2, 3.5, seed)


def render(maps, *arguments):
    """On the device of the tests; the images come back."""
    return op.render_ifs(maps.to(DEVICE), *arguments).cpu()


def plain_orbits(maps, probs, orbits, burn_in, steps, rng, j=None):
    """Points (B, 2, orbits * steps) of B systems by a plain loop, with random numbers of its own or the maps j."""
    w = maps.double().numpy().transpose(1, 2, 3, 0).copy()      # (N, 2, 3, B)
    ends = np.cumsum(probs.double().numpy())[:-1] / probs.double().sum().item()
    v, kept = np.zeros((orbits, 2, len(maps))), []
    for step in range(burn_in + steps):
        picked = np.searchsorted(ends, rng.random(orbits), "right") if j is None else j[step]
        A_x, A_y, t = w[picked].transpose(2, 0, 1, 3)
        v = A_x * v[:, :1] + A_y * v[:, 1:] + t
        kept += [v.astype(np.float32)] * (step >= burn_in)
    return np.stack(kept, -1).transpose(2, 1, 0, 3).reshape(len(maps), 2, -1)


def settings(**more):
    """All that section 6 needs of the settings but for the loop."""
    return argparse.Namespace(**dict(optimizer="sgd", precision="fp32", lr=0.1, weight_decay=0.05, clip_grad=0.0,
                                     device=DEVICE, rank=0, world_size=1) | more)


def furthest(a, b):
    """The largest difference between the distribution functions of two samples (Kolmogorov and Smirnov)."""
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    return np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max()


# ========================================================================================== PART ONE

# ---------------------------------------------------------------------------------------- 1 fractals

@pytest.mark.parametrize("num_maps, share", [(2, 0.05), (2, 0.58), (2, 0.999), (7, 0.05), (3, 0.58), (7, 0.999)])
def test_sampled_systems_have_the_asked_sigma_and_all_turns_mirrors_and_translations(num_maps, share):
    sigma = share * 3 * num_maps
    systems = torch.stack([op.sample_ifs(num_maps, sigma, seeded(seed)) for seed in range(400)])
    s = np.linalg.svd(systems[..., :2].numpy(), compute_uv=False)
    for factor in ((s[..., 0] + 2 * s[..., 1]).sum(1), op.sigma_factor(systems).numpy()):
        assert np.abs(factor - sigma).max() < 1e-5 * max(1, sigma)
    assert s.max() < 1 + 1e-6 and (share != 0.58 or s.max() > 0.99 and s.min() < 0.05)
    if num_maps == 2:                                           # Algorithm 1 of Anderson and Farrell, for two maps
        rng = np.random.default_rng(0)
        first = rng.uniform(max(0, sigma / 3 - 1), min(1, sigma), 20_000)
        second = rng.uniform(np.clip((sigma - 3 - first) / 2, 0, None), np.minimum(first, (sigma - first) / 2))
        for k, theirs in ((0, first), (1, second)):
            assert furthest(s[:, 0, k], theirs) < 0.09
    A, t = systems.view(-1, 2, 3).split((2, 1), 2)
    assert -1 <= t.min() < -0.95 and 0.95 < t.max() <= 1 and 0.4 < (A.det() < 0).float().mean() < 0.6
    for x, y in (A[:, :, 0].T, A[:, 0].T):                      # a column turns with U, a row with V
        angle = torch.atan2(y, x).sort().values
        assert (angle - torch.linspace(-math.pi, math.pi, len(angle))).abs().max() < 0.4


# ----------------------------------------------------------------------------------------- 2 drawing

@pytest.mark.parametrize("num_maps, seed, own", [(2, 0, False), (2, 3, True), (5, 2, True)])
def test_each_orbit_follows_its_maps_and_its_dots_light_their_pixels(num_maps, seed, own):
    """All orbits again from (0, 0), step by step in float64; the first 500 steps are not drawn."""
    systems = torch.stack([op.sample_ifs(num_maps, 1.6 * num_maps, seeded(seed + 10 * k)) for k in range(3)])
    probs = torch.rand(3, num_maps, generator=seeded(9)) if own else torch.ones(num_maps)
    j, images = op.choose_maps(probs, 4500, seeded(7)), render(systems, 128, 4500, False, seeded(7), probs) > 0
    drawn = op.chaos_game(systems.to(DEVICE), j).permute(1, 0, 3, 2).flatten(2).cpu().numpy()
    for k in range(3):
        dots = plain_orbits(systems[k:k + 1], probs, 9, 500, 500, None, (j[..., k] if own else j).numpy())[0]
        assert np.abs(drawn[k] - dots).max() < 1e-4 * np.ptp(dots)
        low, high = dots.min(1, keepdims=True), dots.max(1, keepdims=True)
        x, y = ((dots - low) / (high - low) * (128 - 1 - 2) + 1.5).astype(int)
        hits = np.zeros((128, 128), bool)
        hits[127 - y, x] = True
        # float32 against float64 moves a dot across a pixel's border now and then
        assert (images[k].numpy() != hits).sum() <= 0.01 * hits.sum()


def test_maps_are_picked_by_their_probabilities_and_independently_for_as_many_dots_as_asked():
    probs = torch.tensor([0.1, 0.6, 0.3])
    for j in (op.choose_maps(5 * probs, 50_000, seeded(1)),
              op.choose_maps(torch.stack([probs.flip(0), probs]), 50_000, seeded(1))[..., 1]):
        for after, before in ((j[1:], j[:-1]), (j[:, 1:], j[:, :-1]), (j[1:, 1:], j[:-1, :-1])):
            pairs = torch.bincount((3 * before + after).flatten(), minlength=9) / after.numel()
            assert (pairs - torch.outer(probs, probs).flatten()).abs().max() < 0.006
    rare = op.choose_maps(torch.tensor([1, 1e-3, 0]), 200_000, seeded(3)).flatten().bincount(minlength=3)
    assert abs(rare[1] - 400) < 80 and rare[2] == 0             # by chance +- 20
    for points in (1, 499, 500, 501, 20_000):
        j = op.choose_maps(torch.ones(2), points)
        steps, K = op.chaos_game(fractal()[None], j).shape[2:]
        assert points <= steps * K < points + K and steps == len(j) - 500 <= 500


def test_sierpinski_triangle_fills_the_canvas_upright_and_has_its_box_counting_dimension():
    maps = torch.tensor([[[0.5, 0, x], [0, 0.5, y]] for x, y in ((0, 0), (1, 0), (0, 1))])     # right angle at (0, 0)
    image = render(maps[None], 524, 400_000, False, seeded(0))[0] > 0
    assert all(image.any(axis).nonzero()[[0, -1]].flatten().tolist() == [6, 517] for axis in (0, 1))
    image, sizes = image[6:518, 6:518].float(), (4, 8, 16, 32, 64)
    assert not image.triu(2).any() and image[-8:, :8].sum() > 8
    boxes = [F.max_pool2d(image[None], s).sum().item() for s in sizes]
    assert abs(np.polyfit(np.log(sizes), np.log(boxes), 1)[0] + math.log(3) / math.log(2)) < 0.05


def test_systems_of_all_kinds_render_together_as_alone_and_fill_their_box_or_run_away():
    def pair(a, *t):
        return torch.tensor([[[a, 0, e], [0, a, f]] for e, f in t])
    good = fractal()
    maps = torch.stack([
        good, good * torch.tensor([1, 1.12]).view(2, 1, 1),     # the second throws a dot far out now and then
        pair(0.6, (4, 4), (4 + 1e-6, 4)), good * 1.25, good * 3, torch.full((2, 2, 3), 1.5),   # small; expand
        pair(0.9, (1e38, 0), (1e38, 1)), pair(0.5, (1.6e38, 0), (-1.6e38, 0)),     # contracts to 1e39; is 6e38 wide
        *(op.sample_ifs(2, 3.2, seeded(s)) for s in range(3))])
    probs = torch.cat([good[..., :2].det().abs().expand(8, 2), torch.rand(3, 2, generator=seeded(4))])
    alone = torch.cat([render(m[None], 128, 20_000, False, seeded(0), p) for m, p in zip(maps, probs)])
    lit, more = alone > 0, torch.cat([maps, torch.full((11, 1, 2, 3), 9.0)], 1)     # a map that is never picked
    assert all(lit[0].any(axis).nonzero()[[0, -1]].flatten().tolist() == [1, 126] for axis in (0, 1))
    assert lit[0].float().mean() > 0.3 and lit[1:3].flatten(1).any(1).all()
    assert lit[3:6].float().mean((1, 2)).max() < 0.01 and lit[6:8].sum((1, 2)).max() <= 1
    assert (render(more, 128, 20_000, False, seeded(0), F.pad(probs, (0, 1))) == alone).all()
    usual = render(maps[:2], 128, 20_000, True, seeded(0))      # by default in proportion to the mean |det A|
    alone = render(maps[:2], 128, 20_000, False, seeded(0), maps[:2, :, :, :2].det().abs().mean(0))
    assert (usual == 127 * F.max_pool2d((alone > 0).float(), 3, 1, 1)).all()        # a dot is a square of 3 x 3


def test_texture_has_the_statistics_of_stamping_one_by_one():
    hits, covered = (render(fractal()[None], 128, 20_000, dilated, seeded(5)) for dilated in (False, True))
    rng, lit, filled = np.random.default_rng(0), np.zeros((8, 128, 128), bool), covered[0].numpy() > 0
    stamps = np.argwhere(hits[0].numpy() > 0).repeat(4, 0)      # each hit pixel is stamped four times
    for canvas in lit:
        for y, x in rng.permutation(stamps):
            mask = [b == "1" for b in f"{rng.integers(1, 512):09b}"]
            canvas[y - 1:y + 2, x - 1:x + 2] = np.reshape(mask, (3, 3))
    images = covered.repeat(8, 1, 1).to(DEVICE)
    assert op.stamp(images, torch.Generator(DEVICE).manual_seed(1)) is images       # in place
    other = op.stamp(covered.repeat(8, 1, 1).to(DEVICE), torch.Generator(DEVICE).manual_seed(2))
    assert set(images.unique().tolist()) == {0, 127} and (images != other).any()
    images = images.cpu().numpy() > 0
    assert not lit[:, ~filled].any() and lit.any(0)[filled].mean() > 0.98 and not images[:, ~filled].any()
    # by chance 4 standard errors of the share of lit pixels, and of equal neighbours, and images
    right, down = filled[:, 1:] & filled[:, :-1], filled[1:] & filled[:-1]
    for share in (lambda x: x[:, filled], lambda x: (x[:, :, 1:] == x[:, :, :-1])[:, right],
                  lambda x: (x[:, 1:] == x[:, :-1])[:, down], lambda x: (x[1:] == x[:-1])[:, filled]):
        assert abs(share(images).mean() - share(lit).mean()) < 4 * math.sqrt(0.5 / share(lit).size)


@pytest.mark.parametrize("change", [
    dict(size=7), dict(size=4097), dict(points=0), dict(probs=torch.ones(3)), dict(maps=torch.zeros(2, 2, 3)),
    dict(maps=torch.zeros(0, 2, 2, 3)), dict(maps=torch.full((1, 2, 2, 3), math.nan))])
def test_renderer_refuses_bad_arguments(change):
    with pytest.raises(ValueError):
        op.render_ifs(**{"maps": torch.zeros(1, 2, 2, 3), **change})
    for num_maps, sigma in ((1, 1.0), (2, 0.0), (2, -1.0), (2, 6.0)):
        with pytest.raises(ValueError, match="sigma"):
            op.sample_ifs(num_maps, sigma)


def worst_distances(maps, probs, seeds, burn_in=500):
    """The largest total variation from millions of points, on a 32 x 32 grid, of any picture of 20,000 points and
    any seed: of ours, and of 40 independent orbits."""
    reference = plain_orbits(maps, probs, 4000, 2 * burn_in, 500, np.random.default_rng(1000))
    low, high = reference.min(2, keepdims=True), reference.max(2, keepdims=True)

    def densities(points):
        cell = ((points - low) / (high - low) * 32).astype(np.int32).clip(0, 31)
        return np.stack([np.bincount(c, minlength=1024) / len(c) for c in 32 * cell[:, 0] + cell[:, 1]])

    def worst(draw):
        return max(0.5 * np.abs(densities(draw(seed)) - truth).sum(1).max() for seed in range(seeds))

    def ours(seed):
        j = op.choose_maps(probs, 20_000, op.seeded(seed, "maps"))
        return op.chaos_game(maps.to(DEVICE), j).cpu().flatten(2).permute(1, 0, 2).numpy()

    truth = densities(reference)
    return worst(ours), worst(lambda seed: plain_orbits(maps, probs, 40, burn_in, 500, np.random.default_rng(seed)))


@pytest.mark.parametrize("seed", [32, 0, 1, 2, 3])
def test_pictures_of_few_points_are_as_good_as_independent_orbits(seed):
    """Pictures of 20,000 points, the worst of single draws: no seed may leave out a rare map."""
    base = fractal(seed)
    ours, independent = worst_distances(op.perturb(base, 0.1, 3, seeded(0)), base[..., :2].det().abs(), seeds=5)
    assert ours < 2 * independent and independent < 0.12


def test_a_distant_start_is_forgotten_before_the_first_point():
    """Two maps that turn around nearly one centre, and shrink by 0.985. From the origin, 200 times as far away as
    the dots spread, an orbit needs more than 300 steps."""
    turn = torch.tensor([[math.cos(2.0), -math.sin(2.0)], [math.sin(2.0), math.cos(2.0)]]) * 0.985
    centres = torch.tensor([[1000.0, 1000.0], [1001.0, 1000.0]])[..., None]
    maps = torch.cat([turn.expand(2, 2, 2), centres - turn @ centres], 2)
    ours, independent = worst_distances(maps[None], torch.ones(2), seeds=2)
    assert ours < 2 * independent and independent < 0.2


# ----------------------------------------------------------------------------------------- 3 classes

@pytest.mark.parametrize("noise, delta, side", [("additive", 0.2, 0.2), ("multiplicative", 0.3, 0.6)])
def test_perturbation_is_uniform_in_a_cube_and_a_draw_does_not_depend_on_how_many_follow(noise, delta, side):
    maps = op.sample_ifs(2, 3.5, seeded(0))
    drawn = op.perturb(maps, delta, 5000, seeded(1), noise)
    eps = (drawn - maps if noise == "additive" else drawn / maps - 1) / side
    assert eps.shape == (5000, 2, 2, 3) and 0.4999 < eps.abs().max() < 0.5 + 1e-5
    assert (eps.std(0) - 1 / math.sqrt(12)).abs().max() < 0.01 and eps.mean(0).abs().max() < 0.02
    assert (torch.corrcoef(eps.flatten(1).T) - torch.eye(12)).abs().max() < 0.06
    for L in (1, 7, 100):
        assert torch.equal(op.perturb(maps, delta, L, seeded(1), noise), drawn[:L])


def test_lpce_is_ln_L_before_training_and_takes_soft_targets():
    labels = torch.arange(6)
    logits = op.ViT(16, 8, 50, 32, 2, 2)(torch.randn(6, 3, 16, 16))
    assert abs(op.lpce_loss(logits, labels).item() - math.log(50)) < 1e-6
    logits = torch.randn(6, 50)
    soft = 0.7 * F.one_hot(labels, 50) + 0.3 * F.one_hot(labels.flip(0), 50)
    assert abs(op.lpce_loss(logits, soft) + (soft * logits.log_softmax(1)).sum(1).mean()) < 1e-6
    assert op.lpce_loss(logits, labels) == F.nll_loss(logits.log_softmax(1), labels)


def test_base_fractals_fill_a_fifth_have_the_asked_sigma_and_differ():
    for sigma, seeds in ((3.5, (0, 1, 32)), (6.0, range(4))):   # at 3 N = 6 nothing contracts
        bases = torch.stack([op.base_ifs(2, sigma, seed) for seed in seeds])
        s = np.linalg.svd(bases[..., :2].numpy(), compute_uv=False)
        factor = (s[..., 0] + 2 * s[..., 1]).sum(1)
        assert np.abs(factor - sigma).max() < 0.1 + 1e-5 and np.ptp(factor) > 0.01 and s.min() < 1 - 1e-5
        assert ((op.render_ifs(bases, generator=seeded(5)) > 0).float().mean((1, 2)) > 0.19).all()
        assert (bases[0] - bases[1]).abs().max() > 0.1 and (op.base_ifs(2, sigma, seeds[0]) == bases[0]).all()
    with pytest.raises(op.InputError, match="--sigma 6.2"):
        op.base_ifs(2, 6.2, 0)


def test_a_base_fractal_s_sigma_is_uniform_within_a_tenth_and_the_first_that_covers_a_fifth_is_taken(monkeypatch):
    shares, tried = [0.1999], []
    monkeypatch.setattr(op, "render_ifs", lambda maps, **_: tried.append(maps[0]))
    monkeypatch.setattr(op, "covered", lambda images: shares[0] if len(tried) % 2 else 0.2)
    assert torch.equal(op.base_ifs(2, 3.5, 5), tried[1]) and len(tried) == 2
    shares[0] = 0.2
    bases = torch.stack([op.base_ifs(2, 3.5, seed) for seed in range(1000)])
    s = np.linalg.svd(bases[..., :2].double().numpy(), compute_uv=False)
    factor = (s[..., 0] + 2 * s[..., 1]).sum(1)
    assert abs(factor.min() - 3.4) < 2e-3 and abs(factor.max() - 3.6) < 2e-3
    assert furthest(factor, np.linspace(3.4, 3.6, 1001)) < 0.05


def test_covered_is_the_share_of_each_image_that_is_not_background():
    images = torch.zeros(3, 3, 10, 10, dtype=torch.uint8)
    images[1, 0, :5], images[2] = 1, 255
    assert op.covered(images).tolist() == pytest.approx([0, 1 / 6, 1])
    assert op.covered(images, 255).tolist() == pytest.approx([1, 1, 0])


def test_a_class_is_the_fractal_with_its_eps_added_and_each_seed_has_its_own_eps_and_dots():
    sources = [opened("--L", 5, "--delta", 0.2, "--seed", seed) for seed in (0, 1, 2)]
    base, eps = sources[0].omega["base"], torch.stack([data.omega["eps"] for data in sources])
    assert all((data.omega["base"] == fractal()).all() for data in sources)
    assert eps.shape == (3, 5, 2, 2, 3) and eps.abs().max() <= 0.1 + 1e-6
    assert (torch.corrcoef(eps.flatten(1)) - torch.eye(3)).abs().max() < 0.5    # 60 numbers each
    still = [opened("--L", 2, "--delta", 0, "--seed", seed).images[0] for seed in (0, 1)]
    assert (still[0] != still[1]).float().mean() > 0.01
    for data in sources[:1]:
        drawn = render(base + eps[0], 64, 2000, True, seeded(op.seed_for(0, "maps")), base[..., :2].det().abs())
        images, labels = data[torch.tensor([4, 0, 4])]
        assert images.device.type == DEVICE and labels.tolist() == [4, 0, 4] and images.dtype == torch.uint8
        assert (images.cpu() == drawn[[4, 0, 4]]).all() and len(data) == 5


@pytest.mark.parametrize("flags, least, background", [
    ("--delta 1.0", 0.05, 0), ("--delta 1.0 --texture random", 0.1, 0), ("--source image --delta 6", 1e-6, 0),
    ("--delta 1.0 --noise multiplicative --texture fresh", 0.1, 0), ("--source gaussian --delta 12", 1e-6, 0),
    ("--source uniform --delta 10", 1e-6, 0), ("--source rcdb --canvas 16", 1e-6, 255)])
def test_perturbations_that_cover_too_little_are_rejected_in_order(flags, least, background, monkeypatch):
    """The L classes are the first L that pass, whatever L, and no source keeps a blank image."""
    calls, liep_data, perturb = [], op.liep_data, op.perturb
    if "rcdb" in flags:                                         # no --delta makes contours blank, but this does
        monkeypatch.setattr(op, "perturb", lambda base, delta, L, *more:
                            perturb(base, delta, L, *more) * 400 ** (torch.arange(L) % 2)[:, None])
    monkeypatch.setattr(op, "liep_data", lambda *a, **k: calls.append(a) or liep_data(*a, **k))
    few, many = (opened(*flags.split(), "--L", L) for L in (5, 70))
    base, draw, args = calls[0][:3]
    candidates = op.perturb(base, args.delta, 512, seeded(op.seed_for(0, "eps")), args.noise)
    kept = ((draw(candidates) != background).flatten(1).float().mean(1) >= least).nonzero()[:70, 0]
    assert kept[-1] > 70 + 5                                    # the test sees some that are rejected
    assert (many.omega["eps"] == (candidates - base)[kept]).all() and (few.images == many.images[:5]).all()


def test_random_masks_stay_and_depend_on_seed_and_number_alone_and_fresh_ones_are_new_each_time():
    def still(texture, L=6, seed=0):                            # without eps all have the same shape
        return opened("--L", L, "--delta", 0, "--texture", texture, "--seed", seed)
    i, whole, kept, fresh = torch.arange(6), still("fill").images, still("random"), still("fresh")
    a, b, other = fresh[i][0], fresh[i][0], still("random", seed=1).images
    assert (kept[i][0] == kept.images).all() and (still("random", 70).images[:6] == kept.images).all()
    assert (fresh.images == whole).all() and not kept.images[whole == 0].any() and set(a.unique().tolist()) == {0, 127}
    both = (whole[0] > 0) & (still("fill", seed=1).images[0] > 0)       # its dots are new too
    masks = (torch.cat([kept.images, other, a, b]) > 0)[:, both]
    agree = (masks[:, None] == masks).float().mean(2) - 0.5 * torch.eye(24, device=DEVICE)
    assert (agree - 0.5).abs().max() < 0.15                     # any two are independent


def test_images_that_are_not_kept_are_the_same_and_the_fingerprint_is_a_checksum_of_labels_and_images(monkeypatch):
    for flags in ("--L 12 --texture random", "--source va --categories 3 --instances 4", "--L 12 --source rcdb",
                  "--L 12 --source uniform", "--L 12 --source image", "--L 70"):
        kept = opened(*flags.split())
        n = kept.images.numel()
        for limit, keeps in ((n, True), (n - 1, False), (0, False)):
            with monkeypatch.context() as less:
                less.setattr(op, "KEPT", limit)
                drawn = opened(*flags.split())
            assert (drawn.images is not None) == keeps
        for index in (torch.tensor([3, 0, 7]), torch.tensor([11])):
            assert all(a.shape == b.shape and (a == b).all() for a, b in zip(kept[index], drawn[index]))
        crcs = [zlib.crc32(some.cpu().numpy().tobytes(), zlib.crc32(kept.labels.cpu().numpy().tobytes()))
                for some in (kept.images, kept.images[:64])]    # the first 64 if they are drawn again at each step
        assert [kept.fingerprint, drawn.fingerprint] == [f"{crc:08x}" for crc in crcs]


# ----------------------------------------------------------------------------------------- 4 network

def test_vit_agrees_with_torch_encoder_layers_in_float64():
    """So closely that an epsilon of 1e-5 in a norm would show."""
    torch.manual_seed(0)
    model, x = op.ViT(32, 8, 10, 48, 3, 4).to(DEVICE).double().eval(), torch.randn(5, 3, 32, 32).to(DEVICE).double()
    assert (model(x) == 0).all()                                # so the first loss is ln(classes)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    patches = F.unfold(x, 8, stride=8).transpose(1, 2)          # an independent patch embedding
    z = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    z = torch.cat([model.cls_token.expand(5, -1, -1), z], 1) + model.pos_embed
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.",
             "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
    for weights in (block.state_dict() for block in model.blocks):
        layer = nn.TransformerEncoderLayer(48, 4, 192, 0.0, "gelu", 1e-6, True, norm_first=True).to(z).eval()
        layer.load_state_dict({a + k: weights[b + k] for a, b in names.items() for k in ("weight", "bias")})
        z = layer(z)
    z = F.layer_norm(z, (48,), model.norm.weight, model.norm.bias, 1e-6)[:, 0]
    theirs = z @ model.head.weight.T + model.head.bias
    assert theirs.std() > 0.1 and (model(x) - theirs).abs().max() < 1e-9


def test_vit_has_the_parameters_of_timm():
    names, layers = set(op.ViT().state_dict()), ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    of = lambda *layers: {f"{n}.{k}" for n in layers for k in ("weight", "bias")}
    assert {n for n in names if "blocks.11." in n} == of(*(f"blocks.11.{n}" for n in layers))
    assert {n for n in names if "block" not in n} == {"cls_token", "pos_embed"} | of("patch_embed.proj", "norm", "head")
    for name, count in (("vit_tiny", 5_717_416), ("vit_small", 22_050_664), ("vit_base", 86_567_656)):
        with torch.device("meta"):
            model = op.ViT(224, 16, 1000, *op.MODELS[name])
        assert sum(p.numel() for p in model.parameters()) == count


def test_initial_weights_are_those_of_timm_and_others_for_each_seed():
    """Normal with deviation 0.02, but patches as torch draws a convolution; biases and head 0, norms 1."""
    a, b = (op.make_model(resolved("pretrain", *TINY, "--seed", seed), 10).state_dict() for seed in (0, 1))
    for name, t in a.items():
        n, alike = t.numel(), torch.corrcoef(torch.stack([t.flatten(), b[name].flatten()]))[0, 1]
        if "norm" in name or "patch" not in name and "bias" in name or name.startswith("head."):
            assert (t == float("norm" in name and "weight" in name)).all()
        elif "patch" in name:
            assert t.abs().max() < 48 ** -0.5 and t.std() > 0.5 * 48 ** -0.5 and abs(alike) < 4.5 / n ** 0.5
        else:
            std = 1e-6 if name == "cls_token" else 0.02
            assert abs(t.mean()) < 4 * std / n ** 0.5 and abs(t.std() / std - 1) < 3 / n ** 0.5 > abs(alike) / 1.5, name
            assert n < 1000 or abs((t / t.std()).pow(4).mean() - 3) < 0.5       # the tails of a normal
    blocks = [a[f"blocks.{k}.mlp.fc1.weight"].flatten() for k in range(6)]
    assert (torch.corrcoef(torch.stack(blocks)) - torch.eye(6)).abs().max() < 0.03


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    block = op.Block(8, 2, 0.25).train().to(DEVICE)
    out = block.drop(torch.ones(20_000, 3, 8, device=DEVICE))
    assert sorted(out.unique().tolist()) == pytest.approx([0, 4 / 3]) and abs(out.mean() - 1) < 0.02
    assert (out.flatten(1).std(1) == 0).all() and (block.eval().drop(torch.ones(5, 3, 8)) == 1).all()
    assert [b.drop_path for b in op.ViT(32, 8, 5, 16, 5, 2, 0.2).blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    x, ways = torch.randn(1, 3, 8, device=DEVICE), []           # each branch by itself: four ways
    for first, second in itertools.product((0, 1 / 0.75), repeat=2):
        y = x + first * block.attn(block.norm1(x))
        ways.append(y + second * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(y)))))
    took = ((block.train()(x.expand(4000, -1, -1))[:, None] - torch.cat(ways)).abs().amax((2, 3)) < 1e-5).float()
    assert (took.sum(1) == 1).all() and (took.mean(0).cpu() - torch.tensor([1, 3, 3, 9]) / 16).abs().max() < 0.03
    for sizes in ((30, 4, 10, 48, 1, 3), (32, 4, 10, 48, 1, 5)):        # the patch, and the heads, do not divide
        with pytest.raises(ValueError, match="divide"):
            op.ViT(*sizes)
    for shape in ((39, 39), (16, 64), (64, 64)):                # the first two have as many patches
        with pytest.raises(ValueError, match="32 pixels"):
            op.ViT(32, 8, 5, 16, 2, 2)(torch.zeros(1, 3, *shape))


# ------------------------------------------------------------------------------------ 5 augmentation

OFF = dict(crop=False, flip=(0, 0), randaug=False, jitter=0, erase=0, mixup=0, cutmix=0, smoothing=0)
GREYS = dict(mean=(0,) * 3, std=(1 / 255,) * 3)                 # the result is 0..255


def photograph(size=64):
    """matplotlib's photograph (3, size, size) uint8."""
    import matplotlib.cbook as cbook
    image = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    return T.pil_to_tensor(image.resize((size, size), Image.BICUBIC))


def augmented(augment, images, labels=None):
    """On the device of the tests -> images and targets, back here."""
    labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    return [t.cpu() for t in augment(images.to(DEVICE), labels.to(DEVICE))]


def is_rounded(ours, exact):
    """Whether greys are whole numbers, those next to the exact ones (either one close to a half)."""
    return (ours - ours.round()).abs().max() < 1e-3 and (ours - exact.clamp(0, 255)).abs().max() < 0.502


@pytest.mark.parametrize("size", [2, 24, 64, 80])
@pytest.mark.parametrize("flip", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_crops_and_flips_are_torchvision_s_in_float64(size, flip, monkeypatch):
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = [(0, 0, 64, 64), (3, 7, 40, 50), (30, 20, 11, 13), (5, 0, 59, 20), (63, 63, 1, 1), (0, 30, 1, 1),
             (17, 0, 1, 64), (2, 0, 62, 1), (10, 61, 2, 3)]     # top left h w
    monkeypatch.setattr(op, "random_boxes", lambda *a, **k: torch.tensor(boxes).float().T.view(2, 2, -1))
    augment = op.Augment(size, 2, **OFF | dict(crop=True, flip=flip), **GREYS)
    for ours, box in zip(augmented(augment, image.expand(len(boxes), -1, -1, -1))[0], boxes, strict=True):
        theirs = T.resized_crop(image.double(), *box, (size, size), T.InterpolationMode.BICUBIC, antialias=True)
        theirs = T.hflip(theirs) if flip[0] else theirs
        assert is_rounded(ours, T.vflip(theirs) if flip[1] else theirs), box


def test_each_image_is_flipped_by_itself_as_often_as_asked():
    torch.manual_seed(0)
    images = torch.randint(256, (4000, 8, 8), dtype=torch.uint8)
    ours = augmented(op.Augment(8, 2, **OFF | dict(flip=(0.5, 0.2)), **GREYS), images)[0][:, 0].round()
    cases = torch.stack([images, images.flip(2), images.flip(1), images.flip(1, 2)])
    cases = (cases == ours).flatten(2).all(2).float()
    assert (cases.sum(0) == 1).all() and (cases.mean(1) - torch.tensor([0.4, 0.4, 0.1, 0.1])).abs().max() < 0.025


def test_random_boxes_have_the_places_areas_and_aspects_of_torchvision():
    torch.manual_seed(0)
    for scale, ratio in (((0.2, 1.0), (3 / 4, 4 / 3)), ((0.08, 1.0), (1, 1))):
        ours = torch.cat(op.random_boxes(20_000, 64, scale, ratio))     # top left h w
        theirs = torch.tensor([RandomResizedCrop.get_params(torch.zeros(1, 64, 64), scale, ratio)
                               for _ in range(20_000)]).T.float()
        assert torch.equal(ours, ours.round()) and (ours[:2] >= 0).all() and (ours[:2] + ours[2:]).max() == 64
        for values in (lambda b: b, lambda b: b[2:3] * b[3:], lambda b: b[2:3] / b[3:], lambda b: 64 - b[:2] - b[2:]):
            assert all(furthest(a, b) < 0.025 for a, b in zip(values(ours).numpy(), values(theirs).numpy()))


def test_random_erasing_replaces_a_box_by_noise_of_each_channel():
    torch.manual_seed(0)
    out = augmented(op.Augment(32, 2, **OFF | {"erase": 0.5}), torch.zeros(2000, 32, 32, dtype=torch.uint8))[0]
    changed = (out != -1).any(1)                                # black is -1 after normalisation
    noise, erased = out.permute(0, 2, 3, 1)[changed], changed[changed.any(2).any(1)]
    area, rows, columns = erased.sum((1, 2)), erased.any(2).sum(1), erased.any(1).sum(1)
    assert abs(len(erased) / 2000 - 0.5) < 0.04 and (rows * columns == area).all()          # a box
    assert (noise.mean(0).abs() < 0.02).all() and ((noise.std(0) - 1).abs() < 0.02).all()
    assert (torch.corrcoef(noise.T) - torch.eye(3)).abs().max() < 0.02
    images = [out[changed[:, 3, 3] & changed[:, 3, 4]][:, 0, 3, k] for k in (3, 4)]         # nor are images alike
    assert len(images[0].unique()) == len(images[0]) > 20 and abs(torch.corrcoef(torch.stack(images))[0, 1]) < 0.5
    theirs = np.array([RandomResizedCrop.get_params(torch.zeros(1, 32, 32), (0.02, 1 / 3), (0.3, 1 / 0.3))[2:]
                       for _ in range(5000)])                   # timm's numbers
    assert furthest(area.numpy(), theirs.prod(1)) < 0.06
    assert furthest((rows / columns).numpy(), theirs[:, 0] / theirs[:, 1]) < 0.06


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.3, 4.0)])
def test_mix_weighs_images_and_targets_alike_by_beta_or_by_the_share_of_a_box(mixup, cutmix):
    images = torch.tensor([255, 0], dtype=torch.uint8).view(2, 1, 1).expand(2, 16, 16)      # white: class 0, black: 3
    plain = augmented(op.Augment(16, 4, **OFF | {"smoothing": 0.1}, mean=(0,) * 3, std=(1,) * 3), images,
                      torch.tensor([0, 3]))
    augment, rng, q = op.Augment(16, 4, mixup=mixup, cutmix=cutmix), np.random.default_rng(0), np.arange(0.1, 0.95, 0.1)
    shares, boxed = np.zeros(2000), np.zeros(2000, bool)        # of the first image in the first
    torch.manual_seed(0)
    for k in range(2000):
        x, target = augment.mix(*(t.clone() for t in plain))
        shares[k], black = x[0].mean(), x[0, 0] == 0
        expected = 0.9 * torch.tensor([shares[k], 0, 0, 1 - shares[k]]) + 0.025
        assert (target - torch.stack([expected, expected.flip(0)])).abs().max() < 1e-5 > (x[0] + x[1] - 1).abs().max()
        boxed[k] = ((x == 0) | (x == 1)).all() and black.any(0).sum() * black.any(1).sum() == black.sum()
    assert abs(boxed.mean() - (0.5 if mixup and cutmix else bool(cutmix))) < 0.03
    if mixup:
        assert np.abs(np.quantile(shares[~boxed], q) - np.quantile(rng.beta(mixup, mixup, 50_000), q)).max() < 0.06
    if cutmix:                                                  # the box of timm's rand_bbox
        half = (16 * np.sqrt(1 - rng.beta(cutmix, cutmix, (50_000, 1)))).astype(int) // 2
        centre = rng.integers(16, size=(50_000, 2))
        outside = 1 - np.prod((centre + half).clip(max=16) - (centre - half).clip(min=0), 1) / 256
        assert np.abs(np.quantile(shares[boxed], q) - np.quantile(outside, q)).max() < 0.06


def test_everything_off_resizes_and_normalises():
    image, pixels = photograph(48)[None], dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    mean, std = (torch.tensor(pixels[k]).view(3, 1, 1) for k in ("mean", "std"))
    off, on = op.Augment(32, 3, **OFF, **pixels), op.Augment(32, 3, **pixels)
    (x, target), grey = augmented(off, image, torch.tensor([2])), augmented(off, image[:, 1])[0]
    assert is_rounded(255 * (x * std + mean), T.resize(image.double(), 32, T.InterpolationMode.BICUBIC, antialias=True))
    assert target.tolist() == [[0, 0, 1]] and torch.equal(on.plain(image.to(DEVICE)).cpu(), x)
    assert torch.equal(grey[:, 1], x[:, 1]) and ((grey * std + mean).std(1) < 1e-6).all()   # three channels
    for wrong in (image[:, :, :40], image / 255):
        with pytest.raises(ValueError, match="square uint8"):
            augmented(on, wrong)


def test_augmentation_has_the_defaults_of_the_authors():
    assert vars(op.Augment(32, 10)) == dict(
        img_size=32, num_classes=10, crop=True, crop_scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=(0.5, 0.5),
        randaug=True, jitter=0.4, erase=0.5, mixup=0.8, cutmix=1.0, smoothing=0.1, mean=(0.5,) * 3, std=(0.5,) * 3)
    images, seen = photograph(32).expand(8, -1, -1, -1), {}
    for flags in itertools.product((True, False), (0.4, 0)):    # randaug, jitter
        augment = op.Augment(32, 10, **dict(OFF, randaug=flags[0], jitter=flags[1]))
        torch.manual_seed(0)
        seen[flags] = augmented(augment, images)[0]
    assert torch.equal(seen[True, 0.4], seen[True, 0])          # jitter only without randaug, as in timm
    assert not torch.equal(seen[False, 0.4], seen[False, 0]) and not torch.equal(seen[True, 0], seen[False, 0])
    assert op.IMAGENET == dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


# ---------------------------------------------------------------------------------------- 6 training

@pytest.fixture
def loop(monkeypatch, tmp_path):
    """The loop alone: words and more settings -> the images of each step, a random number in it, the rates, the steps
    of the tests, and the log. Nothing is trained or saved; an image is its index."""
    for method in ("save_samples", "save", "save_curve"):
        monkeypatch.setattr(op.Run, method, lambda *_: None)
    monkeypatch.setattr(op, "accelerate", lambda model, args: model)
    monkeypatch.setattr(op, "machine", lambda args: {})
    monkeypatch.setattr(op, "over_ranks", lambda x, args: x)

    def loop(steps, *words, tested=False, **more):
        seen, rates, tests = [], [], []
        monkeypatch.setattr(op, "train_step", lambda network, optimizer, x, target, rate, args: rates.append(rate) or (
            torch.tensor(1.0), target))
        monkeypatch.setattr(op, "evaluate", lambda *_: tests.append(len(rates)) or 50.0)
        args = resolved("finetune", *TINY, "--out", tmp_path, *words)
        vars(args).update(more)
        data, run = op.Data(torch.arange(15), lambda i: i.view(-1, 1, 1).byte(), args), op.Run(args)
        op.train(args, run, nn.Linear(1, 1), data, lambda x, labels: seen.append((
            x.flatten().tolist(), torch.rand(1).item())) or (x, F.one_hot(labels, 15)), steps, data if tested else None)
        return seen, rates, tests, run.log
    return loop


def test_each_step_has_a_batch_a_rate_and_random_numbers_of_its_own_on_each_rank(loop):
    words = "--batch-size", 6, "--warmup", 0.17, "--lr", 0.5, "--seed"
    first, rates, *_ = loop(10, *words, 0, world_size=2)
    second, other = (loop(10, *words, seed, rank=rank, world_size=2)[0] for seed, rank in ((0, 1), (1, 0)))
    assert {len(images) for images, _ in first + second} == {3} and loop(10, *words, 0, world_size=2)[0] == first
    seen = torch.tensor([a + b for (a, _), (b, _) in zip(first, second)])       # 10 steps of 6: 4 epochs
    batches = torch.stack([op.batch_indices(15, 6, step, 0) for step in range(10)])
    assert torch.equal(seen.sort(1)[0], batches.sort(1)[0]) and len(op.batch_indices(5, 32, 3, 0)) == 32
    epochs = batches.view(4, 15)
    assert (epochs.sort(1)[0] == torch.arange(15)).all() and len({tuple(e.tolist()) for e in epochs}) == 4
    assert [images for images, _ in other] != [images for images, _ in first]
    assert len({number for _, number in first + second + other}) == 30
    assert rates == pytest.approx([0.25, 0.5, *(0.25 + 0.25 * math.cos(math.pi * k / 8) for k in range(8))])
    assert loop(10, *words, 0, warmup=0.0)[1][:2] == pytest.approx([0.5, 0.25 + 0.25 * math.cos(math.pi / 10)])


@pytest.mark.parametrize("steps, epochs, every, count", [
    (8, 8, 2, 4), (50, 8, 2, 4), (101, 1000, 5, 200), (11, 3, 1, 3), (60, 4.4, 1, 4), (60, 4.6, 1, 5), (7, 1, 5, 1),
    (20, 6, 1, 6), (9, 0.3, 1, 1), (23, 10, 2.5, 4), (50, 5.2, 2, 3)])
def test_tests_are_spread_evenly_and_the_last_one_is_at_the_end(steps, epochs, every, count, loop):
    _, _, tests, log = loop(steps, "--epochs", epochs, "--eval-epochs", every, "--log-every", 1000, tested=True)
    count = min(count, steps)
    assert len(tests) == count and tests[-1] == steps
    assert all(abs(step - steps * (k + 1) / count) <= 1 for k, step in enumerate(tests))
    assert [(r["step"], "loss" in r) for r in log] == [(s, loss) for s in tests for loss in (True, False)]


def by_hand(kind, p, gradients, rates, decay):
    """The published updates in float64. Of Muon: on singular values."""
    p, m, v = p.double(), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        g = g.double()
        if kind == "sgd":
            g = g + decay * p
            m = 0.9 * m + g
            p = p - rate * (g + 0.9 * m)
        elif kind == "adamw":
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2
            p = p * (1 - rate * decay) - rate * m / (1 - 0.9 ** t) / ((v / (1 - 0.999 ** t)).sqrt() + 1e-8)
        else:
            m = 0.95 * m + 0.05 * g
            U, s, V = torch.linalg.svd(0.95 * m + 0.05 * g, full_matrices=False)
            s = s / s.norm().clamp(min=1e-7)
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
            p = p * (1 - rate * decay) - rate * 0.2 * max(p.shape) ** 0.5 * U * s @ V
    return p


def some_steps(optimizer, parameters, vanish=()):
    """Five steps with a rate and gradients that depend on the step alone -> the gradients of each, and the rates. In
    the first, some gradients vanish, as all do behind a head that is zero."""
    rates, gradients = [0.03 / (1 + step) for step in range(5)], []
    for step, rate in enumerate(rates):
        g = torch.Generator().manual_seed(step)
        gradients.append([torch.randn(p.shape, generator=g) * 0.1 * (step > 0 or k not in vanish)
                          for k, p in enumerate(parameters)])
        for p, grad in zip(parameters, gradients[-1], strict=True):
            p.grad = grad.to(p)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return list(zip(*gradients)), rates


@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
def test_optimizers_take_their_published_steps_and_only_weight_matrices_decay(kind):
    """Muon's matrices are tall, wide and square, two of each."""
    torch.manual_seed(0)
    model = op.ViT(16, 8, 5, 16, 2, 2).to(DEVICE)
    for p in model.parameters():
        nn.init.normal_(p)
    before = [p.detach().clone().cpu() for p in model.parameters()]
    given, rates = some_steps(op.make_optimizer(model, settings(optimizer=kind)), [*model.parameters()], range(4, 28))
    blocks = {f"blocks.{k}.{n}.weight" for k in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    decays = blocks | {"patch_embed.proj.weight", "head.weight"}
    for (name, p), start, gradients in zip(model.named_parameters(), before, given, strict=True):
        rule = ("muon" if name in blocks else "adamw") if kind == "muon" else kind
        want = by_hand(rule, start, gradients, rates, 0.05 * (name in decays))
        assert (p.cpu() - want).abs().max() < 4e-6 and (want - start).abs().mean() > 1e-3, name
    assert decays < dict(model.named_parameters()).keys()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16), (384, 96), (1, 7)])
def test_muon_is_torch_s(shape, monkeypatch):
    """torch's multiplies in bfloat16: ours differs by such roundings, and by none where `bfloat16` means float32."""
    start = torch.linspace(-1, 1, shape[0] * shape[1]).view(1, *shape)

    def both(precision):
        ours, theirs = ([nn.Parameter(start[0].to(DEVICE, copy=True)) for _ in range(2)] for _ in range(2))
        blocks = nn.ModuleDict({"blocks": nn.ParameterList(ours)})
        some_steps(op.make_optimizer(blocks, settings(optimizer="muon", precision=precision)), ours, vanish=[1])
        some_steps(torch.optim.Muon(theirs, 1.0, weight_decay=0.05, momentum=0.95, nesterov=True,
                                    adjust_lr_fn="match_rms_adamw"), theirs, vanish=[1])
        return [torch.stack(p).detach().cpu() for p in (ours, theirs)]
    rounded = both("bf16")
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    ours, theirs = both("fp32")
    assert (ours - theirs).abs().max() < 1e-6
    assert all(1e-3 < (x - theirs).norm() / (theirs - start).norm() < 0.03 for x in rounded)


def test_a_step_is_autograd_s_gradient_clipped_and_taken_by_the_optimizer_and_computes_no_more_than_it_must():
    from torch.utils.flop_counter import FlopCounterMode
    torch.manual_seed(0)
    B, N, D, depth, classes = 4, 5, 16, 2, 5
    model, plain = (op.ViT(16, 8, classes, D, depth, 2) for _ in range(2))
    nn.init.normal_(model.head.weight)
    plain.load_state_dict(model.state_dict())
    x, target = torch.randn(B, 3, 16, 16), torch.rand(B, classes).softmax(1)
    args = settings(lr=9, weight_decay=0, clip_grad=0.1)
    with FlopCounterMode(display=False) as count:
        loss, logits = op.train_step(model, op.make_optimizer(model, args), x, target, 0.3, args)
    want = -(target * plain(x).log_softmax(1)).sum(1).mean()
    want.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
    assert norm > 0.1 and abs(loss - want) < 1e-6 and (logits - plain(x)).abs().max() < 1e-5
    for p, q in zip(model.parameters(), plain.parameters()):    # Nesterov's first step is (1 + 0.9) gradients
        assert (p - (q - 0.3 * 1.9 * q.grad * 0.1 / norm)).abs().max() < 1e-6 and p.grad is None
    # 2 FLOPs a product, forwards and twice backwards, but once for the patches: images need no gradient
    block, patches, head = N * 12 * D * D + 2 * N * N * D, (N - 1) * D * 3 * 64, D * classes
    assert count.get_total_flops() == 2 * B * (3 * depth * block + 2 * patches + 3 * head)


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_bf16_is_for_products_and_the_loss_and_the_weights_are_in_float32(precision, dtype):
    torch.manual_seed(0)
    model, seen, args = op.ViT(16, 8, 50, 16, 2, 2).to(DEVICE), [], settings(precision=precision)
    nn.init.normal_(model.head.weight)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    x, target = torch.randn(6, 3, 16, 16, device=DEVICE), torch.rand(6, 50, device=DEVICE).softmax(1)
    loss, logits = op.train_step(model, op.make_optimizer(model, args), x, target, 0.1, args)
    assert seen == [dtype] * 9 and logits.dtype == loss.dtype == torch.float32
    assert abs(loss + (target * logits.double().log_softmax(1)).sum(1).mean()) < 1e-6
    assert all(p.dtype == torch.float32 for p in model.parameters())
    data = op.Data(torch.zeros(3).long(), lambda i: torch.zeros(len(i), 3, 16, 16, dtype=torch.uint8, device=DEVICE),
                   argparse.Namespace(device=DEVICE, seed=0))
    seen.clear()
    op.evaluate(model, data, op.Augment(16, 50), args)
    assert seen == [dtype] * 9


def test_evaluation_is_the_accuracy_on_the_plain_images_of_all_ranks(monkeypatch):
    torch.manual_seed(0)
    model, labels = op.ViT(16, 8, 10, 16, 1, 2, drop_path=0.5).to(DEVICE), torch.randint(10, (1203,))
    nn.init.normal_(model.head.weight)
    images = torch.randint(256, (1203, 3, 16, 16), dtype=torch.uint8)
    data = op.Data(labels, lambda i: images[i].to(DEVICE), argparse.Namespace(device=DEVICE, seed=0))
    right = model.eval()(((images / 255 - 0.5) / 0.5).to(DEVICE)).argmax(1).cpu() == labels
    monkeypatch.setattr(op, "over_ranks", lambda x, args: x)
    for ranks in (1, 2):                                        # an image may sit on the edge
        got = sum(op.evaluate(model.train(), data, op.Augment(16, 10), settings(rank=rank, world_size=ranks))
                  for rank in range(ranks))
        assert model.training and got == pytest.approx(100 * right.double().mean().item(), abs=0.1) and got > 2


@pytest.mark.parametrize("shape, texture, flags", [
    ((40, 40), "fresh", []), ((3, 40, 40), None, ["--no-randaug", "--no-mixup"]), ((1, 40, 40), None, ["--no-cutmix"])])
def test_a_training_step_on_kept_images_never_waits_for_the_device(shape, texture, flags, monkeypatch, tmp_path):
    """The loop on the meta device, which knows only shapes: whoever asks for a number, or mixes devices, is told so. So
    is the log after the last step."""
    args = resolved("pretrain", "--recipe", "paper", "--device", "cpu", "--out", tmp_path, "--img-size", 16,
                    "--patch-size", 8, "--model", "vit_nano", "--batch-size", 8, "--clip-grad", 1, "--optimizer",
                    "muon", "--precision", "fp32", *flags)
    data = op.Data(torch.arange(64) % 10, lambda i: torch.zeros(len(i), *shape, dtype=torch.uint8), args, texture)
    samples, steps, count, make = [], [], op.Run.count, op.make_optimizer

    def make_unfused(model, args):                              # the fused AdamW has no meta
        twin = op.make_model(args, 10)
        optimizer, theirs = make(twin, args), dict(zip(twin.parameters(), model.parameters(), strict=True))
        for group in optimizer.param_groups:
            group.update(fused=False, params=[theirs[p] for p in group["params"]])
        return optimizer
    args.device, data.images, data.labels = "meta", data.images.to("meta"), data.labels.to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())       # has no meta
    monkeypatch.setattr(op, "make_optimizer", make_unfused)
    monkeypatch.setattr(op.Run, "count", lambda run, *numbers: count(run, *numbers) or steps.append(run.step))
    monkeypatch.setattr(op.Run, "save_samples", lambda *_: samples.append(0))     # once, at the first step
    with pytest.raises(RuntimeError, match="meta"):
        op.train(args, op.Run(args), op.make_model(args, 10).to("meta"), data, op.make_augment(args, 10, erase=0.5), 6)
    assert samples == [0] and steps == [*range(1, 7)]


# ---------------------------------------------------------------------------------------- 7 commands

def test_pretraining_learns_and_its_folder_explains_itself(tmp_path, capsys):
    out = tmp_path / "run"
    assert main("pretrain", "--delta", 0.4, "--L", 8, "--steps", 100, "--batch-size", 32, "--canvas", 32, "--points",
                2000, "--warmup", 0.1, "--log-every", 20, "--no-cutmix", *TINY, "--out", out) == 0
    head, images, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(f"recipe nano: vit_nano, cpu x1, fp32, in {out}")
    assert re.fullmatch(r"8 \([0-9a-f]{8}\) images, steps 0 to 100 of 32", images)
    numbers = r"  loss [\d.]+  top1 [\d.]+  lr \S+  images_per_s \S+  minutes_left \S+"
    assert all(re.fullmatch(f"step {k}/100{numbers}", line) for k, line in zip(range(20, 101, 20), lines, strict=True))
    log, args, omega = read_log(out), *(json.loads((out / f"{k}.json").read_text()) for k in ("args", "omega"))
    assert [r["step"] for r in log] == list(range(20, 101, 20)) and log[-1]["images"] == 100 * 32
    assert log[0]["loss"] > 0.8 * math.log(8) and log[-1]["loss"] < 0.7 * math.log(8)
    assert args["command"] == "pretrain" and args["delta"] == 0.4 and args["sigma"] == 3.5 and args["lr"] == 2e-3
    assert args["torch"] == torch.__version__ and {"commit", "processor", "threads", "images_cpu"} <= args.keys()
    base, eps = torch.tensor(omega["base"]), torch.tensor(omega["eps"])
    assert (base == fractal()).all() and eps.shape == (8, 2, 2, 3) and 0.15 < eps.abs().max() <= 0.2 + 1e-6
    samples = np.asarray(Image.open(out / "samples.png"))       # 32 images of 16 x 16 in rows of 8, with borders
    assert samples.shape == (4 * 18 + 2, 8 * 18 + 2, 3) and samples.min() == 0 and samples.max() > 30
    assert Image.open(out / "curve.png").size[0] > 100 and saved(out)["model"]["head.weight"].shape[0] == 8


def test_a_curve_shows_a_single_test_and_names_no_tests_if_there_are_none(tmp_path):
    run = op.Run.__new__(op.Run)
    run.args, run.out = argparse.Namespace(lead=True), tmp_path
    orange = []                                                 # pixels of the second line
    for tests in ([40.0], [math.nan], []):                      # nan: it is in the legend alone
        run.log = [dict(images=100, top1=50.0), *(dict(images=100, test_top1=test) for test in tests)]
        run.save_curve()
        pixels = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).astype(int)
        orange.append((abs(pixels - [255, 127, 14]).sum(2) < 30).sum())
    assert orange[0] > orange[1] + 10 and orange[1] > orange[2] == 0


def test_a_line_of_the_log_has_the_means_since_the_last_one_and_comes_before_each_save_and_test(
        fine, tmp_path, monkeypatch):
    train_step, save, taken, saves = op.train_step, op.Run.save, [], []

    def noted(network, optimizer, x, target, rate, args):
        loss, logits = train_step(network, optimizer, x, target, rate, args)
        taken.append((loss.item(), 100 * (logits.argmax(1) == target.argmax(1)).float().mean().item(), rate))
        return loss, logits
    monkeypatch.setattr(op, "train_step", noted)
    monkeypatch.setattr(op.Run, "save", lambda run: saves.append((run.step, run.log[-1]["step"], run.sums.sum().item()))
                        or save(run))
    assert main(*fine, "--epochs", 2.2, "--batch-size", 8, "--eval-epochs", 0.6, "--log-every", 4, "--save-every", 5,
                "--out", tmp_path) == 0
    log, last = read_log(tmp_path), 0
    tests, training = [r["step"] for r in log if "test_top1" in r], [r for r in log if "loss" in r]
    assert saves == [(step, step, 0) for step in (5, 10, 15, 20, 22)] and tests == [6, 11, 17, 22]
    assert [r["step"] for r in training] == sorted({4, 8, 12, 16, 20, 5, 10, 15, *tests})
    for record in training:
        loss, right, _ = np.mean(taken[last:record["step"]], 0)
        last, speed = record["step"], record["images_per_s"]
        assert (record["loss"], record["top1"]) == pytest.approx((loss, right), rel=1e-5) and speed > 0
        assert record["images"] == 8 * last and record["lr"] == taken[last - 1][2]
        assert record["minutes_left"] == pytest.approx((22 - last) * 8 / speed / 60)


@pytest.fixture
def handed(monkeypatch, tmp_path):
    """A function: command line -> what it gives to `train`."""
    def handed(*arguments):
        calls = []
        monkeypatch.setattr(op, "train", lambda args, run, *given: calls.append(given))
        assert main(*arguments, "--device", "cpu", "--img-size", 16, "--patch-size", 4, "--out", tmp_path / "x") == 0
        return calls[0]
    monkeypatch.setattr(op, "source_data", lambda args: op.Data(
        torch.arange(2), lambda i: torch.zeros(len(i), 32, 32, dtype=torch.uint8), args))
    return handed


def test_fine_tuning_starts_from_the_weights_and_augments_photographs(handed, trained, image_folder):
    finetune = ["finetune", "--data", "folder", "--root", image_folder, "--model", "vit_nano", "--recipe", "paper",
                "--batch-size", 30]
    donor = saved(trained)["model"]
    network, _, before, *rest = handed("pretrain", "--recipe", "paper", "--steps", 7)
    assert rest == [7] and len(network.head.weight) == 2
    assert [block.drop_path for block in network.blocks] == pytest.approx([0.1 * k / 11 for k in range(12)])
    scratch = handed(*finetune)[0].state_dict()
    model, data, after, steps, tests = handed(*finetune, "--epochs", 1.6, "--ckpt", trained / "last.pt")
    assert (len(data), len(tests), steps) == (80, 20, math.ceil(1.6 * 80 / 30)) and len(scratch["head.weight"]) == 2
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, scratch[name] if "head" in name else donor[name])
        assert "fc1.weight" not in name or not torch.equal(weight, scratch[name])
    both = dict(img_size=16, num_classes=2, crop=True, crop_scale=(0.08, 1), ratio=(3 / 4, 4 / 3), randaug=True,
                jitter=0.4, mixup=0.8, cutmix=1.0, smoothing=0.1)
    assert vars(before) == both | dict(flip=(0.5, 0.5), erase=0.5, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert vars(after) == both | dict(flip=(0.5, 0), erase=0.25, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    for flag, change in {                                       # each one thing, as in timm
            "--no-randaug": dict(randaug=False), "--no-crop": dict(crop=False), "--no-aspect": dict(ratio=(
                1, 1)), "--no-erase": dict(erase=0), "--no-mixup": dict(mixup=0), "--no-cutmix": dict(cutmix=0),
            "--no-flip": dict(flip=(0, 0)), "--min-crop=0.3": dict(crop_scale=(0.3, 1)), "--smoothing=0": dict(
                smoothing=0), "--no-randaug --no-jitter": dict(randaug=False, jitter=0)}.items():
        assert vars(handed("pretrain", "--recipe", "paper", *flag.split())[2]) == vars(before) | change


# ========================================================================================== PART TWO

# -------------------------------------------------------------------------- A RandAugment and jitter

def pillow(name, image, level):
    """timm's reading of the operation on Pillow, at a level in -1..1 (timm's magnitude / 10)."""
    bands, amount, shift = len(image.getbands()), abs(level), 0.45 * level * image.size[0]
    grey = dict(resample=Image.BILINEAR, fillcolor=(128,) * 3 if bands == 3 else 128)
    affine = lambda *row: image.transform(image.size, Image.AFFINE, row, **grey)
    each = lambda f: image.point([f(i) for i in range(256)] * bands)
    return {
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "posterize": lambda: each(lambda i: i & ~(2 ** (8 - (4 - int(amount * 4))) - 1)),
        "solarize": lambda: ImageOps.solarize(image, 256 - int(amount * 256)),
        "solarize_add": lambda: each(lambda i: min(255, i + int(amount * 110)) if i < 128 else i),
        "rotate": lambda: image.rotate(level * 30, **grey),
        "shear_x": lambda: affine(1, 0.3 * level, 0, 0, 1, 0), "shear_y": lambda: affine(1, 0, 0, 0.3 * level, 1, 0),
        "translate_x": lambda: affine(1, 0, shift, 0, 1, 0), "translate_y": lambda: affine(1, 0, 0, 0, 1, shift),
    }.get(name, lambda: getattr(ImageEnhance, name.capitalize())(image).enhance(1 + 0.9 * level))()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("dark", [False, True])
def test_randaugment_operations_agree_with_pillow_each_sample_with_its_own(mode, dark):
    """At timm's values; samples come in a random order, and each stays where it was."""
    names = [*op.OPS, *op.MOVES]
    assert set(names) == set("autocontrast equalize invert posterize solarize solarize_add rotate shear_x shear_y "
                             "translate_x translate_y brightness color contrast sharpness".split()) and len(names) == 15
    cases = [*itertools.product(names, (0.9, -0.9, 0.37, -1.0, 0.0))]
    image = T.to_pil_image(photograph(64)).convert(mode)
    if dark:                                                    # leaves room to stretch
        image = image.point([40 + i // 3 for i in range(256)] * len(mode))
    x = T.pil_to_tensor(image).float().to(DEVICE).expand(76, -1, -1, -1)
    which, level = torch.arange(76) // 5, torch.tensor([level for _, level in cases] + [0.9])       # the last has none
    order = torch.randperm(76, generator=seeded(1))
    *ours, untouched = op.apply_op(x, which[order], level[order])[order.argsort().to(DEVICE)].cpu()
    assert torch.equal(untouched, x[0].cpu())
    for mine, (name, level) in zip(ours, cases, strict=True):
        wrong = (mine - T.pil_to_tensor(pillow(name, image, level))).abs()
        if name[:5] in ("rotat", "shear", "trans"):             # at its border Pillow does not blend with the fill
            assert (wrong > 0).float().mean() < 0.05, (name, level)
        else:
            assert wrong.max() <= 1 and wrong.mean() < 0.1, (name, level)
    if mode == "RGB":                                           # what happens to a sample does not depend on the others
        for some in (range(76), [3], [75, 30, 6], [40, 75], [75]):
            some, at = torch.tensor([*some]), [*some]
            got = op.apply_op(x[:len(some)], which[some], torch.tensor([([*cases, (0, 0.9)])[k][1] for k in at]))
            assert torch.equal(got.cpu(), torch.stack([[*ours, untouched][k] for k in at]))


def test_randaugment_draws_two_of_fifteen_with_probability_half(monkeypatch):
    calls = []
    monkeypatch.setattr(op, "apply_op", lambda x, which, level: calls.append((which, level)) or x)
    usual = np.random.default_rng(0).normal(9, 0.5, 100_000).clip(0, 10)
    torch.manual_seed(0)
    augmented(op.Augment(8, 2, **OFF | {"randaug": True}), torch.zeros(30_000, 8, 8, dtype=torch.uint8))
    assert len(calls) == 2 and abs(((calls[0][0] < 15) & (calls[1][0] < 15)).float().mean() - 0.25) < 0.015
    for which, level in calls:
        share, magnitude = torch.bincount(which, minlength=16) / 30_000, 10 * level.abs()
        assert abs(share[15] - 0.5) < 0.015 and (share[:15] - 1 / 30).abs().max() < 0.006
        assert abs(magnitude.mean() - 9) < 0.03 and 0.45 < magnitude.std() < 0.5 and magnitude.max() == 10
        assert abs(level.sign().mean()) < 0.03 and furthest(magnitude.numpy(), usual) < 0.015


def test_color_jitter_draws_factors_for_each_sample_and_an_order_for_the_batch(monkeypatch):
    """Of the functions that agree with Pillow above."""
    asked, orders, names, enhance = [], set(), ("brightness", "color", "contrast"), op.enhance
    monkeypatch.setattr(op, "enhance", lambda x, level, kind, size: asked.append((kind, (1 + size * level).flatten()))
                        or enhance(x, level, kind, size))
    torch.manual_seed(0)
    for _ in range(100):
        x = augmented(op.Augment(8, 2, **OFF | {"jitter": 0.4}, **GREYS), torch.full((40, 8, 8), 100).byte())[0]
        orders.add(tuple(name for name, _ in asked[-3:]))
        [factor] = [f for n, f in asked[-3:] if n == "brightness"]      # all that changes an image of one grey
        assert (x.flatten(1).T - 100 * factor.cpu()).abs().max() < 1.01
    assert len(asked) == 300 and orders == set(itertools.permutations(names))
    drawn = torch.stack([torch.cat([f for n, f in asked if n == name]) for name in names]).cpu()
    for factor in drawn:
        assert furthest(factor.numpy(), np.linspace(0.6, 1.4, 1001)) < 0.03
        assert 0.6 <= factor.min() < 0.602 and 1.398 < factor.max() <= 1.4
        assert len(factor) == 4000 and len(factor.unique()) > 3900
    assert (torch.corrcoef(drawn) - torch.eye(3)).abs().max() < 0.05


# ------------------------------------------------------------------------------------ B other images

def test_a_category_is_a_base_system_and_an_instance_one_of_its_variations():
    few, many = opened("--categories", 2, "--instances", 101), opened("--categories", 3)
    assert few.labels.tolist() == [0] * 101 + [1] * 101 and many.labels.tolist() == [0, 1, 2]
    maps, images = many.omega["systems"], few.images[:101]
    probs = maps[..., :2].det().abs()
    assert (few.omega["systems"] == maps[:2]).all()
    assert (few.images[[0, 101]] == many.images[:2]).all()      # OFDB: the first instance
    assert (few.draw(torch.tensor([150, 20])) == few.images[[150, 20]]).all()
    for instance, axes in ((25, [0]), (50, [1]), (75, [0, 1]), (100, [])):
        assert (images[instance] == images[0].flip(axes)).all()
    varied = maps[:1].repeat(25, 1, 1, 1).flatten(2)            # the parameters a b e c d f, in all maps
    for n, (parameter, factor) in enumerate(itertools.product(range(6), (0.2, 0.6, 1.4, 1.8)), 1):
        varied[n, :, parameter] *= factor
    drawn = render(varied.view(25, 7, 2, 3), 64, 2000, True, seeded(op.seed_for(0, "maps")), probs[0])
    assert (images[:25].cpu() == drawn).all()
    for system, p in zip(maps, probs):                          # they fill a fifth of 512 pixels a side
        points = plain_orbits(system[None], p, 1000, 30, 100, np.random.default_rng(0))[0].T
        cell = ((points - points.min(0)) / np.ptp(points, 0) * 499).astype(int)
        assert len(np.unique(cell @ [1000, 1])) > 0.19 * 512 ** 2


def test_systems_of_fractaldb_have_two_to_seven_maps_of_uniform_numbers_and_are_kept_from_a_fifth_on(monkeypatch):
    tried, drawn = [], []

    def drawing(maps, dilated, generator, probs):               # in place of render_ifs: 512 pixels, 100,000 points
        assert not dilated and torch.equal(probs, maps[..., :2].det().abs())
        tried.extend(maps)
        return torch.zeros(len(maps), 1)
    monkeypatch.setattr(op, "render_ifs", drawing)
    monkeypatch.setattr(op, "many_data", lambda draw, args, texture, systems: drawn.append(systems))
    for shares in ([0.1999, 0.2], [0.2, 0.9]):
        tried.clear()
        monkeypatch.setattr(op, "covered", lambda images: torch.tensor(shares * 25))
        op.fractaldb_data(resolved("pretrain", "--device", "cpu", "--categories", 3000))
        assert torch.equal(drawn[-1], torch.stack(tried)[1 if shares[0] < 0.2 else 0::2 if shares[0] < 0.2 else 1])
    systems = drawn[-1]
    used = (systems != 0).all((2, 3))
    counts = used.sum(1)
    assert torch.equal(used, torch.arange(7) < counts[:, None]) and (systems[~used] == 0).all()
    assert (counts.bincount(minlength=8)[2:] / 3000 - 1 / 6).abs().max() < 0.025 and counts.min() == 2
    for numbers in systems[used].flatten(1).T.numpy():
        assert furthest(numbers, np.linspace(-1, 1, 10_001)) < 0.02 and np.abs(numbers).max() > 0.999


def test_clouds_have_the_mean_and_covariance_or_the_bounds_of_their_numbers():
    some = ["--texture", "point", "--L", 4, "--canvas", 512, "--points", 20_000]
    source, z = opened("--source", "gaussian", "--delta", 1.0, *some), torch.randn(2, 20_000, generator=seeded(32))
    for image, params in zip(source.images.cpu(), (source.omega["base"] + source.omega["eps"]).double().numpy()):
        value, vector = np.linalg.eigh((params[:, 1:] + params[:, 1:].T) / 2)
        points = vector @ np.diag(np.sqrt(value)) @ vector.T @ z.numpy() + params[:, :1]
        pixel = (points * [[1], [-1]] + 3) / 6 * (512 - 1 - 12) + 6.5
        cells = {(y, x) for x, y in pixel.T[(abs(points) <= 3).all(0)].astype(int).tolist()}
        lit = set(map(tuple, image.nonzero().tolist()))
        assert len(cells ^ lit) <= 0.01 * len(cells)            # float32 against float64
        assert 6 <= min(map(min, lit)) and max(map(max, lit)) <= 505    # what lies outside is not drawn
    source = opened("--source", "uniform", "--delta", 0.5, *some)
    for image, params in zip(source.images.cpu(), source.omega["base"] + source.omega["eps"]):
        rows, columns = (image.any(axis).nonzero()[[0, -1], 0] for axis in (1, 0))
        want = params * torch.tensor([[1], [-1]]) / 3 * 499 + 256
        assert (torch.stack([columns, rows.flip(0)]) - want).abs().max() < 3


@pytest.mark.parametrize("numbers, background", [(op.rcdb, 255), (op.visual_atom, 0)])
def test_contours_are_the_lines_that_the_authors_draw(numbers, background):
    """Their loop: one line from each vertex to the next, and from the last to the first."""
    for category in range(4):
        offsets, centre, greys = numbers(0, category, 1)
        theirs = Image.new("L", (512, 512), background)
        for polygon, grey in zip(offsets, greys.tolist()):
            x, y = (centre + polygon).astype(np.float32).T.tolist()
            for k in range(len(x)):
                ImageDraw.Draw(theirs).line((x[k - 1], y[k - 1], x[k], y[k]), fill=grey, width=1)
        ours, small = (op.draw_contour(offsets, centre, greys, size, background) for size in (512, 128))
        assert (ours.numpy() == np.array(theirs)).all() and 0.01 < (ours != background).float().mean() < 0.9
        near = F.max_pool2d((ours != background).float()[None], 12, 4, 4)[0] > 0
        assert small.shape == (128, 128) and not ((small != background) & ~near).any()


def numbers_behind(numbers, category, instance, noise):
    """What RCDB or Visual Atoms draw their polygons from, if all noise has one value: P, V, radii of x and y, growth,
    centre and greys."""
    with pytest.MonkeyPatch.context() as patch:
        shapes, seen = [], []
        patch.setattr(op, "perlin_noise", lambda shape, rng: shapes.append(shape) or noise)
        patch.setattr(op, "polygons", lambda *a: seen.append(a))
        _, centre, greys = numbers(0, category, instance)
    [(P, V, two)], [(corners, radius, growth)] = shapes, seen
    assert corners == V and two == 2 and greys.shape == (P,)
    return argparse.Namespace(P=P, V=V, x=radius[0], y=radius[1], centre=centre, greys=greys, growth=growth)


@pytest.mark.parametrize("numbers", [op.rcdb, op.visual_atom])
def test_contours_have_the_numbers_of_the_authors(numbers):
    """Compared with draws of the published distributions from other random numbers."""
    rng, n, is_rcdb = np.random.default_rng(0), 2000, numbers is op.rcdb
    without, full, other = ([numbers_behind(numbers, k, instance, noise) for k in range(n)]
                            for instance, noise in ((0, 0.0), (0, 0.5 if is_rcdb else 1.0), (1, 0.0)))
    waves = []
    for some in (without, full, other):
        for k, a in enumerate(some):
            if not is_rcdb:         # two sine waves of height 0.5, on both radii: the spectrum of the growth
                assert a.growth.shape == (a.V, 1)
                heights = 2 * np.abs(np.fft.rfft(a.growth[:, 0])[1:]) / a.V
                found = np.flatnonzero(heights > 0.01) + 1      # n = 0 is no wave
                assert heights[found - 1] == pytest.approx(0.5, abs=1e-9) and len(found) in (1, 2) and found.max() <= 20
                waves.append(found.tolist())
                a.growth = a.growth.mean()
    if not is_rcdb:
        assert waves[:n] == waves[n:2 * n] == waves[2 * n:]     # of a category
        common = np.bincount(np.concatenate(waves[:n]), minlength=21)[1:] / n
        assert np.abs(common - 2 / 21).max() < 0.03 and all(len(set(w)) == len(w) for w in waves)
    many = 100_000
    factor = rng.uniform(1, 2, (2, many))
    radius = rng.integers(0, 101, many) if is_rcdb else rng.integers(10, 61, many)
    corners = rng.exponential(100, 3 * many).astype(int)
    theirs = dict(
        P=rng.integers(1, 201, many), V=corners[(corners >= 3) & (corners <= 200)] if is_rcdb
        else rng.integers(200, 1001, many), x=radius * factor[0], y=radius * factor[1])
    for name, sample in theirs.items():
        ours = np.array([getattr(a, name) for a in without])
        assert furthest(ours, sample) < 0.04, name
        assert ours.min() >= sample.min() - 1e-9 and ours.max() <= sample.max() + 1
        apart = {name for a, b in zip(without, other) if getattr(a, name) != getattr(b, name)}
        assert apart == ({name} if is_rcdb and name in "xy" else set())         # VA: of a category, RCDB: an instance
    ratio = np.array([a.x / a.y for a in without if a.y > 0])
    assert furthest(ratio, factor[0] / factor[1]) < 0.04
    c_and_w, w = (np.array([a.growth for a in some]) for some in (without, full))     # c + w - 2 c n, or c + w - c n
    assert furthest(w, np.linspace(0, 0.1, 10_001)) < 0.04 and furthest(c_and_w - w, np.linspace(0, 4, 10_001)) < 0.04
    assert [a.growth for a in other] == pytest.approx(c_and_w.tolist())
    low, high = (56, 456) if is_rcdb else (0, 512)
    for axis in (0, 1):
        assert furthest(np.array([a.centre[axis] for a in without]), np.linspace(low, high, 10_001)) < 0.05
    greys = np.concatenate([a.greys for a in without])
    assert np.abs(np.bincount(greys, minlength=256) / len(greys) - 1 / 256).max() < 0.0006
    assert all((a.centre != b.centre).all() for a, b in zip(without, other))
    assert (numbers(0, 0, 0)[1] != numbers(1, 0, 0)[1]).all()   # of --fractal-seed


def test_polygons_are_ellipses_that_grow_from_one_to_the_next():
    radius, growth = np.array([3, 40]), np.random.default_rng(0).normal(size=(4, 7, 2))
    for (p, k), (x, y) in zip(itertools.product(range(4), range(7)), op.polygons(7, radius, growth).reshape(-1, 2)):
        a, b = radius + sum(growth[q, k] for q in range(p + 1))
        assert (x, y) == pytest.approx((a * math.cos(2 * math.pi * k / 7), b * math.sin(2 * math.pi * k / 7)))


def test_perlin_noise_is_that_of_the_authors_package():
    """A plain loop over the package's formula: the slope is (hash & 7) + 1, or -1 where hash & 8."""
    rng = np.random.default_rng(0)
    hashes, f = rng.integers(256, size=(2, 400_000)), rng.random(400_000)
    left, right = (np.where(h & 8, -1, (h & 7) + 1) for h in hashes)
    fade = 6 * f ** 5 - 15 * f ** 4 + 10 * f ** 3
    theirs = 0.4 * ((1 - fade) * left * f + fade * right * (f - 1))
    ours = op.perlin_noise((400_000,), np.random.RandomState(0))
    # pnoise1 of the package at 200,000 random places: 0.3285; its 256 hashes are not quite random
    assert 0.317 < theirs.std() < 0.33 and 0.317 < ours.std() < 0.33 and furthest(ours, theirs) < 0.005
    assert abs(np.abs(ours).max() - np.abs(theirs).max()) < 0.01
    pairs = op.perlin_noise((100, 1000, 2), np.random.RandomState(0)).reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.02 and abs(np.corrcoef(pairs[1:, 0], pairs[:-1, 0])[0, 1]) < 0.02


@pytest.mark.parametrize("kind, numbers, background", [("va", op.visual_atom, 0), ("rcdb", op.rcdb, 255)])
def test_a_perturbed_contour_fills_a_fifth_and_eps_scales_its_radii(kind, numbers, background, monkeypatch):
    source = opened("--source", kind, "--L", 3, "--canvas", 128)
    with monkeypatch.context() as patch:                        # the first category that does
        shares = iter([0.15, 0.1999, 0.2])
        patch.setattr(op, "covered", lambda images, background: next(shares, torch.ones(len(images))))
        assert opened("--source", kind, "--L", 3, "--canvas", 16).omega["category"] == 2
    offsets, *rest = *numbers(32, source.omega["category"], 0), 128, background
    assert (op.draw_contour(offsets, *rest) != background).float().mean() >= 0.2
    eps = source.omega["eps"]
    assert eps.shape == (3, len(offsets)) and eps.abs().max() <= 0.05
    for image, by in zip(source.images.cpu(), eps.numpy()):     # each polygon by its own factor
        assert (op.draw_contour((offsets.T * (1 + by)).T, *rest) != image).float().mean() < 0.002
    many = opened("--source", kind, "--canvas", 128, "--categories", 2, "--instances", 3)
    assert many.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (many.images[5].cpu() == op.draw_contour(*numbers(32, 1, 2), 128, background)).all()


# Edges of the shapes below by cv2.Canny(smoothed, 100, 200), one bit a pixel, compressed.
CANNY = ("eNpjYKA1+N8AppgZEsA0D4MFmJYAskDAgIENTCswMIFpB6BKCM0IphvAiHIaZl4C1HyYfTD7Ye7hA7pP/gHQvQ0P2B/IAwXqGVigWtFpDgxx"
         "iFXoNAcGjd089nn1kCBLbGCgFwAAoSMWRQ==")


def test_canny_is_opencv_s_and_follows_weak_edges_from_strong_ones():
    y, x = np.mgrid[:64, :64]
    shapes = 40 + 90 * ((x - 20) ** 2 + (y - 24) ** 2 < 150) + 3 * ((x + 2 * y) // 3 % 40 > 24) * (x > 30)
    shapes += 70 * ((x > 36) & (x < 56) & (y > 34) & (y < 50)) + (x * y // 60)
    expected = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(CANNY)), np.uint8)).reshape(64, 64)
    assert (op.canny(torch.tensor(shapes.clip(0, 255), dtype=torch.uint8)).numpy() == 255 * expected).all()
    image = torch.zeros(64, 64, dtype=torch.uint8)
    image[:, 32:] = torch.linspace(25, 120, 64).to(torch.uint8)[:, None]        # a border that fades
    weak, strong = (op.canny(image, low, 200).any(1) for low in (100, 200))
    assert weak.nonzero()[0] < strong.nonzero()[0]                              # goes on beyond the strong part
    assert not op.canny(image // 2, 110, 255).any() and op.canny(image // 2, 60, 100).any()


def test_warps_are_their_formulas():
    theta, bend, shift = op.perturb(torch.eye(2, 3), 0.4, 3, seeded(2)), torch.eye(2, 6), torch.zeros(2, 8, 8)
    affine = F.affine_grid(theta, (3, 1, 32, 32), align_corners=False)
    assert (op.warp_grid("affine", theta, 32) - affine).abs().max() < 1e-6
    x, y = -1 + (2 * 5 + 1) / 32, -1 + (2 * 9 + 1) / 32         # column 5, row 9
    h = torch.tensor([[1.1, 0.2, 0.3], [-0.1, 0.9, 0.2], [0.2, -0.1, 1.1]])
    z = 0.2 * x - 0.1 * y + 1.1
    bend[0, 3:] = torch.tensor([0.1, 0.3, -0.2])
    shift[0] = torch.linspace(-0.4, 0.4, 8)[:, None]            # to the right, the more the lower
    for kind, params, want, error in (
            ("homography", h, ((1.1 * x + 0.2 * y + 0.3) / z, (-0.1 * x + 0.9 * y + 0.2) / z), 1e-6),
            ("polynomial", bend, (x + 0.1 * x * x + 0.3 * x * y - 0.2 * y * y, y), 1e-6),
            ("elastic", shift, (x + 0.4 * (9 / 31 * 2 - 1), y), 0.005)):
        assert (op.warp_grid(kind, params[None], 32)[0, 9, 5] - torch.tensor(want)).abs().max() < error


@pytest.mark.parametrize("edges", ["none", "canny"])
def test_one_photograph_gives_classes_that_differ_by_their_warp(edges):
    file = op.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    plain = op.square(op.read_image(file), 64)
    if edges == "canny":
        plain = op.canny(op.to_grey(plain[None].float())[0, 0].to(torch.uint8))[None]
    source = opened("--source", "image", "--L", 6, "--delta", 0.2, "--edges", edges, "--image", file)
    grid = F.affine_grid(torch.eye(2, 3) + source.omega["eps"], (6, 1, 64, 64), align_corners=False)
    warped = F.grid_sample(plain.float().expand(6, -1, -1, -1), grid, align_corners=False)
    assert (source.images.cpu() - warped).abs().max() < 0.51 and (warped[0] - warped[1]).abs().max() > 100
    for warp in op.WARPS:                                       # without eps nothing changes
        still = opened("--source", "image", "--L", 2, "--delta", 0, "--edges", edges, "--warp", warp)
        assert (still.images.cpu() == plain).all()


# ----------------------------------------------------------------------------- C downstream datasets

def test_a_subset_is_the_first_of_each_class_and_depends_on_pixels_alone(tmp_path, image_folder):
    """The same pictures under other names, in another order, as lossless WebP in RGB: the same are chosen."""
    labels, order = torch.arange(1000) % 7, torch.randperm(1000)
    train, held = op.balanced_subset(labels, order, 40, 0.25)
    for label in range(7):
        first = [k for k in order.tolist() if k % 7 == label][:40]
        assert sorted(k for k in held.tolist() if k % 7 == label) == sorted(first[:10])
        assert sorted(k for k in train.tolist() if k % 7 == label) == sorted(first[10:])
    everything, none = op.balanced_subset(labels, order)
    assert sorted(everything.tolist()) == list(range(1000)) and len(none) == 0
    few, kept = op.balanced_subset(torch.tensor([0, 1, 1, 1]), torch.arange(4), holdout=0.9)
    assert few.tolist() == [0, 3] and kept.tolist() == [1, 2]   # each class keeps one to train on
    rng = np.random.default_rng(1)
    for file in image_folder.rglob("*.png"):
        folder = tmp_path / "copy" / file.relative_to(image_folder).parent
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(file).convert("RGB").save(folder / f"{rng.integers(10 ** 12)}.webp", lossless=True)

    def chosen(root):
        parts = op.downstream_data(resolved("finetune", *TINY, "--data", "folder", "--root", root, "--train-per-class",
                                            20, "--holdout", 0.3))
        assert parts[0].classes == ["across", "down"]
        assert [part.labels.bincount().tolist() for part in parts] == [[14, 14], [6, 6]]
        return [{(int(label), image.numpy().tobytes()) for image, label in zip(part.images, part.labels)}
                for part in parts]
    train, held = chosen(image_folder)
    shutil.rmtree(tmp_path / "copy" / "test")                   # with --holdout nothing is read there
    assert chosen(tmp_path / "copy") == [train, held] and len(train) == 28 and not train & held


def test_named_datasets_are_opened_by_arguments_that_torchvision_knows(tmp_path, monkeypatch):
    """Downloaded if they are not there; to train on by torchvision's defaults, to test on by a split that it has."""
    assert op.DATASETS == dict(cifar10="CIFAR10", cifar100="CIFAR100", stl10="STL10", dtd="DTD", food101="Food101",
                               pets="OxfordIIITPet", aircraft="FGVCAircraft")
    for name, class_name in op.DATASETS.items():
        kind, calls = getattr(datasets, class_name), []

        def fake(*arguments, **named):
            call = inspect.signature(kind).bind(*arguments, **named)
            call.apply_defaults()
            calls.append(call.arguments)
        monkeypatch.setattr(datasets, class_name, fake)
        op.open_datasets(argparse.Namespace(data=name, root=tmp_path))
        assert all(call["root"] == tmp_path and call["download"] is True for call in calls)
        train, test = (call.get("split", call.get("train")) for call in calls)
        assert train in (True, "train", "trainval") and (test is False or test == "test" and '"test"' in
                                                         inspect.getsource(kind))


def test_kept_and_streamed_folders_give_the_pixels_of_the_files(image_folder, monkeypatch):
    dataset, tests = op.open_datasets(argparse.Namespace(data="folder", root=image_folder, holdout=0))
    assert len(tests) == 20 and op.labels_of(tests).tolist() == [0] * 10 + [1] * 10
    args = resolved("finetune", *TINY, "--device", DEVICE)
    kept = op.photographs(dataset, None, args)
    monkeypatch.setattr(op, "KEPT", 0)
    streamed, some = op.photographs(dataset, None, args), op.photographs(dataset, torch.tensor([5, 79]), args)
    assert kept.images is not None and streamed.images is None and len(some) == 2
    want = torch.stack([T.pil_to_tensor(dataset[k][0]) for k in (79, 5)])
    for data, i in ((kept, [79, 5]), (streamed, [79, 5]), (some, [1, 0])):
        images, labels = data[torch.tensor(i)]
        assert images.dtype == torch.uint8 and torch.equal(images.cpu(), want) and labels.tolist() == [1, 0]


def test_small_squares_stay_and_other_shapes_are_cropped_to_the_middle(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8))
    for side, sizes in (((60, 60), {64: 60, 28: 32}), (picture.size, {64: 48, 28: 32})):    # 28 * 8 // 7 is 32
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.resize(side).save(tmp_path / folder / "1.png")
        for img_size, found in sizes.items():
            args = resolved("finetune", "--device", "cpu", "--img-size", img_size)
            images = op.photographs(op.open_folder(tmp_path), None, args).images
            assert images.shape == (2, 3, found, found)
            picture.resize((8, 8)).save(tmp_path / "a" / "0.png")           # a thumbnail among them, the first
            assert op.photographs(op.open_folder(tmp_path), None, args).images.shape == (3, 3, found, found)
            (tmp_path / "a" / "0.png").unlink()
    want = T.pil_to_tensor(T.resize(picture.crop((16, 0, 64, 48)), 32))         # at the border Pillow sees beyond
    assert (images[..., 2:-2] == want[..., 2:-2]).all()


TURNED = [  # an array as a viewer shows it whose EXIF orientation is 1, 2, ... 8; the last is none
    np.asarray, np.fliplr, lambda a: a[::-1, ::-1], np.flipud, np.transpose, lambda a: np.rot90(a, -1),
    lambda a: a[::-1, ::-1].T, np.rot90, np.asarray]


def test_an_image_is_read_as_a_viewer_shows_it(tmp_path):
    """Whatever its mode or depth, over white where it is transparent, turned as its camera was."""
    def read(image, **more):
        image.save(tmp_path / "x.png", **more)
        return np.asarray(op.read_image(tmp_path / "x.png"))
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    stored = (ramp / 257 + 0.5).astype(np.uint8)
    eight, drawing = Image.fromarray(stored), Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    for image in (eight, *map(eight.convert, ("P", "RGBA", "LA")), Image.fromarray(ramp)):
        assert (read(image) == stored[..., None]).all() and read(image).shape == (8, 8, 3), image.mode
    drawing.paste((0, 0, 0, 255), (2, 2, 5, 5))                 # black on nothing
    assert (read(drawing)[..., 0] == 255 * (np.asarray(drawing)[..., 3] == 0)).all()
    colours = eight.convert("P")
    assert read(colours, transparency=colours.getpixel((0, 0)))[0, 0].tolist() == [255] * 3
    for number, turned in enumerate(TURNED, 1):
        want = turned(stored)
        tags = Image.Exif()
        tags[0x0112] = number if number < 9 else 99             # the last is no turn
        assert (read(eight, exif=tags)[..., 0] == want).all(), number
        tags[0x0131] = "software"                               # a tag whose bytes lie beyond the end
        broken = bytearray(tags.tobytes())
        at = max(broken.find(mark) for mark in (b"\x31\x01", b"\x01\x31"))
        broken[at + 8:at + 12] = b"\x7f\x7f\x7f\x7f"
        assert (read(eight, exif=bytes(broken))[..., 0] == want).all(), number
        for mode, packed in (("RGB", "tiff_lzw"), ("L", None)):
            eight.convert(mode).resize((8, 6)).save(tmp_path / "x.tiff", compression=packed,
                                                    tiffinfo={0x0112: number if number < 9 else 1})
            turned = np.asarray(op.read_image(tmp_path / "x.tiff"))[..., 0]
            assert (turned == TURNED[number - 1](np.asarray(eight.resize((8, 6))))).all(), (number, mode)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif"])
def test_rotten_images_are_refused_wherever_Pillow_refuses_them(kind, tmp_path):
    """Bytes in the middle are overwritten. Whatever can be told of it must not be taken for broken tags."""
    Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / f"x.{kind}")
    whole, chance, told = (tmp_path / f"x.{kind}").read_bytes(), random.Random(0), 0
    for _ in range(40):
        rotten, at = bytearray(whole), chance.randrange(len(whole) // 3, len(whole) - 40)
        rotten[at:at + 20] = chance.randbytes(20)
        (tmp_path / f"x.{kind}").write_bytes(rotten)
        try:
            with Image.open(tmp_path / f"x.{kind}") as image:
                want = np.asarray(image.convert("RGB"))
        except Exception:
            told += 1
            with pytest.raises(Exception):
                op.read_image(tmp_path / f"x.{kind}")
        else:
            assert (np.asarray(op.read_image(tmp_path / f"x.{kind}")) == want).all()
    assert told


def test_text_and_profiles_of_a_megabyte_are_read_by_the_script(image_folder, tmp_path):
    root, text = shutil.copytree(image_folder, tmp_path / "x"), PngImagePlugin.PngInfo()
    text.add_text("about", "x" * 3_000_000, zip=True)
    picture = Image.open(root / "train" / "down" / "1.png")
    picture.save(root / "train" / "down" / "1.png", pnginfo=text)
    picture.save(root / "train" / "down" / "2.png", icc_profile=bytes(3_000_000))
    for name in ("1.png", "2.png"):
        with pytest.raises(ValueError):                         # Pillow's own limit, which a program may rely on
            op.read_image(root / "train" / "down" / name)
    words = [SCRIPT, "finetune", "--data", "folder", "--root", root, "--epochs", 0.1, "--batch-size", 8, *QUICK, "--out",
             tmp_path / "run"]
    subprocess.run([sys.executable, *map(str, words)], check=True)


def test_a_folder_is_one_folder_a_class_without_what_systems_put_beside_images(tmp_path, refused):
    root = stripes(tmp_path / ".hidden" / "stripes")            # above the folder names are of no consequence
    across, down, more = root / "train" / "across", root / "train" / "down", root / "train" / "down" / "more"
    more.mkdir()
    (down / "1.png").rename(more / "1.png")
    before = sorted(op.open_folder(root / "train").samples)
    assert len(before) == 80 and (str(more / "1.png"), 1) in before
    for extra in (".ipynb_checkpoints/0.png", ".git/x/0.png", "@eaDir/0.png", "down/.ipynb_checkpoints/0.png", "0.png",
                  "down/@eaDir/0.png", "down/._1.png", "down/more/.x/@eaDir/0.png", "down/notes.txt", ".DS_Store"):
        (root / "train" / extra).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / extra).write_bytes(b"not an image")
    assert sorted(op.open_folder(root / "train").samples) == before
    for folder in (root, root / "train"):                       # its train/, as in fine-tuning
        data = op.source_data(resolved("pretrain", "--device", "cpu", "--source", "folder", "--root", folder))
        assert data.labels.bincount().tolist() == [40, 40] and data.classes == ["across", "down"]
    trains = stripes(tmp_path / "cifar", [("vehicles", 4)]) / "vehicles"
    (trains / "down").rename(trains / "train")                  # a class of CIFAR-100
    (trains / "train" / ".ipynb_checkpoints").mkdir()
    data = op.source_data(resolved("pretrain", "--device", "cpu", "--source", "folder", "--root", trains))
    assert data.classes == ["across", "train"] and len(data) == 8
    (root / "test").rename(root / "val")
    assert len(op.open_datasets(resolved("finetune", "--data", "folder", "--root", root))[1]) == 20
    shutil.copytree(root / "val" / "down", root / "val" / "other")
    shutil.move(across, root / "one" / ".x")
    words = [*TINY, "--out", tmp_path / "run", "--root"]
    assert "two folders or more" in refused("pretrain", "--steps", 1, "--source", "folder", *words, root / "train")
    down.rename(root / "train" / "a")
    more.rename(root / "train" / "b") if more.exists() else shutil.copytree(root / "train" / "a", root / "train" / "b")
    assert "the classes of train/ and val/ differ" in refused("finetune", "--data", "folder", *words, root)


def test_ranks_and_batches_that_do_not_fit_are_refused(tmp_path, refused, image_folder, monkeypatch):
    fine = ["finetune", "--data", "folder", "--root", image_folder, *TINY, "--out", tmp_path / "run"]
    assert "--batch-size" in refused(*fine, "--probe", 1, "--batch-size", 1)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for ranks, told in (("2", "torchrun"), ("two", "torchrun"), ("3", "--batch-size")):     # 2: without torchrun
        monkeypatch.setenv("WORLD_SIZE", ranks)
        assert told in refused("pretrain", *SMALL, *TINY, "--out", tmp_path / "run")
    assert "--batch-size" in refused("render", *SMALL[:6], "--device", "cpu", "--out", tmp_path / "run")
    assert "without --probe" in refused(*fine, "--probe", 1, "--batch-size", 6)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("RANK", "1")                             # as other launchers set it: one process is the lead
    assert resolved("pretrain").lead and resolved("pretrain").rank == 0


# -------------------------------------------------------------------------------------------- D runs

def assert_same(a, b):
    """Two run folders agree in what must be the same: the log, in both its places, but for its times; weights and
    moments. The same bits; on a GPU, where sums have no order, the same losses but for rounding."""
    one, two = saved(a), saved(b)
    threads = [json.loads((folder / "args.json").read_text())["threads"] for folder in (a, b)]
    assert threads[0] == threads[1], "several threads share a sum: its last bits depend on their number"
    times = "seconds images_per_s minutes_left".split()
    logs = [[{k: v for k, v in record.items() if k not in times} for record in log]
            for log in (one["log"], read_log(a), two["log"], read_log(b))]
    assert one["step"] == two["step"] == one["steps"] and logs[0] == logs[1] and logs[2] == logs[3] and logs[0]
    if DEVICE == "cpu":
        assert logs[0] == logs[2] and one["model"].keys() == two["model"].keys()
        assert all(torch.equal(t, two["model"][k]) for k, t in one["model"].items())
        moments, others = one["optimizer"]["state"], two["optimizer"]["state"]
        assert moments.keys() == others.keys() and moments
        for p, state in moments.items():
            assert state.keys() == others[p].keys() and all(torch.equal(t, others[p][k]) for k, t in state.items())
    else:
        for key in ("loss", "lr", "step"):
            one, two = ([r[key] for r in log if key in r] for log in (logs[0], logs[2]))
            assert one == pytest.approx(two, rel=1e-3)


@pytest.fixture
def signals():
    """As in a shell, wherever the tests run."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield lambda: {number: signal.getsignal(number) for number in usual} == usual
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fine(image_folder):
    """A fine-tuning of 8 steps with tests after 4 and 8."""
    return ["finetune", "--data", "folder", "--root", image_folder, "--batch-size", 16, "--epochs", 1.6,
            "--eval-epochs", 0.8, *TINY, "--log-every", 1]


@pytest.fixture(scope="module")
def unbroken():
    """Runs without a break, by what the next test calls them."""
    return {}


@pytest.mark.parametrize("number, place, call, more", [         # a signal, sent by which call of what
    (signal.SIGINT, "train_step", 1, "--optimizer muon"), (signal.SIGTERM, "train_step", 7, "probe"),
    (signal.SIGHUP, "train_step", 5, "--optimizer adamw"), (signal.SIGTERM, "train_step", 4, "streamed"),
    *[(signal.SIGTERM, place, call, "") for place, call in (
        ("Data.__getitem__", 3), ("Run.log_training", 3), ("evaluate", 1), ("Run.save", 1), ("Run.save_curve", 1))]])
def test_a_signal_at_any_moment_saves_and_the_same_command_goes_on_with_the_same_bits(
        number, place, call, more, fine, trained, image_folder, tmp_path, monkeypatch, capsys, signals, unbroken):
    """Also without the checkpoint that it began from, and with folder and images elsewhere."""
    words = ["--randaug", "--mixup", "--erase", *TINY, "--log-every", 1, "--save-every", 3, "--device", DEVICE]
    if "optimizer" in more:
        words = ["pretrain", "--L", 8, "--steps", 8, "--canvas", 32, "--points", 1000, "--texture", "fresh", *words,
                 "--batch-size", 16, "--drop-path", 0.1, *more.split()]
    else:
        words = [*fine, *words, *["--probe", 2] * (more == "probe")]    # its running statistics go on too
    if more == "streamed":
        shutil.copytree(image_folder, tmp_path / "then")
        shutil.copy(trained / "last.pt", tmp_path / "then.pt")
        words += ["--root", tmp_path / "then", "--ckpt", tmp_path / "then.pt"]
        monkeypatch.setattr(op, "KEPT", 0)
    a = unbroken.setdefault(more, tmp_path / "a")
    assert a.exists() or main(*words, "--out", a) == 0
    owner, _, name = place.rpartition(".")
    owner, calls = getattr(op, owner) if owner else op, []

    def sends(*arguments, **named):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **named)
    for run, ignored in (("b", False), ("c", True))[:1 + bool(more)]:       # ignored as under nohup: the run goes on
        signal.signal(number, signal.SIG_IGN if ignored else signal.getsignal(number))
        with monkeypatch.context() as patch, at_step(0, None) as steps:
            calls.clear()
            function = getattr(owner, name)
            patch.setattr(owner, name, sends)
            ends = ignored or name == "save_curve"              # there it was at its end
            assert main(*words, "--out", tmp_path / run) == (0 if ends else 128 + number) and call <= len(calls)
            assert saved(tmp_path / run)["step"] == len(steps) and (len(steps) == 8) == ends and (ignored or signals())
        if ends:
            assert_same(a, tmp_path / run)
    assert not more or f"saved step {call} of 8; the same command goes on\n" in capsys.readouterr().out
    if name == "save_curve":
        return
    with open(tmp_path / "b" / "log.jsonl", "a") as log:        # as if killed later, between a line and a checkpoint
        log.write('{"step": 6, "loss": 0.1}\n{"ste')
    (tmp_path / "b").rename(tmp_path / "moved")
    if more == "streamed":
        (tmp_path / "then").rename(tmp_path / "now")
        (tmp_path / "then.pt").unlink()
        words += ["--root", tmp_path / "now"]
    step = saved(tmp_path / "moved")["step"]
    with at_step(0, None) as steps:
        assert main(*words, "--out", tmp_path / "moved") == 0 and len(steps) == 8 - step
    assert_same(a, tmp_path / "moved")
    before = contents(tmp_path)
    capsys.readouterr()
    assert main(*words, "--out", tmp_path / "moved", "--save-every", 5, "--log-every", 2) == 0      # it has ended
    assert re.fullmatch(r"onepfrac: .*this run has ended.*\n", capsys.readouterr().out) and contents(tmp_path) == before
    if more == "streamed":                                      # an ended run says nothing of other images
        assert main(*words, "--root", tmp_path / "other", "--out", tmp_path / "moved") == 2
        assert "root " in capsys.readouterr().err and contents(tmp_path) == before


@pytest.mark.parametrize("sent, status, saves", [               # signals, each with the seconds since the one before
    ([(signal.SIGINT, 0), (signal.SIGINT, 0.9)], 130, True), ([(signal.SIGTERM, 0), (signal.SIGTERM, 9)], 143, True),
    ([(signal.SIGHUP, 0), (signal.SIGINT, 0.5)], 129, True), ([(signal.SIGINT, 0), (signal.SIGTERM, 9)], 130, True),
    ([(signal.SIGINT, 0), (signal.SIGINT, 1.1)], 130, False), ([(signal.SIGTERM, 0), (signal.SIGINT, 1.1)], 130, False),
    ([(signal.SIGINT, 0), (signal.SIGINT, 0.6), (signal.SIGINT, 0.6)], 130, False)])
def test_one_wish_to_stop_may_come_twice_and_only_a_late_ctrl_c_acts_at_once(
        sent, status, saves, tmp_path, monkeypatch, signals):
    now, words = [100.0], ["pretrain", *SMALL, *QUICK, "--steps", 4, "--out", tmp_path / "run"]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def send():
        for number, seconds in sent:
            now[0] += seconds
            os.kill(os.getpid(), number)
    with at_step(3, send) as calls:
        assert main(*words) == status and len(calls) == 3 and signals()
    assert (tmp_path / "run" / "last.pt").exists() == saves
    if not saves:                                               # before the first checkpoint any command may begin
        assert main(*words, "--lr", 0.003) == 0 and saved(tmp_path / "run")["args"]["lr"] == 0.003


def test_another_command_is_refused_by_what_differs_and_changes_nothing(trained, tmp_path, refused):
    half, content, words = shutil.copytree(trained, tmp_path / "half"), saved(trained), ["pretrain", *SMALL, *QUICK]
    words += ["--steps", 6]
    torch.save(content | dict(step=3, log=[content["log"][0] | dict(seconds=1000.0)]), half / "last.pt")
    for run in (trained, half):                                 # ended or not
        before = contents(run)
        for more, told in ((["--seed", 9], ["seed 0, not 9"]), (["--delta", 0.3], ["delta 0.1, not 0.3"]),
                           (["--steps", 7, "--lr", 0.5], ["steps 6, not 7", "lr 0.002, not 0.5"])):
            error = refused(*words, *more, "--out", run)
            assert all(part in error for part in ("--out", *told)) and error.count(", not ") == len(told)
        assert "command pretrain, not finetune" in refused("finetune", *TINY, "--out", run) and contents(run) == before
    known = resolved(*words, "--out", half)
    assert set(content["args"]) == set(vars(known)) | {"images_cpu"}
    for name, value in vars(known).items():
        changed = not value if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else "meta"
        other = argparse.Namespace(**vars(known) | {name: changed if name != "out" else str(half)})
        with contextlib.nullcontext() if name in PLACE else pytest.raises(op.InputError, match=f" {name} .*, not "):
            assert op.Run(other).step == 3
    assert main(*words, "--out", half, "--save-every", 2, "--log-every", 5) == 0
    assert [r["step"] for r in read_log(half)] == [3, 4, 5, 6]
    assert 1000 <= read_log(half)[-1]["seconds"] < 1100         # the clock goes on as well


@pytest.mark.parametrize("bad, step, at", [(4, 4, 2), (5, 6, 4)])       # a weight after step 4; the loss of step 5
def test_what_is_not_finite_ends_a_run_and_its_last_weights_stay(bad, step, at, tmp_path, monkeypatch, refused):
    train_step, calls = op.train_step, []
    words = ["pretrain", *SMALL, *QUICK, "--steps", 6, "--save-every", 2, "--log-every", 100, "--out"]

    def spoil(network, *rest):
        loss, logits = train_step(network, *rest)
        calls.append(0)
        if len(calls) == bad == 4:                              # the loss is still finite
            network.blocks[2].mlp.fc1.weight.data[0, 0] = math.inf
        return loss * (math.nan if len(calls) == bad == 5 else 1), logits
    monkeypatch.setattr(op, "train_step", spoil)
    error = refused(*words, tmp_path / "x")
    assert f"step {step}" in error and "--lr 0.002" in error and "another --out" in error
    content = saved(tmp_path / "x")
    assert content["step"] == at and all(t.isfinite().all() for t in content["model"].values())
    monkeypatch.undo()
    for run in ("x", "new"):                                    # it was the weights, not the command
        assert main(*words, tmp_path / run) == 0
    assert_same(tmp_path / "x", tmp_path / "new")


def test_a_checkpoint_that_cannot_be_gone_on_from_is_named(trained, tmp_path, refused):
    half, run = saved(trained) | dict(step=3), shutil.copytree(trained, tmp_path / "run")
    for bad in (b"", b"PK\x03\x04 cut", {}, [1], {"model": half["model"]}, half | {"model": {}},
                half | {"optimizer": {}}, half | {"model": half["model"] | {"norm.weight": torch.zeros(3)}}):
        (run / "last.pt").write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, run / "last.pt")
        before = contents(run)
        error = refused("pretrain", *SMALL, *QUICK, "--steps", 6, "--out", run)
        assert f"--out {run}" in error and contents(run) == before, bad


@pytest.mark.parametrize("limit", [4 * 2 ** 30, 0])
def test_a_run_goes_on_only_with_its_images(limit, fine, image_folder, tmp_path, refused, monkeypatch, signals):
    """Whether memory keeps them or not: then the first 64 images and all labels tell."""
    monkeypatch.setattr(op, "KEPT", limit)
    root, out = shutil.copytree(image_folder, tmp_path / "x"), tmp_path / "run"
    words = [*fine, "--root", root, "--out", out]
    with at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert main(*words) == 143
    across, down, test = root / "train" / "across", root / "train" / "down", root / "test" / "down"
    before = contents(out)
    for change in (lambda: shutil.copy(down / "3.png", across / "7.png"),       # replaced
                   lambda: shutil.copy(across / "3.png", test / "7.png"),
                   lambda: shutil.copy(across / "3.png", across / "new.png"),   # added
                   lambda: (down / "9.png").unlink(),
                   lambda: (across / "5.png").rename(down / "5x.png"),          # moved, and exchanged
                   lambda: across.rename(root / "t") and down.rename(across) and (root / "t").rename(down)):
        change()
        error = refused(*words)
        assert "images_cpu" in error and ", not " in error and contents(out) == before
        shutil.rmtree(root)
        shutil.copytree(image_folder, root)
    (across / ".DS_Store").touch()                              # of no consequence
    assert main(*words) == 0


def test_a_run_outlives_its_readers_and_an_unreadable_image(fine, image_folder, tmp_path, refused, monkeypatch):
    """Of its output: a pipe that nobody reads, a full disk, no terminal."""
    root = shutil.copytree(image_folder, tmp_path / "x")
    monkeypatch.setattr(op, "KEPT", 0)
    words = [*fine, "--root", root, "--save-every", 1, "--out"]
    assert main(*words, tmp_path / "a") == 0
    for part in ("train", "test"):
        with at_step(1, (root / part / "down" / "7.png").unlink) as steps:
            assert "7.png" in refused(*words, tmp_path / "b")
        assert 1 <= len(steps) <= saved(tmp_path / "b")["step"] + 1
        shutil.copy(image_folder / part / "down" / "7.png", root / part / "down" / "7.png")
    reader, writer = os.pipe()
    os.close(reader)
    for k, output in enumerate((open(writer, "w"), open("/dev/full", "w"), None)):
        monkeypatch.setattr(sys, "stdout", output)
        assert main(*words, tmp_path / (str(k) if k else "b")) == 0
    assert_same(tmp_path / "a", tmp_path / "b")
    closed = subprocess.run(["sh", "-c", f"'{sys.executable}' '{SCRIPT}' -h >&-"], capture_output=True, text=True)
    assert closed.returncode == 0 and "Traceback" not in closed.stderr and "pretrain" in closed.stderr


def test_a_disk_that_fills_in_the_middle_of_a_checkpoint_is_told_in_one_line(tmp_path):
    """Here a file may not be larger than half of a checkpoint. Later the same command goes on."""
    words = [sys.executable, SCRIPT, "pretrain", *SMALL, *QUICK, "--steps", 4, "--save-every", 2, "--out", tmp_path / "x"]
    words = [*map(str, words)]
    assert subprocess.run(words).returncode == 0
    half = (tmp_path / "x" / "last.pt").stat().st_size // 2
    shutil.rmtree(tmp_path / "x")
    full = subprocess.run(words, stderr=subprocess.PIPE, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)))
    assert full.returncode == 2 and full.stderr.count("\n") == 1 and "--out" in full.stderr
    assert subprocess.run(words).returncode == 0 and saved(tmp_path / "x")["step"] == 4


def test_only_a_gpu_compiles_and_only_if_it_may(monkeypatch, fine, tmp_path, refused):
    resets = []
    monkeypatch.setattr(torch, "compile", lambda network: "fast")
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(0))
    for device, asked, network in (("cuda", True, "fast"), ("cuda", False, "plain"), ("cpu", True, "plain")):
        args = argparse.Namespace(world_size=1, device=device, compile=asked)
        assert op.accelerate("plain", args) == network
    assert len(resets) == 1                                     # each run compiles for itself

    def fails():                                                # as without a C compiler, or without triton
        raise type("Failed", (RuntimeError,), dict(__module__="torch._inductor.exc"))("no\ncompiler")
    with at_step(1, fails):
        assert "--compile: no compiler; give --no-compile" in refused(*fine, "--out", tmp_path / "run")

    def unsupported(network):
        raise RuntimeError("torch.compile is not supported on Python 3.99")
    monkeypatch.setattr(torch, "compile", unsupported)
    with pytest.raises(op.InputError, match="--no-compile.* 3.99"):
        op.accelerate("plain", argparse.Namespace(world_size=1, device="cuda", compile=True))


def test_a_full_gpu_gets_one_line(fine, tmp_path, refused):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")
    with at_step(1, full):
        assert "--batch-size: CUDA out of memory. Tried" in refused(*fine, "--out", tmp_path / "run")


def test_a_run_in_a_thread_leaves_signals_alone(fine, tmp_path, signals):
    status = []
    thread = threading.Thread(target=lambda: status.append(main(*fine, "--out", tmp_path / "run")))
    thread.start()
    thread.join()
    assert status == [0] and signals()


def life(folder, words, environment=(), die_at=None):
    """A whole run in a process of its own; a rank notes its steps, and may kill itself before one of them."""
    os.environ |= dict(environment)
    rank, seen, train_step = os.environ.get("RANK", "0"), [], op.train_step

    def spy(network, optimizer, x, target, rate, args):
        if len(seen) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seed = torch.initial_seed()
        loss, logits = train_step(network, optimizer, x, target, rate, args)
        seen.append(dict(x=x, target=target, rate=rate, loss=loss, logits=logits, seed=seed))
        torch.save(seen, f"{folder}/rank{rank}.part")
        os.replace(f"{folder}/rank{rank}.part", f"{folder}/rank{rank}.pt")      # whole, whenever it is ended
        return loss, logits
    op.train_step = spy if environment else train_step
    with open(f"{folder}/printed{rank}", "a") as file, contextlib.redirect_stdout(file):
        sys.exit(op.main([str(word) for word in words]))


@pytest.fixture(scope="session")
def begin():
    """A function that begins a `life`. A server that has imported torch once forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onepfrac", "test_onepfrac"])

    def begin(*arguments):
        process = context.Process(target=life, args=arguments)
        process.start()
        return process
    return begin


@pytest.mark.parametrize("which", ["pretrain", "finetune"])
def test_a_run_that_is_killed_again_and_again_reaches_the_bits_of_an_unbroken_one(which, begin, fine, tmp_path):
    words = [*fine, "--epochs", 3.2, "--eval-epochs", 1] if which == "finetune" else [
        "pretrain", *SMALL, *TINY, "--steps", 16, "--texture", "fresh"]
    words += ["--log-every", 2, "--save-every", 2, "--out"]
    assert main(*words, tmp_path / "a") == 0
    last, chance, kills, process = tmp_path / "b" / "last.pt", random.Random(0), 0, None
    while process is None or process.exitcode == -signal.SIGKILL:
        before, process = last.exists() and last.stat().st_mtime_ns, begin(tmp_path, [*words, tmp_path / "b"])
        while process.is_alive():                               # until there is a new checkpoint, and a moment more
            time.sleep(0.002)
            if last.exists() and last.stat().st_mtime_ns != before:
                time.sleep(chance.uniform(0, 0.03))
                process.kill()
                process.join()
                kills += 1
    assert process.exitcode == 0 and kills >= 2, (process.exitcode, kills)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_two_processes_end_go_on_train_one_network_and_log_all_of_it(image_folder, begin, tmp_path):
    """As torchrun starts them. One is killed; then the other cannot go on, and the same command does."""
    words = ["finetune", "--data", "folder", "--root", image_folder, "--batch-size", 32, "--epochs", 9.6,
             "--eval-epochs", 5, *TINY, "--log-every", 4, "--save-every", 8, "--clip-grad", 0, "--optimizer", "sgd",
             "--lr", 0.2, "--smoothing", 0, "--out", tmp_path / "two"]      # Adam would make much of a rounding error

    def job(die_at=None, second=words):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        ranks = [begin(tmp_path, (words, second)[k], dict(
            RANK=str(k), LOCAL_RANK=str(k), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)),
            die_at if k else None) for k in (0, 1)]
        ranks[1].join(60)
        ranks[0].join(20 if die_at else 60)
        for process in ranks:                                   # torchrun ends those that are left
            process.kill()
            process.join()
        return [p.exitcode for p in ranks], [torch.load(tmp_path / f"rank{k}.pt", weights_only=True) for k in (0, 1)]
    status, before = job(die_at=13)
    assert status[0] != 0 and status[1] == -signal.SIGKILL and saved(tmp_path / "two")["step"] == 8
    status, _ = job(second=[*words[:-1], tmp_path / "another machine's disk"])
    assert status == [2, 2] and saved(tmp_path / "two")["step"] == 8
    status, after = job()
    assert status == [0, 0] and len(after[0]) == len(after[1]) == 16
    printed = (tmp_path / "printed0").read_text()               # only one of them writes and prints
    assert printed.count("step 24/24  loss") == 1 and "cpu x2" in printed and not (tmp_path / "printed1").read_text()
    for first, second in zip(before, after):                    # the same bits in the steps that both jobs took
        assert all(torch.equal(one[key], two[key]) for one, two in zip(first[8:12], second) for key in
                   ("x", "target", "loss", "logits"))
    ranks = [first[:8] + second for first, second in zip(before, after)]
    assert len({step["seed"] for rank in ranks for step in rank}) == 2 * 24
    # One process that takes the steps of both, on both their images, ends with the same network.
    args = resolved(*words)
    model = op.make_model(args, 2)
    optimizer, results = op.make_optimizer(model, args), []
    for step, pair in enumerate(zip(*ranks)):
        x, target = (torch.stack([rank[key] for rank in pair], 1).flatten(0, 1) for key in ("x", "target"))
        assert torch.equal(target.argmax(1), (op.batch_indices(80, 32, step, 0) >= 40).long())
        loss, logits = op.train_step(model, optimizer, x, target, pair[0]["rate"], args)
        results.append((loss.item(), 100 * (logits.argmax(1) == target.argmax(1)).double().mean().item()))
    content, log = saved(tmp_path / "two"), read_log(tmp_path / "two")
    assert all(torch.allclose(t, content["model"][name], atol=1e-4) for name, t in model.state_dict().items())
    for k, record in enumerate(r for r in log if "loss" in r):
        assert (record["step"], record["images"]) == (4 * k + 4, 32 * (4 * k + 4)) and k < 6
        means = np.mean(results[4 * k:4 * k + 4], 0).tolist()
        assert [record["loss"], record["top1"]] == pytest.approx(means, abs=1e-3)
    model.load_state_dict(content["model"])
    tests = op.photographs(op.open_datasets(args)[1], None, args)
    found = op.evaluate(model, tests, op.make_augment(args, 2, **op.IMAGENET), args)
    assert log[-1]["test_top1"] == pytest.approx(found)


def test_checkpoints_of_timm_and_of_the_authors_load(tmp_path):
    torch.manual_seed(3)
    donor = op.ViT(32, 4, 1000, 96, 6, 3)
    nn.init.normal_(donor.head.weight)
    state, counts = donor.state_dict(), dict(n_averaged=torch.tensor(5), num_batches_tracked=torch.tensor(7))
    for content in (state, {"model": state, "epoch": 5}, {"state_dict": state}, state | counts,
                    {"model": state, "args": argparse.Namespace(model="vit_tiny")},
                    {"model": {f"module.{k}": v for k, v in state.items()}}, {k: t.half() for k, t in state.items()},
                    {f"module._orig_mod.{k}": v for k, v in state.items()}, {"model_state_dict": state | counts},
                    {"state_dict": {f"model.{k}": v for k, v in state.items()}}):
        torch.save(content, tmp_path / "weights.pt")
        same, other = op.ViT(32, 4, 1000, 96, 6, 3), op.ViT(16, 4, 10, 96, 6, 3)
        for model in (same, other):
            op.load_weights(model, tmp_path / "weights.pt")
            for name, weight in model.state_dict().items():
                if name != "pos_embed" and "head" not in name:
                    assert torch.allclose(weight, state[name], atol=1e-4), name
            assert (model.head.weight == 0).all()               # the classes are others
        assert torch.allclose(same.pos_embed, donor.pos_embed, atol=1e-4) and other.pos_embed.shape == (1, 17, 96)


def test_a_wrong_path_of_weights_is_told_before_the_data_are_read(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(op, "downstream_data", None)
    words = ["finetune", "--ckpt", tmp_path / "x.pt", "--out", tmp_path / "run"]
    assert "--ckpt" in refused(*words) and "no such file" in refused(*words) and not (tmp_path / "run").exists()


def test_a_file_of_something_else_or_of_other_weights_is_told_by_its_name(tmp_path):
    model, file = op.ViT(16, 8, 5, 16, 1, 2), tmp_path / "x.pt"
    state = model.state_dict()
    spoilt = [state | {"norm.weight": spoil(state["norm.weight"])} for spoil in (
        lambda t: t.to(torch.int8), lambda t: t > 0, lambda t: t.tolist(), lambda t: None, lambda t: t / 0,
        lambda t: t[:5])]
    for content, told in (
            (b"", "x.pt"), (b"version https://git-lfs.github.com/spec/v1", "x.pt"), (b"hello", "x.pt"),
            (model, "state dict"), (7, "one int"), (torch.zeros(3), "one Tensor"), ([state], "one list"),
            (nn.Linear(2, 2).state_dict(), "holds no Vision Transformer, but weight, bias"),
            *[(content, "norm.weight|not finite|x.pt: does not fit") for content in spoilt],
            *[(state | {"pos_embed": torch.zeros(shape)}, "x.pt: does not fit --model") for shape in (
                (1, 0, 16), (1, 1, 16), (2, 5, 16), (3,), (1, 7, 16), (1, 5, 17))]):
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        with pytest.raises(op.InputError, match=told) as error:
            op.load_weights(model, file)
        assert str(error.value).startswith(f"--ckpt {file}") and len(str(error.value)) < 500
    with pytest.raises(op.InputError, match="none.pt"):
        op.load_weights(model, tmp_path / "none.pt")


@pytest.mark.parametrize("old, new", [(8, 4), (8, 3), (4, 8), (7, 7)])
def test_position_embeddings_follow_the_image_size_as_pillow_resizes(old, new, tmp_path):
    donor, model = (op.ViT(4 * side, 4, 3, 6, 1, 2) for side in (old, new))
    nn.init.normal_(donor.pos_embed)
    torch.save(donor.state_dict(), tmp_path / "x.pt")
    op.load_weights(model, tmp_path / "x.pt")
    assert torch.equal(model.pos_embed[:, 0], donor.pos_embed[:, 0])
    for k in range(6):
        grid = Image.fromarray(donor.pos_embed[0, 1:, k].detach().view(old, old).numpy())
        want = np.asarray(grid.resize((new, new), Image.Resampling.BICUBIC))
        assert np.abs(model.pos_embed[0, 1:, k].detach().view(new, new).numpy() - want).max() < 1e-5


# ------------------------------------------------------------------------------- E probe and render

@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
def test_probe_sees_the_first_blocks_only_and_trains_the_head_only(kind):
    torch.manual_seed(0)
    model = op.ViT(16, 8, 10, 48, 3, 2, drop_path=0.5)
    probe, batches = op.Probe(model, 2, 10).train(), torch.randn(4, 5, 3, 16, 16)
    assert (probe.head.weight == 0).all()
    nn.init.normal_(probe.head.weight)
    mean, var = torch.zeros(48), torch.ones(48)                 # what evaluation normalises by
    for x in batches:
        before = probe(x)
        seen = model.blocks[1](model.blocks[0](model.embed(x)))[:, 1:].mean(1)
        z = (seen - seen.mean(0)) / (seen.var(0, correction=0) + 1e-6).sqrt()
        assert torch.allclose(before, z @ probe.head.weight.T + probe.head.bias, atol=1e-4)
        mean, var = 0.9 * mean + 0.1 * seen.mean(0), 0.9 * var + 0.1 * seen.var(0)
    z = (seen - mean) / (var + 1e-6).sqrt()
    later = probe.eval()(x)
    assert torch.allclose(later, z @ probe.head.weight.T + probe.head.bias, atol=1e-4)
    assert torch.allclose(probe(x[:1]), later[:1], atol=1e-5)   # whatever else is in the batch
    probe.train()
    for p in (*model.blocks[2].parameters(), model.norm.weight):
        nn.init.normal_(p)
    assert torch.equal(probe(x), before)
    assert [n for n, p in probe.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    old = {n: p.clone() for n, p in probe.named_parameters()}
    op.train_step(probe, op.make_optimizer(probe, settings(optimizer=kind)), x, torch.eye(10)[:5], 0.1, settings())
    assert {n for n, p in probe.named_parameters() if not torch.equal(p, old[n])} == {"head.weight", "head.bias"}
    with pytest.raises(op.InputError, match="--probe 4: .*3 blocks"):
        op.Probe(model, 4, 10)


def test_a_probe_tells_stripes_apart_by_weights_that_stay(trained, image_folder, tmp_path):
    assert main("finetune", "--probe", 2, "--ckpt", trained / "last.pt", "--data", "folder", "--root", image_folder,
                "--epochs", 40, "--eval-epochs", 20, *TINY, "--batch-size", 16, "--out", tmp_path, "--lr", 0.02) == 0
    tests = {r["step"]: r["test_top1"] for r in read_log(tmp_path) if "test_top1" in r}
    assert tests.keys() == {100, 200} and tests[200] >= 70, tests
    model, donor = (saved(run)["model"] for run in (tmp_path, trained))
    assert all(torch.equal(model[f"frozen.{n}"], t) for n, t in donor.items() if "head" not in n)


def test_render_writes_a_folder_that_trains(tmp_path, refused):
    words = ["render", "--L", 12, "--canvas", 32, "--points", 2000, "--device", "cpu", "--out", tmp_path / "x"]
    assert main(*words) == 0
    dataset, base = datasets.ImageFolder(tmp_path / "x"), op.base_ifs(2, 3.5, 32)
    assert [label for _, label in dataset.samples] == list(range(12))
    maps = base + torch.tensor(json.loads((tmp_path / "x.json").read_text())["eps"])
    drawn = op.render_ifs(maps, 32, 2000, True, torch.Generator().manual_seed(op.seed_for(0, "maps")),
                          base[:, :, :2].det().abs())
    assert all((np.array(dataset[i][0])[..., 0] == drawn[i].numpy()).all() for i in range(12))
    assert "--out" in refused(*words)                           # it holds images
    shutil.move(tmp_path / "x", tmp_path / "moved")
    numbers = (tmp_path / "x.json").read_text()
    assert "x.json" in refused(*words[:-1], f"{tmp_path / 'x'}/", "--delta", 0.2)       # of the moved ones
    assert (tmp_path / "x.json").read_text() == numbers and not (tmp_path / "x").exists()
    shutil.move(tmp_path / "moved", tmp_path / "x")
    assert "--sigma" in refused(*words[:-1], tmp_path / "y", "--sigma", 9) and not (tmp_path / "y").exists()
    assert main("pretrain", "--source", "folder", "--root", tmp_path / "x", "--batch-size", 8, *QUICK, "--steps", 2,
                "--out", tmp_path / "run") == 0


# ---------------------------------------------------------------------------------------- F settings

PRE, FINE = "pretrain --steps 1", "finetune --data folder --root {folder}"
BAD = {     # the flag that the one line must name: command lines
    "--delta": f"{PRE} --delta -0.1; {PRE} --delta many; {PRE} --delta nan; {PRE} --delta 100 --L 2 --points 300",
    "--sigma": f"{PRE} --sigma 0; {PRE} --sigma 6.5", "--L": f"{PRE} --L 1", "--lr": f"{PRE} --lr inf",
    "--seed": f"{PRE} --seed=-1; {PRE} --seed 1.5", "--recipe": f"{PRE} --recipe large",
    "--steps": f"{PRE} --steps 0; {PRE} --steps {'9' * 400}", "--canvas": f"{PRE} --canvas 2",
    "--points": f"{PRE} --points 0; {PRE} --texture point --points 300 --L 2", "--warmup": f"{PRE} --warmup 1",
    "--patch-size": f"{PRE} --img-size 30 --canvas 32 --points 300", "--num-maps": f"{PRE} --num-maps 1",
    "--min-crop": f"{PRE} --min-crop 1.5; {PRE} --min-crop 0", "--device": f"{PRE} --device cuda",
    "--noise": f"{PRE} --noise loud; {PRE} --source image --warp elastic --noise multiplicative",
    "--nonsense": f"{PRE} --nonsense; {PRE} --nonsense=5", "COMMAND": "train; --lr 1; resume runs/x",
    "--ckpt": "; ".join(f"{FINE} --ckpt {{tmp}}/{name}" for name in (
        "none.pt", "broken.pt", "code.pt", "junk.pt", "shapes.pt", "nano.pt --model vit_tiny", "empty")),
    "--train-per-class": f"{FINE} --train-per-class 41",
    "--holdout": f"{FINE} --train-per-class 2 --holdout 0.1 --batch-size 2",
    "--data": "finetune --data imagenet22k; finetune --root {tmp}/dl", "--probe": f"{FINE} --probe 7; {FINE} --probe 0",
    "--root": "; ".join(f"finetune --data folder --root {{tmp}}/{name} --batch-size 2" for name in (
        "nowhere", "empty")) + f"; {PRE} --source folder --root {{tmp}}/nowhere",
    "/2.png": f"finetune --data folder --root {{tmp}}/unreadable; {PRE} --source folder --root {{tmp}}/unreadable/test",
    "--image": f"{PRE} --source image --image=; {PRE} --source image --image {{tmp}}/broken.pt",
    "--fractal-seed": f"{PRE} --fractal-seed {2 ** 32}",
    "--texture": f"{PRE} --texture dots", "--source": f"{PRE} --source clouds; render --source folder",
    "--out": "render --out {tmp}/unreadable; render --out {tmp}/broken.pt; render --out",
    "broken.pt/x": f"{PRE} --out {{tmp}}/broken.pt/x",
}


@pytest.mark.parametrize("words, named", [
    (words.strip(), flag) for flag, lines in BAD.items() for words in lines.split(";")], ids=lambda text: text[:60])
def test_bad_input_gets_one_line_that_names_the_flag(words, named, image_folder, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    (tmp_path / "junk.pt").write_bytes(b"\x80\x04\x95\x20" + bytes(60))         # begins like a pickle
    torch.save({"model": print}, tmp_path / "code.pt")
    torch.save(op.ViT(32, 4, 9, 48, 2, 2).state_dict(), tmp_path / "shapes.pt")
    torch.save(op.ViT(32, 4, 9, *op.MODELS["vit_nano"]).state_dict(), tmp_path / "nano.pt")
    for part in ("train", "test"):
        (tmp_path / "empty" / part).mkdir(parents=True)
        for name in "ab":
            folder = tmp_path / "unreadable" / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(folder / "1.png")
            (folder / "2.png").write_bytes((folder / "1.png").read_bytes()[:50])

    def no_network(*_, **__):
        raise OSError("[Errno -3] Temporary failure in name resolution")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    arguments = words.format(folder=image_folder, tmp=tmp_path).split()
    if arguments[0] in ("pretrain", "finetune", "render"):
        for flag, value in (("--device", "cpu"), ("--out", str(tmp_path / "run"))):
            arguments += [] if flag in arguments else [flag, value]
    before = contents(tmp_path)
    assert named in refused(*arguments)
    assert not (tmp_path / "run").exists() and before.items() <= contents(tmp_path).items()


IDLE = {    # what makes flags idle: flags that have no effect beside it
    "--source rcdb": "--sigma 4; --num-maps 3; --points 900; --texture random; --root x; --image x; --edges canny",
    "--source va": "--texture=point; --warp affine", "--source gaussian": "--categories 3; --sigma 4; --num-maps=3",
    "--source uniform": "--edges canny", "--source image": "--fractal-seed 5; --categories 3; --points 900; --sigma 4",
    "--source folder --root {folder}": "--delta 0.2; --L 9; --noise multiplicative; --canvas 48; --fractal-seed 5",
    "--categories 2": "--delta 0.2; --L 9; --noise multiplicative; --sigma 4; --num-maps 3",
    "": "--instances 3; --image x; --edges canny; --warp elastic; --root x; --no-compile; --compile",
    "--randaug": "--jitter; --no-jitter", "--no-crop": "--min-crop 0.5; --no-aspect; --aspect"}


def test_a_flag_without_effect_is_refused_and_has_none(refused, image_folder, tmp_path):
    """With the refusal taken out, images and augmentation are the same as without the flag."""
    for beside, lines in IDLE.items():
        beside = beside.format(folder=image_folder / "train")
        for flag in map(str.strip, lines.split(";")):
            words = [*beside.split(), *flag.split()]
            error = refused("pretrain", *words, "--device", "cpu", "--steps", 1, "--out", tmp_path / "x")
            name = re.match(r"--[\w-]+", flag)[0]
            assert re.match(rf"onepfrac: {name}: has no effect (with|on a CPU).*; leave it out$", error), error
        same = images_and_network_input(beside), images_and_network_input(f"{beside} {lines.replace(';', '')}")
        assert all(map(torch.equal, *same)), beside
    for command, beside, flag in (
            ("finetune", "--probe 1", "--drop-path=0.1"), ("finetune", "--probe 1", "--optimizer=muon"),
            ("finetune", "--randaug", "--no-jitter"), ("finetune", "--no-crop", "--aspect"),
            ("render", "--source rcdb", "--sigma=3")):
        error = refused(command, *beside.split(), flag, "--device", "cpu", "--out", tmp_path / "x")
        assert error.startswith(f"onepfrac: {flag.partition('=')[0]}: has no effect")
    for words in ("pretrain --no-randaug --jitter", "pretrain --crop --min-crop 0.5 --recipe paper",
                  "finetune --probe 1 --optimizer sgd", "render --source image --warp elastic", "finetune --root x",
                  "pretrain --categories 3 --instances 2", "pretrain --source uniform --fractal-seed 3"):
        assert resolved(*words.split(), "--device", "cpu")      # these have one
    assert not (tmp_path / "x").exists()


def images_and_network_input(flags):
    """The first batch of a pre-training, as drawn and as the network sees it."""
    args, [(images, labels), _], augment = pictures(f"{SHORT} {flags}")
    torch.manual_seed(0)
    return images, labels, augment(images, labels)[0]





def test_recipes_have_their_values_and_any_flag_overrides_them(monkeypatch):
    for avx, amx, precision in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        assert all(resolved(c, "--device", "cpu").precision == precision for c in ("pretrain", "finetune"))
    general = dict(seed=0, device="cpu", rank=0, world_size=1, lead=True)
    drawn = dict(source="fractal", categories=1, instances=1, delta=0.1, sigma=3.5, L=1000, noise="additive",
                 image=None, edges="none", warp="affine", fractal_seed=32, num_maps=2, canvas=512, points=100_000,
                 texture="random")
    both = general | dict(
        root="data", save_every=1000, log_every=50, precision="fp32", compile=True, model="vit_tiny", img_size=224,
        patch_size=16, drop_path=0.1, clip_grad=0.0, smoothing=0.1, crop=True, min_crop=0.08, aspect=True, flip=True,
        randaug=True, jitter=True, erase=True, mixup=True, cutmix=True)
    paper = dict(
        pretrain=both | drawn | dict(steps=240_000, batch_size=256, optimizer="adamw", lr=5e-4, weight_decay=0.05,
                                     warmup=15 / 240_000),
        finetune=both | dict(ckpt=None, data="cifar100", train_per_class=None, holdout=0.0, epochs=1000, eval_epochs=5,
                             probe=None, batch_size=768, optimizer="sgd", lr=0.015, weight_decay=1e-4, warmup=0.01),
        render=general | drawn)
    muon = dict(optimizer="muon", lr=2e-3, weight_decay=0.05, clip_grad=1.0, img_size=32)
    plain = dict(drop_path=0.0, randaug=False, erase=False, mixup=False)
    nano, small = dict(canvas=128, points=20_000, L=64, texture="fill"), dict(canvas=128, texture="fill")
    little, middle = dict(model="vit_nano", patch_size=8), dict(batch_size=512, warmup=0.05, patch_size=4)
    changes = dict(
        paper=dict(pretrain={}, finetune={}, render={}),
        nano=dict(pretrain=nano | muon | little | plain | dict(steps=4700, batch_size=128, warmup=0.02, min_crop=0.1,
                                                               flip=False, smoothing=0.0),
                  finetune=muon | little | plain | dict(epochs=8, batch_size=64, warmup=0.05, min_crop=0.7,
                                                        jitter=False, cutmix=False, eval_epochs=2), render=nano),
        small=dict(pretrain=small | muon | middle | plain | dict(steps=3200, min_crop=0.2, flip=False, smoothing=0.0),
                   finetune=muon | middle | dict(epochs=100, min_crop=0.4), render=small))
    for recipe, commands in changes.items():
        for command, change in commands.items():
            want = paper[command] | change | dict(recipe=recipe, command=command, out=f"runs/{command}")
            assert vars(resolved(command, "--recipe", recipe, "--device", "cpu")) == want
            assert recipe != "nano" or vars(resolved(command, "--device", "cpu")) == want
            if (recipe, command) == ("paper", "pretrain"):
                words = command, "--lr", "0.5", "--no-crop", "--device=cpu", "--recipe=paper"
                assert vars(resolved(*words)) == want | dict(lr=0.5, crop=False)
    assert op.MODELS == dict(vit_pico=(64, 6, 2), vit_nano=(96, 6, 3), vit_tiny=(192, 12, 3), vit_small=(384, 12, 6), vit_base=(768, 12, 12))


@pytest.mark.parametrize("command", ["pretrain", "finetune", "render"])
def test_help_shows_every_flag_with_its_default_under_the_paper_s_tables(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(command, "--recipe", "small", "-h") == 0
    text, shown = capsys.readouterr().out, {}
    # An entry begins with two spaces and its flag, and goes on with lines that are further in.
    for entry in re.findall(r"^  --.*\n(?: {8,}.*\n)*", text, re.M):
        flag, words, default = re.fullmatch(
            r"  --(\S+?),? .*?\s{2,}(\S.*?)\s+\(default:\s+([^)]+)\)\s*", entry, re.S).groups()
        shown[flag.replace("-", "_")] = default
    args = vars(resolved(command, "--device", "cpu", "--recipe", "small"))
    assert set(shown) == set(args) - {"command", "rank", "world_size", "lead"}
    assert all(shown[k] == str(args[k]) for k in set(shown) - {"device", "out", "precision", "recipe"})
    headings = " ".join(line for line in text.splitlines() if re.match(r"\S.*:$", line))
    for tables, commands in (("Tables 2, 3, 4|Tables 5, 6, 7, 8|Tables 11, 12", "pretrain render"),
                             ("Table 9", "pretrain finetune"), ("Tables 13, 14|Fig. 3", "finetune")):
        assert all((table in headings) == (command in commands) for table in tables.split("|"))
    assert main("-h") == 0 and f"    {command} " in capsys.readouterr().out


SHORT = "--canvas 64 --points 1500 --L 16 --batch-size 16"      # settings of a small pre-training


def pictures(flags):
    """Settings, the images and labels of the first two batches of pre-training, and the augmentation."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "refuse_idle_flags", lambda *_: None)         # SHORT is for all sources
        patch.setattr(op, "train", lambda args, run, model, data, augment, steps: seen.append((data, augment)))
        args = resolved("pretrain", "--device", "cpu", "--out", "/nowhere/run", *flags.split())
        op.pretrain(args)
    [(data, augment)], batches = seen, []
    for step in (0, 1):
        torch.manual_seed(op.seed_for(args.seed, "step", step, args.rank))
        batches.append(data[op.batch_indices(len(data), args.batch_size, step, args.seed)])
    return args, batches, augment


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return *pictures(SHORT)[:2], norm_weights("", tmp_path_factory.mktemp("usual"))


def norm_weights(flags, out):
    """The weights of the last norm after a short pre-training."""
    assert main(*f"pretrain {SHORT} --device cpu --precision fp32 --steps 3 {flags} --out {out}".split()) == 0
    return saved(out)["model"]["norm.weight"]


@pytest.mark.parametrize("flags", [
    "--delta 0.3", "--sigma 4.5", "--L 9", "--noise multiplicative", "--fractal-seed 1", "--num-maps 3", "--canvas 48",
    "--points 300", "--texture random", "--texture point", "--texture fresh", "--seed 5", "--categories 3",
    "--categories 2 --instances 4", "--source rcdb", "--source va", "--source gaussian", "--source uniform",
    "--source image", "--source image --edges canny", "--source image --warp elastic", "--source image --image {photo}",
    "--source folder --root {folder}", "--batch-size 8"])
def test_flags_of_the_picture_change_it(flags, usual, image_folder, tmp_path):
    Image.effect_noise((80, 70), 90).save(tmp_path / "photo.png")
    flags = flags.format(photo=tmp_path / "photo.png", folder=image_folder / "train")
    args, batches, _ = pictures(f"{SHORT} {flags}")
    named = {word[2:].replace("-", "_") for word in flags.split() if word.startswith("--")}
    assert {k for k in vars(args) if vars(args)[k] != vars(usual[0])[k]} == named
    assert not all(a.shape == b.shape and (a == b).all() for (a, _), (b, _) in zip(batches, usual[1]))


@pytest.mark.parametrize("flags", [
    "--lr 0.1", "--weight-decay 0.3", "--warmup 0.5", "--optimizer sgd", "--optimizer adamw", "--clip-grad 0.01",
    "--randaug", "--no-crop", "--no-aspect", "--erase", "--mixup", "--no-cutmix", "--flip", "--no-jitter",
    "--smoothing 0.2", "--min-crop 0.5", "--drop-path 0.5", "--model vit_tiny", "--patch-size 4", "--img-size 24",
    "--precision bf16", "--steps 2"])
def test_flags_of_training_leave_the_picture_alone_and_change_the_training(flags, usual, tmp_path):
    args, batches, _ = pictures(f"{SHORT} {flags}")
    named = {word[2:].replace("-", "_").removeprefix("no_") for word in flags.split() if word.startswith("--")}
    assert {k for k in vars(args) if vars(args)[k] != vars(usual[0])[k]} - {"precision"} == named - {"precision"}
    assert all((a == b).all() and (i == j).all() for (a, i), (b, j) in zip(batches, usual[1]))
    found = norm_weights(flags, tmp_path)
    assert found.shape != usual[2].shape or (found != usual[2]).any()


def test_main_leaves_the_program_as_it_was(fine, trained, tmp_path, refused, signals):
    def state():
        return (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), dict(os.environ),
                PngImagePlugin.MAX_TEXT_CHUNK, list(warnings.filters), torch.get_num_threads(), os.getcwd(),
                sys.path[:], torch.is_grad_enabled(), torch.get_default_dtype(), signals(), Image.MAX_IMAGE_PIXELS)
    before, fine = state(), [*fine, "--out", tmp_path / "run"]
    render = ["render", *SMALL[:6], "--device", "cpu", "--out", tmp_path / "x"]
    with at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert main(*fine) == 143 and state() == before
    for status, words in ((0, fine), (0, fine), (0, render), (2, render), (2, [*fine, "--seed", 1]), (0, ["-h"]),
                          (0, ["pretrain", "-h"]), (2, ["finetune", "--lr"])):
        assert main(*words) == status and state() == before
    with pytest.raises(ZeroDivisionError), at_step(2, lambda: 1 / 0):   # a bug of ours, or full memory
        main(*fine, "--out", tmp_path / "new")
    assert state() == before


# ----------------------------------------------------------------------------------- the file itself

SOURCE = SCRIPT.read_text()
COPIES = {  # sections, and what is tried with them
    "1": """
maps = sample_ifs(3, 4.5, torch.Generator().manual_seed(0))
assert maps.shape == (3, 2, 3) and abs(sigma_factor(maps) - 4.5) < 1e-4
""", "2": """
maps = torch.tensor([[[0.5, 0, 0], [0, 0.5, 0]], [[0.5, 0, 1], [0, 0.5, 0]], [[0.5, 0, 0], [0, 0.5, 1]]])
images = stamp(render_ifs(torch.stack([maps, 1.2 * maps]), 64, 5000, generator=torch.Generator().manual_seed(0)))
point = render_ifs(maps[None], 64, 5000, dilated=False)
assert images.shape == (2, 64, 64) and images.unique().tolist() == [0, 127] and (point > 0).float().mean() > 0.05
""", "3": """
maps = perturb(torch.zeros(2, 2, 3), 0.1, 9, torch.Generator().manual_seed(0))
assert maps.shape == (9, 2, 2, 3) and 0.04 < maps.abs().max() <= 0.05
assert abs(lpce_loss(torch.zeros(4, 9), torch.arange(4)) - torch.tensor(9.).log()) < 1e-6
""", "4": """
model = ViT(32, 8, 10, *MODELS["vit_nano"], drop_path=0.1)
logits = model(torch.randn(4, 3, 32, 32))
logits.sum().backward()
assert logits.shape == (4, 10) and model.head.weight.grad.abs().sum() > 0
""", "5A": """
torch.manual_seed(0)
for channels in (1, 3):
    images, labels = torch.randint(256, (40, channels, 48, 48), dtype=torch.uint8), torch.arange(40) % 10
    for more in (dict(), dict(randaug=False, jitter=0.4), dict(mixup=0), dict(cutmix=0)):
        x, target = Augment(32, 10, **more)(images, labels)
        assert x.shape == (40, 3, 32, 32) and x.isfinite().all() and (target.sum(1) - 1).abs().max() < 1e-5
    assert Augment(32, 10).plain(images).shape == (40, 3, 32, 32)
"""}


def section(mark):
    """From a section's banner to the next one."""
    [start] = [m.start() for m in re.finditer(rf"^# ==== {mark} · ", SOURCE, re.M)]
    return "#" + re.split(r"^# (?:==== |####)", SOURCE[start + 1:], maxsplit=1, flags=re.M)[0]


def test_sections_can_be_copied_into_an_empty_file(tmp_path):
    """Each file runs with nothing but what its banner says; one process, since importing torch takes seconds."""
    for marks, exercise in COPIES.items():
        texts = [section(mark) for mark in marks]
        first, more = re.search(r"^# To copy [^\n]*?: (.*)\n((?:#  +\S.*\n)*)", texts[0], re.M).groups()
        imports = [first, *(line.lstrip("# ") for line in more.splitlines())]
        assert all(line.startswith(("import ", "from ")) for line in imports)
        if marks == "3":                                        # of it, two functions
            texts = [ast.get_source_segment(texts[0], node) for node in ast.parse(texts[0]).body
                     if getattr(node, "name", None) in ("perturb", "lpce_loss")]
        (tmp_path / f"copy{marks}.py").write_text("\n\n".join([*imports, *texts, exercise]))
    code = "import runpy, sys\nfor file in sys.argv[1:]: runpy.run_path(file)\nassert 'onepfrac' not in sys.modules"
    done = subprocess.run([sys.executable, "-I", "-c", code, *(f"copy{marks}.py" for marks in COPIES)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stdout, done.stderr


def test_code_of_readme_runs_as_it_says(monkeypatch, capsys, tmp_path):
    """Each block by itself, beside a fine-tuned run and a photograph. Shapes in a comment are those of the names on its
    line; so with "= ln 8", "about 80%"."""
    text = (SCRIPT.parent / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(op, "SOURCES", dict(op.SOURCES))
    monkeypatch.setattr(op, "main", lambda words, main=op.main: main([*words, "--steps", "2", "--L", "4"]))     # briefly
    Path("results").symlink_to(SCRIPT.parent / "results")
    Image.effect_noise((60, 40), 50).convert("RGB").save("photo.jpg")
    run = Path("runs/try/a/finetune")
    run.mkdir(parents=True)
    Path("runs/finetune").symlink_to(run.resolve())
    torch.save(dict(model=op.make_model(resolved("finetune"), 100).state_dict()), run / "last.pt")
    (run / "args.json").write_text(json.dumps(dict(classes=[f"class {k}" for k in range(100)])))
    (run / "log.jsonl").write_text('{"images": 5, "loss": 1}\n{"images": 5, "test_top1": 3}\n')
    blocks, checked = re.findall(r"```python\n(.*?)```", text, re.DOTALL), 0
    for block in blocks:
        names = {}
        if "timm" not in block or importlib.util.find_spec("timm"):
            exec(block, names)
        printed = re.findall(r"(\d+)%", out := capsys.readouterr().out)
        assert "photo.jpg" not in block or re.fullmatch(r"class \d+\n", out)
        for left, comment in re.findall(r"^(?:([\w, ]+) = )?\S.*? # (.*)$", block, re.M):
            found = [names[name.strip()] for name in left.split(",") if name.strip() in names]
            shapes = [tuple(map(int, shape.split(", "))) for shape in re.findall(r"\((\d+(?:, \d+)+)\)", comment)]
            if shapes and len(found) == len(shapes):
                assert [tuple(value.shape) for value in found] == shapes, comment
                checked += 1
            for logarithm in re.findall(r"= ln (\d+)", comment):
                assert found[0].item() == pytest.approx(math.log(int(logarithm)), abs=1e-5)
            for about in re.findall(r"about (\d+)%", comment):
                assert abs(int(printed.pop(0)) - int(about)) <= 5
    assert blocks and checked and Path("runs/try.png").exists() and Path("runs/try/julia/pretrain/last.pt").exists()
    commands = re.findall(r"onepfrac\.py ((?:pretrain|finetune|render)\b[^\n\\`]*)", text)
    for command in commands:                                    # each flag exists and has an effect
        assert resolved(*command.replace('"', "").replace("${@:2}", "").split("#")[0].split())
    assert len(commands) > 6
    rows = re.findall(r"`try [\w.-]+ (--[^`]+)`", text)
    assert len(rows) >= 5 and all(resolved("pretrain", *row.split()) for row in rows)


def test_lines_functions_and_docstrings_are_short():
    assert [number for number, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 100] == []
    assert [t.start for t in tokenize.generate_tokens(io.StringIO(SOURCE).readline) if t.string == ";"] == []
    tree = ast.parse(SOURCE)
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert [n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno >= 60] == []
    assert [n.name for n in nodes if len((ast.get_docstring(n) or "").splitlines()) > 10] == []
    # What others may call is said in words: all but what the next lines show, and lists of flags.
    assert [n.name for n in tree.body if n in nodes and ast.get_docstring(n) is None
            and n.end_lineno - n.lineno > 4 and not n.name.endswith("_flags")] == []


def test_import_does_nothing_and_a_run_spins_less_unless_the_user_decides():
    code = """
import os, random, runpy, signal, sys, numpy, torch, PIL.PngImagePlugin
def state():
    return (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(), dict(os.environ),
            torch.get_num_threads(), signal.getsignal(signal.SIGINT), list(sys.path), PIL.PngImagePlugin.MAX_TEXT_CHUNK)
before = state()
import onepfrac
assert state() == before
for usual, then in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
    os.environ |= usual
    sys.argv = ["onepfrac.py", "nonsense"]
    try:
        runpy.run_path(onepfrac.__file__, run_name="__main__")
    except SystemExit as stop:
        assert os.environ["GOMP_SPINCOUNT"] == then and os.environ["MPLBACKEND"] == "agg" and stop.code == 2
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "MPLBACKEND")}
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0 and not done.stdout, done.stderr
    assert done.stderr.count("onepfrac: ") == done.stderr.count("\n") == 2        # "nonsense" is no command


def test_pasted_into_a_notebook_it_defines_things_and_main_works_afterwards(tmp_path):
    environment, names = dict(os.environ), {"__name__": "__main__"}     # without __file__
    exec(compile(SOURCE, "cell", "exec"), names)
    assert dict(os.environ) == environment
    assert names["main"]([*map(str, ["pretrain", *SMALL, *QUICK, "--steps", 2, "--out", tmp_path / "run"])]) == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["commit"] is None and saved(tmp_path / "run")
    assert names["main"](["pretrain", "--nonsense"]) == 2


# ------------------------------------------------------------------------------------ shipped weights

def test_the_shipped_weights_know_the_classes_as_recorded():
    """One number holds fractal, renderer, augmentation and network together: 5,000 new crops of the 64 classes."""
    folder = SCRIPT.parent / "results"
    digest, name = (folder / "nano.sha256").read_text().split()
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    record = json.loads((folder / "nano.args.json").read_text())
    omega = json.loads((folder / "nano.omega.json").read_text())
    base, eps = torch.tensor(omega["base"]), torch.tensor(omega["eps"])
    assert base.equal(op.base_ifs(2, 3.5, record["fractal_seed"]))
    drawn = op.render_ifs(base + eps, 128, 20_000, True, op.seeded(0, "maps"), base[..., :2].det().abs())
    assert torch.equal(drawn, op.fractal_data(resolved("pretrain", "--device", "cpu")).images)      # the default's
    found = weights.pretext_accuracy(folder / name, record, 5_000, seed=2)
    assert record["pretext_top1"] > 80 and found == pytest.approx(record["pretext_top1"], abs=1)
