"""A dataset, split and decoded: three parts that are read by index."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from pa_core.data import cache, sources, splits
from pa_core.errors import ParameterError

SHOWN = 5
COPIED = 1024
"""Images that are moved to a device at once."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Part:
    """Training, validation or test images, in a fixed order. N is their number.

    Attributes:
        name: ``train``, ``val`` or ``test``.
        ids: unique, the same wherever the images lie.
        labels: int64 [N].
        sizes: int64 [N, 2], height and width of the original images.
        store: uint8 [M, 3, S, S], read-only, of the whole dataset; use :meth:`read`.
        rows: int64 [N], where this part's images are in the store.
        images: None, or uint8 [N, 3, S, S] on a device, see :meth:`on`.
    """

    name: str
    ids: tuple[str, ...]
    labels: Tensor
    sizes: Tensor
    store: np.ndarray
    rows: np.ndarray
    images: Tensor | None = None
    counts: Counter[str] = field(default_factory=Counter)

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
        return self.counts["reads"]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Part({self.name!r}, {len(self)} images)"

    def on(self, device: torch.device) -> Part:
        """This part with all its images on a device, where reading is one gather; they are read once for it."""
        images = torch.empty((len(self), *self.shape), dtype=torch.uint8, device=device)
        for index in torch.arange(len(self)).split(COPIED):
            images[index[0] : index[-1] + 1] = self.read(index)
        return replace(self, images=images)

    def read(self, index: Tensor) -> Tensor:
        """The images of the given positions, in that order.

        Args:
            index: int64 [n], each from 0 to N - 1; on any device.

        Returns:
            uint8 [n, 3, S, S], a copy; on the part's device, on the CPU when they are in the store.
        """
        self.counts["reads"] += len(index)
        if self.images is not None:
            return self.images.index_select(0, send(index, self.images.device))
        return torch.from_numpy(self.store[self.rows[index.cpu().numpy()]])


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images of C classes in three parts that share no content.

    Attributes:
        classes: C names, by label.
        image_size: S, pixels per side.
        digest: SHA-256 (hex) of ids, labels, contents, classes and official parts; not of where the images lie, nor of
            how they were split here.
        split_digest: SHA-256 (hex) of which id is in which part.
        skipped: images that were left out because they cannot be used, each with the reason.
        dropped: ids left out of training (or of official validation images) as copies of test (or validation) images.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    train: Part
    val: Part
    test: Part
    digest: str
    split_digest: str
    skipped: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def load(
    *,
    dataset: str,
    data_dir: str | None = None,
    bad_images: str = "refuse",
    image_size: int | None = None,
    train_fraction: float = 1.0,
    folds: int = 5,
    fold: int = 0,
    seed: int = 0,
) -> Dataset:
    """A dataset, downloaded, decoded and split as far as that was not done before.

    Args:
        dataset, data_dir, bad_images, image_size: what :class:`pa_core.params.Experiment` says of them. The default
            size of ``folder`` is the largest of 32, 64, 96, 128 and 224 that is not above the median shorter side.
        train_fraction: share of each class's training images to keep; smaller shares are part of larger ones.
        folds, fold: the validation part is fold ``fold`` of ``folds``, where no official one exists.
        seed: drives folds and fraction. The test part never depends on it.

    Raises:
        ParameterError: there is no such dataset, or the images do not allow what is asked.
    """
    origin, found, pixels = _find(dataset, data_dir, bad_images, image_size)
    rows = splits.split(found, origin=origin, folds=folds, fold=fold, seed=seed, train_fraction=train_fraction)
    labels, sizes = torch.tensor(found.labels), torch.tensor(found.sizes)

    def part(name: str) -> Part:
        chosen = rows[name]
        ids = tuple(found.ids[row] for row in chosen.tolist())
        return Part(name=name, ids=ids, labels=labels[chosen], sizes=sizes[chosen], store=pixels, rows=chosen)

    train, val, test = map(part, ("train", "val", "test"))
    return Dataset(
        name=dataset,
        classes=tuple(found.classes),
        image_size=pixels.shape[-1],
        train=train,
        val=val,
        test=test,
        digest=_digest(found),
        split_digest=_sha([[some.name, some.ids] for some in (train, val, test)]),
        skipped=tuple(f"{name}: {reason}" for name, reason in zip(found.ids, found.reasons, strict=True) if reason),
        dropped=tuple(found.ids[row] for row in rows["dropped"].tolist()),
    )


def identify(
    *, dataset: str, data_dir: str | None = None, bad_images: str = "refuse", image_size: int | None = None
) -> tuple[str, int]:
    """A dataset's digest and its image size, as :func:`load` has them. No image is decoded if all are in the cache."""
    _, found, pixels = _find(dataset, data_dir, bad_images, image_size)
    return _digest(found), pixels.shape[-1]


def fits(parts: Iterable[Part], device: torch.device) -> bool:
    """Whether the images of the parts take at most half of the memory that is free on a device.

    The rest is for the network and its activations.
    """
    needed = sum(len(part) * math.prod(part.shape) for part in parts)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return needed <= free / 2


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host does not wait for a copy to CUDA, which goes through pinned memory."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _find(
    dataset: str, data_dir: str | None, bad_images: str, image_size: int | None
) -> tuple[tuple[str, Any], cache.Catalogue, np.ndarray]:
    """What to blame, the catalogue, and uint8 [N, 3, S, S]."""
    source = sources.find(dataset, data_dir)
    size = image_size or source.image_size
    found, pixels = source.ready if source.ready and size == source.image_size else cache.decoded(source, size)
    bad = [f"{name} ({reason})" for name, reason in zip(found.ids, found.reasons, strict=True) if reason]
    if bad and bad_images == "refuse":
        named = ", ".join(bad[:SHOWN]) + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
        text = f"must hold no broken image ({named}); repair or remove what is named, or set bad_images to skip"
        raise ParameterError(*source.origin, text)
    return source.origin, found, pixels


def _digest(found: cache.Catalogue) -> str:
    columns = zip(found.ids, found.labels, found.parts, found.digests, found.reasons, strict=True)
    return _sha([list(found.classes), [image for *image, reason in columns if not reason]])


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
