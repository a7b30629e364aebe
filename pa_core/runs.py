"""A run on disk: directory, manifest, metrics, checkpoints, TensorBoard.

    manifest.json        parameters, digest, status, versions, device, threads, split and data digests
    metrics.jsonl        a line per epoch
    summary.json         written once, at the end
    classes.csv          per class on the test images: precision, recall, F1, support
    predictions.csv      per test image: id, label, predicted, confidence
    checkpoint.pt        while it trains, with the one before it, checkpoint.prev.pt; weights.safetensors once it is done
    proxies/step_1/      what the proxy step made: images.npy, positions.npy, proxies.csv, examples.npz
    tensorboard/

Every file but the metrics is replaced as a whole, so that a reader or a killed process finds the old one or the new one. A run
that a sweep made also holds the executed notebook.ipynb and its figures/.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import platform
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from pa_core import models
from pa_core.params import Experiment, home, shown

RUNNING, PAUSED, FINISHED, FAILED, INTERRUPTED = "running", "paused", "finished", "failed", "interrupted"


PROXY_COLUMNS = ("id", "label", "predicted", "explained", "loss", "masked_share", "unchanged")


class RunError(RuntimeError):
    """A run directory cannot be used as asked; the message says which and why."""


@dataclass(frozen=True)
class Run:
    """One run's directory, read on demand.

    Attributes:
        path: the directory.
    """

    path: Path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Run:
        """Open an existing run.

        Raises:
            RunError: there is no manifest in the directory.
        """
        run = cls(Path(path))
        if not (run.path / "manifest.json").is_file():
            raise RunError(f"{path} is no run directory: it has no manifest.json")
        return run

    @property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.path / "manifest.json")

    @property
    def finished(self) -> bool:
        return self.manifest.get("status") == FINISHED

    @property
    def stale(self) -> bool:
        """Whether the run was made by other code than this."""
        return self.manifest.get("code_version") != code_version()

    @property
    def experiment(self) -> Experiment:
        return Experiment.from_mapping(self.manifest["parameters"])

    @property
    def metrics(self) -> pd.DataFrame:
        """A row per epoch."""
        return pd.DataFrame(read_metrics(self.path))

    @property
    def summary(self) -> dict[str, Any]:
        return read_json(self.path / "summary.json")

    @property
    def classes(self) -> pd.DataFrame:
        """Per class on the test images: class, precision, recall, f1, support."""
        return pd.read_csv(self.path / "classes.csv", dtype={"class": str}, keep_default_na=False)

    @property
    def predictions(self) -> pd.DataFrame:
        """Per test image: id, label, predicted, confidence."""
        text = {"id": str, "label": str, "predicted": str}
        return pd.read_csv(self.path / "predictions.csv", dtype=text, keep_default_na=False)

    def proxies(self, step: int) -> pd.DataFrame:
        """Per proxy of a step: id, label, predicted, explained (class numbers), loss, masked_share, unchanged."""
        path = self.path / "proxies" / f"step_{step}" / "proxies.csv"
        if path.is_file():
            return pd.read_csv(path, dtype={"id": str}, keep_default_na=False)
        return pd.DataFrame(columns=PROXY_COLUMNS).astype({"loss": float, "masked_share": float})

    def model(self, device: str | torch.device = "cpu") -> models.Classifier:
        """The trained classifier of a finished run, in eval mode.

        Raises:
            RunError: the run is not finished.
        """
        path = self.path / "weights.safetensors"
        if not path.is_file():
            raise RunError(f"{self.path} holds no weights: its status is {self.manifest.get('status')}")
        e, classes = self.experiment, self.manifest["classes"]
        model = models.create(
            e.model, classes=len(classes), image_size=self.manifest["image_size"], cam_layer=e.cam_layer
        )
        model.network.load_state_dict(load_file(path))
        return model.eval().to(device)


def directory(runs: Path, experiment: Experiment, digest: str, *, rerun: bool = False) -> Path:
    """Where a run with this identity lies. ``rerun`` gives the next name beside the finished ones, ``NAME~2`` and so on."""
    parts = (experiment.dataset, experiment.model, experiment.schedule.replace(",", "-"), digest[:12])
    path = runs / "_".join("".join(c if c.isalnum() or c in "-+." else "-" for c in part)[:60] for part in parts)
    number = 1
    while rerun and Run(path).finished:
        number += 1
        path = path.with_name(f"{path.name.split('~')[0]}~{number}")
    return path


@contextmanager
def lock(path: Path, log: Any = print) -> Iterator[None]:
    """Hold the run's lock; wait for another process that trains it, and say so. A killed holder loses it."""
    path.mkdir(parents=True, exist_ok=True)
    held = FileLock(path / "lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        log(f"another process trains {path.name}; waiting for it")
        held.acquire()
    try:
        yield
    finally:
        held.release()


# Files that are replaced as a whole


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write, of a full disk for one, into an error that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises its own over it
        if not isinstance(cause, OSError):
            raise
        raise RunError(
            f"{shown(path)} cannot be written ({cause.strerror}); what was there before is intact"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what was written there takes its place at the end, or not at all.

    Raises:
        RunError: it could not be written.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        with writing(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A file's content, ``{}`` where there is none.

    Raises:
        RunError: it is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunError(f"{shown(path)} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise RunError(f"{shown(path)} is damaged (it holds no names and values)")
    return content


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str, allow_nan=False) + "\n")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def update_manifest(path: Path, **changes: Any) -> None:
    write_json(path / "manifest.json", Run(path).manifest | changes)


# Metrics: a line per epoch, appended; on resume written anew as the checkpoint has them


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    with writing(path / "metrics.jsonl"), open(path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl. A last line without its end, from a process killed while writing, is left out.

    Raises:
        RunError: a line is damaged.
    """
    file = path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or row.get("epoch") != number:
            raise RunError(f"{shown(file)} is damaged: line {number} is not that of epoch {number}")
        rows.append(row)
    return rows


def restore_metrics(path: Path, rows: list[dict[str, Any]], log: Callable[[str], None] = print) -> None:
    """Make metrics.jsonl hold the checkpoint's rows: lines after them go, and what is damaged or missing is put back, and said."""
    try:
        missing = len(read_metrics(path)) < len(rows)
        damage = f"{shown(path / 'metrics.jsonl')} is cut short" if missing else ""
    except RunError as error:
        damage = str(error)
    if damage:
        log(f"{damage}; it is written anew, up to epoch {len(rows)}")
    if rows or (path / "metrics.jsonl").exists():
        with replacing(path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Checkpoints: the last one, and the one before it, in case a disk or a copy damages the last

CHECKPOINTS = ("checkpoint.pt", "checkpoint.prev.pt")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Raises RunError when it cannot be written; the last one is then as it was."""
    last, previous = (path / name for name in CHECKPOINTS)
    with replacing(last) as temporary:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if last.is_file():
            os.replace(last, previous)


def load_checkpoint(path: Path, log: Callable[[str], None] = print) -> dict[str, Any] | None:
    """The last good checkpoint, on the CPU, or None. One that is damaged is named, and removed, so that it never becomes the previous one."""
    for name in CHECKPOINTS:
        file = path / name
        if not file.is_file():
            continue
        damage = _damage(file)
        if not damage:
            return torch.load(file, map_location="cpu", weights_only=True)
        log(f"{shown(file)} is damaged ({damage}) and left out")
        file.unlink()
    return None


def _damage(file: Path) -> str:
    """What is wrong with a checkpoint; empty when nothing is. torch.save writes checksums that torch.load does not compare."""
    broken = (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
    )
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
        if bad is None:
            torch.load(file, map_location="meta", weights_only=True)
    except (*broken, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: sent to a place that no file has
            raise
        return " ".join(str(error).split()[:12]) or type(error).__name__
    return f"the checksum of {bad} is wrong" if bad else ""


def remove_checkpoints(path: Path) -> None:
    for name in CHECKPOINTS:
        (path / name).unlink(missing_ok=True)


def save_weights(path: Path, network: torch.nn.Module) -> None:
    """``weights.safetensors``: the timm network's state dict; ``pretrained`` takes such a file."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    with replacing(path / "weights.safetensors") as temporary:
        save_file(tensors, temporary)


# Where a run came from


@cache
def code_version() -> str:
    """SHA-256 (16 hex digits) of the package's Python files."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def git_commit() -> str | None:
    """The checkout's commit, with ``+`` when files differ from it; None outside a checkout."""
    if not (home() / ".git").exists():
        return None
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(home()), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet: provenance says None
        return None
    return commit + ("+" if changed else "")


def versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "timm", "captum", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def process() -> str:
    """How this process was started; a notebook's says little, so manifests also hold the command that repeats the run."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type if device.type == "mps" else f"CPU {platform.machine()}"
