"""A whole proxy step (score all, select a fifth, explain, mask, store) against one evaluation pass over the same images.

``pa_core, a pass of its own`` explains the selected images by a second forward pass, as any method but a class activation
map has to. The predecessor's 1,200 images are its own report, from its own hardware: about 9 s for the heatmaps and as
much again for saving them.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch

from pa_core import models, proxy, train
from pa_core.data import Part
from pa_core.params import Experiment
from tests.bench import harness
from tests.bench.synthetic import noise

CASES = (("resnet18", 224, 246), ("resnet18", 64, 2048), ("test_resnet", 28, 4096))
"""Network, image size, images on a CPU; a GPU gets ten times as many."""

PREDECESSOR = 1200 / 18


def run(device: torch.device) -> list[harness.Row]:
    dtype, table = train.resolve_precision("auto", device), []
    for name, size, n in CASES:
        part = noise(n * 10 if device.type == "cuda" else n, size=size)
        model = models.create(name, classes=10, image_size=size).to(device).eval()

        def scored(model=model, part=part) -> int:
            train.evaluate(model, part, device=device, dtype=dtype)
            return len(part)

        def second_pass(model=model, part=part) -> int:
            with mock.patch.object(proxy, "MOST_BYTES_OF_MAPS", 0):
                return step(model, part, Experiment(schedule="1,p,1"), device=device, dtype=dtype)

        contenders = {
            "evaluate": scored,
            harness.OURS: lambda model=model, part=part: step(
                model, part, Experiment(schedule="1,p,1"), device=device, dtype=dtype
            ),
            f"{harness.OURS}, a pass of its own": second_pass,
        }
        rates = harness.interleave(contenders, device=device, rounds=5)
        table += harness.rows(
            f"gradcam++, {name} at {size}, {len(part)} images", rates, reference="evaluate", device=device
        )
    return table + predecessor(device, dtype)


def predecessor(device: torch.device, dtype: torch.dtype) -> list[harness.Row]:
    """All of 1,200 images at 224 become proxies."""
    part = noise(1200, size=224)
    model = models.create("resnet18", classes=10, image_size=224).to(device).eval()
    everything = Experiment(schedule="1,p,1", select="all", xai="gradcam")
    rates = harness.interleave(
        {harness.OURS: lambda: step(model, part, everything, device=device, dtype=dtype)}, device=device, rounds=3
    )
    values = {"predecessor (as reported)": PREDECESSOR} | rates
    return harness.rows(
        "gradcam, resnet18 at 224, 1,200 images, all made proxies",
        values,
        reference="predecessor (as reported)",
        device=device,
    )


def step(
    model: models.Classifier, part: Part, experiment: Experiment, *, device: torch.device, dtype: torch.dtype
) -> int:
    """One proxy step into a folder that is removed again; how many images were scored."""
    folder = Path(tempfile.mkdtemp())
    try:
        proxy.proxy_step(
            model, part, experiment, step=1, epoch=1, directory=folder / "step_1", device=device, dtype=dtype
        )
    finally:
        shutil.rmtree(folder)
    return len(part)
