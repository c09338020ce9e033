"""Logistic regression on frozen features: python results/logistic.py --ckpt FILE --probe K [FLAGS of finetune]

The transfer protocol of "Fake it till you make it" (arXiv 2212.08420): features of whole images from the first k
blocks, standardised, and a linear classifier that L-BFGS fits until it has converged. A fifth of the training images
chooses the strength of the regularisation. Prints a line of JSON. Like a run, it has a folder with args.json and
log.jsonl.
"""
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import onepfrac as op

DECAYS = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def fit_logistic(x, labels, classes, decay, weight=None, iterations=200):
    """Multinomial logistic regression by L-BFGS: features x (n, D) -> weight (D, classes).

    Minimises the mean cross-entropy plus decay / 2 times the squared weights, from `weight` on. The last feature is a
    one and its weights, the biases, do not decay.
    """
    weight = x.new_zeros(x.shape[1], classes) if weight is None else weight.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-10,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight, labels) + 0.5 * decay * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def accuracy(weight, x, labels, k=1):
    ranked = (x @ weight).topk(min(k, weight.shape[1])).indices == labels[:, None]
    return 100 * ranked.sum().item() / len(labels)


def logistic_probe(features, data, tests, classes):
    """features: a function of images (B, 3, S, S) or (B, S, S) -> test accuracies and the decay that was chosen."""
    def read(data):                             # in float64, for the line search; not all GPUs have it
        parts = [(features(images).cpu().double(), labels.cpu())
                 for images, labels in map(data.__getitem__, torch.arange(len(data)).split(500))]
        return map(torch.cat, zip(*parts))

    (x, labels), (x_test, labels_test) = read(data), read(tests)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_test = (F.pad((t - mean) / std, (0, 1), value=1.0) for t in (x, x_test))
    fit, check = op.balanced_subset(labels, torch.randperm(len(labels), generator=op.seeded(0)), holdout=0.2)
    if not len(check):
        raise op.InputError("--train-per-class: at least three images of a class are needed, to choose on some")
    best, weight = (-1.0, 0.0), None
    for decay in DECAYS:                        # each starts from the last
        weight = fit_logistic(x[fit], labels[fit], classes, decay, weight)
        best = max(best, (accuracy(weight, x[check], labels[check]), decay))
    weight = fit_logistic(x, labels, classes, best[1])
    return dict(test_top1=accuracy(weight, x_test, labels_test), test_top5=accuracy(weight, x_test, labels_test, 5),
                decay=best[1])


def main(argv):
    args = op.parse(["finetune", *argv])
    args.command, began = "logistic", time.perf_counter()
    with op.open_run(args):
        data, tests, classes = op.downstream_data(args)
        model = op.make_model(args, classes).to(args.device).eval()
        if args.ckpt:
            op.load_weights(model, args.ckpt)
        augment = op.make_augment(args, classes, **op.IMAGENET)

        @torch.no_grad()
        def features(images):                   # as `finetune --probe K` sees them: the mean of the patch tokens
            return model.blocks[:args.probe](model.embed(augment.plain(images)))[:, 1:].mean(1)

        found = logistic_probe(features, data, tests, classes)
        found |= dict(images=len(data), seconds=round(time.perf_counter() - began, 1))
        op.write_json(Path(args.out) / "log.jsonl", found)
    print(json.dumps(dict(probe=args.probe, **found)), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except op.InputError as error:
        sys.exit(f"logistic.py: {error}")
