"""Wall time of a whole run with four proxy steps, ``5,p,9,p,9,p,9,p,8``, against 40 plain epochs, the reference.

From the first step to the last file: scoring, Grad-CAM++ heatmaps of a fifth of the images, masking, storing maps,
validation after every epoch, checkpoints, TensorBoard, the test.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable

import torch

from pa_core import experiment
from pa_core.params import Experiment
from tests.bench import harness

SCHEDULES = {"40": "40", "5,p,9,p,9,p,9,p,8": "5,p,9,p,9,p,9,p,8"}
CASES = {"cpu": (("test_resnet", 0.125),), "cuda": (("test_resnet", 1.0), ("resnet18", 1.0))}
"""Network, and share of the 3,800 training images."""
FOLDS = 20
"""200 images for validation, so that it is no more of an epoch than usual where few are trained on."""


def run(device: torch.device, rounds: int) -> list[harness.Row]:
    table = []
    for name, share in CASES["cuda" if device.type == "cuda" else "cpu"]:
        e = Experiment(model=name, train_fraction=share, folds=FOLDS, xai="gradcam++", fraction=0.2, device=str(device))
        with tempfile.TemporaryDirectory() as folder:
            numbers = itertools.count()
            made = {schedule: whole(e.replace(schedule=text), folder, numbers) for schedule, text in SCHEDULES.items()}
            rates = harness.interleave(made, device=device, rounds=rounds, warmup=0)
        title = f"{name} at 28, {round(3800 * share):,} images"
        table += harness.rows(title, rates, reference="40", device=device, unit="epochs/s")
    return table


def whole(e: Experiment, folder: str, numbers: itertools.count) -> Callable[[], int]:
    """A run in a folder of its own, so that it is made each time."""

    def work() -> int:
        done = experiment.run(e.replace(runs_dir=f"{folder}/{next(numbers)}"), log=lambda _line: None)
        return done.summary["epochs"]

    return work
