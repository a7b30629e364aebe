"""What each stage of a schedule trains on, and from which images its proxy step may choose.

``clean`` (the default): all training images, some as proxies, the same in every stage. ``thesis``: what the
predecessor's published code does, to see what its numbers are made of. Every stage, ``p`` included, draws a share
(``train_fraction``) of the images and halves them, stratified, while the weights carry over: it trains on one half and
reports the accuracy on the other. ``p`` trains for an epoch, too; at its end a fraction of the images of its training
half that the network gets wrong, in random order, become proxies. Those lie beside their originals from then on, but
only a ``p`` stage reads them. ``thesis_text``: every stage after ``p`` trains on them in the place of their originals;
the half that is reported on has originals.

Here the draws are seeded and of the training part alone, never of test or validation images. Not replayed: stages that
grow and shrink with the proxies; wrong images found during the epoch instead of after it; proxies made of random crops
and of proxies; a learning rate of 8e-5, random crops and a weight decay of 1e-5, which parameters set here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pa_core import proxy, schedule
from pa_core.batch import Pool
from pa_core.data import Part
from pa_core.params import Experiment, derived_seed


class Stage(NamedTuple):
    """Where the images of a stage come from."""

    training: Pool  # an epoch draws :func:`epoch_size` of its entries
    reported: Pool | None = None  # those whose accuracy the predecessor reports
    candidates: Tensor | None = None  # int64, positions that its proxy step may choose from; None for all


def stage(part: Part, experiment: Experiment, *, number: int, steps: Sequence[proxy.Step]) -> Stage:
    """What stage ``number`` (`schedule.Event.stage`) trains on, with the maps of some proxy steps, the earliest first.

    Seed, number and maps alone decide it, so that a resumed run gets the same.
    """
    e, pool, originals = experiment, proxy.pool(part, experiment, steps), Pool.of(part)
    if e.protocol == "clean":  # always all images
        return Stage(pool)
    events = schedule.parse(e.schedule, p_trains=True)
    if e.protocol == "thesis" and not any(event.kind == schedule.PROXY and event.stage == number for event in events):
        pool = originals
    seed = derived_seed(e.seed, "halves", number)
    training, reported = halves(pool.labels, count=subset_size(len(part), e), seed=seed)
    reported_from = pool if e.protocol == "thesis" else originals
    return Stage(pool.take(training), reported_from.take(reported), candidates=training[training < len(part)])


def halves(labels: Tensor, *, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` positions of labels int64 [N], drawn at random and halved, each class as evenly as possible."""
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    by_class = drawn[labels[drawn].argsort(stable=True)]
    return by_class[0::2], by_class[1::2]


def subset_size(n: int, experiment: Experiment) -> int:
    """Images that a stage of the predecessor's protocol draws and halves, of ``n`` training images."""
    return round(experiment.train_fraction * n)


def epoch_size(n: int, experiment: Experiment) -> int:
    """Images per epoch, of ``n`` training images: the same in every stage, whatever proxies there are."""
    return n if experiment.protocol == "clean" else -(-subset_size(n, experiment) // 2)
