"""Runs -> one tidy DataFrame, and what can be said from it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pandas as pd

from pa_core import schedule
from pa_core.params import Experiment, runs_home
from pa_core.runs import FINISHED, Run, code_version

PARAMETERS = tuple(field.name for field in fields(Experiment))
MEASURED = (
    "val_accuracy",
    "best_val_accuracy",
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
    "xai xai_target cam_layer smooth schedule select fraction mask_region threshold_mode threshold fill weight overlay "
    "keep_proxies"
).split()
_PLACES = ["data_dir", "runs_dir", "device"]


def load(runs_dir: str = "runs") -> pd.DataFrame:
    """Every run under a folder, a row each, the earliest first.

    Columns: ``run`` (directory name), ``digest``, ``status``, ``stale`` (made by other code than this), ``started``,
    the parameters, and what summary.json holds (NaN where a run has not finished).
    """
    rows = []
    for manifest in sorted(runs_home(runs_dir).glob("*/manifest.json")):
        run = Run(manifest.parent)
        content, summary = run.manifest, run.summary
        row = {"run": run.path.name, "digest": content["digest"], "status": content["status"]}
        row |= {"stale": content["code_version"] != code_version(), "started": content["started"]}
        row |= {name: content["parameters"].get(name) for name in PARAMETERS}
        row |= {name: summary.get(name) for name in MEASURED}
        rows.append(row)
    columns = ["run", "digest", "status", "stale", "started", *PARAMETERS, *MEASURED]
    frame = pd.DataFrame(rows, columns=columns).astype({name: float for name in MEASURED})
    frame["proxy_steps"] = [schedule.steps(text) for text in frame["schedule"]]
    return frame.sort_values("started", kind="stable", ignore_index=True)


def pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """Each finished run with proxies beside the plain run of equal length that shares all else, the seed included.

    Returns:
        A row per pair: ``run``, ``plain_run``, the proxy parameters, ``seed``, and of ``test_accuracy`` and
        ``val_accuracy`` the run's value, the plain one's (``plain_...``) and the ``..._difference``.
    """
    done = frame[frame["status"] == FINISHED].assign(length=lambda f: [schedule.epochs(s) for s in f["schedule"]])
    shared = [name for name in PARAMETERS if name not in (*_PROXY_PARAMETERS, *_PLACES)] + ["length"]
    # merge does not match None with None in every version, so compare texts
    keyed = done.assign(key=done[shared].astype(str).agg("|".join, axis=1) if len(done) else [])
    plain = keyed[keyed["proxy_steps"] == 0].drop_duplicates("key", keep="last")
    plain = plain[["key", "run", "test_accuracy", "val_accuracy"]]
    plain = plain.rename(columns={c: f"plain_{c}" for c in plain.columns if c != "key"})
    merged = keyed[keyed["proxy_steps"] > 0].merge(plain, on="key")
    for name in ("test_accuracy", "val_accuracy"):
        merged[f"{name}_difference"] = merged[name] - merged[f"plain_{name}"]
    measured = [f"{p}{n}{s}" for n in ("test_accuracy", "val_accuracy") for p, s in (("", ""), ("plain_", ""), ("", "_difference"))]
    return merged[["run", "plain_run", "dataset", "model", *_PROXY_PARAMETERS, "seed", *measured]]


def latest_pair(frame: pd.DataFrame, runs_dir: str = "runs") -> tuple[Run, Run] | None:
    """The latest finished run with proxies that has a plain run beside it: (plain, with proxies)."""
    table = pairs(frame)
    if table.empty:
        return None
    row = table.iloc[-1]
    return open_run(row["plain_run"], runs_dir), open_run(row["run"], runs_dir)


def open_run(name: str, runs_dir: str = "runs") -> Run:
    """A run by the name of its directory."""
    return Run.load(runs_home(runs_dir) / Path(name))


def class_changes(plain: Run, other: Run) -> pd.DataFrame:
    """Per class: support, precision, recall and F1 of both runs on the test images, and the change, most gained first.

    Raises:
        ValueError: the two runs were tested on different images, so that there is nothing to compare.
    """
    a, b = plain.predictions, other.predictions
    if list(a["id"]) != list(b["id"]):
        raise ValueError(f"{plain.path.name} and {other.path.name} were tested on different images")
    table = plain.classes.merge(other.classes, on="class", suffixes=("_plain", "_proxy"))
    table = table.rename(columns={"support_plain": "support"}).drop(columns="support_proxy")
    for name in ("precision", "recall", "f1"):
        table[f"{name}_change"] = table[f"{name}_proxy"] - table[f"{name}_plain"]
    return table.sort_values("f1_change", ascending=False, kind="stable", ignore_index=True)
