"""Data sets of the three papers, the same images in the same order on any number of devices.

Chen et al. 2021 (arXiv 2106.01548): ImageNet with "Inception-style" preprocessing (Table 8),
class-balanced fractions (§5.1). `shapes` is built in: 12 silhouettes at 32×32, nothing downloaded,
made so that a linear model fails, a small ResNet solves it and a small ViT is in between.
Published robustness benchmarks are read by `benchmark`; `Corrupted`, c-lite, is ours.

Choices:
- A loader yields micro-batches, (uint8 images (m, 3, H, W), int64 labels (m,)); float conversion
  and normalisation happen on the device. The unit that a worker prepares is one micro-batch.
- Which images form step t and how image i of epoch e is augmented depends on (seed, e, i) alone:
  not on workers, processes or interruptions. The incomplete last batch of an epoch is dropped.
- Data sets that fit into memory live on the device, where a micro-batch is augmented at once
  (InMemory). Of a JPEG, training decodes only the rows down to its crop (decode).
- Inception-style is a crop of 5-100 % of the area (not torchvision's 8 %), aspect 3/4-4/3, bilinear
  without antialiasing, and a flip. The area is uniform and the aspect log-uniform, as torchvision
  has it; TensorFlow's, in the authors' public code, draws a side, and so smaller crops. Evaluation
  resizes the short side to 256/224 of the size and crops the centre, as big_vision does, but by
  antialiased bilinear in place of its area filter.

    python data.py                    sizes and speed of `shapes` (10 s)
    python data.py sheet              contact sheet of `shapes` as shapes.png
    python data.py pack --data-dir FOLDER --out FILE      one file of a million images, see Pack
    python data.py bench              speed of loading, against torchvision's reference (30 s)
Shape letters: N images, m of a micro-batch, H height, W width.
"""

import argparse
import atexit
import copy
import fcntl
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import struct
import sys
import tempfile
import time
import weakref
import zlib
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageFile, ImageFilter, features
from torchvision import transforms as v1
from torchvision.datasets import CIFAR10, CIFAR100, Flowers102, OxfordIIITPet
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm


class DataError(Exception):
    """Something about the data that only the user can set right; its text is one line that
    says what and how."""


def show(path):
    """A path for a message: one printable line whatever bytes it has."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- shapes: a data set without a download -------------------------------------------------------
#
# Twelve light silhouettes on dark ground: moved, scaled, stretched, turned (at most 25°, so that no
# class becomes another), striped, partly covered, unevenly lit, noisy. Under such shifts templates
# fail, and equal areas hide the rest from a linear model; the outlines are left, which convolutions
# find from few images. Of other images a linear model gets 22 % right, train.py's ViT without SAM
# 86 %, ResNet-18 of width 16 after 3 epochs 99 %.
#
# Every pixel is a function of (seed, index, size) alone, with the same bits on every machine. The
# generator counts: nothing is drawn in sequence. The pixels need only operations that IEEE 754
# rounds exactly (+ - * / sqrt floor abs min max, comparisons), one element at a time, in float32.
# So there is no sin, exp or power (the math library decides their last bit) and no sum over an axis
# or matrix product (their order varies): angles are rational points of the circle, waves are
# polynomials, vertices are literals; and numpy, because torch may fuse a multiply and an add. (A
# constant stands in np.float32() where NumPy 1, unlike NumPy 2, would go on in float64.)
SHAPES_CLASSES = tuple("disc square triangle star plus crescent heart arrow L T Z bolt".split())
SHAPES_SPLITS = {  # first index, images
    "train": (0, 8_000),
    "val": (2**30, 2_000),
    "test": (2**31, 10_000),
}
# Outlines: corners "x y" in units of the half-size, x to the right and y up; the heart's is a
# square below two discs, see _distance. All have about the area 1.75 and the centroid 0: with the
# outlines merely drawn into a box, brightness and its centre gave a linear model 29 %.
_OUTLINES = {
    "square": "-0.66 -0.66, 0.66 -0.66, 0.66 0.66, -0.66 0.66",
    "triangle": "-1 -0.58, 1 -0.58, 0 1.16",
    "star": (
        "0 1.15, -0.306 0.421, -1.094 0.355, -0.495 -0.161, -0.676 -0.93, 0 -0.52, "
        "0.676 -0.93, 0.495 -0.161, 1.094 0.355, 0.306 0.421"
    ),
    "plus": (
        "-0.25 -1, 0.25 -1, 0.25 -0.25, 1 -0.25, 1 0.25, 0.25 0.25, 0.25 1, -0.25 1, "
        "-0.25 0.25, -1 0.25, -1 -0.25, -0.25 -0.25"
    ),
    "heart": "0 -0.92, 0.7 -0.22, 0 0.48, -0.7 -0.22",
    "arrow": "-1.07 -0.33, 0.03 -0.33, 0.03 -0.95, 1.08 0, 0.03 0.95, 0.03 0.33, -1.07 0.33",
    "L": "-0.52 1.21, -0.52 -0.79, 0.98 -0.79, 0.98 -0.22, 0.07 -0.22, 0.07 1.21",
    "T": (
        "-0.28 -1.26, 0.28 -1.26, 0.28 0.19, 0.88 0.19, 0.88 0.73, -0.88 0.73, -0.88 0.19, "
        "-0.28 0.19"
    ),
    "Z": (
        "-0.85 -0.95, 0.85 -0.95, 0.85 -0.6, -0.35 -0.6, 0.85 0.6, 0.85 0.95, -0.85 0.95, "
        "-0.85 0.6, 0.35 0.6, -0.85 -0.6"
    ),
    "bolt": "-0.34 0.88, 0.66 0.88, 0.29 0.12, 0.89 0.12, -0.4 -1.45, -0.07 -0.54, -0.75 -0.54",
}

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment, 2^64 / golden ratio
_DRAWS = 64  # counters 0 … 63 are an image's parameters, then noise


def _mix(z):
    """splitmix64's finalizer, a bijection of uint64 arrays (Steele, Lea, Flood, OOPSLA 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _bits(keys, start, stop):
    """Outputs start … stop - 1 of splitmix64 from each key, (N,) -> (N, stop - start) uint64."""
    return _mix(keys[:, None] + np.arange(start + 1, stop + 1, dtype=np.uint64) * _GOLDEN)


def _distance(name, x, y):
    """Signed distance from points (x, y) to a silhouette of half-size 1, negative inside."""

    def disc(cx, cy, radius):
        return np.sqrt((x - cx) * (x - cx) + (y - cy) * (y - cy)) - radius

    if name == "disc":
        return disc(0, 0, 0.746)
    if name == "crescent":
        return np.maximum(disc(0.41, 0, 1.06), -disc(0.94, 0, 0.84))

    squared, inside = np.inf, False
    corners = [[float(v) for v in corner.split()] for corner in _OUTLINES[name].split(",")]
    corners = np.array(corners, dtype=np.float32)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0)):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        t = (px * ex + py * ey) * (np.float32(1) / (ex * ex + ey * ey))
        t = np.minimum(np.maximum(t, 0), 1)  # nearest point of the edge: a + t e
        qx, qy = px - t * ex, py - t * ey
        squared = np.minimum(squared, qx * qx + qy * qy)
        # even-odd rule: inside, a ray to the right crosses an odd number of edges
        inside ^= ((y >= ay) != (y >= by)) & ((ey * px < ex * py) == (ey > 0))
    distance = np.sqrt(squared) * np.where(inside, np.float32(-1), np.float32(1))
    if name == "heart":
        distance = np.minimum(
            distance, np.minimum(disc(-0.35, 0.13, 0.495), disc(0.35, 0.13, 0.495))
        )
    return distance


def _render(name, keys, size):
    """Images of one class, uint8 (N, 3, size, size), for keys (N,).

    Lengths are in half-images, light in 0 … 1. An image's number is (N, 1, 1, 1), a colour
    (N, 3, 1, 1), a plane (N, 1, size, size). Parameters are drawn in the order of the lines: a new
    one goes last, or all that follow change.
    """
    draws = (_bits(keys, 0, _DRAWS) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    draw = iter(draws.T[:, :, None, None, None])  # each in [0, 1), exact in float32
    side = np.arange(size, dtype=np.float32)
    side = (side * 2 + 1) / np.float32(size) - 1  # pixel centres
    x, y = side[None, None, None, :], -side[None, None, :, None]

    def uniform(low, high):
        return low + (high - low) * next(draw)

    def colour(level, chroma):  # the mean of red, green, blue is level
        r, g, b = uniform(-chroma, chroma), uniform(-chroma, chroma), uniform(-chroma, chroma)
        return np.concatenate([r, g, b], axis=1) + (level - (r + g + b) / 3)

    def frame(cx, cy, turn):  # the pixels seen from (cx, cy), turned
        u = uniform(-turn, turn)  # by 2 atan(u)
        cos, sin = (1 - u * u) / (1 + u * u), 2 * u / (1 + u * u)
        return cos * (x - cx) + sin * (y - cy), cos * (y - cy) - sin * (x - cx)

    def blend(first, second, cycles):  # a grating of two colours
        along = frame(0, 0, 1)[0] * (cycles / 2) + uniform(0, 1)
        wave = np.abs((along - np.floor(along)) * 2 - 1)  # a triangle wave, smoothed below
        return first + (second - first) * (wave * wave * (3 - 2 * wave))

    def cover(canvas, paint, distance, opacity=1):  # where negative, soft over one pixel
        alpha = np.minimum(np.maximum(np.float32(0.5) - distance * np.float32(size / 2), 0), 1)
        return canvas + (paint - canvas) * (alpha * opacity)

    dark = uniform(0.05, 0.2)
    canvas = blend(colour(dark, 0.08), colour(dark + uniform(-0.05, 0.1), 0.08), uniform(1, 4))

    px, py = frame(uniform(-1, 1), uniform(-1, 1), 1)  # clutter behind: a dim ellipse
    rx, ry = uniform(0.15, 0.4), uniform(0.15, 0.4)
    ellipse = (np.sqrt(px * px / (rx * rx) + py * py / (ry * ry)) - 1) * np.minimum(rx, ry)
    canvas = cover(canvas, colour(dark + uniform(0.1, 0.3), 0.1), ellipse)

    cx, cy, half = uniform(-0.4, 0.4), uniform(-0.4, 0.4), uniform(0.42, 0.62)
    px, py = frame(cx, cy, 0.2217)  # tan(25° / 2)
    aspect = uniform(0.85, 1.15)
    outline = _distance(name, px / (half * aspect), py * aspect / half) * half
    light = dark + uniform(0.6, 0.75)
    canvas = cover(canvas, blend(colour(light, 0.1), colour(light, 0.1), uniform(1, 5)), outline)

    # the occluder: a dim box over a part of the silhouette, in 0.4 of the images
    reach = half * np.float32(0.9)
    px, py = frame(cx + reach * uniform(-1, 1), cy + reach * uniform(-1, 1), 1)
    box = np.maximum(np.abs(px) - uniform(0.06, 0.2), np.abs(py) - uniform(0.06, 0.2))
    present = (uniform(0, 1) < np.float32(0.4)).astype(np.float32)
    canvas = cover(canvas, colour(uniform(0.05, 0.4), 0.1), box, present)

    canvas = canvas * (
        uniform(0.9, 1.1) * (1 + uniform(-0.15, 0.15) * x + uniform(-0.15, 0.15) * y)
    )

    # Noise of standard deviation 0.04 per pixel: the sum of four 16-bit uniforms has a standard
    # deviation of 65536 / sqrt(3). Byte order permutes the four; their sum, exact, is the same.
    noise = _bits(keys, _DRAWS, _DRAWS + 3 * size * size).view(np.uint16).astype(np.float32)
    noise = noise.reshape(*canvas.shape, 4)
    noise = noise[..., 0] + noise[..., 1] + noise[..., 2] + noise[..., 3] - np.float32(131070)
    canvas = canvas + noise * np.float32(0.04 / 37837.2)
    return np.floor(np.minimum(np.maximum(canvas, 0), 1) * 255 + np.float32(0.5)).astype(np.uint8)


def shapes(indices, seed=0, size=32):
    """Images and labels of the built-in data set, by global index.

    indices: integers in 0 … 2^63 - 1, a sequence or array of shape (N,), any order; splits are
    ranges that do not overlap. size: pixels per side; the same scene at every size, but noise
    belongs to the pixels. Returns images, uint8 (N, 3, size, size), and labels, int64 (N,), into
    SHAPES_CLASSES: index % 12. Some 8,000 images a second on one core, 200 at size 224.
    Raises ValueError for a negative index.
    """
    indices = np.asarray(indices, dtype=np.int64).reshape(-1)
    if (indices < 0).any():
        raise ValueError(f"index {indices.min()} is negative; indices run from 0 to 2^63 - 1")
    start = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    keys = _mix(start + indices.astype(np.uint64) * _GOLDEN)
    labels = indices % len(SHAPES_CLASSES)
    images = np.empty((len(indices), 3, size, size), dtype=np.uint8)
    step = max(1, 2**14 // size**2)  # 64 KiB a plane, for the cache
    for label in np.unique(labels):  # one outline at a time
        chosen = np.flatnonzero(labels == label)
        for i in range(0, len(chosen), step):
            part = chosen[i : i + step]
            images[part] = _render(SHAPES_CLASSES[label], keys[part], size)
    return torch.from_numpy(images), torch.from_numpy(labels)


@lru_cache(maxsize=2)  # an analysis of many networks loads two splits again and again
def _shapes_range(first, n, size):
    return shapes(np.arange(first, first + n), size=size)


# ----------------------------------------------------------------------------------- keys and order


def keys(*numbers):
    """63-bit seeds that depend on every one of the numbers and on their order (splitmix64 of each
    in turn). numbers: integers or integer arrays (N,). -> uint64 (N,).

    In use: (seed, epoch) for the order; (seed, epoch, i, 1) augmentation; (seed, 2) and (seed,
    class, 2) subsets; (seed, index, 3) c-lite; in train.py (seed, step, micro-batch) for masks and
    (seed, step, micro-batch, 2) for mixup; in analyze.py (seed, 3) for orders of images and heads,
    (seed, i, f, 4) noise on images, (seed, …, parameter's name) directions in weight space, and
    (seed, k) what is drawn k-th. Some coincide, and then feed unrelated draws."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        if isinstance(number, int):
            number = np.array([number % 2**64], dtype=np.uint64)
        state = _mix((state ^ number.astype(np.uint64)) + _GOLDEN)
    return state >> np.uint64(1)


def key(*numbers: int) -> int:
    """keys, of integers alone."""
    return int(keys(*numbers)[0])


def uniforms(seeds, n):
    """Numbers uniform in [0, 1) from uint64 seeds (N,): float64 (N, n)."""
    return (_bits(seeds, 0, n) >> np.uint64(11)) * 2.0**-53


class TrainOrder(torch.utils.data.Sampler):
    """Yields, for each micro-batch of this process from step `start` to step `stop`,
    its (epoch, index) pairs.

    Step s of a run is step t = s mod k of epoch e = s div k, k = n div B. It takes images
    [t·B, (t+1)·B) of epoch e's permutation of `n` images, randperm seeded by key(seed, e); its
    micro-batches go to the processes in contiguous runs, so that micro-batch j of the step is the
    same whatever the number of processes. n is at least B, and B a multiple of micro_batch × world.

    repeats: R > 1 is repeated augmentation (Hoffer et al. 1901.09335; DeiT: 3). The epoch is as
    long, but each image comes R times in a row, so that only n / R of them come; the v-th time is
    augmented as in epoch e·R + v would be. As in DeiT's sampler a batch is dealt out to its
    micro-batches one image at a time: the R do not meet in one, or in mixup, if there are as many.

    views: V > 1 gives each micro-batch V times in a row, so V times as many images, augmented as
    in epochs e·V … e·V + V - 1: for contrastive losses. Batch and micro-batch count images.
    """

    def __init__(
        self, n, batch_size, micro_batch, seed, start, stop, rank=0, world=1, repeats=1, views=1
    ):
        self.n, self.batch_size, self.micro_batch, self.seed = n, batch_size, micro_batch, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world
        self.repeats, self.views = repeats, views

    def __len__(self):
        return (self.stop - self.start) * self.batch_size // self.micro_batch // self.world

    def __iter__(self):
        epoch = None
        for step in range(self.start, self.stop):
            own_epoch, t = divmod(step, self.n // self.batch_size)
            if own_epoch != epoch:
                epoch = own_epoch
                order = torch.randperm(
                    self.n, generator=torch.Generator().manual_seed(key(self.seed, epoch))
                )
            place = torch.arange(t * self.batch_size, (t + 1) * self.batch_size)
            place = (
                place.view(-1, self.micro_batch)
                if self.repeats == 1
                else place.view(self.micro_batch, -1).T
            )
            for micro in place.chunk(self.world)[self.rank]:
                epochs = (epoch * self.repeats + micro % self.repeats) * self.views
                yield [
                    (e + view, i)
                    for view in range(self.views)
                    for e, i in zip(epochs.tolist(), order[micro // self.repeats].tolist())
                ]


# ------------------------------------------------------------------------------------------ loading


def usable_cores():
    return len(getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))(0))


def _begin(started, worker):
    """Ctrl-C and SIGTERM reach every process of a job: the trainer answers, its workers end with
    it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started[worker] = True


_workers = weakref.WeakSet()  # those that were begun here


@atexit.register
def _end_workers():
    """Kills the workers left when a program ends by an error: multiprocessing would send SIGTERM,
    which they ignore (_begin), and wait for ever."""
    left = _workers.intersection(torch.multiprocessing.active_children())
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error more
    for process in left:
        process.kill()


PATIENCE = 60.0  # seconds that a worker has to begin: a fork takes 0.01, a spawn imports torch


def _with_workers(loader, tell):
    """iter(loader) whose workers have begun. Up to Python 3.11.7 one that is forked while a thread
    of torch.distributed is about to enter Python waits for ever (CPython issue 112275): then all
    are started anew."""
    started, patience = loader.worker_init_fn.args[0], PATIENCE
    while True:
        before = torch.multiprocessing.active_children()
        started.zero_()
        stream, end = iter(loader), time.monotonic() + patience
        own = [p for p in torch.multiprocessing.active_children() if p not in before]
        _workers.update(own)
        while not started.all() and time.monotonic() < end and all(p.is_alive() for p in own):
            time.sleep(0.001)
        if started.all() or not all(p.is_alive() for p in own):  # of a dead one torch tells
            return stream
        tell(
            f"{(~started).sum()} of {len(started)} data workers did not begin in {patience:g} "
            "seconds: all are started again"
        )
        patience *= 2  # perhaps the machine is only slow
        del stream  # forgets them, or torch would raise an error for who is killed
        for process in own:
            process.kill()


def loader(dataset, order, workers=0, pin_memory=False):
    """DataLoader of whole (micro-)batches; `order` yields lists of (epoch, index).
    Iterate by `batches`."""
    if dataset.on_device:  # nothing to prepare or to send, and no worker may touch a CUDA tensor
        workers, pin_memory = 0, False
    # A generator of its own: a loader draws a seed, which would move the run's random state.
    started = torch.zeros(workers, dtype=torch.bool).share_memory_()
    return torch.utils.data.DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=partial(_begin, started),
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )


def evaluation_loader(dataset, batch_size, workers=0, rank=0, world=1, pin_memory=False):
    """Every image of `dataset` once over all processes, in batches of `batch_size`."""
    mine = range(rank, len(dataset), world)
    order = [[(0, i) for i in mine[j : j + batch_size]] for j in range(0, len(mine), batch_size)]
    return loader(dataset, order, workers, pin_memory)


LOST = (  # of a worker; torch raises it wherever the main thread is, see train.want_of_memory
    "a process that loads images ended by itself, and has said above why, or was killed, as the "
    "system does where memory is short: use fewer --workers"
)


def batches(loader, tell=print):
    """Iterates a loader. What a data set has to say (a truncated image) goes to `tell`, once; a
    DataError that a worker met is raised here, without the traceback through processes that a
    DataLoader makes of it, and one if a worker was killed."""
    told, stream = loader.dataset.told, None
    try:
        stream = _with_workers(loader, tell)
        for item in stream:
            if isinstance(item, DataError):
                raise item
            images, labels, notes = item
            for note in notes:
                if note not in told:
                    told.add(note)
                    tell(note)
            yield images, labels
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(LOST) from None
    finally:
        stream = None  # whoever keeps an error keeps this frame, which would keep the workers


# ----------------------------------------------------------------------------------------- decoding

UPRIGHT = {  # what undoes an EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def jpeg_height(encoded):
    """Where a JPEG's header states its height, two bytes before those of the width. None for other
    files, and where EXIF or XMP data may say that the image lies on its side."""
    at, found = 2 if encoded.startswith(b"\xff\xd8\xff") else len(encoded), None
    while at + 9 <= len(encoded) and encoded[at] == 0xFF:
        marker, length = struct.unpack_from(">xBH", encoded, at)
        if marker == 0xDA:  # the first scan: the header ends
            return found
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive (ITU-T T.81, B.2.2)
            if found or encoded[at + 5 : at + 7] == b"\0\0":  # 0: stated at the end
                return None
            found = at + 5
        elif marker < 0xC4 or marker in (0xE1, 0xFF):
            return None
        at += 2 + length


def decode(source, box=None):
    """Encoded image, a path or bytes, to uint8 (3, H, W): upright by EXIF (a label belongs to the
    upright image), RGB whatever the file has, 16 bits cut to their upper 8. box: a function of
    (height, width) that says which part alone is wanted, as (top, left, height, width); its pixels
    are the same. OSError, SyntaxError, ValueError, DecompressionBombError of PIL for what it cannot
    decode."""
    encoded, part = source if isinstance(source, bytes) else Path(source).read_bytes(), None
    at = jpeg_height(encoded) if box is not None else None
    if at is not None:
        # A JPEG is decoded from its top. Its header is made to say that it ends below the box, and
        # libjpeg skips the rest: training crops then take 9/10 of the time. One row more than the
        # box is kept, because a row's colours may be smoothed with those of the next, where there
        # is one.
        rows, columns = struct.unpack_from(">HH", encoded, at)
        if Image.MAX_IMAGE_PIXELS and rows * columns > 2 * Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError  # as PIL, which would see a part of them
        part = box(rows, columns)
        rows = min(rows, part[0] + part[2] + 1)
        encoded = b"".join((encoded[:at], struct.pack(">H", rows), encoded[at + 2 :]))
    with Image.open(io.BytesIO(encoded)) as image:
        image.load()  # a PNG's EXIF may follow its pixels
        try:  # ImageOps.exif_transpose fails on odd EXIF
            turn = UPRIGHT.get(image.getexif().get(0x0112))
        except (OSError, SyntaxError, ValueError, struct.error):  # none that can be read
            turn = None
        if image.mode.startswith("I;16"):  # PIL's own conversion would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image if turn is None else image.transpose(turn)
        if box is not None:
            top, left, height, width = part or box(image.height, image.width)
            image = image.crop((left, top, left + width, top + height))
        image = image if image.mode == "RGB" else image.convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


# Whatever PIL makes of damaged bytes.
DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
NO_IMAGE = (
    " is not an image that can be decoded: replace it (a run that has begun goes on with as many "
    "images only), or remove it"
)


def read_image(source, name, notes, box=None):
    """decode; but a truncated file (no WebP) is used as far as it goes, its rest blank (JPEG grey,
    PNG black), with a line in `notes`: one bad file should not end a run of days. Raises DataError,
    which names the file, where nothing can be decoded."""
    try:
        return decode(source, box)
    except DAMAGE as error:
        if getattr(error, "errno", None) is not None:
            raise DataError(f"{name} cannot be read: {error.strerror}") from None
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        image = decode(source, box)
    except DAMAGE:
        raise DataError(name + NO_IMAGE) from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    notes.append(f"{name} is truncated: used as far as it can be decoded, the rest is blank")
    return image


# ------------------------------------------------------------------------------------- augmentation

AUGMENTATIONS = ("inception", "crop", "none")
AUTOAUGMENTS = ("none", *(policy.value for policy in v2.AutoAugmentPolicy))


class InceptionCrop:
    """A crop of 5 to 100 % of the area at an aspect of 3/4 to 4/3, resized to (size, size),
    bilinear without antialiasing, and with `flip` flipped or not: uint8 (3, H, W) to
    (3, size, size). `then`: what follows, or None.

    In distribution v2.RandomResizedCrop and v2.RandomHorizontalFlip, whose time would be a tenth of
    an ImageNet JPEG's. In parts, for who can decode the box alone: box, finish, then.
    """

    NUMBERS = 23  # in [0, 1), that an image takes: place, flip, ten tries of area and aspect

    def __init__(self, size, then=None, flip=True):
        self.size, self.then, self.flip = size, then, flip

    def __call__(self, image):
        numbers = torch.rand(self.NUMBERS, dtype=torch.float64).tolist()
        top, left, height, width = self.box(numbers, *image.shape[1:])
        image = self.finish(numbers, image[:, top : top + height, left : left + width])
        return image if self.then is None else self.then(image)

    def box(self, numbers, height, width):
        """The crop of an image of this size: (top, left, height, width)."""
        top, left, _, *tries = numbers
        for area, aspect in zip(tries[::2], tries[1::2]):
            area, aspect = height * width * (0.05 + 0.95 * area), 3 / 4 * (16 / 9) ** aspect
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < h <= height and 0 < w <= width:
                break
        else:  # a long image: of its middle as much as the aspect allows
            h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
            top = left = 0.5
        return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w

    def finish(self, numbers, image):
        # A decoded image is (H, W, 3) in memory. torch's uint8 kernel takes that as it is only if
        # the strides of the batch of one say so too; image[None] would be copied first.
        image = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        image = F.interpolate(image, (self.size, self.size), mode="bilinear")[0].contiguous()
        return image.flip(2) if self.flip and numbers[2] < 0.5 else image


def _affine(image, shear=(0.0, 0.0), translate=(0, 0)):
    degrees = [math.degrees(math.atan(s)) for s in shear]
    return v2.functional.affine(
        image,
        angle=0,
        translate=list(translate),
        scale=1,
        shear=degrees,
        center=[0, 0],  # what a shear leaves in place: there the upper left corner
        fill=128,
    )


def _cutout(image, half_side):
    row, column = (int(torch.randint(side, ())) for side in image.shape[1:])
    top, left = max(row - half_side, 0), max(column - half_side, 0)
    image = image.clone()
    image[:, top : row + half_side, left : column + half_side] = 128
    return image


# What big_vision does to an image; m: magnitude / 10; sign: 1 or -1. Contrast is around the image's
# mean, as PIL has it; theirs is around a 256th of the number of pixels.
GOOGLE_OPERATIONS = {
    "AutoContrast": lambda x, m, sign: v2.functional.autocontrast(x),
    "Equalize": lambda x, m, sign: v2.functional.equalize(x),
    "Invert": lambda x, m, sign: v2.functional.invert(x),
    "Rotate": lambda x, m, sign: v2.functional.rotate(x, 30 * m * sign, fill=128),
    "Posterize": lambda x, m, sign: v2.functional.posterize(x, min(int(4 * m), 8)),
    "Solarize": lambda x, m, sign: torch.where(x.int() < int(256 * m), x, 255 - x),
    "SolarizeAdd": lambda x, m, sign: torch.where(
        x < 128, (x.int() + int(110 * m)).clamp(max=255), x
    ).to(torch.uint8),
    "Color": lambda x, m, sign: v2.functional.adjust_saturation(x, 1.8 * m + 0.1),
    "Contrast": lambda x, m, sign: v2.functional.adjust_contrast(x, 1.8 * m + 0.1),
    "Brightness": lambda x, m, sign: v2.functional.adjust_brightness(x, 1.8 * m + 0.1),
    "Sharpness": lambda x, m, sign: v2.functional.adjust_sharpness(x, 1.8 * m + 0.1),
    "ShearX": lambda x, m, sign: _affine(x, shear=(0.3 * m * sign, 0.0)),
    "ShearY": lambda x, m, sign: _affine(x, shear=(0.0, 0.3 * m * sign)),
    "TranslateX": lambda x, m, sign: _affine(x, translate=(round(100 * m * sign), 0)),
    "TranslateY": lambda x, m, sign: _affine(x, translate=(0, round(100 * m * sign))),
    "Cutout": lambda x, m, sign: _cutout(x, int(40 * m)),
}


def google_randaugment(image, magnitude):
    """One operation of Chen et al.'s RandAugment (E.3), as in their group's public code: 16 of
    them. At 10 about torchvision's strength, but without an upper end (E.3's 15 turns by 45°);
    translations and cut-outs in pixels; Solarize grows weaker with the magnitude, not stronger."""
    change = list(GOOGLE_OPERATIONS.values())[int(torch.randint(len(GOOGLE_OPERATIONS), ()))]
    return change(image, magnitude / 10, 1 - 2 * int(torch.randint(2, ())))


def transforms(
    augment,
    size,
    native=None,
    autoaugment="none",
    randaugment=(0, 0),
    randaugment_prob=1.0,
    randaugment_of="torchvision",
    erasing=0.0,
    flip=True,
    short_side=0,
):
    """torchvision v2 transforms on uint8 (3, H, W). augment: "inception" (an InceptionCrop), "crop"
    (padding by an eighth, random crop, flip; of square images; `load` has InMemory do it instead),
    "none" (also for evaluation: the short side resized to short_side, 0 being 256/224 of the size,
    centre crop). flip: whether the first two flip. native: the side of images that are all
    square and of one size; None is returned where nothing is to be done to them. Then AutoAugment
    (1805.09501) by torchvision's policy of that name; RandAugment (1909.13719): operations, each
    applied with a probability, and magnitude, 0 to 10 of torchvision's ranges or those of
    google_randaugment; and random erasing (1708.04896) of 2 to 33 % of the area, to grey, with a
    probability."""
    if augment not in AUGMENTATIONS:
        raise DataError(f"unknown augmentation {augment!r}; known: {' '.join(AUGMENTATIONS)}")
    resize = [] if native == size else [v2.Resize(size, antialias=True)]
    if augment == "inception":
        steps = []
    elif augment == "crop":
        side = native or size
        steps = [] if native else [v2.Resize(side, antialias=True), v2.CenterCrop(side)]
        steps += [v2.RandomCrop(side, padding=side // 8)] + [v2.RandomHorizontalFlip()] * flip
        steps += resize * bool(native)
    elif native:
        steps = resize
    else:
        short_side = short_side or round(size * 256 / 224)
        steps = [v2.Resize(short_side, antialias=True), v2.CenterCrop(size)]
    if autoaugment != "none":
        steps += [v2.AutoAugment(v2.AutoAugmentPolicy(autoaugment), fill=128)]
    operations, magnitude = randaugment
    if operations:
        change = (
            partial(google_randaugment, magnitude=magnitude)
            if randaugment_of == "google"
            else v2.RandAugment(1, magnitude, num_magnitude_bins=11, fill=128)
        )
        steps += [v2.RandomApply([change], randaugment_prob)] * operations
    steps += [v2.RandomErasing(erasing, value=128)] if erasing else []
    steps = v2.Compose(steps) if steps else None
    return InceptionCrop(size, steps, flip) if augment == "inception" else steps


# ---------------------------------------------------------------------------------------- data sets


class Dataset(torch.utils.data.Dataset):
    """What all data sets share. A subclass sets `labels` (N,) int64 and `classes` (names) and
    defines `read(i, box) -> uint8 (3, H, W)`, see decode; `transform` (of `transforms`, or None)
    makes that (3, size, size). For benchmarks, see there: labels may be (N, K), and
    `restrict_logits` the only classes that a prediction is chosen from (sorted indices, None:
    all)."""

    notice = restrict_logits = None
    on_device = False  # whether batches come from an accelerator's memory
    padding = 0  # see InMemory

    def __init__(self, labels, classes, transform, seed):
        self.labels, self.classes, self.transform, self.seed = labels, classes, transform, seed
        self.indices = torch.arange(len(labels))
        self.notes, self.told = [], set()

    def __len__(self):
        return len(self.indices)

    def restrict(self, indices):
        """Keeps only these images, in this order; returns self."""
        self.indices = self.indices[indices]
        return self

    def fingerprint(self):
        """What tells whether two data sets are the same: how many images they have, whatever was
        left of them since, and a checksum of the labels."""
        return dict(images=len(self.labels), labels=zlib.crc32(self.labels.numpy().tobytes()))

    def part(self, indices, like=None):
        """These images as a data set of their own, transformed as here or as those of `like`."""
        part = copy.copy(self).restrict(indices)
        if like is not None:
            part.transform, part.padding = like.transform, like.padding
        return part

    def __getitem__(self, pairs):
        """A list of (epoch, index) -> (uint8 (m, 3, H, W), int64 (m,), notes), or the DataError
        that it met."""
        where = self.indices[[i for _, i in pairs]]
        self.notes = []
        try:
            return self.images(where, pairs), self.labels[where], self.notes
        except DataError as error:
            return error

    def to(self, device):
        """Puts the images where their batches are wanted, if they can live there; returns self."""
        return self

    def images(self, where, pairs):
        crop, seeds = self.transform, self.seeds(pairs)
        if not isinstance(crop, InceptionCrop):
            return self.one_by_one(crop, map(self.read, where.tolist()), seeds)
        images = (
            crop.finish(numbers, self.read(i, partial(crop.box, numbers)))
            for i, numbers in zip(where.tolist(), uniforms(seeds, crop.NUMBERS).tolist())
        )
        return self.one_by_one(crop.then, images, seeds)

    def seeds(self, pairs):
        epochs, indices = np.array(pairs).T
        return keys(self.seed, epochs, indices, 1)

    @staticmethod
    def one_by_one(transform, images, seeds):
        """Stacks uint8 (3, H, W) images after a transform of torchvision's, or None. Those draw
        from the default generator: seeded for each image, so that whichever process or worker
        makes it, it is the same."""
        if transform is None:
            return torch.stack(list(images))
        generator, made = torch.default_generator, []
        state = generator.get_state()
        try:
            for image, seed in zip(images, seeds.tolist()):
                generator.manual_seed(seed)
                made.append(transform(image))
        finally:
            generator.set_state(state)
        return torch.stack(made)


class InMemory(Dataset):
    """Images that fit into memory: `pixels` is uint8 (N, 3, H, W).

    padding: if not 0, each micro-batch is augmented at once, where the pixels are: every image is
    padded by as many black pixels, cropped to H×W at one of the (2·padding + 1)² places and flipped
    or (without `flip` never) not, all equally likely. v2 on a batch would draw one place for all
    its images.
    """

    def __init__(self, pixels, labels, classes, transform=None, seed=0, padding=0, flip=True):
        super().__init__(labels, classes, transform, seed)
        self.pixels, self.padding, self.flip = pixels, padding, flip

    def to(self, device):
        # What is transformed image by image stays with the workers, on the CPU.
        if self.transform is None and torch.device(device).type != "cpu":
            self.pixels, self.on_device = self.pixels.to(device), True
        return self

    def images(self, where, pairs):
        # not on MPS: there a copy that is not waited for may read memory that is free again
        where = where.to(self.pixels.device, non_blocking=self.pixels.is_cuda)
        images = self.pixels.index_select(0, where)
        if self.padding:
            images = self.crop_and_flip(images, self.seeds(pairs))
        if self.transform is not None:
            images = self.one_by_one(self.transform, images, self.seeds(pairs))
        return images

    def crop_and_flip(self, images, seeds):
        m, _, height, width = images.shape
        # drawn on the CPU whatever the device, so that the images are the same on all
        numbers = uniforms(seeds, 3) * (2 * self.padding + 1, 2 * self.padding + 1, 1 + self.flip)
        numbers = torch.from_numpy(numbers.astype(np.int64))
        numbers = numbers.to(images.device, non_blocking=images.is_cuda)
        top, left, flip = numbers.T
        images = F.pad(images, [self.padding] * 4)
        images = torch.cat([images, images.flip(3)])
        # all windows of all images, a view: (2 m, 3, 2 padding + 1, 2 padding + 1, H, W)
        windows = images.unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(m, device=images.device) + m * flip, :, top, left]


class ImageFiles(Dataset):
    """Images in files, `names` below the folder `root`, decoded when they are read."""

    def __init__(self, root, names, labels, classes, transform, seed=0):
        super().__init__(torch.as_tensor(labels, dtype=torch.int64), list(classes), transform, seed)
        # bytes in one block: a million Python strings would be copied by each worker
        self.root, self.names = Path(root), np.array([os.fsencode(name) for name in names])

    def read(self, i, box=None):
        path = self.root / os.fsdecode(self.names[i])
        return read_image(path, show(path), self.notes, box)


class ImageFolder(ImageFiles):
    """`root` holds one folder for each class, with images (JPEG, PNG, WebP, GIF) at any depth
    below it.

    classes: names that fix the numbering, for a validation folder; default:
        the folders' sorted names.
    Folders and images may be links. Raises DataError for a missing, unreadable or empty folder, a
    class that is not in `classes`, or a link to a folder that it lies in. What is no image in a
    class folder is left out and named in `notice`, a line or None; names with a leading dot are
    passed over.
    """

    EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif")

    def __init__(self, root, transform, seed=0, classes=None):
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{show(root)} is no folder")

        def unreadable(error):
            raise DataError(f"{show(error.filename)} cannot be read: {error.strerror}") from None

        try:
            entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
        except OSError as error:
            unreadable(error)
        folders = sorted(entry.name for entry in entries if entry.is_dir())
        if not folders:
            loose = sum(entry.name.lower().endswith(self.EXTENSIONS) for entry in entries)
            raise DataError(
                f"{show(root)} has no class folders"
                + (
                    f" but {loose:,} images: move each into a folder named after its class"
                    if loose
                    else ""
                )
            )
        classes = folders if classes is None else classes
        number = {name: i for i, name in enumerate(classes)}
        names, labels, odd = [], [], sorted(e.path for e in entries if not e.is_dir())
        for folder in folders:
            if folder not in number:
                raise DataError(
                    f"{show(root / folder)} is a class that the training folder or the network "
                    "lacks: add it there, or remove it here"
                )
            found = len(names)
            for where, below, files in os.walk(root / folder, onerror=unreadable, followlinks=True):
                below[:] = sorted(name for name in below if not name.startswith("."))
                inside = os.path.relpath(where, root)
                if os.path.islink(where) and os.path.realpath(where) in map(
                    os.path.realpath, Path(where).absolute().parents
                ):
                    raise DataError(
                        f"{show(where)} is a link to a folder that it lies in: remove it"
                    )
                for file in sorted(name for name in files if not name.startswith(".")):
                    if file.lower().endswith(self.EXTENSIONS):
                        names.append(os.fsencode(os.path.join(inside, file)))
                        labels.append(number[folder])
                    else:
                        odd.append(os.path.join(where, file))
            if len(names) == found:
                raise DataError(
                    f"{show(root / folder)} holds no image ({' '.join(self.EXTENSIONS)}): fill the "
                    "folder or remove it"
                )
        if odd:
            self.notice = f"left out, no image of a class: {show(odd[0])}" + (
                f" and {len(odd) - 1:,} more" if odd[1:] else ""
            )
        super().__init__(root, names, labels, classes, transform, seed)


def read_mat(path):
    """The numeric arrays of a MATLAB 5 file, {name: values, 1-D}: for Flowers-102's lists, which
    torchvision reads with scipy. Raises DataError for anything else."""
    types = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}

    def elements(raw):  # their (type, content): each is a tag, the content, and zeros up to 8 bytes
        start = 0
        while start < len(raw):
            kind, size = np.frombuffer(raw, "<u4", 2, start).tolist()
            first, small = start + 8, kind >> 16  # so many bytes, up to 4, follow in the tag itself
            if small:
                kind, size, first = kind & 0xFFFF, small, start + 4
            content = raw[first : first + size]
            if len(content) < size:
                raise ValueError("cut short")
            start += 8 + (0 if small else size if kind == 15 else size + -size % 8)
            yield from elements(zlib.decompress(content)) if kind == 15 else [(kind, content)]

    raw, arrays = Path(path).read_bytes(), {}
    try:
        if raw[:10] != b"MATLAB 5.0" or raw[126:128] != b"IM":  # IM: little-endian
            raise ValueError("another format")
        for _, matrix in elements(raw[128:]):
            _flags, _shape, (_, name), (kind, values) = elements(matrix)
            arrays[name.decode()] = np.frombuffer(values, types[kind])
    except (ValueError, KeyError, zlib.error):
        raise DataError(f"{show(path)} is not a MATLAB 5 file of numbers: replace it") from None
    return arrays


def flowers102(folder, split):
    """Names of images, labels and classes of Oxford Flowers-102. "The entire training sets" of Chen
    et al. E.6 are taken to be train and val together, 2,040 images, as they are by others who
    transfer to it, and its test 6,149."""
    labels, sets = read_mat(folder / "imagelabels.mat"), read_mat(folder / "setid.mat")
    parts = ("trnid", "valid") if split == "train" else ("tstid",)
    numbers = np.concatenate([sets[part] for part in parts]).astype(np.int64)
    names = [f"image_{number:05d}.jpg" for number in numbers]
    return names, labels["labels"].astype(np.int64)[numbers - 1] - 1, Flowers102.classes


def pets(folder, split):
    """Likewise of Oxford-IIIT Pets: trainval, 3,680 images, and test, 3,669."""
    file = folder / "annotations" / ("trainval.txt" if split == "train" else "test.txt")
    # a line: name, breed from 1, cat or dog, breed among these
    lines = [line.split() for line in file.read_text().splitlines() if line[:1] not in ("", "#")]
    labels = np.array([int(line[1]) - 1 for line in lines])
    breeds = {label: line[0].rpartition("_")[0] for label, line in zip(labels.tolist(), lines)}
    return [f"{line[0]}.jpg" for line in lines], labels, [breeds[i] for i in range(len(breeds))]


OXFORD = {  # torchvision's class, which downloads; reader; folder; that of images; archives
    "flowers102": (
        Flowers102,
        flowers102,
        "flowers-102",
        "jpg",
        "102flowers.tgz, imagelabels.mat and setid.mat",
    ),
    "pets": (
        OxfordIIITPet,
        pets,
        "oxford-iiit-pet",
        "images",
        "images.tar.gz and annotations.tar.gz",
    ),
}


class EncodedFolder(ImageFolder):
    """What the workers of pack do: a batch is, instead of images, their encoded bytes end to end
    (uint8) and the length and checksum of each, int64 (m, 2)."""

    short_side = 0

    def images(self, where, pairs):
        parts = [self.encoded(i) for i in where.tolist()]
        table = torch.tensor([(len(part), zlib.crc32(part)) for part in parts])
        return torch.from_numpy(np.frombuffer(bytearray().join(parts), np.uint8)), table

    def encoded(self, i):
        path, notes = self.root / os.fsdecode(self.names[i]), []
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{show(path)} cannot be read: {error.strerror}") from None
        try:  # its header alone
            Image.open(io.BytesIO(content)).close()
        except DAMAGE:
            raise DataError(show(path) + NO_IMAGE) from None
        if self.short_side:
            image = read_image(content, show(path), notes)
            self.notes += notes  # truncated: packed as it is, so that training says so too
            if not notes and min(image.shape[1:]) > self.short_side:
                image = v2.functional.resize(image, self.short_side, antialias=True)
                file = io.BytesIO()
                v2.functional.to_pil_image(image).save(file, "JPEG", quality=95, subsampling=0)
                content = file.getvalue()
        return content


# ------------------------------------------------------------------------------------- packed files

PACK_END = struct.Struct("<QQI12s")
PACK_MAGIC = b"image pack 1"


def write_pack(file, data_dir, short_side, workers):
    """Images, index and end of a packed file."""
    there = [split for split in ("train", "val") if (data_dir / split).is_dir()]
    folders, classes = {}, None  # all that is wrong with them is said before the first image
    for split in ("train", "val") if "train" in there else there or ("",):
        if not (data_dir / split).is_dir():
            raise DataError(
                f"{show(data_dir / split)} is no folder; --data-dir names the folder that holds "
                "train/ and val/, or class folders"
            )
        folder = folders[split] = EncodedFolder(data_dir / split, None, classes=classes)
        folder.short_side, classes = short_side, folder.classes
        if folder.notice:
            print(folder.notice)
    tables, labels, splits = [np.zeros((1, 2), np.int64)], [], {}
    with tqdm(total=sum(map(len, folders.values())), unit=" images", disable=None) as bar:
        for split, folder in folders.items():
            # labels by the split's own classes, for validation data without training data
            own, numbers = np.unique(folder.labels.numpy(), return_inverse=True)
            splits[split] = dict(images=len(folder), classes=[folder.classes[c] for c in own])
            labels.append(numbers)
            for (content, table), _ in batches(evaluation_loader(folder, 8, workers), bar.write):
                file.write(content.numpy())
                tables.append(table.numpy().copy())  # a worker's tensor holds a file open
                bar.update(len(table))
    lengths, checksums = np.concatenate(tables).T
    names = np.concatenate([folder.names for folder in folders.values()])
    file.write(bytes(-file.tell() % 8))
    index = b"".join(
        [
            lengths.cumsum().astype("<u8"),
            np.append(0, np.char.str_len(names).cumsum()).astype("<u8"),
            checksums[1:].astype("<u4"),
            np.concatenate(labels).astype("<u4"),
            *names.tolist(),
            json.dumps(splits).encode(),
            struct.pack("<QQ", file.tell(), len(names)),
        ]
    )
    file.write(index + struct.pack("<I12s", zlib.crc32(index), PACK_MAGIC))
    return splits


def pack(data_dir, out, short_side=0, workers=0):
    """Makes the file `out` of data_dir/train and data_dir/val, or of class folders in data_dir
    itself. Stopped at any moment it leaves `out` whole or absent; called again it starts anew.

    short_side: an image with a longer one is decoded, resized to it (bilinear, antialiased) and
        encoded as JPEG (quality 95, chroma not subsampled). The others, and truncated ones, keep
        their bytes, as all do with 0.
    Returns the `splits` of Pack's format. Raises DataError, and OSError for what cannot be listed
    or written.
    """
    temporary = Path(f"{out}.partial")
    with open(temporary, "ab") as file:  # not emptied before it is known to be ours
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, ends with us
        except (BlockingIOError, PermissionError):
            raise DataError(f"{show(temporary)} is being written by another process") from None
        try:
            if os.path.isdir(out):
                raise DataError(f"{show(out)} is a folder: --out is the name of a file")
            if os.path.lexists(out):
                raise DataError(f"{show(out)} exists: remove it, or choose another --out")
            file.seek(0)  # what a killed process has left
            file.truncate()
            splits = write_pack(file, Path(data_dir), short_side, workers)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, out)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return splits


def read_index(path):
    """Opens a packed file and checks its index -> its "file" and "size"; "version", which differs
    between files; "splits", "names" and the four arrays, all but splits mapped into memory."""
    try:
        file = open(path, "rb")
        content = np.asarray(np.memmap(file, mode="r"))
    except OSError as error:
        raise DataError(f"{show(path)} cannot be read: {error.strerror}") from None
    except ValueError:  # numpy's for an empty file
        content = np.zeros(0, np.uint8)
    end = content[-PACK_END.size :].tobytes().rjust(PACK_END.size)
    start, n, version, magic = PACK_END.unpack(end)
    if magic != PACK_MAGIC or zlib.crc32(content[start:-16]) != version:
        raise DataError(
            f"{show(path)} is no packed file of images, or a damaged one: copy it again, or make "
            "it again by python data.py pack"
        )
    index = dict(file=file, size=len(content), version=version)
    for name, kind, count in (
        ("offsets", "<u8", n + 1),
        ("name_offsets", "<u8", n + 1),
        ("checksums", "<u4", n),
        ("labels", "<u4", n),
    ):
        index[name] = np.frombuffer(content, kind, count, start)
        start += index[name].nbytes
    names, splits = np.split(content[start : -PACK_END.size], [int(index["name_offsets"][-1])])
    return index | dict(names=names, splits=json.loads(splits.tobytes()))


class Pack(Dataset):
    """A split of a packed file: the images of a folder, in its order, with its classes.

    The file, little-endian, of the N images of all splits:
        images  encoded, back to back; zeros up to a multiple of 8 bytes
        index   uint64 (N + 1,): image i is bytes [offsets[i], offsets[i + 1]) of the file
                uint64 (N + 1,): likewise its name, counted from the first one
                uint32 (N,): CRC-32 of its bytes
                uint32 (N,): its label, into the classes of its split
                names, class/file, back to back
                JSON: {split: {"images": number, "classes": [name, …]}} in the images' order
        end     uint64 start of the index, uint64 N, uint32 CRC-32 of all from that start to here,
                b"image pack 1"
    Splits are "train" and "val"; or "val"; or "", one folder, which stands for all but "train".
    The index is mapped into memory (ImageNet's: 73 MB, opened and checked in 0.1 s); an image is
    read at its offset, which from a cold disk is twice as fast as through the map, and a disk's
    failure then is an error and no SIGBUS.
    Raises DataError for a file that is no pack or damaged, a split that it lacks, a class that is
    not in `classes`; and, when it is read, for an image whose checksum differs.
    """

    def __init__(self, path, split, transform, seed=0, classes=None):
        self.path = self.root = Path(path)
        self.index, index = None, read_index(path)
        splits, self.version = index["splits"], index["version"]
        self.split = "" if "" in splits and split != "train" else split
        if self.split not in splits:
            raise DataError(
                f"{show(path)} holds no {split} images: pack a folder that holds train/ and val/"
            )
        own, order = splits[self.split]["classes"], list(splits)
        self.first = sum(splits[s]["images"] for s in order[: order.index(self.split)])
        number = {name: i for i, name in enumerate(own if classes is None else classes)}
        for name in sorted(set(own) - number.keys()):
            raise DataError(
                f"{show(path)}: {show(os.path.join(self.split, name))} is a class that the "
                "training images or the network lack: pack a folder without it"
            )
        labels = index["labels"][self.first : self.first + splits[self.split]["images"]]
        labels = torch.tensor([number[name] for name in own])[labels.astype(np.int64)]
        index["file"].close()  # read opens it anew
        super().__init__(labels, list(number), transform, seed)

    @property
    def names(self):
        """As of ImageFiles: class/file of each image, in bytes."""
        index = read_index(self.path)
        starts = index["name_offsets"][self.first : self.first + len(self.labels) + 1].tolist()
        names = index["names"].tobytes()
        index["file"].close()
        return np.array([names[a:b] for a, b in zip(starts, starts[1:])])

    def __getstate__(self):  # a worker that gets a copy opens the file itself
        return self.__dict__ | {"index": None}

    def read(self, i, box=None):
        self.index = index = self.index or read_index(self.path)
        file, i = index["file"].fileno(), self.first + i
        # a map of more than the file now has would be SIGBUS
        if index["version"] != self.version or os.fstat(file).st_size != index["size"]:
            raise DataError(f"{show(self.path)} has changed while in use: start again")
        start, stop = index["name_offsets"][i : i + 2]
        name = os.path.join(self.split, os.fsdecode(index["names"][start:stop].tobytes()))
        name = f"{show(self.path)}: {show(name)}"
        start, stop = index["offsets"][i : i + 2].tolist()
        try:
            content = os.pread(file, stop - start, start)
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}") from None
        if zlib.crc32(content) != index["checksums"][i]:
            raise DataError(
                f"{name} is damaged, its checksum is wrong: copy the file again, or make it again "
                "by python data.py pack"
            )
        return read_image(content, name, self.notes, box)


# ------------------------------------------------------------------------------------------- splits

DATASETS = ("shapes", "imagenet", "imagenet21k", "folder", "cifar10", "cifar100", *OXFORD)


def load(
    name,
    split,
    *,
    data_dir=None,
    image_size,
    augment="none",
    seed=0,
    download=False,
    classes=None,
    **more,
):
    """One split of a data set.

    name: one of DATASETS. "imagenet", "imagenet21k" and "folder" are data_dir/train and
        data_dir/val with class folders, or the file data_dir that `pack` made of them.
        ImageNet-21k comes without validation images, and with 19,167 to 21,841 classes: they are
        the folders in train/; val/ is ImageNet's, whose images then find their classes by name, or
        what was moved there out of train/.
    split: "train", "val" or "test"; where only two exist, "test" is "val". The "train" of
        flowers102 and pets is all but their test set.
    data_dir: for the others, the folder that holds (or, with download, will hold) the published
        archive's folder: cifar-10-batches-py, cifar-100-python, flowers-102, oxford-iiit-pet.
    classes: the training split's class names, for the validation split of a folder.
    augment, more: arguments of transforms.
    Returns a Dataset. Raises DataError, one line that says what is missing and
    where it was looked for.
    """
    if split not in SHAPES_SPLITS:
        raise DataError(f"unknown split {split!r}; known: {' '.join(SHAPES_SPLITS)}")
    if data_dir is None and name != "shapes":
        raise DataError(f"{name} needs data_dir, the folder of its files")

    def in_memory(pixels, labels, classes):
        native = pixels.shape[3]
        padding = native // 8 if augment == "crop" else 0  # done to whole micro-batches instead
        steps = transforms("none" if padding else augment, image_size, native, **more)
        return InMemory(pixels, labels, classes, steps, seed, padding, more.get("flip", True))

    if name == "shapes":
        return in_memory(*_shapes_range(*SHAPES_SPLITS[split], image_size), list(SHAPES_CLASSES))
    if name in ("imagenet", "imagenet21k", "folder"):
        if os.path.isfile(data_dir):
            return Pack(
                data_dir,
                "train" if split == "train" else "val",
                transforms(augment, image_size, **more),
                seed,
                classes,
            )
        root = Path(data_dir) / ("train" if split == "train" else "val")
        val = Path(data_dir) / "val"  # 21k's is asked for before the millions of train/ are listed
        if name == "imagenet21k" and os.path.isdir(Path(data_dir) / "train") and not val.is_dir():
            raise DataError(
                f"imagenet21k: {show(val)} is no folder, and the release has no validation images: "
                "link ImageNet's val/ there, or move a few images of each class from train/ into "
                "it"
            )
        if not os.path.isdir(root):
            raise DataError(
                f"{name}: {show(root)} is no folder; --data-dir names the folder that holds train/ "
                "and val/, each with one folder of images for each class, or a file that python "
                "data.py pack made of it"
            )
        return ImageFolder(root, transforms(augment, image_size, **more), seed, classes)
    if name in ("cifar10", "cifar100"):
        source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
        try:
            source = source(data_dir, train=split == "train", download=download)
        except RuntimeError:  # torchvision's word for missing files and for wrong checksums
            raise DataError(
                f"{name}: {show(Path(data_dir) / source.base_folder)} is missing or incomplete; "
                f"unpack {source.filename} there, or let --download fetch it"
            ) from None
        except OSError as error:
            what = (
                f"download of {source.url} failed"
                if download
                else f"{show(data_dir)} is unreadable"
            )
            raise DataError(f"{name}: {what} ({show(str(error))})") from None
        pixels = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        return in_memory(pixels, torch.tensor(source.targets), source.classes)
    if name in OXFORD:
        source, read, folder, below, archives = OXFORD[name]
        folder = Path(data_dir) / folder
        try:
            if download:
                source(data_dir, download=True)
        except ImportError:
            pass  # scipy, which torchvision wants when the files are there
        except (RuntimeError, OSError) as error:
            raise DataError(f"{name}: download into {show(folder)} failed ({error})") from None
        try:
            names, labels, classes = read(folder, split)
            lost = set(names) - set(os.listdir(folder / below))
            wrong = folder / below / min(lost) if lost else None
        except (OSError, ValueError, LookupError) as error:
            wrong = getattr(error, "filename", None) or folder
        if wrong:
            raise DataError(
                f"{name}: {show(wrong)} is missing or damaged; unpack {archives} in "
                f"{show(folder)}, or let --download fetch them"
            )
        return ImageFiles(
            folder / below, names, labels, classes, transforms(augment, image_size, **more), seed
        )
    raise DataError(f"unknown data set {name!r}; known: {' '.join(DATASETS)}")


def subset(labels, fraction, seed=0):
    """Indices of a class-balanced part of a data set (Chen et al. §5.1), sorted; nested: a smaller
    fraction of the same seed is part of a larger one, up to the rounding of class sizes.

    labels: (N,) int64. fraction: in (0, 1], a number or a string such as "1/10". The size is
    ⌊N·fraction⌋, which for ImageNet are the paper's 640,583, 320,291 and 128,116; class c gives
    ⌊N_c·fraction⌋ images, and classes with the largest remainders one more until the size is
    reached: of equal ones the first, but in an order drawn by the seed where the size is below the
    number of classes.
    Raises ValueError for a fraction outside (0, 1] or one that leaves no image.
    """
    exact = Fraction(fraction)
    fraction = exact.limit_denominator(10**6) if isinstance(fraction, float) else exact
    size = len(labels) * fraction.numerator // fraction.denominator
    if not 0 < fraction <= 1 or size == 0:
        raise ValueError(
            f"a fraction of {fraction} of {len(labels):,} images; allowed: above 0, at most 1, and "
            "at least one image"
        )
    counts = np.bincount(labels.numpy()).astype(object)  # Python's integers never overflow
    take = counts * fraction.numerator // fraction.denominator
    remainder = counts * fraction.numerator % fraction.denominator
    first = np.arange(len(counts))
    if size < len(counts):  # else always the first classes, of ImageNet fishes
        first = torch.randperm(
            len(counts), generator=torch.Generator().manual_seed(key(seed, 2))
        ).numpy()
    largest = first[np.argsort(-remainder[first], kind="stable")]
    take[largest[: size - take.sum()]] += 1
    chosen, members = [], labels.argsort(stable=True).split(counts.tolist())
    for c, n in enumerate(take):
        order = torch.randperm(
            len(members[c]), generator=torch.Generator().manual_seed(key(seed, c, 2))
        )
        chosen.append(members[c][order[:n]])
    return torch.cat(chosen).sort().values


def hold_out(labels, fraction, seed=0):
    """Indices of the others and of a class-balanced part, a `subset`, to choose settings by (Chen
    et al. E.6); together every image once. Raises ValueError if one of them is empty."""
    held = subset(labels, fraction, seed)
    if len(held) == len(labels):
        raise ValueError(f"a fraction of {fraction} leaves none of {len(labels):,} images")
    others = torch.ones(len(labels), dtype=torch.bool)
    others[held] = False
    return others.nonzero().flatten(), held


# ----------------------------------------------------------------------------- published benchmarks

# AlexNet's errors in percent, means over the severities (Hendrycks & Dietterich 2019, Table 1, with
# the digits of Hendrycks' code). A corruption's CE is the mean error over the severities divided by
# AlexNet's, mCE the mean CE of these 15.
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
# With four extra ones, the 19 whose mean accuracy, over all severities, Chen et al. report (§4.2).
CORRUPTIONS = (*ALEXNET_ERRORS, "speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)

BENCHMARKS = {  # looked for in data_dir, or else beside it; images; what it should be
    "real": (
        "real.json",
        50_000,
        "50,000 lists of labels, from google-research/reassessed-imagenet, for the images of "
        "val/, ILSVRC2012_val_00000001.JPEG to …50000",
    ),
    "v2": (
        "imagenetv2-matched-frequency-format-val",
        10_000,
        "folders 0 to 999, from imagenetv2-matched-frequency.tar.gz",
    ),
    "r": ("imagenet-r", 30_000, "200 folders named n01443537 and so on, from imagenet-r.tar"),
    "c": (
        "imagenet-c",
        50_000,
        "CORRUPTION/SEVERITY/CLASS/*.JPEG, from noise.tar, blur.tar, weather.tar, digital.tar and "
        "extra.tar, unpacked there",
    ),
    "cifar10-c": ("CIFAR-10-C", 10_000, "CORRUPTION.npy and labels.npy, from CIFAR-10-C.tar"),
    "cifar100-c": ("CIFAR-100-C", 10_000, "CORRUPTION.npy and labels.npy, from CIFAR-100-C.tar"),
}


def _check_condition(corruption, severity, known):
    if corruption not in known:
        raise DataError(f"unknown corruption {corruption!r}; known: {' '.join(known)}")
    if severity not in SEVERITIES:
        raise DataError(f"severity {severity!r} of {corruption}; it must be 1, 2, 3, 4 or 5")


def _part(name, data_dir, corruption, severity):
    """Path of one condition of a benchmark."""
    if name not in BENCHMARKS:
        raise DataError(f"unknown benchmark {name!r}; known: {' '.join(BENCHMARKS)}")
    entry, _, layout = BENCHMARKS[name]
    if name not in ("real", "v2", "r"):
        _check_condition(corruption, severity, CORRUPTIONS)
        entry += f"/{corruption}/{severity}" if name == "c" else f"/{corruption}.npy"
    places = Path(data_dir) / entry, Path(data_dir).absolute().parent / entry
    for path in places:
        if os.path.exists(path):
            return path
    raise DataError(
        f"{name}: there is neither {show(places[0])} nor {show(places[1])}; expected: {layout}"
    )


def conditions(name, data_dir, corruptions=CORRUPTIONS):
    """What a benchmark consists of: (corruption, severity), one after the other, or just
    (None, None). Raises DataError if one is missing: better now than after hours of evaluation."""
    pairs = (
        [(None, None)]
        if name in ("real", "v2", "r")
        else [(corruption, severity) for corruption in corruptions for severity in SEVERITIES]
    )
    for pair in pairs:
        _part(name, data_dir, *pair)
    return pairs


def _real(path, dataset):
    """`dataset` with ReaL's labels: the file's first list is of the image number 1, and so on."""
    found = [re.search(rb"val_(\d{8})", os.path.basename(name)) for name in dataset.names]
    if None in found:
        odd = dataset.root / os.fsdecode(dataset.names[found.index(None)])
        raise DataError(f"{show(odd)} has no number in its name")
    try:
        answers = json.loads(path.read_bytes())
        rows = [torch.tensor(answers[int(match[1]) - 1], dtype=torch.int64) for match in found]
        if any(len(row) and not 0 <= row.min() <= row.max() < len(dataset.classes) for row in rows):
            raise ValueError("a label is out of range")
        dataset.labels = torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=-1)
        return dataset.restrict((dataset.labels >= 0).any(1))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError):
        raise DataError(f"{show(path)} is damaged") from None


def _cifar_c(path, severity, classes, transform):
    """One of the five blocks, severity after severity, of a corruption's file."""
    arrays = []
    for file in (path, path.with_name("labels.npy")):
        try:
            arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError):
            raise DataError(f"{show(file)} is missing or damaged") from None
    pixels, labels = arrays
    n = len(pixels) // 5
    if (
        pixels.dtype != np.uint8
        or pixels.shape != (5 * n, 32, 32, 3)
        or labels.shape != (5 * n,)
        or not 0 <= labels.min() <= labels.max() < len(classes)
    ):
        raise DataError(
            f"{show(path)} has {pixels.dtype} {pixels.shape}, its labels.npy {labels.shape} up to "
            f"{labels.max()}; needed are uint8 (5·n, 32, 32, 3) and (5·n,) below {len(classes)}"
        )
    block = slice((severity - 1) * n, severity * n)
    pixels = np.ascontiguousarray(pixels[block].transpose(0, 3, 1, 2))
    return InMemory(
        torch.from_numpy(pixels),
        torch.from_numpy(labels[block].astype(np.int64)),
        list(classes),
        transform,
    )


def benchmark(name, corruption=None, severity=None, *, data_dir, image_size, classes, short_side=0):
    """One condition of a published benchmark, from its files as they are distributed.

    name: one of BENCHMARKS: ImageNet-ReaL, -V2 (matched frequency), -R, -C, CIFAR-10-C, -100-C.
    corruption, severity: as `conditions` gives them.
    classes: names of the model's outputs; for real, v2 and r ImageNet's 1,000 WordNet ids, sorted,
        since so these benchmarks number or name theirs.
    Returns a Dataset with labels in terms of `classes`, and a notice if images are missing. The
    prediction is the largest logit, of those in `restrict_logits` if that is not None (r: of 200).
    real's labels are (N, K): any of a row is right; -1 fills it up; images without a label are left
    out. So for every benchmark
        right = (prediction[:, None] == labels.view(len(labels), -1)).any(1)
    Images are resized and cropped as in `load`, by short_side, too; those of c, where that was done
    before they were corrupted, only resized, unless image_size is their 224. Raises DataError.
    """
    path = _part(name, data_dir, corruption, severity)
    _, published, layout = BENCHMARKS[name]
    if name in ("real", "v2", "r") and not (
        len(classes) == 1000
        and list(classes) == sorted(classes)
        and all(re.fullmatch(r"n\d{8}", wnid) for wnid in classes)
    ):
        raise DataError(
            f"{name} needs a model of ImageNet's 1,000 classes, with the names of its training "
            f"folders, n01440764 to n15075141; this one's {len(classes):,} classes begin with "
            f"{classes[0]}"
        )
    try:
        if name == "real":
            dataset = _real(
                path,
                load(
                    "imagenet",
                    "val",
                    data_dir=data_dir,
                    image_size=image_size,
                    classes=classes,
                    short_side=short_side,
                ),
            )
        elif name in ("cifar10-c", "cifar100-c"):
            dataset = _cifar_c(path, severity, classes, transforms("none", image_size, 32))
        else:
            transform = (
                transforms("none", image_size, short_side=short_side)
                if name != "c"
                else v2.Compose([v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])
            )
            # The folders of v2 are numbers: sorted as names, 10 would come before 2.
            numbering = [str(i) for i in range(1000)] if name == "v2" else classes
            dataset = ImageFolder(path, transform, classes=numbering)
            dataset.classes, found = list(classes), dataset.labels.unique()
            if len(found) != {"v2": 1000, "r": 200}.get(name, len(found)):
                raise DataError(f"{show(path)} has {len(found):,} class folders")
            dataset.restrict_logits = found if name == "r" else None
    except DataError as error:
        raise DataError(f"{name}: {error}; expected: {layout}") from None
    if len(dataset.labels) != published:
        short = f"{name}: {len(dataset.labels):,} images instead of the published {published:,}"
        dataset.notice = f"{dataset.notice}; {short}" if dataset.notice else short
    return dataset


# ------------------------------------------------------------------------------------------- c-lite


# Corruptions without a download, for any data set. They are ours, not the published benchmark, and
# numbers of theirs can't be compared with those of ImageNet-C or CIFAR-C: hence the prefix. Levels
# are about CIFAR-C's, for small images; lengths grow with the image. All is done in integers, or by
# PIL with factors that are exact in binary, so that every machine makes the same images, as far as
# their PIL (for blur) and JPEG codec agree.
def _jpeg(picture, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


C_LITE = {  # level at each severity; what it makes of a PIL image (of noise: see corrupt)
    "lite_noise": ((10, 15, 20, 25, 30), None),  # standard deviation, of 255
    "lite_impulses": ((10, 20, 30, 50, 70), None),  # values set to 0 or 255, of 1,000
    "lite_blur": (
        (0.5, 0.75, 1, 1.25, 1.5),  # σ, pixels of an image of 32
        lambda p, v: p.filter(ImageFilter.GaussianBlur(v * min(p.size) / 32)),
    ),
    "lite_pixelate": (
        (28, 24, 20, 16, 12),  # pixels left of 32
        lambda p, v: p.resize([-(-side * v // 32) for side in p.size], Image.Resampling.BOX).resize(
            p.size, Image.Resampling.NEAREST
        ),
    ),
    "lite_jpeg": ((80, 60, 40, 25, 15), _jpeg),
    "lite_brightness": (
        (1.25, 1.5, 1.75, 2, 2.5),
        lambda p, v: ImageEnhance.Brightness(p).enhance(v),
    ),
    "lite_contrast": (
        (0.75, 0.625, 0.5, 0.375, 0.25),
        lambda p, v: ImageEnhance.Contrast(p).enhance(v),
    ),
    "lite_saturation": ((0.75, 0.5, 0.25, 0.125, 0), lambda p, v: ImageEnhance.Color(p).enhance(v)),
}


def corrupt(image, corruption, severity, seed=0, index=0):
    """uint8 (3, H, W), corrupted: a pure function of its arguments; index, the image's number in
    its data set, gives it noise of its own. Raises DataError for what C_LITE does not have."""
    _check_condition(corruption, severity, C_LITE)
    levels, change = C_LITE[corruption]
    level = levels[severity - 1]
    if change:
        return v2.functional.pil_to_tensor(change(v2.functional.to_pil_image(image), level))
    x = image.numpy().astype(np.int64)
    draws = _bits(np.array([key(seed, index, 3)], np.uint64), 0, 3 * x.size).reshape(*x.shape, 3)
    if corruption == "lite_noise":  # sums of 12 16-bit integers, of standard deviation 2^16
        x += level * (draws.view(np.uint16).sum(-1, dtype=np.int64) - 6 * 65535) + 2**15 >> 16
    else:
        hit = draws[..., 0] % np.uint64(1000) < level
        x[hit] = draws[hit, 1] % np.uint64(2) * np.uint64(255)
    return torch.from_numpy(x.clip(0, 255).astype(np.uint8))


class Corrupted(Dataset):
    """`dataset`, whose images are on the CPU, with a corruption of C_LITE after its own transform:
    as many images, labels and classes, in the same order. Raises DataError for an unknown
    corruption or severity."""

    def __init__(self, dataset, corruption, severity, seed=0):
        _check_condition(corruption, severity, C_LITE)
        super().__init__(dataset.labels, dataset.classes, None, seed)
        self.told = dataset.told  # of its files, once for all corruptions
        self.dataset, self.corruption, self.severity = dataset, corruption, severity
        self.indices, self.restrict_logits = dataset.indices, dataset.restrict_logits

    def images(self, where, pairs):
        self.dataset.notes = self.notes
        return torch.stack(
            [
                corrupt(image, self.corruption, self.severity, self.seed, i)
                for i, image in zip(where.tolist(), self.dataset.images(where, pairs))
            ]
        )


# ---------------------------------------------------------------------------------------- the speed


def photographs(folder, n):
    """Writes n images of 500×375 as JPEG and as PNG: noise with a photograph's spectrum, amplitude
    over frequency^1.2; the JPEGs have ImageNet's mean size, 115 kB. -> their two folders."""
    rng, roots = np.random.default_rng(0), [Path(folder) / kind for kind in ("JPEG", "PNG")]
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500))
    frequency[0, 0] = np.inf
    for root in roots:
        (root / "class").mkdir(parents=True)
    for i in range(n):
        real, imaginary = rng.normal(size=(2, 3, *frequency.shape)) / frequency**1.2
        planes = np.fft.irfft2(real + 1j * imaginary, (375, 500))
        light, red, blue = planes / planes.std((1, 2), keepdims=True)
        pixels = [light * 60 + red * 25, light * 60 - (red + blue) * 10, light * 60 + blue * 25]
        image = Image.fromarray((np.stack(pixels, 2) + 115).clip(0, 255).astype(np.uint8))
        for root in roots:
            image.save(root / "class" / f"{i}.{root.name.lower()}", quality=92)
    return roots


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def bench(folder=None, rounds=30, workers=0, tell=print):
    """Images per second of one process with one thread. Image files to training crops: by the
    defaults of torchvision's references/classification, and here, also by so many workers together,
    if any. Images of CIFAR's size, padded, cropped and flipped: by v2 one by one, and here in
    batches. folder: as for ImageFolder; default: made images."""
    rng, spent = np.random.default_rng(0), {}

    def clocked(name, step):
        def run(*args):
            started = time.perf_counter()
            result = step(*args)
            spent.setdefault(name, []).append(1000 * (time.perf_counter() - started))
            return result

        return run

    def opened(path):
        try:
            return Image.open(path).convert("RGB")
        except DAMAGE as error:
            raise DataError(f"{show(path)} cannot be decoded: {error}") from None

    def race(n, **streams):
        seconds = {name: [] for name in streams}
        for _ in range(rounds + 1):  # in turns, the first to warm up
            for name, stream in streams.items():
                started = time.perf_counter()
                if next(stream)[0].is_cuda:
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - started)
        slowest = next(iter(seconds))
        for name in streams:
            own = np.array(seconds[name][1:])
            low, speed, high = np.quantile(n / own, (0.25, 0.5, 0.75))
            least, ratio, most = np.quantile(seconds[slowest][1:] / own, (0.25, 0.5, 0.75))
            tell(
                f"  {name:12}{speed:7,.0f} images/s ({low:,.0f} to {high:,.0f}), ratio {ratio:.2f} "
                f"({least:.2f} to {most:.2f})"
            )
        if spent:
            tell(
                "  ms per image: "
                + ", ".join(f"{name} {np.median(times):.2f}" for name, times in spent.items())
            )
            spent.clear()

    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    cpu = re.search("model name.*: (.*)", cpuinfo)
    tell(
        f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}; torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, Pillow {PIL.__version__}, libjpeg-turbo "
        f"{features.version('libjpeg_turbo')}; 1 process, 1 thread; medians (and quartiles) of "
        f"{rounds} batches of each, taken in turns"
    )
    with tempfile.TemporaryDirectory() as made:
        for root in [Path(folder)] if folder else photographs(made, 32):
            files = ImageFolder(root, InceptionCrop(224))
            order = rng.integers(len(files), size=(rounds + 1, 32))
            paths = {i: root / os.fsdecode(files.names[i]) for i in order.flatten().tolist()}
            size = np.mean([path.stat().st_size for path in paths.values()]) / 1000
            tell(f"{show(root.name)}: files of {size:.0f} kB to crops of 224×224, 32 in a batch")
            steps = v1.Compose(
                [
                    clocked(name, step)
                    for name, step in (
                        ("decode", lambda i: opened(paths[i])),
                        ("crop", v1.RandomResizedCrop(224)),
                        ("flip", v1.RandomHorizontalFlip()),
                        ("tensor", v1.PILToTensor()),
                        ("float", v1.ConvertImageDtype(torch.float)),
                        ("normalize", v1.Normalize([0.5] * 3, [0.5] * 3)),
                    )
                ]
            )
            reference = torch.utils.data.DataLoader(
                range(len(files)),
                32,
                sampler=order.flatten().tolist(),
                collate_fn=lambda batch: (torch.stack([steps(i) for i in batch]), None),
            )
            files.read = clocked("here decode and crop", files.read)
            files.transform.finish = clocked("resize and flip", files.transform.finish)
            pairs = [[(0, i) for i in batch] for batch in order.tolist()]
            race(32, reference=iter(reference), here=batches(loader(files, pairs), tell))
            if workers:  # of files that are not clocked; the first batch of each is to warm up
                files = ImageFolder(root, InceptionCrop(224))
                stream = batches(loader(files, pairs * workers, workers), tell)
                arrived = [time.perf_counter() for _ in stream][workers - 1 :: workers]
                speeds = np.quantile(32 * workers / np.diff(arrived), (0.25, 0.5, 0.75))
                low, speed, high = (f"{images:,.0f}" for images in speeds)
                tell(f"  {f'{workers} workers':12}{speed:>7} images/s ({low} to {high})")
    tell("3×32×32 in memory: padded, cropped and flipped, 96 in a batch")
    pixels, labels = torch.zeros(5000, 3, 32, 32, dtype=torch.uint8), torch.zeros(5000)
    pairs = [
        [(0, i) for i in batch] for batch in rng.integers(5000, size=(rounds + 1, 96)).tolist()
    ]
    sets = {
        "one by one": InMemory(pixels, labels, [], transforms("crop", 32, 32)),
        "here": InMemory(pixels, labels, [], padding=4),
    }
    if torch.cuda.is_available():
        sets["on the GPU"] = InMemory(pixels, labels, [], padding=4).to("cuda")
    race(96, **{name: batches(loader(dataset, pairs)) for name, dataset in sets.items()})


# --------------------------------------------------------------------------------------------- main


def make_parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=(
            "The built-in data set: its sizes and the speed at which it is drawn, or a contact "
            "sheet. pack: one file of an image folder, to train from by --data-dir FILE. bench: "
            "the speed of loading images."
        ),
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("sizes", "sheet", "pack", "bench"),
        default="sizes",
        help="default: sizes",
    )
    parser.add_argument(
        "--split", choices=SHAPES_SPLITS, default="val", help="split that the sheet shows"
    )
    parser.add_argument("--size", type=int, default=32, help="side of an image in pixels")
    parser.add_argument("--columns", type=int, default=10, help="images of each class on the sheet")
    parser.add_argument("--out", help="file to write; default: shapes.png for the sheet")
    parser.add_argument(
        "--data-dir",
        help=(
            "pack: holds train/ and val/, or class folders; bench: class folders (default: made "
            "images of ImageNet's typical size)"
        ),
    )
    parser.add_argument(
        "--short-side",
        type=int,
        default=0,
        help="pack what is larger at this size, as JPEG of quality 95; 0: every image as it is",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        help="processes that pack, or that load images for bench; default: one for each core",
    )
    parser.add_argument("--rounds", type=int, default=30, help="bench: batches of each pipeline")
    parser.error = lambda message: parser.exit(2, f"data.py: {message}; see --help\n")
    return parser


def pack_command(parser, args):
    out, started = show(args.out), time.perf_counter()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidied up as after Ctrl-C
    try:
        splits = pack(args.data_dir, args.out, args.short_side, args.workers)
    except DataError as error:
        parser.exit(2, f"data.py: {error}\n")
    except OSError as error:
        parser.exit(2, f"data.py: {show(error.filename or args.out)}: {error.strerror}\n")
    except KeyboardInterrupt:
        left = "whole" if os.path.exists(args.out) else "not written; the same command starts anew"
        parser.exit(130, f"data.py: interrupted: {out} is {left}\n")
    finally:
        signal.signal(signal.SIGTERM, before)
    seconds, n = time.perf_counter() - started, sum(s["images"] for s in splits.values())
    classes = max(len(s["classes"]) for s in splits.values())
    print(
        f"{out}: {n:,} images of {classes:,} classes, {os.path.getsize(args.out):,} bytes, in "
        f"{seconds:,.1f} s ({n / seconds:,.0f} images/s)"
    )
    print(
        "to train from it:" if "train" in splits else "to evaluate on it:",
        f"python train.py --data-dir {shlex.quote(out)}"
        + " --dataset folder" * (classes != 1000)
        + " --eval-only --init-from CHECKPOINT" * ("train" not in splits),
    )


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    for name, least in dict(size=1, columns=1, short_side=0, workers=0, rounds=1).items():
        if not least <= getattr(args, name) <= 10**4:
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least} "
                "and at most 10000"
            )
    own = dict(
        sizes=["size"],
        sheet=["split", "size", "columns", "out"],
        pack=["data_dir", "out", "short_side", "workers"],
        bench=["data_dir", "rounds", "workers"],
    )[args.what]
    for name in sorted(vars(args).keys() - {"what", *own}):
        if getattr(args, name) != parser.get_default(name):
            parser.error(
                f"--{name.replace('_', '-')} is not of {args.what}, which takes "
                + " ".join(f"--{n.replace('_', '-')}" for n in own)
            )
    if args.what == "pack":
        if not args.data_dir or not args.out:
            parser.error("pack needs --data-dir and --out")
        return pack_command(parser, args)
    if args.what == "bench":
        try:
            return bench(args.data_dir, args.rounds, args.workers)
        except (DataError, OSError) as error:
            parser.error(f"--data-dir: {error}")
    args.out = args.out or "shapes.png"
    if args.what == "sheet":
        first, n = SHAPES_SPLITS[args.split][0], len(SHAPES_CLASSES) * args.columns
        images, labels = shapes(np.arange(first, first + n), size=args.size)
        images = v2.functional.resize(
            images[labels.argsort(stable=True)],
            args.size * max(1, 96 // args.size),
            interpolation=v2.InterpolationMode.NEAREST,
        )
        try:
            save_image(images / 255, args.out, nrow=args.columns, pad_value=1)  # one class a row
        except (OSError, ValueError) as error:
            parser.error(f"--out {show(args.out)}: {show(str(error))}")
        print(f"{args.out}: one row each of {', '.join(SHAPES_CLASSES)}")
        return
    for split, (_, n) in SHAPES_SPLITS.items():
        print(
            f"{split:6} {n:6,} images of {len(SHAPES_CLASSES)} classes, 3×{args.size}×{args.size}"
        )
    n = min(2000, 2000 * 32**2 // args.size**2 + 1)
    started = time.perf_counter()
    shapes(np.arange(n), size=args.size)
    print(f"{n / (time.perf_counter() - started):,.0f} images/s drawn by one process")


if __name__ == "__main__":
    if not {"pack", "bench"} & set(sys.argv[1:]):  # these have pipes to their workers
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head ends it, as it ends cat
    main()
