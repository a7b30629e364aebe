"""Random images of any number and size as a training part: how fast they are learnt from does not depend on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pa_core import models, train
from pa_core.batch import Pool
from pa_core.data import Part
from pa_core.device import resolve_precision
from pa_core.params import Experiment
from pa_core.proxy import Step

CLASSES = 10
MANY = 10**6
"""Steps of the learning rate's schedule; more than are taken."""


def write(path: Path, *, n: int, size: int) -> None:
    """uint8 [n, 3, size, size] in a .npy file, written in pieces."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, 3, size, size))
    rng = np.random.default_rng(0)
    for at in range(0, n, 1000):
        array[at : at + 1000] = rng.integers(0, 256, array[at : at + 1000].shape, dtype=np.uint8)
    array.flush()


def noise(n: int, *, size: int) -> Part:
    """A training part in memory."""
    return over(np.random.default_rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8))


def part(path: Path) -> Part:
    """A training part over the mapped file."""
    return over(np.load(path, mmap_mode="r"))


def over(pixels: np.ndarray) -> Part:
    """A training part over uint8 [n, 3, size, size]."""
    n = len(pixels)
    return Part(
        name="train",
        ids=tuple(map(str, range(n))),
        labels=torch.arange(n) % CLASSES,
        store=np.asarray(pixels),
        rows=np.arange(n),
    )


def step(part: Part, *, share: float = 0.2, grid: int = 4) -> Step:
    """Random maps of the first images of a part, as a proxy step keeps them."""
    count = round(share * len(part))
    maps = torch.rand(count, grid, grid, generator=torch.Generator().manual_seed(0)).half()
    return Step(positions=torch.arange(count), maps=maps.to(part.resident or "cpu"))


def state(e: Experiment, *, size: int, device: torch.device) -> train.State:
    """A network ready to train."""
    model = models.create(e.model, classes=CLASSES, image_size=size, seed=0)
    return train.create_state(model, e, total_steps=MANY, device=device, dtype=resolve_precision(e.precision, device))


def training(pool: Pool, e: Experiment, *, device: torch.device, batch: int, draws: int = 0) -> Callable[[], int]:
    """Work that trains a fresh network on as many images, all of the pool by default, and gives their number."""
    trained, count = state(e, size=pool.part.shape[-1], device=device), draws or len(pool)

    def work() -> int:
        train.train_one_epoch(trained, pool, experiment=e, entries=count, batch_size=batch)
        return count

    return work
