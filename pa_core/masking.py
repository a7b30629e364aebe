"""Pure tensor rules: heatmap + image -> proxy. Pixel space, before normalisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pa_core.params import ParameterError

# A fill: images [N, 3, H, W] in [0, 1] -> a value per image and channel [N, 3, 1, 1], of the image itself
FILL_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda images: torch.zeros_like(images[..., :1, :1]),
    "one": lambda images: torch.ones_like(images[..., :1, :1]),
    "mean": lambda images: images.mean((2, 3), keepdim=True),
    "max": lambda images: images.amax((2, 3), keepdim=True),
    "min": lambda images: images.amin((2, 3), keepdim=True),
    "half_max": lambda images: images.amax((2, 3), keepdim=True) / 2,
}
FILLS = (*FILL_VALUES, "blend", "none")


def region(maps: Tensor, *, mask_region: str = "salient", threshold_mode: str = "quantile", threshold: float = 0.75) -> Tensor:
    """Which pixels are masked.

    Args:
        maps: heatmaps [N, H, W] in [0, 1].
        mask_region: ``salient``, or ``rest``: the same rule on ``1 - maps``, so that with quantiles both mask equally many.
        threshold_mode: ``absolute`` masks ``maps > threshold``; ``quantile`` masks in each image exactly
            ``round((1 - threshold) * H * W)`` pixels, those with the highest values. Ties are broken by a fixed
            random order of the places, the same for all images, so that a plateau is thinned evenly.
        threshold: in [0, 1].

    Returns:
        bool [N, H, W].
    """
    maps = 1 - maps if mask_region == "rest" else maps
    if threshold_mode == "absolute":
        return maps > threshold
    n, h, w = maps.shape
    count = round((1 - threshold) * h * w)
    order = torch.randperm(h * w, generator=torch.Generator().manual_seed(0)).to(maps.device)
    ranked = maps.flatten(1)[:, order].argsort(dim=1, descending=True, stable=True)[:, :count]
    mask = torch.zeros(n, h * w, dtype=torch.bool, device=maps.device)
    return mask.scatter_(1, order[ranked], True).view(n, h, w)


def apply(images: Tensor, maps: Tensor, mask: Tensor, *, fill: str = "mean", weight: float = 1.0, mask_region: str = "salient") -> Tensor:
    """The proxies: ``where(mask, (1 - w) * image + w * fill, image)``.

    With ``fill = blend`` the heatmap M is the dimmer, ``where(mask, (1 - w * M) * image, image)`` (with
    ``mask_region = rest``, 1 - M); with ``none`` nothing changes.

    Args:
        images: [N, 3, H, W] float in [0, 1].
        maps: [N, H, W] in [0, 1].
        mask: bool [N, H, W], from :func:`region`.
        weight: w in [0, 1]; 0 is the identity.

    Returns:
        [N, 3, H, W], pixels outside the mask bit for bit as in ``images``.
    """
    if fill not in FILLS:
        raise ParameterError("fill", fill, f"allowed is one of {', '.join(FILLS)}")
    if fill == "none":
        return images.clone()
    if fill == "blend":
        dim = (1 - maps if mask_region == "rest" else maps).unsqueeze(1)
        changed = (1 - weight * dim) * images
    else:
        changed = (1 - weight) * images + weight * FILL_VALUES[fill](images)
    return torch.where(mask.unsqueeze(1), changed, images)


def to_float(images: Tensor) -> Tensor:
    """uint8 [..] in 0..255 -> float32 in [0, 1]."""
    return images.float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """float in [0, 1] -> uint8, rounded; undoes :func:`to_float` exactly."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
