"""A directory of class folders -> its image files, each with a class, an official part and a digest.

The directory is only read. What is known about its files is kept in the index, in the data home.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pa_core.data import workers
from pa_core.data.store import atomic_write, cache_home
from pa_core.params import ParameterError

PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Names of subfolders that are no classes, and the part that they hold."""

IGNORED = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
INDEX_VERSION = 1
RACE_NS = 2_000_000_000
"""A file changed this shortly before it was hashed may change again within one tick of the clock."""

LAYOUT = (
    "allowed is a folder with a subfolder of images for each class (two or more), or with train/ and, "
    "if you like, val/ and test/, each of which holds such subfolders"
)

Stamp = tuple[int, int, int, int]
Known = dict[str, list]


@dataclass(frozen=True, kw_only=True)
class File:
    """A file below a class folder.

    Attributes:
        id: its path relative to the dataset's folder, with slashes.
        path: where it is now.
        label: index of its class, -1 outside of any class folder.
        part: ``train``, ``val`` or ``test``; all ``train`` where the folder has no parts.
        stamp: size, mtime, ctime and inode, by which a change is noticed.
    """

    id: str
    path: str
    label: int
    part: str
    stamp: Stamp


def scan(root: Path) -> tuple[tuple[str, ...], list[File]]:
    """Class names (sorted) and files (sorted by id).

    Raises:
        ParameterError: the folder is not laid out as described in ``LAYOUT``.
    """
    parts = _parts(root)
    found = {part: {folder.name: folder for folder in _subfolders(top)} for part, top in parts.items()}
    classes = tuple(sorted(found["train"]))
    if len(classes) < 2:
        holds = f"only one class ({classes[0]})" if classes else "no class"
        raise ParameterError("data_dir", str(root), f"it holds {holds}; {LAYOUT}")
    files: list[File] = []
    for part, folders in found.items():
        if unknown := sorted(set(folders) - set(classes)):
            text = f"{parts[part].name}/ has classes that {parts['train'].name}/ lacks: {', '.join(unknown)}"
            raise ParameterError("data_dir", str(root), f"{text}; allowed are the same classes in each")
        for name, folder in folders.items():
            label = classes.index(name)
            files += [_file(root, entry, label, part) for entry in _walk(folder, above={root, parts[part]})]
        files += [_file(root, entry, -1, part) for entry in _strays(parts[part])]
        if not any(file.part == part for file in files):
            raise ParameterError("data_dir", str(root), f"{parts[part].name}/ holds no image; {LAYOUT}")
    return classes, sorted(files, key=lambda file: file.id)


def _parts(root: Path) -> dict[str, Path]:
    """The folder of each part; just ``train``, the folder itself, where it has no parts."""
    folders = _subfolders(root)
    named = [folder for folder in folders if folder.name.lower() in PARTS]
    parts = {PARTS[folder.name.lower()]: folder for folder in named}
    if "train" not in parts or (len(named) == 1 and len(folders) > 1):
        return {"train": root}  # "train" may well be a class, beside "bus" and "tram"
    names = ", ".join(f"{folder.name}/" for folder in named)
    if len(named) < len(folders):
        others = ", ".join(f"{folder.name}/" for folder in folders if folder not in named)
        text = f"{names} stand beside other folders ({others}), so it is not clear which are classes"
        raise ParameterError("data_dir", str(root), f"{text}; {LAYOUT}")
    if len(parts) < len(named):
        raise ParameterError("data_dir", str(root), f"two of {names} are for the same part; {LAYOUT}")
    return {part: parts[part] for part in ("train", "val", "test") if part in parts}


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in IGNORED


def _entries(folder: Path | str) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not _hidden(entry.name)), key=lambda entry: entry.name)


def _subfolders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder) if entry.is_dir()]


def _strays(folder: Path) -> list[os.DirEntry]:
    """Images outside of any class folder. Other files there (a README, a table) are nobody's business."""
    known = Image.registered_extensions()
    files = [entry for entry in _entries(folder) if not entry.is_dir()]
    return [entry for entry in files if os.path.splitext(entry.name)[1].lower() in known]


def _walk(folder: Path, above: set[Path]) -> Iterator[os.DirEntry]:
    """Files below a class folder, links followed, each real folder once and never one that is above."""
    resolved = [path.resolve() for path in above]
    seen = {path for top in resolved for path in (top, *top.parents)}
    waiting: list[Path] = [folder]
    while waiting:
        here = waiting.pop()
        if (real := here.resolve()) in seen:
            continue
        seen.add(real)
        entries = _entries(here)
        yield from (entry for entry in entries if not entry.is_dir())
        waiting += [Path(entry.path) for entry in reversed(entries) if entry.is_dir()]


def _file(root: Path, entry: os.DirEntry, label: int, part: str) -> File:
    try:
        stamp = stamp_of(entry.stat())
    except FileNotFoundError:  # a broken link
        stamp = (0, 0, 0, 0)
    name = entry.path.removeprefix(str(root)).lstrip(os.sep).replace(os.sep, "/")
    return File(id=name, path=entry.path, label=label, part=part, stamp=stamp)


def stamp_of(status: os.stat_result) -> Stamp:
    """By which a change of a file is noticed, even one that keeps size and mtime."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


# The index: for each file that was hashed once, its stamp and what was found.


def describe(root: Path, files: Sequence[File]) -> list[tuple[str, int, int, str | None]]:
    """(digest, height, width, None) of each file, or ("", 0, 0, reason) where it is no image.

    Only files that are new or changed since the last time are read.
    """
    path = index_path("folder", os.path.realpath(root))
    known: Known = read_index(path) or {}
    fresh = [i for i, file in enumerate(files) if known.get(file.id, [None])[0] != list(file.stamp)]
    begun = time.time_ns()
    entries: Known = {file.id: known.get(file.id, []) for file in files}
    for row, value, reason in workers.describe([file.path for file in files], fresh, text="reading"):
        entries[files[row].id] = [list(files[row].stamp), *(value or ("", 0, 0)), reason]
    if fresh or len(known) != len(entries):
        # What changed just now is read again next time, for a second change might leave the same stamp; and so is
        # what could not be read.
        settled = {
            name: entry for name, entry in entries.items() if entry[0][2] < begun - RACE_NS and entry[-1] is None
        }
        if settled != known:
            write_index(path, settled)
    return [tuple(entries[file.id][1:]) for file in files]


def index_path(*names: str) -> Path:
    """The file of an index, by what it is about."""
    name = hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_home() / "index" / f"{name}.json"


def read_index(path: Path) -> dict | None:
    """An index, or None where there is none of this version, or a damaged one."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    current = isinstance(content, dict) and content.get("version") == INDEX_VERSION
    return content["entries"] if current else None


def write_index(path: Path, entries: dict) -> None:
    """Replace an index at one stroke."""
    text = json.dumps({"version": INDEX_VERSION, "entries": entries})
    atomic_write(path, text.encode())
