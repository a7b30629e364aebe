"""Geometry, erasing and mixing of whole batches on their device, each sample with its own parameters.

Every kind draws from a generator of its own, on the CPU, and as many numbers as the batch has images, whatever their
maps are: adding a kind, or another map, changes no draw of another kind, and every device sees the same draws. To add a
kind: a function here, a line in :func:`change`, a name in `params.AUGMENTATIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pa_core.data import send
from pa_core.masking import to_float
from pa_core.params import AUGMENTATIONS, Experiment, derived_seed

Draws = Mapping[str, torch.Generator]
DEGREES = 15.0
PAD_SHARE = 8
"""A crop moves an image by up to an eighth of its side."""
ERASE_AREA = (0.02, 0.4)
ERASE_ASPECT = 0.3
"""Random erasing as in Zhong et al. 2020: 2 to 40 % of the area, height : width from 0.3 to 1 / 0.3."""
CANDIDATES = 8
"""Places that are drawn for each erased rectangle; `erase_region` chooses among them."""
FLAT = 0.2
"""Part of a map that is spread evenly before labels are mixed by it, so that no share is 0 everywhere."""
HARDLY_VISIBLE = 0.25
"""Where the two images of a cutmix pair show less than this of their maps together, the area decides alone."""


def generators(seed: int, epoch: int) -> Draws:
    """A CPU generator for each kind of random draw, by name, seeded anew in each epoch."""
    names = (*AUGMENTATIONS, "cutmix or mixup", "proxy", "patch", "noise")
    return {name: torch.Generator().manual_seed(derived_seed(seed, name, epoch)) for name in names}


def change(
    images: Tensor, labels: Tensor, maps: Tensor | None, *, classes: int, experiment: Experiment, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Erase and mix: the images, and the targets.

    Args:
        images: float32 [n, 3, S, S] in [0, 1].
        labels: int64 [n].
        maps: float32 [n, S, S] in [0, 1], 0 everywhere for an image without one; None where no kind uses them.

    Returns:
        images; int64 [n], or where labels are mixed float32 [n, classes] with rows that sum to 1.
    """
    e = experiment
    if "erase" in e.augmentations:
        images = erase(images, maps, region=e.erase_region, probability=e.erase_probability, draws=draws["erase"])
    mixed, by = [], (maps if e.mix_labels == "attention" else None)
    if "cutmix" in e.augmentations:
        mixed.append(cutmix(images, by, probability=e.mix_probability, alpha=e.cutmix_alpha, draws=draws["cutmix"]))
    if "mixup" in e.augmentations:
        mixed.append(mixup(images, probability=e.mix_probability, draws=draws["mixup"]))
    if not mixed:
        return images, labels
    images, partner, share = mixed[0]
    if len(mixed) == 2:  # each image gets one or the other
        first = send(torch.rand(len(images), generator=draws["cutmix or mixup"]) < 0.5, images.device)
        images = torch.where(first[:, None, None, None], images, mixed[1][0])
        partner, share = (torch.where(first, a, b) for a, b in zip(mixed[0][1:], mixed[1][1:], strict=True))
    return images, soft_labels(labels, partner, share, classes=classes)


def soft_labels(labels: Tensor, partner: Tensor, share: Tensor, *, classes: int) -> Tensor:
    """``share[i]`` of the label of image i, and of that of image ``partner[i]`` the rest: float32 [n, classes]."""
    soft = torch.zeros(len(labels), classes, device=labels.device)
    soft.scatter_(1, labels[:, None], share[:, None])
    return soft.scatter_add_(1, labels[partner][:, None], 1 - share[:, None])


# Geometry


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """Where each image of a batch is moved; None for what is not done. On the CPU."""

    degrees: Tensor | None  # float32 [n], counter-clockwise about the centre
    offset: Tensor | None  # int64 [n, 2], down and right, of a crop
    flipped: Tensor | None  # bool [n], mirrored left to right

    @classmethod
    def draw(cls, n: int, size: int, *, kinds: frozenset[str], draws: Draws) -> Geometry:
        """Rotate by -15 to 15 degrees, drawn evenly; crop after padding by S // 8 (reflected); flip half of them."""
        degrees = offset = flipped = None
        if "rotate" in kinds:
            degrees = (torch.rand(n, generator=draws["rotate"]) * 2 - 1) * DEGREES
        if "crop" in kinds:
            pad = size // PAD_SHARE
            offset = torch.randint(-pad, pad + 1, (n, 2), generator=draws["crop"])
        if "flip" in kinds:
            flipped = torch.rand(n, generator=draws["flip"]) < 0.5
        return cls(degrees=degrees, offset=offset, flipped=flipped)

    def of(self, rows: Tensor) -> Geometry:
        """The geometry of some images, int64 [m] on the CPU."""
        return Geometry(**{name: None if drawn is None else drawn[rows] for name, drawn in vars(self).items()})

    def apply(self, images: Tensor) -> Tensor:
        """Images uint8 [n, 3, S, S] or maps float [n, S, S], moved. Flips and crops change no value."""
        if images.ndim == 3:
            return self.apply(images.unsqueeze(1)).squeeze(1)
        n, size = len(images), images.shape[-1]
        if self.degrees is not None:
            images = _rotate(images, self.degrees)
        if self.offset is None and self.flipped is None:
            return images
        row = column = torch.arange(size).expand(n, size)
        if self.offset is not None:
            row, column = (_reflect(row + shift[:, None], size) for shift in self.offset.T)
        if self.flipped is not None:
            column = torch.where(self.flipped[:, None], size - 1 - column, column)
        place = send(row[:, :, None] * size + column[:, None, :], images.device).view(n, 1, -1)
        return images.flatten(2).gather(2, place.expand(-1, images.shape[1], -1)).view_as(images)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices outside of 0 .. size - 1, mirrored at the outermost: -1 -> 1, size -> size - 2."""
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Each image turned counter-clockwise about its centre; bilinear, reflected at the borders."""
    angle = degrees * (math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # From places in the output to places in the input, y downwards.
    theta = send(torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3), images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    turned = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return turned.round_().clamp_(0, 255).to(images.dtype) if images.dtype == torch.uint8 else turned


# Erasing


def erase(images: Tensor, maps: Tensor | None, *, region: str, probability: float, draws: torch.Generator) -> Tensor:
    """Random erasing (Zhong et al. 2020, RE-R): a rectangle is replaced by noise.

    Its area is 2 to 40 % of the image, drawn evenly, its aspect ratio within 0.3 to 1 / 0.3 and such that it fits,
    drawn evenly on a log scale. Eight places are drawn for it: ``anywhere`` takes the first, ``attended`` the one with
    the highest mean of the map, ``spared`` the lowest (KeepAugment, Gong et al. 2021); an image without a map the
    first. The noise (0 to 1 in each pixel and channel) is drawn once a batch. Shapes as in :func:`change`.
    """
    n, size = len(images), images.shape[-1]
    coin, area, aspect = torch.rand(3, n, generator=draws)
    places = torch.rand(2, CANDIDATES, n, generator=draws)
    noise = torch.randint(0, 256, images.shape[1:], generator=draws, dtype=torch.uint8)
    sides = _sides(area, aspect, size)
    begins = [(draw * (size - side + 1)).floor().minimum(size - side) for draw, side in zip(places, sides, strict=True)]
    ends = [begin + side for begin, side in zip(begins, sides, strict=True)]
    boxes = send(torch.stack([begins[0], ends[0], begins[1], ends[1]]).long(), images.device)
    box = boxes[:, 0]
    if region != "anywhere" and maps is not None:
        sums = _box_sums(maps, boxes)
        best = sums.argmax(0) if region == "attended" else sums.argmin(0)
        best = torch.where(sums.amax(0) > sums.amin(0), best, 0)
        box = boxes.gather(1, best.expand(4, 1, n)).squeeze(1)
    erased = _inside(box, size) & send(coin < probability, images.device)[:, None, None, None]
    return torch.where(erased, to_float(send(noise, images.device)), images)


def _sides(area: Tensor, aspect: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Uniform draws [n] -> height and width in pixels, whole numbers from 1 to S."""
    low, high = ERASE_AREA
    area = low + (high - low) * area
    # Zhong et al. draw again until the rectangle fits; these limits of the aspect ratio make every one fit
    least, most = area.clamp(min=ERASE_ASPECT).log(), (1 / area).clamp(max=1 / ERASE_ASPECT).log()
    ratio = (least + (most - least) * aspect).exp()
    height, width = ((size * side.sqrt()).round().clamp(1, size) for side in (area * ratio, area / ratio))
    return height, width


def _box_sums(maps: Tensor, boxes: Tensor) -> Tensor:
    """Sum of each map over its boxes: [n, S, S], int64 [4, k, n] -> [k, n]."""
    rows, columns = _spans(boxes, maps.shape[-1])
    return torch.einsum("kny,nyx,knx->kn", rows.float(), maps, columns.float())


def _spans(boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of rectangles int64 [4, ...] (top, bottom, left, right): bool [..., S] each."""
    place = torch.arange(size, device=boxes.device)
    top, bottom, left, right = boxes[..., None]
    return (place >= top) & (place < bottom), (place >= left) & (place < right)


def _inside(box: Tensor, size: int) -> Tensor:
    """Rectangles int64 [4, n] -> bool [n, 1, S, S]."""
    rows, columns = _spans(box, size)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


# Mixing: -> images, partner int64 [n] within the batch, share float32 [n] of the own label


def cutmix(
    images: Tensor, maps: Tensor | None, *, probability: float, alpha: float, draws: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A rectangle with its centre anywhere shows another image of the batch (Yun et al. 2019).

    Its share of the image is 1 - s, s from Beta(alpha, alpha); where the border cuts it off, less. The label counts
    the share of pixels left. With maps it counts half of that and half of ``rho_i / (rho_i + rho_j)``, rho the visible
    share of each image's map (SnapMix, Huang et al. 2021; Saliency Grafting, Park et al. 2022); each map is normalised
    to sum 1 and mixed with a flat part of 0.2. An image without a map has a flat one: with flat maps this is CutMix.
    """
    from scipy.special import betaincinv  # here, because every start of a run imports this module

    n, size = len(images), images.shape[-1]
    partner = torch.randperm(n, generator=draws)
    share, y, x, coin = torch.rand(4, n, generator=draws)
    share = torch.from_numpy(betaincinv(alpha, alpha, share.double().numpy())).float()
    box = _cut(torch.where(coin < probability, share, 1.0), y, x, size)
    area = send(1 - (box[1] - box[0]) * (box[3] - box[2]) / size**2, images.device)
    inside, partner = _inside(send(box, images.device), size), send(partner, images.device)
    mixed = torch.where(inside, images[partner], images)
    if maps is None:
        return mixed, partner, area
    total = maps.sum((1, 2), keepdim=True)
    own = torch.where(total > 0, maps / torch.where(total > 0, total, 1), 1 / size**2)
    spread = (1 - FLAT) * own + FLAT / size**2
    kept, shown = (spread * ~inside[:, 0]).sum((1, 2)), (spread[partner] * inside[:, 0]).sum((1, 2))
    by_map = torch.where(kept + shown < HARDLY_VISIBLE, area, kept / (kept + shown))
    return mixed, partner, (area + by_map) / 2


def mixup(images: Tensor, *, probability: float, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """``s * image + (1 - s) * partner``, s drawn evenly from [0, 1] (Zhang et al. 2018, Beta(1, 1))."""
    n = len(images)
    partner = send(torch.randperm(n, generator=draws), images.device)
    share, coin = torch.rand(2, n, generator=draws)
    share = send(torch.where(coin < probability, share, 1.0), images.device)
    return torch.lerp(images[partner], images, share[:, None, None, None]), partner, share


def _cut(share: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """Rectangles int64 [4, n] (top, bottom, left, right) of ``1 - share`` of the area, cut off at the border."""
    half = (size * (1 - share).sqrt() / 2)[None]
    centre = torch.stack([y, x]) * size
    low, high = ((centre + sign * half).round().clamp(0, size) for sign in (-1, 1))
    return torch.stack([low[0], high[0], low[1], high[1]]).long()
