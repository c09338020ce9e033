"""Where the numbers on speed in onepfrac.py and in README.md come from, one thread or as many as OMP_NUM_THREADS says:

    python results/speed.py nano      # all steps of nano's pre-training, beside its older setting (21,000 of AdamW)
    python results/speed.py tricks    # what section G says: each plain way beside the one that the file has

A line of JSON each. Ways that are compared take turns on the same cores; the fastest of several rounds counts.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import onepfrac as op


def take_turns(ways, rounds=7):
    """Each function once, not counted, then all of them in turn -> {name: seconds of each round}."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, function in ways.items():
            start = time.perf_counter()
            function()
            seconds[name].append(round(time.perf_counter() - start, 5))
    return {name: times[1:] for name, times in seconds.items()}


def nano(some=20):
    """Minutes of the bare steps, from `some` of them at a time."""
    ways = {"nano": "", "adamw": "--optimizer adamw --lr 1e-3 --batch-size 64 --steps 21000"}
    settings = {name: op.parse(["pretrain", *flags.split()]) for name, flags in ways.items()}

    def steps(args):
        model = op.make_model(args, args.L)
        x = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
        target, optimizer = torch.arange(args.batch_size) % args.L, op.make_optimizer(model, args)
        return lambda: [op.train_step(model, optimizer, x, target, args.lr, args) for _ in range(some)]

    seconds = take_turns({name: steps(args) for name, args in settings.items()})
    minutes = {name: round(min(times) / some * settings[name].steps / 60, 2) for name, times in seconds.items()}
    return dict(seconds=seconds, minutes=minutes, nano_over_adamw=round(minutes["nano"] / minutes["adamw"], 3))


# ---- The plain ways

def in_a_loop(x, number, level):
    """`apply_op`, each kind with a selection of its own."""
    moves = torch.tensor([*op.MOVES.values()])
    x = x.clone()
    for k in range(op.NONE):
        some = (number == k).nonzero()[:, 0]
        if len(some):
            index, amount = (t.to(x.device, non_blocking=True) for t in (some, level[some]))
            if k < len(op.OPS):
                x[index] = [*op.OPS.values()][k](x[index], amount.view(-1, 1, 1, 1))
            else:
                by = moves[k - len(op.OPS)].to(x.device, non_blocking=True)
                x[index] = op.move(x[index], by * amount[:, None])
    return x


class OneByOne(op.Muon):
    """Muon that updates each matrix by itself."""

    def update(self, matrices, **group):
        for p in matrices:
            super().update([p], **group)


class Fused(op.Attention):
    """Attention as it is on a GPU."""

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))


def plain_orthogonalise(x, steps=5):
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ wide
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def optimizer_step(kind, device="cpu", model="vit_nano", dtype=torch.bfloat16):
    """A function: one step of Muon, of a class of it, on all matrices in the blocks of a network."""
    blocks = op.ViT(32, 8, 10, *op.MODELS[model]).blocks.to(device)
    matrices = [p for p in blocks.parameters() if p.ndim == 2]
    grads, optimizer = [torch.randn_like(p) for p in matrices], kind([dict(params=matrices, muon_dtype=dtype)], 1e-3)

    def step():
        for p, grad in zip(matrices, grads):
            p.grad = grad
        optimizer.step()
    return step


def forwards_and_back(attention):
    """A function: attention at nano's shapes in bf16."""
    x, module = torch.randn(128, 17, 96, requires_grad=True), attention(96, 3)

    def both():
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        y.float().sum().backward()
    return both


class Operations(TorchDispatchMode):
    """Counts the operations in its block."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def randaug_operations(apply, batch=256):
    """Of RandAugment on a batch as in recipe paper, where each kind occurs."""
    with mock.patch.object(op, "apply_op", apply), Operations() as counter:
        torch.manual_seed(0)
        op.rand_augment(torch.zeros(batch, 1, 16, 16))
    return counter.count


def seconds_of_training(remember, steps=100):
    """CPU time of some of nano's pre-training, in a process that keeps its memory or does not."""
    with tempfile.TemporaryDirectory() as folder:
        code = (f"import onepfrac as op, sys, time; {'op.keep_memory();' * remember} began = time.process_time(); "
                "op.main(sys.argv[1:]); print(time.process_time() - began)")
        words = f"pretrain --device cpu --steps {steps} --log-every {steps} --out {folder}/run".split()
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=HERE.parent, capture_output=True, check=True)
        return float(done.stdout.split()[-1])


def bytes_of_a_dot(images=(16, 64), points=100_000):
    """What more images at once take besides themselves, for each of their dots. The peak of a process of its own."""
    code = ("import sys; sys.path.insert(0, {!r}); import onepfrac as op; op.keep_memory(); "
            "op.render_ifs(op.base_ifs(2, 3.5, 32).expand({}, 2, 2, 3), points={}); "
            "print(1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))")
    few, many = (int(subprocess.run([sys.executable, "-c", code.format(str(HERE.parent), n, points)],
                                    capture_output=True, text=True, check=True).stdout) for n in images)
    return round((many - few) / ((images[1] - images[0]) * points) - 512 ** 2 / points, 1)


def tricks():
    table, rows = torch.randn(2, 2, 3, 64), torch.randint(2, (200,))    # 64 systems, 200 orbits
    images, matrices = torch.full((64, 128, 128), op.GREY, dtype=torch.uint8), torch.randn(6, 96, 288)
    pairs = {   # the plain way, the one in onepfrac.py
        "chaos_game: table[rows], index_select": (lambda: table[rows], lambda: table.index_select(0, rows)),
        "stamp: random_(2), 64 coins of a number": (
            lambda: images * torch.empty_like(images).random_(2), lambda: op.stamp(images)),
        "Attention: fused, written out": (forwards_and_back(Fused), forwards_and_back(op.Attention)),
        "Muon: one by one, all at once": (optimizer_step(OneByOne), optimizer_step(op.Muon)),
        "orthogonalise: plain, baddbmm": (lambda: plain_orthogonalise(matrices), lambda: op.orthogonalise(matrices)),
    }
    found = {}
    for name, (plain, fast) in pairs.items():
        seconds = take_turns({k: lambda way=way: [way() for _ in range(20)] for k, way in enumerate((plain, fast))})
        found[name] = round(min(seconds[0]) / min(seconds[1]), 2)
    pairs = [(seconds_of_training(False), seconds_of_training(True)) for _ in range(3)]
    found["keep_memory: CPU seconds without, with"] = [round(min(some), 1) for some in zip(*pairs)]
    found["apply_op: operations in a loop, sorted"] = [randaug_operations(in_a_loop), randaug_operations(op.apply_op)]
    found["render_ifs: bytes of a dot"] = bytes_of_a_dot()
    return dict(plain_over_fast=found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=("nano", "tricks"))
    op.keep_memory()
    for name in parser.parse_args().names:
        print(json.dumps(dict(measured=name, threads=torch.get_num_threads(), torch=torch.__version__) |
                         {"nano": nano, "tricks": tricks}[name]()), flush=True)
