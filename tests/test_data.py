"""Data: folders, splits, parts, the image cache; with real files and real processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import draw_fashion_mini
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import StratifiedKFold, train_test_split
from small_sets import encoded, everything, noise, refused

from pa_core import data, files
from pa_core.data import decode, sources, splits

ROOT = Path(__file__).resolve().parents[1]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
HALF_PNG = encoded(noise(0), "PNG")[:-12]
SIX = {"a": 6, "b": 6}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A data home of its own for each test."""
    monkeypatch.setenv("PA_DATA", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def decodes(monkeypatch) -> list:
    """What was read and decoded so far."""
    seen, original = [], decode.decode
    monkeypatch.setattr(decode, "decode", lambda image, size: seen.append(image) or original(image, size))
    return seen


def make_folder(root: Path, counts: dict[str, int], *, suffix: str = "png", start: int = 0, **size: int) -> Path:
    """Class folders of noise images, no two alike; ``counts`` by folder, such as {"train/cat": 5}."""
    number = start
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise(number, **size).save(root / name / f"{i:03d}.{suffix}")
            number += 1
    return root


def load(root: Path, **options) -> data.Dataset:
    return data.load(dataset="folder", data_dir=str(root), **options)


def three(dataset: data.Dataset) -> tuple[data.Part, data.Part, data.Part]:
    return dataset.train, dataset.val, dataset.test


def sizes(dataset: data.Dataset) -> list[int]:
    return [len(part) for part in three(dataset)]


def ids(dataset: data.Dataset) -> set[str]:
    return {name for part in three(dataset) for name in part.ids}


def per_class(names) -> Counter:
    return Counter(name.split("/")[-2][0] for name in names)


# fashion_mini


def test_fashion_mini_is_stratified_and_reads_what_is_in_the_file(home):
    dataset = data.load(dataset="fashion_mini")
    assert (dataset.name, dataset.image_size, len(dataset.classes)) == ("fashion_mini", 28, 10)
    assert dataset.classes[9] == "Ankle boot" and not dataset.dropped and not dataset.skipped
    for part, each in zip(three(dataset), (320, 80, 200), strict=True):
        assert part.labels.dtype == torch.int64 and torch.bincount(part.labels).tolist() == [each] * 10
        assert len(part) == len(part.ids) == len(set(part.ids)) == each * 10
    arrays, images = dict(np.load(sources.FASHION_MINI)), {}
    for part in ("train", "test"):
        rows = zip(arrays[f"{part}_rows"], arrays[f"{part}_images"], strict=True)
        images |= {f"{part}/{row:05d}": image for row, image in rows}
    for name, image in everything(dataset).items():
        assert torch.equal(image, torch.from_numpy(images[name]).expand(3, 28, 28))
    assert not home.exists()  # no cache is needed


def test_fashion_mini_and_its_split_stay_what_they_are():
    # A change here changes every result: the digests of run identities, and the images behind each number.
    dataset = data.load(dataset="fashion_mini")
    assert dataset.digest == "a7eca42584423a0b5c338c772990dba83d0eede4d6be204e92922471c8fa8ff8"
    assert dataset.split_digest == "e8f83804dd7343b590fd62da14da99080b34694d8fcd4c20753f122b052d7a90"
    assert data.identify(dataset="fashion_mini") == (dataset.digest, 28)


def test_fashion_mini_is_the_file_that_its_readme_describes():
    folder, content = sources.FASHION_MINI.parent, sources.FASHION_MINI.read_bytes()
    assert hashlib.sha256(content).hexdigest() in (folder / "README.md").read_text() and len(content) < 3_000_000
    assert "Zalando SE" in (folder / "LICENSE").read_text()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_fashion_mini_can_be_drawn_again(tmp_path):
    draw_fashion_mini.main(str(DEBIAN), str(tmp_path))
    with np.load(tmp_path / "fashion_mini.npz") as again:
        arrays = dict(np.load(sources.FASHION_MINI))
        assert sorted(again) == sorted(arrays)
        for name, array in arrays.items():
            assert again[name].dtype == array.dtype and again[name].tobytes() == array.tobytes()


def test_fashion_mini_at_another_size_is_resized_and_cached(home, decodes):
    for _ in range(2):
        dataset = data.load(dataset="fashion_mini", image_size=56)
    original = Image.fromarray(np.load(sources.FASHION_MINI)["test_images"][3])
    expected = np.array(original.resize((56, 56), Image.Resampling.BILINEAR))
    assert torch.equal(dataset.test.read(torch.tensor([3]))[0, 0], torch.from_numpy(expected))
    assert dataset.digest == data.load(dataset="fashion_mini").digest
    assert len(decodes) == 6000 and len(list(home.glob("cache/*.npy"))) == 1


# Folders: what is a class, what is an image


def test_a_folder_is_loaded_sorted_with_relative_ids(tmp_path):
    root = make_folder(tmp_path / "d", {"b": 10, "a": 10, "c/deep/er": 10})
    dataset = load(root, image_size=16)
    assert dataset.classes == ("a", "b", "c")
    images = everything(dataset)
    assert set(images) == {path.relative_to(root).as_posix() for path in root.rglob("*.png")}
    for part in three(dataset):
        assert list(part.ids) == sorted(part.ids)
        assert [dataset.classes[i] for i in part.labels] == [name[0] for name in part.ids]
    for name, image in images.items():
        assert np.array_equal(image.numpy(), np.asarray(Image.open(root / name)).transpose(2, 0, 1))


@pytest.mark.parametrize(
    "counts, expected",
    [
        ({"train/a": 5, "train/b": 10, "test/a": 1}, [12, 3, 1]),
        ({"train/a": 10, "train/b": 10}, [12, 4, 4]),
        ({"bus": 6, "train": 6, "tram": 6}, [12, 3, 3]),  # train is a class among others
        ({"train/a": 9, "train/b": 9, "val/a": 2}, [14, 2, 4]),
        *(
            ({"train/a": 3, "train/b": 2, f"{val}/a": 2, f"{val}/b": 1, "test/a": 1, "test/b": 4}, [5, 3, 5])
            for val in ("val", "valid", "validation", "Val")
        ),
    ],
)
def test_folders_named_for_parts_are_the_parts_and_what_lacks_is_split_off(tmp_path, counts, expected):
    dataset = load(make_folder(tmp_path / "d", counts))
    assert dataset.classes == (("bus", "train", "tram") if "bus" in counts else ("a", "b"))
    assert sizes(dataset) == expected
    if any(name.lower().startswith("val") for name in counts):
        assert all(name.lower().startswith("val") for name in dataset.val.ids)


@pytest.mark.parametrize(
    "counts, message",
    [
        ({"train/a": 9, "train/b": 9, "test/a": 2, "test/c": 2}, r"test/ has classes that train/ lacks: c$"),
        ({"train/a": 9, "train/b": 9, "val/x": 2, "val/y": 2}, r"val/ has classes that train/ lacks: x, y$"),
        (
            {"train/a": 9, "train/b": 9, "test/a": 2, "extra/a": 2},
            r"nothing else, and it holds extra/, test/, train/$",
        ),
        ({"train/a": 9, "train/b": 9, "val/a": 2, "valid/a": 2}, r"one val/, .*, and it holds train/, val/, valid/$"),
        ({"train/a": 9, "train/b": 9, "test": 0}, r"test/ holds no image"),
        ({"a": 9}, r"a folder with a subfolder of images .*; it holds only one class \(a\)"),
        ({"train/a": 9, "test/a": 9}, r"it holds only one class \(a\)"),
        ({".": 9}, r"it holds no class"),
        ({"train": 9}, r"it holds no class"),
        ({"a": 9, "b": 0}, r"1 of 2 have less: b has 0$"),
    ],
)
def test_layouts_that_mean_nothing_are_refused(tmp_path, counts, message):
    with refused(f"^invalid data_dir='{tmp_path / 'd'}': must .*{message}"):
        load(make_folder(tmp_path / "d", counts))


def test_folds_have_no_meaning_where_validation_images_are_given(tmp_path):
    root = make_folder(tmp_path / "d", {f"{part}/{name}": 3 for part in ("train", "val", "test") for name in "ab"})
    load(root, folds=5, fold=0)
    for name, value in (("folds", 4), ("fold", 1)):
        with refused(rf"^invalid {name}={value}: must be {5 if name == 'folds' else 0}, .* its own validation images"):
            load(root, **{name: value})


def test_what_is_no_image_by_its_name_or_hidden_is_left_out(tmp_path):
    root = make_folder(tmp_path / "d", SIX)
    noise(500).save(root / "a" / "loud.PNG")
    before = load(root)
    assert "a/loud.PNG" in ids(before)
    left = "a/.DS_Store a/Thumbs.db b/desktop.ini a/.ipynb_checkpoints/000.png .git/config a/._000.png a/notes.txt"
    for name in f"{left} b/labels.csv b/model.h5 __MACOSX/a/000.png README.md labels.csv .hidden.png".split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("no image")
    dataset = load(root)
    assert dataset.digest == before.digest and not dataset.skipped


def spoil(root: Path) -> dict[str, str]:
    """Files that cannot be used, by id, with what is said about them."""
    (root / "a" / "empty.png").touch()
    (root / "a" / "text.jpg").write_text("no image")
    half = encoded(noise(99, width=64, height=64), "JPEG")
    (root / "b" / "half.jpg").write_bytes(half[: len(half) // 2])
    (root / "b" / "half.png").write_bytes(HALF_PNG)
    (root / "b" / "float.tiff").write_bytes(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    (root / "b" / "lost.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "b" / "pipe.png")
    noise(98).save(root / "outside.png")
    return {
        "a/empty.png": "no image, or of an unknown format",
        "a/text.jpg": "no image, or of an unknown format",
        "b/float.tiff": "32-bit pixels (mode F) have no agreed range",
        "b/half.jpg": "image file is truncated",
        "b/half.png": "image file is truncated",
        "b/lost.png": "there is no such file",
        "b/pipe.png": "there is no such file",
        "outside.png": "lies in no class folder",
    }


def test_broken_images_are_refused_by_name_or_skipped_and_listed(tmp_path, decodes):
    root = make_folder(tmp_path / "d", {"a": 8, "b": 8})
    good, reasons = load(root), spoil(root)
    named = (
        r"no broken image \(found 8; the first: a/empty.png \(no image, .* b/half.png \(.*; .* set bad_images to skip$"
    )
    for _ in range(2):  # the second time from the cache
        with refused(named):
            load(root)
    skipped = load(root, bad_images="skip")
    assert len(decodes) == 16 + 24
    assert [line.split(": ")[0] for line in skipped.skipped] == list(reasons)
    for line, reason in zip(skipped.skipped, reasons.values(), strict=True):
        assert line.split(": ", 1)[1].startswith(reason)
    assert (skipped.digest, skipped.split_digest) == (good.digest, good.split_digest)
    images = everything(good)
    assert all(torch.equal(image, images[name]) for name, image in everything(skipped).items())


def test_a_file_that_could_not_be_read_just_now_is_read_again(tmp_path, monkeypatch):
    root, original = make_folder(tmp_path / "d", {"a": 7, "b": 7}), Path.read_bytes

    def denied(path):
        if str(path).endswith("a/000.png"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert load(root, bad_images="skip").skipped == ("a/000.png: [Errno 13] Permission denied",)
    monkeypatch.setattr(Path, "read_bytes", original)
    assert "a/000.png" in ids(load(root))


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d", SIX)
    original = os.listdir

    def denied(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "listdir", denied)
    with refused(rf"^invalid data_dir='{root}': must be readable, and {root}/b is not$"):
        load(root)


def test_what_is_left_once_files_are_skipped_must_suffice(tmp_path):
    root = make_folder(tmp_path / "d", SIX)
    (root / "b" / "000.png").write_bytes(HALF_PNG)
    with refused(r"at least 6 different training images of each class with folds = 5, and 1 of 2 have less: b has 5$"):
        load(root, bad_images="skip")
    root = make_folder(tmp_path / "e", {"train/a": 9, "train/b": 9, "test": 2})
    with refused(r"test/000.png \(lies in no class folder\)"):
        load(root)
    with refused(r"must have an image that can be used in its test part"):
        load(root, bad_images="skip")


def test_links_are_followed_but_not_in_circles(tmp_path):
    elsewhere = make_folder(tmp_path / "e", {"b": 6, "more": 2}, start=100)
    root = make_folder(tmp_path / "d", {"a": 6})
    links = {"b": elsewhere / "b", "a/linked": elsewhere / "more", "a/circle": root / "a", "a/top": root}
    for name, target in (links | {"a/above": tmp_path, "a/itself": root / "a" / "itself"}).items():
        (root / name).symlink_to(target)
    expected = {f"{c}/{i:03d}.png" for c in "ab" for i in range(6)}
    assert ids(load(root)) == expected | {"a/linked/000.png", "a/linked/001.png"}


@pytest.mark.parametrize(
    "sides, size",
    [((20, 30), 32), ((63, 900), 32), ((64, 64), 64), ((127, 128), 96), ((500, 300), 224)],
)
def test_the_default_size_fits_the_median_shorter_side(tmp_path, sides, size):
    root = make_folder(tmp_path / "d", SIX, width=sides[0], height=sides[1])
    for _ in range(2):  # the second time from the cache
        assert load(root).image_size == size == data.identify(dataset="folder", data_dir=str(root))[1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset": "fashion_mni"}, r"dataset='fashion_mni': must be one of .*did you mean 'fashion_mini'"),
        ({"dataset": "folder"}, r"data_dir=None: must be the folder that holds the class folders"),
        ({"dataset": "folder", "data_dir": "no/where"}, r"data_dir='no/where': must be a folder that exists"),
        ({"dataset": "folder", "data_dir": __file__}, r"data_dir='.*test_data.py': must be a folder that exists"),
        ({"dataset": "cifar10", "data_dir": "no/where"}, r"data_dir='no/where': must be a folder that exists"),
        ({"data_dir": str(ROOT)}, r"data_dir='.*': must be none, .* comes with the package; set dataset to folder"),
        ({"folds": 401}, r"dataset='fashion_mini': must have at least 401 different"),
    ],
)
def test_what_cannot_be_found_is_refused_in_a_sentence(options, message):
    with refused(f"^invalid {message}"):
        data.load(**{"dataset": "fashion_mini", **options})


# A folder is never written to


def state(root: Path) -> list[tuple]:
    found = [(path, path.lstat()) for path in sorted([root, *root.rglob("*")])]
    return [
        (str(path), status.st_mtime_ns, status.st_ctime_ns, status.st_mode, path.is_file() and path.read_bytes())
        for path, status in found
    ]


def test_a_read_only_folder_works_and_is_left_as_it_was(tmp_path, home):
    root = make_folder(tmp_path / "d", {"a": 8, "b": 8})
    folders = (root / "a", root / "b", root)
    for path in folders:
        path.chmod(0o555)
    before = state(root)
    assert sizes(load(root)) == [9, 3, 4]
    assert list(home.glob("cache/*.npy")) and state(root) == before  # root may write there, and so it shows
    for path in folders:
        path.chmod(0o755)


def test_a_data_home_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d", SIX)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PA_DATA", str(tmp_path / "file" / "home"))
    with refused(r"^invalid PA_DATA='.*/file/home': must be a writable folder \(Not a directory\)$"):
        load(root)
    data.load(dataset="fashion_mini")  # needs none


def test_what_is_cached_can_be_read_from_a_data_home_that_cannot_be_written(tmp_path, home):
    root = make_folder(tmp_path / "d", SIX)
    first, before = load(root), state(home)
    assert load(root).digest == first.digest == data.identify(dataset="folder", data_dir=str(root))[0]
    assert state(home) == before


def test_a_full_disk_is_said(tmp_path, home):
    root = make_folder(tmp_path / "d", SIX)
    load(root, image_size=16)
    (lock,) = home.rglob("*.lock")
    lock.with_suffix(".part").symlink_to("/dev/full")
    with refused(r"^invalid PA_DATA='.*': must be a writable folder \(No space left on device\)"):
        load(root)
    assert len(list(home.rglob("*.npy"))) == 1 and not list(home.rglob("*.part"))


# Splits


def test_the_split_is_the_same_at_every_call_and_wherever_the_folder_lies(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d", {"a": 20, "b": 30})
    first = load(root)
    moved = shutil.copytree(root, tmp_path / "moved")
    monkeypatch.setenv("PA_DATA", str(tmp_path / "other"))
    second = load(moved)
    assert (second.digest, second.split_digest) == (first.digest, first.split_digest)
    assert [part.ids for part in three(second)] == [part.ids for part in three(first)]


def test_the_test_part_depends_on_nothing_but_the_images(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 20, "b": 31})
    first = load(root)
    assert per_class(first.test.ids) == {"a": 4, "b": 6}
    for options in ({"seed": 1}, {"fold": 3}, {"folds": 3}, {"train_fraction": 0.3}, {"seed": 2**63 - 1}):
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
        assert per_class(fold.val.ids) == {"a": 4, "b": 6}
        assert set(fold.train.ids) == rest - set(fold.val.ids)
    assert set(load(root, folds=4, seed=1).val.ids) != set(folds[0].val.ids)


def test_fractions_are_nested_stratified_and_leave_the_other_parts_alone(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 50, "b": 25})
    shares = [load(root, train_fraction=share, seed=3, fold=2) for share in (0.01, 0.1, 0.5, 0.99, 1.0)]
    counts = [per_class(dataset.train.ids) for dataset in shares]
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
        for part in three(dataset):
            counts = Counter(name.replace("copy", "") for name in part.ids)
            assert all(count == (2 if name.startswith("a") else 1) for name, count in counts.items())
        assert dataset.dropped == () and per_class(dataset.test.ids) == {"a": 8, "b": 4}  # each with its copy


def test_a_copy_of_a_test_or_validation_image_is_dropped_where_the_parts_are_given(tmp_path):
    root = make_folder(tmp_path / "d", {"train/a": 7, "train/b": 6, "test/a": 2, "test/b": 2})
    shutil.copy(root / "test" / "b" / "001.png", root / "train" / "a" / "000.png")  # even with another label
    dataset = load(root)
    assert dataset.dropped == ("train/a/000.png",)
    assert "train/a/000.png" not in ids(dataset) and len(dataset.test) == 4
    counts = {f"{part}/{name}": 3 for part in ("train", "val", "test") for name in "ab"}
    root = make_folder(tmp_path / "e", counts)
    shutil.copy(root / "val" / "a" / "000.png", root / "train" / "a" / "000.png")
    shutil.copy(root / "test" / "a" / "000.png", root / "val" / "a" / "001.png")
    dataset = load(root)
    assert dataset.dropped == ("train/a/000.png", "val/a/001.png") and sizes(dataset) == [5, 5, 6]


@pytest.mark.parametrize("folds, needed", [(2, 3), (3, 4), (5, 6), (10, 12)])
def test_a_class_needs_an_image_in_every_fold_after_the_test_images(tmp_path, folds, needed):
    root = make_folder(tmp_path / "d", {"a": needed, "b": needed - 1, "c": 1, "d": needed + 4})
    shutil.copy(root / "b" / "000.png", root / "b" / "copy.png")  # makes the class no larger
    found = rf"at least {needed} different .*folds = {folds}, and 2 of 4 have less: b has {needed - 1}, c has 1$"
    with refused(found):
        load(root, folds=folds)
    shutil.rmtree(root / "b")
    shutil.rmtree(root / "c")
    for fold in range(folds):
        for part in three(load(root, folds=folds, fold=fold)):
            assert set(part.labels.tolist()) == {0, 1}


def test_a_fifth_is_rounded_as_computed_by_hand():
    fifths = [len(splits.drawn(np.arange(n), np.zeros(n), 0.2, 0)) for n in (1, 2, 5, 7, 8, 12, 13, 100)]
    assert fifths == [1, 1, 1, 1, 2, 2, 3, 20]


@pytest.mark.parametrize("counts", [[37], [50, 50], [37, 61, 200], [40, 300, 41, 38], [53] * 20, [499, *[37] * 10]])
@pytest.mark.parametrize("folds", [2, 3, 5, 10, 37])
def test_folds_are_those_of_scikit_learn(counts, folds):
    for state in (0, 1, 1234, 2**32 - 1):
        labels = 3 * np.repeat(np.arange(len(counts)), counts)
        for y in (labels, labels[::-1], np.random.RandomState(state).permutation(labels)):
            found = splits.stratified_folds(y, folds, state)
            kfold = StratifiedKFold(folds, shuffle=True, random_state=state)
            for fold, (_, rows) in enumerate(kfold.split(y, y)):
                assert np.array_equal(np.flatnonzero(found == fold), rows)


def test_a_split_needs_no_scikit_learn():
    code = "import sys; from pa_core import data; data.load(dataset='fashion_mini'); print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == "False\n", done.stderr


def test_test_images_are_those_that_scikit_learn_splits_off():
    random = np.random.default_rng(0)
    for n in (2, 3, 7, 8, 12, 13, 100, 999):
        rows = random.permutation(5000)[:n]
        expected = train_test_split(rows, test_size=max(1, (2 * n + 5) // 10), random_state=0)[1]
        assert np.array_equal(splits.drawn(rows, np.zeros(5000), 0.2, 0), np.sort(expected))


def test_the_digest_is_of_content_and_names_and_of_nothing_else(tmp_path):
    root = make_folder(tmp_path / "d", SIX)
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


class Slow(torch.Tensor):
    """Positions whose number takes a while to find out, so that threads meet there."""

    def __len__(self):
        time.sleep(0.05)
        return super().__len__()


def test_no_read_is_lost_where_threads_read():
    part = data.load(dataset="fashion_mini").test
    threads = [threading.Thread(target=part.read, args=[torch.arange(3).as_subclass(Slow)]) for _ in range(4)]
    for do in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            do(thread)
    assert part.reads == 12


def test_a_part_counts_its_reads_and_gives_copies_in_the_order_asked(tmp_path):
    dataset = load(make_folder(tmp_path / "d", {"a": 10, "b": 10}))
    part = dataset.train
    assert part.shape == (3, 32, 32) and part.resident is None and [p.reads for p in three(dataset)] == [0, 0, 0]
    images = part.read(torch.tensor([3, 0, 3]))
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 32, 32)
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    images.zero_()
    assert part.read(torch.tensor([0])).any()
    assert [p.reads for p in three(dataset)] == [4, 0, 0]
    assert part.read(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 32, 32)
    assert not part.store.flags.writeable
    with pytest.raises(AttributeError):
        part.name = "other"


def test_a_part_on_a_device_gives_the_same_images_and_counts_on(tmp_path, monkeypatch):
    part = load(make_folder(tmp_path / "d", {"a": 10, "b": 10})).train
    order = torch.randperm(len(part))
    moved, expected = part.on(torch.device("cpu")), part.read(order)
    assert moved.resident == torch.device("cpu") and moved.reads == 2 * len(part)
    assert torch.equal(moved.read(order), expected) and moved.reads == part.reads == 3 * len(part)
    needed = 2 * len(part) * 3 * 32 * 32
    for free, fits in ((2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: type("Memory", (), {"available": free}))
        assert data.fits([part, moved], torch.device("cpu")) is fits


# The cache


def test_a_changed_file_is_noticed_even_with_the_same_size_and_time(tmp_path, decodes):
    root = make_folder(tmp_path / "d", {"a": 8, "b": 8}, suffix="bmp", width=32, height=32)
    first = load(root)
    assert load(root).digest == first.digest and len(decodes) == 16  # each once
    path, replaced = root / "a" / "003.bmp", noise(777, width=32, height=32)
    before = path.stat()
    path.write_bytes(encoded(replaced, "BMP"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = load(root)
    assert second.digest != first.digest
    assert np.array_equal(everything(second)["a/003.bmp"].numpy(), np.asarray(replaced).transpose(2, 0, 1))
    path.unlink()
    noise(5000).save(root / "b" / "new.bmp")
    third = ids(load(root))
    assert "a/003.bmp" not in third and "b/new.bmp" in third


def test_images_are_found_by_content(tmp_path, home):
    root = make_folder(tmp_path / "d", SIX)
    first = everything(load(root))
    again = everything(load(shutil.copytree(root, tmp_path / "copy")))
    assert all(torch.equal(image, first[name]) for name, image in again.items())
    assert len(list(home.glob("cache/*.npy"))) == 1 and not list(home.rglob("*.part"))
    load(root, image_size=16)  # another size is another cache
    assert len(list(home.glob("cache/*.npy"))) == 2


INDEXES = {"index": "{", "no keys": "{}", "a list": "[]", "null": "null"}


@pytest.mark.parametrize("damage", ["short", "empty", "header", "gone", "rows", "version", *INDEXES])
def test_a_cache_that_does_not_fit_is_built_again(tmp_path, home, damage, monkeypatch):
    root = make_folder(tmp_path / "d", SIX)
    first = everything(load(root))
    (path,), (index,) = home.glob("cache/*.npy"), home.glob("cache/*.json")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage in INDEXES:
        index.write_text(INDEXES[damage])
    elif damage == "rows":
        kept = json.loads(index.read_text())
        index.write_text(json.dumps(kept | {"entries": kept["entries"][:-1]}))
    elif damage == "version":
        path.write_bytes(bytes(len(content)))
        monkeypatch.setattr(decode, "VERSION", -1)
    else:
        path.write_bytes({"short": content[:-1], "empty": b"", "header": b"x" + content[1:]}[damage])
    again = everything(load(root))
    assert all(torch.equal(again[name], image) for name, image in first.items())
    assert damage == "version" or path.read_bytes() == content


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_build_and_two_builders_at_once(tmp_path, home, monkeypatch):
    """One that is killed leaves nothing that harms; of two that come next, one builds and the other waits for it."""
    root, content = tmp_path / "d", encoded(noise(0, width=100, height=100).resize((400, 400)), "JPEG")
    for i in range(1000):  # they take a while to decode, and differ in their last bytes
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[i % 2] / f"{i:04d}.jpg").write_bytes(content + b"%d" % i)
    original = decode._build

    def watched(*arguments):
        with open(tmp_path / "builds", "a") as file:
            file.write("build\n")
        time.sleep(0.5)
        return original(*arguments)

    def build():
        images = b"".join(image.numpy().tobytes() for image in everything(load(root, image_size=32)).values())
        (tmp_path / f"seen {os.getpid()}").write_text(hashlib.sha256(images).hexdigest())

    monkeypatch.setattr(decode, "_build", watched)
    deadline = time.monotonic() + 60
    victim = fork(build)
    while not any(part.stat().st_size > 100_000 for part in home.rglob("*.part")):  # pixels are being written
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(victim, signal.SIGKILL)
    assert ended(victim) == -signal.SIGKILL
    assert not list(home.rglob("*.npy")) and list(home.rglob("*.part"))  # it was in the middle
    both = [fork(build), fork(build)]
    assert [ended(child) for child in both] == [0, 0]
    first, second = ((tmp_path / f"seen {child}").read_text() for child in both)
    assert first == second
    assert (tmp_path / "builds").read_text().count("build") == 2  # the victim's and one more
    assert not list(home.rglob("*.part"))
    test = load(root, image_size=32).test
    assert torch.equal(test.read(torch.tensor([1]))[0], data.read_image(root / test.ids[1], 32))


def test_who_waits_for_another_builder_says_so_and_takes_what_it_made(tmp_path, home, monkeypatch, capsys):
    root = make_folder(tmp_path / "d", SIX)
    first = load(root)
    (path,), (lock,) = home.glob("cache/*.npy"), home.glob("cache/*.lock")
    path.rename(tmp_path / "made by another.npy")
    monkeypatch.setattr(decode, "_build", lambda *_: pytest.fail("built again"))
    digests = []
    with files.lock(lock, "never said"):
        waiting = threading.Thread(target=lambda: digests.append(load(root).digest))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and not digests
        (tmp_path / "made by another.npy").rename(path)
    waiting.join(30)
    assert digests == [first.digest]
    assert capsys.readouterr().out == "waiting for another process that decodes folder\n"
