"""Training images for benchmarks: noise, whose content costs what any content costs."""

from __future__ import annotations

import numpy as np
import torch

from pa_core.data import Part


def noise(n: int, *, size: int, classes: int = 10) -> Part:
    """``n`` images of ``size`` pixels a side, in memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    return Part(
        name="train",
        ids=tuple(f"image{i}" for i in range(n)),
        labels=torch.arange(n) % classes,
        sizes=torch.full((n, 2), size),
        store=pixels,
        rows=np.arange(n),
    )
