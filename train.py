"""Train an image classifier with or without sharpness-aware minimisation, on one device or many machines.

The training of Chen et al. 2021 (arXiv 2106.01548; Tables 8 and 9, Appendix E): RECIPES holds the rows of the
papers' tables, every entry is also a flag, and a flag overrides its recipe.

    python train.py                                        built-in data, small ViT, SAM; 2 CPU cores: 3 minutes
    python train.py --sam-rho 0                            the same without SAM
    torchrun --nproc_per_node=8 train.py --model vit_b16 --sam-rho 0.2        the paper's run, one machine
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py ...  four

A run is the same run on any number of devices: its unit is the micro-batch (`--micro-batch`, the paper's 32
images of one TPU core), which has its own ε, its own dropout masks and its own BatchNorm statistics.

Differs from the paper: β₂ is 0.999 (Table 8 prints 0.009); the sigmoid loss starts from head biases of -6.9 and
weight decay leaves out biases, norms, class token and positions, as in the authors' public code (the paper
says neither). Weight decay of SGD is torch's: an L2 term of the last gradient, outside ε.
"""
import argparse
import copy
import difflib
import fcntl
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

import data
import vit
from sam import SAM

RECIPES = {
    # This repository's own: a minute's training that shows the effect of SAM on a laptop.
    "shapes": dict(
        dataset="shapes", model="vit_micro8", epochs=12, batch_size=64, micro_batch=32, optimizer="adamw", lr=2e-3,
        warmup_steps=125, lr_schedule="cosine", weight_decay=0.1, sam_rho=0.1),
    # Chen et al. Table 8, column ViT; loss: B.1; 4096 = 128 cores × 32 images, ε of each core its own: E.
    "chen_vit": dict(
        dataset="imagenet", model="vit_b16", image_size=224, augment="inception", epochs=300, batch_size=4096,
        micro_batch=32, optimizer="adamw", lr=3e-3, beta1=0.9, beta2=0.999, warmup_steps=10_000,
        lr_schedule="cosine", weight_decay=0.3, decay="kernels", dropout=0.1, grad_clip=1.0, loss="sigmoid",
        head_bias=-6.9),
}

# Chen et al. Table 9, supervised rows: what --sam-rho paper stands for.
PAPER_RHO = {"vit_s32": 0.05, "vit_s16": 0.1, "vit_s14": 0.1, "vit_s8": 0.15, "vit_b32": 0.15, "vit_b16": 0.2}

DEFAULT_MODEL = {"shapes": "vit_micro8", "cifar10": "vit_ti4", "cifar100": "vit_ti4", "imagenet": "vit_s16",
                 "folder": "vit_s16"}
MODEL_KNOBS = ("patch_size", "dim", "depth", "heads", "mlp_dim", "pool", "stem", "kernel_size", "qkv_bias", "gelu",
               "dropout", "drop_path", "head_bias")
# What may differ between a run and its continuation: where and how it computes, not what.
FREE_ON_RESUME = {"data_dir", "download", "workers", "device", "compile", "out_dir", "resume", "dry_run", "eval_only",
                  "max_steps", "save_every", "eval_split"}


class UserError(Exception):
    """What only the user can set right; its text is one line."""


# ------------------------------------------------------------------------------------------------------- settings

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line instead of all flags; a flag that does not exist gets the nearest ones that do."""
        wrong = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized") and wrong:
            near = difflib.get_close_matches(wrong[0].replace("_", "-"), self._option_string_actions, 2, 0.7)
            message = f"unknown flag {wrong[0]}" + (f"; did you mean {' or '.join(near)}?" if near else "; see --help")
        raise UserError(message)


def make_parser():
    parser = Parser(allow_abbrev=False, description=__doc__.split("\n\n")[0], epilog=(
        "Without --model, --recipe, --dataset and --data-dir the built-in data set is trained. 0 means off."))
    on_off = argparse.BooleanOptionalAction

    g = parser.add_argument_group("what is trained")
    g.add_argument("--recipe", choices=RECIPES, help="row of a paper's table; default: the row that fits model and "
                                                     "data set, if there is one")
    g.add_argument("--model", help="vit_{micro,ti,s,b,l}PATCH, vit_{p,c}_{1,4,18,36}gf, pit_ti, torchvision:NAME, "
                                   "timm:NAME (Chen Table 7, Xiao Table 1)")
    g.add_argument("--init-from", default="", metavar="FILE", help="start from these weights: a checkpoint of ours, a "
                   "timm or torchvision state dict, an original .npz; another number of classes starts a new head")
    g.add_argument("--weights", choices=("ema", "model"), default="ema", help="of a checkpoint with both: the average "
                                                                             "or the last weights")
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", choices=data.DATASETS, help="folder: any folder with train/ and val/ of class folders")
    g.add_argument("--data-dir", default="", help="default: $IMAGENET_DIR, else data/imagenet; for CIFAR data")
    g.add_argument("--download", action=on_off, default=False, help="fetch CIFAR if it is missing")
    g.add_argument("--image-size", type=int, default=0, help="0: 32 for shapes and CIFAR, else 224 (Table 8)")
    g.add_argument("--augment", choices=data.AUGMENTATIONS, help="default: inception for folders (Table 8), crop for "
                                                                 "CIFAR, none for shapes")
    g.add_argument("--train-fraction", default="1", help="class-balanced part of the training set, as 1/10 or 0.1 (§5.1)")
    g.add_argument("--mixup", type=float, default=0.0, help="α of Beta(α, α); partners within the micro-batch (E.3: 0.5)")
    g.add_argument("--mean", type=float, nargs="+", default=[0.5], help="of the pixels in [0, 1], one number or three")
    g.add_argument("--std", type=float, nargs="+", default=[0.5], help="likewise")

    g = parser.add_argument_group("network (default: what the model's name says)")
    g.add_argument("--patch-size", type=int, help="side of a patch in pixels")
    g.add_argument("--dim", type=int, help="width of the residual stream")
    g.add_argument("--depth", type=int, help="blocks")
    g.add_argument("--heads", type=int, help="attention heads")
    g.add_argument("--mlp-dim", type=int, help="hidden width of the MLP")
    g.add_argument("--pool", choices=("cls", "gap"), help="class token or global average pooling")
    g.add_argument("--stem", choices=("patchify", "conv"), help="conv: Xiao et al. §3")
    g.add_argument("--kernel-size", type=int, help="k: convolutional self-attention over k×k tokens (Park Fig. 7)")
    g.add_argument("--qkv-bias", action=on_off, help="bias of queries, keys and values")
    g.add_argument("--gelu", choices=("exact", "tanh"), help="form of the GELU")
    g.add_argument("--dropout", type=float, help="rate (Table 8: 0.1)")
    g.add_argument("--drop-path", type=float, help="stochastic depth, rate of the last block (E.3: 0.1)")
    g.add_argument("--head-bias", type=float, help="initial bias of the classifier, for the sigmoid loss")

    g = parser.add_argument_group("optimization")
    g.add_argument("--epochs", type=int, default=100, help="length of the schedule (Table 8: 300); 0: --max-steps")
    g.add_argument("--max-steps", type=int, default=0, help="stop after so many steps; with --epochs 0 also the "
                                                            "schedule's length (Table 11)")
    g.add_argument("--batch-size", type=int, default=256, help="images per step over all devices (Table 8: 4096)")
    g.add_argument("--micro-batch", type=int, default=32, help="images in one forward pass, the m of SAM (Appendix E: 32)")
    g.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="(Table 8)")
    g.add_argument("--lr", type=float, default=1e-3, help="peak learning rate for the whole batch (Table 8: 3e-3)")
    g.add_argument("--lr-schedule", choices=("cosine", "linear", "constant"), default="cosine", help="(Table 8)")
    g.add_argument("--warmup-steps", type=int, default=0, help="linear from 0 (Table 8: 10000)")
    g.add_argument("--lr-end", type=float, default=0.0, help="learning rate at the end of the decay")
    g.add_argument("--momentum", type=float, default=0.9, help="of SGD (Table 8)")
    g.add_argument("--nesterov", action=on_off, default=False, help="for SGD")
    g.add_argument("--beta1", type=float, default=0.9, help="of AdamW (Table 8)")
    g.add_argument("--beta2", type=float, default=0.999, help="of AdamW (Table 8, misprinted there)")
    g.add_argument("--weight-decay", type=float, default=0.1, help="AdamW: decoupled, times the learning rate (Table 8: "
                                                                   "0.3); SGD: L2")
    g.add_argument("--decay", choices=("kernels", "no-norm-bias", "all"), default="kernels", help="what decays: matrices "
                   "and convolutions; also class token and positions (Xiao §5.4); everything")
    g.add_argument("--grad-clip", type=float, default=0.0, help="global norm of the final gradient (Table 8: 1)")
    g.add_argument("--loss", choices=("softmax", "sigmoid"), default="softmax", help="cross-entropy (B.1: sigmoid)")
    g.add_argument("--label-smoothing", type=float, default=0.0, help="share of the uniform distribution")
    g.add_argument("--ema-decay", type=float, default=0.0, help="average of the weights, per step; from 0.1 in the first "
                   "steps up to this: min(decay, (1+t)/(10+t))")
    g.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and masks")

    g = parser.add_argument_group("sharpness-aware minimisation")
    g.add_argument("--sam-rho", default="0", help="radius ρ, or paper: Table 9's for the model; 0: plain training")
    g.add_argument("--sam-steps", type=int, default=1, help="ascent steps (§6)")
    g.add_argument("--sam-adaptive", action=on_off, default=False, help="ASAM, element-wise")
    g.add_argument("--sam-sync", action=on_off, default=False, help="ε from the whole batch's gradient instead of each "
                                                                    "micro-batch's")
    g = parser.add_argument_group("machine")
    g.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the first of these that is there")
    g.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "float64"), help="default: bfloat16 (autocast) on "
                   "CUDA, float32 elsewhere; float16 uses a loss scaler")
    g.add_argument("--compile", action=on_off, help="torch.compile; default: on CUDA")
    g.add_argument("--workers", type=int, help="data processes per device; default: up to 8, none for data in memory")

    g = parser.add_argument_group("run")
    g.add_argument("--out-dir", default="", help="run folder; default: out/DATASET-MODEL-rhoRHO-seedSEED")
    g.add_argument("--resume", action=on_off, default=False, help="go on from the run folder's ckpt.pt, or start there")
    g.add_argument("--eval-every", type=int, default=1, help="epochs between evaluations; the last is always evaluated")
    g.add_argument("--eval-only", action=on_off, default=False, help="evaluate --init-from and stop")
    g.add_argument("--eval-split", choices=("val", "test"), default="val", help="test: of shapes, untouched otherwise")
    g.add_argument("--log-every", type=int, default=50, help="steps between records of log.jsonl")
    g.add_argument("--save-every", type=int, default=0, help="steps between checkpoints besides those of each epoch")
    g.add_argument("--dry-run", action=on_off, default=False, help="print what would happen and stop before the first step")
    return parser


def settings(argv=None):
    """Command line -> (settings, {name: who set it}). Flags override the recipe, a recipe the defaults; for
    --eval-only of a checkpoint of ours, that run's settings take the recipe's place."""
    parser = make_parser()
    args = vars(parser.parse_args([]))
    unset = object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(args, unset))))
    given = {name: value for name, value in given.items() if value is not unset}
    origin = dict.fromkeys(args, "default")

    base, name = {}, given.get("recipe")
    if given.get("eval_only") and given.get("init_from", "").endswith(".pt"):
        saved = read_checkpoint(given["init_from"]).get("settings", {})
        base, name = {k: v for k, v in saved.items() if k in args and k not in FREE_ON_RESUME}, given["init_from"]
    elif name is None:
        free = not {"model", "dataset", "data_dir"} & given.keys()
        dataset = given.get("dataset", "shapes" if free else "imagenet")
        model = given.get("model", DEFAULT_MODEL[dataset])
        base = dict(dataset=dataset, model=model)
        for recipe, row in RECIPES.items():
            if row["dataset"] == dataset and family(row["model"]) == family(model):
                name, base = recipe, {**row, **base}
    else:
        base = RECIPES[name]
    unknown = base.keys() - args.keys()
    if unknown:
        raise UserError(f"{name} sets {' '.join(sorted(unknown))}, which are no flags of train.py")
    args.update(base)
    origin.update(dict.fromkeys(base, name or "data set"))
    args.update(given)
    origin.update(dict.fromkeys(given, "command line"))
    args = argparse.Namespace(**args)
    args.recipe = name or "none"

    small = args.dataset in ("shapes", "cifar10", "cifar100")
    args.image_size = args.image_size or (32 if small else 224)
    args.augment = args.augment or {"shapes": "none", "cifar10": "crop", "cifar100": "crop"}.get(args.dataset, "inception")
    args.data_dir = args.data_dir or (os.environ.get("IMAGENET_DIR") or "data/imagenet" if not small else "data")
    args.sam_rho = resolve_rho(args.sam_rho, args.model)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else
                                  "mps" if torch.backends.mps.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    args.out_dir = args.out_dir or f"out/{args.dataset}-{args.model.replace(':', '_')}-rho{args.sam_rho:g}-seed{args.seed}"
    check(args)
    return args, origin


def resolve_rho(rho, model):
    if rho == "paper":
        if model not in PAPER_RHO:
            raise UserError(f"--sam-rho paper: Table 9 has no row for {model}; it has {' '.join(PAPER_RHO)}. "
                            "Give a number, such as 0.1")
        return PAPER_RHO[model]
    try:
        return float(rho)
    except ValueError:
        raise UserError(f"--sam-rho {rho}: give a number, at least 0, or the word paper") from None


def check(args):
    """Settings that cannot be right stop here, in one line each."""
    at_least = dict(epochs=0, max_steps=0, batch_size=1, micro_batch=1, warmup_steps=0, eval_every=1, log_every=1,
                    save_every=0, sam_rho=0, sam_steps=1, lr=0, weight_decay=0, grad_clip=0, mixup=0, image_size=1)
    for name, low in at_least.items():
        if not low <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {low}")
    for name in ("label_smoothing", "ema_decay", "momentum", "beta1", "beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 0 and below 1")
    for name in ("mean", "std"):
        if len(getattr(args, name)) not in (1, 3) or name == "std" and min(args.std) <= 0:
            raise UserError(f"--{name} is {getattr(args, name)}; give one number or three{', above 0' * (name == 'std')}")
    if args.epochs == 0 and args.max_steps == 0 and not args.eval_only:
        raise UserError("--epochs 0 needs --max-steps: the length of the run in steps")
    if args.eval_only and not args.init_from:
        raise UserError("--eval-only needs --init-from: the weights to evaluate, for instance RUN/best.pt")
    if args.optimizer == "adamw" and args.nesterov:
        raise UserError("--nesterov is for --optimizer sgd")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; leave the flag away or say --device cpu")
    if args.dtype == "float16" and args.device != "cuda":
        raise UserError("--dtype float16 is for --device cuda; elsewhere use bfloat16 or float32")


# --------------------------------------------------------------------------------------------------------- models

def family(name):
    """The file that builds a model of this name: vit, torchvision, timm."""
    return "vit" if name.startswith("pit_") else name.split(":")[0].split("_")[0]


def build_model(name, num_classes=1000, image_size=224, **overrides):
    """The bare network of a --model value; its state dict has the published keys. Overrides are constructor
    arguments. Raises ValueError for an unknown name or argument."""
    family_name = family(name)
    if family_name == "vit":
        return vit.build(name, num_classes=num_classes, image_size=image_size, **overrides)
    if family_name == "torchvision":
        source = name.partition(":")[2]
        if source not in torchvision.models.list_models(torchvision.models):
            near = difflib.get_close_matches(source, torchvision.models.list_models(torchvision.models))
            raise ValueError(f"torchvision has no model {source!r}" + (f"; near: {' '.join(near)}" if near else ""))
        return torchvision.models.get_model(source, weights=None, num_classes=num_classes, **overrides)
    if family_name == "timm":
        try:
            import timm
        except ImportError:
            raise ValueError(f"{name}: timm is not installed (pip install timm)") from None
        return timm.create_model(name.partition(":")[2], num_classes=num_classes, **overrides)
    raise ValueError(f"unknown model {name!r}; known: vit_{{micro,ti,s,b,l}}PATCH, vit_{{p,c}}_{{1,4,18,36}}gf, pit_ti, "
                     "torchvision:NAME, timm:NAME")


class Normalised(nn.Module):
    """A network behind its normalisation: input (B, 3, H, W) float in [0, 1]."""

    def __init__(self, network, mean, std):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x, *args, **kwargs):
        return self.network((x - self.mean) / self.std, *args, **kwargs)


def assemble(network, mean, std):
    """What is trained, attacked and analysed: `network` behind (x - mean) / std. mean, std: 1 or 3 numbers, for
    pixels in [0, 1]."""
    return Normalised(network, mean, std)


# --------------------------------------------------------------------------------------------- losses, schedules

def softmax_loss(logits, y, smoothing=0.0):
    """Cross-entropy, mean over the batch. y: (B,) classes or (B, K) probabilities."""
    return F.cross_entropy(logits, y, label_smoothing=smoothing)


def sigmoid_loss(logits, y, smoothing=0.0):
    """One binary cross-entropy for each class, summed over classes, mean over the batch (Chen et al. B.1)."""
    target = y if y.is_floating_point() else F.one_hot(y, logits.shape[1])
    target = target.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[1]
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(logits)


def learning_rate(step, total, warmup, peak, schedule, end=0.0):
    """At `step` of 0 … total: linear from 0 to `peak` over `warmup` steps, times a decay from there to `total`:
    half a cosine or a line from `peak` to `end`, or none. A pure function, so nothing of it is in a checkpoint."""
    progress = min(max(step - warmup, 0) / max(total - warmup, 1), 1.0)
    decayed = {"cosine": end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress)),
               "linear": peak + (end - peak) * progress,
               "constant": peak}[schedule]
    return decayed * min(1.0, step / warmup if warmup else 1.0)


def decay_groups(network, decay):
    """Parameters that decay and those that do not. decay: "kernels" (matrices and convolutions: the authors'
    code), "no-norm-bias" (also class token and positions: Xiao et al. §5.4), "all"."""
    decayed, kept = [], []
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    of_norms = {id(p) for m in network.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)}
    for name, p in network.named_parameters():
        kernel = name.endswith("weight") and p.ndim > 1
        keep = (id(p) in of_norms or name.endswith("bias")) if decay == "no-norm-bias" else not kernel
        (kept if keep and decay != "all" else decayed).append(p)
    return decayed, kept


class RunningStatistics:
    """BatchNorm's running mean and variance when a step is made of many micro-batches: each starts from the same
    values, and the step's result is the mean over all of them, wherever they ran. Otherwise they would depend on
    how many devices share the step."""

    def __init__(self, network):
        norms = [m for m in network.modules()
                 if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
        self.buffers = [b for m in norms for b in (m.running_mean, m.running_var)]
        self.counters = [m.num_batches_tracked for m in norms]
        self.count = [c.clone() for c in self.counters]
        self.start, self.sum = ([torch.zeros_like(b) for b in self.buffers] for _ in range(2))

    def begin_step(self):
        if self.buffers:
            torch._foreach_copy_(self.start, self.buffers)
            torch._foreach_zero_(self.sum)
            torch._foreach_copy_(self.count, self.counters)
            torch._foreach_add_(self.count, 1)  # a step counts as one batch

    def begin_pass(self):
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.start)

    def end_pass(self):
        """To be called after the first pass of a micro-batch only: SAM's others, at w + ε, do not count."""
        if self.buffers:
            torch._foreach_add_(self.sum, self.buffers)

    def end_step(self, micro_batches):
        if self.buffers:
            flat = torch.cat([s.flatten() for s in self.sum])
            if dist.is_initialized():
                dist.all_reduce(flat)
            flat /= micro_batches
            mean = [f.view_as(b) for f, b in zip(flat.split([b.numel() for b in self.buffers]), self.buffers)]
            torch._foreach_copy_(self.buffers, mean)
            torch._foreach_copy_(self.counters, self.count)


@torch.no_grad()
def evaluate(model, loader, device, autocast=nullcontext(), bins=10, progress=None):
    """Accuracy and calibration over a loader, every image counted once over all processes.

    -> dict: images; top1, top5 in percent; nll, mean cross-entropy in nats; ece, expected calibration error in
    percent: Σ over `bins` equal bins (lo, hi] of the top probability of |accuracy - confidence|, weighted by the
    bin's share (Guo et al. 2017; 10 bins as Park & Kim).
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    by_bin = torch.zeros(2, bins, dtype=torch.float64, device=sums.device)  # Σ correct, Σ confidence
    for x, y in data.batches(loader, tell=say):
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with autocast:
            logits = model(to_float(x, model))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
        confidence = logits.softmax(1).amax(1).to(sums)
        sums += torch.stack([torch.ones_like(y).sum(), top[:, 0].sum(), top.sum(),
                             F.cross_entropy(logits, y, reduction="sum")]).to(sums)
        index = (torch.ceil(confidence * bins) - 1).clamp(0, bins - 1).long()
        by_bin[0].index_add_(0, index, top[:, 0].to(by_bin))
        by_bin[1].index_add_(0, index, confidence)
        if progress is not None:
            progress.update()
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(by_bin)
    n, top1, top5, nll = sums.tolist()
    return dict(images=round(n), top1=100 * top1 / n, top5=100 * top5 / n, nll=nll / n,
                ece=100 * (by_bin[0] - by_bin[1]).abs().sum().item() / n)


def to_float(x, model):
    """uint8 -> [0, 1] in the model's own floating type."""
    return x.to(next(model.parameters()).dtype).div_(255)


# ------------------------------------------------------------------------------- processes, messages, checkpoints

def rank():
    return int(os.environ.get("RANK", 0))


def say(text=""):
    """One line on standard output, above the progress bar if there is one."""
    tqdm.write(text)


def on_main(function):
    """Result of `function` of the first process, on every process; its UserError likewise."""
    box = [None, None]
    if rank() == 0:
        try:
            box[0] = function()
        except UserError as error:
            box[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


class StopSignal:
    """SIGTERM and Ctrl-C, agreed between processes: all stop before the same step, whenever each was told.

    The processes' flags are combined by an all-reduce on the CPU that runs beside the step, so the answer is one
    step late and nothing waits. A second Ctrl-C ends the process at once."""
    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.flag, self.work = torch.zeros(1, dtype=torch.int32), None
        self.received = 0
        for number in self.SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """Number of the signal that some process has received, or 0; the same on every process."""
        if not dist.is_initialized():
            return self.received
        if self.work is not None:
            self.work.wait()
            if self.flag.item():
                return self.flag.item()
        self.flag.fill_(self.received)
        self.work = dist.all_reduce(self.flag, op=dist.ReduceOp.MAX, async_op=True)
        return 0

    def close(self):
        if self.work is not None:
            self.work.wait()


def read_checkpoint(path):
    """A file of torch.save as plain data (weights_only: nothing in it is run). UserError in one line otherwise."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # unpickling foreign bytes can raise anything; none of it is of use to a reader
        raise UserError(f"{path} is no checkpoint of plain tensors, or is damaged ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}; expected a checkpoint or a state dict")
    return state


def write_file(path, write):
    """The file is whole or as it was before: temporary name, flush to disk, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_weights(network, path, weights="ema", new_head=False):
    """Fills a bare network from a checkpoint of ours ("model" or its average "ema"), a timm or torchvision state
    dict, or an original .npz. Positions of another resolution are resized; with new_head a classifier of another
    number of classes stays as initialised; both say so. Returns (mean, std) where the file's kind tells them, else
    None. UserError where anything else does not fit."""
    if str(path).endswith(".npz"):
        try:
            try:
                vit.load_npz(network, path)
            except ValueError as error:
                if not new_head:
                    raise
                vit.load_npz(network, path, head=False)
                say(f"{error}: the head starts anew")
        except (ValueError, OSError) as error:
            raise UserError(f"--init-from {path}: {error}") from None
        return [0.5], [0.5]
    state = read_checkpoint(path)
    normalisation = None
    if "settings" in state:
        normalisation = state["settings"]["mean"], state["settings"]["std"]
        state = state.get("ema") if weights == "ema" and state.get("ema") else state["model"]
    else:
        state = next((state[k] for k in ("model", "state_dict") if isinstance(state.get(k), dict)), state)
    own = network.state_dict()
    state = dict(state)
    for name in [n for n in own if n in state and state[n].shape != own[n].shape]:
        if name == "pos_embed":
            state[name] = vit.resize_pos_embed(state[name], network.grid, network.prefix_tokens)
            say(f"{path}: positions resized to {network.grid[0]}×{network.grid[1]}")
        elif new_head and name.split(".")[0] in ("head", "fc", "classifier"):
            say(f"{path}: {name} is {tuple(state[name].shape)}, {tuple(own[name].shape)} is needed: starts anew")
            state[name] = own[name]
        else:
            raise UserError(f"{path}: {name} is {tuple(state[name].shape)}; this network's is {tuple(own[name].shape)}")
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        odd = "; ".join(f"{what}: {' '.join(names[:3])}{' …' * (len(names) > 3)}"
                        for what, names in (("missing", missing), ("not of this network", extra)) if names)
        raise UserError(f"{path} is of another network ({odd})")
    network.load_state_dict(state)
    return normalisation


class RunFolder:
    """ckpt.pt, best.pt, log.jsonl and config.json of one run. One process writes; the log is locked meanwhile."""

    def __init__(self, path, config, resume):
        """Opens or makes the folder; `self.state` is the checkpoint to go on from, or None. UserError if it holds
        a run and resume is off, if its settings differ, or if another process is writing."""
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.log_file = open(self.path / "log.jsonl", "a+b")
            fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is being written by another process; choose another --out-dir") from None
        except OSError as error:
            raise UserError(f"--out-dir {path}: {error.strerror}") from None
        ckpt, saved = self.path / "ckpt.pt", self.path / "config.json"
        self.state = None
        if saved.exists() or ckpt.exists():
            if not resume:
                raise UserError(f"{path} holds a run already: add --resume to go on with it, or choose another --out-dir")
            self.compare(json.loads(saved.read_text())["settings"], config["settings"])
        if ckpt.exists():
            self.state = read_checkpoint(ckpt)
        self.cut_log(self.state["step"] if self.state else -1)
        write_file(saved, lambda file: file.write(json.dumps(config, indent=1, ensure_ascii=False).encode()))

    def compare(self, then, now):
        free = FREE_ON_RESUME - ({"max_steps"} if now["epochs"] == 0 else set())
        differ = [f"{k} {then.get(k)!r} → {v!r}" for k, v in now.items() if k not in free and then.get(k) != v]
        if differ:
            raise UserError(f"{self.path} was run with other settings ({', '.join(differ)}): give the same ones to "
                            "resume, or choose another --out-dir")

    def cut_log(self, step):
        """Leaves the records up to `step`: what came after it in a run that was killed will come again."""
        self.log_file.seek(0)
        end = 0
        for line in self.log_file:
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):  # half a line: the run was killed while writing it
                break
            end += len(line)
        self.log_file.truncate(end)

    def log(self, **record):
        self.log_file.write((json.dumps(record) + "\n").encode())
        self.log_file.flush()

    def save(self, name, state):
        write_file(self.path / name, partial(torch.save, state))


# ----------------------------------------------------------------------------------------------------- the run

def run(args, origin):
    # ---- processes and device
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if args.device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} CUDA devices, fewer than processes: start "
                            f"torchrun with --nproc_per_node={torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device(args.device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # gloo beside NCCL: what the host agrees on, such as when to stop, does not wait for the device
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    main_process = rank() == 0
    tell = say if main_process else lambda text="": None
    share = args.micro_batch * world
    if args.batch_size % share and not args.eval_only:
        near = max(args.batch_size // share, 1) * share
        fits = [m for m in range(1, args.micro_batch) if args.batch_size % (m * world) == 0]
        raise UserError(f"batch size {args.batch_size} is not a multiple of micro-batch {args.micro_batch} × {world} "
                        f"devices = {share}: use --batch-size {near}" + (f" or --micro-batch {fits[-1]}" if fits else ""))
    changed = [(k, v) for k, v in vars(args).items() if origin[k] != "default"]
    tell(f"recipe    {args.recipe}")
    for name, value in changed:
        tell(f"  {name.replace('_', '-'):<16} {str(value):<14} ({origin[name]})")

    # ---- data
    def load(split, augment, classes=None):
        return data.load(args.dataset, split, data_dir=args.data_dir, image_size=args.image_size, augment=augment,
                         seed=args.seed, download=args.download, classes=classes)
    try:
        if args.download:
            on_main(lambda: load("train", "none") and None)
        train_set = load("train", args.augment)
        val_set = load(args.eval_split if args.eval_only else "val", "none", train_set.classes)
        total_images = len(train_set)
        train_set.restrict(data.subset(train_set.labels, args.train_fraction))
    except data.DataError as error:
        hint = "; --dataset shapes needs no files" if args.dataset != "shapes" else ""
        raise UserError(f"{error}{hint}") from None
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--train-fraction {args.train_fraction}: {error}") from None
    for notice in filter(None, (getattr(s, "notice", None) for s in (train_set, val_set))):
        tell(notice)
    # Accuracy on the training set is measured on a class-balanced sample of the validation set's size.
    train_sample = copy.copy(train_set)
    train_sample.transform = val_set.transform
    labels = train_set.labels[train_set.indices]
    train_sample.restrict(data.subset(labels, min(1.0, len(val_set) / len(labels))))
    num_classes = len(train_set.classes)
    in_memory = isinstance(train_set, data.InMemory) and train_set.transform is None
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = args.workers if args.workers is not None else 0 if in_memory else max(1, min(8, cores))

    # ---- model
    torch.manual_seed(args.seed)
    knobs = {k: getattr(args, k) for k in MODEL_KNOBS if getattr(args, k) is not None}
    try:
        network = build_model(args.model, num_classes, args.image_size, **knobs)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    if args.init_from:
        normalisation = on_main(lambda: load_weights(network, args.init_from, args.weights, not args.eval_only))
        by_user = origin["mean"] != "default" and origin["std"] != "default"
        if normalisation is None and not by_user:
            raise UserError(f"{args.init_from} does not say how its inputs were normalised: give --mean and --std "
                            "(torchvision: 0.485 0.456 0.406 and 0.229 0.224 0.225)")
        args.mean, args.std = (args.mean, args.std) if by_user else normalisation
    network.to(device, torch.float64 if args.dtype == "float64" else torch.float32)
    if dist.is_initialized():  # the file of --init-from need be on the first machine only
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, src=0)
    reduced = getattr(torch, args.dtype) if args.dtype in ("bfloat16", "float16") else None
    autocast = torch.autocast(device.type, reduced) if reduced else nullcontext()

    bare = assemble(network, args.mean, args.std).to(device, next(network.parameters()).dtype)
    def measure(what, dataset):
        loader = data.evaluation_loader(dataset, 256, workers, rank(), world)
        with tqdm(total=len(loader), desc=what, leave=False, disable=not (main_process and sys.stderr.isatty())) as bar:
            return evaluate(bare if ema is None else ema_bare, loader, device, autocast, progress=bar)

    if args.eval_only:
        ema = None
        tell(f"{args.model} from {args.init_from} on {args.dataset} {args.eval_split}")
        print_table(tell, {args.eval_split: measure("evaluation", val_set)})
        return 0

    # ---- optimization
    steps_per_epoch = len(train_set) // args.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"the training set has {len(train_set):,} images, fewer than one batch of {args.batch_size:,}: "
                        f"use --batch-size {len(train_set) // share * share or share}")
    total_steps = args.epochs * steps_per_epoch or args.max_steps
    last_step = min(args.max_steps or total_steps, total_steps)
    micro_batches = args.batch_size // args.micro_batch
    own_micros = range(rank() * micro_batches // world, (rank() + 1) * micro_batches // world)

    model = torch.compile(bare) if args.compile else bare
    if dist.is_initialized():
        model = DistributedDataParallel(model, device_ids=[local] if device.type == "cuda" else None,
                                        broadcast_buffers=False, gradient_as_bucket_view=True)
    params = [p for p in network.parameters() if p.requires_grad]
    groups = [dict(params=ps, weight_decay=decay)
              for ps, decay in zip(decay_groups(network, args.decay), (args.weight_decay, 0.0)) if ps]
    fused = device.type in ("cpu", "cuda")
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=fused)
    else:
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, nesterov=args.nesterov, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
    sam = SAM(model, args.sam_rho, steps=args.sam_steps, adaptive=args.sam_adaptive) if args.sam_rho else None
    criterion = partial({"softmax": softmax_loss, "sigmoid": sigmoid_loss}[args.loss], smoothing=args.label_smoothing)
    mix = v2.MixUp(alpha=args.mixup, num_classes=num_classes) if args.mixup else lambda x, y: (x, y)
    statistics = RunningStatistics(network)
    ema = copy.deepcopy(network).requires_grad_(False) if args.ema_decay else None
    ema_bare = assemble(ema, args.mean, args.std).to(device, next(network.parameters()).dtype) if ema else None

    # ---- what will happen
    sizes = " and ".join(f"{len(s):,} {what}" for s, what in ((train_set, "training"), (val_set, "validation")))
    tell(f"data      {args.dataset}: {sizes} images of {num_classes:,} classes" + (
        f" (a fraction {args.train_fraction} of {total_images:,})" if len(train_set) < total_images else "")
        + f", {args.image_size}×{args.image_size}, augmentation {args.augment}, {workers} workers per device")
    if args.dataset == "imagenet" and num_classes != 1000:
        tell(f"          {num_classes} classes, where ImageNet-1k has 1,000")
    tell(f"model     {args.model}: {sum(p.numel() for p in params):,} parameters, {args.loss} loss")
    tell(f"device    {world} × {device.type}, {args.dtype}{', compiled' if args.compile else ''}")
    tell(f"step      {args.batch_size:,} images = {world} devices × {micro_batches // world} micro-batches × "
         f"{args.micro_batch} images" + (f"; SAM ρ = {args.sam_rho:g} on "
         f"{'the whole batch' if args.sam_sync else 'each micro-batch'}" if sam else "; plain, without SAM"))
    tell(f"schedule  {last_step:,} steps" + (f" of {total_steps:,}" if last_step < total_steps else "")
         + f", {steps_per_epoch:,} per epoch; {args.optimizer}, learning rate {args.lr:g} after {args.warmup_steps:,} "
         f"steps, then {args.lr_schedule}")
    if args.dry_run:
        tell(f"run       {args.out_dir} (dry run: nothing is written)")
        return 0

    # ---- run folder, resume
    folder = None

    def open_folder():
        nonlocal folder
        config = dict(settings=vars(args), command=sys.argv, versions=dict(
            torch=torch.__version__, torchvision=torchvision.__version__, python=sys.version.split()[0]))
        folder = RunFolder(args.out_dir, json.loads(json.dumps(config)), args.resume)
        return folder.state

    state = on_main(open_folder)
    step, best, result = 0, -1.0, None
    # Sums over the log interval: clean loss, gradient norm, skipped steps, steps. On the device: no wait per step.
    window = torch.zeros(4, device=device)
    if state is not None and state["step"] >= last_step and "final" in state:
        tell(f"{args.out_dir} is finished")
        print_table(tell, state["final"])
        return 0
    if state is not None:
        network.load_state_dict(state["model"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best, windows = state["step"], state["best"], state["windows"]
        window.copy_(windows[rank()] if len(windows) == world else windows.mean(0))
        tell(f"resumed   {args.out_dir}/ckpt.pt at step {step:,}")
    tell(f"run       {args.out_dir}")

    def all_windows():  # (processes, 4)
        windows = [torch.zeros_like(window) for _ in range(world)]
        dist.all_gather(windows, window) if dist.is_initialized() else windows[0].copy_(window)
        return torch.stack(windows).cpu()

    def checkpoint(name, **more):
        if main_process:
            folder.save(name, dict(
                model=network.state_dict(), ema=ema.state_dict() if ema is not None else None, step=step,
                settings=vars(args), classes=list(train_set.classes), best=best, **more))

    def save_checkpoint(**more):
        checkpoint("ckpt.pt", windows=all_windows(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), **more)

    def log(**record):
        if main_process:
            folder.log(step=step, epoch=step / steps_per_epoch, **record)

    # ---- the loop
    order = data.TrainOrder(len(train_set), args.batch_size, args.micro_batch, args.seed, step, last_step, rank(), world)
    stream = data.batches(data.loader(train_set, order, workers), tell=say)
    stop = StopSignal()
    model.train()
    bar = tqdm(total=last_step, initial=step, unit="step", disable=not (main_process and sys.stderr.isatty()))
    images = since_images = 0
    started = since = time.perf_counter()  # moved on by the time that evaluations take
    while step < last_step:
        stopped = stop.agreed()
        if stopped:
            save_checkpoint()
            bar.close()
            tell(f"stopped by {signal.Signals(stopped).name}, saved at step {step:,}; to go on, repeat the command with "
                 "--resume")
            return 128 + stopped
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total_steps, args.warmup_steps, args.lr, args.lr_schedule, args.lr_end)
        statistics.begin_step()
        clean = {}  # micro-batch -> its loss at w, detached

        def loss_of(micro, x, y, sends=False):
            torch.manual_seed(data.key(args.seed, step, micro))  # the masks belong to the micro-batch, not the device
            statistics.begin_pass()
            # DistributedDataParallel decides in the forward pass whether its backward pass communicates: once a
            # step, in the last micro-batch's pass at w + ε. SAM's first pass never does.
            with nullcontext() if sends or not dist.is_initialized() else model.no_sync(), autocast:
                logits = model(x)
            loss = criterion(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)
            if micro not in clean:
                clean[micro] = loss.detach()
                statistics.end_pass()
            return scaler.scale(loss)

        micros = []
        for micro in own_micros:
            x, y = next(stream)
            x, y = to_float(x.to(device, non_blocking=True), model), y.to(device, non_blocking=True)
            torch.manual_seed(data.key(args.seed, step, micro, 1))
            micros.append(partial(loss_of, micro, *mix(x, y)))
            if args.sam_sync and len(micros) < len(own_micros):
                continue
            # ε is one micro-batch's, or with --sam-sync the whole batch's: `micros` holds what shares it.
            with sam.perturb(micros, sync=args.sam_sync and world > 1) if sam else nullcontext():
                for i, loss in enumerate(micros):
                    sends = micro == own_micros[-1] and i == len(micros) - 1
                    (loss(sends=sends) / len(own_micros)).backward()
            micros.clear()
        statistics.end_step(micro_batches)

        # Clipping and decay act once, on the gradient averaged over everything.
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if args.grad_clip:
            nn.utils.clip_grads_with_norm_(params, args.grad_clip, norm)
        skip = (~norm.isfinite()).float()
        if fused:
            optimizer.found_inf = skip  # the fused optimizers leave everything as it is where this is 1
        if fused or not skip:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            decay = min(args.ema_decay, (1 + step) / (10 + step))
            for average, now in zip(ema.state_dict().values(), network.state_dict().values()):
                average.lerp_(now, 1 - decay) if average.is_floating_point() else average.copy_(now)
        loss = torch.stack(list(clean.values())).mean().float()
        window += torch.stack([loss, norm.float().nan_to_num(0, 0, 0), skip, torch.ones_like(skip)])
        step += 1
        images += args.batch_size
        bar.update()

        at_end, at_epoch = step == last_step, step % steps_per_epoch == 0
        if at_end or step % args.log_every == 0:
            total, norms, skipped, steps = all_windows().mean(0).tolist()  # the one wait for the device
            window.zero_()
            now = time.perf_counter()
            speed, since, since_images = (images - since_images) / (now - since), now, images
            log(loss=total / steps, lr=group["lr"], grad_norm=norms / max(steps - skipped, 1), skipped=int(skipped),
                images_per_second=speed)
            tell(f"step {step:6,}  epoch {step / steps_per_epoch:6.2f}  loss {total / steps:7.4f}  lr {group['lr']:.2e}  "
                 f"gradient norm {norms / max(steps - skipped, 1):7.3f}  {speed:7,.0f} images/s"
                 + f"  {int(skipped)} steps skipped: their gradient was not finite" * (skipped > 0))
            if skipped == steps:
                raise UserError(f"all of the last {int(steps)} gradients were not finite: stopped at step {step:,}, "
                                f"learning rate {group['lr']:.3g}; the last good checkpoint is {args.out_dir}/ckpt.pt")
        if at_end or at_epoch and step // steps_per_epoch % args.eval_every == 0:
            before = time.perf_counter()
            result = measure("validation", val_set)
            log(val=result)
            tell(f"step {step:6,}  validation: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, "
                 f"NLL {result['nll']:.4f}, ECE {result['ece']:.2f} %")
            if result["top1"] > best:
                best = result["top1"]
                checkpoint("best.pt", val=result)
            since, started = (t + time.perf_counter() - before for t in (since, started))
        if not at_end and (at_epoch or args.save_every and step % args.save_every == 0):
            save_checkpoint()
    stop.close()
    bar.close()

    # ---- the end
    speed = images / (time.perf_counter() - started)
    final = {"training": measure("training sample", train_sample), "validation": result or measure("", val_set)}
    log(final=final, images_per_second=speed)
    save_checkpoint(final=final)
    print_table(tell, final)
    tell(f"{speed:,.0f} images/s; checkpoint {args.out_dir}/ckpt.pt, best validation accuracy {best:.2f} % in best.pt")
    flag = "--sam-rho 0" if sam else "--sam-rho " + ("paper" if args.model in PAPER_RHO else "0.1")
    tell(f"to compare: the same command with {flag}")
    return 0


def print_table(tell, results):
    tell(f"{'':12}{'images':>8}{'top-1 %':>9}{'top-5 %':>9}{'NLL':>9}{'ECE %':>8}")
    for name, r in results.items():
        tell(f"{name:12}{r['images']:8,}{r['top1']:9.2f}{r['top5']:9.2f}{r['nll']:9.4f}{r['ece']:8.2f}")


def main(argv=None):
    """Exit status: 0, 2 for what the user has to set right, 128 + signal for a run that was stopped and saved."""
    owns_group, handlers = not dist.is_initialized(), {n: signal.getsignal(n) for n in StopSignal.SIGNALS}
    try:
        status = run(*settings(argv))
    except UserError as error:
        if rank() == 0:
            print(f"train.py: {error}", file=sys.stderr)
        status = 2
    except data.DataError as error:  # met while training, perhaps by one process only
        print(f"train.py: {error}; then go on with --resume", file=sys.stderr)
        if dist.is_initialized():
            os._exit(2)  # the other processes wait in a collective that will not come
        status = 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if owns_group and dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
