"""Runs -> one tidy DataFrame, and what can be said from it."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from pa_core import schedule, statistics
from pa_core.params import Experiment, ParameterError, nearest, runs_home
from pa_core.runs import FINISHED, Run, RunError, code_version, read_json, read_metrics
from pa_core.statistics import Contrast

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
_COLUMNS = ("run", "digest", "status", "code_version", "started", *PARAMETERS, *_DIGESTS, "same_weights", *MEASURED)
_INDEX = ".index.json"
_SETTLED = 2.0
"""Seconds after which a file's time of change tells it from a later version; a younger one is read again next time."""


def load(runs_dir: str = "runs", *, epochs: bool = False) -> pd.DataFrame:
    """Every run under a folder, a row each, the earliest first.

    What was read is kept in the folder, in ``.index.json``, and only runs whose files have changed since are read again. The
    file may be deleted at any time, and any number of processes may load and train at once.

    Args:
        epochs: a row per epoch instead, with ``epoch``, ``stage``, and what metrics.jsonl holds, in place of the summary.

    Columns: ``run`` (directory name), ``digest``, ``status``, ``stale`` (made by other code than this), ``started``,
    the parameters, and what summary.json holds (NaN where a run has not finished).

    Warns:
        UserWarning: a run is left out because a file of it is damaged; it is named.
    """
    home = runs_home(runs_dir)
    frame = pd.DataFrame(_rows(home), columns=_COLUMNS).astype({name: float for name in MEASURED})
    frame.insert(frame.columns.get_loc("code_version"), "stale", frame.pop("code_version") != code_version())
    steps = {text: schedule.steps(text) for text in frame["schedule"].unique()}
    frame["proxy_steps"] = [steps[text] for text in frame["schedule"]]
    frame = frame.sort_values(["started", "run"], kind="stable", ignore_index=True)
    return _epochs(home, frame) if epochs else frame


def _epochs(home: Path, frame: pd.DataFrame) -> pd.DataFrame:
    rows, kept = [], []
    for position, name in enumerate(frame["run"]):
        try:
            read = read_metrics(home / name)
        except RunError as error:
            warnings.warn(f"{error}; its epochs are left out", stacklevel=3)
            continue
        rows += read
        kept += [position] * len(read)
    runs = frame.drop(columns=list(MEASURED)).iloc[kept].reset_index(drop=True)
    return pd.concat([runs, pd.DataFrame(rows).drop(columns=list(runs.columns), errors="ignore")], axis=1)


def _rows(home: Path) -> list[list[Any]]:
    """A row of ``_COLUMNS`` per run, from the index as far as files are as they were."""
    index, now = _read_index(home), time.time()
    entries, changed = {}, False
    for name in sorted(_directories(home)):
        stamp = _stamp(f"{home}/{name}")
        if stamp is None:
            continue
        entry = index.get(name)
        if entry is None or entry[0] != stamp:
            row = _row(home / name)
            if row is None:
                continue
            entry, changed = [stamp if _settled(stamp, now) else None, row], True
        entries[name] = entry
    if changed or entries.keys() != index.keys():
        _write_index(home, entries)
    return [row for _, row in entries.values()]


def _directories(home: Path) -> list[str]:
    if not home.is_dir():
        return []
    with os.scandir(home) as found:
        return [entry.name for entry in found if not entry.name.startswith(".") and entry.is_dir()]


def _stamp(path: str) -> list[int] | None:
    """What changes when manifest or summary are replaced; None for a folder without a manifest."""
    stamp = []
    for name in ("manifest.json", "summary.json"):
        try:
            found = os.stat(f"{path}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            if name == "manifest.json":
                return None
            stamp += [0, 0, 0]
            continue
        stamp += [found.st_mtime_ns, found.st_size, found.st_ino]
    return stamp


def _settled(stamp: list[int], now: float) -> bool:
    return max(stamp[0], stamp[3]) / 1e9 < now - _SETTLED


def _row(path: Path) -> list[Any] | None:
    """A run's row; None where somebody else's manifest lies, or, with a warning, a damaged one."""
    try:
        content, summary = read_json(path / "manifest.json"), read_json(path / "summary.json")
    except RunError as error:
        warnings.warn(f"{error}; the run is left out", stacklevel=5)
        return None
    if not {"digest", "parameters", "status", "split_digest"} <= content.keys():
        return None
    row = {"run": path.name} | {name: content[name] for name in ("digest", "status", "code_version", "started")}
    row |= {name: content["parameters"].get(name) for name in PARAMETERS}
    row |= {name: content[name] for name in RESOLVED} | {"same_weights": _weights(content)}
    row |= {name: summary.get(name) for name in MEASURED}
    return [row[name] for name in _COLUMNS]


def _read_index(home: Path) -> dict[str, list[Any]]:
    """Run -> [stamp, row]; empty where there is no index, or one that is damaged or has other columns."""
    try:
        content = json.loads((home / _INDEX).read_bytes())
        if content["columns"] == list(_COLUMNS) and all(
            len(row) == len(_COLUMNS) for _, row in content["runs"].values()
        ):
            return content["runs"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it saves time and nothing else
        pass
    return {}


def _write_index(home: Path, entries: dict[str, list[Any]]) -> None:
    """Replaced as a whole: of several writers the last one wins, and each wrote what was true of the stamps beside it."""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=_INDEX, suffix=".part", dir=home)
    except OSError:  # the runs lie where this user may only read
        return
    try:
        with open(descriptor, "w") as file:
            json.dump({"columns": _COLUMNS, "runs": entries}, file, separators=(",", ":"))
        os.replace(temporary, home / _INDEX)
    except OSError:  # a full disk
        os.unlink(temporary)


def _weights(manifest: dict[str, Any]) -> str:
    """What training started from, as far as runs can share it: a weights file counts by content."""
    return (
        str(manifest["parameters"]["pretrained"]) if not manifest.get("weights_digest") else manifest["weights_digest"]
    )


def _known(frame: pd.DataFrame, parameter: str, names: Sequence[str]) -> list[str]:
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in frame.columns:
            raise ParameterError(parameter, name, f"there is no such column{nearest(name, frame.columns)}")
    return names


def _finished(frame: pd.DataFrame) -> pd.DataFrame:
    """Finished runs, each identity once: a rerun is no second sample."""
    keys = [name for name in ("arm", "digest") if name in frame.columns]
    return frame[frame["status"] == FINISHED].drop_duplicates(keys, keep="last")


def best(frame: pd.DataFrame, *, by: Sequence[str] = ("dataset", "model"), value: str = "val_accuracy") -> pd.DataFrame:
    """The best finished run of each group, and how many it is the best of (``n``).

    Choose by a validation measure and report the test one of the run chosen: the best of many test accuracies flatters.

    Args:
        frame: of :func:`load` or a sweep.
        by: columns; a row of the answer per combination of their values.
        value: the measure; the lowest is the best of one whose name ends in ``loss`` or ``seconds``.

    Raises:
        ParameterError: there is no such column.
    """
    by, (value,) = _known(frame, "by", by), _known(frame, "value", [value])
    done = _finished(frame).dropna(subset=[value])
    low = value.endswith(("loss", "seconds"))
    groups = done.groupby(by, sort=True, dropna=False)[value]
    chosen = done.loc[(groups.idxmin() if low else groups.idxmax()).to_numpy()]
    return chosen.assign(n=groups.size().to_numpy()).reset_index(drop=True)


def pivot(
    frame: pd.DataFrame,
    *,
    rows: Sequence[str] = ("dataset", "model"),
    columns: Sequence[str] = ("schedule",),
    value: str = "test_accuracy",
) -> pd.DataFrame:
    """Mean, standard deviation and number of finished runs, rows by columns.

    Returns:
        Columns with ``mean``, ``sd`` (with n - 1; NaN for a single run) and ``n`` as their last level.

    Raises:
        ParameterError: there is no such column.
    """
    rows, columns = _known(frame, "rows", rows), _known(frame, "columns", columns)
    (value,) = _known(frame, "value", [value])
    done = _finished(frame).dropna(subset=[value])
    cells = done.groupby([*rows, *columns], dropna=False)[value].agg(mean="mean", sd="std", n="size")
    table = cells.unstack(list(range(len(rows), len(rows) + len(columns))))
    table = table.reorder_levels([*range(1, len(columns) + 1), 0], axis=1).sort_index(
        axis=1, level=list(range(len(columns))), sort_remaining=False
    )
    return table


def latex(table: pd.DataFrame, *, caption: str = "", label: str = "", percent: bool = True) -> str:
    """A table of :func:`pivot` as LaTeX with booktabs: ``71.4 $\\pm$ 0.3 (n = 5)`` in each cell, ``--`` where there is no run.

    A single run has no deviation and shows none.

    Args:
        percent: times 100, for accuracies; the caption should say so.
    """
    factor, cells = 100 if percent else 1, table.columns.droplevel(-1).unique()
    text = pd.DataFrame(
        {key: [_cell(*row, factor) for row in table[key][["mean", "sd", "n"]].to_numpy()] for key in cells},
        index=table.index,
    )
    text.columns = [" / ".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in cells]
    body = text.reset_index()
    lines = [[_escaped(str(name)) for name in body.columns]]
    lines += [
        [_escaped(str(v)) for v in row[: table.index.nlevels]] + list(row[table.index.nlevels :])
        for row in body.to_numpy().tolist()
    ]
    head, *rest = (" & ".join(line) + r" \\" for line in lines)
    form = "l" * table.index.nlevels + "r" * len(cells)
    extra = [rf"\caption{{{_escaped(caption)}}}"] * bool(caption) + [rf"\label{{{label}}}"] * bool(label)
    tabular = [rf"\begin{{tabular}}{{{form}}}", r"\toprule", head, r"\midrule", *rest, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([r"\begin{table}", r"\centering", *extra, *tabular, r"\end{table}"]) + "\n"


def _cell(mean: float, sd: float, n: float, factor: float) -> str:
    if mean != mean:
        return "--"
    spread = "" if sd != sd else rf" $\pm$ {factor * sd:.1f}"
    return f"{factor * mean:.1f}{spread} (n = {n:.0f})"


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """Each finished run with proxies beside the plain run of equal length that shares all else: data, split, seed, device.

    Returns:
        A row per pair: ``run``, ``plain_run``, the proxy parameters, ``seed``, and of ``test_accuracy`` and
        ``val_accuracy`` the run's value, the plain one's (``plain_...``) and the ``..._difference``.
    """
    done = frame[frame["status"] == FINISHED].assign(
        length=lambda f: [
            schedule.epochs(s, p_trains=p != "clean") for s, p in zip(f["schedule"], f["protocol"], strict=True)
        ]
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
    measured = [
        f"{p}{n}{s}"
        for n in ("test_accuracy", "val_accuracy")
        for p, s in (("", ""), ("plain_", ""), ("", "_difference"))
    ]
    merged["stale"] = merged["stale"] | merged["plain_stale"].astype(bool)
    return merged[["run", "plain_run", "stale", "dataset", "model", *_PROXY_PARAMETERS, "seed", *measured]]


COMPARED = ("test_accuracy", "reported_accuracy", "proxy_epochs")
"""What is compared of arms. proxy_epochs is the cost of a run's proxy steps in epochs of its own training, by the clock."""
SHARED = ("split_digest", "data_digest", "device_name")
"""What the runs of one seed have in common, or they are no pairs."""


def runs_table(frame: pd.DataFrame, *, study: str = "") -> pd.DataFrame:
    """A row per finished run and metric, with `statistics.RUN_COLUMNS`; see :func:`compare`."""
    (arm,) = _known(frame, "frame", ["arm"])
    done = _finished(frame).assign(study=study)
    for (dataset, _, seed), group in done.groupby(["dataset", "model", "seed"], sort=False):
        for name in SHARED:
            if group[name].nunique(dropna=False) > 1:
                raise RunError(
                    f"the runs of {dataset}, seed {seed}, differ in {name}, so that they are no pairs: {', '.join(group[arm])}"
                )
    done["proxy_epochs"] = done["proxy_seconds"] / (done["train_seconds"] / done["epochs"])
    keys = [name for name in statistics.RUN_COLUMNS if name not in ("metric", "value")]
    long = done.melt(id_vars=keys, value_vars=COMPARED, var_name="metric", value_name="value").dropna(subset="value")
    order = {name: position for position, name in enumerate(dict.fromkeys(frame[arm]))}
    long = long.assign(at=long[arm].map(order)).sort_values(["dataset", "model", "metric", "at", "seed"], kind="stable")
    return long[list(statistics.RUN_COLUMNS)].reset_index(drop=True)


def compare(
    frame: pd.DataFrame, *, reference: str, declared: Iterable[Contrast | str] = (), study: str = ""
) -> pd.DataFrame:
    """The arms of a sweep, paired by seed: differences with 95 % intervals, p-values, verdicts. See `statistics.compare`.

    >>> frame = sweep.run("my_arms.yaml")  # doctest: +SKIP
    >>> results.compare(frame, reference="plain", declared=["proxies - plain"])  # doctest: +SKIP

    Args:
        frame: of `sweep.run`, or of :func:`load` with a column ``arm``; only finished runs count, a rerun of a run once. An arm
            that a grid splits up needs names of its own: ``frame.assign(arm=frame["arm"] + frame["threshold"].astype(str))``.
        reference: the arm that all others are compared with.
        declared: contrasts, such as ``"proxies - plain"``, that were fixed before the first run.

    Raises:
        ParameterError: an arm does not exist, or a seed of an arm stands for two different runs.
        RunError: the runs of one seed do not share data, split and device.
    """
    contrasts = [Contrast.parse(c) if isinstance(c, str) else c for c in declared]
    return statistics.compare(runs_table(frame, study=study), reference=reference, declared=contrasts)


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


def command(
    notebook: str,
    runs_dir: str = "runs",
    run_name: str | None = None,
    images: str | None = None,
    studies: str = "committed",
) -> str:
    """The papermill command that draws the analysis again."""
    options = [f"-p runs_dir {shlex.quote(runs_dir)}"] if runs_dir != "runs" else []
    options += [f"-p run_name {shlex.quote(run_name)}"] if run_name else []
    options += [f"-p images {shlex.quote(str(images))}"] if images else []
    options += [f"-p studies {shlex.quote(str(studies))}"] if studies != "committed" else []
    return " ".join([f"papermill notebooks/{notebook}.ipynb {notebook}.out.ipynb", *options])


def class_changes(plain: Run | None, other: Run) -> pd.DataFrame:
    """Per class: support, precision, recall and F1 of both runs on the test images, and the change, most gained first.

    Without a plain run its columns are NaN.

    Raises:
        RunError: the two runs were tested on different images, so that there is nothing to compare.
    """
    before = (
        plain.classes if plain else other.classes.assign(precision=float("nan"), recall=float("nan"), f1=float("nan"))
    )
    if plain and plain.manifest["data_digest"] != other.manifest["data_digest"]:
        raise RunError(f"{plain.path.name} and {other.path.name} were tested on different data")
    table = before.merge(other.classes, on="class", suffixes=("_plain", "_proxy"))
    table = table.rename(columns={"support_plain": "support"}).drop(columns="support_proxy")
    for name in ("precision", "recall", "f1"):
        table[f"{name}_change"] = table[f"{name}_proxy"] - table[f"{name}_plain"]
    return table.sort_values("f1_change", ascending=False, kind="stable", ignore_index=True)
