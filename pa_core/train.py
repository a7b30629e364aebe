"""One epoch of training, and evaluation. Nothing here knows of proxies or runs.

Within an epoch the host never waits for the device: order, labels and the few numbers of an augmentation are sent
ahead, losses stay there until the epoch ends. With fp16 that holds because the fused optimizers skip a step with
infinite gradients on the device themselves.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pa_core.data import augment, mix, send
from pa_core.masking import to_float
from pa_core.params import Experiment, ParameterError, derived_seed


class Source(Protocol):
    """What an epoch draws from: a :class:`~pa_core.data.Part`, or one with an overlay of proxies.

    Attributes:
        labels: int64 [N], on the CPU.
        shape: (3, S, S).
        resident: the device that holds the images, None when they are read from a file.
    """

    labels: Tensor
    shape: tuple[int, int, int]
    resident: torch.device | None

    def __len__(self) -> int: ...

    def read(self, index: Tensor) -> Tensor:
        """int64 [n] -> uint8 [n, 3, S, S], on the resident device, else on the CPU"""


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN; the message says in which epoch and step."""


@dataclass(kw_only=True)
class State:
    """All that training changes.

    Attributes:
        model: the classifier, on the device.
        forward: what is called in training: the model, or its compiled form.
        epoch: number of finished epochs.
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    epoch: int = 0

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.dtype)

    def state_dict(self) -> dict[str, Any]:
        parts = ("model", "optimizer", "scheduler", "scaler")
        state = {name: getattr(self, name).state_dict() for name in parts}
        state["rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)
        return state | {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.epoch = state["epoch"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of :func:`evaluate`: mean loss (nats), accuracy in [0, 1], logits float32 [N, C] on the CPU, seconds."""

    loss: float
    accuracy: float
    logits: Tensor
    seconds: float


def train_one_epoch(
    state: State, source: Source, *, draws: int, batch_size: int, kinds: str, label_smoothing: float, seed: int
) -> dict[str, float]:
    """Train on ``draws`` images of ``source``, drawn without replacement.

    Order and augmentation depend on ``seed`` and the epoch alone, so that arms with and without proxies, and
    a resumed run, see the same.

    Returns:
        train_loss (nats, mean per image), train_accuracy, lr (of the last step), images_per_second, seconds. Where
        mixup or cutmix mix labels, the loss is that against soft labels, and a prediction is right when it is the
        class with the largest share.

    Raises:
        NonFiniteLoss: with the epoch and the first bad step.
    """
    started = time.perf_counter()
    state.model.train()
    epoch = state.epoch + 1
    generator = torch.Generator().manual_seed(derived_seed(seed, "augment", epoch))
    order = list(batches(len(source), draws=draws, batch_size=batch_size, seed=seed, epoch=epoch))
    labels = send(source.labels[torch.cat(order)], state.device).split([len(index) for index in order])
    losses = torch.zeros(len(order), device=state.device)
    correct = torch.zeros((), device=state.device, dtype=torch.long)
    lr = 0.0
    for step, images in enumerate(feed(source, order, state.device)):
        images = augment(images, kinds=kinds, generator=generator)
        images, mixing = mix(images, kinds=kinds, generator=generator)
        with state.autocast():
            logits = state.forward(pixels(images))
            targets = labels[step] if mixing is None else mixing.targets(labels[step], classes=logits.shape[1])
            loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        lr = state.optimizer.param_groups[0]["lr"]
        state.scheduler.step()
        losses[step] = loss.detach()
        correct += (logits.argmax(1) == (targets if mixing is None else targets.argmax(1))).sum()
    losses = losses.cpu().double()  # here the host waits for the device
    if not losses.isfinite().all():
        step = int(losses.isfinite().logical_not().nonzero()[0]) + 1
        raise NonFiniteLoss(f"the loss is not finite in epoch {epoch}, step {step}; a lower lr may help")
    seconds = time.perf_counter() - started
    state.epoch = epoch
    return {
        "train_loss": float(losses @ torch.tensor([len(index) for index in order]).double()) / draws,
        "train_accuracy": int(correct) / draws,
        "lr": lr,
        "images_per_second": draws / seconds,
        "seconds": seconds,
    }


def batches(n: int, *, draws: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """``draws`` of ``n`` positions in random order, in equal batches of at most ``batch_size``.

    Equal, because a last batch of one image would stop batch normalisation.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    order = torch.randperm(n, generator=generator)[:draws]
    yield from order.tensor_split(steps_per_epoch(draws, batch_size))


READERS = 2
AHEAD = 4
"""Threads that read images from a file while the network trains, and batches that they are ahead."""


def feed(source: Source, order: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The images of each batch of positions, in order: uint8 [n, 3, S, S] on the device."""
    if source.resident is not None:
        rows = send(torch.cat(list(order)), source.resident).split([len(index) for index in order])
        yield from (send(source.read(index), device) for index in rows)
        return

    def read(index: Tensor) -> Tensor:
        images = source.read(index)
        return images.pin_memory() if device.type == "cuda" else images

    with ThreadPoolExecutor(READERS, thread_name_prefix="read ahead") as pool:
        waiting: deque = deque()
        try:
            for index in order:
                waiting.append(pool.submit(read, index))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result().to(device, non_blocking=True)
            while waiting:
                yield waiting.popleft().result().to(device, non_blocking=True)
        finally:  # the network failed, or reading did: what is not begun is not needed
            pool.shutdown(wait=False, cancel_futures=True)


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels last for CUDA, whose tensor cores want it, and for the CPU, where the default model trains a fifth faster."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def pixels(images: Tensor) -> Tensor:
    """uint8 [n, 3, S, S] -> float32 in [0, 1], in the memory format of the networks on that device."""
    return to_float(images.contiguous(memory_format=memory_format(images.device)))


def steps_per_epoch(draws: int, batch_size: int) -> int:
    return math.ceil(draws / batch_size)


@torch.inference_mode()
def evaluate(
    model: nn.Module, source: Source, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> Evaluation:
    """Loss and accuracy on all images, in eval mode without augmentation; the model's mode is left as found."""
    started = time.perf_counter()
    training = model.training
    model.eval()
    order = torch.arange(len(source)).split(evaluation_batch(source))
    logits = []
    for images in feed(source, order, device):
        with autocast(device, dtype):
            logits.append(model(pixels(images)).float())
    model.train(training)
    stacked = torch.cat(logits)
    labels = send(source.labels, device)
    loss, correct = F.cross_entropy(stacked, labels), (stacked.argmax(1) == labels).sum()
    return Evaluation(
        loss=float(loss),
        accuracy=int(correct) / len(source),
        logits=stacked.cpu(),
        seconds=time.perf_counter() - started,
    )


def evaluation_batch(source: Source) -> int:
    """Images per forward pass without gradients: about two million pixels, from 16 to 512 images."""
    return max(16, min(512, 2**21 // source.shape[-1] ** 2))


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)


def create_state(
    model: nn.Module, experiment: Experiment, *, total_steps: int, device: torch.device, dtype: torch.dtype
) -> State:
    """Optimiser, learning-rate schedule over ``total_steps`` and gradient scaler for a model."""
    model.to(device, memory_format=memory_format(device))
    optimizer = make_optimizer(model, experiment)
    return State(
        model=model,
        forward=model,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, experiment, total_steps=total_steps),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        device=device,
        dtype=dtype,
    )


def make_optimizer(model: nn.Module, experiment: Experiment) -> torch.optim.Optimizer:
    """``adamw``; ``sgd`` has Nesterov momentum 0.9. Both fused: all parameters are updated in one pass."""
    common = {"lr": experiment.lr, "weight_decay": experiment.weight_decay, "fused": True}
    if experiment.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **common)
    return torch.optim.AdamW(model.parameters(), **common)


def make_scheduler(
    optimizer: torch.optim.Optimizer, experiment: Experiment, *, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over the whole run, one step per batch; ``lr`` is its highest value."""
    if experiment.scheduler == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=experiment.lr, total_steps=max(total_steps, 2))
    if experiment.scheduler == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0)


# Devices


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA, else MPS, else the CPU. A device that this machine lacks is refused."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        has = f"{count} CUDA devices" if count else "no CUDA device"
        raise ParameterError(
            "device",
            name,
            f"PyTorch sees {has} here; allowed is auto, cpu" + (f" or cuda:0 to cuda:{count - 1}" if count else ""),
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ParameterError("device", name, "PyTorch sees no MPS device here; allowed is auto or cpu")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 or else fp16 on CUDA, fp32 elsewhere."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        name = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise ParameterError("precision", name, "fp16 needs a GPU; on a CPU allowed is auto, fp32 or bf16")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products on CUDA may be computed in TF32 (10 bits of mantissa); the flags are restored afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def try_compile(state: State, example: Tensor, log: Callable[[str], None] = print) -> str:
    """Compile the training step's forward pass; when that fails, say why and train without.

    Tried on a copy, forward and backward, so that the model itself and the RNG stay as they are.

    Args:
        example: float [n, 3, S, S] in [0, 1] on the device.

    Returns:
        ``compiled``, or the reason why not.
    """
    try:
        with torch.random.fork_rng(devices=[state.device] if state.device.type == "cuda" else []), state.autocast():
            trial = torch.compile(copy.deepcopy(state.model).train())
            trial(example).float().sum().backward()
    except Exception as error:  # the compiler's errors have no common class
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        log(f"compile: not possible here, training goes on without it ({reason})")
        return reason
    state.forward = torch.compile(state.model)
    return "compiled"


AUTO_BATCHES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def auto_batch_size(model: nn.Module, *, image_size: int, n: int, device: torch.device, dtype: torch.dtype) -> int:
    """A good power of two for this model and device; the model and the RNG are left as they are.

    On CUDA the largest whose training step leaves a tenth of the memory free, with all that lies there already; on a CPU
    the one of 32 to 256 with the highest throughput. At least 8 steps remain in an epoch.
    """
    allowed = [b for b in AUTO_BATCHES if b * 8 <= n and (device.type == "cuda" or b <= 256)] or [min(32, max(1, n))]
    best, best_rate = allowed[0], 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trial = copy.deepcopy(model).to(device, memory_format=memory_format(device)).train()
        for size in allowed:
            try:
                rate = _throughput(trial, size, image_size=image_size, device=device, dtype=dtype)
            except torch.cuda.OutOfMemoryError:
                break
            if device.type == "cuda":
                free, total = torch.cuda.mem_get_info(device)  # PyTorch keeps what a step took at most
                if free < 0.1 * total:
                    break
                best = size
            elif rate > 1.05 * best_rate:  # a larger batch must earn it
                best, best_rate = size, rate
    if device.type == "cuda":
        del trial
        torch.cuda.empty_cache()
    return best


def _throughput(model: nn.Module, size: int, *, image_size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Images per second of a training step, the best of three, after one to warm up."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = pixels(torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8, device=device))
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        with autocast(device, dtype):
            loss = model(images).float().logsumexp(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # waits for the device
        best = min(best, time.perf_counter() - started)
    return size / best
