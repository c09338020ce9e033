"""Tests of onepfrac.py against independent references: plain loops, Pillow, torchvision, nn.Module.

    python -m pytest -q
    ONEPFRAC_DEVICE=cuda python -m pytest -q        # renderer, images, augmentation, network and resuming on a GPU

The sections are those of onepfrac.py; the last one is about the file itself.
"""
import argparse
import ast
import base64
import contextlib
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torchvision.transforms import functional as T

import onepfrac as op
sys.path.insert(0, str(Path(op.__file__).parent / "results"))
import faults
import logistic
import mimetic
import speed
import tables
import weights

SCRIPT = Path(op.__file__)
DEVICE = os.environ.get("ONEPFRAC_DEVICE", "cpu")
torch.backends.cudnn.allow_tf32 = False                         # convolutions in full precision


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def resolved(*arguments):
    """The settings of a command line."""
    return op.parse([str(a) for a in arguments])


def opened(*flags):
    """The images of these flags of `pretrain`, small pictures if they say nothing else."""
    small = [] if "--canvas" in flags else ["--canvas", 64]
    return op.source_data(resolved("pretrain", "--recipe", "nano", "--device", DEVICE, "--points", 2000, *small,
                                   *flags))


@functools.lru_cache
def fractal(seed=32):
    """A base fractal; nobody may change it."""
    return op.base_ifs(2, 3.5, seed)


def render(maps, *arguments):
    """On the device of the tests; the images come back."""
    return op.render_ifs(maps.to(DEVICE), *arguments).cpu()


def stamped(images, seed):
    """A copy of dilated images with random masks."""
    images = images.to(DEVICE, copy=True)
    op.stamp(images, torch.Generator(DEVICE).manual_seed(seed))
    return images.cpu()


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ========================================================================================== PART ONE

# ---------------------------------------------------------------------------------------- 1 fractals

@pytest.mark.parametrize("num_maps", [2, 3, 7])
@pytest.mark.parametrize("share", [0.05, 0.58, 0.999])
def test_sampled_systems_have_the_asked_sigma_and_contract(num_maps, share):
    sigma = share * 3 * num_maps
    for seed in range(20):
        maps = op.sample_ifs(num_maps, sigma, seeded(seed))
        assert maps.shape == (num_maps, 2, 3)
        s = np.linalg.svd(maps[:, :, :2].numpy(), compute_uv=False)
        assert abs((s[:, 0] + 2 * s[:, 1]).sum() - sigma) < 1e-5 * max(1, sigma)
        assert abs(op.sigma_factor(maps).item() - sigma) < 1e-5 * max(1, sigma)
        assert s.max() < 1 + 1e-6 and maps[:, :, 2].abs().max() <= 1


def test_sampled_systems_use_reflections_rotations_and_the_whole_range_of_translations():
    maps = torch.stack([op.sample_ifs(2, 3.5, seeded(s)) for s in range(400)]).view(-1, 2, 3)
    assert 0.4 < (maps[:, :, :2].det() < 0).float().mean() < 0.6
    assert maps[:, :, 2].min() < -0.95 and maps[:, :, 2].max() > 0.95
    angle = torch.atan2(maps[:, 1, 0], maps[:, 0, 0])
    assert all((angle > a).float().mean() - (math.pi - a) / (2 * math.pi) < 0.06
               for a in (-2.0, -1.0, 0.0, 1.0, 2.0))


@pytest.mark.parametrize("num_maps, sigma", [(1, 1.0), (2, 0.0), (2, -1.0), (2, 6.0)])
def test_impossible_systems_are_refused(num_maps, sigma):
    with pytest.raises(ValueError, match="sigma"):
        op.sample_ifs(num_maps, sigma)


# ----------------------------------------------------------------------------------------- 2 drawing

@pytest.mark.parametrize("num_maps, seed", [(2, 0), (2, 3), (3, 1), (5, 2)])
def test_each_orbit_follows_its_maps_and_its_points_light_their_pixels(num_maps, seed):
    """From its first drawn point on, each orbit again, point by point in float64."""
    systems = torch.stack([op.sample_ifs(num_maps, 1.6 * num_maps, seeded(seed + 10 * k)) for k in range(3)])
    images = render(systems, 128, 4500, "point", seeded(7), torch.ones(num_maps))
    j, starts = op.map_table(torch.ones(num_maps), 4500, seeded(7))
    first = op.chaos_game(systems.to(DEVICE), j, starts)[:, :, 0].cpu()      # (2, 3, 30 orbits)
    for k, (image, maps) in enumerate(zip(images, systems.double().numpy())):
        points = []
        for orbit in range(30):
            v = first[:, k, orbit].double().numpy()
            points.append(v)
            for start in starts[-op.ORBIT + 1:]:
                w = maps[j[start + orbit]]
                v = w[:, :2] @ v + w[:, 2]
                points.append(v)
        points = np.array(points)
        low, high = points.min(0), points.max(0)
        cell = np.floor((points - low) / (high - low) * (128 - 1 - 2) + 1 + 0.5).astype(int)
        hits = np.zeros((128, 128), bool)
        hits[127 - cell[:, 1], cell[:, 0]] = True
        # float32 against float64 moves a point across a pixel's border now and then
        assert ((image.numpy() > 0) != hits).sum() <= 0.01 * hits.sum()


def long_orbits(maps, orbits=20_000, burn_in=1000, steps=1000):
    """20 million points of the invariant measure, by a plain loop with its own random numbers."""
    rng, w = np.random.default_rng(0), maps.double().numpy()            # of two maps
    p = np.abs(np.linalg.det(w[:, :, :2]))
    x, y, kept = np.zeros(orbits), np.zeros(orbits), []
    for step in range(burn_in + steps):
        first = rng.random(orbits) <= p[0] / p.sum()
        (a, b, e), (c, d, f) = np.where(first, w[0, :, :, None], w[1, :, :, None])
        x, y = a * x + b * y + e, c * x + d * y + f
        kept += [(x.astype(np.float32), y.astype(np.float32))] * (step >= burn_in)
    return np.array(kept).transpose(1, 0, 2).reshape(2, -1)


@pytest.mark.parametrize("seed", [32, 0, 1, 2, 3, 4, 5, 6])
def test_points_have_the_invariant_measure(seed):
    """Total variation on a 64 x 64 grid. By chance alone it would be 0.010 for so many points, and
    it was 0.05 to 0.36 when orbits were drawn after 30 steps."""
    maps = fractal(seed)
    reference, probs = long_orbits(maps), maps[..., :2].det().abs()
    low, high = reference.min(1, keepdims=True), reference.max(1, keepdims=True)

    def density(points):
        cell = ((points - low) / (high - low) * 64).astype(np.int32).clip(0, 63)
        return np.bincount(64 * cell[0] + cell[1], minlength=4096) / cell.shape[1]

    drawn = [op.chaos_game(maps[None].to(DEVICE), *op.map_table(probs, 100_000, seeded(k))).reshape(2, -1).cpu()
             for k in range(24)]
    ours, theirs = density(np.concatenate(drawn, 1)), density(reference)
    assert 0.5 * np.abs(ours - theirs).sum() < 0.02


def test_orbits_read_maps_by_their_probabilities_and_independently():
    probs = torch.tensor([0.1, 0.6, 0.3])
    j, starts = op.map_table(probs, 50_000 * op.ORBIT, seeded(1))
    starts = starts[-op.ORBIT:]
    assert len(j) == 50_000 + op.PLACES and 1 <= min(starts) < 50 and op.PLACES - 50 < max(starts) <= op.PLACES
    assert (torch.bincount(j) / len(j) - probs).abs().max() < 2 / len(j)
    sequence = torch.stack([j[start:start + 50_000] for start in starts])
    for after, before in ((sequence[1:], sequence[:-1]), (sequence[:, 1:], sequence[:, :-1])):
        pairs = torch.bincount((3 * before + after).flatten()) / after.numel()
        assert (pairs - torch.outer(probs, probs).flatten()).abs().max() < 0.005
    drawn = torch.multinomial(probs, 14 * 50_000, True, generator=seeded(2)).view(14, 50_000)
    ours, independent = (len((maps.T @ 3 ** torch.arange(14)).unique())     # different last 14 maps
                         for maps in (sequence[-14:], drawn))
    assert abs(ours - independent) < 0.02 * independent


def test_sierpinski_triangle_has_its_box_counting_dimension():
    corners = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.25, 0.5]])
    maps = torch.cat([0.5 * torch.eye(2).expand(3, 2, 2), corners[:, :, None]], 2)
    image = render(maps[None], 519, 400_000, "point", seeded(0))[0] > 0    # 519 - 2*3.. > 507
    rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
    image = image[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].float()[None, None]
    image = F.interpolate(image, (512, 512), mode="nearest")
    sizes = (4, 8, 16, 32, 64)
    boxes = [F.max_pool2d(image, s).sum().item() for s in sizes]
    slope = np.polyfit(np.log(sizes), np.log(boxes), 1)[0]
    assert abs(-slope - math.log(3) / math.log(2)) < 0.05


def test_picture_fills_the_canvas_upright():
    maps = torch.tensor([[[0.5, 0, 0], [0, 0.5, 0]], [[0.5, 0, 1], [0, 0.5, 0]],
                         [[0.5, 0, 0], [0, 0.5, 1]]])           # right triangle, corner at the origin
    image = render(maps[None], 512, 100_000, "point", seeded(0))[0] > 0
    assert image.any(1).nonzero()[[0, -1]].flatten().tolist() == [6, 505]
    assert image.any(0).nonzero()[[0, -1]].flatten().tolist() == [6, 505]
    assert image[490:, 6:20].sum() > 0 and image[6:200, 300:].sum() == 0


def test_texture_has_the_statistics_of_stamping_one_by_one():
    maps = fractal()[None]
    size, points = 128, 20_000
    hits = render(maps, size, points, "point", seeded(5))[0].numpy() > 0
    rng, lit = np.random.default_rng(0), []
    sequence_points = np.argwhere(hits).repeat(4, 0)            # each hit pixel stamped four times
    for _ in range(8):
        canvas = np.zeros((size, size), np.uint8)
        for y, x in rng.permutation(sequence_points):
            mask = [int(b) for b in f"{rng.integers(1, 512):09b}"]
            canvas[y - 1:y + 2, x - 1:x + 2] = np.array(mask).reshape(3, 3)
        lit.append(canvas)
    lit = np.array(lit)
    covered = op.dilate(torch.from_numpy(hits[None].astype(np.uint8)))
    filled = covered[0].numpy() > 0
    images = torch.cat([stamped(covered, s) for s in range(8)]).numpy() > 0
    assert not lit[:, ~filled].any() and lit.any(0)[filled].mean() > 0.98 and not images[:, ~filled].any()
    assert ((render(maps, size, points, "fill", seeded(5))[0] > 0).numpy() == filled).all()
    # by chance 4 standard errors of the share of lit pixels, and of equal neighbours
    pairs = filled[:, 1:] & filled[:, :-1]
    for ours, theirs, n in ((images[:, filled], lit[:, filled], 8 * filled.sum()),
                            (images[:, :, 1:][:, pairs] == images[:, :, :-1][:, pairs],
                             lit[:, :, 1:][:, pairs] == lit[:, :, :-1][:, pairs], 8 * pairs.sum())):
        assert abs(ours.mean() - theirs.mean()) < 4 * math.sqrt(0.5 / n)
    assert (images[0] != images[1]).any() and abs(images[:, filled].mean() - 0.5) < 0.01


def test_expanding_systems_leave_the_others_as_they_are():
    good = fractal()
    explosive = good.clone()
    explosive[:, :, :2] = 3 * torch.eye(2)                      # overflows float32 within an orbit
    probs = good[:, :, :2].det().abs()
    images = render(torch.stack([good, explosive]), 128, 20_000, "fill", seeded(0), probs)
    assert set(images.unique().tolist()) <= {0, 127}
    fill = (images > 0).float().flatten(1).mean(1)
    assert fill[0] > 0.3 and fill[1] < 0.05
    assert (images[0] == render(good[None], 128, 20_000, "fill", seeded(0), probs)[0]).all()


def test_the_box_of_an_image_is_that_of_all_its_points():
    """A map that expands now and then throws a point far out; the picture shrinks, and may be redrawn."""
    stray = fractal().clone()
    stray[1, :, :2] *= 1.12
    image = render(stray[None], 128, 20_000, "point", seeded(0), fractal()[:, :, :2].det().abs())[0] > 0
    for axis in (0, 1):
        hit = image.any(axis).nonzero()[:, 0]
        assert hit[0] == 1 and hit[-1] == 126


def test_images_do_not_depend_on_the_group_they_are_rendered_in(monkeypatch):
    maps = op.perturb(fractal(), 0.1, 7, seeded(0))
    probs = torch.ones(2)
    together = render(maps, 64, 2000, "fill", seeded(3), probs)
    monkeypatch.setattr(op, "IN_FLIGHT", {"cpu": (30_000, 12_000)})        # groups of 2, then of 1
    assert (render(maps, 64, 2000, "fill", seeded(3), probs) == together).all()


@pytest.mark.parametrize("points", [1, 149, 150, 151, 20_000, 100_000])
def test_as_many_points_are_drawn_as_asked_and_less_than_one_orbit_more(points):
    j, offsets = op.map_table(torch.ones(2), points, seeded(0))
    drawn = op.chaos_game(fractal()[None], j, offsets)[0].numel()
    assert points <= drawn < points + op.ORBIT


def test_systems_with_probabilities_of_their_own_render_together_as_alone():
    maps = torch.stack([op.sample_ifs(3, 4.8, seeded(s)) for s in range(5)])
    probs = torch.rand(5, 3, generator=seeded(9))
    probs[2, 1] = 0                                             # this system has two maps
    together = render(maps, 128, 5000, "point", seeded(3), probs)
    alone = [render(maps[i:i + 1], 128, 5000, "point", seeded(3), probs[i]) for i in range(5)]
    assert (together == torch.cat(alone)).all() and (together[2] > 0).any()
    fewer = render(maps[2:3, [0, 2]], 128, 5000, "point", seeded(3), probs[2, [0, 2]])
    assert (fewer[0] == together[2]).all()


def test_a_texture_is_new_for_each_seed_and_the_same_for_one():
    maps = op.perturb(fractal(), 0.1, 3, seeded(0))
    a, again, b = (render(maps, 64, 2000, "random", seeded(s)) for s in (1, 1, 2))
    whole = render(maps, 64, 2000, "fill", seeded(1))
    assert (a == again).all() and (a != b).any() and not (a > whole).any()
    assert set(a.unique().tolist()) == {0, 127} and abs((a > 0).sum() / (whole > 0).sum() - 0.5) < 0.05


@pytest.mark.parametrize("change", [dict(size=4), dict(points=0), dict(texture="dots"),
                                    dict(maps=torch.zeros(2, 2, 3)),
                                    dict(maps=torch.zeros(0, 2, 2, 3)), dict(probs=torch.ones(3))])
def test_renderer_refuses_bad_arguments(change):
    with pytest.raises(ValueError):
        op.render_ifs(**{"maps": torch.zeros(1, 2, 2, 3), **change})


def test_systems_far_away_or_beyond_all_numbers_are_drawn_or_left_blank():
    wild = torch.tensor([[[1.5, 1.5, 1], [1.5, 1.5, 1]]] * 2)
    far = torch.tensor([[[0.6, 0, 4], [0, 0.6, 4]], [[0.6, 0, 4 + 1e-6], [0, 0.6, 4]]])
    beyond = torch.tensor([[[0.9, 0, 1e38], [0, 0.9, 0]], [[0.9, 0, 1e38], [0, 0.9, 1]]])   # contracts, to 1e39
    wide = torch.tensor([[[0.5, 0, 1.6e38], [0, 0.5, 0]], [[0.5, 0, -1.6e38], [0, 0.5, 0]]])    # 6.4e38 across
    for systems in ([wild, far, beyond, wide], [beyond], [wide], [far, beyond]):
        images = render(torch.stack(systems), 64, 2000, "point", seeded(0))
        assert set(images.unique().tolist()) <= {0, 127}
        for system, image in zip(systems, images):
            assert (image > 0).any() if system is far else (image > 0).sum() <= 1 or system is wild
    with pytest.raises(ValueError):
        op.render_ifs(wild[None] * math.nan, 64, 100)


def test_systems_that_expand_on_average_run_away():
    """Their orbits leave the picture within the burn-in, as the authors' overflow; contracting ones stay."""
    systems = torch.stack([op.sample_ifs(2, 3.5, seeded(5)), op.sample_ifs(2, 3.5, seeded(5))])
    systems[1, :, :, :2] *= 1.25 / torch.linalg.svdvals(systems[1, :, :, :2])[:, -1].min() ** 0.5
    probs = torch.ones(2)
    images = render(systems, 128, 20_000, "fill", seeded(0), probs)
    assert (images[1] > 0).float().mean() < 0.05 < (images[0] > 0).float().mean()


# ----------------------------------------------------------------------------------------- 3 classes

def test_additive_perturbation_is_uniform_in_a_cube_of_side_delta():
    maps = op.sample_ifs(2, 3.5, seeded(0))
    eps = op.perturb(maps, 0.2, 5000, seeded(1)) - maps
    assert eps.shape == (5000, 2, 2, 3)
    assert eps.abs().max() <= 0.1 + 1e-6 and eps.abs().max() > 0.0999
    assert (eps.std(0) - 0.2 / math.sqrt(12)).abs().max() < 0.002 and eps.mean(0).abs().max() < 0.004


def test_multiplicative_perturbation_scales_each_number():
    maps = op.sample_ifs(2, 3.5, seeded(0))
    ratio = op.perturb(maps, 0.3, 5000, seeded(1), "multiplicative") / maps
    assert ratio.min() >= 0.7 - 1e-5 and ratio.max() <= 1.3 + 1e-5
    assert (ratio.std(0) - 0.6 / math.sqrt(12)).abs().max() < 0.006


def test_lpce_is_ln_L_before_training_and_takes_soft_targets():
    model = op.ViT(16, 8, 50, 32, 2, 2)
    logits, labels = model(torch.randn(6, 3, 16, 16)), torch.arange(6)
    assert abs(op.lpce_loss(logits, labels).item() - math.log(50)) < 1e-6
    logits = torch.randn(6, 50)
    soft = 0.7 * F.one_hot(labels, 50) + 0.3 * F.one_hot(labels.flip(0), 50)
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    assert abs(op.lpce_loss(logits, soft) - expected) < 1e-6
    assert op.lpce_loss(logits, labels) == F.nll_loss(logits.log_softmax(1), labels)


def test_default_fractals_are_well_filled_and_differ():
    bases = [op.base_ifs(2, 3.5, seed) for seed in (0, 1, 32)]
    for base in bases:
        assert abs(op.sigma_factor(base) - 3.5) <= 0.1 + 1e-5
        assert (op.render_ifs(base[None], 512, 100_000, "fill", seeded(0)) > 0).float().mean() > 0.19
    assert (bases[0] - bases[1]).abs().max() > 0.1
    assert (op.base_ifs(2, 3.5, 32) == bases[2]).all()


def test_at_three_a_map_nothing_contracts_and_nothing_is_drawn_so():
    for seed in range(8):
        maps = op.base_ifs(2, 6.0, seed)
        assert 5.9 <= op.sigma_factor(maps) < 6 and np.linalg.svd(maps[:, :, :2].numpy())[1].min() < 1 - 1e-5


def test_first_perturbations_do_not_depend_on_L():
    for delta in (0.1, 1.0):                                    # at 1.0 most candidates are passed over
        few, many = (opened("--delta", delta, "--L", L) for L in (6, 25))
        assert (many.images[:6] == few.images).all() and (many.numbers["eps"][:6] == few.numbers["eps"]).all()
        assert ((many.images > 0).float().mean((1, 2)) >= 0.05).all()
    assert (stamped(many.images, 4)[:6] == stamped(few.images, 4)).all()
    few, many = (opened("--texture", "random", "--L", L) for L in (6, 25))
    assert (many.images[:6] == few.images).all()                # their texture too
    other = opened("--delta", 1.0, "--L", 6, "--seed", 1)
    few = opened("--delta", 1.0, "--L", 6)
    assert (other.numbers["eps"] != few.numbers["eps"]).any()


def test_a_class_is_the_fractal_with_its_eps_added():
    data = opened("--L", 5, "--delta", 0.2)
    base, eps = data.numbers["base"], data.numbers["eps"]
    assert (base == fractal()).all() and eps.shape == (5, 2, 2, 3) and eps.abs().max() <= 0.1 + 1e-6
    drawn = render(base + eps, 64, 2000, "fill", seeded(op.seed_for(0, "maps")), base[..., :2].det().abs())
    images, labels = data[torch.tensor([4, 0, 4])]
    assert images.device.type == DEVICE and labels.tolist() == [4, 0, 4] and images.dtype == torch.uint8
    assert (images.cpu() == drawn[[4, 0, 4]]).all() and len(data) == 5


def test_fresh_texture_is_new_at_each_step_and_random_texture_stays():
    i = torch.arange(6)
    whole, fresh, kept = (opened("--L", 6, *flags) for flags in ((), ("--fresh-texture",), ("--texture", "random")))
    a, b = (fresh[i][0].cpu() for _ in range(2))
    assert (a != b).any() and (fresh[i][0].cpu() != a).any()
    assert (kept[i][0] == kept[i][0]).all()
    # random masks light half of what they cover, so they take fractals that cover twice as much
    assert (whole.numbers["eps"] == kept.numbers["eps"]).all() and (kept.numbers["eps"] == fresh.numbers["eps"]).all()
    for images in (a, b, kept.images.cpu()):
        assert set(images.unique().tolist()) == {0, 127} and not (images > whole.images.cpu()).any()
        assert abs((images > 0).sum() / (whole.images > 0).sum().cpu() - 0.5) < 0.05


def test_what_does_not_fit_is_drawn_at_every_step(monkeypatch):
    for flags in ((), ("--categories", 3, "--instances", 30), ("--source", "rcdb"), ("--source", "uniform"),
                  ("--source", "image")):
        kept = opened("--L", 12, *flags)
        monkeypatch.setattr(op, "KEEP_BYTES", 0)
        drawn = opened("--L", 12, *flags)
        monkeypatch.undo()
        assert kept.images is not None and drawn.images is None
        indices = [torch.tensor([3, 0, 7]), torch.tensor([11])]
        drawn.group = 2                               # the three are drawn in two groups
        for (a, i), (b, j) in ((kept[index], drawn[index]) for index in indices):
            assert a.shape == b.shape and (a == b).all() and (i == j).all()


# ----------------------------------------------------------------------------------------- 4 network

def test_vit_agrees_with_torch_encoder_layers():
    torch.manual_seed(0)
    model = op.ViT(32, 8, 10, 48, 3, 4).to(DEVICE).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    x = torch.randn(5, 3, 32, 32).to(DEVICE)
    patches = F.unfold(x, 8, stride=8).transpose(1, 2)          # an independent patch embedding
    z = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    z = torch.cat([model.cls_token.expand(5, -1, -1), z], 1) + model.pos_embed
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(48, 4, 192, 0.0, "gelu", 1e-6, True, norm_first=True).to(DEVICE).eval()
        layer.load_state_dict({
            "self_attn.in_proj_weight": block.attn.qkv.weight, "self_attn.in_proj_bias": block.attn.qkv.bias,
            "self_attn.out_proj.weight": block.attn.proj.weight, "self_attn.out_proj.bias": block.attn.proj.bias,
            "linear1.weight": block.mlp.fc1.weight, "linear1.bias": block.mlp.fc1.bias,
            "linear2.weight": block.mlp.fc2.weight, "linear2.bias": block.mlp.fc2.bias,
            "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias})
        z = layer(z)
    z = F.layer_norm(z, (48,), model.norm.weight, model.norm.bias, 1e-6)[:, 0]
    theirs = z @ model.head.weight.T + model.head.bias
    ours = model(x)
    assert ours.std() > 0.1 and (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_vit_tiny_has_the_parameters_of_timm():
    model = op.ViT()
    assert sum(p.numel() for p in model.parameters()) == 5_717_416      # timm's vit_tiny_patch16_224
    names = set(model.state_dict())
    block = {f"blocks.11.{n}.{k}" for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for k in ("weight", "bias")}
    assert block <= names and names - {n for n in names if n.startswith("blocks")} == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight",
        "norm.bias", "head.weight", "head.bias"}
    for name, millions in (("vit_small", 22.05), ("vit_base", 86.57)):
        with torch.device("meta"):
            dim, depth, heads = op.MODELS[name]
            big = op.ViT(dim=dim, depth=depth, heads=heads)
        assert round(sum(p.numel() for p in big.parameters()) / 1e6, 2) == millions


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    block = op.Block(8, 2, 0.25).train().to(DEVICE)
    torch.manual_seed(0)
    out = block.drop(torch.ones(20_000, 3, 8, device=DEVICE))
    assert sorted(out.unique().tolist()) == pytest.approx([0, 4 / 3]) and abs(out.mean() - 1) < 0.02
    assert (out.flatten(1).std(1) == 0).all()
    assert (block.eval().drop(torch.ones(5, 3, 8)) == 1).all()
    rates = [b.drop_path for b in op.ViT(32, 8, 5, 16, 5, 2, 0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("shape", [(39, 39), (16, 64), (64, 64)])       # the first two have as many patches
def test_vit_refuses_images_of_another_size(shape):
    with pytest.raises(ValueError, match="32 pixels"):
        op.ViT(32, 8, 5, 16, 2, 2)(torch.zeros(1, 3, *shape))


@pytest.mark.parametrize("img_size, patch_size, heads", [(30, 4, 3), (32, 4, 5)])
def test_a_network_that_does_not_divide_is_refused(img_size, patch_size, heads):
    with pytest.raises(ValueError, match="divide"):
        op.ViT(img_size, patch_size, 10, 48, 1, heads)


# ------------------------------------------------------------------------------------ 5 augmentation

def photograph(size=64):
    """A crop of matplotlib's photograph (3, size, size) uint8."""
    import matplotlib.cbook as cbook
    image = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    return T.pil_to_tensor(image.resize((size, size), Image.BICUBIC))


OFF = dict(crop=False, flip=(0, 0), randaug=False, jitter=0, erase=0, mixup=0, cutmix=0, smoothing=0)


def augmented(augment, images, labels=None):
    """On the device of the tests -> images and targets, back here."""
    labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    return [t.cpu() for t in augment(images.to(DEVICE), labels.to(DEVICE))]


@pytest.mark.parametrize("out", [24, 32, 80])
def test_crop_agrees_with_torchvision(out, monkeypatch):
    image = photograph(64)
    boxes = [(0, 0, 64, 64), (3, 7, 40, 50), (30, 20, 11, 13), (5, 0, 59, 20)]   # top left h w
    x = image.expand(len(boxes), -1, -1, -1)
    monkeypatch.setattr(op, "random_boxes", lambda *a, **k: torch.tensor(boxes).float().T.view(2, 2, -1))
    for flip in ((0, 0), (1, 0), (0, 1)):
        augment = op.Augment(out, 2, **{**OFF, "crop": True, "flip": flip}, mean=(0,) * 3, std=(1,) * 3)
        ours = augmented(augment, x)[0]
        for mine, box in zip(ours, boxes):
            theirs = T.resized_crop(image.float() / 255, *box, (out, out),
                                    T.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
            theirs = T.hflip(theirs) if flip[0] else T.vflip(theirs) if flip[1] else theirs
            assert (mine - theirs).abs().mean() < 1 / 255 and (mine - theirs).abs().max() < 1.01 / 255


def test_resampling_agrees_with_torchvision_to_rounding_errors():
    image = torch.rand(1, 2, 64, 64).to(DEVICE)
    for size, box in ((20, (3, 10, 57, 31)), (90, (50, 0, 14, 64)), (2, (0, 1, 64, 63)), (64, (0, 0, 64, 64))):
        top, left, height, width = (torch.tensor([float(n)], device=DEVICE) for n in box)
        ours = op.resample_rows(image, top, height, size).mT
        ours = op.resample_rows(ours, left, width, size).mT
        theirs = T.resized_crop(image, *box, (size, size), T.InterpolationMode.BICUBIC, antialias=True)
        assert (ours - theirs).abs().max() < 2e-5
        backwards = op.resample_rows(image, top + height, -height, size)
        assert (backwards.flip(2) - op.resample_rows(image, top, height, size)).abs().max() < 2e-5


def test_random_boxes_have_the_areas_and_aspects_of_torchvision():
    torch.manual_seed(0)
    start, length = op.random_boxes(20_000, 64, (0.2, 1.0), (3 / 4, 4 / 3))
    assert (start >= 0).all() and (start + length <= 64).all()
    assert (start == start.round()).all() and (length == length.round()).all()
    (top, left), (height, width) = start, length
    from torchvision.transforms import RandomResizedCrop
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(torch.zeros(1, 64, 64), (0.2, 1.0), (3 / 4, 4 / 3))
                           for _ in range(20_000)]).float()
    for ours, other in ((top, theirs[:, 0]), (left, theirs[:, 1]), (height, theirs[:, 2]),
                        (width, theirs[:, 3]), (height * width, theirs[:, 2] * theirs[:, 3])):
        assert abs(ours.mean() - other.mean()) < 0.02 * other.mean() + 0.2
        assert abs(ours.std() / other.std() - 1) < 0.03


def test_random_erasing_replaces_a_box_by_noise():
    augment = op.Augment(32, 2, **{**OFF, "erase": 0.5})
    torch.manual_seed(0)
    out = augmented(augment, torch.zeros(2000, 32, 32, dtype=torch.uint8))[0]
    changed = (out != -1).any(1)                                # black is -1 after normalisation
    erased = changed.flatten(1).any(1)
    assert abs(erased.float().mean() - 0.5) < 0.04
    area = changed[erased].float().mean((1, 2))
    assert 0.015 < area.min() and area.max() < 0.36 and abs(area.mean() - 0.176) < 0.015
    rows, columns = changed[erased].any(2).sum(1), changed[erased].any(1).sum(1)
    assert (rows * columns == changed[erased].sum((1, 2))).all()                # a box
    noise = out.permute(0, 2, 3, 1)[changed]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mix_weighs_images_and_targets_alike(mixup, cutmix):
    augment = op.Augment(16, 4, **{**OFF, "mixup": mixup, "cutmix": cutmix, "smoothing": 0.1},
                         mean=(0,) * 3, std=(1,) * 3)
    images = torch.zeros(2, 16, 16, dtype=torch.uint8)
    images[0] = 255                                             # white is class 0, black class 3
    lams, boxes = [], 0
    for seed in range(300):
        torch.manual_seed(seed)
        x, target = augmented(augment, images, torch.tensor([0, 3]))
        lam = x[0].mean()
        expected = 0.9 * (lam * torch.eye(4)[0] + (1 - lam) * torch.eye(4)[3]) + 0.025
        assert torch.allclose(target[0], expected, atol=1e-5) and torch.allclose(target.sum(1), torch.ones(2))
        assert torch.allclose(x[0] + x[1], torch.ones(3, 16, 16), atol=1e-5)
        boxes += set(x.unique().tolist()) <= {0.0, 1.0}
        lams.append(lam.item())
    assert abs(np.mean(lams) - 0.5) < 0.08 if not cutmix else np.mean(lams) > 0.45
    assert {(0.8, 0.0): boxes <= 3, (0.0, 1.0): boxes == 300, (0.8, 1.0): 110 < boxes < 190}[mixup, cutmix]


def test_mixup_lambda_is_beta():
    augment = op.Augment(8, 2, **{**OFF, "mixup": 0.8})
    torch.manual_seed(0)
    x, target = torch.tensor([1.0, 0]).view(2, 1, 1, 1).expand(2, 3, 8, 8), torch.eye(2)
    pairs = [augment.mix(x, target) for _ in range(3000)]
    lams = np.array([targets[0, 0].item() for _, targets in pairs])
    assert np.allclose(lams, [images[0, 0, 0, 0].item() for images, _ in pairs], atol=1e-6)
    reference = np.random.default_rng(0).beta(0.8, 0.8, 100_000)
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert abs(np.quantile(lams, q) - np.quantile(reference, q)) < 0.03


def test_everything_off_resizes_and_normalises():
    image = photograph(48)[None]
    augment = op.Augment(32, 3, **OFF, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    x, target = augmented(augment, image, torch.tensor([2]))
    theirs = T.normalize(T.resize(image, 32, T.InterpolationMode.BICUBIC, antialias=True)[0] / 255,
                         (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert (x[0] - theirs).abs().max() < 2 / 255 / 0.2 and target.tolist() == [[0, 0, 1]]
    full = op.Augment(32, 3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))         # everything on
    assert torch.equal(full.plain(image.to(DEVICE)).cpu(), x)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 40, 48, dtype=torch.uint8), torch.rand(2, 3, 40, 40)])
def test_augmentation_refuses_what_is_not_square_or_not_uint8(images):
    with pytest.raises(ValueError, match="square uint8"):
        op.Augment(32, 3)(images, torch.tensor([0, 1]))


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_never_waits_for_the_device(channels):
    # The meta device knows only shapes: whoever asks it for a number, or mixes devices, is told so.
    images = torch.empty(16, channels, 40, 40, dtype=torch.uint8, device="meta")
    for seed in range(4):
        for off in ({}, {"randaug": False}, {"mixup": 0}, {"cutmix": 0}, OFF):
            augment = op.Augment(32, 10, **off)
            torch.manual_seed(seed)
            x, target = augment(images, torch.empty(16, dtype=torch.long, device="meta"))
            assert x.is_meta and target.is_meta and x.shape == (16, 3, 32, 32) and target.shape == (16, 10)


def augmentation(args):
    return op.make_augment(args, 10, flip=(0.5 * args.flip,) * 2, erase=0.5 * args.erase)


@pytest.mark.parametrize("switch", ["randaug", "crop", "aspect", "erase", "mixup", "cutmix", "flip", "jitter"])
def test_table_9_flag_switches_one_thing_off(switch):
    arguments = ["pretrain", "--device", "cpu", "--recipe", "paper", "--img-size", "32", "--patch-size", "4"]
    if switch == "jitter":
        arguments += ["--no-randaug"]
    fields = [vars(augmentation(resolved(*arguments, *more)))
              for more in ((), (f"--no-{switch}",))]
    changed = {k for k in fields[0] if fields[0][k] != fields[1][k]}
    # with RandAugment on, jitter is ignored (as in timm), so switching RandAugment off brings it back
    assert changed == {"aspect": {"ratio"}, "randaug": {"randaug", "jitter"}}.get(switch, {switch})


# ---------------------------------------------------------------------------------------- 6 training

def test_batches_visit_every_image_once_an_epoch():
    n, batch = 23, 8
    stream = torch.cat([op.batch_indices(n, batch, step, 0) for step in range(23)])     # 8 epochs
    for epoch in range(8):
        assert sorted(stream[epoch * n:(epoch + 1) * n].tolist()) == list(range(n))
    assert (stream[:n] != stream[n:2 * n]).any()
    assert (op.batch_indices(n, batch, 0, 1) != stream[:batch]).any()
    assert len(op.batch_indices(5, 32, 3, 0)) == 32             # a batch may hold several epochs


def test_schedule_and_weight_decay():
    rates = [op.learning_rate(s, 100, 10, 0.5) for s in range(100)]
    assert rates[0] == pytest.approx(0.05) and rates[9] == rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25) and 0 < rates[99] < 0.001
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    model = op.ViT(16, 8, 5, 16, 1, 2)
    names = {id(p): n for n, p in model.named_parameters()}
    for kind in ("adamw", "sgd"):
        decay, rest = op.make_optimizer(
            model, argparse.Namespace(optimizer=kind, lr=0.1, weight_decay=0.05)).param_groups
        assert decay["weight_decay"] == 0.05 and rest["weight_decay"] == 0
        assert {names[id(p)] for p in decay["params"]} == {
            "patch_embed.proj.weight", "head.weight", *(f"blocks.0.{n}.weight" for n in
                                                        ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))}


def test_a_step_computes_no_more_than_it_must():
    """2 FLOPs a product, forwards and twice backwards: the sum over layers, by hand."""
    from torch.utils.flop_counter import FlopCounterMode
    B, N, D, classes = 2, 17, 32, 10
    model = op.ViT(16, 4, classes, D, 3, 2)
    x, target = torch.randn(B, 3, 16, 16), torch.full((B, classes), 0.1)
    with FlopCounterMode(display=False) as count:
        args = argparse.Namespace(precision="fp32", clip_grad=0.0, optimizer="sgd", lr=0.1, weight_decay=0.0)
        op.train_step(model, op.make_optimizer(model, args), x, target, 0.1, args)
    block = N * 12 * D * D + 2 * N * N * D
    patches, head = (N - 1) * D * 48, D * classes
    assert count.get_total_flops() == 2 * B * (3 * 3 * block + 2 * patches + 3 * head)   # images need no gradient


def test_a_step_is_autograd_s_gradient_clipped_and_taken_by_the_optimizer():
    torch.manual_seed(0)
    model, plain = (op.ViT(16, 8, 5, 16, 1, 2) for _ in range(2))
    nn.init.normal_(model.head.weight)
    plain.load_state_dict(model.state_dict())
    x, target = torch.randn(4, 3, 16, 16), torch.rand(4, 5).softmax(1)
    args = argparse.Namespace(precision="fp32", clip_grad=0.1, optimizer="sgd", lr=9.0, weight_decay=0.0)
    loss, logits = op.train_step(model, op.make_optimizer(model, args), x, target, 0.3, args)
    want = -(target * plain(x).log_softmax(1)).sum(1).mean()
    want.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
    assert norm > 0.1 and abs(loss - want) < 1e-6 and (logits - plain(x)).abs().max() < 1e-5
    for p, q in zip(model.parameters(), plain.parameters()):    # Nesterov's first step is (1 + 0.9) gradients
        assert (p - (q - 0.3 * 1.9 * q.grad * 0.1 / norm)).abs().max() < 1e-6 and p.grad is None


def test_layer_norms_have_timm_s_epsilon():
    norms = [m for m in op.ViT(16, 8, 5, 32, 2, 2).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 5 and {norm.eps for norm in norms} == {1e-6}


def test_evaluation_is_the_accuracy_on_the_plain_images():
    torch.manual_seed(0)
    model, labels = op.ViT(16, 8, 10, 16, 1, 2, drop_path=0.5), torch.randint(10, (1203,))
    nn.init.normal_(model.head.weight)
    images = torch.randint(256, (1203, 3, 16, 16), dtype=torch.uint8)
    data = op.Data(labels, lambda i: images[i], "cpu")
    augment, args = op.Augment(16, 10), argparse.Namespace(device="cpu", rank=0, world=1, precision="fp32")
    got = op.evaluate(model.train(), data, augment, args)
    assert model.training
    right = model.eval()((images / 255 - 0.5) / 0.5).argmax(1) == labels
    assert got == pytest.approx(100 * right.double().mean().item(), abs=0.1) and got > 2     # an image may sit on the edge


class Enough(Exception):
    pass


@pytest.mark.parametrize("fresh", [False, True])
def test_a_training_step_on_kept_images_asks_the_device_for_nothing(fresh, monkeypatch, tmp_path):
    """The loop on the meta device, which has no numbers to tell: 5 steps between two lines of the log."""
    data = op.Data(torch.arange(64) % 10, lambda i: torch.empty(len(i), 40, 40, dtype=torch.uint8, device="meta"),
                   "meta", "fresh" if fresh else "random")
    args = resolved("pretrain", "--recipe", "paper", "--device", "cpu", "--out", tmp_path, "--img-size", 16,
                    "--patch-size", 8, "--model", "vit_nano", "--batch-size", 8, "--clip-grad", 1, "--erase",
                    "--save-every", 100, "--log-every", 100, "--precision", "fp32")
    args.device, asked, save_or_stop = "meta", [], op.Run.save_or_stop

    def stop_after_five(run):
        save_or_stop(run)
        if run.step == 5:
            raise Enough
    monkeypatch.setattr(op.Run, "save_or_stop", stop_after_five)
    monkeypatch.setattr(op.Run, "save_samples", lambda *_: asked.append(0))     # once, at the first step
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())       # has no meta
    monkeypatch.setattr(op, "make_optimizer", lambda model, args: torch.optim.SGD(model.parameters(), args.lr))
    with pytest.raises(Enough):
        op.train(args, op.make_model(args, 10).to("meta"), data, augmentation(args), 1000)
    assert asked == [0]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_training_step_never_waits_for_the_gpu():
    """The same with real numbers: CUDA raises an error where the CPU would wait for it."""
    args = resolved("pretrain", "--recipe", "paper", "--device", DEVICE, "--img-size", 32, "--patch-size", 8,
                    "--model", "vit_nano", "--batch-size", 16, "--clip-grad", 1)
    data, model, augment = opened("--L", 10), op.make_model(args, 10).to(DEVICE), augmentation(args)
    optimizer, losses = op.make_optimizer(model, args), []
    try:
        for step in range(12):
            if step == 3:                                               # the first ones allocate
                torch.cuda.set_sync_debug_mode("error")
            x, target = augment(*data[op.batch_indices(10, 16, step, 0)])
            losses.append(op.train_step(model, optimizer, x, target, 1e-3, args)[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


# ---------------------------------------------------------------------------------------- 7 commands

@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Two kinds of stripes as 16x16 PNGs: train/ with 2 x 40, test/ with 2 x 10."""
    root, rng = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for part, n in (("train", 40), ("test", 10)):
        for label in (0, 1):
            folder = root / part / ("across", "down")[label]
            folder.mkdir(parents=True)
            for i in range(n):
                wave = 127 + 100 * np.sin(np.arange(16) * rng.uniform(1, 2) + rng.uniform(0, 6))
                image = np.tile(wave, (16, 1)) if label else np.tile(wave[:, None], (1, 16))
                image = (image + rng.normal(0, 10, (16, 16))).clip(0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / f"{i}.png")
    return root


TINY = ["--device", "cpu", "--recipe", "nano", "--img-size", "16", "--patch-size", "4", "--precision", "fp32"]


def run(*arguments, cwd=None):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True,
                          text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A short real pre-training, run as a user runs it."""
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    done = run("pretrain", "--delta", 0.1, "--sigma", 3.5, "--L", 8, "--steps", 160, "--batch-size", 64,
               "--canvas", 32, "--points", 2000, "--warmup", 0.1, "--log-every", 20, *TINY, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_pretraining_learns_and_its_folder_explains_itself(pretrained):
    out, printed = pretrained
    assert "images/s" in printed and "left" in printed and "lr 9.99" in printed and "160 steps of 64" in printed
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    assert log[-1]["loss"] < 0.75 * math.log(8) and log[-1]["images"] == 160 * 64
    args = json.loads((out / "args.json").read_text())
    assert args["delta"] == 0.1 and args["L"] == 8 and args["lr"] == 1e-3
    fractal = json.loads((out / "omega.json").read_text())
    base, eps = torch.tensor(fractal["base"]), torch.tensor(fractal["eps"])
    assert (base == op.base_ifs(2, 3.5, args["fractal_seed"])).all()
    assert eps.shape == (8, 2, 2, 3) and eps.abs().max() <= 0.05 + 1e-6
    assert Image.open(out / "samples.png").size[0] > 100 and Image.open(out / "curve.png").size[0] > 100
    saved = torch.load(out / "last.pt", weights_only=True)
    assert saved["step"] == 160 and saved["model"]["head.weight"].shape[0] == 8


def test_finetuning_from_a_checkpoint(pretrained, image_folder, tmp_path):
    done = run("finetune", "--ckpt", pretrained[0] / "last.pt", "--data", "folder", "--root", image_folder,
               "--epochs", 30, "--eval-epochs", 15, "--batch-size", 16, "--lr", 0.03, *TINY,
               "--out", tmp_path / "ft")
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in open(tmp_path / "ft" / "log.jsonl")]
    tests = [r for r in log if "test_top1" in r]
    assert len(tests) == 2 and tests[-1]["test_top1"] >= 90
    assert "test top-1" in done.stdout


def test_fine_tuning_erases_half_as_often_as_pre_training(image_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(op, "train", lambda args, model, data, augment, *rest: seen.append(augment.erase))
    for command in (["pretrain", "--L", "4"], ["finetune", "--data", "folder", "--root", str(image_folder)]):
        assert op.main([*command, "--erase", "--batch-size", "8", "--canvas", "32", *TINY, "--out", str(
            tmp_path / command[0])] if command[0] == "pretrain" else [
            *command, "--erase", "--batch-size", "8", *TINY, "--out", str(tmp_path / "f")]) == 0
    assert seen == [0.5, 0.25]


def test_images_and_loss_are_the_same_with_kept_memory(tmp_path):
    flags = ["pretrain", "--L", "4", "--steps", "3", "--batch-size", "8", "--canvas", "32", "--points", "500",
             "--log-every", "1", *TINY]
    code = "import sys, onepfrac as op; op.keep_memory = lambda: None; sys.exit(op.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *flags, "--out", str(tmp_path / "returned")], cwd=SCRIPT.parent,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert done.returncode == 0 and op.main([*flags, "--out", str(tmp_path / "kept")]) == 0
    torch.set_num_threads(threads)
    losses = [[r["loss"] for r in read_log(tmp_path / name)] for name in ("kept", "returned")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


# ========================================================================================== PART TWO

# -------------------------------------------------------------------------- A RandAugment and jitter

def pillow(name, image, m, sign):
    """timm's reading of the operation at magnitude m, on Pillow."""
    size, level = image.size[0], m / 10
    enhance = 1 + sign * 0.9 * level
    affine = lambda *row: image.transform(image.size, Image.AFFINE, row, Image.BILINEAR,
                                          fillcolor=(128,) * 3 if image.mode == "RGB" else 128)
    lut = [min(255, i + int(level * 110)) if i < 128 else i for i in range(256)]
    return {
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "posterize": lambda: image.point([i & ~(2 ** (8 - (4 - int(level * 4))) - 1)
                                          for i in range(256)] * len(image.getbands())),
        "solarize": lambda: ImageOps.solarize(image, 256 - int(level * 256)),
        "solarize_add": lambda: image.point(lut * len(image.getbands())),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(enhance),
        "color": lambda: ImageEnhance.Color(image).enhance(enhance),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(enhance),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(enhance),
        "rotate": lambda: image.rotate(sign * level * 30, Image.BILINEAR,
                                       fillcolor=(128,) * 3 if image.mode == "RGB" else 128),
        "shear_x": lambda: affine(1, sign * 0.3 * level, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, sign * 0.3 * level, 1, 0),
        "translate_x": lambda: affine(1, 0, sign * 0.45 * level * size, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, sign * 0.45 * level * size),
    }[name]()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", op.OPS)
def test_randaugment_operation_agrees_with_pillow(name, mode):
    image = T.to_pil_image(photograph(64)).convert(mode)
    dark = image.point([40 + i // 3 for i in range(256)] * len(mode))     # leaves room to stretch
    for picture in (image, dark):
        x = T.pil_to_tensor(picture)[None].float().to(DEVICE)
        for m, sign in ((9.0, 1.0), (9.0, -1.0), (3.7, 1.0), (10.0, -1.0), (0.0, 1.0)):
            ours = op.apply_op(x, torch.tensor([op.OPS.index(name)]), torch.tensor([m]),
                               torch.tensor([sign]))[0].cpu()
            theirs = T.pil_to_tensor(pillow(name, picture, m, sign)).float()
            wrong = (ours - theirs).abs()
            if name in op.AFFINE_OPS:       # at its border Pillow does not blend with the fill
                assert (wrong > 0).float().mean() < 0.05
            else:
                assert wrong.max() <= 1 and wrong.mean() < 0.1


def test_each_sample_gets_its_own_operation():
    x = photograph(32).float().to(DEVICE).expand(len(op.OPS) + 1, -1, -1, -1)
    which, level, sign = torch.arange(16), torch.full((16,), 9.0), torch.ones(16)
    together = op.apply_op(x, which, level, sign)
    for k in range(15):
        alone = op.apply_op(x[:1], which[k:k + 1], level[:1], sign[:1])
        assert (together[k] - alone[0]).abs().max() <= 1        # a product of another shape rounds
        assert (together[k] != x[k]).any()
    assert (together[15] == x[15]).all()                        # 15: no operation


def test_randaugment_draws_two_of_fifteen_with_probability_half(monkeypatch):
    calls = []
    monkeypatch.setattr(op, "apply_op", lambda x, o, m, s: calls.append((o, m, s)) or x)
    augment = op.Augment(8, 2, **{**OFF, "randaug": True})
    torch.manual_seed(0)
    augment(torch.zeros(30_000, 8, 8, dtype=torch.uint8), torch.zeros(30_000, dtype=torch.long))
    assert len(calls) == 2
    for which, magnitude, sign in calls:
        share = torch.bincount(which, minlength=16) / 30_000
        assert abs(share[15] - 0.5) < 0.015 and (share[:15] - 1 / 30).abs().max() < 0.006
        assert abs(magnitude.mean() - 9) < 0.03 and 0.45 < magnitude.std() < 0.5
        assert magnitude.max() == 10 and set(sign.tolist()) == {-1, 1} and abs(sign.float().mean()) < 0.03
    assert abs(((calls[0][0] < 15) & (calls[1][0] < 15)).float().mean() - 0.25) < 0.015


def test_color_jitter_agrees_with_torchvision():
    x = photograph(32).float()[None].to(DEVICE)
    for factor in (0.6, 1.0, 1.37):
        f = torch.tensor([factor])
        for k, adjust in enumerate((T.adjust_brightness, T.adjust_saturation, T.adjust_contrast)):
            ours = op.blend(x, torch.tensor([k]), f)[0]
            assert (ours - adjust(x[0].to(torch.uint8), factor).float()).abs().max() <= 1.01
    augment = op.Augment(32, 2, **{**OFF, "jitter": 0.4}, mean=(0,) * 3, std=(1,) * 3)
    torch.manual_seed(0)
    out = augmented(augment, torch.full((4000, 8, 8), 100, dtype=torch.uint8))[0]
    level = out.mean((1, 2, 3)) * 255                           # flat grey: only brightness shows
    assert 59 <= level.min() < 62 and 138 < level.max() <= 140


# ------------------------------------------------------------------------------------ B other images

def maps_and_probs(data):
    """Of the categories of FractalDB."""
    systems = data.numbers["systems"]
    return systems, systems[..., :2].det().abs()


def test_a_category_is_a_base_system_and_an_instance_one_of_its_variations():
    few, many = opened("--categories", 2, "--instances", 101), opened("--categories", 3)
    assert len(few) == 202 and few.labels.tolist() == [0] * 101 + [1] * 101
    assert many.labels.tolist() == [0, 1, 2]
    (maps, probs), (many_maps, many_probs) = maps_and_probs(few), maps_and_probs(many)
    assert (maps == many_maps[:2]).all()          # the first of C categories
    assert (few.images[[0, 101]] == many.images[:2]).all()              # OFDB: the first instance
    assert ((many_probs > 0).sum(1) >= 2).all()
    assert many_maps.abs().max() <= 1
    images = few.images[:101]
    assert (images[25] == images[0].flip(0)).all() and (images[50] == images[0].flip(1)).all()
    assert (images[75] == images[0].flip(0, 1)).all() and (images[100] == images[0]).all()
    maps = maps[0].clone()
    maps[:, 1, 1] *= 1.8                                                # d, the fifth of six numbers
    drawn = render(maps[None], 64, 2000, "fill", seeded(op.seed_for(0, "maps")), probs[0])
    assert (images[20].cpu() == drawn[0]).all()


def test_searched_categories_fill_a_fifth_of_the_canvas_over_their_whole_box():
    for system, p in zip(*maps_and_probs(opened("--categories", 3, "--fractal-seed", 0)), strict=True):
        v, points = np.zeros(2), []
        rng = np.random.default_rng(0)
        system, p = system.double().numpy(), p.double().numpy()
        for j in rng.choice(7, 100_000, p=p / p.sum()):
            v = system[j, :, :2] @ v + system[j, :, 2]
            points.append(v)
        points = np.array(points[30:])
        cell = ((points - points.min(0)) / np.ptp(points, 0) * 499).astype(int)
        assert len(np.unique(cell[:, 0] * 1000 + cell[:, 1])) > 0.19 * 512 ** 2


def test_noise_clouds_have_the_moments_of_their_numbers():
    source = opened("--source", "gaussian", "--texture", "point", "--L", 3, "--delta", 1.0, "--canvas", 512)
    theta = source.numbers["base"] + source.numbers["eps"]
    generator = seeded(32)
    z = torch.randn(2, 2000, generator=generator).double()
    for image, some in zip(source.images.cpu(), theta.double()):
        covariance = (some[:, 1:] + some[:, 1:].T) / 2
        value, vector = np.linalg.eigh(covariance.numpy())
        root = torch.tensor(vector @ np.diag(np.sqrt(value)) @ vector.T)
        points = root @ z + some[:, 0, None]
        pixel = (points * torch.tensor([[1], [-1]]) + 3) / 6 * (512 - 1 - 12) + 6.5
        inside = (points.abs() <= 3).all(0)
        cells = {(int(y), int(x)) for x, y in pixel.T[inside].tolist()}
        lit = {tuple(c) for c in image.nonzero().tolist()}
        assert len(cells ^ lit) <= 0.01 * len(cells)            # float32 against float64
    source = opened("--source", "uniform", "--L", 4, "--delta", 0.5, "--texture", "point", "--canvas", 512)
    theta = source.numbers["base"] + source.numbers["eps"]
    for image, ((left, right), (low, high)) in zip(source.images.cpu(), theta.tolist()):
        rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
        seen = torch.tensor([columns[0], columns[-1], rows[-1], rows[0]])
        want = torch.tensor([left, right, -low, -high]) / 3 * 499 + 256
        assert (seen - want).abs().max() < 3


@pytest.mark.parametrize("kind, background", [("rcdb", 255), ("va", 0)])
def test_contours_are_the_lines_that_the_authors_draw(kind, background):
    """Their loop: one line from each vertex to the next, and from the last to the first."""
    from PIL import ImageDraw
    for category in range(4):
        offsets, centre, greys = op.contour(kind, 0, category, 1)
        theirs = Image.new("L", (512, 512), background)
        for polygon, grey in zip(offsets, greys.tolist()):
            x, y = (centre + polygon).astype(np.float32).T.tolist()
            for k in range(len(x)):
                ImageDraw.Draw(theirs).line((x[k - 1], y[k - 1], x[k], y[k]), fill=grey, width=1)
        ours = op.draw_contour(offsets, centre, greys, 512, background).numpy()
        assert (ours == np.array(theirs)).all() and 0.01 < (ours != background).mean() < 0.9
        small = op.draw_contour(offsets, centre, greys, 128, background)
        large = F.max_pool2d((torch.tensor(ours) != background).float()[None], 4)[0] > 0
        near = op.dilate(large[None].to(torch.uint8))[0] > 0
        assert small.shape == (128, 128) and not ((small != background) & ~near).any()


@pytest.mark.parametrize("kind", ["rcdb", "va"])
def test_contours_have_the_numbers_of_the_authors(kind):
    counts, growth, radii = [], [], []
    for category in range(300):
        offsets, centre, greys = op.contour(kind, 0, category, 0)
        P, V, _ = offsets.shape
        assert 1 <= P <= 200 and (3 <= V <= 200 if kind == "rcdb" else 200 <= V <= 1000)
        assert greys.shape == (P,) and -0.1 <= centre.min() and centre.max() <= 512.1
        counts.append(V)
        radii.append(offsets[0, 0, 0])                                  # the vertex at angle 0 moves along x
        growth += np.diff(offsets[:, 0, 0])[:1].tolist()
    assert len(set(counts)) > 100
    assert 1.8 < np.mean(growth) < 2.3                                  # c + w, c U(0, 4), w U(0, 0.1)
    assert (min(radii) < 5 and 140 < max(radii) < 207) if kind == "rcdb" else (8 < min(radii) and max(radii) < 130)
    a, b = op.contour(kind, 0, 5, 0), op.contour(kind, 0, 5, 1)
    assert a[0].shape == b[0].shape and (a[0] != b[0]).any() and (a[1] != b[1]).any()


def test_perlin_noise_has_the_moments_of_the_authors_package():
    """A plain loop over the package's formula: the slope is (hash & 7) + 1, or -1 where hash & 8."""
    rng = np.random.default_rng(0)
    hashes, f = rng.integers(256, size=(2, 200_000)), rng.random(200_000)
    left, right = (np.where(h & 8, -1, (h & 7) + 1) for h in hashes)
    fade = 6 * f ** 5 - 15 * f ** 4 + 10 * f ** 3
    theirs = 0.4 * ((1 - fade) * left * f + fade * right * (f - 1))
    ours = op.perlin_noise((200_000,), np.random.RandomState(0))
    # pnoise1 of the package at 200,000 random places: 0.3285; its 256 hashes are not quite random
    assert 0.317 < theirs.std() < 0.33 and 0.317 < ours.std() < 0.33 and abs(ours.mean()) < 0.005
    assert np.abs(np.quantile(ours, np.linspace(0.01, 0.99, 50))
                  - np.quantile(theirs, np.linspace(0.01, 0.99, 50))).max() < 0.02


def test_the_two_waves_of_a_visual_atom_differ():
    """Equal ones would make a single wave of twice the height: of its growth, the spectrum's peak."""
    for category in range(60):
        offsets, _, _ = op.contour("va", 0, category, 0)
        if len(offsets) < 100:
            continue
        growth = (offsets[-1] - offsets[0]).astype(float)
        angle = np.arange(len(growth)) * 2 * math.pi / len(growth)
        rings = (growth * np.stack([np.cos(angle), np.sin(angle)], 1)).sum(1) / (len(offsets) - 1)
        waves = 2 * np.abs(np.fft.rfft(rings)[1:21].imag) / len(growth)
        assert waves.max() < 0.75                                       # 0.5 each, 1 if they were equal


def test_a_perturbed_contour_scales_the_radii():
    source = opened("--source", "va", "--L", 3, "--canvas", 128)
    offsets, centre, greys = op.contour("va", 32, int(source.numbers["category"]), 0)
    eps = source.numbers["eps"]
    assert eps.shape == (3, len(greys)) and eps.abs().max() <= 0.05
    for k in range(3):
        larger = (offsets.T * (1 + eps[k].numpy())).T                   # each polygon by its own factor
        assert (op.draw_contour(larger, centre, greys, 128, 0) != source.images[k].cpu()).float().mean() < 0.002
    assert ((source.images > 0).flatten(1).float().mean(1) > 0.1).all()


# Edges of the shapes below by cv2.Canny(smoothed, 100, 200), one bit a pixel.
CANNY = (
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAD/gAAAAAAAAwBgAAAAAAAMADgAAAAAABgADAAAAAAAMAAGAAAAAAAgAAIAAAAAAEAAAwAA"
    "AAAAQAABAAAAAACAAACAAAAAAIAAAIAAAAAAgAAAgAAAAACAAACAAAAAAIAAAIAAAAAAgAAAgAAAAACAAACAAAAAAIAAAIAAAAAA"
    "gAAAgAAAAABAAAEAAAAAAGAAAwAAAAAAIAACAAAAAAAwAAYAAAAAABgADAAAAAAADgA4AB/gAAADgOAH4B8AAAB/AAQAAQAAAAAA"
    "BAABAAAAAAAEAAEAAAAAAAgAAQAAAAAABAABAAAAAAAEAACAAAAAAAQAAIAAAAAABAAAgAAAAAAIAACAAAAAAAgAAIAAAAAACAAB"
    "AAAAAAAEAAEAAAAAAAQAAQAAAAAAB55/AAAAAAAAYYAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")


def test_canny_is_opencv_s():
    y, x = np.mgrid[:64, :64]
    shapes = 40 + 90 * ((x - 20) ** 2 + (y - 24) ** 2 < 150) + 3 * ((x + 2 * y) // 3 % 40 > 24) * (x > 30)
    shapes += 70 * ((x > 36) & (x < 56) & (y > 34) & (y < 50)) + (x * y // 60)
    expected = np.unpackbits(np.frombuffer(base64.b64decode(CANNY), np.uint8)).reshape(64, 64)
    edges = op.canny(torch.tensor(shapes.clip(0, 255), dtype=torch.uint8))
    assert (edges.numpy() == 255 * expected).all() and 100 < expected.sum() < 1000


def test_canny_follows_weak_edges_only_from_strong_ones():
    image = torch.zeros(64, 64, dtype=torch.uint8)
    image[:, 32:] = torch.linspace(25, 120, 64).to(torch.uint8)[:, None]    # a border that fades
    edges = op.canny(image) > 0
    assert edges.sum(1).max() == 1                                          # thin
    strong, weak = (edges[:, 28:36].any(1).nonzero()[0, 0] for edges in (
        op.canny(image, 200, 200) > 0, op.canny(image, 100, 200) > 0))
    assert weak < strong                                                    # goes on beyond the strong part
    faint = image // 2
    assert not op.canny(faint, 110, 255).any() and op.canny(faint, 60, 100).any()


def test_warps_leave_the_image_alone_at_zero_and_agree_with_torch():
    image = torch.rand(1, 3, 32, 32, generator=seeded(0))
    for kind, base in op.WARPS.items():
        grid = op.warp_grid(kind, base[None], 32)
        assert (F.grid_sample(image, grid, align_corners=False) - image).abs().max() < 1e-4
        moved = op.warp_grid(kind, op.perturb(base, 0.3, 2, seeded(1)), 32)
        assert moved.shape == (2, 32, 32, 2) and (moved[0] - moved[1]).abs().max() > 0.01
    theta = op.perturb(op.WARPS["affine"], 0.4, 3, seeded(2))
    ours = op.warp_grid("affine", theta, 32)
    assert (ours - F.affine_grid(theta, (3, 1, 32, 32), align_corners=False)).abs().max() < 1e-6
    assert (op.warp_grid("polynomial", F.pad(theta, (0, 3)), 32) - ours).abs().max() < 1e-6
    h = torch.eye(3)[None].repeat(3, 1, 1)
    h[:, :2] = theta
    assert (op.warp_grid("homography", h, 32) - ours).abs().max() < 1e-6
    h[:, 2] = torch.tensor([0.2, -0.1, 1.1])
    x, y = -1 + (2 * 5 + 1) / 32, -1 + (2 * 9 + 1) / 32                     # column 5, row 9
    want = h[1].double() @ torch.tensor([x, y, 1.0], dtype=torch.float64)
    assert (op.warp_grid("homography", h, 32)[1, 9, 5] - want[:2] / want[2]).abs().max() < 1e-5
    bend = torch.zeros(1, 2, 6)
    bend[:, :, :3] = torch.eye(2, 3)
    bend[0, 0, 4] = 0.3
    assert abs(op.warp_grid("polynomial", bend, 32)[0, 9, 5, 0] - (x + 0.3 * x * y)) < 1e-6


def test_one_photograph_gives_classes_that_differ_by_their_warp():
    from matplotlib import cbook
    photo = op.square(op.read_image(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)), 64)
    for edges in ("none", "canny"):
        source = opened("--source", "image", "--L", 6, "--edges", edges, "--delta", 0.2)
        assert source.images.shape == (6, 3 if edges == "none" else 1, 64, 64)
        assert source.labels.tolist() == list(range(6))
        assert (source.images[0] != source.images[1]).any()
        still = opened("--source", "image", "--L", 2, "--edges", edges, "--delta", 0.0)
        want = photo if edges == "none" else op.canny(op.to_grey(photo[None].float())[0, 0].to(torch.uint8))
        assert (still.images.cpu() == want).all()


def test_candidates_that_fill_too_little_are_passed_over_in_order_and_none_is_an_error():
    levels, seen = [0.1, 0.9, 0.3, 0.8, 0.7, 0.2], []

    def draw(batch):
        seen.append(len(batch))
        return (torch.arange(100) < 100 * batch).view(-1, 10, 10)       # so much of it is filled
    batches = torch.tensor(levels)[:, None].split(4)
    kept = op.first_filled(3, lambda rest=iter(batches): next(rest), draw, 0.5, "--flag")
    assert torch.equal(kept[:, 0], torch.tensor([0.9, 0.8, 0.7])) and seen == [4, 2]
    with pytest.raises(op.InputError, match="--flag 7"):
        op.first_filled(3, lambda: batches[0][:1], draw, 0.5, "--flag 7")
    assert len(seen) < 2000


# ----------------------------------------------------------------------------- C downstream datasets

def test_balanced_subset_is_fixed_balanced_and_holds_out_training_images():
    labels = torch.arange(1000) % 7
    train, held = op.balanced_subset(labels, 40, 0.25)
    assert torch.bincount(labels[train]).tolist() == [30] * 7 and torch.bincount(labels[held]).tolist() == [10] * 7
    assert not set(train.tolist()) & set(held.tolist())
    again, none = op.balanced_subset(labels, 40)
    assert len(none) == 0 and set(again.tolist()) == set(train.tolist()) | set(held.tolist())
    assert set(op.balanced_subset(labels, 20)[0].tolist()) <= set(again.tolist())
    with pytest.raises(op.InputError, match="--train-per-class 200"):
        op.balanced_subset(labels, 200)


@pytest.mark.parametrize("name", op.DATASETS)
def test_named_datasets_are_opened_by_arguments_that_torchvision_knows(name, tmp_path, monkeypatch):
    from torchvision import datasets
    kind, calls = getattr(datasets, op.DATASETS[name][0]), []

    class Fake(torch.utils.data.Dataset):
        def __init__(self, *arguments, **named):
            calls.append(inspect.signature(kind).bind(*arguments, **named).arguments)

        def __len__(self):
            return 10

    monkeypatch.setattr(datasets, kind.__name__, Fake)
    args = argparse.Namespace(data=name, root=tmp_path, holdout=0.0)
    train, test = op.open_datasets(args)
    if not inspect.signature(kind).parameters.keys() & {"split", "train"}:      # no official split
        assert calls == [{"root": tmp_path}] * 2 and args.holdout == 0.2
        return
    assert args.holdout == 0.0 and len(train) == len(test) == 10
    defaults = {k: v.default for k, v in inspect.signature(kind).parameters.items()}
    splits = [(defaults | c).get("split", (defaults | c).get("train")) for c in calls]
    assert splits[0] in (True, "train", "trainval", "train-standard") and splits[1] in (False, "test", "val")
    source = inspect.getsource(kind)                            # where torchvision lists the splits, ours are there
    assert splits[1] is False or f'"{splits[1]}"' in source


def test_named_dataset_is_found_or_downloaded_and_split_if_it_must_be(tmp_path, monkeypatch):
    from torchvision import datasets
    calls = []

    class Fake(torch.utils.data.Dataset):
        def __init__(self, root, download=False):
            calls.append(download)
            if not download:
                raise RuntimeError("Dataset not found")
            self.targets = [i % 10 for i in range(50)]

        def __len__(self):
            return 50

        def __getitem__(self, i):
            return Image.new("RGB", (16, 16), (i, i, i)), self.targets[i]

    monkeypatch.setattr(datasets, "EuroSAT", Fake)

    def split():
        args = argparse.Namespace(data="eurosat", root=tmp_path, holdout=0.0, lead=True, world=1, train_per_class=None,
                                  batch_size=16, img_size=16, device="cpu")
        train, test, classes = op.downstream_data(args)
        assert (len(train), len(test), classes) == (40, 10, 10)
        assert train.labels.bincount().tolist() == [4] * 10 and test.labels.bincount().tolist() == [1] * 10
        return [data.images[:, 0, 0, 0].tolist() for data in (train, test)]      # which ones
    train, test = split()
    assert calls[:3] == [False, True, True] and sorted(train + test) == list(range(50))
    assert split() == [train, test]


def test_small_and_streamed_sets_give_the_same_batches(image_folder, monkeypatch):
    dataset, _ = op.open_datasets(argparse.Namespace(data="folder", root=image_folder))
    chosen = torch.arange(len(dataset))
    args = argparse.Namespace(img_size=16, device=DEVICE)
    small = op.folder_data(dataset, chosen, args)
    monkeypatch.setattr(op, "KEEP_BYTES", 0)
    large = op.folder_data(dataset, chosen, args)
    assert small.images is not None and large.images is None
    order = [torch.tensor([3, 1, 2]), torch.tensor([0, 5])]
    for i in order:
        (a, b), (c, d) = small[i], large[i]
        want = torch.stack([T.pil_to_tensor(dataset[k][0]) for k in i])
        assert a.dtype == torch.uint8 and (a.cpu() == want).all() and (a == c).all()
        assert (b == d).all() and b.tolist() == [dataset[k][1] for k in i]


def test_small_pictures_stay_only_where_all_are_small(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(4):
            size = 8 if (folder, i) == ("a", 0) else 60
            Image.new("RGB", (size, size), (9, 9, 9)).save(tmp_path / folder / f"{i}.png")

    def side(img_size):
        args = argparse.Namespace(img_size=img_size, device="cpu")
        dataset = op.open_folder(tmp_path)
        return op.folder_data(dataset, torch.arange(len(dataset)), args).images.shape[1:]
    assert side(28) == (3, 32, 32)
    (tmp_path / "a" / "0.png").unlink()
    assert side(64) == (3, 60, 60)


def test_other_shapes_are_resized_and_cropped_to_the_middle(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        picture.save(tmp_path / folder / "1.png")
    args = argparse.Namespace(img_size=28, device="cpu")
    images = op.folder_data(op.open_folder(tmp_path), torch.arange(2), args).images
    want = T.pil_to_tensor(T.resize(picture.crop((16, 0, 64, 48)), 32))        # at the crop's border Pillow sees beyond
    assert images.shape == (2, 3, 32, 32) and (images[..., 2:-2] == want[..., 2:-2]).all()


def test_sixteen_bits_and_other_modes_are_read_as_they_look(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    eight = Image.fromarray((ramp // 256).astype(np.uint8))
    for name, image in (("L", eight), ("P", eight.convert("P")), ("RGBA", eight.convert("RGBA")),
                        ("LA", eight.convert("LA"))):
        image.save(tmp_path / f"{name}.png")
        assert (np.asarray(op.read_image(tmp_path / f"{name}.png")) == np.asarray(eight.convert("RGB"))).all()
    assert (np.asarray(op.read_image(tmp_path / "deep.png")) == np.asarray(eight.convert("RGB"))).all()


def test_linked_folders_are_followed_but_not_in_circles(image_folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "a").symlink_to(image_folder / "train" / "across")
    (linked / "b").symlink_to(image_folder / "train" / "down")
    assert len(op.open_folder(linked)) == 80
    for name, other in (("a", "b"), ("b", "a")):            # each in the other
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "round").symlink_to(tmp_path / other)
    with pytest.raises(op.InputError, match="--root.*links to a folder"):
        op.open_folder(tmp_path)


# -------------------------------------------------------------------------------------------- D runs

def outcome(folder):
    """What must be the same: the log, in both its places, but for its times; weights and moments."""
    saved = torch.load(folder / "last.pt", weights_only=True)
    logs = [[{k: v for k, v in record.items() if k not in ("seconds", "images_per_s")} for record in log]
            for log in (read_log(folder), saved["log"])]
    tensors = {f"model {k}": t for k, t in saved["model"].items()}
    tensors |= {f"{k} of {p}": t for p, state in saved["optimizer"]["state"].items() for k, t in state.items()}
    return logs, tensors


def assert_same(a, b):
    """The same bits; on a GPU, where sums have no order, the same losses but for rounding."""
    (logs, tensors), (other_logs, others) = outcome(a), outcome(b)
    assert logs[0] == logs[1] and other_logs[0] == other_logs[1] and tensors.keys() == others.keys()
    if DEVICE == "cpu":
        assert logs == other_logs and all(torch.equal(tensors[k], others[k]) for k in tensors)
    else:
        assert [r["step"] for r in logs[0]] == [r["step"] for r in other_logs[0]]
        for key in ("loss", "lr"):
            one, two = ([r[key] for r in log if key in r] for log in (logs[0], other_logs[0]))
            assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize("streamed, step", [(False, 1), (False, 5), (True, 4)])
def test_a_signal_saves_and_resuming_is_bit_identical(streamed, step, image_folder, tmp_path, monkeypatch, capfd):
    """Also between two lines of the log, and with images that threads read anew at each step."""
    arguments = ["--batch-size", "16", "--log-every", "3", "--save-every", "100", "--randaug", "--mixup", "--erase",
                 "--drop-path", "0.1", *TINY, "--device", DEVICE]
    if streamed:
        monkeypatch.setattr(op, "KEEP_BYTES", 0)
        arguments = ["finetune", "--data", "folder", "--root", str(image_folder),
                     "--epochs", "1.6", "--eval-epochs", "0.6", *arguments]
    else:
        arguments = ["pretrain", "--L", "8", "--steps", "8", "--canvas", "32", "--points", "1000",
                     "--fresh-texture", *arguments]
    assert op.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    train_step, calls = op.train_step, []

    def signalled(*inputs):
        calls.append(0)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*inputs)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)       # ignored where tests run in a background
    with monkeypatch.context() as patch:
        patch.setattr(op, "train_step", signalled)
        with pytest.raises(SystemExit) as stop:
            op.main([*arguments, "--out", str(tmp_path / "b")])
        assert stop.value.code == 128 + signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)        # as under nohup: the run goes on
        calls.clear()
        assert op.main([*arguments, "--out", str(tmp_path / "c")]) == 0
    signal.signal(signal.SIGINT, before)
    assert f"stopped after step {step} of 8" in capfd.readouterr().err
    assert torch.load(tmp_path / "b" / "last.pt", weights_only=True)["step"] == step
    with open(tmp_path / "b" / "log.jsonl", "a") as log:       # as if killed later, between a line and a checkpoint
        log.write('{"step": 6, "loss": 0.1}\n{"ste')
    assert op.main([*arguments, "--out", str(tmp_path / "b"), "--resume"]) == 0
    for other in "bc":
        assert_same(tmp_path / "a", tmp_path / other)
    assert len(read_log(tmp_path / "a")) > 2


def test_progress_in_a_pipe_is_plain_lines(pretrained):
    printed = pretrained[1]
    assert "\r" not in printed and printed.endswith("\n")
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{s}/160" for s in range(20, 161, 20)]
    assert all(re.fullmatch(r"step \d+/160  loss \d\.\d{3}  top-1 [\d.]+%  lr \d\.\d\de-\d\d  \d+ images/s  \d+:\d\d left",
                            line) for line in lines)


def test_progress_on_a_terminal_is_one_line_that_changes(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert op.main(["finetune", "--data", "folder", "--root", str(image_folder), "--epochs", "2", "--eval-epochs", "1",
                    "--batch-size", "16", "--log-every", "2", *TINY, "--out", str(tmp_path)]) == 0
    before, *updates = capsys.readouterr().out.split("\r")
    assert "step " not in before and before.endswith("\n")
    training = [u for u in updates if "  loss " in u]
    tests = [u for u in updates if "  test top-1 " in u]
    assert len(training) == 5 and len(tests) == 2 and len(updates) == 7
    assert all(u.startswith("step ") and len(u.rstrip("\n")) >= 99 for u in updates)   # covers what was there
    assert not any("\n" in u for u in training)                # each is overwritten by what follows
    assert all(u.rstrip("\n").count("\n") == 0 and u.endswith("\n") for u in tests)    # these stay


def test_a_terminal_s_last_training_line_is_closed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert op.main(["pretrain", "--L", "4", "--steps", "4", "--batch-size", "8", "--canvas", "32", "--points", "500",
                    "--log-every", "2", *TINY, "--out", str(tmp_path)]) == 0
    _, first, last = capsys.readouterr().out.split("\r")
    assert "\n" not in first and last.count("\n") == 1 and last.endswith("\n") and last.startswith("step 4/4")


def test_what_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, monkeypatch, capsys):
    flags = ["pretrain", "--L", "4", "--steps", "6", "--batch-size", "8", "--canvas", "32", "--points", "500",
             "--save-every", "2", "--log-every", "100", *TINY, "--out", str(tmp_path)]
    train_step, calls = op.train_step, []

    def spoil(network, *rest):
        result = train_step(network, *rest)
        calls.append(0)
        if len(calls) == 4:                                 # the loss is still finite
            network.blocks[2].mlp.fc1.weight.data[0, 0] = math.inf
        return result

    monkeypatch.setattr(op, "train_step", spoil)
    assert op.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step 4" in error and "--lr 0.001" in error and "nothing is saved" in error
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["step"] == 2 and all(t.isfinite().all() for t in saved["model"].values())
    monkeypatch.undo()
    torch.save(saved | {"seconds": 1000.0}, tmp_path / "last.pt")
    assert op.main([*flags, "--resume"]) == 0
    assert 1000 <= read_log(tmp_path)[-1]["seconds"] < 1100                     # the clock goes on as well


def test_an_older_or_a_foreign_run_is_named(tmp_path, capsys):
    flags = ["pretrain", "--L", "4", "--steps", "2", "--batch-size", "8", "--canvas", "32", "--points", "500", *TINY,
             "--out", str(tmp_path)]
    assert op.main(flags) == 0
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(saved | {"log": []}, tmp_path / "last.pt")   # finished, but its log is lost
    assert op.main([*flags, "--resume"]) == 0 and not (tmp_path / "log.jsonl").read_text()
    capsys.readouterr()
    del saved["total"]                                      # as versions before left it
    torch.save(saved, tmp_path / "last.pt")
    assert op.main([*flags, "--resume"]) == 2
    assert "no run of this version; --ckpt starts from its weights" in capsys.readouterr().err
    model = op.ViT(16, 4, 9, *op.MODELS["vit_nano"])
    op.load_weights(model, tmp_path / "last.pt")        # but weights it has


def test_a_run_is_resumed_only_with_its_own_settings(tmp_path, capsys):
    flags = ["pretrain", "--L", "4", "--steps", "2", "--batch-size", "8", "--canvas", "32", "--points", "500", *TINY,
             "--out", str(tmp_path)]
    assert op.main(flags) == 0
    for more, named in ((["--lr", "0.5"], ("--lr", "0.001", "0.5")), (["--no-crop"], ("--crop", "True", "False")),
                        (["--steps", "3"], ("--steps", "2", "3"))):
        assert op.main([*flags, *more, "--resume"]) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in named) and error.count("\n") == 1
    assert op.main([*flags, "--log-every", "7", "--save-every", "3", "--resume"]) == 0      # of no consequence


def test_a_finished_run_is_not_overwritten(pretrained, capsys):
    before = (pretrained[0] / "last.pt").read_bytes()
    assert op.main([*PRE, "--device", "cpu", "--out", str(pretrained[0])]) == 2
    assert "--out" in capsys.readouterr().err and (pretrained[0] / "last.pt").read_bytes() == before


def test_a_network_that_cannot_be_compiled_is_trained_as_it_is(monkeypatch, capsys):
    model = op.ViT(16, 8, 5, 32, 1, 2)
    nn.init.normal_(model.head.weight)
    args = argparse.Namespace(precision="fp32", world=1, device="cuda:0", batch_size=4, img_size=16)
    x, zeros, shapes = torch.randn(4, 3, 16, 16), torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda shape, device: shapes.append((shape, device)) or zeros(shape))

    def no_compiler(network):
        def fail(x):
            raise RuntimeError("Cannot find a working triton installation.\nMore about it")
        return fail
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert op.accelerate(model, args) is model
    error = capsys.readouterr().err
    assert error.startswith("onepfrac: ") and error.count("\n") == 1 and "triton" in error
    assert shapes == [((4, 3, 16, 16), "cuda:0")]            # the batch it was tried on
    monkeypatch.setattr(torch, "compile", lambda network: network.forward)      # one that works
    fast = op.accelerate(model, args)
    assert fast is not model and (fast(x) == model(x)).all() and not capsys.readouterr().err
    assert all(p.grad is None for p in model.parameters())
    args.device = "cpu"
    assert op.accelerate(model, args) is model


DRIVER = """
import os, sys, torch
import onepfrac as op
rank, folder, seen, train_step = int(os.environ["RANK"]), sys.argv[1], [], op.train_step
def spy(network, optimizer, x, target, rate, args):
    if len(seen) == int(os.environ.get("FAIL_AT", -1)) and rank == 1:
        raise op.InputError("--source: this rank cannot go on")
    seen.append(x)
    spy.model = network.module
    return train_step(network, optimizer, x, target, rate, args)
op.train_step = spy
status = op.main(sys.argv[2:])
if status == 0:
    torch.save([torch.stack(seen), spy.model.state_dict()], f"{folder}/rank{rank}.pt")
sys.exit(status)
"""
PAIR = ["pretrain", "--L", "8", "--batch-size", "32", "--canvas", "32", "--points", "1000", "--log-every", "10",
        "--save-every", "10", "--warmup", "0.1", "--no-jitter", *TINY]


def torchrun(folder, *arguments, **environment):
    (folder / "driver.py").write_text(DRIVER)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
         "--rdzv_endpoint=localhost:0", str(folder / "driver.py"), str(folder), *PAIR, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent), **environment})


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A run of two processes: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    two = torchrun(folder, "--steps", "60", "--out", str(folder / "two"))
    output, errors = two.communicate(timeout=170)
    assert two.returncode == 0, errors[-2000:]
    return folder, output


def test_two_processes_train_one_model_on_images_of_their_own(two_processes, tmp_path):
    folder, output = two_processes
    (a, model_a), (b, model_b) = (torch.load(folder / f"rank{k}.pt", weights_only=True) for k in (0, 1))
    assert a.shape == b.shape == (60, 16, 3, 16, 16) and not (a == b).flatten(2).all(2).any()
    assert all((model_a[k] == model_b[k]).all() for k in model_a)
    assert output.count("step 60/60") == 1 and "x2" in output               # only one of them writes and prints
    assert op.main([*PAIR, "--steps", "60", "--out", str(tmp_path / "one")]) == 0
    losses = [[r["loss"] for r in read_log(path)] for path in (tmp_path / "one", folder / "two")]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=0.1) and losses[1][-1] < losses[1][0] - 0.1
    assert np.abs(np.subtract(*losses)).max() < 0.25                        # other crops, the same curve


def test_two_processes_stop_together_and_go_on(two_processes, tmp_path):
    stopped = torchrun(tmp_path, "--steps", "60", "--out", str(tmp_path / "stopped"))
    while "step 20/" not in stopped.stdout.readline():
        assert stopped.poll() is None
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate(timeout=100)
    assert stopped.returncode != 0 and errors.count("with --resume continues") == 1
    assert 20 <= torch.load(tmp_path / "stopped" / "last.pt", weights_only=True)["step"] < 60
    again = torchrun(tmp_path, "--steps", "60", "--out", str(tmp_path / "stopped"), "--resume")
    assert again.wait(170) == 0
    assert_same(two_processes[0] / "two", tmp_path / "stopped")


def test_a_process_that_fails_ends_the_job_with_its_message(tmp_path):
    job = torchrun(tmp_path, "--steps", "5000", "--out", str(tmp_path / "run"), FAIL_AT="25")
    _, errors = job.communicate(timeout=170)
    assert job.returncode != 0 and "onepfrac: --source: this rank cannot go on" in errors
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 20


def test_checkpoints_of_timm_and_of_the_authors_load(tmp_path):
    torch.manual_seed(3)
    donor = op.ViT(32, 4, 1000, 96, 6, 3)
    nn.init.normal_(donor.head.weight)
    for content in (donor.state_dict(), {"model": donor.state_dict(), "epoch": 5},
                    {"model": donor.state_dict(), "args": argparse.Namespace(model="vit_tiny")},
                    {"model": {f"module.{k}": v for k, v in donor.state_dict().items()}}):
        torch.save(content, tmp_path / "weights.pt")
        same, other = op.ViT(32, 4, 1000, 96, 6, 3), op.ViT(16, 4, 10, 96, 6, 3)
        for model in (same, other):
            op.load_weights(model, tmp_path / "weights.pt")
            assert (model.blocks[3].mlp.fc1.weight == donor.blocks[3].mlp.fc1.weight).all()
        assert (same.head.weight == 0).all() and (other.head.weight == 0).all()     # the classes are others
        assert (same.pos_embed == donor.pos_embed).all() and (same.cls_token == donor.cls_token).all()
        assert other.pos_embed.shape == (1, 17, 96)


def test_position_embeddings_follow_the_image_size(tmp_path):
    donor, big, same = (op.ViT(size, 4, 3, 4, 1, 2) for size in (32, 64, 32))
    grid = torch.linspace(0, 1, 8).view(1, 8, 1, 1).expand(1, 8, 8, 4).reshape(1, 64, 4)
    donor.pos_embed.data = torch.cat([torch.full((1, 1, 4), 7.0), grid], 1)
    torch.save(donor.state_dict(), tmp_path / "x.pt")
    for model in (big, same):
        op.load_weights(model, tmp_path / "x.pt")
    assert big.pos_embed.shape == (1, 257, 4) and (big.pos_embed[:, 0] == 7).all()
    column = big.pos_embed.detach()[0, 1:].view(16, 16, 4)[:, 3, 0]
    assert (column.diff() > 0).all() and abs(column.mean() - 0.5) < 1e-3
    row = big.pos_embed.detach()[0, 1:].view(16, 16, 4)[3, :, 0]
    assert row.max() - row.min() < 1e-5                         # rows stay rows
    assert torch.equal(same.pos_embed, donor.pos_embed)


def test_half_precision_and_hostile_position_embeddings(tmp_path):
    donor = op.ViT(32, 4, 9, *op.MODELS["vit_nano"])
    torch.save(donor.half().state_dict(), tmp_path / "half.pt")
    model = op.ViT(16, 4, 9, *op.MODELS["vit_nano"])
    op.load_weights(model, tmp_path / "half.pt")
    assert (model.blocks[0].mlp.fc1.weight == donor.blocks[0].mlp.fc1.weight.float()).all()
    for pos in (torch.zeros(1, 0, 96), torch.zeros(1, 1, 96), torch.zeros(2, 5, 96), torch.zeros(3), torch.zeros(1, 18, 96),
                torch.zeros(1, 6, 96), torch.zeros(2, 17, 96)):
        torch.save(model.state_dict() | {"pos_embed": pos}, tmp_path / "x.pt")
        with pytest.raises(op.InputError, match="x.pt: does not fit --model"):
            op.load_weights(model, tmp_path / "x.pt")


# -------------------------------------------------------------------------------- E probe and render

def test_probe_sees_the_first_blocks_only_and_trains_the_head_only():
    torch.manual_seed(0)
    model = op.ViT(16, 8, 10, 48, 3, 2, drop_path=0.5)
    probe, x = op.Probe(model, 2, 10), torch.randn(5, 3, 16, 16)
    nn.init.normal_(probe.head.weight)
    before = probe.train()(x)
    seen = model.blocks[1](model.blocks[0](model.embed(x)))[:, 1:].mean(1)
    z = (seen - seen.mean(0)) / (seen.var(0, correction=0) + 1e-6).sqrt()
    assert torch.allclose(before, z @ probe.head.weight.T + probe.head.bias, atol=1e-4)
    nn.init.normal_(model.blocks[2].mlp.fc1.weight)
    nn.init.normal_(model.norm.weight)
    assert torch.equal(probe(x), before)
    trained = [n for n, p in probe.named_parameters() if p.requires_grad]
    assert trained == ["head.weight", "head.bias"]
    groups = op.make_optimizer(
        probe, argparse.Namespace(optimizer="sgd", lr=0.1, weight_decay=0.01)).param_groups
    assert sum(len(g["params"]) for g in groups) == 2


def test_probe_classifies_stripes(pretrained, image_folder, tmp_path):
    assert op.main(["probe", "--ckpt", str(pretrained[0] / "last.pt"), "--data", "folder", "--root", str(image_folder),
                    "--layers", "2", "1", "2", "--epochs", "40", "--batch-size", "16", *TINY, "--out", str(tmp_path / "p")]) == 0
    donor = torch.load(pretrained[0] / "last.pt", weights_only=True)["model"]
    for k in (1, 2):
        folder = tmp_path / "p" / f"layer{k}"
        assert read_log(folder)[-1]["test_top1"] >= 70
        args = json.loads((folder / "args.json").read_text())
        assert args["command"] == "probe" and args["layers"] == [2, 1, 2] and args["patch_size"] == 4
        weights = torch.load(folder / "last.pt", weights_only=True)["model"]
        assert all((weights[f"frozen.{n}"] == t).all() for n, t in donor.items() if not n.startswith("head"))


def test_a_probe_goes_on(pretrained, image_folder, tmp_path, monkeypatch):
    flags = ["probe", "--ckpt", str(pretrained[0] / "last.pt"), "--data", "folder", "--root", str(image_folder),
             "--layers", "1", "2", "--epochs", "1", "--batch-size", "16", *TINY]
    assert op.main([*flags, "--out", str(tmp_path / "a")]) == 0
    train_step, calls = op.train_step, []

    def signalled(*inputs):
        calls.append(0)
        if len(calls) == 5:                                 # the last step of the first layer
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(op, "train_step", signalled)
        with pytest.raises(SystemExit) as stop:
            op.main([*flags, "--out", str(tmp_path / "b")])
        assert stop.value.code == 128 + signal.SIGTERM
    assert len(calls) == 5 and not (tmp_path / "b" / "layer2").exists()
    assert op.main([*flags, "--out", str(tmp_path / "b"), "--resume"]) == 0
    for layer in ("layer1", "layer2"):
        assert_same(tmp_path / "a" / layer, tmp_path / "b" / layer)


def test_render_writes_a_folder_that_trains(tmp_path):
    assert op.main(["render", "--L", "12", "--canvas", "32", "--points", "2000", "--device", "cpu", "--out",
                    str(tmp_path / "x")]) == 0
    from torchvision.datasets import ImageFolder
    dataset = ImageFolder(tmp_path / "x")
    assert len(dataset) == 12 and [c for _, c in dataset.samples] == list(range(12))
    base, numbers = fractal(), json.loads((tmp_path / "x.json").read_text())
    maps = base + torch.tensor(numbers["eps"])
    drawn = op.render_ifs(maps, 32, 2000, "fill", seeded(op.seed_for(0, "maps")), base[:, :, :2].det().abs())
    assert all((np.array(dataset[i][0])[..., 0] == drawn[i].numpy()).all() for i in range(12))


# ---------------------------------------------------------------------------------------- F settings

PRE, FINE = ["pretrain"], ["finetune", "--data", "folder", "--root", "{folder}"]
SMALL = "--canvas 64 --points 1500 --L 16 --batch-size 16"


@pytest.mark.parametrize("arguments, named", [
    ([*PRE, "--delta", "-0.1"], "--delta"), ([*PRE, "--delta", "many"], "--delta"),
    ([*PRE, "--delta", "nan"], "--delta"), ([*PRE, "--delta", "1000", "--L", "2", "--canvas", "32", "--points", "300"], "--delta"),
    ([*PRE, "--sigma", "0"], "--sigma"), ([*PRE, "--sigma", "6.5"], "--sigma"),
    ([*PRE, "--L", "1"], "--L"), ([*PRE, "--steps", "0"], "--steps"), ([*PRE, "--lr", "inf"], "--lr"),
    ([*PRE, "--canvas", "2"], "--canvas"), ([*PRE, "--points", "0"], "--points"),
    ([*PRE, "--img-size", "30", "--canvas", "32", "--points", "300"], "--patch-size"), ([*PRE, "--num-maps", "1"], "--num-maps"),
    ([*PRE, "--min-crop", "1.5"], "--min-crop"), ([*PRE, "--min-crop", "0"], "--min-crop"), ([*PRE, "--warmup", "1"], "--warmup"),
    ([*PRE, "--device", "cuda"], "--device"), ([*PRE, "--resume"], "--resume"),
    ([*PRE, "--noise", "loud"], "--noise"), ([*PRE, "--nonsense"], "--nonsense"), (["train"], "COMMAND"),
    ([*FINE, "--ckpt", "{tmp}/none.pt"], "--ckpt"), ([*FINE, "--ckpt", "{tmp}/broken.pt"], "--ckpt"),
    ([*FINE, "--ckpt", "{tmp}/code.pt"], "--ckpt"), ([*FINE, "--ckpt", "{tmp}/junk.pt"], "--ckpt"), ([*FINE, "--ckpt", "{tmp}/shapes.pt"], "--ckpt"),
    ([*FINE, "--ckpt", "{tmp}/nano.pt", "--model", "vit_tiny"], "--ckpt"),
    ([*FINE, "--batch-size", "81"], "--batch-size"),
    ([*FINE, "--data", "imagenet22k"], "--data"), ([*FINE, "--root", "{tmp}/nowhere"], "--root"),
    ([*FINE, "--root", "{tmp}/empty"], "--root"), ([*FINE, "--root", "{tmp}/unreadable", "--batch-size", "2"], "--root"),
    ([*FINE, "--train-per-class", "41"], "--train-per-class"),
    ([*FINE, "--train-per-class", "2", "--holdout", "0.1"], "--holdout"),
    ([*PRE, "--warp", "elastic"], "--warp"), ([*PRE, "--edges", "canny"], "--edges"),
    ([*PRE, "--source", "image", "--image", "{tmp}/broken.pt"], "--image"),
    ([*PRE, "--source", "image", "--categories", "3"], "--categories"),
    ([*PRE, "--source", "image", "--warp", "elastic", "--noise", "multiplicative"], "--noise"),
    (["render", "--source", "folder"], "--source"),
    (["render", "--out", "{tmp}/unreadable"], "--out"), (["show"], "COMMAND"), (["probe", *FINE[1:], "--batch-size", "1"], "--batch-size"),
    (["probe", *FINE[1:], "--batch-size", "16", "--resume"], "--resume"), ([*PRE, "--instances", "3"], "--instances"),
    ([*PRE, "--texture", "point", "--points", "300", "--L", "2"], "--points"),
    ([*PRE, "--fresh-texture", "--texture", "fill"], "--fresh-texture"),
    ([*PRE, "--source", "rcdb", "--fresh-texture"], "--fresh-texture"),
    ([*PRE, "--source", "folder", "--root", "{tmp}/nowhere"], "--root"),
    ([*PRE, "--source", "folder", "--root", "{tmp}/unreadable/test"], "--root"),
    ([*PRE, "--source", "clouds"], "--source"), (["probe", *FINE[1:], "--layers", "7"], "--layers"),
    ([*PRE, "--fractal-seed", str(2 ** 64)], "--fractal-seed"), ([*PRE, "--steps", "9" * 400], "--steps"),
    (["render", "--out", "{tmp}/broken.pt"], "--out"), ([*PRE, "--out", "{tmp}/broken.pt/x"], "--out"),
    (["finetune", "--data", "cifar100", "--root", "{tmp}/dl"], "--data"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_bad_input_gets_one_line_and_status_2(arguments, named, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    torch.save({"model": print}, tmp_path / "code.pt")
    (tmp_path / "junk.pt").write_bytes(b"\x80\x04\x95\x20" + bytes(60))         # begins like a pickle
    torch.save(op.ViT(32, 4, 9, 48, 2, 2).state_dict(), tmp_path / "shapes.pt")
    torch.save(op.ViT(32, 4, 9, *op.MODELS["vit_nano"]).state_dict(), tmp_path / "nano.pt")
    for part in ("train", "test"):
        (tmp_path / "empty" / part).mkdir(parents=True)
        for name in "ab":
            folder = tmp_path / "unreadable" / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(folder / "1.png")
            (folder / "2.png").write_bytes((folder / "1.png").read_bytes()[:50])

    def no_network(*a, **k):
        raise OSError("[Errno -3] Temporary failure in name resolution")
    monkeypatch.setattr("urllib.request.urlopen", no_network)

    # New strings, as from a shell: argparse asks whether a value `is` the default.
    arguments = [a.format(folder=image_folder, tmp=tmp_path).encode().decode() for a in arguments]
    before = set(tmp_path.rglob("*"))
    try:
        for flag, value in (("--device", "cpu"), ("--out", str(tmp_path / "run"))):
            arguments += [] if flag in arguments else [flag, value]
        status = op.main(arguments)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and named in captured.err
    assert captured.err.startswith("onepfrac: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "run" / "last.pt").exists() and before <= set(tmp_path.rglob("*"))


@pytest.mark.parametrize("world", ["2", "two"])
def test_several_processes_without_torchrun_get_one_line(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("RANK", raising=False)
    assert op.main(["pretrain", "--recipe", "nano", "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "torchrun" in error and not (tmp_path / "run").exists()


def test_every_default_of_every_recipe_is_a_value_that_its_flag_takes():
    names = [flag for _, _, *rows in op.FLAGS for flag, *_ in rows]
    assert len(names) == len(set(names))
    assert {name for commands, *_ in op.FLAGS for name in commands.split()} == set(op.COMMANDS)
    for recipe in op.RECIPES:
        for command in op.COMMANDS:
            args = vars(resolved(command, "--recipe", recipe, "--device", "cpu"))
            assert {k for k, v in args.items() if v is None} <= {"ckpt", "train_per_class", "image"}
            column = list(op.COMMANDS).index(command)           # None there: the command has no such flag
            flags = [row for commands, _, *rows in op.FLAGS if command in commands.split() for row in rows
                     if not (isinstance(row[1], list) and row[1][column] is None)]
            assert set(args) == {"command", "rank", "world", "lead"} | {flag for flag, *_ in flags}
            # Written out, the defaults are the same settings: none is refused, or read as another.
            words = [command]
            for flag, _, kind, _ in flags:
                value, dashed = args[flag], flag.replace("_", "-")
                if kind is bool:
                    words += [f"--{'' if value else 'no-'}{dashed}"] * (flag != "fresh_texture")
                elif value is not None:
                    words += [f"--{dashed}", *(value if isinstance(value, list) else [value])]
            assert vars(resolved(*words)) == args


def test_recipes_have_their_values_and_any_flag_overrides_them():
    nano, small, paper = (resolved("pretrain", "--recipe", r, "--device", "cpu") for r in op.RECIPES)
    assert [a.L for a in (nano, small, paper)] == [64, 1000, 1000] and nano.lr == 1e-3 and paper.lr == 5e-4
    assert (paper.canvas, paper.points, paper.img_size, paper.patch_size) == (512, 100_000, 224, 16)
    assert paper.randaug and paper.mixup and paper.cutmix and paper.erase and not nano.randaug
    tuned = resolved("finetune", "--recipe", "paper", "--device", "cpu")
    assert (tuned.optimizer, tuned.epochs, tuned.batch_size) == ("sgd", 1000, 768)
    args = resolved("pretrain", "--recipe", "paper", "--device", "cpu", "--lr", "0.5", "--no-crop")
    assert args.lr == 0.5 and args.crop is False
    assert {k for k in vars(args) if vars(args)[k] != vars(paper)[k]} == {"lr", "crop"}


@pytest.mark.parametrize("command", op.COMMANDS)
def test_help_shows_every_flag_with_its_default_under_the_paper_s_tables(command, capsys, monkeypatch):
    args = vars(resolved(command, "--device", "cpu", "--recipe", "nano"))
    monkeypatch.setenv("COLUMNS", "120")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        op.main([command, "--recipe", "nano", "-h"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    # An entry begins with two spaces and its flag, and goes on with lines that are further in.
    shown = {}
    for entry in re.findall(r"^  --.*\n(?: {8,}.*\n)*", text, re.M):
        flag, words, default = re.fullmatch(
            r"  --(\S+?),? .*?\s{2,}(\S.*?)\s+\(default:\s+([^)]+)\)\s*", entry, re.S).groups()
        assert len(words) > 4
        shown[flag.replace("-", "_")] = default
    assert set(shown) == set(args) - {"command", "rank", "world", "lead"}
    for flag in set(shown) - {"device", "out", "precision"}:    # these depend on the machine or the command
        assert shown[flag] == str(args[flag])
    headings = " ".join(line for line in text.splitlines() if re.match(r"\S.*:$", line))
    drawn, trained = ("pretrain", "render"), ("pretrain", "finetune", "probe")
    for table, commands in {"Tables 2, 3, 4": drawn, "Tables 5, 6, 7, 8": drawn, "Tables 11, 12": drawn,
                            "Table 9": trained, "Tables 13, 14": trained[1:], "Fig. 3": trained[1:]}.items():
        assert (table in headings) == (command in commands)
    assert ("Table 13" in " ".join(text.split())) == (command in drawn)     # --fresh-texture


def pictures(arguments):
    """Settings, and the images and labels of the first two batches of pre-training, before augmentation."""
    args, seen = resolved("pretrain", "--recipe", "nano", "--device", "cpu", *arguments.split()), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "train", lambda args, model, data, augment, steps: seen.append(data))
        patch.setattr(op, "open_run", lambda args: None)
        patch.setattr(op, "write_json", lambda *_: None)
        op.pretrain(args)
    [data], batches = seen, []
    for step in (0, 1):
        torch.manual_seed(op.seed_for(args.seed, "step", step, args.rank))
        batches.append(data[op.batch_indices(len(data), args.batch_size, step, args.seed)])
    return args, batches


@pytest.fixture(scope="module")
def usual():
    return pictures(SMALL)


@pytest.mark.parametrize("flags", [
    "--delta 0.3", "--sigma 4.5", "--L 9", "--noise multiplicative", "--fractal-seed 1", "--num-maps 3",
    "--canvas 48", "--points 300", "--texture random", "--texture point", "--seed 5", "--categories 16",
    "--categories 4 --instances 4", "--source rcdb", "--source va", "--source gaussian", "--source uniform",
    "--source image", "--source image --edges canny", "--source image --warp elastic",
    "--source image --image {photo}", "--source folder --root {folder}", "--batch-size 8",
    "--fresh-texture"])
def test_flags_of_the_picture_change_it(flags, usual, image_folder, tmp_path):
    Image.effect_noise((80, 70), 90).save(tmp_path / "photo.png")
    flags = flags.format(photo=tmp_path / "photo.png", folder=image_folder / "train")
    args, batches = pictures(f"{SMALL} {flags}")
    named = {word[2:].replace("-", "_") for word in flags.split() if word.startswith("--")}
    named |= {"texture"} if "fresh_texture" in named else set()
    assert {k for k in vars(args) if vars(args)[k] != vars(usual[0])[k]} == named
    assert not all(a.shape == b.shape and (a == b).all() for (a, _), (b, _) in zip(batches, usual[1]))


def norm_weights(flags, out):
    """The weights of the last norm after a short pre-training."""
    words = f"pretrain --recipe nano {SMALL} --device cpu --precision fp32 --steps 3 {flags}".split()
    assert op.main([*words, "--out", str(out)]) == 0
    return torch.load(out / "last.pt", weights_only=True)["model"]["norm.weight"]


@pytest.fixture(scope="module")
def usual_weights(tmp_path_factory):
    return norm_weights("", tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("flags", [
    "--lr 0.1", "--weight-decay 0.3", "--warmup 0.5", "--optimizer sgd", "--clip-grad 0.01", "--randaug",
    "--no-crop", "--no-aspect", "--erase", "--mixup", "--cutmix", "--flip", "--no-jitter", "--smoothing 0.2",
    "--min-crop 0.5", "--drop-path 0.5", "--model vit_tiny", "--patch-size 4", "--img-size 24",
    "--precision bf16", "--steps 2"])
def test_flags_of_training_leave_the_picture_alone_and_change_the_training(flags, usual, usual_weights, tmp_path):
    args, batches = pictures(f"{SMALL} {flags}")
    named = {word[2:].replace("-", "_").removeprefix("no_") for word in flags.split() if word.startswith("--")}
    assert {k for k in vars(args) if vars(args)[k] != vars(usual[0])[k]} - {"precision"} == named - {"precision"}
    assert all((a == b).all() and (i == j).all() for (a, i), (b, j) in zip(batches, usual[1]))
    weights = norm_weights(flags, tmp_path)
    assert weights.shape != usual_weights.shape or (weights != usual_weights).any()


def test_the_same_command_gives_the_same_weights(usual_weights, tmp_path):
    """So what the flags above change is not chance."""
    assert torch.equal(norm_weights("", tmp_path), usual_weights)


# ----------------------------------------------------------------------------------- the file itself

SOURCE = SCRIPT.read_text()


def section(mark):
    """From a section's banner to the next one."""
    [start] = [m.start() for m in re.finditer(rf"^# ==== {mark} · ", SOURCE, re.M)]
    return "#" + re.split(r"^# (?:==== |####)", SOURCE[start + 1:], maxsplit=1, flags=re.M)[0]


def imports(text):
    """The import statements that a section's comment asks for."""
    first, more = re.search(r"^# To copy [^\n]*?: (.*)\n((?:#  +\S.*\n)*)", text, re.M).groups()
    return "\n".join([first, *(line.lstrip("# ") for line in more.splitlines())]) + "\n\n"


def functions(text, *names):
    return "\n\n".join(ast.get_source_segment(text, node) for node in ast.parse(text).body
                       if getattr(node, "name", None) in names)


COPIES = {
    "1": """
maps = sample_ifs(3, 4.5, torch.Generator().manual_seed(0))
assert maps.shape == (3, 2, 3) and abs(sigma_factor(maps) - 4.5) < 1e-4
""", "2": """
maps = torch.tensor([[[0.5, 0, 0], [0, 0.5, 0]], [[0.5, 0, 1], [0, 0.5, 0]], [[0.5, 0, 0], [0, 0.5, 1]]])
images = render_ifs(torch.stack([maps, 1.2 * maps]), 64, 5000, generator=torch.Generator().manual_seed(0))
point = render_ifs(maps[None], 64, 5000, "point")
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


def test_code_of_readme_runs_as_it_says(monkeypatch):
    monkeypatch.chdir(SCRIPT.parent)
    first, second = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names = {}
    exec(first, names)
    assert names["loss"].item() == pytest.approx(math.log(8), abs=1e-5) and names["x"].shape == (8, 3, 224, 224)
    exec(second, names)
    state = torch.load("results/nano.pt", weights_only=True)
    assert torch.equal(names["model"].blocks[5].mlp.fc2.weight, state.get("model", state)["blocks.5.mlp.fc2.weight"])
    drawn = op.fractal_data(resolved("pretrain", "--device", "cpu", "--recipe", "nano")).images
    assert torch.equal(names["images"], drawn)


def test_sections_can_be_copied_into_an_empty_file(tmp_path):
    """Each file runs with nothing but what it says; one process, since importing torch takes seconds."""
    for marks, exercise in COPIES.items():
        texts = [section(mark) for mark in marks]
        body = functions(texts[0], "perturb", "lpce_loss") if marks == "3" else "\n".join(texts)
        (tmp_path / f"copy{marks}.py").write_text(imports(texts[0]) + body + "\n\n" + exercise)
    code = "import runpy, sys\nfor file in sys.argv[1:]: runpy.run_path(file)\nassert 'onepfrac' not in sys.modules"
    done = subprocess.run([sys.executable, "-I", "-c", code, *(f"copy{marks}.py" for marks in COPIES)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stdout, done.stderr


def code_lines():
    """The lines that are not blank, comment or docstring."""
    documented = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return [line for number, line in enumerate(SOURCE.splitlines(), 1)
            if number not in documented and line.strip() and not line.strip().startswith("#")]


def test_the_file_and_its_functions_are_short():
    lines = SOURCE.splitlines()
    [end] = [number for number, line in enumerate(lines, 1) if "END OF PART ONE" in line]
    assert end < 850 and len(lines) <= 1650 and len(code_lines()) <= 1100
    assert [(node.name, node.end_lineno - node.lineno + 1) for node in ast.walk(ast.parse(SOURCE))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60] == []


def test_the_file_s_lines_are_not_crammed():
    code = code_lines()
    assert [number for number, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 100] == []
    assert [t.start for t in tokenize.generate_tokens(io.StringIO(SOURCE).readline) if t.string == ";"] == []
    assert sum(map(len, code)) / len(code) < 56.5


def test_import_does_nothing():
    code = ("import torch; state = torch.get_rng_state().clone(); import onepfrac; "
            "assert (torch.get_rng_state() == state).all()")
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout + done.stderr


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


# ------------------------------------------------------------------------------- scripts in results/
@pytest.mark.parametrize("name, count", dict(kills=6, stops=2, disk=8, checkpoints=40, images=44).items())
def test_faults_lose_nothing_and_leave_no_traceback(name, count):
    """A few of each; results/faults.py tries many."""
    done = subprocess.run(
        [sys.executable, "-c", f"import faults, json; print(json.dumps(faults.study({name!r}, {count}, 1)))"],
        cwd=SCRIPT.parent / "results", capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for counts in found.values() if name == "stops" else [found]:
        assert all(number == 0 for key, number in counts.items() if key in faults.ZERO)
    if name == "kills":
        assert found["kills"] == count
    if name in ("checkpoints", "images"):
        assert found["refused_in_one_line"] + found["read"] == count and found["refused_in_one_line"] > count / 4


def test_logistic_regression_reaches_the_optimum():
    g = seeded(0)
    x, labels = torch.randn(200, 5, generator=g), torch.randint(3, (200,), generator=g)
    x[:, 0] += 2 * labels
    x = F.pad(x.double(), (0, 1), value=1.0)
    weight = logistic.fit_logistic(x, labels, 3, decay=0.05)
    w = weight.clone().requires_grad_()

    def loss(w):
        return F.cross_entropy(x @ w, labels) + 0.025 * w[:-1].square().sum()
    loss(w).backward()
    assert w.grad.abs().max() < 1e-4
    v = torch.zeros_like(w).detach().requires_grad_()           # plain gradient descent ends there too
    for _ in range(3000):
        gradient, = torch.autograd.grad(loss(v), v)
        v = (v - 0.3 * gradient).detach().requires_grad_()
    assert (x @ (v - w)).std(0).max() < 1e-2
    assert logistic.fit_logistic(x, labels, 3, 5.0)[:-1].norm() < weight[:-1].norm()


def test_regularisation_is_chosen_without_the_test_set():
    labels = torch.arange(120) % 3
    x = torch.randint(60, (120, 3, 4, 4), generator=seeded(1)) + 30 * labels.view(-1, 1, 1, 1)
    data = op.Data(labels, lambda i: x[i].to(torch.uint8), "cpu")
    tests = op.Data(labels[:30], lambda i: x[i].to(torch.uint8), "cpu")
    swapped = op.Data((labels[:30] + 1) % 3, lambda i: x[i].to(torch.uint8), "cpu")
    right, wrong = (logistic.logistic_probe(lambda images: images.flatten(1).float(), data, those, 3)
                    for those in (tests, swapped))
    assert right["decay"] == wrong["decay"] and right["test_top1"] > 60 > wrong["test_top1"]


def test_logistic_regression_leaves_a_record_for_the_tables(image_folder, tmp_path, capsys):
    logistic.main(["--recipe", "nano", "--device", "cpu", "--data", "folder", "--root", str(image_folder),
                   "--batch-size", "16", "--layers", "1", "6", "--out", str(tmp_path)])
    first, last = tables.of_folders(tmp_path)
    assert (first["command"], first["settings"]["layers"], last["settings"]["layers"]) == ("logistic", [1], [6])
    assert [first["test_top1"], last["test_top1"]] == [
        json.loads(line)["test_top1"] for line in capsys.readouterr().out.splitlines()]
    assert first["test_top1"] > 80                              # stripes across or down, two classes


def test_mimetic_weights_have_the_products_of_the_paper():
    """One head: query times key is 0.7 Z + 0.7 I, value times output 0.4 Z - 0.4 I, where Z ~ N(0, 1 / dim)."""
    torch.manual_seed(0)
    model = mimetic.mimetic(op.ViT(32, 8, 10, 128, 2, 1))
    query, key, value = model.blocks[1].attn.qkv.weight.detach().view(3, 128, 128)
    for product, alpha, beta in ((query.T @ key, 0.7, 0.7), (value.T @ model.blocks[1].attn.proj.weight.T, 0.4, -0.4)):
        z = (product - beta * torch.eye(128)) / alpha * 128 ** 0.5
        assert abs(z.mean()) < 0.05 and 0.97 < z.std() < 1.03
    attention = mimetic.mimetic(op.ViT(32, 8, 10, 128, 2, 2)).blocks[0].attn        # a head has half of the ranks
    query, key, _ = attention.qkv.weight.detach().view(3, 2, 64, 128)
    heads = query.transpose(1, 2) @ key
    assert (torch.linalg.matrix_rank(heads) == 64).all() and not heads[0].allclose(heads[1], atol=0.1)
    assert (heads.diagonal(dim1=1, dim2=2).mean(1) > 0.3).all()
    near = F.normalize(model.pos_embed[0, 1:].detach(), dim=1) @ F.normalize(model.pos_embed[0, 1:].detach(), dim=1).T
    assert near.view(4, 4, 4, 4)[1, 1, 1, 2] > near.view(4, 4, 4, 4)[1, 1, 3, 3]       # neighbours are alike


def write_run(folder, command, settings, log, **more):
    """A run folder as tables.py reads it."""
    folder.mkdir(parents=True)
    args = settings | dict(command=command, ckpt=None, commit="abc", device="cpu", processor="x", threads=1) | more
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "log.jsonl").write_text(json.dumps(log) + "\n")
    (folder / "curve.png").touch()


def record_of(recipe, row, seed, top1, data="cifar100", without=(), **changes):
    _, second, pretraining, _, settings = tables.planned(recipe, row, seed)
    if pretraining:
        pretraining = {k: v for k, v in (pretraining | changes).items() if k not in without}
    return dict(command=second.split()[0], recipe=recipe, seed=seed, test_top1=top1, seconds=120, device="cpu",
                commit="abc", pretrain=pretraining, settings=settings | dict(data=data),
                pretext_top1=top1 / 2 if pretraining else None)


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_tables_print_what_is_measured_and_plan_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "HERE", tmp_path / "results")
    rows = {row[0]: row for row in tables.tables("nano")["table5"][2]}
    write_records(tmp_path / "results" / "records.jsonl", [
        *(record_of("nano", rows["0.1"], seed, top1) for seed, top1 in ((0, 20.0), (1, 22.0), (2, 27.0))),
        record_of("nano", rows["0.2"], 0, 30.0),
        record_of("nano", rows["0.05"], 0, 40.0, lr=0.5),           # another setting
        record_of("small", rows["0.05"], 0, 50.0),                  # another recipe
        record_of("nano", rows["0.05"], 0, 60.0, "cifar10"),        # other data
        record_of("nano", rows["0.05"], 0, 70.0, steps=100),        # stopped halfway
        record_of("nano", rows["0.05"], 0, 80.0, without=["delta"]),        # then 0.1
        record_of("nano", rows["1.0"], 0, 90.0) | {"pretrain": {"recipe": None, "weights": "timm.pt"}}])
    common = ["--recipe", "nano", "--runs", str(tmp_path / "runs")]
    tables.main(["table5", *common])
    printed = capsys.readouterr().out
    assert "| 0.1 | 84.2 | 43.00 (32.14) | 3 | 22% |" in printed    # seed 0: the later record counts
    assert "| 0.2 | 83.4 | 30.00 | 1 of 3 | 15% |" in printed
    assert "| 0.05 | 83.0 | not run | 0 of 3 | - |" in printed
    assert "| 1.0 | 82.6 | not run | 0 of 3 |" in printed
    assert "table7" not in printed and not (tmp_path / "results" / "tables").exists()
    tables.main(common)
    assert (tmp_path / "results" / "tables" / "nano.md").read_text().strip() in capsys.readouterr().out
    assert Image.open(tmp_path / "results" / "tables" / "nano.png").size[0] > 500
    tables.main(["table5", *common, "--plan"])
    captured = capsys.readouterr()
    plan = captured.out.splitlines()
    assert "14 runs to do, about 28 minutes" in captured.err and len(plan) == 28
    assert not any("/1p-frac/" in line or "delta-0.2/0" in line for line in plan)
    for line in plan:                                           # every line is a command, once
        op.parse(line.split("--ckpt")[0].split())
    assert len(set(plan)) == 28 and plan[0].startswith("pretrain ") and plan[1].startswith("finetune ")
    with pytest.raises(SystemExit):
        tables.main(["table99"])


def test_tables_read_run_folders_and_outlive_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "HERE", tmp_path / "results")
    (tmp_path / "results").mkdir()
    rows, common = {row[0]: row for row in tables.tables("nano")["table6"][2]}, ["table6", "--runs", str(tmp_path)]
    _, _, pretraining, _, settings = tables.planned("nano", rows["4.0"], 0)
    write_run(tmp_path / "p", "pretrain", pretraining,
              dict(step=pretraining["steps"], images=7, seconds=60.0, top1=80.5))
    write_run(tmp_path / "f", "finetune", settings, dict(step=1, images=5, seconds=2.0, test_top1=33.0, test_top5=50.0),
              ckpt=str(tmp_path / "p" / "last.pt"))
    write_run(tmp_path / "unfinished", "finetune", settings, dict(step=1, images=5, seconds=2.0, test_top1=44.0))
    (tmp_path / "unfinished" / "curve.png").unlink()
    tables.main([*common, "--collect"])
    assert "| 4.0 | 82.8 | 33.00 | 1 | 80% |" in capsys.readouterr().out
    [record] = tables.read_records(tmp_path / "results" / "records.jsonl")
    assert record["images"] == 12 and record["seconds"] == 62 and record["pretrain"]["sigma"] == 4.0
    tables.main(["table6", "--runs", str(tmp_path / "none"), "--collect"])
    assert "| 4.0 | 82.8 | 33.00 | 1 |" in capsys.readouterr().out
    assert tables.read_records(tmp_path / "results" / "records.jsonl") == [record]


def test_every_row_of_every_table_is_a_command_at_every_recipe():
    for recipe in op.RECIPES:
        folders = {}
        for _, _, rows in tables.tables(recipe).values():
            for row in rows:
                first, second, pretraining, usual, settings = tables.planned(recipe, row, 0)
                assert (first is None) == (row[2] is None) and settings["recipe"] == recipe
                folders.setdefault(second.split("--out ")[1], set()).add((first, second))
                if first:
                    assert (usual != pretraining) == ("/1p-frac/" not in first)
        assert all(len(runs) == 1 for runs in folders.values())     # one setting a folder
    deit = {row[2]: row[1] for row in tables.tables("paper")["table9"][2]}
    assert deit["--no-crop"] == 80.1 and deit["--no-mixup --no-cutmix"] == 80.4
    assert ("with mixup", None, "--mixup", "finetune") in tables.tables("nano")["table9"][2]


def test_reproduce_runs_what_is_not_measured_and_goes_on(tmp_path):
    """With a stand-in that notes the commands and pretends to run them."""
    for name in ("reproduce.sh", "onepfrac.py", "results/tables.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((SCRIPT.parent / name).read_text())
    (tmp_path / "fake.sh").write_text(f"""#!/bin/bash
if [ "$1" = results/tables.py ]; then exec {sys.executable} "$@"; fi
echo "$@" >> commands.txt
out=$(echo "$@" | sed 's/.*--out \\([^ ]*\\).*/\\1/'); mkdir -p $out; touch $out/last.pt
[ "$(wc -l < commands.txt)" = 3 ] && exit 1
exit 0
""")
    os.chmod(tmp_path / "fake.sh", 0o755)
    write_records(tmp_path / "results" / "records.jsonl", [
        record_of("nano", row, 0, 10.0) for row in tables.tables("nano")["table12"][2][1:]])

    def reproduce(*names):
        return subprocess.run(["bash", "reproduce.sh", *names], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PYTHON": f"{tmp_path}/fake.sh", "OMP_NUM_THREADS": "1"})
    done = reproduce("table12")
    commands = (tmp_path / "commands.txt").read_text().splitlines()
    assert done.returncode == 0 and "1 runs to do, about 2 minutes" in done.stderr
    assert [c.split()[1] for c in commands] == ["pretrain", "finetune"] and "canny" in commands[0]
    assert commands[1].endswith("--data cifar100") and "| elastic | 37.0 | 10.00 | 1 |" in done.stdout
    assert reproduce("table12").returncode == 1                  # the third command is interrupted ...
    assert reproduce("nano", "table12").returncode == 0          # ... and goes on
    commands = (tmp_path / "commands.txt").read_text().splitlines()
    assert len(commands) == 5 and all("--resume" in c for c in commands[2:])
    assert reproduce("table99").returncode == 2


def test_reproduce_gives_each_half_of_the_classes_its_own_folder(tmp_path):
    (tmp_path / "reproduce.sh").write_text((SCRIPT.parent / "reproduce.sh").read_text())
    (tmp_path / "fake.sh").write_text("#!/bin/bash\necho \"$@\" >> commands.txt\n")
    os.chmod(tmp_path / "fake.sh", 0o755)
    for path in ("train/b c", "train/a", "train/d", "test/b c", "test/a", "test/d"):
        (tmp_path / "data" / path).mkdir(parents=True)
    subprocess.run(["bash", "reproduce.sh", "controls"], cwd=tmp_path, check=True, timeout=60, env={
        **os.environ, "PYTHON": "./fake.sh", "DATA": "--data folder --root data"})
    for half, classes in (("even", ["a", "d"]), ("odd", ["b c"])):
        for split in ("train", "test"):
            links = sorted((tmp_path / "runs" / "half" / half / split).iterdir())
            assert [link.resolve() for link in links] == [tmp_path / "data" / split / name for name in classes]
    commands = (tmp_path / "commands.txt").read_text().splitlines()
    trained = [c for c in commands if "pretrain --out runs/real" in c]
    tested = [c for c in commands if "finetune --out runs/half-" in c]
    assert len(trained) == 3 and all("--root runs/half/even/train" in c for c in trained)
    assert len(tested) == 15 and all("--root runs/half/odd " in c for c in tested)
    assert all(("--ckpt runs/real-" in c) == ("half-real" in c) for c in tested)


def test_speed_sets_every_part_beside_a_limit():
    flags = ("--device cpu --recipe nano --precision fp32 --img-size 16 --steps 2 --log-every 1 --batch-size 8 "
             "--canvas 32 --points 500 --L 4")
    done = subprocess.run([sys.executable, "results/speed.py", "limits", f"--flags={flags}"], cwd=SCRIPT.parent,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["sources"]) == set(speed.SOURCES)
    assert all(rate > 0 for source in result["sources"].values() for rate in source.values())
    for part in ("render", "augment", "step", "pretrain"):
        assert result[part]["images_per_s"] > 0 and result[part]["share"] >= 0
    assert result["step"]["share"] < 1 and result["render"]["share"] < 1         # nothing beats its limit
    assert 0.1 < result["peak_gb"] < 20


def test_speed_counts_the_operations_of_a_step():
    """2 FLOPs a product, forwards and twice backwards: the sum over layers, by hand."""
    B, N, D, classes = 2, 17, 32, 10
    args = argparse.Namespace(precision="fp32", clip_grad=0.0, optimizer="sgd", lr=0.1, weight_decay=0.0)
    x, target = torch.randn(B, 3, 16, 16), torch.full((B, classes), 0.1)
    block = N * 12 * D * D + 2 * N * N * D
    patches, head = (N - 1) * D * 48, D * classes
    assert speed.flops(op.ViT(16, 4, classes, D, 3, 2), args, x, target) == 2 * B * (
        3 * 3 * block + 2 * patches + 3 * head)                     # images need no gradient
