"""Finished runs, opened again: the images that are hardest, proxies, and what several runs see in the same images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from pa_core import attribution, data, models, proxy, schedule, selection
from pa_core.batch import Pool, to_pixels
from pa_core.device import resolve_device
from pa_core.errors import ParameterError, RunError
from pa_core.experiment import Prepared, load_data
from pa_core.lab.results import numbers
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

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def scores(self) -> selection.Scores:
        """Of all training images, by one pass that is made once."""
        pool = Pool.of(self.dataset.train)
        logits = evaluate(self.model, pool, device=self.device, dtype=torch.float32).logits
        return selection.score(logits, self.dataset.train.labels)

    def worst(self, count: int = 16) -> tuple[Tensor, selection.Scores]:
        """The training images that a proxy step would select first now: positions int64 [count], and all scores."""
        e, seed = self.experiment, derived_seed(self.experiment.seed, "proxy step", 1)
        return selection.select(self.scores, by=e.select, fraction=e.fraction, seed=seed)[:count], self.scores

    def proxies(self, count: int = SHOWN) -> Proxies:
        """Proxies by the trained network of the images that the run's last proxy step selected first, on the CPU.

        Only these images are explained and masked. A run without proxy steps has those of :meth:`worst`.
        """
        e, part, steps = self.experiment, self.dataset.train, schedule.steps(self.run.experiment.schedule)
        e = e if schedule.steps(e.schedule) else e.replace(schedule="1,p,1")  # or nothing would be explained
        positions = Step.load(self.run.step(steps)).positions[:count] if steps else self.worst(count)[0]
        with torch.inference_mode():
            logits = self.model(to_pixels(part.read(positions).to(self.device))).float().cpu()
        scores, seed = (
            selection.score(logits, part.labels[positions]),
            derived_seed(e.seed, "proxy step", max(steps, 1)),
        )
        targets = scores.predicted if e.explained == "predicted" else scores.labels
        maps = proxy.explain(self.model, part, e, positions, targets, seed=seed, device=self.device)
        return proxy.made(part, positions, maps.cpu(), e, seed=seed)


def reopen(run: Run, experiment: Experiment | Prepared | None = None, *, device: str = "auto") -> Reopened:
    """Load a finished run's data and trained network.

    ``experiment`` says where the data lie now, and how proxies are chosen and made: by default as in the manifest; what
    is prepared already is not loaded again. A RunError where the data are not what the run was trained on.
    """
    if isinstance(experiment, Prepared):
        experiment, dataset = experiment.experiment, experiment.dataset
    else:
        experiment = experiment or run.experiment
        dataset = load_data(experiment)
    if dataset.split_digest != run.manifest["split_digest"]:
        raise RunError(f"{run.path.name} was trained on other data than {experiment.dataset} holds now")
    return Reopened(run=run, experiment=experiment, dataset=dataset, model=run.model(resolve_device(device)))


def stored_proxies(
    run: Run, dataset: data.Dataset, *, step: int = 1, count: int = SHOWN
) -> tuple[Proxies | None, list[str]]:
    """The first proxies of a step from the maps that the run stored, without augmentation, and a title for each.

    The random part of a fill is drawn anew, as in every batch. None where there was no such step.
    """
    if not run.step(step).is_dir():
        return None, []
    stored, rows, names = Step.load(run.step(step)), run.proxies(step).head(count), dataset.classes
    how = {"seed": derived_seed(run.experiment.seed, "proxy step", step)}
    made = proxy.made(dataset.train, stored.positions[:count], stored.maps[:count], run.experiment, **how)
    return made, [f"{names[row.label]}\n→ {names[row.predicted]}" for row in rows.itertuples()]


def side_by_side(named: Mapping[str, Run]) -> pd.DataFrame:
    """A column per run, a row per number that its summary holds."""
    return pd.DataFrame({name: pd.Series(numbers(run.summary)) for name, run in named.items()}).round(4)


class Comparison(NamedTuple):
    """What several runs see in the same n images. S may differ between runs."""

    names: tuple[str, ...]  # of the images
    images: Mapping[str, Tensor]  # run -> uint8 [n, 3, S, S], as the run's network sees them
    maps: Mapping[str, Tensor]  # run -> heatmaps of the predicted class, float32 [n, S, S] in [0, 1]
    table: pd.DataFrame  # a row per image and run: image, run, predicted, confidence (in [0, 1])


def compare(
    named: Mapping[str, Run], images: Images, *, xai: str | None = None, count: int = SHOWN, device: str = "auto"
) -> Comparison:
    """Predictions and heatmaps of finished runs on your own images, or on the first ``count`` of a part of a dataset.

    Args:
        named: what each run is called -> run; RunError where one is not finished.
        images: those of a part must have the runs' size; ParameterError where there is no image.
        xai: the explanation method; by default each run's own.
    """
    where, rows, seen, maps, names = resolve_device(device), [], {}, {}, []
    for name, run in named.items():
        e, model = run.experiment, run.model(where)
        names, seen[name] = _read(images, run.manifest["image_size"], count)
        pixels = to_pixels(seen[name].to(where))
        with torch.inference_mode():
            confidence, predicted = model(pixels).float().softmax(1).max(1)
        how = {"method": xai or e.xai, "smooth": e.smooth, "ids": names, "seed": e.seed}
        maps[name] = attribution.heatmaps(model, pixels, target=predicted.clone(), **how).cpu()
        guesses = [run.manifest["classes"][k] for k in predicted.tolist()]
        rows += zip(names, [name] * len(names), guesses, confidence.cpu().numpy().round(6), strict=True)
    table = pd.DataFrame(rows, columns=["image", "run", "predicted", "confidence"])
    return Comparison(tuple(names), seen, maps, table)


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
