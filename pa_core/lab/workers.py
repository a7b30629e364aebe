"""Where the runs of a sweep are made: Dask workers of this machine, of a running cluster, or of a batch system.

A run is a `papermill` process that its worker starts, or is made by the worker itself. Importing this loads no torch.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import dask.config
import dask.system
import distributed.system
import yaml
from distributed import Client, LocalCluster, WorkerPlugin, get_worker

from pa_core.errors import ParameterError, did_you_mean
from pa_core.files import read_yaml
from pa_core.params import Experiment

WORKER_DEATHS = 10
"""How many workers may die while they make a run before it counts as failed."""
CONNECT_SECONDS = 10
"""How long a Dask scheduler has to answer."""
_ONE_AT_A_TIME = threading.Lock()
"""A worker of a running cluster may have several threads; torch's generator and thread count are the process's."""
GRACE = 10
"""Seconds that a process has to end by itself when a sweep is stopped."""
STOPPED = "the sweep was stopped"
TRIM = "MALLOC_TRIM_THRESHOLD_"
"""Dask has its workers return memory at once, and what they start inherits it: training is a third slower then."""

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
        psutil.wait_procs(below, timeout=5)
    finally:
        os._exit(1)
threading.Thread(target=stop, daemon=True).start()
sys.argv[0] = "papermill"
runpy.run_module("papermill", run_name="__main__", alter_sys=True)
"""


class Machine(NamedTuple):
    """How runs share this machine: ``workers`` at a time, ``threads`` each, and a GPU each where there are some."""

    workers: int
    threads: int
    gpus: tuple[str, ...] = ()


def machine(*, workers: int | None = None, threads: int | None = None, cpu: bool = False) -> Machine:
    """This machine, divided: a run per GPU; without GPUs a run per core, or fewer where memory is short (2 GB each).

    Of ``workers`` and ``threads`` one follows from the other; ``cpu`` leaves the GPUs alone. What is left to do plays
    no part, because the sums of floats depend on the number of threads.
    """
    cores, memory = dask.system.CPU_COUNT, distributed.system.MEMORY_LIMIT  # they respect the limits of containers
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ParameterError(name, value, "must be at least 1")
    devices = () if cpu else gpus()
    if workers is None:
        most = len(devices) or max(1, min(cores, memory // 2**31))
        workers = most if threads is None else max(1, min(most, cores // threads))
    return Machine(workers, threads or max(1, cores // workers), devices)


def gpus() -> tuple[str, ...]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES takes them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(str(number) for number in range(importlib.import_module("torch").cuda.device_count()))
    return tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1"))


# On a worker


class Task(NamedTuple):
    """What a worker needs to know of a run: plain values, so that it travels.

    ``place`` is a path without ending; executed notebook, log and parameters lie there until the run is finished. One
    of ``gpus`` is for this run, by the worker's number; without any, the worker's environment says which it has.
    ``sweep`` is the name of the worker's :class:`Children`.
    """

    place: Path
    parameters: dict[str, Any]
    notebook: Path | None
    folder: Path
    environment: dict[str, str]
    threads: int
    gpus: tuple[str, ...]
    sweep: str


class Children(WorkerPlugin):
    """The processes that a worker has started; when the sweep ends, so do they.

    ``own`` says that the worker is the sweep's own, on this machine, and thus gets the terminal's Ctrl-C, too.
    """

    def __init__(self, *, own: bool) -> None:
        self.own = own

    def setup(self, worker: Any) -> None:
        self.running: set[subprocess.Popen] = set()
        self.stopped, self.lock = False, threading.Lock()
        if self.own:  # it ends when the sweep does; a handler that does nothing, because SIG_IGN would be inherited
            signal.signal(signal.SIGINT, lambda *_: None)

    def teardown(self, worker: Any) -> None:
        with self.lock:
            self.stopped, running = True, list(self.running)
        for process in running:
            if process.stdin:
                process.stdin.close()
        for process in running:
            process.wait(timeout=GRACE)

    def call(self, command: list[str], **options: Any) -> int:
        """Run a process to its end and return its status; a RuntimeError where the sweep was stopped before."""
        with self.lock:
            if self.stopped:
                raise RuntimeError(STOPPED)
            # A session of its own: Ctrl-C in the terminal is for the sweep, which ends its processes in good order.
            process = subprocess.Popen(command, **options, stdin=subprocess.PIPE, start_new_session=True)
            self.running.add(process)
        code = process.wait()
        self.running.discard(process)
        if code and self.stopped:
            raise RuntimeError(STOPPED)
        return code


def execute(task: Task) -> tuple[str, str]:
    """On a worker: have papermill execute a run's notebook.

    Returns:
        Error and cell, both empty when all went well.

    Raises:
        RuntimeError: its process died without an error of its own; Dask starts the run again.
    """
    output, log, parameters = (task.place.with_suffix(ending) for ending in (".ipynb", ".log", ".yaml"))
    parameters.write_text(yaml.safe_dump(task.parameters, sort_keys=False))
    command = [sys.executable, "-c", _PAPERMILL, str(task.notebook), str(output), "-f", str(parameters)]
    command += ["--no-progress-bar", "--log-level", "WARNING", "--stdout-file", "-", "--stderr-file", "-"]
    environment = {name: value for name, value in os.environ.items() if name != TRIM} | _environment(task)
    output.unlink(missing_ok=True)
    with open(log, "ab") as file:
        children: Any = get_worker().plugins[task.sweep]
        code = children.call(command, cwd=task.folder, env=environment, stdout=file, stderr=file)
    error, cell = raised(output) if code else ("", "")
    if code and not error:
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code} and no error in a cell"
        raise RuntimeError(f"its process {how}; its last output: {last}")
    return error, cell


def _environment(task: Task) -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(task.threads))
    gpu = {"CUDA_VISIBLE_DEVICES": task.gpus[int(get_worker().name) % len(task.gpus)]} if task.gpus else {}
    return {**task.environment, **threads, **gpu}


def train(task: Task) -> tuple[str, str]:
    """On a worker: make a run in this process. Returns what :func:`execute` does; a traceback is in the log."""
    children: Any = get_worker().plugins[task.sweep]
    with _ONE_AT_A_TIME, open(task.place.with_suffix(".log"), "a") as log:
        os.environ.update(_environment(task))  # before CUDA is asked for anything; a worker keeps its GPU
        torch, experiment = (importlib.import_module(name) for name in ("torch", "pa_core.experiment"))
        torch.set_num_threads(task.threads)

        def note(text: str) -> None:
            print(text, file=log, flush=True)
            if children.stopped:  # on a cluster that goes on without this sweep
                raise KeyboardInterrupt

        try:
            experiment.run(Experiment.from_mapping(task.parameters), log=note)
        except KeyboardInterrupt as interrupt:  # noted in the run's manifest as such
            raise RuntimeError(STOPPED) from interrupt
        except Exception as error:  # whatever it is, it is this run's result, and the others go on
            traceback.print_exc(file=log)
            return f"{type(error).__name__}: {error}", ""
    return "", ""


def raised(notebook: Path) -> tuple[str, str]:
    """The error that ended an executed notebook, and its cell's last line; two empty texts where there is none."""
    text = notebook.read_text() if notebook.is_file() else ""
    for cell in json.loads(text or '{"cells": []}')["cells"]:
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                last = ["", *filter(str.strip, "".join(cell["source"]).splitlines())][-1]
                return f"{output['ename']}: {output['evalue']}", f"In [{cell.get('execution_count')}]: {last}"
    return "", ""


# Workers


class Pool(NamedTuple):
    """A Dask client, and how its workers are used: ``count`` runs at a time with ``threads`` each."""

    client: Client
    count: int
    threads: int
    own: bool = False
    gpus: tuple[str, ...] = ()
    resources: dict[str, int] | None = None


@contextmanager
def pool(
    jobs: int,
    *,
    workers: int | None = None,
    threads: int | None = None,
    cpu: bool = False,
    scheduler: str | None = None,
    cluster: str | os.PathLike | None = None,
) -> Iterator[Pool]:
    """Workers for so many jobs: those of a ``scheduler``, of a ``cluster``'s file, or of this machine.

    Args:
        workers, threads: see :func:`machine`; the number of workers is for this machine alone.
        scheduler: address of a running Dask cluster. It makes as many runs at a time as its workers have threads.
        cluster: see :func:`job_cluster`.

    Raises:
        ParameterError: there is no such scheduler or cluster.
    """
    if workers and (scheduler or cluster):
        raise ParameterError("workers", workers, "must not be given with a scheduler or cluster, which has its own")
    with ExitStack() as stack:
        if scheduler:
            try:
                client = stack.enter_context(Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False))
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                allowed = f"must be the address of a Dask scheduler that answers ({reason})"
                raise ParameterError("scheduler", scheduler, allowed) from error
            cores: Any = client.nthreads()
            yield Pool(client, sum(cores.values()), threads or 1)
        elif cluster:
            started, count, each = job_cluster(cluster)
            stack.enter_context(started).scale(jobs=count)
            client = stack.enter_context(Client(started, set_as_default=False))
            yield Pool(client, count, threads or each, resources={"run": 1})
        else:
            here = machine(workers=workers, threads=threads, cpu=cpu)
            count = min(here.workers, jobs)
            environment = {k: v for k, v in dask.config.get("distributed.nanny.pre-spawn-environ").items() if k != TRIM}
            names = ("distributed.nanny.pre-spawn-environ", "distributed.scheduler.allowed-failures")
            stack.enter_context(dask.config.set(dict(zip(names, (environment, WORKER_DEATHS), strict=True))))
            # free ports, so that sweeps do not get in each other's way
            options = {"dashboard_address": ":0", "memory_limit": 0, "silence_logs": logging.CRITICAL}
            started = stack.enter_context(LocalCluster(n_workers=count, threads_per_worker=1, **options))
            client = stack.enter_context(Client(started, set_as_default=False))
            yield Pool(client, count, here.threads, own=True, gpus=here.gpus)


def job_cluster(file: str | os.PathLike) -> tuple[Any, int, int]:
    """Start the Dask cluster of a file such as ``slurm: {queue: gpu, cores: 4, memory: 16GB, jobs: 8}``.

    The keywords are dask-jobqueue's. Each of a job's ``processes`` (1 by default) makes one run at a time, with
    ``cores`` / ``processes`` threads.

    Returns:
        The cluster, not scaled yet; how many ``jobs`` to submit; and threads per run.

    Raises:
        ParameterError: the file asks for something that does not exist.
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
        reason = " ".join(str(error).split())
        raise ParameterError("cluster", content, f"must be what dask-jobqueue takes ({reason})") from error
    return cluster, jobs, max(1, int(options.get("cores", 1)) // processes)
