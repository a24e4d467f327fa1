"""Tables and figures of the three papers from trained networks: a function and a subcommand each.

    python analyze.py robustness --checkpoint RUN/ckpt.pt --data-dir IMAGENET \\
        --benchmarks val real v2 pgd r c    Chen et al. (arXiv 2106.01548) Table 2, 5
    python analyze.py robustness --checkpoint A/ckpt.pt B/ckpt.pt      several; Park & Kim
        (2202.06709) Fig. 12b, E.1; by default on corruptions of our own, without a download
    python analyze.py stability --study length        trains many networks: length, optimizer, lr-wd
        (Xiao et al. 2106.14881, Fig. 2-5), rho, grid, doubled (Chen Table 10, App. E, F); --dry-run
    python analyze.py transfer --checkpoint RUN/ckpt.pt --data-dir DATA     Chen Table 6
    python analyze.py ntk --model vit_b16 --data-dir IMAGENET       Chen Table 1, Appendix D
    python analyze.py norms --checkpoint RUN/ckpt.pt                Chen Table 3; also sparsity,
        Fig. 2 right
    torchrun --nproc_per_node=8 analyze.py …      on many devices: the same numbers

A subcommand prints a table, writes OUT/SUBCOMMAND.json (numbers, settings, versions, command line)
after each finished part, so that a killed one goes on where it was when it is started again, and,
where matplotlib is installed, OUT/SUBCOMMAND.png; stability writes OUT/STUDY.json and .png, and its
runs say what is finished. What a subcommand does not know of a command line belongs to train.py:
--data-dir, --device, --dtype, --weights, --mean, …; a foreign network is
--model NAME --init-from FILE.
"""
import argparse
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import adversarial
import data
import train
import vit
from train import UserError

BENCHMARKS = ("val", "real", "v2", "pgd", "r", "c", "c-lite")


# ------------------------------------------------------------------------------------------- common

class Results:
    """OUT/NAME.json. `parts` is {network: {part: numbers}}, what is finished, and `settings` what
    decided them, {network: {flag: value}}; `put` adds to them and writes the file. Only the first
    process reads and writes; all know the same."""

    def __init__(self, folder, name):
        self.path = Path(folder) / f"{name}.json"
        self.parts, self.settings = train.on_main(self.read)
        train.on_main(self.write)  # now, not after an hour, it shows whether that is possible

    def read(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = json.loads(self.path.read_bytes())
            return before["results"], before["settings"]
        except FileNotFoundError:
            return {}, {}
        except OSError as error:
            raise UserError(f"--out-dir {self.path.parent}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} is damaged: remove it, or choose another "
                            "--out-dir") from None

    def write(self):
        versions = dict(torch=torch.__version__, torchvision=torchvision.__version__,
                        python=sys.version.split()[0])
        text = train.to_json(dict(results=self.parts, settings=self.settings, versions=versions,
                                  command=sys.argv), indent=1)
        try:
            train.write_file(self.path, lambda file: file.write(text))
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None

    def put(self, network, part, numbers):
        self.parts.setdefault(network, {})[part] = numbers
        train.on_main(self.write)


def fingerprint(path):
    """Of a file's bytes: results belong to the checkpoint that they were computed from."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


# Settings of train.py that decide a network's numbers; others, as of its training, do not.
DECIDES = ("dataset", "data_dir", "eval_split", "image_size", "eval_short_side", "model", "dtype",
           "weights", "mean", "std", *train.MODEL_FLAGS)


def networks(checkpoints, rest, also=(), untrained=False):
    """(settings, {flag: who set it}) of each checkpoint, or of --model with --init-from or, if it
    may be untrained, without. also: the caller's own flags, for hints."""
    files = [["--init-from", f"{path}/ckpt.pt" if os.path.isdir(path) else path]
             for path in checkpoints] or [[]]
    foreign = any(word.split("=")[0] == "--init-from" for word in rest)
    if checkpoints and foreign or not (checkpoints or foreign or untrained):
        raise UserError("needs either --checkpoint RUN/ckpt.pt or --model NAME --init-from FILE"
                        + ", or --model NAME alone, untrained" * untrained)
    evaluates = ["--eval-only"] * bool(checkpoints or foreign)
    chosen = [train.settings([*evaluates, *rest, *file], also) for file in files]
    for name in ("download", "dry_run", "list_models", "list_recipes", "resume"):
        if chosen[0][1][name] == "command line":
            raise UserError(f"--{name.replace('_', '-')} is for train.py; an analysis goes on by "
                            "itself when it is started again")
    return chosen


def label(settings):
    """A network's name among results: its file, and a mark of that and of what decides numbers."""
    decides = {name: getattr(settings, name) for name in DECIDES}
    decides |= dict(data_dir=os.path.abspath(settings.data_dir), file=settings.init_from)
    if settings.init_from:
        decides["content"] = train.on_main(lambda: fingerprint(settings.init_from))
    else:
        decides["seed"] = settings.seed
    mark = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    return f"{settings.init_from or settings.model + ', untrained'} ({mark})", decides


def class_names(settings, saved):
    """Of the network's outputs: from its checkpoint, or, of another project's, the held-out set."""
    if saved.get("classes") is not None:
        return saved["classes"]
    try:
        return data.load(settings.dataset, settings.eval_split, image_size=224,
                         data_dir=settings.data_dir).classes
    except data.DataError as error:
        raise UserError(f"{error}; of another project's file, only these tell the class "
                        "names") from None


def network_and_images(settings, origin, device, tell):
    """The network of a checkpoint, to be evaluated, and the held-out images of its data set."""
    saved = {} if settings.init_from.endswith(".npz") else train.read_checkpoint(settings.init_from)
    try:
        dataset = data.load(settings.dataset, settings.eval_split, data_dir=settings.data_dir,
                            image_size=settings.image_size, classes=saved.get("classes"),
                            short_side=settings.eval_short_side)
    except data.DataError as error:
        raise UserError(str(error)) from None
    if dataset.notice:
        tell(dataset.notice)
    model = train.starting_network(settings, origin, len(dataset.classes), device, tell)
    return model.eval(), dataset.to(device)


def started(args, rest, what, untrained=False):
    """What an analysis of networks begins with: joins the processes. -> Results, device, and of
    each network its name among the results, settings and who set these. Arithmetic is float32, or
    float64 if --dtype says so. untrained: a network may come without weights, as initialised."""
    own = make_parser().commands[what]._option_string_actions
    chosen = networks(args.checkpoint, rest, own, untrained)
    device = train.start_processes(chosen[0][0].device)[0]
    results = Results(args.out_dir or (Path(chosen[0][0].init_from).parent if
                                       chosen[0][0].init_from else Path("out", what)), what)
    named = []
    for settings, origin in chosen:
        if settings.dtype in ("bfloat16", "float16"):
            if origin["dtype"] == "command line":
                raise UserError(f"--dtype {settings.dtype}: {what} is computed in float32 or "
                                "float64")
            settings.dtype = "float32"
        name, results.settings[name] = label(settings)
        named.append((name, settings, origin))
    return results, device, named


@contextmanager
def exactly(model, device):
    """The model in evaluation mode, BatchNorm with its running statistics, all parameters with
    gradients; arithmetic without autocast and TF32, attention by the kernel that has second
    derivatives. Afterwards modes, what requires a gradient and the random state are as before."""
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    fast = torch.backends.mha.get_fastpath_enabled()  # nn.MultiheadAttention's, has no derivative
    with adversarial.held_still(model, device), kernel:
        torch.backends.mha.set_fastpath_enabled(False)
        for p in model.parameters():  # held_still remembers which had one
            p.requires_grad_(True)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for p in model.parameters():
                p.requires_grad_(False)


def training_images(settings, device, share, tell, augmented=False):
    """A fixed class-balanced part of the images that a network was trained on: a number of them, or
    a fraction such as "1/10"; as in evaluation, or augmented as in training."""
    how = dict(augment="none")
    if augmented:
        how = {name: getattr(settings, name) for name in (
            "augment", "autoaugment", "randaugment", "randaugment_prob", "randaugment_of",
            "erasing", "flip")}
    try:
        dataset = data.load(settings.dataset, "train", data_dir=settings.data_dir,
                            image_size=settings.image_size, seed=settings.seed,
                            short_side=settings.eval_short_side, **how)
    except data.DataError as error:
        raise UserError(str(error)) from None
    if dataset.notice:
        tell(dataset.notice)
    dataset.restrict(data.subset(dataset.labels, settings.train_fraction))
    if settings.hold_out != "0":
        dataset.restrict(data.hold_out(dataset.labels[dataset.indices], settings.hold_out)[0])
    try:
        fraction = Fraction(share)
        fraction = fraction / len(dataset) if fraction > 1 else fraction
        dataset.restrict(data.subset(dataset.labels[dataset.indices], fraction))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--images {share}: {error}") from None
    return dataset.to(device)


class Batches:
    """A data set's images in fixed batches on the model's device: iterates over (x, y), always the
    same, augmentation included; x float (B, 3, H, W) in [0, 1], y classes (B,) or, where `mix`
    (a function of x and y, as of train.py) makes them, shares (B, classes). Of n processes each has
    every n-th batch. Once read, up to KEPT bytes of images stay in memory."""
    KEPT = 8 * 2**30

    def __init__(self, dataset, model, batch_size, workers=0, mix=None, seed=0):
        self.model, self.mix, self.seed, self.total = model, mix, seed, len(dataset)
        starts = range(train.rank() * batch_size, len(dataset), world_size() * batch_size)
        order = [[(0, i) for i in range(start, min(start + batch_size, len(dataset)))]
                 for start in starts]
        self.numbers = [start // batch_size for start in starts]
        self.loader = data.loader(dataset, order, workers)
        self.kept = None

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        device, read, kept, size = next(self.model.parameters()).device, self.kept, [], 0
        for number, (x, y) in zip(self.numbers, read or data.batches(self.loader, train.say)):
            size += x.numel()
            if read is None and size <= self.KEPT:
                kept.append((x, y))
            x, y = train.to_float(x.to(device), self.model), y.to(device)
            if self.mix is not None:
                torch.manual_seed(data.key(self.seed, -1, number, 2))
                x, y = self.mix(x, y)
            yield x, y
        if len(kept) == len(self.numbers):
            self.kept = kept


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def share_out(results, network, units, what):
    """Computes what is not finished of {part: function -> its numbers}. Of n processes each takes
    every n-th, and what they have done is written before they take the next."""
    todo = [part for part in units if part not in results.parts.get(network, {})]
    with train.progress(len(units), what, "part") as bar:
        bar.update(len(units) - len(todo))
        for i in range(0, len(todo), world_size()):
            found = [(None, None, None)] * world_size()
            if i + train.rank() < len(todo):
                part = todo[i + train.rank()]
                try:
                    found[train.rank()] = part, units[part](), None
                except (UserError, data.DataError) as error:  # all have to hear of it
                    found[train.rank()] = part, None, str(error)
            if dist.is_initialized():
                dist.all_gather_object(found, found[train.rank()])
            for part, numbers, error in found:
                if error is not None:
                    raise UserError(error)
                if part is not None:
                    results.put(network, part, numbers)
                    bar.update()


def figure(path, draw, rows=1, columns=1):
    """Draws with matplotlib if it is installed, and says so if not: the numbers are in the JSON."""
    try:
        import matplotlib
    except ImportError:
        train.say(f"no {path.name}: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    picture = pyplot.figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    draw(picture.subplots(rows, columns))
    picture.savefig(path, dpi=150)
    pyplot.close(picture)
    train.say(f"figure    {path}")


# --------------------------------------------------------------------------------------- robustness

def robustness_parts(benchmark, args, classes):
    """The parts of a benchmark and what makes the data set of each: [(name, function)].
    DataError if its files are not there."""
    common = dict(data_dir=args.data_dir, image_size=args.image_size, classes=classes)

    @functools.cache
    def held_out():
        return data.load(args.dataset, args.eval_split, short_side=args.eval_short_side, **common)

    if benchmark in ("val", "pgd", "c-lite"):
        held_out()  # if it is missing, now
    if benchmark in ("val", "pgd"):
        return [(benchmark, held_out)]
    if benchmark == "c-lite":
        return [(f"c-lite/{corruption}/{severity}",
                 lambda c=corruption, s=severity: data.Corrupted(held_out(), c, s))
                for corruption in data.C_LITE for severity in data.SEVERITIES]
    name = f"{args.dataset}-c" if benchmark == "c" and "cifar" in args.dataset else benchmark
    return [("/".join([benchmark, corruption, str(severity)] if corruption else [benchmark]),
             lambda c=corruption, s=severity: data.benchmark(name, c, s, **common))
            for corruption, severity in data.conditions(name, args.data_dir)]


def robustness_summary(parts, imagenet=True):
    """{part: top-1 in percent} -> dict with a number for each benchmark among them: its accuracy in
    percent, of c and c-lite the mean over corruptions and severities (Chen §4.2: 19 × 5; Park A.1),
    and for ImageNet-C mCE, the mean over 15 corruptions of the error averaged over severities,
    divided by AlexNet's (Hendrycks & Dietterich 2019), in percent; "by corruption" their means."""
    summary, grouped = {}, {}
    for part, top1 in parts.items():
        benchmark, *condition = part.split("/")
        if condition:
            grouped.setdefault(benchmark, {}).setdefault(condition[0], []).append(top1)
        else:
            summary[benchmark] = top1
    for benchmark, corruptions in grouped.items():
        means = {name: sum(values) / len(values) for name, values in corruptions.items()}
        summary[benchmark] = sum(means.values()) / len(means)
        summary[f"{benchmark} by corruption"] = means
        if benchmark == "c" and imagenet and data.ALEXNET_ERRORS.keys() <= means.keys():
            summary["mCE"] = sum((100 - means[name]) / error for name, error in
                                 data.ALEXNET_ERRORS.items()) / len(data.ALEXNET_ERRORS) * 100
    return summary


def robustness(args, rest):
    """Accuracy of checkpoints on held-out images and on benchmarks of natural and of synthetic
    change (Chen et al. Table 2, 5; Park & Kim Fig. 12b, E.1). Returns what the JSON holds under
    "results". Whatever benchmark is not there is named, with where it was looked for."""
    chosen, summaries, trained, told = networks(args.checkpoint, rest), {}, {}, set()
    first = chosen[0][0]
    device, world, on_machine = train.start_processes(first.device)
    tell = train.say if train.rank() == 0 else lambda text="": None
    results = Results(args.out_dir or Path(first.init_from).parent, "robustness")
    for settings, origin in chosen:
        name, results_of = label(settings)
        results.settings[name] = results_of
        saved = {} if settings.init_from.endswith(".npz") else train.read_checkpoint(
            settings.init_from)
        trained[name] = saved["settings"] if train.is_ours(saved) else {}
        classes, todo = class_names(settings, saved), []
        for benchmark in dict.fromkeys(args.benchmarks):
            try:
                todo += robustness_parts(benchmark, settings, classes)
            except data.DataError as error:
                tell(f"missing   {error}")
        done = results.parts.get(name, {})
        remaining = [part for part in todo if part[0] not in done]
        tell(f"{name}: {len(todo)} parts, {len(todo) - len(remaining)} done before")
        if remaining:
            model = train.starting_network(settings, origin, len(classes), device, tell)
            half = settings.dtype in ("bfloat16", "float16")
            autocast = (torch.autocast(device.type, getattr(torch, settings.dtype)) if half else
                        nullcontext())
        quiet = train.rank() > 0 or not sys.stderr.isatty()
        for part, make in tqdm(remaining, unit="part", disable=quiet):
            try:
                dataset = make()
            except data.DataError as error:
                tell(f"missing   {error}")
                continue
            if dataset.notice and dataset.notice not in told:
                told.add(dataset.notice)
                tell(dataset.notice)
            workers = train.worker_count(settings, dataset, on_machine)
            if part == "pgd":
                results.put(name, part, dict(top1=train.pgd_10(model, dataset, device, workers)))
                continue
            loader = data.evaluation_loader(dataset, 256, workers, train.rank(), world,
                                            device.type == "cuda")
            results.put(name, part, train.evaluate(model, loader, device, autocast,
                                                   restrict_logits=dataset.restrict_logits))
        done = results.parts.get(name, {})
        lacking = dict.fromkeys(part.split("/")[0] for part, _ in todo if part not in done)
        for benchmark in lacking:
            tell(f"missing   {benchmark}: parts of it, so it has no number")
        wanted = {part: done[part]["top1"] for part, _ in todo if part.split("/")[0] not in lacking}
        summaries[name] = robustness_summary(wanted, "cifar" not in settings.dataset)
    if not any(summaries.values()):
        raise UserError("nothing could be evaluated: the lines above say what is missing where")
    if train.rank() == 0:
        print_robustness(summaries, plain_twins(trained))
        if any("val" in s and ("c" in s or "c-lite" in s) for s in summaries.values()):
            figure(results.path.with_suffix(".png"), lambda axes: draw_robustness(axes, summaries))
        train.say(f"results   {results.path}")
    return results.parts


def plain_twins(trained):
    """{network: the one that was trained as it was, but without SAM}, from their runs' settings."""
    differs = train.FREE_FLAGS | {"sam_rho", "sam_steps", "sam_adaptive", "sam_sync", "recipe"}
    same = {name: {k: v for k, v in of.items() if k not in differs} for name, of in trained.items()}
    return {name: other for name, of in trained.items() for other in trained
            if of and trained[other] and of["sam_rho"] > 0 and trained[other]["sam_rho"] == 0
            and same[name] == same[other]}


def print_robustness(summaries, twins):
    """A row for each network; below one trained with SAM its difference to its twin without."""
    columns = [name for name in (*BENCHMARKS, "mCE") if any(name in s for s in summaries.values())]
    widest = max(24, *map(len, summaries))
    train.say(f"{'top-1 %':{widest}}" + "".join(f"{name:>9}" for name in columns))
    for name, summary in summaries.items():
        train.say(f"{name:{widest}}" + "".join(
            f"{summary[c]:9.2f}" if c in summary else f"{'-':>9}" for c in columns))
        if name in twins:
            plain = summaries[twins[name]]
            train.say(f"{'  against without SAM':{widest}}" + "".join(
                f"{summary[c] - plain[c]:+9.2f}" if c in summary and c in plain else f"{'-':>9}"
                for c in columns))
    for benchmark in ("c", "c-lite"):
        tables = [summary.get(f"{benchmark} by corruption", {}) for summary in summaries.values()]
        corruptions = list(dict.fromkeys(name for table in tables for name in table))
        if corruptions:
            train.say(f"\n{benchmark + ', mean of severities':28}"
                      + "".join(f"{i:>9}" for i in range(1, len(tables) + 1)))
        for name in corruptions:
            train.say(f"{name:28}" + "".join(f"{table.get(name, math.nan):9.2f}"
                                             for table in tables))


def draw_robustness(axes, summaries):
    """Park & Kim Fig. 12b, E.1: accuracy against mean accuracy on corrupted images."""
    for name, summary in summaries.items():
        corrupted = summary.get("c", summary.get("c-lite"))
        if corrupted is not None and "val" in summary:
            axes.scatter(summary["val"], corrupted, label=name)
    lite = any("c-lite" in summary and "c" not in summary for summary in summaries.values())
    axes.set_xlabel("accuracy (%)")
    axes.set_ylabel(f"mean accuracy on {'c-lite' if lite else 'corrupted images'} (%)")
    axes.legend(fontsize=6)


# ---------------------------------------------------------------------------- neural tangent kernel

TABLE_1_NTK = {"vit_b16": 4205.3, "mixer_b16": 14468.0, "resnet50": 2801.6, "resnet152": 2801.6}
# Parameters (1, …) that are added to or put beside the tokens of each image.
OF_TOKENS = ("cls_token", "class_token", "pos_embed", "pos_embedding")
CACHE = 2**22  # bytes of gradients that a CPU forms and multiplies before they leave its cache
WORKING = 2**27  # bytes of a layer's gradients, and of its patches, that are there at once


class ReluForGelu(TorchFunctionMode):
    """Under it ReLU is computed wherever GELU is called (Chen et al., Appendix D)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return F.relu(args[0]) if function is F.gelu else function(*args, **(kwargs or {}))


@contextmanager
def hooked(model, hook, names):
    """hook(name, module, args, kwargs, output) is called after each of these modules."""
    handles = [model.get_submodule(name).register_forward_hook(functools.partial(hook, name),
                                                               with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def per_image(model, names, images):
    """{name: the parameter (1, …), once for each image}."""
    return {name: p.detach().expand(images, *p.shape[1:]).clone().requires_grad_()
            for name, p in model.named_parameters() if name in names}


def owners(model, x):
    """Who has which of the parameters in the kernel: {module's name: names of parameters in it},
    the innermost module that has the parameter wherever it is used and is called once, with one
    tensor (B, …), and returns one; and the names of those that are one for each image (OF_TOKENS,
    if image i's logits depend on the i-th copy alone)."""
    x, calls = x[:3], {}  # three: seldom a size of anything else

    def note(name, module, args, kwargs, output):
        batches = len(args) == 1 and not kwargs and all(
            isinstance(t, torch.Tensor) and t.shape[:1] == x.shape[:1] for t in (*args, output))
        calls[name] = batches and name not in calls

    with hooked(model, note, dict(model.named_modules())), torch.no_grad():
        model(x)
    places, tokens = {}, set()
    for name, p in model.named_parameters(remove_duplicate=False):
        places.setdefault(p, []).append(name)
        if name.rpartition(".")[2] in OF_TOKENS and len(p) == 1:
            tokens.add(name)
    if tokens:
        copies = per_image(model, tokens, len(x))
        logits = torch.func.functional_call(model, copies, (x,))
        grads = torch.autograd.grad(logits[-1].sum(), list(copies.values()), allow_unused=True)
        tokens = {name for name, g in zip(copies, grads) if g is None or not g[:-1].any()}
    owned = {}
    for names in places.values():
        path = os.path.commonprefix([name.split(".")[:-1] for name in names])
        while path and not calls.get(".".join(path)):
            path = path[:-1]
        if names[0] not in tokens:
            owned.setdefault(".".join(path), []).append(names[0])
    return owned, tokens


def inner(j):
    """Products of the rows of (B, P): (B, B)."""
    return (j @ j.T).double()


def by_products(layer, limit, a, g):
    """A linear or convolutional layer's part of the kernel from its input a (B, …) and the gradient
    at its output g (K, B, …). Image i's gradient by the weight is Σ_l g_il a_ilᵀ over positions l,
    by the bias that with a_il = 1; they are formed for some output features at a time, in `limit`
    bytes. With one position they never are: ⟨g_i a_iᵀ, g_j a_jᵀ⟩ = ⟨g_i, g_j⟩ ⟨a_i, a_j⟩."""
    bias = int(layer.bias is not None)
    if a.ndim == 2:
        return sum(map(inner, g)) * inner(F.pad(a, (0, bias), value=1))
    linear = isinstance(layer, nn.Linear)
    groups = 1 if linear else layer.groups
    g = g.flatten(2, -2).mT if linear else g.flatten(3)  # (K, B, O, L)
    g = g.unflatten(2, (groups, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)  # (B, G, K·O/G, L)

    def patches(a):
        if linear:
            a = a.flatten(1, -2)[:, None]  # (B, 1, L, I)
        else:
            a = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            a = a.unflatten(1, (groups, -1)).mT  # (B, G, L, I/G)
        return F.pad(a, (0, bias), value=1)

    size = groups * (layer.weight[0].numel() + bias) * a.element_size()  # of one position's
    images = max(1, limit // (size * g.shape[-1]))
    rows = max(1, min(limit, CACHE if a.device.type == "cpu" else limit) // (size * len(a)))
    total, whole = 0, patches(a) if images >= len(a) else None
    for some in g.split(rows, dim=2):
        j = some @ whole if whole is not None else torch.cat([
            h @ patches(b) for h, b in zip(some.split(images), a.split(images))])
        total = total + inner(j.flatten(1))
    return total


def by_mapping(model, name, names, a):
    """Any module's part of the kernel, as a function of the gradient at its output g (K, B, …):
    autograd's, of the module called once for each image with parameters of its own."""
    layer, prefix = model.get_submodule(name), f"{name}." * bool(name)
    copies = {n.removeprefix(prefix): p.detach().expand(len(a), *p.shape).clone().requires_grad_()
              for n, p in model.named_parameters() if n in names}
    y = torch.func.vmap(lambda w, a: torch.func.functional_call(layer, w, (a[None],))[0])(copies, a)
    return lambda g: sum(inner(j.flatten(1)) for of_one in g for j in torch.autograd.grad(
        y, list(copies.values()), of_one, retain_graph=True, allow_unused=True) if j is not None)


def linearised(model, owned, tokens, x, limit):
    """Calls the model. -> logits (B, C) and two lists: places in their graph, and for each of these
    the function that makes of the gradients there (K, B, …) a part of the kernel."""
    copies, called = per_image(model, tokens, len(x)), {}

    def note(name, module, args, kwargs, output):
        called[name] = args[0].detach(), get_gradient_edge(output)

    with hooked(model, note, owned):
        logits = torch.func.functional_call(model, copies, (x,))
    places, parts = list(copies.values()), [lambda g: sum(inner(j.flatten(1)) for j in g)
                                            for _ in copies]
    for name, (a, edge) in called.items():
        layer = model.get_submodule(name)
        plain = isinstance(layer, nn.Linear) or isinstance(layer, nn.Conv2d) and (
            layer.padding_mode == "zeros" and not isinstance(layer.padding, str))
        whole = {f"{name}.{n}" for n, _ in layer.named_parameters()} == set(owned[name])
        places.append(edge)
        parts.append(functools.partial(by_products, layer, limit, a) if plain and whole else
                     by_mapping(model, name, owned[name], a))
    return logits, places, parts


def ntk_plan(model, x, projections=0, memory=4 * 2**30):
    """How ntk stays below `memory` bytes beside the network, from a call with one image: dict with
    the images and the directions taken at once, the bytes that these need, those of the Jacobian
    that is never formed, and for ntk itself a layer's limit and owners. ValueError if two images are too many."""
    limit = min(memory // 8, WORKING)
    with exactly(model, x.device):
        owned, tokens = owners(model, x)
        weights, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(t):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logits, places, _ = linearised(model, owned, tokens, x[:1], limit)
            grads = torch.autograd.grad(logits.sum(), places, allow_unused=True)
    graph = sum(size for where, (size, _) in held.items() if where not in weights)
    grads = 2 * sum(g.nbytes for g in grads if g is not None)  # also stacked
    directions = projections if 0 < projections < logits.shape[1] else logits.shape[1]
    room = memory - 2 * limit
    images = min(len(x), room // (graph + 2 * grads))
    if images < min(2, len(x)):
        two = 2 * (graph + 2 * grads)
        need = min(two + 2 * WORKING, two * 4 / 3)
        raise ValueError(f"two images take {need / 2**30:.2g} GiB, more than the "
                         f"{memory / 2**30:.2g} GiB allowed")
    at_once = max(1, min(directions, (room // images - graph - grads) // grads))
    jacobian = len(x) * logits.shape[1] * sum(p.nbytes for p in model.parameters())
    return dict(images=images, directions=at_once, jacobian=jacobian, owners=(owned, tokens),
                limit=limit, bytes=images * (graph + grads * (at_once + 1)) + 2 * limit)


def ntk(model, x, projections=0, seed=0, memory=4 * 2**30, plan=None):
    """The empirical neural tangent kernel of images x (B, 3, H, W) in [0, 1] and its condition
    number κ = λ_max / λ_min (Chen et al. §3, Appendix D: trainability; smaller is better).

        Θ(x, x') = 1/C Σ_c ∇f_c(x) · ∇f_c(x')        over all parameters and the C logits f_c

    The paper's Θ = J Jᵀ leaves the outputs open. This trace is our reading of its reference (Xiao
    et al. 2020), whose Θ in the limit of infinite width is the same for each output, and no kernel
    between different ones. Others would be the (BC)² matrix, one logit, or the sum of the logits.

    projections: 0, or at least C: all logits, exact. Else of r random orthonormal directions q in
    the space of logits, C/r times the trace over these: unbiased, with variance
    2 (C-r) / (r C (C-1) (C+2)) ‖S‖² for an entry, S the symmetric and traceless part of the C × C
    matrix ∇f(x) ∇f(x')ᵀ. κ of such a kernel is biased upwards: λ_max is convex, λ_min concave.

    Model: evaluation mode, BatchNorm with its running statistics; the model's precision, products
    summed over layers in float64. At initialisation a zero head, as Google's ViT and Mixer have,
    stops all gradients but its own, and Θ = φ(x)·φ(x') + 1, the pre-logit features' Gram matrix and
    the bias: a statement about features, not about training. The subcommand gives a new head.

    Cost: a forward pass, and C (or r) backward passes without those of weights; the Jacobian
    (B·C × P) is never formed, only gradients of one layer at a time. Below `memory` bytes beside
    the network as far as ntk_plan foresees, which the largest intermediate result decides; if not
    all images fit, pairs of groups of them do, at correspondingly more passes. plan: ntk_plan's,
    of as many images, spares the two or three passes that find it.

    -> dict: kernel B lists of B numbers; eigenvalues, descending; condition, None unless λ_min > 0;
    resolved, whether λ_min is above what rounding leaves, B · eps · λ_max (else --dtype float64).
    ValueError if two images exceed the memory."""
    plan = plan or ntk_plan(model, x, projections, memory)
    with exactly(model, x.device):
        kernel = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
        groups = torch.arange(len(x)).split(
            len(x) if plan["images"] == len(x) else plan["images"] // 2)
        pairs = [torch.cat(pair) for pair in itertools.combinations(groups, 2)] or groups
        for chosen in pairs:
            logits, places, parts = linearised(model, *plan["owners"], x[chosen],
                                                plan["limit"])
            directions = torch.eye(logits.shape[1], dtype=torch.float64)
            if 0 < projections < len(directions):
                gaussian = torch.randn(len(directions), projections, dtype=torch.float64,
                                       generator=torch.Generator().manual_seed(seed))
                directions = torch.linalg.qr(gaussian)[0].T  # (r, C)
            directions, block = directions.to(logits), 0
            for some in directions.split(plan["directions"]):
                grads = zip(*(torch.autograd.grad(logits, places, v.expand_as(logits),
                                                  retain_graph=True, allow_unused=True)
                              for v in some))
                for g, part in zip(grads, parts):
                    if g[0] is not None:  # of what the logits do not depend on
                        block = block + part(torch.stack(g))
            kernel[chosen[:, None], chosen] = block / len(directions)
    eigenvalues = torch.linalg.eigvalsh(kernel).flip(0).tolist()
    largest, smallest = eigenvalues[0], eigenvalues[-1]
    return dict(kernel=kernel.tolist(), eigenvalues=eigenvalues,
                condition=largest / smallest if smallest > 0 else None,
                resolved=smallest > len(x) * torch.finfo(x.dtype).eps * largest)


def measure_statistics(model, x):
    """BatchNorm's running statistics become those of x, each layer's behind the ones before it:
    what training normalises by in its first step."""
    def measure(norm, args):
        values = args[0].transpose(0, 1).flatten(1)
        norm.running_mean.copy_(values.mean(1))
        norm.running_var.copy_(values.var(1, correction=0))

    handles = [m.register_forward_pre_hook(measure) for m in model.modules() if isinstance(
        m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    with exactly(model, x.device), torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()


def shuffled_batches(dataset, model, size, seed=0):
    """Functions that read the images (size, 3, H, W) of a batch each, on the model's device; the
    order of images is drawn from the seed, a rest is left out. UserError if there is no batch."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    if not 2 <= size <= len(order):
        raise UserError(f"--batch {size}: at least 2 and, of these images, at most {len(order)}")

    def read(start):
        pairs = [(0, i) for i in order[start:start + size]]
        (x, _), = data.batches(data.loader(dataset, [pairs]), train.say)
        return train.to_float(x.to(next(model.parameters()).device), model)

    return [functools.partial(read, start) for start in range(0, len(order) - size + 1, size)]


def ntk_command(args, rest):
    """The condition number of the neural tangent kernel of networks at initialisation, in batches
    of 48 training images (Chen et al. Table 1, Appendix D): the architecture of a checkpoint, or of
    --model, with weights drawn from --seed, ReLU in place of GELU, a new head, and BatchNorm with
    the statistics of the batch as constants. Returns what the JSON holds under "results"."""
    fresh = args.at == "init"
    head, activation, statistics = (given or (at_init if fresh else "own") for given, at_init in (
        (args.head, "lecun"), (args.activation, "relu"), (args.statistics, "batch")))
    if args.projections < 0 or not 0 < args.memory < math.inf:
        raise UserError(f"--projections {args.projections} --memory {args.memory:g}: at least 0, "
                        "and above 0")
    results, device, named = started(args, rest, "ntk", untrained=True)
    tell = train.say if train.rank() == 0 else lambda text="": None
    summaries, shown = {}, {}
    for name, settings, origin in named:
        if not (fresh or settings.init_from):
            raise UserError("--at checkpoint needs --checkpoint")
        if fresh:
            settings = argparse.Namespace(**vars(settings) | dict(init_from=""))
        dataset = training_images(settings, device, args.images, tell)
        model = train.starting_network(settings, origin, len(dataset.classes), device, tell)
        batches = shuffled_batches(dataset, model, args.batch)
        own, = train.classifier(model).values() or [None]
        if own is None and head != "own":
            raise UserError(f"{settings.model} has no linear head: add --head own")
        if own is not None and not own.weight.any():
            tell(f"head      {settings.model} begins with a zero head, through which no gradient "
                 f"passes; taken: {head}")
        if head == "zero":
            nn.init.zeros_(own.weight)
        elif head == "lecun":
            torch.manual_seed(data.key(settings.seed, 3))
            vit.lecun_normal_(own.weight)
        budget, plan = int(args.memory * 2**30), None
        part = (f"{'initialised' if fresh else 'trained'}, seed {settings.seed}, {head} head, "
                f"activation {activation}, statistics {statistics}, {args.projections} "
                f"projections, {args.images} images by {args.batch}, batch")

        def measure(i):
            x, mode = batches[i](), ReluForGelu() if activation == "relu" else nullcontext()
            with mode:
                if statistics == "batch":
                    measure_statistics(model, x)
                found = ntk(model, x, args.projections, data.key(settings.seed, i), budget, plan)
            return {k: found[k] for k in ("condition", "resolved", "eigenvalues")}

        units = {f"{part} {i}": functools.partial(measure, i) for i in range(len(batches))}
        if units.keys() - results.parts.get(name, {}).keys():
            try:
                plan = ntk_plan(model, batches[0](), args.projections, budget)
            except ValueError as error:
                raise UserError(f"--memory: {error}") from None
            tell(f"memory    {plan['bytes'] / 2**30:.2f} GiB beside the network, for "
                 f"{plan['images']} images and {plan['directions']} outputs at once; the Jacobian "
                 f"has {plan['jacobian'] / 2**30:.2f} GiB")
        share_out(results, name, units, "ntk")
        found = [results.parts[name][unit] for unit in units]
        summaries[name], shown[name] = ntk_summary(found), settings.model
        unresolved = sum(not of["resolved"] for of in found)
        if unresolved:
            tell(f"{name}: in {unresolved} of {len(found)} batches λ_min is lost in the rounding "
                 f"of {settings.dtype}" + "; try --dtype float64" * (settings.dtype != "float64"))
    if train.rank() == 0:
        print_rows([{"NTK": name} | {key: value if isinstance(value, int) else significant(value)
                                     for key, value in summary.items() if key != "spectrum"}
                    | {"Table 1": TABLE_1_NTK.get(shown[name])}
                    for name, summary in summaries.items()])
        figure(results.path.with_suffix(".png"), lambda axes: draw_ntk(axes, summaries))
        tell(f"results   {results.path}")
    return results.parts


def ntk_summary(found):
    """Of batches: mean, standard deviation and median of κ over those that have one, and the mean
    of each eigenvalue with the ratio of these means, which a λ_min near zero disturbs less."""
    kappa = [of["condition"] for of in found if of["condition"] is not None]
    spectrum = np.mean([of["eigenvalues"] for of in found], axis=0).tolist()
    return {"κ": float(np.mean(kappa)) if kappa else None,
            "±": float(np.std(kappa, ddof=1)) if len(kappa) > 1 else None,
            "median": float(np.median(kappa)) if kappa else None,
            "λ_max": spectrum[0], "λ_min": spectrum[-1],
            "λ_max / λ_min": spectrum[0] / spectrum[-1] if spectrum[-1] > 0 else None,
            "batches": len(found), "spectrum": spectrum}


def significant(number):
    return None if number is None else f"{number:.4g}"


def draw_ntk(axes, summaries):
    for name, summary in summaries.items():
        spectrum = [v for v in summary["spectrum"] if v > 0]
        kappa = "" if summary["κ"] is None else f", κ = {summary['κ']:.3g}"
        axes.plot(range(1, len(spectrum) + 1), spectrum, ".-", label=name + kappa)
    axes.set_yscale("log")
    axes.set_xlabel("index i")
    axes.set_ylabel("mean eigenvalue λ_i of the tangent kernel")
    axes.legend(fontsize=6)


# ------------------------------------------------------------------------------- norms and sparsity

ACTIVATIONS = (F.gelu, F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu,
               torch.Tensor.relu_)
UNIT = 1024  # images that are measured and written together
TABLE_3 = {"vit_b16": (269.3, 104.9, 104.3, 138.1), "vit_b16, SAM": (353.8, 117.0, 120.3, 97.2),
           "mixer_b16": (197.6, 96.7, 135.1, 74.9), "mixer_b16, SAM": (389.9, 110.9, 176.0, 216.1)}


class Watched(TorchFunctionMode):
    """Under it take(name, values) is called with what each ReLU and GELU returns, be it a module or
    a function: named by the module at work and, from the second in one pass on, a number."""

    def __init__(self, model, take):
        super().__init__()
        self.model, self.take, self.at_work, self.calls = model, take, [], {}

    def __enter__(self):
        self.handles = [handle for name, module in self.model.named_modules() for handle in (
            module.register_forward_pre_hook(functools.partial(self.begins, name)),
            module.register_forward_hook(self.ends))]
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*error)

    def begins(self, name, module, args):
        if not self.at_work:
            self.calls.clear()  # a new pass
        self.at_work.append(name)

    def ends(self, module, args, output):
        self.at_work.pop()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        values = function(*args, **(kwargs or {}))
        if function in ACTIVATIONS:
            name = self.at_work[-1]
            self.calls[name] = self.calls.get(name, 0) + 1
            self.take(name + f" {self.calls[name]}" * (self.calls[name] > 1), values)
        return values


def blocks_of(model):
    """{module's name: its block's}: of those around it the innermost whose name ends in a digit and
    that has modules of its own, such as blocks.3, layer1.0; "" for a stem and what is outside."""
    modules, blocks = dict(model.named_modules()), {}
    for name in modules:
        path = name.split(".")
        around = [".".join(path[:i]) for i in range(len(path), 0, -1)]
        blocks[name] = next((block for block in around if block[-1:].isdigit()
                             and "stem" not in block and any(modules[block].children())), "")
    return blocks


@torch.no_grad()
def activity(model, batches):
    """What norms and sparsity are made of, as sums over images. -> dict: images, their number;
    activations {name: [block, values above zero, values, Σ of an image's ℓ2 norm]} of each ReLU's
    and GELU's output in order; outputs {block: Σ of an image's ℓ2 norm} of the block's output.
    Evaluation mode; one forward pass for each batch."""
    blocks, found, outputs, images = blocks_of(model), {}, {}, 0

    def norm(values):
        return torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float64).sum()

    def take(name, values):
        of = found.setdefault(name, [blocks[name.partition(" ")[0]], 0, 0, 0])
        of[1:] = of[1] + (values > 0).sum(), of[2] + values.numel(), of[3] + norm(values)

    def put(block, module, args, kwargs, output):
        if isinstance(output, torch.Tensor):  # a stage of blocks may return several
            outputs[block] = outputs.get(block, 0) + norm(output)

    device = next(model.parameters()).device
    with (exactly(model, device), Watched(model, take),
          hooked(model, put, set(blocks.values()) - {""})):
        for x, _ in batches:
            model(x)
            images += len(x)
    active = {block for block, *_ in found.values()}
    return dict(images=images, outputs={b: float(v) for b, v in outputs.items() if b in active},
                activations={name: [block, int(active), n, float(length)]
                             for name, (block, active, n, length) in found.items()})


def added(parts):
    """activity of all images from those of disjoint parts of them."""
    first, *others = parts
    total = copy.deepcopy(first)
    for part in others:
        total["images"] += part["images"]
        for block, length in part["outputs"].items():
            total["outputs"][block] += length
        for name, (_, *sums) in part["activations"].items():
            total["activations"][name][1:] = map(sum, zip(total["activations"][name][1:], sums))
    return total


def norms(model, sums):
    """Chen et al. Table 3 from activity's sums: ‖w‖₂, over all parameters, biases and norms' too,
    and for each block k the mean over images of ‖a_k‖₂, over an image's tokens or pixels and
    neurons. The post-activation a_k = f_k(h_k) is what the activation function returns (§4.4); of
    several in a block the last: a Mixer's channel MLP, a ResNet's last ReLU. As the paper's words
    also fit it, output is the same of what the block returns.
    -> dict: weights, activation {block: …}, output {block: …}."""
    last = {block: length for block, _, _, length in sums["activations"].values() if block}
    weights = sum(p.detach().double().square().sum() for p in model.parameters()).sqrt().item()
    return dict(weights=weights) | {name: {block: length / sums["images"]
                                           for block, length in of.items()}
                                    for name, of in (("activation", last),
                                                     ("output", sums["outputs"]))}


def sparsity(sums):
    """Chen et al. Fig. 2 (right), §4.4 from activity's sums: the share of active neurons, those
    above zero after the activation function, over all images, tokens or pixels, and neurons. GELU
    is above zero where its input is, so there too a neuron with a negative value counts as not
    active. -> dict: block {block: share}, all its functions together (a Mixer's two MLPs, a
    ResNet's ReLUs); activation {name: share} of each, also outside blocks."""
    of_block = {}
    for block, active, n, _ in sums["activations"].values():
        if block:
            of_block[block] = [a + b for a, b in zip(of_block.get(block, (0, 0)), (active, n))]
    return dict(block={block: active / n for block, (active, n) in of_block.items()},
                activation={name: active / n
                            for name, (_, active, n, _) in sums["activations"].items()})


def measured(args, rest, what, of):
    """Both subcommands: of(model, sums) of each network, from `what`.json or computed. -> Results,
    {network: (its model's name, numbers)}."""
    results, device, named = started(args, rest, what, untrained=True)
    tell = train.say if train.rank() == 0 else lambda text="": None
    found = {}
    for name, settings, origin in named:
        part = f"{args.images} images"
        if part not in results.parts.get(name, {}):
            dataset = training_images(settings, device, args.images, tell)
            model = train.starting_network(settings, origin, len(dataset.classes), device, tell)
            workers = train.worker_count(settings, dataset,
                                         int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

            def batches(start):
                stop = min(start + UNIT, len(dataset))
                order = [[(0, i) for i in range(first, min(first + 64, stop))]
                         for first in range(start, stop, 64)]
                for x, y in data.batches(data.loader(dataset, order, workers), train.say):
                    yield train.to_float(x.to(device), model), y

            units = {f"{part}, from {start}": lambda start=start: activity(model, batches(start))
                     for start in range(0, len(dataset), UNIT)}
            share_out(results, name, units, what)
            done = results.parts[name]
            results.put(name, part, of(model, added([done.pop(unit) for unit in units])))
        found[name] = settings.model, results.parts[name][part]
    return results, found


def norms_command(args, rest):
    """The norms of networks' weights and of the activations of their blocks, a mean over training
    images (Chen et al. Table 3). Returns what the JSON holds under "results"."""
    results, found = measured(args, rest, "norms", norms)
    if train.rank() == 0:
        rows = []
        for name, (_, numbers) in found.items():
            rows.append({"network": name, "‖w‖": numbers["weights"]})
            for key, symbol in (("activation", "a"), ("output", "x")):
                values = list(numbers[key].values())
                for i, which in ((0, "1"), ((len(values) - 1) // 2, "mid"), (-1, "last")):
                    rows[-1][f"‖{symbol}_{which}‖"] = values[i] if values else None
        rows += [{"network": f"Table 3, {name}"} | dict(zip(list(rows[0])[1:], values))
                 | dict.fromkeys(list(rows[0])[5:]) for name, values in TABLE_3.items()
                 if name.partition(",")[0] in {model for model, _ in found.values()}]
        print_rows(rows)
        train.say("a_k: after the activation function of block k, x_k: the block's output; mid: "
                  + "; ".join(f"{(len(of['activation']) + 1) // 2} of {len(of['activation'])}"
                              for _, of in found.values()))
        figure(results.path.with_suffix(".png"), lambda axes: draw_blocks(
            axes, {name: of["activation"] for name, (_, of) in found.items()},
            "mean norm after the activation, ‖a_k‖"))
        train.say(f"results   {results.path}")
    return results.parts


def sparsity_command(args, rest):
    """The share of active neurons in each block of networks, on training images (Chen et al. Fig. 2
    right, §4.4). Returns what the JSON holds under "results"."""
    results, found = measured(args, rest, "sparsity", lambda _, sums: sparsity(sums))
    shares = {name: {block: 100 * share for block, share in of["block"].items()}
              for name, (_, of) in found.items()}
    if not all(shares.values()):
        raise UserError("no ReLU or GELU in a block of " + next(n for n in shares if not shares[n]))
    if train.rank() == 0:
        print_rows([{"active neurons %": name, "mean": sum(of.values()) / len(of)}
                    | {f"block {i + 1}": dict(enumerate(of.values())).get(i)
                       for i in range(max(map(len, shares.values())))}
                    for name, of in shares.items()])
        figure(results.path.with_suffix(".png"),
               lambda axes: draw_blocks(axes, shares, "active neurons (%)"))
        train.say(f"results   {results.path}")
    return results.parts


def draw_blocks(axes, networks, what):
    """A curve over blocks for each network."""
    for name, of in networks.items():
        axes.plot(range(1, len(of) + 1), list(of.values()), "o-", label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block k")
    axes.set_ylabel(what)
    axes.legend(fontsize=6)


# ----------------------------------------------------------------------------------- many trainings

def outcome(args):
    """How the run with these settings ended: dict of top1 in percent and nll on the validation set,
    None where it diverged, and diverged; or None, if it has not ended or not begun. UserError if
    its folder holds a run with other settings."""
    folder = train.RunFolder(args.out_dir)
    config, log = folder.path / "config.json", folder.path / "log.jsonl"
    if not config.exists():
        return None
    # --init-from decides on mean and std, after the settings were read
    folder.compare({k: v for k, v in vars(args).items() if k not in ("mean", "std")})
    try:
        records = [json.loads(line) for line in log.read_text().splitlines()]
    except (OSError, ValueError):  # half a line, cut by a kill
        return None
    end = records[-1] if records else {}
    if json.loads(config.read_text())["settings"]["max_steps"] != args.max_steps:
        return None
    if "final" in end:
        numbers = end["final"]["validation"]
        losses = [record["loss"] for record in records if "loss" in record]
        if numbers["nll"] is not None and None not in losses[-1:]:
            return dict(top1=numbers["top1"], nll=numbers["nll"], diverged=False)
    elif "diverged" not in end:
        return None
    return dict(top1=None, nll=None, diverged=True)


def child_environment(device):
    """For a child that trains alone, on this process's device."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith(("RANK", "WORLD_SIZE"))
                   and not k.startswith(("MASTER_", "TORCHELASTIC_"))} | {"PYTHONUNBUFFERED": "1"}
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if visible != [""] else [str(i) for i in range(torch.cuda.device_count())]
        local = int(os.environ["LOCAL_RANK"])
        if local >= len(names):
            raise UserError(f"{local + 1} processes or more for {len(names)} CUDA devices: use "
                            f"--nproc_per_node={len(names)}")
        environment["CUDA_VISIBLE_DEVICES"] = names[local]
    return environment


def train_one(argv, folder, environment):
    """train.py in a process of its own, whose memory, device and failures end with it; what it
    prints goes to FOLDER/output.txt. -> its exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "ab") as output:
        # In a session of its own, it is told of Ctrl-C once, by the lines below.
        child = subprocess.Popen([sys.executable, train.__file__, *argv], stdout=output,
                                 stderr=output, env=environment, start_new_session=True)
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.terminate()  # it saves and ends
            child.wait()
            raise


def conduct(what, jobs, folder):
    """Trains {name: flags of train.py}, each in FOLDER/NAME; -> {name: its outcome}. What ended
    before is not trained again, what was stopped goes on. Processes of torchrun share the
    trainings, the longest first; on several machines they need a folder that all of them see."""
    chosen = {name: train.settings([*flags, "--out-dir", str(folder / name), "--resume"])[0]
              for name, flags in jobs.items()}
    ended = train.on_main(lambda: {name: outcome(args) for name, args in chosen.items()})
    todo = [name for name in chosen if ended[name] is None]
    if train.rank() == 0:
        train.say(f"{what}: {len(jobs)} trainings, {len(jobs) - len(todo)} done before")
    todo.sort(key=lambda name: -chosen[name].epochs)
    own, failure = todo[train.rank()::int(os.environ.get("WORLD_SIZE", 1))], None
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in tqdm(own, unit="training", disable=train.rank() > 0 or not sys.stderr.isatty()):
            args = chosen[name]
            flags = [*jobs[name], "--out-dir", args.out_dir, "--resume"]
            if on_machine > 1 and args.workers is None and args.dataset not in train.IN_MEMORY:
                flags += ["--workers", str(max(1, min(8, data.usable_cores() // on_machine)))]
            status = train_one(flags, folder / name, child_environment(args.device))
            ended[name] = outcome(args)
            if ended[name] is None:
                text = (folder / name / "output.txt").read_text(errors="replace")
                raise UserError(f"{folder / name} ended with status {status}: "
                                f"{(text.splitlines() or ['without a word'])[-1]}")
            train.say(f"{name}: " + ("diverged" if ended[name]["diverged"] else
                                     f"top-1 {ended[name]['top1']:.2f} %"))
    except UserError as error:
        failure = str(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    shares = [({name: ended[name] for name in own}, failure)]
    if dist.is_initialized():
        shares *= dist.get_world_size()
        dist.all_gather_object(shares, shares[train.rank()])
    for share, failure in shares:
        if failure:
            raise UserError(failure)
        ended |= share
    return ended


def join_processes():
    """Those of torchrun, which agree on the CPU only and wait for one another as long as the
    longest training takes."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=1000))


def as_flags(values):
    """{setting: value} as words of a command line; what is None is left out."""
    given = argparse.Namespace(**values)
    return [word for name, value in values.items() if value is not None
            for word in train.as_flag(name, given)]


def refuse(flags, origin, why):
    """Those of train.py's flags that the command line may not set."""
    for flag in flags:
        if origin[flag] == "command line":
            raise UserError(f"--{flag.replace('_', '-')} {why}")


def print_rows(rows):
    """A table of dicts with the same keys; numbers have two decimals, None is -."""
    text = [list(rows[0])] + [["-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v)
                               for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text)]
    for line in text:
        cells = [f"{cell:>{width}}" for cell, width in zip(line, widths)]
        train.say("  ".join([line[0].ljust(widths[0]), *cells[1:]]))


# ---------------------------------------------------------------------------------------- stability

XIAO_MODELS = [f"{family}_{size}" for family, sizes in (
    ("vit_p", ("1gf", "4gf", "18gf")), ("vit_c", ("1gf", "4gf", "18gf")),
    ("regnety", ("1gf", "4gf", "16gf"))) for size in sizes]
NOT_OF_RUNS = ("resume", "eval_only", "list_models", "list_recipes", "download", "dry_run")
STUDIES = {  # models; the values of what is varied
    "length": (XIAO_MODELS, dict(optimizer=["best"], epochs=[50, 100, 200, 400])),  # Xiao Fig. 2
    "optimizer": (XIAO_MODELS, dict(optimizer=["adamw", "sgd"],                      # Xiao Fig. 3
                                    epochs=[50, 100, 200, 400])),
    "lr-wd": (XIAO_MODELS, dict(optimizer=["adamw", "sgd"], epochs=[50])),        # Xiao Fig. 4, 5
    "rho": (["vit_b16", "mixer_b16"], dict(                                         # Chen Table 10
        sam_rho=[0, 0.05, 0.1, 0.2, 0.25, 0.35, 0.4, 0.5, 0.6, 0.65])),
    "grid": (["mixer_b16"], dict(lr=[3e-3, 1e-3], weight_decay=[0.3, 0.1, 0.03],      # Chen App. E
                                 dropout=[0.1, 0.0], drop_path=[0.1, 0.0])),
    "doubled": (["vit_b16", "mixer_b16"], dict(epochs=[300, 600])),                   # Chen App. F
}
OF_XIAO = ("length", "optimizer", "lr-wd")  # their learning rate and weight decay are optimal ones
PAPER = {  # top-1 that the paper reports: {study: {model: {values of what is varied: number}}}
    "rho": {"vit_b16": {(0,): 74.6, (0.05,): 77.5, (0.1,): 78.8, (0.2,): 79.9, (0.25,): 79.3},
            "mixer_b16": {(0,): 66.4, (0.05,): 69.5, (0.25,): 74.1, (0.35,): 74.7, (0.4,): 75.6,
                          (0.5,): 76.9, (0.6,): 77.4, (0.65,): 77.1}},
    "grid": {"mixer_b16": {(3e-3, 0.3, 0.0, 0.1): 66.4}},  # what Table 8 chose
    "doubled": {"vit_b16": {(300,): 74.6, (600,): "no gain"},
                "mixer_b16": {(300,): 66.4, (600,): "no gain"}},
}
# Xiao Table 4 (arXiv v3, Appendix E): lr and weight decay at batch 2048, the optima for 50 epochs
# on ImageNet and the intervals of the random pairs.
OPTIMA = {
    "adamw": {"regnety": (3.8e-3, 0.1), "vit_p_1gf": (2e-3, 0.2), "vit_p_4gf": (2e-3, 0.2),
              "vit_p_18gf": (1e-3, 0.24), "vit_c_1gf": (2.5e-3, 0.19), "vit_c_4gf": (1e-3, 0.24),
              "vit_c_18gf": (1e-3, 0.24)},
    "sgd": {"regnety": (2.54, 2.4e-5), "vit_p_1gf": (1.9, 1.3e-5), "vit_p_4gf": (1.9, 1.3e-5),
            "vit_p_18gf": (1.1, 1.2e-5), "vit_c_1gf": (1.9, 1.3e-5), "vit_c_4gf": (1.3, 2.2e-5),
            "vit_c_18gf": (1.1, 2.7e-5)}}
INTERVALS = {
    "adamw": {"regnety": ((1.25e-3, 4e-2), (7.5e-3, 0.24)), "vit": ((2.5e-4, 8e-3), (0.02, 0.8))},
    "sgd": {"regnety": ((0.25, 8.0), (3e-6, 8e-5)), "vit": ((0.1, 3.2), (4e-6, 1.2e-4))}}
WIDTH = (1 / 8, 4.0)  # of intervals around other optima, as Appendix E made these
TABLE_4 = "Xiao Table 4"


def optimum(model, optimizer, settings, given):
    """(learning rate, weight decay), and the source or, if it has to be looked for, None."""
    if optimizer in given:
        return given[optimizer], "--optimum"
    known = OPTIMA.get(optimizer, {})
    name = "regnety" if train.family(model) == "regnety" else model
    if settings.dataset == "imagenet" and name in known:
        lr, wd = known[name]
        return (three_digits(lr * settings.batch_size / 2048), wd), TABLE_4
    if settings.optimizer == optimizer:
        return (settings.lr, settings.weight_decay), None
    lr, wd = known.get("vit_p_4gf", (1e-3, 0.1))  # for SGD, scaled linearly with the batch
    return (three_digits(lr * settings.batch_size / 2048), wd), None


def interval(model, values, settings, source):
    """((lowest, highest) learning rate, weight decay) of random pairs around an optimum."""
    if source == TABLE_4:
        lr, wd = INTERVALS[values["optimizer"]][
            "regnety" if train.family(model) == "regnety" else "vit"]
        return [x * settings.batch_size / 2048 for x in lr], wd
    return [[values[name] * width for width in WIDTH] for name in ("lr", "weight_decay")]


def search(starts, top1_of, factor=3):
    """{key: (lr, wd)} -> {key: the (lr, wd) that none of its four neighbours, a factor away in one
    of both, surpasses}, found by going to the best neighbour. top1_of: [(key, lr, wd)] -> their
    top-1, None where training diverged; asked for many at once, never twice for one."""
    place, found = dict.fromkeys(starts, (0, 0)), {}

    def at(key, i, j):
        return key, three_digits(starts[key][0] * factor ** i), three_digits(
            starts[key][1] * factor ** j)

    moving = list(starts)
    while moving:
        near = {key: [(i, j), (i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
                for key in moving for i, j in [place[key]]}
        new = [point for key in moving for ij in near[key]
               if (point := at(key, *ij)) not in found]
        found |= zip(new, (-1 if top1 is None else top1 for top1 in top1_of(new)))
        place |= {key: max(near[key], key=lambda ij: found[at(key, *ij)]) for key in moving}
        moving = [key for key in moving if place[key] != near[key][0]]
    return {key: at(key, *place[key])[1:] for key in starts}


def three_digits(x):
    return float(f"{x:.3g}")


def random_pairs(n, lr, wd, seed):
    """n pairs of learning rate and weight decay, log-uniform in the intervals lr and wd. Pair k
    depends on (seed, k) alone, and lies at the same place of the interval for every model."""
    return [tuple(three_digits(low * (high / low) ** u) for u, (low, high) in zip(row, (lr, wd)))
            for row in data.uniforms(data.keys(seed, np.arange(n)), 2).tolist()]


def stand_in(top1):
    """{epochs: top-1, None of a run that diverged} -> the same, with the best of the shorter runs
    in a diverged one's place (Xiao Fig. 3); None stays where there is none."""
    return {epochs: max((v for e, v in top1.items() if e < epochs and v is not None), default=None)
            if value is None else value for epochs, value in top1.items()}


def edf(errors):
    """Error distribution function (Xiao §5.3): the errors in ascending order, and of each the share
    of all that is not above it. None, a run that diverged, counts and is never reached."""
    reached = sorted(error for error in errors if error is not None)
    return reached, [(i + 1) / len(errors) for i in range(len(reached))]


def group(runs, *names):
    """{values of names: [runs]}, the values of several names as a tuple."""
    groups = {}
    for run in runs:
        values = tuple(run[name] for name in names)
        groups.setdefault(values if len(names) > 1 else values[0], []).append(run)
    return groups


def longest(runs):
    return max(runs, key=lambda run: run["epochs"])


def best(runs):
    return max(runs, key=lambda run: -1 if run["diverged"] else run["top1"])


# study -> what its runs have in common with the one they are compared with; which one that is
COMPARED = {"length": (["model", "optimizer"], longest),
            "optimizer": (["model", "epochs"], lambda runs: runs[0]),  # by default AdamW
            "lr-wd": (["model", "optimizer"], best)} | dict.fromkeys(
    ("rho", "grid", "doubled"), (["model"], best))


def compare(study, runs):
    """Gives each run "compared", its top-1 or what stands in for it, and "delta", by how many
    points that is below the one of the longest run of the model (length), of AdamW (optimizer), or
    of the best run (others)."""
    for run in runs:
        run["compared"] = run["top1"]
    if study in ("length", "optimizer"):
        for own in group(runs, "model", "optimizer").values():
            filled = stand_in({run["epochs"]: run["top1"] for run in own})
            for run in own:
                run["compared"] = filled[run["epochs"]]
    names, which = COMPARED[study]
    for own in group(runs, *names).values():
        reference = which(own)["compared"]
        for run in own:
            lacks = None in (reference, run["compared"])
            run["delta"] = None if lacks else reference - run["compared"]


def cell(run, key):
    """A run's number in a table; * marks a run that diverged."""
    return "*" if run[key] is None else f"{run[key]:.2f}" + "*" * run["diverged"]


def stability_rows(study, runs, axes):
    """The study's table, for print_rows."""
    if study == "length":
        return [{"Δ top-1 to the longest": f"{model}, {optimizer}"} | {
            f"{run['epochs']} epochs": cell(run, "delta") for run in own} | {
            "top-1 %": cell(longest(own), "compared")}
            for (model, optimizer), own in group(runs, "model", "optimizer").items()]
    if study == "optimizer":
        return [{"model": model, "epochs": epochs} | {
            f"{run['optimizer']} %": cell(run, "compared") for run in own} | {
            "Δ": cell(own[-1], "delta")}
            for (model, epochs), own in group(runs, "model", "epochs").items()]
    if study == "lr-wd":
        return [{"model": model, "optimizer": optimizer, "best top-1 %": cell(best(own), "top1"),
                 "lr": f"{best(own)['lr']:g}", "wd": f"{best(own)['weight_decay']:g}"} | {
                f"Δ ≤ {most}": f"{sum(not r['diverged'] and r['delta'] <= most for r in pairs)}"
                               f" of {len(pairs)}" for most in (1, 2, 4, 10)} | {
                "diverged": sum(run["diverged"] for run in pairs)}
                for (model, optimizer), own in group(runs, "model", "optimizer").items()
                for pairs in [[run for run in own if run["random"]]]]
    paper = PAPER[study]
    return [{"model": run["model"]} | {name: f"{run[name]:g}" for name in axes} | {
        "top-1 %": cell(run, "top1"),
        "paper": paper.get(run["model"], {}).get(tuple(run[name] for name in axes))}
        for run in runs]


def draw_length(axes, runs):
    """Xiao Fig. 2."""
    for model, own in group(runs, "model").items():
        axes.plot([run["epochs"] for run in own],
                  [math.nan if run["delta"] is None else run["delta"] for run in own], "o-",
                  label=model)
    axes.set_xscale("log", base=2)
    axes.set_xticks(*[list(group(runs, "epochs"))] * 2)
    axes.set_xlabel("epochs")
    axes.set_ylabel("Δ top-1 to the longest (points)")
    axes.legend(fontsize=6)


def draw_optimizer(axes, runs):
    """Xiao Fig. 3: dashed where a run diverged and the best shorter one stands in."""
    for color, own in enumerate(group(runs, "model").values()):
        for optimizer, line in group(own, "optimizer").items():
            points = [(run["epochs"], math.nan if run["compared"] is None else run["compared"])
                      for run in line]
            for run, *ends in zip(line[1:], points, points[1:]):
                axes.plot(*zip(*ends), "--" if run["diverged"] else "-", color=f"C{color}")
            axes.plot(*zip(*points), {"adamw": "^", "sgd": "v"}.get(optimizer, "o"),
                      color=f"C{color}", label=f"{own[0]['model']}, {optimizer}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(*[list(group(runs, "epochs"))] * 2)
    axes.set_xlabel("epochs")
    axes.set_ylabel("top-1 (%)")
    axes.legend(fontsize=6)


def draw_pairs(grid, runs):
    """Xiao Fig. 4 and 5, an optimizer a row: errors of the random pairs and, as vertical bars, the
    optima; error distribution functions, which end below 1 where runs diverged."""
    for row, (optimizer, chosen) in zip(np.atleast_2d(grid), group(runs, "optimizer").items()):
        for color, (model, own) in enumerate(group(chosen, "model").items()):
            style, pairs = dict(color=f"C{color}"), [run for run in own if run["random"]]
            reached = [run for run in pairs if not run["diverged"]]
            for axes, (name, x) in zip(row, (("lr", lambda r: r["lr"]),
                                             ("wd", lambda r: r["weight_decay"]),
                                             ("lr · wd", lambda r: r["lr"] * r["weight_decay"]))):
                error = [100 - run["top1"] for run in reached]
                axes.scatter([x(run) for run in reached], error, 8, **style)
                for run in own:
                    if not run["random"]:
                        axes.axvline(x(run), **style, alpha=0.5)
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter("")
                axes.set_xlabel(f"{name} ({optimizer})")
                axes.set_ylabel("top-1 error (%)")
            errors, shares = edf([run["delta"] for run in pairs])
            row[3].step([0, *errors], [0, *shares], where="post", label=model, **style)
        row[3].set_ylim(0, 1)
        row[3].set_xlabel(f"Δ top-1 error to the best (points, {optimizer})")
        row[3].set_ylabel("share of runs")
        row[3].legend(fontsize=6)


def draw_values(axes, runs, study, names):
    """Top-1 of each set of values, and the paper's."""
    labels = {tuple(run[name] for name in names): None for run in runs}
    for color, (model, own) in enumerate(group(runs, "model").items()):
        style, paper = dict(color=f"C{color}"), PAPER[study].get(model, {})
        for source, marker, top1 in ((model, "o-", {tuple(r[n] for n in names): r["top1"]
                                                    for r in own}), ("paper", "x", paper)):
            shown = [(i, top1[v]) for i, v in enumerate(labels)
                     if isinstance(top1.get(v), float)]
            if shown:
                axes.plot(*zip(*shown), marker, label=f"{source}, {model}" if marker == "x"
                          else model, **style)
    axes.set_xticks(range(len(labels)), [" ".join(f"{v:g}" for v in values) for values in labels],
                    rotation=90, fontsize=6)
    axes.set_xlabel(", ".join(name.replace("_", " ") for name in names))
    axes.set_ylabel("top-1 (%)")
    axes.legend(fontsize=6)


DRAW = {"length": draw_length, "optimizer": draw_optimizer, "lr-wd": draw_pairs}


def number(word):
    """A value of --vary: an integer, a number or a word."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def values_of(study, vary):
    """The study's {setting: values}, with those of --vary in their places."""
    axes = dict(STUDIES[study][1])
    for name, *words in vary:
        name = name.replace("-", "_")
        if name not in axes or not words:
            raise UserError(f"--vary {' '.join([name, *words])}: {study} varies "
                            f"{' and '.join(axes)}; give one of these and its values")
        axes[name] = list(dict.fromkeys(map(number, words)))
    if study == "lr-wd" and len(axes["epochs"]) > 1:
        raise UserError("--vary epochs: all runs of lr-wd are of one length")
    return axes


def stability(args, rest):
    """Studies of many trainings. Xiao et al.: how top-1 depends on the length of training, on the
    optimizer (§5.1, §5.2), and on learning rate and weight decay, in random pairs of these around
    the optimum (§5.3). Chen et al.: SAM's ρ (Table 10), the Mixer's grid (Appendix E), twice the
    epochs (Appendix F). Learning rates and weight decays of Xiao's studies are their Table 4's, or
    else optima that are looked for first, at the shortest length. Each training is a run of
    train.py in OUT/runs, which studies with the same --out-dir have in common. Returns what the
    JSON holds under "results"."""
    join_processes()
    study, folder, tell = args.study, Path(args.out_dir or "out/stability"), train.say
    if train.rank() > 0:
        tell = lambda text="": None
    axes, given = values_of(study, args.vary), {}
    if args.pairs < 1:
        raise UserError(f"--pairs is {args.pairs}; it must be at least 1")
    for optimizer, *pair in args.optimum:
        try:
            given[optimizer] = tuple(map(float, pair))
        except ValueError:
            raise UserError(f"--optimum {optimizer} {' '.join(pair)}: give an optimizer, a "
                            "learning rate and a weight decay, as adamw 1e-3 0.1") from None
    if any(word.split("=")[0] == "--model" for word in rest):
        raise UserError("--model: a study has --models")

    # ---- what all trainings of a model have in common
    base, settings = {}, {}
    for model in dict.fromkeys(args.models or STUDIES[study][0]):
        try:
            base[model] = ["--model", *shlex.split(model), *rest]
        except ValueError as error:
            raise UserError(f"--models {model!r}: {error}") from None
        chosen, origin = train.settings(base[model])
        refuse(axes, origin, "is what the study varies: --vary gives its values")
        refuse(("lr", "weight_decay") * (study in OF_XIAO), origin,
               "is the optimal one in this study: --optimum OPTIMIZER LR WD sets it")
        refuse(("nesterov", "lr_end") * (study in OF_XIAO), origin,
               "goes with the optimizer and the learning rate, which this study sets")
        refuse(NOT_OF_RUNS, origin, "is for train.py; analyze.py goes on by itself when it is "
                                    "started again")
        train.check_network(chosen)
        settings[model] = chosen
        tell(f"model     {model}: recipe {chosen.recipe}")

    def job(model, values):
        """A training's name and flags."""
        parts = [v if isinstance(v, str) else f"{name}{v:g}" for name, v in values.items()]
        name = "-".join([re.sub(r"[^\w.]+", "-", model).strip("-"), *parts])
        if study in OF_XIAO:  # what goes with these; in their code SGD is Nesterov's
            own = settings[model]
            values = values | dict(nesterov=values["optimizer"] == "sgd", lr_end=three_digits(
                own.lr_end * values["lr"] / own.lr))
        return name, [*base[model], *as_flags(values)]

    def trained(what, trainings):
        """[(model, values)] -> [dict of these, the run's name and how it ended]."""
        jobs = [job(*training) for training in trainings]
        ended = conduct(what, dict(jobs), folder / "runs")
        return [dict(model=model, run=name) | values | ended[name]
                for (model, values), (name, _) in zip(trainings, jobs)]

    # ---- which trainings
    results = None if args.dry_run else Results(folder, study)
    trainings = [(model, dict(zip(axes, values))) for model in base
                 for values in itertools.product(*axes.values())]
    if study == "rho" and not args.vary:  # Table 10 has other values for each model
        trainings = [(model, values) for model, values in trainings
                     if (values["sam_rho"],) in PAPER[study].get(model, [(values["sam_rho"],)])]
    optima, sources, shortest = {}, {}, min(axes.get("epochs", [0]))
    if study in OF_XIAO:
        for model, values in trainings:
            if values["optimizer"] == "best":  # §5.1: AdamW for ViT, SGD for CNNs
                of_vit = train.family(settings[model].model) in ("vit", "pit", "mixer", "swin")
                values["optimizer"] = "adamw" if of_vit else "sgd"
        for key in dict.fromkeys((model, values["optimizer"]) for model, values in trainings):
            optima[key], sources[key] = optimum(*key, settings[key[0]], given)
        starts = {key: pair for key, pair in optima.items() if not sources[key]}
        if not args.dry_run:
            optima |= search(starts, lambda points: [run["top1"] for run in trained(
                f"search at {shortest} epochs", [(model, dict(
                    optimizer=optimizer, epochs=shortest, lr=lr, weight_decay=wd))
                    for (model, optimizer), lr, wd in points])])
        for (model, optimizer), (lr, wd) in optima.items():
            source = sources[model, optimizer] or (
                "the start of a search" if args.dry_run else "found by the search")
            tell(f"optimum   {model}, {optimizer}: learning rate {lr:g}, weight decay {wd:g}, "
                 f"{source}")
        for model, values in trainings:
            values |= dict(zip(("lr", "weight_decay"), optima[model, values["optimizer"]]))
    if study == "lr-wd":
        trainings += [(model, values | dict(lr=lr, weight_decay=wd))
                      for model, values in trainings for lr, wd in random_pairs(
                          args.pairs, *interval(model, values, settings[model],
                                                sources[model, values["optimizer"]]),
                          settings[model].seed)]
    if args.dry_run:
        for name, flags in (job(*training) for training in trainings):
            tell(f"python train.py {shlex.join(flags)} --out-dir {folder / 'runs' / name} --resume")
        return {}

    # ---- train, save, show
    runs = trained(study, trainings)
    for i, run in enumerate(runs if study == "lr-wd" else []):
        run["random"] = i >= len(optima)  # after those at the optima
    compare(study, runs)
    results.parts = {model: {run["run"]: {k: v for k, v in run.items() if k not in (
        "model", "run")} for run in own} for model, own in group(runs, "model").items()}
    results.settings = {model: {k: v for k, v in vars(chosen).items() if k != "out_dir"}
                        for model, chosen in settings.items()}
    train.on_main(results.write)
    if train.rank() == 0:
        print_rows(stability_rows(study, runs, axes))
        if any(run["diverged"] for run in runs):
            tell("*: diverged" + "; the best shorter run stands in, if there is one"
                 * (study in ("length", "optimizer")))
        rows = len(axes["optimizer"]) if study == "lr-wd" else 1
        draw = DRAW.get(study, functools.partial(draw_values, study=study, names=list(axes)))
        figure(results.path.with_suffix(".png"), lambda axes: draw(axes, runs), rows,
               4 if study == "lr-wd" else 1)
        tell(f"results   {results.path}")
    return results.parts


# ----------------------------------------------------------------------------------------- transfer

HELD_OUT = {"cifar10": "1/50", "cifar100": "1/50", "flowers102": "1/10", "pets": "1/10"}  # Chen E.6
BASE_LR = [0.001, 0.003, 0.01, 0.03]  # Table 11
TABLE_6 = {  # cifar10, cifar100, flowers102, pets
    "resnet50 with SAM": (97.4, 85.2, 90.0, 91.6), "resnet152 with SAM": (98.2, 87.8, 91.1, 93.3),
    "vit_s16": (97.6, 85.7, 86.4, 90.4), "vit_s16 with SAM": (98.2, 87.6, 91.5, 92.9),
    "vit_b16": (98.1, 87.6, 88.5, 91.9), "vit_b16 with SAM": (98.6, 89.1, 91.8, 93.1),
    "mixer_s16": (94.1, 77.9, 83.3, 86.1), "mixer_s16 with SAM": (96.1, 82.4, 87.9, 88.7),
    "mixer_b16": (95.4, 80.0, 82.8, 86.1), "mixer_b16 with SAM": (97.8, 86.4, 90.0, 92.5)}
NOT_INHERITED = ("dropout", "drop_path", "head_bias", "init", "zero_init")  # by fine-tuning


def transfer(args, rest):
    """Accuracy of checkpoints after fine-tuning on other data sets (Chen et al. Table 6, E.6): the
    learning rate of Table 11 that is best on a held-out class-balanced part of the training set
    (10 % of Flowers and Pets, 2 % of CIFAR), training on the others; then a run on all of it, and
    its accuracy on the test set. The recipes are chen_to_DATASET; other data sets take that of
    Flowers. Returns what the JSON holds under "results"."""
    join_processes()
    chosen = networks(args.checkpoint, rest)
    refuse(("dataset", "recipe", "lr", "hold_out"), chosen[0][1], "is chosen by this command")
    folder = Path(args.out_dir or Path(chosen[0][0].init_from).parent)
    results = Results(folder, "transfer")

    def job(settings, content, dataset, lr, hold_out):
        """A run's name and flags."""
        kept = [name for name in train.MODEL_FLAGS if name not in NOT_INHERITED]
        recipe = f"chen_to_{dataset if dataset in HELD_OUT else 'flowers102'}"
        flags = ["--recipe", recipe, *rest, "--reset-head", *as_flags(dict(
            dataset=dataset, init_from=settings.init_from, model=settings.model, lr=lr,
            hold_out=hold_out) | {name: getattr(settings, name) for name in kept})]
        return f"{content}-{dataset}-{'all' if hold_out == '0' else 'part'}-lr{lr:g}", flags

    named = [(*label(settings), settings) for settings, _ in chosen]
    results.settings |= {name: decides for name, decides, _ in named}
    tasks = {(name, dataset): (settings, decides["content"], dataset)
             for name, decides, settings in named for dataset in dict.fromkeys(args.datasets)}
    searches = {key: {lr: job(*task, lr, HELD_OUT.get(key[1], "1/10")) for lr in BASE_LR}
                for key, task in tasks.items()}
    ended = conduct("learning rates", dict(run for own in searches.values()
                                           for run in own.values()), folder / "transfer")
    held_out = {key: {lr: ended[run]["top1"] for lr, (run, _) in own.items()}
                for key, own in searches.items()}
    best_lr = {key: max(top1, key=lambda lr: -1 if top1[lr] is None else top1[lr])
               for key, top1 in held_out.items()}
    finals = {key: job(*task, best_lr[key], "0") for key, task in tasks.items()}
    ended = conduct("whole training sets", dict(finals.values()), folder / "transfer")
    for (name, dataset), (run, _) in finals.items():
        key = name, dataset
        results.put(name, dataset, dict(lr=best_lr[key], run=run, **ended[run], held_out={
            f"{lr:g}": top1 for lr, top1 in held_out[key].items()}))
    if train.rank() == 0:
        tables = {name: {d: results.parts[name][d]["top1"] for d in args.datasets}
                  for name, _, _ in named}
        models = {settings.model for settings, _ in chosen}
        tables |= {f"Table 6, {name}": {d: dict(zip(HELD_OUT, row)).get(d) for d in args.datasets}
                   for name, row in TABLE_6.items() if name.split()[0] in models}
        print_rows([{"top-1 %": name} | row | {"average": None if None in row.values() else
                                               sum(row.values()) / len(row)}
                    for name, row in tables.items()])
        figure(results.path.with_suffix(".png"), lambda axes: draw_transfer(axes, held_out))
        train.say(f"results   {results.path}")
    return results.parts


def draw_transfer(axes, held_out):
    for (name, dataset), top1 in held_out.items():
        axes.plot(list(top1), [math.nan if v is None else v for v in top1.values()], "o-",
                  label=f"{dataset}, {name}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("top-1 on the held-out part (%)")
    axes.legend(fontsize=6)


# --------------------------------------------------------------------------------------------- main

def make_parser():
    parser = train.Parser(allow_abbrev=False, description=__doc__.split("\n\n")[0], epilog=(
        "Further flags are train.py's, such as --data-dir, --device, --dtype, --weights."))
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    parser.commands = commands.choices

    def command(function, summary, of_checkpoints=True):
        name = function.__name__.removesuffix("_command")
        parser = commands.add_parser(name, allow_abbrev=False, help=summary,
                                     description=function.__doc__, epilog=(
            "Further flags are train.py's, such as --data-dir, --device, --dtype, --weights."))
        parser.set_defaults(function=function)
        if of_checkpoints:
            parser.add_argument("--checkpoint", nargs="+", default=[], metavar="FILE",
                                help="of runs of train.py; else --model NAME --init-from FILE")
        parser.add_argument("--out-dir", default="", help="for its files; default: " + (
            "the folder of the first checkpoint" if of_checkpoints else f"out/{name}"))
        return parser.add_argument

    add = command(robustness, "accuracy on benchmarks of robustness (Chen Table 2; Park Fig. 12b)")
    add("--benchmarks", nargs="+", choices=BENCHMARKS, default=["val", "c-lite"], help="val: "
        "held-out images; pgd: these under PGD, 10 steps, ε = 2/255 (Chen E.5); real, v2, r, c: "
        "ImageNet-ReaL, -V2, -R, -C or CIFAR-C, looked for in --data-dir and beside it; c-lite: "
        "our own corruptions of val (default: val c-lite)")

    add = command(ntk_command, "condition number of the neural tangent kernel (Chen Table 1)")
    add("--images", default="1/10", metavar="N", help="of the training set, class-balanced: a "
        "number or a fraction (default: 1/10, Chen Appendix D)")
    add("--batch", type=int, default=48, help="images of a kernel (default: 48, Chen Appendix D)")
    add("--projections", type=int, default=16, help="directions in the space of logits; 0, or not "
        "fewer than there are classes: all logits, exact (default: 16)")
    add("--memory", type=float, default=4.0, metavar="GIB", help="limit beside the network "
        "(default: 4)")
    add("--at", choices=("init", "checkpoint"), default="init", help="the architecture with new "
        "weights, as the paper, or the trained one (default: init)")
    add("--head", choices=("lecun", "own", "zero"), help="last layer: lecun-normal, the network's "
        "own, or zero, with which Θ is the features' Gram matrix (default: lecun; of a checkpoint: "
        "own)")
    add("--activation", choices=("relu", "own"), help="relu: in place of GELU (Chen Appendix D) "
        "(default: relu; of a checkpoint: own)")
    add("--statistics", choices=("batch", "own"), help="of BatchNorm: measured on the batch, or as "
        "they are, 0 and 1 at initialisation (default: batch; of a checkpoint: own)")

    for function, summary in ((norms_command, "norms of weights and activations (Chen Table 3)"),
                              (sparsity_command, "share of active neurons (Chen Fig. 2 right)")):
        add = command(function, summary)
        add("--images", default="1/10", metavar="N", help="of the training set, class-balanced: a "
            "number or a fraction (default: 1/10, Chen §4.4)")

    add = command(stability, "studies of many trainings: length, optimizer, lr-wd (Xiao Fig. 2-5), "
                  "rho (Chen Table 10), grid, doubled (Chen App. E, F)", of_checkpoints=False)
    add("--study", choices=STUDIES, required=True, help="what is varied: " + "; ".join(
        f"{name}: {' × '.join(axes)}" for name, (_, axes) in STUDIES.items()))
    add("--models", nargs="+", metavar="MODEL", help="values of --model, in quotes with further "
        "flags of train.py if wanted, as 'vit_micro8 --stem conv'; default: the paper's")
    add("--vary", nargs="+", action="append", default=[], metavar=("NAME", "VALUE"), help="other "
        "values than the paper's, as: --vary epochs 3 6 12 --vary optimizer sgd")
    add("--optimum", nargs=3, action="append", default=[], metavar=("OPTIMIZER", "LR", "WD"),
        help="length, optimizer, lr-wd: learning rate and weight decay of all models; default: "
        "Xiao Table 4's, where it has some, else a search at the shortest length")
    add("--pairs", type=int, default=64, help="lr-wd: random pairs of each model (Xiao §5.3: 64)")
    add("--dry-run", action="store_true", help="print the trainings and stop")

    add = command(transfer, "accuracy after fine-tuning on other data sets (Chen Table 6)")
    add("--datasets", nargs="+", choices=data.DATASETS, default=list(HELD_OUT), help="(default: "
        "Table 6's)")
    return parser


def answer(program, function):
    """Calls function -> exit status: 0, 2 for what the user has to set right, 130 for Ctrl-C."""
    owns_group, status = not dist.is_initialized(), 0
    try:
        function()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{program}: {error}", file=sys.stderr)
        status = 2
    except data.DataError as error:  # met while reading images, perhaps by this process only
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(2)  # the others wait in a collective that will not come
        status = 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is not finished", file=sys.stderr)
        status = 128 + signal.SIGINT
    if owns_group and dist.is_initialized():
        dist.destroy_process_group()
    return status


def main(argv=None):
    def command():
        args, rest = make_parser().parse_known_args(argv)
        args.function(args, rest)

    return answer("analyze.py", command)


if __name__ == "__main__":
    sys.exit(main())
