"""Tests of onepfrac.py against independent references: plain loops, Pillow, torchvision, nn.Module, float64.

    python -m pytest -q
    ONEPFRAC_DEVICE=cuda python -m pytest -q        # renderer, images, augmentation, network and resuming on a GPU

The sections are those of onepfrac.py; the last one is about the file itself. Tests of scripts are in results/.
"""
import argparse
import ast
import base64
import contextlib
import functools
import hashlib
import inspect
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
import tokenize
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
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

import onepfrac as op
sys.path.insert(0, str(Path(op.__file__).parent / "results"))
import weights

SCRIPT = Path(op.__file__)
DEVICE = os.environ.get("ONEPFRAC_DEVICE", "cpu")
NO_MEMORY = "memory_for_images", lambda device: 0               # so images are drawn or read at each step
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}                  # of a process that shares the machine with others
torch.backends.cudnn.allow_tf32 = False                         # convolutions in full precision
TINY = "--device cpu --img-size 16 --patch-size 4 --precision fp32".split()
QUICK = [*TINY, "--log-every", "3"]
SMALL = "--L 4 --canvas 32 --points 500 --batch-size 8".split()


def resolved(*arguments):
    """The settings of a command line."""
    return op.parse([str(a) for a in arguments])


def main(*arguments):
    """Run a command in this process -> exit status."""
    try:                        # new strings, as from a shell: argparse asks whether a value `is` the default
        return op.main([str(a).encode().decode() for a in arguments])
    except SystemExit as stop:
        return stop.code


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def saved(folder):
    return torch.load(folder / "last.pt", weights_only=True)


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
                                     device=DEVICE, rank=0, world=1) | more)


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
    A, t = systems.view(-1, 2, 3).split((2, 1), 2)
    assert -1 <= t.min() < -0.95 and 0.95 < t.max() <= 1 and 0.4 < (A.det() < 0).float().mean() < 0.6
    for x, y in (A[:, :, 0].T, A[:, 0].T):                      # a column turns with U, a row with V
        angle = torch.atan2(y, x).sort().values
        assert (angle - torch.linspace(-math.pi, math.pi, len(angle))).abs().max() < 0.4


@pytest.mark.parametrize("num_maps, sigma", [(1, 1.0), (2, 0.0), (2, -1.0), (2, 6.0)])
def test_impossible_systems_are_refused(num_maps, sigma):
    with pytest.raises(ValueError, match="sigma"):
        op.sample_ifs(num_maps, sigma)


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


def test_systems_of_all_kinds_render_together_as_alone_and_fill_their_box_or_run_away(monkeypatch):
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
    lit, calls, chaos_game = alone > 0, [], op.chaos_game
    for image in lit[:2]:                                       # the box is that of all dots
        assert all(image.any(axis).nonzero()[[0, -1]].flatten().tolist() == [1, 126] for axis in (0, 1))
    assert lit[0].float().mean() > 0.3 and lit[2].any()
    assert lit[3:6].float().mean((1, 2)).max() < 0.01 and lit[6:8].sum((1, 2)).max() <= 1
    more, p = torch.cat([maps, torch.full((11, 1, 2, 3), 9.0)], 1), F.pad(probs, (0, 1))   # a map that is never picked
    monkeypatch.setattr(op, "chaos_game", lambda *a: calls.append(len(a[0])) or chaos_game(*a))
    for size in (100, 2, 1):                                    # of groups, as if there were more points
        monkeypatch.setattr(op, "max", lambda *a: min(max(*a), size), raising=False)
        assert (render(more, 128, 20_000, False, seeded(0), p) == alone).all()
        assert (render(maps[:8], 128, 20_000, False, seeded(0), probs[0]) == alone[:8]).all()
    assert calls == [11, 8, 2, 2, 2, 2, 2, 1, 2, 2, 2, 2] + 19 * [1]


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


@pytest.mark.parametrize("seed", [32, 0, 1, 2, 3, 4, 5, 6])
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
def test_perturbation_is_uniform_in_a_cube(noise, delta, side):
    maps = op.sample_ifs(2, 3.5, seeded(0))
    drawn = op.perturb(maps, delta, 5000, seeded(1), noise)
    eps = (drawn - maps if noise == "additive" else drawn / maps - 1) / side
    assert eps.shape == (5000, 2, 2, 3) and 0.4999 < eps.abs().max() < 0.5 + 1e-5
    assert (eps.std(0) - 1 / math.sqrt(12)).abs().max() < 0.01 and eps.mean(0).abs().max() < 0.02
    assert (torch.corrcoef(eps.flatten(1).T) - torch.eye(12)).abs().max() < 0.06


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


def test_a_class_is_the_fractal_with_its_eps_added():
    data = opened("--L", 5, "--delta", 0.2)
    base, eps = data.omega["base"], data.omega["eps"]
    assert (base == fractal()).all() and eps.shape == (5, 2, 2, 3) and eps.abs().max() <= 0.1 + 1e-6
    drawn = render(base + eps, 64, 2000, True, seeded(op.seed_for(0, "maps")), base[..., :2].det().abs())
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


@pytest.mark.parametrize("every", [500, 3000])
def test_it_is_an_error_if_hardly_any_perturbation_is_kept(every):
    args, count = op.parse(["pretrain", "--device", "cpu", "--delta", "7", "--L", "4"]), itertools.count(1)

    def draw(params):
        return torch.tensor([next(count) % every == 0 for _ in params])[:, None, None]
    with pytest.raises(op.InputError, match="--delta 7") if every == 3000 else contextlib.nullcontext():
        assert len(op.liep_data(torch.zeros(2), draw, args)) == 4
    assert next(count) < 4000


def test_random_masks_stay_and_depend_on_seed_and_number_alone_and_fresh_ones_are_new_each_time():
    def still(texture, L=6, seed=0):                            # without eps all have the same shape
        return opened("--L", L, "--delta", 0, "--texture", texture, "--seed", seed)
    i, whole, kept, fresh = torch.arange(6), still("fill").images, still("random"), still("fresh")
    a, b, other = fresh[i][0], fresh[i][0], still("random", seed=1).images
    assert (kept[i][0] == kept.images).all() and (still("random", 9).images[:6] == kept.images).all()
    assert (fresh.images == whole).all() and not kept.images[whole == 0].any() and set(a.unique().tolist()) == {0, 127}
    both = (whole[0] > 0) & (still("fill", seed=1).images[0] > 0)       # its dots are new too
    assert (both != (whole[0] > 0)).any()
    masks = (torch.cat([kept.images, other, a, b]) > 0)[:, both]
    agree = (masks[:, None] == masks).float().mean(2) - 0.5 * torch.eye(24, device=DEVICE)
    assert (agree - 0.5).abs().max() < 0.15                     # any two are independent


def test_what_does_not_fit_into_memory_is_drawn_at_every_step(monkeypatch):
    for flags in ("--L 12 --texture random", "--source va --categories 3 --instances 4", "--L 12 --source rcdb",
                  "--L 12 --source uniform", "--L 12 --source image"):
        kept = opened(*flags.split())
        with monkeypatch.context() as none:
            none.setattr(op, "memory_for_images", lambda device: 0)
            drawn = opened(*flags.split())
        assert kept.images is not None and drawn.images is None
        for index in (torch.tensor([3, 0, 7]), torch.tensor([11])):
            assert all(a.shape == b.shape and (a == b).all() for a, b in zip(kept[index], drawn[index]))


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


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    block = op.Block(8, 2, 0.25).train().to(DEVICE)
    out = block.drop(torch.ones(20_000, 3, 8, device=DEVICE))
    assert sorted(out.unique().tolist()) == pytest.approx([0, 4 / 3]) and abs(out.mean() - 1) < 0.02
    assert (out.flatten(1).std(1) == 0).all() and (block.eval().drop(torch.ones(5, 3, 8)) == 1).all()
    assert [b.drop_path for b in op.ViT(32, 8, 5, 16, 5, 2, 0.2).blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_a_network_that_does_not_divide_and_images_of_another_size_are_refused():
    for img_size, patch_size, heads in ((30, 4, 3), (32, 4, 5)):
        with pytest.raises(ValueError, match="divide"):
            op.ViT(img_size, patch_size, 10, 48, 1, heads)
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
    ours = torch.cat(op.random_boxes(20_000, 64, (0.2, 1.0), (3 / 4, 4 / 3)))       # top left h w
    theirs = torch.tensor([RandomResizedCrop.get_params(torch.zeros(1, 64, 64), (0.2, 1.0), (3 / 4, 4 / 3))
                           for _ in range(20_000)]).T.float()
    assert torch.equal(ours, ours.round()) and (ours[:2] >= 0).all() and (ours[:2] + ours[2:]).max() == 64
    for values in (lambda b: b, lambda b: b[2:3] * b[3:], lambda b: b[2:3] / b[3:], lambda b: 64 - b[:2] - b[2:]):
        a, b = values(ours), values(theirs)
        assert ((a.mean(1) - b.mean(1)).abs() < 0.04 * b.std(1)).all()
        assert ((a.std(1) / b.std(1) - 1).abs() < 0.03).all()


def test_random_erasing_replaces_a_box_by_noise():
    torch.manual_seed(0)
    out = augmented(op.Augment(32, 2, **OFF | {"erase": 0.5}), torch.zeros(2000, 32, 32, dtype=torch.uint8))[0]
    changed = (out != -1).any(1)                                # black is -1 after normalisation
    noise, erased = out.permute(0, 2, 3, 1)[changed], changed[changed.any(2).any(1)]
    area, rows, columns = erased.sum((1, 2)), erased.any(2).sum(1), erased.any(1).sum(1)
    assert abs(len(erased) / 2000 - 0.5) < 0.04 and (rows * columns == area).all()          # a box
    assert 0.015 < area.min() / 1024 and area.max() / 1024 < 0.36 and abs(area.float().mean() / 1024 - 0.176) < 0.015
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("mixup, cutmix", [(0.3, 0.0), (0.0, 4.0), (0.3, 4.0)])
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


# ---------------------------------------------------------------------------------------- 6 training

def test_each_step_has_a_batch_a_rate_and_random_numbers_of_its_own_on_each_rank(tmp_path, monkeypatch):
    for method in ("save_samples", "save", "save_curve"):
        monkeypatch.setattr(op.Run, method, lambda *_: None)
    monkeypatch.setattr(op, "accelerate", lambda model, args: model)
    monkeypatch.setattr(op, "over_ranks", lambda x, args: x)
    rates = []
    monkeypatch.setattr(op, "train_step", lambda network, optimizer, x, target, rate, args: rates.append(rate) or (
        torch.tensor(1.0), target))

    def trained(rank=0, seed=0):
        """-> the images of each step, and a random number in it."""
        args, steps = resolved("pretrain", *TINY, "--out", tmp_path, "--steps", 10, "--batch-size", 6, "--warmup", 0.2,
                               "--lr", 0.5, "--seed", seed), []
        args.rank, args.world, draw = rank, 2, lambda i: i.view(-1, 1, 1).byte()
        op.train(args, nn.Linear(1, 1), op.Data(torch.arange(15), draw, args), lambda x, labels: steps.append(
            (x.flatten().tolist(), torch.rand(()).item())) or (x, torch.eye(15)[labels]), args.steps)
        return steps

    first, second, other = trained(), trained(rank=1), trained(seed=1)
    assert {len(images) for images, _ in first + second} == {3} and trained() == first
    seen = torch.tensor([a + b for (a, _), (b, _) in zip(first, second)])       # 10 steps of 6: 4 epochs
    batches = torch.stack([op.batch_indices(15, 6, step, 0) for step in range(10)])
    assert torch.equal(seen.sort(1)[0], batches.sort(1)[0]) and len(op.batch_indices(5, 32, 3, 0)) == 32
    epochs = batches.view(4, 15)
    assert (epochs.sort(1)[0] == torch.arange(15)).all() and (epochs[0] != epochs[1]).any()
    assert [images for images, _ in other] != [images for images, _ in first]
    assert len({number for _, number in first + second + other}) == 30
    assert rates[:10] == pytest.approx([0.25, 0.5, *(0.25 + 0.25 * math.cos(math.pi * k / 8) for k in range(8))])


@pytest.mark.parametrize("kind, times", [("sgd", 1.9), ("adamw", 1), ("muon", 1)])     # Nesterov: 1 + 0.9
def test_only_weight_matrices_decay(kind, times):
    model = op.ViT(16, 8, 5, 16, 1, 2).to(DEVICE)
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    op.make_optimizer(model, settings(optimizer=kind)).step()
    matrices = ["patch_embed.proj", "head", *(f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))]
    assert {n: p.unique().item() for n, p in model.named_parameters() if (p != 1).any()} == pytest.approx(
        {f"{n}.weight": 1 - 0.1 * 0.05 * times for n in matrices})


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


def test_evaluation_is_the_accuracy_on_the_plain_images_of_all_ranks(monkeypatch):
    torch.manual_seed(0)
    model, labels = op.ViT(16, 8, 10, 16, 1, 2, drop_path=0.5).to(DEVICE), torch.randint(10, (1203,))
    nn.init.normal_(model.head.weight)
    images = torch.randint(256, (1203, 3, 16, 16), dtype=torch.uint8)
    data = op.Data(labels, lambda i: images[i].to(DEVICE), argparse.Namespace(device=DEVICE, seed=0))
    right = model.eval()(((images / 255 - 0.5) / 0.5).to(DEVICE)).argmax(1).cpu() == labels
    monkeypatch.setattr(op, "over_ranks", lambda x, args: x)
    for world in (1, 2):                                        # an image may sit on the edge
        got = sum(op.evaluate(model.train(), data, op.Augment(16, 10), settings(rank=rank, world=world))
                  for rank in range(world))
        assert model.training and got == pytest.approx(100 * right.double().mean().item(), abs=0.1) and got > 2


@pytest.mark.parametrize("shape, texture, flags", [
    ((40, 40), "fresh", []), ((3, 40, 40), None, ["--no-randaug", "--no-mixup"]), ((1, 40, 40), None, ["--no-cutmix"])])
def test_a_training_step_on_kept_images_never_waits_for_the_device(shape, texture, flags, monkeypatch, tmp_path):
    """The loop on the meta device, which knows only shapes: whoever asks for a number, or mixes devices, is told so. On
    a GPU: CUDA raises an error where the CPU would wait for it. So does the log after the last step."""
    args = resolved("pretrain", "--recipe", "paper", "--device", DEVICE, "--out", tmp_path, "--img-size", 16,
                    "--patch-size", 8, "--model", "vit_nano", "--batch-size", 8, "--clip-grad", 1, "--optimizer",
                    "muon", *flags)
    samples, steps, count, make = [], [], op.Run.count, op.make_optimizer

    def make_unfused(model, args):                              # the fused AdamW has no meta
        twin = op.make_model(args, 10)
        optimizer, theirs = make(twin, args), dict(zip(twin.parameters(), model.parameters(), strict=True))
        for group in optimizer.param_groups:
            group.update(fused=False, params=[theirs[p] for p in group["params"]])
        return optimizer

    def counted(run, *numbers):
        count(run, *numbers)
        steps.append(run.step)
        if DEVICE != "cpu" and run.step == 3:                   # the first ones allocate
            torch.cuda.set_sync_debug_mode("error")
    if DEVICE == "cpu":
        args.device, args.precision = "meta", "fp32"
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())       # has no meta
        monkeypatch.setattr(op, "make_optimizer", make_unfused)
    monkeypatch.setattr(op.Run, "count", counted)
    monkeypatch.setattr(op.Run, "save_samples", lambda *_: samples.append(0))     # once, at the first step
    monkeypatch.setattr(op, "accelerate", lambda model, args: model)
    draw = lambda i: torch.zeros(len(i), *shape, dtype=torch.uint8, device=args.device)
    data = op.Data(torch.arange(64) % 10, draw, args, texture)
    try:
        with pytest.raises(RuntimeError, match="meta|CUDA"):
            op.train(args, op.make_model(args, 10).to(args.device), data, op.make_augment(args, 10, erase=0.5), 6)
    finally:
        if DEVICE != "cpu":
            torch.cuda.set_sync_debug_mode("default")
    assert samples == [0] and steps == [*range(1, 7)]


# ---------------------------------------------------------------------------------------- 7 commands

@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A short real pre-training -> its folder, and what it printed."""
    out, printed = tmp_path_factory.mktemp("runs") / "pretrain", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main("pretrain", "--delta", 0.4, "--L", 8, "--steps", 160, "--batch-size", 32, "--canvas", 32,
                    "--points", 2000, "--warmup", 0.1, "--log-every", 20, "--no-cutmix", *TINY, "--out", out) == 0
    return out, printed.getvalue()


def test_pretraining_learns_and_its_folder_explains_itself(pretrained):
    out, printed = pretrained
    assert "images/s" in printed and "left" in printed and "lr 2.00" in printed and "160 steps of 32" in printed
    log, args, omega = read_log(out), *(json.loads((out / f"{k}.json").read_text()) for k in ("args", "omega"))
    assert [r["step"] for r in log] == list(range(20, 161, 20)) and log[-1]["images"] == 160 * 32
    assert log[0]["loss"] > 0.8 * math.log(8) and log[-1]["loss"] < 0.7 * math.log(8)
    assert args["command"] == "pretrain" and args["delta"] == 0.4 and args["sigma"] == 3.5 and args["lr"] == 2e-3
    base, eps = torch.tensor(omega["base"]), torch.tensor(omega["eps"])
    assert (base == op.base_ifs(2, 3.5, args["fractal_seed"])).all()
    assert eps.shape == (8, 2, 2, 3) and 0.15 < eps.abs().max() <= 0.2 + 1e-6
    assert Image.open(out / "samples.png").size[0] > 100 and Image.open(out / "curve.png").size[0] > 100
    saved = torch.load(out / "last.pt", weights_only=True)
    assert saved["step"] == 160 and saved["model"]["head.weight"].shape[0] == 8


@pytest.fixture
def handed(monkeypatch, tmp_path):
    """A function: command line -> what it gives to `train`."""
    def handed(*arguments):
        calls = []
        monkeypatch.setattr(op, "train", lambda args, *given: calls.append(given))
        assert main(*arguments, "--device", "cpu", "--img-size", 16, "--patch-size", 4, "--out", tmp_path / "x") == 0
        return calls[0]
    monkeypatch.setattr(op, "source_data", lambda args: op.Data(
        torch.arange(2), lambda i: torch.zeros(len(i), 32, 32, dtype=torch.uint8), args))
    return handed


def test_fine_tuning_starts_from_the_weights_and_augments_photographs(handed, pretrained, image_folder):
    finetune = ["finetune", "--data", "folder", "--root", image_folder, "--model", "vit_nano", "--recipe", "paper"]
    donor = torch.load(pretrained[0] / "last.pt", weights_only=True)["model"]
    scratch, _, before, *rest = handed("pretrain", "--recipe", "paper", "--steps", 7)
    assert rest == [7] and before.num_classes == len(scratch.head.weight) == 2
    scratch = handed(*finetune, "--batch-size", 30)[0].state_dict()
    model, data, after, steps, tests = handed(*finetune, "--epochs", 1.6, "--batch-size", 30, "--ckpt",
                                              pretrained[0] / "last.pt")
    assert (len(data), len(tests), steps) == (80, 20, math.ceil(1.6 * 80 / 30)) and len(scratch["head.weight"]) == 2
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, scratch[name] if "head" in name else donor[name])
        assert "fc1.weight" not in name or not torch.equal(weight, scratch[name])
    assert {k: (v, vars(after)[k]) for k, v in vars(before).items() if v != vars(after)[k]} == {
        "flip": ((0.5, 0.5), (0.5, 0)), "erase": (0.5, 0.25), "mean": ((0.5,) * 3, (0.485, 0.456, 0.406)),
        "std": ((0.5,) * 3, (0.229, 0.224, 0.225))}


@pytest.mark.parametrize("flag, change", [
    ("--no-randaug", {"randaug": False, "jitter": 0.4}), ("--no-crop", {"crop": False}),
    ("--no-aspect", {"ratio": (1, 1)}), ("--no-erase", {"erase": 0}), ("--no-mixup", {"mixup": 0}),
    ("--no-cutmix", {"cutmix": 0}), ("--no-flip", {"flip": (0, 0)}), ("--min-crop=0.3", {"crop_scale": (0.3, 1)}),
    ("--smoothing=0", {"smoothing": 0}), ("--no-jitter", {"jitter": 0})])
def test_a_flag_of_the_augmentation_changes_one_thing(flag, change, handed):
    # With RandAugment, jitter is ignored (as in timm). Without, it is back.
    flags = ["pretrain", "--recipe", "paper", *["--no-randaug"] * ("jitter" in flag)]
    usual, other = (vars(handed(*flags, *more)[2]) for more in ((), (flag,)))
    assert {k: v for k, v in other.items() if v != usual[k]} == change


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
    cases = [*itertools.product(op.OPS, (0.9, -0.9, 0.37, -1.0, 0.0))]
    image = T.to_pil_image(photograph(64)).convert(mode)
    if dark:                                                    # leaves room to stretch
        image = image.point([40 + i // 3 for i in range(256)] * len(mode))
    assert len(op.OPS) == 15
    x = T.pil_to_tensor(image).float().to(DEVICE).expand(76, -1, -1, -1)
    which, level = torch.arange(76) // 5, torch.tensor([level for _, level in cases] + [0.9])       # the last has none
    *ours, untouched = op.apply_op(x, which, level).cpu()
    assert torch.equal(untouched, x[0].cpu())
    for mine, (name, level) in zip(ours, cases, strict=True):
        wrong = (mine - T.pil_to_tensor(pillow(name, image, level))).abs()
        if name[:5] in ("rotat", "shear", "trans"):             # at its border Pillow does not blend with the fill
            assert (wrong > 0).float().mean() < 0.05, (name, level)
        else:
            assert wrong.max() <= 1 and wrong.mean() < 0.1, (name, level)


def test_randaugment_draws_two_of_fifteen_with_probability_half(monkeypatch):
    calls = []
    monkeypatch.setattr(op, "apply_op", lambda x, which, level: calls.append((which, level)) or x)
    torch.manual_seed(0)
    augmented(op.Augment(8, 2, **OFF | {"randaug": True}), torch.zeros(30_000, 8, 8, dtype=torch.uint8))
    assert len(calls) == 2 and abs(((calls[0][0] < 15) & (calls[1][0] < 15)).float().mean() - 0.25) < 0.015
    for which, level in calls:
        share, magnitude = torch.bincount(which, minlength=16) / 30_000, 10 * level.abs()
        assert abs(share[15] - 0.5) < 0.015 and (share[:15] - 1 / 30).abs().max() < 0.006
        assert abs(magnitude.mean() - 9) < 0.03 and 0.45 < magnitude.std() < 0.5 and magnitude.max() == 10
        assert abs(level.sign().mean()) < 0.03


def test_color_jitter_draws_factors_for_each_sample_and_an_order_for_the_batch(monkeypatch):
    """Of the three functions that agree with Pillow above."""
    asked, orders, names = [], set(), ("brightness", "color", "contrast")
    for name in names:
        monkeypatch.setattr(op, name, lambda x, factor, name=name: asked.append((name, factor.flatten())) or x)
    torch.manual_seed(0)
    for _ in range(100):
        augmented(op.Augment(8, 2, **OFF | {"jitter": 0.4}), torch.zeros(40, 8, 8, dtype=torch.uint8))
        orders.add(tuple(name for name, _ in asked[-3:]))
    assert len(asked) == 300 and orders == set(itertools.permutations(names))
    for name in names:
        factor = torch.cat([f for n, f in asked if n == name])
        assert 0.6 <= factor.min() < 0.602 and 1.398 < factor.max() <= 1.4 and abs(factor.mean() - 1) < 0.012
        assert len(factor) == 4000 and len(factor.unique()) > 3900


# ------------------------------------------------------------------------------------ B other images

def test_a_category_is_a_base_system_and_an_instance_one_of_its_variations():
    few, many = opened("--categories", 2, "--instances", 101), opened("--categories", 3)
    assert few.labels.tolist() == [0] * 101 + [1] * 101 and many.labels.tolist() == [0, 1, 2]
    maps, images = many.omega["systems"], few.images[:101]
    probs = maps[..., :2].det().abs()
    assert (few.omega["systems"] == maps[:2]).all() and maps.abs().max() <= 1 and ((probs > 0).sum(1) >= 2).all()
    assert (few.images[[0, 101]] == many.images[:2]).all()      # OFDB: the first instance
    assert (few.draw(torch.tensor([150, 20])) == few.images[[150, 20]]).all()
    for instance, axes in ((25, [0]), (50, [1]), (75, [0, 1]), (100, [])):
        assert (images[instance] == images[0].flip(axes)).all()
    for instance, parameter, factor in ((1, 0, 0.2), (20, 4, 1.8), (22, 5, 0.6)):       # of a b e c d f
        varied = maps[:1].clone().flatten(2)
        varied[..., parameter] *= factor
        drawn = render(varied.view(1, 7, 2, 3), 64, 2000, True, seeded(op.seed_for(0, "maps")), probs[0])
        assert (images[instance].cpu() == drawn[0]).all()
    for system, p in zip(maps, probs):                          # they fill a fifth of 512 pixels a side
        points = plain_orbits(system[None], p, 1000, 30, 100, np.random.default_rng(0))[0].T
        cell = ((points - points.min(0)) / np.ptp(points, 0) * 499).astype(int)
        assert len(np.unique(cell @ [1000, 1])) > 0.19 * 512 ** 2


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


@pytest.mark.parametrize("numbers", [op.rcdb, op.visual_atom])
def test_contours_have_the_numbers_of_the_authors(numbers):
    counts, radii, growth, noise, rcdb = [], [], [], [], numbers is op.rcdb
    for category in range(300):
        offsets, centre, greys = numbers(0, category, 0)
        P, V, _ = offsets.shape
        assert 1 <= P <= 200 and (3 <= V <= 200 if rcdb else 200 <= V <= 1000)
        assert greys.shape == (P,) and -0.1 <= centre.min() and centre.max() <= 512.1
        counts.append(V)
        radii.append(offsets[0, 0, 0])                          # the vertex at angle 0 moves along x
        if P < 100:
            continue
        moves = np.diff(offsets[:, 0, 0])                       # by c + w - c n, or c + w - 2 c n
        growth.append(moves.mean())
        noise.append(moves.std() / moves.mean())
        if not rcdb:                # two equal waves would make one of twice the height: the spectrum's peak
            angle = np.arange(V) * 2 * math.pi / V
            rings = ((offsets[-1] - offsets[0]) * np.stack([np.cos(angle), np.sin(angle)], 1)).sum(1) / (P - 1)
            assert (2 * np.abs(np.fft.rfft(rings)[1:21].imag) / V).max() < 0.75     # 0.5 each, 1 if equal
    assert len(set(counts)) > 100 and min(growth) < 0.2 and 1.8 < np.mean(growth) < 2.3     # c U(0, 4), w U(0, 0.1)
    assert abs(np.median(noise) / (1 + rcdb) - 0.32) < 0.03
    assert (min(radii) < 5 and 140 < max(radii) < 207) if rcdb else (8 < min(radii) and max(radii) < 130)
    a, b = numbers(0, 5, 0), numbers(0, 5, 1)
    assert a[0].shape == b[0].shape and all((x != y).any() for x, y in zip(a, b))


def test_perlin_noise_has_the_moments_of_the_authors_package():
    """A plain loop over the package's formula: the slope is (hash & 7) + 1, or -1 where hash & 8."""
    rng, levels = np.random.default_rng(0), np.linspace(0.01, 0.99, 50)
    hashes, f = rng.integers(256, size=(2, 200_000)), rng.random(200_000)
    left, right = (np.where(h & 8, -1, (h & 7) + 1) for h in hashes)
    fade = 6 * f ** 5 - 15 * f ** 4 + 10 * f ** 3
    theirs = 0.4 * ((1 - fade) * left * f + fade * right * (f - 1))
    ours = op.perlin_noise((200_000,), np.random.RandomState(0))
    # pnoise1 of the package at 200,000 random places: 0.3285; its 256 hashes are not quite random
    assert 0.317 < theirs.std() < 0.33 and 0.317 < ours.std() < 0.33 and abs(ours.mean()) < 0.005
    assert np.abs(np.quantile(ours, levels) - np.quantile(theirs, levels)).max() < 0.02


@pytest.mark.parametrize("kind, numbers, background", [("va", op.visual_atom, 0), ("rcdb", op.rcdb, 255)])
def test_a_perturbed_contour_fills_a_fifth_and_eps_scales_its_radii(kind, numbers, background):
    source = opened("--source", kind, "--L", 3, "--canvas", 128)
    for category in range(source.omega["category"] + 1):        # the first one that does
        offsets, *rest = *numbers(32, category, 0), 128, background
        filled = (op.draw_contour(offsets, *rest) != background).float().mean() >= 0.2
        assert filled == (category == source.omega["category"])
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

def test_a_subset_is_the_first_of_each_class_and_training_images_are_held_out():
    labels, order = torch.arange(1000) % 7, torch.randperm(1000)
    train, held = op.balanced_subset(labels, order, 40, 0.25)
    for label in range(7):
        first = [k for k in order.tolist() if k % 7 == label][:40]
        assert sorted(k for k in held.tolist() if k % 7 == label) == sorted(first[:10])
        assert sorted(k for k in train.tolist() if k % 7 == label) == sorted(first[10:])
    everything, none = op.balanced_subset(labels, order)
    assert sorted(everything.tolist()) == list(range(1000)) and len(none) == 0
    with pytest.raises(op.InputError, match="--train-per-class 200"):
        op.balanced_subset(labels, order, 200)


def test_a_subset_depends_on_pixels_alone(tmp_path, image_folder):
    """The same pictures under other names, in another order, as lossless WebP in RGB: the same are chosen."""
    rng = np.random.default_rng(1)
    for file in image_folder.rglob("*.png"):
        folder = tmp_path / "copy" / file.relative_to(image_folder).parent
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(file).convert("RGB").save(folder / f"{rng.integers(10 ** 12)}.webp", lossless=True)

    def chosen(root):
        args = resolved("finetune", *QUICK, "--data", "folder", "--root", root, "--train-per-class", 20, "--holdout",
                        0.3, "--batch-size", 8, "--out", tmp_path / f"run-{root.name}")
        with op.open_run(args):
            *parts, classes = op.downstream_data(args)
        assert classes == 2 and [part.labels.bincount().tolist() for part in parts] == [[14, 14], [6, 6]]
        return [{(int(label), image.numpy().tobytes()) for image, label in zip(part.images, part.labels)}
                for part in parts]
    train, held = chosen(image_folder)
    assert chosen(tmp_path / "copy") == [train, held] and len(train) == 28 and not train & held


def test_named_datasets_are_opened_by_arguments_that_torchvision_knows(tmp_path, monkeypatch):
    """Found, or else downloaded; to train on by torchvision's defaults, to test on by a split that it has."""
    for name, (class_name, _) in op.DATASETS.items():
        kind, calls = getattr(datasets, class_name), []

        def fake(*arguments, **named):
            call = inspect.signature(kind).bind(*arguments, **named)
            call.apply_defaults()
            calls.append(call.arguments)
            if not there and not call.arguments["download"]:
                raise RuntimeError("Dataset not found")
            return len(calls)
        monkeypatch.setattr(datasets, class_name, fake)
        for there, found in ((True, (1, 2)), (False, (2, 3))):
            calls.clear()
            assert op.open_datasets(argparse.Namespace(data=name, root=tmp_path)) == found
            train, test = calls[-2:]
            assert train["root"] == test["root"] == tmp_path and train["download"] == test["download"] != there
            splits = [call.get("split", call.get("train")) for call in (train, test)]
            assert splits[0] in (True, "train", "trainval") and splits[1] in (False, "test")
            assert splits[1] is False or '"test"' in inspect.getsource(kind)
    assert len(op.DATASETS) == 7


def test_kept_and_streamed_folders_give_the_pixels_of_the_files(image_folder, monkeypatch):
    dataset, _ = op.open_datasets(argparse.Namespace(data="folder", root=image_folder))
    args = resolved("finetune", *QUICK, "--device", DEVICE)
    kept = op.folder_data(dataset, None, args)
    monkeypatch.setattr(op, *NO_MEMORY)
    streamed = op.folder_data(dataset, None, args)
    assert kept.images is not None and streamed.images is None
    for i in torch.tensor([[3, 1, 2], [0, 79, 5]]):
        want = torch.stack([T.pil_to_tensor(dataset[k][0]) for k in i])
        for images, labels in (kept[i], streamed[i]):
            assert images.dtype == torch.uint8 and torch.equal(images.cpu(), want)
            assert labels.tolist() == [dataset[k][1] for k in i]


def test_small_squares_stay_and_other_shapes_are_cropped_to_the_middle(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        picture.resize((60, 60)).save(tmp_path / folder / "1.png")

    def images(img_size):
        return op.folder_data(op.open_folder(tmp_path), None, resolved("finetune", "--device", "cpu", "--img-size",
                                                                       img_size)).images
    assert images(64).shape == (2, 3, 60, 60) and images(28).shape == (2, 3, 32, 32)
    picture.resize((8, 8)).save(tmp_path / "a" / "2.png")       # not all of one size
    assert images(64).shape == (3, 3, 73, 73)
    for folder in ("a", "b"):
        picture.save(tmp_path / folder / "1.png")
    (tmp_path / "a" / "2.png").unlink()
    want = T.pil_to_tensor(T.resize(picture.crop((16, 0, 64, 48)), 32))         # at the border Pillow sees beyond
    assert (images(28)[..., 2:-2] == want[..., 2:-2]).all()


def test_sixteen_bits_and_other_modes_are_read_as_they_look(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    eight = Image.fromarray((ramp / 257 + 0.5).astype(np.uint8))
    for name, image in (("L", eight), ("P", eight.convert("P")), ("RGBA", eight.convert("RGBA")),
                        ("LA", eight.convert("LA")), ("16", Image.fromarray(ramp))):
        image.save(tmp_path / f"{name}.png")
        assert (np.asarray(op.read_image(tmp_path / f"{name}.png")) == np.asarray(eight.convert("RGB"))).all(), name


def test_deep_greys_transparency_and_turned_cameras_are_read_as_a_viewer_shows_them(tmp_path):
    eight = np.linspace(0, 255, 64).reshape(8, 8)
    for name, greys in (("12 bits.png", (eight / 255 * 4095).astype(np.uint16)), ("int.tif", eight.astype(np.int32)),
                        ("float.tif", (eight / 255).astype(np.float32)), ("mask.tif", (eight > 99).astype(np.int32))):
        Image.fromarray(greys).save(tmp_path / name)
        want = eight if name != "mask.tif" else 255 * (eight > 99)
        assert np.abs(np.asarray(op.read_image(tmp_path / name))[..., 1] - want).max() < 1.1, name
    drawing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (2, 2, 5, 5))                 # black on nothing
    drawing.save(tmp_path / "drawing.png")
    read = np.asarray(op.read_image(tmp_path / "drawing.png"))[..., 0]
    assert (read == 255 * (np.asarray(drawing)[..., 3] == 0)).all()
    tags = Image.Exif()
    tags[274] = 6                                               # the camera was turned: show it turned to the right
    Image.fromarray(eight.astype(np.uint8)).save(tmp_path / "turned.png", exif=tags)
    assert (np.asarray(op.read_image(tmp_path / "turned.png"))[..., 0] == np.rot90(eight.astype(np.uint8), -1)).all()
    for greys in (eight - 9, eight * 999, np.full((8, 8), np.nan)):
        Image.fromarray(greys.astype(np.float32)).save(tmp_path / "wild.tif")
        with pytest.raises(ValueError, match="greys from"):
            op.read_image(tmp_path / "wild.tif")


def test_a_folder_is_what_it_says_or_is_refused(image_folder, tmp_path, refused, capsys):
    for root in (image_folder, image_folder / "train" / "down"):    # train/ and test/ are no classes; none at all
        assert "--root" in refused("pretrain", "--source", "folder", "--root", root, *TINY, "--out", tmp_path / "run")
    root = stripes(tmp_path / "stripes")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "down" / "notes.txt").write_text("x")
    Image.new("RGB", (16, 16)).save(root / "train" / "down" / "x.gif")          # an ending that is not read
    assert main("finetune", "--data", "folder", "--root", root, "--epochs", 0.1, "--batch-size", 8, *QUICK, "--out",
                tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^2 classes, 80 \+ 20 images, fingerprint [0-9a-f]{8} \(2 files left out", printed)


def test_small_images_odd_names_and_ranks_alone_are_handled(tmp_path, refused, image_folder, monkeypatch):
    x = torch.rand(15, 3, 2, 2) * 255                           # smaller than the window of "sharpness"
    assert op.apply_op(x, torch.arange(15), torch.full((15,), 0.5)).isfinite().all()
    fine = ["finetune", "--data", "folder", "--root", image_folder, *TINY, "--out", tmp_path / "run"]
    assert "--batch-size" in refused(*fine, "--probe", 1, "--batch-size", 1)
    assert "--holdout" in refused(*fine, "--holdout", 0.9, "--train-per-class", 1, "--batch-size", 1)
    latin = io.TextIOWrapper(io.BytesIO(), "ascii")
    op.say("\u56fe", file=latin)                                # a terminal that cannot show it
    assert latin.buffer.getvalue() == b"'\\u56fe'\n"
    with op.claimed(tmp_path / "busy"):                         # another render is at work there
        assert "another process" in refused("render", *SMALL[:6], "--device", "cpu", "--out", tmp_path / "busy")
    monkeypatch.setenv("RANK", "1")
    assert "torchrun" in refused("pretrain", *SMALL, *TINY, "--out", tmp_path / "run")


def test_a_run_names_its_images_and_goes_on_only_with_them(tmp_path, refused, capsys, monkeypatch):
    root = stripes(tmp_path / "stripes")

    def line(root, out):
        assert main("finetune", "--data", "folder", "--root", root, "--epochs", 0.3, "--save-every", 1,
                    "--batch-size", 8, *QUICK, "--out", tmp_path / out) == 0
        return re.search("fingerprint .{8}", capsys.readouterr().out)[0]
    first = line(root, "first")
    assert json.loads((tmp_path / "first" / "args.json").read_text())["classes"] == ["across", "down"]
    for path in sorted(root.rglob("*.png")):                    # other names, another order, another format
        other = tmp_path / "copy" / path.relative_to(root).with_name(f"{zlib.crc32(str(path.name).encode())}.webp")
        other.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").save(other, lossless=True)
    assert line(tmp_path / "copy", "second") == first
    (root / "train" / ".DS_Store").touch()                      # of no consequence
    assert main("resume", tmp_path / "first") == 0 and first in capsys.readouterr().out
    with monkeypatch.context() as patch:                        # less memory is free than at the first start
        patch.setattr(op, *NO_MEMORY)
        assert main("resume", tmp_path / "first") == 0 and first in capsys.readouterr().out
    Image.open(root / "train" / "down" / "3.png").point(lambda v: v // 2).save(root / "train" / "down" / "3.png")
    assert line(root, "third") != first                         # a JPEG copy, say
    assert "other images" in refused("resume", tmp_path / "first")
    (root / "train" / "down").rename(root / "train" / "x")
    (root / "train" / "across").rename(root / "train" / "down")
    (root / "train" / "x").rename(root / "train" / "across")
    assert "other images" in refused("resume", tmp_path / "third")
    monkeypatch.setattr(op, "MOST_MEMORY", 100)                 # too large to read only for that: sixteen tell
    large, path = line(root, "large"), sorted((root / "train" / "across").iterdir())[5]        # each fifth of 80
    Image.open(path).point(lambda v: v // 2).save(path)
    assert line(root, "halved") != large != first and "other images" in refused("resume", tmp_path / "large")


def test_parts_hidden_files_pipes_and_links_of_a_folder(tmp_path, refused, capsys):
    root = stripes(tmp_path / "stripes")
    fine = ["finetune", "--data", "folder", "--epochs", 0.1, "--batch-size", 8, *QUICK]
    (root / "train" / "down" / "._0.png").write_bytes(b"of macOS")              # counted, not read
    assert main(*fine, "--root", root, "--out", tmp_path / "run") == 0
    assert "(1 files left out" in capsys.readouterr().out
    (tmp_path / "parts" / "docs").mkdir(parents=True)
    for part, name in (("train", "Train"), ("test", "valid")):
        (root / part).rename(tmp_path / "parts" / name)
    error = refused("pretrain", "--source", "folder", "--root", tmp_path / "parts", *TINY, "--out", tmp_path / "p")
    assert "Train" in error and "valid" in error
    assert "test/ (or val/)" in refused(*fine, "--root", tmp_path / "parts", "--out", tmp_path / "p")
    os.mkfifo(tmp_path / "x.png")                                               # nobody writes into it
    with pytest.raises(ValueError, match="no file"):
        op.read_image(tmp_path / "x.png")
    for top in (1.004, 4.0, 1000.0, 9999.0):                    # resampled above 1; cameras of 10 and 14 bits
        ramp = np.linspace(0, top, 64, dtype=np.float32).reshape(8, 8)
        Image.fromarray(ramp).save(tmp_path / "ramp.tif")
        read = np.asarray(op.read_image(tmp_path / "ramp.tif"))[..., 0].astype(int)
        assert (np.diff(read.flatten()) >= 0).all()
        assert read.max() == {1.004: 255, 4.0: 4, 1000.0: 249, 9999.0: 156}[top]
    few, held = op.balanced_subset(torch.tensor([0, 1, 1, 1]), torch.arange(4), holdout=0.9)
    assert few.tolist() == [0, 3] and held.tolist() == [1, 2]   # each class keeps one to train on


def test_no_run_is_lost_to_a_moved_checkpoint_or_to_edited_settings(trained, tmp_path, refused, monkeypatch):
    def copy():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return shutil.copytree(trained, tmp_path / "run")
    run = copy()
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    (run / "last.pt").rename(tmp_path / "kept.pt")
    assert "holds a run" in refused("pretrain", *SMALL, *QUICK, "--steps", 6, "--seed", 9, "--out", run)
    (run / "last.pt").symlink_to(tmp_path / "unmounted" / "last.pt")
    assert "no such file" in refused("resume", run)
    for name, value in dict(delta=0.3, lr=0.5, batch_size=4, source="gaussian", seed=5, steps=5).items():
        run = copy()
        saved = json.loads((run / "args.json").read_text())
        (run / "args.json").write_text(json.dumps(saved | {name: value}))
        assert name in refused("resume", run)
        assert (run / "omega.json").read_bytes() == before["omega.json"]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main("render", *SMALL[:6], "--device", "cpu", "--out=~/pictures") == 0
    assert (tmp_path / "home" / "pictures").is_dir()


def test_an_image_that_cannot_be_read_in_the_middle_of_a_run_loses_no_step(tmp_path, refused, monkeypatch):
    root = stripes(tmp_path / "stripes")
    monkeypatch.setattr(op, *NO_MEMORY)
    monkeypatch.setattr(op, "MOST_MEMORY", 100)
    command = ["finetune", "--data", "folder", "--root", root, "--epochs", 1, "--batch-size", 8, "--save-every", 100,
               *QUICK, "--out", tmp_path / "run"]
    moved = tmp_path / "moved.png"

    def lose(part):
        (root / part / "down" / "7.png").rename(moved)
        (root / part / "down" / "7.png").write_bytes(b"")
    with at_step(2, lambda: lose("train")):
        assert "7.png" in refused(*command)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"]
    moved.rename(root / "train" / "down" / "7.png")             # mended
    assert saved >= 1
    with at_step(10 - saved, lambda: lose("test")):             # the test at the end is made up for, and no step again
        assert "7.png" in refused("resume", tmp_path / "run")
    moved.rename(root / "test" / "down" / "7.png")
    for _ in range(2):
        with at_step(0, None) as steps:
            assert main("resume", tmp_path / "run") == 0 and not steps
        assert [line["step"] for line in read_log(tmp_path / "run") if "test_top1" in line] == [10]


@pytest.mark.parametrize("spoil", [lambda t: t.to(torch.int8), lambda t: t > 0, lambda t: t.to(torch.complex64),
                                   lambda t: t.tolist(), lambda t: None, lambda t: "1.0"])
def test_weights_that_are_no_real_numbers_are_refused(spoil, tmp_path, refused, image_folder):
    state = op.ViT(16, 4, 2, *op.MODELS["vit_nano"]).state_dict()
    torch.save(state | {"norm.weight": spoil(state["norm.weight"])}, tmp_path / "x.pt")
    assert "norm.weight" in refused("finetune", "--data", "folder", "--root", image_folder, "--ckpt", tmp_path / "x.pt",
                                    "--batch-size", 8, *TINY, "--out", tmp_path / "run")


def test_full_memory_gets_one_line_that_names_what_can_be_lowered(refused, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried "
                           "to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)")
    monkeypatch.setattr(op, "liep_data", full)
    error = refused("pretrain", *SMALL, *TINY, "--out", tmp_path / "run")
    assert "--canvas" in error and "--batch-size" in error
    with monkeypatch.context() as patch:
        patch.setattr(op, "downstream_data", full)
        error = refused("finetune", *TINY, "--out", tmp_path / "run")
    assert "--canvas" not in error and "--batch-size" in error
    monkeypatch.setattr(Path, "read_text", lambda path: "MemAvailable:    2048 kB\n")
    assert op.memory_for_images("cpu") == 2 ** 20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert op.memory_for_images("cpu") == 2 ** 18


def test_linked_folders_are_followed_but_not_in_circles(image_folder, tmp_path):
    for name, other in (("a", "across"), ("b", "down")):
        (tmp_path / "linked").mkdir(exist_ok=True)
        (tmp_path / "linked" / name).symlink_to(image_folder / "train" / other)
    assert len(op.open_folder(tmp_path / "linked")) == 80
    for name, other in (("a", "b"), ("b", "a")):                # each in the other
        (tmp_path / "round" / name / "x").mkdir(parents=True)
        (tmp_path / "round" / name / "x" / "link").symlink_to(tmp_path / "round" / other)
    with pytest.raises(op.InputError, match="--root.*links to a folder"):
        op.open_folder(tmp_path / "round")


# -------------------------------------------------------------------------------------------- D runs

def assert_same(a, b):
    """Two run folders agree in what must be the same: the log, in both its places, but for its times; weights, moments
    and running sums. The same bits; on a GPU, where sums have no order, the same losses but for rounding."""
    one, two = saved(a), saved(b)
    logs = [[{k: v for k, v in record.items() if k not in ("seconds", "images_per_s")} for record in log]
            for log in (one["log"], read_log(a), two["log"], read_log(b))]
    assert one["step"] == two["step"] and logs[0] == logs[1] and logs[2] == logs[3] and logs[0]
    if DEVICE == "cpu":
        assert logs[0] == logs[2] and torch.equal(one["sums"], two["sums"])
        assert one["model"].keys() == two["model"].keys()
        assert all(torch.equal(t, two["model"][k]) for k, t in one["model"].items())
        for p, state in one["optimizer"]["state"].items():
            other = two["optimizer"]["state"][p]
            assert state.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in state.items())
    else:
        assert [r.keys() for r in logs[0]] == [r.keys() for r in logs[2]]
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


@pytest.mark.parametrize("number, step, more", [
    (signal.SIGINT, 1, "--optimizer muon"), (signal.SIGHUP, 5, "--save-every 2"), (signal.SIGTERM, 4, "streamed")])
def test_a_signal_saves_and_a_moved_run_goes_on_with_the_same_bits(
        number, step, more, trained, image_folder, tmp_path, monkeypatch, capsys, signals, refused):
    """Also between two lines of the log, without the checkpoint that it began from, and with images elsewhere."""
    words = ["--batch-size", 16, "--randaug", "--mixup", "--erase", "--drop-path", 0.1, *QUICK, "--device", DEVICE]
    if more == "streamed":
        monkeypatch.setattr(op, *NO_MEMORY)
        stripes(tmp_path / "then")
        (tmp_path / "then.pt").write_bytes((trained / "last.pt").read_bytes())
        words = ["finetune", "--data", "folder", "--root", tmp_path / "then", "--ckpt", tmp_path / "then.pt",
                 "--epochs", 1.6, "--eval-epochs", 0.6, *words]
    else:
        words = ["pretrain", "--L", 8, "--steps", 8, "--canvas", 32, "--points", 1000, "--texture", "fresh", *words,
                 *more.split()]
    assert main(*words, "--out", tmp_path / "a") == 0
    with at_step(step, lambda: os.kill(os.getpid(), number)):
        assert main(*words, "--out", tmp_path / "b") == 128 + number
    assert signals() and saved(tmp_path / "b")["step"] == step
    assert f"stopped after step {step} of 8; `python onepfrac.py resume {tmp_path / 'b'}`" in capsys.readouterr().err
    signal.signal(number, signal.SIG_IGN)                       # as under nohup: the run goes on
    with at_step(step, lambda: os.kill(os.getpid(), number)):
        assert main(*words, "--out", tmp_path / "c") == 0
    with open(tmp_path / "b" / "log.jsonl", "a") as log:        # as if killed later, between a line and a checkpoint
        log.write('{"step": 6, "loss": 0.1}\n{"ste')
    (tmp_path / "b").rename(tmp_path / "moved")
    there = []
    if more == "streamed":
        (tmp_path / "then").rename(tmp_path / "now")
        (tmp_path / "then.pt").unlink()
        there = ["--root", tmp_path / "now"]
        picture = tmp_path / "now" / "train" / "down" / "7.png"
        usual = picture.read_bytes()
        picture.write_bytes((image_folder / "train" / "down" / "8.png").read_bytes())
        assert "other images" in refused("resume", tmp_path / "moved", *there)
        picture.write_bytes(usual)
    assert main("resume", tmp_path / "moved", *there) == 0 and not (tmp_path / "b").exists()
    for other in ("moved", "c"):
        assert_same(tmp_path / "a", tmp_path / other)
    assert len(read_log(tmp_path / "a")) > 2
    assert main("resume", tmp_path / "moved", *there) == 0      # of a finished run changes nothing
    assert_same(tmp_path / "a", tmp_path / "moved")


def test_a_second_signal_acts_at_once_and_a_run_without_a_checkpoint_begins_again(trained, tmp_path, signals):
    with at_step(3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]) as calls:
        assert main("pretrain", *SMALL, *QUICK, "--steps", 6, "--out", tmp_path / "run") == 130
        assert len(calls) == 3 and signals() and not (tmp_path / "run" / "last.pt").exists()
    assert main("resume", tmp_path / "run") == 0
    assert_same(trained, tmp_path / "run")


def test_a_folder_belongs_to_one_living_process(trained, tmp_path, refused):
    words = ["pretrain", *SMALL, *QUICK, "--steps", 6, "--out", tmp_path]
    code = ("import sys, time, onepfrac as op\n"
            "op.train_step = lambda *_: [print('at work', flush=True), time.sleep(100)]\nop.main(sys.argv[1:])")
    other = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], cwd=SCRIPT.parent, env=ALONE, text=True,
                             stdout=subprocess.PIPE)
    assert any("at work" in line for line in iter(other.stdout.readline, ""))
    before = (tmp_path / "args.json").read_bytes()
    for again in (words, [*words, "--seed", 1], ["resume", tmp_path]):
        assert "another process" in refused(*again) and (tmp_path / "args.json").read_bytes() == before
    other.kill()
    other.wait()
    other.stdout.close()
    assert main("resume", tmp_path) == 0
    assert_same(trained, tmp_path)


def test_a_run_outlives_its_readers(tmp_path, monkeypatch, signals):
    """Output that goes into a pipe that nobody reads, onto a full disk, or nowhere; also when the run is stopped."""
    words = ["pretrain", *SMALL, *QUICK, "--steps", 6, "--log-every", 1]
    command = " ".join(map(str, [sys.executable, SCRIPT, *words, "--out", tmp_path / "head", "| head -n 1"]))
    head = subprocess.run(["bash", "-o", "pipefail", "-c", command], env=ALONE, capture_output=True, text=True)
    assert (head.returncode, head.stderr) == (0, "") and head.stdout.count("\n") == 1
    reader, writer = os.pipe()
    os.close(reader)
    outputs = dict(gone=open(writer, "w"), full=open("/dev/full", "w"), none=None)
    for name, output in outputs.items():
        with monkeypatch.context() as patch, at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            patch.setattr(sys, "stdout", output)
            patch.setattr(sys, "stderr", output)
            assert main(*words, "--out", tmp_path / name) == 128 + signal.SIGTERM
            assert main("resume", tmp_path / name) == 0
    for name in ("head", *outputs):
        assert saved(tmp_path / name)["step"] == 6 == len(read_log(tmp_path / name))


def test_progress_in_a_pipe_is_plain_lines(tmp_path, capsys):
    assert main("pretrain", *SMALL, *QUICK, "--steps", 7, "--out", tmp_path) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert re.match(r"recipe nano: vit_nano \(0\.\dM parameters\), cpu x1, fp32, 7 steps of 8$", first)
    assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]
    assert all(re.fullmatch(r"step \d/7  loss \d\.\d{3}  top-1 [\d.]+%  lr \d\.\d\de-\d\d  \d+ images/s  \d+:\d\d left",
                            line) for line in lines)


def test_progress_on_a_terminal_is_one_line_that_changes(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main("finetune", "--data", "folder", "--root", image_folder, "--epochs", 2, "--eval-epochs", 1,
                "--batch-size", 16, *QUICK, "--log-every", 2, "--out", tmp_path / "a") == 0
    before, *updates = capsys.readouterr().out.split("\r")
    training, tests = ([u for u in updates if word in u] for word in ("  loss ", "  test top-1 "))
    assert "step " not in before and before.endswith("\n") and (len(training), len(tests), len(updates)) == (5, 2, 7)
    assert all(u.startswith("step ") and len(u.rstrip("\n")) >= 79 for u in updates)    # covers what was there
    assert not any("\n" in u for u in training)                 # each is overwritten by what follows
    assert all(u.endswith("\n") and u.rstrip("\n").count("\n") == 0 for u in tests)     # these stay
    assert main("pretrain", *SMALL, *QUICK, "--steps", 6, "--out", tmp_path / "b") == 0
    _, first, last = capsys.readouterr().out.split("\r")
    assert "\n" not in first and last.count("\n") == 1 and last.endswith("\n") and last.startswith("step 6/6")


def test_what_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, monkeypatch, refused):
    train_step, calls = op.train_step, []

    def spoil(network, *rest):
        result = train_step(network, *rest)
        calls.append(0)
        if len(calls) == 4:                                     # the loss is still finite
            network.blocks[2].mlp.fc1.weight.data[0, 0] = math.inf
        return result
    monkeypatch.setattr(op, "train_step", spoil)
    error = refused("pretrain", *SMALL, *QUICK, "--steps", 6, "--save-every", 2, "--log-every", 100, "--out", tmp_path)
    assert "step 4" in error and "--lr 0.002" in error and "nothing is saved" in error
    content = saved(tmp_path)
    assert content["step"] == 2 and all(t.isfinite().all() for t in content["model"].values())
    monkeypatch.undo()
    torch.save(content | {"seconds": 1000.0}, tmp_path / "last.pt")
    assert main("resume", tmp_path) == 0
    assert 1000 <= read_log(tmp_path)[-1]["seconds"] < 1100     # the clock goes on as well


def copied(run, to, checkpoint=None, settings=None):
    """A copy of a run folder with other contents of last.pt, or changed settings (text: as it is)."""
    to.mkdir(parents=True)
    torch.save(checkpoint or saved(run), to / "last.pt")
    args = json.loads((run / "args.json").read_text())
    (to / "args.json").write_text(settings if isinstance(settings, str) else json.dumps(args | (settings or {})))
    return to


def test_a_checkpoint_that_is_no_run_of_this_version_is_named_and_its_weights_can_be_used(trained, tmp_path, refused):
    content = saved(trained)
    old = {k: v for k, v in content.items() if k != "sums"} | {"total": torch.zeros(2)}
    moments = content["optimizer"]["state"]
    for k, bad in enumerate((old, content | {"step": "x"}, content | {"log": [{}]}, {"model": content["model"]},
                             content | {"optimizer": {"state": {}}} | {"sums": torch.zeros(2)},
                             content | {"optimizer": {"state": moments | {0: moments[1]}}})):
        error = refused("resume", copied(trained, tmp_path / str(k), bad))
        assert "no run of this version; --ckpt starts from its weights" in error
    model = op.ViT(16, 4, 9, *op.MODELS["vit_nano"])
    op.load_weights(model, tmp_path / "0" / "last.pt")
    assert torch.equal(model.blocks[5].attn.qkv.weight, content["model"]["blocks.5.attn.qkv.weight"])


@pytest.mark.parametrize("settings", [
    "", "{", "[" * 100_000, "[]", "7", "{}", '{"command": "pretrain"}', "\0",
    *[dict(command=word) for word in ("-h", "resume", "render", "finetune", "x\ny", "--recipe", None, 5, [])],
    dict(lr="fast"), dict(lr=None), dict(lr=math.nan), dict(steps=10 ** 400), dict(steps=-1), dict(steps=[1]),
    dict(L=True), dict(randaug="--lr=5"), dict(randaug=None), dict(model="a\nb"), dict(recipe="huge"),
    dict(source="image", image="no\nfile"), dict(world="1\n2"), dict(world=None), dict(device=7),
    dict(device="tpu"), dict(precision="fp8"), dict(seed={})],
    ids=lambda s: str(s)[:40])
def test_hostile_settings_of_a_run_get_one_line(settings, trained, tmp_path, refused):
    run = copied(trained, tmp_path / "run", settings=settings)
    before = (run / "last.pt").read_bytes()
    refused("resume", run)
    assert (run / "last.pt").read_bytes() == before and sorted(p.name for p in tmp_path.rglob("*")) == [
        "args.json", "last.pt", "run"]


def test_a_run_goes_on_elsewhere_or_says_what_it_needs(trained, tmp_path, refused, capsys, monkeypatch, signals):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert main("pretrain", *SMALL, *QUICK, "--steps", 6, "--out", tmp_path / "stopped") == 128 + signal.SIGTERM
    for k, device in enumerate(("cuda", "cuda:0")):
        run = copied(tmp_path / "stopped", tmp_path / str(k), settings=dict(device=device))
        capsys.readouterr()
        assert main("resume", run) == 0
        error = capsys.readouterr().err
        assert error.startswith("onepfrac: ") and error.count("\n") == 1 and "GPU" in error and "CPU" in error
        assert_same(trained, run)
    assert "torchrun --nproc_per_node=2" in refused("resume", copied(trained, tmp_path / "two", settings=dict(world=2)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun --nproc_per_node=1" in refused("resume", trained)
    for world in ("2", "two"):                                  # without torchrun
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.delenv("RANK", raising=False)
        assert "torchrun" in refused("pretrain", *SMALL, *QUICK, "--out", tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_a_finished_run_is_not_overwritten(trained, refused):
    before = {file: file.read_bytes() for file in trained.iterdir()}
    error = refused("pretrain", *SMALL, *QUICK, "--seed", 1, "--out", trained)
    assert "--out" in error and f"resume {trained}" in error
    assert {file: file.read_bytes() for file in trained.iterdir()} == before


def test_a_network_that_cannot_be_compiled_is_trained_as_it_is(monkeypatch, capsys):
    model, x, zeros, shapes = op.ViT(16, 8, 5, 32, 1, 2), torch.randn(4, 3, 16, 16), torch.zeros, []
    nn.init.normal_(model.head.weight)
    args = argparse.Namespace(precision="fp32", world=1, device="cuda:0", batch_size=4, img_size=16)
    monkeypatch.setattr(torch, "zeros", lambda shape, device: shapes.append((shape, device)) or zeros(shape))

    def no_compiler(network):
        def fail(x):
            raise RuntimeError("Cannot find a working triton installation.\nMore about it")
        return fail
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert op.accelerate(model, args) is model
    error = capsys.readouterr().err
    assert error.startswith("onepfrac: ") and error.count("\n") == 1 and "triton" in error
    assert shapes == [((4, 3, 16, 16), "cuda:0")]               # the batch it was tried on
    monkeypatch.setattr(torch, "compile", lambda network: network.forward)      # one that works
    fast = op.accelerate(model, args)
    assert fast is not model and (fast(x) == model(x)).all() and not capsys.readouterr().err
    assert all(p.grad is None for p in model.parameters())
    assert op.accelerate(model, argparse.Namespace(world=1, device="cpu")) is model


DRIVER = """
import os, sys, torch
import onepfrac as op
file, seen, train_step = f"{sys.argv[1]}/rank{os.environ['RANK']}", [], op.train_step
def spy(network, optimizer, x, target, rate, args):
    if len(seen) == int(os.environ.get("FAIL_AT", -1)) and args.rank == 1:
        raise op.InputError("--source: this rank cannot go on")
    seed = torch.initial_seed()
    loss, logits = train_step(network, optimizer, x, target, rate, args)
    seen.append(dict(x=x, target=target, rate=rate, loss=loss, logits=logits, seed=seed))
    torch.save(seen, f"{file}.part")
    os.replace(f"{file}.part", f"{file}.pt")            # whole, whenever this process is ended
    return loss, logits
op.train_step = spy
sys.exit(op.main(sys.argv[2:]))
"""


def torchrun(folder, *arguments, **environment):
    """A job of two processes -> exit status, output, errors, and the steps of either in this job."""
    (folder / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
         "--rdzv_endpoint=localhost:0", folder / "driver.py", folder, *map(str, arguments)], capture_output=True,
        text=True, timeout=170, env=ALONE | {"PYTHONPATH": str(SCRIPT.parent), **environment})
    ranks = [torch.load(folder / f"rank{k}.pt", weights_only=True) for k in (0, 1)]
    return done.returncode, done.stdout, done.stderr, ranks


def test_two_processes_fail_together_go_on_train_one_network_and_log_all_of_it(image_folder, tmp_path):
    words = ["finetune", "--data", "folder", "--root", image_folder, "--batch-size", 32, "--epochs", 9.6,
             "--eval-epochs", 5, *QUICK, "--log-every", 4, "--save-every", 8, "--clip-grad", 0, "--optimizer", "sgd",
             "--lr", 0.2, "--smoothing", 0]            # Adam and Muon would make much of a rounding error
    status, _, errors, before = torchrun(tmp_path, *words, "--out", tmp_path / "two", FAIL_AT="13")
    assert status != 0 and "onepfrac: --source: this rank cannot go on" in errors
    assert saved(tmp_path / "two")["step"] == 8
    status, output, errors, after = torchrun(tmp_path, "resume", tmp_path / "two")
    assert status == 0, errors
    assert output.count("step 24/24  loss") == 1 and "cpu x2" in output     # only one of them writes and prints
    for first, second in zip(before, after):                    # the same bits in the steps that both jobs took
        for one, two in zip(first[8:12], second):
            assert all(torch.equal(one[key], two[key]) for key in ("x", "target", "loss", "logits"))
    ranks = [first[:8] + second for first, second in zip(before, after)]
    assert len({step["seed"] for rank in ranks for step in rank}) == 2 * 24

    # One process that takes the steps of both, on both their images, ends with the same network.
    args = resolved(*words)
    labels = op.labels_of(op.open_datasets(args)[0])
    model = op.make_model(args, 2)
    optimizer, losses, right = op.make_optimizer(model, args), [], []
    for step, pair in enumerate(zip(*ranks)):
        target = torch.stack([rank["target"] for rank in pair], 1).flatten(0, 1)
        assert torch.equal(target.argmax(1), labels[op.batch_indices(80, 32, step, 0)])
        x = torch.stack([rank["x"] for rank in pair], 1).flatten(0, 1)
        loss, logits = op.train_step(model, optimizer, x, target, pair[0]["rate"], args)
        losses.append(loss.item())
        right.append((logits.argmax(1) == target.argmax(1)).double().mean().item())
    content = saved(tmp_path / "two")
    assert all(torch.allclose(t, content["model"][name], atol=1e-4) for name, t in model.state_dict().items())
    log = [r for r in read_log(tmp_path / "two") if "loss" in r]
    assert [(r["step"], r["images"]) for r in log] == [(step, 32 * step) for step in range(4, 25, 4)]
    for k, record in enumerate(log):
        assert record["loss"] == pytest.approx(np.mean(losses[4 * k:4 * k + 4]), abs=1e-4)
        assert record["top1"] == pytest.approx(100 * np.mean(right[4 * k:4 * k + 4]), abs=0.1)
    model.load_state_dict(content["model"])
    tests = op.folder_data(op.open_datasets(args)[1], None, args)
    found = op.evaluate(model, tests, op.make_augment(args, 2, **op.IMAGENET), args)
    assert [r["test_top1"] for r in read_log(tmp_path / "two") if "test_top1" in r][-1] == pytest.approx(found)


def test_checkpoints_of_timm_and_of_the_authors_load(tmp_path):
    torch.manual_seed(3)
    donor = op.ViT(32, 4, 1000, 96, 6, 3)
    nn.init.normal_(donor.head.weight)
    state = donor.state_dict()
    for content in (state, {"model": state, "epoch": 5}, {"state_dict": state},
                    {"model": state, "args": argparse.Namespace(model="vit_tiny")},
                    {"model": {f"module.{k}": v for k, v in state.items()}}, {k: t.half() for k, t in state.items()},
                    {f"module._orig_mod.{k}": v for k, v in state.items()}, {"model_state_dict": state},
                    {"state_dict": {f"model.{k}": v for k, v in state.items()}}):
        torch.save(content, tmp_path / "weights.pt")
        same, other = op.ViT(32, 4, 1000, 96, 6, 3), op.ViT(16, 4, 10, 96, 6, 3)
        for model in (same, other):
            op.load_weights(model, tmp_path / "weights.pt")
            assert torch.allclose(model.blocks[3].mlp.fc1.weight, donor.blocks[3].mlp.fc1.weight, atol=1e-4)
            assert (model.head.weight == 0).all()               # the classes are others
        if content is state:
            assert torch.equal(same.pos_embed, donor.pos_embed) and torch.equal(same.cls_token, donor.cls_token)
        assert other.pos_embed.shape == (1, 17, 96)


def test_a_file_of_something_else_is_told_by_its_name(tmp_path):
    model, file = op.ViT(16, 8, 5, 16, 1, 2), tmp_path / "x.pt"
    with pytest.raises(op.InputError, match="no such file"):    # a folder, a pipe, nothing
        op.load_weights(model, tmp_path)
    for write, told in (
            (lambda: file.write_bytes(b""), "the file is empty"),
            (lambda: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1"), "git lfs pull"),
            (lambda: file.write_text("hello"), "no file that torch.save wrote"),
            (lambda: torch.save(model, file), r"Python object \(onepfrac.ViT\)"),
            (lambda: torch.save(7, file), "one int"), (lambda: torch.save(torch.zeros(3), file), "one Tensor"),
            (lambda: torch.save(nn.Linear(2, 2).state_dict(), file), "its keys: weight, bias")):
        write()
        with pytest.raises(op.InputError, match=told) as error:
            op.load_weights(model, file)
        assert "weights_only" not in str(error.value) and "\x1b" not in str(error.value) and len(str(error.value)) < 400
    torch.serialization.set_crc32_options(False)                # a file without checksums is whole
    try:
        torch.save(model.state_dict(), file)
    finally:
        torch.serialization.set_crc32_options(True)
    op.load_weights(model, file)


def test_position_embeddings_follow_the_image_size(tmp_path):
    donor, big = (op.ViT(size, 4, 3, 4, 1, 2) for size in (32, 64))
    grid = torch.linspace(0, 1, 8).view(1, 8, 1, 1).expand(1, 8, 8, 4).reshape(1, 64, 4)
    donor.pos_embed.data = torch.cat([torch.full((1, 1, 4), 7.0), grid], 1)
    torch.save(donor.state_dict(), tmp_path / "x.pt")
    op.load_weights(big, tmp_path / "x.pt")
    assert big.pos_embed.shape == (1, 257, 4) and (big.pos_embed[:, 0] == 7).all()
    found = big.pos_embed.detach()[0, 1:].view(16, 16, 4)
    assert (found[:, 3, 0].diff() > 0).all() and abs(found[:, 3, 0].mean() - 0.5) < 1e-3
    assert found[3, :, 0].max() - found[3, :, 0].min() < 1e-5   # rows stay rows
    for shape in ((1, 0, 96), (1, 1, 96), (2, 5, 96), (3,), (1, 18, 96), (1, 6, 96), (2, 17, 96), (1, 17, 97)):
        model = op.ViT(16, 4, 9, *op.MODELS["vit_nano"])
        torch.save(model.state_dict() | {"pos_embed": torch.zeros(shape)}, tmp_path / "x.pt")
        with pytest.raises(op.InputError, match="x.pt: does not fit --model"):
            op.load_weights(model, tmp_path / "x.pt")


# ------------------------------------------------------------------------------- E Muon and the probe

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
    return list(zip(*gradients)), rates


def muon_by_hand(p, gradients, rates, decay):
    """The published update in float64, of singular values."""
    momentum = 0.0
    for g, rate in zip(gradients, rates, strict=True):
        momentum = 0.95 * momentum + 0.05 * g.double()
        U, s, V = torch.linalg.svd(0.95 * momentum + 0.05 * g, full_matrices=False)
        s = s / s.norm().clamp(min=1e-7)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
        p = p * (1 - rate * decay) - rate * 0.2 * max(p.shape) ** 0.5 * U * s @ V
    return p


def test_muon_moves_the_matrices_of_blocks_by_its_formula_and_adamw_the_rest():
    """Shapes that are tall, wide and square, two of each. The rest has the bits of torch's AdamW."""
    torch.manual_seed(0)
    model, plain, moved = *(op.ViT(16, 8, 5, 16, 2, 2).to(DEVICE) for _ in range(2)), []
    for p in model.parameters():
        nn.init.normal_(p)
    plain.load_state_dict(model.state_dict())
    before, vanish = [p.detach().clone().cpu() for p in model.parameters()], range(4, 28)      # the blocks
    gradients, rates = some_steps(op.make_optimizer(model, settings(optimizer="muon")), [*model.parameters()], vanish)
    decay = lambda n, p: 0.05 * (p.ndim > 1 and n not in ("cls_token", "pos_embed"))
    some_steps(torch.optim.AdamW([dict(params=[p], weight_decay=decay(n, p)) for n, p in plain.named_parameters()],
                                 fused=True), [*plain.parameters()], vanish)
    for (name, p), q, start, given in zip(model.named_parameters(), plain.parameters(), before, gradients, strict=True):
        if not torch.equal(p, q):
            moved.append(name)
            by_hand = muon_by_hand(start, given, rates, 0.05)
            assert (p.cpu() - by_hand).abs().max() < 2e-6 and (by_hand - start).abs().mean() > 1e-3, name
    assert moved == [f"blocks.{k}.{n}.weight" for k in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


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


@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
def test_probe_sees_the_first_blocks_only_and_trains_the_head_only(kind):
    torch.manual_seed(0)
    model = op.ViT(16, 8, 10, 48, 3, 2, drop_path=0.5)
    probe, x = op.Probe(model, 2, 10), torch.randn(5, 3, 16, 16)
    nn.init.normal_(probe.head.weight)
    before = probe.train()(x)
    seen = model.blocks[1](model.blocks[0](model.embed(x)))[:, 1:].mean(1)
    z = (seen - seen.mean(0)) / (seen.var(0, correction=0) + 1e-6).sqrt()
    assert torch.allclose(before, z @ probe.head.weight.T + probe.head.bias, atol=1e-4)
    for p in (*model.blocks[2].parameters(), model.norm.weight):
        nn.init.normal_(p)
    assert torch.equal(probe(x), before)
    assert [n for n, p in probe.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    old = {n: p.clone() for n, p in probe.named_parameters()}
    op.train_step(probe, op.make_optimizer(probe, settings(optimizer=kind)), x, torch.eye(10)[:5], 0.1, settings())
    assert {n for n, p in probe.named_parameters() if not torch.equal(p, old[n])} == {"head.weight", "head.bias"}
    with pytest.raises(op.InputError, match="--probe 4: .*3 blocks"):
        op.Probe(model, 4, 10)


@pytest.mark.parametrize("which", ["probe", "muon"])
def test_probe_and_muon_go_on_after_a_signal_with_the_same_bits(which, pretrained, image_folder, tmp_path, monkeypatch,
                                                                capsys):
    """And the probe tells stripes apart by the checkpoint's weights, unchanged."""
    flags = {"muon": ["pretrain", "--optimizer", "muon", "--L", 8, "--steps", 8, "--canvas", 32, "--points", 500, *TINY,
                      "--precision", "bf16"],
             "probe": ["finetune", "--probe", 2, "--ckpt", pretrained[0] / "last.pt", "--data", "folder", "--root",
                       image_folder, "--epochs", 40, "--eval-epochs", 30, *TINY]}[which] + ["--batch-size", 16]
    train_step, steps = op.train_step, []

    def signalled(*inputs):
        steps.append(0)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*inputs)
    monkeypatch.setattr(op, "train_step", signalled)
    assert main(*flags, "--out", tmp_path / "b") == 128 + signal.SIGTERM and len(steps) == 5
    assert main("resume", tmp_path / "b") == 0 and main(*flags, "--out", tmp_path / "a") == 0
    a, b = (torch.load(tmp_path / k / "last.pt", weights_only=True)["model"] for k in "ab")
    assert len(steps) == 2 * {"muon": 8, "probe": 200}[which] and a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    if which == "probe":
        donor = torch.load(pretrained[0] / "last.pt", weights_only=True)["model"]
        tests = {r["step"]: r["test_top1"] for r in read_log(tmp_path / "b") if "test_top1" in r}
        assert tests.keys() == {150, 200} and tests[200] >= 70
        assert f"test top-1 {tests[200]:.2f}%" in capsys.readouterr().out
        assert all(torch.equal(a[f"frozen.{n}"], t) for n, t in donor.items() if "head" not in n)


# ---------------------------------------------------------------------------------------- E render

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
    assert main("pretrain", "--source", "folder", "--root", tmp_path / "x", "--batch-size", 8, *QUICK, "--steps", 2,
                "--out", tmp_path / "run") == 0


# ---------------------------------------------------------------------------------------- F settings

PRE, FINE = "pretrain --steps 1", "finetune --data folder --root {folder}"
BAD = {     # the flag that the one line must name: command lines
    "--delta": f"{PRE} --delta -0.1; {PRE} --delta many; {PRE} --delta nan; {PRE} --delta 100 --L 2 --points 300",
    "--sigma": f"{PRE} --sigma 0; {PRE} --sigma 6.5", "--L": f"{PRE} --L 1", "--lr": f"{PRE} --lr inf",
    "--seed": f"{PRE} --seed=--",
    "--steps": f"{PRE} --steps 0; {PRE} --steps {'9' * 400}", "--canvas": f"{PRE} --canvas 2",
    "--points": f"{PRE} --points 0; {PRE} --texture point --points 300 --L 2", "--warmup": f"{PRE} --warmup 1",
    "--patch-size": f"{PRE} --img-size 30 --canvas 32 --points 300", "--num-maps": f"{PRE} --num-maps 1",
    "--min-crop": f"{PRE} --min-crop 1.5; {PRE} --min-crop 0", "--device": f"{PRE} --device cuda",
    "--noise": f"{PRE} --noise loud; {PRE} --source image --warp elastic --noise multiplicative",
    "--nonsense": f"{PRE} --nonsense; resume {{tmp}}/empty --nonsense", "COMMAND": "train; --lr 1", "folder": "resume",
    "resume": "resume {tmp}/nowhere; resume {tmp}/empty; resume {tmp}/broken.pt", "--lr ": "resume {tmp}/empty --lr 1",
    "--ckpt": "; ".join(f"{FINE} --ckpt {{tmp}}/{name}" for name in (
        "none.pt", "broken.pt", "code.pt", "junk.pt", "shapes.pt", "nano.pt --model vit_tiny", "empty")),
    "--batch-size": f"{FINE} --batch-size 81", "--train-per-class": f"{FINE} --train-per-class 41",
    "--holdout": f"{FINE} --train-per-class 2 --holdout 0.1 --batch-size 2",
    "--data": "finetune --data imagenet22k; finetune --root {tmp}/dl", "--probe": f"{FINE} --probe 7; {FINE} --probe 0",
    "--root": "; ".join(f"finetune --data folder --root {{tmp}}/{name} --batch-size 2" for name in (
        "nowhere", "empty", "unreadable")) + f"; {PRE} --source folder --root {{tmp}}/nowhere; {PRE} --source folder "
    "--root {tmp}/unreadable/test", "--fractal-seed": f"{PRE} --fractal-seed {2 ** 64}",
    "--image": f"{PRE} --source image --image {{tmp}}/broken.pt", "--texture": f"{PRE} --texture dots",
    "--source": f"{PRE} --source clouds; render --source folder",
    "--out": "render --out {tmp}/unreadable; render --out {tmp}/broken.pt; render --out; "
    f"{PRE} --out {{tmp}}/broken.pt/x",
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
    before = set(tmp_path.rglob("*"))
    assert named in refused(*arguments)
    assert not (tmp_path / "run" / "last.pt").exists() and before <= set(tmp_path.rglob("*"))


IDLE = {    # what makes flags idle: flags that have no effect beside it
    "--source rcdb": "--sigma 4; --num-maps 3; --points 900; --texture random; --root x; --image x; --edges canny",
    "--source va": "--texture=point; --warp affine", "--source gaussian": "--categories 3; --sigma 4; --num-maps=3",
    "--source uniform": "--edges canny", "--source image": "--fractal-seed 5; --categories 3; --points 900; --sigma 4",
    "--source folder --root {folder}": "--delta 0.2; --L 9; --noise multiplicative; --canvas 48; --fractal-seed 5",
    "--categories 9": "--delta 0.2; --L 9; --noise multiplicative; --sigma 4; --num-maps 3",
    "": "--instances 3; --image x; --edges canny; --warp elastic; --root x", "--randaug": "--jitter; --no-jitter",
    "--no-crop": "--min-crop 0.5; --no-aspect; --aspect"}


def test_a_flag_without_effect_is_refused_and_has_none(refused, image_folder, tmp_path):
    """With the refusal taken out, images and augmentation are the same as without the flag."""
    for beside, lines in IDLE.items():
        beside = beside.format(folder=image_folder / "train")
        for flag in map(str.strip, lines.split(";")):
            words = [*beside.split(), *flag.split()]
            error = refused("pretrain", *words, "--device", "cpu", "--steps", 1, "--out", tmp_path / "x")
            name = re.match(r"--[\w-]+", flag)[0]
            assert re.match(rf"onepfrac: {name}: has no effect with.* leave it out$", error), error
        same = images_and_network_input(beside), images_and_network_input(f"{beside} {lines.replace(';', '')}")
        assert all(map(torch.equal, *same)), beside
    for command, beside, flag in (
            ("finetune", "--probe 1", "--drop-path=0.1"), ("finetune", "--probe 1", "--optimizer=muon"),
            ("finetune", "--randaug", "--no-jitter"), ("finetune", "--no-crop", "--aspect"),
            ("render", "--source rcdb", "--sigma=3")):
        error = refused(command, *beside.split(), flag, "--device", "cpu", "--out", tmp_path / "x")
        assert error.startswith(f"onepfrac: {flag.partition('=')[0]}: has no effect")
    assert not (tmp_path / "x").exists()


def images_and_network_input(flags):
    """The first batch of a pre-training, as drawn and as the network sees it."""
    args, [(images, labels), _], augment = pictures(f"{SHORT} {flags}")
    torch.manual_seed(0)
    return images, labels, augment(images, labels)[0]


def test_nano_is_the_default_everywhere_and_a_gpu_is_told_of_small(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for command in ("pretrain", "finetune", "render"):
        args = resolved(command)
        assert (args.recipe, args.device) == ("nano", "cuda")
    for recipe, device, told in (("nano", "meta", True), ("small", "meta", False), ("nano", "cpu", False)):
        args = resolved("pretrain", "--recipe", recipe, "--out", tmp_path)
        args.device = device                                    # meta: no CPU, and there without a GPU
        op.Run(args, nn.Linear(2, 2), None, 7)
        assert ("--recipe small" in capsys.readouterr().out) == told


def flags_of(command, recipe):
    """The flags that argparse knows -> {dest: action}."""
    parser = op.make_parser(recipe)
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {a.dest: a for a in commands.choices[command]._actions if a.dest != "help"}


def test_every_default_of_every_recipe_is_a_value_that_its_flag_takes():
    for recipe in op.RECIPES:
        for command in ("pretrain", "finetune", "render"):
            words = [command, "--recipe", recipe, "--device", "cpu"]
            args = vars(resolved(*words))                       # nothing in it is refused
            assert {k for k, v in args.items() if v is None} <= {"ckpt", "train_per_class", "image", "probe"}
            flags = flags_of(command, recipe)
            assert set(args) == {"command", "rank", "world", "lead", "resume"} | set(flags)
            # Written out, a default is the same setting: it is not read as another, and refused only if it is idle.
            for dest in set(flags) - {"recipe", "device"}:
                value, flag = args[dest], f"--{dest.replace('_', '-')}"
                more = [flag if value else flag.replace("--", "--no-", 1)] if isinstance(value, bool) else [flag, value]
                if value is not None:
                    try:
                        assert vars(resolved(*words, *more)) == args
                    except op.InputError as error:
                        assert "has no effect" in str(error) and dest in (
                            "instances edges warp root jitter").split(), (words, more)
    changed = {key for recipe in op.RECIPES.values() for part in recipe for key in part} | set(op.FINETUNE)
    assert changed <= set(flags_of("pretrain", "nano")) | set(flags_of("finetune", "nano"))     # none is misspelt


def test_recipes_have_their_values_and_any_flag_overrides_them():
    nano, small, paper = (resolved("pretrain", "--recipe", r, "--device", "cpu") for r in ("nano", "small", "paper"))
    assert [a.L for a in (nano, small, paper)] == [64, 1000, 1000] and nano.lr == 2e-3 and paper.lr == 5e-4
    assert (nano.optimizer, nano.batch_size, nano.steps, paper.optimizer) == ("muon", 128, 4700, "adamw")
    assert (paper.canvas, paper.points, paper.img_size, paper.patch_size) == (512, 100_000, 224, 16)
    assert paper.randaug and paper.mixup and paper.cutmix and paper.erase and not nano.randaug
    assert paper.drop_path == 0.1 and paper.batch_size == 256
    assert paper.steps == 240_000 and paper.warmup * paper.steps == pytest.approx(15) and paper.weight_decay == 0.05
    tuned = resolved("finetune", "--recipe", "paper", "--device", "cpu")
    assert (tuned.optimizer, tuned.epochs, tuned.batch_size, tuned.lr, tuned.warmup, tuned.weight_decay) == (
        "sgd", 1000, 768, 0.015, 0.01, 1e-4)
    args = resolved("pretrain", "--recipe", "paper", "--device", "cpu", "--lr", "0.5", "--no-crop")
    assert {k: v for k, v in vars(args).items() if v != vars(paper)[k]} == {"lr": 0.5, "crop": False}
    assert vars(resolved("pretrain", "--lr", "0.5", "--no-crop", "--device=cpu", "--recipe=paper")) == vars(args)


@pytest.mark.parametrize("command", ["pretrain", "finetune", "render", "resume"])
def test_help_shows_every_flag_with_its_default_under_the_paper_s_tables(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(command, *["--recipe", "small"] * (command != "resume"), "-h") == 0
    text = capsys.readouterr().out
    shown = {}      # an entry begins with two spaces and its flag, and goes on with lines that are further in
    for entry in re.findall(r"^  --.*\n(?: {8,}.*\n)*", text, re.M):
        flag, words, default = re.fullmatch(
            r"  --(\S+?),? .*?\s{2,}(\S.*?)\s+\(default:\s+([^)]+)\)\s*", entry, re.S).groups()
        assert len(words) > 4
        shown[flag.replace("-", "_")] = default
    if command == "resume":
        assert set(shown) <= {"root"} and "folder" in text and "--root" in text
        return
    args = vars(resolved(command, "--device", "cpu", "--recipe", "small"))
    assert set(shown) == set(args) - {"command", "rank", "world", "lead", "resume"}
    assert all(shown[k] == str(args[k]) for k in set(shown) - {"device", "out", "precision", "recipe"})
    headings = " ".join(line for line in text.splitlines() if re.match(r"\S.*:$", line))
    drawn, trained = ("pretrain", "render"), ("pretrain", "finetune")
    for table, commands in {"Tables 2, 3, 4": drawn, "Tables 5, 6, 7, 8": drawn, "Tables 11, 12": drawn,
                            "Table 9": trained, "Tables 13, 14": trained[1:], "Fig. 3": trained[1:]}.items():
        assert (table in headings) == (command in commands)
    assert ("Table 13" in " ".join(text.split())) == (command in drawn)      # --texture fresh


SHORT = "--canvas 64 --points 1500 --L 16 --batch-size 16"      # settings of a small pre-training


def pictures(flags):
    """Settings, the images and labels of the first two batches of pre-training, and the augmentation."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "refuse_idle_flags", lambda *_: None)         # SHORT is for all sources
        args = resolved("pretrain", "--recipe", "nano", "--device", "cpu", *flags.split())
        patch.setattr(op, "train", lambda args, model, data, augment, steps: seen.append((data, augment)))
        for name in ("write_json", "note_images"):
            patch.setattr(op, name, lambda *_: None)
        op.pretrain(args)
    [(data, augment)], batches = seen, []
    for step in (0, 1):
        torch.manual_seed(op.seed_for(args.seed, "step", step, args.rank))
        batches.append(data[op.batch_indices(len(data), args.batch_size, step, args.seed)])
    return args, batches, augment


@pytest.fixture(scope="module")
def usual():
    return pictures(SHORT)


@pytest.mark.parametrize("flags", [
    "--delta 0.3", "--sigma 4.5", "--L 9", "--noise multiplicative", "--fractal-seed 1", "--num-maps 3", "--canvas 48",
    "--points 300", "--texture random", "--texture point", "--texture fresh", "--seed 5", "--categories 16",
    "--categories 4 --instances 4", "--source rcdb", "--source va", "--source gaussian", "--source uniform",
    "--source image", "--source image --edges canny", "--source image --warp elastic", "--source image --image {photo}",
    "--source folder --root {folder}", "--batch-size 8"])
def test_flags_of_the_picture_change_it(flags, usual, image_folder, tmp_path):
    Image.effect_noise((80, 70), 90).save(tmp_path / "photo.png")
    flags = flags.format(photo=tmp_path / "photo.png", folder=image_folder / "train")
    args, batches, _ = pictures(f"{SHORT} {flags}")
    named = {word[2:].replace("-", "_") for word in flags.split() if word.startswith("--")}
    assert {k for k in vars(args) if vars(args)[k] != vars(usual[0])[k]} == named
    assert not all(a.shape == b.shape and (a == b).all() for (a, _), (b, _) in zip(batches, usual[1]))


def norm_weights(flags, out):
    """The weights of the last norm after a short pre-training."""
    assert main(*f"pretrain {SHORT} --device cpu --precision fp32 --steps 3 {flags} --out {out}".split()) == 0
    return saved(out)["model"]["norm.weight"]


@pytest.fixture(scope="module")
def usual_weights(tmp_path_factory):
    return norm_weights("", tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("flags", [
    "--lr 0.1", "--weight-decay 0.3", "--warmup 0.5", "--optimizer sgd", "--optimizer adamw", "--clip-grad 0.01",
    "--randaug", "--no-crop", "--no-aspect", "--erase", "--mixup", "--no-cutmix", "--flip", "--no-jitter",
    "--smoothing 0.2", "--min-crop 0.5", "--drop-path 0.5", "--model vit_tiny", "--patch-size 4", "--img-size 24",
    "--precision bf16", "--steps 2"])
def test_flags_of_training_leave_the_picture_alone_and_change_the_training(flags, usual, usual_weights, tmp_path):
    args, batches, _ = pictures(f"{SHORT} {flags}")
    named = {word[2:].replace("-", "_").removeprefix("no_") for word in flags.split() if word.startswith("--")}
    assert {k for k in vars(args) if vars(args)[k] != vars(usual[0])[k]} - {"precision"} == named - {"precision"}
    assert all((a == b).all() and (i == j).all() for (a, i), (b, j) in zip(batches, usual[1]))
    found = norm_weights(flags, tmp_path)
    assert found.shape != usual_weights.shape or (found != usual_weights).any()


def test_the_same_command_gives_the_same_weights(usual_weights, tmp_path):
    """So what the flags above change is not chance."""
    assert torch.equal(norm_weights("", tmp_path), usual_weights)


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


def test_code_of_readme_runs_as_it_says(monkeypatch, capsys):
    monkeypatch.chdir(SCRIPT.parent)
    first, game, copied = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names = {}
    exec(first, names)
    assert names["loss"].item() == pytest.approx(math.log(8), abs=1e-5) and names["x"].shape == (8, 3, 224, 224)
    assert names["images"].shape == (8, 512, 512) and names["images"].unique().tolist() == [0, 127]
    exec(game, names)
    assert 75 < int(capsys.readouterr().out.rstrip("%\n")) < 85 and names["mine"].sum() > 5000
    exec(copied, names)
    assert names["features"].shape == (2, 96) and 0.1 < names["features"].std() < 10
    state = torch.load("results/nano.pt", weights_only=True)
    assert torch.equal(names["model"].blocks[5].mlp.fc2.weight, state.get("model", state)["blocks.5.mlp.fc2.weight"])
    assert torch.equal(names["images"], op.fractal_data(resolved("pretrain", "--device", "cpu")).images)


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
import os, random, runpy, signal, sys, warnings, numpy, torch
def state():
    return (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(), dict(os.environ),
            torch.get_num_threads(), signal.getsignal(signal.SIGINT), list(sys.path), torch.is_grad_enabled())
before = state()
import onepfrac
assert state() == before
for usual, then in ((None, "10000"), ("7", "7")):
    if usual:
        os.environ["GOMP_SPINCOUNT"] = usual
    sys.argv = ["onepfrac.py", "nonsense"]
    try:
        runpy.run_path(onepfrac.__file__, run_name="__main__")
    except SystemExit:
        assert os.environ["GOMP_SPINCOUNT"] == then
"""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0 and not done.stdout, done.stderr
    assert done.stderr.count("onepfrac: ") == done.stderr.count("\n") == 2        # "nonsense" is no command


# ------------------------------------------------------------------------------------ shipped weights

def test_the_shipped_weights_know_the_classes_as_recorded():
    """One number holds fractal, renderer, augmentation and network together: 10,000 new crops of the 64 classes."""
    folder = SCRIPT.parent / "results"
    digest, name = (folder / "nano.sha256").read_text().split()
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    record = json.loads((folder / "nano.args.json").read_text())
    omega = json.loads((folder / "nano.omega.json").read_text())
    assert torch.tensor(omega["base"]).equal(op.base_ifs(2, 3.5, record["fractal_seed"]))
    found = weights.pretext_accuracy(folder / name, record, 10_000, seed=2)
    assert record["pretext_top1"] > 80 and found == pytest.approx(record["pretext_top1"], abs=1)
