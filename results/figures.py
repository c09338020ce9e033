"""Figures of what is drawn: python results/figures.py [FLAGS of `onepfrac.py render`]

fractal.gif  the base fractal on a closed walk through its cube of eps
strip.png    the base fractal, eight classes, and what the network sees of such classes
fig2b.png    the paper's Fig. 2b: rows of Delta, seven perturbations and the mean of 100
fig2c.png    the paper's Fig. 2c: columns of sigma, for four fractals
fig4.png     the paper's Fig. 4: a grid and a photograph, warped
sources.png  eight images of every source
saw.png      what the network sees: the first images of the first pre-training batch at `nano`, enlarged

All are drawn as recipe `nano` draws them, unless flags say something else (`--canvas 256 --points 40000`).
"""
import math
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid, save_image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import onepfrac as op

SOURCES = {     # flags of `pretrain` and `render`
    "1p-frac": "", "OFDB": "--categories 16", "FractalDB": "--categories 16 --instances 16",
    "RCDB": "--source rcdb --categories 16", "RCDB, one category": "--source rcdb",
    "Visual Atoms": "--source va --categories 16", "Visual Atoms, one category": "--source va",
    "Gaussian": "--source gaussian", "uniform": "--source uniform",
    "photograph": "--source image", "its edges": "--source image --edges canny",
}


def parse(words):
    """The settings of a command line. Flags that have no effect pass: the same ones serve all sources."""
    with mock.patch.object(op, "refuse_idle_flags", lambda args, words: None):
        return op.parse(words)


def settings(flags, command="render"):
    return parse([*command.split(), "--out", str(HERE), *sys.argv[1:], *flags.split()])


def draw(path, title, columns, rows):
    """columns: their labels; rows: pairs of a label and images (n, C, S, S) or (n, S, S) uint8."""
    drawn = [images.view(len(images), -1, *images.shape[-2:]).expand(-1, 3, -1, -1) for _, images in rows]
    grid, n, side = torch.cat(drawn) / 255, len(drawn[0]), drawn[0].shape[-1] + 2
    figure = Figure(figsize=(n + 1, len(rows) + 1))
    axis = figure.subplots()
    axis.imshow(make_grid(grid, n, pad_value=0.5).permute(1, 2, 0).cpu())
    axis.set_xticks([(k + 0.5) * side for k in range(len(columns))], columns)
    axis.set_yticks([(k + 0.5) * side for k in range(len(rows))], [label for label, _ in rows])
    axis.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
    axis.set_title(title)
    figure.savefig(path, dpi=125, bbox_inches="tight")
    print(path)


def images(flags):
    return op.source_data(settings(flags)).images


def fractal(path):
    """Each number of eps goes up and down within its side of the cube, once around, with a phase of its own."""
    args = settings("")
    base = op.base_ifs(args.num_maps, args.sigma, args.fractal_seed)
    phase = 2 * math.pi * torch.rand(base.shape, generator=op.seeded(0, "walk"))
    time = 2 * math.pi * torch.arange(48).view(-1, 1, 1, 1) / 48
    maps, probs = base + args.delta / 2 * (time + phase).cos(), base[..., :2].det().abs()
    drawn = op.render_ifs(maps, 256, 100_000, dilated=False, generator=op.seeded(0), probs=probs)
    frames = [Image.fromarray((image > 0).numpy()) for image in drawn]              # black and white
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:], duration=80, loop=0)
    print(path.with_suffix(".gif"))


def strip(path):
    """With Delta as asked, but no eps for the first picture."""
    panels = [("the fractal", images("--delta 0 --L 2")[:1], 1), ("eight classes: plus eps", images("--L 8")[:8], 4),
              ("what the network sees of them", (255 * first_batch()[:8]).to(torch.uint8), 4)]
    figure = Figure(figsize=(12, 2.9), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[1, 2, 2])
    for axis, (title, drawn, columns) in zip(axes, panels):
        grey = drawn.view(len(drawn), -1, *drawn.shape[-2:]).expand(-1, 3, -1, -1) / 255
        axis.imshow(make_grid(grey, columns, pad_value=0.5).permute(1, 2, 0), interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(path, dpi=125)
    print(path)


def fig2b(path):
    rows = []
    for delta in (0.001, 0.01, 0.05, 0.1, 0.2, 1.0):
        drawn = images(f"--delta {delta} --L 100")
        mean = 2 * drawn.float().mean(0, keepdim=True)              # at most 2 x 127, as the fractal is grey
        rows.append((f"$\\Delta$ = {delta:g}", torch.cat([drawn[:7], mean.to(torch.uint8)])))
    draw(path, "7 of 100 perturbations, and the mean of all 100 (made twice as bright)",
         [*range(1, 8), "mean of 100"], rows)


def fig2c(path):
    sigmas, first = (3.5, 4.0, 4.5, 5.0, 6.0), settings("").fractal_seed
    draw(path, "the sigma-factor of four fractals", [f"$\\sigma$ = {sigma:g}" for sigma in sigmas], [
        (f"fractal {seed}", torch.cat([images(f"--sigma {sigma} --delta 0 --L 2 --fractal-seed {seed}")[:1]
                                       for sigma in sigmas]))
        for seed in range(first, first + 4)])


def fig4(path):
    side, rows = settings("").canvas, []
    lines = torch.zeros(3, side, side, dtype=torch.uint8)
    for k in range(side // 16, side, side // 8):
        lines[:, k], lines[:, :, k] = 255, 255
    photo = images("--source image --delta 0 --L 2")[0]
    for label, image in (("grid", lines), ("photograph", photo)):
        warped = [image[None].float()]
        for kind, base in op.WARPS.items():
            params = op.perturb(base, 0.4, 1, torch.Generator().manual_seed(0))
            warped.append(F.grid_sample(warped[0], op.warp_grid(kind, params, side), align_corners=False))
        rows.append((label, torch.cat([image.expand(1, 3, -1, -1) for image in warped]).to(torch.uint8)))
    draw(path, "one warp of each kind, $\\Delta$ = 0.4", ["none", *op.WARPS], rows)


def sources(path):
    draw(path, "eight classes of every source, but eight instances of FractalDB", [],
         [(label, images(f"--L 16 {flags}")[:8]) for label, flags in SOURCES.items()])


def first_batch():
    """The images of samples.png in the folder of README's first command, (B, 3, S, S) in 0..1."""
    args = settings("", "pretrain --device cpu")
    data = op.source_data(args)
    augment = op.make_augment(args, args.L, flip=(0.5 * args.flip,) * 2, erase=0.5 * args.erase)
    i = op.batch_indices(len(data), args.batch_size, 0, args.seed)
    torch.manual_seed(op.seed_for(args.seed, "step", 0, 0))
    x, _ = augment(*data[i])
    return (x / 2 + 0.5).clamp(0, 1)                                                # mean, standard deviation: 0.5


def saw(path):
    """Half of samples.png, four times as large."""
    save_image(F.interpolate(first_batch()[:32], scale_factor=4), path, nrow=8, padding=4, pad_value=1)
    print(path)


if __name__ == "__main__":
    for figure in (fractal, strip, fig2b, fig2c, fig4, sources, saw):
        figure(Path(settings("").out) / f"{figure.__name__}.png")
