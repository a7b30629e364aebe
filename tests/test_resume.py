"""A run that was killed ends as one that was not: real processes, real ``kill -9``, results bit for bit.

A process is killed from outside at a moment read off the run's directory, or kills itself where it
puts a file in its place, at points too short to be hit from outside.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import PROCESSES, QUIET, same

from pa_core import data, experiment, train
from pa_core.errors import RunError
from pa_core.params import Experiment
from pa_core.runs import Run, load_checkpoint

if not hasattr(signal, "SIGKILL"):
    pytest.skip("needs kill -9", allow_module_level=True)

Settings = dict[str, Any]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Settings:
    """A hundred real images and 24 to test on."""
    folder = tmp_path_factory.mktemp("images")
    source = data.load(dataset="fashion_mini")
    for part, each in ((source.train, 25), (source.test, 6)):
        for label in range(4):
            (folder / part.name / f"class {label}").mkdir(parents=True)
            positions = (part.labels == label).nonzero().flatten()[:each]
            for k, image in enumerate(part.read(positions)):
                Image.fromarray(image[0].numpy()).save(folder / part.name / f"class {label}" / f"{k}.png")
    return {"dataset": "folder", "data_dir": str(folder), "image_size": 28, "device": "cpu"}


@pytest.fixture(scope="module")
def one_step(images) -> Settings:
    """A proxy step that takes its time, in two chunks, so that a kill can come between them."""
    return images | {"schedule": "2,p,1", "batch_size": 8, "xai": "integrated_gradients", "fraction": 0.9}


@pytest.fixture(scope="module")
def every_event(images) -> Settings:
    """All events; a network with dropout and thus the global RNG; proxies of both steps are kept and appended."""
    kept = {"schedule": "1,p,2,x0.5,1,p,1,c,l0.5,x0.5,1", "overlay": "append", "keep_proxies": "all"}
    draws = {"augment": "flip,erase,cutmix,mixup", "fill": "noise", "proxy_probability": 0.7}
    return images | kept | draws | {"batch_size": 16, "xai": "gradcam", "model": "ghostnet_050"}


# Processes that train


def worker(settings: Settings, log: Path, threads: int, slow: bool, die: tuple | None) -> None:
    os.environ["PA_DATA"] = str(log.parent / "data")
    torch.set_num_threads(threads)
    if slow:
        slow_down()
    if die:
        die_at(*die)
    with open(log, "a", buffering=1) as file:
        experiment.run(Experiment(**settings), log=lambda text: print(text, file=file))


def slow_down() -> None:
    """Let an epoch, and the end, last on any machine, so that a kill can come in the middle."""
    feed, evaluate = train.feed, train.evaluate

    def slow_feed(*arguments: Any, **keywords: Any) -> Iterator[torch.Tensor]:
        for batch in feed(*arguments, **keywords):
            time.sleep(0.05)
            yield batch

    def slow_evaluate(*arguments: Any, **keywords: Any) -> train.Evaluation:
        time.sleep(0.3)
        return evaluate(*arguments, **keywords)

    train.feed, train.evaluate = slow_feed, slow_evaluate


def die_at(name: str, when: str, count: int) -> None:
    """Let this process kill itself just before or after it puts ``name`` in place, the ``count``-th time."""
    seen = 0

    def dying(real: Callable[..., None]) -> Callable[..., None]:
        def move(source: Any, target: Any, **keywords: Any) -> None:
            nonlocal seen
            here = Path(target).name == name
            seen += here
            if here and (when, seen) == ("before", count):
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target, **keywords)
            if here and (when, seen) == ("after", count):
                os.kill(os.getpid(), signal.SIGKILL)

        return move

    os.replace, os.rename = dying(os.replace), dying(os.rename)


class Training:
    """A process that trains; its log and its run lie under ``folder``."""

    def __init__(self, settings: Settings, folder: Path, *, name="", threads=1, slow=False, die: tuple | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.runs, self.log_file = folder / "runs", folder / f"log{name}.txt"
        self.log_file.touch()
        arguments = (settings | {"runs_dir": str(self.runs)}, self.log_file, threads, slow, die)
        self.process = PROCESSES.Process(target=worker, args=arguments, daemon=True)
        self.process.start()

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait(self) -> Path:
        """The finished run's directory."""
        self.process.join(300)
        assert self.process.exitcode == 0, self.log
        return the_run(self.runs)

    def wait_for(self, moment: Callable[[Path], bool]) -> Path:
        """Until something holds of the run's directory."""
        end = time.monotonic() + 120
        while not ((path := the_run(self.runs)) and moment(path)):
            assert self.process.is_alive(), f"ended before the moment came:\n{self.log}"
            assert time.monotonic() < end, f"the moment does not come:\n{self.log}"
            time.sleep(0.005)
        return path

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.died()

    def died(self) -> None:
        self.process.join(120)
        assert self.process.exitcode == -signal.SIGKILL, self.log


def the_run(runs: Path) -> Path | None:
    """The one run under ``runs``."""
    found = list(runs.iterdir()) if runs.is_dir() else []
    assert len(found) <= 1, found
    return found[0] if found else None


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    """settings -> the directory of a run that was never killed, made once."""
    made: dict[str, Path] = {}

    def get(settings: Settings) -> Path:
        key = json.dumps(settings)
        if key not in made:
            made[key] = Training(settings, tmp_path_factory.mktemp("unkilled")).wait()
        return made[key]

    return get


# Killed at a moment


def lines(path: Path) -> int:
    file = path / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saved(path: Path, name: str = "metrics.jsonl") -> bool:
    """Whether there is a checkpoint newer than this file or folder."""
    one, other = path / name, path / "checkpoint.pt"
    return one.exists() and other.exists() and other.stat().st_mtime_ns > one.stat().st_mtime_ns


class Moment(NamedTuple):
    """When to kill, and what must be true of the directory afterwards.

    Attributes:
        reached: of the run's directory.
        after: seconds to let pass then.
        lines: of metrics.jsonl.
        steps: folders of proxy steps.
        checkpoint: (epochs, proxy steps) that it holds; two possibilities where the kill races with it.
    """

    reached: Callable[[Path], bool]
    after: float
    lines: int
    steps: tuple[str, ...]
    checkpoint: tuple[tuple[int, int] | None, ...]


STEP = "proxies/step_1.part"
MOMENTS = {
    "before the first line": Moment(lambda p: Run(p).manifest != {}, 0.1, 0, (), (None,)),
    "at the first line": Moment(lambda p: lines(p) == 1, 0, 1, (), (None, (1, 0))),
    "within epoch 2": Moment(lambda p: lines(p) == 1 and saved(p), 0.1, 1, (), ((1, 0),)),
    "within the proxy step": Moment(
        lambda p: (p / "proxies/step_1.part").exists(), 0.1, 2, ("step_1.part",), ((2, 0),)
    ),
    "within the epoch after it": Moment(lambda p: saved(p, "proxies/step_1"), 0.1, 2, ("step_1",), ((2, 1),)),
    "while the test images are read": Moment(lambda p: lines(p) == 3 and saved(p), 0, 3, ("step_1",), ((3, 1),)),
}


def kill_at(training: Training, moment: Moment) -> Path:
    """Kill a process and see that it was in the middle of what was meant."""
    path = training.wait_for(moment.reached)
    time.sleep(moment.after)
    training.kill()
    assert lines(path) == moment.lines
    assert tuple(f.name for f in path.glob("proxies/*")) == moment.steps
    state = load_checkpoint(path)
    assert (state and (state["state"]["epoch"], len(state["records"]))) in moment.checkpoint
    assert Run(path).manifest["status"] == "running" and not (path / "summary.json").exists()
    return path


@pytest.mark.parametrize("name", MOMENTS)
def test_killed_and_started_again_it_ends_as_one_that_was_not(tmp_path, unkilled, name, one_step):
    path = kill_at(Training(one_step, tmp_path, slow=True), MOMENTS[name])
    assert Training(one_step, tmp_path).wait() == path
    same(path, unkilled(one_step))
    board = EventAccumulator(str(path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("val/loss")] == [1, 2, 3]


def test_killed_twice_and_continued_with_other_threads(tmp_path, unkilled, one_step):
    """The sums of floats depend on the number of threads, so a run goes on with the number it began with."""
    kill_at(Training(one_step, tmp_path, slow=True), MOMENTS["within epoch 2"])
    path = kill_at(Training(one_step, tmp_path, threads=2, slow=True), MOMENTS["within the epoch after it"])
    again = Training(one_step, tmp_path, name="3", threads=2)
    same(again.wait(), unkilled(one_step))
    assert Run(path).manifest["threads"] == 1
    assert [resumed["epoch"] for resumed in Run(path).manifest["resumed"]] == [1, 2]
    assert "epoch 3/3" in again.log and "epoch 2/3" not in again.log  # nothing was done over


# file or folder that is put in its place; just before or after; for which time; lines of metrics.jsonl then
DEATHS = [
    ("manifest.json", "before", 1, 0),
    ("metrics.jsonl", "after", 2, 1),  # before the first checkpoint
    ("checkpoint.pt", "before", 1, 1),
    ("checkpoint.pt", "after", 1, 1),
    ("step_1", "before", 1, 1),
    ("step_1", "after", 1, 1),
    ("checkpoint.pt", "after", 1, 1),
    ("checkpoint.pt", "before", 2, 3),
    ("metrics.jsonl", "before", 1, 3),  # cut back to the checkpoint
    ("metrics.jsonl", "after", 1, 2),
    ("checkpoint.pt", "after", 1, 3),  # before pruning
    ("checkpoint.pt", "before", 1, 3),  # pruned, and not saved
    ("checkpoint.pt", "after", 1, 3),  # pruned and saved
    ("checkpoint.pt", "before", 1, 4),  # in the epoch after it
    ("step_2", "after", 1, 4),
    ("checkpoint.pt", "after", 3, 5),  # the maps are forgotten
    ("checkpoint.pt", "before", 1, 5),  # the learning rate is changed, and not saved
    ("checkpoint.pt", "after", 1, 5),  # and saved
    ("weights.safetensors", "after", 1, 6),
    ("summary.json", "after", 1, 6),
    ("manifest.json", "before", 2, 6),
]


def test_killed_around_every_file_and_event(tmp_path, unkilled, every_event):
    """One run, killed twenty-two times."""
    for name, when, count, expected in DEATHS:
        Training(every_event, tmp_path, die=(name, when, count)).died()
        path = the_run(tmp_path / "runs")
        assert lines(path) == expected, (name, when)
        assert not Run(path).finished
    Training(every_event, tmp_path, die=("manifest.json", "after", 2)).died()  # when all is written, it is finished
    assert Run(path).finished and (path / "checkpoint.pt").exists()
    again = Training(every_event, tmp_path, name="2")
    same(again.wait(), unkilled(every_event))
    assert "finished before" in again.log and "epoch" not in again.log
    assert Run(path).summary["sparsity"] == pytest.approx(0.75, abs=1e-3)


# Two processes


def test_of_two_processes_one_trains_and_the_other_gets_its_run(tmp_path, unkilled, one_step):
    both = [Training(one_step, tmp_path, name=name, slow=True) for name in "ab"]
    path = both[0].wait()
    assert both[1].wait() == path
    waited, trained = sorted((training.log for training in both), key=len)
    assert waited.splitlines()[0].startswith("another process trains") and "finished before" in waited
    assert "epoch" not in waited and trained.count("epoch ") == 3
    same(path, unkilled(one_step))


def test_who_waits_goes_on_when_the_other_is_killed(tmp_path, unkilled, one_step):
    first = Training(one_step, tmp_path, name="a", slow=True)
    first.wait_for(lambda path: lines(path) == 1 and saved(path))
    second = Training(one_step, tmp_path, name="b")
    path = second.wait_for(lambda _path: "another process trains" in second.log)
    assert lines(path) < 3
    first.kill()
    same(second.wait(), unkilled(one_step))
    assert "continuing" in second.log


# Within one process


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.setenv("PA_DATA", str(tmp_path / "data"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_interrupted_and_run_again_from_what_was_prepared(tmp_path, unkilled, every_event):
    """What `prepare` made is left as it is and serves again; what the process does in between is no matter."""
    prepared = experiment.prepare(Experiment(**every_event, runs_dir=str(tmp_path / "runs")))
    before = {name: value.clone() for name, value in prepared.model.state_dict().items()}

    def interrupt_at(*beginnings: str) -> Callable[[str], None]:
        def log(text: str) -> None:
            if text.startswith(beginnings):
                raise KeyboardInterrupt

        return log

    for moment in ("epoch 2/", "pruned", "proxy step 2", "learning rate"):
        with pytest.raises(KeyboardInterrupt):
            experiment.run(prepared, log=interrupt_at(moment))
        manifest = Run(prepared.path).manifest
        assert (manifest["status"], manifest["error"]) == ("interrupted", "KeyboardInterrupt: ")
        assert experiment.find(prepared) is None
        torch.rand(5)
    done = experiment.run(prepared, **QUIET)
    same(done.path, unkilled(every_event))
    assert done.manifest["status"] == "finished" and done.manifest["error"] is None
    after = prepared.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())
    assert prepared.dataset.test.reads == len(prepared.dataset.test)
    kept = {f: f.read_bytes() for f in done.path.rglob("*") if f.is_file()}
    assert experiment.run(prepared, **QUIET).path == experiment.find(prepared).path == done.path
    assert kept == {f: f.read_bytes() for f in done.path.rglob("*") if f.is_file()}


def test_the_callers_rng_and_threads_are_left_as_found(tmp_path, every_event):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    experiment.run(Experiment(**every_event | {"schedule": "1", "runs_dir": str(tmp_path / "runs")}), **QUIET)
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == 1


def test_what_does_not_belong_to_the_run_is_not_continued(tmp_path, unkilled, one_step):
    path = tmp_path / "runs" / unkilled(one_step).name
    shutil.copytree(unkilled(one_step), path)
    manifest = Run(path).manifest | {"precision": "float16", "status": "running"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    before = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
    with pytest.raises(RunError, match="its precision is float16, and would now be float32") as caught:
        experiment.run(Experiment(**one_step, runs_dir=str(tmp_path / "runs")), **QUIET)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert before == {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
