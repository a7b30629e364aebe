"""Device, precision and batch size: what `auto` stands for on this machine, and what a machine cannot do."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        others = f" or cuda:0 to cuda:{count - 1}" if count else " or mps"
        raise ParameterError("device", name, f"must be auto, cpu{others}; PyTorch sees {count} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ParameterError("device", name, "must be auto or cpu; PyTorch sees no MPS device here")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 or else fp16 on CUDA, fp32 elsewhere."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        name = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise ParameterError("precision", name, "must be auto, fp32 or bf16 on a CPU; fp16 needs a GPU")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@contextmanager
def numerics(experiment: Experiment, *, threads: int | None = None) -> Iterator[None]:
    """What decides the last bits of a result; all is restored afterwards.

    ``tf32``: float32 products on CUDA in TF32 (10 bits of mantissa). ``deterministic``: only operations that give the
    same bits again, as PyTorch's notes on reproducibility ask for. ``threads``: how many a run began with, since the
    sums of a float depend on it.
    """
    backends: Any = torch.backends
    matmul, cudnn, before = backends.cuda.matmul, backends.cudnn, torch.get_num_threads()
    flags = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    matmul.allow_tf32 = cudnn.allow_tf32 = experiment.tf32
    torch.set_num_threads(threads or before)
    if experiment.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = flags
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(before)


AUTO_BATCHES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def auto_batch_size(model: nn.Module, *, image_size: int, n: int, device: torch.device, dtype: torch.dtype) -> int:
    """A good power of two for this model and device; the model and the RNG are left as they are.

    On CUDA the largest whose training step leaves a tenth of the memory free, with all that lies there already; on a
    CPU the one of 32 to 256 with the highest throughput. At least 8 steps remain in an epoch.
    """
    allowed = [b for b in AUTO_BATCHES if b * 8 <= n and (device.type == "cuda" or b <= 256)] or [min(32, max(1, n))]
    best, best_rate = allowed[0], 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trial = copy.deepcopy(model).to(device).to(memory_format=memory_format(device)).train()
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
    images = to_pixels(torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8, device=device))
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
