"""Work on many images on all cores: hash them, or decode them, with progress."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice

from tqdm import tqdm

from pa_core.data import decode

CHUNK = 64
FEW = 512
"""Up to this many images are done at once, here: starting processes would take longer."""


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe(things: Sequence[decode.Thing], rows: Sequence[int], *, text: str) -> Iterator[decode.Reply]:
    """Replies with (digest, height, width) of the given rows, in their order."""
    jobs = ((row, things[row], None) for row in rows)
    return _work(decode.Describe(), ["describe"], jobs, len(rows), text=text)


def write(
    things: Sequence[decode.Thing],
    digests: Sequence[str],
    rows: Sequence[int],
    *,
    path: str,
    offset: int,
    size: int,
    text: str,
) -> Iterator[decode.Reply]:
    """Decodes the given rows into those of a file, see :class:`pa_core.data.decode.Write`.

    Raises:
        decode.Changed: an image is not what its digest says.
        OSError: the pixels could not be written.
    """
    jobs = ((row, things[row], digests[row]) for row in rows)
    arguments = ["write", path, str(offset), str(size)]
    return _work(decode.Write(path, offset, size), arguments, jobs, len(rows), text=text)


def _work(
    work: Callable[[Sequence[decode.Job]], list[decode.Reply]],
    arguments: list[str],
    jobs: Iterator[decode.Job],
    count: int,
    *,
    text: str,
) -> Iterator[decode.Reply]:
    # Lazily: some sources decode an image when they are asked for it.
    chunks = iter(lambda: list(islice(jobs, CHUNK)), [])
    first = next(chunks, [])
    # Pixels that are in memory already are not worth the way to another process.
    elsewhere = count > FEW and cores() > 1 and isinstance(first[0][1], str)
    answers = map(work, chain([first], chunks))
    if elsewhere:
        answers = _in_processes(arguments, [first, *chunks])
    with progress(count, text) as bar:
        for replies in answers:
            bar.update(len(replies))
            yield from replies


def _in_processes(arguments: list[str], chunks: list[Sequence[decode.Job]]) -> Iterator[list[decode.Reply]]:
    count = min(cores(), len(chunks))
    with _processes(arguments, count) as idle, ThreadPoolExecutor(count) as pool:

        def ask(chunk: Sequence[decode.Job]) -> list[decode.Reply]:
            process = idle.get()
            try:
                return _ask(process, chunk)
            finally:
                idle.put(process)

        try:
            yield from pool.map(ask, chunks)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _ask(process: subprocess.Popen, chunk: Sequence[decode.Job]) -> list[decode.Reply]:
    try:
        process.stdin.write(json.dumps(chunk) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        raise RuntimeError(
            f"a process that reads images ended (status {process.wait()}) over one of the files "
            f"{chunk[0][1]} to {chunk[-1][1]}"
        )
    answer = json.loads(line)
    if "changed" in answer:
        raise decode.Changed(answer["changed"])
    if "errno" in answer:
        raise OSError(answer["errno"], answer["text"])
    return [tuple(reply) for reply in answer["replies"]]


@contextmanager
def _processes(arguments: list[str], count: int) -> Iterator[queue.SimpleQueue]:
    # -P: the folder of decode.py is not to be searched for modules.
    command = [sys.executable, "-P", decode.__file__, *arguments]
    started: list[subprocess.Popen] = []
    idle: queue.SimpleQueue = queue.SimpleQueue()
    try:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        for _ in range(count):
            started.append(subprocess.Popen(command, **pipes))
            idle.put(started[-1])
        yield idle
    finally:
        for process in started:
            process.kill()  # they have nothing of their own to finish
            process.communicate()


class _Lines:
    """A log file has no line to overwrite: each state of the bar becomes a line."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(total: int, text: str) -> tqdm:
    """A bar on a terminal, elsewhere a line every ten seconds; nothing within a second."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=text, unit=" images", delay=1, file=sys.stderr)
    shown = "{desc}: {n_fmt} of {total_fmt} images, {elapsed}"
    every = {"mininterval": 10, "maxinterval": 10, "delay": 1}
    return tqdm(total=total, desc=text, bar_format=shown, file=_Lines(), **every)
