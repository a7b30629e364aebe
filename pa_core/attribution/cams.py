"""Class activation maps: in batch, on the device, from one forward pass and a backward pass down to the CAM layer.

``A`` are that layer's activations [N, C, h, w], ``g`` the gradient of the explained logit by them. A method says how
much each channel and place counts as evidence, [N, C, h, w]; the map is the sum over the channels, or their first
principal component, and what speaks against the class is cut off at 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pa_core.attribution.base import AT_ONCE, Request, resize, scale, score
from pa_core.models import Classifier


def gradcam(A: Tensor, g: Tensor) -> Tensor:
    """w_k A_k, with w_k the mean of g_k over the places (Selvaraju et al. 2017, eq. 1 and 2)."""
    return g.mean((2, 3), keepdim=True) * A


def gradcam_plus_plus(A: Tensor, g: Tensor) -> Tensor:
    """w_k A_k, with w_k = sum of alpha * relu(g) over the places (Chattopadhay et al. 2018, eq. 5 and 19).

    alpha = g^2 / (2 g^2 + sum(A) g^3), the sum over the places; with g^2 cancelled, 1 / (2 + sum(A) g). The paper
    explains exp(logit): that multiplies all of an image's weights by one positive number, which the scaling to [0, 1]
    removes. Where the denominator is 0, alpha is 0.
    """
    denominator = 2 + A.sum((2, 3), keepdim=True) * g
    return _ratio(g.relu(), denominator).sum((2, 3), keepdim=True) * A


def hirescam(A: Tensor, g: Tensor) -> Tensor:
    """g_k A_k, element by element (Draelos & Carin 2020, eq. 3)."""
    return g * A


def xgradcam(A: Tensor, g: Tensor) -> Tensor:
    """w_k A_k, with w_k = sum(g_k A_k) / sum(A_k) over the places (Fu et al. 2020, eq. 8).

    Written as mean(g_k) + sum((g_k - mean) A_k) / sum(A_k), which is the same, and exact where the head averages over
    the places (g_k is constant), however near to 0 the sum of signed activations is. At 0 the mean remains.
    """
    mean = g.mean((2, 3), keepdim=True)
    rest = ((g - mean) * A).sum((2, 3), keepdim=True)
    return (mean + _ratio(rest, A.sum((2, 3), keepdim=True))) * A


def layercam(A: Tensor, g: Tensor) -> Tensor:
    """relu(g_k) A_k, element by element (Jiang et al. 2021, eq. 5 and 6)."""
    return g.relu() * A


def eigencam(A: Tensor, g: Tensor) -> Tensor:
    """A, its first principal component instead of its sum, the sign turned towards g A (Muhammad & Yeasin 2020)."""
    return A


def eigengradcam(A: Tensor, g: Tensor) -> Tensor:
    """g A, its first principal component instead of its sum, the sign turned towards g A (Eigen-CAM with gradients)."""
    return g * A


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Their ratio, and 0 where the denominator is 0."""
    return torch.where(below != 0, above / torch.where(below != 0, below, 1), 0)


def first_component(evidence: Tensor, toward: Tensor) -> Tensor:
    """Projection of the evidence, centred over the places, on its first principal component, [N, C, h, w] -> [N, h, w].

    A component has no sign of its own: it is turned such that it correlates with ``toward`` [N, h, w].
    """
    x = evidence.float().flatten(2).transpose(1, 2)  # [N, h*w, C]
    x = x - x.mean(1, keepdim=True)
    # left singular vector times singular value, from the smaller Gram matrix
    if x.shape[1] <= x.shape[2]:
        values, vectors = torch.linalg.eigh(x @ x.transpose(1, 2))
        projected = vectors[..., -1] * values[:, -1:].clamp(min=0).sqrt()
    else:
        _, vectors = torch.linalg.eigh(x.transpose(1, 2) @ x)
        projected = (x @ vectors[..., -1:]).squeeze(-1)
    # the projection is centred, so this is the sign of the correlation
    agreement = (projected * toward.flatten(1)).sum(1, keepdim=True)
    return torch.where(agreement < 0, -projected, projected).view_as(toward)


def cam_grids(
    model: Classifier,
    images: Tensor,
    target: Tensor | None,
    evidence: Callable[..., Tensor],
    *,
    component: bool = False,
) -> tuple[Tensor, Tensor]:
    """(Maps on the CAM layer's grid, [N, h, w] float32 and at least 0; logits [N, classes], detached), from one pass.

    ``target`` None explains the class that this pass predicts. ``component`` takes the evidence's first principal
    component instead of its sum, turned towards the sum of g A, to first order what each place adds to the logit.
    """
    activations, logits = model.forward_cam(images)
    target = logits.argmax(1) if target is None else target
    (gradient,) = torch.autograd.grad(score(logits, target), activations)
    # gradcam++ is no multiple of g, so half precision must not underflow: from here on in float32
    A, g = model.cam.spatial(activations.detach()).float(), model.cam.spatial(gradient).float()
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
        found = evidence(A, g)
        maps = first_component(found, toward=(g * A).sum(1)) if component else found.sum(1)
        return maps.relu(), logits.detach()


def scorecam(request: Request) -> Tensor:
    """relu(sum of w_k A_k), w the softmax over the channels of the logits of images masked by A_k (Wang et al. 2020).

    Each channel is resized to the image, scaled to [0, 1] (eq. 7 and 8) and multiplied with the pixels; in the softmax
    of the paper's algorithm the score of the baseline image cancels. Deviations: masked pixels become black, not the
    mean colour, since models take pixels in [0, 1]; and a channel without any variation masks all.
    """
    model, images, n, scores = request.model, request.images, len(request.images), []
    with torch.no_grad():
        activations, _ = model.forward_cam(images)
        A = model.cam.spatial(activations.detach()).float()
        for some in A.split(max(AT_ONCE // n, 1), dim=1):
            masks = F.interpolate(some, size=images.shape[-2:], mode="bilinear")
            masks = scale(masks.flatten(0, 1)).view_as(masks)
            logits = model((images[:, None] * masks[:, :, None]).flatten(0, 1)).float().unflatten(0, (n, -1))
            scores.append(logits[torch.arange(n), :, request.target])  # [N, channels]
        weights = torch.cat(scores, 1).softmax(1)
        return resize((weights[..., None, None] * A).sum(1).relu(), images.shape[-1])
