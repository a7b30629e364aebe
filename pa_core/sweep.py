"""A file -> many runs: ``python -m pa_core.sweep params/sweeps/threshold.yaml``.

    notebook: 03_proxy_loop           # a notebook of notebooks/, the path of one, or none; this is the default
    base: {dataset: fashion_mini}     # parameters of every run, or the path of a params file
    grid: {threshold: [0.1, 0.4]}     # every combination of these values
    arms:                             # named sets of parameters
      plain: {schedule: "40"}
      proxies: {schedule: "20,p,20"}
    seeds: [0, 1, 2]

Every combination of grid, arms and seeds is a run, a `papermill` process on a Dask worker: of this machine, of a running
Dask cluster, or of a batch system. With ``notebook: none`` the worker itself makes the same run, without a kernel to start and a
notebook to keep, which pays where runs take less than a minute. What is finished is known by the runs' digests, so a sweep that was stopped in whatever way
is continued by the same command. Importing this module loads neither torch nor Dask.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from pa_core.params import COERCE, Experiment, ParameterError, data_home, home, nearest, runs_home, shown

KEYS = ("notebook", "base", "grid", "arms", "seeds")
NOTEBOOK = "03_proxy_loop"
ATTEMPTS = 3
"""How often a run is given out whose process dies without a word: killed, out of memory, a port taken just then."""
WORKER_DEATHS = 10
"""How many workers may die under a run before it counts as their murderer."""
CONNECT_SECONDS = 10
"""How long a Dask scheduler has to answer."""
GRACE = 5
"""Seconds that a process has to end by itself when a sweep is stopped."""
TRIM = "MALLOC_TRIM_THRESHOLD_"
"""Dask has its workers return memory to the system at once, and what they start inherits it: training is a third slower then."""
TO_DO, FINISHED, FAILED = "to do", "finished", "failed"

Log = Callable[[str], None]


def say(text: str) -> None:
    print(text, flush=True)


# A file -> jobs


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep.

    Attributes:
        experiment: its parameters, checked.
        names: the parameters that the file sets, the only ones that are handed to the notebook.
        arms: the arms that it belongs to: more than one where they differ only in what has no effect; ``("",)`` without arms.
    """

    experiment: Experiment
    names: tuple[str, ...]
    arms: tuple[str, ...]

    @property
    def key(self) -> str:
        """The same for two jobs whose parameters make the same run (12 hex digits)."""
        e = self.experiment
        places = [e.dataset, e.data_dir, e.image_size, e.bad_images, e.pretrained, e.runs_dir]
        return hashlib.sha256(json.dumps([e.effective(), places], sort_keys=True).encode()).hexdigest()[:12]

    @property
    def parameters(self) -> dict[str, Any]:
        return {name: getattr(self.experiment, name) for name in self.names}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a file asks for.

    Attributes:
        name: of the file, without its ending.
        notebook: path; None where the worker itself makes the runs.
        jobs: the runs, each once.
        combinations: how many combinations of grid, arms and seeds there are, those that make the same run included.
        varied: the parameters that differ between jobs.
    """

    name: str
    notebook: Path | None
    jobs: tuple[Job, ...]
    combinations: int
    varied: tuple[str, ...]

    def title(self, job: Job) -> str:
        """What tells a job from the others: ``mean  threshold=0.4 seed=1``."""
        values = " ".join(f"{name}={getattr(job.experiment, name)}" for name in self.varied)
        return "  ".join(filter(None, [", ".join(job.arms), values])) or job.experiment.schedule


def read(path: str | os.PathLike) -> Sweep:
    """Expand and check a sweep file.

    Raises:
        ParameterError: the file cannot be read, or a key or a value in it is not allowed; the message names both.
    """
    path = Path(path)
    return expand(read_yaml(path), name=path.stem, folder=path.absolute().parent)


def expand(content: Mapping[str, Any], *, name: str = "sweep", folder: Path | None = None) -> Sweep:
    """Every combination of grid, arms and seeds, checked.

    Args:
        content: what a sweep file holds.
        name: of the sweep: its reports lie under ``sweeps/NAME`` in the runs folder.
        folder: where relative paths of ``notebook`` and ``base`` begin; the working directory by default.

    Raises:
        ParameterError: see :func:`read`.
    """
    folder = folder or Path.cwd()
    for key in content:
        if key not in KEYS:
            raise _refusal(
                name, key, content[key], f"there is no such key{nearest(key, KEYS)}; allowed are {', '.join(KEYS)}"
            )
    if not any(content.get(key) for key in ("grid", "arms", "seeds")):
        raise _refusal(
            name, "keys", sorted(map(str, content)), "allowed is a sweep with at least one of grid, arms and seeds"
        )
    base = _base(name, content.get("base"), folder)
    axes = _axes(name, content)
    arms = _arms(name, content.get("arms"), taken=axes)
    jobs: dict[str, Job] = {}
    count = 0
    for arm, values in itertools.product(arms, itertools.product(*axes.values())):
        chosen = dict(zip(axes, values, strict=True))
        origins = dict.fromkeys(base, "base") | dict.fromkeys(arms[arm], f"arms.{arm}") | {n: _origin(n) for n in axes}
        job = _job(name, base | arms[arm] | chosen, origins, arm)
        before = jobs.get(job.key, replace(job, arms=()))
        jobs[job.key] = replace(before, arms=(*before.arms, *({arm} - set(before.arms))))
        count += 1
    different = [n for n in COERCE if len({str(getattr(job.experiment, n)) for job in jobs.values()}) > 1]
    notebook = _notebook(name, content.get("notebook") or NOTEBOOK, folder)
    return Sweep(name=name, notebook=notebook, jobs=tuple(jobs.values()), combinations=count, varied=tuple(different))


def _refusal(name: str, key: Any, value: Any, allowed: str) -> ParameterError:
    return ParameterError(f"{name}: {key}", value, allowed)


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is refused instead of the first being forgotten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(), _Loader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ParameterError("file", str(path), f"it cannot be read ({reason}); allowed is a YAML file") from error
    if not isinstance(content, dict):
        raise ParameterError("file", str(path), f"allowed is a YAML file with keys out of {', '.join(KEYS)}")
    return content


def _base(name: str, value: Any, folder: Path) -> dict[str, Any]:
    """The parameters of every run, given here or as a params file's path."""
    if isinstance(value, str):
        value = read_yaml(folder / Path(value).expanduser())
    return _mapping(name, "base", value)


def _mapping(name: str, key: str, value: Any) -> dict[str, Any]:
    """A mapping of parameters; one that was a schedule before YAML read it is told so."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _refusal(name, key, value, "allowed are names and values of parameters, such as {threshold: 0.4}")
    for parameter in value:
        if parameter not in COERCE:
            if "schedule" in value and (parameter == "p" or str(parameter).isdigit()) and value[parameter] is None:
                parts = ",".join(str(v) for v in (value["schedule"], *(k for k in value if value[k] is None)))
                raise _refusal(
                    name, f"{key}.schedule", value["schedule"], f"YAML took it apart at its commas; quote it: '{parts}'"
                )
            allowed = f"there is no such parameter{nearest(str(parameter), COERCE)}; see the parameter table"
            raise _refusal(name, f"{key}.{parameter}", value[parameter], allowed)
    return value


def _axes(name: str, content: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Parameter -> the values it takes, of grid and seeds."""
    grid = _mapping(name, "grid", content.get("grid"))
    axes = {parameter: _values(name, f"grid.{parameter}", values) for parameter, values in grid.items()}
    if content.get("seeds") is not None:
        if "seed" in axes:
            raise _refusal(name, "grid.seed", grid["seed"], "seeds gives it already; allowed is one of the two")
        axes["seed"] = _values(name, "seeds", content["seeds"])
    return axes


def _values(name: str, key: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise _refusal(name, key, values, "allowed is a list of values, such as [1, 2]")
    if key == "grid.runs_dir":
        raise _refusal(name, key, values, "a sweep has one runs folder; allowed is runs_dir in base")
    if key == "grid.schedule" and "p" in values:
        raise _refusal(
            name, key, values, "YAML took a schedule apart at its commas; quote each, such as ['40', '20,p,20']"
        )
    parameter = "seed" if key == "seeds" else key.removeprefix("grid.")
    coerced = []
    for value in values:
        try:
            coerced.append(COERCE[parameter](value))
        except ValueError as error:
            raise _refusal(name, key, value, str(error)) from None
    twice = [value for value in coerced if coerced.count(value) > 1]
    if twice:
        raise _refusal(name, key, twice[0], "it stands there twice; allowed is a list of different values")
    return coerced


def _arms(name: str, value: Any, *, taken: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> parameters; a sweep without arms has one without a name."""
    if value is None:
        return {"": {}}
    if not isinstance(value, dict) or not value:
        raise _refusal(name, "arms", value, "allowed are names with parameters, such as {plain: {schedule: '40'}}")
    arms = {str(arm): _mapping(name, f"arms.{arm}", parameters) for arm, parameters in value.items()}
    for arm, parameters in arms.items():
        for parameter in parameters:
            if parameter in taken:
                allowed = f"{_origin(parameter, taken)} gives it already; allowed is one of the two"
                raise _refusal(name, f"arms.{arm}.{parameter}", parameters[parameter], allowed)
            if parameter == "runs_dir":
                raise _refusal(name, f"arms.{arm}.runs_dir", parameters[parameter], "allowed is runs_dir in base")
    return arms


def _origin(parameter: str, _taken: Any = None) -> str:
    return "seeds" if parameter == "seed" else f"grid.{parameter}"


def _job(name: str, values: Mapping[str, Any], origins: Mapping[str, str], arm: str) -> Job:
    try:
        experiment = Experiment.from_mapping(values)
    except ParameterError as error:
        origin = origins.get(error.name, "")
        key = origin if origin in ("seeds", f"grid.{error.name}") else ".".join(filter(None, [origin, error.name]))
        raise _refusal(name, key, error.value, error.allowed) from None
    return Job(experiment=experiment, names=tuple(values), arms=(arm,))


def _notebook(name: str, value: Any, folder: Path) -> Path | None:
    """A notebook of this repository by its name, or any by its path, from the sweep file or the working directory; ``none``."""
    text = str(value)
    if text == "none":
        return None
    ending = "" if text.endswith(".ipynb") else ".ipynb"
    places = [home() / "notebooks" / f"{text}{ending}", folder / f"{text}{ending}", Path(f"{text}{ending}").absolute()]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = sorted(path.stem for path in (home() / "notebooks").glob("*.ipynb"))
        raise _refusal(
            name,
            "notebook",
            value,
            f"there is no such file{nearest(text, known)}; allowed is one of {', '.join(known)}, a path, or none",
        )
    if not _parameter_cell(found):
        raise _refusal(
            name, "notebook", value, "it has no cell with the tag parameters, so that papermill could set none"
        )
    return found


def _parameter_cell(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    return "".join("".join(cell["source"]) for cell in tagged)


# What is there already


class _Places:
    """Where runs lie, by their exact identity. The data's digest is looked up once per dataset; no model is loaded."""

    def __init__(self) -> None:
        self._data: dict[tuple, tuple[str, int]] = {}

    def __call__(self, experiment: Experiment) -> Path:
        from pa_core.experiment import (
            load_data,
            locate,
        )  # loads torch, which a sweep with nothing to look up never needs

        key = (experiment.dataset, experiment.data_dir, experiment.image_size, experiment.bad_images)
        if key not in self._data:
            dataset = load_data(experiment)
            self._data[key] = dataset.digest, dataset.image_size
        digest, size = self._data[key]
        return locate(experiment, data_digest=digest, image_size=size)


@dataclass(frozen=True, kw_only=True)
class State:
    """How far a job is.

    Attributes:
        status: to do, finished or failed.
        run: its directory, when that is known.
        error, cell: of a failed one: what was raised, and in which cell.
        kept: folder or file with what is left of it.
        seconds: it took in this sweep.
    """

    status: str = TO_DO
    run: Path | None = None
    error: str = ""
    cell: str = ""
    kept: str = ""
    seconds: float = float("nan")


def finished(sweep: Sweep, places: _Places | None = None) -> dict[str, State]:
    """Job key -> state, for the jobs whose run is finished.

    A job is looked up, with its data, only if some finished run has its dataset, model and schedule: nothing is downloaded for it.
    """
    places, found = places or _Places(), {}
    if not any(runs_home(sweep.jobs[0].experiment.runs_dir).glob("*/manifest.json")):
        return found
    from pa_core import results  # loads torch

    frame = results.load(sweep.jobs[0].experiment.runs_dir)
    done = frame[frame["status"] == FINISHED]
    names = ["dataset", "model", "schedule"]
    there, lying = set(done[names].itertuples(index=False, name=None)), set(done["run"])
    for job in sweep.jobs:
        if tuple(getattr(job.experiment, name) for name in names) in there:
            try:
                path = places(job.experiment)
            except ParameterError:
                continue  # the run itself will say what is wrong, and where
            if path.name in lying:
                found[job.key] = State(status=FINISHED, run=path)
    return found


def table(sweep: Sweep, states: Mapping[str, State]) -> pd.DataFrame:
    """A row per arm and run: ``arm``, ``status``, ``error``, ``cell``, ``kept``, what varies, and what `results.load` knows of the run."""
    rows = []
    for job in sweep.jobs:
        state = states.get(job.key, State())
        common = {"status": state.status, "run": state.run.name if state.run else None, "error": state.error}
        common |= {"cell": state.cell, "kept": state.kept} | job.experiment.to_dict()
        rows += [{"arm": arm} | common for arm in job.arms]
    frame = pd.DataFrame(rows)
    if any(state.run for state in states.values()):
        from pa_core import results  # loads torch

        known = results.load(sweep.jobs[0].experiment.runs_dir)
        extra = [name for name in known.columns if name == "run" or name not in frame.columns]
        frame = frame.merge(known[extra], on="run", how="left")
    first = ["arm", "status", *sweep.varied]
    return frame[first + [name for name in frame.columns if name not in first]]


def estimate(sweep: Sweep, jobs: Sequence[Job], *, workers: int) -> float | None:
    """Seconds that these jobs will take, from the finished runs of the same data, models and protocols; None where some have none."""
    if not any(runs_home(sweep.jobs[0].experiment.runs_dir).glob("*/manifest.json")):
        return None
    from pa_core import results  # loads torch

    frame = results.load(sweep.jobs[0].experiment.runs_dir)
    done = frame[(frame["status"] == FINISHED) & (frame["epochs"] > 0)]
    each = (done["train_seconds"] + done["proxy_seconds"]) / done["epochs"]
    per_epoch = each.groupby([_alike(row) for row in done[list(ALIKE)].to_dict("records")]).median()
    seconds = [per_epoch.get(_alike(j.experiment.to_dict()), float("nan")) * j.experiment.length for j in jobs]
    total = sum(seconds) + start_seconds(sweep) * len(jobs)
    return None if total != total else max(total / max(1, min(workers, len(jobs))), max(seconds, default=0))


ALIKE = ("dataset", "data_dir", "model", "train_fraction", "protocol")
"""What runs have in common whose epochs take about as long."""


def _alike(parameters: Mapping[str, Any]) -> str:
    known = {name: parameters[name] for name in ALIKE}
    place = known["data_dir"]  # NaN in a table of runs where there is none
    return str(known | {"data_dir": str(Path(place).expanduser().absolute()) if isinstance(place, str) else None})


def start_seconds(sweep: Sweep) -> float:
    """What a run takes besides its epochs, about: data and test images; with a notebook also kernel, imports and figures."""
    return 10 if sweep.notebook else 2


# Workers


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How runs share this machine: ``workers`` at a time, ``threads`` each, and a GPU each where there are some."""

    workers: int
    threads: int
    gpus: tuple[str, ...] = ()


def machine(*, workers: int | None = None, threads: int | None = None, cpu: bool = False) -> Machine:
    """This machine, divided: a run per GPU; without GPUs a run per core, or fewer where memory is short (2 GB each).

    How it is divided depends on the machine and the arguments alone, not on what is left to do, because the sums
    of floats depend on the number of threads.

    Args:
        workers, threads: runs at a time, threads of each; one follows from the other.
        cpu: leave the GPUs alone.
    """
    from dask.system import CPU_COUNT  # does
    from distributed.system import MEMORY_LIMIT  # knows of limits of containers, as

    devices = () if cpu else gpus()
    if workers is None:
        most = len(devices) or max(1, min(CPU_COUNT, MEMORY_LIMIT // 2**31))
        workers = most if threads is None else max(1, min(most, CPU_COUNT // threads))
    return Machine(workers=workers, threads=threads or max(1, CPU_COUNT // workers), gpus=devices)


def gpus() -> tuple[str, ...]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES takes them, found without loading torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return tuple(name.strip() for name in names if name.strip() not in ("", "-1"))
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
    return tuple(str(number) for number in range(count))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker needs to know of a job: plain values, so that it travels.

    Attributes:
        arguments: of the Python interpreter; empty where the worker itself makes the run.
        experiment: its parameters, then.
        threads: of the run.
        output: the executed notebook.
        log: what the process prints.
        gpus: one of them is for this process, by the number of the worker; empty to leave that to the worker's environment.
        plugin: name of the sweep's :func:`_children` on each worker.
    """

    arguments: tuple[str, ...]
    experiment: Mapping[str, Any]
    threads: int
    output: Path
    log: Path
    folder: Path
    environment: Mapping[str, str]
    gpus: tuple[str, ...]
    plugin: str


class Killed(RuntimeError):
    """A run's process died without an error of its own; the run is given out again."""


class Stopped(RuntimeError):
    """The sweep was stopped while the run was under way."""


class Children:
    """The processes that a worker has started. Dask takes it for a plugin; when the worker or the sweep ends, so do they.

    Attributes:
        own: whether the worker is the sweep's own, on this machine, and thus gets the terminal's Ctrl-C, too.
    """

    def __init__(self, *, own: bool) -> None:
        self.own = own

    def setup(self, worker: Any) -> None:
        self.running: set[subprocess.Popen] = set()
        self.stopped, self.lock = False, threading.Lock()
        if self.own:  # it ends when the sweep does; a handler that does nothing, because SIG_IGN would be inherited
            signal.signal(signal.SIGINT, lambda *_: None)

    def teardown(self, worker: Any) -> None:
        """Interrupt the processes and what they started; kill what has not ended after some seconds."""
        import psutil

        with self.lock:
            self.stopped = True
            processes = [psutil.Process(process.pid) for process in self.running if process.poll() is None]
        leaves, family = [], []
        for process in processes:
            try:
                below = process.children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            leaves += below or [process]
            family += [process, *below]
        for process in leaves:  # a kernel notes in its run that it was interrupted, and papermill then ends, too
            _send(process, signal.SIGINT)
        _, alive = psutil.wait_procs(family, timeout=GRACE)
        for process in alive:
            _send(process, signal.SIGKILL)

    @contextmanager
    def process(self, *arguments: Any, **keywords: Any) -> Iterator[subprocess.Popen]:
        with self.lock:
            if self.stopped:
                raise Stopped
            # A session of its own: Ctrl-C in the terminal is for the sweep, which ends its processes in good order.
            process = subprocess.Popen(*arguments, **keywords, start_new_session=True)
            self.running.add(process)
        try:
            yield process
        finally:
            self.running.discard(process)


def _send(process: Any, what: int) -> None:
    import psutil

    try:
        process.send_signal(what)
    except psutil.NoSuchProcess:  # it has just ended
        pass


def work(task: Task) -> tuple[str, str, float]:
    """On a worker: run a job's process to its end.

    Returns:
        Error and cell, both empty when all went well, and seconds.

    Raises:
        Killed: to be given out again.
    """
    from distributed import get_worker

    started = time.perf_counter()
    worker = get_worker()
    environment = {k: v for k, v in os.environ.items() if k != TRIM} | task.environment
    if task.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = task.gpus[int(worker.name) % len(task.gpus)]
    task.output.unlink(missing_ok=True)
    children = worker.plugins[task.plugin]
    with open(task.log, "ab") as log:
        command = [sys.executable, *task.arguments]
        with children.process(
            command, cwd=task.folder, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
        ) as process:
            code = process.wait()
    if code and children.stopped:
        raise Stopped
    error, cell = raised(task.output) if code else ("", "")
    if code and not error:
        last = (task.log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code} and no error in a cell"
        raise Killed(f"its process {how}; the last it said: {last or 'nothing'}")
    return error, cell, time.perf_counter() - started


def work_here(task: Task) -> tuple[str, str, float]:
    """On a worker: make a job's run in this process. Returns what :func:`work` does; the traceback of an error is in the log."""
    from distributed import get_worker

    os.environ.update(task.environment)
    if task.gpus:  # before CUDA is asked for anything; a worker keeps its GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = task.gpus[int(get_worker().name) % len(task.gpus)]
    import torch

    from pa_core import experiment

    started, children = time.perf_counter(), get_worker().plugins[task.plugin]
    torch.set_num_threads(task.threads)
    with open(task.log, "a") as log:

        def note(text: str) -> None:
            print(text, file=log, flush=True)
            if children.stopped:  # on a cluster that goes on without this sweep
                raise KeyboardInterrupt

        try:
            experiment.run(Experiment.from_mapping(task.experiment), log=note)
        except KeyboardInterrupt as interrupt:  # noted in the run's manifest as such
            raise Stopped from interrupt
        except Exception as error:  # whatever it is, it is this run's result, and the others go on
            traceback.print_exc(file=log)
            return f"{type(error).__name__}: {error}", "", time.perf_counter() - started
    return "", "", time.perf_counter() - started


def raised(notebook: Path) -> tuple[str, str]:
    """The error that ended an executed notebook, and its cell: ``("ValueError: ...", "In [4]: run = ...")``; empty when there is none."""
    if not notebook.is_file() or not (text := notebook.read_text()):
        return "", ""
    for cell in json.loads(text)["cells"]:
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                source = [line for line in "".join(cell["source"]).splitlines() if line.strip()]
                return (
                    f"{output['ename']}: {output['evalue']}",
                    f"In [{cell.get('execution_count')}]: {source[-1] if source else ''}",
                )
    return "", ""


# Clusters


JOBQUEUES = {
    "htcondor": "HTCondor",
    "lsf": "LSF",
    "moab": "Moab",
    "oar": "OAR",
    "pbs": "PBS",
    "sge": "SGE",
    "slurm": "SLURM",
}


def _dask() -> None:
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise ParameterError(
            "sweep", "without Dask", "a sweep needs Dask; pip install 'pa-core[sweep]' or -r requirements.txt"
        ) from error


@contextmanager
def _local(here: Machine, workers: int) -> Iterator[Any]:
    """A cluster of this machine, a process per worker. Free ports everywhere: sweeps do not get in each other's way."""
    import dask
    from distributed import LocalCluster

    spawned = {k: v for k, v in dask.config.get("distributed.nanny.pre-spawn-environ").items() if k != TRIM}
    with dask.config.set(
        {"distributed.scheduler.allowed-failures": WORKER_DEATHS, "distributed.nanny.pre-spawn-environ": spawned}
    ):
        options = {"dashboard_address": ":0", "memory_limit": 0, "silence_logs": logging.CRITICAL}
        with LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, **options) as cluster:
            yield cluster


def job_cluster(file: str | os.PathLike) -> tuple[Any, int, int]:
    """Start the Dask cluster of a file such as ``slurm: {queue: gpu, cores: 4, memory: 16GB, jobs: 8}`` through dask-jobqueue.

    Each of a job's ``processes`` (1 by default) makes one run at a time, with ``cores`` / ``processes`` threads.

    Returns:
        The cluster, not scaled yet; how many ``jobs`` to submit; and threads per run.

    Raises:
        ParameterError: the file asks for something that does not exist.
    """
    content = read_yaml(Path(file))
    kind = next(iter(content), None)
    if len(content) != 1 or kind not in JOBQUEUES or not isinstance(content[kind], dict):
        allowed = f"allowed is one of {', '.join(JOBQUEUES)} with the keywords of dask-jobqueue{nearest(str(kind), JOBQUEUES)}"
        raise ParameterError("cluster", content, allowed)
    import dask_jobqueue

    options = dict(content[kind])
    jobs, processes = options.pop("jobs", 1), options.setdefault("processes", 1)
    options["worker_extra_args"] = [*options.get("worker_extra_args", []), "--resources", "run=1"]
    try:
        cluster = getattr(dask_jobqueue, f"{JOBQUEUES[kind]}Cluster")(**options)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ParameterError("cluster", content, f"dask-jobqueue refuses it ({reason})") from error
    return cluster, jobs, max(1, int(options.get("cores", 1)) // processes)


@dataclass(frozen=True, kw_only=True)
class _Workers:
    """A Dask client, and how its workers are used."""

    client: Any
    count: int
    threads: int
    own: bool = False
    gpus: tuple[str, ...] = ()
    resources: Mapping[str, int] = field(default_factory=dict)


@contextmanager
def _workers(
    here: Machine | None, jobs: int, *, threads: int | None, scheduler: str | None, cluster: str | None
) -> Iterator[_Workers]:
    from distributed import Client

    with ExitStack() as stack:
        if scheduler:
            try:
                client = stack.enter_context(Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False))
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise ParameterError(
                    "scheduler", scheduler, f"no Dask scheduler answers there ({reason}); allowed is its address"
                ) from error
            count = sum(client.nthreads().values())
            yield _Workers(client=client, count=count, threads=threads or 1)
        elif cluster:
            started, count, each = job_cluster(cluster)
            stack.enter_context(started).scale(jobs=count)
            client = stack.enter_context(Client(started, set_as_default=False))
            yield _Workers(client=client, count=count, threads=threads or each, resources={"run": 1})
        else:
            count = min(here.workers, jobs)
            started = stack.enter_context(_local(here, count))
            client = stack.enter_context(Client(started, set_as_default=False))
            yield _Workers(client=client, count=count, threads=here.threads, own=True, gpus=here.gpus)


# The sweep


def run(
    source: str | os.PathLike | Mapping[str, Any] | Sweep,
    *,
    workers: int | None = None,
    threads: int | None = None,
    scheduler: str | None = None,
    cluster: str | os.PathLike | None = None,
    dry_run: bool = False,
    log: Log = say,
) -> pd.DataFrame:
    """Make the runs of a sweep that are not finished yet.

    Args:
        source: a sweep file, or what it would hold.
        workers, threads: see :func:`machine`.
        scheduler: address of a running Dask cluster to use instead of this machine. It makes as many runs at a time as its
            workers have threads.
        cluster: a file for :func:`job_cluster`.
        dry_run: only list the runs.

    Returns:
        See :func:`table`; a failed run has its error and cell there.

    Raises:
        ParameterError: before the first run: the file asks for something that does not exist, or Dask is missing.
        KeyboardInterrupt: after the runs under way were stopped.
    """
    sweep = source if isinstance(source, Sweep) else expand(source) if isinstance(source, Mapping) else read(source)
    places = _Places()
    states = finished(sweep, places)
    todo = [job for job in sweep.jobs if job.key not in states]
    same = sweep.combinations - len(sweep.jobs)
    log(
        f"{sweep.name}: {len(sweep.jobs)} runs"
        + (f" ({sweep.combinations} combinations, {same} of them the same run as another)" if same else "")
        + f", {len(states)} finished before, {len(todo)} to do"
    )
    if dry_run:
        for job in sweep.jobs:
            log(f"  {states.get(job.key, State()).status:8}  {sweep.title(job)}")
        return table(sweep, states)
    if todo:
        _dask()
        here = None
        if not scheduler and not cluster:
            here = machine(workers=workers, threads=threads, cpu=all(job.experiment.device == "cpu" for job in todo))
        with (
            _folder(sweep) as folder,
            _workers(here, len(todo), threads=threads, scheduler=scheduler, cluster=cluster) as pool,
        ):
            try:
                _make(sweep, todo, states, places, folder, pool, log)
            finally:
                table(sweep, states).to_csv(folder / "report.csv", index=False)
                log(f"the report is {shown(folder / 'report.csv')}")
    return table(sweep, states)


@contextmanager
def _folder(sweep: Sweep) -> Iterator[Path]:
    """A folder of this sweep's own for what is under way, what failed, and the report."""
    above = runs_home(sweep.jobs[0].experiment.runs_dir) / "sweeps" / sweep.name
    try:
        above.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        allowed = f"no folder can be made there ({error.strerror}); allowed is a folder that can be written"
        raise ParameterError("runs_dir", sweep.jobs[0].experiment.runs_dir, allowed) from error
    yield Path(tempfile.mkdtemp(prefix=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-", dir=above))


# papermill in a process that ends when its standard input does, which is when the worker dies in whatever way; the kernel ends
# with it. A run thus never goes on unseen, or beside its second attempt.
_PAPERMILL = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
sys.argv[0] = "papermill"
runpy.run_module("papermill", run_name="__main__", alter_sys=True)
"""


def _task(sweep: Sweep, job: Job, folder: Path, pool: _Workers) -> Task:
    """A job as a worker takes it; its notebook, log and figures stay in ``folder`` until the run is finished."""
    number = str(pool.threads)
    environment = {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number}
    environment |= {"PA_RUNS": str(runs_home().absolute()), "PA_DATA": str(data_home().absolute())}
    task = Task(
        arguments=(),
        experiment=job.parameters | _anywhere(job.experiment),
        threads=pool.threads,
        output=folder / f"{job.key}.ipynb",
        log=folder / f"{job.key}.log",
        folder=Path.cwd(),
        environment=environment,
        gpus=pool.gpus,
        plugin=folder.name,
    )
    return replace(task, **_papermill(sweep.notebook, job, task)) if sweep.notebook else task


def _anywhere(experiment: Experiment) -> dict[str, str]:
    """The paths among its parameters as a worker with another working directory finds them."""
    paths = {"data_dir": experiment.data_dir, "pretrained": experiment.pretrained}
    paths |= {"runs_dir": experiment.runs_dir} if experiment.runs_dir != "runs" else {}
    return {name: str(Path(path).expanduser().absolute()) for name, path in paths.items() if isinstance(path, str)}


def _papermill(notebook: Path, job: Job, task: Task) -> dict[str, Any]:
    """Arguments and environment of its papermill process."""
    places = (
        {"figures_dir": str(task.output.with_suffix(".figures"))}
        if re.search(r"(?m)^figures_dir\s*=", _parameter_cell(notebook))
        else {}
    )
    parameters = task.output.with_suffix(".yaml")
    parameters.write_text(yaml.safe_dump(job.parameters | places, sort_keys=False))
    words = ["-c", _PAPERMILL, str(notebook), str(task.output), "-f", str(parameters), "--no-progress-bar"]
    words += ["--log-level", "WARNING", "--stdout-file", "-", "--stderr-file", "-"]
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    return {
        "arguments": tuple(words),
        "environment": task.environment | {"PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"},
    }


def _make(
    sweep: Sweep, todo: Sequence[Job], states: dict[str, State], places: _Places, folder: Path, pool: _Workers, log: Log
) -> None:
    """Give the jobs out and note in ``states`` how each ends."""
    from distributed import as_completed

    import pa_core.experiment  # noqa: F401, loads torch now: look-ups between runs are quick then, and so is Ctrl-C

    expected = estimate(sweep, todo, workers=pool.count)
    log(
        f"{pool.count} at a time with {_many(pool.threads, 'thread')} each"
        + (f", a GPU each of {', '.join(pool.gpus)}" if pool.gpus else "")
        + "; "
        + (
            "how long is not known, no run of such a dataset and model has finished"
            if expected is None
            else f"about {duration(expected)}"
        )
    )
    pool.client.register_plugin(_children(own=pool.own), name=folder.name)
    tasks = {job.key: _task(sweep, job, folder, pool) for job in todo}
    options = {"retries": ATTEMPTS - 1, "pure": False, "resources": dict(pool.resources) or None}
    how = work if sweep.notebook else work_here
    futures = {pool.client.submit(how, tasks[job.key], key=f"{folder.name}-{job.key}", **options): job for job in todo}
    started = time.perf_counter()
    try:
        for count, future in enumerate(as_completed(futures, loop=pool.client.loop), 1):
            job = futures[future]
            state = _outcome(future, job, tasks[job.key], places)
            states[job.key] = state
            left = (time.perf_counter() - started) / count * (len(todo) - count)
            what = ", ".join(filter(None, [state.error, state.cell])) or state.run.name
            log(
                f"[{count}/{len(todo)}] {state.status}: {sweep.title(job)}: {what}"
                + (f"; about {duration(left)} left" if left else "")
            )
    except KeyboardInterrupt:
        log("interrupted: stopping the runs under way; the same command goes on from their checkpoints")
        pool.client.cancel(list(futures))  # so that what is stopped is not given out again
        raise
    finally:
        _stop(pool.client, folder.name)  # ends the processes that are left


def _children(*, own: bool) -> Any:
    """The plugin. Dask wants its own class; made here, so that the module loads without Dask."""
    from distributed import WorkerPlugin

    return type("Children", (Children, WorkerPlugin), {})(own=own)


def _stop(client: Any, plugin: str) -> None:
    try:
        client.unregister_worker_plugin(plugin)
    except KeyError:  # a worker that has just come and has no process yet
        pass


def _outcome(future: Any, job: Job, task: Task, places: _Places) -> State:
    """How a job ended. It is finished only if the run with its identity is."""
    kept = str(task.output if task.arguments else task.log)
    if future.status != FINISHED:
        problem = future.exception() if future.status == "error" else "it was cancelled"
        return State(status=FAILED, error=" ".join(str(problem).split()), kept=kept)
    error, cell, seconds = future.result()
    if error:
        return State(status=FAILED, error=error, cell=cell, kept=kept, seconds=seconds)
    path = places(job.experiment)
    manifest = path / "manifest.json"
    if not manifest.is_file() or json.loads(manifest.read_text()).get("status") != FINISHED:
        problem = f"it ended, but did not make its run {path.name}"
        return State(status=FAILED, error=problem, kept=kept, seconds=seconds)
    return State(status=FINISHED, run=path, kept=_keep(task, path), seconds=seconds)


def _keep(task: Task, path: Path) -> str:
    """Move the executed notebook and its figures into the run's directory; what another sweep put there first, stays."""
    places = {task.output: path / "notebook.ipynb", task.output.with_suffix(".figures"): path / "figures"}
    for source, target in places.items():
        if source.exists() and not target.exists():
            os.replace(source, target)
    for left in (*places, task.log, task.output.with_suffix(".yaml")):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return str(path / "notebook.ipynb") if task.arguments else str(path)


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# The command


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 when every run is finished, 1 when some failed, 2 when the file is refused, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m pa_core.sweep", description="Make the runs of a sweep file.")
    parser.add_argument("file", help="a YAML file with the keys notebook, base, grid, arms, seeds")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, start none")
    parser.add_argument("--workers", type=positive, help="runs at a time; by default one per GPU, or per core")
    parser.add_argument(
        "--threads", type=positive, help="threads of each run; by default the cores divided by the workers"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--scheduler", metavar="ADDRESS", help="use a running Dask cluster, such as tcp://node:8786")
    where.add_argument("--cluster", metavar="FILE", help="start one through dask-jobqueue, from a YAML file")
    arguments = parser.parse_args(words)
    if arguments.workers and (arguments.scheduler or arguments.cluster):
        parser.error("--workers is for this machine; a cluster has its own")
    for name in ("SIGTERM", "SIGHUP"):  # ask to stop, and get the same good order as Ctrl-C
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    options = {"workers": arguments.workers, "threads": arguments.threads, "scheduler": arguments.scheduler}
    try:
        frame = run(arguments.file, cluster=arguments.cluster, dry_run=arguments.dry_run, **options)
    except ParameterError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    failed = frame[frame["status"] == FAILED].drop_duplicates(["error", "cell", "kept"])
    for row in failed.itertuples():
        print(f"failed: {row.error}\n    {row.cell or 'no cell'}\n    {row.kept}", file=sys.stderr)
    done = frame["status"] == FINISHED
    if not arguments.dry_run:
        print(f"{done.sum()} of {len(frame)} finished, {len(frame) - done.sum()} failed")
    return 1 if len(failed) else 0


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    # Through the module's own name: what travels to workers must not belong to __main__, which they do not have.
    sys.exit(importlib.import_module("pa_core.sweep").main())
