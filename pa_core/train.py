"""One epoch of training, and evaluation; proxy steps and runs are not known here.

Within an epoch the host never waits for the device: order, labels and the few numbers of an augmentation are sent
ahead, losses stay there until the epoch ends, and with fp16 the fused optimizers skip infinite gradients by themselves.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from pa_core import batch, models
from pa_core.augment import generators
from pa_core.batch import Pool, memory_format
from pa_core.data import Part, send
from pa_core.device import autocast
from pa_core.params import Experiment, derived_seed

STATEFUL = ("model", "optimizer", "scheduler", "scaler")
AHEAD = 4  # batches that are read from a file while the network trains


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN; the message says in which epoch and step."""


@dataclass
class State:
    """All that training changes."""

    model: models.Classifier  # on the device
    forward: Callable[[Tensor], Tensor]  # what is called in training: the model, or its compiled form
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    epoch: int = 0  # how many are finished

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name).state_dict() for name in STATEFUL}
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return state | {"rng": [torch.get_rng_state(), *cuda], "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        models.restore_pruning(self.model, state["model"])
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        cpu, *cuda = state["rng"]
        torch.set_rng_state(cpu)
        if cuda and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda[0], self.device)
        self.epoch = state["epoch"]


def create_state(
    model: models.Classifier, experiment: Experiment, *, total_steps: int, device: torch.device, dtype: torch.dtype
) -> State:
    """A model on its device, its optimiser, a schedule of the learning rate by batch (at most ``lr``), and a scaler."""
    e, schedulers = experiment, torch.optim.lr_scheduler
    model.to(device).to(memory_format=memory_format(device))
    how: Any = {"lr": e.lr, "weight_decay": e.weight_decay, "momentum": 0.9, "fused": True}
    optimizer = create_optimizer_v2(model.parameters(), opt=e.optimizer, **how)
    if e.scheduler == "onecycle":
        scheduler = schedulers.OneCycleLR(optimizer, max_lr=e.lr, total_steps=max(total_steps, 2))
    elif e.scheduler == "cosine":
        scheduler = schedulers.CosineAnnealingLR(optimizer, T_max=total_steps)
    else:
        scheduler = schedulers.ConstantLR(optimizer, factor=1.0)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return State(model, model, optimizer, scheduler, scaler, device, dtype)


def try_compile(state: State, example: Tensor, log: Callable[[str], None] = print) -> str:
    """Compile the training step's forward pass, or say why not and train without: ``compiled``, or the reason.

    Tried on a copy with images float [n, 3, S, S] in [0, 1] on the device; the model itself and the RNG stay as found.
    """
    devices = [state.device] if state.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), autocast(state.device, state.dtype):
            trial = torch.compile(copy.deepcopy(state.model).train())
            trial(example).float().sum().backward()
    except Exception as error:  # the compiler's errors have no common class
        reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
        log(f"compile: not possible here, training goes on without it ({reason})")
        return reason
    state.forward = torch.compile(state.model)
    return "compiled"


def train_one_epoch(
    state: State, pool: Pool, *, experiment: Experiment, entries: int, batch_size: int
) -> dict[str, float]:
    """Train on as many ``entries`` of the pool, drawn without replacement.

    Order and augmentation depend on seed and epoch alone, so that arms with and without proxies, and a resumed run, see
    the same. Gives train_loss (nats, mean over the images that count in it), train_accuracy (of all images drawn, as
    the network saw them), lr (of the last step), images_per_second, seconds. Where labels are mixed, the loss is that
    against soft labels, and the class with the largest share is right. NonFiniteLoss names the first bad step.
    """
    started, epoch, e, device = time.perf_counter(), state.epoch + 1, experiment, state.device
    state.model.train()
    order = batches(len(pool), entries=entries, batch_size=batch_size, seed=e.seed, epoch=epoch)
    labels = send(pool.labels[torch.cat(order)], device).split([len(i) for i in order])  # sent once, split by step
    losses = torch.zeros(len(order), device=device)
    correct, lr = torch.zeros((), device=device, dtype=torch.long), 0.0
    how: Any = {"classes": state.model.classes, "pool": pool, "experiment": e, "draws": generators(e.seed, epoch)}
    for step, images in enumerate(feed(pool.part, [pool.origin[index] for index in order], device)):
        made = batch.make(images, labels[step], index=order[step], **how)
        with autocast(device, state.dtype):
            logits = state.forward(made.images)
            loss = weighted_loss(logits, made, label_smoothing=e.label_smoothing)
        state.optimizer.zero_grad()
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        lr = state.optimizer.param_groups[0]["lr"]
        state.scheduler.step()
        losses[step] = loss.detach()
        hard = made.targets if made.targets.ndim == 1 else made.targets.argmax(1)
        correct += (logits.argmax(1) == hard).sum()
    losses = losses.cpu().double()  # here the host waits for the device
    if len(bad := losses.isfinite().logical_not().nonzero()):
        raise NonFiniteLoss(f"the loss is not finite in epoch {epoch}, step {int(bad[0]) + 1}; a lower lr may help")
    counted = torch.stack([pool.withheld[index].logical_not().sum() for index in order]).double()
    train_loss, seconds = float(losses @ counted / counted.sum().clamp(min=1)), time.perf_counter() - started
    state.epoch = epoch
    numbers = {"train_loss": train_loss, "train_accuracy": int(correct) / entries, "lr": lr}
    return numbers | {"images_per_second": entries / seconds, "seconds": seconds}


def weighted_loss(logits: Tensor, made: batch.Batch, *, label_smoothing: float) -> Tensor:
    """Cross-entropy (nats), the weighted mean over a batch."""
    if made.weights is None:
        return F.cross_entropy(logits, made.targets, label_smoothing=label_smoothing)
    each = F.cross_entropy(logits, made.targets, label_smoothing=label_smoothing, reduction="none")
    return (each * made.weights).sum() / made.weights.sum().clamp(min=1)


def batches(n: int, *, entries: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """``entries`` of ``n`` positions in random order, in nearly equal batches, as batch norm fails on one image."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    return torch.randperm(n, generator=generator)[:entries].tensor_split(steps_per_epoch(entries, batch_size))


def steps_per_epoch(entries: int, batch_size: int) -> int:
    return math.ceil(entries / batch_size)


def feed(part: Part, positions: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The images of each batch of positions of a part, in order: uint8 [n, 3, S, S] on the device."""

    def read(index: Tensor) -> Tensor:
        return send(part.read(index), device)

    if part.resident is not None:
        yield from map(read, send(torch.cat(list(positions)), part.resident).split([len(index) for index in positions]))
        return
    readers, ahead = ThreadPoolExecutor(2, thread_name_prefix="read ahead"), iter(positions)
    try:
        waiting = deque(readers.submit(read, index) for index in islice(ahead, AHEAD))
        while waiting:
            images = waiting.popleft().result()
            waiting.extend(readers.submit(read, index) for index in islice(ahead, 1))
            yield images
    finally:  # where the network or a read failed, what is not begun is not needed
        readers.shutdown(cancel_futures=True)


class Evaluation(NamedTuple):
    """Result of :func:`evaluate`: mean loss (nats), accuracy in [0, 1], logits float32 [N, C] on the CPU."""

    loss: float
    accuracy: float
    logits: Tensor


@torch.inference_mode()
def evaluate(
    model: nn.Module, pool: Pool, *, device: torch.device, dtype: torch.dtype, experiment: Experiment | None = None
) -> Evaluation:
    """Loss and accuracy on all images in eval mode, left as found; with an experiment, the pool's proxies masked."""
    training, draws, logits = model.training, generators(0, 0), []
    model.eval()
    order = torch.arange(len(pool)).split(evaluation_batch(pool.part))
    for index, images in zip(order, feed(pool.part, [pool.origin[i] for i in order], device), strict=True):
        pixels = batch.unaugmented(images, pool=pool, index=index, experiment=experiment, draws=draws)
        with autocast(device, dtype):
            logits.append(model(pixels).float())
    model.train(training)
    stacked, labels = torch.cat(logits), send(pool.labels, device)
    loss, correct = F.cross_entropy(stacked, labels), (stacked.argmax(1) == labels).sum()
    return Evaluation(float(loss), int(correct) / len(pool), stacked.cpu())


def evaluation_batch(part: Part) -> int:
    """Images per forward pass without gradients: about two million pixels, from 16 to 512 images."""
    return max(16, min(512, 2**21 // part.shape[-1] ** 2))
