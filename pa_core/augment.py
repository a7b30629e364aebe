"""Geometry, erasing and mixing of whole batches on their device, each sample with its own parameters.

Every kind draws from a generator of its own, on the CPU and as many numbers as the batch has images, whatever their
maps are: adding a kind, or changing what a map says, changes no draw of another kind, and every device sees the same
draws.

To add a kind: a function here, a line in :func:`change`, a name in `coerce.AUGMENTATIONS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional as F

from pa_core.data import send
from pa_core.masking import to_float
from pa_core.params import Experiment, derived_seed

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


class Generators:
    """A CPU generator for each kind, begun anew in each epoch."""

    def __init__(self, seed: int, epoch: int):
        self._seed, self._epoch = seed, epoch
        self._made: dict[str, torch.Generator] = {}

    def __getitem__(self, kind: str) -> torch.Generator:
        if kind not in self._made:
            self._made[kind] = torch.Generator().manual_seed(derived_seed(self._seed, kind, self._epoch))
        return self._made[kind]


@dataclass(frozen=True, kw_only=True, eq=False)
class Maps:
    """Maps of those images of a batch that have one.

    Attributes:
        rows: int64 [m], positions in the batch, on the device.
        values: float32 [m, S, S] in [0, 1].
    """

    rows: Tensor
    values: Tensor

    @classmethod
    def none(cls, images: Tensor) -> Maps:
        return cls(rows=torch.zeros(0, dtype=torch.long, device=images.device), values=images.new_zeros((0, 1, 1)))

    def at(self, chosen: Tensor, rows: Tensor) -> Maps:
        """Some of them: ``chosen``, int64 on the CPU, of ``rows``, the same positions on the CPU."""
        if len(chosen) == len(rows):
            return self
        there = send(chosen, self.rows.device)
        return Maps(rows=self.rows[there], values=self.values[there])


def change(images: Tensor, maps: Maps, *, experiment: Experiment, draws: Generators) -> tuple[Tensor, Mixing | None]:
    """Erased and mixed images float32 [n, 3, S, S] in [0, 1], and what was mixed, if anything was."""
    e = experiment
    if "erase" in e.augmentations:
        images = erase(images, maps, region=e.erase_region, probability=e.erase_probability, generator=draws["erase"])
    return mix(images, maps, experiment=e, draws=draws)


# Geometry


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """Where each image of a batch is moved; None for what is not done.

    Attributes:
        degrees: float32 [n], counter-clockwise about the centre.
        offset: int64 [2, n], down and right, of a crop.
        flipped: bool [n], left to right.
    """

    degrees: Tensor | None
    offset: Tensor | None
    flipped: Tensor | None

    @classmethod
    def draw(cls, n: int, size: int, *, kinds: frozenset[str], draws: Generators) -> Geometry:
        """Rotate by -15 to 15 degrees, drawn evenly; crop after padding by S // 8 (reflected); flip every second."""
        degrees = offset = flipped = None
        if "rotate" in kinds:
            degrees = (torch.rand(n, generator=draws["rotate"]) * 2 - 1) * DEGREES
        if "crop" in kinds:
            pad = size // PAD_SHARE
            offset = torch.randint(-pad, pad + 1, (2, n), generator=draws["crop"])
        if "flip" in kinds:
            flipped = torch.rand(n, generator=draws["flip"]) < 0.5
        return cls(degrees=degrees, offset=offset, flipped=flipped)

    def of(self, rows: Tensor) -> Geometry:
        """That of some images, int64 [m] on the CPU."""
        return Geometry(
            degrees=None if self.degrees is None else self.degrees[rows],
            offset=None if self.offset is None else self.offset[:, rows],
            flipped=None if self.flipped is None else self.flipped[rows],
        )

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
            row, column = (_reflect(row + shift[:, None], size) for shift in self.offset)
        if self.flipped is not None:
            column = torch.where(self.flipped[:, None], size - 1 - column, column)
        return _pick(images, send(row, images.device), send(column, images.device))


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices outside of 0 .. size - 1, mirrored at the outermost: -1 -> 1, size -> size - 2."""
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)


def _pick(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """``out[i, c, y, x] = images[i, c, row[i, y], column[i, x]]`` for row, column [n, S]."""
    n, channels, size, _ = images.shape
    flat = (row[:, :, None] * size + column[:, None, :]).view(n, 1, size * size)
    return images.flatten(2).gather(2, flat.expand(n, channels, -1)).view_as(images)


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


def erase(images: Tensor, maps: Maps, *, region: str, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing (Zhong et al. 2020, RE-R): a rectangle is replaced by noise.

    Its area is 2 to 40 % of the image, drawn evenly, its aspect ratio within 0.3 to 1 / 0.3 and such that it fits,
    drawn evenly on a log scale. Eight places are drawn for it: ``anywhere`` takes the first, ``attended`` the one with
    the highest mean of the map, ``spared`` the lowest (KeepAugment, Gong et al. 2021); an image without a map the
    first. The noise (0 to 1 in each pixel and channel) is drawn once a batch.

    Args:
        images: float32 [n, 3, S, S] in [0, 1].
    """
    n, size = len(images), images.shape[-1]
    coin, area, aspect = torch.rand(3, n, generator=generator)
    places = torch.rand(2, CANDIDATES, n, generator=generator)
    noise = torch.randint(0, 256, images.shape[1:], generator=generator, dtype=torch.uint8)
    height, width = _sides(area, aspect, size)
    top, left = (
        (draw * (size - side + 1)).floor().minimum(size - side)
        for draw, side in zip(places, (height, width), strict=True)
    )
    boxes = send(
        torch.stack([top, top + height.expand_as(top), left, left + width.expand_as(left)]).long(), images.device
    )
    chosen = torch.zeros(n, dtype=torch.long, device=images.device)
    if region != "anywhere" and len(maps.rows):
        sums = _box_sums(maps.values, boxes[:, :, maps.rows])
        best = sums.argmax(0) if region == "attended" else sums.argmin(0)
        chosen = chosen.index_copy(0, maps.rows, best)
    box = boxes.gather(1, chosen.expand(4, 1, n)).squeeze(1)
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
    """Sum of each map over its boxes: [m, S, S], int64 [4, k, m] -> [k, m]."""
    rows, columns = _sides_of(boxes, maps.shape[-1])
    return torch.einsum("kmy,myx,kmx->km", rows.float(), maps, columns.float())


def _sides_of(boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of rectangles int64 [4, ...] (top, bottom, left, right): bool [..., S] each."""
    place = torch.arange(size, device=boxes.device)
    top, bottom, left, right = boxes[..., None]
    return (place >= top) & (place < bottom), (place >= left) & (place < right)


def _inside(box: Tensor, size: int) -> Tensor:
    """Rectangles int64 [4, n] -> bool [n, 1, S, S]."""
    rows, columns = _sides_of(box, size)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


# Mixing


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixing:
    """What was mixed: the label of image i counts ``share[i]``, that of image ``partner[i]`` the rest.

    Attributes:
        partner: int64 [n], positions within the batch.
        share: float32 [n] in [0, 1].
    """

    partner: Tensor
    share: Tensor

    def targets(self, labels: Tensor, *, classes: int) -> Tensor:
        """Labels int64 [n] -> soft labels, float32 [n, classes], each row sums to 1."""
        soft = torch.zeros(len(labels), classes, device=labels.device)
        soft.scatter_(1, labels[:, None], self.share[:, None])
        return soft.scatter_add_(1, labels[self.partner][:, None], 1 - self.share[:, None])


def mix(images: Tensor, maps: Maps, *, experiment: Experiment, draws: Generators) -> tuple[Tensor, Mixing | None]:
    """Images [n, 3, S, S] mixed with others of their batch; with both kinds each image gets one or the other."""
    e, kinds = experiment, experiment.augmentations
    mixed: list[tuple[Tensor, Mixing]] = []
    if "cutmix" in kinds:
        by = maps if e.mix_labels == "attention" else None
        how = {"probability": e.mix_probability, "alpha": e.cutmix_alpha, "generator": draws["cutmix"]}
        mixed.append(cutmix(images, by, **how))
    if "mixup" in kinds:
        mixed.append(mixup(images, probability=e.mix_probability, generator=draws["mixup"]))
    if len(mixed) < 2:
        return mixed[0] if mixed else (images, None)
    (cut, first), (blend, second) = mixed
    either = send(torch.rand(len(images), generator=draws["cutmix or mixup"]) < 0.5, images.device)
    share, partner = torch.where(either, first.share, second.share), torch.where(either, first.partner, second.partner)
    return torch.where(either[:, None, None, None], cut, blend), Mixing(partner=partner, share=share)


def cutmix(
    images: Tensor, maps: Maps | None, *, probability: float, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Mixing]:
    """A rectangle with its centre anywhere shows another image of the batch (Yun et al. 2019).

    Its share of the image is 1 - s, s from Beta(alpha, alpha); where the border cuts it off, less. The label counts
    the share of pixels left. With maps it counts half of that and half of ``rho_i / (rho_i + rho_j)``, rho the visible
    share of each image's map (SnapMix, Huang et al. 2021; Saliency Grafting, Park et al. 2022); each map is normalised
    to sum 1 and mixed with a flat part of 0.2. An image without a map has a flat one: with flat maps this is CutMix.

    Args:
        maps: None where areas alone decide.
        probability: that an image is mixed.
    """
    n, size = len(images), images.shape[-1]
    partner = torch.randperm(n, generator=generator)
    share, y, x, coin = torch.rand(4, n, generator=generator)
    share = torch.from_numpy(betaincinv(alpha, alpha, share.double().numpy())).float()
    box = _cut(torch.where(coin < probability, share, 1.0), y, x, size)
    area = send((1 - (box[1] - box[0]) * (box[3] - box[2]) / size**2), images.device)
    inside, partner = _inside(send(box, images.device), size), send(partner, images.device)
    mixed = torch.where(inside, images[partner], images)
    if maps is None:
        return mixed, Mixing(partner=partner, share=area)
    spread = _spread(maps, n, size)
    own, other = (spread * ~inside[:, 0]).sum((1, 2)), (spread[partner] * inside[:, 0]).sum((1, 2))
    by_map = torch.where(own + other < HARDLY_VISIBLE, area, own / (own + other))
    return mixed, Mixing(partner=partner, share=(area + by_map) / 2)


def _spread(maps: Maps, n: int, size: int) -> Tensor:
    """A map for each image [n, S, S] that sums to 1: its own with a flat part, or a flat one."""
    flat = torch.full((n, size, size), 1 / size**2, device=maps.values.device)
    if not len(maps.rows):
        return flat
    total = maps.values.sum((1, 2), keepdim=True)
    own = torch.where(total > 0, maps.values / torch.where(total > 0, total, 1), 1 / size**2)
    return flat.index_copy(0, maps.rows, (1 - FLAT) * own + FLAT / size**2)


def mixup(images: Tensor, *, probability: float, generator: torch.Generator) -> tuple[Tensor, Mixing]:
    """``s * image + (1 - s) * partner``, s drawn evenly from [0, 1] (Zhang et al. 2018, Beta(1, 1))."""
    n = len(images)
    partner = torch.randperm(n, generator=generator)
    share, coin = torch.rand(2, n, generator=generator)
    share = send(torch.where(coin < probability, share, 1.0), images.device)
    partner = send(partner, images.device)
    return torch.lerp(images[partner], images, share[:, None, None, None]), Mixing(partner=partner, share=share)


def _cut(share: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """Rectangles int64 [4, n] (top, bottom, left, right) of ``1 - share`` of the area, cut off at the border."""
    half = (size * (1 - share).sqrt() / 2)[None]
    centre = torch.stack([y, x]) * size
    low, high = ((centre + sign * half).round().clamp(0, size) for sign in (-1, 1))
    return torch.stack([low[0], high[0], low[1], high[1]]).long()
