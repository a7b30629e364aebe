"""A whole proxy step (score all, select a fifth, explain, store) against one evaluation pass over the same images.

``pa_core, a pass of its own`` explains the selected images by a second forward pass, as any method but a class
activation map has to. The predecessor's 1,200 images are its own report, from its own hardware: about 9 s for the
heatmaps and as much again for saving them; here as many as a benchmark can wait for.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch

from pa_core import models, proxy, train
from pa_core.batch import Pool, memory_format
from pa_core.data import Part
from pa_core.device import resolve_precision
from pa_core.params import Experiment
from tests.bench import harness, synthetic

CASES = (("resnet18", 224, 82), ("resnet18", 64, 1024), ("test_resnet", 28, 4096))
"""Network, image size, images on a CPU; a GPU gets ten times as many."""
PREDECESSOR, REPORTED = "predecessor (as reported)", 1200 / 18
EXPLAINED = 164
"""Images at 224 that are all explained beside what the predecessor reports; a GPU gets ten times as many."""


def run(device: torch.device, rounds: int) -> list[harness.Row]:
    table, more = [], 10 if device.type == "cuda" else 1
    for name, size, n in CASES:
        part, model = synthetic.noise(n * more, size=size), network(name, size=size, device=device)
        works = {
            "evaluate": lambda model=model, part=part: scored(model, part, device=device),
            harness.OURS: lambda model=model, part=part: step(model, part, device=device),
            f"{harness.OURS}, a pass of its own": lambda model=model, part=part: second_pass(
                model, part, device=device
            ),
        }
        rates = harness.interleave(works, device=device, rounds=rounds)
        title = f"gradcam++, {name} at {size}, {len(part):,} images"
        table += harness.rows(title, rates, reference="evaluate", device=device)
    part, model = synthetic.noise(EXPLAINED * more, size=224), network("resnet18", size=224, device=device)
    everything = {harness.OURS: lambda: step(model, part, device=device, select="all", xai="gradcam")}
    values = {PREDECESSOR: REPORTED} | harness.interleave(everything, device=device, rounds=rounds)
    title = f"gradcam, resnet18 at 224, all of {len(part):,} images explained"
    return table + harness.rows(title, values, reference=PREDECESSOR, device=device)


def network(name: str, *, size: int, device: torch.device) -> models.Classifier:
    """As training leaves it."""
    model = models.create(name, classes=synthetic.CLASSES, image_size=size).to(device)
    return model.to(memory_format=memory_format(device)).eval()  # pyright: ignore


def scored(model: models.Classifier, part: Part, *, device: torch.device) -> int:
    """One evaluation pass; how many images that were."""
    train.evaluate(model, Pool.of(part), device=device, dtype=resolve_precision("auto", device))
    return len(part)


def step(model: models.Classifier, part: Part, *, device: torch.device, **changes: object) -> int:
    """One proxy step into a folder that is removed again; how many images were scored."""
    experiment, dtype = Experiment(schedule="1,p,1", **changes), resolve_precision("auto", device)
    folder = Path(tempfile.mkdtemp())
    try:
        proxy.proxy_step(model, part, experiment, step=1, directory=folder / "step_1", device=device, dtype=dtype)
    finally:
        shutil.rmtree(folder)
    return len(part)


def second_pass(model: models.Classifier, part: Part, *, device: torch.device) -> int:
    """As :func:`step`, but the scoring pass keeps no maps."""
    with mock.patch.object(proxy, "MOST_BYTES_OF_MAPS", 0):
        return step(model, part, device=device)
