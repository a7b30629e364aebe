"""Damaged files and full disks: named, the run made good again, and never a wrong result."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import same

from pa_core import experiment
from pa_core.errors import RunError
from pa_core.files import home, replacing
from pa_core.params import Experiment
from pa_core.runs import Run, load_checkpoint, save_checkpoint

TINY = {"train_fraction": 0.02, "folds": 50, "device": "cpu", "batch_size": 16, "schedule": "1,p,2"}


class Stop(Exception):
    """Ends a run at a moment, as a crash would."""


def train(folder: Path, *, stop: str = "") -> tuple[Path, list[str]]:
    """Run, or continue; ``stop`` is the beginning of the log line to end at."""
    lines: list[str] = []

    def log(text: str) -> None:
        lines.append(text)
        if stop and text.startswith(stop):
            raise Stop

    with suppress(Stop):
        experiment.run(Experiment(**TINY, runs_dir=str(folder)), log=log)
    (path,) = (file.parent for file in folder.glob("*/manifest.json"))
    return path, lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("undisturbed"))[0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A runs folder with a run that ended when it had trained two of its three epochs, one of them saved."""
    folder = tmp_path_factory.mktemp("stopped")
    train(folder, stop="epoch 2")
    return folder


@pytest.fixture
def half(stopped, tmp_path) -> Path:
    """A copy of it; the run's path."""
    shutil.copytree(stopped, tmp_path / "runs")
    (path,) = (file.parent for file in (tmp_path / "runs").glob("*/manifest.json"))
    return path


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def garbage(file: Path) -> None:
    file.write_bytes(b"garbage\n" * 1000)


def one_bit(file: Path) -> None:
    """Of a weight: a file that torch.load takes without a word."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = [cut, empty, garbage, one_bit]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_run_starts_over(half, undisturbed, damage):
    damage(half / "checkpoint.pt")
    _, lines = train(half.parent)
    assert lines[0].startswith(f"{half / 'checkpoint.pt'} is damaged (") and lines[0].endswith("the run starts over")
    epochs = [line[:9] for line in lines if line.startswith("epoch")]
    assert "\n" not in lines[0] and epochs == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    same(half, undisturbed)


def test_a_whole_checkpoint_is_continued(half, undisturbed):
    state = load_checkpoint(half)
    assert (state["state"]["epoch"], len(state["records"]), [row["epoch"] for row in state["rows"]]) == (1, 1, [1])
    _, lines = train(half.parent)
    assert lines[0].startswith("continuing") and lines[0].endswith("after epoch 1")
    same(half, undisturbed)


def test_no_flipped_bit_of_a_checkpoint_goes_unseen(tmp_path):
    state = {"weights": torch.arange(500.0), "epoch": 3, "metrics": [{"epoch": 1, "loss": 0.5}]}
    save_checkpoint(tmp_path, state)
    file = tmp_path / "checkpoint.pt"
    good, named = file.read_bytes(), 0
    for position in range(0, len(good), 7):
        file.write_bytes(good[:position] + bytes([good[position] ^ 16]) + good[position + 1 :])
        lines: list[str] = []
        loaded = load_checkpoint(tmp_path, lines.append)
        if loaded is None:
            named += 1
            assert len(lines) == 1 and "checkpoint.pt is damaged" in lines[0] and "\n" not in lines[0]
            assert not file.exists()
        else:  # the flipped bit was of the padding
            assert torch.equal(loaded["weights"], state["weights"]) and loaded["metrics"] == state["metrics"]
    assert named > len(good) / 7 / 2


def test_damaged_metrics_are_no_result_and_are_put_back_from_the_checkpoint(half, undisturbed):
    (half / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl is damaged \("):
        Run(half).metrics  # noqa: B018
    train(half.parent)
    same(half, undisturbed)


@pytest.mark.parametrize("damage", [cut, empty, garbage])
def test_a_damaged_manifest_is_named(half, damage):
    damage(half / "manifest.json")
    with pytest.raises(RunError, match=r"manifest.json is damaged") as caught:
        train(half.parent)
    assert str(half) in str(caught.value) and "\n" not in str(caught.value)


# Full disks. The process trains an epoch, then there is no room for more than small files.

FULL = """
import os, resource, sys
from pa_core import experiment
from pa_core.params import Experiment

def log(text):
    print(text, flush=True)
    if text.startswith("epoch 1") and sys.argv[2] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    if text.startswith("epoch 1") and sys.argv[2] == "fill":
        free = os.statvfs(sys.argv[1]).f_bavail * os.statvfs(sys.argv[1]).f_frsize
        with open(sys.argv[1] + "/other", "wb") as file:
            file.write(bytes(max(0, free - 600_000)))

experiment.run(Experiment(**{settings}, runs_dir=sys.argv[1] + "/runs"), log=log)
"""


def full(folder: Path, how: str, start: Callable[[list[str]], list[str]]) -> tuple[Path, subprocess.CompletedProcess]:
    """A run on a disk that is full after its first epoch: its path, and the process that failed."""
    code = folder / "full.py"
    code.write_text(FULL.replace("{settings}", repr(TINY | {"schedule": "3"})))
    environment = os.environ | {"PYTHONPATH": str(home())}
    command = start([sys.executable, str(code), str(folder if how == "limit" else folder / "small"), how])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    (path,) = (file.parent for file in (folder / "runs").glob("*/manifest.json"))
    return path, done


def check_full(path: Path, done: subprocess.CompletedProcess, reason: str) -> None:
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("pa_core.errors.RunError")]
    assert done.returncode == 1
    assert error.endswith(f"checkpoint.pt cannot be written ({reason}); what was there before is intact"), error
    assert Run(path).manifest["status"] == "failed" and "checkpoint.pt cannot be written" in Run(path).manifest["error"]
    assert not list(path.glob("*.part"))


def test_a_checkpoint_that_is_larger_than_allowed(tmp_path):
    path, done = full(tmp_path, "limit", lambda command: command)
    check_full(path, done, "File too large")


def test_a_disk_that_is_full_and_has_room_again(tmp_path):
    """A small tmpfs, in a namespace of the test's own, so that nobody need be root."""
    where = tmp_path / "small"
    where.mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=24m none {where}"
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here; the limit of a file's size stands in for it")
    keep = f"; status=$?; rm -f {where}/other; cp -a {where}/runs {tmp_path}/runs; exit $status"
    path, done = full(tmp_path, "fill", lambda command: [*unshare, f"{mount} && {' '.join(command)}{keep}"])
    check_full(path, done, "No space left on device")
    lines: list[str] = []
    again = experiment.run(Experiment(**TINY | {"schedule": "3"}, runs_dir=str(tmp_path / "runs")), log=lines.append)
    assert again.finished and len(again.metrics) == 3 and again.manifest["error"] is None


def test_an_error_of_its_own_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path, {"x": lambda: None})
    with pytest.raises(RuntimeError, match="^mine$"), replacing(tmp_path / "x"):
        raise RuntimeError("mine")
    assert not list(tmp_path.iterdir()) and resource.getrlimit(resource.RLIMIT_FSIZE)
