"""The loop on real images: tests that would have caught the predecessor's faults."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pa_core import data, experiment, masking, schedule, train
from pa_core.models import Cam
from pa_core.params import Experiment, derived_seed
from pa_core.proxy import Overlay, donors, proxy_step
from pa_core.runs import Run

QUIET = {"log": lambda _text: None}


def small(tmp_path, **changes):
    """160 training images, 16 a class."""
    settings = {"train_fraction": 0.05, "schedule": "1,p,1", "batch_size": 16, "runs_dir": str(tmp_path / "runs")}
    return Experiment(**(settings | changes))


def weights(run):
    return load_file(run.path / "weights.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def spy(monkeypatch):
    """What each epoch drew: a list per epoch of the images as they were read, before augmentation."""
    epochs = []
    real = train.train_one_epoch

    class Spy:
        def __init__(self, source):
            self.source, self.labels, self.seen = source, source.labels, []
            self.shape, self.resident = source.shape, source.resident

        def __len__(self):
            return len(self.source)

        def read(self, index):
            images = self.source.read(index)
            self.seen += [(int(i), image.numpy().tobytes()) for i, image in zip(index, images, strict=True)]
            return images

    def spying(state, source, **keywords):
        watched = Spy(source)
        result = real(state, watched, **keywords)
        epochs.append(watched.seen)
        return result

    monkeypatch.setattr(train, "train_one_epoch", spying)
    return epochs


def stored(run, step=1):
    folder = run.path / "proxies" / f"step_{step}"
    return np.load(folder / "images.npy"), np.load(folder / "positions.npy")


def originals(e):
    part = experiment.load_data(e).train
    return [image.numpy().tobytes() for image in part.read(torch.arange(len(part)))]


def test_batches_after_p_hold_the_proxies_and_no_original_of_theirs(tmp_path, spy):
    e = small(tmp_path)
    run = experiment.run(e, **QUIET)
    images, positions = stored(run)
    before, proxies = originals(e), {int(p): i.tobytes() for p, i in zip(positions, images, strict=True)}
    assert len(proxies) == 32  # a fifth of 160
    first, second = spy
    assert len(first) == len(second) == 160
    assert all(image == before[i] for i, image in first)  # no proxy before p
    assert sorted(i for i, _ in second) == list(range(160))
    for i, image in second:
        assert image == proxies.get(i, before[i])
        assert i not in proxies or image != before[i]


def test_append_keeps_the_originals_and_the_number_of_steps(tmp_path, spy):
    e = small(tmp_path, overlay="append", schedule="1,p,3")
    run = experiment.run(e, **QUIET)
    images, positions = stored(run)
    before = originals(e)
    drawn = [pair for epoch in spy[1:] for pair in epoch]
    assert all(len(epoch) == 160 for epoch in spy)
    for i, image in drawn:
        assert image == (before[i] if i < 160 else images[i - 160].tobytes())
    assert any(i >= 160 for i, _ in drawn) and any(i in set(positions.tolist()) for i, _ in drawn)


@pytest.mark.parametrize(("keep", "expected"), [("last", {2}), ("all", {1, 2})])
def test_which_proxies_are_kept(tmp_path, spy, keep, expected):
    run = experiment.run(small(tmp_path, schedule="1,p,1,p,1", keep_proxies=keep, select="random"), **QUIET)
    (one, at_one), (two, at_two) = stored(run, 1), stored(run, 2)
    assert set(at_one.tolist()) != set(at_two.tolist())
    last = dict(spy[2])
    only_one = set(at_one.tolist()) - set(at_two.tolist())
    for p, image in zip(at_two, two, strict=True):
        assert last[int(p)] == image.tobytes()  # the later proxy wins
    kept = {2} | (
        {1}
        if all(last[int(p)] == i.tobytes() for p, i in zip(at_one, one, strict=True) if int(p) in only_one)
        else set()
    )
    assert kept == expected


def test_splits_never_change_and_the_test_images_are_read_once_at_the_end(tmp_path, monkeypatch):
    seen, loaded = [], []
    real_load, real_step, real_epoch = data.load, experiment.proxy_step, train.train_one_epoch

    def load(**keywords):
        loaded.append(real_load(**keywords))
        return loaded[-1]

    def look(*_args, **_keywords):
        dataset = loaded[-1]
        seen.append((dataset.split_digest, dataset.test.reads, dataset.train.ids, dataset.val.ids))

    def step(*args, **keywords):
        look()
        return real_step(*args, **keywords)

    def epoch(*args, **keywords):
        look()
        return real_epoch(*args, **keywords)

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(experiment, "proxy_step", step)
    monkeypatch.setattr(train, "train_one_epoch", epoch)
    run = experiment.run(small(tmp_path, schedule="1,p,1,p,1"), **QUIET)
    assert len(loaded) == 1 and len(seen) == 5
    assert len({(digest, train_ids, val_ids) for digest, _, train_ids, val_ids in seen}) == 1
    assert all(reads == 0 for _, reads, _, _ in seen)
    assert loaded[0].test.reads == len(loaded[0].test) == 2000  # once
    assert run.manifest["split_digest"] == loaded[0].split_digest
    assert not set(seen[0][2]) & set(seen[0][3]) and not set(seen[0][2]) & set(loaded[0].test.ids)


@pytest.mark.parametrize("scheduler", ["onecycle", "cosine", "constant"])
def test_the_learning_rate_moves_as_scheduled(tmp_path, scheduler):
    """The predecessor never stepped its scheduler. Expected values are the closed forms, over the whole run."""
    e = small(tmp_path, scheduler=scheduler, schedule="2,p,3", lr=0.01)
    run = experiment.run(e, **QUIET)
    per_epoch = 160 // 16
    total = 5 * per_epoch

    def onecycle(k):  # torch: cosine up over 30 % from lr / 25, cosine down to lr / 25e4
        top, end = 0.3 * total - 1, total - 1
        low, last = 0.01 / 25, 0.01 / 25 / 1e4
        if k <= top:
            return 0.01 + (low - 0.01) / 2 * (1 + np.cos(np.pi * k / top))
        return last + (0.01 - last) / 2 * (1 + np.cos(np.pi * (k - top) / (end - top)))

    forms = {
        "onecycle": onecycle,
        "cosine": lambda k: 0.005 * (1 + np.cos(np.pi * k / total)),
        "constant": lambda k: 0.01,
    }
    expected = [forms[scheduler](epoch * per_epoch - 1) for epoch in range(1, 6)]
    assert run.metrics["lr"].tolist() == pytest.approx(expected, rel=1e-6)
    assert scheduler == "constant" or len(set(run.metrics["lr"])) == 5


def test_weight_zero_is_bit_for_bit_the_plain_run(tmp_path):
    e = small(tmp_path, schedule="1,p,2", weight=0, augment="flip,rotate,crop")
    proxy, plain = experiment.run(e, **QUIET), experiment.run(e.plain(), **QUIET)
    assert same_weights(proxy, plain)
    assert proxy.metrics["train_loss"].tolist() == plain.metrics["train_loss"].tolist()
    assert proxy.summary["proxy_images"] == proxy.summary["unchanged_proxies"] == 32
    assert proxy.summary["test_loss"] == plain.summary["test_loss"]
    changed = experiment.run(small(tmp_path, schedule="1,p,2", augment="flip,rotate,crop"), **QUIET)
    assert not same_weights(changed, plain)  # and this test can fail


@pytest.mark.parametrize(("threshold", "share"), [(0.75, 196 / 784), (0.9, 78 / 784), (0.0, 1.0)])
def test_masked_share_is_what_the_quantile_says(tmp_path, threshold, share):
    run = experiment.run(small(tmp_path, threshold=threshold, fill="one"), **QUIET)
    assert run.summary["masked_share"] == pytest.approx(share, abs=1e-6)
    assert set(run.proxies(1)["masked_share"].round(6)) == {round(share, 6)}
    assert run.summary["unchanged_proxies"] == 0 and not run.proxies(1)["unchanged"].any()


@pytest.mark.parametrize("fill", masking.FILLS)
def test_every_fill_makes_the_proxies_that_its_rule_says(tmp_path, fill):
    e = small(tmp_path, fill=fill, train_fraction=0.02)
    run = experiment.run(e, **QUIET)
    images, positions = stored(run)
    part = experiment.load_data(e).train
    before = part.read(torch.from_numpy(positions))
    changed = (torch.from_numpy(images) != before).any(1)
    assert (changed.flatten(1).sum(1) <= 196).all()
    if fill in masking.FILL_VALUES:  # what is changed is one colour per image and channel, the image's own statistic
        value = masking.to_uint8(masking.FILL_VALUES[fill](masking.to_float(before)))
        filled = value.expand_as(before)
        assert all(
            torch.equal(torch.from_numpy(images)[i][:, changed[i]], filled[i][:, changed[i]])
            for i in range(len(before))
        )
    if fill == "patch":  # the same place of another training image
        donor = masking.to_uint8(donors(part, torch.from_numpy(positions), seed=derived_seed(e.seed, "proxy step", 1)))
        assert all(
            torch.equal(torch.from_numpy(images)[i][:, changed[i]], donor[i][:, changed[i]]) for i in range(len(before))
        )
        assert not (donor == before).flatten(1).all(1).any()
    assert run.summary["unchanged_proxies"] == (
        len(images) if fill == "none" else int((~changed.flatten(1).any(1)).sum())
    )


def test_a_cap_and_a_feather_reach_the_proxies(tmp_path):
    e = small(tmp_path, fill="one", threshold=0.0, max_share=0.1, feather=1, train_fraction=0.02)
    run = experiment.run(e, **QUIET)
    assert run.summary["masked_share"] == pytest.approx(78 / 784, abs=1e-6)
    images, positions = stored(run)
    with np.load(run.path / "proxies" / "step_1" / "examples.npz") as file:
        maps, mask = torch.from_numpy(file["maps"]), torch.from_numpy(file["mask"])
    n = len(maps)
    before = masking.to_float(experiment.load_data(e).train.read(torch.from_numpy(positions[:n])))
    soft = masking.apply(before, maps, mask, fill="one", feather=1)
    assert torch.equal(torch.from_numpy(images[:n]), masking.to_uint8(soft))
    assert not torch.equal(soft, masking.apply(before, maps, mask, fill="one"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A little training, so that heatmaps are not those of noise: the experiment, its training part and its network."""
    e = small(tmp_path_factory.mktemp("trained"), schedule="2", train_fraction=0.05)
    opened = experiment.reopen(experiment.run(e, **QUIET))
    return opened.experiment, opened.dataset.train, opened.model


CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def made_by(folder, trained, **how):
    """Proxies [K, 3, S, S] and positions of one step, and how many images went through the network's first layer."""
    e, part, model = trained
    seen = []
    first = next(m for m in model.network.modules() if isinstance(m, torch.nn.Conv2d))
    handle = first.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    try:
        proxy_step(model, part, replace(e, schedule="1,p,1", **how), step=1, epoch=1, directory=folder, **CPU)
    finally:
        handle.remove()
    return np.load(folder / "images.npy"), np.load(folder / "positions.npy"), sum(seen)


@pytest.mark.parametrize(
    "how", [{"xai": "rectangle"}, {"xai": "random_blur"}, {"fill": "noise"}, {"fill": "patch"}], ids=str
)
def test_what_is_random_in_a_proxy_is_drawn_anew_in_each_step_and_again_for_the_same_one(tmp_path, trained, how):
    e, part, model = trained
    made = {}
    for name, step in (("one", 1), ("two", 2), ("one again", 1)):
        arguments = {"step": step, "epoch": 1, "directory": tmp_path / name, **CPU}
        proxy_step(model, part, replace(e, schedule="1,p,1", select="all", **how), **arguments)
        made[name] = np.load(tmp_path / name / "images.npy")
    assert np.array_equal(made["one"], made["one again"])
    assert (made["one"] != made["two"]).any(axis=(1, 2, 3)).mean() > 0.95


@pytest.mark.parametrize(
    "how", [dict(), dict(xai="eigencam"), dict(xai="shuffled"), dict(smooth="gaussian"), dict(xai_target="label")]
)
def test_a_cam_costs_no_pass_beyond_scoring_and_is_the_same(tmp_path, trained, monkeypatch, how):
    """What scoring has just computed is used; explaining the selected images once more would give the same proxies."""
    fused, at, images = made_by(tmp_path / "fused", trained, **how)
    assert images == len(trained[1])
    monkeypatch.setattr("pa_core.proxy.MOST_BYTES_OF_MAPS", 0)
    again, where, more = made_by(tmp_path / "again", trained, **how)
    assert more >= len(trained[1]) + len(at)
    assert np.array_equal(at, where)
    if "shuffled" not in how.values():  # dealt within a chunk where there is a pass per chunk
        different = (fused != again).any(axis=(1, 2, 3)).mean()
        assert different <= 0.05, "a pixel at the threshold may fall on either side of it, in few images"


def test_shuffled_maps_do_not_depend_on_the_chunks(tmp_path, trained, monkeypatch):
    whole, _, _ = made_by(tmp_path / "whole", trained, xai="shuffled")
    monkeypatch.setattr("pa_core.proxy.CHUNK", 5)
    pieces, _, _ = made_by(tmp_path / "pieces", trained, xai="shuffled")
    assert np.array_equal(whole, pieces)
    own, _, _ = made_by(tmp_path / "own", trained, xai="gradcam")
    assert (whole != own).any(axis=(1, 2, 3)).mean() > 0.9, "images got their own map"


def test_transformers_get_proxies(tmp_path):
    """The predecessor swallowed an exception and made none."""
    run = experiment.run(small(tmp_path, model="test_vit", xai="gradcam++", train_fraction=0.02), **QUIET)
    assert run.manifest["model"]["cam"]["layout"] == "tokens" and min(run.manifest["model"]["cam"]["grid"]) >= 4
    assert run.summary["proxy_images"] == 12 and run.summary["unchanged_proxies"] == 0


def test_fewer_proxies_when_fewer_qualify_and_it_is_said(tmp_path):
    lines = []
    run = experiment.run(small(tmp_path, select="misclassified", fraction=1.0), log=lines.append)
    wrong = (run.proxies(1)["label"] != run.proxies(1)["predicted"]).all()
    assert wrong and 0 < run.summary["proxy_images"] < 160
    assert any("160 asked for" in line for line in lines)


class Answers(torch.nn.Module):
    """A classifier whose logits for the first images are given."""

    cam = Cam(layer="none", layout="NCHW", grid=(4, 4))

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, images):
        return self.logits[: len(images)]

    def forward_cam(self, images):
        activations = torch.rand(len(images), 1, 4, 4).requires_grad_()
        return activations, self(images) + activations.mean((2, 3))


def test_nothing_selected_is_no_error(tmp_path):
    """Every image right: `misclassified` selects none, and the run goes on with the originals."""
    part = experiment.load_data(small(tmp_path)).train
    right = Answers(torch.nn.functional.one_hot(part.labels, 10).float() * 9)
    e = small(tmp_path, select="misclassified")
    record = proxy_step(right, part, e, step=1, epoch=1, directory=tmp_path / "step_1", device=torch.device("cpu"))
    assert (record.images, record.asked, record.masked_share) == (0, 32, 0.0)
    for mode in ("replace", "append"):
        overlay = Overlay(part, mode=mode, steps=[tmp_path / "step_1"])
        assert len(overlay) == 160 and torch.equal(overlay.read(torch.arange(5)), part.read(torch.arange(5)))


def test_shuffled_with_one_image_left_makes_none_and_goes_on(tmp_path):
    """Late in training `misclassified` may find a single image: there is no other one whose map it could get."""
    part = experiment.load_data(small(tmp_path)).train

    logits = torch.nn.functional.one_hot(part.labels, 10).float() * 9
    logits[7] = -logits[7]
    e = small(tmp_path, select="misclassified", xai="shuffled")
    record = proxy_step(
        Answers(logits), part, e, step=1, epoch=1, directory=tmp_path / "step_1", device=torch.device("cpu")
    )
    assert record.images == 0


def test_every_arm_takes_the_same_steps(tmp_path, spy):
    for changes in ({}, {"overlay": "append"}, {"xai": "random"}, {"select": "random"}):
        experiment.run(small(tmp_path, **changes), **QUIET)
    plain = small(tmp_path).plain()
    experiment.run(plain, **QUIET)
    assert [len(epoch) for epoch in spy] == [160] * 10
    first_epochs = [[i for i, _ in epoch] for epoch in spy[::2]]
    assert all(order == first_epochs[0] for order in first_epochs)  # the same draws until the proxies differ
    replaced = [[i for i, _ in spy[k]] for k in (1, 5, 7, 9)]
    assert all(order == replaced[0] for order in replaced)


def test_a_run_on_disk(tmp_path):
    e = small(tmp_path)
    run = experiment.run(e, **QUIET)
    names = {p.name for p in run.path.iterdir()}
    assert {
        "manifest.json",
        "metrics.jsonl",
        "summary.json",
        "classes.csv",
        "weights.safetensors",
        "proxies",
        "tensorboard",
    } <= names
    assert "checkpoint.pt" not in names  # it shrank to the weights
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["stage"]) for row in rows] == [(1, 0), (2, 1)]
    contract = "epoch stage train_loss train_accuracy val_loss val_accuracy lr images_per_second seconds".split()
    assert list(rows[0]) == contract
    assert run.summary["n_test"] == run.classes["support"].sum() == 2000
    accuracy = (run.predictions["label"] == run.predictions["predicted"]).mean()
    assert accuracy == pytest.approx(run.summary["test_accuracy"])
    assert schedule.epochs(e.schedule) == run.summary["epochs"] == 2
    manifest = run.manifest
    assert manifest["status"] == "finished" and manifest["parameters"] == e.to_dict() and not run.stale
    assert (
        manifest["model"]["changes"]
        and manifest["threads"] >= 1
        and torch.__version__.startswith(manifest["versions"]["torch"])
    )


def test_a_finished_run_can_be_opened_again(tmp_path):
    run = experiment.run(small(tmp_path), **QUIET)
    again = experiment.reopen(Run.load(run.path), device="cpu")
    result = train.evaluate(again.model, again.dataset.test, device=torch.device("cpu"))
    assert result.accuracy == run.summary["test_accuracy"] and result.loss == pytest.approx(
        run.summary["test_loss"], abs=1e-5
    )
    assert len(again.proxies(count=3)) == 3


def test_a_non_finite_loss_ends_the_run_without_a_result(tmp_path):
    e = small(tmp_path, lr=1e30, optimizer="sgd", scheduler="constant")
    with pytest.raises(train.NonFiniteLoss, match=r"epoch \d+, step \d+"):
        experiment.run(e, **QUIET)
    (path,) = (tmp_path / "runs").iterdir()
    assert Run(path).manifest["status"] == "failed" and not (path / "summary.json").exists()


def test_tensorboard_holds_scalars_proxies_and_hparams(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = experiment.run(small(tmp_path), **QUIET)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [s.step for s in events.Scalars("val/accuracy")] == [1, 2]
    assert events.Images("proxies/original_heatmap_proxy")[0].width == 3 * 28
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_batch_size_auto_is_kept(tmp_path):
    run = experiment.run(small(tmp_path, batch_size="auto", schedule="1"), **QUIET)
    assert run.manifest["batch_size"] in train.AUTO_BATCHES and run.manifest["parameters"]["batch_size"] == "auto"


@pytest.mark.parametrize("precision", ["bf16"])
def test_bf16_trains_on_a_cpu(tmp_path, precision):
    run = experiment.run(small(tmp_path, precision=precision), **QUIET)
    assert run.manifest["precision"] == "bfloat16" and np.isfinite(run.summary["test_loss"])


def test_sgd_label_smoothing_and_other_choices_have_an_effect(tmp_path):
    base = experiment.run(small(tmp_path, schedule="1"), **QUIET)
    for changes in (
        {"optimizer": "sgd"},
        {"label_smoothing": 0.1},
        {"augment": "none"},
        {"weight_decay": 1.0},
        {"seed": 1},
    ):
        assert not same_weights(base, experiment.run(small(tmp_path, schedule="1", **changes), **QUIET)), changes


def test_compile_trains_as_without_it(tmp_path, monkeypatch):
    """Dynamo for real; the C++ that it would generate takes a minute, so the graphs are run as they are."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="eager"))
    settings = {"schedule": "1", "train_fraction": 0.02}
    run = experiment.run(small(tmp_path, compile=True, **settings), **QUIET)
    assert run.manifest["compile"] == "compiled"
    assert run.metrics["train_loss"][0] == pytest.approx(
        experiment.run(small(tmp_path, **settings), **QUIET).metrics["train_loss"][0], rel=1e-4
    )


def test_compile_says_why_not_and_trains_on(tmp_path, monkeypatch):
    def broken(_model):
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", broken)
    lines = []
    run = experiment.run(small(tmp_path, compile=True, schedule="1", train_fraction=0.02), log=lines.append)
    assert run.finished and any("compile: not possible here" in line and "no compiler" in line for line in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_cuda(tmp_path, precision):
    run = experiment.run(small(tmp_path, device="cuda", precision=precision), **QUIET)
    assert run.summary["proxy_images"] == 32 and run.manifest["device"].startswith("cuda")
