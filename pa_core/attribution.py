"""Images -> heatmaps: where did the network look? One table of methods, each a pure function.

A heatmap is [N, S, S], float32, in [0, 1], on the images' device, 1 where the evidence is strongest. Every map is
scaled per image (minimum to 0, maximum to 1); a map without any variation is 0 everywhere. The model is left as it was
found: gradients, hooks, training mode and RNG.

Class activation maps are computed here, in batch and on the device, from one forward pass and a backward pass through
what comes after the CAM layer. ``A`` are that layer's activations [N, C, h, w], ``g`` the gradient of the explained
logit by them. Gradients by the pixels come from Captum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import captum.attr
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from pa_core.models import Classifier
from pa_core.params import ParameterError, derived_seed, nearest

INTEGRATION_STEPS = 32
"""Gauss-Legendre nodes of integrated gradients. The map is rescaled, so only its shape must have converged."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one call explains.

    Attributes:
        model: in eval mode.
        images: [N, 3, S, S] in [0, 1].
        target: [N] int64, the class to explain.
        ids: one text per image; seeds the controls' noise.
        seed: seeds it too.
    """

    model: Classifier
    images: Tensor
    target: Tensor
    ids: Sequence[str]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    Attributes:
        compute: for a CAM, (A, g) -> evidence per channel and place [N, C, h, w], whose sum over channels is the
            map; for any other method, Request -> raw map [N, H, W].
        cam: whether it is a CAM.
        about: one line for the README, with the source.
    """

    compute: Callable[..., Tensor]
    about: str
    cam: bool = False


# Class activation maps: evidence per channel, [N, C, h, w]


def gradcam(A: Tensor, g: Tensor) -> Tensor:
    """w_k A_k, with w_k the mean of g_k over the places (Selvaraju et al. 2017, eq. 1 and 2)."""
    return g.mean((2, 3), keepdim=True) * A


def gradcam_plus_plus(A: Tensor, g: Tensor) -> Tensor:
    """w_k A_k, with w_k = sum of alpha * relu(g) over the places (Chattopadhay et al. 2018, eq. 5 and 19).

    alpha = g^2 / (2 g^2 + sum(A) g^3), the sum over the places. The paper explains exp(logit): that multiplies all
    of an image's weights by one positive number, which the scaling to [0, 1] removes. Where g is 0, alpha is 0.
    """
    # Scaling g by a constant would change alpha, so half precision must not underflow here.
    A, g = A.float(), g.float()
    square = g * g
    denominator = 2 * square + A.sum((2, 3), keepdim=True) * square * g
    alpha = torch.where(denominator != 0, square / torch.where(denominator != 0, denominator, 1), 0)
    return (alpha * g.relu()).sum((2, 3), keepdim=True) * A


def hirescam(A: Tensor, g: Tensor) -> Tensor:
    """g_k A_k, element by element (Draelos & Carin 2020, eq. 3)."""
    return g * A


def _sum_of_channels(evidence: Tensor) -> Tensor:
    return evidence.sum(1)


def _first_component(evidence: Tensor) -> Tensor:
    """Projection of the centred evidence on its first principal component, [N, C, h, w] -> [N, h, w].

    (Muhammad & Yeasin 2020, Eigen-CAM.) A component has no sign of its own: it is turned such that it
    correlates with the sum over the channels, so that the map points at the evidence.
    """
    n, _, h, w = evidence.shape
    x = evidence.float().flatten(2).transpose(1, 2)  # [N, h*w, C]
    x = x - x.mean(1, keepdim=True)
    # Left singular vector times singular value, from the smaller Gram matrix.
    if x.shape[1] <= x.shape[2]:
        values, vectors = torch.linalg.eigh(x @ x.transpose(1, 2))
        projected = vectors[..., -1] * values[:, -1:].clamp(min=0).sqrt()
    else:
        _, vectors = torch.linalg.eigh(x.transpose(1, 2) @ x)
        projected = (x @ vectors[..., -1:]).squeeze(-1)
    agreement = (projected * x.sum(2)).sum(1, keepdim=True)
    return torch.where(agreement < 0, -projected, projected).view(n, h, w)


# Gradients by the pixels, through Captum. [N, S, S]


def _input(request: Request) -> Tensor:
    return request.images.clone().requires_grad_()


def saliency(request: Request) -> Tensor:
    """max over the channels of |d logit / d pixel| (Simonyan et al. 2014, section 3)."""
    method = captum.attr.Saliency(request.model)
    return method.attribute(_input(request), target=request.target, abs=True).amax(1)


def input_x_gradient(request: Request) -> Tensor:
    """|sum over the channels of pixel * d logit / d pixel| (Shrikumar et al. 2016). Pixels in [0, 1]: black counts nothing."""
    method = captum.attr.InputXGradient(request.model)
    return method.attribute(_input(request), target=request.target).sum(1).abs()


def integrated_gradients(request: Request) -> Tensor:
    """|sum over the channels of the integrated gradients| from a black image (Sundararajan et al. 2017, eq. 1).

    32 Gauss-Legendre nodes, in pieces of one batch, so that memory does not grow with the nodes.
    """
    method = captum.attr.IntegratedGradients(request.model)
    return (
        method.attribute(
            _input(request),
            target=request.target,
            n_steps=INTEGRATION_STEPS,
            internal_batch_size=max(len(request.images), 1),
        )
        .sum(1)
        .abs()
    )


# Controls: what any claim about attention must be compared with


def random(request: Request) -> Tensor:
    """Uniform noise per pixel, seeded per image id."""
    size = request.images.shape[-1]
    maps = [torch.rand(size, size, generator=_generator(request.seed, "random", i)) for i in request.ids]
    return torch.stack(maps).to(request.images.device)


def shuffled(request: Request) -> Tensor:
    """GradCAM maps of this batch, each given to another image of it; who gets whose is seeded by the ids."""
    if len(request.ids) < 2:
        raise ParameterError("xai", "shuffled", "it needs at least two images, here is one; raise fraction")
    order = sorted(range(len(request.ids)), key=lambda i: derived_seed(request.seed, "shuffled", request.ids[i]))
    donor = torch.empty(len(order), dtype=torch.long)
    donor[torch.tensor(order)] = torch.tensor(order[1:] + order[:1])  # a cycle: nobody gets their own
    maps = _cam_maps(request, gradcam, _sum_of_channels)
    return maps[donor.to(maps.device)]


def _generator(seed: int, *labels: object) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, *labels))


METHODS: dict[str, Method] = {
    "gradcam": Method(compute=gradcam, cam=True, about="Grad-CAM (Selvaraju et al. 2017)"),
    "gradcam++": Method(compute=gradcam_plus_plus, cam=True, about="Grad-CAM++ (Chattopadhay et al. 2018)"),
    "hirescam": Method(compute=hirescam, cam=True, about="HiResCAM (Draelos & Carin 2020)"),
    "eigengradcam": Method(
        compute=hirescam, cam=True, about="first principal component of g * A (Eigen-CAM, Muhammad & Yeasin 2020, with gradients)"
    ),
    "saliency": Method(compute=saliency, about="gradient by the pixels (Simonyan et al. 2014), Captum"),
    "input_x_gradient": Method(compute=input_x_gradient, about="pixel times gradient (Shrikumar et al. 2016), Captum"),
    "integrated_gradients": Method(
        compute=integrated_gradients, about="integrated gradients from black, 32 nodes (Sundararajan et al. 2017), Captum"
    ),
    "random": Method(compute=random, about="control: uniform noise per pixel"),
    "shuffled": Method(compute=shuffled, about="control: the Grad-CAM map of another selected image"),
}
"""All methods. To add one: a function above and a row here."""

ALIASES = {"gradcamplusplus": "gradcam++", "gradcampp": "gradcam++"}
SMOOTH = ("none", "gaussian", "eigen", "flip")
_PROJECTED = frozenset({"eigengradcam"})


def resolve(name: str) -> str:
    """The table's name of a method, from it or an alias; an unknown one is refused with the nearest."""
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise ParameterError("xai", name, f"allowed is one of {', '.join(METHODS)}{nearest(name, [*METHODS, *ALIASES])}")
    return name


def check(method: str, *, smooth: str = "none") -> None:
    """Refuse a method that does not exist, or that cannot be smoothed in this way."""
    row = METHODS[resolve(method)]
    if smooth not in SMOOTH:
        raise ParameterError("smooth", smooth, f"allowed is one of {', '.join(SMOOTH)}{nearest(smooth, SMOOTH)}")
    if smooth == "eigen" and not row.cam:
        cams = ", ".join(name for name, other in METHODS.items() if other.cam)
        raise ParameterError("smooth", smooth, f"eigen works on class activation maps; with xai = {method} allowed is none, gaussian or flip, and eigen with {cams}")


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
        ids: one text per image, seeds the controls; by default "0", "1", ...
        seed: seeds the controls.

    Returns:
        [N, S, S] float32 in [0, 1].

    Raises:
        ParameterError: an unknown method, or one that cannot be smoothed like that.
    """
    method = resolve(method)
    check(method, smooth=smooth)
    ids = [str(i) for i in range(len(images))] if ids is None else list(ids)
    if len(images) == 0:
        return images.new_zeros((0, *images.shape[-2:]), dtype=torch.float32)
    with as_found(model):
        if target is None:
            with torch.no_grad():
                target = model(images).argmax(1)
        request = Request(model=model, images=images.detach(), target=target, ids=ids, seed=seed)
        maps = _raw(request, method, smooth)
        if smooth == "flip":
            mirrored = Request(model=model, images=request.images.flip(-1), target=target, ids=ids, seed=seed)
            maps = (scale(maps) + scale(_raw(mirrored, method, smooth).flip(-1))) / 2
        if smooth == "gaussian":
            sigma = maps.shape[-1] / 32
            maps = gaussian_blur(maps.unsqueeze(1), kernel_size=[2 * round(3 * sigma) + 1] * 2, sigma=[sigma] * 2).squeeze(1)
        return scale(maps)


def _raw(request: Request, method: str, smooth: str) -> Tensor:
    row = METHODS[method]
    if not row.cam:
        return row.compute(request).detach().float()
    combine = _first_component if smooth == "eigen" or method in _PROJECTED else _sum_of_channels
    return _cam_maps(request, row.compute, combine)


def _cam_maps(request: Request, evidence: Callable[..., Tensor], combine: Callable[[Tensor], Tensor]) -> Tensor:
    """relu(combine(evidence(A, g))), resized to the images, [N, S, S]."""
    cam = request.model.cam
    activations, logits = request.model.forward_cam(request.images)
    score = logits.float().gather(1, request.target[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, activations)
    A, g = cam.spatial(activations.detach()).float(), cam.spatial(gradient).float()
    maps = combine(evidence(A, g)).relu()
    return F.interpolate(maps.unsqueeze(1), size=request.images.shape[-2:], mode="bilinear").squeeze(1)


def scale(maps: Tensor) -> Tensor:
    """Per image to [0, 1]: minimum to 0, maximum to 1; a constant map to 0. [N, H, W]."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    span = high - low
    return torch.where(span > 0, (maps - low) / torch.where(span > 0, span, 1), 0)


@contextmanager
def as_found(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode within; every module's own mode, the parameters' ``.grad`` and the RNG states as found afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, gradient in gradients:
                parameter.grad = gradient
