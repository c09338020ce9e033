"""Ten minutes of a GPU: is onepfrac right there, how fast is it, and what does it learn? One command, with a clock:

    bash results/gpu.sh 540                     # seconds; gpu.sh tells what else can be set

check    a fifth of the time at most: the GPU against the CPU, compiled in two ways against eager, steps that never wait
         for the device, a run that is stopped and goes on, every source; tests of test_onepfrac.py at the same time
speed    two fifths: rendering, Muon, augmentation, and at `small` and `paper` the bare step and the command's own loop;
         each beside another way: drawn together, one matrix at a time, without sorting, CUDA graphs and eager
train    the rest: `small` is pre-trained for 40% of it. Then CIFAR-100 is fine-tuned from the fractal and from scratch,
         each at the best of three rates in short runs on held-out training images, both as long as the other

What fails, or is late, does not stop the rest. At any moment OUT has all that has ended:

gpu.jsonl       measurements and results, beside what is aimed at
check.txt       a line for every check, ok or FAIL
profile.txt     where the time of a step goes
logs.zip        settings, logs and curves of all runs
fractal.pt final-fractal.pt final-scratch.pt    weights in half precision

A version of it with more processes ran once on an H100 (results/gpu has what came of it); this one on CPUs
(`DEVICE=cpu`, small numbers).
"""
import time

START = time.time()                                             # the imports count

import argparse
import contextlib
import copy
import glob
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import onepfrac as op
import speed as other
from figures import SOURCES, parse

DEVICE = os.environ.get("DEVICE", "cuda")
CUDA = DEVICE == "cuda"
OUT, WORK, DATA = (Path(os.environ.get(*named)) for named in (
    ("OUT", "runs/gpu/out"), ("WORK", "runs/gpu/work"), ("DATA", "data/cifar100")))
BEGAN, COMMIT = time.strftime("%Y-%m-%d %H:%M:%S"), HERE.parent / "COMMIT"
LITTLE, PICTURES = ("", "") if CUDA else ("--model vit_nano --batch-size 4", "--L 8 --canvas 64 --points 2000")
PRETRAIN = {
    "small": f"pretrain --device {DEVICE} --recipe small {LITTLE} {PICTURES} {os.environ.get('PRE', '')}".split(),
    "paper": f"pretrain --device {DEVICE} --recipe paper {LITTLE} {PICTURES}".split()}
FINETUNE = f"finetune --device {DEVICE} --recipe small --data folder {LITTLE} {os.environ.get('TUNE', '')}".split()
RATES = 2e-3, 4e-3, 8e-3        # of fine-tuning; on the H100 0.002 (fractal) and 0.004 (scratch), the largest, did best
TARGETS = {"speed small": dict(step_images_per_s=50_000, whole_over_step=0.9),
           "speed paper": dict(step_images_per_s=15_000, whole_over_step=0.9), "rendering 1000": dict(seconds=0.05)}
PATIENCE, FAILED = 2, []


def left(until):
    """Seconds."""
    return until - time.time()


def note(file, text):
    with open(OUT / file, "a") as out:
        out.write(text + "\n")


def record(name, **numbers):
    """A line of gpu.jsonl."""
    known = op.machine(argparse.Namespace(device=DEVICE))
    commit = COMMIT.read_text().strip() if COMMIT.exists() else known["commit"]
    line = dict(name=name, began=BEGAN, device=known["processor"], torch=torch.__version__, commit=commit) | numbers
    note("gpu.jsonl", json.dumps(line | dict(target=TARGETS.get(name, {}))))
    print(f"{time.time() - START:4.0f} s  {name}: {numbers}", flush=True)


def verdict(right, what):
    note("check.txt", f"{'ok  ' if right else 'FAIL'} {what}")
    if not right:
        FAILED.append(what)
        print(f"FAIL {what}", flush=True)


def write_whole(path, content):
    """So that at any moment there is a whole file, whenever the time is over."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def collect():
    """What the runs wrote, in one file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for pattern in ("*.txt", "*/args.json", "*/log.jsonl", "*/*.png"):
            for path in WORK.glob(pattern):
                archive.writestr(str(path.relative_to(WORK)), path.read_bytes())
    write_whole(OUT / "logs.zip", file.getbuffer())


def one_by_one(until, functions):
    """Each has the rest of the part's time. One that fails does not stop the others."""
    for function, *given in functions:
        name = " ".join([function.__name__, *map(str, given)])
        if left(until) < 0:
            verdict(False, f"no time for {name}")
            continue
        signal.setitimer(signal.ITIMER_REAL, left(until) + PATIENCE)
        try:
            function(*given)
        except Exception as error:                              # TimeoutError: from the timer
            verdict(False, f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        collect()


def trained(name, words, until=None, at_step=lambda run: None, accelerate=op.accelerate):
    """Run a command in this process, in the folder WORK/name, at most until then -> its log. at_step(run) is called
    after every step."""
    count, save = op.Run.count, op.Run.save

    def counted(run, *numbers):
        count(run, *numbers)
        at_step(run)
        if until and left(until) < 0:
            stop()

    def saved(run):
        save(run)
        if name in ("fractal", "final-fractal", "final-scratch"):
            file = io.BytesIO()
            torch.save(dict(model={key: t.half() for key, t in run.model.state_dict().items()}), file)
            write_whole(OUT / f"{name}.pt", file.getbuffer())
    torch.compiler.reset()
    with mock.patch.multiple(op.Run, count=counted, save=saved), mock.patch.object(op, "accelerate", accelerate), \
            open(WORK / "output.txt", "a") as output, contextlib.redirect_stdout(output):
        status = op.main([*map(str, words), "--out", str(WORK / name)])
    if status == 2:
        raise RuntimeError(f"{name} ended with status 2")
    return [json.loads(line) for line in (WORK / name / "log.jsonl").read_text().splitlines()]


def stop():
    """As `kill` does; the run saves at the end of the step, and ends."""
    os.kill(os.getpid(), signal.SIGTERM)


# ---- check

def graphs(model, args):
    """A way to accelerate: all kernels of a step are recorded once, and replayed by one launch."""
    return torch.compile(model, mode="reduce-overhead") if CUDA else model


def eager(model, args):
    return model


def network():
    """On both devices, and compiled: an answer, and the losses of twenty steps."""
    torch.backends.cudnn.allow_tf32 = False                             # convolutions in full precision
    B = 16 if CUDA else 2
    model, x, target = op.ViT(32, 4, 100, *op.MODELS["check"]), torch.randn(B, 3, 32, 32), torch.eye(100)[:B]
    torch.nn.init.normal_(model.head.weight, std=0.02)                  # at 0 no other layer has a gradient

    def twenty(device, precision, kind="muon", lr=1e-3, accelerate=eager):
        """-> logits and gradients, losses"""
        args = argparse.Namespace(precision=precision, clip_grad=1.0, optimizer=kind, lr=lr, weight_decay=0.05,
                                  device=device, world_size=1, compile=True)
        twin, batch, goal = copy.deepcopy(model).to(device), x.to(device), target.to(device)
        net, optimizer = accelerate(twin, args), op.make_optimizer(twin, args)
        logits = op.predict(net, batch, args)
        op.lpce_loss(logits, goal).backward()
        answer = torch.cat([t.detach().flatten().cpu() for t in (logits, *(p.grad for p in twin.parameters()))])
        optimizer.zero_grad()
        losses = torch.stack([op.train_step(net, optimizer, batch, goal, lr, args)[0].clone() for _ in range(20)])
        return answer, losses.cpu()

    def close(name, here, there, most):
        answer, losses = (here[0] - there[0]).norm() / here[0].norm(), (here[1] - there[1]).abs().max()
        verdict(answer < most and losses < most, f"network: {name}: answer by {answer:.1e}, losses by {losses:.1e} "
                f"from {there[1][0]:.3f} to {there[1][-1]:.3f}")
    for kind, lr in (("adamw", 1e-3), ("sgd", 0.05), ("muon", 1e-3)):
        right = twenty("cpu", "fp32", kind, lr)
        close(f"{kind} in fp32", right, twenty(DEVICE, "fp32", kind, lr), 2e-3)
    close("muon in bf16", right, twenty(DEVICE, "bf16"), 0.05)
    for name, accelerate in (("compiled", op.accelerate), ("CUDA graphs", graphs)):
        torch.compiler.reset()
        close(f"muon in bf16, {name}", right, twenty(DEVICE, "bf16", accelerate=accelerate), 0.05)


SHORT = (f"pretrain --device {DEVICE} --recipe paper --model check --img-size 32 --patch-size 4 --L 16 "
         "--canvas 64 --points 2000 --batch-size 16 --texture fresh --optimizer muon --clip-grad 1 --steps 20 "
         "--log-every 10").split()


def waiting():
    """In the command's own loop, compiled, every switch on."""
    def at_step(run):                                                   # the first steps allocate, the last one logs
        if CUDA:
            torch.cuda.set_sync_debug_mode("error" if 5 <= run.step < run.steps - 1 else "default")
    try:
        whole = trained("waiting", [*SHORT, "--log-every", 20], at_step=at_step)[-1]["step"] == 20
    finally:
        at_step(argparse.Namespace(step=0, steps=0))
    verdict(whole, "waiting: no step on stored images waits for the device")


def going_on():
    def at_step(run):
        if run.step == 10:
            stop()
    *_, one = trained("whole", SHORT)
    *_, half = trained("parts", SHORT, at_step=at_step)
    *_, two = trained("parts", SHORT)
    apart = abs(one["loss"] - two["loss"])                      # of steps 11 to 20; a GPU's sums have no order
    right = half["step"] == 10 and two["step"] == 20 and apart <= (0.02 if CUDA else 0)
    verdict(right, f"going on: a run that was stopped ends as a whole one, loss by {apart:.1e}")


def sources():
    """Every source is drawn as on the CPU. (Renderer and augmentation have references of their own: the tests.)"""
    more = {kind: f"--source image --warp {kind}" for kind in op.WARPS} | {
        "multiplied": "--noise multiplicative", "1p-frac, full size": "--canvas 512 --points 100000"}
    for name, flags in [*(SOURCES | more).items()][::1 if CUDA else 5]:
        words = (f"pretrain --recipe nano --canvas 64 --points 5000 --L 16 {flags}"
                 + f" --image {HERE / 'saw.png'}" * ("source image" in flags)).split()
        here, there = (op.source_data(parse([*words, "--device", d])).images.cpu().flatten(1).float()
                       for d in ("cpu", DEVICE))
        share = ((here - there).abs() > 1).sum(1) / (here > 0).sum(1).clamp(min=1)    # of lit pixels
        verdict(share.median() < 0.01, f"sources: {name}: {share.median():.1e} of the pixels differ, "
                                       f"{share.max():.1e} in the worst")


def kept(make):
    """`source_data` that draws the pictures of equal settings once."""
    made = {}

    def source_data(args):
        flags = [(k, v) for k, v in vars(args).items() if k in (
            "source categories instances delta sigma L noise image edges warp fractal_seed num_maps canvas points "
            "texture seed device".split())]
        return made[str(flags)] if str(flags) in made else made.setdefault(str(flags), make(args))
    return source_data


def tests():
    """Those that touch CUDA in different ways, and compile nothing, in a process of their own."""
    names = "drop_path_drops or muon_moves" + CUDA * (
        " or each_orbit or kinds_render or texture_has or random_masks or fractal_with_its_eps or vit_agrees or crops"
        " or flipped_by or random_erasing or everything_off or operations_agree or color_jitter or evaluation_is"
        " or only_weight or never_waits or kept_and_streamed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE.parent / "test_onepfrac.py"]
    return subprocess.Popen([*command, "-k", names], stdout=open(WORK / "tests.txt", "w"), stderr=subprocess.STDOUT,
                            env=os.environ | {"ONEPFRAC_DEVICE": DEVICE})


def check(until):
    op.MODELS["check"] = 128, 2, 2                              # compiled within seconds
    child = tests()
    one_by_one(until, [(network,), (waiting,), (going_on,), (sources,)])
    try:
        verdict(child.wait(max(1, left(until)) + PATIENCE) == 0, "tests of test_onepfrac.py (their output: logs.zip)")
    except subprocess.TimeoutExpired:
        child.kill()
        verdict(False, "tests of test_onepfrac.py did not end in time")


# ---- speed

def seconds(function, calls=20):
    """Of one call: the median of five rounds. A GPU is waited for once in a round."""
    calls, rounds = (calls, 5) if CUDA else (1, 1)
    for _ in range(3):                                          # with CUDA graphs: compile, record, replay
        function()
    took = []
    for _ in range(rounds):
        synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        took.append((time.perf_counter() - began) / calls)
    return sorted(took)[rounds // 2]


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def profile(name, function, calls=3 if CUDA else 1):
    """Kernels and launches of one call, and how long the kernels are at work. What takes longest: a file."""
    with torch.profiler.profile() as found:                     # of the CPU, and of the GPU if there is one
        for _ in range(calls):
            function()
        synchronize()
    events = found.events()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    by = "self_device_time_total" if CUDA else "self_cpu_time_total"
    note("profile.txt", f"{BEGAN} {name}, {calls} calls\n{found.key_averages().table(by, 25, 80, 80)}\n")
    return dict(kernels=len(kernels) // calls, launches=sum("Launch" in e.name for e in events) // calls,
                busy_ms=round(sum(e.device_time for e in kernels) / 1000 / calls, 3))


def compare(name, ways):
    """A record of several functions: milliseconds, kernels, launches of each."""
    record(name, **{way: dict(ms=round(1000 * seconds(function), 3)) | profile(f"{name}, {way}", function)
                    for way, function in ways.items()})


def rendering():
    """Pictures as the paper has them, in groups as `Data` draws them, and all together."""
    images, points, size, group = (1000, 100_000, 512, 64) if CUDA else (8, 2000, 64, 4)
    base = op.base_ifs(2, 3.5, 32)
    maps, probs = op.perturb(base, 0.05, images, op.seeded(0)).to(DEVICE), base[..., :2].det().abs()

    def draw(group):
        for some in maps.split(group):
            op.stamp(op.render_ifs(some, size, points, generator=op.seeded(0), probs=probs))
    record(f"rendering {images}", seconds=round(seconds(lambda: draw(group), 2), 4), group=group,
           together_seconds=round(seconds(lambda: draw(images), 2), 4))


def prepared(recipe):
    """-> settings, network on the device, draw(): a batch and its targets"""
    args = op.parse(PRETRAIN[recipe])
    data, model = op.source_data(args), op.make_model(args, args.L).to(DEVICE)
    augment = op.make_augment(args, args.L, flip=(0.5 * args.flip,) * 2, erase=0.5 * args.erase)
    return args, model, lambda: augment(*data[torch.randint(len(data), (args.batch_size,))])


def steps(recipe):
    """The bare step on one batch, in three ways; images/s of the command's own loop, in two; and of making batches."""
    args, model, draw = prepared(recipe)
    batch, every, bare, whole = draw(), 2, {}, {}
    for name, accelerate in dict(compiled=op.accelerate, graphs=graphs, eager=eager).items():
        torch.compiler.reset()                                  # else another shape is taken for dynamic
        twin = copy.deepcopy(model)
        network, optimizer = accelerate(twin, args), op.make_optimizer(twin, args)

        def step():
            op.train_step(network, optimizer, *batch, args.lr, args)
        bare[name] = seconds(step)
        record(f"step {recipe}, {name}", ms=round(1000 * bare[name], 3), **profile(f"step {recipe}, {name}", step))
    if CUDA:
        every = max(2, round(1 / bare["compiled"]))             # the last line is about the last third
    for name, accelerate in dict(compiled=op.accelerate, graphs=graphs).items():
        words = [*PRETRAIN[recipe], "--steps", 3 * every, "--log-every", every]
        whole[name] = round(trained(f"{name}-{recipe}", words, accelerate=accelerate)[-1]["images_per_s"])
    rate = args.batch_size / bare["compiled"]
    record(f"speed {recipe}", step_images_per_s=round(rate), whole_images_per_s=whole["compiled"],
           whole_over_step=round(whole["compiled"] / rate, 3), graphs_whole_images_per_s=whole["graphs"],
           batch_images_per_s=round(args.batch_size / seconds(draw)), batch_size=args.batch_size,
           precision=args.precision, peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2) if CUDA else None,
           strides_of_batches=len({draw()[0].stride() for _ in range(20)}))         # more than 1: recorded again


def ways_of_randaugment():
    _, _, draw = prepared("paper")

    def in_a_loop():
        with mock.patch.object(op, "apply_op", other.in_a_loop):
            draw()
    compare("batch of paper", dict(sorted=draw, in_a_loop=in_a_loop))


def ways_of_muon():
    model = "vit_tiny" if CUDA else "vit_nano"
    compare(f"Muon, all matrices of {model}", dict(
        together=other.optimizer_step(op.Muon, DEVICE, model),
        one_by_one=other.optimizer_step(other.OneByOne, DEVICE, model)))


def speed(until):
    one_by_one(until, [(rendering,), (ways_of_muon,), (ways_of_randaugment,), (steps, "small"), (steps, "paper")])


# ---- train

def unpack():
    """CIFAR-100 from zip files, if there are only these."""
    if not DATA.exists():
        for file in sorted(glob.glob(os.environ.get("ZIP", "data/cifar100-*.zip"))):
            zipfile.ZipFile(file).extractall(DATA.parent / "unpacked")          # cifar100/train, cifar100/test
        (DATA.parent / "unpacked" / "cifar100").rename(DATA)


def pretrain(until):
    words, probe = PRETRAIN["small"], 200 if CUDA else 8
    *_, last = trained("probe", [*words, "--steps", probe, "--log-every", probe // 2], until)
    steps = max(1, int(0.9 * left(until) * last["images_per_s"] / op.parse(words).batch_size))
    *_, last = trained("fractal", [*words, "--steps", steps, "--log-every", max(1, steps // 100),
                                   "--save-every", max(1, steps // 8)], until)
    record("pretrain", planned_steps=steps, **last)


def split(data, args, holdout):
    """Data -> to train on, held out"""
    i = torch.randperm(len(data), generator=op.seeded(0))
    for some in op.balanced_subset(data.labels.cpu(), i, holdout=holdout):
        part = op.Data(data.labels.cpu()[some], lambda k, some=some: data[some[k]][0], args)
        part.classes = data.classes
        yield part


def finetune(until):
    """Both arms in turn, with the same rates tried and the same number of steps."""
    unpack()
    words, starts = [*FINETUNE, "--root", DATA], dict(fractal=[
        "--ckpt", os.environ.get("CKPT") or WORK / "fractal" / "last.pt"], scratch=[])
    args = op.parse([*map(str, words)])
    data = {0.0: op.downstream_data(args)}                      # read once
    data[0.2] = tuple(split(data[0.0][0], args, 0.2))
    batch, images = args.batch_size, len(data[0.0][0])

    def tuned(name, arm, lr, holdout, count, tests=1):
        """Train on `count` images -> log"""
        epochs = max(batch, count) / len(data[holdout][0])
        return trained(f"{name}-{arm}", [*words, *starts[arm], "--lr", lr, "--holdout", holdout, "--epochs", epochs,
                                         "--eval-epochs", epochs / tests, "--log-every", 20 if CUDA else 2], until)

    def tested(log):
        """The last test, 0 if there was none."""
        return [0, *(line["test_top1"] for line in log if "test_top1" in line)][-1]

    with mock.patch.object(op, "downstream_data", lambda args: data[args.holdout]):
        began, log = time.time(), tuned("probe", "scratch", RATES[0], 0.2, (60 if CUDA else 4) * batch)
        rates = sorted(line["images_per_s"] for line in log if "loss" in line)
        rate = rates[len(rates) // 2]
        more = max(0, time.time() - began - log[-1]["images"] / rate)           # to compile and to test
        count = (0.3 * left(until) / (2 * len(RATES)) - more) * rate
        heldout = dict(fractal={}, scratch={})
        for lr in RATES:
            for arm, found in heldout.items():
                found[lr] = 0
                with contextlib.suppress(RuntimeError):         # the loss became infinite
                    found[lr] = tested(tuned(f"choose-{lr:g}", arm, lr, 0.2, count))
                record(f"choose-{lr:g}-{arm}", heldout_top1=found[lr], images=round(count))
        count = (0.95 * left(until) / 2 - 5 * more) * rate
        for arm, found in heldout.items():
            lr = max(found, key=found.get)
            log = tuned("final", arm, lr, 0.0, count, tests=5)
            record(f"final-{arm}, {images // len(data[0.0][0].classes)} a class", test_top1=tested(log), lr=lr,
                   planned_epochs=round(count / images, 2), epochs=round(log[-1]["images"] / images, 2),
                   seconds=log[-1]["seconds"])


def train(until):
    if not os.environ.get("CKPT"):
        middle = time.time() + 0.4 * left(until)
        one_by_one(middle, [(pretrain, middle)])
    one_by_one(until, [(finetune, until)])


def main(total, *parts):
    """-> exit status. The last eight seconds are for stopping."""
    OUT.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("did not end in time")))
    op.source_data = kept(op.source_data)
    last = START + total - 8
    share = dict(check=(check, 0.2 * total), speed=(speed, 0.4 * total), train=(train, total))
    for part in parts or share:
        function, at_most = share[part]
        function(min(last, time.time() + at_most))
    print(f"{time.time() - START:.0f} s in all, {len(FAILED)} FAIL, results in {OUT}")
    return bool(FAILED)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *sys.argv[2:]))
