"""Images decoded once: uint8 [N, 3, S, S] in a file of the data home, mapped into memory, and an index of each dataset.

The file's name is made of what is in it: the digests of the images, in their order, and the size. The index says which
images a dataset has, so that nothing is read again while its files stay as they are. All may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from pa_core import files
from pa_core.data import decode
from pa_core.errors import ParameterError

CHUNK = 256
"""Images that are decoded before they are written."""
SIZES = (32, 64, 96, 128, 224)
STRAY = "lies in no class folder"


class Entry(NamedTuple):
    """An image before it is read: ``image`` is a file's path or the image; ``label`` is -1 outside of class folders."""

    id: str
    image: str | Image.Image
    label: int
    part: str


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """What is known of the N images of a dataset, the broken ones too: unique ids, labels, official parts (``train``,
    ``val``, ``test``), digests (empty if unread), stored heights and widths, why one cannot be used (else empty)."""

    classes: list[str]
    ids: list[str]
    labels: list[int]
    parts: list[str]
    digests: list[str]
    sizes: list[tuple[int, int]]
    reasons: list[str]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset that was found but not read yet.

    Attributes:
        name, folder: an index is kept for each pair.
        origin: parameter and value to blame for what is wrong with the images.
        state: gives a text that changes when the files do.
        open: gives the classes, N, and a function that gives an entry by its number; may download.
        image_size: S when none is asked for; None: one that fits the images.
        ready: the catalogue and uint8 [N, 3, S, S] where images of that size need no decoding.
    """

    name: str
    folder: str
    origin: tuple[str, Any]
    state: Callable[[], str]
    open: Callable[[], tuple[list[str], int, Callable[[int], Entry]]]
    image_size: int | None = None
    ready: tuple[Catalogue, np.ndarray] | None = None


def decoded(source: Source, size: int | None) -> tuple[Catalogue, np.ndarray]:
    """The images of a dataset, from the cache or made now: uint8 [N, 3, S, S], zeros where one cannot be used.

    Args:
        size: S; None: the largest of SIZES that is not above the median shorter side of the images.

    Raises:
        ParameterError: the data home cannot be written, or has no room; or as ``source.open`` does.
    """
    home = files.data_home() / "cache"
    index = home / "index" / f"{_sha([source.name, source.folder, PIL.__version__])}.json"
    if found := _cached(index, source, size):
        return found
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(index.with_suffix(".lock"), f"waiting for another process that decodes {source.name}"):
            return _cached(index, source, size) or _build(index, source, size)
    except OSError as error:
        text = f"must be a folder for downloads and image caches that can be written ({error.strerror or error})"
        raise ParameterError("PA_DATA", str(files.data_home()), text) from error


def _cached(index: Path, source: Source, size: int | None) -> tuple[Catalogue, np.ndarray] | None:
    """None where the files have changed, there is no cache of this size, or what there is is damaged."""
    try:
        kept = json.loads(index.read_bytes())
        if kept.pop("state") != source.state():
            return None
        catalogue = Catalogue(**kept)
        size = size or _fitting(catalogue.sizes)
        pixels = np.load(_path(index, catalogue, size), mmap_mode="r")
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
        return None  # numpy raises ValueError for a damaged header and for a file that is too short
    whole = pixels.dtype == np.uint8 and pixels.shape == (len(catalogue.ids), 3, size, size)
    return (catalogue, np.asarray(pixels)) if whole else None


def _build(index: Path, source: Source, size: int | None) -> tuple[Catalogue, np.ndarray]:
    classes, count, read = source.open()
    state, part = source.state(), index.with_suffix(".part")
    size = size or _fitting([decode.stored_size(str(read(i).image)) for i in range(count) if read(i).label >= 0])
    shape, rows = (count, 3, size, size), []
    if (free := shutil.disk_usage(index.parent).free) < (needed := int(np.prod(shape))):
        text = f"must have room for the images, {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
        raise ParameterError("PA_DATA", str(files.data_home()), text)

    def one(number: int) -> tuple[tuple[Any, ...], bytes]:
        entry = read(number)
        found = ("", (0, 0), STRAY, None) if entry.label < 0 else decode.decode(entry.image, size)
        pixels = bytes(3 * size * size) if found[-1] is None else found[-1].tobytes()
        return (entry.id, entry.label, entry.part, *found[:-1]), pixels

    # Threads: hashing, decoding and resizing leave Python's lock, and they work in notebooks and scripts alike.
    bar = tqdm(total=count, desc=f"decoding {source.name}", delay=1, mininterval=0.1 if sys.stderr.isatty() else 10)
    try:
        with open(part, "wb") as file, ThreadPoolExecutor() as pool, bar, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and the like
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, count, CHUNK):
                for values, pixels in pool.map(one, range(start, min(start + CHUNK, count))):
                    rows.append(values)
                    file.write(pixels)
                    bar.update()
            file.flush()
            os.fsync(file.fileno())
        ids, labels, parts, digests, sizes, reasons = map(list, zip(*rows, strict=True))
        catalogue = Catalogue(
            classes=classes, ids=ids, labels=labels, parts=parts, digests=digests, sizes=sizes, reasons=reasons
        )
        os.replace(part, path := _path(index, catalogue, size))
    finally:
        part.unlink(missing_ok=True)
    # A file that could not be read just now is read again next time, and so are all.
    if all(digest or reason in (decode.MISSING, STRAY) for digest, reason in zip(digests, reasons, strict=True)):
        with files.replacing(index) as temporary:
            temporary.write_text(json.dumps({"state": state, **vars(catalogue)}))
    return catalogue, np.asarray(np.load(path, mmap_mode="r"))


def _fitting(sizes: Sequence[tuple[int, int]]) -> int:
    shorter = [min(size) for size in sizes if min(size)]
    return max((size for size in SIZES if shorter and size <= np.median(shorter)), default=SIZES[0])


def _path(index: Path, catalogue: Catalogue, size: int) -> Path:
    return index.parents[1] / f"{_sha([decode.VERSION, size, list(catalogue.digests)])}.npy"


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
