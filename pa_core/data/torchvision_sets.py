"""The sets that torchvision knows, by a table: where their official parts are, and what lies where."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
from PIL import Image

from pa_core.data.cache import Entry, Source
from pa_core.data.decode import one_line
from pa_core.data.folder import stamp, walk
from pa_core.errors import ParameterError


@dataclass(frozen=True)
class Row:
    """A dataset of torchvision: its class in ``torchvision.datasets``; S when none is asked for; what to put where by
    hand, relative to its folder; the arguments that give each official part; class names, where torchvision has none;
    whether torchvision can fetch it."""

    cls: str
    image_size: int
    files: str
    parts: Mapping[str, Mapping[str, Any]]
    classes: tuple[str, ...] = ()
    download: bool = True


def _splits(**names: str) -> dict[str, dict[str, Any]]:
    return {part: {"split": name} for part, name in names.items()}


_DIGITS = tuple("0123456789")
_IDX = "raw/ with the unpacked files {train,t10k}-{images-idx3,labels-idx1}-ubyte"
_ALL = {"train": {}}
_BOOL = {"train": {"train": True}, "test": {"train": False}}
_TWO = _splits(train="train", test="test")
_THREE = _splits(train="train", val="val", test="test")
_PETS = _splits(train="trainval", test="test")
_COUNTRIES = _splits(train="train", val="valid", test="test")
_IMAGENETTE = {"train": {"split": "train", "size": "160px"}, "test": {"split": "val", "size": "160px"}}
_PLACES = {"train": {"split": "train-standard", "small": True}, "test": {"split": "val", "small": True}}

_CIFAR100_FILES = "cifar-100-python/ or cifar-100-python.tar.gz"
_FLOWERS_FILES = "flowers-102/ with jpg/, imagelabels.mat and setid.mat"
_FER_FILES = "fer2013/fer2013.csv or fer2013/icml_face_data.csv, from its Kaggle challenge"
_FER_CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
_PLACES_FILES = "categories_places365.txt, places365_{train_standard,val}.txt, data_256_standard/ and val_256/"
_GTSRB_FILES = "gtsrb/ with GTSRB/Training/, GTSRB/Final_Test/Images/ and GT-final_test.csv"
_CARS_FILES = "stanford_cars/ with cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat"

# Official validation images stay validation images where there are test images too; else they are the test part.
TORCHVISION: dict[str, Row] = {
    "fashion_mnist": Row("FashionMNIST", 28, f"FashionMNIST/{_IDX}", _BOOL),
    "mnist": Row("MNIST", 28, f"MNIST/{_IDX}", _BOOL),
    "kmnist": Row("KMNIST", 28, f"KMNIST/{_IDX}", _BOOL),
    "usps": Row("USPS", 16, "usps.bz2 and usps.t.bz2", _BOOL, _DIGITS),
    "cifar10": Row("CIFAR10", 32, "cifar-10-batches-py/ or cifar-10-python.tar.gz", _BOOL),
    "cifar100": Row("CIFAR100", 32, _CIFAR100_FILES, _BOOL),
    "svhn": Row("SVHN", 32, "train_32x32.mat and test_32x32.mat", _TWO, _DIGITS),
    "stl10": Row("STL10", 96, "stl10_binary/ or stl10_binary.tar.gz", _TWO, _DIGITS),
    "caltech101": Row("Caltech101", 128, "caltech101/101_ObjectCategories/", _ALL),
    "caltech256": Row("Caltech256", 128, "caltech256/256_ObjectCategories/", _ALL),
    "flowers102": Row("Flowers102", 224, _FLOWERS_FILES, _THREE),
    "oxford_pets": Row("OxfordIIITPet", 224, "oxford-iiit-pet/ with images/ and annotations/", _PETS),
    "imagenette": Row("Imagenette", 128, "imagenette2-160/ or imagenette2-160.tgz", _IMAGENETTE),
    "fer2013": Row("FER2013", 48, _FER_FILES, _TWO, _FER_CLASSES, download=False),
    "places365": Row("Places365", 128, _PLACES_FILES, _PLACES),
    "food101": Row("Food101", 128, "food-101/ with images/ and meta/, or food-101.tar.gz", _TWO),
    "dtd": Row("DTD", 128, "dtd/dtd/ with images/ and labels/", _THREE),
    "eurosat": Row("EuroSAT", 64, "eurosat/2750/", _ALL),
    "gtsrb": Row("GTSRB", 32, _GTSRB_FILES, _TWO, tuple(f"{i:02d}" for i in range(43))),
    "stanford_cars": Row("StanfordCars", 224, _CARS_FILES, _TWO, download=False),
    "fgvc_aircraft": Row("FGVCAircraft", 224, "fgvc-aircraft-2013b/ with data/", _THREE),
    "country211": Row("Country211", 128, "country211/ with train/, valid/ and test/", _COUNTRIES),
}


def find(name: str, root: Path) -> Source:
    """A set of the table in its folder, which is made by a download where need be."""
    row = TORCHVISION[name]

    def state() -> str:
        return f"{torchvision.__version__} {row} {stamp(walk(root, root)) if root.exists() else ''}"

    return Source(
        name=name,
        folder=os.path.realpath(root),
        origin=("dataset", name),
        state=state,
        open=lambda: _opened(name, row, root),
        image_size=row.image_size,
    )


def _opened(name: str, row: Row, root: Path) -> tuple[list[str], int, Callable[[int], Entry]]:
    parts = _get(name, row, root)
    where = [(part, number) for part, images in parts.items() for number in range(len(images))]
    some: Any = parts["train"]
    classes = getattr(some, "classes", None) or getattr(some, "categories", None) or row.classes
    classes = [known if isinstance(known, str) else known[0] for known in classes]  # Imagenette has synonyms

    def read(number: int) -> Entry:
        part, number = where[number]
        try:
            image, label = parts[part][number]
        except Exception as error:  # torchvision raises whatever its formats do
            text = f"must be readable in {root} ({one_line(error)}), which needs {row.files}"
            raise ParameterError("dataset", name, text) from error
        if isinstance(image, Image.Image) and (path := getattr(image, "filename", "")):
            image.close()  # opened, not decoded yet
            image = os.fspath(path)
        id_ = Path(image).relative_to(root).as_posix() if isinstance(image, str) else f"{number:05d}"
        return Entry(f"{part}/{id_}", image, int(label), part)

    return classes, len(where), read


def _get(name: str, row: Row, root: Path) -> dict[str, Any]:
    """torchvision's datasets by part, downloaded if they are not there.

    Raises:
        ParameterError: they are not there and cannot be downloaded; says what to put where.
    """
    by_hand = f"put {row.files} into {root} and start again"
    try:
        return _open(row, root, download=False)
    except Exception as error:  # torchvision raises whatever it likes over files that are missing or damaged
        if not row.download:
            text = f"must be in {root}, for torchvision cannot download it ({one_line(error)}); {by_hand}"
            raise ParameterError("dataset", name, text) from error
    print(f"downloading {name} to {root}", flush=True)
    try:
        return _download(row, root)
    except Exception as error:
        text = f"must be in {root} or come by a download, and neither was possible ({one_line(error)}); {by_hand}"
        raise ParameterError("dataset", name, text) from error


def _download(row: Row, root: Path) -> dict[str, Any]:
    new = root / ".download"
    if root.exists() and any(walk(root, root)):  # archives that lie there are unpacked, what is missing is fetched
        return _open(row, root, download=True)
    # torchvision takes half of an unpacked archive for all of it, so it unpacks elsewhere and the whole is moved.
    shutil.rmtree(new, ignore_errors=True)  # of a download that was killed
    new.mkdir(parents=True)
    try:
        _open(row, new, download=True)
        for path in list(new.iterdir()):
            shutil.rmtree(root / path.name, ignore_errors=True)  # an empty folder that torchvision has made
            path.replace(root / path.name)
    finally:
        shutil.rmtree(new)
    return _open(row, root, download=False)


def _open(row: Row, root: Path, *, download: bool) -> dict[str, Any]:
    kind = getattr(torchvision.datasets, row.cls)
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {"loader": str} if "loader" in known else {}  # a path stays a path
    if "download" in known:
        options["download"] = download
    return {part: kind(str(root), **some, **options) for part, some in row.parts.items()}
