"""A dataset, split and decoded: three parts that are read by index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pa_core.data import sources, splits, store
from pa_core.data.sources import Source
from pa_core.params import COERCE, ParameterError

SHOWN = 5
COPIED = 1024
"""Images that are moved to a device at once."""


class Counter:
    """Counts images that were read."""

    def __init__(self) -> None:
        self.images = 0


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
        images: None, or uint8 [N + room, 3, S, S] on a device, see :meth:`on`.
    """

    name: str
    ids: tuple[str, ...]
    labels: Tensor
    sizes: Tensor
    store: np.ndarray
    rows: np.ndarray
    counter: Counter = field(default_factory=Counter)
    images: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, S, S)."""
        return self.store.shape[1:]

    @property
    def resident(self) -> torch.device | None:
        """The device that holds the images; None when each is read from the store."""
        return None if self.images is None else self.images.device

    @property
    def reads(self) -> int:
        """How many images were read so far."""
        return self.counter.images

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Part({self.name!r}, {len(self)} images)"

    def on(self, device: torch.device, *, room: int = 0) -> Part:
        """This part with all its images on a device, where reading is one gather; they are read once for it.

        Args:
            room: rows left behind the images, uninitialised, for the proxies of an overlay.
        """
        images = torch.empty((len(self) + room, *self.shape), dtype=torch.uint8, device=device)
        for index in torch.arange(len(self)).split(COPIED):
            images[index[0] : index[-1] + 1] = self.read(index)
        return replace(self, images=images)

    def read(self, index: Tensor) -> Tensor:
        """The images of the given positions, in that order.

        Args:
            index: int64 [n], each from 0 to N - 1; on any device.

        Returns:
            uint8 [n, 3, S, S], a copy; on the part's device, on the CPU when they are in the store.

        Raises:
            IndexError: a position is out of range. One that lies on a GPU is not looked at: that would wait for it.
        """
        if index.ndim != 1 or (
            index.device.type == "cpu" and len(index) and not 0 <= index.min() <= index.max() < len(self)
        ):
            raise IndexError(f"positions are a list of numbers from 0 to {len(self) - 1}")
        self.counter.images += len(index)
        if self.images is not None:
            return self.images.index_select(0, store.send(index, self.images.device))
        return torch.from_numpy(self.store[self.rows[index.cpu().numpy()]])


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images of C classes in three parts that share no content.

    Attributes:
        name: as asked for.
        classes: C names, by label.
        image_size: S, pixels per side.
        train, val, test: the parts.
        digest: SHA-256 (hex) of ids, labels, contents, classes and official parts; not of where the
            images lie, nor of how they were split here.
        split_digest: SHA-256 (hex) of which id is in which part.
        skipped: files that were left out because they are no images, each with the reason.
        dropped: ids left out of training (or of official validation images) as copies of test (or
            validation) images.
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
        dataset: one of :func:`names`.
        data_dir: the folder for ``folder``; for a downloaded set, where it lies instead of in the
            data home.
        bad_images: ``refuse`` files that are no images or cut short, or ``skip`` them.
        image_size: pixels per side; the dataset's own by default. For ``folder`` that is the
            largest of 32, 64, 96, 128 and 224 that is not above the median shorter side of its
            images.
        train_fraction: share of each class's training images to keep, at least one; smaller shares
            are part of larger ones.
        folds, fold: the validation part is fold ``fold`` of ``folds``, where no official one
            exists.
        seed: drives folds and fraction. The test part never depends on it.

    Raises:
        ParameterError: a parameter is refused, or the images do not allow it.
    """
    size_and_data = {"bad_images": bad_images, "image_size": image_size}
    options = {"folds": folds, "fold": fold, "seed": seed, "train_fraction": train_fraction}
    checked = _checked(size_and_data | options)
    bad_images, image_size = checked.pop("bad_images"), checked.pop("image_size")
    source = sources.find(dataset, data_dir)
    size = image_size or source.image_size
    if bad_images == "skip" or not source.bad:
        # A class that is too small is refused before anything is decoded.
        _split(source, source.bad, checked)
    pixels, broken = _pixels(source, size)
    bad = {**source.bad, **broken}
    if bad and bad_images == "refuse":
        _refuse(source, bad)
    rows = _split(source, bad, checked)
    parts = {name: _part(source, name, pixels, getattr(rows, name)) for name in sources.PARTS}
    return Dataset(
        name=dataset,
        classes=source.classes,
        image_size=size,
        **parts,
        digest=_digest(source, bad),
        split_digest=_sha([[name, part.ids] for name, part in parts.items()]),
        skipped=tuple(f"{source.ids[row]}: {bad[row]}" for row in sorted(bad)),
        dropped=tuple(source.ids[row] for row in rows.dropped),
    )


def _checked(parameters: Mapping[str, Any]) -> dict[str, Any]:
    coerced = {}
    for name, value in parameters.items():
        try:
            coerced[name] = COERCE[name](value)
        except ValueError as error:
            raise ParameterError(name, value, str(error)) from None
    if coerced["fold"] >= coerced["folds"]:
        allowed = f"allowed is 0 to {coerced['folds'] - 1}, for folds = {coerced['folds']}"
        raise ParameterError("fold", coerced["fold"], allowed)
    return coerced


def _refuse(source: Source, bad: Mapping[int, str]) -> None:
    rows = sorted(bad)
    named = ", ".join(f"{source.ids[row]} ({bad[row]})" for row in rows[:SHOWN])
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    count = len(rows)
    files = "1 file is no image or is" if count == 1 else f"{count} files are no images or are"
    allowed = "repair or remove what is named, or set bad_images to skip"
    raise ParameterError(*source.origin, f"{files} cut short: {named}{more}; {allowed}")


def _split(source: Source, bad: Mapping[int, str], options: Mapping[str, Any]) -> splits.Split:
    return splits.split(
        rows=np.delete(np.arange(len(source.ids)), list(bad)),
        labels=source.labels,
        digests=source.digests,
        parts=source.parts,
        classes=source.classes,
        origin=source.origin,
        **options,
    )


def _pixels(source: Source, size: int) -> store.Pixels:
    if source.ready is not None and source.ready.shape[-1] == size:
        return source.ready, {}
    return store.images(source.things, source.digests, size=size, title=source.name)


def _part(source: Source, name: str, pixels: np.ndarray, rows: np.ndarray) -> Part:
    return Part(
        name=name,
        ids=tuple(source.ids[row] for row in rows),
        labels=torch.from_numpy(source.labels[rows]),
        sizes=torch.from_numpy(source.sizes[rows]),
        store=pixels,
        rows=rows,
    )


def _digest(source: Source, bad: Mapping[int, str]) -> str:
    labels, parts = source.labels.tolist(), source.parts.tolist()
    images = list(zip(source.ids, labels, parts, source.digests, strict=True))
    return _sha([source.classes, [image for row, image in enumerate(images) if row not in bad]])


def _sha(content: Sequence) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
