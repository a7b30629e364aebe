"""Controls: what any claim about attention must be compared with. Request -> raw map [N, S, S].

None looks at the network. Noise is seeded by seed and image id, so a map does not depend on the rest of the batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pa_core.attribution.base import Request, blur
from pa_core.errors import ParameterError
from pa_core.params import derived_seed


def _draw(request: Request, label: str, *shape: int) -> Tensor:
    """[N, *shape] in [0, 1), on the CPU, so that it is the same for every device."""
    seeds = [derived_seed(request.seed, label, name) for name in request.ids]
    return torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def random(request: Request) -> Tensor:
    """uniform noise per pixel, seeded per image id."""
    return _draw(request, "random", *request.images.shape[-2:])


def random_blur(request: Request) -> Tensor:
    """a smooth random field: noise per pixel, blurred with sigma S / 8; seeded per image id."""
    size = request.images.shape[-1]
    return blur(_draw(request, "random_blur", size, size), sigma=size / 8)


def center(request: Request) -> Tensor:
    """a Gaussian of sigma S / 4 in the middle of the image."""
    size = request.images.shape[-1]
    at = torch.arange(size) - (size - 1) / 2
    bell = torch.exp(-(at**2) / (2 * (size / 4) ** 2))
    return (bell[:, None] * bell).expand(len(request.images), -1, -1)


def rectangle(request: Request) -> Tensor:
    """rectangles one inside the other, so that every quantile masks one (as in random erasing, Zhong et al. 2020).

    Seeded per image id: every place within the image is as likely, and log(height / width) between 0.3 and 1 / 0.3.
    """
    y, x, ratio = _draw(request, "rectangle", 3).T[..., None]  # [N, 1] each
    stretch, size = 0.3 ** (0.5 - ratio), request.images.shape[-1]  # square root of the aspect ratio
    return -torch.maximum((_reach(y, size) / stretch)[:, :, None], (_reach(x, size) * stretch)[:, None, :])


def _reach(place: Tensor, size: int) -> Tensor:
    """[N, size]: the least length with which ``place * (size - length) + [0, length]`` holds each pixel's middle."""
    at = torch.arange(size) + 0.5
    return torch.where(at < place * size, size - at / place, (at - place * size) / (1 - place))


def edges(request: Request) -> Tensor:
    """magnitude of the luminance's Sobel gradient, blurred with sigma S / 32."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=request.images.device)  # ITU-R BT.601
    luminance = torch.einsum("nchw,c->nhw", request.images.float(), weights)[:, None]
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=request.images.device)
    padded = F.pad(luminance, (1, 1, 1, 1), mode="replicate")  # the image's border is no edge
    gradient = F.conv2d(padded, torch.stack([sobel, sobel.T])[:, None])
    return blur(gradient.norm(dim=1), sigma=request.images.shape[-1] / 32)


def uniform(request: Request) -> Tensor:
    """the same everywhere, 0 after scaling: a quantile masks places at random, an absolute threshold none."""
    return torch.zeros_like(request.images[:, 0], dtype=torch.float32)


CONTROLS = {control.__name__: control for control in (random, random_blur, center, rectangle, edges, uniform)}


def derangement(ids: Sequence[str], seed: int) -> Tensor:
    """Whose map each image gets under ``permute_maps``: [N] int64 on the CPU, image i that of image ``derangement[i]``.

    One cycle through all images, in an order seeded by the ids: none gets its own. ParameterError: fewer than two.
    """
    if len(ids) < 2:
        raise ParameterError("permute_maps", True, f"must be false where {len(ids)} images get a map; raise fraction")
    order = torch.tensor(sorted(range(len(ids)), key=lambda i: derived_seed(seed, "shuffled", ids[i])))
    return torch.empty_like(order).scatter_(0, order, order.roll(-1))
