"""Tests of the whole repository: python -m pytest -q test_all.py (a quarter of an hour; in two
processes, as README.md has it, about ten minutes).

Sections follow the files. A test's oracle is a slow exact computation, a number of a paper, or a
function that has such an oracle of its own; digests and some counts keep what was once checked by
hand. What must hold between processes runs under torchrun with gloo on the CPU.

    python test_all.py --stress          kill, damage and mistype by the hundred: what was lost
    python test_all.py --device cuda     numbers on an accelerator beside the CPU's
"""

import argparse
import copy
import errno
import fcntl
import functools
import gc
import hashlib
import html
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from contextlib import chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision.transforms import v2

import adversarial
import alternet
import analyze
import data
import mixer
import resnet
import sam
import train
import vit
from sam import SAM, LookSAM

if __name__ != "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # pytest's oracles are the CPU's
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a script's background, too
    os.fsync = lambda file: None  # no test cuts the power
    # images of a range are made once for all tests
    data._shapes_range = functools.lru_cache(maxsize=None)(data._shapes_range.__wrapped__)
HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
DRAWS = importlib.util.find_spec("matplotlib") is not None
SHIPPED_SPLITS = dict(data.SHAPES_SPLITS)  # which tests make smaller


@pytest.fixture(autouse=True)
def process_left_as_it_was():
    """Whatever a test calls, and however it ends, the next one meets the same settings."""

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn

    def settings():
        return dict(
            threads=torch.get_num_threads(),
            dtype=torch.get_default_dtype(),
            gradients=torch.is_grad_enabled(),
            fast_attention=torch.backends.mha.get_fastpath_enabled(),
            algorithms=torch.are_deterministic_algorithms_enabled(),
            precision=(cuda.matmul.fp32_precision, cudnn.conv.fp32_precision),
            distributed=dist.is_initialized(),
            signals=[signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
            folder=os.getcwd(),
            environment={k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
        )

    before = settings()
    yield
    assert settings() == before


# ------------------------------------------------------------------------------------------- vit.py

CIFAR = dict(image_size=32, num_classes=100)
VIT_TINY = dict(image_size=16, patch_size=4, num_classes=5, dim=12, depth=2, heads=3, mlp_dim=24)
VIT_COST = [  # name, arguments, parameters, MACs, MACs + bias additions, activations
    ("vit_s32", {}, 22_878_952, 1_142_909_952, 1_145_003_368, 2_503_816),
    ("vit_s16", {}, 22_050_664, 4_598_882_304, 4_607_128_552, 11_948_272),
    ("vit_s14", {}, 22_004_584, 6_123_945_984, 6_134_703_592, 16_697_392),
    ("vit_s8", {}, 22_055_272, 22_405_742_592, 22_438_600_168, 80_843_056),
    ("vit_b32", {}, 88_224_232, 4_409_186_304, 4_413_372_136, 5_006_632),
    ("vit_b16", {}, 86_567_656, 17_563_828_224, 17_580_319_720, 23_895_544),
    ("vit_p_1gf", {}, 4_830_376, 1_079_390_208, 1_083_059_944, 5_520_748),
    ("vit_p_4gf", {}, 18_507_112, 3_901_710_336, 3_909_048_808, 11_040_496),
    ("vit_p_18gf", {}, 86_567_656, 17_563_828_224, 17_580_319_720, 23_895_544),
    ("vit_p_36gf", {}, 178_364_392, 35_971_567_616, 35_997_187_048, 37_136_840),
    ("vit_c_1gf", {}, 4_567_936, 1_075_860_096, 1_079_227_240, 5_628_385),
    ("vit_c_4gf", {}, 17_754_136, 3_958_940_928, 3_965_674_216, 11_255_770),
    ("vit_c_18gf", {}, 81_573_160, 17_711_491_584, 17_726_621_416, 24_024_268),
    ("vit_c_36gf", {}, 167_796_008, 35_002_025_984, 35_025_829_864, 36_606_008),
    ("vit_ti2", dict(CIFAR, qkv_bias=False), 5_403_172, 1_669_225_728, 1_672_827_748, 8_348_296),
    ("pit_ti", CIFAR, 4_582_436, 950_475_008, 954_069_796, 9_404_012),
]
XIAO_TABLE_1 = {  # GFLOPs, M parameters, M activations as printed
    "vit_p_1gf": (1.1, 4.8, 5.5),
    "vit_p_4gf": (3.9, 18.5, 11.1),
    "vit_p_18gf": (17.5, 86.6, 24.0),
    "vit_p_36gf": (35.9, 178.4, 37.3),
    "vit_c_1gf": (1.1, 4.6, 5.7),
    "vit_c_4gf": (4.0, 17.8, 11.3),
    "vit_c_18gf": (17.7, 81.6, 24.1),
    "vit_c_36gf": (35.0, 167.8, 36.7),
}


def tiny_vit(**overrides):
    """A float64 ViT whose head, biases and norms are random, so that all shows in the logits."""
    torch.manual_seed(0)
    model = vit.ViT(**{**VIT_TINY, **overrides}).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def tiny_images(count=2, size=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator)


def assert_every_parameter_learns(model, case):
    """Of a batch of four each gets a gradient, finite and not zero."""
    F.cross_entropy(model(tiny_images(4, 32)), torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{case}: no gradient for {key}"
        assert parameter.grad.isfinite().all(), f"{case}: {key} has {parameter.grad}"
        assert parameter.grad.any(), f"{case}: the gradient of {key} is zero"


def as_stored(arrays, *, prefix="", extra=False, squeezable=False):
    """Arrays as a file may have them: under a prefix, with moments, biases with leading axes."""
    stored = {f"{prefix}{key}": value for key, value in arrays.items()}
    if squeezable:
        stored = {k: v[None, None] if k.endswith("bias") else v for k, v in stored.items()}
    if extra:
        stored |= {f"opt/state/param_states/{key}/grad_ema": 9 * v for key, v in arrays.items()}
        stored["opt/state/step"] = np.array(17)
    return stored


def google_arrays(*, layout="released", cls=True, representation=None, grid=4):
    """A random ViT with VIT_TINY's sizes under the names and in the shapes
    of Google's .npz files."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
    second, attn, mlp = dict(released=(2, 1, 3), linen=(1, 0, 0))[layout]
    arrays = {"embedding/kernel": draw(4, 4, 3, 12), "embedding/bias": draw(12)}
    if cls:
        arrays["cls"] = draw(1, 1, 12)
    arrays["Transformer/posembed_input/pos_embedding"] = draw(1, grid**2 + cls, 12)
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        for norm in (f"{block}/LayerNorm_0", f"{block}/LayerNorm_{second}"):
            arrays |= {f"{norm}/scale": 1 + draw(12), f"{norm}/bias": draw(12)}
        attention = f"{block}/MultiHeadDotProductAttention_{attn}"
        for part in ("query", "key", "value"):
            arrays |= {
                f"{attention}/{part}/kernel": draw(12, 3, 4),
                f"{attention}/{part}/bias": draw(3, 4),
            }
        arrays |= {f"{attention}/out/kernel": draw(3, 4, 12), f"{attention}/out/bias": draw(12)}
        dense = f"{block}/MlpBlock_{mlp}/Dense"
        arrays |= {
            f"{dense}_0/kernel": draw(12, 24),
            f"{dense}_0/bias": draw(24),
            f"{dense}_1/kernel": draw(24, 12),
            f"{dense}_1/bias": draw(12),
        }
    arrays |= {
        "Transformer/encoder_norm/scale": 1 + draw(12),
        "Transformer/encoder_norm/bias": draw(12),
    }
    if representation:
        arrays |= {
            "pre_logits/kernel": draw(12, representation),
            "pre_logits/bias": draw(representation),
        }
    return arrays | {"head/kernel": draw(representation or 12, 5), "head/bias": draw(5)}


def google_forward(arrays, images):
    """Logits of such a ViT by the equations of its paper, in numpy: (B, 3, 16, 16) to (B, 5)."""
    w = {key: value.astype(np.float64) for key, value in arrays.items()}
    layout = "released" if "Transformer/encoderblock_0/LayerNorm_2/scale" in w else "linen"
    second, attn, mlp = dict(released=(2, 1, 3), linen=(1, 0, 0))[layout]

    def norm(x, key):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{key}/scale"] + w[f"{key}/bias"]

    def gelu(x):
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = np.zeros((len(images), 16, 12))
    for row in range(4):
        for column in range(4):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].numpy()
            x[:, 4 * row + column] = np.einsum("bchw,hwcd->bd", patch, w["embedding/kernel"])
    x = x + w["embedding/bias"]
    if "pos_embedding" in w:  # big_vision: positions first, class token after
        x = x + w["pos_embedding"]
    if "cls" in w:
        x = np.concatenate([np.repeat(w["cls"], len(x), axis=0), x], axis=1)
    if "pos_embedding" not in w:
        x = x + w["Transformer/posembed_input/pos_embedding"]
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_{attn}"
        y = norm(x, f"{block}/LayerNorm_0")
        q, k, v = (
            np.einsum("bnd,dhe->bhne", y, w[f"{attention}/{part}/kernel"])
            + w[f"{attention}/{part}/bias"][None, :, None]
            for part in ("query", "key", "value")
        )
        scores = np.exp(np.einsum("bhne,bhme->bhnm", q, k) / math.sqrt(4))
        scores /= scores.sum(-1, keepdims=True)
        y = np.einsum("bhnm,bhme->bnhe", scores, v)
        x = x + np.einsum("bnhe,hed->bnd", y, w[f"{attention}/out/kernel"])
        x = x + w[f"{attention}/out/bias"]
        dense = f"{block}/MlpBlock_{mlp}/Dense"
        y = norm(x, f"{block}/LayerNorm_{second}")
        y = gelu(y @ w[f"{dense}_0/kernel"] + w[f"{dense}_0/bias"])
        x = x + y @ w[f"{dense}_1/kernel"] + w[f"{dense}_1/bias"]
    x = norm(x, "Transformer/encoder_norm")
    x = x[:, 0] if "cls" in w else x.mean(axis=1)
    if "pre_logits/kernel" in w:
        x = np.tanh(x @ w["pre_logits/kernel"] + w["pre_logits/bias"])
    return x @ w["head/kernel"] + w["head/bias"]


# golden numbers


@pytest.mark.parametrize(
    "name, arguments, params, macs, macs_with_bias, acts",
    VIT_COST,
    ids=[row[0] for row in VIT_COST],
)
def test_vit_parameters_macs_and_activations_are_the_counted_ones(
    name, arguments, params, macs, macs_with_bias, acts
):
    with torch.device("meta"):
        model = vit.build(name, **arguments)
    cost = vit.complexity(model, arguments.get("image_size", 224))
    expected = dict(params=params, macs=macs, macs_with_bias=macs_with_bias, acts=acts)
    assert cost == expected, f"{name}: counted {cost}, expected {expected}"
    if name in XIAO_TABLE_1:
        gflops, millions, acts_printed = XIAO_TABLE_1[name]
        assert abs(cost["macs_with_bias"] / 1e9 - gflops) < 0.11, f"{name}: Table 1 has {gflops} GF"
        assert round(params / 1e6, 1) == millions, f"{name}: Table 1 has {millions} M parameters"
        assert abs(acts / 1e6 - acts_printed) < 0.2, f"{name}: Table 1 has {acts_printed} M acts"


def test_every_row_of_the_papers_tables_is_compared():
    assert XIAO_TABLE_1.keys() <= {row[0] for row in VIT_COST}
    assert CHEN_TABLE_7.keys() <= {row[0] for row in MIXER_COST}
    at_224 = {name for name, arguments, *_ in RESNET_COST if not arguments}
    assert CHEN_TABLE_2.keys() | XIAO_TABLE_2.keys() <= at_224


def test_complexity_counts_a_small_network_as_by_hand_and_leaves_it_alone():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    )
    model[0].weight.requires_grad_(False)
    cost = vit.complexity(model, 8)
    conv = 8 * 8 * 4 * 27
    assert cost == dict(
        params=8 + 650, macs=conv + 640, macs_with_bias=conv + 650, acts=8 * 8 * 4 + 4 * 4 * 4 + 10
    ), cost
    assert model.training and model[1].num_batches_tracked == 0
    assert model[0].weight.device.type == "cpu"


def test_vit_state_dict_has_the_names_and_shapes_of_timm():
    with torch.device("meta"):
        small, pit, conv = (
            vit.build(name).state_dict() for name in ("vit_s16", "pit_ti", "vit_c_4gf")
        )
    expected = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 197, 384),
        "patch_embed.proj.weight": (384, 3, 16, 16),
        "patch_embed.proj.bias": (384,),
    }
    for i in range(12):
        for layer, shape in (
            ("norm1", (384,)),
            ("attn.qkv", (1152, 384)),
            ("attn.proj", (384, 384)),
            ("norm2", (384,)),
            ("mlp.fc1", (1536, 384)),
            ("mlp.fc2", (384, 1536)),
        ):
            expected |= {f"blocks.{i}.{layer}.weight": shape, f"blocks.{i}.{layer}.bias": shape[:1]}
    expected |= {
        "norm.weight": (384,),
        "norm.bias": (384,),
        "head.weight": (1000, 384),
        "head.bias": (1000,),
    }
    assert {key: tuple(value.shape) for key, value in small.items()} == expected
    assert list(small) == list(expected) and len(small) == 152
    assert len(pit) == 160, f"PiT-Ti has {len(pit)} tensors, timm's 160"
    for key, shape in {
        "pos_embed": (1, 64, 27, 27),
        "cls_token": (1, 1, 64),
        "norm.weight": (256,),
        "patch_embed.conv.weight": (64, 3, 16, 16),
        "head.weight": (1000, 256),
        "transformers.1.pool.conv.weight": (128, 1, 3, 3),
        "transformers.1.pool.fc.weight": (128, 64),
        "transformers.2.blocks.3.attn.qkv.weight": (768, 256),
    }.items():
        assert tuple(pit[key].shape) == shape, f"{key}: {tuple(pit[key].shape)}, timm's {shape}"
    for i, channels in enumerate((48, 96, 192, 384)):
        assert conv[f"patch_embed.stem.{i}.conv.weight"].shape[0] == channels
        assert f"patch_embed.stem.{i}.bn.running_var" in conv
        assert f"patch_embed.stem.{i}.conv.bias" not in conv
    assert tuple(conv["patch_embed.proj.weight"].shape) == (384, 384, 1, 1)


# oracles

NPZ_FORMS = {
    "released names": dict(),
    "linen names": dict(layout="linen"),
    "optimizer prefix and moments": dict(prefix="opt/target/", extra=True),
    "params prefix": dict(layout="linen", prefix="params/"),
    "params/img prefix": dict(layout="linen", prefix="params/img/"),
    "no prefix and moments": dict(layout="linen", extra=True),
    "biases with leading axes": dict(squeezable=True),
    "average pooling": dict(cls=False),
    "big_vision with average pooling": dict(layout="linen", cls=False, top_level=True),
    "big_vision with class token": dict(layout="linen", top_level=True),
    "representation layer": dict(representation=7),
    "average pooling, representation layer": dict(layout="linen", cls=False, representation=7),
}


@pytest.mark.parametrize("form", NPZ_FORMS)
def test_load_npz_gives_the_logits_of_a_plain_numpy_vit(form, tmp_path):
    options = dict(NPZ_FORMS[form])
    top_level = options.pop("top_level", False)
    file = {key: options.pop(key) for key in ("prefix", "extra", "squeezable") if key in options}
    arrays = google_arrays(**options)
    if top_level:
        positions = arrays.pop("Transformer/posembed_input/pos_embedding")
        arrays["pos_embedding"] = positions[:, -16:]
    expected = google_forward(arrays, tiny_images())
    np.savez(tmp_path / "vit.npz", **as_stored(arrays, **file))
    model = tiny_vit(
        pool="cls" if "cls" in arrays else "gap", representation_size=options.get("representation")
    )
    vit.load_npz(model, tmp_path / "vit.npz")
    difference = np.abs(model(tiny_images()).detach().numpy() - expected).max()
    size = np.abs(expected).max()
    assert difference < 1e-12, f"{form}: logits differ by {difference:.1e}, they reach {size:.2f}"


@pytest.mark.parametrize("kernel_size", [None, 1, 3, 5])
def test_attention_is_the_softmax_over_the_tokens_in_the_window(kernel_size):
    torch.manual_seed(0)
    layer = vit.Attention(dim=12, heads=3, head_dim=5).double()
    x = torch.randn(2, 1 + 16, 12, dtype=torch.float64)
    mask = None if kernel_size is None else vit.neighbourhood((4, 4), kernel_size, 1)
    out = {"attn.weights": None}
    result = layer(x, mask, out)

    q, k, v = (part.reshape(2, 17, 3, 5) for part in layer.qkv(x).split(15, dim=-1))
    expected, maps = x.new_zeros(2, 17, 3, 5), x.new_zeros(2, 3, 17, 17)
    for token in range(17):
        seen = [0]
        for other in range(1, 17):
            rows = abs((token - 1) // 4 - (other - 1) // 4)
            columns = abs((token - 1) % 4 - (other - 1) % 4)
            if kernel_size is None or token == 0 or max(rows, columns) <= kernel_size // 2:
                seen.append(other)
        for sample in range(2):
            for head in range(3):
                scores = k[sample, seen, head] @ q[sample, token, head] / math.sqrt(5)
                weights = scores.exp() / scores.exp().sum()
                maps[sample, head, token, seen] = weights
                expected[sample, token, head] = weights @ v[sample, seen, head]
    expected = layer.proj(expected.flatten(2))
    for what, ours, oracle in (("output", result, expected), ("map", out["attn.weights"], maps)):
        difference = (ours - oracle).abs().max()
        assert difference < 1e-12, f"kernel {kernel_size}: {what} differs by {difference:.1e}"


def test_a_window_that_covers_the_map_is_global_attention():
    # a 4×4 map needs k = 7: then the window of each corner reaches the corner opposite
    everywhere, wide, narrow = (tiny_vit(kernel_size=k) for k in (None, 7, 5))
    images = tiny_images()
    assert tiny_vit(kernel_size=4).kernel_size is None, "Fig. 7's 8 × 8 of 8 × 8 tokens"
    assert vit.neighbourhood(wide.grid, wide.kernel_size, 1).all()
    assert torch.equal(everywhere(images), wide(images))
    difference = (everywhere(images) - narrow(images)).abs().max()
    assert difference > 1e-3, f"a 5×5 window changes the logits by {difference:.1e} only"


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_mlp_has_the_named_gelu(gelu):
    layer = vit.Mlp(dim=4, mlp_dim=4, gelu=gelu).double()
    for linear in (layer.fc1, layer.fc2):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    x = [-2.0, -0.5, 0.3, 1.7]
    exact = [u / 2 * (1 + math.erf(u / math.sqrt(2))) for u in x]
    tanh = [u / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) for u in x]
    result, expected = layer(torch.tensor(x).double()).tolist(), dict(exact=exact, tanh=tanh)[gelu]
    assert result == pytest.approx(expected, rel=1e-6), f"{gelu}: {result} instead of {expected}"
    assert exact != pytest.approx(tanh, rel=1e-5)


# mathematics


def test_resized_position_embedding_keeps_identity_constants_and_the_class_token():
    embedding = torch.randn(1, 1 + 16, 3)
    assert vit.resize_pos_embed(embedding, (4, 4)) is embedding
    flat = torch.cat([torch.randn(1, 1, 3), torch.full((1, 16, 3), 0.7)], dim=1)
    for grid in ((7, 7), (2, 2), (3, 5)):
        resized = vit.resize_pos_embed(flat, grid)
        assert resized.shape == (1, 1 + grid[0] * grid[1], 3)
        assert torch.equal(resized[:, 0], flat[:, 0])
        error = (resized[:, 1:] - 0.7).abs().max()
        assert error < 1e-6, f"a constant grows by {error:.1e} on {grid}"
    ramp = torch.arange(8.0).repeat_interleave(8).reshape(1, 64, 1)  # position = row
    rows = vit.resize_pos_embed(ramp, (16, 16), prefix_tokens=0).reshape(16, 16)
    assert torch.allclose(rows[4:12, 0], torch.arange(4, 12) / 2 - 0.25, atol=1e-5), rows[4:12, 0]
    assert torch.allclose(rows[:, :1], rows, atol=1e-5), "rows and columns are mixed up"
    half = vit.resize_pos_embed(embedding.bfloat16(), (7, 7))
    assert half.dtype == torch.bfloat16 and half.shape == (1, 50, 3)
    with pytest.raises(ValueError, match=r"17 rows besides 0 .* no square grid"):
        vit.resize_pos_embed(embedding, (7, 7), prefix_tokens=0)


def test_drop_path_keeps_the_expectation_and_drops_whole_samples():
    torch.manual_seed(0)
    layer, x = vit.DropPath(0.25), torch.ones(4000, 2, 3)
    y = layer(x)
    assert ((y == 0) | torch.isclose(y, torch.tensor(4 / 3))).all() and (y == y[:, :1, :1]).all()
    assert abs(y.mean() - 1) < 0.04, f"mean {y.mean():.3f} instead of 1"  # 4.4 standard errors
    assert layer.eval()(x) is x


def test_dropout_acts_where_google_has_it_and_is_replayed_by_the_seed():
    torch.manual_seed(0)
    layer, x = vit.Attention(dim=12, heads=3, head_dim=4, dropout=0.5), torch.randn(8, 17, 12)
    dropped, whole = layer(x), layer.eval()(x)
    kept = dropped != 0  # if attention weights were dropped too, what is kept would not be 2·whole
    assert torch.allclose(dropped[kept], 2 * whole[kept], atol=1e-6)
    assert abs(kept.float().mean() - 0.5) < 0.06, f"{kept.float().mean():.2f} kept"
    model = tiny_vit(dropout=0.2, drop_path=0.3).train()
    logits = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        logits.append(model(tiny_images()))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    widths = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.2
            module.register_forward_hook(lambda module, inputs, y: widths.append(y.shape[-1]))
    model(tiny_images())
    # the position embedding; then in each block attention's output, GELU's and the MLP's
    assert widths == [12, 12, 24, 12, 12, 24, 12], f"dropout acts on widths {widths}"


UNIFORM = 3**-0.5  # torch's default initialisation has standard deviation (3·fan_in)^-1/2
INIT_STD = {  # of the tensors of vit_ti16; those not named are zero or one
    "google": {
        "patch_embed.proj.weight": 0.0361,
        "pos_embed": 0.02,
        "blocks.0.attn.proj.weight": 0.0722,
        "blocks.0.mlp.fc1.weight": 0.0456,
        "blocks.0.mlp.fc2.weight": 0.0456,
        "blocks.0.mlp.fc1.bias": 1e-6,
        "blocks.0.mlp.fc2.bias": 1e-6,
    },
    "pycls": {
        "patch_embed.proj.weight": 0.0361,
        "pos_embed": 0.02,
        "blocks.0.attn.proj.weight": UNIFORM * 192**-0.5,
        "blocks.0.mlp.fc1.weight": 0.0456,
        "blocks.0.mlp.fc2.weight": 0.0456,
        "blocks.0.mlp.fc1.bias": 1e-6,
        "blocks.0.mlp.fc2.bias": 1e-6,
    },
    "timm": {
        "patch_embed.proj.weight": UNIFORM * 768**-0.5,
        "pos_embed": 0.02,
        "cls_token": 1e-6,
        "patch_embed.proj.bias": UNIFORM * 768**-0.5,
        "blocks.0.attn.proj.weight": 0.02,
        "blocks.0.mlp.fc1.weight": 0.02,
        "blocks.0.mlp.fc2.weight": 0.02,
        "head.weight": 0.02,
    },
}


def assert_centred(name, weight, std):
    """Zero on average; without a spread one in the scales of norms, zero elsewhere."""
    if std == 0:
        constant = "norm" in name and name.endswith("weight")
        assert (weight == constant).all(), f"{name} is not {int(constant)}"
    else:
        assert abs(weight.mean()) < 5 * std / weight.numel() ** 0.5, f"{name}: {weight.mean():.2e}"


@pytest.mark.parametrize("init", INIT_STD)
def test_initial_weights_have_the_authors_spread(init):
    torch.manual_seed(0)
    weights = vit.build("vit_ti16", init=init, depth=1).state_dict()
    q, k, v = weights.pop("blocks.0.attn.qkv.weight").chunk(3)
    expected = dict(google=0.0722, pycls=0.0722 / 2**0.5, timm=0.02)[init]
    for part in (q, k, v):
        assert abs(part.std() / expected - 1) < 0.02, f"qkv: {part.std():.4f}, not {expected:.4f}"
    for name, weight in weights.items():
        std = INIT_STD[init].get(name, 0)
        few = 0.2 if weight.numel() < 1000 else 0.02  # 192 values: a standard error of 5 %
        assert abs(weight.std() - std) <= few * std, f"{name}: {weight.std():.2e}, not {std:.2e}"
        assert_centred(name, weight, std)
    if init == "google":
        largest = weights["patch_embed.proj.weight"].abs().max()
        assert 0.080 < largest < 0.0821, f"lecun-normal reaches {largest:.4f}, cut at 0.0820"
        assert abs(q).max() > 0.99 * 0.125, "xavier-uniform over 192 + 192 reaches 0.125"


def test_initial_conv_stem_and_head_bias_are_as_documented():
    torch.manual_seed(0)
    weights = vit.build("vit_c_1gf", depth=1, head_bias=-10.0).state_dict()
    std = weights["patch_embed.proj.weight"].std()
    expected = math.sqrt(2 / 192)
    assert abs(std / expected - 1) < 0.02, f"1×1: {std:.4f} instead of {expected:.4f}"
    std = weights["patch_embed.stem.3.conv.weight"].std()
    expected = 1 / math.sqrt(3 * 96 * 9)  # torch's default
    assert abs(std / expected - 1) < 0.02, f"3×3: {std:.4f} instead of {expected:.4f}"
    assert (weights["head.bias"] == -10).all()
    images = torch.randn(2, 3, 224, 224)
    logits = vit.build("vit_c_1gf", depth=1, head_bias=-10.0)(images)
    assert (logits == -10).all(), "with a head of zero weight the logits are its bias"


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_dropout_of_a_vit_acts_on_tokens_with_their_positions(pool):
    model, x = tiny_vit(pool=pool, dropout=0.5), tiny_images()
    whole, dropped = dict(stem=None), dict(stem=None)
    model(x, out=whole)
    torch.manual_seed(0)
    model.train()(x, out=dropped)
    kept = dropped["stem"] != 0
    assert torch.allclose(dropped["stem"][kept], 2 * whole["stem"][kept])
    assert 0.4 < kept.double().mean() < 0.6


def test_a_convolutional_stem_is_as_by_hand():
    """3×3 convolutions of stride 2 without bias, BatchNorm, ReLU; a 1×1 with one (Xiao §3)."""
    torch.manual_seed(0)
    model = vit.build("vit_micro8", 5, 32, stem="conv", dim=16, heads=2, pool="gap").double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (0.1 if "var" in name else -0.4))
    w, x = below(model.state_dict(), "patch_embed."), tiny_images(2, 32)
    out = dict(stem=None)
    model(x, out=out)
    for i in range(3):
        x = F.conv2d(x, w[f"stem.{i}.conv.weight"], stride=2, padding=1)
        x = norm_by_hand(below(w, f"stem.{i}.bn."), x, training=False).clamp(min=0)
    x = torch.einsum("bihw,oi->bohw", x, w["proj.weight"][:, :, 0, 0])
    x = (x + w["proj.bias"][:, None, None]).flatten(2).mT + model.pos_embed
    assert (out["stem"] - x).abs().max() < 1e-12 and x.std() > 0.1


def test_pits_arguments_reach_its_parts():
    how = dict(dropout=0.3, drop_path=0.4, qkv_bias=False, gelu="tanh", head_bias=-3.0)
    torch.manual_seed(0)
    plain, model = vit.build("pit_ti", 5, 32), vit.build("pit_ti", 5, 32, **how)
    for one, middle in ((plain, 0), (model, -3)):
        assert (one.head.bias - middle).abs().max() < 256**-0.5
    blocks = [block for stage in model.transformers for block in stage.blocks]
    assert all(block.attn.qkv.bias is None for block in blocks)
    assert {block.mlp.act.approximate for block in blocks} == {"tanh"}
    assert plain.transformers[0].blocks[0].mlp.act.approximate == "none"
    assert [block.drop_path.rate for block in blocks] == pytest.approx(
        [0.4 * i / 11 for i in range(12)]
    )
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropouts == [0.3] * (1 + 2 * len(blocks)) and model.pos_drop.p == 0.3
    assert plain.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert plain.cls_token.std().item() == pytest.approx(0.02, rel=0.4)
    for size, (patch, stride) in {64: (2, 1), 72: (16, 8)}.items():
        conv = vit.build("pit_ti", 5, size).patch_embed.conv
        assert (conv.kernel_size[0], conv.stride[0]) == (patch, stride)


def test_resized_position_embeddings_are_bicubic_for_vit_and_for_pit():
    flat = torch.randn(1, 1 + 16, 3)
    map_of_pit = flat[:, 1:].mT.unflatten(2, (4, 4))
    expected = F.interpolate(map_of_pit, (7, 3), mode="bicubic", antialias=True)
    assert torch.equal(vit.resize_pos_embed(map_of_pit, (7, 3)), expected)
    assert torch.equal(vit.resize_pos_embed(flat, (7, 3))[:, 1:], expected.flatten(2).mT)


def test_googles_initialisation_of_a_convolutional_stem_is_lecun_normal():
    torch.manual_seed(0)
    embed = vit.build("vit_s16", stem="conv", init="google", depth=1).patch_embed
    for layer in (*(part.conv for part in embed.stem), embed.proj):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.08)
    assert not embed.proj.bias.any()


def test_local_attention_without_class_token_has_a_mask_of_the_map_alone():
    model = vit.build("vit_micro8", 5, 32, pool="gap", kernel_size=3)
    window = vit.neighbourhood(model.grid, model.kernel_size, model.prefix_tokens)
    assert window.shape == (16, 16) and window[0].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert vit.neighbourhood(model.grid, model.kernel_size, 0, "meta").is_meta, "where it is asked"
    maps = {"blocks.0.attn.weights": None}
    model(tiny_images(1, 32).float(), out=maps)
    assert ((maps["blocks.0.attn.weights"] > 0) == window).all()


@pytest.mark.parametrize(
    "name, overrides", [("vit_micro8", dict(kernel_size=3)), ("alter_resnet18", dict(width=8))]
)
def test_a_network_off_the_meta_device_computes_as_the_one_whose_weights_it_loads(name, overrides):
    model = train.build_model(name, 5, 32, **overrides).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)  # ViT's head begins at zero
    with torch.device("meta"):
        empty = train.build_model(name, 5, 32, **overrides)
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(model.state_dict())
    images = tiny_images(2, 32).float()
    assert torch.equal(empty(images), model(images)) and model(images).unique().numel() == 10


def test_sizes_without_a_row_in_the_papers_tables_have_the_published_parameters():
    """timm's of vit_large_patch16_224 and vit_tiny_patch16_224; ours, counted by hand."""
    per_block = 4 * 96 * 96 + 4 * 96 + 2 * 4 * 96 * 96 + 5 * 96 + 4 * 96
    micro = 4 * per_block + 3 * 64 * 96 + 96 + 17 * 96 + 96 + 2 * 96 + 12 * 97
    with torch.device("meta"):
        for name, classes, side, params in (
            ("vit_l16", 1000, 224, 304_326_632),
            ("vit_ti16", 1000, 224, 5_717_416),
            ("vit_micro8", 12, 32, micro),
        ):
            model = vit.build(name, classes, side)
            assert sum(p.numel() for p in model.parameters()) == params, name


# gradients


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("vit_micro8", {}),
        ("vit_micro8", dict(pool="gap", representation_size=16)),
        ("vit_micro8", dict(kernel_size=3, drop_path=0.1, dropout=0.1)),
        ("vit_micro8", dict(stem="conv", qkv_bias=False, head_dim=16)),
        ("vit_p_1gf", dict(patch_size=8, depth=1)),
        ("vit_c_1gf", dict(patch_size=8, depth=2)),
        ("pit_ti", dict(patch_size=4, stride=4, depth=(1, 1, 1))),
    ],
)
def test_every_vit_parameter_gets_a_finite_gradient(name, overrides):
    torch.manual_seed(0)
    model = vit.build(name, 10, 32, **overrides).double()
    torch.nn.init.normal_(model.head.weight)
    assert_every_parameter_learns(model, f"{name} {overrides}")


# promises


def test_a_convolutional_stem_takes_the_place_of_one_block():
    given = dict(stem_channels=(32, 64), stem_strides=(2, 7))
    with torch.device("meta"):
        depth = lambda name, **overrides: len(vit.build(name, **overrides).blocks)
        assert [depth(f"vit_c_{size}gf") for size in (1, 4, 18, 36)] == [11, 11, 11, 13]
        assert [depth(f"vit_p_{size}gf") for size in (1, 4, 18, 36)] == [12, 12, 12, 14]
        assert depth("vit_s16", stem="conv") == 11 and depth("vit_s16", stem="conv", depth=12) == 12
        assert depth("vit_c_4gf", stem="patchify") == 12
        plan = lambda model: [
            (layer.conv.out_channels, layer.conv.stride[0]) for layer in model.patch_embed.stem
        ]
        assert plan(vit.build("vit_micro8", 10, 32, stem="conv")) == [(24, 2), (48, 2), (96, 2)]
        assert plan(vit.build("vit_c_1gf")) == [(24, 2), (48, 2), (96, 2), (192, 2)]
        assert plan(vit.build("vit_c_36gf")) == [
            (64, 2),
            (128, 2),
            (128, 1),
            (256, 2),
            (256, 1),
            (512, 2),
        ]
        model, out = vit.build("vit_s14", stem="conv", **given), {"stem": None}
        assert plan(model) == [(32, 2), (64, 7)]
        model(torch.empty(2, 3, 224, 224), out=out)
    assert out["stem"].shape == (2, 1 + 16 * 16, 384), out["stem"].shape


def test_vit_intermediates_are_named_shaped_and_free_of_side_effects():
    model, images = tiny_vit(), tiny_images()
    assert model.intermediates == {
        "stem": ("stem", 0),
        "blocks.0.attn.weights": ("weights", 1),
        "blocks.0.attn": ("attention", 1),
        "blocks.0.mlp": ("mlp", 1),
        "blocks.1.attn.weights": ("weights", 1),
        "blocks.1.attn": ("attention", 1),
        "blocks.1.mlp": ("mlp", 1),
        "pre_logits": ("representation", 1),
    }
    out = dict.fromkeys(model.intermediates)
    assert torch.equal(model(images, out=out), model(images))
    special = {
        "blocks.0.attn.weights": (2, 3, 17, 17),
        "blocks.1.attn.weights": (2, 3, 17, 17),
        "pre_logits": (2, 12),
    }
    for name, value in out.items():
        shape = special.get(name, (2, 17, 12))
        assert value.shape == shape, f"{name} has shape {tuple(value.shape)} instead of {shape}"
    assert torch.equal(model.head(out["pre_logits"]), model(images))
    assert torch.equal(model.norm(out["blocks.1.mlp"])[:, 0], out["pre_logits"])
    block = model.blocks[1]
    value = block.attn.qkv(block.norm1(out["blocks.0.mlp"]))[..., 24:].unflatten(-1, (3, 4))
    mixed = (out["blocks.1.attn.weights"] @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
    difference = (out["blocks.0.mlp"] + block.attn.proj(mixed) - out["blocks.1.attn"]).abs().max()
    assert difference < 1e-12, f"the attention map explains the output up to {difference:.1e}"
    only = {"blocks.0.attn": None}
    model(images, out=only)
    assert list(only) == ["blocks.0.attn"]
    assert torch.equal(only["blocks.0.attn"], out["blocks.0.attn"])
    with pytest.raises(ValueError, match="intermediate 'blocks.2.mlp'; this model has stem, bl"):
        model(images, out={"blocks.2.mlp": None})


def test_unit_norm_gives_the_head_the_representation_divided_by_its_length():
    plain, unit = tiny_vit(), tiny_vit(unit_norm=True)
    unit.load_state_dict(plain.state_dict())
    a, b, images = {"pre_logits": None}, {"pre_logits": None}, tiny_images()
    plain(images, out=a), unit(images, out=b)
    expected = a["pre_logits"] / a["pre_logits"].square().sum(1, keepdim=True).sqrt()
    assert torch.allclose(b["pre_logits"], expected, rtol=1e-12)
    assert torch.equal(unit.head(b["pre_logits"]), unit(images))


def test_pit_intermediates_have_a_point_after_each_pooling():
    torch.manual_seed(0)
    model = vit.build("pit_ti", 10, 32, patch_size=4, stride=4, depth=(1, 2, 1)).eval()
    out = dict.fromkeys(model.intermediates)
    logits = model(torch.randn(2, 3, 32, 32), out=out)
    points = {name: tuple(value.shape[1:]) for name, value in out.items() if "attn" not in name}
    expected = {
        "stem": (65, 64),
        "transformers.0.blocks.0.mlp": (65, 64),
        "transformers.1.pool": (17, 128),
        "transformers.1.blocks.0.mlp": (17, 128),
        "transformers.1.blocks.1.mlp": (17, 128),
        "transformers.2.pool": (5, 256),
        "transformers.2.blocks.0.mlp": (5, 256),
        "pre_logits": (256,),
    }
    assert points == expected and list(points) == list(expected), points
    assert torch.equal(model.head(out["pre_logits"]), logits)
    assert torch.equal(model.norm(out["transformers.2.blocks.0.mlp"][:, 0]), out["pre_logits"])
    assert out["transformers.1.blocks.1.attn.weights"].shape == (2, 4, 17, 17)


@pytest.mark.parametrize(
    "name, units",
    [
        ("vit", ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]),
        ("pit", ["transformers.0.blocks.0.attn", "transformers.2.blocks.0.mlp"]),
    ],
)
def test_skipping_a_unit_of_a_vit_equals_one_whose_last_layer_is_zero(name, units):
    def make():
        torch.manual_seed(0)
        return (
            tiny_vit()
            if name == "vit"
            else vit.build("pit_ti", 5, 16, patch_size=4, stride=4, depth=(1, 1, 1)).double().eval()
        )

    images = tiny_images()
    whole = make()(images)
    for unit in units:
        model = make()
        out = dict.fromkeys(model.intermediates)
        skipped = model(images, skip=unit, out=out)
        assert torch.equal(model(images), whole), f"skipping {unit} once changed the model"
        last = "proj" if unit.endswith("attn") else "fc2"
        for parameter in model.get_submodule(f"{unit}.{last}").parameters():
            nn.init.zeros_(parameter)
        zeroed = dict.fromkeys(model.intermediates)
        assert torch.equal(skipped, model(images, out=zeroed)), unit
        assert torch.equal(out[unit], zeroed[unit]), unit
        if unit.endswith("attn"):
            model(images, skip=unit, out=zeroed)
            assert zeroed[f"{unit}.weights"] is None, "those of the call before"
        effect = (skipped - whole).abs().max()
        assert effect > 1e-3, f"skipping {unit} changes the logits by {effect:.1e} only"
    with pytest.raises(ValueError, match=f"unit 'stem' to skip; this model has {units[0]}, "):
        model(images, skip="stem")
    with pytest.raises(ValueError, match=r"out is a list; it is a dict such as \{'stem': None\}"):
        model(images, out=["stem"])


def test_pits_map_token_and_pooling_are_as_by_hand():
    """Tokens in the order of the map's rows; a depthwise convolution pools the map, a linear layer
    the class token (2103.16302, Fig. 4). The blocks have an oracle of their own."""
    torch.manual_seed(0)
    model = vit.build(
        "pit_ti", 5, 16, patch_size=4, stride=2, depth=(1, 1, 1), heads=(1, 2, 2), head_dim=4
    )
    model.double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    w, x = model.state_dict(), tiny_images()
    m = F.conv2d(x, w["patch_embed.conv.weight"], w["patch_embed.conv.bias"], stride=2)
    m = m + w["pos_embed"]
    cls = w["cls_token"].expand(2, -1, -1)
    for i, stage in enumerate(model.transformers):
        if i:
            p = f"transformers.{i}.pool."
            m = F.conv2d(m, w[p + "conv.weight"], w[p + "conv.bias"], 2, 1, groups=m.shape[1])
            cls = cls @ w[p + "fc.weight"].T + w[p + "fc.bias"]
        rows, columns = m.shape[2:]
        pixels = [m[:, :, r, c][:, None] for r in range(rows) for c in range(columns)]
        tokens = stage.blocks[0](torch.cat([cls, *pixels], 1))
        cls, m = tokens[:, :1], tokens[:, 1:].reshape(2, rows, columns, -1).permute(0, 3, 1, 2)
    z = F.layer_norm(cls[:, 0], (8,), w["norm.weight"], w["norm.bias"], 1e-6)
    expected = z @ w["head.weight"].T + w["head.bias"]
    difference = (model(x) - expected).abs().max()
    assert difference < 1e-12 and expected.std() > 0.1, f"differs by {difference:.1e}"


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        (
            "vit_sm16",
            {},
            r"unknown model 'vit_sm16', did you mean 'vit_s16'\? known: vit_\{micro,ti,s",
        ),
        (
            "vit_c_9gf",
            {},
            r"did you mean 'vit_c_.gf'\? .* vit_\{p,c\}_\{1gf,4gf,18gf,36gf\}, pit_ti",
        ),
        (
            "vit_s16",
            dict(droput=0.1),
            "unknown argument of vit_s16 'droput', did you mean 'dropout'",
        ),
        ("pit_ti", dict(pool="gap"), "unknown argument of pit_ti 'pool'"),
        ("vit_s14", dict(image_size=225), "a positive multiple of patch_size, got 225 and 14"),
        ("vit_s16", dict(num_classes=0), "num_classes must be at least 1, got 384, 12, 6, 0"),
        ("pit_ti", dict(num_classes=-1), "num_classes must be at least 1; got .*, -1"),
        ("vit_s16", dict(heads=5), "dim 384 is not a multiple of heads 5; or give head_dim"),
        ("vit_s16", dict(pool="mean"), "pool must be one of cls, gap; got 'mean'"),
        ("vit_s16", dict(gelu="erf"), "gelu must be one of exact, tanh; got 'erf'"),
        ("vit_s16", dict(init="zero"), "init must be one of google, pycls, timm; got 'zero'"),
        ("vit_s16", dict(kernel_size=4), "kernel_size must be odd, .* got 4"),
        ("vit_s16", dict(drop_path=1.0), "drop_path must be at least 0 and less than 1, got 1.0"),
        ("vit_s14", dict(stem="conv"), "a convolutional stem with patch_size 14 needs as many"),
        (
            "vit_s16",
            dict(stem="conv", dim=90),
            "a convolutional stem with patch_size 16 needs as many",
        ),
        ("vit_c_18gf", dict(patch_size=8), "whose product is 8; got .*64, 128, 128"),
        ("vit_s16", dict(stem_channels=(8,)), 'stem_channels and stem_strides need stem="conv"'),
        ("pit_ti", dict(image_size=225), "patch_size 16 plus a multiple of stride 8, got 225"),
        ("pit_ti", dict(heads=(2, 3, 8)), "heads each a multiple of the one before; got .*2, 3, 8"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(name, arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as error:
        vit.build(name, **arguments)
    assert "\n" not in str(error.value)


def test_images_of_another_size_are_refused():
    for model in (tiny_vit(), vit.build("pit_ti", 10, 32).double()):
        with pytest.raises(
            ValueError, match=r"built for images \(B, 3, .*\), got \(1, 3, 24, 24\)"
        ):
            model(tiny_images(1, 24))
        with pytest.raises(ValueError, match=r"built for images \(B, 3, .*\), got \(3, 16, 16\)"):
            model(tiny_images(1, 16)[0])


def change(arrays, **changes):
    """Arrays with some replaced, or dropped where the new one is None; '__' stands for '/'."""
    arrays = arrays | {key.replace("__", "/"): value for key, value in changes.items()}
    return {key: value for key, value in arrays.items() if value is not None}


@pytest.mark.parametrize(
    "changes, overrides, message",
    [
        (dict(head__bias=None), {}, "lacks 'head/bias'"),
        (dict(Transformer__encoder_norm__scale=None), {}, "lacks 'Transformer/encoder_norm/scale'"),
        (
            dict(Transformer__posembed_input__pos_embedding=None),
            {},
            "lacks 'Transformer/posembed_input/pos_embedding'",
        ),
        (
            dict(embedding__kernel=None),
            {},
            "is no ViT: no 'embedding/kernel' behind any of .*params/",
        ),
        (
            {},
            dict(heads=4),
            r"query/kernel' has shape \(12, 3, 4\) of float32, the model needs \(12, 4, 3\)",
        ),
        (
            {},
            dict(patch_size=8),
            r"'embedding/kernel' has shape \(4, 4, 3, 12\) of float32, "
            r"the model needs \(8, 8, 3, 12\)",
        ),
        (
            dict(embedding__bias=np.zeros(12, "V2")),
            {},
            r"'embedding/bias' has shape \(12,\) of \|V2",
        ),
        (
            {},
            dict(num_classes=7),
            "has 5 classes, the model 7: build it with num_classes=5 or load with head=False",
        ),
        ({}, dict(pool="gap"), "has a class token, the model has none: build it with another pool"),
        (dict(cls=None), {}, "has no class token, the model has one: build it with another pool"),
        ({}, dict(representation_size=7), "has no representation layer, the model has one"),
        (
            dict(pre_logits__kernel=np.zeros((12, 12))),
            {},
            "has a representation layer, the model has none: "
            "build it with another representation_size",
        ),
        (
            dict(MAPHead_0__probe=np.zeros((1, 1, 12))),
            {},
            "pools by attention .*; head=False loads",
        ),
        ({}, dict(depth=1), "has depth 2, the model 1: build it with depth=2"),
        ({}, dict(depth=3), "has depth 2, the model 3: build it with depth=2"),
        (dict(Transformer__posembed_input__pos_embedding=np.zeros(12)), {}, "has shape"),
        (dict(Transformer__posembed_input__pos_embedding=np.zeros(())), {}, "has shape"),
        (
            dict(Transformer__posembed_input__pos_embedding=np.zeros((1, 1, 12))),
            {},
            "no square grid",
        ),
        ({}, dict(qkv_bias=False), 'needs a model with stem="patchify" and qkv_bias=True'),
        ({}, dict(stem="conv"), 'needs a model with stem="patchify" and qkv_bias=True'),
        (
            dict(Transformer__posembed_input__pos_embedding=np.zeros((1, 16, 12))),
            {},
            "no square grid",
        ),
    ],
)
def test_npz_files_that_do_not_fit_are_refused_in_one_line_and_change_nothing(
    changes, overrides, message, tmp_path
):
    np.savez(tmp_path / "vit.npz", **change(google_arrays(), **changes))
    model = tiny_vit(**overrides)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        vit.load_npz(model, tmp_path / "vit.npz")
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_npz_of_scanned_blocks_is_refused(tmp_path):
    arrays = {k: v for k, v in google_arrays().items() if "encoderblock" not in k}
    np.savez(tmp_path / "vit.npz", **arrays)
    with pytest.raises(ValueError, match="depth 0, the model 2: blocks stacked by scan are not"):
        vit.load_npz(tiny_vit(), tmp_path / "vit.npz")


def test_load_npz_resizes_positions_and_can_leave_the_head(tmp_path):
    arrays = google_arrays(grid=7, representation=9)
    np.savez(tmp_path / "vit.npz", **arrays)
    model = tiny_vit(num_classes=3)
    head = model.head.weight.clone()
    vit.load_npz(model, tmp_path / "vit.npz", head=False)
    assert torch.equal(model.head.weight, head)
    file = torch.from_numpy(arrays["Transformer/posembed_input/pos_embedding"])
    expected = vit.resize_pos_embed(file, (4, 4))
    assert expected.shape == (1, 17, 12) and torch.equal(model.pos_embed.float(), expected)
    assert torch.equal(model.pos_embed[0, 0].float(), file[0, 0]), "class token's position changed"


def test_vit_main_prints_variants_and_refuses_an_unknown_one(capsys):
    vit.main(["vit_s16", "vit_b16", "--image-size", "384", "--num-classes", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        [name, f"{cost['params']:,}"]
        + [f"{cost[key] / 1e9:.3f}" for key in ("macs", "macs_with_bias")]
        + [f"{cost['acts'] / 1e6:.3f}"]
        for name in ("vit_s16", "vit_b16")
        for cost in [vit.complexity(vit.build(name, 10, 384), 384)]
    ]
    assert lines[1].split()[:2] == ["vit_s16", f"{21_815_434:,}"], lines
    for argv, line in (
        (["vit_x16"], "vit.py: unknown model 'vit_x16'"),
        (["--image-size", "225"], "vit.py: --image-size 225 fits none of them; see --help"),
        (["--size=9"], "vit.py: unrecognized arguments: --size=9; see --help"),
    ):
        with pytest.raises(SystemExit):
            vit.main(argv)
        refused = capsys.readouterr().err
        assert refused.startswith(line) and refused.count("\n") == 1, refused


# ----------------------------------------------------------------------------------------- mixer.py

MIXER_TINY = dict(
    image_size=16, patch_size=4, num_classes=5, dim=12, depth=2, token_mlp_dim=6, mlp_dim=24
)
MIXER_COST = [  # name, arguments, parameters, MACs, MACs + bias additions, activations
    ("mixer_s32", {}, 19_104_624, 1_002_426_368, 1_004_705_256, 2_278_888),
    ("mixer_s16", {}, 18_528_264, 3_776_958_464, 3_782_925_288, 5_966_824),
    ("mixer_s8", {}, 20_646_504, 14_875_086_848, 14_895_805_416, 20_718_568),
    ("mixer_b32", {}, 60_293_428, 3_237_722_112, 3_244_009_192, 6_287_080),
    ("mixer_b16", {}, 59_880_472, 12_601_767_936, 12_616_296_424, 14_528_488),
    ("mixer_b8", {}, 64_864_168, 50_057_951_232, 50_105_445_352, 47_494_120),
    ("mixer_l16", {}, 208_196_168, 44_547_678_208, 44_589_364_200, 41_685_992),
    ("mixer_ti2", CIFAR, 4_769_636, 1_208_771_584, 1_212_245_092, 3_473_508),
]
CHEN_TABLE_7 = {  # M parameters, truncated, not rounded; layers, hidden size, token and channel MLP
    "mixer_s32": (19, 8, 512, 256, 2048),
    "mixer_s16": (18, 8, 512, 256, 2048),
    "mixer_s8": (20, 8, 512, 256, 2048),
    "mixer_b32": (60, 12, 768, 384, 3072),
    "mixer_b16": (59, 12, 768, 384, 3072),
    "mixer_b8": (64, 12, 768, 384, 3072),
}


def tiny_mixer(**overrides):
    """A float64 Mixer whose head, biases and norms are random, so that all shows in the logits."""
    torch.manual_seed(0)
    model = mixer.Mixer(**{**MIXER_TINY, **overrides}).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def google_mixer_arrays():
    """A random Mixer with MIXER_TINY's sizes under the names and in the shapes of Google's .npz."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
    norm = lambda key: {f"{key}/scale": 1 + draw(12), f"{key}/bias": draw(12)}
    dense = lambda key, *shape: {f"{key}/kernel": draw(*shape), f"{key}/bias": draw(shape[-1])}
    arrays = dense("stem", 4, 4, 3, 12)
    for i in range(2):
        block = f"MixerBlock_{i}"
        arrays |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_1")
        arrays |= dense(f"{block}/token_mixing/Dense_0", 16, 6)
        arrays |= dense(f"{block}/token_mixing/Dense_1", 6, 16)
        arrays |= dense(f"{block}/channel_mixing/Dense_0", 12, 24)
        arrays |= dense(f"{block}/channel_mixing/Dense_1", 24, 12)
    return arrays | norm("pre_head_layer_norm") | dense("head", 12, 5)


def google_mixer_forward(arrays, images, gelu="tanh"):
    """Logits of such a Mixer by the equations of its paper, in numpy, token by token and channel by
    channel: (B, 3, 16, 16) to (B, 5)."""
    w = {key: value.astype(np.float64) for key, value in arrays.items()}

    def norm(x, key):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{key}/scale"] + w[f"{key}/bias"]

    def mlp(x, key):
        x = x @ w[f"{key}/Dense_0/kernel"] + w[f"{key}/Dense_0/bias"]
        if gelu == "tanh":
            x = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        else:
            x = x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return x @ w[f"{key}/Dense_1/kernel"] + w[f"{key}/Dense_1/bias"]

    x = np.zeros((len(images), 16, 12))
    for row in range(4):
        for column in range(4):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].numpy()
            x[:, 4 * row + column] = np.einsum("bchw,hwcd->bd", patch, w["stem/kernel"])
    x = x + w["stem/bias"]
    for i in range(2):
        block = f"MixerBlock_{i}"
        y = norm(x, f"{block}/LayerNorm_0")
        u = x.copy()
        for channel in range(12):  # Eq. 1: the columns
            u[:, :, channel] += mlp(y[:, :, channel], f"{block}/token_mixing")
        y = norm(u, f"{block}/LayerNorm_1")
        x = u.copy()
        for token in range(16):  # the rows
            x[:, token] += mlp(y[:, token], f"{block}/channel_mixing")
    x = norm(x, "pre_head_layer_norm").mean(axis=1)
    return x @ w["head/kernel"] + w["head/bias"]


# golden numbers


@pytest.mark.parametrize(
    "name, arguments, params, macs, macs_with_bias, acts",
    MIXER_COST,
    ids=[row[0] for row in MIXER_COST],
)
def test_mixer_parameters_macs_and_activations_are_the_counted_ones(
    name, arguments, params, macs, macs_with_bias, acts
):
    with torch.device("meta"):
        model = mixer.build(name, **arguments)
    cost = mixer.complexity(model, arguments.get("image_size", 224))
    expected = dict(params=params, macs=macs, macs_with_bias=macs_with_bias, acts=acts)
    assert cost == expected, f"{name}: counted {cost}, expected {expected}"
    if name in CHEN_TABLE_7:
        block = model.blocks[0]
        row = (
            params // 10**6,
            len(model.blocks),
            block.norm1.weight.numel(),
            block.mlp_tokens.fc1.out_features,
            block.mlp_channels.fc1.out_features,
        )
        assert row == CHEN_TABLE_7[name], f"{name}: {row}, Table 7 has {CHEN_TABLE_7[name]}"


def test_mixer_state_dict_has_the_names_and_shapes_of_timm():
    with torch.device("meta"):
        model = mixer.build("mixer_s32")
    expected = {"stem.proj.weight": (512, 3, 32, 32), "stem.proj.bias": (512,)}
    for i in range(8):
        for layer, shape in (
            ("norm1", (512,)),
            ("mlp_tokens.fc1", (256, 49)),
            ("mlp_tokens.fc2", (49, 256)),
            ("norm2", (512,)),
            ("mlp_channels.fc1", (2048, 512)),
            ("mlp_channels.fc2", (512, 2048)),
        ):
            expected |= {f"blocks.{i}.{layer}.weight": shape, f"blocks.{i}.{layer}.bias": shape[:1]}
    expected |= {
        "norm.weight": (512,),
        "norm.bias": (512,),
        "head.weight": (1000, 512),
        "head.bias": (1000,),
    }
    weights = model.state_dict()
    assert {key: tuple(value.shape) for key, value in weights.items()} == expected
    assert list(weights) == list(expected) and len(weights) == 102
    assert (model.image_size, model.grid, model.prefix_tokens) == (224, (7, 7), 0)


# oracles

MIXER_NPZ_FORMS = {
    "plain names": dict(),
    "optimizer prefix and moments": dict(prefix="opt/target/", extra=True),
    "params prefix": dict(prefix="params/"),
    "params/img prefix": dict(prefix="params/img/"),
    "no prefix and moments": dict(extra=True),
    "biases with leading axes": dict(squeezable=True),
    "exact GELU": dict(gelu="exact"),
}


@pytest.mark.parametrize("form", MIXER_NPZ_FORMS)
def test_load_npz_gives_the_logits_of_a_plain_numpy_mixer(form, tmp_path):
    options, arrays = dict(MIXER_NPZ_FORMS[form]), google_mixer_arrays()
    gelu = options.pop("gelu", "tanh")
    expected = google_mixer_forward(arrays, tiny_images(), gelu)
    np.savez(tmp_path / "mixer.npz", **as_stored(arrays, **options))
    model = tiny_mixer(gelu=gelu)
    mixer.load_npz(model, tmp_path / "mixer.npz")
    difference = np.abs(model(tiny_images()).detach().numpy() - expected).max()
    size = np.abs(expected).max()
    assert difference < 1e-12, f"{form}: logits differ by {difference:.1e}, they reach {size:.2f}"


# mathematics


@pytest.mark.parametrize("family", ["vit", "mixer"])
def test_stochastic_depth_ramps_draws_per_branch_and_keeps_the_expectation(family):
    build, tiny_model = dict(vit=(vit.build, tiny_vit), mixer=(mixer.build, tiny_mixer))[family]
    blocks = build(f"{family}_micro8", 10, 32, drop_path=0.3).blocks
    rates = [block.drop_path.rate for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3]), rates
    model = tiny_model(drop_path=0.25)
    image, block = tiny_images(1), model.blocks[1]
    branches = {
        "vit": {
            "attn": lambda x: block.attn(block.norm1(x)),
            "mlp": lambda x: block.mlp(block.norm2(x)),
        },
        "mixer": {
            "mlp_tokens": lambda x: block.mlp_tokens(block.norm1(x).mT).mT,
            "mlp_channels": lambda x: block.mlp_channels(block.norm2(x)),
        },
    }[family]
    first, last = branches
    names = [f"blocks.{i}.{branch}" for i in range(2) for branch in branches]
    whole, trained = dict.fromkeys(names), dict.fromkeys(names)
    with torch.no_grad():
        model(image, out=whole)
        torch.manual_seed(0)
        model.train()(image.expand(4000, -1, -1, -1), out=trained)
        stream = trained[f"blocks.0.{last}"]
        assert torch.allclose(stream, whole[f"blocks.0.{last}"]), "block 0 has rate 0"
        kept = []
        for name, branch in branches.items():
            added = trained[f"blocks.1.{name}"] - stream
            kept.append(added.flatten(1).abs().amax(dim=1) > 1e-9)
            expected = kept[-1][:, None, None] * branch(stream) / 0.75
            error = (added - expected).abs().max()
            assert error < 1e-12, f"{name}: neither 0 nor 4/3 of the branch, but {error:.1e} off"
            stream = trained[f"blocks.1.{name}"]
    shares = [
        (a & b).double().mean().item() for a in (kept[0], ~kept[0]) for b in (kept[1], ~kept[1])
    ]
    # independent masks; 0.03 is 3.8 standard errors
    assert shares == pytest.approx([9 / 16, 3 / 16, 3 / 16, 1 / 16], abs=0.03), shares
    mean = trained[f"blocks.1.{first}"].mean(dim=0) - whole[f"blocks.0.{last}"][0]
    branch = (whole[f"blocks.1.{first}"] - whole[f"blocks.0.{last}"])[0]
    ratio = (mean * branch).sum() / branch.square().sum()
    assert abs(ratio - 1) < 0.04, f"on average {ratio:.3f} of the branch is added"  # 4.4 std errors


@pytest.mark.parametrize("file", [vit, mixer])
def test_dropout_of_an_mlp_acts_after_the_nonlinearity(file):
    """Of hidden units of 1 GELU's half is dropped, the others doubled; then so the outputs."""
    layer = file.Mlp(dim=4, mlp_dim=4, gelu="exact", dropout=0.5)
    with torch.no_grad():
        for p, value in zip(layer.parameters(), (torch.zeros(4, 4), torch.ones(4), torch.eye(4))):
            p.copy_(value)
        layer.fc2.bias.zero_()
        torch.manual_seed(0)
        found = layer(torch.rand(100, 4)).unique()
    gelu_of_1 = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert torch.allclose(found, torch.tensor([0.0, 4 * gelu_of_1]), atol=1e-6), found


def test_dropout_of_a_mixer_acts_after_gelu_and_second_layer_and_is_replayed_by_the_seed():
    model = tiny_mixer(dropout=0.2, drop_path=0.3).train()
    logits = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        logits.append(model(tiny_images()))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    shapes = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.2
            module.register_forward_hook(lambda module, inputs, y: shapes.append((*y.shape[1:],)))
    model(tiny_images())
    expected = [(12, 6), (12, 16), (16, 24), (16, 12)] * 2
    assert shapes == expected, f"dropout acts on {shapes} instead of {expected}"


MIXER_INIT_STD = {  # of the tensors of mixer_s16; those not named are zero or one
    "google": {
        "stem.proj.weight": 768**-0.5,
        "blocks.0.mlp_tokens.fc1.weight": 196**-0.5,
        "blocks.0.mlp_tokens.fc2.weight": 256**-0.5,
        "blocks.0.mlp_channels.fc1.weight": 512**-0.5,
        "blocks.0.mlp_channels.fc2.weight": 2048**-0.5,
    },
    "timm": {
        "stem.proj.weight": 768**-0.5,
        "blocks.0.mlp_tokens.fc1.weight": (2 / 452) ** 0.5,
        "blocks.0.mlp_tokens.fc2.weight": (2 / 452) ** 0.5,
        "blocks.0.mlp_channels.fc1.weight": (2 / 2560) ** 0.5,
        "blocks.0.mlp_channels.fc2.weight": (2 / 2560) ** 0.5,
        "blocks.0.mlp_tokens.fc1.bias": 1e-6,
        "blocks.0.mlp_tokens.fc2.bias": 1e-6,
        "blocks.0.mlp_channels.fc1.bias": 1e-6,
        "blocks.0.mlp_channels.fc2.bias": 1e-6,
    },
}


@pytest.mark.parametrize("init", MIXER_INIT_STD)
def test_initial_mixer_weights_have_the_authors_spread(init):
    torch.manual_seed(0)
    model = mixer.build("mixer_s16", init=init, depth=1, head_bias=-10.0)
    weights = model.state_dict()
    assert (weights.pop("head.bias") == -10).all()
    for name, weight in weights.items():
        std = MIXER_INIT_STD[init].get(name, 0)
        few = 0.2 if weight.numel() < 3000 else 0.02  # 196 values: a standard error of 5 %
        assert abs(weight.std() - std) <= few * std, f"{name}: {weight.std():.2e}, not {std:.2e}"
        assert_centred(name, weight, std)
    weight = weights["blocks.0.mlp_channels.fc1.weight"]
    largest, normal = weight.abs().max() / weight.std(), 2 / 0.8796  # cut at 2 of the uncut's std
    limit = dict(google=normal, timm=3**0.5)[init]
    assert abs(largest / limit - 1) < 0.01, f"reaches {largest:.3f} std instead of {limit:.3f}"
    assert (model(torch.randn(2, 3, 224, 224)) == -10).all(), "a head of zero weight gives its bias"


# gradients


@pytest.mark.parametrize(
    "overrides", [{}, dict(dropout=0.1, drop_path=0.1, gelu="exact"), dict(init="timm", depth=1)]
)
def test_every_mixer_parameter_gets_a_finite_gradient(overrides):
    torch.manual_seed(0)
    model = mixer.build("mixer_micro8", 10, 32, **overrides).double()
    nn.init.normal_(model.head.weight)
    assert_every_parameter_learns(model, overrides)


# promises


def test_mixer_intermediates_are_named_shaped_and_free_of_side_effects():
    model, images = tiny_mixer(), tiny_images()
    assert model.intermediates == {
        "stem": ("stem", 0),
        "blocks.0.mlp_tokens": ("token mlp", 1),
        "blocks.0.mlp_channels": ("mlp", 1),
        "blocks.1.mlp_tokens": ("token mlp", 1),
        "blocks.1.mlp_channels": ("mlp", 1),
        "pre_logits": ("representation", 1),
    }
    out = dict.fromkeys(model.intermediates)
    assert torch.equal(model(images, out=out), model(images))
    for name, value in out.items():
        shape = (2, 12) if name == "pre_logits" else (2, 16, 12)
        assert value.shape == shape, f"{name} has shape {tuple(value.shape)} instead of {shape}"
    assert torch.equal(model.head(out["pre_logits"]), model(images))
    assert torch.equal(model.norm(out["blocks.1.mlp_channels"]).mean(dim=1), out["pre_logits"])
    first = model.stem.proj(images)
    assert torch.equal(out["stem"][:, 6], first[:, :, 1, 2]), "tokens are not the map by rows"
    only = {"blocks.0.mlp_tokens": None}
    model(images, out=only)
    assert list(only) == ["blocks.0.mlp_tokens"]
    assert torch.equal(only["blocks.0.mlp_tokens"], out["blocks.0.mlp_tokens"])
    with pytest.raises(ValueError, match="intermediate 'blocks.2.mlp_tokens'; this model has stem"):
        model(images, out={"blocks.2.mlp_tokens": None})


def test_skipping_an_mlp_of_a_mixer_equals_one_whose_second_layer_is_zero():
    images = tiny_images()
    whole = tiny_mixer()(images)
    for i in range(2):
        for branch in ("mlp_tokens", "mlp_channels"):
            name, model = f"blocks.{i}.{branch}", tiny_mixer()
            out = dict.fromkeys(model.intermediates)
            skipped = model(images, skip=name, out=out)
            before = list(out)[list(out).index(name) - 1]
            assert torch.equal(out[name], out[before]), f"{name} adds to {before}"
            assert torch.equal(model(images), whole), f"skipping {name} once changed the model"
            for parameter in model.get_submodule(name).fc2.parameters():
                nn.init.zeros_(parameter)
            assert torch.equal(skipped, model(images)), f"{name} skipped is not {name} of zeros"
            effect = (skipped - whole).abs().max()
            assert effect > 1e-3, f"skipping {name} changes the logits by {effect:.1e} only"
    units = "blocks.0.mlp_tokens, blocks.0.mlp_channels, blocks.1.mlp_tokens, blocks.1.mlp_channels"
    for name in ("stem", "blocks.0", "blocks.2.mlp_tokens", "pre_logits"):
        with pytest.raises(ValueError, match=f"unit '{name}' to skip; this model has {units}$"):
            model(images, skip=name)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        (
            "mixer_sm16",
            {},
            r"unknown model 'mixer_sm16', did you mean 'mixer_s16'\? known: mixer_\{m",
        ),
        (
            "vit_s16",
            {},
            r"unknown model 'vit_s16'.* known: mixer_\{micro,ti,s,b,l\}P with any patch ",
        ),
        (
            "mixer_s16",
            dict(tokens_mlp_dim=8),
            "unknown argument of mixer_s16 'tokens_mlp_dim', did you mean 'token_mlp_dim'",
        ),
        (
            "mixer_s16",
            dict(heads=8),
            "unknown argument of mixer_s16 'heads'.* known: image_size, pat",
        ),
        ("mixer_s14", dict(image_size=225), "mixer_s16'.* any patch size P that divides the image"),
        ("mixer_s16", dict(image_size=225), "a positive multiple of patch_size, got 225 and 16"),
        ("mixer_s16", dict(image_size=0), "a positive multiple of patch_size, got 0 and 16"),
        ("mixer_s16", dict(num_classes=0), "must be at least 1, got 512, 8, 256, 2048, 0"),
        (
            "mixer_s16",
            dict(token_mlp_dim=0),
            "mlp_dim and num_classes must be at least 1, got 512, 8, 0, 2048, 1000",
        ),
        ("mixer_s16", dict(depth=-1), "must be at least 1, got 512, -1, 256, 2048"),
        ("mixer_s16", dict(gelu="erf"), "gelu must be one of exact, tanh; got 'erf'"),
        ("mixer_s16", dict(init="pycls"), "init must be one of google, timm; got 'pycls'"),
        ("mixer_s16", dict(dropout=-0.1), "dropout must be at least 0 and less than 1, got -0.1"),
        ("mixer_s16", dict(drop_path=1.0), "drop_path must be at least 0 and less than 1, got 1.0"),
    ],
)
def test_a_mixer_that_cannot_be_built_is_refused_in_one_line(name, arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as error:
        mixer.build(name, **arguments)
    assert "\n" not in str(error.value)


def test_a_mixer_refuses_images_of_another_size():
    wrong = r"images \(B, 3, 16, 16\), got \(1, 3, 24, 24\); a Mixer takes"
    with pytest.raises(ValueError, match=wrong):
        tiny_mixer()(tiny_images(1, 24))


@pytest.mark.parametrize(
    "changes, overrides, message",
    [
        (dict(head__bias=None), {}, "lacks 'head/bias'"),
        (dict(pre_head_layer_norm__scale=None), {}, "lacks 'pre_head_layer_norm/scale'"),
        (dict(stem__kernel=None), {}, "lacks 'stem/kernel'"),
        (
            dict(MixerBlock_1__token_mixing__Dense_1__bias=None),
            {},
            "lacks 'MixerBlock_1/token_mixing/Dense_1/bias'",
        ),
        (
            dict(MixerBlock_0__token_mixing__Dense_1__bias=None),
            {},
            "lacks 'MixerBlock_0/token_mixing/Dense_1/bias'",
        ),
        (
            dict(MixerBlock_0__LayerNorm_0__scale=None),
            {},
            "is no Mixer: no 'MixerBlock_0/LayerNorm_0/scale' behind any of .*params/img/",
        ),
        (
            {},
            dict(patch_size=8),
            r"'stem/kernel' has shape \(4, 4, 3, 12\) of float32, the model needs \(8, 8, 3, 12\)",
        ),
        (
            {},
            dict(token_mlp_dim=8),
            r"token_mixing/Dense_0/kernel' has shape \(16, 6\) of float32, "
            r"the model needs \(16, 8\)",
        ),
        (
            dict(stem__bias=np.zeros(12, "V2")),
            {},
            r"'stem/bias' has shape \(12,\) of \|V2, the model",
        ),
        (
            {},
            dict(num_classes=7),
            "has 5 classes, the model 7: build it with num_classes=5 or load with head=False",
        ),
        ({}, dict(depth=1), "has depth 2, the model 1: build it with depth=2"),
        ({}, dict(depth=3), "has depth 2, the model 3: build it with depth=2"),
        (
            {},
            dict(image_size=32),
            "is for 16 tokens, the model for 64, and token MLPs cannot be "
            "resized: build it with image_size=16",
        ),
    ],
)
def test_npz_files_that_do_not_fit_a_mixer_are_refused_in_one_line_and_change_nothing(
    changes, overrides, message, tmp_path
):
    np.savez(tmp_path / "mixer.npz", **change(google_mixer_arrays(), **changes))
    model = tiny_mixer(**overrides)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        mixer.load_npz(model, tmp_path / "mixer.npz")
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["vit", "mixer"])
def test_npz_files_that_are_damaged_are_refused_by_name(family, tmp_path):
    file, arrays, make, hole = dict(
        vit=(vit, google_arrays(), tiny_vit, 5000),
        mixer=(mixer, google_mixer_arrays(), tiny_mixer, 3000),
    )[family]
    path = tmp_path / f"{family}.npz"
    np.savez_compressed(path, **arrays)
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[hole : hole + 100] = bytes(100)
    np.save(tmp_path / "array.npy", np.zeros(3))
    array = (tmp_path / "array.npy").read_bytes()
    for content in (b"", b"no archive", whole[:-100], bytes(broken), array):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path} is no readable .npz: ")) as error:
            file.load_npz(make(), path)
        assert "\n" not in str(error.value) and "pickle" not in str(error.value)
    np.savez(path, evil=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="is no readable .npz: .*allow_pickle=False"):
        file.load_npz(make(), path)
    with pytest.raises(FileNotFoundError, match="nowhere.npz"):
        file.load_npz(make(), tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match=f"load_npz fills a {type(make()).__name__}, got Linear"):
        file.load_npz(nn.Linear(2, 2), path)


def test_load_npz_can_leave_the_head_of_a_mixer(tmp_path):
    arrays = google_mixer_arrays()
    np.savez(tmp_path / "mixer.npz", **change(arrays, head__kernel=None))
    model = tiny_mixer(num_classes=3)
    head = model.head.weight.clone()
    mixer.load_npz(model, tmp_path / "mixer.npz", head=False)
    assert torch.equal(model.head.weight, head)
    kernel = torch.from_numpy(arrays["MixerBlock_1/token_mixing/Dense_0/kernel"])
    assert torch.equal(model.blocks[1].mlp_tokens.fc1.weight.float(), kernel.T)


def test_mixer_main_prints_variants_and_refuses_an_unknown_one(capsys):
    mixer.main(["mixer_s16", "mixer_b16", "--image-size", "384", "--num-classes", "10"])
    lines = capsys.readouterr().out.splitlines()
    # 576 instead of 196 tokens: 380·(2·256 + 1) more in each of 8 blocks; 990·513 fewer in the head
    params = 18_528_264 + 8 * 380 * 513 - 990 * 513
    assert [line.split() for line in lines[1:]] == [
        [name, f"{cost['params']:,}"]
        + [f"{cost[key] / 1e9:.3f}" for key in ("macs", "macs_with_bias")]
        + [f"{cost['acts'] / 1e6:.3f}"]
        for name in ("mixer_s16", "mixer_b16")
        for cost in [mixer.complexity(mixer.build(name, 10, 384), 384)]
    ]
    assert lines[1].split()[:2] == ["mixer_s16", f"{params:,}"], lines
    mixer.main(["--image-size", "40"])
    table = capsys.readouterr().out
    assert "\nmixer_s8  " in table and "\nmixer_b32     image_size must be a pos" in table
    for argv, line in (
        (["mixer_x16"], "mixer.py: unknown model 'mixer_x16'"),
        (["--image-size", "225"], "mixer.py: --image-size 225 fits none of them"),
    ):
        with pytest.raises(SystemExit):
            mixer.main(argv)
        assert capsys.readouterr().err.startswith(line)


# ---------------------------------------------------------------------------------------- resnet.py

RESNET_TINY = dict(num_classes=5, width=8, depth=(1, 2, 1, 1), stem="cifar")
RESNET_COST = [  # name, arguments, parameters, MACs, MACs + bias additions, activations
    ("resnet50", {}, 25_557_032, 4_089_184_256, 4_089_185_256, 11_315_688),
    ("resnet101", {}, 44_549_160, 7_801_405_440, 7_801_406_440, 16_433_640),
    ("resnet152", {}, 60_192_808, 11_513_626_624, 11_513_627_624, 22_755_816),
    ("resnet200", {}, 64_673_832, None, None, None),
    ("resnet50x2", {}, 98_004_072, 16_116_613_120, 16_116_614_120, 22_630_376),
    ("resnet101x2", {}, 173_868_136, 30_965_497_856, 30_965_498_856, 32_866_280),
    ("resnet152x2", {}, 236_350_568, 45_814_382_592, 45_814_383_592, 45_510_632),
    ("resnext50_32x4d", {}, 25_028_904, 4_230_479_872, 4_230_480_872, 14_602_216),
    ("preresnet50", {}, 25_549_352, 4_089_184_256, 4_089_185_256, 11_315_688),
    ("resnet50", CIFAR, 23_705_252, 1_298_014_208, 1_298_014_308, 3_432_548),
    ("resnet18", CIFAR, 11_220_132, 555_468_800, 555_468_900, 614_500),
    ("resnet101", CIFAR, 42_697_380, 2_510_168_064, 2_510_168_164, 5_103_716),
    ("resnext50_32x4d", CIFAR, 23_177_124, 1_344_151_552, 1_344_151_652, 4_505_700),
    ("preresnet50", CIFAR, 23_697_572, 1_298_014_208, 1_298_014_308, 3_432_548),
]
CHEN_TABLE_2 = {  # M parameters, truncated, not rounded
    "resnet50": 25,
    "resnet101": 44,
    "resnet152": 60,
    "resnet50x2": 98,
    "resnet101x2": 173,
    "resnet152x2": 236,
}
XIAO_TABLE_2 = {  # GFLOPs, M parameters, M activations as printed
    "resnet50": (4.1, 25.6, 11.3),
    "resnet101": (7.8, 44.5, 16.4),
    "resnet152": (11.5, 60.2, 22.8),
    "resnet200": (15.0, 64.7, 32.3),
}
RESNET_FORMS = {
    "basic": dict(bottleneck=False),
    "bottleneck": dict(),
    "ResNeXt": dict(groups=4, width_per_group=32),
    "pre-activation basic": dict(bottleneck=False, pre_activation=True),
    "pre-activation bottleneck": dict(pre_activation=True),
    "pre-activation ResNeXt": dict(pre_activation=True, groups=4, width_per_group=32),
}


def randomise(model):
    """The model in float64, with random norms and statistics, so that all shows in the logits."""
    torch.manual_seed(0)
    for key, tensor in model.double().state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and tensor.ndim == 1:
            tensor += 0.2 * torch.randn_like(tensor)
        elif key.endswith("rel_pos_bias"):
            tensor.normal_()
    return model.eval()


def tiny_resnet(**overrides):
    torch.manual_seed(0)
    return randomise(resnet.ResNet(**{**RESNET_TINY, **overrides}))


def recorded(model, images):
    """All intermediates: those of blocks what the blocks returned, unchanged since."""
    whole, out, passed = model(images), dict.fromkeys(model.intermediates), {}
    for name in list(out)[1:-1]:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, y, name=name: passed.update({name: y.clone()})
        )
    assert torch.equal(model(images, out=out), whole)
    assert list(passed) == list(out)[1:-1], list(passed)
    for name, y in passed.items():
        assert torch.equal(out[name], y), f"{name} was changed after it was recorded"
    assert torch.equal(model.fc(out["pre_logits"]), whole)
    return out


def below(weights, prefix):
    """The entries of a state dict under prefix, which is cut off."""
    return {
        key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)
    }


def norm_by_hand(w, x, training):
    mean, var = w["running_mean"], w["running_var"]
    if training:
        mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
    mean, var, scale, shift = (v[:, None, None] for v in (mean, var, w["weight"], w["bias"]))
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def window_attention_by_hand(w, x, *, heads, window):
    """One window, head and query at a time, from the state dict w of a WindowAttention."""
    channels = w["proj.weight"].shape[1]
    each, mixed = channels // heads, x.new_zeros(len(x), channels, *x.shape[2:])
    q, k, v = torch.einsum("bchw,dc->bdhw", x, w["qkv.weight"]).split(channels, dim=1)
    for top in range(0, x.shape[2], window):
        for left in range(0, x.shape[3], window):
            keys = [(i, j) for i in range(window) for j in range(window)]
            for head in range(heads):
                part = slice(head * each, (head + 1) * each)
                for row, column in keys:
                    query = q[:, part, top + row, left + column]
                    scores = torch.stack(
                        [
                            (query * k[:, part, top + i, left + j]).sum(dim=1) / math.sqrt(each)
                            + w["rel_pos_bias"][i - row + window - 1, j - column + window - 1]
                            for i, j in keys
                        ]
                    )
                    weights = scores.exp() / scores.exp().sum(dim=0)  # (keys, B)
                    mixed[:, part, top + row, left + column] = sum(
                        weight[:, None] * v[:, part, top + i, left + j]
                        for weight, (i, j) in zip(weights, keys)
                    )
    return torch.einsum("bdhw,cd->bchw", mixed, w["proj.weight"]) + w["proj.bias"][:, None, None]


def block_by_hand(w, x, stride, pre, *, training=False, scale=1.0, heads=None, window=None):
    """A block of ResNet or AlterNet from its state dict w; scale multiplies the residual branch."""
    norm = lambda key, y: norm_by_hand(below(w, f"{key}."), y, training)
    if "attn.qkv.weight" in w:
        gelu = lambda u: u / 2 * (1 + torch.erf(u / math.sqrt(2)))
        attn = lambda y: window_attention_by_hand(below(w, "attn."), y, heads=heads, window=window)
        if pre:
            return x + scale * attn(norm("bn2", F.conv2d(gelu(norm("bn1", x)), w["conv1.weight"])))
        return x + scale * norm("bn2", attn(gelu(norm("bn1", F.conv2d(x, w["conv1.weight"])))))

    last = 3 if "conv3.weight" in w else 2
    strided = last - 1  # of a bottleneck the second convolution, of a basic block the first

    def conv(i, y):
        kernel = w[f"conv{i}.weight"]
        return F.conv2d(
            y,
            kernel,
            stride=stride if i == strided else 1,
            padding=kernel.shape[-1] // 2,
            groups=y.shape[1] // kernel.shape[1],
        )

    branch, shortcut = x, x
    for i in range(1, last + 1):
        if pre:
            branch = norm(f"bn{i}", branch).clamp(min=0)
            if i == 1 and "downsample.0.weight" in w:
                shortcut = F.conv2d(branch, w["downsample.0.weight"], stride=stride)
            branch = conv(i, branch)
        else:
            branch = norm(f"bn{i}", conv(i, branch))
            branch = branch.clamp(min=0) if i < last else branch
    if pre:
        return shortcut + scale * branch
    if "downsample.0.weight" in w:
        shortcut = norm("downsample.1", F.conv2d(x, w["downsample.0.weight"], stride=stride))
    return (shortcut + scale * branch).clamp(min=0)


def network_by_hand(w, x, pre, *, training=False, blur=False, heads=(None,) * 4, window=None):
    """Logits of a ResNet or an AlterNet by its equations, from its state dict w."""
    kernel = w["conv1.weight"]
    x = F.conv2d(x, kernel, stride=2 if kernel.shape[-1] == 7 else 1, padding=kernel.shape[-1] // 2)
    if not pre:
        x = norm_by_hand(below(w, "bn1."), x, training).clamp(min=0)
    if kernel.shape[-1] == 7:
        x = F.max_pool2d(x, 3, stride=2, padding=1)
    for i in range(4):
        stage = below(w, f"layer{i + 1}.")
        for j in range(1 + max(int(key.split(".")[0]) for key in stage)):
            x = block_by_hand(
                below(stage, f"{j}."),
                x,
                2 if i and j == 0 else 1,
                pre,
                training=training,
                heads=heads[i],
                window=window,
            )
        x = blur_by_hand(x) if blur else x
    if pre:
        x = norm_by_hand(below(w, "norm."), x, training).clamp(min=0)
    return x.mean(dim=(2, 3)) @ w["fc.weight"].T + w["fc.bias"]


def blur_by_hand(x):
    """Mean of four pixels; what is missing at the border is taken from the border."""
    height, width, result = x.shape[2], x.shape[3], torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            for i in (row, min(row + 1, height - 1)):
                for j in (column, min(column + 1, width - 1)):
                    result[:, :, row, column] += x[:, :, i, j] / 4
    return result


# golden numbers


@pytest.mark.parametrize(
    "name, arguments, params, macs, macs_with_bias, acts",
    RESNET_COST,
    ids=[f"{name}-{arguments.get('image_size', 224)}" for name, arguments, *_ in RESNET_COST],
)
def test_resnet_parameters_macs_and_activations_are_the_counted_ones(
    name, arguments, params, macs, macs_with_bias, acts
):
    with torch.device("meta"):
        model = resnet.build(name, **arguments)
    cost = resnet.complexity(model, arguments.get("image_size", 224))
    expected = dict(params=params, macs=macs, macs_with_bias=macs_with_bias, acts=acts)
    for what, number in expected.items():
        assert number in (cost[what], None), f"{name}: {what} {cost[what]:,} instead of {number:,}"
    if name in CHEN_TABLE_2 and not arguments:
        millions = CHEN_TABLE_2[name]
        assert params // 10**6 == millions, f"{name}: {params:,}, Table 2 has {millions} M"
    if name in XIAO_TABLE_2 and not arguments:
        gflops, millions, acts_printed = XIAO_TABLE_2[name]
        assert round(cost["macs_with_bias"] / 1e9, 1) == gflops, f"{name}: {cost}, not {gflops} GF"
        assert round(params / 1e6, 1) == millions, f"{name}: Table 2 has {millions} M parameters"
        assert abs(cost["acts"] / 1e6 - acts_printed) < 0.1, f"{name}: {cost}, not {acts_printed} M"


# oracles


@pytest.mark.parametrize(
    "name, image_size",
    [("resnet18", 224), ("resnet18", 32), ("resnet50", 224), ("resnext50_32x4d", 224)],
)
def test_a_resnet_is_torchvisions_in_logits_gradients_and_statistics(name, image_size):
    published = getattr(torchvision.models, name)(num_classes=10)
    if image_size == 32:  # torchvision has no CIFAR stem
        published.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        published.maxpool = nn.Identity()
    randomise(published)
    with torch.device("meta"):
        model = resnet.build(name, 10, image_size)
    model = model.to_empty(device="cpu").double()
    assert list(model.state_dict()) == list(published.state_dict())
    model.load_state_dict(published.state_dict(), strict=True)
    images = tiny_images(2, 40 if image_size == 224 else 16)
    for training in (False, True):
        results = []
        for network in (published.train(training), model.train(training)):
            network.zero_grad()
            logits = network(images)
            F.cross_entropy(logits, torch.arange(2)).backward()
            gradients = {f"gradient of {key}": p.grad for key, p in network.named_parameters()}
            results.append({"logits": logits} | gradients | dict(network.named_buffers()))
        expected, ours = results
        for what, value in expected.items():
            error, size = (ours[what] - value).abs().max(), value.abs().max()
            assert error <= 1e-10 * size, (
                f"{name}, training {training}: {what} differs by {error:.1e} of {size:.1e}"
            )


@pytest.mark.parametrize("form", RESNET_FORMS)
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_a_resnet_follows_the_equations_written_out(form, stem):
    model = tiny_resnet(**RESNET_FORMS[form], stem=stem)
    images, pre = tiny_images(3, 40)[..., :36], model.pre_activation
    for training in (False, True):
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            result = model.train(training)(images)
        expected = network_by_hand(weights, images, pre, training=training)
        difference, size = (result - expected).abs().max(), expected.abs().max()
        assert difference < 1e-12 * size, (
            f"{form}, training {training}: logits differ by {difference:.1e}, they reach {size:.2f}"
        )
    keys = model.state_dict()
    assert ("norm.weight" in keys, "bn1.weight" in keys) == (pre, not pre)
    assert ("layer1.0.downsample.0.weight" in keys) == ("basic" not in form), "no need, or needed"
    assert ("layer2.0.downsample.1.weight" in keys) == (not pre), "a bare 1×1 convolution"


def test_blur_is_the_mean_of_four_pixels_at_each_stage_end_without_parameters():
    x = tiny_images(2, 5)[..., :4]
    difference = (resnet.blur2x2(x) - blur_by_hand(x)).abs().max()
    assert difference < 1e-15, f"2×2 means differ by {difference:.1e}"
    flat = torch.full((1, 2, 3, 3), 0.7)
    assert (resnet.blur2x2(flat) - flat).abs().max() < 1e-7, "a constant changes at the border"
    assert torch.equal(resnet.blur2x2(x[..., :1, :1]), x[..., :1, :1]), "one pixel changes"

    for form in ("bottleneck", "pre-activation basic"):
        plain, model = (tiny_resnet(**RESNET_FORMS[form], blur=blur) for blur in (False, True))
        model.load_state_dict(plain.state_dict(), strict=True)
        assert list(model.state_dict()) == list(plain.state_dict())
        images, out = tiny_images(), dict.fromkeys(model.intermediates)
        logits = model(images, out=out)
        expected = network_by_hand(model.state_dict(), images, model.pre_activation, blur=True)
        difference = (logits - expected).abs().max()
        assert difference < 1e-12, f"{form}: blurred, logits differ by {difference:.1e}"
        effect = (logits - plain(images)).abs().max()
        assert effect > 1e-3, f"{form}: blurring changes the logits by {effect:.1e} only"
        for i, j in enumerate((0, 1, 0, 0), 1):
            difference = (out[f"layer{i}.blur"] - blur_by_hand(out[f"layer{i}.{j}"])).abs().max()
            assert difference < 1e-13, f"{form}: stage {i} ends {difference:.1e} off a blur"


# mathematics


def test_stochastic_depth_of_a_resnet_rises_linearly_and_drops_branches_of_samples():
    for name in ("resnet18", "preresnet18"):
        model = resnet.build(name, 10, 32, width=8, drop_path=0.7)
        rates = [block.drop_path.rate for stage in model.stages for block in stage]
        assert rates == pytest.approx([i / 10 for i in range(8)]), f"{name}: {rates}"
    for form, more in RESNET_FORMS.items():
        block = tiny_resnet(**more, drop_path=0.5).layer2[0]
        x = torch.randn(32, 8 if "basic" in form else 32, 4, 4, dtype=torch.float64)
        assert block.drop_path.rate == 1 / 8
        block.drop_path.rate = 0.4
        block.drop_path.train()
        torch.manual_seed(0)
        with torch.no_grad():
            result = block(x)
        without, kept = (
            block_by_hand(block.state_dict(), x, 2, block.pre_activation, scale=scale)
            for scale in (0, 1 / 0.6)
        )
        distances = [
            (result - expected).flatten(1).abs().amax(dim=1) for expected in (without, kept)
        ]
        nearest = torch.minimum(*distances).max()
        assert nearest < 1e-12, f"{form}: neither the shortcut nor 1/0.6 branch: {nearest:.1e} off"
        dropped = (distances[0] < 1e-12).sum().item()
        assert 4 <= dropped <= 22, f"{form}: {dropped} of 32 samples dropped at a rate of 0.4"


@pytest.mark.parametrize("form", RESNET_FORMS)
def test_zero_init_makes_a_resnet_a_chain_of_shortcuts(form):
    torch.manual_seed(0)
    overrides = {**RESNET_TINY, **RESNET_FORMS[form]}
    model = resnet.ResNet(**overrides, zero_init=True).double()
    out = dict.fromkeys(model.intermediates)
    model(tiny_images(), out=out)  # in training mode, as the first step
    x, usual = out["stem"], resnet.ResNet(**overrides).double()
    for name, stride in (
        ("layer1.0", 1),
        ("layer2.0", 2),
        ("layer2.1", 1),
        ("layer3.0", 2),
        ("layer4.0", 2),
    ):
        shortcut = partial(
            block_by_hand, x=x, stride=stride, pre=model.pre_activation, training=True, scale=0
        )
        added = out[name] - shortcut(model.get_submodule(name).state_dict())
        assert added.abs().max() < 1e-12, f"{form}: {name} adds {added.abs().max():.1e}"
        block = usual.get_submodule(name)
        added = block(x) - shortcut(block.state_dict())
        assert added.abs().max() > 1e-3, f"{form}: {name} adds nothing without zero_init"
        x = out[name]


@pytest.mark.parametrize("form", RESNET_FORMS)
def test_branches_of_zero_init_learn(form):
    torch.manual_seed(0)
    model = resnet.ResNet(**RESNET_TINY, **RESNET_FORMS[form], zero_init=True).double()
    F.cross_entropy(model(tiny_images(4)), torch.arange(4)).backward()
    for i, stage in enumerate(model.stages, 1):
        for j, block in enumerate(stage):
            largest = max(
                p.grad.abs().max()
                for key, p in block.named_parameters()
                if key.endswith("weight") and "downsample" not in key
            )
            assert largest > 1e-6, f"{form}: no weight of the branch of layer{i}.{j} has a gradient"


@pytest.mark.parametrize("form", RESNET_FORMS)
@pytest.mark.parametrize("init", ["torchvision", "torch"])
def test_initial_resnet_weights_have_the_named_spread(form, init):
    torch.manual_seed(0)
    model = resnet.ResNet(**RESNET_FORMS[form], width=32, depth=(1, 1, 1, 1), init=init)
    seen = 0
    for key, weight in model.state_dict().items():
        few = 3 / weight.numel() ** 0.5  # 4 to 7 standard errors, of a normal or a uniform sample
        if weight.ndim == 4:
            out, fan_in = weight.shape[0], weight[0].numel()
            pixels = weight[0, 0].numel()
            torchvisions = init == "torchvision"
            std = (2 / (out * pixels)) ** 0.5 if torchvisions else UNIFORM * fan_in**-0.5
            assert abs(weight.std() / std - 1) < few, f"{key}: {weight.std():.4f}, not {std:.4f}"
            reach = weight.abs().max() / weight.std()
            assert (reach > 2.3) == torchvisions, f"{key}: a uniform ends at 1.73, not {reach:.2f}"
            seen += 1
        elif key.startswith("fc."):
            std = UNIFORM * model.fc.in_features**-0.5  # torch's default for both
            assert abs(weight.std() / std - 1) < max(few, 0.02), f"{key}: {weight.std():.4f}"
        elif weight.is_floating_point():
            constant = 1 if key.endswith(("weight", "running_var")) else 0
            assert (weight == constant).all(), f"{key} is not {constant}"
    assert seen == 1 + (8 + 3 if "basic" in form else 12 + 4), f"{seen} convolutions"


# gradients


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("resnet18", {}),
        ("resnet50", dict(blur=True, drop_path=0.1)),
        ("resnext50_32x4d", {}),
        ("preresnet18", dict(stem="imagenet")),
        ("preresnet50", dict(drop_path=0.1, blur=True)),
        ("preresnet50", dict(groups=2, width_per_group=32)),
        ("resnet50x2", {}),
    ],
)
def test_every_resnet_parameter_gets_a_finite_gradient(name, overrides):
    torch.manual_seed(0)
    width = 16 if name.endswith("x2") else 32 if name.startswith("resnext") else 8
    model = resnet.build(name, 10, 32, **{"width": width, "depth": (1, 2, 1, 1), **overrides})
    assert_every_parameter_learns(model.double(), f"{name} {overrides}")


# promises


def test_names_of_resnets_give_the_depth_width_order_and_stem():
    depths = {
        "18": (2, 2, 2, 2),
        "34": (3, 4, 6, 3),
        "50": (3, 4, 6, 3),
        "101": (3, 4, 23, 3),
        "152": (3, 8, 36, 3),
        "200": (3, 24, 36, 3),
    }  # He et al., Table 1
    with torch.device("meta"):
        for name in [*resnet.NAMES, "resnet18x2", "preresnet50x2"]:
            model = resnet.build(name)
            size = re.search(r"\d+", name)[0]
            assert tuple(len(stage) for stage in model.stages) == depths[size], name
            x2, wide = 1 + name.endswith("x2"), 1 if size in ("18", "34") else 4
            assert model.conv1.weight.shape == (64 * x2, 3, 7, 7), name
            assert model.fc.weight.shape == (1000, 512 * x2 * wide), name
            assert model.pre_activation == name.startswith("pre"), name
            shape = (128, 4, 3, 3) if name.startswith("resnext") else (64 * x2, 64 * x2, 3, 3)
            assert model.layer1[0].conv2.weight.shape == shape, f"{name}: {shape}"
        for image_size, kernel, side in ((32, 3, 32), (64, 3, 64), (65, 7, 17), (224, 7, 56)):
            for name in ("resnet18", "preresnet18"):
                model, out = resnet.build(name, 10, image_size), {"stem": None, "layer4.1": None}
                model(torch.empty(2, 3, image_size, image_size), out=out)
                assert model.conv1.kernel_size == (kernel, kernel), f"{name} at {image_size}"
                assert out["stem"].shape == (2, 64, side, side), f"{image_size}: {out['stem']}"
                last = math.ceil(side / 8)
                assert out["layer4.1"].shape == (2, 512, last, last), f"{image_size}"
        assert resnet.build("resnet50", image_size=32, stem="imagenet").conv1.kernel_size == (7, 7)
        assert resnet.build("resnet50x2", width=64).fc.in_features == 2048
    for name, uniform in (("resnet18", False), ("preresnet18", True)):
        weight = resnet.build(name, 10, 32).conv1.weight
        reach = weight.abs().max() / weight.std()
        assert (reach < 2.3) == uniform, f"{name}: a uniform ends at 1.73 std, not {reach:.2f}"


@pytest.mark.parametrize("form", ["bottleneck", "pre-activation basic"])
def test_resnet_intermediates_are_named_shaped_and_free_of_side_effects(form):
    model, images = tiny_resnet(**RESNET_FORMS[form], stem="imagenet"), tiny_images(2, 64)[..., :40]
    assert model.intermediates == {
        "stem": ("stem", 0),
        "layer1.0": ("conv", 1),
        "layer2.0": ("conv", 2),
        "layer2.1": ("conv", 2),
        "layer3.0": ("conv", 3),
        "layer4.0": ("conv", 4),
        "pre_logits": ("representation", 4),
    }
    blurred = list(tiny_resnet(blur=True).intermediates.items())
    assert blurred[1:6] == [
        ("layer1.0", ("conv", 1)),
        ("layer1.blur", ("pooling", 1)),
        ("layer2.0", ("conv", 2)),
        ("layer2.1", ("conv", 2)),
        ("layer2.blur", ("pooling", 2)),
    ]
    assert len(blurred) == 7 + 4
    out = recorded(model, images)
    wide = 1 if "basic" in form else 4
    shapes = {
        "stem": (8, 16, 10),
        "layer1.0": (8 * wide, 16, 10),
        "layer2.0": (16 * wide, 8, 5),
        "layer2.1": (16 * wide, 8, 5),
        "layer3.0": (32 * wide, 4, 3),
        "layer4.0": (64 * wide, 2, 2),
        "pre_logits": (64 * wide,),
    }
    for name, value in out.items():
        assert value.shape == (2, *shapes[name]), f"{name}: {tuple(value.shape)}, {shapes[name]}"
    stem = F.conv2d(images, model.conv1.weight, stride=2, padding=3)
    stem = stem if model.pre_activation else model.bn1(stem).relu()
    assert torch.equal(out["stem"], F.max_pool2d(stem, 3, stride=2, padding=1))
    only = {"layer2.0": None}
    model(images, out=only)
    assert list(only) == ["layer2.0"] and torch.equal(only["layer2.0"], out["layer2.0"])
    with pytest.raises(ValueError, match="unknown intermediate 'layer1.blur'; this model has stem"):
        model(images, out={"layer1.blur": None})


@pytest.mark.parametrize("form", RESNET_FORMS)
def test_skipping_a_block_of_a_resnet_equals_one_whose_kernel_is_the_identity(form):
    images = tiny_images()
    whole = tiny_resnet(**RESNET_FORMS[form])(images)
    units = ["layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"]
    for name in units:
        model = tiny_resnet(**RESNET_FORMS[form])
        skipped = model(images, skip=name)
        assert torch.equal(model(images), whole), f"skipping {name} once changed the model"
        conv = model.get_submodule(name).conv2
        nn.init.dirac_(conv.weight, conv.groups)
        difference = (skipped - model(images)).abs().max()
        assert difference < 1e-12, f"{name} skipped is {difference:.1e} off the identity kernel"
        effect = (skipped - whole).abs().max()
        assert effect > 1e-4, f"skipping {name} changes the logits by {effect:.1e} only"
    for name in ("stem", "layer1.1", "layer5.0", "layer1", "pre_logits"):
        with pytest.raises(ValueError, match=f"unit '{name}' to skip; .* has {', '.join(units)}$"):
            model(images, skip=name)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        (
            "resnet51",
            {},
            r"unknown model 'resnet51', did you mean 'resnet.*'\? known: \(pre\)resne",
        ),
        (
            "resnet50x3",
            {},
            r"unknown model 'resnet50x3', did you mean 'resnet50x2'\? .* also with x2",
        ),
        ("resnext50_32x8d", {}, "did you mean 'resnext50_32x4d'.* at the end, resnext50_32x4d$"),
        ("preresnext50_32x4d", {}, "unknown model 'preresnext50_32x4d'"),
        ("vgg", {}, "unknown model 'vgg'; known: "),
        (
            "resnet50",
            dict(droppath=0.1),
            "argument of resnet50 'droppath', did you mean 'drop_path'",
        ),
        (
            "preresnet18",
            dict(heads=8),
            "unknown argument of preresnet18 'heads'.* known: num_classes",
        ),
        ("resnet18", dict(groups=32), "groups and width_per_group are for bottlenecks"),
        ("resnet34", dict(width_per_group=32), "groups and width_per_group are for bottlenecks"),
        ("resnet50", dict(depth=(3, 4, 6)), r"blocks of four stages, got \(3, 4, 6\)"),
        ("resnet50", dict(depth=50), "blocks of four stages, got 50"),
        ("resnet50", dict(depth=(3, 4, 6, 0)), r"blocks of four stages, got \(3, 4, 6, 0\)"),
        ("resnet50", dict(width=0), "must be at least 1, .* a multiple of 64; got 0, 1, 64"),
        ("resnet50", dict(groups=0), "must be at least 1, .* a multiple of 64; got 64, 0, 64"),
        ("resnet50", dict(width_per_group=-4), "must be at least 1, .* of 64; got 64, 1, -4"),
        (
            "resnext50_32x4d",
            dict(width=24),
            "width times width_per_group a multiple of 64; got 24, 32",
        ),
        ("resnet50", dict(stem="patch"), "stem must be one of imagenet, cifar; got 'patch'"),
        ("resnet50", dict(num_classes=0), "num_classes must be at least 1, got 0"),
        ("resnet50", dict(image_size=0), "image_size must be at least 1, got 0"),
        ("resnet50", dict(init="timm"), "init must be one of torchvision, torch; got 'timm'"),
        ("resnet50", dict(drop_path=1.0), "drop_path must be at least 0 and less than 1, got 1.0"),
    ],
)
def test_a_resnet_that_cannot_be_built_is_refused_in_one_line(name, arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as error:
        resnet.build(name, **arguments)
    assert "\n" not in str(error.value)


def test_resnet_main_prints_variants_and_refuses_an_unknown_one(capsys):
    resnet.main(["resnet50", "resnet18", "--image-size", "32", "--num-classes", "100"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "parameters GMACs with bias M activations".split()
    assert lines[1:] == [
        ["resnet50", "23,705,252", "1.298", "1.298", "3.433"],
        ["resnet18", "11,220,132", "0.555", "0.555", "0.615"],
    ], lines
    for argv, message in ((["resnet51"], "unknown model 'resnet51'"), (["--image"], "--image")):
        with pytest.raises(SystemExit):
            resnet.main(argv)
        assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------- alternet.py

ALTERNET_COST = [  # image size, attention blocks, parameters, MACs, MACs + bias additions, acts
    (32, (0, 0, 0, 0), 28_160_164, 1_369_317_376, 1_369_317_476, 3_481_700),  # Fig. 12a
    (32, (0, 0, 0, 1), 30_258_389, 1_403_658_240, 1_403_691_108, 3_577_956),
    (32, (0, 0, 0, 2), 32_356_614, 1_437_999_104, 1_438_064_740, 3_674_212),
    (32, (0, 0, 1, 2), 32_881_463, 1_473_126_400, 1_473_257_572, 3_866_724),
    (32, (0, 1, 1, 2), 33_012_840, 1_509_826_560, 1_510_088_804, 4_251_748),
    (32, (0, 1, 2, 2), 33_537_689, 1_544_953_856, 1_545_281_636, 4_444_260),
    (32, (0, 1, 3, 2), 34_062_538, 1_580_081_152, 1_580_474_468, 4_636_772),
    (32, None, 33_012_840, 1_509_826_560, 1_510_088_804, 4_251_748),  # Fig. 11
    (224, None, 35_915_038, 5_012_623_360, 5_013_828_584, 15_469_320),  # Fig. D.5
]
ALTERNET_TINY = dict(
    image_size=16,
    num_classes=5,
    width=8,
    depth=(1, 3, 2, 2),
    msa_blocks=(0, 1, 1, 1),
    window_size=2,
    heads=(1, 2, 3, 2),
    head_dim=5,
    stem="cifar",
)
ALTERNET_FORMS = {
    "pre-activation bottleneck": dict(),
    "pre-activation basic": dict(bottleneck=False),
    "pre-activation ResNeXt": dict(groups=4, width_per_group=32),
    "post-activation bottleneck": dict(pre_activation=False),
    "post-activation basic": dict(pre_activation=False, bottleneck=False),
    "post-activation ResNeXt": dict(pre_activation=False, groups=4, width_per_group=32),
}


def tiny_alternet(**overrides):
    torch.manual_seed(0)
    return randomise(alternet.AlterNet(**{**ALTERNET_TINY, **overrides}))


def sides_of_the_stages(image_size, stem):
    """By running convolutions of the kernels, strides and paddings of a ResNet."""
    x, kernel = torch.empty(1, 1, image_size, image_size, device="meta"), (1, 1, 3, 3)
    if stem == "imagenet":
        x = F.conv2d(x, torch.empty(1, 1, 7, 7, device="meta"), stride=2, padding=3)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
    sides = [x.shape[-1]]
    for _ in range(3):
        x = F.conv2d(x, torch.empty(kernel, device="meta"), stride=2, padding=1)
        sides.append(x.shape[-1])
    return sides


# golden numbers


@pytest.mark.parametrize(
    "image_size, msa_blocks, params, macs, macs_with_bias, acts", ALTERNET_COST
)
def test_alternet_parameters_macs_and_activations_are_the_counted_ones(
    image_size, msa_blocks, params, macs, macs_with_bias, acts
):
    overrides = {} if msa_blocks is None else dict(msa_blocks=msa_blocks)
    with torch.device("meta"):
        model = alternet.build(
            "alter_resnet50", 100 if image_size == 32 else 1000, image_size, **overrides
        )
    cost = alternet.complexity(model, image_size)
    expected = dict(params=params, macs=macs, macs_with_bias=macs_with_bias, acts=acts)
    assert cost == expected, f"{msa_blocks} at {image_size}: counted {cost}, expected {expected}"


@pytest.mark.parametrize(
    "name, image_size, overrides, rows",
    [  # C convolution, A attention
        ("alter_resnet50", 32, {}, "CCC CCCA CCCCCA CACA"),  # Fig. 11
        ("alter_resnet50", 64, {}, "CCC CCCA CCCCCA CACA"),
        ("alter_resnet50", 224, {}, "CCC CCCA CACACA CACA"),  # Fig. D.5
        ("alter_resnet50", 32, dict(msa_blocks=(0, 0, 0, 0)), "CCC CCCC CCCCCC CCCC"),
        ("alter_resnet50", 32, dict(msa_blocks=(0, 0, 0, 1)), "CCC CCCC CCCCCC CCCA"),
        ("alter_resnet50", 32, dict(msa_blocks=(0, 1, 2, 2)), "CCC CCCA CCCACA CACA"),
        ("alter_resnet50", 32, dict(msa_blocks=[1, 2, 3, 2]), "CCA CACA CACACA CACA"),
        ("alter_resnet18", 32, {}, "CC CA CA CA"),
        ("alter_resnet18", 224, {}, "CC CA CA CA"),
        ("alter_resnet34", 224, {}, "CCC CCCA CACACA CACA"),
        ("alter_resnet101", 224, {}, f"CCC CCCA {'C' * 17}CACACA CACA"),
        ("alter_resnet152", 32, {}, f"CCC {'C' * 7}A {'C' * 35}A CACA"),
        ("alter_resnet50", 224, dict(depth=(1, 1, 3, 5)), "C C CCA CCACA"),
    ],
)
def test_stages_of_an_alternet_end_in_pairs_of_convolution_and_attention(
    name, image_size, overrides, rows
):
    with torch.device("meta"):
        model = alternet.build(name, 10, image_size, drop_path=0.1, **overrides)
    letters = {"conv": "C", "attention": "A"}
    named = [
        "".join(
            letters[kind]
            for kind, stage in model.intermediates.values()
            if stage == i and kind in letters
        )
        for i in (1, 2, 3, 4)
    ]
    built = [
        "".join("A" if hasattr(block, "attn") else "C" for block in stage) for stage in model.stages
    ]
    assert named == built == rows.split(), f"{built}, named {named}"
    for i, (stage, heads) in enumerate(zip(model.stages, (3, 6, 12, 24))):
        for block in stage:
            if hasattr(block, "attn"):
                side = 7 if image_size == 224 else 4
                width, inner = 64 * 2**i, 64 * heads
                dim = model.fc.in_features * 2**i // 8
                shapes = {
                    key: tuple(p.shape)
                    for key, p in block.state_dict().items()
                    if p.ndim > 1 or key == "attn.proj.bias"
                }
                assert shapes == {
                    "conv1.weight": (width, dim, 1, 1),
                    "attn.qkv.weight": (3 * inner, width),
                    "attn.proj.weight": (dim, inner),
                    "attn.proj.bias": (dim,),
                    "attn.rel_pos_bias": (2 * side - 1, 2 * side - 1),
                }, f"stage {i + 1}: {shapes}"
                assert block.attn.heads == heads
    rates = [block.drop_path.rate for stage in model.stages for block in stage]
    expected = [0.1 * i / (len(rates) - 1) for i in range(len(rates))]
    assert rates == pytest.approx(expected), f"stochastic depth {rates}"


# oracles


@pytest.mark.parametrize("window", [1, 2, 3])
def test_window_attention_is_the_softmax_over_the_pixels_of_the_window(window):
    torch.manual_seed(0)
    layer = alternet.WindowAttention(6, 7, heads=3, head_dim=5, window_size=window).double()
    nn.init.normal_(layer.rel_pos_bias)
    assert list(layer.state_dict()) == ["rel_pos_bias", "qkv.weight", "proj.weight", "proj.bias"]
    x = torch.randn(2, 6, 2 * window, 3 * window, dtype=torch.float64)
    result = layer(x)
    expected = window_attention_by_hand(layer.state_dict(), x, heads=3, window=window)
    difference, size = (result - expected).abs().max(), expected.abs().max()
    assert difference < 1e-12, f"window {window}: differs by {difference:.1e} of {size:.2f}"

    changed = x.clone()
    changed[:, :, window:, 2 * window :] += 1  # one window of six
    effect = (layer(changed) - result).abs().amax(dim=(0, 1))
    assert effect[window:, 2 * window :].min() > 1e-3, "a window sees its own pixels"
    effect[window:, 2 * window :] = 0
    assert effect.max() == 0, f"another window changes by {effect.max():.1e}"


@pytest.mark.parametrize("form", ALTERNET_FORMS)
def test_an_alternet_follows_the_equations_written_out(form):
    for overrides in (dict(), dict(stem="imagenet", image_size=64)):
        model = tiny_alternet(**{**ALTERNET_FORMS[form], **overrides})
        images = tiny_images(2, 128)[..., :64] if overrides else tiny_images(3)
        for training in (False, True):
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            with torch.no_grad():
                result = model.train(training)(images)
            expected = network_by_hand(
                weights,
                images,
                model.pre_activation,
                training=training,
                heads=(1, 2, 3, 2),
                window=2,
            )
            difference, size = (result - expected).abs().max(), expected.abs().max()
            assert difference < 1e-12 * size, (
                f"{form}, {model.stem}, training {training}: logits "
                f"differ by {difference:.1e}, they reach {size:.2f}"
            )


# mathematics


def test_stochastic_depth_of_an_attention_block_drops_it_for_some_samples():
    for form in ("pre-activation bottleneck", "post-activation bottleneck"):
        block = tiny_alternet(**ALTERNET_FORMS[form], drop_path=0.7).layer2[2]
        assert block.drop_path.rate == pytest.approx(0.3)
        block.drop_path.train()
        x = torch.randn(32, 64, 2, 2, dtype=torch.float64)
        torch.manual_seed(0)
        with torch.no_grad():
            result = block(x)
        kept = block_by_hand(
            block.state_dict(), x, 1, block.pre_activation, scale=1 / 0.7, heads=2, window=2
        )
        distances = [(result - expected).flatten(1).abs().amax(dim=1) for expected in (x, kept)]
        nearest = torch.minimum(*distances).max()
        assert nearest < 1e-12, f"{form}: neither x nor x + branch/0.7: {nearest:.1e} off"
        dropped = (distances[0] == 0).sum().item()
        assert 2 <= dropped <= 18, f"{form}: {dropped} of 32 samples dropped at a rate of 0.3"


def test_initial_alternet_weights_are_torchs_and_its_position_biases_small():
    torch.manual_seed(0)
    weights = alternet.build(
        "alter_resnet50", depth=(2, 2, 2, 2), msa_blocks=(1, 1, 1, 1), width=32
    ).state_dict()
    biases = torch.cat(
        [value.flatten() for key, value in weights.items() if key.endswith("rel_pos_bias")]
    )
    assert len(biases) == 4 * 13**2
    assert abs(biases.std() / 0.02 - 1) < 0.1, f"{biases.std():.4f} instead of 0.02"  # 3.7 errors
    assert biases.abs().max() > 2.5 * 0.02, "normal, not uniform"
    for key, weight in weights.items():
        if weight.ndim > 1 and not key.endswith("rel_pos_bias"):
            bound = weight[0].numel() ** -0.5
            few = 3 / weight.numel() ** 0.5
            assert abs(weight.std() / (UNIFORM * bound) - 1) < few, f"{key}: {weight.std():.4f}"
            assert weight.abs().max() <= bound, f"{key} reaches {weight.abs().max():.4f}"


# gradients


@pytest.mark.parametrize("form", ALTERNET_FORMS)
def test_every_alternet_parameter_gets_a_finite_gradient(form):
    torch.manual_seed(0)
    model = alternet.build(
        "alter_resnet50", 10, 32, width=8, depth=(1, 2, 2, 2), drop_path=0.1, **ALTERNET_FORMS[form]
    )
    assert_every_parameter_learns(model.double(), form)


# promises


@pytest.mark.parametrize(
    "name, overrides, skip, point",
    [
        (
            "vit_micro8",
            dict(kernel_size=3, stem="conv", drop_path=0.1, depth=2),
            "blocks.0.mlp",
            "pre_logits",
        ),
        (
            "pit_ti",
            dict(patch_size=4, stride=4, depth=(1, 1, 1)),
            "transformers.0.blocks.0.mlp",
            "pre_logits",
        ),
        (
            "mixer_micro8",
            dict(drop_path=0.1, depth=2),
            "blocks.1.mlp_tokens",
            "blocks.0.mlp_channels",
        ),
        (
            "resnet18",
            dict(width=8, depth=(1, 1, 1, 1), drop_path=0.1, blur=True),
            "layer2.0",
            "layer3.0",
        ),
        (
            "alter_resnet18",
            dict(width=8, depth=(1, 1, 1, 2), drop_path=0.1),
            "layer4.1",
            "layer3.0",
        ),
    ],
)
def test_a_network_compiles_into_one_graph(name, overrides, skip, point):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = train.build_model(name, 10, 32, **overrides)
    if hasattr(model, "head"):
        nn.init.normal_(model.head.weight, std=0.02)  # zero, it would hide all that is before it
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(images).sum().backward()
    model.eval()
    plain, graph = {point: None}, {point: None}
    for ours, theirs in (
        (compiled(images), model(images)),
        (compiled(images, out=graph, skip=skip), model(images, out=plain, skip=skip)),
        (graph[point], plain[point]),
    ):
        difference = (ours - theirs).abs().max()
        assert difference < 1e-4, f"compiled and plain {name} differ by {difference:.1e}"


def test_batchnorm_has_torchs_momentum_and_epsilon_everywhere():
    for model in (
        resnet.build("resnet18", 5, 32),
        resnet.build("preresnet50", 5, 32),
        alternet.build("alter_resnet18", 5, 32),
        alternet.build("alter_resnet50", 5, 32),
        vit.build("vit_micro8", 5, 32, stem="conv"),
    ):
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and {(m.momentum, m.eps) for m in norms} == {(0.1, 1e-5)}


def test_what_the_model_files_repeat_is_word_for_word_the_same():
    for name in ("random_state", "set_random_state"):
        of_sam, of_attacks = (inspect.getsource(getattr(file, name)) for file in (sam, adversarial))
        assert of_sam == of_attacks, f"{name} of adversarial.py is not that of sam.py"
    differ = {"Block", "build", "check_images", "load_npz", "main"}  # each file's own
    sources = {}
    for module in (vit, mixer, resnet, alternet):
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", None) == module.__name__ and name not in differ:
                sources.setdefault(name, {})[module.__name__] = inspect.getsource(thing)
    copies = {name: files for name, files in sources.items() if len(files) > 1}
    for name, files in copies.items():
        (first, source), *others = files.items()
        for other, text in others:
            assert text == source, f"{name} of {other}.py is not that of {first}.py"
    in_all = {name for name, files in copies.items() if len(files) == 4}
    assert in_all == {
        "record",
        "check_names",
        "DropPath",
        "check_choices",
        "check_rates",
        "unknown",
        "Counter",
        "complexity",
    }, f"in all four: {in_all}"
    in_some = copies.keys() - in_all
    assert in_some == {
        "Mlp",
        "lecun_normal_",
        "projection",
        "spatial",
        "BasicBlock",
        "Bottleneck",
        "check_widths",
    }, f"in two or three: {in_some}"
    assert vit.UNCOUNTED == mixer.UNCOUNTED == resnet.UNCOUNTED == alternet.UNCOUNTED


@pytest.mark.parametrize(
    "image_size, overrides, message",
    [
        (
            40,
            {},
            "windows of 4 .* maps of images of 40 pixels a side, 40, 20, 10, 5, with attention in "
            "0 1 1 1 of their blocks; image sizes that work: 32 and 64; window sizes that work: "
            "1, 5$",
        ),
        (36, dict(msa_blocks=(0, 0, 0, 1)), "36, 18, 9, 5, with attention in 0 0 0 1 of"),
        (
            60,
            dict(msa_blocks=(1, 0, 0, 0), window_size=7),
            "window sizes that work: 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60$",
        ),
        (60, dict(window_size=8, msa_blocks=(1, 1, 0, 0)), "image sizes that work: 48 and 64;"),
        (32, dict(window_size=32), "image sizes that work: 256; window sizes that work: 1, 2, 4$"),
        (96, {}, "24, 12, 6, 3, .* work: 224; window sizes that work: 1, 3$"),
        (225, {}, "57, 29, 15, 8, .* work: 224 and 448; window sizes that work: 1$"),
        (224, dict(window_size=4), "56, 28, 14, 7, .* 128 and 256; window sizes .*: 1, 7$"),
        (250, dict(window_size=6, msa_blocks=(0, 0, 1, 0)), "image sizes that work: 192 and 288;"),
    ],
)
def test_a_window_error_names_the_nearest_sizes_that_work_and_they_do(
    image_size, overrides, message
):
    stem, step = ("cifar", 8) if image_size <= 64 else ("imagenet", 32)
    window = overrides.get("window_size", 4 if stem == "cifar" else 7)
    msa_blocks = overrides.get("msa_blocks", (0, 1, 1, 1))
    fits = lambda image_size, window: (
        not any(
            side % window
            for side, blocks in zip(sides_of_the_stages(image_size, stem), msa_blocks)
            if blocks
        )
    )
    with pytest.raises(ValueError, match=message) as error:
        alternet.build("alter_resnet18", 10, image_size, width=4, **overrides)
    assert "\n" not in str(error.value)
    images, windows = re.search(
        "image sizes that work: (.*); window sizes that work: (.*)$", str(error.value)
    ).groups()
    images, windows = [int(i) for i in images.split(" and ")], [int(w) for w in windows.split(", ")]
    for size, side in [*((size, window) for size in images), *((image_size, w) for w in windows)]:
        assert fits(size, side), f"windows of {side} at {size}: {sides_of_the_stages(size, stem)}"
        with torch.device("meta"):
            model = alternet.build(
                "alter_resnet18",
                10,
                size,
                width=4,
                stem=stem,
                window_size=side,
                msa_blocks=msa_blocks,
            )
            assert model(torch.empty(2, 3, size, size)).shape == (2, 10)
    steps = range(step, 2 * max(images), step)
    nearest = [size for size in steps if size < image_size and fits(size, window)][-1:] + [
        size for size in steps if size > image_size and fits(size, window)
    ][:1]
    assert images == nearest, f"{images} named, nearest are {nearest}"
    expected = [side for side in range(1, image_size + 1) if fits(image_size, side)]
    assert windows == expected, f"windows {windows} named, {expected} work"


def test_an_alternet_takes_images_of_other_sizes_that_windows_divide():
    torch.manual_seed(0)
    model = alternet.build("alter_resnet18", 10, 32, width=4).double().eval()
    out = {"layer2.1": None, "layer4.1": None}
    assert model(tiny_images(2, 64)[..., :32], out=out).shape == (2, 10)
    assert (out["layer2.1"].shape, out["layer4.1"].shape) == ((2, 8, 32, 16), (2, 32, 8, 4))
    for images in (tiny_images(2, 40)[..., :32], tiny_images(2, 40)[..., :32].mT):
        with pytest.raises(ValueError, match="windows of 4 do not divide .*work: 32 and 64;"):
            model(images)
    odd = alternet.build("alter_resnet18", 10, 225, width=4, window_size=8, msa_blocks=(0, 0, 0, 1))
    assert odd.double()(tiny_images(2, 225)).shape == (2, 10), "8×8 at the end: sides round up"
    free = alternet.build("alter_resnet18", 10, 33, width=4, msa_blocks=(0, 0, 0, 0)).double()
    assert free(tiny_images(2, 37)).shape == (2, 10), "nothing to divide without attention"
    model, images = tiny_alternet().float(), 20 * tiny_images().float()  # logits far apart
    single = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    difference, apart = (half - single).abs().max(), (single[0] - single[1]).abs().max()
    assert half.dtype == torch.bfloat16 and difference < 0.2 * apart, (difference, apart)


@pytest.mark.parametrize("form", ["pre-activation bottleneck", "post-activation basic"])
def test_alternet_intermediates_are_named_shaped_and_free_of_side_effects(form):
    model, images = tiny_alternet(**ALTERNET_FORMS[form]), tiny_images()
    assert model.intermediates == {
        "stem": ("stem", 0),
        "layer1.0": ("conv", 1),
        "layer2.0": ("conv", 2),
        "layer2.1": ("conv", 2),
        "layer2.2": ("attention", 2),
        "layer3.0": ("conv", 3),
        "layer3.1": ("attention", 3),
        "layer4.0": ("conv", 4),
        "layer4.1": ("attention", 4),
        "pre_logits": ("representation", 4),
    }
    out = recorded(model, images)
    wide = 1 if "basic" in form else 4
    for name, value in out.items():
        stage = int(name[5]) if name.startswith("layer") else 1
        shape = (2, 8 * wide * 2 ** (stage - 1), *[16 // 2 ** (stage - 1)] * 2)
        shape = dict(stem=(2, 8, 16, 16), pre_logits=(2, 64 * wide)).get(name, shape)
        assert value.shape == shape, f"{name} has shape {tuple(value.shape)} instead of {shape}"
    stem = F.conv2d(images, model.conv1.weight, padding=1)
    assert torch.equal(out["stem"], stem if model.pre_activation else model.bn1(stem).relu())
    only = {"layer2.2": None}
    model(images, out=only)
    assert list(only) == ["layer2.2"] and torch.equal(only["layer2.2"], out["layer2.2"])
    with pytest.raises(ValueError, match="unknown intermediate 'layer2.3'; this model has stem"):
        model(images, out={"layer2.3": None})


@pytest.mark.parametrize("form", ALTERNET_FORMS)
def test_skipping_a_block_of_an_alternet_equals_identity_kernels_and_attention_of_zeros(form):
    images = tiny_images()
    whole = tiny_alternet(**ALTERNET_FORMS[form])(images)
    units = (
        "layer1.0, layer2.0, layer2.1, layer2.2, layer3.0, layer3.1, layer4.0, layer4.1"
    ).split(", ")
    for name in units:
        model = tiny_alternet(**ALTERNET_FORMS[form])
        skipped, block = model(images, skip=name), model.get_submodule(name)
        assert torch.equal(model(images), whole), f"skipping {name} once changed the model"
        if name in ("layer2.2", "layer3.1", "layer4.1"):
            for parameter in (block.attn.proj if model.pre_activation else block.bn2).parameters():
                nn.init.zeros_(parameter)
        else:
            nn.init.dirac_(block.conv2.weight, block.conv2.groups)
        difference = (skipped - model(images)).abs().max()
        assert difference < 1e-12, f"{form}: {name} skipped is {difference:.1e} off"
        effect = (skipped - whole).abs().max()
        assert effect > 1e-4, f"skipping {name} changes the logits by {effect:.1e} only"
    for name in ("stem", "layer2.2.attn", "layer1.1", "pre_logits"):
        with pytest.raises(ValueError, match=f"unit '{name}' to skip; .* has {', '.join(units)}$"):
            model(images, skip=name)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        (
            "alter_resnet5",
            {},
            r"unknown model 'alter_resnet5', did you mean 'alter_resnet50'\? know",
        ),
        (
            "resnet50",
            {},
            "unknown model 'resnet50', did you mean 'alter_resnet50'.*, alter_resnet152$",
        ),
        (
            "50",
            {},
            "unknown model '50'; known: alter_resnet18, alter_resnet34, alter_resnet50, alt",
        ),
        (
            "alter_resnet50",
            dict(msa_block=(0, 0, 0, 0)),
            "unknown argument of alter_resnet50 'msa_block', did you mean 'msa_blocks'",
        ),
        ("alter_resnet50", dict(blur=True), "unknown argument of alter_resnet50 'blur'"),
        ("alter_resnet50", dict(depth=50), "blocks of four stages, got 50"),
        (
            "alter_resnet50",
            dict(msa_blocks=(2, 1, 3, 2)),
            r"each at most half of its stage's blocks \(3, 4, 6, 4\); got \(2, 1, 3, 2\)",
        ),
        ("alter_resnet50", dict(msa_blocks=(0, 1, 3, -1)), r"msa_blocks .*; got \(0, 1, 3, -1\)"),
        ("alter_resnet50", dict(msa_blocks=[0, 1, 3]), r"needs four numbers, .*; got \(0, 1, 3\)"),
        (
            "alter_resnet18",
            dict(msa_blocks=(0, 0, 0, 2)),
            r"blocks \(2, 2, 2, 2\); got \(0, 0, 0, 2\)",
        ),
        (
            "alter_resnet50",
            dict(heads=(3, 6, 12)),
            r"heads needs four .* got \(3, 6, 12\), 64, 7, 224",
        ),
        (
            "alter_resnet50",
            dict(heads=(3, 0, 12, 24)),
            r"at least 1; got \(3, 0, 12, 24\), 64, 7, 224",
        ),
        ("alter_resnet50", dict(head_dim=0), r"at least 1; got \(3, 6, 12, 24\), 0, 7, 224"),
        ("alter_resnet50", dict(window_size=0), r"at least 1; got \(3, 6, 12, 24\), 64, 0, 224"),
        ("alter_resnet50", dict(depth=(3, 4, 6)), r"blocks of four stages, got \(3, 4, 6\)"),
        ("alter_resnet34", dict(groups=32, width_per_group=4), "are for bottlenecks"),
        ("alter_resnet50", dict(width=0), "must be at least 1, .* a multiple of 64; got 0, 1, 64"),
        ("alter_resnet50", dict(stem="conv"), "stem must be one of imagenet, cifar; got 'conv'"),
        ("alter_resnet50", dict(drop_path=1.0), "must be at least 0 and less than 1, got 1.0"),
        ("alter_resnet50", dict(image_size=32, stem="imagenet"), "8, 4, 2, 1, .* work: 128;"),
    ],
)
def test_an_alternet_that_cannot_be_built_is_refused_in_one_line(name, arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as error:
        alternet.build(name, **arguments)
    assert "\n" not in str(error.value)


def test_what_is_no_batch_of_images_or_no_map_of_windows_is_refused():
    for model in (resnet.build("resnet18", 5, 32), alternet.build("alter_resnet18", 5, 32)):
        for shape in ((3, 32, 32), (1, 32, 32, 3), (1, 1, 32, 32)):
            with pytest.raises(ValueError, match=r"images are \(B, 3, H, W\), got"):
                model(torch.zeros(shape))
    attention = alternet.WindowAttention(8, 8, heads=1, head_dim=8, window_size=4)
    for side in (15, 3):
        with pytest.raises(ValueError, match="windows of 4 do not divide maps"):
            attention(torch.zeros(1, 8, side, side))


def test_alternet_main_prints_variants_with_attention_where_told_and_refuses_what_does_not_fit(
    capsys,
):
    for more, row in (
        ("", ["33,012,840", "1.510", "1.510", "4.252"]),
        (" --msa-blocks 0 0 0 1", ["30,258,389", "1.404", "1.404", "3.578"]),
    ):
        alternet.main(f"alter_resnet50 --image-size 32 --num-classes 100{more}".split())
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert lines[1:] == [["alter_resnet50", *row]], lines
    alternet.main("alter_resnet18 --image-size 64 --window-size 8".split())
    assert len(capsys.readouterr().out.splitlines()) == 2
    for argv, message in (
        ("alter_resnet49", "unknown model 'alter_resnet49'"),
        ("alter_resnet50 --msa-blocks 2 1 1 2", "got (2, 1, 1, 2)"),
        ("alter_resnet50 --msa-blocks 0 1 1", "expected 4 arguments"),
        ("--window-size 5", "image sizes that work: 160 and 320;"),
    ):
        with pytest.raises(SystemExit):
            alternet.main(argv.split())
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- sam.py


def small_net(*, batch_norm=False, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [
        nn.Linear(5, 8),
        nn.BatchNorm1d(8) if batch_norm else nn.Identity(),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(8, 3),
    ]
    return nn.Sequential(*layers).to(dtype)


def toy_batch(n=16, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 5, generator=g, dtype=dtype), torch.randint(3, (n,), generator=g)


def loss_of(net, x, y):
    return lambda: F.cross_entropy(net(x), y)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient_at(net, weights, loss):
    """∇L at other weights, by plain backward: the slow way round that SAM is checked against."""
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for p, w in zip(net.parameters(), weights):
            p.copy_(w)
    net.zero_grad()
    loss().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net.load_state_dict(before)
    return grads


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_gives_the_gradient_of_equation_2_by_hand(adaptive, steps):
    net, rho, eta = small_net(), 0.3, 0.01
    x, y = toy_batch()
    loss = loss_of(net, x, y)
    w = [p.detach().clone() for p in net.parameters()]
    at, norms = w, []
    for _ in range(steps):
        g = gradient_at(net, at, loss)
        t = [v.abs() + eta if adaptive else torch.ones_like(v) for v in w]
        norm = math.sqrt(sum(float(((a * b) ** 2).sum()) for a, b in zip(t, g)))
        norms.append(norm)
        at = [v + rho / steps * a * a * b / norm for v, a, b in zip(at, t, g)]
    expected = gradient_at(net, at, loss)
    with SAM(net, rho, steps=steps, adaptive=adaptive).perturb(loss) as first:
        moved = float((flat(net.parameters()) - flat(at)).abs().max())
        loss().backward()
    error = float((flat(p.grad for p in net.parameters()) - flat(expected)).abs().max())
    assert moved < 1e-14 and error < 1e-14, (moved, error)
    assert float(first.loss) == float(loss().detach())
    assert abs(float(first.grad_norm) - norms[0]) < 1e-14, "at w"
    if not adaptive and steps == 1:
        distance = float(flat([a - b for a, b in zip(at, w)]).norm())
        assert abs(distance - rho) < 1e-14, distance


def test_sam_of_some_parameters_moves_these_only_and_computes_no_other_gradient():
    net, (x, y), rho = small_net(batch_norm=True).eval(), toy_batch(), 0.3
    loss, chosen = loss_of(net, x, y), [net[1].weight, net[4].bias]
    own = [any(p is q for q in chosen) for p in net.parameters()]
    w = [p.detach().clone() for p in net.parameters()]
    g = [a if mine else torch.zeros_like(a) for a, mine in zip(gradient_at(net, w, loss), own)]
    norm = math.sqrt(sum(float((a**2).sum()) for a in g))
    at = [v + rho * a / norm for v, a in zip(w, g)]
    expected, computed = gradient_at(net, at, loss), []
    for i, p in enumerate(net.parameters()):
        p.register_hook(lambda grad, i=i: computed.append(i))
    with SAM(net, rho, params=chosen).perturb(loss) as first:
        assert sorted(computed) == [i for i, mine in enumerate(own) if mine]
        assert float((flat(net.parameters()) - flat(at)).abs().max()) < 1e-15
        loss().backward()
    assert abs(float(first.grad_norm) - norm) < 1e-15
    assert float((flat(p.grad for p in net.parameters()) - flat(expected)).abs().max()) < 1e-14
    assert torch.equal(flat(net.parameters()), flat(w))


@pytest.mark.parametrize("alpha", [0.7, 0.01])
def test_looksam_adds_the_orthogonal_part_of_sams_gradient_to_the_gradients_between(alpha):
    net, (x, y) = small_net(), toy_batch()
    sam, parts = SAM(net, 0.3), {0.25: slice(0, 4), 0.75: slice(4, 16)}
    look, direction = LookSAM(sam.params, alpha), None
    for step in range(7):
        w = [p.detach().clone() for p in net.parameters()]
        scale = 2.0**16 if step == 3 else 1.0  # as a loss scaler has it in the pass at w
        at_w = flat(gradient_at(net, w, loss_of(net, x, y)))
        for share, some in parts.items():
            loss = loss_of(net, x[some], y[some])
            with (
                sam.perturb(lambda: loss() * scale, keep_grads=True)
                if step % 3 == 0
                else nullcontext()
            ) as first:
                (loss() * share).backward()
            if step % 3 == 0:
                look.note(first.grads, share)
        before = flat(p.grad for p in net.parameters())
        look.step(step % 3 == 0)
        after = flat(p.grad for p in net.parameters())
        if step % 3 == 0:
            direction = before - (before @ at_w) / (at_w @ at_w) * at_w
            length = min(alpha, float(direction.norm() / before.norm()))
            assert (length == alpha) is (alpha == 0.01), "its own length, or the most"
            assert torch.equal(before, after) and abs(float(direction @ at_w)) < 1e-12
        else:
            expected = before + length * before.norm() / direction.norm() * direction
            assert float((after - expected).abs().max()) < 1e-13, step
        kept = flat(look.state_dict()["direction"])
        assert float((kept - direction).abs().max()) < 1e-13 * float(direction.abs().max()), step
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.5 * p.grad
                p.grad = None
    for p in net.parameters():
        p.grad = torch.full_like(p, math.inf)
    look.note([p.grad for p in net.parameters()])
    look.step(True)
    assert torch.equal(flat(look.direction), kept), "what is not finite is not kept"
    other = LookSAM(sam.params, alpha)
    other.load_state_dict(look.state_dict())
    assert torch.equal(flat(other.direction), kept) and other.length == look.length > 0
    before = [p.grad.zero_() for p in net.parameters()]
    other.step(False)
    assert not flat(before).any(), "nothing is added to no gradient"
    with pytest.raises(ValueError, match="at least 0"):
        LookSAM(sam.params, -0.1)
    with pytest.raises(ValueError, match="there is no parameter"):
        LookSAM(iter(()))
    with pytest.raises(ValueError, match="belongs before step"):
        look.step(True)
    with pytest.raises(ValueError, match="0 gradients for . parameters; .* keep_grads=True"):
        look.note(())
    look.note([torch.full_like(p, 3.0) for p in sam.params])
    look.step(False)  # that step was given up
    look.note([torch.full_like(p, 2.0) for p in sam.params])
    assert {float(v) for v in flat(look.at_w)} == {2.0}


def test_sam_of_the_whole_batch_sends_every_parameter_whichever_each_process_reaches(monkeypatch):
    nets = nn.ModuleList([small_net(), small_net()])
    (x, y), sent = toy_batch(), []
    monkeypatch.setattr(
        "sam.average", lambda grads: sent.append([len(g.flatten()) for g in grads]) or grads
    )
    for net in nets:
        with SAM(nets, 0.1).perturb(loss_of(net, x, y), sync=True) as first:
            pass
        assert first.grad_norm > 0
    assert sent == [[p.numel() for p in nets.parameters()]] * 2


def test_sam_with_rho_zero_trains_as_the_plain_optimizer_bit_for_bit():
    ends = []
    for rho in (None, 0.0):
        net = small_net(batch_norm=True, dropout=0.3, dtype=torch.float32)
        x, y = toy_batch(dtype=torch.float32)
        loss, sam = loss_of(net, x, y), SAM(net, 0.0)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        for step in range(5):
            torch.manual_seed(step)
            optimizer.zero_grad()
            with sam.perturb(loss) if rho is not None else nullcontext():
                loss().backward()
            optimizer.step()
        ends.append(net.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_sam_restores_weights_and_first_pass_statistics_also_when_the_body_raises():
    for fails in (False, True):
        net, (x, y) = (
            small_net(batch_norm=True, dtype=torch.float32),
            toy_batch(dtype=torch.float32),
        )
        plain = copy.deepcopy(net)
        plain(x)
        before = [p.detach().clone() for p in net.parameters()]
        with pytest.raises(KeyError) if fails else nullcontext():
            with SAM(net, 0.5).perturb(loss_of(net, x, y)):
                loss_of(net, x, y)().backward()
                assert not torch.equal(before[0], net[0].weight)
                if fails:
                    raise KeyError
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), net.buffers()))
        assert int(net[1].num_batches_tracked) == 1


def test_sam_draws_the_same_masks_in_every_pass_and_new_ones_in_the_next_step():
    net, (x, y) = small_net(dropout=0.5), toy_batch()
    masks = []
    net[3].register_forward_hook(lambda module, args, out: masks.append(out == 0))
    sam = SAM(net, 0.1, steps=2)
    for _ in range(2):
        with sam.perturb(loss_of(net, x, y)):
            loss_of(net, x, y)().backward()
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3]) and torch.equal(masks[3], masks[5])


def test_sam_leaves_p_grad_alone_so_that_micro_batches_accumulate():
    net = small_net()
    (x1, y1), (x2, y2) = toy_batch(8), tuple(t.flip(0) for t in toy_batch(9))
    sam, separate = SAM(net, 0.2), []
    for x, y in ((x1, y1), (x2, y2)):
        net.zero_grad()
        with sam.perturb(loss_of(net, x, y)):
            loss_of(net, x, y)().backward()
        separate.append(flat(p.grad for p in net.parameters()))
    net.zero_grad()
    for x, y in ((x1, y1), (x2, y2)):
        with sam.perturb(loss_of(net, x, y)):
            loss_of(net, x, y)().backward()
    assert torch.allclose(flat(p.grad for p in net.parameters()), sum(separate), atol=1e-15)


def test_sam_over_a_list_of_micro_batches_uses_the_gradient_of_their_mean():
    net, (x, y), ends = small_net(), toy_batch(16), []
    halves = [loss_of(net, x[:8], y[:8]), loss_of(net, x[8:], y[8:])]
    for losses in (loss_of(net, x, y), halves):
        with SAM(net, 0.2).perturb(losses) as first:
            ends.append((flat(net.parameters()), first.loss))
    assert torch.allclose(ends[0][0], ends[1][0], atol=1e-15) and torch.allclose(
        ends[0][1], ends[1][1]
    )


def test_sam_gives_input_gradients_of_the_clean_pass():
    net, (x, y) = small_net(), toy_batch()
    x.requires_grad_()
    expected = torch.autograd.grad(loss_of(net, x, y)(), x)[0]
    with SAM(net, 0.5).perturb(loss_of(net, x, y), inputs=[x]) as first:
        pass
    assert torch.equal(first.input_grads[0], expected)


def test_sam_meets_absent_zero_and_overflowing_gradients_as_documented():
    net, (x, y) = small_net(), toy_batch()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    net.register_parameter("unused", unused)
    with SAM(net, 0.5).perturb(loss_of(net, x, y)):
        assert torch.equal(unused, torch.ones_like(unused))
    before = net[0].weight.detach().clone()
    with SAM(net, 0.5).perturb(lambda: loss_of(net, x, y)() * 0):
        assert torch.equal(net[0].weight, before), "a zero gradient moves nothing"
    # at 1e200 each element is finite and their norm is not
    for scale in (math.inf, math.nan, 1e200):
        with SAM(net, 0.5).perturb(lambda: loss_of(net, x, y)() * scale):
            assert net[0].weight.isnan().all(), scale
        assert torch.equal(net[0].weight, before)
    for wrong in (dict(rho=-0.1), dict(rho=math.nan), dict(rho=math.inf), dict(rho=0.1, eta=-1)):
        with pytest.raises(ValueError, match="at least"):
            SAM(net, **wrong)
    with pytest.raises(ValueError, match="at least 1 ascent step"):
        SAM(net, 0.1, steps=0)
    with pytest.raises(ValueError, match="none of 0 params is a parameter"):
        SAM(net, 0.1, params=iter(()))


def test_sam_answers_a_loss_that_is_none_with_a_sentence():
    net, (x, y) = small_net(), toy_batch()
    loss, before = loss_of(net, x, y), [p.detach().clone() for p in net.parameters()]

    def without_grad():
        with torch.no_grad():
            return loss()

    for wrong, message in (
        (loss(), "the loss is a Tensor; it is a function"),
        (0.5, "the loss is a float; it is a function"),
        ([], "the loss is a list; it is a function"),
        (lambda: 0.5, "the loss has no gradient"),
        (without_grad, "the loss has no gradient"),
        (lambda: x.clone().requires_grad_().sum(), "depends on no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            with SAM(net, 0.5).perturb(wrong):
                pass
    with pytest.raises(ValueError, match="inputs must require a gradient"):
        with SAM(net, 0.5).perturb(loss, inputs=[x]):
            pass
    assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_step_that_sam_would_undo_is_refused(kind):
    net, (x, y) = small_net(), toy_batch()
    other = nn.Parameter(torch.ones(2))
    optimizer, of_other = kind(net.parameters(), lr=0.1), kind([other], lr=0.1)
    before, loss = [p.detach().clone() for p in net.parameters()], loss_of(net, x, y)
    with pytest.raises(RuntimeError, match="call it after the block"):
        with SAM(net, 0.5).perturb(loss):
            loss().backward()
            optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))
    with SAM(net, 0.5).perturb(loss):
        other.sum().backward()
        of_other.step()
    assert not torch.equal(other, torch.ones(2)), "of other parameters it may step"
    optimizer.step()
    assert not torch.equal(before[0], next(net.parameters())), "and after the block"


def test_sam_does_not_scale_one_gradient_twice_when_autograd_shares_its_memory():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))

        def forward(self):
            return ((self.a + self.b) * torch.arange(4)).sum()

    net = Sum()
    expected = torch.arange(4) / torch.arange(4).double().norm() / 2**0.5
    for loss in (net, [net, net]):
        with SAM(net, 1.0).perturb(loss):
            assert torch.allclose(net.a, expected) and torch.allclose(net.b, expected), (
                net.a,
                net.b,
            )


def test_sam_uses_the_moved_weights_inside_one_autocast_region():
    """autocast caches bfloat16 copies of weights for as long as its outermost region lasts."""
    grads = []
    for one_region in (True, False):
        net, (x, y) = small_net(dtype=torch.float32), toy_batch(dtype=torch.float32)
        region = lambda active: torch.autocast("cpu", torch.bfloat16) if active else nullcontext()

        def loss():
            with region(not one_region):
                return F.cross_entropy(net(x).float(), y)

        with region(one_region):
            with torch.no_grad():
                plain = loss()
            with SAM(net, 2.0).perturb(loss):
                loss().backward()
            with torch.no_grad():
                assert loss() == plain, "of the weights that are back"
        grads.append(flat(p.grad for p in net.parameters()))
    assert torch.equal(*grads)
    plain = small_net(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(plain(x).float(), y).backward()
    assert float((flat(p.grad for p in plain.parameters()) - grads[0]).norm()) > 0.1 * float(
        grads[0].norm()
    )


def test_sam_with_a_grad_scaler_moves_alike_at_any_scale_and_skips_after_an_overflow():
    net, (x, y) = small_net(dtype=torch.float32), toy_batch(dtype=torch.float32)
    moved = []
    for scale in (1.0, 2.0**16):
        with SAM(net, 0.1).perturb(lambda: loss_of(net, x, y)() * scale):
            moved.append(flat(net.parameters()))
    assert torch.equal(*moved)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    loss, before = lambda: scaler.scale(loss_of(net, x * 1e6, y)()), copy.deepcopy(net.state_dict())
    with SAM(net, 0.1).perturb(loss):
        loss().backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**125
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_sam_takes_parameters_of_several_dtypes():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 8).to(torch.bfloat16), nn.Linear(8, 3).double(), nn.Linear(3, 3)
    )
    x, y = toy_batch(dtype=torch.bfloat16)
    loss = lambda: F.cross_entropy(net[2](net[1](net[0](x).double()).float()), y)
    net.zero_grad()
    loss().backward()
    grads = [p.grad.double() for p in net.parameters()]
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
    before = [p.detach().clone() for p in net.parameters()]
    with SAM(net, 0.5).perturb(loss) as first:
        assert abs(float(first.grad_norm) / norm - 1) < 1e-5
        for p, b, g in zip(net.parameters(), before, grads):
            expected = b.double() + 0.5 * g / norm
            assert torch.allclose(
                p.double(), expected, atol=4e-3 if p.dtype == torch.bfloat16 else 1e-6
            ), p.dtype
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_sam_compiles_once_and_matches_the_uncompiled_model():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    ends = []
    for backend in (None, CompileCounterWithBackend("aot_eager")):
        net, (x, y) = (
            small_net(batch_norm=True, dtype=torch.float32),
            toy_batch(dtype=torch.float32),
        )
        model = torch.compile(net, backend=backend) if backend else net
        sam, optimizer, counts = SAM(model, 0.1), torch.optim.SGD(net.parameters(), lr=0.1), []
        for _ in range(4):
            optimizer.zero_grad()
            with sam.perturb(loss_of(model, x, y)):
                loss_of(model, x, y)().backward()
            optimizer.step()
            counts.append(backend.frame_count if backend else 0)
        ends.append(flat(net.parameters()))
    assert counts == [1, 1, 1, 1], counts
    assert torch.allclose(*ends, atol=1e-6)


def test_a_sam_step_never_waits_for_the_device():
    """Fake tensors have no values: whatever read one on the host would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net, x, y = (
            nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
            torch.randn(4, 5),
            torch.zeros(4, dtype=torch.long),
        )
        for adaptive in (False, True):
            with SAM(net, 0.1, steps=2, adaptive=adaptive).perturb(loss_of(net, x, y)):
                loss_of(net, x, y)().backward()


def test_sam_in_ddp_communicates_in_its_last_pass_only_and_refuses_static_graphs_and_shards(
    tmp_path,
):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net, (x, y), sent = small_net(), toy_batch(), []
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(net), broadcast_buffers=False)

        def hook(state, bucket):
            sent.append(bucket.buffer().numel())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        wrapped.register_comm_hook(None, hook)
        for model in (net, wrapped):
            for micro in (slice(0, 8), slice(8, 16)):
                loss = loss_of(model, x[micro], y[micro])
                quiet = model is wrapped and micro.start == 0
                with model.no_sync() if quiet else nullcontext():
                    with SAM(model, 0.2).perturb(loss):
                        loss().backward()
        assert sum(sent) == sum(p.numel() for p in net.parameters()), sent
        assert torch.equal(*(flat(p.grad for p in m.parameters()) for m in (net, wrapped)))
        with pytest.raises(ValueError, match="static_graph"):
            SAM(nn.parallel.DistributedDataParallel(net, static_graph=True), 0.1)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        cpu = torch.device("cpu")
        for shards in (
            dist.fsdp.fully_shard(copy.deepcopy(net), mesh=mesh),
            dist.fsdp.FullyShardedDataParallel(copy.deepcopy(net), device_id=cpu),
        ):
            with pytest.raises(ValueError, match="shards .*use DistributedDataParallel"):
                SAM(shards, 0.1)
    finally:
        dist.destroy_process_group()


def test_sam_takes_a_parameter_once_one_input_alone_and_no_list_of_parameters():
    net, (x, y) = small_net(), toy_batch()
    params = [p for module in net.modules() for p in module.parameters()]  # each twice
    x.requires_grad_()
    steps = []
    for chosen, inputs in ((params, x), (None, [x])):
        before = flat(net.parameters()).clone()
        with SAM(net, 0.2, params=chosen).perturb(loss_of(net, x, y), inputs=inputs) as first:
            steps.append(flat(net.parameters()) - before)
        assert first.input_grads[0].shape == x.shape
    assert torch.equal(*steps) and steps[0].norm() == pytest.approx(0.2)
    with pytest.raises(ValueError, match="the model that is called, got a generator"):
        SAM(net.parameters(), 0.2)


def test_sam_refuses_parameters_on_two_devices():
    net = small_net()
    net[0].to("meta")
    with pytest.raises(ValueError, match="are on cpu and meta; they must be on one device"):
        SAM(net, 0.1)


# ----------------------------------------------------------------------------------- adversarial.py


def small_cnn(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.GELU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(6 * 36, 5),
    ]
    network = nn.Sequential(*layers).to(dtype)
    network[1].running_mean.normal_()
    return network.eval()


def images_to_attack(n=12, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    x = torch.rand(n, 3, 8, 8, generator=g, dtype=dtype)
    x[0, :, :4] = 0.0  # pixels that cannot be lowered
    x[1, :, :4] = 1.0
    return x, torch.randint(5, (n,), generator=g)


def pgd_by_hand(model, x, y, eps, step_size, steps, norm, start, towards):
    points = start.clone()
    for _ in range(steps):
        points.requires_grad_(True)
        F.cross_entropy(model(points), y, reduction="sum").backward()
        grad = (
            points.grad
            if norm == "linf"
            else (points.grad / points.grad.square().sum((1, 2, 3), keepdim=True).sqrt())
        )
        delta = (
            points.detach()
            + (-1 if towards else 1) * step_size * (grad.sign() if norm == "linf" else grad)
            - x
        )
        if norm == "linf":
            delta = torch.maximum(torch.minimum(delta, delta * 0 + eps), delta * 0 - eps)
        else:
            size = delta.square().sum((1, 2, 3), keepdim=True).sqrt()
            delta = torch.where(size > eps, delta * eps / size, delta)
        points = (x + delta).clamp(0, 1)
    return points


@pytest.mark.parametrize("norm, eps", [("linf", 0.03), ("l2", 0.5)])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_and_fgsm_equal_an_attack_written_by_hand(norm, eps, targeted, random_start):
    model, (x, y) = small_cnn(), images_to_attack()
    torch.manual_seed(7)
    start = adversarial.uniform_start(x, eps, norm) if random_start else x
    for steps, step_size in ((10, eps / 4), (1, (1.25 if random_start else 1) * eps)):
        want = pgd_by_hand(model, x, y, eps, step_size, steps, norm, start, targeted)
        torch.manual_seed(7)
        how = dict(random_start=random_start, norm=norm, targeted=targeted)
        got = (
            adversarial.pgd(model, x, y, eps, step_size, steps, **how)
            if steps > 1
            else adversarial.fgsm(model, x, y, eps, **how)
        )
        assert got.dtype == x.dtype and not got.requires_grad
        assert float((got - want).abs().max()) < 1e-12, float((got - want).abs().max())
        with torch.no_grad():
            before, after = (F.cross_entropy(model(a), y).item() for a in (x, got))
        assert (after < before) == targeted, (before, after)


def test_an_attack_leaves_neither_the_ball_nor_the_pixels_range():
    """To the rounding of x ± ε in float32, at any ε, from any start, after any number of steps."""
    model, (x, y) = small_cnn(torch.float32), images_to_attack(dtype=torch.float32)
    for eps in (0.0, 1e-7, 2 / 255, 0.1, 0.5, 1.0):
        for steps, step_size in ((0, eps), (1, 1.25 * eps), (7, eps / 3), (3, 10 * eps)):
            for seed, random_start in ((0, True), (1, True), (0, False)):
                torch.manual_seed(seed)
                got = adversarial.pgd(model, x, y, eps, step_size, steps, random_start)
                delta = float((got.double() - x.double()).abs().max())
                assert delta <= eps + 6e-8, (eps, steps, delta)
                assert 0 <= got.min() and got.max() <= 1
                assert eps or torch.equal(got, x)
                got = adversarial.pgd(
                    model, x, y, 10 * eps, 10 * step_size, steps, random_start, norm="l2"
                )
                delta = float((got.double() - x.double()).flatten(1).norm(dim=1).max())
                assert delta <= 10 * eps * (1 + 1e-6) + 1e-6, (eps, steps, delta)
                assert 0 <= got.min() and got.max() <= 1
                assert eps or torch.equal(got, x)


@pytest.mark.parametrize("norm, eps", [("linf", 8 / 255), ("l2", 0.5)])
def test_ten_steps_of_the_default_size_cross_a_ball_of_any_radius(norm, eps):
    model, (x, y) = small_cnn(), images_to_attack()
    how = dict(random_start=False, norm=norm)
    asked = [adversarial.pgd(model, x, y, eps, *step, **how) for step in ((), (eps / 8,))]
    assert torch.equal(*asked)
    moved = (asked[0] - x).flatten(1)
    assert float((moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)).max()) > 0.99 * eps
    batches = [(x, y, list(range(len(x))))]
    kinds = [dict(eps=eps, norm=norm, **step) for step in ({}, dict(step_size=eps / 8))]
    assert len({str(adversarial.robustness(model, batches, **kind)) for kind in kinds}) == 1


def test_steps_that_a_type_cannot_resolve_and_starts_that_are_no_tensors_are_refused():
    model, (x, y) = small_cnn(torch.float32), images_to_attack(dtype=torch.float32)
    with pytest.raises(ValueError, match="step_size is 0.00098, too small for images of torch.bf"):
        adversarial.pgd(model.bfloat16(), x.bfloat16(), y)
    with pytest.raises(ValueError, match="start is a ndarray; it is a tensor like the images"):
        adversarial.pgd(model, x, y, start=x.numpy())
    model, wide = small_cnn(torch.float32), x.double()  # as a random start of other code may be
    attacked = adversarial.pgd(model, x, y, steps=1, start=wide)
    assert torch.equal(attacked, adversarial.pgd(model, x, y, steps=1, start=x))


def test_helpers_of_adversarial_training_refuse_another_norm():
    x = images_to_attack()[0]
    for call in (
        lambda: adversarial.project(x, x, 0.1, "inf"),
        lambda: adversarial.uniform_start(x, 0.1, "inf"),
        lambda: adversarial.ascend(x, x, x, 0.1, 0.1, "inf"),
    ):
        with pytest.raises(ValueError, match="norm is 'inf'; it is one of linf l2"):
            call()


def test_a_random_start_is_uniform_in_the_ball():
    torch.manual_seed(0)
    x = torch.full((20_000, 1, 1, 2), 0.5, dtype=torch.float64)
    square = (adversarial.uniform_start(x, 0.1) - x).flatten(1) / 0.1
    inside = (square.abs() < 0.5).all(1).double().mean().item()
    assert abs(inside - 0.25) < 0.01 and square.abs().max() <= 1
    disc = (adversarial.uniform_start(x, 0.1, "l2") - x).flatten(1) / 0.1
    inside = (disc.norm(dim=1) < 0.5).double().mean().item()
    assert abs(inside - 0.25) < 0.01 and disc.norm(dim=1).max() <= 1 + 1e-9
    wide = torch.full((20_000, 3, 1, 2), 0.5, dtype=torch.float64)  # a ball of 6 dimensions
    ball = (adversarial.uniform_start(wide, 0.1, "l2") - wide).flatten(1) / 0.1
    inside = (ball.norm(dim=1) < 0.8).double().mean().item()
    assert abs(inside - 0.8**6) < 0.015, inside
    generator = torch.Generator().manual_seed(5)
    first, second = (adversarial.uniform_start(x[:2], 0.1, generator=generator) for _ in range(2))
    assert not torch.equal(first, second), "a generator of the caller's moves on"


def test_an_attack_leaves_the_model_and_the_random_state_as_they_were():
    model, (x, y) = small_cnn(), images_to_attack()
    model.train()
    model[1].eval()  # a BatchNorm that is frozen in a model in training
    model[5].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def unchanged():
        assert same_tensors(state, model.state_dict())
        assert [m.training for m in model] == [True, False, True, True, True, True]
        assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]
        assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
        assert all(p.grad is None for p in list(model.parameters())[1:])
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.is_grad_enabled() and not x.requires_grad

    with pytest.warns(UserWarning, match="training mode: it is attacked in evaluation mode"):
        got = adversarial.pgd(model, x, y)
    unchanged()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(adversarial.pgd(small_cnn(), x, y), got), "no dropout in an attack"
    with pytest.raises(ValueError, match="labels reach from"), pytest.warns(UserWarning):
        adversarial.pgd(model, x, y + 5)
    unchanged()
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pytest.warns(UserWarning):
            assert torch.equal(adversarial.pgd(model, x * 1, y * 1), got)
    unchanged()


def test_an_attack_computes_no_gradient_of_parameters_and_one_pass_a_step():
    passes, wanted = [], []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            passes.append("forward")
            return x @ weight

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            passes.append("backward")
            wanted.append(ctx.needs_input_grad)
            return grad @ weight.T, x.T @ grad if ctx.needs_input_grad[1] else None

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(192, 5, dtype=torch.float64))

        def forward(self, x):
            return Product.apply(x.flatten(1), self.weight)

    x, y = images_to_attack()
    adversarial.pgd(Linear().eval(), x, y, steps=4)
    assert passes == ["forward", "backward"] * 4 and wanted == [(True, False)] * 4


def test_an_attack_is_computed_in_the_images_own_precision():
    model, (x, y) = small_cnn(torch.float32), images_to_attack(dtype=torch.float32)
    cudnn = torch.backends.cudnn
    backends = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    precisions = [backend.fp32_precision for backend in backends]
    seen = []
    model.register_forward_hook(
        lambda *_: seen.append(
            (
                torch.is_autocast_enabled("cpu"),
                *(backend.fp32_precision for backend in backends),
            )
        )
    )
    want = adversarial.pgd(model, x, y, random_start=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adversarial.pgd(model, x, y, random_start=False), want)
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {(False, "ieee", "ieee", "ieee")}
    assert [backend.fp32_precision for backend in backends] == precisions


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=lambda x: (255 * x).byte()), "images are torch.uint8 .* x.float.. / 255"),
        (
            dict(x=lambda x: 2 * x - 1),
            "images reach from -1 to 1; an attack takes .0, 1.: put mean",
        ),
        (dict(x=lambda x: x * math.nan), "images reach from nan to nan"),
        (dict(x=lambda x: x[0]), r"images are torch.float64 \(3, 8, 8\)"),
        (dict(y=lambda y: y[1:]), r"labels are torch.int64 \(11,\) for 12 images"),
        (dict(y=lambda y: y.double()), "labels are torch.float64"),
        (dict(y=lambda y: y + 3), "labels reach from . to .; the model has 5 classes, 0 to 4"),
        (dict(y=lambda y: y - 5), "labels reach from -5 to"),
        (dict(eps=2), "eps is 2; pixels are in .0, 1., so it is from 0 to 1, such as 2/255"),
        (dict(eps=-0.1), "eps is -0.1"),
        (dict(eps=math.nan), "eps is nan"),
        (dict(step_size=-1), "step_size is -1; "),
        (dict(steps=-1), "steps is -1; it is at least 0"),
        (dict(norm="l1"), "norm is 'l1'; it is one of linf l2"),
        (
            dict(start=torch.zeros(1, 3, 8, 8)),
            r"start is \(1, 3, 8, 8\) for images \(12, 3, 8, 8\)",
        ),
        (
            dict(y=lambda y: y.tolist()),
            "images are a Tensor, labels a list; an attack takes tensors",
        ),
        (dict(loss=F.cross_entropy), r"the loss is \(\) for 12 images; it is one number for each"),
        (dict(model=lambda x: (x,)), "the model returns tuple for 12 images"),
        (dict(model=lambda x: x.flatten(1).sum(1)), r"the model returns \(12,\) for 12 images"),
        (
            dict(model=lambda x: x.flatten(1)[:, :5] / 0),
            "the loss of 12 of 12 images, or its gradient, is not finite: "
            "an attack finds no direction",
        ),
        (
            dict(model=lambda x: (x.flatten(1)[:, :5] - x.flatten(1)[:, :5].detach()).sqrt()),
            "the loss of 12 of 12 images, or its gradient, is not finite",
        ),
    ],
)
def test_what_cannot_be_attacked_is_answered_with_a_sentence(change, message):
    class Function(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    (x, y), more = images_to_attack(), dict(random_start=False) | change
    x, y = more.pop("x", lambda x: x)(x), more.pop("y", lambda y: y)(y)
    model = Function(more.pop("model")).eval() if "model" in more else small_cnn()
    with pytest.raises((ValueError, FloatingPointError), match=message) as error:
        adversarial.pgd(model, x, y, **more)
    assert "\n" not in str(error.value)


def test_a_trace_holds_every_iterate_and_early_stopping_spares_what_is_beaten():
    model, (x, y) = small_cnn(), images_to_attack()
    with torch.no_grad():
        y[:8] = model(x[:8]).argmax(1)  # so that eight have to be beaten
    trace, seen = [], []
    how = dict(eps=0.05, step_size=0.01, random_start=False)
    adversarial.pgd(model, x, y, steps=6, trace=trace, **how)
    assert len(trace) == 7
    for step, (losses, predicted) in enumerate(trace):
        with torch.no_grad():
            logits = model(adversarial.pgd(model, x, y, steps=step, **how))
        assert torch.equal(logits.argmax(1), predicted)
        assert float((F.cross_entropy(logits, y, reduction="none") - losses).abs().max()) < 1e-12
    first = [next((k for k, (_, p) in enumerate(trace) if p[i] != y[i]), 7) for i in range(12)]
    assert len(set(first)) > 2, f"images are beaten at different steps: {first}"
    model.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    early = []
    points = adversarial.pgd(model, x, y, steps=6, trace=early, early_stop=True, **how)
    wanted = [sum(f >= step for f in first) for step in range(7)]
    assert seen == [n for n in wanted if n], (seen, wanted)
    for i, step in enumerate(first):
        at = min(step, 6)
        stopped = adversarial.pgd(model, x[i : i + 1], y[i : i + 1], steps=at, **how)
        assert float((points[i] - stopped[0]).abs().max()) < 1e-12
        assert all(int(early[k][1][i]) == int(trace[min(k, at)][1][i]) for k in range(7))


def test_robustness_counts_what_withstands_every_iterate_of_every_restart():
    torch.manual_seed(1)
    model, (x, y) = small_cnn(seed=2), images_to_attack(40)
    with torch.no_grad():
        y[:30] = model(x[:30]).argmax(1)
    how = dict(eps=0.1, step_size=0.025, steps=5, seed=3)
    batches = lambda size: [
        (x[i : i + size], y[i : i + size], list(range(i, min(i + size, 40))))
        for i in range(0, 40, size)
    ]
    got = adversarial.robustness(model, batches(40), restarts=2, **how)
    robust, last, losses = (torch.ones(6, 40, dtype=torch.bool), torch.ones(6, 40).bool(), [])
    for restart in range(2):
        start = adversarial.keyed_start(x, range(40), 0.1, "linf", 3 + restart)
        trace = []
        adversarial.pgd(model, x, y, 0.1, 0.025, 5, start=start, trace=trace)
        right = torch.stack([predicted == y for _, predicted in trace])
        robust &= torch.stack([right[: k + 1].all(0) for k in range(6)])
        last &= right
        losses.append([values.sum().item() for values, _ in trace])
    with torch.no_grad():
        clean = model(x).argmax(1) == y
    assert got["images"] == 40 and got["clean"] == clean.sum()
    assert got["robust"] == (robust & clean).sum(1).tolist()
    assert got["last"] == last.sum(1).tolist()
    assert np.allclose(got["loss"], losses)
    assert 0 < got["robust"][-1] < got["robust"][0] <= got["clean"], got
    small = adversarial.robustness(model, batches(7), restarts=2, **how)
    assert {k: v for k, v in small.items() if k != "loss"} == {
        k: v for k, v in got.items() if k != "loss"
    }, "whatever the batches"
    tensors = [(x, y, torch.arange(40))]  # as a DataLoader collates them
    assert adversarial.robustness(model, tensors, restarts=2, **how) == got
    with pytest.raises(ValueError, match="restarts is 0; it is at least 1"):
        adversarial.robustness(model, batches(40), restarts=0, **how)
    early = adversarial.robustness(model, batches(40), restarts=2, early_stop=True, **how)
    assert early["robust"][-1] == got["robust"][-1] and "last" not in early
    parts = [
        adversarial.robustness(model, some, **how) for some in (batches(8)[:2], batches(8)[2:])
    ]
    whole = adversarial.robustness(model, batches(40), **how)
    result = adversarial.summary(parts)
    assert result["images"] == 40 and result["clean"] == 100 * whole["clean"] / 40
    assert np.allclose(result["robust"], np.array(whole["robust"]) / 0.4)
    assert np.allclose(result["loss"], np.array(whole["loss"]) / 40)
    how = dict(eps=0.3, step_size=0.05, steps=5)
    aimed = adversarial.robustness(model, batches(7), targeted=True, seed=3, **how)
    start, trace = adversarial.keyed_start(x, range(40), 0.3, "linf", 3), []
    aim = (y + 1 + torch.arange(40) % 4) % 5  # image i's target
    adversarial.pgd(model, x, aim, start=start, targeted=True, trace=trace, **how)
    holds = torch.stack([predicted == y for _, predicted in trace]).cumprod(0).bool() & clean
    assert aimed["robust"] == holds.sum(1).tolist() and aimed["robust"][-1] < 10, aimed
    early = adversarial.robustness(model, batches(7), targeted=True, early_stop=True, seed=3, **how)
    assert early["robust"][-1] == aimed["robust"][-1], "what is not at its target goes on"


def test_robustness_of_a_network_in_ddp_sends_nothing_before_its_sums(tmp_path, monkeypatch):
    """Processes with fewer batches would wait for ever for its buffers."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, (x, y) = small_cnn(), images_to_attack(8)
        wrapped = nn.parallel.DistributedDataParallel(model)
        monkeypatch.setattr(wrapped, "forward", None)
        bare, *through = (
            adversarial.robustness(of, [(x, y, range(8))], steps=2)
            for of in (model, wrapped, torch.compile(wrapped, backend="eager"))
        )
        assert through == [bare] * 2
    finally:
        dist.destroy_process_group()


def test_what_an_attack_has_beaten_counts_though_it_recovers():
    """Steps as large as the ball jump over waves: a later iterate is right again."""

    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.length = nn.Parameter(torch.tensor(30.0).double())

        def forward(self, x):
            wave = (self.length * x.flatten(1).mean(1)).sin()
            return torch.stack([wave, -wave], dim=1)

    model, (x, _) = Waves().eval(), images_to_attack(40)
    with torch.no_grad():
        y = model(x).argmax(1)
    how = dict(eps=0.2, step_size=0.4, steps=6, seed=3)
    got = adversarial.robustness(model, [(x, y, list(range(40)))], **how)
    start, trace = adversarial.keyed_start(x, range(40), 0.2, "linf", 3), []
    adversarial.pgd(model, x, y, 0.2, 0.4, 6, start=start, trace=trace)
    right = torch.stack([predicted == y for _, predicted in trace])
    assert (right[1:] & ~right[:-1]).any(), "some recover"
    assert got["last"] == right.sum(1).tolist()
    assert got["robust"] == right.cumprod(0).sum(1).tolist() != got["last"]


def test_random_starts_differ_between_images_and_seeds_and_not_between_batches():
    x = images_to_attack(40)[0][:1].expand(3, -1, -1, -1)
    for norm in ("linf", "l2"):
        start = partial(adversarial.keyed_start, eps=0.1, norm=norm)
        three = start(x, range(3), seed=3)
        assert not torch.equal(three[0], three[1]), "of one image at two places"
        assert not torch.equal(three, start(x, range(3), seed=4))
        assert torch.equal(three[1:2], start(x[:1], [1], seed=3))


def test_defaults_of_attacks_and_of_looksam_are_those_that_they_cite():
    for function in (adversarial.pgd, adversarial.fgsm, adversarial.robustness):
        defaults = {k: p.default for k, p in inspect.signature(function).parameters.items()}
        assert (defaults["eps"], defaults["random_start"]) == (2 / 255, True), "Chen E.5"
        assert defaults.get("steps", 10) == 10 and defaults["step_size"] is None
    assert inspect.signature(LookSAM).parameters["alpha"].default == 0.7


def test_attacks_take_labels_of_any_integer_type_gradients_of_any_scale_and_half_precision():
    model, (x, y) = small_cnn(), images_to_attack()
    want = adversarial.pgd(model, x, y)
    for dtype in (torch.int32, torch.int8, torch.uint8):
        assert torch.equal(adversarial.pgd(model, x, y.to(dtype)), want)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x = x.float()
    moved = [adversarial.ascend(x, grad * scale, x, 1.0, 0.5, "l2") for scale in (1, 1e-30, 1e30)]
    assert all(float((some - moved[0]).abs().max()) < 1e-6 for some in moved)
    half = x.half()
    assert torch.equal(adversarial.project(half, half, 0.0, "l2"), half)


def test_robustness_shows_examples_and_is_nan_where_the_model_is():
    model, (x, _) = small_cnn(), images_to_attack()
    with torch.no_grad():
        right = model(x).argmax(1)
    batches = [(x[:6], right[:6], list(range(6))), (x[6:], (right[6:] + 1) % 5, list(range(6, 12)))]
    examples = []
    adversarial.robustness(
        model, batches, eps=0.2, step_size=0.05, early_stop=True, restarts=2, examples=examples
    )
    for clean, y, shown, before, after in examples:
        with torch.no_grad():
            assert torch.equal(before, model(clean).argmax(1))
            assert torch.equal(after, model(shown).argmax(1))
    assert torch.equal(
        torch.cat([y for _, y, *_ in examples]), torch.cat([y for _, y, _ in batches])
    )
    moved = torch.cat(
        [(shown - clean).abs().flatten(1).amax(1) for clean, _, shown, *_ in examples]
    )
    assert (moved[:6] > 0).all() and not moved[6:].any(), "what is wrong already stays as it is"

    class Infinite(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = small_cnn()

        def forward(self, x):
            return self.network(x) / (x.amax((1, 2, 3)) < 1)[:, None]  # of image 1, infinite

    result = adversarial.summary([adversarial.robustness(Infinite(), batches[:1])])
    assert result["clean"] > 0 and all(map(math.isnan, result["robust"])), result


def test_the_strength_check_tells_masked_gradients():
    strong = [(0.1, 60.0), (0.2, 30.0), (0.5, 0.0)]
    verdict = lambda *given: [holds for _, holds in adversarial.verdicts(*given)]
    assert verdict(strong, [60, 50, 40], 1000) == [True, True, True]
    assert verdict([(0.1, 50), (0.2, 52), (0.5, 0)], [60, 50], 1000) == [False, True, True]
    assert verdict(strong, [60, 40, 50], 1000) == [True, False, True]
    assert verdict([(0.1, 50), (0.5, 20)], [60, 50], 1000) == [True, True, False]
    assert verdict([(0.1, 50), (0.2, 50.4), (0.5, 0.4)], [60, 60.4], 1000) == [True] * 3, "chance"
    assert verdict(strong, [60, 61.9], 100)[1] and not verdict(strong, [60, 62.1], 100)[1]
    assert verdict(strong, [60, 50, 50.4, 50.8], 1000) == [True, False, True], "over the least"


def test_a_robust_models_gradients_are_its_best_attack():
    """Of two small networks for `shapes`, one trained adversarially: PGD through the other's
    gradients does less to it than PGD through its own, so these are not masked."""
    eps, networks = 2 / 255, {}
    images, labels = data.shapes(range(4000))
    images = images.float() / 255
    for adversarially in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 36, 12),
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for step in range(250):
            x, y = (t[64 * step % 3000 :][:64] for t in (images, labels))
            if adversarially:
                start = adversarial.uniform_start(x, eps).requires_grad_()
                (grad,) = torch.autograd.grad(F.cross_entropy(network(start), y), start)
                x = adversarial.ascend(start, grad, x, eps, 1.25 * eps)
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
        networks[adversarially] = network.eval()
    attack = lambda network, source=None: adversarial.summary(
        [
            adversarial.robustness(
                network,
                [(images[3000:], labels[3000:], list(range(1000)))],
                eps=eps,
                step_size=eps / 8,
                source=source,
            )
        ]
    )["robust"][-1]
    plain, robust, transfer = (
        attack(networks[False]),
        attack(networks[True]),
        attack(networks[True], networks[False]),
    )
    assert plain + 2 < robust and robust + 1 < transfer, (plain, robust, transfer)


def test_fractions_are_read():
    texts = "2/255", "0.25", " 8 / 255", "1e-3", "0.25/255"
    assert [adversarial.fraction(text) for text in texts] == [
        2 / 255,
        0.25,
        8 / 255,
        1e-3,
        0.25 / 255,
    ]
    for text in ("2/0", "two", "", "nan", "2//255", "2/", "/255"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no number; give one as 0.0078"):
            adversarial.fraction(text)


# ------------------------------------------------------------------------------------------ data.py


def write_image_folder(root, train=12, val=6, classes=("ant", "bee", "cat")):
    """A data set in ImageNet's layout, of JPEGs of mixed sizes; each class has a colour of its own.
    Of each class, the first training images are greyscale, CMYK, and turned by an EXIF tag."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        for c, name in enumerate(classes):
            folder = Path(root) / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                height, width = rng.integers(40, 90, 2)
                pixels = rng.integers(0, 90, (height, width, 3))
                pixels[..., c % 3] += 150
                image, exif = Image.fromarray(pixels.astype(np.uint8)), Image.Exif()
                if split == "train" and i < 2:
                    image = image.convert(("L", "CMYK")[i])
                if split == "train" and i == 2:
                    exif[0x0112] = 6
                image.save(folder / f"{name}_{i}.JPEG", exif=exif)
    return root


def all_batches(dataset, order, workers=0):
    return list(data.batches(data.loader(dataset, order, workers)))


def test_shapes_are_the_same_bits_on_every_machine_in_any_order_and_batch():
    images, labels = data.shapes(range(64))
    assert (
        images.shape == (64, 3, 32, 32)
        and images.dtype == torch.uint8
        and labels.tolist() == [i % 12 for i in range(64)]
    )
    for picture, golden in (
        (images, "952e5ed3e8bd3fe3"),
        (data.shapes(2**40 + np.arange(64))[0], "9a27febc384b5f49"),
        (data.shapes(range(12), size=224)[0], "98749acace470fda"),
    ):
        assert hashlib.sha256(picture.numpy().tobytes()).hexdigest()[:16] == golden
    far = 2**40 + np.arange(100)
    order = np.random.default_rng(0).permutation(100)
    assert torch.equal(data.shapes(far)[0][order], data.shapes(far[order])[0])
    assert torch.equal(data.shapes([5])[0][0], images[5])
    assert not torch.equal(data.shapes([5], seed=1)[0][0], images[5])
    assert data.shapes([3], size=50)[0].shape == (1, 3, 50, 50)
    with pytest.raises(ValueError, match="negative"):
        data.shapes([-1])


def test_shapes_at_twice_the_size_are_the_same_pictures():
    small, large = (data.shapes(range(48), size=s)[0].float() for s in (32, 64))
    shrunk = F.avg_pool2d(large, 2)
    unlike = F.avg_pool2d(large.roll(12, 0), 2)
    assert (shrunk - small).abs().mean() < 0.5 * (unlike - small).abs().mean()
    assert (shrunk - small).abs().mean() < 9.5, "half a pixel aside: 11.4"


def test_a_linear_model_on_shapes_stays_under_25_percent():
    """Ridge regression on all 3,072 pixel values, its penalty chosen in its favour
    on the validation split."""
    x, y = data.shapes(range(8000))
    v, t = data.shapes(2**30 + np.arange(2000))
    x, v = ((a.flatten(1).float() / 255 - 0.3).double() for a in (x, v))
    gram, moment = x.T @ x, x.T @ (F.one_hot(y).double() - 1 / 12)
    accuracy = [
        100
        * ((v @ torch.linalg.solve(gram + r * torch.eye(len(gram)), moment)).argmax(1) == t)
        .double()
        .mean()
        for r in (30, 300, 3000, 30000)
    ]
    assert 10 < max(accuracy) < 25, accuracy


def test_class_balanced_fractions_have_the_papers_sizes():
    # ImageNet's 1,281,167 images: most classes have 1,300, none below 732
    counts = torch.full((1000,), 1300)
    counts[:100] = 1300 - 188
    counts[100] -= 1300 * 1000 - 188 * 100 - 1_281_167
    labels = torch.arange(1000).repeat_interleave(counts)[torch.randperm(int(counts.sum()))]
    assert len(labels) == 1_281_167
    chosen = {f: data.subset(labels, f) for f in ("1/2", "1/4", "1/10")}
    assert [len(c) for c in chosen.values()] == [640_583, 320_291, 128_116]
    for f, indices in chosen.items():
        share = torch.bincount(labels[indices], minlength=1000) / counts
        assert (
            len(indices.unique()) == len(indices)
            and float((share - float(Fraction(f))).abs().max()) < 1 / 700
        )
    assert torch.equal(chosen["1/4"], data.subset(labels, 0.25))
    assert set(chosen["1/10"].tolist()) <= set(chosen["1/2"].tolist())
    assert torch.equal(data.subset(labels[:100], 1), torch.arange(100))
    for wrong in ("0", "3/2", "1/1000000"):
        with pytest.raises(ValueError, match="at most 1"):
            data.subset(labels[:100], wrong)


def test_a_number_of_images_is_that_number_of_a_large_data_set():
    """As a fraction of 1,281,167 it has no smaller denominator."""
    labels = torch.arange(1_281_167) % 1000
    for n in (1, 2, 100, 50_000):
        assert len(data.subset(labels, Fraction(n, len(labels)))) == n
    assert len(data.subset(labels, 0.1)) == 128_116 == len(data.subset(labels, "1/10"))


def test_a_held_out_part_is_class_balanced_and_the_rest_is_all_others():
    labels = torch.arange(37).repeat_interleave(20)[torch.randperm(740)]
    others, held = data.hold_out(labels, "1/10")
    assert torch.equal(torch.cat([others, held]).sort().values, torch.arange(740))
    assert torch.bincount(labels[held]).tolist() == [2] * 37
    assert torch.equal(held, data.hold_out(labels, "1/10")[1]) and not torch.equal(
        held, data.hold_out(labels, "1/10", seed=1)[1]
    )
    with pytest.raises(ValueError, match="leaves none of 740 images"):
        data.hold_out(labels, 1)


def test_the_order_is_a_permutation_per_epoch_whatever_the_processes_and_the_start():
    def order(rank=0, world=1, start=0, stop=6):
        return list(
            data.TrainOrder(50, 16, 4, seed=3, start=start, stop=stop, rank=rank, world=world)
        )

    whole = order()
    assert len(whole) == 24 and all(len(micro) == 4 for micro in whole)
    for epoch in (0, 1):  # 50 images: 3 whole batches an epoch, the incomplete fourth is dropped
        seen = [i for micro in whole for e, i in micro if e == epoch]
        assert len(set(seen)) == len(seen) == 48
    assert [i for _, i in sum(whole[:12], [])] != [i for _, i in sum(whole[12:], [])]
    shares = [order(rank, 2) for rank in (0, 1)]
    for step in range(6):
        assert (
            whole[4 * step : 4 * step + 4]
            == shares[0][2 * step : 2 * step + 2] + shares[1][2 * step : 2 * step + 2]
        )
    assert order(start=4) == whole[16:]
    assert len({data.key(0, 1), data.key(1, 0), data.key(0, 1, 0), data.key(0, 2)}) == 4
    assert data.key(0, 1) == 313702574736366215  # as of the first runs: they stay reproducible
    assert data.keys(-1, np.array([0, 2**40]), np.array([3, 9])).tolist() == [
        data.key(2**64 - 1, 0, 3),
        data.key(-1, 2**40, 9),
    ]


def test_repeated_augmentation_shows_a_third_of_the_images_three_times_each_time_another():
    def order(rank=0, world=1, start=0, stop=4):
        return list(
            data.TrainOrder(
                60, 24, 8, seed=3, start=start, stop=stop, rank=rank, world=world, repeats=3
            )
        )

    whole = order()
    for epoch in (0, 1):  # two batches of 24: 16 of the 60 images
        micros = whole[6 * epoch : 6 * epoch + 6]
        seen = sum(micros, [])
        assert len(set(seen)) == 48 and len({i for _, i in seen}) == 16
        assert {e for e, _ in seen} == {3 * epoch, 3 * epoch + 1, 3 * epoch + 2}
        for step in (0, 3):
            batch = [{i for _, i in micro} for micro in micros[step : step + 3]]
            assert batch[0] == batch[1] == batch[2] and len(batch[0]) == 8, "never twice in one"
    assert [order(rank, 3) for rank in range(3)] == [whole[rank::3] for rank in range(3)]
    assert order(start=3) == whole[9:]
    images = data.InMemory(*data.shapes(range(60)), [], padding=4)
    pairs = sorted(sum(whole[:3], []), key=lambda pair: pair[1])[:3]
    x, y, _ = images[pairs]
    assert len({i for _, i in pairs}) == 1 and len({v.numpy().tobytes() for v in x}) == 3
    assert len(set(y.tolist())) == 1


def test_two_views_are_the_same_images_augmented_as_in_epochs_of_their_own():
    order = lambda **more: list(data.TrainOrder(60, 24, 8, seed=3, start=0, stop=4, **more))
    for one, two in zip(order(), order(views=2), strict=True):
        assert two == [(2 * e, i) for e, i in one] + [(2 * e + 1, i) for e, i in one]
    assert order(views=2, rank=1, world=3) == order(views=2)[1::3]
    assert len(set(sum(order(views=2, repeats=3), []))) == 2 * len(set(sum(order(repeats=3), [])))


@pytest.mark.parametrize(
    "strong",
    [{}, dict(randaugment=(2, 9), randaugment_prob=0.5, erasing=0.5)],
    ids=["plain", "strong"],
)
def test_augmentation_depends_on_seed_epoch_and_image_only(tmp_path, strong):
    write_image_folder(tmp_path)
    make = lambda seed=0: data.load(
        "folder",
        "train",
        data_dir=tmp_path,
        image_size=24,
        augment="inception",
        seed=seed,
        **strong,
    )
    pairs = [[(0, 5), (0, 1)], [(1, 5), (0, 30)]]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    alone = all_batches(make(), pairs)
    assert torch.equal(before, torch.get_rng_state()), "the caller's random numbers are not touched"
    for workers in (1, 4):
        by_workers = all_batches(make(), pairs, workers=workers)
        for (x, y), (other_x, other_y) in zip(alone, by_workers, strict=True):
            assert torch.equal(x, other_x) and torch.equal(y, other_y), workers
    assert torch.equal(
        all_batches(make(), [[(0, 30), (0, 5)]])[0][0],
        torch.stack([alone[1][0][1], alone[0][0][0]]),
    )
    assert not torch.equal(alone[0][0][0], alone[1][0][0]), "another epoch, another crop"
    assert not torch.equal(all_batches(make(1), pairs)[0][0], alone[0][0])


def test_evaluation_counts_every_image_once_on_any_number_of_processes():
    labels = torch.arange(103)
    dataset = data.InMemory(torch.zeros(103, 3, 2, 2, dtype=torch.uint8), labels, [])
    for world in (1, 2, 5, 200):
        seen = [
            y
            for rank in range(world)
            for _, ys in data.batches(data.evaluation_loader(dataset, 8, 0, rank, world))
            for y in ys.tolist()
        ]
        assert sorted(seen) == labels.tolist(), world


def test_odd_image_files_are_read_upright_and_in_rgb(tmp_path):
    """Greyscale, CMYK, palette, alpha, 16 bit, EXIF-rotated, animated:
    against PIL's own conversion."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    ramp = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    base, exif = Image.fromarray(ramp), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    base.convert("L").save(folder / "grey.jpg")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base.save(folder / "turned.jpg", exif=exif)
    base.convert("P").save(folder / "palette.png")
    base.convert("RGBA").save(folder / "alpha.png")
    base.save(folder / "wörd with space.webp")
    base.save(folder / "moving.gif", save_all=True, append_images=[base.rotate(180)])
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27).save(folder / "deep.png")
    dataset = data.ImageFolder(tmp_path / "train", None)
    names = [os.fsdecode(n) for n in dataset.names]
    assert len(names) == 8 and dataset.notice is None
    for i, name in enumerate(names):
        image = dataset.read(i)
        assert image.dtype == torch.uint8 and image.shape == (
            (3, 60, 40) if "turned" in name else (3, 40, 60)
        ), name
        if "deep" not in name:
            truth = np.asarray(
                ImageOps.exif_transpose(Image.open(dataset.root / name)).convert("RGB")
            )
            assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - truth).max() <= 1, name
        else:
            assert np.array_equal(image[0], np.arange(2400).reshape(40, 60) * 27 >> 8)
    for turn in range(10):  # 0 and 9 are no orientations
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = turn
        base.save(file, "PNG", exif=exif)
        truth = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
        assert np.array_equal(data.decode(file.getvalue()).permute(1, 2, 0), truth), turn
    for kind, odd in (("PNG", b"XXXXXXXXXXXX"), ("JPEG", b"Exif\0\0II"), ("WEBP", b"Exif\0\0XX")):
        file = io.BytesIO()
        base.save(file, kind, exif=odd)  # EXIF that cannot be read turns nothing
        assert data.decode(file.getvalue()).shape == (3, 40, 60), kind
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)).save(file, "PNG", exif=exif)
    assert data.decode(file.getvalue()).shape == (3, 60, 40), "of 16 bits, turned"


def test_a_jpeg_with_too_many_pixels_is_refused_wherever_it_is_cut(monkeypatch):
    file = io.BytesIO()
    Image.fromarray(np.zeros((64, 32, 3), np.uint8)).save(file, "JPEG")
    top = lambda height, width: (0, 0, 4, 4)
    assert data.decode(file.getvalue(), top).shape == (3, 4, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of the 2,048
    with pytest.raises(Image.DecompressionBombError):
        data.decode(file.getvalue(), top)


def test_damaged_image_folders_give_one_line_that_names_the_file(tmp_path):
    def load(split="train", classes=None):
        return data.load("folder", split, data_dir=tmp_path, image_size=16, classes=classes)

    with pytest.raises(data.DataError, match=r"train is no folder; --data-dir"):
        load()
    write_image_folder(tmp_path, train=3, val=2)
    good = load()
    with pytest.raises(data.DataError, match="unknown augmentation 'Inception'; known: inception"):
        data.load("folder", "train", data_dir=tmp_path, image_size=16, augment="Inception")
    whole = (tmp_path / "train/ant/ant_0.JPEG").read_bytes()

    # truncated: the rest is blank, and a note
    (tmp_path / "train/ant/ant_0.JPEG").write_bytes(whole[: len(whole) // 2])
    told = []
    images = [
        x
        for x, _ in data.batches(
            data.loader(load(), [[(0, 0)], [(0, 1)], [(1, 0)]], 1), tell=told.append
        )
    ]
    assert len(told) == 1 and "ant_0.JPEG is truncated" in told[0], told
    cut, intact = load().read(0), data.decode(whole)
    assert cut.shape == intact.shape and torch.equal(cut[:, :16], intact[:, :16])
    assert (cut[:, -1] == 128).all() and torch.equal(images[0], images[2]), "JPEG's grey"

    for content in (b"", b"hello", b"\xff\xd8\xff"):  # nothing to decode
        (tmp_path / "train/ant/ant_0.JPEG").write_bytes(content)
        for workers in (0, 1):
            with pytest.raises(data.DataError, match="ant_0.JPEG is not an image") as caught:
                all_batches(load(), [[(0, 0)]], workers)
            assert "\n" not in str(caught.value)
    (tmp_path / "train/ant/ant_0.JPEG").write_bytes(whole)

    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/ant/.hidden").write_text("not worth a word")
    assert "notes.txt" in load().notice and "more" not in load().notice and len(load()) == len(good)

    (tmp_path / "train/empty").mkdir()
    with pytest.raises(data.DataError, match="train/empty holds no image"):
        load()
    (tmp_path / "train/empty").rmdir()
    (tmp_path / "val/zebra").mkdir()
    with pytest.raises(
        data.DataError, match="val/zebra is a class that the training folder or the network lacks"
    ):
        load("val", good.classes)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(data.DataError, match="val is no folder"):
        load("val", good.classes)
    (tmp_path / "val").mkdir()
    shutil.copy(tmp_path / "train/ant/ant_1.JPEG", tmp_path / "val")
    with pytest.raises(data.DataError, match="no class folders but 1 images"):
        load("val", good.classes)


def packed(root, *more):
    """The file that the command makes of a folder, beside it."""
    out = Path(f"{root}.pack")
    data.main(["pack", "--data-dir", str(root), "--out", str(out), "--workers", "0", *more])
    return out


def test_a_packed_file_gives_the_images_of_its_folder_bit_for_bit(tmp_path, capsys):
    root = write_image_folder(tmp_path / "images", train=5, val=3)
    shutil.rmtree(root / "val/ant")  # validation images alone are numbered anew
    odd = [b"two  words.jpeg", b"line\nbreak.jpg"] + [b"\xff.jpg"] * (sys.platform == "linux")
    for name in odd:
        shutil.copy(root / "train/ant/ant_3.JPEG", os.fsencode(root / "train/bee") + b"/" + name)
    os.truncate(root / "train/cat/cat_4.JPEG", (root / "train/cat/cat_4.JPEG").stat().st_size // 2)
    (root / "train/ant/notes.txt").write_text("no image")
    out, val = packed(root, "--workers", "2"), packed(root / "val")
    printed = capsys.readouterr().out
    assert (
        "ant/notes.txt" in printed
        and f"python train.py --data-dir {out}" in printed
        and f": {21 + len(odd)} images of 3 classes" in printed
        and "--eval-only" in printed
    )
    for file, split, classes in (
        (out, "train", None),
        (out, "val", ["ant", "bee", "cat"]),
        (val, "val", ["ant", "bee", "cat"]),
        (val, "test", None),
    ):
        for more in ({}, dict(augment="inception", randaugment=(1, 9))):
            load = lambda where: data.load(
                "imagenet", split, data_dir=where, image_size=24, seed=3, classes=classes, **more
            )
            folder = load(root)
            pairs = [[(e, i), (1, 0)] for e in (0, 1) for i in range(len(folder))]
            expected = all_batches(folder, pairs)
            for pack, workers in (
                (load(file), 0),
                (load(file), 4),
                (pickle.loads(pickle.dumps(load(file))), 0),
            ):
                told = []
                got = [*data.batches(data.loader(pack, pairs, workers), told.append)]
                assert (
                    pack.classes == folder.classes
                    and len(pack) == len(folder)
                    and pack.names.tolist() == folder.names.tolist()
                    and torch.equal(pack.labels, folder.labels)
                    and all(map(same_tensors, expected, got))
                    and len(expected) == len(got)
                )
                assert len(told) == (split == "train"), told
                assert not told or f"{out}: train/cat/cat_4.JPEG is truncated" in told[0]
    for file, split, classes, words in (
        (val, "train", None, "val.pack holds no train images: pack a folder"),
        (out, "val", ["ant", "bee"], "images.pack: val/cat is a class that the training"),
    ):
        with pytest.raises(data.DataError, match=words):
            data.load("folder", split, data_dir=file, image_size=24, classes=classes)


def test_packing_at_a_short_side_bounds_it_and_leaves_small_images_alone(tmp_path):
    root = write_image_folder(tmp_path / "images", train=6, val=1)
    out, small = packed(root, "--short-side", "60"), 0
    folder, pack = data.ImageFolder(root / "train", None), data.Pack(out, "train", None)
    for i, name in enumerate(folder.names.tolist()):
        before, after = folder.read(i), pack.read(i)
        if min(before.shape[1:]) <= 60:
            small += (folder.root / os.fsdecode(name)).read_bytes() in out.read_bytes()
        else:
            before = v2.functional.resize(before, 60, antialias=True)
            assert before.shape == after.shape and min(after.shape[1:]) == 60
            assert (after.float() - before.float()).abs().mean() < 4  # of noise, JPEG's worst
    assert small == sum(min(folder.read(i).shape[1:]) <= 60 for i in range(18)) and 0 < small < 18
    (root / "val/ant/ant_0.JPEG").write_bytes(b"no image")
    with pytest.raises(data.DataError, match="val/ant/ant_0.JPEG is not an image"):
        data.pack(root, tmp_path / "other", 60, 1)


PACKED = ["train/a/0.png", "train/a/1.png", "train/b/0.png", "val/b/0.png"]


def tiny_pack(tmp_path):
    """A pack of a hundred bytes an image, and its training images."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(PACKED):
        (tmp_path / "tiny" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (3 + i, 4, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "tiny" / name)
    out = packed(tmp_path / "tiny")
    return out, [data.Pack(out, "train", None).read(i) for i in range(3)]


def test_a_pack_cut_anywhere_or_with_any_byte_changed_is_refused_or_right(tmp_path):
    out, images = tiny_pack(tmp_path)
    whole, rng, said = out.read_bytes(), np.random.default_rng(1), set()

    def damaged(content):
        """How many images are named in an error, while the others are right; None: refused."""
        out.unlink()  # a file that is overwritten instead is flushed to disk
        out.write_bytes(content)
        try:
            pack = data.Pack(out, "train", None)
        except data.DataError as error:
            return said.add(str(error))
        assert pack.labels.tolist() == [0, 0, 1] and pack.classes == ["a", "b"]
        count = 0
        for i, image in enumerate(images):
            try:
                assert torch.equal(pack.read(i), image)
            except data.DataError as error:
                assert f"{out}: {PACKED[i]} is damaged, its checksum" in str(error)
                count += 1
        return count

    start = int.from_bytes(whole[-32:-24], "little")
    training = np.frombuffer(whole[start : start + 40], "<u8").tolist()[3]  # where these end
    for place in range(len(whole)):
        assert damaged(whole[:place]) is damaged(whole[place + 1 :]) is None, place
        count = damaged(
            whole[:place] + bytes([whole[place] ^ 1 << rng.integers(8)]) + whole[place + 1 :]
        )
        assert count == (None if place >= start else int(place < training)), (place, count)
    assert damaged(b"hello" * 99) is damaged(whole + b"\n") is None and damaged(whole) == 0
    assert len(said) == 1 and "tiny.pack is no packed file of images, or a damaged" in said.pop()
    cut, replaced = data.Pack(out, "train", None), data.Pack(out, "train", None)
    cut.read(0)
    os.truncate(out, 10)
    out.unlink()
    data.pack(tmp_path / "tiny/train", out)
    for pack in (cut, replaced):
        with pytest.raises(data.DataError, match="tiny.pack has changed while in use"):
            pack.read(2)


def test_opening_a_pack_reads_its_index_only_which_is_as_the_format_says(tmp_path):
    out, images = tiny_pack(tmp_path)
    whole = out.read_bytes()
    start, n = np.frombuffer(whole[-32:-16], "<u8").tolist()
    assert n == 4 and start % 8 == 0
    offsets, ends = np.frombuffer(whole[start : start + 80], "<u8").reshape(2, 5).tolist()
    labels = np.frombuffer(whole[start + 96 : start + 112], "<u4").tolist()
    names, splits = np.split(np.frombuffer(whole[start + 112 : -32], np.uint8), [ends[-1]])
    assert labels == [0, 0, 1, 0] and names.tobytes() == b"a/0.pnga/1.pngb/0.pngb/0.png"
    assert json.loads(splits.tobytes()) == {
        "train": {"images": 3, "classes": ["a", "b"]},
        "val": {"images": 1, "classes": ["b"]},
    }
    for name, first, last in zip(PACKED, offsets, offsets[1:]):
        assert whole[first:last] == (tmp_path / "tiny" / name).read_bytes()
    index = whole[start:-32] + np.array([2**40, n], "<u8").tobytes()
    with open(out, "r+b") as file:  # the index behind a hole of a tebibyte
        file.seek(2**40)
        file.write(index + zlib.crc32(index).to_bytes(4, "little") + whole[-12:])
    assert torch.equal(data.Pack(out, "train", None).read(2), images[2])


def test_what_cannot_be_packed_is_one_line_and_leaves_no_file(tmp_path, capsys, monkeypatch):
    root, out = write_image_folder(tmp_path / "images", train=2, val=1), tmp_path / "file"

    def refused(*argv, left=()):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            data.main(["pack", "--data-dir", str(root), "--out", str(out), "--workers", "0", *argv])
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and line.startswith("data.py: "), line
        assert sorted(os.listdir(tmp_path)) == sorted(["images", *left])
        return line

    assert "no/where is no folder; --data-dir names the" in refused("--data-dir", "no/where")
    nowhere = str(tmp_path / "no/where")
    assert f"{nowhere}.partial: No such file" in refused("--out", nowhere)
    (root / "train/empty").mkdir()
    assert "train/empty holds no image" in refused()
    (root / "train/empty").rmdir()
    (root / "val/cat/note.png").write_text("no image")
    assert "val/cat/note.png is not an image that can be decoded" in refused()
    (root / "val/cat/note.png").unlink()
    (root / "val/cat/dead.jpg").symlink_to("nowhere")
    assert "val/cat/dead.jpg cannot be read: No such file" in refused()
    (root / "val/cat/dead.jpg").unlink()

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for event, words in (
        (full, "file: No space left on device"),
        (lambda number: signal.raise_signal(signal.SIGINT), "is not written; the"),
        (lambda number: signal.raise_signal(signal.SIGTERM), "data.py: interrup"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", event)
            assert words in refused()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, 2); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, f"{out}.partial"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        assert "is being written by another process" in refused(left=["file.partial"])
        other.communicate(b"\n")
    data.pack(root, out)
    before = out.read_bytes()
    assert "file exists: remove it" in refused(left=["file"]) and out.read_bytes() == before


def test_a_process_killed_while_packing_leaves_no_file_and_the_next_one_makes_it(tmp_path):
    """Killed at an image that is a pipe into which nobody writes."""
    root, out = write_image_folder(tmp_path / "images", train=2, val=1), tmp_path / "images.pack"
    pipe = root / "val/bee/pipe.jpg"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [
            sys.executable,
            HERE / "data.py",
            "pack",
            "--data-dir",
            root,
            "--out",
            out,
            "--workers",
            "0",
        ]
    )
    try:
        while True:
            try:
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                break
            except OSError:  # nobody reads yet
                assert process.poll() is None, "it ended before the image"
                time.sleep(0.01)
    finally:
        process.kill()
        ended = process.wait()
    assert ended == -signal.SIGKILL
    os.close(writer)
    pipe.unlink()
    assert not out.exists() and Path(f"{out}.partial").exists()
    data.pack(root, out)
    assert len(data.Pack(out, "val", None)) == 3 and not Path(f"{out}.partial").exists()


def test_links_odd_names_and_bombs_of_images(tmp_path):
    """Folders may be links, into each other too, but not to where they lie; a name may hold any
    byte; an image of more pixels than PIL allows is refused, as is one that its file has not."""
    root, elsewhere = tmp_path / "train", tmp_path / "elsewhere"
    odd = os.fsdecode(b"\xff\n b")
    for folder in (root / "a", root / odd, elsewhere):
        folder.mkdir(parents=True)
        Image.fromarray(np.full((3, 4, 3), 7, np.uint8)).save(folder / (odd + ".png"))
    (root / "c").symlink_to(elsewhere)
    (root / "a/linked.png").symlink_to(elsewhere / (odd + ".png"))
    dataset = data.ImageFolder(root, None)
    assert dataset.classes == ["a", "c", odd] and dataset.labels.tolist() == [0, 0, 1, 2]
    assert all((dataset.read(i) == 7).all() for i in range(4))
    assert data.Pack(packed(root), "val", None).classes == dataset.classes

    def png(width, height):
        chunk = lambda kind, content: (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(99)))
            + chunk(b"IEND", b"")
        )

    broken = root / "a/linked.png"
    broken.unlink()
    broken.write_bytes(png(60_000, 60_000))
    with pytest.raises(data.DataError, match="linked.png is not an image that can be decoded"):
        dataset.read(0)
    broken.unlink()
    broken.symlink_to("nowhere")
    with pytest.raises(data.DataError, match="linked.png cannot be read: No such file"):
        dataset.read(0)
    for link, to in ((root / "a/self", "."), (elsewhere / "back", root)):
        link.symlink_to(to)
        with pytest.raises(data.DataError, match="is a link to a folder that it lies in: remove"):
            data.ImageFolder(root, None)
        link.unlink()


def test_what_a_folder_holds_beside_images_of_classes_is_told_and_hidden_names_are_passed_over(
    tmp_path, monkeypatch
):
    for name in ("a/x/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(tmp_path / name)
    whole = data.ImageFolder(tmp_path, None)
    assert whole.notice is None
    for name in ("a/._1.png", "a/.hidden/3.png", ".git/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    assert data.ImageFolder(tmp_path, None).notice is None
    (tmp_path / "lost").symlink_to("nowhere")  # a class of which only the link is left
    (tmp_path / "loose.png").write_bytes(b"")
    (tmp_path / "a/x/notes.txt").write_text("")
    found = data.ImageFolder(tmp_path, None)
    assert found.notice == f"left out, no image of a class: {tmp_path}/loose.png and 2 more"
    assert found.names.tolist() == whole.names.tolist() == [b"a/x/1.png", b"b/2.png"]
    scandir = os.scandir
    for locked in (tmp_path, tmp_path / "a/x"):

        def refused(path, locked=locked):
            if str(path) == str(locked):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", refused)
            with pytest.raises(data.DataError, match=f"{locked} cannot be read: Permission denied"):
                data.ImageFolder(tmp_path, None)


def test_validation_labels_follow_the_training_folders_numbers(tmp_path):
    write_image_folder(tmp_path)
    shutil.rmtree(tmp_path / "val/ant")
    train_set = data.load("folder", "train", data_dir=tmp_path, image_size=16)
    val_set = data.load(
        "folder", "val", data_dir=tmp_path, image_size=16, classes=train_set.classes
    )
    for x, y in data.batches(data.evaluation_loader(val_set, 4)):
        assert torch.equal(x.float().mean((2, 3)).argmax(1), y), (
            "each class of the test folder has a colour of its own"
        )
    assert val_set.labels.unique().tolist() == [1, 2]


def test_cifar_is_read_from_its_published_files(tmp_path, monkeypatch):
    """Small files in the published format; their checksums stand in for those of the real ones."""
    rng = np.random.default_rng(0)
    for name, cls, key, batch_names in (
        (
            "cifar10",
            data.CIFAR10,
            "labels",
            [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"],
        ),
        ("cifar100", data.CIFAR100, "fine_labels", ["train", "test"]),
    ):
        folder = tmp_path / cls.base_folder
        with pytest.raises(
            data.DataError,
            match=(f"{cls.base_folder} is missing or incomplete; unpack {cls.filename}"),
        ):
            data.load(name, "train", data_dir=tmp_path, image_size=32)
        folder.mkdir()
        sums = {}
        for batch in batch_names:
            content = pickle.dumps(
                {
                    "data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
                    key: rng.integers(0, 10, 4).tolist(),
                }
            )
            (folder / batch).write_bytes(content)
            sums[batch] = hashlib.md5(content).hexdigest()
        meta = pickle.dumps(
            {cls.meta["key"]: [f"class{i}" for i in range(100 if name == "cifar100" else 10)]}
        )
        (folder / cls.meta["filename"]).write_bytes(meta)
        monkeypatch.setattr(
            cls, "train_list", [[b, sums[b]] for b in batch_names if not b.startswith("test")]
        )
        monkeypatch.setattr(
            cls, "test_list", [[b, sums[b]] for b in batch_names if b.startswith("test")]
        )
        monkeypatch.setitem(cls.meta, "md5", hashlib.md5(meta).hexdigest())
        raw = pickle.loads((folder / batch_names[-1]).read_bytes())
        val = data.load(name, "val", data_dir=tmp_path, image_size=32)
        ((x, y),) = all_batches(val, [[(0, 2)]])
        assert x[0].flatten().tolist() == raw["data"][2].tolist() and y.item() == raw[key][2]
        assert len(val.classes) == (100 if name == "cifar100" else 10)
        test = data.load(name, "test", data_dir=tmp_path, image_size=32)
        assert torch.equal(test[[(0, i) for i in range(4)]][0], val[[(0, i) for i in range(4)]][0])
        train_set = data.load(name, "train", data_dir=tmp_path, image_size=32, augment="crop")
        ((x, y),) = all_batches(train_set, [[(0, 1)]])
        clean = data.load(name, "train", data_dir=tmp_path, image_size=32).pixels[1]
        first = pickle.loads((folder / batch_names[0]).read_bytes())
        assert clean.flatten().tolist() == first["data"][1].tolist() and y.item() == first[key][1]
        padded = F.pad(clean, (4, 4, 4, 4))
        windows = [padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(x[0], w) or torch.equal(x[0], w.flip(2)) for w in windows)
        assert data.load(name, "val", data_dir=tmp_path, image_size=48).transform(clean).shape == (
            3,
            48,
            48,
        )
        large = data.load(name, "train", data_dir=tmp_path, image_size=224, augment="inception")
        ((x, y),) = all_batches(large, [[(0, 1), (1, 1)]])  # transfer: crops of 32×32, enlarged
        assert x.shape == (2, 3, 224, 224) and not torch.equal(x[0], x[1])
        assert x[0].int().diff(dim=2).abs().max() < 255 / 4, "enlarged by 7 at least, and smoothly"
        (folder / batch_names[0]).write_bytes(b"cut")
        with pytest.raises(data.DataError, match="missing or incomplete"):
            data.load(name, "train", data_dir=tmp_path, image_size=32)


def test_inception_crops_cover_5_to_100_percent_at_aspects_between_3_4_and_4_3():
    """Read off the pixels: each holds its own position."""
    size = 200
    y, x = np.mgrid[:size, :size]
    image = torch.from_numpy(np.stack([x, y, np.zeros_like(x)]).astype(np.uint8))
    crop = data.transforms("inception", 64)
    torch.manual_seed(0)
    areas, aspects, flips = [], [], 0
    for _ in range(400):
        out = crop(image).float()
        width, height = (float((out[c].max() - out[c].min()) * 64 / 63) for c in (0, 1))
        areas.append(width * height / size**2)
        aspects.append(width / height)
        flips += bool(out[0, 0, 0] > out[0, 0, -1])
    assert 0.04 < min(areas) < 0.08 and 0.9 < max(areas) < 1.05, (min(areas), max(areas))
    assert 0.7 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.4, (min(aspects), max(aspects))
    assert 150 < flips < 250, flips


def test_a_box_of_an_image_is_decoded_to_the_pixels_it_has_in_the_whole():
    """JPEGs of all subsamplings and modes, with restarts, progressive, are cut below the box; with
    EXIF they are not, nor are other formats."""
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    kinds = [
        ("JPEG", mode, dict(subsampling=s, progressive=p, restart_marker_rows=r))
        for mode in ("RGB", "L", "CMYK")
        for s in (0, 1, 2)
        for p in (0, 1)
        for r in (0, 1)
    ]
    kinds += [("JPEG", "RGB", dict(exif=exif)), ("PNG", "P", {}), ("PNG", "L", {})]
    for kind, mode, options in kinds:
        pixels, file = rng.integers(0, 256, (*rng.integers(20, 120, 2), 3)), io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(file, kind, **options)
        encoded = file.getvalue()
        whole, cut = data.decode(encoded), kind == "JPEG" and "exif" not in options
        assert (data.jpeg_height(encoded) is not None) == cut
        for _ in range(10):
            (top, bottom), (left, right) = (
                sorted(rng.choice(n + 1, 2, False)) for n in whole.shape[1:]
            )
            part = data.decode(
                encoded,
                lambda *size: size == whole.shape[1:] and (top, left, bottom - top, right - left),
            )
            assert torch.equal(part, whole[:, top:bottom, left:right]), (kind, mode, options)
        if "exif" in options:  # the same image with its EXIF segment behind the frame header
            start = encoded.index(b"\xff\xe1")
            segment = encoded[start : start + 2 + struct.unpack_from(">H", encoded, start + 2)[0]]
            rest = encoded.replace(segment, b"")
            frame = rest.index(b"\xff\xc0")
            frame += 2 + struct.unpack_from(">H", rest, frame + 2)[0]
            moved = rest[:frame] + segment + rest[frame:]
            assert torch.equal(data.decode(moved), whole) and data.jpeg_height(moved) is None
    for broken in (b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xc0", b"\xff\xd8" * 9):
        assert data.jpeg_height(broken) is None


def test_inception_crops_are_distributed_and_resized_as_torchvisions():
    reference = data.v2.RandomResizedCrop(24, scale=(0.05, 1.0), antialias=False)
    crop, n = data.InceptionCrop(24), 3000
    numbers = data.uniforms(data.keys(np.arange(n)), crop.NUMBERS).tolist()
    torch.manual_seed(0)
    for height, width in ((375, 500), (64, 64), (300, 90)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        ours = np.array([crop.box(u, height, width) for u in numbers])
        theirs = np.array([list(reference.make_params([image]).values()) for _ in range(n)])
        for a, b in zip(*((*x.T, x[:, 2] * x[:, 3], x[:, 3] / x[:, 2]) for x in (ours, theirs))):
            at = np.concatenate([a, b])  # two-sample Kolmogorov-Smirnov, p = 0.001
            a, b = (np.searchsorted(np.sort(x), at, "right") / n for x in (a, b))
            assert abs(a - b).max() < 1.95 * (2 / n) ** 0.5, (height, width, abs(a - b).max())
        for u, (top, left, h, w) in list(zip(numbers, ours))[:20]:
            truth = data.v2.functional.resized_crop(
                image, top, left, h, w, [24, 24], antialias=False
            )
            out = crop.finish(u, image[:, top : top + h, left : left + w])
            assert out.is_contiguous() and torch.equal(out.flip(2) if u[2] < 0.5 else out, truth)
    assert crop.box([0.9] * 23, 20, 2000) == (0, 987, 20, 27), "no try fits: the middle"
    assert (
        crop.box([1 - 2**-53] * 2 + [0.5] * 21, 99, 99)[0] == 99 - crop.box([0.5] * 23, 99, 99)[2]
    ), "the last row is reached"


def test_batches_in_memory_are_padded_cropped_and_flipped_as_by_torchvision():
    image = torch.randint(1, 256, (3, 32, 32), dtype=torch.uint8)
    windows = F.pad(image, (4,) * 4).unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
    windows = torch.cat([windows.flatten(0, 1), windows.flatten(0, 1).flip(3)])  # (162, 3, 32, 32)
    number = {w.numpy().tobytes(): i for i, w in enumerate(windows)}
    dataset = data.InMemory(image.expand(100, 3, 32, 32), torch.arange(100), [], padding=4)
    ours = np.bincount(
        [
            number[x.numpy().tobytes()]
            for epoch in range(162)
            for x in dataset[[(epoch, i) for i in range(100)]][0]
        ],
        minlength=162,
    )
    chi2 = ((ours - 100) ** 2 / 100).sum()
    assert chi2 < 161 + 4 * (2 * 161) ** 0.5, f"16,200 images, 162 equally likely outcomes: {chi2}"
    v2 = data.transforms("crop", 32, 32)
    assert {number[v2(image).numpy().tobytes()] for _ in range(4000)} == set(range(162))


@pytest.mark.parametrize("more", [{}, dict(randaugment=(2, 9), erasing=0.5)], ids=["plain", "more"])
def test_augmentation_in_memory_depends_on_seed_epoch_and_image_only(more):
    def make(seed=0):
        steps = data.transforms("none", 32, 32, **more)
        return data.InMemory(*data.shapes(range(30)), [], steps, seed, padding=4)

    def run(rank=0, world=1, start=0, seed=0, workers=0):
        order = data.TrainOrder(30, 8, 4, 5, start, 6, rank, world)
        return [x for x, _ in all_batches(make(seed), order, workers)]

    whole = run()
    for again, truth in (
        (run(workers=1), whole),
        (run(workers=4), whole),
        (run(start=2), whole[4:]),
        (run(0, 2), whole[::2]),
        (run(1, 2), whole[1::2]),
    ):
        assert len(again) == len(truth) and all(map(torch.equal, again, truth))
    assert not any(map(torch.equal, run(seed=1), whole))
    x, again = make()[[(0, 3), (1, 3), (0, 4)]][0], make()[[(0, 4), (0, 3)]][0]
    assert torch.equal(x[[2, 0]], again) and not torch.equal(x[0], x[1]), "another epoch, another"


def test_without_flip_there_are_crops_only():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    windows = F.pad(image, (4,) * 4).unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
    windows = {w.numpy().tobytes() for w in windows.flatten(0, 1)}
    pairs = [(epoch, 0) for epoch in range(600)]
    seen = [
        {
            x.numpy().tobytes()
            for x in data.InMemory(image[None], torch.zeros(1), [], padding=4, flip=flip)[pairs][0]
        }
        for flip in (False, True)
    ]
    assert seen[0] <= windows and len(seen[0]) == 81 and not seen[1] <= windows
    one_by_one = data.transforms("crop", 32, 32, flip=False)
    assert {one_by_one(image).numpy().tobytes() for _ in range(300)} <= windows
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    for flip, rising in ((False, {True}), (True, {True, False})):
        crop = data.transforms("inception", 16, flip=flip)
        assert {bool((crop(ramp)[0, 0].int().diff() >= 0).all()) for _ in range(50)} == rising


def test_images_to_be_evaluated_are_resized_to_the_short_side_and_cut_to_the_size(tmp_path):
    write_image_folder(tmp_path, train=3, val=2)
    shown = data.load("folder", "val", data_dir=tmp_path, image_size=24, short_side=33)
    for i in range(6):
        image = shown.read(i)
        by_hand = v2.functional.center_crop(v2.functional.resize(image, 33, antialias=True), 24)
        assert torch.equal(all_batches(shown, [[(0, i)]])[0][0][0], by_hand)
    default = data.load("folder", "val", data_dir=tmp_path, image_size=24)
    assert default.transform.transforms[0].size == [27]  # 24 · 256 / 224


def test_the_bench_compares_the_pipelines_by_one_thread_and_leaves_torch_as_it_was(
    tmp_path, capsys, request
):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    jpegs, pngs = data.photographs(tmp_path, 2)
    assert [Image.open(f).size for f in pngs.rglob("*.png")] == [(500, 375)] * 2
    assert 80e3 < (jpegs / "class/0.jpeg").stat().st_size < 130e3
    said, threads = [], set()

    def tell(line):
        said.append(line)
        threads.add(torch.get_num_threads())

    data.bench(jpegs, 1, 2, tell)
    out = "\n".join(said)
    assert out.count("ratio") >= 4 and "normalize" in out and "resize and flip" in out, out
    assert threads == {1} and "2 workers" in out, (threads, out)
    for jpeg in jpegs.rglob("*.jpeg"):
        jpeg.write_bytes(jpeg.read_bytes()[:100])
    with pytest.raises(SystemExit):
        data.main(["bench", "--rounds", "1", "--data-dir", str(jpegs)])
    assert re.search(r"class/\d\.jpeg cannot be decoded: ", capsys.readouterr().err)
    assert torch.get_num_threads() == 2, "of a bench that failed"


def test_randaugment_and_random_erasing_act_as_often_and_as_much_as_asked():
    torch.manual_seed(0)
    line = torch.zeros(3, 65, 65, dtype=torch.uint8)
    line[:, 32, 8:57] = 255
    turns = {}
    for magnitude in (3, 9):
        steps = data.transforms("none", 65, 65, randaugment=(1, magnitude))
        outputs = torch.stack([steps(line) for _ in range(800)]).float()
        lit = ((outputs > 128) & (outputs == outputs.amax((1, 2, 3), keepdim=True))).all(1)
        same = lit.flatten(1).sum(1) == 49
        # Rotations and shears, by nearest neighbours, keep about as many pixels of the line; of the
        # two a rotation makes it span the most rows.
        turned = lit.flatten(1).sum(1).sub(49).abs().lt(8) & ~lit[:, 32, 8:57].all(1)
        rows = lit[turned].any(2).sum(1)  # rows that the turned line spans
        turns[magnitude] = math.degrees(math.asin((rows.max().item() - 1) / 49))
        assert same.float().mean() > 0.4, "at least colour operations leave the line in its place"
    assert abs(turns[3] - 9) < 2 and abs(turns[9] - 27) < 2, turns
    noise = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    kept = {}
    for probability in (0.0, 0.5, 1.0):
        steps = data.transforms("none", 32, 32, randaugment=(2, 9), randaugment_prob=probability)
        kept[probability] = sum(torch.equal(steps(noise), noise) for _ in range(400)) / 400
    # one of 14 operations is the identity, and here one or two more change nothing
    assert kept[0.0] == 1 and 0.24 < kept[0.5] < 0.40 and kept[1.0] < 0.06, kept
    steps = data.transforms("none", 32, 32, erasing=0.25)
    areas = torch.tensor([(steps(noise) == 128).all(0).float().mean() for _ in range(800)])
    erased = areas[areas > 0.015]
    assert abs(len(erased) / 800 - 0.25) < 0.05, f"{len(erased)} of 800 erased"
    assert erased.min() < 0.05 and 0.25 < erased.max() < 0.36, (erased.min(), erased.max())


def write_grey(path, value, size=16):
    """A JPEG that is of one grey, so that reading it tells which file it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value,) * 3).save(path, "JPEG")


def greys(dataset):
    """(grey, label or row of labels) of each image, as the loader gives them."""
    return [
        (round(image.float().mean().item()), label.tolist())
        for x, y in data.batches(data.evaluation_loader(dataset, 64))
        for image, label in zip(x, y)
    ]


def write_mat(path, compress, **arrays):
    """A MATLAB 5 file, byte by byte as The MathWorks' "MAT-File Format" has it."""

    def element(kind, content):
        if 0 < len(content) <= 4:  # the small form
            return struct.pack("<HH4s", kind, len(content), content)
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    file = b"MATLAB 5.0 MAT-file, Platform: GLNX86".ljust(124) + struct.pack("<H2s", 0x100, b"IM")
    for name, values in arrays.items():
        kind, mx = {"uint8": (2, 9), "uint16": (4, 11), "float64": (9, 6)}[values.dtype.name]
        matrix = element(
            14,
            element(6, struct.pack("<II", mx, 0))
            + element(5, struct.pack("<ii", 1, len(values)))
            + element(1, name.encode())
            + element(kind, values.tobytes()),
        )
        packed = zlib.compress(matrix)
        file += struct.pack("<II", 15, len(packed)) + packed if compress else matrix
    path.write_bytes(file)


@pytest.mark.parametrize("compress", [False, True])
def test_matlab_files_are_read_without_scipy(tmp_path, compress):
    rng = np.random.default_rng(0)
    arrays = dict(
        labels=rng.integers(1, 103, 1001).astype(np.uint8),
        x=np.array([7], np.uint16),
        a_long_name=rng.integers(1, 9000, 3).astype(np.uint16),
        d=rng.normal(size=5),
    )
    write_mat(tmp_path / "a.mat", compress, **arrays)
    read = data.read_mat(tmp_path / "a.mat")
    assert read.keys() == arrays.keys()
    assert all(np.array_equal(read[name], arrays[name]) for name in arrays)
    whole = (tmp_path / "a.mat").read_bytes()
    for wrong in (
        b"",
        whole[:-20],
        whole.replace(b"5.0", b"7.3", 1),
        whole[:126] + b"MI",
        whole[:140] + b"\xff" * 60,
    ):
        (tmp_path / "b.mat").write_bytes(wrong)
        with pytest.raises(data.DataError, match="b.mat is not a MATLAB 5 file"):
            data.read_mat(tmp_path / "b.mat")


def test_flowers_are_read_from_their_published_files(tmp_path, monkeypatch):
    folder = tmp_path / "flowers-102"

    def load(split="train", **more):
        return data.load("flowers102", split, data_dir=tmp_path, image_size=16, **more)

    with pytest.raises(data.DataError, match="imagelabels.mat is missing .* unpack 102flowers.tgz"):
        load()

    def fetch(root, download):
        assert root == tmp_path and download
        folder.mkdir()
        write_mat(
            folder / "setid.mat",
            True,
            trnid=np.array([2, 5], np.uint16),
            valid=np.array([1], np.uint16),
            tstid=np.array([6, 3, 4], np.uint16),
        )
        write_mat(
            folder / "imagelabels.mat", True, labels=np.array([77, 77, 1, 102, 50, 50], np.uint8)
        )
        for number in range(1, 7):
            write_grey(folder / "jpg" / f"image_{number:05d}.jpg", 10 * number)
        raise ImportError("scipy")  # as torchvision's class does then

    monkeypatch.setitem(data.OXFORD, "flowers102", (fetch, *data.OXFORD["flowers102"][1:]))
    # train is train and val; labels count from 0
    train_set = load(download=True)
    assert greys(train_set) == [(20, 76), (50, 49), (10, 76)]
    assert greys(load("val")) == greys(load("test")) == [(60, 49), (30, 0), (40, 101)]
    assert len(train_set.classes) == 102 and train_set.classes[0] == "pink primrose"
    assert all_batches(load(augment="inception"), [[(0, 0), (1, 2)]])[0][0].shape == (2, 3, 16, 16)
    (folder / "jpg/image_00003.jpg").unlink()
    with pytest.raises(data.DataError, match="jpg/image_00003.jpg is missing"):
        load("test")
    (folder / "setid.mat").write_bytes(b"<html>404")
    with pytest.raises(data.DataError, match="setid.mat is not a MATLAB 5 file"):
        load()


def test_pets_are_read_from_their_published_files(tmp_path, monkeypatch):
    folder = tmp_path / "oxford-iiit-pet"

    def load(split="train", **more):
        return data.load("pets", split, data_dir=tmp_path, image_size=16, **more)

    def fail(root, download):
        raise OSError("no network")

    with monkeypatch.context() as patch:
        patch.setitem(data.OXFORD, "pets", (fail, *data.OXFORD["pets"][1:]))
        with pytest.raises(data.DataError, match="oxford-iiit-pet failed .no network"):
            load(download=True)
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations/trainval.txt").write_text(
        "Abyssinian_100 1 1 1\nAbyssinian_101 1 1 1\nBengal_7 3 1 2\namerican_bulldog_12 2 2 1\n"
    )
    with pytest.raises(data.DataError, match="oxford-iiit-pet/images is missing"):
        load()
    for i, name in enumerate(
        ("Abyssinian_100", "Abyssinian_101", "Bengal_7", "american_bulldog_12", "Bengal_8")
    ):
        write_grey(folder / "images" / f"{name}.jpg", 10 * i)
    assert greys(load()) == [(0, 0), (10, 0), (20, 2), (30, 1)]
    assert load().classes == ["Abyssinian", "american_bulldog", "Bengal"]
    with pytest.raises(data.DataError, match="annotations/test.txt is missing .* images.tar.gz"):
        load("test")
    (folder / "annotations/test.txt").write_text("Bengal_8\n")
    with pytest.raises(data.DataError, match="oxford-iiit-pet is missing or damaged"):
        load("test")


def test_imagenet21k_is_told_what_to_do_about_its_missing_validation_images(tmp_path):
    def load(split, classes=None):
        return data.load(
            "imagenet21k", split, data_dir=tmp_path / "21k", image_size=16, classes=classes
        )

    with pytest.raises(data.DataError, match="21k/train is no folder; --data-dir names"):
        load("train")
    for i, name in enumerate(("n00004475", "n01440764", "n01443537")):
        write_grey(tmp_path / "21k/train" / name / f"{name}_1.JPEG", 10 * i)
    for split in ("train", "val"):  # train as well: before 14 million files are listed
        with pytest.raises(data.DataError, match="21k/val is no folder.* link ImageNet's val/"):
            load(split)
    write_grey(tmp_path / "imagenet/val/n01443537/ILSVRC2012_val_00000001.JPEG", 99)
    (tmp_path / "21k/val").symlink_to(tmp_path / "imagenet/val")
    train_set = load("train")
    assert greys(train_set) == [(0, 0), (10, 1), (20, 2)]
    assert greys(load("val", train_set.classes)) == [(99, 2)]


def test_imagenet_v2_r_and_real_have_their_publishers_labels(tmp_path):
    wnids = [f"n{i:08d}" for i in range(10_000, 11_000)]
    root = tmp_path / "imagenet"

    def read(name, classes=wnids):
        assert data.conditions(name, root) == [(None, None)]
        return data.benchmark(name, data_dir=root, image_size=16, classes=classes)

    def short_sides(name):
        """What `transforms` is asked for where images are to have a short side of 20."""
        asked = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "transforms", lambda *args, **more: asked.extend(more.values()))
            data.benchmark(name, data_dir=root, image_size=16, classes=wnids, short_side=20)
        return asked

    for name in ("v2", "r", "real"):
        with pytest.raises(
            data.DataError,
            match=(
                f"{name}: there is neither .*imagenet/{data.BENCHMARKS[name][0]} nor .*expected"
            ),
        ):
            data.conditions(name, root)

    # v2: folder 10 sorts before folder 2 and is class 10
    v2 = root / data.BENCHMARKS["v2"][0]
    write_grey(v2 / "0/a.jpeg", 0)
    for c in range(1, 1000):
        if c % 4 == 0:
            write_grey(v2 / f"{c}/a.jpeg", c // 4)
        else:
            (v2 / str(c)).mkdir()
            shutil.copy(v2 / f"{c - c % 4}/a.jpeg", v2 / str(c))
    dataset = read("v2")
    assert "1,000 images instead of the published 10,000" in dataset.notice
    assert dataset.classes == wnids and dataset.restrict_logits is None
    seen = greys(dataset)
    assert len(seen) == 1000 and all(grey == label // 4 for grey, label in seen)
    (v2 / "999").rename(v2 / "1000")
    with pytest.raises(data.DataError, match="val/1000 is a class.*expected: folders 0 to 999"):
        read("v2")
    shutil.rmtree(v2 / "1000")
    with pytest.raises(data.DataError, match="has 999 class folders; expected: folders 0 to 999"):
        read("v2")

    # r: 200 of the classes, beside the data folder
    for i in range(0, 1000, 5):
        write_grey(tmp_path / "imagenet-r" / wnids[i] / "art_0.jpg", i // 5)
    (tmp_path / "imagenet-r/README.txt").write_text("as in the archive")
    dataset = read("r")
    assert dataset.restrict_logits.tolist() == list(range(0, 1000, 5))
    assert 20 in short_sides("r")
    assert all(grey == label // 5 for grey, label in greys(dataset))
    shutil.rmtree(tmp_path / "imagenet-r" / wnids[0])
    with pytest.raises(data.DataError, match="imagenet-r has 199 class folders; expected: 200"):
        read("r")

    # real: by the number in the file's name, not by the folder's place
    answers = {1: [], 2: [5], 3: [7, 2, 9], 4: [0], 5: []}
    (root / "real.json").write_text(json.dumps(list(answers.values())))
    for number, c in ((3, 0), (5, 1), (1, 2), (4, 3), (2, 999)):
        write_grey(root / "val" / wnids[c] / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    dataset = read("real")
    assert greys(dataset) == [(3, [7, 2, 9]), (4, [0, -1, -1]), (2, [5, -1, -1])], greys(dataset)
    assert 20 in short_sides("real")
    for damage in (
        "[",
        "[[1], 2, 3, 4, 5]",
        "[[1], [2]]",
        '{"a": 1}',
        "[[1000], [], [], [], []]",
        "[[-1], [], [], [], []]",
    ):
        (root / "real.json").write_text(damage)
        with pytest.raises(data.DataError, match="real.json is damaged; expected: 50,000 lists"):
            read("real")
    write_grey(root / "val" / wnids[0] / "renamed.JPEG", 0)
    with pytest.raises(data.DataError, match="renamed.JPEG has no number in its name"):
        read("real")
    for classes in (wnids[:999], wnids[::-1], wnids[:999] + ["zebra"]):
        for name in ("v2", "r", "real"):
            with pytest.raises(data.DataError, match=f"{name} needs a model of ImageNet's 1,000"):
                read(name, classes)


def test_imagenet_c_is_read_as_it_is_unpacked(tmp_path):
    assert len(data.ALEXNET_ERRORS) == 15 and len(set(data.CORRUPTIONS)) == 19
    # Hendrycks & Dietterich, Table 1, as printed
    printed = "88.6 89.4 92.3 82.0 82.6 78.6 79.8 86.7 82.7 81.9 56.5 85.3 64.6 71.8 60.7".split()
    errors = [abs(float(p) - a) for p, a in zip(printed, data.ALEXNET_ERRORS.values(), strict=True)]
    assert max(errors) < 0.0501, errors
    rng, root = np.random.default_rng(0), tmp_path / "imagenet-c"
    for i, corruption in enumerate(data.CORRUPTIONS):
        for severity in range(1, 6):
            write_grey(root / corruption / str(severity) / "bee/1.JPEG", 10 * i + severity, 224)
    file = root / "fog/3/ant/2.JPEG"
    file.parent.mkdir()
    Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(file)
    read = partial(data.benchmark, "c", data_dir=tmp_path, image_size=224, classes=["ant", "bee"])
    pairs = data.conditions("c", tmp_path)
    assert len(pairs) == 95 and pairs[:6] == [
        *(("gaussian_noise", s) for s in (1, 2, 3, 4, 5)),
        ("shot_noise", 1),
    ]
    for corruption, severity in pairs[::7]:
        grey = 10 * data.CORRUPTIONS.index(corruption) + severity
        assert greys(read(corruption, severity))[-1] == (grey, 1)
    x, _ = all_batches(read("fog", 3), [[(0, 0)]])[0]
    assert np.array_equal(x[0].permute(1, 2, 0), np.asarray(Image.open(file))), "not resized"
    x, _ = all_batches(read("fog", 3, image_size=160), [[(0, 0), (0, 1)]])[0]
    assert x.shape == (2, 3, 160, 160)
    with pytest.raises(data.DataError, match="fog/3/ant is a class that .*expected: CORRUPTION"):
        read("fog", 3, classes=["bee"])
    for wrong, message in (
        (("rain", 1), "unknown corruption 'rain'; known: gaussian_noise"),
        (("fog", 6), "severity 6 of fog; it must be 1"),
        (("fog", None), "severity None"),
    ):
        with pytest.raises(data.DataError, match=message):
            read(*wrong)
    with pytest.raises(data.DataError, match="unknown benchmark 'd'; known: real v2"):
        data.conditions("d", tmp_path)
    shutil.rmtree(root / "spatter/4")
    with pytest.raises(data.DataError, match="imagenet-c/spatter/4 nor .*expected: .*extra.tar"):
        data.conditions("c", tmp_path)
    assert len(data.conditions("c", tmp_path, data.ALEXNET_ERRORS)) == 75, "enough for the mCE"


def test_cifar_c_is_read_severity_by_severity(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "CIFAR-10-C"
    folder.mkdir()
    pixels = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)  # published: 50,000
    labels = np.tile(rng.integers(0, 10, 4), 5).astype(np.uint8)
    np.save(folder / "fog.npy", pixels)
    np.save(folder / "labels.npy", labels)
    read = partial(
        data.benchmark, "cifar10-c", data_dir=tmp_path, image_size=32, classes=list("abcdefghij")
    )
    for severity in (1, 3, 5):
        ((x, y),) = all_batches(read("fog", severity), [[(0, i) for i in range(4)]])
        block = slice(4 * severity - 4, 4 * severity)
        assert np.array_equal(x.permute(0, 2, 3, 1), pixels[block])
        assert y.tolist() == labels[block].tolist() and y.dtype == torch.int64
    assert all_batches(read("fog", 1, image_size=48), [[(0, 0)]])[0][0].shape == (1, 3, 48, 48)
    assert "4 images instead of the published 10,000" in read("fog", 1).notice
    assert data.conditions("cifar10-c", tmp_path, ["fog"]) == [("fog", s) for s in (1, 2, 3, 4, 5)]
    with pytest.raises(data.DataError, match="CIFAR-10-C/gaussian_noise.npy nor .*CIFAR-10-C.tar"):
        data.conditions("cifar10-c", tmp_path)
    with pytest.raises(data.DataError, match="below 3; expected"):
        read("fog", 1, classes=["a", "b", "c"])
    for wrong in (pixels[:19], pixels.astype(np.int64), pixels.reshape(20, -1), pixels[:15]):
        np.save(folder / "fog.npy", wrong)
        with pytest.raises(data.DataError, match="fog.npy has .* needed are uint8"):
            read("fog", 1)
    (folder / "fog.npy").write_bytes(pickle.dumps(pixels))  # not to be unpickled
    with pytest.raises(data.DataError, match="fog.npy is missing or damaged; expected: CORRUPTION"):
        read("fog", 1)
    np.save(folder / "fog.npy", pixels)
    (folder / "labels.npy").unlink()
    with pytest.raises(data.DataError, match="labels.npy is missing or damaged"):
        read("fog", 1)


def test_c_lite_does_what_its_table_says():
    images, _ = data.shapes(range(24))
    assert not data.C_LITE.keys() & set(data.CORRUPTIONS), "none is taken for a published one"
    for corruption, (levels, _) in data.C_LITE.items():
        damage = [
            torch.stack(
                [
                    data.corrupt(x, corruption, severity, 0, i) - x.float()
                    for i, x in enumerate(images)
                ]
            )
            .square()
            .mean()
            .sqrt()
            .item()
            for severity in (1, 2, 3, 4, 5)
        ]
        assert len(levels) == 5 and 2 < damage[0], (corruption, damage)
        assert all(a < b for a, b in zip(damage, damage[1:])), (corruption, damage)
    flat = torch.full((3, 128, 128), 128, dtype=torch.uint8)
    noise = data.corrupt(flat, "lite_noise", 3) - 128.0
    assert abs(noise.mean()) < 0.4 and abs(noise.std() - 20) < 0.4, (noise.mean(), noise.std())
    assert abs((noise / noise.std()).pow(4).mean() - 2.9) < 0.1, "12 uniform numbers: 3 - 6 / 60"
    hit = data.corrupt(flat, "lite_impulses", 5)
    assert abs((hit != 128).float().mean() - 0.07) < 0.005
    assert set(hit.unique().tolist()) == {0, 128, 255}
    dot = torch.zeros(3, 32, 32, dtype=torch.uint8)
    dot[:, 16, 16] = 255
    blurred = data.corrupt(dot, "lite_blur", 5)[0].double()
    spread = (blurred.sum(0) * (torch.arange(32) - 16) ** 2).sum() / blurred.sum()
    assert abs(spread.sqrt() - 1.5) < 0.15, spread
    assert len(data.corrupt(images[0], "lite_pixelate", 5)[0].unique(dim=0)) <= 12
    x = images[1].numpy().astype(int)
    grey = np.array(Image.fromarray(images[1].permute(1, 2, 0).numpy()).convert("L")).astype(int)
    for corruption, oracle in (
        ("lite_brightness", x * 3 // 2),
        ("lite_saturation", np.trunc((x + grey) / 2)),
        ("lite_contrast", np.trunc(x * 0.625 + 0.375 * int(grey.mean() + 0.5))),
    ):
        found = data.corrupt(images[1], corruption, 2)
        assert np.array_equal(found, oracle.clip(0, 255)), corruption


def test_c_lite_is_a_function_of_image_corruption_severity_seed_and_index():
    golden = {"lite_noise": "6e2fdd66e2a9c61a", "lite_impulses": "ce54c679d73cc887"}
    images, labels = data.shapes(range(48))
    dataset = data.InMemory(images, labels, list(data.SHAPES_CLASSES))
    pairs = [[(0, i) for i in range(j, j + 6)] for j in range(0, 48, 6)]
    for corruption in data.C_LITE:
        corrupted = data.Corrupted(dataset, corruption, 3)
        alone = torch.cat([x for x, _ in all_batches(corrupted, pairs)])
        if corruption in ("lite_noise", "lite_jpeg"):
            by_workers = all_batches(corrupted, pairs[::-1], workers=2)[::-1]
            assert torch.equal(alone, torch.cat([x for x, _ in by_workers])), corruption
            assert torch.equal(labels, torch.cat([y for _, y in by_workers]))
        if corruption in golden:
            digest = hashlib.sha256(alone.numpy().tobytes()).hexdigest()[:16]
            assert digest == golden[corruption], (corruption, digest)
            other = data.Corrupted(dataset, corruption, 3, seed=1)
            assert not torch.equal(alone[:6], all_batches(other, pairs[:1])[0][0])
            assert not torch.equal(*(data.corrupt(images[0], corruption, 3, 0, i) for i in (0, 1)))
    part = copy.copy(dataset).restrict(torch.tensor([40, 7]))  # an image keeps its noise in a part
    ((x, y),) = all_batches(data.Corrupted(part, "lite_noise", 3), [[(0, 0), (0, 1)]])
    whole = data.Corrupted(dataset, "lite_noise", 3)
    assert torch.equal(x, all_batches(whole, [[(5, 40), (5, 7)]])[0][0]) and y.tolist() == [4, 7]
    for wrong, message in (
        (("lite_noise", 0), "severity 0 of lite_noise; it must be 1"),
        (("lite_noise", 6), "severity 6"),
        (("fog", 1), "unknown corruption 'fog'; known: lite_noise"),
    ):
        with pytest.raises(data.DataError, match=message):
            data.Corrupted(dataset, *wrong)


def test_googles_randaugment_does_at_15_what_its_ranges_say(monkeypatch):
    """Chen et al. E.3: 15 on a scale of 10: 45°, shear 0.45, 150 pixels, factors of 2.8."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (3, 401, 401), dtype=torch.uint8)
    at_15 = {name: change(x, 1.5, 1) for name, change in data.GOOGLE_OPERATIONS.items()}
    assert len(at_15) == 16 and all(
        y.shape == x.shape and y.dtype == x.dtype for y in at_15.values()
    )
    grey = lambda *shape: torch.full(shape, 128, dtype=torch.uint8)
    assert torch.equal(at_15["TranslateX"], torch.cat([grey(3, 401, 150), x[:, :, :251]], 2))
    assert torch.equal(at_15["TranslateY"], torch.cat([grey(3, 150, 401), x[:, :251]], 1))
    assert torch.equal(at_15["Posterize"], x // 4 * 4), "6 bits stay"
    assert torch.equal(at_15["Solarize"], x), "no pixel is 384 or more"
    assert torch.equal(
        data.GOOGLE_OPERATIONS["Solarize"](x, 0.5, 1), torch.where(x < 128, x, 255 - x)
    )
    added = (x.int() + 165).clamp(max=255)
    assert torch.equal(at_15["SolarizeAdd"].int(), torch.where(x < 128, added, x.int()))
    brighter = (x.double() * 2.8).clamp(max=255)
    assert (at_15["Brightness"].double() - brighter).abs().max() <= 1
    sides = set()
    for _ in range(20):  # squares of 120, cut by the border
        cut = data.GOOGLE_OPERATIONS["Cutout"](x, 1.5, 1)
        rows, columns = ((cut != x).any(0).any(d).nonzero().flatten() for d in (1, 0))
        sides |= {len(rows), len(columns)}
        assert (cut[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 128).all()
    assert min(sides) >= 60 and max(sides) == 120, f"sides of {sides}"
    line = torch.zeros(3, 401, 401, dtype=torch.uint8)
    line[:, 200, 100:301] = 255
    for name, slope in (("Rotate", 1.0), ("ShearY", 0.45)):
        lit = (data.GOOGLE_OPERATIONS[name](line, 1.5, 1)[0] == 255).nonzero().double()
        found = lit - lit.mean(0)
        found = (found[:, 0] * found[:, 1]).sum() / (found[:, 1] ** 2).sum()
        assert abs(abs(found) - slope) < 0.02, f"{name}: a slope of {found:.3f}, not {slope}"
        lit = (data.GOOGLE_OPERATIONS[name](line, 1.5, -1)[0] == 255).nonzero().double()
        back = lit - lit.mean(0)
        back = (back[:, 0] * back[:, 1]).sum() / (back[:, 1] ** 2).sum()
        assert abs(back + found) < 0.02, f"{name}: slopes of {found:.3f} and {back:.3f}"
    for name, still in (("ShearX", 0), ("ShearY", 1)):  # about a corner: a triangle of 0.45 / 2
        for sign in (1, -1):
            white = data.GOOGLE_OPERATIONS[name](torch.full_like(x, 255), 1.5, sign)
            assert abs((white == 128).double().mean() - 0.225) < 0.002
            assert (white.select(1 + still, 0) == 255).all(), f"{name} about the other axis"
    for name, axis in (("TranslateX", 2), ("TranslateY", 1)):
        back, blank = x.narrow(axis, 150, 251), torch.full_like(x.narrow(axis, 0, 150), 128)
        assert torch.equal(data.GOOGLE_OPERATIONS[name](x, 1.5, -1), torch.cat([back, blank], axis))
    steps = data.transforms("none", 401, 401, randaugment=(2, 15), randaugment_of="google")
    assert sum(torch.equal(steps(x), x) for _ in range(20)) <= 3, "all operations are applied"
    asked = []
    for name in data.GOOGLE_OPERATIONS:
        monkeypatch.setitem(
            data.GOOGLE_OPERATIONS,
            name,
            lambda x, m, sign, name=name: asked.append((name, m, sign)) or x,
        )
    for _ in range(400):
        steps(x[:, :8, :8])
    assert {m for _, m, _ in asked} == {1.5} and len(asked) == 800, "two of each image, at 15"
    every = set(itertools.product(data.GOOGLE_OPERATIONS, (1, -1)))
    assert {(name, sign) for name, _, sign in asked} == every


def test_what_moves_and_turns_leaves_the_published_grey_behind():
    """128, of AutoAugment, RandAugment and Google's: as big_vision and torchvision's references."""
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout"):
        torch.manual_seed(0)
        changed = data.GOOGLE_OPERATIONS[name](white, 0.5, -1)
        assert (changed == 128).any() and set(changed.unique().tolist()) <= set(range(128, 256))
        assert changed[changed != 255].float().mode().values == 128, name
    fills = [
        step.fill if not isinstance(step, v2.RandomApply) else step.transforms[0].fill
        for how in (dict(autoaugment="imagenet"), dict(randaugment=(1, 9)))
        for step in data.transforms("none", 64, 64, **how).transforms
    ]
    assert fills == [128, 128] or all(128 in fill.values() for fill in fills), fills


def test_googles_colour_operations_grow_with_the_magnitude():
    """Factors of 1.8 m + 0.1, of 10 m = 15 2.8, against torchvision's own functionals."""
    x = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    for name, of in dict(
        Color=v2.functional.adjust_saturation,
        Contrast=v2.functional.adjust_contrast,
        Brightness=v2.functional.adjust_brightness,
        Sharpness=v2.functional.adjust_sharpness,
    ).items():
        for m, factor in ((0.5, 1.0), (1.0, 1.9)):
            assert torch.equal(data.GOOGLE_OPERATIONS[name](x, m, 1), of(x, factor)), name
    for name, of in dict(AutoContrast="autocontrast", Equalize="equalize", Invert="invert").items():
        assert torch.equal(
            data.GOOGLE_OPERATIONS[name](x, 0.3, 1), getattr(v2.functional, of)(x)
        ), name


def test_augmentations_come_in_the_order_of_their_description():
    kinds = [
        type(step).__name__
        for step in data.transforms(
            "crop", 32, 32, autoaugment="imagenet", randaugment=(2, 9), erasing=0.5
        ).transforms
    ]
    assert kinds == [
        "RandomCrop",
        "RandomHorizontalFlip",
        "AutoAugment",
        "RandomApply",
        "RandomApply",
        "RandomErasing",
    ]


def test_in_memory_images_are_padded_by_an_eighth_of_their_own_size_and_flip_if_asked():
    for flip in (True, False):
        dataset = data.load("shapes", "train", image_size=48, augment="crop", flip=flip)
        assert (dataset.padding, dataset.flip) == (6, flip)


def test_the_images_that_fractions_leave_over_go_to_the_classes_with_the_largest_remainders():
    labels = torch.tensor([0] * 10 + [1] * 13 + [2] * 16)  # a quarter: 2.5, 3.25, 4; in all 9.75
    assert torch.bincount(labels[data.subset(labels, "1/4")]).tolist() == [2, 3, 4]
    labels = torch.tensor([0] * 10 + [1] * 11 + [2] * 7)  # 2.5, 2.75, 1.75; in all 7
    assert torch.bincount(labels[data.subset(labels, "1/4")]).tolist() == [2, 3, 2]
    labels = torch.arange(100).repeat(4)  # fewer images than classes: not of the first ones
    for size in (20, 50):
        of = [labels[data.subset(labels, Fraction(size, 400), seed)] for seed in (0, 1)]
        assert all(len(set(one.tolist())) == size and max(one) > 80 for one in of), of
        assert set(of[0].tolist()) != set(of[1].tolist())
    twenty, fifty = (set(data.subset(labels, Fraction(n, 400)).tolist()) for n in (20, 50))
    assert twenty < fifty


def test_autoaugment_is_torchvisions_with_imagenets_policy():
    policies = [
        step
        for step in data.transforms("none", 32, 32, autoaugment="imagenet").transforms
        if isinstance(step, v2.AutoAugment)
    ]
    assert [step.policy for step in policies] == [v2.AutoAugmentPolicy.IMAGENET]


def test_the_contact_sheet_and_sizes_are_printed(tmp_path, capsys):
    data.main([])
    assert "8,000 images of 12 classes" in capsys.readouterr().out
    data.main(["sheet", "--columns", "2", "--out", str(tmp_path / "s.png")])
    assert np.asarray(Image.open(tmp_path / "s.png")).shape == (12 * 98 + 2, 2 * 98 + 2, 3)
    with pytest.raises(SystemExit):
        data.main(["sheet", "--columns", "0"])
    assert "must be at least 1" in capsys.readouterr().err
    for argv, line in (
        (["--split", "train"], "--split is not of sizes, which takes --size;"),
        (["pack", "--size", "8"], "--size is not of pack, which takes --data-dir --out"),
        (["bench", "--columns", "3"], "--columns is not of bench, which takes --data-dir --rounds"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            data.main(argv)
        assert line in capsys.readouterr().err, argv


# ----------------------------------------------------------------------------------------- train.py

TINY = ("--model vit_micro8 --dim 24 --depth 2 --heads 2 --mlp-dim 48 --device cpu").split()


def tiny(
    out,
    *more,
    dataset="--dataset shapes --train-fraction 1/50 --batch-size 32 "
    "--micro-batch 8 --epochs 2 --warmup-steps 3 --log-every 4",
):
    """A command line that trains for seconds: 160 images, 5 steps an epoch."""
    return [*TINY, *dataset.split(), "--out-dir", str(out), *shlex.split(" ".join(map(str, more)))]


def largest_difference(a, b):
    """Largest |a - b| relative to the tensor's largest element, over all weights but the keys'
    bias, whose gradient is zero in exact arithmetic, so that AdamW amplifies its rounding."""
    worst = 0.0
    for name in a:
        x, y = a[name].double(), b[name].double()
        if name.endswith("qkv.bias"):
            third = len(x) // 3
            x, y = (torch.cat([t[:third], t[2 * third :]]) for t in (x, y))
        one = float((x - y).abs().max() / x.abs().max().clamp_min(1e-3))
        assert math.isfinite(one), name
        worst = max(worst, one)
    return worst


def tiny_network(seed=0, **more):
    """That of `tiny`'s command line, as a run with this seed starts it."""
    torch.manual_seed(seed)
    return train.build_model("vit_micro8", 12, 32, dim=24, depth=2, heads=2, mlp_dim=48, **more)


def train_ok(argv):
    assert train.main(argv) == 0
    return torch.load(Path(argv[argv.index("--out-dir") + 1]) / "ckpt.pt", weights_only=True)


def refusal(capsys, *argv, program=train):
    """The one line that a program prints for a user's mistake."""
    capsys.readouterr()
    assert program.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{program.__name__}.py: "), error
    return error


analyze_refusal = partial(refusal, program=analyze)
attack_refusal = partial(refusal, program=adversarial)


@pytest.fixture
def short_shapes(monkeypatch):
    """60 validation images, 8 of test, two corruptions of c-lite."""
    monkeypatch.setitem(data.SHAPES_SPLITS, "val", (2**30, 60))
    monkeypatch.setitem(data.SHAPES_SPLITS, "test", (2**31, 8))
    for name in list(data.C_LITE)[2:]:
        monkeypatch.delitem(data.C_LITE, name)


@pytest.fixture
def small_shapes(monkeypatch, short_shapes):
    """160 training images, all of them for --train-fraction 1, which take less making."""
    monkeypatch.setitem(data.SHAPES_SPLITS, "train", (0, 160))


def log_without_times(folder):
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]


def same_tensors(a, b):
    """Whether two nested states hold equal numbers, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def test_learning_rate_at_warm_up_peak_and_end():
    lr = lambda step, schedule, end=0.0: train.learning_rate(step, 100, 20, 3e-3, schedule, end)
    for schedule in ("cosine", "linear", "constant", "exponential"):
        assert lr(0, schedule) == 0 and lr(10, schedule) == 1.5e-3 and lr(20, schedule) == 3e-3
    assert abs(lr(60, "cosine") - 1.5e-3) < 1e-18 and abs(lr(100, "cosine")) < 1e-18
    assert abs(lr(40, "cosine") - 1.5e-3 * (1 + math.cos(math.pi / 4))) < 1e-18
    assert (
        abs(lr(40, "linear", 1e-5) - (3e-3 * 0.75 + 1e-5 * 0.25)) < 1e-18
        and abs(lr(100, "linear", 1e-5) - 1e-5) < 1e-18
    )
    assert lr(60, "constant") == lr(100, "constant") == 3e-3
    assert abs(lr(60, "exponential", 3e-5) - 3e-4) < 1e-18  # the middle: the geometric mean
    assert abs(lr(100, "exponential", 3e-5) - 3e-5) < 1e-18
    assert abs(lr(21, "exponential", 3e-5) / lr(20, "exponential") - 0.01 ** (1 / 80)) < 1e-12
    # SupCon's code: in 90 epochs 12 of warm-up, then 0.97 each half epoch
    head = train.RECIPES["chen_supcon_head"]
    assert (
        abs(
            train.learning_rate(13 * 625, 90 * 625, 12 * 625, 0.05, "exponential", head["lr_end"])
            - 0.05 * 0.97**2
        )
        < 1e-15
    )
    assert abs(lr(60, "linear", 1e-5) - (3e-3 + 1e-5) / 2) < 1e-18  # the middle of the decay
    assert abs(lr(60, "cosine", 1e-5) - (3e-3 + 1e-5) / 2) < 1e-18
    assert (
        train.learning_rate(0, 10, 0, 1.0, "cosine") == 1
        and train.learning_rate(3, 3, 10, 1.0, "linear") == 0.3
    )


def test_sigmoid_loss_is_the_sum_of_binary_cross_entropies():
    torch.manual_seed(0)
    logits, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    total = sum(
        -math.log(p if k == t else 1 - p)
        for row, t in zip(torch.sigmoid(logits).tolist(), y.tolist())
        for k, p in enumerate(row)
    )
    assert abs(train.sigmoid_loss(logits, y).item() - total / 5) < 1e-12
    soft = F.one_hot(y, 4).double()
    assert torch.allclose(train.sigmoid_loss(logits, soft), train.sigmoid_loss(logits, y))
    smooth = soft * 0.9 + 0.1 / 4
    assert torch.allclose(train.sigmoid_loss(logits, y, 0.1), train.sigmoid_loss(logits, smooth))
    assert torch.allclose(
        train.softmax_loss(logits, y, 0.1), -(smooth * logits.log_softmax(1)).sum(1).mean()
    )


def supcon_by_hand(z, y, temperature):
    """Eq. 2 of Khosla et al., anchor by anchor; z are unit vectors."""
    loss, n = 0, len(z)
    for i in range(n):
        others = [a for a in range(n) if a != i]
        positives = [p for p in others if y[p] == y[i]]
        denominator = sum(torch.exp(z[i] @ z[a] / temperature) for a in others)
        loss = loss - sum(
            torch.log(torch.exp(z[i] @ z[p] / temperature) / denominator) for p in positives
        ) / len(positives)
    return loss / n


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_supcon_loss_and_its_gradient_are_those_of_the_double_sum(temperature):
    torch.manual_seed(0)
    z = (3 * torch.randn(12, 5, dtype=torch.float64)).requires_grad_()
    y = torch.tensor([0, 1, 2, 0, 1, 1] * 2)
    expected = supcon_by_hand(z / z.norm(dim=1, keepdim=True), y, temperature)
    (grad,) = torch.autograd.grad(expected, z)
    loss = train.supcon_loss(z, y, temperature)
    assert abs(loss - expected) < 1e-12, (loss, expected)
    assert (torch.autograd.grad(loss, z)[0] - grad).abs().max() < 1e-12
    value, pull = train.supcon_of_all(z, y, temperature)
    assert value == loss and not value.requires_grad and (pull - grad).abs().max() < 1e-12
    hard = torch.eye(5, dtype=torch.float64)[[0, 0, 1, 1]]  # e^(1/τ) overflows nothing
    small = train.supcon_loss(hard.float(), torch.tensor([0, 0, 1, 1]), 0.005)
    assert small.isfinite() and small < 1e-6


def test_lamb_takes_the_steps_of_its_algorithm_with_a_ratio_of_1_where_a_length_is_0():
    torch.manual_seed(0)
    starts = {
        "matrix": torch.randn(3, 4),
        "zero weights": torch.zeros(5),
        "kept": torch.randn(4),
        "zero update": torch.randn(2),
        "both zero": torch.zeros(3),
        "no grad": torch.ones(2),
    }
    starts = {name: w.double() for name, w in starts.items()}
    ours = {name: nn.Parameter(w.clone()) for name, w in starts.items()}
    decay = dict.fromkeys(starts, 0.0) | {"matrix": 0.3, "zero weights": 0.3}
    optimizer = train.LAMB(
        [dict(params=[ours[name]], weight_decay=decay[name]) for name in ours],
        lr=0.01,
        betas=(0.9, 0.99),
        eps=1e-6,
    )
    m, v = ({name: np.zeros(w.shape) for name, w in starts.items()} for _ in range(2))
    hand = {name: w.numpy().copy() for name, w in starts.items()}
    for t in (1, 2, 3):
        for name, w in ours.items():
            w.grad = (
                torch.zeros_like(w)
                if "zero update" in name or "both" in name
                else (None if name == "no grad" else torch.randn_like(w))
            )
            if w.grad is None:
                continue
            g = w.grad.numpy()
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.99 * v[name] + 0.01 * g * g
            r = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.99**t)) + 1e-6)
            update = r + decay[name] * hand[name]
            length, size = np.linalg.norm(hand[name]), np.linalg.norm(update)
            ratio = length / size if length > 0 and size > 0 else 1.0
            hand[name] = hand[name] - 0.01 * ratio * update
        optimizer.step()
        if t == 1:  # its state is plain data and goes on where it was
            again = train.LAMB([dict(params=[w]) for w in ours.values()], lr=1)
            again.load_state_dict(optimizer.state_dict())
            optimizer = again
        for name, w in ours.items():
            assert np.abs(w.detach().numpy() - hand[name]).max() < 1e-14, (t, name)
    assert (ours["zero weights"] != 0).all() and torch.equal(ours["both zero"], torch.zeros(3))
    assert all(torch.equal(ours[name], starts[name]) for name in ("zero update", "no grad"))


def test_weight_decay_reaches_what_each_mask_says():
    network = vit.build("vit_micro8", num_classes=3, image_size=32, stem="conv")

    def decayed(mask):
        ids = {id(p) for p in train.decay_groups(network, mask)[0]}
        return {n for n, p in network.named_parameters() if id(p) in ids}

    everything = {n for n, _ in network.named_parameters()}
    assert decayed("all") == everything
    kernels = {
        n for n in everything if n.endswith("weight") and "norm" not in n and ".bn." not in n
    }
    assert decayed("kernels") == kernels
    assert decayed("no-norm-bias") == kernels | {"cls_token", "pos_embed"}
    assert all(
        len(a) + len(b) == len(everything)
        for a, b in (train.decay_groups(network, m) for m in ("all", "kernels"))
    )


def test_evaluation_metrics_against_their_definitions_one_image_at_a_time():
    rng = np.random.default_rng(0)
    x, y = (
        torch.from_numpy(rng.integers(0, 256, (50, 3, 4, 4), dtype=np.uint8)),
        torch.from_numpy(rng.integers(0, 7, 50)),
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 7)).double()
    with torch.no_grad():
        model[1].weight.mul_(4)
    dataset = data.InMemory(x, y, list(range(7)))
    got = train.evaluate(model, data.evaluation_loader(dataset, 8), torch.device("cpu"))
    hits1, hits5, nll, bins = 0, 0, 0.0, [[] for _ in range(10)]
    for image, label in zip(x, y.tolist()):
        z = (model[1].weight @ (image.double() / 255).flatten() + model[1].bias).tolist()
        p = [math.exp(v) / sum(math.exp(u) for u in z) for v in z]
        order = sorted(range(7), key=lambda k: -z[k])
        hits1, hits5, nll = (
            hits1 + (order[0] == label),
            hits5 + (label in order[:5]),
            nll - math.log(p[label]),
        )
        bins[min(9, math.ceil(max(p) * 10) - 1)].append((order[0] == label, max(p)))
    ece = sum(abs(sum(h for h, _ in b) - sum(c for _, c in b)) for b in bins) / 50
    expected = dict(images=50, top1=2 * hits1, top5=2 * hits5, nll=nll / 50, ece=100 * ece)
    assert got.keys() == expected.keys() and all(abs(got[k] - expected[k]) < 1e-9 for k in got), (
        got,
        expected,
    )
    assert model.training


PARK = dict(
    optimizer="adamw",
    lr=1.25e-4,
    weight_decay=0.05,
    decay="all",
    lr_schedule="cosine",
    warmup_epochs=5,
    epochs=305,
    randaugment=[2, 9],
    randaugment_prob=0.5,
    mixup=1.0,
    cutmix=0.8,
    erasing=0.25,
    label_smoothing=0.1,
    drop_path=0.1,
)


@pytest.mark.parametrize(
    "argv, recipe",
    [
        ("--model vit_b16", "chen_vit"),
        ("--model mixer_s8", "chen_mixer"),
        ("--model resnet101x2", "chen_resnet"),
        ("--model alter_resnet50", "park_imagenet"),
        ("--dataset cifar100", "park_cifar_vit"),
        ("--dataset cifar100 --model resnet50", "park_cifar_resnet"),
        ("--dataset cifar100 --model mixer_ti2", "park_cifar_mixer"),
        ("--dataset cifar100 --model torchvision:swin_t", "park_cifar"),
        ("--dataset cifar10 --model alter_resnet50", "park_cifar"),
    ],
)
def test_a_model_and_a_data_set_take_the_recipe_that_fits_them(argv, recipe):
    """Whose every field is compared with its paper's below."""
    own, named = (train.settings(argv.split() + more)[0] for more in ([], ["--recipe", recipe]))
    assert own.recipe == recipe and own == named, (own, named)


# Every recipe, from the papers' tables: what is not here is train.py's default.
CHEN = dict(
    dataset="imagenet",
    image_size=224,
    augment="inception",
    batch_size=4096,
    micro_batch=32,
    decay="kernels",
)
CHEN_VIT = CHEN | dict(
    model="vit_b16",
    epochs=300,
    optimizer="adamw",
    lr=3e-3,
    beta1=0.9,
    beta2=0.999,
    warmup_steps=10_000,
    lr_schedule="cosine",
    weight_decay=0.3,
    dropout=0.1,
    grad_clip=1.0,
    loss="sigmoid",
    head_bias=-6.9,
)
CHEN_MIXER = CHEN | dict(
    model="mixer_b16",
    epochs=300,
    optimizer="adamw",
    lr=3e-3,
    beta1=0.9,
    beta2=0.999,
    warmup_steps=10_000,
    lr_schedule="linear",
    lr_end=1e-5,
    weight_decay=0.3,
    drop_path=0.1,
    grad_clip=1.0,
    loss="sigmoid",
    head_bias=-6.9,
)
CHEN_RESNET = CHEN | dict(
    zero_init=True,  # the authors' code
    model="resnet50",
    epochs=90,
    optimizer="sgd",
    momentum=0.9,
    lr=1.6,
    warmup_steps=5_000,
    lr_schedule="cosine",
    weight_decay=1e-3,
    loss="softmax",
)
CHEN_STRONG = dict(
    lr=1e-3,
    weight_decay=0.1,
    drop_path=0.1,
    mixup=0.5,
    randaugment=[2, 15],
    randaugment_of="google",
)
CHEN_TO = dict(  # Table 11
    model="vit_b16",
    image_size=224,
    augment="inception",
    epochs=0,
    batch_size=512,
    micro_batch=32,
    optimizer="sgd",
    momentum=0.9,
    lr=0.01,
    lr_schedule="cosine",
    weight_decay=0.0,
    grad_clip=1.0,
    loss="softmax",
    reset_head=True,
    eval_every=10_000,
)
PARK_CIFAR = PARK | dict(
    dataset="cifar100",
    model="resnet50",
    image_size=32,
    augment="crop",
    batch_size=96,
    micro_batch=96,
    grad_clip=5.0,
    mean=[0.5071, 0.4867, 0.4408],
    std=[0.2675, 0.2565, 0.2761],
)
PARK_IMAGENET = PARK | dict(
    dataset="imagenet",
    model="resnet50",
    image_size=224,
    augment="inception",
    batch_size=128,
    micro_batch=32,
    mean=[0.485, 0.456, 0.406],
    std=[0.229, 0.224, 0.225],
)
WEAK = dict(randaugment=[0, 9], erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
WEAK |= dict(grad_clip=0.0)
XIAO = dict(
    dataset="imagenet",
    image_size=224,
    augment="inception",
    autoaugment="imagenet",
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
    epochs=400,
    batch_size=2048,
    micro_batch=32,
    warmup_epochs=5,
    lr_schedule="cosine",
    decay="no-norm-bias",
    ema_alpha=1e-5,
    ema_every=32,
    loss="softmax",
    mean=[0.485, 0.456, 0.406],
    std=[0.229, 0.224, 0.225],
)
XIAO_VIT = XIAO | dict(
    model="vit_c_4gf",
    optimizer="adamw",
    beta1=0.9,
    beta2=0.999,
    lr=1e-3,
    lr_end=5e-6,
    weight_decay=0.24,
    ema_decay=0.9983616,
)
XIAO_CNN = XIAO | dict(
    optimizer="sgd",
    momentum=0.9,
    nesterov=True,
    lr=2.54,
    lr_end=0.0127,
    weight_decay=2.4e-5,
    ema_decay=0.9983616,
)
PAPER_ROWS = {
    "shapes": dict(
        dataset="shapes",
        model="vit_micro8",
        epochs=12,
        batch_size=64,
        micro_batch=32,
        lr=2e-3,
        warmup_steps=125,
        lr_schedule="cosine",
        weight_decay=0.1,
        sam_rho=0.03,
        image_size=32,
        augment="none",
        optimizer="adamw",
    ),
    "chen_vit": CHEN_VIT,
    "chen_mixer": CHEN_MIXER,
    "chen_resnet": CHEN_RESNET,
    "chen_vit_strong": CHEN_VIT | CHEN_STRONG,
    "chen_mixer_strong": CHEN_MIXER | CHEN_STRONG,
    **{
        f"{name}_{part}": row | dict(train_fraction=fraction, batch_size=batch)
        for name, row in {
            "chen_resnet": CHEN_RESNET | dict(model="resnet152"),
            "chen_vit": CHEN_VIT,
            "chen_mixer": CHEN_MIXER,
            "chen_vit_strong": CHEN_VIT | CHEN_STRONG,
            "chen_mixer_strong": CHEN_MIXER | CHEN_STRONG,
        }.items()
        for part, fraction, batch in (
            ("half", "1/2", 2048),
            ("quarter", "1/4", 1024),
            ("tenth", "1/10", 512),
        )
    },
    "chen_vit_adversarial": CHEN_VIT | dict(adv_eps=2 / 255),
    "chen_mixer_adversarial": CHEN_MIXER | dict(adv_eps=2 / 255),
    "chen_resnet_adversarial": CHEN_RESNET | dict(adv_eps=2 / 255),
    "chen_vit_long": CHEN_VIT | dict(epochs=600),
    "chen_mixer_long": CHEN_MIXER | dict(epochs=600),
    "chen_vit_21k": CHEN_VIT
    | dict(
        dataset="imagenet21k",
        epochs=90,
        lr=1e-3,
        lr_schedule="linear",
        lr_end=1e-5,
        weight_decay=0.03,
        head_bias=-10.0,
        sam_rho=0.2,
    ),
    "chen_mixer_21k": CHEN_MIXER | dict(dataset="imagenet21k", head_bias=-10.0, sam_rho=0.6),
    "chen_resnet_21k": CHEN_RESNET | dict(dataset="imagenet21k", sam_rho=0.02),
    "chen_21k_to_imagenet": CHEN_TO
    | dict(dataset="imagenet", max_steps=20_000, warmup_steps=500, lr=0.03, eval_every=1),
    "chen_supcon": CHEN_VIT
    | dict(
        autoaugment="imagenet",
        epochs=350,
        batch_size=2048,
        micro_batch=16,
        optimizer="lamb",
        lr=0.001 * 2048 / 256,
        eps=1e-6,
        loss="supcon",
        temperature=0.1,
        projection_dim=128,
        unit_norm=True,
        head_bias=0.0,
    ),
    "chen_supcon_head": CHEN
    | dict(
        model="vit_b16",
        autoaugment="imagenet",
        epochs=90,
        batch_size=2048,
        optimizer="rmsprop",
        lr=0.05,
        momentum=0.9,
        beta2=0.9,
        eps=math.sqrt(0.001),
        warmup_epochs=12,
        lr_schedule="exponential",
        lr_end=0.05 * 0.97**156,
        weight_decay=1e-6,
        loss="softmax",
        unit_norm=True,
        reset_head=True,
        train_only="head",
    ),
    "chen_to_cifar10": CHEN_TO | dict(dataset="cifar10", max_steps=10_000, warmup_steps=500),
    "chen_to_cifar100": CHEN_TO | dict(dataset="cifar100", max_steps=10_000, warmup_steps=500),
    "chen_to_flowers102": CHEN_TO | dict(dataset="flowers102", max_steps=500, warmup_steps=100),
    "chen_to_pets": CHEN_TO | dict(dataset="pets", max_steps=500, warmup_steps=100),
    "park_cifar": PARK_CIFAR,
    "park_imagenet": PARK_IMAGENET,
    "park_cifar_vit": PARK_CIFAR | dict(model="vit_ti2", qkv_bias=False, gelu="exact", init="timm"),
    "park_cifar_resnet": PARK_CIFAR | dict(init="torch"),
    "park_cifar_mixer": PARK_CIFAR | dict(model="mixer_ti2", gelu="exact"),
    "park_imagenet_vit": PARK_IMAGENET | dict(model="vit_ti16", gelu="exact", init="timm"),
    "park_cifar_vit_weak": PARK_CIFAR
    | WEAK
    | dict(model="vit_ti2", qkv_bias=False, gelu="exact", init="timm"),
    "park_cifar_resnet_weak": PARK_CIFAR | WEAK | dict(init="torch"),
    "xiao_vit": XIAO_VIT,
    "xiao_vit_36gf": XIAO_VIT | dict(model="vit_c_36gf", lr=6e-4, lr_end=3e-6, weight_decay=0.28),
    "xiao_resnet": XIAO_CNN | dict(model="resnet50", eval_short_side=256),
    "xiao_regnety_1gf": XIAO_CNN | dict(model="regnety_1gf", image_size=232, eval_short_side=262),
    "xiao_regnety_4gf": XIAO_CNN | dict(model="regnety_4gf", image_size=240, eval_short_side=272),
    "xiao_regnety_16gf": XIAO_CNN | dict(model="regnety_16gf", image_size=256, eval_short_side=292),
    "xiao_regnety_32gf": XIAO_CNN | dict(model="regnety_32gf", image_size=268, eval_short_side=304),
    "xiao_vit_21k": XIAO_VIT
    | dict(
        dataset="imagenet21k",
        model="vit_c_18gf",
        epochs=90,
        batch_size=4096,
        lr=2e-3,
        lr_end=1e-5,
        ema_decay=1 - 1e-5 * 4096 / 90 * 32,
    ),
    "xiao_vit_21k_36gf": XIAO_VIT
    | dict(
        dataset="imagenet21k",
        model="vit_c_36gf",
        epochs=90,
        batch_size=4096,
        lr=1.4e-3,
        lr_end=7e-6,
        ema_decay=1 - 1e-5 * 4096 / 90 * 32,
    ),
    "xiao_deit": XIAO_VIT
    | dict(
        model="vit_p_4gf",
        autoaugment="none",
        randaugment=[2, 9],
        randaugment_prob=0.5,
        erasing=0.25,
        repeated_augment=3,
        epochs=300,
        batch_size=1024,
        lr_end=1e-5,
        weight_decay=0.05,
        decay="kernels",
        drop_path=0.1,
        ema_alpha=0.0,
        ema_every=1,
        ema_decay=0.0,
    ),
}
OF_THE_MACHINE = {
    "recipe",
    "init_from",
    "data_dir",
    "device",
    "dtype",
    "compile",
    "channels_last",
    "out_dir",
}


@pytest.mark.parametrize("name", train.RECIPES | PAPER_ROWS)
def test_every_recipe_is_the_papers_row_in_every_field(name):
    start = ["--init-from", "x.pt"] if "reset_head" in PAPER_ROWS[name] else []
    got = vars(train.settings(["--recipe", name, *start])[0])
    expected = vars(train.make_parser().parse_args([])) | dict(sam_rho=0.0) | PAPER_ROWS[name]
    differ = {
        field: (got[field], value)
        for field, value in expected.items()
        if field not in OF_THE_MACHINE
        and got[field] != value
        and not (field == "ema_decay" and abs(got[field] - value) < 1e-12)
    }
    assert not differ, f"{name}: (resolved, the paper's) {differ}"


def test_what_the_papers_varied_is_a_flag(capsys, monkeypatch):
    for epochs, decay in ((50, 0.9868928), (100, 0.9934464), (200, 0.9967232), (400, 0.9983616)):
        args, origin = train.settings(["--model", "vit_p_18gf", "--epochs", str(epochs)])
        assert args.recipe == "xiao_vit" and abs(args.ema_decay - decay) < 1e-12
        assert origin["ema_decay"] == "--ema-alpha" and args.ema_every == 32
    args = train.settings(["--model", "vit_c_36gf", "--ema-decay", "0.9", "--decay", "all"])[0]
    assert (args.recipe, args.decay) == ("xiao_vit_36gf", "all")
    assert (args.ema_decay, args.ema_alpha) == (0.9, 0.0)
    args = train.settings(["--model", "regnety_4gf", "--optimizer", "adamw", "--no-nesterov"])[0]
    assert (args.recipe, args.image_size, args.eval_short_side) == ("xiao_regnety_4gf", 240, 272)
    monkeypatch.setitem(train.RECIPES, "odd", dict(learning_rate=1))
    for argv, words in [
        ("--recipe odd", "odd sets learning_rate: no such flag"),
        ("--recipe chen_to_pets", "weights of --init-from; chen_to_pets fine-tunes: name them"),
        ("--recipe xiao_vit --epochs 0 --max-steps 9", "--ema-alpha depends on --epochs"),
        ("--recipe xiao_regnety_1gf --image-size 264", "at least --image-size, 264"),
        ("--eval-short-side 40", "for images in files, not shapes cifar10 cifar100; 0 turns"),
        ("--model regnety_4gf --optimizer adamw", "--no-nesterov turns it off"),
        ("--repeated-augment 0", "--repeated-augment is 0; it must be at least 1"),
    ]:
        assert words in refusal(capsys, *argv.split()), argv


PARK_VIT, PARK_HALF = "vit_ti2 --no-qkv-bias", "vit_ti2 --no-qkv-bias --depth 6"


@pytest.mark.parametrize(
    "flags, tokens, heads, head_dim, depth",
    [
        # Fig. C.2; 7; 6; C.5; C.6; C.3
        *((f"{PARK_VIT} --patch-size {p}", (32 // p) ** 2 + 1, 3, 64, 12) for p in (2, 4, 8)),
        *((f"vit_ti4 --no-qkv-bias --kernel-size {k}", 65, 3, 64, 12) for k in (3, 5, 8)),
        (f"{PARK_VIT} --pool gap", 256, 3, 64, 12),
        *((f"{PARK_HALF} --heads {h} --head-dim 64", 257, h, 64, 6) for h in range(1, 10)),
        *((f"{PARK_HALF} --head-dim {d}", 257, 3, d, 6) for d in (22, 66, 110, 198)),
        *((f"{PARK_VIT} --epochs {n}", 257, 3, 64, 12) for n in (75, 150, 300, 600, 1200)),
    ],
)
def test_the_second_papers_vits_are_built_from_flags(flags, tokens, heads, head_dim, depth):
    args = train.settings(["--dataset", "cifar100", "--model", *flags.split()])[0]
    train.check_network(args)
    with torch.device("meta"):
        network = train.build_model(args.model, 100, 32, **train.knobs(args))
    qkv = network.blocks[0].attn.qkv
    assert network.pos_embed.shape == (1, tokens, 192) and len(network.blocks) == depth
    assert qkv.weight.shape == (3 * heads * head_dim, 192) and qkv.bias is None
    kernel = re.search("--kernel-size ([35])", flags)
    assert network.kernel_size == (int(kernel[1]) if kernel else None)
    asked = re.search(r"--epochs (\d+)", flags)
    assert args.epochs == (int(asked[1]) if asked else 305)


@pytest.mark.parametrize("fraction", ["1/50", "1/10", "3/10", "1/2", "1"])
def test_the_second_papers_fractions_of_cifar_are_class_balanced(fraction):
    labels = torch.arange(100).repeat(500)
    counts = torch.bincount(labels[data.subset(labels, fraction)])
    assert counts.tolist() == [int(500 * Fraction(fraction))] * 100  # 2 %: 10 images a class


def test_list_recipes_prints_each_with_steps_accuracy_and_table(capsys):
    assert train.PUBLISHED.keys() == train.RECIPES.keys()
    assert train.main(["--list-recipes"]) == 0
    rows = {
        line.split()[0]: line.split(maxsplit=8)[1:]
        for line in capsys.readouterr().out.splitlines()
        if line[:1].isalpha()
    }
    assert train.RECIPES.keys() <= rows.keys()
    for line in (
        "chen_vit vit_b16 imagenet 300 4,096 93,600 74.6 79.9 Chen Table 8, 2",
        "chen_mixer_tenth mixer_b16 imagenet 300 512 75,000 21.0 43.5 Chen E.2, Table 4",
        "chen_to_cifar10 vit_b16 cifar10 - 512 10,000 98.1 98.6 Chen Table 11, 6",
        "chen_supcon vit_b16 imagenet 350 2,048 218,750 - - Chen E.4",
        "chen_supcon_head vit_b16 imagenet 90 2,048 56,250 77.4 80.0 "
        "Chen E.4, §5.3; ViT-S/16 77.0, 78.1",
        "park_cifar_resnet resnet50 cifar100 305 96 158,600 77.8 - Park A.1, App. C",
        "xiao_vit vit_c_4gf imagenet 400 2,048 250,000 81.4 - Xiao §5.4, Table 2",
        "xiao_regnety_16gf regnety_16gf imagenet 400 2,048 250,000 83.7 - Xiao §6, Table 2",
    ):
        name, *row = line.split(maxsplit=8)
        assert rows[name] == row, (rows[name], row)


def test_expected_hours_are_those_of_the_arithmetic_in_list_recipes_and_dry_run(capsys):
    forward = vit.complexity(vit.build("vit_b16"))["macs"]
    hours = 2 * forward * 3 * 4096 * 93_600 / (8 * 100e12) / 3600  # Table 8: 300 epochs
    assert train.main(["--list-recipes", "--expect", "8", "100"]) == 0
    rows = {
        line.split()[0]: line.split()
        for line in capsys.readouterr().out.splitlines()
        if line[:1].isalpha()
    }
    assert rows["chen_vit"][8:10] == [f"{hours:.3g}", f"{2 * hours:.3g}"]
    shown = re.findall(r"^\| `(\w+)` \| .* \| (\S+) \| (\S+) \|$", README, re.MULTILINE)
    assert len(shown) > 10, "README's table is this one"
    for name, *columns in shown:
        assert rows[name][8:10] == columns, name
    assert (
        train.main(
            [
                *"--recipe chen_vit --sam-rho paper --dry-run --data-dir nowhere".split(),
                *"--expect 8 100".split(),
            ]
        )
        == 2
    ), "told though there are no data"
    told = re.search(r"expected  (\S+) hours of 93,600 steps", capsys.readouterr().out)
    assert told[1] == f"{2 * hours:.3g}"
    for argv, line in (
        (["--expect", "8", "50"], "--expect is for --dry-run"),
        (["--dry-run", "--expect", "8", "0"], "--expect 8.0 0.0: devices and"),
        (["--dry-run", "--expect", "8", "inf"], "both above 0"),
        (["--dry-run", "--expect", "8", "nan"], "both above 0"),
        (
            [
                *"--dry-run --dataset cifar10 --model torchvision:vit_b_16".split(),
                *"--image-size 224 --expect 8 50".split(),
            ],
            "cannot be counted",
        ),
        (["--dry-run", "--expect", "8"], "expected 2 arguments"),
        (["--dry-run", "--dataset", "folder", "--expect", "8", "50"], "not of a folder"),
        (["--dry-run", "--train-fraction", "half", "--expect", "8", "50"], "--train-fraction half"),
    ):
        assert line in refusal(capsys, *argv), line


PASSES = {  # flags: forward passes of the network that a step of 32 images takes for each, by hand
    "--sam-rho 0": 3,
    "--sam-rho 0.1": 6,
    "--sam-rho 0.1 --sam-steps 2": 9,
    "--sam-rho 0.1 --sam-every 2": 4.5,
    "--sam-rho 0 --adv-eps 2/255": 5,
    "--sam-rho 0.1 --adv-eps 2/255": 6,
    "--sam-rho 0.1 --sam-every 2 --sam-reuse 0 --adv-eps 2/255": 5.5,
    "--sam-rho 0 --loss supcon --augment crop": 8,
    "--sam-rho 0.1 --loss supcon --augment crop": 16,
    # Of the head alone a gradient costs nothing; δ's goes back to the images.
    "--sam-rho 0.1 --train-only head --init-from FILE": 2,
    "--sam-rho 0.1 --train-only head --init-from FILE --adv-eps 2/255": 3,
    "--sam-rho 0.1 --train-only head --init-from FILE --adv-eps 2/255 --sam-every 2 "
    "--sam-reuse 0": 3,
}


class Flops(TorchDispatchMode):
    """Adds up what torch knows of the products of matrices and convolutions."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](
                *args, **(kwargs or {}), out_val=out
            )
        return out


@pytest.mark.parametrize("flags", PASSES)
def test_the_passes_of_a_step_are_what_it_computes(tmp_path, monkeypatch, small_shapes, flags):
    """In two steps; the first layer, whose gradient by the images only an attack needs, is a
    hundredth of this network."""
    argv = (
        "--device cpu --model mixer_micro8 --dim 128 --depth 6 --token-mlp-dim 64 "
        "--mlp-dim 512 --dataset shapes --batch-size 32 --micro-batch 8 --warmup-steps 0 "
        f"--max-steps 2 --projection-dim 4 --out-dir {tmp_path / 'run'} {flags}"
    ).split()
    args, _ = train.settings(argv)
    file = tmp_path / "file.pt"
    network = train.build_model(args.model, 12, 32, **train.knobs(args))
    torch.save(network.state_dict(), file)
    argv = [word.replace("FILE", str(file)) for word in argv]
    argv += ["--mean", "0.5", "--std", "0.5"] * ("FILE" in flags)
    assert train.forward_passes(args) == PASSES[flags]
    monkeypatch.setattr(
        train,
        "evaluate",
        lambda *args, **more: dict(images=1, top1=0.0, top5=0.0, nll=0.0, ece=0.0),
    )
    monkeypatch.setattr(train, "set_class_means", lambda *args: None)
    with Flops() as count:
        assert train.main(argv) == 0
    expected = 2 * train.complexity_of(args)["macs"] * PASSES[flags] * 2 * 32
    assert abs(count.total / expected - 1) < 0.03, count.total / expected


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_of_what_corrects_the_gradient_skips_the_step_under_a_loss_scaler(fused):
    """After the scaler has looked at it."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(net.state_dict())
    for correct, skipped in ((lambda: net[0].weight.grad.fill_(math.inf), 1), (None, 0)):
        scaler.scale(net(torch.arange(6.0).view(2, 3))[0].sum()).backward()
        statistics = train.RunningStatistics(net)
        statistics.begin_step()
        _, skip = train.update(optimizer, scaler, [*net.parameters()], 0, statistics, 1, correct)
        assert skip == skipped
        same = same_tensors(
            dict(net.named_parameters()), {k: before[k] for k, _ in net.named_parameters()}
        )
        assert same == bool(skipped)
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_signal_after_the_last_step_does_what_it_did_before():
    """Nobody asks for it any more: the final evaluations would go on."""
    of_pytest = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stop = train.StopSignal()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            stop.end()
        train.StopSignal().end()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, of_pytest)


def test_what_one_of_two_processes_meets_alone_is_told_and_ends_both(tmp_path, capsys):
    root = write_image_folder(tmp_path / "images", train=4, val=2)
    flags = f"--dataset folder --data-dir {root} --image-size 32 --batch-size 8 --micro-batch 4"
    train_ok(tiny(tmp_path / "run", "--max-steps 1 --epochs 1", dataset=flags))
    argv = ["--eval-only", "--init-from", str(tmp_path / "run/ckpt.pt"), "--device", "cpu"]
    assert "--hold-out is for training" in refusal(capsys, *argv, "--hold-out", "1/2")
    (root / "val/bee/bee_1.JPEG").write_bytes(b"no image")  # the fourth: of the second process
    run = start(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *argv]
    )
    said, _ = run.communicate(timeout=120)
    (line,) = [line for line in said.splitlines() if line.startswith("train.py: ")]
    assert "bee_1.JPEG is not an image" in line and line.endswith("; then repeat the command"), said
    assert run.returncode == 1


def test_running_statistics_of_a_step_are_the_mean_over_its_first_passes():
    """Of BatchNorm: each micro-batch from the same start; passes at w + ε do not count."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    micros = [torch.randn(8, 3).double() * (i + 1) + i for i in range(3)]
    for skip in (1, 0):
        statistics = train.RunningStatistics(norm)
        statistics.begin_step()
        for x in micros:
            statistics.begin_pass()
            norm(x)
            statistics.end_pass()
            statistics.begin_pass()
            norm(9 - 5 * x)
        statistics.end_step(len(micros), torch.tensor(float(skip)))
        if skip:
            assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, var)
            assert norm.num_batches_tracked == 0
    of_means = torch.stack([0.9 * mean + 0.1 * x.mean(0) for x in micros]).mean(0)
    of_vars = torch.stack([0.9 * var + 0.1 * x.var(0) for x in micros]).mean(0)
    assert torch.allclose(norm.running_mean, of_means, rtol=1e-12, atol=0)
    assert torch.allclose(norm.running_var, of_vars, rtol=1e-12, atol=0)
    assert norm.num_batches_tracked == 1


def test_a_run_stopped_between_checkpoint_and_evaluation_evaluates_when_it_goes_on(
    tmp_path, monkeypatch
):
    whole = train_ok(tiny(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *args, **more: os.kill(os.getpid(), signal.SIGINT))
        patch.setattr(train.StopSignal, "receive", signal.default_int_handler)
        assert train.main(tiny(tmp_path / "cut")) == 130
    step = torch.load(tmp_path / "cut/ckpt.pt", weights_only=True)["step"]
    assert 0 < step < whole["step"] and not (tmp_path / "cut/best.pt").exists()
    resumed = train_ok([*tiny(tmp_path / "cut"), "--resume"])
    assert same_tensors(resumed["model"], whole["model"])
    assert log_without_times(tmp_path / "cut") == log_without_times(tmp_path / "whole")
    best = [torch.load(tmp_path / run / "best.pt", weights_only=True) for run in ("cut", "whole")]
    assert best[0]["step"] == best[1]["step"] and same_tensors(*(b["model"] for b in best))


@pytest.mark.parametrize("wrap", ["model", "state_dict"])
def test_weights_that_a_file_wraps_are_taken(tmp_path, wrap):
    """As DeiT's, timm's and MAE's files do."""
    first, second = (
        vit.build("vit_micro8", 12, 32, dim=24, depth=1, heads=2, mlp_dim=48) for _ in range(2)
    )
    torch.save({wrap: first.state_dict(), "epoch": 3}, tmp_path / "file.pth")
    assert train.load_weights(second, tmp_path / "file.pth") is None
    assert same_tensors(first.state_dict(), second.state_dict())


def test_settings_of_a_checkpoint_are_read_once_while_its_file_stays(tmp_path, monkeypatch):
    state = dict(
        settings=dict(model="vit_micro8", dataset="shapes", mean=[0.5], std=[0.5]),
        classes=["ant", "bee"],
        step=3,
        model=vit.build("vit_micro8", 2, 32, dim=24, depth=1, heads=2, mlp_dim=48).state_dict(),
        ema=None,
    )
    file, reads, read = str(tmp_path / "ckpt.pt"), [], train.read_checkpoint
    monkeypatch.setattr(train, "read_checkpoint", lambda path: reads.append(path) or read(path))
    for step in (3, 4):
        torch.save(dict(state, step=step), file)
        for _ in range(2):
            own = train.own_checkpoint(file)
            assert own == dict(settings=state["settings"], classes=["ant", "bee"], step=step)
    assert reads == [file] * 2
    torch.save(state["model"], file)
    assert train.own_checkpoint(file) == {}
    os.remove(file)
    with pytest.raises(train.UserError, match="ckpt.pt: No such file"):
        train.own_checkpoint(file)


def test_recipes_are_known_by_name_in_their_tables_only():
    source = (HERE / "train.py").read_text()
    rest = source[: source.index("RECIPES = {")] + source[source.index("TRAINING_IMAGES = ") :]
    known = set(train.RECIPES) - set(data.DATASETS)
    assert not known & set(re.findall(r"\w+", rest))


@pytest.fixture(scope="module")
def papers_data(tmp_path_factory):
    """Every data set of the recipes in its published format, 60 images each, and in x.pt weights of
    another number of classes."""
    root = tmp_path_factory.mktemp("data")
    write_image_folder(root / "imagenet", train=20, val=2)
    flowers = root / "flowers-102"
    for i in range(64):
        write_grey(flowers / f"jpg/image_{i + 1:05d}.jpg", 3 * i)
        write_grey(root / f"oxford-iiit-pet/images/cat_{i}.jpg", 3 * i)
    parts = zip(("trnid", "valid", "tstid"), np.split(np.arange(1, 65, dtype=np.uint16), (30, 60)))
    write_mat(flowers / "setid.mat", True, **dict(parts))
    write_mat(flowers / "imagelabels.mat", True, labels=(np.arange(64) % 3 + 1).astype(np.uint8))
    lists = root / "oxford-iiit-pet/annotations"
    lists.mkdir(parents=True)
    for file, numbers in (("trainval", range(60)), ("test", range(60, 64))):
        (lists / f"{file}.txt").write_text("".join(f"cat_{i} {i % 3 + 1} 1 1\n" for i in numbers))
    sums = {}  # what torchvision's classes compare their files with
    for cls, key, batches in (
        (data.CIFAR10, "labels", ["data_batch_1", "test_batch"]),
        (data.CIFAR100, "fine_labels", ["train", "test"]),
    ):
        folder = root / cls.base_folder
        folder.mkdir()
        files = {cls.meta["filename"]: {cls.meta["key"]: ["ant", "bee", "cat"]}}
        for batch, n in zip(batches, (60, 8)):
            pixels = np.random.default_rng(n).integers(0, 256, (n, 3072), dtype=np.uint8)
            files[batch] = {"data": pixels, key: [i % 3 for i in range(n)]}
        for file, content in files.items():
            (folder / file).write_bytes(pickle.dumps(content))
        md5 = {
            file: hashlib.md5((folder / file).read_bytes()).hexdigest()
            for file in os.listdir(folder)
        }
        lists = [[[batch, md5[batch]]] for batch in batches]
        sums[cls] = dict(zip(("train_list", "test_list"), lists)), md5[cls.meta["filename"]]
    network = train.build_model("vit_b16", 7, 32, dim=24, depth=1, heads=2, mlp_dim=48)
    torch.save(network.state_dict(), root / "x.pt")
    return root, sums


SMALL = {  # flags that make a network of a family small
    "vit": "--dim 24 --depth 1 --heads 2 --mlp-dim 48",
    "mixer": "--dim 24 --depth 1 --token-mlp-dim 8 --mlp-dim 48",
    "resnet": "--width 8 --depth 1 1 1 1",
    "regnety": "",
}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in train.RECIPES  # what differs in more than size
        if not re.search("_(half|quarter)$|regnety_(4|16|32)", name)
    ],
)
def test_a_recipe_takes_three_steps_on_data_in_the_published_format(
    name, papers_data, tmp_path, capsys, monkeypatch, short_shapes
):
    for size in train.REGNETY:
        monkeypatch.setitem(train.REGNETY, size, ((1, 1, 1, 1), (8, 16, 24, 32), 8))
    row = train.RECIPES[name]
    dataset, small = row["dataset"], SMALL[train.family(row["model"])]
    root, sums = papers_data
    for cls, (lists, of_meta) in sums.items():
        for name_of, files in lists.items():
            monkeypatch.setattr(cls, name_of, files)
        monkeypatch.setitem(cls.meta, "md5", of_meta)
    below = root / "imagenet" if "imagenet" in dataset else root
    argv = (
        f"--recipe {name} {small} --image-size 32 --batch-size 4 --micro-batch 2 --max-steps 3 "
        f"--warmup-steps 2 --warmup-epochs 0 --log-every 1 --workers 0 --device cpu "
        f"--out-dir {tmp_path / 'run'}"
    ).split()
    if "reset_head" in row:
        argv += ["--init-from", f"{root / 'x.pt'}", "--mean", "0.5", "--std", "0.5"]
    argv += ["--train-fraction", "1/500"] if dataset == "shapes" else ["--data-dir", str(below)]
    if row.get("eval_short_side"):
        argv += ["--eval-short-side", "36"]
    state = train_ok(argv)
    losses = [record for record in log_without_times(tmp_path / "run") if "loss" in record]
    assert len(losses) == state["step"] == 3 and state["settings"]["recipe"] == name
    assert all(math.isfinite(r["loss"]) and not r["skipped"] for r in losses), losses
    assert [r["lr"] for r in losses[:2]] == [0, row["lr"] / 2]
    augments = row.get("augment", "none") != "none"
    measured = {
        "training",
        "validation",
        *["training, augmented"] * augments,
        *["training, mixed"] * bool(row.get("mixup")),
    }
    assert state["final"].keys() == measured, state["final"].keys()
    text = capsys.readouterr().out
    for field in row:
        assert re.search(rf"^  {field.replace('_', '-')} ", text, re.M), (field, text)
    if "reset_head" in row:
        again = ["--eval-only", "--init-from", str(tmp_path / "run/ckpt.pt"), "--device", "cpu"]
        assert train.main(again) == 0, "a fine-tuned network is evaluated like any other"


def test_mixed_images_are_not_of_the_same_class_where_files_are_sorted(tmp_path, monkeypatch):
    write_image_folder(tmp_path / "images", train=12, val=4)
    settings = f"--dataset folder --data-dir {tmp_path / 'images'} --epochs 1 --batch-size 4"
    evaluate, seen = train.evaluate, []

    def listen(model, loader, *args, mix=None, **more):
        def of_labels(number, x, y):
            seen.append(y)
            return mix(number, x, y)

        return evaluate(model, loader, *args, mix=mix and of_labels, **more)

    monkeypatch.setattr(train, "evaluate", listen)
    flags = "--micro-batch 4 --image-size 16 --mixup 0.5 --augment crop --workers 0 --max-steps 1"
    train_ok(tiny(tmp_path / "run", flags, dataset=settings))
    labels = torch.cat(seen)
    assert labels.bincount().tolist() == [4, 4, 4][: len(labels.unique())], "each once"
    assert sum(len(y.unique()) > 1 for y in seen) > 1, seen


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_goes_on_in_another_layout_of_memory_and_by_other_kernels(tmp_path, optimizer):
    flags = f"--stem conv --dtype float64 --optimizer {optimizer} --max-steps"
    whole = train_ok(tiny(tmp_path / "whole", flags, 8))
    train_ok(tiny(tmp_path / "cut", flags, 4, "--channels-last"))
    path = tmp_path / "cut/ckpt.pt"
    state = torch.load(path, weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = False  # as on a device without
    torch.save(state, path)
    again = train_ok(tiny(tmp_path / "cut", flags, 8, "--no-channels-last --resume"))
    assert largest_difference(whole["model"], again["model"]) < 1e-9


def test_a_file_is_on_the_disk_whole_before_it_takes_its_name(tmp_path, monkeypatch):
    path, flushed = tmp_path / "ckpt.pt", []
    path.write_bytes(b"before")

    def fsync(number):
        flushed.append((os.fstat(number).st_size, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", fsync)
    train.write_file(path, lambda file: file.write(b"after it"))
    assert flushed == [(8, b"before")] and path.read_bytes() == b"after it"


def test_processes_send_no_buffers(tmp_path, monkeypatch):
    """BatchNorm's statistics are averaged once a step, not sent before each pass."""
    ddp, sent = nn.parallel.DistributedDataParallel, []
    monkeypatch.setattr(ddp, "_sync_buffers", lambda self: sent.append(1))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = toy_batch()[0]
        for wrap in (lambda net: train.averaging(net, torch.device("cpu")), ddp):
            sent.append(0)
            wrap(small_net(batch_norm=True))(x)
    finally:
        dist.destroy_process_group()
    assert sent == [0, 0, 1], "ours, torch's default"


def test_mixed_images_are_evaluated_against_the_shares_of_their_labels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    dataset = data.InMemory(
        torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8), torch.arange(7) % 4, list(range(4))
    )

    def mix(number, x, y):
        share = 0.6 + 0.1 * number
        other = F.one_hot(y, 4).double().roll(1, 0)
        return share * x + (1 - share) * x.roll(1, 0), share * F.one_hot(y, 4) + (1 - share) * other

    got = train.evaluate(model, data.evaluation_loader(dataset, 3), torch.device("cpu"), mix=mix)
    nll = right = 0
    for number, some in enumerate((range(0, 3), range(3, 6), range(6, 7))):
        share = 0.6 + 0.1 * number
        for a in some:
            b = some[a - some[0] - 1]
            x = (share * dataset.pixels[a] + (1 - share) * dataset.pixels[b]).double() / 255
            log_p = model(x[None])[0].detach().log_softmax(0)
            nll -= float(share * log_p[a % 4] + (1 - share) * log_p[b % 4]) / 7
            right += int(log_p.argmax()) == a % 4
    assert abs(got["nll"] - nll) < 1e-7 and abs(got["top1"] - 100 * right / 7) < 1e-9, (got, nll)


@pytest.mark.parametrize("every", [1, 2])
def test_the_average_moves_when_and_as_much_as_the_third_papers_code_has_it(
    tmp_path, monkeypatch, every
):
    saved = {}
    monkeypatch.setattr(
        train.RunFolder,
        "save",
        lambda self, name, state: saved.setdefault(
            state["step"], copy.deepcopy((state["model"], state["ema"]))
        ),
    )
    argv = tiny(tmp_path, f"--ema-alpha 0.01 --ema-every {every} --save-every 1 --eval-every 9")
    assert train.main(argv) == 0  # 10 steps, of which 3 of warm-up; batch 32, 2 epochs
    decay = 1 - 0.01 * 32 / 2 * every
    assert same_tensors(*saved[3]), "a copy until the warm-up is over"
    _, mean = saved[1]
    for step in range(2, 11):  # steps taken; with every = 2 the average moves after 1, 3, 5, …
        weights, after = saved[step]
        if (step - 1) % every == 0:
            keep = decay if step > 3 else 0.0
            mean = {name: keep * mean[name] + (1 - keep) * weights[name] for name in mean}
        assert all(torch.allclose(after[name], mean[name], atol=1e-7) for name in mean), step


def test_sam_rho_paper_is_table_9():
    supervised = (
        "resnet50 0.02 resnet101 0.05 resnet152 0.02 resnet50x2 0.05 resnet101x2 0.05 resnet152x2 "
        "0.05 vit_s32 0.05 vit_s16 0.1 vit_s14 0.1 vit_s8 0.15 vit_b32 0.15 vit_b16 0.2 mixer_s32 "
        "0.1 mixer_s16 0.15 mixer_s8 0.2 mixer_b32 0.35 mixer_b16 0.6 mixer_b8 0.6"
    ).split()
    adversarial = (
        "resnet50 0.05 resnet101 0.05 resnet152 0.05 vit_s16 0.1 vit_b32 0.1 vit_b16 "
        "0.1 mixer_s16 0.05 mixer_b32 0.25 mixer_b16 0.25"
    ).split()
    table = {
        "supervised": supervised,
        "adversarial": adversarial,
        "strong augmentation": ["vit_b16", "0.05", "mixer_b16", "0.2"],
        "supervised contrastive": ["vit_s16", "0.02", "vit_b16", "0.02"],
    }
    table = {k: dict(zip(row[::2], map(float, row[1::2]))) for k, row in table.items()}
    assert train.PAPER_RHO == table
    for model, rho in table["supervised"].items():
        assert train.settings(["--model", model, "--sam-rho", "paper"])[0].sam_rho == rho
    strong = (
        "--mixup 0.5 --randaugment 2 15 --randaugment-of google --sam-rho paper --model"
    ).split()
    for model, rho in table["strong augmentation"].items():
        assert train.settings([*strong, model])[0].sam_rho == rho
    for one in (["--mixup", "0.5"], ["--randaugment", "2", "9"]):  # is not yet strong
        assert train.settings(["--model", "vit_b16", "--sam-rho", "paper", *one])[0].sam_rho == 0.2
    for model, rho in table["supervised contrastive"].items():
        args, origin = train.settings(
            ["--recipe", "chen_supcon", "--model", model, "--sam-rho", "paper"]
        )
        assert args.sam_rho == rho and args.sam_sync and origin["sam_sync"] == "--loss supcon"
        assert args.out_dir == f"out/imagenet-{model}-supcon-rho0.02-seed0"
        second = ["--recipe", "chen_supcon_head", "--init-from", "x.pt", "--model", model]
        second += ["--sam-rho", "paper"]
        assert train.settings(second)[0].sam_rho == rho
    for model, rho in table["adversarial"].items():  # Table 5's rows: E.5 changes nothing else
        plain, _ = train.settings(["--model", model])
        for more in (["--adv-eps", "2/255"], ["--recipe", f"{plain.recipe}_adversarial"]):
            args, _ = train.settings(["--model", model, "--sam-rho", "paper", *more])
            assert args.sam_rho == rho and args.adv_eps == 2 / 255 and not args.adv_step_size
            other = {k for k, v in vars(args).items() if v != getattr(plain, k)} - {"recipe"}
            assert other == {"sam_rho", "adv_eps", "out_dir"}, other
            assert args.out_dir == f"out/imagenet-{model}-adv2-rho{rho}-seed0"


def test_flags_override_recipes_and_recipes_override_defaults(capsys):
    for text in ("2/255", "0.0123456789", "1/510"):  # and a setting's flag is that setting
        args, _ = train.settings(["--adv-eps", text])
        assert train.settings(train.as_flag("adv_eps", args))[0].adv_eps == args.adv_eps
    assert train.settings([])[0].recipe == "shapes" and train.settings([])[0].sam_rho > 0
    args, origin = train.settings(["--recipe", "chen_vit", "--lr", "0.1", "--model", "vit_s32"])
    assert (args.lr, args.model, args.epochs) == (0.1, "vit_s32", 300)
    set_by = [origin[name] for name in ("lr", "model", "epochs", "seed")]
    assert set_by == ["command line", "command line", "chen_vit", "default"]
    assert train.settings(["--dataset", "folder"])[0].recipe == "none"
    assert train.settings(["--dataset", "folder"])[0].augment == "inception"
    assert train.settings(["--dataset", "shapes", "--model", "mixer_s16"])[0].recipe == "shapes"
    assert train.settings(["--dataset", "shapes"])[0].model == "vit_micro8"
    assert train.settings(["--data-dir", "x"])[0].dataset == "imagenet"
    for model, recipe in (("vit_b16", "chen_vit_21k"), ("vit_c_36gf", "xiao_vit_21k_36gf")):
        assert train.settings(["--dataset", "imagenet21k", "--model", model])[0].recipe == recipe
    assert train.settings(["--sam-rho", "0"])[0].out_dir == "out/shapes-vit_micro8-rho0-seed0"
    for model in ("alter_resnet50", "torchvision:resnet50"):  # have no such argument
        args, origin = train.settings(["--recipe", "chen_resnet", "--model", model])
        assert (args.zero_init, origin["zero_init"]) == (None, "default")
        train.check_network(args)
    assert train.main(["--dry-run", "--warmup-epochs", "2.5", "--device", "cpu"]) == 0
    assert "after 437 steps" in capsys.readouterr().out  # 125 of the recipe, 2.5 × 125


def test_mistakes_on_the_command_line_get_one_line_that_helps(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    for argv, words in [
        (["--sam-roh", "0.1"], "unknown flag --sam-roh; did you mean --sam-rho"),
        (["--epochs", "1", "2"], "arguments: 2: neither a flag nor a value that one takes"),
        (["--dataset", "shapes", "--data-dir", "/x"], "--data-dir: shapes are drawn, not read"),
        (
            ["--recipe", "park_cifar_vit", "--model", "resnet50"],
            "--qkv-bias is of --recipe park_cifar_vit: choose one for resnet50",
        ),
        (["--batch_size", "64"], "did you mean --batch-size"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--optimizer", "adam"], "--optimizer: invalid choice: 'adam' (choose from"),
        (["--sam-rho", "big"], "--sam-rho big: give a number"),
        (["--sam-rho", "-1"], "--sam-rho is -1.0; it must be at least 0"),
        (["--sam-rho", "paper"], "Table 9 has no row for vit_micro8"),
        (["--sam-rho", "0", "--sam-every", "2"], "--sam-every is a way of SAM: add --sam-rho"),
        (["--sam-every", "0"], "--sam-every is 0; it must be at least 1"),
        (["--sam-every", "2", "--adv-eps", "0.01"], "images trained on: add --sam-reuse 0"),
        (["--sam-reuse", "0.5"], "--sam-reuse is for the steps between SAM's: add --sam-every"),
        (["--sam-scope", "nrom"], "--sam-scope nrom: no trained parameter's name matches"),
        (["--sam-scope", "blocks.["], "--sam-scope blocks.[: unterminated character set"),
        (["--model", "vit_x16"], "unknown model 'vit_x16', did you mean 'vit_s16'?"),
        (["--model", "vit_b61"], "unknown model 'vit_b61', did you mean 'vit_b16'?"),
        (["--model", "swin_t", "--dataset", "shapes"], "unknown model 'swin_t'"),
        (["--model", "mixer_b61"], "unknown model 'mixer_b61', did you mean 'mixer_b16'?"),
        (
            ["--model", "resnet_50", "--dataset", "shapes"],
            "unknown model 'resnet_50', did you mean 'resnet50'? known: (pre)resnet{18,",
        ),
        (["--model", "regnety_2gf"], "did you mean 'regnety_32gf'?"),
        (["--model", "pit_ti", "--dataset", "shapes", "--stride", "0"], "must be at least 1"),
        (["--mlp-dim", "0"], "head_dim and mlp_dim must be at least 1, got 32, 0"),
        (["--init-from", "x.pt", "--mean", "0.5"], "--mean and --std go together"),
        (
            ["--model", "densenet", "--dataset", "shapes"],
            "unknown model 'densenet', did you mean 'resnet50'? known: what --list-models prints",
        ),
        (["--model", "torchvision:resnet81", "--dataset", "shapes"], "did you mean 'resnet1"),
        (
            ["--model", "torchvision:vgg11", "--dataset", "shapes", "--dim", "8"],
            "unexpected keyword argument 'dim'",
        ),
        (
            ["--model", "resnet18", "--dataset", "shapes", "--dim", "8"],
            "unknown argument of resnet18 'dim'; known: num_classes, depth, bottleneck, width,",
        ),
        (
            ["--model", "alter_resnet50", "--dataset", "shapes", "--image-size", "48"],
            "image sizes that work: 32 and 64; window sizes that work: 1, 2, 3, 6",
        ),
        (["--msa-blocks", "0", "1"], "argument --msa-blocks: expected 4 arguments"),
        (["--depth", "2", "2"], "--depth 2 2: vit_micro8 takes one number"),
        (
            ["--model", "resnet18", "--dataset", "shapes", "--depth", "2"],
            "--depth 2: resnet18 takes 4 numbers, one for each stage",
        ),
        (["--randaugment", "2", "15"], "--randaugment 2 15: the number of operations is"),
        (["--erasing", "1.5"], "--erasing is 1.5; a probability"),
        (["--loss", "supcon"], "without augmentation are the same: add --augment crop"),
        (["--loss", "supcon", "--augment", "crop", "--mixup", "0.5"], "supcon has no --mixup"),
        (["--loss", "supcon", "--augment", "crop", "--adv-eps", "2/255"], "has no --adv-eps"),
        (["--loss", "supcon", "--augment", "crop", "--no-sam-sync"], "leave out --no-sam-sync"),
        (["--loss", "supcon", "--augment", "crop", "--temperature", "0"], "must be above 0"),
        (["--projection-dim", "0"], "--projection-dim is 0; it must be at least 1"),
        (["--keep-epochs", "13"], "--keep-epochs 13: it takes warmup and epochs from 1 to "),
        (["--keep-epochs", "warmup", "--warmup-steps", "0"], "this run has no warm-up"),
        (["--train-only", "head"], "on the representation of --init-from, for instance"),
        (["--lr-schedule", "exponential"], "to --lr-end, 0, which must be above 0"),
        (["--model", "mixer_s16", "--dataset", "shapes", "--unit-norm"], "'unit_norm'; known"),
        (["--reset-head"], "--reset-head is for training from the weights of --init-from"),
        (
            ["--patch-size", "5"],
            "image_size must be a positive multiple of patch_size, got 32 and 5",
        ),
        (
            ["--batch-size", "100"],
            "batch size 100 is not a multiple of micro-batch 32 × 1 devices = 32: use "
            "--batch-size 96 or --micro-batch 25",
        ),
        (["--epochs", "0"], "--epochs 0 needs --max-steps"),
        (["--train-fraction", "2"], "--train-fraction 2"),
        (["--train-fraction", "half"], "--train-fraction half"),
        (["--train-fraction", "1/500"], "16 images, fewer than one batch of 64: use --batch-size"),
        (["--eval-only"], "--eval-only needs --init-from"),
        (["--init-from", "nowhere.pt"], "nowhere.pt: No such file"),
        (["--label-smoothing", "1"], "below 1"),
        (["--mixup", "0.2", "--micro-batch", "1"], "--micro-batch 2 or more"),
        (["--eps", "0"], "--eps is 0.0; it must be above 0"),
        (["--eps", "-1"], "--eps is -1.0; it must be above 0"),
        (["--workers", "-1"], "--workers is -1; it must be at least 0"),
        (["--drop-path", "nan"], "--drop-path is nan; it must be at least 0 and below"),
        (["--adv-eps", "2/255/3"], "'2/255/3' is no number"),
        (["--model", "vit_b16", "--sam-rho", "0.2"], "data/imagenet/train is no folder"),
        (["--dataset", "cifar10"], "cifar-10-batches-py is missing"),
        (["--out-dir", "/proc/nothing"], "--out-dir /proc/nothing"),
        (["--out-dir", __file__], "test_all.py is a file, not a folder"),
    ]:
        line = refusal(capsys, *argv, "--device", "cpu")
        assert words in line, (argv, line)
    assert "--dataset shapes needs no files" in refusal(capsys, "--model", "vit_b16")
    monkeypatch.setenv("IMAGENET_DIR", "/some/where")
    assert "/some/where/train is no folder" in refusal(capsys, "--model", "vit_b16")


def test_the_papers_run_is_resolved_by_dry_run_and_runs_scaled_down_on_imagenets_layout(
    tmp_path, capsys
):
    write_image_folder(tmp_path / "imagenet", train=24, val=5)
    paper = [
        *"--model vit_b16 --sam-rho 0.2 --data-dir".split(),
        str(tmp_path / "imagenet"),
        "--device",
        "cpu",
    ]
    out = tmp_path / "run"
    assert train.main([*paper, "--batch-size", "32", "--dry-run", "--out-dir", str(out)]) == 0
    text = capsys.readouterr().out
    for line in (
        "recipe    chen_vit",
        "weight-decay     0.3",
        "sam-rho          0.2",
        "85,800,963 parameters",
        "sigmoid loss",
        "3 classes, where ImageNet-1k has 1,000",
        "SAM with ρ = 0.2 on each micro-batch",
        "72 training and 15 validation",
    ):
        assert line in text, (line, text)
    assert not out.exists()
    for name in ("ant", "bee", "cat"):  # one image by many names makes a data set of 4,272
        folder = tmp_path / "imagenet/train" / name
        for i in range(1400):
            os.link(folder / f"{name}_3.JPEG", folder / f"link{i}.JPEG")
    assert train.main([*paper, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "4,096 images = 1 devices × 128 micro-batches × 32 images" in text, text
    assert "300 steps, 1 per epoch; adamw, learning rate 0.003 after 10,000 steps" in text, text
    for link in (tmp_path / "imagenet/train").glob("*/link*"):
        link.unlink()
    damaged = tmp_path / "imagenet/train/bee/bee_7.JPEG"
    damaged.write_bytes(damaged.read_bytes()[: -len(damaged.read_bytes()) // 3])
    (tmp_path / "imagenet/val/cat/notes.txt").write_text("no image")
    (tmp_path / "imagenet/val/ant").rename(tmp_path / "ant")
    assert train.main([*paper, "--batch-size", "32", "--dry-run"]) == 0
    assert "validation images are of 2 of the 3 classes" in capsys.readouterr().out
    (tmp_path / "ant").rename(tmp_path / "imagenet/val/ant")
    small = (
        "--dim 24 --depth 2 --heads 2 --mlp-dim 48 --batch-size 24 --micro-batch 8 "
        "--epochs 2 --workers 1 --image-size 48"
    )
    state = train_ok([*paper, *small.split(), "--out-dir", str(out)])
    assert state["step"] == 6 and state["final"]["validation"]["images"] == 15
    assert state["settings"]["warmup_steps"] == 10_000
    text = capsys.readouterr().out
    assert text.count("left out, no image of a class:") == 1 and "val/cat/notes.txt" in text, text
    told = text.count("bee_7.JPEG is truncated: used as far as it can be decoded")
    assert told == 1, text


def test_what_a_folder_has_of_a_run_is_not_overwritten_and_a_start_that_failed_is_no_run(
    tmp_path, capsys, short_shapes
):
    for name in ("log.jsonl", "best.pt"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_bytes(b"of somebody else\n")
        assert "holds a run already" in refusal(capsys, *tiny(out))
        assert "config.json is missing" in refusal(capsys, *tiny(out, "--resume"))
        assert (out / name).read_bytes() == b"of somebody else\n"
    out = tmp_path / "failed"  # in its first step
    out.mkdir()
    (out / "config.json").write_text('{"settings": {"sam_rho": 0.5}}')
    (out / "log.jsonl").touch()
    train_ok(tiny(out, "--max-steps 1 --sam-rho 0"))
    assert "holds a run already" in refusal(capsys, *tiny(out, "--max-steps 1 --sam-rho 0"))
    assert train.main(tiny(out, "--max-steps 1 --sam-rho 0 --dry-run")) == 0
    assert f"run       {out}, which holds a run already: a dry run" in capsys.readouterr().out
    (out / "ckpt.pt").rename(tmp_path / "moved.pt")  # its disk is gone
    log = (out / "log.jsonl").read_bytes()
    for link in (False, True):
        again = refusal(capsys, *tiny(out, "--max-steps 1 --sam-rho 0 --resume"))
        assert f"{out}/ckpt.pt is gone, of a run that had one: put it back" in again
        if not link:
            (out / "ckpt.pt").symlink_to(tmp_path / "elsewhere.pt")
            (out / "best.pt").unlink()
    assert (out / "log.jsonl").read_bytes() == log
    train_ok(tiny(tmp_path / "new", "--max-steps 1 --sam-rho 0 --resume"))
    assert "new: nothing to resume there, so it starts" in capsys.readouterr().out


def test_an_evaluation_is_of_the_split_and_the_classes_that_are_asked_for(
    tmp_path, capsys, short_shapes
):
    state = train_ok(tiny(tmp_path / "run", "--max-steps 1"))
    ours = str(tmp_path / "run/ckpt.pt")
    evaluation = ["--eval-only", "--init-from", ours, "--device", "cpu"]
    capsys.readouterr()
    assert train.main([*evaluation, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "nothing is evaluated" in text and "top-1" not in text, text
    state["classes"] = [f"animal {i}" for i in range(12)]
    state["settings"]["data_dir"] = "elsewhere"
    torch.save(state, tmp_path / "animals.pt")
    evaluation[2] = str(tmp_path / "animals.pt")
    assert "shapes has 12 classes from disc, the network was trained on 12 from animal 0" in (
        refusal(capsys, *evaluation)
    )
    assert train.settings(evaluation)[0].data_dir == "elsewhere"
    assert train.settings([*evaluation, "--dataset", "cifar10"])[0].data_dir == "data"
    for dataset in ("folder", "imagenet", "imagenet21k"):
        assert f"{dataset} has no test split; its val/ is --eval-split val" in refusal(
            capsys, *evaluation, "--dataset", dataset, "--eval-split", "test"
        )
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    foreign = ["--eval-only", "--recipe", "chen_to_cifar10", "--init-from"]
    args, _ = train.settings([*foreign, str(tmp_path / "foreign.pth")])
    assert args.reset_head is False, "a recipe's, for training"
    assert train.without_effect(*train.settings([*foreign, str(tmp_path / "foreign.pth")])) == []
    assert train.without_effect(*train.settings([*foreign, ours])) == ["--recipe"]
    large = ["--dataset", "imagenet21k", "--model", "vit_l16", "--init-from", "x.npz"]
    assert train.settings([*large, "--eval-only"])[0].sam_rho == 0, "a recipe's, for training"
    assert "Table 9 has no row for vit_l16" in refusal(capsys, *large)
    kept = ["--init-from", ours, "--model", "vit_micro8", "--head-bias", "1", "--init", "timm"]
    assert train.without_effect(*train.settings(kept)) == ["--init", "--head-bias"]
    assert train.without_effect(*train.settings([*kept, "--reset-head"])) == []


def test_the_training_sample_is_as_large_as_the_validation_set(monkeypatch):
    def split(args, name, device, tell, **more):
        n = 3_000_001 if name == "train" else 6
        pixels = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(n, 3, 1, 1)
        return data.InMemory(pixels, torch.zeros(n, dtype=torch.int64), ["a"])

    monkeypatch.setattr(train, "load_split", split)
    _, _, augmented, plain = train.load_training(train.settings([])[0], torch.device("cpu"), print)
    assert len(augmented) == len(plain) == 6


def test_held_out_images_need_no_validation_folder(tmp_path, capsys):
    write_image_folder(tmp_path, val=0)
    shutil.rmtree(tmp_path / "val")
    argv = ["--dataset", "folder", "--data-dir", str(tmp_path), "--model", "vit_s16", "--dry-run"]
    argv += ["--image-size", "32", "--batch-size", "6", "--micro-batch", "3", "--epochs", "1"]
    argv += ["--device", "cpu"]
    assert "val is no folder" in refusal(capsys, *argv)
    assert train.main([*argv, "--hold-out", "1/3"]) == 0
    text = capsys.readouterr().out
    assert "24 training and 12 validation images, held out of the training set" in text, text
    assert "val is no folder" in refusal(capsys, *argv, "--hold-out", "0.0"), "0 is off"


def test_flags_that_nothing_reads_and_epochs_that_are_not_reached_are_told(
    tmp_path, capsys, short_shapes
):
    idle = "--eval-split test --temperature 0.2 --momentum 0.5 --ema-every 2 --flip"
    more = "--keep-epochs warmup 2 --max-steps 2 --warmup-steps 3 --dry-run"
    assert train.main(tiny(tmp_path / "run", idle, more)) == 0
    text = capsys.readouterr().out
    told = "without effect in this run: --eval-split --flip --temperature --momentum --ema-every\n"
    assert told in text, text
    assert "the run ends before warmup.pt epoch2.pt of --keep-epochs" in text, text
    assert train.main(tiny(tmp_path / "run", "--lr 0.1 --dry-run")) == 0
    assert "without effect" not in capsys.readouterr().out
    train_ok(tiny(tmp_path / "run", "--max-steps 1"))
    capsys.readouterr()
    file = str(tmp_path / "run/ckpt.pt")
    more = ["--lr", "1", "--seed", "3", "--device", "cpu", "--workers", "0"]
    assert train.main(["--eval-only", "--init-from", file, *more]) == 0
    assert "without effect in this run: --lr\n" in capsys.readouterr().out
    evaluated = ["--eval-only", "--init-from", file, "--device", "cpu", "--adv-eps", "4/255"]
    assert train.main([*evaluated, "--dropout", "0.5", "--init", "timm", "--compile"]) == 0
    told = "without effect in this run: --dropout --init --adv-eps --compile\n"
    assert told in capsys.readouterr().out, "networks are compiled for training alone"
    head = ["--train-only", "head", "--init-from", file, "--drop-path", "0.1", "--dry-run"]
    assert train.main(tiny(tmp_path / "head", *head)) == 0
    assert "without effect in this run: --drop-path\n" in capsys.readouterr().out
    for main, argv in (
        (analyze.main, ["lesion", "--images", "4"]),
        (analyze.main, ["robustness", "--benchmarks", "val"]),
        (adversarial.main, ["--attack", "fgsm", "--images", "4"]),
    ):
        assert main([*argv, "--checkpoint", file, *more]) == 0
        text = capsys.readouterr().out
        name = "adversarial" if main == adversarial.main else argv[0]
        assert re.findall("without effect in (.*): --lr\n", text) == [name], text
    decayed = ["--weight-decay", "0.3", "--label-smoothing", "0.1", "--images", "4"]
    for command, told in (("norms", ": --weight-decay --label-smoothing\n"), ("spectrum", None)):
        argv = [command, "--checkpoint", file, *decayed, *more[2:], *["--batch", "4"] * (not told)]
        assert analyze.main(argv) == 0
        text = capsys.readouterr().out
        assert f"without effect in norms{told}" in text if told else "without effect" not in text


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--model torchvision:alexnet", "torchvision:alexnet, --micro-batch 8: "),
        ("--model torchvision:googlenet", "in training it returns GoogLeNetOutputs"),
        ("--model torchvision:vit_b_16 --image-size 24", "vit_b_16: Input shape indivisible by"),
        ("--device mps", "torch sees no MPS device here"),
        ("--head-bias nan", "--head-bias is nan; it is finite"),
        ("--model torchvision:swin_t --depth 1 1 -1 1", "--depth 1 1 -1 1: numbers are at least 1"),
        ("--init-from {file}/ckpt.pt", "{file}/ckpt.pt: Not a directory"),
        (
            "--train-fraction 12/8000 --batch-size 32 --micro-batch 16",
            "use --batch-size 12 --micro-batch 12",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_a_folder_is_made(
    flags, line, tmp_path, capsys, short_shapes, monkeypatch
):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    file = tmp_path / "file"
    file.touch()
    argv = ["--dataset", "shapes", "--device", "cpu", "--workers", "0", "--batch-size", "32"]
    argv += ["--micro-batch", "8", "--out-dir", str(tmp_path / "run")]
    told = refusal(capsys, *argv, *flags.format(file=file).split())
    assert line.format(file=file) in told and not (tmp_path / "run").exists(), told


def test_a_compiler_that_fails_is_a_sentence(capsys):
    def function():
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand a hundred lines")

    assert train.answer("train.py", function, "again") == 2
    error = capsys.readouterr().err
    assert error == "train.py: torch.compile failed: no C++ compiler; --no-compile goes without\n"


def test_a_run_folder_may_have_any_name(tmp_path, short_shapes):
    out = tmp_path / os.fsdecode(b"\xff run")
    train_ok(tiny(out, "--max-steps 1"))
    assert json.loads((out / "config.json").read_text())["settings"]["out_dir"] == str(out)


def test_a_run_folder_holds_what_it_should_and_is_never_overwritten(tmp_path, capsys):
    out = tmp_path / "run"
    state = train_ok(tiny(out, "--sam-rho 0.1 --ema-decay 0.9"))
    assert sorted(p.name for p in out.iterdir()) == [
        "best.pt",
        "ckpt.pt",
        "config.json",
        "log.jsonl",
    ]
    records = log_without_times(out)
    assert [r["step"] for r in records if "loss" in r] == [4, 8, 10] and [
        r["step"] for r in records if "val" in r
    ] == [5, 10]
    assert records[-1]["final"]["validation"] == [r["val"] for r in records if "val" in r][-1]
    assert all(r["skipped"] == 0 and math.isfinite(r["loss"]) for r in records if "loss" in r)
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["sam_rho"] == 0.1 and config["versions"]["torch"] == torch.__version__
    assert (
        state["classes"] == list(data.SHAPES_CLASSES)
        and state["model"].keys() == state["ema"].keys()
    )
    argv, before = (
        tiny(out, "--sam-rho 0.1 --ema-decay 0.9"),
        {p.name: p.read_bytes() for p in out.iterdir()},
    )
    assert "holds a run already: add --resume" in refusal(capsys, *argv)
    line = refusal(capsys, *argv, "--resume", "--sam-rho", "0.2")
    assert "--sam-rho 0.1 → 0.2" in line, line
    assert train.main([*argv, "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out
    after = {p.name: p.read_bytes() for p in out.iterdir()}
    new = dict.fromkeys(["config.json"])  # it has the last command's --resume
    assert before | new == after | new
    with open(out / "log.jsonl", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "being written by another process" in refusal(capsys, *argv, "--resume")
    (out / "ckpt.pt").write_bytes(before["ckpt.pt"][:5000])
    assert "ckpt.pt is no checkpoint" in refusal(capsys, *argv, "--resume")


def test_a_run_goes_on_with_its_own_data_checkpoint_and_batches_only(tmp_path, capsys):
    """Elsewhere and with other workers bit for bit; with other versions too, which is told."""
    root, out = write_image_folder(tmp_path / "images", train=4, val=2), tmp_path / "run"
    setup = "--dataset folder --image-size 16 --epochs 3 --batch-size 4 --micro-batch 2"
    begun = train_ok(tiny(out, "--max-steps 4 --workers 0 --data-dir", root, dataset=setup))
    whole = train_ok(tiny(tmp_path / "whole", "--workers 0 --data-dir", root, dataset=setup))

    def again(*more, root=root):
        return tiny(out, "--resume", *more, "--data-dir", root, dataset=setup)

    assert "--micro-batch 2 → 4" in refusal(capsys, *again("--micro-batch 4"))
    moved = root.rename(tmp_path / "elsewhere")
    config = json.loads((out / "config.json").read_text())
    other = config | {"versions": config["versions"] | {"torch": "2.0.0"}}
    image = moved / "train/ant/ant_0.JPEG"
    for split, here in (
        ("train", "training images (12 → 13)"),
        ("val", "validation images (6 → 7)"),
    ):
        more = shutil.copy(image, moved / split / "ant/more.JPEG")
        assert f"with other {here}: give the same" in refusal(capsys, *again(root=moved))
        os.remove(more)
    image.rename(moved / "train/bee/ant_0.JPEG")
    assert "(12 → 12, other labels)" in refusal(capsys, *again(root=moved))
    (moved / "train/bee/ant_0.JPEG").rename(image)

    for state, said in (
        (
            {k: v for k, v in begun.items() if k != "optimizer"},
            "is no last state of a run: it lacks optimizer; start",
        ),
        (begun | {"model": {}}, "ckpt.pt does not fit this run: "),
    ):
        torch.save(state, out / "ckpt.pt")
        assert said in refusal(capsys, *again(root=moved))
    torch.save(begun, out / "ckpt.pt")
    (out / "config.json").write_text(json.dumps(other))
    train_ok(again("--workers 2 --max-steps 7", root=moved))
    said = capsys.readouterr().out
    assert f"written by other versions (torch 2.0.0 → {torch.__version__})" in said, said
    resumed = train_ok(again("--save-every 1", root=packed(moved)))
    for part in ("model", "optimizer", "final"):
        assert same_tensors(whole[part], resumed[part]), part


def test_max_steps_cuts_a_run_that_then_goes_on_as_if_it_had_not_stopped(tmp_path, capsys):
    whole = train_ok(tiny(tmp_path / "whole", "--sam-rho 0.1"))
    train_ok(tiny(tmp_path / "cut", "--sam-rho 0.1 --max-steps 5"))
    resumed = train_ok(tiny(tmp_path / "cut", "--sam-rho 0.1 --resume"))
    assert same_tensors(whole["model"], resumed["model"]) and resumed["step"] == 10
    settings = (tmp_path / "cut/config.json").read_bytes()
    line = refusal(capsys, *tiny(tmp_path / "cut", "--sam-rho 0.1 --resume --max-steps 9"))
    assert "ckpt.pt is of step 10, beyond --max-steps 9" in line
    assert (tmp_path / "cut/config.json").read_bytes() == settings


def test_keep_epochs_keeps_the_weights_of_these_moments(tmp_path, capsys):
    train_ok(tiny(tmp_path / "run", "--keep-epochs warmup 1 2"))  # 5 steps an epoch, warm-up 3
    for name, step in (("warmup", 3), ("epoch1", 5), ("epoch2", 10)):
        kept = train.read_checkpoint(tmp_path / f"run/{name}.pt")
        cut = train_ok(tiny(tmp_path / name, f"--max-steps {step}"))
        assert kept["step"] == step and same_tensors(kept["model"], cut["model"]), name
        assert train.is_ours(kept)
    train_ok(tiny(tmp_path / "one", "--keep-epochs warmup 1 --warmup-steps 5 --max-steps 5"))
    assert same_tensors(
        *(
            train.read_checkpoint(tmp_path / "one" / name)["model"]
            for name in ("warmup.pt", "epoch1.pt")
        )
    ), "two moments of one step"
    capsys.readouterr()
    train_ok(tiny(tmp_path / "one", "--keep-epochs warmup 1 2 --warmup-steps 5 --resume"))
    assert "of --keep-epochs" not in capsys.readouterr().out
    train_ok(tiny(tmp_path / "epoch1", "--keep-epochs 1 2 --resume"))
    assert "it has passed epoch1.pt of --keep-epochs: not written" in capsys.readouterr().out
    assert (tmp_path / "epoch1/epoch2.pt").exists()
    rounded = tiny(tmp_path / "no", "--warmup-steps 0 --warmup-epochs 0.01 --keep-epochs warmup")
    assert "this run has no warm-up" in refusal(capsys, *rounded)


def test_hold_out_trains_on_the_others_and_validates_on_the_part_unaugmented(
    tmp_path, capsys, monkeypatch
):
    seen, batches = {"train": [], "plain": []}, data.batches

    def watch(loader, tell=print):
        trains = isinstance(loader.sampler, data.TrainOrder)
        for item, pairs in zip(batches(loader, tell), loader.sampler):
            if trains or not loader.dataset.padding:
                seen["train" if trains else "plain"] += loader.dataset.indices[
                    [i for _, i in pairs]
                ].tolist()
            yield item

    monkeypatch.setattr(data, "batches", watch)
    train_ok(tiny(tmp_path / "run", "--hold-out 1/5 --augment crop --eval-every 2"))
    assert "128 training (a fraction 1/50 of 8,000) and 32 validation images, held out of the " in (
        capsys.readouterr().out
    )
    trained, (validated, sample) = (
        set(seen["train"]),
        (set(seen["plain"][:32]), set(seen["plain"][32:])),
    )
    assert len(trained) == 128 and len(validated) == len(sample) == 32 and sample <= trained
    whole = data.subset(torch.arange(8000) % 12, "1/50").tolist()
    assert sorted(trained | validated) == whole
    for fraction, words in (("2", "at most 1"), ("some", "Invalid literal"), ("1", "leaves none")):
        assert words in refusal(capsys, *tiny(tmp_path / "no", f"--hold-out {fraction}"))


@pytest.mark.parametrize(
    "own",
    [
        dict(),
        dict(
            seed=3,
            loss="sigmoid",
            head_bias=-2.0,
            decay="all",
            mean=[0.4, 0.5, 0.6],
            std=[0.2, 0.25, 0.3],
        ),
        dict(
            seed=2,
            label_smoothing=0.1,
            dropout=0.2,
            drop_path=0.5,
            mixup=0.5,
            cutmix=1.0,
            decay="no-norm-bias",
        ),
    ],
)
def test_training_equals_a_loop_written_out_by_hand(tmp_path, own):
    """SAM on each micro-batch, mean of their gradients, one clip, AdamW with decay, EMA. Logged are
    the loss at w and the gradient's norm before the clip."""
    argv = tiny(
        tmp_path / "run",
        "--sam-rho 0.2 --grad-clip 0.5 --ema-decay 0.9 --dtype float64 "
        "--weight-decay 0.3 --log-every 1",
    )
    state = train_ok([*argv, *analyze.as_flags(own)])
    knobs = {name: own[name] for name in ("dropout", "drop_path", "head_bias") if name in own}
    seed, smoothing = own.get("seed", 0), own.get("label_smoothing", 0)
    network = tiny_network(seed, **knobs).double()
    mean, std = (torch.tensor(own.get(k, [0.5])).double()[:, None, None] for k in ("mean", "std"))
    mixes = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
    mixes = [mix(alpha=own[k], num_classes=12) for k, mix in mixes.items() if k in own]
    mix = v2.RandomChoice(mixes) if mixes else lambda *xy: xy

    def loss_of(logits, y):
        if "loss" not in own:
            return F.cross_entropy(logits, y, label_smoothing=smoothing)
        of_classes = F.binary_cross_entropy_with_logits(
            logits, F.one_hot(y, 12).double(), reduction="none"
        )
        return of_classes.sum(1).mean()

    def decays(name, p):
        kind = own.get("decay", "kernels")
        if kind == "no-norm-bias":
            return "norm" not in name and not name.endswith("bias")
        return kind == "all" or p.ndim > 1 and name.endswith("weight")

    named = dict(network.named_parameters())
    ema = {k: v.detach().clone() for k, v in named.items()}
    m, v = ({k: torch.zeros_like(p) for k, p in named.items()} for _ in range(2))
    images, labels = data.shapes(range(8000))
    chosen, logged = data.subset(labels, "1/50"), []
    for step in range(10):
        clean = wrong = 0.0
        drawn = torch.Generator().manual_seed(data.key(seed, step // 5))
        batch = chosen[torch.randperm(160, generator=drawn)[32 * (step % 5) :][:32]]
        total = {k: torch.zeros_like(p) for k, p in named.items()}
        for i, micro in enumerate(batch.split(8)):
            torch.manual_seed(data.key(seed, step, i, 2))
            x, y = mix(images[micro].double() / 255, labels[micro])
            x = (x - mean) / std
            torch.manual_seed(data.key(seed, step, i))
            logits = network(x)
            loss = loss_of(logits, y)
            clean += loss.item() / 4
            largest = y.argmax(1) if mixes else y
            wrong += 100 * (logits.argmax(1) != largest).sum().item() / 32
            grads = torch.autograd.grad(loss, named.values())
            norm = torch.cat([g.flatten() for g in grads]).norm()
            moved = {
                k: (p + 0.2 * g / norm).detach().requires_grad_()
                for (k, p), g in zip(named.items(), grads)
            }
            torch.manual_seed(data.key(seed, step, i))
            loss = loss_of(torch.func.functional_call(network, moved, x), y)
            for k, g in zip(named, torch.autograd.grad(loss, moved.values())):
                total[k] += g / 4
        norm = torch.cat([g.flatten() for g in total.values()]).norm()
        logged.append((clean, wrong, norm.item()))
        clip = min(1.0, 0.5 / (norm.item() + 1e-6))
        lr = 2e-3 * min(1, step / 3) * 0.5 * (1 + math.cos(math.pi * max(step - 3, 0) / 7))
        average = min(0.9, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, p in named.items():
                g = clip * total[k]
                m[k] = 0.9 * m[k] + 0.1 * g
                v[k] = 0.999 * v[k] + 0.001 * g * g
                if decays(k, p):
                    p *= 1 - lr * 0.3
                p -= (
                    lr
                    * (m[k] / (1 - 0.9 ** (step + 1)))
                    / ((v[k] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                )
                ema[k] = average * ema[k] + (1 - average) * p
    for name, p in named.items():
        p, got = (t.detach().clone() for t in (p, state["model"][name]))
        # the keys' bias has no gradient in exact arithmetic: AdamW amplifies its noise
        if name.endswith("qkv.bias"):
            p[24:48] = got[24:48] = 0
        assert float((p - got).abs().max()) < 1e-11, (name, float((p - got).abs().max()))
        if not name.endswith("qkv.bias"):
            assert float((ema[name] - state["ema"][name]).abs().max()) < 1e-11, name
    records = [r for r in log_without_times(tmp_path / "run") if "loss" in r]
    got = torch.tensor([(r["loss"], r["error"], r["grad_norm"]) for r in records])  # in float32
    assert torch.allclose(got, torch.tensor(logged), rtol=1e-5), (got, logged)


def test_flags_of_a_training_reach_what_computes(tmp_path, received, monkeypatch, capsys):
    """What a run hands to the optimizer, SAM, the attack and the evaluations."""

    def handed(where, name, flags):
        calls = received(where, name)
        refusal(capsys, *tiny(tmp_path / str(len(list(tmp_path.iterdir()))), flags))
        monkeypatch.undo()
        return calls[-1]

    for flags, own in {
        "adamw --beta1 0.8 --beta2 0.7 --eps 1e-3": dict(betas=(0.8, 0.7), eps=1e-3),
        "lamb --beta1 0.8 --beta2 0.7 --eps 1e-3": dict(betas=(0.8, 0.7), eps=1e-3),
        "rmsprop --momentum 0.6 --beta2 0.7 --eps 1e-3": dict(alpha=0.7, momentum=0.6, eps=1e-3),
        "sgd --momentum 0.6 --nesterov": dict(momentum=0.6, nesterov=True),
        "sgd --momentum 0.6 --no-nesterov": dict(momentum=0.6, nesterov=False),
    }.items():
        args, _ = train.settings(f"--optimizer {flags} --weight-decay 0.2 --lr 0.3".split())
        optimizer = train.make_optimizer(args, nn.Linear(2, 2), torch.device("cpu"))
        found = {name: optimizer.defaults[name] for name in (*own, "lr")}
        assert found == own | dict(lr=0.3), (flags, found)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    found = handed(train, "SAM", "--sam-rho 0.1 --sam-steps 2 --sam-adaptive --sam-scope s.1.norm2")
    assert (found["rho"], found["steps"], found["adaptive"]) == (0.1, 2, True)
    assert [tuple(p.shape) for p in found["params"]] == [(24,), (24,)], "found anywhere in names"
    found = handed(train, "LookSAM", "--sam-rho 0.1 --sam-every 3 --sam-reuse 0.4")
    assert found["alpha"] == 0.4
    for flags, step in (("", 1.25 * 2 / 255), ("--adv-step-size 0.5/255", 0.5 / 255)):
        found = handed(adversarial, "ascend", f"--adv-eps 2/255 {flags}")
        assert found["eps"] == 2 / 255 and found["step_size"] == pytest.approx(step)
    for flags, eps in (("", 2 / 255), ("--adv-eps 1/255", 1 / 255)):
        assert handed(train, "pgd_10", f"--eval-adv --max-steps 1 {flags}")["eps"] == eps
    found = handed(data, "TrainOrder", "--repeated-augment 2 --seed 3 --micro-batch 16")
    assert (found["repeats"], found["seed"], found["micro_batch"]) == (2, 3, 16)


def test_flags_of_images_reach_the_data_set(tmp_path, capsys):
    def seen(flags, many=1):
        """What data.load was asked for, of the training images and, if many is 2, the others."""
        with pytest.MonkeyPatch.context() as patch:
            calls, load = [], data.load

            def listen(name, split, **how):
                calls.append(how)
                if len(calls) == many:
                    raise data.DataError("reached")
                return load(name, split, **how)

            patch.setattr(data, "load", listen)
            argv = tiny(tmp_path / "run", flags, dataset=folder)
            assert "reached" in refusal(capsys, *argv)
        return calls[-1]

    write_image_folder(tmp_path, train=3, val=2)
    folder = f"--dataset folder --data-dir {tmp_path} --image-size 32 --batch-size 8 "
    folder += "--micro-batch 8 --epochs 1"
    plain = seen("")
    assert plain["flip"] and plain["autoaugment"] == "none" and plain["erasing"] == 0
    plain = "--augment crop --no-flip --autoaugment imagenet"
    how = seen(f"{plain} --erasing 0.3 --seed 5 --eval-short-side 40")
    assert (how["augment"], how["flip"], how["autoaugment"]) == ("crop", False, "imagenet")
    assert (how["erasing"], how["seed"], how["short_side"]) == (0.3, 5, 40)
    flags = "--augment crop --randaugment 3 7 --randaugment-of google --randaugment-prob 0.4"
    how = seen(flags)
    assert (how["randaugment"], how["randaugment_prob"]) == ([3, 7], 0.4)
    assert how["randaugment_of"] == "google"
    how = seen(f"{flags} --eval-short-side 40", many=2)
    assert how["short_side"] == 40
    assert list(how["classes"]) == sorted(path.name for path in (tmp_path / "train").iterdir())
    assert not how.keys() & {"augment", "randaugment", "flip"}, "of validation images"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_is_of_the_dtype_that_was_asked_for(dtype):
    args, _ = train.settings(["--dtype", dtype, "--device", "cpu"])
    with train.autocast_of(args, torch.device("cpu")):
        assert nn.Linear(2, 2)(torch.rand(1, 2)).dtype == getattr(torch, dtype)


def test_which_steps_have_sam_does_not_depend_on_where_a_run_was_stopped(tmp_path):
    """Every third from the first; and the direction that LookSAM reuses is kept between."""
    flags = "--sam-rho 0.2 --sam-every 3 --micro-batch 32 --dtype float64"
    perturbed, moments = [], []

    with pytest.MonkeyPatch.context() as patch:
        perturb, update = SAM.perturb, train.update
        patch.setattr(
            train.SAM,
            "perturb",
            lambda *args, **more: perturbed.append(len(moments)) or perturb(*args, **more),
        )
        patch.setattr(
            train, "update", lambda *args, **more: moments.append(1) or update(*args, **more)
        )
        whole = train_ok(tiny(tmp_path / "whole", flags))
        assert perturbed == [0, 3, 6, 9]
        train_ok(tiny(tmp_path / "again", flags, "--max-steps 4"))
        perturbed.clear()
        again = train_ok(tiny(tmp_path / "again", flags, "--max-steps 10 --resume"))
    assert [at - 14 for at in perturbed] == [2, 5], "steps 6 and 9, after 4"
    assert same_tensors(again["model"], whole["model"])


def test_batchnorm_counts_sams_first_pass_alone_and_the_average_has_its_statistics(tmp_path):
    """After one step, from the same weights, they are plain training's."""
    flags = "--stem conv --max-steps 1 --dtype float64 --ema-decay 0.9 --warmup-steps 0 --init timm"
    plain, sam = (
        train_ok(tiny(tmp_path / str(rho), flags, f"--sam-rho {rho}")) for rho in (0, 0.5)
    )
    names = [name for name in plain["model"] if name.endswith(("running_mean", "running_var"))]
    assert len(names) >= 4
    for name in names:
        start, now = torch.full_like(plain["model"][name], name.endswith("var")), sam["model"][name]
        assert torch.equal(now, plain["model"][name]) and not torch.equal(now, start)
        assert torch.allclose(sam["ema"][name], 0.1 * start + 0.9 * now)  # (1 + 0) / (10 + 0)
    weight = "patch_embed.proj.weight"
    assert not torch.equal(sam["model"][weight], plain["model"][weight])


def test_a_gradient_is_clipped_after_the_loss_scale_is_taken_out():
    scaler, weight = torch.amp.GradScaler("cpu", init_scale=1024.0), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 1.0)
    scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
    norm, skip = train.update(
        optimizer, scaler, [weight], 2.5, train.RunningStatistics(nn.Flatten()), 1
    )
    assert norm.item() == 5 and skip == 0
    assert torch.allclose(weight.detach(), torch.tensor([-1.5, -2.0]))


def test_a_run_without_epochs_has_the_schedule_of_its_steps(tmp_path):
    train_ok(tiny(tmp_path / "run", "--epochs 0 --max-steps 6 --log-every 1"))
    rates = [r["lr"] for r in log_without_times(tmp_path / "run") if "lr" in r]
    cosine = [0.5 * (1 + math.cos(math.pi * done / 3)) for done in (0, 1, 2)]
    expected = [2e-3 * x for x in (0, 1 / 3, 2 / 3, *cosine)]
    assert rates == pytest.approx(expected)


def test_a_resumed_run_remembers_its_best_accuracy(tmp_path):
    argv = tiny(tmp_path / "run")
    train_ok([*argv, "--max-steps", "5"])
    path = tmp_path / "run/ckpt.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | dict(best=99.0), path)
    before = (tmp_path / "run/best.pt").read_bytes()
    assert train_ok([*argv, "--resume"])["best"] == 99.0
    assert (tmp_path / "run/best.pt").read_bytes() == before


def test_a_run_that_augments_and_mixes_ends_with_rows_of_images_so_made(tmp_path, monkeypatch):
    measured, measure = {}, train.measure

    def listen(what, dataset, *args, **more):
        measured[what] = dataset.padding, more.get("mix") is not None
        return measure(what, dataset, *args, **more)

    monkeypatch.setattr(train, "measure", listen)
    final = train_ok(tiny(tmp_path / "run", "--augment crop --mixup 0.5 --max-steps 1"))["final"]
    assert final.keys() == measured.keys()
    assert measured == {
        "validation": (0, False),
        "training": (0, False),
        "training, augmented": (4, False),
        "training, mixed": (4, True),
    }


def test_the_shipped_splits_of_shapes_have_no_image_in_common_and_others_the_published_sizes():
    ranges = sorted((first, first + count) for first, count in SHIPPED_SPLITS.values())
    assert SHIPPED_SPLITS.keys() == {"train", "val", "test"}
    assert all(end <= first for (_, end), (first, _) in itertools.pairwise(ranges))
    published = dict(imagenet=1_281_167, cifar10=50_000, cifar100=50_000)
    published |= dict(flowers102=2_040, pets=3_680, shapes=8_000)
    assert {name: train.TRAINING_IMAGES[name] for name in published} == published


@pytest.mark.parametrize("micro_batch", [4, 16])
@pytest.mark.parametrize("rho, steps", [(0, 1), (0.2, 1), (0.2, 2)])
def test_contrastive_training_equals_a_loop_over_the_whole_batch_by_hand(
    tmp_path, small_shapes, rho, steps, micro_batch
):
    """Two steps of SGD with the gradient of one loss over all projections, at once and by autograd:
    of the micro-batches only the masks are their own. ε too is the whole batch's."""
    state = train_ok(
        tiny(
            tmp_path / "run",
            f"--loss supcon --augment crop --sam-rho {rho} --sam-steps {steps} "
            f"--dtype float64 --max-steps 2 --batch-size 16 --micro-batch {micro_batch} "
            "--train-fraction 1 --optimizer sgd --lr 0.1 --momentum 0 --weight-decay 0 "
            "--warmup-steps 0 --lr-schedule constant --projection-dim 7 --dropout 0.3",
        )
    )
    network = tiny_network(dropout=0.3)
    first, second = nn.Linear(24, 24).double(), nn.Linear(24, 7, bias=False).double()
    network = network.double()
    params = [p for n, p in network.named_parameters() if not n.startswith("head")]
    params += [*first.parameters(), second.weight]
    dataset = data.InMemory(*data.shapes(range(160)), [], padding=4)
    micros = [
        dataset[pairs][:2] for pairs in data.TrainOrder(160, 16, micro_batch, 0, 0, 2, views=2)
    ]
    for x, y in micros:
        (x, other), (y, again) = (t.chunk(2) for t in (x, y))
        assert len(x) == micro_batch and torch.equal(y, again) and not torch.equal(x, other)
    for step in range(2):
        m = len(micros) // 2
        of_step = micros[step * m :][:m]

        def loss():
            projections = []
            for number, (x, y) in enumerate(of_step):
                out = {"pre_logits": None}
                torch.manual_seed(data.key(0, step, number))
                network((x.double() / 255 - 0.5) / 0.5, out=out)
                z = second(F.relu(first(F.normalize(out["pre_logits"]))))
                projections.append(F.normalize(z))
            labels = torch.cat([y for _, y in of_step]).tolist()
            return supcon_by_hand(torch.cat(projections), labels, 0.1)

        with torch.no_grad():
            start = [p.clone() for p in params]
            for _ in range(steps if rho else 0):
                with torch.enable_grad():
                    grads = torch.autograd.grad(loss(), params)
                norm = torch.cat([g.flatten() for g in grads]).norm()
                for p, g in zip(params, grads):
                    p += rho / steps * g / norm
            with torch.enable_grad():
                grads = torch.autograd.grad(loss(), params)
            for p, s, g in zip(params, start, grads):
                p.copy_(s - 0.1 * g)
    state["model"] |= {
        "0.weight": state["projection"]["0.weight"],
        "0.bias": state["projection"]["0.bias"],
        "2.weight": state["projection"]["2.weight"],
    }
    names = [n for n, _ in network.named_parameters() if not n.startswith("head")]
    for name, p in zip([*names, "0.weight", "0.bias", "2.weight"], params, strict=True):
        difference = float((p.detach() - state["model"][name]).abs().max())
        assert difference < 1e-12, (name, difference)


def test_what_a_contrastive_run_saves_has_the_class_means_of_its_own_weights(
    tmp_path, monkeypatch, small_shapes
):
    flags = "--loss supcon --augment crop --train-fraction 1 --ema-decay 0.5 --save-every 2"
    flags += " --dtype float64"
    saved, save = [], train.RunFolder.save

    def kept(self, name, state):
        saved.append((name, copy.deepcopy(state["ema"]), copy.deepcopy(state["model"])))
        save(self, name, state)

    monkeypatch.setattr(train.RunFolder, "save", kept)
    train_ok(tiny(tmp_path / "run", flags, "--keep-epochs warmup 1 --eval-every 2"))
    assert {"warmup.pt", "epoch1.pt", "best.pt", "ckpt.pt"} == {name for name, *_ in saved}
    sample = data.subset(torch.arange(160) % 12, Fraction(60, 160))
    images, labels = data.shapes(sample.numpy())
    model = tiny_network().double()
    for name, *networks in saved:
        for weights in networks:
            model.load_state_dict(weights)
            out = {"pre_logits": None}
            model.eval()((images.double() / 255 - 0.5) / 0.5, out=out)
            z = F.normalize(out["pre_logits"])
            means = torch.stack([F.normalize(z[labels == c].mean(0), dim=0) for c in range(12)])
            cosines = F.cosine_similarity(weights["head.weight"], means)
            assert 1 - cosines.min() < 1e-9, (name, cosines)


def test_a_contrastive_run_is_evaluated_by_the_nearest_class_mean(tmp_path, capsys, small_shapes):
    out = tmp_path / "run"
    flags = (
        "--loss supcon --augment crop --ema-decay 0.5 --unit-norm --dtype float64 "
        "--train-fraction 1"
    )
    state = train_ok(tiny(out, flags))
    assert "validation, nearest class mean: top-1" in capsys.readouterr().out
    network = tiny_network().double()
    images, labels = data.shapes(range(160))
    chosen = data.subset(labels, 60 / 160)  # as many as there are to validate on
    validation = data.shapes(range(2**30, 2**30 + 60))

    def directions(x):
        values = {"pre_logits": None}
        with torch.no_grad():
            network((x.double() / 255 - 0.5) / 0.5, out=values)
        return F.normalize(values["pre_logits"])

    for part in ("model", "ema"):
        network.load_state_dict(state[part])
        z = directions(images[chosen])
        means = torch.stack([F.normalize(z[labels[chosen] == c].sum(0), dim=0) for c in range(12)])
        cosine = directions(validation[0]) @ means.T
        assert (state[part]["head.weight"] - means / 0.1).abs().max() < 1e-12
    top1 = 100 * float((cosine.argmax(1) == validation[1]).double().mean())
    nll = float(F.cross_entropy(cosine / 0.1, validation[1]))
    got = state["final"]["validation"]
    assert abs(got["top1"] - top1) < 1e-9 and abs(got["nll"] - nll) < 1e-9, (got, top1, nll)
    best = max(r["val"]["top1"] for r in log_without_times(out) if "val" in r)
    assert torch.load(out / "best.pt", weights_only=True)["val"]["top1"] == best
    capsys.readouterr()
    assert train.main(["--eval-only", "--init-from", str(out / "ckpt.pt"), "--device", "cpu"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [row[2] for row in rows if row[:1] == ["val"]]
    assert shown[-1:] == [f"{top1:.2f}"], "a checkpoint has this classifier"
    file = tmp_path / "squeezenet.pt"
    torch.save(train.build_model("torchvision:squeezenet1_0", 12, 32).state_dict(), file)
    for argv, words in [
        ("regnety_1gf --loss supcon --augment crop", "does not tell its representation, pre_l"),
        (
            f"torchvision:squeezenet1_0 --train-only head --init-from {file}",
            "torchvision:squeezenet1_0 has no linear classifier",
        ),
    ]:
        assert words in refusal(capsys, "--dataset", "shapes", "--model", *argv.split())


def test_the_head_alone_is_trained_on_the_frozen_network_by_rmsprop(tmp_path, small_shapes):
    """As torch's RMSprop on the representation of --init-from in evaluation mode; all else, running
    statistics too, stays bit for bit, and a cut run goes on."""
    stage1 = train_ok(
        tiny(
            tmp_path / "1",
            "--loss supcon --augment crop --stem conv --unit-norm --max-steps 3 --train-fraction 1",
        )
    )
    flags = (
        f"--init-from {tmp_path / '1/ckpt.pt'} --reset-head --train-only head --dropout 0.5 "
        "--drop-path 0.5 --stem conv --unit-norm --optimizer rmsprop --lr 0.05 --beta2 0.9 "
        "--eps 1 --momentum 0.9 --weight-decay 1e-3 --lr-schedule exponential --lr-end 1e-3 "
        "--warmup-steps 0 --dtype float64 --sam-rho 0 --train-fraction 1"
    )
    state = train_ok(tiny(tmp_path / "2", flags))
    same = {k: v for k, v in state["model"].items() if not k.startswith("head.")}
    assert same_tensors(same, {k: stage1["model"][k].to(v.dtype) for k, v in same.items()})
    assert state["projection"] is None and state["optimizer"]["state"].keys() == {0, 1}
    network = (
        vit.build(
            "vit_micro8",
            num_classes=12,
            image_size=32,
            dim=24,
            depth=2,
            heads=2,
            mlp_dim=48,
            stem="conv",
            unit_norm=True,
        )
        .double()
        .eval()
    )
    network.load_state_dict(stage1["model"])
    network.requires_grad_(False)
    head = nn.Linear(24, 12).double()
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.RMSprop(
        [dict(params=[head.weight], weight_decay=1e-3), dict(params=[head.bias])],
        lr=0.05,
        alpha=0.9,
        eps=1.0,
        momentum=0.9,
    )
    images, labels = data.shapes(range(160))
    for step, pairs in enumerate(data.TrainOrder(160, 32, 32, 0, 0, 10)):
        where = [i for _, i in pairs]
        out = {"pre_logits": None}
        network((images[where].double() / 255 - 0.5) / 0.5, out=out)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.02 ** (step / 10)
        optimizer.zero_grad()
        F.cross_entropy(head(out["pre_logits"]), labels[where]).backward()
        optimizer.step()
    assert (head.weight - state["model"]["head.weight"]).abs().max() < 1e-12
    assert head.weight.abs().max() > 1e-3
    train_ok(tiny(tmp_path / "cut", flags, "--max-steps 5"))
    resumed = train_ok(tiny(tmp_path / "cut", flags, "--resume"))
    assert same_tensors(state["model"], resumed["model"])


@pytest.mark.parametrize("rho", [0, 0.2])
def test_adversarial_training_equals_equation_5_by_hand(tmp_path, monkeypatch, rho):
    """FGSM from a random start, ε and δ from the one pass at (w, start): two forward and two
    backward passes for each micro-batch, with and without SAM. SGD, no momentum."""
    passes, forward = [], vit.ViT.forward

    def noted(model, x):
        if model.training and not x.is_meta:
            passes.append("forward")
        return forward(model, x)

    monkeypatch.setattr(vit.ViT, "forward", noted)
    for name in ("backward", "grad"):
        function = getattr(torch.autograd, name)
        monkeypatch.setattr(
            torch.autograd,
            name,
            lambda *args, f=function, **more: passes.append("backward") or f(*args, **more),
        )
    eps, lr = 4 / 255, 0.5
    state = train_ok(
        tiny(
            tmp_path / "run",
            f"--sam-rho {rho} --adv-eps 4/255 --dtype float64 "
            "--optimizer sgd --momentum 0 --weight-decay 0 --lr-schedule constant "
            f"--lr {lr} --warmup-steps 0 --max-steps 3",
        )
    )
    assert passes == ["forward", "backward"] * (2 * 4 * 3)
    monkeypatch.undo()
    network = tiny_network().double()
    named = dict(network.named_parameters())
    images, labels = data.shapes(range(8000))
    chosen = data.subset(labels, "1/50")
    order = torch.randperm(160, generator=torch.Generator().manual_seed(data.key(0, 0)))

    def loss(weights, x, y):
        return F.cross_entropy(torch.func.functional_call(network, weights, (x - 0.5) / 0.5), y)

    for step in range(3):
        total = {k: torch.zeros_like(p) for k, p in named.items()}
        for i, micro in enumerate(chosen[order[32 * step :][:32]].split(8)):
            x, y = images[micro].double() / 255, labels[micro]
            torch.manual_seed(data.key(0, step, i, 2))
            noise = eps * (2 * torch.rand(x.shape, dtype=torch.float64) - 1)
            start = (x + noise).clamp(0, 1).requires_grad_()
            *grads, of_image = torch.autograd.grad(loss(named, start, y), [*named.values(), start])
            norm = torch.cat([g.flatten() for g in grads]).norm()
            moved = {
                k: (p + rho * g / norm).detach().requires_grad_()
                for (k, p), g in zip(named.items(), grads)
            }
            delta = (start.detach() + 1.25 * eps * of_image.sign() - x).clamp(-eps, eps)
            worst = loss(moved, (x + delta).clamp(0, 1), y)
            for k, g in zip(named, torch.autograd.grad(worst, moved.values())):
                total[k] += g / 4
        with torch.no_grad():
            for k, p in named.items():
                p -= lr * total[k]
    for k, p in named.items():
        difference = float((p.detach() - state["model"][k]).abs().max())
        assert difference < 1e-12, (k, difference)


def test_accuracy_under_attack_is_measured_in_training_and_evaluation(
    tmp_path, capsys, short_shapes
):
    argv = tiny(tmp_path / "run", "--max-steps 5 --lr 0.01 --eval-adv --adv-eps 8/255")
    state = train_ok(argv)
    text = capsys.readouterr().out
    assert "images moved by at most 8/255" in text and "--adv-eps 8/255" in text
    assert "PGD-10 %" in text and re.search(r"validation: top-1 .*, PGD-10 \d+\.\d\d %", text)
    model = train.assemble(tiny_network(), [0.5], [0.5])
    model.network.load_state_dict(state["model"])
    x, y = data.shapes(range(2**30, 2**30 + 60))
    x = x.float() / 255
    start = adversarial.keyed_start(x, range(60), 8 / 255, "linf", 0)
    trace = []
    adversarial.pgd(model.eval(), x, y, 8 / 255, 1 / 255, 10, start=start, trace=trace)
    with torch.no_grad():
        robust = torch.stack([model(x).argmax(1) == y] + [p == y for _, p in trace]).all(0)
    want, clean = 100 * robust.double().mean().item(), state["final"]["validation"]["top1"]
    assert state["final"]["validation"]["pgd"] == pytest.approx(want) and 0 < want < clean
    records = log_without_times(tmp_path / "run")
    assert [r["val"]["pgd"] for r in records if "val" in r] == [pytest.approx(want)]
    assert (
        train.main(
            [
                "--eval-only",
                "--eval-adv",
                "--init-from",
                str(tmp_path / "run/ckpt.pt"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("val "))
    assert float(row.split()[-1]) == pytest.approx(want, abs=0.006)


def test_weights_are_taken_from_checkpoints_of_ours_and_others_and_refused_in_one_line(
    tmp_path, capsys
):
    out = tmp_path / "run"
    state = train_ok(tiny(out, "--ema-decay 0.5"))
    capsys.readouterr()
    evaluation = ["--eval-only", "--init-from", str(out / "ckpt.pt"), "--device", "cpu"]
    assert train.main(evaluation) == 0
    evaluated = capsys.readouterr().out
    assert f"{state['final']['validation']['top1']:.2f}" in evaluated.splitlines()[-1], (
        evaluated,
        state["final"],
    )

    begun = f"--ema-decay 0.9 --init-from {out / 'ckpt.pt'} --weights model --max-steps 1"
    train_ok(tiny(tmp_path / "begun", begun))  # with the others' last, to be judged by its average
    own = [*evaluation[:2], str(tmp_path / "begun/ckpt.pt"), *evaluation[3:]]
    assert train.settings(own)[0].weights == "ema"

    network = tiny_network()
    train.load_weights(network, out / "ckpt.pt")
    assert same_tensors(network.state_dict(), state["ema"])
    assert train.load_weights(network, out / "ckpt.pt", "model") == ([0.5], [0.5])
    assert same_tensors(network.state_dict(), state["model"])
    loader = data.evaluation_loader(data.load("shapes", "test", image_size=32), 256)
    want = train.evaluate(train.assemble(network, [0.5], [0.5]), loader, torch.device("cpu"))
    assert train.main([*evaluation, "--weights", "model", "--eval-split", "test"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:2] == ["test", "10,000"] and row[4] == f"{want['nll']:.4f}", (row, want)

    # what has some keys of ours only is read as another's, not by halves
    for wrong in (dict(settings=None, model={}, ema=None), dict(settings={}, model=5, ema=None)):
        torch.save(wrong, tmp_path / "wrong.pt")
        assert "does not fit this network, nothing was loaded" in refusal(
            capsys,
            *TINY,
            "--dataset",
            "shapes",
            "--init-from",
            tmp_path / "wrong.pt",
            "--eval-only",
            "--mean",
            "0.5",
            "--std",
            "0.5",
        )

    # a bare state dict does not say how inputs were normalised
    torch.save(state["model"], tmp_path / "foreign.pth")
    foreign = tiny(tmp_path / "from", "--init-from", tmp_path / "foreign.pth")
    assert "give --mean and --std" in refusal(capsys, *foreign)
    train_ok([*foreign, "--mean", "0.5", "--std", "0.5", "--lr", "0"])
    half = ["--mean", "0.5", "--std", "0.5"]
    line = refusal(capsys, *foreign, *half, "--depth", "3", "--no-qkv-bias", "--mlp-dim", "8")
    for words in (
        "does not fit this network, nothing was loaded; it lacks: ",
        "blocks.2.attn.proj.bias, blocks.2.attn.proj.weight, blocks.2.attn.qkv.weight … "
        "(11 in all)",
        "it has besides: blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias (2 in all)",
        "of another shape: blocks.0.mlp.fc1.weight (48, 24), here (8, 24), "
        "blocks.0.mlp.fc1.bias (48,), here (8,), ",
        "… (6 in all)",
    ):
        assert words in line, (words, line)
    three = [
        *"--dataset folder --data-dir".split(),
        write_image_folder(tmp_path / "three", train=12),
        *TINY,
        *"--image-size 32 --init-from".split(),
        tmp_path / "foreign.pth",
        *half,
    ]
    line = refusal(capsys, "--eval-only", *three)
    assert (
        "of another shape: head.weight (12, 24), here (3, 24), head.bias (12,), here (3,) (2 in"
        " all); --reset-head starts with a new classifier"
    ) in line, line
    state_3 = train_ok(
        list(
            map(
                str,
                [
                    *three,
                    *"--reset-head --lr 0 --batch-size 8 --micro-batch 8 --epochs 1".split(),
                    *"--workers 0 --out-dir".split(),
                    tmp_path / "reset",
                ],
            )
        )
    )
    assert state_3["model"]["head.weight"].shape == (3, 24)
    assert same_tensors(
        {**state_3["model"], "head.weight": 0, "head.bias": 0},
        {**state["model"], "head.weight": 0, "head.bias": 0},
    )
    larger = tiny(
        tmp_path / "larger", "--image-size 48 --init-from", out / "ckpt.pt", "--max-steps 1"
    )
    capsys.readouterr()
    train_ok(larger)
    assert "positions resized to 6×6" in capsys.readouterr().out

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(os.system))
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("evil.pt", "text.pt", "list.pt"):
        line = refusal(capsys, *tiny(tmp_path / "x", "--init-from", tmp_path / name))
        assert name in line and ("no checkpoint" in line or "holds a list" in line), line


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "rmsprop"])
def test_a_step_whose_gradient_is_not_finite_leaves_no_trace_but_its_count(
    tmp_path, capsys, monkeypatch, optimizer
):
    """The third micro-batch of all, so in the first step, when SGD has no momentum yet."""
    calls, good = [], train.softmax_loss

    def sometimes_nan(logits, y, smoothing=0.0):
        calls.append(1)
        return good(logits, y, smoothing) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(train, "softmax_loss", sometimes_nan)
    flags = f"--optimizer {optimizer} --lr 0.01 --warmup-steps 0 --stem conv"
    state = train_ok(tiny(tmp_path / "once", flags))
    skipped = [r["skipped"] for r in log_without_times(tmp_path / "once") if "loss" in r]
    assert skipped == [1, 0, 0]
    assert "1 steps skipped" in capsys.readouterr().out
    assert all(v.isfinite().all() for v in state["model"].values())
    assert state["model"]["patch_embed.stem.0.bn.num_batches_tracked"] == 9
    moments = state["optimizer"]["state"].values()
    assert all(v.isfinite().all() and v.abs().max() < 100 for s in moments for v in s.values())
    if optimizer == "adamw":
        assert {float(s["step"]) for s in moments} == {9.0}
    if optimizer == "lamb":
        assert [group["step"] for group in state["optimizer"]["param_groups"]] == [9, 9]
    calls.clear()
    first = train_ok(tiny(tmp_path / "first", flags, "--max-steps 1"))
    untouched = tiny_network(stem="conv")
    assert same_tensors(first["model"], untouched.state_dict())
    best = train.read_checkpoint(tmp_path / "first/best.pt")
    assert best["val"] == first["final"]["validation"] and first["best"] == best["val"]["top1"]
    monkeypatch.setattr(
        train, "softmax_loss", lambda logits, y, smoothing=0.0: good(logits, y) * math.nan
    )
    monkeypatch.setattr(train, "MOST_SKIPPED", 8)
    line = refusal(capsys, *tiny(tmp_path / "always", flags))
    assert (
        "the last 8 gradients were not finite: stopped at step 8, learning rate " in line
        and "nothing was saved before" in line
    ), line
    log = log_without_times(tmp_path / "always")
    assert [r["loss"] for r in log if "loss" in r] == [None] * 2 and log[-1]["diverged"]
    assert not {*(tmp_path / "always").glob("*.pt")}, "best.pt would want a ckpt.pt to resume"
    again = refusal(capsys, *tiny(tmp_path / "always", flags, "--resume"))
    assert "stopped at step 8" in again, again


@pytest.mark.parametrize("overflowing", [2, 3], ids=["the second pass", "the first pass"])
def test_an_overflow_of_float16_in_either_pass_of_sam_skips_the_step(
    tmp_path, monkeypatch, overflowing
):
    """Calls of the loss: the first micro-batch at w and at w + ε, then the second likewise."""
    calls, good = [], train.softmax_loss

    def sometimes_huge(logits, y, smoothing=0.0):
        calls.append(1)
        return good(logits, y, smoothing) * (1e36 if len(calls) == overflowing else 1)

    flags = "--dtype float16 --sam-rho 0.1 --micro-batch 16 --warmup-steps 0 --max-steps"
    once = train_ok(tiny(tmp_path / "once", flags, 1))
    monkeypatch.setattr(train, "softmax_loss", sometimes_huge)
    state = train_ok(tiny(tmp_path / "run", flags, 1))
    assert state["scaler"]["scale"] == once["scaler"]["scale"] / 2
    start = tiny_network()
    assert same_tensors(state["model"], start.state_dict())
    assert not same_tensors(state["model"], once["model"])
    assert log_without_times(tmp_path / "run")[0]["skipped"] == 1


def test_a_run_that_diverges_keeps_its_last_good_checkpoint_and_says_which(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train, "MOST_SKIPPED", 4)
    flags = "--optimizer sgd --lr 1e18 --warmup-steps 8 --save-every 1 --epochs 10 --log-every 2"
    line = refusal(capsys, *tiny(tmp_path / "run", flags))
    found = re.search(
        r"the last (\d+) gradients were not finite: stopped at step (\d+), learning "
        r"rate \S+e\+\d+; \S+/ckpt.pt is of step (\d+), with finite gradients",
        line,
    )
    assert found, line
    in_a_row, stopped, saved = map(int, found.groups())
    state = train.read_checkpoint(tmp_path / "run/ckpt.pt")
    assert state["step"] == saved == stopped - in_a_row > 0
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_narrow_resnets_on_the_cpu_keep_out_of_a_layout_that_corrupts_memory(tmp_path, capsys):
    """oneDNN writes past its memory in the gradient of a strided 1×1 convolution of few channels
    with channels last: here it crashed, or hung."""
    narrow, wide = (train.build_model("resnet18", 12, 32, width=width) for width in (8, 16))
    assert train.too_narrow_for_channels_last(narrow)
    assert not train.too_narrow_for_channels_last(wide)
    assert not train.too_narrow_for_channels_last(train.build_model("vit_micro8", 12, 32))
    argv = (
        "--model resnet18 --width 4 --dataset shapes --train-fraction 1/50 --batch-size 32 "
        "--micro-batch 16 --max-steps 2 --warmup-steps 1 --device cpu --out-dir"
    ).split()
    train_ok([*argv, str(tmp_path / "run")])
    assert "fewer than 16 channels" in refusal(capsys, *argv, tmp_path / "no", "--channels-last")


def test_gradients_of_zero_change_nothing_and_stop_nothing(tmp_path, monkeypatch):
    good = train.softmax_loss
    monkeypatch.setattr(train, "softmax_loss", lambda *args: 0 * good(*args))
    attacked = "--adv-eps 2/255 --sam-reuse 0"
    for optimizer, more in dict(adamw="", sgd=attacked, lamb=attacked, rmsprop="").items():
        state = train_ok(
            tiny(
                tmp_path / optimizer,
                f"--optimizer {optimizer} --sam-rho 0.1 --sam-every 2 {more} "
                "--sam-adaptive --grad-clip 1 --weight-decay 0 --max-steps 4",
            )
        )
        start = tiny_network()
        assert same_tensors(state["model"], start.state_dict()), optimizer
        assert log_without_times(tmp_path / optimizer)[0]["grad_norm"] == 0


def test_a_network_of_torchvisions_that_images_do_not_fit_is_told_without_training(
    tmp_path, capsys
):
    name, file = "torchvision:squeezenet1_1", str(tmp_path / "weights.pth")
    torch.save(train.build_model(name, 12).state_dict(), file)
    common = ["--dataset", "shapes", "--image-size", "16", "--model", name, "--init-from", file]
    for argv in (["--eval-only"], ["--train-only", "head", "--dry-run"]):
        line = refusal(capsys, *common, *argv, "--device", "cpu")
        assert f"{name}: Given input size" in line and "too small" in line, line


@pytest.mark.parametrize("what", ["one class", "one image"])
def test_one_class_and_one_image_train(tmp_path, capsys, what):
    n = 4 if what == "one class" else 1
    root = write_image_folder(tmp_path / "images", train=n, val=n, classes=["ant"])
    state = train_ok(
        tiny(
            tmp_path / "run",
            f"--data-dir {root} --batch-size {n} --sam-rho 0.1",
            dataset="--dataset "
            f"folder --image-size 16 --workers 0 --epochs 2 --micro-batch {n} --augment inception",
        )
    )
    assert state["final"]["validation"]["top1"] == 100
    assert state["final"]["validation"]["images"] == n and state["step"] == 2
    line = attack_refusal(capsys, "--checkpoint", tmp_path / "run/ckpt.pt", "--targeted")
    assert line.endswith("has one class, there is no other\n"), line


@pytest.mark.parametrize("model", ["resnet18 --width 8 --stem imagenet", "torchvision:resnet18"])
def test_batchnorm_of_one_number_is_told_before_the_first_step(tmp_path, capsys, model):
    line = refusal(
        capsys,
        *(
            f"--dataset shapes --train-fraction 1/50 --device cpu --batch-size 1 "
            f"--micro-batch 1 --out-dir {tmp_path}/run --model {model}"
        ).split(),
    )
    assert "--micro-batch 1: Expected more than 1 value per channel" in line, line
    assert not (tmp_path / "run").exists()


def test_evaluation_of_a_network_that_gives_nan_says_so():
    dataset = data.InMemory(torch.zeros(9, 3, 2, 2, dtype=torch.uint8), torch.zeros(9).long(), [0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    nn.init.constant_(model[1].bias, math.nan)
    result = train.evaluate(model, data.evaluation_loader(dataset, 4), torch.device("cpu"))
    assert math.isnan(result["nll"]) and result["images"] == 9


@pytest.mark.parametrize(
    "flags",
    [
        "--dtype bfloat16 --sam-rho 0.1",
        "--dtype float16 --sam-rho 0.1 --adv-eps 2/255",
        "--optimizer sgd --lr 0.2 --nesterov --decay all --lr-schedule linear --lr-end 1e-5",
        "--sam-rho 0.5 --sam-adaptive --sam-steps 2 --pool gap --kernel-size 3 --gelu exact",
        "--stem conv --loss sigmoid --head-bias -2.5 --mixup 0.5 --label-smoothing 0.1 "
        "--dropout 0.1",
        "--randaugment 2 9 --randaugment-prob 0.5 --erasing 0.25 --mixup 1 --cutmix 0.8 "
        "--warmup-epochs 1",
        "--loss supcon --optimizer lamb --dtype bfloat16 --sam-rho 0.05 "
        "--dropout 0.1 --autoaugment imagenet",
    ],
)
def test_other_settings_train(tmp_path, flags):
    """The loss falls, and a run cut by --max-steps goes on bit for bit."""
    root = write_image_folder(tmp_path / "images", train=32, val=8)  # classes differ in colour
    flags = (
        f"--epochs 6 --batch-size 16 --micro-batch 8 --lr 5e-3 --data-dir {root} "
        f"--image-size 16 --workers 0 --warmup-steps 5 --ema-decay 0.9 --eval-every 5 {flags}"
    )
    setup = "--dataset folder --log-every 5"
    whole = train_ok(tiny(tmp_path / "whole", flags, dataset=setup))
    losses = [r["loss"] for r in log_without_times(tmp_path / "whole") if "loss" in r]
    assert losses[-1] < losses[0] - 0.05, losses
    train_ok(tiny(tmp_path / "cut", flags, "--max-steps 15", dataset=setup))
    resumed = train_ok(tiny(tmp_path / "cut", flags, "--resume", dataset=setup))
    for part in ("model", "ema", "projection", "optimizer", "scaler", "step"):
        assert same_tensors(whole[part], resumed[part]), part
    assert log_without_times(tmp_path / "whole")[-3:] == log_without_times(tmp_path / "cut")[-3:]


def test_a_run_from_a_packed_file_is_the_run_from_its_folder_bit_for_bit(tmp_path):
    root = write_image_folder(tmp_path / "images", train=8, val=3)
    out = packed(root)
    flags = (
        "--batch-size 8 --micro-batch 4 --epochs 3 --image-size 16 --workers 1 "
        "--train-fraction 3/4 --warmup-steps 2 --data-dir"
    )
    setup = "--dataset folder --log-every 1"
    whole = train_ok(tiny(tmp_path / "whole", flags, root, dataset=setup))
    train_ok(tiny(tmp_path / "pack", flags, out, "--max-steps 4", dataset=setup))
    resumed = train_ok(tiny(tmp_path / "pack", flags, out, "--resume", dataset=setup))
    for part in ("model", "optimizer", "step", "best", "final", "classes"):
        assert same_tensors(whole[part], resumed[part]), part
    logs = [
        [r for r in log_without_times(tmp_path / run) if "loss" in r] for run in ("whole", "pack")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 6


FAMILIES = {  # a small network of each
    "vit": "vit_micro8 --dim 24 --depth 2 --heads 2 --mlp-dim 48",
    "vit with convolutional stem": "vit_micro8 --dim 24 --depth 1 --heads 2 --stem conv",
    "pit": "pit_ti --patch-size 4 --stride 4 --depth 1 1 1 --heads 1 2 2 --head-dim 8",
    "mixer": "mixer_micro8 --dim 24 --depth 2 --token-mlp-dim 8 --mlp-dim 48 --drop-path 0.1",
    "resnet": "resnet18 --width 8 --zero-init --blur",
    "x2": "resnet50x2 --width 8 --depth 1 1 1 1",
    "preresnet": "preresnet50 --width 8 --depth 1 1 1 1 --drop-path 0.1",
    "resnext": "resnext50_32x4d --depth 1 1 1 1 --groups 4 --width-per-group 16 --width 16",
    "alternet": "alter_resnet18 --width 8 --head-dim 4",
    "alternet, post-activation": "alter_resnet50 --width 8 --head-dim 4 --depth 1 2 2 2 "
    "--no-pre-activation --window-size 2 --msa-blocks 0 1 0 1",
    "regnety": "regnety_1gf",
    "swin": "torchvision:swin_t --patch-size 4 --window-size 2 --dim 24 --depth 1 1 1 1 "
    "--heads 1 2 2 4",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_an_epoch_with_and_without_sam(tmp_path, family, monkeypatch):
    monkeypatch.setitem(data.SHAPES_SPLITS, "val", (2**30, 60))
    weights = []
    for rho in ("0", "0.05"):
        argv = (
            f"--model {FAMILIES[family]} --dataset shapes --train-fraction 96/8000 --sam-rho "
            f"{rho} --batch-size 16 --micro-batch 8 --epochs 1 --warmup-steps 0 --device cpu "
            f"--log-every 1 --out-dir {tmp_path / rho}"
        )
        state = train_ok(argv.split())
        weights.append(state["model"])
        log = [record for record in log_without_times(tmp_path / rho) if "loss" in record]
        assert state["step"] == len(log) == 6 and not any(record["skipped"] for record in log)
        assert all(math.isfinite(record["loss"]) for record in log), log
    moved = [key for key, w in weights[0].items() if not torch.equal(w, weights[1][key])]
    assert len(moved) > 0.5 * len(weights[0]), f"SAM moved {moved} only"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_in_the_forms_that_users_need(family):
    """Finite gradients, bf16, channels last, export, a batch of one, other classes and sizes."""
    torch.manual_seed(0)
    args = train.make_parser().parse_args(["--model", *FAMILIES[family].split()])
    model = train.build_model(args.model, 7, 32, **train.knobs(args))
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():  # a head that starts at zero hides the rest
            nn.init.normal_(parameter, std=0.02)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    for precision in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        wrong = [
            name
            for name, p in model.named_parameters()
            if p.grad is None or not p.grad.isfinite().all()
        ]
        assert not wrong, f"{precision}: no finite gradient for {wrong}"
    model.eval()
    plain = model(images)
    last = images.contiguous(memory_format=torch.channels_last)
    forms = {
        "one by one": torch.cat([model(image[None]) for image in images]),
        "exported": torch.export.export(model, (images,)).module()(images),
        "channels last": copy.deepcopy(model).to(memory_format=torch.channels_last)(last),
    }
    with torch.autocast("cpu", torch.bfloat16):
        forms["bfloat16"] = model(images).float()
    for form, logits in forms.items():
        error = ((logits - plain).norm() / plain.norm()).item()
        assert error < (0.1 if form == "bfloat16" else 1e-5), f"{form}: {error:.1e}"
    if re.match("vit|pit|mixer|alternet", family):
        with pytest.raises(ValueError, match="built for images|windows of . do not divide"):
            model(torch.randn(1, 3, 40, 40))
    else:
        assert model(torch.randn(1, 3, 40, 40)).shape == (1, 7)


def test_list_models_prints_every_row_of_the_papers(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert train.main(["--list-models"]) == 0
    text = capsys.readouterr().out
    rows = {}
    for line in text.splitlines():
        name, *cells = re.split("  +", line.strip())
        rows[name, cells[0] if cells else ""] = cells[1:]
    for name, pixels, expected in [
        ("vit_s16", "224", ["1,000", "22,050,664", "4.60", "11.9", "Chen Table 7"]),
        ("mixer_b8", "224", ["1,000", "64,864,168", "50.06", "47.5", "Chen Table 7"]),
        ("resnet152x2", "224", ["1,000", "236,350,568", "45.81", "45.5", "Chen Table 2"]),
        ("resnet200", "224", ["1,000", "64,673,832", "15.01", "32.4", "Xiao Table 2"]),
        ("regnety_1gf", "232", ["1,000", "9,600,538", "1.05", "6.2", "Xiao Table 2"]),
        ("regnety_4gf", "240", ["1,000", "22,408,976", "4.10", "14.5", "Xiao Table 2"]),
        ("regnety_16gf", "256", ["1,000", "72,282,900", "15.46", "30.7", "Xiao Table 2"]),
        ("regnety_32gf", "268", ["1,000", "128,552,446", "31.07", "46.2", "Xiao Table 2"]),
        ("torchvision:swin_t", "32", ["100", "27,575,374", "1.43", "5.1", "Park Fig. 1-10, C.4"]),
        (
            "alter_resnet50 --msa-blocks 0 1 3 2",
            "32",
            ["100", "34,062,538", "1.58", "4.6", "Park Fig. 12a"],
        ),
        (
            "timm:convit_tiny",
            "224",
            [
                "1,000",
                "timm:convit_tiny: timm is not installed (pip install timm)",
                "Park Fig. E.1",
            ],
        ),
    ]:
        assert rows[name, pixels] == expected, (name, rows[name, pixels])
    files = [*vit.NAMES, *mixer.NAMES, *resnet.NAMES, *alternet.NAMES]
    missing = [name for name in files if not re.search(rf"^{name} ", text, re.M)]
    assert not missing, f"without a row: {missing}"


def test_flops_of_swin_count_its_attention():
    """Of 16 tokens among each other in each window: two products of 16·C for every token."""
    cost = {}
    for window in (2, 4):
        with torch.device("meta"):
            model = train.build_model("torchvision:swin_t", 100, 32, window_size=window)
        cost[window] = vit.complexity(model, 32)
    tokens = [(32 * 32, 96, 2), (16 * 16, 192, 2), (8 * 8, 384, 6), (4 * 4, 768, 2)]
    more = sum(2 * n * (16 - 4) * dim * depth for n, dim, depth in tokens)
    assert cost[4]["macs"] - cost[2]["macs"] == more, cost
    assert cost[4]["macs"] == 1_430_891_520 and cost[4]["acts"] == 5_087_332
    with pytest.raises(NotImplementedError, match="cannot count multi_head_attention_forward"):
        vit.complexity(train.build_model("torchvision:vit_b_16", 10, 32), 32)


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
def test_products_that_the_counter_does_not_count_are_refused_not_free():
    class Products(nn.Module):
        def __init__(self, product):
            super().__init__()
            self.weight, self.product = nn.Parameter(torch.zeros(4, 4)), product

        def forward(self, x):
            return self.product(x[:, 0, :4, :4], self.weight)

    assert vit.complexity(Products(lambda x, w: x @ w), 4)["macs"] == 4**3
    by_name = lambda x, w: F.linear(x, weight=w, bias=w[0])
    cost = vit.complexity(Products(by_name), 4)
    assert (cost["macs"], cost["macs_with_bias"]) == (4**3, 4**3 + 4**2)
    attention = lambda x, w: F.scaled_dot_product_attention(query=x, key=x, value=x)
    assert vit.complexity(Products(attention), 4)["macs"] == 2 * 4**3
    refused = set()
    for name, product in {
        "mm": lambda x, w: x[0].mm(w),
        "addmm": lambda x, w: torch.addmm(w, x[0], w),
        "baddbmm": lambda x, w: torch.baddbmm(x, x, x),
        "einsum": lambda x, w: torch.einsum("bij,jk->bik", x, w),
        "tensordot": lambda x, w: torch.tensordot(x, w, 1),
        "bilinear": lambda x, w: F.bilinear(x, x, w[None]),
        "inner": lambda x, w: torch.inner(x, w),
        "mv": lambda x, w: torch.mv(w, x[0, 0]),
        "dot": lambda x, w: torch.dot(w[0], x[0, 0]),
        "vdot": lambda x, w: torch.vdot(w[0], x[0, 0]),
        "chain_matmul": lambda x, w: torch.chain_matmul(w, w),
        "linalg_multi_dot": lambda x, w: torch.linalg.multi_dot([w, w]),
        "linalg_matmul": lambda x, w: torch.linalg.matmul(x, w),
        "linalg_vecdot": lambda x, w: torch.linalg.vecdot(x, w),
        "addmv": lambda x, w: torch.addmv(w[0], w, x[0, 0]),
        "addbmm": lambda x, w: torch.addbmm(w, x, x),
        "__rmatmul__": lambda x, w: w.__rmatmul__(x),
        "conv1d": lambda x, w: F.conv1d(x, w[..., None]),
        "conv3d": lambda x, w: F.conv3d(x[..., None, None], w[..., None, None, None]),
        "conv_transpose1d": lambda x, w: F.conv_transpose1d(x, w[..., None]),
        "conv_transpose2d": lambda x, w: F.conv_transpose2d(x[:, :, None], w[..., None, None]),
        "conv_transpose3d": lambda x, w: F.conv_transpose3d(
            x[..., None, None], w[..., None, None, None]
        ),
    }.items():
        refused.add(name)
        with pytest.raises(NotImplementedError, match=f"cannot count {name}$"):
            vit.complexity(Products(product), 4)
    assert refused | {"multi_head_attention_forward"} == vit.UNCOUNTED


def test_torchvisions_resnet_has_the_intermediates_and_units_of_ours():
    torch.manual_seed(0)
    theirs = train.build_model("torchvision:resnet18", 10).double().eval()
    ours = resnet.build("resnet18", 10).double().eval()
    ours.load_state_dict(theirs.state_dict())
    plain = torchvision.models.resnet18(num_classes=10).double().eval()
    plain.load_state_dict(theirs.state_dict())
    images = tiny_images(2, 64)
    assert theirs.intermediates == ours.intermediates
    out = [dict.fromkeys(ours.intermediates) for _ in range(2)]
    assert torch.equal(theirs(images, out=out[0]), plain(images))
    ours(images, out=out[1])
    for name in out[0]:
        difference = (out[0][name] - out[1][name]).abs().max()
        assert difference < 1e-12, f"{name} differs by {difference:.1e}"
    for skip in ("layer1.1", "layer3.0", "layer4.1"):
        difference = (theirs(images, skip=skip) - ours(images, skip=skip)).abs().max()
        changed = (theirs(images, skip=skip) - plain(images)).abs().max()
        assert difference < 1e-12 < changed, f"{skip}: {difference:.1e}, {changed:.1e}"
    bottlenecks = train.build_model("torchvision:resnext50_32x4d", 10).eval()
    assert bottlenecks(torch.randn(1, 3, 64, 64), skip="layer2.0").isfinite().all()
    with pytest.raises(ValueError, match="unknown unit 'stem' to skip; this model has layer1.0, l"):
        theirs(images, skip="stem")


def test_torchvisions_swin_has_the_intermediates_and_units_of_a_vit():
    torch.manual_seed(0)
    model = train.build_model("torchvision:swin_t", 10, 32, patch_size=2).double().eval()
    images = tiny_images(2, 32)
    kinds = list(model.intermediates.values())
    assert kinds == [
        ("stem", 0),
        *[("attention", 1), ("mlp", 1)] * 2,
        ("pooling", 2),
        *[("attention", 2), ("mlp", 2)] * 2,
        ("pooling", 3),
        *[("attention", 3), ("mlp", 3)] * 6,
        ("pooling", 4),
        *[("attention", 4), ("mlp", 4)] * 2,
        ("representation", 4),
    ]
    seen, hooks = {}, []

    def watch(module, name, before):  # the stream is what goes into norm2, and comes out of a block
        def keep(module, inputs, output):
            seen[name] = inputs[0] if before else output

        hooks.append(module.register_forward_hook(keep))

    for name, (kind, _) in model.intermediates.items():
        if kind == "attention":
            watch(model.get_submodule(name.replace(".attn", ".norm2")), name, True)
        elif kind == "mlp":
            watch(model.get_submodule(name.removesuffix(".mlp")), name, False)
        elif kind != "representation":
            watch(model.features[0] if kind == "stem" else model.get_submodule(name), name, False)
    watch(model.head, "pre_logits", True)
    logits = model(images)
    for hook in hooks:
        hook.remove()
    out = dict.fromkeys(model.intermediates)
    assert torch.equal(model(images, out=out), logits) and seen.keys() == out.keys()
    wrong = [name for name in out if not torch.equal(out[name], seen[name])]
    assert not wrong, f"other values than the hooks saw: {wrong}"
    assert out["stem"].shape == (2, 16, 16, 96) and out["features.2"].shape == (2, 8, 8, 192)
    for skip in ("features.1.1.attn", "features.5.2.mlp"):
        hook = model.get_submodule(skip).register_forward_hook(lambda m, i, output: 0 * output)
        expected = model(images)
        hook.remove()
        assert torch.equal(model(images, skip=skip), expected)
        assert not torch.equal(expected, logits), f"{skip} has no effect"
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    graph = {"features.3.0.attn": None}
    compiled(images, out=graph, skip="features.1.0.mlp")
    plain = {"features.3.0.attn": None}
    model(images, out=plain, skip="features.1.0.mlp")
    difference = (graph["features.3.0.attn"] - plain["features.3.0.attn"]).abs().max()
    assert difference < 1e-12, f"compiled and plain Swin differ by {difference:.1e}"


def test_networks_of_torchvision_train_and_load_their_state_dicts(tmp_path, capsys):
    out = tmp_path / "run"
    setup = [
        *"--model torchvision:mobilenet_v3_small --device cpu --dataset shapes".split(),
        *"--train-fraction 1/50 --batch-size 16 --micro-batch 8 --max-steps 2".split(),
        *"--sam-rho 0.05".split(),
    ]
    state = train_ok([*setup, "--out-dir", str(out)])
    published = train.build_model("torchvision:mobilenet_v3_small", 1000)
    assert state["model"].keys() == published.state_dict().keys()
    torch.save(published.state_dict(), tmp_path / "published.pth")
    start = ["--init-from", tmp_path / "published.pth"]
    assert "classifier.3.weight (1000, 1024), here (12, 1024)" in refusal(capsys, *setup, *start)
    tuned = train_ok(
        [
            *setup,
            "--lr",
            "0",
            *map(str, start),
            "--reset-head",
            "--out-dir",
            str(tmp_path / "tuned"),
        ]
    )
    assert "is taken for one of torchvision's" in capsys.readouterr().out
    assert all(
        torch.equal(tuned["model"][k], p)
        for k, p in published.named_parameters()
        if not k.startswith("classifier.3")
    )
    assert tuned["settings"]["mean"] == [0.485, 0.456, 0.406]


def test_an_original_npz_is_evaluated_and_fine_tuned(tmp_path, capsys):
    np.savez(tmp_path / "google.npz", **google_arrays())
    sizes = (
        "--model vit_ti4 --image-size 16 --dim 12 --depth 2 --heads 3 --mlp-dim 24 "
        f"--device cpu --dataset folder --init-from {tmp_path / 'google.npz'}"
    ).split()
    five = write_image_folder(tmp_path / "five", train=4, val=2, classes="abcde")
    assert train.main([*sizes, "--data-dir", str(five), "--eval-only", "--workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["val", "10"]
    loaded = vit.build("vit_ti4", 5, 16, dim=12, depth=2, heads=3, mlp_dim=24)
    assert train.load_weights(loaded, str(tmp_path / "google.npz")) == ([0.5], [0.5])
    three = [*sizes, "--data-dir", str(write_image_folder(tmp_path / "three", train=4, val=2))]
    assert "num_classes" in refusal(capsys, *three, "--eval-only")
    assert "--reset-head starts with a new classifier" in refusal(capsys, *three)
    state = train_ok(
        [
            *three,
            *"--lr 0 --batch-size 8 --micro-batch 8 --epochs 1 --workers 0 --out-dir".split(),
            str(tmp_path / "run"),
            "--reset-head",
        ]
    )
    network = vit.build("vit_ti4", 5, 16, dim=12, depth=2, heads=3, mlp_dim=24)
    vit.load_npz(network, tmp_path / "google.npz")
    assert all(
        torch.equal(state["model"][k], p)
        for k, p in network.named_parameters()
        if not k.startswith("head.")
    )


@pytest.mark.parametrize(
    "flags, graphs",
    [
        ("--stem conv --ema-decay 0.9 --sam-steps 2", 1),
        # of images with a gradient and without; of weights likewise
        ("--adv-eps 2/255 --dtype float64", 2),
        ("--loss supcon --augment crop", 2),
    ],
)
def test_a_compiled_run_compiles_once_and_trains_as_the_uncompiled(
    tmp_path, monkeypatch, flags, graphs
):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    plain, compiled = (
        train_ok(tiny(tmp_path / str(i), "--sam-rho 0.1", flags, *more))
        for i, more in enumerate(((), ("--compile",)))
    )
    assert counter.frame_count == graphs, counter.frame_count
    limit = 1e-9 if "float64" in flags else 1e-3
    for part in ("model", "ema", "projection"):
        assert (plain[part] is None) == (compiled[part] is None)
        if plain[part] is not None:
            assert largest_difference(plain[part], compiled[part]) < limit, part
    assert abs(plain["final"]["training"]["nll"] - compiled["final"]["training"]["nll"]) < 1e-4


HOST_READS = {  # function: a call of it
    "item": lambda t: t[0].item(),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "numpy": lambda t: t.numpy(),
    "nonzero": lambda t: t.nonzero(),
    "masked_select": lambda t: t.masked_select(t > 0),
    "unique": lambda t: t.unique(),
    "equal": lambda t: torch.equal(t, t),
    "allclose": lambda t: t.allclose(t),
    "is_nonzero": lambda t: t[0].is_nonzero(),
    "__bool__": lambda t: 1 if t[0] else 2,
    "__int__": lambda t: int(t[0]),
    "__float__": lambda t: float(t[0]),
    "__index__": lambda t: range(9)[t[0].int()],
    "__contains__": lambda t: 2 in t,
    "argwhere": lambda t: torch.argwhere(t),
    "bincount": lambda t: torch.bincount(t.int()),
    "__format__": lambda t: f"{t[0]:.3f}",
    "__repr__": repr,
    "__array__": np.asarray,
}


class HostReads(TorchFunctionMode):
    """Collects the calls that read a tensor's values on the host, for which an accelerator has to
    be waited for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        by_mask = any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)
            for i in (index if isinstance(index, tuple) else (index,))
        )
        if name in HOST_READS or by_mask:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, read",
    [
        *HOST_READS.items(),
        ("__getitem__", lambda t: t[t > 0]),
        ("__setitem__", lambda t: t.__setitem__(t > 0, 1.0)),
    ],
)
def test_the_counter_of_host_reads_sees_each_of_them(name, read):
    with HostReads() as reads:
        read(torch.ones(3) + 1)
    assert len(reads.seen) == 1, reads.seen


def unwatched(function):
    """What it does, a loader's work on the host, is not counted by HostReads."""

    def call(*args, **kwargs):
        items = iter(function(*args, **kwargs))
        while True:
            with torch._C.DisableTorchFunction():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    return call


@pytest.mark.parametrize(
    "flags",
    [
        "--model vit_micro8 --sam-rho 0",
        "--model vit_micro8 --sam-rho 0.1 --stem conv --dropout 0.1 --drop-path 0.1 --grad-clip 1 "
        "--ema-decay 0.9 --mixup 0.5 --cutmix 1 --sam-every 2",
        "--model vit_micro8 --sam-rho 0.1 --adv-eps 2/255 --sam-every 2 --sam-reuse 0",
        "--model resnet18 --width 8 --sam-rho 0.1 --sam-sync --optimizer sgd",
        "--model vit_micro8 --sam-rho 0.1 --loss supcon --augment crop --sam-adaptive "
        "--sam-scope norm",
    ],
)
def test_a_training_waits_for_the_device_at_log_lines_only(
    tmp_path, monkeypatch, small_shapes, flags
):
    """As many host reads in 2 as in 6 steps of a run whose only log line is at its end; mixup draws
    on the CPU, wherever the images are."""
    monkeypatch.setattr(data, "batches", unwatched(data.batches))
    mixing = train.mixing

    def mixes(*args):
        mix = mixing(*args)

        def call(*xy):
            with torch._C.DisableTorchFunction():
                return mix(*xy)

        return call

    monkeypatch.setattr(train, "mixing", mixes)
    counts = []
    for steps in (2, 6):
        argv = (
            "--dataset shapes --device cpu --epochs 6 --batch-size 16 --micro-batch 8 "
            f"--log-every 1000 --eval-every 6 --max-steps {steps} "
            f"--out-dir {tmp_path / str(steps)} {flags}"
        ).split()
        with HostReads() as reads:
            assert train.main(argv) == 0
        counts.append(reads.seen)
    assert len(counts[0]) == len(counts[1]) > 0, [sorted(set(c)) for c in counts]


def test_evaluation_and_attacks_wait_as_often_whatever_the_batches_and_steps(monkeypatch):
    network, (x, y) = small_cnn(torch.float32), images_to_attack(dtype=torch.float32)
    model, counts = train.assemble(network, [0.5], [0.5]).eval(), []
    pixels = (255 * x).to(torch.uint8)
    monkeypatch.setattr(data, "batches", unwatched(data.batches))
    for batch in (12, 2):
        loader = data.evaluation_loader(data.InMemory(pixels, y, list("abcde")), batch)
        with HostReads() as reads:
            train.evaluate(model, loader, torch.device("cpu"), restrict_logits=torch.arange(4))
        counts.append(len(reads.seen))
    assert counts[0] == counts[1] > 0, counts
    counts = []
    for steps in (1, 7):
        with HostReads() as reads:
            adversarial.pgd(model, x, y, steps=steps)
        counts.append(len(reads.seen))
    assert counts[0] == counts[1] > 0, counts


ANALYSES = {
    "fourier": analyze.fourier,
    "variance": analyze.variance,
    "hsic": analyze.hsic,
    "activity": analyze.activity,
    "accuracy": analyze.accuracy,
    "mean_loss": lambda model, batches: analyze.mean_loss(model, train.softmax_loss, batches),
    "calibration": lambda model, batches: analyze.calibration(
        [(model(x).detach(), y) for x, y in batches]
    ),
}


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_waits_as_often_for_many_batches_as_for_few(name):
    model, counts = train.assemble(tiny_vit().float(), [0.5], [0.5]).eval(), []
    x, y = tiny_images(24).float(), torch.arange(24) % 5
    for n in (2, 6):
        batches = list(zip(x[: 4 * n].split(4), y[: 4 * n].split(4)))
        with HostReads() as reads:
            ANALYSES[name](model, batches)
        counts.append(len(reads.seen))
    assert counts[0] == counts[1] > 0, counts


def test_a_thousand_steps_leave_no_memory_behind(tmp_path, monkeypatch, small_shapes):
    """Tensors alive and the process's memory at log lines, from step 200 to 1,000."""
    alive, log = {}, train.RunFolder.log

    def tensors():
        gc.collect()
        return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]

    others = tensors()  # of other tests, kept lest one that ends be counted

    def counted(self, **record):
        if "loss" in record:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            alive[record["step"]] = len(tensors()) - len(others), memory
        log(self, **record)

    monkeypatch.setattr(train.RunFolder, "log", counted)
    argv = tiny(
        tmp_path,
        "--max-steps 1000 --epochs 500 --log-every 200 --eval-every 500 "
        "--sam-rho 0.1 --sam-every 2 --ema-decay 0.9 --grad-clip 1 --mixup 0.5 --dim 12 "
        "--depth 1",
        dataset="--dataset shapes --batch-size 4 --micro-batch 4",
    )
    assert train.main(argv) == 0
    assert list(alive) == list(range(200, 1001, 200))
    counts, memory = zip(*alive.values())
    assert len(set(counts)) == 1 and counts[0] > 0, counts
    assert max(memory) - memory[0] < 8, memory  # MiB


class Counted(data.InMemory):
    """Counts the batches that its worker has made and that are not evaluated yet."""

    def images(self, where, pairs):
        with self.waiting.get_lock():
            self.waiting.value += 1
        return super().images(where, pairs)


class HandInHand(nn.Module):
    """A network whose pass over a batch does not end before the next batch is made."""

    def __init__(self, waiting, batches):
        super().__init__()
        self.weight, self.waiting, self.left = nn.Parameter(torch.ones(1)), waiting, batches

    def forward(self, x):
        for _ in range(600):
            if self.waiting.value >= min(2, self.left):
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the next batch is not made meanwhile")
        self.left -= 1
        with self.waiting.get_lock():
            self.waiting.value -= 1
        return self.weight * x.mean((2, 3))


def test_the_next_batch_is_decoded_while_one_is_evaluated():
    dataset = Counted(
        torch.zeros(12, 3, 8, 8, dtype=torch.uint8), torch.zeros(12).long(), list("abc")
    )
    dataset.waiting = torch.multiprocessing.Value("i", 0)
    result = train.evaluate(
        HandInHand(dataset.waiting, 6),
        data.evaluation_loader(dataset, 2, workers=1),
        torch.device("cpu"),
    )
    assert result["images"] == 12 and dataset.waiting.value == 0


def test_images_at_once_is_the_largest_power_of_two_that_fits():
    """Memory for 100 images, of a device that says so as CUDA does."""
    model, tried = nn.Flatten(), []
    model.weight = nn.Parameter(torch.ones(1))

    def run(x):
        tried.append(len(x))
        if len(x) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")

    class Device:  # nothing else of it is asked for
        type = "cuda"

    make, held = torch.zeros, adversarial.held_still
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *size, device, **more: make(*size, **more))
        patch.setattr(
            adversarial, "held_still", lambda model, device: held(model, torch.device("cpu"))
        )
        at_once = partial(train.images_at_once, model, 8, Device())
        assert at_once("maps", run) == 64 and tried == [1024, 512, 256, 128, 64]
        assert at_once("maps", run) == 64 and len(tried) == 5, "tried once"
        assert at_once() == 1024
        assert train.images_at_once(model, 224, Device(), "large") == 256
        assert train.images_at_once(model, 224, Device(), "piece", most=512) == 512
        with pytest.raises(train.UserError, match="one image of 8×8 does not fit"):
            at_once("nothing", lambda x: run(make(1000)))
    assert train.images_at_once(model, 8, torch.device("cpu"), usual=64) == 64


def children(pid):
    """Of a process, their numbers (Linux)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def is_locked(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


def test_help_and_mistakes_are_answered_before_anything_is_touched(capsys, monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("it has begun")

    for module, name in (
        (data, "load"),
        (dist, "init_process_group"),
        (torch, "compile"),
        (train, "build_model"),
        (os, "mkdir"),
    ):
        monkeypatch.setattr(module, name, touched)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for argv in (
        ["--sam-rhoo", "0.1"],
        ["--sam-rho", "-1"],
        ["--model", "vit_b16", "--batch-size", "0"],
        ["--recipe", "chen"],
        ["--init-from", "x.pt", "--mean", "0.5"],
    ):
        assert train.main(argv) == 2, argv
        assert capsys.readouterr().err.count("\n") == 1
    for program in (train, analyze, adversarial, data, vit, mixer, resnet, alternet, sam):
        with pytest.raises(SystemExit) as end:
            program.main(["--help"])
        assert end.value.code == 0 and "usage:" in capsys.readouterr().out
    for argv in (["hesian"], ["hessian"], ["throughput", "--rounds", "0"]):
        assert analyze.main(argv) == 2, argv
        assert capsys.readouterr().err.count("\n") == 1


def start(argv, **kwargs):
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


KILLER = """
# Forks a program again and again and ends each at a random moment by a random signal; forking saves
# importing torch. One in three ends within `early` seconds of its start, the others at some time
# after a new state of the file `watched`. Two processes find each other as torchrun's do; one of
# them is told, and when one has failed the other is ended, as by torchrun.
import importlib, json, os, random, signal, socket, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
how = json.loads(sys.argv[1])
program = importlib.import_module(how["program"])
random.seed(how["seed"])
kills, done, tracebacks = how["kills"], False, 0
written = lambda: os.path.exists(how["watched"]) and os.stat(how["watched"]).st_mtime_ns
while not done:
    before, children, told = written(), {}, False
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for rank in range(how["processes"]):
        pid = os.fork()
        if pid == 0:
            if how["processes"] > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                                  LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os._exit(program.main(how["argv"]) or 0)
        children[pid] = None
    running = lambda: [pid for pid, status in children.items() if status is None]

    def collect():
        for pid in running():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children[pid] = os.waitstatus_to_exitcode(status)
    if kills:
        end = time.monotonic() + 60
        while kills % 3 and written() == before and len(running()) == how["processes"] and (
                time.monotonic() < end):
            time.sleep(0.005)
            collect()
        time.sleep(random.uniform(0, how["late"] if kills % 3 else how["early"]))
        collect()
        if running():
            os.kill(random.choice(running()), random.choice(how["signals"]))
            kills, told = kills - 1, True
    end = time.monotonic() + 120
    while running():
        collect()
        failed = any(status for status in children.values())
        late = time.monotonic() > end - (110 if failed else 0)
        if late and (told or failed):
            for pid in running():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    codes = list(children.values())
    done = not any(codes)
    assert told or done, codes
    tracebacks += how["processes"] == 1 and 1 in codes
print("killed", how["kills"] - kills, "tracebacks", tracebacks, flush=True)
"""


def killed(
    program,
    argv,
    watched,
    kills,
    *,
    processes=1,
    signals=(signal.SIGKILL,),
    seed=0,
    early=1.0,
    late=0.3,
):
    """Runs KILLER; -> (how many ends by a signal, output)."""
    how = dict(
        program=program,
        argv=list(map(str, argv)),
        watched=str(watched),
        kills=kills,
        processes=processes,
        signals=signals,
        seed=seed,
        early=early,
        late=late,
    )
    one_thread = dict(OMP_NUM_THREADS="1") if processes > 1 else {}
    run = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(how)],
        cwd=HERE,
        text=True,
        capture_output=True,
        timeout=3000,
        env=os.environ | one_thread,
    )
    found = re.search(r"killed (\d+) tracebacks 0", run.stdout)
    assert run.returncode == 0 and found, run.stdout[-2000:] + run.stderr[-3000:]
    return int(found[1]), run.stdout


def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one_bit_for_bit(tmp_path):
    """Weights, optimizer, average and log (but for its times);
    with augmentation, masks, mixup and BatchNorm."""
    write_image_folder(tmp_path / "images", train=32, val=8)
    settings = (
        f"--data-dir {tmp_path / 'images'} --stem conv --dropout 0.1 --drop-path 0.1 "
        "--mixup 0.5 --ema-decay 0.95 --sam-rho 0.1 --image-size 16 "
        "--workers 1 --seed 3 --eval-every 12 --save-every 5 --keep-epochs warmup 20 "
        "--sam-every 3 --sam-scope 'norm|mlp'"
    )
    setup = (
        "--dataset folder --epochs 24 --batch-size 16 --micro-batch 8 --log-every 4 "
        "--warmup-steps 10"
    )
    whole = train_ok(tiny(tmp_path / "whole", settings, dataset=setup))
    argv = tiny(tmp_path / "killed", settings, "--resume", dataset=setup)
    kills, output = killed("train", argv, tmp_path / "killed/ckpt.pt", 3)
    assert kills == 3 and output.count("resumed ") >= 2, output  # else they came too early
    again = train.read_checkpoint(tmp_path / "killed/ckpt.pt")
    for part in (
        "model",
        "ema",
        "optimizer",
        "scaler",
        "look",
        "step",
        "evaluated",
        "best",
        "final",
    ):
        assert same_tensors(whole[part], again[part]), part
    for name in ("warmup.pt", "epoch20.pt"):
        assert same_tensors(
            *(train.read_checkpoint(tmp_path / run / name)["model"] for run in ("whole", "killed"))
        ), name
    assert log_without_times(tmp_path / "whole") == log_without_times(tmp_path / "killed")


@pytest.mark.parametrize("processes, number", [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(tmp_path, processes, number):
    argv = [
        "train.py",
        *tiny(tmp_path / "run", "--epochs 2000 --log-every 2 --eval-every 1000 --sam-rho 0.1"),
    ]
    if processes > 1:
        argv = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv]
    run = start(argv)
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line.startswith("step ") and "loss" in line:
            pids = [run.pid] if processes == 1 else children(run.pid)
            os.kill(pids[0], number)  # one process is told, all stop
            break
    try:
        rest, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    text, status = "".join(lines) + rest, run.returncode
    assert status == (128 + number if processes == 1 else 1), (status, text)
    assert (
        f"stopped by {number.name}, saved at step" in text
        and "repeat the command with --resume" in text
    ), text
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert 0 < state["step"] < 10_000 and "final" not in state


@contextmanager
def files_of_at_most(size):
    """As on a full disk, writes beyond so many bytes of a file fail, of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_a_run_in_one_line_and_loses_nothing(
    tmp_path, capsys, monkeypatch, small_shapes
):
    settings = "--train-fraction 1 --sam-rho 0.1 --save-every 3 --ema-decay 0.9"
    whole = train_ok(tiny(tmp_path / "whole", settings))
    argv = tiny(tmp_path / "run", settings, "--resume")
    train_ok([*argv, "--max-steps", "3"])
    before = (tmp_path / "run/ckpt.pt").read_bytes()
    for limit, words in (
        (
            len(before) // 2,
            "ckpt.pt cannot be written: File too large; the one before it is "
            "whole; then go on with --resume\n",
        ),
        (100, "config.json cannot be written: File"),
    ):
        with files_of_at_most(limit):
            line = refusal(capsys, *argv)
        assert words in line, line
        assert (tmp_path / "run/ckpt.pt").read_bytes() == before
        assert not list((tmp_path / "run").glob("*.tmp"))

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", read_only)
        line = refusal(capsys, *tiny(tmp_path / "other", settings))
        assert "Read-only file system" in line, line
    resumed = train_ok(argv)
    for part in ("model", "ema", "optimizer", "final"):
        assert same_tensors(whole[part], resumed[part]), part


def test_a_want_of_memory_is_one_line(capsys):
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …"),
    ):

        def fails():
            raise error

        assert train.answer("train.py", fails, "then go on with --resume") == 2
        line = capsys.readouterr().err
        assert line == (
            f"train.py: memory is short{' of 2.50 GiB' * bool(error.args)}: smaller "
            "batches, or less of what was asked for, take less\n"
        )
    assert train.answer("train.py", lambda: torch.empty(10**17), "again") == 2
    assert "memory is short" in capsys.readouterr().err

    def other():
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        train.answer("train.py", other, "again")


def test_output_that_cannot_be_written_is_one_line_and_letters_that_it_lacks_end_nothing():
    def dry_run(stdout):
        command = [sys.executable, "train.py", "--dry-run"]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        env |= dict(PYTHONIOENCODING="ascii")
        return subprocess.run(command, cwd=HERE, stdout=stdout, stderr=subprocess.PIPE, env=env)

    with open("/dev/full", "w") as full:
        ended = dry_run(full)
    line = b"train.py: standard output: No space left on device; then go on with --resume\n"
    assert (ended.returncode, ended.stderr) == (2, line)
    ended = dry_run(subprocess.PIPE)
    assert ended.returncode == 0 and b"2 micro-batches ? 32 images" in ended.stdout


def test_a_run_ends_quietly_when_nobody_reads_its_output(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "train.py", *tiny(tmp_path / "run", "--epochs 500")],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    run.stdout.readline()
    run.stdout.close()
    try:
        run.wait(timeout=120)
    finally:
        run.kill()
    assert (run.wait(), run.stderr.read().decode()) == (128 + signal.SIGPIPE, "")


class Deadly(data.InMemory):
    """Its second batch is the loading process's last."""

    def images(self, where, pairs):
        if pairs[0][1] >= 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().images(where, pairs)


def test_a_worker_that_the_system_kills_is_reported_as_that():
    dataset = Deadly(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.zeros(8).long(), ["a"])
    with pytest.raises(data.DataError, match="was killed, .* memory is short: use fewer --workers"):
        list(data.batches(data.evaluation_loader(dataset, 4, workers=2)))
    assert not torch.multiprocessing.active_children(), "workers end though the error is kept"


def test_a_worker_that_dies_while_a_step_is_computed_is_one_line(capsys):
    pixels, labels = torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.zeros(8).long()
    dataset = data.InMemory(pixels, labels, ["a"])

    def step():
        for _ in data.batches(data.evaluation_loader(dataset, 1, workers=1)):
            os.kill(torch.multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(60)  # torch's handler of SIGCHLD raises in here

    assert train.answer("train.py", step, "again") == 2
    assert capsys.readouterr().err == f"train.py: {data.LOST}\n"


UNHANDLED = """
import signal, sys, time, torch, data
def tidy(*_):
    print("child tidied up", flush=True)
    sys.exit()
def child():
    signal.signal(signal.SIGTERM, tidy)
    begun.set()
    time.sleep(60)
fork = torch.multiprocessing.get_context("fork")
begun = fork.Event()
fork.Process(target=child, daemon=True).start()
begun.wait()
dataset = data.InMemory(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.zeros(8).long(), ["a"])
stream = data.batches(data.evaluation_loader(dataset, 1, workers=1))
next(stream)
1 / 0
"""


def test_workers_that_hang_as_they_are_forked_are_started_again(monkeypatch):
    """As Python 3.11.7 does it, CPython issue 112275."""
    hangs, told = [True], []
    os.register_at_fork(
        after_in_child=lambda: hangs and time.sleep(1000), after_in_parent=hangs.clear
    )
    dataset = data.InMemory(
        torch.arange(8)[:, None, None, None].expand(8, 3, 2, 2).byte(),
        torch.arange(8),
        list(range(8)),
    )
    monkeypatch.setattr(data, "PATIENCE", 5)
    try:
        loader = data.evaluation_loader(dataset, 2, workers=2)
        labels = torch.cat([y for _, y in data.batches(loader, told.append)])
    finally:
        hangs.clear()  # what was registered stays: no later worker may hang
    assert labels.tolist() == list(range(8)) and len(told) == 1
    assert told[0].startswith("1 of 2 data workers did not begin"), told
    assert not torch.multiprocessing.active_children()


def test_a_program_ends_by_an_error_though_its_workers_leave_signals_alone():
    ended = subprocess.run(
        [sys.executable, "-c", UNHANDLED], cwd=HERE, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1 and ended.stderr.endswith("division by zero\n"), ended.stderr
    assert ended.stdout == "child tidied up\n", "processes that are not workers end as always"


def test_wrong_variables_of_torchrun_and_a_busy_port_are_told(tmp_path, capsys, monkeypatch):
    argv = tiny(tmp_path / "run", "--max-steps 1")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "two")
            assert f"{name}=two: no number, as torchrun sets it" in refusal(capsys, *argv)
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "3")  # left over: it would compute for nobody
        patch.setenv("LOCAL_RANK", "3")
        assert "RANK=3 LOCAL_RANK=3 without WORLD_SIZE" in refusal(capsys, *argv)
    for name, number, own, all_ in (
        ("RANK", "WORLD_SIZE", 5, 1),
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE", 1, 1),
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE", 0, 0),
    ):
        with monkeypatch.context() as patch:
            for key, value in (("WORLD_SIZE", "1"), ("RANK", "0"), (name, own), (number, all_)):
                patch.setenv(key, str(value))
            assert f"{name}={own} {number}={all_}: ranks begin at 0" in refusal(capsys, *argv)
    for rank in ("x", "1"):  # of one process: whoever is alone says what is wrong
        with monkeypatch.context() as patch:
            for key, value in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", rank)):
                patch.setenv(key, value)
            assert "banana" in refusal(capsys, *argv, "--sam-rho", "banana")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "cannot join: " in refusal(capsys, *argv), "RANK is missing"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for name, value in (
            ("RANK", "0"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", str(other.getsockname()[1])),
        ):
            monkeypatch.setenv(name, value)
        line = refusal(capsys, *argv)
        assert "cannot join: " in line and "--standalone finds a free port" in line, line
    monkeypatch.setenv("WORLD_SIZE", "2")  # as if the other one had met an error before
    monkeypatch.setattr(train, "TO_JOIN", timedelta(seconds=1))
    line = refusal(capsys, *argv)
    assert "cannot join: " in line and "one that is missing has said why" in line, line
    assert not (tmp_path / "run").exists()


def test_the_command_to_compare_is_started_as_the_run_was(monkeypatch):
    """And has its flags, but for those of SAM."""
    argv = "--model vit_s16 --sam-rho 0.1 --sam-every 2 --epochs 3 --out-dir x --resume"
    command = lambda: train.comparison(*train.settings(argv.split()), on_machine=2)
    same = "train.py --model vit_s16 --epochs 3 --sam-rho 0"
    assert command() == f"python {same}"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert command() == f"torchrun --nproc_per_node=2 {same}"
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    assert command() == (
        "torchrun --nnodes=4 --nproc_per_node=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
        + same
    )


RESTARTED = """
import os, signal, torch, train
train.join("gloo")
torch.distributed.all_reduce(torch.ones(1))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
torch.distributed.destroy_process_group()
print("joined")
"""


def test_processes_that_torchrun_restarts_join_at_the_first_attempt(tmp_path):
    (tmp_path / "restarted.py").write_text(RESTARTED)
    run = start(
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "--max-restarts=1",
            tmp_path / "restarted.py",
        ],
        env=os.environ | {"PYTHONPATH": str(HERE)},
    )
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0 and output.count("joined") == 2, output


def test_a_training_ends_when_the_study_that_started_it_is_killed(tmp_path):
    argv = tiny(tmp_path / "run", "--epochs 100000")
    study = start(
        [
            "-c",
            "import analyze, os, pathlib, sys; analyze.train_one(sys.argv[2:], "
            "pathlib.Path(sys.argv[1]), os.environ)",
            tmp_path / "run",
            *argv,
        ]
    )
    output = tmp_path / "run/output.txt"
    try:
        wait_until(
            lambda: output.exists() and re.search("^step .* loss ", output.read_text(), re.M)
        )
        (child,) = children(study.pid)
    finally:
        study.kill()
        study.communicate()
    try:
        wait_until(lambda: "stopped by SIGTERM, saved at step" in output.read_text())
    except AssertionError:
        os.kill(child, signal.SIGKILL)  # or it would train on for ever
        raise
    with open(tmp_path / "run/log.jsonl") as log:  # nobody else has it
        wait_until(lambda: not is_locked(log))


WORKER = """
# Runs several trainings in the same processes and notes what each sends: the buckets of
# DistributedDataParallel and every all-reduce of Python's.
import json, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
import data, train
data.SHAPES_SPLITS.update(train=(0, 96), val=(2**30, 60))
dist.init_process_group("gloo")
sent, make, reduce = {}, DDP.__init__, dist.all_reduce

def count(what, tensor):
    sent[name][what] = sent[name].get(what, 0) + tensor.numel() * tensor.element_size()

def hook(state, bucket):
    count("gradients", bucket.buffer())
    bucket.buffer().div_(dist.get_world_size())
    return reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

def counted_init(self, *args, **kwargs):
    make(self, *args, **kwargs)
    self.register_comm_hook(None, hook)

def counted(function):
    def call(tensor, *args, **kwargs):
        for t in tensor if isinstance(tensor, list) else [tensor]:
            count("other", t)
        return function(tensor, *args, **kwargs)
    return call

DDP.__init__ = counted_init
for function in ("all_reduce", "all_gather", "broadcast"):
    setattr(dist, function, counted(getattr(dist, function)))
for name, argv in json.load(open(sys.argv[1])).items():
    sent[name] = {}
    assert train.main(argv) == 0, name
if dist.get_rank() == 0:
    json.dump(sent, open(sys.argv[2], "w"))
dist.destroy_process_group()
"""

VARIANTS = {
    "plain": "--sam-rho 0",
    "sam": "--sam-rho 0.1",
    "sam, every 2nd step": "--sam-rho 0.1 --sam-every 2 --dropout 0.2",
    "plain, all": "--sam-rho 0 --stem conv --dropout 0.2 --drop-path 0.2 --mixup 0.5 "
    "--ema-decay 0.9 --grad-clip 0.5",
    "sam, all": "--sam-rho 0.1 --stem conv --dropout 0.2 --drop-path 0.2 --mixup 0.5 "
    "--ema-decay 0.9 --grad-clip 0.5",
    "repeated augmentation": "--repeated-augment 3 --augment crop --mixup 0.8 --cutmix 1 "
    "--ema-alpha 0.01 --ema-every 3",
    "sam, all, one micro-batch each": "--sam-rho 0.1 --stem conv --dropout 0.2 --mixup 0.5 "
    "--micro-batch 16",
    "adversarial": "--sam-rho 0 --adv-eps 8/255 --stem conv --dropout 0.2 --drop-path 0.2 "
    "--mixup 0.5 --ema-decay 0.9 --grad-clip 0.5",
    "adversarial, sam": "--sam-rho 0.1 --adv-eps 8/255 --sam-sync --stem conv --dropout 0.2",
    "sam of the whole batch": "--sam-rho 0.1 --sam-sync --stem conv --dropout 0.2 --mixup 0.5 "
    "--optimizer sgd --lr 0.05",
    "contrastive": "--sam-rho 0 --loss supcon --augment crop --stem conv --dropout 0.2 "
    "--drop-path 0.2 --optimizer lamb --ema-decay 0.9 --grad-clip 0.5",
    "contrastive, sam": "--sam-rho 0.1 --loss supcon --augment crop --stem conv --dropout 0.2",
    "head": "--init-from CONTRASTIVE --train-only head --stem conv --dropout 0.2 --sam-rho 0.1 "
    "--optimizer rmsprop --eps 1",
}


def test_two_processes_train_as_one_and_sam_sends_what_plain_training_sends(
    tmp_path, monkeypatch, small_shapes
):
    monkeypatch.setitem(data.SHAPES_SPLITS, "train", (0, 96))  # 6 steps
    first = tmp_path / f"{list(VARIANTS).index('contrastive')}-2/ckpt.pt"
    runs = {
        name: tiny(
            tmp_path / f"{i}-2",
            flags.replace("CONTRASTIVE", str(first)),
            "--dtype float64",
            dataset=(
                "--dataset shapes --train-fraction 1 --batch-size 32 --micro-batch 8 --epochs 2 "
                "--warmup-steps 3 --log-every 4 --eval-every 2"
            ),
        )
        for i, (name, flags) in enumerate(VARIANTS.items())
    }
    at = list(VARIANTS).index("sam, all")
    begun = [a.replace(f"{at}-2", f"{at}-cut-2") for a in runs["sam, all"]] + ["--max-steps", "4"]
    (tmp_path / "runs.json").write_text(json.dumps({**runs, "begun": begun}))
    (tmp_path / "worker.py").write_text(WORKER)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            tmp_path / "worker.py",
            tmp_path / "runs.json",
            tmp_path / "sent.json",
        ],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    sent = json.loads((tmp_path / "sent.json").read_text())
    for i, (name, argv) in enumerate(runs.items()):
        two = torch.load(tmp_path / f"{i}-2/ckpt.pt", weights_only=True)
        one = train_ok([a.replace(f"{i}-2", f"{i}-1") for a in argv])
        weights = largest_difference(one["model"], two["model"])
        averages = largest_difference(one["ema"], two["ema"]) if one["ema"] else 0.0
        assert one["final"].keys() == two["final"].keys()
        measures = np.max(
            [
                abs(one["final"][what][measure] - two["final"][what][measure])
                for what in one["final"]
                for measure in ("top1", "top5", "nll", "ece")
            ]
        )
        print(
            f"{name:32} weights {weights:.1e}  average {averages:.1e}  measures {measures:.1e}  "
            f"bytes {sent[name]}"
        )
        assert max(weights, averages) < 1e-9 and measures < 1e-9, (
            name,
            weights,
            averages,
            measures,
        )
        assert one["final"]["validation"]["images"] == two["final"]["validation"]["images"] == 60
        logs = [
            [r["loss"] for r in log_without_times(tmp_path / f"{i}-{n}") if "loss" in r]
            for n in (1, 2)
        ]
        assert np.allclose(*logs, rtol=1e-5), logs
    cut = [a.replace(f"{at}-2", f"{at}-cut") for a in runs["sam, all"]]
    shutil.copytree(tmp_path / f"{at}-cut-2", tmp_path / f"{at}-cut")
    one = torch.load(tmp_path / f"{at}-1/ckpt.pt", weights_only=True)
    resumed = train_ok([*cut, "--resume"])  # begun by two processes, ended by one
    assert largest_difference(one["model"], resumed["model"]) < 1e-9
    assert sent["plain"] == sent["sam"]
    look = sent["sam, every 2nd step"]
    assert look["gradients"] == sent["sam"]["gradients"]
    assert look["other"] - sent["sam"]["other"] == look["gradients"] * 3 // 6, (
        "g of LookSAM, in 3 of 6 steps"
    )
    assert sent["plain, all"] == sent["sam, all"] == sent["adversarial"]
    parameters = sum(p.numel() for p in tiny_network().parameters())
    assert sent["sam"]["gradients"] == 6 * 8 * parameters, (
        "the gradient once a step, whatever the micro-batches"
    )
    whole = sent["sam of the whole batch"]
    assert whole["other"] - sent["sam, all"]["other"] == whole["gradients"], (
        "only --sam-sync sends the first gradient too"
    )


# --------------------------------------------------------------------------------------- analyze.py


def test_evaluation_takes_several_right_answers_and_a_choice_of_classes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6)).double()
    x = torch.randint(0, 256, (40, 3, 2, 2), dtype=torch.uint8)
    answers = torch.tensor([[i % 6, (i + 1) % 6 if i % 3 else -1] for i in range(40)])
    dataset = data.InMemory(x, answers, list(range(6)))
    chosen = torch.tensor([0, 2, 3, 5])
    for restrict in (None, chosen):
        got = train.evaluate(
            model, data.evaluation_loader(dataset, 7), torch.device("cpu"), restrict_logits=restrict
        )
        right = top5 = nll = 0
        for image, row in zip(x, answers.tolist()):
            z = (model[1].weight @ (image.double() / 255).flatten() + model[1].bias).tolist()
            z = {k: v for k, v in enumerate(z) if restrict is None or k in restrict}
            order = sorted(z, key=lambda k: -z[k])
            right += order[0] in row
            top5 += bool(set(order[:5]) & set(row))
            p = sum(math.exp(v) for k, v in z.items() if k in row)
            nll -= math.log(p / sum(map(math.exp, z.values())))
        assert got["top1"] == 2.5 * right, (restrict, got, right)
        assert got["top5"] == 2.5 * top5
        assert abs(got["nll"] - nll / 40) < 1e-12, (got, nll / 40)


def test_mean_corruption_accuracy_and_mce_follow_their_formulas():
    rng = np.random.default_rng(0)
    top1 = {(c, s): rng.uniform(0, 100) for c in data.CORRUPTIONS for s in data.SEVERITIES}
    parts = {
        "val": 70.0,
        "c-lite/lite_blur/1": 30.0,
        "c-lite/lite_blur/2": 10.0,
        **{f"c/{c}/{s}": value for (c, s), value in top1.items()},
    }
    summary = analyze.robustness_summary(parts)
    assert summary["val"] == 70 and summary["c-lite"] == 20
    assert abs(summary["c"] - sum(top1.values()) / 95) < 1e-9
    ce = [
        sum(100 - top1[c, s] for s in range(1, 6)) / (5 * alexnet)
        for c, alexnet in data.ALEXNET_ERRORS.items()
    ]
    assert len(ce) == 15 and abs(summary["mCE"] - 100 * sum(ce) / 15) < 1e-9
    as_bad = {
        f"c/{c}/{s}": 100 - data.ALEXNET_ERRORS.get(c, 50)
        for c in data.CORRUPTIONS
        for s in data.SEVERITIES
    }
    assert abs(analyze.robustness_summary(as_bad)["mCE"] - 100) < 1e-9, "AlexNet's own mCE"
    assert "mCE" not in analyze.robustness_summary(as_bad, imagenet=False)


def test_robustness_evaluates_what_is_there_and_goes_on_where_it_was(
    tmp_path, capsys, monkeypatch, short_shapes
):
    monkeypatch.chdir(tmp_path)
    runs = [tmp_path / name for name in ("a", "b")]
    for seed, run in enumerate(runs):
        train_ok(tiny(run, f"--max-steps 3 --seed {seed}"))
    command = [
        *"robustness --device cpu --workers 0 --out-dir".split(),
        str(tmp_path / "out"),
        *"--benchmarks val c-lite r --checkpoint".split(),
    ]
    one = str(runs[0] / "ckpt.pt")
    capsys.readouterr()
    assert analyze.main([*command, one]) == 0
    text = capsys.readouterr().out
    assert text.count("missing   r: there is neither data/imagenet-r nor ") == 1, text
    assert "11 parts, 0 done before" in text, text
    saved = json.loads((tmp_path / "out/robustness.json").read_text())
    ((name, parts),) = saved["results"].items()
    assert name.startswith(f"{one} (") and len(parts) == 11
    model = train.assemble(tiny_network(), [0.5], [0.5])
    train.load_weights(model.network, one)
    for part, dataset in (
        ("val", data.load("shapes", "val", image_size=32)),
        (
            "c-lite/lite_noise/5",
            data.Corrupted(data.load("shapes", "val", image_size=32), "lite_noise", 5),
        ),
    ):
        loader = data.evaluation_loader(dataset, 256)
        assert parts[part] == train.evaluate(model, loader, torch.device("cpu")), part
    mean = sum(parts[p]["top1"] for p in parts if p != "val") / 10
    row = next(line for line in text.splitlines() if line.startswith(f"{name} "))
    assert [float(v) for v in row[len(name) :].split()] == [
        round(parts["val"]["top1"], 2),
        pytest.approx(mean, abs=0.006),
    ], row

    # killed in the middle: what is there is not done again, whatever is in it
    parts["val"]["top1"], kept = 12.5, dict(list(parts.items())[:7])
    saved["results"][name] = kept
    (tmp_path / "out/robustness.json").write_text(json.dumps(saved))
    assert analyze.main([*command, one, str(runs[1] / "ckpt.pt")]) == 0
    text = capsys.readouterr().out
    assert "11 parts, 7 done before" in text and "11 parts, 0 done before" in text, text
    again = json.loads((tmp_path / "out/robustness.json").read_text())["results"]
    assert again[name] == parts and len(again) == 2
    assert (tmp_path / "out/robustness.png").exists() == DRAWS

    saved = tmp_path / "out/robustness.png"
    with monkeypatch.context() as patch:  # drawn by whatever is there: it is written as all else is
        patch.setitem(sys.modules, "matplotlib", argparse.Namespace(use=lambda _: None))
        drawing = argparse.Namespace(
            subplots=lambda *_: None, savefig=lambda file, dpi: file.write(b"drawn")
        )
        pyplot = argparse.Namespace(figure=lambda **_: drawing, close=lambda _: None)
        sys.modules["matplotlib"].pyplot = pyplot
        patch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
        analyze.figure(saved, lambda axes: None)
        assert saved.read_bytes() == b"drawn"
        saved.unlink()
        saved.mkdir()
        with pytest.raises(analyze.UserError, match="robustness.png cannot be written: Is a dir"):
            analyze.figure(saved, lambda axes: None)
        saved.rmdir()

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert analyze.main([*command, one]) == 0
    assert "matplotlib is not installed (pip install matplotlib)" in capsys.readouterr().out
    capsys.readouterr()
    assert analyze.main([*command, one, "--mean", "0.1", "--std", "0.9"]) == 0
    text = capsys.readouterr().out
    assert "11 parts, 0 done before" in text, "another normalisation gives other numbers"
    load = data.load

    def one_missing(name, *more, **arguments):
        dataset = load(name, *more, **arguments)
        if isinstance(dataset, data.InMemory):
            monkeypatch.setattr(data, "Corrupted", broken)
        return dataset

    def broken(dataset, corruption, severity):
        raise data.DataError(f"{corruption} at {severity} is unpacked by half")

    monkeypatch.setattr(data, "load", one_missing)
    assert (
        analyze.main([*command[:4], "0", "--out-dir", str(tmp_path / "half"), "--checkpoint", one])
        == 0
    )
    text = capsys.readouterr().out
    assert "missing   c-lite: parts of it, so it has no number" in text, text
    assert text.count("c-lite") == 1, text
    (tmp_path / "out/robustness.json").write_text('{"results": {')
    assert "robustness.json is damaged: remove it" in analyze_refusal(capsys, *command, one)


def test_mistakes_in_an_analysis_get_one_line_that_helps(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    for argv, words in [
        ([], "the following arguments are required: SUBCOMMAND"),
        (["robustnes"], "invalid choice: 'robustnes'"),
        (["robustness"], "needs either --checkpoint RUN/ckpt.pt or --model NAME --init-from"),
        (["robustness", "--checkpoint", "a.pt", "--init-from=b.pt"], "needs either --checkp"),
        (["robustness", "--checkpont", "a.pt"], "unknown flag --checkpont; did you mean --checkp"),
        (["robustness", "--checkpoint", "no.pt"], "no.pt: No such file"),
        (["robustness", "--checkpoint", "text.pt"], "text.pt is no checkpoint"),
        (["reproduce", "--out-dir", "text.pt"], "text.pt is, or lies in, a file: name a folder"),
        (["reproduce", "--out-dir", "text.pt/x"], "text.pt/x is, or lies in, a file"),
        (
            ["robustness", "--checkpoint", "text.pt", "--benchmarks", "imagenet"],
            "invalid choice: 'imagenet'",
        ),
        (
            ["robustness", "--checkpoint", "text.pt", "--data-dri", "x"],
            "unknown flag --data-dri; did you mean --data-dir",
        ),
    ]:
        line = analyze_refusal(capsys, *argv)
        assert words in line, (argv, line)


def test_an_attack_on_a_checkpoint_reports_what_it_did_and_goes_on_where_it_was(
    tmp_path, capsys, monkeypatch, short_shapes
):
    for seed in (0, 1):
        train_ok(tiny(tmp_path / str(seed), f"--max-steps 10 --lr 0.01 --seed {seed}"))
    one, two = (str(tmp_path / str(seed) / "ckpt.pt") for seed in (0, 1))
    command = [
        "--checkpoint",
        one,
        *"--device cpu --eps 4/255 --steps 4 --batch-size 16 --out-dir".split(),
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(adversarial, "CHUNK", 25)
    calls, under_attack = [], train.under_attack

    def counted(model, dataset, side, device, positions, *more, **how):
        calls.append(len(positions))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return under_attack(model, dataset, side, device, positions, *more, **how)

    monkeypatch.setattr(train, "under_attack", counted)
    capsys.readouterr()
    assert adversarial.main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    more = ["--transfer-from", two, "--strength-images", "20", "--save-images", "3"]
    assert adversarial.main([*command, *more]) == 0
    assert calls[:4] == [25, 25, 25, 10], "the first chunk is not attacked again"
    text = capsys.readouterr().out
    done = len(calls)
    assert adversarial.main([*command, *more]) == 0
    assert calls[done:] == [3], "only the pictures are made anew"
    assert capsys.readouterr().out == text

    saved = json.loads((tmp_path / "out/adversarial.json").read_text())
    ((name, parts),) = saved["results"].items()
    assert name.startswith(one) and not any("chunk" in part for part in parts)
    key = (
        "pgd: 60 images, eps 0.0156863, step_size 0.00196078, steps 4, random_start True, "
        "norm linf, targeted False, early_stop False, restarts 1, seed 0"
    )
    result = parts[key]
    model = train.assemble(tiny_network(), [0.5], [0.5])
    train.load_weights(model.network, one)
    x, y = data.shapes(range(2**30, 2**30 + 60))
    want = adversarial.summary(
        [
            adversarial.robustness(
                model.eval(),
                [(x.float() / 255, y, list(range(60)))],
                eps=4 / 255,
                step_size=0.5 / 255,
                steps=4,
            )
        ]
    )
    assert result.pop("attack")["steps"] == 4
    assert result["robust"] == want["robust"] and result["last"] == want["last"]
    assert np.allclose(result["loss"], want["loss"], rtol=1e-4) and result["images"] == 60
    for line in (
        f"clean     {want['clean']:.2f} % of 60 images",
        "pgd       ε = 4/255 (linf), step 0.5/255, 4 steps, 1 restart",
        f"     4{want['robust'][4]:12.2f}{want['last'][4]:25.2f}",
        "accuracy falls as ε grows: yes",
        "accuracy falls from step to step: yes",
        "accuracy is about 0 at the largest ε: yes",
        "transfer  of 20 images, by the",
    ):
        assert line in text, (line, text)
    with Image.open(tmp_path / "out/adversarial_images.png") as picture:
        assert picture.width == 6 + 3 * 134 and picture.height > 3 * 128
    assert (tmp_path / "out/adversarial.png").exists() == DRAWS

    few = ["--strength-images", "0"]
    assert adversarial.main([*command, *few, "--early-stop"]) == 0
    early = capsys.readouterr().out
    assert [line.split()[:2] for line in early.splitlines() if line.startswith("     ")] == [
        line.split()[:2] for line in text.splitlines() if re.match(r" {5}\d", line)
    ], "the same accuracies"
    for flags in (
        ["--attack", "fgsm", "--steps", "1"],
        ["--norm", "l2", "--eps", "1"],
        ["--targeted"],
        ["--restarts", "2"],
        ["--no-random-start", "--dtype", "float64"],
    ):
        assert adversarial.main([*command, *few, *flags]) == 0, flags
    text = capsys.readouterr().out
    assert "fgsm      ε = 4/255 (linf), step 5/255, 1 step, 1 restart" in text, text
    assert "pgd       ε = 1 (l2), step 0.125, 4 steps, 1 restart\n" in text, text


def test_a_checkpoint_that_gives_nan_and_one_of_other_classes_are_refused_by_an_attack(
    tmp_path, capsys, small_shapes
):
    state = train_ok(tiny(tmp_path / "run", "--max-steps 1 --train-fraction 1"))
    one = str(tmp_path / "run/ckpt.pt")
    train_ok(tiny(tmp_path / "large", "--max-steps 1 --train-fraction 1 --image-size 64"))
    assert "it has other classes, or another image size" in attack_refusal(
        capsys, "--checkpoint", one, "--transfer-from", tmp_path / "large", "--device", "cpu"
    )
    state["model"]["head.weight"].fill_(math.nan)
    torch.save(state, tmp_path / "nan.pt")
    assert "is not finite for some images: nothing to attack" in attack_refusal(
        capsys, "--checkpoint", tmp_path / "nan.pt", "--device", "cpu"
    )
    assert (
        train.main(
            [
                "--eval-only",
                "--eval-adv",
                "--init-from",
                str(tmp_path / "nan.pt"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-1].endswith("nan")


def test_mistakes_in_an_attack_get_one_line_that_helps(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    for argv, words in [
        (["--checkpoint", "no.pt"], "no.pt: No such file"),
        (["--checkpoint", "text.pt"], "text.pt is no checkpoint"),
        (["--checkpoint", "text.pt", "--eps", "2"], "--eps is 2; pixels are in [0, 1]"),
        (["--checkpoint", "text.pt", "--eps", "0"], "--eps is 0; pixels are in [0, 1]"),
        (["--checkpoint", "text.pt", "--norm", "l2"], "--norm l2 needs --eps"),
        (
            ["--checkpoint", "text.pt", "--attack", "fgsm", "--steps", "3"],
            "--attack fgsm takes one step",
        ),
        (["--checkpoint", "text.pt", "--init-from=x.npz"], "or --init-from, not both"),
        (
            ["--init-from", "x.npz", "--model", "vit_s16", "--adv-eps", "2/255"],
            "--adv-eps is of training; the attack's is --eps",
        ),
        (["--checkpoint", "text.pt", "--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--checkpoint", "text.pt", "--step-size", "-1"], "--step-size is -1; it must be"),
        (
            ["--checkpoint", "text.pt", "--restarts", "2", "--no-random-start"],
            "--restarts needs a random start",
        ),
        (
            ["--init-from", "x.npz", "--model", "vit_s16", "--stepz", "3"],
            "unknown flag --stepz; did you mean --steps",
        ),
        (
            ["--init-from", "x.npz", "--model", "vit_s16", "--dtype", "bfloat16"],
            "--dtype bfloat16: attacks are computed in float32 or float64",
        ),
    ]:
        line = attack_refusal(capsys, *argv)
        assert words in line, (argv, line)
    for argv, words in [
        (["--steps", "3"], "an attack needs --checkpoint RUN/ckpt.pt"),
        (["--cost", "1", "--bogus"], "--cost ROUNDS stands alone"),
        (["--eps", "2/x"], "'2/x' is no number; give one as 0.0078 or 2/255"),
    ]:
        with pytest.raises(SystemExit) as stop:
            adversarial.main(argv)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_robustness_shows_what_sam_changes_against_the_same_training_without(
    tmp_path, capsys, short_shapes
):
    """The numbers in parentheses of Chen Table 5: against the run with all settings but SAM's
    equal."""
    runs = {"plain": "--sam-rho 0", "sam": "--sam-rho 1", "other": "--sam-rho 0 --lr 0.1"}
    for name, flags in runs.items():
        train_ok(tiny(tmp_path / name, "--max-steps 5 --adv-eps 2/255 --lr 0.05", flags))
    capsys.readouterr()
    assert (
        analyze.main(
            [
                *"robustness --device cpu --benchmarks val pgd --out-dir".split(),
                str(tmp_path / "out"),
                "--checkpoint",
                *(str(tmp_path / name / "ckpt.pt") for name in runs),
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("top-1 %"))
    rows = [line.split()[-2:] for line in lines[at + 1 : at + 5]]
    assert lines[at].split()[-2:] == ["val", "pgd"] and "against without SAM" in lines[at + 3]
    plain, sam, difference = (np.array(row, float) for row in rows[:3])
    assert np.allclose(sam - plain, difference, atol=0.011) and difference.any(), rows
    assert sum("against without SAM" in line for line in lines) == 1


STUDIED = "vit_micro8 --dim 24 --depth 2 --heads 2 --mlp-dim 48"
STUDY = (
    "--dataset shapes --train-fraction 1/50 --batch-size 32 --micro-batch 16 --warmup-steps 3 "
    "--sam-rho 0 --log-every 4 --device cpu --workers 0"
).split()
FEW = [word.replace("1/50", "4/5") for word in STUDY]  # of the 200 images of in_process


@pytest.fixture
def in_process(monkeypatch, short_shapes):
    """Studies train in this process, which saves importing torch, on 160 of 200 images, which take
    less making than 8,000; the list of what they trained."""
    monkeypatch.setitem(data.SHAPES_SPLITS, "train", (0, 200))
    trained = []

    def train_one(argv, folder, environment):
        assert "RANK" not in environment and "LOCAL_RANK" not in environment
        trained.append(folder.name)
        return train.main(argv)

    monkeypatch.setattr(analyze, "train_one", train_one)
    return trained


def final_top1(folder):
    return log_without_times(folder)[-1]["final"]["validation"]["top1"]


def table_in(text, column):
    """Header and rows of the printed table that has a column of this name."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if f"  {column}" in line)
    rows = [re.split(r" {2,}", line) for line in lines[start:]]
    return rows[0], [row for row in rows[1:] if len(row) == len(rows[0])]


def test_error_distributions_stand_ins_and_deltas_follow_their_definitions():
    errors, shares = analyze.edf([3.0, None, 0.5, 3.0, 1.0])
    assert errors == [0.5, 1.0, 3.0, 3.0] and np.allclose(shares, [0.2, 0.4, 0.6, 0.8])
    assert analyze.stand_in({50: 60.0, 100: None, 200: 58.0, 400: None}) == {
        50: 60,
        100: 60,
        200: 58,
        400: 60,
    }
    assert analyze.stand_in({50: None, 100: 70.0}) == {50: None, 100: 70}

    def run(optimizer, epochs, top1, model="m"):
        return dict(
            model=model, optimizer=optimizer, epochs=epochs, top1=top1, diverged=top1 is None
        )

    runs = [
        run("adamw", 50, 70.0),
        run("adamw", 400, 78.0),
        run("sgd", 50, 66.0),
        run("sgd", 400, None),
    ]
    analyze.subtract_reference("optimizer", runs)
    assert [r["delta"] for r in runs] == [0, 0, 4, 12] and runs[3]["compared"] == 66
    assert analyze.stability_rows("optimizer", runs, {})[1] == {
        "model": "m",
        "epochs": 400,
        "adamw %": "78.00",
        "sgd %": "66.00*",
        "Δ": "12.00*",
    }
    analyze.subtract_reference("length", runs)
    assert [r["delta"] for r in runs] == [8, 0, 0, 0]
    analyze.subtract_reference("lr-wd", runs)
    assert [r["delta"] for r in runs] == [8, 0, 0, None]


def test_random_pairs_are_log_uniform_in_the_interval_and_the_same_everywhere():
    lr, wd = (2.5e-4, 8e-3), (0.02, 0.8)
    pairs = analyze.random_pairs(2000, lr, wd, 0)
    assert pairs[:3] == analyze.random_pairs(3, lr, wd, 0) != analyze.random_pairs(3, lr, wd, 1)
    for values, (low, high) in zip(np.log(pairs).T, np.log([lr, wd])):
        place = (values - low) / (high - low)
        assert -1e-3 < place.min() < 0.01 and 0.99 < place.max() < 1.001
        assert abs(place.mean() - 0.5) < 0.03 and abs(place.std() - 12**-0.5) < 0.02
    assert abs(np.corrcoef(np.log(pairs).T)[0, 1]) < 0.1
    wider = analyze.random_pairs(2, (lr[0] * 10, lr[1] * 10), wd, 0)
    assert np.allclose(wider[1], [pairs[1][0] * 10, pairs[1][1]], rtol=1e-2)


def test_the_search_climbs_to_an_optimum_that_no_neighbour_surpasses_and_asks_once():
    asked = []

    def top1_of(points):
        asked.extend(points)
        return [
            None if lr > 0.5 else 90 - abs(math.log(lr / peak)) - abs(math.log(wd / 1e-3))
            for (peak, _), lr, wd in points
        ]

    # steps of a factor 3, to three digits: 0.1 / 3⁴ and 0.2 / 3³
    found = analyze.search({(0.1, "a"): (0.1, 0.1), (0.01, "b"): (0.2, 1e-3)}, top1_of)
    assert found == {(0.1, "a"): (0.1, 0.00123), (0.01, "b"): (0.00741, 1e-3)}, found
    assert len(asked) == len(set(asked))


def test_optima_intervals_and_values_are_those_of_the_papers_tables(capsys):
    """Xiao et al. Table 4, at their batch of 2048 and scaled linearly to another; Chen et al.
    Table 10 (ρ), App. E (grid) and App. F (twice the epochs)."""
    table = {
        "vit_p_1gf": "2e-3 0.2 1.9 1.3e-5",
        "vit_p_4gf": "2e-3 0.2 1.9 1.3e-5",
        "vit_p_18gf": "1e-3 0.24 1.1 1.2e-5",
        "vit_c_1gf": "2.5e-3 0.19 1.9 1.3e-5",
        "vit_c_4gf": "1e-3 0.24 1.3 2.2e-5",
        "vit_c_18gf": "1e-3 0.24 1.1 2.7e-5",
        **{f"regnety_{size}gf": "3.8e-3 0.1 2.54 2.4e-5" for size in (1, 4, 16)},
    }

    def dry_run(*argv):
        assert analyze.main(["stability", "--dry-run", "--device", "cpu", *argv]) == 0
        lines = capsys.readouterr().out.splitlines()
        commands = [shlex.split(line)[2:] for line in lines if line.startswith("python train.py ")]
        assert all(argv[-1] == "--resume" for argv in commands)
        return [train.settings(argv)[0] for argv in commands]

    runs = dry_run("--study", "optimizer")
    assert len(runs) == 72 and {run.epochs for run in runs} == {50, 100, 200, 400}
    assert len({run.out_dir for run in runs}) == 72
    for run in runs:
        numbers = list(map(float, table[run.model].split()))
        lr, wd = numbers[:2] if run.optimizer == "adamw" else numbers[2:]
        assert (run.lr, run.weight_decay, run.recipe[:5]) == (lr, wd, "xiao_"), vars(run)
        assert run.nesterov == (run.optimizer == "sgd") and run.batch_size == 2048
        assert abs(run.lr_end / run.lr - 0.005) < 1e-4, vars(run)
    best = {run.model: run.optimizer for run in dry_run("--study", "length")}
    assert best == {model: "sgd" if "regnety" in model else "adamw" for model in table}
    for model, optimizer, lr, wd in (
        ("vit_c_4gf", "adamw", (2.5e-4, 8e-3), (0.02, 0.8)),
        ("vit_p_4gf", "sgd", (0.1, 3.2), (4e-6, 1.2e-4)),
        ("regnety_4gf", "adamw", (1.25e-3, 4e-2), (7.5e-3, 0.24)),
        ("regnety_4gf", "sgd", (0.25, 8), (3e-6, 8e-5)),
    ):
        runs = dry_run(
            "--study",
            "lr-wd",
            "--models",
            model,
            "--vary",
            "optimizer",
            optimizer,
            "--batch-size",
            "1024",
        )
        assert len(runs) == 65 and {run.epochs for run in runs} == {50}
        for values, (low, high) in (
            ([2 * run.lr for run in runs[1:]], lr),
            ([run.weight_decay for run in runs[1:]], wd),
        ):
            assert low <= min(values) < 1.3 * low and high / 1.3 < max(values) <= high, (model, lr)
    table_10 = {
        "vit_b16": [0, 0.05, 0.1, 0.2, 0.25],
        "mixer_b16": [0, 0.05, 0.25, 0.35, 0.4, 0.5, 0.6, 0.65],
    }
    assert [(run.model, run.sam_rho) for run in dry_run("--study", "rho")] == [
        (model, rho) for model, row in table_10.items() for rho in row
    ]
    grid = {
        (run.lr, run.weight_decay, run.dropout, run.drop_path) for run in dry_run("--study", "grid")
    }
    assert len(grid) == 24 and (3e-3, 0.3, 0.0, 0.1) in grid
    assert [run.epochs for run in dry_run("--study", "doubled")] == [300, 600] * 2


def test_a_study_of_optimizers_tells_what_its_runs_logs_say_and_goes_on(
    tmp_path, capsys, in_process
):
    command = [
        *"stability --study optimizer --models".split(),
        STUDIED,
        *FEW,
        *"--vary epochs 1 2 --optimum adamw 2e-3 0.1 --optimum sgd 9e18 0 --out-dir".split(),
        str(tmp_path),
    ]
    slug = STUDIED.replace(" --", "-").replace(" ", "-")
    names = {
        (o, e): f"{slug}-{o}-epochs{e}-{rest}"
        for e in (1, 2)
        for o, rest in (("adamw", "lr0.002-weight_decay0.1"), ("sgd", "lr9e+18-weight_decay0"))
    }
    cut = tmp_path / "runs" / names["adamw", 2]
    train_ok(
        [
            *TINY,
            *FEW,
            *"--epochs 2 --lr 2e-3 --weight-decay 0.1 --no-nesterov --lr-end 0.0".split(),
            *"--max-steps 3 --out-dir".split(),
            str(cut),
        ]
    )
    assert analyze.main(command) == 0
    text = capsys.readouterr().out
    assert in_process == [names[k] for k in (("adamw", 2), ("sgd", 2), ("adamw", 1), ("sgd", 1))]
    assert f"resumed   {cut}/ckpt.pt at step 3" in text and "4 trainings, 0 done before" in text
    top1 = {e: final_top1(tmp_path / "runs" / names["adamw", e]) for e in (1, 2)}
    header, rows = table_in(text, "adamw %")
    assert header == ["model", "epochs", "adamw %", "sgd %", "Δ"], header
    assert rows == [[STUDIED, str(e), f"{top1[e]:.2f}", "*", "*"] for e in (1, 2)], rows
    saved = json.loads((tmp_path / "optimizer.json").read_text())
    runs = saved["results"][STUDIED]
    assert set(runs) == set(names.values()) and saved["settings"][STUDIED]["dim"] == 24
    for (optimizer, epochs), name in names.items():
        run = runs[name]
        assert (run["optimizer"], run["epochs"], run["diverged"]) == (
            optimizer,
            epochs,
            optimizer == "sgd",
        )
        assert run["top1"] == (top1[epochs] if optimizer == "adamw" else None)
    assert (tmp_path / "optimizer.png").exists() == DRAWS

    # what ended is not started again, also what diverged; other studies share it
    in_process.clear()
    assert analyze.main(command) == 0
    assert in_process == [] and "4 trainings, 4 done before" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "runs" / names["adamw", 1])
    assert (
        analyze.main([w.replace("optimizer", "length") if w == "optimizer" else w for w in command])
        == 0
    )
    header, rows = table_in(capsys.readouterr().out, "2 epochs")
    assert in_process == [names["adamw", 1]] and rows == [
        [f"{STUDIED}, adamw", f"{top1[2] - top1[1]:.2f}", "0.00", f"{top1[2]:.2f}"]
    ], rows
    line = analyze_refusal(capsys, *command, "--beta1", "0.8")
    assert "was run with other settings (--beta1 0.9 → 0.8)" in line, line
    log = tmp_path / "runs" / names["adamw", 1] / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "diverged": true}\n')
    assert analyze.outcome(
        train.settings(
            [
                *TINY,
                *FEW,
                *"--epochs 1 --lr 2e-3 --weight-decay 0.1 --no-nesterov --lr-end 0.0".split(),
                "--out-dir",
                str(log.parent),
            ]
        )[0]
    )["diverged"]


def test_a_study_of_random_pairs_starts_from_a_searched_optimum(tmp_path, capsys, in_process):
    command = [
        *"stability --study lr-wd --models".split(),
        STUDIED,
        *FEW,
        *"--vary epochs 1 --vary optimizer adamw --pairs 3 --out-dir".split(),
        str(tmp_path),
    ]
    assert analyze.main(command) == 0
    text = capsys.readouterr().out
    lr, wd = map(
        float,
        re.search(r"learning rate (\S+), weight decay (\S+), found by the search", text).groups(),
    )
    runs = json.loads((tmp_path / "lr-wd.json").read_text())["results"][STUDIED]
    folders = {p.name: final_top1(p) for p in (tmp_path / "runs").iterdir()}
    (optimum,) = [run for run in runs.values() if not run["random"]]
    assert len(runs) == 4 and (optimum["lr"], optimum["weight_decay"]) == (lr, wd)
    searched = set(folders) - set(runs) | {name for name, run in runs.items() if not run["random"]}
    assert len(searched) >= 5 and optimum["top1"] == max(folders[name] for name in searched)
    best = max(folders[name] for name in runs)
    for name, run in runs.items():
        assert run["top1"] == folders[name] and run["delta"] == best - folders[name], run
        assert lr / 8 * 0.99 <= run["lr"] <= lr * 4.01 and wd / 8 * 0.99 <= run["weight_decay"]
    within = sum(best - folders[name] <= 2 for name, run in runs.items() if run["random"])
    header, (row,) = table_in(text, "best top-1 %")
    assert row[header.index("Δ ≤ 2")] == f"{within} of 3" and row[-1] == "0", row


def test_transfer_chooses_the_learning_rate_on_held_out_images_and_then_trains_on_all(
    tmp_path, capsys, in_process, monkeypatch
):
    train_ok(tiny(tmp_path / "run", "--train-fraction 4/5 --max-steps 3"))
    monkeypatch.setattr(analyze, "BASE_LR", [1e-3, 0.3])
    monkeypatch.setitem(analyze.TABLE_6, "vit_micro8", (50.0, 60.0, 70.0, 80.0))
    command = [
        "transfer",
        "--checkpoint",
        str(tmp_path / "run/ckpt.pt"),
        *"--datasets shapes --image-size 32 --batch-size 32 --max-steps 4".split(),
        *"--warmup-steps 1 --train-fraction 4/5 --device cpu --workers 0".split(),
    ]
    assert analyze.main(command) == 0
    text = capsys.readouterr().out
    ((name, results),) = json.loads((tmp_path / "run/transfer.json").read_text())["results"].items()
    runs = (tmp_path / "run/transfer").iterdir()
    folders = {p.name.partition("-")[2]: final_top1(p) for p in runs}  # without the file's hash
    held_out = {lr: folders[f"shapes-part-lr{lr}"] for lr in ("0.001", "0.3")}
    best = max(held_out, key=held_out.get)
    assert set(folders) == {"shapes-part-lr0.001", "shapes-part-lr0.3", f"shapes-all-lr{best}"}
    got = results["shapes"]
    assert (got["lr"], got["held_out"], got["top1"]) == (
        float(best),
        held_out,
        folders[f"shapes-all-lr{best}"],
    )
    configs = [
        json.loads(p.read_text())["settings"]
        for p in sorted((tmp_path / "run/transfer").glob("*/config.json"))
    ]
    assert [c["hold_out"] for c in configs] == ["0", "1/10", "1/10"]
    assert {
        (c["optimizer"], c["weight_decay"], c["grad_clip"], c["dim"], c["reset_head"])
        for c in configs
    } == {("sgd", 0.0, 1.0, 24, True)}
    header, rows = table_in(text, "average")
    assert rows[0][1:] == [f"{got['top1']:.2f}"] * 2, rows
    assert analyze.main(command) == 0 and len(in_process) == 3, in_process
    for flag in (("--lr", "1"), ("--recipe", "chen_vit"), ("--hold-out", "1/2")):
        assert f"{flag[0]} is chosen by this command" in analyze_refusal(capsys, *command, *flag)


def test_mistakes_in_a_study_get_one_line_before_any_training(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analyze, "train_one", lambda *_: pytest.fail("it trained"))
    length = ["--study", "length", "--dataset", "shapes", "--device", "cpu", "--models"]
    for argv, words in [
        ([], "the following arguments are required: --study"),
        (["--study", "depth"], "argument --study: invalid choice: 'depth'"),
        ([*length, "vit_micro"], "unknown model 'vit_micro', did you mean 'vit_micro8'?"),
        ([*length, "vit_micro8 --dmi 3"], "unknown flag --dmi; did you mean --dim"),
        ([*length, "vit_micro8", "--betta1", "0.8"], "unknown flag --betta1; did you mean"),
        ([*length, "vit_micro8", "--epochs", "3"], "--epochs is what the study varies"),
        ([*length, "vit_micro8", "--lr", "3"], "--lr is the optimal one in this study"),
        ([*length, "vit_micro8", "--resume"], "--resume is for train.py"),
        ([*length, "vit_micro8", "--model", "x"], "--model: stability has --models"),
        ([*length, "vit_micro8", "--vary", "lr", "1"], "length varies optimizer and epochs"),
        ([*length, "vit_micro8", "--vary", "epochs"], "give one of these and its values"),
        (
            [*length, "vit_micro8", "--vary", "epochs", "3", "ten"],
            "--vary epochs ten: takes numbers",
        ),
        ([*length, "vit_micro8", "--vary", "epochs", "3", "0.5"], "invalid int value: '0.5'"),
        ([*length, "vit_micro8", "--optimum", "adamw", "x", "1"], "--optimum adamw x 1: give"),
        ([*length, "vit_micro8", "--optimum", "adamw", "nan", "1"], "--optimum adamw nan 1: give"),
        ([*length, "vit_micro8", "--optimum", "adamw", "1", "-1"], "--optimum adamw 1 -1: give"),
        ([*length, "vit_micro8", "--optimum", "adam", "1", "1"], "--optimum adam 1 1: give"),
        ([*length, "vit_micro8", "--pairs", "9"], "--pairs is of the study lr-wd, not of length"),
        (["--study", "rho", "--optimum", "adamw", "1", "1"], "--optimum is of the studies"),
        (["--study", "rho", "--vary", "sam-rho", "paper"], "--vary sam-rho paper: takes numbers"),
        (["--study", "lr-wd", "--vary", "epochs", "1", "2"], "of one length"),
        (["--study", "lr-wd", "--pairs", "0"], "--pairs is 0"),
        (["--study", "lr-wd", "--optimum", "adamw", "1e-3", "0"], "its weight decay is 0"),
    ]:
        line = analyze_refusal(capsys, "stability", *argv)
        assert words in line, (argv, line)
    assert not any(tmp_path.rglob("config.json"))


def test_a_training_of_a_study_has_the_device_of_its_process_and_none_of_torchruns_variables(
    monkeypatch,
):
    torchrun = dict(
        RANK="9",
        LOCAL_RANK="1",
        GROUP_RANK="1",
        WORLD_SIZE="16",
        MASTER_PORT="1",
        LOCAL_WORLD_SIZE="8",
        MASTER_ADDR="x",
        TORCHELASTIC_RUN_ID="y",
    )
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")
    environment = analyze.child_environment("cuda")
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-5" and not torchrun.keys() & environment
    assert analyze.child_environment("cpu")["CUDA_VISIBLE_DEVICES"] == "4,GPU-5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert analyze.child_environment("cuda")["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert analyze.child_environment("cuda")["CUDA_VISIBLE_DEVICES"] == "0", "shared"


def test_a_training_of_a_study_ends_with_the_study_whatever_ends_it(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text("import time\ntime.sleep(300)\n")
    monkeypatch.setattr(train, "__file__", str(script))

    def enough(*_):
        raise LongEnough

    before, others = signal.signal(signal.SIGALRM, enough), children(os.getpid())
    try:
        signal.setitimer(signal.ITIMER_REAL, 1)
        with pytest.raises(LongEnough):
            analyze.train_one([], tmp_path / "run", dict(os.environ))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert children(os.getpid()) == others


def test_analyses_share_cuda_devices_and_trainings_do_not(monkeypatch):
    joined, taken = [], []
    monkeypatch.setattr(train, "join", lambda backend, timeout: joined.append(backend))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name, value in dict(WORLD_SIZE="6", LOCAL_WORLD_SIZE="3", LOCAL_RANK="2").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(train.UserError, match="3 processes for 2 CUDA devices: use --nproc_per_no"):
        train.start_processes("cuda")
    assert not joined, "refused before anyone waits"
    shared = train.start_processes("cuda", may_share=True)
    assert shared == (torch.device("cuda:0"), 6, 3) and joined == ["gloo"], "NCCL refuses to share"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for may_share in (False, True):
        train.start_processes("cuda", may_share=may_share)
    assert joined[1:] == ["cpu:gloo,cuda:nccl"] * 2 and taken[1:] == [torch.device("cuda:1")] * 2


def test_processes_share_a_study_and_give_the_numbers_of_one(tmp_path, capsys):
    without_rho = [word for i, word in enumerate(STUDY) if "--sam-rho" not in STUDY[i - 1 : i + 1]]
    command = [
        *"stability --study rho --models".split(),
        STUDIED,
        *without_rho,
        *"--epochs 1 --vary sam-rho 0 0.1 --out-dir".split(),
    ]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
            str(HERE / "analyze.py"),
            *command,
            str(tmp_path / "two"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("rho: 2 trainings, 0 done before") == 1, result.stdout
    assert result.stdout.count("top-1 %  paper") == 1, result.stdout
    runs = json.loads((tmp_path / "two/rho.json").read_text())["results"][STUDIED]
    assert [run["sam_rho"] for run in runs.values()] == [0, 0.1]
    for i, (name, run) in enumerate(runs.items()):
        alone = train_ok(
            [
                *TINY,
                *STUDY,
                "--epochs",
                "1",
                "--sam-rho",
                f"{run['sam_rho']}",
                "--out-dir",
                str(tmp_path / f"{i}"),
            ]
        )
        assert run["top1"] == alone["final"]["validation"]["top1"], (name, run)
        output = (tmp_path / "two/runs" / name / "output.txt").read_text()
        assert "step      32 images = 1 devices" in output, output


def test_ctrl_c_in_a_study_saves_the_run_and_the_study_goes_on(tmp_path, capsys, monkeypatch):
    command = [
        *"stability --study doubled --models".split(),
        STUDIED,
        *STUDY,
        *"--vary epochs 100 --eval-every 1000 --out-dir".split(),
        str(tmp_path),
    ]
    folder = tmp_path / "runs" / (STUDIED.replace(" --", "-").replace(" ", "-") + "-epochs100")
    study = subprocess.Popen(
        [sys.executable, str(HERE / "analyze.py"), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output = folder / "output.txt"
    try:
        wait_until(lambda: output.exists() and "step      8" in output.read_text(), 180)
        study.send_signal(signal.SIGINT)
        _, errors = study.communicate(timeout=60)
    finally:
        study.kill()  # its training ends with it
    assert study.returncode == 130 and errors == (
        "stopped; the same command goes on with what is not finished\n"
    ), errors
    step = torch.load(folder / "ckpt.pt", weights_only=True)["step"]
    assert 0 < step < 500 and f"saved at step {step:,}" in output.read_text()
    monkeypatch.setattr(analyze, "train_one", lambda argv, *_: train.main(argv))
    capsys.readouterr()
    assert analyze.main([*command, "--max-steps", str(step + 2)]) == 0
    assert f"resumed   {folder}/ckpt.pt at step {step:,}" in capsys.readouterr().out


def test_a_training_of_a_study_that_fails_is_told_in_one_line(tmp_path, capsys):
    line = analyze_refusal(
        capsys,
        "stability",
        "--study",
        "doubled",
        "--models",
        "vit_s32",
        "--device",
        "cpu",
        "--data-dir",
        tmp_path / "nowhere",
        "--out-dir",
        tmp_path,
    )
    assert re.search(
        r"vit_s32-epochs600 ended with status 2: train.py: imagenet: \S+ is no folder", line
    ), line


class Quadratic(nn.Module):
    """Its output for each image, whatever that is, is ½ wᵀ A w + Σ w: A is the mean's Hessian."""

    def __init__(self, A, dtype=torch.float64):
        super().__init__()
        self.register_buffer("A", A.to(dtype))
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(len(A), dtype=dtype, generator=generator))

    def forward(self, x):
        return (self.w @ self.A @ self.w / 2 + self.w.sum()).expand(len(x))


QUADRATIC = dict(loss=lambda out, y: out.mean(), batches=[(torch.zeros(2, 1), torch.zeros(2))])


def with_spectrum(values, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    A = Q @ torch.tensor(values, dtype=torch.float64).diag() @ Q.T
    return Quadratic((A + A.T) / 2, dtype)


def small_conv():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Conv2d(4, 3, 3),
        nn.Flatten(),
        nn.Linear(12, 3),
    ).double()
    model[1].running_mean.fill_(0.2)
    model[1].running_var.fill_(0.3)
    return model


def small_vit():
    torch.manual_seed(0)
    model = vit.ViT(
        image_size=6, patch_size=3, dim=4, depth=1, heads=2, mlp_dim=5, num_classes=3
    ).double()
    for p in model.parameters():
        p.data += 0.5 * torch.randn_like(p)
    return model


def small_batches(soft):
    """Of 5, 3 and 1 images."""
    generator = torch.Generator().manual_seed(2)
    for n in (5, 3, 1):
        x = torch.rand(n, 3, 6, 6, dtype=torch.float64, generator=generator)
        y = torch.randint(3, (n,), generator=generator)
        shares = torch.rand(n, 3, dtype=torch.float64, generator=generator)
        yield x, shares / shares.sum(1, keepdim=True) if soft else y


def dense_hessian(model, batches, names=None, decay=0.0, sigmoid=False):
    """∇² of 1/n Σ over images - Σ_c y_c log p_c, or of binary cross-entropies, + ½ decay ‖w‖²."""
    names = list(dict(model.named_parameters())) if names is None else names
    start = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [start[name].numel() for name in names]
    x, y = (torch.cat(column) for column in zip(*batches))
    y = y if y.is_floating_point() else F.one_hot(y, 3).double()

    def loss(w):
        own = {name: part.view_as(start[name]) for name, part in zip(names, w.split(sizes))}
        z = torch.func.functional_call(model, start | own, x)
        if sigmoid:
            terms = y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log()
        else:
            terms = y * (z - z.exp().sum(1, keepdim=True).log())
        return -terms.sum() / len(x) + decay / 2 * (w @ w)

    model.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(
            loss, torch.cat([start[name].flatten() for name in names])
        )


def wanted(values, k, which):
    key = values.abs() if which == "magnitude" else values
    return values[key.argsort(descending=True)[:k]]


@pytest.mark.parametrize(
    "make, block, soft, decay, sigmoid",
    [
        (small_conv, None, False, 0.0, False),
        (small_conv, None, True, 0.3, False),
        (small_conv, r"^0\.|^1\.", False, 0.1, False),
        (small_vit, None, True, 0.0, False),
        (small_vit, "attn", False, 0.0, True),
    ],
)
def test_hessian_eigenvalues_are_those_of_the_dense_hessian(make, block, soft, decay, sigmoid):
    model, batches = make(), list(small_batches(soft))
    names = [name for name, _ in model.named_parameters() if re.search(block or "", name)]
    params = None if block is None else [dict(model.named_parameters())[name] for name in names]
    H = dense_hessian(model, batches, names, decay, sigmoid)
    true = torch.linalg.eigvalsh(H)
    assert true[0] < -1e-3 and true[-1] > 1e-3 or decay, "both signs"
    model.train()
    model[0].weight.requires_grad_(False) if make is small_conv else None
    loss = train.sigmoid_loss if sigmoid else train.softmax_loss
    for which, k in (("algebraic", 1), ("magnitude", 5)):
        calls = []

        def counted(logits, y):
            calls.append(len(y))
            return loss(logits, y)

        kept = analyze.hessian_eigenvalues(
            model, counted, batches, k, which, params, decay=decay, tolerance=1e-9, iterations=500
        )
        want = wanted(true, k, which)
        assert np.allclose(kept["eigenvalues"], want, rtol=1e-8), (which, kept, want)
        assert kept["converged"]
        assert kept["parameters"] == len(H) and kept["images"] == 9
        assert calls == [5, 3, 1], "a graph is built once"
        calls.clear()
        again = analyze.hessian_eigenvalues(
            model,
            counted,
            batches,
            k,
            which,
            params,
            decay=decay,
            tolerance=1e-9,
            iterations=500,
            memory=0,
        )
        assert len(calls) == 3 * (again["products"] + 1), "no graph is kept"
        assert again["products"] == kept["products"]
        assert np.allclose(again["eigenvalues"], want, rtol=1e-7)
    assert all(module.training for module in model.modules())
    if make is small_conv:
        assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 7
    density = analyze.hessian_density(model, loss, batches, 20, 2, params, decay=decay)
    assert all(module.training for module in model.modules())
    scale = H.square().sum().sqrt().item()
    assert abs(density["trace"] - H.trace()) < 4 * density["trace_error"] + 1e-9, density["trace"]
    assert 0 < density["trace_error"] < 2 * scale / 20**0.5, density["trace_error"]
    second = np.mean(
        [np.dot(w, np.square(t)) for t, w in zip(density["nodes"], density["weights"])]
    )
    assert abs(second * len(H) - scale**2) < 0.5 * scale**2, (second * len(H), scale**2)


DEGENERATE = {
    "several of the largest": ([7, 7, 7, 6.99, 1, 0.5] + [0.1] * 20, 5),
    "clustered within the tolerance": ([5 - 1e-6 * i for i in range(6)] + [-6] * 2 + [0] * 12, 4),
    "both signs": ([-9, 8, -8, 8, 3, -2] + [0.01 * i for i in range(30)], 4),
    "one value": ([2.5] * 8, 3),
    "zero": ([0.0] * 7, 3),
    "negative only": ([-1, -1, -2, -3, -40], 2),
    "less parameters than asked for": ([3, 1, -2], 9),
    "one parameter": ([-4.0], 1),
    "a low rank": ([10, 10, 4] + [0] * 40, 4),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lanczos_finds_eigenvalues_with_their_multiplicity(name, dtype):
    values, k = DEGENERATE[name]
    model, digits = with_spectrum(values, 3, dtype), 1e-6 if dtype == torch.float64 else 1e-4
    for which in ("algebraic", "magnitude"):
        for few in {1, k}:
            found = analyze.hessian_eigenvalues(
                model, **QUADRATIC, k=few, which=which, tolerance=digits
            )
            want = wanted(torch.tensor(values, dtype=torch.float64), few, which)
            got = torch.tensor(found["eigenvalues"], dtype=torch.float64)
            assert len(got) == min(few, len(values))
            off = (got.sort().values - want.sort().values).abs().max()  # 8 and -8 are as large
            assert off <= digits * 3 * max(map(abs, values)), (which, found, want)
            assert found["converged"] and found["products"] <= len(values), found


def test_residuals_and_errors_bound_eigenvalues_and_too_few_products_are_told():
    generator = np.random.default_rng(0)
    for seed in range(12):
        values = [*generator.normal(0, 1, 300), *generator.normal(0, 3, 6)]
        model, true = with_spectrum(values, seed), torch.tensor(sorted(values))
        for tolerance in (0.01, 1e-4):
            for which, k in (("algebraic", 1), ("magnitude", 3)):
                found = analyze.hessian_eigenvalues(
                    model,
                    **QUADRATIC,
                    k=k,
                    which=which,
                    tolerance=tolerance,
                    seed=seed,
                    iterations=400,
                )
                want = wanted(true, k, which)
                got = torch.tensor(found["eigenvalues"], dtype=torch.float64)
                nearest = (got[:, None] - true).abs().min(1).values
                assert (nearest <= torch.tensor(found["residuals"]) + 1e-12).all()
                off = (got - want).abs()
                if tolerance < 0.01:  # nothing is closer to the largest than its residual
                    assert (off <= torch.tensor(found["errors"]) + 1e-12).all(), (found, want)
                assert (off <= tolerance * want.abs()).all() and found["converged"]
    found = analyze.hessian_eigenvalues(model, **QUADRATIC, tolerance=1e-6, iterations=5)
    assert not found["converged"] and found["products"] == 5
    assert found["errors"][0] > 1e-6 * found["eigenvalues"][0]


def test_the_largest_eigenvalue_is_found_though_the_start_has_little_of_it():
    """A spectrum of which a tolerance of 0.01 takes the second for the largest."""
    generator = np.random.default_rng(362)
    values = [*generator.normal(0, 1, 20), *generator.normal(0, 4, 5)]
    find = partial(analyze.hessian_eigenvalues, with_spectrum(values, 362), **QUADRATIC, seed=362)
    (early,), (found,) = find(tolerance=0.01)["eigenvalues"], find()["eigenvalues"]
    second, largest = sorted(values)[-2:]
    assert abs(early - second) < 0.01 * second and abs(found - largest) < 1e-3 * largest


def test_parameters_and_batches_may_be_generators_where_once_is_enough():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).double()
    batches = [(torch.randn(6, 3).double(), torch.arange(6) % 2) for _ in range(5)]
    find = partial(analyze.hessian_eigenvalues, model, train.softmax_loss)
    of_list = find(batches, params=list(model[0].parameters()))
    assert find(batches, params=model[0].parameters())["eigenvalues"] == of_list["eigenvalues"]
    with pytest.raises(ValueError, match="batches can be read once only"):
        find(iter(batches), memory=1e-7)
    bystander = nn.Parameter(torch.zeros(3).double())
    model.register_parameter("bystander", bystander)
    model[2].weight.data.zero_()
    found = find([(x, y * 0) for x, y in batches], params=[bystander])
    assert found["eigenvalues"] == [0], "the loss is without it"


def test_power_iteration_finds_the_largest_magnitude_only():
    found = analyze.hessian_eigenvalues(with_spectrum([-6, 4, 1, 0]), **QUADRATIC, method="power")
    assert abs(found["eigenvalues"][0] + 6) < 1e-9 and found["products"] == 100, found
    assert found["residuals"][0] < 1e-6 and found["converged"]
    found = analyze.hessian_eigenvalues(
        with_spectrum([5, 4] + [1] * 50), **QUADRATIC, method="power", iterations=7
    )
    assert found["products"] == 7 and not found["converged"] and 1 < found["eigenvalues"][0] < 5
    found = analyze.hessian_eigenvalues(with_spectrum([0.0] * 3), **QUADRATIC, method="power")
    assert found["eigenvalues"] == [0] and found["converged"]
    with pytest.raises(ValueError, match="for power k = 1"):
        analyze.hessian_eigenvalues(with_spectrum([1.0]), **QUADRATIC, k=2, method="power")


def test_a_table_of_uneven_rows_keeps_its_columns(capsys):
    analyze.print_rows([])
    assert capsys.readouterr().out == ""
    analyze.print_rows([dict(name="a", x=1.0, y=2.0), dict(name="b", y=None, z="c")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [["name", "x", "y", "z"], ["a", "1.00", "2.00", "-"], ["b", "-", "-", "c"]]


def test_eigenvalues_of_a_network_that_is_not_finite_are_refused():
    model, x = (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double(),
        torch.rand(4, 3, 2, 2).double(),
    )
    next(model.parameters()).data.fill_(math.nan)
    for function in (analyze.hessian_eigenvalues, analyze.hessian_density):
        with pytest.raises(train.UserError, match="H v is not finite: the network gives NaN"):
            function(model, F.cross_entropy, [(x, torch.arange(4) % 3)])


def test_what_others_finished_is_kept_when_one_process_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 3)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)

    def gather(found, own):
        found[:] = [own, ("b", None, "b.png is damaged"), ("c", 3, None)]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(train, "on_main", lambda function: function())
    results = analyze.Results(tmp_path, "x")
    with pytest.raises(train.UserError, match="b.png is damaged"):
        analyze.share_out(results, "net", {name: lambda: 1 for name in "abc"}, "parts")
    saved = json.loads((tmp_path / "x.json").read_text())["results"]
    assert saved == {"net": {"a": 1, "c": 3}}


def test_spectra_of_networks_that_differ_in_heads_have_an_exponent(tmp_path, capsys, small_shapes):
    runs = []
    for heads in (1, 2, 4):
        runs.append(str(tmp_path / f"{heads}/ckpt.pt"))
        train_ok(tiny(tmp_path / str(heads), f"--max-steps 2 --train-fraction 1 --heads {heads}"))
    command = ["spectrum", "--images", "8", "--batch", "4", "--k", "2", "--device", "cpu"]
    command += ["--workers", "0", "--against", "heads", "--out-dir", str(tmp_path)]
    capsys.readouterr()
    assert analyze.main([*command, "--checkpoint", *runs]) == 0
    results = json.loads((tmp_path / "spectrum.json").read_text())["results"]
    fit = results.pop("against heads")["APE = c n^a"]
    sums = [next(of for of in parts.values() if "batches" in of) for parts in results.values()]
    assert [of["heads"] for of in sums] == [1, 2, 4]
    x, y = np.log([1, 2, 4]), np.log([of["ape"] for of in sums])
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert abs(fit["a"] - slope) < 1e-9 and abs(math.log(fit["c"]) - (y - slope * x).mean()) < 1e-9
    printed = capsys.readouterr().out
    assert f"· heads^{slope:.3f}; the paper's exponent: -0.562" in printed, printed
    assert analyze.main([*command, "--checkpoint", *runs[:1]]) == 0
    assert "no exponent: it takes two values of heads" in capsys.readouterr().out


def test_trace_and_density_are_those_of_a_known_spectrum():
    values = torch.tensor([-3.0, -1, 0, 0, 0, 2, 2, 9], dtype=torch.float64)
    exact = analyze.hessian_density(Quadratic(values.diag()), **QUADRATIC, probes=3, steps=20)
    assert abs(exact["trace"] - 9) < 1e-12, "±1 probes see the diagonal"
    assert exact["trace_error"] < 1e-12
    for nodes, weights in zip(exact["nodes"], exact["weights"]):
        big = [(t, w) for t, w in zip(nodes, weights) if w > 1e-9]
        by_node = [(t, sum(w for s, w in big if abs(s - t) < 1e-6)) for t in (-3, -1, 0, 2, 9)]
        assert [round(8 * w, 6) for _, w in by_node] == [1, 1, 3, 2, 1], (nodes, weights)
    model = with_spectrum([*values.tolist(), *[0.5] * 30])
    found = analyze.hessian_density(model, **QUADRATIC, probes=200, steps=3)
    assert abs(found["trace"] - 24) < 4 * found["trace_error"], found["trace"]
    variance = 2 * (model.A.square().sum() - model.A.diag().square().sum())  # of Rademacher's zᵀAz
    assert abs(found["trace_error"] / (variance.item() / 200) ** 0.5 - 1) < 0.2
    assert found["products"] == 600
    more = analyze.hessian_density(model, **QUADRATIC, probes=200, steps=4)
    for power, same in ((5, True), (6, False)):
        (a, b) = (
            [np.dot(w, np.power(t, power)) for t, w in zip(each["nodes"], each["weights"])]
            for each in (found, more)
        )
        assert np.allclose(a, b) is same, "Gauss quadrature of 3 nodes is exact to degree 5"
    one = analyze.hessian_density(model, **QUADRATIC, probes=1, steps=1)
    assert one["trace_error"] is None and one["nodes"] == [[pytest.approx(one["trace"] / 38)]]
    zero = analyze.hessian_density(with_spectrum([0.0] * 5), **QUADRATIC, probes=2)
    assert zero["trace"] == 0 and zero["nodes"] == [[0.0], [0.0]] and zero["weights"] == [[1], [1]]
    at = np.linspace(-1, 6, 50)
    got = analyze.kernel_density(at, [0, 3], [0.25, 0.75], np.array([0.5, 2]))
    want = [
        0.25 * math.exp(-2 * t * t) / (0.5 * math.sqrt(2 * math.pi))
        + 0.75 * math.exp(-((t - 3) ** 2) / 8) / (2 * math.sqrt(2 * math.pi))
        for t in at
    ]
    assert np.abs(got - want).max() < 1e-12


def test_nep_and_ape_are_those_of_a_known_density_and_of_dense_hessians():
    # p(λ) = 1/400 on [-100, 300]: NEP = 1/4, APE = 150
    grid = (np.arange(40_000) + 0.5) / 100 - 100
    nep, ape = analyze.nep_ape(grid)
    assert nep == 0.25 and abs(ape - 150) < 1e-9
    assert analyze.nep_ape([-1.0, -2, 0]) == (pytest.approx(2 / 3), None)
    model, batches = small_vit(), list(small_batches(True))
    want = [
        wanted(torch.linalg.eigvalsh(dense_hessian(model, [batch], decay=0.02)), 5, "magnitude")
        for batch in batches
    ]
    found = analyze.hessian_spectrum(model, train.softmax_loss, batches, decay=0.02, tolerance=1e-8)
    got = torch.tensor(found["eigenvalues"], dtype=torch.float64)
    assert found["converged"] and got.allclose(torch.stack(want), rtol=1e-6), (got, want)
    flat = torch.cat(want)
    assert 0 < found["nep"] < 1 and abs(found["nep"] - (flat < 0).double().mean()) < 1e-12
    assert abs(found["ape"] - flat[flat > 0].mean()) < 1e-6
    c, a = analyze.power_law([1, 2, 4, 8], [3 * n**-0.562 for n in (1, 2, 4, 8)])
    assert abs(c - 3) < 1e-9 and abs(a + 0.562) < 1e-9
    assert analyze.power_law([2, 2], [1.0, 3]) is analyze.power_law([1, 2], [None, 3]) is None


@pytest.mark.parametrize("what", ["lanczos", "power", "density"])
def test_a_hessian_that_was_killed_goes_on_to_the_same_bits(tmp_path, what):
    (x, y), *others = small_batches(False)
    model, batches = small_conv(), [(x[:2], y[:2]), (x[2:], y[2:]), *others]  # 2, 3, 3, 1 images
    job = (
        partial(analyze.hessian_density, model, train.softmax_loss, batches, 3, 8)
        if (what == "density")
        else partial(
            analyze.hessian_eigenvalues,
            model,
            train.softmax_loss,
            batches,
            1 if what == "power" else 3,
            "magnitude",
            method=what,
            iterations=30,
            tolerance=1e-5,
        )
    )
    whole, seen = job(), []

    def kill(images):
        seen.append(images)
        if len(seen) == 23:
            raise KeyboardInterrupt

    path, saved = tmp_path / "x.state", analyze.Saved(tmp_path / "x.state", seconds=0)
    with pytest.raises(KeyboardInterrupt):
        job(saved=saved, tick=kill)
    first, seen = sum(seen), []
    ended = job(saved=analyze.Saved(path, seconds=0), tick=seen.append)
    assert ended.pop("seconds") > 0 and whole.pop("seconds") > 0 and ended == whole
    at_once = 3 if what == "density" else 1
    again = first + sum(seen) - 9 * (whole["products"] + (what == "lanczos"))  # and the gradient
    assert 0 < again < 9 * at_once, "no more than the product that was cut off"
    ended = job(saved=analyze.Saved(path, seconds=0))  # killed before the result was written
    assert ended["images"] == 9 and ended.pop("seconds") > 0 and ended == whole
    saved.remove()
    assert not path.exists()


def test_components_are_the_rows_of_table_3():
    for name, rows in {
        "vit_micro8": {
            "embedding": "patch_embed.proj.weight",
            "MSAs or token MLPs": "blocks.2.attn.qkv.bias",
            "MLPs or channel MLPs": "blocks.2.mlp.fc1.bias",
            "block 1 of 4": "blocks.0.norm1.bias",
            "block 2 of 4": "blocks.1.norm2.bias",
            "block 4 of 4": "blocks.3.attn.proj.bias",
        },
        "mixer_micro8": {
            "embedding": "stem.proj.weight",
            "MSAs or token MLPs": "blocks.0.mlp_tokens.fc1.bias",
            "MLPs or channel MLPs": "blocks.0.mlp_channels.fc1.bias",
            "block 1 of 4": "blocks.0.norm1.bias",
            "block 2 of 4": "blocks.1.norm2.bias",
            "block 4 of 4": "blocks.3.mlp_tokens.fc1.bias",
        },
        "resnet18": {
            "stem": "conv1.weight",
            "stage 1": "layer1.0.conv1.weight",
            "stage 2": "layer2.0.downsample.0.weight",
            "stage 3": "layer3.1.bn2.bias",
            "stage 4": "layer4.1.conv1.weight",
        },
    }.items():
        network = train.build_model(name, 12, 32, **(dict(width=8) if "resnet" in name else {}))
        named = dict(network.named_parameters())
        parts = analyze.components(network)
        assert list(parts) == ["whole", *rows], (name, list(parts))
        assert len(parts["whole"]) == len(named)
        for row, inside in rows.items():
            assert any(p is named[inside] for p in parts[row]), (name, row)
        apart = [set(map(id, parts[row])) for row in rows if not row.startswith("block")]
        assert len(set.union(*apart)) == sum(map(len, apart)), (name, "in two rows")
    parts = analyze.components(train.build_model("torchvision:vit_b_32", 12, 32))
    assert {"embedding", "MSAs or token MLPs", "MLPs or channel MLPs", "block 12 of 12"} <= {*parts}
    assert len(parts["block 1 of 12"]) == 12 and len(parts["MSAs or token MLPs"]) == 12 * 4
    network = train.build_model("vit_s16", 10, 32, patch_size=8, dim=12, heads=2, mlp_dim=12)
    parts = {
        name: sum(p.numel() for p in params) for name, params in analyze.components(network).items()
    }
    assert parts["embedding"] == 12 * 192 + 12 and parts["MLPs or channel MLPs"] == 12 * 312
    assert parts["MSAs or token MLPs"] == 12 * (12 * 48 + 48) and "block 6 of 12" in parts
    assert parts["block 1 of 12"] == parts["block 12 of 12"] == 312 + 624 + 48
    assert list(analyze.components(network, [r"blocks\.\d+\.norm", "whole"])) == [
        r"blocks\.\d+\.norm",
        "whole",
    ]
    assert len(analyze.components(network, [r"blocks\.\d+\.norm"])[r"blocks\.\d+\.norm"]) == 48
    for name, blocks in (("swin_t", 3), ("convnext_tiny", 3), ("efficientnet_b0", 0)):
        with torch.device("meta"):
            parts = analyze.components(train.build_model(f"torchvision:{name}", 12, 64))
        found = [part for part in parts if part.startswith("block ")]
        assert len(found) == blocks and (blocks or list(parts) == ["whole"]), (name, list(parts))


ON_TWO_PROCESSES = """
import json
import sys
import torch.distributed as dist
import analyze
import train
analyze.IMAGES_PER_PIECE = 64
analyze.data.SHAPES_SPLITS.update(train=(0, 160), val=(2**30, 150))
train.start_processes("cpu")
for argv in json.load(open(sys.argv[1])):
    assert analyze.main(argv) == 0
dist.destroy_process_group()
"""
DISTRIBUTED = {
    "hessian": "--images 17 --chunk 2 --k 2 --which magnitude --params attn --probes 2 --steps 3",
    "spectrum": "--images 13 --batch 4 --k 2 --mixup 0.5 --augment crop",
    "landscape": "--images 13 --points 3 --augmented --augment crop --mixup 0.5",
    "flatness": "--images 13 --draws 3 --steps 2 --sigma 0.1 --rho 0.1 0.3",
    "ntk": "--images 40 --batch 8",
    "sparsity": "--images 150",
    "fourier": "--images 140",
    "variance": "",
    "cka": "--batch 8",
    "lesion": "--images 1/2",
    "noise": "--frequencies 0.5",
    "calibration": "",
    "nll": "--augment crop --mixup 0.5",
    "attention": "--indices 0 1 2",
    "robustness": "--benchmarks val pgd",
}


def numbers_in(value):
    """Of what a JSON holds, in order, without times and counts of products."""
    if isinstance(value, dict):
        return [
            n
            for key, v in value.items()
            if key not in ("seconds", "products")
            for n in numbers_in(v)
        ]
    return [n for v in value for n in numbers_in(v)] if isinstance(value, list) else [value]


def test_analyses_on_two_processes_give_the_numbers_of_one(tmp_path, monkeypatch, small_shapes):
    monkeypatch.setattr(analyze, "IMAGES_PER_PIECE", 64)
    monkeypatch.setitem(data.SHAPES_SPLITS, "val", (2**30, 150))
    train_ok(tiny(tmp_path / "run", "--train-fraction 1 --max-steps 3"))
    of_checkpoint = (
        f"--device cpu --workers 0 --dtype float64 --checkpoint {tmp_path}/run/ckpt.pt --out-dir"
    )
    commands = [
        [name, *flags.split(), *of_checkpoint.split()] for name, flags in DISTRIBUTED.items()
    ]
    commands.append(["curves", "--runs", str(tmp_path / "run"), "--out-dir"])
    (tmp_path / "commands.json").write_text(
        json.dumps([[*command, str(tmp_path / "two")] for command in commands])
    )
    (tmp_path / "worker.py").write_text(ON_TWO_PROCESSES)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            tmp_path / "worker.py",
            tmp_path / "commands.json",
        ],
        capture_output=True,
        text=True,
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        timeout=240,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.count("results   ") == len(commands) == 16, result.stdout
    for command in commands:
        assert analyze.main([*command, str(tmp_path / "one")]) == 0
        name = command[0]
        one, two = (
            json.loads((tmp_path / folder / f"{name}.json").read_text())["results"]
            for folder in ("one", "two")
        )
        (of_one,), (of_two,) = one.values(), two.values()
        assert list(of_one) == list(of_two), command
        for part in of_one:
            a, b = numbers_in(of_one[part]), numbers_in(of_two[part])
            assert len(a) == len(b) > 0, (name, part)
            assert all(p == q or abs(p - q) <= 1e-6 * abs(q) + 1e-12 for p, q in zip(a, b)), (
                name,
                part,
                a,
                b,
            )
    assert not list(tmp_path.rglob("*.state"))


def test_a_spectrum_is_of_the_augmented_mixed_regularised_mini_batches(
    tmp_path, capsys, small_shapes
):
    flags = (
        "--augment crop --mixup 0.5 --label-smoothing 0.1 --weight-decay 0.3 --seed 5 --dtype "
        "float64"
    )
    train_ok(
        tiny(
            tmp_path / "run",
            flags,
            "--max-steps 3",
            dataset="--dataset shapes --batch-size 32 --micro-batch 8 --epochs 2 --warmup-steps 3",
        )
    )
    file = str(tmp_path / "run/ckpt.pt")
    command = [
        *"spectrum --device cpu --workers 0 --dtype float64 --images 13 --batch 4".split(),
        *"--k 2 --tolerance 1e-4 --checkpoint".split(),
        file,
    ]
    assert analyze.main(command) == 0
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "run/spectrum.json").read_text())["results"]
    ((name, parts),) = results.items()
    assert len(parts) == 4, "three whole mini-batches and their summary"
    model = train.assemble(tiny_network(), [0.5], [0.5]).double()
    train.load_weights(model.network, file)
    dataset = data.load("shapes", "train", image_size=32, augment="crop", seed=5)
    dataset.restrict(data.subset(dataset.labels, Fraction(13, 160)))
    dataset.restrict(torch.randperm(13, generator=torch.Generator().manual_seed(data.key(5, 3))))
    mix = v2.MixUp(alpha=0.5, num_classes=12)
    eigenvalues = []
    for b in range(3):
        x, y, _ = dataset[[(0, i) for i in range(4 * b, 4 * b + 4)]]
        torch.manual_seed(data.key(5, -1, b, 2))
        x, y = v2.RandomChoice([mix])(x.double() / 255, y)
        assert y.shape == (4, 12)

        def loss(logits, y):
            y = 0.9 * y + 0.1 / 12
            penalty = sum(p.square().sum() for p in model.parameters())
            return -(y * logits.log_softmax(1)).sum() / 4 + 0.15 * penalty

        want = analyze.hessian_eigenvalues(model, loss, [(x, y)], 2, "magnitude", tolerance=1e-4)
        part = next(v for key, v in parts.items() if key.endswith(f": {b}"))
        assert np.allclose(part["eigenvalues"], want["eigenvalues"], rtol=1e-6), (part, want)
        eigenvalues += part["eigenvalues"]
    summary = next(v for key, v in parts.items() if "batches" in v)
    assert summary["nep"] == np.mean(np.array(eigenvalues) < 0)
    assert summary["ape"] == pytest.approx(np.mean([v for v in eigenvalues if v > 0]))
    assert f"{summary['ape']:.4g}" in text, text

    # what is there is not done again; other numbers are not taken for these
    part["eigenvalues"] = [-500.0, -500.0]
    saved = json.loads((tmp_path / "run/spectrum.json").read_text())
    saved["results"] = results
    (tmp_path / "run/spectrum.json").write_text(json.dumps(saved))
    assert analyze.main(command) == 0
    again = json.loads((tmp_path / "run/spectrum.json").read_text())["results"][name]
    summary = next(v for v in again.values() if "batches" in v)
    assert summary["nep"] == np.mean(np.array([*eigenvalues[:-2], -500, -500]) < 0)
    assert analyze.main([*command, "--weight-decay", "0"]) == 0
    parts = json.loads((tmp_path / "run/spectrum.json").read_text())["results"][name]
    assert len(parts) == 8, list(parts)
    plain = next(v for key, v in parts.items() if "decay 0," in key and key.endswith(": 0"))
    decayed = next(v for key, v in parts.items() if "decay 0.3," in key and key.endswith(": 0"))
    assert decayed["eigenvalues"][0] == pytest.approx(plain["eigenvalues"][0] + 0.3, abs=0.02)


def test_a_hessian_of_checkpoints_prints_blocks_and_is_kept(tmp_path, capsys, small_shapes):
    for seed in (0, 1):
        train_ok(
            tiny(
                tmp_path / str(seed),
                f"--max-steps 3 --seed {seed}",
                dataset="--dataset "
                "shapes --batch-size 32 --micro-batch 8 --epochs 2 --warmup-steps 3",
            )
        )
    files = [str(tmp_path / str(seed) / "ckpt.pt") for seed in (0, 1)]
    command = "hessian --device cpu --workers 0 --images 4 --tolerance 0.001 --checkpoint".split()
    capsys.readouterr()
    assert analyze.main([*command, *files]) == 0
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "0/hessian.json").read_text())["results"]
    assert len(results) == 2 and all(len(parts) == 6 for parts in results.values()), results
    model = train.assemble(tiny_network(), [0.5], [0.5])
    train.load_weights(model.network, files[1])
    x, y = (
        t[data.subset(data.load("shapes", "train", image_size=32).labels, Fraction(4, 160))]
        for t in data.shapes(np.arange(160), size=32)[:2]
    )
    name, parts = list(results.items())[1]
    for block, pattern in (
        ("whole", ""),
        ("embedding", "patch_embed"),
        ("MSAs or token MLPs", "attn"),
        ("block 2 of 2", r"blocks\.1\."),
    ):
        found = analyze.hessian_eigenvalues(
            model.double(),
            F.cross_entropy,
            [(x.double() / 255, y)],
            tolerance=1e-8,
            params=[p for key, p in model.network.named_parameters() if re.search(pattern, key)],
        )["eigenvalues"][0]
        part = next(v for key, v in parts.items() if key.startswith(f"{block}: "))
        assert part["eigenvalues"][0] == pytest.approx(found, rel=1e-3), (block, part, found)
        row = next(line for line in text.splitlines() if name in line and f" {block} " in line)
        assert f" {part['eigenvalues'][0]:.4g} " in row, row
    kept = (tmp_path / "0/hessian.json").read_text()
    assert analyze.main([*command, *files]) == 0
    again = (tmp_path / "0/hessian.json").read_text()
    assert json.loads(again)["results"] == json.loads(kept)["results"], "times too: not done again"
    assert (tmp_path / "0/hessian.png").exists() == DRAWS
    capsys.readouterr()
    assert (
        analyze.main(
            [*command, files[0], "--params", "whole", "--iterations", "2", "--loss", "sigmoid"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert re.search(r"\.pt \(.{8}\), whole: not within 0.001 after 2 products; --itera", text), (
        text
    )
    for argv, words in [
        (["--params", "blocks["], "--params blocks[: no regular expression"),
        (["--params", "layer1"], "--params layer1: no parameter's name matches; there are"),
        (["--images", "ten"], "--images ten: "),
        (["--images", "-3"], "--images -3: "),
        (["--images", "161"], "--images 161: "),
        (["--images", "1/0"], "--images 1/0: "),
        (["--k", "0"], "--k 0: it is at least 1"),
        (["--tolerance", "0"], "--tolerance 0: it is at least 1e-09"),
        (["--tolerance", "nan"], "--tolerance nan"),
        (["--memory", "-1"], "--memory -1: "),
        (["--method", "power", "--k", "2"], "--method power finds one eigenvalue"),
        (["--itertions", "2"], "did you mean --iterations"),
        (["--dtype", "bfloat16"], "is computed in float32 or float64"),
    ]:
        line = analyze_refusal(capsys, *command, files[0], *argv)
        assert words in line, (argv, line)
    line = analyze_refusal(capsys, "spectrum", *command[1:7], "--checkpoint", files[0])
    assert "--images 4: 4 images are no mini-batch of 16" in line, line


class Bowl(nn.Module):
    """Its logits are its weights, whatever the image, so that a loss is a function of them."""

    def __init__(self, weights):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, x):
        return self.weight.flatten().expand(len(x), -1)


def quadratic(hessian, slope):
    """½ w·Hw + g·w of a Bowl's weights w, a mean over the images."""
    hessian, slope = (torch.tensor(v, dtype=torch.float64) for v in (hessian, slope))
    return lambda w, y: ((w @ hessian * w).sum(1) / 2 + w @ slope).mean()


def some_batches(*sizes):
    torch.manual_seed(1)
    return [(torch.rand(n, 3, 16, 16, dtype=torch.float64), torch.randint(5, (n,))) for n in sizes]


def test_directions_have_each_filters_length_or_are_zero():
    model = nn.Sequential(nn.Conv2d(2, 2, (1, 2)), nn.BatchNorm2d(2), nn.Linear(2, 3)).double()
    model.pos_embed, model.cls_token = (
        nn.Parameter(torch.ones(1, n, 2, dtype=torch.float64)) for n in (3, 1)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[[3.0, 0]], [[0, 4]]], [[[1, 1]], [[1, 1]]]]))
        model[2].weight.copy_(torch.tensor([[5.0, 12], [0, 0], [-3, 4]]))
    names = [name for name, _ in model.named_parameters()]
    lengths = {
        "0.weight": [5, 2],
        "2.weight": [13, 0, 5],
        "pos_embed": [6**0.5],
        "cls_token": [2**0.5],
    }  # by hand; all others have one dimension
    pair = [dict(zip(names, d)) for d in analyze.directions(model, seed=3)]
    for d in pair:
        for name, value in d.items():
            want = torch.tensor(lengths.get(name, [0] * len(value)), dtype=torch.float64)
            got = value.flatten(1).norm(dim=1) if value.ndim > 1 else value
            assert (got - want).abs().max() < 1e-12, (name, got, want)
    cosine = torch.cosine_similarity(*(d["0.weight"].flatten() for d in pair), dim=0)
    assert abs(cosine) < 0.9, cosine
    generator = torch.Generator().manual_seed(data.key(3, 1, zlib.crc32(b"2.weight")))
    noise = torch.randn(3, 2, generator=generator).double()
    want = noise / noise.norm(dim=1, keepdim=True) * torch.tensor([[13.0], [0], [5]])
    assert (pair[1]["2.weight"] - want).abs().max() < 1e-6, "of seed, axis and name only"
    other = dict(zip(names, analyze.directions(model, seed=4)[0]))
    assert (other["2.weight"] - pair[0]["2.weight"]).abs().max() > 0.01

    park = dict(zip(names, analyze.directions(model, seed=3, normalise="park")[0]))
    w, d = model[2].weight.detach(), park["2.weight"]
    for column in (0, 1):  # over the outputs, for each input
        assert abs(d[:, column].norm() - w[:, column].norm()) < 1e-5, (d, w)
    assert abs(d[1]).min() > 0, "a filter of zeros too is moved"
    assert (park["cls_token"].abs() - 1).abs().max() < 1e-5 and not park["pos_embed"].any()
    assert not park["0.bias"].any() and not park["1.weight"].any()


def test_a_landscape_of_a_quadratic_is_its_formula_with_penalties_by_hand():
    hessian, slope = [[2.0, 1, 0], [1, -3, 0], [0, 0, 0.5]], [0.1, -0.2, 0.3]
    model = Bowl([[1.0, 2, 3]])
    model.bias = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    vectors = [
        [torch.tensor([v], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
        for v in ([1.0, 0, -1], [0.5, 1, 2])
    ]
    before = copy.deepcopy(model.state_dict())
    found = analyze.landscape(
        model, quadratic(hessian, slope), some_batches(2, 5), vectors, [-1, 0.0, 0.5], [0.0, 2]
    )
    assert found["x"] == [-1, 0, 0.5] and found["y"] == [0, 2]
    for j, y in enumerate([0, 2]):
        for i, x in enumerate([-1, 0, 0.5]):
            w = np.array([1, 2, 3]) + x * np.array([1, 0, -1]) + y * np.array([0.5, 1, 2])
            want = dict(
                loss=w @ hessian @ w / 2 + slope @ w,
                half_square=(w @ w + 4) / 2,
                sum_of_norms=np.sqrt(w @ w) + 2,
            )
            for name, value in want.items():
                assert abs(found[name][j][i] - value) < 1e-12, (name, x, y)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    only = analyze.landscape(
        model,
        quadratic(hessian, slope),
        some_batches(2),
        vectors,
        [0.0],
        [0.0],
        decayed=[model.weight],
    )
    assert only["half_square"] == [[7]] and abs(only["sum_of_norms"][0][0] - 14**0.5) < 1e-12
    total = analyze.regularised(only, "half-square", 0.1) - only["loss"]
    assert abs(total[0, 0] - 0.7) < 1e-12
    total = analyze.regularised(only, "sum-of-norms", 0.1) - only["loss"]
    assert abs(total[0, 0] - 0.1 * 14**0.5) < 1e-12

    def cliff(w, y):
        return torch.where(w[0, 0] > 1.5, math.inf, torch.where(w[0, 0] < 0.5, math.nan, 7.0))

    rough = analyze.landscape(model, cliff, some_batches(2), vectors, [-1.0, 0, 1], [0.0])
    assert rough["loss"] == [[None, 7, None]]
    assert np.isnan(analyze.regularised(rough, "half-square", 1)).tolist() == [[True, False, True]]


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_a_landscape_equals_one_of_copies_and_leaves_weights_and_statistics_alone(make):
    model = make().double().train()
    before, batches = copy.deepcopy(model.state_dict()), some_batches(3, 2)
    vectors = analyze.directions(model)
    found = analyze.landscape(model, F.cross_entropy, batches, vectors, [-0.1, 0.0], [0.0, 0.3])
    for j, y in enumerate([0.0, 0.3]):
        for i, x in enumerate([-0.1, 0.0]):
            copied = copy.deepcopy(model).eval()
            copied.load_state_dict(
                before
                | {
                    name: p + x * a + y * b
                    for (name, p), a, b in zip(model.named_parameters(), *vectors)
                }
            )
            with torch.no_grad():  # the mean of all five images
                want = F.cross_entropy(
                    copied(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches])
                ).item()
            assert abs(found["loss"][j][i] - want) < 1e-12 * abs(want), (x, y)
    model.eval()
    plain = analyze.mean_loss(model, F.cross_entropy, batches)
    assert found["loss"][0][1] == plain, "the centre is the plain loss, bit for bit"
    assert len({v for row in found["loss"] for v in row}) == 4
    model.train()

    def broken(logits, y):
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        raise RuntimeError("in the middle")

    for call in (
        lambda: analyze.landscape(model, broken, batches, vectors, [0.5], [0.5]),
        lambda: analyze.noisy_loss(model, broken, batches, 0.5),
    ):
        with pytest.raises(RuntimeError, match="in the middle"):
            call()
    ascent = analyze.worst_loss(model, F.cross_entropy, batches, 0.1, steps=1)
    copied = copy.deepcopy(model).eval()
    x, y = (torch.cat(tensors) for tensors in zip(*batches))
    plain = F.cross_entropy(copied(x), y)
    grads = torch.autograd.grad(plain, list(copied.parameters()))
    length = torch.cat([g.flatten() for g in grads]).norm()
    with torch.no_grad():
        for p, g in zip(copied.parameters(), grads):
            p += 0.1 * g / length
        climbed = F.cross_entropy(copied(x), y)
    assert max(abs(a - b) for a, b in zip(ascent["losses"], (plain, climbed))) < 1e-12, "SAM's step"
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_noise_on_a_quadratic_raises_its_mean_by_half_the_trace():
    hessian = [[2.0, 1, 0], [1, -3, 0], [0, 0, 4]]
    model, loss, batches = Bowl([0.0, 0, 0]), quadratic(hessian, [0.0, 0, 0.2]), some_batches(1)
    plain = analyze.noisy_loss(model, loss, batches, 0.0)
    assert plain == analyze.mean_loss(model, loss, batches)
    found = analyze.average(
        [analyze.noisy_loss(model, loss, batches, 0.7, draw=draw) for draw in range(400)]
    )
    want, error = plain + 0.5 * 0.49 * 3, found["standard_error"]
    assert error < 0.12 and abs(found["mean"] - want) < 3 * error, (found["mean"], want, error)
    deviation = np.sqrt(0.49 * 0.04 + 0.5 * 0.49**2 * np.square(hessian).sum())  # of such a form
    assert abs(error * 20 / deviation - 1) < 0.15, (error * 20, deviation)
    assert analyze.average([1.0, 2, 6]) == dict(
        mean=3, losses=[1, 2, 6], standard_error=(pytest.approx((14 / 2 / 3) ** 0.5, rel=1e-12))
    )
    assert analyze.average([1.0, None])["mean"] is None
    assert analyze.average([2.0]) == dict(mean=2, standard_error=None, losses=[2])
    tall = Bowl([[3.0, 4, 0]])  # of one filter, of length 5
    relative = [
        analyze.noisy_loss(
            tall, lambda w, _: w.square().sum(), batches, 0.1, 0, draw, relative=True
        )
        for draw in range(400)
    ]
    found_relative = analyze.average(relative)
    assert abs(found_relative["mean"] - 25 * 1.01) < 3 * found_relative["standard_error"]
    one = analyze.noisy_loss(model, loss, batches, 0.7, draw=0)
    assert one == found["losses"][0] != analyze.noisy_loss(model, loss, batches, 0.7, seed=1)


def test_the_worst_loss_in_a_ball_is_the_known_maximum():
    batches, zero = some_batches(1, 4), np.zeros((3, 3)).tolist()
    for scale in (1, 0.01):
        slope = [2 * scale, -scale, 2 * scale]  # of length 3·scale
        linear = analyze.worst_loss(
            Bowl([1.0, 2, 3]), quadratic(zero, slope), batches, 0.5, steps=3
        )
        assert len(linear["losses"]) == 4 and linear["worst"] == max(linear["losses"])
        for i, value in enumerate(linear["losses"]):
            assert abs(value - (6 + 1.5 * (i > 0)) * scale) < 1e-12, (scale, i, value)
    still = analyze.worst_loss(Bowl([1.0, 2, 3]), quadratic(zero, [2.0, -1, 2]), batches, 0.0)
    assert still == dict(worst=6, losses=[6])

    turned, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    hessian = (turned @ np.diag([4, 1, -9]) @ turned.T).tolist()
    found = analyze.worst_loss(
        Bowl([0.0, 0, 0]), quadratic(hessian, [0.0, 0, 0]), batches, 0.5, steps=60
    )
    assert abs(found["worst"] - 0.5 * 4 * 0.25) < 1e-9, "½ λmax ρ², from where the gradient is 0"
    # ½ w·Hw + g·w with H = diag(3, 1), ‖w‖ ≤ 1: w = (μ - H)⁻¹ g, μ > 3 the root of ‖w‖ = 1
    g, h = np.array([0.3, 2.0]), np.array([3, 1])
    low, high = 3.0, 9.0
    for _ in range(80):
        mu = (low + high) / 2
        low, high = (mu, high) if np.linalg.norm(g / (mu - h)) > 1 else (low, mu)
    w = g / (mu - h)
    found = analyze.worst_loss(
        Bowl([0.0, 0]), quadratic([[3.0, 0], [0, 1]], g.tolist()), batches, 1, steps=60
    )
    first = found["losses"][1]  # SAM's
    e = g / np.linalg.norm(g)
    assert abs(first - (e @ (h * e) / 2 + g @ e)) < 1e-12
    assert abs(found["worst"] - (w @ (h * w) / 2 + g @ w)) < 1e-9
    inside = analyze.worst_loss(Bowl([0.0]), quadratic([[-4.0]], [1.0]), batches, 1, steps=30)
    assert abs(inside["worst"] - 0.125) < 1e-9, "a maximum inside, at 1/4"

    def steep(w, y):
        return torch.where(w[0, 0] > 1, math.inf, w[0, 0])

    found = analyze.worst_loss(Bowl([0.5]), steep, batches, 2)
    assert found == dict(worst=None, losses=[0.5, None])


def planes(folder):
    return json.loads((folder / "landscape.json").read_text())["results"]


def test_a_landscape_and_flatness_of_a_checkpoint_go_on_after_a_kill(
    tmp_path, capsys, monkeypatch, small_shapes
):
    for seed in (0, 1):
        train_ok(
            tiny(
                tmp_path / str(seed),
                f"--max-steps 2 --mixup 0.5 --seed {seed}",
                dataset="--dataset shapes --batch-size 32 --micro-batch 8 --epochs 2 "
                "--warmup-steps 3 --augment crop",
            )
        )
    one, two = (str(tmp_path / str(seed) / "ckpt.pt") for seed in (0, 1))
    common = ["--device", "cpu", "--workers", "0", "--dtype", "float64", "--images", "30"]
    draw = ["landscape", *common, "--points", "3", "--span", "0.5", "--augmented"]
    assert analyze.main([*draw, "--out-dir", str(tmp_path / "a"), "--checkpoint", one, two]) == 0
    text = capsys.readouterr().out
    assert text.count(": 3² points of 30 images") == 2, text
    whole = planes(tmp_path / "a")
    assert (tmp_path / "a/landscape.png").exists() == DRAWS
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # drawing takes seconds
    assert len(whole) == 2 and all(len(parts) == 1 for parts in whole.values())
    name, (part, numbers) = next((n, *p.items()) for n, p in whole.items() if n.startswith(one))
    assert numbers["loss"][1][1] == numbers["centre"]["loss"] and len(numbers["loss"]) == 3
    assert numbers["x"] == [-0.5, 0, 0.5]

    # killed after four of ten pieces, one of which is marked: none of the four is done again
    stopped, put = [], analyze.Results.put

    def kill(self, network, part, numbers):
        put(self, network, part, numbers)
        stopped.append(part)
        if len(stopped) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(analyze, "POINTS_PER_PIECE", 2)
    out = ["--out-dir", str(tmp_path / "b"), "--checkpoint", one]
    with monkeypatch.context() as patch:
        patch.setattr(analyze.Results, "put", kill)
        assert analyze.main([*draw, *out]) == 130
    saved = json.loads((tmp_path / "b/landscape.json").read_text())
    assert list(saved["results"][name]) == [f"{part}, piece {i}" for i in range(3)]
    saved["results"][name][f"{part}, piece 2"]["loss"][0][0] = -1.0
    (tmp_path / "b/landscape.json").write_text(json.dumps(saved))
    calls, count = analyze.landscape, []
    monkeypatch.setattr(analyze, "landscape", lambda *a, **k: count.append(a) or calls(*a, **k))
    assert analyze.main([*draw, *out]) == 0
    again = planes(tmp_path / "b")[name][part]
    assert len(count) == 4 and again["loss"][0][2] == -1
    again["loss"][0][2] = numbers["loss"][0][2]
    assert again == numbers
    # shown otherwise, nothing is computed; other numbers are
    capsys.readouterr()
    assert analyze.main([*draw, *out, "--l2", "half-square", "--weight-decay", "0.5"]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[2] == "0.5", row
    centre = numbers["centre"]["loss"] + 0.5 * numbers["centre"]["half_square"]
    assert len(count) == 4 and abs(float(row[3]) / centre - 1) < 1e-3, (row, centre)
    assert analyze.main([*draw, *out, "--mixup", "0"]) == 0
    assert len(count) == 11 and len(planes(tmp_path / "b")) == 2

    # the centre is the loss of the mixed, augmented images
    settings, origin = analyze.networks([one], common[:-2])[0]
    dataset = analyze.training_images(settings, "cpu", "30", True)
    model = train.starting_network(settings, origin, 12, torch.device("cpu"), print).eval()
    mix, want = train.mixing(settings, 12), 0
    for b in range(4):
        x, y, _ = dataset[[(0, i) for i in range(8 * b, min(8 * b + 8, 30))]]
        torch.manual_seed(data.key(0, -1, b, 2))
        x, y = mix(x.double() / 255, y)
        assert y.ndim == 2
        with torch.no_grad():
            want -= (y * model(x).log_softmax(1)).sum().item() / 30
    assert abs(numbers["centre"]["loss"] - want) < 1e-12

    flat = [
        "flatness",
        *common,
        *"--sigma 0.1 --draws 3 --rho 0.2 --steps 2 --loss sigmoid".split(),
        *out,
    ]
    assert analyze.main(flat) == 0
    found = json.loads((tmp_path / "b/flatness.json").read_text())["results"][name]
    assert list(found) == [
        "sigmoid, 30 of images, noise of σ 0.1, 3 draws",
        "sigmoid, 30 of images, ball of ρ 0, 2 steps",
        "sigmoid, 30 of images, ball of ρ 0.2, 2 steps",
    ]
    plain = analyze.training_images(settings, "cpu", "30")
    batches = [(x.double() / 255, y) for x, y, _ in [plain[[(0, i) for i in range(30)]]]]
    noise, start, ball = found.values()
    assert abs(start["worst"] - train.sigmoid_loss(model(batches[0][0]), batches[0][1])) < 1e-12
    assert analyze.main([*flat, "--relative"]) == 0
    both = json.loads((tmp_path / "b/flatness.json").read_text())["results"][name]
    relative = both["sigmoid, 30 of images, relative noise of σ 0.1, 3 draws"]["losses"]
    expected = analyze.noisy_loss(model, train.sigmoid_loss, batches, 0.1, draw=2, relative=True)
    assert abs(relative[2] - expected) < 1e-12 and relative[2] != noise["losses"][2]
    capsys.readouterr()
    assert analyze.main(flat) == 0
    for k, value in enumerate(noise["losses"]):
        assert (
            abs(value - analyze.noisy_loss(model, train.sigmoid_loss, batches, 0.1, draw=k)) < 1e-12
        )
    assert ball["losses"][0] == start["worst"] < ball["worst"]
    table = capsys.readouterr().out
    printed = re.search(r"(\S+) ± (\S+)", table).groups()
    for text, value in zip(printed, (noise["mean"], noise["standard_error"])):
        assert abs(float(text) - value) <= 0.05 * noise["standard_error"], table
    broken = tmp_path / "broken.pt"  # of which every loss is NaN
    state = torch.load(two, weights_only=True)
    state["model"]["head.bias"].fill_(math.nan)
    torch.save(state, broken)
    out = ["--checkpoint", str(broken), *out[:2], "--weights", "model"]
    assert analyze.main([*draw, *out]) == 0
    text = capsys.readouterr().out
    assert "its loss is finite nowhere, so it is not drawn" in text, text
    assert text.splitlines()[-2].split()[-6:] == ["0", *"----9"], text
    monkeypatch.setattr(analyze, "mean_loss", None)
    assert analyze.main(flat) == 0, "nothing is left to compute"


def test_mistakes_in_a_landscape_get_one_line_that_helps(tmp_path, capsys, small_shapes):
    train_ok(tiny(tmp_path / "run", "--max-steps 1 --train-fraction 1"))
    run = ["--checkpoint", tmp_path / "run", "--out-dir", tmp_path / "out", "--device", "cpu"]
    for argv, words in [
        (["landscape", "--points", "1"], "--points 1: it is at least 2"),
        (["landscape", "--span", "0"], "--span 0: it is at least 1e-06"),
        (["landscape", "--span", "nan"], "--span nan: it is at least 1e-06"),
        (["landscape", "--span", "1e99"], "--span 1e+99: it is at least 1e-06 and at most 1e30"),
        (["landscape", "--clip", "0"], "--clip 0: it is at least"),
        (["landscape", "--points", "2", "--clip", "1e-5"], "--clip 1e-05: no loss is below, the"),
        (["landscape", "--clip", "-3"], "--clip -3: it is at least"),
        (["landscape", "--direction-seed", "-1"], "--direction-seed -1: it is at least 0"),
        (["landscape", "--images", "161"], "--images 161: there are 160 training images"),
        (["landscape", "--images", "-5"], "--images -5: a fraction of -5"),
        (["landscape", "--images", "1/0"], "--images 1/0: "),
        (["landscape", "--images", "many"], "--images many: Invalid literal for Fraction"),
        (["landscape", "--l2", "half"], "invalid choice: 'half'"),
        (["landscape", "--loss", "supcon"], "invalid choice: 'supcon'"),
        (["landscape", "--augmneted"], "unknown flag --augmneted; did you mean --augmented"),
        (["landscape", "--dtype", "bfloat16"], "computed in float32 or float64"),
        (["flatness", "--sigma", "0.1", "-0.1"], "--sigma -0.1: it is at least 0"),
        (["flatness", "--rho", "inf"], "--rho inf: it is at least 0"),
        (["flatness", "--rho", "1e99"], "--rho 1e+99: it is at least 0 and at most 1e30"),
        (["flatness", "--sigma", "1e99"], "--sigma 1e+99: it is at least 0 and at most 1e30"),
        (["flatness", "--draws", "0"], "--draws 0: it is at least 1"),
        (["flatness", "--steps", "0"], "--steps 0: it is at least 1"),
    ]:
        line = analyze_refusal(capsys, *argv, *run)
        assert words in line, (argv, line)
    assert "no.pt: No such file" in analyze_refusal(capsys, "flatness", "--checkpoint", "no.pt")


def test_a_landscape_is_shown_to_a_top_that_all_networks_reach():
    axis = np.linspace(-1, 1, 5)
    bowl = 1 + axis[:, None] ** 2 + axis**2
    deep = np.where(bowl > 2.2, np.nan, bowl**20)
    # bowl's highest is 3, so 9 is the top; deep: 12 NaN, then four each of 2**20, 3325 and 86.7
    assert analyze.landscape_scale([bowl, deep], None) == (1, 9, 24)
    assert analyze.landscape_scale([bowl, deep], 1e4) == (1, 1e4, 16)
    assert analyze.landscape_scale([bowl], None) == (1, 3, 0)
    assert analyze.landscape_scale([1e-9 * bowl, bowl], 2)[0] == 2e-6, "six decades are shown"
    for flat in (0.0, 2.5):
        low, high, over = analyze.landscape_scale([np.full((3, 3), flat)], None)
        assert low == flat < high and not over


def full_jacobian_kernel(model, x):
    """1/C Σ_c ∇f_c(x)·∇f_c(x') from one backward pass for each image and each logit."""
    model.eval()
    rows = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for image in x:
            grads = [
                torch.autograd.grad(
                    f, list(model.parameters()), retain_graph=True, allow_unused=True
                )
                for f in model(image[None])[0]
            ]
            rows.append(
                torch.stack(
                    [
                        torch.cat(
                            [
                                (torch.zeros_like(p) if g is None else g).flatten()
                                for g, p in zip(of, model.parameters())
                            ]
                        )
                        for of in grads
                    ]
                )
            )
    j = torch.stack(rows)  # (B, C, P)
    return torch.einsum("icp,jcp->ij", j, j) / j.shape[1]


class Odd(nn.Module):
    """What no rule for layers covers: a layer called twice, tied weights, attention by a function,
    a parameter of its own, one that is never used, a class token that only one image sees."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=4, padding=(1, 2), dilation=(1, 2))
        self.reflected = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.twice, self.tied, self.never = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.twice.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale, self.cls_token = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(1, 8))
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.gelu(self.norm(self.reflected(self.depthwise(self.conv(x).relu_()))))
        x = x.flatten(2).mT  # (B, N, 8)
        x = self.scale * self.tied(torch.tanh(self.twice(self.twice(x)))) + self.cls_token[0]
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def kernel_networks():
    """{name: what makes a network small enough for its whole Jacobian}."""
    tiny = dict(num_classes=3, image_size=8)
    block = dict(dim=8, depth=2, mlp_dim=12)
    small_vit = partial(vit.build, "vit_micro4", **tiny, **block, heads=2)
    return {
        "vit": small_vit,
        "vit conv stem": partial(small_vit, stem="conv", pool="gap"),
        "mixer": partial(mixer.build, "mixer_micro4", **tiny, **block, token_mlp_dim=5),
        "resnet": partial(resnet.build, "resnet18", **tiny, width=2, depth=(1, 1, 1, 1)),
        "preresnet": partial(resnet.build, "preresnet18", **tiny, width=2, depth=(1, 1, 1, 1)),
        "odd": Odd,
    }


@pytest.mark.parametrize("name", kernel_networks())
def test_the_tangent_kernel_is_that_of_the_full_jacobian(name, monkeypatch):
    torch.manual_seed(0)
    model = train.assemble(kernel_networks()[name](), [0.4], [0.3]).double()
    for p in (*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)):
        p.data += 0.3 * torch.rand_like(p)
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    expected = full_jacobian_kernel(model, x)
    before = copy.deepcopy(model.state_dict())
    found = analyze.ntk(model.train(), x)
    error = (
        (torch.tensor(found["kernel"], dtype=torch.float64) - expected).abs().max()
        / expected.abs().max()
    ).item()
    assert error < 1e-12, (name, error)
    values = torch.linalg.eigvalsh(expected)
    assert abs(found["condition"] / (values[-1] / values[0]) - 1) < 1e-9 and found["resolved"]
    assert np.allclose(found["eigenvalues"], values.flip(0), rtol=1e-9)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())

    # few images, directions and output features at a time
    plan = analyze.ntk_plan(model, x)
    assert plan["images"] == 5 and plan["directions"] == 3
    assert plan["jacobian"] == 5 * 3 * 8 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(analyze, "CACHE", 400)
    low, least = 2**10, 2**22
    while least > 1.05 * low:
        middle = (low + least) // 2
        low, least = (low, middle) if fits(model, x, middle) else (middle, least)
    plan = analyze.ntk_plan(model, x, memory=least)
    assert plan["images"] < 5 and plan["directions"] == 1 and plan["bytes"] <= least, plan
    pieces = torch.tensor(analyze.ntk(model, x, memory=least)["kernel"], dtype=torch.float64)
    assert ((pieces - expected).abs().max() / expected.abs().max()).item() < 1e-12, name
    with pytest.raises(ValueError, match=r"two images take \S+ GiB, more than the \S+ GiB allowed"):
        analyze.ntk(model, x, memory=low)


def fits(model, x, memory):
    try:
        return bool(analyze.ntk_plan(model, x, memory=memory))
    except ValueError:
        return False


class Standardised(nn.Conv2d):
    """A convolution with a weight of mean 0: torch's in all but its forward."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), True), self.bias)


def test_the_tangent_kernel_of_a_layer_that_is_none_of_torchs():
    torch.manual_seed(0)
    network = nn.Sequential(
        Standardised(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    model = train.assemble(network, [0.4], [0.3]).double()
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    found = torch.tensor(analyze.ntk(model, x)["kernel"], dtype=torch.float64)
    assert torch.allclose(found, full_jacobian_kernel(model, x), rtol=1e-10)
    network[-1].weight.data[0, 0] = math.nan
    with pytest.raises(train.UserError, match="the kernel is not finite"):
        analyze.ntk(model, x)


def test_the_tangent_kernel_of_a_linear_model_and_of_a_zero_head():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 2, 2, dtype=torch.float64)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 7)).double()
    by_hand = x.flatten(1) @ x.flatten(1).T + 1  # the weight's part and the bias's
    assert np.allclose(analyze.ntk(flat, x)["kernel"], by_hand, rtol=1e-13)
    single = analyze.ntk(nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False)), x[:2].float())
    a, b, c = (float(x[i].flatten() @ x[j].flatten()) for i, j in ((0, 0), (1, 1), (0, 1)))
    root = math.sqrt((a - b) ** 2 + 4 * c * c)
    assert abs(single["condition"] / ((a + b + root) / (a + b - root)) - 1) < 1e-4
    twins = analyze.ntk(flat, torch.cat([x, x]))
    assert not twins["resolved"], "the same image twice: no eigenvalue but rounding"

    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    for model in (vit.build("vit_micro4", 3, 8), mixer.build("mixer_micro4", 3, 8)):
        model, out = model.double(), {"pre_logits": None}
        assert not model.head.weight.any(), "as Google's"
        model(x, out=out)
        features = out["pre_logits"].detach()
        assert np.allclose(analyze.ntk(model, x)["kernel"], features @ features.T + 1, rtol=1e-12)


def test_projections_of_the_tangent_kernel_are_unbiased_with_the_variance_they_state():
    torch.manual_seed(0)
    classes, r, draws = 6, 2, 400
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, classes)).double()
    x = torch.rand(2, 3, 2, 2, dtype=torch.float64)
    exact = torch.tensor(analyze.ntk(model, x)["kernel"])
    kernels = torch.tensor([analyze.ntk(model, x, r, seed)["kernel"] for seed in range(draws)])
    jacobian = [
        torch.cat(
            [
                j[0].flatten(1)
                for j in torch.autograd.functional.jacobian(
                    lambda *p: torch.func.functional_call(
                        model, dict(zip(names, p)), (image[None],)
                    ),
                    tuple(model.parameters()),
                )
            ],
            1,
        )
        for names in [list(dict(model.named_parameters()))]
        for image in x
    ]
    for i, j in ((0, 0), (0, 1), (1, 1)):
        m = jacobian[i] @ jacobian[j].T
        s = (m + m.T) / 2 - m.trace() / classes * torch.eye(classes)
        variance = (
            2 * (classes - r) / (r * classes * (classes - 1) * (classes + 2)) * s.square().sum()
        )
        z = (kernels[:, i, j].mean() - exact[i, j]) / math.sqrt(variance / draws)
        assert abs(z) < 4, (i, j, z)
        assert 0.75 < kernels[:, i, j].var() / variance < 1.3, (i, j, kernels[:, i, j].var())
    assert analyze.ntk(model, x, classes)["kernel"] == analyze.ntk(model, x)["kernel"]


def test_relu_takes_gelus_place_and_batchnorm_the_statistics_of_the_batch():
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    for build, activations in (
        (partial(vit.build, "vit_micro4"), 2),
        (partial(mixer.build, "mixer_micro4"), 4),
    ):
        torch.manual_seed(0)
        model = build(3, 8, dim=12, depth=2, mlp_dim=12).double()
        nn.init.normal_(model.head.weight)
        gelu = analyze.ntk(model, x)["kernel"]
        with analyze.ReluForGelu():
            found = analyze.ntk(model, x)["kernel"]
        with analyze.ReluForGelu():
            assert F.gelu(torch.tensor([-1.0, 2.0]), approximate="tanh").tolist() == [0, 2]
        replaced = [name for name, m in model.named_modules() if isinstance(m, nn.GELU)]
        assert len(replaced) == activations
        for name in replaced:
            model.set_submodule(name, nn.ReLU())
        expected = full_jacobian_kernel(model, x)
        assert np.allclose(found, expected, rtol=1e-10)
        assert not np.allclose(found, gelu, rtol=1e-2)

    model = resnet.build("resnet18", 3, 8, width=4, depth=(1, 1, 1, 1)).double()
    analyze.measure_statistics(model.eval(), x)
    out = {}
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_hook(lambda m, _, y, name=name: out.update({name: y.clone()}))
    model(x)
    assert len(out) == 12 and all(y.mean(dim=(0, 2, 3)).abs().max() < 1e-12 for y in out.values())
    variance = model.conv1(x).var(dim=(0, 2, 3), correction=0)
    assert torch.allclose(model.bn1.running_var, variance, rtol=1e-10)
    as_training = model.train()(x)  # normalises by the batch
    assert torch.allclose(model.eval()(x), as_training) is False  # that moved the statistics
    analyze.measure_statistics(model, x)
    assert torch.allclose(model(x), as_training, rtol=1e-9) and not model.bn1._forward_pre_hooks


class Blocks(nn.Module):
    """Two blocks, one with a module as its activation function, one with two functions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(2, 4, 1), nn.GELU()), Second()])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


class Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return 3 * F.gelu(self.conv(x).relu_() - 0.3)


def test_norms_and_active_neurons_by_hand():
    torch.manual_seed(0)
    model, images = Blocks().double(), torch.rand(5, 3, 4, 4, dtype=torch.float64)
    graphs = []
    watch = model.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    sums = analyze.added(
        [
            analyze.activity(model, [(images[:2], None), (images[2:3], None)]),
            analyze.activity(model, [(images[3:], None)]),
        ]
    )
    with torch.no_grad():
        stem = model.stem[0](images).clamp(min=0)
        first = F.gelu(model.blocks[0][0](stem))
        inner = model.blocks[1].conv(first).clamp(min=0)
        second = F.gelu(inner - 0.3)
    assert graphs == [False] * 3, "or the sums would keep those of all batches"
    watch.remove()
    share = lambda *values: (
        sum((v > 0).sum() for v in values) / sum(v.numel() for v in values)
    ).item()
    length = lambda v: v.square().sum(dim=(1, 2, 3)).sqrt().mean().item()
    close = partial(pytest.approx, rel=1e-6)
    found = analyze.sparsity(sums)
    assert found["block"] == {
        "blocks.0": close(share(first)),
        "blocks.1": close(share(inner, second)),
    }, found
    assert found["activation"] == {
        "stem.1": close(share(stem)),
        "blocks.0.1": close(share(first)),
        "blocks.1": close(share(inner)),
        "blocks.1 2": close(share(second)),
    }, found
    assert 0.05 < share(first) < 0.95 and share(second) < share(inner) < 0.95
    found = analyze.norms(sums)
    assert found["weights"] == close(
        math.sqrt(sum(v * v for p in model.parameters() for v in p.flatten().tolist()))
    )
    assert found["activation"] == {
        "blocks.0": close(length(first)),
        "blocks.1": close(length(second)),
    }, found
    assert found["output"] == {
        "blocks.0": close(length(first)),
        "blocks.1": close(3 * length(second)),
    }, found
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_blocks_and_activations_of_the_papers_networks():
    for model, size, blocks, per_block in (
        (vit.build("vit_micro8", 12, 32), 32, 4, 1),
        (vit.build("pit_ti", 12, 32), 32, 12, 1),
        (vit.build("vit_micro8", 12, 32, stem="conv"), 32, 3, 1),  # its ReLUs are in no block
        (mixer.build("mixer_micro8", 12, 32), 32, 4, 2),
        (resnet.build("resnet50", 12, 32, width=4), 32, 16, 3),
        (resnet.build("preresnet18", 12, 32, width=4), 32, 8, 2),
        (train.build_model("torchvision:resnet18", 12, 32), 32, 8, 2),
        (train.build_model("torchvision:swin_t", 12, 32), 32, 12, 1),
    ):
        sums = analyze.activity(model, [(torch.rand(2, 3, size, size), None)])
        found = {}
        for block, *_ in sums["activations"].values():
            found[block] = found.get(block, 0) + 1
        found.pop("", None)
        assert list(found.values()) == [per_block] * blocks, (type(model), found)
        assert sums["images"] == 2 and sums["outputs"].keys() == found.keys()
    squeezed = train.build_model("torchvision:mobilenet_v3_small", 12, 32)
    with pytest.raises(analyze.UserError, match="Hardswish: only ReLU and GELU are watched here"):
        analyze.activity(squeezed, [(torch.rand(2, 3, 32, 32), None)])


def test_kernel_norms_and_sparsity_of_checkpoints_go_on_where_they_were(
    tmp_path, capsys, monkeypatch, small_shapes
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analyze, "IMAGES_PER_PIECE", 60)
    run = str(tmp_path / "run/ckpt.pt")
    train_ok(tiny(tmp_path / "run", "--max-steps 3 --train-fraction 1"))
    common = ["--device", "cpu", "--workers", "0", "--dtype", "float64"]
    commands = {
        "ntk": ["ntk", *common, "--images", "40", "--batch", "8", "--checkpoint", run],
        "norms": ["norms", *common, "--images", "150", "--checkpoint", run],
        "sparsity": ["sparsity", *common, "--images", "150", "--checkpoint", run],
    }
    whole = {}
    for what, command in commands.items():
        capsys.readouterr()
        assert analyze.main([*command, "--out-dir", str(tmp_path / "whole")]) == 0
        text, file = capsys.readouterr().out, tmp_path / "whole" / f"{what}.json"
        ((name, parts),) = json.loads(file.read_text())["results"].items()
        whole[what] = parts
        assert name.startswith(f"{run} (") and name in text and str(file) in text, text
        assert what != "ntk" or "begins with a zero head" in text and "memory    " in text, text
        assert file.with_suffix(".png").exists() == DRAWS
    monkeypatch.setattr(analyze, "figure", lambda *_: None)
    assert len(whole["ntk"]) == 5
    share = whole["sparsity"]["150 images"]["block"]
    assert list(share) == ["network.blocks.0", "network.blocks.1"]
    kappa = [of["condition"] for of in whole["ntk"].values()]
    row = next(
        line
        for line in analyze_again(commands["ntk"], tmp_path / "whole", capsys)
        if line.startswith(run)
    )
    assert f"{sum(kappa) / 5:.4g}" in row.split(), (row, kappa)

    # one kernel by hand, from the head's own seed on
    settings, origin = train.settings(["--eval-only", *common, "--init-from", run])
    settings.init_from = ""
    images = analyze.training_images(settings, torch.device("cpu"), "40")
    model = train.starting_network(settings, origin, 12, torch.device("cpu"), print)
    torch.manual_seed(data.key(settings.seed, 3))
    vit.lecun_normal_(model.network.head.weight)
    for name in ("blocks.0.mlp.act", "blocks.1.mlp.act"):
        model.network.set_submodule(name, nn.ReLU())
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[8:16].tolist()
    x = images[[(0, i) for i in order]][0].double() / 255
    values = torch.linalg.eigvalsh(full_jacobian_kernel(model, x))
    second = next(of for part, of in whole["ntk"].items() if part.endswith(" batch 1"))
    assert abs(second["condition"] / (values[-1] / values[0]) - 1) < 1e-8

    # killed in the middle: what is there is not done again
    for what, broken in (("ntk", "ntk"), ("norms", "activity"), ("sparsity", "activity")):
        calls, function = [], getattr(analyze, broken)

        def dies(*args, calls=calls, function=function):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return function(*args)

        monkeypatch.setattr(analyze, broken, dies)
        command = [*commands[what], "--out-dir", str(tmp_path / "cut")]
        assert analyze.main(command) == 130
        assert analyze.main(command) == 0
        assert len(calls) == (6 if what == "ntk" else 4), (what, calls)
        (parts,) = json.loads((tmp_path / "cut" / f"{what}.json").read_text())["results"].values()
        assert parts == whole[what], what
        assert analyze.main(command) == 0 and len(calls) == (6 if what == "ntk" else 4)
        monkeypatch.setattr(analyze, broken, function)

    for flags, words in (
        (["--batch", "1"], "--batch 1: at least 2 and, of these images, at most"),
        (["--batch", "41"], "at most 40"),
        (["--images", "x"], "--images x: "),
        (["--images", "999999"], "--images 999999: there are 160 training images"),
        (["--memory", "0"], "--memory 0"),
        (["--memory", "1e-4"], "two images"),
        (["--projections", "-1"], "--projections -1"),
        (["--bacth", "8"], "unknown flag --bacth; did you mean --batch"),
        (["--dtype", "bfloat16"], "ntk is computed in float32 or float64"),
    ):
        line = analyze_refusal(capsys, *commands["ntk"], "--out-dir", tmp_path / "x", *flags)
        assert words in line, (flags, line)
    assert "--at checkpoint needs --checkpoint" in analyze_refusal(
        capsys, "ntk", "--dataset", "shapes", "--at", "checkpoint", "--device", "cpu"
    )


def analyze_again(command, folder, capsys):
    capsys.readouterr()
    assert analyze.main([*command, "--out-dir", str(folder)]) == 0
    return capsys.readouterr().out.splitlines()


def test_compare_gathers_the_numbers_of_the_others(tmp_path, capsys, monkeypatch, small_shapes):
    monkeypatch.setattr(data, "SEVERITIES", (5,))

    def results_of(what):
        return json.loads((tmp_path / f"out/compare/{what}.json").read_text())["results"]

    runs = []
    for words in ("", "--sam-rho 0.1"):
        runs.append(str(tmp_path / f"run{words[-3:]}/ckpt.pt"))
        train_ok(tiny(Path(runs[-1]).parent, f"--max-steps 3 --train-fraction 1 {words}"))
    argv = [
        "compare",
        "--checkpoint",
        *runs,
        *"--images 3/20 --device cpu --workers 0 --out-dir".split(),
        str(tmp_path / "out"),
    ]
    capsys.readouterr()
    assert analyze.main(argv) == 0
    printed = capsys.readouterr().out
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for table in (tmp_path / "out/compare.md").read_text().split("\n\n")
    ]
    (first, _, *ones), (third, _, *threes) = tables
    assert len(ones) == len(threes) == 2 and ones[0][0] in printed
    for run, one, three in zip(runs, ones, threes):
        one, three = dict(zip(first, one)), dict(zip(third, three))
        settings, origin = train.settings(["--eval-only", "--init-from", run, "--device", "cpu"])
        dataset = analyze.training_images(settings, torch.device("cpu"), "24")
        model = train.starting_network(settings, origin, 12, torch.device("cpu"), print).eval()
        x, y = dataset[[(0, i) for i in range(24)]][:2]
        x = x.float() / 255
        blocks = {
            name: analyze.hessian_eigenvalues(
                model, F.cross_entropy, [(x, y)], params=params, tolerance=1e-4
            )["eigenvalues"][0]
            for name, params in analyze.components(model.network).items()
        }
        with torch.no_grad():
            logits = model(x)
        expected = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "λmax": blocks["whole"],
            "training loss": F.cross_entropy(logits, y).item(),
            "training top-1 %": 100 * (logits.argmax(1) == y).float().mean().item(),
        }
        for name, value in expected.items():
            assert abs(float(one[name]) - value) <= 0.011 * abs(value), (name, one[name], value)
        for name, value in blocks.items():
            assert abs(float(three[name]) - value) <= 0.011 * abs(value), (name, three[name], value)
        weights = sum(p.double().square().sum() for p in model.parameters()).sqrt().item()
        assert abs(float(three["‖w‖"]) - weights) < 1e-3 * weights
        of = {
            what: next(parts for name, parts in results_of(what).items() if name.startswith(run))
            for what in ("ntk", "robustness", "norms")
        }
        kappa = np.mean([part["condition"] for part in of["ntk"].values()])
        assert abs(float(one["NTK κ"]) / kappa - 1) < 1e-3, (one, kappa)
        corrupted = [v["top1"] for part, v in of["robustness"].items() if "c-lite/" in part]
        assert abs(float(one["c-lite %"]) - np.mean(corrupted)) < 0.011
        begin, end = of["norms"]["3/20 images"]["activation"].values()
        for which, value in (("1", begin), ("mid", begin), ("last", end)):
            assert abs(float(three[f"‖a_{which}‖"]) / value - 1) < 1e-3
        assert abs(float(one["top-1 %"]) - of["robustness"]["val"]["top1"]) < 0.01

    monkeypatch.setattr(analyze, "lanczos", None)  # nothing is computed again
    monkeypatch.setattr(analyze, "accuracy", None)
    for command in (argv, ["spectrum", *argv[1:]]):
        line = analyze_refusal(capsys, *command, "--loss", "sigmoid")
        assert "--loss is of hessian, landscape and flatness; here it is softmax" in line
    before = (tmp_path / "out/compare.md").read_bytes()
    assert analyze.main(argv) == 0 and (tmp_path / "out/compare.md").read_bytes() == before


class Maps(nn.Module):
    """A network whose units are functions of the images, and whose logits their means."""

    def __init__(self, **functions):
        super().__init__()
        self.functions, self.scale = functions, nn.Parameter(torch.ones(()))
        self.intermediates = {name: ("conv", i) for i, name in enumerate(functions)}
        self.intermediates |= {"weights": ("weights", 0), "last": ("representation", 9)}

    def forward(self, x, out=None):
        for name in out or ():
            out[name] = self.functions[name](x * self.scale)
        return x.mean(dim=(2, 3))


def test_waves_show_at_their_frequency_on_the_diagonal_and_on_its_ring():
    position = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    floor = math.log(1e-6)
    for k in range(1, 5):
        amplitude = (0.5 if k < 4 else 1) * 0.1 * 64  # half of it is at −k, which at π is π itself
        diagonal = 1 + 0.1 * torch.cos(k * (position + position[:, None]))
        across = 1 + 0.1 * torch.cos(k * position).expand(8, 8)
        model = Maps(
            diagonal=lambda x: diagonal.expand(len(x), 3, 8, 8),
            across=lambda x: across.expand(len(x), 3, 8, 8),
        )
        found = analyze.fourier(model, [(torch.zeros(2, 3, 8, 8), None)])
        assert found["frequency"]["diagonal"] == [0, 0.25, 0.5, 0.75, 1]
        expected = [floor - math.log(64)] * 5
        expected[0], expected[k] = 0, math.log(amplitude / 64)
        assert np.allclose(found["diagonal"]["diagonal"], expected, atol=1e-4), (k, found)
        on_ring = [
            (i, j)
            for i in range(-4, 4)
            for j in range(-4, 4)
            if k - 0.5 <= math.hypot(i, j) < k + 0.5
        ]
        peaks = sum(j == 0 and abs(i) == k for i, j in on_ring)
        assert peaks == (2 if k < 4 else 1)
        expected = (peaks * math.log(amplitude) + (len(on_ring) - peaks) * floor) / len(on_ring)
        assert abs(found["radial"]["across"][k] - expected + math.log(64)) < 1e-4, (k, found)
    assert found["images"] == 2 and found["units"]["across"] == ["conv", 1]
    with pytest.raises(train.UserError, match="wide has a map of 8 × 4; it has to be square"):
        analyze.fourier(Maps(wide=lambda x: x[..., :4]), [(torch.zeros(2, 3, 8, 8), None)])


def test_white_noise_is_flat_but_for_what_a_mean_of_logarithms_makes_of_real_numbers():
    torch.manual_seed(0)
    noise = [(torch.randn(500, 3, 8, 8), None) for _ in range(4)]
    found = analyze.fourier(Maps(it=lambda x: x), noise)
    offset = math.log(2) / 2
    assert np.allclose(found["diagonal"]["it"], [0, offset, offset, offset, 0], atol=0.06), found
    assert np.allclose(found["radial"]["it"][1:4], offset, atol=0.06)  # its π has real ones too


def test_half_diagonal_and_variance_are_those_of_the_program_of_park_and_kim():
    torch.manual_seed(0)
    batch = [(torch.randn(2, 3, 14, 14), None)]
    theirs = [0, -0.3717, 0.3697, 0.0192, -0.0294, -0.1997, -0.3329]  # it ends before π
    found = analyze.fourier(Maps(it=lambda x: x), batch)
    assert np.allclose(found["diagonal"]["it"][:-1], theirs, atol=1e-4), found["diagonal"]
    assert found["frequency"]["it"][-2:] == [12 / 14, 1] and found["side"] == {"it": 14}
    found = analyze.variance(Maps(it=lambda x: x), batch)["variance"]["it"]
    assert abs(found - 1.0360156) < 1e-6


def test_variance_is_over_the_points_of_a_map_and_means_are_over_images_and_channels():
    torch.manual_seed(0)
    images = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    model = Maps(
        constant=lambda x: x * 0 + x[..., :1, :1], it=lambda x: x, one=lambda x: x[..., :1, :1]
    ).double()
    whole = analyze.variance(model, [(images, None)])
    by_hand = [sum((v - sum(m) / 16) ** 2 for v in m) / 15 for m in images.reshape(15, 16).tolist()]
    assert abs(whole["variance"]["constant"]) < 1e-15
    assert whole["variance"]["it"] == pytest.approx(sum(by_hand) / 15, rel=1e-12)
    assert whole["variance"]["one"] == 0
    parts = [images[:3], images[3:]]
    for measure, key in ((analyze.variance, "variance"), (analyze.fourier, "diagonal")):
        one = measure(model, [(images, None)])
        two = analyze.pooled(
            [json.loads(train.to_json(measure(model, [(part, None)]))) for part in parts]
        )
        assert one.keys() == two.keys() and two["images"] == 5 and two["units"] == one["units"]
        for unit, value in one[key].items():
            assert np.allclose(two[key][unit], value, rtol=1e-12), (key, unit)
    assert analyze.changes(whole, whole["variance"]) == {  # "one" has another size
        "it": whole["variance"]["it"] - whole["variance"]["constant"]
    }


def test_maps_of_every_family_are_channels_by_rows_by_columns():
    convs = dict(width=8, depth=(1, 1, 1, 1))
    for name, options, sides, channels in (
        ("vit_micro8", dict(depth=2), [4] * 5, [96] * 5),
        ("vit_micro8", dict(depth=2, stem="conv", pool="gap"), [4] * 5, [96] * 5),
        ("mixer_micro8", dict(depth=2), [4] * 5, [96] * 5),
        (
            "pit_ti",
            dict(depth=(1, 1), heads=(1, 2), patch_size=4, stride=4),
            [8] * 3 + [4] * 3,
            [32] * 3 + [64] * 3,
        ),
        ("resnet50", convs, [32, 32, 16, 8, 4], [8, 32, 64, 128, 256]),
        ("preresnet18", convs, [32, 32, 16, 8, 4], [8, 8, 16, 32, 64]),
        (
            "alter_resnet18",
            dict(width=8, depth=(1, 1, 1, 2), msa_blocks=(0, 0, 0, 1)),
            [32, 32, 16, 8, 4, 4],
            [8, 8, 16, 32, 64, 64],
        ),
        (
            "torchvision:swin_t",
            dict(dim=12, depth=(1, 1), heads=(1, 2), patch_size=2),
            [16] * 3 + [8] * 3,
            [12] * 3 + [24] * 3,
        ),
        (
            "torchvision:resnet18",
            {},
            [8, 8, 8, 4, 4, 2, 2, 1, 1],
            [64, 64, 64, 128, 128, 256, 256, 512, 512],
        ),
        ("regnety_1gf", {}, None, None),
        ("torchvision:swin_v2_t", {}, None, None),
    ):
        model = train.assemble(train.build_model(name, 5, 32, **options), [0.5], [0.5]).eval()
        with torch.no_grad():
            maps = analyze.feature_maps(model, torch.rand(2, 3, 32, 32), analyze.units_of(model))
        shapes = [tuple(y.shape) for y in maps.values()]
        assert all(len(shape) == 4 and shape[2] == shape[3] for shape in shapes), (name, shapes)
        assert sides is None or [s[2] for s in shapes] == sides, (name, shapes)
        assert channels is None or [s[1] for s in shapes] == channels, (name, shapes)
        stages = [stage for _, stage in analyze.units_of(model).values()]
        assert stages == sorted(stages) and list(maps) == list(analyze.units_of(model)), name

    model, x, out = tiny_vit(), tiny_images(), dict.fromkeys(["stem", "blocks.1.mlp"])
    with torch.no_grad():
        model(x, out=out)
        first = analyze.feature_maps(model, x, ["stem", "blocks.1.mlp"])
    for name, tokens in out.items():  # token 1 + 4·row + column
        assert first[name][1, 7, 2, 3] == tokens[1, 1 + 4 * 2 + 3, 7], name
    with pytest.raises(train.UserError, match="VGG neither names its units nor has blocks"):
        analyze.units_of(train.build_model("torchvision:vgg11", 5, 32))


def hsic_by_hand(x, y):
    """Song et al. 2012, Eq. 5, as Nguyen et al. 2021 print it."""
    n, K, L = len(x), x.flatten(1) @ x.flatten(1).T, y.flatten(1) @ y.flatten(1).T
    K, L, one = K - torch.diag(K.diag()), L - torch.diag(L.diag()), torch.ones(len(x)).to(K)
    return (
        (K @ L).trace()
        + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        - 2 * (one @ K @ L @ one) / (n - 2)
    ) / (n * (n - 3))


def test_cka_is_the_dense_one_and_blind_to_rotation_and_scale():
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64))[0]
    mixed = torch.randn(3, 3, dtype=torch.float64)
    functions = dict(
        it=lambda x: x,
        turned=lambda x: -7 * (x.flatten(1) @ rotation).reshape(x.shape) + 3,
        other=lambda x: torch.einsum("ij,bjhw->bihw", mixed, x).relu()[..., ::2, ::2],
        constant=lambda x: x * 0 + 1,
    )
    model = Maps(**functions).double()
    batches = [(torch.rand(n, 3, 4, 4, dtype=torch.float64), None) for n in (12, 12, 6, 3)]
    found = analyze.cka(model, batches)
    values = np.array(found["cka"])
    for i, f in enumerate(functions.values()):
        for j, g in enumerate(functions.values()):
            cross, first, second = (
                sum(len(x) * hsic_by_hand(a(x), b(x)) for x, _ in batches[:3])
                for a, b in ((f, g), (f, f), (g, g))
            )  # the 3 are left out
            if 3 in (i, j):
                assert math.isnan(values[i, j])
            else:
                expected = (cross / (first * second).sqrt()).item()
                assert abs(values[i, j] - expected) < 1e-9, (i, j, values, expected)
    assert np.allclose(values.diagonal()[:3], 1, atol=1e-12)
    assert abs(values[0, 1] - 1) < 1e-9 and abs(values[0, 2]) < 0.9
    second = Maps(**{name: functions[name] for name in ("other", "it")}).double()
    across = analyze.cka(model, batches, second)
    assert list(across["units"]) == list(functions) and list(across["other"]) == ["other", "it"]
    assert np.allclose(np.array(across["cka"])[:3], values[:3, [2, 0]], atol=1e-12)
    with pytest.raises(train.UserError, match="at least 4 images"):
        analyze.cka(model, batches[3:])


def test_cka_of_minibatches_is_in_expectation_that_of_all_images():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 2, 2, dtype=torch.float64)
    model = Maps(it=lambda x: x, other=lambda x: x.relu() + 0.3 * x.flip(1)).double()
    subsets = [(x[list(of)], None) for of in itertools.combinations(range(8), 4)]  # all 70
    whole = np.array(analyze.hsic(model, [(x, None)])["sums"]) / 8
    mean = np.array(analyze.hsic(model, subsets)["sums"]) / (4 * 70)
    assert np.allclose(mean, whole, rtol=1e-10), (mean, whole)

    x = torch.randn(256, 3, 4, 4, dtype=torch.float64)
    model = Maps(it=lambda x: x, other=lambda x: x.square()).double()
    whole = analyze.cka(model, [(x, None)])["cka"][0][1]
    of_8 = [
        analyze.cka(model, [(x[i : i + 8], None) for i in range(0, 256, 8)])["cka"][0][1]
        for x in (x[torch.randperm(256)] for _ in range(20))
    ]
    error = np.std(of_8) / math.sqrt(20)
    assert abs(np.mean(of_8) - whole) < 4 * error and error < 0.01, (np.mean(of_8), whole, error)


def test_without_a_unit_is_as_if_it_were_the_identity():
    torch.manual_seed(0)
    x = torch.rand(120, 3, 16, 16)
    small = dict(width=8, depth=(1, 1, 2, 1))
    for model, name, weight in (
        (
            vit.build("vit_micro8", 3, 16, depth=2, dim=24, heads=2),
            "blocks.1.mlp",
            "blocks.1.mlp.fc2",
        ),
        (
            vit.build("vit_micro8", 3, 16, depth=2, dim=24, heads=2),
            "blocks.0.attn",
            "blocks.0.attn.proj",
        ),
        (resnet.build("resnet50", 3, 16, **small), "layer2.0", "layer2.0.conv2"),  # of stride 2
        (
            alternet.build(
                "alter_resnet18", 3, 16, window_size=2, msa_blocks=(0, 0, 1, 0), **small
            ),
            "layer3.1",
            "layer3.1.attn.proj",
        ),
    ):
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)
        head = model.fc if hasattr(model, "fc") else model.head
        with torch.no_grad():
            head.bias -= model.eval()(x).mean(dim=0)  # else one class wins everywhere
            y = model(x).argmax(dim=1)
        batches = [(x[:100], y[:100]), (x[100:], y[100:])]
        found = analyze.lesion(model, batches)
        assert found["whole"] == 100 and found["units"].keys() == found["without"].keys() == {
            unit for unit, (kind, _) in analyze.units_of(model).items() if kind != "stem"
        }
        identity = copy.deepcopy(model)
        layer = identity.get_submodule(weight)
        for p in layer.parameters():
            p.data.zero_()
        if name == "layer2.0":
            nn.init.dirac_(layer.weight)
        expected = analyze.accuracy(identity, batches)
        assert found["without"][name] == expected < 100, (name, found)
        assert analyze.accuracy(identity, batches, name) == expected, "it was the identity"
    with pytest.raises(train.UserError, match="RegNet has no units that can be left out"):
        analyze.lesion(train.build_model("regnety_1gf", 3, 32), [])


def test_analyses_of_maps_go_on_where_they_were(tmp_path, capsys, monkeypatch, small_shapes):
    monkeypatch.setattr(analyze, "IMAGES_PER_PIECE", 64)
    monkeypatch.setitem(data.SHAPES_SPLITS, "val", (2**30, 150))
    runs = [str(tmp_path / name / "ckpt.pt") for name in ("a", "b")]
    for run, words in zip(runs, ("", "--depth 1 --pool gap")):
        train_ok(tiny(Path(run).parent, "--max-steps 2 --train-fraction 1", words))
    common = ["--checkpoint", *runs, "--device", "cpu", "--workers", "0"]
    monkeypatch.setattr(analyze, "figure", lambda *_: None)
    broken = dict(fourier="fourier", variance="variance", cka="hsic", lesion="accuracy")
    for what in broken:
        command = [what, *common, *DISTRIBUTED[what].split()]
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        assert analyze.main([*command, "--out-dir", str(whole)]) == 0
        printed = capsys.readouterr().out
        results = json.loads((whole / f"{what}.json").read_text())["results"]
        assert [name[:-11] for name in results] == runs and all(n in printed for n in results)
        calls, function = [], getattr(analyze, broken[what])

        @functools.wraps(function)
        def dies(*args, calls=calls, function=function):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return function(*args)

        monkeypatch.setattr(analyze, broken[what], dies)
        assert analyze.main([*command, "--out-dir", str(cut)]) == 130
        assert analyze.main([*command, "--out-dir", str(cut)]) == 0
        units = dict(fourier=2 * 3, variance=2 * 3, cka=3 * 3, lesion=5 + 3)[what]
        assert len(calls) == units + 1, (what, len(calls))
        assert json.loads((cut / f"{what}.json").read_text())["results"] == results, what
        assert analyze.main([*command, "--out-dir", str(cut)]) == 0 and len(calls) == units + 1
        monkeypatch.setattr(analyze, broken[what], function)
        capsys.readouterr()
        if what == "cka":
            assert all(
                list(parts) == ["all images in batches of 8"]
                for parts in list(results.values())[1:]
            ), "the pair is with the first"
            against = [list(parts) for parts in results.values()][0][1]
            assert against.endswith(f"against {list(results)[1]}"), against

    # by hand: 140 images, class-balanced, on the trained network
    settings, origin = train.settings(["--eval-only", "--init-from", runs[0], "--device", "cpu"])
    model, images = analyze.network_and_images(settings, origin, torch.device("cpu"))
    images.restrict(data.subset(images.labels, Fraction(140, 150)))
    x = images[[(0, i) for i in range(140)]][0].float() / 255
    name, parts = next(
        iter(json.loads((tmp_path / "whole/fourier.json").read_text())["results"].items())
    )
    assert parts["140 images"]["images"] == 140
    for unit, curve in analyze.fourier(model, [(x, None)])["radial"].items():
        assert np.allclose(parts["140 images"]["radial"][unit], curve, atol=1e-5), unit

    for argv, words in (
        ([*common, "--images", "151"], "--images 151: there are 150 held-out images"),
        ([*common, "--images", "-3"], "--images -3: a fraction of"),
        ([*common, "--image", "3"], "unknown flag --image; did you mean --images"),
        ([*common, "--dtype", "bfloat16"], "fourier is computed in float32 or float64"),
        (["--checkpoint", str(tmp_path / "none.pt")], "none.pt: No such file"),
        ([], "needs either --checkpoint RUN/ckpt.pt or"),
    ):
        line = analyze_refusal(capsys, "fourier", *argv, "--out-dir", tmp_path / "x")
        assert words in line, (argv, line)
    for batch, words in (("3", "--batch 3: it is at least 4"), ("-8", "--batch -8")):
        assert words in analyze_refusal(capsys, "cka", *common, "--batch", batch)


class Recorder(nn.Module):
    """Keeps the images that it is shown."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(1, dtype=torch.float64)), []

    def forward(self, x):
        self.seen.append(x)
        return x.mean((2, 3)) * self.weight


def noise_seen(images, frequency, **how):
    """What `noise` adds to a data set's images (N, 3, H, W), by order of their evaluation."""
    model, plain = Recorder(), Recorder()
    for each, f in ((model, frequency), (plain, None)):
        analyze.noise(each, images, f, **how)
    return torch.cat(model.seen) - torch.cat(plain.seen)


@pytest.fixture
def grey():
    """48 grey images of 16² pixels."""
    return data.InMemory(
        torch.full((48, 3, 16, 16), 128, dtype=torch.uint8), torch.arange(48) % 3, list("abc")
    )


def test_the_bands_of_the_noise_are_rings_that_tile_all_frequencies():
    for n in (9, 16):
        k = [i if 2 * i < n else i - n for i in range(n)]
        radius = [[2 * math.sqrt(a * a + b * b) / n for b in k] for a in k]
        for f, window in ((0, 0.1), (0.5, 0.1), (0.5, 0.4), (1, 0.3)):
            expected = [[f - window / 2 <= r < f + window / 2 for r in row] for row in radius]
            assert analyze.ring(n, f, window).tolist() == expected, (n, f, window)
        rings = torch.stack([analyze.ring(n, f / 10) for f in range(15)])
        assert (rings.sum(0) == 1).all(), "each frequency is in one of the bands"


def test_the_bands_of_the_papers_code_are_its_squares():
    # (size, frequency / π, window / π): the number of frequencies, by how-do-vits-work's FreqAttack
    for (n, f, window), number in {
        (32, 0.5, 0.1): 60,
        (32, 0.9, 0.1): 224,
        (32, 1, 0.1): 124,
        (32, 0, 0.1): 0,
        (32, 0.1, 0.1): 16,
        (224, 0.25, 0.1): 2420,
        (224, 1, 0.1): 5232,
        (8, 0.5, 0.4): 12,
        (16, 0.9, 0.2): 112,
    }.items():
        assert analyze.ring(n, f, window, "code").sum() == number, (n, f, window)
    k = torch.fft.fftfreq(16, 1 / 16)
    band = analyze.ring(16, 0.5, 0.2, "code")  # 2·int(4.8) and 2·int(3.2) wide, about index 8
    inside = lambda half: ((k >= -half) & (k < half)).float()
    expected = torch.outer(inside(4), inside(4)) - torch.outer(inside(3), inside(3))
    assert torch.equal(band.float(), expected)
    with pytest.raises(analyze.UserError, match="even image size, not 9"):
        analyze.ring(9, 0.5, 0.1, "code")


def test_band_noise_is_the_real_part_of_a_noise_in_its_band_and_nowhere_else():
    delta = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    wave = np.exp(-2j * np.pi * np.outer(range(16), range(16)) / 16)  # the transform, by its matrix
    spectrum = wave @ delta.numpy() @ wave
    for f in (0, 0.3, 1):
        mask = analyze.ring(16, f)
        exact = wave.conj() @ (spectrum * mask.numpy()) @ wave.conj() / 16**2
        assert abs(exact.imag).max() < 1e-12, "the ring is symmetric, so the noise is real"
        found = analyze.band_noise(delta, mask)
        assert found.dtype == torch.float64 and abs(found.numpy() - exact.real).max() < 1e-12
        outside = wave @ found.numpy() @ wave * ~mask.numpy()
        assert abs(outside).max() < 1e-11 and found.abs().max() > 1e-3


def test_the_noises_energy_follows_the_bands_area_or_is_equal_on_request(grey):
    for f in (0.3, 0.5, 1):
        area = analyze.ring(16, f).sum().item()
        for equal, expected in ((False, area), (True, 256)):
            noise = noise_seen(grey, f, sigma=0.2, equal_energy=equal)
            energy = noise.square().sum().item() / (48 * 3 * 0.2**2)
            spread = math.sqrt(2 / (48 * 3 * area))  # of a χ² with as many degrees of freedom
            assert abs(energy / expected - 1) < 4 * spread, (f, equal, energy, expected)
            spectrum = torch.fft.fft2(noise).abs()
            assert spectrum[..., ~analyze.ring(16, f)].max() < 1e-5 * spectrum.max()
            theirs = analyze.ring(16, f, 0.1, "code")
            noise = noise_seen(grey, f, sigma=0.2, form="code", equal_energy=equal)
            energy = noise.square().sum().item() / (48 * 3 * 0.2**2) / 16**2
            exact = sum(  # of e_k, whose real part is half of e_k and half of e_-k
                abs(analyze.band_noise(unit, theirs.double()).square().sum().item())
                for unit in torch.eye(16**2).reshape(-1, 16, 16).double()
            )
            expected = 1 if equal and exact else exact / 16**2
            assert abs(energy - expected) <= 8 * spread * expected, (f, equal, energy, expected)
    signs = noise_seen(grey, 1, sigma=0.2, window=2, form="code")  # -1 to 1 in both: everything
    assert (signs.abs() - 0.2).abs().max() < 1e-6, "the code's noise is of signs"


def test_noise_depends_on_image_frequency_and_seed_only(grey):
    whole = noise_seen(grey, 0.5)
    assert torch.equal(noise_seen(grey, 0.5, batch_size=7), whole)
    assert torch.equal(noise_seen(grey.part([5, 3, 40]), 0.5), whole[[5, 3, 40]])
    assert not torch.equal(noise_seen(grey, 0.5, seed=1), whole)
    assert (whole[0] - whole[1]).abs().max() > 0.01 < (whole[0, 0] - whole[0, 1]).abs().max()
    other = noise_seen(grey, 0.5001)  # the same ring, another draw
    assert not torch.equal(other, whole)


def test_calibration_errors_against_their_definitions_one_image_at_a_time():
    torch.manual_seed(0)
    logits = 2 * torch.randn(83, 4, dtype=torch.float64)
    y = torch.where(torch.rand(83) < 0.6, logits.argmax(1), torch.randint(4, (83,)))
    logits[0], y[0] = torch.tensor([800.0, 0, 0, 0]), 0  # a confidence of exactly 1
    logits[1], y[1] = torch.tensor([0, 800.0, 0, 0]), 2
    p = [
        [math.exp(z - max(row)) / sum(math.exp(v - max(row)) for v in row) for z in row]
        for row in logits.tolist()
    ]
    assert p[0][0] == p[1][1] == 1

    def ece(pairs):
        bins = [[] for _ in range(5)]
        for confidence, right in pairs:
            bins[max(0, math.ceil(5 * confidence) - 1)].append((confidence, right))
        return bins, 100 / 83 * sum(abs(sum(c - r for c, r in one)) for one in bins)

    top = [(max(row), row.index(max(row)) == k) for row, k in zip(p, y.tolist())]
    bins, expected = ece(top)
    ordered, start, adaptive = sorted(top), 0, 0
    assert [c for c, _ in ordered].count(1) == 2
    ordered[-2:] = [(1, 0.5)] * 2  # equal confidences share their accuracy
    for size in (17, 17, 17, 16, 16):
        adaptive += abs(sum(c - r for c, r in ordered[start : start + size])) / 83
        start += size
    classwise = (
        sum(ece([(row[k], label == k) for row, label in zip(p, y.tolist())])[1] for k in range(4))
        / 4
    )
    brier = (
        sum((q - (k == label)) ** 2 for row, label in zip(p, y.tolist()) for k, q in enumerate(row))
        / 83
    )
    nll = F.cross_entropy(logits, y).item()
    found = analyze.calibration([(logits, y)], bins=5)
    for key, value in dict(
        images=83,
        ece=expected,
        adaptive_ece=100 * adaptive,
        brier=brier,
        classwise_ece=classwise,
        nll=nll,
        top1=100 / 83 * sum(r for _, r in top),
        confidence=100 / 83 * sum(c for c, _ in top),
    ).items():
        assert abs(found[key] - value) < 1e-9, (key, found[key], value)
    assert found["bins"]["images"] == [len(one) for one in bins]
    for key, of in (("confidence", 0), ("accuracy", 1)):
        for value, one in zip(found["bins"][key], bins):
            assert (
                value is None
                if not one
                else abs(value - 100 * sum(pair[of] for pair in one) / len(one)) < 1e-9
            ), (key, one)
    constant = analyze.calibration([(torch.zeros(1000, 10), torch.arange(10).repeat(100))])
    assert max(constant["ece"], constant["adaptive_ece"]) < 1e-5, "it is never wrong about itself"
    parts = analyze.calibration(zip(logits.split(30), y.split(30)), bins=5)
    assert all(abs(parts[key] - found[key]) < 1e-9 for key in found if key != "bins")


def test_bins_have_their_upper_edge_and_an_exact_one_is_in_the_last():
    p = torch.tensor([0, 0.5, 0.75, 0.75 + 1e-9, 1, math.nan], dtype=torch.float64)
    count, right, total = train.bin_sums(p[:, None], torch.ones(6, 1), 4)
    assert count.tolist() == [[2, 1, 1, 2]] and right.tolist() == count.tolist()
    assert total[0].tolist() == [0, 0.5, 0.75, 1.75 + 1e-9]


def attention_by_hand(model, x):
    """Softmax of q·kᵀ/√d from what each layer of queries, keys and values returns."""
    found, handles = [], []

    def take(module, args, qkv):
        for image in qkv:
            heads = module.heads
            q, k, _ = image.view(len(image), 3, heads, -1).unbind(1)  # (N, H, d) each
            scores = torch.stack([q[:, h] @ k[:, h].T for h in range(heads)]) / q.shape[-1] ** 0.5
            found.append(scores.exp() / scores.exp().sum(-1, keepdim=True))

    for module in model.modules():
        if isinstance(module, vit.Attention):
            module.qkv.heads = module.heads
            handles.append(module.qkv.register_forward_hook(take))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "name, flags",
    [
        ("vit_micro8", {}),
        ("vit_micro8", dict(pool="gap")),
        ("vit_micro8", dict(stem="conv")),
        ("pit_ti", dict(patch_size=4, stride=4, depth=(1, 2), heads=(1, 2))),
    ],
)
def test_attention_maps_are_the_softmax_and_sum_to_one(name, flags):
    torch.manual_seed(0)
    network = vit.build(name, num_classes=3, image_size=32, **flags).double()
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model, x = train.assemble(network, [0.5], [0.5]).eval(), torch.rand(1, 3, 32, 32).double()
    by_hand = attention_by_hand(model, x)
    found = analyze.attention(model, x[0])
    side, prefix = 4, flags.get("pool") != "gap"  # of the last stage
    last = by_hand[-1]

    def shown(matrix):
        row = [
            sum(matrix[q, k].item() for q in ([0] if prefix else range(len(matrix))))
            for k in range(prefix, len(matrix))
        ]
        return torch.tensor(row, dtype=torch.float64).view(side, side) / sum(row)

    eye, joint = torch.eye(len(last[0])), torch.eye(len(last[0])).double()
    for layer in by_hand:
        if layer.shape == last.shape:
            joint = (layer.mean(0) + eye) / 2 @ joint
    for key, expected in (
        ("map", shown(last.mean(0))),
        ("rollout", shown(joint)),
        ("heads", torch.stack([shown(head) for head in last])),
    ):
        got = torch.tensor(found[key], dtype=torch.float64)
        assert got.shape == expected.shape and (got - expected).abs().max() < 1e-12, key
        assert (got.sum((-2, -1)) - 1).abs().max() < 1e-12
    assert found["shown"] == ("of the class token" if prefix else "received, mean over queries")

    images = torch.rand(3, 3, 32, 32).double()
    distances = analyze.attention_distance(model, [(images[:2], None), (images[2:], None)])
    assert len(distances) == len(by_hand)
    weights = attention_by_hand(model, images)
    for i, heads in enumerate(distances.values()):
        of_images = [layer[:, prefix:, prefix:] for layer in weights[3 * i : 3 * i + 3]]
        n = math.isqrt(of_images[0].shape[-1])
        at = [(32 / n * (j // n), 32 / n * (j % n)) for j in range(n * n)]
        for h, value in enumerate(heads):
            expected = sum(
                sum(a * math.dist(at[q], at[k]) for k, a in enumerate(row)) / sum(row)
                for layer in of_images
                for q, row in enumerate(layer[h].tolist())
            )
            assert abs(value - expected / (3 * n * n)) < 1e-9, (i, h)


def test_upsampling_a_map_keeps_its_place():
    values = [[0.0, 1.0], [2.0, 3.0]]
    big = torch.from_numpy(analyze.upsampled(values, 8))
    assert big.shape == (8, 8) and big[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [0, 1, 2, 3]
    assert abs(big.mean() - 1.5) < 1e-6 and abs(big[0, 3] - 0.375) < 1e-6  # (3.5 - 1.5) / 4 - 1/8


@pytest.fixture
def two_runs(tmp_path, small_shapes):
    """Checkpoints of a ViT, augmented and mixed, and of a ResNet."""
    train_ok(
        tiny(
            tmp_path / "vit",
            "--max-steps 7 --train-fraction 1 --augment crop --mixup 0.8 --cutmix 1 --seed 3",
        )
    )
    train_ok(
        [
            "--out-dir",
            str(tmp_path / "resnet"),
            *(
                "--dataset shapes --model resnet18 --width 8 --max-steps 5 --train-fraction 1/2 "
                "--epochs 2 --batch-size 16 --micro-batch 8 --device cpu"
            ).split(),
        ]
    )
    return [str(tmp_path / name / "ckpt.pt") for name in ("vit", "resnet")]


def test_training_nll_is_of_augmented_mixed_images_and_what_networks_differ_in_is_read_off(
    tmp_path, two_runs
):
    for against in ("model", "images", "epochs"):
        argv = [
            "nll",
            "--checkpoint",
            *two_runs,
            *"--device cpu --workers 0 --dtype float64 --against".split(),
            against,
            "--out-dir",
            str(tmp_path / "out"),
        ]
        assert analyze.main(argv) == 0
    results = json.loads((tmp_path / "out/nll.json").read_text())["results"]
    found, plain = (of["1 of the training images"] for of in results.values())
    settings, origin = train.settings(
        ["--eval-only", "--init-from", two_runs[0], "--device", "cpu", "--dtype", "float64"]
    )
    cpu = torch.device("cpu")
    dataset = train.load_split(settings, "train", cpu, print, augment="crop")
    dataset.restrict(torch.randperm(160, generator=torch.Generator().manual_seed(data.key(3, 3))))
    model = train.starting_network(settings, origin, 12, cpu, print).eval()
    mix, nll = train.mixing(settings, 12), 0
    for number, first in enumerate(range(0, 160, 8)):
        x, y = dataset[[(0, i) for i in range(first, first + 8)]][:2]
        torch.manual_seed(data.key(3, -1, number, 2))
        x, shares = mix(x.double() / 255, y)
        with torch.no_grad():
            nll -= (shares * model(x).log_softmax(1)).sum().item() / 160
    assert abs(found["nll"] - nll) < 1e-9, (found, nll)
    assert found["augmented"]["augment"] == "crop" and plain["augmented"]["mixup"] == 0
    assert (found["images"], plain["images"]) == (160 / 12, 80 / 12)
    assert (found["epochs"], plain["epochs"]) == (7 / 5, 5 / (80 // 16))
    assert (found["patch"], found["kernel"]) == (8, 4) and plain["patch"] is plain["kernel"] is None


def test_noise_attention_calibration_and_nll_go_on_where_they_were_and_refuse_what_is_wrong(
    tmp_path, capsys, monkeypatch, two_runs
):
    Image.new("RGB", (40, 50), "red").save(tmp_path / "red.png")
    first, out = two_runs[0], ["--device", "cpu", "--workers", "0", "--out-dir", tmp_path / "out"]
    commands = {
        "nll": [],
        "noise": ["--frequencies", "0", "0.5"],
        "calibration": [],
        "attention": [
            "--image",
            tmp_path / "red.png",
            *"--indices 59 --each-head --rollout --distance 24".split(),
        ],
    }
    for name, flags in commands.items():
        argv = [str(a) for a in (name, "--checkpoint", *two_runs, *flags, *out)]
        before = analyze_again(argv[:-2], argv[-1], capsys)
        with monkeypatch.context() as patch:
            for function in (name, "attention_distance"):  # nothing is computed again
                patch.setattr(analyze, function, lambda *_: 1 / 0)
            assert analyze_again(argv[:-2], argv[-1], capsys) == before
    text = "\n".join(before)
    assert "ResNet shows no map of global attention" in text and "image 59" in text, text
    results = {
        name: json.loads((tmp_path / f"out/{name}.json").read_text())["results"]
        for name in commands
    }
    assert all(len(of) == 2 for name, of in results.items() if name != "attention")
    assert [len(of) for of in results["attention"].values()] == [3]
    for own, calibrated in zip(results["noise"].values(), results["calibration"].values()):
        assert list(own)[1].startswith("0π, σ 0.5") and len(own) == 3
        for key in ("top1", "nll", "ece"):  # the same by train.evaluate
            assert abs(own["no noise"][key] - calibrated["10 bins"][key]) < 1e-4, key
    common = ["--checkpoint", first, *out]
    argv = [str(a) for a in ("noise", *common[:-2], "--frequencies", "0", "--form", "code")]
    assert analyze_again(argv, tmp_path / "code", capsys)[1].split()[-1] == "-", "an empty band"
    for argv, words in (
        (["noise", "--sigma", "-1"], "--sigma -1: it is at least 0"),
        (["noise", "--frequencies", "-0.1"], "--frequencies -0.1"),
        (["noise", "--fromo", "code"], "unknown flag --fromo; did you mean --form"),
        (["calibration", "--bins", "0"], "--bins 0: it is at least 1"),
        (["attention", "--indices", "60"], "there are 60 held-out images, the first is 0"),
        (["attention", "--image", tmp_path / "no.png"], "no.png: No such file"),
        (["attention", "--image", first], "ckpt.pt is not an image"),
        (["nll", "--against", "size"], "invalid choice: 'size'"),
        (["nll", "--images", "1000"], "there are 160 training images"),
    ):
        line = analyze_refusal(capsys, *argv, *common)
        assert words in line, (argv, line)
    state = torch.load(first, weights_only=True)
    state["model"]["head.weight"][0] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    for argv in (
        ["nll"],
        ["noise"],
        ["calibration"],
        ["lesion"],
        ["hessian", "--params", "whole", "--images", "12"],
        ["robustness", "--benchmarks", "val"],
        ["robustness", "--benchmarks", "pgd"],
        ["norms", "--images", "12"],
    ):
        line = analyze_refusal(capsys, *argv, *out, "--checkpoint", tmp_path / "nan.pt", first)
        assert "is not finite: the network gives NaN" in line, (argv, line)
        assert f"{tmp_path}/nan.pt (" in line, "of which network it is"
    line = analyze_refusal(capsys, "attention", "--checkpoint", two_runs[1], *out)
    assert "none of the networks has a map of global attention" in line
    line = analyze_refusal(capsys, "nll", "--checkpoint", *two_runs, *out, "--against", "patch")
    assert "resnet/ckpt.pt" in line and "has no such number" in line
    anew = [*out[:-1], tmp_path / "anew", "--checkpoint", two_runs[1], "--against", "patch"]
    with monkeypatch.context() as patch:
        patch.setattr(analyze, "nll", lambda *_: pytest.fail("it is said before"))
        assert " has no such number" in analyze_refusal(capsys, "nll", *anew)
    for flags, words in (
        ("--train-fraction 5", "--train-fraction 5: a fraction of 5 of "),
        ("--train-fraction half", "--train-fraction half: Invalid literal"),
        ("--hold-out 1.5", "--hold-out 1.5: a fraction of 3/2 of "),
    ):
        argv = ["hessian", *out, "--checkpoint", first, "--images", "12", *flags.split()]
        assert words in analyze_refusal(capsys, *argv), flags


def run_folder(
    path,
    model="vit_p_1gf",
    speeds=(100.0, 400.0, 300.0),
    top1=60.0,
    nll=1.0,
    end="final",
    **settings,
):
    """Of a run of 3 epochs of 10 steps, as train.py writes it."""
    path.mkdir(parents=True)
    settings = (
        dict(model=model, stem=None, dataset="imagenet", epochs=3, sam_rho=0.0, batch_size=64)
        | settings
    )
    (path / "config.json").write_text(json.dumps(dict(settings=settings)))
    records = [
        r
        for i, speed in enumerate(speeds, 1)
        for r in (
            dict(step=10 * i, epoch=float(i), loss=3.0 - i, error=90 - i, images_per_second=speed),
            dict(step=10 * i, epoch=float(i), val=dict(top1=20.0 * i)),
        )
    ]
    numbers = dict(training=dict(top1=75.0), validation=dict(top1=top1, nll=nll))
    records += {
        "final": [dict(step=30, epoch=3.0, final=numbers, images_per_second=1.0)],
        "diverged": [dict(step=30, epoch=3.0, diverged=True)],
        "": [],
    }[end]
    (path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_curves_are_those_of_the_log_of_runs_that_ended_or_not(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, live, lost = (
        run_folder(tmp_path / (end or "live"), end=end) for end in ("final", "", "diverged")
    )
    log, config = Path(live, "log.jsonl"), Path(live, "config.json")
    config.unlink()  # curves are in the log alone
    log.write_text(log.read_text() + '{"step": 40, "epo')
    for foreign in ('{"loss": 1}', '{"step": 20}'):  # a line, and not of a run
        (tmp_path / "foreign.jsonl").write_text(foreign)
        assert analyze.read_log("foreign.jsonl") == []
    argv = ["curves", "--runs", whole, str(log), lost]
    capsys.readouterr()
    assert analyze.main(argv) == 0
    assert f"{log}: the last line is half written and left out" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/curves/curves.json").read_text())["results"]
    for run, ended, error in (
        (whole, "finished", 25),
        (str(log), None, None),
        (lost, "diverged", None),
    ):
        assert results[run] == {
            "loss": [[10, 1, 2.0], [20, 2, 1.0], [30, 3, 0.0]],
            "error": [[10, 1, 89], [20, 2, 88], [30, 3, 87]],
            "top1": [[10, 1, 20.0], [20, 2, 40.0], [30, 3, 60.0]],
            "ended": ended,
            "training error": error,
        }
    log.write_text("")
    assert analyze.main(argv) == 0, "a run that has just begun has no record yet"
    for text in (
        '{"step": 1, "epo\n{"step": 2, "epoch": 1}\n',
        '{"step": 2}\n',
        "[]\n",
        "\x00\n",
        '{"step": 1, "epoch": 1, "val": 0.5}\n',
    ):
        log.write_text(text)
        assert f"{log}, line 1: not a record of train.py" in analyze_refusal(capsys, *argv), text
    assert "no/log.jsonl: No such file" in analyze_refusal(
        capsys, "curves", "--runs", "no/log.jsonl"
    )


def test_peak_has_minutes_of_an_epoch_from_the_median_speed(tmp_path, capsys):
    runs = [
        run_folder(tmp_path / "a"),
        run_folder(tmp_path / "b", "vit_c_4gf", top1=70.0),
        run_folder(tmp_path / "c", "vit_micro8", stem="conv", speeds=(64.0,) * 3),
        run_folder(tmp_path / "d", end="diverged"),
    ]
    argv = ["peak", "--out-dir", str(tmp_path), "--runs"]
    capsys.readouterr()
    assert analyze.main([*argv, *runs]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "peak.json").read_text())["results"]
    assert f"{runs[3]} is not finished" in printed and list(results) == runs[:3]
    assert [of["minutes"] for of in results.values()] == [640 / 300 / 60, 640 / 300 / 60, 1 / 6]
    assert [of["error"] for of in results.values()] == [40, 30, 40]
    assert [of["family"] for of in results.values()] == ["vit_p", "vit_c", "vit, conv stem"]
    # Xiao et al. §6: under 20 minutes the best network without more data is ViT_C-36GF
    fast = {name: row for name, row in analyze.XIAO_2.items() if row[3] < 20}
    assert len(analyze.XIAO_2) == 23 and all(len(row) == 8 for row in analyze.XIAO_2.values())
    assert min(row[7] for row in fast.values() if row[7]) == fast["vit_c_36gf"][7] == 14.2
    assert sorted({analyze.family_of(name) for name in analyze.XIAO_2}) == [
        "efficientnet",
        "regnety",
        "regnetz",
        "resnet",
        "vit_c",
        "vit_p",
    ]
    other = run_folder(tmp_path / "e", dataset="shapes")
    assert "several data sets" in analyze_refusal(capsys, *argv, runs[0], other)
    not_finite = run_folder(tmp_path / "f", nll=None)
    assert "none of the runs is finished" in analyze_refusal(capsys, *argv, runs[3], not_finite)
    Path(runs[0], "config.json").write_text("{")
    assert "is missing or damaged" in analyze_refusal(capsys, *argv, runs[0])


def test_other_networks_than_the_papers_are_not_beside_the_papers_numbers(tmp_path, capsys):
    argv = ["complexity", "--models", "vit_s32", "vit_p_1gf", "--out-dir", str(tmp_path)]
    for flags, shown in (([], ["23", "4.8"]), (["--depth", "3"], ["-", "-"])):
        capsys.readouterr()
        assert analyze.main([*argv, *flags]) == 0
        header, rows = table_in(capsys.readouterr().out, "pixels")
        columns = header.index("Chen"), header.index("Xiao M")
        assert [float(row[i]) if row[i] != "-" else "-" for row, i in zip(rows, columns)] == [
            value if value == "-" else float(value) for value in shown
        ], (flags, rows)


def test_complexity_is_beside_the_papers_and_within_its_rounding(tmp_path, capsys):
    models = [
        "resnet50",
        "regnety_1gf",
        "vit_c_4gf",
        "vit_s16",
        "mixer_b32",
        "vit_s16 --stem conv",
        "torchvision:vit_b_16",
    ]
    capsys.readouterr()
    assert analyze.main(["complexity", "--models", *models, "--out-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    header, rows = table_in(printed, "pixels")
    rows = {row[0]: [None if cell == "-" else float(cell) for cell in row[1:]] for row in rows}
    assert list(rows) == models
    for name in models[:3]:
        side, flops, xiao_flops, params, xiao_params, _, acts, xiao_acts = rows[name]
        assert abs(flops - xiao_flops) < 0.06 and abs(acts - xiao_acts) < 0.06, rows[name]
        assert abs(params - xiao_params) < 0.06 and side == {"regnety_1gf": 232}.get(name, 224)
    for name in ("vit_s16", "mixer_b32", "resnet50"):
        assert -0.5 <= rows[name][3] - rows[name][5] < 1, "rounded, or cut"
    assert "torchvision:vit_b_16: cannot count multi_head_attention_forward" in printed
    results = json.loads((tmp_path / "complexity.json").read_text())["results"]
    assert results["torchvision:vit_b_16"] == dict(params=86_567_656, macs=None, acts=None)
    assert results["vit_s16"]["macs"] == 4_598_882_304


def test_correlations_are_pearsons_and_spearmans():
    x = [1.0, 2.0, 4.0, 8.0]
    linear, ranks = analyze.correlations(x, [math.log(v) for v in x])
    assert abs(ranks - 1) < 1e-12
    assert abs(linear - 11.5 / math.sqrt(28.75 * 5)) < 1e-12  # by hand, the logarithms 0 1 2 3
    linear, ranks = analyze.correlations(x, [3, 3, 2, -5])  # ranks 3.5 3.5 2 1: by hand
    assert abs(ranks + 4.5 / math.sqrt(5 * 4.5)) < 1e-12, ranks
    assert math.isnan(analyze.correlations(x, [1, 1, 1, 1])[0])
    table = list(zip(*analyze.XIAO_2.values()))  # §6: time follows activations, FLOPs less
    flops, acts = (analyze.correlations(table[3], table[i]) for i in (0, 2))
    assert acts[0] > 0.9 > 0.7 > flops[0] and acts[1] > 0.95 > 0.8 > flops[1]


@pytest.mark.parametrize("model", ["vit_micro8", "resnet18 --width 8"])
@pytest.mark.parametrize("rho", [0, 0.5])
def test_the_step_that_is_timed_is_that_of_a_training(
    tmp_path, monkeypatch, small_shapes, rho, model
):
    seen, to_float, loss = [], train.to_float, train.softmax_loss
    monkeypatch.setattr(train, "to_float", lambda x, m: (seen.append(x.clone()), to_float(x, m))[1])
    monkeypatch.setattr(train, "softmax_loss", lambda z, y, s: (seen.append(y), loss(z, y, s))[1])
    argv = (
        f"--model {model} --dataset shapes --max-steps 1 --batch-size 8 --micro-batch 8 "
        f"--warmup-steps 0 --grad-clip 0.5 --label-smoothing 0.1 --sam-rho {rho} --device cpu "
        f"--optimizer sgd --dtype float64 --out-dir {tmp_path / 'run'}"
    ).split()
    trained = train_ok(argv)["model"]
    x, y = seen[:2]
    monkeypatch.setattr(train, "to_float", to_float)
    monkeypatch.setattr(analyze, "random_batch", lambda *_: (x, y))
    settings, origin = train.settings(argv)
    settings.timing = dict(micro_batches=1)
    bare = train.starting_network(settings, origin, 12, torch.device("cpu"), print)
    before = copy.deepcopy(bare.network.state_dict())
    optimizer = train.make_optimizer(settings, bare, torch.device("cpu"))
    mode = "sam" if rho else "training"
    analyze.work(settings, bare, bare, optimizer, "inference", 8)()
    assert same_tensors(bare.network.state_dict(), before) and not bare.training
    analyze.work(settings, bare, bare, optimizer, mode, 8)()
    assert same_tensors(bare.network.state_dict(), trained) and bare.training
    assert not same_tensors(before, trained)
    # three passes of the same images: the same gradient and statistics
    settings.timing = dict(micro_batches=3)
    bare.network.load_state_dict(before)
    optimizer = train.make_optimizer(settings, bare, torch.device("cpu"))
    analyze.work(settings, bare, bare, optimizer, mode, 8)()
    assert largest_difference(bare.network.state_dict(), trained) < 1e-12


def test_throughput_finds_the_best_batch_and_compares_in_rounds(tmp_path, capsys, monkeypatch):
    """Time is a known function: the mixer takes twice as long, 8 images are the fastest batch, 64
    too many for memory, and later measurements of the same waver."""
    timed, dies_at, passes_of = [], 0, {"inference": 1, "sam": 6}
    waver = {"vit_micro8": [1, 1.1, 1.2, 1.0], "mixer_micro8": [1, 1.2, 1.5, 2]}

    def work(settings, model, bare, optimizer, mode, batch):
        def call():
            if batch == 64:
                timed.append(call.who)
                raise (
                    torch.OutOfMemoryError("as CUDA says")
                    if mode == "sam"
                    else RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
                )
            unit = {"vit_micro8": 0.001, "mixer_micro8": 0.002}[settings.model]
            return unit * passes_of[mode] * batch * {4: 2, 8: 1, 16: 1.02}[batch]

        call.who = settings.model, mode, batch
        return call

    def seconds_of(call, seconds, device):
        assert (seconds, device) == (100, torch.device("cpu"))
        timed.append(getattr(call, "who", "peak"))
        if len(timed) == dies_at:
            raise KeyboardInterrupt
        return (
            2.0
            if timed[-1] == "peak"
            else call() * waver[timed[-1][0]][(timed.count(timed[-1]) - 1) % 4]
        )

    monkeypatch.setattr(analyze, "work", work)
    monkeypatch.setattr(analyze, "seconds_of", seconds_of)
    argv = [
        *"throughput --device cpu --dataset shapes --models vit_micro8 mixer_micro8".split(),
        *"--modes inference sam --batch-sizes 4 8 16 64 128 --rounds 3 --seconds 100".split(),
        *"--devices 8 --out-dir".split(),
    ]
    assert analyze.main([*argv, str(tmp_path / "a")]) == 0
    cells = [(m, mode) for m in ("vit_micro8", "mixer_micro8") for mode in ("inference", "sam")]
    whole = list(timed)
    assert whole[:16] == [(*cell, batch) for cell in cells for batch in (4, 8, 16, 64)]
    forth = [(*cell, 8) for cell in cells]
    assert whole[16:] == forth + forth[::-1] + forth + ["peak"], "each second round backwards"

    results = json.loads((tmp_path / "a/throughput.json").read_text())["results"]
    vits, mixers, others = results.values()
    peak = 2 * 2048**3 / 2
    for of, model, speeds, ratios in (
        (vits, "vit_micro8", (1000 / 1.2, 1000 / 1.1, 1000), (1, 1, 1)),
        (mixers, "mixer_micro8", (250, 500 / 1.5, 500 / 1.2), (0.25, 0.4, 0.55 / 1.2)),
    ):
        macs = vit.complexity(train.build_model(model, 12, 32), 32)["macs"]
        for mode, passes in passes_of.items():
            found, (low, median, high) = of[mode], np.array(speeds) / passes
            assert found["batch"] == 8 and f"{mode}, batch 64" not in of
            for key, (a, b, c) in (("images_per_second", (low, median, high)), ("ratio", ratios)):
                assert np.allclose(found[key], [(a + b) / 2, b, (b + c) / 2]), (model, key, found)
            assert np.isclose(found["epoch_minutes"], 1_281_167 / median / 8 / 60)
            assert np.isclose(found["share_of_peak"], 2 * macs * speeds[1] / peak), "6 passes"
    assert list(others.values())[0].keys() == {"Xiao Table 2"}, "two networks have no correlation"
    assert analyze.main([*argv, str(tmp_path / "a")]) == 0
    too_many = [(*cell, 64) for cell in cells]
    assert timed == whole + too_many, "nothing again but what memory lacked for"
    timed.clear()
    assert analyze.main([*argv, str(tmp_path / "a"), "--channels-last"]) == 0
    assert timed == whole, "another setting is another measurement"

    timed.clear()
    dies_at = 20
    assert analyze.main([*argv, str(tmp_path / "b")]) == 130
    assert analyze.main([*argv, str(tmp_path / "b")]) == 0
    assert timed == [*whole[:20], *too_many, *whole[19:]], "it goes on with the one that was killed"
    for flags, line in (
        (["--batch-sizes", "64"], "a batch of 64 does not fit in memory"),
        (["--rounds", "0"], "--rounds 0"),
        (["--seconds", "-1"], "--seconds -1"),
        (["--no-compile"], "--compile takes yes, no or both"),
        (["--models", "vit_micro9"], "unknown model 'vit_micro9', did you mean 'vit_micro8'"),
        (["--loss", "supcon", "--augment", "crop"], "softmax or sigmoid"),
    ):
        assert line in analyze_refusal(capsys, *argv, tmp_path / "c", *flags)


def test_all_networks_of_throughput_take_the_step_of_the_first(tmp_path, monkeypatch):
    """And none has weights of zeros, whose gradients a GPU computes faster."""
    seen, called = {}, []

    def work(settings, model, bare, optimizer, mode, batch):
        seen[settings.model] = settings, optimizer
        called.append(model is bare)
        assert all(p.any() for p in bare.parameters())
        return lambda: None

    monkeypatch.setattr(analyze, "work", work)
    models = [
        "resnet18 --width 8 --image-size 32",
        "mixer_s16 --image-size 32 --dropout 0.2 --depth 1",
        "torchvision:vgg11 --image-size 32 --grad-clip 3",
    ]
    assert (
        analyze.main(
            [
                *"throughput --device cpu --models".split(),
                *models,
                *"--rounds 1 --modes training --batch-sizes 2 --seconds 0.01".split(),
                *"--compile both --out-dir".split(),
                str(tmp_path),
            ]
        )
        == 0
    )
    assert {type(optimizer) for _, optimizer in seen.values()} == {torch.optim.SGD}
    assert called.count(True) == called.count(False) > 0, "not compiled, compiled"
    steps = [(s.loss, s.lr, s.weight_decay, s.grad_clip, s.dropout) for s, *_ in seen.values()]
    assert steps == [
        ("softmax", 1.6, 1e-3, clip, dropout) for clip, dropout in ((0, None), (0, 0.2), (3, None))
    ], steps


def test_each_word_of_throughput_is_timed_and_what_is_not_timed_refused(
    tmp_path, capsys, monkeypatch
):
    worked = []

    def work(settings, model, bare, optimizer, mode, batch):
        worked.append(settings.words)
        seconds = {"training": (1, 2, 1), "sam": (3, 3, 5)}.get(mode, (1, 1, 1))
        turn = (worked.count(settings.words) - 1) // 2  # to find the batch, then two rounds

        def call():
            return seconds[turn]

        return call

    def seconds_of(call, *_):
        return call() if call.__name__ == "call" else 1.0

    monkeypatch.setattr(analyze, "work", work)
    monkeypatch.setattr(analyze, "seconds_of", seconds_of)
    argv = ["throughput", "--dataset", "shapes", "--device", "cpu", "--rounds", "2", "--seconds"]
    argv += ["0.01", "--batch-sizes", "2", "--out-dir", str(tmp_path)]
    same = ["vit_micro8", "vit_micro8 --seed 0", "vit_micro8 --sam-rho 0.1"]
    assert analyze.main([*argv, "--modes", "training", "sam", "--models", *same]) == 0
    for words in same:
        assert worked.count(words) == 2 * 3, "to find the batch, and in two rounds"
    results = json.loads((tmp_path / "throughput.json").read_text())["results"]
    costs = [of["sam"] for of in results.values() if "sam" in of]
    assert [cost["over_plain"][1] for cost in costs] == [(3 / 2 + 5 / 1) / 2] * 3, costs
    assert [cost["fastest_over_plain"] for cost in costs] == [3 / 1] * 3, costs
    header, rows = table_in(capsys.readouterr().out, "of the fastest")
    of_fastest = [row[header.index("of the fastest")] for row in rows]
    assert of_fastest == ["-"] * 3 + ["3.000"] * 3, rows
    for words, answer in (
        ("mixer_micro8 --sam-rho 0.1 --sam-every 5", "--sam-every times nothing new"),
        ("mixer_micro8 --adv-eps 2/255", "--adv-eps is not timed here"),
        ("mixer_micro8 --ema-decay 0.9", "--ema-decay is not timed here"),
        ("mixer_micro8 --batch-size 8", "--batch-size is train.py's; here it is --batch-sizes"),
        ("mixer_micro8 --dtype bfloat16", "--dtype is of all networks, outside quotes"),
        ("mixer_micro8 --loss supcon --augment crop", "--loss supcon compares views"),
    ):
        line = analyze_refusal(capsys, *argv, "--models", "vit_micro8", words)
        assert answer in line, (words, line)
    normed = torchvision.models.resnet18().train()
    step = lambda *_: lambda: normed(torch.zeros(1, 3, 32, 32))
    monkeypatch.setattr(analyze, "work", step)
    line = analyze_refusal(capsys, *argv, "--models", "vit_micro8 --seed 1")
    assert "inference, batch 2: Expected more than 1 value per channel" in line, line
    monkeypatch.setattr(analyze, "work", work)
    argv_of = [word for word in argv if word not in ("--dataset", "shapes")]
    head = ["--recipe", "chen_supcon_head", "--init-from", str(tmp_path / "x.pt")]
    line = analyze_refusal(capsys, *argv_of, "--models", "vit_micro8", *head)
    assert "chen_supcon_head: training of a part is not timed" in line, line
    for size, shown in (([], "6888"), (["--image-size", "192"], "-")):  # Chen Table 2
        capsys.readouterr()
        words = ["--modes", "inference", "--models", "vit_s32", *size]
        assert analyze.main([*argv_of, *words]) == 0
        header, rows = table_in(capsys.readouterr().out, "papers' images/s")
        assert rows[0][header.index("papers' images/s")] == shown, rows


def test_a_step_of_throughput_has_sam_and_mixing_as_its_flags_say(received):
    flags = (
        "--model vit_micro8 --dataset shapes --sam-rho 0.3 --sam-steps 2 --sam-adaptive --mixup 1"
    )
    settings, _ = train.settings([*flags.split(), "--sam-scope", "norm"])
    settings.timing = dict(micro_batches=1)
    model = train.assemble(train.build_model("vit_micro8", 12, 32), [0.5], [0.5])
    mixed, made = received(train, "mixing", lambda of: lambda x, y: (x, y)), received(train, "SAM")
    with pytest.raises(train.UserError, match="reached"):
        analyze.work(settings, model, model, None, "sam", 2)
    (of,) = made
    assert (of["rho"], of["steps"], of["adaptive"]) == (0.3, 2, True)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert set(map(id, of["params"])) == set(map(id, norms)) and mixed[0]["args"] is settings


def test_seconds_of_a_call_are_a_mean_over_as_many_as_fit_after_the_first(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(analyze.time, "perf_counter", lambda: now[0])

    def call():
        calls.append(1)
        now[0] += took[min(len(calls), len(took)) - 1]

    for took, seconds, expected, number in (
        ([1.0, 2.0], 10, 2.0, 11),  # the first tells how many: 10
        ([50.0], 10, 50.0, 1),  # that one was long enough
        ([4.0, 3.0], 10, 3.0, 4),
    ):
        calls.clear()
        found = analyze.seconds_of(call, seconds, torch.device("cpu"))
        assert abs(found - expected) < 1e-9 and len(calls) == number, (found, len(calls))


def simulated_step(devices, before, backward, sent, bandwidth):
    """Seconds of a step, event by event: the buckets of the gradient become ready one after the
    other in the backward pass; each then goes around the ring in 2 (n - 1) turns, in each of which
    every device sends an n-th of it to the next."""
    free, buckets = 0.0, 100
    for i in range(1, buckets + 1):
        free = max(free, before + backward * i / buckets)
        for _ in range(2 * (devices - 1)):
            free += sent / buckets / devices / bandwidth
    return max(free, before + backward)


@pytest.mark.parametrize("decode", [30, 1000])
@pytest.mark.parametrize("bandwidth", [0.2, 2, 50])
@pytest.mark.parametrize("devices", [1, 2, 8, 128, 1024])
def test_a_step_on_paper_is_the_one_simulated(devices, bandwidth, decode):
    """The paper's batch; with 1,024 devices in micro-batches of 4."""
    settings, _ = train.settings(["--model", "vit_b16", "--sam-rho", "0.2", "--device", "cpu"])
    cost = dict(macs=17.5e9, params=86_567_656)
    of = analyze.step_on_paper(
        settings, cost, devices, tflops=100, bandwidth=bandwidth, cores=8, decode=decode
    )
    assert (of["micro_batch"], of["micro_batches"]) == (
        (4, 1) if devices == 1024 else (32, 4096 / 32 / devices)
    )
    forward = 2 * 17.5e9 / 100e12
    compute, last = 6 * 4096 / devices * forward, 2 * of["micro_batch"] * forward
    step = simulated_step(devices, compute - last, last, 4 * cost["params"], bandwidth * 1e9)
    decoding = 4096 / devices / (8 * decode)
    assert abs(of["step"] / max(step, decoding) - 1) < 0.01, (of, step, decoding)
    bound = "all-reduce" if step - compute > compute else "compute"
    assert of["bound"] == ("decode" if decoding > step else bound), (of, step, compute)


@pytest.mark.parametrize(
    "devices, micro_batch, flags",
    [(4, 32, ""), (128, 32, "--sam-every 2"), (1024, 4, "--sam-sync")],
)
def test_bytes_on_paper_are_those_that_the_first_of_many_processes_sends(
    tmp_path, monkeypatch, devices, micro_batch, flags
):
    """The paper's batch of 4,096 on the first of so many processes, the others of which are not
    there: torch's fake process group takes what it sends and answers nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    argv = tiny(
        tmp_path,
        "--sam-rho 0.1 --max-steps 2 --epochs 2 --lr 0 --warmup-steps 0",
        flags,
        dataset=f"--dataset shapes --batch-size 4096 --micro-batch {micro_batch}",
    )
    sent, init, reduce = [], nn.parallel.DistributedDataParallel.__init__, dist.all_reduce

    def count(state, bucket):
        sent.append(bucket.buffer().numel())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def counted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.register_comm_hook(None, count)

    monkeypatch.setattr(train.DistributedDataParallel, "__init__", counted)
    monkeypatch.setattr(
        train.dist,
        "all_reduce",
        lambda tensor, *args, **kwargs: (
            sent.append(tensor.numel()) if tensor.numel() > 1000 else None,
            reduce(tensor, *args, **kwargs),
        )[1],
    )
    monkeypatch.setenv("WORLD_SIZE", str(devices))
    dist.init_process_group("fake", rank=0, world_size=devices, store=FakeStore())
    try:
        assert train.main(argv) == 0
    finally:
        dist.destroy_process_group()
    args, _ = train.settings(argv)
    cost = train.complexity_of(args)
    of = analyze.step_on_paper(args, cost, devices, tflops=1, bandwidth=1, cores=1, decode=1)
    assert of["micro_batch"] == micro_batch
    ring = 2 * (devices - 1) / devices * 4
    assert abs(ring * sum(sent) / 2 / of["sends"] - 1) < 1e-12, (sent, of)


def test_a_step_on_paper_reads_and_computes_both_views_of_supcon():
    rates = dict(tflops=100, bandwidth=25, cores=8, decode=200)
    flags = "--model vit_micro8 --dataset shapes --augment crop --sam-rho 0 --device cpu".split()
    one, two = (
        analyze.step_on_paper(
            train.settings([*flags, "--loss", loss])[0], dict(macs=1e9, params=1e6), 4, **rates
        )
        for loss in ("softmax", "supcon")
    )
    assert two["decode"] == pytest.approx(2 * one["decode"])
    assert one["all_reduce"] == two["all_reduce"]
    overlap = [of["all_reduce"] - of["waits"] for of in (one, two)]
    assert overlap[1] == pytest.approx(min(2 * overlap[0], one["all_reduce"])), (one, two)


def test_scale_prints_what_bounds_a_training_on_many_devices(tmp_path, capsys):
    argv = ["scale", "--out-dir", str(tmp_path), "--tflops", "100"]
    capsys.readouterr()
    assert analyze.main(argv) == 0
    printed = capsys.readouterr().out
    assert "chen_vit: vit_b16, batch 4,096 of micro-batches of 32, ρ = 0.2, 93,600 steps" in printed
    _, rows = table_in(printed, "micro-batches")
    assert [row[0] for row in rows] == ["1", "4", "16", "64", "256", "1024"]
    for row in rows:
        assert f"| {' | '.join(row)} |" in README, "README's table is this one"
    of = json.loads((tmp_path / "scale.json").read_text())["results"].popitem()[1]
    one, some, many = (of[f"{n} devices"] for n in (1, 64, 1024))
    assert one["efficiency"] == 1 and one["waits"] == 0 and one["bound"] == "compute"
    assert many["bound"] == "all-reduce" and "1 × 4*" in printed
    assert some["hours"] == some["step"] * 93_600 / 3600
    assert math.isclose(some["images_per_second"] * some["step"], 4096)
    assert math.isclose(some["efficiency"], one["step"] / some["step"] / 64)
    assert many["listing"] == 1024 * 1_281_167 / 1e6
    assert analyze.main([*argv, "--decode", "10", "--batch-size", "512"]) == 0
    printed = capsys.readouterr().out
    assert "vit_b16, batch 512" in printed, "flags change the paper's run"
    _, rows = table_in(printed, "micro-batches")
    assert [row[0] for row in rows] == ["1", "4", "16", "64", "256"]
    assert rows[0][-3] == "decode" and "left out: 1024 devices, no equal shares of" in printed
    assert analyze.main([*argv, "--dataset", "cifar10"]) == 0, "in memory"
    _, rows = table_in(capsys.readouterr().out, "micro-batches")
    assert {(row[5], row[-1]) for row in rows} == {("0.00", "0.00")}
    for flags, line in (
        (["--tflops", "0"], "--tflops 0: a rate is above 0"),
        (["--devices", "0"], "--devices 0"),
        (["--listing", "inf"], "--listing inf"),
        (["--dataset", "folder"], "its size is not known; those of shapes"),
        (["--devices", "3"], "--devices 3: a batch of 4,096"),
        (["--model", "torchvision:vit_b_16"], "cannot be counted"),
        (["--model", "vit_b17"], "unknown model 'vit_b17', did you mean 'vit_b16'"),
        (["--resume", "--model", "vit_b16"], "--resume is for train.py"),
    ):
        assert line in analyze_refusal(capsys, *argv, *flags), flags
    assert "--tflops" in analyze_refusal(capsys, "scale")


def test_the_smaller_training_sets_are_those_of_the_papers_recipes(capsys):
    """Chen et al. E.2, E.3, Table 9: train.py has a recipe for each number of Table 4."""
    capsys.readouterr()
    argv = ["datasize", "--dry-run", "--device", "cpu", "--out-dir", "my runs"]
    assert analyze.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    runs = {
        Path(args.out_dir).name: args
        for args in (train.settings(shlex.split(line)[2:])[0] for line in lines)
    }
    assert len(runs) == len(lines) == 40
    assert {str(Path(args.out_dir).parent) for args in runs.values()} == {"my runs/runs"}
    of = {"resnet152": "chen_resnet", "vit_b16": "chen_vit", "mixer_b16": "chen_mixer"}
    parts = {"1": "", "1_2": "_half", "1_4": "_quarter", "1_10": "_tenth"}
    for name, args in runs.items():
        model, method, part = name.split("-")
        strong = "_strong" * (method in ("augmented", "both"))
        recipe = of[model] + strong + parts[part]
        rho = "paper" if method in ("sam", "both") else "0"
        expected, _ = train.settings(
            ["--recipe", recipe, "--model", model, "--sam-rho", rho, "--device", "cpu", "--resume"]
        )
        differ = {k for k, v in vars(expected).items() if getattr(args, k) != v}
        assert {k for k in differ if k != "train_fraction"} <= {"recipe", "out_dir"}, (name, differ)
        assert Fraction(args.train_fraction) == Fraction(expected.train_fraction)
        where, *published = train.PUBLISHED[recipe]
        if part != "1":
            assert analyze.CHEN_4[model][method][list(parts).index(part)] == published[rho != "0"]
    attacked = [*argv, "--models", "vit_b16", "--adv-eps", "2/255", "--fractions", "1"]
    assert analyze.main(attacked) == 0
    for line in capsys.readouterr().out.splitlines():
        args = train.settings(shlex.split(line)[2:])[0]
        strong = "augmented" in args.out_dir or "both" in args.out_dir
        assert (args.mixup, args.adv_eps) == (0.5 * strong, 2 / 255), line


def test_micro_batches_of_smaller_training_sets_divide_the_batch_and_hold_outs_count(
    tmp_path, capsys, in_process
):
    argv = ["datasize", "--models", STUDIED, *"--dataset shapes --methods plain".split()]
    argv += "--fractions 1/10 --batch-size 100 --micro-batch 100 --hold-out 1/5".split()
    argv += ["--device", "cpu", "--workers", "0", "--max-steps", "1", "--out-dir", str(tmp_path)]
    assert analyze.main([*argv, "--dry-run"]) == 0
    assert "--batch-size 12 --micro-batch 12" in capsys.readouterr().out
    assert analyze.main(argv) == 0
    (run,) = json.loads((tmp_path / "datasize.json").read_text())["results"][STUDIED].values()
    assert run["images"] == 8000 / 10 * 4 / 5
    line = analyze_refusal(capsys, *argv, "--sam-rho", "0.1", "--sam-adaptive")
    assert "--sam-adaptive is not for plain trainings, which are among these" in line


def test_sams_gain_is_the_difference_of_runs_of_the_same_images(tmp_path, capsys, in_process):
    runs = [
        dict(method=method, fraction=f, top1=top1)
        for method, f, top1 in (
            ("plain", 1, 60),
            ("sam", 1, 75),
            ("plain", 0.5, 50),
            ("sam", 0.5, None),
            ("both", 1, 9),
        )
    ]
    assert analyze.with_gains(runs, "top1") == {
        "plain": {1: 60, 0.5: 50},
        "sam": {1: 75},
        "augmented": {},
        "both": {1: 9},
        "gain": {1: 15},
        "gain, augmented": {},
    }, "a run that diverged has none"
    argv = [
        "datasize",
        "--models",
        STUDIED,
        *"--dataset shapes --device cpu --workers 0 --max-steps 2 --log-every 1".split(),
        *"--batch-size 40 --micro-batch 20 --fractions 1 1/4 --out-dir".split(),
        str(tmp_path),
    ]
    capsys.readouterr()
    assert analyze.main(argv) == 0
    header, *rows = (
        re.split(r" {2,}", line)
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("top-1 %", STUDIED)) and ": top-1" not in line
    )
    assert header == [
        "top-1 %",
        "fraction",
        "images",
        "plain",
        "sam",
        "augmented",
        "both",
        "gain",
        "gain, augmented",
    ]
    assert len(rows) == 2 and len(in_process) == 8
    results = json.loads((tmp_path / "datasize.json").read_text())["results"][STUDIED]
    for row, part, share, images in zip(rows, ("1", "1_4"), (1.0, 0.25), ("8000", "2000")):
        top1 = {}
        for name, of in results.items():
            if name.endswith(f"-{part}"):
                top1[of["method"]] = final_top1(tmp_path / "runs" / name)
                assert of["top1"] == top1[of["method"]] and of["fraction"] == share
                config = (tmp_path / "runs" / name / "config.json").read_text()
                args = json.loads(config)["settings"]
                assert (
                    args["batch_size"] == 40 * share
                    and args["micro_batch"] == (20 if part == "1" else 10)
                    and Fraction(args["train_fraction"]) == share
                )
                strong = of["method"] in ("augmented", "both")
                assert (args["mixup"], args["randaugment"]) == (
                    (0.5, [2, 15]) if strong else (0, [0, 9])
                )
                assert args["sam_rho"] == (0.03 if of["method"] in ("sam", "both") else 0)
        assert row[2] == images and [float(cell) for cell in row[3:]] == [
            round(v, 2)
            for v in (
                *(top1[m] for m in ("plain", "sam", "augmented", "both")),
                top1["sam"] - top1["plain"],
                top1["both"] - top1["augmented"],
            )
        ], (row, top1)
    before = (tmp_path / "datasize.json").read_bytes()
    assert analyze.main(argv) == 0 and len(in_process) == 8
    assert (tmp_path / "datasize.json").read_bytes() == before
    for flags, line in (
        (["--fractions", "0"], "above 0 and at most 1"),
        (["--fractions", "x"], "--fractions x"),
        (["--fractions", "1/0"], "above 0 and at most 1"),
        (
            ["--models", "vit_ti2", "--dataset", "cifar100"],
            "--recipe park_cifar_vit brings --mixup --cutmix --erasing --randaugment",
        ),
        (["--models", "vit_micro9"], "unknown model 'vit_micro9', did you mean"),
        (["--mixup", "1"], "--mixup is what this study varies"),
    ):
        assert line in analyze_refusal(capsys, *argv, "--dry-run", *flags)


@pytest.fixture
def received(monkeypatch):
    """received(where, name, answer) -> a list of the arguments, {name: value}, that the function
    is called with from then on; it answers answer(arguments), or nothing is computed further."""

    def watch(where, name, answer=None):
        signature, calls = inspect.signature(getattr(where, name)), []

        def instead(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            calls.append(dict(bound.arguments))
            if answer is None:
                raise train.UserError("reached")
            return answer(calls[-1])

        monkeypatch.setattr(where, name, instead)
        return calls

    return watch


@pytest.fixture
def analyzed(tmp_path, capsys, small_shapes):
    """analyzed(command line) -> what a subcommand prints of a ViT of seven steps, and says if it
    does not end; the folder of the run."""
    train_ok(tiny(tmp_path / "run", "--max-steps 7 --train-fraction 1 --hold-out 1/4 --seed 3"))
    ending = "--device cpu --workers 0 --out-dir".split() + [str(tmp_path / "out")]

    def run(line, *more):
        capsys.readouterr()
        where = [] if "--model " in line else ["--checkpoint", str(tmp_path / "run/ckpt.pt")]
        status = analyze.main([*line.split(), *more, *where, *ending])
        text = capsys.readouterr()
        assert status == 0 or "reached" in text.err, text.err
        return text.out

    return run


def test_flags_of_analyses_reach_the_functions_that_compute(analyzed, received, tmp_path):
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    weights = {name.removeprefix("network."): w for name, w in state["model"].items()}

    def only(calls, **wanted):
        (call,) = calls
        assert {name: call[name] for name in wanted} == wanted, call
        return call

    calls = received(analyze, "noise")
    analyzed(
        "noise --frequencies 0.5 --sigma 0.3 --window 0.2 --form code --equal-energy --noise-seed 4"
    )
    only(calls, sigma=0.3, window=0.2, form="code", equal_energy=True, seed=4)

    eigenvalues = received(analyze, "hessian_eigenvalues")
    analyzed(
        "hessian --images 16 --loss sigmoid --which magnitude --method power --iterations 7 "
        "--params head --tolerance 0.1 --k 1 --memory 2"
    )
    call = only(eigenvalues, k=1, which="magnitude", method="power", tolerance=0.1, iterations=7)
    assert call["loss"] is train.sigmoid_loss and call["options"]["memory"] == 2
    assert [tuple(p.shape) for p in call["params"]] == [(12, 24), (12,)]
    (batch,) = call["batches"]
    train_set = data.load("shapes", "train", image_size=32)
    kept = train_set.restrict(data.hold_out(train_set.labels, "1/4")[0])
    kept = kept.restrict(data.subset(kept.labels[kept.indices], Fraction(16, len(kept))))
    images = kept.pixels[kept.indices]
    assert torch.equal((batch[0] * 255).round().byte(), images), "of those it was trained on"

    density = received(analyze, "hessian_density")
    eigenvalues = received(
        analyze, "hessian_eigenvalues", lambda _: dict(converged=True, eigenvalues=[1.0])
    )
    analyzed("hessian --images 16 --params head --probes 2 --steps 3")
    call = only(density, probes=2, steps=3)
    assert [tuple(p.shape) for p in call["params"]] == [(12, 24), (12,)]

    kernels = received(analyze, "ntk")
    analyzed("ntk --images 4 --batch 4 --projections 5 --at checkpoint --dtype float32")
    call = only(kernels, projections=5)
    own = call["model"].state_dict()
    assert torch.equal(own["network.head.weight"], weights["head.weight"])
    analyzed("ntk --images 4 --batch 4")
    assert not torch.equal(
        kernels[1]["model"].state_dict()["network.patch_embed.proj.weight"],
        weights["patch_embed.proj.weight"],
    ), "as initialised"

    planes = received(analyze, "landscape")
    drawn = received(
        analyze, "directions", lambda of: [[p * 0 for p in of["model"].parameters()]] * 2
    )
    analyzed("landscape --images 8 --points 2 --direction-seed 5 --normalise park")
    assert drawn[0]["seed"] == 5 and drawn[0]["normalise"] == "park"
    sizes = {tuple(p.shape) for p in planes[0]["decayed"]}
    assert (12, 24) in sizes and (24,) not in sizes, "--decay kernels"

    balls = received(analyze, "worst_loss", lambda of: dict(worst=1.0, losses=[1.0]))
    draws = received(analyze, "noisy_loss", lambda of: 1.0)
    analyzed("flatness --images 8 --sigma 0.3 --draws 2 --rho 0.2 --steps 4")
    assert [(of["rho"], of["steps"]) for of in balls] == [(0, 4), (0.2, 4)]
    assert [(of["sigma"], of["draw"]) for of in draws] == [(0.3, 0), (0.3, 1)]

    bins = received(analyze, "calibration")
    analyzed("calibration --bins 7")
    only(bins, bins=7)

    of_image = received(analyze, "attention")
    analyzed("attention --indices 5 --distance 0")
    shown = data.load("shapes", "val", image_size=32).pixels[5]
    assert torch.equal((of_image[0]["image"] * 255).round().byte(), shown)
    far = received(analyze, "attention_distance")
    received(analyze, "attention", lambda _: dict(shown="", map=[[1.0]], heads=[], rollout=[[1.0]]))
    analyzed("attention --indices 0 --distance 24")
    assert far[0]["batches"].total == 24

    pairs = received(analyze, "hsic")
    analyzed("cka --images 20 --batch 10")
    assert [len(x) for x, _ in pairs[0]["batches"]] == [10, 10]

    few = data.load("shapes", "val", image_size=32)
    few.restrict_logits = [0, 2]
    received(analyze, "robustness_parts", lambda of: [("val", lambda: few)])
    evaluated = received(train, "evaluate")
    analyzed("robustness --benchmarks val")
    assert evaluated[0]["restrict_logits"] == [0, 2]


def test_tables_of_analyses_have_the_signs_and_units_that_they_name(analyzed, received):
    clean = received(
        analyze, "noise", lambda of: dict(top1=80.0 if of["frequency"] is None else 65)
    )
    assert "  80.00  15.00\n" in analyzed("noise --frequencies 0.5"), "a decrease is positive"
    assert [of["frequency"] for of in clean] == [None, 0.5]

    received(analyze, "accuracy", lambda of: 70.0 if of["skip"] is None else 40.0)
    text = analyzed("lesion --images 12")
    assert "70.00 % with all units" in text and "-30" in text and " 30" not in text, text

    received(analyze, "sparsity", lambda _: dict(block={"blocks.0": 0.5}, activation={}))
    assert re.search(r"\)  +50\.00 +50\.00\n", analyzed("sparsity --images 12"))

    results = iter([dict(nll=0.3, top1=90.0), dict(nll=0.7, top1=60.0)])
    received(train, "measure", lambda _: next(results))
    header, rows = table_in(analyzed("nll --images 12"), "error %")
    assert rows[0][header.index("error %")] == "40.00", rows


def test_results_are_of_all_settings_that_decide_them(tmp_path):
    """Under another value of any of them a network has another name among the results."""
    (tmp_path / "x.pt").write_bytes(b"weights")
    settings, _ = train.settings(["--model", "vit_s32", "--init-from", str(tmp_path / "x.pt")])
    names = [analyze.label(settings, analyze.OF_TRAINING)[0]]
    for name in (*analyze.DECIDES, *analyze.OF_TRAINING):
        other = argparse.Namespace(**vars(settings) | {name: "another"})
        names.append(analyze.label(other, analyze.OF_TRAINING)[0])
    (tmp_path / "x.pt").write_bytes(b"others")
    names.append(analyze.label(settings, analyze.OF_TRAINING)[0])
    assert len(set(names)) == len(names)
    of_images = "dataset data_dir eval_split image_size eval_short_side mean std"
    of_models = (
        "model weights dtype patch_size stride dim depth heads head_dim mlp_dim token_mlp_dim pool "
        "stem kernel_size qkv_bias gelu width groups width_per_group pre_activation blur "
        "msa_blocks window_size dropout drop_path head_bias unit_norm init zero_init"
    )
    of_training = (
        "seed train_fraction hold_out micro_batch mixup cutmix decay augment flip autoaugment "
        "randaugment randaugment_of randaugment_prob erasing"
    )
    assert {*analyze.DECIDES} == {*of_images.split(), *of_models.split()}
    assert {*analyze.OF_TRAINING} == {*of_training.split()}


def test_flags_of_attacks_reach_them(tmp_path, capsys, received, small_shapes):
    for name, seed in (("run", 3), ("other", 4)):
        train_ok(tiny(tmp_path / name, f"--max-steps 7 --train-fraction 1 --seed {seed}"))

    def found(of):
        curve = [6] * of["attack"]["steps"] + [next(left)]  # of 6 images
        return dict(images=6, clean=6, robust=curve, last=curve, loss=[[0.0] * len(curve)])

    left, number = itertools.repeat(3), itertools.count()
    calls = received(train, "under_attack", found)
    files = {name: str(tmp_path / name / "ckpt.pt") for name in ("run", "other")}

    def called(line):
        del calls[:]
        out = tmp_path / f"out{next(number)}"
        argv = [*line.split(), "--device", "cpu", "--out-dir", str(out)]
        assert adversarial.main(["--checkpoint", files["run"], *argv]) == 0
        attacks = [call["attack"] for call in calls]
        return [attack.pop("source") for attack in attacks], attacks

    _, (first, *others) = called(
        "--eps 4/255 --steps 3 --norm l2 --targeted --restarts 2 --attack-seed 5 "
        "--step-size 1/255 --images 6 --strength-images 6"
    )
    own = dict(eps=4 / 255, steps=3, norm="l2", targeted=True, restarts=2, random_start=True)
    own |= dict(seed=5, step_size=1 / 255, early_stop=False)
    assert first == own and len(calls[0]["positions"]) == 6
    *radii, longer = others
    assert longer == own | dict(steps=15)
    for of in radii:
        assert of["early_stop"] and of["step_size"] == pytest.approx(of["eps"] / 4)
    largest = 0.5 * (3 * 32 * 32) ** 0.5  # the way from grey to a corner of the cube of pixels
    radii_asked = [*(k / 255 for k in (2, 4, 8, 16)), largest]
    assert [of["eps"] for of in radii] == pytest.approx(radii_asked)
    _, (default,) = called("--strength-images 0")
    own = dict(eps=2 / 255, steps=10, norm="linf", targeted=False, restarts=1, random_start=True)
    assert default == own | dict(seed=0, step_size=0.25 / 255, early_stop=False)
    _, (_, *radii, longer) = called("--attack fgsm --eps 4/255 --images 6 --strength-images 6")
    assert longer["steps"] == 50 and longer["step_size"] == 0.5 / 255
    assert radii[-1]["eps"] == 0.5
    for of in radii:
        assert of["steps"] == 10 and of["step_size"] == pytest.approx(of["eps"] / 8)
    for more, ratio in (("", 1.25), (" --no-random-start", 1)):
        _, (fast,) = called("--attack fgsm --eps 4/255 --strength-images 0" + more)
        assert fast["steps"] == 1 and fast["step_size"] == pytest.approx(ratio * 4 / 255)
    sources, _ = called(
        f"--strength-images 0 --steps 3 --images 6 --transfer-from {files['other']}"
    )
    assert sources[0] is None and len(sources) == 3
    heads = [source.network.head.weight for source in sources[1:]]
    weights = [torch.load(files[name], weights_only=True)["model"] for name in ("other", "run")]
    for head, of in zip(heads, weights):
        assert torch.equal(head, of["head.weight"]), "through the other network, then its own"
    for black, words in ((2, "NO: its grad"), (3, "no difference"), (5, "its own are the strong")):
        left = iter([3, black, 3])
        capsys.readouterr()
        called(f"--strength-images 0 --steps 3 --images 6 --transfer-from {files['other']}")
        assert words in capsys.readouterr().out


def test_images_to_attack_are_spread_evenly():
    assert adversarial.spread(10, 3) == [0, 3, 6]
    for wanted in (0, 10, 11):
        assert adversarial.spread(10, wanted) == list(range(10))


def test_a_start_outside_the_ball_is_projected_before_the_first_pass():
    seen, x = [], torch.full((2, 3, 4, 4), 0.5)

    class Listening(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images):
            seen.append(images.detach().clone())
            return self.weight * images.flatten(1)[:, :2]

    y = torch.zeros(2).long()
    adversarial.pgd(Listening().eval(), x, y, 0.1, 0.02, 1, start=x + 3)
    assert torch.allclose(seen[0], x + 0.1)


def test_targets_of_transfer_lie_where_data_dir_says_whatever_the_network_learnt(
    tmp_path, capsys, received, small_shapes
):
    train_ok(tiny(tmp_path / "run", "--max-steps 1 --train-fraction 1"))
    ended = dict(top1=50.0, nll=1.0, diverged=False)
    trainings = received(analyze, "conduct", lambda of: {name: dict(ended) for name in of["jobs"]})
    argv = ["transfer", "--checkpoint", f"{tmp_path}/run/", "--datasets", "pets", "--device", "cpu"]
    assert analyze.main([*argv, "--data-dir", str(tmp_path / "pets"), "--workers", "0"]) == 0
    flags = [dict(zip(words, [*words[1:], ""])) for words in trainings[0]["jobs"].values()]
    assert {of["--data-dir"] for of in flags} == {str(tmp_path / "pets")}
    assert {of["--init-from"] for of in flags} == {f"{tmp_path}/run/ckpt.pt"}, "no run//ckpt.pt"


def test_a_network_is_not_measured_on_other_classes_and_idle_flags_are_told(
    tmp_path, capsys, monkeypatch, small_shapes
):
    train_ok(tiny(tmp_path / "run", "--max-steps 1 --train-fraction 1"))
    others = data.InMemory(torch.zeros(9, 3, 32, 32).byte(), torch.arange(9), list("abcdefghij"))
    with monkeypatch.context() as patch:
        patch.setattr(data, "load", lambda *_, **__: others)
        argv = ["robustness", "--benchmarks", "val", "--checkpoint", tmp_path / "run"]
        line = analyze_refusal(capsys, *argv, "--dataset", "cifar10", "--device", "cpu")
        assert "cifar10 has 10 classes from a, the network was trained on 12 from disc" in line
    common = ["--checkpoint", str(tmp_path / "run"), "--device", "cpu", "--workers", "0"]
    for argv, idle in (
        (["norms", "--images", "12", "--eval-split", "test"], "norms: --eval-split"),
        (["lesion", "--images", "12", "--hold-out", "1/5"], "lesion: --hold-out"),
        (["robustness", "--benchmarks", "val", "--adv-eps", "4/255"], "robustness: --adv-eps"),
    ):
        assert analyze.main([*argv, *common]) == 0
        assert f"without effect in {idle}\n" in capsys.readouterr().out, argv


def test_transfer_takes_each_data_sets_recipe_and_held_out_part(analyzed, received):
    """Chen et al. E.6, Table 11; dropout and the like of the first training are not taken over."""
    ended = dict(top1=50.0, nll=1.0, diverged=False)
    trainings = received(analyze, "conduct", lambda of: {name: dict(ended) for name in of["jobs"]})
    analyzed("transfer --datasets cifar10 pets shapes")
    searched, whole = ([*of["jobs"].values()] for of in trainings)
    flags = [dict(zip(words, [*words[1:], ""])) for words in (*searched, *whole)]
    for of in flags:
        held_out = dict(cifar10="1/50", pets="1/10", shapes="1/10")[of["--dataset"]]
        assert of["--hold-out"] in (held_out, "0"), of
        recipe = of["--dataset"].replace("shapes", "flowers102")
        assert of["--recipe"] == f"chen_to_{recipe}" and "--reset-head" in of
        assert of["--dim"] == "24" and not of.keys() & {"--dropout", "--drop-path", "--init"}
    assert [of["--lr"] for of in flags[:4]] == ["0.001", "0.003", "0.01", "0.03"]
    assert [of["--hold-out"] for of in flags].count("0") == 3 and len(flags) == 3 * 4 + 3


def argv_of_all(run, out):
    return ["all", "--checkpoint", str(run / "ckpt.pt"), "--out-dir", str(out)]


def test_analyses_are_of_the_weights_and_classes_that_they_name(
    tmp_path, capsys, monkeypatch, small_shapes
):
    for names in ("cat-dog", "apple-pear"):
        write_image_folder(tmp_path / names, train=8, val=4, classes=names.split("-"))
    settings = f"--dataset folder --data-dir {tmp_path / 'cat-dog'} --epochs 1 --batch-size 8"
    train_ok(tiny(tmp_path / "run", "--micro-batch 8 --image-size 16", dataset=settings))
    argv = ["norms", "--checkpoint", str(tmp_path / "run"), "--device", "cpu", "--images", "8"]
    argv += ["--out-dir", str(tmp_path / "out"), "--workers", "0"]
    line = analyze_refusal(capsys, *argv, "--data-dir", tmp_path / "apple-pear")
    assert "train/apple is a class that the training folder or the network lacks" in line
    waits = []
    monkeypatch.setattr(train, "join", lambda backend, timeout: waits.append(timeout))
    assert analyze.main(argv) == 0 and set(waits) == {analyze.PATIENCE}, "for parts of hours"
    image = str(next((tmp_path / "cat-dog").glob("val/*/*")))
    for command, *flags in (
        ["norms", "--images", "4"],
        ["robustness", "--benchmarks", "val"],
        ["attention", "--image", image],
    ):
        marks = iter(["as started", *["of an image"] * (command == "attention"), "as loaded"])
        monkeypatch.setattr(analyze, "fingerprint", lambda path: next(marks))
        line = analyze_refusal(capsys, command, *argv[1:5], *argv[7:], *flags)
        assert "run/ckpt.pt changed meanwhile: wait until its training is finished" in line


def test_twins_without_sam_are_of_the_same_file_of_a_run():
    plain, with_sam = (dict(sam_rho=rho, lr=0.1) for rho in (0, 0.1))
    trained = {
        f"{run}/{file} (1234)": of
        for run, of in (("a", plain), ("b", with_sam))
        for file in ("ckpt.pt", "best.pt")
    }
    assert analyze.plain_twins(trained) == {
        f"b/{file} (1234)": f"a/{file} (1234)" for file in ("ckpt.pt", "best.pt")
    }


def test_a_disk_that_is_full_costs_a_long_computation_only_its_state(tmp_path, capsys):
    saved = analyze.Saved(tmp_path / "x.state", seconds=0)
    with files_of_at_most(2**10):
        for _ in range(2):
            saved.keep(dict(v=torch.zeros(2**12)), argparse.Namespace(images=1))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "x.state cannot be written: " in out, out
    assert "a kill would lose the work" in out and not list(tmp_path.iterdir())
    with files_of_at_most(2**10), pytest.raises(train.UserError, match="cannot be written: File"):
        analyze.write(tmp_path / "index.html", bytes(2**12))


def test_numbers_that_json_lacks_are_null_and_words_stay():
    value = {"NaN": ["-Infinity \\", 'a "NaN"'], "x": [math.nan, -math.inf, math.inf, 1.5]}
    expected = {"NaN": value["NaN"], "x": [None, None, None, 1.5]}
    assert json.loads(train.to_json(value)) == expected


def test_all_makes_what_a_network_allows_and_a_page_that_says_why_not_the_rest(
    tmp_path, capsys, monkeypatch, small_shapes
):
    run, out = tmp_path / "a run", tmp_path / "figures"
    train_ok(
        [
            "--out-dir",
            str(run),
            *(
                "--model mixer_micro8 --dim 16 --depth 1 --dataset shapes --batch-size 8 "
                "--micro-batch 8 --max-steps 2 --warmup-steps 1 --device cpu --workers 0"
            ).split(),
        ]
    )
    out.mkdir()
    (out / "norms-0.png").touch()
    os.utime(out / "norms-0.png", (0, 0))  # of an earlier command

    def figure(path, draw, rows=1, columns=1):
        for name in (path.name, f"{path.stem}-1.png", f"{path.stem}y.png"):
            (out / name).touch()

    monkeypatch.setattr(analyze, "figure", figure)
    argv = [
        *"all --figures norms attention curves --checkpoint".split(),
        str(run / "ckpt.pt"),
        *"--images 20 --device cpu --out-dir".split(),
        str(out),
    ]
    assert analyze.main(argv) == 0
    page = (out / "index.html").read_text()
    commands = re.findall(r"<pre>(.*?)</pre>", page)
    assert [shlex.split(html.unescape(command))[:3] for command in commands] == [
        ["python", "analyze.py", what] for what in ("norms", "attention", "curves")
    ]
    assert re.findall(r'href="(.*?)"', page) == ["norms.json", "curves.json"]
    assert re.findall(r'<img src="(.*?)"', page) == [
        "norms-1.png",
        "norms.png",
        "curves-1.png",
        "curves.png",
    ]
    assert "Not made: " in page and 'name="viewport"' in page
    results = json.loads((out / "norms.json").read_text())["results"]
    assert [list(parts) for parts in results.values()] == [["20 images"]]
    assert (
        analyze.main(
            [
                *"all --figures norms --checkpoint".split(),
                str(run),
                *"--images 20 --device cpu".split(),
            ]
        )
        == 0
    )
    assert (run / "figures/index.html").exists(), "a folder as a file in it"
    monkeypatch.setattr(analyze, "activity", None)  # nothing is computed again, nor by the command
    assert analyze.main(argv) == 0 and (out / "index.html").read_text() == page
    assert analyze.main(shlex.split(html.unescape(commands[0]))[2:]) == 0
    capsys.readouterr()
    other = tmp_path / "other"
    line = analyze_refusal(capsys, *argv_of_all(run, other), "--figures=landscape", "--points=0")
    assert "no figure could be made: the lines that begin with none say why" in line
    assert "--points 0: it is at least 2" in (other / "index.html").read_text()

    def norms_command(*_):
        raise train.LoneError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_rank", lambda: 0)
        patch.setattr(dist, "broadcast_object_list", lambda *_, **__: None)
        patch.setattr(analyze, "norms_command", norms_command)
        own = analyze.make_parser().parse_args([*argv_of_all(run, other), "--figures", "norms"])
        with pytest.raises(train.LoneError):  # the others are well, and in the middle of it
            own.function(own, [])

    def norms_command(*_):
        raise torch.OutOfMemoryError("Tried to allocate 3.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(analyze, "norms_command", norms_command)
        line = analyze_refusal(capsys, *argv_of_all(run, other), "--figures", "norms")
    assert "memory is short of 3.00 GiB" in (other / "index.html").read_text(), line
    for words, answer in (
        ("--figures norm", "invalid choice: 'norm'"),
        ("--points many", "invalid int value: 'many'"),
    ):
        line = analyze_refusal(capsys, "all", *words.split(), "--checkpoint", run)
        assert answer in line, line
    assert "needs either --checkpoint" in analyze_refusal(capsys, "all")
    assert "No such file" in analyze_refusal(capsys, "all", "--checkpoint", tmp_path / "x.pt")


def test_the_stress_of_arguments_knows_every_subcommand():
    parser = analyze.make_parser()
    assert parser.commands.keys() == QUICK.keys()
    for name, flags in QUICK.items():  # and each of its flags
        _, rest = parser.parse_known_args([name, *flags.format(run="run").split()])
        assert not train.make_parser().parse_known_args(rest)[1], (name, rest)


def test_every_claim_is_about_trainings_and_numbers_that_reproduce_makes():
    names = [
        ", ".join(filter(None, (family, other))) + " + SAM" * sam
        for _, families, other, _, with_sam in analyze.TRAININGS
        for family in families
        for sam in (False, True)[: 1 + with_sam]
    ]
    names += [f"{name}, head" for name in names if "contrastive" in name]
    assert len(set(names)) == len(names) > 50
    made = {
        f"{title if title == 'test' else command} of {name}"
        for title, command, _, of, _ in analyze.analyses(names, analyze.SCALES["full"])
        for name in of
    } | set(analyze.OF_XIAO)
    runs = {(name, 0): dict(run="x", top1=1.0) for name in names}
    n, claims, used = analyze.Numbers(Path("runs"), [0], runs), set(), set()
    n.at_equal_loss = lambda name, seed: "epoch1.pt"
    n.path = lambda name, seed, file="ckpt.pt": used.add(name)
    n.top1 = lambda name: used.add(name) or analyze.Numbers.top1(n, name)
    for where, claim, values, ratio in analyze.claims(n):
        assert (where, claim) not in claims and re.match(r"(Chen|Park|Xiao) |control$", where)
        assert len(values) > 1 and isinstance(ratio, bool), claim
        claims.add((where, claim))
    assert set(n.missing) <= made, set(n.missing) - made
    unused = {name for name in set(names) - used if "contrastive" not in name}
    assert unused <= {
        "ViT_C + SAM",
        "AlterNet + SAM",
        "Mixer, twice the epochs",
        "AlterNet, twice the epochs",
    }, unused
    rows, lacking = analyze.judged(analyze.Numbers(Path("runs"), [0], {}))
    assert not rows and len(lacking) == len(claims) > 60
    filled = dict.fromkeys(analyze.FRACTIONS, "1/2") | dict(twice=2, each="1")
    for *_, flags, _ in analyze.TRAININGS:  # they are train.py's
        train.settings(["--dataset", "shapes", *shlex.split(flags.format_map(filled))])


class World(analyze.Numbers):
    """Numbers of one paper: {what: {of what: number}}, in place of those that were measured. Those
    that it shows in figures or words only are ours, in the order in which it has them."""

    def __init__(self, **facts):
        super().__init__(Path("runs"), [0], {})
        self.facts = facts

    def known(self, what, *of):
        numbers = self.facts.get(what, {})
        key = next((key for key in (of, of[0]) if key in numbers), None)
        return self.none(f"{what} {of}") if key is None else np.array([float(numbers[key])])

    def test(self, name):
        return self.known("top1", name)

    def top1(self, name):
        return self.known("top1", name)

    def accuracy(self, benchmark, name):
        return self.known("top1" if benchmark == "val" else benchmark, name)

    def eigenvalue(self, name, block="whole", which=0, file="ckpt.pt"):
        if callable(file):
            return self.none("a control")
        return self.known("λmax", name, block, which)

    def spectrum(self, name, key):
        return self.known(key, name)

    def noise(self, name):
        return self.known("noise", name)

    def change(self, command, name, kind, without=()):
        return self.known(command, name, kind, *without)

    def vulnerability(self, name, low, high, energy="in proportion"):
        return self.known("vulnerability", name, low)

    def similarity(self, name, within):
        return self.known("cka", name, within)

    def lesion(self, name, pattern):
        return self.known("lesion", pattern)

    def of(self, command, name, pick, file="ckpt.pt"):  # ntk
        found = self.known(command, name)
        return (
            found
            if self.missing
            else np.array([pick({"": dict(condition=found[0], eigenvalues=[1])})])
        )

    def only(self, command, name, pick):
        found = self.facts.get(command, {}).get(name)
        return self.none(f"{command} {name}") if found is None else np.array([float(pick(found))])

    def study(self, study, name, pick):
        found = self.facts.get(study)
        return self.none(study) if found is None else np.array([float(pick(found[name]))])


def chens_world():
    """Tables 1 to 5 (ResNet: the 152), §5.3; Fig. 1 and 2 in words."""
    top1 = {"ViT": 74.6, "Mixer": 66.4, "ResNet": 78.5}
    top1 |= {"ViT + SAM": 79.9, "Mixer + SAM": 77.4, "ResNet + SAM": 79.3}
    top1 |= {f"{name}, twice the epochs": top1[name] for name in ("ViT", "Mixer")}
    for name, rows in (
        ("ViT", ((64.9, 52.4, 32.8), (75.4, 66.8, 46.1))),
        ("Mixer", ((53.9, 37.2, 21.0), (71.0, 62.8, 43.5))),
        ("ResNet", ((74.2, 68.0, 54.6), (75.6, 70.3, 57.1))),
    ):
        for way, row in zip(("", " + SAM"), rows):
            top1 |= {f"{name}, {part}{way}": n for part, n in zip(("1/2", "1/4", "1/10"), row)}
    for name, numbers in (("ViT", (79.6, 81.5, 38.5, 45.7)), ("Mixer", (76.5, 78.1, 43.0, 51.0))):
        ways = ("augmented", "augmented + SAM", "augmented, 1/10", "augmented, 1/10 + SAM")
        top1 |= {f"{name}, {way}": n for way, n in zip(ways, numbers)}
    top1 |= {"ViT, contrastive, head": 77.4, "ViT, contrastive + SAM, head": 80.0}
    pgd, corrupted = {}, {"ViT": 46.6, "Mixer": 33.8, "ResNet": 50.0}
    corrupted |= {"ViT + SAM": 56.5, "Mixer + SAM": 48.8, "ResNet + SAM": 52.2}
    for name, *table_5 in (  # clean, under PGD-10, corrupted; each without SAM and with it
        ("ViT", (72.8, 76.7), (54.3, 62.0), (46.4, 51.4)),
        ("Mixer", (62.8, 73.9), (42.5, 59.8), (33.4, 45.9)),
        ("ResNet", (75.5, 75.1), (59.2, 61.0), (48.5, 49.1)),
    ):
        for way, *numbers in zip(("", " + SAM"), *table_5):
            for images, number in zip((top1, pgd, corrupted), numbers):
                images[f"{name}, adversarial{way}"] = number
    places = (("whole", 0), ("embedding", 0), ("MSAs", 0), ("MLPs", 0))
    places += (("block ", 0), ("block ", 1), ("block ", -1))
    largest = {
        (name, *place): n
        for name, blocks in (
            ("ViT", (738.8, 300.4, 179.8, 281.4, 44.4, 32.4, 26.9)),
            ("ViT + SAM", (20.9, 3.8, 8.5, 9.6, 1.7, 1.7, 1.5)),
            ("Mixer", (1644.4, 1042.3, 95.8, 417.9, 239.3, 41.2, 5.1)),
            ("Mixer + SAM", (22.5, 18.2, 1.4, 9.5, 4.0, 1.1, 0.3)),
            ("ResNet", (179.8,)),
        )
        for place, n in zip(places, blocks)
    }
    lengths = {
        name: dict(weights=weights, activation={"first": first})
        for name, weights, first in (
            ("ViT", 269.3, 104.9),
            ("ViT + SAM", 353.8, 117.0),
            ("Mixer", 197.6, 96.7),
            ("Mixer + SAM", 389.9, 110.9),
        )
    }
    return dict(
        top1=top1,
        pgd=pgd,
        ntk={"ViT": 4205.3, "Mixer": 14468, "ResNet": 2801.6},
        norms=lengths,
        nll={
            name: dict(nll=error / 10, training_error=error)
            for name, error in (("ViT", 9), ("Mixer", 5), ("ViT + SAM", 12), ("ViT, augmented", 20))
        },
        noise={"ViT": 2, "ViT + SAM": 1, "Mixer": 3, "Mixer + SAM": 1, "ResNet": 0.5},
        sparsity={
            name: dict(block=dict(first=first, last=last))
            for name, first, last in (
                ("ResNet", 10, 80),
                ("ViT", 20, 4),
                ("ViT + SAM", 15, 9),
                ("Mixer", 20, 30),
                ("Mixer + SAM", 10, 40),
            )
        },
    ) | {"c-lite": corrupted, "λmax": largest}


def parks_world():
    """In words and as the figures show it."""
    negative = {"ViT, 1/10": 30, "ViT, patch 4": 25, "ViT, augmented": 40, "ViT": 20, "PiT": 15}
    negative |= {"ViT, GAP": 10, "ResNet": 1, "ViT, patch 4, kernel 3": 20}
    negative |= {"ViT, patch 4, kernel 5": 15, "ViT, 1 head": 40, "ViT, 9 heads": 30}
    negative |= {"AlterNet": 5, "Swin": 18}
    positive = {"ResNet": 9, "AlterNet": 8, "ViT": 7, "PiT": 6, "Swin": 5, "ViT, patch 4": 6}
    positive |= {"ViT, augmented": 3, "ViT, 1 head": 8, "ViT, 9 heads": 6, "ViT, heads of 8": 9}
    loss = {"Mixer": 2.9, "ViT": 2.5, "PiT": 2.2, "Swin": 2.0, "ResNet": 1.9, "ViT, patch 16": 2.7}
    loss |= {"ViT, patch 4": 2.4, "ViT, patch 4, kernel 3": 2.3, "ViT, patch 4, kernel 5": 2.1}
    loss |= {"ViT, augmented": 2.2, "ViT, augmented, 1/10": 4, "ViT, twice the epochs": 1.5}
    top1 = {"Mixer": 65, "ViT": 70, "PiT": 76, "Swin": 77, "ResNet": 78, "ResNet, blur": 79}
    top1 |= {"ResNet, twice the epochs": 79}
    top1 |= {"ViT, GAP": 71, "ViT, patch 4": 72, "ViT, patch 16": 60, "ViT, twice the epochs": 73}
    top1 |= {"ViT, patch 4, kernel 3": 74, "ViT, patch 4, kernel 5": 75}
    top1 |= {f"AlterNet, {n} attention block{'s' * (n != 1)}": 78 + n for n in range(3)}
    units = {("ViT", "attention"): -1, ("PiT", "attention"): -1}
    units |= {("ViT", "mlp"): 1, ("PiT", "mlp"): 1, ("Swin", "mlp"): 1, ("ResNet", "conv"): 1}
    stages = {"layer1.0": 2, "layer1.1": 4, "layer2.0": 3, "layer2.1": 5, "layer3.0": 4}
    firsts = r"blocks\.0\.", r"5\.0\."
    lasts = r"(0\.blocks\.1|1\.blocks\.3|2\.blocks\.1)\.", r"5\.2\."
    by_depth = dict(variance={"stem": 1} | stages | {"layer3.1": 6, "layer4.0": 5, "layer4.1": 7})
    return dict(
        nep={name: n / 100 for name, n in (negative | {"ViT, heads of 8": 30}).items()},
        ape=positive,
        nll={name: dict(nll=n, training_error=10 * n) for name, n in loss.items()},
        top1=top1 | {"AlterNet": 81},
        fourier=units
        | {("ViT", "attention", "blocks.0.attn"): -1}
        | {(name, "attention", 1): -1 for name in ("PiT", "Swin")},
        variance=units | {"ViT": by_depth, "ResNet": by_depth, ("Swin", "attention", 3): -1},
        vulnerability={("ResNet", 0.5): 60, ("ViT", 0.5): 10, ("ViT", 0): 20, ("ResNet", 0): 10},
        cka={
            (name, within): within for name in ("ResNet", "Swin", "PiT") for within in (True, False)
        },
        lesion={r"\.0$": 20, r"\.1$": 1, "layer1": 20, "layer4": 1}
        | {first + kind: of for kind, of in (("attn", 1), ("mlp", 20)) for first in firsts}
        | {last + kind: of for kind, of in (("attn", 20), ("mlp", 1)) for last in lasts},
        calibration={
            "ViT": dict(confidence=90, top1=70),
            "ViT, augmented": dict(confidence=60, top1=70),
            "ResNet": dict(confidence=80, top1=78),
        },
    ) | {"c-lite": {"AlterNet": 50, "ResNet": 45, "ViT": 40}}


def xiaos_world():
    """Table 2: ViT of 18 GF and ResNet-200, 100 epochs and 200; Fig. 2 to 5 in words."""
    runs = [
        dict(epochs=e, optimizer=o, delta=delta, diverged=False)
        for o in ("adamw", "sgd")
        for e, delta in ((50, 9.0), (100, 5.0), (400, 3.0))
    ]
    better = [run | dict(delta=run["delta"] / 3) for run in runs]
    pairs = [
        dict(random=True, optimizer=o, delta=d)
        for o, deltas in (("adamw", (1, 2, 9)), ("sgd", (1, 9, 9)))
        for d in deltas
    ]
    return dict(
        top1={"ViT": 80.1, "ViT_C": 81.6, "ResNet": 80.5}
        | {"ViT, twice the epochs": 81.6, "ViT_C, twice the epochs": 82.5},
        length={"ViT": runs[:3], "ViT_C": better[:3]},
        optimizer={"ViT": runs, "ViT_C": better},
    ) | {"lr-wd": {"ViT": pairs, "ViT_C": [pair | dict(delta=2) for pair in pairs]}}


@pytest.mark.parametrize(
    "paper, world", [("Chen", chens_world), ("Park", parks_world), ("Xiao", xiaos_world)]
)
def test_every_claim_shows_in_the_world_that_its_paper_describes(paper, world):
    n, unlike, seen = World(**world()), [], 0
    for where, claim, values, ratio in analyze.claims(n):
        if where.startswith(paper):
            assert not n.missing, (where, claim, n.missing)
            seen += 1
            if analyze.verdict(values, ratio)[1] != "shows, one seed":
                unlike.append((where, claim, values))
        n.missing.clear()
    assert seen > 7 and not unlike, unlike


def test_what_the_papers_tables_say_is_the_same_wherever_it_is_written():
    world = chens_world()
    for name, model in (("ViT", "vit_b16"), ("Mixer", "mixer_b16"), ("ResNet", "resnet152")):
        for of, way in ((name, ""), (f"{name} + SAM", ", SAM")):
            kappa, whole, *accuracies = analyze.TABLE_1.get(model + way, (None,) * 4)[:4]
            if whole is not None:
                assert kappa == (None if way else world["ntk"][name])
                assert whole == world["λmax"][of, "whole", 0], of
                assert accuracies == [world["top1"][of], world["c-lite"][of]], of
            if name != "ResNet":
                parts = [(part, 0) for part in ("embedding", "MSAs", "MLPs")]
                parts += [("block ", which) for which in (0, 1, -1)]
                by_table = list(analyze.TABLE_1[model + way][4:])
                assert by_table == [world["λmax"][of, *place] for place in parts], of
                weights, first, *_ = analyze.TABLE_3[model + way]
                lengths = world["norms"][of]
                assert (weights, first) == (lengths["weights"], lengths["activation"]["first"])
        for method, numbers in analyze.CHEN_4[model].items():
            strong = ", augmented" * (method in ("augmented", "both"))
            way = " + SAM" * (method in ("sam", "both"))
            for part, number in zip(analyze.FRACTIONS, numbers):
                of = name + strong + f", {part}" * (part != "1") + way
                assert world["top1"].get(of, number) == number, (of, number)
        if name != "ResNet":
            _, plain, best = train.PUBLISHED[f"chen_{name.lower()}"]
            rho = train.PAPER_RHO["supervised"][model]
            rows = analyze.PAPER["rho"][model]
            assert (rows[0,], rows[rho,], max(rows.values())) == (plain, best, best)
    for i, way in ((1, ""), (2, " with SAM")):
        published = [train.PUBLISHED[f"chen_to_{dataset}"][i] for dataset in analyze.HELD_OUT]
        assert list(analyze.TABLE_6["vit_b16" + way]) == published


def test_controls_show_where_the_claim_beside_them_would():
    """A world in which weight decay and equal loss change nothing, and SAM halves what is sharp."""

    class Controls(World):
        def eigenvalue(self, name, block="whole", which=0, file="ckpt.pt"):
            return self.known("sharp", name)

        def noise(self, name):
            return self.known("sharp", name)

    sharp = {
        name + decay + sam: sharpness / (1 + bool(sam))
        for name, sharpness in (("ViT", 8), ("Mixer", 9), ("ResNet", 4))
        for decay in ("", ", weight decay 1")
        for sam in ("", " + SAM")
    }
    top1 = {"AlterNet, 1 attention block": 70.0, "AlterNet, 2 attention blocks": 71.0}
    n, verdicts = Controls(sharp=sharp, top1=top1), {}
    for where, claim, values, ratio in analyze.claims(n):
        if where == "control":
            assert not n.missing, (claim, n.missing)
            verdicts[claim] = analyze.verdict(values, ratio)[1]
        n.missing.clear()
    assert len(verdicts) == 10 and set(verdicts.values()) == {"shows, one seed"}, verdicts


def test_networks_that_reproduce_compares_cost_about_the_same():
    cost = {
        family: train.complexity_of(
            train.settings(["--dataset", "shapes", "--model", *words.split()])[0]
        )["macs"]
        for family, words in analyze.FAMILIES.items()
    }
    assert set(analyze.FIVE) < set(cost) and 7.2e6 < min(cost.values()), cost
    assert max(cost.values()) < 9e6, cost


def test_a_claim_shows_where_numbers_descend_by_more_than_their_deviation_over_seeds():
    a, b = np.array([3.0, 5.0]), np.array([1.0, 2.0])
    assert analyze.verdict({"a": a, "b": b}) == ("2.50 ± 0.71", "shows")
    assert analyze.verdict({"b": b, "a": a}) == ("-2.50 ± 0.71", "does not show")
    assert analyze.verdict({"a": a, "b": b[::-1]}) == ("2.5 ± 2.1", "shows")
    assert analyze.verdict({"a": a, "b": np.array([1.0, 9.0])})[1] == "within the spread"
    assert analyze.verdict({"a": a, "c": a - 1, "b": b}) == ("1.50 ± 0.71", "shows")
    assert analyze.verdict({"a": a, "b": b, "c": a})[1] == "does not show", "nor does a part of it"
    noise = {"a": a, "c": a - [1, -2], "b": b - 9}
    assert analyze.verdict(noise) == ("-0.5 ± 2.1", "within the spread"), "of one of its steps"
    near = {"a": a, "c": a - [0.1, 0.2], "b": a - [-0.9, 2.4]}
    assert analyze.verdict(near) == ("0.6 ± 2.3", "within the spread"), "of the one that decides"
    up = {"a": a, "c": a + [3, -1], "b": a + [3.5, -0.4]}
    assert analyze.verdict(up) == ("-0.550 ± 0.071", "does not show"), (
        "it ascends beyond its spread"
    )
    assert analyze.verdict({"a": a, "b": b}, ratio=True) == ("×2.739, 3 2.5", "shows")
    assert analyze.verdict({"a": a[:1], "b": b[:1]}) == ("2", "shows, one seed")
    cancel = np.array([99.85, 99.6, 99.5]), np.array([99.9, 99.65, 99.4])
    assert 0 < abs(np.subtract(*cancel).mean()) < 1e-9, "zero but for rounding"
    assert analyze.verdict(dict(zip("ab", cancel)))[0] == "0.000 ± 0.087"
    for wrong in ({"a": a, "b": np.array([1.0, np.nan])}, {"a": a, "b": np.array([-1.0, 1.0])}):
        assert analyze.verdict(wrong, ratio=True) == (None, "no verdict"), wrong


def test_numbers_that_were_not_computed_or_are_not_defined_leave_their_claim_out():
    """As corruptions with --quick, or κ of a singular kernel: no KeyError, no "diverged"."""
    runs = {("net", seed): dict(run=f"r{seed}", top1=70.0) for seed in (0, 1)}
    n = analyze.Numbers(Path("runs"), [0, 1], runs)
    n.found["robustness"] = {f"runs/r{i}/ckpt.pt (m)": {"val": dict(top1=50.0)} for i in (0, 1)}
    assert n.clean("net").tolist() == [50, 50] and not n.missing
    assert np.isnan(n.corrupted("net")).all() and n.missing == ["robustness of net"]
    n.found["ntk"] = {f"runs/r{i}/ckpt.pt (m)": {"batch 0": 5.0 if i else None} for i in (0, 1)}
    kappa = n.of("ntk", "net", lambda parts: parts["batch 0"])
    assert np.isnan(kappa).all() and n.missing[1:] == ["ntk of net"]
    for how in analyze.SCALES.values():  # or the smallest training set has fewer images
        assert Fraction(how["fit"]) <= 1


def test_numbers_of_claims_are_taken_from_results_as_by_hand(tmp_path):
    n = analyze.Numbers(tmp_path, [0], {("net", 0): dict(run="r", top1=70.0)})
    kinds = {
        "stem": ["stem", 0],
        "a": ["attention", 1],
        "m": ["mlp", 1],
        "b": ["attention", 2],
        "o": ["mlp", 2],
    }
    side = dict.fromkeys(kinds, 4) | {"b": 2, "o": 2}
    cka = np.eye(5)
    cka[1, 2], cka[3, 4], cka[1, 3], cka[1, 4], cka[2, 3], cka[2, 4] = 0.9, 0.7, 0.1, 0.2, 0.4, 0.6
    found = {
        "flatness": {
            "softmax, 9 of images, relative noise of σ 0.1, 10 draws": dict(mean=2.5),
            "softmax, 9 of images, relative noise of σ 0.2, 10 draws": dict(mean=9.0),
            "softmax, 9 of images, noise of σ 0.1, 10 draws": dict(mean=8.0),
            "softmax, 9 of images, ball of ρ 0, 20 steps": dict(worst=2.0),
            "softmax, 9 of images, ball of ρ 0.1, 20 steps": dict(worst=7.0),
        },
        "variance": {
            "9 images": dict(
                units=kinds, side=side, variance=dict(stem=1.0, a=1.5, m=1.25, b=8.0, o=10.0)
            )
        },
        "fourier": {
            "9 images": dict(
                units=kinds,
                side=side,
                diagonal=dict(stem=[0, -1], a=[0, -3], m=[0, -2], b=[0, 5], o=[0, 7]),
            )
        },
        "noise": {
            "no noise": dict(top1=90.0),
            "0.1π, σ 0.5": dict(top1=80.0),
            "0.5π, σ 0.5, equal energy": dict(top1=1.0),
            "0.5π, σ 0.5": dict(top1=60.0),
            "1π, σ 0.5": dict(top1=50.0),
        },
        "cka": {
            "9 images": dict(units=kinds, cka=cka.tolist()),
            "9 images, against other": dict(units=kinds, cka=np.ones((5, 5)).tolist()),
        },
        "lesion": {
            "9 images, whole": 90.0,
            "9 images, without layer1.0": 60.0,
            "9 images, without layer1.1": 88.0,
            "9 images, without layer2.0": 80.0,
        },
        "hessian": {
            f"{block}: softmax": dict(eigenvalues=[value])
            for block, value in (
                ("whole", 9.0),
                ("embedding", 4.0),
                ("block 1 of 4", 3.0),
                ("block 4 of 4", 1.0),
            )
        },
        "robustness": {
            "val": dict(top1=90.0),
            "c-lite/x/1": dict(top1=50.0),
            "c-lite/x/2": dict(top1=30.0),
            "c-lite/y/1": dict(top1=60.0),
        },
    }
    n.found = {
        command: {f"{tmp_path}/r/ckpt.pt (0123)": parts, f"{tmp_path}/r2/ckpt.pt (0)": {}}
        for command, parts in found.items()
    }
    got = [
        n.top1("net"),
        n.noise("net"),
        n.change("variance", "net", "attention"),
        n.change("variance", "net", "mlp"),
        n.change("variance", "net", "mlp", without=(2,)),
        n.change("variance", "net", "mlp", without=("o",)),
        n.change("fourier", "net", "attention"),
        n.vulnerability("net", 0.5, 1),
        n.similarity("net", True),
        n.similarity("net", False),
        n.lesion("net", r"\.0$"),
        n.eigenvalue("net"),
        n.eigenvalue("net", "embedding", -1),
        n.eigenvalue("net", "block ", -1),
        n.corrupted("net"),
        n.clean("net"),
    ]
    by_hand = [70, 0.5, 0.5, (-0.25 + 2) / 2, -0.25, -0.25, -2, 35, 0.8, 0.4, 20, 9, 4, 1, 50, 90]
    assert np.allclose(np.concatenate(got), by_hand), got
    n.seeds, n.runs["net", 1] = [0, 1], dict(run="r2", top1=71.0)
    n.found["sparsity"] = {
        f"{tmp_path}/{run}/ckpt.pt (0)": {"9 images": dict(block={"blocks.0": a, "blocks.1": b})}
        for run, a, b in (("r", 0.1, 0.2), ("r2", 0.3, 0.4))
    }
    assert np.allclose(n.active("net"), [15, 35]) and np.allclose(n.active("net", 0), [10, 30])
    n.runs["net", 1] |= dict(top1=None, diverged=True)
    assert np.allclose(n.active("net", 1), [20, math.nan], equal_nan=True) and not n.missing
    n.found["test"] = {f"{tmp_path}/r/ckpt.pt (0)": {"val": dict(top1=60.0)}}
    claims = [analyze.Claim("Chen §1", "A", dict(tested=n.test("net"), first=n.top1("net")))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze, "claims", lambda n: claims)
        ((row,), lacking) = analyze.judged(n)
    assert row["verdict"] == "no verdict" and not lacking, "a run diverged, which is a result"
    assert row["measured"] == "tested (1 of 2 diverged), first (1 of 2 diverged)"
    n.seeds = [0]
    assert np.isnan(n.spectrum("net", "nep")) and n.missing == ["spectrum of net"]


def test_checkpoints_at_equal_loss_are_those_nearest_to_the_highest_final_one(tmp_path):
    losses = {"ViT": (2.0, 1.0, 0.5), "Mixer": (1.5, 0.6, 0.1), "ResNet": (0.9, 0.2, 0.01)}
    runs = {(name, 0): dict(run=name, diverged=False) for name in losses}
    for name, values in losses.items():
        (tmp_path / name).mkdir()
        lines = [
            json.dumps(dict(step=10 * e, epoch=float(e), loss=loss))
            for e, loss in enumerate(values, 1)
        ]
        (tmp_path / name / "log.jsonl").write_text("\n".join(lines) + "\n")
    n = analyze.Numbers(tmp_path, [0], runs)
    files = {name: n.at_equal_loss(name, 0) for name in losses}  # to 0.5, of logarithms
    assert files == {"ViT": "ckpt.pt", "Mixer": "epoch2.pt", "ResNet": "epoch1.pt"}
    runs["ViT", 0]["diverged"] = True  # to 0.1
    files = {name: n.at_equal_loss(name, 0) for name in losses}
    assert files == {"ViT": "ckpt.pt", "Mixer": "ckpt.pt", "ResNet": "epoch2.pt"}


class Panel:
    """Axes that take down what is drawn at each name."""

    def __init__(self):
        self.means, self.seeds, self.drawn = {}, {}, {}

    def errorbar(self, x, y, xerr, fmt, color, capsize):
        self.means[y] = x, xerr, color

    def plot(self, x, y, style, color):
        self.seeds[y[0]] = x.tolist()

    def set_yticks(self, ticks, names):
        self.drawn = {name: (*self.means[y], self.seeds[y]) for y, name in zip(ticks, names)}

    def say_nothing(self, *args, **kwargs):
        pass

    set_title = tick_params = set_xlabel = axis = grid = say_nothing


def test_the_figure_of_all_trainings_has_means_and_deviations_over_seeds():
    tops = {"ViT": (70.0, 74.0), "ViT + SAM": (76.0, 76.0), "ViT, 1/2": (60.0, 62.0)}
    runs = {
        (name, seed): dict(top1=top1) for name, of in tops.items() for seed, top1 in enumerate(of)
    }
    vit, with_sam, half = (
        dict(name=name, family="ViT") for name in ("ViT", "ViT + SAM", "ViT, 1/2")
    )
    mixer_too = [vit, with_sam, dict(name="Mixer", family="Mixer")]
    both = {"core": mixer_too, "fractions": [half], "decay": [half, with_sam]}
    assert analyze.beside_core(both) == {
        "core": mixer_too,
        "fractions": [vit, half],
        "decay": [vit, with_sam, half, with_sam],
    }
    parts = {"core": [vit, with_sam], "fractions": [half]}
    grid = np.array([Panel() for _ in range(3)], object)
    analyze.draw_trainings(grid, parts, analyze.Numbers(Path("runs"), [0, 1], runs))
    core, fractions, empty = (panel.drawn for panel in grid)
    assert list(core) == ["ViT + SAM", "ViT"], "from below"
    assert core == {
        "ViT": (72, pytest.approx(8**0.5), "C0", [70, 74]),
        "ViT + SAM": (76, 0, "C1", [76, 76]),
    }
    assert list(fractions) == ["ViT, 1/2"] and not empty


def test_reproduce_trains_computes_and_judges_and_is_not_done_again(
    tmp_path, capsys, monkeypatch, in_process
):
    small = "--batch-size 40 --micro-batch 20"
    for name, value in (
        (
            "FAMILIES",
            {
                "ViT": STUDIED,
                "Mixer": "mixer_micro8 --dim 16 --depth 1",
                "ViT_C": "vit_micro8 --dim 16 --depth 1 --heads 2 --mlp-dim 32 --stem conv",
            },
        ),
        ("FIVE", ("ViT", "Mixer")),
        ("CHEN", ("ViT", "Mixer")),
        (
            "TRAININGS",
            [
                ("core", ("ViT", "Mixer"), "", f"{small} --keep-epochs warmup {{each}}", True),
                ("twice", ("ViT",), "twice the epochs", f"{small} --epochs {{twice}}", False),
                (
                    "fractions",
                    ("ViT",),
                    "1/10",
                    "--train-fraction {1/10} --batch-size 4 --micro-batch 4",
                    True,
                ),
                (
                    "contrastive",
                    ("ViT",),
                    "contrastive",
                    "--loss supcon --augment crop " + small,
                    False,
                ),
            ],
        ),
    ):
        monkeypatch.setattr(analyze, name, value)
    monkeypatch.setitem(
        analyze.SCALES,
        "full",
        dict(
            train_fraction="1",
            epochs=2,
            warmup_steps=2,
            seeds=[0, 1],
            rho=["0.03", "0.1"],
            images=16,
            held_out=12,
            points=2,
            pairs=1,
            corruptions=True,
            noise_of=("ViT", "Mixer"),
            fit="1",
            parts=("twice", "fractions", "contrastive", "optimizability"),
            epochs_of={"length": [1, 2], "optimizer": [1], "lr-wd": [1]},
        ),
    )
    monkeypatch.setattr(analyze, "search", lambda starts, top1_of: starts)
    monkeypatch.setattr(analyze, "figure", lambda path, *_, **__: path.touch())
    monkeypatch.setattr(analyze, "RHO_BESIDE", {"fractions": {"ViT": 1 / 2}})
    argv = ["reproduce", "--out-dir", str(tmp_path), "--device", "cpu", "--workers", "0"]
    argv += ["--dtype", "bfloat16"]  # of trainings; what is exact stays so
    assert analyze.main(argv) == 0
    # of ViT and ViT_C: two lengths; SGD; a pair of learning rate and weight decay of each optimizer
    studies = 2 * (2 + 1 + 2)
    assert len(in_process) == 4 + 2 * (4 + 1 + 2 + 1 + 1 + studies), in_process
    found = json.loads((tmp_path / "reproduce.json").read_text())
    grid = found["results"]["ρ, top-1 % of held-out training images"]
    for family in ("ViT", "Mixer"):
        assert grid[f"{family}, {found['settings']['ρ'][family]}"] == max(
            grid[f"{family}, {rho}"] for rho in ("0.03", "0.1")
        )
    rho = float(found["settings"]["ρ"]["ViT"])
    for run in (tmp_path / "runs").iterdir():
        own = json.loads((run / "config.json").read_text())["settings"]
        searched, ratio = run.name.startswith("rho-"), 1 / 2 if "1-10" in run.name else 1
        assert own["hold_out"] == ("1/5" if searched else "0") and own["dtype"] == "bfloat16"
        assert searched or own["seed"] == int(run.name.removesuffix("-head")[-1]), run
        if "vit" in run.name and "sam" in run.name and not searched:
            assert own["sam_rho"] == ratio * rho, run
    decides = json.loads((tmp_path / "test/robustness.json").read_text())["settings"].values()
    assert {of["eval_split"] for of in decides} == {"test"}
    spectra = json.loads((tmp_path / "spectrum.json").read_text())["results"]
    assert spectra and all("/warmup.pt" in name for name in spectra)
    text, page = ((tmp_path / name).read_text() for name in ("claims.md", "index.html"))
    verdicts = [
        claim["verdict"].split(",")[0]
        for claim in found["results"]["claims"].values()
        if claim["paper"] != "control"
    ]
    assert f"Of {len(verdicts)} claims {verdicts.count('shows')} show, " in text
    assert found["settings"]["parts"] == ["core", "twice", "fractions", "contrastive"] + [
        "optimizability"
    ]
    tuned = re.findall(r"^\| Xiao (Fig\. [2-5][^:|]*) \|", text, re.MULTILINE)
    places = ["Fig. 2", "Fig. 3, §5.2", "Fig. 3, §5.2", "Fig. 4, §5.3", "Fig. 5, §5.3", "Fig. 5"]
    assert tuned == places, "judged, not left out"
    for study, seed in itertools.product(("length", "optimizer", "lr-wd"), (0, 1)):
        of = json.loads((tmp_path / f"stability-seed{seed}/{study}.json").read_text())
        assert {own["seed"] for own in of["settings"].values()} == {seed}
    claim = found["results"]["claims"]["Chen Table 2: SAM raises the accuracy of ViT (%)"]
    test = json.loads((tmp_path / "test/robustness.json").read_text())["results"]
    top1 = {
        name: np.array(
            [
                next(
                    parts["val"]["top1"]
                    for network, parts in test.items()
                    if f"/runs/{name}-seed{seed}/" in network
                )
                for seed in (0, 1)
            ]
        )
        for name in ("vit-sam", "vit")
    }
    printed = re.findall(r"(\S+) ± ([\d.e-]+)", claim["measured"])
    for (mean, deviation), values in zip(printed, top1.values(), strict=True):
        bound = max(0.05 * values.std(ddof=1), 1e-9)
        assert abs(float(mean) - values.mean()) <= bound, (claim, values)
        assert abs(float(deviation) - values.std(ddof=1)) <= bound, (claim, values)
    columns, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.split("The geometry of the loss")[1].split("\n\n")[1].splitlines()
    )
    assert columns == ["measure", "ViT", "ViT + SAM", "Mixer", "Mixer + SAM"]
    cells = {row[0]: row[1:] for row in rows}
    assert [cell == "-" for cell in cells["λmax at equal training loss"]] == [False, True] * 2
    norms = json.loads((tmp_path / "norms.json").read_text())["results"]
    lengths = [
        of["weights"]
        for network, parts in norms.items()
        for of in parts.values()
        if "/runs/mixer-sam-" in network
    ]
    assert len(lengths) == 2 and cells["‖w‖"][3] == analyze.over_seeds(np.array(lengths))
    assert claim["verdict"] == analyze.verdict(top1)[1]
    for what in (
        claim["claim"],
        "linear model",
        "Left out",
        "ViT, contrastive, head",
        "SAM gains most for Mixer, then ViT, then ResNet",
    ):
        assert what in text and what in page, what
    assert 'href="cka.json"' in page and "<table>" in page
    for title in ("test", "hessian, equal loss", "hessian", "noise, equal energy"):
        name = "robustness" if title == "test" else title.partition(",")[0]
        below = "" if title == name else re.sub(r"\W+", "-", title) + "/"
        assert f"<h2>{title}</h2>" in page and f'href="{below}{name}.json"' in page, title
        computed = json.loads((tmp_path / f"{below}{name}.json").read_text())["settings"]
        if title != "test":
            assert {of["dtype"] for of in computed.values()} == {"float32"}, title
    assert "<h2>landscape, Park</h2>" in page and 'href="park/landscape.json"' in page
    park = json.loads((tmp_path / "park/landscape.json").read_text())["results"]
    assert park and all("/runs/vit-seed0/" in name for name in park), list(park)
    own = str(tmp_path / "runs/vit-seed0/ckpt.pt")
    for more in (["nll", "--images", "20"], ["noise", "--sigma", "2"], ["lesion", "--images", "9"]):
        assert analyze.main([*more, *argv[1:-2], "--checkpoint", own]) == 0, "in the same folder"
    capsys.readouterr()
    del in_process[:]
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert analyze.main(argv) == 0 and not in_process
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert analyze.main([*argv, "--dry-run"]) == 0
    out = capsys.readouterr().out
    printed = re.findall(r"^python train\.py .*/runs/(\S+) --resume$", out, re.MULTILINE)
    assert len(set(printed)) == 4 + 2 * (4 + 1 + 2 + 1) and not in_process, printed
    assert "# The first 4 choose SAM's ρ: in the others 0.03, or a multiple, stands" in out
    assert "classifiers on contrastive networks and Xiao et al.'s studies" in out
    assert analyze.main([*argv, "--quick", "--parts", "fractions", "--dry-run"]) == 0
    out = capsys.readouterr().out
    halves = re.findall("--train-fraction (\\S+)", out)
    assert set(halves) == {"1/2", "1/20"} and "#" not in out, "a tenth of what core has; no choices"
    for flags, line in (
        (["--epochs", "3"], "--epochs is this command's own"),
        (["--quik"], "did you mean --quick?"),
        (["--dry-rnu"], "did you mean --dry-run or --no-dry-run?"),
        (["--parts", "core", "x"], "invalid choice: 'x'"),
        (["--model", "vit_b16"], "--model is this command's own"),
        (["--seeds", "0", "-1"], "--seeds -1"),
        (["--quick"], "other settings"),
    ):
        assert line in analyze_refusal(capsys, *argv, *flags), flags


# ----------------------------------------------------------------------------------- the repository

TRAINS_ALONE = """
import torch
from {name} import build
model = build({variant!r}, 10, 32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
for step in range(5):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item())
"""


ALONE = """
# Runs files, each in a folder and a process of its own; forking saves importing torch.
import json, os, runpy, sys, torch
for folder, argv, code in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        exec(code)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_each_file_runs_alone_in_an_empty_folder(tmp_path):
    variants = dict(
        vit="vit_micro8", mixer="mixer_micro8", resnet="resnet18", alternet="alter_resnet18"
    )
    of_ours = {p.stem for p in HERE.glob("*.py")}
    jobs, refused = [], {"--cost 1": "sam.py and vit.py", "--checkpoint x": "analyze.py and"}

    def job(name, *argv, code=""):
        folder = tmp_path / str(len(jobs))
        folder.mkdir()
        shutil.copy(HERE / f"{name}.py", folder)
        jobs.append((str(folder), [f"{name}.py", *argv], code))

    for name, variant in variants.items():  # its row of the table, then five steps on random data
        job(name, variant, code=TRAINS_ALONE.format(name=name, variant=variant))
    job("sam", "--seeds", "1", "--steps", "20")
    job("adversarial")
    job("data")
    for flags in refused:  # what it does not do alone
        job("adversarial", *flags.split())
    run = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(jobs)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not run.stderr, run.stderr
    for (folder, (file, *argv), _), status in zip(jobs, run.stdout.split(), strict=True):
        out, error = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
        if " ".join(argv) in refused:
            line = f"adversarial.py: this needs {refused[' '.join(argv)]}"
            assert status == "2" and error.startswith(line), (file, argv, error)
            continue
        assert status == "0" and len(out.splitlines()) > 2 and not error, (file, out, error)
        if file.removesuffix(".py") in variants:
            losses = [float(line) for line in out.splitlines()[-5:]]
            assert losses[-1] < losses[0], (file, losses)
        imported = {
            line.split()[1].split(".")[0]
            for line in (HERE / file).read_text().splitlines()
            if line.startswith(("import ", "from "))
        }
        assert not imported & of_ours, (file, imported & of_ours)


def test_head_ends_a_table_without_a_traceback():
    run = subprocess.Popen(
        [sys.executable, "resnet.py"], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    run.stdout.close()  # as `head` does when it has seen enough
    assert (run.stderr.read(), run.wait()) == (b"", -signal.SIGPIPE)


def test_the_readmes_examples_run_as_they_stand():
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    made, trained = {}, []
    for block in blocks:
        model = tiny_network().eval()
        nn.init.normal_(model.head.weight)
        given = dict(
            torch=torch,
            train=train,
            model=model,
            criterion=nn.CrossEntropyLoss(),
            x=torch.rand(4, 3, 32, 32),
            y=torch.arange(4),
            images=torch.rand(2, 3, 32, 32),
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
        )
        before = copy.deepcopy(model.state_dict())
        exec(block, given)
        made |= {
            name: given[name] for name in ("block", "found", "fooling", "maps") if name in given
        }
        trained.append("SAM(" in block and not same_tensors(before, model.state_dict()))
        if "fooling" in given:
            assert 0 < (given["fooling"] - given["x"]).abs().max() <= 2 / 255 + 1e-6
    assert trained.count(True) == 1, "SAM's example trains"
    assert len(blocks) > 5 and made.keys() == {"block", "found", "fooling", "maps"}
    assert len(made["found"]["eigenvalues"]) == 2 and made["found"]["converged"]
    assert all(value is not None for value in made["maps"].values())


def test_the_readmes_figures_are_there_and_not_ignored_by_git():
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    places = {place for figure in figures for place in (*Path(figure).parts, f"/{figure}")}
    places |= {f"/{Path(figure).parts[0]}" for figure in figures}
    lines = (HERE / ".gitignore").read_text().split()
    ignored = [line for line in lines if "*" in line or line.rstrip("/") in places]
    assert figures and all((HERE / figure).is_file() for figure in figures), figures
    assert not ignored, f"{ignored} would keep a figure of that name out of a commit"


def test_the_readmes_commands_are_spelled_right():
    """Subcommands, flags and kinds of values of all; the files that they name need not be there."""
    text = re.sub(r"\\\n *", "", README)  # a command on two lines
    for name, value in (
        ("$T ", "python analyze.py throughput "),
        ("`… ", "`python train.py "),
        *(("$S", "0"), ("$R ", "0.03 "), ("$K", "2"), ("$HOW", ""), ("$FIGURE", "cka")),
    ):
        text = text.replace(name, value)
    commands = set(re.findall(r"\b(train|analyze|adversarial|data)\.py ([^\n`#|;)]*)", text))
    programs = [program for program, flags in commands]
    assert len(commands) > 120 and set(programs) == {"train", "analyze", "adversarial", "data"}
    for program, flags in commands - {("train", "--help"), ("analyze", "--help")}:
        argv = shlex.split(flags + '"' * (flags.count('"') % 2))
        if program == "data":
            data.make_parser().parse_args(argv)
            continue
        module = dict(train=train, analyze=analyze, adversarial=adversarial)[program]
        rest = module.make_parser().parse_known_args(argv)[1]
        train.make_parser().parse_args(rest)


def test_the_readmes_training_commands_run(tmp_path, small_shapes):
    """Each `python train.py` line that trains and needs no data set, cut to one step; of those that
    differ in numbers or folder, one."""
    text = README
    for name, value in (("$S", "0"), ("$R ", "0.03 "), ("$K", "2"), ("$HOW", "--sam-rho 0")):
        text = text.replace(name, value)
    text = re.sub(r" --(seed|out-dir) \S+", "", text)
    commands = sorted(
        {
            re.sub(r" [\d./]+", " number", command): command
            for command in re.findall(r"python train\.py([^\n`#|;]*)", text)
        }.values()
    )
    other = "--data-dir|--init-from|--help|--list"
    runnable = [c.split() for c in commands if not re.search(other, c)]
    assert len(runnable) >= 6 and [] in runnable, commands
    for i, argv in enumerate(runnable):
        out = str(tmp_path / str(i))
        short = ["--max-steps", "1", "--train-fraction", "1", "--out-dir", out]
        assert train.main([*argv, *short]) == 0, argv
    assert f"{train.settings([])[0].out_dir}/best.pt" in text


# ------------------------------------------------------------- python test_all.py --device cuda


def apart(a, b):
    """‖a - b‖ / ‖b‖ over all tensors of two dicts, in float64."""
    pairs = [(a[name].detach().double().cpu(), b[name].detach().double().cpu()) for name in b]
    return math.sqrt(
        sum(((x - y) ** 2).sum() for x, y in pairs) / sum((y**2).sum() for _, y in pairs)
    )


def training_argv(folder, *flags):
    return [
        *(
            "--dataset shapes --model vit_micro8 --train-fraction 1/4 --batch-size 64 --micro-"
            "batch 32 --epochs 4 --warmup-steps 10 --log-every 20 --sam-rho 0.03"
        ).split(),
        *("--out-dir", str(folder)),
        *" ".join(flags).split(),
    ]


def trained(folder, *flags):
    """The checkpoint of a training, in silence."""
    with redirect_stdout(io.StringIO()):
        return train_ok(training_argv(folder, *flags))


def check_gradients(device, folder):
    """Of each family, beside float64 on the CPU."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield from gradients_beside_float64(device)


def gradients_beside_float64(device):
    for name, overrides, compiles in (
        ("vit_micro8", dict(stem="conv"), True),
        ("mixer_micro8", {}, False),
        ("resnet18", dict(width=16), False),
        ("alter_resnet18", dict(width=16), True),
    ):
        torch.manual_seed(0)
        model = train.build_model(name, 12, 32, **overrides)
        nn.init.normal_(train.classifier(model)[1].weight, std=0.02)
        x, y = torch.rand(32, 3, 32, 32), torch.arange(32) % 12

        def result(at, dtype, compiled=False, autocast=nullcontext(), **layout):
            of = copy.deepcopy(model).to(at, dtype, **layout)
            with autocast:
                logits = (torch.compile(of) if compiled else of)(x.to(at, dtype))
            loss = F.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)), y.to(at)
            )
            grads = torch.autograd.grad(loss, list(of.parameters()))
            return dict(enumerate(grads)), {"logits": logits}

        exact, single = result("cpu", torch.float64), torch.float32
        half = torch.autocast(device, torch.bfloat16)
        for compiled in (False, True)[: 1 + compiles]:
            for what, layout in (
                ("", {}),
                (", channels last", dict(memory_format=torch.channels_last)),
            ):
                grads, _ = result(device, single, compiled, **layout)
                yield (
                    f"{name}: gradients, float32{what}{', compiled' * compiled}",
                    apart(grads, exact[0]),
                    0.01,
                )
            # its gradients are no measure: ResNet-18's, at its start, are a third off
            _, logits = result(device, single, compiled, half)
            yield (
                f"{name}: logits, bfloat16{', compiled' * compiled}",
                apart(logits, exact[1]),
                0.1,
            )


def check_sam(device, folder):
    """Weights after three steps in float64 beside those on the CPU; masks of the passes."""
    for what, options in (
        ("one step of ascent", {}),
        ("three", dict(steps=3)),
        ("adaptive", dict(adaptive=True)),
    ):
        states = []
        for where in ("cpu", device):
            torch.manual_seed(0)
            model = train.build_model("resnet18", 12, 32, width=8).double()
            x, y = torch.rand(16, 3, 32, 32).double().to(where), (torch.arange(16) % 12).to(where)
            model.to(where)
            optimizer, ascent = torch.optim.SGD(model.parameters(), 0.1), SAM(model, 0.5, **options)
            for _ in range(3):
                optimizer.zero_grad()
                with ascent.perturb(lambda: F.cross_entropy(model(x), y)):
                    F.cross_entropy(model(x), y).backward()
                optimizer.step()
            states.append({k: v for k, v in model.state_dict().items() if v.is_floating_point()})
        yield f"weights after 3 steps of SAM, {what}, float64", apart(*states[::-1]), 1e-9
    for compiled in (False, True):
        torch.manual_seed(0)
        model = train.build_model("vit_micro8", 12, 32, dropout=0.3, drop_path=0.3).to(device)
        nn.init.normal_(model.head.weight)
        called, x = torch.compile(model) if compiled else model, torch.rand(8, 3, 32, 32).to(device)
        logits = []

        def loss():
            logits.append(called(x))
            return logits[-1].square().sum()

        for _ in range(2):
            with SAM(called, 0.0).perturb(loss):
                loss().backward()
        a, b, c, d = logits
        yield (
            "masks of SAM's two passes at ρ = 0" + ", compiled" * compiled,
            max((a - b).abs().max().item(), (c - d).abs().max().item()),
            0,
        )
        assert not torch.equal(a, c), "the next step has others"


def check_training(device, folder):
    """124 steps of SAM in each precision, beside the CPU's; resumed; in a process of torchrun."""
    exact = trained(folder / "cpu", "--device cpu")["final"]["training"]["nll"]
    on = f"--device {device} --no-compile --dtype float32"
    once, twice = (trained(folder / str(i), on) for i in range(2))
    yield "training NLL, float32", once["final"]["training"]["nll"] / exact - 1, 0.02
    yield "weights of a training, again", apart(twice["model"], once["model"]), 0.02
    trained(folder / "resumed", on, "--max-steps 70")
    resumed = trained(folder / "resumed", on, "--resume")["model"]
    yield "weights of a training, stopped and resumed", apart(resumed, once["model"]), 0.02
    process = start(
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=1",
            "train.py",
            *training_argv(folder / "joined", on),
        ]
    )
    output, _ = process.communicate()
    assert process.returncode == 0, output
    joined = train.read_checkpoint(folder / "joined/ckpt.pt")["model"]
    yield "weights of a training, in a process of torchrun", apart(joined, once["model"]), 0.02
    for what, (begins, ends) in (
        ("the device and ended on the CPU", (on, "--device cpu")),
        ("the CPU and ended on the device", ("--device cpu", on)),
    ):
        trained(folder / what, begins, "--max-steps 70")
        moved = trained(folder / what, ends, "--resume")["final"]["training"]["nll"]
        yield f"training NLL, begun on {what}", moved / exact - 1, 0.02
    for flags in (
        "--dtype float32 --compile",
        "--dtype bfloat16 --no-compile",
        "--dtype bfloat16 --compile",
        "--dtype float16 --no-compile",
    ):
        at = folder / flags.replace(" ", "")
        nll = trained(at, f"--device {device}", flags)["final"]["training"]["nll"]
        yield f"training NLL, {flags}", nll / exact - 1, 0.05
        skipped = sum(r.get("skipped", 0) for r in log_without_times(at))
        yield f"steps skipped, {flags}", skipped, 10 * ("dtype float16" in flags)


def check_waiting(device, folder):
    """Waits for the device, the most memory and compiled graphs, of 30 steps and of 120, in an
    epoch of 125, so that none is a checkpoint's."""
    for flags in (
        "--sam-every 2 --grad-clip 1 --ema-decay 0.9 --mixup 0.5 --no-compile",
        "--adv-eps 2/255 --dtype float16 --no-compile",
        "--compile",
    ):
        counts = []
        for steps in (1, 30, 120):  # the first warms up
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    trained(
                        folder / f"{steps}{flags.replace('/', '')}",
                        f"--device {device} --train-fraction 1 --max-steps {steps}",
                        f"--log-every 1000 --eval-every 1000 {flags}",
                    )
            finally:
                torch.cuda.set_sync_debug_mode("default")
            counts.append(
                (
                    sum("synchronizing" in str(one.message) for one in seen),
                    torch.cuda.max_memory_allocated(),
                    torch._dynamo.utils.counters["stats"]["unique_graphs"],
                )
            )
        for what, few, many in zip(("waits", "bytes", "graphs"), *counts[1:]):
            yield f"{what} of 120 steps more than of 30, {flags}", many - few, 0


def check_memory(device, folder):
    """How many images are taken together with room for 48, for 96, and for less than one."""
    model = train.build_model("vit_s16", 10, 224).to(device).eval()

    def forward(images):
        with torch.inference_mode():
            return model(torch.rand(images, 3, 224, 224, device=device))

    forward(32)  # what libraries take for themselves
    peaks = []
    for images in (48, 96):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        forward(images)
        peaks.append(torch.cuda.max_memory_reserved())
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        for room, limit, images in ((48, peaks[0], 32), (96, peaks[1], 64)):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(limit / total)
            found = train.images_at_once(model, 224, torch.device(device), f"room for {room}")
            yield f"images at once beside {images}, with room for {room}", found - images, 0
        small = train.build_model("resnet18", 10, 2048, width=8).to(device)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        refused = ""
        try:
            train.images_at_once(small, 2048, torch.device(device), "no room")
        except train.UserError as error:
            refused = str(error)
        said = "one image of 2048×2048 does not fit" in refused
        yield "images larger than what is left that were not refused", not said, 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


ANALYSES_ON_A_DEVICE = [
    "hessian",
    "landscape",
    "ntk",
    "norms",
    "sparsity",
    "fourier",
    "variance",
    "cka",
    "lesion",
    "calibration",
]


def check_analyses(device, folder):
    """The numbers of many figures of `analyze.py all` in float64, beside the CPU's."""
    trained(folder / "run", "--device cpu --max-steps 60")
    numbers = {}
    for at in ("cpu", device):
        out = folder / f"figures-{at}"
        with redirect_stdout(io.StringIO()):
            assert (
                analyze.main(
                    [
                        "all",
                        "--checkpoint",
                        str(folder / "run"),
                        *"--images 96 --points 5 --device".split(),
                        at,
                        *"--dtype float64 --out-dir".split(),
                        str(out),
                        "--figures",
                        *ANALYSES_ON_A_DEVICE,
                    ]
                )
                == 0
            )
        numbers[at] = {
            path.stem: numbers_in(json.loads(path.read_text())["results"])
            for path in sorted(out.glob("*.json"))
        }
    assert numbers["cpu"].keys() == numbers[device].keys() == set(ANALYSES_ON_A_DEVICE)
    for what, exact in numbers["cpu"].items():
        worst = 0.0  # of each number alone: a large one would hide a small one
        for a, b in zip(numbers[device][what], exact, strict=True):
            if isinstance(b, (int, float)):
                worst = max(worst, abs(a - b) / (abs(b) + 1e-6))
            else:
                assert a == b, (what, a, b)
        yield f"numbers of {what}, float64", worst, 1e-4
    command = ["hessian", "--checkpoint", folder / "run", "--images", "96", "--params", "whole"]
    results = []
    for processes in (1, 2):  # two of which share a device where there is one
        out = folder / f"{processes}"
        argv = [*command, "--device", device, "--dtype", "float64", "--out-dir", out]
        run = start(
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            + ["analyze.py", *map(str, argv)]
        )
        output, _ = run.communicate()
        assert run.returncode == 0, output
        ((found,),) = (
            of.values() for of in json.loads((out / "hessian.json").read_text())["results"].values()
        )
        results.append(found["eigenvalues"][0])
    yield "largest eigenvalue by two processes, float64", results[1] / results[0] - 1, 1e-6


CHECKS = dict(
    gradients=check_gradients,
    sam=check_sam,
    training=check_training,
    waiting=check_waiting,
    memory=check_memory,
    analyses=check_analyses,
)


def check_device(device, names):
    """What must hold on an accelerator, each with a distance from the CPU's numbers or a count, and
    how large it may be. -> how many do not hold."""
    failed = total = 0
    for name in names or CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                for what, number, most in CHECKS[name](device, Path(folder)):
                    holds = abs(number) <= most  # not so NaN
                    total, failed = total + 1, failed + (not holds)
                    print(
                        f"{name:10} {number:10.3g}  at most {most:<6g} "
                        f"{'holds ' if holds else 'FAILED'}  {what}",
                        flush=True,
                    )
            except Exception:
                total, failed = total + 1, failed + 1
                traceback.print_exc()
                print(f"{name:10} FAILED", flush=True)
    print(f"{total - failed} hold, {failed} do not")
    return failed


# --------------------------------------------------------------- python test_all.py --stress

ANY = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def stress_training(folder, share):
    """Weights, optimizer and log of a training that is ended again and again."""
    settings = (
        "--stem conv --dropout 0.1 --mixup 0.5 --ema-decay 0.95 --sam-rho 0.1 --sam-every "
        "3 --epochs 200 --eval-every 40 --save-every 9 --log-every 6"
    )

    def differ(whole, again):
        one, other = (train.read_checkpoint(run / "ckpt.pt") for run in (whole, again))
        parts = ("model", "ema", "optimizer", "look", "step", "evaluated", "best", "final")
        return not all(same_tensors(one[part], other[part]) for part in parts) or (
            log_without_times(whole) != log_without_times(again)
        )

    for processes, kills in ((1, 70), (2, 30)):
        whole, again = folder / f"whole{processes}", folder / f"again{processes}"
        killed("train", tiny(whole, settings), whole / "ckpt.pt", 0, processes=processes)
        count, _ = killed(
            "train",
            tiny(again, settings, "--resume"),
            again / "ckpt.pt",
            round(kills * share),
            processes=processes,
            signals=ANY,
            early=0.6,
        )
        yield (
            f"SIGKILL, SIGTERM or SIGINT to a training, {processes} processes",
            count,
            differ(whole, again),
        )
    again, rng, kills = folder / "restarted", np.random.default_rng(0), max(1, round(10 * share))
    run = start(
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            f"--max-restarts={kills}",
            "train.py",
            *tiny(again, settings, "--resume"),
        ],
        env=os.environ | dict(OMP_NUM_THREADS="1"),  # as in `killed`
    )
    ckpt, dead = again / "ckpt.pt", set()

    def ranks():
        return set(children(run.pid))

    for _ in range(kills):
        wait_until(lambda: ranks() and not ranks() & dead)  # else the survivor saves once more
        seen = time.time_ns()
        wait_until(lambda: ckpt.exists() and ckpt.stat().st_mtime_ns > seen)
        time.sleep(rng.uniform(0, 0.3))
        dead = ranks()
        os.kill(int(rng.choice(sorted(dead))), signal.SIGKILL)
    output, _ = run.communicate()
    assert run.returncode == 0 and output.count("resumed ") == kills, (
        run.returncode,
        output.count("resumed "),
        output[-3000:],
    )
    yield (
        "SIGKILL to one of two processes of torchrun, which restarts both",
        kills,
        differ(folder / "whole2", again),
    )


def stress_analyses(folder, share):
    """The numbers of an analysis that is ended again and again; a sweep's; a pack's bytes."""
    with redirect_stdout(io.StringIO()):
        train_ok(tiny(folder / "run", "--sam-rho 0.1"))

    def results(path):
        text = re.sub(r'"seconds": [\d.e-]+', '"seconds": 0', path.read_text())
        return json.loads(text)["results"]

    for (name, flags), processes in itertools.product(
        (("hessian", "--images 48 --params whole"), ("landscape", "--points 12 --images 96")),
        (1, 2),
    ):
        found = []
        for out, kills in (("whole", 0), ("again", round(20 * share))):
            out = folder / f"{out}{processes}"
            argv = [name, "--checkpoint", folder / "run", *flags.split(), "--device", "cpu"]
            argv += ["--out-dir", out]
            count, _ = killed(
                "analyze",
                argv,
                out / f"{name}.json",
                kills,
                late=0.2,
                early=0.5,
                signals=ANY,
                processes=processes,
            )
            found.append(results(out / f"{name}.json"))
        yield (f"the same to analyze.py {name}, {processes} processes", count, found[0] != found[1])
    for processes in (1, 2):
        found = []
        for out, kills in (("whole", 0), ("again", round(20 * share))):
            out = folder / f"study{out}{processes}"
            argv = [
                "stability",
                "--study",
                "length",
                "--models",
                "vit_micro8 --dim 24 --depth 1",
                *"--dataset shapes --train-fraction 1/50 --batch-size 32 --micro-batch 8 "
                "--device cpu --vary optimizer adamw sgd --vary epochs 60 120 --optimum adamw "
                "1e-3 0.1 --optimum sgd 1e-2 1e-4 --save-every 5".split(),
                "--out-dir",
                out,
            ]
            count, _ = killed(
                "analyze",
                argv,
                out / "length.json",
                kills,
                early=3.0,
                late=8.0,
                signals=ANY,
                processes=processes,
            )
            found.append(results(out / "length.json"))
        yield (
            f"the same to a study of 4 trainings, {processes} processes",
            count,
            (found[0] != found[1]),
        )
    write_image_folder(folder / "images", train=300, val=100)
    count = 0
    for out, kills in (("whole.pack", 0), ("again.pack", round(20 * share))):
        argv = ["pack", "--data-dir", folder / "images", "--out", folder / out, "--workers", "1"]
        count, _ = killed(
            "data", argv, f"{folder / out}.partial", kills, early=0.3, late=0.3, signals=ANY
        )
    yield (
        "the same to data.py pack",
        count,
        ((folder / "whole.pack").read_bytes() != (folder / "again.pack").read_bytes()),
    )


def stress_disk(folder, share):
    """Files of a run may be of a random size at most: what was saved before is whole."""
    settings, rng = "--train-fraction 1/50 --save-every 3 --ema-decay 0.9", np.random.default_rng(0)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        whole, argv = (
            train_ok(tiny(folder / "whole", settings)),
            tiny(folder / "run", settings, "--resume"),
        )
        size, count, lost = (folder / "whole/ckpt.pt").stat().st_size, 0, 0
        assert train.main([*argv, "--max-steps", "3"]) == 0
        for _ in range(round(50 * share)):
            before = train.read_checkpoint(folder / "run/ckpt.pt")["step"]
            with files_of_at_most(int(rng.integers(100, 0.9 * size))):
                status = train.main(argv)
            count += 1
            lost += status != 2 or train.read_checkpoint(folder / "run/ckpt.pt")["step"] < before
        end = train_ok(argv)
        assert errors.getvalue().count("\n") == count, errors.getvalue()
    lost += not same_tensors(whole["model"], end["model"])
    yield "the disk is full while a run saves", count, lost


def refused_or(function, right, errors):
    """Whether the result is right or one of these errors of one line."""
    try:
        return right(function())
    except errors as error:
        return "\n" not in str(error) and len(str(error)) > 10


def damages(content, count, rng):
    """The content cut, with flipped bits, with a part missing, repeated, zeros or noise."""
    for i in range(count):
        a, b = sorted(rng.integers(0, len(content), 2).tolist())
        b = min(b, a + 4096)
        yield (
            content[:a],
            content[:a] + bytes([content[a] ^ 1 << rng.integers(8)]) + content[a + 1 :],
            content[:a] + content[b:],
            content[:b] + content[a:],
            content[:a] + bytes(b - a) + content[b:],
            content[:a] + rng.bytes(b - a) + content[b:],
        )[i % 6]


def stress_files(folder, share):
    """Damaged files: an error of one line, or, of weights and packs, what the whole file holds; of
    JPEGs an image, of config.json and log.jsonl an end as documented."""
    rng, n = np.random.default_rng(0), round(2000 * share)
    with redirect_stdout(io.StringIO()):
        state = train_ok(tiny(folder / "run", "--sam-rho 0.1 --ema-decay 0.9"))
    network = tiny_network()
    start, path = copy.deepcopy(network.state_dict()), folder / "damaged.pt"

    def load():
        network.load_state_dict(start)
        with redirect_stdout(io.StringIO()):
            train.load_weights(network, path)
        return network.state_dict()

    lost = 0
    for content in damages((folder / "run/ckpt.pt").read_bytes(), n, rng):
        path.write_bytes(content)
        lost += not refused_or(load, lambda got: same_tensors(got, state["ema"]), train.UserError)
    yield "damaged checkpoints", n, lost

    np.savez(folder / "whole.npz", **google_arrays())
    whole, npz = vit.ViT(**VIT_TINY), folder / "damaged.npz"
    vit.load_npz(whole, folder / "whole.npz")

    def load_npz():
        model = vit.ViT(**VIT_TINY)
        vit.load_npz(model, npz)
        return model.state_dict()

    lost = 0
    for content in damages((folder / "whole.npz").read_bytes(), n, rng):
        npz.write_bytes(content)
        lost += not refused_or(
            load_npz, lambda got: same_tensors(got, whole.state_dict()), ValueError
        )
    yield "damaged .npz of weights", n, lost

    out, images = tiny_pack(folder)
    whole, lost = out.read_bytes(), 0
    for content in damages(whole, n, rng):
        out.unlink()
        out.write_bytes(content)
        for i, image in enumerate(images):
            lost += not refused_or(
                lambda: data.Pack(out, "train", None).read(i),
                lambda got: torch.equal(got, image),
                data.DataError,
            )
    yield "damaged packs", n, lost

    for name, what, function in (
        (
            "config.json",
            "config.json of a run",
            lambda run: train.main(
                [*tiny(run), "--sam-rho", "0.1", "--ema-decay", "0.9", "--resume"]
            ),
        ),
        (
            "log.jsonl",
            "log.jsonl of a run",
            lambda run: analyze.main(
                ["curves", "--runs", str(run), "--out-dir", str(folder / "curves")]
            ),
        ),
    ):
        whole, lost = (folder / "run" / name).read_bytes(), 0
        for content in damages(whole, n // 4, rng):
            (folder / "run" / name).write_bytes(content)
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
                try:
                    status = function(folder / "run")
                except Exception:
                    traceback.print_exc(file=sys.__stderr__)
                    status = 1
            lost += status not in (0, 2) or (status == 2 and errors.getvalue().count("\n") != 1)
        (folder / "run" / name).write_bytes(whole)
        yield f"damaged {what}", n // 4, lost

    image, lost = io.BytesIO(), 0
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(image, "JPEG")
    write_image_folder(folder / "images", train=1, val=1)
    dataset = data.ImageFolder(folder / "images/train", data.transforms("none", 16))
    file = dataset.root / os.fsdecode(dataset.names[0])
    for content in damages(image.getvalue(), n, rng):
        file.write_bytes(content)
        lost += not refused_or(
            lambda: dataset.read(0), lambda got: got.shape[0] == 3, data.DataError
        )
    yield "damaged JPEGs", n, lost


BAD_VALUES = ("x", "", "0", "-1", "1e99", "999999999999", "nan", "inf", "0.5", "1/0", "\n", "é")
QUICK = {  # flags with which a subcommand takes a second; {run}: a run's folder
    "robustness": "--benchmarks val",
    "hessian": "--images 12 --params whole",
    "spectrum": "--images 12 --batch 6 --k 1",
    "landscape": "--images 12 --points 2",
    "flatness": "--images 12 --draws 1 --steps 1 --sigma 0.01 --rho 0.1",
    "ntk": "--images 8 --batch 4",
    "norms": "--images 12",
    "sparsity": "--images 12",
    "compare": "--images 12 --benchmarks val",
    "fourier": "--images 12",
    "variance": "--images 12",
    "cka": "--images 12 --batch 6",
    "lesion": "--images 12",
    "noise": "--frequencies 0.5",
    "attention": "--indices 0",
    "calibration": "",
    "nll": "--images 12",
    "curves": "--runs {run}",
    "peak": "--runs {run}",
    "complexity": "--models vit_micro8",
    "throughput": "--models vit_micro8 --modes inference --batch-sizes 2 "
    "--seconds 0.01 --rounds 1 --compile no",
    "scale": "--tflops 100 --devices 1 8 --dataset imagenet",
    "datasize": "--models vit_s16 --dry-run",
    "stability": "--study rho --models vit_s16 --dry-run",
    "transfer": "--datasets shapes --epochs 1 --max-steps 1",
    "all": "--figures norms --images 12",
    "reproduce": "--quick --dry-run",
}


def stress_arguments(folder, share):
    """Every flag of every program with values that may be wrong: accepted, or refused in one line.
    What is accepted and then takes more than five seconds is stopped."""
    with redirect_stdout(io.StringIO()):
        train_ok(tiny(folder / "run", "--max-steps 5 --train-fraction 1"))
    values = BAD_VALUES[: max(2, round(len(BAD_VALUES) * share))]
    parsers = analyze.make_parser().commands
    assert parsers.keys() == QUICK.keys()
    programs = [
        (
            "train.py",
            train.main,
            train.make_parser(),
            tiny(folder / "new", "--max-steps 1 --train-fraction 1 --dry-run"),
        ),
        (
            "adversarial.py",
            adversarial.main,
            adversarial.make_parser(),
            (
                f"--checkpoint {folder / 'run'} --device cpu --images 8 --steps 2 "
                f"--strength-images 0 --out-dir {folder / 'attack'}"
            ).split(),
        ),
    ]
    write_image_folder(folder / "images", train=2, val=2)
    for argv in (
        "sizes --size 8",
        f"sheet --size 8 --columns 1 --out {folder / 'sheet.png'}",
        f"pack --data-dir {folder / 'images'} --workers 0 --out {folder / 'images.pack'}",
    ):
        argv = argv.split()
        programs.append((f"data.py {argv[0]}", data.main, data.make_parser(), argv))
    for name, flags in QUICK.items():  # last: what is stopped inside a counter leaves torch slow
        argv = [name, *flags.format(run=folder / "run").split(), "--out-dir", str(folder / name)]
        if "--checkpoint" in parsers[name].format_help():
            argv += ["--device", "cpu", "--checkpoint", str(folder / "run")]
        programs.append((f"analyze.py {name}", analyze.main, parsers[name], argv))
    for name, main, parser, argv in programs:
        with chdir(folder):
            assert answer_to(main, argv) in ("done", "late"), f"{name} fails with all flags right"
        count = lost = late = 0
        for action in parser._actions:
            flag = action.option_strings[-1] if action.option_strings else None
            if flag in (None, "--help", "--device", "--dry-run", "--download", "--cost"):
                continue
            for value in values:
                given = (
                    [flag, *[value] * action.nargs]
                    if isinstance(action.nargs, int)
                    else [f"{flag}={value}"]
                )
                (folder / "images.pack").unlink(missing_ok=True)  # it is not written over
                with chdir(folder):  # some are names of folders
                    answer = answer_to(main, [*argv, *given])
                count, lost, late = count + 1, lost + (answer == "lost"), late + (answer == "late")
        what = f"flags of {name} with strange values"
        yield what + f" ({late} stopped after 5 s)" * (late > 0), count, lost


class LongEnough(BaseException):
    pass


def answer_to(main, argv):
    """How a command ended: done, refused in one line, late (after 5 s it was stopped) or lost."""

    def enough(*_):
        raise LongEnough

    before, status = signal.signal(signal.SIGALRM, enough), None
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        try:
            signal.alarm(5)
            status = main(argv) or 0
        except LongEnough:
            return "late"
        except SystemExit as end:
            status = end.code
        except BaseException:
            print(argv, traceback.format_exc(limit=-2), file=sys.__stderr__)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    said = errors.getvalue()
    if status == 0 or status == 2 and said.count("\n") == 1:
        return "refused" if status else "done"
    print(argv, status, said, file=sys.__stderr__)
    return "lost"


def stress_long_run(folder, share):
    """Memory, files, threads and shared memory of a training, between its first tenth and its
    end."""
    write_image_folder(folder / "images", train=32, val=8)
    steps, seen, log = round(20_000 * share), [], train.RunFolder.log

    def watched(self, **record):
        if "loss" in record:
            seen.append(
                (
                    int(Path("/proc/self/statm").read_text().split()[1])
                    * os.sysconf("SC_PAGE_SIZE")
                    / 2**20,
                    len(os.listdir("/proc/self/fd")),
                    len(os.listdir("/proc/self/task")),
                    len(os.listdir("/dev/shm")),
                )
            )
        log(self, **record)

    train.RunFolder.log = watched
    try:
        with redirect_stdout(io.StringIO()):
            train_ok(
                [
                    *TINY,
                    *f"--dataset folder --data-dir {folder / 'images'} --image-size 16 "
                    f"--workers 2 --batch-size 8 --micro-batch 8 --epochs 0 --max-steps {steps} "
                    f"--log-every {max(steps // 100, 1)} --eval-every 100 --save-every 500 "
                    f"--sam-rho 0.1 --out-dir {folder / 'run'}".split(),
                ]
            )
    finally:
        train.RunFolder.log = log
    first, last = np.array(seen[len(seen) // 10]), np.array(seen[-1])
    for what, grown, most in zip(
        ("MiB of memory", "open files", "threads", "files in /dev/shm"), last - first, (16, 0, 0, 0)
    ):
        yield f"{what} that {steps:,} steps add ({grown:+.3g})", 1, grown > most


def stress_determinism(folder, share):
    """The same command twice."""
    alone = {name: flags for name, flags in VARIANTS.items() if "--init-from" not in flags}
    lost = 0
    for name, flags in alone.items():
        with redirect_stdout(io.StringIO()):
            one, other = (train_ok(tiny(folder / f"{name}{i}", flags)) for i in range(2))
        lost += not same_tensors(one["model"], other["model"])
    yield "trainings run twice", len(alone), lost


STRESS = dict(
    training=stress_training,
    analyses=stress_analyses,
    disk=stress_disk,
    files=stress_files,
    arguments=stress_arguments,
    long=stress_long_run,
    determinism=stress_determinism,
)


def stress(names, share):
    """Prints a table of what was done to the programs, how often, and how often something was lost:
    a number, a file, a sentence. -> how often."""
    total, splits = 0, dict(data.SHAPES_SPLITS)
    print("| what | times | lost |\n|---|---|---|", flush=True)
    for name in names or STRESS:
        with tempfile.TemporaryDirectory() as folder:
            if name == "arguments":  # with less to make
                data.SHAPES_SPLITS.update(train=(0, 160), val=(2**30, 60), test=(2**31, 60))
            try:
                for what, count, lost in STRESS[name](Path(folder), share):
                    total += int(lost)
                    print(f"| {what} | {count:,} | {int(lost)} |", flush=True)
            except Exception:
                total += 1
                traceback.print_exc()
                print(f"| {name} ended early | | 1 |", flush=True)
            finally:
                data.SHAPES_SPLITS.update(splits)
    return total


def main():
    parser = train.Parser(
        allow_abbrev=False,
        description="What takes longer than pytest's tests, "
        "or needs an accelerator. Give --stress or --device.",
    )
    parser.add_argument(
        "--stress",
        action="store_true",
        help="kill, damage and mistype, for an hour or more; a table of what was lost",
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the times that --stress does so (default: 1)"
    )
    parser.add_argument("--faults", nargs="+", choices=STRESS, help="only these of --stress")
    parser.add_argument("--device", choices=("cuda",), help="numbers on it beside the CPU's")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, help="only these of --device")

    def command():
        args = parser.parse_args()
        if args.stress == bool(args.device):
            parser.error(
                "give --stress or --device; the tests are run by python -m pytest -q test_all.py"
            )
        if args.faults and args.device or args.checks and args.stress:
            parser.error("--faults is of --stress, and --checks of --device")
        if not 0 < args.share <= 1:
            parser.error(f"--share {args.share:g}: it is above 0 and at most 1")
        if args.device and not torch.get_device_module(args.device).is_available():
            parser.error(f"--device {args.device}: this machine has none that torch can use")
        failed = (
            stress(args.faults, args.share)
            if args.stress
            else check_device(args.device, args.checks)
        )
        return min(failed, 1)

    return train.answer("test_all.py", command, "nothing is kept")


if __name__ == "__main__":
    sys.exit(main())
