"""Ten minutes of a GPU: is onepfrac right there, how fast is it, and what does it learn? One command, with a clock:

    bash results/gpu.sh 540                     # seconds; gpu.sh tells what else can be set

Four parts, one after the other. What does not end in time is stopped, and what fails does not stop the rest.

check    60 s (at most a quarter of all): the GPU against the CPU, compiled against eager, steps that never wait for the
         device, a run that is resumed, every source. Meanwhile tests of test_onepfrac.py run, the networks of the
         later parts are compiled, which torch keeps on disk, and fine-tuning reads its images.
speed    as long: rendering, pre-training at `small` and `paper` beside its bare step, augmentation
train    what is left: `small` is pre-trained for 40% of it. Then CIFAR-100 is fine-tuned from the fractal and from
         scratch, side by side, each at the best of three rates in short runs on held-out training images.
extras   the last seconds: rendering in larger groups, timm's network at the same shapes

Each part prints one line at its end. At any moment OUT has all that has ended:

gpu.jsonl       measurements and results, beside what is aimed at
check.txt       a line for every check, ok or FAIL
profile.txt     where the time of a step of pre-training goes
logs.zip        outputs, settings, logs and curves of all runs, at most ten seconds old
fractal.pt final-fractal.pt final-scratch.pt    the last weights that were saved, in half precision

It ran once on an H100 (results/gpu has what came of it), and on CPUs (`DEVICE=cpu`, small numbers), in full and ended
at random moments.
"""
import time

START = time.time()                                             # the imports count

import argparse
import contextlib
import copy
import ctypes
import glob
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
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
BEGAN, COMMIT = time.strftime("%Y-%m-%d %H:%M:%S"), HERE.parent / "COMMIT"
COMMIT = COMMIT.read_text().strip() if COMMIT.exists() else op.git_commit() or "unknown"
FORK = multiprocessing.get_context("fork")      # children need no imports; so nothing here may start CUDA or threads
PATIENCE, GRACE = 2, 4      # seconds: how late a part may be, and then, when it is asked to stop, how long it may save

LITTLE, PICTURES = ("", "") if CUDA else ("--model vit_nano --batch-size 4", "--L 8 --canvas 64 --points 2000")
PRETRAIN = {
    "small": f"pretrain --device {DEVICE} --recipe small {LITTLE} {PICTURES} {os.environ.get('PRE', '')}".split(),
    "paper": f"pretrain --device {DEVICE} --recipe paper {LITTLE} {PICTURES}".split()}
FINETUNE = f"finetune --device {DEVICE} --recipe small --data folder {LITTLE} {os.environ.get('TUNE', '')}".split()
RATES = 2e-3, 4e-3, 8e-3        # of fine-tuning; of 0.001 to 0.004 the best were 0.002 from the fractal, 0.004 from scratch
TARGETS = {
    "speed small": dict(step_images_per_s=50_000, whole_over_step=0.9),
    "speed paper": dict(step_images_per_s=15_000, whole_over_step=0.9),
    "rendering 1000": dict(seconds=0.05), "final-fractal, 500 a class": dict(test_top1=70)}
TESTS = "drop_path_drops or muon_moves" + CUDA * (
    " or each_orbit or kinds_render or texture_has or random_masks or fractal_with_its_eps or vit_agrees or crops"
    " or flipped_by or random_erasing or everything_off or operations_agree or color_jitter or evaluation_is"
    " or only_weight or never_waits or kept_and_streamed")


def note(file, text):
    with open(OUT / file, "a") as out:
        out.write(text + "\n")


def record(name, **numbers):
    """A line of gpu.jsonl -> the name and the numbers that have a target, in words."""
    target, gpu = TARGETS.get(name, {}), torch.cuda.get_device_name() if CUDA else "cpu"
    note("gpu.jsonl", json.dumps(dict(name=name, began=BEGAN, device=gpu, torch=torch.__version__, commit=COMMIT) |
                                 numbers | dict(target=target)))
    return ", ".join([name, *(f"{key} {numbers[key]} (target {aim})" for key, aim in target.items())])


def late(until):
    return time.time() > until


def one_by_one(until, functions):
    """One that fails does not stop the rest. The last line with a > has all so far, if this is stopped."""
    texts = []
    for name, function, *given in functions:
        try:
            texts.append(f"no time for {name}" if texts and late(until) else function(*given))
        except Exception as error:
            traceback.print_exc()
            texts.append(f"FAIL {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            note("check.txt", texts[-1])
        print(">", "; ".join(texts))
    return "; ".join(texts)


def trained(name, words, at_step=lambda run: None):
    """Run a command in this process, in the folder WORK/name -> its log, also if it was stopped. at_step(run) is called
    after every step. The weights of some runs go to OUT whenever they are saved."""
    count, save = op.Run.count, op.Run.save

    def counted(run, *numbers):
        count(run, *numbers)
        at_step(run)

    def saved(run):
        save(run)
        if name in ("fractal", "final-fractal", "final-scratch"):
            file = io.BytesIO()
            torch.save(dict(model={key: t.half() for key, t in run.model.state_dict().items()}), file)
            op.replace_file(OUT / f"{name}.pt", file.getbuffer())
    words = [*map(str, words), *["--out"] * (words[0] != "resume"), str(WORK / name)]
    with mock.patch.multiple(op.Run, count=counted, save=saved), contextlib.suppress(SystemExit):
        op.main(words)
    return [json.loads(line) for line in (WORK / name / "log.jsonl").read_text().splitlines()]


# ---- check: a group is a generator of (name, is it right?, numbers to print ...)

def network():
    """On both devices, and compiled: an answer, and the losses of twenty steps."""
    torch.backends.cudnn.allow_tf32 = False                             # convolutions in full precision
    model, x, target = op.ViT(32, 4, 100, *op.MODELS["check"]), torch.randn(16, 3, 32, 32), torch.eye(100)[:16]
    torch.nn.init.normal_(model.head.weight, std=0.02)                  # at 0 no other layer has a gradient

    def twenty(device, precision, kind="muon", lr=1e-3, accelerate=lambda model, args: model):
        """-> logits and gradients, losses, whether the network was compiled"""
        args = argparse.Namespace(precision=precision, clip_grad=1.0, optimizer=kind, lr=lr, weight_decay=0.05,
                                  device=device, world=1, batch_size=16, img_size=32)
        twin, batch, goal = copy.deepcopy(model).to(device), x.to(device), target.to(device)
        net, optimizer = accelerate(twin, args), op.make_optimizer(twin, args)
        logits = op.predict(net, batch, args)
        op.lpce_loss(logits, goal).backward()
        answer = torch.cat([t.detach().flatten().cpu() for t in (logits, *(p.grad for p in twin.parameters()))])
        twin.zero_grad()
        losses = torch.stack([op.train_step(net, optimizer, batch, goal, lr, args)[0] for _ in range(20)])
        return answer, losses.cpu(), net is not twin

    def close(name, here, there, most):
        answer, losses = (here[0] - there[0]).norm() / here[0].norm(), (here[1] - there[1]).abs().max()
        fall = f"from {there[1][0]:.3f} to {there[1][-1]:.3f}"
        return name, answer < most and losses < most, f"answer by {answer:.1e}, losses by {losses:.1e}", fall
    for kind, lr in (("adamw", 1e-3), ("sgd", 0.05), ("muon", 1e-3)):
        right = twenty("cpu", "fp32", kind, lr)
        yield close(f"{kind} in fp32", right, twenty(DEVICE, "fp32", kind, lr), 2e-3)
    yield close("muon in bf16", right, twenty(DEVICE, "bf16"), 0.05)
    compiled = twenty(DEVICE, "bf16", accelerate=op.accelerate)
    yield close("muon in bf16, compiled", right, compiled, 0.05)
    yield "compiled, unless on a CPU", compiled[2] == CUDA


SHORT = (f"pretrain --device {DEVICE} --recipe paper --model check --img-size 32 --patch-size 4 --L 16 "
         "--canvas 64 --points 2000 --batch-size 16 --texture fresh --optimizer muon --clip-grad 1 --steps 20 "
         "--log-every 20").split()


def waiting():
    """In the command's own loop, compiled, every switch on."""
    def at_step(run):                                                   # the first steps allocate, the last one logs
        if CUDA:
            torch.cuda.set_sync_debug_mode("error" if 5 <= run.step < run.steps - 1 else "default")
    try:
        yield "no step on stored images waits for the device", trained("waiting", SHORT, at_step)[-1]["step"] == 20
    finally:
        at_step(argparse.Namespace(step=0, steps=0))


def resuming():
    def stop(run):
        run.signal = signal.SIGTERM if run.step == 10 else None         # as if it had come
    *_, one = trained("whole", SHORT)
    stopped = not trained("parts", SHORT, stop)                         # before the first line of the log
    *_, two = trained("parts", ["resume"])
    apart = abs(one["loss"] - two["loss"])
    right = stopped and two["step"] == 20 and apart <= (0.02 if CUDA else 0)        # a GPU's sums have no order
    yield "a run that is stopped and resumed ends as a whole one", right, f"loss by {apart:.1e}"


def sources():
    """Every source is drawn as on the CPU. (Renderer and augmentation have references of their own: `tests`.)"""
    more = {kind: f"--source image --warp {kind}" for kind in op.WARPS} | {
        "multiplied": "--noise multiplicative", "1p-frac, full size": "--canvas 512 --points 100000"}
    for name, flags in [*(SOURCES | more).items()][::1 if CUDA else 5]:
        words = (f"pretrain --recipe nano --canvas 64 --points 5000 --L 16 {flags}"
                 + f" --image {HERE / 'saw.png'}" * ("source image" in flags)).split()
        here, there = (op.source_data(parse([*words, "--device", d])).images.cpu().flatten(1).float()
                       for d in ("cpu", DEVICE))
        share = ((here - there).abs() > 1).sum(1) / (here > 0).sum(1).clamp(min=1)    # of lit pixels
        yield name, share.median() < 0.01, f"{share.median():.1e} of the pixels differ, {share.max():.1e} in the worst"


def checked(group, until):
    """Writes a line for each of its checks."""
    torch.compiler.reset()                                      # else the next shape is taken for dynamic
    failed, n = [], 0
    for n, (what, right, *numbers) in enumerate(group(), 1):
        note("check.txt", " ".join(["ok  " if right else "FAIL", f"{group.__name__}: {what}:", *numbers]))
        failed += [what] * (not right)
        if late(until):
            break
    return f"FAIL {group.__name__}: {', '.join(failed)}" if failed else f"{group.__name__} {n} ok"


def check(until, *groups):
    op.MODELS["check"] = 128, 2, 2                              # compiled within seconds
    return one_by_one(until, [(group.__name__, checked, group, until) for group in groups])


def tests():
    """Those that touch CUDA in different ways, and compile nothing."""
    import pytest
    os.environ["ONEPFRAC_DEVICE"] = DEVICE
    failed = pytest.main(["-q", "-rf", "-p", "no:cacheprovider", str(HERE.parent / "test_onepfrac.py"), "-k", TESTS])
    text = "FAIL tests of test_onepfrac.py (see logs.zip)" if failed else "ok   tests of test_onepfrac.py"
    note("check.txt", text)
    return text


def compile_ahead(recipe):
    began, args = time.time(), op.parse(PRETRAIN[recipe])
    model = op.make_model(args, args.L).to(DEVICE)
    if CUDA and op.accelerate(model, args) is model:
        raise RuntimeError("not compiled")
    return f"{recipe} compiled in {time.time() - began:.0f} s"


# ---- speed

def seconds(function, calls=20):
    """Of one call: the median of five rounds, after one that is not counted. A GPU is waited for once in a round."""
    calls, rounds = (calls, 6) if CUDA else (1, 2)

    def one_round():
        for _ in range(calls):
            function()
        if CUDA:
            torch.cuda.synchronize()
    return sorted(timeit.repeat(one_round, number=1, repeat=rounds)[1:])[(rounds - 1) // 2] / calls


def rendering(group=None):
    """Pictures as the paper has them. group: how many are drawn together, if not as many as usual."""
    images, points, size = (1000, 100_000, 512) if CUDA else (8, 2000, 64)
    base, usual = op.base_ifs(2, 3.5, 32), 40_000_000 // points
    maps, probs = op.perturb(base, 0.05, images, op.seeded(0)).to(DEVICE), base[..., :2].det().abs()
    with mock.patch.object(op, "max", lambda a, b: group if group and b == usual else max(a, b), create=True):
        took = seconds(lambda: op.stamp(op.render_ifs(maps, size, points, generator=op.seeded(0), probs=probs)), 2)
    return record(f"rendering {images}" + f", {group} together" * bool(group), seconds=round(took, 4))


def pretraining(recipe):
    """images/s of the bare step on one batch, and of the command's own loop."""
    torch.compiler.reset()
    args = op.parse([*PRETRAIN[recipe], "--out", str(WORK / f"speed-{recipe}")])
    data, model, batch = op.source_data(args), op.make_model(args, args.L).to(DEVICE), args.batch_size
    augment, began = op.make_augment(args, args.L, flip=(args.flip / 2,) * 2, erase=args.erase / 2), time.time()
    network, optimizer = op.accelerate(model, args), op.make_optimizer(model, args)
    compiled = time.time() - began

    def draw():
        return augment(*data[torch.randint(len(data), (batch,))])

    def step(x, target):
        op.train_step(network, optimizer, x, target, args.lr, args)
    fixed = draw()
    took = seconds(lambda: step(*fixed))
    args.log_every = max(2, round(1 / took)) if CUDA else 2
    args.steps = 3 * args.log_every                             # the last line is about the last third
    with mock.patch.object(op, "accelerate", lambda *_: network), op.open_run(args):
        op.train(args, model, data, augment, args.steps)
    whole = json.loads((Path(args.out) / "log.jsonl").read_text().splitlines()[-1])["images_per_s"]
    with FlopCounterMode(display=False) as count:               # of one image, on the CPU
        op.make_model(args, args.L)(torch.zeros(1, 3, args.img_size, args.img_size)).sum().backward()
    text = record(
        f"speed {recipe}", step_images_per_s=round(batch / took), whole_images_per_s=round(whole),
        whole_over_step=round(whole * took / batch, 3), batch_images_per_s=round(batch / seconds(draw)),
        batch_size=batch, precision=args.precision, compile_s=round(compiled, 1),
        tflop_per_s=round(count.get_total_flops() * batch / took / 1e12, 2),
        peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2) if CUDA else None)
    profile(recipe, lambda: step(*draw()))
    return text


def profile(recipe, step):
    """Three steps: what takes longest, how many kernels a step runs, and how long they are at work."""
    with torch.profiler.profile() as found:                     # of the CPU, and of the GPU if there is one
        for _ in range(3):
            step()
        if CUDA:
            torch.cuda.synchronize()
    kernels = [e for e in found.events()
               if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    by = "self_device_time_total" if CUDA else "self_cpu_time_total"
    note("profile.txt", f"{BEGAN} {recipe}, three steps\n{found.key_averages().table(by, 25, 80, 80)}\n")
    record(f"profile {recipe}", kernels=len(kernels) // 3, busy_ms=round(sum(e.device_time for e in kernels) / 3000, 3))


def augmenting():
    """DeiT's augmentation of photographs, all of it drawn for each sample."""
    images = torch.randint(256, (256 if CUDA else 4, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    labels = torch.arange(len(images), device=DEVICE)
    augment = op.Augment(224, 1000, flip=(0.5, 0), erase=0.25, **op.IMAGENET)
    return record("augmentation at 224", images_per_s=round(len(images) / seconds(lambda: augment(images, labels))))


def beside_timm(accelerate):
    """The training step on one batch, of our network and of timm's."""
    try:
        from timm.models import VisionTransformer
    except ImportError:
        return "timm is missing"
    args = op.parse(PRETRAIN["small"])
    dim, depth, heads = op.MODELS[args.model]
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=DEVICE)
    target, rates = torch.full((len(x), args.L), 1 / args.L, device=DEVICE), []
    for model in (op.make_model(args, args.L), VisionTransformer(
            args.img_size, args.patch_size, num_classes=args.L, embed_dim=dim, depth=depth, num_heads=heads)):
        torch.compiler.reset()
        optimizer, network = op.make_optimizer(model.to(DEVICE), args), accelerate(model, args)
        rates.append(round(len(x) / seconds(lambda: op.train_step(network, optimizer, x, target, args.lr, args))))
    name = f"step {'eager' if network is model else 'compiled'}"
    record(name, onepfrac_images_per_s=rates[0], timm_images_per_s=rates[1])
    return f"{name} {rates[0]}, timm's {rates[1]} images/s"


# ---- train

def unpack():
    """CIFAR-100 from zip files, if there are only these."""
    files = sorted(glob.glob(os.environ.get("ZIP", "data/cifar100-*.zip")))
    if not DATA.exists():
        if not files:
            raise FileNotFoundError(f"there are neither images in {DATA} nor zip files of them")
        for file in files:
            zipfile.ZipFile(file).extractall(WORK / "unpacked")
        DATA.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(WORK / "unpacked" / "cifar100", DATA)


def keep_data(name, key):
    """A function of onepfrac makes its data once for each value of a setting."""
    make, made = getattr(op, name), {}

    def kept(args):
        value = getattr(args, key)
        return made[value] if value in made else made.setdefault(value, make(args))
    setattr(op, name, kept)


def pretrain(until):
    keep_data("source_data", "L")
    words, probe = PRETRAIN["small"], 200 if CUDA else 8
    *_, last = trained("probe", [*words, "--steps", probe, "--log-every", probe // 2])
    steps = max(1, int(0.9 * (until - time.time()) * last["images_per_s"] * probe / last["images"]))
    *_, last = trained("fractal", [*words, "--steps", steps, "--log-every", max(1, steps // 100),
                                   "--save-every", max(1, steps // 8)])
    record("pretrain", planned_steps=steps, **last)
    return f"step {last['step']} of {steps}, pretext top-1 {last['top1']:.1f}%, {last['images_per_s']} images/s"


def finetune(arm, until, pretrained, together):
    """Choose a rate and train at it. The other arm does the same at the same time: together(number) waits for it and
    returns the smaller of both numbers, so both train equally long."""
    if arm == "scratch":
        unpack()
    together(0)
    keep_data("downstream_data", "holdout")
    words, batch = [*FINETUNE, "--root", DATA], op.parse(FINETUNE).batch_size
    images, classes = (len([*DATA.glob(f"train/{those}")]) for those in ("*/*", "*"))
    speed = more = None                                         # images/s, and the seconds that a run takes besides

    def tuned(name, lr, holdout, count, tests=1):
        """Train on `count` images -> accuracy in the last test, the last line of the log."""
        nonlocal speed, more
        began, epochs = time.time(), count / images / (1 - holdout)
        log = trained(f"{name}-{arm}", [*words, "--lr", lr, "--holdout", holdout, "--epochs", epochs,
                                        "--eval-epochs", epochs / tests, "--log-every", 20 if CUDA else 2])
        speeds = sorted(line["images_per_s"] for line in log if "loss" in line)
        if not speeds:                                          # the loss became infinite
            return 0, None
        speed = speeds[len(speeds) // 2]
        more = max(0, time.time() - began - log[-1]["images"] / speed)
        return [0, *(line["test_top1"] for line in log if "test_top1" in line)][-1], log[-1]

    def fit(share, tests=1):
        """How many images both arms can train on in a share of the time that is left."""
        return max(batch, together((share * (until - time.time()) - tests * more) * speed))
    for holdout in (0.2, 0.0):                                  # reads the images and compiles, beside earlier parts
        tuned(f"warm-{holdout}", RATES[0], holdout, 3 * batch)
    pretrained.wait()
    if arm == "fractal":
        words += ["--ckpt", os.environ.get("CKPT") or WORK / "fractal" / "last.pt"]
    together(0)
    tuned("probe", RATES[0], 0.2, (60 if CUDA else 4) * batch)
    count, heldout = fit(0.1), {}
    for lr in RATES:
        heldout[lr], _ = tuned(f"choose-{lr:g}", lr, 0.2, count)
        record(f"choose-{lr:g}-{arm}", heldout_top1=heldout[lr], images=round(count))
    lr, count = max(heldout, key=heldout.get), fit(0.9, tests=5)
    top1, last = tuned("final", lr, 0.0, count, tests=5)
    planned, epochs = round(count / images, 2), round(last["images"] / images, 2)
    text = record(f"final-{arm}, {images // classes} a class", test_top1=top1, lr=lr, planned_epochs=planned,
                  epochs=epochs, seconds=last["seconds"], images_per_s=speed)
    return f"{text}: top-1 {top1:.2f}%, {epochs} of {planned} epochs at rate {lr:g}"


# ---- the clock

CHILDREN, FAILED = [], []


def start(**jobs):
    """Each job, a function and its arguments, in a process of its own. It writes WORK/name.txt, at the end a > and what
    the function returns."""
    def work(name, function, *given):
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)              # PR_SET_PDEATHSIG: it ends with its parent
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        file = os.open(WORK / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout.reconfigure(line_buffering=True)
        print(">", function(*given))
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
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for pattern in ("*.txt", "*/args.json", "*/log.jsonl", "*/*.png"):
            for path in WORK.glob(pattern):
                archive.writestr(str(path.relative_to(WORK)), path.read_bytes())
    op.replace_file(OUT / "logs.zip", file.getbuffer())


def finish(part, children, until):
    """Wait for jobs, which know until when, stop those that are late, and print one line."""
    began = collected = time.time()
    for number, wait in ((0, until + PATIENCE - began), (signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        end(children.values(), number)
        limit = time.time() + wait
        while any(child.is_alive() for child in children.values()) and time.time() < limit:
            time.sleep(0.1)
            if time.time() > collected + 10:
                collect()
                collected = time.time()
    texts = []
    for name, child in children.items():
        lines = (WORK / f"{name}.txt").read_text().splitlines()
        texts += [line[2:] for line in lines if line.startswith("> ")][-1:]
        if child.exitcode != 0:
            texts.append(f"FAIL {name}, status {child.exitcode}: {' '.join(lines[-1:])}")
    FAILED.extend(text for text in texts if "FAIL" in text)
    print(f"{part}, {time.time() - began:.0f} s: {'; '.join(texts)}", flush=True)
    collect()


def both_arms(until, pretrained):
    """Start fine-tuning from scratch and from the fractal, which waits for pre-training."""
    barrier, numbers = FORK.Barrier(2), FORK.RawArray("d", 2)

    def tune(k, arm):
        def together(number):
            numbers[k] = number
            try:
                barrier.wait(max(0, until + PATIENCE - time.time()))
                return min(numbers)
            except threading.BrokenBarrierError:                # the other arm has ended
                return number
        try:
            return finetune(arm, until, pretrained, together)
        finally:
            barrier.abort()
    return start(scratch=(tune, 0, "scratch"), fractal=(tune, 1, "fractal"))


def train(until, arms, pretrained):
    share = 0.4 if any(arm.is_alive() for arm in arms.values()) else 1          # without images all of it
    middle = time.time() + share * (until - time.time())
    if not os.environ.get("CKPT"):
        finish("pretrain", start(pretrain=(pretrain, middle)), middle)
    pretrained.set()
    finish("finetune", arms, until)
    top1 = {line["name"].split(",")[0]: line["test_top1"] for line in map(json.loads, open(OUT / "gpu.jsonl"))
            if line["began"] == BEGAN and "test_top1" in line}
    if len(top1) == 2:
        gain = top1["final-fractal"] - top1["final-scratch"]
        print(f"the fractal over scratch: {gain:+.2f} points (target 4)", flush=True)


def drive(total, *parts):
    """-> exit status. The last eight seconds are for stopping."""
    share, last, parts = min(60, total / 4), START + total - 8, parts or ("check", "speed", "train", "extras")
    trained_until, pretrained = last - total / 18, FORK.Event()
    arms = both_arms(trained_until, pretrained) if "train" in parts else {}
    for part in parts:
        until = time.time() + share
        if part == "check":
            finish(part, start(
                check=(check, until, network, waiting, resuming), sources=(check, until, sources), tests=(tests,),
                small=(compile_ahead, "small"), paper=(compile_ahead, "paper")), until)
        elif part == "speed":
            finish(part, start(speed=(one_by_one, until, (
                ("rendering", rendering), ("small", pretraining, "small"), ("augmentation", augmenting),
                ("paper", pretraining, "paper")))), until)
        elif part == "train":
            train(trained_until, arms, pretrained)
        elif part == "extras":
            finish(part, start(extras=(one_by_one, last, (
                ("500 together", rendering, 500), ("1000 together", rendering, 1000),
                ("timm", beside_timm, lambda model, args: model),
                ("timm, compiled", beside_timm, op.accelerate)))), last)
        else:
            sys.exit(f"there is no part {part}")
    print(f"{time.time() - START:.0f} s in all, {len(FAILED)} FAIL, results in {OUT}")
    return bool(FAILED)


def main(*words):
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    OUT.mkdir(parents=True, exist_ok=True)
    with op.claimed(OUT):
        shutil.rmtree(WORK, ignore_errors=True)
        WORK.mkdir(parents=True)
        (OUT / "gpu.jsonl").touch()
        try:
            return drive(*words)
        finally:
            end(CHILDREN, signal.SIGKILL)
            collect()


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *sys.argv[2:]))
