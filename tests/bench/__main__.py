"""``python -m tests.bench [NAME ...] [--device cpu]``: run benchmarks, print and keep their tables."""

from __future__ import annotations

import argparse
import importlib
import pkgutil

import torch

from pa_core.train import resolve_device
from tests.bench import harness


def names() -> list[str]:
    """The modules beside this one that have a ``run``."""
    package = importlib.import_module("tests.bench")
    found = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return [name for name in found if hasattr(module(name), "run")]


def module(name: str):
    return importlib.import_module(f"tests.bench.{name}")


def main() -> None:
    known = names()
    parser = argparse.ArgumentParser(prog="make bench", description="Benchmarks: " + ", ".join(known))
    parser.add_argument("names", nargs="*", help="which; all by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    options = parser.parse_args()
    for name in options.names:
        if name not in known:
            parser.error(f"BENCH = {name} is unknown: allowed is one of {', '.join(known)}")
    device = resolve_device(options.device)
    print(f"{harness.device_name(device)}, {torch.get_num_threads()} threads, {harness.versions()}", flush=True)
    for name in options.names or known:
        print(f"\n== {name}: {module(name).__doc__.strip().splitlines()[0]}", flush=True)
        table = module(name).run(device)
        harness.show(table)
        print(f"kept in {harness.save(name, table, device=device).relative_to(harness.FOLDER.parents[1])}", flush=True)


if __name__ == "__main__":
    main()
