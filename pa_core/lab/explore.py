"""Finished runs, opened again: the images that are hardest, proxies, and what several runs see in the same images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from pa_core import attribution, data, models, proxy, schedule, selection
from pa_core.batch import Pool, to_pixels
from pa_core.device import resolve_device
from pa_core.errors import ParameterError, RunError
from pa_core.experiment import load_data
from pa_core.params import Experiment, derived_seed
from pa_core.proxy import SHOWN, Proxies, Step
from pa_core.runs import Run
from pa_core.train import evaluate

Images = str | os.PathLike[str] | data.Part  # an image file, a folder with some anywhere in it, or a part of a dataset


@dataclass(frozen=True, kw_only=True, eq=False)
class Reopened:
    """A run with its data and its trained network, in eval mode."""

    run: Run
    experiment: Experiment
    dataset: data.Dataset
    model: models.Classifier
    device: torch.device

    def worst(self, count: int = 16) -> tuple[Tensor, selection.Scores]:
        """The training images that a proxy step would select first now: positions int64 [count], and all scores."""
        e, part = self.experiment, self.dataset.train
        logits = evaluate(self.model, Pool.of(part), device=self.device, dtype=torch.float32).logits
        scores, seed = selection.score(logits, part.labels), derived_seed(e.seed, "proxy step", 1)
        if e.protocol == "clean":
            chosen = selection.select(scores, by=e.select, fraction=e.fraction, seed=seed)
        else:
            chosen = selection.some_wrong(scores, among=torch.arange(len(part)), fraction=e.fraction, seed=seed)
        return chosen[:count], scores

    def proxies(self, count: int = SHOWN) -> Proxies:
        """Proxies by the trained network of the images that the run's last proxy step selected first, on the CPU; a run
        without proxy steps has those of :meth:`worst`. Only these images are explained and masked.
        """
        e, part, steps = self.experiment, self.dataset.train, schedule.steps(self.run.experiment.schedule)
        positions = Step.load(self.run.step(steps)).positions[:count] if steps else self.worst(count)[0]
        ids, seed = [part.ids[i] for i in positions.tolist()], derived_seed(e.seed, "proxy step", max(steps, 1))
        target = None if e.explained == "predicted" else part.labels[positions].to(self.device)
        how = {"method": e.xai, "smooth": e.smooth, "ids": ids, "seed": seed}
        pixels = to_pixels(part.read(positions).to(self.device))
        maps = attribution.heatmaps(self.model, pixels, target=target, **how).cpu()
        maps = maps[attribution.derangement(ids, seed)] if e.permute_maps and len(ids) else maps
        return proxy.proxies_of(part, positions, maps, e, seed=seed)


def reopen(
    run: Run, experiment: Experiment | None = None, *, dataset: data.Dataset | None = None, device: str = "auto"
) -> Reopened:
    """Load a finished run's trained network, and its data unless they are given; RunError where those are others.

    ``experiment`` says where the data lie now, and how proxies are chosen and made: by default as in the manifest.
    """
    e, where = experiment or run.experiment, resolve_device(device)
    dataset = load_data(e) if dataset is None else dataset
    if dataset.split_digest != run.manifest["split_digest"]:
        raise RunError(f"{run.path.name} was trained on other data than {e.dataset} holds now")
    return Reopened(run=run, experiment=e, dataset=dataset, model=run.model(where), device=where)


def stored_proxies(
    run: Run, dataset: data.Dataset, *, step: int = 1, count: int = SHOWN
) -> tuple[Proxies | None, list[str]]:
    """The first proxies of a step from the maps that the run stored, without augmentation, and a title for each; None
    where there was no such step. The random part of a fill is drawn anew, as in every batch.
    """
    if not run.step(step).is_dir():
        return None, []
    stored, rows, names = Step.load(run.step(step)), run.proxies(step).head(count), dataset.classes
    seed = derived_seed(run.experiment.seed, "proxy step", step)
    made = proxy.proxies_of(dataset.train, stored.positions[:count], stored.maps[:count], run.experiment, seed=seed)
    return made, [f"{names[row.label]}\n→ {names[row.predicted]}" for row in rows.itertuples()]


def side_by_side(named: Mapping[str, Run]) -> pd.DataFrame:
    """A column per run, a row per number that its summary holds."""
    return pd.DataFrame({name: pd.Series(run.summary) for name, run in named.items()}).round(4)


def compare(
    named: Mapping[str, Run], images: Images, *, xai: str | None = None, count: int = SHOWN, device: str = "auto"
) -> tuple[dict[str, Tensor], dict[str, Tensor], pd.DataFrame]:
    """Predictions and heatmaps of finished runs on your own images, or on the first ``count`` of a part of a dataset.

    ``xai`` is by default each run's own explanation method. Returns, by run, the n images as its network sees them,
    uint8 [n, 3, S, S], and heatmaps of the predicted class, float32 [n, S, S] in [0, 1]; and a table with a row per run
    and image: image, run, predicted, confidence in [0, 1]. RunError where a run is not finished, ParameterError where
    there is no image, or a part's images do not have the runs' size.
    """
    where, rows, seen, maps = resolve_device(device), [], {}, {}
    for name, run in named.items():
        e, model = run.experiment, run.model(where)
        ids, seen[name] = _read(images, run.manifest["image_size"], count)
        pixels = to_pixels(seen[name].to(where))
        with torch.inference_mode():
            confidence, predicted = model(pixels).float().softmax(1).max(1)
        how = {"method": xai or e.xai, "smooth": e.smooth, "ids": ids, "seed": e.seed}
        maps[name] = attribution.heatmaps(model, pixels, target=predicted.clone(), **how).cpu()
        guesses = [run.manifest["classes"][k] for k in predicted.tolist()]
        rows += zip(ids, [name] * len(ids), guesses, confidence.cpu().numpy().round(6), strict=True)
    return seen, maps, pd.DataFrame(rows, columns=["image", "run", "predicted", "confidence"])


def _read(images: Images, size: int, count: int) -> tuple[list[str], Tensor]:
    """Names, and uint8 [n, 3, size, size] on the CPU."""
    if isinstance(images, data.Part):
        if images.shape[-1] != size:
            raise ParameterError("images", images.name, f"must have {size} pixels per side, not {images.shape[-1]}")
        return list(images.ids[:count]), images.read(torch.arange(min(count, len(images)))).cpu()
    path, found = Path(images).expanduser(), {}
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if len(found) < count and file.is_file():
            try:
                found[str(file.relative_to(path if path.is_dir() else path.parent))] = data.read_image(file, size)
            except ValueError:
                continue  # a folder may hold other things, too
    if not found:
        raise ParameterError("images", str(images), "must be an image, or a folder with images")
    return list(found), torch.stack(list(found.values()))
