"""What the golden values are computed from, and how they are kept: no initialisation of torch's, no trained weights.

Everything is drawn by ``numpy.random.RandomState``, whose streams NumPy keeps frozen, so that a change in how torch or
timm initialise is not mistaken for a change of this package.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pa_core import models

CLASSES = 4


def draws(label: str) -> np.random.RandomState:
    """A stream of its own for each label."""
    return np.random.RandomState(zlib.crc32(label.encode()))


def images(n: int, size: int) -> Tensor:
    """[n, 3, size, size] float32 in [0, 1]: coloured patches with some noise."""
    stream = draws(f"images {n} {size}")
    side = -(-size // 4)
    patches = np.kron(stream.rand(n, 3, side, side), np.ones((4, 4)))[..., :size, :size]
    return torch.from_numpy(0.8 * patches + 0.2 * stream.rand(n, 3, size, size)).float()


def maps(kind: str, n: int, size: int) -> Tensor:
    """[n, size, size] float32 in [0, 1]: ``distinct`` values, ``plateau`` (multiples of 1/4) or ``constant``."""
    stream = draws(f"maps {kind} {n} {size}")
    if kind == "distinct":
        ranks = np.stack([stream.permutation(size * size) for _ in range(n)]).reshape(n, size, size)
        return torch.from_numpy(ranks).float() / (size * size - 1)
    if kind == "plateau":
        return torch.from_numpy(stream.randint(0, 5, (n, size, size))).float() / 4
    return torch.full((n, size, size), 0.5)


@cache
def network(name: str, size: int, cam_layer: str | None = None) -> models.Classifier:
    """A classifier in eval mode; weights and running statistics are drawn by the entry's name and shape."""
    options = {"classes": CLASSES, "image_size": size, "pretrained": False, "cam_layer": cam_layer, "seed": 0}
    model = models.create(name, **options).eval()
    with torch.no_grad():
        for key, tensor in model.network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = draws(f"{name} {key}").standard_normal(tuple(tensor.shape))
            if key.endswith("running_var"):
                values = np.exp(0.2 * values)
            elif tensor.ndim > 1:  # keeps the scale of the activations, through ReLUs
                values *= (2 / np.prod(tensor.shape[1:])) ** 0.5
            elif key.endswith("weight"):  # of a norm
                values = 1 + 0.1 * values
            else:
                values *= 0.1
            tensor.copy_(torch.from_numpy(values))
    return model


# How values are kept: integers exactly, as a hash; floats as a few numbers


def sha(values: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of integers, booleans or texts and their shape."""
    if isinstance(values, Tensor):
        assert not values.is_floating_point(), "floats differ in the last bits from one machine to another"
        values = values.int().tolist() if values.dtype == torch.bool else values.tolist()
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def summary(values: Tensor) -> list[list[float]]:
    """Each [H, W] of [..., H, W] as its means over 4 x 4 tiles, its mean and its standard deviation."""
    planes = values.detach().double().flatten(0, -3).cpu()
    tiles = F.adaptive_avg_pool2d(planes, 4).flatten(1)
    spread = torch.stack([planes.mean((1, 2)), planes.std((1, 2))], 1)
    return rounded(torch.cat([tiles, spread], 1))


def rounded(values: Tensor) -> list:
    """Nested lists of floats with five decimals."""
    return np.round(values.detach().double().cpu().numpy(), 5).tolist()


RTOL, ATOL = 1e-3, 1e-4
RIGHT = "right"
"""A case's key under which integers are counts of images classified rightly: they hold within one image."""


def differences(kept: Any, now: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, one line each: floats by a tolerance, everything else exactly."""
    if isinstance(kept, dict) and isinstance(now, dict):
        lines = [f"{where}: {key} is no longer computed" for key in kept.keys() - now.keys()]
        lines += [f"{where}: {key} was never recorded" for key in now.keys() - kept.keys()]
        common = [key for key in kept if key in now]
        return lines + [line for key in common for line in differences(kept[key], now[key], f"{where} / {key}")]
    if where.endswith(f"/ {RIGHT}") and isinstance(kept, int) and isinstance(now, int):
        return [] if abs(kept - now) <= 1 else [f"{where}: {now} instead of {kept}"]
    if isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        pairs = enumerate(zip(kept, now, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    if isinstance(kept, float) and isinstance(now, (int, float)):
        return [] if abs(kept - now) <= ATOL + RTOL * abs(kept) else [f"{where}: {now} instead of {kept}"]
    return [] if kept == now and type(kept) is type(now) else [f"{where}: {now} instead of {kept}"]
