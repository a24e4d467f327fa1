"""MLP-Mixer (Tolstikhin et al., arXiv 2105.01601): one MLP over the tokens, the same for each
channel, then one over the channels, the same for each token. Chen et al. (2106.01548, Table 7)
train S and B with SAM; Park & Kim (2202.06709, Figs. 5a, C.1a) use a tiny one for CIFAR.

What the papers leave open is as in Google's code (vision_transformer, big_vision):
- tanh-GELU (flax's default), LayerNorm eps 1e-6, Google's init. timm's MlpMixer is gelu="exact",
  init="timm". Park & Kim's is mixer_ti2, gelu="exact", but for torch's eps 1e-5 and init.
- Stochastic depth: the rate rises linearly from 0 at the first block to drop_path at the last, as
  in big_vision, of the authors' group; timm has one rate in all blocks (its own FIXME), vit_jax
  no stochastic depth. Each of a block's two branches draws its own mask per sample.
- Dropout after the GELU and after the second layer of both MLPs, as timm's drop. Google's public
  Mixer has none; Chen et al. tuned it over {0.1, 0} (Appendix E) and took 0 (Table 8).
Differs from big_vision: what stochastic depth keeps is divided by the keep probability, as in timm
and vit.py, so that training has the expectation which evaluation computes.
State-dict keys are timm's. load_npz reads Google's files; those models take images in [-1, 1].

    python mixer.py                              parameters, MACs, activations of variants (4 s)
    python mixer.py mixer_b16 --image-size 384   of one, at another resolution
    tokens = {"blocks.11.mlp_channels": None}    # intermediates are asked for by name
    logits = build("mixer_b16")(images, out=tokens)

B batch, N tokens (the map by rows; no class token), D dim, P patch size."""

import argparse
import difflib
import inspect
import math
import re
import signal
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MIXER = {  # mixer_{key}{patch size}
    "micro": dict(dim=96, depth=4, token_mlp_dim=48, mlp_dim=384),  # ours, for the built-in 32×32
    "ti": dict(dim=256, depth=8, token_mlp_dim=128, mlp_dim=1024),  # Park & Kim's code, for CIFAR
    "s": dict(dim=512, depth=8, token_mlp_dim=256, mlp_dim=2048),  # Chen et al., Table 7
    "b": dict(dim=768, depth=12, token_mlp_dim=384, mlp_dim=3072),
    "l": dict(dim=1024, depth=24, token_mlp_dim=512, mlp_dim=4096),  # Tolstikhin et al., Table 1
}
NAMES = [f"mixer_{size}" for size in "micro8 ti16 s32 s16 s8 b32 b16 b8 l16".split()]


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


class Mlp(nn.Module):
    def __init__(self, *, dim, mlp_dim, gelu="tanh", dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = nn.Linear(mlp_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, *, dim, tokens, token_mlp_dim, mlp_dim, gelu, dropout, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_tokens = Mlp(dim=tokens, mlp_dim=token_mlp_dim, gelu=gelu, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_channels = Mlp(dim=dim, mlp_dim=mlp_dim, gelu=gelu, dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, out=None, skip=None, name="block"):
        if skip != f"{name}.mlp_tokens":
            x = x + self.drop_path(self.mlp_tokens(self.norm1(x).mT).mT)  # within: (B, D, N)
        record(out, f"{name}.mlp_tokens", x)
        if skip != f"{name}.mlp_channels":
            x = x + self.drop_path(self.mlp_channels(self.norm2(x)))
        return record(out, f"{name}.mlp_channels", x)


def check_choices(**choices):
    """ValueError unless each value, given as name=(value, allowed...), is one of the allowed."""
    for name, (value, *allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def check_rates(**rates):
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {rate}")


def check_images(x, image_size):
    if x.shape[1:] != (3, image_size, image_size):
        raise ValueError(
            f"built for images (B, 3, {image_size}, {image_size}), got {tuple(x.shape)}; a Mixer "
            "takes square RGB images of one size: resize them, or build with image_size and train "
            "anew"
        )


def lecun_normal_(weight):
    """flax's default: normal, cut at two standard deviations, then of variance 1/fan_in."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978  # N(0, 1) cut at ±2 has this std
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Mixer(nn.Module):
    """Images (B, 3, image_size, image_size) to logits (B, num_classes); defaults: Mixer-B/16.

    token_mlp_dim  hidden width of the MLPs over the tokens, D_S of the paper
    mlp_dim        of those over the channels, D_C
    dropout        after the GELU and after the second layer of both MLPs
    drop_path      stochastic depth of the last block; rises linearly from 0 at the first
    head_bias      initial value; for the sigmoid loss big_vision takes -6.9 or -10
    init           "google" (Chen et al.) or "timm": init_weights
    """

    def __init__(
        self,
        *,
        image_size=224,
        patch_size=16,
        num_classes=1000,
        dim=768,
        depth=12,
        token_mlp_dim=384,
        mlp_dim=3072,
        gelu="tanh",
        dropout=0.0,
        drop_path=0.0,
        head_bias=0.0,
        init="google",
    ):
        super().__init__()
        check_choices(gelu=(gelu, "exact", "tanh"), init=(init, "google", "timm"))
        check_rates(dropout=dropout, drop_path=drop_path)
        if min(image_size, patch_size) < 1 or image_size % patch_size:
            raise ValueError(
                "image_size must be a positive multiple of patch_size, got "
                f"{image_size} and {patch_size}"
            )
        if min(dim, depth, token_mlp_dim, mlp_dim, num_classes) < 1:
            raise ValueError(
                "dim, depth, token_mlp_dim, mlp_dim and num_classes must be at least 1, got "
                f"{dim}, {depth}, {token_mlp_dim}, {mlp_dim}, {num_classes}"
            )
        self.image_size = image_size
        self.grid = (image_size // patch_size,) * 2
        self.prefix_tokens = 0  # no class token: the tokens are the map

        self.stem = nn.Sequential(
            OrderedDict(proj=nn.Conv2d(3, dim, patch_size, stride=patch_size))
        )
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                tokens=math.prod(self.grid),
                token_mlp_dim=token_mlp_dim,
                mlp_dim=mlp_dim,
                gelu=gelu,
                dropout=dropout,
                drop_path=drop_path * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.init_weights(init, head_bias)

    @torch.no_grad()
    def init_weights(self, init, head_bias):
        """Both: lecun-normal stem, zero head weight and stem bias, LayerNorm 1 and 0.
        google  MLPs lecun-normal, biases zero: flax's defaults
        timm    MLPs xavier-uniform, biases N(0, 1e-6²)
        The head's bias is head_bias."""
        lecun_normal_(self.stem.proj.weight)
        nn.init.zeros_(self.stem.proj.bias)
        for block in self.blocks:
            for mlp in (block.mlp_tokens, block.mlp_channels):
                for linear in (mlp.fc1, mlp.fc2):
                    if init == "google":
                        lecun_normal_(linear.weight)
                        nn.init.zeros_(linear.bias)
                    else:
                        nn.init.xavier_uniform_(linear.weight)
                        nn.init.normal_(linear.bias, std=1e-6)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, head_bias)

    @property
    def intermediates(self):
        """{name: (kind, stage)} of what forward's out can ask for: "stem" (B, N, D), per block the
        residual stream (B, N, D) after the token MLP and after the channel MLP, "pre_logits"
        (B, D). Stages count from 1, the stem is 0."""
        names = {"stem": ("stem", 0)}
        for i in range(len(self.blocks)):
            names |= {
                f"blocks.{i}.mlp_tokens": ("token mlp", 1),
                f"blocks.{i}.mlp_channels": ("mlp", 1),
            }
        return names | {"pre_logits": ("representation", 1)}

    def forward(self, x, out=None, skip=None):
        """Logits (B, num_classes). out: dict whose keys, from intermediates, get their values.
        skip: name of a token or channel MLP to leave out, its residual branch then adds nothing."""
        check_images(x, self.image_size)
        if out is not None or skip is not None:
            check_names(self.intermediates, out, skip)
        x = self.stem(x).flatten(2).mT.contiguous()  # (B, N, D); else each norm would copy it
        record(out, "stem", x)
        for i, block in enumerate(self.blocks):
            x = block(x, out, skip, f"blocks.{i}")
        x = self.norm(x).mean(dim=1)  # (B, D)
        return self.head(record(out, "pre_logits", x))


def unknown(what, name, known, listing):
    """The error to raise: what was seen, the nearest of the known names, and all that is known."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ";"
    return ValueError(f"unknown {what} {name!r}{hint} known: {listing}")


def build(name: str, num_classes: int = 1000, image_size: int = 224, **overrides) -> Mixer:
    """Variant name with any constructor argument overridden: mixer_{micro,ti,s,b,l}P for each patch
    size P. ValueError for what is unknown or does not fit."""
    match = re.fullmatch(rf"mixer_({'|'.join(MIXER)})([1-9]\d*)", name)
    # a P that does not divide the image is a slip, unless it is listed or patch_size replaces it
    given = name in NAMES or "patch_size" in overrides
    if not match or not given and image_size % int(match[2]):
        listing = f"mixer_{{{','.join(MIXER)}}}P with any patch size P that divides the image"
        raise unknown("model", name, NAMES, listing)
    arguments = list(inspect.signature(Mixer).parameters)
    for override in overrides:
        if override not in arguments:
            raise unknown(f"argument of {name}", override, arguments, ", ".join(arguments))
    row = MIXER[match[1]] | dict(patch_size=int(match[2])) | overrides
    return Mixer(num_classes=num_classes, image_size=image_size, **row)


def load_npz(model: Mixer, path: str | Path, head: bool = True) -> None:
    """Fill model from a file of google-research/vision_transformer or big_vision (Mixer,
    SAM, GSAM), made for images in [-1, 1] of the model's image_size. Names may carry an optimizer's
    prefix; other arrays are ignored. head=False keeps the model's own head. ValueError, and the
    model is as before, if the file is damaged or does not fit, OSError if it cannot be opened."""
    import numpy as np

    if not isinstance(model, Mixer):
        raise ValueError(f"load_npz fills a Mixer, got {type(model).__name__}")
    open(path, "rb").close()  # an OSError is the caller's
    try:
        if not zipfile.is_zipfile(path):  # which numpy would take for a pickle
            raise ValueError("it is no zip archive")
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # foreign bytes can raise anything
        raise ValueError(f"{path} is no readable .npz: {error}") from None
    prefixes = ("", "opt/target/", "params/", "params/img/")
    first = "MixerBlock_0/LayerNorm_0/scale"
    prefix = next((p for p in prefixes if p + first in arrays), None)
    if prefix is None:
        raise ValueError(
            f"{path} is no Mixer: no {first!r} behind any of {prefixes}, among {len(arrays)} "
            f"arrays such as {', '.join(sorted(arrays)[:3])}"
        )
    arrays = {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
    weights = {}

    def take(key, *shape):
        if key not in arrays:
            raise ValueError(f"{path} lacks {prefix + key!r}")
        array = arrays[key]
        while array.ndim > len(shape) and array.shape[0] == 1:  # old files store biases so
            array = array[0]
        if array.shape != shape or array.dtype.kind != "f":
            raise ValueError(
                f"{path}: {prefix + key!r} has shape {arrays[key].shape} of {array.dtype}, the "
                f"model needs {shape} of floats"
            )
        return torch.from_numpy(array)

    def norm(name, key):
        weights[f"{name}.weight"] = take(f"{key}/scale", dim)
        weights[f"{name}.bias"] = take(f"{key}/bias", dim)

    def dense(name, key, inputs, outputs):
        weights[f"{name}.weight"] = take(f"{key}/kernel", inputs, outputs).T
        weights[f"{name}.bias"] = take(f"{key}/bias", outputs)

    block, depth, patch = model.blocks[0], len(model.blocks), model.stem.proj.kernel_size
    tokens, token_mlp_dim = block.mlp_tokens.fc1.in_features, block.mlp_tokens.fc1.out_features
    dim, mlp_dim = block.mlp_channels.fc1.in_features, block.mlp_channels.fc1.out_features
    blocks = len({key.split("/")[0] for key in arrays if key.startswith("MixerBlock_")})
    if blocks != depth:
        advice = (
            f"build it with depth={blocks}" if blocks else "blocks stacked by scan are not read"
        )
        raise ValueError(f"{path} has depth {blocks}, the model {depth}: {advice}")
    kernel = take("stem/kernel", *patch, 3, dim)
    weights["stem.proj.weight"] = kernel.permute(3, 2, 0, 1)  # HWIO to OIHW
    weights["stem.proj.bias"] = take("stem/bias", dim)
    key = "MixerBlock_0/token_mixing/Dense_1/bias"
    in_file = arrays[key].size if key in arrays else tokens
    side = math.isqrt(in_file)
    if side**2 == in_file != tokens:
        raise ValueError(
            f"{path} is for {in_file} tokens, the model for {tokens}, and token MLPs cannot be "
            f"resized: build it with image_size={side * patch[0]}"
        )
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"MixerBlock_{i}"
        norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0")
        dense(f"{ours}.mlp_tokens.fc1", f"{theirs}/token_mixing/Dense_0", tokens, token_mlp_dim)
        dense(f"{ours}.mlp_tokens.fc2", f"{theirs}/token_mixing/Dense_1", token_mlp_dim, tokens)
        norm(f"{ours}.norm2", f"{theirs}/LayerNorm_1")
        dense(f"{ours}.mlp_channels.fc1", f"{theirs}/channel_mixing/Dense_0", dim, mlp_dim)
        dense(f"{ours}.mlp_channels.fc2", f"{theirs}/channel_mixing/Dense_1", mlp_dim, dim)
    norm("norm", "pre_head_layer_norm")
    if head:
        classes = arrays["head/bias"].size if "head/bias" in arrays else model.head.out_features
        if classes != model.head.out_features:
            raise ValueError(
                f"{path} has {classes} classes, the model {model.head.out_features}: build it with "
                f"num_classes={classes} or load with head=False"
            )
        dense("head", "head", dim, classes)
    model.load_state_dict(model.state_dict() | weights)


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
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Complexity of Mixers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: one of each kind")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side")
    parser.add_argument("--num-classes", type=int, default=1000, help="width of the head")
    parser.error = lambda message: parser.exit(2, f"mixer.py: {message}; see --help\n")
    args = parser.parse_args(argv)
    print(f"{'':12}{'parameters':>14}{'GMACs':>9}{'with bias':>11}{'M activations':>15}")
    fits = False
    for name in args.names or NAMES:
        try:
            with torch.device("meta"):  # no memory, no initialisation
                model = build(name, args.num_classes, args.image_size)
        except ValueError as error:
            if args.names:
                parser.error(str(error))
            print(f"{name:12}  {error}")
            continue
        fits, cost = True, complexity(model, args.image_size)
        print(
            f"{name:12}{cost['params']:14,}{cost['macs'] / 1e9:9.3f}"
            f"{cost['macs_with_bias'] / 1e9:11.3f}{cost['acts'] / 1e6:15.3f}"
        )
    if not fits:
        parser.error(f"--image-size {args.image_size} fits none of them")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head ends it, as it ends cat
    main()
