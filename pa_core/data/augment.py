"""Augmentation of whole batches on their device, each sample with its own parameters.

All parameters are drawn on the CPU and sent along without waiting (a few numbers per sample), so that
every device sees the same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pa_core.data.store import send
from pa_core.params import COERCE, ParameterError

DEGREES = 15.0
PAD_SHARE = 8
"""A crop moves an image by up to an eighth of its side."""

ERASE_PROBABILITY = 0.5
ERASE_AREA = (0.02, 0.4)
ERASE_ASPECT = 0.3
"""Random Erasing as in Zhong et al. 2020: every second image loses 2 to 40 % of its area, height : width
from 0.3 to 1 / 0.3."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What :func:`mix` mixed: image i is ``share[i]`` of itself and the rest of image ``partner[i]``.

    Attributes:
        partner: int64 [n], positions within the batch.
        share: float32 [n] in [0, 1]; for cutmix the exact share of pixels that are the image's own.
    """

    partner: Tensor
    share: Tensor

    def targets(self, labels: Tensor, *, classes: int) -> Tensor:
        """Labels int64 [n] -> soft labels, float32 [n, classes], each row sums to 1."""
        soft = torch.zeros(len(labels), classes, device=labels.device)
        soft.scatter_(1, labels[:, None], self.share[:, None])
        return soft.scatter_add_(1, labels[self.partner][:, None], 1 - self.share[:, None])


def augment(images: Tensor, *, kinds: str, generator: torch.Generator) -> Tensor:
    """Flipped, rotated, cropped and erased images; the input itself for ``none``.

    - rotate: about the centre by -15 to 15 degrees, drawn evenly; bilinear, reflected at borders.
    - flip: left to right, with probability 1/2.
    - crop: padded by S // 8 pixels on each side (reflected), and S x S pixels cut out at random.
    - erase: with probability 1/2 a rectangle is replaced by noise (Zhong et al. 2020, RE-R): its area
      is 2 to 40 % of the image, drawn evenly, its aspect ratio within 0.3 to 1 / 0.3 and such that it
      fits, drawn evenly on a log scale. The noise (0 to 255 in each pixel and channel) is drawn once a
      batch; where a rectangle lies decides which part of it an image gets.

    They are applied in this order. Flips and crops move pixels and change none. ``cutmix`` and
    ``mixup`` are left to :func:`mix`.

    How many parameters are drawn depends only on the shape of the images and on ``kinds``.

    Args:
        images: uint8 or float [n, C, S, S], any device; float in [0, 1].
        kinds: ``none``, or any of the augmentations with commas between them.
        generator: of the CPU.

    Returns:
        [n, C, S, S], same dtype and device.

    Raises:
        ParameterError: a kind is unknown.
    """
    chosen = _chosen(kinds)
    n, size = len(images), images.shape[-1]
    if "rotate" in chosen:
        degrees = (torch.rand(n, generator=generator) * 2 - 1) * DEGREES
        images = _rotate(images, degrees)
    if chosen & {"flip", "crop"}:
        images = _move(images, chosen, generator)
    if "erase" in chosen:
        box = _erased(torch.rand(5, n, generator=generator), size)
        noise = torch.randint(0, 256, images.shape[1:], generator=generator, dtype=torch.uint8)
        noise = send(noise, images.device)
        noise = noise if images.dtype == torch.uint8 else (noise / 255).to(images.dtype)
        images = torch.where(_inside(send(box, images.device), size), noise, images)
    return images


def mix(images: Tensor, *, kinds: str, generator: torch.Generator) -> tuple[Tensor, Mixing | None]:
    """Images mixed with others of their batch, each with its own partner and share.

    The partners are a random permutation of the batch. The share ``s`` that an image keeps is drawn evenly
    from [0, 1], which is the Beta(1, 1) of both papers on CIFAR.

    - mixup (Zhang et al. 2018): ``s * image + (1 - s) * partner``.
    - cutmix (Yun et al. 2019): a rectangle of ``1 - s`` of the area, with its centre anywhere, shows the
      partner; where the border cuts it off, ``s`` becomes the share that is left.

    With both, each image gets one or the other with probability 1/2.

    Args and errors: as for :func:`augment`.

    Returns:
        images: [n, C, S, S], same dtype and device; uint8 is rounded.
        mixing: partners and shares on the same device; None when ``kinds`` has neither, and then the images
            are the input itself and nothing is drawn.
    """
    chosen = _chosen(kinds) & {"mixup", "cutmix"}
    if not chosen:
        return images, None
    n, size = len(images), images.shape[-1]
    partner = send(torch.randperm(n, generator=generator), images.device)
    share, y, x, coin = torch.rand(4, n, generator=generator)
    box = _cut(share, y, x, size)
    cut = coin < 0.5 if len(chosen) == 2 else torch.full((n,), "cutmix" in chosen)
    left = 1 - (box[1] - box[0]) * (box[3] - box[2]) / size**2
    share = send(torch.where(cut, left, share), images.device)
    box, cut = send(box, images.device), send(cut, images.device)[:, None, None, None]
    others = images[partner]
    mixed = torch.where(_inside(box, size), others, images)
    if "mixup" in chosen:
        blend = torch.lerp(others.float(), images.float(), share[:, None, None, None])
        blend = blend.round_() if images.dtype == torch.uint8 else blend
        mixed = torch.where(cut, mixed, blend.to(images.dtype))
    return mixed, Mixing(partner=partner, share=share)


def _chosen(kinds: str) -> set[str]:
    try:
        return set(COERCE["augment"](kinds).split(","))
    except ValueError as error:
        raise ParameterError("augment", kinds, str(error)) from None


def _move(images: Tensor, chosen: set[str], generator: torch.Generator) -> Tensor:
    """Crop and flip, in one pass over the pixels."""
    n, size = len(images), images.shape[-1]
    row = column = torch.arange(size, device=images.device).expand(n, size)
    if "crop" in chosen:
        pad = size // PAD_SHARE
        offset = send(torch.randint(-pad, pad + 1, (2, n, 1), generator=generator), images.device)
        row, column = _reflect(row + offset[0], size), _reflect(column + offset[1], size)
    if "flip" in chosen:
        flipped = send(torch.rand(n, 1, generator=generator) < 0.5, images.device)
        column = torch.where(flipped, size - 1 - column, column)
    return _pick(images, row, column)


def _erased(draws: Tensor, size: int) -> Tensor:
    """Uniform draws [5, n] -> rectangles int64 [4, n]: top, bottom, left, right; empty where none is erased."""
    low, high = ERASE_AREA
    area = low + (high - low) * draws[1]
    # Zhong et al. draw again until the rectangle fits; these limits of the aspect ratio make every one fit
    least, most = area.clamp(min=ERASE_ASPECT).log(), (1 / area).clamp(max=1 / ERASE_ASPECT).log()
    aspect = (least + (most - least) * draws[2]).exp()
    height, width = ((size * side.sqrt()).round().clamp(1, size) for side in (area * aspect, area / aspect))
    top, left = (
        (free * draw).floor().clamp(max=free - 1)
        for free, draw in ((size - height + 1, draws[3]), (size - width + 1, draws[4]))
    )
    height = torch.where(draws[0] < ERASE_PROBABILITY, height, 0)
    return torch.stack([top, top + height, left, left + width]).long()


def _cut(share: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """Rectangles int64 [4, n] (top, bottom, left, right) of ``1 - share`` of the area, cut off at the border."""
    half = (size * (1 - share).sqrt() / 2)[None]
    centre = torch.stack([y, x]) * size
    low, high = ((centre + sign * half).round().clamp(0, size) for sign in (-1, 1))
    return torch.stack([low[0], high[0], low[1], high[1]]).long()


def _inside(box: Tensor, size: int) -> Tensor:
    """Rectangles [4, n] -> bool [n, 1, S, S]."""
    place = torch.arange(size, device=box.device)
    top, bottom, left, right = box[..., None]
    rows, columns = (place >= top) & (place < bottom), (place >= left) & (place < right)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


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
    """Each image turned counter-clockwise about its centre by its own angle [n]."""
    if len(images) == 0:
        return images
    angle = degrees * (math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # From places in the output to places in the input, y downwards.
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    theta = send(theta, images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    turned = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    if images.dtype == torch.uint8:
        turned = turned.round_().clamp_(0, 255)
    return turned.to(images.dtype)
