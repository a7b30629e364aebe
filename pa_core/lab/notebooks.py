"""The parameters cells of the notebooks: written from `params`, checked, and copies of the notebooks to work in.

python -m pa_core.lab.notebooks check       # refuse a notebook whose parameters cell was edited
python -m pa_core.lab.notebooks write       # write the parameters cells and docs/parameters.md anew
python -m pa_core.lab.notebooks copy DIR    # copy the notebooks that DIR does not have yet
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pa_core.errors import ParameterError
from pa_core.files import home, replacing, shown
from pa_core.params import PARAMETERS, markdown

_EXPERIMENT = {p.name: (p.default, p.description + f" ({p.allowed})" * bool(p.allowed)) for p in PARAMETERS.values()}
_DATA = "dataset data_dir bad_images image_size train_fraction folds fold seed".split()
_FIGURES = {"figures_dir": ("figures/quick", "where figures are saved; this default lies in the repository")}
_ANALYSIS = {
    "run_name": (None, "the run with proxies to open up; None is the latest that has a plain run beside it"),
    "images": (None, "a folder of your own images, to compare the two runs on; None is the first validation images"),
    "studies": ("committed", "draw the studies' committed tables, or 'runs': your own as far as they are finished"),
}
NOTEBOOKS: dict[str, dict[str, tuple[Any, str]]] = {  # name -> parameter, in the cell's order -> (default, description)
    "01_data": {name: _EXPERIMENT[name] for name in _DATA} | _FIGURES,
    "02_training": _EXPERIMENT | _FIGURES,
    "03_proxy_loop": _EXPERIMENT | _FIGURES,
    "04_analysis": {"runs_dir": _EXPERIMENT["runs_dir"]} | _FIGURES | _ANALYSIS,
}


def parameters_cell(name: str = "03_proxy_loop") -> str:
    """The text of a notebook's parameters cell: a heading, then a line ``name = default  # description`` each."""
    lines = ["# Parameters of the experiment; docs/parameters.md explains them"]
    for parameter, (value, text) in NOTEBOOKS[name].items():
        lines.append(f"{parameter} = {json.dumps(value) if isinstance(value, str) else value}  # {text}")
    return "\n".join(lines)


def parameters_source(path: Path) -> str:
    """The cell of a notebook that papermill sets, empty where there is none; ParameterError where it is no notebook."""
    try:
        cells = json.loads(path.read_text())["cells"]
        return next(("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])), "")
    except (ValueError, KeyError, TypeError) as error:
        raise ParameterError("notebook", shown(path), f"must be a notebook ({error})") from error


def refuse_edited(path: Path) -> None:
    """Refuse a notebook of the repository whose parameters cell was edited, with what differs; copies are free."""
    if path.resolve().parent != (home() / "notebooks").resolve() or path.stem not in NOTEBOOKS:
        return
    found, wanted = (text.splitlines() for text in (parameters_source(path), parameters_cell(path.stem)))
    if found != wanted:
        other = ", ".join(line.split("  #")[0] for line in found if line not in wanted) or "fewer or in another order"
        how = "undo it (git checkout, or python -m pa_core.lab.notebooks write), or work in a copy (make lab)"
        raise ParameterError("notebook", shown(path), f"must have the default parameters, not {other}: {how}")


def main(words: list[str]) -> int:
    """Exit status: 0, or 2 where a notebook or the command is refused."""
    paths, page = sorted((home() / "notebooks").glob("*.ipynb")), home() / "docs" / "parameters.md"
    try:
        match words:
            case ["check"]:
                for path in paths:
                    refuse_edited(path)
            case ["write"]:
                for path in (path for path in paths if path.stem in NOTEBOOKS):
                    content = json.loads(path.read_text())
                    for cell in content["cells"]:
                        if "parameters" in cell["metadata"].get("tags", []):
                            cell["source"] = parameters_cell(path.stem).splitlines(keepends=True)
                    with replacing(path) as temporary:
                        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
                text, _, _ = page.read_text(encoding="utf-8").partition("| name |")
                page.write_text(text + markdown() + "\n", encoding="utf-8")
            case ["copy", folder]:
                Path(folder).mkdir(parents=True, exist_ok=True)
                for path in (path for path in paths if not (Path(folder) / path.name).exists()):
                    print(f"copied to {shown(Path(shutil.copy(path, folder)))}")
            case _:
                raise ParameterError("command", " ".join(words), "must be check, write, or copy and a folder")
    except ParameterError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
