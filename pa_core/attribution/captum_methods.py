"""Explanations by the pixels, through Captum: Request -> raw map [N, S, S]. Memory grows with the batch alone.

Captum is loaded by the first method that needs it: class activation maps and controls start without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pa_core.attribution.base import AT_ONCE, Request, as_found, resize
from pa_core.attribution.cams import cam_grids, gradcam
from pa_core.models import Classifier
from pa_core.params import derived_seed

INTEGRATION_STEPS = 32
"""Gauss-Legendre nodes of integrated gradients. The map is rescaled, so only its shape must have converged."""

SAMPLES = 16
"""Noisy copies of each image in smoothgrad and gradient_shap."""

NOISE = 0.15
"""Their noise's standard deviation; Smilkov et al. recommend 10 to 20 % of the range of the pixels, which is 1 here."""


def _strength(gradient: Tensor) -> Tensor:
    """[N, 3, S, S] -> [N, S, S]: the largest magnitude over the colours, for gradients."""
    return gradient.abs().amax(1)


def _share(contribution: Tensor) -> Tensor:
    """[N, 3, S, S] -> [N, S, S]: the magnitude of the sum over the colours, for parts of the logit."""
    return contribution.sum(1).abs()


def _attribute(method: Any, request: Request, **keywords: Any) -> Tensor:
    """Captum's answer [N, 3, S, S], without its notices that it sets hooks (and removes them)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Ss]etting (forward, )?backward hooks")
        images = request.images.clone().requires_grad_()
        return method.attribute(images, target=request.target, **keywords).detach()


def saliency(request: Request) -> Tensor:
    """max over the colours of |d logit / d pixel| (Simonyan et al. 2014, section 3)."""
    from captum.attr import Saliency

    return _strength(_attribute(Saliency(request.model), request, abs=False))


def input_x_gradient(request: Request) -> Tensor:
    """|sum over the colours of pixel * d logit / d pixel| (Shrikumar et al. 2016). Pixels in [0, 1]: black counts nothing."""
    from captum.attr import InputXGradient

    return _share(_attribute(InputXGradient(request.model), request))


def integrated_gradients(request: Request) -> Tensor:
    """|sum over the colours of the integrated gradients| from a black image (Sundararajan et al. 2017, eq. 1).

    32 Gauss-Legendre nodes, a few at a time, so that memory does not grow with them.
    """
    from captum.attr import IntegratedGradients

    method, at_once = IntegratedGradients(request.model), max(AT_ONCE, len(request.images))
    return _share(_attribute(method, request, n_steps=INTEGRATION_STEPS, internal_batch_size=at_once))


def smoothgrad(request: Request) -> Tensor:
    """max over the colours of |mean of the gradients at 16 noisy copies|, noise 0.15 (Smilkov et al. 2017, section 2)."""
    from captum.attr import NoiseTunnel, Saliency

    method = NoiseTunnel(Saliency(request.model))
    keywords = {"nt_type": "smoothgrad", "nt_samples": SAMPLES, "stdevs": NOISE, "abs": False}
    return _strength(_one_by_one(request, "smoothgrad", lambda one: _attribute(method, one, **keywords)))


def gradient_shap(request: Request) -> Tensor:
    """|sum over the colours of the expected gradients| (Lundberg & Lee 2017, as Captum's GradientShap).

    16 draws: a point between the image, with noise 0.15, and a baseline; the baselines are images of one random colour.
    """
    from captum.attr import GradientShap

    method = GradientShap(request.model)

    def explain(one: Request) -> Tensor:
        colours = torch.rand(SAMPLES, 3, 1, 1).to(one.images)  # drawn on the CPU: the same on every device
        baselines = colours.expand(-1, -1, *one.images.shape[-2:])
        return _attribute(method, one, baselines=baselines, n_samples=SAMPLES, stdevs=NOISE)

    return _share(_one_by_one(request, "gradient_shap", explain))


def _one_by_one(request: Request, label: str, explain: Callable[[Request], Tensor]) -> Tensor:
    """Image by image, its noisy copies as the batch, with the noise seeded by the image's id.

    Captum draws from the global generators of torch and NumPy, for a batch at once: so an image's noise, and with it its
    map, would depend on its neighbours. torch's states are put back by ``as_found``, NumPy's here.
    """
    state, found = np.random.get_state(), []
    try:
        for k, name in enumerate(request.ids):
            seed = derived_seed(request.seed, label, name)
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            images, target = request.images[k : k + 1], request.target[k : k + 1]
            found.append(explain(Request(model=request.model, images=images, target=target, ids=[name], seed=seed)))
    finally:
        np.random.set_state(state)
    return torch.cat(found)


def occlusion(request: Request) -> Tensor:
    """How much the logit falls when a grey square covers the pixel (Zeiler & Fergus 2014, section 4.2).

    A square of a quarter of the image's side moves by an eighth, 49 forward passes in all; a pixel gets the mean over
    the squares that cover it. Where covering raises the logit the map is lowest.
    """
    from captum.attr import Occlusion

    size = request.images.shape[-1]
    window, stride = max(size // 4, 1), max(size // 8, 1)
    with torch.no_grad():
        found = _attribute(
            Occlusion(request.model),
            request,
            sliding_window_shapes=(3, window, window),
            strides=(3, stride, stride),
            baselines=0.5,
            perturbations_per_eval=max(AT_ONCE // len(request.images), 1),
        )
    return found.sum(1)


# Methods that put a rule of their own in the place of an activation's gradient


def guided_backprop(request: Request) -> Tensor:
    """max over the colours of |gradient|, a ReLU passing only positive gradients (Springenberg et al. 2015, section 3.4)."""
    from captum.attr import GuidedBackprop

    return _strength(_attribute(GuidedBackprop(request.model), request))


def deconvolution(request: Request) -> Tensor:
    """max over the colours of |gradient|, a ReLU passing every positive gradient, whatever its input (Zeiler & Fergus 2014)."""
    from captum.attr import Deconvolution

    return _strength(_attribute(Deconvolution(request.model), request))


def guided_gradcam(request: Request) -> Tensor:
    """guided_backprop times gradcam resized to the image (Selvaraju et al. 2017, section 3.3)."""
    maps, _ = cam_grids(request.model, request.images, evidence=gradcam, target=request.target)
    return guided_backprop(request) * resize(maps, request.images.shape[-1])


def deeplift(request: Request) -> Tensor:
    """|sum over the colours of the contributions| against a black image, by the rescale rule (Shrikumar et al. 2017)."""
    return _share(deeplift_contributions(request))


def deeplift_contributions(request: Request) -> Tensor:
    """[N, 3, S, S], whose sum per image is the explained logit less that of the black image.

    In full precision, whatever the caller runs in: the rule divides differences of activations by one another.
    """
    from captum.attr import DeepLift

    with _apart(request.model), torch.autocast(request.images.device.type, enabled=False):
        return _attribute(DeepLift(request.model), request)


@contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    """Two things without which Captum's DeepLift does not add up to the logit; the model computes the same as before.

    Captum hooks tensors. Where a max pool reads an activation's output directly, both hook one tensor, and the activation
    sees the gradient from before the pool's rule: so each hooked module reads a copy. And Captum's rule for max pools
    overwrites where windows overlap: so overlapping windows are laid out side by side first.
    """
    handles, pools = [], []
    try:
        for module in model.modules():
            if type(module) not in _ruled_by_deeplift():
                continue
            read = torch.clone
            if _overlaps(module):
                pools.append((module, module.stride, module.padding))
                read = partial(
                    _side_by_side,
                    kernel=_pair(module.kernel_size),
                    stride=_pair(module.stride),
                    padding=_pair(module.padding),
                )
                module.stride, module.padding = module.kernel_size, 0
            handles.append(module.register_forward_pre_hook(lambda _module, inputs, read=read: (read(inputs[0]),)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, stride, padding in pools:
            module.stride, module.padding = stride, padding


def _side_by_side(x: Tensor, *, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """The windows of a pool as tiles, [N, C, H, W] -> [N, C, rows * kernel, columns * kernel]."""
    (down, across), lowest = padding, torch.finfo(x.dtype).min
    x = F.pad(x, (across, across, down, down), value=lowest)  # a pool's padding is never its maximum
    windows = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])  # [N, C, rows, columns, *kernel]
    return windows.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)


def _overlaps(module: nn.Module) -> bool:
    return type(module) is nn.MaxPool2d and _pair(module.stride) != _pair(module.kernel_size)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


# Which networks these rules reach. Elsewhere they would silently be plain gradients.

_LINEAR = frozenset(
    "Convolution NativeBatchNorm CudnnBatchNorm MiopenBatchNorm Addmm Mm Bmm Add Sub Rsub Neg Mul Div Sum Mean "
    "AvgPool2D AdaptiveAvgPool2D MkldnnAdaptiveAvgPool2D UpsampleBilinear2D UpsampleNearest2D ConstantPadNd "
    "ReflectionPad2D Pad View UnsafeView ReshapeAlias AsStrided Permute Transpose T Expand Squeeze Unsqueeze Select Slice "
    "Split SplitWithSizes Unbind Cat Stack Clone Alias ToCopy Repeat Roll Flip Index".split()
)
_PASSED_ON = frozenset("MaxPool2DWithIndices AdaptiveMaxPool2D NativeLayerNorm NativeGroupNorm".split())


def refuse_guided(model: Classifier) -> str | None:
    """Why guided_backprop cannot explain a model: an activation that is no nn.ReLU module."""
    nodes, hooked, _ = _graph(model, nn.ReLU)
    return _foreign(nodes, hooked, allowed=_LINEAR | _PASSED_ON, hooks="nn.ReLU modules")


def refuse_deconvolution(model: Classifier) -> str | None:
    """As for guided_backprop; nor may a module be used twice, since Captum keeps one gradient per module."""
    _, _, reused = _graph(model, nn.ReLU)
    return _reused(model, reused) or refuse_guided(model)


def refuse_deeplift(model: Classifier) -> str | None:
    """Why deeplift cannot explain a model: an operation without a rule, or a module that is used twice."""
    nodes, hooked, reused = _graph(model, _ruled_by_deeplift())
    if any(_overlaps(module) and (module.ceil_mode or _pair(module.dilation) != (1, 1)) for module in model.modules()):
        return f"it has no rule for max pools with ceil_mode or dilation, and {model.name} has one"
    foreign = _foreign(nodes, hooked, allowed=_LINEAR, hooks="activations and max pools that are modules")
    return _reused(model, reused) or foreign


def _reused(model: Classifier, module: str | None) -> str | None:
    return (
        module
        and f"it needs every activation to be a module of its own, and {module} of {model.name} is used more than once"
    )


def _ruled_by_deeplift() -> tuple[type[nn.Module], ...]:
    from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR

    return tuple(SUPPORTED_NON_LINEAR)


def _foreign(nodes: list[Any], hooked: set[Any], *, allowed: frozenset[str], hooks: str) -> str | None:
    """The reason for the first operation that is neither hooked nor in need of no hook."""
    for node in nodes:
        name = node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")
        if node in hooked or name == "AccumulateGrad":
            continue
        inputs = sum(source is not None for source, _ in node.next_functions)
        product = name in ("Mul", "Div", "Mm", "Bmm") and inputs > 1
        if name not in allowed or product:
            what = "a product of activations (a gate or attention)" if product else f"the operation {name}"
            return f"it changes the gradient of {hooks} only, and here there is {what}"
    return None


def _graph(model: Classifier, kinds: type | tuple[type, ...]) -> tuple[list[Any], set[Any], str | None]:
    """Autograd nodes between the pixels and the logits; those that modules of these kinds made; one of them called twice.

    Parameters are detached, so that a node's inputs are those that depend on the pixels.
    """
    made: set[Any] = set()
    calls: dict[str, int] = {}

    def watch(name: str):
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            made.add(output.grad_fn)
            calls[name] = calls.get(name, 0) + 1

        return hook

    handles = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if isinstance(module, kinds)
    ]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    try:
        with as_found(model), torch.enable_grad():
            image = torch.zeros(1, 3, model.image_size, model.image_size, device=next(iter(weights.values())).device)
            logits = torch.func.functional_call(model, weights, (image.requires_grad_(),))
    finally:
        for handle in handles:
            handle.remove()
    nodes, waiting = [], [logits.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        nodes.append(node)
        fresh = {source for source, _ in node.next_functions if source is not None} - seen
        seen |= fresh
        waiting += fresh
    return nodes, made, next((name for name, count in calls.items() if count > 1), None)
