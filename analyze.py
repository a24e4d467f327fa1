"""Tables and figures of the three papers from trained networks: a function and a subcommand each.

    python analyze.py robustness --checkpoint RUN/ckpt.pt --data-dir IMAGENET \\
        --benchmarks val real v2 r c        Chen et al. (arXiv 2106.01548) Table 2, 5
    python analyze.py robustness --checkpoint A/ckpt.pt B/ckpt.pt      several; Park & Kim
        (2202.06709) Fig. 12b, E.1; by default on corruptions of our own, without a download
    torchrun --nproc_per_node=8 analyze.py …      on many devices: the same numbers

A subcommand prints a table, writes OUT/SUBCOMMAND.json (numbers, settings, versions, command line)
after each finished part, so that a killed one goes on where it was when it is started again, and,
where matplotlib is installed, OUT/SUBCOMMAND.png. What it does not know of a command line belongs
to train.py: --data-dir, --device, --dtype, --weights, --mean, …; a foreign network is
--model NAME --init-from FILE.
"""
import functools
import hashlib
import json
import math
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from tqdm import tqdm

import data
import train
from train import UserError

BENCHMARKS = ("val", "real", "v2", "r", "c", "c-lite")


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


def networks(checkpoints, rest):
    """(settings, {flag: who set it}) of each checkpoint, or of --model with --init-from."""
    files = [["--init-from", f"{path}/ckpt.pt" if os.path.isdir(path) else path]
             for path in checkpoints] or [[]]
    chosen = [train.settings(["--eval-only", *rest, *file]) for file in files]
    for name in ("download", "dry_run", "list_models", "list_recipes", "resume"):
        if chosen[0][1][name] == "command line":
            raise UserError(f"--{name.replace('_', '-')} is for train.py; an analysis goes on by "
                            "itself when it is started again")
    return chosen


def label(settings):
    """A network's name among results: its file, and a mark of that and of what decides numbers."""
    decides = {name: getattr(settings, name) for name in DECIDES}
    decides |= dict(data_dir=os.path.abspath(settings.data_dir), file=settings.init_from,
                    content=train.on_main(lambda: fingerprint(settings.init_from)))
    mark = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    return f"{settings.init_from} ({mark})", decides


def figure(path, draw):
    """Draws with matplotlib if it is installed, and says so if not: the numbers are in the JSON."""
    try:
        import matplotlib
    except ImportError:
        train.say(f"no {path.name}: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    axes = pyplot.figure(figsize=(5, 4), layout="constrained").subplots()
    draw(axes)
    axes.figure.savefig(path, dpi=150)
    pyplot.close(axes.figure)
    train.say(f"figure    {path}")


# --------------------------------------------------------------------------------------- robustness

def robustness_parts(benchmark, args, classes):
    """The parts of a benchmark and what makes the data set of each: [(name, function)].
    DataError if its files are not there."""
    common = dict(data_dir=args.data_dir, image_size=args.image_size, classes=classes)

    @functools.cache
    def held_out():
        return data.load(args.dataset, args.eval_split, short_side=args.eval_short_side, **common)

    if benchmark in ("val", "c-lite"):
        held_out()  # if it is missing, now
    if benchmark == "val":
        return [("val", held_out)]
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
    chosen, summaries, told = networks(args.checkpoint, rest), {}, set()
    first = chosen[0][0]
    device, world, on_machine = train.start_processes(first.device)
    tell = train.say if train.rank() == 0 else lambda text="": None
    results = Results(args.out_dir or Path(first.init_from).parent, "robustness")
    for settings, origin in chosen:
        name, results_of = label(settings)
        results.settings[name] = results_of
        saved = {} if settings.init_from.endswith(".npz") else train.read_checkpoint(
            settings.init_from)
        classes, todo = saved.get("classes"), []
        try:
            if classes is None:
                classes = data.load(settings.dataset, settings.eval_split, image_size=224,
                                    data_dir=settings.data_dir).classes
        except data.DataError as error:
            raise UserError(f"{error}; of another project's file, only these tell the class "
                            "names") from None
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
            workers = settings.workers
            if workers is None:
                workers = 0 if isinstance(dataset, data.InMemory) else max(1, min(
                    8, data.usable_cores() // on_machine))
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
        print_robustness(summaries)
        if any("val" in s and ("c" in s or "c-lite" in s) for s in summaries.values()):
            figure(results.path.with_suffix(".png"), lambda axes: draw_robustness(axes, summaries))
        train.say(f"results   {results.path}")
    return results.parts


def print_robustness(summaries):
    columns = [name for name in (*BENCHMARKS, "mCE") if any(name in s for s in summaries.values())]
    widest = max(map(len, summaries))
    train.say(f"{'top-1 %':{widest}}" + "".join(f"{name:>9}" for name in columns))
    for name, summary in summaries.items():
        train.say(f"{name:{widest}}" + "".join(
            f"{summary[c]:9.2f}" if c in summary else f"{'-':>9}" for c in columns))
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


# --------------------------------------------------------------------------------------------- main

def make_parser():
    parser = train.Parser(allow_abbrev=False, description=__doc__.split("\n\n")[0], epilog=(
        "Further flags are train.py's, such as --data-dir, --device, --dtype, --weights."))
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")

    def command(function, summary):
        parser = commands.add_parser(function.__name__, allow_abbrev=False, help=summary,
                                     description=function.__doc__, epilog=(
            "Further flags are train.py's, such as --data-dir, --device, --dtype, --weights."))
        parser.set_defaults(function=function)
        parser.add_argument("--checkpoint", nargs="+", default=[], metavar="FILE",
                            help="of runs of train.py; else --model NAME --init-from FILE")
        parser.add_argument("--out-dir", default="", help="for its files; default: the folder of "
                            "the first checkpoint")
        return parser.add_argument

    add = command(robustness, "accuracy on benchmarks of robustness (Chen Table 2; Park Fig. 12b)")
    add("--benchmarks", nargs="+", choices=BENCHMARKS, default=["val", "c-lite"], help="val: "
        "held-out images; real, v2, r, c: ImageNet-ReaL, -V2, -R, -C or CIFAR-C, looked for in "
        "--data-dir and beside it; c-lite: our own corruptions of val (default: val c-lite)")
    return parser


def main(argv=None):
    """-> exit status: 0, 2 for what the user has to set right, 130 for Ctrl-C."""
    owns_group = not dist.is_initialized()
    try:
        args, rest = make_parser().parse_known_args(argv)
        foreign = any(word.split("=")[0] == "--init-from" for word in rest)
        if bool(args.checkpoint) == foreign:
            raise UserError(f"{args.command} needs either --checkpoint RUN/ckpt.pt or --model NAME "
                            "--init-from FILE")
        args.function(args, rest)
        status = 0
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"analyze.py: {error}", file=sys.stderr)
        status = 2
    except data.DataError as error:  # met while reading images, perhaps by this process only
        print(f"analyze.py: {error}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(2)  # the others wait in a collective that will not come
        status = 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is not finished", file=sys.stderr)
        status = 128 + signal.SIGINT
    if owns_group and dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
