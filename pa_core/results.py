"""Runs -> one tidy DataFrame, and what can be said from it."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from pa_core import schedule
from pa_core.params import Experiment, runs_home
from pa_core.runs import FINISHED, Run, RunError, code_version

PARAMETERS = tuple(field.name for field in fields(Experiment))
MEASURED = (
    "val_accuracy",
    "best_val_accuracy",
    "reported_accuracy",
    "test_accuracy",
    "test_loss",
    "n_train",
    "n_val",
    "n_test",
    "epochs",
    "proxy_images",
    "masked_share",
    "unchanged_proxies",
    "proxy_seconds",
    "train_seconds",
)
# What two runs may differ in and still be the same arm, or the plain and the scheduled run of one pair
_PROXY_PARAMETERS = (
    "xai xai_target cam_layer smooth schedule select fraction mask_region threshold_mode threshold max_share fill weight feather overlay "
    "keep_proxies"
).split()
_PLACES = ["data_dir", "runs_dir", "device", "bad_images", "pretrained"]
_DIGESTS = ("data_digest", "split_digest", "device_name")
# What was made of a parameter that is auto or the dataset's own stands in its column
RESOLVED = ("image_size", "batch_size", "precision", *_DIGESTS)


def load(runs_dir: str = "runs") -> pd.DataFrame:
    """Every run under a folder, a row each, the earliest first.

    Columns: ``run`` (directory name), ``digest``, ``status``, ``stale`` (made by other code than this), ``started``,
    the parameters, and what summary.json holds (NaN where a run has not finished).
    """
    rows = []
    for manifest in sorted(runs_home(runs_dir).glob("*/manifest.json")):
        run = Run(manifest.parent)
        content, summary = run.manifest, run.summary
        if not {"digest", "parameters", "status", "split_digest"} <= content.keys():
            continue  # somebody else's manifest
        row = {"run": run.path.name, "digest": content["digest"], "status": content["status"]}
        row |= {"stale": content["code_version"] != code_version(), "started": content["started"]}
        row |= {name: content["parameters"].get(name) for name in PARAMETERS}
        row |= {name: content[name] for name in RESOLVED} | {"same_weights": _weights(content)}
        row |= {name: summary.get(name) for name in MEASURED}
        rows.append(row)
    columns = ["run", "digest", "status", "stale", "started", *PARAMETERS, *_DIGESTS, "same_weights", *MEASURED]
    frame = pd.DataFrame(rows, columns=columns).astype({name: float for name in MEASURED})
    frame["proxy_steps"] = [schedule.steps(text) for text in frame["schedule"]]
    return frame.sort_values("started", kind="stable", ignore_index=True)


def _weights(manifest: dict[str, Any]) -> str:
    """What training started from, as far as runs can share it: a weights file counts by content."""
    return str(manifest["parameters"]["pretrained"]) if not manifest.get("weights_digest") else manifest["weights_digest"]


def pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """Each finished run with proxies beside the plain run of equal length that shares all else: data, split, seed, device.

    Returns:
        A row per pair: ``run``, ``plain_run``, the proxy parameters, ``seed``, and of ``test_accuracy`` and
        ``val_accuracy`` the run's value, the plain one's (``plain_...``) and the ``..._difference``.
    """
    done = frame[frame["status"] == FINISHED].assign(
        length=lambda f: [schedule.epochs(s, p_trains=p != "clean") for s, p in zip(f["schedule"], f["protocol"], strict=True)]
    )
    done = done.drop_duplicates("digest", keep="last")  # a rerun is no second sample
    shared = [name for name in PARAMETERS if name not in (*_PROXY_PARAMETERS, *_PLACES)]
    shared += [*_DIGESTS, "same_weights", "length"]
    # as one text, because a merge on the columns would not match None with None
    keyed = done.assign(key=[str(tuple(row)) for row in done[shared].itertuples(index=False)])
    plain = keyed[keyed["proxy_steps"] == 0].drop_duplicates("key", keep="last")
    plain = plain[["key", "run", "stale", "test_accuracy", "val_accuracy"]]
    plain = plain.rename(columns={c: f"plain_{c}" for c in plain.columns if c != "key"})
    merged = keyed[keyed["proxy_steps"] > 0].merge(plain, on="key")
    for name in ("test_accuracy", "val_accuracy"):
        merged[f"{name}_difference"] = merged[name] - merged[f"plain_{name}"]
    measured = [f"{p}{n}{s}" for n in ("test_accuracy", "val_accuracy") for p, s in (("", ""), ("plain_", ""), ("", "_difference"))]
    merged["stale"] = merged["stale"] | merged["plain_stale"].astype(bool)
    return merged[["run", "plain_run", "stale", "dataset", "model", *_PROXY_PARAMETERS, "seed", *measured]]


def pair_of(frame: pd.DataFrame, run_name: str | None = None, runs_dir: str = "runs") -> tuple[Run | None, Run]:
    """(the plain run or None, the run): the named run, or else the latest that has a plain run beside it, or else the latest.

    Raises:
        RunError: no run has finished, or none has this name.
    """
    done = frame[frame["status"] == FINISHED]
    if done.empty:
        raise RunError(f"no run under {runs_home(runs_dir)} has finished; notebooks 02 and 03 make some")
    if run_name is not None and run_name not in set(done["run"]):
        raise RunError(f"run_name = {run_name!r} is no finished run; allowed is one of {', '.join(done['run'])}")
    paired = pairs(frame).set_index("run")["plain_run"]
    name = run_name or (paired.index[-1] if len(paired) else done["run"].iloc[-1])
    plain = open_run(paired[name], runs_dir) if name in paired.index else None
    return plain, open_run(name, runs_dir)


def runs_of(frame: pd.DataFrame, runs_dir: str = "runs") -> list[Run]:
    """The runs that a table of :func:`load` or :func:`pairs` names."""
    names = list(frame["run"]) + (list(frame["plain_run"]) if "plain_run" in frame else [])
    return [open_run(name, runs_dir) for name in dict.fromkeys(names)]


def open_run(name: str, runs_dir: str = "runs") -> Run:
    """A run by the name of its directory."""
    return Run.load(runs_home(runs_dir) / Path(name))


def command(notebook: str, runs_dir: str = "runs", run_name: str | None = None) -> str:
    """The papermill command that draws the analysis again."""
    options = [f"-p runs_dir {shlex.quote(runs_dir)}"] if runs_dir != "runs" else []
    options += [f"-p run_name {shlex.quote(run_name)}"] if run_name else []
    return " ".join([f"papermill notebooks/{notebook}.ipynb {notebook}.out.ipynb", *options])


def class_changes(plain: Run | None, other: Run) -> pd.DataFrame:
    """Per class: support, precision, recall and F1 of both runs on the test images, and the change, most gained first.

    Without a plain run its columns are NaN.

    Raises:
        RunError: the two runs were tested on different images, so that there is nothing to compare.
    """
    before = plain.classes if plain else other.classes.assign(precision=float("nan"), recall=float("nan"), f1=float("nan"))
    if plain and plain.manifest["data_digest"] != other.manifest["data_digest"]:
        raise RunError(f"{plain.path.name} and {other.path.name} were tested on different data")
    table = before.merge(other.classes, on="class", suffixes=("_plain", "_proxy"))
    table = table.rename(columns={"support_plain": "support"}).drop(columns="support_proxy")
    for name in ("precision", "recall", "f1"):
        table[f"{name}_change"] = table[f"{name}_proxy"] - table[f"{name}_plain"]
    return table.sort_values("f1_change", ascending=False, kind="stable", ignore_index=True)
