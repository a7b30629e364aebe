"""1,000 to 50,000 images in each store: images per second, and peak memory. Every case runs in a process of its own.

Memory on a CPU is what the process has allocated itself (resident pages that no file backs: those of the mapped images belong
to the file, and the system takes them back when it needs them), on a GPU what PyTorch allocated there. For the store on the
device ``besides the images`` is the part that must not grow. The reference is the smallest number.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from pa_core.params import Experiment
from tests.bench import harness, synthetic

NUMBERS = (1000, 5000, 20_000, 50_000)
SIZE, BATCH = 64, 64
DRAWS = {"cpu": 1024, "cuda": 50_000}


def run(device: torch.device) -> list[harness.Row]:
    table = []
    for store in ("device", "mapped"):
        measured = {n: measure_in_process(n, store, device) for n in NUMBERS}
        for key, unit in (("rate", "images/s"), ("peak", "MB"), ("besides", "MB besides the images")):
            if key == "besides" and store == "mapped":
                continue
            values = {f"{n:,} images": found[key] for n, found in measured.items()}
            table += harness.rows(f"store {store}: {unit}", values, reference=f"{NUMBERS[0]:,} images", unit=unit, device=device)
    return table


def measure_in_process(n: int, store: str, device: torch.device) -> dict[str, float]:
    return json.loads(harness.in_process("tests.bench.scale", n, store, device).splitlines()[-1])


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


def measure(n: int, store: str, device: torch.device) -> dict[str, float]:
    """Peak MB over loading and training, and the median rate of five pieces of an epoch."""
    e = Experiment()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        synthetic.write(path, n=n, size=SIZE)
        with Peak() as peak:
            part = synthetic.part(path)
            source = part.on(device) if store == "device" else part
            state = synthetic.state(e, size=SIZE, device=device, steps=10**6)
            draws = DRAWS["cuda" if device.type == "cuda" else "cpu"]
            rates = []
            for _ in range(6):
                started = time.perf_counter()
                synthetic.epoch(state, source, e, draws=min(draws, n), batch=BATCH)
                harness.wait(device)
                rates.append(min(draws, n) / (time.perf_counter() - started))
    taken = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak.bytes
    images = n * 3 * SIZE**2 if store == "device" else 0
    return {"rate": sorted(rates[1:])[2], "peak": taken / 1e6, "besides": (taken - images) / 1e6}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), sys.argv[2], torch.device(sys.argv[3]))))
