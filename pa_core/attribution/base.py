"""What every explanation method shares: the question it is asked, the scaling, and a model left as it was found."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from pa_core.models import Classifier

AT_ONCE = 64  # variants of the images that a method holds in memory at once, unless the batch itself is larger


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one call explains."""

    model: Classifier  # in eval mode
    images: Tensor  # [N, 3, S, S] in [0, 1]
    target: Tensor  # [N] int64, the class to explain
    ids: Sequence[str] = ()  # one text per image; seeds whatever is drawn for it
    seed: int = 0  # seeds it too


def explained_logits(logits: Tensor, target: Tensor) -> Tensor:
    """Sum of the explained logits, whose gradient by one image's pixels or activations is that image's own."""
    return logits.float().gather(1, target[:, None]).sum()


def scale(maps: Tensor) -> Tensor:
    """Per image to [0, 1]: minimum to 0, maximum to 1; a constant map to 0. [N, H, W]."""
    low = maps.amin((1, 2), keepdim=True)
    span = maps.amax((1, 2), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / span, 0)


def stored(maps: Tensor) -> Tensor:
    """Raw maps [N, h, w] as a proxy step stores them: float16, scaled per image."""
    return scale(maps.float()).half()


def upsampled(maps: Tensor, size: int, *, smooth: str = "none") -> Tensor:
    """Raw or stored maps [N, h, w] -> [N, size, size] float32 in [0, 1]: resized, blurred for ``gaussian``, scaled."""
    maps = resize(maps.float(), size)
    return scale(blur(maps, sigma=size / 32) if smooth == "gaussian" else maps)


def resize(maps: Tensor, size: int) -> Tensor:
    """[N, h, w] -> [N, size, size], bilinear."""
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear")[:, 0]


def blur(maps: Tensor, *, sigma: float) -> Tensor:
    """Gaussian blur, cut at three sigma, of [N, S, S]."""
    kernel = 2 * round(3 * sigma) + 1
    # one axis after the other: torchvision convolves with the whole square otherwise
    across = gaussian_blur(maps[:, None], kernel_size=[kernel, 1], sigma=[sigma] * 2)
    return gaussian_blur(across, kernel_size=[1, kernel], sigma=[sigma] * 2)[:, 0]


@contextmanager
def as_found(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode within; every module's own mode and the states of torch's and NumPy's generators put back."""
    modes = [(module, module.training) for module in model.modules()]
    device, state = next(model.parameters()).device, np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            np.random.set_state(state)
            for module, training in modes:
                module.training = training
