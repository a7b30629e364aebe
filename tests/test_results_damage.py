"""Damaged files and full disks: named, healed from the last good state, and never a wrong result."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pa_core import experiment, runs
from pa_core.params import Experiment, home
from pa_core.runs import Run, RunError, load_checkpoint, read_metrics, save_checkpoint

TINY = {"train_fraction": 0.02, "folds": 50, "device": "cpu", "batch_size": 16, "schedule": "1,p,2"}


class Stop(Exception):
    """Ends a run at a moment, as a crash would."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(folder: Path, *, stop: str = "") -> tuple[Path, list[str]]:
    """Run, or continue; ``stop`` is the beginning of the log line to end at."""
    lines: list[str] = []

    def log(text: str) -> None:
        lines.append(text)
        if stop and text.startswith(stop):
            raise Stop

    try:
        experiment.run(Experiment(**TINY, runs_dir=str(folder)), log=log)
    except Stop:
        pass
    (path,) = (file.parent for file in folder.glob("*/manifest.json"))
    return path, lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("undisturbed"))[0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A runs folder with a run that ended after two of its three epochs and its proxy step."""
    folder = tmp_path_factory.mktemp("stopped")
    train(folder, stop="epoch 2")
    return folder


@pytest.fixture
def half(stopped, tmp_path) -> Path:
    """A copy of it; the run's path."""
    shutil.copytree(stopped, tmp_path / "runs")
    (path,) = (file.parent for file in (tmp_path / "runs").glob("*/manifest.json"))
    return path


def timeless(row: dict) -> dict:
    return {k: v for k, v in row.items() if not k.endswith("seconds") and k != "images_per_second"}


def same(path: Path, reference: Path) -> None:
    assert Run(path).finished
    assert timeless(Run(path).summary) == timeless(Run(reference).summary)
    assert [timeless(r) for r in read_metrics(path)] == [timeless(r) for r in read_metrics(reference)]
    for name in ("weights.safetensors", "predictions.csv", "proxies/step_1/images.npy"):
        assert (path / name).read_bytes() == (reference / name).read_bytes(), name
    assert not list(path.glob("checkpoint*")) and not list(path.rglob("*.part"))


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


@pytest.mark.parametrize("damage", [cut, empty, garbage, one_bit])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continued(half, undisturbed, damage):
    damage(half / "checkpoint.pt")
    _, lines = train(half.parent)
    assert f"{half / 'checkpoint.pt'} is damaged" in lines[0] and "left out" in lines[0]
    assert lines[1].startswith("continuing") and lines[1].endswith("after epoch 1")  # and after its proxy step
    same(half, undisturbed)


def test_when_both_are_damaged_it_begins_anew(half, undisturbed):
    one_bit(half / "checkpoint.pt")
    cut(half / "checkpoint.prev.pt")
    _, lines = train(half.parent)
    assert ["checkpoint.pt is damaged" in lines[0], "checkpoint.prev.pt is damaged" in lines[1]] == [True, True]
    assert "is written anew" not in "".join(lines) and sum(line.startswith("epoch") for line in lines) == 3
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
        else:  # the flipped bit was of the padding
            assert torch.equal(loaded["weights"], state["weights"]) and loaded["metrics"] == state["metrics"]
    assert named > len(good) / 7 / 2


@pytest.mark.parametrize(
    "damage", [garbage, empty, lambda f: f.write_text('{"epoch": 2}\n'), lambda f: f.write_text("[]\n")]
)
def test_damaged_metrics_are_named_and_put_back_from_the_checkpoint(half, undisturbed, damage):
    damage(half / "metrics.jsonl")
    _, lines = train(half.parent)
    assert lines[0].startswith("continuing") and lines[0].endswith("after epoch 2")
    assert str(half / "metrics.jsonl") in lines[1] and lines[1].endswith("it is written anew, up to epoch 2")
    same(half, undisturbed)


def test_damaged_metrics_are_no_result(half):
    (half / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl is damaged: line 2 is not that of epoch 2"):
        Run(half).metrics  # noqa: B018


def test_a_damaged_manifest_is_named(half):
    cut(half / "manifest.json")
    with pytest.raises(RunError, match=r"manifest.json is damaged"):
        train(half.parent)


# Full disks. The process trains an epoch, then there is no room for more than small files.

FULL = """
import resource, sys
from pa_core import experiment
from pa_core.params import Experiment

def log(text):
    print(text, flush=True)
    if text.startswith("epoch 1") and sys.argv[2] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    if text.startswith("epoch 1") and sys.argv[2] == "fill":
        import os
        free = os.statvfs(sys.argv[1]).f_bavail * os.statvfs(sys.argv[1]).f_frsize
        with open(sys.argv[1] + "/other", "wb") as file:
            file.write(bytes(max(0, free - 600_000)))

experiment.run(Experiment(**{settings}, runs_dir=sys.argv[1] + "/runs"), log=log)
"""


def check_full(folder: Path, done: subprocess.CompletedProcess, reason: str, undisturbed: Path) -> None:
    (path,) = (file.parent for file in (folder / "runs").glob("*/manifest.json"))
    error = [line for line in done.stderr.splitlines() if line.startswith("pa_core.runs.RunError")]
    assert done.returncode == 1
    assert error == [
        f"pa_core.runs.RunError: {path / 'checkpoint.pt'} cannot be written ({reason}); what was there before is intact"
    ], done.stderr
    assert Run(path).manifest["status"] == "failed" and "checkpoint.pt cannot be written" in Run(path).manifest["error"]
    lines: list[str] = []
    assert load_checkpoint(path, lines.append)["state"]["epoch"] == 1 and not lines
    assert not list(path.glob("*.part"))


def test_a_checkpoint_that_is_larger_than_allowed(tmp_path, undisturbed):
    settings = TINY | {"schedule": "3"}
    code = FULL.replace("{settings}", repr(settings))
    environment = os.environ | {"PYTHONPATH": str(home())}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "limit"], env=environment, capture_output=True, text=True
    )
    check_full(tmp_path, done, "File too large", undisturbed)


def test_a_disk_that_is_full(tmp_path, undisturbed):
    """A small tmpfs, in a namespace of the test's own, so that nobody need be root."""
    where = tmp_path / "small"
    where.mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=24m none {where}"
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here; the limit of a file's size stands in for it")
    code = tmp_path / "full.py"
    code.write_text(FULL.replace("{settings}", repr(TINY | {"schedule": "3"})))
    keep = f"; status=$?; rm -f {where}/other; cp -a {where}/runs {tmp_path}/runs; exit $status"
    command = f"{mount} && {sys.executable} {code} {where} fill" + keep
    environment = os.environ | {"PYTHONPATH": str(home())}
    done = subprocess.run([*unshare, command], env=environment, capture_output=True, text=True)
    done.stderr = done.stderr.replace(str(where), str(tmp_path))
    check_full(tmp_path, done, "No space left on device", undisturbed)
    settings = TINY | {"schedule": "3", "runs_dir": str(tmp_path / "runs")}
    lines: list[str] = []
    again = experiment.run(Experiment(**settings), log=lines.append)
    assert "after epoch 1" in lines[0] and again.finished


def test_an_error_of_its_own_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path, {"x": lambda: None})
    with pytest.raises(RuntimeError, match="^mine$"), runs.replacing(tmp_path / "x"):
        raise RuntimeError("mine")
    assert not list(tmp_path.iterdir()) and resource.getrlimit(resource.RLIMIT_FSIZE)


def test_a_checkpoint_holds_the_metrics_so_far(half):
    state = load_checkpoint(half)
    assert (
        [row["epoch"] for row in state["metrics"]]
        == [1, 2]
        == [json.loads(line)["epoch"] for line in open(half / "metrics.jsonl")]
    )
