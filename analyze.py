"""Tables and figures of the three papers from trained networks: a function and a subcommand each.

    python analyze.py robustness --checkpoint A/ckpt.pt B/ckpt.pt --benchmarks val real v2 pgd r c
        Chen et al. (arXiv 2106.01548) Table 2, 5; Park & Kim (2202.06709) Fig. 12b, E.1
    … hessian, spectrum       Chen Table 1, 3; Park Fig. 1b, 4, 6, C.2b, C.4-C.7
    … landscape, flatness     Chen Fig. 1, B.1; with --augmented --l2 half-square Park Fig. 1a, C.7b
    … ntk, norms, sparsity    Chen Table 1, 3, Fig. 2 right
    … compare                 Chen Table 1 and 3, whole
    … fourier, variance, cka, lesion                  Park Fig. 2a, 8-10, D.1-D.4
    … noise, attention, calibration, nll    Park Fig. 2b, F.1a, 5, 7a, C.1, C.3; Chen Fig. 3, B.2
    … datasize, curves, peak, complexity, throughput  Chen Fig. 2, 4, Table 2, 4, 7; Xiao Fig. 6
    … scale               a training on 1 to 1,024 devices, as expected
    … all, reproduce      every figure that checkpoints allow; the papers in small, with verdicts
    python analyze.py stability --study length        trains many networks: length, optimizer, lr-wd
        (Xiao et al. 2106.14881, Fig. 2-5), rho, grid, doubled (Chen Table 10, App. E, F); --dry-run
    python analyze.py transfer --checkpoint RUN/ckpt.pt --data-dir DATA     Chen Table 6
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
import ctypes
import functools
import hashlib
import html
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

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
from sam import global_norm
from train import AUGMENTS, UserError

AGAIN = "the same command goes on with what is not finished"
NOT_OF_RUNS = ("resume", "eval_only", "list_models", "list_recipes", "download", "dry_run")
BENCHMARKS = ("val", "real", "v2", "pgd", "r", "c", "c-lite")


# ------------------------------------------------------------------------------------------- common


def tell(text=""):
    """Prints a line, by the first process only."""
    if train.rank() == 0:
        train.say(text)


def write(path, content):
    """Bytes to a file, whole or not at all; UserError if it cannot be written."""
    try:
        train.write_file(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


class Results:
    """OUT/NAME.json. `parts` is {network: {part: numbers}}, what is finished, and `settings` what
    decided them, {network: {flag: value}}; `put` adds to them and writes the file. `taken` is what
    was asked for, while the file may have more, of other settings. Only the first process reads and
    writes; all know the same."""

    def __init__(self, folder, name):
        self.path = Path(folder) / f"{name}.json"
        self.parts, self.settings = train.on_main(self.read)
        self.taken = {}
        train.on_main(self.write)  # now, not after an hour, it shows whether that is possible

    def read(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = json.loads(self.path.read_bytes())
            return dict(before["results"]), dict(before["settings"])
        except FileNotFoundError:
            return {}, {}
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"--out-dir {self.path.parent} is, or lies in, a file: name a folder"
            ) from None
        except OSError as error:
            raise UserError(f"--out-dir {self.path.parent}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.path} is damaged: remove it, or choose another --out-dir"
            ) from None

    def write(self):
        versions = dict(
            torch=torch.__version__,
            torchvision=torchvision.__version__,
            python=sys.version.split()[0],
        )
        text = train.to_json(
            dict(results=self.parts, settings=self.settings, versions=versions, command=sys.argv),
            indent=1,
        )
        write(self.path, text)

    def put(self, network, part, numbers):
        self.parts.setdefault(network, {})[part] = numbers
        train.on_main(self.write)

    def take(self, network, part):
        """What is finished of what was asked for."""
        numbers = self.taken.setdefault(network, {})[part] = self.parts[network][part]
        return numbers


def fingerprint(path):
    """Of a file's bytes: results belong to the checkpoint that they were computed from."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


# Settings of train.py that decide a network's numbers; others, as of its training, do not.
DECIDES = (
    *"dataset data_dir eval_split image_size eval_short_side model dtype weights mean std".split(),
    *train.MODEL_FLAGS,
)
LOSSES = {"softmax": train.softmax_loss, "sigmoid": train.sigmoid_loss}
# What of its training further decides the numbers of an analysis of the loss or the weights.
OF_TRAINING = (*"seed train_fraction hold_out micro_batch mixup cutmix decay".split(), *AUGMENTS)
# Flags of train.py that an analysis of networks may read; of the others it says so.
READ = {*train.OF_EVALUATION, "recipe"} - {"adv_eps", "eval_adv", "eval_split"}
OF_TRAINING_IMAGES = "hessian spectrum landscape flatness ntk norms sparsity".split()
READ_BY = {  # and these only some
    "spectrum": (*AUGMENTS, "mixup", "cutmix", "weight_decay", "label_smoothing"),
    "landscape": (*AUGMENTS, "mixup", "cutmix", "weight_decay", "decay", "micro_batch"),
    "flatness": ("micro_batch",),
    "nll": (*AUGMENTS, "mixup", "cutmix", "micro_batch"),
}


def networks(checkpoints, rest, also=(), untrained=False):
    """(settings, {flag: who set it}) of each checkpoint, or of --model with --init-from or, if it
    may be untrained, without. also: the caller's own flags, for hints."""
    files = [
        # one name for one file, as results have it
        ["--init-from", os.path.normpath(f"{path}/ckpt.pt" if os.path.isdir(path) else path)]
        for path in checkpoints
    ] or [[]]
    foreign = any(word.split("=")[0] == "--init-from" for word in rest)
    if checkpoints and foreign or not (checkpoints or foreign or untrained):
        train.settings(rest, also)  # --checkpoint may be misspelt
        raise UserError(
            "needs either --checkpoint RUN/ckpt.pt or --model NAME --init-from FILE"
            + ", or --model NAME alone, untrained" * untrained
        )
    evaluates = ["--eval-only"] * bool(checkpoints or foreign)
    chosen = [train.settings([*evaluates, *rest, *file], also) for file in files]
    for name, instead in (
        ("download", "python train.py --dataset NAME --download --dry-run fetches it"),
        ("dry_run", "an analysis has no such"),
        ("list_models", "an analysis has no such"),
        ("list_recipes", "an analysis has no such"),
        ("resume", "an analysis goes on by itself when it is started again"),
    ):
        if chosen[0][1][name] == "command line":
            raise UserError(f"{train.flag(name)} is for train.py; {instead}")
    return chosen


def tell_unread(origin, what):
    """Tells which flags of train.py on the command line an analysis does not read."""
    read = READ.union(READ_BY.get(what, ()))
    if what in OF_TRAINING_IMAGES or what in ("compare", "nll"):
        read |= {"train_fraction", "hold_out"}
    if what not in OF_TRAINING_IMAGES:
        read |= {"eval_split"}
    unread = [name for name in origin if name not in read and origin[name] == "command line"]
    if unread:
        tell(f"without effect in {what}: {' '.join(map(train.flag, unread))}")


def label(settings, also=()):
    """-> a network's name among results, which is its file and a mark of that and of what decides
    its numbers, and these, {setting: value}: DECIDES and the settings named in also."""
    decides = {name: getattr(settings, name) for name in (*DECIDES, *also)}
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
        return data.load(
            settings.dataset,
            settings.eval_split,
            image_size=settings.image_size,
            data_dir=settings.data_dir,
        ).classes
    except data.DataError as error:
        raise UserError(
            f"{error}; of another project's file, only these tell the class names"
        ) from None


def own_flags(what):
    """A subcommand's flags, for hints where train.py's are misspelt."""
    return make_parser().commands[what]._option_string_actions


def network_and_images(settings, origin, device):
    """The network of a checkpoint, to be evaluated, and the held-out images of its data set."""
    classes = train.own_checkpoint(settings.init_from).get("classes")
    dataset = train.load_split(settings, settings.eval_split, device, tell, classes=classes)
    return network_of(settings, origin, len(dataset.classes), device), dataset


def network_of(settings, origin, classes, device):
    """A network, to be evaluated; UserError if its file is not that of which `started` made its
    name."""
    model = train.starting_network(settings, origin, classes, device, tell)
    if settings.init_from:
        content = train.on_main(lambda: fingerprint(settings.init_from))
        if content != getattr(settings, "content", content):
            raise UserError(
                f"{settings.init_from} changed meanwhile: wait until its training is finished"
            )
    return model.eval()


# Processes wait for one another as long as the longest training, or part of an analysis, takes.
PATIENCE = timedelta(days=1000)


def join_processes():
    """Those of torchrun, which agree on the CPU only."""
    train.join("gloo", timeout=PATIENCE)


def started(args, rest, what, untrained=False, exact=True):
    """What an analysis of networks begins with: joins the processes. -> Results, device, and of
    each network its name among the results, settings and who set these. exact: arithmetic is
    float32, or float64 if --dtype says so, and its training, too, decides the numbers. untrained: a
    network may come without weights, as initialised."""
    chosen, named = networks(args.checkpoint, rest, own_flags(what), untrained), []
    first = chosen[0][0]
    device = train.start_processes(first.device, PATIENCE, may_share=True)[0]
    folder = Path(first.init_from).parent if first.init_from else Path("out", what)
    results = Results(args.out_dir or folder, what)
    tell_unread(chosen[0][1], what)
    for settings, origin in chosen:
        if exact and settings.dtype in ("bfloat16", "float16"):
            if origin["dtype"] == "command line":
                raise UserError(
                    f"--dtype {settings.dtype}: {what} is computed in float32 or float64"
                )
            settings.dtype = "float32"
        name, results.settings[name] = label(settings, OF_TRAINING * exact)
        settings.content = results.settings[name].get("content")
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


def share_of(dataset, share, what):
    """Restricts it to a class-balanced part: a number of images, a fraction, or "all"."""
    with train.as_user_error(f"--images {share}"):
        fraction = Fraction(1 if share == "all" else share)
        if fraction > len(dataset):
            raise ValueError(f"there are {len(dataset):,} {what} images")
        fraction = fraction / len(dataset) if fraction > 1 else fraction
        return dataset.restrict(data.subset(dataset.labels[dataset.indices], fraction))


def training_images(settings, device, share, augmented=False):
    """A fixed class-balanced part of the images that a network was trained on: a number of them, or
    a fraction such as "1/10"; as in evaluation, or augmented as in training."""
    how = {name: getattr(settings, name) for name in AUGMENTS} if augmented else {}
    if settings.init_from:
        how["classes"] = train.own_checkpoint(settings.init_from).get("classes")
    dataset = train.load_split(settings, "train", device, tell, **how)
    with train.as_user_error(f"--train-fraction {settings.train_fraction}"):
        dataset.restrict(data.subset(dataset.labels, settings.train_fraction))
    if settings.hold_out != "0":
        with train.as_user_error(f"--hold-out {settings.hold_out}"):
            dataset.restrict(data.hold_out(dataset.labels[dataset.indices], settings.hold_out)[0])
    return share_of(dataset, share, "training")


def worker_count(settings, dataset):
    """How many workers of each process read a data set."""
    return train.worker_count(settings, dataset, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def network_and_training_images(settings, origin, device, share, augmented=False):
    """The network of a checkpoint, to be evaluated, training_images, and the workers to read
    them."""
    dataset = training_images(settings, device, share, augmented)
    model = network_of(settings, origin, len(dataset.classes), device)
    return model, dataset, worker_count(settings, dataset)


class Batches:
    """A data set's images in fixed batches on the model's device: iterates over (x, y), always the
    same, augmentation included; x float (B, 3, H, W) in [0, 1], y classes (B,) or, where `mix`
    (a function of x and y, as of train.py) makes them, shares (B, classes). Of n processes each has
    every n-th batch, or all of them, where not split, or the one numbered `only`. Once read, images
    stay in memory if all of them are at most KEPT bytes."""

    KEPT = 8 * 2**30

    def __init__(
        self, dataset, model, batch_size, workers=0, mix=None, seed=0, split=True, only=None
    ):
        self.model, self.mix, self.seed, self.total = model, mix, seed, len(dataset)
        first, each = (train.rank(), train.world_size()) if split else (0, 1)
        starts = range(first * batch_size, len(dataset), each * batch_size)
        starts = starts if only is None else [only * batch_size]
        order = [
            [(0, i) for i in range(start, min(start + batch_size, len(dataset)))]
            for start in starts
        ]
        self.numbers = [start // batch_size for start in starts]
        self.loader = data.loader(dataset, order, workers)
        self.kept = None

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        device, read, kept, size = next(self.model.parameters()).device, self.kept, [], 0
        for number, (x, y) in zip(self.numbers, read or data.batches(self.loader, train.say)):
            size += x.numel()
            if read is None:
                # copies: each tensor of a worker holds a file open
                kept = [*kept, (x.clone(), y.clone())] if size <= self.KEPT else []
            x, y = train.to_float(x.to(device), self.model), y.to(device)
            if self.mix is not None:
                train.seed_draws(data.key(self.seed, -1, number, 2), device)
                x, y = self.mix(x, y)
            yield x, y
        if len(kept) == len(self.numbers):
            self.kept = kept


def gathered(own):
    """What each process has, in their order."""
    parts = [own] * train.world_size()
    if dist.is_initialized():
        dist.all_gather_object(parts, own)
    return parts


def share_out(results, network, tasks, what):
    """Computes what is not finished of {part: function -> its numbers}. Of n processes each takes
    every n-th, and what they have done is written before they take the next. UserError, of all
    processes, for that of one."""
    todo = [part for part in tasks if part not in results.parts.get(network, {})]
    world = train.world_size()
    with train.progress(len(tasks), what, "part") as bar:
        bar.update(len(tasks) - len(todo))
        for i in range(0, len(todo), world):
            own = None, None, None
            if i + train.rank() < len(todo):
                part = todo[i + train.rank()]
                try:
                    with errors_of(network):
                        own = part, tasks[part](), None
                except (UserError, data.DataError) as error:
                    own = part, None, str(error)
            found = gathered(own)
            for part, numbers, error in found:
                if part is not None and error is None:
                    results.put(network, part, numbers)
                    bar.update()
            for *_, error in found:
                if error is not None:
                    raise UserError(error)


def print_rows(rows):
    """A table of dicts; numbers have two decimals, None and what a row lacks are -."""
    if not rows:
        return
    columns = dict.fromkeys(column for row in rows for column in row)
    text = [list(columns)]
    for row in rows:
        values = [row.get(column) for column in columns]
        text.append(
            ["-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values]
        )
    widths = [max(map(len, column)) for column in zip(*text)]
    for line in text:
        cells = [f"{cell:>{width}}" for cell, width in zip(line, widths)]
        train.say("  ".join([line[0].ljust(widths[0]), *cells[1:]]))


def significant(number, error=None):
    """A number in four digits, or with an error, ± and in as many as leave the error two; None for
    None and what is not finite."""
    if number is None or not math.isfinite(number):
        return None
    if error is None:
        return f"{number:.4g}"
    if not 0 < error < math.inf:
        return f"{number:.4g} ± {error:.2g}"
    digits = max(1 - math.floor(math.log10(error)), 0)
    return f"{round(number, digits) + 0.0:.{digits}f} ± {error:.{digits}f}"  # + 0.0: never -0


@contextmanager
def errors_of(network):
    """Whatever only the user can set right, in here, is told with the name of the network."""
    try:
        yield
    except (UserError, data.DataError) as error:
        raise type(error)(f"{network}: {error}") from None


def finite(values, what):
    """The values, tensor or number; UserError where one is not finite, as of a network that
    diverged."""
    if not torch.as_tensor(values).isfinite().all():
        raise UserError(f"{what} is not finite: the network gives NaN or infinity")
    return values


def network_and_held_out(settings, origin, device, share):
    """A network; a class-balanced part of the held-out images in a fixed random order (ImageNet's
    are sorted by class); how many workers read them."""
    model, dataset = network_and_images(settings, origin, device)
    dataset = shuffled(share_of(dataset, share, "held-out"), 0)
    return model, dataset, worker_count(settings, dataset)


def shuffled(dataset, seed):
    """The data set, restricted to all of its images in a random order that depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    return dataset.restrict(torch.randperm(len(dataset), generator=generator))


def short(name):
    """A network's name for a figure's title."""
    return name if len(name) < 48 else "…" + name[-46:]


def as_flags(values):
    """{setting: value} as words of a command line; what is None is left out."""
    given = argparse.Namespace(**values)
    return [
        word
        for name, value in values.items()
        if value is not None
        for word in train.as_flag(name, given)
    ]


def refuse(flags, origin, why):
    """Those of train.py's flags that the command line may not set."""
    for flag in flags:
        if origin[flag] == "command line":
            raise UserError(f"--{flag.replace('_', '-')} {why}")


def three_digits(x):
    """A number as it is written on a command line."""
    return float(f"{x:.3g}")


def group(runs, *names):
    """{values of names: [runs]}, the values of several names as a tuple."""
    groups = {}
    for run in runs:
        values = tuple(run[name] for name in names)
        groups.setdefault(values if len(names) > 1 else values[0], []).append(run)
    return groups


def need(args, **least):
    """UserError for a flag, or one of its values, below its least or too large for float32."""
    for name, low in least.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not low <= value <= 1e30:
                most = " and at most 1e30" * (value > 1e30)
                raise UserError(f"--{name.replace('_', '-')} {value:g}: it is at least {low}{most}")


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
    with io.BytesIO() as file:
        picture.savefig(file, dpi=150)
        write(path, file.getvalue())
    pyplot.close(picture)
    train.say(f"figure    {path}")


def finished(results, draw, rows=1, columns=1):
    """The end of a subcommand: its figure, and where its numbers are."""
    figure(results.path.with_suffix(".png"), draw, rows, columns)
    tell(f"results   {results.path}")


# --------------------------------------------------------------------------------------- robustness


def robustness_parts(benchmark, args, classes):
    """The parts of a benchmark and what makes the data set of each: [(name, function)].
    DataError if its files are not there."""
    common = dict(data_dir=args.data_dir, image_size=args.image_size, classes=classes)
    common |= dict(short_side=args.eval_short_side)

    @functools.cache
    def held_out():
        dataset = data.load(args.dataset, args.eval_split, **common)
        train.check_classes(args.dataset, dataset, classes)
        return dataset

    if benchmark in ("val", "pgd", "c-lite"):
        held_out()  # if it is missing, now
    if benchmark in ("val", "pgd"):
        return [(benchmark, held_out)]
    if benchmark == "c-lite":
        return [
            (
                f"c-lite/{corruption}/{severity}",
                lambda c=corruption, s=severity: data.Corrupted(held_out(), c, s),
            )
            for corruption in data.C_LITE
            for severity in data.SEVERITIES
        ]
    name = f"{args.dataset}-c" if benchmark == "c" and "cifar" in args.dataset else benchmark
    return [
        (
            "/".join([benchmark, corruption, str(severity)] if corruption else [benchmark]),
            lambda c=corruption, s=severity: data.benchmark(name, c, s, **common),
        )
        for corruption, severity in data.conditions(name, args.data_dir)
    ]


def robustness_summary(parts, imagenet=True):
    """{part: top-1 in percent} -> dict with a number for each benchmark among them: its accuracy in
    percent, of c and c-lite the mean over corruptions and severities (Chen §4.2: 19 × 5; Park Fig.
    12, E.1), and for ImageNet-C mCE, the mean over 15 corruptions of the error averaged over
    severities, divided by AlexNet's (Hendrycks & Dietterich 2019), in percent; "by corruption"
    their means."""
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
            of_alexnet = [(100 - means[name]) / e for name, e in data.ALEXNET_ERRORS.items()]
            summary["mCE"] = 100 * sum(of_alexnet) / len(of_alexnet)
    return summary


def plain_twins(trained):
    """{network: the one that was trained as it was, but without SAM}, from their runs' settings."""
    free = train.FREE_FLAGS | {"recipe"}

    def without_sam(settings):
        return {k: v for k, v in settings.items() if k not in free and not k.startswith("sam_")}

    def file(name):  # as ckpt.pt or best.pt, of the same run, too
        return Path(name.rpartition(" (")[0]).name

    plain = {name: without_sam(of) for name, of in trained.items() if of and of["sam_rho"] == 0}
    return {
        name: other
        for name, of in trained.items()
        if of and of["sam_rho"] > 0
        for other, own in plain.items()
        if own == without_sam(of) and file(name) == file(other)
    }


def print_robustness(summaries, twins):
    """A row for each network; below one trained with SAM its difference to its twin without."""
    columns = [name for name in (*BENCHMARKS, "mCE") if any(name in s for s in summaries.values())]
    rows = []
    for name, summary in summaries.items():
        rows.append({"top-1 %": name} | {c: summary.get(c) for c in columns})
        if name in twins:
            plain = summaries[twins[name]]
            both = [c for c in columns if None not in (summary.get(c), plain.get(c))]
            gains = {c: f"{summary[c] - plain[c]:+.2f}" for c in both}
            rows.append({"top-1 %": "  against without SAM"} | gains)
    print_rows(rows)
    for benchmark in ("c", "c-lite"):
        tables = [summary.get(f"{benchmark} by corruption", {}) for summary in summaries.values()]
        corruptions = dict.fromkeys(name for table in tables for name in table)
        if corruptions:
            train.say()
        print_rows(
            [
                {f"{benchmark}, mean of severities": name}
                | {str(i): table.get(name) for i, table in enumerate(tables, 1)}
                for name in corruptions
            ]
        )


def draw_robustness(axes, summaries):
    """Park & Kim Fig. 12b, E.1: accuracy against mean accuracy on corrupted images."""
    for name, summary in summaries.items():
        corrupted = summary.get("c", summary.get("c-lite"))
        if corrupted is not None and "val" in summary:
            axes.scatter(summary["val"], corrupted, label=name)
    lite = any("c-lite" in summary and "c" not in summary for summary in summaries.values())
    axes.set(
        xlabel="accuracy (%)",
        ylabel=f"mean accuracy on {'c-lite' if lite else 'corrupted images'} (%)",
    )
    axes.legend(fontsize=6)


def robustness(args, rest):
    """Accuracy of checkpoints on held-out images and on benchmarks of natural and of synthetic
    change (Chen et al. Table 2, 5; Park & Kim Fig. 12b, E.1). Returns the "results" that it was
    asked for. Whatever benchmark is not there is named, with where it was looked for."""
    results, device, named = started(args, rest, "robustness", exact=False)
    summaries, trained, told = {}, {}, set()
    for name, settings, origin in named:
        saved = train.own_checkpoint(settings.init_from)
        trained[name] = saved.get("settings", {})
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
            model = network_of(settings, origin, len(classes), device)
            autocast = train.autocast_of(settings, device)
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
            workers, side = worker_count(settings, dataset), settings.image_size
            if part == "pgd":
                numbers = dict(top1=train.pgd_10(model, dataset, side, device, workers))
                finite(numbers["top1"], f"the accuracy of {name} under attack")
            else:
                at_once, kept = train.images_at_once(model, side, device), dataset.restrict_logits
                loader = train.own_share(dataset, device, workers, at_once)
                numbers = train.evaluate(model, loader, device, autocast, restrict_logits=kept)
                finite(numbers["nll"], f"the NLL of {name}")
            results.put(name, part, numbers)
        done = results.parts.get(name, {})
        lacking = dict.fromkeys(part.split("/")[0] for part, _ in todo if part not in done)
        for benchmark in lacking:
            tell(f"missing   {benchmark}: parts of it, so it has no number")
        whole = [part for part, _ in todo if part.split("/")[0] not in lacking]
        top1 = {part: results.take(name, part)["top1"] for part in whole}
        summaries[name] = robustness_summary(top1, "cifar" not in settings.dataset)
    if not any(summaries.values()):
        raise UserError("nothing could be evaluated: the lines above say what is missing where")
    if train.rank() == 0:
        print_robustness(summaries, plain_twins(trained))
        if any("val" in s and ("c" in s or "c-lite" in s) for s in summaries.values()):
            figure(results.path.with_suffix(".png"), lambda axes: draw_robustness(axes, summaries))
        train.say(f"results   {results.path}")
    return results.taken


# ----------------------------------------------------------------------------- hessian and spectrum


class Hessian:
    """Products with the Hessian H of the loss

        L(w) = 1/n Σ_i ℓ(f(x_i; w), y_i) + ½ · decay · ‖w‖²

    over `params` w, `size` numbers: all, or some for a diagonal block. A model is called as it is:
    see `exactly`. The graph of a batch's gradient is built once and kept, as long as all of them
    hold less than `memory` GiB (counted as autograd saves tensors); the others are built again for
    each call, which takes half as long again. One batch has to fit besides.

    batches: a list, or the like, of (x, y), y classes (B,) or shares (B, classes). Under torchrun
    each process gives its own, and H is that of all; alone: of this process's only. loss: of
    logits and y, mean over the batch. tick: is told of images that are done."""

    def __init__(
        self, model, loss, batches, params=None, decay=0.0, memory=4.0, alone=False, tick=None
    ):
        self.model, self.loss, self.batches, self.decay = model, loss, batches, decay
        self.params = list(model.parameters() if params is None else params)
        self.sizes = [p.numel() for p in self.params]
        self.size, self.images, self.memory = sum(self.sizes), 0, memory
        self.kept, self.room, self.all_kept = [], memory * 2**30, False
        self.together = dist.is_initialized() and not alone
        self.tick = tick or (lambda images: None)

    def gradients(self):
        """Of each batch its size and the gradient of its summed loss, with the graph."""
        kept = len(self.kept)
        yield from self.kept
        for x, y in [] if self.all_kept else itertools.islice(self.batches, kept, None):
            held = {}

            def note(tensor):
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = self.loss(self.model(x), y) * len(x)
                grads = [torch.zeros_like(p) for p in self.params]
                if loss.requires_grad:  # else no parameter is one that it depends on
                    grads = torch.autograd.grad(
                        loss, self.params, create_graph=True, materialize_grads=True
                    )
            for p in self.model.parameters():
                held.pop(p.untyped_storage().data_ptr(), None)
            self.room -= sum(held.values())
            if self.room >= 0:
                self.kept.append((len(x), grads))
            yield len(x), grads
        self.all_kept = self.room >= 0

    def mean(self, of_batch, vectors):
        """1/n Σ over batches of of_batch(gradients, vector), for each of the vectors (size,)."""
        sums = [torch.zeros(self.size).to(self.params[0]) for _ in vectors]
        count = torch.zeros((), dtype=torch.float64)
        for images, grads in self.gradients():
            for total, v in zip(sums, vectors):
                total += of_batch(grads, v)
            count += images
            self.tick(images * len(vectors))
        if self.together:
            for tensor in (*sums, count):
                dist.all_reduce(tensor)
        if self.images not in (0, int(count)):
            raise ValueError("batches can be read once only: give a list")
        if not count:
            raise ValueError("there are no batches, so there is no mean loss")
        self.images = int(count)
        return [finite(total.div_(self.images), "the gradient or H v") for total in sums]

    def gradient(self):
        """Of the mean loss without its penalty, (size,)."""
        return self.mean(lambda grads, _: torch.cat([g.detach().flatten() for g in grads]), [0])[0]

    def __call__(self, *vectors):
        """Vectors (size,) -> a list of their products."""

        def product(grads, v):
            # Where g has no graph, the loss is linear in these parameters, or without them.
            parts = zip(grads, v.split(self.sizes))
            pairs = [(g, part.view_as(g)) for g, part in parts if g.requires_grad]
            if not pairs:
                return torch.zeros_like(v)
            rows = torch.autograd.grad(
                [g for g, _ in pairs],
                self.params,
                [u for _, u in pairs],
                retain_graph=True,
                materialize_grads=True,
            )
            return torch.cat([row.flatten() for row in rows])

        return [h.add_(v, alpha=self.decay) for h, v in zip(self.mean(product, vectors), vectors)]


@contextmanager
def hessian_of(model, loss, batches, params=None, **options):
    """A Hessian of a model in evaluation mode (BatchNorm with its running statistics, no dropout),
    in the exact arithmetic of `exactly`. params: some of model.parameters()."""
    params = None if params is None else list(params)
    with exactly(model, next(model.parameters()).device):
        if params is not None:
            for p in model.parameters():
                p.requires_grad_(False)
            for p in params:
                p.requires_grad_(True)
        yield Hessian(model, loss, batches, params, **options)


class Saved:
    """The state of a long computation, a dict of tensors and plain types, in a file from which it
    goes on after a kill: written every `seconds` of work, to be removed when the result is safe.
    Without a path nothing is kept."""

    def __init__(self, path=None, seconds=120):
        self.path, self.seconds = path, seconds
        self.began = self.written = time.monotonic()

    def load(self, new, H):
        """What was kept of work with H, or else what new() makes."""
        there = self.path and train.on_main(self.path.exists)
        state = train.on_main(lambda: train.read_checkpoint(self.path)) if there else new()
        self.began -= state.pop("spent", 0.0)
        H.images = state.pop("images", H.images)
        return state

    def spent(self):
        """Seconds of work, with those before a kill."""
        return time.monotonic() - self.began

    def keep(self, state, H):
        if self.path and train.rank() == 0 and time.monotonic() - self.written >= self.seconds:
            state = state | dict(spent=self.spent(), images=H.images)
            try:
                train.write_file(self.path, lambda file: torch.save(state, file))
            except (OSError, RuntimeError) as error:  # torch.save makes the latter of the former
                why = getattr(error, "strerror", None) or "the disk may be full"
                train.say(f"{self.path} cannot be written: {why}; a kill would lose the work")
                self.seconds = math.inf
            self.written = time.monotonic()

    def remove(self):
        if self.path and train.rank() == 0:
            self.path.unlink(missing_ok=True)


def random_vector(H, *seed, signs=False):
    """Of unit length, normal or, with signs, ±. Drawn in float32 on the CPU, it depends on its seed
    only and is the same on all processes."""
    generator = torch.Generator().manual_seed(data.key(*seed))
    v = torch.randn(H.size, dtype=torch.float32, generator=generator)
    v = (v.sign() if signs else v).to(H.params[0])
    return v / v.norm()


def power(H, iterations, seed, saved):
    """v ← H v / ‖H v‖ from a normal start -> λ = vᵀ H v, ‖H v - λ v‖, products."""
    state = saved.load(lambda: dict(v=random_vector(H, seed, 0), i=0), H)
    while state["i"] < iterations:
        v = state["v"].to(H.params[0])
        (w,) = H(v)
        value = v @ w
        residual, length = (w - value * v).norm().item(), w.norm().item()
        state = dict(
            v=w / length if length else v, i=state["i"] + 1, value=value.item(), residual=residual
        )
        saved.keep(state, H)
    return state["value"], state["residual"], state["i"]


class Krylov:
    """Orthonormal vectors v_j, the `basis`, which grows by what H v_j has outside of its span. H
    was applied to those numbered in `done`; C_ij = v_iᵀ H v_j, 0 where it was applied to
    neither."""

    def __init__(self, H, basis, C=None, done=()):
        self.H, self.done = H, list(done)
        self.basis = [v.to(H.params[0]) for v in basis]
        self.C = torch.zeros(len(basis), len(basis), dtype=torch.float64) if C is None else C
        self.eps = torch.finfo(H.params[0].dtype).eps

    def project(self, w):
        """Takes from w, in place, its part in the span of the basis -> that part's coefficients."""
        inner = []
        for v in self.basis:
            inner.append(v @ w)
            w -= inner[-1] * v
        return torch.stack(inner).cpu().double()

    def append(self, w):
        """What w, not 0, has outside of the span, is the next vector, if there is room for one."""
        if len(self.basis) < self.H.size:
            for _ in range(2):  # twice is enough (Kahan and Parlett)
                w = w / w.norm()
                self.project(w)
            self.basis.append(w / w.norm())
            self.C = torch.nn.functional.pad(self.C, (0, 1, 0, 1))

    def multiply(self, seed):
        """Applies H to the latest vector that it was not applied to, or to a random one."""
        if len(self.done) == len(self.basis):
            self.append(random_vector(self.H, seed, len(self.basis)))
        j = max(set(range(len(self.basis))) - set(self.done))
        (w,) = self.H(self.basis[j])
        length = w.norm().item()
        row = self.project(w) + self.project(w)
        self.C[j] = self.C[:, j] = row
        self.done.append(j)
        rest = w.norm().item()
        if rest > 10 * self.eps * length and len(self.basis) < self.H.size:
            self.append(w)
            self.C[j, -1] = self.C[-1, j] = rest

    def ritz(self, which, first=0):
        """Of H within the span of the vectors from number `first` that it was applied to, the
        wanted first: eigenvalues, norms of residuals, and eigenvectors as columns of
        coefficients."""
        done = [j for j in self.done if j >= first]
        rest = [j for j in range(first, len(self.basis)) if j not in done]
        inside = self.C[done][:, done]
        values, vectors = torch.linalg.eigh((inside + inside.T) / 2)
        order = (values.abs() if which == "magnitude" else values).argsort(descending=True)
        values, vectors = values[order], vectors[:, order]
        return values, (self.C[rest][:, done] @ vectors).norm(dim=0), vectors


def lanczos(H, k, which, tolerance, iterations, seed, saved):
    """What hessian_eigenvalues describes -> values, residuals, errors, converged, products."""

    def start():
        z, g = random_vector(H, seed, 0), H.gradient()
        v = z + 0.9 * g / g.norm() if g.norm() > 0 else z  # of one parameter too not 0
        return dict(basis=[v / v.norm()], chain=0, before=None)

    state = saved.load(start, H)
    chain, before = state.pop("chain"), state.pop("before")
    space, k, good = Krylov(H, **state), min(k, H.size), False

    def nothing_larger(chain, kth, rounding):
        """Whether the vectors from `chain` on are known to have no value that belongs before the
        k-th, or their largest one is known to the tolerance."""
        (own, *_), (off, *_), _ = space.ritz(which, chain)
        size, kth = ((v.abs() if which == "magnitude" else v) for v in (own, kth))
        known = off <= max(tolerance * own.abs(), rounding)
        return bool(known or (size + off < kth and off <= 0.1 * own.abs()))

    while True:
        space.multiply(seed)
        values, residuals, _ = space.ritz(which)
        rounding = 100 * space.eps * values.abs().max()
        enough = (tolerance * values.abs()).clamp(min=rounding)
        good = len(values) >= k and bool((residuals <= enough)[:k].all())
        if good and k > 1 and len(space.done) < H.size:
            # One chain v, H v, H² v, … has one direction of a multiple eigenvalue. Others are in
            # the complement, where another chain looks for what is as large as the k-th.
            first = before is None
            begun = not first and max(space.done) >= chain  # there was room for its first vector
            explored = first or begun and nothing_larger(chain, values[k - 1], rounding)
            stayed = not first and bool(((values[:k] - before).abs() <= enough[:k]).all())
            good = explored and stayed
            if explored and not stayed:
                before, chain = values[:k], len(space.basis)
                space.append(random_vector(H, seed, chain))
        if good or len(space.done) == min(iterations, H.size):
            break
        kept = dict(basis=space.basis, C=space.C, done=space.done, chain=chain, before=before)
        saved.keep(kept, H)
    gaps = (values[:, None] - values).abs() - residuals  # to where another one may be
    gaps = gaps.fill_diagonal_(math.inf if len(values) > 1 else 0).min(1).values
    errors = torch.where(gaps > residuals, residuals**2 / gaps, residuals)
    return (*(v[:k].tolist() for v in (values, residuals, errors)), good, len(space.done))


def hessian_eigenvalues(
    model,
    loss,
    batches,
    k=1,
    which="algebraic",
    params=None,
    *,
    method="lanczos",
    tolerance=0.001,
    iterations=100,
    decay=0.0,
    seed=0,
    saved=None,
    **options,
):
    """The k largest eigenvalues, "algebraic" or by "magnitude" with their sign, of the Hessian of
    a loss L (`Hessian` has the formula and further options) by all parameters of a model or some,
    a diagonal block (Chen et al. Table 1, 3). Fewer than k where there are fewer parameters or
    iterations.
    -> dict of `eigenvalues`, the wanted first; `residuals` ‖H v - λ v‖: within one of its λ there
    is an eigenvalue of H; `errors`; `converged`; `products` with H; `images`, `parameters`,
    `seconds`. Time grows linearly in images × products. A kill loses what was done since `saved`, a
    Saved, was written.

    lanczos: the best approximations within the span of v, H v, H² v, …, all of it kept orthogonal;
    v is half random and half the gradient. It stops where each residual r is below tolerance · |λ|
    (or 100 roundings of the largest |λ|), or, not converged, after so many iterations. `errors` are
    the usual, much smaller min(r, r²/gap) (Kato and Temple), gap the distance to the nearest other
    value less that one's residual; they are the distance to some eigenvalue, and hold unless two
    closer than r were taken for one. That it is the k-th largest is not certain: one that v hardly
    has a part of may not have shown yet, by 1 to 7 % in 6 of 460 small networks with a tolerance of
    0.01, in none with 0.001. For k > 1 a second span grows from a random vector orthogonal to the
    first, for the other directions of multiple eigenvalues, until the largest value there is known
    to the tolerance, or to 10 % and below the k-th; where the k values changed meanwhile, a third.
    Memory: a vector of parameters' size for each product.

    power: the paper's (Appendix C: 100 iterations): v ← H v / ‖H v‖ and λ = vᵀ H v; one value only,
    of largest magnitude: if that is negative, it is what is returned, whatever `which`."""
    saved = saved or Saved()
    if k < 1 or iterations < 1 or method == "power" and k > 1:
        raise ValueError(f"k = {k}, iterations = {iterations}: at least 1, and for power k = 1")
    with hessian_of(model, loss, batches, params, decay=decay, **options) as H:
        if method == "power":
            value, residual, products = power(H, iterations, seed, saved)
            found = [value], [residual], [residual], residual <= tolerance * abs(value), products
        else:
            found = lanczos(H, k, which, tolerance, iterations, seed, saved)
        names = "eigenvalues residuals errors converged products".split()
        return dict(zip(names, found)) | dict(
            images=H.images, parameters=H.size, seconds=saved.spent()
        )


def hessian_density(
    model,
    loss,
    batches,
    probes=10,
    steps=50,
    params=None,
    *,
    decay=0.0,
    seed=0,
    saved=None,
    **options,
):
    """Trace and spectral density of a Hessian, as PyHessian (Yao et al. 2020, 1912.07145) has them,
    from `probes` random vectors z of ±1 (Rademacher). -> dict of `trace`, the mean of zᵀ H z
    (Hutchinson), `trace_error`, its standard error (None of one probe), and for each probe `nodes`
    θ_j and `weights` τ_j, Σ_j τ_j = 1, of Gauss quadrature by `steps` products of Lanczos from
    z/‖z‖, so that the density is

        φ(t) = 1/probes Σ_probes Σ_j τ_j N(t; θ_j, σ²)      (kernel_density).

    The recurrence is not orthogonalised: copies of a node that rounding makes share its weight.
    Memory: three vectors for each probe; a graph that is not kept is built `steps` times."""
    saved = saved or Saved()
    if probes < 1 or steps < 1:
        raise ValueError(f"probes = {probes}, steps = {steps}: at least 1")
    with hessian_of(model, loss, batches, params, decay=decay, **options) as H:
        of_each = range(probes)
        state = saved.load(
            lambda: dict(
                now=[random_vector(H, seed, i, signs=True) for i in of_each],
                before=[torch.zeros(H.size)] * probes,
                alphas=[[] for _ in of_each],
                betas=[[] for _ in of_each],
            ),
            H,
        )
        alphas, betas = state["alphas"], state["betas"]
        now, before = ([v.to(H.params[0]) for v in state[name]] for name in ("now", "before"))
        eps, steps = torch.finfo(H.params[0].dtype).eps, min(steps, H.size)
        while running := [i for i in of_each if len(alphas[i]) == len(betas[i])]:
            for i, w in zip(running, H(*(now[i] for i in running))):
                length, a = w.norm().item(), now[i] @ w
                w -= a * now[i] + (betas[i][-1] if betas[i] else 0) * before[i]
                alphas[i].append(a.item())
                rest = w.norm().item()
                if rest > 10 * eps * length and len(alphas[i]) < steps:  # else it ends here
                    betas[i].append(rest)
                    before[i], now[i] = now[i], w / rest
            saved.keep(dict(now=now, before=before, alphas=alphas, betas=betas), H)
        traces = torch.tensor([a[0] * H.size for a in alphas], dtype=torch.float64)
        nodes, weights = [], []
        for a, b in zip(alphas, betas):
            a, b = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
            values, vectors = torch.linalg.eigh(a.diag() + b.diag(1) + b.diag(-1))
            nodes.append(values.tolist())
            weights.append(vectors[0].square().tolist())
        error = (traces.std() / probes**0.5).item() if probes > 1 else None
        return dict(
            trace=traces.mean().item(),
            trace_error=error,
            nodes=nodes,
            weights=weights,
            products=sum(map(len, alphas)),
            images=H.images,
            parameters=H.size,
            seconds=saved.spent(),
        )


def kernel_density(at, points, weights, width):
    """Σ_i weights_i · N(t; points_i, width²) at each t of an array; width: one or of each point."""
    z = (np.asarray(at)[:, None] - points) / width
    return np.exp(-(z**2) / 2) / (math.sqrt(2 * math.pi) * np.asarray(width)) @ np.asarray(weights)


def components(network, wanted=("table3",)):
    """{name: parameters} of diagonal blocks: "whole"; "table3", all that Chen et al. Table 3 has;
    others are regular expressions, searched for in the names of network.named_parameters().

    Of ViT, PiT, Swin and Mixer, Table 3's are: the embedding, the layer that makes tokens of the
    image, without class token and positions (§4.4: the first linear embedding layer); all MSAs or
    token MLPs; all MLPs or channel MLPs, both without norms; the first, middle and last block, 1, 6
    and 12 of 12, with norms. A convolutional network has its stem and stages instead."""
    names = dict(network.named_parameters())
    layers = r"((.*\.)?blocks\.|encoder\.layers\.encoder_layer_"
    if any(re.match(r"features\.1\.0\.(attn\.|block\.0\.weight)", name) for name in names):
        layers += r"|features\.[1357]\."  # torchvision's Swin, ConvNeXt
    layers += r")\d+\."
    found = [re.match(layers, name) for name in names]
    blocks = list(dict.fromkeys(match[0] for match in found if match))
    table = {"whole": ""}
    if blocks:
        table |= {
            "embedding": r"^(patch_embed|stem|features\.0|conv_proj)\.",
            "MSAs or token MLPs": r"\.(attn|mlp_tokens|self_attention)\.",
            "MLPs or channel MLPs": r"\.(mlp|mlp_channels)\.",
        }
        for i in sorted({1, (len(blocks) + 1) // 2, len(blocks)}):
            table[f"block {i} of {len(blocks)}"] = "^" + re.escape(blocks[i - 1])
    else:
        table["stem"] = r"^(conv1|bn1|stem)\."
        stages = [re.match(r"(layer|trunk_output\.block)(\d)\.", name) for name in names]
        table |= {f"stage {found[2]}": "^" + re.escape(found[0]) for found in stages if found}
    parts = {}
    for want in wanted:
        rows = table if want == "table3" else {want: table.get(want, want)}
        for name, pattern in rows.items():
            try:
                params = [p for key, p in names.items() if re.search(pattern, key)]
            except re.error as error:
                raise UserError(f"--params {want}: no regular expression, {error}") from None
            if params:
                parts[name] = params
            elif want != "table3":
                raise UserError(
                    f"--params {want}: no parameter's name matches; there are "
                    f"{', '.join(list(names)[:2])}, …, {list(names)[-1]}"
                )
    return parts


def draw_hessian(axes, shown):
    """A bar for each network and block (Chen et al. Table 3), and spectral densities."""
    bars, lines = axes if isinstance(axes, np.ndarray) else (axes, None)
    names, blocks = (list(dict.fromkeys(column)) for column in zip(*shown))
    for i, name in enumerate(names):
        own = {
            blocks.index(block): found[0]["eigenvalues"][0]
            for (network, block), found in shown.items()
            if network == name
        }
        bars.bar(
            [x + 0.8 * (i + 0.5) / len(names) - 0.4 for x in own],
            list(own.values()),
            0.8 / len(names),
            label=name,
        )
    below = any(found[0]["eigenvalues"][0] <= 0 for found in shown.values())
    bars.set_yscale("symlog" if below else "log")
    bars.set_xticks(range(len(blocks)), blocks, rotation=30, ha="right")
    bars.set_ylabel("eigenvalue of the Hessian")
    bars.legend(fontsize=6)
    for (name, block), (_, *densities) in shown.items() if lines else ():
        if block == blocks[0]:  # all would be a thicket
            nodes, weights = (np.concatenate(densities[0][key]) for key in ("nodes", "weights"))
            width = (np.ptp(nodes) or 1) / 100
            at = np.linspace(nodes.min() - 5 * width, nodes.max() + 5 * width, 1000)
            lines.plot(
                at,
                kernel_density(at, nodes, weights / len(densities[0]["nodes"]), width),
                label=f"{name}, {block}",
            )
    if lines:
        lines.set_yscale("log")
        lines.set_ylim(bottom=1e-7)
        lines.set(xlabel="eigenvalue", ylabel="density, Gaussians of σ = 1 % of its range")
        lines.legend(fontsize=6)


def hessian(args, rest):
    """Largest eigenvalues of the Hessian of the mean loss over a fixed part of the training images,
    prepared as for evaluation, and of its diagonal blocks (Chen et al. Table 1, 3, Appendix C);
    with --probes its trace and spectral density. The loss is cross-entropy without smoothing or
    weight decay, --loss sigmoid the other one of the paper, which names none here. BatchNorm is in
    evaluation mode. Returns the "results" that it was asked for."""
    need(args, k=1, tolerance=1e-9, iterations=1, probes=0, steps=1, chunk=1, memory=0)
    if args.method == "power" and args.k > 1:
        raise UserError("--method power finds one eigenvalue: leave out --k, or use lanczos")
    results, device, named = started(args, rest, "hessian")
    images = f"{args.loss}, {args.images} images"
    how = (
        f"power, tolerance {args.tolerance:g}, {args.iterations}"
        if args.method == "power"
        else f"{args.k} by {args.which}, tolerance {args.tolerance:g}, at most {args.iterations}"
    )
    options = {name: getattr(args, name) for name in "k which method tolerance iterations".split()}
    largest = functools.partial(hessian_eigenvalues, **options)
    rows, shown = [], {}
    for name, settings, origin in named:
        model, dataset, workers = network_and_training_images(settings, origin, device, args.images)
        batches = Batches(dataset, model, args.chunk, workers)
        blocks = components(model.network, args.params)
        if "table3" in args.params and len(blocks) == 1:
            tell(f"{name}: of its blocks nothing is known here; --params takes their names")
        for block, params in blocks.items():
            of = (model, LOSSES[args.loss], batches)
            tasks = {f"{block}: {images}, {how}": functools.partial(largest, *of, params=params)}
            if args.probes:
                tasks[f"{block}: {images}, density, {args.probes} probes, {args.steps} steps"] = (
                    functools.partial(hessian_density, *of, args.probes, args.steps, params)
                )
            for part, task in tasks.items():
                if part not in results.parts.get(name, {}):
                    mark = hashlib.sha256(f"{name} {part}".encode()).hexdigest()[:8]
                    saved = Saved(results.path.with_name(f"hessian-{mark}.state"))
                    with errors_of(name), train.progress(None, block) as bar:
                        numbers = task(memory=args.memory, saved=saved, tick=bar.update)
                    results.put(name, part, numbers)
                    saved.remove()
            shown[name, block] = [results.take(name, part) for part in tasks]
            found, *density = shown[name, block]
            row = {"network": name, "block": block, "parameters": found["parameters"]}
            row |= {f"λ{i + 1}": f"{value:.4g}" for i, value in enumerate(found["eigenvalues"])}
            row |= {
                "error": f"{max(found['errors']):.1g}",
                "products": found["products"],
                "s": f"{found['seconds']:.1f}",
            }
            for numbers in density:
                row["trace"] = significant(numbers["trace"], numbers["trace_error"])
            rows.append(row)
            if not found["converged"]:
                tell(
                    f"{name}, {block}: not within {args.tolerance:g} after {found['products']} "
                    + "products"
                    + "; --iterations allows more" * (args.method == "lanczos")
                )
            if args.method == "power" and found["eigenvalues"][0] < 0:
                tell(
                    f"{name}, {block}: the eigenvalue of largest magnitude is negative, and "
                    "power iteration finds no other; --method lanczos finds the largest"
                )
    if train.rank() == 0:
        print_rows(rows)
        finished(results, lambda axes: draw_hessian(axes, shown), columns=1 + (args.probes > 0))
    return results.taken


def nep_ape(eigenvalues):
    """Of many eigenvalues λ the share below 0, NEP, and the mean of those above 0, APE (Park & Kim
    A.2: ∫_{λ<0} p dλ; ∫_{λ>0} λ p dλ / ∫_{λ>0} p dλ, p their density); APE is None of none."""
    values = np.asarray(eigenvalues).ravel()
    above = values[values > 0]
    return float((values < 0).mean()), float(above.mean()) if len(above) else None


def hessian_spectrum(model, loss, batches, k=5, *, decay=0.0, tolerance=0.01, memory=4.0):
    """The k eigenvalues of largest magnitude, with their sign, of the Hessian of the loss of each
    mini-batch plus ½ · decay · ‖w‖² over all parameters (which adds `decay` to each eigenvalue),
    by Lanczos; `batches` are independent, and this process's own. -> dict of `eigenvalues`, a list
    for each batch, `nep` and `ape` of all (Park & Kim A.1, A.2), `converged` and `products`."""
    how = dict(decay=decay, memory=memory, tolerance=tolerance, iterations=max(200, 4 * k))
    found = [
        hessian_eigenvalues(model, loss, [batch], k, "magnitude", alone=True, **how)
        for batch in batches
    ]
    values = [one["eigenvalues"] for one in found]
    nep, ape = nep_ape(sum(values, []))
    return dict(
        eigenvalues=values,
        nep=nep,
        ape=ape,
        products=sum(f["products"] for f in found),
        converged=all(f["converged"] for f in found),
    )


def attention_size(network, what):
    """heads or head_dim (width of a head) of a network's first self-attention."""
    for module in network.modules():
        heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
        if heads and hasattr(module, "qkv"):
            return heads if what == "heads" else module.qkv.weight.shape[0] // 3 // heads
    raise UserError(f"--against {what}: {type(network).__name__} has no self-attention known here")


def power_law(n, values):
    """(c, a) of values = c · n^a by least squares of logarithms; None if that is not defined."""
    if len(set(n)) < 2 or None in values:
        return None
    a, log_c = np.polyfit(np.log(n), np.log(values), 1)
    return float(np.exp(log_c)), float(a)


def draw_spectrum(axes, spectra, rows, against, fitted):
    """Negative and positive eigenvalues with a scale each, as in the paper; NEP and APE by size."""
    everything = np.concatenate(list(spectra.values()))
    for panel, sign in zip(axes, (-1, 1)):
        end = max(0, *(sign * everything)) * 1.05 or 1
        at = np.linspace(0, sign * end, 500)
        for name, values in spectra.items():
            values = np.asarray(values)
            own = values[values * sign > 0]
            width = 0.0
            if len(own) > 1:
                low, high = np.quantile(own, (0.25, 0.75))
                width = 0.9 * min(own.std(), (high - low) / 1.34) * len(own) ** -0.2
            density = kernel_density(
                at, own, np.full(len(own), 1 / len(values)), max(width, end / 500)
            )
            panel.plot(at, density, label=name)
        panel.set_xlim(*sorted((0, sign * end)))
        panel.set(ylim=(0, None), xlabel=f"{'positive' if sign > 0 else 'negative'} eigenvalues")
    axes[0].set_ylabel("density")
    axes[1].legend(fontsize=6)
    if against:
        n, right = [row[against] for row in rows], axes[2].twinx()
        axes[2].plot(n, [100 * row["nep"] for row in rows], "o-", color="C0")
        right.plot(n, [row["ape"] or math.nan for row in rows], "s", color="C3")
        if fitted:
            at = np.geomspace(min(n), max(n))
            right.plot(
                at, fitted[0] * at ** fitted[1], "--", color="C3", label=f"exponent {fitted[1]:.3f}"
            )
            right.legend(fontsize=6)
        axes[2].set_xlabel({"heads": "heads", "head_dim": "width of a head"}[against])
        axes[2].set_ylabel("NEP (%)", color="C0")
        right.set_ylabel("APE", color="C3")
        right.set_xscale("log")
        if any(row["ape"] for row in rows):
            right.set_yscale("log")


def spectrum(args, rest):
    """The Hessian max eigenvalue spectrum of Park & Kim (Fig. 1b, 4, 6, 7b, C.2b, C.4-C.7, 12c,
    F.1b), of one or more checkpoints in one figure, in the order they are given: of its training
    over time, or of networks that differ in --against. The authors' code is private; A.1 and A.2
    and their answers say what follows here, and the rest is marked as our choice.

    Images: 10 % of the training set, balanced over classes, augmented as in training with draws of
    their own, in a random order that depends on --seed, in mini-batches of 16 (a last smaller one
    is left out), mixed by the training's MixUp and CutMix. Loss: the mean of cross-entropy with
    these soft labels and the training's label smoothing (our choice: it is what was minimised) plus
    ½ · λ · ‖w‖², λ the training's weight decay, over all parameters as in their code (A.1 neglects
    that AdamW's is no penalty); so each eigenvalue is λ more than the cross-entropy's. The network
    is in evaluation mode, as in PyHessian: BatchNorm uses running statistics, nothing is dropped.
    Eigenvalues: of each mini-batch the 5 of largest magnitude, with their sign. PyHessian's power
    iteration with deflation, until an estimate changes by less than 0.1 %, at most 100 times, is
    replaced by Lanczos (see hessian_eigenvalues), until each is within --tolerance, 1 %.
    Density: p(λ) = 1/N Σ_i N(λ; λ_i, σ_i²) over the N eigenvalues of all mini-batches, where
    σ_i = 0.9 · min(s, IQR / 1.34) · n^(-1/5) is Silverman's width of the n that have λ_i's sign,
    with their standard deviation s and quartile distance IQR (our choice; in the figure at least
    1/500 of the axis). NEP is the share of
    negative ones and APE the mean of the positive ones, of the eigenvalues themselves. --against
    fits APE = c · n^a by least squares of the logarithms.
    Returns the "results" that it was asked for."""
    need(args, k=1, tolerance=1e-9, batch=1, memory=0)
    results, device, named = started(args, rest, "spectrum")
    spectra, rows = {}, []
    refuse(("loss",), named[0][2], "is of hessian, landscape and flatness; here it is softmax")
    for name, settings, origin in named:
        model, dataset, _ = network_and_training_images(
            settings, origin, device, args.images, augmented=True
        )
        shuffled(dataset, data.key(settings.seed, 3))
        sizes = {what: attention_size(model.network, what) for what in [args.against] if what}
        loss = functools.partial(train.softmax_loss, smoothing=settings.label_smoothing)
        mix = train.mixing(settings, len(dataset.classes))
        what = (
            f"{args.k} of batches of {args.batch}, {args.images} images, decay "
            f"{settings.weight_decay:g}, smoothing {settings.label_smoothing:g}, tolerance "
            f"{args.tolerance:g}"
        )

        def eigenvalues_of(number):
            batch = Batches(dataset, model, args.batch, mix=mix, seed=settings.seed, only=number)
            how = dict(decay=settings.weight_decay, tolerance=args.tolerance, memory=args.memory)
            found = hessian_spectrum(model, loss, batch, args.k, **how)
            return found | dict(eigenvalues=found["eigenvalues"][0])

        count = len(dataset) // args.batch
        if not count:
            raise UserError(
                f"--images {args.images}: {len(dataset)} images are no mini-batch of {args.batch}"
            )
        tasks = {f"{what}: {i}": functools.partial(eigenvalues_of, i) for i in range(count)}
        share_out(results, name, tasks, "mini-batches")
        found = [results.take(name, part) for part in tasks]
        spectra[name] = [value for one in found for value in one["eigenvalues"]]
        nep, ape = nep_ape(spectra[name])
        numbers = dict(
            nep=nep,
            ape=ape,
            batches=count,
            products=sum(f["products"] for f in found),
            not_converged=sum(not f["converged"] for f in found),
        )
        results.put(name, what, numbers | sizes)
        results.take(name, what)
        rows.append({"network": name} | numbers | sizes)
    fitted = None
    if args.against:
        fitted = power_law([row[args.against] for row in rows], [row["ape"] for row in rows])
        across = f"against {args.against}", "APE = c n^a"
        results.put(*across, dict(zip("ca", fitted)) if fitted else None)
        results.take(*across)
    if train.rank() == 0:
        print_rows(
            [row | dict(nep=f"{row['nep']:.4f}", ape=significant(row["ape"])) for row in rows]
        )
        if fitted:
            paper = {"heads": "-0.562 (Fig. C.5)", "head_dim": "-0.796 (Fig. C.6)"}[args.against]
            tell(
                f"APE = {fitted[0]:.4g} · {args.against}^{fitted[1]:.3f}; the paper's exponent: "
                f"{paper}"
            )
        elif args.against:
            tell(
                f"no exponent: it takes two values of {args.against} and a positive eigenvalue at "
                "each"
            )
        finished(
            results,
            lambda axes: draw_spectrum(axes, spectra, rows, args.against, fitted),
            columns=3 if args.against else 2,
        )
    return results.taken


# -------------------------------------------------------------------------- landscape and flatness

TITLES = {"softmax": "cross-entropy", "sigmoid": "sigmoid loss"}
# --l2: what the axis adds to the loss's name
L2 = {"none": "", "half-square": " + ½ λ‖w‖²", "sum-of-norms": " + λ Σ‖p‖"}
POINTS_PER_PIECE = 5  # that are computed and written together
# --sigma, --rho: our choice, see flatness
SIGMAS, RADII = [0.005, 0.01, 0.02, 0.05], [0.05, 0.1, 0.2, 0.5, 1.0]


def gaussian(model, *seed):
    """A standard normal vector in weight space, in the shape of model.parameters(). What a
    parameter gets depends on the seed (integers) and its name only: drawn in float32 on the CPU."""
    vectors = []
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(data.key(*seed, zlib.crc32(name.encode())))
        vectors.append(torch.randn(p.shape, dtype=torch.float32, generator=generator).to(p))
    return vectors


@torch.no_grad()
def direction(model, *seed, normalise="filter"):
    """A normalised Gaussian direction d in weight space, in the shape of model.parameters().

    normalise="filter" (Li et al. 2018, 1712.09913, §4): d_i ← d_i·‖w_i‖/‖d_i‖, where w_i is all
    that makes output i of a weight: (in, kh, kw) of a convolution, a row of a linear layer.
    Parameters of one dimension (biases, scales of norms) get zero: they stay as they are. Class
    token (1, 1, D) and position embedding (1, N, D) have one i, so these are scaled as a whole.
    "park" is what the code of Park & Kim does instead: norms run over the outputs i, one for each
    (in, kh, kw), so a class token's numbers become ±|w|; and position embeddings too get zero."""

    def scaled(d, w, name):
        if w.ndim < 2 or normalise == "park" and re.search("pos_embed|relative_position", name):
            return d.zero_()
        over = 0 if normalise == "park" else tuple(range(1, w.ndim))
        of_w, of_d = (torch.linalg.vector_norm(v, dim=over, keepdim=True) for v in (w, d))
        return d.mul_(of_w / (of_d + 1e-7 * (normalise == "park")))

    names, weights = zip(*model.named_parameters())
    return list(map(scaled, gaussian(model, *seed), weights, names))


def directions(model, seed=0, normalise="filter"):
    """The two of `landscape`, each as of `direction`."""
    return [direction(model, seed, axis, normalise=normalise) for axis in (0, 1)]


@contextmanager
def displaced(model):
    """A function of pairs (scale, vector in the shape of model.parameters()) that puts the weights
    to w + Σ scale·vector, from the same copy of w each time, so that no rounding adds up.
    Afterwards they are w, bit for bit, also when the body raises."""
    weights = list(model.parameters())
    start = [w.detach().clone() for w in weights]

    @torch.no_grad()
    def move(*steps):
        torch._foreach_copy_(weights, start)
        for scale, vector in steps:
            torch._foreach_add_(weights, vector, alpha=scale)

    try:
        yield move
    finally:
        move()


def mean_loss(model, loss, batches, grad=False):
    """loss(logits, y), a mean over the batch, averaged over the images of all batches, None where
    that is not finite; with grad also its gradient, in the shape of model.parameters()."""
    weights, losses, sizes = list(model.parameters()), [], []
    total = [torch.zeros_like(w) for w in weights] if grad else None
    with torch.set_grad_enabled(grad):
        for x, y in batches:
            logits = model(x)
            value = loss(logits, y)
            if grad:  # zeros for weights that the loss does not depend on
                how = dict(allow_unused=True, materialize_grads=True)
                torch._foreach_add_(total, torch.autograd.grad(value * len(x), weights, **how))
            losses.append(value.detach())
            sizes.append(len(x))
    values = torch.stack(losses).tolist()  # the one time that the device is waited for
    mean = sum(n * v for n, v in zip(sizes, values)) / sum(sizes)
    mean = mean if math.isfinite(mean) else None
    if grad:
        torch._foreach_div_(total, sum(sizes))
    return (mean, total) if grad else mean


def landscape(model, loss, batches, vectors, xs, ys, decayed=None):
    """The loss on the plane w + x·d₁ + y·d₂ (Chen et al. Fig. 1, B.1; Park & Kim Fig. 1a, C.4a,
    C.7a, b), in evaluation mode, BatchNorm's running statistics as they are, no autocast or TF32.

    vectors: (d₁, d₂), as of `directions`. xs, ys: coordinates. loss: of logits and y, mean over the
    batch. decayed: the parameters that an ℓ2 penalty counts; default all. -> dict of x, y; loss,
    the mean over all images; half_square, ½ Σ‖p‖², and sum_of_norms, Σ‖p‖, over tensors p: times
    the weight decay λ, the penalty and what the code of Park & Kim adds instead. Each is a list of
    rows, one for each y; None where a loss is not finite.
    Cost of a point: all images forward. Memory beside the network: three vectors, d₁, d₂, w."""
    decayed = list(model.parameters() if decayed is None else decayed)
    found = dict(x=list(xs), y=list(ys), loss=[], half_square=[], sum_of_norms=[])
    with adversarial.held_still(model, decayed[0].device), displaced(model) as move:
        for y in ys:
            row = []
            for x in xs:
                move((x, vectors[0]), (y, vectors[1]))
                norms = torch.stack(torch._foreach_norm(decayed))
                penalties = (norms.square().sum() / 2).item(), norms.sum().item()
                row.append((mean_loss(model, loss, batches), *penalties))
            for name, values in zip(("loss", "half_square", "sum_of_norms"), zip(*row)):
                found[name].append(list(values))
    return found


def noisy_loss(model, loss, batches, sigma, seed=0, draw=0, relative=False):
    """L(w + σ·z), z a standard normal draw for every parameter, the same for all σ, relative: as
    long as each filter, see `direction`; None where it is not finite. The mean over draws is the
    average flatness E L(w + ε), for small σ, not relative, L + ½ σ² tr H. Evaluation mode. Cost: a
    forward pass of all images."""
    noise = (direction if relative else gaussian)(model, seed, 2, draw)
    with adversarial.held_still(model, noise[0].device), displaced(model) as move:
        move((sigma, noise))
        return mean_loss(model, loss, batches)


def worst_loss(model, loss, batches, rho, steps=20, seed=0):
    """The largest loss that projected gradient ascent finds in the ball ‖ε‖₂ ≤ ρ around all the
    weights: ε ← Π(ε + η·g/‖g‖), g the gradient at w + ε of the mean loss of all images, from ε = 0
    with η = ρ, so that the first step is SAM's (Chen et al. Eq. 2); a step that does not raise the
    loss halves η. A lower bound of the maximum. Where g = 0, a random direction takes its place.

    -> dict of worst and losses: [L(w), L after step 1, …], ending early where the loss, then None,
    or the gradient is not finite; worst is None if a loss is. Evaluation mode, no autocast or TF32.
    Cost of a step: all images forward and backward. Memory beside the network: four vectors."""
    with exactly(model, next(model.parameters()).device), displaced(model) as move:
        epsilon, losses, size = [torch.zeros_like(p) for p in model.parameters()], [], rho
        for _ in range(steps if rho else 0):
            value, ascent = mean_loss(model, loss, batches, grad=True)
            length = global_norm(ascent).item()
            if value is None or not math.isfinite(length):
                break
            if length == 0:
                ascent = gaussian(model, seed, 3)
                length = global_norm(ascent).item()
            size = size / 2 if losses and value <= losses[-1] else size
            losses.append(value)
            torch._foreach_add_(epsilon, ascent, alpha=size / length)
            torch._foreach_mul_(epsilon, rho / max(rho, global_norm(epsilon).item()))
            move((1, epsilon))
        losses.append(mean_loss(model, loss, batches))
    return dict(worst=None if None in losses else max(losses), losses=losses)


def in_pieces(results, network, part, tasks, join, what):
    """A part of the results that is joined from those of a list of functions: each is written when
    it is done, and in the end the whole in their place."""
    pieces = {f"{part}, piece {i}": task for i, task in enumerate(tasks)}
    share_out(results, network, pieces, what)
    done = results.parts[network]
    results.put(network, part, join([done.pop(piece) for piece in pieces]))


def prepared(args, settings, origin, device, batch_size, augmented=False):
    """The network, its loss and the batches: all images on every process, augmented and mixed as
    in training if wanted."""
    model, dataset, workers = network_and_training_images(
        settings, origin, device, args.images, augmented
    )
    mix = train.mixing(settings, len(dataset.classes)) if augmented else None
    mixed = settings.mixup or settings.cutmix
    if augmented and dataset.transform is None and not (dataset.padding or mixed):
        tell("--augmented: this training augments nothing, so the images are the plain ones")
    batches = Batches(dataset, model, batch_size, workers, mix, settings.seed, split=False)
    return model, LOSSES[args.loss], batches


def regularised(found, l2, weight_decay):
    """Numbers of `landscape` -> array of the loss with an ℓ2 penalty; NaN where not finite."""
    penalty = 0 if l2 == "none" else found[l2.replace("-", "_")]
    return np.array(found["loss"], float) + weight_decay * np.array(penalty, float)


def landscape_scale(planes, clip):
    """The least and greatest loss that a figure of planes (arrays, NaN where not finite) shows, and
    how many points are above. The greatest is `clip`, or else three times the least of the planes'
    highest losses, so that one that explodes does not make the others look flat."""
    known = [plane[np.isfinite(plane)] for plane in planes]
    high = min(clip or 3 * min(map(np.max, known)), max(map(np.max, known)))
    low = max(min(high, *map(np.min, known)), high / 1e6)
    if low == high:  # planes are flat; a scale has two ends
        high = max(1.001 * high, 1e-30)
    return low, high, sum((~(plane <= high)).sum() for plane in planes)


def draw_landscape(axes, axis, planes, what, clip):
    """Above surfaces, below contours, on one scale, see landscape_scale; logarithmic, where its end
    is more than 30 times the lowest loss. What is higher or not finite is drawn flat at the top of
    the surface and left white among the contours."""
    from matplotlib import colormaps, colors

    axes = axes.reshape(2, -1)
    low, high, over = landscape_scale(list(planes.values()), clip)
    if over:
        train.say(f"{over} points are not finite or above {high:.4g} (--clip), and drawn there")
    logarithmic = 0 < 30 * low < high
    scale = (colors.LogNorm if logarithmic else colors.Normalize)(low, high)
    levels = (np.geomspace if logarithmic else np.linspace)(low, high, 21)
    for (name, plane), flat, below in zip(planes.items(), *axes):
        shown, picture = np.where(plane <= high, np.maximum(plane, low), high), below.figure
        flat.remove()
        above = picture.add_subplot(flat.get_subplotspec(), projection="3d")
        above.plot_surface(
            *np.meshgrid(axis, axis),
            np.log10(shown) if logarithmic else shown,
            facecolors=colormaps["viridis"](scale(shown)),
            rstride=1,
            cstride=1,
        )
        above.set_zlim(*np.log10([low, high]) if logarithmic else (low, high))
        above.zaxis.set_major_formatter(lambda v, _: f"{10**v if logarithmic else v:.3g}")
        above.set_zlabel(what, labelpad=14 if logarithmic else 8)
        above.set_box_aspect((4, 4, 3), zoom=0.8)
        above.set_title(short(name), fontsize=8)
        whole = np.where(np.isfinite(plane), np.maximum(plane, low), 2 * high)
        filled = below.contourf(axis, axis, whole, levels, norm=scale, cmap="viridis")
        below.contour(axis, axis, whole, levels[1:-1:2], colors="black", linewidths=0.4)
        below.plot(0, 0, "r+")
        below.set_box_aspect(1)
        for ax in (above, below):
            ax.locator_params(nbins=5)
            ax.set(xlabel="x, along d₁", ylabel="y, along d₂")
    picture.get_layout_engine().set(w_pad=0.2)
    picture.colorbar(filled, ax=list(axes[1]), label=what, format="%.3g")


def landscape_command(args, rest):
    """The loss around networks on a plane of two random normalised directions: cross-entropy on a
    class-balanced tenth of the training set (Chen et al. Fig. 1, B.1), or, with --augmented --l2
    half-square, Park & Kim Fig. 1a, C.4a, C.7b. BatchNorm is in evaluation mode. --l2 and --clip
    decide only what is shown. Returns the "results" that it was asked for."""
    need(args, points=2, direction_seed=0, span=1e-6, clip=1e-6)
    results, device, named = started(args, rest, "landscape")
    axis = [args.span * (2 * i - args.points + 1) / (args.points - 1) for i in range(args.points)]
    part = (
        f"{args.loss}, {args.images} of {'augmented ' * args.augmented}images, {args.points}² "
        f"points to ±{args.span:g}, {args.normalise}-normalised, seed {args.direction_seed}"
    )

    def joined(pieces):
        centre, *rest = pieces
        whole = dict(x=axis, y=axis, centre={})
        for key in ("loss", "half_square", "sum_of_norms"):
            values = [value for piece in rest for value in piece[key][0]]
            whole[key] = [values[i : i + len(axis)] for i in range(0, len(values), len(axis))]
            whole["centre"][key] = centre[key][0][0]
        return whole

    for name, settings, origin in named:
        if part in results.parts.get(name, {}):
            continue
        batch_size = settings.micro_batch if args.augmented else 256
        model, loss, batches = prepared(args, settings, origin, device, batch_size, args.augmented)
        vectors = directions(model, args.direction_seed, args.normalise)
        decayed = train.decay_groups(model, settings.decay)[0]
        plane = functools.partial(landscape, model, loss, batches, vectors, decayed=decayed)
        tell(f"{name}: {args.points}² points of {batches.total:,} images")
        # A kill costs one piece of each process; the file is not written for every point.
        tasks = [functools.partial(plane, [0.0], [0.0])]  # the centre
        for y in axis:
            for i in range(0, len(axis), POINTS_PER_PIECE):
                tasks.append(functools.partial(plane, axis[i : i + POINTS_PER_PIECE], [y]))
        in_pieces(results, name, part, tasks, joined, "landscape")
    whole = {name: results.take(name, part) for name, *_ in named}
    if train.rank() == 0:
        planes, rows = {}, []
        for name, settings, _ in named:
            found = whole[name]
            centre, planes[name] = (
                regularised(of, args.l2, settings.weight_decay) for of in (found["centre"], found)
            )
            known = planes[name][np.isfinite(planes[name])]
            low, middle, high = np.quantile(known, (0, 0.5, 1)) if known.size else [None] * 3
            penalty = settings.weight_decay if L2[args.l2] else 0
            numbers = dict(λ=penalty, centre=centre, lowest=low, median=middle, highest=high)
            rows.append(
                {"loss": name}
                | {key: significant(value) for key, value in numbers.items()}
                | {"not finite": planes[name].size - known.size}
            )
            if not known.size:
                train.say(f"{name}: its loss is finite nowhere, so it is not drawn")
                del planes[name]
        print_rows(rows)
        lowest = min((np.nanmin(plane) for plane in planes.values()), default=0)
        if args.clip and args.clip <= lowest:
            raise UserError(f"--clip {args.clip:g}: no loss is below, the lowest is {lowest:.4g}")
        if planes:
            what = TITLES[args.loss] + L2[args.l2]
            figure(
                results.path.with_suffix(".png"),
                lambda axes: draw_landscape(axes, np.array(axis), planes, what, args.clip),
                2,
                len(planes),
            )
        train.say(f"results   {results.path}")
    return results.taken


def average(losses):
    """Of draws: mean and its standard error; None where a loss is not finite, or of one draw."""
    if None in losses:
        return dict(mean=None, standard_error=None, losses=losses)
    error = float(np.std(losses, ddof=1)) / len(losses) ** 0.5 if len(losses) > 1 else None
    return dict(mean=sum(losses) / len(losses), standard_error=error, losses=losses)


def draw_flatness(axes, curves, what, relative):
    """Mean over draws of noise, worst loss in balls; what is not finite, "-" in the table, not."""
    for name, (averages, worst) in curves.items():
        noisy = [(s, of["mean"], of["standard_error"] or 0) for s, of in averages.items()]
        balls = [(rho, loss, 0) for rho, loss in worst.items()]
        for ax, points in zip(axes, ([(0.0, worst[0], 0), *noisy], balls)):
            known = np.array(sorted(p for p in points if p[1] is not None)).reshape(-1, 3)
            ax.errorbar(*known.T, fmt="o-", capsize=3 * (ax is axes[0]), label=name)
    noise = "standard deviation σ of the noise on each weight"
    noise = "noise by the length of its filter" if relative else noise
    for ax, x, y in zip(axes, (noise, "radius ρ of the ball"), ("mean", "worst")):
        ax.set(xlabel=x, ylabel=f"{y} {what}")
        low, high = ax.dataLim.intervaly
        ax.set_yscale("log" if high > 30 * low else "linear")
        ax.legend(fontsize=6)


def flatness(args, rest):
    """How fast the loss of networks rises around their weights, on a class-balanced tenth of the
    training set: its average under Gaussian noise on all weights (average flatness), and the worst
    that projected ascent finds in balls (what SAM minimises, Chen et al. Eq. 1). Noise and radii
    are absolute, so that a layer before a norm withstands more if its weights are all made larger,
    which changes no output; --relative takes noise by each filter's length, as Chen Fig. 1 does.
    The papers at hand give no σ: the defaults are ours, and so are those of ρ, with which Chen
    Table 9 trains from 0.02 on. Returns the "results" that it was asked for."""
    need(args, sigma=0, draws=1, rho=0, steps=1)
    results, device, named = started(args, rest, "flatness")
    images, rows, curves = f"{args.loss}, {args.images} of images", [], {}
    what = "relative noise" if args.relative else "noise"
    noise = {f"{images}, {what} of σ {s:g}, {args.draws} draws": s for s in args.sigma}
    balls = {f"{images}, ball of ρ {r:g}, {args.steps} steps": r for r in [0.0, *args.rho]}
    for name, settings, origin in named:
        done = results.parts.get(name, {}).keys()
        if not {*noise, *balls} <= done:
            given = prepared(args, settings, origin, device, settings.micro_batch)
            for part in [part for part in noise if part not in done]:
                of_sigma = functools.partial(
                    noisy_loss, *given, noise[part], relative=args.relative
                )
                tasks = [functools.partial(of_sigma, draw=draw) for draw in range(args.draws)]
                in_pieces(results, name, part, tasks, average, f"σ = {noise[part]:g}")
            worst_of = functools.partial(worst_loss, *given, steps=args.steps)
            tasks = {part: functools.partial(worst_of, rho) for part, rho in balls.items()}
            share_out(results, name, tasks, "balls")
        found = {part: results.take(name, part) for part in (*noise, *balls)}
        averages = {sigma: found[part] for part, sigma in noise.items()}
        worst = {rho: found[part]["worst"] for part, rho in balls.items()}
        curves[name] = averages, worst
        row = {"loss": name, "σ = ρ = 0": significant(worst[0])}
        for sigma, numbers in averages.items():
            row[f"σ = {sigma:g}"] = significant(numbers["mean"], numbers["standard_error"])
        rows.append(row | {f"ρ = {r:g}": significant(value) for r, value in worst.items() if r})
    if train.rank() == 0:
        print_rows(rows)
        finished(
            results,
            lambda axes: draw_flatness(axes, curves, TITLES[args.loss], args.relative),
            columns=2,
        )
    return results.taken


# ---------------------------------------------------------------------------- neural tangent kernel

TABLE_1 = {  # Chen et al.: NTK κ, λmax, top-1, top-1 on ImageNet-C; then Table 3's λmax of blocks
    "vit_b16": (4205.3, 738.8, 74.6, 46.6, 300.4, 179.8, 281.4, 44.4, 32.4, 26.9),
    "vit_b16, SAM": (None, 20.9, 79.9, 56.5, 3.8, 8.5, 9.6, 1.7, 1.7, 1.5),
    "mixer_b16": (14468.0, 1644.4, 66.4, 33.8, 1042.3, 95.8, 417.9, 239.3, 41.2, 5.1),
    "mixer_b16, SAM": (None, 22.5, 77.4, 48.8, 18.2, 1.4, 9.5, 4.0, 1.1, 0.3),
    "resnet50": (2801.6, 122.9, 76.0, 44.6),
    "resnet152": (2801.6, 179.8, 78.5, 50.0),
}
# Parameters (1, …) that are added to or put beside the tokens of each image.
OF_TOKENS = ("cls_token", "class_token", "pos_embed", "pos_embedding")
CACHE = 2**22  # bytes of gradients that a CPU forms and multiplies before they leave its cache
WORKING = 2**27  # bytes of a layer's gradients, and of its patches, that are there at once


class ReluForGelu(TorchFunctionMode):
    """Under it ReLU is computed wherever GELU is called (Chen et al., Appendix D)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return F.relu(args[0]) if function is F.gelu else function(*args, **(kwargs or {}))


@contextmanager
def hooked(model, hook, names, before=False):
    """hook(name, module, args, kwargs, output) is called after each of these modules or, without
    output, before."""
    handles = []
    for name in names:
        module = model.get_submodule(name)
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        handles.append(register(functools.partial(hook, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def per_image(model, names, images):
    """{name: the parameter (1, …), once for each image}."""
    return {
        name: p.detach().expand(images, *p.shape[1:]).clone().requires_grad_()
        for name, p in model.named_parameters()
        if name in names
    }


def owners(model, x):
    """Who has which of the parameters in the kernel: {module's name: names of parameters in it},
    the innermost module that has the parameter wherever it is used and is called once, with one
    tensor (B, …), and returns one; and the names of those that are one for each image (OF_TOKENS,
    if image i's logits depend on the i-th copy alone)."""
    x, calls = x[:3], {}  # three: seldom a size of anything else

    def note(name, module, args, kwargs, output):
        tensors = all(isinstance(value, torch.Tensor) for value in (*args, output))
        alone = tensors and len(args) == 1 and not kwargs
        of_images = alone and args[0].shape[:1] == output.shape[:1] == x.shape[:1]
        calls[name] = of_images and name not in calls

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
    return train.to_exact(j @ j.T)


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
        if whole is not None:
            j = some @ whole
        else:
            of_images = zip(some.split(images), a.split(images))
            j = torch.cat([h @ patches(b) for h, b in of_images])
        total = total + inner(j.flatten(1))
    return total


def by_mapping(model, name, names, a):
    """Any module's part of the kernel, as a function of the gradient at its output g (K, B, …):
    autograd's, of the module called once for each image with parameters of its own."""
    layer, prefix = model.get_submodule(name), f"{name}." * bool(name)
    copies = {
        n.removeprefix(prefix): p.detach().expand(len(a), *p.shape).clone().requires_grad_()
        for n, p in model.named_parameters()
        if n in names
    }
    y = torch.func.vmap(lambda w, a: torch.func.functional_call(layer, w, (a[None],))[0])(copies, a)
    return lambda g: sum(
        inner(j.flatten(1))
        for of_one in g
        for j in torch.autograd.grad(
            y, list(copies.values()), of_one, retain_graph=True, allow_unused=True
        )
        if j is not None
    )


def linearised(model, owned, tokens, x, limit):
    """Calls the model. -> logits (B, C) and two lists: places in their graph, and for each of these
    the function that makes of the gradients there (K, B, …) a part of the kernel."""
    copies, called = per_image(model, tokens, len(x)), {}

    def note(name, module, args, kwargs, output):
        called[name] = args[0].detach(), get_gradient_edge(output)

    with hooked(model, note, owned):
        logits = torch.func.functional_call(model, copies, (x,))
    places = list(copies.values())
    parts = [lambda g: sum(inner(j.flatten(1)) for j in g)] * len(copies)
    for name, (a, edge) in called.items():
        layer = model.get_submodule(name)
        # not of a subclass that does something else, as to standardise its weight
        plain = type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward)
        if isinstance(layer, nn.Conv2d):
            plain &= layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        whole = {f"{name}.{n}" for n, _ in layer.named_parameters(recurse=False)} == {*owned[name]}
        places.append(edge)
        parts.append(
            functools.partial(by_products, layer, limit, a)
            if plain and whole
            else by_mapping(model, name, owned[name], a)
        )
    return logits, places, parts


def ntk_plan(model, x, projections=0, memory=4 * 2**30):
    """How ntk stays below `memory` bytes beside the network, from a call with one image: dict with
    the images and the directions taken at once, the bytes that these need, those of the Jacobian
    that is never formed, and for ntk itself a layer's limit and owners. ValueError if two images
    are too many."""
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
        least = min(two + 2 * WORKING, two * 4 / 3) / 2**30  # of which `room` is `two`
        raise ValueError(
            f"two images take {least:.2g} GiB, more than the {memory / 2**30:.2g} GiB allowed"
        )
    at_once = max(1, min(directions, (room // images - graph - grads) // grads))
    jacobian = len(x) * logits.shape[1] * sum(p.nbytes for p in model.parameters())
    return dict(
        images=images,
        directions=at_once,
        jacobian=jacobian,
        owners=(owned, tokens),
        limit=limit,
        bytes=images * (graph + grads * (at_once + 1)) + 2 * limit,
    )


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
        kernel = torch.zeros(len(x), len(x), **train.exactest(x.device))
        at_once = plan["images"]
        groups = torch.arange(len(x)).split(at_once if at_once == len(x) else at_once // 2)
        pairs = [torch.cat(pair) for pair in itertools.combinations(groups, 2)] or groups
        for chosen in pairs:
            logits, places, parts = linearised(model, *plan["owners"], x[chosen], plan["limit"])
            outputs = torch.eye(logits.shape[1], dtype=torch.float64)  # directions in their space
            if 0 < projections < len(outputs):
                generator, shape = torch.Generator().manual_seed(seed), (len(outputs), projections)
                normal = torch.randn(shape, dtype=torch.float64, generator=generator)
                outputs = torch.linalg.qr(normal)[0].T  # (r, C)
            block = 0
            for some in outputs.to(logits).split(plan["directions"]):
                of_each = [
                    torch.autograd.grad(
                        logits, places, v.expand_as(logits), retain_graph=True, allow_unused=True
                    )
                    for v in some
                ]
                for g, part in zip(zip(*of_each), parts):
                    if g[0] is not None:  # of what the logits do not depend on
                        block = block + part(torch.stack(g))
            kernel[chosen[:, None], chosen] = block / len(outputs)
    eigenvalues = torch.linalg.eigvalsh(finite(kernel, "the kernel")).flip(0).tolist()
    largest, smallest = eigenvalues[0], eigenvalues[-1]
    return dict(
        kernel=kernel.tolist(),
        eigenvalues=eigenvalues,
        condition=largest / smallest if smallest > 0 else None,
        resolved=smallest > len(x) * torch.finfo(x.dtype).eps * largest,
    )


def measure_statistics(model, x):
    """BatchNorm's running statistics become those of x, each layer's behind the ones before it:
    what training normalises by in its first step."""

    def measure(name, norm, args, kwargs):
        values = args[0].transpose(0, 1).flatten(1)
        norm.running_mean.copy_(values.mean(1))
        norm.running_var.copy_(values.var(1, correction=0))

    layers = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    with hooked(model, measure, layers, before=True), exactly(model, x.device), torch.no_grad():
        model(x)


def ntk_summary(found):
    """Of batches: mean, standard deviation and median of κ over those that have one, and the mean
    of each eigenvalue with the ratio of these means, which a λ_min near zero disturbs less."""
    kappa = [of["condition"] for of in found if of["condition"] is not None]
    spectrum = np.mean([of["eigenvalues"] for of in found], axis=0).tolist()
    return {
        "κ": float(np.mean(kappa)) if kappa else None,
        "±": float(np.std(kappa, ddof=1)) if len(kappa) > 1 else None,
        "median": float(np.median(kappa)) if kappa else None,
        "λ_max": spectrum[0],
        "λ_min": spectrum[-1],
        "λ_max / λ_min": spectrum[0] / spectrum[-1] if spectrum[-1] > 0 else None,
        "batches": len(found),
        "spectrum": spectrum,
    }


def draw_ntk(axes, summaries):
    """The mean of each eigenvalue of the kernel over batches, largest first."""
    for name, summary in summaries.items():
        spectrum = [v for v in summary["spectrum"] if v > 0]
        kappa = "" if summary["κ"] is None else f", κ = {summary['κ']:.3g}"
        axes.plot(range(1, len(spectrum) + 1), spectrum, ".-", label=name + kappa)
    axes.set(yscale="log", xlabel="index i", ylabel="mean eigenvalue λ_i of the tangent kernel")
    axes.legend(fontsize=6)


def ntk_command(args, rest):
    """The condition number of the neural tangent kernel of networks at initialisation, in batches
    of 48 training images (Chen et al. Table 1, Appendix D): the architecture of a checkpoint, or of
    --model, with weights drawn from --seed, ReLU in place of GELU, a new head, and BatchNorm with
    the statistics of the batch as constants. Returns the "results" that it was asked for."""
    need(args, projections=0, memory=1e-6)
    fresh = args.at == "init"
    head = args.head or ("lecun" if fresh else "own")
    activation = args.activation or ("relu" if fresh else "own")
    statistics = args.statistics or ("batch" if fresh else "own")
    results, device, named = started(args, rest, "ntk", untrained=True)
    summaries, shown = {}, {}
    for name, settings, origin in named:
        if not (fresh or settings.init_from):
            raise UserError("--at checkpoint needs --checkpoint")
        if fresh:
            settings = argparse.Namespace(**vars(settings) | dict(init_from=""))
        model, dataset, _ = network_and_training_images(settings, origin, device, args.images)
        if not 2 <= args.batch <= len(shuffled(dataset, 0)):
            raise UserError(
                f"--batch {args.batch}: at least 2 and, of these images, at most {len(dataset)}"
            )
        _, own = train.classifier(model)
        if own is None and head != "own":
            raise UserError(f"{settings.model} has no linear head: add --head own")
        if own is not None and not own.weight.any():
            tell(
                f"head      {settings.model} begins with a zero head, through which no gradient "
                f"passes; taken: {head}"
            )
        if head == "zero":
            nn.init.zeros_(own.weight)
        elif head == "lecun":
            torch.manual_seed(data.key(settings.seed, 3))
            drawn = torch.empty_like(own.weight, device="cpu")  # the same numbers for any device
            vit.lecun_normal_(drawn)
            own.weight.data.copy_(drawn)
        budget, plan = int(args.memory * 2**30), None
        part = (
            f"{'initialised' if fresh else 'trained'}, seed {settings.seed}, {head} head, "
            f"activation {activation}, statistics {statistics}, {args.projections} projections, "
            f"{args.images} images by {args.batch}, batch"
        )

        def batch(i):
            ((x, _),) = Batches(dataset, model, args.batch, only=i)
            return x

        def measure(i):
            x, mode = batch(i), ReluForGelu() if activation == "relu" else nullcontext()
            with mode:
                if statistics == "batch":
                    measure_statistics(model, x)
                found = ntk(model, x, args.projections, data.key(settings.seed, i), budget, plan)
            return {k: found[k] for k in ("condition", "resolved", "eigenvalues")}

        count = len(dataset) // args.batch  # a rest is left out
        tasks = {f"{part} {i}": functools.partial(measure, i) for i in range(count)}
        if tasks.keys() - results.parts.get(name, {}).keys():
            try:
                plan = ntk_plan(model, batch(0), args.projections, budget)
            except ValueError as error:
                raise UserError(f"--memory: {error}") from None
            tell(
                f"memory    {plan['bytes'] / 2**30:.2f} GiB beside the network, for "
                f"{plan['images']} images and {plan['directions']} outputs at once; the Jacobian "
                f"has {plan['jacobian'] / 2**30:.2f} GiB"
            )
        share_out(results, name, tasks, "ntk")
        found = [results.take(name, part) for part in tasks]
        summaries[name], shown[name] = ntk_summary(found), settings.model
        unresolved = sum(not of["resolved"] for of in found)
        if unresolved:
            tell(
                f"{name}: in {unresolved} of {len(found)} batches λ_min is lost in the rounding of "
                f"{settings.dtype}" + "; try --dtype float64" * (settings.dtype != "float64")
            )
    if train.rank() == 0:
        rows = []
        for name, summary in summaries.items():
            row = {"NTK": name} | {key: v for key, v in summary.items() if key != "spectrum"}
            row = {key: significant(v) if isinstance(v, float) else v for key, v in row.items()}
            rows.append(row | {"Table 1": TABLE_1.get(shown[name], [None])[0] if fresh else None})
        print_rows(rows)
        finished(results, lambda axes: draw_ntk(axes, summaries))
    return results.taken


# ------------------------------------------------------------------------------- norms and sparsity

ACTIVATIONS = (F.gelu, F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_)
UNWATCHED = {"ELU", "Hardswish", "LeakyReLU", "Mish", "PReLU", "ReLU6", "SELU", "SiLU", "Softplus"}
IMAGES_PER_PIECE = 1024  # that are measured and written together
TABLE_3 = {  # Chen et al.: ‖w‖, ‖a_1‖, ‖a_6‖, ‖a_12‖
    "vit_b16": (269.3, 104.9, 104.3, 138.1),
    "vit_b16, SAM": (353.8, 117.0, 120.3, 97.2),
    "mixer_b16": (197.6, 96.7, 135.1, 74.9),
    "mixer_b16, SAM": (389.9, 110.9, 176.0, 216.1),
}


class Watched(TorchFunctionMode):
    """Under it take(name, values) is called with what each ReLU and GELU returns, be it a module or
    a function: named by the module at work, which the hooks `begins` and `ends` tell, and, from the
    second in one pass on, a number."""

    def __init__(self, take):
        super().__init__()
        self.take, self.at_work, self.calls = take, [], {}

    def begins(self, name, module, args, kwargs):
        if not self.at_work:
            self.calls.clear()  # a new pass
        self.at_work.append(name)

    def ends(self, name, module, args, kwargs, output):
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
        candidates = [
            block
            for block in around
            if block[-1:].isdigit() and "stem" not in block and any(modules[block].children())
        ]
        blocks[name] = candidates[0] if candidates else ""
    return blocks


def first_middle_last(values):
    """Of a list's values these three, None of an empty one: the blocks of Chen et al. Table 3."""
    return [values[i] if values else None for i in (0, (len(values) - 1) // 2, -1)]


def activity(model, batches):
    """What norms and sparsity are made of, as sums over images. -> dict: images, their number;
    weights, ‖w‖₂ of all parameters, biases and norms' too; activations {name: [block, values above
    zero, values, Σ of an image's ℓ2 norm]} of each ReLU's and GELU's output in order; outputs
    {block: Σ of an image's ℓ2 norm} of the block's output. Evaluation mode; one forward pass for
    each batch. UserError if a sum is not finite, or the model has no activation functions in a
    block, or ones of other kinds."""
    blocks, found, outputs, images = blocks_of(model), {}, {}, 0
    others = {type(module).__name__ for module in model.modules()} & UNWATCHED
    if others:
        raise UserError(f"{' and '.join(sorted(others))}: only ReLU and GELU are watched here")

    def norm(values):
        exact = train.exactest(values.device)
        values = values.flatten(1).to(exact["device"])
        return torch.linalg.vector_norm(values, dim=1, dtype=exact["dtype"]).sum()

    def take(name, values):
        of = found.setdefault(name, [blocks[name.partition(" ")[0]], 0, 0, 0])
        of[1:] = of[1] + (values > 0).sum(), of[2] + values.numel(), of[3] + norm(values)

    def put(block, module, args, kwargs, output):
        if isinstance(output, torch.Tensor):  # a stage of blocks may return several
            outputs[block] = outputs.get(block, 0) + norm(output)

    watched = Watched(take)
    with (
        exactly(model, next(model.parameters()).device),
        torch.no_grad(),
        hooked(model, watched.begins, blocks, before=True),
        hooked(model, watched.ends, blocks),
        hooked(model, put, set(blocks.values()) - {""}),
        watched,
    ):
        for x, _ in batches:
            model(x)
            images += len(x)
    lengths = [*outputs.values(), *(length for *_, length in found.values())]
    finite(torch.tensor([float(length) for length in lengths]), "the norm of an activation")
    with_activation = {block for block, *_ in found.values()}
    if not with_activation - {""}:
        raise UserError("no ReLU or GELU in a block")
    weights = sum(train.to_exact(p.detach()).square().sum() for p in model.parameters())
    return dict(
        images=images,
        weights=finite(weights.sqrt().item(), "the norm of the weights"),
        outputs={b: float(v) for b, v in outputs.items() if b in with_activation},
        activations={
            name: [block, int(active), n, float(length)]
            for name, (block, active, n, length) in found.items()
        },
    )


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


def norms(sums):
    """Chen et al. Table 3 from activity's sums: ‖w‖₂ and for each block k the mean over images of
    ‖a_k‖₂, over an image's tokens or pixels and neurons. The post-activation a_k = f_k(h_k) is what
    the activation function returns (§4.4); of several in a block the last: a Mixer's channel MLP, a
    ResNet's last ReLU. As the paper's words also fit it, output is the same of what the block
    returns.
    -> dict: weights, activation {block: …}, output {block: …}."""
    last = {block: length for block, _, _, length in sums["activations"].values() if block}
    means = {
        name: {block: length / sums["images"] for block, length in lengths.items()}
        for name, lengths in (("activation", last), ("output", sums["outputs"]))
    }
    return dict(weights=sums["weights"]) | means


def in_parts(
    args, results, device, part, measure, join, first, *other, batch=0, load=network_and_held_out
):
    """That part of the first network's results: of measure(model, batches, *other models), by
    pieces of IMAGES_PER_PIECE or a little less, but of a batch at least. first, other: network's
    name, settings, origin; load: a function that reads it and its images."""
    name, side = first[0], first[1].image_size
    if part not in results.parts.get(name, {}):
        (model, dataset, workers), *others = [
            load(settings, origin, device, args.images) for _, settings, origin in (first, *other)
        ]
        batch = batch or train.images_at_once(
            model,
            side,
            device,
            measure.__name__,
            lambda x: measure(model, [(x, None)]),
            64,
            IMAGES_PER_PIECE,
        )
        size = max(IMAGES_PER_PIECE // batch, 1) * batch

        def measured_from(start):
            some = dataset.part(range(start, min(start + size, len(dataset))))
            batches = Batches(some, model, batch, workers, split=False)
            return measure(model, batches, *(model for model, *_ in others))

        tasks = [functools.partial(measured_from, i) for i in range(0, len(dataset), size)]
        in_pieces(results, name, part, tasks, join, measure.__name__)
    return results.take(name, part)


def measured(args, rest, what, of):
    """Both subcommands: of(sums) of each network, from its file or computed. -> Results, {network:
    (its model's name, numbers)}."""
    results, device, named = started(args, rest, what, untrained=True)
    found, part, load = {}, f"{args.images} images", network_and_training_images
    for network in named:
        numbers = in_parts(
            args, results, device, part, activity, lambda sums: of(added(sums)), network, load=load
        )
        found[network[0]] = network[1].model, numbers
    return results, found


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
    return dict(
        block={block: active / n for block, (active, n) in of_block.items()},
        activation={name: active / n for name, (_, active, n, _) in sums["activations"].items()},
    )


def draw_blocks(axes, networks, what):
    """A curve over blocks for each network."""
    for name, of in networks.items():
        axes.plot(range(1, len(of) + 1), list(of.values()), "o-", label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(ylim=(0, None), xlabel="block k", ylabel=what)
    axes.legend(fontsize=6)


def norms_command(args, rest):
    """The norms of networks' weights and of the activations of their blocks, a mean over training
    images (Chen et al. Table 3). Returns the "results" that it was asked for."""
    results, found = measured(args, rest, "norms", norms)
    if train.rank() == 0:
        rows = []
        for name, (_, numbers) in found.items():
            rows.append({"network": name, "‖w‖": numbers["weights"]})
            for key, symbol in (("activation", "a"), ("output", "x")):
                values = first_middle_last(list(numbers[key].values()))
                for which, value in zip(("1", "mid", "last"), values):
                    rows[-1][f"‖{symbol}_{which}‖"] = value
        models = {model for model, _ in found.values()}
        for name, values in TABLE_3.items():
            if name.partition(",")[0] in models:
                rows.append(dict(zip(rows[0], (f"Table 3, {name}", *values))))
        print_rows(rows)
        curves = {name: numbers["activation"] for name, (_, numbers) in found.items()}
        middles = "; ".join(f"{(len(of) + 1) // 2} of {len(of)}" for of in curves.values())
        train.say(
            "a_k: after the activation function of block k, x_k: the block's output; mid: "
            + middles
        )
        what = "mean norm after the activation, ‖a_k‖"
        finished(results, lambda axes: draw_blocks(axes, curves, what))
    return results.taken


def sparsity_command(args, rest):
    """The share of active neurons in each block of networks, on training images (Chen et al. Fig. 2
    right, §4.4). Returns the "results" that it was asked for."""
    results, found = measured(args, rest, "sparsity", sparsity)
    shares = {
        name: {block: 100 * share for block, share in of["block"].items()}
        for name, (_, of) in found.items()
    }
    if train.rank() == 0:
        rows = []
        for name, of in shares.items():
            row = {"active neurons %": name, "mean": sum(of.values()) / len(of)}
            rows.append(row | {f"block {i}": share for i, share in enumerate(of.values(), 1)})
        print_rows(rows)
        finished(results, lambda axes: draw_blocks(axes, shares, "active neurons (%)"))
    return results.taken


@contextmanager
def as_is(model):
    """For passes that nothing is differentiated of, in evaluation mode."""
    with adversarial.held_still(model, next(model.parameters()).device), torch.inference_mode():
        yield


def accuracy(model, batches, skip=None):
    """Top-1 in percent without the unit skip; UserError if a logit is not finite. Waits for the
    device once."""
    sums = images = 0
    with as_is(model):
        for x, y in batches:
            logits = model(x) if skip is None else model(x, skip=skip)
            right = (logits.argmax(1) == y).sum()
            sums = sums + torch.stack([train.to_exact(right), train.to_exact(logits).sum()])
            images += len(x)
    right, _ = finite(sums, "a logit").tolist()
    return 100 * right / images


# ------------------------------------------------------------------------------------------ compare


def without_empty(rows):
    """Tables of dicts: all with the same columns, those that have a value in one of them."""
    columns = dict.fromkeys(key for row in rows for key, v in row.items() if v is not None)
    return [{column: row.get(column) for column in columns} for row in rows]


def four_digits(value):
    """A cell of a table; None is -."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(rows):
    """A table of dicts with the same keys."""
    cells = [list(rows[0]), ["---"] * len(rows[0])]
    cells += [list(map(four_digits, row.values())) for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def compare_command(args, rest):
    """Tables 1 and 3 of Chen et al. for networks: NTK κ at initialisation, largest Hessian
    eigenvalues, accuracy, norms, by the subcommands hessian, ntk, norms (with --images) and
    robustness, else with their defaults, whose files are in OUT/compare; of fewer than 48 images
    the kernel has one smaller batch. The paper's corruptions are ImageNet-C (--benchmarks val c).
    Beside these loss and accuracy on the training images, because where the loss is near zero, the
    curvature of the cross-entropy vanishes with it, whatever the network. Returns the "results"
    that it was asked for."""
    results, device, named = started(args, rest, "compare")
    refuse(("loss",), named[0][2], "is of hessian, landscape and flatness; here it is softmax")
    folder, images = results.path.parent / "compare", f"{args.images} images"

    def run(command, *flags):
        argv = [command, "--out-dir", str(folder), *flags]
        argv += ["--checkpoint", *args.checkpoint] if args.checkpoint else []
        own = make_parser().parse_args(argv)
        return own.function(own, rest)

    def parts_of(name, found):
        if name not in found:
            raise UserError(f"{name} changed meanwhile: wait until its training is finished")
        return found[name]

    count = min(len(training_images(settings, device, args.images)) for _, settings, _ in named)
    if count < 2:
        raise UserError(f"--images {args.images}: one image; a kernel is of two or more")
    few = ["--batch", str(min(count, 48))]
    hessians, kernels, lengths = (
        run(command, "--images", args.images, *more)
        for command, more in (("hessian", []), ("ntk", few), ("norms", []))
    )
    accuracies = run("robustness", "--benchmarks", *args.benchmarks)
    first, third = [], []
    # robustness measures in its own --dtype, which is part of its networks' names
    measured_as = [label(settings)[0] for settings, _ in networks(args.checkpoint, rest)]
    for accuracy_of, (name, settings, origin) in zip(measured_as, named):
        model, dataset, workers = network_and_training_images(settings, origin, device, args.images)
        batches = Batches(dataset, model, 256, workers, split=False)

        def fit():
            with adversarial.held_still(model, device):
                loss = mean_loss(model, train.softmax_loss, batches)
            return {"training loss": loss, "training top-1 %": accuracy(model, batches)}

        share_out(results, name, {images: fit}, "training images")
        top1 = {part: of["top1"] for part, of in accuracies.get(accuracy_of, {}).items()}
        top1 = robustness_summary(top1, "cifar" not in settings.dataset)
        eigenvalues = parts_of(name, hessians)
        blocks = {part.split(":")[0]: of["eigenvalues"][0] for part, of in eigenvalues.items()}
        of_batches = parts_of(name, kernels)
        first.append(
            {
                "Table 1": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "NTK κ": ntk_summary(list(of_batches.values()))["κ"],
                "λmax": blocks["whole"],
            }
            | results.take(name, images)
            | {"top-1 %": top1.get("val"), "c %": top1.get("c"), "c-lite %": top1.get("c-lite")}
        )
        numbers = parts_of(name, lengths)[images]
        inside = first_middle_last(list(numbers["activation"].values()))
        third.append(
            {"Table 3": name, "whole": blocks.pop("whole"), "‖w‖": numbers["weights"]}
            | dict(zip(("‖a_1‖", "‖a_mid‖", "‖a_last‖"), inside))
            | blocks
        )
    columns = {settings.model: list(row) for row, (_, settings, _) in zip(third, named)}
    for name, (kappa, whole, top1, corrupted, *blocks) in TABLE_1.items():
        if name.split(",")[0] in columns:
            row = {"Table 1": f"Chen, {name}", "NTK κ": kappa, "λmax": whole}
            first.append(row | {"top-1 %": top1, "c %": corrupted})
            numbers = (f"Chen, {name}", whole, *TABLE_3.get(name, (None,) * 4), *blocks)
            third.append(dict(zip(columns[name.split(",")[0]], numbers)))
    if train.rank() == 0:
        tables = []
        for rows in map(without_empty, (first, third)):
            train.say()
            print_rows([dict(zip(row, map(four_digits, row.values()))) for row in rows])
            tables.append(markdown(rows))
        path = results.path.with_suffix(".md")
        write(path, "\n".join(tables).encode())
        train.say(f"results   {results.path}, {path}")
    return results.taken


# -------------------------------------------------------------------------------- maps and lesions

SHADES = {"attention": "0.85", "pooling": "lightsteelblue"}  # Park & Kim's gray and blue


def units_of(model):
    """{name: [kind, stage]} of the points at which feature maps are analysed, in order: the stem
    and the residual stream after each attention, MLP, convolution block and pooling, as in Park &
    Kim's code. Of a network that does not name them, torchvision's and timm's others, the blocks,
    kind "block"; those in one module are a stage. UserError if it has none."""
    network = getattr(model, "network", model)
    if hasattr(network, "intermediates"):
        return {
            name: [kind, stage]
            for name, (kind, stage) in network.intermediates.items()
            if kind not in ("weights", "representation")
        }
    inner = blocks_of(network)
    blocks = dict.fromkeys(
        inner[name]
        for name, module in network.named_modules()
        if not any(module.children()) and inner[name]
    )
    if not blocks:
        raise UserError(f"{type(network).__name__} neither names its units nor has blocks")
    stages = itertools.groupby(blocks, lambda block: block.rpartition(".")[0])
    return {block: ["block", i] for i, (_, stage) in enumerate(stages, 1) for block in stage}


def feature_maps(model, x, names):
    """{unit: its map (B, C, H, W)} of images. Tokens lie on a square; what is left over, a class
    token, comes first and is dropped."""
    network, found = getattr(model, "network", model), dict.fromkeys(names)
    if hasattr(network, "intermediates"):
        model(x, out=found)
    else:
        with hooked(network, lambda name, module, args, kwargs, y: found.update({name: y}), names):
            model(x)
    channels_last = isinstance(network, torchvision.models.SwinTransformer)
    channels_last |= getattr(network, "output_fmt", "") == "NHWC"  # timm's word for it
    for name, y in found.items():
        if not isinstance(y, torch.Tensor) or y.ndim not in (3, 4):
            raise UserError(f"{type(network).__name__}: its block {name} gives no feature map")
        if y.ndim == 3:
            side = math.isqrt(y.shape[1])
            found[name] = y[:, -side * side :].mT.unflatten(2, (side, side))
        elif channels_last:
            found[name] = y.permute(0, 3, 1, 2)
    return found


def mean_over_images(model, batches, measure):
    """Of measure(map (B, C, H, W)) -> (B, …), after each unit. -> dict: images, their number; units
    {name: [kind, stage]}; side {name: the map's height}; and {name: mean}."""
    names, sums, sides, images = units_of(model), {}, {}, 0
    with as_is(model):
        for x, _ in batches:
            for name, y in feature_maps(model, x, names).items():
                sides[name] = y.shape[2]
                exact = train.exactest(y.device)
                values = measure(y).to(exact["device"])
                sums[name] = sums.get(name, 0) + values.sum(0, dtype=exact["dtype"])
            images += len(x)
    means = {name: finite((of / images).cpu(), f"the mean of {name}") for name, of in sums.items()}
    return dict(images=images, units=names, side=sides), means


def fourier(model, batches):
    """Park & Kim Fig. 2a, 8, D.2: Δ log amplitude of the feature map after each unit,
        Δ(f) = A(f) − A(0),  A(f) = mean over images and channels of ln(|FFT₂(x)(f)| + 1e-6),
    x a channel's map (H, H), the FFT not normalised. diagonal: at (f, f), f = 2πk/H, k = 0 … H//2;
    radial: the mean over the ring of frequencies whose |f| is nearest to this f. For even H the
    last f is π, the paper's 1.0π, where its code takes the one before, π(1 − 2/H), which for H = 2
    would be f = 0. The logarithm's mean is lower by ½ ln 2 where FFT₂ is real, at f = 0 and, for
    even H, at (π, π), (π, 0) and (0, π): on the diagonal white noise has Δ = 0 at both ends and
    ½ ln 2 between.
    -> dict: images; units {name: [kind, stage]}; side {name: H}; frequency {name: [f/π]}; diagonal,
    radial {name: [Δ]}. One forward pass. UserError for a map that is not square."""
    found, amplitudes = mean_over_images(
        model, batches, lambda y: torch.fft.fft2(y).abs().add(1e-6).log().mean(1)
    )
    found |= dict(frequency={}, diagonal={}, radial={})
    for name, a in amplitudes.items():
        side, half = len(a), len(a) // 2 + 1
        if a.shape != (side, side):
            raise UserError(f"{name} has a map of {side} × {a.shape[1]}; it has to be square")
        k = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
        ring = torch.hypot(k, k[:, None]).round().long().flatten()
        rings = torch.bincount(ring, a.flatten()) / torch.bincount(ring)
        found["frequency"][name] = [2 * i / side for i in range(half)]
        for form, curve in (("diagonal", a.diagonal()), ("radial", rings)):
            found[form][name] = (curve[:half] - a[0, 0]).tolist()
    return found


def variance(model, batches):
    """Park & Kim Fig. 9, D.1: the variance of each unit's feature map over its H·W points
    (unbiased), a mean over channels and images. -> dict: images, units, side as fourier's; variance
    {name: number}, 0 of a map of one point. One forward pass."""
    found, means = mean_over_images(
        model,
        batches,
        lambda y: y.flatten(2).var(2, correction=min(1, y[0, 0].numel() - 1)).mean(1),
    )
    return found | dict(variance={name: mean.item() for name, mean in means.items()})


def pooled(parts):
    """fourier or variance over all images from those over disjoint parts of them."""
    images = [part["images"] for part in parts]
    whole = parts[0] | dict(images=sum(images))
    for key in {"diagonal", "radial", "variance"} & whole.keys():
        whole[key] = {
            unit: np.average([part[key][unit] for part in parts], axis=0, weights=images).tolist()
            for unit in whole[key]
        }
    return whole


def of_maps(args, rest, measure):
    """measure(model, batches) of each network. -> Results, {network: numbers}."""
    results, device, named = started(args, rest, measure.__name__)
    found, part = {}, f"{args.images} images"
    for network in named:
        found[network[0]] = in_parts(args, results, device, part, measure, pooled, network)
    return results, found


def changes(numbers, values):
    """{unit: its value minus that before it}, where the map has the same size before and after."""
    side = numbers["side"]
    return {
        unit: after - before
        for (one, before), (unit, after) in itertools.pairwise(values.items())
        if side[one] == side[unit] > 1
    }


def draw_frequencies(axes, of, form):
    """Fig. 2a, D.2 left: a curve for each unit."""
    from matplotlib import colormaps

    for i, (unit, curve) in enumerate(of[form].items()):
        color = colormaps["viridis"](i / max(len(of[form]) - 1, 1))
        axes.plot(of["frequency"][unit], curve, ".-", color=color)
    axes.set(
        xlabel=f"frequency / π, {form} (dark: first unit, yellow: last)", ylabel="Δ log amplitude"
    )


def draw_depth(axes, units, values, what, width):
    """Fig. 8, 9, 10b: a value of each unit against normalised depth, its index over the last; from
    the point before it, or half a width, attention gray, pooling blue; dotted: a stage begins."""
    last, stages = max(len(values) - 1, 1), [units[unit][1] for unit in values]
    for i, unit in enumerate(values):
        if units[unit][0] in SHADES:
            shade, ends = SHADES[units[unit][0]], ((i - width) / last, (i - width + 1) / last)
            axes.axvspan(*ends, color=shade, linewidth=0)
        if i and stages[i] > stages[i - 1]:
            axes.axvline((i - width) / last, color="black", linestyle=":", linewidth=1)
    axes.plot(np.arange(len(values)) / last, list(values.values()), "o-")
    axes.set(xlabel="normalised depth (gray: attention, blue: pooling)", ylabel=what)


def report(results, found, what, values, form=None):
    """Prints of each network the value of each unit and, by kind, the units' changes of it (of
    lesions, which are changes, themselves); draws values by depth, above them a form's curves."""
    if train.rank() > 0:
        return
    summary = []
    for name, of in found.items():
        train.say(f"{name}, {of['images']:,} held-out images")
        print_rows(
            [
                {"unit": unit, "kind": kind, "stage": stage, what: significant(values[name][unit])}
                for unit, (kind, stage) in of["units"].items()
            ]
        )
        effects = changes(of, values[name]) if "side" in of else values[name]
        for kind in dict.fromkeys(of["units"][unit][0] for unit in effects):
            numbers = [e for unit, e in effects.items() if of["units"][unit][0] == kind]
            summary.append(
                {
                    "network": name,
                    "units": kind,
                    "number": len(numbers),
                    "lowering": sum(e < 0 for e in numbers),
                    "mean change": significant(sum(numbers) / len(numbers)),
                }
            )
    print_rows(summary)

    def draw(grid):
        for column, (name, of) in zip(np.reshape(grid, (-1, len(found))).T, found.items()):
            column[0].set_title(name, fontsize=7, wrap=True)
            draw_depth(column[-1], of["units"], values[name], what, 1 if "side" in of else 0.5)
            if form:
                draw_frequencies(column[0], of, form)

    finished(results, draw, 2 if form else 1, len(found))


def fourier_command(args, rest):
    """Δ log amplitude of feature maps, relative to the lowest frequency, after each unit of
    networks, on held-out images (Park & Kim Fig. 2a, 8, D.2): by frequency, and that of the highest
    by depth. --form decides only what is shown. Returns the "results" that it was asked for."""
    results, found = of_maps(args, rest, fourier)
    highest = {
        name: {unit: curve[-1] for unit, curve in numbers[args.form].items()}
        for name, numbers in found.items()
    }
    report(results, found, "highest Δ log amplitude", highest, form=args.form)
    return results.taken


def variance_command(args, rest):
    """The variance of feature maps over their points after each unit of networks, on held-out
    images (Park & Kim Fig. 9, D.1). Returns the "results" that it was asked for."""
    results, found = of_maps(args, rest, variance)
    report(results, found, "variance", {name: of["variance"] for name, of in found.items()})
    return results.taken


def u_centred(y):
    """Features (n, …) -> (n²,): their Gram matrix without its diagonal, U-centred (Székely & Rizzo
    2014): HSIC₁ is then an inner product. That means are subtracted first is for the rounding."""
    x = y.flatten(1) - y.flatten(1).mean(0)
    gram, n = train.to_exact(x @ x.T).fill_diagonal_(0), len(x)
    rows = gram.sum(1) / (n - 2)
    return (gram - rows - rows[:, None] + rows.sum() / (n - 1)).fill_diagonal_(0).flatten()


def hsic(model, batches, other=None):
    """Sums over mini-batches of n·HSIC₁ between all pairs of units, of one network or of two
    together. -> dict: units, other {name: [kind, stage]}; sums, a row for each unit, of both."""
    networks, sums = [model] if other is None else [model, other], torch.zeros(())
    names = [units_of(network) for network in networks]
    with as_is(networks[0]), as_is(networks[-1]):
        for x, _ in batches:
            if len(x) > 3:
                maps = [feature_maps(network, x, of) for network, of in zip(networks, names)]
                grams = torch.stack([u_centred(y) for of in maps for y in of.values()])
                sums = sums + grams @ grams.T / (len(x) - 3)
    return dict(units=names[0], other=names[-1], sums=finite(sums, "HSIC").tolist())


def cka_of(parts):
    """cka from hsic's sums over disjoint parts of the mini-batches."""
    sums = sum(np.array(part["sums"]) for part in parts)
    units, other = parts[0]["units"], parts[0]["other"]
    if not sums.ndim:
        raise UserError("CKA needs at least 4 images")
    with np.errstate(invalid="ignore", divide="ignore"):
        values = sums / np.sqrt(np.outer(sums.diagonal(), sums.diagonal()))
    return dict(units=units, other=other, cka=values[: len(units), -len(other) :].tolist())


def cka(model, batches, other=None):
    """Park & Kim Fig. 10a, D.3: mini-batch linear CKA (Nguyen et al. 2021, §3) of feature maps X
    (n, C·H·W), without class token, between all pairs of units of two networks or of one,
        CKA = Σ n HSIC₁(XXᵀ, YYᵀ) / √(Σ n HSIC₁(XXᵀ, XXᵀ) · Σ n HSIC₁(YYᵀ, YYᵀ)),
        HSIC₁(K, L) = [tr K̃L̃ + 1ᵀK̃1 1ᵀL̃1 / ((n−1)(n−2)) − 2 1ᵀK̃L̃1 / (n−2)] / (n(n−3)),
    K̃ being K with zeros on its diagonal, Σ over mini-batches of n ≥ 4 images, smaller ones left
    out. HSIC₁ is unbiased for every n: random mini-batches give in expectation what all images at
    once do. 1: equal up to rotation and scale; unrelated: about 0, also below. -> dict: units and
    other {name: [kind, stage]}; cka, a row for each of units, NaN where one does not vary. One
    forward pass. UserError for less than 4 images."""
    return cka_of([hsic(model, batches, other)])


def draw_cka(axes, name, of):
    """Fig. 10a, D.3: E is the stem or embedding, P pooling; lines are where stages begin."""
    image = axes.imshow(np.array(of["cka"], float), origin="lower", vmin=0, vmax=1, cmap="magma")
    for names, axis, line in (
        (of["other"], axes.xaxis, axes.axvline),
        (of["units"], axes.yaxis, axes.axhline),
    ):
        kinds, stages = zip(*names.values())
        letters = dict(stem="E", pooling="P")
        marks = {i: letters[kind] for i, kind in enumerate(kinds) if kind in letters}
        axis.set_ticks(list(marks), list(marks.values()))
        for i in range(1, len(stages)):
            if stages[i] > stages[i - 1]:
                line(i - 0.5, color="white", linewidth=0.5)
    axes.set_title(name, fontsize=7, wrap=True)
    axes.figure.colorbar(image, ax=axes, label="CKA", shrink=0.8)


def cka_command(args, rest):
    """Similarity of the feature maps of all pairs of units: CKA over mini-batches of held-out
    images (Park & Kim Fig. 10a, D.3), of each network with itself and, where there are two, also
    across. Returns the "results" that it was asked for."""
    need(args, batch=4)
    results, device, named = started(args, rest, "cka")
    groups, found = [[of] for of in named] + ([named] if len(named) == 2 else []), {}
    flags = ("dataset", "data_dir", "eval_split", "image_size", "eval_short_side")
    images = [{flag: results.settings[name][flag] for flag in flags} for name, *_ in named]
    if len(named) == 2 and images[0] != images[1]:
        raise UserError(
            f"two networks are compared on the same images, these have {images[0]} and {images[1]}"
        )
    for pair in groups:
        names = [name for name, *_ in pair]
        images = f"{args.images} images in batches of {args.batch}"
        part = ", against ".join([images, *names[1:]])
        found[" (up) and ".join(names)] = in_parts(
            args, results, device, part, hsic, cka_of, *pair, batch=args.batch
        )
    if train.rank() == 0:
        for name, numbers in found.items():
            values = np.array(numbers["cka"], float)
            one, two = (
                np.array([stage for _, stage in numbers[key].values()])
                for key in ("units", "other")
            )
            if name in results.parts:
                np.fill_diagonal(values, np.nan)  # a unit with itself
            pairs = np.ma.masked_invalid(values)  # its mean over none is masked, which is false
            rows = []
            for i in np.unique(one):
                means = {f"stage {j}": pairs[one == i][:, two == j].mean() for j in np.unique(two)}
                rows.append({f"mean CKA, {name}": f"stage {i}"})
                rows[-1] |= {stage: mean or None for stage, mean in means.items()}
            print_rows(rows)

        def draw(grid):
            for axes, (name, numbers) in zip(np.ravel(grid), found.items()):
                draw_cka(axes, name, numbers)

        finished(results, draw, 1, len(found))
    return results.taken


def removable(model):
    """units that lesion leaves out; UserError if there are none (torchvision's, timm's others)."""
    names = {
        name: of
        for name, of in units_of(model).items()
        if of[0] in ("attention", "token mlp", "mlp", "conv")
    }
    if not names:
        raise UserError(
            f"{type(getattr(model, 'network', model)).__name__} has no units that can be left out; "
            "our networks, torchvision's ResNets and its Swin have"
        )
    return names


def lesion(model, batches):
    """Park & Kim Fig. 10b, D.4: the accuracy of a trained network without one unit, all else as it
    was. Of an attention or MLP the residual branch then adds nothing; of an attention block of
    AlterNet the whole branch, 1×1 convolution and all. For one 3×3 convolution of a block (of two,
    the second) the identity stands in, for one of stride s every s-th pixel; its normalisation and
    ReLU stay. -> dict: units {name: [kind, stage]}; whole, top-1 in percent; without {name: top-1}.
    As many passes over the images as there are units, and one. UserError as of removable and
    accuracy."""
    names = removable(model)
    return dict(
        units=names,
        whole=accuracy(model, batches),
        without={name: accuracy(model, batches, name) for name in names},
    )


def lesion_command(args, rest):
    """The held-out accuracy of networks without one unit, for each unit: an attention, an MLP, a
    3×3 convolution (Park & Kim Fig. 10b, D.4). Returns the "results" that it was asked for."""
    results, device, named = started(args, rest, "lesion")
    found, values = {}, {}
    for name, settings, origin in named:
        model, dataset, workers = network_and_held_out(settings, origin, device, args.images)
        names, at_once = removable(model), train.images_at_once(model, settings.image_size, device)
        batches, tasks = Batches(dataset, model, at_once, workers, split=False), {}
        for skip in (None, *names):
            part = f"{args.images} images, {f'without {skip}' if skip else 'whole'}"
            tasks[part] = functools.partial(accuracy, model, batches, skip)
        share_out(results, name, tasks, "lesion")
        whole, *without = [results.take(name, part) for part in tasks]
        found[name] = dict(units=names, images=len(dataset))
        values[name] = {unit: top1 - whole for unit, top1 in zip(names, without)}
        tell(f"{name}: {whole:.2f} % with all units")
    report(results, found, "Δ accuracy (points)", values)
    return results.taken


# -------------------------------------------------------------------- noise, calibration, fit (NLL)


def together(results, device, named, parts, what):
    """Computes what is not finished of {part: function of (model, held-out images, settings,
    workers) -> its numbers}, all processes on each part together; yields each network's name and
    {part: numbers}."""
    for name, settings, origin in named:
        todo = [part for part in parts if part not in results.parts.get(name, {})]
        if todo:
            model, dataset = network_and_images(settings, origin, device)
            workers = worker_count(settings, dataset)
        with train.progress(len(parts), what, "part") as bar:
            bar.update(len(parts) - len(todo))
            for part in todo:
                with errors_of(name):
                    results.put(name, part, parts[part](model, dataset, settings, workers))
                bar.update()
        yield name, {part: results.take(name, part) for part in parts}


def ring(size, frequency, window=0.1, form="paper"):
    """The mask M_f of a band of frequencies of size² pixels, bool, in the order of torch.fft.fft2.
    paper: the ring f - window/2 ≤ r < f + window/2 of radii r = 2·‖k‖₂ / size of the wave numbers
    k, in units of π: Nyquist's is 1, a corner √2. code: Park & Kim's: wave numbers from -n to n - 1
    in both directions, n = int((f + window/2)·size/2), but those likewise within f - window/2;
    UserError for odd sizes, where that is wrong."""
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    edges = [round(frequency + side * window / 2, 9) for side in (-1, 1)]
    if form == "paper":
        radius = torch.hypot(k[:, None], k) * 2 / size
        return (edges[0] <= radius) & (radius < edges[1])
    if size % 2:
        raise UserError(f"--form code: its bands need an even image size, not {size}")
    lines = [(-n <= k) & (k < n) for n in (max(int(edge * size / 2), 0) for edge in edges)]
    inner, outer = (line[:, None] & line for line in lines)
    return outer & ~inner


def band_noise(delta, mask):
    """F⁻¹(F(δ) ⊙ M), the part of δ (…, H, W) in the band M (H, W). A ring has -k with each k, so
    that it is real; of the code's band the real part."""
    return torch.fft.ifft2(torch.fft.fft2(delta) * mask).real


def band_noise_energy(mask):
    """The expected energy of a value of band_noise, of a δ whose values have 1: |M| / (H·W), and
    less of a band that lacks the partner -k of a k, half of whose energy is not real."""
    mask = mask.double()
    kept = (mask + mask.flip(0, 1).roll((1, 1), (0, 1))) / 2  # the roll: index 0 is its own partner
    return kept.square().mean().item()


def noise(
    model,
    dataset,
    frequency,
    sigma=0.5,
    window=0.1,
    *,
    form="paper",
    equal_energy=False,
    seed=0,
    workers=0,
    batch_size=256,
):
    """Accuracy on images x₀ + F⁻¹(F(δ) ⊙ M_f), noise of frequencies around f·π only (Park & Kim §3,
    Fig. 2b), not clamped to [0, 1]. δ is N(0, σ²) in each value, so the noise has the expected
    energy Σ|·|² = σ²·|M_f| in a channel: in proportion to the band's area; with equal_energy, σ²
    times H·W in each ring. form "code": δ = σ·sign(N(0, 1)) and other bands, see ring. δ depends on
    seed, f and the image's index only. frequency None: no noise. -> dict of train.evaluate, over
    all processes; UserError if the NLL is not finite. Cost: an evaluation, and 1 ms for the δ of an
    image of 224²."""

    def disturbed(number, x, y):
        mine = dataset.indices[train.rank() :: train.world_size()][number * batch_size :][: len(x)]
        keys = (data.key(seed, i, round(1e6 * frequency), 4) for i in mine.tolist())
        generators = (torch.Generator().manual_seed(key) for key in keys)
        delta = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)
        mask = ring(x.shape[-1], frequency, window, form)
        share = equal_energy and band_noise_energy(mask) or 1  # of an empty band of the code's 0
        scale = sigma / share**0.5
        delta = scale * (delta.sign() if form == "code" else delta)
        return x + band_noise(delta, mask.to(x)), F.one_hot(y, len(dataset.classes)).to(x)

    device = next(model.parameters()).device
    loader = train.own_share(dataset, device, workers, batch_size)
    with adversarial.held_still(model, device):
        mix = None if frequency is None else disturbed
        found = train.evaluate(model, loader, device, mix=mix)
    finite(found["nll"], "the NLL")
    return found


def draw_noise(axes, rows, how):
    """Park & Kim Fig. 2b; a band that images of that size do not have is left out."""
    frequencies = [float(key[:-1]) for key in list(rows[0])[2:]]
    for name, _, *decrease in (row.values() for row in rows):
        axes.plot(frequencies, np.array(decrease, float), "o-", label=name)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_xlabel(f"frequency of the noise (π); {how}", fontsize=8)
    axes.set_ylabel("decrease of accuracy (points)")
    axes.figure.legend(fontsize=6, loc="outside upper left")


def noise_command(args, rest):
    """Decrease of the accuracy on held-out images under noise of one band of frequencies after
    another (Park & Kim Fig. 2b); "-" where images of that size have none in the band. The paper
    gives the window, 0.1π; σ is our choice. Returns the "results" that it was asked for."""
    need(args, frequencies=0, sigma=0, window=1e-6, noise_seed=0)
    results, device, named = started(args, rest, "noise")
    how = (
        f"σ {args.sigma:g}, window {args.window:g}π, "
        f"{args.form}{', equal energy' * args.equal_energy}, seed {args.noise_seed}"
    )
    bands = {"no noise": None} | {f"{f:g}π, {how}": f for f in sorted(set(args.frequencies))}

    def at(frequency, model, dataset, settings, workers):
        band = (settings.image_size, frequency, args.window, args.form)
        if frequency is not None and not ring(*band).any():
            return None
        return noise(
            model,
            dataset,
            frequency,
            args.sigma,
            args.window,
            form=args.form,
            equal_energy=args.equal_energy,
            seed=args.noise_seed,
            workers=workers,
            batch_size=train.images_at_once(model, settings.image_size, device),
        )

    rows, tasks = [], {part: functools.partial(at, f) for part, f in bands.items()}
    for name, found in together(results, device, named, tasks, "bands"):
        clean, *top1 = (of and of["top1"] for of in found.values())
        rows.append({"decrease of top-1": name, "top-1 %": clean})
        for f, value in zip(list(bands.values())[1:], top1):
            rows[-1][f"{f:g}π"] = None if value is None else clean - value
    if train.rank() == 0:
        print_rows(rows)
        finished(results, lambda axes: draw_noise(axes, rows, how))
    return results.taken


@torch.inference_mode()
def calibration(batches, bins=10):
    """How well p = softmax(logits) agrees with what is right. batches: of logits (m, K) and classes
    (m,), of n processes each its own; -> dict over all: images; top1, confidence: accuracy and mean
    of max p, in percent; nll: mean -ln p_y; brier: mean Σ_k (p_k - [k = y])², up to 2; in percent:
    ece, of max p, and classwise_ece, mean over classes k of that of p_k against [k = y] (Kull et
    al. 2019, 1910.12656), see train.calibration_error; adaptive_ece: as ece, in bins of equally
    many images (Nguyen & O'Connor 2015); bins: images, accuracy and confidence in percent of each
    of ece's, None of an empty one. An exact 1 is in the last bin with its confidence, which the
    code of Park & Kim takes for 0; their NLL is a mean over batches, ours over images. UserError if
    the NLL is not finite."""
    top = classes = scores = 0  # sums over images
    seen = []
    for logits, y in batches:
        logits = train.to_exact(logits)
        y = y.to(logits.device)
        p, truth = logits.softmax(1), F.one_hot(y, logits.shape[1])
        confidence, best = p.max(1, keepdim=True)
        right = best == y[:, None]
        top = top + train.bin_sums(confidence, right, bins)
        classes = classes + train.bin_sums(p, truth, bins)
        scores = scores + torch.stack(
            [F.cross_entropy(logits, y, reduction="sum"), (p - truth).square().sum()]
        )
        seen.append(torch.cat([confidence, right], dim=1))
    own = [part.cpu() for part in (top, classes, scores, torch.cat(seen))] if seen else None
    tops, class_bins, losses, each = zip(*filter(None, gathered(own)))  # None: without images
    top, classes, scores = sum(tops), sum(class_bins), sum(losses)
    confidence, right = torch.cat(each).numpy().T
    n = len(right)
    values, which = np.unique(confidence, return_inverse=True)
    accuracy = (np.bincount(which, right) / np.bincount(which))[which]  # equal ones share theirs
    equal = np.array_split(np.argsort(confidence, kind="stable"), bins)
    nll, brier = finite(scores / n, "the NLL").tolist()
    ece, classwise = (train.calibration_error(of).mean().item() for of in (top, classes))
    adaptive = sum(abs((accuracy - confidence)[images].sum()) for images in equal).item()
    shares = [
        [100 * v / m if m else None for v, m in zip(of.tolist(), top[0, 0].tolist())]
        for of in top[1:, 0]
    ]
    return dict(
        images=n,
        top1=100 * right.mean().item(),
        confidence=100 * confidence.mean().item(),
        nll=nll,
        brier=brier,
        ece=ece,
        classwise_ece=classwise,
        adaptive_ece=100 * adaptive / n,
        bins=dict(images=top[0, 0].int().tolist(), accuracy=shares[0], confidence=shares[1]),
    )


def draw_calibration(axes, found):
    """Accuracy of the images of each bin, at their mean confidence."""
    axes.plot([0, 100], [0, 100], "--", color="grey")
    for name, of in found.items():
        x, y = (np.array(of["bins"][key], float) for key in ("confidence", "accuracy"))
        axes.plot(x, y, "o-", label=name)
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)")
    axes.figure.legend(fontsize=6, loc="outside upper left")


def calibration_command(args, rest):
    """Reliability diagram and calibration errors of networks on held-out images (Park & Kim Fig.
    F.1a). Returns the "results" that it was asked for."""
    need(args, bins=1)
    results, device, named = started(args, rest, "calibration")

    def calibrate(model, dataset, settings, workers):
        with as_is(model):
            at_once = train.images_at_once(model, settings.image_size, device)
            read = data.batches(train.own_share(dataset, device, workers, at_once), train.say)
            logits = ((model(train.to_float(x.to(device), model)), y) for x, y in read)
            return calibration(logits, args.bins)

    part, found = f"{args.bins} bins", {}
    for name, own in together(results, device, named, {part: calibrate}, "calibration"):
        found[name] = own[part]
    if train.rank() == 0:
        suffixes, rows = dict.fromkeys(("images", "nll", "brier"), ""), []
        for name, numbers in found.items():
            rows.append({"network": name})
            for key, value in numbers.items():
                if key != "bins":
                    column = key.replace("_", " ") + suffixes.get(key, " %")
                    rows[-1][column] = value if key == "images" else significant(value)
        print_rows(rows)
        finished(results, lambda axes: draw_calibration(axes, found))
    return results.taken


# Park & Kim App. C: NLL of the training set and test error in percent on CIFAR-100. ResNet's is 1.9
# points below PiT's; that it is ResNet-50's is our reading. Other values are in figures only.
NLL_TEXT = {
    "resnet18": (2.31, 22.0),
    "resnet50": (None, 22.2),
    "pit_ti": (2.29, 24.1),
    "vit_s2": (2.17, 30.4),
}
AGAINST = {
    "model": "model",
    "images": "training images per class",
    "patch": "patch (pixels)",
    "kernel": "kernel of the attention (tokens)",
    "epochs": "epochs trained",
}


def nll(model, training, held_out, settings, workers=0):
    """How well a network fits the images it was trained on, as these were then, and generalises
    (Park & Kim A.2, Fig. 5). training: augmented images, mixed here in micro-batches by the MixUp
    and CutMix of `settings`. -> dict: nll, the cross-entropy against these soft labels, in nats, a
    mean over images (their code: over batches, of smoothed labels), no decay; training_error,
    against the larger share; test_nll and error of the held-out images, clean; errors in percent.
    Evaluation mode; over all processes. UserError if an NLL is not finite. Cost: both sets
    forward."""
    mixes, device = settings.mixup or settings.cutmix, next(model.parameters()).device
    mix = train.mixing(settings, len(training.classes)) if mixes else None
    with adversarial.held_still(model, device):
        how = (model, settings, device, workers)
        fit = train.measure("training images", training, *how, mix=mix)
        test = train.measure("held-out images", held_out, *how)
    for of in (fit, test):
        finite(of["nll"], "the NLL")
    return dict(
        nll=fit["nll"],
        training_error=100 - fit["top1"],
        test_nll=test["nll"],
        error=100 - test["top1"],
    )


def sizes(network, settings, n, classes):
    """What --against asks for, of a network trained on n images; None where it has no such."""
    kind, saved = train.family(settings.model), train.own_checkpoint(settings.init_from)
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    grid, patch = getattr(network, "grid", [None])[0], None
    if kind in ("vit", "mixer"):
        patch = settings.image_size // grid
    elif kind in ("pit", "swin"):  # not the side over the grid: PiT's patches may overlap
        patch = first.kernel_size[0]
    kernel = settings.kernel_size or grid  # of global attention all tokens (Fig. 7)
    return dict(
        model=settings.model,
        images=n / classes,
        patch=patch,
        kernel=kernel if kind == "vit" else None,
        epochs=saved["step"] / max(n // saved["settings"]["batch_size"], 1) if saved else None,
    )


def draw_nll(axes, rows, against):
    """Two scales, as in the paper: error and training NLL by what the networks differ in."""
    right, of_model = axes.twinx(), against == "model"
    for i, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: row[against])
        at = [rows.index(row) if of_model else row[against] for row in own]
        for ax, key, style in ((axes, "error", "^-"), (right, "nll", "o--")):
            style = style[:1] if of_model else style
            ax.plot(at, [row[key] for row in own], style, color=f"C{i}", label=model)
    if of_model:
        axes.set_xticks(range(len(rows)), [row["model"] for row in rows], rotation=30, ha="right")
    elif against in ("images", "epochs"):
        axes.set_xscale("log")
    axes.set(xlabel=AGAINST[against], ylabel="▲ error on held-out images (%)")
    right.set_ylabel("● NLL of augmented training images")
    axes.legend(fontsize=6)


def nll_command(args, rest):
    """The NLL of training images, augmented and mixed as in training, and the error on held-out
    images, of networks that differ in --against (Park & Kim Fig. 5, 7a, C.1, C.2a, C.3): what fits
    worse, does it generalise worse? Epochs are those trained, with the warm-up. Returns the
    "results" that it was asked for."""
    results, device, named = started(args, rest, "nll")
    augmented_by = (*AUGMENTS, "mixup", "cutmix")

    def fit_of(model, held_out, settings, workers):
        training = training_images(settings, device, "all", augmented=True)
        known = sizes(model.network, settings, len(training), len(held_out.classes))
        if known[args.against] is None:
            raise UserError(f"--against {args.against}: {settings.model} has no such number")
        share_of(training, args.images, "training")
        shuffled(training, data.key(settings.seed, 3))  # or like would be mixed with like
        return (
            nll(model, training, held_out, settings, workers)
            | known
            | dict(augmented={name: getattr(settings, name) for name in augmented_by})
        )

    rows, part = [], f"{args.images} of the training images"
    for name, found in together(results, device, named, {part: fit_of}, "networks"):
        rows.append(dict(network=name) | found[part])
        if rows[-1][args.against] is None:
            raise UserError(f"--against {args.against}: {name} has no such number")
    if train.rank() == 0:
        table = [
            {
                "network": row["network"],
                args.against: four_digits(row[args.against]),
                "NLL, training": significant(row["nll"]),
                "error %": row["error"],
                "training error %": row["training_error"],
                "NLL, held out": significant(row["test_nll"]),
            }
            for row in rows
        ]
        for model in sorted(NLL_TEXT.keys() & {row["model"] for row in rows}):
            numbers = (f"Park & Kim, CIFAR-100, {model}", None, *NLL_TEXT[model])
            table.append(dict(zip(table[0], numbers)))
        print_rows(table)
        for row in rows:
            how = ", ".join(f"{name} {value}" for name, value in row["augmented"].items())
            train.say(f"{row['network']}: training images with {how}")
        finished(results, lambda axes: draw_nll(axes, rows, args.against))
    return results.taken


# ----------------------------------------------------------------------------------- attention maps


def attention_weights(model, x=None):
    """{block: softmax(q·kᵀ/√d) (B, H, N, N)} of each self-attention between all tokens, for images
    x, in order, 0 where --kernel-size lets a token not attend; a query's row sums to one; the class
    token, where there is one, is first. UserError where there is none, also without x."""
    network = model.network
    out = {
        name: None
        for name, (kind, _) in getattr(network, "intermediates", {}).items()
        if kind == "weights"
    }
    if not out:
        raise UserError(
            f"{type(network).__name__} shows no map of global attention: Swin and AlterNet attend "
            "within windows, ResNet and Mixer not at all; timm's and torchvision's ViTs tell none "
            "(timm's weights load into --model vit_…)"
        )
    if x is not None:
        with adversarial.held_still(model, x.device), torch.inference_mode():
            model(x, out=out)
    return {name.removesuffix(".attn.weights"): weights for name, weights in out.items()}


def as_map(weights, prefix):
    """Attention (…, N, N) -> (…, h, w), whose sum is one: the class token's to the patches, without
    that to itself, or, prefix 0, what a patch receives, a mean over the queries."""
    row = weights[..., 0, 1:] if prefix else weights.mean(-2)
    return (row / row.sum(-1, keepdim=True)).unflatten(-1, (math.isqrt(row.shape[-1]), -1))


def rollout(layers):
    """Attention rollout (Abnar & Zuidema 2020, 2005.00928): ∏ ½ (mean over heads of A_l + 1), the
    last layer leftmost. layers: [A_l (H, N, N)] -> (N, N), whose rows sum to one."""
    eye = torch.eye(layers[0].shape[-1]).to(layers[0])
    return functools.reduce(lambda below, a: (a.mean(0) + eye) / 2 @ below, layers, eye)


def attention(model, image):
    """Maps for an image (3, H, W) in [0, 1], each of sum one over the patches. -> dict: map (h, w),
    the last layer's attention of the class token, averaged over heads (Chen et al. Fig. 3, B.2);
    heads (H, h, w); rollout (h, w), over all layers, of PiT over the last stage's; shown: whose
    attention it is. Without class token (global average pooling) it is what a patch receives, a
    mean over all queries. Cost: a forward pass."""
    weights = [layer[0].cpu().double() for layer in attention_weights(model, image[None]).values()]
    last, prefix = finite(weights[-1], "the attention"), model.network.prefix_tokens
    whole = rollout([layer for layer in weights if layer.shape == last.shape])
    return dict(
        map=as_map(last.mean(0), prefix).tolist(),
        heads=as_map(last, prefix).tolist(),
        rollout=as_map(whole, prefix).tolist(),
        shown="of the class token" if prefix else "received, mean over queries",
    )


def upsampled(values, size):
    """A map (h, w) to (size, size) (Chen et al. B.2); bilinearly is our choice."""
    values = torch.tensor(values)[None, None]
    return F.interpolate(values, (size, size), mode="bilinear")[0, 0].numpy()


def attention_distance(model, batches):
    """{block: [mean attention distance of each head]} in pixels (Dosovitskiy et al. 2020,
    2010.11929, Fig. 11): from a query patch to a key patch, averaged with the attention as weights,
    over queries and images; the class token left out, the weights of the others scaled to sum one.
    From patch to patch it is the image's side / the map's side. batches: of (x, y)."""
    sums, images, prefix = {}, 0, model.network.prefix_tokens
    for x, _ in batches:
        images += len(x)
        for name, weights in attention_weights(model, x).items():
            weights = weights[..., prefix:, prefix:]
            side = math.isqrt(weights.shape[-1])
            at = torch.cartesian_prod(*[torch.arange(side) * x.shape[-1] / side] * 2).to(weights)
            apart = (at[:, None] - at).norm(dim=-1)  # (N, N)
            mean = ((weights * apart).sum(-1) / weights.sum(-1)).mean(-1)  # (B, H)
            sums[name] = sums.get(name, 0) + mean.sum(0)
    return {name: finite(of / images, "the distance").tolist() for name, of in sums.items()}


def draw_attention(axes, title, x, found, rows):
    """The image, beside it a column for each network; each map on a scale of its own, from 0."""
    for row, (what, maps) in zip(axes, rows.items()):
        for ax in row:
            ax.set_axis_off()
        for ax, (name, own), values in zip(row[1:], found.items(), maps):
            if values is not None:  # others have more heads
                ax.imshow(upsampled(values, x.shape[-1]), vmin=0, cmap="inferno")
                ax.set_title(f"{short(name)}\n{what}, {own['shown']}", fontsize=8)
    axes[0, 0].imshow(x.permute(1, 2, 0).numpy())
    axes[0, 0].set_title(title, fontsize=8)


def draw_distances(axes, distances):
    """A point for each head."""
    for i, (name, of) in enumerate(distances.items()):
        points = [(layer, value) for layer, heads in enumerate(of.values(), 1) for value in heads]
        axes.plot(*zip(*points), "o", color=f"C{i}", markersize=4, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(ylim=(0, None), xlabel="attention layer", ylabel="mean attention distance (pixels)")
    axes.legend(fontsize=6)


def attention_command(args, rest):
    """Where networks look: the last layer's attention of the class token to the patches, averaged
    over heads, upsampled to the image (Chen et al. Fig. 3, B.2); of a network without class token
    the attention that a patch receives, a mean over all queries. A figure of each image, networks
    side by side. Networks without global attention are named and left out. Returns the "results"
    that it was asked for."""
    need(args, indices=0, distance=0)
    results, device, named = started(args, rest, "attention")
    default = [] if args.image or args.distance else [0, 1, 2, 3]
    indices = args.indices or default
    files = {f"{path} ({train.on_main(lambda: fingerprint(path))})": path for path in args.image}
    sets = {
        f"{settings.dataset} {settings.eval_split} in {os.path.abspath(settings.data_dir)}"
        for _, settings, _ in named
    }
    if indices and len(sets) > 1:
        raise UserError(
            f"--indices: networks of several data sets, {', '.join(sorted(sets))}, have no images "
            "in common; give --image FILE"
        )
    pictures, maps, distances, part = {}, {}, {}, f"distance, {args.distance} images"
    for name, settings, origin in named:
        if indices or args.distance:
            model, dataset = network_and_images(settings, origin, device)
            indices = [i for i in indices if args.indices or i < len(dataset)]
            if max([args.distance, *(i + 1 for i in indices)]) > len(dataset):
                raise UserError(
                    f"--indices, --distance: there are {len(dataset):,} held-out images, the first "
                    "is 0"
                )
        else:  # these need no data set
            classes = class_names(settings, train.own_checkpoint(settings.init_from))
            model = network_of(settings, origin, len(classes), device)
        try:
            attention_weights(model)
        except UserError as error:
            tell(f"{name}: {error}")
            continue
        side, notes = settings.image_size, []
        prepare = data.transforms("none", side, short_side=settings.eval_short_side)
        own = {of: prepare(data.read_image(path, path, notes)) for of, path in files.items()}
        if indices:
            loader = data.loader(dataset, [[(0, i)] for i in indices])
            images = (x[0].cpu() for x, _ in data.batches(loader, tell))  # to be drawn
            own |= {f"image {i}": x for i, x in zip(indices, images)}
        for note in notes:
            tell(note)
        pictures = own | pictures  # as the first network sees them
        tasks = {
            of: functools.partial(attention, model, train.to_float(x.to(device), model))
            for of, x in own.items()
        }
        if args.distance:
            some = data.subset(dataset.labels, Fraction(args.distance, len(dataset)))
            batches = Batches(dataset.part(some), model, 16, split=False)
            tasks[part] = functools.partial(attention_distance, model, batches)
        share_out(results, name, tasks, "images")
        maps[name] = {of: results.take(name, of) for of in own}
        if args.distance:
            distances[name] = results.take(name, part)
    if not maps:
        raise UserError("none of the networks has a map of global attention")
    if train.rank() == 0:
        print_rows(
            [
                {
                    "attention": f"{name}, {of}",
                    "is": found["shown"],
                    "highest": significant(np.max(found["map"])),
                    "uniform": significant(1 / np.size(found["map"])),
                }
                for name, own in maps.items()
                for of, found in own.items()
            ]
        )
        print_rows(
            [
                {
                    "distance, pixels": f"{name}, {block}",
                    "mean": sum(heads) / len(heads),
                    "nearest head": min(heads),
                    "farthest": max(heads),
                }
                for name, of in distances.items()
                for block, heads in of.items()
            ]
        )
        if distances:
            path = results.path.with_name("attention-distance.png")
            figure(path, lambda axes: draw_distances(axes, distances))
        for of, x in pictures.items():
            found = {name: own[of] for name, own in maps.items()}
            rows = {"mean of heads": "map"} | ({"rollout": "rollout"} if args.rollout else {})
            rows = {what: [one[key] for one in found.values()] for what, key in rows.items()}
            heads = itertools.zip_longest(*(one["heads"] for one in found.values()))
            rows |= {f"head {i}": of_all for i, of_all in enumerate(heads, 1) if args.each_head}
            stem = re.sub(r"[^\w.]+", "-", Path(of).name).strip("-")
            figure(
                results.path.with_name(f"attention-{stem}.png"),
                lambda axes: draw_attention(np.atleast_2d(axes), of, x, found, rows),
                len(rows),
                1 + len(found),
            )
        train.say(f"results   {results.path}")
    return results.taken


# ----------------------------------------------------------------------------------- finished runs


def training_curve(records):
    """Of a run's records, lists of [step, epoch, value]: "loss" and "error", the mean training loss
    and error in percent of the steps since the record before, on images as augmented, before each
    step; "top1", of validation, in percent. "ended": finished, diverged or None; "training error"
    in percent at the end, of images without augmentation."""
    found = {"loss": [], "error": [], "top1": [], "ended": None, "training error": None}
    for record in records:
        at = [int(record["step"]), float(record["epoch"])]
        if "loss" in record:
            found["loss"].append([*at, record["loss"]])
            found["error"].append([*at, record.get("error")])  # contrastive: none
        if "val" in record:
            found["top1"].append([*at, record["val"]["top1"]])
        if "final" in record:
            last = [value for *_, value in found["loss"][-1:]]
            if None in (*last, record["final"]["validation"]["nll"]):  # as in `outcome`
                found["ended"] = "diverged"
            else:
                found["ended"] = "finished"
                found["training error"] = 100 - record["final"]["training"]["top1"]
        if "diverged" in record:
            found["ended"] = "diverged"
    return found


def read_log(run):
    """The records of a run, finished or not: of its folder, or of the file log.jsonl or a
    checkpoint in it. A last line that is half written is left out, and said. UserError for other
    damage."""
    path = Path(run, "log.jsonl") if Path(run).is_dir() else Path(run)
    path = path.with_name("log.jsonl") if path.suffix == ".pt" else path
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; give folders of train.py, or their log.jsonl"
        ) from None
    records = []
    for i, line in enumerate(lines):
        try:
            own = [json.loads(line)] if line else []
            training_curve(own)
        except (ValueError, KeyError, TypeError):
            if i < len(lines) - 1:
                raise UserError(
                    f"{path}, line {i + 1}: not a record of train.py; the file is damaged, or "
                    "another program's"
                ) from None
            train.say(f"{path}: the last line is half written and left out")
            own = []
        records += own
    return records


def opened(args, rest, name):
    """Results of a subcommand that has no use for train.py's flags, and computes all anew."""
    if rest:
        make_parser().error(f"unrecognized arguments: {rest[0]}")
    join_processes()
    results = Results(args.out_dir or f"out/{name}", name)
    results.parts, results.settings = {}, {}
    return results


def draw_curves(axes, runs, against):
    """Chen et al. Fig. 2 left and middle: a curve for each run."""
    shown = dict(error="training error (%)", loss="training loss", top1="validation top-1 (%)")
    for one, (key, what) in zip(axes, shown.items()):
        for run, of in runs.items():
            step, epoch, value = np.array(of[key], float).reshape(-1, 3).T
            x = step if against == "step" else epoch
            one.plot(x, value, "o-", markersize=2, label=run)
        one.set(xlabel=against, ylabel=what)
    axes[-1].legend(fontsize=6)


def curves(args, rest):
    """Training error and loss and validation accuracy against step or epoch, of any number of runs,
    those under way included (Chen et al. Fig. 2 left and middle). Returns what
    the JSON holds under "results"."""
    results = opened(args, rest, "curves")
    results.parts = {
        run: training_curve(train.on_main(functools.partial(read_log, run)))
        for run in dict.fromkeys(args.runs)
    }
    train.on_main(results.write)
    if train.rank() == 0:
        rows = []
        for run, of in results.parts.items():
            losses, top1 = ([v for *_, v in of[key] if v is not None] for key in ("loss", "top1"))
            steps = max([step for step, *_ in of["loss"] + of["top1"]], default=0)
            rows.append(
                {
                    "run": run,
                    "step": f"{steps:,}",
                    "state": of["ended"] or "not ended",
                    "loss": significant(losses[-1]) if losses else None,
                    "training error %": of["training error"],
                    "top-1 %": top1[-1] if top1 else None,
                    "best": max(top1, default=None),
                }
            )
        print_rows(rows)
        finished(results, lambda axes: draw_curves(axes, results.parts, args.against), columns=3)
    return results.parts


# Xiao et al. Table 2: G multiply-adds, M parameters (Table 1: vit_p_18gf 86.7), M activations,
# minutes for an epoch of ImageNet on 8 V100, top-1 error after 100, 200 and 400 epochs, and after
# pre-training on ImageNet-21k.
XIAO_2 = {
    "resnet50": (4.1, 25.6, 11.3, 3.4, 22.5, 21.2, 20.7, 21.6),
    "resnet101": (7.8, 44.5, 16.4, 5.5, 20.3, 19.1, 18.5, 19.2),
    "resnet152": (11.5, 60.2, 22.8, 7.7, 19.5, 18.4, 17.7, 18.2),
    "resnet200": (15.0, 64.7, 32.3, 10.7, 19.5, 18.3, 17.6, 17.7),
    "regnety_1gf": (1.0, 9.6, 6.2, 3.1, 23.2, 22.2, 21.5, None),
    "regnety_4gf": (4.1, 22.4, 14.5, 7.6, 19.4, 18.3, 17.9, 18.4),
    "regnety_16gf": (15.5, 72.3, 30.7, 17.9, 17.1, 16.4, 16.3, 15.6),
    "regnety_32gf": (31.1, 128.6, 46.2, 35.1, 16.2, 15.9, 15.9, 15.0),
    "regnetz_1gf": (1.0, 11.0, 8.8, 4.2, 20.8, 20.2, 19.6, None),
    "regnetz_4gf": (4.0, 28.1, 24.3, 12.9, 17.4, 16.9, 16.6, None),
    "regnetz_16gf": (16.0, 95.3, 51.3, 32.0, 16.0, 15.9, 15.9, None),
    "regnetz_32gf": (32.0, 175.1, 79.6, 55.3, 16.3, 16.2, 16.1, None),
    "efficientnet_b2": (1.0, 9.1, 13.8, 5.9, 21.4, 20.5, 19.9, None),
    "efficientnet_b4": (4.4, 19.3, 49.5, 19.4, 18.5, 17.8, 17.5, None),
    "efficientnet_b5": (10.3, 30.4, 98.9, 41.7, 17.3, 17.0, 17.0, None),
    "vit_p_1gf": (1.1, 4.8, 5.5, 2.6, 33.2, 29.7, 27.7, None),
    "vit_p_4gf": (3.9, 18.5, 11.1, 3.8, 23.3, 20.8, 19.6, 20.6),
    "vit_p_18gf": (17.5, 86.6, 24.0, 11.5, 19.9, 18.4, 17.9, 16.4),
    "vit_p_36gf": (35.9, 178.4, 37.3, 18.8, 19.9, 18.8, 18.2, 15.1),
    "vit_c_1gf": (1.1, 4.6, 5.7, 2.7, 28.6, 26.1, 24.7, None),
    "vit_c_4gf": (4.0, 17.8, 11.3, 3.9, 20.9, 19.2, 18.6, 18.8),
    "vit_c_18gf": (17.7, 81.6, 24.1, 11.4, 18.4, 17.5, 17.0, 15.1),
    "vit_c_36gf": (35.0, 167.8, 36.7, 18.6, 18.3, 17.6, 16.8, 14.2),
}


def family_of(model, stem=None):
    """The name of a curve of Fig. 6."""
    kind = re.match("vit_[pc]_|[a-z]*", model.split(":")[-1])[0].removesuffix("_")
    return f"{kind}, {stem} stem" if stem else kind


def draw_peak(axes, runs):
    """Left the runs; right Table 2 after 400 epochs and, dashed, after ImageNet-21k."""
    from matplotlib.ticker import LogLocator

    for name, own in group(runs, "family", "training").items():
        points = sorted((of["minutes"], of["error"]) for of in own)
        axes[0].plot(*zip(*points), "o-", label=", ".join(name))
    rows = [dict(family=family_of(model), row=row) for model, row in XIAO_2.items()]
    for color, (name, own) in enumerate(group(rows, "family").items()):
        for error, style, title in ((6, "o-", name), (7, "s--", None)):
            points = [(of["row"][3], of["row"][error] or math.nan) for of in own]
            axes[1].plot(*zip(*points), style, color=f"C{color}", markersize=4, label=title)
    for one, title in zip(axes, ("", "Xiao Table 2: 400 epochs; dashed: after ImageNet-21k")):
        one.set_title(title, fontsize=8)
        one.set(
            xlabel="minutes for an epoch of training",
            ylabel="validation top-1 error (%)",
            xscale="log",
        )
        one.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.xaxis.set_major_formatter("{x:g}")
        one.xaxis.set_minor_formatter("")
        if one.get_legend_handles_labels()[0]:
            one.legend(fontsize=6)


def peak(args, rest):
    """Validation error against the minutes that an epoch of training takes, a curve for each family
    of networks (Xiao et al. Fig. 6), from finished runs: the minutes are the images of an epoch
    over the median of the speeds in log.jsonl, without evaluations, on the run's devices. Beside it
    the paper's Table 2. Returns what the JSON holds under "results"."""
    results = opened(args, rest, "peak")
    for run in dict.fromkeys(args.runs):
        records = train.on_main(functools.partial(read_log, run))
        if training_curve(records)["ended"] != "finished":
            tell(f"{run} is not finished and left out")
            continue
        config = (Path(run) if Path(run).is_dir() else Path(run).parent) / "config.json"
        *_, end = records
        try:
            own = json.loads(config.read_bytes())["settings"]
            speeds = [record["images_per_second"] for record in records if "loss" in record]
            epoch = end["step"] / end["epoch"] * own["batch_size"]
            found = dict(
                family=family_of(own["model"], own["stem"]),
                dataset=own["dataset"],
                training=f"{end['epoch']:.4g} epochs, SAM's ρ {own['sam_rho']:g}",
                minutes=epoch / statistics.median(speeds) / 60,
                error=100 - end["final"]["validation"]["top1"],
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{config} or the log.jsonl beside it is missing or damaged, and with it settings "
                "or speeds"
            ) from None
        results.settings[run], results.parts[run] = own, found
    sets = {of["dataset"] for of in results.parts.values()}
    if len(sets) != 1 and args.runs:
        raise UserError(
            "runs of several data sets, whose errors do not compare: " + " ".join(sorted(sets))
            if sets
            else "none of the runs is finished"
        )
    train.on_main(results.write)
    if train.rank() == 0:
        if args.runs:
            print_rows([{"run": run} | of for run, of in results.parts.items()])
        columns = ("Xiao Table 2", "minutes", "100 epochs %", "200 %", "400 %", "21k %")
        print_rows([dict(zip(columns, (model, *row[3:]))) for model, row in XIAO_2.items()])
        finished(results, lambda axes: draw_peak(axes, results.parts.values()), columns=2)
    return results.parts


# ------------------------------------------------------------------------ complexity and throughput

# Chen et al. Table 2 and 7: M parameters (some cut, not rounded), images per second in inference on
# a core of a TPU v3.
CHEN_7 = {
    "vit_s32": (23, 6888),
    "vit_s16": (22, 2043),
    "vit_s14": (22, 1234),
    "vit_s8": (22, 333),
    "vit_b32": (88, 2805),
    "vit_b16": (87, 863),
    "mixer_s32": (19, 11401),
    "mixer_s16": (18, 4005),
    "mixer_s8": (20, 1498),
    "mixer_b32": (60, 4209),
    "mixer_b16": (59, 1390),
    "mixer_b8": (64, 466),
    "resnet50": (25, 2161),
    "resnet101": (44, 1334),
    "resnet152": (60, 935),
    "resnet50x2": (98, 891),
    "resnet101x2": (173, 519),
    "resnet152x2": (236, 356),
}
# Park & Kim A.1: images per second in training on CIFAR-100. App. E: alter_resnet50's 473 are 20 %
# above the pre-activation ResNet-50, whose own number it does not give.
PARK_A1 = {
    "resnet50": 320,
    "vit_ti2": 434,
    "pit_ti": 364,
    "torchvision:swin_t": 469,
    "alter_resnet50": 473,
    "preresnet50": 394,
}


def of_models(models, rest, what):
    """{value of --models: (settings, {flag: who set it})}; a value is a name and, in quotes with
    it, flags of train.py."""
    if any(word.split("=")[0] == "--model" for word in rest):
        raise UserError(f"--model: {what} has --models")
    own, chosen = own_flags(what), {}
    for words in dict.fromkeys(models):
        with train.as_user_error(f"--models {words!r}"):
            chosen[words] = train.settings(["--model", *shlex.split(words), *rest], own)
        refuse(NOT_OF_RUNS, chosen[words][1], f"is for train.py, not for {what}")
    return chosen


def as_published(origin):
    """Whether a network and its images have the sizes that the papers give figures for."""
    return all(origin[name] != "command line" for name in ("image_size", *train.MODEL_FLAGS))


def draw_complexity(axes, rows):
    """Activations by multiply-adds, the two by which Xiao et al. (§6) compare networks' speed."""
    rows = [row | dict(family=family_of(row["network"])) for row in rows]
    for name, own in group(rows, "family").items():
        points = [(row["G multiply-adds"], row["M activations"]) for row in own]
        axes.plot(*zip(*points), "o", label=name)
    theirs = np.array([(row["Xiao G"], row["Xiao M acts"]) for row in rows], float)
    axes.plot(*theirs.T, "kx", label="Xiao Table 2")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="multiply-adds of an image (G)",
        ylabel="activations of an image (M)",
    )
    axes.legend(fontsize=6)


def complexity(args, rest):
    """Parameters, FLOPs and activations of networks for one image beside the papers' figures (Xiao
    et al. Table 1, 2; Chen et al. Table 2, 7). FLOPs are multiply-adds of convolutions, linear
    layers and attention, activations the outputs of these and of max-pooling (vit.complexity).
    Returns what the JSON holds under "results"."""
    results, rows = opened(args, [], "complexity"), []
    of_xiao = [m for m in XIAO_2 if family_of(m) not in ("regnetz", "efficientnet")]
    models = args.models or dict.fromkeys([*CHEN_7, *of_xiao])
    for words, (settings, origin) in of_models(models, rest, "complexity").items():
        cost = results.parts[words] = train.complexity_of(settings, tell)
        results.settings[words] = label(settings)[1]
        published = settings.dataset == "imagenet" and as_published(origin)
        of_papers = words if published else None
        flops, params, acts = XIAO_2.get(of_papers, [None] * 3)[:3]
        rows.append(
            {
                "network": words,
                "pixels": settings.image_size,
                "G multiply-adds": cost["macs"] / 1e9,
                "Xiao G": flops,
                "M parameters": cost["params"] / 1e6,
                "Xiao M": params,
                "Chen": CHEN_7.get(of_papers, [None])[0],
                "M activations": cost["acts"] / 1e6,
                "Xiao M acts": acts,
            }
        )
    train.on_main(results.write)
    if train.rank() == 0:
        print_rows(rows)
        finished(results, lambda axes: draw_complexity(axes, rows))
    return results.parts


SMALL = ["vit_micro8", "mixer_micro8", "resnet18 --width 16", "alter_resnet18 --width 16"]
# What of a training's step decides its time.
OF_STEP = (
    "optimizer lr momentum nesterov weight_decay decay grad_clip loss label_smoothing mixup cutmix "
    "sam_steps sam_adaptive sam_scope"
).split()
MODES = ("inference", "training", "sam")


def random_batch(size, side, classes, device):
    """uint8 images (size, 3, side, side) and int64 classes (size,), on the device."""
    return (
        torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=device),
        torch.randint(0, classes, (size,), device=device),
    )


def work(settings, model, bare, optimizer, mode, batch):
    """A function that does what train.py does with random images on the device, `batch` in a pass:
    "inference", or a step of "training" or with "sam" of --micro-batches passes; without loading
    images, an average of the weights and adversarial images. model: bare, compiled or not, and of
    several processes averaging its gradients."""
    device, classes = next(bare.parameters()).device, train.CLASSES[settings.dataset]
    images, labels = random_batch(batch, settings.image_size, classes, device)
    autocast, criterion = train.autocast_of(settings, device), LOSSES[settings.loss]
    bare.train(mode != "inference")
    if mode == "inference":

        def infer():
            with torch.inference_mode(), autocast:
                model(train.to_float(images, bare))

        return infer
    mix, statistics = train.mixing(settings, classes), train.RunningStatistics(bare)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "float16")
    sam = None
    if mode == "sam":
        sam = train.SAM(
            model,
            settings.sam_rho or 0.05,
            steps=settings.sam_steps,
            adaptive=settings.sam_adaptive,
            params=train.scope(bare.network, settings.sam_scope) if settings.sam_scope else None,
        )
    params, passes = list(bare.parameters()), settings.timing["micro_batches"]

    def step():
        statistics.begin_step()
        for k in range(passes):
            x, y = mix(train.to_float(images, bare), labels)

            def loss(sends=False):
                statistics.begin_pass()
                with train.quiet(model, sends), autocast:
                    logits = model(x)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                return scaler.scale(criterion(logits, y, settings.label_smoothing))

            with sam.perturb(loss) if sam else nullcontext():
                (loss(sends=k == passes - 1) / passes).backward()
            statistics.end_pass()
        micro_batches = passes * train.world_size()
        train.update(optimizer, scaler, params, settings.grad_clip, statistics, micro_batches)

    return step


class Timed(NamedTuple):
    """A network of throughput."""

    key: str  # its name among the results
    settings: argparse.Namespace
    cost: dict  # vit.complexity
    bare: nn.Module
    models: dict  # {whether it is compiled: what is called}
    optimizer: torch.optim.Optimizer


def memory_anew(device):
    """Bytes that are allocated on a CUDA device, from where its peak is counted anew; else 0."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def seconds_of(call, seconds, device):
    """Of a call that is warm, a mean over about so many seconds, after one that tells how many
    there will be and, where it takes longer than that, is all."""

    def clock(n):
        started = time.perf_counter()
        for _ in range(n):
            call()
        torch.get_device_module(device).synchronize()
        return max(gathered((time.perf_counter() - started) / n))

    once = clock(1)
    return once if once > seconds else clock(math.ceil(seconds / once))


def quartiles(values):
    """First quartile, median, third quartile."""
    return np.percentile(values, [25, 50, 75]).tolist()


def correlations(x, y):
    """Pearson's, and Spearman's: of the ranks, equal values having their mean rank."""
    ranks = [(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in map(np.array, (x, y))]
    with np.errstate(invalid="ignore"):  # NaN where all are equal
        return [float(np.corrcoef(*pair)[0, 1]) for pair in ((x, y), ranks)]


def machine(device):
    """What a measured time depends on."""
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            name += ", which processes share"
    elif os.path.exists("/proc/cpuinfo"):
        name = (re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [name])[0]
    return dict(
        device=f"{train.world_size()} × {device.type}, {name}",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
    )


def draw_throughput(axes, seconds, costs):
    """Color: the network; marker: what it does."""
    for one, what, word in zip(axes, ("macs", "acts"), ("multiply-adds", "activations")):
        for i, (words, cost) in enumerate(costs.items()):
            one.plot([], [], label=words, color=f"C{i % 10}", linewidth=4)
            for marker, times in zip("osD^v*", seconds.values()):
                one.plot(cost[what] / 1e6, 1e3 * times[i], marker, color=f"C{i % 10}")
        for marker, cell in zip("osD^v*", seconds):
            one.plot([], [], "k" + marker, label=cell)
        one.set(xscale="log", yscale="log")
        one.xaxis.set_minor_formatter("")
        one.set(xlabel=f"{word} of an image (M)", ylabel="time of an image (ms)")
    axes[1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))


def speed_beside(own, of_first, plain, flops, top, epoch):
    """Numbers of a network from its images/s in rounds, `own`, beside the first network's and, of
    SAM's steps, those of plain training, else None. flops: of an image; top: operations per second
    of the peak; epoch: images for a device / 60."""
    speed = quartiles(own)
    return dict(
        images_per_second=speed,
        ratio=quartiles(np.divide(own, of_first)),
        over_plain=plain and quartiles(np.divide(plain, own)),
        fastest_over_plain=plain and max(plain) / max(own),
        flops=flops * speed[1],
        share_of_peak=flops * speed[1] / top,
        epoch_minutes=epoch / speed[1],
    )


def throughput_row(words, cell, mode, of, timed, origin):
    """Of the table: numbers as of speed_beside, and the papers' beside them."""
    published, settings = words if as_published(origin) else None, timed.settings
    at_224 = published if settings.dataset == "imagenet" else None
    at_32 = published if settings.image_size == 32 else None
    papers = dict(inference=CHEN_7.get(at_224, [None] * 2)[1], training=PARK_A1.get(at_32))
    low, median, high = of["images_per_second"]
    spread = "{1:.3f} ({0:.3f}-{2:.3f})"
    return {
        "images/s and device": words,
        "does": cell,
        "batch": of["batch"],
        "median": f"{median:,.4g}",
        "quartiles": f"{low:,.4g}-{high:,.4g}",
        "ratio": spread.format(*of["ratio"]),
        "cost of SAM": of["over_plain"] and spread.format(*of["over_plain"]),
        "of the fastest": of["over_plain"] and f"{of['fastest_over_plain']:.3f}",
        "TFLOP/s": of["flops"] / 1e12,
        "peak %": 100 * of["share_of_peak"],
        "GB": of["gigabytes"],
        "min/epoch": of["epoch_minutes"],
        "GFLOPs": timed.cost["macs"] / 1e9,
        "M acts": timed.cost["acts"] / 1e6,
        "papers' images/s": papers.get(mode),
        "Xiao min": XIAO_2.get(at_224, [None] * 4)[3] if mode == "training" else None,
    }


def fits_of_time(seconds, costs):
    """{cell: {"macs", "acts": correlations of these with time}} of three networks or more, and of
    Xiao et al.'s Table 2. seconds: {cell: those of an image, for each network}."""
    fits = {}
    for cell, times in seconds.items():
        counted = [(t, cost) for t, cost in zip(times, costs) if cost["macs"] > 0]  # not NaN
        if len(counted) > 2:
            fits[cell] = {
                what: correlations(*zip(*((t, cost[what]) for t, cost in counted)))
                for what in ("macs", "acts")
            }
    macs, _, acts, minutes, *_ = zip(*XIAO_2.values())
    fits["Xiao Table 2"] = dict(macs=correlations(minutes, macs), acts=correlations(minutes, acts))
    return fits


def throughput(args, rest):
    """Images per second and device of networks (Chen et al. Table 2, 7; Park & Kim A.1, App. E), in
    inference and in steps of training, plain and with SAM, as train.py does them, in
    --micro-batches passes of the batch. Batch sizes are tried in turn until one does not fit in
    memory, is slower than the best by 5 %, or the next would take longer than --seconds. At its
    best one, each network is timed in rounds, all networks in each, every second round backwards:
    median and quartiles, and the ratio to the first network in the same round, of SAM also the cost
    of an image beside plain training's, in the same round and of the fastest rounds of both, which
    other work on the machine disturbed least. Of all networks the step (optimizer, loss, clipping,
    mixing) is that of the first one's recipe, dropout and drop path as the name alone says; all are
    in memory at once. A multiply-add is 2 operations, a backward pass 2 forward passes; the peak is
    a product of two large matrices in the same dtype and process. GB: what a step takes of a CUDA
    device beside weights and the optimizer's state. An epoch is ImageNet's, on
    --devices that wait for nothing. Under torchrun the devices train together and the slowest
    counts. Then how time follows FLOPs and activations (Xiao et al. §6: activations). Returns what
    the JSON holds under "results"."""
    need(args, seconds=0.01, rounds=1, batch_sizes=1, micro_batches=1, devices=1)
    models = args.models or list(CHEN_7)
    if not args.models and not torch.cuda.is_available():
        models, rest = SMALL, ["--dataset", "shapes", *rest]
    chosen = of_models(models, rest, "throughput")
    first, _ = next(iter(chosen.values()))
    for words, (settings, origin) in chosen.items():
        if settings.train_only == "head":
            raise UserError(
                f"--recipe {settings.recipe}: training of a part is not timed, take its model by "
                "--models"
            )
        refuse(("compile",), origin, "is for train.py; here --compile takes yes, no or both")
        refuse(
            ("sam_every",), origin, "times nothing new: K steps take K plain ones and one pass more"
        )
        refuse(("batch_size", "micro_batch"), origin, "is train.py's; here it is --batch-sizes")
        untimed = ("sam_sync", "adv_eps", "ema_decay", "ema_alpha", "train_only")
        refuse(untimed, origin, "is not timed here: train.py tells its images per second")
        if settings.adv_eps:
            raise UserError(f"--recipe {settings.recipe}: attacks are not timed, --adv-eps 0 asks")
        if settings.loss == "supcon":
            raise UserError("--loss supcon compares views of images: take softmax or sigmoid")
        for name in ("device", "dtype"):
            if getattr(settings, name) != getattr(first, name):
                raise UserError(f"--models {words!r}: --{name} is of all networks, outside quotes")
    device, world, _ = train.start_processes(first.device)
    results = Results(args.out_dir or "out/throughput", "throughput")
    timing = train.on_main(lambda: machine(device)) | dict(  # one for all: parts are kept by it
        seconds=args.seconds, micro_batches=args.micro_batches, beside=list(chosen)
    )
    tell(
        f"{timing['device']}, {timing['threads']} threads, torch {timing['torch']}, {first.dtype}; "
        f"step: {first.optimizer}, {first.loss} loss, clipping {first.grad_clip:g}, "
        f"{args.micro_batches} passes"
    )
    wanted = args.compile or ("yes" if device.type == "cuda" else "no")
    compiles = {"no": [False], "yes": [True], "both": [False, True]}[wanted]
    if wanted == "both" and dist.is_initialized():
        raise UserError(
            "--compile both: several processes would average one network's gradients twice; run "
            "it with yes and with no"
        )
    cells = {
        mode + ", compiled" * compiled: (mode, compiled)
        for mode in args.modes
        for compiled in compiles
    }
    passes = {
        cell: 1 if mode == "inference" else args.micro_batches for cell, (mode, _) in cells.items()
    }

    timed = {}
    for words, (settings, origin) in chosen.items():
        as_named = dict.fromkeys(("dropout", "drop_path", "head_bias"))
        for name, value in ({name: getattr(first, name) for name in OF_STEP} | as_named).items():
            if origin[name] != "command line":
                setattr(settings, name, value)
        settings.timing, settings.words = timing, words  # of the same step, too, each is timed
        key, results.settings[key] = label(settings, (*OF_STEP, "channels_last", "timing", "words"))
        classes = train.CLASSES[settings.dataset]
        bare = train.starting_network(settings, origin, classes, device, tell)
        # What begins at zero, such as classifiers, makes gradients zero, and GPUs multiply zeros
        # faster.
        with torch.no_grad():
            for p in bare.parameters():
                if not p.any():
                    p.normal_(std=0.02)
        callables = {}
        for compiled in compiles:
            called = torch.compile(bare, dynamic=False) if compiled else bare
            callables[compiled] = train.averaging(called, device)
        cost = train.complexity_of(settings, tell)
        optimizer = train.make_optimizer(settings, bare, device)
        timed[words] = Timed(key, settings, cost, bare, callables, optimizer)

    bar = train.progress(None, "throughput", "measurement")

    def rate(key, part, images, prepare):
        """Calls per second times images, and the most gigabytes of a CUDA device that a call took
        beside what was there before, from the results or measured; 0, 0 if memory is lacking."""
        if part not in results.parts.get(key, {}):
            try:
                call = prepare()
                call()  # compiles, and makes the optimizer's state
                held = memory_anew(device)
                seconds = seconds_of(call, args.seconds, device)
            except ValueError as error:  # BatchNorm's, where a channel has one value
                raise UserError(f"{key}, {part}: {error}") from None
            except RuntimeError as error:  # the CPU's has no class of its own
                if not train.want_of_memory(error):
                    raise
                if dist.is_initialized():
                    print(
                        f"analyze.py: {part}: process {train.rank()} lacks memory: give smaller "
                        "--batch-sizes",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(2)  # the others are in the middle of an all-reduce
                return 0, 0  # not kept: another time there may be room
            taken = device.type == "cuda" and torch.cuda.max_memory_allocated(device) - held
            results.put(key, part, [images / seconds, max(gathered(taken / 1e9))])
            bar.update()
        return results.parts[key][part]

    def rate_of(words, cell, batch, turn=""):
        one, (mode, compiled) = timed[words], cells[cell]
        found = rate(
            one.key,
            f"{cell}, batch {batch}{turn}",
            batch * passes[cell],
            lambda: work(one.settings, one.models[compiled], one.bare, one.optimizer, mode, batch),
        )
        if not found[0]:
            one.bare.zero_grad(set_to_none=True)  # of a backward pass that broke off
        return found

    best_batch, rounds, memory = {}, {}, {}
    # Else dynamo would give up after 8 networks or batch sizes, in silence.
    with (
        torch._dynamo.config.patch(recompile_limit=10**6, accumulated_recompile_limit=10**6),
        bar,
    ):
        for words, cell in itertools.product(timed, cells):
            rates = {}
            batch_sizes = sorted(set(args.batch_sizes))
            for batch, following in zip(batch_sizes, [*batch_sizes[1:], math.inf]):
                rates[batch], _ = rate_of(words, cell, batch)
                most = max(rates.values())
                if not most:
                    raise UserError(
                        f"{words}, {cell}: a batch of {batch} does not fit in memory; give smaller "
                        "--batch-sizes"
                    )
                images = following * passes[cell]
                if rates[batch] < 0.95 * most or images > args.seconds * rates[batch]:
                    break
            best_batch[words, cell] = max(rates, key=rates.get)
        for k in range(args.rounds):
            for words, cell in list(best_batch)[:: -1 if k % 2 else 1]:
                batch = best_batch[words, cell]
                speed, memory[words, cell] = rate_of(words, cell, batch, f", round {k + 1}")
                rounds.setdefault((words, cell), []).append(speed)
                if not speed:
                    raise UserError(
                        "the networks do not fit in memory beside one another: give fewer "
                        "--models or smaller --batch-sizes"
                    )
        n = 8192 if device.type == "cuda" else 2048
        a = torch.randn(n, n, device=device).to(getattr(torch, first.dtype))
        key = next(iter(timed.values())).key
        products, _ = rate(key, "products of matrices", 1, lambda: lambda: a @ a)
        if not products:
            raise UserError(
                "there is no memory left in which to measure the peak: give fewer --models"
            )
        top = 2 * n**3 * products

    rows, epoch = [], train.TRAINING_IMAGES["imagenet"] / (args.devices or world) / 60
    for cell, (words, one) in itertools.product(cells, timed.items()):
        mode, own, of_first = cells[cell][0], rounds[words, cell], rounds[next(iter(timed)), cell]
        plain = rounds.get((words, cell.replace("sam", "training"))) if mode == "sam" else None
        forwards = {"inference": 1, "training": 3, "sam": 3 * (1 + one.settings.sam_steps)}[mode]
        numbers = (
            dict(batch=best_batch[words, cell])
            | speed_beside(own, of_first, plain, 2 * forwards * one.cost["macs"], top, epoch)
            | dict(gigabytes=memory[words, cell])
        )
        results.put(one.key, cell, numbers)
        rows.append(throughput_row(words, cell, mode, numbers, one, chosen[words][1]))
        if device.type != "cuda":
            rows[-1]["GB"] = None
    seconds = {cell: [1 / np.median(rounds[words, cell]) for words in timed] for cell in cells}
    fits = fits_of_time(seconds, [one.cost for one in timed.values()])
    results.put("all networks", "correlations of time, linear and of ranks", fits)
    if train.rank() == 0:
        print_rows(rows)
        tell(
            f"peak: {top / 1e12:.3g} TFLOP/s, a product of {n}×{n} matrices, {first.dtype}; epoch: "
            f"ImageNet on {args.devices or world} devices; the papers' were others"
        )
        correlated = []
        for cell, fit in fits.items():
            correlated.append({"correlation of time with": cell})
            for what, (linear, ranks) in fit.items():
                correlated[-1] |= {f"{what}, linear": linear, f"{what}, ranks": ranks}
        print_rows(correlated)
        costs = {words: one.cost for words, one in timed.items()}
        finished(results, lambda axes: draw_throughput(axes, seconds, costs), columns=2)
    return results.parts


def step_on_paper(settings, cost, devices, *, tflops, bandwidth, cores, decode):
    """A training step on so many devices, each with `tflops` TFLOP/s, `bandwidth` GB/s to the
    others and `cores` cores that decode `decode` images/s: dict of what `scale` describes, times in
    seconds, `sends` in bytes. A batch of too few micro-batches has smaller ones."""
    share, views = settings.batch_size / devices, 2 if settings.loss == "supcon" else 1
    micro_batch = min(settings.micro_batch, share)
    forward = 2 * cost["macs"] / (tflops * 1e12)
    sends = 2 * (devices - 1) / devices * 4 * cost["params"]
    ring_seconds = sends / (bandwidth * 1e9)
    hidden = min(ring_seconds, 2 * views * micro_batch * forward)
    rings = 1  # how often a step sends gradients around
    if settings.sam_rho:
        look = settings.sam_every > 1 and settings.sam_reuse > 0
        rings += (settings.sam_sync * settings.sam_steps + look) / settings.sam_every
    numbers = dict(
        micro_batch=micro_batch,
        micro_batches=share / micro_batch,
        compute=share * train.forward_passes(settings) * forward,
        all_reduce=rings * ring_seconds,
        waits=rings * ring_seconds - hidden,
        decode=views * share / (cores * decode),
        sends=rings * sends,
    )
    busy = numbers["compute"] + numbers["waits"]
    bound = "all-reduce" if numbers["waits"] > numbers["compute"] else "compute"
    bound = "decode" if numbers["decode"] > busy else bound
    return numbers | dict(step=max(busy, numbers["decode"]), bound=bound)


def draw_scale(axes, rows):
    """Left speed, dashed in proportion to the devices; right the parts of a step."""
    devices = [of["devices"] for of in rows]
    axes[0].plot(devices, [of["images_per_second"] for of in rows], "o-")
    axes[0].plot(devices, [rows[0]["images_per_second"] * n / devices[0] for n in devices], "k--")
    axes[0].set_ylabel("images per second")
    for part in ("compute", "all_reduce", "waits", "decode"):
        axes[1].plot(
            devices, [1e3 * of[part] or math.nan for of in rows], "o-", label=part.replace("_", "-")
        )
    axes[1].set_ylabel("time of a step (ms)")
    axes[1].legend()
    for one in axes:
        one.set_xlabel("devices")
        one.set_xscale("log", base=2)
        one.set_yscale("log")


def scale(args, rest):
    """Speed to expect of a training on many devices, from rates that are measured: the arithmetic
    of Chen et al.'s run, or of what flags of train.py say. Each device computes its share of the
    micro-batches. Gradients go through a ring, 2 (n - 1)/n of their float32 bytes out of each of n
    devices, beside the backward pass of the last micro-batch; the rest of that time the devices
    wait. Images are decoded beside all this. Bound is decode where it takes longer than computing
    and waiting together, else the longer of these: compute or all-reduce. Latency, slow devices,
    evaluations and checkpoints are left out. Listing is of a folder's files, by each process, from
    one shared file system: a pack has none, and data in memory are not decoded either. Where there
    are more devices than micro-batches these are cut, marked by *: another run, with another ε.
    Returns what the JSON holds under "results"."""
    need(args, devices=1)
    rates = {
        name: getattr(args, name) for name in ("tflops", "bandwidth", "cores", "decode", "listing")
    }
    for name, rate in rates.items():
        if not 0 < rate < math.inf:
            raise UserError(f"--{name} {rate:g}: a rate is above 0")
    if not {word.split("=")[0] for word in rest} & {"--model", "--recipe", "--dataset"}:
        rest = ["--model", "vit_b16", "--sam-rho", "paper", *rest]
    settings, origin = train.settings(rest, own_flags("scale"))
    refuse(NOT_OF_RUNS, origin, "is for train.py, not for scale")
    if settings.dataset == "folder":
        raise UserError(
            f"--dataset folder: its size is not known; those of {' '.join(train.TRAINING_IMAGES)} "
            "are"
        )
    batch, devices = settings.batch_size, args.devices or [4**i for i in range(6)]
    odd = [
        n
        for n in devices
        if batch % n or (batch // n > settings.micro_batch and batch // n % settings.micro_batch)
    ]
    if args.devices and odd or odd == devices:
        raise UserError(
            f"--devices {odd[0]}: a batch of {batch:,} gives them no equal shares of whole "
            f"micro-batches of {settings.micro_batch}; choose others"
        )
    results, cost = opened(args, [], "scale"), train.complexity_of(settings)
    if math.isnan(cost["macs"]):
        raise UserError(f"{settings.model}: its arithmetic cannot be counted")
    decides = "batch_size micro_batch epochs max_steps train_fraction loss adv_eps sam_rho"
    decides += " sam_steps sam_sync sam_every sam_reuse"
    key, results.settings[key] = label(settings, decides.split())
    results.settings[key] |= rates
    files = train.TRAINING_IMAGES[settings.dataset] / rates.pop("listing")
    if settings.dataset in train.IN_MEMORY:
        files, rates["decode"] = 0, math.inf
    alone = step_on_paper(settings, cost, 1, **rates)["step"]
    results.parts[key] = {
        f"{n} devices": step_on_paper(settings, cost, n, **rates)
        | dict(devices=n, listing=n * files)
        for n in devices
        if n not in odd
    }
    numbers = results.parts[key]
    for of in numbers.values():
        of |= dict(
            hours=of["step"] * train.steps_of(settings) / 3600,
            images_per_second=settings.batch_size / of["step"],
            efficiency=alone / of["step"] / of["devices"],
        )
    train.on_main(results.write)
    if train.rank() == 0:
        tell(
            f"{settings.recipe}: {settings.model}, batch {settings.batch_size:,} of micro-batches "
            f"of {settings.micro_batch}, ρ = {settings.sam_rho:g}, {train.steps_of(settings):,} "
            f"steps, {cost['params'] / 1e6:.1f} M parameters, {cost['macs'] / 1e9:.2f} G "
            f"multiply-adds; a device: {args.tflops:g} TFLOP/s, {args.bandwidth:g} GB/s, "
            f"{args.cores:g} cores of {args.decode:g} images/s"
        )
        if odd:
            tell(f"left out: {' '.join(map(str, odd))} devices, no equal shares of that batch")
        cut = {n: "*" * (of["micro_batch"] < settings.micro_batch) for n, of in numbers.items()}
        print_rows(
            [
                {
                    "devices": str(of["devices"]),
                    "micro-batches": f"{of['micro_batches']:g} × {of['micro_batch']:g}" + cut[n],
                    "compute ms": 1e3 * of["compute"],
                    "all-reduce ms": 1e3 * of["all_reduce"],
                    "waits ms": 1e3 * of["waits"],
                    "decode ms": 1e3 * of["decode"],
                    "steps/s": 1 / of["step"],
                    "images/s": f"{of['images_per_second']:,.0f}",
                    "efficiency %": 100 * of["efficiency"],
                    "sends MB": of["sends"] / 1e6,
                    "bound": of["bound"],
                    "hours": f"{of['hours']:,.4g}",
                    "listing min": of["listing"] / 60,
                }
                for n, of in numbers.items()
            ]
        )
        finished(results, lambda axes: draw_scale(axes, list(numbers.values())), columns=2)
    return results.parts


# ----------------------------------------------------------------------------------- many trainings


def outcome(args):
    """How the run with these settings ended: dict of top1 in percent and nll on the validation set,
    None where it diverged, and diverged; or None, if it has not ended or not begun. UserError if
    its folder holds a run with other settings."""
    folder = train.RunFolder(args.out_dir)
    config, log = folder.path / "config.json", folder.path / "log.jsonl"
    if not config.exists() or log.exists() and log.stat().st_size == 0:
        return None
    # --init-from decides on mean and std, after the settings were read
    settings = {k: v for k, v in vars(args).items() if k not in ("mean", "std")}
    folder.compare(dict(settings=settings, data={}, versions={}))
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
    """For a child that trains alone, on this process's device, which others may share."""
    ends, begins = ("RANK", "WORLD_SIZE"), ("MASTER_", "TORCHELASTIC_")  # what torchrun sets
    environment = {"PYTHONUNBUFFERED": "1"}
    for name, value in os.environ.items():
        if not (name.endswith(ends) or name.startswith(begins)):
            environment.setdefault(name, value)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if visible != [""] else [str(i) for i in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = names[int(os.environ["LOCAL_RANK"]) % len(names)]
    return environment


def end_with_parent():
    """In a child process: when its parent is killed, Linux sends it SIGTERM, so that a study that
    was killed does not go on training."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def train_one(argv, folder, environment):
    """train.py in a process of its own, whose memory, device and failures end with it; what it
    prints goes to FOLDER/output.txt. -> its exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "ab") as output:
        # In a session of its own, it is told of Ctrl-C once, by the lines below, and of whatever
        # else ends the study.
        child = subprocess.Popen(
            [sys.executable, train.__file__, *argv],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            return child.wait()
        except BaseException:
            child.terminate()  # it saves and ends
            child.wait()
            raise


def tell_commands(jobs, folder):
    """What `conduct` would run, for --dry-run."""
    for name, flags in jobs.items():
        tell(f"python train.py {shlex.join([*flags, '--out-dir', str(folder / name), '--resume'])}")


def conduct(what, jobs, folder):
    """Trains {name: flags of train.py}, each in FOLDER/NAME; -> {name: its outcome}. What ended
    before is not trained again, what was stopped goes on. Processes of torchrun share the
    trainings, the longest first; on several machines they need a folder that all of them see."""
    chosen = {
        name: train.settings([*flags, "--out-dir", str(folder / name), "--resume"])[0]
        for name, flags in jobs.items()
    }
    ended = train.on_main(lambda: {name: outcome(args) for name, args in chosen.items()})
    todo = [name for name in chosen if ended[name] is None]
    tell(f"{what}: {len(jobs)} trainings, {len(jobs) - len(todo)} done before")

    costs = {}  # of each network, once

    def length(name):
        args = chosen[name]
        network = repr((args.model, args.dataset, args.image_size, train.knobs(args)))
        if network not in costs:
            costs[network] = train.complexity_of(args)["macs"]
        images = args.epochs * float(Fraction(args.train_fraction)) or args.max_steps
        cost = images * train.forward_passes(args) * costs[network]
        return 0 if math.isnan(cost) else cost

    todo.sort(key=length, reverse=True)
    own, failure = todo[train.rank() :: int(os.environ.get("WORLD_SIZE", 1))], None
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
                raise UserError(
                    f"{folder / name} ended with status {status}: "
                    f"{(text.splitlines() or ['without a word'])[-1]}"
                )
            top1 = ended[name]["top1"]
            train.say(f"{name}: " + ("diverged" if top1 is None else f"top-1 {top1:.2f} %"))
    except UserError as error:
        failure = str(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    for share, failure in gathered(({name: ended[name] for name in own}, failure)):
        if failure:
            raise UserError(failure)
        ended |= share
    return ended


# ------------------------------------------------------------------------------------ training sets

FRACTIONS = ["1", "1/2", "1/4", "1/10"]
CHEN_4 = {  # Chen et al. Table 4, for these fractions of ImageNet
    "resnet152": {"plain": (78.5, 74.2, 68.0, 54.6), "sam": (79.3, 75.6, 70.3, 57.1)},
    "vit_b16": {
        "plain": (74.6, 64.9, 52.4, 32.8),
        "sam": (79.9, 75.4, 66.8, 46.1),
        "augmented": (79.6, 73.1, 63.2, 38.5),
        "both": (81.5, 75.8, 65.6, 45.7),
    },
    "mixer_b16": {
        "plain": (66.4, 53.9, 37.2, 21.0),
        "sam": (77.4, 71.0, 62.8, 43.5),
        "augmented": (76.5, 70.4, 61.0, 43.0),
        "both": (78.1, 73.1, 65.8, 51.0),
    },
}
METHODS = ("plain", "sam", "augmented", "both")
GAINS = {"gain": ("plain", "sam"), "gain, augmented": ("augmented", "both")}  # by SAM
STRONG = ["--mixup", "0.5", "--randaugment", "2", "15", "--randaugment-of", "google"]  # E.3


def with_gains(runs, key):
    """{method: {fraction: top-1 in percent}} of runs, None left out, and SAM's gains in points."""
    found = {
        method: {
            run["fraction"]: run[key]
            for run in runs
            if run["method"] == method and run[key] is not None
        }
        for method in METHODS
    }
    return found | {
        name: {
            share: found[having][share] - top1
            for share, top1 in found[without].items()
            if share in found[having]
        }
        for name, (without, having) in GAINS.items()
    }


def draw_datasize(axes, tables):
    """Color: the model; line: the method; crosses: the paper's."""
    for one, columns, what in zip(axes, (METHODS, GAINS), ("top-1 (%)", "gain by SAM (points)")):
        for i, (name, found) in enumerate(tables.items()):  # each model, and the paper's of it
            if i % 2 == 0 and columns is METHODS:
                one.plot([], [], label=name, color=f"C{i // 2}", linewidth=4)
            for column, line in zip(columns, ("-", "--", ":", "-.")):
                points = sorted(found[column].items()) or [(math.nan, math.nan)]
                one.plot(*zip(*points), "ox"[i % 2] + line, color=f"C{i // 2}")
        for column, line in zip(columns, ("-", "--", ":", "-.")):
            one.plot([], [], "k" + line, label=column)
        shares = sorted(
            {share for found in tables.values() for method in METHODS for share in found[method]}
        )
        one.set_xscale("log")
        one.set_xticks(shares, [f"{share:g}" for share in shares])
        one.xaxis.set_minor_formatter("")
        one.set(xlabel="fraction of the training images (crosses: Chen Table 4)", ylabel=what)
        one.legend(fontsize=6)


def datasize(args, rest):
    """Accuracy and SAM's gain against the number of training images (Chen et al. Fig. 4, Table 4),
    plain, with SAM, with strong augmentation (E.3: mixup and RandAugment) and with both. As in E.2
    the batch shrinks with the images, by the nearest power of two, so that steps stay about as
    many, and the learning rate stays; a micro-batch is the largest that divides the batch, so that
    of few images ε, too, is that of fewer. ρ is --sam-rho, or else Table 9's for the model, the
    recipe's, or 0.03. Each training is a run of train.py in OUT/runs. Returns what the JSON holds
    under "results"."""
    join_processes()
    folder, runs, jobs = Path(args.out_dir or "out/datasize"), [], {}
    shares = {}
    with suppress(ValueError, ZeroDivisionError):
        shares |= {word: Fraction(word) for word in args.fractions}
    if not shares or not all(0 < share <= 1 for share in shares.values()):
        raise UserError(
            f"--fractions {' '.join(args.fractions)}: a fraction is above 0 and at most 1, as 1/4"
        )
    for words, (base, origin) in of_models(args.models or CHEN_4, rest, "datasize").items():
        train.check_network(base)
        refuse(("train_fraction", "mixup", "randaugment"), origin, "is what this study varies")
        of_sam = [name for name in origin if name.startswith("sam_") and name != "sam_rho"]
        refuse(of_sam, origin, "is not for plain trainings, which are among these")
        if origin["sam_rho"] == "command line" and not base.sam_rho:
            raise UserError("--sam-rho 0 is plain training: give another, or leave it out")
        brings = [name for name in ("mixup", "cutmix", "erasing") if getattr(base, name)]
        brings += ["randaugment"] * bool(base.randaugment[0])
        brings = [train.flag(name) for name in brings if origin[name] != "command line"]
        if brings and {"plain", "sam"} & set(args.methods or METHODS):
            raise UserError(
                f"--recipe {base.recipe} brings {' '.join(brings)}, which trainings without strong "
                "augmentation have not: take another recipe"
            )
        flags, listed = ["--model", *shlex.split(words), *rest], {}
        strong = [*STRONG, *flags]
        if origin["recipe"] != "command line" and f"{base.recipe}_strong" in train.RECIPES:
            strong = ["--recipe", f"{base.recipe}_strong", *flags]
        if base.dataset == "imagenet":
            listed = CHEN_4.get(words, {})
        for method, (word, share) in itertools.product(
            args.methods or listed or METHODS, shares.items()
        ):
            kind = "supervised" if method in ("plain", "sam") else "strong augmentation"
            kind = "adversarial" if base.adv_eps else kind
            rho = base.sam_rho or 0.03
            if origin["sam_rho"] != "command line":
                rho = train.PAPER_RHO[kind].get(base.model) or rho
            batch = max(1, round(base.batch_size * 2.0 ** round(math.log2(share))))
            largest = min(base.micro_batch, batch)
            of_all = share * (1 - Fraction(base.hold_out))
            name = re.sub(r"[^\w.]+", "-", f"{words}-{method}-{word.replace('/', '_')}")
            varied = dict(
                train_fraction=word,
                batch_size=batch,
                micro_batch=max(m for m in range(1, largest + 1) if batch % m == 0),
                sam_rho=rho if method in ("sam", "both") else 0,
            )
            jobs[name] = [*(flags if method in ("plain", "sam") else strong), *as_flags(varied)]
            runs.append(
                dict(
                    model=words,
                    method=method,
                    fraction=float(share),
                    run=name,
                    images=int(train.TRAINING_IMAGES.get(base.dataset, 0) * of_all) or None,
                    paper=dict(zip(FRACTIONS, listed.get(method, ()))).get(word),
                )
            )
    if args.dry_run:
        for flags in jobs.values():
            train.settings(flags)
        tell_commands(jobs, folder / "runs")
        return {}
    results = Results(folder, "datasize")
    ended = conduct("datasize", jobs, folder / "runs")
    runs = [run | ended[run["run"]] for run in runs]
    results.parts = {
        words: {run["run"]: run for run in own} for words, own in group(runs, "model").items()
    }
    results.settings = jobs
    train.on_main(results.write)
    if train.rank() == 0:
        tables = {
            source + words: with_gains(own, key)
            for words, own in group(runs, "model").items()
            for source, key in (("", "top1"), ("Chen, ", "paper"))
        }
        images = {run["fraction"]: run["images"] for run in runs}
        print_rows(
            [
                {"top-1 %": name, "fraction": f"{share:g}", "images": n}
                | {column: found.get(column, {}).get(share) for column in (*METHODS, *GAINS)}
                for name, found in tables.items()
                for share, n in images.items()
                if any(found[method] for method in METHODS)
            ]
        )
        finished(results, lambda axes: draw_datasize(axes, tables), columns=2)
    return results.parts


# ---------------------------------------------------------------------------------------- stability

XIAO_MODELS = (
    "vit_p_1gf vit_p_4gf vit_p_18gf vit_c_1gf vit_c_4gf vit_c_18gf regnety_1gf regnety_4gf "
    "regnety_16gf"
).split()
STUDIES = {  # models; the values of what is varied
    # Xiao Fig. 2; 3; 4 and 5
    "length": (XIAO_MODELS, dict(optimizer=["best"], epochs=[50, 100, 200, 400])),
    "optimizer": (XIAO_MODELS, dict(optimizer=["adamw", "sgd"], epochs=[50, 100, 200, 400])),
    "lr-wd": (XIAO_MODELS, dict(optimizer=["adamw", "sgd"], epochs=[50])),
    # Chen Table 10; App. E; App. F
    "rho": (
        ["vit_b16", "mixer_b16"],
        dict(sam_rho=[0, 0.05, 0.1, 0.2, 0.25, 0.35, 0.4, 0.5, 0.6, 0.65]),
    ),
    "grid": (
        ["mixer_b16"],
        dict(
            lr=[3e-3, 1e-3],
            weight_decay=[0.3, 0.1, 0.03],
            dropout=[0.1, 0.0],
            drop_path=[0.1, 0.0],
        ),
    ),
    "doubled": (["vit_b16", "mixer_b16"], dict(epochs=[300, 600])),
}
OF_XIAO = ("length", "optimizer", "lr-wd")  # their learning rate and weight decay are optimal ones
PAPER = {  # top-1 that the paper reports: {study: {model: {values of what is varied: number}}}
    "rho": {
        "vit_b16": {(0,): 74.6, (0.05,): 77.5, (0.1,): 78.8, (0.2,): 79.9, (0.25,): 79.3},
        "mixer_b16": {
            (0,): 66.4,
            (0.05,): 69.5,
            (0.25,): 74.1,
            (0.35,): 74.7,
            (0.4,): 75.6,
            (0.5,): 76.9,
            (0.6,): 77.4,
            (0.65,): 77.1,
        },
    },
    "grid": {"mixer_b16": {(3e-3, 0.3, 0.0, 0.1): 66.4}},  # what Table 8 chose
    "doubled": {
        "vit_b16": {(300,): 74.6, (600,): "no gain"},
        "mixer_b16": {(300,): 66.4, (600,): "no gain"},
    },
}
# Xiao Table 4 (arXiv v3, Appendix E): lr and weight decay at batch 2048, the optima for 50 epochs
# on ImageNet and the intervals of the random pairs.
OPTIMA = {
    "adamw": {
        "regnety": (3.8e-3, 0.1),
        "vit_p_1gf": (2e-3, 0.2),
        "vit_p_4gf": (2e-3, 0.2),
        "vit_p_18gf": (1e-3, 0.24),
        "vit_c_1gf": (2.5e-3, 0.19),
        "vit_c_4gf": (1e-3, 0.24),
        "vit_c_18gf": (1e-3, 0.24),
    },
    "sgd": {
        "regnety": (2.54, 2.4e-5),
        "vit_p_1gf": (1.9, 1.3e-5),
        "vit_p_4gf": (1.9, 1.3e-5),
        "vit_p_18gf": (1.1, 1.2e-5),
        "vit_c_1gf": (1.9, 1.3e-5),
        "vit_c_4gf": (1.3, 2.2e-5),
        "vit_c_18gf": (1.1, 2.7e-5),
    },
}
INTERVALS = {
    "adamw": {"regnety": ((1.25e-3, 4e-2), (7.5e-3, 0.24)), "vit": ((2.5e-4, 8e-3), (0.02, 0.8))},
    "sgd": {"regnety": ((0.25, 8.0), (3e-6, 8e-5)), "vit": ((0.1, 3.2), (4e-6, 1.2e-4))},
}
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
        kind = "regnety" if train.family(model) == "regnety" else "vit"
        lr, wd = INTERVALS[values["optimizer"]][kind]
        return [x * settings.batch_size / 2048 for x in lr], wd
    return [[values[name] * width for width in WIDTH] for name in ("lr", "weight_decay")]


def search(starts, top1_of, factor=3):
    """{key: (lr, wd)} -> {key: the (lr, wd) that none of its four neighbours, a factor away in one
    of both, surpasses}, found by going to the best neighbour. top1_of: [(key, lr, wd)] -> their
    top-1, None where training diverged; asked for many at once, never twice for one."""
    place, found = dict.fromkeys(starts, (0, 0)), {}

    def at(key, i, j):
        lr, wd = starts[key]
        return key, three_digits(lr * factor**i), three_digits(wd * factor**j)

    moving = list(starts)
    while moving:
        near = {
            key: [(i, j), (i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
            for key in moving
            for i, j in [place[key]]
        }
        new = [point for key in moving for ij in near[key] if (point := at(key, *ij)) not in found]
        found |= zip(new, (-1 if top1 is None else top1 for top1 in top1_of(new)))
        place |= {key: max(near[key], key=lambda ij: found[at(key, *ij)]) for key in moving}
        moving = [key for key in moving if place[key] != near[key][0]]
    return {key: at(key, *place[key])[1:] for key in starts}


def random_pairs(n, lr, wd, seed):
    """n pairs of learning rate and weight decay, log-uniform in the intervals lr and wd. Pair k
    depends on (seed, k) alone, and lies at the same place of the interval for every model."""
    return [
        tuple(three_digits(low * (high / low) ** u) for u, (low, high) in zip(row, (lr, wd)))
        for row in data.uniforms(data.keys(seed, np.arange(n)), 2).tolist()
    ]


def stand_in(top1):
    """{epochs: top-1, None of a run that diverged} -> the same, with the best of the shorter runs
    in a diverged one's place (Xiao Fig. 3); None stays where there is none."""
    return {
        epochs: max((v for e, v in top1.items() if e < epochs and v is not None), default=None)
        if value is None
        else value
        for epochs, value in top1.items()
    }


def edf(errors):
    """Error distribution function (Xiao §5.3): the errors in ascending order, and of each the share
    of all that is not above it. None, a run that diverged, counts and is never reached."""
    reached = sorted(error for error in errors if error is not None)
    return reached, [(i + 1) / len(errors) for i in range(len(reached))]


def longest(runs):
    """The run of the most epochs."""
    return max(runs, key=lambda run: run["epochs"])


def best(runs):
    """The run of the highest top-1, of those that did not diverge."""
    return max(runs, key=lambda run: -1 if run["diverged"] else run["top1"])


# study -> what its runs have in common with the one they are compared with; which one that is
COMPARED = {
    "length": (["model", "optimizer"], longest),
    "optimizer": (["model", "epochs"], lambda runs: runs[0]),  # by default AdamW
    "lr-wd": (["model", "optimizer"], best),
} | dict.fromkeys(("rho", "grid", "doubled"), (["model"], best))


def subtract_reference(study, runs):
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


def starred(run, key):
    """A run's number in a table; * marks a run that diverged."""
    return "*" if run[key] is None else f"{run[key]:.2f}" + "*" * run["diverged"]


def stability_rows(study, runs, axes):
    """The study's table, for print_rows."""
    if study == "length":
        return [
            {"Δ top-1 to the longest": f"{model}, {optimizer}"}
            | {f"{run['epochs']} epochs": starred(run, "delta") for run in own}
            | {"top-1 %": starred(longest(own), "compared")}
            for (model, optimizer), own in group(runs, "model", "optimizer").items()
        ]
    if study == "optimizer":
        return [
            {"model": model, "epochs": epochs}
            | {f"{run['optimizer']} %": starred(run, "compared") for run in own}
            | {"Δ": starred(own[-1], "delta")}
            for (model, epochs), own in group(runs, "model", "epochs").items()
        ]
    if study == "lr-wd":
        return [
            {
                "model": model,
                "optimizer": optimizer,
                "best top-1 %": starred(best(own), "top1"),
                "lr": f"{best(own)['lr']:g}",
                "wd": f"{best(own)['weight_decay']:g}",
            }
            | {
                f"Δ ≤ {most}": f"{sum(not r['diverged'] and r['delta'] <= most for r in pairs)}"
                f" of {len(pairs)}"
                for most in (1, 2, 4, 10)
            }
            | {"diverged": sum(run["diverged"] for run in pairs)}
            for (model, optimizer), own in group(runs, "model", "optimizer").items()
            for pairs in [[run for run in own if run["random"]]]
        ]
    paper = PAPER[study]
    return [
        {"model": run["model"]}
        | {name: f"{run[name]:g}" for name in axes}
        | {
            "top-1 %": starred(run, "top1"),
            "paper": paper.get(run["model"], {}).get(tuple(run[name] for name in axes)),
        }
        for run in runs
    ]


def draw_length(axes, runs):
    """Xiao Fig. 2."""
    for names, own in group(runs, "model", "optimizer").items():
        delta = np.array([run["delta"] for run in own], float)
        axes.plot([run["epochs"] for run in own], delta, "o-", label=", ".join(names))
    axes.set_xscale("log", base=2)
    axes.set_xticks(*[list(group(runs, "epochs"))] * 2)
    axes.set(xlabel="epochs", ylabel="Δ top-1 to the longest (points)")
    axes.legend(fontsize=6)


def draw_optimizer(axes, runs):
    """Xiao Fig. 3: dashed where a run diverged and the best shorter one stands in."""
    for color, own in enumerate(group(runs, "model").values()):
        for optimizer, line in group(own, "optimizer").items():
            points = np.array([(run["epochs"], run["compared"]) for run in line], float)
            for run, *ends in zip(line[1:], points, points[1:]):
                axes.plot(*zip(*ends), "--" if run["diverged"] else "-", color=f"C{color}")
            marker, title = {"adamw": "^", "sgd": "v"}, f"{own[0]['model']}, {optimizer}"
            axes.plot(*points.T, marker.get(optimizer, "o"), color=f"C{color}", label=title)
    axes.set_xscale("log", base=2)
    axes.set_xticks(*[list(group(runs, "epochs"))] * 2)
    axes.set(xlabel="epochs", ylabel="top-1 (%)")
    axes.legend(fontsize=6)


def draw_pairs(grid, runs):
    """Xiao Fig. 4 and 5, an optimizer a row: errors of the random pairs and, as vertical bars, the
    optima; error distribution functions, which end below 1 where runs diverged."""
    places = {
        "lr": lambda run: run["lr"],
        "wd": lambda run: run["weight_decay"],
        "lr · wd": lambda run: run["lr"] * run["weight_decay"],
    }
    for row, (optimizer, chosen) in zip(np.atleast_2d(grid), group(runs, "optimizer").items()):
        for color, (model, own) in enumerate(group(chosen, "model").items()):
            style, pairs = dict(color=f"C{color}"), [run for run in own if run["random"]]
            reached = [run for run in pairs if not run["diverged"]]
            for axes, (name, x) in zip(row, places.items()):
                error = [100 - run["top1"] for run in reached]
                axes.scatter([x(run) for run in reached], error, 8, **style)
                for run in own:
                    if not run["random"]:
                        axes.axvline(x(run), **style, alpha=0.5)
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter("")
                axes.set(xlabel=f"{name} ({optimizer})", ylabel="top-1 error (%)")
            errors, shares = edf([run["delta"] for run in pairs])
            row[3].step([0, *errors], [0, *shares], where="post", label=model, **style)
        row[3].set(
            ylim=(0, 1),
            xlabel=f"Δ top-1 error to the best (points, {optimizer})",
            ylabel="share of runs",
        )
        row[3].legend(fontsize=6)


def draw_values(axes, runs, study, names):
    """Top-1 of each set of values, and the paper's."""
    labels = {tuple(run[name] for name in names): None for run in runs}
    for color, (model, own) in enumerate(group(runs, "model").items()):
        style, paper = dict(color=f"C{color}"), PAPER[study].get(model, {})
        ours = {tuple(run[name] for name in names): run["top1"] for run in own}
        for marker, title, top1 in (("o-", model, ours), ("x", f"paper, {model}", paper)):
            shown = [(i, top1[v]) for i, v in enumerate(labels) if isinstance(top1.get(v), float)]
            if shown:
                axes.plot(*zip(*shown), marker, label=title, **style)
    marks = [" ".join(f"{v:g}" for v in values) for values in labels]
    axes.set_xticks(range(len(labels)), marks, rotation=90, fontsize=6)
    axes.set(xlabel=", ".join(name.replace("_", " ") for name in names), ylabel="top-1 (%)")
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
            raise UserError(
                f"--vary {' '.join([name, *words])}: {study} varies {' and '.join(axes)}; give one "
                "of these and its values"
            )
        values = list(dict.fromkeys(map(number, words)))
        if not isinstance(axes[name][0], str):
            wrong = [value for value in values if isinstance(value, str)]
            if wrong:
                raise UserError(f"--vary {name.replace('_', '-')} {wrong[0]}: takes numbers")
            values.sort()
        axes[name] = values
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
    study, folder = args.study, Path(args.out_dir or "out/stability")
    axes, given = values_of(study, args.vary), {}
    if args.optimum and study not in OF_XIAO:
        raise UserError(f"--optimum is of the studies {', '.join(OF_XIAO)}, not of {study}")
    if args.pairs is not None and study != "lr-wd":
        raise UserError(f"--pairs is of the study lr-wd, not of {study}")
    pairs = 64 if args.pairs is None else args.pairs
    if pairs < 1:
        raise UserError(f"--pairs is {pairs}; it must be at least 1")
    for optimizer, *pair in args.optimum:
        try:
            lr, wd = given[optimizer] = tuple(map(float, pair))
            if optimizer not in train.OPTIMIZERS or not (0 < lr < math.inf and 0 <= wd < math.inf):
                raise ValueError("not what the message asks for")
        except ValueError:
            raise UserError(
                f"--optimum {optimizer} {' '.join(pair)}: give an optimizer, a learning rate and a "
                "weight decay, as adamw 1e-3 0.1"
            ) from None

    # ---- what all trainings of a model have in common
    base, settings, models = {}, {}, args.models or STUDIES[study][0]
    for model, (chosen, origin) in of_models(models, rest, "stability").items():
        base[model] = ["--model", *shlex.split(model), *rest]
        refuse(axes, origin, "is what the study varies: --vary gives its values")
        refuse(
            ("lr", "weight_decay") * (study in OF_XIAO),
            origin,
            "is the optimal one in this study: --optimum OPTIMIZER LR WD sets it",
        )
        refuse(
            ("nesterov", "lr_end") * (study in OF_XIAO),
            origin,
            "goes with the optimizer and the learning rate, which this study sets",
        )
        train.check_network(chosen)
        settings[model] = chosen
        tell(f"model     {model}: recipe {chosen.recipe}")

    def job(model, values):
        """A training's name and flags."""
        parts = [v if isinstance(v, str) else f"{name}{v:.15g}" for name, v in values.items()]
        name = "-".join([re.sub(r"[^\w.]+", "-", model).strip("-"), *parts])
        if study in OF_XIAO:  # what goes with these; in their code SGD is Nesterov's
            values = values | dict(nesterov=values["optimizer"] == "sgd")
            if "lr" in values:
                own = settings[model]
                values["lr_end"] = three_digits(own.lr_end * values["lr"] / own.lr)
        return name, [*base[model], *as_flags(values)]

    def trained(what, trainings):
        """[(model, values)] -> [dict of these, the run's name and how it ended]."""
        jobs = [job(*training) for training in trainings]
        ended = conduct(what, dict(jobs), folder / "runs")
        return [
            dict(model=model, run=name) | values | ended[name]
            for (model, values), (name, _) in zip(trainings, jobs)
        ]

    # ---- which trainings
    results = None if args.dry_run else Results(folder, study)
    trainings = []
    for model, values in itertools.product(base, itertools.product(*axes.values())):
        values = dict(zip(axes, values))
        if values.get("optimizer") == "best":  # §5.1: AdamW for ViT, SGD for CNNs
            of_vit = train.family(settings[model].model) in ("vit", "pit", "mixer", "swin")
            values["optimizer"] = "adamw" if of_vit else "sgd"
        if (model, values) not in trainings:
            train.settings(job(model, values)[1])  # refuses what is none
            trainings.append((model, values))
    if study == "rho" and not args.vary:  # Table 10 has other values for each model
        trainings = [
            (model, values)
            for model, values in trainings
            if (values["sam_rho"],) in PAPER[study].get(model, [(values["sam_rho"],)])
        ]
    optima, sources, shortest = {}, {}, min(axes.get("epochs", [0]))
    if study in OF_XIAO:
        for key in dict.fromkeys((model, values["optimizer"]) for model, values in trainings):
            optima[key], sources[key] = optimum(*key, settings[key[0]], given)
        starts = {key: pair for key, pair in optima.items() if not sources[key]}
        for (model, optimizer), pair in optima.items():
            if study == "lr-wd" and not min(pair):
                raise UserError(
                    f"{model}, {optimizer}: pairs are drawn around the optimum in logarithms, and "
                    "its weight decay is 0: --optimum sets another"
                )

        def top1_of(points):
            tried = [
                (model, dict(optimizer=optimizer, epochs=shortest, lr=lr, weight_decay=wd))
                for (model, optimizer), lr, wd in points
            ]
            return [run["top1"] for run in trained(f"search at {shortest} epochs", tried)]

        if not args.dry_run:
            optima |= search(starts, top1_of)
        for (model, optimizer), (lr, wd) in optima.items():
            source = sources[model, optimizer] or (
                "the start of a search" if args.dry_run else "found by the search"
            )
            tell(
                f"optimum   {model}, {optimizer}: learning rate {lr:g}, weight decay {wd:g}, "
                f"{source}"
            )
        for model, values in trainings:
            values |= dict(zip(("lr", "weight_decay"), optima[model, values["optimizer"]]))
    at_optimum = len(trainings)
    if study == "lr-wd":
        for model, values in trainings[:at_optimum]:
            source = sources[model, values["optimizer"]]
            around = interval(model, values, settings[model], source)
            for lr, wd in random_pairs(pairs, *around, settings[model].seed):
                trainings.append((model, values | dict(lr=lr, weight_decay=wd)))
    if args.dry_run:
        tell_commands(dict(job(*training) for training in trainings), folder / "runs")
        return {}

    # ---- train, save, show
    runs = trained(study, trainings)
    for i, run in enumerate(runs if study == "lr-wd" else []):
        run["random"] = i >= at_optimum
    subtract_reference(study, runs)
    results.parts = {
        model: {
            run["run"]: {k: v for k, v in run.items() if k not in ("model", "run")} for run in own
        }
        for model, own in group(runs, "model").items()
    }
    results.settings = {
        model: {k: v for k, v in vars(chosen).items() if k != "out_dir"}
        for model, chosen in settings.items()
    }
    train.on_main(results.write)
    if train.rank() == 0:
        print_rows(stability_rows(study, runs, axes))
        if any(run["diverged"] for run in runs):
            stands_in = "; the best shorter run stands in, if there is one"
            tell("*: diverged" + stands_in * (study in ("length", "optimizer")))
        rows = len(group(runs, "optimizer")) if study == "lr-wd" else 1
        draw = DRAW.get(study, functools.partial(draw_values, study=study, names=list(axes)))
        finished(results, lambda axes: draw(axes, runs), rows, 4 if study == "lr-wd" else 1)
    return results.parts


# ----------------------------------------------------------------------------------------- transfer

HELD_OUT = {"cifar10": "1/50", "cifar100": "1/50", "flowers102": "1/10", "pets": "1/10"}  # Chen E.6
BASE_LR = [0.001, 0.003, 0.01, 0.03]  # Table 11
TABLE_6 = {  # cifar10, cifar100, flowers102, pets
    "resnet50 with SAM": (97.4, 85.2, 90.0, 91.6),
    "resnet152 with SAM": (98.2, 87.8, 91.1, 93.3),
    "vit_s16": (97.6, 85.7, 86.4, 90.4),
    "vit_s16 with SAM": (98.2, 87.6, 91.5, 92.9),
    "vit_b16": (98.1, 87.6, 88.5, 91.9),
    "vit_b16 with SAM": (98.6, 89.1, 91.8, 93.1),
    "mixer_s16": (94.1, 77.9, 83.3, 86.1),
    "mixer_s16 with SAM": (96.1, 82.4, 87.9, 88.7),
    "mixer_b16": (95.4, 80.0, 82.8, 86.1),
    "mixer_b16 with SAM": (97.8, 86.4, 90.0, 92.5),
}
NOT_INHERITED = ("dropout", "drop_path", "head_bias", "init", "zero_init")  # by fine-tuning


def draw_transfer(axes, searched):
    """The search: {(network, data set): {learning rate: top-1}}."""
    for (name, dataset), top1 in searched.items():
        y = np.array(list(top1.values()), float)
        axes.plot(list(top1), y, "o-", label=f"{dataset}, {name}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="top-1 on the held-out part (%)")
    axes.legend(fontsize=6)


def transfer(args, rest):
    """Accuracy of checkpoints after fine-tuning on other data sets (Chen et al. Table 6, E.6): the
    learning rate of Table 11 that is best on a held-out class-balanced part of the training set
    (10 % of Flowers and Pets, 2 % of CIFAR), training on the others; then a run on all of it, and
    its accuracy on the test set. The recipes are chen_to_DATASET; other data sets take that of
    Flowers. Returns the "results" that it was asked for."""
    join_processes()
    of_targets = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--data-dir", "--eval-short-side"):  # not of what the networks were trained on
        of_targets.add_argument(flag)
    chosen = networks(args.checkpoint, of_targets.parse_known_args(rest)[1], own_flags("transfer"))
    if "--eval-only" in rest:
        raise UserError("--eval-only: this command trains")
    refuse(("dataset", "recipe", "lr", "hold_out"), chosen[0][1], "is chosen by this command")
    folder = Path(args.out_dir or Path(chosen[0][0].init_from).parent)
    results = Results(folder, "transfer")

    def job(settings, content, dataset, lr, hold_out):
        """A run's name and flags."""
        kept = [name for name in train.MODEL_FLAGS if name not in NOT_INHERITED]
        recipe = f"chen_to_{dataset if dataset in HELD_OUT else 'flowers102'}"
        own = dict(dataset=dataset, init_from=settings.init_from, model=settings.model, lr=lr)
        own |= dict(hold_out=hold_out) | {name: getattr(settings, name) for name in kept}
        flags = ["--recipe", recipe, *rest, "--reset-head", *as_flags(own)]
        return f"{content}-{dataset}-{'all' if hold_out == '0' else 'part'}-lr{lr:g}", flags

    named = [(*label(settings), settings) for settings, _ in chosen]
    results.settings |= {name: decides for name, decides, _ in named}
    targets = {
        (name, dataset): (settings, decides["content"], dataset)
        for name, decides, settings in named
        for dataset in dict.fromkeys(args.datasets)
    }
    searches = {
        key: {lr: job(*target, lr, HELD_OUT.get(key[1], "1/10")) for lr in BASE_LR}
        for key, target in targets.items()
    }
    jobs = dict(run for own in searches.values() for run in own.values())
    ended = conduct("learning rates", jobs, folder / "transfer")
    searched = {
        key: {lr: ended[run]["top1"] for lr, (run, _) in own.items()}
        for key, own in searches.items()
    }
    best_lr = {
        key: max(top1, key=lambda lr: -1 if top1[lr] is None else top1[lr])
        for key, top1 in searched.items()
    }
    finals = {key: job(*target, best_lr[key], "0") for key, target in targets.items()}
    ended = conduct("whole training sets", dict(finals.values()), folder / "transfer")
    for key, (run, _) in finals.items():
        found = {f"{lr:g}": top1 for lr, top1 in searched[key].items()}
        results.put(*key, dict(lr=best_lr[key], run=run, **ended[run], held_out=found))
    if train.rank() == 0:
        tables = {
            name: {d: results.take(name, d)["top1"] for d in args.datasets} for name, _, _ in named
        }
        models = {settings.model for settings, _ in chosen}
        for name, numbers in TABLE_6.items():
            if name.split()[0] in models:
                theirs = dict(zip(HELD_OUT, numbers))
                tables[f"Table 6, {name}"] = {d: theirs.get(d) for d in args.datasets}
        rows = []
        for name, row in tables.items():
            average = None if None in row.values() else sum(row.values()) / len(row)
            rows.append({"top-1 %": name} | row | {"average": average})
        print_rows(rows)
        finished(results, lambda axes: draw_transfer(axes, searched))
    return results.taken


# ---------------------------------------------------------------------------------------------- all

PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<style>body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: auto; padding: 1em }}
img {{ max-width: 100%; background: white }} pre, table {{ overflow-x: auto; display: block }}
td, th {{ padding: 0 0.6em; text-align: left; vertical-align: top }}</style>
<h1>{title}</h1>
{body}</html>
"""


def drawn(folder, what, began):
    """Names of a subcommand's figures there, but for those of an earlier command."""
    return [
        path.name
        for path in sorted(folder.glob(f"{what}*.png"))
        if re.fullmatch(rf"{what}(-.*)?\.png", path.name) and path.stat().st_mtime >= began - 1
    ]


def figure_sections(shown):
    """HTML from {title: dict of summary, file, its JSON's name without the suffix, drawn, the names
    of its figures, their folder beside the page, answer, why there are none, or None, and argv, its
    command}."""
    body = []
    for what, of in shown.items():

        def beside(name):
            return quote(os.path.normpath(os.path.join(of["folder"], name)))

        body.append(f"<h2>{html.escape(what)}</h2>\n<p>{html.escape(of['summary'])}</p>")
        body += [f'<p><img src="{beside(name)}" alt="{html.escape(name)}">' for name in of["drawn"]]
        made = f'<p><a href="{beside(of["file"] + ".json")}">{of["file"]}.json</a>'
        missing = f"<p>Not made: {html.escape(of['answer'] or '')}"
        body.append(made if of["answer"] is None else missing)
        command = shlex.join(["python", "analyze.py", *of["argv"]])
        body.append(f"<pre>{html.escape(command)}</pre>")
    return body


def all_command(args, rest):
    """Every figure that the networks allow, by the other subcommands with their defaults, in one
    folder with an index.html that shows each with its numbers and its command, or why there is
    none. What is finished is not computed again. Returns {subcommand: None, or why not}."""
    first = networks(args.checkpoint, rest, own_flags("all"))[0][0].init_from
    folder = Path(args.out_dir or Path(first).parent / "figures")
    train.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    commands, shown = make_parser().commands, {}
    for what in args.figures:
        argv, flags = [what, "--out-dir", str(folder)], commands[what]._option_string_actions
        runs = "--runs" in flags  # curves are of checkpoints' runs, and know no flags of train.py
        if args.checkpoint:
            argv += ["--runs" if runs else "--checkpoint", *args.checkpoint]
        argv += [] if runs else rest
        for flag, value in (("--images", args.images), ("--points", args.points)):
            if value is not None and flag in flags:
                argv += [flag, str(value)]
        tell(f"\n{what}")
        answer, began = None, time.time()
        try:
            own, more = make_parser().parse_known_args(argv)
            own.function(own, more)
        except (UserError, data.DataError, MemoryError, RuntimeError) as error:
            memory = train.want_of_memory(error)
            known = memory or isinstance(error, (UserError, data.DataError))
            lone = memory or isinstance(error, (data.DataError, train.LoneError))
            if not known or lone and dist.is_initialized():
                raise  # a defect, or met by this process alone
            answer = memory or str(error)
            tell(f"none      {answer}")
        shown[what] = dict(
            argv=argv,
            answer=answer,
            file=what,
            drawn=drawn(folder, what, began),
            summary=commands[what].summary,
            folder="",
        )
        page = PAGE.format(title="Figures", body="\n".join(figure_sections(shown)))
        train.on_main(lambda: write(folder / "index.html", page.encode()))  # to be looked at
    tell(f"\nfigures   {folder / 'index.html'}")
    if all(of["answer"] is not None for of in shown.values()):
        raise UserError("no figure could be made: the lines that begin with none say why")
    return {what: of["answer"] for what, of in shown.items()}


# ---------------------------------------------------------------------------------------- reproduce

FAMILIES = {  # about equal in cost: 7.4 to 8.9 million multiply-adds for an image of 32×32
    "ViT": "vit_micro8",
    "ViT_C": "vit_micro8 --stem conv",
    "Mixer": "mixer_micro8 --depth 6",
    "ResNet": "resnet18 --width 8",
    "AlterNet": "alter_resnet18 --width 9 --heads 1 2 4 8 --head-dim 8",
    "PiT": "pit_ti --patch-size 4 --stride 4 --depth 2 4 2 --heads 1 2 4 --head-dim 32",
    "Swin": "torchvision:swin_t --dim 18 --patch-size 2 --depth 1 1 3 1 --heads 1 2 4 8",
}
FIVE = ("ViT", "ViT_C", "Mixer", "ResNet", "AlterNet")
CHEN = ("ViT", "Mixer", "ResNet")
TENTH = "--train-fraction {1/10} --batch-size 8 --micro-batch 8"
# Part, of which families, what is other about them, flags, whether with SAM too. {each}: all epochs
# but the last, {twice}: twice as many, {1/2}: half of core's images, all filled in by `reproduce`;
# what comes later counts.
TRAININGS = [
    ("core", FIVE, "", "--keep-epochs warmup {each}", True),
    ("twice", FIVE, "twice the epochs", "--epochs {twice}", False),
    # fewer images, and batches as much smaller (Chen E.2): about as many steps
    ("fractions", CHEN, "1/2", "--train-fraction {1/2} --batch-size 32", True),
    ("fractions", CHEN, "1/4", "--train-fraction {1/4} --batch-size 16 --micro-batch 16", True),
    ("fractions", CHEN, "1/10", TENTH, True),
    ("augmentation", ("ViT", "Mixer"), "augmented", shlex.join(STRONG), True),
    ("augmentation", ("ViT", "Mixer"), "augmented, 1/10", f"{shlex.join(STRONG)} {TENTH}", True),
    ("decay", CHEN, "weight decay 1", "--weight-decay 1", True),
    ("contrastive", ("ViT",), "contrastive", "--loss supcon --augment crop", True),
    ("adversarial", CHEN, "adversarial", "--adv-eps 2/255", True),
    ("stages", ("PiT", "Swin"), "", "", False),
    ("patches", ("ViT",), "patch 4", "--patch-size 4", False),
    ("patches", ("ViT",), "patch 16", "--patch-size 16", False),
    ("kernels", ("ViT",), "patch 4, kernel 3", "--patch-size 4 --kernel-size 3", False),
    ("kernels", ("ViT",), "patch 4, kernel 5", "--patch-size 4 --kernel-size 5", False),
    ("heads", ("ViT",), "1 head", "--heads 1 --head-dim 32", False),
    ("heads", ("ViT",), "9 heads", "--heads 9 --head-dim 32", False),
    ("heads", ("ViT",), "heads of 8", "--heads 3 --head-dim 8", False),
    ("pooling", ("ViT",), "GAP", "--pool gap", False),
    ("pooling", ("ResNet",), "blur", "--blur", False),
    ("blocks", ("AlterNet",), "0 attention blocks", "--msa-blocks 0 0 0 0", False),
    ("blocks", ("AlterNet",), "1 attention block", "--msa-blocks 0 0 0 1", False),
    ("blocks", ("AlterNet",), "2 attention blocks", "--msa-blocks 0 0 1 1", False),
]
RHO_BESIDE = {  # Chen Table 9, E.3, E.4: how SAM's ρ there compares with plain training's
    "augmentation": {"ViT": 1 / 4, "Mixer": 1 / 3},
    "contrastive": {"ViT": 1 / 10},
    "adversarial": {"ViT": 1 / 2, "Mixer": 5 / 12, "ResNet": 5 / 2},
}
PARTS = tuple(dict.fromkeys([part for part, *_ in TRAININGS] + ["optimizability"]))
# images: training images for the analyses of the loss; held_out: images for those of feature maps;
# points: of a landscape's side; pairs: of learning rate and weight decay; noise_of: networks under
# noise of all bands, of which the claims need two; fit: the part of the training images whose loss
# is measured.
SCALES = {
    "full": dict(
        train_fraction="1",
        epochs=12,
        warmup_steps=125,
        seeds=[0, 1, 2],
        rho=["0.01", "0.03", "0.1"],
        images=240,
        held_out=500,
        points=17,
        pairs=16,
        corruptions=True,
        noise_of=FAMILIES,
        fit="1",
        parts=PARTS,
        epochs_of={"length": [3, 6, 12], "optimizer": [3, 6, 12], "lr-wd": [3]},
    ),
    "quick": dict(
        train_fraction="1/2",
        epochs=2,
        warmup_steps=30,
        seeds=[0, 1],
        rho=["0.03"],
        images=48,
        held_out=200,
        points=5,
        pairs=4,
        corruptions=False,
        noise_of=("ViT", "ResNet"),
        fit="1/4",
        parts=("core",),
        epochs_of={"length": [1, 2], "optimizer": [1, 2], "lr-wd": [1]},
    ),
}
LENGTH = ("train_fraction", "epochs", "warmup_steps")
MAY_BE_GIVEN = ("device", "dtype", "compile", "channels_last", "workers")  # of train.py's flags
GIVEN = ", ".join(map(train.flag, MAY_BE_GIVEN))
LEFT_OUT = [  # what is not judged here, and why
    ("Chen Table 2, 5: ImageNet-ReaL, -V2, -R", "need ImageNet: `robustness --benchmarks`"),
    ("Chen §4.2, §4.3, Table 9: larger models, longer sequences", "need networks of many sizes"),
    ("Chen Table 2, §4.3, §5.1, App. F: on par", "are equalities: no order, no verdict"),
    ("Chen Table 6, 11: transfer", "needs other data sets: `transfer`"),
    ("Chen §5.1: pre-training on ImageNet-21k", "needs it: recipes `chen_vit_21k` and its like"),
    ("Chen Table 2, 7; Park A.1, App. E; Xiao §6: speed", "is of a machine: `throughput`"),
    ("Chen Table 9, 10: which ρ", "one seed: the table of ρ"),
    ("Chen Fig. 2 middle, 3: curves, attention", "judged by eye: figures `curves`, `attention`"),
    (
        "Chen Fig. 1, Park Fig. 1a, C.4a: landscapes",
        "judged by eye: figures `landscape`, `landscape, Park`; in numbers, the loss under noise",
    ),
    ("Chen B.1, App. D: sigmoid loss, activations", "`hessian --loss`, `ntk --activation`"),
    ("Chen App. E: the Mixer's grid", "`stability --study grid`"),
    ("Park Fig. 1b, C.4b: later epochs", "`spectrum` of kept epochs"),
    ("Park Fig. 7: robustness of kernels", "`robustness`"),
    ("Park Fig. 12b, E.1: AlterNet beside more networks", "need CIFAR or ImageNet: `robustness`"),
    ("Park Fig. C.1: CIFAR-10 and ImageNet", "need them: `nll`"),
    ("Park Fig. C.2: patches of 2", "cost 16 times as much as patches of 8"),
    ("Park Fig. C.5, C.6: exponents", "need more than two widths: `spectrum --against`"),
    ("Park Fig. C.7: larger models", "needs networks of two sizes: `spectrum`"),
    ("Park Fig. 4: ResNet gains little by more data", "is an equality: no order, no verdict"),
    ("Park App. B: spectra and robustness of a blur", "`spectrum` and `noise` of `ResNet, blur`"),
    ("Xiao Table 2, Fig. 6: several sizes, ImageNet-21k", "need ImageNet: `peak`"),
    ("Xiao Fig. 2 to 5: RegNetY, several sizes", "need ImageNet: `stability`"),
    ("Xiao §5.4: decay of norms, DeiT's recipe", "`--decay all`, recipe `xiao_deit`"),
]


class Numbers:
    """What was measured, as arrays with a number for each seed. folder: that of the runs; runs:
    {(name, seed): dict of run, its folder's name, and how it ended}; found: {subcommand: its
    results}. Of what was not trained or computed numbers are NaN, and `missing` has its name."""

    def __init__(self, folder, seeds, runs):
        self.folder, self.seeds, self.runs, self.found, self.missing = folder, seeds, runs, {}, []
        self.nothing = np.zeros(len(seeds))
        # top-1 in percent of the validation split's images, as they are, corrupted, attacked
        self.clean, self.corrupted, self.under_pgd = (
            functools.partial(self.accuracy, benchmark) for benchmark in ("val", "c-lite", "pgd")
        )

    def none(self, what):
        """What there is no number of."""
        self.missing.append(what)
        return np.full(len(self.seeds), math.nan)

    def path(self, name, seed, file="ckpt.pt"):
        """Of a file of a run."""
        return self.folder / self.runs[name, seed]["run"] / file

    def top1(self, name):
        """Of the validation split, in percent; NaN where training diverged."""
        if (name, self.seeds[0]) not in self.runs:
            return self.none(name)
        return np.array([self.runs[name, seed]["top1"] for seed in self.seeds], float)

    def of(self, command, name, pick, file="ckpt.pt"):
        """pick({part: numbers}) of a network's results by a subcommand."""
        if (name, self.seeds[0]) not in self.runs:
            return self.none(name)
        numbers = []
        for seed in self.seeds:
            if self.runs[name, seed]["top1"] is None:  # it diverged
                numbers.append(math.nan)
                continue
            path = self.path(name, seed, file(name, seed) if callable(file) else file)
            own = [
                parts
                for network, parts in self.found.get(command, {}).items()
                if network.startswith(f"{path} (")
            ]
            numbers.append(pick(own[-1]) if own else None)
            if numbers[-1] is None:  # not computed, or not defined, as κ of a singular kernel
                return self.none(f"{command} of {name}")
        return np.array(numbers, float)

    def test(self, name):
        """Top-1 of the test split, in percent."""
        return self.of("test", name, lambda parts: parts["val"]["top1"])

    def accuracy(self, benchmark, name):
        """On a benchmark of `robustness`, in percent."""

        def pick(parts):
            summary = robustness_summary({part: of["top1"] for part, of in parts.items()})
            return summary.get(benchmark)

        return self.of("robustness", name, pick)

    def fit(self, name):
        """The loss of training images."""
        return self.only("nll", name, lambda of: of["nll"])

    def misfit(self, name):
        """The error of training images, in percent."""
        return self.only("nll", name, lambda of: of["training_error"])

    def active(self, name, block=slice(None)):
        """Active neurons of a block, or on average of all, in percent."""
        return self.only(
            "sparsity", name, lambda of: 100 * np.mean(list(of["block"].values())[block])
        )

    def weights(self, name):
        """Their norm."""
        return self.only("norms", name, lambda of: of["weights"])

    def first_activation(self, name):
        """Its mean norm."""
        return self.only("norms", name, lambda of: next(iter(of["activation"].values())))

    def condition(self, name):
        """κ of the NTK."""
        return self.of("ntk", name, lambda parts: ntk_summary(list(parts.values()))["κ"])

    def eigenvalue(self, name, block="whole", which=0, file="ckpt.pt"):
        """The largest of the Hessian's diagonal block, or of the one at which (0: first, -1: last)
        of several of such a name."""

        def pick(parts):
            own = [of for part, of in parts.items() if part.startswith(block)]
            return own[min(which, len(own) - 1)]["eigenvalues"][0] if own else None

        return self.of("hessian", name, pick, file)

    def at_equal_loss(self, name, seed):
        """The checkpoint of the epoch whose training loss is nearest to the highest final one of
        Chen et al.'s families without SAM: where the loss vanishes, so does its curvature."""
        losses = {}
        if self.runs[name, seed]["diverged"]:
            return "ckpt.pt"  # of which nothing is computed
        for family in CHEN:
            if self.runs[family, seed]["diverged"]:
                continue
            curve = np.array(training_curve(read_log(self.path(family, seed, "log.jsonl")))["loss"])
            losses[family] = {
                epoch: curve[np.abs(curve[:, 1] - epoch).argmin(), 2]
                for epoch in range(1, round(curve[-1, 1]) + 1)
            }
        highest, last = max(of[max(of)] for of in losses.values()), max(losses[name])
        nearest = min(losses[name], key=lambda e: abs(math.log(losses[name][e] / highest)))
        return "ckpt.pt" if nearest == last else f"epoch{nearest}.pt"

    def spectrum(self, name, key):
        """nep or ape at the end of the warm-up."""

        def pick(parts):
            return next(of[key] for of in parts.values() if "batches" in of)

        return self.of("spectrum", name, pick, "warmup.pt")

    def only(self, command, name, pick):
        """Of a subcommand with one part."""
        return self.of(command, name, lambda parts: pick(*parts.values()))

    def study(self, study, name, pick):
        """pick of a study's runs, for each seed."""
        if study not in self.found:
            return self.none(study)
        return np.array(
            [pick(list(self.found[study][seed][FAMILIES[name]].values())) for seed in self.seeds],
            float,
        )

    def noise(self, name):
        """By how much noise of a tenth of each filter's length raises the training loss."""

        def pick(parts):
            noisy, clean = (
                next(of for part, of in parts.items() if word in part)
                for word in ("relative noise of σ 0.1,", "ball of ρ 0,")
            )
            return noisy["mean"] - clean["worst"]

        return self.of("flatness", name, pick)

    def change(self, command, name, kind, without=()):
        """By how much units of a kind, without some units or stages, change, on average, the Δ log
        amplitude at the highest frequency (fourier) or the variance."""

        def pick(of):
            values = (
                {unit: curve[-1] for unit, curve in of["diagonal"].items()}
                if command == "fourier"
                else of["variance"]
            )
            own = [
                change
                for unit, change in changes(of, values).items()
                if of["units"][unit][0] == kind and not {unit, of["units"][unit][1]} & {*without}
            ]
            return np.mean(own) if own else math.nan

        return self.only(command, name, pick)

    def vulnerability(self, name, low, high, energy="in proportion"):
        """Points of accuracy lost to noise of the frequencies from low to high π, on average, of
        "equal" energy or "in proportion" to the area of the band."""

        def pick(parts):
            lost = [
                parts["no noise"]["top1"] - of["top1"]
                for part, of in parts.items()
                if part != "no noise"
                and low <= float(part.split("π")[0]) <= high
                and ("equal" in part) == (energy == "equal")
            ]
            return np.mean(lost)

        return self.of("noise", name, pick)

    def similarity(self, name, within):
        """Mean CKA of each unit and the next: both of one stage, or of two."""

        def pick(parts):
            of = next(of for part, of in parts.items() if "against" not in part)
            stages = [stage for kind, stage in of["units"].values()]
            return np.mean(
                [
                    of["cka"][i][i + 1]
                    for i in range(1, len(stages) - 1)  # 0 is the stem
                    if (stages[i] == stages[i + 1]) == within
                ]
            )

        return self.of("cka", name, pick)

    def lesion(self, name, pattern):
        """Points of accuracy lost without one of the units whose name has the pattern, on
        average."""

        def pick(parts):
            whole = next(top1 for part, top1 in parts.items() if part.endswith("whole"))
            lost = {
                part.split("without ")[1]: whole - top1
                for part, top1 in parts.items()
                if "without" in part
            }
            return np.mean([points for unit, points in lost.items() if re.search(pattern, unit)])

        return self.of("lesion", name, pick)


class Claim(NamedTuple):
    """A sentence of a paper's, in numbers."""

    where: str  # in the paper, or "control" for ours, beside which the one before is to be read
    text: str
    values: dict  # {what: its numbers over seeds}, in the order in which they descend if it holds
    ratio: bool = False  # whether it is their ratio that counts


Ratio = functools.partial(Claim, ratio=True)


def with_and_without(measured, name, first="with SAM", then="plain"):
    """A network with SAM and without."""
    both = {"with SAM": measured(f"{name} + SAM"), "plain": measured(name)}
    return {first: both[first], then: both[then]}


def sams_gain(measured, name):
    """By SAM."""
    return measured(f"{name} + SAM") - measured(name)


def claims_of_chen(n):
    """Yields every Claim of Chen et al., its numbers from n, Numbers."""
    sam, nothing = " + SAM", {"0": n.nothing}
    both = ((n.test, "clean"), (n.corrupted, "corrupted"))  # images
    for name in CHEN:
        yield Claim(
            "Chen Table 2", f"SAM raises the accuracy of {name} (%)", with_and_without(n.test, name)
        )
        yield Claim(
            "Chen Table 2",
            f"SAM raises {name}'s accuracy on corrupted images (%)",
            with_and_without(n.corrupted, name),
        )
    for measured, images in both:
        yield Claim(
            "Chen §4.2, Table 2",
            f"SAM gains most for Mixer, then ViT, then ResNet, {images} images (points)",
            {name: sams_gain(measured, name) for name in ("Mixer", "ViT", "ResNet")} | nothing,
        )
    for measured, images in both:
        for name in ("ViT", "Mixer"):
            yield Claim(
                "Chen §3, Table 1",
                f"{name} without SAM is worse than ResNet, {images} images (%)",
                {of: measured(of) for of in ("ResNet", name)},
            )
        yield Claim(
            "Chen §4.3, Table 2",
            f"with SAM ViT is better than ResNet, {images} images (%)",
            {name: measured(name + sam) for name in ("ViT", "ResNet")},
        )
    for name in ("ViT", "Mixer"):
        yield Claim(
            "Chen §4.2",
            f"SAM gains more on corrupted images than on clean ones, {name} (points)",
            {"corrupted": sams_gain(n.corrupted, name), "clean": sams_gain(n.clean, name)}
            | nothing,
        )
        yield Claim(
            "Chen App. F",
            f"SAM brings {name} more than twice the epochs, which bring the paper's nothing (%)",
            {"with SAM": n.test(name + sam), "twice": n.test(f"{name}, twice the epochs")},
        )
        yield Ratio(
            "Chen Table 1",
            f"{name} converges at sharper points than ResNet (λmax)",
            {of: n.eigenvalue(of) for of in (name, "ResNet")},
        )
        yield Ratio(
            "control",
            f"… than ResNet at about the same training loss ({name}, λmax)",
            {of: n.eigenvalue(of, file=n.at_equal_loss) for of in (name, "ResNet")},
        )
        yield Ratio(
            "control",
            f"… than ResNet, both with weight decay 1 ({name}, λmax)",
            {of: n.eigenvalue(f"{of}, weight decay 1") for of in (name, "ResNet")},
        )
        yield Claim(
            "Chen Fig. 1, §3",
            f"{name} is more sensitive than ResNet to noise on its filters (rise of the loss)",
            {of: n.noise(of) for of in (name, "ResNet")},
        )
    yield Ratio(
        "Chen §3, Table 1",
        "Mixer is the sharpest of the three (λmax)",
        {
            "Mixer": n.eigenvalue("Mixer"),
            "the sharper other": np.maximum(n.eigenvalue("ViT"), n.eigenvalue("ResNet")),
        },
    )
    for name in CHEN:
        yield Ratio(
            "control" if name == "ResNet" else "Chen Table 1",
            f"SAM lowers λmax of {name}",
            with_and_without(n.eigenvalue, name, "plain", "with SAM"),
        )
        yield Claim(
            "control" if name == "ResNet" else "Chen Fig. 1",
            f"SAM makes {name} less sensitive to noise on its filters (rise of the loss)",
            with_and_without(n.noise, name, "plain", "with SAM"),
        )
        yield Ratio(
            "control",
            f"SAM lowers λmax of {name} with weight decay 1",
            with_and_without(n.eigenvalue, f"{name}, weight decay 1", "plain", "with SAM"),
        )
    yield Ratio(
        "Chen Table 1",
        "Mixer's NTK is conditioned worst, ResNet's best (κ)",
        {name: n.condition(name) for name in ("Mixer", "ViT", "ResNet")},
    )
    yield Claim(
        "Chen §3",
        "Mixer fits its training images better than ViT (error, %; the paper's has fewer "
        "parameters)",
        {name: n.misfit(name) for name in ("ViT", "Mixer")},
    )
    yield Claim(
        "Chen §3", "… and is worse on others (%)", {name: n.test(name) for name in ("ViT", "Mixer")}
    )

    def least_smoothed(name):
        components = [("embedding", 0), ("MSAs", 0), ("MLPs", 0)]
        components += [("block ", which) for which in (0, 1, -1)]
        return np.min(
            [n.eigenvalue(name, *of) / n.eigenvalue(name + sam, *of) for of in components], axis=0
        )

    for name in ("ViT", "Mixer"):
        yield Ratio(
            "Chen Table 3, §4.4",
            f"{name}: embedding, MLPs, MSAs or token MLPs in order of λmax",
            {what: n.eigenvalue(name, what) for what in ("embedding", "MLPs", "MSAs")},
        )
        yield Ratio(
            "Chen Table 3, §4.4",
            f"the shallower, the sharper: {name}'s first block, middle and last (λmax)",
            {
                what: n.eigenvalue(name, "block ", which)
                for what, which in (("first", 0), ("middle", 1), ("last", -1))
            },
        )
        yield Ratio(
            "Chen Table 3, §4.4",
            f"SAM smooths every component of {name} (how often smaller its λmax is)",
            {"the least smoothed": least_smoothed(name), "1": n.nothing + 1},
        )
        yield Ratio(
            "Chen Table 3, §4.4",
            f"SAM makes {name}'s weights longer (‖w‖)",
            with_and_without(n.weights, name),
        )
        yield Ratio(
            "Chen Table 3, §4.4",
            f"SAM makes {name}'s first activations longer (‖a₁‖)",
            with_and_without(n.first_activation, name),
        )
        yield Claim(
            "Chen §4.4" if name == "ViT" else "Chen Fig. 2, §4.4",
            f"SAM makes {name}'s first block sparser (active, %)",
            with_and_without(lambda of: n.active(of, 0), name, "plain", "with SAM"),
        )
    yield Claim(
        "Chen §4.4",
        "… Mixer's by more than ViT's (active, points)",
        {name: n.active(name, 0) - n.active(name + sam, 0) for name in ("Mixer", "ViT")},
    )
    for other in ("ResNet", "Mixer"):
        yield Claim(
            "Chen §4.4",
            f"ViT's neurons are sparser than {other}'s (active, % over blocks)",
            {name: n.active(name) for name in (other, "ViT")},
        )
    yield Claim(
        "Chen Fig. 2, §4.4",
        "SAM raises the training error of ViT (%)",
        with_and_without(n.misfit, "ViT"),
    )
    yield Claim(
        "Chen Fig. 2, §4.4",
        "… and so does strong augmentation (%, here of augmented images)",
        {"augmented": n.misfit("ViT, augmented"), "plain": n.misfit("ViT")},
    )
    for name, part in itertools.product(CHEN, ("1/2", "1/4", "1/10")):
        yield Claim(
            "Chen Fig. 4, Table 4",
            f"SAM gains more with {part} of the images, {name} (points)",
            {part: sams_gain(n.top1, f"{name}, {part}"), "all": sams_gain(n.top1, name)} | nothing,
        )
    for name in ("ViT", "Mixer"):
        for part, where in (("1/2", "§5.1, Fig. 4"), ("1/4", "§5.1, Fig. 4"), ("1/10", "Table 4")):
            yield Claim(
                f"Chen {where}",
                f"{name} loses more than ResNet with {part} of the images (points)",
                {of: n.top1(of) - n.top1(f"{of}, {part}") for of in (name, "ResNet")},
            )
        for part, images in (("", "all images"), (", 1/10", "a tenth of the images")):
            own, augmented = f"{name}{part}", f"{name}, augmented{part}"
            yield Claim(
                "Chen §5.2, Table 4",
                f"SAM helps {name} more than strong augmentation, {images} (%)",
                {"with SAM": n.top1(own + sam), "augmented": n.top1(augmented)},
            )
            yield Claim(
                "Chen Table 4",
                f"strong augmentation helps {name}, {images} (%)",
                {"augmented": n.top1(augmented), "plain": n.top1(own)},
            )
            yield Claim(
                "Chen §5.2, Table 4",
                f"SAM adds to strong augmentation, {name}, {images} (%)",
                with_and_without(n.top1, augmented),
            )
        yield Claim(
            "Chen §5.2, Table 4",
            f"strong augmentation adds to SAM, {name}, all images (%)",
            {"both": n.top1(f"{name}, augmented{sam}"), "SAM": n.top1(name + sam)},
        )
    yield Claim(
        "Chen §5.2, Table 4",
        "SAM helps ViT more than strong augmentation, with a tenth of the images by more (points)",
        {
            "1/10": n.top1(f"ViT, 1/10{sam}") - n.top1("ViT, augmented, 1/10"),
            "all": n.top1(f"ViT{sam}") - n.top1("ViT, augmented"),
        },
    )
    yield Claim(
        "Chen §5.3",
        "SAM helps ViT in contrastive training (%)",
        {
            "with SAM": n.top1(f"ViT, contrastive{sam}, head"),
            "plain": n.top1("ViT, contrastive, head"),
        },
    )
    for attacked, images in (
        (n.clean, "clean"),
        (n.under_pgd, "under PGD-10"),
        (n.corrupted, "corrupted"),
    ):
        for name in ("ViT", "Mixer"):
            yield Claim(
                "Chen Table 5",
                f"SAM helps {name} in adversarial training, {images} (%)",
                with_and_without(attacked, f"{name}, adversarial"),
            )
        yield Claim(
            "Chen Table 5",
            f"with SAM and adversarial training ViT is better than ResNet, {images} (%)",
            {name: attacked(f"{name}, adversarial{sam}") for name in ("ViT", "ResNet")},
        )
    yield Claim(
        "Chen Table 5",
        "SAM costs ResNet a little in adversarial training, clean (%)",
        with_and_without(n.clean, "ResNet, adversarial", "plain", "with SAM"),
    )
    yield Claim(
        "Chen Table 5",
        "… and helps it under PGD-10 (%)",
        with_and_without(n.under_pgd, "ResNet, adversarial"),
    )


def claims_of_park(n):
    """Yields every Claim of Park & Kim, its numbers from n, Numbers; eigenvalues at the end of the
    warm-up, as they speak of an early phase."""

    def nep(figure, text, *names):
        """Of the shares of negative eigenvalues of networks."""
        values = {name: 100 * n.spectrum(name, "nep") for name in names}
        return Claim(f"Park Fig. {figure}", f"{text} (NEP, %)", values)

    def ape(figure, text, *names):
        """Of the means of their positive ones."""
        values = {name: n.spectrum(name, "ape") for name in names}
        return Ratio(f"Park Fig. {figure}", f"{text} (APE)", values)

    yield nep("1b, 4", "ViT has more negative eigenvalues than ResNet", "ViT", "ResNet")
    yield ape("1b, 4", "ViT's positive eigenvalues are smaller", "ResNet", "ViT")
    less = "less data (and batches as much smaller), more negative eigenvalues of ViT"
    yield nep("4", less, "ViT, 1/10", "ViT")
    yield nep("C.4b", "stages: fewer negative eigenvalues", "ViT", "PiT")
    yield nep("C.4b", "windows: more negative eigenvalues", "Swin", "PiT")
    yield ape("C.4b", "windows: smaller positive eigenvalues", "PiT", "Swin")
    yield nep("6", "GAP for the class token: fewer negative eigenvalues", "ViT", "ViT, GAP")
    yield Claim(
        "Park §2",
        "GAP for the class token: better (%)",
        {"GAP": n.top1("ViT, GAP"), "class token": n.top1("ViT")},
    )

    def mean_variance(pattern, of):
        return np.mean([v for unit, v in of["variance"].items() if re.search(pattern, unit)])

    kernels = {f"{k}×{k}": f"ViT, patch 4, kernel {k}" for k in (3, 5)} | {"global": "ViT, patch 4"}
    for worse, better in (("global", "5×5"), ("global", "3×3"), ("3×3", "5×5")):
        if worse == "global":
            yield Claim(
                f"Park Fig. 7a, {'§1.2' if better == '3×3' else '§2'}",
                f"attention in {better} is better than global (%)",
                {what: n.top1(kernels[what]) for what in (better, worse)},
            )
        yield Ratio(
            "Park Fig. 7a",
            f"{better} fits its training images better than {worse} (loss, here without "
            "augmentation)",
            {what: n.fit(kernels[what]) for what in (worse, better)},
        )
        if better == "5×5":
            fewer = f"5×5: fewer negative eigenvalues than {worse}"
            yield nep("7b", fewer, kernels[worse], kernels[better])
    for worse, better in (("Mixer", "ViT"), ("ViT", "PiT"), ("PiT", "Swin"), ("ViT", "ResNet")):
        yield Ratio(
            "Park Fig. 5a",
            f"the stronger inductive bias fits better: {better} than {worse} (loss, here without "
            "augmentation)",
            {name: n.fit(name) for name in (worse, better)},
        )
        yield Claim(
            "Park Fig. 5a",
            f"… and errs less: {better} than {worse} (%)",
            {name: 100 - n.top1(name) for name in (worse, better)},
        )
    yield Claim(
        "Park App. C",
        "from ViT to ResNet stages bring more than convolutions (points)",
        {
            "PiT less ViT": n.top1("PiT") - n.top1("ViT"),
            "ResNet less PiT": n.top1("ResNet") - n.top1("PiT"),
        },
    )
    yield Ratio(
        "Park Fig. 5b",
        "less data (and batches as much smaller), higher training loss of ViT, augmented",
        {"1/10": n.fit("ViT, augmented, 1/10"), "all": n.fit("ViT, augmented")},
    )
    yield Ratio(
        "Park Fig. C.3",
        "twice the epochs: lower training loss of ViT (without augmentation)",
        {"once": n.fit("ViT"), "twice": n.fit("ViT, twice the epochs")},
    )
    yield Claim(
        "Park Fig. C.3",
        "twice the epochs: lower error of ViT (%)",
        {"once": 100 - n.top1("ViT"), "twice": 100 - n.top1("ViT, twice the epochs")},
    )
    yield Claim(
        "Park Fig. C.3",
        "… and still higher than ResNet's (%)",
        {name: 100 - n.top1(f"{name}, twice the epochs") for name in ("ViT", "ResNet")},
    )
    for where, what, fewer, more in (
        ("C.5", "more heads", "ViT, 1 head", "ViT, 9 heads"),
        ("C.6", "wider heads", "ViT, heads of 8", "ViT"),
    ):
        yield nep(where, f"{what}: fewer negative eigenvalues", fewer, more)
        yield ape(where, f"{what}: smaller positive ones", fewer, more)
    patches = {"4": "ViT, patch 4", "8": "ViT", "16": "ViT, patch 16"}
    yield Claim(
        "Park Fig. C.2a",
        "large patches harm ViT (%)",
        {side: n.top1(name) for side, name in patches.items()},
    )
    yield Ratio(
        "Park Fig. C.2a",
        "… and fit worse (loss, here without augmentation)",
        {side: n.fit(patches[side]) for side in ("16", "8", "4")},
    )
    yield nep("C.2b", "smaller patches: more negative eigenvalues", patches["4"], patches["8"])
    yield ape("C.2b", "… and smaller positive ones", patches["8"], patches["4"])
    for name, early, without in (
        ("ViT", "the first block", "blocks.0.attn"),
        ("PiT", "stage 1", 1),
        ("Swin", "stage 1", 1),
    ):
        yield Claim(
            f"Park Fig. {'8' if name == 'ViT' else 'D.2'}",
            f"attention lowers high frequencies (Δ log amplitude), {name}, but in {early}",
            {"0": n.nothing, "attention": n.change("fourier", name, "attention", (without,))},
        )
        yield Claim(
            f"Park Fig. {'8' if name == 'ViT' else 'D.2'}",
            f"MLPs raise high frequencies, {name}",
            {"MLP": n.change("fourier", name, "mlp"), "0": n.nothing},
        )
    yield Claim(
        "Park Fig. 2a, D.2",
        "convolutions raise high frequencies, ResNet, within a stage",
        {"convolution": n.change("fourier", "ResNet", "conv"), "0": n.nothing},
    )
    for name, but, without in (
        ("ViT", "", ()),
        ("PiT", "", ()),
        ("Swin", ", but in stage 3", (3,)),
    ):
        yield Claim(
            f"Park Fig. {'9' if name == 'ViT' else 'D.1'}",
            f"attention lowers the variance, {name}{but}",
            {"0": n.nothing, "attention": n.change("variance", name, "attention", without)},
        )
    for name, kind, shown in (
        ("ViT", "mlp", "MLPs"),
        ("ResNet, within a stage", "conv", "convolutions"),
    ):
        yield Claim(
            "Park Fig. 9",
            f"{shown} raise the variance, {name}",
            {shown: n.change("variance", name.split(",")[0], kind), "0": n.nothing},
        )
    for name in ("ViT", "ResNet"):
        yield Ratio(
            "Park Fig. 9",
            f"variance grows with depth, {name}",
            {
                what: n.only("variance", name, lambda of: list(of["variance"].values())[i])
                for what, i in (("last", -1), ("first", 1))
            },
        )
    yield Ratio(
        "Park §3, Fig. 9",
        "variance peaks at the end of each stage, ResNet",
        {
            what: n.only("variance", "ResNet", functools.partial(mean_variance, pattern))
            for what, pattern in (("last blocks", r"layer[123]\.1$"), ("next", r"layer[234]\.0$"))
        },
    )
    yield Claim(
        "Park Fig. 2b",
        "noise of high frequencies hurts ResNet more than ViT (points, 0.5π to π)",
        {name: n.vulnerability(name, 0.5, 1) for name in ("ResNet", "ViT")},
    )
    yield Claim(
        "Park Fig. 2b",
        "noise of low frequencies hurts ViT more than ResNet (points, to 0.2π; here of equal "
        "energy, in the paper in proportion to the band's area)",
        {name: n.vulnerability(name, 0, 0.2, "equal") for name in ("ViT", "ResNet")},
    )
    for name, where in (("ResNet", "10a"), ("Swin", "10a"), ("PiT", "D.3")):
        yield Claim(
            f"Park Fig. {where}",
            f"feature maps are more alike within a stage than across its border, {name} (CKA of "
            "a unit and the next)",
            {"within": n.similarity(name, True), "across": n.similarity(name, False)},
        )
    yield Claim(
        "Park Fig. 10b",
        "ResNet needs the first block of a stage more than the last (points)",
        {"first": n.lesion("ResNet", r"\.0$"), "last": n.lesion("ResNet", r"\.1$")},
    )
    yield Claim(
        "Park Fig. 10b",
        "ResNet needs its first stage more than its last (points)",
        {"first": n.lesion("ResNet", "layer1"), "last": n.lesion("ResNet", "layer4")},
    )
    for name, where, first, last in (
        ("PiT", "D.4", r"blocks\.0\.", r"(0\.blocks\.1|1\.blocks\.3|2\.blocks\.1)\."),
        ("Swin, stage 3", "10b", r"5\.0\.", r"5\.2\."),
    ):
        of = functools.partial(n.lesion, name.split(",")[0])
        yield Claim(
            f"Park Fig. {where}",
            f"{name}: the last attention of a stage is needed more than its first (points)",
            {"last": of(last + "attn"), "first": of(first + "attn")},
        )
        yield Claim(
            f"Park Fig. {where}",
            f"{name}: the first MLP of a stage is needed more than its last (points)",
            {"first": of(first + "mlp"), "last": of(last + "mlp")},
        )
    convolutions = "AlterNet, 0 attention blocks"
    others = [("ResNet", "12b"), *((name, "12") for name in ("ViT", "PiT", "Swin"))]
    for other, where in (*others, (convolutions, "12a")):
        yield Claim(
            f"Park Fig. {where}",
            f"AlterNet is better than {other} (%)",
            {name: n.top1(name) for name in ("AlterNet", other)},
        )
    for other in ("ResNet", "ViT"):
        yield Claim(
            "Park Fig. 12b" if other == "ResNet" else "Park Fig. 12",
            f"… and than {other} on corrupted images (%)",
            {name: n.corrupted(name) for name in ("AlterNet", other)},
        )
    blocks = [
        convolutions,
        "AlterNet, 1 attention block",
        "AlterNet, 2 attention blocks",
        "AlterNet",
    ]
    for more, which in ((1, "4"), (3, "2")):
        yield Claim(
            "Park Fig. 12a",
            f"an attention block at the end of stage {which} helps (%)",
            {"with": n.top1(blocks[more]), "without": n.top1(blocks[more - 1])},
        )
    yield Claim(
        "control",
        "… at the end of stage 3, which the paper keeps (%)",
        {"with": n.top1(blocks[2]), "without": n.top1(blocks[1])},
    )
    yield ape("12c", "AlterNet's eigenvalues are smaller than ResNet's", "ResNet", "AlterNet")
    yield nep("12c, §4.1", "… and few of them negative, here fewer than ViT's", "ViT", "AlterNet")
    yield Claim(
        "Park App. B",
        "a blur of 2×2 helps ResNet (%)",
        {"blur": n.top1("ResNet, blur"), "none": n.top1("ResNet")},
    )

    def excess(name):
        return n.only("calibration", name, lambda of: of["confidence"] - of["top1"])

    yield Claim(
        "Park Fig. F.1a",
        "ViT is overconfident, with augmentation underconfident (confidence less accuracy, points)",
        {"plain": excess("ViT"), "0": n.nothing, "augmented": excess("ViT, augmented")},
    )
    yield Claim(
        "Park §F.1",
        "ResNet, too, is overconfident without augmentation (confidence less accuracy, points)",
        {"plain": excess("ResNet"), "0": n.nothing},
    )
    yield nep("F.1b", "augmentation: more negative eigenvalues", "ViT, augmented", "ViT")
    yield ape("F.1b", "… and smaller positive ones", "ViT", "ViT, augmented")


def claims_of_xiao(n):
    """Yields every Claim of Xiao et al., its numbers from n, Numbers."""
    yield Claim(
        "Xiao §6, Fig. 6",
        "ViT with patches is worse than ResNet (%)",
        {name: n.test(name) for name in ("ResNet", "ViT")},
    )
    yield Claim(
        "Xiao §6, Fig. 6",
        "the convolutional stem makes ViT better (%)",
        {name: n.test(name) for name in ("ViT_C", "ViT")},
    )
    yield Claim(
        "Xiao §6, Fig. 6",
        "… and better than a convolutional network (the paper: of middle size, %)",
        {name: n.test(name) for name in ("ViT_C", "ResNet")},
    )
    yield Claim(
        "Xiao Fig. 2",
        "ViT_C lacks less than ViT to its own result of twice the epochs (points)",
        {name: n.test(f"{name}, twice the epochs") - n.test(name) for name in ("ViT", "ViT_C")},
    )

    # None where a run diverged, or the one to compare with
    def lacking(name, place):
        """Points to its own longest training, after the shortest (0), the next (1)."""

        def pick(runs):
            own = sorted(runs, key=lambda run: run["epochs"])[place]
            return None if own["diverged"] or longest(runs)["diverged"] else own["delta"]

        return n.study("length", name, pick)

    def by_sgd(runs):
        return longest([run for run in runs if run["optimizer"] == "sgd"])["delta"]

    def near_the_best(optimizer, runs):
        own = [run["delta"] for run in runs if run["random"] and run["optimizer"] == optimizer]
        return 100 * np.mean([delta is not None and delta <= 4 for delta in own])

    yield Claim(
        "Xiao Fig. 2",
        "ViT_C lacks less after the shortest training (points, tuned)",
        {name: lacking(name, 0) for name in ("ViT", "ViT_C")},
    )
    yield Claim(
        "Xiao §5.1",
        "… by most after the shortest training (points by which ViT_C lacks less, tuned)",
        {
            "shortest": lacking("ViT", 0) - lacking("ViT_C", 0),
            "next": lacking("ViT", 1) - lacking("ViT_C", 1),
        },
    )
    yield Claim(
        "Xiao Fig. 3, §5.2",
        "ViT is worse with SGD than with AdamW (points, tuned)",
        {"AdamW less SGD": n.study("optimizer", "ViT", by_sgd), "0": n.nothing},
    )
    yield Claim(
        "Xiao Fig. 3, §5.2",
        "AdamW or SGD matters less to ViT_C (points apart, tuned)",
        {name: abs(n.study("optimizer", name, by_sgd)) for name in ("ViT", "ViT_C")},
    )
    for optimizer in ("adamw", "sgd"):
        suits = functools.partial(near_the_best, optimizer)
        yield Claim(
            f"Xiao Fig. {4 if optimizer == 'adamw' else 5}, §5.3",
            f"more learning rates and weight decays suit ViT_C, {optimizer} (% of them within 4 "
            "points of the best)",
            {name: n.study("lr-wd", name, suits) for name in ("ViT_C", "ViT")},
        )

    def gained(optimizer):
        suits = functools.partial(near_the_best, optimizer)
        return n.study("lr-wd", "ViT_C", suits) - n.study("lr-wd", "ViT", suits)

    yield Claim(
        "Xiao Fig. 5",
        "… by more with SGD than with AdamW (points of these %)",
        {optimizer: gained(optimizer) for optimizer in ("sgd", "adamw")},
    )


def claims(n):
    """Yields every Claim of the three papers, its numbers from n, Numbers."""
    yield from claims_of_chen(n)
    yield from claims_of_park(n)
    yield from claims_of_xiao(n)


def verdict(values, ratio=False):
    """{what: its numbers over seeds} -> by how much they descend (mean and standard deviation over
    seeds, of logarithms if it is their ratio that counts; of the step that decides, whose mean is
    the least in units of its deviation), and in words."""
    numbers = np.array(list(values.values()))
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = -np.diff(np.log(numbers) if ratio else numbers, axis=0)  # (steps, seeds)
    if not np.isfinite(steps).all():
        return None, "no verdict"
    alone = steps.shape[1] == 1
    means, spreads = steps.mean(axis=1), 0 * steps[:, 0] if alone else steps.std(axis=1, ddof=1)
    least = (means / np.maximum(spreads, 1e-300)).argmin()
    if ratio:
        of_each = " ".join(f"{math.exp(x):.4g}" for x in steps[least])
        margin = f"×{significant(math.exp(means[least]))}, {of_each}"
    else:
        margin = significant(means[least], None if alone else spreads[least])
    word = "does not show" if (means < -spreads).any() else "within the spread"
    word = "shows" if (means > spreads).all() else word
    return margin, word + ", one seed" * alone


def over_seeds(values):
    """Mean ± standard deviation, as text; None if that is not defined."""
    return significant(values.mean(), values.std(ddof=1) if len(values) > 1 else None)


def diverged(values):
    return f"{np.isnan(values).sum()} of {len(values)} diverged"


def judged(n):
    """-> rows of the table of claims, and [(claim, what numbers it lacks)]."""
    rows, lacking = [], []
    for where, claim, values, ratio in claims(n):
        if n.missing:
            what = ", ".join(dict.fromkeys(n.missing))
            lacking.append((f"{where}: {claim}", f"no numbers: {what}"))
            n.missing.clear()
            continue
        margin, word = verdict(values, ratio)
        measured = ", ".join(
            what if what in ("0", "1") else f"{what} {over_seeds(of) or f'({diverged(of)})'}"
            for what, of in values.items()
        )
        rows.append(dict(paper=where, claim=claim, measured=measured, by=margin, verdict=word))
    return rows, lacking


def linear_top1(fraction):
    """Top-1 in percent of ridge regression on the pixels of a fraction of `shapes`, of the test
    split. About 0.3 is the mean of a pixel; the penalty is not tuned."""
    (x, y), (v, t) = (
        data.shapes(start + np.arange(count))
        for start, count in (data.SHAPES_SPLITS[split] for split in ("train", "test"))
    )
    part = data.subset(y, fraction)
    x, y = x[part], y[part]
    x, v = ((images.flatten(1).double() / 255 - 0.3) for images in (x, v))
    targets = F.one_hot(y).double() - F.one_hot(y).double().mean(0)
    weights = torch.linalg.solve(x.T @ x + 3000 * torch.eye(x.shape[1]).double(), x.T @ targets)
    return 100 * ((v @ weights).argmax(1) == t).double().mean().item()


def analyses(names, how):
    """[(title, subcommand, its flags, of which networks, their checkpoint's file)]."""

    def of(*wanted):
        return [name for name in wanted if name in names]

    core = of(*(name + sam for name in FIVE for sam in ("", " + SAM")))
    chen = [name for name in core if name.split(" ")[0] in CHEN]
    plain = of(*FAMILIES)
    other = [name for name in names if "," in name and "+" not in name and "contrast" not in name]
    images, held_out = ["--images", str(how["images"])], ["--images", str(how["held_out"])]
    twice = of(*(f"{name}, twice the epochs" for name in FIVE))
    attacked = [name for name in names if "adversarial" in name]
    decayed = [name for name in names if "decay" in name or name in core and name not in chen]
    spectra = "ViT, 1/10", "ViT, GAP", "ViT, patch 4", "ViT, augmented"
    spectra = [name for name in other if re.match("ViT, .*(head|kernel)", name) or name in spectra]
    whole, bands = [*images, "--params", "whole"], ["--equal-energy", "--frequencies", "0", "0.1"]
    noisy = ["--relative", "--sigma", "0.05", "0.1", "0.2", "--rho", "0.05", "0.1"]
    tested = ["--benchmarks", "val", "--eval-split", "test"]
    hostile = ["--benchmarks", "val", "pgd", *["c-lite"] * how["corruptions"]]
    corrupted = of(*chen, "AlterNet") if how["corruptions"] else []
    kernels = [*images, "--batch", str(min(48, how["images"]))]
    calibrated = of("ViT", "ViT + SAM", "ViT, augmented", "ResNet")
    fitted = list(dict.fromkeys((*chen, *plain, *other)))
    return [
        ("test", "robustness", tested, [*core, *twice], "ckpt.pt"),
        ("robustness, adversarial", "robustness", hostile, attacked, "ckpt.pt"),
        ("robustness", "robustness", [], corrupted, "ckpt.pt"),
        ("hessian, equal loss", "hessian", whole, of(*CHEN), Numbers.at_equal_loss),
        ("hessian, whole", "hessian", whole, decayed, "ckpt.pt"),
        ("hessian", "hessian", images, chen, "ckpt.pt"),
        ("ntk", "ntk", kernels, plain, "ckpt.pt"),
        ("norms", "norms", images, chen, "ckpt.pt"),
        ("sparsity", "sparsity", images, chen, "ckpt.pt"),
        ("flatness", "flatness", [*images, *noisy], chen, "ckpt.pt"),
        ("spectrum", "spectrum", images, [*plain, *spectra], "warmup.pt"),
        *(
            (name, name, held_out, plain, "ckpt.pt")
            for name in ("fourier", "variance", "cka", "lesion")
        ),
        ("noise, equal energy", "noise", [*bands, "0.2"], of("ViT", "ResNet"), "ckpt.pt"),
        ("noise", "noise", [], of(*how["noise_of"]), "ckpt.pt"),
        ("calibration", "calibration", [], calibrated, "ckpt.pt"),
        ("nll", "nll", ["--images", how["fit"]], fitted, "ckpt.pt"),
    ]


def family_rows(n, rho, fraction):
    """What Tables 1 and 2 of Chen et al. have, of each family and of a linear model, trained on a
    fraction of the images."""
    measures = {"top-1 %": n.test, "corrupted %": n.corrupted, "training loss": n.fit}
    measures |= {"λmax": n.eigenvalue}
    rows, ways = [], {"": "", ", SAM": " + SAM", ", twice": ", twice the epochs"}
    for family in FIVE:
        flags = ["--dataset", "shapes", "--model", *FAMILIES[family].split()]
        cost = train.complexity_of(train.settings(flags)[0])
        row = {"network": family, "model": FAMILIES[family], "M multiply-adds": cost["macs"] / 1e6}
        row |= {"parameters": f"{cost['params']:,}", "ρ": rho[family]}
        for (what, measured), (how, way) in itertools.product(measures.items(), ways.items()):
            row[what + how] = over_seeds(measured(family + way))
        rows.append(row)
    n.missing.clear()  # of what no claim is about
    rows.append({"network": "linear model", "top-1 %": f"{linear_top1(fraction):.4g}"})
    return without_empty(rows)


def loss_rows(n):
    """What Tables 1 and 3 of Chen et al., Fig. 2 (right) and B.1 have of each family, without SAM
    and with."""

    def at_equal_loss(name):
        return n.eigenvalue(name, file=n.at_equal_loss) if name in CHEN else n.none(name)

    columns = [name + sam for name in CHEN for sam in ("", " + SAM")]
    measures = {
        "top-1 %": n.test,
        "training loss": n.fit,
        "κ of the NTK, new weights": n.condition,
        "λmax": n.eigenvalue,
        "λmax at equal training loss": at_equal_loss,
        "λmax, embedding": lambda name: n.eigenvalue(name, "embedding"),
        "λmax, MSAs or token MLPs": lambda name: n.eigenvalue(name, "MSAs"),
        "λmax, MLPs or channel MLPs": lambda name: n.eigenvalue(name, "MLPs"),
        "λmax, first block": lambda name: n.eigenvalue(name, "block "),
        "λmax, last block": lambda name: n.eigenvalue(name, "block ", -1),
        "rise of the loss under noise": n.noise,
        "‖w‖": n.weights,
        "‖a₁‖": n.first_activation,
        "active neurons %": n.active,
        "active neurons %, first block": lambda name: n.active(name, 0),
    }
    rows = [
        {"measure": what} | {name: over_seeds(measured(name)) for name in columns}
        for what, measured in measures.items()
    ]
    n.missing.clear()  # of what no claim is about
    return rows


def fraction_runs(n, name, paper):
    """Runs for with_gains: ours, the mean over seeds, or Table 4's."""
    if paper:
        return [
            dict(method=method, fraction=float(Fraction(share)), top1=top1)
            for method, row in paper.items()
            for share, top1 in zip(FRACTIONS, row)
        ]
    ways = name, f"{name} + SAM", f"{name}, augmented", f"{name}, augmented + SAM"
    found = []
    for (method, way), share in itertools.product(zip(METHODS, ways), FRACTIONS):
        base, sam, _ = way.partition(" + SAM")
        of = way if share == "1" else f"{base}, {share}{sam}"
        if (of, n.seeds[0]) in n.runs:
            found.append(
                dict(method=method, fraction=float(Fraction(share)), top1=float(n.top1(of).mean()))
            )
    return found


def beside_core(parts):
    """{part: its trainings} -> the same, each part's below those of core that they vary."""

    def varied(of, own):
        with_sam = any("+ SAM" in other["name"] for other in own)
        families = {other["family"] for other in own}
        return of["family"] in families and (with_sam or "+ SAM" not in of["name"])

    return {
        part: own if part == "core" else [*(of for of in parts["core"] if varied(of, own)), *own]
        for part, own in parts.items()
    }


def draw_trainings(grid, parts, n):
    """A panel for each part: every seed, and mean and deviation over seeds."""
    for axes, (part, rows) in zip(np.ravel(grid), parts.items()):
        names = [row["name"] for row in reversed(rows)]
        for y, name in enumerate(names):
            top1, color = n.top1(name), "C1" if "+ SAM" in name else "C0"
            spread = top1.std(ddof=1) if len(top1) > 1 else None
            axes.errorbar(top1.mean(), y, xerr=spread, fmt="o", color=color, capsize=3)
            axes.plot(top1, [y] * len(top1), "|", color=color)
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(part, fontsize=8)
        axes.tick_params(axis="y", labelsize=6)
        axes.set_xlabel("top-1 (%)")
    for axes in np.ravel(grid)[len(parts) :]:
        axes.axis("off")


def html_table(rows):
    """A table of dicts with the same keys."""
    lines = ["".join(f"<th>{html.escape(column)}" for column in rows[0])]
    for row in rows:
        lines.append("".join(f"<td>{html.escape(four_digits(v))}" for v in row.values()))
    return "<table>\n" + "".join(f"<tr>{line}\n" for line in lines) + "</table>"


def write_report(folder, tables, left_out, n, shown, how):
    """claims.md and index.html: the tables, {title: rows}, what is left out, [(what, why)], the
    figures, as of figure_sections, and in a sentence how it was made. Two figures are its own: all
    trainings, and Chen Fig. 4."""
    parts = group(
        [
            dict(name=name, part=of["part"], family=of["family"])
            for (name, seed), of in n.runs.items()
            if seed == n.seeds[0]
        ],
        "part",
    )
    columns = min(len(parts), 4)
    rows, path = -(-len(parts) // columns), folder / "trainings.png"
    figure(path, lambda grid: draw_trainings(grid, beside_core(parts), n), rows, columns)
    own = {"trainings": "Top-1 of the validation split over seeds, each part below what it varies"}
    if "fractions" in parts:
        paired = {}  # each family, and the paper's of it
        for name, model in zip(CHEN, ("vit_b16", "mixer_b16", "resnet152")):
            for title, table in ((name, None), (f"Chen, {model}", CHEN_4[model])):
                paired[title] = with_gains(fraction_runs(n, name, table), "top1")
        figure(folder / "datasize.png", lambda axes: draw_datasize(axes, paired), columns=2)
        own["datasize"] = "Accuracy and SAM's gain by the number of images (Chen Fig. 4)"
    rules = (
        "A claim shows if each number is below the one before it, as the claim says, on average "
        "over seeds by more than the standard deviation of that over seeds; it does not show if "
        "one is above by as much; else it is within the spread. Of ratios (×) it is their "
        "logarithms. Where nothing is true, of two numbers one claim in nine shows and one in "
        "nine does not with three seeds, with two one in five each. Top-1 is of the validation "
        "split, but of the test split for clean images in Chen Table 2, §3, App. F and SAM's gains "
        "by family, and in Xiao §6 and Fig. 2 where not tuned."
    )
    sections = tables | {"Left out": [{"what": what, "why": why} for what, why in left_out]}
    text = f"# The papers in small\n\n{how}\n\n{rules}\n" + "".join(
        f"\n## {title}\n\n{markdown(rows)}" for title, rows in sections.items()
    )
    write(folder / "claims.md", text.encode())
    body = [
        f"<p>{html.escape(how)}<p>{rules}",
        *(f"<h2>{title}</h2>{html_table(rows)}" for title, rows in sections.items()),
    ]
    body += [
        f'<h2>{name}</h2><p>{html.escape(what)}<p><img src="{name}.png" alt="{name}">'
        for name, what in own.items()
        if (folder / f"{name}.png").exists()
    ]
    page = PAGE.format(title="The papers in small", body="\n".join(body + figure_sections(shown)))
    write(folder / "index.html", page.encode())
    columns = ("claim", "paper", "measured", "verdict")
    print_rows([{column: row[column] for column in columns} for row in tables["Claims"]])
    files = ", ".join(str(folder / name) for name in ("index.html", "claims.md", "reproduce.json"))
    train.say(f"{how}\nresults   {files}")


def reproduce(args, rest):
    """The three papers in small: trains networks of equal cost on `shapes`, with and without SAM
    and in the ways of the papers' other tables, computes what the papers compute from them, and
    says of each claim whether it shows, in OUT/index.html, claims.md and reproduce.json. SAM's ρ is
    the best of three for each family on a held-out fifth of the training images, first seed
    (--quick: 0.03); nothing else is chosen. What it computes is other subcommands', whose files are
    in OUT, too. Returns what the JSON holds under "results"."""
    how = SCALES["quick" if args.quick else "full"]
    need(args, seeds=0)
    seeds = list(dict.fromkeys(args.seeds or how["seeds"]))
    parts = list(dict.fromkeys(("core", *(args.parts or how["parts"]))))
    chosen, origin = train.settings(rest, own_flags("reproduce"))
    refuse(
        [name for name in origin if name not in MAY_BE_GIVEN],
        origin,
        f"is this command's own; of train.py's flags it takes {GIVEN}",
    )
    given = {name: getattr(chosen, name) for name in MAY_BE_GIVEN if origin[name] == "command line"}
    half = chosen.dtype in ("bfloat16", "float16")
    of_trainings = ("compile", "dtype") if half else ("compile",)  # analyses are exact
    exact = as_flags({name: value for name, value in given.items() if name not in of_trainings})
    device, _, _ = train.start_processes(chosen.device, PATIENCE, may_share=True)
    folder = Path(args.out_dir or "out/reproduce")
    results = None if args.dry_run else Results(folder, "reproduce")

    def flags(family, seed, more=""):
        filled = {part: Fraction(part) * Fraction(how["train_fraction"]) for part in FRACTIONS}
        filled |= dict(twice=2 * how["epochs"], each=" ".join(map(str, range(1, how["epochs"]))))
        more = shlex.split(more.format_map(filled))
        model = ["--recipe", "shapes", "--model", *FAMILIES[family].split()]
        own = as_flags({name: how[name] for name in LENGTH} | dict(seed=seed))
        return [*model, *own, "--keep-epochs", "warmup", *more, *rest]

    shown = {}  # as of figure_sections; the first seed, computed last, takes the others' place

    def run(command, out, *argv, title=None):
        """A subcommand, with its files in the folder out, under a title in the page."""
        tell(f"\n{command}")
        parser, began = make_parser(), time.time()
        subparser = parser.commands[command]
        passed = rest if command == "stability" else exact  # that trains
        if "--runs" in subparser._option_string_actions:
            passed = []  # those know no flags of train.py
        argv = [command, "--out-dir", str(out), *argv, *passed]
        own, more = parser.parse_known_args(argv)
        answer = own.function(own, more)
        name = own.study if command == "stability" else command
        shown[title or name] = dict(
            argv=argv,
            answer=None,
            file=name,
            summary=subparser.summary,
            drawn=drawn(out, name, began),
            folder=os.path.relpath(out, folder),
        )
        return answer

    # ---- ρ
    grid = {
        (family, rho): f"rho-{family.lower()}-{rho}"
        for family in FIVE
        for rho in how["rho"]
        if len(how["rho"]) > 1
    }
    searches = {
        name: [*flags(family, seeds[0]), "--hold-out", "1/5", "--sam-rho", rho]
        for (family, rho), name in grid.items()
    }
    ended = conduct("ρ", searches, folder / "runs") if searches and not args.dry_run else {}
    searched = {key: ended[name]["top1"] for key, name in grid.items() if name in ended}

    def held_out(family, rho):
        top1 = searched.get((family, rho))
        return -1 if top1 is None else top1

    rho = {family: max(how["rho"], key=functools.partial(held_out, family)) for family in FIVE}

    # ---- trainings
    jobs, runs = {}, {}
    for (part, families, other, more, with_sam), seed in itertools.product(TRAININGS, seeds):
        for family, sam in itertools.product(families, (False, True)[: 1 + with_sam]):
            name = ", ".join(filter(None, (family, other))) + " + SAM" * sam
            if part in parts:
                slug = re.sub(r"[^\w]+", "-", f"{name} seed{seed}".lower())
                runs[name, seed] = dict(run=slug, part=part, family=family)
                factor = RHO_BESIDE.get(part, {}).get(family, 1)
                own = dict(sam_rho=three_digits(factor * float(rho[family])) if sam else 0)
                jobs[slug] = [*flags(family, seed, more), *as_flags(own)]
    if args.dry_run:
        tell_commands(searches | jobs, folder / "runs")
        if searches:
            tell(
                f"# The first {len(searches)} choose SAM's ρ: in the others {how['rho'][0]}, or a "
                "multiple, stands for it."
            )
        later = ["classifiers on contrastive networks"] * ("contrastive" in parts)
        later += ["Xiao et al.'s studies (stability --dry-run)"] * ("optimizability" in parts)
        if later:
            tell(f"# Then come {' and '.join(later)}, which depend on results.")
        return {}
    ended = conduct("trainings", jobs, folder / "runs")
    heads = {}
    for (name, seed), of in list(runs.items()):
        if of["part"] == "contrastive":
            slug, file = f"{of['run']}-head", str(folder / "runs" / of["run"] / "ckpt.pt")
            runs[f"{name}, head", seed] = of | dict(run=slug)
            if ended[of["run"]]["diverged"]:
                ended[slug] = ended[of["run"]]
                continue
            own = dict(train_only="head", epochs=max(1, how["epochs"] // 4), sam_rho=0)
            own |= dict(reset_head=True, init_from=file)
            heads[slug] = [*flags(of["family"], seed), *as_flags(own)]
    ended |= conduct("classifiers", heads, folder / "runs") if heads else {}
    runs = {key: of | ended[of["run"]] for key, of in runs.items()}
    n, names = Numbers(folder / "runs", seeds, runs), list(dict.fromkeys(name for name, _ in runs))

    # ---- analyses, of the first seed last: its figures stay
    for title, command, argv, wanted, file in analyses(names, how):
        found = n.found.setdefault("test" if title == "test" else command, {})
        out = folder if title == command else folder / re.sub(r"\W+", "-", title)
        for seed in reversed(seeds):
            paths = [
                str(n.path(name, seed, file(n, name, seed) if callable(file) else file))
                for name in wanted
                if runs[name, seed]["top1"] is not None
            ]
            if paths:
                answer = run(command, out, *argv, "--checkpoint", *paths, title=title)
                for network, computed in answer.items():
                    found.setdefault(network, {}).update(computed)
    done = [name for name in names if runs[name, seeds[0]]["top1"] is not None]
    pairs = [name for name in done if name.removesuffix(" + SAM") in CHEN]
    of_park = [name for name in done if name in ("ViT", "PiT", "Swin", "ResNet")]
    plane = ["--images", str(how["images"] // 2), "--points", str(how["points"])]
    regular = [*plane, "--augmented", "--l2", "half-square"]
    for title, command, wanted, argv in (
        ("landscape", "landscape", pairs, plane),
        ("landscape, Park", "landscape", of_park, regular),
        ("attention", "attention", [name for name in pairs if name.startswith("ViT")], []),
        ("curves", "curves", pairs, []),
        ("peak", "peak", [name for name in done if name in FIVE], []),
    ):
        if wanted:
            flag = "--runs" if command in ("curves", "peak") else "--checkpoint"
            out = folder / "park" if title == "landscape, Park" else folder
            paths = [str(n.path(name, seeds[0])) for name in wanted]
            run(command, out, *argv, flag, *paths, title=title)
    for study, seed in itertools.product(OF_XIAO * ("optimizability" in parts), reversed(seeds)):
        argv = ["--study", study, "--models", FAMILIES["ViT"], FAMILIES["ViT_C"]]
        argv += ["--vary", "epochs", *map(str, how["epochs_of"][study])]
        argv += ["--pairs", str(how["pairs"])] * (study == "lr-wd")
        own = {name: how[name] for name in LENGTH if name != "epochs"} | dict(sam_rho=0, seed=seed)
        argv += ["--recipe", "shapes", *as_flags(own)]
        answer = run("stability", folder / f"stability-seed{seed}", *argv)
        n.found.setdefault(study, {})[seed] = answer

    # ---- claims
    rows, lacking = judged(n)
    results.parts = {
        "trainings": {
            of["run"]: of | dict(name=name, seed=seed) for (name, seed), of in runs.items()
        },
        "ρ, top-1 % of held-out training images": {
            f"{family}, {rho}": top1 for (family, rho), top1 in searched.items()
        },
        "claims": {f"{row['paper']}: {row['claim']}": row for row in rows},
    }
    results.settings = {"ρ": rho, "seeds": seeds, "parts": parts} | {
        name: how[name] for name in (*LENGTH, "images", "held_out")
    }
    train.on_main(results.write)
    if train.rank() == 0:
        tables = {
            "Networks": family_rows(n, rho, how["train_fraction"]),
            "Claims": rows,
            "The geometry of the loss (Chen Tables 1, 3)": loss_rows(n),
            "All trainings": [
                {
                    "training": name,
                    "part": runs[name, seeds[0]]["part"],
                    "validation top-1 %": over_seeds(n.top1(name)) or diverged(n.top1(name)),
                }
                for name in names
            ],
        }
        if grid:
            tables["SAM's ρ (Chen Table 9, 10): top-1 % of held-out training images"] = [
                {"network": family} | {rho: searched[family, rho] for rho in how["rho"]}
                for family in FIVE
            ]
        judgements = [row["verdict"].split(",")[0] for row in rows if row["paper"] != "control"]
        counts = Counter(judgements)
        host = machine(device)
        summary = (
            f"Of {len(judgements)} claims {counts['shows']} show, {counts['does not show']} do not "
            f"show, {counts['within the spread']} are within the spread, {counts['no verdict']} "
            f"have no verdict. Trained on shapes, {how['epochs']} "
            f"epochs{' of half the images (too few for a verdict)' * args.quick}, "
            f"seeds {', '.join(map(str, seeds))}; {host['device']}, torch {host['torch']}."
        )
        write_report(folder, tables, lacking + LEFT_OUT, n, shown, summary)
    return results.parts


# --------------------------------------------------------------------------------------------- main


ALL_FLAGS = "Further flags are train.py's, such as --data-dir, --device, --dtype, --weights."


def make_parser():
    parser = train.Parser(
        allow_abbrev=False,
        description=__doc__.split("\n\n")[0],
        epilog=ALL_FLAGS,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    parser.commands = commands.choices
    off = dict(action="store_true")  # unless it is given

    def command(function, summary, of_checkpoints=True, images="", loss=False, further=ALL_FLAGS):
        name = function.__name__.removesuffix("_command")
        parser = commands.add_parser(
            name,
            allow_abbrev=False,
            help=summary,
            description=function.__doc__,
            epilog=further,
        )
        parser.set_defaults(function=function)
        parser.summary = summary

        def add(flag, text="", usual=None, **options):
            """A flag. usual: its default, which decides its type and whether it takes several
            values, and with which its help ends."""
            if usual is not None:
                several = isinstance(usual, (list, tuple))
                values = usual if several else [usual]
                options |= dict(default=usual, type=type(values[0]))
                options |= dict(nargs="+") if several else {}
                text += f" (default: {' '.join(map(four_digits, values))})"
            parser.add_argument(flag, help=text, **options)

        if of_checkpoints:
            what = "of runs of train.py; else --model NAME --init-from FILE"
            add("--checkpoint", what, nargs="+", default=[], metavar="FILE")
        folder = "the folder of the first checkpoint" if of_checkpoints else f"out/{name}"
        folder += "/figures" * (function is all_command)
        add("--out-dir", f"for its files; default: {folder}", default="")
        if images:
            what = "of the training set, class-balanced: a number above 1 or a fraction, 1 is all"
            add("--images", f"{what} ({images})", "1/10", metavar="N")
        if loss:
            what = "sigmoid is sharper than cross-entropy (Chen B.1); whatever the training's was"
            add("--loss", what, "softmax", choices=LOSSES)
        return add

    def add_eigenvalues(k, tolerance):
        add("--k", "eigenvalues", k)
        add("--tolerance", "residual at which they are taken, of their size", tolerance)
        add("--memory", "GiB for graphs of gradients; others are built for each product", 4.0)

    def add_models(usual):
        add(
            "--models",
            "values of --model, in quotes with further flags of train.py if wanted, as 'vit_s16 "
            f"--stem conv'; default: {usual}",
            nargs="+",
            metavar="MODEL",
        )

    add = command(robustness, "accuracy on benchmarks of robustness (Chen Table 2; Park Fig. 12b)")
    add(
        "--benchmarks",
        "val: held-out images; pgd: these under PGD, 10 steps, ε = 2/255 (Chen E.5); real, v2, r, "
        "c: ImageNet-ReaL, -V2, -R, -C or CIFAR-C, looked for in --data-dir and beside it; c-lite: "
        "our own corruptions of val",
        ["val", "c-lite"],
        choices=BENCHMARKS,
    )

    add = command(
        hessian,
        "largest eigenvalues of the loss's Hessian, whole and by blocks; trace, density (Chen "
        "Table 1, 3)",
        images="Chen App. C",
        loss=True,
    )
    add(
        "--params",
        "diagonal blocks: whole, table3 (whole, embedding, attention or token MLPs, MLPs, first, "
        "middle and last block; of a convolutional network: whole, stem, stages), or regular "
        "expressions, searched for in names of parameters",
        ["table3"],
    )
    add(
        "--method",
        "power: the paper's 100 products, for one eigenvalue",
        "lanczos",
        choices=("lanczos", "power"),
    )
    add("--which", "which are the largest", "algebraic", choices=("algebraic", "magnitude"))
    add_eigenvalues(1, 0.001)
    add("--iterations", "products: of power, or at most of lanczos", 100)
    add("--probes", "random vectors for trace and spectral density; 0: neither", 0)
    add("--steps", "products of each of these", 50)
    add("--chunk", "images in one graph; the numbers do not depend on it", 32)

    add = command(
        spectrum,
        "eigenvalues of mini-batches' Hessians: density, NEP, APE (Park Fig. 1b, 4, 6, C.2b, "
        "C.4-C.7)",
        images="Park A.1",
    )
    add_eigenvalues(5, 0.01)
    add("--batch", "images of a mini-batch (A.1)", 16)
    add(
        "--against",
        "NEP and APE by it, and the exponent of APE (Fig. C.5, C.6)",
        choices=("heads", "head_dim"),
    )
    add = command(
        landscape_command,
        "the loss on a plane around the weights (Chen Fig. 1, Park Fig. 1a)",
        images="Chen B.1",
        loss=True,
    )
    add("--augmented", "images augmented and mixed as in training (Park A.2)", **off)
    add(
        "--l2",
        "shown in addition, with the --weight-decay λ of the training and over what decays in it: "
        "half-square: ½ λ Σ w² (our reading of Park A.2); sum-of-norms: λ Σ‖p‖₂ over tensors p "
        "(Park's code)",
        "none",
        choices=L2,
    )
    add("--points", "N × N points (Chen B.1)", 50, metavar="N")
    add("--span", "largest coordinate; 1: as long as the filters", 1.0)
    add(
        "--normalise",
        "filter: Li et al.; park: as the code of Park & Kim does",
        "filter",
        choices=("filter", "park"),
    )
    add("--direction-seed", "of the directions", 0, metavar="SEED")
    add(
        "--clip",
        "draw no loss above this; Park's code: 42 above the lowest",
        type=float,
        metavar="LOSS",
    )

    add = command(
        flatness,
        "loss under Gaussian noise on the weights, worst loss in a ball",
        images="Chen B.1",
        loss=True,
    )
    add("--sigma", "standard deviations of the noise", SIGMAS)
    add(
        "--relative",
        "noise by each filter's length (Chen B.1), as in landscape, none on biases and norms",
        **off,
    )
    add("--draws", "of the noise", 10)
    add("--rho", "radii of the ball", RADII)
    add("--steps", "of ascent in the ball; 1: SAM's", 20)

    add = command(
        ntk_command,
        "condition number of the neural tangent kernel (Chen Table 1)",
        images="Chen App. D",
    )
    add("--batch", "images of a kernel (Chen Appendix D)", 48)
    add("--projections", "directions in the space of logits; 0, or as many: all, exact", 16)
    add("--memory", "limit beside the network", 4.0, metavar="GIB")
    add(
        "--at",
        "the architecture with new weights, as the paper, or the trained one",
        "init",
        choices=("init", "checkpoint"),
    )
    add(
        "--head",
        "last layer: lecun-normal, the network's own, or zero, with which Θ is the features' Gram "
        "matrix (default: lecun; of a checkpoint: own)",
        choices=("lecun", "own", "zero"),
    )
    add(
        "--activation",
        "relu: in place of GELU (Chen Appendix D) (default: relu; of a checkpoint: own)",
        choices=("relu", "own"),
    )
    add(
        "--statistics",
        "of BatchNorm: measured on the batch, or as they are, 0 and 1 at initialisation (default: "
        "batch; of a checkpoint: own)",
        choices=("batch", "own"),
    )

    of_norms = "norms of weights and activations (Chen Table 3)"
    command(norms_command, of_norms, images="as sparsity's")
    command(sparsity_command, "share of active neurons (Chen Fig. 2 right)", images="Chen §4.4")
    add = command(
        compare_command,
        "hessian, ntk, norms and accuracy in one (Chen Table 1, 3)",
        images="as the others",
    )
    add("--benchmarks", "see robustness", ["val", "c-lite"], choices=("val", "c", "c-lite"))

    def of_held_out(function, summary):
        add = command(function, summary)
        what = "of the held-out set, class-balanced: a number above 1, a fraction or all"
        what += " (Park A.1)" * (function in (fourier_command, variance_command))
        add("--images", what, "all", metavar="N")
        return add

    add = of_held_out(fourier_command, "Δ log amplitude of feature maps (Park Fig. 2a, 8, D.2)")
    add(
        "--form",
        "of frequencies shown, diagonal in Fig. D.2; the JSON has both",
        "diagonal",
        choices=("diagonal", "radial"),
    )
    of_held_out(variance_command, "variance of feature maps by depth (Park Fig. 9, D.1)")
    add = of_held_out(cka_command, "similarity of all pairs of feature maps (Park Fig. 10a, D.3)")
    add("--batch", "images of a mini-batch", 256)
    of_held_out(lesion_command, "accuracy without one unit (Park Fig. 10b, D.4)")

    add = command(noise_command, "accuracy under noise of a band of frequencies (Park Fig. 2b)")
    add(
        "--frequencies",
        "middles of the bands, in units of π",
        [i / 10 for i in range(11)],
        metavar="F",
    )
    add("--sigma", "of the noise in all bands together, 1 being from black to white", 0.5)
    add("--window", "width of a band, in π (Fig. 2b)", 0.1)
    add("--equal-energy", "noise of σ in every band, not in proportion to its area", **off)
    add(
        "--form",
        "code: as Park & Kim's code, signs in place of a Gaussian, square bands of the half-width "
        "window / 2",
        "paper",
        choices=("paper", "code"),
    )
    add("--noise-seed", "of the noise", 0, metavar="SEED")

    add = command(
        attention_command,
        "attention maps of the class token, rollout, mean distance (Chen Fig. 3, B.2)",
    )
    add("--image", "images, cropped as in evaluation", nargs="+", default=[], metavar="FILE")
    add(
        "--indices",
        "of held-out images (default, without --image and --distance: 0 1 2 3)",
        type=int,
        nargs="+",
        default=[],
        metavar="I",
    )
    add("--each-head", "also draw each head", **off)
    add("--rollout", "also draw the attention rollout over all layers", **off)
    add(
        "--distance",
        "mean attention distance of each layer and head over N held-out images, class-balanced "
        "(Dosovitskiy et al. Fig. 11: 128); 0: none",
        0,
        metavar="N",
    )

    add = command(calibration_command, "reliability diagram, calibration errors (Park Fig. F.1a)")
    add("--bins", "of the confidence (Park's code: 10)", 10)

    add = command(
        nll_command,
        "NLL of augmented training images and test error (Park Fig. 5, 7a, C.1, C.2a, C.3)",
    )
    against = "; ".join(f"{name}: {text}" for name, text in AGAINST.items())
    add("--against", against, "model", choices=AGAINST)
    add(
        "--images",
        "of the training set, class-balanced: a number or a fraction, 1 is all",
        "1",
        metavar="N",
    )

    def of_runs(function, summary, **options):
        add = command(function, summary, of_checkpoints=False, further=None)
        what = "folders of train.py, or log.jsonl or a checkpoint in them"
        add("--runs", what, nargs="+", metavar="RUN", **options)
        return add

    add = of_runs(
        curves,
        "training error and loss, validation accuracy of runs (Chen Fig. 2)",
        required=True,
    )
    add("--against", "the axis", "step", choices=("step", "epoch"))
    of_runs(
        peak, "error of finished runs against minutes per epoch (Xiao Fig. 6, Table 2)", default=[]
    )

    add = command(
        complexity,
        "parameters, FLOPs, activations (Xiao Table 1, 2; Chen Table 2, 7)",
        of_checkpoints=False,
    )
    add_models("the tables'")
    add = command(
        throughput,
        "images per second, share of the device's peak (Chen Table 2, 7; Xiao §6; Park A.1, App. "
        "E)",
        of_checkpoints=False,
    )
    add_models("Chen Table 2's on CUDA, else small ones at 32×32")
    add("--modes", "what is timed", MODES, choices=MODES)
    add("--compile", "(default: yes on CUDA, else no)", choices=("yes", "no", "both"))
    add("--micro-batches", "passes of a step, each of the batch", 1, metavar="K")
    add("--batch-sizes", "tried in turn", [2**i for i in range(5, 14)], metavar="N")
    add("--seconds", "that each batch size is timed, and each network in a round, about", 1.0)
    add("--rounds", "of all networks", 5)
    add("--devices", "that share an epoch (default: one for each process)", type=int)

    add = command(
        scale,
        "speed to expect of a training on 1 to 1,024 devices, and what bounds it",
        of_checkpoints=False,
    )
    add(
        "--devices",
        "(default: those of 1 4 16 64 256 1024 that share the batch equally)",
        type=int,
        nargs="+",
        metavar="N",
    )
    add(
        "--tflops",
        "TFLOP/s that a device sustains in training: throughput in one process measures it",
        type=float,
        required=True,
    )
    add(
        "--bandwidth",
        "from a device to the next; 25: a network of 200 Gbit/s for each",
        25.0,
        metavar="GB/S",
    )
    add("--cores", "that decode images for a device", 8.0)
    add("--decode", "of a core, as python data.py bench measures", 200.0, metavar="IMAGES/S")
    add("--listing", "of the file system, for all processes together", 1e6, metavar="FILES/S")

    add = command(
        datasize,
        "accuracy and SAM's gain by the number of images (Chen Fig. 4, Table 4)",
        of_checkpoints=False,
    )
    add_models("Table 4's")
    add("--fractions", "of the training images, class-balanced", FRACTIONS, metavar="F")
    add("--methods", "(default: all; of a model of Table 4, its)", nargs="+", choices=METHODS)
    add("--dry-run", "print the trainings and stop", **off)

    add = command(
        stability,
        "studies of many trainings: length, optimizer, lr-wd (Xiao Fig. 2-5), rho (Chen Table "
        "10), grid, doubled (Chen App. E, F)",
        of_checkpoints=False,
    )
    varied = "; ".join(f"{name}: {' × '.join(axes)}" for name, (_, axes) in STUDIES.items())
    add("--study", f"what is varied: {varied}", choices=STUDIES, required=True)
    add_models("the paper's")
    add(
        "--vary",
        "other values than the paper's, as: --vary epochs 3 6 12 --vary optimizer sgd",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
    )
    add(
        "--optimum",
        "length, optimizer, lr-wd: learning rate and weight decay of all models; default: Xiao "
        "Table 4's, where it has some, else a search at the shortest length",
        nargs=3,
        action="append",
        default=[],
        metavar=("OPTIMIZER", "LR", "WD"),
    )
    add("--pairs", "lr-wd: random pairs of each model (default: Xiao §5.3's 64)", type=int)
    add("--dry-run", "print the trainings and stop", **off)

    add = command(transfer, "accuracy after fine-tuning on other data sets (Chen Table 6)")
    add("--datasets", "Table 6's, or others", list(HELD_OUT), choices=data.DATASETS)

    figures = (
        "robustness hessian spectrum landscape flatness ntk norms sparsity fourier variance cka "
        "lesion noise attention calibration nll curves peak"
    ).split()
    add = command(
        all_command, "every figure that checkpoints allow, in one folder with an index.html"
    )
    add("--figures", "only these", figures, choices=figures, metavar="SUBCOMMAND")
    add("--images", "for each that has this flag; default: its own")
    add("--points", "of the landscape; default: its own", type=int)

    add = command(
        reproduce,
        "the three papers in small on the built-in data set: trainings, figures, a verdict on "
        "each claim",
        of_checkpoints=False,
        further=f"Further flags are these of train.py: {GIVEN}.",
    )
    add("--quick", "a part of it, short: 2 epochs of half the images, 2 seeds, ρ = 0.03", **off)
    add(
        "--parts",
        "of the trainings, and what is computed from them, core always (default: all; --quick: "
        + " ".join(SCALES["quick"]["parts"])
        + ")",
        nargs="+",
        choices=PARTS,
    )
    add("--seeds", "(default: 0 1 2; with --quick: 0 1)", nargs="+", type=int)
    add(
        "--dry-run",
        "print the trainings, as if the first ρ were the best, and stop; those of classifiers on "
        "contrastive networks and of optimizability follow from others",
        **off,
    )
    return parser


def main(argv=None):
    """-> exit status, of `train.answer`."""

    def command():
        args, rest = make_parser().parse_known_args(argv)
        args.function(args, rest)

    return train.answer("analyze.py", command, AGAIN)


if __name__ == "__main__":
    sys.exit(main())
