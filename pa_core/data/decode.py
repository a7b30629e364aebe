"""One image, from a file or from memory -> its digest, its height and width, and RGB pixels."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

VERSION = 1  # incremented when the same file would give other pixels, so that cached ones are not used any more
MISSING = "there is no such file"

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError)
UNREADABLE = (*UNREADABLE, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises over a file that is no image, or a broken one."""


def decode(source: str | Image.Image, size: int) -> tuple[str, tuple[int, int], str, np.ndarray | None]:
    """A file, which is read once, or an image: its content's digest (empty if it cannot be read), height and width as
    stored (zeros if not known), why there are no pixels (or empty), and uint8 [3, size, size] or None."""
    digest, shape = "", (0, 0)
    try:
        content = _read(source) if isinstance(source, str) else source
        digest = content_digest(content)  # also of what is no image
        image = _open(content)
        shape = (image.height, image.width)
        return digest, shape, "", _pixels(image, content, size)
    except UNREADABLE as error:
        return digest, shape, one_line(error), None


def read_image(image: str | os.PathLike[str] | Image.Image, size: int) -> Tensor:
    """An image of your own as a dataset would hold it, uint8 [3, size, size], RGB: upright by its EXIF data, on white
    where it is transparent, the first frame of several, the shorter side resized to ``size`` (bilinear, antialiased),
    the central square. Raises one of UNREADABLE where this is no image, is cut short, or has an unknown mode."""
    content = image if isinstance(image, Image.Image) else _read(os.fspath(image))
    return torch.from_numpy(_pixels(_open(content), content, size).copy())


def stored_size(path: str) -> tuple[int, int]:
    """Height and width of a file's image, from its first bytes; zeros where it is none."""
    try:
        with Image.open(path if os.path.isfile(path) else io.BytesIO()) as image:
            return image.height, image.width
    except UNREADABLE:
        return 0, 0


def content_digest(content: bytes | Image.Image) -> str:
    """SHA-256 (hex) of a file's bytes, or of an image's mode, size and pixels."""
    memory = content if isinstance(content, bytes) else f"{content.mode} {content.size} ".encode() + content.tobytes()
    return hashlib.sha256(memory).hexdigest()


def one_line(error: BaseException) -> str:
    """An error as one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _read(path: str) -> bytes:
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise OSError(MISSING)
    return Path(path).read_bytes()


def _open(content: bytes | Image.Image) -> Image.Image:
    try:
        return content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
    except Image.UnidentifiedImageError:  # its own text is the address of a buffer
        raise OSError("no image, or of an unknown format" if content else "an empty file") from None


def _pixels(image: Image.Image, content: bytes | Image.Image, size: int) -> np.ndarray:
    kind = image.format
    if kind == "PNG" and isinstance(content, bytes) and b"IEND\xaeB`\x82" not in content:
        raise OSError("image file is truncated")  # Pillow forgives a missing tail of a PNG
    image.load()
    try:
        image = ImageOps.exif_transpose(image)  # before the conversion, which may lose the orientation
    except UNREADABLE:
        pass  # damaged metadata are common, and the image is as good as one without any
    # It cuts while it resizes, so that a strip of 1 x 60,000 pixels does not become one of 224 x 13 million.
    square = ImageOps.fit(_rgb(image, kind), (size, size), Image.Resampling.BILINEAR)
    return np.asarray(square).transpose(2, 0, 1)


def _rgb(image: Image.Image, kind: str | None) -> Image.Image:
    """Any image as RGB. 16-bit grey values are divided by 256; 32-bit ones have no agreed range and are refused."""
    # A 16-bit PGM (and, with older Pillows, PNG) is opened in mode I, with values from 0 to 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PPM", "PNG")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no agreed range")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
