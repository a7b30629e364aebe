"""One image file, or one PIL image, -> RGB pixels of a given size. The workers run this file.

Nothing of pa_core and no torch is imported here, so that a worker starts in a fraction of a second.

Decoding is bound to Python's global lock for small files: two threads take longer than one. Hence
processes (`workers`); they are plain ones that read jobs from a pipe, which works from notebooks
and scripts alike, and which end by themselves when the process that started them is killed.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import struct
import sys
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

VERSION = 1
"""Raised when the same file would give other pixels, so that cached ones are not used any more."""

Thing = str | Image.Image
"""An image as a source has it: the path of a file, or pixels."""

UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError),
    *(RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow raises over a file that is no image, or a broken one."""

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image with this EXIF orientation upright."""

PNG_END = b"IEND\xaeB`\x82"


class Changed(RuntimeError):
    """A file is no longer what it was when it was hashed, a moment ago."""


def digest(thing: Thing | bytes) -> str:
    """SHA-256 (hex) of a file's bytes, or of an image's mode, size and pixels."""
    if isinstance(thing, Image.Image):
        return hashlib.sha256(f"{thing.mode} {thing.size} ".encode() + thing.tobytes()).hexdigest()
    return hashlib.sha256(thing if isinstance(thing, bytes) else _read(thing)).hexdigest()


def describe(thing: Thing) -> tuple[str, int, int]:
    """Digest, height and width (as stored, before any rotation by EXIF); decodes no pixels.

    Raises:
        one of UNREADABLE: this is no image.
    """
    data = _read(thing) if isinstance(thing, str) else thing
    image = _open(data)
    return digest(data), image.height, image.width


def pixels(thing: Thing | bytes, size: int) -> np.ndarray:
    """RGB, uint8 [3, size, size]: shorter side resized (antialiased, bilinear), central square.

    Raises:
        one of UNREADABLE: this is no image, it is cut short, or its mode is not known.
    """
    data = _read(thing) if isinstance(thing, str) else thing
    image = _open(data)
    if image.format == "PNG" and PNG_END not in data:  # Pillow forgives a missing tail of a PNG
        raise OSError("image file is truncated")
    image.load()
    turn = orientation(image)  # before the conversion, which may lose it
    image = to_rgb(image)
    image = image if turn is None else image.transpose(turn)
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    # Cut while resizing: a strip of 1 x 60,000 pixels must not become one of 224 x 13 million.
    box = (left, top, left + short, top + short)
    square = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(square).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as RGB, the first frame of several; what is transparent is shown on white.

    16-bit grey values are divided by 256. 32-bit ones have no agreed range and are refused.

    Raises:
        ValueError: the mode is not known.
    """
    # A 16-bit PGM (and, with older Pillows, PNG) is opened in mode I, with values from 0 to 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no agreed range")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def orientation(image: Image.Image) -> Image.Transpose | None:
    """What brings it upright by its EXIF data; None where there is nothing to do."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION))
    except UNREADABLE:  # damaged metadata are common, and the image is as good as one without any
        return None


def _read(path: str) -> bytes:
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise OSError("there is no such file")
    with open(path, "rb") as file:
        return file.read()


def _open(data: bytes | Image.Image) -> Image.Image:
    if isinstance(data, Image.Image):
        return data
    try:
        return Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:  # its own text is the address of a buffer
        raise OSError("no image, or of an unknown format" if data else "an empty file") from None


# Jobs. A job is (row, thing, digest or None); a reply is (row, value or None, reason or None).

Job = tuple[int, Thing, str | None]
Reply = tuple[int, Any, str | None]


class Describe:
    """Replies with ``(digest, height, width)`` of each thing."""

    def __call__(self, jobs: Sequence[Job]) -> list[Reply]:
        return [self._one(row, thing) for row, thing, _ in jobs]

    def _one(self, row: int, thing: Thing) -> Reply:
        try:
            return row, describe(thing), None
        except UNREADABLE as error:
            return row, None, reason(error)


class Write:
    """Writes the pixels of each thing into its row of a file, if it is still the same thing.

    Args:
        path: the file, of its full length already.
        offset: where row 0 begins, in bytes.
        size: pixels per side.
    """

    def __init__(self, path: str, offset: int, size: int):
        self.path, self.offset, self.size = path, offset, size

    def __call__(self, jobs: Sequence[Job]) -> list[Reply]:
        with open(self.path, "r+b", buffering=0) as file:
            return [self._one(file, *job) for job in jobs]

    def _one(self, file: io.FileIO, row: int, thing: Thing, expected: str | None) -> Reply:
        try:
            data = _read(thing) if isinstance(thing, str) else thing
        except OSError as error:
            raise Changed(f"{thing} cannot be read any more: {reason(error)}") from error
        if digest(data) != expected:
            name = thing if isinstance(thing, str) else "an image"
            raise Changed(f"{name} changed while it was read")
        try:
            image = pixels(data, self.size)
        except UNREADABLE as error:
            return row, None, reason(error)
        file.seek(self.offset + row * image.size)
        if file.write(image.tobytes()) != image.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return row, None, None


def reason(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def main(operation: str, *arguments: str) -> None:
    """Reads jobs from the standard input, one JSON list a line, and writes replies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    warnings.simplefilter("ignore")  # of damaged metadata, and the like
    work = Describe() if operation == "describe" else Write(arguments[0], *map(int, arguments[1:]))
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"replies": work(json.loads(line))}
        except Changed as error:
            answer = {"changed": str(error)}
        except OSError as error:
            answer = {"errno": error.errno, "text": error.strerror or str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
