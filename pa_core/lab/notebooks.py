"""The parameters cells of the notebooks: written from `params`, checked, and copies of the notebooks to work in.

python -m pa_core.lab.notebooks check       # refuse a notebook whose parameters cell was edited
python -m pa_core.lab.notebooks write       # write the parameters cells, docs/parameters.md and docs/methods.md anew
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


def methods() -> str:
    """The table of docs/methods.md: of each method the first paragraph of its docstring, and its cost."""
    from pa_core.attribution.methods import CAMS, CONTROLS, METHODS

    rows, passes = ["| xai | what it is | passes per image |", "|---|---|---|"], {}
    passes |= dict.fromkeys(METHODS, "1 forward and backward")
    passes |= dict.fromkeys(CAMS, "1 forward, backward to the CAM layer") | dict.fromkeys(CONTROLS, "none")
    passes |= {"scorecam": "1 forward per channel of the CAM layer", "occlusion": "50 forward"}
    passes |= {"attention_rollout": "1 forward"}
    several = {"integrated_gradients": 32, "smoothgrad": 16, "gradient_shap": 16, "deeplift": 2, "guided_gradcam": 2}
    passes |= {name: f"{n} forward and backward" for name, n in several.items()}
    docs = {name: (method.__doc__ or "").partition("\n\n")[0] for name, method in METHODS.items()}
    docs["eigengradcam"] = "g_k A_k, of which the first principal component is taken instead of the sum"
    for name, text in docs.items():
        text = " ".join(text.split()).rstrip(".").replace("|", r"\|").replace("``", "`")
        rows.append(f"| {name} | {'control: ' * (name in CONTROLS)}{text} | {passes[name]} |")
    return "\n".join(rows)


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
    paths = sorted((home() / "notebooks").glob("*.ipynb"))
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
                for page, begin, made in (("parameters", "| name |", markdown()), ("methods", "| xai |", methods())):
                    path = home() / "docs" / f"{page}.md"
                    path.write_text(
                        path.read_text(encoding="utf-8").partition(begin)[0] + made + "\n", encoding="utf-8"
                    )
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
