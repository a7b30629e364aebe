"""The four notebooks: thin, explained, committed as they ran; executed from anywhere, and every cell twice in a row.

``make test`` runs each on a kernel of its own, too (nbval).
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import papermill.cli
import pytest
from click.testing import CliRunner

from pa_core import params
from pa_core.errors import ParameterError
from pa_core.files import home
from pa_core.lab import notebooks

FOLDER = home() / "notebooks"
NAMES = tuple(notebooks.NOTEBOOKS)
FIGURES = {
    "01_data": {"class_balance", "samples", "augmentation"},
    "02_training": {"curves_plain", "worst_images"},
    "03_proxy_loop": {"first_proxies", "curves_proxy_loop"},
    "04_analysis": {
        *("with_and_without", "accuracy_by_parameter", "compared", "gallery_fills", "gallery_threshold_weight"),
        *("confusion", "class_changes", "study_a", "study_c", "study_c_decomposition", "study_e", "study_f"),
    },
}

# Read, not run


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code(notebook) for output in cell.outputs]


def tree(cell: nbformat.NotebookNode) -> ast.Module:
    """The cell's syntax, without magics."""
    return ast.parse("\n".join("" if line.startswith("%") else line for line in cell.source.splitlines()))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_well_formed(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.language_info.name == "python"
    assert "papermill" not in notebook.metadata


@pytest.mark.parametrize("name", NAMES)
def test_its_cells_are_short_and_hold_no_logic(name):
    forbidden = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.Try, ast.With)
    parameters, *cells = code(read(name))
    for cell in cells:
        nodes = list(ast.walk(tree(cell)))
        assert len(cell.source.splitlines()) <= 10 and not [n for n in nodes if isinstance(n, forbidden)], cell.source
        assert isinstance(tree(cell).body[-1], ast.Expr) or cell.source == "run = pa.run(prepared)", cell.source
        assigned = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        imported = {a.asname or a.name for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        assert not (assigned | imported) & notebooks.NOTEBOOKS[name].keys(), cell.source


@pytest.mark.parametrize("name", NAMES)
def test_a_text_stands_before_each_cell(name):
    cells = read(name).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    for before, cell in zip(cells, cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown" and len(re.findall(r"\w+", before.source)) >= 5, cell.source


@pytest.mark.parametrize("name", NAMES)
def test_its_parameters_cell_is_the_generated_one_and_papermill_shows_it(name):
    first, *others = code(read(name))
    assert first.metadata.tags == ["parameters"] and first.source == notebooks.parameters_cell(name)
    assert not any(cell.metadata.get("tags") or cell.source.startswith("# Parameters") for cell in others)
    path = str(FOLDER / f"{name}.ipynb")
    shown = " ".join(CliRunner().invoke(papermill.cli.papermill, ["--help-notebook", path]).output.split())
    for parameter, (default, text) in notebooks.NOTEBOOKS[name].items():
        written = json.dumps(default) if isinstance(default, str) else default
        assert f" {parameter}: Unknown type (default {written}) {' '.join(text.split())}" in shown


def test_docs_parameters_md_is_as_the_model_gives_it():
    title, sentence, table = (home() / "docs" / "parameters.md").read_text(encoding="utf-8").split("\n\n")
    assert title == "# Parameters" and "\n" not in sentence and table == params.markdown() + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_an_edited_one_of_the_repository_is_refused_and_a_copy_is_not(name, tmp_path, monkeypatch):
    path = tmp_path / "notebooks" / f"{name}.ipynb"
    shutil.copytree(FOLDER, path.parent)
    text = path.read_text()
    assert 'figures_dir = \\"figures/quick\\"' in text
    path.write_text(text.replace('figures_dir = \\"figures/quick\\"', 'figures_dir = \\"mine\\"'))
    notebooks.refuse_edited(path)
    monkeypatch.setattr(notebooks, "home", lambda: tmp_path)
    with pytest.raises(ParameterError, match='must have the default parameters, not figures_dir = "mine"'):
        notebooks.refuse_edited(path)


@pytest.mark.parametrize("name", ["01_data", "03_proxy_loop"])
def test_some_cells_are_compared_with_their_output(name):
    cells = [cell for cell in code(read(name)) if "# NBVAL_CHECK_OUTPUT" in cell.source.splitlines()]
    assert cells and all(len(cell.source.splitlines()) > 1 and cell.outputs for cell in cells)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_with_the_outputs_of_a_real_run(name):
    """To be read on a web page; ``make notebooks`` writes them."""
    notebook = read(name)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    check_outputs(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_it_names_no_folder_of_the_machine_it_ran_on(name):
    for cell in code(read(name)):
        shown = [{k: v for k, v in o.get("data", o).items() if k != "image/png"} for o in cell.outputs]
        text = json.dumps([cell.source, *shown])
        assert not re.search(r"/(home|root|tmp|Users|work|var)/|[A-Z]:\\\\", text), text


def test_all_agree_on_the_accuracies():
    """The committed ones come from one execution: what 02 and 03 measure is what 04 compares."""
    text = {name: json.dumps([o.get("data", {}).get("text/plain", "") for o in outputs(read(name))]) for name in NAMES}
    measured = re.findall(r"test_accuracy\s+([\d.]+)\s+([\d.]+)", text["03_proxy_loop"])
    assert measured and measured[0][0] in text["02_training"]
    assert all(accuracy.rstrip("0") in text["04_analysis"] for accuracy in measured[0])


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    """A figure where a cell ends in one, and neither an error nor a warning."""
    shown = outputs(notebook)
    assert not [o for o in shown if o.output_type == "error" or o.get("name") == "stderr"]
    drawn = sum("image/png" in output.get("data", {}) for output in shown)
    assert drawn == sum(cell.source.splitlines()[-1] == "fig" for cell in code(notebook)) > 0


# Executed

TINY = {"train_fraction": 0.05, "folds": 20, "device": "cpu"}
LOOPS = {
    "no proxy step": {"schedule": "2"},
    "every event": {"schedule": "1,p,1,c,1,l0.1,1,x0.5,1", "xai": "saliency", "overlay": "append"},
    "withheld": {"schedule": "1,p,1", "overlay": "withhold"},
    "no fill": {"schedule": "1,p,1", "fill": "none"},
    "permuted": {"schedule": "1,p,1", "permute_maps": True},
}
"""03 with each; 04 then opens the last, beside the plain run that 02 makes."""


@dataclass(frozen=True)
class Executed:
    """What papermill made in one folder: runs/, figures/LABEL/ and LABEL.ipynb."""

    folder: Path
    results: dict[str, subprocess.CompletedProcess[str]]

    def notebook(self, label: str) -> nbformat.NotebookNode:
        assert self.results[label].returncode == 0, self.results[label].stderr
        return nbformat.read(self.folder / f"{label}.ipynb", as_version=4)

    def run(self, **parameters: Any) -> tuple[Path, dict[str, Any]]:
        """The one run with these parameters, and its summary."""
        paths = [file.parent for file in (self.folder / "runs").glob("*/summary.json") if "-stale" not in str(file)]
        manifests = {path: json.loads((path / "manifest.json").read_text()) for path in paths}
        (found,) = [p for p, m in manifests.items() if parameters.items() <= m["parameters"].items()]
        assert manifests[found]["status"] == "finished"
        return found, json.loads((found / "summary.json").read_text())

    def figures(self, label: str) -> dict[str, set[str]]:
        """Figure -> the runs it was drawn from; each has its four files."""
        here = self.folder / "figures" / label
        names, suffixes = {file.stem for file in here.iterdir()}, ("png", "svg", "csv", "json")
        assert {file.name for file in here.iterdir()} == {f"{name}.{suffix}" for name in names for suffix in suffixes}
        provenance = {name: json.loads((here / f"{name}.json").read_text()) for name in names}
        assert all(content["command"] and content["code_versions"] for content in provenance.values())
        return {name: {run["run"] for run in content["runs"]} for name, content in provenance.items()}


def execute(source: Path, folder: Path, label: str, **parameters: Any) -> subprocess.CompletedProcess[str]:
    """By papermill's command, with this interpreter's kernel, from a folder that has nothing to do with either."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    places = {"PA_RUNS": str(folder / "runs"), "PA_DATA": str(folder / "data"), "PYTHONPATH": str(home())}
    command = [sys.executable, "-m", "papermill", str(source), str(folder / f"{label}.ipynb"), "--kernel", "python3"]
    done = subprocess.run(
        [*command, "--no-progress-bar", *options],
        cwd=elsewhere,
        env=os.environ | places | {"JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert not list(elsewhere.iterdir())
    return done


def cells(name: str, *, times: int, **values: Any) -> list[nbformat.NotebookNode]:
    """The notebook's code with these parameters on an emptied namespace, every cell so many times in a row."""
    first, *others = (cell.source for cell in code(read(name)))
    given = "\n".join(["# Parameters", *(f"{key} = {value!r}" for key, value in values.items())])  # as papermill does
    sources = [source for source in (first, given, *others) for _ in range(times)]
    return [nbformat.v4.new_code_cell(source) for source in ["%reset -f", *sources]]


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Executed:
    """03 with a pruning event; all four on one kernel, every cell twice; 04 without a run."""
    folder, before = tmp_path_factory.mktemp("executed"), sorted(FOLDER.iterdir())
    drawn = folder / "figures"
    pruned = {"xai": "gradcam", "schedule": "2,p,2,x0.5,2", "figures_dir": drawn / "pruned"}
    results = {"pruned": execute(FOLDER / "03_proxy_loop.ipynb", folder, "pruned", **pruned, **TINY)}
    for path in list((folder / "runs").iterdir()):  # beside it, one that other code made
        stale = Path(shutil.copytree(path, f"{path}-stale"))
        manifest = json.loads((stale / "manifest.json").read_text())
        (stale / "manifest.json").write_text(json.dumps(manifest | {"code_version": "other"}))
    data = {name: TINY[name] for name in ("train_fraction", "folds")}
    loop = TINY | {"schedule": "1,p,1"}
    made = cells("01_data", times=2, **data, figures_dir=str(drawn / "01_data"))
    made += cells("02_training", times=2, **loop, figures_dir=str(drawn / "02_training"))
    for label, values in LOOPS.items():
        times = 2 if label == "permuted" else 1
        made += cells("03_proxy_loop", times=times, **TINY, **values, figures_dir=str(drawn / label))
    made += cells("04_analysis", times=2, figures_dir=str(drawn / "04_analysis"))
    nbformat.write(nbformat.v4.new_notebook(cells=made), folder / "twice_source.ipynb")
    results["twice"] = execute(folder / "twice_source.ipynb", folder, "twice")
    (folder / "nothing").mkdir()
    results["nothing"] = execute(FOLDER / "04_analysis.ipynb", folder / "nothing", "nothing")
    assert sorted(FOLDER.iterdir()) == before  # nothing is left beside them
    return Executed(folder=folder, results=results)


def test_the_proxy_loop_runs_with_a_pruning_event(executed):
    check_outputs(executed.notebook("pruned"))
    run, summary = executed.run(xai="gradcam", schedule="2,p,2,x0.5,2")
    assert summary["sparsity"] == pytest.approx(0.5, abs=1e-3) and summary["epochs"] == 6
    assert summary["proxy_images"] == 38 and summary["masked_share"] == pytest.approx(0.25)  # a fifth of 190
    assert executed.figures("pruned") == dict.fromkeys(FIGURES["03_proxy_loop"], {run.name})


def test_every_cell_can_be_run_twice_and_shows_the_same(executed):
    notebook = executed.notebook("twice")
    check_outputs(notebook)
    repeated = [(a, b) for a, b in pairwise(notebook.cells) if a.source == b.source]
    assert len(repeated) == sum(len(code(read(name))) + 1 for name in NAMES)
    for first, second in repeated:
        if first.source != "run = pa.run(prepared)":  # which is found finished the second time
            assert [shown(o) for o in first.outputs] == [shown(o) for o in second.outputs], first.source


def shown(output: nbformat.NotebookNode) -> Any:
    return output.get("data", output.get("text"))


@pytest.mark.parametrize("label", LOOPS)
def test_the_proxy_loop_runs_with(executed, label):
    executed.notebook("twice")
    run, summary = executed.run(**LOOPS[label])
    steps = run.joinpath("proxies").is_dir()
    assert steps == ("p" in LOOPS[label]["schedule"]) and summary["proxy_images"] == 38 * steps
    masked = label in ("every event", "permuted")
    assert summary["masked_share"] == pytest.approx(0.25 * masked)
    drawn = executed.figures(label)
    assert drawn.keys() == FIGURES["03_proxy_loop"] and drawn["first_proxies"] == {run.name}
    plain = {executed.run(schedule="2")[0].name} if summary["epochs"] == 2 else set()
    assert drawn["curves_proxy_loop"] == {run.name} | plain


def test_the_others_draw_their_figures_from_the_runs_they_show(executed):
    executed.notebook("twice")
    plain, last = executed.run(schedule="2")[0].name, executed.run(**LOOPS["permuted"])[0].name
    runs = {path.name for path in (executed.folder / "runs").iterdir() if not path.name.endswith("-stale")}
    found = {name: executed.figures(name) for name in ("01_data", "02_training", "04_analysis")}
    assert all(found[name].keys() == FIGURES[name] for name in found)
    assert found["02_training"] == dict.fromkeys(FIGURES["02_training"], {plain})
    drawn = found["04_analysis"]
    assert drawn["accuracy_by_parameter"] == runs and drawn["gallery_fills"] == {last}
    paired = runs - {executed.run(**LOOPS["every event"])[0].name, executed.run(schedule="2,p,2,x0.5,2")[0].name}
    assert drawn["with_and_without"] == paired  # the others have no plain run of their length
    assert drawn["compared"] == drawn["class_changes"] == {plain, last}
    assert not any(drawn[name] for name in drawn if name.startswith("study_"))  # of the repository's tables


def test_the_analysis_says_how_many_runs_of_other_code_it_leaves_out(executed):
    printed = "".join(output.get("text", "") for output in outputs(executed.notebook("twice")))
    assert "stale and left out: 1 of 7 runs" in printed


def test_without_a_finished_run_the_analysis_says_so(executed):
    result, runs = executed.results["nothing"], executed.folder / "nothing" / "runs"
    last = result.stderr.strip().splitlines()[-1]
    wanted = f"RunError: no run under {runs} was finished by this code; notebooks 02 and 03 make some"
    assert result.returncode != 0 and last == wanted, result.stderr
