"""onepfrac on a GPU: is it right, and how fast is it? (results/gpu.sh runs every part in a process of its own.)

    python results/gpu.py check                     # GPU against CPU: lines of ok and FAIL, status 1 after a FAIL
    python results/gpu.py measure --out FOLDER      # lines of JSON, also in FOLDER/gpu.jsonl, and profiles beside it
    python results/gpu.py check network             # some parts, by the names of their functions below
    python results/gpu.py record NAME SECONDS RUN/last.pt   # such a line; the weights in half precision as RUN.pt

With `--device cpu` all of it runs with small numbers, to test the program itself.
"""
import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
import timeit
import traceback
from pathlib import Path

import torch
from torchvision.transforms import v2

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import onepfrac as op
import speed
from figures import SOURCES, parse


# ---- check: a part is a generator of (name, is it right?, numbers to print ...)

def different(here, there):
    """For each image, how many pixels differ by more than a level, over how many are lit."""
    here, there = here.flatten(1).float(), there.cpu().flatten(1).float()
    return ((here - there).abs() > 1).sum(1) / (here > 0).sum(1).clamp(min=1)


def renderer(device):
    base = op.base_ifs(2, 3.5, 32)
    odd = torch.tensor([[[1.5, 1.5, 1], [1.5, 1.5, 1]],                 # runs away
                        [[0.9, 0, 1e38], [0, 0.9, 1e38]],               # is beyond all numbers
                        [[0.5, 0.1, 1e6], [0, 0.5, 1e6]]])[:, None].expand(3, 2, 2, 3)          # is far from 0
    maps = torch.cat([op.perturb(base, 0.3, 64, op.seeded(0)), odd])    # a fifth of the 64 expands
    def draw(maps, *how):
        return op.render_ifs(maps, *how, op.seeded(1), base[..., :2].det().abs())
    for size, *how in ((64, 2000, False), (128, 100_000, True), (512, 100_000, True)):
        there = draw(maps.to(device), size, *how)
        share = different(draw(maps, size, *how), there)
        yield (f"{size} pixels: less than 1% differ in the median image", share[:64].median() < 0.01,
               f"{share[:64].median():.1e}, in the worst {share[:64].max():.1e}")
        yield f"{size} pixels: odd systems", share[64:].max() < 0.1 and set(there.unique().tolist()) == {0, op.GREY}
        alone = torch.cat([draw(m[None].to(device), size, *how) for m in maps[-8:]])
        yield f"{size} pixels: alone as in a group", torch.equal(alone, there[-8:])
    yield "a texture repeats", torch.equal(*(
        op.stamp(draw(maps[:8].to(device), 128, 2000, True), torch.Generator(device).manual_seed(0)) for _ in range(2)))
    coins = torch.full((200, 128, 128), op.GREY, dtype=torch.uint8, device=device)
    op.stamp(coins, torch.Generator(device).manual_seed(0))
    off = (coins > 0).float().mean(0) - 0.5
    yield "coins are fair", off.mean().abs() < 0.002 and off.abs().max() < 0.2, f"{off.mean():.1e}"     # 5.7 sigma


def sources(device):
    more = {kind: f"--source image --warp {kind}" for kind in op.WARPS} | {"multiplied": "--noise multiplicative"}
    for name, flags in (SOURCES | more).items():
        flags += f" --image {HERE / 'saw.png'}" * ("source image" in flags)
        flags = f"--recipe nano --canvas 64 --points 5000 --L 16 {flags}".split()
        try:
            share = different(*(op.source_data(parse(["pretrain", "--device", d, *flags])).images
                                for d in ("cpu", device)))
            yield name, share.median() < 0.01, f"median {share.median():.1e}, worst {share.max():.1e}"
        except Exception:
            yield name, False, traceback.format_exc()


def augmentation(device):
    x = torch.randint(256, (8, 3, 48, 48), generator=op.seeded(0)).float()
    x[::2] = x[::2] // 3 + 40                                           # room for autocontrast
    x[2::4, :, 8:] = 0                                                  # most pixels are equal
    magnitude, sign = torch.tensor([0, 3.7, 9, 10] * 2), torch.tensor([1, -1]).repeat_interleave(4)
    ways = {f"operation {name}": lambda x, k=k: op.apply_op(x, torch.full((8,), k), magnitude * sign / 10)
            for k, name in enumerate(op.OPS)} | {"jitter": lambda x: op.color_jitter(x, 0.4)}
    for off in ("erase", "erase randaug", "erase randaug jitter"):
        augment = op.Augment(32, 10, **dict.fromkeys(off.split(), 0))
        ways[f"all but {off}"] = lambda x, a=augment: 127.5 * a(x.byte(), torch.arange(8, device=x.device))[0]
    def results(way, x):
        return torch.cat([way(x).cpu() for seed in range(6) if torch.manual_seed(seed)])
    for (name, way), channels in itertools.product(ways.items(), (1, 3)):
        apart = (results(way, x[:, :channels]) - results(way, x[:, :channels].to(device))).abs()
        yield (f"{name}, {channels} channels", (apart < 1.5).float().mean() > 0.99,     # levels; NaN is not below
               f"{(apart > 0.5).float().mean():.1e} differ, by {apart.max():.0f} at most")
    y = op.Augment(32, 10).random_erase(torch.zeros(256, 3, 32, 32, device=device))
    noise, share = y[y != 0], (y != 0).flatten(1).any(1).float().mean()
    normal = noise.mean().abs() < 0.03 and (noise.std() - 1).abs() < 0.03
    yield "half of the images have a box of noise", 0.35 < share < 0.65 and normal, f"{share:.2f}"


def network(device):
    model = op.ViT(32, 4, 100)
    torch.nn.init.normal_(model.head.weight, std=0.02)                  # at 0 no other layer has a gradient
    there, x, target = copy.deepcopy(model).to(device), torch.randn(16, 3, 32, 32), torch.rand(16, 100).softmax(1)
    def answer(model, network, device, precision):
        model.zero_grad()
        logits = op.predict(network, x.to(device), argparse.Namespace(precision=precision))
        op.lpce_loss(logits, target.to(device)).backward()
        return logits.detach().cpu(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
    settings = argparse.Namespace(device=device, precision="bf16", world=1, batch_size=len(x), img_size=32)
    compiled, right = op.accelerate(there, settings), answer(model, model, "cpu", "fp32")
    yield "compiled, unless on a CPU", (compiled is there) == (device == "cpu")
    for name, net, precision, most in (("fp32", there, "fp32", 1e-4), ("bf16", there, "bf16", 0.05),
                                       ("bf16, compiled", compiled, "bf16", 0.05)):
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(answer(there, net, device, precision), right)]
        yield f"ViT in {name}: logits, gradients", all(e < most for e in errors), *(f"{e:.1e}" for e in errors)
    for name, lr in (("adamw", 1e-3), ("sgd", 0.05)):
        args, losses = argparse.Namespace(precision="fp32", clip_grad=1.0, optimizer=name, lr=lr, weight_decay=0.05), []
        for d in ("cpu", device):
            torch.manual_seed(0)
            small, data = op.ViT(32, 8, 100, 64, 2, 2).to(d), (x.to(d), target.to(d))
            optimizer = op.make_optimizer(small, args)
            losses.append([op.train_step(small, optimizer, *data, lr, args)[0].item() for _ in range(20)])
        apart = [abs(a - b) for a, b in zip(*losses)]
        yield f"twenty steps of {name}", all(a < 5e-3 for a in apart), f"losses by {max(apart):.1e}", losses[1][-1]


def resume(device):
    """A run that is stopped after six steps and resumed ends as a whole one."""
    folder, count, saved = tempfile.mkdtemp(), op.Run.count, []
    flags = (f"pretrain --recipe nano --device {device} --L 8 --canvas 32 --points 2000 --img-size 16 --batch-size 8 "
             f"--steps 12 --log-every 3 --texture fresh --randaug --erase --mixup --drop-path 0.1 --out {folder}/")
    for words, stop in ((flags + "whole", None), (flags + "parts", 6), (f"resume {folder}/parts", None)):
        def counted(run, *step):
            count(run, *step)
            run.signal = signal.SIGTERM if run.step == stop else None   # as by a signal
        op.Run.count = counted
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            op.main(words.split())
    op.Run.count = count
    for name in ("whole", "parts"):
        saved.append(torch.load(f"{folder}/{name}/last.pt", weights_only=True))
    a, b = (torch.cat([t.flatten() for t in run["model"].values()]) for run in saved)
    error, loss = (a - b).norm() / a.norm(), abs(saved[0]["log"][-1]["loss"] - saved[1]["log"][-1]["loss"])
    most = 0.02 if device == "cuda" else 0                              # a GPU's sums vary with their order
    good = error <= most and loss <= most and saved[1]["step"] == 12
    yield "a resumed run ends as a whole one", good, f"weights {error:.1e}, loss {loss:.1e}"


# ---- measure: a part is a function of device and folder -> numbers

def seconds(function, device, calls=20):
    """Of one call: the median of five rounds, after one that is not counted. A GPU is waited for once in a round."""
    calls = calls if device == "cuda" else 1
    def round():
        for _ in range(calls):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
    return sorted(timeit.repeat(round, number=1, repeat=6)[1:])[2] / calls


def profile(function, device, path):
    """Writes what takes longest -> how many kernels run in a call, and how long the GPU is busy."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA][:1 + (device == "cuda")]) as found:
        seconds(function, device, 1)                                    # six calls
    kernels = [e for e in found.events()
               if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    table = found.key_averages().table(sort_by=f"self_{'device' if kernels else 'cpu'}_time_total", row_limit=12)
    path.write_text(f"six calls\n{table}\n")
    return dict(kernels=len(kernels) / 6, busy_ms=round(sum(e.device_time for e in kernels) / 6000, 3))


def rendering(device, out):
    """Beside the limit: the points are written and read, the pixels written, as fast as a large copy."""
    cuda = device == "cuda"
    data = torch.ones(2, 2 ** (30 if cuda else 22), dtype=torch.uint8, device=device)
    bandwidth = 2 * data[0].numel() / seconds(lambda: data[0].copy_(data[1]), device)           # read and written
    result, (points, size) = dict(copy_gb_per_s=round(bandwidth / 1e9)), (100_000, 512) if cuda else (2000, 64)
    for images in (1000, 21_000) if cuda else (20,):
        maps, probs = speed.fractals(images)
        draw = functools.partial(speed.ours, maps.to(device), probs, points, size)
        took, limit = seconds(draw, device, 2), images * (16 * points + size ** 2) / bandwidth
        result[f"{images} of {size}"] = dict(
            seconds=round(took, 4), limit=round(limit, 5), share=round(limit / took, 3)) | (
            profile(draw, device, out / "profile-rendering.txt") if images <= 1000 else {})
    return result


def training(command, recipe, device, out):
    """images/s of batches, augmentation, the bare step (compiled, eager, timm's compiled), and of all in a row."""
    cuda, pre, flags = device == "cuda", command == "pretrain", f"{command} --recipe {recipe} --device {device}"
    flags += " --batch-size 4 --model vit_nano" * (not cuda) + " --L 16 --points 2000 --canvas 64" * (pre and not cuda)
    args, noise = op.parse(flags.split()), torch.randint(256, (5000, 3, 32, 32), dtype=torch.uint8, device=device)
    data = op.source_data(args) if pre else op.Data(torch.arange(5000) % 100, lambda i: noise[i.to(device)], args)
    classes, batch, (dim, depth, heads) = args.L if pre else 100, args.batch_size, op.MODELS[args.model]
    augment = op.make_augment(args, classes, flip=(0.5 * args.flip,) * 2, erase=0.5 * args.erase)
    def draw():
        return data[torch.randint(len(data), (batch,))]
    def stepper(model, accelerate=op.accelerate):
        optimizer, network = op.make_optimizer(model.to(device), args), accelerate(model, args)
        return lambda x, target: op.train_step(network, optimizer, x, target, args.lr, args)
    torch.compiler.reset()                                              # else a second shape is taken for dynamic
    model, drawn, (x, target) = op.make_model(args, classes).to(device), draw(), augment(*draw())
    square = torch.randn(2, *2 * [8192 if cuda else 256], device=device).to(torch.bfloat16 if cuda else torch.float32)
    product = 2 * square.shape[1] ** 3 / seconds(lambda: square[0] @ square[1], device)
    operations = speed.flops(model, args, x, target)
    steps = dict(step=stepper(model), eager_step=stepper(model, lambda model, args: model))
    if speed.timm and pre:
        steps["timm_step"] = stepper(speed.timm.models.VisionTransformer(
            args.img_size, args.patch_size, num_classes=classes, embed_dim=dim, depth=depth, num_heads=heads,
            drop_path_rate=args.drop_path))
    ways = dict(batch=draw, augment=lambda: augment(*drawn), all=lambda: steps["step"](*augment(*draw())))
    ways |= {name: functools.partial(step, x, target) for name, step in steps.items()}
    took = {way: seconds(function, device) for way, function in ways.items()}
    result = dict(
        batch_size=batch, precision=args.precision, images_per_s={way: round(batch / s) for way, s in took.items()},
        all_over_step=round(took["step"] / took["all"], 3), product_tflop_per_s=round(product / 1e12, 2),
        step_over_product=round(operations / took["step"] / product, 3),
        timm=speed.timm.__version__ if speed.timm else "missing", waits="nowhere" if cuda else "not asked")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(8):                                          # with other random choices
                ways["all"]()
        except RuntimeError:
            result["waits"] = traceback.format_exc()
        torch.cuda.set_sync_debug_mode("default")
        result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return result | {f"{way} profile": profile(ways[way], device, out / f"profile-{command}-{recipe}-{way}.txt")
                     for way in ("augment", "step")}


def libraries(side, size, batch, device, out):
    """DeiT's augmentation but for mixing, RGB, images/s. Ours draws all for each sample, torchvision all once for a
    batch, kornia the operations of RandAugment once for a batch."""
    batch, half = batch if device == "cuda" else 16, ((0.5,) * 3,) * 2
    images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    labels, ours = torch.arange(batch, device=device), op.Augment(size, 1000, mixup=0, cutmix=0)
    theirs = v2.Compose([v2.RandomResizedCrop(size, interpolation=3), v2.RandomHorizontalFlip(),
                         v2.RandomVerticalFlip(), v2.RandAugment(), v2.ToDtype(torch.float32, scale=True),
                         v2.Normalize(*half), v2.RandomErasing(0.5, value="random")])
    ways, result = dict(onepfrac=lambda: ours(images, labels), torchvision=lambda: theirs(images)), {}
    try:
        from kornia import augmentation as K
        chain = K.ImageSequential(
            K.RandomResizedCrop((size, size), resample="bicubic"), K.RandomHorizontalFlip(), K.RandomVerticalFlip(),
            K.auto.RandAugment(2, 9), K.Normalize(*half), K.RandomErasing())
        ways["kornia"] = lambda: chain(images / 255)
    except ImportError:
        result["kornia"] = "missing"
    return result | {name: round(batch / seconds(way, device)) for name, way in ways.items()}


# ---- the command line

CHECKS = {part.__name__: part for part in (renderer, sources, augmentation, network, resume)}
MEASURES = dict(rendering=rendering) | {
    f"{command}-{recipe}": functools.partial(training, command, recipe)
    for command, recipe in (("pretrain", "small"), ("finetune", "small"), ("pretrain", "paper"))} | {
    f"libraries-{sizes[1]}": functools.partial(libraries, *sizes) for sizes in ((256, 224, 256), (32, 32, 512))}


def record(name, numbers, args):
    """A line of JSON. The commit of a copy without .git is in a file COMMIT."""
    commit, git = HERE.parent / "COMMIT", f'git -C "{HERE}" describe --always --dirty'
    line = json.dumps(dict(
        name=name, device=torch.cuda.get_device_name() if args.device == "cuda" else "cpu", torch=torch.__version__,
        commit=commit.read_text().strip() if commit.exists() else subprocess.getoutput(git)) | numbers)
    print(line, flush=True)
    with open(args.out / "gpu.jsonl", "a") as file:
        file.write(line + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "measure", "record"))
    parser.add_argument("parts", nargs="*", help=", ".join((*CHECKS, *MEASURES)))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=".")
    args, failed = parser.parse_args(), []
    if args.command == "record":
        name, took, *checkpoints = args.parts
        record(name, dict(seconds=int(took)), args)
        for file in map(Path, checkpoints):
            model = torch.load(file, weights_only=True)["model"]
            torch.save(dict(model={name: t.half() for name, t in model.items()}), args.out / f"{file.parent.name}.pt")
        return 0
    torch.backends.cudnn.allow_tf32 = args.command == "measure"         # checks: convolutions in full precision
    for name in args.parts or (CHECKS if args.command == "check" else MEASURES):
        try:
            if args.command == "measure":
                began, numbers = time.perf_counter(), MEASURES[name](args.device, args.out)
                record(name, dict(seconds=round(time.perf_counter() - began, 1)) | numbers, args)
            for what, good, *numbers in CHECKS[name](args.device) if args.command == "check" else ():
                print("ok  " if good else "FAIL", f"{name}: {what}", *numbers, flush=True)
                failed += [what] * (not good)
        except Exception:
            print(f"FAIL {name}\n{traceback.format_exc()}", flush=True)
            failed.append(name)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
