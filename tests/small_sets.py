"""Small sets in the formats that torchvision reads: a function per set fills a folder."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

from pa_core import data
from pa_core.errors import ParameterError

Patch = pytest.MonkeyPatch
NOWHERE = "http://127.0.0.1:9/"


def noise(seed: int, *, width: int = 16, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refused(match: str) -> Any:
    return pytest.raises(ParameterError, match=match)


def everything(dataset: data.Dataset) -> dict[str, torch.Tensor]:
    """Every image by id."""
    parts = (dataset.train, dataset.val, dataset.test)
    return {
        name: image for part in parts for name, image in zip(part.ids, part.read(torch.arange(len(part))), strict=True)
    }


def save(path: Path, seed: int, **size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, **size).save(path)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def class_folders(
    top: Path, names: list[str], count: int, *, start: int = 0, name: str = "{i}.jpg", **size: int
) -> None:
    """``count`` images for each name, no two alike."""
    for c, folder in enumerate(names):
        for i in range(count):
            save(top / folder / name.format(i=i, name=folder, c=c + 1), start + 100 * c + i, **size)


def mnist(root: Path, patch: Patch | None = None, kind: str = "FashionMNIST") -> None:
    raw = root / kind / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 60), ("t10k", 20)):
        images = np.random.RandomState(count).randint(0, 256, (count, 28, 28))
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (raw / f"{prefix}-{name}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())


def cifar10(root: Path, patch: Patch) -> None:
    folder, kind = root / "cifar-10-batches-py", torchvision.datasets.CIFAR10
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        pixels = np.random.RandomState(i).randint(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 0, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane", "automobile"]}))
    for table in ("train_list", "test_list"):  # torchvision's MD5 sums, for our files; its code stays
        patch.setattr(kind, table, [[name, md5(folder / name)] for name, _ in getattr(kind, table)])
    patch.setattr(kind, "meta", kind.meta | {"md5": md5(folder / "batches.meta")})


def svhn(root: Path, patch: Patch) -> None:
    table = {}
    root.mkdir(parents=True)
    for seed, (part, count) in enumerate((("train", 60), ("test", 20))):
        pixels = np.random.RandomState(seed).randint(0, 256, (32, 32, 3, count), dtype=np.uint8)
        path = root / f"{part}_32x32.mat"
        scipy.io.savemat(path, {"X": pixels, "y": (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]})
        table[part] = [f"{NOWHERE}{path.name}", path.name, md5(path)]
    patch.setattr(torchvision.datasets.SVHN, "split_list", table)


def caltech101(root: Path, patch: Patch | None = None) -> None:
    top = root / "caltech101" / "101_ObjectCategories"
    class_folders(top, ["BACKGROUND_Google"], 6, start=1000, name="image_{i:04d}.jpg")
    for c, name in enumerate(("ant", "bee")):
        for i in range(1, 7):
            save(top / name / f"image_{i:04d}.jpg", 10 * c + i, width=40)


def caltech256(root: Path, patch: Patch) -> None:
    for c, name in enumerate(["001.ak47", "002.flag"], start=1):
        for i in range(1, 7):
            save(root / "caltech256" / "256_ObjectCategories" / name / f"{c:03d}_{i:04d}.jpg", 10 * c + i)


def flowers(root: Path, patch: Patch) -> None:
    base, kind = root / "flowers-102", torchvision.datasets.Flowers102
    for n in range(1, 9):
        save(base / "jpg" / f"image_{n:05d}.jpg", n)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": [1, 2, 1, 2, 1, 2, 1, 2]})
    scipy.io.savemat(base / "setid.mat", {"trnid": [1, 2, 3, 4], "valid": [5, 6], "tstid": [7, 8]})
    sums = {name: md5(base / name) for name in ("imagelabels.mat", "setid.mat")}
    patch.setattr(
        kind, "_file_dict", {key: (name, sums.get(name, old)) for key, (name, old) in kind._file_dict.items()}
    )
    patch.setattr(kind, "classes", ["pink primrose", "rose"])


def pets(root: Path, patch: Patch) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for part, numbers in (("trainval", range(1, 6)), ("test", range(6, 8))):
        lines = []
        for label, name in ((1, "Abyssinian"), (2, "english_setter")):
            for n in numbers:
                save(base / "images" / f"{name}_{n}.jpg", 10 * label + n)
                lines.append(f"{name}_{n} {label} {label} 1")
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")


def imagenette(root: Path, patch: Patch) -> None:
    for part, count in (("train", 5), ("val", 2)):
        folders = ["n01440764", "n02102040"]
        class_folders(root / "imagenette2-160" / part, folders, count, start=1000 * count, name="{i}.jpeg")


def fer2013(root: Path, patch: Patch) -> None:
    path, kind = root / "fer2013" / "fer2013.csv", torchvision.datasets.FER2013
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["emotion", "pixels", "Usage"])
        for n in range(14 * 5):
            pixels = np.random.RandomState(n).randint(0, 256, 48 * 48)
            table.writerow([n % 7, " ".join(map(str, pixels)), ["Training", "PublicTest"][n % 10 == 9]])
    patch.setattr(kind, "_RESOURCES", kind._RESOURCES | {"fer": ("fer2013.csv", md5(path))})


def places365(root: Path, patch: Patch) -> None:
    kind, lines = torchvision.datasets.Places365, {"train_standard": [], "val": []}
    for n in range(14):
        name, label = (("/a/airfield", 0), ("/b/bridge", 1))[n % 2]
        part = "val" if n > 11 else "train_standard"
        file = f"Places365_val_{n:08d}.jpg" if part == "val" else f"{name}/{n:08d}.jpg"
        save(root / ("val_256" if part == "val" else "data_256_standard") / file.lstrip("/"), n)
        lines[part].append(f"{file} {label}")
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/b/bridge 1\n")
    lists = {}
    for part, text in lines.items():
        path = root / f"places365_{part}.txt"
        path.write_text("\n".join(text) + "\n")
        lists[part.replace("_", "-")] = (path.name, md5(path))
    categories = root / "categories_places365.txt"
    patch.setattr(kind, "_CATEGORIES_META", (categories.name, md5(categories)))
    patch.setattr(kind, "_FILE_LIST_META", lists)


def food101(root: Path, patch: Patch) -> None:
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for part, count in (("train", 5), ("test", 2)):
        listed = {name: [f"{name}/{part}{i}" for i in range(count)] for name in ("apple_pie", "waffles")}
        (base / "meta" / f"{part}.json").write_text(json.dumps(listed))
        for c, names in enumerate(listed.values()):
            for i, name in enumerate(names):
                save(base / "images" / f"{name}.jpg", 1000 * count + 10 * c + i)


def dtd(root: Path, patch: Patch | None = None) -> None:
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for part, numbers in (("train", (1, 2)), ("val", (3,)), ("test", (4,))):
        listed = [(f"{name}/{name}_{n}.jpg", 10 * c + n) for c, name in enumerate(("banded", "woven")) for n in numbers]
        for name, seed in listed:
            save(base / "images" / name, seed)
        (base / "labels" / f"{part}1.txt").write_text("".join(f"{name}\n" for name, _ in listed))


def eurosat(root: Path, patch: Patch) -> None:
    class_folders(root / "eurosat" / "2750", ["AnnualCrop", "Forest"], 6, name="{name}_{i}.jpg")


def gtsrb(root: Path, patch: Patch) -> None:
    base, names = root / "gtsrb", [f"{c:05d}" for c in range(43)]
    class_folders(base / "GTSRB" / "Training", names, 5, name="{i}.ppm", width=4, height=4)
    save(base / "GTSRB" / "Final_Test" / "Images" / "00000.ppm", 9999)
    (base / "GT-final_test.csv").write_text("Filename;Width;ClassId\n00000.ppm;16;42\n")


def aircraft(root: Path, patch: Patch) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    numbers = iter(range(100))
    for part, count in (("train", 2), ("val", 1), ("test", 1)):
        listed = [(next(numbers), name) for name in ("707-320", "A380") for _ in range(count)]
        for number, _ in listed:
            save(base / "images" / f"{number:07d}.jpg", number)
        (base / f"images_variant_{part}.txt").write_text("".join(f"{n:07d} {name}\n" for n, name in listed))
    (base / "variants.txt").write_text("707-320\nA380\n")


def country211(root: Path, patch: Patch) -> None:
    for p, (part, count) in enumerate((("train", 2), ("valid", 1), ("test", 1))):
        class_folders(root / "country211" / part, ["AD", "ZW"], count, start=1000 * p)


# dataset: (maker, first and last class, number of training, validation and test images)
SMALL = {
    "fashion_mnist": (mnist, "T-shirt/top", "Ankle boot", 48, 12, 20),
    "mnist": (functools.partial(mnist, kind="MNIST"), "0 - zero", "9 - nine", 48, 12, 20),
    "cifar10": (cifar10, "airplane", "automobile", 16, 4, 4),
    "svhn": (svhn, "0", "9", 48, 12, 20),
    "caltech101": (caltech101, "ant", "bee", 8, 2, 2),
    "caltech256": (caltech256, "001.ak47", "002.flag", 8, 2, 2),
    "flowers102": (flowers, "pink primrose", "rose", 4, 2, 2),
    "oxford_pets": (pets, "Abyssinian", "English Setter", 8, 2, 4),
    "imagenette": (imagenette, "tench", "English springer", 8, 2, 4),
    "fer2013": (fer2013, "angry", "neutral", None, None, 7),
    "places365": (places365, "/a/airfield", "/b/bridge", None, None, 2),
    "food101": (food101, "apple_pie", "waffles", 8, 2, 4),
    "dtd": (dtd, "banded", "woven", 4, 2, 2),
    "eurosat": (eurosat, "AnnualCrop", "Forest", 8, 2, 2),
    "gtsrb": (gtsrb, "00", "42", 172, 43, 1),
    "fgvc_aircraft": (aircraft, "707-320", "A380", 4, 2, 2),
    "country211": (country211, "AD", "ZW", 4, 2, 2),
}
