"""ResNets of three papers: Chen et al. (arXiv 2106.01548, Table 2) train ResNet-50…152 and their x2
widths with SAM, Xiao et al. (2106.14881, Table 2) compare with ResNet-50…200, Park & Kim
(2202.06709, Fig. 5, 12, Appendix E) use ResNet, ResNeXt-50 32x4d (1611.05431) and, under AlterNet,
pre-activation ResNets (1603.05027), with 3×3 stems for CIFAR.

- A bottleneck's stride is on its 3×3 convolution, as in torchvision, pycls and Park & Kim's code.
- x2 doubles every width, stem and head included: Table 2's 98, 173 and 236 M parameters, cut off as
  its 25, 44 and 60 are; torchvision's wide_resnet50_2 doubles the 3×3 alone and has 69 M.
- Pre-activation: no norm in the stem, a shortcut that changes shape is a bare 1×1 convolution of
  the activated input, norm and ReLU before pooling.
- blur=True ends each stage with a 2×2 box blur without parameters, the spatial smoothing that Park
  & Kim hold attention to be a trainable form of (§1.1, Appendix B; Fig. 3a). The map keeps its
  size: the last row and column are repeated.
- init="torchvision": convolutions N(0, 2/fan_out); "torch": torch's default, as in Park & Kim's
  code and here in preresnet. zero_init: the last scale of each branch starts at 0 (1706.02677), as
  in SAM's authors' code and Chen et al.'s recipes in train.py; of pre-activation the last
  convolution, as a scale of 0 before it stops gradients. The classifier is torch's (not pycls').
State-dict keys are torchvision's; pre-activation ResNets have a final "norm" and no stem "bn1".

    python resnet.py                             parameters, MACs, activations of the variants (6 s)
    python resnet.py resnet50 --image-size 32    of one, with the CIFAR stem: up to 64 pixels
    maps = {"layer3.5": None}                    # intermediates are asked for by name
    logits = build("resnet50")(images, out=maps)

B batch, C channels, H W map."""

import argparse
import difflib
import inspect
import re
import signal

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

RESNET = {  # (pre)resnet{key}(x2); He et al. (1512.03385), Table 1; 200: 1603.05027
    "18": dict(depth=(2, 2, 2, 2), bottleneck=False),
    "34": dict(depth=(3, 4, 6, 3), bottleneck=False),
    "50": dict(depth=(3, 4, 6, 3)),
    "101": dict(depth=(3, 4, 23, 3)),
    "152": dict(depth=(3, 8, 36, 3)),
    "200": dict(depth=(3, 24, 36, 3)),
}
NAMES = [
    *(f"resnet{size}" for size in RESNET),
    *(f"resnet{size}x2" for size in ("50", "101", "152")),
    "resnext50_32x4d",
    *(f"preresnet{size}" for size in RESNET if size != "200"),
]


def record(out, name, value):
    """Return value; keep it in the dict out if the caller asked for it by the key name."""
    if out is not None and name in out:
        out[name] = value
    return value


def check_names(intermediates, out, skip):
    """ValueError if out asks for what is no intermediate, or skip names what is no unit."""
    if out is not None and not isinstance(out, dict):
        raise ValueError(f"out is a {type(out).__name__}; it is a dict such as {{'stem': None}}")
    kinds = ("attention", "token mlp", "mlp", "conv")
    units = [name for name, (kind, _) in intermediates.items() if kind in kinds]
    for name in out or ():
        if name not in intermediates:
            raise ValueError(
                f"unknown intermediate {name!r}; this model has {', '.join(intermediates)}"
            )
    if skip is not None and skip not in units:
        raise ValueError(f"unknown unit {skip!r} to skip; this model has {', '.join(units)}")


class DropPath(nn.Module):
    """Stochastic depth (1603.09382): skips the branch for some of the samples."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * (x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep) / keep)


def projection(dim, wider, stride, pre_activation):
    """What a shortcut needs where a block changes the shape, else None."""
    if stride == 1 and dim == wider:
        return None
    norm = [] if pre_activation else [nn.BatchNorm2d(wider)]
    return nn.Sequential(nn.Conv2d(dim, wider, 1, stride=stride, bias=False), *norm)


def spatial(conv, x, skip):
    """A 3×3 convolution of x, or, to leave it out, the identity: of stride s, every s-th pixel."""
    return x[..., :: conv.stride[0], :: conv.stride[1]] if skip else conv(x)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside the shortcut. skip leaves the second out."""

    expansion = 1

    def __init__(self, dim, planes, stride, *, pre_activation, drop_path):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim if pre_activation else planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = projection(dim, planes, stride, pre_activation)
        self.drop_path = DropPath(drop_path)
        self.pre_activation = pre_activation

    def forward(self, x, skip=False):
        if self.pre_activation:
            a = self.bn1(x).relu_()
            y = self.bn2(self.conv1(a)).relu_()
            y = self.drop_path(spatial(self.conv2, y, skip))
            return y + (x if self.downsample is None else self.downsample(a))
        y = self.bn1(self.conv1(x)).relu_()
        y = self.drop_path(self.bn2(spatial(self.conv2, y, skip)))
        return (y + (x if self.downsample is None else self.downsample(x))).relu_()


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside the shortcut. skip leaves the 3×3 one out."""

    expansion = 4

    def __init__(self, dim, planes, stride, *, groups, width_per_group, pre_activation, drop_path):
        super().__init__()
        inner, outer = planes * width_per_group // 64 * groups, 4 * planes
        norms = (dim, inner, inner) if pre_activation else (inner, inner, outer)
        self.conv1 = nn.Conv2d(dim, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(norms[0])
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(norms[1])
        self.conv3 = nn.Conv2d(inner, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(norms[2])
        self.downsample = projection(dim, outer, stride, pre_activation)
        self.drop_path = DropPath(drop_path)
        self.pre_activation = pre_activation

    def forward(self, x, skip=False):
        if self.pre_activation:
            a = self.bn1(x).relu_()
            y = self.bn2(self.conv1(a)).relu_()
            y = self.bn3(spatial(self.conv2, y, skip)).relu_()
            y = self.drop_path(self.conv3(y))
            return y + (x if self.downsample is None else self.downsample(a))
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(spatial(self.conv2, y, skip)).relu_()
        y = self.drop_path(self.bn3(self.conv3(y)))
        return (y + (x if self.downsample is None else self.downsample(x))).relu_()


def blur2x2(x):
    """Mean of each pixel and its neighbours to the right, below, and below right."""
    return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, stride=1)


def check_choices(**choices):
    """ValueError unless each value, given as name=(value, allowed...), is one of the allowed."""
    for name, (value, *allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def check_rates(**rates):
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {rate}")


def check_widths(depth, bottleneck, width, groups, width_per_group):
    if not isinstance(depth, (list, tuple)) or len(depth) != 4 or min(depth) < 1:
        raise ValueError(f"depth needs the number of blocks of four stages, got {depth}")
    if min(width, groups, width_per_group) < 1 or width * width_per_group % 64:
        raise ValueError(
            "width, groups and width_per_group must be at least 1, width times width_per_group a "
            f"multiple of 64; got {width}, {groups}, {width_per_group}"
        )
    if not bottleneck and (groups, width_per_group) != (1, 64):
        raise ValueError("groups and width_per_group are for bottlenecks (ResNet-50 and deeper)")


def check_images(x):
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"images are (B, 3, H, W), got {tuple(x.shape)}")


def init_weights(model, init, zero_init):
    """init and zero_init as in this file's header."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and init == "torchvision":
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for block in (block for stage in model.stages for block in stage if zero_init):
        conv, norm = ("conv3", "bn3") if isinstance(block, Bottleneck) else ("conv2", "bn2")
        nn.init.zeros_(block.get_submodule(conv if block.pre_activation else norm).weight)


class ResNet(nn.Module):
    """Images (B, 3, H, W) of any size to logits (B, num_classes); the defaults are ResNet-50.

    depth            blocks of the four stages
    bottleneck       1×1, 3×3, 1×1 convolutions, else two 3×3
    width            of the stem; stages have 1, 2, 4, 8 times as many, bottlenecks' ends 4× that
    groups, width_per_group   of the 3×3 convolution; ResNeXt 32x4d: 32 and 4
    pre_activation   norm and ReLU before each convolution, not after
    stem             "imagenet": 7×7 of stride 2 and max-pooling; "cifar": 3×3
    drop_path        stochastic depth of the last block; rises linearly from 0 at the first
    blur, init, zero_init   see this file's header
    """

    def __init__(
        self,
        *,
        num_classes=1000,
        depth=(3, 4, 6, 3),
        bottleneck=True,
        width=64,
        groups=1,
        width_per_group=64,
        pre_activation=False,
        stem="imagenet",
        drop_path=0.0,
        blur=False,
        init="torchvision",
        zero_init=False,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        check_choices(stem=(stem, "imagenet", "cifar"), init=(init, "torchvision", "torch"))
        check_rates(drop_path=drop_path)
        check_widths(depth, bottleneck, width, groups, width_per_group)
        self.stem, self.blur, self.pre_activation = stem, blur, pre_activation
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(3, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = None if pre_activation else nn.BatchNorm2d(width)
        kind, more = BasicBlock, dict(pre_activation=pre_activation)
        if bottleneck:
            kind, more = Bottleneck, more | dict(groups=groups, width_per_group=width_per_group)
        dim, rates = width, iter([drop_path * i / (sum(depth) - 1) for i in range(sum(depth))])
        for i, blocks in enumerate(depth):
            stage = nn.Sequential()
            for j in range(blocks):
                stride = 2 if i and j == 0 else 1
                stage.append(kind(dim, width * 2**i, stride, **more, drop_path=next(rates)))
                dim = width * 2**i * kind.expansion
            self.add_module(f"layer{i + 1}", stage)
        self.norm = nn.BatchNorm2d(dim) if pre_activation else None
        self.fc = nn.Linear(dim, num_classes)
        init_weights(self, init, zero_init)

    @property
    def stages(self):
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    @property
    def intermediates(self):
        """{name: (kind, stage)} of what forward's out can ask for: the maps (B, C, H, W) after
        "stem", after each block, "layer{stage}.{index}", after each "layer{stage}.blur" if there
        is one, and "pre_logits" (B, C). Stages count from 1, the stem is 0."""
        names = {"stem": ("stem", 0)}
        for i, stage in enumerate(self.stages, 1):
            names |= {f"layer{i}.{j}": ("conv", i) for j in range(len(stage))}
            names |= {f"layer{i}.blur": ("pooling", i)} if self.blur else {}
        return names | {"pre_logits": ("representation", 4)}

    def forward(self, x, out=None, skip=None):
        """Logits (B, num_classes). out: dict whose keys, from intermediates, get their values.
        skip: name of a block whose 3×3 convolution (of two, the second) becomes the identity."""
        if out is not None or skip is not None:
            check_names(self.intermediates, out, skip)
        check_images(x)
        x = self.conv1(x)
        if not self.pre_activation:
            x = self.bn1(x).relu_()
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, 1)
        record(out, "stem", x)
        for i, stage in enumerate(self.stages, 1):
            for j, block in enumerate(stage):
                x = record(out, f"layer{i}.{j}", block(x, skip == f"layer{i}.{j}"))
            if self.blur:
                x = record(out, f"layer{i}.blur", blur2x2(x))
        if self.pre_activation:
            x = self.norm(x).relu_()
        x = x.mean(dim=(2, 3))  # (B, C)
        return self.fc(record(out, "pre_logits", x))


def unknown(what, name, known, listing):
    """The error to raise: what was seen, the nearest of the known names, and all that is known."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ";"
    return ValueError(f"unknown {what} {name!r}{hint} known: {listing}")


def build(name: str, num_classes: int = 1000, image_size: int = 224, **overrides) -> ResNet:
    """Variant name with any constructor argument overridden: (pre)resnet{18,34,50,101,152,200},
    with x2 for twice the width, or resnext50_32x4d; up to image_size 64 with the CIFAR stem.
    ValueError for what is unknown or does not fit."""
    plain = re.fullmatch(rf"(pre)?resnet({'|'.join(RESNET)})(x2)?", name)
    if plain:
        row = dict(RESNET[plain[2]], width=128 if plain[3] else 64)
        if plain[1]:
            row |= dict(pre_activation=True, init="torch")
    elif name == "resnext50_32x4d":
        row = dict(RESNET["50"], groups=32, width_per_group=4)
    else:
        listing = f"(pre)resnet{{{','.join(RESNET)}}} also with x2 at the end, resnext50_32x4d"
        raise unknown("model", name, NAMES, listing)
    arguments = list(inspect.signature(ResNet).parameters)
    for override in overrides:
        if override not in arguments:
            raise unknown(f"argument of {name}", override, arguments, ", ".join(arguments))
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    row["stem"] = "cifar" if image_size <= 64 else "imagenet"
    return ResNet(num_classes=num_classes, **row | overrides)


UNCOUNTED = frozenset(  # other functions that multiply and add: refused, for none counts as free
    "multi_head_attention_forward einsum tensordot bilinear inner mm mv dot vdot chain_matmul "
    "linalg_multi_dot linalg_matmul linalg_vecdot addmm addmv addbmm baddbmm __rmatmul__ conv1d "
    "conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)


class Counter(TorchFunctionMode):
    """Adds up multiply-accumulates, bias additions and activations of the calls made under it."""

    def __init__(self):
        super().__init__()
        self.macs = self.biases = self.acts = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.batch_norm, F.layer_norm):  # not counted, and slow on the meta device
            return args[0]
        result = function(*args, **(kwargs or {}))
        if function in (F.conv2d, F.linear):
            given = dict(zip(("input", "weight", "bias"), args)) | (kwargs or {})
            self.macs += result.numel() * given["weight"][0].numel()
            self.biases += 0 if given.get("bias") is None else result.numel()
            self.acts += result.numel()
        elif function is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args)) | (kwargs or {})
            query, key, value = (given[name].shape for name in ("query", "key", "value"))
            weights = query[:-1].numel() * key[-2]
            self.macs += weights * (query[-1] + value[-1])
            self.acts += weights + result.numel()
        elif function in (torch.Tensor.matmul, torch.matmul, torch.bmm):
            self.macs += result.numel() * args[0].shape[-1]
            self.acts += result.numel()
        elif function is F.max_pool2d:
            self.acts += result.numel()
        elif getattr(function, "__name__", "") in UNCOUNTED:
            raise NotImplementedError(f"cannot count {function.__name__}")
        return result


def complexity(model: nn.Module, image_size: int = 224) -> dict[str, int]:
    """For one image: trainable params; macs, multiply-accumulates of convolutions, linear layers
    and both products of attention (masked pairs too); macs_with_bias, pycls' "flops", one more for
    each bias addition; acts, outputs of all these and of max-pooling (pycls; Xiao et al., Table 1).
    Runs on the meta device: instant, and the model is left alone."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}
    shape = (2, 3, image_size, image_size)  # BatchNorm may refuse one image
    images = torch.empty(shape, device="meta", dtype=next(model.parameters()).dtype)
    with torch.no_grad(), Counter() as count:
        torch.func.functional_call(model, tensors, (images,))
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return dict(
        params=params,
        macs=count.macs // 2,
        acts=count.acts // 2,
        macs_with_bias=(count.macs + count.biases) // 2,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Complexity of ResNets.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(NAMES)}")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side")
    parser.add_argument("--num-classes", type=int, default=1000, help="width of the head")
    parser.error = lambda message: parser.exit(2, f"resnet.py: {message}; see --help\n")
    args = parser.parse_args(argv)
    print(f"{'':16}{'parameters':>14}{'GMACs':>9}{'with bias':>11}{'M activations':>15}")
    for name in args.names or NAMES:
        try:
            with torch.device("meta"):  # no memory, no initialisation
                model = build(name, args.num_classes, args.image_size)
        except ValueError as error:
            parser.error(str(error))
        cost = complexity(model, args.image_size)
        print(
            f"{name:16}{cost['params']:14,}{cost['macs'] / 1e9:9.3f}"
            f"{cost['macs_with_bias'] / 1e9:11.3f}{cost['acts'] / 1e6:15.3f}"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head ends it, as it ends cat
    main()
