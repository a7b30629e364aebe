"""One training batch on its device: images, labels and maps -> what the network sees.

Moved (rotation, crop, flip), masked, erased, mixed. A map is upsampled and moved with its image first, so that shares
and quantiles are of what the network sees. Which images a map changes is known on the CPU, so the host never waits for
the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pa_core import augment, masking
from pa_core.attribution import upsampled
from pa_core.augment import Draws
from pa_core.data import Part, send
from pa_core.params import Experiment


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """What an epoch draws from: M entries, each an image of a part, and perhaps the map that may change it."""

    part: Part
    origin: Tensor  # int64 [M], positions in the part; all but the maps are on the CPU
    row: Tensor  # int64 [M], the entry's row of ``maps``, -1 for none
    proxied: Tensor  # bool [M], whether a draw is masked by its map (with proxy_probability)
    withheld: Tensor  # bool [M], whether a draw is left out of the loss; others may still be mixed with it
    maps: Tensor  # float16 [K, h, w] in [0, 1], on the images' device

    @classmethod
    def of(cls, part: Part) -> Pool:
        """The part as it is, without maps."""
        n, off = len(part), torch.zeros(len(part), dtype=torch.bool)
        maps = torch.zeros(0, 1, 1, dtype=torch.float16, device=part.resident or "cpu")
        return cls(part=part, origin=torch.arange(n), row=torch.full((n,), -1), proxied=off, withheld=off, maps=maps)

    def __len__(self) -> int:
        return len(self.origin)

    @property
    def labels(self) -> Tensor:
        """int64 [M], on the CPU."""
        return self.part.labels[self.origin]

    def take(self, positions: Tensor) -> Pool:
        """The entries at some positions, int64 [n]."""
        names = ("origin", "row", "proxied", "withheld")
        return replace(self, **{name: getattr(self, name)[positions] for name in names})


class Batch(NamedTuple):
    """What the network is trained on."""

    images: Tensor  # float32 [n, 3, S, S] in [0, 1]
    targets: Tensor  # int64 [n], or float32 [n, classes] with rows that sum to 1 where labels are mixed
    weights: Tensor | None  # float32 [n], of each image in the loss; None: all equal


def make(
    images: Tensor, labels: Tensor, *, classes: int, pool: Pool, index: Tensor, experiment: Experiment, draws: Draws
) -> Batch:
    """The batch at the positions ``index`` of a pool, int64 [n] on the CPU, augmented with `augment.generators`.

    Images uint8 [n, 3, S, S], those at ``pool.origin[index]``, and labels int64 [n] are on the device.
    """
    e, n, size, device = experiment, len(images), images.shape[-1], images.device
    all_maps = e.erase_region != "anywhere" or e.mix_labels == "attention"  # not only those that mask
    masked = pool.proxied[index] & (torch.rand(n, generator=draws["proxy"]) < e.proxy_probability)
    # places in the batch whose map is needed
    rows = torch.nonzero((pool.row[index] >= 0) if all_maps else masked).squeeze(1)
    moves = augment.geometry(n, size, kinds=e.augmentations, draws=draws, device=device)
    pixels, maps = masking.to_float(augment.moved(images, **moves)), None
    if len(rows):
        at, values = send(rows, device), maps_of(pool, index[rows], size, device)
        values = augment.moved(values[:, None], **{name: move[at] for name, move in moves.items()})[:, 0]
        if all_maps:
            maps = values if len(rows) == n else values.new_zeros(n, size, size).index_copy_(0, at, values)
            chosen = send(torch.nonzero(masked[rows]).squeeze(1), device)  # of these rows, the masked ones
            values, at = values[chosen], at[chosen]
        if len(at):
            mask_some(pixels, at, values, experiment=e, draws=draws)
    pixels, targets = augment.change(pixels, labels, maps, classes=classes, experiment=e, draws=draws)
    weights = send((~pool.withheld[index]).float(), device) if pool.withheld.any() else None
    return Batch(pixels.contiguous(memory_format=memory_format(device)), targets, weights)


def maps_of(pool: Pool, index: Tensor, size: int, device: torch.device) -> Tensor:
    """The upsampled maps, float32 [m, S, S] in [0, 1], at positions int64 [m] of a pool that all have one."""
    stored = pool.maps.index_select(0, send(pool.row[index], pool.maps.device))
    return upsampled(send(stored, device), size)


def mask_some(
    images: Tensor, rows: Tensor, maps: Tensor, *, experiment: Experiment, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Mask some images in place, those at ``rows`` int64 [m]; gives all n, float32 in [0, 1], and masks bool [m, S, S].

    By `masking.region` of maps float32 [m, S, S] in [0, 1], then `masking.apply`. The random part of a fill is drawn
    anew each time; ``patch`` fills with another image of the batch.
    """
    e, n = experiment, len(images)
    rule = {"threshold_mode": e.threshold_mode, "threshold": e.threshold, "max_share": e.max_share}
    mask = masking.region(maps, mask_region=e.mask_region, **rule)
    donors, seed = None, 0
    if e.fill == "patch":
        shift = torch.randint(1, max(n, 2), (n,), generator=draws["patch"])
        donors = images.index_select(0, send((torch.arange(n) + shift) % n, images.device).index_select(0, rows))
    if e.fill == "noise":
        seed = int(torch.randint(2**62, (1,), generator=draws["noise"]))
    how = {"fill": e.fill, "weight": e.weight, "feather": e.feather, "mask_region": e.mask_region}
    changed = masking.apply(images.index_select(0, rows), maps, mask, **how, seed=seed, donors=donors)
    return images.index_copy_(0, rows, changed), mask


def unaugmented(images: Tensor, *, pool: Pool, index: Tensor, experiment: Experiment | None, draws: Draws) -> Tensor:
    """What the network is evaluated on: no augmentation; with an experiment all proxies are masked, without it none."""
    pixels, rows = to_pixels(images), torch.nonzero(pool.proxied[index]).squeeze(1)
    if experiment is not None and len(rows):
        values = maps_of(pool, index[rows], images.shape[-1], images.device)
        mask_some(pixels, send(rows, images.device), values, experiment=experiment, draws=draws)
    return pixels


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [n, 3, S, S] -> float32 in [0, 1], laid out as the networks on that device want them."""
    return masking.to_float(images.contiguous(memory_format=memory_format(images.device)))


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels last for CUDA's tensor cores and for the CPU, where the default model trains a fifth faster."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last
