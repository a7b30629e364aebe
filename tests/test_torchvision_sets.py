"""The sets of torchvision: its own loading code on small files in the real formats; downloads from a server here."""

from __future__ import annotations

import functools
import hashlib
import http.server
import inspect
import tarfile
import threading
from collections import Counter
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
import small_sets
import torch
import torchvision
from small_sets import NOWHERE, SMALL, everything, md5, refused

from pa_core import data
from pa_core.data import sources

CIFAR10 = torchvision.datasets.CIFAR10
PUT = r"put cifar-10-batches-py/ or cifar-10-python.tar.gz into .*/cifar10 and start again$"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A data home of its own for each test."""
    monkeypatch.setenv("PA_DATA", str(tmp_path / "home"))
    return tmp_path / "home"


def fingerprint(image: torch.Tensor) -> str:
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", SMALL)
def test_sets_are_read_and_split(name, home, monkeypatch):
    make, first, last, *counts = SMALL[name]
    make(home / name, monkeypatch)
    dataset = data.load(dataset=name, image_size=16)
    assert (dataset.classes[0], dataset.classes[-1]) == (first, last)
    three = (dataset.train, dataset.val, dataset.test)
    assert all(count in (None, len(part)) for part, count in zip(three, counts, strict=True))
    assert len(everything(dataset)) == sum(map(len, three)) and not dataset.dropped

    row, given = sources.TORCHVISION[name], Counter()  # each image and label is as torchvision gives it
    for arguments in row["parts"].values():
        for image, label in getattr(torchvision.datasets, row["cls"])(str(home / name), **arguments):
            given[fingerprint(data.read_image(image.convert("RGB"), 16)), int(label)] += 1
    pairs = [pair for part in three for pair in zip(part.read(torch.arange(len(part))), part.labels, strict=True)]
    assert Counter((fingerprint(image), int(label)) for image, label in pairs) == given

    monkeypatch.setattr(sources, "_open", lambda *_, **__: pytest.fail("what is cached is read again"))
    again = data.load(dataset=name, image_size=16)
    assert (again.digest, again.split_digest) == (dataset.digest, dataset.split_digest)


def test_every_row_asks_torchvision_for_what_it_has():
    for name, row in sources.TORCHVISION.items():
        assert {"cls", "image_size", "parts", "files"} <= set(row) <= {"cls", "image_size", "parts", "files", "classes"}
        known, parts = set(inspect.signature(getattr(torchvision.datasets, row["cls"])).parameters), row["parts"]
        assert all(set(arguments) <= known for arguments in parts.values()), name
        assert "test" in parts or "val" not in parts, name
        assert row["image_size"] >= 16 and row["files"] and all(isinstance(c, str) for c in row.get("classes", []))
    assert data.names()[0] == "fashion_mini" and data.names()[-1] == "folder" and len(data.names()) >= 24
    assert set(sources.TORCHVISION) < set(data.names())


def test_a_set_may_lie_elsewhere_and_a_changed_one_is_noticed(tmp_path, home):
    small_sets.mnist(tmp_path / "there")
    first = data.load(dataset="fashion_mnist", data_dir=str(tmp_path / "there"))
    assert first.image_size == 28 and not (home / "fashion_mnist").exists()
    assert first.train.ids[0].startswith("train/000")
    path = tmp_path / "there" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[16] ^= 255
    path.write_bytes(content)
    assert data.load(dataset="fashion_mnist", data_dir=str(tmp_path / "there")).digest != first.digest


def test_copies_are_found_by_their_pixels(home):
    small_sets.mnist(home / "fashion_mnist")
    raw = home / "fashion_mnist" / "FashionMNIST" / "raw"
    train, test = (bytearray((raw / f"{p}-images-idx3-ubyte").read_bytes()) for p in ("train", "t10k"))
    train[16 : 16 + 784] = test[16 : 16 + 784]
    (raw / "train-images-idx3-ubyte").write_bytes(train)
    assert data.load(dataset="fashion_mnist", folds=3).dropped == ("train/00000",)


def test_a_truncated_file_is_refused_or_skipped(home):
    small_sets.dtd(home / "dtd")
    path = home / "dtd" / "dtd" / "dtd" / "images" / "woven" / "woven_2.jpg"
    path.write_bytes(path.read_bytes()[:-50])
    with refused(
        r"^invalid dataset='dtd': must hold no broken image .* train/dtd/dtd/.*/woven_2.jpg \(image file is t"
    ):
        data.load(dataset="dtd")
    dataset = data.load(dataset="dtd", bad_images="skip")
    assert len(dataset.train) == 3 and len(dataset.skipped) == 1


@pytest.fixture
def cifar10_online(tmp_path, monkeypatch):
    """torchvision's CIFAR-10, but from a web server here; the archive's path."""
    root = tmp_path / "server"
    root.mkdir()
    small_sets.cifar10(tmp_path / "made", monkeypatch)
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{running.server_port}/{archive.name}")
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
        yield archive
        running.shutdown()


def test_a_set_is_downloaded_on_first_use_with_progress(cifar10_online, home, capfd):
    dataset = data.load(dataset="cifar10")
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [16, 4, 4]
    said = capfd.readouterr()
    assert f"downloading cifar10 to {home / 'cifar10'}" in said.out and "100%" in said.err
    cifar10_online.unlink()
    assert data.load(dataset="cifar10").digest == dataset.digest
    assert "downloading" not in capfd.readouterr().out


def test_an_archive_put_there_by_hand_is_unpacked(cifar10_online, home):
    (home / "cifar10").mkdir(parents=True)
    cifar10_online.rename(home / "cifar10" / cifar10_online.name)
    assert len(data.load(dataset="cifar10").train) == 16


def test_without_network_the_message_says_what_to_put_where(monkeypatch, home):
    monkeypatch.setattr(CIFAR10, "url", f"{NOWHERE}cifar-10-python.tar.gz")
    with refused(rf"^invalid dataset='cifar10': must be in .* and neither was possible .*; {PUT}") as caught:
        data.load(dataset="cifar10")
    assert isinstance(caught.value.__cause__, URLError) and "\n" not in str(caught.value)


def test_a_failed_download_is_not_taken_for_a_set_and_is_tried_again(cifar10_online, home):
    whole = cifar10_online.read_bytes()
    cifar10_online.write_bytes(whole[:-100])
    with refused(rf"File not found or corrupted.*{PUT}"):
        data.load(dataset="cifar10")
    assert [path.name for path in (home / "cifar10").iterdir()] == [".download"]
    cifar10_online.unlink()
    with refused(PUT) as caught:
        data.load(dataset="cifar10")
    assert isinstance(caught.value.__cause__, HTTPError)
    cifar10_online.write_bytes(whole)
    assert len(data.load(dataset="cifar10").train) == 16


def test_a_download_that_was_killed_is_not_taken_for_whole(home, monkeypatch):
    half = home / "caltech101" / ".download"
    small_sets.caltech101(half)  # as much as had been unpacked

    def download(self):
        assert not list(half.rglob("*.jpg"))
        small_sets.caltech101(half)
        small_sets.save(half / "caltech101" / "101_ObjectCategories" / "bee" / "image_0007.jpg", 77)

    monkeypatch.setattr(torchvision.datasets.Caltech101, "download", download)
    dataset = data.load(dataset="caltech101", image_size=16)
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 13 and not half.exists()


@pytest.mark.parametrize("name, files", [("fer2013", "fer2013/fer2013.csv"), ("stanford_cars", "cars_train/")])
def test_what_torchvision_cannot_download_is_said_the_same_way(name, files, home):
    with refused(rf"^invalid dataset='{name}': must be in .* neither was possible .* put .*{files}.* into ") as caught:
        data.load(dataset=name)
    assert isinstance(caught.value.__cause__, RuntimeError | ValueError)


def test_damaged_files_are_said_the_same_way(home, monkeypatch):
    small_sets.mnist(home / "mnist", kind="MNIST")
    path = home / "mnist" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:5000])
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [NOWHERE])
    with refused(r"^invalid dataset='mnist': must be in .* neither was possible .* put MNIST/raw/"):
        data.load(dataset="mnist")
    assert path.exists()  # what was there is not taken away
