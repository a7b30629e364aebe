"""How long ``results.load`` takes on 10,000 runs: the first time, again, and with a row per epoch."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch

from pa_core.lab import results
from pa_core.params import SCHEMA, Experiment
from tests.bench import harness

RUNS, EPOCHS = 10_000, 40


def synthetic(home: Path, count: int) -> None:
    """``count`` finished runs of 40 epochs, with manifests of the size that real ones have."""
    row = {"stage": 0, "train_loss": 0.5123456789, "train_accuracy": 0.8123, "val_loss": 0.6123456789, "lr": 1e-3}
    row |= {"val_accuracy": 0.7123, "images_per_second": 1234.5678, "seconds": 2.3456789}
    metrics = "".join(json.dumps({"epoch": epoch} | row) + "\n" for epoch in range(1, EPOCHS + 1))
    summary = dict.fromkeys(results.MEASURED, 0.5 + 1e-09) | {"epochs": EPOCHS}
    for number in range(count):
        experiment = Experiment(seed=number, schedule="20,p,20", threshold=(number % 100) / 100)
        path = home / f"fashion-mini_test-resnet_20-p-20_{number:012x}"
        path.mkdir(parents=True)
        manifest = {
            "schema": SCHEMA,
            "digest": f"{number:064x}",
            "parameters": experiment.to_dict(),
            "effective": experiment.effective(),
            "status": "finished",
            "started": f"2025-01-01T{number // 3600 % 24:02}:{number // 60 % 60:02}:{number % 60:02}+00:00",
            "code_version": "0123456789abcdef",
            "split_digest": "1" * 64,
            "data_digest": "2" * 64,
            "device_name": "CPU x86_64",
            "precision": "float32",
            "batch_size": 64,
            "image_size": 28,
            "weights_digest": "",
            "classes": [f"class {c}" for c in range(100)],
            "model": {"changes": ["layer1.0.conv1: stride 2 to 1"] * 8},
        }
        (path / "manifest.json").write_text(json.dumps(manifest, indent=2))
        (path / "summary.json").write_text(json.dumps(summary, indent=2))
        (path / "metrics.jsonl").write_text(metrics)


def run(device: torch.device, rounds: int) -> list[harness.Row]:
    with tempfile.TemporaryDirectory() as folder:
        synthetic(Path(folder), RUNS)
        values = {}
        for what, options in (("the first time", {}), ("again", {}), ("a row per epoch", {"epochs": True})):
            started = time.perf_counter()
            results.load(folder, **options)
            values[what] = time.perf_counter() - started
    return harness.rows(f"results.load: {RUNS:,} runs", values, reference="the first time", device=device, unit="s")
