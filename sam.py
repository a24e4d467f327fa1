"""Sharpness-aware minimisation for any model and any optimizer (Foret et al. 2021, arXiv
2010.01412), as Chen et al. 2021 (arXiv 2106.01548, §4.1, Eq. 1-2) train vision transformers with
it: the gradient that the optimizer sees is taken not at w but at w + ε, the worst point nearby to
first order,

    ε = ρ · g / ‖g‖₂        g = ∇L(w), one norm over all parameters that have a gradient
                            (SAM._epsilon)

Choices, after the authors' public code:
- ε is each process's own (the m of m-sharpness is its micro-batch); `sync=True` shares it.
- Everything with a gradient enters the norm (biases, norm scales, embeddings), no constant.
- Clipping, decoupled weight decay and the optimizer act once, on the second gradient, at w. An L2
  penalty counts for ε only if it is a term of `loss`.
- Both passes draw the same dropout and stochastic-depth masks. BatchNorm keeps the statistics of
  the first, which are those of w, the weights that are evaluated.

    sam = SAM(model, rho=0.2)
    loss = lambda: criterion(model(x), y)
    with sam.perturb(loss) as first:      # first gradient, w + ε; first.loss is the loss at w
        loss().backward()                 # gradient at w + ε, into p.grad as always
    optimizer.step()                      # w is back, bit for bit

`python sam.py` runs a toy (20 s): a small network on noisy labels, with and without SAM.
`python sam.py --cost 5` measures what a SAM step costs beside a plain one (2 minutes).
"""

import argparse
import signal
import time
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook


class First(NamedTuple):
    """What `perturb` knows from the pass at w, of the loss as it was given (scaled, if a scaler
    scaled it). Tensors, detached; reading one as a number waits for the device."""

    loss: torch.Tensor  # () clean loss: mean over the micro-batches of this process
    grad_norm: torch.Tensor  # () ‖g‖₂ over SAM.params, as ε has it; with adaptive=True ‖T·g‖₂
    input_grads: tuple  # gradients of the clean loss by `inputs`, same pass; None as in grads
    grads: tuple  # with keep_grads, g by SAM.params that require one; None where there is none


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


def global_norm(tensors):
    """‖·‖₂ over all elements of `tensors`, on the first one's device; at least float32, so that
    half-precision gradients do not overflow in the sum. Below 1e-23 float32's squares vanish."""
    groups = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    norms = []
    for (_, dtype), group in groups.items():  # one kernel for each, not one for each parameter
        wide = torch.promote_types(dtype, torch.float32)
        norms.extend(torch._foreach_norm(group, 2, dtype=wide))
    widest = max((n.dtype for n in norms), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, widest) for n in norms]))


def average(tensors):
    """Mean over the processes of the default group: one all-reduce of everything together."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    return [
        f.view_as(t).to(t.dtype) for f, t in zip(flat.split([t.numel() for t in tensors]), tensors)
    ]


@contextmanager
def no_optimizer_step(params):
    """Context in which an optimizer that would step any of these parameters raises RuntimeError."""
    own = {id(p) for p in params}

    def refuse(optimizer, *_):
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                "optimizer.step() inside `with sam.perturb(…)` is lost, as the weights are put "
                "back at the end of the block: call it after the block"
            )

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


class SAM:
    """Moves a model's weights to w + ε for the length of a `with` block.

    model: the object that is called: bare, compiled (by CUDA graphs, mode="reduce-overhead", with
        one loss and no keep_grads only: they reuse the memory of gradients), or wrapped in
        DistributedDataParallel (best with broadcast_buffers=False; static_graph=True is refused,
        because it counts the gradients that the first pass takes around it and then lets replicas
        diverge). Sharded parameters are refused, too.
    rho: radius of the neighbourhood, ≥ 0. Paper: 0.02-0.6 (Table 9). With 0 both passes run and the
        gradient is the plain one, bit for bit.
    steps: ascent steps, ≥ 1 (the paper's §6 asks for more than one). Each adds (ρ/steps)·g/‖g‖ at
        the point reached, so that ‖ε‖ ≤ ρ; 1 is Eq. 2.
    adaptive: ASAM, element-wise (Kwon et al. 2021, arXiv 2102.11600, Eq. 8): T = |w| + eta and
        ε = ρ · T²g / ‖T·g‖. Its ρ is of another scale (0.5-2).
    params: which parameters move, with one norm over their gradients; default all. The pass at w
        then computes gradients of no other weights and goes back no further than to these: for the
        norms alone (Mueller et al. 2023, arXiv 2306.04226) about two thirds of the arithmetic.

    Weights are best float32, with half precision by autocast: in bfloat16 weights ε is mostly less
    than half a rounding step and is lost (ViT-S/16, ρ = 0.2: nine weights of ten do not move).

    Memory: one copy of the parameters beside plain training's weights and gradients, and where
    gradients accumulate over micro-batches, the running sum in p.grad. (With keep_grads a copy
    more; one or two copies more with steps > 1 or adaptive, between the passes, when no activations
    are held.) Nothing in a step waits for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        rho: float,
        *,
        steps: int = 1,
        adaptive: bool = False,
        eta: float = 0.01,
        params=None,
    ):
        if not 0 <= rho < float("inf"):
            raise ValueError(
                f"rho is {rho}; it is a radius, so at least 0 (the paper's are 0.02 to 0.6)"
            )
        if not eta >= 0:
            raise ValueError(f"eta is {eta}; it is added to |w|, so at least 0 (ASAM: 0.01)")
        if steps < 1:
            raise ValueError(f"steps is {steps}; SAM takes at least 1 ascent step")
        if not isinstance(model, nn.Module):
            raise ValueError(f"SAM takes the model that is called, got a {type(model).__name__}")
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel) and module.static_graph:
                raise ValueError(
                    "DistributedDataParallel(static_graph=True) lets replicas diverge under SAM; "
                    "build it without static_graph"
                )
        self.model, self.rho, self.steps, self.adaptive, self.eta = model, rho, steps, adaptive, eta
        params = model.parameters() if params is None else params
        self.params = list({id(p): p for p in params}.values())  # each once
        sharded = any(hasattr(p, "device_mesh") for p in self.params)  # DTensor
        sharded |= any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
        if sharded:
            raise ValueError(
                "SAM: the parameters are shards (FSDP, DTensor), whose gradients the first pass "
                "does not see: use DistributedDataParallel"
            )
        devices = {p.device for p in self.params if isinstance(p, torch.Tensor)}
        if len(devices) > 1:
            raise ValueError(
                f"SAM: the parameters are on {' and '.join(sorted(map(str, devices)))}; they must"
                " be on one device, as their norm is one number"
            )
        if not any(isinstance(p, torch.Tensor) and p.requires_grad for p in self.params):
            raise ValueError(
                f"SAM: none of {len(self.params)} params is a parameter that requires a gradient"
            )

    @contextmanager
    def perturb(self, loss, *, inputs=(), sync: bool = False, keep_grads: bool = False):
        """Context in which the weights are w + ε; afterwards they are w again, bit for bit, also
        when the body raises, and buffers that are updated in place, such as BatchNorm's running
        statistics, are as the first pass left them: statistics at w + ε are not those of w, and
        each image counts once.

        loss: called without arguments, returns a scalar that depends on the model. Or a list or
            tuple of such, one for each micro-batch: ε then belongs to the gradient of their mean.
            Each is called `steps` times.
        inputs: a tensor that requires a gradient, or several, whose gradients at w come back in
            `First.input_grads`.
        sync: average the gradient over the processes of the default group before ε, one all-reduce
            of the parameters' size: SAM on the whole batch instead of each process's own.
        keep_grads: give this process's gradient at w back too (for LookSAM), in `First.grads`.

        The random state at entry is restored for every pass and for the body, so that masks agree.
        `p.grad` is neither read nor written; no collective runs unless `sync`. With a GradScaler,
        return the scaled loss: ε does not depend on the scale.

        A parameter that the loss does not reach keeps its value, and so would one that reentrant
        checkpointing hides from torch.autograd.grad: give it use_reentrant=False. A gradient of
        norm 0 gives ε = 0: the body sees the plain gradient. A gradient or norm that is not finite
        makes ε and so the body's gradient NaN, on purpose: what skips a step after an overflow
        (GradScaler, `found_inf`) then sees it.
        Raises ValueError if the loss is no function, has no gradient or reaches no parameter, and
        RuntimeError if an optimizer steps these parameters in the body: its step would be lost.
        """
        losses = [loss] if callable(loss) else loss
        if not isinstance(losses, (list, tuple)) or not losses:
            raise ValueError(
                f"SAM: the loss is a {type(loss).__name__}; it is a function that computes it, as "
                "lambda: criterion(model(x), y), or a list of such"
            )
        params = [p for p in self.params if p.requires_grad]
        buffers = list(self.model.buffers())
        inputs = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
        if not all(x.requires_grad for x in inputs):
            raise ValueError("SAM: inputs must require a gradient, as x.requires_grad_() does")
        random = random_state({p.device for p in self.model.parameters()})

        grads, value = self._gradient(losses, params + inputs)
        grads, input_grads = grads[: len(params)], tuple(grads[len(params) :])
        kept = tuple(grads) if keep_grads else ()
        if sync:  # processes may reach different parameters, but send the same
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]
        reached = [p for p, g in zip(params, grads) if g is not None]
        grads = [g for g in grads if g is not None]
        if not reached:
            raise ValueError(
                "SAM: the loss depends on no parameter of the model that requires a gradient"
            )
        saved_buffers = [b.clone() for b in buffers]  # after the pass at w: its statistics stay
        saved = None
        try:
            for step in range(self.steps):
                if step > 0:
                    set_random_state(random)
                    grads, _ = self._gradient(losses, reached)
                    grads = [
                        torch.zeros_like(p) if g is None else g for p, g in zip(reached, grads)
                    ]
                if sync:
                    grads = average(grads)
                with torch.no_grad():
                    # ASAM's T is of w, also in later steps, when the parameters are elsewhere
                    epsilon, norm = self._epsilon(saved or reached, grads)
                    del grads  # before the copy below, so that the two never lie side by side
                    if step == 0:
                        first = First(value, norm, input_grads, kept)
                        saved = [p.clone() for p in reached]
                    torch._foreach_add_(reached, epsilon)
                    del epsilon
                # Inside an autocast region that spans both passes, the cached half-precision copies
                # of the weights would still be those of w, and ε would have no effect.
                torch.clear_autocast_cache()
            set_random_state(random)
            with no_optimizer_step(reached):
                yield first
        finally:
            with torch.no_grad():
                if saved is not None:
                    torch._foreach_copy_(reached, saved)
                if buffers:
                    torch._foreach_copy_(buffers, saved_buffers)
            torch.clear_autocast_cache()

    def _gradient(self, losses, wrt):
        """Gradients of the mean of `losses` by `wrt` (None where there is none), and that mean.
        By torch.autograd.grad, not backward(): p.grad stays, DistributedDataParallel's hooks
        do not fire."""
        total, value = [None] * len(wrt), 0
        for loss in losses:
            out = loss()
            if not isinstance(out, torch.Tensor) or not out.requires_grad:
                raise ValueError("SAM: the loss has no gradient: no tensor, or under no_grad")
            out = out / len(losses)
            for i, g in enumerate(torch.autograd.grad(out, wrt, allow_unused=True)):
                if g is not None:
                    total[i] = g if total[i] is None else total[i] + g
            value = value + out.detach()
        return total, value

    def _epsilon(self, weights, grads):
        """ε, or this step's share of it: (ρ/steps)·g/‖g‖, or ASAM's form; and the norm. In new
        tensors: autograd may hand out one piece of memory as the gradient of two parameters, so
        nothing is scaled in place."""
        if self.adaptive:
            scale = torch._foreach_abs(weights)
            torch._foreach_add_(scale, self.eta)
            grads = torch._foreach_mul(grads, scale)
        norm = global_norm(grads)
        factor = torch.where(norm == 0, 0.0, self.rho / self.steps / norm)
        factor = torch.where(norm.isinf(), torch.nan, factor)  # ρ/∞ would be a silent ε = 0
        epsilon = torch._foreach_mul(grads, factor)
        if self.adaptive:
            torch._foreach_mul_(epsilon, scale)
        return epsilon, norm


class LookSAM:
    """SAM's effect in steps without its second pass, after Liu et al. 2022 (arXiv 2203.02714).

    Of a step with SAM it keeps d, the part of SAM's gradient s that is orthogonal to the gradient g
    at w, and in steps without SAM it adds d to g, as long beside g as it was beside s, and at most
    α‖g‖ (with g, s over all of `params`):

        d = s - (s·g / g·g) g          g ← g + min(α, ‖d‖/‖s‖) (‖g‖/‖d‖) d

    Differs from the paper: its Alg. 1 always takes α, and so stretches a short d. On batches of 64
    d is a twentieth of g and mostly noise, which stretched to 0.7 ‖g‖ ruins a training.

        with sam.perturb(loss, keep_grads=True) as first:        every k-th step
            loss().backward()
        look.note(first.grads)
        look.step(True)                                          look.step(False) in the others
        optimizer.step()

    params: those of the SAM, in its order. alpha: ≥ 0, the paper's 0.7. It works on p.grad as the
    optimizer sees it: averaged, unscaled, not yet clipped. Averages g over the processes of the
    default group, so that a step with SAM sends twice plain training's bytes, others as much. A d
    that is not finite is not kept. Memory: two copies of the parameters. Never waits for the
    device. Raises ValueError for gradients that are not those of `params`, and for a step with SAM
    that was not noted: it would learn the whole gradient.
    """

    def __init__(self, params, alpha: float = 0.7):
        if not alpha >= 0:
            raise ValueError(
                f"alpha is {alpha}; it is the length of what is added, beside the gradient's, so "
                "at least 0 (LookSAM: 0.7)"
            )
        self.params, self.alpha = [p for p in params if p.requires_grad], alpha
        if not self.params:
            raise ValueError("LookSAM: there is no parameter that requires a gradient")
        self.noted = False
        self.at_w, self.direction = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.length = global_norm(self.direction)  # min(α, ‖d‖/‖s‖)

    @torch.no_grad()
    def note(self, grads, share: float = 1.0):
        """Adds `share` times the gradient at w of a micro-batch (its share of the step)."""
        if len(grads) != len(self.params):
            raise ValueError(
                f"LookSAM: {len(grads)} gradients for {len(self.params)} parameters; give it "
                "first.grads of perturb(…, keep_grads=True)"
            )
        if not self.noted:  # of a step that was given up, something may be left
            torch._foreach_zero_(self.at_w)
        self.noted = True
        known = [(to, g) for to, g in zip(self.at_w, grads) if g is not None]
        if known:
            torch._foreach_add_(*zip(*known), alpha=share)

    @torch.no_grad()
    def step(self, perturbed: bool):
        """After the backward passes of a step: learns d from it if it was one with SAM, or else
        adds d to p.grad."""
        if perturbed and not self.noted:
            raise ValueError("LookSAM: note(first.grads) belongs before step(True)")
        self.noted = False
        known = [
            (p.grad, g, d)
            for p, g, d in zip(self.params, self.at_w, self.direction)
            if p.grad is not None
        ]
        if not known:
            return
        grads, at_w, direction = (list(column) for column in zip(*known))
        if perturbed:
            if dist.is_initialized():
                at_w = average(at_w)
            # s·g and g·g of g / ‖g‖, which a loss scaler's factor does not make overflow
            length = global_norm(at_w)
            unit = torch._foreach_mul(at_w, torch.where(length == 0, 0.0, 1 / length))
            along = sum((s * u).sum() for s, u in zip(grads, unit))
            torch._foreach_mul_(unit, along)
            new = torch._foreach_sub(grads, unit)
            norm = global_norm(new)
            length = torch.where(norm == 0, 0.0, norm / global_norm(grads)).clamp(max=self.alpha)
            finite = norm.isfinite()
            self.length.copy_(torch.where(finite, length, self.length))
            torch._foreach_copy_(
                direction, [torch.where(finite, n, d) for n, d in zip(new, direction)]
            )
            torch._foreach_zero_(self.at_w)
        else:
            norm = global_norm(direction)
            factor = torch.where(norm == 0, 0.0, self.length * global_norm(grads) / norm)
            torch._foreach_add_(grads, torch._foreach_mul(direction, factor))

    def state_dict(self):
        return dict(direction=self.direction, length=self.length)

    def load_state_dict(self, state):
        torch._foreach_copy_(self.direction, state["direction"])
        self.length.copy_(state["length"])


def toy(rho, seed, steps):
    """Two noisy moons, a fifth of the training labels flipped: (training loss, training accuracy,
    accuracy on clean test points) of a small MLP after full-batch Adam with SAM."""
    torch.manual_seed(seed)

    def moons(n):
        angle, label = torch.pi * torch.rand(n), torch.randint(2, (n,))
        x = torch.stack([angle.cos() + label, (1 - 2 * label) * angle.sin() + 0.5 * label], 1)
        return x + 0.2 * torch.randn(n, 2), label

    (x, y), (x_test, y_test) = moons(200), moons(5000)
    y = torch.where(torch.rand(len(y)) < 0.2, 1 - y, y)
    model = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    optimizer, sam = torch.optim.Adam(model.parameters(), lr=0.01), SAM(model, rho)

    def loss():
        return F.cross_entropy(model(x), y)

    for _ in range(steps):
        optimizer.zero_grad()
        with sam.perturb(loss) as first:
            loss().backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = [(model(a).argmax(1) == b).float().mean() for a, b in ((x, y), (x_test, y_test))]
    return torch.stack([first.loss, *accuracy])


def cost(rounds, batch):
    """Seconds of a plain step, a SAM step, and SAM's own arithmetic (perturb with its two passes
    taken out), interleaved, for four blocks of ViT-S/16: (rounds, 3)."""
    block = nn.TransformerEncoderLayer(
        384, 6, 1536, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    model = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sam, x = SAM(model, 0.05), torch.randn(batch, 197, 384)
    zero = [torch.randn_like(p) for p in model.parameters()]

    def loss():
        return model(x).square().mean()

    def linear():  # its gradient costs next to nothing
        return sum((p * z).sum() for p, z in zip(model.parameters(), zero))

    def step(perturbation):
        start = time.perf_counter()
        optimizer.zero_grad()
        with perturbation:
            loss().backward()
        optimizer.step()
        return time.perf_counter() - start

    def arithmetic():
        start = time.perf_counter()
        linear().backward()
        passes = time.perf_counter() - start
        start = time.perf_counter()
        with sam.perturb(linear):
            pass
        return time.perf_counter() - start - passes

    times = [
        (step(nullcontext()), step(sam.perturb(loss)), arithmetic()) for _ in range(rounds + 1)
    ]
    return torch.tensor(times[1:])  # the first round pays for memory


def main(argv=None):
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=(
            "A small MLP on noisy labels, with SAM for several rho (0: both passes at w, so plain "
            "Adam); or, with --cost, what a SAM step costs beside a plain one."
        ),
    )
    add = parser.add_argument
    add("--rho", type=float, nargs="+", default=[0.0, 0.1, 0.3], help="radii to try")
    add("--seeds", type=int, default=5, help="runs for each, of other data and weights")
    add("--steps", type=int, default=300, help="optimizer steps")
    add("--cost", type=int, default=0, metavar="ROUNDS", help="measure the cost instead")
    add("--batch", type=int, default=32, help="images of 197 tokens, for --cost")
    parser.error = lambda message: parser.exit(2, f"sam.py: {message}; see --help\n")
    args = parser.parse_args(argv)
    if not all(0 <= rho < float("inf") for rho in args.rho) or args.cost < 0:
        parser.error("--rho and --cost must be at least 0, and finite")
    if min(args.seeds, args.steps, args.batch) < 1:
        parser.error("--seeds, --steps and --batch must be at least 1")
    for name in ("rho", "seeds", "steps") if args.cost else ("batch",):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is {'not ' if args.cost else ''}for --cost")

    if args.cost:
        times = cost(args.cost, args.batch)
        plain, perturbed, own = times.median(0).values.tolist()
        ratios = times[:, 1] / times[:, 0]
        print(
            f"plain step {plain:.3f} s, SAM step {perturbed:.3f} s (medians of {args.cost}), ratio "
            f"{ratios.median():.3f} ({ratios.min():.3f} to {ratios.max():.3f})"
        )
        print(
            f"SAM's arithmetic (norm, copy, move, restore) {own:.4f} s, {100 * own / plain:.1f} % "
            "of a plain step; the optimizer runs once in both"
        )
        return
    print("  rho  train loss  train accuracy  clean test accuracy (mean ± sd over seeds)")
    for rho in args.rho:
        results = torch.stack([toy(rho, seed, args.steps) for seed in range(args.seeds)])
        loss, train, test = results.mean(0).tolist()
        print(
            f"{rho:5.2f}  {loss:10.3f}  {100 * train:12.1f} %  {100 * test:8.1f} ± "
            f"{100 * results.std(0, correction=0)[2]:.1f} %"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head ends it, as it ends cat
    main()
