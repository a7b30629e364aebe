"""The proxy step: score -> select -> explain -> store maps; and the pool that the next epochs draw from.

Maps lie in the run directory and are keyed by position in the training part, whose images are only ever read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
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
from pa_core.errors import ParameterError
from pa_core.masking import to_float, to_uint8
from pa_core.models import Classifier
from pa_core.params import Experiment, derived_seed
from pa_core.train import evaluate, evaluation_batch, feed

SHOWN = 8
"""Proxies of each step that are kept as images."""

CHUNK = 64
"""Images explained at once, so that memory does not grow with the number of proxies."""

MOST_BYTES_OF_MAPS = 2**28
"""The scoring pass makes the maps of all training images if they take no more memory than this (an early CAM layer has
a large grid); otherwise the selected images are explained in a pass of their own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What a proxy step keeps: maps float16 [K, h, w] in [0, 1] of the training images at positions int64 [K]."""

    positions: Tensor
    maps: Tensor

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Step:
        positions, maps = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("positions", "maps"))
        return cls(positions=positions, maps=maps.to(device))


def pool(part: Part, experiment: Experiment, steps: Sequence[Step]) -> Pool:
    """What an epoch draws from, by the maps of some proxy steps, the earliest first.

    ``replace``: an image with a map is masked when it is drawn; where two steps have one, the later counts. ``append``:
    the proxies follow as entries N, N + 1, ..., each `copies` times. ``withhold``: selected images are left out of the
    loss.
    """
    plain, e, steps = Pool.of(part), experiment, [step for step in steps if len(step.positions)]
    if not steps:
        return plain
    overlays = {"clean": (e.overlay, e.copies), "thesis": ("append", 1), "thesis_text": ("replace", 1)}
    overlay, copies = overlays[e.protocol]
    positions, maps = torch.cat([step.positions for step in steps]), torch.cat([step.maps for step in steps])
    rows, row, off = torch.arange(len(positions)), plain.row.clone(), plain.proxied
    for step, its_rows in zip(steps, rows.split([len(step.positions) for step in steps]), strict=True):
        row[step.positions] = its_rows  # one step after the other: the later map wins
    selected = row >= 0
    added = rows.repeat(copies) if overlay == "append" else rows[:0]
    return Pool(
        part=part,
        origin=torch.cat([plain.origin, positions[added]]),
        row=torch.cat([row, added]),
        proxied=torch.cat([selected if overlay == "replace" and e.masks else off, torch.full(added.shape, e.masks)]),
        withheld=torch.cat([selected if overlay == "withhold" else off, torch.full(added.shape, False)]),
        maps=maps,
    )


# Score -> select -> explain


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What a proxy step selected."""

    positions: Tensor  # int64 [K] in the training part, the first choice first
    targets: Tensor  # int64 [K], the classes to explain
    maps: Tensor | None  # float32 [K, h, w], raw, of the scoring pass; None: explain() makes them
    scores: selection.Scores  # of all training images
    seed: int  # of all random draws in this step
    explained: tuple[str, ...] = ()  # (xai, smooth, label or predicted) that the maps belong to


def choose(
    model: Classifier,
    part: Part,
    experiment: Experiment,
    *,
    step: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    candidates: Tensor | None = None,
) -> Choice:
    """Score all training images and select some.

    With a class activation map (CAM), the pass that scores the images makes the maps, too.

    Args:
        candidates: int64, the positions that may be selected under the predecessor's protocol; None for all.
    """
    e, seed = experiment, derived_seed(experiment.seed, "proxy step", step)
    logits, maps = _scored(model, part, e, device=device, dtype=dtype)
    scores = selection.score(logits, part.labels)
    if candidates is None:
        positions = selection.select(scores, by=e.select, fraction=e.fraction, seed=seed)
    else:
        positions = selection.some_wrong(scores, among=candidates, fraction=e.fraction, seed=seed)
    if e.explains and e.permute_maps and len(positions) == 1:
        positions = positions[:0]  # no other image's map to take; the log says that none was selected
    targets = (scores.predicted if e.explained == "predicted" else scores.labels)[positions]
    chosen, how = (None if maps is None else maps[positions.to(maps.device)]), (e.xai, e.smooth, e.explained)
    return Choice(positions=positions, targets=targets, maps=chosen, explained=how, scores=scores, seed=seed)


def _scored(
    model: Classifier, part: Part, e: Experiment, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Logits [N, C] of all training images, on the CPU; and their raw maps [N, h, w] if the same pass makes them."""
    fits = 4 * len(part) * model.cam.grid[0] * model.cam.grid[1] <= MOST_BYTES_OF_MAPS
    # gaussian smoothing is done at the image's size, so those maps are not on the CAM layer's grid
    if not (fits and e.explains and attribution.fused(e.xai, e.smooth) and e.smooth != "gaussian"):
        return evaluate(model, Pool.of(part), device=device, dtype=dtype).logits, None
    logits, maps = [], []
    with attribution.as_found(model):
        order = torch.arange(len(part)).split(evaluation_batch(part))
        for index, images in zip(order, feed(part, order, device), strict=True):
            target = send(part.labels[index], device) if e.explained == "label" else None
            with autocast(device, dtype):
                made, scored = attribution.grids(model, to_pixels(images), method=e.xai, target=target, smooth=e.smooth)
            logits.append(scored.float())
            maps.append(made)
    return torch.cat(logits).cpu(), torch.cat(maps)


def explain(
    model: Classifier,
    part: Part,
    experiment: Experiment,
    choice: Choice,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The maps of the chosen images as they are stored: float16 [K, h, w] in [0, 1], on the device.

    With ``permute_maps`` each image gets the map of another one. A choice made for another method is refused.
    """
    e, ids = experiment, [part.ids[i] for i in choice.positions.tolist()]
    if choice.explained not in ((), (e.xai, e.smooth, e.explained)):
        raise ParameterError("xai", e.xai, f"must be what the images were chosen with: {', '.join(choice.explained)}")
    if not e.explains or not ids:
        return torch.zeros(len(ids), 1, 1, dtype=torch.float16, device=device)
    if choice.maps is not None:
        maps = attribution.stored(choice.maps)
    else:
        made = []
        for at in _chunks(len(ids)):
            images, target = to_pixels(part.read(choice.positions[at]).to(device)), choice.targets[at].to(device)
            how = {"method": e.xai, "smooth": e.smooth, "ids": [ids[i] for i in at.tolist()], "seed": choice.seed}
            with autocast(device, dtype):
                made.append(attribution.explain(model, images, target=target, **how))
        maps = torch.cat(made)
    return maps[attribution.derangement(ids, choice.seed).to(maps.device)] if e.permute_maps else maps


# Proxies to look at


@dataclass(frozen=True, kw_only=True, eq=False)
class Proxies:
    """Proxies beside what they are made from, without augmentation; all on one device."""

    originals: Tensor  # uint8 [n, 3, S, S]
    maps: Tensor  # float32 [n, S, S] in [0, 1]
    mask: Tensor  # bool [n, S, S]
    images: Tensor  # uint8 [n, 3, S, S]

    def __len__(self) -> int:
        return len(self.images)

    def picture(self) -> Tensor:
        """Original, map, mask and proxy side by side, one image per row: uint8 [3, H, W]."""
        grey = [(self.maps * 255).to(torch.uint8), self.mask.to(torch.uint8) * 255]
        columns = [self.originals, *(g[:, None].expand_as(self.originals) for g in grey), self.images]
        return make_grid(torch.stack(columns, 1).flatten(0, 1).cpu(), nrow=len(columns), padding=1)


def made(part: Part, positions: Tensor, maps: Tensor, experiment: Experiment, *, seed: int) -> Proxies:
    """Proxies of some training images, without augmentation, on the device of the maps.

    Args:
        positions: int64 [n].
        maps: float16 [n, h, w] in [0, 1], as they are stored.
        seed: of what is random in a fill.
    """
    originals, values = part.read(positions).to(maps.device), attribution.upsampled(maps, part.shape[-1])
    if not experiment.masks:
        return Proxies(originals=originals, maps=values, mask=torch.zeros_like(values).bool(), images=originals)
    rows, draws = torch.arange(len(positions), device=maps.device), generators(seed, 0)
    images, mask = batch.proxied(to_float(originals), rows, values, experiment=experiment, draws=draws)
    return Proxies(originals=originals, maps=values, mask=mask, images=to_uint8(images))


# The step, and what is stored of it


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
    show: Callable[[Tensor], None] | None = None,
) -> dict[str, Any]:
    """Make the maps of one step and store them in ``directory``, which appears whole or not at all.

    Args:
        candidates: see :func:`choose`.
        show: called with a picture of the first proxies, uint8 [3, H, W], for TensorBoard.

    Returns:
        asked: images that ``fraction`` asked for; images: those that qualified; masked_share: mean share of masked
        pixels without augmentation, [0, 1]; unchanged: proxies equal to their original; blank: constant maps, of which
        a quantile masks random places; seconds: of the whole step; scoring_seconds: of the scoring pass.
    """
    started, e = time.perf_counter(), experiment
    building = directory.with_name(directory.name + ".part")
    for leftover in (building, directory):  # of a process that was killed
        if leftover.exists():
            shutil.rmtree(leftover)
    building.mkdir(parents=True)
    choice = choose(model, part, e, step=step, device=device, dtype=dtype, candidates=candidates)
    scoring_seconds = time.perf_counter() - started
    maps = explain(model, part, e, choice, device=device, dtype=dtype)
    table, blank = _table(part, e, choice, maps)
    np.save(building / "maps.npy", maps.cpu().numpy())
    np.save(building / "positions.npy", choice.positions.numpy())
    table.to_csv(building / "proxies.csv", index=False)
    if len(table):
        picture = made(part, choice.positions[:SHOWN], maps[:SHOWN], e, seed=choice.seed).picture()
        to_pil_image(picture).save(building / "proxies.png")
        if show is not None:
            show(picture)
    building.rename(directory)
    asked = len(part) if e.select == "all" else selection.count(len(part), e.fraction)
    return {
        "asked": asked if candidates is None else len(table),  # of the wrong images, whose number is not known before
        "images": len(table),
        "masked_share": float(table["masked_share"].mean()) if len(table) else 0.0,
        "unchanged": int(table["unchanged"].sum()),
        "blank": blank,
        "seconds": time.perf_counter() - started,
        "scoring_seconds": scoring_seconds,
    }


def _table(part: Part, e: Experiment, choice: Choice, maps: Tensor) -> tuple[pd.DataFrame, int]:
    """proxies.csv, a row per chosen image, the first choice first; and how many maps are constant."""
    shares, unchanged, blank, positions = [], [], 0, choice.positions
    for at in _chunks(len(positions)):
        proxies = made(part, positions[at], maps[at.to(maps.device)], e, seed=choice.seed)
        shares += proxies.mask.flatten(1).float().mean(1).tolist()
        unchanged += (proxies.images == proxies.originals).flatten(1).all(1).tolist()
        flat = proxies.maps.flatten(1)
        blank += int((flat.amax(1) == flat.amin(1)).sum()) if e.explains else 0
    columns = {
        "id": [part.ids[i] for i in positions.tolist()],
        "label": part.labels[positions].numpy(),
        "predicted": choice.scores.predicted[positions].numpy(),
        "explained": choice.targets.numpy(),
        "loss": choice.scores.loss[positions].numpy(),
        "masked_share": np.array(shares, dtype=float),
        "unchanged": np.array(unchanged, dtype=bool),
    }
    return pd.DataFrame(columns), blank


def _chunks(n: int) -> tuple[Tensor, ...]:
    """Equal chunks of at most CHUNK rows; a last one of a single image would have no donor for ``patch``."""
    return torch.arange(n).tensor_split(-(-n // CHUNK)) if n else ()
