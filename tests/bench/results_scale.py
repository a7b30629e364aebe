"""How long ``results.load`` takes on many runs: the first time, and again.

    python -m tests.bench.results_scale [RUNS]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from pa_core import results
from pa_core.params import Experiment

EPOCHS = 40


def synthetic(home: Path, count: int) -> None:
    """``count`` finished runs of 40 epochs, with manifests of the size that real ones have."""
    row = {"stage": 0, "train_loss": 0.5123456789, "train_accuracy": 0.8123, "val_loss": 0.6123456789, "lr": 1e-3}
    row |= {"val_accuracy": 0.7123, "images_per_second": 1234.5678, "seconds": 2.3456789}
    metrics = "".join(json.dumps({"epoch": epoch} | row) + "\n" for epoch in range(1, EPOCHS + 1))
    summary = {name: 0.5 + 1e-9 for name in results.MEASURED} | {"epochs": EPOCHS}
    for number in range(count):
        experiment = Experiment(seed=number, schedule="20,p,20", threshold=(number % 100) / 100)
        path = home / f"fashion-mini_test-resnet_20-p-20_{number:012x}"
        path.mkdir(parents=True)
        manifest = {
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


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        synthetic(Path(folder), count)
        time.sleep(results._SETTLED)
        for what, options in (("first", {}), ("again", {}), ("again", {}), ("a row per epoch", {"epochs": True})):
            started = time.perf_counter()
            frame = results.load(folder, **options)
            print(f"{count} runs, {what}: {len(frame)} rows in {time.perf_counter() - started:.2f} s", flush=True)


if __name__ == "__main__":
    main()
