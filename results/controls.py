"""What takes the fractal's place in controls: python results/controls.py FOLDER [FLAGS of `onepfrac.py finetune`]

Both are made of training images of CIFAR-100 that no run with --train-per-class 250 trains on, as folders for `pretrain
--source folder --root DIR`:

FOLDER/photographs      64 photographs, one of each of the first 64 classes, each a class of its own. So pre-training is
                        what it is with the fractal, naming the image of a crop, but for what is drawn.
FOLDER/others           the other 250 images of each class: ordinary, supervised pre-training.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import onepfrac as op


USED = 250      # images of each class that runs train on: the first ones in the order that all copies of the dataset share


def make(folder, args):
    train, _ = op.open_datasets(args)
    labels, order = op.labels_of(train), op.order_by_pixels(train, args)
    for label in labels.unique().tolist():
        others = order[labels[order] == label][USED:].tolist()
        write(train, others, folder / "others" / f"{label:03d}", args)
        if label < 64:
            write(train, others[:1], folder / "photographs" / f"{label:03d}", args)


def write(dataset, indices, folder, args):
    folder.mkdir(parents=True)
    for k in indices:
        op.read(dataset, k, args).save(folder / f"{k}.png")


if __name__ == "__main__":
    make(Path(sys.argv[1]), op.parse(["finetune", *sys.argv[2:]]))
