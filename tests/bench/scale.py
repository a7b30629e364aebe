"""1,000 and 50,000 images, on the device and mapped from their file: images per second, and peak memory.

All rates are taken in turn, in one process; for its peak memory every contender gets a process of its own. Memory on a
CPU is what that process has allocated itself (resident pages that no file backs: those of the mapped images belong to
the file, and the system takes them back when it needs them), on a GPU what PyTorch allocated there. ``besides the
images`` is what must not grow. The reference is the smaller number.
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

from pa_core.batch import Pool
from pa_core.params import Experiment
from tests.bench import harness, synthetic

NUMBERS = (1000, 50_000)
SIZE, BATCH = 64, 64
DRAWS = {"cpu": 1000, "cuda": 20_000}
"""Images of one measurement: as many for each number, so that all take the same steps."""


def run(device: torch.device, rounds: int) -> list[harness.Row]:
    table = []
    for where in ("device", "mapped"):
        with tempfile.TemporaryDirectory() as folder:
            made = {f"{n:,} images": training(Path(folder), n, where, device) for n in NUMBERS}
            rates = harness.interleave(made, device=device, rounds=rounds)
        measured = {
            f"{n:,} images": json.loads(harness.in_process("tests.bench.scale", n, where, device)) for n in NUMBERS
        }
        values = {"images/s": rates}
        values |= {unit: {name: m[unit] for name, m in measured.items()} for unit in ("MB", "MB besides the images")}
        for unit, found in values.items():
            first = next(iter(found))
            table += harness.rows(f"{where}: {unit}", found, reference=first, unit=unit, device=device)
    return table


def training(folder: Path, n: int, where: str, device: torch.device) -> Callable[[], int]:
    """Work that trains on as many images, whatever n is."""
    path = folder / f"{n}.npy"
    synthetic.write(path, n=n, size=SIZE)
    part = synthetic.part(path)
    pool = Pool.of(part.on(device) if where == "device" else part)
    total = DRAWS["cuda" if device.type == "cuda" else "cpu"]
    draws = min(total, n)
    work = synthetic.training(pool, Experiment(), device=device, batch=BATCH, draws=draws)
    return lambda: sum(work() for _ in range(total // draws))


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


def peak(n: int, where: str, device: torch.device) -> dict[str, float]:
    """Peak MB over loading and training."""
    with tempfile.TemporaryDirectory() as folder, Peak() as watched:
        training(Path(folder), n, where, device)()
    taken = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else watched.bytes
    images = n * 3 * SIZE**2 if where == "device" else 0
    return {"MB": taken / 1e6, "MB besides the images": (taken - images) / 1e6}


if __name__ == "__main__":
    print(json.dumps(peak(int(sys.argv[1]), sys.argv[2], torch.device(sys.argv[3]))))
