"""Files: written whole or not at all, one process at a time, and names and values read back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from pa_core import files
from pa_core.errors import ParameterError, RunError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text("half of it")
        raise ZeroDivisionError
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})  # no JSON
    assert files.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["summary.json"]
    with open(path) as reader:  # one that had opened it reads the old one on
        files.write_json(path, {"a": 2})
        assert '"a": 1' in reader.read() and files.read_json(path) == {"a": 2}


def test_what_cannot_be_written_is_named_and_the_old_one_stays(tmp_path):
    path = tmp_path / "summary.json"
    files.write_json(path, {"a": 1})
    refused = pytest.raises(RunError, match=r"summary.json cannot be written \(No space left on device\)")
    with refused, files.replacing(path):
        raise OSError(28, "No space left on device")
    with pytest.raises(RuntimeError, match="something else"), files.replacing(path):
        raise RuntimeError("something else")
    assert files.read_json(path) == {"a": 1}


def test_reading_json(tmp_path):
    assert files.read_json(tmp_path / "none.json") == {}
    for text in ('{"a": 1', "[1]", "\0"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(RunError, match="bad.json is damaged"):
            files.read_json(tmp_path / "bad.json")


def test_yaml(tmp_path):
    path = tmp_path / "x.yaml"
    for text, content in {"": {}, "# nothing\n": {}, "lr: 1e-3\nseed: 3": {"lr": "1e-3", "seed": 3}}.items():
        path.write_text(text)
        assert files.read_yaml(path) == content
    for text, words in {
        "a: 1\na: 2": "'a' is given twice",
        "- a": "names and values",
        "false": "names and values",
        "'": "can be read",
    }.items():
        path.write_text(text)
        with pytest.raises(ParameterError, match=words) as caught:
            files.read_yaml(path)
        assert caught.value.name == "file" and "\n" not in str(caught.value)
    with pytest.raises(ParameterError, match="No such file"):
        files.read_yaml(tmp_path / "none.yaml")


HOLDER = """
import sys, time
from pathlib import Path
from pa_core import files
with files.lock(Path(sys.argv[1]), "waiting"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_waits_for_its_holder_says_so_once_and_is_lost_with_it(tmp_path):
    said, path = [], tmp_path / "lock"
    with files.lock(path, "someone waits", said.append):
        pass
    command = [sys.executable, "-c", HOLDER, str(path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=files.home())
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n" and said == []
        killing = threading.Timer(0.3, os.kill, (holder.pid, signal.SIGKILL))
        killing.start()
        with files.lock(path, "someone waits", said.append):
            assert said == ["someone waits"] and holder.wait(10) == -signal.SIGKILL
    finally:
        holder.kill()


def test_places(monkeypatch, tmp_path):
    monkeypatch.delenv("PA_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert files.runs_home() == files.home() / "runs"  # whatever the working directory
    assert files.runs_home("mine") == tmp_path / "mine"
    monkeypatch.setenv("PA_RUNS", "elsewhere")
    monkeypatch.setenv("PA_DATA", str(tmp_path / "images"))
    assert files.runs_home() == files.home() / "elsewhere" and files.data_home() == tmp_path / "images"
    assert files.shown(files.home() / "runs" / "x") == "runs/x" and files.shown(tmp_path) == str(tmp_path)
