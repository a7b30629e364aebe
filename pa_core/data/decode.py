"""Images decoded once: uint8 [N, 3, S, S] in a file of the data home, mapped into memory; all may be deleted any time.

The file's name is made of the size and of the digests of the images, in their order. An index for each dataset, size
and state of its files says which images it has, so that nothing is read again while the files stay as they are.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from pa_core import files
from pa_core.errors import ParameterError

VERSION = 1  # incremented when the same file would give other pixels, so that cached ones are not used any more


class Entry(NamedTuple):
    """An image, a broken one too. The index keeps all but ``image``; the first four make the dataset's digest."""

    id: str  # unique
    label: int  # -1 outside of class folders
    part: str  # the official one: train, val or test
    digest: str = ""  # of the content, as decode() has it
    reason: str = ""  # why it cannot be used
    image: str | Image.Image = ""  # a file's path, or the image, before it is read


class Catalogue(NamedTuple):
    """The N images of a dataset."""

    origin: tuple[str, Any]  # parameter and value to blame for what is wrong with the images
    classes: Sequence[str]
    entries: list[Entry]
    pixels: np.ndarray  # uint8 [N, 3, S, S], read-only, zeros where an image cannot be used

    @property
    def digest(self) -> str:
        return sha([self.classes, [entry[:4] for entry in self.entries if not entry.reason]])


class Source(NamedTuple):
    """A dataset that was found but not read yet."""

    name: str
    origin: tuple[str, Any]
    state: Callable[[], str]  # a text that changes when the files do, or lie elsewhere
    open: Callable[[], tuple[Sequence[str], int, Callable[[int], Entry]]]  # classes, N, entry by number; may download
    image_size: int | None = None  # S when none is asked for; None: one that fits the images
    ready: Catalogue | None = None  # where images of that size need no decoding


def decoded(source: Source, size: int | None) -> Catalogue:
    """A dataset's images: those that the source holds ready, else from the cache, or decoded now; ParameterError where
    the data home cannot be written or is full, or as ``source.open`` raises it."""
    size = size or source.image_size
    if source.ready and size == source.image_size:  # fashion_mini: nothing below is reached
        return source.ready
    home = files.data_home() / "cache"
    if found := _cached(home, source, size):
        return found
    try:
        home.mkdir(parents=True, exist_ok=True)
        with files.lock(home / f"{source.name}.lock", f"waiting for another process that decodes {source.name}"):
            return _cached(home, source, size) or _build(home, source, size)
    except OSError as error:
        raise ParameterError("PA_DATA", str(home.parent), f"must be a writable folder ({error.strerror})") from error


def _cached(home: Path, source: Source, size: int | None) -> Catalogue | None:
    """None where the files have changed, there is no cache of this size, or what there is is damaged."""
    try:
        kept = json.loads(_index(home, source, size).read_bytes())
        entries, pixels = [Entry(*row) for row in kept["entries"]], np.load(home / kept["store"], mmap_mode="r")
        found = Catalogue(source.origin, kept["classes"], entries, pixels)
        return found if pixels.shape == (len(entries), 3, *pixels.shape[-1:] * 2) else None
    except (OSError, ValueError, EOFError, LookupError, TypeError, AttributeError):
        return None  # numpy raises ValueError for a damaged header and for a file that is too short


def _build(home: Path, source: Source, asked: int | None) -> Catalogue:
    classes, count, read = source.open()
    index, part, entries = _index(home, source, asked), home / f"{source.name}.part", []
    size = asked or _fitting([str(read(number).image) for number in range(count)])

    def one(number: int) -> tuple[Entry, bytes]:
        entry = read(number)
        digest, reason, pixels = decode(entry.image, size)
        return entry._replace(digest=digest, reason=entry.reason or reason, image=""), pixels.tobytes()

    # Threads: hashing, decoding and resizing leave Python's lock. Chunks: few images wait in memory to be written.
    chunks = (range(count)[start : start + 256] for start in range(0, count, 256))
    try:
        with open(part, "wb") as file, ThreadPoolExecutor() as pool:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, size, size)}
            np.lib.format.write_array_header_1_0(file, header)
            found = (pair for chunk in chunks for pair in pool.map(one, chunk))
            for entry, content in tqdm(found, f"decoding {source.name}", count, delay=1, mininterval=2):
                entries.append(entry)
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        store = home / f"{sha([VERSION, size, [entry.digest for entry in entries]])[:32]}.npy"
        os.replace(part, store)
    finally:
        part.unlink(missing_ok=True)
    if all(entry.digest for entry in entries):  # else a file could not be read just now, and all are next time
        with files.replacing(index) as temporary:
            kept = {"store": store.name, "classes": classes, "entries": [entry[:5] for entry in entries]}
            temporary.write_text(json.dumps(kept))
    return Catalogue(source.origin, classes, entries, np.load(store, mmap_mode="r"))


def _index(home: Path, source: Source, size: int | None) -> Path:
    return home / f"{sha([source.name, source.state(), size, VERSION, PIL.__version__])[:32]}.json"


def sha(content: Any) -> str:
    """SHA-256 (hex) of what JSON makes of it."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _fitting(paths: list[str]) -> int:
    """The default size of ``folder``: the largest of these that is not above the median shorter side."""
    sides = []
    for path in filter(os.path.isfile, paths):
        with suppress(Exception), Image.open(path) as image:  # what is wrong with it is said when it is decoded
            sides.append(min(image.size))
    return max(size for size in (32, 64, 96, 128, 224) if size <= max(32, np.median(sides or [0])))


def decode(given: str | bytes | Image.Image, size: int) -> tuple[str, str, np.ndarray]:
    """A file, which is read once, its content, or an image: the content's digest ("none" where there is no file, empty
    if it cannot be read), why it cannot be used (else empty), and uint8 [3, size, size], zeros if it cannot."""
    digest, black = "", np.zeros((3, size, size), np.uint8)
    if isinstance(given, str) and not os.path.isfile(given):  # opening a pipe would wait for ever
        return "none", "there is no such file", black
    try:
        content = Path(given).read_bytes() if isinstance(given, str) else given
        digest = content_digest(content)  # also of what is no image
        image = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content
        if image.format == "PNG" and isinstance(content, bytes) and b"IEND\xaeB`\x82" not in content:
            raise ValueError("image file is truncated")  # Pillow forgives a missing tail of a PNG
        return digest, "", _square(image, size)
    except Image.UnidentifiedImageError:  # its own text is the address of a buffer
        return digest, "no image, or of an unknown format", black
    except MemoryError:  # not the image's fault
        raise
    except Exception as error:  # Pillow raises whatever its formats do
        return digest, one_line(error), black


def read_image(image: str | os.PathLike[str] | Image.Image, size: int) -> torch.Tensor:
    """An image of your own as a dataset would hold it, uint8 [3, size, size], RGB: upright by its EXIF data, on white
    where it is transparent, the first frame of several, the shorter side resized to ``size`` (bilinear, antialiased),
    the central square. ValueError where this is no image, is cut short, or has an unknown mode."""
    _, reason, pixels = decode(image if isinstance(image, Image.Image) else os.fspath(image), size)
    if reason:
        raise ValueError(reason)
    return torch.from_numpy(pixels)


def content_digest(content: bytes | Image.Image) -> str:
    """SHA-256 (hex) of a file's bytes, or of an image's mode, size and pixels."""
    memory = content if isinstance(content, bytes) else f"{content.mode} {content.size} ".encode() + content.tobytes()
    return hashlib.sha256(memory).hexdigest()


def one_line(error: BaseException) -> str:
    """An error as one line of at most 200 characters; its type where it has no text."""
    return textwrap.shorten(str(error), 200) or type(error).__name__


def _square(image: Image.Image, size: int) -> np.ndarray:
    """16-bit grey values are divided by 256; 32-bit ones have no agreed range and are refused."""
    kind = image.format
    image.load()
    with suppress(Exception):  # damaged metadata are common, and the image is as good as one without any
        image = ImageOps.exif_transpose(image)  # before the conversion, which may lose the orientation
    # A 16-bit PGM (and, with older Pillows, PNG) is opened in mode I, with values from 0 to 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PPM", "PNG")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no agreed range")
    elif image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    # It cuts while it resizes, so that a strip of 1 x 60,000 pixels does not become one of 224 x 13 million.
    square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return np.asarray(square).transpose(2, 0, 1).copy()
