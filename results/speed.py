"""Two ratios, each measured in one run, in turns, on the same cores: python results/speed.py

1. Pre-training at `nano`, everything included, against its bare training step on a fixed batch.
2. Rendering against a compiled loop, where numba is installed (onepfrac itself does not need it). The loop does what
   the method's description says, point by point: choose a map, move, keep the points; find the bounding box; stamp a
   random 3x3 mask for each point.
"""
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import onepfrac as op

try:
    import numba
    compiled = numba.njit(parallel=True, fastmath=True)
except ImportError:
    numba, compiled = None, lambda function: function
prange = numba.prange if numba else range


@compiled
def compiled_loop(maps, cumulative, uniforms, size, margin, images):
    for image in prange(len(maps)):
        np.random.seed(image)
        points = len(uniforms)
        xs, ys = np.empty(points, np.float32), np.empty(points, np.float32)
        x = y = np.float32(0)
        for t in range(points):
            j = 0
            while uniforms[t] > cumulative[j]:
                j += 1
            w = maps[image, j]
            x, y = w[0, 0] * x + w[0, 1] * y + w[0, 2], w[1, 0] * x + w[1, 1] * y + w[1, 2]
            xs[t], ys[t] = x, y
        low_x, low_y = xs.min(), ys.min()
        scale_x = (size - 1 - 2 * margin) / (xs.max() - low_x)
        scale_y = (size - 1 - 2 * margin) / (ys.max() - low_y)
        for t in range(points):
            column = int((xs[t] - low_x) * scale_x) + margin
            row = size - 1 - margin - int((ys[t] - low_y) * scale_y)
            mask = np.random.randint(1, 512)
            for k in range(9):
                images[image, row - 1 + k // 3, column - 1 + k % 3] = 127 * ((mask >> k) & 1)


def take_turns(ways, rounds):
    """Run each function in turn, `rounds` times -> {name: all seconds}."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, function in ways.items():
            start = time.perf_counter()
            function()
            seconds[name].append(round(time.perf_counter() - start, 4))
    return seconds


def pipeline(steps=25, rounds=5):
    """Share of the bare step's images/s that pre-training reaches at `nano`."""
    args = op.make_parser().parse_args(["pretrain", "--recipe", "nano", "--device", "cpu"])
    device = op.resolve(args)
    team = op.Team(device, 0, 1)
    images = op.SOURCES["fractal"](args, device).images
    model = op.make_model(args, team, args.L, args.steps, args.L)
    augment = op.make_augment(args, args.L, op.HALF, op.HALF, True)
    augment.generator = torch.Generator()
    optimizer = op.make_optimizer(model, args.optimizer, args.lr, args.weight_decay)
    x, target = augment(images[torch.arange(args.batch_size) % args.L], torch.arange(args.batch_size) % args.L)

    def bare_step(x=x, target=target):
        with op.autocast(device, args.precision):
            logits = model(x)
        op.lpce_loss(logits.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def whole_step(step):
        i = op.batch_indices(args.L, args.batch_size, step, 0)
        augment.generator.manual_seed(op.seed_for(0, step))
        bare_step(*augment(images[i], i))

    seconds = take_turns({"bare": lambda: [bare_step() for _ in range(steps)],
                          "whole": lambda: [whole_step(s) for s in range(steps)]}, rounds + 1)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    return dict(measured="pipeline", precision=args.precision, seconds_of_steps=seconds,
                images_per_s={name: round(steps * args.batch_size / t) for name, t in best.items()},
                whole_over_bare=round(best["bare"] / best["whole"], 3))


def rendering(images=1000, points=100_000, size=512, rounds=3):
    base = op.base_ifs(2, 3.5, 32)
    probs = base[:, :, :2].det().abs()
    maps = op.perturb(base, 0.05, images, torch.Generator().manual_seed(0))
    uniforms = np.random.default_rng(0).random(points, np.float32)
    cumulative = (probs / probs.sum()).cumsum(0).numpy()
    cumulative[-1] = 2
    numba.set_num_threads(torch.get_num_threads())
    canvas = np.zeros((images, size, size), np.uint8)
    compiled_loop(maps[:2].numpy(), cumulative, uniforms[:100], size, 6, canvas)
    seconds = take_turns({
        "numba": lambda: compiled_loop(maps.numpy(), cumulative, uniforms, size, 6, canvas),
        "onepfrac": lambda: op.render_ifs(maps, size, points, "random", torch.Generator().manual_seed(0), probs),
    }, rounds)
    return dict(measured="rendering", images=images, points=points, size=size, numba=numba.__version__,
                seconds=seconds, numba_over_onepfrac=round(min(seconds["numba"]) / min(seconds["onepfrac"]), 2))


if __name__ == "__main__":
    for measure in (pipeline, *((rendering,) if numba else ())):
        print(json.dumps(dict(measure(), threads=torch.get_num_threads(), torch=torch.__version__)))
