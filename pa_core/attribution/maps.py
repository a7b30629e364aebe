"""Images -> heatmaps, by a row of the table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pa_core.attribution.base import Request, as_found, blur, resize, scale
from pa_core.attribution.cams import cam_grids
from pa_core.attribution.controls import derangement
from pa_core.attribution.table import METHODS, check, fused, resolve
from pa_core.models import Classifier
from pa_core.params import ParameterError


def heatmaps(
    model: Classifier,
    images: Tensor,
    *,
    method: str,
    target: Tensor | None = None,
    smooth: str = "none",
    ids: Sequence[str] | None = None,
    seed: int = 0,
) -> Tensor:
    """Heatmaps of a batch.

    Args:
        model: any mode; it is explained in eval mode and left in its own.
        images: [N, 3, S, S] float in [0, 1], on the model's device.
        method: a name in ``METHODS`` or an alias.
        target: [N] int64, the class explained; by default the predicted one.
        smooth: ``none``; ``gaussian``, a blur with sigma S / 32; ``eigen``, the first principal component of a CAM's
            evidence instead of its sum; ``flip``, the mean with the map of the mirrored image, mirrored back.
        ids: one text per image, seeds controls and noise; by default "0", "1", ...
        seed: seeds them too.

    Returns:
        [N, S, S] float32 in [0, 1].

    Raises:
        ParameterError: an unknown method, one that cannot be smoothed like that, or one that cannot explain this model.
    """
    method = resolve(method)
    check(method, smooth=smooth, model=model)
    ids = [str(i) for i in range(len(images))] if ids is None else list(ids)
    size = images.shape[-1]
    if len(images) == 0:
        return images.new_zeros((0, size, size), dtype=torch.float32)
    with as_found(model):
        if fused(method, smooth):
            maps, _ = grids(model, images, method=method, target=target, smooth=smooth)
            if METHODS[method].dealt:
                maps = maps[derangement(ids, seed).to(maps.device)]
            return from_grids(maps, image_size=size, smooth=smooth)
        if target is None:
            with torch.no_grad():
                target = model(images).argmax(1)
        request = Request(model=model, images=images.detach(), target=target, ids=ids, seed=seed)
        maps = _raw(request, method)
        if smooth == "flip":
            mirrored = Request(model=model, images=request.images.flip(-1), target=target, ids=ids, seed=seed)
            maps = (scale(maps) + scale(_raw(mirrored, method).flip(-1))) / 2
        return from_grids(maps, image_size=size, smooth=smooth)


def grids(
    model: Classifier, images: Tensor, *, method: str, target: Tensor | None = None, smooth: str = "none"
) -> tuple[Tensor, Tensor]:
    """A CAM's raw maps together with the logits, from one forward pass and a backward pass down to the CAM layer.

    To be called within ``as_found``. With ``shuffled`` these are each image's own Grad-CAM maps: the caller deals them out,
    ``maps[derangement(ids, seed)]``, over as many images as it has.

    Args:
        model: in eval mode.
        images: [N, 3, S, S] float in [0, 1].
        method, smooth: such that ``fused(method, smooth)``.
        target: [N] int64, the class explained; by default the predicted one, from this very pass.

    Returns:
        maps: [N, h, w] float32, at least 0, on the CAM layer's grid, not scaled.
        logits: [N, classes].

    Raises:
        ParameterError: a method or a smoothing that needs more than this pass.
    """
    row = METHODS[resolve(method)]
    if not row.grid:
        raise ParameterError("xai", method, f"allowed is one of {', '.join(n for n, r in METHODS.items() if r.grid)}")
    if smooth == "flip":
        raise ParameterError("smooth", smooth, "it takes a second pass; allowed is none, gaussian or eigen")
    component = row.component or smooth == "eigen"
    return cam_grids(model, images.detach(), evidence=row.compute, target=target, component=component)


def from_grids(maps: Tensor, *, image_size: int, smooth: str = "none") -> Tensor:
    """Raw maps [N, h, w] -> heatmaps [N, S, S] float32 in [0, 1]: resized, blurred if ``smooth`` is gaussian, scaled."""
    maps = resize(maps.float(), image_size)
    return scale(blur(maps, sigma=image_size / 32) if smooth == "gaussian" else maps)


def _raw(request: Request, method: str) -> Tensor:
    """The raw map [N, S, S] of any method, unsmoothed."""
    row = METHODS[method]
    if not row.grid:
        return row.compute(request).detach().float()
    maps, _ = grids(request.model, request.images, method=method, target=request.target)
    if row.dealt:
        maps = maps[derangement(request.ids, request.seed).to(maps.device)]
    return resize(maps, request.images.shape[-1])
