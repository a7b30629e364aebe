"""A run on disk: directory, manifest, metrics, checkpoint.

    manifest.json        parameters, digest, status, versions, device, threads, split and data digests
    metrics.jsonl        a line per epoch; tensorboard/ has the same
    summary.json         written once, at the end, and so are classes.csv and predictions.csv
    checkpoint.pt        while it trains; weights.safetensors once it is done
    proxies/step_1/      of a proxy step: maps.npy, positions.npy, proxies.csv, and the first proxies as proxies.png

Every file is replaced as a whole: a reader or a killed process finds the old or the new one. The directory's name holds
the run's digest and the code version: a run that other code made is never found in its place, and made anew beside it.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from pa_core import models
from pa_core.errors import RunError
from pa_core.files import home, read_json, replacing, shown, write_json
from pa_core.params import SCHEMA, Experiment

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


@dataclass(frozen=True)
class Run:
    """One run's directory, read on demand."""

    path: Path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """Open an existing run; RunError where there is no manifest in the directory."""
        if not (Path(path) / "manifest.json").is_file():
            raise RunError(f"{path} is no run directory: it has no manifest.json")
        return cls(Path(path))

    @property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.path / "manifest.json")

    @property
    def finished(self) -> bool:
        return self.manifest.get("status") == FINISHED

    @property
    def stale(self) -> bool:
        """Whether other code than this, or another schema, made the run: its numbers are not compared with others."""
        manifest = self.manifest
        return (manifest.get("schema"), manifest.get("code_version")) != (SCHEMA, code_version())

    @property
    def experiment(self) -> Experiment:
        return Experiment.from_mapping(self.manifest["parameters"])

    @property
    def metrics(self) -> pd.DataFrame:
        """A row per epoch; RunError where the file is damaged."""
        file = self.path / "metrics.jsonl"
        try:
            return pd.DataFrame([json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else [])
        except ValueError as error:
            raise RunError(f"{shown(file)} is damaged ({error})") from error

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

    def step(self, number: int) -> Path:
        """The folder of a proxy step, which is there only once the step is complete."""
        return self.path / "proxies" / f"step_{number}"

    def proxies(self, step: int) -> pd.DataFrame:
        """Per proxy of a step: id, label, predicted, explained (class numbers), loss, masked_share, unchanged."""
        return pd.read_csv(self.step(step) / "proxies.csv", dtype={"id": str}, keep_default_na=False)

    def model(self, device: str | torch.device = "cpu") -> models.Classifier:
        """The trained classifier of a finished run, in eval mode; RunError where it has not finished."""
        path, e, manifest = self.path / "weights.safetensors", self.experiment, self.manifest
        if not path.is_file():
            raise RunError(f"{self.path} holds no weights: its status is {manifest.get('status')}")
        size, classes = manifest["image_size"], len(manifest["classes"])
        model = models.create(e.model, classes=classes, image_size=size, cam_layer=e.cam_layer)
        model.network.load_state_dict(load_file(path))
        return model.eval().to(device)


def directory(runs: Path, experiment: Experiment, digest: str) -> Path:
    """Where a run with this identity, made by this code, lies."""
    parts = (experiment.dataset, experiment.model, experiment.schedule.replace(",", "-"))
    named = ["".join(c if c.isalnum() or c in "-+." else "-" for c in part)[:60] for part in parts]
    return runs / "_".join([*named, f"{digest[:12]}-{code_version()[:8]}"])


def write_csv(path: Path, table: pd.DataFrame) -> None:
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    with replacing(path / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def update_manifest(path: Path, **changes: Any) -> None:
    write_json(path / "manifest.json", Run(path).manifest | changes)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``checkpoint.pt``: what torch saves, and its SHA-256 behind it, because torch compares no checksum."""
    content = io.BytesIO()  # into a file, torch would raise an error of its own over that of a full disk
    torch.save(state, content)
    content.write(hashlib.sha256(content.getbuffer()).digest())
    with replacing(path / "checkpoint.pt") as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path: Path, log: Callable[[str], None] = print) -> dict[str, Any] | None:
    """The checkpoint, on the CPU, or None. One that is damaged is named and removed: the run starts over."""
    file = path / "checkpoint.pt"
    if not file.is_file():
        return None
    content = memoryview(file.read_bytes())
    if hashlib.sha256(content[:-32]).digest() == content[-32:]:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    log(f"{shown(file)} is damaged (its checksum is wrong); the run starts over")
    file.unlink()
    return None


def remove_checkpoint(path: Path) -> None:
    (path / "checkpoint.pt").unlink(missing_ok=True)


def save_weights(path: Path, network: torch.nn.Module) -> None:
    """``weights.safetensors``: the timm network's state dict; ``pretrained`` takes such a file."""
    state = models.plain_state(network)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    with replacing(path / "weights.safetensors") as temporary:
        save_file(tensors, temporary)


@cache
def code_version() -> str:
    """SHA-256 (16 hex digits) of what a result depends on: the package's code without lab/, comments and docstrings."""
    digest, package = hashlib.sha256(), Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package)
        if name.parts[0] != "lab":
            digest.update(f"{name.as_posix()}\0{_form(ast.parse(file.read_bytes()))}\0".encode())
    return digest.hexdigest()[:16]


def _form(node: Any) -> Any:
    """A syntax tree as nested lists, without positions, docstrings and empty fields, which differ between Pythons."""
    if isinstance(node, list):
        return [_form(n) for n in node if not (type(n) is ast.Expr and type(n.value) is ast.Constant)]
    if not isinstance(node, ast.AST):
        return node
    form: list[Any] = [type(node).__name__]
    for name in node._fields:
        value = getattr(node, name)
        if value is not None and value != [] and name != "ctx":
            form += (name, _form(value))
    return form


@cache
def git_commit() -> str | None:
    """The checkout's commit, with ``+`` when files differ from it; None outside a checkout."""
    words = ["git", "-C", str(home()), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet: provenance says None
        return None


def versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "timm", "captum", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "mps" if device.type == "mps" else f"CPU {platform.machine()}"
