"""Explanations by the pixels: Request -> raw map [N, S, S]. Memory grows with the batch alone."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pa_core.attribution.base import AT_ONCE, Request, explained_logits, resize
from pa_core.attribution.cams import grids
from pa_core.models import Classifier
from pa_core.params import derived_seed

SAMPLES = 16  # noisy copies of each image in smoothgrad and gradient_shap
NOISE = 0.15  # their standard deviation; Smilkov et al. recommend 10 to 20 % of the range of the pixels, which is 1
Rules = Mapping[str, Callable[..., Tensor]]


@dataclass
class _Ruled(TorchFunctionMode):
    """Within, the functions of torch.nn.functional that these rules name are rule(function, its arguments)."""

    rules: Rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name not in self.rules:
            return func(*args, **kwargs)
        inplace = kwargs.pop("inplace", False)
        output = self.rules[name](getattr(F, name), args[0].clone(), *args[1:], **kwargs)
        return args[0].copy_(output) if inplace else output


def _gradient(request: Request, rules: Rules) -> Tensor:
    """d logit / d pixel, [N, 3, S, S], where some functions have a gradient of their own."""
    images = request.images.clone().requires_grad_()
    with torch.enable_grad(), _Ruled(rules):
        return torch.autograd.grad(explained_logits(request.model(images), request.target), images)[0]


def saliency(request: Request) -> Tensor:
    """|d logit / d pixel|, the largest over the colours (Simonyan et al. 2014, section 3)."""
    return _gradient(request, {}).abs().amax(1)


def input_x_gradient(request: Request) -> Tensor:
    """|sum over the colours of pixel * d logit / d pixel| (Shrikumar et al. 2016); black counts nothing."""
    return (request.images * _gradient(request, {})).sum(1).abs()


def _captum(name: str, request: Request, **keywords: Any) -> Tensor:
    import captum.attr  # by the first method that needs it: class activation maps and controls start without it

    images = request.images.clone().requires_grad_()
    return getattr(captum.attr, name)(request.model).attribute(images, target=request.target, **keywords).detach()


def integrated_gradients(request: Request) -> Tensor:
    """|sum over the colours of the integrated gradients| from a black image (Sundararajan et al. 2017, eq. 1)."""
    at_once = max(AT_ONCE, len(request.images))  # so that memory does not grow with the nodes of Gauss and Legendre
    return _captum("IntegratedGradients", request, n_steps=32, internal_batch_size=at_once).sum(1).abs()


def smoothgrad(request: Request) -> Tensor:
    """|mean gradient of 16 copies with noise 0.15|, the largest over the colours (Smilkov et al. 2017, section 2)."""
    found = []
    for one in _one_by_one(request, "smoothgrad"):
        noisy = torch.normal(one.images.expand(SAMPLES, -1, -1, -1), NOISE)
        found.append(_gradient(replace(one, images=noisy, target=one.target.expand(SAMPLES)), {}).mean(0))
    return torch.stack(found).abs().amax(1)


def gradient_shap(request: Request) -> Tensor:
    """|sum over the colours of the expected gradients| from images of one colour (Lundberg & Lee 2017).

    16 draws: a point between the image, with noise 0.15, and a baseline; the baselines are images of one random colour.
    """
    found = []
    for one in _one_by_one(request, "gradient_shap"):
        colours = torch.rand(SAMPLES, 3, 1, 1).to(one.images)  # drawn on the CPU: the same on every device
        baselines = colours.expand(-1, -1, *one.images.shape[-2:])
        found.append(_captum("GradientShap", one, baselines=baselines, n_samples=SAMPLES, stdevs=NOISE))
    return torch.cat(found).sum(1).abs()


def _one_by_one(request: Request, label: str) -> Iterator[Request]:
    """Each image alone, torch's and NumPy's global generators, from which Captum draws, seeded by its id alone."""
    for k, name in enumerate(request.ids):
        seed = derived_seed(request.seed, label, name)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        yield replace(request, images=request.images[k, None], target=request.target[k, None])


def occlusion(request: Request) -> Tensor:
    """fall of the logit when a grey square of S / 4 covers the pixel (Zeiler & Fergus 2014, section 4.2).

    It moves by S / 8, 49 forward passes in all; a pixel gets the mean over the squares that cover it. Where covering
    raises the logit the map is lowest.
    """
    size = request.images.shape[-1]
    window, stride, at_once = max(size // 4, 1), max(size // 8, 1), max(AT_ONCE // len(request.images), 1)
    squares = {"sliding_window_shapes": (3, window, window), "strides": (3, stride, stride), "baselines": 0.5}
    with torch.no_grad():
        return _captum("Occlusion", request, perturbations_per_eval=at_once, **squares).sum(1)


def guided_backprop(request: Request) -> Tensor:
    """|gradient|, every ReLU passing only positive gradients (Springenberg et al. 2015, section 3.4)."""

    def rule(relu: Callable[..., Tensor], x: Tensor) -> Tensor:
        x.register_hook(F.relu)
        return relu(x)

    return _gradient(request, {"relu": rule}).abs().amax(1)


def deconvolution(request: Request) -> Tensor:
    """|gradient|, every ReLU passing positive gradients whatever its input (Zeiler & Fergus 2014)."""

    def rule(relu: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = x - (x - relu(x)).detach()  # exactly the ReLU, with a gradient of 1
        y.register_hook(F.relu)
        return y

    return _gradient(request, {"relu": rule}).abs().amax(1)


def guided_gradcam(request: Request) -> Tensor:
    """guided_backprop times gradcam (Selvaraju et al. 2017, section 3.3)."""
    maps, _ = grids(request.model, request.images, method="gradcam", target=request.target)
    return guided_backprop(request) * resize(maps, request.images.shape[-1])


def deeplift(request: Request) -> Tensor:
    """|sum over the colours of the contributions| against black, by the rescale rule (Shrikumar et al. 2017)."""
    return contributions(request, torch.zeros_like(request.images), RESCALE).sum(1).abs()


def contributions(request: Request, baseline: Tensor, rules: Rules) -> Tensor:
    """[N, 3, S, S], by rules whose sum per image is the explained logit less that of its baseline.

    In full precision, whatever the caller runs in: they divide differences of activations by one another.
    """
    images, target = torch.cat([request.images, baseline]), request.target.repeat(2)
    with torch.autocast(images.device.type, enabled=False):
        gradient = _gradient(replace(request, images=images, target=target), rules)
    return (request.images - baseline) * gradient[: len(baseline)]


def _rescale(function: Callable[..., Any], x: Tensor, *args: Any, pool: bool = False, **kwargs: Any) -> Tensor:
    """The output for images and then baselines, whose gradient is its difference / the input's, where that is not 0.

    The input of a max pool is the place of the larger maximum, the image's or the baseline's: it differs there, too.
    """
    if pool:
        y, places = function(x, *args, **kwargs | {"return_indices": True})
        (larger, smaller), (here, there) = y.chunk(2), places.chunk(2)
        at = torch.where(larger >= smaller, here, there).repeat(2, 1, 1, 1).flatten(2)
        x = x.flatten(2).gather(2, at).view_as(y)
    else:
        y = function(x, *args, **kwargs)
    (x, x_base), (y, y_base) = x.chunk(2), y.chunk(2)
    differs = (x - x_base).abs() >= 1e-10
    slope = ((y - y_base) / torch.where(differs, x - x_base, 1)).detach()
    return torch.cat([torch.where(differs, y.detach() + slope * (x - x.detach()), y), y_base])


def _skip(_function: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


RELU = {"relu": _rescale} | dict.fromkeys(("max_pool2d", "adaptive_max_pool2d"), partial(_rescale, pool=True))
OTHERS = "relu6 hardtanh leaky_relu elu selu gelu silu mish hardswish sigmoid tanh softplus".split()
RESCALE = RELU | dict.fromkeys(OTHERS, _rescale)
GUIDED = RELU | dict.fromkeys(("layer_norm", "group_norm", "instance_norm"), _skip)  # norms are no obstacle to these


def adds_up(model: Classifier, rules: Rules) -> bool:
    """Whether contributions sum to the difference of the logits: else something nonlinear has no rule.

    For a copy in double precision, with weights drawn anew: a head or branch that begins as zeros would hide the rest.
    """
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    device, size = next(model.parameters()).device, model.image_size
    draws = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        bound = (3 / parameter.shape[1:].numel()) ** 0.5  # activations keep their size
        parameter.uniform_(-bound, bound, generator=draws)
    images, baseline = torch.rand(2, 2, 3, size, size, dtype=torch.float64, device=device, generator=draws)
    request = Request(model=model, images=images, target=torch.zeros(2, dtype=torch.long, device=device))
    parts = contributions(request, baseline, rules).sum((1, 2, 3))
    with _Ruled(rules):
        logits = model(torch.cat([images, baseline]))[:, 0]
    return torch.allclose(parts, logits[:2] - logits[2:], rtol=1e-6, atol=0)  # else they are off by some percent
