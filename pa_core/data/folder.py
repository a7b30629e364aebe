"""A directory of class folders -> its image files, each with class, official part and digest.

The directory is only read. What is known about its files is kept in the index, in the data home.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
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
"""A file changed this shortly before it was hashed may change again in the same tick."""

LAYOUT = (
    "allowed is a folder with a subfolder of images for each class (two or more), or with train/ "
    "and, if you like, val/ and test/, each of which holds such subfolders"
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
    found = {part: {path.name: path for path in _subfolders(top)} for part, top in parts.items()}
    classes = tuple(sorted(found["train"]))
    if len(classes) < 2:
        holds = f"only one class ({classes[0]})" if classes else "no class"
        raise ParameterError("data_dir", str(root), f"it holds {holds}; {LAYOUT}")
    files: list[File] = []
    for part, folders in found.items():
        top = parts[part]
        if unknown := sorted(set(folders) - set(classes)):
            text = f"{top.name}/ has classes that {parts['train'].name}/ lacks"
            text = f"{text}: {', '.join(unknown)}; allowed are the same classes in each"
            raise ParameterError("data_dir", str(root), text)
        for name, path in folders.items():
            entries = walk(path, above=(root, top))
            files += [_file(root, entry, classes.index(name), part) for entry in entries]
        files += [_file(root, entry, -1, part) for entry in _strays(top)]
        if not any(file.part == part for file in files):
            raise ParameterError("data_dir", str(root), f"{top.name}/ holds no image; {LAYOUT}")
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
        text = f"{names} stand beside other folders ({others}), so which are classes is not clear"
        raise ParameterError("data_dir", str(root), f"{text}; {LAYOUT}")
    if len(parts) < len(named):
        text = f"two of {names} are for the same part; {LAYOUT}"
        raise ParameterError("data_dir", str(root), text)
    return {part: parts[part] for part in ("train", "val", "test") if part in parts}


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in IGNORED


def _entries(folder: Path | str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not _hidden(entry.name)]
    except PermissionError as error:
        text = "you may not read it; allowed is a folder that can be read"
        raise ParameterError("data_dir", str(folder), text) from error
    return sorted(seen, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry) -> bool:
    # A link to itself makes entry.is_dir() raise.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _subfolders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder) if _is_folder(entry)]


def _strays(folder: Path) -> list[os.DirEntry]:
    """Images outside of any class folder. Other files there (a README, a table) do not matter."""
    known = Image.registered_extensions()
    files = [entry for entry in _entries(folder) if not _is_folder(entry)]
    return [entry for entry in files if os.path.splitext(entry.name)[1].lower() in known]


def walk(folder: Path, above: Iterable[Path] = ()) -> Iterator[os.DirEntry]:
    """Files below a folder, links followed, each real folder once and none that is above it."""
    resolved = [path.resolve() for path in above]
    seen = {path for top in resolved for path in (top, *top.parents)}
    waiting: list[Path] = [folder]
    while waiting:
        here = waiting.pop()
        if (real := here.resolve()) in seen:
            continue
        seen.add(real)
        entries = _entries(here)
        folders = {entry for entry in entries if _is_folder(entry)}
        yield from (entry for entry in entries if entry not in folders)
        waiting += [Path(entry.path) for entry in reversed(entries) if entry in folders]


def _file(root: Path, entry: os.DirEntry, label: int, part: str) -> File:
    name = entry.path.removeprefix(str(root)).lstrip(os.sep).replace(os.sep, "/")
    return File(id=name, path=entry.path, label=label, part=part, stamp=stamp(entry))


def stamp(entry: os.DirEntry) -> Stamp:
    """By which a change of a file is noticed, even one that keeps size and mtime."""
    try:
        status = entry.stat()
    except OSError:  # a broken link, or one to itself; when it is read, that is said
        return 0, 0, 0, 0
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
    paths = [file.path for file in files]
    for row, value, reason in workers.describe(paths, fresh, text="reading"):
        entries[files[row].id] = [list(files[row].stamp), *(value or ("", 0, 0)), reason]
    if fresh or len(known) != len(entries):
        # What changed just now is read again next time, for a second change might leave the same
        # stamp; and so is what could not be read.
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
