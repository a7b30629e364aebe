"""One training batch on its device: images, labels and maps -> what the network sees.

In this order: flip, crop and rotation (`augment.Geometry`), proxies, erasing, mixing. A map is upsampled and moved with
its image first, so that shares and quantiles are taken of what the network sees. The host never waits for the device:
which images are changed by a map is known on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pa_core import augment, masking
from pa_core.attribution import upsampled
from pa_core.augment import Draws, Geometry
from pa_core.data import Part, send
from pa_core.params import Experiment


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """What an epoch draws from: M entries, each an image of a part, and perhaps the map that may change it."""

    part: Part
    origin: Tensor  # int64 [M], positions in the part; all but the maps are on the CPU
    row: Tensor  # int64 [M], the entry's row of ``maps``, -1 for none
    proxied: Tensor  # bool [M], whether a draw is masked by its map (with proxy_probability)
    withheld: Tensor  # bool [M], whether a draw is left out of the loss
    maps: Tensor  # float16 [K, h, w] in [0, 1], on the images' device

    @classmethod
    def of(cls, part: Part) -> Pool:
        """The part as it is, without maps."""
        n = len(part)
        off = torch.zeros(n, dtype=torch.bool)
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
        chosen = {name: getattr(self, name)[positions] for name in ("origin", "row", "proxied", "withheld")}
        return replace(self, **chosen)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What the network is trained on."""

    images: Tensor  # float32 [n, 3, S, S] in [0, 1]
    targets: Tensor  # int64 [n], or float32 [n, classes] with rows that sum to 1 where labels are mixed
    weights: Tensor | None  # float32 [n], of each image in the loss; None: all equal


def make(
    images: Tensor, labels: Tensor, *, classes: int, pool: Pool, index: Tensor, experiment: Experiment, draws: Draws
) -> Batch:
    """The batch at some positions of a pool, augmented.

    Args:
        images: uint8 [n, 3, S, S] on the device, those at ``pool.origin[index]``.
        labels: int64 [n] on the device.
        classes: how many there are.
        index: int64 [n] on the CPU, positions in the pool.
        draws: this epoch's generators, see `augment.generators`.
    """
    e, n, size = experiment, len(images), images.shape[-1]
    uses_maps = e.erase_region != "anywhere" or e.mix_labels == "attention"  # besides masking
    masked = pool.proxied[index] & (torch.rand(n, generator=draws["proxy"]) < e.proxy_probability)
    rows = torch.nonzero((pool.row[index] >= 0) if uses_maps else masked).squeeze(1)  # whose map is needed
    move = Geometry.draw(n, size, kinds=e.augmentations, draws=draws)
    pixels, maps = masking.to_float(move.apply(images)), None
    if len(rows):
        values, at = move.of(rows).apply(maps_of(pool, index[rows], size, images.device)), send(rows, images.device)
        if uses_maps:
            maps = values if len(rows) == n else values.new_zeros(n, size, size).index_copy(0, at, values)
            chosen = send(torch.nonzero(masked[rows]).squeeze(1), images.device)  # of these rows, the masked ones
            values, at = values[chosen], at[chosen]
        if len(at):
            pixels, _ = proxied(pixels, at, values, experiment=e, draws=draws)
    pixels, targets = augment.change(pixels, labels, maps, classes=classes, experiment=e, draws=draws)
    weights = send((~pool.withheld[index]).float(), images.device) if pool.withheld.any() else None
    return Batch(images=laid_out(pixels), targets=targets, weights=weights)


def unaugmented(images: Tensor, *, pool: Pool, index: Tensor, experiment: Experiment, draws: Draws) -> Tensor:
    """The images at some positions of a pool with every proxy masked, and nothing else changed."""
    pixels, rows = masking.to_float(images), torch.nonzero(pool.proxied[index]).squeeze(1)
    if not len(rows):
        return laid_out(pixels)
    values = maps_of(pool, index[rows], images.shape[-1], images.device)
    return laid_out(proxied(pixels, send(rows, images.device), values, experiment=experiment, draws=draws)[0])


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [n, 3, S, S] -> float32 in [0, 1], laid out as the networks on that device want them."""
    return masking.to_float(laid_out(images))


def laid_out(images: Tensor) -> Tensor:
    """The same images in the memory format of the networks on their device; indexing loses it."""
    return images.contiguous(memory_format=memory_format(images.device))


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels last for CUDA's tensor cores and for the CPU, where the default model trains a fifth faster."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def maps_of(pool: Pool, index: Tensor, size: int, device: torch.device) -> Tensor:
    """The upsampled maps, float32 [m, S, S] in [0, 1], at positions int64 [m] of a pool that all have one."""
    stored = pool.maps.index_select(0, send(pool.row[index], pool.maps.device))
    return upsampled(send(stored, device), size)


def proxied(
    images: Tensor, rows: Tensor, maps: Tensor, *, experiment: Experiment, draws: Draws
) -> tuple[Tensor, Tensor]:
    """A batch in which some images are masked, and the masks bool [m, S, S]: `masking.region`, then `masking.apply`.

    The random part of a fill is drawn anew each time; ``patch`` fills with another image of the batch.

    Args:
        images: float32 [n, 3, S, S] in [0, 1]; rows: int64 [m], those to mask; maps: float32 [m, S, S] in [0, 1].
    """
    e, n = experiment, len(images)
    rule = {"mask_region": e.mask_region, "threshold_mode": e.threshold_mode, "threshold": e.threshold}
    mask = masking.region(maps, **rule, max_share=e.max_share)
    donors = None
    if e.fill == "patch":
        shift = torch.randint(1, max(n, 2), (n,), generator=draws["patch"])
        donors = images.index_select(0, send((torch.arange(n) + shift) % n, images.device).index_select(0, rows))
    seed = int(torch.randint(2**62, (1,), generator=draws["noise"])) if e.fill == "noise" else 0
    how = {"fill": e.fill, "weight": e.weight, "feather": e.feather, "mask_region": e.mask_region}
    changed = masking.apply(images.index_select(0, rows), maps, mask, **how, seed=seed, donors=donors)
    return images.index_copy(0, rows, changed), mask
