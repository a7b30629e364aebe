"""One run: ``prepare(experiment)`` checks and loads, ``run(experiment) -> Run`` walks the schedule.

To add an event: a letter in `schedule`, a function here and its row in ``EVENTS``.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2.functional import pil_to_tensor

from pa_core import attribution, data, device, files, models, protocol, runs, schedule, selection, train
from pa_core.batch import Pool, to_pixels
from pa_core.errors import ParameterError, RunError
from pa_core.files import shown
from pa_core.params import SCHEMA, Experiment, derived_seed
from pa_core.proxy import Step, proxy_step
from pa_core.runs import Run
from pa_core.schedule import Event

Log = Callable[[str], None]
say = partial(print, flush=True)  # at once, so that a line is seen while the run goes on, also in a log file


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
    dataset = load_data(e)
    identity = _identity(e, dataset.digest, dataset.image_size)
    size, classes, seed = dataset.image_size, len(dataset.classes), derived_seed(e.seed, "initialisation")
    how = {"pretrained": e.pretrained, "cam_layer": e.cam_layer, "seed": seed}
    model = models.create(e.model, classes=classes, image_size=size, **how)
    _check(e, len(dataset.train), model, size)
    return Prepared(experiment=e, dataset=dataset, model=model, device=where, dtype=dtype, **identity)


def _check(e: Experiment, n: int, model: models.Classifier, size: int) -> None:
    """Refuse what this network cannot do, or ``n`` training images of ``size`` pixels are too few for."""
    if e.explains:
        attribution.check(e.xai, smooth=e.smooth, model=model)
    if e.protocol != "clean" and (count := protocol.subset_size(n, e)) < 2:
        allowed = f"must be larger: it draws {count} of {n} images, and there must be two to halve"
        raise ParameterError("train_fraction", e.train_fraction, allowed)
    if e.explains and e.permute_maps and selection.count(n, 1 if e.select == "all" else e.fraction) < 2:
        raise ParameterError("fraction", e.fraction, f"must select two images or more to permute their maps, of {n}")
    if schedule.steps(e.schedule) and e.masks and e.fill == "patch" and e.batch_size == 1:
        raise ParameterError(
            "batch_size", 1, "must be at least 2 with fill='patch', which takes another image's pixels"
        )
    withheld = e.protocol == "clean" and e.overlay == "withhold" and schedule.steps(e.schedule)
    if withheld and e.select != "misclassified" and selection.count(n, e.fraction) == n:
        raise ParameterError("fraction", e.fraction, "must leave images to train on with overlay='withhold'")
    drawn = protocol.epoch_size(n, e)
    if e.batch_size != "auto" and drawn // train.steps_per_epoch(drawn, int(e.batch_size)) == 1:
        try:  # batch normalisation of a 1 x 1 map needs two images
            copy.deepcopy(model).train()(torch.zeros(1, 3, size, size))
        except ValueError as error:
            allowed = f"must be larger: of {drawn} images a batch would hold one alone, on which {e.model} cannot train"
            raise ParameterError("batch_size", e.batch_size, allowed) from error


def _resolved(experiment: Experiment) -> Experiment:
    """The experiment with an alias of ``xai`` resolved (it is the same run) and an absolute ``data_dir``."""
    data_dir = experiment.data_dir and str(Path(experiment.data_dir).expanduser().absolute())
    return experiment.replace(xai=attribution.resolve(experiment.xai), data_dir=data_dir)


def _identity(e: Experiment, data_digest: str, size: int) -> dict[str, Any]:
    """The fields digest, weights_digest and path of :class:`Prepared`."""
    file, weights = Path(str(e.pretrained)).expanduser(), ""
    if isinstance(e.pretrained, str):
        if not file.is_file():
            raise ParameterError("pretrained", e.pretrained, "must be true, false or a weights file that exists")
        weights = hashlib.sha256(file.read_bytes()).hexdigest()
    digest = e.digest(data=data_digest, image_size=size, weights=weights)
    return {"digest": digest, "weights_digest": weights, "path": runs.directory(files.runs_home(e.runs_dir), e, digest)}


def locate(experiment: Experiment, *, data_identity: tuple[str, int] | None = None) -> Path:
    """Where the run lies or would lie; decodes no image. ``data_identity``: what `data.identify` gives, if known."""
    e, names = _resolved(experiment), ("dataset", "data_dir", "bad_images", "image_size")
    digest, size = data_identity or data.identify(**{name: getattr(e, name) for name in names})
    return _identity(e, digest, size)["path"]


def find(experiment: Experiment | Prepared) -> Run | None:
    """The finished run with these parameters, made by this code, if there is one. Trains nothing."""
    run = Run(experiment.path if isinstance(experiment, Prepared) else locate(experiment))
    return run if run.finished else None


def run(experiment: Experiment | Prepared, *, log: Log = say) -> Run:
    """Train as the schedule says, or continue where such a run stopped, or return it if it is finished.

    ``log`` receives a line per epoch and event. What :func:`prepare` made is left as it is. ParameterError: before
    anything is trained or written. NonFiniteLoss: the run has failed and has no result. RunError: the run's files are
    damaged or cannot be written, or were begun with another split or precision.
    """
    prepared = experiment if isinstance(experiment, Prepared) else prepare(experiment)
    path, e = prepared.path, prepared.experiment
    events = schedule.parse(e.schedule, p_trains=e.protocol != "clean")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as why:
        raise ParameterError("runs_dir", e.runs_dir, f"must be a folder that can be written ({why.strerror})") from why
    waiting = f"another process trains {path.name}; waiting for it"
    used = [prepared.device] if prepared.device.type == "cuda" else []  # others would each hold memory for nothing
    with files.lock(path / "lock", waiting, log), torch.random.fork_rng(devices=used):
        for leftover in path.glob("*.part"):  # of a process killed while it wrote; nobody else writes now
            leftover.unlink()
        if Run(path).finished:
            runs.remove_checkpoint(path)  # of a process killed right after it had finished the run
            log(f"finished before: {shown(path)}")
            return Run(path)
        with device.numerics(e, threads=Run(path).manifest.get("threads")):
            walk = _begin(prepared, log)
            try:
                for event in events[walk.position :]:
                    EVENTS[event.kind](walk, event)
                    walk.position += 1
                    kept = {name: getattr(walk, name) for name in IN_CHECKPOINT}  # the maps are files already
                    runs.save_checkpoint(path, {"state": walk.state.state_dict(), **kept})
                _finish(walk)
            except BaseException as error:
                status = runs.INTERRUPTED if isinstance(error, KeyboardInterrupt) else runs.FAILED
                with suppress(RunError):  # a full disk, say; the first error is the one to raise
                    runs.update_manifest(path, status=status, error=f"{type(error).__name__}: {error}")
                raise
            finally:
                walk.board.close()
    return Run(path)


@dataclass(kw_only=True)
class Walk:
    """A run under way."""

    experiment: Experiment
    path: Path
    dataset: data.Dataset
    state: train.State
    batch_size: int
    board: SummaryWriter
    log: Log
    position: int = 0  # index of the next event
    steps: list[int] = field(default_factory=list)  # numbers of the proxy steps whose maps are in use
    records: list[dict[str, Any]] = field(default_factory=list)  # what proxy_step returned, for all steps so far
    rows: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl
    stored: tuple[list[int], list[Step]] = ([], [])  # the steps that were read last: their numbers and their maps

    def stage(self, event: Event) -> protocol.Stage:
        """What the event's stage trains on, with the maps that are in use."""
        if self.stored[0] != self.steps:  # read once, not for every epoch
            self.stored = self.steps, [Step.load(Run(self.path).step(number)) for number in self.steps]
        return protocol.stage(self.dataset.train, self.experiment, number=event.stage, steps=self.stored[1])

    def evaluate(self, pool: Pool, experiment: Experiment | None = None) -> train.Evaluation:
        """The network on a pool, as `train.evaluate` has it; NonFiniteLoss: the last update of an epoch shows here."""
        state = self.state
        found = train.evaluate(state.model, pool, device=state.device, dtype=state.dtype, experiment=experiment)
        if not math.isfinite(found.loss):
            raise train.NonFiniteLoss(f"{pool.part.name} loss: not finite after epoch {state.epoch}; try a lower lr")
        return found


IN_CHECKPOINT = ("position", "steps", "records", "rows")


def _begin(prepared: Prepared, log: Log) -> Walk:
    """A new run, or one restored from its checkpoint."""
    path, e, dataset, where = prepared.path, prepared.experiment, prepared.dataset, prepared.device
    manifest, checkpoint = Run(path).manifest, runs.load_checkpoint(path, log)
    precision = str(prepared.dtype).removeprefix("torch.")
    for name, value in {"split_digest": dataset.split_digest, "precision": precision}.items():
        if manifest and (was := manifest[name]) != value:  # digest and code version are in the directory's name
            raise RunError(f"{shown(path)} cannot be continued: its {name} is {was}, and would now be {value}")
    torch.manual_seed(derived_seed(e.seed, "training"))
    batch_size = manifest.get("batch_size", e.batch_size)
    if batch_size == "auto":
        sizes = {"image_size": dataset.image_size, "n": len(dataset.train)}
        batch_size = device.auto_batch_size(prepared.model, **sizes, device=where, dtype=prepared.dtype)
        log(f"batch_size auto: {batch_size}")
    if data.fits([dataset.train, dataset.val], where):  # test images are read once: they stay in the cache
        dataset = replace(dataset, train=dataset.train.on(where), val=dataset.val.on(where))
    total = e.length * train.steps_per_epoch(protocol.epoch_size(len(dataset.train), e), batch_size)
    model = copy.deepcopy(prepared.model)
    state = train.create_state(model, e, total_steps=total, device=where, dtype=prepared.dtype)
    board = SummaryWriter(str(path / "tensorboard"), purge_step=checkpoint["state"]["epoch"] + 1 if checkpoint else 1)
    walk = Walk(experiment=e, path=path, dataset=dataset, state=state, batch_size=batch_size, board=board, log=log)
    if checkpoint is None:
        on_device = dataset.train.resident is not None
        manifest = _new_manifest(prepared, precision=precision, batch_size=batch_size, images_on_device=on_device)
    else:
        state.load_state_dict(checkpoint["state"])
        vars(walk).update({name: checkpoint[name] for name in IN_CHECKPOINT})
        manifest["resumed"] = [*manifest.get("resumed", []), {"epoch": state.epoch, "time": runs.now()}]
        log(f"continuing {path.name} after epoch {state.epoch}")
    runs.write_metrics(path, walk.rows)
    compiled = None
    if e.compile:
        some = dataset.train.read(torch.arange(min(batch_size, len(dataset.train))))
        compiled = train.try_compile(state, to_pixels(data.send(some, where)), log)
    files.write_json(path / "manifest.json", {**manifest, "status": runs.RUNNING, "error": None, "compile": compiled})
    return walk


def _new_manifest(prepared: Prepared, **resolved: Any) -> dict[str, Any]:
    e, dataset = prepared.experiment, prepared.dataset
    return {
        "schema": SCHEMA,
        "digest": prepared.digest,
        "code_version": runs.code_version(),
        "parameters": e.to_dict(),
        "effective": e.effective(),
        "started": runs.now(),
        "command": e.command("03_proxy_loop" if schedule.steps(e.schedule) else "02_training"),
        "git_commit": runs.git_commit(),
        "versions": runs.versions(),
        "device": str(prepared.device),
        "device_name": runs.device_name(prepared.device),
        "threads": torch.get_num_threads(),
        "data_digest": dataset.digest,
        "weights_digest": prepared.weights_digest,
        **{name: getattr(dataset, name) for name in ("classes", "image_size", "split_digest", "skipped", "dropped")},
        **resolved,
        "model": prepared.model.describe(),
    }


def epoch(walk: Walk, event: Event) -> None:
    """Train and validate once: a line of metrics.jsonl."""
    e, state, stage = walk.experiment, walk.state, walk.stage(event)
    entries = protocol.epoch_size(len(walk.dataset.train), e)
    trained = train.train_one_epoch(state, stage.training, experiment=e, entries=entries, batch_size=walk.batch_size)
    validated = walk.evaluate(Pool.of(walk.dataset.val))
    row = {"epoch": state.epoch, "stage": event.stage, **trained}
    row |= {"val_loss": validated.loss, "val_accuracy": validated.accuracy}
    if stage.reported is not None:  # the predecessor's protocol
        row["reported_accuracy"] = walk.evaluate(stage.reported, experiment=e).accuracy
    walk.rows.append(row)
    runs.write_metrics(walk.path, walk.rows)
    for name in row.keys() - {"epoch", "stage"}:
        walk.board.add_scalar(name.replace("_", "/", 1), row[name], state.epoch)
    walk.board.flush()  # before the checkpoint, or a killed run would leave a hole
    reported = f"reported accuracy {row['reported_accuracy']:.3f}  " if "reported_accuracy" in row else ""
    walk.log(
        f"epoch {state.epoch:>{len(str(e.length))}}/{e.length}  "
        f"train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.3f}  "
        f"val loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:.3f}  {reported}"
        f"lr {row['lr']:.1e}  {row['images_per_second']:,.0f} images/s"
    )


def proxy(walk: Walk, event: Event) -> None:
    """The proxy step at the end of a stage: maps of the images that it selects."""
    e, state, part, number = walk.experiment, walk.state, walk.dataset.train, len(walk.records) + 1
    folder, clean = Run(walk.path).step(number), e.protocol == "clean"
    candidates = None if clean else walk.stage(event).candidates
    how = {"device": state.device, "dtype": state.dtype, "candidates": candidates}
    record = proxy_step(state.model, part, e, step=number, directory=folder, **how)
    walk.records.append(record)
    walk.steps = [*(walk.steps if e.keeps_all_proxies else []), number]
    if record["images"]:
        picture = pil_to_tensor(Image.open(folder / "proxies.png"))
        walk.board.add_image("proxies/original_map_mask_proxy", picture, state.epoch)
    fewer = f" ({record['asked']} asked for, no more qualify)" if record["images"] < record["asked"] else ""
    masked = [f"fill {e.fill}", f"{record['masked_share']:.1%} masked", f"{record['unchanged']} unchanged"]
    by = ", ".join([e.select if clean else "misclassified"] + [e.xai] * e.explains + masked * e.masks)
    blank = f"; {record['blank']} maps are constant" if record["blank"] else ""
    line = f"proxy step {number}: {record['images']} of {len(part)} images{fewer} by {by}"
    walk.log(f"{line}, {record['seconds']:.1f} s{blank}")


def clear(walk: Walk, event: Event) -> None:
    """Forget all maps: the epochs after it train on originals."""
    walk.steps = []
    walk.log("all maps are forgotten")


def prune(walk: Walk, event: Event) -> None:
    """Prune a share of the weights that are left, by magnitude; they stay zero."""
    models.prune(walk.state.model.network, event.value)
    walk.log(f"pruned: {models.sparsity(walk.state.model.network):.1%} of the weights are zero")


def scale_lr(walk: Walk, event: Event) -> None:
    """Multiply the learning rate from here on, and all values from which the scheduler computes it."""
    for group in walk.state.optimizer.param_groups:
        for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
            group[name] *= event.value
    scheduler = walk.state.scheduler
    scheduler.base_lrs = [lr * event.value for lr in scheduler.base_lrs]
    walk.log(f"learning rate times {event.value:g}")


EVENTS: dict[str, Callable[[Walk, Event], None]] = {
    schedule.EPOCH: epoch,
    schedule.PROXY: proxy,
    schedule.CLEAR: clear,
    schedule.PRUNE: prune,
    schedule.LR: scale_lr,
}


def _finish(walk: Walk) -> None:
    """Read the test images, once, and write the results; the weights replace the checkpoint."""
    from pa_core import metrics  # loads scikit-learn, for which the first training step need not wait

    path, classes, test = walk.path, walk.dataset.classes, walk.dataset.test
    logits = walk.evaluate(Pool.of(test)).logits
    runs.write_csv(path / "predictions.csv", metrics.predictions(logits, test, classes))
    per_class = metrics.per_class(test.labels.numpy(), logits.argmax(1).numpy(), classes)
    runs.write_csv(path / "classes.csv", per_class)
    runs.save_weights(path, walk.state.model.network)
    rows, records = walk.rows, walk.records
    accuracies, proxy_images = [row["val_accuracy"] for row in rows], sum(record["images"] for record in records)
    if schedule.parse(walk.experiment.schedule)[-1].kind != schedule.EPOCH:  # pruned since the last epoch
        accuracies.append(walk.evaluate(Pool.of(walk.dataset.val)).accuracy)
    masked = sum(record["masked_share"] * record["images"] for record in records)
    totals = {"unchanged_proxies": "unchanged", "blank_maps": "blank", "proxy_seconds": "seconds"}
    summary = {
        "val_accuracy": accuracies[-1],
        "best_val_accuracy": max(accuracies),
        **metrics.summarise(logits, test.labels),
        **{f"n_{name}": len(getattr(walk.dataset, name)) for name in ("train", "val", "test")},
        "epochs": len(rows),
        "sparsity": models.sparsity(walk.state.model.network),
        "proxy_images": proxy_images,
        "masked_share": masked / max(proxy_images, 1),
        **{total: sum(record[name] for record in records) for total, name in totals.items()},
        "train_seconds": sum(row["seconds"] for row in rows),
        **{name: rows[-1][name] for name in ("reported_accuracy",) if name in rows[-1]},
    }
    files.write_json(path / "summary.json", summary)
    numbers = {f"hparam/{name}": summary[name] for name in ("val_accuracy", "test_accuracy", "proxy_images")}
    texts = {k: v if isinstance(v, (int, float, bool)) else str(v) for k, v in walk.experiment.to_dict().items()}
    walk.board.add_hparams(texts, numbers, run_name=".", global_step=walk.state.epoch)
    runs.update_manifest(path, status=runs.FINISHED, finished=runs.now())
    runs.remove_checkpoint(path)
    which = f"seed {walk.experiment.seed}; the run is in {shown(path)}"
    walk.log(f"test accuracy {summary['test_accuracy']:.3f} on {len(test)} images, {which}")
