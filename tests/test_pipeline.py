"""Where images are kept, how they reach the network, and that being fast changes nothing in what is learnt."""

from __future__ import annotations

import json
import statistics
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pa_core import data, experiment, models, train
from pa_core.data import store
from pa_core.params import Experiment, ParameterError, derived_seed
from pa_core.proxy import Overlay
from pa_core.runs import Run

QUIET = {"log": lambda _text: None}
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def small(tmp_path, **changes):
    """160 training images, 16 a class."""
    settings = {"train_fraction": 0.05, "schedule": "1,p,1", "batch_size": 16, "runs_dir": str(tmp_path / "runs")}
    return Experiment(**(settings | changes))


def weights(run):
    return load_file(run.path / "weights.safetensors")


@pytest.fixture(scope="module")
def part():
    return experiment.load_data(Experiment(train_fraction=0.05)).train


# The store


@pytest.mark.parametrize("changes", [dict(), dict(overlay="append", keep_proxies="all", schedule="1,p,1,p,1")])
def test_the_store_changes_no_bit_of_the_result(tmp_path, changes):
    runs = [
        experiment.run(small(tmp_path / store, store=store, augment="flip,crop,erase,cutmix,mixup", **changes), **QUIET)
        for store in ("device", "mapped")
    ]
    assert [run.manifest["store"]["store"] for run in runs] == ["device", "mapped"]
    one, other = map(weights, runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert runs[0].path.name == runs[1].path.name  # one identity
    assert runs[0].summary["test_loss"] == runs[1].summary["test_loss"]
    losses = [run.metrics[["train_loss", "val_loss"]].to_numpy() for run in runs]
    assert np.array_equal(*losses)


def test_auto_takes_the_device_when_the_images_fit_and_says_how_much_there_was(tmp_path, monkeypatch):
    run = experiment.run(small(tmp_path), **QUIET)
    placed = run.manifest["store"]
    # 160 to train on, 800 to validate on, room for a fifth of the 160
    assert placed["store"] == "device" and placed["bytes"] == (160 + 800 + 32) * 3 * 28 * 28
    assert placed["free_bytes"] > placed["bytes"]
    monkeypatch.setattr(store, "free_memory", lambda device: 2 * placed["bytes"] - 1)
    assert experiment.run(small(tmp_path, seed=1), **QUIET).manifest["store"]["store"] == "mapped"


def test_a_store_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "free_memory", lambda device: 1_000_000)
    with pytest.raises(ParameterError, match=r"store = 'device' is refused: .* GB .* free on cpu.* auto or mapped"):
        experiment.run(small(tmp_path, store="device"), **QUIET)
    assert not (tmp_path / "runs").exists()


def test_half_of_the_free_memory_is_left(monkeypatch):
    monkeypatch.setattr(store, "free_memory", lambda device: 1000)
    assert data.place("auto", needed=500, device=CPU).store == "device"
    assert data.place("auto", needed=501, device=CPU).store == "mapped"
    assert data.place("mapped", needed=1, device=CPU).store == "mapped"


def test_free_memory_is_that_of_the_machine_or_of_its_container(monkeypatch):
    import psutil

    assert 0 < store.free_memory(CPU) <= psutil.virtual_memory().total
    monkeypatch.setattr(store, "_container_memory", lambda: 12345)
    assert store.free_memory(CPU) == 12345


def test_a_part_on_a_device_reads_what_the_store_holds_and_counts(part):
    start = part.reads
    placed = part.on(CPU, room=3)
    assert placed.reads == start + 160  # moving them is reading them
    index = torch.tensor([5, 0, 5, 159])
    assert torch.equal(placed.read(index), part.read(index))
    assert placed.reads == start + 160 + 8 and placed.resident == CPU and part.resident is None
    for wrong in ([-1], [160], [[0]]):  # 160 is the first row of the room
        with pytest.raises(IndexError):
            placed.read(torch.tensor(wrong))


def proxies(folder, positions, fill):
    folder.mkdir()
    np.save(folder / "positions.npy", np.array(positions))
    np.save(folder / "images.npy", np.full((len(positions), 3, 28, 28), fill, dtype=np.uint8))
    return folder


@pytest.mark.parametrize("mode", ["replace", "append"])
def test_an_overlay_reads_the_same_on_a_device(tmp_path, part, mode):
    steps = [proxies(tmp_path / "1", [3, 7, 9], 1), proxies(tmp_path / "2", [7, 2], 2)]
    placed = part.on(CPU, room=5)
    for some in ([], steps[:1], steps):
        there, here = (Overlay(base, mode=mode, steps=some) for base in (part, placed))
        assert len(there) == len(here) and torch.equal(there.labels, here.labels)
        index = torch.randperm(len(here), generator=torch.Generator().manual_seed(0))
        assert torch.equal(there.read(index), here.read(index))
    if mode == "replace":
        assert [int(here.read(torch.tensor([i]))[0, 0, 0, 0]) for i in (3, 7, 2)] == [1, 2, 2]  # the later step wins
    assert torch.equal(placed.read(torch.arange(160)), part.read(torch.arange(160)))  # scoring sees the originals
    with pytest.raises(ValueError, match="room for 5 proxies, and there are 6"):
        Overlay(placed, mode=mode, steps=[*steps, proxies(tmp_path / "3", [1], 3)])


# Feeding


class Slow:
    """A source in a file, whose reading can fail."""

    shape, resident = (3, 4, 4), None

    def __init__(self, n: int, fail_at: int | None = None):
        self.labels, self.fail_at, self.threads, self.begun = torch.zeros(n, dtype=torch.long), fail_at, set(), 0

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        self.threads.add(threading.current_thread().name)
        self.begun += 1
        if self.fail_at in index.tolist():
            raise OSError("the disk is gone")
        return index.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_images_of_a_file_are_read_ahead_in_order_by_other_threads():
    source, order = Slow(100), torch.arange(100).split(7)
    fed = list(train.feed(source, order, CPU))
    assert [batch[:, 0, 0, 0].tolist() for batch in fed] == [index.tolist() for index in order]
    assert all(name.startswith("read ahead") for name in source.threads)


def test_reading_ahead_holds_few_batches_and_ends_with_the_reader():
    source = Slow(100)
    fed = train.feed(source, torch.arange(100).split(1), CPU)
    next(fed)
    assert source.begun <= train.AHEAD + 1
    fed.close()
    assert not any(
        thread.name.startswith("read ahead") and thread.is_alive() and not thread.daemon for thread in settled()
    )


def settled() -> list[threading.Thread]:
    for thread in threading.enumerate():
        if thread.name.startswith("read ahead"):
            thread.join(timeout=5)
    return threading.enumerate()


def test_a_failure_to_read_reaches_the_run():
    with pytest.raises(OSError, match="the disk is gone"):
        list(train.feed(Slow(100, fail_at=50), torch.arange(100).split(7), CPU))


# The fast path learns what a plain loop learns


def plain_loop(e: Experiment, part, *, epochs: int):
    """What an epoch does, written as in a tutorial: one batch after the other, floats, nothing fused, nothing laid out anew.

    Returns:
        the network, and the loss of every step.
    """
    model = models.create(e.model, classes=10, image_size=28, seed=derived_seed(e.seed, "initialisation")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=e.lr, weight_decay=e.weight_decay, foreach=False, fused=False)
    steps = -(-len(part) // e.batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=e.lr, total_steps=epochs * steps)
    images, labels, losses = part.read(torch.arange(len(part))).float() / 255, part.labels, []
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(derived_seed(e.seed, "order", epoch)))
        draws = torch.Generator().manual_seed(derived_seed(e.seed, "augment", epoch))
        for index in order.tensor_split(steps):
            batch = (
                images[index] if e.augment == "none" else data.augment(images[index], kinds=e.augment, generator=draws)
            )
            loss = F.cross_entropy(model(batch), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    return model, losses


def fast_path(e: Experiment, part, *, epochs: int):
    model = models.create(e.model, classes=10, image_size=28, seed=derived_seed(e.seed, "initialisation"))
    steps = train.steps_per_epoch(len(part), e.batch_size)
    state = train.create_state(model, e, total_steps=epochs * steps, device=CPU, dtype=torch.float32)
    options = {
        "draws": len(part),
        "batch_size": e.batch_size,
        "kinds": e.augment,
        "label_smoothing": 0.0,
        "seed": e.seed,
    }
    return model, [train.train_one_epoch(state, part.on(CPU), **options) for _ in range(epochs)]


def test_losses_are_those_of_a_plain_loop(part):
    """One epoch: rounding has not yet grown. Same order, same draws, same schedule of the learning rate."""
    e = Experiment(batch_size=16, seed=3)
    _, one = plain_loop(e, part, epochs=1)
    _, (other,) = fast_path(e, part, epochs=1)
    assert other["train_loss"] == pytest.approx(statistics.mean(one), rel=1e-4)


def test_accuracy_is_that_of_a_plain_loop_within_the_noise_of_five_seeds():
    """Means within twice the standard error of their difference; each seed draws the same batches on both paths."""
    accuracies: dict[str, list[float]] = {"plain": [], "fast": []}
    for seed in range(5):
        e = Experiment(train_fraction=0.25, batch_size=32, lr=4e-3, seed=seed)
        dataset = experiment.load_data(e)
        for name, path in (("plain", plain_loop), ("fast", fast_path)):
            model, _ = path(e, dataset.train, epochs=3)
            accuracies[name].append(train.evaluate(model, dataset.val, device=CPU).accuracy)
    plain, fast = accuracies["plain"], accuracies["fast"]
    error = (statistics.variance(plain) / 5 + statistics.variance(fast) / 5) ** 0.5
    assert statistics.mean(plain) > 0.6 and abs(statistics.mean(plain) - statistics.mean(fast)) <= 2 * error


def test_soft_labels_by_a_mixing_that_keeps_all_are_the_labels(part, monkeypatch):
    """A share of 1 is no mixing: the losses are those without, and accuracy is counted against the label."""
    e = Experiment(batch_size=16)
    whole = data.Mixing(partner=torch.arange(16), share=torch.ones(16))
    _, (plain,) = fast_path(replace(e, augment="none"), part, epochs=1)
    monkeypatch.setattr(train, "mix", lambda images, **_: (images, whole))
    _, (mixed,) = fast_path(replace(e, augment="none"), part, epochs=1)
    assert mixed["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-6)
    assert mixed["train_accuracy"] == plain["train_accuracy"] > 0.1


@pytest.mark.parametrize("kinds", ["erase", "cutmix", "mixup", "flip,rotate,crop,erase,cutmix,mixup"])
def test_every_augmentation_trains_and_has_an_effect(tmp_path, kinds):
    run, plain = (experiment.run(small(tmp_path, augment=k, schedule="1"), **QUIET) for k in (kinds, "none"))
    assert 0 < run.metrics["train_accuracy"][0] < 1 and np.isfinite(run.summary["test_loss"])
    assert not all(torch.equal(a, b) for a, b in zip(weights(run).values(), weights(plain).values(), strict=True))


def test_the_first_step_that_is_not_finite_is_named(part):
    e = Experiment(batch_size=16)
    model = models.create(e.model, classes=10, image_size=28)
    state = train.create_state(model, e, total_steps=10, device=CPU, dtype=torch.float32)
    calls = []

    def forward(images):
        calls.append(len(images))
        return model(images) * (float("nan") if len(calls) in (4, 6) else 1)

    state.forward = forward
    with pytest.raises(train.NonFiniteLoss, match="epoch 1, step 4;"):
        train.train_one_epoch(state, part, draws=160, batch_size=16, kinds="none", label_smoothing=0.0, seed=0)
    assert len(calls) == 10 and state.epoch == 0  # looked at when the epoch ends


# Device settings


def test_tf32_is_set_for_the_run_and_restored(tmp_path, monkeypatch):
    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before, seen = flags(), []
    real = train.train_one_epoch

    def look(*args, **keywords):
        seen.append(flags())
        return real(*args, **keywords)

    monkeypatch.setattr(train, "train_one_epoch", look)
    for tf32 in (True, False):
        experiment.run(small(tmp_path, tf32=tf32, schedule="1"), **QUIET)
    assert seen == [(True, True), (False, False)] and flags() == before
    with pytest.raises(KeyError), train.tf32(True):
        raise KeyError
    assert flags() == before


def test_tf32_is_part_of_the_identity_and_the_store_is_not():
    digest = Experiment().digest(data="d", image_size=28)
    assert Experiment(store="mapped").digest(data="d", image_size=28) == digest
    assert Experiment(tf32=True).digest(data="d", image_size=28) != digest


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_is_fused_and_the_network_is_laid_out_for_the_device(name):
    e = Experiment(optimizer=name)
    state = train.create_state(
        models.create("resnet18", classes=3, image_size=32), e, total_steps=3, device=CPU, dtype=torch.float32
    )
    assert state.optimizer.param_groups[0]["fused"]
    assert state.model.network.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_tuned_batch_size_leaves_model_and_rng_alone(monkeypatch):
    """The highest throughput wins on a CPU; a larger batch must earn a twentieth."""
    model = models.create("test_resnet", classes=10, image_size=28)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    rates = {32: 100.0, 64: 120.0, 128: 121.0, 256: 127.0}
    real = train._throughput

    def told(trial, size, **keywords):
        real(trial, 2, **keywords)
        return rates[size]

    monkeypatch.setattr(train, "_throughput", told)
    assert train.auto_batch_size(model, image_size=28, n=3200, device=CPU, dtype=torch.float32) == 256
    rates[256] = 125.0
    assert train.auto_batch_size(model, image_size=28, n=3200, device=CPU, dtype=torch.float32) == 64
    assert train.auto_batch_size(model, image_size=28, n=300, device=CPU, dtype=torch.float32) == 32
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_tuned_batch_size_is_kept_on_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "auto_batch_size", lambda *_, **__: 32)
    e = small(tmp_path, batch_size="auto", schedule="1,p,1")
    experiment.run(e, until_step=1, **QUIET)
    monkeypatch.setattr(train, "auto_batch_size", lambda *_, **__: pytest.fail("measured again"))
    run = experiment.run(e, **QUIET)
    assert run.finished and run.manifest["batch_size"] == 32


# The recipe


@pytest.fixture
def pictures(tmp_path):
    """Ten classes of 32 x 32 noise, in a folder."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(10):
        folder = tmp_path / "pictures" / str(label)
        folder.mkdir(parents=True)
        for i in range(16):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def test_the_fast_recipe_loads_and_trains(tmp_path, pictures, monkeypatch):
    monkeypatch.setenv("PA_DATA", str(tmp_path / "data"))
    recipe = Experiment.from_yaml(ROOT / "params" / "cifar10_fast.yaml")
    assert (recipe.model, recipe.optimizer, recipe.dataset, recipe.schedule) == ("resnet9", "sgd", "cifar10", "24")
    here = {"dataset": "folder", "data_dir": str(pictures), "schedule": "1", "folds": 4, "batch_size": 32}
    run = experiment.run(replace(recipe, runs_dir=str(tmp_path / "runs"), **here), **QUIET)
    assert run.finished and run.manifest["model"]["cam"]["grid"] == [4, 4] and run.manifest["model"]["changes"] == []
    again = Run(run.path).model()
    assert type(again.network) is models.ResNet9
    assert json.loads((run.path / "manifest.json").read_text())["model"]["parameters"] == 6_573_130


def test_resnet9_gives_heatmaps_and_has_no_weights_to_fetch():
    from pa_core import attribution

    model = models.create("resnet9", classes=10, image_size=32).eval()
    maps = attribution.heatmaps(model, torch.rand(2, 3, 32, 32), method="gradcam++")
    assert maps.shape == (2, 32, 32) and maps.min() >= 0 and maps.max() <= 1 and maps.std() > 0
    with pytest.raises(ParameterError, match="no weights for resnet9"):
        models.create("resnet9", classes=10, image_size=32, pretrained=True)


# On CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kinds", ["none", "flip,rotate,crop,erase,cutmix,mixup"])
def test_no_step_of_an_epoch_waits_for_the_device(precision, kinds):
    device = torch.device("cuda")
    dtype = train.resolve_precision(precision, device)
    e = Experiment(batch_size=16, augment=kinds)
    part = experiment.load_data(Experiment(train_fraction=0.05)).train.on(device)
    model = models.create(e.model, classes=10, image_size=28)
    state = train.create_state(model, e, total_steps=30, device=device, dtype=dtype)
    options = {"draws": 160, "batch_size": 16, "kinds": kinds, "label_smoothing": 0.1, "seed": 0}
    train.train_one_epoch(state, part, **options)  # the first one may compile and tune
    waits = []
    real = torch.Tensor.cpu
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.MonkeyPatch.context() as patch:

            def end(tensor):
                waits.append(tensor.shape)
                torch.cuda.set_sync_debug_mode("default")  # from here on the epoch is over
                return real(tensor)

            patch.setattr(torch.Tensor, "cpu", end)
            train.train_one_epoch(state, part, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits[0] == (10,)  # the losses of the ten steps


@pytest.mark.gpu
def test_on_cuda_the_store_is_on_the_device_and_results_do_not_depend_on_it(tmp_path):
    runs = {
        s: experiment.run(small(tmp_path / s, store=s, device="cuda", schedule="1"), **QUIET)
        for s in ("auto", "mapped")
    }
    assert runs["auto"].manifest["store"]["store"] == "device"
    one, other = (run.metrics["train_loss"][0] for run in runs.values())
    assert one == pytest.approx(other, rel=1e-3)
