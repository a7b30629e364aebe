"""A dataset's name -> its images, labels and official parts, before any is decoded.

Three kinds: ``fashion_mini``, which comes with the package; sets that torchvision knows, by a
table; and ``folder``.
"""

from __future__ import annotations

import hashlib
import http.client
import inspect
import lzma
import os
import pickle
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image
from torch.utils.data import ConcatDataset

from pa_core.data import decode, folder, store, workers
from pa_core.params import ParameterError, data_home, nearest

UNFINISHED = ".download_unfinished"
SIZES = (32, 64, 96, 128, 224)
PARTS = ("train", "val", "test")
EMBEDDED = Path(__file__).resolve().parents[1] / "fashion_mini" / "fashion_mini.npz"


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Images that are known but not decoded yet. N counts all files, the broken ones too.

    Attributes:
        name: the dataset's name.
        origin: parameter and value to blame for what is wrong with the images.
        classes: names, by label.
        ids: unique, sorted within a part.
        labels: int64 [N].
        parts: official part of each: ``train``, ``val`` or ``test``.
        digests: SHA-256 (hex) of each, see :func:`pa_core.data.decode.digest`; empty where it could
            not be read.
        sizes: int64 [N, 2], height and width as stored.
        bad: rows that are no images, with the reason.
        image_size: what it is when none is asked for.
        things: gives the N files or images themselves; may take a while.
        ready: uint8 [N, 3, S, S], where the images of the default size need no decoding.
    """

    name: str
    origin: tuple[str, Any]
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    labels: np.ndarray
    parts: np.ndarray
    digests: tuple[str, ...]
    sizes: np.ndarray
    bad: Mapping[int, str]
    image_size: int
    things: Callable[[], Sequence[decode.Thing]]
    ready: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A dataset of torchvision.

    Attributes:
        cls: name of its class in ``torchvision.datasets``.
        image_size: when none is asked for.
        train, val, test: arguments that give the part; where there is no official one, None.
        files: what to put where by hand, relative to the data folder.
        download: whether torchvision can fetch it.
        classes: names, where torchvision has none.
    """

    cls: str
    image_size: int
    train: Mapping[str, Any]
    files: str
    val: Mapping[str, Any] | None = None
    test: Mapping[str, Any] | None = None
    download: bool = True
    classes: tuple[str, ...] = ()


def _digits(n: int = 10) -> tuple[str, ...]:
    return tuple(f"{i:0{len(str(n - 1))}d}" for i in range(n))


_IDX = "raw/ with the unpacked files {train,t10k}-{images-idx3,labels-idx1}-ubyte"
_BOOL = {"train": {"train": True}, "test": {"train": False}}
_TWO = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
_FER = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")

# Official validation images stay validation images where there are test images too; else they are
# the test part.
TORCHVISION: dict[str, Row] = {
    "fashion_mnist": Row(cls="FashionMNIST", image_size=28, files=f"FashionMNIST/{_IDX}", **_BOOL),
    "mnist": Row(cls="MNIST", image_size=28, files=f"MNIST/{_IDX}", **_BOOL),
    "kmnist": Row(cls="KMNIST", image_size=28, files=f"KMNIST/{_IDX}", **_BOOL),
    "usps": Row(cls="USPS", image_size=16, files="usps.bz2 and usps.t.bz2", classes=_digits(), **_BOOL),
    "cifar10": Row(
        cls="CIFAR10",
        image_size=32,
        files="cifar-10-batches-py/ or cifar-10-python.tar.gz",
        **_BOOL,
    ),
    "cifar100": Row(cls="CIFAR100", image_size=32, files="cifar-100-python/ or cifar-100-python.tar.gz", **_BOOL),
    "svhn": Row(
        cls="SVHN",
        image_size=32,
        files="train_32x32.mat and test_32x32.mat",
        classes=_digits(),
        **_TWO,
    ),
    "stl10": Row(
        cls="STL10",
        image_size=96,
        files="stl10_binary/ or stl10_binary.tar.gz",
        classes=_digits(),
        **_TWO,
    ),
    "caltech101": Row(cls="Caltech101", image_size=128, files="caltech101/101_ObjectCategories/", train={}),
    "caltech256": Row(cls="Caltech256", image_size=128, files="caltech256/256_ObjectCategories/", train={}),
    "flowers102": Row(
        cls="Flowers102",
        image_size=224,
        files="flowers-102/ with jpg/, imagelabels.mat and setid.mat",
        **_THREE,
    ),
    "oxford_pets": Row(
        cls="OxfordIIITPet",
        image_size=224,
        files="oxford-iiit-pet/ with images/ and annotations/",
        train={"split": "trainval"},
        test={"split": "test"},
    ),
    "imagenette": Row(
        cls="Imagenette",
        image_size=128,
        files="imagenette2-160/ or imagenette2-160.tgz",
        train={"split": "train", "size": "160px"},
        test={"split": "val", "size": "160px"},
    ),
    "fer2013": Row(
        cls="FER2013",
        image_size=48,
        files="fer2013/fer2013.csv or fer2013/icml_face_data.csv, from its Kaggle challenge",
        download=False,
        classes=_FER,
        **_TWO,
    ),
    "places365": Row(
        cls="Places365",
        image_size=128,
        files="categories_places365.txt, places365_{train_standard,val}.txt, data_256_standard/ and val_256/",
        train={"split": "train-standard", "small": True},
        test={"split": "val", "small": True},
    ),
    "food101": Row(
        cls="Food101",
        image_size=128,
        files="food-101/ with images/ and meta/, or food-101.tar.gz",
        **_TWO,
    ),
    "dtd": Row(cls="DTD", image_size=128, files="dtd/dtd/ with images/ and labels/", **_THREE),
    "eurosat": Row(cls="EuroSAT", image_size=64, files="eurosat/2750/", train={}),
    "gtsrb": Row(
        cls="GTSRB",
        image_size=32,
        files="gtsrb/ with GTSRB/Training/, GTSRB/Final_Test/Images/ and GT-final_test.csv",
        classes=_digits(43),
        **_TWO,
    ),
    "stanford_cars": Row(
        cls="StanfordCars",
        image_size=224,
        files="stanford_cars/ with cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat",
        download=False,
        **_TWO,
    ),
    "fgvc_aircraft": Row(cls="FGVCAircraft", image_size=224, files="fgvc-aircraft-2013b/ with data/", **_THREE),
    "country211": Row(
        cls="Country211",
        image_size=128,
        files="country211/ with train/, valid/ and test/",
        train={"split": "train"},
        val={"split": "valid"},
        test={"split": "test"},
    ),
}

DATASETS: dict[str, Row | None] = {"fashion_mini": None, **TORCHVISION, "folder": None}
"""Every dataset by name."""


def names() -> list[str]:
    """Names of the datasets, the embedded one first and ``folder`` last."""
    return list(DATASETS)


def find(name: str, data_dir: str | None) -> Source:
    """The images of a dataset, downloaded first where need be.

    Raises:
        ParameterError: the name is unknown, ``data_dir`` is no such folder, or the images are not
            to be had.
    """
    if name not in DATASETS:
        allowed = f"allowed is one of {', '.join(DATASETS)}"
        text = f"there is no such dataset{nearest(name, DATASETS)}"
        raise ParameterError("dataset", name, f"{text}; {allowed}")
    root = None if data_dir is None else Path(data_dir).expanduser().absolute()
    if root is not None and not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ParameterError("data_dir", data_dir, f"it {what}; allowed is a folder that exists")
    if name == "folder":
        if root is None:
            allowed = "dataset = 'folder' needs it: the folder that holds the class folders"
            raise ParameterError("data_dir", None, allowed)
        return _folder(root)
    if name == "fashion_mini":
        if root is not None:
            allowed = "for a folder of class folders set dataset to folder"
            raise ParameterError("data_dir", data_dir, f"fashion_mini comes with the package; {allowed}")
        return _fashion_mini()
    return _torchvision(name, TORCHVISION[name], root or data_home().absolute() / name)


# folder


def _folder(root: Path) -> Source:
    classes, files = folder.scan(root)
    found = folder.describe(root, files)
    bad = {row: reason for row, (*_, reason) in enumerate(found) if reason is not None}
    bad |= {row: "lies in no class folder" for row, file in enumerate(files) if file.label < 0}
    sizes = np.array([entry[1:3] for entry in found], dtype=np.int64).reshape(-1, 2)
    return Source(
        name="folder",
        origin=("data_dir", str(root)),
        classes=classes,
        ids=tuple(file.id for file in files),
        labels=np.array([file.label for file in files], dtype=np.int64),
        parts=np.array([file.part for file in files]),
        digests=tuple(entry[0] for entry in found),
        sizes=sizes,
        bad=bad,
        image_size=_usual_size(np.delete(sizes, list(bad), axis=0)),
        things=lambda: [file.path for file in files],
    )


def _usual_size(sizes: np.ndarray) -> int:
    """The largest of SIZES that is not above the median shorter side; 32 for smaller images."""
    median = float(np.median(sizes.min(axis=1))) if len(sizes) else 0
    return max((size for size in SIZES if size <= median), default=SIZES[0])


# fashion_mini


def embedded() -> dict[str, np.ndarray]:
    """The arrays of ``fashion_mini``: images uint8 [n, 28, 28], labels, rows in the originals."""
    with np.load(EMBEDDED) as file:
        return dict(file)


def _fashion_mini() -> Source:
    arrays, both = embedded(), ("train", "test")
    images, labels = (np.concatenate([arrays[f"{part}_{kind}"] for part in both]) for kind in ("images", "labels"))
    things = [Image.fromarray(image) for image in images]
    return Source(
        name="fashion_mini",
        origin=("dataset", "fashion_mini"),
        classes=tuple(torchvision.datasets.FashionMNIST.classes),
        ids=tuple(f"{part}/{row:05d}" for part in both for row in arrays[f"{part}_rows"]),
        labels=labels.astype(np.int64),
        parts=np.repeat(both, [len(arrays[f"{part}_rows"]) for part in both]),
        digests=tuple(decode.digest(thing) for thing in things),
        sizes=np.full((len(images), 2), 28),
        bad={},
        image_size=28,
        things=lambda: things,
        ready=np.repeat(images[:, None], 3, axis=1),
    )


# torchvision

FAILED = (
    *(OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AssertionError),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, pickle.UnpicklingError),
    *(http.client.HTTPException, ImportError),
)
"""What torchvision raises when files are missing or damaged, or cannot be fetched."""


class Things:
    """The images of a dataset's parts, one after the other, and their labels."""

    def __init__(self, parts: Mapping[str, Any]):
        self.all = ConcatDataset(list(parts.values()))

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> decode.Thing:
        return self.pair(index)[0]

    def pair(self, index: int) -> tuple[decode.Thing, int]:
        """A path where the image is a file, else its pixels; and the label."""
        thing, label = self.all[index]
        if isinstance(thing, Image.Image) and getattr(thing, "filename", ""):
            thing.close()  # opened, not decoded yet: the workers do that
            thing = os.fspath(thing.filename)
        return thing, int(label)


def _torchvision(name: str, row: Row, root: Path) -> Source:
    opened = cache(lambda: _get(name, row, root))  # at most once, and not when all is cached
    path = folder.index_path("torchvision", name, os.path.realpath(root))
    kept = folder.read_index(path)
    if kept is None or kept["mark"] != _mark(row, root):
        kept = _examine(name, row, root, opened())
        folder.write_index(path, kept)
    described = kept["described"]
    return Source(
        name=name,
        origin=("dataset", name),
        classes=tuple(kept["classes"]),
        ids=tuple(kept["ids"]),
        labels=np.array(kept["labels"], dtype=np.int64),
        parts=np.array(kept["parts"]),
        digests=tuple(digest for digest, *_ in described),
        sizes=np.array([size for _, *size, _ in described], dtype=np.int64).reshape(-1, 2),
        bad={i: reason for i, (*_, reason) in enumerate(described) if reason is not None},
        image_size=row.image_size,
        things=lambda: Things(opened()),
    )


def _mark(row: Row, root: Path) -> str:
    """Changes when any file below the root does, or what is read there."""
    mark = hashlib.sha256(f"{torchvision.__version__} {row}".encode())
    for entry in folder.walk(root) if root.exists() else ():
        mark.update(f"{entry.path} {folder.stamp(entry)}\n".encode(errors="surrogateescape"))
    return mark.hexdigest()


def _examine(name: str, row: Row, root: Path, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of every image, as it is kept in the index: id, label, part, digest, size."""
    things, ids, labels, described, paths = Things(parts), [], [], [], []
    of = [part for part, images in parts.items() for _ in range(len(images))]
    number = [i for images in parts.values() for i in range(len(images))]
    try:
        with workers.progress(len(things), f"reading {name}") as bar:
            for index in range(len(things)):
                thing, label = things.pair(index)
                labels.append(label)
                if isinstance(thing, str):
                    paths.append(thing)
                    ids.append(f"{of[index]}/{Path(thing).relative_to(root).as_posix()}")
                else:
                    described.append((*decode.describe(thing), None))
                    ids.append(f"{of[index]}/{number[index]:05d}")
                bar.update()
    except FAILED as error:
        text = f"an image or label in {root} cannot be read ({decode.reason(error)})"
        raise ParameterError("dataset", name, f"{text}; it needs {row.files}") from error
    if paths:
        replies = workers.describe(paths, range(len(paths)), text=f"hashing {name}")
        described = [(*(value or ("", 0, 0)), reason) for _, value, reason in replies]
    classes = _classes(next(iter(parts.values())), row, max(labels) + 1)
    kept = {"mark": _mark(row, root), "classes": classes, "ids": ids, "labels": labels, "parts": of}
    return kept | {"described": described}


def _classes(images: Any, row: Row, count: int) -> list[str]:
    known = getattr(images, "classes", None) or getattr(images, "categories", None) or row.classes
    known = known or _digits(count)
    return [name if isinstance(name, str) else name[0] for name in known]  # Imagenette has synonyms


def _get(name: str, row: Row, root: Path) -> dict[str, Any]:
    """torchvision's datasets by part, downloaded if they are not there.

    Raises:
        ParameterError: they are not there and cannot be downloaded; says what to put where.
    """
    by_hand = f"put {row.files} into {root} and start again"
    marker = root / UNFINISHED
    if not marker.exists():
        try:
            return _open(row, root, download=False)
        except FAILED as error:
            if not row.download:
                text = "torchvision cannot download it, nor read it from"
                text = f"{text} {root} ({decode.reason(error)})"
                raise ParameterError("dataset", name, f"{text}; {by_hand}") from error
    path = folder.index_path("download", os.path.realpath(root)).with_suffix(".lock")
    with store.writable():
        path.parent.mkdir(parents=True, exist_ok=True)
    with store.lock(path, f"waiting for another process that downloads {name}"):
        if marker.exists():  # and nobody is at it
            text = f"its download was cut off; delete what is in {root}, {marker.name} too,"
            raise ParameterError("dataset", name, f"{text} and start again")
        print(f"downloading {name} to {root}", file=sys.stderr, flush=True)
        try:
            with _all_or_nothing(root, marker):
                return _open(row, root, download=True)
        except FAILED as error:
            text = f"it could neither be read from {root} nor downloaded ({decode.reason(error)})"
            raise ParameterError("dataset", name, f"{text}; {by_hand}") from error


def _open(row: Row, root: Path, *, download: bool) -> dict[str, Any]:
    kind = getattr(torchvision.datasets, row.cls)
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {"loader": str} if "loader" in known else {}  # a path stays a path
    if "download" in known:
        options["download"] = download
    asked = {part: getattr(row, part) for part in PARTS}
    return {part: kind(str(root), **some, **options) for part, some in asked.items() if some is not None}


@contextmanager
def _all_or_nothing(root: Path, marker: Path) -> Iterator[None]:
    """Takes away what came newly when the download fails: torchvision would take half for all."""
    root.mkdir(parents=True, exist_ok=True)
    before = {marker, *root.rglob("*")}
    marker.touch()
    try:
        yield
    except BaseException:
        new = set(root.rglob("*")) - before
        for path in sorted(new, reverse=True):  # what is in a folder goes before it
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        raise
    finally:
        marker.unlink()
