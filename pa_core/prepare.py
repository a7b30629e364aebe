"""Before training: check all that can be checked, the cheap things first, and load data and model, once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from pa_core import attribution, data, device, models, protocol, runs, schedule, selection
from pa_core.errors import ParameterError
from pa_core.files import runs_home
from pa_core.params import Experiment, derived_seed
from pa_core.runs import Run


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Everything that is checked and loaded before training starts."""

    experiment: Experiment  # xai without its aliases, data_dir absolute
    dataset: data.Dataset
    model: models.Classifier  # freshly initialised or with the given weights, on the CPU; a run trains a copy
    device: torch.device
    dtype: torch.dtype
    digest: str  # the run's identity
    path: Path  # where the run lies, or will lie

    @property
    def precision(self) -> str:
        """The name of ``dtype``."""
        return str(self.dtype).removeprefix("torch.")


def load_data(experiment: Experiment) -> data.Dataset:
    """The experiment's dataset, split."""
    e = experiment
    return data.load(
        dataset=e.dataset,
        data_dir=e.data_dir,
        bad_images=e.bad_images,
        image_size=e.image_size,
        train_fraction=e.train_fraction if e.protocol == "clean" else 1.0,  # else the share that each stage draws
        folds=e.folds,
        fold=e.fold,
        seed=e.seed,
    )


def prepare(experiment: Experiment) -> Prepared:
    """Check everything that can be checked, the cheap things first, and load data and model.

    Raises:
        ParameterError: a parameter is refused.
    """
    where = device.resolve_device(experiment.device)
    dtype = device.resolve_precision(experiment.precision, where)
    models.check_name(experiment.model)
    e = _resolved(experiment)
    attribution.check(e.xai, smooth=e.smooth)
    weights = file_digest(e.pretrained)
    dataset = load_data(e)
    protocol.check(e, len(dataset.train))
    _check_steps(e, len(dataset.train))
    model = models.create(
        e.model,
        classes=len(dataset.classes),
        image_size=dataset.image_size,
        pretrained=e.pretrained,
        cam_layer=e.cam_layer,
        seed=derived_seed(e.seed, "initialisation"),
    )
    if e.explains:
        attribution.check(e.xai, smooth=e.smooth, model=model)
    digest = e.digest(data=dataset.digest, image_size=dataset.image_size, weights=weights)
    path = runs.directory(runs_home(e.runs_dir), e, digest)
    return Prepared(experiment=e, dataset=dataset, model=model, device=where, dtype=dtype, digest=digest, path=path)


def _resolved(experiment: Experiment) -> Experiment:
    """The experiment with an alias of ``xai`` resolved (it is the same run) and an absolute ``data_dir``."""
    data_dir = experiment.data_dir and str(Path(experiment.data_dir).expanduser().absolute())
    return experiment.replace(xai=attribution.resolve(experiment.xai), data_dir=data_dir)


def _check_steps(e: Experiment, n: int) -> None:
    """Refuse proxy steps that cannot work, as far as that is known before training."""
    if not schedule.steps(e.schedule):
        return
    chosen = n if e.select == "all" else selection.count(n, e.fraction)
    if e.explains and e.permute_maps and chosen < 2:
        raise ParameterError("fraction", e.fraction, f"must select two images or more to permute their maps, of {n}")
    if e.masks and e.fill == "patch" and e.batch_size == 1:
        raise ParameterError(
            "batch_size", 1, "must be at least 2 with fill='patch', which takes another image's pixels"
        )


def file_digest(pretrained: bool | str) -> str:
    if not isinstance(pretrained, str):
        return ""
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise ParameterError("pretrained", pretrained, "must be true, false or a weights file that exists")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(experiment: Experiment, *, identity: tuple[str, int] | None = None) -> Path:
    """Where the run with these parameters lies, or would lie. Decodes no image and builds no network.

    Args:
        identity: the dataset's digest and image size, where they are known already.
    """
    e = _resolved(experiment)
    data_digest, size = identity or data.identify(
        dataset=e.dataset, data_dir=e.data_dir, bad_images=e.bad_images, image_size=e.image_size
    )
    digest = e.digest(data=data_digest, image_size=size, weights=file_digest(e.pretrained))
    return runs.directory(runs_home(e.runs_dir), e, digest)


def find(experiment: Experiment | Prepared) -> Run | None:
    """The finished run with these parameters, made by this code, if there is one. Trains nothing."""
    run = Run(experiment.path if isinstance(experiment, Prepared) else locate(experiment))
    return run if run.finished else None
