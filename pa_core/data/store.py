"""Images decoded once: uint8 [N, 3, S, S] in a file of the data home, mapped into memory; and where a run keeps them.

The file's name is made of what is in it (the digests of the images, in order, and the size), so
that it is found again wherever the images lie, and never used for others. It is written under
another name and moved into place when it is whole. A process that is killed meanwhile loses the
lock, and the next one starts over.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from pa_core.data import decode, workers
from pa_core.params import ParameterError, data_home

_ELSEWHERE = "allowed is a folder for downloads and image caches that can be written, set by the variable PA_DATA"
_UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC})

Pixels = tuple[np.ndarray, dict[int, str]]
"""uint8 [N, 3, S, S], and the rows that could not be decoded (zeros), with reasons."""


def cache_home() -> Path:
    """Where image caches and indices live. All of it may be deleted at any time."""
    return data_home() / "cache"


def images(things: Callable[[], Sequence[decode.Thing]], digests: Sequence[str], *, size: int, title: str) -> Pixels:
    """The decoded images, from the cache or made now. An empty digest is a row that is left out.

    Args:
        things: gives the N files or images; not called when there is a cached copy.
        digests: of each, as :func:`pa_core.data.decode.digest` gives it.
        size: pixels per side.
        title: what to call them in the progress.

    Raises:
        ParameterError: the data home cannot be written.
        decode.Changed: a file changed while it was read.
    """
    path = cache_home() / f"{_key(digests, size)}.npy"
    shape = (len(digests), 3, size, size)
    found = _open(path, shape)
    if found is None:
        waiting = f"waiting for another process that decodes {title}"
        with writable(), lock(path.with_suffix(".lock"), waiting):
            found = _open(path, shape) or _build(path, things(), digests, shape, title)
    return found


def _key(digests: Sequence[str], size: int) -> str:
    content = json.dumps([decode.VERSION, size, list(digests)])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _open(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """A cached copy, or None where there is none or it is not whole."""
    try:
        bad = json.loads(path.with_suffix(".json").read_bytes())
        array = np.load(path, mmap_mode="r")
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
        # numpy raises ValueError for a header it cannot read and for a file that is too short.
        return None
    whole = array.offset + array.nbytes == path.stat().st_size
    if array.shape != shape or array.dtype != np.uint8 or not whole:
        return None
    return np.asarray(array), {int(row): reason for row, reason in bad.items()}


def _build(
    path: Path,
    things: Sequence[decode.Thing],
    digests: Sequence[str],
    shape: tuple[int, ...],
    title: str,
) -> Pixels:
    """Decode into a new file beside ``path``, then move it there."""
    part = path.with_suffix(".part")
    _check_space(part.parent, int(np.prod(shape)))
    # Windows cannot move a file that is mapped, so this map is gone before that.
    offset = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape).offset
    try:
        rows = [row for row, digest in enumerate(digests) if digest]
        where = {"path": str(part), "offset": offset, "size": shape[-1]}
        done = workers.write(things, digests, rows, **where, text=f"decoding {title}")
        bad = {row: reason for row, _, reason in done if reason is not None}
        atomic_write(path.with_suffix(".json"), json.dumps(bad).encode())
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)  # last: where this file is, all is there
    finally:
        part.unlink(missing_ok=True)
    found = _open(path, shape)
    if found is None:
        raise RuntimeError(f"{path} was written and cannot be read")
    return found


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        text = f"the image cache needs {needed / 1e6:.0f} MB there and {free / 1e6:.0f} MB are free"
        raise ParameterError("PA_DATA", str(data_home()), f"{text}; {_ELSEWHERE}")


@contextmanager
def writable() -> Iterator[None]:
    """Makes the cache's folder, and says in a sentence when something cannot be written there."""
    try:
        cache_home().mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        text = f"nothing can be written there ({os.strerror(error.errno)}); {_ELSEWHERE}"
        raise ParameterError("PA_DATA", str(data_home()), text) from error


@contextmanager
def lock(path: Path, waiting: str) -> Iterator[None]:
    """Holds a lock between processes; it falls when the process ends, however it ends."""
    held = FileLock(path)
    try:
        held.acquire(timeout=0)
    except Timeout:
        print(waiting, file=sys.stderr, flush=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file so that others see all of it or nothing, and it survives a crash."""
    with writable():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


# Where a run keeps its images

HEADROOM = 0.5
"""Of the memory that is free the images may take this share; the rest is for the network and its activations."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the training and validation images are kept during a run.

    Attributes:
        store: ``device`` (in its memory; in RAM on a CPU) or ``mapped`` (in their file, read ahead by threads).
        bytes: what they take, with the room for proxies.
        free_bytes: what was free on the device before.
    """

    store: str
    bytes: int
    free_bytes: int


def place(store: str, *, needed: int, device: torch.device) -> Placement:
    """Resolve the parameter ``store`` by what the images need and what is free on the device.

    Args:
        store: ``device``, ``mapped``, or ``auto``: the device when the images fit.
        needed: bytes.

    Raises:
        ParameterError: ``device`` is asked for and they do not fit.
    """
    free = free_memory(device)
    fits = needed <= HEADROOM * free
    if store == "device" and not fits:
        sizes = f"the images take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on {device}"
        raise ParameterError(
            "store", store, f"{sizes}, half of which stays free for the network; allowed is auto or mapped"
        )
    if store == "auto":
        store = "device" if fits else "mapped"
    return Placement(store=store, bytes=needed, free_bytes=free)


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take on the device, as its driver or the operating system says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min(psutil.virtual_memory().available, _container_memory())


def _container_memory() -> float:
    """What the control group (version 2) of a container leaves; infinite without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # another system, or no container
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - int(used)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host does not wait for a copy to CUDA, which goes through pinned memory."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
