"""The examples of docs/extend.md: each changes as few files as it says, and all of them work together."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = re.findall(
    r"^## (.+?)\n.*?^```diff\n(.*?)^```\n.*?^```python\n(.*?)^```", (ROOT / "docs/extend.md").read_text(), re.M | re.S
)
NAMES = {"pa_core/params.py"}
"""Where lists of names stand."""
BEFORE = """
from pa_core.experiment import run
from pa_core.params import Experiment

tiny = Experiment(schedule="1,p,1", train_fraction=0.05, folds=20, device="cpu")
"""


def changes(text: str) -> list[tuple[str, str, str]]:
    """(file, lines before, lines after) of each part of an example."""
    found, name = [], ""
    for part in re.split(r"^(?:\.\.\.|(--- .+))\n", text, flags=re.M):
        if part and part.startswith("--- "):
            name = part.removeprefix("--- ")
        elif part:
            before, after = (
                "\n".join(line[1:] for line in part.rstrip("\n").split("\n") if line[:1] != sign) for sign in "+-"
            )
            found.append((name, before, after))
    return found


def test_there_is_an_example_of_each():
    assert [title for title, *_ in SECTIONS] == [
        "A fill",
        "An explanation method",
        "An event",
        "A batch kind",
        "A metric",
        "A dataset",
    ]


@pytest.mark.parametrize(("title", "diff", "use"), SECTIONS, ids=[title for title, *_ in SECTIONS])
def test_it_touches_one_file_beside_a_list_of_names(title, diff, use):
    files = {name for name, *_ in changes(diff)}
    assert len(files - NAMES) == (2 if title == "An event" else 1)


def test_the_examples_work(tmp_path):
    package = tmp_path / "pa_core"
    shutil.copytree(ROOT / "pa_core", package, ignore=shutil.ignore_patterns("__pycache__"))
    for title, diff, _ in SECTIONS:
        for name, before, after in changes(diff):
            text = (tmp_path / name).read_text()
            assert text.count(before) == 1, f"{title}: {name} has {text.count(before)} times\n{before}"
            (tmp_path / name).write_text(text.replace(before, after))
    code = BEFORE + "".join(f"\nprint({title!r}, flush=True)\n{use}" for title, _, use in SECTIONS)
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "PA_RUNS": str(tmp_path / "runs"),
        "PA_DATA": str(tmp_path / "data"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
