"""A dataset's name -> its images, before any is read: the embedded set, torchvision's, and class folders."""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from pa_core import files
from pa_core.data.cache import Catalogue, Entry, Source
from pa_core.data.decode import content_digest, one_line
from pa_core.errors import ParameterError, did_you_mean

FASHION_MINI = Path(__file__).resolve().parents[1] / "fashion_mini" / "fashion_mini.npz"
TORCHVISION = files.read_yaml(Path(__file__).with_name("torchvision.yaml"))
DATASETS: dict[str, Any] = {"fashion_mini": None, **TORCHVISION, "folder": None}
"""Every dataset by name; torchvision's with what ``torchvision.yaml`` says of them."""

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
    if name == "folder":
        if root is None:
            raise ParameterError("data_dir", None, "must be the folder that holds the class folders")
        return _folder(root)
    if name == "fashion_mini":
        if root is not None:
            text = "must be none, for fashion_mini comes with the package (set dataset to folder for your own images)"
            raise ParameterError("data_dir", data_dir, text)
        return _fashion_mini()
    return _torchvision(name, root or files.data_home().absolute() / name)


@cache  # half a second, and the same for every run of a process
def _fashion_mini() -> Source:
    entries = []
    with np.load(FASHION_MINI) as file:
        for part in ("train", "test"):
            columns = (file[f"{part}_{kind}"] for kind in ("rows", "images", "labels"))
            for row, image, label in zip(*columns, strict=True):
                entries.append(Entry(f"{part}/{row:05d}", Image.fromarray(image), int(label), part))
    found = [(e.id, e.label, e.part, content_digest(e.image), (28, 28), "") for e in entries]
    catalogue = Catalogue(torchvision.datasets.FashionMNIST.classes, *map(list, zip(*found, strict=True)))
    return Source(
        name="fashion_mini",
        origin=("dataset", "fashion_mini"),
        state=lambda: "fixed",
        open=lambda: (catalogue.classes, len(entries), entries.__getitem__),
        image_size=28,
        ready=(catalogue, np.stack([np.asarray(e.image) for e in entries])[:, None].repeat(3, axis=1)),
    )


def _folder(root: Path) -> Source:
    """A folder of class folders. It is only read."""
    try:
        classes, entries = _scan(root)
    except PermissionError as error:
        text = f"must be a folder that you may read ({error.filename} is not)"
        raise ParameterError("data_dir", str(root), text) from error
    state = _stamp(str(entry.image) for entry in entries)
    return Source(
        name="folder",
        folder=os.path.realpath(root),
        origin=("data_dir", str(root)),
        state=lambda: state,
        open=lambda: (classes, len(entries), entries.__getitem__),
    )


def _scan(root: Path) -> tuple[list[str], list[Entry]]:
    """Class names, sorted, and the image files, sorted by id: the path relative to the root."""
    parts = _parts(root)
    folders = {part: {path.name for path in _subfolders(top)} for part, top in parts.items()}
    numbers = {name: number for number, name in enumerate(sorted(folders["train"]))}
    if len(numbers) < 2:
        raise _refusal(root, f"it holds {f'only one class ({min(numbers)})' if numbers else 'no class'}")
    entries = []
    for part, top in parts.items():
        if unknown := ", ".join(sorted(folders[part] - folders["train"])):
            raise _refusal(root, f"{top.name}/ has classes that {parts['train'].name}/ lacks: {unknown}")
        images = [path for path in _walk(top) if has_file_allowed_extension(path, EXTENSIONS)]
        if not images:
            raise _refusal(root, f"{top.name}/ holds no image")
        for path in images:
            id_ = os.path.relpath(path, root).replace(os.sep, "/")
            folder, *below = id_.split("/")[top != root :]
            entries.append(Entry(id_, path, numbers[folder] if below else -1, part))
    return list(numbers), sorted(entries)


def _parts(root: Path) -> dict[str, Path]:
    """The folder of each part; just ``train``, the folder itself, where it has no parts."""
    folders = _subfolders(root)
    named = [folder for folder in folders if folder.name.lower() in PARTS]
    parts = {PARTS[folder.name.lower()]: folder for folder in named}
    if "train" not in parts or (len(named) == 1 and len(folders) > 1):
        return {"train": root}  # "train" may well be a class, beside "bus" and "tram"
    names = ", ".join(f"{folder.name}/" for folder in named)
    if others := ", ".join(f"{folder.name}/" for folder in folders if folder not in named):
        raise _refusal(root, f"{names} stand beside other folders ({others}), so which are classes is not clear")
    if len(parts) < len(named):
        raise _refusal(root, f"two of {names} are for the same part")
    return {part: parts[part] for part in ("train", "val", "test") if part in parts}


def _refusal(root: Path, found: str) -> ParameterError:
    text = "must be a folder with a subfolder of images for each class (two or more), or with train/ and, if you like, "
    return ParameterError("data_dir", str(root), f"{text}val/ and test/, each of which holds such subfolders; {found}")


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini", "__macosx")


def _walk(top: Path) -> Iterator[str]:
    """Files below a folder but hidden ones; links are followed, each real folder once and none that holds ``top``."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    real = Path(os.path.realpath(top))
    seen = {str(real), *map(str, real.parents)}
    for here, folders, names in os.walk(top, onerror=fail, followlinks=True):
        below = {name: os.path.realpath(os.path.join(here, name)) for name in sorted(folders) if not _hidden(name)}
        folders[:] = [name for name, path in below.items() if path not in seen and not seen.add(path)]
        yield from (os.path.join(here, name) for name in sorted(names) if not _hidden(name))


def _stamp(paths: Iterable[str]) -> str:
    """Changes when one of the files does: SHA-256 (hex) of their paths, sizes and times."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
            path = f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        except OSError:
            pass  # a link to nowhere; that is said when it is read
        digest.update(f"{path}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _torchvision(name: str, root: Path) -> Source:
    row = TORCHVISION[name]
    return Source(
        name=name,
        folder=os.path.realpath(root),
        origin=("dataset", name),
        state=lambda: f"{torchvision.__version__} {row} {_stamp(_walk(root))}",
        open=lambda: _opened(name, root),
        image_size=row["image_size"],
    )


def _opened(name: str, root: Path) -> tuple[list[str], int, Callable[[int], Entry]]:
    parts = _get(name, root)
    where = [(part, number) for part, images in parts.items() for number in range(len(images))]
    some, row = parts["train"], TORCHVISION[name]
    classes = getattr(some, "classes", None) or getattr(some, "categories", None) or row["classes"]
    classes = [known if isinstance(known, str) else known[0] for known in classes]  # Imagenette has synonyms

    def read(number: int) -> Entry:
        part, number = where[number]
        try:
            image, label = parts[part][number]
        except Exception as error:  # torchvision raises whatever its formats do
            text = f"must be readable in {root} ({one_line(error)}), which needs {row['files']}"
            raise ParameterError("dataset", name, text) from error
        if isinstance(image, Image.Image) and (path := getattr(image, "filename", "")):
            image.close()  # opened, not decoded yet
            image = os.fspath(path)
        id_ = Path(image).relative_to(root).as_posix() if isinstance(image, str) else f"{number:05d}"
        return Entry(f"{part}/{id_}", image, int(label), part)

    return classes, len(where), read


def _get(name: str, root: Path) -> dict[str, Any]:
    """torchvision's datasets by part, downloaded if need be; ParameterError says what to put where."""
    row, fetched = TORCHVISION[name], TORCHVISION[name].get("download", True)
    try:
        try:
            return _open(row, root, download=False)
        except Exception:  # torchvision raises whatever it likes over files that are missing or damaged
            if not fetched:
                raise
        print(f"downloading {name} to {root}", flush=True)
        if any(_walk(root)):  # archives that lie there are unpacked, what is missing is fetched
            return _open(row, root, download=True)
        # torchvision takes half of an unpacked archive for all of it, so it unpacks elsewhere and the whole is moved.
        new = root / ".download"
        shutil.rmtree(new, ignore_errors=True)  # of a download that failed
        new.mkdir(parents=True)
        _open(row, new, download=True)
        for path in list(new.iterdir()):
            shutil.rmtree(root / path.name, ignore_errors=True)  # an empty folder that torchvision has made
            path.replace(root / path.name)
        new.rmdir()
        return _open(row, root, download=False)
    except Exception as error:
        how = " or come by a download, and neither was possible" if fetched else ", for torchvision cannot download it"
        text = f"must be in {root}{how} ({one_line(error)}); put {row['files']} into {root} and start again"
        raise ParameterError("dataset", name, text) from error


def _open(row: dict[str, Any], root: Path, *, download: bool) -> dict[str, Any]:
    kind = getattr(torchvision.datasets, row["cls"])
    options: dict[str, Any] = {"loader": str, "download": download}  # with str as loader, a path stays a path
    options = {name: options[name] for name in options.keys() & inspect.signature(kind).parameters}
    return {part: kind(str(root), **some, **options) for part, some in row["parts"].items()}
