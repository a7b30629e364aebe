"""Data: decoding, folders, torchvision's datasets, splits, the image cache; with real files and
real processes."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections import Counter
from pathlib import Path
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image, ImageOps

from pa_core import data
from pa_core.data import decode, folder, sources, splits, store, workers
from pa_core.fashion_mini import draw
from pa_core.params import ParameterError

ROOT = Path(__file__).resolve().parents[1]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A data home of its own for each test."""
    monkeypatch.setenv("PA_DATA", str(tmp_path / "home"))
    return tmp_path / "home"


def noise(seed: int, *, width: int = 16, height: int = 16) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_folder(root: Path, counts: dict[str, int], *, suffix: str = "png", start: int = 0, **size: int) -> Path:
    """Class folders of noise images, no two alike; ``counts`` by folder, such as {"train/cat":
    5}."""
    number = start
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise(number, **size).save(root / name / f"{i:03d}.{suffix}")
            number += 1
    return root


def load(root: Path, **options) -> data.Dataset:
    return data.load(dataset="folder", data_dir=str(root), **options)


def parts(dataset: data.Dataset) -> dict[str, set[str]]:
    return {part.name: set(part.ids) for part in (dataset.train, dataset.val, dataset.test)}


def everything(dataset: data.Dataset) -> dict[str, torch.Tensor]:
    """Every image by id."""
    return {
        name: image
        for part in (dataset.train, dataset.val, dataset.test)
        for name, image in zip(part.ids, part.read(torch.arange(len(part))), strict=True)
    }


def refused(match: str):
    return pytest.raises(ParameterError, match=match)


# fashion_mini


def test_fashion_mini_is_stratified_and_reads_what_is_in_the_file(home):
    dataset = data.load(dataset="fashion_mini")
    assert (dataset.name, dataset.image_size, len(dataset.classes)) == ("fashion_mini", 28, 10)
    assert dataset.classes[9] == "Ankle boot" and not dataset.dropped and not dataset.skipped
    for part, each in ((dataset.train, 320), (dataset.val, 80), (dataset.test, 200)):
        assert part.labels.dtype == torch.int64 and torch.bincount(part.labels).tolist() == [each] * 10
        assert len(part) == len(part.ids) == len(set(part.ids)) == each * 10
    arrays = sources.embedded()
    images = {
        f"{p}/{r:05d}": i
        for p in ("train", "test")
        for r, i in zip(arrays[f"{p}_rows"], arrays[f"{p}_images"], strict=True)
    }
    for name, image in everything(dataset).items():
        assert torch.equal(image, torch.from_numpy(images[name]).expand(3, 28, 28))
    assert not home.exists()  # no cache is needed


def test_fashion_mini_and_its_split_stay_what_they_are():
    # A change here changes every result: the digests of run identities, and the images behind each
    # number.
    dataset = data.load(dataset="fashion_mini")
    assert dataset.digest == "a7eca42584423a0b5c338c772990dba83d0eede4d6be204e92922471c8fa8ff8"
    assert dataset.split_digest == "e8f83804dd7343b590fd62da14da99080b34694d8fcd4c20753f122b052d7a90"


def test_fashion_mini_is_the_file_that_its_readme_describes():
    readme = (sources.EMBEDDED.parent / "README.md").read_text()
    content = sources.EMBEDDED.read_bytes()
    assert hashlib.sha256(content).hexdigest() in readme and len(content) < 3_000_000
    assert "Zalando SE" in (sources.EMBEDDED.parent / "LICENSE").read_text()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_fashion_mini_can_be_drawn_again(tmp_path):
    draw.main(str(DEBIAN), str(tmp_path))
    with np.load(tmp_path / "fashion_mini.npz") as again:
        arrays = sources.embedded()
        assert sorted(again) == sorted(arrays)
        for name, array in arrays.items():
            assert again[name].dtype == array.dtype and again[name].tobytes() == array.tobytes()


def test_fashion_mini_at_another_size_is_resized_and_cached(home):
    dataset = data.load(dataset="fashion_mini", image_size=56)
    image = dataset.test.read(torch.tensor([3]))[0]
    original = Image.fromarray(sources.embedded()["test_images"][3])
    assert torch.equal(image[0], torch.from_numpy(np.array(original.resize((56, 56), Image.Resampling.BILINEAR))))
    assert dataset.digest == data.load(dataset="fashion_mini").digest and list(home.glob("cache/*.npy"))


# decoding


def png(bits: int, kind: int, width: int, height: int, rows: list[bytes]) -> bytes:
    """A PNG file made by hand, since Pillow cannot write 16-bit colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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
    "palette, seen through": (
        encoded(palette((10, 200, 30)), "PNG", transparency=1),
        (255, 255, 255),
    ),
    "palette, other colour seen through": (
        encoded(palette((10, 200, 30)), "PNG", transparency=0),
        (10, 200, 30),
    ),
    "cyan ink": (encoded(flat("CMYK", (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
    "black ink": (encoded(flat("CMYK", (0, 0, 0, 255)), "TIFF"), (0, 0, 0)),
    "16 bit grey png": (encoded(grey16(0x1234), "PNG"), (0x12, 0x12, 0x12)),
    "16 bit white png": (encoded(grey16(0xFFFF), "PNG"), (255, 255, 255)),
    "16 bit grey tiff": (encoded(grey16(0x80FF), "TIFF"), (0x80, 0x80, 0x80)),
    "16 bit grey pgm": (b"P5 4 4 65535\n" + b"\x12\x34" * 16, (0x12, 0x12, 0x12)),
    "16 bit colour png": (
        png(16, 2, 4, 4, [b"\x12\xff\x34\xff\x56\xff" * 4] * 4),
        (0x12, 0x34, 0x56),
    ),
    "16 bit colour and opacity": (
        png(16, 6, 4, 4, [b"\x12\xff\x34\xff\x56\xff\xff\xff" * 4] * 4),
        (0x12, 0x34, 0x56),
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name, tmp_path):
    content, color = MODES[name]
    path = tmp_path / "image"  # the content counts, not the name
    path.write_bytes(content)
    pixels = decode.pixels(str(path), 4)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == np.uint8
    assert [set(channel.ravel().tolist()) for channel in pixels] == [{value} for value in color]


def test_a_cmyk_jpeg_as_photoshop_writes_it_is_not_inverted():
    # Pillow writes the Adobe marker and inverted inks, and reads them back.
    pixels = decode.pixels(encoded(flat("CMYK", (0, 255, 255, 0), 16), "JPEG", quality=100), 16)
    assert pixels[0].min() > 245 and pixels[1:].max() < 10  # red


@pytest.mark.parametrize("values", [np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)], ids=["F", "I"])
def test_32_bit_pixels_are_refused_with_their_mode(values, request):
    with pytest.raises(ValueError, match=rf"mode {request.node.callspec.id}\b"):
        decode.pixels(encoded(Image.fromarray(values), "TIFF"), 4)


def test_exif_orientation_is_applied():
    image = flat("RGB", "red", 8)
    image.paste("blue", (4, 0, 8, 8))  # left red, right blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter: what was left is above
    pixels = decode.pixels(encoded(image, "PNG", exif=exif), 8)
    assert set(map(tuple, pixels[:, :4].reshape(3, -1).T.tolist())) == {(255, 0, 0)}
    assert set(map(tuple, pixels[:, 4:].reshape(3, -1).T.tolist())) == {(0, 0, 255)}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 10))  # 9 does not exist
def test_every_exif_orientation_is_that_of_pillow(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(noise(3), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(decode.pixels(content, 16), np.asarray(expected).transpose(2, 0, 1))


def test_damaged_metadata_do_not_make_a_bad_image():
    content = encoded(noise(3), "PNG", exif=b"Exif\0\0nonsense")
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(content)).getexif()
    assert np.array_equal(decode.pixels(content, 16), np.asarray(noise(3)).transpose(2, 0, 1))


def test_only_the_first_frame_counts():
    frames = [flat("RGB", color).convert("P") for color in ("red", "blue")]
    pixels = decode.pixels(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 4)
    assert pixels[0].min() == 255 and pixels[2].max() == 0


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = noise(0, width=16, height=16)
    assert np.array_equal(decode.pixels(image, 16), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("width, height, box", [(32, 16, (8, 0, 24, 16)), (16, 32, (0, 8, 16, 24))])
def test_the_central_square_is_cut_out(width, height, box):
    image = noise(0, width=width, height=height)
    assert np.array_equal(decode.pixels(image, 16), np.asarray(image.crop(box)).transpose(2, 0, 1))


@pytest.mark.parametrize("width, height, size", [(128, 64, 32), (64, 64, 16), (48, 48, 96), (100, 300, 50)])
def test_resizing_is_that_of_torchvision(width, height, size):
    image = noise(1, width=width, height=height)
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.Resize(size), torchvision.transforms.CenterCrop(size)]
    )
    assert np.array_equal(decode.pixels(image, size), np.asarray(transform(image)).transpose(2, 0, 1))


def test_a_very_long_image_takes_no_more_memory_than_it_must():
    assert decode.pixels(Image.new("RGB", (1, 60_000), "red"), 224).shape == (3, 224, 224)


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
    decode.pixels(content, 16)
    for length in {*range(0, len(content), 7), *range(len(content) - 20, len(content))}:
        with pytest.raises(decode.UNREADABLE):
            decode.pixels(content[:length], 16)


# Folders: what is a class, what is an image


def test_a_folder_is_loaded_sorted_with_relative_ids(tmp_path):
    root = make_folder(tmp_path / "d", {"b": 10, "a": 10, "c/deep/er": 10})
    dataset = load(root, image_size=16)
    assert dataset.classes == ("a", "b", "c")
    images = everything(dataset)
    assert set(images) == {path.relative_to(root).as_posix() for path in root.rglob("*.png")}
    for part in (dataset.train, dataset.val, dataset.test):
        assert list(part.ids) == sorted(part.ids)
        assert [dataset.classes[i] for i in part.labels] == [name[0] for name in part.ids]
    for name, image in images.items():
        assert np.array_equal(image.numpy(), np.asarray(Image.open(root / name)).transpose(2, 0, 1))
    assert dataset.test.sizes.tolist() == [[16, 16]] * 6


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_train_val_and_test_folders_are_the_parts(tmp_path, val):
    counts = {"train/a": 3, "train/b": 2, f"{val}/a": 2, f"{val}/b": 1, "test/a": 1, "test/b": 4}
    dataset = load(make_folder(tmp_path / "d", counts))
    assert dataset.classes == ("a", "b")
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [5, 3, 5]
    assert all(name.startswith(f"{val}/") for name in dataset.val.ids)


def test_train_and_test_folders_leave_a_fold_for_validation(tmp_path):
    dataset = load(make_folder(tmp_path / "d", {"train/a": 5, "train/b": 10, "test/a": 1}))
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [12, 3, 1]


def test_a_train_folder_alone_gives_all_three_parts(tmp_path):
    dataset = load(make_folder(tmp_path / "d", {"train/a": 10, "train/b": 10}))
    assert dataset.classes == ("a", "b")
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [12, 4, 4]


def test_train_may_be_a_class_among_others(tmp_path):
    dataset = load(make_folder(tmp_path / "d", {"bus": 6, "train": 6, "tram": 6}))
    assert dataset.classes == ("bus", "train", "tram")


@pytest.mark.parametrize(
    "counts, message",
    [
        (
            {"train/a": 9, "train/b": 9, "test/a": 2, "test/c": 2},
            r"test/ has classes that train/ lacks: c;",
        ),
        (
            {"train/a": 9, "train/b": 9, "val/x": 2, "val/y": 2},
            r"val/ has classes that train/ lacks: x, y;",
        ),
        (
            {"train/a": 9, "train/b": 9, "test/a": 2, "extra/a": 2},
            r"test/, train/ stand beside .*\(extra/\)",
        ),
        (
            {"train/a": 9, "train/b": 9, "val/a": 2, "valid/a": 2},
            r"two of train/, val/, valid/ are for the same",
        ),
        ({"train/a": 9, "train/b": 9, "test": 0}, r"test/ holds no image"),
        (
            {"a": 9},
            r"it holds only one class \(a\); allowed is a folder with a subfolder of images",
        ),
        ({"train/a": 9, "test/a": 9}, r"it holds only one class \(a\)"),
        ({".": 9}, r"it holds no class"),
        ({"train": 9}, r"it holds no class"),
        ({"a": 9, "b": 0}, r"1 of 2 are too small: b has 0$"),
    ],
)
def test_layouts_that_mean_nothing_are_refused(tmp_path, counts, message):
    with refused(f"^data_dir = '{tmp_path / 'd'}' is refused: .*{message}"):
        load(make_folder(tmp_path / "d", counts))


@pytest.mark.parametrize("options", [{"folds": 4}, {"fold": 1}])
def test_folds_have_no_meaning_where_validation_images_are_given(tmp_path, options):
    root = make_folder(tmp_path / "d", {f"{part}/{name}": 3 for part in ("train", "val", "test") for name in "ab"})
    load(root, folds=5, fold=0)
    with refused(rf"{next(iter(options))} = .* has its own validation images"):
        load(root, **options)


def test_what_desktops_leave_behind_is_ignored(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    ids = {name for names in parts(load(root)).values() for name in names}
    left = "a/.DS_Store a/Thumbs.db b/desktop.ini a/.ipynb_checkpoints/000.png .git/config"
    for name in f"{left} __MACOSX/a/._000.png README.md labels.csv".split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("no image")
    dataset = load(root)
    assert dataset.classes == ("a", "b") and {name for names in parts(dataset).values() for name in names} == ids


def spoil(root: Path) -> dict[str, str]:
    """Files that are no images, by id, with what is said about them."""
    (root / "a" / "notes.txt").write_text("no image")
    (root / "a" / "empty.png").touch()
    half = encoded(noise(99, width=64, height=64), "JPEG")
    (root / "b" / "half.jpg").write_bytes(half[: len(half) // 2])
    (root / "b" / "half.png").write_bytes(WHOLE["png"][:-12])
    (root / "b" / "float.tiff").write_bytes(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    (root / "b" / "lost.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "b" / "pipe.png")
    (root / "outside.png").write_bytes(WHOLE["png"])
    return {
        "a/empty.png": "an empty file",
        "a/notes.txt": "no image, or of an unknown format",
        "b/float.tiff": "32-bit pixels (mode F) have no agreed range",
        "b/half.jpg": "image file is truncated",
        "b/half.png": "image file is truncated",
        "b/lost.png": "there is no such file",
        "b/pipe.png": "there is no such file",
        "outside.png": "lies in no class folder",
    }


def test_files_that_are_no_images_are_refused_by_name_or_skipped_and_listed(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 8, "b": 8})
    good = load(root)
    reasons = spoil(root)
    with refused(r"8 files are no images or are cut short: a/empty.png \(an empty file\), .* and 3 more; "):
        load(root)
    skipped = load(root, bad_images="skip")
    assert [line.split(": ")[0] for line in skipped.skipped] == list(reasons)
    for line, reason in zip(skipped.skipped, reasons.values(), strict=True):
        assert line.split(": ", 1)[1].startswith(reason)
    assert parts(skipped) == parts(good) and skipped.digest == good.digest
    assert skipped.split_digest == good.split_digest
    images = everything(good)
    assert all(torch.equal(image, images[name]) for name, image in everything(skipped).items())


def test_a_truncated_file_is_refused_when_it_is_the_only_one_and_again_from_the_cache(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    (root / "b" / "half.png").write_bytes(WHOLE["png"][:-12])
    for _ in range(2):
        with refused(r"1 file is no image or .*: b/half.png \(image file is truncated\); .*bad_images"):
            load(root)
    assert load(root, bad_images="skip").skipped == ("b/half.png: image file is truncated",)


def test_a_class_that_is_too_small_once_files_are_skipped_is_named(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    (root / "b" / "000.png").write_bytes(WHOLE["png"][:-12])
    with refused(r"at least 6 different training images for folds = 5 and a fifth as test images.* b has 5$"):
        load(root, bad_images="skip")


def test_a_test_folder_without_class_folders_is_not_taken_for_none(tmp_path):
    root = make_folder(tmp_path / "d", {"train/a": 9, "train/b": 9, "test": 2})
    with refused(r"test/000.png \(lies in no class folder\)"):
        load(root)
    with refused(r"no image of its test part is left"):
        load(root, bad_images="skip")


def test_links_are_followed_but_not_in_circles(tmp_path):
    elsewhere = make_folder(tmp_path / "e", {"b": 6, "more": 2}, start=100)
    root = make_folder(tmp_path / "d", {"a": 6})
    (root / "b").symlink_to(elsewhere / "b")
    (root / "a" / "linked").symlink_to(elsewhere / "more")
    (root / "a" / "circle").symlink_to(root / "a")
    (root / "a" / "top").symlink_to(root)
    (root / "a" / "above").symlink_to(tmp_path)
    (root / "a" / ".itself").symlink_to(root / "a" / ".itself")
    ids = {name for names in parts(load(root)).values() for name in names}
    assert ids == {f"{c}/{i:03d}.png" for c in "ab" for i in range(6)} | {
        "a/linked/000.png",
        "a/linked/001.png",
    }


@pytest.mark.parametrize(
    "sides, size",
    [((20, 30), 32), ((63, 900), 32), ((64, 64), 64), ((127, 128), 96), ((500, 300), 224)],
)
def test_the_default_size_fits_the_median_shorter_side(tmp_path, sides, size):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6}, width=sides[0], height=sides[1])
    assert load(root).image_size == size


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset": "fashion_mni"}, r"dataset = 'fashion_mni' .*did you mean 'fashion_mini'"),
        ({"dataset": "folder"}, r"data_dir = None is refused: dataset = 'folder' needs it"),
        (
            {"dataset": "folder", "data_dir": "no/where"},
            r"data_dir = 'no/where' is refused: it does not exist",
        ),
        (
            {"dataset": "folder", "data_dir": __file__},
            r"data_dir = .*test_data.py' is refused: it is a file",
        ),
        (
            {"dataset": "cifar10", "data_dir": "no/where"},
            r"data_dir = 'no/where' is refused: it does not exist",
        ),
        (
            {"data_dir": str(ROOT)},
            r"data_dir = .* fashion_mini comes with the package; .* set dataset to folder",
        ),
        ({"image_size": 4}, r"image_size = 4 is refused: allowed is a whole number from 16"),
        ({"train_fraction": 0}, r"train_fraction = 0 is refused"),
        ({"train_fraction": 1.1}, r"train_fraction = 1.1 is refused"),
        ({"folds": 1}, r"folds = 1 is refused"),
        ({"fold": 5}, r"fold = 5 is refused: allowed is 0 to 4"),
        ({"bad_images": "ignore"}, r"bad_images = 'ignore' is refused"),
        ({"folds": 401}, r"dataset = 'fashion_mini' is refused: each class needs at least 401"),
    ],
)
def test_parameters_are_refused_in_a_sentence(options, message):
    with refused(message):
        data.load(**{"dataset": "fashion_mini", **options})


def test_parameters_may_come_as_text():
    dataset = data.load(dataset="fashion_mini", folds="4", fold="1", train_fraction="0.5", image_size="none")
    assert [len(part) for part in (dataset.train, dataset.val)] == [1500, 1000]


# A folder is never written to


def state(root: Path) -> list[tuple]:
    return [
        (
            str(path),
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_mode,
            path.is_file() and path.read_bytes(),
        )
        for path in sorted(root.rglob("*"))
        for status in [path.lstat()]
    ] + [root.lstat().st_mtime_ns]


def test_a_read_only_folder_works_and_is_left_as_it_was(monkeypatch):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        top = Path(name)
        root = make_folder(top / "d", {"a": 8, "b": 8})
        (top / "home").mkdir()
        (top / "home").chmod(0o777)
        for path in (root, root / "a", root / "b"):
            path.chmod(0o555)
        top.chmod(0o755)
        monkeypatch.setenv("PA_DATA", str(top / "home"))
        before = state(root)

        def work():
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            assert not os.access(root / "a", os.W_OK)
            assert len(load(root).train) == 9  # 8 of each class, 2 of them for the test; of the 12 left 3 are one fold

        assert ended(fork(work)) == 0
        assert list(top.glob("home/cache/*.npy")) and state(root) == before
        for path in (root, root / "a", root / "b"):
            path.chmod(0o755)


def test_a_data_home_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    (tmp_path / "file").touch()
    monkeypatch.setenv("PA_DATA", str(tmp_path / "file" / "home"))
    with refused(r"^PA_DATA = '.*/file/home' is refused: nothing can be written there \(Not a directory\); "):
        load(root)
    data.load(dataset="fashion_mini")  # needs none


def test_what_is_cached_can_be_read_from_a_data_home_that_cannot_be_written(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    monkeypatch.setattr(folder, "RACE_NS", 0)
    first = load(root)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("something is to be written"))
    assert load(root).digest == first.digest


def test_a_full_disk_is_said_before_anything_is_decoded(tmp_path, monkeypatch, home):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with refused(r"^PA_DATA = .* needs 0 MB there and 0 MB are free"):
        load(root)
    assert not list(home.glob("cache/*.npy")) and not list(home.glob("cache/*.part"))


# Splits


def test_the_split_is_the_same_at_every_call_and_wherever_the_folder_lies(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d", {"a": 20, "b": 30})
    first = load(root)
    moved = shutil.copytree(root, tmp_path / "moved")
    monkeypatch.setenv("PA_DATA", str(tmp_path / "other"))
    second = load(moved)
    assert (second.digest, second.split_digest, parts(second)) == (
        first.digest,
        first.split_digest,
        parts(first),
    )


def test_the_test_part_depends_on_nothing_but_the_images(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 20, "b": 31})
    first = load(root)
    assert Counter(name[0] for name in first.test.ids) == {"a": 4, "b": 6}
    for options in (
        {"seed": 1},
        {"fold": 3},
        {"folds": 3},
        {"train_fraction": 0.3},
        {"seed": 2**63 - 1},
    ):
        other = load(root, **options)
        assert other.test.ids == first.test.ids and other.digest == first.digest
        assert other.split_digest != first.split_digest
    make_folder(root, {"c": 10}, start=1000)  # one more class moves no image of the others
    assert set(first.test.ids) < set(load(root).test.ids)


def test_folds_are_stratified_and_each_image_is_in_one_of_them(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 20, "b": 30})
    folds = [load(root, folds=4, fold=k) for k in range(4)]
    rest = set(folds[0].train.ids) | set(folds[0].val.ids)
    assert len(rest) == 40
    assert Counter(name for fold in folds for name in fold.val.ids) == dict.fromkeys(rest, 1)
    for fold in folds:
        assert Counter(name[0] for name in fold.val.ids) == {"a": 4, "b": 6}
        assert set(fold.train.ids) == rest - set(fold.val.ids)
    assert set(load(root, folds=4, seed=1).val.ids) != set(folds[0].val.ids)


def test_fractions_are_nested_stratified_and_leave_the_other_parts_alone(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 50, "b": 25})
    shares = [load(root, train_fraction=share, seed=3, fold=2) for share in (0.01, 0.1, 0.5, 0.99, 1.0)]
    counts = [Counter(name[0] for name in dataset.train.ids) for dataset in shares]
    assert counts == [{"a": a, "b": b} for a, b in ((1, 1), (3, 2), (16, 8), (32, 16), (32, 16))]
    for smaller, larger in zip(shares, shares[1:], strict=False):
        assert set(smaller.train.ids) <= set(larger.train.ids)
        assert smaller.val.ids == larger.val.ids and smaller.test.ids == larger.test.ids
    assert set(load(root, train_fraction=0.5, seed=4, fold=2).train.ids) != set(shares[2].train.ids)


def test_copies_stay_on_one_side(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 20, "b": 20})
    for i in range(20):
        shutil.copy(root / "a" / f"{i:03d}.png", root / "a" / f"copy{i:03d}.png")
    for seed in range(5):
        dataset = load(root, seed=seed)
        for names in parts(dataset).values():
            copied = {name for name in names if name.startswith("a/")}
            assert {name.replace("copy", "") for name in copied} | {
                name.replace("copy", "").replace("a/", "a/copy") for name in copied
            } == copied
        assert dataset.dropped == ()
        assert Counter(name[0] for name in dataset.test.ids) == {
            "a": 8,
            "b": 4,
        }  # each with its copy


def test_a_training_copy_of_a_test_image_is_dropped(tmp_path):
    root = make_folder(tmp_path / "d", {"train/a": 7, "train/b": 6, "test/a": 2, "test/b": 2})
    shutil.copy(root / "test" / "b" / "001.png", root / "train" / "a" / "000.png")  # even with another label
    dataset = load(root)
    assert dataset.dropped == ("train/a/000.png",)
    assert "train/a/000.png" not in set().union(*parts(dataset).values()) and len(dataset.test) == 4


def test_copies_of_given_validation_images_are_dropped_too(tmp_path):
    counts = {f"{part}/{name}": 3 for part in ("train", "val", "test") for name in "ab"}
    root = make_folder(tmp_path / "d", counts)
    shutil.copy(root / "val" / "a" / "000.png", root / "train" / "a" / "000.png")
    shutil.copy(root / "test" / "a" / "000.png", root / "val" / "a" / "001.png")
    dataset = load(root)
    assert dataset.dropped == ("train/a/000.png", "val/a/001.png")
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [5, 5, 6]


@pytest.mark.parametrize("folds, needed", [(2, 3), (3, 4), (5, 6), (10, 12)])
def test_a_class_needs_an_image_in_every_fold_after_the_test_images(tmp_path, folds, needed):
    root = make_folder(tmp_path / "d", {"a": needed, "b": needed - 1, "c": 1, "d": needed + 4})
    with refused(
        rf"at least {needed} different .*folds = {folds} and a fifth.* 2 of 4 .*: "
        rf"b has {needed - 1}, c has 1$"
    ):
        load(root, folds=folds)
    shutil.rmtree(root / "b")
    shutil.rmtree(root / "c")
    for fold in range(folds):
        dataset = load(root, folds=folds, fold=fold)
        for part in (dataset.train, dataset.val, dataset.test):
            assert set(part.labels.tolist()) == {0, 1}


def test_copies_do_not_make_a_class_larger(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 5})
    shutil.copy(root / "b" / "000.png", root / "b" / "copy.png")
    with refused(r"b has 5$"):
        load(root)


def test_a_fifth_is_rounded_as_computed_by_hand():
    assert [splits._of(n) for n in (1, 2, 5, 7, 8, 12, 13, 100)] == [1, 1, 1, 1, 2, 2, 3, 20]


def test_the_digest_is_of_content_and_names_and_of_nothing_else(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    first = load(root)
    os.utime(root / "a" / "000.png")
    assert load(root, image_size=20, seed=1).digest == first.digest
    (root / "a" / "000.png").rename(root / "a" / "zzz.png")
    renamed = load(root).digest
    (root / "a" / "zzz.png").rename(root / "b" / "zzz.png")
    moved = load(root, folds=2).digest
    noise(12345).save(root / "b" / "zzz.png")
    changed = load(root, folds=2).digest
    assert len({first.digest, renamed, moved, changed}) == 4


# Parts


def test_a_part_counts_its_reads_and_gives_copies_in_the_order_asked(tmp_path):
    dataset = load(make_folder(tmp_path / "d", {"a": 10, "b": 10}))
    part = dataset.train
    assert [p.reads for p in (part, dataset.val, dataset.test)] == [0, 0, 0]
    images = part.read(torch.tensor([3, 0, 3]))
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 32, 32)
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    images.zero_()
    assert part.read(torch.tensor([0])).any()
    assert [p.reads for p in (part, dataset.val, dataset.test)] == [4, 0, 0]
    assert part.read(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 32, 32)
    for index in ([-1], [len(part)], [[0]]):
        with pytest.raises(IndexError):
            part.read(torch.tensor(index))
    assert not part.store.flags.writeable
    with pytest.raises(AttributeError):
        part.name = "other"


# The index of files


def hashed(monkeypatch) -> list[int]:
    """How many files were read for their digest, call by call."""
    counts: list[int] = []
    original = workers.describe

    def counting(things, rows, **options):
        counts.append(len(rows))
        return original(things, rows, **options)

    monkeypatch.setattr(workers, "describe", counting)
    return counts


def test_a_changed_file_is_noticed_even_with_the_same_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "RACE_NS", 0)
    counts = hashed(monkeypatch)
    root = make_folder(tmp_path / "d", {"a": 8, "b": 8}, suffix="bmp", width=32, height=32)
    first = load(root)
    assert load(root).digest == first.digest
    path = root / "a" / "003.bmp"
    before = path.stat()
    with open(path, "r+b") as file:  # in place: the same inode
        file.write(encoded(noise(777, width=32, height=32), "BMP"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    second = load(root)
    assert counts == [16, 0, 1] and second.digest != first.digest
    expected = np.asarray(noise(777, width=32, height=32)).transpose(2, 0, 1)
    assert np.array_equal(everything(second)["a/003.bmp"].numpy(), expected)
    path.unlink()
    noise(5000).save(root / "b" / "new.bmp")
    third = set().union(*parts(load(root)).values())
    assert "a/003.bmp" not in third and "b/new.bmp" in third and counts == [16, 0, 1, 1]


def test_a_file_that_changed_just_now_is_not_trusted(tmp_path, monkeypatch):
    counts = hashed(monkeypatch)
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    load(root)
    load(root)
    assert counts == [12, 12]


def test_a_damaged_index_is_made_anew(tmp_path, monkeypatch, home):
    monkeypatch.setattr(folder, "RACE_NS", 0)
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    first = load(root)
    (path,) = home.glob("cache/index/*.json")
    for content in (b"", b"{", b"[]", b'{"version": 0, "entries": {}}'):
        path.write_bytes(content)
        assert load(root).digest == first.digest


# The image cache


def test_images_are_decoded_once_and_found_by_content(tmp_path, monkeypatch, home):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    first = everything(load(root))
    shutil.copytree(root, tmp_path / "copy")
    monkeypatch.setattr(decode, "pixels", lambda *_: pytest.fail("decoded again"))
    assert all(torch.equal(image, first[name]) for name, image in everything(load(tmp_path / "copy")).items())
    assert len(list(home.glob("cache/*.npy"))) == 1 and not list(home.glob("cache/*.part"))
    with pytest.raises(pytest.fail.Exception):
        load(root, image_size=16)  # another size is another cache


@pytest.mark.parametrize("damage", ["short", "long", "empty", "header", "other shape", "no list", "no json"])
def test_a_cache_that_does_not_fit_is_built_again(tmp_path, home, damage):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    first = everything(load(root))
    (path,) = home.glob("cache/*.npy")
    content = path.read_bytes()
    if damage == "other shape":
        np.save(path, np.zeros((12, 3, 16, 16), np.uint8))
    elif damage.startswith("no"):
        path.with_suffix(".json").write_text("" if damage == "no json" else "[1")
    else:
        cut = {
            "short": content[:-1],
            "long": content + b"\0",
            "empty": b"",
            "header": b"x" + content[1:],
        }
        path.write_bytes(cut[damage])
    again = everything(load(root))
    assert all(torch.equal(again[name], image) for name, image in first.items())
    assert path.read_bytes() == content


def test_a_file_that_changes_while_it_is_read_does_not_enter_the_cache(tmp_path, monkeypatch, home):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    original = store._build

    def meanwhile(*arguments):
        noise(4444).save(root / "a" / "000.png")
        return original(*arguments)

    monkeypatch.setattr(store, "_build", meanwhile)
    with pytest.raises(decode.Changed, match="a/000.png changed while it was read"):
        load(root)
    assert not list(home.glob("cache/*.npy")) and not list(home.glob("cache/*.part"))


def test_many_files_go_through_processes_with_the_same_result(tmp_path, monkeypatch, home):
    root = make_folder(tmp_path / "d", {"a": 20, "b": 20}, suffix="jpg", width=40, height=30)
    (root / "b" / "half.png").write_bytes(WHOLE["png"][:-12])
    (root / "b" / "notes.txt").write_text("no image")
    here = load(root, bad_images="skip")
    monkeypatch.setattr(workers, "FEW", 4)
    monkeypatch.setattr(workers, "CHUNK", 5)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setenv("PA_DATA", str(tmp_path / "other"))
    started = []
    original = subprocess.Popen
    monkeypatch.setattr(
        workers.subprocess,
        "Popen",
        lambda *a, **k: started.append(original(*a, **k)) or started[-1],
    )
    there = load(root, bad_images="skip")
    assert len(started) == 4 and all(process.poll() is not None for process in started)  # 2 to hash, 2 to decode
    assert (there.digest, there.split_digest, there.skipped) == (
        here.digest,
        here.split_digest,
        here.skipped,
    )
    images = everything(here)
    assert all(torch.equal(image, images[name]) for name, image in everything(there).items())


def test_a_process_that_dies_over_a_file_is_reported(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{i}.png") for i in range(20)]
    script = tmp_path / "dies.py"
    script.write_text("import os; input(); os._exit(7)")
    monkeypatch.setattr(workers, "FEW", 4)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(decode, "__file__", str(script))
    with pytest.raises(RuntimeError, match=r"ended \(status 7\) over one of the files .*0.png to .*19.png"):
        list(workers.describe(paths, range(20), text=""))


def test_no_space_is_a_sentence_whether_here_or_in_another_process(tmp_path, monkeypatch, home):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    original = workers.write
    monkeypatch.setattr(
        workers,
        "write",
        lambda *a, path, offset, **k: original(*a, path="/dev/full", offset=0, **k),
    )
    for few in (100, 4):
        monkeypatch.setattr(workers, "FEW", few)
        monkeypatch.setattr(workers, "cores", lambda: 2)
        with refused(r"^PA_DATA = .*nothing can be written there \(No space left on device\)"):
            load(root)
        assert not list(home.glob("cache/*.npy")) and not list(home.glob("cache/*.part"))


def fork(work) -> int:
    """The id of a child that does some work and ends, with status 0 if it went well."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> int:
    """Waits for a child; its status, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def many_large_images(root: Path, count: int) -> Path:
    """Files of different content that take a while to decode, made quickly: one image with
    different tails."""
    content = encoded(noise(0, width=100, height=100).resize((400, 400)), "JPEG")
    for i in range(count):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[i % 2] / f"{i:04d}.jpg").write_bytes(content + b"%d" % i)
    return root


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_build_and_two_builders_at_once(tmp_path, home, monkeypatch):
    """One that is killed leaves nothing that harms; of two that come next, one builds and the other
    waits for it."""
    root = many_large_images(tmp_path / "d", workers.FEW + 8)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    original = store._build

    def watched(*arguments):
        with open(tmp_path / "builds", "a") as file:
            file.write("build\n")
        time.sleep(0.5)
        return original(*arguments)

    def build():
        dataset = load(root, image_size=32)
        images = b"".join(image.numpy().tobytes() for image in everything(dataset).values())
        (tmp_path / f"seen {os.getpid()}").write_text(hashlib.sha256(images).hexdigest())

    monkeypatch.setattr(store, "_build", watched)
    deadline = time.monotonic() + 60
    victim = fork(build)
    while not any(part.stat().st_blocks > 100 for part in home.glob("cache/*.part")):  # pixels are being written
        assert time.monotonic() < deadline
        time.sleep(0.005)
    children = [int(pid) for pid in Path(f"/proc/{victim}/task/{victim}/children").read_text().split()]
    os.kill(victim, signal.SIGKILL)
    assert ended(victim) == -signal.SIGKILL
    assert not list(home.glob("cache/*.npy")) and list(home.glob("cache/*.part"))  # it was in the middle
    assert len(children) == 2
    while any(map(alive, children)):  # they end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.01)

    both = [fork(build), fork(build)]
    assert [ended(child) for child in both] == [0, 0]
    first, second = ((tmp_path / f"seen {child}").read_text() for child in both)
    assert first == second
    assert (tmp_path / "builds").read_text().count("build") == 2  # the victim's and one more
    assert not list(home.glob("cache/*.part"))
    dataset = load(root, image_size=32)
    expected = decode.pixels(str(root / dataset.test.ids[1]), 32)
    assert np.array_equal(dataset.test.read(torch.tensor([1]))[0].numpy(), expected)


def test_who_waits_for_another_builder_says_so_and_takes_what_it_made(tmp_path, home, monkeypatch, capsys):
    root = make_folder(tmp_path / "d", {"a": 6, "b": 6})
    first = load(root)
    (path,) = home.glob("cache/*.npy")
    path.rename(tmp_path / "made by another.npy")
    monkeypatch.setattr(store, "_build", lambda *_: pytest.fail("built again"))
    digests = []
    with store.lock(path.with_suffix(".lock"), "never said"):
        waiting = threading.Thread(target=lambda: digests.append(load(root).digest))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and not digests
        (tmp_path / "made by another.npy").rename(path)
    waiting.join(30)
    assert digests == [first.digest]
    assert capsys.readouterr().err == "waiting for another process that decodes folder\n"


def test_progress_in_a_log_is_a_few_lines(capsys):
    bar = workers.progress(1000, "decoding")
    bar.delay = 0
    for _ in range(1000):
        bar.update()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3 and lines[-1].startswith("decoding: 1000 of 1000 images, ")


# torchvision's datasets: its own loading code, on small files in the real formats


def rgb(seed: int, size: int = 8) -> np.ndarray:
    return np.asarray(noise(seed, width=size, height=size))


def save(path: Path, seed: int, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, **options).save(path)


def idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def make_mnist(root: Path, kind: str = "FashionMNIST") -> None:
    for prefix, count in (("train", 60), ("t10k", 20)):
        images = np.random.RandomState(count).randint(0, 256, (count, 28, 28))
        idx(root / kind / "raw" / f"{prefix}-images-idx3-ubyte", images)
        idx(root / kind / "raw" / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)


def make_cifar10(root: Path, monkeypatch) -> None:
    folder_ = root / "cifar-10-batches-py"
    folder_.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        labels = [n % 2 for n in range(4)]
        pixels = np.random.RandomState(i).randint(0, 256, (4, 3072), dtype=np.uint8)
        (folder_ / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder_ / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane", "automobile"]}))
    patch_cifar10(folder_, monkeypatch)


def patch_cifar10(folder_: Path, monkeypatch) -> None:
    """torchvision's table of MD5 sums, for our files. Its code stays."""
    kind = torchvision.datasets.CIFAR10

    def sums(table):
        return [[name, hashlib.md5((folder_ / name).read_bytes()).hexdigest()] for name, _ in table]

    monkeypatch.setattr(kind, "train_list", sums(kind.train_list))
    monkeypatch.setattr(kind, "test_list", sums(kind.test_list))
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums([["batches.meta", ""]])[0][1]})


def make_caltech101(root: Path) -> None:
    for c, name in enumerate(["BACKGROUND_Google", "ant", "bee"]):
        for i in range(1, 7):
            save(
                root / "caltech101" / "101_ObjectCategories" / name / f"image_{i:04d}.jpg",
                10 * c + i,
                width=40,
            )


def make_caltech256(root: Path) -> None:
    for c, name in enumerate(["001.ak47", "002.flag"], start=1):
        for i in range(1, 7):
            save(
                root / "caltech256" / "256_ObjectCategories" / name / f"{c:03d}_{i:04d}.jpg",
                10 * c + i,
            )


def make_dtd(root: Path) -> None:
    for part, numbers in (("train", (1, 2)), ("val", (3,)), ("test", (4,))):
        lines = []
        for c, name in enumerate(["banded", "woven"]):
            for n in numbers:
                save(root / "dtd" / "dtd" / "images" / name / f"{name}_{n}.jpg", 10 * c + n)
                lines.append(f"{name}/{name}_{n}.jpg")
        (root / "dtd" / "dtd" / "labels").mkdir(exist_ok=True)
        (root / "dtd" / "dtd" / "labels" / f"{part}1.txt").write_text("\n".join(lines) + "\n")


def make_pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for part, numbers in (("trainval", range(1, 6)), ("test", range(6, 8))):
        lines = []
        for label, name in ((1, "Abyssinian"), (2, "english_setter")):
            for n in numbers:
                save(base / "images" / f"{name}_{n}.jpg", 10 * label + n)
                lines.append(f"{name}_{n} {label} {label} 1")
        (base / "annotations").mkdir(exist_ok=True)
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")


def make_imagenette(root: Path) -> None:
    for part, count in (("train", 5), ("val", 2)):
        for c, name in enumerate(["n01440764", "n02102040"]):
            for i in range(count):
                save(
                    root / "imagenette2-160" / part / name / f"{i}.jpeg",
                    1000 * (part == "val") + 10 * c + i,
                )


def make_fer2013(root: Path, monkeypatch) -> None:
    path = root / "fer2013" / "fer2013.csv"
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["emotion", "pixels", "Usage"])
        for n in range(14 * 5):
            pixels = np.random.RandomState(n).randint(0, 256, 48 * 48)
            table.writerow([n % 7, " ".join(map(str, pixels)), ["Training", "PublicTest"][n % 10 == 9]])
    kind = torchvision.datasets.FER2013
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "_RESOURCES", kind._RESOURCES | {"fer": ("fer2013.csv", md5)})


def make_svhn(root: Path, monkeypatch) -> None:
    table = {}
    root.mkdir(parents=True)
    for seed, (part, count) in enumerate((("train", 60), ("test", 20))):
        pixels = np.random.RandomState(seed).randint(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
        scipy.io.savemat(root / f"{part}_32x32.mat", {"X": pixels, "y": labels})
        md5 = hashlib.md5((root / f"{part}_32x32.mat").read_bytes()).hexdigest()
        table[part] = [f"http://127.0.0.1:9/{part}_32x32.mat", f"{part}_32x32.mat", md5]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", table)


def make_flowers(root: Path, monkeypatch) -> None:
    base = root / "flowers-102"
    for n in range(1, 9):
        save(base / "jpg" / f"image_{n:05d}.jpg", n)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": [1, 2, 1, 2, 1, 2, 1, 2]})
    scipy.io.savemat(base / "setid.mat", {"trnid": [1, 2, 3, 4], "valid": [5, 6], "tstid": [7, 8]})
    kind = torchvision.datasets.Flowers102
    md5 = {name: hashlib.md5((base / name).read_bytes()).hexdigest() for name in ("imagelabels.mat", "setid.mat")}
    table = {key: (name, md5.get(name, old)) for key, (name, old) in kind._file_dict.items()}
    monkeypatch.setattr(kind, "_file_dict", table)
    monkeypatch.setattr(kind, "classes", ["pink primrose", "rose"])


def make_places365(root: Path, monkeypatch) -> None:
    root.mkdir(parents=True)
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/b/bridge 1\n")
    lines: dict[str, list[str]] = {"train_standard": [], "val": []}
    for n in range(14):
        name, label = (("/a/airfield", 0), ("/b/bridge", 1))[n % 2]
        part = "val" if n > 11 else "train_standard"
        file = f"Places365_val_{n:08d}.jpg" if part == "val" else f"{name}/{n:08d}.jpg"
        save(root / ("val_256" if part == "val" else "data_256_standard") / file.lstrip("/"), n)
        lines[part].append(f"{file} {label}")
    kind = torchvision.datasets.Places365
    md5 = {}
    for part, text in lines.items():
        (root / f"places365_{part}.txt").write_text("\n".join(text) + "\n")
        md5[part] = hashlib.md5((root / f"places365_{part}.txt").read_bytes()).hexdigest()
    categories = hashlib.md5((root / "categories_places365.txt").read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "_CATEGORIES_META", ("categories_places365.txt", categories))
    lists = {
        "train-standard": ("places365_train_standard.txt", md5["train_standard"]),
        "val": ("places365_val.txt", md5["val"]),
    }
    monkeypatch.setattr(kind, "_FILE_LIST_META", lists)


def make_eurosat(root: Path) -> None:
    for c, name in enumerate(["AnnualCrop", "Forest"]):
        for i in range(6):
            save(root / "eurosat" / "2750" / name / f"{name}_{i}.jpg", 10 * c + i)


def make_food101(root: Path) -> None:
    base = root / "food-101"
    for part, count in (("train", 5), ("test", 2)):
        listed = {name: [f"{name}/{part}{i}" for i in range(count)] for name in ("apple_pie", "waffles")}
        (base / "meta").mkdir(parents=True, exist_ok=True)
        (base / "meta" / f"{part}.json").write_text(json.dumps(listed))
        for c, names in enumerate(listed.values()):
            for i, name in enumerate(names):
                save(base / "images" / f"{name}.jpg", 1000 * (part == "test") + 10 * c + i)


def make_gtsrb(root: Path) -> None:
    base = root / "gtsrb"
    for c in range(43):
        for i in range(5):
            save(base / "GTSRB" / "Training" / f"{c:05d}" / f"{i}.ppm", 10 * c + i, width=4, height=4)
    save(base / "GTSRB" / "Final_Test" / "Images" / "00000.ppm", 9999)
    (base / "GT-final_test.csv").write_text("Filename;Width;ClassId\n00000.ppm;16;42\n")


def make_aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    (base / "images").mkdir(parents=True)
    (base / "variants.txt").write_text("707-320\nA380\n")
    number = 0
    for part, count in (("train", 2), ("val", 1), ("test", 1)):
        lines = []
        for name in ("707-320", "A380"):
            for _ in range(count):
                save(base / "images" / f"{number:07d}.jpg", number)
                lines.append(f"{number:07d} {name}")
                number += 1
        (base / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")


def make_country211(root: Path) -> None:
    for p, (part, count) in enumerate((("train", 2), ("valid", 1), ("test", 1))):
        for c, name in enumerate(["AD", "ZW"]):
            for i in range(count):
                save(root / "country211" / part / name / f"{i}.jpg", 100 * p + 10 * c + i)


# dataset: (maker, first and last class, number of training, validation and test images)
SMALL = {
    "fashion_mnist": (make_mnist, "T-shirt/top", "Ankle boot", 48, 12, 20),
    "mnist": (functools.partial(make_mnist, kind="MNIST"), "0 - zero", "9 - nine", 48, 12, 20),
    "cifar10": (make_cifar10, "airplane", "automobile", 16, 4, 4),
    "svhn": (make_svhn, "0", "9", 48, 12, 20),
    "caltech101": (make_caltech101, "ant", "bee", 8, 2, 2),
    "caltech256": (make_caltech256, "001.ak47", "002.flag", 8, 2, 2),
    "flowers102": (make_flowers, "pink primrose", "rose", 4, 2, 2),
    "oxford_pets": (make_pets, "Abyssinian", "English Setter", 8, 2, 4),
    "imagenette": (make_imagenette, "tench", "English springer", 8, 2, 4),
    "fer2013": (make_fer2013, "angry", "neutral", None, None, 7),
    "places365": (make_places365, "/a/airfield", "/b/bridge", None, None, 2),
    "food101": (make_food101, "apple_pie", "waffles", 8, 2, 4),
    "dtd": (make_dtd, "banded", "woven", 4, 2, 2),
    "eurosat": (make_eurosat, "AnnualCrop", "Forest", 8, 2, 2),
    "gtsrb": (make_gtsrb, "00", "42", 172, 43, 1),
    "fgvc_aircraft": (make_aircraft, "707-320", "A380", 4, 2, 2),
    "country211": (make_country211, "AD", "ZW", 4, 2, 2),
}


@pytest.mark.parametrize("name", SMALL)
def test_torchvision_datasets_are_read_and_split(name, home, monkeypatch):
    make, first, last, *counts = SMALL[name]
    make(home / name, *([monkeypatch] if "monkeypatch" in make_parameters(make) else []))
    dataset = data.load(dataset=name, image_size=16)
    assert (dataset.classes[0], dataset.classes[-1]) == (first, last)
    for part, count in zip((dataset.train, dataset.val, dataset.test), counts, strict=True):
        assert count is None or len(part) == count
        assert set(part.labels.tolist()) <= set(range(len(dataset.classes)))
    images = everything(dataset)
    assert len(images) == sum(map(len, (dataset.train, dataset.val, dataset.test))) and not dataset.dropped

    row = sources.TORCHVISION[name]  # each image and label, compared with what torchvision itself gives
    by_label = Counter()
    for arguments in (row.train, row.val, row.test):
        if arguments is not None:
            expected = getattr(torchvision.datasets, row.cls)(str(home / name), **arguments)
            for image, label in expected:
                by_label[
                    hashlib.sha256(decode.pixels(image.convert("RGB"), 16).tobytes()).hexdigest(),
                    int(label),
                ] += 1
    found = Counter(
        (hashlib.sha256(image.numpy().tobytes()).hexdigest(), label)
        for part in (dataset.train, dataset.val, dataset.test)
        for image, label in zip(part.read(torch.arange(len(part))), part.labels.tolist(), strict=True)
    )
    assert found == by_label

    monkeypatch.setattr(sources, "_open", lambda *_, **__: pytest.fail("what is cached is read again"))
    again = data.load(dataset=name, image_size=16)
    assert (again.digest, again.split_digest) == (dataset.digest, dataset.split_digest)


def make_parameters(make) -> tuple[str, ...]:
    return make.__code__.co_varnames[: make.__code__.co_argcount] if hasattr(make, "__code__") else ()


def test_every_row_asks_torchvision_for_what_it_has():
    for name, row in sources.TORCHVISION.items():
        kind = getattr(torchvision.datasets, row.cls)
        known = sources.inspect.signature(kind).parameters
        for arguments in (row.train, row.val, row.test):
            assert set(arguments or ()) <= set(known), name
        assert row.val is None or row.test is not None, name
        assert row.download == ("download" in known and name != "stanford_cars"), name
        assert row.image_size >= 16 and row.files


def test_names_are_those_of_the_contract():
    contract = "fashion_mini fashion_mnist cifar10 cifar100 caltech101 caltech256 flowers102"
    contract += " oxford_pets imagenette fer2013 places365 folder"
    assert set(contract.split()) <= set(data.names())
    assert data.names()[0] == "fashion_mini" and set(data.names()) == set(data.DATASETS)


def test_a_downloaded_set_may_lie_elsewhere_and_a_changed_one_is_noticed(tmp_path, home):
    make_mnist(tmp_path / "there")
    first = data.load(dataset="fashion_mnist", data_dir=str(tmp_path / "there"))
    assert first.image_size == 28 and not (home / "fashion_mnist").exists()
    assert first.train.ids[0].startswith("train/000")
    path = tmp_path / "there" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[16] ^= 255
    path.write_bytes(content)
    assert data.load(dataset="fashion_mnist", data_dir=str(tmp_path / "there")).digest != first.digest


def test_given_validation_images_of_torchvision_stay_what_they_are(home):
    make_dtd(home / "dtd")
    dataset = data.load(dataset="dtd", image_size=16, seed=7)
    assert all(name.startswith("val/dtd/dtd/images/") for name in dataset.val.ids)
    with refused(r"^fold = 1 is refused: .*its own validation images"):
        data.load(dataset="dtd", fold=1)


def test_copies_in_torchvision_sets_are_found_by_their_pixels(home):
    make_mnist(home / "fashion_mnist")
    raw = home / "fashion_mnist" / "FashionMNIST" / "raw"
    train, test = (bytearray((raw / f"{p}-images-idx3-ubyte").read_bytes()) for p in ("train", "t10k"))
    train[16 : 16 + 784] = test[16 : 16 + 784]
    (raw / "train-images-idx3-ubyte").write_bytes(train)
    assert data.load(dataset="fashion_mnist", folds=3).dropped == ("train/00000",)


def test_a_truncated_file_of_torchvision_is_refused_or_skipped(home):
    make_dtd(home / "dtd")
    path = home / "dtd" / "dtd" / "dtd" / "images" / "woven" / "woven_2.jpg"
    path.write_bytes(path.read_bytes()[:-50])
    with refused(r"^dataset = 'dtd' is .*: 1 file is .*train/dtd/dtd/.*/woven_2.jpg \(image file is t"):
        data.load(dataset="dtd")
    dataset = data.load(dataset="dtd", bad_images="skip")
    assert len(dataset.train) == 3 and len(dataset.skipped) == 1


@pytest.fixture
def server(tmp_path):
    """A web server for the files of a folder, on this machine: (its folder, its address)."""
    root = tmp_path / "server"
    root.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def cifar10_online(tmp_path, server, monkeypatch) -> Path:
    """torchvision's CIFAR-10, but from a server here; the archive's path."""
    root, address = server
    make_cifar10(tmp_path / "made", monkeypatch)
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{address}/{archive.name}")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


def test_a_set_is_downloaded_on_first_use_with_progress(cifar10_online, home, capfd):
    dataset = data.load(dataset="cifar10")
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [16, 4, 4]
    error = capfd.readouterr().err
    assert f"downloading cifar10 to {home / 'cifar10'}" in error and "100%" in error
    cifar10_online.unlink()
    assert data.load(dataset="cifar10").digest == dataset.digest
    assert "downloading" not in capfd.readouterr().err


def test_an_archive_put_there_by_hand_is_unpacked(cifar10_online, home):
    (home / "cifar10").mkdir(parents=True)
    cifar10_online.rename(home / "cifar10" / cifar10_online.name)
    assert len(data.load(dataset="cifar10").train) == 16


PUT = r"put cifar-10-batches-py/ or cifar-10-python.tar.gz into .*/cifar10 and start again$"


def test_without_network_the_message_says_what_to_put_where(monkeypatch, home):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with refused(rf"^dataset = 'cifar10' .*could neither be read from .* nor downloaded .*; {PUT}") as caught:
        data.load(dataset="cifar10")
    assert isinstance(caught.value.__cause__, URLError) and "\n" not in str(caught.value)


def test_a_failed_download_leaves_nothing_behind_but_what_was_there(cifar10_online, home):
    (home / "cifar10").mkdir(parents=True)
    (home / "cifar10" / "mine.txt").write_text("kept")
    whole = cifar10_online.read_bytes()
    cifar10_online.write_bytes(whole[:-100])
    with refused(rf"File not found or corrupted.*{PUT}") as caught:
        data.load(dataset="cifar10")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert [path.name for path in (home / "cifar10").rglob("*")] == ["mine.txt"]
    cifar10_online.unlink()
    with refused(PUT) as caught:
        data.load(dataset="cifar10")
    assert isinstance(caught.value.__cause__, HTTPError)
    cifar10_online.write_bytes(whole)
    assert len(data.load(dataset="cifar10").train) == 16


def test_a_download_that_was_killed_is_not_taken_for_whole(home):
    make_caltech101(home / "caltech101")  # as much as had been unpacked
    (home / "caltech101" / sources.UNFINISHED).touch()
    with refused(r"^dataset = 'caltech101' .* its download was cut off; delete what is in .*caltech101"):
        data.load(dataset="caltech101")
    (home / "caltech101" / sources.UNFINISHED).unlink()
    assert len(data.load(dataset="caltech101", image_size=16).train) == 8


@pytest.mark.parametrize("name, files", [("fer2013", "fer2013/fer2013.csv"), ("stanford_cars", "cars_train/")])
def test_what_torchvision_cannot_download_is_said_the_same_way(name, files, home):
    with refused(rf"^dataset = '{name}' is refused: torchvision cannot download it.* put .*{files}.* into ") as caught:
        data.load(dataset=name)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_damaged_files_of_torchvision_are_said_the_same_way(home, monkeypatch):
    make_mnist(home / "mnist", kind="MNIST")
    path = home / "mnist" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:5000])
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with refused(r"^dataset = 'mnist' is refused: it could neither be read from .* put MNIST/raw/"):
        data.load(dataset="mnist")
    assert path.exists()  # what was there is not taken away


def test_gzipped_originals_are_enough(home, monkeypatch):
    make_mnist(home / "fashion_mnist")
    raw = home / "fashion_mnist" / "FashionMNIST" / "raw"
    resources = []
    for path in sorted(raw.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        resources.append((f"{path.name}.gz", hashlib.md5((raw / f"{path.name}.gz").read_bytes()).hexdigest()))
        path.unlink()
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert len(data.load(dataset="fashion_mnist").train) == 48
