"""From ``papermill notebooks/02_training.ipynb`` to the first training step, and where the seconds go.

A fresh process with the embedded data and the default network. A run opens its TensorBoard folder right before the first step;
papermill notes when each cell began. ``import pa_core`` is the median of seven processes.
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

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = "notebooks/02_training.ipynb"
TOTAL = "papermill to the first step"
ROUNDS = 3


def run(device: torch.device) -> list[harness.Row]:
    parts = [cold(device) for _ in range(ROUNDS)]
    middle = sorted(parts, key=lambda part: part[TOTAL])[ROUNDS // 2]
    table = harness.rows(NOTEBOOK, middle, reference=TOTAL, unit="s", device=device)
    alone = {f"import {name}": importing(name) for name in ("pa_core", "pa_core.params", "torch", "pa_core.experiment")}
    return table + harness.rows("imports", alone, reference="import torch", unit="s", device=device)


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
        command = [
            sys.executable,
            "-m",
            "papermill",
            NOTEBOOK,
            str(out),
            *words,
            "--kernel",
            "python3",
            "--no-progress-bar",
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_PREFER_ENV_PATH": "1"}
        started = time.time()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
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
    found = {"papermill and the kernel start": before[0][1] - started}
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

    def seconds() -> float:
        return float(
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        )

    return statistics.median(seconds() for _ in range(7))
