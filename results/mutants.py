"""Do the tests see planted faults? Each of MUTANTS puts one fault into onepfrac.py; the tests should
fail. Run in a worktree of its own: python mutants.py [FOLDER]. About 30 x 2 minutes on a core.
"""
import os
import re
import subprocess
import sys
import time
from pathlib import Path

SLOW = "not speed and not faults and not experiments and not test_lines"
STEPS = "torch.rand(BURN_IN + -(-points // K), K, generator=generator)"
LABELS = "labels = torch.arange(args.categories).{}(args.instances)\n    return Data(labels, draw, "
MUTANTS = [  # name, text of onepfrac.py (once in it), text with the fault
    ("sigma_weights", "(s[..., 0] + 2 * s[..., 1]).sum(-1)", "(2 * s[..., 0] + s[..., 1]).sum(-1)"),
    ("no_mirrors", "uniform(-1, 1, 2, num_maps, 2).sign()", "uniform(0, 1, 2, num_maps, 2).sign()"),
    ("points_rounded_down", STEPS, STEPS.replace("-(-points // K)", "points // K")),
    ("raster_floor", ".mul_(scale[..., None]).round_()", ".mul_(scale[..., None]).floor_()"),
    ("texture_by_batch", "for k, image in zip(i.tolist(), images):",
     "for k, image in enumerate(images):"),
    ("half_multiplicative", "base * (1 + 2 * delta * unit)", "base * (1 + delta * unit)"),
    ("labels_cycle", LABELS.format("repeat_interleave"), LABELS.format("repeat")),
    ("drop_path_unscaled", ".bernoulli_(keep) / keep", ".bernoulli_(keep)"),
    ("norm_eps", "self.norm = nn.LayerNorm(dim, eps=1e-6)", "self.norm = nn.LayerNorm(dim)"),
    ("crop_never_last", "* (size - length + 1)).floor()", "* (size - length)).floor()"),
    ("erase_area", "(0.02, 1 / 3), (0.3, 1 / 0.3)", "(0.02, 0.4), (0.3, 1 / 0.3)"),
    ("cutmix_share", "lam = 1 - box[0, 0].numel() / S ** 2", "lam = float(lam)"),
    ("op_never_last", "torch.randint(len(OPS), (B,))", "torch.randint(len(OPS) - 1, (B,))"),
    ("solarize_at", "torch.where(x < 256 - (256 * level", "torch.where(x <= 256 - (256 * level"),
    ("pos_embed_decays", 'name in ("cls_token", "pos_embed")', 'name in ("cls_token",)'),
    ("stays_in_eval", "model.train()\n    return 100 *", "pass\n    return 100 *"),
    ("resume_sums", 'self.sums.copy_(saved["sums"])', "pass"),
    ("resume_seconds", 'int(saved["step"]), float(saved["seconds"])', 'int(saved["step"]), 0.0'),
    ("subset_unseeded", "torch.tensor(keys).argsort()", "torch.randperm(len(keys))"),
    ("paper_warmup", "default=6.25e-5", "default=6.25e-4"),
    ("burn_in_250", "BURN_IN, ORBIT = 500, 500", "BURN_IN, ORBIT = 250, 500"),
    ("a_map_never_occurs", "(u >= ends).sum(-1)", "(u >= ends).sum(-1).clamp(min=1)"),
    ("orbits_share_maps", STEPS, STEPS.replace("K, g", "1, g") + ".expand(-1, K)"),
    ("flip_off_by_one", "start + flip * length", "start + flip * (length - 1)"),
    ("muon_no_decay", "torch._foreach_mul_(matrices, 1 - lr * weight_decay)", "pass"),
    ("muon_no_nesterov", "torch._foreach_lerp(grads, buffers, momentum)", "buffers"),
    ("steps_alike", 'seed_for(args.seed, "step", step, args.rank)',
     'seed_for(args.seed, "step", args.rank)'),
    ("keeps_the_empty", "(share > 0) & (share >= least)", "share > 0"),
    ("log_of_the_lead", "over_ranks(self.sums.clone(), self.args)", "self.sums"),
    ("idle_sigma", '"rcdb": (contour_data, LIEP + MANY', '"rcdb": (contour_data, LIEP + MANY + "sigma "'),
]


def run_tests(folder, select=SLOW, limit=600):
    """-> (the first test that fails, "" if none, None after `limit` seconds), seconds."""
    began, command = time.time(), [sys.executable, "-m", "pytest", "-x", "-q", "-p",
                                   "no:cacheprovider", "-k", select]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit,
                              env=os.environ | dict(OMP_NUM_THREADS="1"))
    except subprocess.TimeoutExpired:
        return None, time.time() - began
    failed = re.findall(r"^(?:FAILED|ERROR) (?:\S+?::)?(.*?)(?: - .*)?$", done.stdout, re.M)
    return "".join(failed[:1]) or "?" * (done.returncode != 0), time.time() - began


def plant(folder, old, new, select=SLOW):
    """Run the tests with one fault in onepfrac.py, and take it out again."""
    file = Path(folder, "onepfrac.py")
    whole = file.read_text()
    assert whole.count(old) == 1, f"{whole.count(old)} times: {old}"
    try:
        file.write_text(whole.replace(old, new))
        return run_tests(folder, select)
    finally:
        file.write_text(whole)


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "."
    assert run_tests(folder)[0] == "", "the tests fail without a fault"
    for name, old, new in MUTANTS:
        failed, seconds = plant(folder, old, new)
        print(f"{name:20} {failed or 'SURVIVED'}  {seconds:.0f} s", flush=True)
