"""How contenders are timed, and how a table of them is kept.

All contenders of a benchmark run in one process, one after the other, again and again; what is reported is each one's
median. Machines are shared and clocks drift, so the ratio to the reference says more than any value.
"""

from __future__ import annotations

import csv
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

OURS = "pa_core"
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "figures" / "bench"
PACKAGES = ("torch", "torchvision", "timm", "captum", "grad-cam")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of figures/bench/NAME_DEVICE.csv. ``ratio`` is ``value`` / that of the contender ``reference``."""

    benchmark: str
    contender: str
    device: str
    threads: int
    value: float
    unit: str
    reference: str
    ratio: float
    versions: str


def interleave(
    contenders: Mapping[str, Callable[[], int]], *, device: torch.device, rounds: int, warmup: int = 1
) -> dict[str, float]:
    """Median rate of each contender.

    Args:
        contenders: each does its work once and returns how many units (images, say) that was.
        rounds: how often each is timed; the order is turned by one from round to round, so that none always
            follows the same other.
        warmup: rounds before that, which are not counted.

    Returns:
        Units per second, by contender.
    """
    names, rates = list(contenders), {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds, units = timed(contenders[name], device=device)
            if turn >= warmup:
                rates[name].append(units / seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


def timed(work: Callable[[], int], *, device: torch.device) -> tuple[float, int]:
    """Seconds that a piece of work takes, the device's queue empty before and after, and what it returned."""
    wait(device)
    started = time.perf_counter()
    units = work()
    wait(device)
    return time.perf_counter() - started, units


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows(
    benchmark: str, values: Mapping[str, float], *, reference: str, device: torch.device, unit: str = "images/s"
) -> list[Row]:
    """A row per contender; ``benchmark`` names what was run, such as ``heatmaps: resnet18 at 224, gradcam``."""
    return [
        Row(
            benchmark=benchmark,
            contender=contender,
            device=device_name(device),
            threads=torch.get_num_threads(),
            value=float(f"{value:.5g}"),
            unit=unit,
            reference=reference,
            ratio=float(f"{value / values[reference]:.4g}") if values[reference] else float("nan"),
            versions=versions(),
        )
        for contender, value in values.items()
    ]


def in_process(module: str, *arguments: object) -> str:
    """What ``python -m module arguments`` prints, such as the peak memory of a fresh process."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def device_name(device: torch.device) -> str:
    """Such as ``NVIDIA H100 80GB HBM3``, or the processor's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and Path("/proc/cpuinfo").is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or device.type


def versions() -> str:
    """Python, and the packages that the contenders come from."""
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def csv_path(name: str, *, device: torch.device, folder: Path = FOLDER) -> Path:
    """figures/bench/NAME_DEVICE.csv, DEVICE being ``cpu`` or the GPU's name."""
    label = "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}_{label}.csv"


def save(name: str, table: list[Row], *, device: torch.device, folder: Path = FOLDER) -> Path:
    """Write a table; see :func:`csv_path`."""
    path = csv_path(name, device=device, folder=folder)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in table)
    return path


def show(table: list[Row]) -> None:
    """Print a table: a line per contender, its ratio to the reference last."""
    width = max(len(row.contender) for row in table)
    for benchmark in dict.fromkeys(row.benchmark for row in table):
        print(benchmark)
        for row in (row for row in table if row.benchmark == benchmark):
            print(
                f"  {row.contender:<{width}}  {row.value:>10,.4g} {row.unit:<10}  {row.ratio:>6.2f} x {row.reference}"
            )
    print(flush=True)
