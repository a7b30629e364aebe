"""Sweeps: files that are refused or expanded, and real processes that are killed, interrupted, or fail.

Where training itself does not matter, ``stub_run.py`` stands in for papermill.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
import yaml

from pa_core import data, experiment, models, runs
from pa_core.errors import ParameterError
from pa_core.files import home
from pa_core.lab import notebooks, results, sweep
from pa_core.params import PARAMETERS, SCHEMA, Experiment
from pa_core.runs import Run

pytest.importorskip("distributed")
import dask.config

from pa_core.lab import workers  # it loads Dask

SWEEPS = sorted((home() / "params" / "sweeps").glob("*.yaml"))
STUB = Path(__file__).with_name("stub_run.py")

# A file -> jobs


def expand(text: str, tmp_path: Path) -> sweep.Sweep:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return sweep.read(path)


def test_every_combination_becomes_a_run_once(tmp_path):
    text = "arms: {plain: {schedule: 2}, proxies: {schedule: '1,p,1'}}\ngrid: {threshold: [.5, .75]}\nseeds: [0, 1]\n"
    found = expand("base: {lr: 2e-3, device: cpu}\n" + text, tmp_path)
    assert (found.name, found.notebook) == ("some", home() / "notebooks/03_proxy_loop.ipynb")
    assert found.combinations == 8
    made = [(j.arms, j.experiment.schedule, j.experiment.threshold, j.experiment.seed) for j in found.jobs]
    # of the plain run the threshold has no effect
    plain = [(["plain"], "2", 0.5, seed) for seed in (0, 1)]
    assert made == plain + [(["proxies"], "1,p,1", t, seed) for t in (0.5, 0.75) for seed in (0, 1)]
    assert {job.experiment.lr for job in found.jobs} == {2e-3}
    assert found.varied == ["schedule", "threshold", "seed"]
    assert len(found.jobs) == 6


def test_a_run_that_belongs_to_two_arms_is_made_once_and_counted_in_both(tmp_path):
    found = expand("grid: {schedule: ['2', '1,p,1']}\narms: {mean: {fill: mean}, zero: {fill: zero}}", tmp_path)
    assert [job.arms for job in found.jobs] == [["mean", "zero"], ["mean"], ["zero"]]
    frame = sweep.table(found)
    assert list(frame["arm"]) == ["mean", "zero", "mean", "zero"] and set(frame["status"]) == {"to do"}


def test_base_may_be_a_params_file_and_arms_and_grid_go_over_it(tmp_path):
    (tmp_path / "base.yaml").write_text("lr: 1e-2\nseed: 7\nthreshold: 0.1\n")
    found = expand("base: base.yaml\ngrid: {threshold: [0.3]}\narms: {a: , b: {lr: 0.5}}", tmp_path)
    made = [(job.experiment.lr, job.experiment.seed, job.experiment.threshold) for job in found.jobs]
    assert made == [(1e-2, 7, 0.3), (0.5, 7, 0.3)]


REFUSED = {
    "gird: 1": ("some: gird=1", "must be one of notebook, base, grid, arms, seeds (did you mean 'grid'?)"),
    "base: {lr: 1}": ("must include one of grid, arms and seeds",),
    "{}": ("must include one of grid, arms and seeds",),
    "- 1": ("must hold lines of names and values",),
    "grid: [1": ("can be read", "line 1"),
    "seeds: [0]\nseeds: [1]": ("'seeds' is given twice",),
    "grid: {treshold: [0.1]}": ("some: grid.treshold=0.1", "did you mean 'threshold'?"),
    "grid: {threshold: [0.1, 1.5]}": ("some: grid.threshold=1.5", "from 0 to 1"),
    "grid: {threshold: 0.1}": ("some: grid.threshold=0.1", "must be lists of values by parameter"),
    "grid: {threshold: []}": ("some: grid.threshold=[]", "must be lists of values by parameter"),
    "grid: {schedule: [40, 20,p,20]}": ("some: grid.schedule='p'", "quote a schedule", "'20,p,20'"),
    "grid: {schedule: [[20, p, 20]]}": ("some: grid.schedule", "quote it where YAML would take it apart"),
    "grid: {schedule: ['5,p']}": ("some: grid.schedule='5,p'", "an epoch after it"),
    "arms: {a: {schedule: 20,p,19}}": ("some: arms.a.p=None", "quote a schedule", "'20,p,20'"),
    "base: {schedule: 5,p,5}\nseeds: [0]": ("some: base.p=None", "quote a schedule"),
    "arms: {a: {fil: mean}}": ("some: arms.a.fil='mean'", "did you mean 'fill'?"),
    "arms: {a: {fill: men}}": ("some: arms.a.fill='men'", "did you mean 'mean'?"),
    "arms: [a]": ("some: arms=['a']", "must be parameters by name"),
    "arms: {a: 3}": ("some: arms.a=3", "must be parameters by name"),
    "arms: {a: {lr: 1}}\ngrid: {lr: [1]}": ("some: arms.a.lr=1", "grid.lr sets it"),
    "arms: {a: {seed: 1}}\nseeds: [1]": ("some: arms.a.seed=1", "seeds sets it"),
    "grid: {seed: [1]}\nseeds: [1]": ("some: grid.seed", "seeds sets it"),
    "grid: {runs_dir: [a, b]}": ("some: runs_dir=['a', 'b']", "one folder"),
    "seeds: 3": ("some: seeds=3", "must be a list of values"),
    "seeds: [0, -1]": ("some: seeds=-1", "at least 0"),
    "seeds: [0]\nbase: {folds: 2, fold: 2}": ("some: base.fold=2", "0 to 1"),
    "seeds: [0]\nbase: nothing.yaml": ("nothing.yaml", "can be read"),
    "seeds: [0]\nnotebook: 03_proxy_lop": ("some: notebook='03_proxy_lop'", "did you mean '03_proxy_loop'?"),
    "seeds: [0]\nnotebook: bare.ipynb": ("some: notebook='bare.ipynb'", "a cell with the tag parameters"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_mistake_is_refused_in_a_sentence_that_names_it(tmp_path, text):
    (tmp_path / "bare.ipynb").write_text('{"cells": []}')
    with pytest.raises(ParameterError) as caught:
        expand(text, tmp_path)
    for part in REFUSED[text]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweep_files_expand_to_runs_of_known_models_and_data(path):
    found = [job.experiment for job in sweep.read(path).jobs]
    assert 10 < len(found) < 1000
    for name in {e.model for e in found}:
        models.check_name(name)
    assert {e.dataset for e in found} <= {*data.names(), "folder"}


def test_the_predecessors_grid_is_among_them():
    jobs = [job.experiment for path in SWEEPS for job in sweep.read(path).jobs]
    wanted = {
        "model": {"resnet18", "resnet50", "vgg16", "efficientnet_b0", "vit_base_patch16_224"},
        "threshold": {0.1, 0.4, 0.8, 0.85},
        "weight": {0.1, 0.2, 0.4, 0.8, 0.95},
        "fraction": {0.2, 0.8, 0.95},
        "schedule": {"40", "20,p,20", "5,p,9,p,9,p,9,p,8"},
        "fill": {"zero", "one", "mean", "max", "min", "half_max", "blend", "none"},
        "dataset": {"folder", "cifar100"},
    }
    for name, values in wanted.items():
        assert values <= {getattr(job, name) for job in jobs}, name


# Notebooks


def edited(folder: Path, **changes: object) -> Path:
    """03_proxy_loop as JupyterLab would have saved it with other parameters."""
    content = json.loads((home() / "notebooks" / "03_proxy_loop.ipynb").read_text())
    (cell,) = [cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    lines = notebooks.parameters_cell().splitlines()
    for name, value in changes.items():
        lines = [f"{name} = {value!r}" if line.startswith(f"{name} = ") else line for line in lines]
    cell["source"] = "\n".join(lines)
    (folder / "notebooks").mkdir(exist_ok=True)
    path = folder / "notebooks" / "03_proxy_loop.ipynb"
    path.write_text(json.dumps(content))
    return path


def test_an_edited_notebook_of_the_repository_is_refused_and_a_copy_is_not(tmp_path, monkeypatch):
    path = edited(tmp_path, lr=0.5, fill="zero")
    text = yaml.safe_dump({"seeds": [0], "notebook": str(path)})
    assert expand(text, tmp_path).notebook == path  # it lies elsewhere
    for module in (notebooks, sweep):
        monkeypatch.setattr(module, "home", lambda: tmp_path)
    with pytest.raises(ParameterError) as caught:
        expand("seeds: [0]", tmp_path)
    assert "notebooks/03_proxy_loop.ipynb" in str(caught.value)
    assert "must have the default parameters, not fill = 'zero', lr = 0.5: undo it" in str(caught.value)
    assert notebooks.main(["check"]) == 2


def test_parameters_cells_are_written_and_copies_overwrite_nothing(tmp_path, monkeypatch, capsys):
    shutil.copytree(home() / "notebooks", tmp_path / "notebooks")
    (tmp_path / "docs").mkdir()
    pages = {page: (home() / "docs" / page).read_text() for page in ("parameters.md", "methods.md")}
    for page, text in pages.items():
        (tmp_path / "docs" / page).write_text(text.replace("| lr |", "| rate |").replace("| gradcam |", "| cam |"))
    monkeypatch.setattr(notebooks, "home", lambda: tmp_path)
    path = edited(tmp_path, lr=0.5)
    assert notebooks.main(["write"]) == 0 and notebooks.main(["check"]) == 0
    assert {page: (tmp_path / "docs" / page).read_text() for page in pages} == pages
    assert notebooks.parameters_source(path) == notebooks.parameters_cell()
    values: dict[str, Any] = {}
    exec(notebooks.parameters_source(path), values)
    wanted = {name: p.default for name, p in PARAMETERS.items()} | {"figures_dir": "figures/quick"}
    assert {name: values.get(name, "nothing") for name in wanted} == wanted
    again = path.read_bytes()
    assert notebooks.main(["write"]) == 0 and path.read_bytes() == again
    mine = tmp_path / "mine" / "03_proxy_loop.ipynb"
    mine.parent.mkdir()
    mine.write_text("my own")
    assert notebooks.main(["copy", str(mine.parent)]) == 0 and mine.read_text() == "my own"
    assert {p.name for p in mine.parent.iterdir()} == {p.name for p in (home() / "notebooks").glob("*.ipynb")}
    assert "03_proxy_loop" not in capsys.readouterr().out


# The command


def python(code: str, runs: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PA_RUNS": str(runs), "PYTHONPATH": str(home())}
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, cwd=home()
    )


MAIN = "import sys; from pa_core.lab import sweep; status = sweep.main(sys.argv[1:]); "


def test_a_dry_run_lists_and_loads_neither_torch_nor_dask(tmp_path):
    code = MAIN + "print({'torch', 'dask', 'timm'} & sys.modules.keys())"
    done = python(code, tmp_path / "runs", "params/sweeps/threshold.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    first, *listed, last = done.stdout.splitlines()
    counts = "threshold: 15 runs (24 combinations, 9 of them the same run as another), 0 finished before, 15 to do"
    assert first == counts
    assert len(listed) == 15 and all(line.startswith("  to do") for line in listed)
    assert "proxies" in listed[-1] and "threshold=0.95 seed=2" in listed[-1]
    assert last == "set()"
    assert not (tmp_path / "runs").exists()


def test_a_refused_file_is_one_line_and_status_2(tmp_path):
    (tmp_path / "bad.yaml").write_text("grid: {treshold: [0.1]}")
    done = python(MAIN + "sys.exit(status)", tmp_path, str(tmp_path / "bad.yaml"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "bad: grid.treshold" in done.stderr


def test_without_dask_it_says_so(tmp_path):
    without = "import sys; sys.modules['distributed'] = None; "
    done = python(without + MAIN + "sys.exit(status)", tmp_path / "runs", "params/sweeps/threshold.yaml")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "invalid dask='distributed': must be installed" in done.stderr and "pa-core[sweep]" in done.stderr


def test_cores_and_gpus_are_divided(monkeypatch):
    import dask.system
    import distributed.system

    monkeypatch.setattr(dask.system, "CPU_COUNT", 16)
    monkeypatch.setattr(distributed.system, "MEMORY_LIMIT", 2**40)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workers.machine() == (16, 1, [])
    assert workers.machine(threads=4) == (4, 4, [])
    assert workers.machine(workers=3) == (3, 5, [])
    assert workers.machine(workers=3, threads=2) == (3, 2, [])
    monkeypatch.setattr(distributed.system, "MEMORY_LIMIT", 8 * 2**30)
    assert workers.machine() == (4, 4, [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-ab")
    assert workers.machine() == (2, 8, ["2", "GPU-ab"])
    assert workers.machine(cpu=True)[2] == []
    with pytest.raises(ParameterError, match="workers=0: must be at least 1"):
        workers.machine(workers=0)


JOBS = """
slurm: {queue: gpu, cores: 8, processes: 2, memory: 32GB, walltime: "12:00:00", jobs: 3,
        job_extra_directives: ["--gres=gpu:2"]}
"""


def test_the_job_script_of_a_batch_system(tmp_path):
    (tmp_path / "cluster.yaml").write_text(JOBS)
    cluster, count, threads = workers.job_cluster(tmp_path / "cluster.yaml")
    with cluster:
        script = cluster.job_script()
    assert (count, threads) == (6, 4)
    asked = ("-p gpu", "--cpus-per-task=8", "--mem=30G", "-t 12:00:00", "--gres=gpu:2")
    assert {f"#SBATCH {words}" for words in asked} <= set(script.splitlines())
    assert "distributed.cli.dask_worker tcp://" in script and "--nworkers 2" in script
    assert re.findall(r"--nthreads (\d)", script)[-1] == "1"  # one run at a time


@pytest.mark.parametrize(
    "text", ["slrum: {cores: 1}", "{}", "slurm: 3", "slurm: {cores: 1, memory: 1GB, quue: a}", "slurm: {queue: a}"]
)
def test_a_batch_system_that_does_not_exist_is_refused(tmp_path, text):
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ParameterError, match="^invalid cluster=") as caught:
        workers.job_cluster(tmp_path / "cluster.yaml")
    assert "\n" not in str(caught.value)


# Processes; the stub in papermill's place


class Lab:
    """A folder with a sweep of up to ``SEEDS`` seeds, whose runs are made by the stub."""

    SEEDS = 24

    def __init__(self, folder: Path) -> None:
        self.runs, self.stub, self.file = folder / "runs", folder / "stub", folder / "seeds.yaml"
        self.stub.mkdir()
        shutil.copyfile(STUB, self.stub / "papermill.py")
        path = os.pathsep.join([str(home()), str(self.stub)])
        self.environment = {"PA_RUNS": str(self.runs), "STUB": str(self.stub), "PYTHONPATH": path}
        self.notebook = edited(folder)
        self.lines: list[str] = []
        self.started: list[subprocess.Popen] = []

    def prepare(self) -> None:
        """Tell the stub where runs lie and what a manifest holds."""
        one = Experiment.from_mapping({"schedule": "1", "device": "cpu"})
        locate = sweep.Sweep("seeds", [("", one)]).locate
        places = {seed: str(locate(one.replace(seed=seed))) for seed in range(self.SEEDS)}
        (self.stub / "places.json").write_text(json.dumps(places))
        keys = ["split_digest", "data_digest", "weights_digest", "device_name", "precision"]
        content = dict.fromkeys(keys, "x") | {"schema": SCHEMA, "code_version": runs.code_version()}
        content |= {"parameters": one.to_dict(), "status": "finished", "started": "2025-01-01T00:00:00+00:00"}
        (self.stub / "manifest.json").write_text(json.dumps(content | {"image_size": 28, "batch_size": 64}))

    def write(self, count: int) -> Path:
        base = {"schedule": "1", "device": "cpu"}
        text = yaml.safe_dump({"notebook": str(self.notebook), "base": base, "seeds": list(range(count))})
        if not self.file.exists() or self.file.read_text() != text:  # another sweep may be reading it
            self.file.write_text(text)
        return self.file

    def behave(self, **seeds: str) -> None:
        for seed, how in seeds.items():
            (self.stub / seed.removeprefix("_")).write_text(how)

    def sweep(self, count: int, **options: Any) -> pd.DataFrame:
        """In this process."""
        return sweep.run(self.write(count), log=self.lines.append, **{"workers": 2, **options})

    def start(self, count: int, *words: str) -> subprocess.Popen:
        """The command, in a process and process group of its own."""
        command = [sys.executable, "-m", "pa_core.lab.sweep", str(self.write(count)), *(words or ("--workers", "2"))]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = os.environ | self.environment
        self.started.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        return self.started[-1]

    def noted(self, name: str) -> list[list[str]]:
        file = self.stub / name
        return [line.split(" ", 3) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def trained(self) -> Counter:
        """How often each seed was trained."""
        return Counter(int(seed) for seed, *_ in self.noted("trained"))

    def wait_for(self, count: int) -> None:
        until(lambda: len(self.noted("started")) >= count)

    def go(self) -> None:
        (self.stub / "go").touch()


def until(moment: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < end, "the moment does not come"
        time.sleep(0.02)


def descendants(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children(recursive=True)
    return [process for process in found if "resource_tracker" not in " ".join(process.cmdline())]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)
    lab.prepare()
    yield lab
    for process in lab.started:  # of a test that failed
        process.kill()
        process.wait()


def test_what_fails_is_reported_and_the_others_go_on(lab):
    lab.behave(_1="error", _2="die once", _3="die", _4="nothing")
    frame = lab.sweep(6).set_index("seed")
    assert list(frame["status"]) == ["finished", "failed", "finished", "failed", "failed", "finished"]
    error = "NonFiniteLoss: the loss is not finite in step 7 (In [4]: run = pa.run(experiment))"
    assert frame["error"][1] == error
    assert Path(frame["kept"][1]).is_file() and "sweeps/seeds/" in frame["kept"][1]
    assert frame["error"][3] == "its process ended with status -9; its last output: about to die"
    assert frame["error"][4].startswith("it ended without its run")
    tries = Counter(int(seed) for seed, *_ in lab.noted("started"))
    assert tries == {0: 1, 1: 1, 2: 2, 3: 1 + workers.RETRIES, 4: 1, 5: 1}  # an error of its own is final
    assert lab.trained == dict.fromkeys((0, 2, 5), 1)
    assert {value for _, value in lab.noted("trim")} == {"None"}  # what Dask sets for its workers slows training
    done = frame[frame["status"] == "finished"]
    assert list(done["test_accuracy"]) == [0, 0.002, 0.005]
    for name, kept in zip(done["run"], done["kept"], strict=True):
        assert Path(kept) == lab.runs / name / "notebook.ipynb" and Path(kept).is_file()
    (report,) = lab.runs.glob("sweeps/seeds/*/report.csv")
    written = pd.read_csv(report).set_index("seed")
    assert list(written["status"]) == list(frame["status"]) and written["error"][1] == frame["error"][1]
    left = {file.name for file in report.parent.rglob("*") if file.is_file()}
    assert left == {"report.csv", "parameters.yaml", "log.txt", "notebook.ipynb", "starts"}
    # what failed, and only that, is tried again
    lab.behave(_1="", _3="", _4="")
    again = lab.sweep(6)
    assert any("6 runs, 3 finished before, 3 to do" in line for line in lab.lines)
    assert set(again["status"]) == {"finished"} and lab.trained == dict.fromkeys(range(6), 1)


def test_a_notebook_is_given_every_parameter(lab):
    """So that an edited one makes the run that was asked for."""
    lab.notebook = edited(lab.runs.parent, lr=0.5, fill="zero")
    lab.sweep(1)
    ((_, *words),) = lab.noted("parameters")
    given = json.loads(" ".join(words))
    figures = given.pop("figures_dir")
    assert given == Experiment.from_mapping({"schedule": "1", "device": "cpu"}).to_dict()
    assert figures.startswith(str(lab.runs / "sweeps" / "seeds"))


def test_a_run_of_other_code_is_made_anew(lab):
    lab.sweep(2)
    for run in lab.runs.glob("*/manifest.json"):
        content = json.loads(run.read_text()) | {"code_version": "0" * 16}
        run.write_text(json.dumps(content))
        run.parent.rename(run.parent.with_name(f"{run.parent.name.rpartition('-')[0]}-00000000"))
    frame = lab.sweep(3)
    assert any("0 finished before, 3 to do (2 of them finished by another version" in line for line in lab.lines)
    assert list(frame["status"]) == ["finished"] * 3 and lab.trained == {0: 2, 1: 2, 2: 1}


def test_a_killed_worker_has_its_run_started_again(lab):
    lab.behave(_0="wait", _1="wait")
    made: list[pd.DataFrame] = []
    thread = threading.Thread(target=lambda: made.append(lab.sweep(3)), daemon=True)
    thread.start()
    lab.wait_for(2)
    running = psutil.Process(int(lab.noted("started")[0][1]))
    os.kill(running.ppid(), signal.SIGKILL)
    until(lambda: not alive([running]))  # it ends with its worker
    lab.wait_for(3)
    lab.go()
    thread.join(300)
    assert list(made[0]["status"]) == ["finished"] * 3
    assert lab.trained == dict.fromkeys(range(3), 1)


def test_a_run_that_kills_its_workers_fails_alone(lab):
    """Those that wait on the worker that dies are not blamed."""
    lab.behave(_0="kill")
    frame = lab.sweep(5, workers=1).set_index("seed")
    assert list(frame["status"]) == ["failed"] + ["finished"] * 4
    assert frame["error"][0] == "its worker ended 3 times without an error"
    assert len([seed for seed, *_ in lab.noted("started") if seed == "0"]) == 1 + workers.RETRIES


def test_many_runs_on_two_workers(lab):
    before = descendants(os.getpid())
    frame = lab.sweep(24)
    assert list(frame["status"]) == ["finished"] * 24 and frame["run"].nunique() == 24
    assert lab.trained == dict.fromkeys(range(24), 1)
    assert len(list(lab.runs.glob("*/notebook.ipynb"))) == 24
    assert [line for line in lab.lines if line.startswith("[24/24]")]
    until(lambda: not [p for p in alive(descendants(os.getpid())) if p not in before])
    assert {threads for _, _, threads, _ in lab.noted("started")} == {str(workers.machine(workers=2)[1])}


def test_each_run_has_a_gpu_of_its_own(lab, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-ab")
    lab.behave(_0="wait", _1="wait")
    content = yaml.safe_load(lab.write(2).read_text())
    del content["base"]["device"]
    thread = threading.Thread(target=lambda: sweep.run(content, log=lab.lines.append), daemon=True)
    thread.start()
    lab.wait_for(2)
    lab.go()
    thread.join(300)
    assert {gpu for *_, gpu in lab.noted("started")} == {"4", "GPU-ab"}
    assert any("a GPU each of 4, GPU-ab" in line for line in lab.lines)


def test_two_sweeps_that_share_runs_make_each_once_and_report_what_fails(lab):
    lab.behave(_0="wait", _1="wait", _2="wait", _3="wait", _4="error")
    both = [lab.start(5), lab.start(5)]
    lab.wait_for(4)  # two of each; each run has two processes, of which one waits for the other
    lab.go()
    error = "failed: NonFiniteLoss: the loss is not finite in step 7 (In [4]: run = pa.run(experiment))\n"
    for process in both:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 1 and "4 of 5 finished, 1 failed" in printed and error in printed, printed
    assert lab.trained == dict.fromkeys(range(4), 1)
    reports = [pd.read_csv(file) for file in lab.runs.glob("sweeps/seeds/*/report.csv")]
    columns = ["seed", "status", "run", "test_accuracy"]
    pd.testing.assert_frame_equal(reports[0][columns], reports[1][columns])
    assert len(list(lab.runs.glob("*/notebook.ipynb"))) == 4


def test_a_killed_sweep_leaves_no_process_and_its_successor_does_what_is_left(lab):
    lab.behave(_2="wait", _3="wait")
    process = lab.start(4)
    lab.wait_for(4)
    family = descendants(process.pid)
    assert len(family) >= 4  # two workers, two runs
    process.kill()
    process.wait()
    until(lambda: not alive(family))
    lab.go()
    frame = lab.sweep(4)
    assert any("4 runs, 2 finished before, 2 to do" in line for line in lab.lines)
    assert list(frame["status"]) == ["finished"] * 4
    assert lab.trained == dict.fromkeys(range(4), 1)


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_interrupted_it_stops_within_seconds_and_says_so(lab, how):
    lab.behave(_2="wait", _3="wait")
    process = lab.start(4)
    lab.wait_for(4)
    until(lambda: len(list(lab.runs.glob("*/notebook.ipynb"))) == 2)  # the sweep has noted the two
    family, started = descendants(process.pid), time.monotonic()
    if how == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all that are in the foreground
    else:
        process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert time.monotonic() - started < 30
    assert process.returncode == 130, printed
    assert "interrupted: stopping the runs under way" in printed and "Traceback" not in printed
    assert printed.endswith("stopped\n") and not alive(family)
    assert len(lab.noted("started")) == 4  # nothing was started again
    (report,) = lab.runs.glob("sweeps/seeds/*/report.csv")
    assert Counter(pd.read_csv(report)["status"]) == {"finished": 2, "to do": 2}


def test_on_a_running_dask_cluster(lab):
    """Its workers stay; a run under way ends with the sweep, also with one that is killed."""
    from distributed import LocalCluster

    lab.behave(_1="error", _4="wait", _5="wait")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit=0) as cluster:
        frame = lab.sweep(4, scheduler=cluster.scheduler_address, threads=3, workers=None)
        process = lab.start(6, "--scheduler", cluster.scheduler_address, "--threads", "3")
        lab.wait_for(7)  # 1 failed and is tried again
        under_way = [psutil.Process(int(pid)) for seed, pid, *_ in lab.noted("started") if seed in "45"]
        process.kill()
        process.wait()
        until(lambda: not alive(under_way))
        assert len(cluster.scheduler.workers) == 2
    assert list(frame["status"]) == ["finished", "failed", "finished", "finished"]
    assert {threads for _, _, threads, _ in lab.noted("started")} == {"3"}


def test_a_scheduler_that_does_not_answer_is_refused(lab):
    with (
        dask.config.set({"distributed.comm.timeouts.connect": 0.5}),
        pytest.raises(ParameterError, match="invalid scheduler='tcp://127.0.0.1:9': must be the address of"),
    ):
        lab.sweep(1, scheduler="tcp://127.0.0.1:9", workers=None)


# Training for real

REAL = {"train_fraction": 0.05, "folds": 20, "device": "cpu", "schedule": "3,p,3", "xai": "saliency", "batch_size": 16}


def timeless(row: dict) -> dict:
    return {k: v for k, v in row.items() if not k.endswith("seconds") and k != "images_per_second"}


def epochs(folder: Path) -> int:
    """As the last checkpoint has it, or more."""
    saved = list(folder.glob("*/checkpoint.pt"))
    return (saved[0].parent / "metrics.jsonl").read_bytes().count(b"\n") if saved else 0


def test_killed_training_goes_on_and_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    """First the kernel is killed, then the worker; both times within an epoch after a checkpoint."""
    file = {"base": REAL, "seeds": [3], "notebook": str(edited(tmp_path))}
    monkeypatch.setenv("PA_RUNS", str(tmp_path / "runs"))
    frames: list[pd.DataFrame] = []
    options: dict[str, Any] = {"workers": 1, "threads": 1, "log": lambda _text: None}
    thread = threading.Thread(target=lambda: frames.append(sweep.run(file, **options)), daemon=True)
    thread.start()
    for epoch, victim in ((1, "kernel"), (4, "worker")):
        until(lambda epoch=epoch: epochs(tmp_path / "runs") >= epoch, 300)
        kernel = next(p for p in descendants(os.getpid()) if "ipykernel_launcher" in p.cmdline())
        (kernel if victim == "kernel" else kernel.parent().parent()).kill()
        until(lambda kernel=kernel: not alive([kernel]))
    thread.join(300)
    (status,), (name,) = frames[0]["status"], frames[0]["run"]
    assert status == "finished"
    run = Run(tmp_path / "runs" / name)
    assert len(run.manifest["resumed"]) >= 2 and run.manifest["threads"] == 1
    same_as_undisturbed(run, REAL | {"seed": 3}, tmp_path)
    notebook = json.loads((run.path / "notebook.ipynb").read_text())
    assert any("image/png" in str(output) for cell in notebook["cells"] for output in cell.get("outputs", []))
    assert len(list((run.path / "figures").glob("*.png"))) >= 2
    # the run is there: nothing is made again, and it tells how long another takes
    lines: list[str] = []
    frame = sweep.run(file, log=lines.append)
    assert lines == ["sweep: 1 runs, 1 finished before, 0 to do"] and list(frame["run"]) == [name]
    more = sweep.read(file | {"seeds": [4]})
    assert (sweep.estimate(more, workers=1) or 0) > 0
    assert set(results.load()["run"]) == {name}


def same_as_undisturbed(run: Run, parameters: dict[str, Any], folder: Path) -> None:
    """The run is, bit for bit, what one in this process is that nobody stopped."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        e = Experiment.from_mapping(parameters | {"runs_dir": str(folder / "undisturbed")})
        quiet = experiment.run(e, log=lambda _text: None)
    finally:
        torch.set_num_threads(before)
    assert not quiet.manifest.get("resumed") and quiet.path.name == run.path.name
    assert timeless(quiet.summary) == timeless(run.summary)
    for name in ("weights.safetensors", "predictions.csv", "classes.csv"):
        assert (quiet.path / name).read_bytes() == (run.path / name).read_bytes(), name
    rows = [[timeless(row) for row in one.metrics.to_dict("records")] for one in (quiet, run)]
    assert rows[0] == rows[1]


def test_without_a_notebook_the_worker_makes_the_same_run(tmp_path):
    """One of two is not finite, the other's worker is killed: the first is reported, the second ends as ever."""
    base = {"train_fraction": 0.05, "schedule": "2,p,2", "device": "cpu", "runs_dir": str(tmp_path / "direct")}
    file = {"notebook": "none", "base": base, "arms": {"not finite": {"lr": 1e30}, "fine": {}}}
    frames: list[pd.DataFrame] = []
    options: dict[str, Any] = {"workers": 1, "threads": 1, "log": lambda _text: None}
    thread = threading.Thread(target=lambda: frames.append(sweep.run(file, **options)))
    thread.start()
    until(lambda: epochs(tmp_path / "direct"))
    (worker,) = descendants(os.getpid())
    worker.kill()
    thread.join(300)
    frame = frames[0].set_index("arm")
    assert dict(frame["status"]) == {"fine": "finished", "not finite": "failed"}
    failed = frame.loc["not finite"]
    assert (
        failed["error"].startswith("NonFiniteLoss: the loss is not finite in epoch 1") and "In [" not in failed["error"]
    )
    assert "Traceback" in Path(failed["kept"]).read_text()
    made = Run(tmp_path / "direct" / frame["run"]["fine"])
    assert len(made.manifest["resumed"]) == 1 and not (made.path / "notebook.ipynb").exists()
    same_as_undisturbed(made, base, tmp_path)


def test_the_time_of_runs_is_estimated_from_runs_on_the_same_data(monkeypatch):
    known = pd.DataFrame(
        {
            "data_dir": [None, "/there/pets", "/there/cars"],
            "dataset": ["fashion_mini", "folder", "folder"],
            "train_seconds": [10.0, 20.0, 60.0],
        }
    ).assign(epochs=10, proxy_seconds=0.0, model="test_resnet", train_fraction=1.0, protocol="clean")
    monkeypatch.setattr(sweep, "_known", lambda _runs_dir: known)
    for place, each in ((None, 1.0), ("/there/pets", 2.0), ("/there/cars", 6.0)):
        base = {"schedule": "10"} | ({"dataset": "folder", "data_dir": place} if place else {})
        some = sweep.read({"base": base, "seeds": [0, 1, 2, 3], "notebook": "none"})
        assert sweep.estimate(some, workers=2) == 4 * 10 * each / 2
    other = sweep.read({"base": {"dataset": "folder", "data_dir": "/there/boats"}, "seeds": [0], "notebook": "none"})
    assert sweep.estimate(other, workers=2) is None
