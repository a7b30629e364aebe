"""The predecessor's protocol, replayed: what its stages train on and report, and that the clean one knows nothing of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pa_core import experiment, protocol, results, runs, schedule, selection, train
from pa_core.params import Experiment

QUIET = {"log": lambda _text: None}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 4 classes with 50 images each, of which 128 are for training; the classes are hard to tell apart."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in range(4):
        (folder / f"class_{label}").mkdir()
        for number in range(50):
            pixels = generator.integers(0, 200, (32, 32, 3)) + 10 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class_{label}" / f"{number}.png")
    return folder


@pytest.fixture
def thesis(images, tmp_path, monkeypatch):
    """An experiment in which each stage draws 96 of the 128 images and trains on 48."""
    monkeypatch.setenv("PA_DATA", str(tmp_path / "data"))

    def make(**changes):
        settings = {
            "protocol": "thesis",
            "train_fraction": 0.75,
            "schedule": "1,p,1,p,1",
            "batch_size": 16,
            "fraction": 0.5,
        }
        settings |= {
            "dataset": "folder",
            "data_dir": str(images),
            "scheduler": "constant",
            "runs_dir": str(tmp_path / "runs"),
        }
        return Experiment(**(settings | changes))

    return make


@pytest.fixture(scope="module")
def part():
    return experiment.load_data(Experiment(protocol="thesis", train_fraction=0.1)).train


@pytest.fixture
def watched(monkeypatch):
    """For each epoch the source that it drew from, and how many images."""
    seen, real = [], train.train_one_epoch

    def spying(state, source, **keywords):
        seen.append((source, keywords["draws"]))
        return real(state, source, **keywords)

    monkeypatch.setattr(train, "train_one_epoch", spying)
    return seen


def test_p_is_an_epoch_of_its_own_there():
    assert schedule.stages("2,p,1,p,1", p_trains=True) == (
        (0, False),
        (0, False),
        (1, False),
        (2, True),
        (3, False),
        (4, True),
    )
    for text in ("18", "9,p,8", "3,p,4,p,4,p,4"):
        assert schedule.epochs(text, p_trains=True) == len(schedule.stages(text, p_trains=True)) == 18
        e = Experiment(protocol="thesis", schedule=text)
        assert e.length == 18 and e.plain().schedule == "18"
    assert Experiment(schedule="9,p,8").plain().schedule == "17"


def test_halves_are_of_equal_size_disjoint_and_stratified():
    labels = torch.arange(10).repeat_interleave(torch.arange(10, 20))
    one, other = protocol.halves(labels, count=101, seed=3)
    assert (len(one), len(other)) == (51, 50)
    assert not set(one.tolist()) & set(other.tolist())
    assert ((torch.bincount(labels[one]) - torch.bincount(labels[other])).abs() <= 1).all()
    again, _ = protocol.halves(labels, count=101, seed=3)
    assert torch.equal(one, again)
    assert not torch.equal(one.sort().values, protocol.halves(labels, count=101, seed=4)[0].sort().values)


def test_every_stage_draws_anew_and_most_of_what_is_reported_on_was_trained_on(part):
    e = Experiment(protocol="thesis", schedule="3,p,4,p,4,p,4")
    stages = [protocol.stage(part, e, number=number, steps=[]) for number in range(7)]
    trained = set()
    for stage in stages[:-1]:
        trained |= set(stage.training.positions.tolist())
    last = stages[-1]
    assert not set(last.training.positions.tolist()) & set(last.reported.positions.tolist())
    known = np.mean([i in trained for i in last.reported.positions.tolist()])
    assert known == pytest.approx(1 - 0.5**6, abs=0.01)  # six earlier stages had each image with probability one half


def test_the_thesis_protocol_from_end_to_end(thesis, watched):
    run = experiment.run(thesis(), **QUIET)
    sources = [source for source, _ in watched]
    assert [draws for _, draws in watched] == [48] * 5  # the same in every stage, however many proxies there are
    assert len({tuple(source.positions.tolist()) for source in sources}) == 5
    n = 128
    assert [int((source.positions >= n).sum()) for source in sources[:3] + sources[4:]] == [
        0,
        0,
        0,
        0,
    ]  # numbered stages, first p
    assert len(sources[3].base) == n + len(run.proxies(1))  # the second p could draw the proxies of the first
    for step, source in ((1, sources[1]), (2, sources[3])):
        chosen = np.load(run.path / "proxies" / f"step_{step}" / "positions.npy")
        assert len(chosen) and set(chosen.tolist()) <= set(source.positions.tolist())  # of its own training half
        rows = run.proxies(step)
        assert (rows["label"] != rows["predicted"]).all()
    summary, rows = run.summary, run.metrics
    assert list(rows["stage"]) == [0, 1, 2, 3, 4]
    assert summary["reported_accuracy"] == rows["reported_accuracy"].iloc[-1]
    assert summary["n_train"] == n and summary["n_test"] == 40 and summary["n_val"] == 32
    assert run.manifest["status"] == runs.FINISHED


def test_test_and_validation_images_are_never_drawn(part):
    dataset = experiment.load_data(Experiment())
    assert part.ids == dataset.train.ids  # train_fraction is what a stage draws, not what there is
    others = set(dataset.val.ids) | set(dataset.test.ids)
    for name in ("thesis", "thesis_text"):
        e = Experiment(protocol=name, schedule="1,p,1")
        for number in range(3):
            stage = protocol.stage(part, e, number=number, steps=[])
            drawn = torch.cat([stage.training.positions, stage.reported.positions])
            assert not others & {part.ids[i] for i in drawn.tolist()}


def test_as_the_text_has_it_later_stages_train_on_proxies_and_report_on_originals(thesis, watched):
    e = thesis(protocol="thesis_text", schedule="1,p,1", train_fraction=1.0, fill="zero")
    run = experiment.run(e, **QUIET)
    chosen = np.load(run.path / "proxies" / "step_1" / "positions.npy")
    images = np.load(run.path / "proxies" / "step_1" / "images.npy")
    last = watched[-1][0]
    at = [i for i, position in enumerate(last.positions.tolist()) if position in set(chosen.tolist())]
    assert at, "about half of the proxies are in the last training half"
    kept = dict(zip(chosen.tolist(), images, strict=True))
    for i, image in zip(at, last.read(torch.tensor(at)), strict=True):
        assert np.array_equal(image.numpy(), kept[int(last.positions[i])])
    folders = [run.path / "proxies" / "step_1"]
    dataset = experiment.load_data(e)
    reported = protocol.stage(dataset.train, e, number=2, steps=folders).reported
    among = torch.arange(len(reported))
    assert torch.equal(reported.read(among), dataset.train.read(reported.positions))


def test_wrong_images_are_taken_in_random_order_and_not_the_worst_first():
    n = 200
    scores = selection.Scores(
        loss=torch.arange(n).float(), margin=torch.zeros(n), entropy=torch.zeros(n),
        predicted=torch.arange(n) % 2, labels=torch.zeros(n, dtype=torch.long),
    )  # fmt: skip
    among = torch.arange(0, 150)
    chosen = selection.some_wrong(scores, among=among, fraction=0.5, seed=0)
    assert len(chosen) == 38  # half of the 75 odd ones, rounded up
    assert (chosen % 2 == 1).all() and chosen.max() < 150 and len(set(chosen.tolist())) == 38
    worst = torch.arange(149, 149 - 2 * 38, -2)
    assert set(chosen.tolist()) != set(worst.tolist())
    assert set(chosen.tolist()) != set(range(1, 2 * 38, 2))  # nor the first ones
    assert torch.equal(chosen, selection.some_wrong(scores, among=among, fraction=0.5, seed=0))
    assert len(selection.some_wrong(scores, among=torch.arange(0, 150, 2), fraction=0.5, seed=0)) == 0


def test_a_run_that_was_stopped_goes_on_with_the_same_stages(thesis, tmp_path, monkeypatch):
    e = thesis()
    whole = experiment.run(replace(e, runs_dir=str(tmp_path / "whole")), **QUIET)
    real, count = train.train_one_epoch, iter(range(100))

    def stopping(*arguments, **keywords):
        if next(count) == 3:  # in the second p, whose pool holds the proxies of the first
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(train, "train_one_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(e, **QUIET)
    monkeypatch.setattr(train, "train_one_epoch", real)
    run = experiment.run(e, **QUIET)
    for name in ("reported_accuracy", "test_accuracy", "test_loss", "val_accuracy", "proxy_images"):
        assert run.summary[name] == whole.summary[name]
    assert run.manifest["resumed"][0]["epoch"] == 3


def test_the_clean_protocol_has_nothing_of_it(thesis):
    run = experiment.run(thesis(protocol="clean", schedule="1,p,1"), **QUIET)
    assert "reported_accuracy" not in run.summary and "reported_accuracy" not in run.metrics


def test_what_decides_a_run_under_the_thesis_protocol():
    base = Experiment(protocol="thesis", schedule="9,p,8")
    for changes in ({"select": "random"}, {"overlay": "append"}, {"keep_proxies": "all"}):
        assert replace(base, **changes).effective() == base.effective()
    for changes in (
        {"fill": "zero"},
        {"fraction": 0.5},
        {"train_fraction": 0.5},
        {"protocol": "clean"},
        {"protocol": "thesis_text"},
    ):
        assert replace(base, **changes).effective() != base.effective()


def test_pairs_do_not_mix_protocols(thesis):
    e = thesis(protocol="clean", schedule="1,p,1", train_fraction=1.0)  # with it both protocols have the same split
    clean = experiment.run(e, **QUIET)
    for other in (e.plain(), replace(e, protocol="thesis", schedule="2")):
        experiment.run(other, **QUIET)
    paired = results.pairs(results.load(e.runs_dir))
    assert list(paired["run"]) == [clean.path.name]
    plain = json.loads((clean.path.parent / paired["plain_run"].iloc[0] / "manifest.json").read_text())
    assert plain["parameters"]["protocol"] == "clean"


def test_as_coded_one_p_stage_trains_on_no_proxy_at_all(thesis):
    """Why study C does not make its coded arm of 9,p,8: it is the run without masking, bit for bit."""
    coded = experiment.run(thesis(schedule="1,p,1"), **QUIET)
    none = experiment.run(thesis(schedule="1,p,1", protocol="thesis_text", fill="none"), **QUIET)
    assert len(coded.proxies(1)) and coded.path != none.path
    assert (coded.path / "weights.safetensors").read_bytes() == (none.path / "weights.safetensors").read_bytes()
    assert coded.summary["reported_accuracy"] == none.summary["reported_accuracy"]


def test_all_data_takes_as_many_steps_as_the_halves():
    """Study C's fixed split on all data: 9 epochs of all images, where the others take 18 of half of them."""
    for n in (6583, 128, 129):
        halves, whole = (Experiment(protocol=name, batch_size=32) for name in ("thesis", "clean"))
        steps = [train.steps_per_epoch(protocol.draws(n, e), e.batch_size) for e in (halves, whole)]
        assert abs(18 * steps[0] - 9 * steps[1]) <= 9, n
    assert 18 * train.steps_per_epoch(protocol.draws(6583, halves), 32) == 9 * train.steps_per_epoch(
        protocol.draws(6583, whole), 32
    )
