"""Augmentation of whole batches, each sample with its own parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pa_core.params import COERCE, ParameterError

DEGREES = 15.0
PAD_SHARE = 8
"""A crop moves an image by up to an eighth of its side."""


def augment(images: Tensor, *, kinds: str, generator: torch.Generator) -> Tensor:
    """Flipped, rotated and cropped images; the input itself for ``none``.

    - rotate: about the centre by -15 to 15 degrees, drawn evenly; bilinear, reflected at borders.
    - flip: left to right, with probability 1/2.
    - crop: padded by S // 8 pixels on each side (reflected), and S x S pixels cut out at random.

    They are applied in this order. Flips and crops move pixels and change none.

    The parameters are drawn on the CPU, so that every device sees the same ones; how many are drawn
    depends only on the number of images and on ``kinds``.

    Args:
        images: uint8 or float [n, C, S, S], any device.
        kinds: ``none``, or any of flip, rotate and crop with commas between them.
        generator: of the CPU.

    Returns:
        [n, C, S, S], same dtype and device.

    Raises:
        ParameterError: a kind is unknown.
    """
    try:
        chosen = set(COERCE["augment"](kinds).split(","))
    except ValueError as error:
        raise ParameterError("augment", kinds, str(error)) from None
    n, size = len(images), images.shape[-1]
    if "rotate" in chosen:
        degrees = (torch.rand(n, generator=generator) * 2 - 1) * DEGREES
        images = _rotate(images, degrees)
    if not chosen & {"flip", "crop"}:
        return images
    column = torch.arange(size).expand(n, size)
    row = column
    if "crop" in chosen:
        pad = size // PAD_SHARE
        offset = torch.randint(-pad, pad + 1, (2, n, 1), generator=generator)
        row, column = _reflect(row + offset[0], size), _reflect(column + offset[1], size)
    if "flip" in chosen:
        flipped = torch.rand(n, 1, generator=generator) < 0.5
        column = torch.where(flipped, size - 1 - column, column)
    return _pick(images, row.to(images.device), column.to(images.device))


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
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    turned = F.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    if images.dtype == torch.uint8:
        turned = turned.round_().clamp_(0, 255)
    return turned.to(images.dtype)
