"""Studies: arms under equal terms, from their files to figures/: ``python -m pa_core.lab.study a``.

A study is a file of params/study/ (docs/studies.md). Its runs are a sweep's, made without notebooks: the same that
03_proxy_loop makes of an arm's file. figures/study_a.csv follows from figures/study_a_runs.csv alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pa_core.errors import ParameterError, RunError, did_you_mean
from pa_core.files import home, read_yaml, replacing
from pa_core.lab import figures, results, statistics, sweep
from pa_core.params import PROXY_PARAMETERS, SCHEMA, Experiment
from pa_core.runs import code_version

FREE = PROXY_PARAMETERS | {"schedule", "augment", "erase_region", "erase_probability", "mix_labels", "mix_probability"}
FREE |= {"cutmix_alpha", "seed"}
"""What arms may differ in; all else is equal, or the study's ``may_differ`` names it."""
FOLDER = home() / "params" / "study"
DECOMPOSITION = "_decomposition"
SOURCES = COMMITTED, OWN = "committed", "runs"
Parameters = dict[str, Any] | str
Contrasts = list[Annotated[statistics.Contrast, BeforeValidator(statistics.Contrast.parse)]]


class StudyFile(BaseModel):
    """The shape of a study file; the descriptions say what each key must be."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    question: str = Field("", description="a sentence")
    reference: str = Field(description="the name of an arm")
    seeds: int = Field(ge=1, strict=True, description="how many, a whole number of at least 1")
    contrasts: Contrasts = Field([], description="a list such as [salient - permuted]")
    contrast_seeds: int = Field(0, ge=1, strict=True, description="how many, a whole number of at least 1")
    described: Contrasts = Field([], description="a list such as [salient - rest]")
    arms: dict[str, Parameters | list[Parameters]] = Field(description="parameters or a params file, or lists, by name")
    base: Parameters = Field({}, description="names and values of parameters, or a params file")
    datasets: list[str] = Field([], description="a list of names")
    may_differ: list[str] = Field([], description="a list of parameters")
    other_length: list[str] = Field([], description="a list of arms")
    decomposition: list[dict[str, str]] = Field([], description="a list such as [{arm: a, unmasked: b, honest: c}]")
    around: str = Field("", description="the name of an arm")


class Study(NamedTuple):
    """A study file, checked."""

    name: str
    file: StudyFile
    sweep: sweep.Sweep  # its arms are called DATASET: ARM, because their parameters differ by dataset


def names() -> list[str]:
    """The studies of the repository."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> Study:
    """A study by its name in params/study/, or by its path; ParameterError where something in it is not allowed."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        allowed = f"must be one of {', '.join(names())}, or a path{did_you_mean(name, names())}"
        raise ParameterError("study", name, allowed)
    file = sweep.checked(StudyFile, read_yaml(path), name=path.stem)
    most, limit = file.contrast_seeds or file.seeds, statistics.MAX_PAIRS_FOR_P_VALUE
    if file.contrasts and most > limit:
        raise ParameterError(f"{path.stem}: seeds", most, f"must be at most {limit}, or no exact test is made")
    asked = [*chain(*file.contrasts, *file.described, *(part.values() for part in file.decomposition))]
    for arm in (file.reference, *file.other_length, *asked, file.around or file.reference):
        if arm not in file.arms:
            allowed = f"must be one of {', '.join(sorted(file.arms))}{did_you_mean(arm, file.arms)}"
            raise ParameterError(f"{path.stem}: arm", arm, allowed)
    named, arms = [], _arms(path, file)
    for label, e in arms.items():
        dataset, arm = split(label)
        reference = arms[f"{dataset}: {file.reference}"]
        for parameter, wanted in reference.to_dict().items():  # equal terms
            if parameter not in FREE | set(file.may_differ) and (value := getattr(e, parameter)) != wanted:
                allowed = f"must be {wanted!r} as in the reference, or the study must say may_differ: [{parameter}]"
                raise ParameterError(f"{path.stem}: {label}.{parameter}", value, allowed)
        if e.length != reference.length and arm not in file.other_length:
            allowed = f"must have the reference's {reference.length} epochs, or the study say other_length: [{arm}]"
            raise ParameterError(f"{path.stem}: {label}.schedule", e.schedule, allowed)
        count = most if arm in chain(*file.contrasts) else file.seeds
        named += [(label, e.replace(seed=seed)) for seed in range(count)]
    return Study(name=path.stem, file=file, sweep=sweep.Sweep(f"study_{path.stem}", named))


def _arms(path: Path, file: StudyFile) -> dict[str, Experiment]:
    """``DATASET: ARM`` -> its experiment, of whatever seed."""
    base = read_yaml(path.parent / file.base) if isinstance(file.base, str) else file.base
    arms = {}
    for arm, given in file.arms.items():
        each = given if isinstance(given, list) else [given]
        if len(each) != max(1, len(file.datasets)):
            allowed = f"must be one set of parameters for each of {file.datasets or 'one dataset'}"
            raise ParameterError(f"{path.stem}: arms.{arm}", given, allowed)
        for number, one in enumerate(each):
            values = read_yaml(path.parent / one) if isinstance(one, str) else base | one
            made = sweep.experiment(values, f"{path.stem}: arms.{arm}.")
            arms[f"{file.datasets[number] if file.datasets else made.dataset}: {arm}"] = made
    return arms


def split(label: str) -> tuple[str, str]:
    """``"DATASET: ARM"`` -> (dataset, arm)."""
    dataset, _, arm = label.partition(": ")
    return dataset, arm


def collect(study: Study, frame: pd.DataFrame) -> pd.DataFrame:
    """The table of the study's sweep -> a row per run and metric, with `statistics.RUN_COLUMNS`.

    RunError where a run has not finished, or those of one seed do not share data, split and device.
    """
    if undone := frame.loc[frame["status"] != sweep.FINISHED, "arm"].tolist():
        raise RunError(f"study {study.name}: {len(undone)} of {len(frame)} runs have not finished, {undone[0]} first")
    if frame.empty:
        return pd.DataFrame(columns=list(statistics.RUN_COLUMNS))
    dataset, arm = zip(*map(split, frame["arm"]), strict=True)
    return results.runs_table(frame.assign(dataset=dataset, arm=arm), study=study.name)


def tables(study: Study, runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What follows from the runs: ``study_a``, and ``study_a_decomposition`` where the study has one.

    What has no runs is left out. While runs are missing nothing is tested: a family that is not complete, or looked at
    as it grows, has no p-values. RunError where the runs come from several schemas or versions of the code.
    """
    for name in ("schema", "code_version"):
        if name in runs and len(set(runs[name])) > 1:
            raise RunError(f"the runs of study {study.name} differ in {name}, so that they are no pairs")
    arms, file, table = set(runs["arm"]), study.file, pd.DataFrame(columns=list(statistics.COLUMNS))
    runs = runs if file.reference in arms else runs.head(0)
    if len(runs):
        declared, described = ([c for c in cs if {*c} <= arms] for cs in (file.contrasts, file.described))
        table = statistics.compare(runs, reference=file.reference, declared=declared, described=described)
    asked = {(*split(label), job.experiment.seed) for job in study.sweep.jobs for label in job.arms}
    if not asked <= set(runs[["dataset", "arm", "seed"]].itertuples(index=False, name=None)):
        table.loc[:, ["p_value", "p_holm", "verdict"]] = np.nan
    made = {f"study_{study.name}": table}
    if file.decomposition:
        parts = [part for part in file.decomposition if set(part.values()) <= arms]
        made[f"study_{study.name}{DECOMPOSITION}"] = statistics.decompose(runs, parts)
    return made


def draw(study: Study, name: str, table: pd.DataFrame) -> Figure:
    """The figure of one of its tables."""
    if name.endswith(DECOMPOSITION):
        return figures.decomposition(table)[0]
    if study.file.around:
        return figures.forest(table, around=study.file.around, values=_values(study))[0]
    return figures.forest(table)[0]


def _values(study: Study) -> dict[str, dict[str, str]]:
    """Parameter -> arm -> its value: the arms that differ from ``around`` in that alone, and ``around`` itself."""
    arms = {split(label)[1]: job.experiment.replace(seed=0).to_dict() for job in study.sweep.jobs for label in job.arms}
    centre, found = arms[study.file.around], {}
    for arm, values in arms.items():
        different = [name for name, value in values.items() if value != centre[name]]
        if arm != study.file.reference and len(different) == 1:
            (name,) = different
            found.setdefault(name, {study.file.around: centre[name]})[arm] = values[name]
    for name, values in found.items():
        if all(isinstance(value, (int, float)) for value in values.values()):
            found[name] = {arm: f"{value:g}" for arm, value in sorted(values.items(), key=lambda item: item[1])}
    return found


def publish(study: Study, runs: pd.DataFrame, *, folder: str, used: Sequence[Any] = ()) -> list[Path]:
    """Write study_X_runs.csv, and each table with its figure and provenance. Returns the figures."""
    album = figures.Album(figures_dir=folder, command=f"make study STUDY={study.name}")
    made = tables(study, runs)
    with replacing(Path(folder) / f"study_{study.name}_runs.csv") as temporary:  # no runs of other code are ever found
        runs.assign(schema=SCHEMA, code_version=code_version()).to_csv(temporary, index=False)
    return [album.save(draw(study, name, table), name, table=table, used=used) for name, table in made.items()]


def show(name: str, *, source: str = COMMITTED, runs_dir: str = "runs") -> tuple[Figure, pd.DataFrame]:
    """A figure of a study (``study_a``, ``study_c_decomposition``) and the table behind it, without making a run.

    Of the ``committed`` runs in figures/, or the finished ``runs`` in ``runs_dir``; an empty figure where none are.
    """
    if source not in SOURCES:
        raise ParameterError("studies", source, f"must be one of {', '.join(SOURCES)}{did_you_mean(source, SOURCES)}")
    study = read(name.removeprefix("study_").removesuffix(DECOMPOSITION))
    path, runs = home() / "figures" / f"study_{study.name}_runs.csv", pd.DataFrame(columns=list(statistics.RUN_COLUMNS))
    if source == OWN:
        runs = so_far(study, runs_dir=runs_dir)
    elif path.is_file():  # without a column schema they are of schema 1
        runs = pd.read_csv(path)
    table = tables(study, runs)[name]
    return draw(study, name, table), table


def so_far(study: Study, *, runs_dir: str = "runs") -> pd.DataFrame:
    """What :func:`collect` gives, of the runs that this code has finished until now; none is made."""
    named = [(arm, job.experiment.replace(runs_dir=runs_dir)) for job in study.sweep.jobs for arm in job.arms]
    here = sweep.Sweep(study.sweep.name, named)
    sweep.look_up(here)
    frame = sweep.table(here)
    return collect(study, frame[frame["status"] == sweep.FINISHED])


def declared(*, source: str = COMMITTED, runs_dir: str = "runs") -> pd.DataFrame:
    """The declared contrasts of all studies, and what may be said of them. Differences and intervals are in points."""
    found = pd.concat([show(f"study_{name}", source=source, runs_dir=runs_dir)[1] for name in names()])
    found = found.loc[found["declared"].astype(bool)]
    points = {name: 100 * found[name].astype(float) for name in ("difference", "low", "high")}
    found = found.assign(contrast=found["arm"] + " - " + found["against"], **points)
    return found.loc[:, ["study", "dataset", "contrast", "n", *points, "p_holm", "verdict"]].reset_index(drop=True)


def make(*, study: str, estimate: bool = False, **where: Any) -> int:
    """Make a study's missing runs, then its tables and figures; RunError, and none of these, where a run failed."""
    asked = read(study)
    if estimate:
        from pa_core.lab.workers import machine  # it loads Dask

        todo = sweep.look_up(asked.sweep)
        seconds = sweep.estimate(asked.sweep, workers=machine(**where)[0])
        words = "no finished run tells how long" if seconds is None else f"about {timedelta(seconds=round(seconds))}"
        print(f"{len(todo)} of {len(asked.sweep.jobs)} runs to do: {words}")
        return 0
    sweep.say(f"study {asked.name}: {asked.file.question}")
    frame = sweep.run(asked.sweep, **where)
    runs = collect(asked, frame)
    used = [results.open_run(run, asked.sweep.runs_dir) for run in dict.fromkeys(frame["run"])]
    print(*publish(asked, runs, folder=str(home() / "figures"), used=used), sep="\n")
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the study is complete, 1 when runs failed, 2 when it is refused, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m pa_core.lab.study", description="Make a study of params/study/.")
    parser.add_argument("study", help=f"one of {', '.join(names())}, or the path of a study file")
    parser.add_argument("--estimate", action="store_true", help="only say how long the missing runs take")
    return sweep.command(parser, make, words)


if __name__ == "__main__":
    sys.exit(main())
