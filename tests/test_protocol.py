"""The predecessor's protocol, replayed: what its stages train on and report; the clean one knows nothing of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pa_core import batch, experiment, protocol, proxy, runs, train
from pa_core.augment import generators
from pa_core.params import Experiment
from pa_core.proxy import Step

QUIET = {"log": lambda _text: None}
THESIS = {"protocol": "thesis", "train_fraction": 0.75, "schedule": "1,p,1,p,1", "batch_size": 16, "fraction": 0.5}


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
    places = {"dataset": "folder", "data_dir": str(images), "runs_dir": str(tmp_path / "runs"), "device": "cpu"}
    return Experiment(**THESIS, **places, scheduler="constant")


@pytest.fixture(scope="module")
def part():
    return experiment.load_data(Experiment(protocol="thesis", train_fraction=0.1)).train


@pytest.fixture
def watched(monkeypatch):
    """For each epoch the pool that it drew from, and how many entries."""
    seen, real = [], train.train_one_epoch

    def spying(state, pool, **keywords):
        seen.append((pool, keywords["entries"]))
        return real(state, pool, **keywords)

    monkeypatch.setattr(train, "train_one_epoch", spying)
    return seen


def some(*positions):
    return Step(positions=torch.tensor(positions), maps=torch.rand(len(positions), 2, 2).half())


def test_halves_are_of_equal_size_disjoint_and_stratified():
    labels = torch.arange(10).repeat_interleave(torch.arange(10, 20))
    one, other = protocol.halves(labels, count=101, seed=3)
    assert (len(one), len(other)) == (51, 50) and not set(one.tolist()) & set(other.tolist())
    assert ((torch.bincount(labels[one]) - torch.bincount(labels[other])).abs() <= 1).all()
    assert torch.equal(one, protocol.halves(labels, count=101, seed=3)[0])
    assert set(one.tolist()) != set(protocol.halves(labels, count=101, seed=4)[0].tolist())


def test_every_stage_draws_anew_and_most_of_what_is_reported_on_was_trained_on(part):
    e = Experiment(protocol="thesis", schedule="3,p,4,p,4,p,4")
    *earlier, last = [protocol.stage(part, e, number=number, steps=[]) for number in range(7)]
    trained = {i for stage in earlier for i in stage.training.origin.tolist()}
    reported = last.reported.origin.tolist()
    assert not set(last.training.origin.tolist()) & set(reported)
    known = np.mean([i in trained for i in reported])
    assert known == pytest.approx(1 - 0.5**6, abs=0.01)  # six earlier stages had each image with probability one half


def test_only_the_training_part_is_drawn_from(part):
    dataset = experiment.load_data(Experiment())
    assert part.ids == dataset.train.ids  # train_fraction is what a stage draws, not what there is
    for name in ("thesis", "thesis_text"):
        e = Experiment(protocol=name, schedule="1,p,1", train_fraction=0.5)
        for number in range(3):
            stage = protocol.stage(part, e, number=number, steps=[some(1, 2)])
            assert stage.training.part is part and stage.reported.part is part
            assert len(stage.training) == 800 == protocol.epoch_size(len(part), e) and len(stage.reported) == 800


def test_as_coded_only_a_p_stage_reads_proxies_and_they_lie_beside_their_originals(part):
    e, n = Experiment(protocol="thesis", schedule="1,p,1,p,1"), len(part)
    stages = [protocol.stage(part, e, number=number, steps=[some(*range(1000))]) for number in range(5)]
    counts = [int(stage.training.proxied.sum() + stage.reported.proxied.sum()) for stage in stages]
    assert [count > 0 for count in counts] == [False, True, False, True, False]
    for stage in stages:
        assert torch.equal(stage.candidates, stage.training.origin[~stage.training.proxied])  # never a proxy again
        assert len(stage.training) == n // 2
    assert 0.7 < counts[1] / (1000 * n / (n + 1000)) < 1.3  # drawn like any other entry


def test_as_the_text_has_it_every_later_stage_trains_on_proxies_and_reports_on_originals(part):
    e = Experiment(protocol="thesis_text", schedule="1,p,1,2")
    stage = protocol.stage(part, e, number=2, steps=[some(*range(500))])
    assert torch.equal(stage.training.proxied, stage.training.origin < 500) and stage.training.proxied.any()
    assert not stage.reported.proxied.any() and (stage.reported.origin < 500).any()
    assert torch.equal(stage.candidates, stage.training.origin)


def test_the_clean_protocol_has_nothing_of_it(part):
    stage = protocol.stage(part, Experiment(), number=1, steps=[some(3)])
    assert stage.reported is None and stage.candidates is None and len(stage.training) == len(part)
    assert torch.nonzero(stage.training.proxied).flatten().tolist() == [3]


def test_batches_without_a_proxy_are_evaluated_as_they_are(part):
    e = Experiment(protocol="thesis", feather=2, fill="noise", threshold_mode="deviations")
    images, pool = part.read(torch.arange(4)), proxy.pool(part, e, [some(6, 7)])
    found = batch.unaugmented(images, pool=pool, index=torch.arange(4), experiment=e, draws=generators(0, 0))
    assert torch.equal(found, batch.to_pixels(images))


def test_the_thesis_protocol_from_end_to_end(thesis, watched):
    said = []
    run = experiment.run(thesis, log=said.append)
    steps = [text for text in said if text.startswith("proxy step")]
    assert len(steps) == 2 and all("by misclassified, " in text for text in steps)  # whatever select says
    pools = [pool for pool, _ in watched]
    assert [entries for _, entries in watched] == [48] * 5  # the same in every stage, however many proxies there are
    assert len({tuple(pool.origin.tolist()) for pool in pools}) == 5
    assert [bool(pool.proxied.any()) for pool in pools[:3] + pools[4:]] == [False] * 4  # numbered stages, the first p
    assert len(pools[3].maps) == len(run.proxies(1)) > 0  # the second p could draw the proxies of the first
    for number, pool in ((1, pools[1]), (2, pools[3])):
        chosen, rows = np.load(run.step(number) / "positions.npy"), run.proxies(number)
        assert len(chosen) and set(chosen.tolist()) <= set(pool.origin.tolist())  # of its own training half
        assert (rows["label"] != rows["predicted"]).all()
    summary, metrics = run.summary, run.metrics
    assert list(metrics["stage"]) == [0, 1, 2, 3, 4] and run.manifest["status"] == runs.FINISHED
    assert summary["reported_accuracy"] == metrics["reported_accuracy"].iloc[-1]
    assert (summary["n_train"], summary["n_test"], summary["n_val"]) == (128, 40, 32)
    clean = experiment.run(thesis.replace(protocol="clean", schedule="1,p,1"), **QUIET)
    assert "reported_accuracy" not in clean.summary and "reported_accuracy" not in clean.metrics


def test_a_run_that_was_stopped_goes_on_with_the_same_stages(thesis, tmp_path, monkeypatch):
    whole = experiment.run(thesis.replace(runs_dir=str(tmp_path / "whole")), **QUIET)
    real, count = train.train_one_epoch, iter(range(100))

    def stopping(*arguments, **keywords):
        if next(count) == 3:  # in the second p, whose pool holds the proxies of the first
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "train_one_epoch", stopping)
        experiment.run(thesis, **QUIET)
    run = experiment.run(thesis, **QUIET)
    for name in ("reported_accuracy", "test_accuracy", "test_loss", "val_accuracy", "proxy_images"):
        assert run.summary[name] == whole.summary[name]
    assert run.manifest["resumed"][0]["epoch"] == 3


def test_as_coded_one_p_stage_trains_on_no_proxy_at_all(thesis):
    """Why study C does not make its coded arm of 9,p,8: it is the run without masking, bit for bit."""
    coded = experiment.run(thesis.replace(schedule="1,p,1"), **QUIET)
    none = experiment.run(thesis.replace(schedule="1,p,1", protocol="thesis_text", fill="none"), **QUIET)
    assert len(coded.proxies(1)) and coded.path != none.path
    assert (coded.path / "weights.safetensors").read_bytes() == (none.path / "weights.safetensors").read_bytes()
    assert coded.summary["reported_accuracy"] == none.summary["reported_accuracy"]


def test_all_data_takes_as_many_steps_as_the_halves():
    """Study C's fixed split on all data: 9 epochs of all images, where the others take 18 of half of them."""
    for n, apart in ((6583, 0), (128, 9), (129, 9)):
        arms = [Experiment(protocol=name, batch_size=32) for name in ("thesis", "clean")]
        half, whole = (train.steps_per_epoch(protocol.epoch_size(n, e), 32) for e in arms)
        assert abs(18 * half - 9 * whole) <= apart, n
