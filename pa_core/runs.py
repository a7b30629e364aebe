"""A run on disk: directory, manifest, metrics, checkpoints, TensorBoard.

    manifest.json        parameters, digest, status, versions, device, threads, split and data digests
    metrics.jsonl        a line per epoch
    summary.json         written once, at the end
    classes.csv          per class on the test images: precision, recall, F1, support
    predictions.csv      per test image: id, label, predicted, confidence
    checkpoint.pt        while it trains; weights.safetensors once it is done
    proxies/step_1/      what the proxy step made: images.npy, positions.npy, proxies.csv, examples.npz
    tensorboard/

Every file but the metrics is replaced as a whole, so that a reader or a killed process finds the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from pa_core import models
from pa_core.params import Experiment, home

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
        path = self.path / "manifest.json"
        return json.loads(path.read_text()) if path.is_file() else {}

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
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else {}

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
        model = models.create(e.model, classes=len(classes), image_size=self.manifest["image_size"], cam_layer=e.cam_layer)
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
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what was written there takes its place at the end, or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str, allow_nan=False) + "\n")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def update_manifest(path: Path, **changes: Any) -> None:
    write_json(path / "manifest.json", Run(path).manifest | changes)


# Metrics: a line per epoch, appended; on resume cut back to the checkpoint


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    with open(path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl. A last line without its end, from a process killed while writing, is left out."""
    file = path / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def cut_metrics(path: Path, epoch: int) -> None:
    """Keep the first ``epoch`` epochs."""
    rows = [row for row in read_metrics(path) if row["epoch"] <= epoch]
    if rows or (path / "metrics.jsonl").exists():
        with replacing(path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Checkpoints


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    with replacing(path / "checkpoint.pt") as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The last checkpoint on the CPU, or None."""
    file = path / "checkpoint.pt"
    return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else None


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
            subprocess.run(["git", "-C", str(home()), *words], capture_output=True, text=True, check=True).stdout.strip()
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
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type if device.type == "mps" else f"CPU {platform.machine()}"
