"""A small experiment on real images, and what of its run is compared: for the tests that train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pa_core.params import Experiment
from pa_core.runs import Run

QUIET: dict[str, Any] = {"log": lambda _text: None}
CPU = torch.device("cpu")


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
