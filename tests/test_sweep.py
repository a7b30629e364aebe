"""Sweeps: files that are refused or expanded, and real processes that are killed, interrupted, or fail.

Where training itself does not matter, ``stub_run.py`` stands in for papermill.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
import yaml

from pa_core import data, experiment, models, results, sweep
from pa_core.params import Experiment, ParameterError, home
from pa_core.runs import Run

pytest.importorskip("distributed")
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
    kinds = [(j.arms, j.experiment.schedule, j.experiment.threshold, j.experiment.seed) for j in found.jobs]
    # of the plain run the threshold has no effect
    plain = [(("plain",), "2", 0.5, seed) for seed in (0, 1)]
    assert kinds == plain + [(("proxies",), "1,p,1", t, seed) for t in (0.5, 0.75) for seed in (0, 1)]
    assert {job.experiment.lr for job in found.jobs} == {2e-3}
    assert found.varied == ("schedule", "threshold", "seed")
    assert found.jobs[2].parameters == {"lr": 2e-3, "device": "cpu", "schedule": "1,p,1", "threshold": 0.5, "seed": 0}
    assert len({job.key for job in found.jobs}) == 6


def test_a_run_that_belongs_to_two_arms_is_made_once_and_counted_in_both(tmp_path):
    found = expand("grid: {schedule: ['2', '1,p,1']}\narms: {mean: {fill: mean}, zero: {fill: zero}}", tmp_path)
    assert [job.arms for job in found.jobs] == [("mean", "zero"), ("mean",), ("zero",)]
    frame = sweep.table(found, {})
    assert list(frame["arm"]) == ["mean", "zero", "mean", "zero"] and set(frame["status"]) == {"to do"}


def test_base_may_be_a_params_file_and_arms_and_grid_go_over_it(tmp_path):
    (tmp_path / "base.yaml").write_text("lr: 1e-2\nseed: 7\nthreshold: 0.1\n")
    found = expand("base: base.yaml\ngrid: {threshold: [0.3]}\narms: {a: , b: {lr: 0.5}}", tmp_path)
    made = [(job.experiment.lr, job.experiment.seed, job.experiment.threshold) for job in found.jobs]
    assert made == [(1e-2, 7, 0.3), (0.5, 7, 0.3)]


REFUSED = {
    "gird: 1": ("some: gird = 1", "no such key (did you mean 'grid'?)", "notebook, base, grid, arms, seeds"),
    "base: {lr: 1}": ("at least one of grid, arms and seeds",),
    "{}": ("at least one of grid, arms and seeds",),
    "- 1": ("allowed is a YAML file with keys",),
    "grid: [1": ("cannot be read", "line 1"),
    "seeds: [0]\nseeds: [1]": ("'seeds' stands twice",),
    "grid: {treshold: [0.1]}": ("some: grid.treshold", "did you mean 'threshold'?"),
    "grid: {threshold: [0.1, 1.5]}": ("some: grid.threshold = 1.5", "from 0 to 1"),
    "grid: {threshold: 0.1}": ("some: grid.threshold = 0.1", "allowed is a list of values"),
    "grid: {threshold: []}": ("some: grid.threshold", "allowed is a list of values"),
    "grid: {threshold: [0.4, .40]}": ("some: grid.threshold = 0.4", "twice"),
    "grid: {schedule: [40, 20,p,20]}": ("some: grid.schedule", "YAML took a schedule apart", "quote"),
    "grid: {schedule: [[20, p, 20]]}": ("some: grid.schedule", "quote it where YAML would take it apart"),
    "grid: {schedule: ['5,p']}": ("some: grid.schedule = '5,p'", "no epoch after it"),
    "arms: {a: {schedule: 20,p,19}}": ("some: arms.a.schedule = 20", "took it apart", "quote it: '20,p,19'"),
    "base: {schedule: [5, p, 5]}\nseeds: [0]": ("some: base.schedule = [5, 'p', 5]", "quote"),
    "base: {schedule: 5,p,5}\nseeds: [0]": ("some: base.schedule = 5", "quote it: '5,p,5'"),
    "arms: {a: {fil: mean}}": ("some: arms.a.fil", "did you mean 'fill'?"),
    "arms: {a: {fill: men}}": ("some: arms.a.fill = 'men'", "did you mean 'mean'?"),
    "arms: [a]": ("some: arms = ['a']", "names with parameters"),
    "arms: {a: 3}": ("some: arms.a = 3", "names and values of parameters"),
    "arms: {a: {lr: 1}}\ngrid: {lr: [1]}": ("some: arms.a.lr = 1", "grid.lr gives it already"),
    "arms: {a: {seed: 1}}\nseeds: [1]": ("some: arms.a.seed = 1", "seeds gives it already"),
    "grid: {seed: [1]}\nseeds: [1]": ("some: grid.seed", "seeds gives it already"),
    "grid: {runs_dir: [a, b]}": ("some: grid.runs_dir", "one runs folder"),
    "arms: {a: {runs_dir: b}}": ("some: arms.a.runs_dir", "runs_dir in base"),
    "seeds: 3": ("some: seeds = 3", "allowed is a list of values"),
    "seeds: [0, -1]": ("some: seeds = -1", "from 0 to"),
    "seeds: [0]\nbase: {folds: 2, fold: 2}": ("some: base.fold = 2", "0 to 1"),
    "seeds: [0]\nbase: nothing.yaml": ("nothing.yaml", "cannot be read"),
    "seeds: [0]\nnotebook: 03_proxy_lop": ("some: notebook = '03_proxy_lop'", "did you mean '03_proxy_loop'?"),
    "seeds: [0]\nnotebook: bare.ipynb": ("some: notebook = 'bare.ipynb'", "no cell with the tag parameters"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_mistake_is_refused_in_a_sentence_that_names_it(tmp_path, text):
    (tmp_path / "bare.ipynb").write_text('{"cells": []}')
    with pytest.raises(ParameterError) as caught:
        expand(text, tmp_path)
    for part in REFUSED[text]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="cannot be read"):
        sweep.read(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweep_files_expand_to_runs_of_known_models(path):
    found = sweep.read(path)
    assert 10 < len(found.jobs) < 1000
    for name in {job.experiment.model for job in found.jobs}:
        models.check_name(name)
    names = data.names()
    assert {job.experiment.dataset for job in found.jobs} <= {*names, "folder"}


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


# The command


def python(code: str, runs: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PA_RUNS": str(runs), "PYTHONPATH": str(home())}
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, cwd=home()
    )


def test_a_dry_run_lists_and_loads_neither_torch_nor_dask(tmp_path):
    code = "import sys; from pa_core import sweep; sweep.main(sys.argv[1:]); print({'torch', 'dask', 'timm'} & sys.modules.keys())"
    done = python(code, tmp_path / "runs", "params/sweeps/threshold.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    first, *listed, last = done.stdout.splitlines()
    assert (
        first == "threshold: 15 runs (24 combinations, 9 of them the same run as another), 0 finished before, 15 to do"
    )
    assert len(listed) == 15 and all(line.startswith("  to do") for line in listed)
    assert "proxies" in listed[-1] and "threshold=0.95 seed=2" in listed[-1]
    assert last == "set()"
    assert not (tmp_path / "runs").exists()


def test_a_refused_file_is_one_line_and_status_2(tmp_path):
    (tmp_path / "bad.yaml").write_text("grid: {treshold: [0.1]}")
    done = python(
        "from pa_core.sweep import main; import sys; sys.exit(main(sys.argv[1:]))", tmp_path, str(tmp_path / "bad.yaml")
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "bad: grid.treshold" in done.stderr


def test_without_dask_it_says_so(tmp_path):
    code = "import sys; sys.modules['distributed'] = None; from pa_core.sweep import main; sys.exit(main(sys.argv[1:]))"
    done = python(code, tmp_path / "runs", "params/sweeps/threshold.yaml")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "a sweep needs Dask" in done.stderr and "pa-core[sweep]" in done.stderr


def test_cores_and_gpus_are_divided(monkeypatch):
    import dask.system
    import distributed.system

    monkeypatch.setattr(dask.system, "CPU_COUNT", 16)
    monkeypatch.setattr(distributed.system, "MEMORY_LIMIT", 2**40)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep.machine() == sweep.Machine(workers=16, threads=1)
    assert sweep.machine(threads=4) == sweep.Machine(workers=4, threads=4)
    assert sweep.machine(workers=3) == sweep.Machine(workers=3, threads=5)
    assert sweep.machine(workers=3, threads=2) == sweep.Machine(workers=3, threads=2)
    monkeypatch.setattr(distributed.system, "MEMORY_LIMIT", 8 * 2**30)
    assert sweep.machine() == sweep.Machine(workers=4, threads=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-ab")
    assert sweep.machine() == sweep.Machine(workers=2, threads=8, gpus=("2", "GPU-ab"))
    assert sweep.machine(cpu=True).gpus == ()


JOBS = """
slurm: {queue: gpu, cores: 8, processes: 2, memory: 32GB, walltime: "12:00:00", jobs: 3, job_extra_directives: ["--gres=gpu:2"]}
"""


def test_the_job_script_of_a_batch_system(tmp_path):
    (tmp_path / "cluster.yaml").write_text(JOBS)
    cluster, jobs, threads = sweep.job_cluster(tmp_path / "cluster.yaml")
    with cluster:
        script = cluster.job_script()
    assert (jobs, threads) == (3, 4)
    for line in (
        "#SBATCH -p gpu",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=30G",
        "#SBATCH -t 12:00:00",
        "#SBATCH --gres=gpu:2",
    ):
        assert line in script.splitlines()
    assert "distributed.cli.dask_worker tcp://" in script and "--nworkers 2" in script
    assert "--resources run=1" in script  # one run at a time


@pytest.mark.parametrize(
    "text", ["slrum: {cores: 1}", "{}", "slurm: 3", "slurm: {cores: 1, memory: 1GB, quue: a}", "slurm: {queue: a}"]
)
def test_a_batch_system_that_does_not_exist_is_refused(tmp_path, text):
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ParameterError, match="^cluster = ") as caught:
        sweep.job_cluster(tmp_path / "cluster.yaml")
    assert "\n" not in str(caught.value)


# Processes; the stub in papermill's place


class Lab:
    """A folder with a sweep of ``count`` seeds, whose runs are made by the stub."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.runs, self.stub, self.file = folder / "runs", folder / "stub", folder / "seeds.yaml"
        self.stub.mkdir()
        self.environment = {
            "PA_RUNS": str(self.runs),
            "STUB": str(self.stub),
            "STUB_DATA": digest,
            "PYTHONPATH": str(home()),
        }
        self.lines: list[str] = []
        self.started: list[subprocess.Popen] = []

    def write(self, count: int) -> Path:
        text = yaml.safe_dump({"base": {"schedule": "1", "device": "cpu"}, "seeds": list(range(count))})
        if not self.file.exists() or self.file.read_text() != text:  # another sweep may be reading it
            self.file.write_text(text)
        return self.file

    def behave(self, seed: int, how: str) -> None:
        (self.stub / str(seed)).write_text(how)

    def sweep(self, count: int, **options) -> pd.DataFrame:
        """In this process."""
        return sweep.run(self.write(count), log=self.lines.append, **{"workers": 2, **options})

    def start(self, count: int) -> subprocess.Popen:
        """In a process, and process group, of its own."""
        script = self.stub / "start.py"
        main = f"pa_core.sweep._PAPERMILL = {STANDING_IN!r}; sys.exit(pa_core.sweep.main(sys.argv[1:]))"
        if not script.exists():
            script.write_text(f"import sys, pa_core.sweep\nif __name__ == '__main__':\n    {main}\n")
        command = [sys.executable, str(script), str(self.write(count)), "--workers", "2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.started.append(
            subprocess.Popen(command, env=os.environ | self.environment, start_new_session=True, **pipes)
        )
        return self.started[-1]

    def noted(self, name: str) -> list[list[str]]:
        file = self.stub / name
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def trained(self) -> Counter:
        """How often each seed was trained."""
        return Counter(int(seed) for seed, *_ in self.noted("trained"))

    def wait_for(self, count: int, name: str = "started") -> None:
        until(lambda: len(self.noted(name)) >= count)


STANDING_IN = sweep._PAPERMILL.replace(
    'runpy.run_module("papermill", run_name="__main__", alter_sys=True)', f"runpy.run_path({str(STUB)!r})"
)
assert STANDING_IN != sweep._PAPERMILL


def until(moment, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < end, "the moment does not come"
        time.sleep(0.02)


def descendants(pid: int) -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process(pid).children(recursive=True)
        if "resource_tracker" not in " ".join(process.cmdline())
    ]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def digest():
    return data.load(dataset="fashion_mini").digest


@pytest.fixture
def lab(tmp_path, monkeypatch, digest) -> Iterator[Lab]:
    lab = Lab(tmp_path, digest)
    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sweep, "_PAPERMILL", STANDING_IN)
    yield lab
    for process in lab.started:  # of a test that failed
        process.kill()
        process.wait()


def test_what_fails_is_reported_and_the_others_go_on(lab):
    for seed, how in {1: "error", 2: "die once", 3: "die"}.items():
        lab.behave(seed, how)
    frame = lab.sweep(6).set_index("seed")
    assert list(frame["status"]) == ["finished", "failed", "finished", "failed", "finished", "finished"]
    assert frame["error"][1] == "NonFiniteLoss: the loss is not finite in epoch 3, step 7"
    assert frame["cell"][1] == "In [4]: run = pa.run(experiment)"
    assert Path(frame["kept"][1]).is_file() and "sweeps/seeds/" in frame["kept"][1]
    assert frame["error"][3] == "its process was killed by signal 9; the last it said: about to die"
    tries = Counter(int(seed) for seed, *_ in lab.noted("started"))
    assert tries == {0: 1, 1: 1, 2: 2, 3: sweep.ATTEMPTS, 4: 1, 5: 1}  # an error of its own is final
    assert lab.trained == dict.fromkeys((0, 2, 4, 5), 1)
    assert {value for _, value in lab.noted("trim")} == {
        "None"
    }  # what Dask sets for its workers costs training a third
    done = frame[frame["status"] == "finished"]
    assert done["test_accuracy"].between(0, 1).all() and done["test_accuracy"].nunique() == 4
    for name, kept in zip(done["run"], done["kept"], strict=True):
        assert Path(kept) == lab.runs / name / "notebook.ipynb" and Path(kept).is_file()
    (report,) = lab.runs.glob("sweeps/seeds/*/report.csv")
    written = pd.read_csv(report).set_index("seed")
    assert list(written["status"]) == list(frame["status"]) and written["error"][1] == frame["error"][1]
    left = {file.name.partition(".")[2] for file in report.parent.iterdir()}
    assert left == {"csv", "yaml", "log", "ipynb"}
    # what failed, and only that, is tried again
    lab.behave(1, ""), lab.behave(3, "")
    again = lab.sweep(6)
    assert "6 runs, 4 finished before, 2 to do" in lab.lines[-6] + "".join(lab.lines) and set(again["status"]) == {
        "finished"
    }
    assert lab.trained == dict.fromkeys(range(6), 1)


def test_status_1_and_the_error_on_the_last_lines(lab):
    lab.behave(0, "error")
    process = lab.start(2)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1, printed
    assert (
        "failed: NonFiniteLoss: the loss is not finite in epoch 3, step 7\n    In [4]: run = pa.run(experiment)\n"
        in printed
    )
    assert "1 of 2 finished, 1 failed" in printed


def test_a_killed_worker_has_its_run_given_out_again(lab):
    lab.behave(0, "wait"), lab.behave(1, "wait")
    made: list[pd.DataFrame] = []
    thread = threading.Thread(target=lambda: made.append(lab.sweep(3)), daemon=True)
    thread.start()
    lab.wait_for(2)
    running = psutil.Process(int(lab.noted("started")[0][1]))
    os.kill(running.ppid(), signal.SIGKILL)
    until(lambda: not alive([running]))  # it ends with its worker
    lab.wait_for(3)
    (lab.stub / "go").touch()
    thread.join(300)
    assert list(made[0]["status"]) == ["finished"] * 3
    assert lab.trained == dict.fromkeys(range(3), 1)


def test_two_hundred_runs_on_two_workers(lab):
    before = descendants(os.getpid())
    frame = lab.sweep(200)
    assert list(frame["status"]) == ["finished"] * 200 and frame["run"].nunique() == 200
    assert lab.trained == dict.fromkeys(range(200), 1)
    assert len(list(lab.runs.glob("*/notebook.ipynb"))) == 200
    assert [line[0] for line in lab.lines if line.startswith("[200/200]")]
    until(lambda: not [p for p in alive(descendants(os.getpid())) if p not in before])
    assert {threads for _, _, threads, _ in lab.noted("started")} == {str(sweep.machine(workers=2).threads)}


def test_each_run_has_a_gpu_of_its_own(lab, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-ab")
    lab.behave(0, "wait"), lab.behave(1, "wait")
    text = yaml.safe_load(lab.write(2).read_text())
    del text["base"]["device"]
    thread = threading.Thread(target=lambda: sweep.run(text, log=lab.lines.append), daemon=True)
    thread.start()
    lab.wait_for(2)
    (lab.stub / "go").touch()
    thread.join(300)
    assert {gpu for *_, gpu in lab.noted("started")} == {"4", "GPU-ab"}
    assert any("a GPU each of 4, GPU-ab" in line for line in lab.lines)


def test_two_sweeps_that_share_runs_make_each_once(lab):
    for seed in range(4):
        lab.behave(seed, "wait")
    both = [lab.start(5), lab.start(5)]
    lab.wait_for(4)  # two of each; each run has two processes, of which one waits for the other
    (lab.stub / "go").touch()
    for process in both:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and "5 of 5 finished, 0 failed" in printed, printed
    assert lab.trained == dict.fromkeys(range(5), 1)
    reports = [pd.read_csv(file) for file in lab.runs.glob("sweeps/seeds/*/report.csv")]
    columns = ["seed", "status", "run", "test_accuracy", "kept"]
    pd.testing.assert_frame_equal(reports[0][columns], reports[1][columns])
    assert len(list(lab.runs.glob("*/notebook.ipynb"))) == 5


def test_a_killed_sweep_leaves_no_process_and_its_successor_does_what_is_left(lab):
    lab.behave(2, "wait"), lab.behave(3, "wait")
    process = lab.start(4)
    lab.wait_for(4)
    family = descendants(process.pid)
    assert len(family) >= 4  # two workers, two runs
    process.kill()
    process.wait()
    until(lambda: not alive(family))
    (lab.stub / "go").touch()
    frame = lab.sweep(4)
    assert any("4 runs, 2 finished before, 2 to do" in line for line in lab.lines)
    assert list(frame["status"]) == ["finished"] * 4
    assert lab.trained == dict.fromkeys(range(4), 1)


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_interrupted_it_stops_within_seconds_and_says_so(lab, how):
    lab.behave(2, "wait"), lab.behave(3, "wait")
    process = lab.start(4)
    lab.wait_for(4)
    until(lambda: len(list(lab.runs.glob("*/notebook.ipynb"))) == 2)  # the sweep has noted the two
    family = descendants(process.pid)
    if how == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all that are in the foreground
    else:
        process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert (
        "interrupted: stopping the runs under way" in printed
        and printed.endswith("stopped\n")
        and "Traceback" not in printed
    )
    assert not alive(family)
    assert len(lab.noted("started")) == 4  # nothing was given out again
    (report,) = lab.runs.glob("sweeps/seeds/*/report.csv")
    assert Counter(pd.read_csv(report)["status"]) == {"finished": 2, "to do": 2}


def test_on_a_running_dask_cluster(lab):
    from distributed import LocalCluster

    lab.behave(1, "error")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit=0) as cluster:
        frame = lab.sweep(4, scheduler=cluster.scheduler_address, threads=3)
        assert len(cluster.scheduler.workers) == 2  # they stay
    assert list(frame["status"]) == ["finished", "failed", "finished", "finished"]
    assert {threads for _, _, threads, _ in lab.noted("started")} == {"3"}


def test_a_scheduler_that_does_not_answer_is_refused(lab, monkeypatch):
    monkeypatch.setattr(sweep, "CONNECT_SECONDS", 0.5)
    with pytest.raises(
        ParameterError, match="scheduler = 'tcp://127.0.0.1:9' is refused: no Dask scheduler answers there"
    ):
        lab.sweep(1, scheduler="tcp://127.0.0.1:9")


def test_a_notebook_that_does_not_make_its_run_has_failed(lab, monkeypatch):
    nothing = 'import sys; open(sys.argv[2], "w").write(\'{"cells": []}\')'
    monkeypatch.setattr(sweep, "_PAPERMILL", nothing)
    frame = lab.sweep(1)
    assert list(frame["status"]) == ["failed"] and "did not make its run" in frame["error"][0]


def test_changed_data_make_another_run(lab, monkeypatch):
    lab.sweep(1)
    monkeypatch.setattr(sweep._Places, "__call__", lambda self, e: lab.runs / "fashion-mini_test-resnet_1_0123456789ab")
    assert sweep.finished(sweep.read(lab.file)) == {}


# Training for real

REAL = {"train_fraction": 0.05, "folds": 20, "device": "cpu", "schedule": "3,p,3", "xai": "saliency", "batch_size": 16}


def timeless(row: dict) -> dict:
    return {k: v for k, v in row.items() if not k.endswith("seconds") and k != "images_per_second"}


def test_killed_training_goes_on_and_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    """First the kernel is killed, then the worker; both times within an epoch after a checkpoint."""
    monkeypatch.setenv("PA_DATA", str(tmp_path / "data"))

    def make(name: str) -> pd.DataFrame:
        lines: list[str] = []
        monkeypatch.setenv("PA_RUNS", str(tmp_path / name))
        frame = sweep.run({"base": REAL, "seeds": [3]}, workers=1, threads=1, log=lines.append)
        assert list(frame["status"]) == ["finished"], lines
        return frame

    made: list[pd.DataFrame] = []
    thread = threading.Thread(target=lambda: made.append(make("disturbed")), daemon=True)
    thread.start()

    def epochs() -> int:
        """As the last checkpoint has it, or more."""
        saved = list((tmp_path / "disturbed").glob("*/checkpoint.pt"))
        return (saved[0].parent / "metrics.jsonl").read_bytes().count(b"\n") if saved else 0

    for epoch, victim in ((1, "kernel"), (4, "worker")):
        until(lambda epoch=epoch: epochs() >= epoch, 300)
        kernel = next(p for p in descendants(os.getpid()) if "ipykernel_launcher" in p.cmdline())
        (kernel if victim == "kernel" else kernel.parent().parent()).kill()
        until(lambda kernel=kernel: not alive([kernel]))
    thread.join(300)
    disturbed = Run(next((tmp_path / "disturbed").glob("*/manifest.json")).parent)
    quiet = make("quiet")
    path = tmp_path / "quiet" / quiet["run"][0]
    # the notebook itself pauses at its proxy step and goes on
    assert len(disturbed.manifest["resumed"]) >= 3 and len(Run(path).manifest["resumed"]) == 1
    assert disturbed.manifest["threads"] == Run(path).manifest["threads"] == 1
    assert disturbed.path.name == path.name
    assert timeless(disturbed.summary) == timeless(Run(path).summary)
    for name in ("weights.safetensors", "predictions.csv", "classes.csv"):
        assert (disturbed.path / name).read_bytes() == (path / name).read_bytes(), name
    rows = [[timeless(row) for row in run.metrics.to_dict("records")] for run in (disturbed, Run(path))]
    assert rows[0] == rows[1]
    notebook = json.loads((path / "notebook.ipynb").read_text())
    assert any("image/png" in str(output) for cell in notebook["cells"] for output in cell.get("outputs", []))
    assert len(list((path / "figures").glob("*.png"))) >= 2
    # the runs are there: nothing is made again, and a failed look-up of one is no failure of the rest
    lines: list[str] = []
    frame = sweep.run({"base": REAL, "seeds": [3]}, log=lines.append)
    assert lines == ["sweep: 1 runs, 1 finished before, 0 to do"] and frame["run"][0] == path.name
    assert (
        sweep.estimate(
            sweep.expand({"base": REAL, "seeds": [4]}), sweep.expand({"base": REAL, "seeds": [4]}).jobs, workers=1
        )
        > 10
    )
    assert set(results.load()["run"]) == {path.name}


def test_without_a_notebook_the_worker_makes_the_same_run(tmp_path):
    """One of two is not finite, the other's worker is killed: the first is reported, the second ends as if nothing had been."""
    base = {"train_fraction": 0.1, "schedule": "2,p,2", "device": "cpu", "runs_dir": str(tmp_path / "direct")}
    file = {"notebook": "none", "base": base, "arms": {"not finite": {"lr": 1e30}, "fine": {}}}
    frames: list[pd.DataFrame] = []
    thread = threading.Thread(
        target=lambda: frames.append(sweep.run(file, workers=1, threads=1, log=lambda _text: None))
    )
    thread.start()

    def begun() -> bool:
        fine = [
            path
            for path in (tmp_path / "direct").glob("*/checkpoint.pt")
            if path.parent.joinpath("metrics.jsonl").stat().st_size
        ]
        return bool(fine)

    until(begun)
    (worker,) = descendants(os.getpid())
    worker.kill()
    thread.join(300)
    frame = frames[0].set_index("arm")
    assert dict(frame["status"]) == {"fine": "finished", "not finite": "failed"}
    failed = frame.loc["not finite"]
    assert failed["error"].startswith("NonFiniteLoss: the loss is not finite in epoch 1") and failed["cell"] == ""
    assert "Traceback" in Path(failed["kept"]).read_text()
    made = tmp_path / "direct" / frame["run"]["fine"]
    assert len(Run(made).manifest["resumed"]) == 1 and not (made / "notebook.ipynb").exists()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = experiment.run(
            Experiment.from_mapping(base | {"runs_dir": str(tmp_path / "here")}), log=lambda _text: None
        )
    finally:
        torch.set_num_threads(before)
    assert here.path.name == made.name and timeless(here.summary) == timeless(Run(made).summary)
    assert (here.path / "weights.safetensors").read_bytes() == (made / "weights.safetensors").read_bytes()


def test_the_time_of_runs_is_estimated_from_runs_on_the_same_data(tmp_path, monkeypatch):
    monkeypatch.setenv("PA_RUNS", str(tmp_path))
    measured = {
        "data_dir": [None, "/there/pets", "/there/cars"],
        "dataset": ["fashion_mini", "folder", "folder"],
        "train_seconds": [10.0, 20.0, 60.0],
    }
    fixed = {
        "status": "finished",
        "epochs": 10,
        "proxy_seconds": 0.0,
        "model": "test_resnet",
        "train_fraction": 1.0,
        "protocol": "clean",
    }
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "manifest.json").touch()
    monkeypatch.setattr(results, "load", lambda _runs_dir: pd.DataFrame(measured | fixed))
    for place, each in ((None, 1.0), ("/there/pets", 2.0), ("/there/cars", 6.0)):
        base = {"schedule": "10"} | ({"dataset": "folder", "data_dir": place} if place else {})
        for notebook, start in (("03_proxy_loop", 10), ("none", 2)):
            some = sweep.expand({"base": base, "seeds": [0, 1, 2, 3], "notebook": notebook})
            assert sweep.estimate(some, some.jobs, workers=2) == 4 * (10 * each + start) / 2
    other = sweep.expand({"base": {"dataset": "folder", "data_dir": "/there/boats"}, "seeds": [0]})
    assert sweep.estimate(other, other.jobs, workers=2) is None
