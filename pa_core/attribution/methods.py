"""Every method by the name that the parameter ``xai`` takes, and images -> heatmaps by one of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pa_core import params
from pa_core.attribution import pixels as p
from pa_core.attribution import transformers as t
from pa_core.attribution.base import Request, as_found, resize, scale, stored, upsampled
from pa_core.attribution.cams import CAMS, grids, scorecam
from pa_core.attribution.controls import CONTROLS
from pa_core.errors import ParameterError, did_you_mean
from pa_core.models import Classifier

OTHERS = (
    *(scorecam, p.saliency, p.input_x_gradient, p.integrated_gradients, p.smoothgrad, p.guided_backprop),
    *(p.deconvolution, p.guided_gradcam, p.gradient_shap, p.deeplift, p.occlusion, t.attention_rollout, t.chefer),
)  # Request -> raw map [N, S, S], as the controls; CAMs are (A, g) -> evidence [N, C, h, w]
METHODS: dict[str, Callable[..., Tensor]] = CAMS | {method.__name__: method for method in OTHERS} | CONTROLS
ALIASES = {"gradcamplusplus": "gradcam++", "gradcampp": "gradcam++"}


def reason(method: str, model: Classifier) -> str | None:
    """Why a method cannot explain a model, None where it can."""
    if method in ("guided_backprop", "deconvolution", "guided_gradcam") and not p.adds_up(model, p.GUIDED):
        return f"it changes the gradient of ReLUs only, and {model.name} has other nonlinear operations"
    if method == "deeplift" and not p.adds_up(model, p.RESCALE):
        return f"its parts do not add up to the logit of {model.name}: it has no rule for one of its operations"
    if method in ("attention_rollout", "chefer") and not t.follows_attention(model):
        return f"it needs softmax attention of all tokens over all tokens in every block, which {model.name} has not"
    return None


def resolve(name: str) -> str:
    """A method's name in ``METHODS``, from it or an alias; an unknown one is refused with the nearest."""
    name = ALIASES.get(name, name)
    if name not in METHODS:
        allowed = f"must be one of {', '.join(METHODS)}{did_you_mean(name, [*METHODS, *ALIASES])}"
        raise ParameterError("xai", name, allowed)
    return name


def supported_methods(model: Classifier) -> list[str]:
    """The methods that can explain a model, controls aside."""
    return [name for name in METHODS if name not in CONTROLS and reason(name, model) is None]


def check(method: str, *, smooth: str = "none", model: Classifier | None = None) -> None:
    """Refuse a method that does not exist, that cannot be smoothed in this way, or that cannot explain this model.

    Without a model only what holds for every one is checked. ParameterError names what works.
    """
    method = resolve(method)
    if params.Experiment(smooth=smooth).smooth == "eigen" and method not in CAMS:  # Experiment refuses an unknown word
        allowed = f"must be none, gaussian or flip with xai={method}; eigen takes the channels of a CAM: "
        raise ParameterError("smooth", smooth, allowed + ", ".join(CAMS))
    if model is not None and (why := reason(method, model)):
        allowed = f"must be one of {', '.join(supported_methods(model))}, or a control, with {model.name}: {why}"
        raise ParameterError("xai", method, allowed)


def fused(method: str, smooth: str) -> bool:
    """Whether ``grids`` makes these maps and the logits in one pass; gaussian maps are blurred afterwards, at S x S."""
    return resolve(method) in CAMS and smooth != "flip"


def heatmaps(
    model: Classifier,
    images: Tensor,
    *,
    method: str,
    target: Tensor | None = None,
    smooth: str = "none",
    ids: Sequence[str] | None = None,
    seed: int = 0,
    checked: bool = False,
) -> Tensor:
    """Heatmaps of a batch, [N, 3, S, S] float in [0, 1] on the model's device -> [N, S, S] float32 in [0, 1].

    ``method`` is a name in ``METHODS`` or an alias; ``target`` [N] int64 the class explained, by default the predicted
    one. ``smooth`` is ``none``; ``gaussian``, a blur with sigma S / 32; ``eigen``, the first principal component of a
    CAM's evidence instead of its sum; ``flip``, the mean with the map of the mirrored image, mirrored back. ``ids``,
    one text per image, by default "0", "1", ..., seed controls and noise together with ``seed``.
    ParameterError: what ``check`` refuses; ``checked`` skips it, for whoever has called it before.
    """
    if not checked:
        check(method, smooth=smooth, model=model)
    method, images, size = resolve(method), images.detach(), images.shape[-1]
    if not len(images):  # nothing was selected
        return images.new_zeros(images[:, 0].shape, dtype=torch.float32)
    ids = [str(i) for i in range(len(images))] if ids is None else ids
    with as_found(model):
        if target is None and not fused(method, smooth):
            with torch.no_grad():
                target = model(images).argmax(1)
        how: dict[str, Any] = {"model": model, "target": target}

        def raw(images: Tensor) -> Tensor:
            if method in CAMS:
                return resize(grids(images=images, method=method, smooth=smooth, **how)[0], size)
            return METHODS[method](Request(images=images, ids=ids, seed=seed, **how)).detach().to(images).float()

        maps = raw(images)
        if smooth == "flip":
            maps = (scale(maps) + scale(raw(images.flip(-1)).flip(-1))) / 2
    return upsampled(maps, size, smooth=smooth)


def explain(
    model: Classifier, images: Tensor, *, method: str, target: Tensor, smooth: str, ids: Sequence[str], seed: int
) -> Tensor:
    """Heatmaps as a proxy step stores them: [N, h, w] float16 in [0, 1]. Arguments as for ``heatmaps``.

    A CAM comes on its own grid, unless smoothed by ``gaussian`` or ``flip``, anything else at S x S, at most 56 x 56.
    """
    if fused(method, smooth) and smooth != "gaussian":
        with as_found(model):
            return stored(grids(model, images, method=resolve(method), target=target, smooth=smooth)[0])
    maps = heatmaps(model, images, method=method, target=target, smooth=smooth, ids=ids, seed=seed, checked=True)
    size = min(maps.shape[-1], 56)
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", antialias=True)[:, 0].half()
