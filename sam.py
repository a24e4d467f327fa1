"""Sharpness-aware minimisation for any model and any optimizer (Foret et al. 2021, arXiv 2010.01412), as
Chen et al. 2021 (arXiv 2106.01548, §4.1, Eq. 1-2) train vision transformers with it: the gradient that
the optimizer sees is taken not at w but at w + ε, the worst point nearby to first order,

    ε = ρ · g / ‖g‖₂        g = ∇L(w), one norm over all parameters that have a gradient.

Choices, after the authors' public code:
- ε is each process's own (the m of m-sharpness is one process's micro-batch); `sync=True` shares it.
- Everything with a gradient enters the norm: biases, norm scales, embeddings. No constant is added to it.
- Clipping, decoupled weight decay and the optimizer act once, on the second gradient, at w. An L2 penalty
  counts for ε only if it is a term of `loss`.
- Both passes draw the same dropout and stochastic-depth masks. BatchNorm keeps the statistics of the first.

    sam = SAM(model, rho=0.2)
    loss = lambda: criterion(model(x), y)
    with sam.perturb(loss) as first:      # first gradient, w + ε; first.loss is the loss at w
        loss().backward()                 # gradient at w + ε, into p.grad as always
    optimizer.step()                      # w is back, bit for bit

`python sam.py` runs a toy (15 s): a small network on noisy labels, with and without SAM.
"""
import argparse
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class First(NamedTuple):
    """What `perturb` knows from the pass at w. Tensors, detached; reading one as a number synchronises."""
    loss: torch.Tensor          # () clean loss: mean over the micro-batches of this process
    grad_norm: torch.Tensor     # () ‖g‖₂ of that loss; with adaptive=True ‖T·g‖₂
    input_grads: tuple          # gradients of the clean loss by `inputs`, from the same backward pass


def random_state(devices):
    """State of the default generators of the CPU and of `devices`. Kept on the host: no synchronisation."""
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
    """‖·‖₂ over all elements of `tensors`, on the first one's device; at least float32, so that half-precision
    gradients do not overflow in the sum."""
    groups = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    norms = []
    for (_, dtype), group in groups.items():  # one kernel for each, not one for each parameter
        wide = torch.promote_types(dtype, torch.float32)
        norms.extend(torch._foreach_norm(group, 2, dtype=wide))
    widest = max((n.dtype for n in norms), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, widest) for n in norms]))


class SAM:
    """Moves a model's weights to w + ε for the length of a `with` block.

    model: the object that is called: bare, compiled, or wrapped in DistributedDataParallel (best with
        broadcast_buffers=False; static_graph=True is refused, because it counts the gradients that the
        first pass takes around it and then lets replicas diverge).
    rho: radius of the neighbourhood, ≥ 0. Paper: 0.02-0.6 (Table 9). With 0 both passes run and the
        gradient is the plain one, bit for bit.
    steps: ascent steps, ≥ 1 (the paper's §6 asks for more than one). Each adds (ρ/steps)·g/‖g‖ at the point
        reached, so that ‖ε‖ ≤ ρ; 1 is Eq. 2.
    adaptive: ASAM, element-wise (Kwon et al. 2021, arXiv 2102.11600, Eq. 8): T = |w| + eta and
        ε = ρ · T²g / ‖T·g‖. Its ρ is of another scale (0.5-2).

    Memory: one copy of the parameters beside plain training's weights and gradients, and where gradients
    accumulate over micro-batches, the running sum in p.grad. Nothing in a step waits for the device.
    """

    def __init__(self, model: nn.Module, rho: float, *, steps: int = 1, adaptive: bool = False,
                 eta: float = 0.01):
        if not rho >= 0:
            raise ValueError(f"rho is {rho}; it is a radius, so at least 0 (the paper's are 0.02 to 0.6)")
        if steps < 1:
            raise ValueError(f"steps is {steps}; SAM takes at least 1 ascent step")
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel) and module.static_graph:
                raise ValueError("DistributedDataParallel(static_graph=True) lets replicas diverge under SAM; "
                                 "build it without static_graph")
        self.model, self.rho, self.steps, self.adaptive, self.eta = model, rho, steps, adaptive, eta

    @contextmanager
    def perturb(self, loss, *, inputs=(), sync: bool = False):
        """Context in which the weights are w + ε; afterwards they are w again, bit for bit, also when the body
        raises, and buffers (BatchNorm's running statistics) are as the first call of `loss` left them.

        loss: called without arguments, returns a scalar that depends on the model. Or a sequence of such, one
            for each micro-batch: ε then belongs to the gradient of their mean. Each is called `steps` times.
        inputs: tensors that require a gradient, whose gradients at w come back in `First.input_grads`.
        sync: average the gradient over the processes of the default group before ε, one all-reduce of the
            parameters' size: SAM on the whole batch instead of each process's own.

        The random state at entry is restored for every pass and for the body, so that masks agree.
        `p.grad` is neither read nor written; no collective runs unless `sync`. With a GradScaler, return the
        scaled loss: ε does not depend on the scale.

        A parameter that the loss does not reach keeps its value. A zero gradient gives ε = 0: the body sees
        the plain gradient. A gradient or norm that is not finite makes ε and so the body's gradient NaN, on
        purpose: what skips a step after an overflow (GradScaler, `found_inf`) then sees it.
        Raises ValueError if the loss reaches no parameter at all.
        """
        losses = [loss] if callable(loss) else list(loss)
        params = [p for p in self.model.parameters() if p.requires_grad]
        buffers, inputs = list(self.model.buffers()), list(inputs)
        random = random_state({p.device for p in params})

        grads, value = self._gradient(losses, params + inputs)
        input_grads = tuple(grads[len(params):])
        reached = [p for p, g in zip(params, grads) if g is not None]
        if not reached:
            raise ValueError("SAM: the loss depends on no parameter of the model that requires a gradient")
        saved_buffers = [b.clone() for b in buffers]
        saved = None
        try:
            for step in range(self.steps):
                if step > 0:
                    set_random_state(random)
                    grads, _ = self._gradient(losses, params)
                grads = [g for p, g in zip(params, grads) if g is not None]
                if sync:
                    grads = average(grads)
                with torch.no_grad():
                    ascent, norm = self._ascent(saved or reached, grads)
                    del grads  # before the copy below: never more than one tensor set beside plain training's
                    if step == 0:
                        first = First(value, norm, input_grads)
                        saved = [p.clone() for p in reached]
                    torch._foreach_add_(reached, ascent)
                    del ascent
                # Inside an autocast region that spans both passes, the cached half-precision copies of the
                # weights would still be those of w, and ε would have no effect.
                torch.clear_autocast_cache()
            set_random_state(random)
            yield first
        finally:
            with torch.no_grad():
                if saved is not None:
                    torch._foreach_copy_(reached, saved)
                if buffers:
                    torch._foreach_copy_(buffers, saved_buffers)
            torch.clear_autocast_cache()

    def _gradient(self, losses, wrt):
        """Gradients of the mean of `losses` by `wrt` (None where there is none), and that mean. By
        torch.autograd.grad, not backward(): p.grad stays, DistributedDataParallel's hooks do not fire."""
        total, value = [None] * len(wrt), 0
        for loss in losses:
            out = loss() / len(losses)
            for i, g in enumerate(torch.autograd.grad(out, wrt, allow_unused=True)):
                if g is not None:
                    total[i] = g if total[i] is None else total[i] + g
            value = value + out.detach()
        return total, value

    def _ascent(self, weights, grads):
        """(ρ/steps)·g/‖g‖, or ASAM's form of it, and the norm. In new tensors: autograd may hand out one piece
        of memory as the gradient of two parameters, so nothing is scaled in place."""
        if self.adaptive:
            scale = torch._foreach_abs(weights)
            torch._foreach_add_(scale, self.eta)
            grads = torch._foreach_mul(grads, scale)
        norm = global_norm(grads)
        factor = torch.where(norm == 0, 0.0, self.rho / self.steps / norm)
        factor = torch.where(norm.isinf(), torch.nan, factor)  # ρ/∞ would be a silent ε = 0
        ascent = torch._foreach_mul(grads, factor)
        if self.adaptive:
            torch._foreach_mul_(ascent, scale)
        return ascent, norm


def average(tensors):
    """Mean over the processes of the default group: one all-reduce of everything together."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    return [f.view_as(t).to(t.dtype) for f, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(
        "Two noisy moons with a fifth of the training labels flipped: accuracy of a small MLP on clean test "
        "points after full-batch Adam, for several rho (0: both passes at w, which is plain Adam)."))
    parser.add_argument("--rho", type=float, nargs="+", default=[0.0, 0.1, 0.3, 1.0], help="radii to try")
    parser.add_argument("--seeds", type=int, default=5, help="runs for each, of other data and weights")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    args = parser.parse_args(argv)

    def moons(n):
        angle, label = torch.pi * torch.rand(n), torch.randint(2, (n,))
        x = torch.stack([angle.cos() + label, (1 - 2 * label) * angle.sin() + 0.5 * label], 1)
        return x + 0.2 * torch.randn(n, 2), label

    print("  rho  train loss  train accuracy  clean test accuracy (mean ± sd over seeds)")
    for rho in args.rho:
        results = []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            (x, y), (x_test, y_test) = moons(200), moons(5000)
            y = torch.where(torch.rand(len(y)) < 0.2, 1 - y, y)
            model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
            optimizer, sam = torch.optim.Adam(model.parameters(), lr=0.01), SAM(model, rho)
            for _ in range(args.steps):
                optimizer.zero_grad()
                with sam.perturb(lambda: nn.functional.cross_entropy(model(x), y)) as first:
                    nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            with torch.no_grad():
                accuracy = [100 * (model(a).argmax(1) == b).double().mean() for a, b in ((x, y), (x_test, y_test))]
            results.append(torch.tensor([first.loss, *accuracy]))
        (loss, train, test), spread = torch.stack(results).mean(0), torch.stack(results).std(0, correction=0)[2]
        print(f"{rho:5.2f}  {loss:10.3f}  {train:12.1f} %  {test:8.1f} ± {spread:.1f} %")


if __name__ == "__main__":
    main()
