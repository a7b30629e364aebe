"""An epoch against the bare network: what sampling, augmentation, proxies and bookkeeping cost.

``bare`` is the reference: forward pass, loss, backward pass and fused update of the timm network alone, over and over
on one batch that is normalised, in the right memory format and on the device already. All others train on images of an
epoch in random order, flipped and cropped: kept on the device, mapped from a file, or with a fifth replaced by proxies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from pa_core import proxy, train
from pa_core.batch import Pool, memory_format
from pa_core.device import autocast
from pa_core.params import Experiment
from tests.bench import harness, synthetic

CASES = {
    "cpu": (("test_resnet", 28, 64, 1280), ("resnet18", 64, 64, 256)),
    "cuda": (("resnet18", 224, 128, 12_800), ("resnet18", 64, 512, 102_400), ("test_resnet", 28, 64, 6400)),
}
"""Network, image size, batch, images of an epoch."""


def run(device: torch.device, rounds: int) -> list[harness.Row]:
    table = []
    for name, size, batch, n in CASES["cuda" if device.type == "cuda" else "cpu"]:
        with tempfile.TemporaryDirectory() as folder:
            path, e = Path(folder) / "images.npy", Experiment(model=name)
            synthetic.write(path, n=n, size=size)
            mapped = synthetic.part(path)
            placed = mapped.on(device)
            pools = {"": Pool.of(placed), ", mapped": Pool.of(mapped)}
            pools[", proxies"] = proxy.pool(placed, e, [synthetic.step(placed)])
            made = {"bare": bare(synthetic.state(e, size=size, device=device), size=size, batch=batch, n=n)}
            made |= {
                harness.OURS + what: synthetic.training(pool, e, device=device, batch=batch)
                for what, pool in pools.items()
            }
            rates = harness.interleave(made, device=device, rounds=rounds)
        table += harness.rows(f"{name} at {size}, batch {batch}", rates, reference="bare", device=device)
    return table


def bare(state: train.State, *, size: int, batch: int, n: int) -> Callable[[], int]:
    device, network = state.device, state.model.network.train()
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=memory_format(device))
    labels = torch.arange(batch, device=device) % synthetic.CLASSES

    def epoch() -> int:
        for _ in range(n // batch):
            with autocast(state.device, state.dtype):
                loss = F.cross_entropy(network(images), labels)
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            state.optimizer.step()
        return n // batch * batch

    return epoch
