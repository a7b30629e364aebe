"""One training batch on its device: images, labels and maps -> what the network sees.

Geometry, proxies, erasing and mixing are applied in this order. A map is upsampled and moved with its image first, so
that shares and quantiles are taken of what the network sees. Nothing here makes the host wait for the device: which
images are changed by a map is known on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pa_core import augment, masking
from pa_core.attribution import upsampled
from pa_core.augment import Generators, Geometry, Maps
from pa_core.data import Part, send
from pa_core.params import Experiment


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """What an epoch draws from: M entries, each an image of a part, and perhaps the map that may change it.

    Attributes:
        part: the images.
        origin: int64 [M], their positions in the part.
        row: int64 [M], the entry's map among ``maps``, -1 for none.
        proxied: bool [M], whether a draw may be masked by the map.
        withheld: bool [M], whether a draw has no part in the loss.
        maps: float16 [K, h, w] in [0, 1], on the images' device.
    All but the maps are on the CPU.
    """

    part: Part
    origin: Tensor
    row: Tensor
    proxied: Tensor
    withheld: Tensor
    maps: Tensor

    @classmethod
    def of(cls, part: Part) -> Pool:
        """The part as it is, without maps."""
        n = len(part)
        no = torch.zeros(n, dtype=torch.bool)
        maps = torch.zeros(0, 1, 1, dtype=torch.float16, device=part.resident or "cpu")
        return cls(part=part, origin=torch.arange(n), row=torch.full((n,), -1), proxied=no, withheld=no, maps=maps)

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
    """What the network is trained on.

    Attributes:
        images: float32 [n, 3, S, S] in [0, 1].
        targets: int64 [n], or float32 [n, classes] with rows that sum to 1 where labels are mixed.
        weights: float32 [n] of the loss, or None where all count alike.
    """

    images: Tensor
    targets: Tensor
    weights: Tensor | None = None


def make(
    images: Tensor,
    *,
    labels: Tensor,
    classes: int,
    pool: Pool,
    index: Tensor,
    experiment: Experiment,
    draws: Generators,
) -> Batch:
    """The batch at some positions of a pool, augmented.

    Args:
        images: uint8 [n, 3, S, S] on the device, those at ``pool.origin[index]``.
        labels: int64 [n] on the device.
        classes: how many there are.
        index: int64 [n] on the CPU, positions in the pool.
    """
    e, n = experiment, len(images)
    by_map = e.erase_region != "anywhere" or e.mix_labels == "attention"
    masked = pool.proxied[index] & (torch.rand(n, generator=draws["proxy"]) < e.proxy_probability)
    rows = torch.nonzero((pool.row[index] >= 0) if by_map else masked).squeeze(1)
    move = Geometry.draw(n, images.shape[-1], kinds=e.augmentations, draws=draws)
    pixels = masking.to_float(move.apply(images))
    maps = Maps.none(pixels)
    if len(rows):
        maps = Maps(rows=send(rows, pixels.device), values=move.of(rows).apply(_maps(pool, index[rows], pixels)))
    changed = torch.nonzero(masked[rows]).squeeze(1)  # of the rows with maps
    if len(changed):
        pixels, _ = proxied(pixels, maps.at(changed, rows), experiment=e, draws=draws)
    weights = None
    if pool.withheld.any():
        weights = send((~pool.withheld[index]).float(), pixels.device)
    pixels, mixing = augment.change(pixels, maps, experiment=e, draws=draws)
    targets = labels if mixing is None else mixing.targets(labels, classes=classes)
    return Batch(images=laid_out(pixels), targets=targets, weights=weights)


def unaugmented(images: Tensor, *, pool: Pool, index: Tensor, experiment: Experiment, draws: Generators) -> Tensor:
    """The images at some positions of a pool with every proxy masked, and nothing else changed."""
    pixels = masking.to_float(images)
    rows = torch.nonzero(pool.proxied[index]).squeeze(1)
    if len(rows):
        maps = Maps(rows=send(rows, pixels.device), values=_maps(pool, index[rows], pixels))
        pixels, _ = proxied(pixels, maps, experiment=experiment, draws=draws)
    return laid_out(pixels)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [n, 3, S, S] -> float32 in [0, 1], laid out as the networks on that device want them."""
    return masking.to_float(laid_out(images))


def laid_out(images: Tensor) -> Tensor:
    """The same images in the memory format of the networks on their device; indexing loses it."""
    return images.contiguous(memory_format=memory_format(images.device))


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels last for CUDA's tensor cores and for the CPU, where the default model trains a fifth faster."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def _maps(pool: Pool, index: Tensor, images: Tensor) -> Tensor:
    """Upsampled maps float32 [m, S, S] of positions of the pool, on the images' device."""
    stored = pool.maps.index_select(0, send(pool.row[index], pool.maps.device))
    return upsampled(send(stored, images.device), images.shape[-1])


def proxied(images: Tensor, maps: Maps, *, experiment: Experiment, draws: Generators) -> tuple[Tensor, Tensor]:
    """The batch with the images that have a map masked: `masking.region`, then `masking.apply`.

    What is random in a fill is drawn anew at each draw; ``patch`` fills with another image of the batch.

    Args:
        images: float32 [n, 3, S, S] in [0, 1].

    Returns:
        the images, and the masks bool [m, S, S] of those with a map.
    """
    e, n = experiment, len(images)
    mask = masking.region(
        maps.values,
        mask_region=e.mask_region,
        threshold_mode=e.threshold_mode,
        threshold=e.threshold,
        max_share=e.max_share,
    )
    donors = None
    if e.fill == "patch":
        shift = torch.randint(1, max(n, 2), (n,), generator=draws["patch"])
        donors = images.index_select(0, send((torch.arange(n) + shift) % n, images.device).index_select(0, maps.rows))
    seed = int(torch.randint(2**62, (1,), generator=draws["noise"])) if e.fill == "noise" else 0
    changed = masking.apply(
        images.index_select(0, maps.rows),
        maps.values,
        mask,
        fill=e.fill,
        weight=e.weight,
        mask_region=e.mask_region,
        feather=e.feather,
        seed=seed,
        donors=donors,
    )
    return images.index_copy(0, maps.rows, changed), mask
