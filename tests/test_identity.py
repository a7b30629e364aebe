"""The same number means the same thing: a run that other code made is never handed out in the place of this one's.

The code is changed in a copy of the package, and each question is answered by a process that imports that copy.
"""

from __future__ import annotations

import ast
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROCESSES, QUIET, same_weights, small

import pa_core
from pa_core import experiment, runs, train

PACKAGE = Path(pa_core.__file__).parent
VERSION = runs.code_version()  # kept from here on, whatever package `version_of` looks at


@pytest.fixture
def copy(tmp_path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "pa_core", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "pa_core"


def asked(copy: Path, *, train: bool = False) -> dict[str, Any]:
    """What a fresh process with this copy says of one experiment."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        return pool.submit(answer, str(copy.parent), train).result(timeout=300)


def answer(folder: str, train: bool) -> dict[str, Any]:
    for name in [name for name in sys.modules if name.split(".")[0] == "pa_core"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True  # a second change within a second would not be seen
    from pa_core import experiment as copied
    from pa_core import runs
    from pa_core.params import Experiment

    assert copied.__file__.startswith(folder)
    tiny = {"train_fraction": 0.02, "folds": 50, "schedule": "1,p,1", "device": "cpu", "batch_size": 16}
    e, said = Experiment(**tiny, runs_dir=f"{folder}/runs"), []
    made = copied.run(e, log=said.append) if train else None
    found = copied.find(e)
    return {
        "version": runs.code_version(),
        "located": str(copied.locate(e)),
        "found": found and str(found.path),
        "made": made and str(made.path),
        "trained": any(text.startswith("epoch") for text in said),
        "stale": {path.name: runs.Run(path).stale for path in Path(folder, "runs").glob("*")},
    }


def change(copy: Path, name: str, old: str, new: str) -> None:
    text = (copy / name).read_text()
    assert text.count(old) >= 1, f"{name} holds no {old!r}"
    (copy / name).write_text(text.replace(old, new, 1))


CHANGES = {
    "a mask rule": ("masking.py", "mask = maps > limit", "mask = maps >= limit"),
    "a fill": ("masking.py", "keepdim=True) / 2", "keepdim=True) / 3"),
    "a control": ("attribution/controls.py", "(size / 4) ** 2", "(size / 5) ** 2"),
    "the order of draws": ("train.py", '"order", epoch', '"order", epoch + 1'),
    "a batch kind": ("augment.py", "DEGREES = 15.0", "DEGREES = 16.0"),
    "a split": ("data/splits.py", None, "SALT = 1\n"),
}


def test_a_run_of_other_code_is_not_handed_out_and_is_made_anew_beside_it(copy):
    first = asked(copy, train=True)
    assert first["trained"] and first["made"] == first["found"] == first["located"]
    old, source = Path(first["made"]), (copy / "masking.py").read_text()
    before = {f: f.read_bytes() for f in old.rglob("*") if f.is_file()}
    change(copy, *CHANGES["a mask rule"])
    after = asked(copy)
    assert after["found"] is None and after["located"] != first["located"] and after["stale"] == {old.name: True}
    second = asked(copy, train=True)
    new = Path(second["made"])
    assert second["trained"] and new != old and second["found"] == second["located"] == str(new)
    assert second["stale"] == {old.name: True, new.name: False}
    assert new.name.rsplit("-", 1)[0] == old.name.rsplit("-", 1)[0]  # one digest, two code versions
    assert before == {f: f.read_bytes() for f in old.rglob("*") if f.is_file()}
    (copy / "masking.py").write_text(source)
    back = asked(copy, train=True)
    assert back["made"] == str(old) and not back["trained"] and back["stale"] == {old.name: False, new.name: True}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_result_depends_on_is_in_the_code_version(copy, monkeypatch, name):
    file, old, new = CHANGES[name]
    if old is None:
        (copy / file).write_text((copy / file).read_text() + new)
    else:
        change(copy, file, old, new)
    assert version_of(copy, monkeypatch) != VERSION


def version_of(copy: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The code version of another package than this one."""
    monkeypatch.setattr(runs, "__file__", str(copy / "runs.py"))
    return runs.code_version.__wrapped__()


def test_comments_docstrings_lab_and_formatting_make_nothing_stale(copy, monkeypatch):
    assert version_of(copy, monkeypatch) == VERSION
    for file in copy.rglob("*.py"):  # all comments, blank lines and formatting go
        file.write_text(ast.unparse(ast.parse(file.read_text())) + "\n# another comment\n")
    change(copy, "masking.py", '"""Pure tensor rules', '"""Other words for tensor rules')
    change(copy, "masking.py", '"""Which pixels of maps', '"""Other words.')
    (copy / "lab").mkdir(exist_ok=True)
    (copy / "lab" / "more.py").write_text("x = 1\n")
    assert version_of(copy, monkeypatch) == VERSION
    (copy / "more.py").write_text("x = 1\n")  # a module outside lab/ counts
    assert version_of(copy, monkeypatch) != VERSION


def test_after_such_a_change_the_run_is_found(copy):
    made = asked(copy, train=True)
    change(copy, "masking.py", '"""Pure tensor rules', '"""Rules')
    (copy / "lab").mkdir(exist_ok=True)
    (copy / "lab" / "more.py").write_text("x = 1\n")
    again = asked(copy, train=True)
    assert again["made"] == made["made"] and not again["trained"] and again["version"] == made["version"]


def test_find_and_locate_decode_no_image_and_build_no_network(tmp_path, monkeypatch):
    from pa_core import data, models

    e = small(tmp_path, schedule="1", train_fraction=0.02)
    made = experiment.run(e, **QUIET)
    for module, name in ((models, "create"), (data, "load"), (data.Part, "read")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("not needed"))
    assert experiment.locate(e) == experiment.find(e).path == made.path
    assert experiment.find(e.replace(seed=1)) is None
    assert experiment.find(e.replace(device="cpu", xai="saliency")).path == made.path  # neither has an effect


def test_one_method_under_two_names_is_one_run(tmp_path):
    e = small(tmp_path)
    assert experiment.locate(e.replace(xai="gradcampp")) == experiment.locate(e.replace(xai="gradcam++"))
    assert experiment.locate(e.replace(xai="gradcam")) != experiment.locate(e)


# What decides the last bits


def flags() -> dict[str, bool]:
    return {
        "tf32": torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["tf32", "deterministic"])
def test_numerics_are_set_for_the_run_and_restored(tmp_path, monkeypatch, name, fails):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before, seen, real = flags(), [], train.train_one_epoch

    def look(*args, **keywords):
        seen.append(flags())
        if fails:
            raise KeyError
        return real(*args, **keywords)

    monkeypatch.setattr(train, "train_one_epoch", look)
    e = small(tmp_path, schedule="1", train_fraction=0.02, **{name: True})
    if fails:
        with pytest.raises(KeyError):
            experiment.run(e, **QUIET)
    else:
        experiment.run(e, **QUIET)
    assert seen == [{"tf32": False, "deterministic": False, "benchmark": name != "deterministic"} | {name: True}]
    assert flags() == before


def test_a_deterministic_run_is_the_same_again(tmp_path):
    every = {"augment": "flip,rotate,crop,erase,cutmix,mixup", "deterministic": True, "fill": "patch"}
    one, other = (experiment.run(small(tmp_path / k, schedule="1,p,1,x0.5,1", **every), **QUIET) for k in "ab")
    assert same_weights(one, other) and one.manifest["parameters"]["deterministic"]


def test_tf32_and_deterministic_are_part_of_the_identity(tmp_path):
    e = small(tmp_path)
    located = {experiment.locate(e), *(experiment.locate(e.replace(**{n: True})) for n in ("tf32", "deterministic"))}
    assert len(located) == 3
