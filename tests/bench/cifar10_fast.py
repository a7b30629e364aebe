"""The recipe params/cifar10_fast.yaml beside a plain ResNet-18 of as many epochs: test accuracy over seeds.

    python -m tests.bench.cifar10_fast [--data FOLDER] [--device cpu]

FOLDER holds class folders; without it torchvision fetches the lossless set. Not a part of ``make bench``, which needs
no data of its own. On a CPU it is reduced in scale: a 25th of the images, four epochs, smaller batches, bf16 for both.
"""

from __future__ import annotations

import argparse
import statistics

import pandas as pd
import torch
from scipy import stats

from pa_core.device import resolve_device
from pa_core.experiment import run
from pa_core.files import read_yaml
from pa_core.params import Experiment
from pa_core.runs import Run
from tests.bench import harness

RECIPE = harness.ROOT / "params" / "cifar10_fast.yaml"
REDUCED = {"train_fraction": 0.04, "schedule": "4", "precision": "bf16"}
REDUCED_RECIPE = REDUCED | {"batch_size": 64, "lr": 0.1}
"""Steps of 512 would be four an epoch; the rate is lower than linear scaling to 64 has it, as runs are short."""


def contenders(data: str | None, device: torch.device) -> dict[str, Experiment]:
    where = {"device": str(device)} | ({"dataset": "folder", "data_dir": data} if data else {})
    recipe = Experiment.from_mapping(read_yaml(RECIPE)).replace(**where)
    same = ("dataset", "data_dir", "image_size", "folds", "schedule", "augment", "device")
    plain = Experiment(model="resnet18", **{name: getattr(recipe, name) for name in same})
    if device.type != "cuda":
        recipe, plain = recipe.replace(**REDUCED_RECIPE), plain.replace(**REDUCED)
    return {"recipe (resnet9, sgd)": recipe, "plain (resnet18, adamw)": plain}


def row(name: str, done: list[Run], *, data: str, device: torch.device) -> dict[str, object]:
    """Mean over seeds, and the half-width of its 95 % interval (Student's t)."""
    accuracy = [r.summary["test_accuracy"] for r in done]
    half = stats.t.ppf(0.975, len(done) - 1) * statistics.stdev(accuracy) / len(done) ** 0.5
    manifest = done[0].manifest
    return {
        "contender": name,
        "device": harness.device_name(device),
        "threads": torch.get_num_threads(),
        "data": data,
        "n_train": done[0].summary["n_train"],
        "n_test": done[0].summary["n_test"],
        "epochs": done[0].summary["epochs"],
        "batch_size": manifest["batch_size"],
        "precision": manifest["precision"],
        "seeds": len(done),
        "test_accuracy": round(statistics.mean(accuracy), 4),
        "interval_95": round(half, 4),
        "train_seconds": round(statistics.median(r.summary["train_seconds"] for r in done), 2),
        "versions": harness.versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cifar10_fast")
    parser.add_argument("--data", help="a folder of class folders; without it the lossless set of torchvision")
    parser.add_argument("--data-name", default="CIFAR-10", help="what the table calls it, such as 'CIFAR-10 (JPEG)'")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    device = resolve_device(options.device)
    named = contenders(options.data, device)
    done: dict[str, list[Run]] = {name: [] for name in named}
    for seed in range(options.seeds):
        for name, experiment in named.items():
            done[name].append(run(experiment.replace(seed=seed)))
    table = pd.DataFrame([row(name, runs, data=options.data_name, device=device) for name, runs in done.items()])
    table.to_csv(harness.csv_path("cifar10_fast", device=device), index=False)
    print(table.drop(columns="versions").to_string(index=False))


if __name__ == "__main__":
    main()
