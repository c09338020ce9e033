"""Rendering against a compiled loop: python results/render_vs_numba.py  (needs numba, which onepfrac does not)

The loop is what the method's description says, point by point: choose a map, move, keep the bounding box; then
stamp a random 3x3 mask for each point. Both render the same systems, in one run, in turns, on the same cores.
"""
import json
import platform
import sys
import time
from pathlib import Path

import numba
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import onepfrac as op


@numba.njit(parallel=True, fastmath=True)
def compiled_loop(maps, cumulative, uniforms, size, margin, images):
    for image in numba.prange(len(maps)):
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


def main(images=1000, points=100_000, size=512, rounds=3):
    base = op.base_ifs(2, 3.5, 32)
    probs = base[:, :, :2].det().abs()
    maps = op.perturb(base, 0.05, images, torch.Generator().manual_seed(0))
    uniforms = np.random.default_rng(0).random(points, np.float32)
    cumulative = (probs / probs.sum()).cumsum(0).numpy()
    cumulative[-1] = 2
    numba.set_num_threads(torch.get_num_threads())
    canvas = np.zeros((images, size, size), np.uint8)
    ways = {
        "numba": lambda: compiled_loop(maps.numpy(), cumulative, uniforms, size, 6, canvas),
        "onepfrac": lambda: op.render_ifs(maps, size, points, "random", torch.Generator().manual_seed(0), probs),
    }
    compiled_loop(maps[:2].numpy(), cumulative, uniforms[:100], size, 6, canvas)
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, render in ways.items():
            start = time.perf_counter()
            render()
            seconds[name].append(round(time.perf_counter() - start, 3))
    best = {name: min(times) for name, times in seconds.items()}
    print(json.dumps(dict(images=images, points=points, size=size, threads=torch.get_num_threads(),
                          cpu=platform.processor() or platform.machine(), torch=torch.__version__,
                          numba=numba.__version__, seconds=seconds,
                          numba_over_onepfrac=round(best["numba"] / best["onepfrac"], 2))))


if __name__ == "__main__":
    main()
