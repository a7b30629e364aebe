"""Controls: what any claim about attention must be compared with. Request -> raw map [N, S, S].

None looks at the network. Noise is seeded by seed and image id, so a map does not depend on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pa_core.attribution.base import Request, blur, generator
from pa_core.errors import ParameterError
from pa_core.params import derived_seed

ASPECT = 0.3  # the flattest rectangle, height : width; the tallest is its inverse


def random(request: Request, label: str = "random") -> Tensor:
    """uniform noise per pixel, seeded per image id."""
    size = request.images.shape[-1]
    maps = [torch.rand(size, size, generator=generator(request.seed, label, name)) for name in request.ids]
    return torch.stack(maps).to(request.images.device)


def random_blur(request: Request) -> Tensor:
    """a smooth random field: noise per pixel, blurred with sigma S / 8; seeded per image id."""
    return blur(random(request, "random_blur"), sigma=request.images.shape[-1] / 8)


def center(request: Request) -> Tensor:
    """a Gaussian of sigma S / 4 in the middle of the image."""
    size = request.images.shape[-1]
    at = torch.arange(size, device=request.images.device) - (size - 1) / 2
    bell = torch.exp(-(at**2) / (2 * (size / 4) ** 2))
    return (bell[:, None] * bell).expand(len(request.images), -1, -1)


def rectangle(request: Request) -> Tensor:
    """rectangles one inside the other, so that every quantile masks one (as in random erasing, Zhong et al. 2020).

    Each lies within the image, at every place with the same probability, and its aspect ratio (height : width) is drawn
    from 0.3 to 1 / 0.3, here on a log scale; both are seeded per image id.
    """
    size, maps = request.images.shape[-1], []
    for name in request.ids:
        y, x, ratio = torch.rand(3, generator=generator(request.seed, "rectangle", name))
        stretch = ASPECT ** (0.5 - ratio)  # square root of the aspect ratio
        height, width = _reach(y, size) / stretch, _reach(x, size) * stretch
        maps.append(-torch.maximum(height[:, None], width[None, :]))
    return torch.stack(maps).to(request.images.device)


def _reach(place: Tensor, size: int) -> Tensor:
    """[size]: how long the interval ``place * (size - length) + [0, length]`` must be to hold each pixel's middle."""
    at = torch.arange(size) + 0.5
    return torch.where(at < place * size, size - at / place, (at - place * size) / (1 - place))


def edges(request: Request) -> Tensor:
    """magnitude of the luminance's Sobel gradient, blurred with sigma S / 32."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=request.images.device)  # ITU-R BT.601
    luminance = torch.einsum("nchw,c->nhw", request.images.float(), weights).unsqueeze(1)
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=request.images.device)
    padded = F.pad(luminance, (1, 1, 1, 1), mode="replicate")  # the image's border is no edge
    gradient = F.conv2d(padded, torch.stack([sobel, sobel.T]).unsqueeze(1))
    return blur(gradient.norm(dim=1), sigma=request.images.shape[-1] / 32)


def uniform(request: Request) -> Tensor:
    """the same everywhere, 0 after scaling: a quantile masks places at random, an absolute threshold none."""
    return torch.zeros_like(request.images[:, 0], dtype=torch.float32)


def derangement(ids: Sequence[str], seed: int) -> Tensor:
    """Whose map each image gets under ``permute_maps``: [N] int64 on the CPU, image i that of image ``derangement[i]``.

    One cycle through all images, in an order seeded by the ids: none gets its own. ParameterError: fewer than two.
    """
    if len(ids) < 2:
        raise ParameterError("permute_maps", True, f"must be false where {len(ids)} images get a map; raise fraction")
    order = torch.tensor(sorted(range(len(ids)), key=lambda i: derived_seed(seed, "shuffled", ids[i])))
    return torch.empty_like(order).scatter_(0, order, order.roll(-1))
