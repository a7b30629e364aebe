"""From ``papermill notebooks/02_training.ipynb`` to the first training step, and where the seconds go.

A fresh process with the embedded data and the default network. A run opens its TensorBoard folder right before the
first step; papermill notes when each cell began. The reference is what cannot be avoided: papermill and the kernel
start, and the import of torch, torchvision and timm in one fresh process; what is above it is this package's own.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import nbformat
import torch

from tests.bench import harness

NOTEBOOK = "notebooks/02_training.ipynb"
TOTAL, KERNEL, FLOOR = "papermill to the first step", "papermill and the kernel start", "torch, torchvision, timm"
IMPORTS = (FLOOR, "pa_core.params", "pa_core.experiment", "pa_core.lab.explore, pa_core.lab.figures")


def run(device: torch.device, rounds: int) -> list[harness.Row]:
    starts, imports = [], {name: [] for name in IMPORTS}
    for _ in range(rounds):
        starts.append(cold(device))
        for name, seconds in imports.items():
            seconds.append(importing(name))
    alone = {f"import {name}": statistics.median(seconds) for name, seconds in imports.items()}
    middle = sorted(starts, key=lambda part: part[TOTAL])[len(starts) // 2]
    floor = "kernel start and these imports"
    least = {floor: middle[KERNEL] + alone[f"import {FLOOR}"]}
    above = {"above that": middle[TOTAL] - least[floor]}
    table = harness.rows(NOTEBOOK, least | above | middle, reference=floor, unit="s", device=device)
    return table + harness.rows("imports", alone, reference=f"import {FLOOR}", unit="s", device=device)


def cold(device: torch.device) -> dict[str, float]:
    """Seconds until the first step, and of each stretch before it, named after what the cell does."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.ipynb"
        options = {
            "schedule": "1",
            "device": str(device),
            "runs_dir": f"{folder}/runs",
            "figures_dir": f"{folder}/figures",
        }
        words = [word for name, value in options.items() for word in ("-p", name, value)]
        command = [sys.executable, "-m", "papermill", NOTEBOOK, str(out), *words]
        command += ["--kernel", "python3", "--no-progress-bar"]
        environment = os.environ | {"PYTHONPATH": str(harness.ROOT), "JUPYTER_PREFER_ENV_PATH": "1"}
        started = time.time()
        process = subprocess.Popen(
            command, cwd=harness.ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        board = None
        while board is None and process.poll() is None:
            time.sleep(0.005)
            board = next(Path(folder).glob("runs/*/tensorboard"), None)
        first_step = time.time()
        if process.wait() or board is None:
            raise RuntimeError(f"{' '.join(command)} failed; run it to see why")
        cells = [cell for cell in nbformat.read(out, as_version=4).cells if cell.cell_type == "code"]
    return {TOTAL: first_step - started} | stretches(cells, started, first_step)


def stretches(cells: list[nbformat.NotebookNode], started: float, first_step: float) -> dict[str, float]:
    begun = [(cell, datetime.fromisoformat(cell.metadata.papermill.start_time).timestamp()) for cell in cells]
    before = [(cell, at) for cell, at in begun if at < first_step]
    found = {KERNEL: before[0][1] - started}
    ends = [at for _, at in before[1:]] + [first_step]
    for (cell, at), end in zip(before, ends, strict=True):
        label = f"cell: {first_line(cell.source)}"
        found[label] = found.get(label, 0.0) + end - at
    return found


def first_line(source: str) -> str:
    """The first line that says what a cell does; the two cells of parameters have one name."""
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("%")]
    return "parameters" if lines[0].startswith("# Parameters") else lines[0][:70]


def importing(name: str) -> float:
    """Seconds of the import statement in a fresh process."""
    code = f"import time; started = time.perf_counter(); import {name}; print(time.perf_counter() - started)"
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, cwd=harness.ROOT, check=True, capture_output=True, text=True).stdout)
