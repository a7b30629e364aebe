"""1,000 to 50,000 images in each store: images per second, and peak memory.

Rates of all numbers are taken in turn, in one process; for its peak memory every number gets a process of its own. Memory on a
CPU is what that process has allocated itself (resident pages that no file backs: those of the mapped images belong to the file,
and the system takes them back when it needs them), on a GPU what PyTorch allocated there. For the store on the device ``besides
the images`` is the part that must not grow. The reference is the smallest number.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from pa_core.params import Experiment
from tests.bench import harness, synthetic

NUMBERS = (1000, 5000, 20_000, 50_000)
SIZE, BATCH = 64, 64
DRAWS = 1000
EPOCH = {False: 1000, True: 20_000}
"""Images of one measurement on a CPU and on CUDA, in epochs of a thousand draws, so that all numbers take the same steps."""


def run(device: torch.device) -> list[harness.Row]:
    table = []
    for store in ("device", "mapped"):
        with tempfile.TemporaryDirectory() as folder:
            made = {f"{n:,} images": training(Path(folder), n, store, device) for n in NUMBERS}
            rates = harness.interleave(made, device=device)
        peaks = {
            f"{n:,} images": json.loads(harness.in_process("tests.bench.scale", n, store, device)) for n in NUMBERS
        }
        values = {"images/s": rates, "MB": {name: peak["peak"] for name, peak in peaks.items()}}
        if store == "device":
            values["MB besides the images"] = {name: peak["besides"] for name, peak in peaks.items()}
        for unit, found in values.items():
            table += harness.rows(
                f"store {store}: {unit}", found, reference=f"{NUMBERS[0]:,} images", unit=unit, device=device
            )
    return table


def training(folder: Path, n: int, store: str, device: torch.device) -> Callable[[], int]:
    """Work that trains on as many images, whatever n is."""
    path = folder / f"{n}.npy"
    synthetic.write(path, n=n, size=SIZE)
    part = synthetic.part(path)
    source, e = part.on(device) if store == "device" else part, Experiment()
    state = synthetic.state(e, size=SIZE, device=device, steps=10**6)
    draws, epochs = min(DRAWS, n), -(-EPOCH[device.type == "cuda"] // min(DRAWS, n))
    return lambda: sum(synthetic.epoch(state, source, e, draws=draws, batch=BATCH) for _ in range(epochs))


class Peak:
    """The most memory that this process has allocated itself while ``with`` lasts, in bytes, looked at every 2 ms."""

    def __init__(self) -> None:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.002):
            info = process.memory_info()
            self.bytes = max(self.bytes, info.rss - getattr(info, "shared", 0))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def peak(n: int, store: str, device: torch.device) -> dict[str, float]:
    """Peak MB over loading and training."""
    with tempfile.TemporaryDirectory() as folder, Peak() as watched:
        training(Path(folder), n, store, device)()
    taken = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else watched.bytes
    images = n * 3 * SIZE**2 if store == "device" else 0
    return {"peak": taken / 1e6, "besides": (taken - images) / 1e6}


if __name__ == "__main__":
    print(json.dumps(peak(int(sys.argv[1]), sys.argv[2], torch.device(sys.argv[3]))))
