"""Pure tensor rules: heatmap + image -> proxy. Pixel space, before normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from pa_core.params import ParameterError, derived_seed

# A fill: images [N, 3, H, W] in [0, 1] -> a value per image and channel [N, 3, 1, 1], of the image itself
FILL_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda images: torch.zeros_like(images[..., :1, :1]),
    "one": lambda images: torch.ones_like(images[..., :1, :1]),
    "mean": lambda images: images.mean((2, 3), keepdim=True),
    "max": lambda images: images.amax((2, 3), keepdim=True),
    "min": lambda images: images.amin((2, 3), keepdim=True),
    "half_max": lambda images: images.amax((2, 3), keepdim=True) / 2,
}
FILLS = (*FILL_VALUES, "noise", "blur", "patch", "blend", "none")

BLUR_SHARE = 8
"""The fill ``blur`` has a sigma of an eighth of the image's side: colours stay, shapes go."""


def region(
    maps: Tensor,
    *,
    mask_region: str = "salient",
    threshold_mode: str = "quantile",
    threshold: float = 0.75,
    max_share: float = 1.0,
) -> Tensor:
    """Which pixels are masked.

    Args:
        maps: heatmaps [N, H, W] in [0, 1].
        mask_region: ``salient``, or ``rest``: the same rule on ``1 - maps``, so that with quantiles both mask equally many.
        threshold_mode: ``absolute`` masks ``maps > threshold``; ``quantile`` masks in each image exactly
            ``round((1 - threshold) * H * W)`` pixels, those with the highest values. Ties are broken by a fixed
            random order of the places, the same for all images, so that a plateau is thinned evenly.
        threshold: in [0, 1].
        max_share: in (0, 1]; of an image with more pixels to mask than ``round(max_share * H * W)``, only that many
            are, those with the highest values.

    Returns:
        bool [N, H, W].
    """
    maps = 1 - maps if mask_region == "rest" else maps
    n, h, w = maps.shape
    cap = round(max_share * h * w)
    if threshold_mode == "absolute":
        above = maps > threshold
        if max_share == 1:
            return above
        count = above.flatten(1).sum(1).clamp(max=cap)
    else:
        count = torch.full((n,), min(round((1 - threshold) * h * w), cap), device=maps.device)
    order = torch.randperm(h * w, generator=torch.Generator().manual_seed(0)).to(maps.device)
    ranked = order[maps.flatten(1)[:, order].argsort(dim=1, descending=True, stable=True)]
    chosen = torch.arange(h * w, device=maps.device) < count[:, None]
    return torch.zeros(n, h * w, dtype=torch.bool, device=maps.device).scatter_(1, ranked, chosen).view(n, h, w)


def feathered(mask: Tensor, *, feather: int) -> Tensor:
    """How much of the fill each pixel gets: a ramp that rises from the mask's edge inwards.

    A masked pixel at distance d (1 at the edge; steps in any of the eight directions; the image's border is no edge) gets
    ``min(d, feather + 1) / (feather + 1)``, every other pixel 0, so that nothing outside the mask is ever touched.

    Args:
        mask: bool [N, H, W].
        feather: width of the ramp in pixels; 0 is the mask itself.

    Returns:
        float32 [N, H, W] in [0, 1].
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
    """The proxies: ``where(mask, (1 - w) * image + w * fill, image)``.

    Fills: ``zero``, ``one``; ``mean``, ``max``, ``min``, ``half_max`` of the image, per channel; ``noise``, normal with the
    image's mean and standard deviation per channel, cut to [0, 1]; ``blur``, the image under a Gaussian with
    sigma = side / 8; ``patch``, the same place of another image. With ``blend`` the heatmap M is the dimmer,
    ``where(mask, (1 - w * M) * image, image)`` (with ``mask_region = rest``, 1 - M); with ``none`` nothing changes.

    Args:
        images: [N, 3, H, W] float in [0, 1].
        maps: [N, H, W] in [0, 1].
        mask: bool [N, H, W], from :func:`region`.
        weight: w in [0, 1]; 0 is the identity.
        feather: pixels over which w rises from the mask's edge inwards, see :func:`feathered`.
        ids: one text per image, seeds its noise; by default "0", "1", ...
        seed: seeds the noise too.
        donors: [N, 3, H, W] in [0, 1], what ``patch`` fills with.

    Returns:
        [N, 3, H, W], pixels outside the mask bit for bit as in ``images``.

    Raises:
        ParameterError: an unknown fill, or ``patch`` without donors.
    """
    if fill not in FILLS:
        raise ParameterError("fill", fill, f"allowed is one of {', '.join(FILLS)}")
    if fill == "none":
        return images.clone()
    w = weight * feathered(mask, feather=feather).unsqueeze(1) if feather else weight
    if fill == "blend":
        dim = (1 - maps if mask_region == "rest" else maps).unsqueeze(1)
        changed = (1 - w * dim) * images
    else:
        changed = (1 - w) * images + w * _filling(images, fill, ids=ids, seed=seed, donors=donors)
    return torch.where(mask.unsqueeze(1), changed, images)


def _filling(images: Tensor, fill: str, *, ids: Sequence[str] | None, seed: int, donors: Tensor | None) -> Tensor:
    """What the fill puts in the place of pixels: broadcasts to [N, 3, H, W]."""
    if fill in FILL_VALUES:
        return FILL_VALUES[fill](images)
    if fill == "patch":
        if donors is None:
            raise ParameterError("fill", fill, "it needs donors, another image for each image")
        return donors
    if fill == "blur":
        sigma = images.shape[-1] / BLUR_SHARE
        size = 2 * round(2 * sigma) + 1  # reaches two sigma, less than the image's side, as reflection needs
        across = gaussian_blur(images, kernel_size=[size, 1], sigma=[sigma, sigma])
        return gaussian_blur(across, kernel_size=[1, size], sigma=[sigma, sigma])
    names = [str(i) for i in range(len(images))] if ids is None else ids
    noise = [_normal(images.shape[1:], derived_seed(seed, "noise", name)) for name in names]
    values = torch.stack(noise).to(images) if noise else images
    return (images.mean((2, 3), keepdim=True) + images.std((2, 3), keepdim=True) * values).clamp(0, 1)


def _normal(shape: torch.Size, seed: int) -> Tensor:
    """Drawn on the CPU, so that every device gets the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def to_float(images: Tensor) -> Tensor:
    """uint8 [..] in 0..255 -> float32 in [0, 1]."""
    return images.float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """float in [0, 1] -> uint8, rounded; undoes :func:`to_float` exactly."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
