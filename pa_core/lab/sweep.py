"""A file -> many runs: ``python -m pa_core.lab.sweep params/sweeps/threshold.yaml``.

    notebook: 03_proxy_loop           # a notebook of notebooks/, the path of one, or none; this is the default
    base: {dataset: fashion_mini}     # parameters of every run, or the path of a params file
    grid: {threshold: [0.1, 0.4]}     # every combination of these values
    arms:                             # named sets of parameters
      plain: {schedule: "40"}
      proxies: {schedule: "20,p,20"}
    seeds: [0, 1, 2]

Every combination is a run, a `papermill` process on a Dask worker: of this machine, of a running cluster, or of a batch
system. With ``notebook: none`` the worker itself makes the same run, without a kernel to start and a notebook to keep.
What is finished is known by the runs' identities, so the same command continues a sweep that was stopped in whatever
way. Importing this module loads neither torch nor Dask.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pa_core.errors import ParameterError, did_you_mean
from pa_core.files import data_home, home, read_json, read_yaml, runs_home, shown
from pa_core.lab import notebooks
from pa_core.params import PARAMETERS, Experiment, check

TO_DO, STALE, FINISHED, FAILED = "to do", "stale", "finished", "failed"
RETRIES = 2
"""How often a run is started again whose process died without an error: killed, out of memory."""
START_SECONDS = {True: 10, False: 2}
"""What a run takes besides its epochs, about, with a notebook (kernel, imports, figures) and without."""
ALIKE = ["dataset", "model", "train_fraction", "protocol"]
"""What runs have in common whose epochs take about as long; and their ``data_dir``."""
Log = Callable[[str], None]
M = TypeVar("M", bound=BaseModel)
say = partial(print, flush=True)


# A file -> jobs


class SweepFile(BaseModel):
    """The shape of a sweep file; the descriptions say what each key must be."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    notebook: str = Field("03_proxy_loop", description="a notebook's name or path, or none")
    base: dict[str, Any] | str = Field({}, description="names and values of parameters, or a params file's path")
    grid: dict[str, list[Any]] = Field({}, description="lists of values by parameter, such as {threshold: [0.4, 0.8]}")
    arms: dict[str, dict[str, Any] | None] = Field({}, description="parameters by name, such as {plain: {lr: 0.1}}")
    seeds: list[Any] = Field([], description="a list of values, such as [0, 1, 2]")


def checked(model: type[M], content: Mapping[str, Any], *, name: str) -> M:
    """A file's content in the shape of ``model``; a key without a value counts as not there.

    Raises:
        ParameterError: it has another shape; the message names the key.
    """
    try:
        return model(**{str(key): value for key, value in content.items() if value is not None})
    except ValidationError as error:
        first, fields = error.errors()[0], model.model_fields
    where = [str(part) for part in first["loc"] if "[" not in str(part)]  # without the types that pydantic tried
    allowed = f"must be one of {', '.join(fields)}{did_you_mean(where[0], fields)}"
    if where[0] in fields:
        allowed = f"must be {fields[where[0]].description}"
    value = None if first["type"] == "missing" else first["input"]
    raise ParameterError(f"{name}: {'.'.join(where)}", value, allowed)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep, and the arms it belongs to: several where they differ only in what has no effect."""

    experiment: Experiment
    arms: tuple[str, ...]

    @cached_property
    def key(self) -> str:
        """The same for two jobs whose parameters make the same run (12 hex digits)."""
        e = self.experiment
        places = [e.dataset, e.data_dir, e.image_size, e.bad_images, e.pretrained, e.runs_dir]
        return hashlib.sha256(json.dumps([e.effective(), places], sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a file asks for.

    ``name`` is that of the file; reports lie under ``sweeps/NAME`` in the runs folder. ``notebook`` is None where the
    worker itself makes the runs. Each of the ``combinations`` of grid, arms and seeds is one of the jobs, or the same.
    """

    name: str
    notebook: Path | None
    jobs: tuple[Job, ...]
    combinations: int

    @cached_property
    def varied(self) -> list[str]:
        """The parameters that differ between jobs."""
        return [name for name in PARAMETERS if len({str(getattr(job.experiment, name)) for job in self.jobs}) > 1]

    def title(self, job: Job) -> str:
        """What tells a job from the others: ``mean  threshold=0.4 seed=1``."""
        values = " ".join(f"{name}={getattr(job.experiment, name)}" for name in self.varied)
        return "  ".join(filter(None, [", ".join(job.arms), values])) or job.experiment.schedule

    @property
    def runs_dir(self) -> str:
        return self.jobs[0].experiment.runs_dir

    def to_do(self, states: Mapping[str, State]) -> list[Job]:
        """The jobs that are not finished."""
        return [job for job in self.jobs if states.get(job.key, State()).status != FINISHED]


def read(path: str | os.PathLike) -> Sweep:
    """Expand and check a sweep file.

    Raises:
        ParameterError: the file cannot be read, or a key or a value in it is not allowed; the message names both.
    """
    path = Path(path)
    return expand(read_yaml(path), name=path.stem, folder=path.absolute().parent)


def expand(content: Mapping[str, Any], *, name: str = "sweep", folder: Path | None = None) -> Sweep:
    """Every combination of grid, arms and seeds of a sweep file's content, checked.

    Args:
        folder: where relative paths of ``notebook`` and ``base`` begin; the working directory by default.

    Raises:
        ParameterError: see :func:`read`.
    """
    folder, file = folder or Path.cwd(), checked(SweepFile, content, name=name)
    if not (file.grid or file.arms or file.seeds):
        raise ParameterError(f"{name}: keys", sorted(map(str, content)), "must include one of grid, arms and seeds")
    if file.seeds and "seed" in file.grid:
        raise ParameterError(f"{name}: grid.seed", file.grid["seed"], "must not be set here: seeds sets it")
    base = read_yaml(folder / Path(file.base).expanduser()) if isinstance(file.base, str) else file.base
    axes = {parameter: _axis(f"{name}: grid.{parameter}", parameter, file.grid[parameter]) for parameter in file.grid}
    axes |= {"seed": _axis(f"{name}: seeds", "seed", file.seeds)} if file.seeds else {}
    named = []
    for arm, parameters in (file.arms or {"": {}}).items():
        own = {str(p): (f"{name}: arms.{arm}.{p}", value) for p, value in (parameters or {}).items()}
        for parameter in own.keys() & axes.keys():
            raise ParameterError(*own[parameter], f"must not be set here: {axes[parameter][0][0]} sets it")
        fixed = {str(p): (f"{name}: base.{p}", value) for p, value in base.items()} | own
        for values in itertools.product(*axes.values()):
            named.append((arm, experiment({**fixed, **dict(zip(axes, values, strict=True))})))
    if len(folders := {experiment.runs_dir for _, experiment in named}) > 1:
        raise ParameterError(f"{name}: runs_dir", sorted(folders), "must be one folder for all runs, set in base")
    notebook = _notebook(f"{name}: notebook", file.notebook, folder)
    return Sweep(name=name, notebook=notebook, jobs=unique(named), combinations=len(named))


def unique(named: Iterable[tuple[str, Experiment]]) -> tuple[Job, ...]:
    """Jobs of (arm, experiment): what makes the same run is one job, which belongs to all their arms."""
    jobs: dict[str, Job] = {}
    for arm, experiment in named:
        job = Job(experiment=experiment, arms=(arm,))
        known = jobs.get(job.key, job)
        jobs[job.key] = replace(known, arms=tuple(dict.fromkeys([*known.arms, arm])))
    return tuple(jobs.values())


def _axis(place: str, parameter: str, values: list[Any]) -> list[tuple[str, Any]]:
    """The values of grid or seeds, each with its place in the file."""
    found: list[Any] = []
    for value in values:
        try:
            found.append(check(parameter, value))
        except ParameterError as error:
            raise _refusal(place, error) from None
        if found[-1] in found[:-1]:
            raise ParameterError(place, found[-1], "must not be given twice")
    if not found:
        raise ParameterError(place, values, "must be a list of values, such as [1, 2]")
    return [(place, value) for value in found]


def experiment(placed: Mapping[str, tuple[str, Any]]) -> Experiment:
    """An experiment from parameter -> (place in the file, value); a refusal names the place."""
    try:
        return Experiment.from_mapping({parameter: value for parameter, (_, value) in placed.items()})
    except ParameterError as error:
        raise _refusal(placed.get(error.name, (error.name,))[0], error) from None


def _refusal(place: str, error: ParameterError) -> ParameterError:
    split = error.name == "schedule" or (error.name not in PARAMETERS and error.value is None)
    hint = (
        "; quote a schedule where YAML would take it apart: '20,p,20'" if split and "quote" not in error.allowed else ""
    )
    return ParameterError(place, error.value, error.allowed + hint)


def _notebook(place: str, text: str, folder: Path) -> Path | None:
    """A notebook of this repository by its name, or any by its path, from the file or the working directory."""
    if text == "none":
        return None
    own, file = home() / "notebooks", text if text.endswith(".ipynb") else f"{text}.ipynb"
    found = next((path for path in (own / file, folder / file, Path(file).absolute()) if path.is_file()), None)
    if found is None:
        known = sorted(path.stem for path in own.glob("*.ipynb"))
        allowed = f"must be one of {', '.join(known)}, a notebook's path, or none"
        raise ParameterError(place, text, allowed + did_you_mean(text, known))
    if not notebooks.parameters_source(found):
        raise ParameterError(place, text, "must have a cell with the tag parameters, for papermill")
    notebooks.refuse_edited(found)
    return found


# What is there already


class State(NamedTuple):
    """How far a job is: to do, stale (to do, and finished by other code), finished or failed.

    A finished one has its run's directory, a failed one its error and the cell; ``kept`` is what is left of it.
    """

    status: str = TO_DO
    run: Path | None = None
    error: str = ""
    cell: str = ""
    kept: str = ""


def _known(runs_dir: str) -> pd.DataFrame:
    """The finished runs of a folder; torch is not loaded where there is none."""
    if not any(runs_home(runs_dir).glob("*/manifest.json")):
        return pd.DataFrame(columns=["run", "schedule", *ALIKE])
    from pa_core.lab import results

    frame = results.load(runs_dir)
    return frame.loc[frame["status"] == FINISHED]


class Places:
    """Where runs lie: `experiment.locate`, but each dataset is looked up once."""

    def __init__(self) -> None:
        self._data: dict[tuple, tuple[str, int]] = {}

    def __call__(self, e: Experiment) -> Path:
        from pa_core import data, experiment

        what = {name: getattr(e, name) for name in ("dataset", "data_dir", "bad_images", "image_size")}
        if (key := tuple(what.values())) not in self._data:
            self._data[key] = data.identify(**what)
        return experiment.locate(e, identity=self._data[key])


def finished(sweep: Sweep, places: Places | None = None) -> dict[str, State]:
    """Job key -> state, for the jobs whose run is finished, by this code or (stale) by another version.

    A job is looked up, with its data, only if some finished run has its dataset, model and schedule: nothing is
    downloaded for it.
    """
    known, found, places = _known(sweep.runs_dir), {}, places or Places()
    alike = {tuple(row) for row in known[["dataset", "model", "schedule"]].to_numpy()}
    current = set(known["run"])
    other_code = {name.rpartition("-")[0] for name in current}  # a directory's name ends in the code version
    for job in sweep.jobs:
        if (job.experiment.dataset, job.experiment.model, job.experiment.schedule) in alike:
            try:
                path = places(job.experiment)
            except ParameterError:
                continue  # the run itself will say what is wrong, and where
            if path.name in current:
                found[job.key] = State(FINISHED, path)
            elif path.name.rpartition("-")[0] in other_code:
                found[job.key] = State(STALE)
    return found


def table(sweep: Sweep, states: Mapping[str, State]) -> pd.DataFrame:
    """A row per arm and run: ``arm``, what varies, the fields of State, parameters, and what `results.load` knows."""
    rows = []
    for job in sweep.jobs:
        state = states.get(job.key, State())
        known = state._asdict() | {"run": state.run and state.run.name} | job.experiment.to_dict()
        rows += [{"arm": arm} | known for arm in job.arms]
    frame = pd.DataFrame(rows)
    if any(state.run for state in states.values()):
        known = _known(sweep.runs_dir)
        frame = frame.merge(known[["run", *known.columns.difference(frame.columns, sort=False)]], on="run", how="left")
    return frame.loc[:, list(dict.fromkeys(["arm", "status", *sweep.varied, *frame.columns]))]


def estimate(sweep: Sweep, jobs: Sequence[Job], *, workers: int) -> float | None:
    """Seconds that these jobs will take, from finished runs on the same data and models; None where some have none."""
    if (known := _known(sweep.runs_dir)).empty:
        return None
    rate = (known["train_seconds"] + known["proxy_seconds"]) / known["epochs"]
    rate = rate.groupby([_alike(row) for row in known.to_dict("records")]).median().to_dict()
    seconds = [rate.get(_alike(j.experiment.to_dict()), float("nan")) * j.experiment.length for j in jobs]
    total = sum(seconds) + START_SECONDS[sweep.notebook is not None] * len(jobs)
    return None if total != total else max([total / max(1, min(workers, len(jobs))), *seconds])


def _alike(parameters: Mapping[str, Any]) -> str:
    place = parameters["data_dir"]  # NaN in a table of runs where there is none
    return str([parameters[name] for name in ALIKE] + [isinstance(place, str) and os.path.abspath(place)])


# The sweep


def run(
    source: str | os.PathLike | Mapping[str, Any] | Sweep,
    *,
    dry_run: bool = False,
    log: Log = say,
    **where: Any,
) -> pd.DataFrame:
    """Make the runs of a sweep that are not finished yet.

    Args:
        source: a sweep file, or what it would hold.
        dry_run: only list the runs.
        where: ``workers``, ``threads``, ``scheduler`` and ``cluster``, see `workers.pool`; by default this machine.

    Returns:
        See :func:`table`; a failed run has its error and cell there.

    Raises:
        ParameterError: before the first run: the file asks for something that does not exist, or Dask is missing.
        KeyboardInterrupt: after the runs under way were stopped.
    """
    sweep = source if isinstance(source, Sweep) else expand(source) if isinstance(source, Mapping) else read(source)
    places = Places()
    states = finished(sweep, places)
    todo = sweep.to_do(states)
    same, stale = sweep.combinations - len(sweep.jobs), sum(state.status == STALE for state in states.values())
    log(
        f"{sweep.name}: {len(sweep.jobs)} runs"
        + (f" ({sweep.combinations} combinations, {same} of them the same run as another)" if same else "")
        + f", {len(sweep.jobs) - len(todo)} finished before, {len(todo)} to do"
        + (f" ({stale} of them finished by another version of the code)" if stale else "")
    )
    if dry_run:
        for job in sweep.jobs:
            log(f"  {states.get(job.key, State()).status:8}  {sweep.title(job)}")
    elif todo:
        try:
            from pa_core.lab.workers import pool
        except ImportError as error:
            allowed = "must be installed: pip install 'pa-core[sweep]', or -r requirements.txt"
            raise ParameterError("dask", str(error.name).partition(".")[0], allowed) from error
        folder = _folder(sweep)
        try:
            with pool(len(todo), cpu=all(job.experiment.device == "cpu" for job in todo), **where) as workers:
                _make(sweep, todo, states, places, folder, workers, log)
        finally:
            table(sweep, states).to_csv(folder / "report.csv", index=False)
            log(f"the report is {shown(folder / 'report.csv')}")
    return table(sweep, states)


def _folder(sweep: Sweep) -> Path:
    """Of this sweep's own: for what is under way, what failed, and the report."""
    above = runs_home(sweep.runs_dir) / "sweeps" / sweep.name
    try:
        above.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError("runs_dir", sweep.runs_dir, f"must be a folder to write in ({error.strerror})") from error
    return Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=above))


def _parameters(sweep: Sweep, job: Job, place: Path) -> dict[str, Any]:
    """All that the notebook or the experiment is given, whatever the notebook itself says, with absolute paths."""
    parameters = job.experiment.to_dict()
    for name in ("data_dir", "pretrained", "runs_dir"):  # a worker may have another working directory
        if isinstance(parameters[name], str) and (name, parameters[name]) != ("runs_dir", "runs"):
            parameters[name] = str(Path(parameters[name]).expanduser().absolute())
    if sweep.notebook and "figures_dir" in notebooks.values(sweep.notebook):
        parameters["figures_dir"] = str(place.with_suffix(".figures"))
    return parameters


def _make(
    sweep: Sweep, todo: Sequence[Job], states: dict[str, State], places: Places, folder: Path, pool: Any, log: Log
) -> None:
    """Give the jobs out and note in ``states`` how each ends."""
    from distributed import as_completed

    import pa_core.experiment  # noqa: F401, loads torch now: look-ups between runs are quick then, and so is Ctrl-C
    from pa_core.lab.workers import Children, Task, execute, train

    expected = estimate(sweep, todo, workers=pool.count)
    gpus = f", a GPU each of {', '.join(pool.gpus)}" if pool.gpus else ""
    log(f"{pool.count} at a time, threads of each: {pool.threads}{gpus}; {duration(expected)}")
    path = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PA_RUNS": str(runs_home().absolute()), "PA_DATA": str(data_home().absolute())}
    environment |= {"PYTHONPATH": os.pathsep.join(path), "JUPYTER_PREFER_ENV_PATH": "1"}
    common = (sweep.notebook, Path.cwd(), environment, pool.threads, pool.gpus, folder.name)
    pool.client.register_plugin(Children(own=pool.own), name=folder.name)
    futures = {}
    for job in todo:
        task = Task(folder / job.key, _parameters(sweep, job, folder / job.key), *common)
        options = {"key": f"{folder.name}-{job.key}", "retries": RETRIES, "resources": pool.resources}
        futures[pool.client.submit(execute if sweep.notebook else train, task, **options)] = job
    started = time.perf_counter()
    try:
        for count, future in enumerate(as_completed(futures, loop=pool.client.loop), 1):
            job = futures[future]
            state = states[job.key] = _outcome(future, folder / job.key, partial(places, job.experiment))
            left = (time.perf_counter() - started) / count * (len(todo) - count)
            what = ", ".join(filter(None, [state.error, state.cell])) or (state.run.name if state.run else "")
            after = f"; {duration(left)} left" if left else ""
            log(f"[{count}/{len(todo)}] {state.status}: {sweep.title(job)}: {what}{after}")
    except KeyboardInterrupt:
        log("interrupted: stopping the runs under way; the same command goes on from their checkpoints")
        pool.client.cancel(list(futures))  # so that what is stopped is not given out again
        raise
    finally:  # ends the processes that are left; a worker that has just come has none, and no plugin
        with suppress(KeyError):
            pool.client.unregister_worker_plugin(folder.name)


def _outcome(future: Any, place: Path, locate: Callable[[], Path]) -> State:
    """How a job ended. It is finished only if the run with its identity is."""
    error, cell = "", ""
    if future.status == FINISHED:
        error, cell = future.result()
    else:
        error = " ".join(str(future.exception() if future.status == "error" else "it was cancelled").split())
    path = None if error else locate()
    if path and read_json(path / "manifest.json").get("status") == FINISHED:
        return State(FINISHED, path, kept=_keep(place, path))
    error = error or f"it ended without its run {path}; was the code changed since the sweep began?"
    kept = next(filter(Path.exists, (place.with_suffix(ending) for ending in (".ipynb", ".log"))), "")
    return State(FAILED, error=error, cell=cell, kept=str(kept))


def _keep(place: Path, path: Path) -> str:
    """Move the executed notebook and its figures to the run; what another sweep put there first, stays."""
    for ending, target in ((".ipynb", path / "notebook.ipynb"), (".figures", path / "figures")):
        if place.with_suffix(ending).exists() and not target.exists():
            os.replace(place.with_suffix(ending), target)
    for left in place.parent.glob(f"{place.name}.*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return str(next(filter(Path.exists, [path / "notebook.ipynb", path])))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "no finished run tells how long they take"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


# The command


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 when every run is finished, 1 when some failed, 2 when the file is refused, 130 when stopped."""
    parser = argparse.ArgumentParser(prog="python -m pa_core.lab.sweep", description="Make the runs of a sweep file.")
    parser.add_argument("file", help="a YAML file with the keys notebook, base, grid, arms, seeds")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, start none")
    add_shares(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--scheduler", metavar="ADDRESS", help="use a running Dask cluster, such as tcp://node:8786")
    where.add_argument("--cluster", metavar="FILE", help="start one through dask-jobqueue, from a YAML file")
    options = vars(parser.parse_args(words))
    for name in ("SIGTERM", "SIGHUP"):  # ask to stop, and get the same good order as Ctrl-C
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        frame = run(options.pop("file"), **options)
    except ParameterError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    failed = frame.loc[frame["status"] == FAILED].drop_duplicates(["error", "cell", "kept"])
    for row in failed.to_dict("records"):
        print(f"failed: {row['error']}\n    {row['cell'] or 'no cell'}\n    {row['kept']}", file=sys.stderr)
    if not options["dry_run"]:
        done = list(frame["status"]).count(FINISHED)
        print(f"{done} of {len(frame)} finished, {len(frame) - done} failed")
    return 1 if len(failed) else 0


def add_shares(parser: argparse.ArgumentParser) -> None:
    """Add the options that divide this machine."""
    parser.add_argument("--workers", type=int, help="runs at a time; by default one per GPU, or per core")
    parser.add_argument("--threads", type=int, help="threads of each run; by default cores divided by workers")


if __name__ == "__main__":
    sys.exit(main())
