"""Images decoded once: uint8 [N, 3, S, S] in a file of the data home, mapped into memory; all may be deleted any time.

The file's name is made of the size and of the digests of the images, in their order. An index for each dataset says
which images it has, so that nothing is read again while its files stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
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

CHUNK = 256  # images that are decoded before they are written
SIZES = (32, 64, 96, 128, 224)
STRAY = "lies in no class folder"


class Entry(NamedTuple):
    """An image before it is read."""

    id: str
    image: str | Image.Image  # a file's path, or the image
    label: int  # -1 outside of class folders
    part: str


@dataclass(frozen=True)
class Catalogue:
    """What is known of the N images of a dataset, the broken ones too."""

    classes: list[str]
    ids: list[str]  # unique
    labels: list[int]
    parts: list[str]  # official ones: train, val, test
    digests: list[str]  # of the contents, empty if unread
    sizes: list[tuple[int, int]]  # height and width as stored
    reasons: list[str]  # why an image cannot be used, else empty


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset that was found but not read yet."""

    name: str
    folder: str = ""  # an index is kept for each pair of name and folder
    origin: tuple[str, Any]  # parameter and value to blame for what is wrong with the images
    state: Callable[[], str]  # a text that changes when the files do
    open: Callable[[], tuple[list[str], int, Callable[[int], Entry]]]  # classes, N, entry by number; may download
    image_size: int | None = None  # S when none is asked for; None: one that fits the images
    ready: tuple[Catalogue, np.ndarray] | None = None  # where images of that size need no decoding: as decoded()


def decoded(source: Source, size: int | None) -> tuple[Catalogue, np.ndarray]:
    """The images of a dataset, from the cache or made now: uint8 [N, 3, S, S], zeros where one cannot be used.

    Without ``size``, S is the largest of SIZES that is not above the median shorter side of the images. ParameterError
    where the data home cannot be written or is full, or as ``source.open`` raises it.
    """
    index = files.data_home() / "cache" / "index" / f"{sha([source.name, source.folder, PIL.__version__])[:32]}.json"
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
        return catalogue, np.asarray(np.load(_path(index, catalogue, size), mmap_mode="r"))
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
        return None  # numpy raises ValueError for a damaged header and for a file that is too short


def _build(index: Path, source: Source, size: int | None) -> tuple[Catalogue, np.ndarray]:
    classes, count, read = source.open()
    state, part = source.state(), index.with_suffix(".part")
    size = size or _fitting([decode.stored_size(str(read(i).image)) for i in range(count) if read(i).label >= 0])
    shape, rows = (count, 3, size, size), []

    def one(number: int) -> tuple[tuple[Any, ...], bytes]:
        entry = read(number)
        *found, pixels = ("", (0, 0), STRAY, None) if entry.label < 0 else decode.decode(entry.image, size)
        content = bytes(3 * size * size) if pixels is None else pixels.tobytes()
        return (entry.id, entry.label, entry.part, *found), content

    # Threads: hashing, decoding and resizing leave Python's lock, and they work in notebooks and scripts alike.
    bar = tqdm(total=count, desc=f"decoding {source.name}", delay=1, mininterval=0.1 if sys.stderr.isatty() else 10)
    try:
        with open(part, "wb") as file, ThreadPoolExecutor() as pool, bar, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and the like
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for start in range(0, count, CHUNK):
                for row, content in pool.map(one, range(start, min(start + CHUNK, count))):
                    rows.append(row)
                    file.write(content)
                    bar.update()
            file.flush()
            os.fsync(file.fileno())
        catalogue = Catalogue(classes, *map(list, zip(*rows, strict=True)))
        os.replace(part, path := _path(index, catalogue, size))
    finally:
        part.unlink(missing_ok=True)
    # A file that could not be read just now is read again next time, and so are all.
    unread = {why for digest, why in zip(catalogue.digests, catalogue.reasons, strict=True) if not digest}
    if unread <= {decode.MISSING, STRAY}:
        with files.replacing(index) as temporary:
            temporary.write_text(json.dumps({"state": state, **vars(catalogue)}))
    return catalogue, np.asarray(np.load(path, mmap_mode="r"))


def _fitting(sizes: Sequence[tuple[int, int]]) -> int:
    shorter = [min(size) for size in sizes if min(size)]
    return max((size for size in SIZES if shorter and size <= np.median(shorter)), default=SIZES[0])


def _path(index: Path, catalogue: Catalogue, size: int) -> Path:
    return index.parents[1] / f"{sha([decode.VERSION, size, catalogue.digests])[:32]}.npy"


def sha(content: Any) -> str:
    """SHA-256 (hex) of what JSON makes of it."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
