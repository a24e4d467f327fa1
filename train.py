"""Train an image classifier with or without sharpness-aware minimisation, on one device or many.

The training of Chen et al. 2021 (arXiv 2106.01548; Tables 8 and 9, Appendix E), Park & Kim 2022
(2202.06709, A.1) and Xiao et al. 2021 (2106.14881, §5.4). RECIPES holds rows of their tables; each
entry of a recipe is also a flag, and a flag overrides its recipe.

    python train.py                   built-in data, small ViT, SAM: 2½ minutes, 2 CPU cores
    python train.py --sam-rho 0       the same without SAM
    python train.py --list-recipes    every recipe, its steps and the paper's accuracy
    torchrun --nproc_per_node=8 train.py --model vit_b16 --sam-rho 0.2             the paper's run
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        train.py --model vit_b16 --sam-rho 0.2       the same run on four machines, started on each

A run is the same run on any number of devices: its unit is the micro-batch (the paper's 32 images
of one TPU core), which has its own ε, dropout masks, mixup partners and BatchNorm statistics.

Differs from the paper: β₂ is 0.999 (Table 8 prints 0.009). Where the paper is silent, as in its
group's big_vision: the sigmoid loss starts from head biases of -6.9, weight decay leaves out
biases, norms, class token and positions. SGD's weight decay is torch's, an L2 term outside ε.
"""

import argparse
import copy
import difflib
import errno
import fcntl
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import warnings
import weakref
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import regnet
from torchvision.transforms import v2
from tqdm import tqdm

import adversarial
import alternet
import data
import mixer
import resnet
import vit
from sam import SAM, LookSAM

IMAGENET_PIXELS = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
# Chen et al. Table 8. Loss: B.1. 4096 = 128 cores × 32 images, each core's ε its own: E.
CHEN = dict(
    dataset="imagenet",
    image_size=224,
    augment="inception",
    epochs=300,
    batch_size=4096,
    micro_batch=32,
    optimizer="adamw",
    lr=3e-3,
    beta1=0.9,
    beta2=0.999,
    warmup_steps=10_000,
    weight_decay=0.3,
    decay="kernels",
    grad_clip=1.0,
    loss="sigmoid",
    head_bias=-6.9,
)
# Park & Kim A.1; numbers that it lacks from the authors' cifar100_vit and imagenet_vit files:
# the 5 epochs of warm-up come before the 300, all parameters decay. Random erasing, in A.1, has
# probability 0 in the last CIFAR file and 0.25 in an earlier one. Not theirs: crops of 5-100 %
# of the area for ImageNet (timm's are of 8-100 %), RandAugment without noise on its magnitude.
PARK = dict(
    model="resnet50",
    randaugment=[2, 9],
    randaugment_prob=0.5,
    erasing=0.25,
    mixup=1.0,
    cutmix=0.8,
    label_smoothing=0.1,
    epochs=305,
    optimizer="adamw",
    lr=1.25e-4,
    warmup_epochs=5,
    lr_schedule="cosine",
    weight_decay=0.05,
    decay="all",
    drop_path=0.1,
)
RECIPES = {
    # This repository's own, for the built-in data: minutes on a laptop.
    "shapes": dict(
        dataset="shapes",
        model="vit_micro8",
        epochs=12,
        batch_size=64,
        micro_batch=32,
        optimizer="adamw",
        lr=2e-3,
        warmup_steps=125,
        lr_schedule="cosine",
        weight_decay=0.1,
        sam_rho=0.03,
    ),
    "chen_vit": CHEN | dict(model="vit_b16", lr_schedule="cosine", dropout=0.1),
    "chen_mixer": CHEN | dict(model="mixer_b16", lr_schedule="linear", lr_end=1e-5, drop_path=0.1),
    "chen_resnet": dict(
        dataset="imagenet",
        model="resnet50",
        image_size=224,
        augment="inception",
        epochs=90,
        batch_size=4096,
        micro_batch=32,
        optimizer="sgd",
        momentum=0.9,
        lr=1.6,
        warmup_steps=5_000,
        lr_schedule="cosine",
        weight_decay=1e-3,
        decay="kernels",
        loss="softmax",
        zero_init=True,
    ),
    "park_cifar": dict(
        PARK,
        dataset="cifar100",
        image_size=32,
        augment="crop",
        batch_size=96,
        micro_batch=96,
        grad_clip=5.0,
        mean=[0.5071, 0.4867, 0.4408],
        std=[0.2675, 0.2565, 0.2761],
    ),
    "park_imagenet": dict(
        PARK | IMAGENET_PIXELS,
        dataset="imagenet",
        image_size=224,
        augment="inception",
        batch_size=128,
        micro_batch=32,
    ),
}
# Park & Kim's ViT for CIFAR is timm's class without biases of queries, keys and values.
RECIPES["park_cifar_vit"] = RECIPES["park_cifar"] | dict(
    model="vit_ti2", qkv_bias=False, gelu="exact", init="timm"
)
# Their ResNets of CIFAR start from torch's initialisation (of ImageNet's a notebook loads timm's);
# their Mixer too, which mixer.py does not offer.
RECIPES["park_cifar_resnet"] = RECIPES["park_cifar"] | dict(init="torch")
RECIPES["park_cifar_mixer"] = RECIPES["park_cifar"] | dict(model="mixer_ti2", gelu="exact")
RECIPES["park_imagenet_vit"] = RECIPES["park_imagenet"] | dict(
    model="vit_ti16", gelu="exact", init="timm"
)
# Chen et al. E.3: mixup and RandAugment of strength 15. Its "probability 0.5" of mixup is read as
# the α of big_vision's mixup.p.
RECIPES |= {
    f"{name}_strong": dict(
        RECIPES[name],
        lr=1e-3,
        weight_decay=0.1,
        drop_path=0.1,
        mixup=0.5,
        randaugment=[2, 15],
        randaugment_of="google",
    )
    for name in ("chen_vit", "chen_mixer")
}
# Chen et al. Table 5, E.5: nothing else changes, so δ raises the sigmoid loss where it is trained.
# BatchNorm keeps the statistics of the pass from which δ (and ε) come, as with SAM alone.
RECIPES |= {
    f"{name}_adversarial": RECIPES[name] | dict(adv_eps=2 / 255)
    for name in ("chen_vit", "chen_mixer", "chen_resnet")
}
# E.2 (Fig. 4, Table 4): as many steps from fewer images; the learning rate is not scaled.
RECIPES |= {
    f"{name}_{part}": dict(
        RECIPES[name],
        model="resnet152" if name == "chen_resnet" else RECIPES[name]["model"],
        train_fraction=fraction,
        batch_size=batch,
    )
    for name in ("chen_resnet", "chen_vit", "chen_mixer", "chen_vit_strong", "chen_mixer_strong")
    for part, fraction, batch in (
        ("half", "1/2", 2048),
        ("quarter", "1/4", 1024),
        ("tenth", "1/10", 512),
    )
}
# Appendix F: twice the epochs, which brought nothing.
RECIPES |= {f"{name}_long": RECIPES[name] | dict(epochs=600) for name in ("chen_vit", "chen_mixer")}
# §5.1: ImageNet-21k with SAM, then ImageNet without. The paper has no numbers for it: ViT's are
# those of its reference [20] (2010.11929, Tables 3 and 4; its code's linear schedule ends at 1e-5),
# the head's bias is big_vision's for 21k; Mixer's and ResNet's are Table 8's, which is a guess.
RECIPES |= {
    f"{name}_21k": RECIPES[name] | dict(dataset="imagenet21k", sam_rho="paper")
    for name in ("chen_vit", "chen_mixer", "chen_resnet")
}
RECIPES["chen_vit_21k"] |= dict(
    epochs=90, lr=1e-3, lr_schedule="linear", lr_end=1e-5, weight_decay=0.03, head_bias=-10.0
)
RECIPES["chen_mixer_21k"] |= dict(head_bias=-10.0)
# Table 11: fine-tuning, without SAM, of whatever --init-from holds. The rate of each number in
# Table 6 is the best of 0.001, 0.003, 0.01 and 0.03 on images held out (E.6). Training crops are
# those of [20]'s code, which tests on images squeezed into a square; here their centre is cropped.
TRANSFER = dict(
    model="vit_b16",
    image_size=224,
    augment="inception",
    epochs=0,
    max_steps=500,
    batch_size=512,
    micro_batch=32,
    optimizer="sgd",
    momentum=0.9,
    lr=0.01,
    warmup_steps=100,
    lr_schedule="cosine",
    weight_decay=0.0,
    grad_clip=1.0,
    loss="softmax",
    reset_head=True,
    eval_every=10_000,
)
RECIPES |= {f"chen_to_{name}": TRANSFER | dict(dataset=name) for name in ("flowers102", "pets")}
RECIPES |= {
    f"chen_to_{name}": TRANSFER | dict(dataset=name, max_steps=10_000, warmup_steps=500)
    for name in ("cifar10", "cifar100")
}
RECIPES["chen_21k_to_imagenet"] = TRANSFER | dict(
    dataset="imagenet", max_steps=20_000, warmup_steps=500, lr=0.03, eval_every=1
)
# E.4, supervised contrastive learning of its [31] (Khosla et al. 2020, 2004.11362). What E.4 leaves
# open in the first stage is Table 8's; 16 images are a core's of 128. "AutoAugment with strength
# 1.0" is the policy as it is: in [31]'s code any strength above 0 turns it on.
RECIPES["chen_supcon"] = RECIPES["chen_vit"] | dict(
    autoaugment="imagenet",
    epochs=350,
    batch_size=2048,
    micro_batch=16,
    optimizer="lamb",
    lr=8e-3,
    eps=1e-6,
    weight_decay=0.3,
    loss="supcon",
    temperature=0.1,
    projection_dim=128,
    unit_norm=True,
    head_bias=0.0,
)
# Then the head alone, from the first stage's --init-from RUN/ckpt.pt. What E.4 leaves open is of
# [31]'s code, which has its other numbers too: 12 epochs of warm-up, α and momentum 0.9, ε 0.001
# within the root (torch's is beside it), then 0.97 each half epoch (here smoothly). That code also
# multiplies 0.05 by batch/256 (--lr 0.4 --lr-end 3.455e-3) and smooths labels by 0.05.
RECIPES["chen_supcon_head"] = dict(
    dataset="imagenet",
    model="vit_b16",
    image_size=224,
    augment="inception",
    autoaugment="imagenet",
    epochs=90,
    batch_size=2048,
    micro_batch=32,
    optimizer="rmsprop",
    lr=0.05,
    momentum=0.9,
    beta2=0.9,
    eps=0.001**0.5,
    warmup_epochs=12,
    lr_schedule="exponential",
    lr_end=0.05 * 0.97 ** (2 * (90 - 12)),
    weight_decay=1e-6,
    loss="softmax",
    unit_norm=True,
    reset_head=True,
    train_only="head",
)
# Park & Kim App. F: "weak" augmentation leaves the crop, and the flip unless --no-flip. Their file
# of it clips no gradient.
WEAK = dict(randaugment=[0, 9], erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
RECIPES |= {
    f"{name}_weak": RECIPES[name] | WEAK | dict(grad_clip=0.0)
    for name in ("park_cifar_vit", "park_cifar_resnet")
}
# Xiao et al. §5.4, §6. What the text leaves open is as in the authors' code: Nesterov, 0.5 % of the
# learning rate at the end, how often and how much the average of the weights moves. That code also
# has what is not offered here: a warm-up from a tenth and within the cosine, rates set once an
# epoch, steps of the average counted from each epoch's first, PCA jitter, BatchNorm's statistics
# measured anew for each evaluation; crops of 8-100 %. SGD for ViT: only its appendix has
# the rate and decay. Fine-tuning after 21k likewise.
RECIPES["xiao_vit"] = IMAGENET_PIXELS | dict(
    dataset="imagenet",
    model="vit_c_4gf",
    image_size=224,
    augment="inception",
    autoaugment="imagenet",
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
    epochs=400,
    batch_size=2048,
    micro_batch=32,
    optimizer="adamw",
    lr=1e-3,
    beta1=0.9,
    beta2=0.999,
    warmup_epochs=5,
    lr_schedule="cosine",
    lr_end=5e-6,
    weight_decay=0.24,
    decay="no-norm-bias",
    loss="softmax",
    ema_alpha=1e-5,
    ema_every=32,
)
# §6; the code's file has 7e-4 and 0.24.
RECIPES["xiao_vit_36gf"] = RECIPES["xiao_vit"] | dict(
    model="vit_c_36gf", lr=6e-4, lr_end=3e-6, weight_decay=0.28
)
# §6: CNNs, at the sizes that they are trained at and the short side to which test images are
# resized, both of 2103.06877 (in its code the centre crop is of the training size).
REGNETY_SIDES = {"1gf": (232, 262), "4gf": (240, 272), "16gf": (256, 292), "32gf": (268, 304)}
RECIPES["xiao_resnet"] = RECIPES["xiao_vit"] | dict(
    model="resnet50",
    eval_short_side=256,
    optimizer="sgd",
    momentum=0.9,
    nesterov=True,
    lr=2.54,
    lr_end=0.0127,
    weight_decay=2.4e-5,
)
RECIPES |= {
    f"xiao_regnety_{size}": dict(
        RECIPES["xiao_resnet"], model=f"regnety_{size}", image_size=side, eval_short_side=short_side
    )
    for size, (side, short_side) in REGNETY_SIDES.items()
}
# ImageNet-21k, of the code's files (Table 2's last column, before the fine-tuning).
RECIPES["xiao_vit_21k"] = RECIPES["xiao_vit"] | dict(
    dataset="imagenet21k", model="vit_c_18gf", epochs=90, batch_size=4096, lr=2e-3, lr_end=1e-5
)
RECIPES["xiao_vit_21k_36gf"] = RECIPES["xiao_vit_21k"] | dict(
    model="vit_c_36gf", lr=1.4e-3, lr_end=7e-6
)
# What §5.4 compares with: DeiT (2012.12877, Table 9 and code) on ViT_P; as everywhere here, its
# RandAugment is without noise, its erasing to grey and its crops bilinear.
RECIPES["xiao_deit"] = RECIPES["xiao_vit"] | dict(
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
)
# The recipe for a data set and a model or family of them, if none is named; "" is any family.
RECIPE_FOR = {
    "shapes": {"": "shapes"},
    "imagenet": {
        "vit": "chen_vit",
        "mixer": "chen_mixer",
        "resnet": "chen_resnet",
        **{f"vit_{stem}_{size}": "xiao_vit" for stem in "pc" for size in ("1gf", "4gf", "18gf")},
        "vit_p_36gf": "xiao_vit_36gf",
        "vit_c_36gf": "xiao_vit_36gf",
        **{f"regnety_{size}": f"xiao_regnety_{size}" for size in REGNETY_SIDES},
        **dict.fromkeys(("preresnet", "resnext", "alter", "pit", "swin"), "park_imagenet"),
    },
    "imagenet21k": {
        **{kind: f"chen_{kind}_21k" for kind in ("vit", "mixer", "resnet")},
        **{
            f"vit_{stem}_{size}": "xiao_vit_21k" for stem in "pc" for size in ("1gf", "4gf", "18gf")
        },
        **dict.fromkeys(("vit_p_36gf", "vit_c_36gf"), "xiao_vit_21k_36gf"),
    },
    "cifar10": {
        "vit": "park_cifar_vit",
        "mixer": "park_cifar_mixer",
        **dict.fromkeys(("resnet", "resnext"), "park_cifar_resnet"),
        **dict.fromkeys(("preresnet", "alter", "pit", "swin"), "park_cifar"),
    },
}
RECIPE_FOR["cifar100"] = RECIPE_FOR["cifar10"]

# For --list-recipes: where a recipe's numbers are and, if the paper tells, the top-1 accuracy in
# percent of its default model, then with SAM.
PUBLISHED = {
    "shapes": ("README",),
    "chen_vit": ("Chen Table 8, 2", 74.6, 79.9),
    "chen_mixer": ("Chen Table 8, 2", 66.4, 77.4),
    "chen_resnet": ("Chen Table 8, 2", 76.0, 76.7),
    "chen_vit_strong": ("Chen E.3, Table 4", 79.6, 81.5),
    "chen_mixer_strong": ("Chen E.3, Table 4", 76.5, 78.1),
    "chen_vit_adversarial": ("Chen E.5, Table 5", 72.8, 76.7),
    "chen_mixer_adversarial": ("Chen E.5, Table 5", 62.8, 73.9),
    "chen_resnet_adversarial": ("Chen E.5, Table 5", 70.8, 70.1),
    **{
        f"{name}_{part}": ("Chen E.2, Table 4", *top1)
        for name, column in {
            "chen_resnet": ((74.2, 75.6), (68.0, 70.3), (54.6, 57.1)),
            "chen_vit": ((64.9, 75.4), (52.4, 66.8), (32.8, 46.1)),
            "chen_mixer": ((53.9, 71.0), (37.2, 62.8), (21.0, 43.5)),
            "chen_vit_strong": ((73.1, 75.8), (63.2, 65.6), (38.5, 45.7)),
            "chen_mixer_strong": ((70.4, 73.1), (61.0, 65.8), (43.0, 51.0)),
        }.items()
        for part, top1 in zip(("half", "quarter", "tenth"), column)
    },
    **dict.fromkeys(("chen_vit_long", "chen_mixer_long"), ("Chen App. F",)),
    **dict.fromkeys(
        ("chen_vit_21k", "chen_mixer_21k", "chen_resnet_21k", "chen_21k_to_imagenet"),
        ("Chen §5.1",),
    ),
    "chen_supcon": ("Chen E.4",),
    "chen_supcon_head": ("Chen E.4, §5.3; ViT-S/16 77.0, 78.1", 77.4, 80.0),
    "chen_to_cifar10": ("Chen Table 11, 6", 98.1, 98.6),
    "chen_to_cifar100": ("Chen Table 11, 6", 87.6, 89.1),
    "chen_to_flowers102": ("Chen Table 11, 6", 88.5, 91.8),
    "chen_to_pets": ("Chen Table 11, 6", 91.9, 93.1),
    **dict.fromkeys(
        ("park_cifar", "park_cifar_vit", "park_cifar_mixer", "park_imagenet", "park_imagenet_vit"),
        ("Park A.1",),
    ),
    "park_cifar_resnet": ("Park A.1, App. C", 77.8),
    **dict.fromkeys(("park_cifar_vit_weak", "park_cifar_resnet_weak"), ("Park App. F",)),
    "xiao_vit": ("Xiao §5.4, Table 2", 81.4),
    "xiao_vit_36gf": ("Xiao §6, Table 2", 83.2),
    "xiao_resnet": ("Xiao §6, Table 2", 79.3),
    **{
        f"xiao_regnety_{size}": ("Xiao §6, Table 2", top1)
        for size, top1 in zip(REGNETY_SIDES, (78.5, 82.1, 83.7, 84.1))
    },
    **dict.fromkeys(("xiao_vit_21k", "xiao_vit_21k_36gf"), ("Xiao §6",)),
    "xiao_deit": ("Xiao §5.4",),
}
# Training images and classes as published, of 21k in its release of 2011.
TRAINING_IMAGES = dict(
    shapes=8_000,
    imagenet=1_281_167,
    imagenet21k=14_197_122,
    cifar10=50_000,
    cifar100=50_000,
    flowers102=2_040,
    pets=3_680,
)
CLASSES = dict(
    shapes=12,
    imagenet=1000,
    imagenet21k=21_841,
    cifar10=10,
    cifar100=100,
    flowers102=102,
    pets=37,
    folder=1000,
)

# Chen et al. Table 9: what --sam-rho paper stands for, by the kind of training.
PAPER_RHO = {
    "supervised": {
        "resnet50": 0.02,
        "resnet101": 0.05,
        "resnet152": 0.02,
        "resnet50x2": 0.05,
        "resnet101x2": 0.05,
        "resnet152x2": 0.05,
        "vit_s32": 0.05,
        "vit_s16": 0.1,
        "vit_s14": 0.1,
        "vit_s8": 0.15,
        "vit_b32": 0.15,
        "vit_b16": 0.2,
        "mixer_s32": 0.1,
        "mixer_s16": 0.15,
        "mixer_s8": 0.2,
        "mixer_b32": 0.35,
        "mixer_b16": 0.6,
        "mixer_b8": 0.6,
    },
    "strong augmentation": {"vit_b16": 0.05, "mixer_b16": 0.2},  # E.3: mixup and RandAugment
    "adversarial": {
        "resnet50": 0.05,
        "resnet101": 0.05,
        "resnet152": 0.05,
        "vit_s16": 0.1,
        "vit_b32": 0.1,
        "vit_b16": 0.1,
        "mixer_s16": 0.05,
        "mixer_b32": 0.25,
        "mixer_b16": 0.25,
    },
    "supervised contrastive": {"vit_s16": 0.02, "vit_b16": 0.02},
}

DEFAULT_MODEL = dict.fromkeys(data.DATASETS, "vit_s16") | {
    "shapes": "vit_micro8",
    "cifar10": "vit_ti2",
    "cifar100": "vit_ti2",
}
# Arguments of the networks' constructors; without, a variant's own.
MODEL_FLAGS = (
    "patch_size stride dim depth heads head_dim mlp_dim token_mlp_dim pool stem kernel_size "
    "qkv_bias gelu width groups width_per_group pre_activation blur msa_blocks window_size "
    "dropout drop_path head_bias unit_norm init zero_init"
).split()
AUGMENTS = "augment autoaugment randaugment randaugment_prob randaugment_of erasing flip".split()
# Data sets held in memory as a whole: no files are decoded in training.
IN_MEMORY = ("shapes", "cifar10", "cifar100")
# Where a run computes and what becomes of it: may differ when it is resumed, all else may not.
FREE_FLAGS = set(
    (
        "data_dir download workers device compile channels_last out_dir resume dry_run expect "
        "list_models list_recipes eval_only eval_split max_steps save_every keep_epochs"
    ).split()
)
# What --eval-only reads, with MODEL_FLAGS.
OF_EVALUATION = {
    *MODEL_FLAGS,
    *(
        "dataset data_dir download model image_size init_from weights mean std eval_only "
        "eval_split eval_short_side eval_adv adv_eps dtype device channels_last workers seed "
        "dry_run"
    ).split(),
}
# So many steps in a row without a finite gradient: the run has diverged and stops. A few the loss
# scaler of float16 skips at its start, by design.
MOST_SKIPPED = 25
OPTIMIZERS = ("adamw", "sgd", "lamb", "rmsprop")


class UserError(Exception):
    """What only the user can set right; its text is one line."""


class LoneError(UserError):
    """One that a process may meet alone, as want of memory on its device: it tells, whatever its
    rank, and ends without waiting for the others."""


class WriteError(Exception):
    """A file of a run that could not be written, by the one process that writes; its text is one
    line."""


@contextmanager
def as_user_error(what):
    """What a function of this repository has against the value of a flag, as a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # one process may meet it alone: answer tells it, whatever the rank
    except (
        *(ValueError, TypeError, RuntimeError, ZeroDivisionError, re.error),
        AssertionError,  # torchvision's word for arguments that do not fit
    ) as error:
        raise UserError(f"{what}: {error}") from None


# ----------------------------------------------------------------------------------------- settings


class Parser(argparse.ArgumentParser):
    also = ()  # flags that are read elsewhere

    def error(self, message):
        """One line instead of the list of all flags; to an unknown flag, the nearest known ones."""
        wrong = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized") and wrong:
            known = {*self._option_string_actions, *self.also}
            near = difflib.get_close_matches(wrong[0].replace("_", "-"), known, 2, 0.7)
            message = f"unknown flag {wrong[0]}" + (
                f"; did you mean {' or '.join(near)}?" if near else "; see --help"
            )
        elif message.startswith("unrecognized"):
            message += ": neither a flag nor a value that one takes; see --help"
        raise UserError(message)


def make_parser():
    parser = Parser(
        allow_abbrev=False,
        description=__doc__.split("\n\n")[0],
        epilog=(
            "Without --model, --recipe, --dataset and --data-dir the built-in data set is "
            "trained. A rate of dropout or augmentation, a norm or a ρ of 0 means off, and so does "
            "--save-every 0."
        ),
    )
    on_off = argparse.BooleanOptionalAction
    off = dict(action=on_off, default=False)

    add = parser.add_argument_group("what is trained").add_argument
    add(
        "--recipe",
        choices=RECIPES,
        help="row of a paper's table, see --list-recipes; default: what fits model and data set",
    )
    add("--model", help="a name that --list-models prints, or torchvision:NAME, timm:NAME")
    add(
        "--init-from",
        default="",
        metavar="FILE",
        help="start from: a checkpoint of ours, a timm or torchvision state dict, an original .npz",
    )
    add(
        "--reset-head",
        **off,
        help="the classifier stays as initialised, not from the file: for other numbers of classes",
    )
    add(
        "--weights",
        choices=("ema", "model"),
        default="ema",
        help="of a checkpoint that has both: the average or the last",
    )

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=data.DATASETS, help="folder: any with train/, val/ of class folders")
    add(
        "--data-dir",
        default="",
        help=(
            "a folder, or a file of python data.py pack; default: $IMAGENET_DIR, else "
            "data/imagenet; data/imagenet21k; for CIFAR, Flowers and Pets data"
        ),
    )
    add("--download", **off, help="fetch CIFAR, Flowers or Pets if it is missing")
    add("--image-size", type=int, default=0, help="0: 32 for shapes and CIFAR, else 224 (Table 8)")
    add(
        "--augment",
        choices=data.AUGMENTATIONS,
        help="default: inception for folders (Table 8), crop for CIFAR, none for shapes",
    )
    add(
        "--flip",
        action=on_off,
        default=True,
        help="half the images, with inception and crop (Park App. F has crops alone)",
    )
    add(
        "--eval-short-side",
        type=int,
        default=0,
        help=(
            "images of files, to be evaluated: their short side before the centre crop; 0: "
            "256/224 of --image-size (Xiao's code: RegNetY 262 …)"
        ),
    )
    add("--train-fraction", default="1", help="class-balanced part, as 1/10 or 0.1 (§5.1)")
    add(
        "--hold-out",
        default="0",
        metavar="FRACTION",
        help=(
            "class-balanced part of the training set, as 1/10, that is not trained on and takes "
            "the validation set's place (Chen E.6)"
        ),
    )
    add(
        "--repeated-augment",
        type=int,
        default=1,
        help=(
            "times that an image comes in a batch, augmented anew; an epoch is as long, of fewer "
            "images (DeiT: 3; Xiao §5.4)"
        ),
    )
    add(
        "--autoaugment",
        choices=data.AUTOAUGMENTS,
        default="none",
        help=(
            "torchvision's policy of that name, after it (Xiao §5.4: imagenet; theirs has a few "
            "other entries)"
        ),
    )
    add(
        "--randaugment",
        type=int,
        nargs=2,
        default=[0, 9],
        metavar=("OPS", "MAGNITUDE"),
        help="RandAugment after these (Chen E.3: 2 15 of google; Park: 2 9 of torchvision)",
    )
    add(
        "--randaugment-of",
        choices=("torchvision", "google"),
        default="torchvision",
        help=(
            "whose operations: magnitudes 0 to 10; or those of Chen et al.'s group, which go on "
            "beyond 10"
        ),
    )
    add("--randaugment-prob", type=float, default=1.0, help="of each operation (Park: 0.5)")
    add("--erasing", type=float, default=0.0, help="probability of random erasing (Park: 0.25)")
    add(
        "--mixup",
        type=float,
        default=0.0,
        help=(
            "α of Beta(α, α); one λ for a micro-batch, each image with the one before it (Chen "
            "E.3: 0.5; Park: 1; Xiao §5.4: 0.8)"
        ),
    )
    add(
        "--cutmix",
        type=float,
        default=0.0,
        help=(
            "α likewise (Park: 0.8; Xiao: 1); with mixup, each micro-batch takes one of the two, "
            "at even odds"
        ),
    )
    add("--mean", type=float, nargs="+", default=[0.5], help="of pixels in [0, 1]: 1 number or 3")
    add("--std", type=float, nargs="+", default=[0.5], help="likewise")

    add = parser.add_argument_group("network (default: as the model's name says)").add_argument
    add("--patch-size", type=int, help="side of a patch in pixels")
    add("--stride", type=int, help="PiT: pixels from patch to patch (1 up to 64 pixels, else 8)")
    add("--dim", type=int, help="width of the residual stream")
    add("--depth", type=int, nargs="+", help="blocks; ResNet, AlterNet, PiT, Swin: of each stage")
    add("--heads", type=int, nargs="+", help="attention heads; AlterNet, PiT, Swin: of each stage")
    add("--head-dim", type=int, help="channels of a head")
    add("--mlp-dim", type=int, help="hidden width of the MLP, in Mixer of the channel MLP")
    add("--token-mlp-dim", type=int, help="Mixer: hidden width of the token MLP")
    add("--pool", choices=("cls", "gap"), help="ViT: class token or global average pooling")
    add(
        "--stem",
        choices=("patchify", "conv", "imagenet", "cifar"),
        help=(
            "ViT: patches or convolutions (Xiao §3); ResNet, AlterNet: 7×7 and pooling or 3×3 "
            "(cifar up to 64 pixels)"
        ),
    )
    add("--kernel-size", type=int, help="ViT: k, self-attention within k×k tokens (Park Fig. 7)")
    add("--qkv-bias", action=on_off, help="biases of queries, keys and values")
    add("--gelu", choices=("exact", "tanh"), help="form of the GELU")
    add("--width", type=int, help="ResNet, AlterNet: channels of the stem, which set all others")
    add("--groups", type=int, help="of the 3×3 convolutions (ResNeXt 32x4d: 32)")
    add("--width-per-group", type=int, help="of these, at 64 channels (ResNeXt 32x4d: 4)")
    add("--pre-activation", action=on_off, help="norm and ReLU before each convolution")
    add("--blur", action=on_off, help="ResNet: 2×2 box blur at the ends of stages (Park Fig. 3a)")
    add(
        "--msa-blocks",
        type=int,
        nargs=4,
        metavar="M",
        help="AlterNet: attention blocks of each stage (Park Fig. 11, 12a, D.5)",
    )
    add("--window-size", type=int, help="AlterNet, Swin: side of an attention window in pixels")
    add("--dropout", type=float, help="rate (Table 8: 0.1)")
    add("--drop-path", type=float, help="stochastic depth, rate of the last block (E.3: 0.1)")
    add("--head-bias", type=float, help="initial bias of the classifier, for the sigmoid loss")
    add(
        "--unit-norm",
        action=on_off,
        help="ViT: the head sees the representation divided by its length, as SupCon's (Chen E.4)",
    )
    add(
        "--init",
        choices=("google", "pycls", "timm", "torchvision", "torch"),
        help="whose initial weights; ViT: first three, Mixer: google, timm, ResNet: last two",
    )
    add("--zero-init", action=on_off, help="ResNet: last scale of each branch starts at 0")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=int, default=100, help="the schedule's length (Table 8: 300)")
    add(
        "--max-steps",
        type=int,
        default=0,
        help="stop after so many steps; with --epochs 0 also the schedule's length (Table 11)",
    )
    add("--batch-size", type=int, default=256, help="images per step, all devices (Table 8: 4096)")
    add("--micro-batch", type=int, default=32, help="images per pass, the m of SAM (App. E: 32)")
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="(Table 8; Chen E.4: lamb, then rmsprop)",
    )
    add("--lr", type=float, default=1e-3, help="peak, for the whole batch (Table 8: 3e-3)")
    add(
        "--lr-schedule",
        choices=("cosine", "linear", "constant", "exponential"),
        default="cosine",
        help="(Table 8; Chen E.4, head: exponential)",
    )
    add("--warmup-steps", type=int, default=0, help="linear from 0 (Table 8: 10000)")
    add("--warmup-epochs", type=float, default=0.0, help="as many more epochs of it (Park A.1: 5)")
    add("--lr-end", type=float, default=0.0, help="learning rate at the end of the decay")
    add("--momentum", type=float, default=0.9, help="of SGD (Table 8) and RMSProp")
    add("--nesterov", **off, help="for SGD")
    add("--beta1", type=float, default=0.9, help="of AdamW (Table 8) and LAMB")
    add(
        "--beta2",
        type=float,
        default=0.999,
        help="of AdamW (Table 8, misprinted there) and LAMB; RMSProp's α (SupCon's code: 0.9)",
    )
    add(
        "--eps",
        type=float,
        default=1e-8,
        help=(
            "beside the root of AdamW's, LAMB's and RMSProp's second moment (LAMB's code: 1e-6; "
            "SupCon's, for RMSProp, 0.001 within it, as 0.0316 beside it)"
        ),
    )
    add(
        "--weight-decay",
        type=float,
        default=0.1,
        help="AdamW, LAMB: decoupled, times the learning rate (Table 8: 0.3); SGD, RMSProp: L2",
    )
    add(
        "--decay",
        choices=("kernels", "no-norm-bias", "all"),
        default="kernels",
        help=(
            "what decays: matrices and convolutions; also class token and positions (Xiao §5.4); "
            "everything"
        ),
    )
    add("--grad-clip", type=float, default=0.0, help="norm of the final gradient (Table 8: 1)")
    add(
        "--loss",
        choices=("softmax", "sigmoid", "supcon"),
        default="softmax",
        help=(
            "(B.1: sigmoid). supcon: each image in two views, the representations of a class "
            "together, the classifier untrained; the whole batch's loss in a micro-batch's "
            "memory, for one more forward pass (Chen E.4)"
        ),
    )
    add("--temperature", type=float, default=0.1, help="of supcon (Chen E.4)")
    add(
        "--projection-dim",
        type=int,
        default=128,
        help="outputs of supcon's projection head, as wide as the representation (Khosla §3.1)",
    )
    add(
        "--train-only",
        choices=("all", "head"),
        default="all",
        help=(
            "head: the classifier; the rest stays as in --init-from, in evaluation mode (Chen "
            "E.4, second stage)"
        ),
    )
    add("--label-smoothing", type=float, default=0.0, help="share of the uniform distribution")
    add(
        "--ema-decay",
        type=float,
        default=0.0,
        help=(
            "of an average of the weights, at each of its moves: min(decay, (1+t)/(10+t)) at step t"
        ),
    )
    add("--ema-every", type=int, default=1, help="steps between its moves (Xiao's code: 32)")
    add(
        "--ema-alpha",
        type=float,
        default=0.0,
        help=(
            "α: if --ema-decay is not given it is 1 - α · --batch-size / --epochs · --ema-every, "
            "without that minimum, and 0 in the warm-up (Xiao's code: 1e-5)"
        ),
    )
    add("--seed", type=int, default=0, help="of weights, order, augmentation and masks")

    add = parser.add_argument_group("sharpness-aware minimisation").add_argument
    add("--sam-rho", default="0", help="radius ρ, or paper: Table 9's for the model")
    add("--sam-steps", type=int, default=1, help="ascent steps (§6)")
    add("--sam-adaptive", **off, help="ASAM, element-wise")
    add("--sam-sync", **off, help="ε from the whole batch's gradient instead of each micro-batch's")
    add(
        "--sam-every",
        type=int,
        default=1,
        metavar="K",
        help="SAM in every K-th step only, for 1 + 1/K of plain training's time",
    )
    add(
        "--sam-reuse",
        type=float,
        default=0.7,
        metavar="ALPHA",
        help=(
            "with --sam-every: in the steps without SAM, add to the gradient the part of SAM's "
            "last gradient orthogonal to the plain one, at most ALPHA times the gradient's "
            "length, which is for large batches; 0: off (LookSAM, Liu et al. 2022: 0.7)"
        ),
    )
    add(
        "--sam-scope",
        default="",
        metavar="REGEX",
        help="move only parameters whose names it "
        r"matches, as norm or ^blocks\.0\.; what the first pass does not need for these it skips",
    )

    add = parser.add_argument_group("adversarial training").add_argument
    add(
        "--adv-eps",
        type=adversarial.fraction,
        default=0.0,
        help=(
            "fast adversarial training: one FGSM step from a random start, of at most this in "
            "each pixel of [0, 1] (Chen E.5: 2/255)"
        ),
    )
    add(
        "--adv-step-size",
        type=adversarial.fraction,
        default=0.0,
        help="of that step; 0: 1.25 times --adv-eps (Wong et al. 2020, which E.5 uses)",
    )
    add(
        "--eval-adv",
        **off,
        help=(
            "evaluations also measure accuracy under PGD with 10 steps of 1/8 of --adv-eps, or of "
            "2/255 without it (E.5)"
        ),
    )

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("cuda", "mps", "cpu"), help="default: the first that is there")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32", "float64"),
        help="default: bfloat16 (autocast) on CUDA, float32 elsewhere; float16 uses a loss scaler",
    )
    add("--compile", action=on_off, help="torch.compile; default: on CUDA")
    add(
        "--channels-last",
        action=on_off,
        help=(
            "convolutions' weights, and so the maps between, with channels innermost in memory, "
            "which is faster; default: yes, but on the CPU for our ViT, Mixer, PiT, for Swin and "
            "for ResNets of width below 16, and on MPS"
        ),
    )
    add(
        "--workers",
        type=int,
        help=(
            "data processes per device; default: up to 8, none where images are in memory and are "
            "not augmented one by one"
        ),
    )

    add = parser.add_argument_group("run").add_argument
    add(
        "--out-dir",
        default="",
        help="run folder; default: out/DATASET-MODEL[-advEPS][-supcon][-head]-rhoRHO-seedSEED",
    )
    add("--resume", **off, help="go on from its ckpt.pt, if there is one")
    add("--eval-every", type=int, default=1, help="epochs between evaluations")
    add("--eval-only", **off, help="evaluate --init-from and stop")
    add(
        "--eval-split",
        choices=("val", "test"),
        default="val",
        help="for --eval-only; shapes and CIFAR have a test split, which for CIFAR is also val",
    )
    add("--log-every", type=int, default=50, help="steps between records of log.jsonl")
    add("--save-every", type=int, default=0, help="steps between checkpoints, besides each epoch's")
    add(
        "--keep-epochs",
        nargs="+",
        default=[],
        metavar="EPOCH",
        help=(
            "keep the weights at the end of these epochs, as epoch100.pt, and for warmup at the "
            "end of the warm-up, as warmup.pt (Park Fig. 1b: warmup 105 205 305, the 5 being the "
            "warm-up's)"
        ),
    )
    add("--dry-run", **off, help="print what would happen and stop")
    add(
        "--expect",
        type=float,
        nargs=2,
        default=[0, 0],
        metavar=("DEVICES", "TFLOPS"),
        help=(
            "with --dry-run or --list-recipes: hours on so many devices that sustain so many "
            "TFLOP/s each, as analyze.py throughput measures them"
        ),
    )
    add(
        "--list-models",
        **off,
        help="print them with parameters, FLOPs and the paper's table or figure, and stop",
    )
    add(
        "--list-recipes",
        **off,
        help="print them with steps, table, accuracy and, with --expect, hours, and stop",
    )
    return parser


def first_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def image_size_of(args):
    return args.image_size or (32 if args.dataset in IN_MEMORY else 224)


def kind_of_training(args):
    """Which rows of PAPER_RHO it has."""
    if args.adv_eps:
        return "adversarial"
    if args.mixup and args.randaugment[0]:
        return "strong augmentation"
    contrastive = args.loss == "supcon" or args.unit_norm  # its second stage
    return "supervised contrastive" if contrastive else "supervised"


def resolve_rho(args):
    kind = kind_of_training(args)
    try:
        return PAPER_RHO[kind][args.model] if args.sam_rho == "paper" else float(args.sam_rho)
    except KeyError:
        raise UserError(
            f"--sam-rho paper: Table 9 has no row for {args.model} and {kind} training; it has "
            f"{' '.join(PAPER_RHO[kind])}. Give a number, such as 0.1"
        ) from None
    except ValueError:
        raise UserError(
            f"--sam-rho {args.sam_rho}: give a number, at least 0, or the word paper"
        ) from None


def flag(name):
    return "--" + name.replace("_", "-")


def as_flag(name, args):
    """A setting as the words of a command line."""
    value = getattr(args, name)
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    if name in ("adv_eps", "adv_step_size"):
        pixels = f"{255 * value:.6g}"
        return [flag(name), f"{pixels}/255" if float(pixels) / 255 == value else str(value)]
    return [flag(name), *(str(v) for v in (value if isinstance(value, list) else [value]))]


def augments(args):
    """Whether a training image is not the same each time."""
    return {args.augment, args.autoaugment, args.randaugment[0], args.erasing} != {"none", 0}


def family(name):
    """The kind of a model of this name: a key of FILES, regnety, swin, torchvision, timm."""
    source, _, inner = name.partition(":")
    if inner:
        return "swin" if source == "torchvision" and inner in SWIN else source
    return re.match("[a-z]*", name)[0]


def check(args, origin):
    """What cannot be right stops here, in one line."""

    def refuse(wrong, what):
        if wrong:
            raise UserError(what)

    at_least_0 = (
        "epochs max_steps warmup_steps save_every sam_rho lr lr_end weight_decay grad_clip mixup "
        "cutmix warmup_epochs seed ema_alpha eval_short_side workers sam_reuse"
    ).split()
    at_least_1 = (
        "batch_size micro_batch eval_every log_every sam_steps sam_every image_size ema_every "
        "repeated_augment projection_dim"
    ).split()
    at_least = dict.fromkeys(at_least_0, 0) | dict.fromkeys(at_least_1, 1)
    for name, low in at_least.items():
        value = getattr(args, name)
        refuse(
            value is not None and not low <= value < 2**63,
            f"{flag(name)} is {value}; it must be at least {low}"
            + " and below 2^63" * ((value or 0) > low),
        )
    for epoch in args.keep_epochs:
        refuse(
            epoch != "warmup" and not (epoch.isdecimal() and 0 < int(epoch) <= args.epochs),
            f"--keep-epochs {epoch}: it takes warmup and epochs from 1 to --epochs, {args.epochs}",
        )
    shares = "label_smoothing ema_decay momentum beta1 beta2 dropout drop_path".split()
    for name in shares:
        value = getattr(args, name)
        refuse(
            value is not None and not 0 <= value < 1,
            f"{flag(name)} is {value}; it must be at least 0 and below 1",
        )
    refuse(
        not 0 < args.eps < math.inf,
        f"--eps is {args.eps}; it must be above 0, or an update of 0/0 makes weights NaN",
    )
    for name in ("randaugment_prob", "erasing"):
        value = getattr(args, name)
        refuse(
            not 0 <= value <= 1,
            f"{flag(name)} is {value}; a probability is at least 0 and at most 1",
        )
    for name in ("adv_eps", "adv_step_size"):
        value = getattr(args, name)
        refuse(
            not 0 <= value <= 1,
            f"{flag(name)} is {value:g}; pixels are in [0, 1], so it is from 0 to 1, such as 2/255",
        )
    refuse(
        args.adv_step_size and not args.adv_eps,
        "--adv-step-size is for --adv-eps above 0, such as 2/255",
    )
    (operations, magnitude), google = args.randaugment, args.randaugment_of == "google"
    most = 30 if google else 10
    refuse(
        operations < 0 or not 0 <= magnitude <= most,
        f"--randaugment {operations} {magnitude}: the number of operations is at least 0, their "
        f"magnitude from 0 to {most}" + "; --randaugment-of google goes on to 30" * (not google),
    )
    refuse(
        any(args.expect) and not (args.dry_run or args.list_recipes),
        "--expect is for --dry-run and --list-recipes",
    )
    refuse(
        any(args.expect) and not all(0 < value < math.inf for value in args.expect),
        f"{' '.join(as_flag('expect', args))}: devices and TFLOP/s of each, both above 0",
    )
    refuse(
        any(args.expect) and args.dataset == "folder" and not args.list_recipes,
        f"--expect knows the sizes of {' '.join(TRAINING_IMAGES)}, not of a folder",
    )
    refuse(
        args.init_from and (origin["mean"] == "command line") != (origin["std"] == "command line"),
        "--mean and --std go together: with --init-from give both or neither",
    )
    refuse(
        {len(args.mean), len(args.std)} - {1, 3}
        or min(args.std) <= 0
        or not all(map(math.isfinite, args.mean + args.std)),
        f"--mean {args.mean} --std {args.std}: give one number or three to each, for std above 0",
    )
    refuse(
        args.eval_short_side
        and (args.eval_short_side < args.image_size or args.dataset in IN_MEMORY),
        f"--eval-short-side {args.eval_short_side}: at least --image-size, {args.image_size}, and "
        f"for images in files, not {' '.join(IN_MEMORY)}; 0 turns it off",
    )
    kind = family(args.model)
    stages = dict(resnet=4, preresnet=4, resnext=4, alter=4, swin=4, pit=3).get(kind, 1)
    for name in ("depth", "heads") if kind in (*FILES, "swin") else ():
        value = getattr(args, name)
        refuse(
            value is not None and len(value) != stages,
            f"{' '.join(as_flag(name, args))}: {args.model} takes "
            + (f"{stages} numbers, one for each stage" if stages > 1 else "one number"),
        )
    for name in ("depth", "heads"):
        refuse(
            any(n < 1 for n in getattr(args, name) or ()),
            f"{' '.join(as_flag(name, args))}: numbers are at least 1",
        )
    refuse(not math.isfinite(args.head_bias or 0), f"--head-bias is {args.head_bias}; it is finite")
    refuse(
        args.reset_head and (args.eval_only or not args.init_from),
        "--reset-head is for training from the weights of --init-from"
        + f"; {args.recipe} fine-tunes: name them" * (origin["reset_head"] == args.recipe),
    )
    refuse(
        args.eval_only and not args.init_from,
        "--eval-only needs --init-from: the weights, for instance RUN/best.pt",
    )
    refuse(
        args.dataset == "shapes" and origin["data_dir"] == "command line",
        "--data-dir: shapes are drawn, not read: leave it out, or name its --dataset, as folder",
    )
    refuse(
        args.eval_split == "test" and args.dataset in ("imagenet", "imagenet21k", "folder"),
        f"--eval-split test: {args.dataset} has no test split; its val/ is --eval-split val",
    )
    refuse(
        args.epochs == args.max_steps == 0 and not args.eval_only,
        "--epochs 0 needs --max-steps: the length of the run in steps",
    )
    refuse(
        args.ema_alpha and args.epochs == 0,
        "--ema-alpha depends on --epochs, which is 0: give --ema-decay, or --ema-alpha 0",
    )
    refuse(
        args.lr_schedule == "exponential" and not 0 < args.lr_end <= args.lr,
        f"--lr-schedule exponential goes from --lr, {args.lr:g}, to --lr-end, {args.lr_end:g}, "
        "which must be above 0 and at most --lr",
    )
    refuse(
        args.nesterov and (args.optimizer != "sgd" or args.momentum == 0),
        "--nesterov is for --optimizer sgd with --momentum above 0; --no-nesterov turns it off",
    )
    refuse(
        (args.mixup or args.cutmix) and args.micro_batch == 1,
        "--mixup and --cutmix mix the images of a micro-batch: --micro-batch 2 or more, or 0 for "
        "these",
    )
    supcon = args.loss == "supcon"
    refuse(
        args.train_only == "head" and (supcon or not args.init_from) and not args.eval_only,
        "--train-only head trains the classifier on the representation of --init-from, for "
        "instance RUN/ckpt.pt, with --loss softmax or sigmoid",
    )
    if supcon and not args.eval_only:
        for name in ("mixup", "cutmix", "label_smoothing", "adv_eps"):
            refuse(
                getattr(args, name),
                f"--loss supcon has no {flag(name)}: it compares whole images of known classes; "
                "set it to 0",
            )
        refuse(
            not 0 < args.temperature < math.inf,
            f"--temperature is {args.temperature}; it must be above 0 (Chen E.4: 0.1)",
        )
        refuse(
            not augments(args),
            "--loss supcon takes two views of each image, which without augmentation are the "
            "same: add --augment crop or another",
        )
        refuse(
            args.sam_rho and not args.sam_sync,
            "--loss supcon has one loss for the whole batch, and so one ε: leave out --no-sam-sync",
        )
    for name, default in (
        ("sam_every", 1),
        ("sam_scope", ""),
        ("sam_steps", 1),
        ("sam_adaptive", False),
        ("sam_sync", False),
    ):
        refuse(
            not args.sam_rho and getattr(args, name) != default,
            f"{flag(name)} is a way of SAM: add --sam-rho",
        )
    refuse(
        args.sam_every > 1 and args.sam_reuse and args.adv_eps,
        "--sam-every reuses what SAM adds to the gradient at w, which with --adv-eps is not that "
        "of the images trained on: add --sam-reuse 0",
    )
    refuse(
        args.sam_every == 1 and origin["sam_reuse"] == "command line",
        "--sam-reuse is for the steps between SAM's: add --sam-every above 1",
    )
    refuse(
        args.device == "cuda" and not torch.cuda.is_available(),
        "--device cuda: torch sees no CUDA device here; try --device cpu",
    )
    refuse(
        args.device == "mps" and not torch.backends.mps.is_available(),
        "--device mps: torch sees no MPS device here; try --device cpu",
    )
    refuse(
        args.device == "mps" and (args.dtype in ("float16", "float64") or "RANK" in os.environ),
        "--device mps is for one process and for --dtype float32 or bfloat16",
    )


def read_checkpoint(path):
    """A file of torch.save as plain data: weights_only, nothing in it is run; and its checksums,
    which torch.load passes over, are right. Else UserError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path):  # all but those of torch before 1.6
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:
                    raise zipfile.BadZipFile
    except MemoryError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # unpickling foreign bytes can raise anything
        raise UserError(
            f"{path} is no checkpoint of plain tensors, or is damaged ({type(error).__name__})"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint or state dict")
    return state


def is_ours(state):
    """Whether a loaded file is a checkpoint of a run of this file."""
    settings = state.get("settings")
    return (
        isinstance(settings, dict)
        and isinstance(settings.get("model"), str)
        and {"dataset", "mean", "std"} <= settings.keys()
        and {"ema", "step"} <= state.keys()
        and isinstance(state.get("model"), dict)
        and isinstance(state.get("classes"), list)
    )


def own_checkpoint(path):
    """Settings, classes and step of a checkpoint of a run of this file, which is read once as long
    as it stays the same; {} if the file holds other weights."""
    if path.endswith(".npz"):
        return {}
    version = None
    with suppress(OSError):  # read_checkpoint tells it
        file = os.stat(path)
        version = file.st_ino, file.st_size, file.st_mtime_ns
    return _own_checkpoint(path, version)


@cache
def _own_checkpoint(path, version):
    checkpoint = read_checkpoint(path)
    names = ("settings", "classes", "step") if is_ours(checkpoint) else ()
    return {name: checkpoint[name] for name in names}


def settings(argv=None, also=()):
    """Command line -> (settings, {flag: who set it}). Flags override the recipe, the recipe the
    defaults; to evaluate a checkpoint of ours, its run's settings take the recipe's place. also:
    flags of the caller's own, among which an unknown one may have been meant."""
    parser = make_parser()
    parser.also = also
    args, unset = vars(parser.parse_args([])), object()
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(args, unset)))
    given = {name: value for name, value in vars(given).items() if value is not unset}

    name, file = given.get("recipe"), given.get("init_from", "")
    saved = own_checkpoint(file) if given.get("eval_only") and file else {}
    if saved:
        not_saved = FREE_FLAGS - {"data_dir"}
        not_saved |= {"init_from", "weights", "reset_head", "dtype", "recipe"}
        inherited = args.keys() - not_saved
        name, base = file, {k: v for k, v in saved["settings"].items() if k in inherited}
        if given.get("dataset", base["dataset"]) != base["dataset"]:
            base.pop("data_dir", None)  # another data set lies elsewhere
    elif name is not None:
        base = RECIPES[name]
    else:
        built_in = not {"model", "dataset", "data_dir"} & given.keys()
        dataset = given.get("dataset", "shapes" if built_in else "imagenet")
        model = given.get("model", DEFAULT_MODEL[dataset])
        fits = RECIPE_FOR.get(dataset, {})
        name = fits.get(model) or fits.get(family(model), fits.get(""))
        base = {**RECIPES.get(name, {}), "dataset": dataset, "model": model}
    if base.keys() - args.keys():
        raise UserError(f"{name} sets {' '.join(sorted(base.keys() - args.keys()))}: no such flag")
    origin = {
        **dict.fromkeys(args, "default"),
        **dict.fromkeys(base, name or "data set"),
        **dict.fromkeys(given, "command line"),
    }
    args = argparse.Namespace(**{**args, **base, **given})
    args.recipe = name or "none"

    if args.zero_init and "zero_init" not in given and FILES.get(family(args.model)) is not resnet:
        args.zero_init, origin["zero_init"] = None, "default"  # others have no such argument
    args.image_size = image_size_of(args)
    args.augment = args.augment or (
        "none" if args.dataset == "shapes" else "crop" if args.dataset in IN_MEMORY else "inception"
    )
    imagenet = os.environ.get("IMAGENET_DIR") or "data/imagenet"
    args.data_dir = args.data_dir or {
        "imagenet": imagenet,
        "folder": imagenet,
        "imagenet21k": "data/imagenet21k",
    }.get(args.dataset, "data")
    if args.eval_only:  # of a recipe what is for training does not count
        args.reset_head &= origin["reset_head"] == "command line"
        if args.sam_rho == "paper" and origin["sam_rho"] != "command line":
            args.sam_rho = 0
    args.sam_rho = resolve_rho(args)
    with suppress(ValueError):
        args.hold_out = args.hold_out if float(args.hold_out) else "0"
    if args.ema_alpha and "ema_decay" in given:
        args.ema_alpha, origin["ema_alpha"] = 0.0, "--ema-decay"
    elif args.ema_alpha and args.epochs > 0:
        step = args.ema_alpha * args.batch_size / args.epochs * args.ema_every
        args.ema_decay, origin["ema_decay"] = 1 - min(step, 1.0), "--ema-alpha"
    args.device = args.device or first_device()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    if args.channels_last is None:  # networks of patches gain less: on the CPU 2 to 5 %, left alone
        convolutional = family(args.model) not in ("vit", "mixer", "pit", "swin")
        args.channels_last = args.device == "cuda" or convolutional and args.device == "cpu"
    adv = f"-adv{255 * args.adv_eps:.3g}" if args.adv_eps else ""  # in 1/255
    stage = "-supcon" * (args.loss == "supcon") + "-head" * (args.train_only == "head")
    args.out_dir = args.out_dir or "out/{}-{}{}{}-rho{:g}-seed{}".format(
        args.dataset, args.model.replace(":", "_"), adv, stage, args.sam_rho, args.seed
    )
    # A core's own ε (App. E) would need a loss of its own; this one is the whole batch's.
    if args.loss == "supcon" and args.sam_rho and "sam_sync" not in given:
        args.sam_sync, origin["sam_sync"] = True, "--loss supcon"
    check(args, origin)
    return args, origin


# ------------------------------------------------------------------------------------------- models

# Xiao Table 2: blocks and channels of the four stages and channels of a group (Dollár et al. 2021,
# 2103.06877). torchvision's regnet_y_16gf and its like are other networks, of 2003.13678.
REGNETY = {
    "1gf": ((1, 4, 10, 3), (40, 120, 328, 904), 4),
    "4gf": ((2, 6, 16, 2), (96, 192, 512, 1216), 32),
    "16gf": ((2, 7, 18, 2), (168, 336, 896, 2128), 56),
    "32gf": ((2, 7, 20, 2), (216, 432, 1152, 2808), 72),
}
SWIN = {  # what torchvision's functions of these names pass to its class
    "swin_t": dict(dim=96, depth=[2, 2, 6, 2], heads=[3, 6, 12, 24], drop_path=0.2),
    "swin_s": dict(dim=96, depth=[2, 2, 18, 2], heads=[3, 6, 12, 24], drop_path=0.3),
    "swin_b": dict(dim=128, depth=[2, 2, 18, 2], heads=[4, 8, 16, 32], drop_path=0.5),
}
TORCHVISIONS_NAMES = dict(
    dim="embed_dim", depth="depths", heads="num_heads", drop_path="stochastic_depth_prob"
)
PUBLISHED_BY_TORCHVISION = ("resnet", "resnext", "swin", "torchvision")
FILES = {
    "vit": vit,
    "pit": vit,
    "mixer": mixer,
    "resnet": resnet,
    "preresnet": resnet,
    "resnext": resnet,
    "alter": alternet,
}


class ResNetWithUnits(torchvision.models.ResNet):
    """torchvision's, with the out and skip of resnet.ResNet."""

    stages, intermediates, blur = resnet.ResNet.stages, resnet.ResNet.intermediates, False

    def forward(self, x, out=None, skip=None):
        if out is None and skip is None:
            return super().forward(x)
        vit.check_names(self.intermediates, out, skip)
        x = vit.record(out, "stem", self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        for name in list(self.intermediates)[1:-1]:  # the blocks
            block, without = self.get_submodule(name), {}
            if skip == name:  # the identity as a kernel
                identity = nn.init.dirac_(torch.empty_like(block.conv2.weight), block.conv2.groups)
                without = {"conv2.weight": identity}
            x = vit.record(out, name, torch.func.functional_call(block, without, (x,)))
        return self.fc(vit.record(out, "pre_logits", self.avgpool(x).flatten(1)))


class SwinWithUnits(torchvision.models.SwinTransformer):
    """torchvision's, with the out and skip of vit.ViT: the maps (B, H, W, C) after "stem", after
    "features.{i}.{j}.attn" and ".mlp" and, merged, after "features.{i}"; "pre_logits" (B, C)."""

    @property
    def intermediates(self):
        names = {}
        for i, stage in enumerate(self.features):  # embedding, blocks, merging, blocks, …
            if i % 2 == 0:
                names |= {f"features.{i}": ("pooling", i // 2 + 1)} if i else {"stem": ("stem", 0)}
                continue
            names |= {
                f"features.{i}.{j}.{unit}": (kind, i // 2 + 1)
                for j in range(len(stage))
                for unit, kind in (("attn", "attention"), ("mlp", "mlp"))
            }
        return names | {"pre_logits": ("representation", len(self.features) // 2)}

    def forward(self, x, out=None, skip=None):
        if out is None and skip is None:
            return super().forward(x)
        vit.check_names(self.intermediates, out, skip)
        for i, stage in enumerate(self.features):
            if i % 2 == 0:
                x = vit.record(out, f"features.{i}" if i else "stem", stage(x))
                continue
            for j, block in enumerate(stage):
                name = f"features.{i}.{j}"
                if skip != f"{name}.attn":
                    x = x + block.stochastic_depth(block.attn(block.norm1(x)))
                vit.record(out, f"{name}.attn", x)
                if skip != f"{name}.mlp":
                    x = x + block.stochastic_depth(block.mlp(block.norm2(x)))
                vit.record(out, f"{name}.mlp", x)
        x = self.avgpool(self.permute(self.norm(x))).flatten(1)
        return self.head(vit.record(out, "pre_logits", x))


def build_torchvision(name, num_classes, image_size, **overrides):
    if name in SWIN:  # by its class: the functions fix patches and windows (Park A.1: 1 and 4)
        patch, window = (1, 4) if image_size <= 64 else (4, 7)
        row = SWIN[name] | dict(patch_size=patch, window_size=window) | overrides
        row |= {size: [row[size]] * 2 for size in ("patch_size", "window_size")}
        return SwinWithUnits(
            num_classes=num_classes,
            **{TORCHVISIONS_NAMES.get(name, name): value for name, value in row.items()},
        )
    if "drop_path" in overrides:
        overrides["stochastic_depth_prob"] = overrides.pop("drop_path")
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        raise vit.unknown("torchvision model", name, known, "torchvision.models.list_models()")
    if name.startswith("vit_"):
        overrides["image_size"] = image_size
    network = torchvision.models.get_model(name, num_classes=num_classes, **overrides)
    if type(network) is torchvision.models.ResNet:
        network.__class__ = ResNetWithUnits  # the same layers, of which a caller can ask more
    return network


def build_timm(name, num_classes, image_size, drop_path=None, dropout=None, **overrides):
    try:
        import timm
    except ImportError:
        raise ValueError(f"timm:{name}: timm is not installed (pip install timm)") from None
    rates = dict(drop_path_rate=drop_path, drop_rate=dropout)
    overrides |= {rate: value for rate, value in rates.items() if value is not None}
    overrides["num_classes"] = num_classes
    try:
        try:
            return timm.create_model(name, img_size=image_size, **overrides)
        except TypeError:  # a network for any size of image
            return timm.create_model(name, **overrides)
    except RuntimeError as error:
        raise ValueError(f"timm:{name}: {error}") from None


def build_model(name, num_classes=1000, image_size=224, **overrides):
    """The bare network of a --model value; its state dict has the published keys. overrides are
    constructor arguments. Raises ValueError for an unknown name, TypeError or ValueError for an
    unknown argument or one that does not fit."""
    kind, inner = family(name), name.partition(":")[2]
    if kind in FILES:
        return FILES[kind].build(name, num_classes=num_classes, image_size=image_size, **overrides)
    if inner and kind in ("swin", "torchvision"):
        return build_torchvision(inner, num_classes, image_size, **overrides)
    if inner and kind == "timm":
        return build_timm(inner, num_classes, image_size, **overrides)
    size = name.removeprefix("regnety_")
    if kind == "regnety" and size in REGNETY:
        depths, widths, group = REGNETY[size]
        stages = regnet.BlockParams(
            depths=depths,
            widths=widths,
            group_widths=[group] * 4,
            bottleneck_multipliers=[1.0] * 4,
            strides=[2] * 4,
            se_ratio=0.25,
        )
        return regnet.RegNet(stages, num_classes=num_classes, **overrides)
    known = [
        *(n for file in (vit, mixer, resnet, alternet) for n in file.NAMES),
        *(f"regnety_{size}" for size in REGNETY),
    ]
    raise vit.unknown(
        "model", name, known, "what --list-models prints, torchvision:NAME, timm:NAME"
    )


# --list-models: a paper's table or figure, side of the images, classes, values of --model. What
# follows a name are the flags of that row.
LISTED = [
    ("Chen Table 7", 224, 1000, [f"vit_{size}" for size in "s32 s16 s14 s8 b32 b16".split()]),
    ("Chen Table 7", 224, 1000, [f"mixer_{size}" for size in "s32 s16 s8 b32 b16 b8".split()]),
    ("Chen Table 2", 224, 1000, [f"resnet{n}{x2}" for n in (50, 101, 152) for x2 in ("", "x2")]),
    ("Xiao Table 1", 224, 1000, [f"vit_{stem}_{size}" for stem in "pc" for size in vit.VIT_GF]),
    ("Xiao Table 2", 224, 1000, [f"resnet{n}" for n in (50, 101, 152, 200)]),
    *(("Xiao Table 2", side, 1000, [f"regnety_{n}"]) for n, (side, _) in REGNETY_SIDES.items()),
    ("near Xiao's RegNetZ", 224, 1000, ["timm:regnetz_b16", "timm:regnetz_040"]),
    ("Park Fig. 1-10, C.4", 32, 100, ["resnet50", "vit_ti2 --no-qkv-bias", "pit_ti"]),
    ("Park Fig. 1-10, C.4", 32, 100, ["torchvision:swin_t"]),
    ("Park Fig. 5a, C.1a", 32, 100, ["resnext50_32x4d", "timm:twins_svt_small", "mixer_ti2"]),
    ("Park Fig. 7", 32, 100, [f"vit_ti4 --no-qkv-bias --kernel-size {k}" for k in (3, 5)]),
    ("Park Fig. 7", 32, 100, ["vit_ti4 --no-qkv-bias"]),
    ("Park Fig. 11, 12", 32, 100, ["alter_resnet50"]),
    *(
        ("Park Fig. 12a", 32, 100, [f"alter_resnet50 --msa-blocks {' '.join(blocks)}"])
        for blocks in "0000 0001 0002 0012 0112 0122 0132".split()
    ),
    ("Park Fig. D.5, E.1", 224, 1000, ["alter_resnet50"]),
    ("Park Fig. E.1", 224, 1000, ["resnet50", "resnext50_32x4d", "vit_ti16", "pit_ti"]),
    ("Park Fig. E.1", 224, 1000, ["torchvision:swin_t", "timm:convit_tiny", "timm:levit_128s"]),
    ("Park Fig. E.1", 224, 1000, ["timm:coat_lite_tiny"]),
    ("other sizes", 224, 1000, ["vit_l16", "mixer_ti16", "mixer_l16", "resnet18", "resnet34"]),
    ("other sizes", 224, 1000, [name for name in resnet.NAMES if name.startswith("pre")]),
    ("other sizes", 224, 1000, alternet.NAMES),
    ("shapes", 32, 12, ["vit_micro8", "mixer_micro8", "resnet18 --width 16"]),
    ("shapes", 32, 12, ["alter_resnet18 --width 16"]),
]


def knobs(args):
    """The constructor arguments among the settings; one number where a list has one."""
    given = {name: getattr(args, name) for name in MODEL_FLAGS}
    return {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in given.items()
        if value is not None
    }


def list_models():
    """What --list-models prints; counted on the meta device, at the size of the table's images."""
    say(
        "python train.py --model\n"
        f"{'':42}{'pixels':>6}{'classes':>8}{'parameters':>13}{'GFLOPs':>8}{'M acts':>8}"
    )
    parser = make_parser()
    for where, image_size, num_classes, models in LISTED:
        for model in models:
            args = parser.parse_args(["--model", *model.split()])
            try:
                with torch.device("meta"):
                    network = build_model(args.model, num_classes, image_size, **knobs(args))
                cost = vit.complexity(network, image_size)
                cost = f"{cost['params']:13,}{cost['macs'] / 1e9:8.2f}{cost['acts'] / 1e6:8.1f}"
            except ValueError as error:
                cost = f"  {error}"
            say(f"{model:42}{image_size:6}{num_classes:8,}{cost}  {where}")
    say(
        "FLOPs are multiply-adds of convolutions, linear layers and attention; activations are "
        "the outputs of these and of\nmax-pooling (Xiao Table 1). PATCH in vit_sizePATCH and "
        "mixer_sizePATCH is any patch size that divides the image."
    )
    return 0


def steps_of(args):
    """Of a run on its data set as published."""
    with as_user_error(f"--train-fraction {args.train_fraction} --hold-out {args.hold_out}"):
        part = Fraction(args.train_fraction) * (1 - Fraction(args.hold_out))
    images = int(TRAINING_IMAGES[args.dataset] * part)
    steps = args.epochs * (images // args.batch_size)
    return min(steps or args.max_steps, args.max_steps or steps)


def complexity_of(args, tell=lambda text: None):
    """vit.complexity of --model, built without memory where that is possible. What cannot be
    counted, as nn.MultiheadAttention, is told, and NaN."""
    build = partial(build_model, args.model, CLASSES[args.dataset], args.image_size, **knobs(args))
    with as_user_error(args.model):
        try:
            with torch.device("meta"):
                network = build()
        except RuntimeError:  # some of torchvision's and timm's compute with their weights
            network = build()
    try:
        return vit.complexity(network, args.image_size)
    except NotImplementedError as error:
        tell(f"{args.model}: {error}: no FLOPs and activations")
        return dict(
            params=sum(p.numel() for p in network.parameters()), macs=math.nan, acts=math.nan
        )


def in_hours(seconds):
    return f"{seconds / 3600:,.0f}" if seconds >= 360_000 else f"{seconds / 3600:.3g}"


def forward_passes(args):
    """What a step computes for each image of the batch, in forward passes. A backward pass is two
    of them, one for images and one for weights; of --sam-scope more is counted than there is."""
    perturbed = args.sam_steps / args.sam_every if args.sam_rho else 0.0
    passes = (1 if args.train_only == "head" else 3) * (1 + perturbed)
    if args.adv_eps:
        # δ costs a pass of its own, forward and back to the images; in steps with SAM it comes from
        # SAM's first: free there, if that goes back through the whole network anyway
        with_sam = 1 / args.sam_every if args.sam_rho else 0.0
        passes += 2 * (1 - with_sam) + with_sam * (args.train_only == "head")
    if args.loss == "supcon":  # two views, and one more forward pass before each other one
        passes = 2 * (passes + 1 + perturbed)
    return passes


def expected(args, macs, devices, tflops):
    """Steps of a run, and seconds of each by its arithmetic alone, an image's forward pass being
    `macs` multiply-adds of 2 FLOPs, on so many devices that sustain so many TFLOP/s each."""
    flops = 2 * macs * forward_passes(args) * args.batch_size
    return steps_of(args), flops / (devices * tflops * 1e12)


def list_recipes(expect):
    """What --list-recipes prints, with --expect the hours of plain training and of SAM's too."""
    say(
        "python train.py --recipe\n"
        f"{'':27}{'model':19}{'data set':12}{'epochs':>6}{'batch':>7}{'steps':>10}{'top-1 %':>9}"
        f"{'SAM':>6}" + f"{'hours':>10}{'SAM':>10}" * any(expect)
    )
    macs = {}  # of networks; many recipes have the same
    for name, row in RECIPES.items():
        args = make_parser().parse_args([], argparse.Namespace(**row))
        args.image_size = image_size_of(args)
        where, *accuracies = (*PUBLISHED[name], None, None)[:3]
        plain, with_sam = ("-" if top1 is None else f"{top1:.1f}" for top1 in accuracies)
        hours = ""
        if any(expect):
            network = str((args.model, args.dataset, args.image_size, knobs(args)))
            macs[network] = macs.get(network) or complexity_of(args)["macs"]
            for rho in (0.0, 0.1):  # any above 0 costs the same
                args.sam_rho = rho
                steps, seconds = expected(args, macs[network], *expect)
                hours += f"{in_hours(steps * seconds):>10}"
        say(
            f"{name:27}{args.model:19}{args.dataset:12}{args.epochs or '-':>6}"
            f"{args.batch_size:7,}{steps_of(args):10,}{plain:>9}{with_sam:>6}{hours}  {where}"
        )
    say(
        "Steps are for the data set as published. Accuracies are the paper's, of this model, "
        "after plain training and with SAM\n(--sam-rho paper; of a transfer: in pre-training). "
        "Each setting of a recipe: --recipe NAME --dry-run."
    )
    if any(expect):
        say(
            f"Hours: of {expect[0]:g} devices that sustain {expect[1]:g} TFLOP/s each, without "
            "evaluations and waiting."
        )
    return 0


class Normalised(nn.Module):
    """What `assemble` makes."""

    def __init__(self, network, mean, std):
        super().__init__()
        self.network = network
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1), persistent=False)

    def forward(self, x, *args, **kwargs):
        return self.network((x - self.mean) / self.std, *args, **kwargs)


def assemble(network, mean, std):
    """What is trained, attacked and analysed: `network` behind (x - mean) / std, for float input
    (B, 3, H, W) in [0, 1]. mean, std: lists of 1 or 3 numbers."""
    return Normalised(network, mean, std)


def at_least_float32(x):
    """For losses and means: bfloat16 and float16 are too coarse to add up."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_float(x, model):
    """uint8 pixels -> [0, 1] in the model's floating type."""
    return x.to(next(model.parameters()).dtype).div_(255)


# ------------------------------------------------------------------------------ processes, messages


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text=""):
    """One line on standard output, above the progress bar if there is one."""
    try:
        tqdm.write(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the end would flush into it again
        raise WriteError(f"standard output: {error.strerror}") from None


def progress(total, what="", unit="image", leave=False, initial=0):
    """A bar on a terminal, of the first process."""
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        leave=leave,
        disable=rank() > 0 or not sys.stderr.isatty(),
    )


def on_main(function):
    """Result of `function` in the first process, on every process; its UserError likewise."""
    box = [None, None]
    if rank() == 0:
        try:
            box[0] = function()
        except (UserError, OSError) as error:
            box[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


class StopSignal:
    """SIGTERM and Ctrl-C, agreed between processes: all stop before the same step, whenever each
    was told. Their flags meet in an all-reduce on the CPU that runs beside the step, so the answer
    is one step late and nothing waits for it. A second Ctrl-C ends a single process at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received, self.flag, self.work = 0, torch.zeros(1, dtype=torch.int32), None
        self.before = {number: signal.signal(number, self.receive) for number in self.SIGNALS}

    def receive(self, number, frame):
        self.received = number
        if not dist.is_initialized():  # launchers repeat a signal
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """Number of the signal that some process has received, or 0; the same on every process."""
        if not dist.is_initialized():
            return self.received
        self.wait()
        if not self.flag.item():
            self.flag.fill_(self.received)
            self.work = dist.all_reduce(self.flag, op=dist.ReduceOp.MAX, async_op=True)
            return 0
        return self.flag.item()

    def wait(self):
        if self.work is not None:
            self.work.wait()
            self.work = None

    def end(self):
        """After the last step nobody asks any more: signals do again what they did before, and one
        that came since the last answer does it now."""
        self.wait()
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received:
            signal.raise_signal(self.received)


# --------------------------------------------------------------------- losses, schedule, statistics


def softmax_loss(logits, y, smoothing=0.0):
    """Cross-entropy, mean over the batch. y: (B,) classes or (B, K) probabilities."""
    return F.cross_entropy(logits, y, label_smoothing=smoothing)


def sigmoid_loss(logits, y, smoothing=0.0):
    """A binary cross-entropy for each class, summed over classes, mean over the batch (B.1)."""
    target = y if y.is_floating_point() else F.one_hot(y, logits.shape[1])
    target = target.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[1]
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    return loss / len(logits)


def supcon_loss(z, y, temperature):
    """Supervised contrastive loss, L_out of Khosla et al. 2020 (2004.11362, Eq. 2), mean over the
    anchors i: -1/|P(i)| Σ_{p ∈ P(i)} log(exp(z_i·z_p/τ) / Σ_{a ≠ i} exp(z_i·z_a/τ)), where P(i)
    are the others of i's class. z: (n, d), of any length, normalised here; y: (n,) classes, each
    at least twice."""
    z = F.normalize(z)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(itself, -math.inf).log_softmax(1)
    positive = (y[:, None] == y) & ~itself
    return -(log_p.where(positive, 0).sum(1) / positive.sum(1)).mean()


def supcon_of_all(z, y, temperature):
    """supcon_loss over the projections and labels of all processes, detached, and its gradient by
    this process's z. Each process computes all of it, so that nothing has to be sent back."""
    z = z.detach().requires_grad_()
    zs, ys = [z], [y]
    if dist.is_initialized():
        zs, ys = ([torch.empty_like(t) for _ in range(world_size())] for t in (z, y))
        dist.all_gather(zs, z.detach())
        dist.all_gather(ys, y)
        zs[rank()] = z
    loss = supcon_loss(torch.cat(zs), torch.cat(ys), temperature)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


class Contrastive(nn.Module):
    """A network of `assemble` under the projection head of Khosla et al. (§3.1, an MLP; their
    code's scripts for ImageNet have its last layer alone): what --loss supcon trains, on the
    representation divided by its length. The classifier computes nothing that counts and is not
    trained."""

    def __init__(self, bare, dim, projection_dim):
        super().__init__()
        self.bare = bare
        self.projection = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, projection_dim, bias=False)
        )

    def forward(self, x):
        """Projections (B, projection_dim), not yet normalised: supcon_loss does it, in float32."""
        out = {"pre_logits": None}
        self.bare(x, out=out)
        return self.projection(F.normalize(out["pre_logits"]))


class LAMB(torch.optim.Optimizer):
    """You et al. 2020 (1904.00962, Algorithm 2) with φ(z) = z: the update u of each tensor, Adam's
    and decoupled decay, is given that tensor's length, w ← w - η · ‖w‖/‖u‖ · u. As in its authors'
    code the ratio is 1 where ‖w‖ or ‖u‖ is 0; theirs also leaves it at 1 where nothing decays."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0)
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] += 1
            correction1, correction2 = (1 - beta ** group["step"] for beta in group["betas"])
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(w), torch.zeros_like(w)
                m = state["m"].lerp_(w.grad, 1 - group["betas"][0])
                v = state["v"].lerp_(w.grad.square(), 1 - group["betas"][1])
                u = m / correction1 / ((v / correction2).sqrt() + group["eps"])
                u += group["weight_decay"] * w
                ratio = w.norm() / u.norm()  # where, not if: nothing waits for the device
                w -= group["lr"] * torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0) * u


def learning_rate(step, total, warmup, peak, schedule, end=0.0):
    """At `step` of 0 … total: linear from 0 over `warmup` steps, times half a cosine, a line or an
    exponential from `peak` there to `end` at `total`, or `peak` throughout. A function of the step
    alone, so that no checkpoint has anything of it."""
    done = min(max(step - warmup, 0) / max(total - warmup, 1), 1.0)
    decayed = {
        "cosine": end + (peak - end) * 0.5 * (1 + math.cos(math.pi * done)),
        "linear": peak + (end - peak) * done,
        "exponential": peak * (end / peak) ** done if peak else 0.0,
        "constant": peak,
    }[schedule]
    return decayed * min(1.0, step / warmup if warmup else 1.0)


def decay_groups(network, decay):
    """Trained parameters that decay and those that do not; decay is a value of --decay."""
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    of_norms = {id(p) for m in network.modules() if isinstance(m, norms) for p in m.parameters()}
    decayed, kept = [], []
    for name, p in network.named_parameters():
        if not p.requires_grad:
            continue
        decays = {
            "all": True,
            "no-norm-bias": id(p) not in of_norms and not name.endswith("bias"),
            "kernels": name.endswith("weight") and p.ndim > 1,
        }[decay]
        (decayed if decays else kept).append(p)
    return decayed, kept


def move_average(mean, network, decay):
    """mean ← decay · mean + (1 - decay) · network, weights and statistics; counts are copied."""
    for old, now in zip(mean.state_dict().values(), network.state_dict().values()):
        old.lerp_(now, 1 - decay) if old.is_floating_point() else old.copy_(now)


class RunningStatistics:
    """BatchNorm's running mean and variance in a step of many micro-batches: each starts from the
    same values, and the result is the mean over all, so that it does not depend on how many devices
    share the step. SAM.perturb alone would keep its first pass's too; as every pass here begins
    anew and the step ends with the mean, what it puts back makes no difference."""

    def __init__(self, network):
        norms = [
            m
            for m in network.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
            and m.running_mean is not None
            and m.training
        ]
        self.buffers = [b for m in norms for b in (m.running_mean, m.running_var)]
        self.counters = [m.num_batches_tracked for m in norms]
        self.start, self.sum = ([torch.zeros_like(b) for b in self.buffers] for _ in range(2))
        self.count = [torch.zeros_like(c) for c in self.counters]

    def begin_step(self):
        if self.buffers:
            torch._foreach_copy_(self.start, self.buffers)
            torch._foreach_zero_(self.sum)
            torch._foreach_copy_(self.count, self.counters)

    def begin_pass(self):
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.start)

    def end_pass(self):
        """After a micro-batch's first pass only: SAM's others, at w + ε, do not count."""
        if self.buffers:
            torch._foreach_add_(self.sum, self.buffers)

    def end_step(self, micro_batches, skip):
        """skip: () tensor, 1 if the step is skipped: then the statistics are the old ones too."""
        if self.buffers:
            flat = torch.cat([s.flatten() for s in self.sum])
            if dist.is_initialized():
                dist.all_reduce(flat)
            means = (flat / micro_batches).split([b.numel() for b in self.buffers])
            torch._foreach_copy_(
                self.buffers,
                [
                    torch.where(skip > 0, old, mean.view_as(old))
                    for old, mean in zip(self.start, means)
                ],
            )
            torch._foreach_copy_(self.counters, [c + 1 - skip.to(c.dtype) for c in self.count])


def update(optimizer, scaler, params, grad_clip, statistics, micro_batches, correct=None):
    """The end of a step: correct() may change the gradients first. Clipping and decay act once, on
    the gradient averaged over everything. A gradient that is not finite changes nothing. -> its
    norm before clipping, and 1 if the step was skipped, else 0: () tensors."""
    scaler.unscale_(optimizer)
    if correct is not None:
        correct()
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if grad_clip:
        nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
    skip = (~norm.isfinite()).float()
    statistics.end_step(micro_batches, skip)
    fused = optimizer.defaults.get("fused", False)
    if fused:
        optimizer.found_inf = skip  # where it is 1, fused optimizers leave everything as it is
    if fused or not skip:  # on MPS, and for LAMB and RMSProp, this waits for the device
        optimizer.step()  # scaler.step would set found_inf to what unscale_ found, before correct()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm, skip


# --------------------------------------------------------------------------------------- evaluation


BINS = 10  # of the calibration error that evaluations show


def bin_sums(confidence, right, bins):
    """Probabilities (m, K) and whether what they were given to was right (m, K), in `bins` equal
    bins (lo, hi] of [0, 1] -> (3, K, bins) float64: how many, Σ right, Σ probability. 0 belongs to
    the first bin, an exact 1 to the last; NaN counts as 0."""
    m, columns = confidence.shape
    values = torch.stack(
        [torch.ones_like(confidence), right.to(confidence), confidence.nan_to_num(0)]
    ).flatten(1)
    index = (torch.ceil(values[2] * bins) - 1).clamp(0, bins - 1).long()
    index += bins * torch.arange(columns, device=index.device).repeat(m)
    return values.new_zeros(3, columns * bins).index_add_(1, index, values).unflatten(1, (-1, bins))


def calibration_error(sums):
    """bin_sums -> (K,) in percent: the mean of |Σ right - Σ probability| / how many over the bins,
    weighted by their share."""
    count, right, confidence = sums
    return 100 * (right - confidence).abs().sum(1) / count.sum(1)


def exactest(device):
    """Where sums of a whole data set are kept: in float64, which MPS does not have."""
    return dict(dtype=torch.float64, device="cpu" if device.type == "mps" else device)


def to_exact(x):
    """x as `exactest` says, in two steps: a copy from MPS that also widens is an error or, in torch
    2.14, writes nothing."""
    exact = exactest(x.device)
    return x.to(exact["device"]).to(exact["dtype"])


@torch.inference_mode()
def evaluate(
    model, loader, device, autocast=nullcontext(), bar=None, restrict_logits=None, mix=None
):
    """Accuracy and calibration over a loader, every image counted once over all processes. Labels
    are (m,), or (m, K) where any of a row is right and -1 fills it up; restrict_logits: indices of
    the only classes that are predicted. mix: a function of the number of the batch, float images
    and labels -> images and shares of the classes (m, classes), against which the NLL is; right is
    the class with the largest.

    -> dict: images; top1, top5 in percent; nll, mean cross-entropy in nats; ece, the expected
    calibration error in percent: over BINS equal bins (lo, hi] of the top probability, the mean
    of |accuracy - confidence| weighted by the bin's share (Guo et al. 2017; Park & Kim: 10 bins).
    """
    training = model.training
    model.eval()
    exact, others = exactest(device), None
    sums, by_bin = torch.zeros(4, **exact), torch.zeros(3, 1, BINS, **exact)
    for number, (x, y) in enumerate(data.batches(loader, tell=say)):
        # pinned for CUDA; elsewhere it is waited for
        x, y = (t.to(device, non_blocking=device.type == "cuda") for t in (x, y))
        x, shares = to_float(x, model), None
        if mix is not None:
            x, shares = mix(number, x, y)
            y = shares.argmax(1)
        with autocast:
            logits = model(x)
        logits = at_least_float32(logits)
        if restrict_logits is not None:
            if others is None:
                others = torch.ones(logits.shape[1], dtype=torch.bool)
                others[restrict_logits] = False
                others = others.to(device)
            logits = logits.masked_fill(others, -math.inf)
        y = y.view(len(y), -1)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (best[:, :, None] == y[:, None]).any(2)
        log_p = logits.log_softmax(1).gather(1, y.clamp(min=0)).masked_fill(y < 0, -math.inf)
        nll = -log_p.logsumexp(1)
        if shares is not None:
            nll = F.cross_entropy(logits, shares, reduction="none")
        sums += torch.stack(
            [torch.ones_like(y[:, 0]).sum(), hits[:, 0].sum(), hits.any(1).sum(), nll.sum()]
        ).to(sums.device)
        confidence = to_exact(logits.softmax(1).amax(1, keepdim=True))
        by_bin += bin_sums(confidence, hits[:, :1].to(sums.device), BINS)
        if bar is not None:
            bar.update()
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(by_bin)
    n, top1, top5, nll = sums.tolist()
    return dict(
        images=round(n),
        top1=100 * top1 / n,
        top5=100 * top5 / n,
        nll=nll / n,
        ece=calibration_error(by_bin).item(),
    )


_at_once = weakref.WeakKeyDictionary()  # model -> {what: images}


def images_at_once(model, side, device, what="a forward pass", work=None, usual=256, most=0):
    """How many images (3, side, side) to take through a model together: on CUDA the largest of
    most, most/2, … for which `work`, a function of images, by default the forward pass, fits in
    memory without autocast, tried once for a model and `what` it does; elsewhere `usual`, where
    more are not faster. most, if 0: 256, of small images 1,024; workers hold many batches ready in
    the host's shared memory, and 256 images of 224 pixels a side are 38 MB."""
    if device.type != "cuda":
        return usual
    known, n = _at_once.setdefault(model, {}), most or (256 if side > 112 else 1024)
    while what not in known:
        try:
            x = torch.zeros(n, 3, side, side, device=device, dtype=next(model.parameters()).dtype)
            with adversarial.held_still(model, device), torch.set_grad_enabled(work is not None):
                (work or model)(x)
            known[what] = n
        except torch.OutOfMemoryError:
            if n == 1:
                raise LoneError(
                    f"{what}: one image of {side}×{side} does not fit in the device's memory"
                ) from None
            n //= 2
            torch.cuda.empty_cache()
    return known[what]


def own_share(dataset, device, workers, batch_size):
    """Loader of the images that this process evaluates."""
    return data.evaluation_loader(
        dataset, batch_size, workers, rank(), world_size(), device.type == "cuda"
    )


def under_attack(
    model, dataset, side, device, positions, workers, *, batch_size=0, bar=None, **attack
):
    """adversarial.robustness on the images (3, side, side) at these positions of a data set, so
    many together or, if that is 0, images_at_once; in the model's own precision, without
    autocast."""
    through = attack.get("source") or model

    def gradient(x):
        copies = x.repeat(8, 1, 1, 1)  # as many as an attack holds besides
        torch.autograd.grad(through(x.requires_grad_()).sum(), x)
        del copies

    batch_size = batch_size or images_at_once(through, side, device, "an attack", gradient, 128)
    loader = own_share(dataset.part(positions), device, workers, batch_size)

    def batches():
        own = positions[rank() :: world_size()]
        for x, y in data.batches(loader, tell=say):
            yield to_float(x.to(device), model), y.to(device), own[: len(y)]
            own = own[len(y) :]
            if bar is not None:
                bar.update(len(y) * world_size())

    return adversarial.robustness(model, batches(), **attack)


def pgd_10(model, dataset, side, device, workers, bar=None, eps=2 / 255):
    """Accuracy in percent under 10 steps of PGD of eps/8 each from a random start (Chen E.5), on
    softmax cross-entropy whatever the training's loss. An image counts only if it is right at every
    iterate, where Table 5 may take the last alone. NaN where outputs are not finite."""
    attack = dict(eps=eps, step_size=eps / 8, steps=10, early_stop=True)
    sums = under_attack(
        model, dataset, side, device, range(len(dataset)), workers, bar=bar, **attack
    )
    return adversarial.summary([sums])["robust"][-1]


def classifier(network):
    """Name and module of a network's last linear layer, None twice where there is none."""
    linear = [item for item in network.named_modules() if isinstance(item[1], nn.Linear)]
    return linear[-1] if linear else (None, None)


@torch.no_grad()
def set_class_means(model, loader, device, autocast, temperature):
    """The classifier becomes that of the nearest class mean: its weights are the mean directions of
    the representations of each class in a loader, its logits cosine / temperature (of a network
    with unit_norm; else times the length of an image's representation, which leaves the ranks)."""
    _, head = classifier(model)
    sums = torch.zeros(head.weight.shape, **exactest(device))
    training = model.training
    model.eval()
    for x, y in data.batches(loader, tell=say):
        out = {"pre_logits": None}
        with autocast:
            model(to_float(x.to(device), model), out=out)
        z = F.normalize(at_least_float32(out["pre_logits"]))
        sums.index_add_(0, y.to(sums.device), to_exact(z))
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    head.weight.copy_(F.normalize(sums) / temperature)
    head.bias.zero_()


def print_table(tell, results):
    attacked, width = any("pgd" in r for r in results.values()), max(12, *map(len, results))
    tell(
        f"{'':{width}}{'images':>8}{'top-1 %':>9}{'top-5 %':>9}{'NLL':>9}{'ECE %':>8}"
        + f"{'PGD-10 %':>10}" * attacked
    )
    for name, r in results.items():
        tell(
            f"{name:{width}}{r['images']:8,}{r['top1']:9.2f}{r['top5']:9.2f}"
            f"{r['nll']:9.4f}{r['ece']:8.2f}" + (f"{r['pgd']:10.2f}" if "pgd" in r else "")
        )


# -------------------------------------------------------------------------- checkpoints, run folder


def write_file(path, write):
    """The file is whole or as it was before: temporary name, flush to disk, rename. OSError if the
    disk is full or read-only; then no more of it is taken than before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_weights(network, path, weights="ema", reset_head=False):
    """Fills a bare network from a checkpoint of ours ("model" or its average "ema"), a timm or
    torchvision state dict, or an original .npz. Positions of another resolution are resized, which
    is said; with reset_head the classifier stays as it is. Returns (mean, std) of the inputs if the
    file's kind tells them, else None. UserError, and nothing is loaded, if it does not fit."""
    path = str(path)
    if path.endswith(".npz"):
        try:
            file = mixer if isinstance(network, mixer.Mixer) else vit
            file.load_npz(network, path, head=not reset_head)
        except (ValueError, OSError) as error:
            hint = "; --reset-head starts with a new classifier" * ("num_classes=" in str(error))
            raise UserError(f"--init-from: {error}{hint}") from None
        return [0.5], [0.5]
    state, normalisation = read_checkpoint(path), None
    if is_ours(state):
        normalisation = state["settings"]["mean"], state["settings"]["std"]
        state = state["ema"] if weights == "ema" and state["ema"] else state["model"]
    else:
        inner = [state[k] for k in ("model", "state_dict") if isinstance(state.get(k), dict)]
        state = inner[0] if inner else state
    own, state = network.state_dict(), dict(state)
    head, _ = classifier(network)
    of_head = {name for name in own if name.rpartition(".")[0] == head}
    if reset_head:
        state |= {name: own[name] for name in of_head}
    old = state.get("pos_embed")
    if (
        isinstance(network, (vit.ViT, vit.PiT))
        and isinstance(old, torch.Tensor)
        and old.ndim == own["pos_embed"].ndim
    ):
        with as_user_error(path):
            state["pos_embed"] = vit.resize_pos_embed(old, network.grid, network.prefix_tokens)
    shape = {name: tuple(getattr(tensor, "shape", ["no tensor"])) for name, tensor in state.items()}
    other = [name for name in own if name in state and shape[name] != tuple(own[name].shape)]
    wrong = {
        "it lacks": sorted(own.keys() - state.keys()),
        "it has besides": sorted(state.keys() - own.keys(), key=str),
        "of another shape": [
            f"{name} {shape[name]}, here {tuple(own[name].shape)}" for name in other
        ],
    }
    if any(wrong.values()):
        parts = [
            f"{what}: {', '.join(map(str, names[:3]))}{' …' * (len(names) > 3)} ({len(names)} in "
            "all)"
            for what, names in wrong.items()
            if names
        ]
        hint = ""
        if other and of_head.issuperset(other) and len(parts) == 1:
            hint = "; --reset-head starts with a new classifier"
        raise UserError(
            f"{path} does not fit this network, nothing was loaded; {'; '.join(parts)}{hint}"
        )
    network.load_state_dict(state)
    if old is not None and old.shape != state["pos_embed"].shape:
        say(f"{path}: positions resized to {network.grid[0]}×{network.grid[1]}")
    return normalisation


def to_json(value, indent=None):
    """Bytes; NaN and infinity, which JSON does not have, are null."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    words = r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity'
    return re.sub(words, lambda word: word[0] if word[0][0] == '"' else "null", text).encode()


class RunFolder:
    """ckpt.pt, best.pt, log.jsonl and config.json of one run. One process writes; the log is locked
    meanwhile."""

    # What ckpt.pt has; best.pt and those of --keep-epochs lack some, so no run goes on from them.
    PARTS = "model ema projection optimizer scaler look windows step evaluated best".split()

    def __init__(self, path):
        self.path = Path(path)

    def open(self, config, resume):
        """Makes or takes the folder; -> the checkpoint to go on from, or None. UserError if it
        holds a run and resume is off, if its settings or data differ, if that is no checkpoint of
        a run, or if another process is writing."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            begun = (self.path / "log.jsonl").exists()
            self.log_file = open(self.path / "log.jsonl", "a+b")
        except FileExistsError:
            raise UserError(f"--out-dir {self.path} is a file, not a folder") from None
        except OSError as error:
            raise UserError(f"--out-dir {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path} is being written by another process; choose another --out-dir"
            ) from None
        except OSError as error:  # some network file systems
            say(
                f"{self.path} cannot be locked ({error.strerror}): nothing keeps a second process "
                "from writing here"
            )
        # A data worker outlives a killed trainer by seconds and would hold the lock so long.
        held = weakref.ref(self.log_file)
        os.register_at_fork(after_in_child=lambda: held() and held().close())
        ckpt, saved = self.path / "ckpt.pt", self.path / "config.json"
        # What ended before its first record left settings and an empty log: that is no run yet.
        has_best = os.path.lexists(self.path / "best.pt")
        written = os.path.lexists(ckpt) or has_best or self.log_file.tell() > 0
        if written or saved.exists() and not begun:
            if not resume:
                raise UserError(
                    f"{self.path} holds a run already: add --resume to go on with it, or choose "
                    "another --out-dir"
                )
            self.compare(config)
            if not ckpt.exists() and (has_best or ckpt.is_symlink()):  # which a ckpt.pt preceded
                raise UserError(
                    f"{ckpt} is gone, of a run that had one: put it back, or choose another "
                    "--out-dir"
                )
        state = read_checkpoint(ckpt) if ckpt.exists() else None
        lacks = [part for part in self.PARTS if state is not None and part not in state]
        if lacks:
            raise UserError(
                f"{ckpt} is no last state of a run: it lacks {', '.join(lacks)}; start from its "
                "weights with --init-from, in another --out-dir"
            )
        most = config["settings"]["max_steps"]
        if state is not None and 0 < most < state["step"]:
            raise UserError(
                f"{ckpt} is of step {state['step']:,}, beyond --max-steps {most}: choose another "
                "--out-dir"
            )
        text = json.dumps(config, indent=1)  # ASCII: a path may hold bytes that are no UTF-8
        try:
            write_file(saved, lambda file: file.write(text.encode()))
        except OSError as error:
            raise UserError(f"{saved} cannot be written: {error.strerror}") from None
        return state

    def compare(self, now):
        """The run's configuration with that of the run that is here: UserError for other settings
        or data; other versions are told."""
        try:
            then = json.loads((self.path / "config.json").read_text())
            free = FREE_FLAGS - ({"max_steps"} if now["settings"]["epochs"] == 0 else set())
            differ = [
                f"{flag(k)} {then['settings'].get(k)} → {v}"
                for k, v in now["settings"].items()
                if k not in free and then["settings"].get(k) != v
            ]
            moved = [
                (name, then["data"][name]["images"], own["images"])
                for name, own in now["data"].items()
                if then["data"][name] != own
            ]
            others = [
                f"{name} {then['versions'][name]} → {own}"
                for name, own in now["versions"].items()
                if then["versions"][name] != own
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.path}/config.json is missing or damaged, so the run's settings are "
                "unknown; choose another --out-dir"
            ) from None
        if differ:
            raise UserError(
                f"{self.path} was run with other settings ({', '.join(differ)}): give the same to "
                "resume it, or choose another --out-dir"
            )
        if moved:
            name, images, here = moved[0]
            raise UserError(
                f"{self.path} was run with other {name} images ({images} → {here}"
                + ", other labels" * (images == here)
                + "): give the same to resume "
                "it, or choose another --out-dir"
            )
        if others:
            say(
                f"{self.path} was written by other versions ({', '.join(others)}): what follows "
                "may differ from theirs in the last bits"
            )

    def cut_log(self, step, evaluated):
        """Leaves the records up to `step`, evaluations up to step `evaluated`: what a killed run
        wrote after its last checkpoint, it will write again."""
        self.log_file.seek(0)
        end = 0
        for line in self.log_file:
            try:
                record = json.loads(line)
                late = record["step"] > (evaluated if "val" in record else step)
            except (ValueError, KeyError, TypeError):  # half a line, cut by the kill
                break
            if late or "final" in record:
                break
            end += len(line)
        self.log_file.truncate(end)

    @contextmanager
    def writing(self, name, left):
        """WriteError that says what is left if the disk is full, read-only or gone."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save makes the latter of the former
            if str(error).startswith("DataLoader worker"):
                raise  # it died meanwhile
            why = getattr(error, "strerror", None) or "the disk may be full"
            raise WriteError(f"{self.path / name} cannot be written: {why}; {left}") from None

    def log(self, **record):
        line = to_json(record) + b"\n"
        with self.writing("log.jsonl", "the last checkpoint is whole"):
            if os.write(self.log_file.fileno(), line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(self, name, state):
        before = "the one before it is whole" if (self.path / name).exists() else "there was none"
        with self.writing(name, before):
            write_file(self.path / name, partial(torch.save, state))


# ---------------------------------------------------------------------------------------------- run


def worker_count(args, dataset, on_machine):
    """--workers, or if that is not given what suits a data set and the machine."""
    if args.workers is not None:
        return args.workers
    at_hand = isinstance(dataset, data.InMemory) and dataset.transform is None
    return 0 if at_hand else max(1, min(8, data.usable_cores() // on_machine))


TO_JOIN = timedelta(minutes=10)  # from the first process's start to the last one's


TORCHRUN_SETS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def check_variables():
    """UserError unless those that torchrun sets are numbers, and each rank is below its number."""
    wrong = [
        f"{name}={os.environ[name]}"
        for name in TORCHRUN_SETS
        if not os.environ.get(name, "0").isdecimal()
    ]
    if wrong:
        raise UserError(
            f"{' '.join(wrong)}: no number, as torchrun sets it; unset it, or start with torchrun"
        )
    for name, number in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        own, all_ = os.environ.get(name, "0"), os.environ.get(number)
        if all_ is not None and int(own) >= int(all_):
            raise UserError(
                f"{name}={own} {number}={all_}: ranks begin at 0 and are below their number; unset "
                "both, or start with torchrun"
            )


def join(backend, timeout=timedelta(minutes=30)):
    """Joins torchrun's processes, if it started this one. timeout: how long they wait for one
    another afterwards. UserError if its variables or the connection are not as they should be, or
    if one of them does not come."""
    check_variables()
    if dist.is_initialized():
        return
    if "WORLD_SIZE" not in os.environ:
        alone = [f"{name}={os.environ[name]}" for name in TORCHRUN_SETS if name in os.environ]
        if alone:  # this process would take itself for another than the first, and save nothing
            raise UserError(
                f"{' '.join(alone)} without WORLD_SIZE: unset it, or start with torchrun"
            )
        return
    try:
        # A store by attempt: in torchrun's own, processes that it restarts would find the addresses
        # of the dead ones (torch 2.14).
        store, own_rank, world = next(dist.rendezvous("env://", timeout=TO_JOIN))
        store.set_timeout(timeout)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"attempt {attempt}", store),
            rank=own_rank,
            world_size=world,
            timeout=timeout,
        )
    except (ValueError, RuntimeError) as error:  # the latter: a busy port, no connection, nobody
        said = " ".join(str(error).split("\n")[0].split())
        raise UserError(
            f"the processes cannot join: {said}; start them with torchrun, which --standalone "
            "finds a free port for, or unset WORLD_SIZE; one that is missing has said why"
        ) from None


def start_processes(device, timeout=timedelta(minutes=30), may_share=False):
    """Joins torchrun's processes and takes this one's device: a value of --device -> torch.device,
    number of processes, number of them on this machine. timeout: as of join. may_share: there may
    be more processes than CUDA devices. UserError if there are and may not."""
    check_variables()
    devices = torch.cuda.device_count() if device == "cuda" else math.inf
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_machine > devices and not may_share:
        raise UserError(
            f"{on_machine} processes for {devices} CUDA devices: use --nproc_per_node={devices}"
        )
    # gloo beside NCCL, so that what the host agrees on does not wait for the device, and alone
    # where processes share one, which NCCL refuses
    join("cpu:gloo,cuda:nccl" if device == "cuda" and on_machine <= devices else "gloo", timeout)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device != "cuda":
        return torch.device(device), world, on_machine
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % devices)
    torch.cuda.set_device(device)
    return device, world, on_machine


def check_classes(name, dataset, wanted):
    """UserError unless a data set's classes are those of a network."""
    if list(wanted) != list(dataset.classes):
        raise UserError(
            f"{name} has {len(dataset.classes):,} classes from {dataset.classes[0]}, the network "
            f"was trained on {len(wanted):,} from {wanted[0]}: name its --dataset"
        )


def load_split(args, split, device, tell, **more):
    """A split of --dataset, its images on the device if they can live there. classes: those of the
    network or of the training images, which it has to have."""
    try:
        dataset = data.load(
            args.dataset,
            split,
            data_dir=args.data_dir,
            image_size=args.image_size,
            seed=args.seed,
            download=args.download,
            short_side=args.eval_short_side,
            **more,
        )
    except data.DataError as error:
        hint = "" if args.dataset == "shapes" else "; --dataset shapes needs no files"
        raise UserError(f"{error}{hint}") from None
    check_classes(args.dataset, dataset, more.get("classes") or dataset.classes)
    if dataset.notice:
        tell(dataset.notice)
    return dataset.to(device)


def load_training(args, device, tell):
    """-> the training set, augmented; the validation set, with --hold-out a part of the training
    set; and a class-balanced sample of the training set, as large as the validation set, twice:
    augmented, and prepared as validation images are."""
    how = {name: getattr(args, name) for name in AUGMENTS}
    train_set = load_split(args, "train", device, tell, **how)
    # Held-out images take the place of val/, which then need not be there.
    validation = "val" if args.hold_out == "0" else "train"
    val_set = load_split(args, validation, device, tell, classes=train_set.classes)
    tested = len(val_set.labels.unique())
    if tested < len(val_set.classes):
        tell(f"validation images are of {tested:,} of the {len(val_set.classes):,} classes")
    with as_user_error(f"--train-fraction {args.train_fraction}"):
        train_set.restrict(data.subset(train_set.labels, args.train_fraction))
    labels = train_set.labels[train_set.indices]
    if args.hold_out != "0":
        with as_user_error(f"--hold-out {args.hold_out}"):
            rest, held = data.hold_out(labels, args.hold_out)
        val_set = train_set.part(held, like=val_set)
        train_set.restrict(rest)
        labels = labels[rest]
    sample = data.subset(labels, Fraction(min(len(val_set), len(labels)), len(labels)))
    return train_set, val_set, train_set.part(sample), train_set.part(sample, like=val_set)


def mixing(args, num_classes):
    """A function of float images and labels that mixes them as --mixup and --cutmix say, one of
    both by a coin: then labels become shares (m, classes). Draws from the default generator."""
    mixes = [
        kind(alpha=alpha, num_classes=num_classes)
        for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix))
        if alpha
    ]
    return v2.RandomChoice(mixes) if mixes else lambda *xy: xy


def check_network(args):
    """Builds and calls a network of ours without memory, before the data is read: what does not fit
    is said at once, and if it was the recipe that wanted it."""
    if family(args.model) in ("torchvision", "timm"):
        return  # not all of these can be built so
    own = [(k, tuple(v) if isinstance(v, list) else v) for k, v in knobs(args).items()]
    try:
        with as_user_error(args.model):
            call_without_memory(args.model, args.image_size, tuple(own))
    except UserError as error:
        for name in knobs(args).keys() & RECIPES.get(args.recipe, {}).keys():
            if f"unknown argument of {args.model} {name!r}" in str(error):
                other = f"{flag(name)} is of --recipe {args.recipe}: choose one for {args.model}"
                raise UserError(f"{error}; {other}") from None
        raise


@cache
def call_without_memory(model, image_size, own):
    """Builds a network of ours with the constructor arguments `own`, and calls it, on the meta
    device: once, however many trainings of it a study has."""
    with torch.device("meta"), torch.no_grad():
        images = torch.empty(2, 3, image_size, image_size)
        build_model(model, 2, image_size, **dict(own))(images)


def check_pass(args, bare, num_classes, device, training):
    """A pass of what check_network could not try: another's network, and in training one image, of
    which BatchNorm may want two numbers or more."""
    m, what = 2, args.model
    if training:
        m, what = min(args.micro_batch, 2), f"{args.model}, --micro-batch {args.micro_batch}"
    if m == 1 or family(args.model) in ("torchvision", "timm"):
        with as_user_error(what), torch.no_grad():
            images = torch.zeros(m, 3, args.image_size, args.image_size, device=device)
            logits = copy.deepcopy(bare).train(training)(images.to(next(bare.parameters()).dtype))
            if getattr(logits, "shape", None) != (m, num_classes):
                raise ValueError(
                    f"{'in training ' * training}it returns {type(logits).__name__} "
                    f"{list(getattr(logits, 'shape', []))} for {m} images, not logits alone"
                )


def too_narrow_for_channels_last(network):
    """Whether oneDNN writes past its memory in the backward pass of one of its convolutions: 1×1,
    strided, of fewer channels than a vector register holds, at most 16 (oneDNN issue 6035, in torch
    2.11 and 2.14): crashes, waits for ever or wrong gradients."""
    return any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels < 16
        for module in network.modules()
    )


def starting_network(args, origin, num_classes, device, tell):
    """The network of --model with the weights of --init-from, if that is given, behind its
    normalisation, on the device; args.mean and args.std become what was used."""
    torch.manual_seed(args.seed)
    with as_user_error(args.model):
        network = build_model(args.model, num_classes, args.image_size, **knobs(args))
    if args.init_from:
        file, weights, reset_head = args.init_from, args.weights, args.reset_head
        ckpt = Path(args.out_dir) / "ckpt.pt"
        if args.resume and not args.eval_only and os.path.exists(ckpt):
            # it has all that the run needs
            file, weights, reset_head = ckpt, "model", False
        normalisation = on_main(lambda: load_weights(network, file, weights, reset_head))
        if origin["mean"] == origin["std"] == "command line":
            normalisation = args.mean, args.std
        if normalisation is None and family(args.model) in PUBLISHED_BY_TORCHVISION:
            normalisation = IMAGENET_PIXELS["mean"], IMAGENET_PIXELS["std"]
            tell(
                f"{args.init_from} is taken for one of torchvision's: inputs are normalised by "
                "ImageNet's mean and standard deviation; --mean and --std set others"
            )
        if normalisation is None:
            raise UserError(
                f"{args.init_from} does not say how its inputs were normalised: give --mean and "
                "--std (torchvision's: 0.485 0.456 0.406, 0.229 0.224 0.225)"
            )
        if (
            origin["mean"] not in ("default", "command line")
            and not args.eval_only
            and (normalisation != (args.mean, args.std))
        ):
            tell(
                f"inputs are normalised as for {args.init_from}: mean {normalisation[0]}, std "
                f"{normalisation[1]}, not as in {args.recipe}"
            )
        args.mean, args.std = normalisation
    precision = torch.float64 if args.dtype == "float64" else torch.float32
    bare = assemble(network, args.mean, args.std).to(device, precision)
    if args.channels_last and device.type == "cpu" and too_narrow_for_channels_last(network):
        if origin["channels_last"] == "command line":
            raise UserError(
                "--channels-last: on the CPU strided 1×1 convolutions of fewer than 16 channels "
                "go wrong so (oneDNN issue 6035): leave it out, or take a wider network"
            )
        args.channels_last = False
    if args.channels_last:
        bare = bare.to(memory_format=torch.channels_last)
    if dist.is_initialized():
        for tensor in network.state_dict().values():  # only the first process has read --init-from
            dist.broadcast(tensor, src=0)
    return bare


def scope(network, pattern):
    """The parameters of a network whose names a regular expression is found in."""
    names = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with as_user_error(f"--sam-scope {pattern}"):
        found = [p for name, p in names.items() if re.search(pattern, name)]
        if not found:
            raise ValueError(
                f"no trained parameter's name matches; there are {', '.join(list(names)[:2])}, …, "
                f"{list(names)[-1]}"
            )
    return found


def make_optimizer(args, model, device):
    """--optimizer over the trained parameters; fused where there is such a kernel."""
    groups = [
        dict(params=params, weight_decay=decay)
        for params, decay in zip(decay_groups(model, args.decay), (args.weight_decay, 0.0))
        if params
    ]
    betas, fused = (args.beta1, args.beta2), device.type in ("cpu", "cuda")
    kind, own = {
        "adamw": (torch.optim.AdamW, dict(betas=betas, eps=args.eps, fused=fused)),
        "lamb": (LAMB, dict(betas=betas, eps=args.eps)),
        "rmsprop": (
            torch.optim.RMSprop,
            dict(alpha=args.beta2, eps=args.eps, momentum=args.momentum),
        ),
        "sgd": (torch.optim.SGD, dict(momentum=args.momentum, nesterov=args.nesterov, fused=fused)),
    }[args.optimizer]
    optimizer = kind(groups, lr=args.lr, **own)
    if args.optimizer == "sgd" and args.momentum:
        # If the first step is skipped, the fused kernel would leave these uninitialised.
        for p in model.parameters():
            if p.requires_grad:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def averaging(model, device):
    """The model, if there are several processes so wrapped that they average its gradients: those
    of the passes outside `quiet`."""
    if not dist.is_initialized():
        return model
    with warnings.catch_warnings():  # 2.15 renames broadcast_buffers, 2.11 lacks the new name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def quiet(model, sends):
    """Context of a forward pass of `averaging`'s model, in which DistributedDataParallel decides
    whether the backward pass sends: once a step, for the last micro-batch at w + ε. SAM's first
    pass, by torch.autograd.grad, never does."""
    return model.no_sync() if dist.is_initialized() and not sends else nullcontext()


def autocast_of(args, device):
    """The context of a forward pass in --dtype."""
    half = args.dtype in ("bfloat16", "float16")
    return torch.autocast(device.type, getattr(torch, args.dtype)) if half else nullcontext()


def load_optimizer(optimizer, state):
    """Its state, of a run that may have computed on another device: in the layout of the parameters
    here, which fused kernels suppose, and by the kernels that are here."""
    for group in state["param_groups"]:
        if "fused" in group:
            group["fused"] = optimizer.defaults["fused"]
    optimizer.load_state_dict(state)
    for p, of in optimizer.state.items():
        for name, value in of.items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape and p.ndim:
                of[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def seed_draws(seed, device):
    """torch.manual_seed, but of the CPU alone if that is what computes: torch's formats a traceback
    at each call, to tell of CUDA's seed later, which takes about a millisecond."""
    (torch.default_generator if device.type == "cpu" else torch).manual_seed(seed)


def measure(what, dataset, model, args, device, workers, attack=False, mix=None):
    """`evaluate` on a data set; attack: also "pgd", if --eval-adv is given; mix: a micro-batch's
    (x, y) -> (x, shares), drawn from the run's seed."""

    def seeded_mix(number, x, y):
        seed_draws(data.key(args.seed, -1, rank() + number * world_size(), 2), device)
        return mix(x, y)

    if mix is None:
        loader = own_share(dataset, device, workers, images_at_once(model, args.image_size, device))
    else:  # in micro-batches, which are the same on any number of processes
        pairs, m = [(0, i) for i in range(len(dataset))], args.micro_batch
        micros = [pairs[i : i + m] for i in range(rank() * m, len(pairs), world_size() * m)]
        loader = data.loader(dataset, micros, workers, device.type == "cuda")
    with progress(len(loader), what, "batch") as bar:
        result = evaluate(
            model,
            loader,
            device,
            autocast_of(args, device),
            bar,
            mix=seeded_mix if mix else None,
        )
    if attack and args.eval_adv:
        with progress(len(dataset), f"{what}, PGD-10") as bar:
            result["pgd"] = pgd_10(
                model, dataset, args.image_size, device, workers, bar, args.adv_eps or 2 / 255
            )
    return result


def evaluate_only(args, origin, device, on_machine, tell):
    """--eval-only."""
    if origin["hold_out"] == "command line":
        raise UserError("--hold-out is for training; --eval-only evaluates all of --eval-split")
    classes = own_checkpoint(args.init_from).get("classes")
    dataset = load_split(args, args.eval_split, device, tell, classes=classes)
    model = starting_network(args, origin, len(dataset.classes), device, tell)
    check_pass(args, model, len(dataset.classes), device, training=False)
    tell(f"{args.model} from {args.init_from} on {args.dataset}")
    if args.hold_out != "0" and args.eval_split == "val":
        tell(
            f"its run validated on {args.hold_out} of the training images (--hold-out); these are "
            "the data set's own validation images"
        )
    if args.dry_run:
        tell("a dry run stops here, nothing is evaluated")
        return 0
    workers = worker_count(args, dataset, on_machine)
    result = measure("evaluation", dataset, model, args, device, workers, attack=True)
    print_table(tell, {args.eval_split: result})
    return 0


def comparison(args, origin, on_machine):
    """The command of the same training with SAM, or without if this one had it."""
    other = 0 if args.sam_rho else PAPER_RHO[kind_of_training(args)].get(args.model, 0.03)
    same = [
        word
        for name, setter in origin.items()
        if setter == "command line"
        and name not in ("sam_rho", "out_dir", "resume")
        and not (args.sam_rho and name.startswith("sam_"))
        for word in as_flag(name, args)
    ]
    launch = f"torchrun --nproc_per_node={on_machine}" if dist.is_initialized() else "python"
    if world_size() > on_machine:
        launch = (
            f"torchrun --nnodes={world_size() // on_machine} --nproc_per_node={on_machine} "
            "--rdzv-backend=c10d --rdzv-endpoint=HOST:29500"
        )
    return f"{launch} train.py {shlex.join([*same, '--sam-rho', f'{other:g}'])}"


def without_effect(args, origin):
    """Flags of the command line that nothing of this run reads."""
    unused = dict(
        eval_split=True,
        weights=not args.init_from,
        flip=args.augment == "none",
        temperature=args.loss != "supcon",
        projection_dim=args.loss != "supcon",
        momentum=args.optimizer not in ("sgd", "rmsprop"),
        beta1=args.optimizer not in ("adamw", "lamb"),
        beta2=args.optimizer == "sgd",
        eps=args.optimizer == "sgd",
        lr_end=args.lr_schedule == "constant",
        randaugment_prob=not args.randaugment[0],
        randaugment_of=not args.randaugment[0],
        ema_every=not args.ema_decay,
    )
    if args.eval_only:
        unused = {name: name not in OF_EVALUATION for name in origin}
        unused["adv_eps"] = not args.eval_adv
        unused["recipe"] = args.recipe == args.init_from  # of our checkpoints the run's counts
    for name in ("init", "zero_init", "head_bias"):  # whose place the weights of a file take
        unused[name] = bool(args.init_from) and not args.reset_head
    for name in ("dropout", "drop_path"):  # nothing drops in evaluation mode
        unused[name] = args.eval_only or args.train_only == "head"
    return [flag(n) for n, idle in unused.items() if idle and origin[n] == "command line"]


def run(args, origin):
    """One training, from top to bottom: data, model, optimizer, what will happen, resume, the loss
    of a micro-batch, the loop, the final numbers; or --eval-only, --dry-run. -> exit status."""
    check_network(args)
    device, world, on_machine = start_processes(args.device)
    main_process = rank() == 0
    tell = say if main_process else lambda text="": None
    chosen = "\n".join(
        [f"recipe    {args.recipe}"]
        + [
            f"  {name.replace('_', '-'):<16} {value!s:<14} ({origin[name]})"
            for name, value in vars(args).items()
            if origin[name] != "default"
        ]
    )
    idle = without_effect(args, origin)
    if idle:
        tell(f"without effect in this run: {' '.join(idle)}")
    if args.dry_run:  # before anything can be missing
        tell(chosen)
    if any(args.expect) and not args.eval_only:
        steps, seconds = expected(args, complexity_of(args)["macs"], *args.expect)
        if math.isnan(seconds):
            raise UserError(f"--expect: the arithmetic of {args.model} cannot be counted")
        tell(
            f"expected  {in_hours(steps * seconds)} hours of {steps:,} steps, "
            f"{args.batch_size / seconds:,.3g} images/s, on {args.expect[0]:g} devices that "
            f"sustain {args.expect[1]:g} TFLOP/s each, without evaluations and waiting"
        )
    share = args.micro_batch * world
    if args.batch_size % share and not args.eval_only:
        near = max(args.batch_size // share, 1) * share
        fits = [m for m in range(1, args.micro_batch) if args.batch_size % (m * world) == 0]
        raise UserError(
            f"batch size {args.batch_size} is not a multiple of micro-batch {args.micro_batch} × "
            f"{world} devices = {share}: use --batch-size {near}"
            + (f" or --micro-batch {fits[-1]}" if fits else "")
        )
    # One process fetches; then, where machines do not share the disk, one of each; the others find.
    for fetches in (main_process, os.environ.get("LOCAL_RANK", "0") == "0"):
        if args.download and fetches:
            load_split(args, "train", device, tell)
        if args.download and dist.is_initialized():
            dist.barrier()
    if args.eval_only:
        return evaluate_only(args, origin, device, on_machine, tell)

    # ---- data
    train_set, val_set, augmented_sample, train_sample = load_training(args, device, tell)
    num_classes = len(train_set.classes)
    workers = worker_count(args, train_set, on_machine)
    mix = mixing(args, num_classes)

    # ---- model
    bare = starting_network(args, origin, num_classes, device, tell)
    check_pass(args, bare, num_classes, device, training=args.train_only != "head")
    model, network = bare, bare.network
    _, head = classifier(network)
    supcon, projection = args.loss == "supcon", None
    if supcon and "pre_logits" not in getattr(network, "intermediates", ()):
        raise UserError(
            f"--loss supcon: {args.model} does not tell its representation, pre_logits; ViT, PiT, "
            "Mixer, ResNet, AlterNet and Swin do"
        )
    if args.train_only == "head":
        if head is None:
            raise UserError(f"--train-only head: {args.model} has no linear classifier")
        bare.requires_grad_(False).eval()
        head.requires_grad_()
    ema = copy.deepcopy(bare).requires_grad_(False) if args.ema_decay else None
    if supcon:
        head.requires_grad_(False)
        model = Contrastive(bare, head.in_features, args.projection_dim).to(head.weight)
        projection = model.projection

    # ---- optimization
    steps_per_epoch = len(train_set) // args.batch_size
    if steps_per_epoch == 0:
        n = len(train_set)
        fits = f"--batch-size {n // share * share}"
        if n < share:
            fits = f"--batch-size {n // world * world} --micro-batch {n // world}"
        raise UserError(
            f"the training set has {n:,} images, fewer than one batch of {args.batch_size:,}: use "
            + (fits if n >= world else f"at most {n} processes")
        )
    warmup_steps = args.warmup_steps + round(args.warmup_epochs * steps_per_epoch)
    total_steps = args.epochs * steps_per_epoch or args.max_steps
    last_step = min(args.max_steps or total_steps, total_steps)
    kept = {}  # file -> step after which it is written
    for epoch in args.keep_epochs:
        if epoch == "warmup":
            kept["warmup.pt"] = warmup_steps
            if not warmup_steps:
                raise UserError("--keep-epochs warmup: this run has no warm-up")
        else:
            kept[f"epoch{epoch}.pt"] = int(epoch) * steps_per_epoch
    late = [name for name, at in kept.items() if at > last_step]
    micro_batches = args.batch_size // args.micro_batch
    own_micros = range(rank() * micro_batches // world, (rank() + 1) * micro_batches // world)

    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(args, model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
    autocast, statistics = autocast_of(args, device), RunningStatistics(network)
    model = torch.compile(model) if args.compile else model
    model = averaging(model, device)
    sam = look = None
    if args.sam_rho:
        moved = scope(network, args.sam_scope) if args.sam_scope else params
        sam = SAM(
            model, args.sam_rho, steps=args.sam_steps, adaptive=args.sam_adaptive, params=moved
        )
        if args.sam_every > 1 and args.sam_reuse:
            look = LookSAM(moved, args.sam_reuse)
    adv_step_size = args.adv_step_size or 1.25 * args.adv_eps
    criterion = {"softmax": softmax_loss, "sigmoid": sigmoid_loss, "supcon": None}[args.loss]

    # ---- what will happen
    if not args.dry_run:
        tell(chosen)
    whole, used, where = len(train_set.labels), len(train_set), ""
    if args.hold_out != "0":
        used, where = used + len(val_set), ", held out of the training set"
    part = f" (a fraction {args.train_fraction} of {whole:,})" if used < whole else ""
    tell(
        f"data      {args.dataset}: {len(train_set):,} training{part} and {len(val_set):,} "
        f"validation images{where}, {num_classes:,} classes, {args.image_size}×{args.image_size}, "
        f"augmentation {args.augment}, {workers} workers per device"
    )
    if args.dataset == "imagenet" and num_classes != 1000:
        tell(f"          {num_classes} classes, where ImageNet-1k has 1,000")
    tell(
        f"model     {args.model}: {sum(p.numel() for p in params):,} parameters, {args.loss} loss"
        + ", only of the classifier" * (args.train_only == "head")
    )
    if supcon:
        tell(
            "          accuracies are of the nearest class mean, not of a classifier that was "
            "trained: --train-only head trains one"
        )
    tell(f"device    {world} × {device.type}, {args.dtype}{', compiled' * args.compile}")
    method = "without SAM"
    if sam:
        method = f"SAM with ρ = {args.sam_rho:g} on "
        method += "the whole batch" if args.sam_sync else "each micro-batch"
        if args.sam_every > 1:
            method += f" in one step of {args.sam_every}"
        if args.sam_scope:
            method += f", moving {sum(p.numel() for p in moved):,} parameters"
    tell(
        f"step      {args.batch_size:,} images = {world} devices × {micro_batches // world} "
        f"micro-batches × {args.micro_batch} images, "
        + "each in two views, " * supcon
        + method
        + f", images moved by at most {255 * args.adv_eps:.4g}/255" * (args.adv_eps > 0)
    )
    tell(
        f"schedule  {last_step:,} steps"
        + f" of {total_steps:,}" * (last_step < total_steps)
        + f", {steps_per_epoch:,} per epoch; {args.optimizer}, learning rate {args.lr:g} after "
        f"{warmup_steps:,} steps, then {args.lr_schedule}"
    )
    if warmup_steps >= last_step:
        tell("          the warm-up is as long as the run or longer")
    if late:
        tell(f"          the run ends before {' '.join(late)} of --keep-epochs")
    if args.dry_run:
        holds = ", which holds a run already" * os.path.exists(Path(args.out_dir) / "ckpt.pt")
        tell(f"run       {args.out_dir}{holds}: a dry run stops here, nothing is written")
        return 0

    # ---- run folder, resume
    versions = dict(
        torch=torch.__version__, torchvision=torchvision.__version__, python=sys.version.split()[0]
    )
    config = dict(
        settings=vars(args),
        command=sys.argv,
        versions=versions,
        data=dict(training=train_set.fingerprint(), validation=val_set.fingerprint()),
    )
    folder = RunFolder(args.out_dir)
    state = on_main(lambda: folder.open(config, args.resume))
    networks = dict(model=network, ema=ema and ema.network, projection=projection)
    step, evaluated, best, result = 0, 0, -1.0, None
    saved = prepared = None  # step of ckpt.pt, and of the class means (prepare_classifier)
    # Sums over the log interval: [0] loss of the first passes, [1] gradient norm and [2] training
    # error of the steps taken, [3] steps skipped, [4] all steps; and [5] the steps skipped in a
    # row. On the device, so that no step waits for it.
    window = torch.zeros(6, device=device)
    if state is not None and state["step"] >= last_step and "final" in state:
        tell(f"{args.out_dir} is finished")
        print_table(tell, state["final"])
        return 0
    if state is not None:
        with as_user_error(f"{args.out_dir}/ckpt.pt does not fit this run"):
            for name, part in (networks | dict(scaler=scaler, look=look)).items():
                if part is not None:
                    part.load_state_dict(state[name])
            load_optimizer(optimizer, state["optimizer"])
        step, evaluated, best = state["step"], state["evaluated"], state["best"]
        saved = step
        own = len(state["windows"]) == world  # else the mean over the processes that there were
        window.copy_(state["windows"][rank()] if own else state["windows"].mean(0))
        tell(f"resumed   {args.out_dir}/ckpt.pt at step {step:,}")
        passed = [name for name, at in kept.items() if at <= step]
        passed = on_main(lambda: [name for name in passed if not (folder.path / name).exists()])
        if passed:
            tell(f"          it has passed {' '.join(passed)} of --keep-epochs: not written")
    if main_process:
        folder.cut_log(step, evaluated)
    anew = args.resume and state is None
    tell(f"run       {args.out_dir}{': nothing to resume there, so it starts' * anew}")

    def all_windows():
        windows = [torch.zeros_like(window) for _ in range(world)]
        dist.all_gather(windows, window) if dist.is_initialized() else windows[0].copy_(window)
        return torch.stack(windows).cpu()  # (processes, 6)

    def checkpoint(name, **more):
        prepare_classifier()
        if main_process:
            weights = {part: one and one.state_dict() for part, one in networks.items()}
            folder.save(
                name,
                dict(
                    weights,
                    step=step,
                    evaluated=evaluated,
                    best=best,
                    settings=vars(args),
                    classes=train_set.classes,
                    **more,
                ),
            )

    def save_checkpoint(**more):
        nonlocal saved
        windows = all_windows()
        if windows[0, 5] and not more:  # weights that gave it are not worth the file's last ones
            return tell(f"step {step:6,}  not saved: its gradient was not finite")
        saved = step
        checkpoint(
            "ckpt.pt",
            windows=windows,
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
            look=look and look.state_dict(),
            **more,
        )

    def log(**record):
        if main_process:
            folder.log(step=step, epoch=step / steps_per_epoch, **record)

    # ---- measuring
    measured = partial(measure, model=ema or bare, args=args, device=device, workers=workers)

    def prepare_classifier():
        """Contrastive training has none of its own: evaluations and checkpoints have the nearest
        class mean's."""
        nonlocal prepared
        if not supcon or prepared == step:
            return
        prepared = step
        for each in (bare, ema):
            if each is not None:
                set_class_means(
                    each,
                    own_share(train_sample, device, workers, 256),
                    device,
                    autocast,
                    args.temperature,
                )

    def validate():
        nonlocal evaluated, best, result, since, started
        before = time.perf_counter()
        prepare_classifier()
        result, evaluated = measured("validation", val_set, attack=True), step
        log(val=result)
        tell(
            f"step {step:6,}  validation{', nearest class mean' * supcon}: top-1 "
            f"{result['top1']:.2f} %, top-5 {result['top5']:.2f} %, NLL {result['nll']:.4f}, ECE "
            f"{result['ece']:.2f} %" + (f", PGD-10 {result['pgd']:.2f} %" if args.eval_adv else "")
        )
        if result["top1"] > best and saved is not None:  # best.pt means that there was a ckpt.pt
            best = result["top1"]
            checkpoint("best.pt", val=result)
        since, started = (t + time.perf_counter() - before for t in (since, started))

    def evaluation_is_due():
        at_epoch = step % (args.eval_every * steps_per_epoch) == 0
        return evaluated < step and (at_epoch or step == last_step)

    # ---- the loss of a micro-batch
    # micro-batch -> its loss and, against the larger share of its labels, error in the first pass:
    # at w; with --adv-eps on the random start of δ
    first_passes = {}
    pulls = {}  # micro-batch -> gradient of the whole batch's supcon loss by its projections
    together = []  # micro-batches that share an ε: one, or with --sam-sync all; or a loss

    def contrast():
        """The loss of the whole batch, and its gradient by each own micro-batch's projections,
        which loss_of then sends on into the network: in all, the loss's exact gradient."""
        z = []
        for micro, x, *_ in together:
            seed_draws(data.key(args.seed, step, micro), device)
            with torch.no_grad(), autocast:
                z.append(model(x))
        z = at_least_float32(torch.cat(z))
        loss, grad = supcon_of_all(z, torch.cat([y for _, _, y, _ in together]), args.temperature)
        pulls.update(zip(own_micros, grad.chunk(len(own_micros))), loss=loss)

    def loss_of(micro, x, y, sends=False):
        if supcon and micro == own_micros[0]:  # a pass over the batch begins, at w or w + ε
            contrast()
        seed_draws(data.key(args.seed, step, micro), device)  # its masks, alike in all its passes
        statistics.begin_pass()
        with quiet(model, sends), autocast:
            logits = model(x)
        logits = at_least_float32(logits)
        if supcon:  # the mean of this over the micro-batches has the loss's value and gradient:
            # logits - logits.detach() is 0, and its product with pulls sends the gradient on
            along = ((logits - logits.detach()) * pulls[micro]).sum()
            loss = pulls["loss"] + micro_batches * along
        else:
            loss = criterion(logits, y, args.label_smoothing)
        if micro not in first_passes:
            wrong = logits.argmax(1) != (y.argmax(1) if y.is_floating_point() else y)
            first_passes[micro] = torch.stack([loss.detach(), wrong.to(loss.dtype).mean()])
            statistics.end_pass()  # later passes leave BatchNorm's statistics as they are
        return scaler.scale(loss)

    # ---- the loop
    # Which images each step takes is a function of seed and step alone (see data.TrainOrder),
    # so a resumed run goes on with the same ones. Here: this process's micro-batches.
    order = data.TrainOrder(
        len(train_set),
        args.batch_size,
        args.micro_batch,
        args.seed,
        start=step,
        stop=last_step,
        rank=rank(),
        world=world,
        repeats=args.repeated_augment,
        views=2 if supcon else 1,
    )
    stream = data.batches(data.loader(train_set, order, workers, args.device == "cuda"), tell=say)
    stop = StopSignal()
    bar = progress(last_step, unit="step", leave=True, initial=step)
    images = since_images = 0
    started = since = time.perf_counter()  # moved on by the time that evaluations take
    if evaluation_is_due():  # the run was stopped between a checkpoint and its evaluation
        validate()
    while step < last_step:
        stopped = stop.agreed()
        if stopped:
            save_checkpoint()
            bar.close()
            what = "nothing saved" if saved is None else f"saved at step {saved:,}"
            tell(
                f"stopped by {signal.Signals(stopped).name}, {what}; to go on, repeat the command "
                "with --resume"
            )
            return 128 + stopped
        lr = learning_rate(step, total_steps, warmup_steps, args.lr, args.lr_schedule, args.lr_end)
        for group in optimizer.param_groups:
            group["lr"] = lr
        perturbed = sam is not None and step % args.sam_every == 0
        first_passes.clear()
        # Every micro-batch starts from the same running statistics of BatchNorm and the step keeps
        # their mean: else the result would depend on how many devices share the step.
        statistics.begin_step()
        for micro in own_micros:
            x, y = next(stream)
            x, y = (t.to(device, non_blocking=args.device == "cuda") for t in (x, y))
            x = to_float(x, model)
            seed_draws(data.key(args.seed, step, micro, 2), device)  # 2: apart from the masks'
            x, y = mix(x, y)
            start = x
            if args.adv_eps:
                start = adversarial.uniform_start(x, args.adv_eps).requires_grad_()
            together.append((micro, x, y, start))
            if (args.sam_sync or supcon) and micro != own_micros[-1]:
                continue
            losses = [partial(loss_of, micro, start, y) for micro, _, y, start in together]
            ascent = nullcontext()
            if perturbed:  # its first pass runs `losses` at w, for ε = ρ·g/‖g‖ (SAM._epsilon)
                ascent = sam.perturb(
                    losses,
                    inputs=[start for *_, start in together] if args.adv_eps else [],
                    sync=args.sam_sync and world > 1,
                    keep_grads=look is not None,
                )
            with ascent as first:  # the weights are w + ε in here; without SAM, w
                for i, (m, x, y, start) in enumerate(together):
                    if args.adv_eps:  # at x + δ; ε and δ come from one pass at (w, start): Eq. 5
                        if perturbed:
                            grad = first.input_grads[i]
                        else:
                            (grad,) = torch.autograd.grad(losses[i](), start)
                        x = adversarial.ascend(start, grad, x, args.adv_eps, adv_step_size)
                    loss = loss_of(m, x, y, sends=m == own_micros[-1])
                    (loss / len(own_micros)).backward()  # DDP: then the mean over the processes
            if look is not None and perturbed:
                look.note(first.grads, len(together) / len(own_micros))
            together.clear()

        norm, skip = update(
            optimizer,
            scaler,
            params,
            args.grad_clip,
            statistics,
            micro_batches,
            look and partial(look.step, perturbed),
        )
        if ema is not None and step % args.ema_every == 0:
            if args.ema_alpha:  # Xiao's: a copy of the weights until the warm-up is over
                decay = args.ema_decay if step >= warmup_steps else 0.0
            else:
                decay = min(args.ema_decay, (1 + step) / (10 + step))
            move_average(ema.network, network, decay)
        loss, error = torch.stack(list(first_passes.values())).mean(0)
        taken = [torch.where(skip > 0, 0.0, value.float()) for value in (loss, norm, error)]
        window[:5] += torch.stack([*taken, skip, torch.ones_like(skip)])
        window[5] = (window[5] + 1) * skip
        step += 1
        images += args.batch_size
        bar.update()

        if step == last_step or step % args.log_every == 0:
            # the one wait for the device
            *sums, skipped, steps, in_a_row = all_windows().mean(0).tolist()
            window[:5].zero_()
            now = time.perf_counter()
            speed, since, since_images = (images - since_images) / (now - since), now, images
            count = steps - skipped
            mean_loss, mean_norm, mean_error = (v / count if count else math.nan for v in sums)
            log(
                loss=mean_loss,
                error=None if supcon else 100 * mean_error,
                lr=lr,
                grad_norm=mean_norm,
                skipped=int(skipped),
                images_per_second=speed,
            )
            tell(
                f"step {step:6,}  epoch {step / steps_per_epoch:6.2f}  loss {mean_loss:7.4f}  lr "
                f"{lr:.2e}  gradient norm {mean_norm:7.3f}  {speed:7,.0f} images/s"
                + f"  {int(skipped)} steps skipped: their gradient was not finite"
                * (skipped > 0)
            )
            if in_a_row >= MOST_SKIPPED:
                log(diverged=True)
                last_good = "nothing was saved before"
                if saved is not None:
                    last_good = (
                        f"{args.out_dir}/ckpt.pt is of step {saved:,}, with finite gradients"
                    )
                raise UserError(
                    f"the last {int(in_a_row)} gradients were not finite: stopped at step "
                    f"{step:,}, learning rate {lr:.3g}; " + last_good
                )
        for name, at in kept.items():
            if at == step:
                checkpoint(name)  # before the run's own, so that no kill comes between
        if (
            step == last_step
            or step % steps_per_epoch == 0
            or (args.save_every and step % args.save_every == 0)
        ):
            save_checkpoint()  # before the evaluation, which may be long
        if evaluation_is_due():
            validate()
    bar.close()
    stop.end()  # ckpt.pt has the last step: --resume repeats the evaluations alone

    # ---- the end
    speed = images / (time.perf_counter() - started) if images else math.nan
    if result is None:  # else it is as validate() left it
        prepare_classifier()
    final = {"training": measured("training", train_sample, attack=True)}
    # Park & Kim's training NLL (A.2) is that of augmented images; as in their code, without dropout
    # and, where images are mixed, against the shares of their labels (which it smooths, too).
    if augments(args):
        final["training, augmented"] = measured("training, augmented", augmented_sample)
    if args.mixup or args.cutmix:
        # files are in the order of their classes: like would be mixed with like
        draws = torch.Generator().manual_seed(data.key(args.seed, 3))
        augmented_sample.restrict(torch.randperm(len(augmented_sample), generator=draws))
        final["training, mixed"] = measured("training, mixed", augmented_sample, mix=mix)
    final["validation"] = result or measured("validation", val_set, attack=True)
    log(final=final, images_per_second=speed)
    first = saved is None  # every save before this one was withheld
    best = final["validation"]["top1"] if first else best
    save_checkpoint(final=final)
    if first:
        checkpoint("best.pt", val=final["validation"])
    print_table(tell, final)
    tell(
        (f"{speed:,.0f} images/s; " if images else "")
        + f"checkpoint {args.out_dir}/ckpt.pt; best validation accuracy {best:.2f} % in best.pt"
    )
    tell(f"to compare: {comparison(args, origin, on_machine)}")
    return 0


def one_line(error):
    """What was typed may hold line ends."""
    return str(error).replace("\n", "\\n")


def want_of_memory(error):
    """A sentence if this is what Python, torch or CUDA say where memory ends, else an empty one."""
    if str(error).startswith("DataLoader worker"):  # it died while this process computed
        return data.LOST
    if not (
        isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
    ):
        return ""
    found = re.search(r"allocate ([\d.]+ \w+)", str(error))
    of = f" of {found[1]}" if found else ""
    return f"memory is short{of}: smaller batches, or less of what was asked for, take less"


def want_of_compiler(error):
    """A sentence if this is torch.compile's, else an empty one."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return ""
    return f"torch.compile failed: {str(error).splitlines()[0]}; --no-compile goes without"


# What one process may meet alone, while the others are well and wait for it.
LONE = (data.DataError, LoneError, WriteError, BrokenPipeError, MemoryError, RuntimeError)


def answer(program, function, again):
    """Calls function -> exit status: what it returns or 0; 2 for what the user has to set right
    and for want of memory, 130 for Ctrl-C, 141 if nobody reads the output any more. again: how the
    work then goes on."""
    owns_group, status = not dist.is_initialized(), 0
    for stream in (sys.stdout, sys.stderr):  # ± is ? where an encoding lacks it; a line is out at
        # once, to a file or pipe too, and say learns whether it could be written
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace", line_buffering=True)
    handlers = {number: signal.getsignal(number) for number in StopSignal.SIGNALS}
    try:
        status = function() or 0
    except LONE as error:
        status = 2
        if isinstance(error, BrokenPipeError):  # | head: the end would flush into it again
            status = 128 + signal.SIGPIPE
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        elif isinstance(error, (MemoryError, RuntimeError)):
            want = want_of_memory(error) or want_of_compiler(error)
            if not want:
                raise
            print(f"{program}: {want}", file=sys.stderr, flush=True)
        else:
            print(f"{program}: {one_line(error)}; {again}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(status)  # perhaps the others are well, and wait for this one for ever
    except UserError as error:
        own, here = (os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        if not (own.isdecimal() and here.isdecimal() and 0 < int(own) < int(here)):
            print(f"{program}: {one_line(error)}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"stopped; {again}", file=sys.stderr)
        status = 128 + signal.SIGINT
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if owns_group and dist.is_initialized():
        dist.destroy_process_group()
    return status


def main(argv=None):
    """-> exit status, of `answer`; 128 + signal for a run that was stopped by one and saved."""

    def command():
        args, origin = settings(argv)
        if args.list_models:
            return list_models()
        if args.list_recipes:
            return list_recipes(args.expect)
        return run(args, origin)

    evaluates = "--eval-only" in (sys.argv if argv is None else argv)
    again = "then repeat the command" if evaluates else "then go on with --resume"
    return answer("train.py", command, again)


if __name__ == "__main__":
    sys.exit(main())
