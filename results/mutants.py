"""Do the tests see planted faults? Each of MUTANTS puts one fault into onepfrac.py; the tests should fail.

    python results/mutants.py [FOLDER] [-k WORDS]       # in a copy of the repository; a fault takes up to 2 minutes
"""
import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

SLOW = "not killed_again and not speed and not faults and not experiments and not test_lines"
STEPS = "torch.rand(BURN_IN + -(-points // K), K, generator=generator)"
MOMENTS = "args.lr, betas=(0.9, 0.999)"
CIRCLE = "own.randint(0, 101) * own.uniform(1, 2, 2)"
MUTANTS = [  # name, text of onepfrac.py (once in it), text with the fault
    ("sigma_weights", "(s[..., 0] + 2 * s[..., 1]).sum(-1)", "(2 * s[..., 0] + s[..., 1]).sum(-1)"),
    ("no_mirrors", "uniform(-1, 1, 2, num_maps, 2).sign()", "uniform(0, 1, 2, num_maps, 2).sign()"),
    ("points_rounded_down", STEPS, STEPS.replace("-(-points // K)", "points // K")),
    ("orbits_share_maps", STEPS, STEPS.replace("K, g", "1, g") + ".expand(-1, K)"),
    ("burn_in_250", "BURN_IN, ORBIT = 500, 500", "BURN_IN, ORBIT = 250, 500"),
    ("a_map_never_occurs", "for end in ends.unbind(-1))", "for end in ends.unbind(-1)).clamp(min=1)"),
    ("raster_floor", "* scale[..., None]).round()", "* scale[..., None]).floor()"),
    ("texture_by_batch", "for k, image in zip(i.tolist(), images):", "for k, image in enumerate(images):"),
    ("half_multiplicative", "base * (1 + 2 * delta * unit)", "base * (1 + delta * unit)"),
    ("eps_of_no_seed", 'seeded(args.seed, "eps")', 'seeded(0, "eps")'),
    ("dots_of_no_seed", 'seeded(args.seed, "maps")', 'seeded(0, "maps")'),
    ("keeps_the_empty", "(share > 0) & (share >= least)", "share > 0"),
    ("least_of_masks", 'least=0.1 if args.texture', 'least=0.05 if args.texture'),
    ("base_sigma", "sigma + 0.2 * (torch.rand(", "sigma + 0.1 * (torch.rand("),
    ("base_fills_less", "generator=seeded(seed))) >= 0.2:", "generator=seeded(seed))) >= 0.18:"),
    ("no_labels_in_crc", ".numpy(), zlib.crc32(labels.cpu().numpy()))", ".numpy())"),
    ("drop_path_unscaled", ".bernoulli_(keep) / keep", ".bernoulli_(keep)"),
    ("no_drop_of_attention", "self.drop(self.attn(self.norm1(x)))", "self.attn(self.norm1(x))"),
    ("contour_fills", "covered(image[None], background) >= 0.2", "covered(image[None], background) >= 0.18"),
    ("norm_eps", "self.norm = nn.LayerNorm(dim, eps=1e-6)", "self.norm = nn.LayerNorm(dim)"),
    ("weights_of_no_seed", 'seed_for(args.seed, "weights")', 'seed_for(0, "weights")'),
    ("weights_wider", "trunc_normal_(module.weight, std=0.02)", "trunc_normal_(module.weight, std=0.03)"),
    ("crop_never_last", "* (size - length + 1)).floor()", "* (size - length)).floor()"),
    ("crop_ratio", "self.ratio = (3 / 4, 4 / 3)", "self.ratio = (2 / 3, 3 / 2)"),
    ("flip_off_by_one", "start + flip * length", "start + flip * (length - 1)"),
    ("error_in_tags", "image.load()  #", "image.verify  #"),
    ("not_upright", "exif_transpose(image, in_place=True)", "exif_transpose(image)"),
    ("flips_of_fractals", "flip=(0.5 * args.flip,) * 2", "flip=(0.5 * args.flip, 0)"),
    ("erase_area", "(0.02, 1 / 3), (0.3, 1 / 0.3)", "(0.02, 0.4), (0.3, 1 / 0.3)"),
    ("erase_one_noise", "torch.randn_like(x), x)", "torch.randn_like(x[:, :1]), x)"),
    ("erase_photographs", "erase=0.25 * args.erase", "erase=0.5 * args.erase"),
    ("cutmix_share", "lam = 1 - box[0, 0].numel() / S ** 2", "lam = float(lam)"),
    ("mixup_alpha", "mixup=0.8 * args.mixup", "mixup=1.0 * args.mixup"),
    ("cutmix_alpha", "cutmix=1.0 * args.cutmix", "cutmix=0.8 * args.cutmix"),
    ("one_alpha", "alpha = self.cutmix if cut else self.mixup", "alpha = self.mixup or self.cutmix"),
    ("smoothing", "self.smoothing / self.num_classes", "self.smoothing / (self.num_classes - 1)"),
    ("steps_alike", 'seed_for(args.seed, "step", step, args.rank)', 'seed_for(args.seed, "step", args.rank)'),
    ("pos_embed_decays", 'name in ("cls_token", "pos_embed")', 'name in ("cls_token",)'),
    ("adamw_betas", "AdamW(groups, " + MOMENTS, "AdamW(groups, " + MOMENTS.replace("999", "95")),
    ("muon_adamw_betas", "Muon(groups, " + MOMENTS, "Muon(groups, " + MOMENTS.replace("999", "95")),
    ("sgd_momentum", "momentum=0.9, nesterov=True", "momentum=0.8, nesterov=True"),
    ("schedule", "math.cos(math.pi * (step - warmup)", "math.cos(math.pi * (step - warmup + 1)"),
    ("never_bf16", 'enabled=args.precision == "bf16"', "enabled=False"),
    ("logits_in_bf16", "return network(x).float()", "return network(x)"),
    ("loss_in_bf16", "loss = lpce_loss(logits, target)", "loss = lpce_loss(logits.bfloat16(), target).float()"),
    ("clip_by_value", "nn.utils.clip_grad_norm_(", "nn.utils.clip_grad_value_("),
    ("stays_in_eval", "model.train()\n    return 100 *", "pass\n    return 100 *"),
    ("one_test_more", "round(args.epochs / args.eval_epochs)", "math.ceil(args.epochs / args.eval_epochs)"),
    ("saves_without_a_line", "if testing or saving or run", "if testing or run"),
    ("jitter_strength", "jitter=0.4 * args.jitter", "jitter=0.3 * args.jitter"),
    ("jitter_one_factor", "torch.rand(3, len(x), 1, 1, 1) - 1)", "torch.rand(3, 1, 1, 1, 1) - 1)"),
    ("op_never_last", "torch.randint(NONE, (B,))", "torch.randint(NONE - 1, (B,))"),
    ("op_probability", "torch.rand(B) < 0.5, torch.randint(NONE", "torch.rand(B) < 0.6, torch.randint(NONE"),
    ("op_spread", "magnitude=9.0, std=0.5", "magnitude=9.0, std=0.4"),
    ("op_one_sign", "level * (torch.randint(2, (B,)) * 2 - 1)", "level"),
    ("ops_not_put_back", "index_copy_(0, order,", "index_copy_(0, torch.arange(len(x), device=x.device),"),
    ("rotate_27", "math.radians(30)", "math.radians(27)"),
    ("solarize_at", "torch.where(x < 256 - (256 * level", "torch.where(x <= 256 - (256 * level"),
    ("a_class_is_a_split", "any(entry.is_dir() and not is_extra(entry.name) for entry in inside)", "train.is_dir()"),
    ("labels_cycle", ".repeat_interleave(args.instances)", ".repeat(args.instances)"),
    ("fractaldb_maps", "torch.randint(2, 8, (50, 1)", "torch.randint(2, 7, (50, 1)"),
    ("fractaldb_numbers", "2 * torch.rand(50, 7, 2, 3, generator=generator) - 1",
     "1.9 * torch.rand(50, 7, 2, 3, generator=generator) - 0.95"),
    ("fractaldb_fills", "covered(images) >= 0.2]", "covered(images) >= 0.18]"),
    ("fractaldb_weights", "(0.2, 0.6, 1.4, 1.8)[n % 4]", "(0.2, 0.6, 1.4, 1.6)[n % 4]"),
    ("fractaldb_flips", "(1, instance // 25 % 2 == 1)", "(1, instance // 25 % 2 == 0)"),
    ("perlin_slopes", "rng.randint(1, 9, (2, *shape))", "rng.randint(1, 8, (2, *shape))"),
    ("perlin_share", "(2, *shape)) < 0.5, -1", "(2, *shape)) < 0.45, -1"),
    ("rcdb_noise", "growth = amplitude + step - 2 * amplitude", "growth = amplitude + step - amplitude"),
    ("rcdb_growth", f"uniform(0, 4), shared.uniform(0, 0.1)\n    radius = {CIRCLE}",
     f"uniform(0, 4), shared.uniform(0, 0.2)\n    radius = {CIRCLE}"),
    ("rcdb_radius", CIRCLE, CIRCLE.replace("101", "91")),
    ("rcdb_corners", "shared.exponential(100)", "shared.exponential(80)"),
    ("rcdb_centre", "own.uniform(56, 456, 2)", "own.uniform(0, 512, 2)"),
    ("va_waves", "shared.choice(21, (2, 1), replace=False)", "shared.choice(21, (2, 1))"),
    ("va_height", "growth += 0.5 * np.sin", "growth += 0.4 * np.sin"),
    ("va_radius", "shared.randint(10, 61)", "shared.randint(20, 61)"),
    ("idle_sigma", '"rcdb": (contour_data, LIEP + MANY', '"rcdb": (contour_data, LIEP + MANY + "sigma "'),
    ("subset_unseeded", "order = order_by_pixels(train, args) if some", "order = torch.randperm(len(labels)) if some"),
    ("pos_embed_aliased", 'mode="bicubic", antialias=True', 'mode="bicubic"'),
    ("pos_embed_bilinear", 'mode="bicubic", antialias=True', 'mode="bilinear", antialias=True'),
    ("other_images", 'self.agree({f"images_', 'self.settings.update({f"images_'),
    ("moments_lost", 'optimizer.load_state_dict(self.saved["optimizer"])', "pass"),
    ("clock_starts_again", 'self.tick - (self.log[-1]["seconds"] if self.log else 0)', "self.tick"),
    ("log_of_the_lead", "over_ranks(self.sums, self.args).tolist()", "self.sums.tolist()"),
    ("stopped_twice", "signals[-1][1] > signals[0][1] + 1", "signals[-1][1] > signals[0][1]"),
    ("muon_no_decay", "p.mul_(1 - lr * weight_decay).sub_(", "p.sub_("),
    ("muon_no_nesterov", "grads.lerp(buffers, momentum)", "buffers"),
    ("muon_momentum", "momentum=0.95, **_", "momentum=0.9, **_"),
    ("muon_scale", "size = 0.2 * max(", "size = 0.2 * min("),
    ("probe_of_zeros", "self.normalise = nn.BatchNorm1d(dim, affine=False, eps=1e-6)",
     "self.normalise = nn.BatchNorm1d(dim, affine=False, eps=1e-6)\n        self.normalise.running_var.zero_()"),
    ("probe_by_batch", "affine=False, eps=1e-6)", "affine=False, eps=1e-6, track_running_stats=False)"),
    ("nano_rate", "optimizer=\"muon\", lr=2e-3, weight_decay=0.05,\n             clip_grad=1.0, randaug",
     "optimizer=\"muon\", lr=2e-3, weight_decay=0.05,\n             clip_grad=0.5, randaug"),
    ("a_thumbnail_decides", "largest = max(min(", "largest = min(min("),
    ("machines_differ", "if total != self.step * args.world_size:", "if total < 0:"),
    ("compiled_by_others", "    torch.compiler.reset()  # what earlier runs of a program left\n", ""),
    ("paper_warmup", "default=6.25e-5", "default=6.25e-4"),
]


def run_tests(folder, select=SLOW, limit=600):
    """-> (the first test that fails, "" if none, None after `limit` seconds), seconds."""
    began, command = time.time(), [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", select]
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
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default=".")
    parser.add_argument("-k", default=SLOW, help="which tests, as pytest's")
    folder, select = vars(parser.parse_args()).values()
    assert run_tests(folder, select)[0] == "", "the tests fail without a fault"
    for name, old, new in MUTANTS:
        failed, seconds = plant(folder, old, new, select)
        print(f"{name:20} {failed or 'SURVIVED'}  {seconds:.0f} s", flush=True)
