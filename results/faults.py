"""What a run survives: python results/faults.py

kills        kill -9 at random moments of a pre-training that saves at every second step, gone on with after each
stops        SIGINT, SIGTERM or SIGHUP at random moments of pre-training and of fine-tuning, then resume: the same bits?
disk         a limit on the size of files, at random, while a run goes on from its checkpoint
checkpoints  bytes flipped, cut off, overwritten; structures with parts exchanged; pickles with code in them
weights      checkpoints as others write them: prefixes, wrappers, no checksums, half precision; and foreign objects
images       folders with one hostile file: cut off, spoilt, of every mode, gigantic, extremely long, no image at all
folders      odd folders: classes that vanish, hidden ones, other endings, links, depths; images added before a resume
outputs      a pipe that is closed at a random moment, a full device; two runs that start into one folder

Every command runs in a process of its own, a fork of this one. Writes results/faults.md; the tests run a few of each.
"""
import argparse
import copy
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import matplotlib.pyplot        # noqa: F401 (what the commands import late, forks should find loaded)
import torch
import torchvision.datasets     # noqa: F401
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import onepfrac as op

SMALL = ("--device cpu --recipe nano --precision fp32 --img-size 16 --model vit_nano --batch-size 8 --log-every 3 "
         "--save-every 2").split()
PRE = "pretrain --L 8 --canvas 32 --points 500 --steps 40 --drop-path 0.1 --randaug --mixup --texture fresh".split()
PRE += SMALL
FINE = "finetune --data folder --epochs 12 --eval-epochs 1.7 --erase --cutmix".split() + SMALL


def forked(arguments, seconds=None, number=signal.SIGKILL, largest=None):
    """Run a command, perhaps with a signal after some seconds -> exit status (negative: the signal), all output."""
    reader, writer = os.pipe()                  # no file: the limit is for the run's own
    pid = os.fork()
    if not pid:
        status = 99
        try:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)            # ignored in a background
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            if largest is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
            status = op.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, number)
    with open(reader, errors="replace") as pipe:
        output = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


def one_line(status, output):
    """An error is one line of ours, and status 2."""
    errors = [line for line in output.splitlines() if line.startswith("onepfrac: ")]
    return status == 2 and len(errors) == 1 and "Traceback" not in output


def outcome(folder):
    """What must be the same: weights, moments, and the log but for its times."""
    saved = torch.load(folder / "last.pt", weights_only=True)
    log = [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_s")}
           for line in (folder / "log.jsonl").read_text().splitlines()]
    tensors = list(saved["model"].values()) + [t for s in saved["optimizer"]["state"].values() for t in s.values()]
    return log, tensors


def same(a, b):
    return a[0] == b[0] and len(a[1]) == len(b[1]) and all(torch.equal(s, t) for s, t in zip(a[1], b[1]))


def length(arguments, folder):
    """Seconds of an undisturbed run into the folder."""
    began = time.time()
    status, output = forked([*arguments, "--out", folder])
    assert status == 0, output
    return time.time() - began


def kills(count, rng, folder):
    seconds = length(PRE, folder / "whole")
    found = dict(kills=0, before_the_first_save=0, unreadable=0, lost_runs=0, finished_runs=0, other_bits=0)
    out = folder / "killed"
    while found["kills"] < count:
        there = (out / "last.pt").exists()
        words = ["resume", out] if (out / "args.json").exists() else [*PRE, "--out", out]
        status, output = forked(words, rng.uniform(0, 0.6 * seconds))
        if status == -signal.SIGKILL:
            found["kills"] += 1
            if (out / "last.pt").exists():
                try:
                    torch.load(out / "last.pt", weights_only=True)
                except Exception:
                    found["unreadable"] += 1
            else:
                found["lost_runs"] += there
                found["before_the_first_save"] += 1
        else:
            found["lost_runs"] += status != 0
            found["finished_runs"] += status == 0
            found["other_bits"] += status != 0 or not same(outcome(out), outcome(folder / "whole"))
            shutil.rmtree(out)
    return found


def stops(count, rng, folder):
    root = folder / "images"
    pictures(root)
    found = {}
    for stage, arguments in (("pre-training", PRE), ("fine-tuning", [*FINE, "--root", root])):
        whole = folder / f"{stage}-whole"
        seconds, stopped, other, untidy = length(arguments, whole), 0, 0, 0
        while stopped < count:
            out = folder / f"{stage}-{stopped}"
            number = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
            status, output = forked([*arguments, "--out", out], rng.uniform(0.1, 0.9) * seconds, number)
            if status == 128 + number and "onepfrac: stopped" in output:
                stopped += 1
                untidy += f"resume {out}` continues" not in output or "Traceback" in output
                status, output = forked(["resume", out])
                other += status != 0 or not same(outcome(out), outcome(whole))
            elif status not in (0, 130, -signal.SIGTERM, -signal.SIGHUP):       # done before, or nothing to save yet
                untidy += 1
                print(stage, status, output[-1500:], file=sys.stderr)
            shutil.rmtree(out, ignore_errors=True)
        found[stage] = dict(stopped_and_resumed=stopped, other_bits=other, untidy=untidy)
    return found


def disk(count, rng, folder):
    begun, whole = folder / "begun", folder / "whole"
    seconds, status = length(PRE, whole), 0
    while status != 128 + signal.SIGTERM:                           # stopped halfway
        shutil.rmtree(begun, ignore_errors=True)
        status, output = forked([*PRE, "--out", begun], rng.uniform(0.3, 0.9) * seconds, signal.SIGTERM)
    size = (begun / "last.pt").stat().st_size
    found = dict(runs=0, without_a_clear_line=0, checkpoint_spoilt=0, other_bits_afterwards=0)
    for k in range(count):
        out = folder / "full"
        shutil.copytree(begun, out)
        status, output = forked(["resume", out], largest=rng.randrange(0, size))
        found["runs"] += 1
        found["without_a_clear_line"] += not (one_line(status, output) and "--out" in output)
        found["checkpoint_spoilt"] += not torch.load(out / "last.pt", weights_only=True)
        if k % 10 == 0:                                             # and with room again it ends as ever
            status, output = forked(["resume", out])
            found["other_bits_afterwards"] += status != 0 or not same(outcome(out), outcome(whole))
        shutil.rmtree(out)
    return found


class Code:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


JUNK = (None, -1, 0, 2 ** 70, 1.5, float("nan"), "text", b"bytes", [], {}, (1, 2), torch.zeros(0), torch.zeros(3),
        torch.full((2,), float("inf")), torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.complex64),
        torch.zeros(1).expand(10 ** 9), torch.eye(2).to_sparse(), {"model": {}}, {1: torch.zeros(1)})


def exchanged(content, rng):
    """The same tree with one part, at any depth, taken out or put in another's place."""
    content = copy.deepcopy(content)
    place, key = content, rng.choice(list(content))
    while isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
        place = place[key]
        key = rng.choice(list(place))
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(JUNK)
    return content


def checkpoints(count, rng, folder):
    whole = folder / "whole"
    length(PRE, whole)
    data, content = (whole / "last.pt").read_bytes(), torch.load(whole / "last.pt", weights_only=True)
    torch.save(torch.load(whole / "last.pt", weights_only=True), buffer := io.BytesIO())
    marker, whole_content = folder / "executed", buffer.getvalue()
    found = dict(checkpoints=0, refused_in_one_line=0, read=0, otherwise=0, other_weights_read=0, code_executed=0)
    for k in range(count):
        bad = bytearray(data)
        at = rng.randrange(len(bad)) if k % 2 else rng.choice((rng.randrange(2000), -1 - rng.randrange(20_000)))
        kind = ("flip", "cut", "blank", "insert", "tree", "tree", "tree", "code")[k % 8]
        if kind == "flip":
            for _ in range(rng.choice((1, 1, 1, 30))):
                bad[rng.randrange(len(bad)) if k % 2 else at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            bad = bad[:at]
        elif kind == "blank":
            bad[at:at + rng.randrange(1, 4000)] = bytes(rng.randrange(1, 4000))
        elif kind == "insert":
            bad[at:at] = rng.randbytes(rng.randrange(1, 100))
        else:
            buffer, call = io.BytesIO(), rng.choice(((os.system, (f"touch {marker}",)), (open, (str(marker), "w")),
                                                     (eval, (f"open({str(marker)!r}, 'w')",))))
            if kind == "tree":
                torch.save(exchanged(content, rng), buffer)
            elif rng.random() < 0.5:
                torch.save(content | {rng.choice(list(content)): Code(*call)}, buffer)
            else:
                pickle.dump({"model": Code(*call)}, buffer)
            bad = buffer.getvalue()
        out = folder / "run"
        shutil.copytree(whole, out)
        for file in (out / "last.pt", folder / "bad.pt"):
            file.write_bytes(bad)
        if rng.random() < 0.5:
            status, output = forked(["resume", out])
        else:
            status, output = forked([*FINE, "--root", folder / "images", "--epochs", "0.01", "--ckpt", out / "last.pt",
                                     "--out", folder / "tuned"])
            shutil.rmtree(folder / "tuned", ignore_errors=True)
        shutil.rmtree(out)
        found["checkpoints"] += 1
        found["refused_in_one_line"] += one_line(status, output)
        found["read"] += status == 0
        if status == 0 and kind not in ("tree", "code"):            # whole in spite of it
            torch.save(torch.load(folder / "bad.pt", weights_only=True), buffer := io.BytesIO())
            found["other_weights_read"] += buffer.getvalue() != whole_content
        if not one_line(status, output) and status != 0:
            found["otherwise"] += 1
            print(kind, status, output[-1500:], file=sys.stderr)
        found["code_executed"] += marker.exists()
        marker.unlink(missing_ok=True)
    return found


def pictures(root):
    """Two classes of plain pictures, train/ and test/."""
    for part, n in (("train", 12), ("test", 4)):
        for name, shade in (("a", 60), ("b", 190)):
            Path(root, part, name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                Image.new("RGB", (16, 16), (shade, 10 * i, 255 - shade)).save(Path(root, part, name, f"{i}.png"))


def hostile_image(k, rng, path):
    """Writes one hostile file -> its kind, and whether it is an image that must be read."""
    image = Image.effect_noise((40, 30), 80)
    kinds = ("cut", "flip", "mode", "mode", "header", "long", "empty", "text", "other format", "folder", "link")
    kind = kinds[k % len(kinds)]
    if kind in ("cut", "flip"):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, rng.choice(("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")))
        data = bytearray(buffer.getvalue())
        if kind == "cut":
            data = data[:rng.randrange(len(data))]
        else:
            for _ in range(rng.choice((1, 10))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "mode":
        mode = rng.choice(("1", "L", "LA", "P", "RGBA", "I;16", "I", "CMYK", "F", "P transparent"))
        if mode == "CMYK":
            image.convert("RGB").convert("CMYK").save(path, "JPEG")
        elif mode in ("F", "I"):
            image.convert(mode).save(path, "TIFF")
        elif mode == "I;16":
            Image.frombytes("I;16", (40, 30), rng.randbytes(2400)).save(path, "PNG")
        elif mode == "P transparent":
            image.convert("P").save(path, "PNG", transparency=bytes(range(256)))
        else:
            image.convert(mode).save(path, "PNG")
        return kind, True
    elif kind == "header":                                          # says that it is gigantic
        buffer = io.BytesIO()
        image.save(buffer, "BMP")
        data = bytearray(buffer.getvalue())
        data[18:26] = rng.choice((10 ** 4, 30_000, 2 ** 31 - 1)).to_bytes(4, "little") * 2
        path.write_bytes(data)
    elif kind == "long":
        size = (1, rng.choice((2000, 60_000)))
        Image.new("L", rng.choice((size, size[::-1])), 9).save(path, "PNG")
        return kind, True
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<svg>" * rng.randrange(1, 1000))
    elif kind == "other format":
        Image.effect_noise((20, 20), 50).save(path, rng.choice(("GIF", "WEBP", "PPM", "TIFF", "ICO")))
        return kind, True
    elif kind == "folder":
        path.mkdir()
        return kind, True                                           # which holds no image, and is passed over
    else:
        path.symlink_to(rng.choice((path, path.parent / "nowhere", "/dev/null")))
    return kind, False


def images(count, rng, folder):
    found = dict(folders=0, refused_in_one_line=0, read=0, otherwise=0)
    for k in range(count):
        root = folder / "hostile"
        pictures(root)
        name = rng.choice(("x.png", "ünïcödé 图.png", "two words.JPG", "-rf.png", "a'b\"c.jpeg"))
        kind, readable = hostile_image(k, rng, root / rng.choice(("train", "test")) / "a" / name)
        if rng.random() < 0.2:                                      # a folder that holds itself
            (root / "train" / "b" / "again").symlink_to(root / "train")
            kind, readable = "loop", False
        status, output = forked([*FINE, "--epochs", "0.01", "--root", root, "--out", folder / "run"])
        found["folders"] += 1
        found["refused_in_one_line"] += one_line(status, output)
        found["read"] += status == 0
        if status != 0 and (readable or not one_line(status, output)):
            found["otherwise"] += 1
            print(kind, status, output[-1500:], file=sys.stderr)
        shutil.rmtree(root)
        shutil.rmtree(folder / "run", ignore_errors=True)
    return found


def weights(count, rng, folder):
    whole = folder / "whole"
    length(PRE, whole)
    state, file = torch.load(whole / "last.pt", weights_only=True)["model"], folder / "other.pt"
    found = dict(files=0, read=0, refused_in_one_line=0, otherwise=0)
    for _ in range(count):
        prefix = "".join(rng.sample(("module.", "_orig_mod.", "model."), rng.randrange(4)))
        content = {prefix + name: t.half() if rng.random() < 0.2 else t for name, t in state.items()}
        for wrapper in rng.sample(("model", "state_dict", "model_state_dict"), rng.randrange(2)):
            content = {wrapper: content, "epoch": 7}
        foreign = rng.random() < 0.3
        if foreign:
            content = rng.choice(({**content, "extra": Code(print, ("executed",))}, 5, "text", [1, 2], torch.zeros(3),
                                  {"weight": torch.zeros(2)}, {"model": 7}, torch.nn.Linear(2, 2)))
        torch.serialization.set_crc32_options(rng.random() < 0.5)
        torch.save(content, file)
        torch.serialization.set_crc32_options(True)
        status, output = forked([*FINE, "--root", folder / "images", "--epochs", "0.01", "--ckpt", file, "--out",
                                 folder / "tuned"])
        shutil.rmtree(folder / "tuned", ignore_errors=True)
        found["files"] += 1
        found["read"] += status == 0
        found["refused_in_one_line"] += one_line(status, output)
        if (not one_line(status, output) if foreign else status != 0) or "executed" in output:
            found["otherwise"] += 1
            print(prefix, foreign, status, output[-1500:], file=sys.stderr)
    return found


def odd_folder(kind, rng, root):
    """Changes a folder of two classes -> what the run must print, or None if it must be refused."""
    part = rng.choice(("train", "test"))
    if kind == "vanish":
        shutil.rmtree(root / part / "b")
        return None
    if kind == "alone":
        for split in ("train", "test"):
            shutil.rmtree(root / split / "b")
        return None
    if kind == "hidden":
        shutil.copytree(root / part / "a", root / part / rng.choice((".ipynb_checkpoints", ".git", "..x")))
        return "left out" if part == "train" else "2 classes"
    if kind == "ending":
        (root / "train" / "a" / rng.choice(("x.gif", "notes.txt", "Thumbs.db", "x"))).write_bytes(rng.randbytes(9))
        return "1 files left out"
    if kind == "empty":
        shutil.rmtree(root / part / "b")
        (root / part / "b").mkdir()
        return None
    deep = root / part / "b" / "x" / "y"
    if kind == "deep":
        deep.mkdir(parents=True)
        Image.new(rng.choice(("RGB", "L", "RGBA", "CMYK")), (16, 16)).save(deep / "1.tif")
    elif kind == "link":
        (root / part / "b").rename(root / "elsewhere")
        (root / part / "b").symlink_to(root / "elsewhere")
    return "2 classes"


def folders(count, rng, folder):
    kinds = ("vanish", "alone", "hidden", "ending", "empty", "deep", "link")
    found = dict(folders=0, refused_in_one_line=0, read=0, otherwise=0, resumed_with_other_images=0)
    for k in range(count):
        root, out = folder / "odd", folder / "run"
        pictures(root)
        wanted = odd_folder(kinds[k % len(kinds)], rng, root)
        status, output = forked([*FINE, "--epochs", "1", "--root", root, "--out", out])
        found["folders"] += 1
        found["refused_in_one_line"] += one_line(status, output)
        found["read"] += status == 0
        if not (one_line(status, output) if wanted is None else status == 0 and wanted in output):
            found["otherwise"] += 1
            print(kinds[k % len(kinds)], status, output[-1500:], file=sys.stderr)
        if status == 0:                         # one more image, or one less, before the run goes on
            file = root / rng.choice(("train", "test")) / "a" / "0.png"
            shutil.copy(file, file.with_name("new.png")) if rng.random() < 0.5 else file.unlink()
            found["resumed_with_other_images"] += not one_line(*forked(["resume", out]))
        shutil.rmtree(root)
        shutil.rmtree(out, ignore_errors=True)
    return found


def unread(arguments, target, seconds):
    """Run a command whose output goes to a device, or into a pipe that is closed after some seconds -> status."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        out = writer if target is None else os.open(target, os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.close(reader)
        os.close(writer)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
        status = 99
        try:
            status = op.main([str(a) for a in arguments])
        finally:
            os._exit(status)
    os.close(writer)
    time.sleep(seconds)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outputs(count, rng, folder):
    whole = folder / "whole"
    seconds = length(PRE, whole)
    found = dict(unread_runs=0, pairs=0, lost_runs=0, other_bits=0, untidy=0)
    for k in range(count):
        out = folder / "run"
        if k % 3:
            status = unread([*PRE, "--out", out], rng.choice((None, None, "/dev/full")), rng.uniform(0, 1) * seconds)
            found["unread_runs"] += 1
            found["lost_runs"] += status != 0
        else:                                   # two runs at once: one is told so in a line
            log, pids = folder / "log", []
            for _ in range(2):
                pids.append(os.fork())
                if not pids[-1]:
                    status = 99
                    try:
                        sys.stdout = sys.stderr = open(log, "a", buffering=1)
                        status = op.main([*map(str, PRE), "--out", str(out)])
                    finally:
                        os._exit(status)
                time.sleep(rng.uniform(0, 0.5) * seconds)
            status = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
            found["pairs"] += 1
            found["untidy"] += status != [0, 2] or not one_line(2, log.read_text())
            log.unlink()
        found["other_bits"] += not same(outcome(out), outcome(whole))
        shutil.rmtree(out)
    return found


ZERO = {"unreadable", "lost_runs", "other_bits", "untidy", "without_a_clear_line", "checkpoint_spoilt",
        "other_bits_afterwards", "otherwise", "other_weights_read", "code_executed", "resumed_with_other_images"}
STUDY = dict(kills=200, stops=20, disk=100, checkpoints=800, weights=100, images=200, folders=100, outputs=60)


def study(name, count, seed=0):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder, "images"))
        return globals()[name](count, random.Random(seed), Path(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    lines = ["# Faults tried, and what happened", "",
             f"`python results/faults.py`, seed 0, torch {torch.__version__}, one thread. What must be 0 is bold.", "",
             "| fault | what happened |", "|---|---|"]
    for name, count in STUDY.items():
        found = study(name, count)
        for part, counts in found.items() if isinstance(next(iter(found.values())), dict) else [("", found)]:
            counts = ", ".join(f"{key.replace('_', ' ')} {f'**{value}**' if key in ZERO else value}"
                               for key, value in counts.items())
            lines.append(f"| {' '.join((name, part)).strip()} | {counts} |")
            print(lines[-1], flush=True)
    Path(__file__).with_name("faults.md").write_text("\n".join(lines) + "\n")
