"""Random images of any number and size, as a training part: how fast they are learnt from does not depend on what they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pa_core import models, train
from pa_core.data import Part
from pa_core.params import Experiment

CLASSES = 10


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
    n, size = len(pixels), pixels.shape[-1]
    return Part(
        name="train",
        ids=tuple(map(str, range(n))),
        labels=torch.arange(n) % CLASSES,
        sizes=torch.full((n, 2), size),
        store=np.asarray(pixels),
        rows=np.arange(n),
    )


def state(e: Experiment, *, size: int, device: torch.device, steps: int) -> train.State:
    """A network ready for ``steps`` steps of training."""
    model = models.create(e.model, classes=CLASSES, image_size=size, seed=0)
    dtype = train.resolve_precision(e.precision, device)
    return train.create_state(model, e, total_steps=steps, device=device, dtype=dtype)


def epoch(state: train.State, source: train.Source, e: Experiment, *, draws: int, batch: int) -> int:
    """Train once on ``draws`` images; how many that were."""
    train.train_one_epoch(
        state, source, draws=draws, batch_size=batch, kinds=e.augment, label_smoothing=e.label_smoothing, seed=e.seed
    )
    return draws
