"""A directory of class folders -> its image files, each with id, class and official part. It is only read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from pa_core.data.cache import Entry, Source
from pa_core.errors import ParameterError

PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Names of subfolders that are no classes, and the part that they hold."""

EXTENSIONS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".jp2", ".avif", ".tga", ".pbm", ".pnm", ".dib", ".apng")
"""What an image file's name ends in, in any case; other files are left out."""

IGNORED = frozenset({"thumbs.db", "desktop.ini", "__macosx"})

LAYOUT = (
    "must be a folder with a subfolder of images for each class (two or more), or with train/ and, if you like, "
    "val/ and test/, each of which holds such subfolders"
)


def find(root: Path) -> Source:
    """The dataset in a folder.

    Raises:
        ParameterError: it is not laid out as ``LAYOUT`` says, or may not be read.
    """
    try:
        classes, entries = scan(root)
    except PermissionError as error:
        text = f"must be a folder that you may read ({error.filename} is not)"
        raise ParameterError("data_dir", str(root), text) from error
    state = stamp(str(entry.image) for entry in entries)
    return Source(
        name="folder",
        folder=os.path.realpath(root),
        origin=("data_dir", str(root)),
        state=lambda: state,
        open=lambda: (classes, len(entries), entries.__getitem__),
    )


def scan(root: Path) -> tuple[list[str], list[Entry]]:
    """Class names, sorted, and the image files, sorted by id: the path relative to the root.

    Raises:
        ParameterError: the folder is not laid out as ``LAYOUT`` says.
    """
    parts = _parts(root)
    folders = {part: {path.name: path for path in _subfolders(top)} for part, top in parts.items()}
    classes = sorted(folders["train"])
    if len(classes) < 2:
        _refuse(root, f"it holds {f'only one class ({classes[0]})' if classes else 'no class'}")
    entries: list[Entry] = []
    for part, top in parts.items():
        if unknown := sorted(set(folders[part]) - set(classes)):
            _refuse(root, f"{top.name}/ has classes that {parts['train'].name}/ lacks: {', '.join(unknown)}")
        found = [(path, classes.index(name)) for name, folder in folders[part].items() for path in walk(folder, top)]
        found += [(str(path), -1) for path in top.iterdir() if not path.is_dir() and not _hidden(path.name)]
        known = len(entries)
        for path, label in found:
            if has_file_allowed_extension(path, EXTENSIONS):
                entries.append(Entry(os.path.relpath(path, root).replace(os.sep, "/"), path, label, part))
        if len(entries) == known:
            _refuse(root, f"{top.name}/ holds no image")
    return classes, sorted(entries)


def walk(folder: Path, above: Path) -> Iterator[str]:
    """Files below a folder but hidden ones; links are followed, each real folder once and none from ``above`` up."""
    top, start = os.path.realpath(above), os.path.realpath(folder)
    seen = {top, *map(str, Path(top).parents)}
    if start in seen and folder != above:
        return
    seen.add(start)

    def fail(error: OSError) -> None:
        raise error

    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        below = {name: os.path.realpath(os.path.join(here, name)) for name in sorted(folders) if not _hidden(name)}
        folders[:] = [name for name, real in below.items() if real not in seen and not seen.add(real)]
        yield from (os.path.join(here, name) for name in sorted(names) if not _hidden(name))


def stamp(paths: Iterable[str]) -> str:
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


def _parts(root: Path) -> dict[str, Path]:
    """The folder of each part; just ``train``, the folder itself, where it has no parts."""
    folders = _subfolders(root)
    named = [folder for folder in folders if folder.name.lower() in PARTS]
    parts = {PARTS[folder.name.lower()]: folder for folder in named}
    if "train" not in parts or (len(named) == 1 and len(folders) > 1):
        return {"train": root}  # "train" may well be a class, beside "bus" and "tram"
    names = ", ".join(f"{folder.name}/" for folder in named)
    if others := [f"{folder.name}/" for folder in folders if folder not in named]:
        _refuse(root, f"{names} stand beside other folders ({', '.join(others)}), so which are classes is not clear")
    if len(parts) < len(named):
        _refuse(root, f"two of {names} are for the same part")
    return {part: parts[part] for part in ("train", "val", "test") if part in parts}


def _refuse(root: Path, found: str) -> None:
    raise ParameterError("data_dir", str(root), f"{LAYOUT}; {found}")


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in IGNORED
