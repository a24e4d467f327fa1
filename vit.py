"""Vision Transformers of three papers: Chen et al. (arXiv 2106.01548, Table 7) train the original
ViT (2010.11929) with SAM, Xiao et al. (2106.14881, §3, Table 1) give it a convolutional stem, Park
& Kim (2202.06709, §2, Fig. 7) restrict its attention to k×k neighbourhoods and also use PiT.

What the papers leave open is as in their authors' code:
- vit_{ti,s,b,l}P are Google's: tanh-GELU (flax's default), LayerNorm eps 1e-6, Google's init.
  Weights that timm trained want gelu="exact"; Park & Kim's CIFAR ViT-Ti, a timm class, is vit_ti2
  with gelu="exact", qkv_bias=False, init="timm".
- vit_{p,c}_*gf are pycls': exact GELU, its init of 2021. Table 1 prints 86.7 M parameters for
  ViT_P-18GF, Table 2 86.6 M; it has 86,567,656.
- pool="gap" is big_vision's: no class token, norm over all tokens, then mean; timm norms the mean.
- Convolutional attention (kernel_size=k), whose code was never published: neighbours beyond the
  border are masked, not zero keys; the class token sees and is seen by all; k is odd. Fig. 7's 8×8
  is global: None.
Differs from big_vision's Mixer (Chen et al.'s group): what stochastic depth keeps is divided by the
keep probability, as in timm, so that training has the expectation which evaluation computes.
State-dict keys are timm's. load_npz reads Google's files; those models take images in [-1, 1].

    python vit.py                             parameters, MACs, activations of the variants (6 s)
    python vit.py vit_b16 --image-size 384    of one, at another resolution
    maps = {"blocks.11.attn.weights": None}   # intermediates are asked for by name
    logits = build("vit_s16")(images, out=maps)

B batch, N tokens (class token first, then the map by rows), D dim, H heads, d head_dim, h w map."""

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

VIT = {  # vit_{key}{patch size}; mlp_dim is 4·dim
    "micro": dict(dim=96, depth=4, heads=3),  # ours, for the built-in 32×32 data set
    "ti": dict(dim=192, depth=12, heads=3),  # DeiT (2012.12877), Table 1
    "s": dict(dim=384, depth=12, heads=6),  # Chen et al., Table 7
    "b": dict(dim=768, depth=12, heads=12),
    "l": dict(dim=1024, depth=24, heads=16),  # Dosovitskiy et al., Table 1
}
VIT_GF = {  # vit_{p,c}_{key}; Xiao et al., Table 1. depth is L: build() takes one off for ViT_C
    "1gf": dict(dim=192, depth=12, heads=3, mlp_dim=576),
    "4gf": dict(dim=384, depth=12, heads=6, mlp_dim=1152),
    "18gf": dict(dim=768, depth=12, heads=12, mlp_dim=3072),
    "36gf": dict(dim=1024, depth=14, heads=16, mlp_dim=4096),
}
STEM_18GF = dict(stem_channels=(64, 128, 128, 256, 256, 512), stem_strides=(2, 2, 1, 2, 1, 2))
STEM_GF = {"18gf": STEM_18GF, "36gf": STEM_18GF}  # §3; 1gf, 4gf: the default of stem_plan
NAMES = [
    *"vit_micro8 vit_ti16 vit_s32 vit_s16 vit_s14 vit_s8 vit_b32 vit_b16 vit_l16".split(),
    *(f"vit_{stem}_{size}" for stem in "pc" for size in VIT_GF),
    "pit_ti",
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


class Mlp(nn.Module):
    def __init__(self, *, dim, mlp_dim, gelu="tanh", dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = nn.Linear(mlp_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """Multi-head self-attention; mask (N, N) is True where the row's token may see the column's."""

    def __init__(self, *, dim, heads, head_dim, qkv_bias=True, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * head_dim, dim)
        self.drop = nn.Dropout(dropout)  # Google drops none of the attention weights

    def forward(self, x, mask=None, out=None, name="attn"):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, d) each
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if out is not None and f"{name}.weights" in out:  # SDPA never forms them: a second softmax
            scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, N, N)
            scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
            out[f"{name}.weights"] = scores.softmax(dim=-1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.drop(self.proj(x.transpose(1, 2).flatten(2)))  # (B, N, D)


class Block(nn.Module):
    def __init__(self, *, dim, heads, head_dim, mlp_dim, qkv_bias, gelu, dropout, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(
            dim=dim, heads=heads, head_dim=head_dim, qkv_bias=qkv_bias, dropout=dropout
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim=dim, mlp_dim=mlp_dim, gelu=gelu, dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, mask=None, out=None, skip=None, name="block"):
        if skip != f"{name}.attn":
            x = x + self.drop_path(self.attn(self.norm1(x), mask, out, f"{name}.attn"))
        else:
            record(out, f"{name}.attn.weights", None)  # not what an earlier call left in out
        record(out, f"{name}.attn", x)
        if skip != f"{name}.mlp":
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return record(out, f"{name}.mlp", x)


def block_intermediates(name, stage):
    return {
        f"{name}.attn.weights": ("weights", stage),
        f"{name}.attn": ("attention", stage),
        f"{name}.mlp": ("mlp", stage),
    }


def stem_plan(dim, patch_size, channels=None, strides=None):
    """Channels and strides of the stem's 3×3 convolutions. The default, for patch size 2^n, is that
    of ViT_C-1GF and 4GF (Xiao et al., §3): n of stride 2, doubling the channels up to dim."""
    power_of_two = patch_size & (patch_size - 1) == 0
    if not channels and not strides and power_of_two and 2 * dim % patch_size == 0:
        channels = [2 * dim * 2**i // patch_size for i in range(patch_size.bit_length() - 1)]
    strides = strides or [2] * len(channels or ())
    if not channels or len(channels) != len(strides) or math.prod(strides) != patch_size:
        raise ValueError(
            f"a convolutional stem with patch_size {patch_size} needs as many stem_channels as "
            f"stem_strides, whose product is {patch_size}; got {channels} and {strides}"
        )
    return channels, strides


class PatchEmbed(nn.Module):
    """Image to map of tokens: one P×P convolution of stride P, or 3×3 convolutions, then a 1×1."""

    def __init__(self, *, dim, patch_size, channels=(), strides=()):
        super().__init__()
        widths = [3, *channels]
        self.stem = nn.Sequential()
        for before, after, stride in zip(widths, channels, strides):
            conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
            layer = OrderedDict(conv=conv, bn=nn.BatchNorm2d(after), relu=nn.ReLU())
            self.stem.append(nn.Sequential(layer))
        patch = 1 if channels else patch_size
        self.proj = nn.Conv2d(widths[-1], dim, patch, stride=patch)

    def forward(self, x):
        return self.proj(self.stem(x))  # (B, D, h, w)


def neighbourhood(grid, kernel_size, prefix_tokens, device=None):
    """(N, N) mask, True where the column's token lies in the k×k window around the row's; the class
    token (prefix) sees and is seen by all."""
    y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    y_apart, x_apart = ((i.flatten()[:, None] - i.flatten()).abs() for i in (y, x))
    near = torch.maximum(y_apart, x_apart) <= kernel_size // 2
    return F.pad(near, (prefix_tokens, 0, prefix_tokens, 0), value=True)


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
            f"built for images (B, 3, {image_size}, {image_size}), got {tuple(x.shape)}; for "
            "square RGB images of another size build with image_size and use resize_pos_embed"
        )


def lecun_normal_(weight):
    """flax's default: normal, cut at two standard deviations, then of variance 1/fan_in."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978  # N(0, 1) cut at ±2 has this std
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class ViT(nn.Module):
    """Images (B, 3, image_size, image_size) to logits (B, num_classes); the defaults are ViT-B/16.

    head_dim     of one head, default dim / heads
    mlp_dim      default 4·dim
    pool         "cls": class token; "gap": mean over the tokens, no class token
    stem         "patchify", or "conv" with stem_channels, stem_strides or stem_plan's default
    dropout      after position embedding, attention projection, GELU, and second MLP layer
    drop_path    stochastic depth of the last block; rises linearly from 0 at the first
    kernel_size  None, or the even side of the map: global attention; odd k: only among the k×k
                 nearest tokens
    representation_size  Dense + tanh of that width before the head, as in ViT's 21k files
    head_bias    initial value; for the sigmoid loss big_vision takes -6.9 or -10
    unit_norm    divide the representation, as the head and pre_logits have it, by its length
    init         "google" (Chen et al.), "pycls" (Xiao et al.), "timm" (Park & Kim): init_weights
    """

    def __init__(
        self,
        *,
        image_size=224,
        patch_size=16,
        num_classes=1000,
        dim=768,
        depth=12,
        heads=12,
        head_dim=None,
        mlp_dim=None,
        pool="cls",
        stem="patchify",
        stem_channels=None,
        stem_strides=None,
        qkv_bias=True,
        gelu="tanh",
        dropout=0.0,
        drop_path=0.0,
        kernel_size=None,
        representation_size=None,
        head_bias=0.0,
        unit_norm=False,
        init="google",
    ):
        super().__init__()
        check_choices(
            pool=(pool, "cls", "gap"),
            stem=(stem, "patchify", "conv"),
            gelu=(gelu, "exact", "tanh"),
            init=(init, "google", "pycls", "timm"),
        )
        check_rates(dropout=dropout, drop_path=drop_path)
        if min(image_size, patch_size) < 1 or image_size % patch_size:
            raise ValueError(
                "image_size must be a positive multiple of patch_size, got "
                f"{image_size} and {patch_size}"
            )
        if min(dim, depth, heads, num_classes) < 1:
            raise ValueError(
                f"dim, depth, heads and num_classes must be at least 1, got {dim}, {depth}, "
                f"{heads}, {num_classes}"
            )
        if head_dim is None and dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}; or give head_dim")
        head_dim = dim // heads if head_dim is None else head_dim
        mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        if min(head_dim, mlp_dim) < 1:
            raise ValueError(f"head_dim and mlp_dim must be at least 1, got {head_dim}, {mlp_dim}")
        if kernel_size == image_size // patch_size and kernel_size % 2 == 0:
            kernel_size = None  # as Park & Kim call global attention in Fig. 7: 8×8 of 8×8 tokens
        if kernel_size is not None and (kernel_size < 1 or kernel_size % 2 == 0):
            raise ValueError(
                f"kernel_size must be odd, centred on a token, got {kernel_size}; None is global "
                "attention"
            )
        if stem == "patchify" and (stem_channels or stem_strides):
            raise ValueError('stem_channels and stem_strides need stem="conv", got "patchify"')
        self.image_size, self.pool, self.unit_norm = image_size, pool, unit_norm
        self.grid = (image_size // patch_size,) * 2
        self.prefix_tokens = 1 if pool == "cls" else 0

        channels, strides = (), ()
        if stem == "conv":
            channels, strides = stem_plan(dim, patch_size, stem_channels, stem_strides)
        self.patch_embed = PatchEmbed(
            dim=dim, patch_size=patch_size, channels=channels, strides=strides
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "cls" else None
        tokens = self.prefix_tokens + math.prod(self.grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.pos_drop = nn.Dropout(dropout)
        self.kernel_size = kernel_size
        shape = dict(dim=dim, heads=heads, head_dim=head_dim, mlp_dim=mlp_dim, qkv_bias=qkv_bias)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(**shape, gelu=gelu, dropout=dropout, drop_path=rate) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pre_logits = (
            nn.Identity()
            if not representation_size
            else nn.Sequential(OrderedDict(fc=nn.Linear(dim, representation_size), tanh=nn.Tanh()))
        )
        self.head = nn.Linear(representation_size or dim, num_classes)
        self.init_weights(init, head_bias)

    @torch.no_grad()
    def init_weights(self, init, head_bias):
        """All: LayerNorm 1 and 0; biases of linear layers zero, of the head head_bias.
        google  MLP, out, and each of q, k, v xavier-uniform; convolutions lecun-normal
        pycls   MLP and the stacked q, k, v (std √2 smaller) xavier-uniform, out torch's default;
                patches N(0, 1/fan_in); 3×3 torch's default and 1×1 N(0, 2/D), until March 2022
        timm    all linear layers, head and positions too, N(0, 0.02²), which timm cuts at 100 of
                these deviations, class token N(0, 1e-6²), convolutions torch's default
        google and pycls: zero class token, head weight and patch bias, positions N(0, 0.02²), MLP
        biases N(0, 1e-6²), representation layer lecun-normal."""
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        convs = [module for module in self.patch_embed.modules() if isinstance(module, nn.Conv2d)]
        for linear in linears:
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.constant_(self.head.bias, head_bias)
        if init == "timm":
            for weight in (self.pos_embed, *(linear.weight for linear in linears)):
                nn.init.normal_(weight, std=0.02)
            if self.cls_token is not None:
                nn.init.normal_(self.cls_token, std=1e-6)
            return
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        if isinstance(self.pre_logits, nn.Sequential):
            lecun_normal_(self.pre_logits.fc.weight)
        if init == "google":
            for conv in convs:
                lecun_normal_(conv.weight)
        else:
            weight = self.patch_embed.proj.weight
            variance = 1 / weight[0].numel() if len(convs) == 1 else 2 / len(weight)
            nn.init.normal_(weight, std=math.sqrt(variance))
        for block in self.blocks:
            for weight in block.attn.qkv.weight.chunk(3 if init == "google" else 1):
                nn.init.xavier_uniform_(weight)
            if init == "google":
                nn.init.xavier_uniform_(block.attn.proj.weight)
            for linear in (block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)

    @property
    def intermediates(self):
        """{name: (kind, stage)} of what forward's out can ask for: "stem" (B, N, D), per block the
        attention maps (B, H, N, N) and the residual stream (B, N, D) after attention and after MLP,
        "pre_logits" (B, D). Stages count from 1, the stem is 0."""
        names = {"stem": ("stem", 0)}
        for i in range(len(self.blocks)):
            names |= block_intermediates(f"blocks.{i}", stage=1)
        return names | {"pre_logits": ("representation", 1)}

    def forward(self, x, out=None, skip=None):
        """Logits (B, num_classes). out: dict whose keys, from intermediates, get their values.
        skip: name of an attention or MLP to leave out, its residual branch then adds nothing."""
        check_images(x, self.image_size)
        if out is not None or skip is not None:
            check_names(self.intermediates, out, skip)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, h·w, D)
        if self.cls_token is None:
            x = x.contiguous()  # else each norm would copy it
        else:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = record(out, "stem", self.pos_drop(x + self.pos_embed))
        window = None
        if self.kernel_size is not None:  # no buffer: off the meta device it would stay unfilled
            window = neighbourhood(self.grid, self.kernel_size, self.prefix_tokens, x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, window, out, skip, f"blocks.{i}")
        x = self.norm(x)
        x = self.pre_logits(x[:, 0] if self.pool == "cls" else x.mean(dim=1))  # (B, D)
        x = F.normalize(x) if self.unit_norm else x
        return self.head(record(out, "pre_logits", x))


class Pooling(nn.Module):
    """Halves the map by a depthwise convolution, a linear layer keeps the class token in step."""

    def __init__(self, dim, wider):
        super().__init__()
        self.conv = nn.Conv2d(dim, wider, 3, stride=2, padding=1, groups=dim)
        self.fc = nn.Linear(dim, wider)

    def forward(self, x, cls):
        return self.conv(x), self.fc(cls)


class Stage(nn.Module):
    """Pooling (but for the first stage), then blocks over the class token and the map."""

    def __init__(self, pool, blocks):
        super().__init__()
        self.pool = pool
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, cls, out, skip, name):
        if self.pool is not None:
            x, cls = self.pool(x, cls)
        grid = x.shape[2:]
        x = torch.cat([cls, x.flatten(2).transpose(1, 2)], dim=1)  # (B, N, D)
        record(out, "stem" if self.pool is None else f"{name}.pool", x)
        for i, block in enumerate(self.blocks):
            x = block(x, None, out, skip, f"{name}.blocks.{i}")
        return x[:, 1:].transpose(1, 2).unflatten(2, grid), x[:, :1]  # (B, D, h, w), (B, 1, D)


class PiT(nn.Module):
    """Pooling-based ViT (2103.16302); the defaults are PiT-Ti at 224. Park & Kim's for CIFAR has
    patch_size=2, stride=1. Stage i has depth[i] blocks of heads[i]·head_dim channels; the other
    arguments are ViT's. Initialisation is torch's, but class token and position embedding are
    N(0, 0.02²), as in timm; head_bias is added to the head's."""

    def __init__(
        self,
        *,
        image_size=224,
        patch_size=16,
        stride=8,
        num_classes=1000,
        depth=(2, 6, 4),
        heads=(2, 4, 8),
        head_dim=32,
        qkv_bias=True,
        gelu="exact",
        dropout=0.0,
        drop_path=0.0,
        head_bias=0.0,
    ):
        super().__init__()
        check_choices(gelu=(gelu, "exact", "tanh"))
        check_rates(dropout=dropout, drop_path=drop_path)
        if min(*depth, *heads, patch_size, stride, head_dim, num_classes) < 1:
            raise ValueError(
                "depth, heads, patch_size, stride, head_dim and num_classes must be at least 1; "
                f"got {depth}, {heads}, {patch_size}, {stride}, {head_dim}, {num_classes}"
            )
        if image_size < patch_size or (image_size - patch_size) % stride:
            raise ValueError(
                f"image_size must be patch_size {patch_size} plus a multiple of stride {stride}, "
                f"got {image_size}"
            )
        if len(depth) != len(heads) or any(b % a for a, b in zip(heads, heads[1:])):
            raise ValueError(
                "depth and heads need one entry per stage, heads each a multiple of the one "
                f"before; got {depth} and {heads}"
            )
        self.image_size = image_size
        self.grid = ((image_size - patch_size) // stride + 1,) * 2
        self.prefix_tokens = 1
        dims = [head_dim * h for h in heads]
        self.patch_embed = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(3, dims[0], patch_size, stride=stride))
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, dims[0], *self.grid))  # class token: none
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[0]))
        self.pos_drop = nn.Dropout(dropout)
        rates = iter([drop_path * i / max(sum(depth) - 1, 1) for i in range(sum(depth))])
        common = dict(head_dim=head_dim, qkv_bias=qkv_bias, gelu=gelu, dropout=dropout)
        self.transformers = nn.ModuleList()
        for i, blocks in enumerate(depth):
            pool = Pooling(dims[i - 1], dims[i]) if i else None
            shape = dict(dim=dims[i], heads=heads[i], mlp_dim=4 * dims[i])
            stage = [Block(**shape, **common, drop_path=next(rates)) for _ in range(blocks)]
            self.transformers.append(Stage(pool, stage))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        self.head.bias.data += head_bias

    @property
    def intermediates(self):
        """As ViT's, blocks by their state-dict names, and "transformers.{i}.pool" after pooling."""
        names = {"stem": ("stem", 0)}
        for i, stage in enumerate(self.transformers):
            names |= {f"transformers.{i}.pool": ("pooling", i + 1)} if i else {}
            for j in range(len(stage.blocks)):
                names |= block_intermediates(f"transformers.{i}.blocks.{j}", stage=i + 1)
        return names | {"pre_logits": ("representation", len(self.transformers))}

    def forward(self, x, out=None, skip=None):
        """Logits (B, num_classes); out and skip as in ViT."""
        check_images(x, self.image_size)
        if out is not None or skip is not None:
            check_names(self.intermediates, out, skip)
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)  # (B, D, h, w)
        cls = self.cls_token.expand(len(x), -1, -1)
        for i, stage in enumerate(self.transformers):
            x, cls = stage(x, cls, out, skip, f"transformers.{i}")
        return self.head(record(out, "pre_logits", self.norm(cls[:, 0])))


def unknown(what, name, known, listing):
    """The error to raise: what was seen, the nearest of the known names, and all that is known."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ";"
    return ValueError(f"unknown {what} {name!r}{hint} known: {listing}")


def build(name: str, num_classes: int = 1000, image_size: int = 224, **overrides) -> nn.Module:
    """Variant name with any constructor argument overridden: vit_{micro,ti,s,b,l}P for each patch
    size P, vit_{p,c}_{1,4,18,36}gf, or pit_ti (up to image_size 64: patch_size 2, stride 1).
    A convolutional stem, vit_c or stem="conv" asked for, replaces one block (the L - 1 rule of
    Xiao et al.) unless depth is given too. ValueError for what is unknown or does not fit."""
    google = re.fullmatch(rf"vit_({'|'.join(VIT)})([1-9]\d*)", name)
    # a P that does not divide the image is a slip, unless it is listed or patch_size replaces it
    given = name in NAMES or "patch_size" in overrides
    typo = google and not given and image_size % int(google[2])
    pycls = re.fullmatch(rf"vit_([pc])_({'|'.join(VIT_GF)})", name)
    if google and not typo:
        network, row = ViT, VIT[google[1]] | dict(patch_size=int(google[2]))
    elif pycls:
        network, row = ViT, VIT_GF[pycls[2]] | dict(gelu="exact", init="pycls")
        row["stem"] = "conv" if pycls[1] == "c" else "patchify"
    elif name == "pit_ti":
        network, row = PiT, dict(patch_size=2, stride=1) if image_size <= 64 else {}
    else:
        listing = (
            f"vit_{{{','.join(VIT)}}}P with any patch size P that divides the image, "
            f"vit_{{p,c}}_{{{','.join(VIT_GF)}}}, pit_ti"
        )
        raise unknown("model", name, NAMES, listing)
    arguments = list(inspect.signature(network).parameters)
    for override in overrides:
        if override not in arguments:
            raise unknown(f"argument of {name}", override, arguments, ", ".join(arguments))
    row |= overrides
    if row.get("stem") == "conv":
        if pycls:
            row = STEM_GF.get(pycls[2], {}) | row
        if "depth" not in overrides:
            row["depth"] -= 1
    return network(num_classes=num_classes, image_size=image_size, **row)


def resize_pos_embed(
    pos_embed: torch.Tensor, grid: tuple[int, int], prefix_tokens: int = 1
) -> torch.Tensor:
    """ViT's position embedding (1, prefix_tokens + n², D), or PiT's (1, D, n, n), for another grid:
    bicubic with antialias, as timm (Google's fine-tuning: linear). Prefix rows are kept.
    ValueError if the other rows form no square."""
    if pos_embed.ndim == 4:
        prefix, tokens = None, pos_embed
    else:
        prefix, tokens = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
        side = math.isqrt(tokens.shape[1])
        if side == 0 or side**2 != tokens.shape[1]:
            raise ValueError(
                f"position embedding has {tokens.shape[1]} rows besides {prefix_tokens} for the "
                "class token, which form no square grid"
            )
        tokens = tokens.mT.unflatten(2, (side, side))  # (1, D, n, n)
    if tokens.shape[2:] == tuple(grid):
        return pos_embed
    tokens = F.interpolate(tokens.float(), grid, mode="bicubic", antialias=True)  # not for half
    tokens = tokens.to(pos_embed.dtype)
    if prefix is None:
        return tokens
    return torch.cat([prefix, tokens.flatten(2).mT], dim=1)  # (1, prefix_tokens + N, D)


def load_npz(model: ViT, path: str | Path, head: bool = True) -> None:
    """Fill model from a file of google-research/vision_transformer or big_vision (ViT, SAM, GSAM),
    made for images in [-1, 1]. Reads both block layouts, with class token or GAP, with or without
    representation layer, at any resolution (see resize_pos_embed), under an optimizer's prefix;
    ignores other arrays. head=False keeps the model's own head and representation layer.
    ValueError, and the model is as before, if the file is damaged or does not fit, OSError if it
    cannot be opened."""
    import numpy as np

    if not isinstance(model, ViT):
        raise ValueError(f"load_npz fills a ViT, got {type(model).__name__}")
    open(path, "rb").close()  # an OSError is the caller's
    try:
        if not zipfile.is_zipfile(path):  # which numpy would take for a pickle
            raise ValueError("it is no zip archive")
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # foreign bytes can raise anything
        raise ValueError(f"{path} is no readable .npz: {error}") from None
    prefixes = ("", "opt/target/", "params/", "params/img/")
    prefix = next((p for p in prefixes if f"{p}embedding/kernel" in arrays), None)
    if prefix is None:
        raise ValueError(
            f"{path} is no ViT: no 'embedding/kernel' behind any of {prefixes}, among "
            f"{len(arrays)} arrays such as {', '.join(sorted(arrays)[:3])}"
        )
    arrays = {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
    weights = {}

    def agree(part, key, in_model, argument):
        if (key in arrays) != in_model:
            raise ValueError(
                f"{path} has {'no' if in_model else 'a'} {part}, the model has "
                f"{'one' if in_model else 'none'}: build it with another {argument}"
            )

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

    def dense(name, keys, inputs, outputs):  # kernel (*inputs, *outputs); several keys are stacked
        kernels = [take(f"{key}/kernel", *inputs, *outputs) for key in keys]
        kernels = [kernel.reshape(math.prod(inputs), -1).T for kernel in kernels]  # (out, in)
        weights[f"{name}.weight"] = torch.cat(kernels)
        weights[f"{name}.bias"] = torch.cat([take(f"{k}/bias", *outputs).flatten() for k in keys])

    dim, depth, patch = model.norm.weight.numel(), len(model.blocks), model.patch_embed.proj
    attn, mlp_dim = model.blocks[0].attn, model.blocks[0].mlp.fc1.out_features
    heads = (attn.heads, attn.proj.in_features // attn.heads)
    if len(model.patch_embed.stem) or attn.qkv.bias is None:
        raise ValueError('load_npz needs a model with stem="patchify" and qkv_bias=True')
    agree("class token", "cls", model.cls_token is not None, "pool")
    names = (key.split("/") for key in arrays if key.startswith("Transformer/encoderblock_"))
    blocks = len({name for _, name, *_ in names})
    if blocks != depth:
        advice = (
            f"build it with depth={blocks}" if blocks else "blocks stacked by scan are not read"
        )
        raise ValueError(f"{path} has depth {blocks}, the model {depth}: {advice}")
    weights["patch_embed.proj.bias"] = take("embedding/bias", dim)
    kernel = take("embedding/kernel", *patch.kernel_size, 3, dim)
    weights["patch_embed.proj.weight"] = kernel.permute(3, 2, 0, 1)  # HWIO to OIHW
    if model.cls_token is not None:
        weights["cls_token"] = take("cls", 1, 1, dim)
    top_level = "pos_embedding" in arrays  # big_vision adds it before it prepends the class token
    key = "pos_embedding" if top_level else "Transformer/posembed_input/pos_embedding"
    shape = arrays[key].shape if key in arrays else ()
    pos_embed = take(key, 1, shape[-2] if len(shape) > 1 else 1, dim)
    if top_level:
        pos_embed = F.pad(pos_embed, (0, 0, model.prefix_tokens, 0))
    weights["pos_embed"] = resize_pos_embed(pos_embed, model.grid, model.prefix_tokens)
    released = "Transformer/encoderblock_0/LayerNorm_2/scale" in arrays  # else named by flax.linen
    second, attention, mlp = (2, 1, 3) if released else (1, 0, 0)
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attn, fc = f"{theirs}/MultiHeadDotProductAttention_{attention}", f"{theirs}/MlpBlock_{mlp}"
        norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0")
        dense(f"{ours}.attn.qkv", [f"{attn}/query", f"{attn}/key", f"{attn}/value"], (dim,), heads)
        dense(f"{ours}.attn.proj", [f"{attn}/out"], heads, (dim,))
        norm(f"{ours}.norm2", f"{theirs}/LayerNorm_{second}")
        dense(f"{ours}.mlp.fc1", [f"{fc}/Dense_0"], (dim,), (mlp_dim,))
        dense(f"{ours}.mlp.fc2", [f"{fc}/Dense_1"], (mlp_dim,), (dim,))
    norm("norm", "Transformer/encoder_norm")
    if head:
        has_layer, width = isinstance(model.pre_logits, nn.Sequential), model.head.in_features
        if any(key == "probe" or key.startswith("MAPHead_") for key in arrays):
            raise ValueError(
                f"{path} pools by attention (MAP head), for which there is no code here; "
                "head=False loads the rest"
            )
        agree("representation layer", "pre_logits/kernel", has_layer, "representation_size")
        if has_layer:
            dense("pre_logits.fc", ["pre_logits"], (dim,), (width,))
        classes = arrays["head/bias"].size if "head/bias" in arrays else model.head.out_features
        if classes != model.head.out_features:
            raise ValueError(
                f"{path} has {classes} classes, the model {model.head.out_features}: build it with "
                f"num_classes={classes} or load with head=False"
            )
        dense("head", ["head"], (width,), (classes,))
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
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Complexity of ViT variants.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: one of each kind")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side")
    parser.add_argument("--num-classes", type=int, default=1000, help="width of the head")
    parser.error = lambda message: parser.exit(2, f"vit.py: {message}; see --help\n")
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
