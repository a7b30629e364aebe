"""Where the runs of a sweep are made: Dask workers of this machine, of a running cluster, or of a batch system.

A run is a `papermill` process that its worker starts, or is made by the worker itself. Importing this loads no torch.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import dask.config
import dask.system
import distributed.system
import yaml
from distributed import Client, Future, LocalCluster, get_worker

from pa_core.errors import ParameterError, did_you_mean
from pa_core.files import data_home, read_json, read_yaml, runs_home
from pa_core.params import Experiment

Log = Callable[[str], None]
RETRIES = 2  # of a run whose process or worker died without an error: killed, out of memory
TRIM = "MALLOC_TRIM_THRESHOLD_"  # Dask has its workers return memory at once, which slows training by a third
# Dask blames all runs on a worker that dies, those that only wait there, too: here each counts its own starts.
SETTINGS = {f"distributed.nanny.pre-spawn-environ.{TRIM}": None, "distributed.scheduler.allowed-failures": 1000}
# A terminal's Ctrl-C is for the sweep, which ends its workers. What they start would inherit SIG_IGN.
_IGNORE_CTRL_C = "import signal\nsignal.signal(signal.SIGINT, lambda *_: None)\n"
# A worker of a running cluster may have several threads; torch's generator and thread count are the process's.
_ONE_AT_A_TIME = threading.Lock()
# papermill in a process that ends when its standard input does, which is when the sweep is stopped or the worker dies
# in whatever way: no run goes on unseen. A kernel ends by itself when its papermill has.
_PAPERMILL = """
import os, runpy, sys, threading
def end_with_worker():
    sys.stdin.read()
    os._exit(1)
threading.Thread(target=end_with_worker, daemon=True).start()
runpy.run_module("papermill", run_name="__main__", alter_sys=True)
"""
_OPTIONS = "--no-progress-bar --log-level WARNING --stdout-file - --stderr-file -".split()


def machine(*, workers: int | None = None, threads: int | None = None, cpu: bool = False) -> tuple[int, int, list[str]]:
    """This machine, divided: (runs at a time, threads of each, GPUs as CUDA_VISIBLE_DEVICES takes them).

    A run per GPU; without GPUs, or with ``cpu``, a run per core, or fewer where memory is short (2 GB each). What is
    left to do plays no part, because the sums of floats depend on the number of threads.
    """
    cores, memory = dask.system.CPU_COUNT, distributed.system.MEMORY_LIMIT  # they respect the limits of containers
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ParameterError(name, value, "must be at least 1")
    visible = "" if cpu else os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        visible = ",".join(map(str, range(importlib.import_module("torch").cuda.device_count())))
    gpus = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    most = len(gpus) or max(1, min(cores, memory // 2**31))
    workers = workers or (max(1, min(most, cores // threads)) if threads else most)
    return workers, threads or max(1, cores // workers), gpus


@contextmanager
def pool(
    jobs: int, cpu: bool, log: Log, *, scheduler: str | None = None, cluster: str | None = None, **shares: int | None
) -> Iterator[Callable[..., Future]]:
    """Workers for so many jobs: those of a ``scheduler``, of a ``cluster``'s file, or of this :func:`machine`.

    Yields a function of the first three arguments of :func:`execute` that submits it. ``shares`` are ``threads`` and,
    for this machine alone, ``workers``. ParameterError where there is no such scheduler or cluster.
    """
    workers, threads, gpus = shares.get("workers"), shares.get("threads"), []
    if workers and (scheduler or cluster):
        raise ParameterError("workers", workers, "must not be given with a scheduler or cluster, which has its own")
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(SETTINGS))
        address: Any = scheduler
        if cluster:
            address, workers, each = job_cluster(cluster)
            threads = threads or each
            stack.enter_context(address).scale(workers)
        elif not scheduler:
            most, threads, gpus = machine(**shares, cpu=cpu)
            workers = min(most, jobs)
            options: Any = {"threads_per_worker": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
            options |= {"dashboard_address": ":0", "preload": [_IGNORE_CTRL_C]}  # any port, as sweeps may be several
            address = stack.enter_context(LocalCluster(n_workers=workers, **options))
        try:
            client = stack.enter_context(Client(address))
        except (OSError, ValueError) as error:
            allowed = f"must be the address of a Dask scheduler that answers ({' '.join(str(error).split())})"
            raise ParameterError("scheduler", scheduler, allowed) from error
        own = f", a GPU each of {', '.join(gpus)}" if gpus else ""
        log(f"{workers or 'as many as workers have threads'} at a time, threads of each: {threads or 1}{own}")
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        environment = {"PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1", "PWD": os.getcwd()}
        environment |= {"PA_RUNS": str(runs_home()), "PA_DATA": str(data_home())}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads or 1))
        yield partial(client.submit, execute, environment=environment, gpus=gpus, retries=RETRIES)


def job_cluster(file: str | os.PathLike) -> tuple[Any, int, int]:
    """The Dask cluster of a file such as ``slurm: {queue: gpu, cores: 4, memory: 16GB, jobs: 8}``, without jobs yet.

    The keywords are dask-jobqueue's. Each of a job's ``processes`` (1 by default) is a worker that makes one run at a
    time. Returns the cluster, the number of workers asked for, and threads per run; ParameterError where it is refused.
    """
    content, jobqueue = read_yaml(file), importlib.import_module("dask_jobqueue")
    known = {name.removesuffix("Cluster").lower(): name for name in dir(jobqueue) if name.endswith("Cluster")}
    try:
        [(system, given)] = content.items()
        options = {"jobs": 1, "processes": 1, "worker_extra_args": [], **given}
        options["worker_extra_args"] = [*options["worker_extra_args"], "--nthreads", "1"]  # of two the last one counts
        jobs, processes = options.pop("jobs"), options["processes"]
        cluster = getattr(jobqueue, known[system])(**options)
    except (KeyError, TypeError, ValueError) as error:
        allowed = f"must be one of {', '.join(known)}, with what dask-jobqueue takes ({' '.join(str(error).split())})"
        raise ParameterError("cluster", content, allowed + did_you_mean(next(iter(content), ""), known)) from error
    return cluster, jobs * processes, max(1, options.get("cores", 1) // processes)


def execute(
    place: Path, parameters: dict[str, Any], notebook: Path | None, environment: dict[str, str], gpus: list[str]
) -> str:
    """On a worker: make a run, by papermill or, without a notebook, in this process. ``place`` is a folder to keep.

    Returns its error, or an empty text. RuntimeError where its process died without one: Dask starts the run again.
    """
    if gpus:  # one for each worker of this machine; elsewhere its environment says which it has
        environment = environment | {"CUDA_VISIBLE_DEVICES": gpus[int(get_worker().name) % len(gpus)]}
    place.mkdir(exist_ok=True)
    with open(place / "starts", "a+") as starts:
        if starts.write("x") and starts.tell() > 1 + RETRIES:
            return f"its worker ended {1 + RETRIES} times without an error"
    output, values, text = place / "notebook.ipynb", place / "parameters.yaml", place / "log.txt"
    with open(text, "a") as log:
        if notebook is None:
            with _ONE_AT_A_TIME:
                return _here(parameters, environment, log)
        values.write_text(yaml.safe_dump(parameters, sort_keys=False))
        command = [sys.executable, "-c", _PAPERMILL, str(notebook), str(output), "-f", str(values), *_OPTIONS]
        environment = {name: value for name, value in os.environ.items() if name != TRIM} | environment
        # A session of its own, so that Ctrl-C in the terminal does not reach it. Leaving the block closes its input.
        files: Any = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "cwd": environment["PWD"]}
        with subprocess.Popen(command, env=environment, start_new_session=True, **files) as process:
            while process.poll() is None and not _stopped():
                time.sleep(0.1)
    error = _raised(output) if process.returncode else ""
    if process.returncode and not error:
        last = text.read_text(errors="replace").rstrip().rpartition("\n")[2] or "nothing"
        raise RuntimeError(f"its process ended with status {process.returncode}; its last output: {last}")
    return error


def _stopped() -> bool:
    """Whether the sweep has cancelled the task of this thread, or has died."""
    worker = get_worker()
    task = worker.state.tasks.get(worker.get_current_task())
    return task is None or task.state == "cancelled"


def _raised(notebook: Path) -> str:
    """The error that ended an executed notebook, and its cell's last line; empty where there is none."""
    for cell in read_json(notebook).get("cells", []):
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                last = "".join(cell["source"]).rstrip().rpartition("\n")[2]
                return f"{output['ename']}: {output['evalue']} (In [{cell['execution_count']}]: {last})"
    return ""


def _here(parameters: dict[str, Any], environment: dict[str, str], log: TextIO) -> str:
    os.environ.update(environment)  # before CUDA is asked for anything; a worker keeps its GPU
    os.chdir(environment["PWD"])
    torch, experiment = (importlib.import_module(name) for name in ("torch", "pa_core.experiment"))
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))

    def note(text: str) -> None:
        print(text, file=log, flush=True)
        if _stopped():
            raise KeyboardInterrupt

    try:
        experiment.run(Experiment.from_mapping(parameters), log=note)
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, it is this run's result, and the others go on
        traceback.print_exc(file=log)
        return f"{type(error).__name__}: {error}"
    return ""
