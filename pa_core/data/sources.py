"""A dataset's name -> its images, before any is read: the embedded sets, torchvision's, and ``folder``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST

from pa_core.data import folder, torchvision_sets
from pa_core.data.cache import Catalogue, Entry, Source
from pa_core.data.decode import content_digest
from pa_core.data.torchvision_sets import TORCHVISION, Row
from pa_core.errors import ParameterError, did_you_mean
from pa_core.files import data_home

FASHION_MINI = Path(__file__).resolve().parents[1] / "fashion_mini" / "fashion_mini.npz"
KINDS = ("images", "labels", "rows")

DATASETS: dict[str, Row | None] = {"fashion_mini": None, **TORCHVISION, "folder": None}
"""Every dataset by name."""


def names() -> list[str]:
    """Names of the datasets, the embedded one first and ``folder`` last."""
    return list(DATASETS)


def find(name: str, data_dir: str | None) -> Source:
    """A dataset, not read yet.

    Raises:
        ParameterError: the name is unknown, or ``data_dir`` is no folder that holds it.
    """
    if name not in DATASETS:
        raise ParameterError("dataset", name, f"must be one of {', '.join(DATASETS)}{did_you_mean(name, DATASETS)}")
    root = None if data_dir is None else Path(data_dir).expanduser().absolute()
    if root is not None and not root.is_dir():
        raise ParameterError("data_dir", data_dir, "must be a folder that exists")
    if name == "folder":
        if root is None:
            raise ParameterError("data_dir", None, "must be the folder that holds the class folders")
        return folder.find(root)
    if name == "fashion_mini":
        if root is not None:
            text = "must be none, for fashion_mini comes with the package (set dataset to folder for your own images)"
            raise ParameterError("data_dir", data_dir, text)
        return _fashion_mini()
    return torchvision_sets.find(name, root or data_home().absolute() / name)


@cache  # half a second, and the same for every run of a process
def _fashion_mini() -> Source:
    arrays, both = fashion_mini(), ("train", "test")
    images, labels, rows = (np.concatenate([arrays[f"{part}_{kind}"] for part in both]) for kind in KINDS)
    parts = np.repeat(both, [len(arrays[f"{part}_rows"]) for part in both]).tolist()
    pictures = [Image.fromarray(image) for image in images]
    catalogue = Catalogue(
        classes=FashionMNIST.classes,
        ids=[f"{part}/{row:05d}" for part, row in zip(parts, rows, strict=True)],
        labels=labels.tolist(),
        parts=parts,
        digests=[content_digest(picture) for picture in pictures],
        sizes=[(28, 28)] * len(pictures),
        reasons=[""] * len(pictures),
    )
    entries = list(map(Entry, catalogue.ids, pictures, catalogue.labels, parts))
    return Source(
        name="fashion_mini",
        folder="",
        origin=("dataset", "fashion_mini"),
        state=lambda: "fixed",
        open=lambda: (catalogue.classes, len(entries), entries.__getitem__),
        image_size=28,
        ready=(catalogue, np.repeat(images[:, None], 3, axis=1)),
    )


def fashion_mini() -> dict[str, np.ndarray]:
    """The arrays of ``fashion_mini``: images uint8 [n, 28, 28], labels and rows in the originals, of both parts."""
    with np.load(FASHION_MINI) as file:
        return dict(file)
