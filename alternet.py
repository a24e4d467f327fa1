"""AlterNet (Park & Kim 2022, arXiv 2202.06709, §4, Fig. 11, 12, D.5, Appendix E): a ResNet whose
stages end in alternating convolution and self-attention blocks. The build-up rule: in a stage of n
blocks with m of attention come n - 2m convolution blocks, then m pairs of one and one.

- The baseline is the pre-activation ResNet whose last stage has one block more where its number is
  odd: (3, 4, 6, 4) for Alter-ResNet-50, also without attention.
- CIFAR, up to 64 pixels: windows of 4×4 (Appendix E), attention blocks (0, 1, 1, 2), Fig. 11;
  ImageNet: 7×7 and (0, 1, 3, 2), Fig. D.5; fewer where a stage is too short.
- The authors' code has the 7 and the rest: norm, GELU and 1×1 convolution before attention, then a
  norm; heads of 64 channels; one table of position biases N(0, 0.02²) for all heads of a block;
  torch's initialisation; no padding. No shift (Appendix E): windows have to divide the maps.
- pre_activation=False gives post-activation ResNet, groups=32, width_per_group=4 ResNeXt, which
  the rule helps too (Appendix E).
State-dict keys are torchvision's ResNet's; attention is layer{stage}.{index}.attn.

    python alternet.py                                    parameters, MACs, activations (4 s)
    python alternet.py alter_resnet50 --image-size 32     of one, in the CIFAR form
    for M in "0 0 0 0" "0 0 0 1" "0 0 0 2" "0 0 1 2" "0 1 1 2" "0 1 2 2" "0 1 3 2"; do  # Fig. 12a
        python alternet.py alter_resnet50 --image-size 32 --msa-blocks $M; done

B batch, C channels, H W map, n windows, w window side, N = w², d head_dim."""

import argparse
import difflib
import inspect
import signal

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

RESNET = {  # alter_resnet{key}; He et al. (1512.03385), Table 1, the last stage made even
    "18": dict(depth=(2, 2, 2, 2), bottleneck=False),
    "34": dict(depth=(3, 4, 6, 4), bottleneck=False),
    "50": dict(depth=(3, 4, 6, 4)),
    "101": dict(depth=(3, 4, 23, 4)),
    "152": dict(depth=(3, 8, 36, 4)),
}
MSA_BLOCKS = {"cifar": (0, 1, 1, 2), "imagenet": (0, 1, 3, 2)}  # Fig. 11, Fig. D.5
WINDOW_SIZE = {"cifar": 4, "imagenet": 7}
NAMES = [f"alter_resnet{size}" for size in RESNET]


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


class WindowAttention(nn.Module):
    """Multi-head self-attention among the w×w pixels of a window, with a learned bias for each
    offset between two of them, the same for all heads: (B, dim, H, W) to (B, wider, H, W)."""

    def __init__(self, dim, wider, *, heads, head_dim, window_size):
        super().__init__()
        self.heads, self.window_size = heads, window_size
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.proj = nn.Linear(heads * head_dim, wider)
        side = 2 * window_size - 1
        self.rel_pos_bias = nn.Parameter(0.02 * torch.randn(side, side))  # [Δrow, Δcolumn] + w - 1

    def forward(self, x):
        w = self.window_size
        if x.shape[2] % w or x.shape[3] % w:
            raise ValueError(f"windows of {w} do not divide maps (B, C, H, W) {tuple(x.shape)}")
        grid = (x.shape[2] // w, x.shape[3] // w)
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        x = x.unflatten(2, (grid[1], w)).unflatten(1, (grid[0], w))  # (B, H/w, w, W/w, w, C)
        x = x.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (B·n, N, C)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B·n, heads, N, d) each
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        # the query at (i, j) sees the key at (k, l) with entry [k - i, l - j] + w - 1
        bias = self.rel_pos_bias.unfold(0, w, 1).unfold(1, w, 1).flip(0, 1)  # (w, w, w, w)
        bias = bias.flatten(2).flatten(0, 1)  # (N, N)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = self.proj(x.transpose(1, 2).flatten(2))  # (B·n, N, C)
        x = x.unflatten(1, (w, w)).unflatten(0, (-1, *grid))  # (B, H/w, W/w, w, w, C)
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, H, W, C)
        return x.permute(0, 3, 1, 2)  # (B, C, H, W)


class AttentionBlock(nn.Module):
    """A 1×1 convolution, from dim to planes channels, and window attention, back to dim, beside the
    shortcut: (B, dim, H, W) to the same. skip leaves both out. As in the authors' code: GELU, no
    activation between the second norm and attention, and, post-activation, no ReLU after the
    sum."""

    def __init__(self, dim, planes, *, heads, head_dim, window_size, pre_activation, drop_path):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(dim if pre_activation else planes)
        self.conv1 = nn.Conv2d(dim, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes if pre_activation else dim)
        self.attn = WindowAttention(
            planes, dim, heads=heads, head_dim=head_dim, window_size=window_size
        )
        self.drop_path = DropPath(drop_path)
        self.pre_activation = pre_activation

    def forward(self, x, skip=False):
        if skip:
            return x
        if self.pre_activation:
            return x + self.drop_path(self.attn(self.bn2(self.conv1(F.gelu(self.bn1(x))))))
        return x + self.drop_path(self.bn2(self.attn(F.gelu(self.bn1(self.conv1(x))))))


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


def map_sides(image_size, stem):
    """Sides of the maps of the four stages: each step of stride 2 rounds up."""
    sides = [image_size if stem == "cifar" else (image_size + 3) // 4]
    for _ in range(3):
        sides.append((sides[-1] + 1) // 2)
    return sides


def check_windows(image_size, stem, msa_blocks, window_size):
    """ValueError, which names sizes that work, if windows do not tile a map that has attention."""

    def fits(image_size, window_size):
        sides = map_sides(image_size, stem)
        return not any(side % window_size for side, blocks in zip(sides, msa_blocks) if blocks)

    if fits(image_size, window_size):
        return
    sides, step = map_sides(image_size, stem), 8 if stem == "cifar" else 32
    multiples = [step * i for i in range(1, image_size // step + 2 * window_size)]
    below = [size for size in multiples if size < image_size and fits(size, window_size)][-1:]
    above = [size for size in multiples if size > image_size and fits(size, window_size)][:1]
    windows = [str(size) for size in range(1, max(sides) + 1) if fits(image_size, size)]
    raise ValueError(
        f"windows of {window_size} do not divide the maps of images of {image_size} pixels a side, "
        f"{', '.join(map(str, sides))}, with attention in {' '.join(map(str, msa_blocks))} of "
        f"their blocks; image sizes that work: {' and '.join(map(str, below + above))}; window "
        f"sizes that work: {', '.join(windows)}"
    )


class AlterNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, num_classes); defaults: Alter-ResNet-50 for ImageNet.
    H and W are image_size or any other size whose maps the windows divide.

    depth            blocks of the four stages
    msa_blocks       how many of them are attention, at most half of a stage
    window_size      pixels of a window's side
    heads, head_dim  per stage, and channels of each
    bottleneck       convolution blocks are 1×1, 3×3, 1×1, else two 3×3
    width            of the stem; stages have 1, 2, 4, 8 times as many, bottlenecks' ends 4× that
    groups, width_per_group    of the 3×3 convolution; ResNeXt 32x4d: 32 and 4
    pre_activation   norm and activation before each convolution, not after
    stem             "imagenet": 7×7 of stride 2 and max-pooling; "cifar": 3×3
    drop_path        stochastic depth of the last block; rises linearly from 0 at the first
    """

    def __init__(
        self,
        *,
        num_classes=1000,
        image_size=224,
        depth=(3, 4, 6, 4),
        msa_blocks=(0, 1, 3, 2),
        window_size=7,
        heads=(3, 6, 12, 24),
        head_dim=64,
        bottleneck=True,
        width=64,
        groups=1,
        width_per_group=64,
        pre_activation=True,
        stem="imagenet",
        drop_path=0.0,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        check_choices(stem=(stem, "imagenet", "cifar"))
        check_rates(drop_path=drop_path)
        check_widths(depth, bottleneck, width, groups, width_per_group)
        if len(msa_blocks) != 4 or any(not 0 <= m <= n // 2 for m, n in zip(msa_blocks, depth)):
            raise ValueError(
                "msa_blocks needs four numbers, each at most half of its stage's blocks "
                f"{tuple(depth)}; got {tuple(msa_blocks)}"
            )
        if len(heads) != 4 or min(*heads, head_dim, window_size, image_size) < 1:
            raise ValueError(
                "heads needs four numbers, and they, head_dim, window_size and image_size must be "
                f"at least 1; got {heads}, {head_dim}, {window_size}, {image_size}"
            )
        check_windows(image_size, stem, msa_blocks, window_size)
        self.stem, self.pre_activation = stem, pre_activation
        self.msa_blocks, self.window_size = msa_blocks, window_size
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(3, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = None if pre_activation else nn.BatchNorm2d(width)
        kind, more = BasicBlock, {}
        if bottleneck:
            kind, more = Bottleneck, dict(groups=groups, width_per_group=width_per_group)
        dim, rates = width, iter([drop_path * i / (sum(depth) - 1) for i in range(sum(depth))])
        attention = dict(head_dim=head_dim, window_size=window_size)
        for i, (blocks, msa) in enumerate(zip(depth, msa_blocks)):
            stage, planes = nn.Sequential(), width * 2**i
            for j in range(blocks):
                common = dict(pre_activation=pre_activation, drop_path=next(rates))
                if j >= blocks - 2 * msa and (blocks - j) % 2:  # from the end: every other block
                    block = AttentionBlock(dim, planes, heads=heads[i], **attention, **common)
                else:
                    block = kind(dim, planes, 2 if i and j == 0 else 1, **more, **common)
                    dim = planes * kind.expansion
                stage.append(block)
            self.add_module(f"layer{i + 1}", stage)
        self.norm = nn.BatchNorm2d(dim) if pre_activation else None
        self.fc = nn.Linear(dim, num_classes)

    @property
    def stages(self):
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    @property
    def intermediates(self):
        """{name: (kind, stage)} of what forward's out can ask for: the maps (B, C, H, W) after
        "stem" and after each block, "layer{stage}.{index}", and "pre_logits" (B, C). Stages count
        from 1, the stem is 0."""
        names = {"stem": ("stem", 0)}
        for i, stage in enumerate(self.stages, 1):
            for j, block in enumerate(stage):
                kind = "attention" if isinstance(block, AttentionBlock) else "conv"
                names[f"layer{i}.{j}"] = (kind, i)
        return names | {"pre_logits": ("representation", 4)}

    def forward(self, x, out=None, skip=None):
        """Logits (B, num_classes). out: dict whose keys, from intermediates, get their values.
        skip: name of a block to leave out: an attention block, or of a convolution block the 3×3
        convolution (of two, the second), which becomes the identity."""
        if out is not None or skip is not None:
            check_names(self.intermediates, out, skip)
        check_images(x)
        for side in x.shape[2:]:
            check_windows(side, self.stem, self.msa_blocks, self.window_size)
        x = self.conv1(x)
        if not self.pre_activation:
            x = self.bn1(x).relu_()
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, 1)
        record(out, "stem", x)
        for i, stage in enumerate(self.stages, 1):
            for j, block in enumerate(stage):
                x = record(out, f"layer{i}.{j}", block(x, skip == f"layer{i}.{j}"))
        if self.pre_activation:
            x = self.norm(x).relu_()
        x = x.mean(dim=(2, 3))  # (B, C)
        return self.fc(record(out, "pre_logits", x))


def unknown(what, name, known, listing):
    """The error to raise: what was seen, the nearest of the known names, and all that is known."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ";"
    return ValueError(f"unknown {what} {name!r}{hint} known: {listing}")


def build(name: str, num_classes: int = 1000, image_size: int = 224, **overrides) -> AlterNet:
    """alter_resnet{18,34,50,101,152} with any constructor argument overridden; up to image_size 64
    with the CIFAR stem, windows and attention blocks. ValueError for what is unknown or does not
    fit."""
    size = name.removeprefix("alter_resnet")
    if name not in NAMES:
        raise unknown("model", name, NAMES, ", ".join(NAMES))
    arguments = list(inspect.signature(AlterNet).parameters)
    for override in overrides:
        if override not in arguments:
            raise unknown(f"argument of {name}", override, arguments, ", ".join(arguments))
    stem = "cifar" if image_size <= 64 else "imagenet"
    row = RESNET[size] | dict(stem=stem, window_size=WINDOW_SIZE[stem]) | overrides
    if "msa_blocks" not in row and isinstance(row["depth"], (list, tuple)):
        row["msa_blocks"] = [min(m, n // 2) for m, n in zip(MSA_BLOCKS[stem], row["depth"])]
    return AlterNet(num_classes=num_classes, image_size=image_size, **row)


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
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Complexity of AlterNets.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(NAMES)}")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side")
    parser.add_argument("--num-classes", type=int, default=1000, help="width of the head")
    parser.add_argument(
        "--msa-blocks",
        type=int,
        nargs=4,
        metavar="M",
        help="attention blocks of the four stages (default: Fig. 11, Fig. D.5)",
    )
    parser.add_argument("--window-size", type=int, help="default: 4 up to 64 pixels, else 7")
    parser.error = lambda message: parser.exit(2, f"alternet.py: {message}; see --help\n")
    args = parser.parse_args(argv)
    given = dict(msa_blocks=args.msa_blocks, window_size=args.window_size)
    given = {name: value for name, value in given.items() if value is not None}
    print(f"{'':16}{'parameters':>14}{'GMACs':>9}{'with bias':>11}{'M activations':>15}")
    for name in args.names or NAMES:
        try:
            with torch.device("meta"):  # no memory, no initialisation
                model = build(name, args.num_classes, args.image_size, **given)
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
