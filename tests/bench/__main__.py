"""``python -m tests.bench [NAME ...] [--device cpu] [--rounds 1]``: run benchmarks, print and keep their tables."""

from __future__ import annotations

import argparse
import importlib
import time

import torch

from pa_core.device import resolve_device
from tests.bench import harness, report

NAMES = "heatmaps proxy_step proxy_memory batch epoch conventional scale schedule cold_start results_scale".split()
"""Modules beside this one, each with ``run(device, rounds) -> rows``."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description="Benchmarks: " + ", ".join(NAMES))
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed; a table of 1 is not kept")
    options = parser.parse_args()
    for name in options.names:
        if name not in NAMES:
            parser.error(f"BENCH = {name} is unknown: allowed is one of {', '.join(NAMES)}")
    device = resolve_device(options.device)
    print(f"{harness.device_name(device)}, {torch.get_num_threads()} threads, {harness.versions()}", flush=True)
    for name in options.names or NAMES:
        module, started = importlib.import_module(f"tests.bench.{name}"), time.perf_counter()
        print(f"\n== {name}: {(module.__doc__ or '').strip().splitlines()[0]}", flush=True)
        table = module.run(device, options.rounds)
        harness.show(table)
        if options.rounds > 1:
            print(f"kept in {harness.save(name, table, device=device).relative_to(harness.ROOT)}")
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
    if options.rounds > 1:
        report.write()


if __name__ == "__main__":
    main()
