"""What pytest needs to know beyond pyproject.toml: where CUDA is missing, and how many notebook cells ran."""

from __future__ import annotations

import os

# One thread each: the tests' networks are tiny, and processes that share two cores would otherwise spin for them.
# Set before torch is loaded, so that it holds for the kernels and processes that tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import Counter
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return  # and torch need not be loaded to find out
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file at a time per process, and all notebooks in one, in their order: the later look at runs of the earlier."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope = super()._split_scope(nodeid)
            return "notebooks" if scope.endswith(".ipynb") else scope

    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts the cells that nbval ran; the last line adds them to the tests."""
    cells = [
        (report.nodeid.split("::")[0], outcome)
        for outcome, reports in terminalreporter.stats.items()
        for report in reports
        if outcome and ".ipynb::" in getattr(report, "nodeid", "")
    ]
    if cells:
        notebooks = len({notebook for notebook, _ in cells})
        counts = ", ".join(f"{n} {outcome}" for outcome, n in Counter(o for _, o in cells).items())
        terminalreporter.write_line(f"nbval: {len(cells)} cells of {notebooks} notebooks: {counts}")
