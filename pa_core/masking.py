"""Pure tensor rules: heatmap + image -> proxy. Pixel space, before normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from pa_core.data import send
from pa_core.errors import ParameterError
from pa_core.params import derived_seed

BLUR_SHARE = 8
"""The fill ``blur`` has a sigma of an eighth of the image's side: colours stay, shapes go."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Filling:
    """What a fill may use; see :func:`apply`. ``dim`` [N, 1, H, W] is the map, or 1 - map to mask the ``rest``."""

    images: Tensor
    dim: Tensor
    ids: Sequence[str]
    seed: int
    donors: Tensor | None


def _mean(f: Filling) -> Tensor:
    return f.images.mean((2, 3), keepdim=True)


def _max(f: Filling) -> Tensor:
    return f.images.amax((2, 3), keepdim=True)


def _noise(f: Filling) -> Tensor:
    """Drawn on the CPU for each id, so that every device gets the same."""
    seeds = [derived_seed(f.seed, "noise", name) for name in f.ids]
    drawn = [torch.randn(f.images.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    values = send(torch.stack(drawn), f.images.device) if drawn else f.images
    return (_mean(f) + f.images.std((2, 3), keepdim=True) * values).clamp(0, 1)


def _blur(f: Filling) -> Tensor:
    sigma = f.images.shape[-1] / BLUR_SHARE
    size = 2 * round(2 * sigma) + 1  # reaches two sigma, less than the image's side, as reflection needs
    across = gaussian_blur(f.images, kernel_size=[size, 1], sigma=[sigma, sigma])
    return gaussian_blur(across, kernel_size=[1, size], sigma=[sigma, sigma])


def _patch(f: Filling) -> Tensor:
    if f.donors is None:
        raise ParameterError("fill", "patch", "must have donors, another image for each image")
    return f.donors


FILLS: dict[str, Callable[[Filling], Tensor]] = {
    "zero": lambda f: torch.zeros_like(f.images[..., :1, :1]),
    "one": lambda f: torch.ones_like(f.images[..., :1, :1]),
    "mean": _mean,
    "max": _max,
    "min": lambda f: f.images.amin((2, 3), keepdim=True),
    "half_max": lambda f: _max(f) / 2,
    "noise": _noise,
    "blur": _blur,
    "patch": _patch,
    "blend": lambda f: (1 - f.dim) * f.images,
    "none": lambda f: f.images,
}
"""What takes the place of masked pixels: broadcasts to [N, 3, H, W]. To add one: a row here and a name in `params`."""


def region(
    maps: Tensor,
    *,
    mask_region: str = "salient",
    threshold_mode: str = "quantile",
    threshold: float = 0.75,
    max_share: float = 1.0,
) -> Tensor:
    """Which pixels of maps [N, H, W] in [0, 1] are masked, bool [N, H, W].

    Args:
        mask_region: ``salient``, or ``rest``: the same rule on ``1 - maps``; by quantiles both mask equally many.
        threshold_mode: ``absolute`` masks ``maps > threshold``; ``deviations`` masks where a map exceeds its mean by
            more than ``threshold`` of its standard deviations; ``quantile`` masks in each image exactly
            ``round((1 - threshold) * H * W)`` pixels, those with the highest values. Ties are broken by a fixed random
            order of the places, the same for all images, so that a plateau is thinned evenly.
        max_share: in (0, 1]; at most ``round(max_share * H * W)`` pixels are masked, those with the highest values.
    """
    maps = 1 - maps if mask_region == "rest" else maps
    places = maps[0].numel() if len(maps) else 1
    cap = round(max_share * places)
    if threshold_mode == "quantile":
        return _highest(maps, min(round((1 - threshold) * places), cap))
    limit: Tensor | float = threshold
    if threshold_mode == "deviations":
        limit = maps.mean((1, 2), keepdim=True) + threshold * maps.std((1, 2), keepdim=True, correction=0)
    mask = maps > limit
    return mask if max_share == 1 else mask & _highest(maps, cap)


def _highest(maps: Tensor, count: int) -> Tensor:
    """The ``count`` highest places of each map, bool [N, H, W]; ties in a fixed random order."""
    n, h, w = maps.shape
    if n == 0 or count <= 0 or count >= h * w:
        return torch.full_like(maps, count > 0, dtype=torch.bool)
    order = send(torch.randperm(h * w, generator=torch.Generator().manual_seed(0)), maps.device)
    values = maps.flatten(1).index_select(1, order)
    if values.device.type == "cpu":  # many times faster than topk
        limit = torch.from_numpy(np.partition(values.numpy(), -count, axis=1))[:, -count, None]
    else:
        rank = min(count, h * w - count + 1)  # topk of the highest or of the lowest, whichever are fewer
        limit = values.topk(rank, dim=1, largest=rank == count).values[:, -1:]
    above, ties = values > limit, values == limit
    chosen = above | (ties & (ties.cumsum(1) <= count - above.sum(1, keepdim=True)))
    return torch.zeros_like(chosen).index_copy_(1, order, chosen).view(n, h, w)


def feathered(mask: Tensor, *, feather: int) -> Tensor:
    """How much of the fill each pixel of a mask, bool [N, H, W], gets: a ramp from its edge inwards, in [0, 1].

    A masked pixel at distance d (1 at the edge; steps in any of the eight directions; the image's border is no edge)
    gets ``min(d, feather + 1) / (feather + 1)``, every other pixel 0, so that nothing outside the mask is ever touched.
    """
    inside = mask.float()
    total = inside.clone()
    for _ in range(feather):
        inside = -F.max_pool2d(-inside, kernel_size=3, stride=1, padding=1)  # erosion; the padding never counts
        total += inside
    return total / (feather + 1)


def apply(
    images: Tensor,
    maps: Tensor,
    mask: Tensor,
    *,
    fill: str = "mean",
    weight: float = 1.0,
    mask_region: str = "salient",
    feather: int = 0,
    ids: Sequence[str] | None = None,
    seed: int = 0,
    donors: Tensor | None = None,
) -> Tensor:
    """The proxies: ``where(mask, (1 - w) * image + w * fill, image)``; outside the mask no bit changes.

    Fills: ``zero``, ``one``; ``mean``, ``max``, ``min``, ``half_max`` of the image, per channel; ``noise``, normal with
    the image's mean and standard deviation per channel, cut to [0, 1]; ``blur``, the image under a Gaussian with
    sigma = side / 8; ``patch``, the same place of another image. With ``blend`` the heatmap M is the dimmer,
    ``where(mask, (1 - w * M) * image, image)`` (with ``mask_region = rest``, 1 - M); with ``none`` nothing changes.

    Args:
        images, donors: [N, 3, H, W] float in [0, 1]; ``patch`` fills with the donors.
        maps: [N, H, W] in [0, 1]; mask: bool [N, H, W], from :func:`region`.
        weight, feather: w in [0, 1], over so many pixels from the mask's edge inwards, see :func:`feathered`.
        ids, seed: seed the noise; ids are one text per image, by default "0", "1", ...
    """
    w = weight * feathered(mask, feather=feather).unsqueeze(1) if feather else weight
    names = [str(i) for i in range(len(images))] if ids is None else ids
    dim = (1 - maps if mask_region == "rest" else maps).unsqueeze(1)
    filling = FILLS[fill](Filling(images=images, dim=dim, ids=names, seed=seed, donors=donors))
    return torch.where(mask.unsqueeze(1), (1 - w) * images + w * filling, images)


def to_float(images: Tensor) -> Tensor:
    """uint8 [..] in 0..255 -> float32 in [0, 1]."""
    return images.float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """float in [0, 1] -> uint8, rounded; undoes :func:`to_float` exactly."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
