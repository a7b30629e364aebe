"""Training on batches of each kind: plain, erased, mixed, and with proxies; and how long making such a batch takes.

An epoch of ``train.train_one_epoch`` on images on the device, flipped and cropped. Every image has a map where a kind
looks at maps; of ``proxies`` a fifth of the images are masked, of ``all proxies`` every one. ``made alone`` is
``batch.make`` without the network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pa_core import batch as batches
from pa_core import proxy
from pa_core.augment import generators
from pa_core.batch import Pool
from pa_core.data import Part, send
from pa_core.params import Experiment
from tests.bench import harness, synthetic

CASES = {
    "cpu": (("resnet18", 64, 64, 128, 6), ("test_resnet", 28, 64, 1280, 4)),
    "cuda": (("resnet18", 64, 512, 51_200, 8), ("test_resnet", 28, 64, 6400, 4)),
}
"""Network, image size, batch, images of an epoch, side of its class activation maps."""
ERASED, MIXED = {"augment": "flip,crop,erase"}, {"augment": "flip,crop,cutmix"}
PLAIN = "plain"
CONTENDERS: dict[str, tuple[dict[str, str], float]] = {
    PLAIN: ({}, 0),
    "erase, anywhere": (ERASED, 0),
    "erase, attended": (ERASED | {"erase_region": "attended", "fill": "none"}, 1),
    "erase, spared": (ERASED | {"erase_region": "spared", "fill": "none"}, 1),
    "cutmix": (MIXED, 0),
    "cutmix, attention": (MIXED | {"mix_labels": "attention", "fill": "none"}, 1),
    "proxies": ({}, 0.2),
    "all proxies": ({}, 1),
}
"""What is changed in the experiment, and the share of images that have a map."""
REFERENCES = {"erase": "erase, anywhere", "cutmix": "cutmix"}
"""Each kind that looks at maps is compared with the one that does not; all others with the plain batch."""


def run(device: torch.device, rounds: int) -> list[harness.Row]:
    table = []
    for name, size, batch, n, grid in CASES["cuda" if device.type == "cuda" else "cpu"]:
        part, trained, alone = synthetic.noise(n, size=size).on(device), {}, {}
        for what, (changes, share) in CONTENDERS.items():
            e = Experiment(model=name, **changes)
            pool = proxy.pool(part, e, [synthetic.step(part, share=share, grid=grid)] if share else [])
            trained[what] = synthetic.training(pool, e, device=device, batch=batch)
            alone[what] = making(part, pool, e, device=device, batch=batch)
        title = f"{name} at {size}, batch {batch}"
        # differences of a few hundredths are looked for, so that each is timed twice as often
        table += compared(title, harness.interleave(trained, device=device, rounds=2 * rounds), device)
        rates = harness.interleave(alone, device=device, rounds=2 * rounds)
        made = {what: 1e3 * batch / rate for what, rate in rates.items()}
        table += harness.rows(f"{title}, made alone", made, reference=PLAIN, unit="ms", device=device)
    return table


def compared(title: str, rates: dict[str, float], device: torch.device) -> list[harness.Row]:
    references = {what: REFERENCES.get(what.partition(",")[0], PLAIN) for what in rates}
    return [
        row
        for reference in dict.fromkeys(references.values())
        for row in harness.rows(title, rates, reference=reference, device=device)
        if references[row.contender] == reference
    ]


def making(part: Part, pool: Pool, e: Experiment, *, device: torch.device, batch: int) -> Callable[[], int]:
    """Work that makes ten batches and gives the number of images."""
    index = torch.arange(0, len(part), max(1, len(part) // batch))[:batch]
    images, labels, draws = part.read(index), send(part.labels[index], device), generators(0, 1)

    def work() -> int:
        for _ in range(10):
            batches.make(images, labels, classes=synthetic.CLASSES, pool=pool, index=index, experiment=e, draws=draws)
        return 10 * batch

    return work
