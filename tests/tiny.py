"""A small experiment on real images, and what of its run is compared: for the tests that train."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pa_core.params import Experiment
from pa_core.runs import Run

QUIET: dict[str, Any] = {"log": lambda _text: None}
CPU = torch.device("cpu")

# Processes are forked off one that has imported torch, and done nothing else: no import at each start.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PROCESSES = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    PROCESSES.set_forkserver_preload(
        ["pa_core.experiment", "pytest", "tensorboard.backend.event_processing.event_accumulator"]
    )


def small(tmp_path: Path, **changes: Any) -> Experiment:
    """160 training images, 16 a class; a fifth of them, 32, become proxies."""
    few = {"train_fraction": 0.041, "folds": 40, "schedule": "1,p,1", "batch_size": 16}
    return Experiment(**(few | {"runs_dir": str(tmp_path / "runs")} | changes))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "weights.safetensors")


def same_weights(one: Run, other: Run) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from one time to the next."""
    return {k: v for k, v in row.items() if not k.endswith("seconds") and k != "images_per_second"}


def same(path: Path, reference: Path) -> None:
    """Fails unless two finished runs hold the same but for times."""
    one, other = Run(path), Run(reference)
    assert one.finished and other.finished and timeless(one.summary) == timeless(other.summary)
    rows = [[timeless(row) for row in run.metrics.to_dict("records")] for run in (one, other)]
    assert rows[0] == rows[1] and len(rows[0]) == one.experiment.length
    for name in ("digest", "split_digest", "threads", "batch_size", "model"):
        assert one.manifest[name] == other.manifest[name]
    proxies = sorted(f.relative_to(reference) for f in reference.glob("proxies/*/*"))
    assert len(proxies) >= 4 and sorted(f.relative_to(path) for f in path.glob("proxies/*/*")) == proxies
    for name in ("weights.safetensors", "predictions.csv", "classes.csv", *proxies):
        assert (path / name).read_bytes() == (reference / name).read_bytes(), name
    assert not (path / "checkpoint.pt").exists() and not list(path.rglob("*.part"))
