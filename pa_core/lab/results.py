"""Runs -> one tidy DataFrame, and what can be said from it."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import pandas as pd

from pa_core import schedule
from pa_core.errors import ParameterError, RunError, did_you_mean
from pa_core.files import read_json, runs_home
from pa_core.lab import statistics
from pa_core.lab.statistics import Contrast
from pa_core.params import PARAMETERS, PROXY_PARAMETERS, SCHEMA, Experiment
from pa_core.runs import FINISHED, Run, code_version

Names = Sequence[str]
GROUPS = ("dataset", "model")
_ACCURACIES = ("val_accuracy", "test_accuracy", "balanced_accuracy", "reported_accuracy")
MEASURED = (*_ACCURACIES, "epochs", "train_seconds", "proxy_seconds")  # always columns, as is all else that is measured
_IDENTITY = ("digest", "status", "started", "data_digest", "split_digest", "weights_digest", "device_name")
_RESOLVED = {"batch_size": "used_batch_size", "precision": "used_precision"}  # may be auto -> column: what that was
COMPARED = ("test_accuracy", "balanced_accuracy", "reported_accuracy", "proxy_epochs")  # of arms


def load(runs_dir: str = "runs", *, epochs: bool = False) -> pd.DataFrame:
    """Every run under a folder, a row each, the earliest first; with ``epochs`` a row per epoch, of metrics.jsonl.

    Columns: ``run`` (directory name), ``stale`` (made by other code than this: the tables here leave it out),
    ``digest``, ``status``, ``started``, digests, the parameters (``image_size`` as resolved), ``proxy_steps``, and
    every number of summary.json (NaN where a run has not finished). Runs of another schema, and those with a damaged
    file, are left out, and a UserWarning names them.
    """
    home, steps, rows, tables, damaged, others = runs_home(runs_dir), cache(schedule.steps), [], {}, [], []
    for name in sorted(entry.name for entry in os.scandir(home) if entry.is_dir()) if home.is_dir() else []:
        try:
            manifest, summary = read_json(home / name / "manifest.json"), read_json(home / name / "summary.json")
            if manifest.get("schema", 1) != SCHEMA:
                others += [name] if manifest else []
                continue
            row = {"run": name, "stale": manifest["code_version"] != code_version()}
            row |= {k: manifest[k] for k in _IDENTITY} | {k: manifest["parameters"][k] for k in PARAMETERS}
            row |= {"image_size": manifest["image_size"], "proxy_steps": steps(row["schedule"])}
            tables |= {name: Run(home / name).metrics} if epochs else {}
            rows.append(summary | row | {used: manifest[k] for k, used in _RESOLVED.items()})
        except (RunError, KeyError, TypeError) as error:
            damaged.append(str(error) if isinstance(error, RunError) else f"{name} (manifest.json lacks {error})")
    for names, why in ((damaged, "are damaged"), (others, f"have another schema than {SCHEMA}")):
        if names:
            warnings.warn(f"{len(names)} runs {why} and are left out, the first {', '.join(names[:5])}", stacklevel=2)
    known = ["run", "stale", *_IDENTITY, *PARAMETERS, *_RESOLVED.values(), "proxy_steps"]
    measured = [name for name in dict.fromkeys(chain(MEASURED, *rows)) if name not in known]
    frame = pd.DataFrame({name: [row.get(name) for row in rows] for name in (*known, *measured)})
    frame = frame.astype(dict.fromkeys(measured, float) | {"stale": bool, "proxy_steps": int})
    frame = frame.sort_values(["started", "run"], kind="stable", ignore_index=True)
    if not (epochs and rows):
        return frame
    table = pd.concat(tables, names=["run"]).reset_index("run")
    new = table.columns.difference(known, sort=False)  # lr is a parameter, too
    return frame[known].merge(table[["run", *new]], on="run")


def usable(frame: pd.DataFrame) -> pd.DataFrame:
    """The finished runs of this code, each once per arm; how many of other code are left out is warned of."""
    done = frame[frame["status"] == FINISHED]
    stale = done.get("stale", pd.Series(False, done.index)).astype(bool)
    if stale.any():
        warnings.warn(f"{stale.sum()} finished runs were made by other code than this and are left out", stacklevel=3)
    return done[~stale].drop_duplicates([name for name in ("arm", "digest") if name in done.columns], keep="last")


def _known(frame: pd.DataFrame, parameter: str, *names: str) -> list[str]:
    for name in names:
        if name not in frame.columns:
            raise ParameterError(parameter, name, f"must be a column{did_you_mean(name, frame.columns)}")
    return list(names)


def best(frame: pd.DataFrame, *, by: Names = GROUPS, value: str = "val_accuracy") -> pd.DataFrame:
    """The best finished run of each group, and how many it is the best of (``n``); of a loss or of seconds the lowest.
    Choose by a validation measure and report the test one of the run chosen: the best of many test accuracies flatters.
    """
    by, done = _known(frame, "by", *by), usable(frame).dropna(subset=_known(frame, "value", value))
    groups = done.groupby(by, dropna=False)[value]
    chosen = done.loc[groups.idxmin() if value.endswith(("loss", "seconds")) else groups.idxmax()]
    return chosen.assign(n=groups.size().to_numpy()).reset_index(drop=True)


def pivot(
    frame: pd.DataFrame, *, rows: Names = GROUPS, columns: Names = ("schedule",), value: str = "test_accuracy"
) -> pd.DataFrame:
    """Of finished runs, rows by columns: the last level is ``mean``, ``sd`` (with n - 1; NaN for one run) and ``n``."""
    keys = [*_known(frame, "rows", *rows), *_known(frame, "columns", *columns)]
    done = usable(frame).dropna(subset=_known(frame, "value", value))
    table = done.groupby(keys, dropna=False)[value].agg(mean="mean", sd="std", n="size").unstack(keys[len(rows) :])
    table = table.reorder_levels([*range(1, len(columns) + 1), 0], axis=1)
    return table.sort_index(axis=1, level=list(range(len(columns))), sort_remaining=False)


def latex(table: pd.DataFrame, *, caption: str = "", label: str = "", percent: bool = True) -> str:
    """A table of :func:`pivot` as LaTeX with booktabs: ``71.4 $\\pm$ 0.3 (n = 5)`` in each cell, ``--`` without a run;
    with ``percent`` times 100, which the caption, LaTeX text, should say.
    """
    cells, factor = pd.DataFrame(index=table.index), 100 if percent else 1
    for key in table.columns.droplevel(-1).unique():
        texts = []
        for mean, sd, n in table[key][["mean", "sd", "n"]].to_numpy():
            spread = "" if pd.isna(sd) else rf" $\pm$ {factor * sd:.1f}"
            texts.append("--" if pd.isna(mean) else f"{factor * mean:.1f}{spread} (n = {n:.0f})")
        cells[" / ".join(map(str, key)) if isinstance(key, tuple) else str(key)] = texts
    style = cells.reset_index().style.hide(axis="index").format_index(escape="latex", axis=1)
    style = style.format(str, escape="latex", subset=list(table.index.names))
    options: dict[str, Any] = {"column_format": "l" * table.index.nlevels + "r" * cells.shape[1], "hrules": True}
    return style.to_latex(caption=caption or None, label=label or None, position_float="centering", **options)


def pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """Each finished run with proxies beside the plain run of equal length that shares all else, the device included.

    The plain run, `Experiment.plain`, is found by its digest. A row has ``run``, ``plain_run``, the proxy parameters,
    ``seed``, and of each accuracy the run's value, the plain one's (``plain_...``) and the ``..._difference``.
    """
    done, accuracies = usable(frame), _ACCURACIES[:3]
    shared = ["digest", "split_digest", "device_name", *_RESOLVED.values()]
    plain, proxied = done[done["proxy_steps"] == 0], done[done["proxy_steps"] > 0]
    plain = plain.set_index(shared)[["run", *accuracies]].add_prefix("plain_").reset_index()
    digests = []
    for row in proxied.to_dict("records"):
        e = Experiment.from_mapping({name: None if pd.isna(row[name]) else row[name] for name in PARAMETERS})
        content = {"data": row["data_digest"], "image_size": int(row["image_size"]), "weights": row["weights_digest"]}
        digests.append(e.plain().digest(**content))
    merged = proxied.assign(digest=digests).merge(plain, on=shared)
    columns = ["run", "plain_run", "dataset", "model", "schedule", *(p for p in PARAMETERS if p in PROXY_PARAMETERS)]
    columns.append("seed")
    for name in accuracies:
        merged[f"{name}_difference"] = merged[name] - merged[f"plain_{name}"]
        columns += [name, f"plain_{name}", f"{name}_difference"]
    return merged[columns]


def pair_of(frame: pd.DataFrame, run_name: str | None = None, runs_dir: str = "runs") -> tuple[Run | None, Run]:
    """(the plain run or None, the run): the named run, or else the latest with a plain run, or else the latest."""
    finished = list(frame.loc[frame["status"] == FINISHED, "run"])
    if run_name is not None and run_name not in finished:
        raise ParameterError("run_name", run_name, f"must be a finished run{did_you_mean(run_name, finished)}")
    plain_runs = pairs(frame).set_index("run")["plain_run"]
    name = run_name or next(iter([*plain_runs.index[-1:], *usable(frame)["run"].iloc[-1:]]), None)
    if name is None:
        raise RunError(f"no run under {runs_home(runs_dir)} was finished by this code; notebooks 02 and 03 make some")
    plain = open_run(plain_runs[name], runs_dir) if name in plain_runs.index else None
    return plain, open_run(name, runs_dir)


def runs_of(frame: pd.DataFrame, runs_dir: str = "runs") -> list[Run]:
    """The runs that a table of :func:`load` or :func:`pairs` names."""
    return [open_run(name, runs_dir) for name in dict.fromkeys([*frame["run"], *frame.get("plain_run", [])])]


def open_run(name: str, runs_dir: str = "runs") -> Run:
    """A run by the name of its directory."""
    return Run.load(runs_home(runs_dir) / name)


def class_changes(plain: Run | None, other: Run) -> pd.DataFrame:
    """Per class: support, precision, recall and F1 of both runs on the test images, and the change, most gained first.
    Without a plain run its columns are NaN; runs that were tested on different images are refused.
    """
    measures = ["precision", "recall", "f1"]
    if plain and plain.manifest["data_digest"] != other.manifest["data_digest"]:
        raise RunError(f"{plain.path.name} and {other.path.name} were tested on different data")
    before = plain.classes if plain else other.classes.assign(**dict.fromkeys(measures, float("nan")))
    table = before.merge(other.classes.drop(columns="support"), on="class", suffixes=("_plain", "_proxy"))
    for name in measures:
        table[f"{name}_change"] = table[f"{name}_proxy"] - table[f"{name}_plain"]
    return table.sort_values("f1_change", ascending=False, kind="stable", ignore_index=True)


def runs_table(frame: pd.DataFrame, *, study: str = "", metrics: Sequence[str] = COMPARED) -> pd.DataFrame:
    """A row per finished run and metric, with `statistics.RUN_COLUMNS`; see :func:`compare`."""
    _known(frame, "frame", "arm")
    done = usable(frame).assign(study=study)
    for key, group in done.groupby(["dataset", "model", "seed"], sort=False):
        for name in ("split_digest", "data_digest", "device_name"):
            if group[name].nunique(dropna=False) > 1:
                raise RunError(f"the runs of {key} are no pairs: {', '.join(group['arm'])} differ in {name}")
    done["proxy_epochs"] = done["proxy_seconds"] / (done["train_seconds"] / done["epochs"])
    keys, there = [*statistics.GROUP, "arm", "seed", "digest"], [name for name in metrics if name in done.columns]
    long = done.melt(id_vars=keys, value_vars=there, var_name="metric", value_name="value").dropna(subset="value")
    long = long.assign(arm=pd.Categorical(long["arm"], frame["arm"].unique()))
    long = long.sort_values(["dataset", "model", "metric", "arm", "seed"], kind="stable", ignore_index=True)
    return long.astype({"arm": str})[list(statistics.RUN_COLUMNS)]


def compare(
    frame: pd.DataFrame, *, reference: str, declared: Iterable[str] = (), metrics: Sequence[str] = COMPARED
) -> pd.DataFrame:
    """The arms of a sweep, paired by seed, as `statistics.compare` does: differences, intervals, p-values, verdicts.

    ``frame`` is of `sweep.run`, or of :func:`load` with a column ``arm``: finished runs of this code count. Arms that a
    grid splits up need names of their own: ``frame.assign(arm=frame["arm"] + frame["fill"])``. ``declared`` are
    contrasts, such as ``"proxies - plain"``, that were fixed before the first run; they are tested in test_accuracy
    alone. ``metrics`` are numbers of summary.json, and proxy_epochs: what the proxy steps cost, in epochs of the run's
    own training.
    """
    runs = runs_table(frame, metrics=metrics)
    return statistics.compare(runs, reference=reference, declared=map(Contrast.parse, declared))


def command(notebook: str, **parameters: Any) -> str:
    """The papermill command that draws the analysis again; parameters that are None are left out."""
    options = [f"-p {name} {shlex.quote(str(value))}" for name, value in parameters.items() if value is not None]
    return " ".join([f"papermill notebooks/{notebook}.ipynb {notebook}.out.ipynb", *options])
