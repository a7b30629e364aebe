"""One image file -> pixels: modes, orientation, resizing, and what is refused."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from small_sets import encoded, noise

from pa_core import data
from pa_core.data import decode


def pixels(content: bytes | Image.Image, size: int) -> np.ndarray:
    """uint8 [3, size, size]; ValueError with what would be the reason in a dataset."""
    _, reason, found = decode.decode(content, size)
    if reason:
        raise ValueError(reason)
    return found


def png(bits: int, kind: int, width: int, height: int, rows: list[bytes]) -> bytes:
    """A PNG file made by hand, since Pillow cannot write 16-bit colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def flat(mode: str, color, size: int = 4) -> Image.Image:
    return Image.new(mode, (size, size), color)


def palette(color: tuple[int, int, int]) -> Image.Image:
    image = flat("P", 1)
    image.putpalette([9, 9, 9, *color])
    return image


def grey16(value: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4), value, dtype=np.uint16))


MODES = {
    "grey": (encoded(flat("L", 77), "PNG"), (77, 77, 77)),
    "grey jpeg": (encoded(flat("L", 77), "JPEG"), (77, 77, 77)),
    "one bit white": (encoded(flat("1", 1), "PNG"), (255, 255, 255)),
    "one bit black": (encoded(flat("1", 0), "TIFF"), (0, 0, 0)),
    "colour": (encoded(flat("RGB", (1, 2, 3)), "PNG"), (1, 2, 3)),
    "opaque": (encoded(flat("RGBA", (1, 2, 3, 255)), "PNG"), (1, 2, 3)),
    "half red on white": (encoded(flat("RGBA", (255, 0, 0, 128)), "PNG"), (255, 127, 127)),
    "invisible": (encoded(flat("RGBA", (1, 2, 3, 0)), "WEBP", lossless=True), (255, 255, 255)),
    "half black on white": (encoded(flat("LA", (0, 51)), "PNG"), (204, 204, 204)),
    "palette": (encoded(palette((10, 200, 30)), "PNG"), (10, 200, 30)),
    "palette gif": (encoded(palette((10, 200, 30)), "GIF"), (10, 200, 30)),
    "palette, seen through": (encoded(palette((10, 200, 30)), "PNG", transparency=1), (255, 255, 255)),
    "palette, other colour seen through": (encoded(palette((10, 200, 30)), "PNG", transparency=0), (10, 200, 30)),
    "cyan ink": (encoded(flat("CMYK", (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
    "black ink": (encoded(flat("CMYK", (0, 0, 0, 255)), "TIFF"), (0, 0, 0)),
    "16 bit grey png": (encoded(grey16(0x1234), "PNG"), (0x12, 0x12, 0x12)),
    "16 bit white png": (encoded(grey16(0xFFFF), "PNG"), (255, 255, 255)),
    "16 bit grey tiff": (encoded(grey16(0x80FF), "TIFF"), (0x80, 0x80, 0x80)),
    "16 bit grey pgm": (b"P5 4 4 65535\n" + b"\x12\x34" * 16, (0x12, 0x12, 0x12)),
    "16 bit colour png": (png(16, 2, 4, 4, [b"\x12\xff\x34\xff\x56\xff" * 4] * 4), (0x12, 0x34, 0x56)),
    "16 bit colour and opacity": (png(16, 6, 4, 4, [b"\x12\xff\x34\xff\x56\xff\xff\xff" * 4] * 4), (0x12, 0x34, 0x56)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name, tmp_path):
    content, color = MODES[name]
    path = tmp_path / "image"  # the content counts, not the name
    path.write_bytes(content)
    digest, reason, found = decode.decode(str(path), 4)
    assert (digest, reason) == (hashlib.sha256(content).hexdigest(), "")
    assert found.shape == (3, 4, 4) and found.dtype == np.uint8
    assert [set(channel.ravel().tolist()) for channel in found] == [{value} for value in color]


def test_a_cmyk_jpeg_as_photoshop_writes_it_is_not_inverted():
    # Pillow writes the Adobe marker and inverted inks, and reads them back.
    found = pixels(encoded(flat("CMYK", (0, 255, 255, 0), 16), "JPEG", quality=100), 16)
    assert found[0].min() > 245 and found[1:].max() < 10  # red


@pytest.mark.parametrize("values", [np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)], ids=["F", "I"])
def test_32_bit_pixels_are_refused_with_their_mode(values, request):
    with pytest.raises(ValueError, match=rf"mode {request.node.callspec.id}\b"):
        pixels(encoded(Image.fromarray(values), "TIFF"), 4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 10))  # 9 does not exist
def test_every_exif_orientation_is_that_of_pillow(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(noise(3), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(pixels(content, 16), np.asarray(expected).transpose(2, 0, 1))


def test_damaged_metadata_do_not_make_a_bad_image():
    content = encoded(noise(3), "PNG", exif=b"Exif\0\0nonsense")
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(content)).getexif()
    assert np.array_equal(pixels(content, 16), np.asarray(noise(3)).transpose(2, 0, 1))


def test_only_the_first_frame_counts():
    frames = [flat("RGB", color).convert("P") for color in ("red", "blue")]
    found = pixels(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 4)
    assert found[0].min() == 255 and found[2].max() == 0


@pytest.mark.parametrize("width, height, size", [(128, 64, 32), (64, 64, 16), (48, 48, 96), (100, 300, 50)])
def test_resizing_is_that_of_torchvision(width, height, size):
    image = noise(1, width=width, height=height)
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.Resize(size), torchvision.transforms.CenterCrop(size)]
    )
    assert np.array_equal(pixels(image, size), np.asarray(transform(image)).transpose(2, 0, 1))


def test_a_very_long_image_takes_no_more_memory_than_it_must():
    assert pixels(Image.new("RGB", (1, 60_000), "red"), 224).shape == (3, 224, 224)


WHOLE = {
    "jpeg": encoded(noise(0), "JPEG"),
    "progressive jpeg": encoded(noise(0), "JPEG", progressive=True),
    "png": encoded(noise(0), "PNG"),
    "bmp": encoded(noise(0), "BMP"),
    "webp": encoded(noise(0), "WEBP"),
    "tiff": encoded(noise(0), "TIFF"),
    "ppm": encoded(noise(0), "PPM"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_is_cut_short_is_refused_wherever_it_is_cut(name):
    content = WHOLE[name]
    pixels(content, 16)
    for length in {*range(0, len(content), 7), *range(len(content) - 20, len(content))}:
        with pytest.raises(ValueError):
            pixels(content[:length], 16)


def test_an_image_of_ones_own_is_read_as_a_dataset_has_it(tmp_path):
    noise(1, width=40, height=30).save(tmp_path / "image.png")
    for image in (tmp_path / "image.png", str(tmp_path / "image.png"), Image.open(tmp_path / "image.png")):
        read = data.read_image(image, 16)
        assert read.dtype == torch.uint8 and np.array_equal(read, pixels(noise(1, width=40, height=30), 16))
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="no image"):
        data.read_image(tmp_path / "notes.txt", 16)
