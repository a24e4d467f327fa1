"""Attacks on images within an ε-ball, and training against them, as Chen et al. 2021 (arXiv
2106.01548, §5.4, Appendix E.5, Table 5) use them beside sharpness-aware minimisation:

    δ = argmax over ‖δ‖ ≤ ε, x + δ in [0, 1], of L(w, x + δ, y)

`fgsm` is one step of the sign of the gradient (Goodfellow et al. 2015), `pgd` several, each
projected back to the ball (Madry et al. 2018). Normalisation of images belongs to the model.
Fast adversarial training (Wong et al. 2020) steps once from a random start by 1.25·ε:

    start = uniform_start(x, eps).requires_grad_()
    grad, = torch.autograd.grad(criterion(model(start), y), start)
    criterion(model(ascend(start, grad, x, eps, 1.25 * eps)), y).backward()

With SAM it is Eq. 5, min_w max_ε max_δ L(w + ε, x + δ, y), and costs no pass more: both gradients
come from one at (w, start), which is that of BatchNorm's running statistics, too. To first order
the loss is a sum of a term in ε and one in δ, so neither maximum comes first:

    with sam.perturb(lambda: criterion(model(start), y), inputs=[start]) as first:
        adversarial = ascend(start, first.input_grads[0], x, eps, 1.25 * eps)
        criterion(model(adversarial), y).backward()        # the gradient at w + ε, x + δ

    python adversarial.py                     a toy: what adversarial training unlearns (5 s)
    python adversarial.py --cost 5            training steps: plain, adversarial, SAM, both (1 min)
    python adversarial.py --checkpoint RUN/ckpt.pt --attack pgd --steps 10 --eps 2/255
The last two need the other files; torchrun spreads the last.
"""

import argparse
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

NORMS = ("linf", "l2")


def fraction(text):
    """A number as 0.0078, 2/255 or 0.25/255; for argparse."""
    top, slash, bottom = text.partition("/")
    try:
        if "/" in bottom:
            raise ValueError("two strokes")
        return float(Fraction(top) / Fraction(bottom if slash else "1"))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number; give one as 0.0078 or 2/255"
        ) from None


# ----------------------------------------------------------------------------------------- the ball


def lengths(delta):
    """ℓ2 norm of each image, shaped to divide a batch (B, C, H, W)."""
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def project(points, x, eps, norm="linf"):
    """The points (B, C, H, W), brought into the ball of radius eps around x, of the same shape, and
    into [0, 1]. Off the ball by no more than the rounding of x + δ, in float32 6e-8; with eps = 0
    it is x, bit for bit. That x is in [0, 1] is not checked, which would wait for the device:
    normalised images are cut. Raises ValueError for another norm."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it is one of {' '.join(NORMS)}")
    delta = points - x  # then in place: an attack's own cost is these passes over memory
    if norm == "linf":
        delta.clamp_(-eps, eps)
    else:
        length = lengths(delta)
        delta *= torch.where(length > eps, eps / length, 1)
    return delta.add_(x).clamp_(0, 1)


def uniform_start(x, eps, norm="linf", generator=None):
    """A point drawn uniformly from each image's ball, then clipped to [0, 1]; of x's shape and
    type. generator: on x's device."""
    draw = dict(generator=generator, dtype=x.dtype, device=x.device)
    if norm == "linf":
        return project(x + eps * (2 * torch.rand(x.shape, **draw) - 1), x, eps, norm)
    direction = torch.randn(x.shape, **draw)
    radius = torch.rand(len(x), 1, 1, 1, **draw) ** (1 / max(x.shape[1:].numel(), 1))
    return project(x + eps * radius * direction / lengths(direction), x, eps, norm)


def ascend(points, grad, x, eps, step_size, norm="linf"):
    """One step from the points along the loss's gradient there, all (B, C, H, W), back into the
    ball around x: by step_size in every pixel, or of length step_size ("l2"; where the gradient is
    0, none). The gradient's scale does not matter. The result has no history."""
    with torch.no_grad():
        if norm == "linf":
            direction = grad.sign()
        else:
            # divided by its largest number, so that no square overflows or vanishes
            largest = grad.abs().amax((1, 2, 3), keepdim=True)
            direction = grad / torch.where(largest == 0, 1, largest)
            direction /= torch.where(largest == 0, 1, lengths(direction))
        return project(direction.mul_(step_size).add_(points), x, eps, norm)


# ---------------------------------------------------------------------------------------- the model


def random_state(devices):
    """State of the default generators of the CPU and of `devices`. Kept on the host:
    no synchronisation."""
    state = {torch.device("cpu"): torch.get_rng_state()}
    for device in devices:
        if device.type == "mps":
            state[device] = torch.mps.get_rng_state()
        elif device.type != "cpu":
            state[device] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state):
    for device, value in state.items():
        if device.type == "cpu":
            torch.set_rng_state(value)
        elif device.type == "mps":
            torch.mps.set_rng_state(value)
        else:
            torch.get_device_module(device).set_rng_state(value, device)


@contextmanager
def full_precision(device):
    """Arithmetic in the tensors' own type: no autocast, on CUDA no TF32; oneDNN's setting on the
    CPU is left as it is."""
    cudnn = torch.backends.cudnn
    kinds = torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for kind, precision in zip(kinds, before):
            kind.fp32_precision = precision


def unwrapped(model):
    """What DistributedDataParallel wraps, compiled or not; another model as it is."""
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    return inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else model


@contextmanager
def held_still(model, device):
    """The model in evaluation mode, its parameters without gradients; afterwards its modes, what
    requires a gradient and the random state are as before, also when the body raises."""
    modes = [(module, module.training) for module in model.modules()]
    learnt = [p for p in model.parameters() if p.requires_grad]
    random = random_state({device})
    try:
        model.eval()
        for p in learnt:
            p.requires_grad_(False)
        with torch.inference_mode(False), full_precision(device):
            yield
    finally:
        for p in learnt:
            p.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
        set_random_state(random)


# ------------------------------------------------------------------------------------------ attacks


def cross_entropy(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


def check(model, x, y, eps, step_size, steps, norm, start):
    """What cannot be right, in one line each. Waits for the device once, and once more for
    start."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the model is a {type(model).__name__}; an attack takes a torch.nn.Module"
        )
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        raise ValueError(
            f"images are a {type(x).__name__}, labels a {type(y).__name__}; an attack takes tensors"
        )
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it is one of {' '.join(NORMS)}")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"images are {x.dtype} {tuple(x.shape)}; an attack takes floating-point (B, C, H, W) "
            "in [0, 1], as x.float() / 255 makes of bytes"
        )
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(
            f"labels are {y.dtype} {tuple(y.shape)} for {len(x)} images; an attack takes their "
            f"classes as integers, ({len(x)},)"
        )
    if not (0 <= eps <= 1 or norm == "l2" and 0 <= eps < float("inf")):
        raise ValueError(
            f"eps is {eps}; pixels are in [0, 1], so it is from 0 to 1, such as 2/255 (for l2: at "
            "least 0)"
        )
    if not 0 <= step_size < float("inf"):
        raise ValueError(
            f"step_size is {step_size}; it is a length in pixels of [0, 1], at least 0, such as "
            "0.25/255"
        )
    kind = torch.finfo(x.dtype)
    if kind.bits == 16 and 0 < step_size < kind.eps / 2:
        raise ValueError(
            f"step_size is {step_size:.3g}, too small for images of {x.dtype}: attack float32"
        )
    if steps < 0:
        raise ValueError(f"steps is {steps}; it is at least 0")
    if start is not None and not isinstance(start, torch.Tensor):
        raise ValueError(f"start is a {type(start).__name__}; it is a tensor like the images")
    if start is not None and (start.shape != x.shape or not start.isfinite().all()):
        raise ValueError(
            f"start is {tuple(start.shape)} for images {tuple(x.shape)}, or not finite; it is a "
            "point for each image"
        )
    if len(x):
        low, high = torch.stack(x.aminmax()).tolist()
        if not (low >= 0 and high <= 1):  # NaN is in no range
            raise ValueError(
                f"images reach from {low:.4g} to {high:.4g}; an attack takes [0, 1]: put mean and "
                "standard deviation into the model"
            )


def check_labels(logits, y):
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if isinstance(shape, str) or len(shape) != 2 or len(logits) != len(y):
        raise ValueError(
            f"the model returns {shape} for {len(y)} images; an attack needs logits (B, classes)"
        )
    low, high = torch.stack(y.aminmax()).tolist()
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels reach from {low} to {high}; the model has {logits.shape[1]} classes, 0 to "
            f"{logits.shape[1] - 1}"
        )


def pgd(
    model,
    x,
    y,
    eps=2 / 255,
    step_size=None,
    steps=10,
    random_start=True,
    *,
    norm="linf",
    targeted=False,
    loss=cross_entropy,
    start=None,
    generator=None,
    early_stop=False,
    trace=None,
):
    """Projected gradient ascent on the loss (Madry et al. 2018, §2.1): x_{k+1} = P(x_k + step_size
    · sign ∂L/∂x_k). Defaults: Chen et al. E.5. Returns the last iterate, (B, C, H, W), detached.

    model: images -> logits (B, classes), normalisation included. Attacked in evaluation mode, as it
        is used: a training mode is warned of. Afterwards its modes, gradients, BatchNorm statistics
        and the random state are as before. No gradient is computed for parameters. Wrapped in
        DistributedDataParallel, what is wrapped is attacked: nothing is communicated.
    x, y: images in [0, 1] of a floating type, and their classes (B,). The ball and the steps are in
        pixels; computed in x's type, without autocast and TF32.
    eps: radius, 0 to 1; norm "l2": of the whole image, ≥ 0. With 0 the result is x, bit for bit.
    step_size: default eps/8, which is E.5's 0.25/255 of 2/255: 10 such steps cross the ball's
        radius.
    random_start: from a uniform point of the ball. As the random state is put back, equal calls
        start at equal points; for others give `generator`, on x's device, or
        `start`, the points themselves.
    targeted: y are classes to reach; their loss descends.
    loss: (logits, y) -> one for each image.
    early_stop: an image stays where it is once it is misclassified (targeted: as y), and costs no
        more passes. Waits for the device in each step.
    trace: a list that gets (losses (B,), predicted classes (B,)) of iterates 0 to steps; one more
        forward pass. A stopped image keeps its last.

    Raises ValueError for what cannot be attacked, by its type, shape, range or labels, and
    FloatingPointError if a loss or gradient is not finite.
    """
    step_size = eps / 8 if step_size is None else step_size
    check(model, x, y, eps, step_size, steps, norm, start)
    model = unwrapped(model)
    if any(module.training for module in model.modules()):
        warnings.warn(
            "the model is in training mode: it is attacked in evaluation mode and put back",
            stacklevel=2,
        )
    with held_still(model, x.device):
        x, y = x.detach().clone(), y.long().clone()
        points = x.clone()
        if start is not None:
            points = project(start.detach().to(x), x, eps, norm)
        elif random_start and len(x):
            points = uniform_start(x, eps, norm, generator)
        # What still moves, and where in the batch it belongs. The loss of a target descends.
        now, x_now, y_now, going = points.clone(), x, y, torch.arange(len(x), device=x.device)
        step_size = -step_size if targeted else step_size
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        losses, predicted = torch.zeros(len(x), dtype=x.dtype, device=x.device), y.clone()
        for step in range(steps + (trace is not None)):
            if len(now):
                now.requires_grad_(step < steps)
                with torch.set_grad_enabled(step < steps):
                    logits = model(now)
                    if step == 0:
                        check_labels(logits, y)
                    each = loss(logits, y_now)
                    if each.shape != y_now.shape:
                        raise ValueError(
                            f"the loss is {tuple(each.shape)} for {len(y_now)} images; it is one "
                            "number for each, as reduction='none' gives"
                        )
                losses[going] = each.detach().to(losses)
                predicted[going] = logits.argmax(1).to(y)
                broken[going] |= ~each.detach().isfinite()
            if trace is not None:
                trace.append((losses.clone(), predicted.clone()))
            if len(now) and step < steps:
                (grad,) = torch.autograd.grad(each.sum(), now)
                broken[going] |= ~grad.flatten(1).abs().amax(1).isfinite()
                now = now.detach()
                if early_stop:
                    unbeaten = (predicted[going] == y_now) != targeted
                    points[going] = now
                    now, x_now, y_now, grad, going = (
                        t[unbeaten] for t in (now, x_now, y_now, grad, going)
                    )
                now = ascend(now, grad, x_now, eps, step_size, norm)
        points[going] = now.detach()
    if broken.any():
        raise FloatingPointError(
            f"the loss of {int(broken.sum())} of {len(x)} images, or its gradient, is not finite: "
            "an attack finds no direction there; look at the model's output for these images"
        )
    return points


def fgsm(model, x, y, eps=2 / 255, step_size=None, random_start=True, **more):
    """One step by step_size, projected back: 1.25·eps after a random start (Wong et al. 2020, whose
    training Chen et al. E.5 use), eps without one. All else as in `pgd`."""
    step_size = (1.25 if random_start else 1) * eps if step_size is None else step_size
    return pgd(model, x, y, eps, step_size, 1, random_start, **more)


# --------------------------------------------------------------------------------------- evaluation


def keyed_start(x, positions, eps, norm, seed):
    """`uniform_start` for each image by itself, from its position in the data set and the seed: the
    same in any batch and on any number of devices of a kind. Restart r of seed s is restart 0 of
    seed s + r: for independent attacks take seeds further apart than restarts."""
    generator, points = torch.Generator(x.device), [x[:0]]
    for image, position in zip(x, positions):
        generator.manual_seed((seed * 1_000_003 + int(position) * 2_654_435_761) % 2**32)
        points.append(uniform_start(image[None], eps, norm, generator))
    return torch.cat(points)


def robustness(
    model,
    batches,
    *,
    eps=2 / 255,
    step_size=None,
    steps=10,
    random_start=True,
    norm="linf",
    targeted=False,
    early_stop=False,
    restarts=1,
    seed=0,
    source=None,
    examples=None,
):
    """Accuracy under `pgd`, over batches of (x, y, positions in the data set), as sums over all
    processes that `summary` turns into percent: dict of images; clean, right without attack;
    robust, last and loss, lists for iterates 0 to steps.

    An image is robust after k steps if it is classified rightly without attack and at every iterate
    up to k of every restart: whatever the attack has found counts. So early_stop, which spares what
    is beaten, changes nothing in it (with several restarts, nothing in its value after all steps).
    If a loss or gradient is not finite, robust, last and loss are NaN.
    last: by the k-th iterates alone, as most published numbers are. loss: one list for each
    restart. Both are left out with early_stop, where iterates stand still, or with `source`, a
    network whose gradients are followed instead of the model's own (then robust has one value).
    targeted: at a class that the position chooses among the wrong ones. examples: a list that gets
    (x, y, attacked x, classes predicted before and after), a tuple for each batch. Raises
    ValueError as `pgd`.
    """
    if restarts < 1:
        raise ValueError(f"restarts is {restarts}; it is at least 1")
    model = unwrapped(model)  # whose forward pass sends buffers, and processes differ in batches
    device = next(model.parameters()).device
    exact = dict(dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    counts = torch.zeros(2, **exact)
    curves = torch.zeros(2 + restarts, 1 if source else steps + 1, **exact)
    with held_still(model, device):
        for x, y, positions in batches:
            logits = model(x)
            check_labels(logits, y)
            right, aim = logits.argmax(1) == y, y
            if targeted:
                if logits.shape[1] == 1:
                    raise ValueError("targeted: the model has one class, there is no other")
                offset = torch.as_tensor(positions, device=y.device) % (logits.shape[1] - 1)
                aim = (y + 1 + offset) % logits.shape[1]
            robust = right.repeat(curves.shape[1], 1)
            last, shown = torch.ones_like(robust), x.clone()
            for restart in range(restarts):
                going = robust[-1] if early_stop else torch.ones_like(right)
                going = going.nonzero().flatten()
                if len(going) == 0:
                    break
                start = keyed_start(x, positions, eps, norm, seed + restart) if random_start else x
                trace = None if source else []
                try:
                    shown[going] = pgd(
                        source or model,
                        x[going],
                        aim[going],
                        eps,
                        step_size,
                        steps,
                        norm=norm,
                        targeted=targeted,
                        start=start[going],
                        early_stop=early_stop,
                        trace=trace,
                    )
                except FloatingPointError:  # on this process perhaps alone: all hear of it below
                    curves += torch.nan
                    break
                if source:
                    trace = [(torch.zeros(len(going), **exact), model(shown[going]).argmax(1))]
                losses, predicted = map(torch.stack, zip(*trace))
                holds = predicted == y[going]
                robust[:, going] &= holds.to(torch.uint8).cumprod(0).bool()
                last[:, going] &= holds
                curves[2 + restart] += losses.sum(1).to(curves.device)
            if examples is not None:
                examples.append((x, y, shown, logits.argmax(1), model(shown).argmax(1)))
            # moved, then widened: a copy from MPS that does both is an error, or writes nothing
            counts += torch.stack([torch.ones_like(y).sum(), right.sum()]).to(counts.device)
            curves[:2] += torch.stack([robust.sum(1), last.sum(1)]).to(curves.device)
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(curves)
    sums = dict(images=counts[0].item(), clean=counts[1].item(), robust=curves[0].tolist())
    if not early_stop and source is None:
        sums |= dict(last=curves[1].tolist(), loss=curves[2:].tolist())
    return sums


def summary(parts):
    """Results of `robustness` on parts of a data set -> dict of images; clean, robust and last in
    percent; loss, its mean."""
    n = sum(part["images"] for part in parts)

    def mean(values, scale):
        if isinstance(values[0], list):
            return [mean(some, scale) for some in zip(*values)]
        return scale * sum(values) / n

    scales = dict(clean=100, robust=100, last=100, loss=1)
    return dict(images=round(n)) | {
        name: mean([part[name] for part in parts], scales[name])
        for name in parts[0]
        if name != "images"
    }


def verdicts(by_eps, by_step, images):
    """Whether an attack is as strong as its gradients can be (Athalye et al. 2018, §3.1: signs of
    masked ones): [(sentence, bool)]. by_eps: [(eps, accuracy in percent)], rising, the last so
    large that no image is left; by_step: accuracies after 0, 1, … steps; a rise by two images, or
    half a percent, is chance."""
    chance = max(200 / images, 0.5)
    falls = lambda values: all(b <= min(values[: i + 1]) + chance for i, b in enumerate(values[1:]))
    accuracies = [accuracy for _, accuracy in by_eps]
    return [
        ("accuracy falls as ε grows", falls(accuracies)),
        ("accuracy falls from step to step", falls(by_step)),
        ("accuracy is about 0 at the largest ε", accuracies[-1] <= 1),
    ]


# --------------------------------------------------------------------------------------------- toy


def toy(steps=300):
    """What adversarial training unlearns, after Tsipras et al. 2019 (arXiv 1805.12152): two classes
    of 8×8 images, of which one pixel tells the class loudly, but 10 % of the time wrongly, and the
    63 others each tell it too faintly to survive ε = 8/255. Prints the accuracies of a small
    network trained on clean images and by fast adversarial training."""
    eps = 8 / 255

    def images(n):
        y = torch.randint(2, (n,))
        sign = (2 * y - 1).view(n, 1, 1, 1)
        x = 0.5 + 0.015 * sign + 0.06 * torch.randn(n, 1, 8, 8)
        loud = torch.where(torch.rand(n) < 0.9, 1, -1) * sign.flatten()
        x[:, 0, 0, 0] = 0.5 + 0.25 * loud
        return x.clamp(0, 1), y

    print(f"{'':22}clean %   FGSM %   PGD-10 %   at ε = {eps:.4f}")
    for name, adversarially in (("trained on clean", False), ("adversarially trained", True)):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(steps):
            x, y = images(256)
            if adversarially:
                start = uniform_start(x, eps).requires_grad_()
                (grad,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
                x = ascend(start, grad, x, eps, 1.25 * eps)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
        x, y = images(5000)
        attacked = (x, fgsm(model, x, y, eps), pgd(model, x, y, eps))
        clean, one, ten = ((model(a).argmax(1) == y).float().mean().item() for a in attacked)
        print(f"{name:22}{100 * clean:7.1f}{100 * one:9.1f}{100 * ten:11.1f}")
    return 0


def cost(rounds, batch):
    """Seconds of a training step of four blocks of ViT-S/16: plain, adversarial, SAM, and both, in
    turns: (rounds, 4)."""
    import vit
    from sam import SAM

    torch.manual_seed(0)
    model = vit.build("vit_s16", depth=4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sam, eps = SAM(model, 0.05), 2 / 255
    x, y = torch.rand(batch, 3, 224, 224), torch.randint(1000, (batch,))

    def loss(images):
        return F.cross_entropy(model(images), y)

    def plain():
        loss(x).backward()

    def adversarially():
        start = uniform_start(x, eps).requires_grad_()
        (grad,) = torch.autograd.grad(loss(start), start)
        loss(ascend(start, grad, x, eps, 1.25 * eps)).backward()

    def sharpness_aware():
        with sam.perturb(lambda: loss(x)):
            loss(x).backward()

    def both():
        start = uniform_start(x, eps).requires_grad_()
        with sam.perturb(lambda: loss(start), inputs=[start]) as first:
            loss(ascend(start, first.input_grads[0], x, eps, 1.25 * eps)).backward()

    def seconds(gradient):
        before = time.perf_counter()
        optimizer.zero_grad()
        gradient()
        optimizer.step()
        return time.perf_counter() - before

    steps = plain, adversarially, sharpness_aware, both
    times = [[seconds(step) for step in steps] for _ in range(rounds + 1)]
    return torch.tensor(times[1:])  # the first round pays for memory


# --------------------------------------------------------------------------- attack on a checkpoint

CHUNK = 2048  # images between two writings of the results


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"adversarial.py: {message}\n")  # one line, without the list of all flags


def make_parser():
    parser = Parser(
        allow_abbrev=False,
        description=(
            "Attacks a trained network: accuracy under FGSM or PGD, and whether the attack is as "
            "strong as it should be. Without flags, a toy."
        ),
        epilog=(
            "Further flags are train.py's, such as --data-dir, --device, --dtype, --weights; "
            "--model NAME --init-from FILE instead of --checkpoint is a foreign network."
        ),
    )
    add = parser.add_argument
    add("--checkpoint", default="", metavar="FILE", help="of a run of train.py")
    add("--attack", choices=("pgd", "fgsm"), default="pgd", help="fgsm: one step (default: pgd)")
    add(
        "--eps",
        type=fraction,
        help=(
            "radius in pixels of [0, 1], as 2/255 (default: that, Chen E.5); for l2, which has no "
            "default, a length over all of them, as 0.5"
        ),
    )
    add("--steps", type=int, help="of pgd (default: 10, E.5)")
    add(
        "--step-size",
        type=fraction,
        help=(
            "default: pgd: eps/8, which is E.5's 0.25/255; fgsm: 1.25·eps, without a random start "
            "eps"
        ),
    )
    add("--norm", choices=NORMS, default="linf", help="of the ball (default: linf, E.5)")
    add(
        "--random-start",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="from a uniform point of the ball",
    )
    add("--restarts", type=int, default=1, help="an image withstands all of them or counts as lost")
    add("--targeted", action="store_true", help="at another class, a fixed one for each image")
    add(
        "--early-stop",
        action="store_true",
        help=(
            "spares images that are misclassified already: the same accuracy, sooner, without "
            "loss curves"
        ),
    )
    add("--attack-seed", type=int, default=0, help="of the random starts")
    add("--images", type=int, default=0, help="only so many, spread evenly (0: all)")
    add(
        "--batch-size",
        type=int,
        default=0,
        help=(
            "images per pass and device; 0: on CUDA as many as fit in its memory, elsewhere 128 "
            "(default: 0)"
        ),
    )
    add(
        "--strength-images",
        type=int,
        default=256,
        help=(
            "for the check of the attack's strength, over ε and 5 times as many steps (0: no "
            "check; default: 256)"
        ),
    )
    add(
        "--transfer-from",
        default="",
        metavar="FILE",
        help=(
            "also attack those images through this checkpoint's gradients: a white box must be "
            "stronger, or gradients are masked"
        ),
    )
    add(
        "--save-images",
        type=int,
        nargs="?",
        const=8,
        default=0,
        metavar="N",
        help="draw N images (8), the perturbation magnified, the attacked images and predictions",
    )
    add(
        "--out-dir",
        default="",
        help="for adversarial.json and the figures; default: the checkpoint's folder",
    )
    add(
        "--cost",
        type=int,
        default=0,
        metavar="ROUNDS",
        help=(
            "instead of all this, measure what adversarial training and SAM cost, on batches of "
            "16 images"
        ),
    )
    return parser


def check_flags(args, error):
    if args.attack == "fgsm" and args.steps not in (None, 1):
        raise error("--attack fgsm takes one step; --attack pgd takes --steps")
    args.steps = args.steps if args.steps is not None else 10 if args.attack == "pgd" else 1
    for name, low in dict(
        steps=1, restarts=1, batch_size=0, images=0, strength_images=0, save_images=0, attack_seed=0
    ).items():
        if getattr(args, name) < low:
            raise error(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {low}"
            )
    if args.norm == "l2" and args.eps is None:
        raise error("--norm l2 needs --eps, a length over all pixels of [0, 1], such as 0.5")
    args.eps = 2 / 255 if args.eps is None else args.eps
    if args.norm == "linf" and not 0 < args.eps <= 1 or args.norm == "l2" and not args.eps > 0:
        raise error(
            f"--eps is {args.eps:g}; pixels are in [0, 1], so it is above 0 and at most 1, such as "
            "2/255 (for l2: above 0)"
        )
    if args.step_size is not None and not args.step_size > 0:
        raise error(f"--step-size is {args.step_size:g}; it must be above 0, such as 0.25/255")
    if args.restarts > 1 and not args.random_start:
        raise error("--restarts needs a random start: without one, all are the same")


def spread(n, wanted):
    """Positions of `wanted` of n images, evenly."""
    return [i * n // wanted for i in range(wanted)] if 0 < wanted < n else list(range(n))


def draw_losses(axes, curves):
    for restart, losses in enumerate(curves, 1):
        axes.plot(range(len(losses)), losses, label=f"restart {restart}")
    axes.set_xlabel("step of the attack")
    axes.set_ylabel("mean cross-entropy (nats)")
    if len(curves) > 1:
        axes.legend()


def draw_images(examples, classes):
    """A picture of three rows: images, their perturbations magnified so that the largest is black
    or white, attacked images; above what they are, below what they are taken for, in red if
    wrong."""
    from PIL import Image, ImageDraw

    x, y, attacked, before, after = (torch.cat(some).cpu() for some in zip(*examples))
    side, line, gap = max(128, x.shape[-1]), 14, 6
    size = gap + len(x) * (side + gap), line + 3 * (side + line + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    factor = 0.5 / (attacked - x).abs().amax().clamp(min=1e-30).item()
    for row, images in enumerate((x, 0.5 + factor * (attacked - x), attacked)):
        for column, image in enumerate(images):
            left, top = gap + column * (side + gap), line + row * (side + line + gap)
            pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top))
            taken = (before, None, after)[row]
            caption = f"difference x {factor:.0f}" if row == 1 else classes[taken[column]]
            wrong = row != 1 and taken[column] != y[column]
            draw.text((left, top + side), caption, fill="red" if wrong else "black")
            if row == 0:
                draw.text((left, 0), str(classes[y[column]]), fill="black")
    return sheet


def attack_checkpoint(args, rest):
    """Prints accuracies by step and the check of the attack's strength; writes them, after each
    CHUNK of images, to OUT/adversarial.json, from which the same command goes on."""
    import analyze
    import train

    check_flags(args, train.UserError)
    if args.checkpoint and any(word.split("=")[0] == "--init-from" for word in rest):
        raise train.UserError("give --checkpoint or --init-from, not both")

    def chosen(file):
        flags = make_parser()._option_string_actions
        settings, origin = analyze.networks([file] if file else [], rest, flags)[0]
        if origin["adv_eps"] == "command line":
            raise train.UserError("--adv-eps is of training; the attack's is --eps")
        if settings.dtype in ("bfloat16", "float16"):
            if origin["dtype"] == "command line":
                raise train.UserError(
                    f"--dtype {settings.dtype}: attacks are computed in float32 or float64, where "
                    "rounding hides no gradient"
                )
            settings.dtype = "float32"
        return settings, origin

    settings, origin = chosen(args.checkpoint)
    other = chosen(args.transfer_from) if args.transfer_from else None
    device, world, on_machine = train.start_processes(settings.device, may_share=True)
    say = train.say if train.rank() == 0 else lambda text="": None
    results = analyze.Results(args.out_dir or Path(settings.init_from).parent, "adversarial")
    analyze.tell_unread(origin, "adversarial")
    name, results.settings[name] = analyze.label(settings)
    settings.content = results.settings[name]["content"]
    done = results.parts.setdefault(name, {})
    model, dataset = analyze.network_and_images(settings, origin, device)
    source = None
    if other:
        source, images = analyze.network_and_images(*other, device)
        if images.classes != dataset.classes or other[0].image_size != settings.image_size:
            raise train.UserError(
                f"--transfer-from {args.transfer_from}: it has other classes, or another image "
                f"size, than {settings.init_from}"
            )
    if args.targeted and len(dataset.classes) == 1:
        raise train.UserError(f"--targeted: {settings.init_from} has one class, there is no other")
    workers = train.worker_count(settings, dataset, on_machine)

    steps = args.steps
    ratio = 1 / 8 if args.attack == "pgd" else 1.25 if args.random_start else 1
    how = dict(
        eps=args.eps,
        step_size=args.step_size or ratio * args.eps,
        steps=steps,
        random_start=args.random_start,
        norm=args.norm,
        targeted=args.targeted,
        early_stop=args.early_stop,
        restarts=args.restarts,
        seed=args.attack_seed,
    )

    def attack(what, positions, through=None, **changes):
        """Numbers of these images, chunk by chunk, or from the file what it has of them."""
        now = how | changes
        key = f"{what}: {len(positions)} images, " + ", ".join(
            f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in now.items()
        )
        chunks = [positions[i : i + CHUNK] for i in range(0, len(positions), CHUNK)]
        with train.progress(0 if key in done else len(positions), what) as bar:
            for i, chunk in enumerate(() if key in done else chunks):
                if f"{key}, chunk {i}" in done:
                    bar.update(len(chunk))
                    continue
                sums = train.under_attack(
                    model,
                    dataset,
                    settings.image_size,
                    device,
                    chunk,
                    workers,
                    batch_size=args.batch_size,
                    bar=bar,
                    source=through,
                    **now,
                )
                if sums["robust"][-1] != sums["robust"][-1]:
                    raise train.UserError(
                        f"{settings.init_from}: its loss or its gradient by the image is not "
                        "finite for some images: nothing to attack"
                    )
                results.put(name, f"{key}, chunk {i}", sums)
        if key not in done:
            parts = [done.pop(f"{key}, chunk {i}") for i in range(len(chunks))]
            results.put(name, key, summary(parts) | dict(attack=now))
        return done[key]

    def shown(radius):
        small = args.norm == "linf" and radius < 0.25
        return f"{255 * radius:.4g}/255" if small else f"{radius:.4g}"

    everything, few = (spread(len(dataset), n) for n in (args.images, args.strength_images))
    result = attack(args.attack, everything)
    say(f"{settings.init_from}, {settings.dataset}, {settings.eval_split} split")
    say(f"clean     {result['clean']:.2f} % of {result['images']:,} images")
    say(
        f"{args.attack:10}ε = {shown(args.eps)} ({args.norm}), step {shown(how['step_size'])}, "
        f"{steps} step{'s' * (steps > 1)}, {args.restarts} restart{'s' * (args.restarts > 1)}"
        + ", targeted"
        * args.targeted
    )
    say(
        f"{'steps':>6}{'accuracy %':>12}"
        + f"{'by that iterate alone %':>25}{'loss':>9}" * ("last" in result)
    )
    for step in sorted({0, 1, 2, 5, 10, 20, 50, 100, steps} & set(range(steps + 1))):
        say(
            f"{step:6}{result['robust'][step]:12.2f}"
            + (
                f"{result['last'][step]:25.2f}{result['loss'][0][step]:9.4f}"
                if "last" in result
                else ""
            )
        )

    strong = dict(steps=steps, step_size=how["step_size"])
    if args.attack == "fgsm":
        strong = dict(steps=10, step_size=args.eps / 8)
    if args.strength_images:
        largest = 0.5 if args.norm == "linf" else 0.5 * (3 * settings.image_size**2) ** 0.5
        by_eps = []
        for eps in [*(r * args.eps for r in (0.5, 1, 2, 4) if r * args.eps < largest), largest]:
            scaled = strong | dict(step_size=strong["step_size"] * eps / args.eps)
            found = attack("pgd", few, eps=eps, early_stop=True, **scaled)
            by_eps.append((eps, found["robust"][-1]))
        longer = attack("pgd", few, early_stop=False, **strong | dict(steps=5 * strong["steps"]))
        curve = longer["last"]
        say(
            f"strength  of pgd with {strong['steps']} steps on {longer['images']:,} images: "
            + ", ".join(f"{accuracy:.1f} % at ε = {shown(eps)}" for eps, accuracy in by_eps)
            + f"; with {len(curve) - 1} steps {curve[-1]:.1f} %"
        )
        doubt = "NO: do not trust these numbers, gradients may be masked or steps too few"
        for sentence, holds in verdicts(by_eps, curve, longer["images"]):
            say(f"          {sentence}: {'yes' if holds else doubt}")
    if source is not None:
        some = few if args.strength_images else everything
        strong["early_stop"] = False  # stopping tells what the source takes for wrong
        black, white = (
            attack(f"pgd through {of}", some, through, **strong)["robust"][-1]
            for of, through in ((analyze.label(other[0])[0], source), (name, model))
        )
        found = "no difference" if white == black else "NO: its gradients may be masked"
        if white < black:
            found = "its own are the stronger attack, as it should be"
        say(
            f"transfer  of {len(some):,} images, by the gradients of {args.transfer_from} "
            f"{black:.2f} %, by its own {white:.2f} %: {found}"
        )
    examples = []
    if args.save_images:
        drawn = [p for p in spread(len(dataset), args.save_images) for _ in range(world)]
        train.under_attack(  # each process attacks all of them
            model,
            dataset,
            settings.image_size,
            device,
            drawn,
            workers,
            batch_size=args.batch_size,
            **how | dict(early_stop=False, restarts=1, examples=examples),
        )
    if train.rank() == 0:
        if "loss" in result:
            analyze.figure(
                results.path.with_suffix(".png"), lambda axes: draw_losses(axes, result["loss"])
            )
        if args.save_images:
            path = results.path.with_name("adversarial_images.png")
            draw_images(examples, dataset.classes).save(path)
            say(f"images    {path}")
        say(f"results   {results.path}")


def main(argv=None):
    """-> exit status: 0, 2 for what the user has to set right, 130 for Ctrl-C."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    given = sys.argv[1:] if argv is None else argv
    needed = [] if not given else ["sam", "vit"] if args.cost else ["analyze", "train"]
    missing = [f"{name}.py" for name in needed if find_spec(name) is None]
    if missing:
        parser.error(f"this needs {' and '.join(missing)} of its repository beside it")
    if args.cost:
        if args.cost < 0 or any(w.startswith("--") and w.split("=")[0] != "--cost" for w in given):
            parser.error("--cost ROUNDS stands alone, and ROUNDS is at least 1")
        times = cost(args.cost, 16)
        for name, ratio in zip(
            ("adversarial", "SAM", "adversarial + SAM"), (times[:, 1:] / times[:, :1]).T
        ):
            print(
                f"a step of {name:18} takes {ratio.median():.2f} ({ratio.min():.2f} to "
                f"{ratio.max():.2f}) times a plain one of {times[:, 0].median():.2f} s"
            )
        return 0
    if not (args.checkpoint or any(word.split("=")[0] == "--init-from" for word in rest)):
        if given:
            parser.error(
                "an attack needs --checkpoint RUN/ckpt.pt, or --model NAME --init-from FILE; "
                "--cost ROUNDS stands alone, and without any flag a toy runs"
            )
        return toy()
    import analyze
    import train

    return train.answer("adversarial.py", lambda: attack_checkpoint(args, rest), analyze.AGAIN)


if __name__ == "__main__":
    if len(sys.argv) == 1:  # an attack answers for itself
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head ends it, as it ends cat
    sys.exit(main())
