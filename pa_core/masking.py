"""Pure tensor rules: heatmap + image -> proxy. Pixel space, before normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from pa_core.data import send
from pa_core.params import derived_seed


def _blur(images: Tensor) -> Tensor:
    """Under a Gaussian with a sigma of an eighth of the side: colours stay, shapes go."""
    sigma = [images.shape[-1] / 8] * 2
    kernel = 2 * round(2 * sigma[0]) + 1  # reaches two sigma, less than the image's side, as reflection needs
    # one axis after the other: torchvision convolves with the whole square otherwise
    across = gaussian_blur(images, kernel_size=[kernel, 1], sigma=sigma)
    return gaussian_blur(across, kernel_size=[1, kernel], sigma=sigma)


def _noise(images: Tensor, ids: Sequence[str], seed: int) -> Tensor:
    """Drawn on the CPU for each id, so that every device gets the same."""
    drawn = torch.empty(images.shape)
    for image, name in zip(drawn, ids, strict=True):
        image.normal_(generator=torch.Generator().manual_seed(derived_seed(seed, "noise", name)))
    scaled = images.std((2, 3), keepdim=True) * send(drawn, images.device)
    return (images.mean((2, 3), keepdim=True) + scaled).clamp(0, 1)


FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda images: torch.zeros_like(images[..., :1, :1]),
    "one": lambda images: torch.ones_like(images[..., :1, :1]),
    "mean": lambda images: images.mean((2, 3), keepdim=True),
    "max": lambda images: images.amax((2, 3), keepdim=True),
    "min": lambda images: images.amin((2, 3), keepdim=True),
    "half_max": lambda images: images.amax((2, 3), keepdim=True) / 2,
    "blur": _blur,
    "none": lambda images: images,
}
"""The fills that need only the images [N, 3, H, W]; what they give broadcasts to that. :func:`apply` has the others."""


def region(
    maps: Tensor,
    *,
    mask_region: str = "salient",
    threshold_mode: str = "quantile",
    threshold: float = 0.75,
    max_share: float = 1.0,
) -> Tensor:
    """Which pixels of maps [N, H, W] in [0, 1] are masked, bool [N, H, W].

    ``absolute`` masks ``maps > threshold``; ``deviations`` where a map exceeds its mean by more than ``threshold`` of
    its standard deviations; ``quantile`` exactly ``round((1 - threshold) * H * W)`` pixels of each map, the highest.
    ``rest`` is the same rule on ``1 - maps``. At most ``round(max_share * H * W)`` pixels are masked, the highest. Ties
    are broken by a fixed random order of the places, the same for all images, so that a plateau is thinned evenly.
    """
    maps = 1 - maps if mask_region == "rest" else maps
    places = maps.shape[1] * maps.shape[2]
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
    places = maps.shape[1] * maps.shape[2]
    if count in (0, places):
        return torch.full_like(maps, count > 0, dtype=torch.bool)
    # of equal values the first in this order is taken
    order = send(torch.randperm(places, generator=torch.Generator().manual_seed(0)), maps.device)
    values = maps.flatten(1).index_select(1, order)
    if values.device.type == "cpu":  # many times faster than topk and kthvalue
        limit = torch.from_numpy(np.partition(values.numpy(), -count, axis=1))[:, -count, None]  # the count-th highest
    else:
        limit = values.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, ties = values > limit, values == limit
    chosen = above | (ties & (ties.cumsum(1) <= count - above.sum(1, keepdim=True)))  # and the first ties that fit
    return torch.zeros_like(chosen).index_copy_(1, order, chosen).view_as(maps)


def feathered(mask: Tensor, *, feather: int) -> Tensor:
    """How much of the fill each pixel of a mask, bool [N, H, W], gets: a ramp from its edge inwards, in [0, 1].

    A masked pixel at distance d (1 at the edge; steps in any of the eight directions; the image's border is no edge)
    gets ``min(d, feather + 1) / (feather + 1)``, every other pixel 0, so that nothing outside the mask is ever touched.
    """
    inside = total = mask.float()
    for _ in range(feather):
        inside = -F.max_pool2d(-inside, kernel_size=3, stride=1, padding=1)  # erosion; the padding never counts
        total = total + inside
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

    Images and donors are [N, 3, H, W] float in [0, 1], maps [N, H, W] in [0, 1], the mask bool [N, H, W]; w is
    ``weight`` in [0, 1], rising from the mask's edge as :func:`feathered` has it. Fills: ``zero``, ``one``; ``mean``,
    ``max``, ``min``, ``half_max`` of the image, per channel; ``noise``, normal with the image's mean and standard
    deviation per channel, cut to [0, 1], seeded by ``seed`` and the ids (by default "0", "1", ...); ``blur``, the image
    under a Gaussian with sigma = side / 8; ``patch`` (needs ``donors``), their same place; ``none``, the image. With
    ``blend`` the map M is the dimmer: ``where(mask, (1 - w * M) * image, image)``, with ``mask_region = rest`` 1 - M.
    """
    w = weight * feathered(mask, feather=feather).unsqueeze(1) if feather else weight
    if fill == "patch" and donors is not None:
        filling = donors
    elif fill == "noise":
        filling = _noise(images, ids or [str(i) for i in range(len(images))], seed)
    elif fill == "blend":
        filling = (1 - (1 - maps if mask_region == "rest" else maps).unsqueeze(1)) * images
    else:
        filling = FILLS[fill](images)
    return torch.where(mask.unsqueeze(1), (1 - w) * images + w * filling, images)


def to_float(images: Tensor) -> Tensor:
    """uint8 [..] in 0..255 -> float32 in [0, 1]."""
    return images / 255


def to_uint8(images: Tensor) -> Tensor:
    """float in [0, 1] -> uint8, rounded; undoes :func:`to_float` exactly."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
