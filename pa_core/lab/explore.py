"""Finished runs, opened again: the images that are hardest, proxies, and what several runs see in the same images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from pa_core import attribution, data, models, proxy, schedule, selection
from pa_core.batch import Pool, to_pixels
from pa_core.device import resolve_device
from pa_core.errors import ParameterError, RunError
from pa_core.lab.results import numbers
from pa_core.params import Experiment, derived_seed
from pa_core.prepare import Prepared, load_data
from pa_core.proxy import SHOWN, Choice, Proxies, Step
from pa_core.runs import Run
from pa_core.train import evaluate


@dataclass(frozen=True, kw_only=True, eq=False)
class Reopened:
    """A run with its data and its trained network, in eval mode."""

    run: Run
    experiment: Experiment
    dataset: data.Dataset
    model: models.Classifier

    @cached_property
    def scores(self) -> selection.Scores:
        """Of all training images, by one pass that is made once."""
        part, device = self.dataset.train, next(self.model.parameters()).device
        logits = evaluate(self.model, Pool.of(part), device=device, dtype=torch.float32).logits
        return selection.score(logits, part.labels)

    def worst(self, count: int = 16) -> tuple[Tensor, selection.Scores]:
        """Positions of the first training images that a proxy step would choose now, int64 [count], and all scores."""
        e = self.experiment
        seed = derived_seed(e.seed, "proxy step", 1)
        return selection.select(self.scores, by=e.select, fraction=e.fraction, seed=seed)[:count], self.scores

    def proxies(self, count: int = SHOWN) -> Proxies:
        """What the trained network would make of the first choices of the run's last proxy step, on the CPU.

        Only these images are explained and masked. A run without proxy steps shows :meth:`worst`.
        """
        e, part, steps = self.experiment, self.dataset.train, schedule.steps(self.run.experiment.schedule)
        e = e if schedule.steps(e.schedule) else e.replace(schedule="1,p,1")  # or nothing would be explained
        positions = Step.load(self.run.step(steps)).positions[:count] if steps else self.worst(count)[0]
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            logits = self.model(to_pixels(part.read(positions).to(device))).float().cpu()
        scores = selection.score(logits, part.labels[positions])
        targets = scores.predicted if e.explained == "predicted" else scores.labels
        seed = derived_seed(e.seed, "proxy step", max(steps, 1))
        choice = Choice(positions=positions, targets=targets, maps=None, scores=scores, seed=seed)
        maps = proxy.explain(self.model, part, e, choice, device=device, dtype=torch.float32)
        return proxy.made(part, positions, maps.cpu(), e, seed=seed)


def reopen(run: Run, experiment: Experiment | Prepared | None = None, *, device: str = "auto") -> Reopened:
    """Load a finished run's data and trained network.

    Args:
        experiment: where the data lie now, and how proxies are chosen and made; by default as in the run's manifest.
            What is prepared already is not loaded again.

    Raises:
        RunError: the data are not what the run was trained on, or the run has no weights.
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
    """The first proxies of a step from the maps that the run stored, before geometry, and a title for each.

    What a fill draws at random is drawn anew in each batch, and here. None where there was no such step.
    """
    folder, e = run.step(step), run.experiment
    if not folder.is_dir():
        return None, []
    stored, rows, names = Step.load(folder), run.proxies(step).head(count), dataset.classes
    seed = derived_seed(e.seed, "proxy step", step)
    made = proxy.made(dataset.train, stored.positions[:count], stored.maps[:count], e, seed=seed)
    seen = zip(rows["label"], rows["predicted"], strict=True)
    return made, [f"{names[label]}\n→ {names[guess]}" for label, guess in seen]


def side_by_side(named: Mapping[str, Run]) -> pd.DataFrame:
    """A column per run, a row per number that its summary holds."""
    return pd.DataFrame({name: pd.Series(numbers(run.summary)) for name, run in named.items()}).round(4)


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What several runs see in the same n images. S may differ between runs.

    Attributes:
        names: of the images.
        images: run -> uint8 [n, 3, S, S], as the run's network sees them.
        maps: run -> heatmaps of the predicted class, float32 [n, S, S] in [0, 1].
        table: a row per image and run: image, run, predicted, confidence (in [0, 1]).
    """

    names: tuple[str, ...]
    images: Mapping[str, Tensor]
    maps: Mapping[str, Tensor]
    table: pd.DataFrame


def compare(
    named: Mapping[str, Run],
    images: str | os.PathLike[str] | data.Part,
    *,
    xai: str | None = None,
    count: int = SHOWN,
    device: str = "auto",
) -> Comparison:
    """Predictions and heatmaps of finished runs on your own images, or on the first ones of a part of a dataset.

    Args:
        named: what each run is called -> run.
        images: a folder (its subfolders included; what is no image is left out), an image file, or a part whose images
            have the runs' size.
        xai: the explanation method; by default each run's own.
        count: how many images at most.

    Raises:
        ParameterError: there is no image, or one of another size.
        RunError: a run is not finished.
    """
    where, rows, seen, maps, names = resolve_device(device), [], {}, {}, []
    for name, run in named.items():
        manifest, e = run.manifest, run.experiment
        names, seen[name] = _own_images(images, manifest["image_size"], count)
        model, pixels = run.model(where), to_pixels(seen[name].to(where))
        with torch.inference_mode():
            confidence, predicted = model(pixels).float().softmax(1).max(1)
        how = {"method": xai or e.xai, "smooth": e.smooth, "ids": names, "seed": e.seed}
        maps[name] = attribution.heatmaps(model, pixels, target=predicted.clone(), **how).cpu()
        guesses = [manifest["classes"][k] for k in predicted.tolist()]
        rows += zip(names, [name] * len(names), guesses, confidence.cpu().numpy().round(6), strict=True)
    table = pd.DataFrame(rows, columns=["image", "run", "predicted", "confidence"])
    return Comparison(names=tuple(names), images=seen, maps=maps, table=table)


def _own_images(images: str | os.PathLike[str] | data.Part, size: int, count: int) -> tuple[list[str], Tensor]:
    """Names, and uint8 [n, 3, size, size] on the CPU."""
    if isinstance(images, data.Part):
        if images.shape[-1] != size:
            raise ParameterError("images", images.name, f"must have {size} pixels per side, not {images.shape[-1]}")
        return list(images.ids[:count]), images.read(torch.arange(min(count, len(images)))).cpu()
    path, found = Path(images).expanduser(), {}
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if len(found) < count and file.is_file():
            try:
                found[os.path.relpath(file, path) if path.is_dir() else file.name] = data.read_image(file, size)
            except data.UNREADABLE:
                continue  # a folder may hold other things, too
    if not found:
        raise ParameterError("images", str(images), "must be an image, or a folder with images")
    return list(found), torch.stack(list(found.values()))
