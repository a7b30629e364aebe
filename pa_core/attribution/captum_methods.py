"""Explanations by the pixels, through Captum: Request -> raw map [N, S, S]. Memory grows with the batch alone.

Captum is imported by the first method that needs it: class activation maps and controls start without it.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

from pa_core.attribution.base import AT_ONCE, Request, resize
from pa_core.attribution.cams import cam_grids, gradcam
from pa_core.models import Classifier
from pa_core.params import derived_seed

NODES = 32  # Gauss-Legendre nodes; the map is rescaled, so only its shape must have converged
SAMPLES = 16  # noisy copies of each image in smoothgrad and gradient_shap
NOISE = 0.15  # their standard deviation; Smilkov et al. recommend 10 to 20 % of the range of the pixels, which is 1
TOLERANCE = 1e-6  # what double precision loses on the way; an operation without a rule is off by some percent


def _attribute(name: str, request: Request, *, tunnel: bool = False, **keywords: Any) -> Tensor:
    """What a class of captum.attr gives, [N, 3, S, S]; with ``tunnel`` as Captum's NoiseTunnel averages it."""
    import captum.attr

    method = getattr(captum.attr, name)(request.model)
    method = captum.attr.NoiseTunnel(method) if tunnel else method
    with warnings.catch_warnings():  # notices that it sets hooks, and removes them
        warnings.filterwarnings("ignore", message="(?s).*[Ss]etting (forward, )?backward hooks")
        images = request.images.clone().requires_grad_()
        return method.attribute(images, target=request.target, **keywords).detach()


def saliency(request: Request) -> Tensor:
    """|d logit / d pixel|, the largest over the colours (Simonyan et al. 2014, section 3)."""
    return _attribute("Saliency", request, abs=False).abs().amax(1)


def input_x_gradient(request: Request) -> Tensor:
    """|sum over the colours of pixel * d logit / d pixel| (Shrikumar et al. 2016); black counts nothing."""
    return _attribute("InputXGradient", request).sum(1).abs()


def integrated_gradients(request: Request) -> Tensor:
    """|sum over the colours of the integrated gradients| from a black image (Sundararajan et al. 2017, eq. 1)."""
    at_once = max(AT_ONCE, len(request.images))  # so that memory does not grow with the nodes
    return _attribute("IntegratedGradients", request, n_steps=NODES, internal_batch_size=at_once).sum(1).abs()


def smoothgrad(request: Request) -> Tensor:
    """|mean gradient of 16 copies with noise 0.15|, the largest over the colours (Smilkov et al. 2017, section 2)."""
    how: dict[str, Any] = dict(tunnel=True, abs=False, nt_type="smoothgrad", nt_samples=SAMPLES, stdevs=NOISE)
    found = [_attribute("Saliency", one, **how) for one in _one_by_one(request, "smoothgrad")]
    return torch.cat(found).abs().amax(1)


def gradient_shap(request: Request) -> Tensor:
    """|sum over the colours of the expected gradients| from images of one colour (Lundberg & Lee 2017).

    16 draws: a point between the image, with noise 0.15, and a baseline; the baselines are images of one random colour.
    """
    found = []
    for one in _one_by_one(request, "gradient_shap"):
        colours = torch.rand(SAMPLES, 3, 1, 1).to(one.images)  # drawn on the CPU: the same on every device
        baselines = colours.expand(-1, -1, *one.images.shape[-2:])
        found.append(_attribute("GradientShap", one, baselines=baselines, n_samples=SAMPLES, stdevs=NOISE))
    return torch.cat(found).sum(1).abs()


def _one_by_one(request: Request, label: str) -> Iterator[Request]:
    """Each image alone, with torch's and NumPy's global generators, from which Captum draws, seeded by its id.

    In a batch, an image's noise would depend on its neighbours. ``as_found`` puts the generators' states back.
    """
    for k, name in enumerate(request.ids):
        seed = derived_seed(request.seed, label, name)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        yield replace(request, images=request.images[k, None], target=request.target[k, None])


def occlusion(request: Request) -> Tensor:
    """fall of the logit when a grey square of S / 4 covers the pixel (Zeiler & Fergus 2014, section 4.2).

    A square of a quarter of the image's side moves by an eighth, 49 forward passes in all; a pixel gets the mean over
    the squares that cover it. Where covering raises the logit the map is lowest.
    """
    size = request.images.shape[-1]
    window, stride, at_once = max(size // 4, 1), max(size // 8, 1), max(AT_ONCE // len(request.images), 1)
    squares = {"sliding_window_shapes": (3, window, window), "strides": (3, stride, stride), "baselines": 0.5}
    with torch.no_grad():
        return _attribute("Occlusion", request, perturbations_per_eval=at_once, **squares).sum(1)


# Methods that put a rule of their own in the place of an activation's gradient


def guided_backprop(request: Request) -> Tensor:
    """|gradient|, the largest over the colours, every ReLU passing only positive gradients (Springenberg et al. 2015,
    section 3.4); networks of ``nn.ReLU`` modules.
    """
    return _attribute("GuidedBackprop", request).abs().amax(1)


def deconvolution(request: Request) -> Tensor:
    """|gradient|, the largest over the colours, every ReLU passing positive gradients whatever its input (Zeiler &
    Fergus 2014); networks of ``nn.ReLU`` modules.
    """
    return _attribute("Deconvolution", request).abs().amax(1)


def guided_gradcam(request: Request) -> Tensor:
    """guided_backprop times gradcam (Selvaraju et al. 2017, section 3.3); networks of ``nn.ReLU`` modules."""
    maps, _ = cam_grids(request.model, request.images, request.target, gradcam)
    return guided_backprop(request) * resize(maps, request.images.shape[-1])


def deeplift(request: Request) -> Tensor:
    """|sum over the colours of the contributions| against black, by the rescale rule (Shrikumar et al. 2017); networks
    whose activations and max pools are modules.
    """
    return deeplift_contributions(request).sum(1).abs()


def deeplift_contributions(request: Request) -> Tensor:
    """[N, 3, S, S], whose sum per image is the explained logit less that of the black image.

    In full precision, whatever the caller runs in: the rule divides differences of activations by one another.
    Captum hooks tensors. Where a max pool reads an activation's output directly, both hook one tensor, and the
    activation sees the gradient from before the pool's rule: so each hooked module reads a copy. And Captum's rule for
    max pools overwrites where windows overlap: so overlapping windows are laid out side by side first.
    """
    from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR

    with ExitStack() as stack, torch.autocast(request.images.device.type, enabled=False):
        for module in (m for m in request.model.modules() if type(m) in SUPPORTED_NON_LINEAR):
            read = torch.clone
            if type(module) is nn.MaxPool2d and _pair(module.stride) != _pair(module.kernel_size):
                pool = {"stride": module.stride, "padding": module.padding}
                read = partial(_tiled, kernel=_pair(module.kernel_size), **{k: _pair(v) for k, v in pool.items()})
                stack.callback(vars(module).update, pool)
                module.stride, module.padding = module.kernel_size, 0
            hook = module.register_forward_pre_hook(lambda _module, inputs, read=read: (read(inputs[0]),))
            stack.enter_context(hook)
        return _attribute("DeepLift", request)


def _tiled(x: Tensor, *, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """The windows of a pool as tiles, [N, C, H, W] -> [N, C, rows * kernel, columns * kernel]."""
    (down, across), lowest = padding, torch.finfo(x.dtype).min
    x = F.pad(x, (across, across, down, down), value=lowest)  # a pool's padding is never its maximum
    windows = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])  # [N, C, rows, columns, *kernel]
    return windows.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)


# Which networks these rules reach. Elsewhere they would silently be plain gradients. It is computed, not looked up.


def refuse_guided(model: Classifier, *, once: bool = False) -> str | None:
    """Why guided_backprop cannot explain a model: a nonlinearity that is no ``nn.ReLU`` module.

    Without these modules a network that the rule reaches is an affine function, where max pools and norms, whose
    gradients are passed on as they are, count as linear: f(a + b) + f(0) = f(a) + f(b). ``once``: nor may a module be
    used twice, since Captum keeps one gradient of deconvolution per module.
    """
    calls: Counter[nn.Module] = Counter()

    def identity(module: nn.Module, input: Tensor) -> Tensor:
        calls[module] += 1
        return input

    copied, images = _redrawn(model)
    for module in copied.modules():
        if isinstance(module, nn.ReLU):
            module.forward = partial(identity, module)
    with torch.no_grad(), _Linear():
        black, one, other, both = copied(torch.stack([0 * images[0], *images, images.sum(0)]))
    if once and max(calls.values(), default=0) > 1:
        return f"an nn.ReLU module of {model.name} is used more than once"
    affine = (both + black - one - other).abs().max() <= TOLERANCE * (both - black).abs().max()
    if calls and affine:
        return None
    what = "other nonlinear operations" if calls else "none"
    return f"it changes the gradient of nn.ReLU modules only, and {model.name} has {what}"


def refuse_deeplift(model: Classifier) -> str | None:
    """Why deeplift cannot explain a model: what it gives does not add up to the logit less the black image's."""
    reason = f"its contributions do not add up to the logit of {model.name}: it has no rule for one of its operations"
    copied, images = _redrawn(model)
    target = torch.zeros(2, dtype=torch.long, device=images.device)
    request = Request(model=copied, images=images, target=target, ids=["0", "1"], seed=0)
    try:
        total = deeplift_contributions(request).sum((1, 2, 3))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:  # Captum's own, of a dilated max pool for one
        return f"{reason} ({str(error).splitlines()[0]})"
    with torch.no_grad():
        whole = (copied(images) - copied(torch.zeros_like(images)))[:, 0]
    return None if bool(((total - whole).abs() <= TOLERANCE * whole.abs()).all()) else reason


class _Linear(TorchFunctionMode):
    """Within, a max pool is an average over places, and a norm over places or channels nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if name in ("max_pool2d", "adaptive_max_pool2d"):
            inside = torch.where(args[0].isinf(), 0, args[0])  # timm pads some with -inf
            return F.adaptive_avg_pool2d(inside, result.shape[-2:])
        return args[0] if name in ("layer_norm", "group_norm", "instance_norm") else result


def _redrawn(model: Classifier) -> tuple[Classifier, Tensor]:
    """A copy of a model in double precision with weights drawn anew, in eval mode, and two random images for it.

    Drawn anew, because a head or a branch that begins as zeros would hide what it does.
    """
    copied = copy.deepcopy(model).double().eval().requires_grad_(False)
    device, size = next(copied.parameters()).device, model.image_size
    draws = torch.Generator(device).manual_seed(0)
    for parameter in copied.parameters():
        bound = (3 / parameter.shape[1:].numel()) ** 0.5  # activations keep their size
        parameter.uniform_(-bound, bound, generator=draws)
    return copied, torch.rand(2, 3, size, size, dtype=torch.float64, device=device, generator=draws)
