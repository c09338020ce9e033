"""How fast onepfrac is, beside the machine's limits and beside what one would use instead:

    python results/speed.py [NAME ...]                      # a line of JSON for each NAME, by default for all
    python results/speed.py limits --flags="--recipe small" # flags of pretrain
    python results/speed.py generator --authors FOLDER      # the src folder of SUPER-TADORY/1p-frac's generator

limits        every part beside a limit of the machine: rendering, augmentation, the training step, whole pre-training,
              and drawing and pre-training on every source
rendering     a compiled chaos game, point by point (numba, where it is installed), each in a process of its own
generator     the authors' generator, one image
augmentation  timm's transforms and PIL in a DataLoader over rendered PNG files (timm, where it is installed)
step          the training step of timm's Vision Transformer, the same shapes (timm, where it is installed)
nano          all training steps of nano's pre-training, and of its older setting (21,000 of AdamW, in batches of 64)
memory        what rendering 21,000 images needs besides the images
scaling       rendering at twice the points, images, pixels; pre-training with L = 21,000 against 1,000

Ways that are compared take turns in one run on the same cores. `limits` runs on a GPU where there is one, the others
on the CPU.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import platform
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import onepfrac as op
from figures import SOURCES, parse

try:
    import numba
    compiled = numba.njit(parallel=True, fastmath=True)
except ImportError:
    numba, compiled = None, lambda function: function
try:
    import timm
    import timm.data
except ImportError:
    timm = None
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
    """Each function once, not counted, then all of them in turn -> {name: seconds of each round}."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, function in ways.items():
            start = time.perf_counter()
            function()
            seconds[name].append(round(time.perf_counter() - start, 4))
    return {name: times[1:] for name, times in seconds.items()}


def last_line(folder):
    return json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1])


def ratio(seconds, slow, fast):
    return round(min(seconds[slow]) / min(seconds[fast]), 2)


def pretraining(flags, *more):
    """Settings of a pre-training whose last line of the log is about its last 20 steps."""
    return parse(["pretrain", "--steps", "40", "--log-every", "20", *flags.split(), *more])


def flops(model, args, x, target):
    """Operations of a training step."""
    with FlopCounterMode(display=False) as count:
        op.train_step(model, op.make_optimizer(model, args), x, target, args.lr, args)
    return count.get_total_flops()


def limits(options):
    """images/s of every part, and which share of a limit that is: of the time to read and write its data once, of a
    matrix product with as many operations, or, for whole pre-training, of the bare step."""
    args = pretraining(options.flags)
    cuda = args.device == "cuda"
    S, B = args.canvas, args.batch_size

    def rate(function, work):                   # a second, the median over at least one
        times = 20 if cuda else 1               # a GPU is waited for once in 20 calls
        function()
        seconds = []
        while sum(seconds) < 1:
            began = time.perf_counter()
            for _ in range(times):
                function()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return times * work / sorted(seconds)[len(seconds) // 2]

    def whole(flags=""):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            settings = pretraining(f"{options.flags} {flags}", "--out", folder)
            with op.open_run(settings):
                op.pretrain(settings)
            return last_line(folder)["images_per_s"]

    def share(speed, limit):
        return dict(images_per_s=round(speed, 1), share=round(speed / limit, 3))

    whole()                                     # warms up
    unit = 1 if sys.platform == "darwin" else 1024
    peak = torch.cuda.max_memory_allocated() if cuda else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    data = torch.ones(2, 2 ** 28, dtype=torch.uint8, device=args.device)
    copy = rate(lambda: data[0].copy_(data[1]), data[0].numel())
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    square = torch.randn(2, *2 * [8192 if cuda else 2048], device=args.device).to(dtype)
    product = rate(lambda: square[0] @ square[1], 2 * square.shape[1] ** 3)
    del data, square

    maps, probs = (t.to(args.device) for t in fractals(1000, args.delta))
    render = rate(lambda: ours(maps, probs), len(maps))

    model = op.make_model(args, args.L).to(args.device)
    augment = op.make_augment(args, args.L, flip=(0.5 * args.flip,) * 2, erase=0.5 * args.erase)
    images = torch.full((B, S, S), op.GREY, dtype=torch.uint8, device=args.device)
    labels = torch.arange(B, device=args.device) % args.L
    augmented = rate(lambda: augment(images, labels), B)

    x, target = augment(images, labels)
    operations, optimizer = flops(model, args, x, target), op.make_optimizer(model, args)
    network = op.accelerate(model, args)
    turns = [(rate(lambda: op.train_step(network, optimizer, x, target, args.lr, args), B), whole())
             for _ in range(3)]
    bare, trained = (max(speeds) for speeds in zip(*turns))

    sources = {}
    for label, flags in SOURCES.items():
        source = op.source_data(pretraining(f"{options.flags} {flags}"))
        some, began = torch.arange(min(len(source), 64)), time.perf_counter()
        source.draw(some).sum().item()          # a GPU is done by then
        drawn = len(some) / (time.perf_counter() - began)
        sources[label] = dict(drawn_per_s=round(drawn), trained_per_s=round(whole(flags)))
    return dict(
        device=args.device, processor=torch.cuda.get_device_name() if cuda else platform.machine(), recipe=args.recipe,
        flags=options.flags, precision=args.precision, peak_gb=round(peak / 1e9, 2),
        copy_gb_per_s=round(copy / 1e9, 1), product_tflop_per_s=round(product / 1e12, 3),
        render=share(render, copy / (16 * 100_000 + 512 ** 2)),    # points are written and read, pixels written
        augment=share(augmented, copy / (S ** 2 + 12 * args.img_size ** 2)),
        step=share(bare, product * B / operations), pretrain=share(trained, bare), sources=sources)


def fractals(images, delta=0.05):
    base = op.base_ifs(2, 3.5, 32)
    return op.perturb(base, delta, images, torch.Generator().manual_seed(0)), base[..., :2].det().abs()


def ours(maps, probs, points=100_000, size=512):
    return op.stamp(op.render_ifs(maps, size, points, generator=torch.Generator().manual_seed(0), probs=probs))


def render_loop(threads, images=1000, points=100_000, size=512):
    maps, probs = fractals(images)
    uniforms = np.random.default_rng(0).random(points, np.float32)
    cumulative = (probs / probs.sum()).cumsum(0).numpy()
    cumulative[-1] = 2
    numba.set_num_threads(threads)
    op.keep_memory()
    start = time.perf_counter()
    compiled_loop(maps.numpy(), cumulative, uniforms, size, 6, np.zeros((images, size, size), np.uint8))
    return time.perf_counter() - start


def render_ours(threads, images=1000):
    maps, probs = fractals(images)
    torch.set_num_threads(threads)
    op.keep_memory()
    start = time.perf_counter()
    ours(maps, probs)
    return time.perf_counter() - start


def rendering(args, rounds=7):
    """1,000 images of 512, 100,000 points. Two libraries' threads in one process would hinder each other."""
    if not numba:
        return dict(skipped="numba is not installed")
    result = dict(numba=numba.__version__)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as one, ProcessPoolExecutor(1, spawn) as other:
        for n in sorted({1, torch.get_num_threads()}):
            turns = [(one.submit(render_loop, n).result(), other.submit(render_ours, n).result())
                     for _ in range(rounds + 1)][1:]                # the first compiles
            loop, batched = (sorted(round(t, 3) for t in times) for times in zip(*turns))
            result[f"{n} threads"] = dict(numba=loop, onepfrac=batched, numba_over_onepfrac=round(
                loop[rounds // 2] / batched[rounds // 2], 2))
    return result


def generator(args):
    if not args.authors:
        return dict(skipped="--authors FOLDER was not given")
    sys.path.insert(0, args.authors)
    from ifs_function import ifs_function
    maps, probs = fractals(1, 0.0)
    numbers = torch.cat([maps[0, :, :, :2].flatten(1), maps[0, :, :, 2], (probs / probs.sum()).view(-1, 1)], 1)

    def theirs():
        drawing = ifs_function(0.0, 0.0, "", "", "")
        for map_numbers in numbers.tolist():
            drawing.set_param(*map_numbers)
        drawing.calculate(100_000)
        assert drawing.draw_patch(512, 512, 6, 6, "gray", 0, 0.05, imgsave=False)

    many = fractals(200)[0]
    seconds = take_turns({"authors": theirs, "one": lambda: ours(maps, probs), "200": lambda: ours(many, probs)}, 3)
    return dict(seconds=seconds, alone=ratio(seconds, "authors", "one"),
                one_of_many=round(200 * min(seconds["authors"]) / min(seconds["200"]), 1))


def augmentation(args, images=2048):
    """nano's sizes, every switch on: 128 to 32 pixels, crop, flips, RandAugment, erasing; ours stamps a new texture.

    (Without RandAugment's mstd0.5: newer versions of PIL refuse the 0 bits that timm's posterize then asks for.)
    """
    if not timm:
        return dict(skipped="timm is not installed")
    from PIL import Image
    from torchvision.datasets import ImageFolder
    maps, probs = fractals(64)
    whole = op.render_ifs(maps, 128, 20_000, generator=torch.Generator().manual_seed(0), probs=probs)
    i = torch.arange(images) % len(maps)
    augment = op.Augment(32, len(maps), mixup=0, cutmix=0)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "0").mkdir()
        for k, image in enumerate(op.stamp(whole[i])):
            Image.fromarray(image.numpy()).convert("RGB").save(f"{folder}/0/{k}.png")
        transform = timm.data.create_transform(
            32, is_training=True, auto_augment="rand-m9-inc1", color_jitter=0.4, re_prob=0.5, re_mode="pixel",
            hflip=0.5, vflip=0.5, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
        loader = torch.utils.data.DataLoader(ImageFolder(folder, transform), 64, shuffle=True, drop_last=True,
                                             num_workers=torch.get_num_threads(), persistent_workers=True)

        def device():
            for batch in i.split(64):
                augment(op.stamp(whole[batch]), batch)

        seconds = take_turns({"timm": lambda: [None for _ in loader], "onepfrac": device}, 3)
    return dict(timm=timm.__version__, images=images, workers=torch.get_num_threads(), seconds=seconds,
                images_per_s={name: round(images / min(times)) for name, times in seconds.items()},
                onepfrac_over_timm=ratio(seconds, "timm", "onepfrac"))


def step(args):
    if not timm:
        return dict(skipped="timm is not installed")
    result = dict(timm=timm.__version__)
    for model, size, patch, batch in (("vit_nano", 32, 4, 64), ("vit_tiny", 32, 4, 32), ("vit_tiny", 224, 16, 16)):
        for precision in ("bf16", "fp32"):
            dim, depth, heads = op.MODELS[model]
            shapes = dict(img_size=size, patch_size=patch, num_classes=1000)
            settings = argparse.Namespace(precision=precision, clip_grad=0, optimizer="adamw", lr=1e-3,
                                          weight_decay=0.05)
            x, target = torch.randn(batch, 3, size, size), torch.full((batch, 1000), 1e-3)

            def steps(network):
                optimizer = op.make_optimizer(network, settings)
                return lambda: [op.train_step(network, optimizer, x, target, 1e-3, settings) for _ in range(5)]

            seconds = take_turns({
                "timm": steps(timm.models.VisionTransformer(embed_dim=dim, depth=depth, num_heads=heads, **shapes)),
                "onepfrac": steps(op.ViT(dim=dim, depth=depth, heads=heads, **shapes))}, 5)
            result[f"{model} at {size}/{patch}, batch {batch}, {precision}"] = dict(
                seconds=seconds, onepfrac_over_timm=ratio(seconds, "timm", "onepfrac"))
    return result


def nano(args, some=20):
    """Minutes of the bare steps, from `some` of them at a time."""
    ways = {"nano": "", "adamw": "--optimizer adamw --lr 1e-3 --batch-size 64 --steps 21000"}
    settings = {name: parse(["pretrain", *flags.split()]) for name, flags in ways.items()}

    def steps(args):
        model = op.make_model(args, args.L)
        x, target = torch.randn(args.batch_size, 3, 32, 32), torch.arange(args.batch_size) % args.L
        optimizer = op.make_optimizer(model, args)
        return lambda: [op.train_step(model, optimizer, x, target, args.lr, args) for _ in range(some)]

    seconds = take_turns({name: steps(args) for name, args in settings.items()}, 7)
    minutes = {name: round(min(times) / some * settings[name].steps / 60, 2) for name, times in seconds.items()}
    return dict(seconds=seconds, minutes=minutes, nano_over_adamw=round(minutes["nano"] / minutes["adamw"], 3))


def memory(args, images=21_000):
    """The largest memory a process of its own had, less that of the same process with one image."""
    # getrusage would count what this process, the child's parent, had: Linux hands it down
    program = ("import sys; sys.argv[1:] = []; sys.path.insert(0, {0!r}); import speed; "
               "maps, probs = speed.fractals({1}); speed.op.keep_memory(); speed.ours(maps, probs, {2}, {3}); "
               "print(1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))")

    def peak(*sizes):
        command = [sys.executable, "-c", program.format(str(Path(__file__).parent), *sizes)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    result = {}
    for size, points in ((512, 100_000), (128, 20_000)):
        above = peak(images, points, size) - images * size ** 2 - peak(1, points, size)
        result[f"{images} images of {size}, {points} points"] = dict(
            images_gib=round(images * size ** 2 / 2 ** 30, 2), above_gib=round(above / 2 ** 30, 2))
    return result


def scaling(args):
    maps, probs = fractals(400)
    sizes = {"base": (200, 100_000, 512), "twice the points": (200, 200_000, 512),
             "twice the images": (400, 100_000, 512), "twice the pixels": (200, 100_000, 724)}
    seconds = take_turns({name: lambda n=n, p=points, s=size: ours(maps[:n], probs, p, s)
                          for name, (n, points, size) in sizes.items()}, 5)
    rates = {"1000": [], "21000": []}
    for _ in range(3):
        for L, found in rates.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, op.__file__, "pretrain", "--recipe", "nano", "--device", "cpu", "--L", L,
                           "--steps", "100", "--log-every", "50", "--out", folder]
                subprocess.run(command, capture_output=True, check=True)
                found.append(last_line(folder)["images_per_s"])
    return dict(seconds=seconds, times={name: ratio(seconds, name, "base") for name in sizes},
                pretraining_images_per_s_by_L=rates, L_21000_over_1000=round(max(rates["21000"]) / max(rates["1000"]), 3))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = dict(limits=limits, rendering=rendering, generator=generator, augmentation=augmentation, step=step,
                 nano=nano, memory=memory, scaling=scaling)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(every)}")
    parser.add_argument("--authors", metavar="FOLDER")
    parser.add_argument("--flags", default="", help="of pretrain, for limits")
    args = parser.parse_args()
    op.keep_memory()
    for name in args.names or every:
        if name not in every:
            parser.error(f"NAME {name}: there is {', '.join(every)}")
        print(json.dumps(dict(measured=name, threads=torch.get_num_threads(), torch=torch.__version__) |
                         every[name](args)), flush=True)
