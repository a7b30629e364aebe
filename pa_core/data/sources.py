"""A dataset's name -> its images, before any is read: the embedded set, torchvision's, and class folders."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from pa_core import files
from pa_core.data.decode import Catalogue, Entry, Source, content_digest, one_line, sha
from pa_core.errors import ParameterError, did_you_mean

FASHION_MINI = Path(__file__).resolve().parents[1] / "fashion_mini" / "fashion_mini.npz"
TORCHVISION = files.read_yaml(Path(__file__).with_name("torchvision.yaml"))
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # subfolders, not classes
# Extensions of image files, in upper or lower case; other files are left out without a word.
EXTENSIONS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".jp2", ".avif", ".tga", ".pbm", ".pnm", ".dib", ".apng")


def names() -> list[str]:
    """Names of the datasets, the embedded one first and ``folder`` last."""
    return list(DATASETS)


def find(name: str, data_dir: str | None) -> Source:
    """A dataset, not read yet; ParameterError where the name is unknown or ``data_dir`` is no folder that holds it."""
    if name not in DATASETS:
        raise ParameterError("dataset", name, f"must be one of {', '.join(DATASETS)}{did_you_mean(name, DATASETS)}")
    root = None if data_dir is None else Path(data_dir).expanduser().absolute()
    if root is not None and not root.is_dir():
        raise ParameterError("data_dir", data_dir, "must be a folder that exists")
    try:
        return DATASETS[name](name, root)
    except PermissionError as error:
        raise ParameterError("data_dir", data_dir, f"must be readable, and {error.filename} is not") from error


@functools.cache  # the same for every run of a process
def _fashion_mini(name: str, root: Path | None) -> Source:
    if root is not None:
        text = f"must be none, for {name} comes with the package; set dataset to folder for your own images"
        raise ParameterError("data_dir", str(root), text)
    entries, images, origin = [], [], ("dataset", name)
    with np.load(FASHION_MINI) as file:
        for part in ("train", "test"):
            images += list(file[f"{part}_images"])
            for row, label in zip(file[f"{part}_rows"], file[f"{part}_labels"], strict=True):
                image = Image.fromarray(images[len(entries)])  # the next one; row: its place in Fashion-MNIST
                entries.append(Entry(f"{part}/{row:05d}", int(label), part, content_digest(image), image=image))
    classes, pixels = torchvision.datasets.FashionMNIST.classes, np.stack(images)[:, None].repeat(3, axis=1)
    opened, ready = (classes, len(entries), entries.__getitem__), Catalogue(origin, classes, entries, pixels)
    return Source(name, origin, state=lambda: "", open=lambda: opened, image_size=28, ready=ready)


def _folder(name: str, root: Path | None) -> Source:
    """A folder of class folders, which is only read. Images are sorted by id, their path relative to the root."""
    if root is None:
        raise ParameterError("data_dir", None, "must be the folder that holds the class folders")
    entries, folders = [], _subfolders(root)
    parts = {PARTS[name.lower()]: root / name for name in folders if name.lower() in PARTS}
    if "train" not in parts or (len(parts) == 1 and len(folders) > 1):
        parts = {"train": root}  # "train" may well be a class, beside "bus" and "tram"
    elif len(parts) < len(folders):
        found = ", ".join(f"{name}/" for name in folders)
        raise _refusal(root, f"beside train/ it may hold one val/, one test/ and nothing else, and it holds {found}")
    classes = {name: number for number, name in enumerate(_subfolders(parts["train"]))}
    if len(classes) < 2:
        raise _refusal(root, f"it holds {f'only one class ({min(classes)})' if classes else 'no class'}")
    for part, top in parts.items():
        if unknown := sorted(set(_subfolders(top)) - set(classes)):
            raise _refusal(root, f"{top.name}/ has classes that train/ lacks: {', '.join(unknown)}")
        images = [path for path in _walk(top) if has_file_allowed_extension(path, EXTENSIONS)]
        if not images:
            raise _refusal(root, f"{top.name}/ holds no image")
        for path in images:
            id_ = os.path.relpath(path, root).replace(os.sep, "/")
            label = classes.get(id_.split("/")[0 if top == root else 1], -1)  # 1: below train/, val/ or test/
            reason = "lies in no class folder" if label < 0 else ""
            entries.append(Entry(id_, label, part, reason=reason, image=path))
    entries.sort()
    state, opened = _stamp(str(entry.image) for entry in entries), (list(classes), len(entries), entries.__getitem__)
    return Source(name, ("data_dir", str(root)), state=lambda: state, open=lambda: opened)


def _refusal(root: Path, found: str) -> ParameterError:
    text = "must be a folder with a subfolder of images for each class (two or more), or with train/ and, if you like, "
    return ParameterError("data_dir", str(root), f"{text}val/ and test/, each of which holds such subfolders; {found}")


def _subfolders(folder: Path) -> list[str]:
    return [os.path.basename(path) for path in _listed(str(folder)) if os.path.isdir(path)]


def _listed(folder: str) -> list[str]:
    """What a folder holds, sorted, but what is hidden."""
    return sorted(os.path.join(folder, n) for n in os.listdir(folder) if not n.startswith((".", "__MACOSX")))


def _walk(top: Path) -> Iterator[str]:
    """Files below a folder but hidden ones; links are followed, each real folder once and none that holds ``top``."""
    real = Path(os.path.realpath(top))
    seen, folders = {str(real), *map(str, real.parents)}, [str(top)] if top.is_dir() else []
    for folder in folders:  # grows
        for path in _listed(folder):
            if not os.path.isdir(path):
                yield path
            elif (below := os.path.realpath(path)) not in seen:
                seen.add(below)
                folders.append(path)


def _stamp(paths: Iterable[str], row: dict[str, Any] | None = None) -> str:
    """Changes when one of the files does, by path, size and times; a link to nowhere has its own."""
    stats = ((path, os.stat(path, follow_symlinks=os.path.exists(path))) for path in paths)
    return sha([torchvision.__version__, row, [(path, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats]])


def _torchvision(name: str, root: Path | None) -> Source:
    row, top, origin = TORCHVISION[name], root or files.data_home().absolute() / name, ("dataset", name)
    return Source(name, origin, lambda: _stamp(_walk(top), row), lambda: _opened(name, top), row["image_size"])


def _opened(name: str, root: Path) -> tuple[list[str], int, Callable[[int], Entry]]:
    parts, row = _get(name, root), TORCHVISION[name]
    places = [(part, position) for part, images in parts.items() for position in range(len(images))]
    classes = getattr(parts["train"], "classes", None) or getattr(parts["train"], "categories", None) or row["classes"]
    classes = [known if isinstance(known, str) else known[0] for known in classes]  # Imagenette has synonyms

    def read(number: int) -> Entry:
        part, position = places[number]
        try:
            image, label = parts[part][position]
        except Exception as error:  # torchvision raises whatever its formats do
            return Entry(f"{part}/{position:05d}", -1, part, reason=one_line(error))
        if isinstance(image, Image.Image) and (path := getattr(image, "filename", "")):
            image.close()  # opened, not decoded yet
            image = os.fspath(path)
        id_ = Path(image).relative_to(root).as_posix() if isinstance(image, str) else f"{position:05d}"
        return Entry(f"{part}/{id_}", int(label), part, image=image)

    return classes, len(places), read


def _get(name: str, root: Path) -> dict[str, Any]:
    """torchvision's datasets by part, downloaded if need be; ParameterError says what to put where."""
    row, new = TORCHVISION[name], root / ".download"
    try:
        try:
            return _open(row, root, download=False)
        except Exception:  # torchvision raises whatever it likes over files that are missing or damaged
            print(f"downloading {name} to {root}", flush=True)
        if any(_walk(root)):  # archives that lie there are unpacked, what is missing is fetched
            return _open(row, root, download=True)
        # torchvision takes half of an unpacked archive for all of it, so it unpacks elsewhere and the whole is moved.
        shutil.rmtree(new, ignore_errors=True)  # of a download that failed
        new.mkdir(parents=True)
        _open(row, new, download=True)
        for path in list(new.iterdir()):
            shutil.rmtree(root / path.name, ignore_errors=True)  # an empty folder that torchvision has made
            path.replace(root / path.name)
        new.rmdir()
        return _open(row, root, download=False)
    except Exception as error:
        text = f"must be in {root} or come by a download, and neither was possible ({one_line(error)})"
        raise ParameterError("dataset", name, f"{text}; put {row['files']} into {root} and start again") from error


def _open(row: dict[str, Any], root: Path, *, download: bool) -> dict[str, Any]:
    kind = getattr(torchvision.datasets, row["cls"])
    options: dict[str, Any] = {"loader": str, "download": download}  # with str as loader, a path stays a path
    options = {name: options[name] for name in options.keys() & inspect.signature(kind).parameters}
    return {part: kind(str(root), **some, **options) for part, some in row["parts"].items()}


DATASETS: dict[str, Callable[[str, Path | None], Source]] = {
    "fashion_mini": _fashion_mini,
    **dict.fromkeys(TORCHVISION, _torchvision),
    "folder": _folder,
}
"""Every dataset by name: a function of the name and of the folder that it lies in, if one was given."""
