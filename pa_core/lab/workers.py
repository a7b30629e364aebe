"""Where the runs of a sweep are made: Dask workers of this machine, of a running cluster, or of a batch system.

A run is a `papermill` process that its worker starts, or is made by the worker itself. Importing this loads no torch.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import dask.config
import dask.system
import distributed.system
import yaml
from distributed import Client, LocalCluster, get_worker

from pa_core.errors import ParameterError, did_you_mean
from pa_core.files import data_home, read_yaml, runs_home
from pa_core.params import Experiment

CONNECT_SECONDS = 10  # that a Dask scheduler has to answer
TRIM = "MALLOC_TRIM_THRESHOLD_"
"""Dask has its workers return memory at once, and what they start inherits it: training is a third slower then."""
SETTINGS = {
    f"distributed.nanny.pre-spawn-environ.{TRIM}": None,
    "distributed.scheduler.allowed-failures": 10,  # workers that die while they make the same run
}
# A worker of a running cluster may have several threads; torch's generator and thread count are the process's.
_ONE_AT_A_TIME = threading.Lock()
# A terminal's Ctrl-C is for the sweep, which ends its workers. What they start would inherit SIG_IGN.
_IGNORE_CTRL_C = "import signal\nsignal.signal(signal.SIGINT, lambda *_: None)\n"

# papermill in a process that ends when its standard input does, which is when the sweep is stopped or the worker dies
# in whatever way: no run goes on unseen. The kernel is interrupted, to note it in its run, and ends with papermill.
_PAPERMILL = """
import os, psutil, runpy, signal, sys, threading
def stop():
    try:
        sys.stdin.read()
        below = psutil.Process().children(recursive=True)
        for process in below:
            process.send_signal(signal.SIGINT)
        psutil.wait_procs(below, timeout=3)
    finally:
        os._exit(1)
threading.Thread(target=stop, daemon=True).start()
sys.argv[0] = "papermill"
runpy.run_module("papermill", run_name="__main__", alter_sys=True)
"""
_OPTIONS = "--no-progress-bar --log-level WARNING --stdout-file - --stderr-file -".split()


class Pool(NamedTuple):
    """A number of workers, and ``threads`` and a GPU (where there are some) for the one run at a time of each."""

    workers: int
    threads: int
    gpus: tuple[str, ...] = ()
    client: Any = None  # Dask's
    resources: dict[str, int] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a run needs beside its worker's own."""
        path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
        places = {"PA_RUNS": runs_home(), "PA_DATA": data_home(), "PWD": Path.cwd()}
        fixed = {"PYTHONPATH": path.strip(os.pathsep), "JUPYTER_PREFER_ENV_PATH": "1"}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        return fixed | threads | {name: str(folder.absolute()) for name, folder in places.items()}


def machine(*, workers: int | None = None, threads: int | None = None, cpu: bool = False) -> Pool:
    """This machine, divided: a run per GPU; without GPUs a run per core, or fewer where memory is short (2 GB each).

    Of ``workers`` and ``threads`` one follows from the other; ``cpu`` leaves the GPUs alone. What is left to do plays
    no part, because the sums of floats depend on the number of threads.
    """
    cores, memory = dask.system.CPU_COUNT, distributed.system.MEMORY_LIMIT  # they respect the limits of containers
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ParameterError(name, value, "must be at least 1")
    devices = () if cpu else _gpus()
    if workers is None:
        most = len(devices) or max(1, min(cores, memory // 2**31))
        workers = most if threads is None else max(1, min(most, cores // threads))
    return Pool(workers, threads or max(1, cores // workers), devices)


def _gpus() -> tuple[str, ...]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES takes them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        visible = ",".join(map(str, range(importlib.import_module("torch").cuda.device_count())))
    return tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1"))


# On a worker


def execute(
    place: Path, parameters: dict[str, Any], notebook: Path | None, environment: dict[str, str], gpus: tuple[str, ...]
) -> tuple[str, str]:
    """On a worker: make a run, by papermill or, without a notebook, in this process. ``place`` is a folder to keep.

    Returns:
        Error and the notebook's cell that raised it, both empty when all went well.

    Raises:
        RuntimeError: its process died without an error of its own; Dask starts the run again.
    """
    if gpus:  # one for each worker of this machine; elsewhere its environment says which it has
        environment = environment | {"CUDA_VISIBLE_DEVICES": gpus[int(get_worker().name) % len(gpus)]}
    place.mkdir(exist_ok=True)
    with open(place / "log.txt", "a") as log:
        if notebook:
            (place / "parameters.yaml").write_text(yaml.safe_dump(parameters, sort_keys=False))
            return _by_papermill(place, notebook, environment, log)
        with _ONE_AT_A_TIME:
            return _here(parameters, environment, log)


def _stopped() -> bool:
    """Whether the sweep has cancelled the task of this thread, or has died."""
    worker = get_worker()
    task = worker.state.tasks.get(worker.get_current_task())
    return task is None or task.state == "cancelled"


def _by_papermill(place: Path, notebook: Path, environment: dict[str, str], log: TextIO) -> tuple[str, str]:
    output, values = place / "notebook.ipynb", place / "parameters.yaml"
    output.unlink(missing_ok=True)
    command = [sys.executable, "-c", _PAPERMILL, str(notebook), str(output), "-f", str(values), *_OPTIONS]
    environment = {name: value for name, value in os.environ.items() if name != TRIM} | environment
    # A session of its own, so that Ctrl-C in the terminal does not reach it. Leaving the block closes its input.
    files: Any = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "cwd": environment["PWD"]}
    with subprocess.Popen(command, env=environment, start_new_session=True, **files) as process:
        while process.poll() is None and not _stopped():
            time.sleep(0.1)
    error, cell = raised(output) if process.returncode else ("", "")
    if process.returncode and not error:
        last = ["nothing", *filter(str.strip, (place / "log.txt").read_text(errors="replace").splitlines())][-1]
        raise RuntimeError(f"its process ended with status {process.returncode}; its last output: {last}")
    return error, cell


def raised(notebook: Path) -> tuple[str, str]:
    """The error that ended an executed notebook, and its cell's last line; two empty texts where there is none."""
    text = notebook.read_text() if notebook.is_file() else ""
    for cell in json.loads(text or '{"cells": []}')["cells"]:
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                last = ["", *filter(str.strip, "".join(cell["source"]).splitlines())][-1]
                return f"{output['ename']}: {output['evalue']}", f"In [{cell.get('execution_count')}]: {last}"
    return "", ""


def _here(parameters: dict[str, Any], environment: dict[str, str], log: TextIO) -> tuple[str, str]:
    os.environ.update(environment)  # before CUDA is asked for anything; a worker keeps its GPU
    torch, experiment = (importlib.import_module(name) for name in ("torch", "pa_core.experiment"))
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))

    def note(text: str) -> None:
        print(text, file=log, flush=True)
        if _stopped():
            raise KeyboardInterrupt

    try:
        experiment.run(Experiment.from_mapping(parameters), log=note)
    except KeyboardInterrupt as interrupt:  # noted in the run's manifest as such
        raise RuntimeError("the sweep was stopped") from interrupt
    except Exception as error:  # whatever it is, it is this run's result, and the others go on
        traceback.print_exc(file=log)
        return f"{type(error).__name__}: {error}", ""
    return "", ""


# Workers


@contextmanager
def pool(
    jobs: int, *, scheduler: str | None = None, cluster: str | None = None, cpu: bool = False, **shares: Any
) -> Iterator[Pool]:
    """Workers for so many jobs: those of a ``scheduler``, of a ``cluster``'s file, or of this machine.

    A running Dask cluster makes as many runs at a time as its workers have threads. ``shares`` are ``threads`` and, for
    this machine alone, ``workers``. ParameterError where there is no such scheduler or cluster.
    """
    workers, threads = shares.get("workers"), shares.get("threads")
    if workers and (scheduler or cluster):
        raise ParameterError("workers", workers, "must not be given with a scheduler or cluster, which has its own")
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(SETTINGS))
        address: Any = scheduler
        if cluster:
            address, count, each = job_cluster(cluster)
            stack.enter_context(address).scale(jobs=count)
            here = Pool(count, threads or each, resources={"run": 1})
        elif not scheduler:
            here = machine(workers=workers, threads=threads, cpu=cpu)
            here = here._replace(workers=min(here.workers, jobs))
            # free ports, so that sweeps do not get in each other's way
            options = {"dashboard_address": ":0", "memory_limit": 0, "silence_logs": logging.CRITICAL}
            options |= {"threads_per_worker": 1, "preload": [_IGNORE_CTRL_C]}
            address = stack.enter_context(LocalCluster(n_workers=here.workers, **options))
        try:
            client = stack.enter_context(Client(address, timeout=CONNECT_SECONDS, set_as_default=False))
        except (OSError, ValueError) as error:
            allowed = f"must be the address of a Dask scheduler that answers ({' '.join(str(error).split())})"
            raise ParameterError("scheduler", scheduler, allowed) from error
        if scheduler:
            cores: Any = client.nthreads()
            here = Pool(sum(cores.values()), threads or 1)
        yield here._replace(client=client)


def job_cluster(file: str | os.PathLike) -> tuple[Any, int, int]:
    """Start the Dask cluster of a file such as ``slurm: {queue: gpu, cores: 4, memory: 16GB, jobs: 8}``.

    The keywords are dask-jobqueue's. Each of a job's ``processes`` (1 by default) makes one run at a time. Returns the
    cluster, not scaled yet; how many ``jobs`` to submit; and threads per run. ParameterError where a name is unknown.
    """
    content, jobqueue = read_yaml(file), importlib.import_module("dask_jobqueue")
    known = {name.removesuffix("Cluster").lower(): name for name in dir(jobqueue) if name.endswith("Cluster")}
    system = str(next(iter(content), None))
    if len(content) != 1 or system not in known or not isinstance(content[system], dict):
        allowed = f"must be one of {', '.join(known)}, with the keywords of dask-jobqueue"
        raise ParameterError("cluster", content, allowed + did_you_mean(system, known))
    options = dict(content[system])
    jobs, processes = options.pop("jobs", 1), options.setdefault("processes", 1)
    options["worker_extra_args"] = [*options.get("worker_extra_args", []), "--resources", "run=1"]
    try:
        cluster = getattr(jobqueue, known[system])(**options)
    except (TypeError, ValueError) as error:
        allowed = f"must be what dask-jobqueue takes ({' '.join(str(error).split())})"
        raise ParameterError("cluster", content, allowed) from error
    return cluster, jobs, max(1, int(options.get("cores", 1)) // processes)
