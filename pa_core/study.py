"""Studies: arms under equal terms, from their files to figures/: ``python -m pa_core.study a`` or ``make study STUDY=a``.

A study is a file of params/study/:

    question: Is it the attention?
    reference: plain                        # the arm that all others are compared with
    seeds: 10                               # 0 to 9, for every arm
    contrasts: [salient - shuffled]         # declared before the first run; only they are tested
    contrast_seeds: 20                      # for the arms in them
    described: [salient - rest]             # further contrasts to show, without a test
    arms:
      plain: a/plain.yaml                   # a params file that stands for itself,
      salient: {xai: gradcam}               # or parameters beside those of base
    base: {schedule: "6,p,6"}
    datasets: [CIFAR-10 (JPEG)]             # what tables call them; with several, an arm lists a file for each
    may_differ: [lr]                        # what arms may differ in beyond proxies, schedule and augmentation
    other_length: [plain longer]            # arms that by intent do not train for as many epochs as the reference
    decomposition: [{arm: a, unmasked: b, honest: c}]
    around: salient                         # the other arms but the reference differ from this one in one parameter each

Its runs are a sweep's, made without notebooks: they are the same runs that 03_proxy_loop makes of an arm's file. What comes of them is three files and a figure: figures/study_a_runs.csv has a row per run and metric, and
figures/study_a.csv follows from it alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pa_core import figures, results, statistics, sweep
from pa_core.params import Experiment, ParameterError, home, nearest
from pa_core.runs import RunError
from pa_core.statistics import Contrast

KEYS = [
    "question",
    "reference",
    "seeds",
    "contrasts",
    "contrast_seeds",
    "described",
    "arms",
    "base",
    "datasets",
    "may_differ",
    "other_length",
    "decomposition",
    "around",
]
FREE = frozenset(
    [
        "xai",
        "xai_target",
        "cam_layer",
        "smooth",
        "schedule",
        "select",
        "fraction",
        "mask_region",
        "threshold_mode",
        "threshold",
        "max_share",
        "fill",
        "weight",
        "feather",
        "overlay",
        "keep_proxies",
        "augment",
        "seed",
    ]
)
"""What arms may differ in; all else is equal, or the study's ``may_differ`` names it."""
BETWEEN = ": "


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study file, checked.

    Attributes:
        name: of the file, without its ending.
        sweep: its runs. An arm there is called ``DATASET: ARM``, because its files differ by dataset.
        described: contrasts to show beside the declared ones, ``contrasts``.
        decomposition: see `statistics.decompose`; empty where there is none.
        around: the arm from which the others differ in one parameter each; empty where there is none.
    """

    name: str
    question: str
    reference: str
    contrasts: tuple[Contrast, ...]
    described: tuple[Contrast, ...]
    decomposition: tuple[Mapping[str, str], ...]
    around: str
    sweep: sweep.Sweep


def home_of_studies() -> Path:
    return home() / "params" / "study"


def names() -> list[str]:
    return sorted(path.stem for path in home_of_studies().glob("*.yaml"))


def read(name: str) -> Study:
    """A study by its name in params/study/, or by its path.

    Raises:
        ParameterError: there is no such study, or something in it is not allowed: a key, a parameter, an arm that differs from
            the reference in what it may not.
    """
    path = Path(name) if name.endswith(".yaml") else home_of_studies() / f"{name}.yaml"
    if not path.is_file():
        raise ParameterError(
            "study",
            name,
            f"there is no such file{nearest(name, names())}; allowed is one of {', '.join(names())}, or a path",
        )
    content = sweep.read_yaml(path)
    for key in content:
        if key not in KEYS:
            raise ParameterError(
                f"{path.stem}: {key}",
                content[key],
                f"there is no such key{nearest(key, KEYS)}; allowed are {', '.join(KEYS)}",
            )
    for key in ("reference", "seeds", "arms"):
        if key not in content:
            raise ParameterError(f"{path.stem}: {key}", None, "it is missing")
    study = Study(
        name=path.stem,
        question=str(content.get("question", "")),
        reference=str(content["reference"]),
        contrasts=tuple(Contrast.parse(text) for text in content.get("contrasts", [])),
        described=tuple(Contrast.parse(text) for text in content.get("described", [])),
        decomposition=tuple(content.get("decomposition", [])),
        around=str(content.get("around", "")),
        sweep=_sweep(path, content),
    )
    _check(study, content)
    return study


def _sweep(path: Path, content: Mapping[str, Any]) -> sweep.Sweep:
    """All runs: those of the arms in contrasts have more seeds than the others."""
    name, arms = path.stem, _arms(path, content)
    most = content.get("contrast_seeds", content["seeds"])
    if content.get("contrasts") and len(_seeds(name, most)) > statistics.MOST_FOR_P:
        raise ParameterError(
            f"{name}: seeds",
            most,
            f"an exact test of so many pairs takes too long; allowed are at most {statistics.MOST_FOR_P}",
        )
    contrasted = {
        name
        for text in content.get("contrasts", [])
        for name in (Contrast.parse(text).arm, Contrast.parse(text).against)
    }
    parts = []
    for seeds, among in ((most, True), (content["seeds"], False)):
        chosen = {label: p for label, p in arms.items() if (split(label)[1] in contrasted) == among}
        if chosen:
            file = {"arms": chosen, "seeds": _seeds(name, seeds), "notebook": "none"}
            parts.append(sweep.expand(file, name=f"study_{name}", folder=path.absolute().parent))
    jobs: dict[str, sweep.Job] = {}
    for job in (job for part in parts for job in part.jobs):
        known = jobs.get(job.key)
        jobs[job.key] = replace(known, arms=(*known.arms, *job.arms)) if known else job
    varied = tuple(dict.fromkeys(v for part in parts for v in part.varied if v == "seed"))
    return replace(parts[0], jobs=tuple(jobs.values()), combinations=sum(p.combinations for p in parts), varied=varied)


def _seeds(name: str, count: Any) -> list[int]:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ParameterError(f"{name}: seeds", count, "allowed is how many, a whole number of at least 1")
    return list(range(count))


def _arms(path: Path, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``DATASET: ARM`` -> parameters."""
    base = content.get("base") or {}
    base = sweep.read_yaml(path.parent / base) if isinstance(base, str) else base
    named, arms = content.get("datasets"), {}
    for arm, given in content["arms"].items():
        files = given if isinstance(given, list) else [given]
        if len(files) != len(named or [None]):
            allowed = f"allowed is one set of parameters for each of {named or 'one dataset'}"
            raise ParameterError(f"{path.stem}: arms.{arm}", given, allowed)
        for number, each in enumerate(files):
            values = sweep.read_yaml(path.parent / each) if isinstance(each, str) else base | (each or {})
            dataset = named[number] if named else values.get("dataset", Experiment().dataset)
            arms[f"{dataset}{BETWEEN}{arm}"] = values
    return arms


def split(label: str) -> tuple[str, str]:
    """``"DATASET: ARM"`` -> (dataset, arm)."""
    dataset, _, arm = label.partition(BETWEEN)
    return dataset, arm


def _check(study: Study, content: Mapping[str, Any]) -> None:
    """Equal terms: within a dataset, arms differ only in what they may."""
    by_label = {label: job.experiment for job in study.sweep.jobs for label in job.arms}
    arms = {arm for _, arm in map(split, by_label)}
    mentioned = [
        study.reference,
        *filter(None, [study.around]),
        *content.get("other_length", []),
        *(name for part in study.decomposition for name in part.values()),
    ]
    for name in (*mentioned, *(name for c in (*study.contrasts, *study.described) for name in (c.arm, c.against))):
        if name not in arms:
            raise ParameterError(
                f"{study.name}: arm",
                name,
                f"there is no such arm{nearest(name, arms)}; allowed is one of {', '.join(sorted(arms))}",
            )
    free = FREE | set(content.get("may_differ", []))
    for label, experiment in by_label.items():
        dataset, arm = split(label)
        reference = by_label[f"{dataset}{BETWEEN}{study.reference}"]
        for name, value in experiment.to_dict().items():
            if name not in free and value != getattr(reference, name):
                allowed = (
                    f"the reference has {getattr(reference, name)!r}; allowed is the same, or may_differ: [{name}]"
                )
                raise ParameterError(f"{study.name}: {label}.{name}", value, allowed)
        if experiment.length != reference.length and arm not in content.get("other_length", []):
            allowed = f"it has {experiment.length} epochs and the reference {reference.length}; allowed are as many, or other_length: [{arm}]"
            raise ParameterError(f"{study.name}: {label}.schedule", experiment.schedule, allowed)


# Runs -> tables


def collect(study: Study, frame: pd.DataFrame) -> pd.DataFrame:
    """A row per run and metric, with `statistics.RUN_COLUMNS`, from the table of the study's sweep.

    Raises:
        RunError: a run has not finished, or the runs of one seed do not share data, split and device.
    """
    undone = frame[frame["status"] != sweep.FINISHED]
    if len(undone):
        raise RunError(
            f"study {study.name} is not complete: {len(undone)} of {len(frame)} runs have not finished, {undone.iloc[0]['arm']} first"
        )
    return _runs_table(study, frame)


def so_far(study: Study) -> pd.DataFrame:
    """What :func:`collect` gives, of the runs that have finished until now; none is made."""
    states = sweep.finished(study.sweep)
    return (
        _runs_table(study, sweep.table(study.sweep, states))
        if states
        else pd.DataFrame(columns=list(statistics.RUN_COLUMNS))
    )


def _runs_table(study: Study, frame: pd.DataFrame) -> pd.DataFrame:
    labels = [split(label) for label in frame["arm"]]
    frame = frame.assign(dataset=[dataset for dataset, _ in labels], arm=[arm for _, arm in labels])
    return results.runs_table(frame, study=study.name)


DECOMPOSITION = "_decomposition"


def tables(study: Study, runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What follows from the runs: ``study_a``, and ``study_a_decomposition`` where the study has one.

    Contrasts and parts whose arms have no run are left out, and so is everything where the reference has none. While runs are
    missing nothing is tested: a family that is not complete, or that is looked at as it grows, has no p-values.
    """
    arms = set(runs["arm"])
    runs = runs if study.reference in arms else runs[:0]
    here = {c: {c.arm, c.against} <= arms for c in (*study.contrasts, *study.described)}
    among = {"declared": [c for c in study.contrasts if here[c]], "described": [c for c in study.described if here[c]]}
    none = pd.DataFrame(columns=list(statistics.COLUMNS))
    table = statistics.compare(runs, reference=study.reference, **among) if len(runs) else none
    if not is_complete(study, runs):
        table.loc[:, ["p_value", "p_holm", "verdict"]] = np.nan
    made = {f"study_{study.name}": table}
    if study.decomposition:
        parts = [part for part in study.decomposition if set(part.values()) <= arms]
        made[f"study_{study.name}{DECOMPOSITION}"] = statistics.decompose(runs, parts)
    return made


def is_complete(study: Study, runs: pd.DataFrame) -> bool:
    """Whether all runs are there that the study's file asks for."""
    asked = {(*split(label), job.experiment.seed) for job in study.sweep.jobs for label in job.arms}
    return asked <= set(runs[["dataset", "arm", "seed"]].itertuples(index=False, name=None))


def draw(study: Study, name: str, table: pd.DataFrame) -> Figure:
    """The figure of one of its tables."""
    if name.endswith(DECOMPOSITION):
        return figures.decomposition(table)[0]
    return (
        figures.one_at_a_time(table, around=study.around, values=_values(study))[0]
        if study.around
        else figures.forest(table)[0]
    )


def _values(study: Study) -> dict[str, dict[str, str]]:
    """Parameter -> arm -> its value there: the arms that differ from ``around`` in that parameter alone, and ``around`` itself.

    Numbers ascend; others stand as in the file.
    """
    arms = {
        split(label)[1]: job.experiment.effective()
        for job in study.sweep.jobs
        for label in job.arms
        if job.experiment.seed == 0
    }
    centre, found = Experiment.from_mapping(arms[study.around]), {}
    for arm, effective in arms.items():
        here = Experiment.from_mapping(effective)
        different = [name for name, value in here.to_dict().items() if value != getattr(centre, name)]
        if arm != study.reference and len(different) == 1:
            found.setdefault(different[0], {study.around: getattr(centre, different[0])})[arm] = getattr(
                here, different[0]
            )
    numeric = {name: all(isinstance(v, (int, float)) for v in values.values()) for name, values in found.items()}
    return {
        name: {
            arm: f"{v:g}" if numeric[name] else str(v)
            for arm, v in (sorted(values.items(), key=lambda i: i[1]) if numeric[name] else values.items())
        }
        for name, values in found.items()
    }


def publish(study: Study, runs: pd.DataFrame, *, folder: str, used: Sequence[Any] = ()) -> list[Path]:
    """Write study_X_runs.csv, and each table with its figure and provenance.

    Returns:
        The figures.
    """
    album = figures.Album(figures_dir=folder, command=f"make study STUDY={study.name}")
    runs.to_csv(Path(folder) / f"study_{study.name}_runs.csv", index=False)
    return [
        album.save(draw(study, name, table), name, table=table, used=used)
        for name, table in tables(study, runs).items()
    ]


# For notebooks

COMMITTED, OWN = "committed", "runs"
SOURCES = (COMMITTED, OWN)


def show(name: str, *, source: str = COMMITTED, runs_dir: str = "runs") -> tuple[Figure, pd.DataFrame]:
    """A figure of a study and the table behind it, without making a run; an empty figure, which says so, while there are none.

    Args:
        name: ``study_a``, or ``study_c_decomposition``.
        source: ``committed``, the table in figures/; or ``runs``, your own ones as far as they have finished.
        runs_dir: where those lie.

    Raises:
        ParameterError: there is no such source or study.
    """
    if source not in SOURCES:
        raise ParameterError(
            "studies",
            source,
            f"there is no such source{nearest(source, SOURCES)}; allowed is one of {', '.join(SOURCES)}",
        )
    study = read(name.removeprefix("study_").removesuffix(DECOMPOSITION))
    if source == COMMITTED:
        runs = committed_runs(study.name)
    else:
        jobs = [replace(job, experiment=replace(job.experiment, runs_dir=runs_dir)) for job in study.sweep.jobs]
        runs = so_far(replace(study, sweep=replace(study.sweep, jobs=tuple(jobs))))
    table = tables(study, runs)[name]
    return draw(study, name, table), table


def committed_runs(name: str) -> pd.DataFrame:
    """figures/study_NAME_runs.csv of the repository, from which its tables and figures follow; empty while it is not there."""
    path = home() / "figures" / f"study_{name}_runs.csv"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=list(statistics.RUN_COLUMNS))


def declared(*, source: str = COMMITTED, runs_dir: str = "runs") -> pd.DataFrame:
    """The declared contrasts of all studies, and what may be said of them. Differences and intervals are in points.

    Returns:
        Columns study, dataset, contrast, n, difference, low, high, p_holm, verdict.
    """
    found = pd.concat([show(f"study_{name}", source=source, runs_dir=runs_dir)[1] for name in names()])
    found = found[found["declared"].astype(bool)]
    found = found.assign(contrast=found["arm"] + " - " + found["against"])
    points = {name: 100 * found[name].astype(float) for name in ("difference", "low", "high")}
    return found.assign(**points)[["study", "dataset", "contrast", "n", *points, "p_holm", "verdict"]].reset_index(
        drop=True
    )


# Running


def expected(study: Study, *, workers: int, threads: int) -> float | None:
    """Seconds that the runs to do will take, about: from finished runs of the same datasets and models, else from a trial of each."""
    there = sweep.finished(study.sweep)
    todo = [job for job in study.sweep.jobs if job.key not in there]
    known = sweep.estimate(study.sweep, todo, workers=workers)
    if known is not None or not todo:
        return known
    rates: dict[tuple, float] = {}
    total = 0.0
    for job in todo:
        e = job.experiment
        what = (e.dataset, e.data_dir, e.model, e.image_size, e.batch_size, e.train_fraction, e.protocol)
        if what not in rates:
            rates[what] = _seconds_per_epoch(e, threads=threads)
        total += rates[what] * e.length + sweep.start_seconds(study.sweep)
    return total / max(1, min(workers, len(todo)))


TRIAL_STEPS = 10


def _seconds_per_epoch(experiment: Experiment, *, threads: int) -> float:
    """Of training and validation, from some steps of training after some to warm up. Nothing is stored."""
    import torch

    from pa_core import protocol, train
    from pa_core.experiment import prepare

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ready = prepare(experiment)
        part, size = ready.dataset.train, experiment.batch_size if experiment.batch_size != "auto" else 64
        state = train.create_state(ready.model, experiment, total_steps=10**6, device=ready.device, dtype=ready.dtype)
        options = {"batch_size": size, "kinds": experiment.augment, "label_smoothing": 0.0, "seed": 0}
        draws = min(len(part), TRIAL_STEPS * size)
        rate = [train.train_one_epoch(state, part, draws=draws, **options)["images_per_second"] for _ in range(2)][-1]
    finally:
        torch.set_num_threads(before)
    # a forward pass is about a third of a training step
    return (protocol.draws(len(part), experiment) + len(ready.dataset.val) / 3) / rate


def run(
    name: str,
    *,
    folder: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    log: sweep.Log = sweep.say,
) -> list[Path]:
    """Make a study's runs as far as they are missing, and then its tables and figures.

    Args:
        folder: where those go; figures/ of the repository by default.
        workers, threads: as for `sweep.run`.

    Returns:
        The figures.

    Raises:
        ParameterError: the study is refused.
        RunError: runs failed, or are no pairs; nothing in the folder is changed.
    """
    study = read(name)
    log(f"study {study.name}: {study.question}" if study.question else f"study {study.name}")
    cpu = all(job.experiment.device == "cpu" for job in study.sweep.jobs)
    here = sweep.machine(workers=workers, threads=threads, cpu=cpu)
    seconds = expected(study, workers=here.workers, threads=here.threads)
    log(f"{len(study.sweep.jobs)} runs; those that are missing take about {sweep.duration(seconds or 0)} here")
    frame = sweep.run(study.sweep, workers=workers, threads=threads, log=log)
    runs_dir = study.sweep.jobs[0].experiment.runs_dir
    runs = collect(study, frame)
    codes = sorted({str(results.open_run(run, runs_dir).manifest["code_version"]) for run in frame["run"]})
    if len(codes) > 1:
        log(
            f"its runs were made by {len(codes)} versions of the code: {', '.join(codes)}; the figure's .json has each run's"
        )
    used = [results.open_run(run, runs_dir) for run in dict.fromkeys(frame["run"])]
    return publish(study, runs, folder=folder or str(home() / "figures"), used=used)


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the study is complete, 1 when runs failed, 2 when it is refused, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m pa_core.study", description="Make a study of params/study/.")
    parser.add_argument("study", help=f"one of {', '.join(names())}, or the path of a study file")
    parser.add_argument("--estimate", action="store_true", help="only say how long the missing runs take")
    parser.add_argument("--folder", help="where tables and figures go; figures/ by default")
    parser.add_argument("--workers", type=sweep.positive, help="runs at a time; by default one per GPU, or per core")
    parser.add_argument("--threads", type=sweep.positive, help="threads of each run")
    arguments = parser.parse_args(words)
    try:
        if arguments.estimate:
            study, here = read(arguments.study), sweep.machine(workers=arguments.workers, threads=arguments.threads)
            seconds = expected(study, workers=here.workers, threads=here.threads)
            print(
                f"study {study.name}: {len(study.sweep.jobs)} runs; those that are missing take about {sweep.duration(seconds or 0)} here"
            )
            return 0
        for path in run(arguments.study, folder=arguments.folder, workers=arguments.workers, threads=arguments.threads):
            print(path)
    except ParameterError as error:
        print(error, file=sys.stderr)
        return 2
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
