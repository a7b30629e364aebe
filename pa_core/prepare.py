"""Before training: check all that can be checked, the cheap things first, and load data and model, once."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from pa_core import attribution, data, device, models, protocol, runs, schedule, selection, train
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
    weights_digest: str  # of the file that ``pretrained`` names, else empty
    path: Path  # where the run lies, or will lie


def load_data(experiment: Experiment) -> data.Dataset:
    """The experiment's dataset, split."""
    names = ("dataset", "data_dir", "bad_images", "image_size", "folds", "fold", "seed")
    share = experiment.train_fraction if experiment.protocol == "clean" else 1.0  # else what each stage draws
    return data.load(**{name: getattr(experiment, name) for name in names}, train_fraction=share)


def prepare(experiment: Experiment) -> Prepared:
    """Load data and model. ParameterError where anything is refused that can be known before training."""
    where = device.resolve_device(experiment.device)
    dtype = device.resolve_precision(experiment.precision, where)
    models.check_name(experiment.model)
    e = _resolved(experiment)
    attribution.check(e.xai, smooth=e.smooth)
    weights = _file_digest(e.pretrained)
    dataset = load_data(e)
    size, classes = dataset.image_size, len(dataset.classes)
    _check_counts(e, len(dataset.train))
    how = {"pretrained": e.pretrained, "cam_layer": e.cam_layer, "seed": derived_seed(e.seed, "initialisation")}
    model = models.create(e.model, classes=classes, image_size=size, **how)
    if e.explains:
        attribution.check(e.xai, smooth=e.smooth, model=model)
    _check_smallest_batch(e, len(dataset.train), model, size)
    digest = e.digest(data=dataset.digest, image_size=size, weights=weights)
    path = runs.directory(runs_home(e.runs_dir), e, digest)
    resolved = {"device": where, "dtype": dtype, "digest": digest, "weights_digest": weights, "path": path}
    return Prepared(experiment=e, dataset=dataset, model=model, **resolved)


def _resolved(experiment: Experiment) -> Experiment:
    """The experiment with an alias of ``xai`` resolved (it is the same run) and an absolute ``data_dir``."""
    data_dir = experiment.data_dir and str(Path(experiment.data_dir).expanduser().absolute())
    return experiment.replace(xai=attribution.resolve(experiment.xai), data_dir=data_dir)


def _check_counts(e: Experiment, n: int) -> None:
    """Refuse what ``n`` training images are too few for."""
    if e.protocol != "clean" and (count := protocol.subset_size(n, e)) < 2:
        allowed = f"must be larger: it draws {count} of {n} images, and there must be two to halve"
        raise ParameterError("train_fraction", e.train_fraction, allowed)
    if e.explains and e.permute_maps and selection.count(n, 1 if e.select == "all" else e.fraction) < 2:
        raise ParameterError("fraction", e.fraction, f"must select two images or more to permute their maps, of {n}")
    if schedule.steps(e.schedule) and e.masks and e.fill == "patch" and e.batch_size == 1:
        allowed = "must be at least 2 with fill='patch', which takes another image's pixels"
        raise ParameterError("batch_size", e.batch_size, allowed)


def _check_smallest_batch(e: Experiment, n: int, model: models.Classifier, size: int) -> None:
    """Refuse a batch of one image where the network cannot train on it: it normalises a 1 x 1 map over the batch."""
    images = protocol.epoch_size(n, e)
    if e.batch_size == "auto" or images // train.steps_per_epoch(images, int(e.batch_size)) > 1:
        return
    try:
        copy.deepcopy(model).train()(torch.zeros(1, 3, size, size))
    except ValueError as error:
        allowed = f"must be larger: of {images} images a batch would hold one alone, on which {e.model} cannot train"
        raise ParameterError("batch_size", e.batch_size, allowed) from error


def _file_digest(pretrained: bool | str) -> str:
    if not isinstance(pretrained, str):
        return ""
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise ParameterError("pretrained", pretrained, "must be true, false or a weights file that exists")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(experiment: Experiment, *, identity: tuple[str, int] | None = None) -> Path:
    """Where the run with these parameters lies, or would lie. Decodes no image and builds no network.

    ``identity``: the dataset's digest and image size, where they are known already.
    """
    e, names = _resolved(experiment), ("dataset", "data_dir", "bad_images", "image_size")
    known, size = identity or data.identify(**{name: getattr(e, name) for name in names})
    digest = e.digest(data=known, image_size=size, weights=_file_digest(e.pretrained))
    return runs.directory(runs_home(e.runs_dir), e, digest)


def find(experiment: Experiment | Prepared) -> Run | None:
    """The finished run with these parameters, made by this code, if there is one. Trains nothing."""
    run = Run(experiment.path if isinstance(experiment, Prepared) else locate(experiment))
    return run if run.finished else None
