"""Class activation maps: in batch, on the device, from one forward pass and a backward pass down to the CAM layer.

``A`` are that layer's activations [N, C, h, w], ``g`` the gradient of the explained logit by them. A method says how
much each channel and place counts as evidence, [N, C, h, w]; the map is the sum over the channels, or their first
principal component, and what speaks against the class is cut off at 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pa_core.attribution.base import AT_ONCE, Request, explained_logits, resize, scale
from pa_core.models import Classifier


def gradcam(A: Tensor, g: Tensor) -> Tensor:
    """w_k A_k, with w_k the mean of g_k over the places (Selvaraju et al. 2017, eq. 1 and 2)."""
    return g.mean((2, 3), keepdim=True) * A


def gradcam_plus_plus(A: Tensor, g: Tensor) -> Tensor:
    """w_k A_k, with w_k = sum of alpha * relu(g) over the places (Chattopadhay et al. 2018, eq. 5 and 19).

    alpha = 1 / (2 + sum(A) g), the sum over the places, and 0 for 1 / 0: the paper's with g^2 cancelled. That it
    explains exp(logit) is one positive factor for all of an image's weights, which the scaling removes.
    """
    inverse = 2 + A.sum((2, 3), keepdim=True) * g
    return torch.where(inverse != 0, g.relu() / inverse, 0).sum((2, 3), keepdim=True) * A


def hirescam(A: Tensor, g: Tensor) -> Tensor:
    """g_k A_k, element by element (Draelos & Carin 2020, eq. 3)."""
    return g * A


def xgradcam(A: Tensor, g: Tensor) -> Tensor:
    """w_k A_k, with w_k = sum(g_k A_k) / sum(A_k) over the places (Fu et al. 2020, eq. 8).

    Written as mean(g_k) + sum((g_k - mean) A_k) / sum(A_k): the same, exact where g_k is constant (a head that averages
    over the places), however near to 0 the sum of signed activations is; at 0 the mean remains.
    """
    mean, total = g.mean((2, 3), keepdim=True), A.sum((2, 3), keepdim=True)
    rest = ((g - mean) * A).sum((2, 3), keepdim=True)
    return (mean + torch.where(total != 0, rest / total, 0)) * A


def layercam(A: Tensor, g: Tensor) -> Tensor:
    """relu(g_k) A_k, element by element (Jiang et al. 2021, eq. 5 and 6)."""
    return g.relu() * A


def eigencam(A: Tensor, g: Tensor) -> Tensor:
    """A_k, of which the first principal component is taken instead of the sum (Muhammad & Yeasin 2020)."""
    return A


CAMS = {"gradcam": gradcam, "gradcam++": gradcam_plus_plus, "hirescam": hirescam, "xgradcam": xgradcam}
CAMS |= {"layercam": layercam, "eigencam": eigencam, "eigengradcam": hirescam}  # eigen*: the first principal component


def grids(
    model: Classifier, images: Tensor, *, method: str, target: Tensor | None = None, smooth: str = "none"
) -> tuple[Tensor, Tensor]:
    """A CAM's raw maps together with the logits, from one forward pass and a backward pass down to the CAM layer.

    [N, 3, S, S] in [0, 1], the model in eval mode (see ``as_found``) -> maps [N, h, w] float32, at least 0, on the CAM
    layer's grid, not scaled; logits [N, classes], detached. ``method`` and ``smooth`` are such as ``fused`` allows;
    ``target`` [N] int64 is by default the class that this very pass predicts.
    """
    activations, logits = model.forward_cam(images.detach())
    target = logits.argmax(1) if target is None else target
    (gradient,) = torch.autograd.grad(explained_logits(logits, target), activations)
    # gradcam++ is no multiple of g, so half precision must not underflow: from here on in float32
    A, g = model.cam.spatial(activations.detach()).float(), model.cam.spatial(gradient).float()
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
        evidence = CAMS[method](A, g)
        component = smooth == "eigen" or method.startswith("eigen")
        maps = _first_component(evidence, toward=(g * A).sum(1)) if component else evidence.sum(1)
        return maps.relu(), logits.detach()


def _first_component(evidence: Tensor, toward: Tensor) -> Tensor:
    """First principal component over the places, up to a positive factor: [N, C, h, w] -> [N, h, w].

    It has no sign of its own, and is turned towards what each place adds to the logit to first order [N, h, w].
    """
    x = evidence.flatten(2).mT  # [N, h*w, C]
    x = x - x.mean(1, keepdim=True)
    few = x.shape[1] <= x.shape[2]  # places: the smaller Gram matrix is decomposed
    gram = x @ x.mT if few else x.mT @ x
    projected = ((gram if few else x) @ torch.linalg.eigh(gram).eigenvectors[..., -1:])[..., 0]
    # the projection is centred, so this is the sign of the correlation
    agreement = (projected * toward.flatten(1)).sum(1, keepdim=True)
    return torch.where(agreement < 0, -projected, projected).view_as(toward)


def scorecam(request: Request) -> Tensor:
    """relu(sum of w_k A_k), w the softmax over the channels of the logits of images masked by A_k (Wang et al. 2020).

    Each channel is resized to the image, scaled to [0, 1] (eq. 7 and 8) and multiplied with the pixels; the softmax
    cancels the score of the baseline image. Deviations: masked pixels become black, not the mean colour, since models
    take pixels in [0, 1]; and a channel without any variation masks all.
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
