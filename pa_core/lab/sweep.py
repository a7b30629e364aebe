"""A file -> many runs: ``python -m pa_core.lab.sweep params/sweeps/threshold.yaml``; docs/sweeps.md shows such a file.

Every combination is a run: a `papermill` process on a Dask worker, or with ``notebook: none`` the worker's own. What is
finished is known by the runs' identities, so the same command continues a sweep that was stopped in whatever way.
Importing this module loads neither torch nor Dask.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar
from uuid import uuid4

import pandas as pd
from annotated_types import MinLen
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pa_core.errors import ParameterError, RunError, did_you_mean
from pa_core.files import home, read_json, read_yaml, runs_home, shown
from pa_core.lab import notebooks
from pa_core.params import PARAMETERS, Experiment

TO_DO, STALE, FINISHED, FAILED = "to do", "stale", "finished", "failed"
Log = Callable[[str], None]
M = TypeVar("M", bound=BaseModel)
say = partial(print, flush=True)


class SweepFile(BaseModel):
    """The shape of a sweep file; the descriptions say what each key must be."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    notebook: str = Field("03_proxy_loop", description="a notebook's name or path, or none")
    base: dict[str, Any] | str = Field({}, description="names and values of parameters, or a params file's path")
    grid: dict[str, Annotated[list, MinLen(1)]] = Field({}, description="lists of values by parameter, as {lr: [0.1]}")
    arms: dict[str, dict[str, Any] | None] = Field({}, description="parameters by name, such as {plain: {lr: 0.1}}")
    seeds: list[Any] = Field([], description="a list of values, such as [0, 1, 2]")


def checked(model: type[M], content: Mapping[str, Any], *, name: str) -> M:
    """A file's content in the shape of ``model``, or a ParameterError that names the key; a key may have no value."""
    try:
        return model(**{str(key): value for key, value in content.items() if value is not None})
    except ValidationError as error:
        first, fields = error.errors()[0], model.model_fields
    where = [str(part) for part in first["loc"] if "[" not in str(part)]  # without the types that pydantic tried
    known = f"one of {', '.join(fields)}{did_you_mean(where[0], fields)}"
    must = fields[where[0]].description if where[0] in fields else known
    value = None if first["type"] == "missing" else first["input"]
    raise ParameterError(f"{name}: {'.'.join(where)}", value, f"must be {must}")


@dataclass(kw_only=True, eq=False)
class Job:
    """One run of a sweep, and how far it is."""

    experiment: Experiment
    arms: list[str]  # several where they differ only in what has no effect
    status: str = TO_DO  # stale: to do, and finished by other code
    run: str | None = None  # the name of its directory, when it is finished
    error: str = ""  # of a failed one, with the notebook's cell
    kept: str = ""  # what is left of it


class Sweep:
    """What a file asks for, from (arm, experiment); what makes the same run is one job, which belongs to all its arms.

    ``name`` is the file's; reports lie under sweeps/NAME in the runs folder. Without a notebook workers make the runs.
    """

    def __init__(self, name: str, named: Sequence[tuple[str, Experiment]], notebook: Path | None = None):
        self.name, self.notebook, self.runs_dir, self.combinations = name, notebook, named[0][1].runs_dir, len(named)
        jobs: dict[str, Job] = {}
        for arm, e in named:
            places = [e.dataset, e.data_dir, e.image_size, e.bad_images, e.pretrained, e.runs_dir]
            job = jobs.setdefault(str([e.effective(), places]), Job(experiment=e, arms=[]))
            job.arms += [arm] if arm not in job.arms else []
        self.jobs = list(jobs.values())
        self.varied = [p for p in PARAMETERS if len({str(getattr(job.experiment, p)) for job in self.jobs}) > 1]

    def title(self, job: Job) -> str:
        """What tells a job from the others: ``mean  threshold=0.4 seed=1``."""
        values = [f"{name}={getattr(job.experiment, name)}" for name in self.varied]
        return f"{', '.join(job.arms)}  {' '.join(values)}".strip() or job.experiment.schedule

    @cached_property
    def locate(self) -> Callable[[Experiment], Path]:
        """`experiment.locate`, but each dataset is looked up once."""
        from pa_core import data, experiment

        names, identify = ("dataset", "data_dir", "bad_images", "image_size"), cache(data.identify)
        return lambda e: experiment.locate(e, data_identity=identify(**{name: getattr(e, name) for name in names}))


def read(source: str | os.PathLike | Mapping[str, Any]) -> Sweep:
    """A sweep file, or what it would hold, expanded. Relative paths in it begin in its folder, or where Python runs.

    ParameterError where a key or a value is not allowed; the message names both.
    """
    path = Path("sweep" if isinstance(source, Mapping) else source).absolute()
    name, folder, content = path.stem, path.parent, source if isinstance(source, Mapping) else read_yaml(source)
    file = checked(SweepFile, content, name=name)
    axes = file.grid | ({"seed": file.seeds} if file.seeds else {})
    of = {parameter: f"grid.{parameter}" for parameter in file.grid} | ({"seed": "seeds"} if file.seeds else {})
    if not (axes or file.arms):
        raise ParameterError(f"{name}: keys", sorted(map(str, content)), "must include one of grid, arms and seeds")
    arms = {arm: own or {} for arm, own in (file.arms or {"": {}}).items()}
    twice = [("grid.seed", file.grid["seed"], "seed")] if file.seeds and "seed" in file.grid else []
    twice += [(f"arms.{arm}.{p}", own[p], p) for arm, own in arms.items() for p in own if p in axes]
    for place, value, parameter in twice[:1]:
        raise ParameterError(f"{name}: {place}", value, f"must not be set here: {of[parameter]} sets it")
    base, named = read_yaml(folder / Path(file.base).expanduser()) if isinstance(file.base, str) else file.base, []
    for arm, own in arms.items():
        places = {p: f"base.{p}" for p in base} | {p: f"arms.{arm}.{p}" for p in own} | of
        for values in itertools.product(*axes.values()):
            parameters = {**base, **own, **dict(zip(axes, values, strict=True))}
            named.append((arm, experiment(parameters, f"{name}: ", places)))
    if len(folders := {e.runs_dir for _, e in named}) > 1:
        raise ParameterError(f"{name}: runs_dir", sorted(folders), "must be one folder for all runs, set in base")
    return Sweep(name, named, _notebook(f"{name}: notebook", file.notebook, folder))


def experiment(parameters: Mapping[str, Any], prefix: str, places: Mapping[str, str] = {}) -> Experiment:
    """An experiment; a refusal names the parameter's place in the file."""
    try:
        return Experiment.from_mapping(parameters)
    except ParameterError as error:
        split = error.name == "schedule" or (error.name not in PARAMETERS and error.value is None)
        hint = "; quote a schedule where YAML would take it apart: '20,p,20'"
        allowed = error.allowed + (hint if split and "quote" not in error.allowed else "")
        raise ParameterError(prefix + places.get(error.name, error.name), error.value, allowed) from None


def _notebook(place: str, text: str, folder: Path) -> Path | None:
    """A notebook of this repository by its name, or any by its path."""
    if text == "none":
        return None
    own, file = home() / "notebooks", f"{text.removesuffix('.ipynb')}.ipynb"
    found = own / file if (own / file).is_file() else folder / file
    if not found.is_file():
        known = sorted(path.stem for path in own.glob("*.ipynb"))
        allowed = f"must be one of {', '.join(known)}, a notebook's path, or none"
        raise ParameterError(place, text, allowed + did_you_mean(text, known))
    if not notebooks.parameters_source(found):
        raise ParameterError(place, text, "must have a cell with the tag parameters, for papermill")
    notebooks.refuse_edited(found)
    return found


def _known(runs_dir: str) -> pd.DataFrame:
    """The finished runs of a folder; torch is not loaded where there is none."""
    if not any(runs_home(runs_dir).glob("*/manifest.json")):
        return pd.DataFrame(columns=["run", "dataset", "model", "schedule"])
    from pa_core.lab import results

    frame = results.load(runs_dir)
    return frame.loc[frame["status"] == FINISHED]


def look_up(sweep: Sweep) -> list[Job]:
    """Note which jobs are finished, by this code or (stale) by another version. Returns those to do.

    Nothing is downloaded for it: only jobs are looked up that have the dataset, model and schedule of a finished run.
    """
    known, alike = _known(sweep.runs_dir), ["dataset", "model", "schedule"]
    there, runs = set(known[alike].itertuples(index=False, name=None)), set(known["run"])
    others = {name.rpartition("-")[0] for name in runs}  # a directory's name ends in the code version
    for job in sweep.jobs:
        job.status, job.run = TO_DO, None
        if tuple(getattr(job.experiment, name) for name in alike) in there:
            with suppress(ParameterError):  # the run itself will say what is wrong, and where
                path = sweep.locate(job.experiment)
                if path.name in runs:
                    job.status, job.run = FINISHED, path.name
                elif path.name.rpartition("-")[0] in others:
                    job.status = STALE
    return [job for job in sweep.jobs if job.status != FINISHED]


def table(sweep: Sweep) -> pd.DataFrame:
    """A row per arm and run: ``arm``, what varies, how far it is, parameters, and what `results.load` knows."""
    rows, noted = [], ("run", "status", "error", "kept")
    for job in sweep.jobs:
        known = {name: getattr(job, name) for name in noted} | job.experiment.to_dict()
        rows += [{"arm": arm} | known for arm in job.arms]
    frame = pd.DataFrame(rows)
    if frame["run"].notna().any():
        known = _known(sweep.runs_dir)
        frame = frame.merge(known[["run", *known.columns.difference(frame.columns, sort=False)]], on="run", how="left")
    return frame.loc[:, list(dict.fromkeys(["arm", "status", *sweep.varied, *frame.columns]))]


def estimate(sweep: Sweep, *, workers: int) -> float | None:
    """Seconds that the jobs to do will take: the mean of runs on the same data with as many epochs; None without."""
    if (known := _known(sweep.runs_dir)).empty:
        return None
    alike = [known["dataset"], known["data_dir"].fillna(""), known["model"], known["epochs"]]
    mean = (known["train_seconds"] + known["proxy_seconds"]).groupby(alike).mean().dropna()
    todo = [job.experiment for job in sweep.jobs if job.status != FINISHED]
    folders = [str(Path(e.data_dir).expanduser().absolute()) if e.data_dir else "" for e in todo]  # as in the runs
    each = [mean.get((e.dataset, folder, e.model, e.length)) for e, folder in zip(todo, folders, strict=True)]
    return None if None in each else sum(filter(None, each)) / max(1, min(workers, len(each)))


def run(
    source: str | os.PathLike | Mapping[str, Any] | Sweep, *, dry_run: bool = False, log: Log = say, **where: Any
) -> pd.DataFrame:
    """Make the runs of a sweep that are not finished yet.

    ``source`` is a sweep file, or what it would hold; a dry run only lists the runs; ``where`` are the ``workers``,
    ``threads``, ``scheduler`` and ``cluster`` of `workers.pool`. Returns :func:`table`. ParameterError before the first
    run, where something asked for does not exist; KeyboardInterrupt after the runs under way were stopped.
    """
    sweep = source if isinstance(source, Sweep) else read(source)
    todo, count = look_up(sweep), len(sweep.jobs)
    same, stale = sweep.combinations - count, sum(job.status == STALE for job in todo)
    made = f" ({sweep.combinations} combinations, {same} of them the same run as another)" if same else ""
    other = f" ({stale} of them finished by another version of the code)" if stale else ""
    log(f"{sweep.name}: {count} runs{made}, {count - len(todo)} finished before, {len(todo)} to do{other}")
    if dry_run:
        for job in sweep.jobs:
            log(f"  {job.status:8}  {sweep.title(job)}")
    elif todo:
        own = time.strftime(f"%Y%m%d-%H%M%S-{uuid4().hex[:8]}")
        folder = runs_home(sweep.runs_dir) / "sweeps" / sweep.name / own
        folder.mkdir(parents=True)
        try:
            _make(sweep, todo, folder, log, **where)
        except ImportError as error:
            must = "must be installed: pip install 'pa-core[sweep]', or -r requirements.txt"
            raise ParameterError("dask", error.name, must) from error
        finally:
            table(sweep).to_csv(folder / "report.csv", index=False)
            failed = [job for job in sweep.jobs if job.status == FAILED]
            for job in failed:
                log(f"failed: {job.error}\n    {shown(Path(job.kept))}")
            done = sum(job.status == FINISHED for job in sweep.jobs)
            log(f"{done} of {count} finished, {len(failed)} failed; the report is {shown(folder / 'report.csv')}")
    return table(sweep)


def _make(sweep: Sweep, todo: list[Job], folder: Path, log: Log, **where: Any) -> None:
    """Give the jobs out and note in each how it ends."""
    from distributed import as_completed

    from pa_core.lab.workers import pool

    futures, started, cpu = {}, time.perf_counter(), all(job.experiment.device == "cpu" for job in todo)
    has_figures = sweep.notebook and re.search(r"^figures_dir\b", notebooks.parameters_source(sweep.notebook), re.M)
    with pool(len(todo), cpu, log, **where) as submit:
        for number, job in enumerate(todo):
            place = folder / str(number)
            parameters = job.experiment.to_dict() | ({"figures_dir": str(place / "figures")} if has_figures else {})
            futures[submit(place, parameters, sweep.notebook)] = job, place
        try:
            for count, future in enumerate(as_completed(futures), 1):
                job, place = futures[future]
                _note(job, future, place, sweep.locate)
                left = timedelta(seconds=round((time.perf_counter() - started) / count * (len(todo) - count)))
                what = f"{job.status}: {sweep.title(job)}: {job.error or job.run}"
                log(f"[{count}/{len(todo)}] {what}; about {left} left")
        except KeyboardInterrupt:  # leaving the block gives the runs up, which stops them
            log("interrupted: stopping the runs under way; the same command goes on from their checkpoints")
            raise


def _note(job: Job, future: Any, place: Path, locate: Callable[[Experiment], Path]) -> None:
    """Note how a job ended. It is finished only if the run with its identity is."""
    try:
        job.error = future.result()
    except Exception as error:  # what Dask says of a worker or process that died
        job.error = " ".join(str(error).split())
    path = None if job.error else locate(job.experiment)
    if path and read_json(path / "manifest.json").get("status") == FINISHED:
        job.status, job.run = FINISHED, path.name
        for name in ("notebook.ipynb", "figures"):  # what another sweep put there first, stays
            if (place / name).exists() and not (path / name).exists():
                os.replace(place / name, path / name)
        shutil.rmtree(place, ignore_errors=True)
        place = path
    else:
        job.status = FAILED
        job.error = job.error or f"it ended without its run {path}; was the code changed since the sweep began?"
    job.kept = str(next(filter(Path.exists, [place / "notebook.ipynb", place / "log.txt"]), place))


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 when every run is finished, 1 when some failed, 2 when the file is refused, 130 when stopped."""
    parser = argparse.ArgumentParser(prog="python -m pa_core.lab.sweep", description="Make the runs of a sweep file.")
    parser.add_argument("file", help=f"a YAML file with the keys {', '.join(SweepFile.model_fields)}")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, start none")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--scheduler", metavar="ADDRESS", help="use a running Dask cluster, such as tcp://node:8786")
    where.add_argument("--cluster", metavar="FILE", help="start one through dask-jobqueue, from a YAML file")
    return command(parser, _status, words)


def _status(*, file: str, **options: Any) -> int:
    return int((run(file, **options)["status"] == FAILED).any())


def command(parser: argparse.ArgumentParser, work: Callable[..., int], words: Sequence[str] | None) -> int:
    """Do what a command asks for. Exit status: of ``work``, 2 when it is refused, 1 without runs, 130 when stopped."""
    parser.add_argument("--workers", type=int, help="runs at a time; by default one per GPU, or per core")
    parser.add_argument("--threads", type=int, help="threads of each run; by default cores divided by workers")
    options = vars(parser.parse_args(words))
    for asked_to_stop in (signal.SIGTERM, signal.SIGHUP):  # in the same good order as Ctrl-C
        signal.signal(asked_to_stop, signal.default_int_handler)
    try:
        return work(**options)
    except (ParameterError, RunError, OSError) as error:  # the last one is a folder that cannot be written, say
        print(error, file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
