"""The loop on real images: what each epoch draws, what a proxy step stores, what a run says of itself."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CPU, QUIET, same_weights, small, weights

from pa_core import attribution, batch, experiment, masking, metrics, models, proxy, train
from pa_core.models import Cam
from pa_core.params import FILLS
from pa_core.proxy import Step, proxy_step
from pa_core.runs import Run


class Drawn:
    """What one epoch drew: positions in its pool, the images that the network saw, the weights of the loss."""

    def __init__(self):
        self.pool, self.index, self.images, self.weights = None, [], [], []

    @property
    def entries(self):
        """Position in the pool -> image uint8 [3, S, S] as the network saw it."""
        return dict(zip(torch.cat(self.index).tolist(), masking.to_uint8(torch.cat(self.images)), strict=True))


@pytest.fixture
def spy(monkeypatch):
    """A list of what each epoch drew."""
    epochs, real_epoch, real_make = [], train.train_one_epoch, batch.make

    def epoch(*args, **keywords):
        epochs.append(Drawn())
        return real_epoch(*args, **keywords)

    def make(images, labels, *, pool, index, **keywords):
        made = real_make(images, labels, pool=pool, index=index, **keywords)
        drawn = epochs[-1]
        drawn.pool = pool
        drawn.index.append(index)
        drawn.images.append(made.images)
        drawn.weights.append(made.weights)
        return made

    monkeypatch.setattr(train, "train_one_epoch", epoch)
    monkeypatch.setattr(batch, "make", make)
    return epochs


def originals(e):
    part = experiment.load_data(e).train
    return part.read(torch.arange(len(part)))


def whitened(original, mask):
    return torch.where(mask, 255, original)


def masks_of(run, step=1):
    """Position -> the pixels that its stored map masks."""
    kept = Step.load(run.step(step))
    masks = masking.region(attribution.upsampled(kept.maps, 28), threshold=run.experiment.threshold)
    return dict(zip(kept.positions.tolist(), masks, strict=True))


# What an epoch draws


def test_batches_after_p_hold_the_proxies_and_no_original_of_theirs(tmp_path, spy):
    e = small(tmp_path, augment="none", fill="one")
    masks, before = masks_of(experiment.run(e, **QUIET)), originals(e)
    assert len(masks) == 32 and all(mask.sum() == 196 for mask in masks.values())
    first, second = (drawn.entries for drawn in spy)
    assert sorted(first) == sorted(second) == list(range(160))
    assert all(torch.equal(image, before[i]) for i, image in first.items())
    for i, image in second.items():
        expected = whitened(before[i], masks[i]) if i in masks else before[i]
        assert torch.equal(image, expected)
        assert i not in masks or not torch.equal(image, before[i])


def test_append_keeps_the_originals_and_puts_copies_of_the_proxies_beside_them(tmp_path, spy):
    e = small(tmp_path, augment="none", fill="one", overlay="append", copies=3, schedule="1,p,2")
    masks, before = masks_of(experiment.run(e, **QUIET)), originals(e)
    assert len(spy[0].pool) == 160 and len(spy[1].pool) == 160 + 3 * 32
    seen = {}
    for drawn in spy[1:]:
        for i, image in drawn.entries.items():
            origin = int(drawn.pool.origin[i])
            expected = before[origin] if i < 160 else whitened(before[origin], masks[origin])
            assert torch.equal(image, expected)
            seen[i] = origin
    assert set(masks) & {i for i in seen if i < 160} and {seen[i] for i in seen if i >= 160} <= set(masks)


def test_withheld_images_pass_unchanged_and_have_no_part_in_the_loss(tmp_path, spy, monkeypatch):
    e, losses, real = small(tmp_path, augment="none", overlay="withhold"), [], train.weighted_loss
    monkeypatch.setattr(train, "weighted_loss", lambda *a, **how: losses.append(real(*a, **how)) or losses[-1])
    run = experiment.run(e, **QUIET)
    counted = torch.stack([some.sum() for some in spy[1].weights])
    mean = (torch.stack(losses[10:]).detach() * counted).sum() / counted.sum()
    assert run.metrics["train_loss"][1] == pytest.approx(mean.item()) and len(set(counted.tolist())) > 1
    selected, before = set(np.load(run.step(1) / "positions.npy").tolist()), originals(e)
    assert len(selected) == 32 and all(some is None for some in spy[0].weights)
    for index, some in zip(spy[1].index, spy[1].weights, strict=True):
        assert some.tolist() == [float(i not in selected) for i in index.tolist()]
    assert all(torch.equal(image, before[i]) for i, image in spy[1].entries.items())
    assert run.summary["masked_share"] == 0 and not same_weights(run, experiment.run(e.plain(), **QUIET))


def test_proxies_are_masked_with_the_probability_that_was_asked_for(tmp_path, spy):
    e = small(tmp_path, augment="none", fill="one", proxy_probability=0.5, fraction=1.0, schedule="1,p,2")
    experiment.run(e, **QUIET)
    before = originals(e)
    changed = [{i for i, image in d.entries.items() if not torch.equal(image, before[i])} for d in spy]
    assert not changed[0] and changed[1] != changed[2]
    assert all(abs(len(some) - 80) < 5 * math.sqrt(160 / 4) for some in changed[1:])


@pytest.mark.parametrize("keep", ["last", "all"])
def test_which_maps_are_kept_and_the_later_one_counts(tmp_path, spy, keep):
    run = experiment.run(small(tmp_path, schedule="1,p,1,p,1,c,1", keep_proxies=keep, select="random"), **QUIET)
    one, two = (Step.load(run.step(number)) for number in (1, 2))
    at_one, at_two = (set(step.positions.tolist()) for step in (one, two))
    assert at_one != at_two and at_one & at_two
    pool = spy[2].pool
    kept = set((pool.row >= 0).nonzero().flatten().tolist())
    assert kept == (at_two if keep == "last" else at_one | at_two)
    assert torch.equal(pool.maps[pool.row[two.positions]].cpu(), two.maps)
    assert not (spy[3].pool.row >= 0).any() and not spy[3].pool.proxied.any()  # c forgets them all


ARMS = {
    "append": {"overlay": "append", "copies": 3},
    "withhold": {"overlay": "withhold"},
    "permuted": {"permute_maps": True, "select": "random"},
}


def test_every_arm_takes_the_same_steps(tmp_path, spy):
    for changes in ({}, *ARMS.values()):
        experiment.run(small(tmp_path, **changes), **QUIET)
    experiment.run(small(tmp_path).plain(), **QUIET)
    assert len(spy) == 2 * (len(ARMS) + 2)
    assert all([len(index) for index in drawn.index] == [16] * 10 for drawn in spy)
    orders = [torch.cat(drawn.index).tolist() for drawn in spy]
    assert all(order == orders[0] for order in orders[::2])  # the same draws until the proxies differ
    appended = orders.pop(3)
    assert all(order == orders[1] for order in orders[4::2]) and max(appended) >= 160


@pytest.mark.parametrize("events", ["2", "1,p,1,p,1", "1,p,1,x0.5,l0.5,1,c,1"])
def test_the_test_images_are_read_once_at_the_end(tmp_path, monkeypatch, events):
    prepared, seen = experiment.prepare(small(tmp_path, schedule=events)), []
    dataset = prepared.dataset

    def looking(real):
        def call(*args, **keywords):
            seen.append(dataset.test.reads)
            return real(*args, **keywords)

        return call

    monkeypatch.setattr(experiment, "proxy_step", looking(experiment.proxy_step))
    monkeypatch.setattr(train, "train_one_epoch", looking(train.train_one_epoch))
    run = experiment.run(prepared, **QUIET)
    assert len(seen) >= 2 and set(seen) == {0} and dataset.test.reads == len(dataset.test) == 2000
    assert run.manifest["split_digest"] == dataset.split_digest
    assert not set(dataset.train.ids) & set(dataset.val.ids) | set(dataset.train.ids) & set(dataset.test.ids)


# Events and the learning rate


@pytest.mark.parametrize("scheduler", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("factor", [1, 0.1])
def test_the_learning_rate_moves_as_scheduled(tmp_path, scheduler, factor):
    """Closed forms over the whole run; the event multiplies all that comes after it."""
    events = "2,p,3" if factor == 1 else f"2,l{factor},3"
    run = experiment.run(small(tmp_path, scheduler=scheduler, schedule=events, lr=0.01), **QUIET)
    total = 50

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
    expected = [forms[scheduler](epoch * 10 - 1) * (factor if epoch > 2 else 1) for epoch in range(1, 6)]
    assert run.metrics["lr"].tolist() == pytest.approx(expected, rel=1e-6)


def test_pruned_weights_stay_zero_to_the_end(tmp_path, monkeypatch):
    prepared = experiment.prepare(small(tmp_path, schedule="1,x0.5,1,p,x0.4,2"))
    zeros, real = [], models.prune

    def prune(network, share):
        real(network, share)
        state = models.plain_state(network)
        layers = [name.removesuffix(models.MASK) for name in network.state_dict() if name.endswith(models.MASK)]
        zeros.append({f"{layer}weight": state[f"{layer}weight"] == 0 for layer in layers})

    monkeypatch.setattr(models, "prune", prune)
    run = experiment.run(prepared, **QUIET)
    kept = weights(run)
    assert [sum(int(z.sum()) for z in some.values()) > 0 for some in zeros] == [True, True]
    assert all((kept[name][some[name]] == 0).all() for some in zeros for name in some)
    layers = [kept[name] for name in zeros[0]]
    share = sum(int((w == 0).sum()) for w in layers) / sum(w.numel() for w in layers)
    assert share == pytest.approx(0.7, abs=1e-4) and run.summary["sparsity"] == pytest.approx(share, abs=1e-6)
    tested = train.evaluate(
        run.model(), batch.Pool.of(experiment.load_data(run.experiment).test), device=CPU, dtype=torch.float32
    )
    assert tested.accuracy == run.summary["test_accuracy"]


def test_after_a_last_prune_validation_is_of_the_pruned_network(tmp_path):
    run = experiment.run(small(tmp_path, schedule="2,x0.95"), **QUIET)
    pool = batch.Pool.of(experiment.load_data(run.experiment).val)
    validated = train.evaluate(run.model(), pool, device=CPU, dtype=torch.float32)
    before = run.metrics["val_accuracy"]
    assert run.summary["val_accuracy"] == validated.accuracy != before.iloc[-1]
    assert run.summary["best_val_accuracy"] == max(*before, validated.accuracy)


def test_the_maps_of_a_step_are_read_once(tmp_path, monkeypatch):
    seen, real = [], Step.load
    monkeypatch.setattr(Step, "load", lambda folder: seen.append(folder.name) or real(folder))
    run = experiment.run(small(tmp_path, schedule="1,p,3,p,2", keep_proxies="last"), **QUIET)
    assert seen == [run.step(1).name, run.step(2).name]


def test_weight_zero_is_bit_for_bit_the_plain_run(tmp_path):
    e = small(tmp_path, schedule="1,p,1", weight=0, augment="flip,rotate,crop,erase,cutmix,mixup")
    changed, plain = experiment.run(e, **QUIET), experiment.run(e.plain(), **QUIET)
    assert same_weights(changed, plain) and changed.summary["test_loss"] == plain.summary["test_loss"]
    assert changed.metrics["train_loss"].tolist() == plain.metrics["train_loss"].tolist()
    assert changed.summary["proxy_images"] == changed.summary["unchanged_proxies"] == 32
    assert not same_weights(experiment.run(e.replace(weight=1), **QUIET), plain)  # and this test can fail


# The proxy step


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A little training, so that maps are not those of noise: the experiment, its training part and its network."""
    run = experiment.run(small(tmp_path_factory.mktemp("trained"), schedule="2"), **QUIET)
    e = run.experiment
    return e.replace(schedule="1,p,1"), experiment.load_data(e).train, run.model()


def step_of(folder, trained, *, step=1, **how):
    """A step's maps and positions; and how many images went through the network's first layer."""
    e, part, model = trained
    seen = []
    first = next(m for m in model.network.modules() if isinstance(m, torch.nn.Conv2d))
    with first.register_forward_hook(lambda module, inputs, output: seen.append(len(output))):
        proxy_step(model, part, e.replace(**how), step=step, directory=folder, device=CPU)
    return Step.load(folder), sum(seen)


@pytest.mark.parametrize(("threshold", "share"), [(0.75, 196 / 784), (0.9, 78 / 784), (0.0, 1.0)])
def test_masked_share_is_what_the_quantile_says(tmp_path, threshold, share):
    run = experiment.run(small(tmp_path, threshold=threshold, fill="one"), **QUIET)
    assert run.summary["masked_share"] == pytest.approx(share, abs=1e-6)
    assert set(run.proxies(1)["masked_share"].round(6)) == {round(share, 6)}
    assert run.summary["unchanged_proxies"] == 0 and not run.proxies(1)["unchanged"].any()


@pytest.mark.parametrize("fill", FILLS)
def test_every_fill_is_made_of_the_stored_maps(trained, fill):
    e, part, _ = trained
    positions, maps = torch.arange(12), torch.rand(12, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    made = proxy.proxies_of(part, positions, maps, e.replace(fill=fill, max_share=0.1, feather=1), seed=1)
    before = part.read(positions)
    inside = made.mask[:, None].expand_as(before)
    assert torch.equal(made.images[~inside], before[~inside]) and torch.equal(made.originals, before)
    changes = (made.images != before).flatten(1).any(1)
    assert not changes.any() if fill == "none" else changes.float().mean() > 0.5
    assert fill == "none" or (made.mask.flatten(1).sum(1) == 78).all()


def test_what_is_stored_of_a_step(tmp_path):
    run = experiment.run(small(tmp_path), **QUIET)
    folder, e = run.step(1), run.experiment
    assert {f.name for f in folder.iterdir()} == {"maps.npy", "positions.npy", "proxies.csv", "proxies.png"}
    maps, positions = (np.load(folder / f"{name}.npy") for name in ("maps", "positions"))
    assert maps.dtype == np.float16 and maps.shape == (32, *run.manifest["model"]["cam"]["grid"])
    assert positions.dtype == np.int64 and maps.min() == 0 and maps.max() == 1
    table, part = run.proxies(1), experiment.load_data(e).train
    assert " ".join(table) == "id label predicted explained loss masked_share unchanged"
    assert table["id"].tolist() == [part.ids[i] for i in positions]
    assert table["label"].tolist() == part.labels[positions].tolist()
    assert table["loss"].is_monotonic_decreasing and (table["explained"] == table["predicted"]).all()
    with Image.open(folder / "proxies.png") as picture:
        assert picture.size == (4 * 29 + 1, 8 * 29 + 1)


@pytest.mark.parametrize("xai", ["scorecam", "saliency", "gradient_shap", "guided_gradcam", "occlusion", "edges"])
def test_other_methods_keep_maps_of_at_most_56_pixels(tmp_path, trained, xai):
    """The same small sample for every method: eight images, which get maps of their own."""
    step, _ = step_of(tmp_path / "step", trained, xai=xai, fraction=0.05)
    assert step.maps.dtype == torch.float16 and step.maps.shape == (8, 28, 28)
    assert step.maps.min() >= 0 and step.maps.max() <= 1 and (step.maps.flatten(1).std(1) > 0).all()


def test_a_large_image_keeps_a_map_of_56_pixels(tmp_path):
    run = experiment.run(small(tmp_path, xai="edges", image_size=64, train_fraction=0.02, fraction=0.1), **QUIET)
    assert np.load(run.step(1) / "maps.npy").shape[1:] == (56, 56)


@pytest.mark.parametrize("how", [{"xai": "rectangle"}, {"xai": "random_blur"}, {"permute_maps": True}], ids=str)
def test_what_is_random_in_a_map_is_drawn_anew_in_each_step_and_again_for_the_same_one(tmp_path, trained, how):
    made = [
        step_of(tmp_path / str(k), trained, step=step, select="all", **how)[0].maps for k, step in enumerate((1, 2, 1))
    ]
    assert torch.equal(made[0], made[2])
    assert (made[0] != made[1]).flatten(1).any(1).float().mean() > 0.9


@pytest.mark.parametrize("how", [{}, {"xai": "eigencam"}, {"permute_maps": True}, {"xai_target": "label"}], ids=str)
def test_a_cam_costs_no_pass_beyond_scoring_and_is_the_same(tmp_path, trained, monkeypatch, how):
    """What scoring has just computed is used; explaining the selected images once more would give the same maps."""
    one, images = step_of(tmp_path / "fused", trained, **how)
    assert images == len(trained[1])
    monkeypatch.setattr(proxy, "MOST_BYTES_OF_MAPS", 0)
    monkeypatch.setattr(proxy, "CHUNK", 5)
    other, more = step_of(tmp_path / "again", trained, **how)
    assert more >= len(trained[1]) + 32 and torch.equal(one.positions, other.positions)
    assert torch.allclose(one.maps.float(), other.maps.float(), atol=2e-3)


def test_permuted_maps_are_those_of_other_images(tmp_path, trained):
    own, permuted = (step_of(tmp_path / str(p), trained, permute_maps=p)[0] for p in (False, True))
    key = [str(image.tolist()) for image in own.maps]
    assert sorted(key) == sorted(str(image.tolist()) for image in permuted.maps)
    assert len(set(key)) > 30 and all(a != str(b.tolist()) for a, b in zip(key, permuted.maps, strict=True))


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


@pytest.mark.parametrize("permute", [False, True])
def test_nothing_selected_is_no_error(tmp_path, permute):
    """No image is wrong; or one is, and there is no other one whose map it could get."""
    e = small(tmp_path, select="misclassified", permute_maps=permute)
    part = experiment.load_data(e).train
    logits = torch.nn.functional.one_hot(part.labels, 10).float() * 9
    if permute:
        logits[7] *= -1
    record = proxy_step(Answers(logits), part, e, step=1, directory=tmp_path / "step_1", device=CPU)
    assert (record["images"], record["asked"], record["masked_share"]) == (0, 32, 0.0)
    for overlay in ("replace", "append", "withhold"):
        pool = proxy.pool(part, e.replace(overlay=overlay), [Step.load(tmp_path / "step_1")])
        assert len(pool) == 160 and not pool.proxied.any() and not pool.withheld.any()
    more = Step(positions=torch.tensor([3, 5]), maps=torch.rand(2, 4, 4).half())  # kept beside it
    assert proxy.pool(part, e, [Step.load(tmp_path / "step_1"), more]).proxied.nonzero().flatten().tolist() == [3, 5]


def test_fewer_proxies_when_fewer_qualify_and_it_is_said(tmp_path):
    lines = []
    run = experiment.run(small(tmp_path, select="misclassified", fraction=1.0), log=lines.append)
    assert (run.proxies(1)["label"] != run.proxies(1)["predicted"]).all() and 0 < run.summary["proxy_images"] < 160
    assert any("160 asked for" in line for line in lines)


def test_transformers_get_proxies(tmp_path):
    """The predecessor swallowed an exception and made none."""
    run = experiment.run(small(tmp_path, model="test_vit", train_fraction=0.02), **QUIET)
    assert run.manifest["model"]["cam"]["layout"] == "tokens" and min(run.manifest["model"]["cam"]["grid"]) >= 4
    assert run.summary["proxy_images"] == 16 and run.summary["unchanged_proxies"] == 0


# A run on disk


def test_a_run_on_disk(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    e = small(tmp_path)
    run = experiment.run(e, **QUIET)
    files = (
        "manifest.json metrics.jsonl summary.json classes.csv predictions.csv weights.safetensors proxies tensorboard"
    )
    assert {f.name for f in run.path.iterdir()} - {"lock"} == set(files.split())  # the checkpoint became the weights
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["stage"]) for row in rows] == [(1, 0), (2, 1)]
    names = "epoch stage train_loss train_accuracy lr images_per_second seconds val_loss val_accuracy"
    assert " ".join(rows[0]) == names
    summary, classes, predictions = run.summary, run.classes, run.predictions
    assert summary["n_test"] == classes["support"].sum() == len(predictions) == 2000 and summary["epochs"] == 2
    assert (predictions["label"] == predictions["predicted"]).mean() == pytest.approx(summary["test_accuracy"])
    assert summary["balanced_accuracy"] == pytest.approx(classes["recall"].mean())
    assert summary["val_accuracy"] == rows[-1]["val_accuracy"] and summary["sparsity"] == 0
    manifest = run.manifest
    assert manifest["status"] == "finished" and manifest["parameters"] == e.to_dict() and not run.stale
    assert manifest["digest"][:12] in run.path.name and manifest["code_version"][:8] in run.path.name
    assert manifest["model"]["changes"] and manifest["threads"] >= 1
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [scalar.step for scalar in board.Scalars("val/accuracy")] == [1, 2]
    assert board.Images("proxies/original_map_mask_proxy")[0].width == 4 * 29 + 1
    assert "_hparams_/session_start_info" in board.summary_metadata


def test_balanced_accuracy_counts_every_class_alike():
    labels, right = torch.tensor([0] * 9 + [1]), torch.tensor([[1.0, 0.0]]).repeat(10, 1)
    found, table = metrics.summarise(right, labels), metrics.per_class(labels.numpy(), right.argmax(1).numpy(), "ab")
    assert found["test_accuracy"] == pytest.approx(0.9) and found["balanced_accuracy"] == table["recall"].mean() == 0.5


def test_a_non_finite_loss_ends_the_run_without_a_result(tmp_path):
    with pytest.raises(train.NonFiniteLoss, match=r"epoch \d+, step \d+"):
        experiment.run(small(tmp_path, lr=1e30, optimizer="sgd", scheduler="constant"), **QUIET)
    (path,) = (tmp_path / "runs").iterdir()
    assert Run(path).manifest["status"] == "failed" and "NonFiniteLoss" in Run(path).manifest["error"]
    assert not (path / "summary.json").exists()


def test_choices_have_an_effect(tmp_path):
    few = small(tmp_path, schedule="1", train_fraction=0.02)
    base = experiment.run(few, **QUIET)
    smooth, decay = {"label_smoothing": 0.1}, {"weight_decay": 1.0}
    for changes in ({"optimizer": "sgd"}, smooth, {"augment": "none"}, decay, {"seed": 1}):
        assert not same_weights(base, experiment.run(few.replace(**changes), **QUIET)), changes
