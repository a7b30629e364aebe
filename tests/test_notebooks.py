"""The four notebooks: thin, explained, committed as they ran; and run by papermill, with every method."""

import ast
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import nbformat
import papermill
import pytest

from pa_core.params import Experiment, home

FOLDER = home() / "notebooks"
NAMES = ("01_data", "02_training", "03_proxy_loop", "04_analysis")
DEFAULTS = {field.name: getattr(Experiment(), field.name) for field in fields(Experiment)}

METHODS = ("gradcam", "gradcam++", "saliency", "random", "shuffled")
"""Of each kind one; test_families runs them all on models."""

# Read, not run


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def tree(cell: nbformat.NotebookNode) -> ast.Module:
    """The cell's syntax, without magics."""
    lines = cell.source.splitlines()
    return ast.parse("\n".join("" if line.startswith(("%", "!")) else line for line in lines))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_well_formed(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.language_info.name == "python"


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_no_logic(name):
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    forbidden = (*definitions, ast.For, ast.While, ast.Try, ast.With)
    for cell in code(name):
        found = [node for node in ast.walk(tree(cell)) if isinstance(node, forbidden)]
        assert not found, cell.source
        if "parameters" not in cell.metadata.get("tags", []):
            assert len(cell.source.splitlines()) <= 10, cell.source


@pytest.mark.parametrize("name", NAMES)
def test_a_text_stands_before_each_cell(name):
    cells = read(name).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    for before, cell in zip(cells, cells[1:], strict=False):
        if cell.cell_type == "code":
            words = re.findall(r"\w+", before.source)
            assert before.cell_type == "markdown" and len(words) >= 5, f"no sentence before:\n{cell.source}"


@pytest.mark.parametrize("name", NAMES)
def test_its_first_cell_of_code_holds_the_parameters(name):
    """papermill finds the cell by its tag, ``Experiment.from_notebook`` by its first words."""
    first, *others = code(name)
    assert first.metadata.tags == ["parameters"] and first.source.startswith("# Parameters")
    assert first.source.splitlines()[0].strip() != "# Parameters"  # that is how papermill's own cell begins
    assert all(isinstance(node, ast.Assign) for node in tree(first).body)
    assert not any("parameters" in cell.metadata.get("tags", []) for cell in others)
    assert not any(cell.source.lstrip().startswith("# Parameters") for cell in others)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_explained_and_has_its_default(name):
    shown = papermill.inspect_notebook(str(FOLDER / f"{name}.ipynb"))
    assert all(parameter["help"].strip() for parameter in shown.values())
    for parameter in shown.keys() & DEFAULTS.keys():
        assert ast.literal_eval(shown[parameter]["default"]) == DEFAULTS[parameter], parameter
    assert shown.keys() - DEFAULTS.keys() <= {"figures_dir", "run_name", "images", "studies"}
    if name in ("02_training", "03_proxy_loop"):
        assert shown.keys() == DEFAULTS.keys() | {"figures_dir"}


def test_papermill_shows_the_help():
    command = [sys.executable, "-m", "papermill", "--help-notebook", "notebooks/03_proxy_loop.ipynb"]
    text = subprocess.run(command, cwd=home(), capture_output=True, text=True, check=True).stdout
    shown = papermill.inspect_notebook(str(FOLDER / "03_proxy_loop.ipynb"))
    words = " ".join(text.split())
    assert all(f" {name}: " in words and shown[name]["help"] in words for name in DEFAULTS)


@pytest.mark.parametrize("name", ["01_data", "03_proxy_loop"])
def test_some_cells_are_compared_with_their_output(name):
    cells = [cell for cell in code(name) if "# NBVAL_CHECK_OUTPUT" in cell.source.splitlines()]
    assert cells and all(len(cell.source.splitlines()) > 1 for cell in cells)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_with_the_outputs_of_a_real_run(name):
    """To be read on a web page. ``make figures`` runs them, into runs/notebooks/."""
    cells = code(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    drawn = sum("image/png" in output.get("data", {}) for output in outputs)
    assert drawn == sum(cell.source.splitlines()[-1] == "fig" for cell in cells) > 0
    assert all(cell.outputs for cell in cells if "# NBVAL_CHECK_OUTPUT" in cell.source)
    assert "papermill" not in read(name).metadata
    assert not [cell for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("name", NAMES)
def test_it_names_no_folder_of_the_machine_it_ran_on(name):
    for cell in code(name):
        shown = [{k: v for k, v in o.get("data", o).items() if k != "image/png"} for o in cell.outputs]
        text = json.dumps([cell.source, *shown])
        assert not re.search(r"/(home|root|tmp|Users|work|var)/|[A-Z]:\\\\", text), text


# Run by papermill

TINY = ["-p", "train_fraction", "0.05", "-p", "folds", "20", "-p", "device", "cpu"]
LOOP = [*TINY, "-p", "schedule", "1,p,1"]


def execute(name: str, folder: Path, *options: str, here: bool = False, label: str = "") -> subprocess.CompletedProcess:
    """Run a notebook by papermill, with this interpreter's kernel, from the root or (``here``) notebooks/.

    Runs go into ``folder``/runs, figures into ``folder``/figures/LABEL.
    """
    label = label or name
    places = {
        "PA_RUNS": str(folder / "runs"),
        "PA_DATA": str(folder / "data"),
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    source = f"{name}.ipynb" if here else f"notebooks/{name}.ipynb"
    command = [
        sys.executable,
        "-m",
        "papermill",
        source,
        str(folder / f"{label}.ipynb"),
        "--kernel",
        "python3",
    ]
    return subprocess.run(
        [*command, "--no-progress-bar", *options, "-p", "figures_dir", str(folder / "figures" / label)],
        cwd=FOLDER if here else home(),
        # one thread each: they run two at a time
        env=os.environ | places | {"PYTHONPATH": str(home()), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """In one runs folder: 03 with every method and with no proxy step, 02, then 04; and 04 without runs."""
    folder = tmp_path_factory.mktemp("papermill")
    (folder / "nothing").mkdir()
    before = sorted(FOLDER.iterdir())
    from_notebooks = list(METHODS)[-1]
    with ThreadPoolExecutor(2) as pool:  # a kernel takes long to start
        jobs = {
            method: pool.submit(
                execute,
                "03_proxy_loop",
                folder,
                *LOOP,
                "-p",
                "xai",
                method,
                here=method == from_notebooks,
                label=method,
            )
            for method in METHODS
        }
        jobs["plain"] = pool.submit(execute, "03_proxy_loop", folder, *TINY, "-p", "schedule", "1", label="plain")
        jobs["02_training"] = pool.submit(execute, "02_training", folder, *LOOP)
        results = {label: job.result() for label, job in jobs.items()}
        analysis = pool.submit(execute, "04_analysis", folder)
        nothing = pool.submit(execute, "04_analysis", folder / "nothing")
        results |= {"04_analysis": analysis.result(), "nothing": nothing.result()}
    assert sorted(FOLDER.iterdir()) == before  # nothing is left beside them
    return folder, results


def made(folder: Path, **parameters: object) -> Path:
    """The one run with these parameters."""
    runs = [file.parent for file in (folder / "runs").glob("*/manifest.json")]
    found = [run for run in runs if parameters.items() <= manifest(run)["parameters"].items()]
    assert len(found) == 1
    return found[0]


def manifest(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def figures(folder: Path, label: str, *, without_data: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Figure -> digests of the runs it was drawn from; each has its four files, and data behind it."""
    here = folder / "figures" / label
    names = {file.stem for file in here.iterdir()}
    suffixes = ("png", "svg", "csv", "json")
    assert {file.name for file in here.iterdir()} == {f"{name}.{suffix}" for name in names for suffix in suffixes}
    digests = {}
    for name in names:
        assert (here / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (here / f"{name}.svg").read_text()
        assert (len((here / f"{name}.csv").read_text().splitlines()) > 1) == (name not in without_data), name
        provenance = json.loads((here / f"{name}.json").read_text())
        assert provenance["figure"] == name and provenance["command"] and provenance["code_version"]
        digests[name] = [run["digest"] for run in provenance["runs"]]
    return digests


def digest(run: Path) -> str:
    return manifest(run)["digest"]


@pytest.mark.parametrize("method", METHODS)
def test_the_proxy_loop_runs_with_every_method(executed, method):
    folder, results = executed
    assert results[method].returncode == 0, results[method].stderr
    run = made(folder, xai=method, schedule="1,p,1")
    assert manifest(run)["status"] == "finished"
    found = summary(run)
    assert found["epochs"] == 2 and found["proxy_images"] == 38  # a fifth of 190
    assert abs(found["masked_share"] - 0.25) < 1e-6 and found["unchanged_proxies"] == 0
    drawn = figures(folder, method)
    assert drawn.keys() == {"first_proxies", "curves_proxy_loop"}
    assert drawn["first_proxies"] == [digest(run)] and digest(run) in drawn["curves_proxy_loop"]


def test_the_proxy_loop_runs_without_a_proxy_step(executed):
    folder, results = executed
    assert results["plain"].returncode == 0, results["plain"].stderr
    run = made(folder, schedule="1")
    assert summary(run)["epochs"] == 1 and summary(run)["proxy_images"] == 0
    drawn = figures(folder, "plain", without_data=("first_proxies",))
    assert drawn["curves_proxy_loop"] == [digest(run)]


def test_the_training_makes_the_plain_run_of_equal_length(executed):
    folder, results = executed
    assert results["02_training"].returncode == 0, results["02_training"].stderr
    run = made(folder, schedule="2")
    assert summary(run)["epochs"] == 2 and not (run / "proxies").exists()
    drawn = figures(folder, "02_training")
    assert drawn and all(digests == [digest(run)] for digests in drawn.values())


def test_the_analysis_shows_every_run(executed):
    folder, results = executed
    assert results["04_analysis"].returncode == 0, results["04_analysis"].stderr
    drawn = figures(folder, "04_analysis")
    assert len(drawn) >= 6
    runs = {digest(file.parent) for file in (folder / "runs").glob("*/manifest.json")}
    assert len(runs) == len(METHODS) + 2
    assert set(drawn["accuracy_by_parameter"]) == runs
    assert set(drawn["with_and_without"]) == runs - {digest(made(folder, schedule="1"))}  # which has no pair
    studies = {name: drawn.pop(name) for name in list(drawn) if name.startswith("study_")}
    assert all(set(digests) <= runs and digests for digests in drawn.values())
    assert studies.keys() == {"study_a", "study_c", "study_c_decomposition", "study_e", "study_f"}
    for name, digests in studies.items():  # drawn from the repository's tables, whose own provenance has the runs
        content = json.loads((folder / "figures" / "04_analysis" / f"{name}.json").read_text())
        assert digests == [] and content["made_from"] == f"committed runs of study {name.split('_')[1]}"


@pytest.mark.parametrize("label", [*METHODS, "plain", "02_training", "04_analysis"])
def test_what_was_executed_shows_its_figures_and_no_warning(executed, label):
    notebook = nbformat.read(executed[0] / f"{label}.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert "".join(output.text for output in outputs if output.get("name") == "stderr") == ""


def test_without_a_finished_run_the_analysis_says_so(executed):
    folder, results = executed
    result = results["nothing"]
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    expected = f"RunError: no run under {folder / 'nothing' / 'runs'} has finished; notebooks 02 and 03 make some"
    assert last == expected, result.stderr
