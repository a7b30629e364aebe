"""Wall time of a whole run with four proxy steps, ``5,p,9,p,9,p,9,p,8``, against 40 plain epochs, the reference.

From the first step to the last file: scoring, Grad-CAM++ heatmaps of a fifth of the images, masking, writing the proxies,
validation after every epoch, checkpoints, TensorBoard, the test.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch

from pa_core import experiment
from pa_core.params import Experiment
from tests.bench import harness

SCHEDULES = {"40": "40", "5,p,9,p,9,p,9,p,8": "5,p,9,p,9,p,9,p,8"}
MODELS = ("test_resnet", "resnet18")
FRACTION = {"test_resnet": 0.25, "resnet18": 0.02}
"""Share of the 3,200 training images on a CPU; a GPU trains on all."""


def run(device: torch.device) -> list[harness.Row]:
    table = []
    for name in MODELS:
        fraction = FRACTION[name] if device.type == "cpu" else 1.0
        e = Experiment(model=name, train_fraction=fraction, xai="gradcam++", fraction=0.2, device=str(device))
        with tempfile.TemporaryDirectory() as folder:
            numbers = itertools.count()
            made = {schedule: whole(replace(e, schedule=text), folder, numbers) for schedule, text in SCHEDULES.items()}
            rates = harness.interleave(made, device=device, rounds=3)
        title = f"{name} at 28, {round(3200 * fraction)} images"
        table += harness.rows(title, rates, reference="40", device=device, unit="epochs/s")
    return table


def whole(e: Experiment, folder: str, numbers: itertools.count) -> Callable[[], int]:
    """A run in a folder of its own, so that it is made each time."""

    def work() -> int:
        done = experiment.run(replace(e, runs_dir=f"{folder}/{next(numbers)}"), log=lambda _line: None)
        return done.summary["epochs"]

    return work
