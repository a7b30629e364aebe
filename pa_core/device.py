"""Device, precision and batch size: what `auto` stands for on this machine, and what a machine cannot do."""

from __future__ import annotations

import copy
import os
import timeit
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from pa_core.batch import memory_format, to_pixels
from pa_core.errors import ParameterError
from pa_core.params import Experiment


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA, else MPS, else the CPU. A device that this machine lacks is refused."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    device = torch.device(next(kind for kind in counts if counts[kind]) if name == "auto" else name)
    if (device.index or 0) >= counts[device.type]:
        seen = f"PyTorch sees {counts['cuda']} CUDA and {counts['mps']} MPS devices here"
        raise ParameterError("device", name, f"must be auto, cpu or a device that is there; {seen}")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 or else fp16 on CUDA, fp32 elsewhere."""
    if name == "auto":
        name = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise ParameterError("precision", name, "must be auto, fp32 or bf16 on a CPU; fp16 needs a GPU")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@contextmanager
def numerics(experiment: Experiment, *, threads: int | None = None) -> Iterator[None]:
    """What decides the last bits of a result: TF32 on CUDA, operations that give the same bits again, and ``threads``.

    The number of threads that a run began with, since sums depend on it. All is restored afterwards.
    """
    cudnn: Any = torch.backends.cudnn
    flags = [(torch.backends.cuda.matmul, "allow_tf32", experiment.tf32), (cudnn, "allow_tf32", experiment.tf32)]
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads or torch.get_num_threads())
        if experiment.deterministic:
            flags.append((cudnn, "benchmark", False))
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
            stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            torch.use_deterministic_algorithms(True)
        for place, name, value in flags:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        yield


def auto_batch_size(model: nn.Module, *, image_size: int, n: int, device: torch.device, dtype: torch.dtype) -> int:
    """A power of two that leaves an epoch 8 steps or more; the model and the RNG are left as they are.

    On CUDA the largest whose training step leaves a tenth of all memory free, on a CPU the fastest of 32 to 256.
    """
    cuda, best, rate = device.type == "cuda", min(32, n), 0.0
    with torch.random.fork_rng(devices=[device] if cuda else []):
        trial = copy.deepcopy(model).to(device).to(memory_format=memory_format(device)).train()
        optimizer = torch.optim.AdamW(trial.parameters(), fused=True)
        for size in [2**k for k in range(5, 13 if cuda else 9) if 8 * 2**k <= n]:
            images = to_pixels(torch.zeros(size, 3, image_size, image_size, dtype=torch.uint8, device=device))
            try:  # the first of the steps warms up
                seconds = min(timeit.repeat(partial(_step, trial, optimizer, images, dtype), number=1, repeat=4))
            except torch.cuda.OutOfMemoryError:
                break
            free, total = torch.cuda.mem_get_info(device) if cuda else (1, 1)  # PyTorch keeps what a step took at most
            if free < 0.1 * total:
                break
            if cuda or size / seconds > 1.05 * rate:  # on a CPU a larger batch must earn it
                best, rate = size, size / seconds
    trial = optimizer = images = None  # so that their memory can be given back
    torch.cuda.empty_cache()
    return best


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, dtype: torch.dtype) -> None:
    with autocast(images.device, dtype):
        loss = model(images).float().logsumexp(1).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()  # waits for the device
