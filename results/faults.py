"""What a run survives: python results/faults.py

kills      SIGKILL, SIGTERM, SIGINT or SIGHUP at random moments of pre-training and of fine-tuning, and the same command
           again until it ends: are its weights and moments those of a run that nobody stopped?
two        the same with two processes, as under torchrun, and SIGKILL
bad input  checkpoints (bytes flipped, cut off, overwritten; parts exchanged or removed; code in a pickle), images (cut
           off, spoilt, of every mode, gigantic, none at all), folders, and values of flags. A run must end well, or
           with one line and status 2; never with a traceback, and never run the code.

A command runs in a fork of this process. Writes results/faults.md; the tests try a few of each.
"""
import argparse
import copy
import io
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import onepfrac as op

SMALL = ("--device cpu --precision fp32 --img-size 16 --batch-size 8 --log-every 3 --save-every 2 ").split()
PRE = [*"pretrain --L 8 --canvas 32 --points 500 --steps 40 --drop-path 0.1 --randaug --mixup --texture fresh".split(),
       *SMALL]
FINE = [*"finetune --data folder --epochs 12 --eval-epochs 1.7 --erase --cutmix".split(), *SMALL]


def forked(words, seconds=None, number=signal.SIGKILL, ranks=1):
    """Run a command, in several processes as under torchrun, perhaps with a signal to all of them after some seconds ->
    exit status of the last (negative: the signal), all output."""
    reader, writer = os.pipe()
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if not pids[-1]:
            status = 99
            try:
                os.dup2(writer, 1)
                os.dup2(writer, 2)
                sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
                signal.signal(signal.SIGINT, signal.default_int_handler)        # ignored in a background
                signal.signal(signal.SIGHUP, signal.SIG_DFL)
                if ranks > 1:
                    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                                       MASTER_PORT=str(port))
                status = op.main([str(word) for word in words])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
    os.close(writer)
    if seconds is not None:
        time.sleep(seconds)
        for pid in pids:
            os.kill(pid, number)
    with open(reader, errors="replace") as pipe:
        output = pipe.read()
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids][-1], output


def tensors(folder):
    """What must be the same: weights and moments."""
    saved = torch.load(folder / "last.pt", weights_only=True)
    return [*saved["model"].values(), *(t for s in saved["optimizer"]["state"].values() for t in s.values())]


def pictures(root):
    """Two classes of plain pictures, train/ and test/."""
    for part, n in (("train", 12), ("test", 4)):
        for name, shade in (("a", 60), ("b", 190)):
            Path(root, part, name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                Image.new("RGB", (16, 16), (shade, 10 * i, 255 - shade)).save(Path(root, part, name, f"{i}.png"))


def kill_at_random(count, rng, folder, words, ranks=1):
    """Runs that are ended `count` times in all, each gone on with until it has ended by itself."""
    began, whole = time.time(), folder / "whole"
    assert forked([*words, "--out", whole], ranks=ranks)[0] == 0
    length, out = time.time() - began, folder / "killed"
    found = dict(ended_at_random=0, before_the_first_save=0, runs=0, other_bits=0, otherwise=0)
    while found["ended_at_random"] < count or out.exists():
        number = signal.SIGKILL if ranks > 1 else rng.choice(
            (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        status, output = forked([*words, "--out", out], rng.uniform(0.1, 0.9) * length, number, ranks)
        if status == 0:                                         # also if the signal came after its end
            found["runs"] += 1
            same = zip(tensors(whole), tensors(out), strict=True)
            found["other_bits"] += not all(torch.equal(a, b) for a, b in same)
            shutil.rmtree(out)
        else:
            found["ended_at_random"] += 1
            found["before_the_first_save"] += not (out / "last.pt").exists()
            expected = status in (-number, 128 + number, 130) and "Traceback" not in output
            found["otherwise"] += not expected
            if not expected:
                print(status, output[-1500:], file=sys.stderr)
    return found


# ---- Bad input: a function changes a good folder of images, a checkpoint or a command -> the command

class Code:
    """A pickle that would make the file `executed`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


JUNK = (None, -1, 0, 2 ** 70, 1.5, float("nan"), "text", b"bytes", [], {}, (1, 2), torch.zeros(0), torch.zeros(3),
        torch.full((2,), float("inf")), torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.complex64),
        torch.eye(2).to_sparse(), {"model": {}}, {1: torch.zeros(1)})


def bad_checkpoint(rng, folder):
    """As a run's own last.pt, or for --ckpt. (Only there with parts exchanged: nobody edits last.pt.)"""
    good, own = folder / "begun" / "last.pt", rng.random() < 0.5
    data, content = bytearray(good.read_bytes()), torch.load(good, weights_only=True)
    at, kind = rng.randrange(len(data)), rng.choice(("flip", "cut", "blank", "code") + ("tree",) * 4 * (not own))
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        data = data[:at]
    elif kind == "blank":
        data[at:at + 4000] = bytes(min(4000, len(data) - at))
    else:
        place, key = copy.deepcopy(content), rng.choice(list(content))
        top = place
        while isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
            place = place[key]
            key = rng.choice(list(place))
        place[key] = rng.choice(JUNK) if kind == "tree" else Code(folder / "executed")
        if kind == "tree" and rng.random() < 0.2:
            del place[key]
        file = io.BytesIO()
        torch.save(top, file) if rng.random() < 0.8 or kind == "tree" else pickle.dump(top, file)
        data = file.getvalue()
    (folder / "run").mkdir()
    (folder / "run" / "last.pt").write_bytes(data)
    if own:
        return [*PRE, "--out", folder / "run"]
    return [*FINE, "--epochs", 0.1, "--root", folder / "images", "--ckpt", folder / "run" / "last.pt"]


def bad_image(rng, folder):
    path = folder / "images" / rng.choice(("train", "test")) / "a" / rng.choice(("x.png", "ünïcödé 图.png", "-rf.JPG"))
    kind = rng.choice(("cut", "flip", "mode", "header", "long", "text", "link"))
    image, file = Image.effect_noise((40, 30), 80), io.BytesIO()
    if kind in ("cut", "flip"):
        image.convert("RGB").save(file, rng.choice(("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")))
        data = bytearray(file.getvalue())
        at = rng.randrange(len(data))
        data[at] ^= 255
        path.write_bytes(data[:at] if kind == "cut" else data)
    elif kind == "mode":
        mode = rng.choice(("1", "L", "LA", "P", "RGBA", "I;16", "I", "F", "CMYK"))
        if mode == "I;16":
            image = Image.frombytes(mode, (40, 30), rng.randbytes(2400))
        elif mode == "CMYK":
            image = image.convert("RGB")
        image.convert(mode).save(path, {"F": "TIFF", "I": "TIFF", "CMYK": "JPEG"}.get(mode, "PNG"))
    elif kind == "header":                                      # says that it is gigantic
        image.save(file, "BMP")
        data = bytearray(file.getvalue())
        data[18:26] = rng.choice((10 ** 4, 30_000, 2 ** 31 - 1)).to_bytes(4, "little") * 2
        path.write_bytes(data)
    elif kind == "long":
        Image.new("L", rng.choice(((1, 60_000), (60_000, 1))), 9).save(path, "PNG")
    elif kind == "text":
        path.write_text("<svg>" * rng.randrange(1000))
    else:
        path.symlink_to(rng.choice((path, path.parent / "nowhere", "/dev/null")))
    return [*FINE, "--epochs", 0.1, "--root", folder / "images"]


def bad_folder(rng, folder):
    root, part = folder / "images", rng.choice(("train", "test"))
    kind = rng.choice(("vanish", "alone", "hidden", "other", "empty", "deep", "loop", "missing"))
    if kind in ("vanish", "empty", "alone"):
        for split in ("train", "test") if kind == "alone" else (part,):
            shutil.rmtree(root / split / "b")
    if kind == "empty":
        (root / part / "b").mkdir()
    elif kind == "hidden":
        shutil.copytree(root / part / "a", root / part / rng.choice((".ipynb_checkpoints", "@eaDir", "..x")))
    elif kind == "other":
        (root / part / "a" / rng.choice(("notes.txt", "Thumbs.db", "x"))).write_bytes(rng.randbytes(9))
    elif kind == "deep":
        (root / part / "b" / "x" / "y").mkdir(parents=True)
        Image.new("CMYK", (16, 16)).save(root / part / "b" / "x" / "y" / "1.tif")
    elif kind == "loop":
        (root / part / "b" / "again").symlink_to(root / part)
    elif kind == "missing":
        shutil.rmtree(root)
    return [*FINE, "--epochs", 0.1, "--root", root]


def bad_flag(rng, folder):
    words = rng.choice((PRE, [*FINE, "--root", folder / "images", "--epochs", 0.1]))
    known = op.parse([str(word) for word in words])
    flag = rng.choice([name for name in vars(known) if name not in ("out", "command", "world_size", "rank", "lead")])
    value = rng.choice(("-1", "0", "3", "0.5", "nan", "inf", "1e99", "text", "", "0x10", "٣", "None"))
    return [*words, f"--{flag.replace('_', '-')}", value]


def try_bad_input(count, rng, folder, kind):
    found = dict(runs=0, refused_in_one_line=0, ended_well=0, otherwise=0, code_executed=0)
    while kind is bad_checkpoint and not (folder / "begun" / "last.pt").exists():       # of a run that is stopped
        forked([*PRE, "--out", folder / "begun"], rng.uniform(0.3, 1), signal.SIGTERM)
    for _ in range(count):
        pictures(folder / "images")
        words = kind(rng, folder)
        out = [] if "--out" in words else ["--out", folder / "out"]
        status, output = forked([*words, *out])
        lines = [line for line in output.splitlines() if line.startswith("onepfrac: ")]
        one_line = status == 2 and len(lines) == 1 and "Traceback" not in output
        found["runs"] += 1
        found["refused_in_one_line"] += one_line
        found["ended_well"] += status == 0
        if status != 0 and not one_line:
            found["otherwise"] += 1
            print(*words, status, output[-1500:], file=sys.stderr)
        found["code_executed"] += (folder / "executed").exists()
        for path in ("images", "run", "out"):
            shutil.rmtree(folder / path, ignore_errors=True)
    return found


STUDIES = {     # name: times, function, more arguments
    "kills, pre-training": (40, kill_at_random, PRE),
    "kills, fine-tuning": (40, kill_at_random, FINE),
    "kills, pre-training with two processes": (16, kill_at_random, PRE, 2),
    "bad input: checkpoints": (200, try_bad_input, bad_checkpoint),
    "bad input: images": (150, try_bad_input, bad_image),
    "bad input: folders": (60, try_bad_input, bad_folder),
    "bad input: flags": (200, try_bad_input, bad_flag)}
ZERO = {"other_bits", "otherwise", "code_executed"}


def study(name, count=None, seed=0):
    torch.set_num_threads(1)
    Figure().savefig(io.BytesIO())                              # forks need not read the fonts
    usual, function, subject, *more = STUDIES[name]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pictures(folder / "pictures")
        if subject is FINE:
            subject = [*FINE, "--root", folder / "pictures"]
        return function(count or usual, random.Random(seed), folder, subject, *more)


if __name__ == "__main__":
    known = op.machine(argparse.Namespace(device="cpu"))
    lines = ["# Faults tried, and what happened", "", "`python results/faults.py`, seed 0, torch {torch}, one thread, "
             "commit `{commit}`. What must be 0 is bold.".format(**known), "", "| fault | what happened |", "|---|---|"]
    for name in STUDIES:
        counts = ", ".join(f"{key.replace('_', ' ')} {f'**{value}**' if key in ZERO else value}"
                           for key, value in study(name).items())
        lines.append(f"| {name} | {counts} |")
        print(lines[-1], flush=True)
    (HERE / "faults.md").write_text("\n".join(lines) + "\n")
