"""Peak memory of a proxy step that selects 1,000 of 10,000 images, and of one that selects all, each in a process.

On a GPU what PyTorch allocated there, on a CPU the process's resident memory; the images themselves are in both.
"""

from __future__ import annotations

import resource
import sys

import torch

from tests.bench import harness
from tests.bench.proxy_step import network, step
from tests.bench.synthetic import noise

IMAGES, SIZE = 10_000, 64


def run(device: torch.device, rounds: int) -> list[harness.Row]:
    values = {}
    for selected in (1_000, IMAGES):
        printed = harness.in_process("tests.bench.proxy_memory", selected, device)
        values[f"{harness.OURS}, {selected:,} selected"] = float(printed.split()[-1])
    title = f"gradcam++, test_resnet at {SIZE}, {IMAGES:,} images"
    return harness.rows(title, values, reference=next(iter(values)), device=device, unit="MiB")


def peak(selected: int, device: torch.device) -> float:
    """MiB."""
    model = network("test_resnet", size=SIZE, device=device)
    step(model, noise(IMAGES, size=SIZE), device=device, fraction=selected / IMAGES)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


if __name__ == "__main__":
    print(peak(int(sys.argv[1]), torch.device(sys.argv[2])))
