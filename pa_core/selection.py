"""Scores -> the training images that a proxy step selects."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pa_core.params import derived_seed


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One forward pass over the training images, in eval mode without augmentation. All [N], on the CPU."""

    loss: Tensor  # cross-entropy, nats
    margin: Tensor  # logit of the label minus the highest other logit; negative when wrong
    entropy: Tensor  # of the predicted distribution, nats
    predicted: Tensor  # int64
    labels: Tensor  # int64


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of a batch: logits [N, C] float, labels [N] int64."""
    logits = logits.float()
    log_p = logits.log_softmax(1)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return Scores(
        loss=F.nll_loss(log_p, labels, reduction="none"),
        margin=own - logits.scatter(1, labels[:, None], float("-inf")).amax(1),
        entropy=-(log_p.exp() * log_p).sum(1),
        predicted=logits.argmax(1),
        labels=labels,
    )


def count(n: int, fraction: float) -> int:
    """How many of ``n`` images a fraction asks for: rounded, at least one."""
    return max(1, round(fraction * n))


def select(scores: Scores, *, by: str, fraction: float, seed: int = 0) -> Tensor:
    """Positions of the selected images, int64 [K], the first choice first; equal scores in the order of the images.

    ``by``: ``misclassified`` (the wrong ones, highest loss first; fewer when fewer are wrong), ``loss`` (highest),
    ``margin`` (lowest), ``entropy`` (highest), ``random``, ``easiest`` (lowest loss), ``all``. K is at most
    ``count(N, fraction)``; N for ``all``.
    """
    n = len(scores.loss)
    if by == "all":
        return torch.arange(n)
    keys = {"loss": -scores.loss, "misclassified": -scores.loss, "easiest": scores.loss}
    keys |= {"margin": scores.margin, "entropy": -scores.entropy}
    order = _shuffled(n, seed) if by == "random" else keys[by].argsort(stable=True)
    if by == "misclassified":
        order = order[scores.predicted[order] != scores.labels[order]]
    return order[: count(n, fraction)]


def some_wrong(scores: Scores, *, among: Tensor, fraction: float, seed: int) -> Tensor:
    """The predecessor's rule: a random ``fraction``, rounded up, of the misclassified images at positions int64 [n]."""
    wrong = among[scores.predicted[among] != scores.labels[among]]
    return wrong[_shuffled(len(wrong), seed)[: math.ceil(fraction * len(wrong))]]


def _shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(derived_seed(seed, "select")))
