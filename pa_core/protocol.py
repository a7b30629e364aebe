"""What each stage of a schedule trains on, and from which images its proxy step may choose.

``clean`` (the default): all training images, some as proxies, the same in every stage.

``thesis``: what the predecessor's published code does, to see what its numbers are made of. Every stage, ``p``
included, draws a share (``train_fraction``) of the images and halves them, stratified, while the weights carry over:
it trains on one half, and the accuracy on the other is what it reports. ``p`` trains for an epoch, too; at its end a
fraction of the images of its training half that the network gets wrong, in random order, become proxies. Those lie
beside their originals from then on, but only a ``p`` stage reads them, so that the stages between train on none.
``thesis_text`` differs in the proxies alone: as the text has it, every stage after ``p`` trains on them in the place
of their originals; the half that is reported on has originals.

Here the draws are seeded, and only the training part is drawn from: test images and this package's own validation
images are never trained on. The learning rate is not part of the protocol: the predecessor's stays at 8e-5, here `lr`
and `scheduler` set it. What is not replayed:

- the predecessor's wrong images are those of the forward passes during the epoch, here of one pass after it; its
  proxies are made of their random crops, and a proxy that is wrong again is masked again, here only originals are;
- its p stages grow with the proxies where the subset has room for them, and its numbered stages shrink by those that
  were drawn and dropped; here every stage has as many images;
- it crops and resizes at random, with a weight decay of 1e-5; here `augment` and `weight_decay` set this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pa_core import proxy, schedule
from pa_core.batch import Pool
from pa_core.data import Part
from pa_core.errors import ParameterError
from pa_core.params import Experiment, derived_seed
from pa_core.proxy import Step


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """Where the images of a stage come from."""

    training: Pool  # an epoch draws :func:`draws` of its entries
    reported: Pool | None = None  # those whose accuracy the predecessor reports
    candidates: Tensor | None = None  # int64, positions that its proxy step may choose from; None for all


def stage(part: Part, experiment: Experiment, *, number: int, steps: Sequence[Step]) -> Stage:
    """What stage ``number`` (`schedule.Event.stage`) trains on, with the maps of some proxy steps, the earliest first.

    Seed, number and maps alone decide it, so that a resumed run gets the same.
    """
    e = experiment
    if e.protocol == "clean":
        return Stage(training=proxy.pool(part, e, steps))
    if e.protocol == "thesis":
        events = schedule.parse(e.schedule, p_trains=True)
        reads_proxies = any(event.kind == schedule.PROXY and event.stage == number for event in events)
        pool = reported_from = proxy.pool(part, e, steps if reads_proxies else [])
    else:
        pool, reported_from = proxy.pool(part, e, steps), Pool.of(part)
    seed = derived_seed(e.seed, "halves", number)
    training, reported = halves(pool.labels, count=_count(len(part), e), seed=seed)
    return Stage(
        training=pool.take(training),
        reported=reported_from.take(reported),
        candidates=training[training < len(part)],
    )


def halves(labels: Tensor, *, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` positions of labels int64 [N], drawn at random and halved, each class as evenly as possible."""
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    by_class = drawn[labels[drawn].argsort(stable=True)]
    return by_class[0::2], by_class[1::2]


def draws(n: int, experiment: Experiment) -> int:
    """Images per epoch, of ``n`` training images: the same in every stage, whatever proxies there are."""
    return n if experiment.protocol == "clean" else -(-_count(n, experiment) // 2)


def check(experiment: Experiment, n: int) -> None:
    """Raises ParameterError where there is nothing to halve."""
    if experiment.protocol != "clean" and _count(n, experiment) < 2:
        allowed = f"must be larger: it draws {_count(n, experiment)} of {n} images, and there must be two to halve"
        raise ParameterError("train_fraction", experiment.train_fraction, allowed)


def _count(n: int, experiment: Experiment) -> int:
    return round(experiment.train_fraction * n)
