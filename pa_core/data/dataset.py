"""A dataset, split and decoded: three parts that are read by index."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from pa_core.data import sources, splits
from pa_core.data.decode import Catalogue, decoded, sha
from pa_core.errors import ParameterError


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Part:
    """Training, validation or test images, in a fixed order. N is their number."""

    name: str  # train, val or test
    ids: tuple[str, ...]  # unique, the same wherever the images lie
    labels: Tensor  # int64 [N]
    store: np.ndarray  # uint8 [M, 3, S, S], read-only, of the whole dataset; use read()
    rows: np.ndarray  # int64 [N], where this part's images are in the store
    images: Tensor | None = None  # uint8 [N, 3, S, S] on a device, see on()
    counts: list[int] = field(default_factory=list)  # images of each read; threads may append

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, S, S)."""
        return (3, *self.store.shape[2:])

    @property
    def resident(self) -> torch.device | None:
        """The device that holds the images; None when each is read from the store."""
        return None if self.images is None else self.images.device

    @property
    def reads(self) -> int:
        """How many images were read so far: those that were copied to a device, and those read from there, too."""
        return sum(self.counts)

    def __len__(self) -> int:
        return len(self.ids)

    def on(self, device: torch.device) -> Part:
        """This part with all its images on a device, where reading is one gather; they are read once for it."""
        images = torch.empty((len(self), *self.shape), dtype=torch.uint8, device=device)
        for index in torch.arange(len(self)).split(1024):
            images[index[0] : index[-1] + 1] = self.read(index)
        return replace(self, images=images)

    def read(self, index: Tensor) -> Tensor:
        """The images of positions int64 [n], each from 0 to N - 1 and on any device, in that order: uint8
        [n, 3, S, S], a copy; on the part's device, on the CPU when they are in the store."""
        self.counts.append(len(index))
        if self.images is not None:
            return self.images.index_select(0, send(index, self.images.device))
        return torch.from_numpy(self.store[self.rows[index.cpu().numpy()]])


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images of C classes in three parts that share no content."""

    name: str
    classes: tuple[str, ...]  # C names, by label
    image_size: int  # S, pixels per side
    train: Part
    val: Part
    test: Part
    digest: str  # SHA-256 (hex) of ids, labels, contents, classes and official parts; not of place or split
    split_digest: str  # SHA-256 (hex) of which id is in which part
    skipped: tuple[str, ...] = ()  # images that were left out because they cannot be used, each with the reason
    dropped: tuple[str, ...] = ()  # ids left out of train or an official val as copies of test (or val) images


def load(*, train_fraction: float = 1.0, folds: int = 5, fold: int = 0, seed: int = 0, **source: Any) -> Dataset:
    """A dataset as ``Experiment`` describes it, downloaded, decoded and split as far as that was not done before; its
    ``source`` as :func:`identify` takes it. ParameterError where there is no such dataset, or the images do not allow
    what is asked."""
    catalogue = _find(**source)
    rows, dropped = splits.split(catalogue, folds=folds, fold=fold, seed=seed, train_fraction=train_fraction)
    labels, parts = torch.tensor([entry.label for entry in catalogue.entries]), {}
    for name, at in rows.items():
        ids = tuple(catalogue.entries[row].id for row in at.tolist())
        parts[name] = Part(name=name, ids=ids, labels=labels[at], store=catalogue.pixels, rows=at)
    return Dataset(
        name=source["dataset"],
        classes=tuple(catalogue.classes),
        image_size=catalogue.pixels.shape[-1],
        digest=catalogue.digest,
        split_digest=sha([(name, part.ids) for name, part in parts.items()]),
        skipped=tuple(f"{entry.id}: {entry.reason}" for entry in catalogue.entries if entry.reason),
        dropped=tuple(catalogue.entries[row].id for row in dropped.tolist()),
        **parts,
    )


def identify(**source: Any) -> tuple[str, int]:
    """A dataset's digest and its image size, as :func:`load` has them, by its name, ``data_dir``, ``bad_images`` and
    ``image_size``. No image is decoded if all are in the cache."""
    catalogue = _find(**source)
    return catalogue.digest, catalogue.pixels.shape[-1]


def fits(parts: list[Part], device: torch.device) -> bool:
    """Whether the parts' images take at most half of a device's free memory; the rest is for the network."""
    needed = sum(len(part) * part.store[0].nbytes for part in parts)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return needed <= free / 2


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host does not wait for a copy to CUDA, which goes through pinned memory."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _find(
    dataset: str, data_dir: str | None = None, bad_images: str = "refuse", image_size: int | None = None
) -> Catalogue:
    catalogue = decoded(sources.find(dataset, data_dir), image_size)
    bad = [f"{entry.id} ({entry.reason})" for entry in catalogue.entries if entry.reason]
    if bad and bad_images == "refuse":
        text = f"must hold no broken image (found {len(bad)}; the first: {', '.join(bad[:5])})"
        raise ParameterError(*catalogue.origin, f"{text}; repair or remove what is named, or set bad_images to skip")
    return catalogue
