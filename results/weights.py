"""The shipped weights: python results/weights.py RUN

Takes the network of the pre-training in the folder RUN, head included and optimizer state left out, and writes
results/nano.pt, its SHA-256 (nano.sha256), what it was drawn from (nano.omega.json), and all settings with the pretext
accuracy on 20,000 newly drawn images (nano.args.json).
"""
import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import onepfrac as op


@torch.no_grad()
def pretext_accuracy(path, settings, images, seed):
    """Top-1 in percent of the weights in `path` on `images` newly augmented images of the run with these settings."""
    args = argparse.Namespace(**settings)
    args.device, args.precision = "cpu", "fp32"
    args.mixup = args.cutmix = False            # a mixed image has two answers
    data = op.source_data(args)
    model = op.make_model(args, args.L).eval()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    augment = op.make_augment(args, args.L, flip=(0.5 * args.flip,) * 2, erase=0.5 * args.erase)
    torch.manual_seed(seed)
    right = 0
    for i in (torch.arange(images) % args.L).split(500):
        x, target = augment(*data[i])
        right += (op.predict(model, x, args).argmax(1) == target.argmax(1)).sum().item()
    return 100 * right / images


def main():
    run, path = Path(sys.argv[1]), HERE / "nano.pt"
    saved = torch.load(run / "last.pt", weights_only=True)
    torch.save({"model": {name: t.float() for name, t in saved["model"].items()}}, path)
    (HERE / "nano.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  nano.pt\n")
    (HERE / "nano.omega.json").write_text((run / "omega.json").read_text())
    settings = {k: v for k, v in json.loads((run / "args.json").read_text()).items() if k not in ("out", "root")}
    settings["pretext_top1"] = round(pretext_accuracy(path, settings, 20_000, 1), 2)
    (HERE / "nano.args.json").write_text(json.dumps(settings) + "\n")
    print(f"{path}: {path.stat().st_size:,} bytes, pretext top-1 {settings['pretext_top1']}%")


if __name__ == "__main__":
    main()
