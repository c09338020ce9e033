"""Ten minutes of a GPU: is onepfrac right there, how fast is it, and what does it learn? One command, with a clock:

    bash results/gpu.sh 540                     # seconds; gpu.sh tells what else can be set

Four parts, one after the other. What does not end in time is stopped, and what fails does not stop the rest.

check    a ninth of the time, 60 s of 540: the GPU against the CPU, compiled against eager, a loop that never waits for
         the device, a run that is resumed. Meanwhile some tests of test_onepfrac.py run, and the networks of the later
         parts are compiled, as torch keeps that on disk.
speed    as long: rendering, pre-training at `small` and `paper` beside its bare step, augmentation
train    what is left: `small` with Muon is pre-trained for 40% of it. Then CIFAR-100 is fine-tuned from the fractal and
         from scratch, side by side, each at the best of three rates in short runs on held-out training images.
extras   the last seconds: rendering in larger groups, timm's network at the same shapes

Each part prints one line at its end. OUT has what has ended at any moment:

gpu.jsonl       every measurement and result, beside what is aimed at
check.txt       a line for every check, ok or FAIL
profile.txt     where the time of a pre-training step goes
logs.tgz        outputs, settings, logs and curves of all runs, at most ten seconds old
fractal.pt final-fractal.pt final-scratch.pt    the last weights that were saved, in half precision

So far it has run on CPUs only (`DEVICE=cpu`, small numbers), in full and ended at random moments; never on a GPU.
"""
import time

START = time.time()                                             # the imports count

import argparse
import contextlib
import copy
import ctypes
import glob
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import timeit
import traceback
import zipfile
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import onepfrac as op
from figures import SOURCES, parse

DEVICE = os.environ.get("DEVICE", "cuda")
CUDA = DEVICE == "cuda"
OUT, WORK, DATA = (Path(os.environ.get(*named)) for named in (
    ("OUT", "runs/gpu/out"), ("WORK", "runs/gpu/work"), ("DATA", "data/cifar100")))
BEGAN = time.strftime("%Y-%m-%d %H:%M:%S")
COMMIT = HERE.parent / "COMMIT"
COMMIT = COMMIT.read_text().strip() if COMMIT.exists() else op.git_commit() or "unknown"
PATIENCE, GRACE = 2, 4      # seconds: how late a part may be, and then, when it is asked to stop, how long it may save
FORK = multiprocessing.get_context("fork")      # children need no import; so nothing here may start CUDA or threads

LITTLE, PICTURES = ("", "") if CUDA else (" --model vit_nano --batch-size 4", " --L 8 --canvas 64 --points 2000")
PRETRAIN = {
    "small": f"pretrain --device {DEVICE} --recipe small --optimizer muon --lr 2e-3 --texture fresh --no-cutmix "
             f"--jitter{LITTLE}{PICTURES} {os.environ.get('PRE', '')}".split(),
    "paper": f"pretrain --device {DEVICE} --recipe paper{LITTLE}{PICTURES}".split()}
FINETUNE = (f"finetune --device {DEVICE} --recipe small --optimizer muon --weight-decay 0.05 --drop-path 0.1 "
            f"--batch-size 512 --data folder{LITTLE} {os.environ.get('TUNE', '')}").split()
RATES = 1e-3, 2e-3, 4e-3
TARGETS = {
    "speed small": dict(step_images_per_s=50_000, whole_over_step=0.9),
    "speed paper": dict(step_images_per_s=15_000, whole_over_step=0.9),
    "rendering 1000": dict(seconds=0.05), "final-fractal of 500 a class": dict(test_top1=70)}
TESTS = ("each_orbit or kinds_render or texture_has or random_masks or fractal_with_its_eps or vit_agrees or "
         "drop_path_drops or flipped_by or random_erasing or everything_off or operations_agree or color_jitter or "
         "evaluation_is or only_weight or never_waits or muon_moves or kept_and_streamed") if CUDA else "drop_path_drops or muon_moves"


def note(file, text):
    with open(OUT / file, "a") as out:
        out.write(text + "\n")


def record(name, **numbers):
    """A line of gpu.jsonl -> the name and the numbers that have a target, in words."""
    target = TARGETS.get(name, {})
    gpu = torch.cuda.get_device_name() if CUDA else "cpu"
    note("gpu.jsonl", json.dumps(dict(name=name, began=BEGAN, device=gpu, torch=torch.__version__, commit=COMMIT) |
                                 numbers | dict(target=target)))
    return ", ".join([name, *(f"{key} {numbers[key]} (target {aim})" for key, aim in target.items())])


def late(until):
    return time.time() > until


def one_by_one(until, functions):
    """One that fails does not stop the rest. The last line that is printed has all so far, if this is stopped."""
    texts = []
    for name, function, *given in functions:
        if texts and late(until):
            texts.append(f"no time for {name}")
            continue
        try:
            texts.append(function(*given))
        except Exception as error:
            traceback.print_exc()
            texts.append(f"FAIL {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            note("check.txt", texts[-1])
        print("; ".join(texts))
    return "; ".join(texts)


# ---- check: a group is a generator of (name, is it right?, numbers to print ...)

def different(here, there):
    """For each image, how many pixels differ by more than a level, over how many are lit."""
    here, there = here.flatten(1).float(), there.cpu().flatten(1).float()
    return ((here - there).abs() > 1).sum(1) / (here > 0).sum(1).clamp(min=1)


def renderer():
    base = op.base_ifs(2, 3.5, 32)
    odd = torch.tensor([[[1.5, 1.5, 1], [1.5, 1.5, 1]],                 # runs away
                        [[0.9, 0, 1e38], [0, 0.9, 1e38]],               # is beyond all numbers
                        [[0.5, 0.1, 1e6], [0, 0.5, 1e6]]])[:, None].expand(3, 2, 2, 3)          # is far from 0
    maps = torch.cat([op.perturb(base, 0.3, 64, op.seeded(0)), odd])    # a fifth of the 64 expands

    def draw(maps, *how):
        return op.render_ifs(maps, *how, op.seeded(1), base[..., :2].det().abs())
    for size, *how in ((64, 2000, False), (128, 100_000, True), (512, 100_000, True))[:3 if CUDA else 1]:
        there = draw(maps.to(DEVICE), size, *how)
        share = different(draw(maps, size, *how), there)
        yield (f"{size} pixels: less than 1% differ in the median image", share[:64].median() < 0.01,
               f"{share[:64].median():.1e}, in the worst {share[:64].max():.1e}")
        yield f"{size} pixels: odd systems", share[64:].max() < 0.1 and set(there.unique().tolist()) == {0, op.GREY}


def network():
    torch.backends.cudnn.allow_tf32 = False                             # convolutions in full precision
    model = op.ViT(32, 4, 100, *op.MODELS["check"])
    torch.nn.init.normal_(model.head.weight, std=0.02)                  # at 0 no other layer has a gradient
    there, x, target = copy.deepcopy(model).to(DEVICE), torch.randn(16, 3, 32, 32), torch.rand(16, 100).softmax(1)

    def answer(model, network, device, precision):
        model.zero_grad()
        logits = op.predict(network, x.to(device), argparse.Namespace(precision=precision))
        op.lpce_loss(logits, target.to(device)).backward()
        return logits.detach().cpu(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
    right = answer(model, model, "cpu", "fp32")

    def apart(name, net, precision, most):
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(answer(there, net, DEVICE, precision), right)]
        return f"{name}: logits, gradients", all(e < most for e in errors), *(f"{e:.1e}" for e in errors)
    yield apart("ViT in fp32", there, "fp32", 1e-4)
    yield apart("ViT in bf16", there, "bf16", 0.05)

    def losses(device, kind, lr, precision="fp32", accelerate=lambda model, args: model):
        args = argparse.Namespace(precision=precision, clip_grad=1.0, optimizer=kind, lr=lr, weight_decay=0.05,
                                  device=device, world=1, batch_size=16, img_size=32)
        twin = copy.deepcopy(model).to(device)
        net, optimizer, data = accelerate(twin, args), op.make_optimizer(twin, args), (x.to(device), target.to(device))
        return [op.train_step(net, optimizer, *data, lr, args)[0].item() for _ in range(20)]
    for kind, lr in (("adamw", 1e-3), ("sgd", 0.05), ("muon", 1e-3)):
        pairs = [*zip(losses("cpu", kind, lr), losses(DEVICE, kind, lr))]
        most = max(abs(a - b) for a, b in pairs)
        yield f"twenty steps of {kind}", most < 5e-3, f"losses by {most:.1e}", pairs[-1]
    settings = argparse.Namespace(device=DEVICE, precision="bf16", world=1, batch_size=16, img_size=32)
    compiled = op.accelerate(there, settings)
    yield "compiled, unless on a CPU", (compiled is there) != CUDA
    yield apart("compiled ViT in bf16", compiled, "bf16", 0.05)
    pairs = [*zip(losses(DEVICE, "muon", 1e-3, "bf16"), losses(DEVICE, "muon", 1e-3, "bf16", op.accelerate))]
    most = max(abs(a - b) for a, b in pairs)
    yield "twenty steps, compiled against eager", most < 0.05, f"losses by {most:.1e}", pairs[-1]


def loop(folder, steps, at_step, flags="", words=None):
    """A short training by the command, compiled, every switch on; at_step(run) is called after each step."""
    words = words or (f"pretrain --device {DEVICE} --recipe paper --model check --img-size 32 --patch-size 4 --L 16 "
                      f"--canvas 64 --points 2000 --batch-size 16 --texture fresh --optimizer muon --clip-grad 1 "
                      f"--steps {steps} --log-every {steps} {flags} --out {folder}").split()
    count = op.Run.count

    def counted(run, *numbers):
        count(run, *numbers)
        at_step(run)
    with mock.patch.object(op.Run, "count", counted), contextlib.suppress(SystemExit):
        op.main(words)
    return torch.load(f"{folder}/last.pt", weights_only=True)


def waiting():
    def at_step(run):                                                   # the first steps allocate, the last one logs
        if CUDA:
            torch.cuda.set_sync_debug_mode("error" if 5 <= run.step < run.steps - 1 else "default")
    try:
        yield "no step on stored images waits for the device", loop(WORK / "waiting", 30, at_step)["step"] == 30
    finally:
        at_step(argparse.Namespace(step=0, steps=0))


def resuming():
    def stop(run):
        run.signal = signal.SIGTERM if run.step == 10 else None         # as if it had come
    whole = loop(WORK / "whole", 20, lambda run: None)
    half = loop(WORK / "half", 20, stop)
    parts = loop(WORK / "half", 20, lambda run: None, words=["resume", str(WORK / "half")])
    a, b = (torch.cat([t.flatten() for t in run["model"].values()]) for run in (whole, parts))
    error, loss = ((a - b).norm() / a.norm()).item(), abs(whole["log"][-1]["loss"] - parts["log"][-1]["loss"])
    most = 0.02 if CUDA else 0                                          # a GPU's sums vary with their order
    stopped = (half["step"], parts["step"]) == (10, 20)
    yield ("a resumed run ends as a whole one", stopped and error <= most and loss <= most,
           f"weights {error:.1e}, loss {loss:.1e}")


def augmentation():
    x = torch.randint(256, (8, 3, 48, 48), generator=op.seeded(0)).float()
    x[::2] = x[::2] // 3 + 40                                           # room for autocontrast
    x[2::4, :, 8:] = 0                                                  # most pixels are equal
    ways = dict(jitter=lambda x: op.color_jitter(x, 0.4))
    for off in ("erase", "erase randaug", "erase randaug jitter"):      # noise differs between devices
        augment = op.Augment(32, 10, **dict.fromkeys(off.split(), 0))
        ways[f"all but {off}"] = lambda x, a=augment: 127.5 * a(x.byte(), torch.arange(8, device=x.device))[0]

    def results(way, x):
        return torch.cat([way(x).cpu() for seed in range(20 if CUDA else 2) if torch.manual_seed(seed)])
    for (name, way), channels in itertools.product(ways.items(), (1, 3)):
        apart = (results(way, x[:, :channels]) - results(way, x[:, :channels].to(DEVICE))).abs()
        yield (f"{name}, {channels} channels", (apart < 1.5).float().mean() > 0.99,     # levels; NaN is not below
               f"{(apart > 0.5).float().mean():.1e} differ, by {apart.max():.0f} at most")


def sources():
    more = {kind: f"--source image --warp {kind}" for kind in op.WARPS} | {"multiplied": "--noise multiplicative"}
    some, points = (16, 5000) if CUDA else (2, 500)
    for name, flags in (SOURCES | more).items():
        flags = flags.replace("16", str(some)) + f" --image {HERE / 'saw.png'}" * ("source image" in flags)
        flags = f"--recipe nano --canvas 64 --points {points} --L {some} {flags}".split()
        share = different(*(op.source_data(parse(["pretrain", "--device", d, *flags])).images for d in ("cpu", DEVICE)))
        yield name, share.median() < 0.01, f"median {share.median():.1e}, worst {share.max():.1e}"


def checked(group, until):
    """Writes a line for each of its checks."""
    torch.compiler.reset()                                      # else the next shape is taken for dynamic
    failed, n = [], 0
    for n, (what, right, *numbers) in enumerate(group(), 1):
        note("check.txt", " ".join(map(str, ("ok  " if right else "FAIL", f"{group.__name__}: {what}", *numbers))))
        failed += [what] * (not right)
        if late(until):
            break
    return f"FAIL {group.__name__}: {', '.join(failed)}" if failed else f"{group.__name__} {n} ok"


def check(until):
    op.MODELS["check"] = 128, 2, 2                              # compiled within seconds
    return one_by_one(until, [(group.__name__, checked, group, until) for group in (
        renderer, augmentation, network, waiting, resuming, sources)])


def tests():
    """Of what differs on CUDA. They train nothing that is compiled."""
    import pytest
    os.environ["ONEPFRAC_DEVICE"] = DEVICE
    failed = pytest.main(["-q", "-rf", "-p", "no:cacheprovider", str(HERE.parent / "test_onepfrac.py"), "-k", TESTS])
    note("check.txt", f"{'FAIL' if failed else 'ok  '} tests of test_onepfrac.py (logs.tgz has their output)")
    return "tests FAIL" if failed else "tests ok"


def compile_ahead(name, words, classes):
    began, args = time.time(), op.parse(words)
    model = op.make_model(args, classes).to(DEVICE)
    if op.accelerate(model, args) is model and CUDA:
        raise RuntimeError("not compiled")
    return f"{name} compiled in {time.time() - began:.0f} s"


def unpack():
    """CIFAR-100 from zip files, if there are only these."""
    files = sorted(glob.glob(os.environ.get("ZIP", "data/cifar100-*.zip")))
    if not DATA.exists() and files:
        for file in files:
            zipfile.ZipFile(file).extractall(WORK / "unpacked")
        DATA.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(WORK / "unpacked" / "cifar100", DATA)
    return f"{len([*DATA.glob('train/*/*')])} training images"


# ---- speed

def seconds(function, calls=20):
    """Of one call: the median of five rounds, after one that is not counted. A GPU is waited for once in a round."""
    calls = calls if CUDA else 1

    def round():
        for _ in range(calls):
            function()
        if CUDA:
            torch.cuda.synchronize()
    return sorted(timeit.repeat(round, number=1, repeat=6 if CUDA else 2)[1:])[2 if CUDA else 0] / calls


def profile(name, function):
    """Three calls. A table of what takes longest -> how many kernels a call runs, and how long the GPU is busy."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA][:1 + CUDA]) as found:
        for _ in range(3):
            function()
        if CUDA:
            torch.cuda.synchronize()
    kernels = [e for e in found.events()
               if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    table = found.key_averages().table(sort_by=f"self_{'device' if kernels else 'cpu'}_time_total", row_limit=25,
                                       max_name_column_width=80)
    note("profile.txt", f"{BEGAN} {name}, three steps\n{table}\n")
    return dict(kernels=len(kernels) // 3, busy_ms=round(sum(e.device_time for e in kernels) / 3000, 3))


def pictures():
    """The pictures of a pre-training at `paper`, warm."""
    images, points, size = (1000, 100_000, 512) if CUDA else (8, 2000, 64)
    base = op.base_ifs(2, 3.5, 32)
    maps, probs = op.perturb(base, 0.05, images, op.seeded(0)).to(DEVICE), base[..., :2].det().abs()
    return images, lambda: op.stamp(op.render_ifs(maps, size, points, generator=op.seeded(0), probs=probs))


def rendering():
    images, draw = pictures()
    return record(f"rendering {images}", seconds=round(seconds(draw, 2), 4), **profile("rendering", draw))


def pretraining(recipe):
    """images/s of the bare step on one batch, and of the command's own loop beside it."""
    torch.compiler.reset()
    args = op.parse([*PRETRAIN[recipe], "--out", str(WORK / f"speed-{recipe}")])
    data = op.source_data(args)
    augment = op.make_augment(args, args.L, flip=(args.flip / 2,) * 2, erase=args.erase / 2)
    model, batch, began = op.make_model(args, args.L).to(DEVICE), args.batch_size, time.time()
    network, optimizer = op.accelerate(model, args), op.make_optimizer(model, args)
    compiled = time.time() - began
    draw = lambda: augment(*data[torch.randint(len(data), (batch,))])
    step = lambda x, target: op.train_step(network, optimizer, x, target, args.lr, args)
    x, target = draw()
    with FlopCounterMode(display=False) as count:
        op.train_step(model, optimizer, x, target, args.lr, args)
    took = seconds(lambda: step(x, target))
    args.log_every = max(2, round(1 / took)) if CUDA else 2
    args.steps = 3 * args.log_every                             # the last line is about the last third
    with mock.patch.object(op, "accelerate", lambda *_: network), op.open_run(args):
        op.train(args, model, data, augment, args.steps)
    whole = json.loads((Path(args.out) / "log.jsonl").read_text().splitlines()[-1])["images_per_s"]
    return record(
        f"speed {recipe}", step_images_per_s=round(batch / took), whole_images_per_s=round(whole),
        whole_over_step=round(whole * took / batch, 3), batch_images_per_s=round(batch / seconds(draw)),
        batch_size=batch, precision=args.precision, compile_s=round(compiled, 1),
        tflop_per_s=round(count.get_total_flops() / took / 1e12, 2),
        peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2) if CUDA else None,
        **profile(f"pre-training at {recipe}", lambda: step(*draw())))


def augmenting():
    """DeiT's augmentation of photographs, all drawn for each sample."""
    images = torch.randint(256, (256 if CUDA else 4, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    labels = torch.arange(len(images), device=DEVICE)
    augment = op.Augment(224, 1000, flip=(0.5, 0), erase=0.25, **op.IMAGENET)
    return record("augmentation at 224", images_per_s=round(len(images) / seconds(lambda: augment(images, labels))))


def larger_groups():
    images, draw = pictures()
    usual = 40_000_000 // 100_000                               # the renderer's: larger ones start fewer kernels
    for group in (500, 1000):
        with mock.patch.object(op, "max", lambda a, b: group if b == usual else max(a, b), create=True):
            record(f"rendering {images} in groups of {group}", seconds=round(seconds(draw, 2), 4))
    return "larger groups"


def beside_timm():
    """The training step on one batch, of our network and of timm's."""
    try:
        from timm.models import VisionTransformer
    except ImportError:
        return "timm is missing"
    args = op.parse(PRETRAIN["small"])
    dim, depth, heads = op.MODELS[args.model]
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=DEVICE)
    target = torch.full((len(x), args.L), 1 / args.L, device=DEVICE)
    models = dict(onepfrac=op.make_model(args, args.L), timm=VisionTransformer(
        args.img_size, args.patch_size, num_classes=args.L, embed_dim=dim, depth=depth, num_heads=heads))
    for how, accelerate in (("eager", lambda model, args: model), ("compiled", op.accelerate)):
        for name, model in models.items():
            torch.compiler.reset()
            optimizer = op.make_optimizer(model.to(DEVICE), args)
            network = accelerate(model, args)
            took = seconds(lambda: op.train_step(network, optimizer, x, target, args.lr, args))
            record(f"step of {name}, {how}", images_per_s=round(len(x) / took))
    return "beside timm"


# ---- train

def trained(name, words):
    """Run a command in this process, in the folder WORK/name -> its log, also if it was stopped."""
    with contextlib.suppress(SystemExit):
        op.main([*map(str, words), "--out", str(WORK / name)])
    return [json.loads(line) for line in (WORK / name / "log.jsonl").read_text().splitlines()]


def keep_data(name, key):
    """A function of onepfrac makes its data once for each value of a setting."""
    make, made = getattr(op, name), {}

    def kept(args):
        if getattr(args, key) not in made:
            made[getattr(args, key)] = make(args)
        return made[getattr(args, key)]
    setattr(op, name, kept)


def keep_halves():
    """Whenever a run is saved, its weights go to OUT too."""
    save = op.Run.save

    def saved(run):
        save(run)
        file = io.BytesIO()
        torch.save(dict(model={name: t.half() for name, t in run.model.state_dict().items()}), file)
        if f"{run.out.name}.pt" in ("fractal.pt", "final-fractal.pt", "final-scratch.pt"):
            op.replace_file(OUT / f"{run.out.name}.pt", file.getbuffer())
    op.Run.save = saved


def pretrain(until):
    keep_data("source_data", "L")
    keep_halves()
    words = PRETRAIN["small"]
    probe = 60 if CUDA else 4
    log = trained("probe", [*words, "--steps", probe, "--log-every", probe // 2])
    batch = log[-1]["images"] // probe
    steps = max(1, int(0.95 * (until - time.time()) * log[-1]["images_per_s"] / batch))
    log = trained("fractal", [*words, "--steps", steps, "--log-every", max(1, steps // 100),
                              "--save-every", max(1, steps // 8)])
    record("pretrain", planned_steps=steps, **log[-1])
    log = log[-1]
    return f"step {log['step']} of {steps}, pretext top-1 {log['top1']:.1f}%, {log['images_per_s']} images/s"


def finetune(arm, until, pretrained, together):
    """Choose a rate, fine-tune at it. The other arm does the same at the same time: together(number) waits for it and
    returns the smaller of both numbers, so both train equally long."""
    keep_data("downstream_data", "holdout")
    keep_halves()
    words, images, speed, more = [*FINETUNE, "--root", DATA], len([*DATA.glob("train/*/*")]), None, None
    batch = op.parse(FINETUNE).batch_size

    def tuned(name, lr, holdout, count, tests=1):
        """A run on `count` images -> its log. Sets speed, and more: the seconds that a run takes besides."""
        nonlocal speed, more
        began, epochs = time.time(), max(batch, count) / images / (1 - holdout)
        log = trained(f"{name}-{arm}", [*words, "--lr", lr, "--holdout", holdout, "--epochs", epochs,
                                        "--eval-epochs", epochs / tests, "--log-every", 20 if CUDA else 2])
        speeds = sorted(line["images_per_s"] for line in log if "loss" in line)
        if speeds:                                              # else the loss became infinite
            speed = speeds[len(speeds) // 2]
            more = max(0, time.time() - began - log[-1]["images"] / speed)
        return log

    def top1(log):
        return [0, *(line["test_top1"] for line in log if "test_top1" in line)][-1]

    def fit(share):
        """How many images a run takes in a share of the time that is left, as both arms can."""
        return together((share * (until - time.time()) - more) * speed)
    for holdout in (0.2, 0.0):                                  # reads the images and compiles, while the GPU is busy
        tuned(f"warm-{holdout}", RATES[0], holdout, 3 * batch)
    pretrained.wait()
    if arm == "fractal":
        words += ["--ckpt", os.environ.get("CKPT") or WORK / "fractal" / "last.pt"]
    together(0)
    tuned("probe", RATES[0], 0.2, (60 if CUDA else 4) * batch)
    count, heldout = fit(0.1), {}
    for lr in RATES:
        heldout[lr] = top1(tuned(f"choose-{lr:g}", lr, 0.2, count))
        record(f"choose-{lr:g}-{arm}", heldout_top1=heldout[lr], images=count)
    best, count, name = max(heldout, key=heldout.get), fit(0.85), f"final-{arm}"
    log = tuned("final", best, 0.0, count, tests=10)
    a_class = images // len([*DATA.glob("train/*")])
    record(f"{name} of {a_class} a class", test_top1=top1(log), lr=best, planned_epochs=round(count / images, 2),
           epochs=round(log[-1]["images"] / images, 2), seconds=log[-1]["seconds"], images_per_s=speed)
    return f"{name}: top-1 {top1(log):.2f}%, {log[-1]['images'] / images:.1f} epochs, rate {best:g}, {a_class} a class"


# ---- the clock

CHILDREN, FAILED = [], []


def start(**jobs):
    """Each job, a function and its arguments, in a process of its own. What it returns is the last line that it
    prints, in WORK/name.txt."""
    def work(name, function, *given):
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)              # ends with its parent (PR_SET_PDEATHSIG)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        file = os.open(WORK / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout.reconfigure(line_buffering=True)
        print(function(*given))
    children = {name: FORK.Process(target=work, args=(name, *job)) for name, job in jobs.items()}
    for child in children.values():
        child.start()
    CHILDREN.extend(children.values())
    return children


def end(children, number):
    for child in children:
        if child.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)


def collect():
    """What the runs wrote, in one file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for pattern in ("*.txt", "*/args.json", "*/log.jsonl", "*/*.png"):
            for path in WORK.glob(pattern):
                archive.add(path, path.relative_to(WORK))
    op.replace_file(OUT / "logs.tgz", file.getbuffer())


def finish(part, children, until):
    """Wait for jobs, which know until when, stop those that are late, and print one line."""
    began, collected = time.time(), time.time()
    for number, wait in ((0, until + PATIENCE - began), (signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        end(children.values(), number)
        limit = time.time() + wait
        while any(child.is_alive() for child in children.values()) and not late(limit):
            time.sleep(0.1)
            if time.time() > collected + 10:
                collect()
                collected = time.time()
    texts = []
    for name, child in children.items():
        *_, last = ["", *(WORK / f"{name}.txt").read_text().splitlines()]
        texts.append(last if child.exitcode == 0 else f"FAIL {name}, status {child.exitcode}: {last}")
    print(f"{part}, {time.time() - began:.0f} s: {'; '.join(texts)}", flush=True)
    FAILED.extend(text for text in texts if "FAIL" in text)
    collect()


def train(until):
    middle, pretrained = time.time() + 0.4 * (until - time.time()), FORK.Event()
    barrier, numbers = FORK.Barrier(2), FORK.RawArray("d", 2)

    def arm(k, name):
        def together(number):
            numbers[k] = number
            try:
                barrier.wait(max(0, until + PATIENCE - time.time()))
                return min(numbers)
            except threading.BrokenBarrierError:                # the other arm has ended
                return number
        try:
            return finetune(name, until, pretrained, together)
        finally:
            barrier.abort()
    arms = start(scratch=(arm, 0, "scratch"), fractal=(arm, 1, "fractal")) if (DATA / "train").is_dir() else {}
    if not os.environ.get("CKPT"):
        finish("pretrain", start(pretrain=(pretrain, middle)), middle)
    pretrained.set()
    finish("finetune" if arms else f"FAIL: no images in {DATA}", arms, until)
    top1 = [line["test_top1"] for line in map(json.loads, (OUT / "gpu.jsonl").read_text().splitlines())
            if line["began"] == BEGAN and line["name"].startswith("final")]
    if len(top1) == 2:
        print(f"from the fractal {abs(top1[0] - top1[1]):.2f}", flush=True)


def drive(total, parts):
    share, last = min(60, total / 6), START + total - 8         # seconds to stop in
    OUT.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with op.claimed(OUT):
        shutil.rmtree(WORK, ignore_errors=True)
        WORK.mkdir(parents=True)
        try:
            unpacking = start(unpack=(unpack,))
            for part in parts:
                now = time.time()
                if part == "check":
                    finish(part, start(
                        check=(check, now + share), tests=(tests,),
                        small=(compile_ahead, "small", PRETRAIN["small"], 1000),
                        paper=(compile_ahead, "paper", PRETRAIN["paper"], 1000),
                        finetune=(compile_ahead, "finetune", FINETUNE, 100)), now + share)
                elif part == "speed":
                    finish(part, start(speed=(one_by_one, now + share, (
                        ("rendering", rendering), ("small", pretraining, "small"), ("augmentation", augmenting),
                        ("paper", pretraining, "paper")))), now + share)
                elif part == "train":
                    finish("images", unpacking, now + 30)
                    train(last - total / 18)
                else:
                    finish(part, start(extras=(one_by_one, last, (
                        ("groups", larger_groups), ("timm", beside_timm)))), last)
        finally:
            end(CHILDREN, signal.SIGKILL)
            collect()
    print(f"{time.time() - START:.0f} s in all, {len(FAILED)} parts FAIL, results in {OUT}")
    return bool(FAILED)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float)
    names = "check", "speed", "train", "extras"
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(names))
    args = parser.parse_args()
    if not set(args.parts) <= set(names):
        parser.error(f"PART: there is {', '.join(names)}")
    return drive(args.seconds, args.parts or names)


if __name__ == "__main__":
    sys.exit(main())
