"""Walk the schedule: ``run(experiment) -> Run``.

>>> from pa_core.experiment import run
>>> from pa_core.params import Experiment
>>> run(Experiment(schedule="5,p,5", xai="gradcam")).summary["test_accuracy"]       # doctest: +SKIP

To add an event: a letter in `schedule`, a function here and its row in ``EVENTS``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2.functional import pil_to_tensor

from pa_core import data, device, files, metrics, models, protocol, runs, schedule, train
from pa_core.batch import Pool, to_pixels
from pa_core.errors import ParameterError, RunError
from pa_core.files import shown
from pa_core.params import SCHEMA, Experiment, derived_seed
from pa_core.prepare import Prepared, find, load_data, locate, prepare
from pa_core.proxy import Step, proxy_step
from pa_core.runs import Run
from pa_core.schedule import Event

Log = Callable[[str], None]
__all__ = ["EVENTS", "Prepared", "Walk", "find", "load_data", "locate", "prepare", "run", "say"]


def say(text: str) -> None:
    """Print a line at once, so that it is seen while the run goes on, also in a log file."""
    print(text, flush=True)


# The run


def run(experiment: Experiment | Prepared, *, log: Log = say) -> Run:
    """Train as the schedule says, or continue where such a run stopped, or return it if it is finished.

    ``experiment`` may be what :func:`prepare` made of it, which is left as it is; ``log`` receives a line per epoch and
    event. ParameterError: before anything is trained or written. NonFiniteLoss: with epoch and step; the run has failed
    and has no result. RunError: the run's files are damaged or cannot be written, or were begun with another split or
    precision.
    """
    prepared = experiment if isinstance(experiment, Prepared) else prepare(experiment)
    path, e = prepared.path, prepared.experiment
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        allowed = f"must be a folder that can be written ({error.strerror})"
        raise ParameterError("runs_dir", e.runs_dir, allowed) from error
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
                _run_events(walk)
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
    steps: dict[int, Step] = field(default_factory=dict)  # proxy steps whose maps are in use, by number
    records: list[dict[str, Any]] = field(default_factory=list)  # what proxy_step returned, for all steps so far
    rows: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl

    def stage(self, event: Event) -> protocol.Stage:
        """What the event's stage trains on, with the maps that are in use."""
        return protocol.stage(self.dataset.train, self.experiment, number=event.stage, steps=list(self.steps.values()))

    def evaluate(self, pool: Pool, masked: Experiment | None = None) -> train.Evaluation:
        """The network on a pool, as `train.evaluate` has it; NonFiniteLoss: the last update of an epoch shows here."""
        state = self.state
        found = train.evaluate(state.model, pool, device=state.device, dtype=state.dtype, experiment=masked)
        if not math.isfinite(found.loss):
            which = f"the loss on {pool.part.name} images"
            raise train.NonFiniteLoss(f"{which} is not finite after epoch {state.epoch}; try a lower lr")
        return found


IN_CHECKPOINT = ("position", "records", "rows")


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
        manifest = _new_manifest(prepared) | {
            "images_on_device": dataset.train.resident is not None,
            "precision": precision,
            "batch_size": batch_size,
        }
    else:
        state.load_state_dict(checkpoint["state"])
        for name in IN_CHECKPOINT:
            setattr(walk, name, checkpoint[name])
        walk.steps = {number: Step.load(Run(path).step(number)) for number in checkpoint["steps"]}
        manifest["resumed"] = [*manifest.get("resumed", []), {"epoch": state.epoch, "time": runs.now()}]
        log(f"continuing {path.name} after epoch {state.epoch}")
    runs.write_metrics(path, walk.rows)
    compiled = None
    if e.compile:
        some = dataset.train.read(torch.arange(min(batch_size, len(dataset.train))))
        compiled = train.try_compile(state, to_pixels(data.send(some, where)), log)
    files.write_json(path / "manifest.json", {**manifest, "status": runs.RUNNING, "error": None, "compile": compiled})
    return walk


def _new_manifest(prepared: Prepared) -> dict[str, Any]:
    e, dataset = prepared.experiment, prepared.dataset
    names = ("classes", "image_size", "split_digest", "skipped", "dropped")
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
        **{name: getattr(dataset, name) for name in names},
        **_counts(dataset),
        "model": prepared.model.describe(),
    }


def _counts(dataset: data.Dataset) -> dict[str, int]:
    return {f"n_{name}": len(getattr(dataset, name)) for name in ("train", "val", "test")}


def _run_events(walk: Walk) -> None:
    """Run the events that are left. The checkpoint after each names the steps in use, whose maps are files already."""
    events = schedule.parse(walk.experiment.schedule, p_trains=walk.experiment.protocol != "clean")
    for event in events[walk.position :]:
        EVENTS[event.kind](walk, event)
        walk.position += 1
        kept = {name: getattr(walk, name) for name in IN_CHECKPOINT}
        runs.save_checkpoint(walk.path, {"state": walk.state.state_dict(), "steps": list(walk.steps), **kept})


# Events


def epoch(walk: Walk, event: Event) -> None:
    """Train and validate once: a line of metrics.jsonl."""
    e, state, stage = walk.experiment, walk.state, walk.stage(event)
    draws = protocol.epoch_size(len(walk.dataset.train), e)
    trained = train.train_one_epoch(state, stage.training, experiment=e, draws=draws, batch_size=walk.batch_size)
    validated = walk.evaluate(Pool.of(walk.dataset.val))
    row = {"epoch": state.epoch, "stage": event.stage, **trained}
    row |= {"val_loss": validated.loss, "val_accuracy": validated.accuracy}
    if stage.reported is not None:  # the predecessor's protocol
        row["reported_accuracy"] = walk.evaluate(stage.reported, masked=e).accuracy
    walk.rows.append(row)
    runs.write_metrics(walk.path, walk.rows)
    for name in row.keys() - {"epoch", "stage"}:
        walk.board.add_scalar(name.replace("_", "/", 1), row[name], state.epoch)
    walk.board.flush()  # before the checkpoint, or a killed run would leave a hole
    reported = f"reported accuracy {row['reported_accuracy']:.3f}  " if stage.reported else ""
    walk.log(
        f"epoch {state.epoch:>{len(str(e.length))}}/{e.length}  "
        f"train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.3f}  "
        f"val loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:.3f}  {reported}"
        f"lr {row['lr']:.1e}  {row['images_per_second']:,.0f} images/s"
    )


def proxy(walk: Walk, event: Event) -> None:
    """The proxy step at the end of a stage: maps of the images that it selects."""
    e, state, part, number = walk.experiment, walk.state, walk.dataset.train, len(walk.records) + 1
    folder, candidates = Run(walk.path).step(number), walk.stage(event).candidates
    how = {"device": state.device, "dtype": state.dtype, "candidates": candidates}
    record = proxy_step(state.model, part, e, step=number, directory=folder, **how)
    walk.records.append(record)
    walk.steps = {**(walk.steps if e.keeps_all_proxies else {}), number: Step.load(folder)}
    if record["images"]:
        picture = pil_to_tensor(Image.open(folder / "proxies.png"))
        walk.board.add_image("proxies/original_map_mask_proxy", picture, state.epoch)
    fewer = f" ({record['asked']} asked for, no more qualify)" if record["images"] < record["asked"] else ""
    masked = [f"fill {e.fill}", f"{record['masked_share']:.1%} masked", f"{record['unchanged']} unchanged"]
    how = ", ".join([e.select] + [e.xai] * e.explains + masked * e.masks)
    blank = f"; {record['blank']} maps are constant" if record["blank"] else ""
    images = f"{record['images']} of {len(part)} images{fewer}"
    walk.log(f"proxy step {number}: {images} by {how}, {record['seconds']:.1f} s{blank}")


def clear(walk: Walk, event: Event) -> None:
    """Forget all maps: the epochs after it train on originals."""
    walk.steps = {}
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


# The end


def _finish(walk: Walk) -> None:
    """Read the test images, once, and write the results; the weights replace the checkpoint."""
    path, classes, test = walk.path, walk.dataset.classes, walk.dataset.test
    logits = walk.evaluate(Pool.of(test)).logits
    runs.write_csv(path / "predictions.csv", metrics.predictions(logits, test, classes))
    per_class = metrics.per_class(test.labels.numpy(), logits.argmax(1).numpy(), classes)
    runs.write_csv(path / "classes.csv", per_class)
    runs.save_weights(path, walk.state.model.network)
    summary = _summary(walk, metrics.summarise(logits, test.labels))
    files.write_json(path / "summary.json", summary)
    numbers = {f"hparam/{name}": summary[name] for name in ("val_accuracy", "test_accuracy", "proxy_images")}
    texts = {k: v if isinstance(v, (int, float, bool)) else str(v) for k, v in walk.experiment.to_dict().items()}
    walk.board.add_hparams(texts, numbers, run_name=".", global_step=walk.state.epoch)
    started, finished = Run(path).manifest["started"], runs.now()
    wall_time = (datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds()
    runs.update_manifest(path, status=runs.FINISHED, finished=finished, wall_time=wall_time)
    runs.remove_checkpoint(path)
    result = f"test accuracy {summary['test_accuracy']:.3f} on {len(test)} images"
    walk.log(f"{result}, seed {walk.experiment.seed}; the run is in {shown(path)}")


def _summary(walk: Walk, tested: dict[str, float]) -> dict[str, Any]:
    rows, records = walk.rows, walk.records
    proxies = sum(record["images"] for record in records)
    masked = sum(record["masked_share"] * record["images"] for record in records)
    totals = {"unchanged_proxies": "unchanged", "blank_maps": "blank", "proxy_seconds": "seconds"}
    return {
        "val_accuracy": rows[-1]["val_accuracy"],
        "best_val_accuracy": max(row["val_accuracy"] for row in rows),
        **tested,
        **_counts(walk.dataset),
        "epochs": len(rows),
        "sparsity": models.sparsity(walk.state.model.network),
        "proxy_images": proxies,
        "masked_share": masked / max(proxies, 1),
        **{total: sum(record[name] for record in records) for total, name in totals.items()},
        "train_seconds": sum(row["seconds"] for row in rows),
        **{name: rows[-1][name] for name in ("reported_accuracy",) if name in rows[-1]},
    }
