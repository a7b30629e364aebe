"""How images reach the network, that being fast changes nothing in what is learnt, and what the device settings do."""

from __future__ import annotations

import threading

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tiny import CPU, QUIET, same_weights, small

from pa_core import batch, data, device, experiment, models, proxy, train
from pa_core.batch import Pool
from pa_core.params import Experiment, derived_seed

EVERY = "flip,rotate,crop,erase,cutmix,mixup"


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    return experiment.load_data(small(tmp_path_factory.mktemp("part"))).train


# Where the images are


@pytest.mark.parametrize("changes", [{}, {"overlay": "append", "keep_proxies": "all", "schedule": "1,p,1,p,1"}])
def test_where_the_images_are_changes_no_bit_of_the_result(tmp_path, monkeypatch, changes):
    runs = []
    for fits in (True, False):
        monkeypatch.setattr(data, "fits", lambda parts, device, fits=fits: fits)
        runs.append(experiment.run(small(tmp_path / str(fits), augment=EVERY, **changes), **QUIET))
    assert [run.manifest["images_on_device"] for run in runs] == [True, False]
    assert same_weights(*runs) and runs[0].path.name == runs[1].path.name
    assert runs[0].summary["test_loss"] == runs[1].summary["test_loss"]
    losses = [run.metrics[["train_loss", "val_loss"]].to_numpy() for run in runs]
    assert np.array_equal(*losses)


class Slow:
    """A part in a file, whose reading can fail."""

    shape, resident = (3, 4, 4), None

    def __init__(self, fail_at: int | None = None):
        self.fail_at, self.threads, self.begun = fail_at, set(), 0

    def read(self, index):
        self.threads.add(threading.current_thread().name)
        self.begun += 1
        if self.fail_at in index.tolist():
            raise OSError("the disk is gone")
        return index.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_images_of_a_file_are_read_ahead_in_order_by_other_threads():
    source, order = Slow(), torch.arange(100).split(7)
    fed = list(train.feed(source, order, CPU))
    assert [images[:, 0, 0, 0].tolist() for images in fed] == [index.tolist() for index in order]
    assert source.threads and all(name.startswith("read ahead") for name in source.threads)
    with pytest.raises(OSError, match="the disk is gone"):  # a failure reaches the run
        list(train.feed(Slow(fail_at=50), order, CPU))


def test_reading_ahead_holds_few_batches_and_ends_with_the_reader():
    source = Slow()
    fed = train.feed(source, torch.arange(100).split(1), CPU)
    next(fed)
    assert source.begun <= train.AHEAD + 1
    fed.close()
    for thread in threading.enumerate():
        if thread.name.startswith("read ahead"):
            thread.join(timeout=5)
            assert not thread.is_alive()
    assert source.begun <= train.AHEAD + 1


# The fast path learns what a plain loop learns


def plain_loop(e: Experiment, part, *, epochs: int) -> list[float]:
    """The mean loss of each epoch, as in a tutorial: one batch after the other, nothing fused or laid out anew."""
    model = models.create(e.model, classes=10, image_size=28, seed=derived_seed(e.seed, "initialisation")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=e.lr, weight_decay=e.weight_decay, foreach=False, fused=False)
    steps = -(-len(part) // e.batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=e.lr, total_steps=epochs * steps)
    images, losses = part.read(torch.arange(len(part))).float() / 255, []
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(derived_seed(e.seed, "order", epoch)))
        for index in order.tensor_split(steps):
            loss = F.cross_entropy(model(images[index]), part.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    return [float(np.mean(some)) for some in np.split(np.array(losses), epochs)]


def fast_path(e: Experiment, part, *, epochs: int = 1, pool: Pool | None = None) -> list[dict[str, float]]:
    model = models.create(e.model, classes=10, image_size=28, seed=derived_seed(e.seed, "initialisation"))
    steps = train.steps_per_epoch(len(part), e.batch_size)
    state = train.create_state(model, e, total_steps=epochs * steps, device=CPU, dtype=torch.float32)
    options = {"experiment": e, "entries": len(part), "batch_size": e.batch_size}
    return [train.train_one_epoch(state, pool or Pool.of(part.on(CPU)), **options) for _ in range(epochs)]


def test_losses_are_those_of_a_plain_loop(part):
    """Same order, same schedule of the learning rate; rounding grows from epoch to epoch."""
    e = Experiment(batch_size=16, seed=3, augment="none")
    losses = [row["train_loss"] for row in fast_path(e, part, epochs=4)]
    plain = plain_loop(e, part, epochs=4)
    assert losses[0] == pytest.approx(plain[0], rel=1e-4) and losses == pytest.approx(plain, rel=0.02)
    assert losses[-1] < 0.9 * losses[0]


def test_withheld_images_have_no_part_in_the_loss(part):
    """The loss is that of the other images, and soft labels that are hard give the same."""
    logits, labels = torch.randn(6, 10), torch.arange(6)
    keep = torch.tensor([1.0, 0, 1, 1, 0, 1])
    made = batch.Batch(images=torch.zeros(6, 3, 4, 4), targets=labels, weights=keep)
    expected = F.cross_entropy(logits[keep > 0], labels[keep > 0], label_smoothing=0.1)
    assert torch.allclose(train.weighted_loss(logits, made, label_smoothing=0.1), expected)
    soft = batch.Batch(images=made.images, targets=F.one_hot(labels, 10).float(), weights=keep)
    assert torch.allclose(train.weighted_loss(logits, soft, label_smoothing=0.1), expected)
    none = batch.Batch(images=made.images, targets=labels, weights=torch.zeros(6))
    assert train.weighted_loss(logits, none, label_smoothing=0.0) == 0  # and no division by nothing


def test_every_augmentation_trains_and_has_an_effect(part):
    losses = [
        fast_path(Experiment(batch_size=16, augment=kind), part)[0] for kind in ("none", *EVERY.split(","), EVERY)
    ]
    assert len({row["train_loss"] for row in losses}) == len(losses)
    assert all(0 < row["train_accuracy"] < 1 and np.isfinite(row["train_loss"]) for row in losses)


def test_the_first_step_that_is_not_finite_is_named(part):
    e, calls = Experiment(batch_size=16), []
    model = models.create(e.model, classes=10, image_size=28)
    state = train.create_state(model, e, total_steps=10, device=CPU, dtype=torch.float32)

    def forward(images):
        calls.append(len(images))
        return model(images) * (float("nan") if len(calls) in (4, 6) else 1)

    state.forward = forward
    with pytest.raises(train.NonFiniteLoss, match="epoch 1, step 4;"):
        train.train_one_epoch(state, Pool.of(part), experiment=e, entries=160, batch_size=16)
    assert len(calls) == 10 and state.epoch == 0  # looked at when the epoch ends


# Device settings


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_is_fused_and_the_network_is_laid_out_for_the_device(name):
    model = models.create("resnet18", classes=3, image_size=32)
    state = train.create_state(model, Experiment(optimizer=name), total_steps=3, device=CPU, dtype=torch.float32)
    assert state.optimizer.param_groups[0]["fused"]
    assert state.model.network.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_tuned_batch_size_leaves_model_and_rng_alone(monkeypatch):
    """The highest throughput wins on a CPU; a larger batch must earn a twentieth."""
    model = models.create("test_resnet", classes=10, image_size=28)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    rates = {32: 100.0, 64: 120.0, 128: 121.0, 256: 127.0}

    def told(step, **_keywords):
        step()
        size = len(step.args[2])
        return [size / rates[size]]

    monkeypatch.setattr(device.timeit, "repeat", told)
    options = {"image_size": 28, "device": CPU, "dtype": torch.float32}
    assert device.auto_batch_size(model, n=3200, **options) == 256
    rates[256] = 125.0
    assert device.auto_batch_size(model, n=3200, **options) == 64
    assert device.auto_batch_size(model, n=300, **options) == 32
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_tuned_batch_size_is_kept_on_resume(tmp_path, monkeypatch):
    def interrupt(text):
        if text.startswith("epoch 1"):
            raise KeyboardInterrupt

    monkeypatch.setattr(device, "auto_batch_size", lambda *_, **__: 32)
    e = small(tmp_path, batch_size="auto")
    with pytest.raises(KeyboardInterrupt):
        experiment.run(e, log=interrupt)
    monkeypatch.setattr(device, "auto_batch_size", lambda *_, **__: pytest.fail("measured again"))
    run = experiment.run(e, **QUIET)
    assert run.finished and run.manifest["batch_size"] == 32 and run.experiment.batch_size == "auto"


def test_bf16_trains_on_a_cpu(tmp_path):
    run = experiment.run(small(tmp_path, precision="bf16", train_fraction=0.02), **QUIET)
    assert run.manifest["precision"] == "bfloat16" and np.isfinite(run.summary["test_loss"])


def test_compile_trains_as_without_it_or_says_why_not(tmp_path, monkeypatch):
    """Dynamo for real; the C++ that it would generate takes a minute, so the graphs are run as they are."""
    real, lines = torch.compile, []

    def broken(_model):
        raise RuntimeError("no compiler\nsecond line")

    e = small(tmp_path, schedule="1", train_fraction=0.02)
    plain = experiment.run(e, **QUIET)
    assert plain.manifest["compile"] is None
    for seed, compiler in ((0, lambda model: real(model, backend="eager")), (1, broken)):
        monkeypatch.setattr(torch, "compile", compiler)
        run = experiment.run(e.replace(compile=True, seed=seed), log=lines.append)
        if seed == 0:
            assert run.manifest["compile"] == "compiled"
            assert run.metrics["train_loss"][0] == pytest.approx(plain.metrics["train_loss"][0], rel=1e-4)
    assert run.finished and run.manifest["compile"] == "RuntimeError: no compiler"
    assert any("compile: not possible here" in line and "no compiler" in line for line in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_cuda(tmp_path, precision):
    run = experiment.run(small(tmp_path, device="cuda", precision=precision), **QUIET)
    assert run.summary["proxy_images"] == 32 and run.manifest["device"].startswith("cuda")


@pytest.mark.gpu
def test_deterministic_gives_the_same_bits_again_on_cuda(tmp_path):
    every = {"augment": "flip,rotate,crop,erase,cutmix,mixup", "deterministic": True, "device": "cuda"}
    one, other = (experiment.run(small(tmp_path / k, schedule="1,p,1,x0.5,1", **every), **QUIET) for k in "ab")
    assert same_weights(one, other)
    pd.testing.assert_frame_equal(one.predictions, other.predictions)
    assert data.send(torch.ones(1), torch.device("cuda")).is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kinds", ["none", EVERY])
def test_no_step_of_an_epoch_waits_for_the_device(part, precision, kinds):
    cuda = torch.device("cuda")
    dtype = device.resolve_precision(precision, cuda)
    e = Experiment(batch_size=16, augment=kinds, label_smoothing=0.1, fill="patch", proxy_probability=0.5)
    state = train.create_state(
        models.create(e.model, classes=10, image_size=28), e, total_steps=30, device=cuda, dtype=dtype
    )
    pool, options = some_proxies(part.on(cuda)), {"experiment": e, "entries": 160, "batch_size": 16}
    train.train_one_epoch(state, pool, **options)  # the first one may compile and tune
    waits, real = [], torch.Tensor.cpu

    def end(tensor):
        waits.append(tensor.shape)
        torch.cuda.set_sync_debug_mode("default")  # from here on the epoch is over
        return real(tensor)

    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "cpu", end)
            train.train_one_epoch(state, pool, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits[0] == (10,)  # the losses of the ten steps


def some_proxies(part) -> Pool:
    """Every fifth image has a map, on the images' device."""
    positions = torch.arange(0, 160, 5)
    maps = torch.rand(32, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    return proxy.pool(part, Experiment(), [proxy.Step(positions=positions, maps=maps.to(part.resident))])


@pytest.mark.gpu
def test_on_cuda_results_do_not_depend_on_where_the_images_are(tmp_path, monkeypatch):
    losses = []
    for fits in (True, False):
        monkeypatch.setattr(data, "fits", lambda parts, device, fits=fits: fits)
        run = experiment.run(small(tmp_path / str(fits), device="cuda", schedule="1"), **QUIET)
        assert run.manifest["images_on_device"] is fits
        losses.append(run.metrics["train_loss"][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
