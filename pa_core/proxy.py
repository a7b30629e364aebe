"""The proxy step: score -> select -> attribute -> mask -> overlay.

Proxies lie in the run directory and are keyed by position in the training part. The training images themselves
are only ever read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pa_core import attribution, masking, selection
from pa_core.data import Part, send
from pa_core.models import Classifier
from pa_core.params import Experiment, derived_seed
from pa_core.train import autocast, evaluate, evaluation_batch, feed, memory_format, pixels

EXAMPLES = 16
"""Heatmaps kept per step, of the first choices, to be looked at; all are not, they would take more room than the proxies."""

CHUNK = 64
"""Images explained and masked at once, so that memory does not grow with the number of proxies."""

MOST_BYTES_OF_MAPS = 2**28
"""Maps of all training images are kept during the scoring pass as long as they are no more than this (an early CAM
layer's grid is fine); beyond it, the selected images are explained by a pass of their own."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one proxy step did.

    Attributes:
        step: 1, 2, ... in the schedule.
        epoch: epochs trained before it.
        asked: images that ``fraction`` asked for; images: those that qualified.
        masked_share: mean share of masked pixels per proxy, [0, 1].
        unchanged: proxies equal to their original.
        blank: heatmaps that are constant, so that a quantile masks places at random.
        seconds: the whole step; scoring_seconds: the scoring pass alone.
    """

    step: int
    epoch: int
    asked: int
    images: int
    masked_share: float
    unchanged: int
    blank: int
    seconds: float
    scoring_seconds: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Proxies:
    """A batch of proxies beside what they were made from; all on the CPU.

    Attributes:
        originals, images: uint8 [n, 3, S, S].
        maps: float32 [n, S, S] in [0, 1].
        mask: bool [n, S, S].
    """

    originals: Tensor
    maps: Tensor
    mask: Tensor
    images: Tensor

    def __len__(self) -> int:
        return len(self.images)


class Overlay:
    """The training part with proxies in the place of their originals, or beside them.

    Where the part lies on a device, the proxies are copied into the room behind its images, so that reading stays one
    gather; a later overlay of the same part takes that room over.

    Args:
        base: the training part.
        mode: ``replace``, or ``append``: the proxies follow as positions N, N + 1, ...
        steps: directories of proxy steps, the earliest first; where two have a proxy of one image,
            ``replace`` takes the later one.

    Raises:
        ValueError: the part has less room than there are proxies.
    """

    def __init__(self, base: Part, *, mode: str, steps: list[Path]):
        self.base, self.mode, self.shape, self.resident = base, mode, base.shape, base.resident
        self._images = [np.load(step / "images.npy", mmap_mode="r") for step in steps]
        positions = [torch.from_numpy(np.load(step / "positions.npy")) for step in steps]
        self._starts = np.cumsum([0, *(len(p) for p in positions)])
        self.positions = torch.cat([torch.zeros(0, dtype=torch.long), *positions])
        # slot[i]: which proxy is read at position i, -1 for an image as it is
        n = len(base)
        self.slot = torch.full((n,), -1)
        if mode == "replace":
            for start, some in zip(self._starts, positions, strict=False):  # one after the other: the later proxy wins
                self.slot[some] = torch.arange(len(some)) + int(start)
            self.labels = base.labels
        else:
            self.slot = torch.cat([self.slot, torch.arange(len(self.positions))])
            self.labels = torch.cat([base.labels, base.labels[self.positions]])
        if base.images is not None:
            # the row of base.images that is read at position i
            row = torch.where(self.slot < 0, torch.arange(len(self.slot)), n + self.slot)
            self._row = row.to(base.images.device)
            self._fill(base.images[n:])

    def _fill(self, room: Tensor) -> None:
        if len(room) < len(self.positions):
            raise ValueError(f"the part has room for {len(room)} proxies, and there are {len(self.positions)}")
        for start, images in zip(self._starts, self._images, strict=False):
            for at in range(0, len(images), CHUNK):
                some = torch.from_numpy(images[at : at + CHUNK].copy())
                room[start + at : start + at + len(some)] = some

    def __len__(self) -> int:
        return len(self.slot)

    def read(self, index: Tensor) -> Tensor:
        """[n] positions -> uint8 [n, 3, S, S], in the order asked; on the part's device."""
        if self.base.images is not None:
            return self.base.images.index_select(0, self._row[send(index, self._row.device)])
        slot = self.slot[index]
        proxy = slot >= 0
        images = self.base.read(index[~proxy])
        if not proxy.any():
            return images
        result = images.new_empty((len(index), *images.shape[1:]))
        result[~proxy] = images
        result[proxy] = self._read_proxies(slot[proxy])
        return result

    def _read_proxies(self, rows: Tensor) -> Tensor:
        step = np.searchsorted(self._starts, rows.numpy(), side="right") - 1
        picked = [self._images[s][r - self._starts[s]] for s, r in zip(step, rows.numpy(), strict=True)]
        return torch.from_numpy(np.stack(picked))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a proxy step selected.

    Attributes:
        positions: int64 [K] in the training part, the first choice first.
        targets: int64 [K], the classes to explain.
        maps: float32 [K, h, w], raw class activation maps on the CAM layer's grid, from the scoring pass; None where the
            method needs a pass of its own, or nothing is explained.
        seed: of what is random in the proxies, together with the image id; another one for each step, so that a random
            mask does not come again.
    """

    positions: Tensor
    targets: Tensor
    maps: Tensor | None
    seed: int

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, rows: slice | Tensor) -> Choice:
        maps = None if self.maps is None else self.maps[rows]
        return replace(self, positions=self.positions[rows], targets=self.targets[rows], maps=maps)


def make_proxies(
    model: Classifier,
    part: Part,
    experiment: Experiment,
    choice: Choice,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Proxies:
    """Explain and mask the chosen training images, as the parameters say."""
    e, positions = experiment, choice.positions
    originals, ids = part.read(positions), [part.ids[i] for i in positions.tolist()]
    images = masking.to_float(originals.to(device))
    if e.fill == "none":  # a control without any mask: nothing to explain
        maps = images.new_zeros((len(images), *images.shape[-2:]))
        mask = maps.bool()
    else:
        maps = _heatmaps(model, images, e, choice, ids=ids, device=device, dtype=dtype)
        mask = masking.region(
            maps,
            mask_region=e.mask_region,
            threshold_mode=e.threshold_mode,
            threshold=e.threshold,
            max_share=e.max_share,
        )
    changed = masking.apply(
        images,
        maps,
        mask,
        fill=e.fill,
        weight=e.weight,
        mask_region=e.mask_region,
        feather=e.feather,
        ids=ids,
        seed=choice.seed,
        donors=donors(part, positions, seed=choice.seed).to(device) if e.fill == "patch" else None,
    )
    return Proxies(originals=originals.cpu(), maps=maps.cpu(), mask=mask.cpu(), images=masking.to_uint8(changed).cpu())


def _heatmaps(
    model: Classifier,
    images: Tensor,
    e: Experiment,
    choice: Choice,
    *,
    ids: list[str],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """[n, S, S] in [0, 1]: from the maps of the scoring pass, or by a pass of their own."""
    if choice.maps is not None:
        return attribution.from_grids(choice.maps, image_size=images.shape[-1], smooth=e.smooth)
    target = choice.targets.to(device)
    images = images.contiguous(memory_format=memory_format(device))  # as in training
    with autocast(device, dtype):
        return attribution.heatmaps(
            model, images, method=e.xai, target=target, smooth=e.smooth, ids=ids, seed=choice.seed
        )


def donors(part: Part, positions: Tensor, *, seed: int) -> Tensor:
    """Another training image for each of some, for the fill ``patch``; which one is seeded by the id.

    Returns:
        float32 [n, 3, S, S] in [0, 1], on the part's device.
    """
    others = len(part) - 1
    shifts = [1 + derived_seed(seed, "patch", part.ids[i]) % others for i in positions.tolist()]
    return masking.to_float(part.read((positions + torch.tensor(shifts, dtype=torch.long)) % len(part)))


def choose(
    model: Classifier,
    part: Part,
    experiment: Experiment,
    *,
    step: int,
    device: torch.device,
    dtype: torch.dtype,
    candidates: Tensor | None = None,
) -> tuple[Choice, selection.Scores]:
    """Score all training images and select some.

    Args:
        candidates: int64, under the predecessor's protocol the positions that may be selected; see `selection.some_wrong`.

    With a class activation map, the pass that scores the images makes the maps, too: it has just computed all they need.

    Returns:
        the choice; the scores of all images.
    """
    e = experiment
    logits, maps = _scored(model, part, e, device=device, dtype=dtype)
    scores = selection.score(logits, part.labels)
    seed = derived_seed(e.seed, "proxy step", step)
    if candidates is None:
        positions = selection.select(scores, by=e.select, fraction=e.fraction, seed=seed)
    else:
        positions = selection.some_wrong(scores, among=candidates, fraction=e.fraction, seed=seed)
    dealt = e.fill != "none" and attribution.METHODS[attribution.resolve(e.xai)].dealt
    if dealt and len(positions) == 1:
        positions = positions[:0]  # there is no other image whose map it could get; the log says that none was selected
    if maps is not None:
        maps = maps[positions.to(maps.device)]
        if dealt and len(positions):
            maps = maps[attribution.derangement([part.ids[i] for i in positions.tolist()], e.seed).to(maps.device)]
    explained = scores.predicted if e.xai_target == "predicted" else scores.labels
    return Choice(positions=positions, targets=explained[positions], maps=maps, seed=seed), scores


def _scored(
    model: Classifier, part: Part, e: Experiment, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Logits [N, C] of all training images, on the CPU; where one pass gives both, their raw maps [N, h, w]."""
    h, w = model.cam.grid
    if e.fill == "none" or not attribution.fused(e.xai, e.smooth) or 4 * len(part) * h * w > MOST_BYTES_OF_MAPS:
        return evaluate(model, part, device=device, dtype=dtype).logits, None
    logits, maps = [], []
    with attribution.as_found(model):
        order = torch.arange(len(part)).split(evaluation_batch(part))
        for index, images in zip(order, feed(part, order, device), strict=True):
            target = send(part.labels[index], device) if e.xai_target == "label" else None
            with autocast(device, dtype):
                made, scored = attribution.grids(model, pixels(images), method=e.xai, target=target, smooth=e.smooth)
            logits.append(scored.float())
            maps.append(made)
    return torch.cat(logits).cpu(), torch.cat(maps)


def proxy_step(
    model: Classifier,
    part: Part,
    experiment: Experiment,
    *,
    step: int,
    epoch: int,
    directory: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    candidates: Tensor | None = None,
    show: Callable[[Proxies], None] | None = None,
) -> Record:
    """Make the proxies of one step and store them in ``directory``, which appears whole or not at all.

    Args:
        candidates: see :func:`choose`.
        show: called with the first chunk, for TensorBoard.
    """
    started = time.perf_counter()
    building = directory.with_name(directory.name + ".part")
    for leftover in (building, directory):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=False) if leftover.exists() else None
    building.mkdir(parents=True)
    choice, scores = choose(model, part, experiment, step=step, device=device, dtype=dtype, candidates=candidates)
    scoring_seconds = time.perf_counter() - started
    tally = _Tally()
    with _Images(building / "images.npy", count=len(choice), like=part) as images:
        for at in _chunks(len(choice)):
            made = make_proxies(model, part, experiment, choice[at], device=device, dtype=dtype)
            images.write(at, made.images)
            tally.add(made)
            if int(at[0]) == 0:
                np.savez(
                    building / "examples.npz", maps=made.maps[:EXAMPLES].numpy(), mask=made.mask[:EXAMPLES].numpy()
                )
                if show is not None:
                    show(made)
    np.save(building / "positions.npy", choice.positions.numpy())
    tally.table(part, choice, scores).to_csv(building / "proxies.csv", index=False)
    building.rename(directory)
    asked = len(part) if experiment.select == "all" else selection.count(len(part), experiment.fraction)
    asked = (
        asked if candidates is None else len(choice)
    )  # there it is a fraction of the wrong ones, however many those are
    return Record(
        step=step,
        epoch=epoch,
        asked=asked,
        images=len(choice),
        masked_share=tally.masked_share(),
        unchanged=sum(tally.unchanged),
        blank=tally.blank if experiment.fill != "none" else 0,
        seconds=time.perf_counter() - started,
        scoring_seconds=scoring_seconds,
    )


def examples(directory: Path, part: Part, *, count: int) -> tuple[Proxies, Tensor]:
    """The first proxies of a stored step, at most 16, with the heatmaps they were made from, and their positions."""
    images, positions = np.load(directory / "images.npy", mmap_mode="r"), np.load(directory / "positions.npy")
    n = min(count, EXAMPLES, len(positions))
    at = torch.from_numpy(positions[:n])
    if n:
        with np.load(directory / "examples.npz") as file:
            maps, mask = torch.from_numpy(file["maps"][:n]), torch.from_numpy(file["mask"][:n])
    else:
        maps = torch.zeros((0, *images.shape[2:]))
        mask = maps.bool()
    made = Proxies(originals=part.read(at).cpu(), maps=maps, mask=mask, images=torch.from_numpy(images[:n].copy()))
    return made, at


def _chunks(n: int) -> tuple[Tensor, ...]:
    """Equal chunks of at most CHUNK rows: none is left with one image, which a flipped `shuffled` could not serve."""
    return torch.arange(n).tensor_split(-(-n // CHUNK)) if n else ()


@dataclass
class _Tally:
    shares: list[float] = field(default_factory=list)
    unchanged: list[bool] = field(default_factory=list)
    blank: int = 0

    def add(self, made: Proxies) -> None:
        self.shares += made.mask.flatten(1).float().mean(1).tolist()
        self.unchanged += (made.images == made.originals).flatten(1).all(1).tolist()
        flat = made.maps.flatten(1)
        self.blank += int((flat.amax(1) == flat.amin(1)).sum())

    def masked_share(self) -> float:
        return float(np.mean(self.shares)) if self.shares else 0.0

    def table(self, part: Part, choice: Choice, scores: selection.Scores) -> pd.DataFrame:
        positions, rows = choice.positions, choice.positions.tolist()
        return pd.DataFrame(  # the columns of runs.PROXY_COLUMNS
            {
                "id": [part.ids[i] for i in rows],
                "label": part.labels[positions].numpy(),
                "predicted": scores.predicted[positions].numpy(),
                "explained": choice.targets.numpy(),
                "loss": scores.loss[positions].numpy(),
                "masked_share": self.shares,
                "unchanged": self.unchanged,
            }
        )


class _Images:
    """A .npy file written in pieces, so that memory does not grow with the number of proxies."""

    def __init__(self, path: Path, *, count: int, like: Part):
        self.file = open(path, "wb")
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *like.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def __enter__(self) -> _Images:
        return self

    def write(self, at: Tensor, images: Tensor) -> None:
        """Chunks come in order, so the next one follows the last."""
        self.file.write(images.contiguous().numpy().tobytes())

    def __exit__(self, *_: object) -> None:
        self.file.close()
