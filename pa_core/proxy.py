"""The proxy step: score -> select -> explain -> store maps; and the pool that the next epochs draw from.

Maps lie in the run directory and are keyed by position in the training part, whose images are only ever read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from pa_core import attribution, batch, selection
from pa_core.augment import generators
from pa_core.batch import Pool, to_pixels
from pa_core.data import Part, send
from pa_core.device import autocast
from pa_core.masking import to_float, to_uint8
from pa_core.models import Classifier
from pa_core.params import Experiment, derived_seed
from pa_core.train import evaluate, evaluation_batch, feed

SHOWN = 8  # proxies of each step that are kept as images
CHUNK = 64  # images explained at once, so that memory does not grow with the number of proxies
MOST_BYTES_OF_MAPS = 2**28  # with more for all training images (an early layer's), scoring makes none


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What a proxy step keeps: maps float16 [K, h, w] in [0, 1] of the training images at positions int64 [K]."""

    positions: Tensor
    maps: Tensor

    @classmethod
    def load(cls, folder: Path) -> Step:
        return cls(**{name: torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("positions", "maps")})


def pool(part: Part, experiment: Experiment, steps: Sequence[Step]) -> Pool:
    """What an epoch draws from, by the maps of some proxy steps, the earliest first.

    ``replace``: an image with a map is masked when it is drawn, by the later one of two. ``append``: the proxies follow
    as entries N, N + 1, ..., each `copies` times. ``withhold``: selected images are left out of the loss.
    """
    plain, e, steps = Pool.of(part), experiment, [step for step in steps if len(step.positions)]
    if not steps:
        return plain
    overlays = {"clean": (e.overlay, e.copies), "thesis": ("append", 1), "thesis_text": ("replace", 1)}
    overlay, copies = overlays[e.protocol]
    positions, maps = torch.cat([step.positions for step in steps]), torch.cat([step.maps for step in steps])
    rows = torch.arange(len(positions))
    row = plain.row.scatter_reduce(0, positions, rows, "amax")  # the later map wins
    selected, off = row >= 0, torch.zeros(len(part), dtype=torch.bool)
    proxied = selected if overlay == "replace" and e.masks else off
    withheld = selected if overlay == "withhold" else off
    added = rows.repeat(copies) if overlay == "append" else rows[:0]  # rows of maps that become entries of their own
    return Pool(
        part=part,
        origin=torch.cat([plain.origin, positions[added]]),
        row=torch.cat([row, added]),
        proxied=torch.cat([proxied, torch.full(added.shape, e.masks)]),
        withheld=torch.cat([withheld, torch.full(added.shape, False)]),
        maps=maps.to(plain.maps.device),
    )


def proxy_step(
    model: Classifier,
    part: Part,
    experiment: Experiment,
    *,
    step: int,
    directory: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    candidates: Tensor | None = None,
) -> dict[str, Any]:
    """Make the maps of one step and store them in ``directory``, which appears whole or not at all.

    ``candidates`` int64 may be selected under the predecessor's protocol; None for all. Returns how many images
    ``fraction`` asked for and how many qualified; masked_share: mean share of masked pixels without augmentation, in
    [0, 1]; unchanged: proxies equal to their original; blank: constant maps, of which a quantile masks random places.
    """
    started, e, seed = time.perf_counter(), experiment, derived_seed(experiment.seed, "proxy step", step)
    building = directory.with_name(directory.name + ".part")
    for leftover in (building, directory):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir(parents=True)
    logits, raw = _scored(model, part, e, device=device, dtype=dtype)
    scores = selection.score(logits, part.labels)
    if candidates is None:
        positions = selection.select(scores, by=e.select, fraction=e.fraction, seed=seed)
        asked = selection.count(len(part), 1 if e.select == "all" else e.fraction)
    else:  # a fraction of the wrong ones, whose number is not known before
        positions = selection.some_wrong(scores, among=candidates, fraction=e.fraction, seed=seed)
        asked = len(positions)
    if e.explains and e.permute_maps and len(positions) == 1:
        positions = positions[:0]  # no other image's map to take; the log says that none was selected
    explained = (scores.predicted if e.explained == "predicted" else scores.labels)[positions]
    maps = maps_for(model, part, e, positions, explained, seed=seed, device=device, dtype=dtype, raw=raw)
    table = _table(part, e, scores, positions, explained, maps, seed=seed)
    table.to_csv(building / "proxies.csv", index=False)
    np.save(building / "maps.npy", maps.cpu().numpy())
    np.save(building / "positions.npy", positions.numpy())
    if len(table):
        picture = proxies_of(part, positions[:SHOWN], maps[:SHOWN], e, seed=seed).picture()
        to_pil_image(picture).save(building / "proxies.png")
    building.rename(directory)
    return {
        "asked": asked,
        "images": len(table),
        "masked_share": float(table["masked_share"].mean()) if len(table) else 0.0,
        "unchanged": int(table["unchanged"].sum()),
        "blank": int((maps.flatten(1).amax(1) == maps.flatten(1).amin(1)).sum()) if e.explains else 0,
        "seconds": time.perf_counter() - started,
    }


def _scored(
    model: Classifier, part: Part, e: Experiment, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Logits [N, C] of all training images, on the CPU; and their raw maps [N, h, w] if the same pass makes them."""
    small = 4 * len(part) * model.cam.grid[0] * model.cam.grid[1] <= MOST_BYTES_OF_MAPS
    # gaussian smoothing is done at the image's size, so those maps are not on the CAM layer's grid
    if not (small and e.explains and attribution.fused(e.xai, e.smooth) and e.smooth != "gaussian"):
        return evaluate(model, Pool.of(part), device=device, dtype=dtype).logits, None
    logits, maps = [], []
    with attribution.as_found(model):
        order = torch.arange(len(part)).split(evaluation_batch(part))
        for index, images in zip(order, feed(part, order, device), strict=True):
            target = send(part.labels[index], device) if e.explained == "label" else None
            with autocast(device, dtype):
                raw, outputs = attribution.grids(model, to_pixels(images), method=e.xai, target=target, smooth=e.smooth)
            logits.append(outputs.float())
            maps.append(raw)
    return torch.cat(logits).cpu(), torch.cat(maps)


def maps_for(
    model: Classifier,
    part: Part,
    experiment: Experiment,
    positions: Tensor,
    explained: Tensor,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    raw: Tensor | None = None,
) -> Tensor:
    """The maps of the images at positions int64 [K] as they are stored: float16 [K, h, w] in [0, 1], on the device.

    ``explained`` int64 [K] are the classes to explain; ``raw`` [N, h, w] are maps of all images, where the scoring pass
    has made them. With ``permute_maps`` each image gets the map of another one.
    """
    e, ids, maps = experiment, [part.ids[i] for i in positions.tolist()], []
    if not e.explains or not ids:
        return torch.zeros(len(ids), 1, 1, dtype=torch.float16, device=device)
    for at in _chunks(len(ids)) if raw is None else ():
        images = to_pixels(part.read(positions[at]).to(device))
        how = {"method": e.xai, "smooth": e.smooth, "ids": [ids[i] for i in at.tolist()], "seed": seed}
        with autocast(device, dtype):
            maps.append(attribution.explain(model, images, target=explained[at].to(device), **how))
    own = torch.cat(maps) if raw is None else attribution.stored(raw[positions.to(raw.device)])
    return own[attribution.derangement(ids, seed).to(own.device)] if e.permute_maps else own


def _table(
    part: Part, e: Experiment, scores: selection.Scores, positions: Tensor, explained: Tensor, maps: Tensor, seed: int
) -> pd.DataFrame:
    """proxies.csv: a row per selected image, the first choice first."""
    columns = {"label": scores.labels[positions], "predicted": scores.predicted[positions], "explained": explained}
    columns |= {"loss": scores.loss[positions]}
    ids, shares, unchanged = [part.ids[i] for i in positions.tolist()], [], []
    for at in _chunks(len(ids)):
        proxies = proxies_of(part, positions[at], maps[at.to(maps.device)], e, seed=seed)
        shares += proxies.mask.flatten(1).float().mean(1).tolist()
        unchanged += (proxies.images == proxies.originals).flatten(1).all(1).tolist()
    table = pd.DataFrame({"id": ids} | {name: values.numpy() for name, values in columns.items()})
    return table.assign(masked_share=shares, unchanged=unchanged)


def _chunks(n: int) -> tuple[Tensor, ...]:
    """Equal chunks of at most CHUNK rows; a last one of a single image would have no donor for ``patch``."""
    return torch.arange(n).tensor_split(-(-n // CHUNK)) if n else ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Proxies:
    """Proxies beside what they are made from, without augmentation; all on one device."""

    originals: Tensor  # uint8 [n, 3, S, S]
    maps: Tensor  # float32 [n, S, S] in [0, 1]
    mask: Tensor  # bool [n, S, S]
    images: Tensor  # uint8 [n, 3, S, S]

    def picture(self) -> Tensor:
        """Original, map, mask and proxy side by side, one image per row: uint8 [3, H, W]."""
        grey = [(self.maps * 255).to(torch.uint8), self.mask.to(torch.uint8) * 255]
        columns = [self.originals, *(g[:, None].expand_as(self.originals) for g in grey), self.images]
        return make_grid(torch.stack(columns, 1).flatten(0, 1).cpu(), nrow=len(columns), padding=1)


def proxies_of(part: Part, positions: Tensor, maps: Tensor, experiment: Experiment, *, seed: int) -> Proxies:
    """Proxies of the training images at positions int64 [n], without augmentation, on the device of the maps.

    ``maps`` float16 [n, h, w] in [0, 1] are as they are stored; ``seed`` is that of what is random in a fill.
    """
    originals, values = part.read(positions).to(maps.device), attribution.upsampled(maps, part.shape[-1])
    if not experiment.masks:
        return Proxies(originals=originals, maps=values, mask=torch.zeros_like(values).bool(), images=originals)
    rows, draws = torch.arange(len(positions), device=maps.device), generators(seed, 0)
    images, mask = batch.mask_some(to_float(originals), rows, values, experiment=experiment, draws=draws)
    return Proxies(originals=originals, maps=values, mask=mask, images=to_uint8(images))
