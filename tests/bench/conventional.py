"""An epoch the usual way: PIL decodes each image, torchvision's transforms change it, in a DataLoader with workers.

That is the reference, and how the predecessor trains, in fp32: files are decoded and resized in every epoch, the
network and the optimizer are as PyTorch gives them, and the loss is read in every step. ``pa_core`` trains the same
network on the same JPEG files, decoded once before; what that took is not part of its rate and stands in its own row.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from pa_core import data, models
from pa_core.batch import Pool
from pa_core.params import Experiment
from tests.bench import harness, synthetic

CASES = {
    "cpu": (("test_resnet", 28, 64, 1280), ("resnet18", 64, 64, 256)),
    "cuda": (("resnet18", 64, 512, 20_000), ("resnet18", 224, 128, 6000)),
}
"""Network, image size, batch, images."""
STORED = (256, 192)
"""Width and height of the JPEG files."""


def run(device: torch.device, rounds: int) -> list[harness.Row]:
    table = []
    for name, size, batch, n in CASES["cuda" if device.type == "cuda" else "cpu"]:
        with tempfile.TemporaryDirectory() as folder:
            made, decoding = contenders(Path(folder), name, size=size, batch=batch, n=n, device=device)
            rates = harness.interleave(made, device=device, rounds=rounds) | {"decoding once": decoding}
        table += harness.rows(f"{name} at {size}, batch {batch}", rates, reference="conventional", device=device)
    return table


def pictures(folder: Path, *, n: int) -> None:
    """JPEG files that compress like photographs: smooth shapes and a little noise."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / "train" / str(i % synthetic.CLASSES) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            STORED, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(shapes) + rng.normal(0, 6, (STORED[1], STORED[0], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=85)


def contenders(
    folder: Path, name: str, *, size: int, batch: int, n: int, device: torch.device
) -> tuple[dict[str, Callable[[], int]], float]:
    """The two, and how many images a second are decoded into the cache."""
    pictures(folder / "images", n=n)
    with mock.patch.dict(os.environ, PA_DATA=str(folder / "cache")):
        started = time.perf_counter()
        dataset = data.load(dataset="folder", data_dir=str(folder / "images"), image_size=size, folds=10)
        decoding = n / (time.perf_counter() - started)
    pool = Pool.of(dataset.train.on(device))
    ours = synthetic.training(pool, Experiment(model=name), device=device, batch=batch)
    usual = conventional(folder / "images" / "train", name, size=size, batch=batch, device=device)
    return {"conventional": usual, harness.OURS: ours}, decoding


def conventional(folder: Path, name: str, *, size: int, batch: int, device: torch.device) -> Callable[[], int]:
    model = models.create(name, classes=synthetic.CLASSES, image_size=size).network.to(device).train()
    config = model.pretrained_cfg
    steps = [
        transforms.Resize((size, size)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomCrop(size, padding=size // 8, padding_mode="reflect"),
        transforms.ToTensor(),
        transforms.Normalize(config["mean"], config["std"]),
    ]
    loader = DataLoader(
        datasets.ImageFolder(str(folder), transforms.Compose(steps)),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        pin_memory=device.type == "cuda",
        persistent_workers=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def epoch() -> int:
        seen, total = 0, 0.0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
            seen += len(images)
        return seen

    return epoch
