"""Images -> heatmaps, by a row of the table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pa_core.attribution.base import Request, as_found, blur, resize, scale
from pa_core.attribution.cams import cam_grids
from pa_core.attribution.table import METHODS, check, fused, resolve
from pa_core.errors import ParameterError
from pa_core.models import Classifier

STORED_SIZE = 56  # side of the largest map that ``explain`` gives, apart from a CAM on its own grid


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
    """Heatmaps of a batch, [N, 3, S, S] float in [0, 1] on the model's device -> [N, S, S] float32 in [0, 1].

    ``method`` is a name in ``METHODS`` or an alias; ``target`` [N] int64 the class explained, by default the predicted
    one. ``smooth`` is ``none``; ``gaussian``, a blur with sigma S / 32; ``eigen``, the first principal component of a
    CAM's evidence instead of its sum; ``flip``, the mean with the map of the mirrored image, mirrored back. ``ids``,
    one text per image, by default "0", "1", ..., seed controls and noise together with ``seed``.
    ParameterError: an unknown method, one that cannot be smoothed like that, or one that cannot explain this model.
    """
    check(method, smooth=smooth, model=model)
    if len(images) == 0:
        return torch.zeros(images[:, 0].shape, device=images.device)
    ids = [str(i) for i in range(len(images))] if ids is None else ids
    return _heatmaps(model, images, method, target, smooth, ids, seed)


def explain(
    model: Classifier, images: Tensor, *, method: str, target: Tensor, smooth: str, ids: Sequence[str], seed: int
) -> Tensor:
    """Heatmaps as a proxy step stores them: [N, h, w] float16 in [0, 1]. Arguments as for ``heatmaps``, N at least 1.

    A CAM comes on its own grid, unless it is smoothed by ``gaussian`` or ``flip``; anything else is computed at S x S
    and resized to at most 56 x 56. Whether the method can explain the model is not checked: ``check`` is for once per
    run, this for every batch.
    """
    if fused(method, smooth) and smooth != "gaussian":
        with as_found(model):
            return stored(grids(model, images, method=method, target=target, smooth=smooth)[0])
    maps = _heatmaps(model, images, method, target, smooth, ids, seed)
    size = min(maps.shape[-1], STORED_SIZE)
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", antialias=True)[:, 0].half()


def stored(maps: Tensor) -> Tensor:
    """Raw maps of ``grids`` [N, h, w] -> what ``explain`` gives for them: [N, h, w] float16 in [0, 1]."""
    return scale(maps.float()).half()


def upsampled(maps: Tensor, size: int, *, smooth: str = "none") -> Tensor:
    """Raw or stored maps [N, h, w] -> [N, size, size] float32 in [0, 1]: resized, blurred for ``gaussian``, scaled."""
    maps = resize(maps.float(), size)
    return scale(blur(maps, sigma=size / 32) if smooth == "gaussian" else maps)


def grids(
    model: Classifier, images: Tensor, *, method: str, target: Tensor | None = None, smooth: str = "none"
) -> tuple[Tensor, Tensor]:
    """A CAM's raw maps together with the logits, from one forward pass and a backward pass down to the CAM layer.

    Arguments as for ``heatmaps``, but the model is in eval mode, as within ``as_found``, and the class explained is by
    default the one that this very pass predicts. Maps are [N, h, w] float32, at least 0, on the CAM layer's grid, not
    scaled; logits [N, classes]. ParameterError: more than this pass is needed, see ``fused``.
    """
    if not fused(method, smooth):
        raise ParameterError("xai", method, "must be a CAM, smoothed by none, gaussian or eigen, to take one pass")
    row = METHODS[resolve(method)]
    return cam_grids(model, images.detach(), target, row.compute, component=row.component or smooth == "eigen")


def _heatmaps(
    model: Classifier, images: Tensor, method: str, target: Tensor | None, smooth: str, ids: Sequence[str], seed: int
) -> Tensor:
    """``heatmaps`` without its check."""
    row, size = METHODS[resolve(method)], images.shape[-1]
    with as_found(model):
        if fused(method, smooth):
            maps, _ = grids(model, images, method=method, target=target, smooth=smooth)
            return upsampled(maps, size, smooth=smooth)
        with torch.no_grad():
            explained = model(images).argmax(1) if target is None else target

        def raw(images: Tensor) -> Tensor:
            if row.grid:
                return resize(grids(model, images, method=method, target=explained)[0], size)
            return row.compute(Request(model=model, images=images, target=explained, ids=ids, seed=seed)).float()

        maps = raw(images.detach()).detach()
        if smooth == "flip":
            maps = (scale(maps) + scale(raw(images.detach().flip(-1)).detach().flip(-1))) / 2
        return upsampled(maps, size, smooth=smooth)
