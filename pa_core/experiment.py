"""Walk the schedule: ``run(experiment) -> Run``.

>>> from pa_core.experiment import run
>>> run(Experiment(schedule="5,p,5", xai="gradcam")).summary["test_accuracy"]       # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pa_core import attribution, data, metrics, models, protocol, runs, schedule, selection, train
from pa_core.data import decode
from pa_core.masking import to_float
from pa_core.params import Experiment, ParameterError, derived_seed, runs_home, shown
from pa_core.proxy import Choice, Proxies, Record, choose, examples, make_proxies, proxy_step
from pa_core.runs import Run, RunError

Log = Callable[[str], None]
SHOWN = 8
"""Proxies per step that TensorBoard and the notebooks show."""


def say(text: str) -> None:
    """Print a line at once, so that it is seen while the run goes on, also in a log file."""
    print(text, flush=True)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that is checked and loaded before training starts.

    Attributes:
        experiment: its parameters.
        dataset: the three parts.
        model: freshly initialised or with the given weights, on the CPU.
        device, dtype: resolved from ``device`` and ``precision``.
        digest: the run's identity.
    """

    experiment: Experiment
    dataset: data.Dataset
    model: models.Classifier
    device: torch.device
    dtype: torch.dtype
    digest: str


def load_data(experiment: Experiment) -> data.Dataset:
    """The experiment's dataset, split."""
    names = {"dataset", "data_dir", "bad_images", "image_size", "train_fraction", "folds", "fold", "seed"}
    options = {f.name: getattr(experiment, f.name) for f in fields(experiment) if f.name in names}
    if experiment.protocol != "clean":
        options["train_fraction"] = 1.0  # there it is what each stage draws anew
    return data.load(**options)


def prepare(experiment: Experiment) -> Prepared:
    """Check everything that can be checked, the cheap things first, and load data and model.

    Raises:
        ParameterError: a parameter is refused.
    """
    device = train.resolve_device(experiment.device)
    dtype = train.resolve_precision(experiment.precision, device)
    models.check_name(experiment.model)
    experiment = _resolved(experiment)
    xai = experiment.xai
    attribution.check(xai, smooth=experiment.smooth)
    weights = _file_digest(experiment.pretrained)
    dataset = load_data(experiment)
    protocol.check(experiment, len(dataset.train))
    model = models.create(
        experiment.model,
        classes=len(dataset.classes),
        image_size=dataset.image_size,
        pretrained=experiment.pretrained,
        cam_layer=experiment.cam_layer,
        seed=derived_seed(experiment.seed, "initialisation"),
    )
    if schedule.steps(experiment.schedule):
        _check_steps(experiment, len(dataset.train))
        if experiment.fill != "none":
            attribution.check(xai, smooth=experiment.smooth, model=model)
    digest = experiment.digest(data=dataset.digest, image_size=dataset.image_size, weights=weights)
    return Prepared(experiment=experiment, dataset=dataset, model=model, device=device, dtype=dtype, digest=digest)


def _resolved(experiment: Experiment) -> Experiment:
    """With the one name of an alias, which is the same run, and a data_dir that can be opened from anywhere."""
    data_dir = experiment.data_dir and str(Path(experiment.data_dir).expanduser().absolute())
    return replace(experiment, xai=attribution.resolve(experiment.xai), data_dir=data_dir)


def locate(experiment: Experiment, *, data_digest: str, image_size: int) -> Path:
    """Where the run with these parameters lies, or would lie. Loads neither data nor model.

    Args:
        data_digest, image_size: of the dataset, as :func:`load_data` gives them.

    Raises:
        ParameterError: an unknown method, or a weights file that is not there.
    """
    experiment = _resolved(experiment)
    digest = experiment.digest(data=data_digest, image_size=image_size, weights=_file_digest(experiment.pretrained))
    return runs.directory(runs_home(experiment.runs_dir), experiment, digest)


def _check_steps(experiment: Experiment, n: int) -> None:
    chosen = n if experiment.select == "all" else selection.count(n, experiment.fraction)
    if experiment.xai == "shuffled" and chosen < 2:
        allowed = f"it selects {chosen} of {n} images, and xai = shuffled needs at least two; allowed is a larger one"
        raise ParameterError("fraction", experiment.fraction, allowed)


def _file_digest(pretrained: bool | str) -> str:
    if not isinstance(pretrained, str):
        return ""
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise ParameterError(
            "pretrained", pretrained, "there is no such file; allowed is true, false or a weights file"
        )
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(experiment: Experiment, prepared: Prepared | None = None) -> Run | None:
    """The finished run with these parameters, if there is one. Trains nothing."""
    prepared = prepared or prepare(experiment)
    path = runs.directory(runs_home(experiment.runs_dir), prepared.experiment, prepared.digest)
    run = Run(path)
    return run if run.finished else None


def run(experiment: Experiment, *, rerun: bool = False, until_step: int | None = None, log: Log = say) -> Run:
    """Train as the schedule says, or continue where a run with the same identity stopped, or return it if it is finished.

    Args:
        rerun: make a finished run anew beside the old one.
        until_step: pause after this proxy step (1 is the first), to look at its proxies; call again to go on.
        log: receives a line per epoch and proxy step.

    Raises:
        ParameterError: before anything is trained or written.
        NonFiniteLoss: with epoch and step; the run has failed and has no result.
        RunError: the run's directory holds something that does not belong to it.
    """
    prepared = prepare(experiment)
    placement = _placement(prepared)
    path = runs.directory(runs_home(experiment.runs_dir), prepared.experiment, prepared.digest, rerun=rerun)
    _make_folder(path, experiment.runs_dir)
    with (
        runs.lock(path, log),
        torch.random.fork_rng(),
        _threads(Run(path).manifest.get("threads")),
        train.tf32(experiment.tf32),
    ):
        if Run(path).finished:
            runs.remove_checkpoints(path)  # of a process killed between the two
            stale = "; it was made by other code than this, rerun=True makes it anew" if Run(path).stale else ""
            log(f"finished before: {shown(path)}{stale}")
            return Run(path)
        walk = _begin(prepared, placement, path, log)
        try:
            if _walk(walk, until_step):
                _finish(walk)
            else:
                runs.update_manifest(path, status=runs.PAUSED)
        except BaseException as error:  # noted in the manifest, then raised on
            kind = runs.INTERRUPTED if isinstance(error, KeyboardInterrupt) else runs.FAILED
            try:
                runs.update_manifest(path, status=kind, error=f"{type(error).__name__}: {error}")
            except RunError as unnoted:  # on a full disk; the first error is the one to show
                error.add_note(str(unnoted))
            raise
        finally:
            walk.board.close()
    return Run(path)


def _make_folder(path: Path, runs_dir: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError(
            "runs_dir",
            runs_dir,
            f"no folder can be made there ({error.strerror}); allowed is a folder that can be written",
        ) from error


@contextmanager
def _threads(recorded: int | None) -> Iterator[None]:
    """Continue with the thread count the run began with: the sums of a float depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(recorded or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(kw_only=True)
class _Walk:
    """A run under way."""

    prepared: Prepared
    path: Path
    state: train.State
    batch_size: int
    records: list[Record]
    rows: list[dict[str, Any]]
    board: SummaryWriter
    log: Log

    @property
    def experiment(self) -> Experiment:
        return self.prepared.experiment

    def step_folder(self, step: int) -> Path:
        return self.path / "proxies" / f"step_{step}"

    def stage(self, number: int) -> protocol.Stage:
        """What a stage trains on, with the proxies of the steps so far."""
        folders = [self.step_folder(record.step) for record in self.records]
        return protocol.stage(self.prepared.dataset.train, self.experiment, number=number, steps=folders)


def _begin(prepared: Prepared, placement: data.Placement, path: Path, log: Log) -> _Walk:
    """A fresh run, or one that stands where its checkpoint left it."""
    if placement.store == "device":
        prepared = replace(prepared, dataset=_on_device(prepared))
    e, dataset, manifest = prepared.experiment, prepared.dataset, Run(path).manifest
    checkpoint = runs.load_checkpoint(path, log)
    if manifest:
        _check_resume(prepared, manifest, path)
    torch.manual_seed(derived_seed(e.seed, "training"))
    batch_size = manifest.get("batch_size") or _batch_size(prepared, log)
    total_steps = e.length * train.steps_per_epoch(protocol.draws(len(dataset.train), e), batch_size)
    state = train.create_state(prepared.model, e, total_steps=total_steps, device=prepared.device, dtype=prepared.dtype)
    records: list[Record] = []
    rows: list[dict[str, Any]] = []
    if checkpoint is not None:
        state.load_state_dict(checkpoint["state"])
        records, rows = [Record(**record) for record in checkpoint["records"]], checkpoint["metrics"]
        manifest = manifest | {"resumed": [*manifest.get("resumed", []), _resumption(state, manifest, log)]}
        log(f"continuing {path.name} after epoch {state.epoch}")
    runs.restore_metrics(path, rows, log)
    if not manifest or checkpoint is None:
        manifest = _new_manifest(prepared, batch_size)
    compiled = _compile(state, prepared, batch_size, log) if e.compile else None
    runs.write_json(
        path / "manifest.json",
        manifest | {"status": runs.RUNNING, "error": None, "compile": compiled, "store": asdict(placement)},
    )
    board = SummaryWriter(str(path / "tensorboard"), purge_step=state.epoch + 1)
    return _Walk(
        prepared=prepared,
        path=path,
        state=state,
        batch_size=batch_size,
        records=records,
        rows=rows,
        board=board,
        log=log,
    )


def _placement(prepared: Prepared) -> data.Placement:
    """Where training and validation images and the proxies will lie. The test images, read once, stay in their file."""
    train_part, val = prepared.dataset.train, prepared.dataset.val
    images = len(train_part) + len(val) + _room(prepared)
    return data.place(prepared.experiment.store, needed=images * math.prod(train_part.shape), device=prepared.device)


def _room(prepared: Prepared) -> int:
    """The most proxies that an overlay of this run holds."""
    e, n = prepared.experiment, len(prepared.dataset.train)
    steps = schedule.steps(e.schedule)
    kept = steps if e.keeps_all_proxies else min(steps, 1)
    return kept * (n if e.select == "all" else selection.count(n, e.fraction))


def _on_device(prepared: Prepared) -> data.Dataset:
    dataset, device = prepared.dataset, prepared.device
    return replace(dataset, train=dataset.train.on(device, room=_room(prepared)), val=dataset.val.on(device))


def _resumption(state: train.State, manifest: dict[str, Any], log: Log) -> dict[str, Any]:
    """What the manifest keeps of a resume; other code than the run began with is said."""
    if manifest["code_version"] != runs.code_version():
        log("the run was begun by other code than this; the manifest keeps both versions")
    return {
        "epoch": state.epoch,
        "time": runs.now(),
        "code_version": runs.code_version(),
        "versions": runs.versions(),
        "device_name": runs.device_name(state.device),
    }


def _check_resume(prepared: Prepared, manifest: dict[str, Any], path: Path) -> None:
    expected = {
        "digest": prepared.digest,
        "split_digest": prepared.dataset.split_digest,
        "precision": str(prepared.dtype).removeprefix("torch."),
    }
    for name, here in expected.items():
        if manifest.get(name) != here:
            raise RunError(f"{path} cannot be continued: its {name} is {manifest.get(name)}, and would now be {here}")


def _batch_size(prepared: Prepared, log: Log) -> int:
    if prepared.experiment.batch_size != "auto":
        return int(prepared.experiment.batch_size)
    dataset = prepared.dataset
    size = train.auto_batch_size(
        prepared.model,
        image_size=dataset.image_size,
        n=len(dataset.train),
        device=prepared.device,
        dtype=prepared.dtype,
    )
    log(f"batch_size auto: {size}")
    return size


def _compile(state: train.State, prepared: Prepared, batch_size: int, log: Log) -> str:
    some = torch.arange(min(batch_size, len(prepared.dataset.train)))
    return train.try_compile(state, train.pixels(data.send(prepared.dataset.train.read(some), state.device)), log)


def _new_manifest(prepared: Prepared, batch_size: int) -> dict[str, Any]:
    e, dataset = prepared.experiment, prepared.dataset
    return {
        "digest": prepared.digest,
        "parameters": e.to_dict(),
        "effective": e.effective(),
        "started": runs.now(),
        "command": e.command("03_proxy_loop" if schedule.steps(e.schedule) else "02_training"),
        "process": runs.process(),
        "code_version": runs.code_version(),
        "git_commit": runs.git_commit(),
        "versions": runs.versions(),
        "device": str(prepared.device),
        "device_name": runs.device_name(prepared.device),
        "threads": torch.get_num_threads(),
        "precision": str(prepared.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "data_digest": dataset.digest,
        "weights_digest": _file_digest(e.pretrained),
        "split_digest": dataset.split_digest,
        "classes": list(dataset.classes),
        "image_size": dataset.image_size,
        "n_train": len(dataset.train),
        "n_val": len(dataset.val),
        "n_test": len(dataset.test),
        "skipped": list(dataset.skipped),
        "dropped": list(dataset.dropped),
        "model": prepared.model.describe(),
    }


def _walk(walk: _Walk, until_step: int | None) -> bool:
    """The epochs that are left, each with the proxy step that may stand before it; False when paused before the end."""
    e = walk.experiment
    plan, current = schedule.stages(e.schedule, p_trains=e.protocol != "clean"), None
    for epoch, (stage, _) in enumerate(plan):
        if epoch < walk.state.epoch:
            continue
        if len(walk.records) < sum(proxy_first for _, proxy_first in plan[: epoch + 1]):
            _make_step(walk, current or walk.stage(stage - 1))
            runs.save_checkpoint(walk.path, _checkpoint(walk, stage))
        if current is None or plan[epoch - 1][0] != stage:
            current = walk.stage(stage)
        if until_step is not None and len(walk.records) >= until_step:
            return False
        row = _epoch(walk, current, stage)
        walk.rows.append(row)
        runs.append_metrics(walk.path, row)
        for name, value in row.items():
            if name not in ("epoch", "stage"):
                walk.board.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        walk.board.flush()  # before the checkpoint, or a killed run would leave a hole
        runs.save_checkpoint(walk.path, _checkpoint(walk, stage))
        walk.log(_line(row, len(plan)))
    return True


def _epoch(walk: _Walk, stage: protocol.Stage, number: int) -> dict[str, Any]:
    """Train and validate once: a line of metrics.jsonl."""
    e, dataset = walk.experiment, walk.prepared.dataset
    trained = train.train_one_epoch(
        walk.state,
        stage.training,
        draws=protocol.draws(len(dataset.train), e),
        batch_size=walk.batch_size,
        kinds=e.augment,
        label_smoothing=e.label_smoothing,
        seed=e.seed,
    )
    checked = _evaluate(walk, dataset.val)
    if not math.isfinite(checked.loss):  # the last step's update is seen here first
        raise train.NonFiniteLoss(
            f"the validation loss is not finite after epoch {walk.state.epoch}; a lower lr may help"
        )
    row = {
        "epoch": walk.state.epoch,
        "stage": number,
        "train_loss": trained["train_loss"],
        "train_accuracy": trained["train_accuracy"],
        "val_loss": checked.loss,
        "val_accuracy": checked.accuracy,
        "lr": trained["lr"],
        "images_per_second": trained["images_per_second"],
        "seconds": trained["seconds"],
    }
    if stage.reported is not None:
        row["reported_accuracy"] = _evaluate(walk, stage.reported).accuracy
    return row


def _checkpoint(walk: _Walk, stage: int) -> dict[str, Any]:
    """The overlay is kept as the records of its steps: their proxies are files of the run already."""
    records = [record.to_dict() for record in walk.records]
    return {"state": walk.state.state_dict(), "stage": stage, "records": records, "metrics": walk.rows}


def _line(row: dict[str, Any], epochs: int) -> str:
    reported = f"reported accuracy {row['reported_accuracy']:.3f}  " if "reported_accuracy" in row else ""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.3f}  "
        f"val loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:.3f}  {reported}"
        f"lr {row['lr']:.1e}  {row['images_per_second']:,.0f} images/s"
    )


def _evaluate(walk: _Walk, source: train.Source) -> train.Evaluation:
    return train.evaluate(walk.state.model, source, device=walk.state.device, dtype=walk.state.dtype)


def _make_step(walk: _Walk, stage: protocol.Stage) -> None:
    """The proxy step at the end of a stage."""
    e, step = walk.experiment, len(walk.records) + 1
    record = proxy_step(
        walk.state.model,
        walk.prepared.dataset.train,
        e,
        step=step,
        epoch=walk.state.epoch,
        directory=walk.step_folder(step),
        candidates=stage.candidates,
        device=walk.state.device,
        dtype=walk.state.dtype,
        show=lambda made: _show(walk.board, made, walk.state.epoch),
    )
    walk.records.append(record)
    fewer = f" ({record.asked} asked for, no more qualify)" if record.images < record.asked else ""
    walk.log(
        f"proxy step {step}: {record.images} of {len(walk.prepared.dataset.train)} images{fewer} by {e.select}, {e.xai}, "
        f"fill {e.fill}, {record.masked_share:.1%} masked, {record.unchanged} unchanged, {record.seconds:.1f} s"
        + (f"; {record.blank} heatmaps say nothing (constant)" if record.blank else "")
    )


def _show(board: SummaryWriter, made: Proxies, epoch: int) -> None:
    """Original, heatmap and proxy side by side, one image a row."""
    rows = slice(0, SHOWN)
    maps = (made.maps[rows, None] * 255).to(torch.uint8).expand_as(made.originals[rows])
    triples = torch.cat([made.originals[rows], maps, made.images[rows]], dim=3)
    board.add_image("proxies/original_heatmap_proxy", torch.cat(list(triples), dim=1), epoch)


def _finish(walk: _Walk) -> None:
    """Read the test images, once, and write the results; the checkpoint shrinks to the weights."""
    path, e, dataset = walk.path, walk.experiment, walk.prepared.dataset
    tested = _evaluate(walk, dataset.test)
    if not math.isfinite(tested.loss):
        raise train.NonFiniteLoss(f"the test loss is not finite after epoch {walk.state.epoch}; a lower lr may help")
    table = predictions(tested.logits, dataset.test, dataset.classes)
    runs.write_csv(path / "predictions.csv", table)
    runs.write_csv(path / "classes.csv", metrics.per_class(table["label"], table["predicted"], dataset.classes))
    runs.save_weights(path, walk.state.model.network)
    summary = _summary(walk, tested)
    runs.write_json(path / "summary.json", summary)
    numbers = {f"hparam/{k}": v for k, v in summary.items() if k in ("val_accuracy", "test_accuracy", "proxy_images")}
    texts = {k: v if isinstance(v, (int, float, bool)) else str(v) for k, v in e.to_dict().items()}
    walk.board.add_hparams(texts, numbers, run_name=".", global_step=walk.state.epoch)
    started = pd.Timestamp(Run(path).manifest["started"])
    wall_time = (pd.Timestamp(runs.now()) - started).total_seconds()
    runs.update_manifest(path, status=runs.FINISHED, finished=runs.now(), wall_time=wall_time)
    runs.remove_checkpoints(path)
    walk.log(
        f"test accuracy {summary['test_accuracy']:.3f} on {summary['n_test']} images, seed {e.seed}; the run is in {shown(path)}"
    )


def predictions(logits: Tensor, part: data.Part, classes: tuple[str, ...]) -> pd.DataFrame:
    """Per image: id, label, predicted, confidence (probability of the predicted class, [0, 1])."""
    confidence, predicted = logits.softmax(1).max(1)
    names = list(classes)
    return pd.DataFrame(
        {
            "id": list(part.ids),
            "label": [names[i] for i in part.labels.tolist()],
            "predicted": [names[i] for i in predicted.tolist()],
            "confidence": confidence.numpy().round(6),
        }
    )


def _summary(walk: _Walk, tested: train.Evaluation) -> dict[str, Any]:
    rows, records, dataset = walk.rows, walk.records, walk.prepared.dataset
    made = sum(record.images for record in records)
    reported = {
        name: value for name, value in rows[-1].items() if name == "reported_accuracy"
    }  # by the thesis' protocol only
    return {
        "val_accuracy": rows[-1]["val_accuracy"],
        "best_val_accuracy": max(row["val_accuracy"] for row in rows),
        "test_accuracy": tested.accuracy,
        "test_loss": tested.loss,
        "n_train": len(dataset.train),
        "n_val": len(dataset.val),
        "n_test": len(dataset.test),
        "epochs": len(rows),
        "proxy_images": made,
        "masked_share": sum(r.masked_share * r.images for r in records) / made if made else 0.0,
        "unchanged_proxies": sum(record.unchanged for record in records),
        "blank_heatmaps": sum(record.blank for record in records),
        "proxy_seconds": sum(record.seconds for record in records),
        "train_seconds": sum(row["seconds"] for row in rows),
    } | reported


# Looking at runs, for notebooks


@dataclass(frozen=True, kw_only=True)
class Reopened:
    """A run with its data and its network."""

    experiment: Experiment
    dataset: data.Dataset
    model: models.Classifier

    def worst(self, *, count: int = 16) -> tuple[Tensor, selection.Scores]:
        """Positions of the first ``count`` training images that a proxy step would choose now, and all scores."""
        choice, scores = self._choose()
        return choice.positions[:count], scores

    def proxies(self, *, count: int = SHOWN) -> Proxies:
        """What a proxy step would make of its first ``count`` choices now; nothing is stored."""
        choice, _ = self._choose()
        device = next(self.model.parameters()).device
        return make_proxies(self.model, self.dataset.train, self.experiment, choice[:count], device=device)

    def _choose(self) -> tuple[Choice, selection.Scores]:
        part, device = self.dataset.train, next(self.model.parameters()).device
        # the predecessor chooses among those of a stage, here among all
        candidates = None if self.experiment.protocol == "clean" else torch.arange(len(part))
        return choose(
            self.model, part, self.experiment, step=1, device=device, dtype=torch.float32, candidates=candidates
        )


def reopen(run: Run, experiment: Experiment | None = None, *, device: str = "auto") -> Reopened:
    """Load a finished run's data and trained network.

    Args:
        experiment: where the data lie now, and how proxies are chosen and made; by default as in the run's manifest.

    Raises:
        RunError: the data are not what the run was trained on, or the run has no weights.
    """
    experiment = experiment or run.experiment
    dataset = load_data(experiment)
    if dataset.split_digest != run.manifest["split_digest"]:
        raise RunError(f"{run.path} was trained on other data than {experiment.dataset} holds now")
    return Reopened(experiment=experiment, dataset=dataset, model=run.model(train.resolve_device(device)))


def stored_proxies(
    run: Run, dataset: data.Dataset, *, step: int = 1, count: int = SHOWN
) -> tuple[Proxies | None, list[str]]:
    """The first proxies of a step as they were made and trained on, and a title for each; None when there was no such step."""
    folder = run.path / "proxies" / f"step_{step}"
    if not folder.is_dir():
        return None, []
    made, _ = examples(folder, dataset.train, count=count)
    rows, names = run.proxies(step).head(len(made)), dataset.classes
    seen = zip(rows["label"], rows["predicted"], strict=True)
    return made, [f"{names[label]}\n→ {names[guess]}" for label, guess in seen]


def side_by_side(named: dict[str, Run]) -> pd.DataFrame:
    """A column per run: accuracies, and what the proxies cost."""
    rows = [
        "val_accuracy",
        "test_accuracy",
        "test_loss",
        "n_test",
        "epochs",
        "proxy_images",
        "masked_share",
        "proxy_seconds",
        "train_seconds",
    ]
    return pd.DataFrame({name: pd.Series(run.summary)[rows] for name, run in named.items()}).round(4)


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
    images: str | os.PathLike | data.Part,
    *,
    xai: str | None = None,
    count: int = SHOWN,
    device: str = "auto",
) -> Comparison:
    """Predictions and heatmaps of finished runs on your own images, or on the first ones of a part of a dataset.

    Args:
        named: what each run is called -> run.
        images: a folder (its subfolders included; what is no image is left out), an image file, or a part whose
            images have the runs' size.
        xai: the explanation method; by default each run's own.
        count: how many images at most.

    Raises:
        ParameterError: there is no image, or one of another size.
        RunError: a run is not finished.
    """
    where, rows, seen, maps = train.resolve_device(device), [], {}, {}
    for name, run in named.items():
        size, classes, e = run.manifest["image_size"], run.manifest["classes"], run.experiment
        names, seen[name] = _own_images(images, size, count)
        model, pixels = run.model(where), to_float(seen[name].to(where))
        with torch.inference_mode():
            confidence, predicted = model(pixels).float().softmax(1).max(1)
        explained = attribution.heatmaps(
            model, pixels, method=xai or e.xai, target=predicted.clone(), smooth=e.smooth, ids=names, seed=e.seed
        )
        maps[name] = explained.cpu()
        guesses = zip(names, predicted.tolist(), confidence.tolist(), strict=True)
        rows += [{"image": n, "run": name, "predicted": classes[k], "confidence": round(c, 6)} for n, k, c in guesses]
    table = pd.DataFrame(rows, columns=["image", "run", "predicted", "confidence"])
    return Comparison(names=tuple(names), images=seen, maps=maps, table=table)


def _own_images(images: str | os.PathLike | data.Part, size: int, count: int) -> tuple[list[str], Tensor]:
    """Names, and uint8 [n, 3, size, size]."""
    if isinstance(images, data.Part):
        read = images.read(torch.arange(min(count, len(images))))
        if read.shape[-1] != size:
            raise ParameterError(
                "images", images, f"its images have {read.shape[-1]} pixels per side; allowed is {size}, as the run has"
            )
        return list(images.ids[:count]), read
    path, names, found = Path(images).expanduser(), [], []
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if len(found) < count and file.is_file():
            try:
                found.append(torch.from_numpy(decode.pixels(str(file), size).copy()))
            except decode.UNREADABLE:
                continue  # the folder may hold other things, too
            names.append(file.name if path.is_file() else file.relative_to(path).as_posix())
    if not found:
        raise ParameterError(
            "images", str(images), "there is none that can be read; allowed is a folder with images, or an image"
        )
    return names, torch.stack(found)
