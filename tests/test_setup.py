"""The files around the package: they agree with one another, and the package stays a chain."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11.0", "3.11.9", "3.12.0", "3.13.0")
PLATFORMS = ("linux", "darwin", "win32")
CHAIN = (
    "errors files schedule params data models attribution masking selection augment batch device metrics runs "
    "train proxy protocol experiment lab"
).split()
PACKAGES = {
    "data": "decode sources splits dataset".split(),
    "attribution": "base cams pixels transformers controls methods".split(),
    "lab": "statistics results figures explore notebooks workers sweep study".split(),
}
"""Links of the chain that are packages, and the chains inside."""
CODE = sorted((ROOT / "pa_core").rglob("*.py"))
README = (ROOT / "README.md").read_text()


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def declared() -> list[Requirement]:
    """What pyproject.toml asks for: to run, for its extras, and to build."""
    document = pyproject()
    extras = document["project"]["optional-dependencies"].values()
    texts = document["project"]["dependencies"] + [text for extra in extras for text in extra]
    return [Requirement(text) for text in texts + document["build-system"]["requires"]]


def pins() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def applies(pin: Requirement, python: str, platform: str) -> bool:
    environment = {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "sys_platform": platform,
        "os_name": "nt" if platform == "win32" else "posix",
    }
    return pin.marker is None or pin.marker.evaluate(environment)


def test_every_requirement_is_pinned_to_one_version():
    assert len(pins()) > 100
    for pin in pins():
        assert [clause.operator for clause in pin.specifier] == ["=="], str(pin)
        assert "*" not in str(pin.specifier) and pin.url is None, str(pin)


def test_requirements_name_no_address_and_no_option():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert "://" not in line and not re.search(r"(^|\s)/\w|[A-Z]:\\", line), line
        assert line.lstrip().startswith("#") or not line.startswith("-"), (
            line
        )  # options: where to look is the user's own business


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_each_dependency_has_one_pin_within_its_range(python, platform):
    here = [pin for pin in pins() if applies(pin, python, platform)]
    names = [canonicalize_name(pin.name) for pin in here]
    assert len(names) == len(set(names)), "a package pinned twice"
    versions = {name: str(next(iter(pin.specifier)).version) for name, pin in zip(names, here, strict=True)}
    for wanted in declared():
        version = versions.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted} is not in requirements.txt"
        assert wanted.specifier.contains(version), f"{wanted} against the pin {version}"


def test_python_range_is_the_one_of_the_makefile():
    supported = SpecifierSet(pyproject()["project"]["requires-python"])
    assert [minor for minor in range(8, 20) if f"3.{minor}.0" in supported] == [11, 12, 13]
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "Makefile").read_text()


def test_ci_lints_and_then_tests():
    """pytest's closing line is the last one printed."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-2:] == ["make lint", "exec make test"]


def test_make_check_runs_tests_that_exist():
    names = re.search(r"^CHECKS := \$\(patsubst %,tests/test_%\.py,(.*)\)$", (ROOT / "Makefile").read_text(), re.M)
    assert names and len(names[1].split()) >= 8
    assert [name for name in names[1].split() if not (ROOT / "tests" / f"test_{name}.py").is_file()] == []


def test_conda_environment_is_requirements_txt():
    document = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in document["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in document["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.txt", "-e ."]
    assert conda == ["python=3.12", "pip"]


def test_citation_cites_the_predecessor_and_names_this_version():
    import pa_core

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert Version(citation["version"]) == Version(pa_core.__version__)
    assert citation["license"] == pyproject()["project"]["license"] == "MIT"
    (thesis,) = citation["references"]
    assert (thesis["type"], thesis["title"], thesis["year"]) == ("thesis", "Proxy Attention", 2023)
    assert thesis["authors"] == [{"family-names": "Mukherjee", "given-names": "S."}]
    assert thesis["institution"]["name"] == "University of Groningen"


def imported(path: Path) -> set[str]:
    """Modules of pa_core that a file of pa_core imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["pa_core" if node.level else "", node.module]))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "pa_core" else [module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("pa_core.")}
    return found


def test_imported_sees_every_form(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import pa_core.data\nimport torch\nfrom pa_core import models as m, runs\n"
        "from pa_core.params import Experiment\nfrom . import masking\n"
        "def f():\n    from .metrics import ece\n"
    )
    assert imported(path) == {"data", "models", "runs", "params", "masking", "metrics"}


@pytest.mark.parametrize("path", sorted((ROOT / "pa_core").glob("*.py")), ids=lambda path: path.stem)
def test_a_module_imports_only_modules_above_it(path):
    if path.stem == "__init__":
        assert imported(path) == set()
        return
    assert path.stem in CHAIN, "a module that the chain does not know"
    above = set(CHAIN[: CHAIN.index(path.stem)])
    assert imported(path) <= above, f"{path.stem} imports {sorted(imported(path) - above)}, which stand below it"


@pytest.mark.parametrize("module", ["pa_core", "pa_core.files", "pa_core.params"])
def test_parameters_are_read_without_loading_torch_or_numpy(module):
    code = f"import sys, {module}; print(*{{'torch', 'numpy', 'timm', 'pandas'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"{module} loads {done.stdout}"


PACKAGE_FILES = [path for package in PACKAGES for path in sorted((ROOT / "pa_core" / package).glob("*.py"))]


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_package_is_one_link_and_a_chain_inside(path):
    """Outside it may import only what stands above it; inside, the files before it. __init__ and __main__ come last."""
    package = path.parent.name
    outside, inside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pa_core"):
            parts = node.module.split(".")
            if parts[1:2] == [package]:
                inside |= {parts[2]} if len(parts) > 2 else {alias.name for alias in node.names}
            else:
                outside |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    assert outside <= set(CHAIN[: CHAIN.index(package)])
    if not path.stem.startswith("__"):
        chain = PACKAGES[package]
        assert path.stem in chain and inside <= set(chain[: chain.index(path.stem)])


def test_every_python_file_is_in_a_package_that_is_installed():
    named = set(pyproject()["tool"]["setuptools"]["packages"])
    assert {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in CODE} == named


def test_every_other_file_of_the_package_is_installed_with_it():
    patterns = pyproject()["tool"]["setuptools"]["package-data"]["pa_core"]
    installed = {path for pattern in patterns for path in (ROOT / "pa_core").glob(pattern)}
    found = {path for path in (ROOT / "pa_core").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert found == installed


# Budgets: lines of the package, of all but lab/, and of a file.

MOST, MOST_OUTSIDE_LAB, MOST_IN_A_FILE = 5900, 4000, 450


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_package_does_not_grow():
    outside = [path for path in CODE if "lab" not in path.relative_to(ROOT / "pa_core").parts[:-1]]
    assert sum(map(lines, CODE)) <= MOST
    assert sum(map(lines, outside)) <= MOST_OUTSIDE_LAB
    assert {path.name: lines(path) for path in CODE if lines(path) > MOST_IN_A_FILE} == {}


def too_long(source: str, most: int = 60) -> dict[str, int]:
    """Functions of more lines than ``most``, from ``def`` to their last line."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    sizes = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    return {name: size for name, size in sizes.items() if size > most}


def test_too_long_counts_from_def_to_the_last_line():
    inside = "\n".join(f"        x = {i}" for i in range(59))
    assert too_long(f"class A:\n    def f(self):\n{inside}\n") == {}
    assert too_long(f"class A:\n    def f(self):\n{inside}\n        return x\n") == {"f": 61}


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT / "pa_core")))
def test_no_function_is_long(path):
    assert too_long(path.read_text()) == {}


# The README and docs/


def test_the_readme_is_short_and_soon_has_a_command():
    assert len(README.split()) <= 1500
    first = re.search(r"^    (.*)$", README, re.M)
    assert first and first[1].startswith("make figures") and len(README[: first.start()].split()) <= 300


@pytest.mark.parametrize(
    "path", ["README.md", "CHANGELOG.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_to_files_that_exist(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / path).read_text()):
        assert target.startswith("https://") or (ROOT / path).parent.joinpath(target).exists(), target


def test_the_readme_names_every_page_of_docs_and_every_notebook():
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]:
        assert f"]({page.relative_to(ROOT).as_posix()})" in README, page.name


def test_the_readme_and_make_run_every_notebook():
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    for path, pattern in (("Makefile", r"NOTEBOOKS := (.*)"), ("README.md", r"for n in (.*?); do")):
        assert re.search(pattern, (ROOT / path).read_text())[1].split() == names


def test_the_changelog_has_the_schema():
    from pa_core.params import SCHEMA

    headings = re.findall(r"^## Schema (\d+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert [int(number) for number in headings] == list(range(SCHEMA, 0, -1))
