"""Geometry, erasing and mixing of whole batches on their device, each sample with its own parameters.

Every kind draws from a generator of its own, on the CPU, as many numbers as the batch has images, whatever their maps
are: adding a kind, or another map, changes no draw of another kind, and every device sees the same draws. Only the
fills ``patch`` and ``noise`` draw in those batches alone in which an image is masked, each from its own generator.
To add a kind: a function here, a line in :func:`change`, a name in `params.AUGMENTATIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pa_core.data import send
from pa_core.masking import to_float
from pa_core.params import AUGMENTATIONS, Experiment, derived_seed

Draws = Mapping[str, torch.Generator]
DEGREES = 15.0
ERASE_AREA, ERASE_ASPECT = (0.02, 0.4), 0.3  # shares of the image; the least of height : width and of width : height
CANDIDATES = 8  # places that are drawn for each erased rectangle
FLAT = 0.2  # part of a map that is spread evenly before labels are mixed by it, so that no share is 0 everywhere
HARDLY_VISIBLE = 0.25  # where a cutmix pair shows less than this of its maps together, the area decides alone


def generators(seed: int, epoch: int) -> Draws:
    """A CPU generator for each kind of random draw, by name, seeded anew in each epoch."""
    names = (*AUGMENTATIONS, "cutmix or mixup", "proxy", "patch", "noise")
    return {name: torch.Generator().manual_seed(derived_seed(seed, name, epoch)) for name in names}


def geometry(n: int, size: int, *, kinds: frozenset[str], draws: Draws, device: torch.device) -> dict[str, Tensor]:
    """Draw for :func:`moved`: turn by -15 to 15 degrees, crop after reflecting S // 8 pixels, flip half of them."""
    how, last, at = {}, size - 1, torch.arange(size).repeat(2, n, 1)  # rows and columns
    if "rotate" in kinds:
        how["degrees"] = send((torch.rand(n, generator=draws["rotate"]) * 2 - 1) * DEGREES, device)
    if "crop" in kinds:
        offset = torch.randint(-(size // 8), size // 8 + 1, (n, 2), generator=draws["crop"])
        at = last - (last - (at + offset.T[:, :, None]).abs()).abs()
    if "flip" in kinds:
        flipped = torch.rand(n, generator=draws["flip"]) < 0.5
        at[1] = torch.where(flipped[:, None], last - at[1], at[1])
    if kinds & {"crop", "flip"}:
        row, column = send(at, device)
        how["place"] = (row[:, :, None] * size + column[:, None, :]).view(n, 1, -1)
    return how


def moved(images: Tensor, *, degrees: Tensor | None = None, place: Tensor | None = None) -> Tensor:
    """Images uint8 [n, 3, S, S] or maps float [n, 1, S, S], turned, then cropped and flipped, which changes no value.

    ``degrees`` [n] turn counter-clockwise about the centre, bilinear, reflected at the borders; ``place``, int64
    [n, 1, S * S], says which pixel each pixel then shows.
    """
    if degrees is not None:
        angle = degrees.deg2rad()
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        # from places in the output to places in the input, y downwards
        theta = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        turned = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
        images = turned.round_().clamp_(0, 255).to(images.dtype) if images.dtype == torch.uint8 else turned
    if place is not None:
        images = images.flatten(2).gather(2, place.expand(-1, images.shape[1], -1)).view_as(images)
    return images


def change(
    images: Tensor, labels: Tensor, maps: Tensor | None, *, classes: int, experiment: Experiment, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Erase and mix: images float32 [n, 3, S, S] in [0, 1], and targets as a `batch.Batch` has them.

    Maps float32 [n, S, S] in [0, 1] are 0 everywhere for an image without one; None where no kind uses them.
    """
    e = experiment
    if "erase" in e.augmentations:
        images = erase(images, maps, region=e.erase_region, probability=e.erase_probability, draws=draws["erase"])
    mixed, by = [], (maps if e.mix_labels == "attention" else None)
    if "cutmix" in e.augmentations:
        mixed.append(cutmix(images, by, probability=e.mix_probability, alpha=e.cutmix_alpha, draws=draws["cutmix"]))
    if "mixup" in e.augmentations:
        mixed.append(mixup(images, probability=e.mix_probability, draws=draws["mixup"]))
    if not mixed:
        return images, labels
    images, partner, share = mixed[0]
    if len(mixed) == 2:  # each image gets one or the other
        others, other_partner, other_share = mixed[1]
        first = send(torch.rand(len(images), generator=draws["cutmix or mixup"]) < 0.5, images.device)
        images = torch.where(first[:, None, None, None], images, others)
        partner, share = torch.where(first, partner, other_partner), torch.where(first, share, other_share)
    return images, soft_labels(labels, partner, share, classes=classes)


def soft_labels(labels: Tensor, partner: Tensor, share: Tensor, *, classes: int) -> Tensor:
    """``share[i]`` of the label of image i, and of that of image ``partner[i]`` the rest: float32 [n, classes]."""
    own, other = (F.one_hot(some, classes) for some in (labels, labels[partner]))
    return share[:, None] * own + (1 - share[:, None]) * other


def erase(images: Tensor, maps: Tensor | None, *, region: str, probability: float, draws: torch.Generator) -> Tensor:
    """Random erasing (Zhong et al. 2020, RE-R): a rectangle is replaced by noise. Shapes as in :func:`change`.

    Its area is 2 to 40 % of the image, drawn evenly; its aspect ratio 0.3 to 1 / 0.3, such that it fits, evenly on a
    log scale. Of eight places, ``anywhere`` and an image without a map take the first, ``attended`` that with the
    highest mean of the map, ``spared`` the lowest (KeepAugment, Gong et al. 2021). The noise is drawn once a batch.
    """
    n, size = len(images), images.shape[-1]
    coin, area, aspect = torch.rand(3, n, generator=draws)
    places = torch.rand(2, CANDIDATES, n, generator=draws)
    noise = torch.randint(0, 256, images.shape[1:], generator=draws, dtype=torch.uint8)
    area = ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area
    # Zhong et al. draw again until the rectangle fits; these limits of the aspect ratio make every one fit
    least, most = area.clamp(min=ERASE_ASPECT).log(), (1 / area).clamp(max=1 / ERASE_ASPECT).log()
    ratio = (least + (most - least) * aspect).exp()
    sides = (size * torch.stack([area * ratio, area / ratio]).sqrt()).round().clamp(1, size)[:, None]
    begin = (places * (size - sides + 1)).floor().minimum(size - sides)
    boxes = send(torch.stack([begin, begin + sides], dim=1).flatten(0, 1).long(), images.device)  # [4, CANDIDATES, n]
    box = boxes[:, 0]
    if region != "anywhere" and maps is not None:
        rows, columns = _spans(boxes, size)
        sums = torch.einsum("kny,nyx,knx->kn", rows.float(), maps, columns.float())
        best = sums.argmax(0) if region == "attended" else sums.argmin(0)
        best = torch.where(sums.amax(0) > sums.amin(0), best, 0)
        box = boxes.gather(1, best.expand(4, 1, n)).squeeze(1)
    rows, columns = _spans(box, size)
    erased = rows[:, :, None] & columns[:, None, :] & send(coin < probability, images.device)[:, None, None]
    return torch.where(erased[:, None], to_float(send(noise, images.device)), images)


def _spans(boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of rectangles int64 [4, ...] (top, bottom, left, right): bool [..., S] each."""
    place = torch.arange(size, device=boxes.device)
    top, bottom, left, right = boxes[..., None]
    return (place >= top) & (place < bottom), (place >= left) & (place < right)


def cutmix(
    images: Tensor, maps: Tensor | None, *, probability: float, alpha: float, draws: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A rectangle with its centre anywhere shows another image of the batch (Yun et al. 2019).

    Gives images, partner int64 [n] in the batch, share float32 [n] of the own label. The rectangle takes 1 - s of the
    image, s from Beta(alpha, alpha), less where the border cuts it off. The label counts the share of pixels left; with
    maps half of that and half of ``rho_i / (rho_i + rho_j)``, rho the visible share of each image's map (SnapMix, Huang
    et al. 2021; Saliency Grafting, Park et al. 2022), normalised to sum 1 and mixed with a flat part of 0.2. An image
    without a map has a flat one: with flat maps this is CutMix.
    """
    from scipy.special import betaincinv  # here, because every start of a run imports this module

    n, size = len(images), images.shape[-1]
    partner = torch.randperm(n, generator=draws)
    share, y, x, coin = torch.rand(4, n, generator=draws)
    share = torch.from_numpy(betaincinv(alpha, alpha, share.double().numpy())).float()
    box = _cut(torch.where(coin < probability, share, 1.0), y, x, size)
    area = send(1 - (box[1] - box[0]) * (box[3] - box[2]) / size**2, images.device)
    rows, columns = _spans(send(box, images.device), size)
    inside, partner = rows[:, :, None] & columns[:, None, :], send(partner, images.device)
    mixed = torch.where(inside[:, None], images[partner], images)
    if maps is None:
        return mixed, partner, area
    maps = torch.where(maps.amax((1, 2), keepdim=True) > 0, maps, 1)
    spread = (1 - FLAT) * (maps / maps.sum((1, 2), keepdim=True)) + FLAT / size**2
    kept, shown = (spread * ~inside).sum((1, 2)), (spread[partner] * inside).sum((1, 2))
    by_map = torch.where(kept + shown < HARDLY_VISIBLE, area, kept / (kept + shown))
    return mixed, partner, (area + by_map) / 2


def mixup(images: Tensor, *, probability: float, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """``s * image + (1 - s) * partner``, s drawn evenly from [0, 1] (Zhang et al. 2018, Beta(1, 1)); as `cutmix`."""
    partner = send(torch.randperm(len(images), generator=draws), images.device)
    share, coin = torch.rand(2, len(images), generator=draws)
    share = send(torch.where(coin < probability, share, 1.0), images.device)
    return torch.lerp(images[partner], images, share[:, None, None, None]), partner, share


def _cut(share: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """Rectangles int64 [4, n] of ``1 - share`` of the area around centres in [0, 1], cut off at the border."""
    centre, half = size * torch.stack([y, x]), size * (1 - share).sqrt() / 2
    low, high = ((centre + sign * half).round().clamp(0, size) for sign in (-1, 1))
    return torch.stack([low, high], dim=1).flatten(0, 1).long()
