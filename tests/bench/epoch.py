"""An epoch against the bare network: what sampling, augmentation, proxies and bookkeeping cost.

``bare`` is the reference: forward pass, loss, backward pass and fused update of the timm network alone, over and over on one
batch that is normalised, in the right memory format and on the device already. All others train on images of an epoch in
random order, flipped and cropped: kept on the device, mapped from a file, or with a fifth replaced by proxies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pa_core import train
from pa_core.params import Experiment
from pa_core.proxy import Overlay
from tests.bench import harness, synthetic

CASES = {
    "cpu": (("test_resnet", 28, 64, 1280), ("resnet18", 64, 64, 256)),
    "cuda": (("resnet18", 224, 128, 12_800), ("resnet18", 64, 512, 102_400), ("test_resnet", 28, 64, 6400)),
}
"""Network, image size, batch, images of an epoch."""
MANY = 10**6
"""Steps of the learning rate's schedule; more than are taken."""


def run(device: torch.device) -> list[harness.Row]:
    table = []
    for name, size, batch, n in CASES["cuda" if device.type == "cuda" else "cpu"]:
        with tempfile.TemporaryDirectory() as folder:
            synthetic.write(Path(folder) / "images.npy", n=n, size=size)
            made = contenders(Path(folder), Experiment(model=name), size=size, batch=batch, device=device)
            rates = harness.interleave(made, device=device)
        table += harness.rows(f"{name} at {size}, batch {batch}", rates, reference="bare", device=device)
    return table


def contenders(
    folder: Path, e: Experiment, *, size: int, batch: int, device: torch.device
) -> dict[str, Callable[[], int]]:
    mapped = synthetic.part(folder / "images.npy")
    n = len(mapped)
    placed = mapped.on(device, room=n // 5)
    sources = {"pa_core": placed, "pa_core, mapped": mapped, "pa_core, proxies": overlay(folder / "step", placed)}
    made = {"bare": bare(synthetic.state(e, size=size, device=device, steps=MANY), size=size, batch=batch, n=n)}
    for name, source in sources.items():
        state = synthetic.state(e, size=size, device=device, steps=MANY)
        made[name] = lambda state=state, source=source: synthetic.epoch(state, source, e, draws=n, batch=batch)
    return made


def overlay(step: Path, part) -> Overlay:
    """The part with its first fifth replaced."""
    step.mkdir()
    count = len(part) // 5
    np.save(step / "images.npy", part.read(torch.arange(count)).cpu().numpy())
    np.save(step / "positions.npy", np.arange(count))
    return Overlay(part, mode="replace", steps=[step])


def bare(state: train.State, *, size: int, batch: int, n: int) -> Callable[[], int]:
    device, network = state.device, state.model.network.train()
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=train.memory_format(device))
    labels = torch.arange(batch, device=device) % synthetic.CLASSES

    def epoch() -> int:
        for _ in range(n // batch):
            with state.autocast():
                loss = F.cross_entropy(network(images), labels)
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            state.optimizer.step()
        return n // batch * batch

    return epoch
