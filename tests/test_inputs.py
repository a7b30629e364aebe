"""Bad input is refused before any training, in one sentence: parameter, value, what is allowed.

Odd but good forms, as papermill and YAML hand them over, are accepted.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from pa_core.experiment import run
from pa_core.params import Experiment, ParameterError, home

TINY = {"train_fraction": 0.02, "folds": 40, "schedule": "1,p,1", "device": "cpu"}


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """No test reads or writes the user's own data and runs."""
    monkeypatch.setenv("PA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PA_RUNS", str(tmp_path / "runs"))


def refused(tmp_path, **values):
    """The error of a run with these values; fails if anything was said, or written where runs go."""
    said = []
    with pytest.raises(ParameterError) as caught:
        run(Experiment.from_mapping(TINY | values), log=said.append)
    assert said == [] and not (tmp_path / "runs").exists()
    return caught.value


def is_one_sentence(text):
    return "\n" not in text and not re.search(r"\.\s", text) and len(text) < 500


BAD = [
    # what is given, the refused name if it is not the only one, words that say what is allowed
    (dict(dataset="fashion_mni"), None, ["did you mean 'fashion_mini'", "cifar10", "folder"]),
    (dict(model="resnet81"), None, ["timm.list_models()", "did you mean 'resnet"]),
    (dict(model="resnet18.a9_in1k"), None, ["tags of resnet18", "a1_in1k"]),
    (dict(xai="gradcamm"), None, ["gradcam, gradcam++", "shuffled", "did you mean 'gradcam'"]),
    (dict(fill="men"), None, ["zero, one, mean", "did you mean 'mean'"]),
    (dict(max_share=0), None, ["above 0 and up to 1"]),
    (dict(feather=-1), None, ["whole number from 0 to 4096"]),
    (dict(feather=1.5), None, ["whole number"]),
    (dict(select="los"), None, ["misclassified, loss", "did you mean 'loss'"]),
    (dict(treshold=0.9), None, ["no such parameter", "did you mean 'threshold'"]),
    (dict(schedule="5,,p"), None, ["token 2 of 5,»«,p", "numbers of epochs and p"]),
    (dict(schedule="p,p"), None, ["token 2 of p,»p«", "numbers of epochs and p"]),
    (dict(schedule="-1"), None, ["token 1 of »-1«", "1 to 99999"]),
    (dict(schedule=-1), None, ["token 1 of »-1«", "1 to 99999"]),
    (dict(schedule=""), None, ["empty", "numbers of epochs and p"]),
    (dict(schedule=0), None, ["token 1 of »0«"]),
    (dict(threshold=1.5), None, ["from 0 to 1"]),
    (dict(fraction=0), None, ["above 0 and up to 1"]),
    (dict(image_size=4), None, ["16"]),
    (dict(batch_size=0), None, ["at least 1", "auto"]),
    (dict(dataset="folder"), "data_dir", ["folder"]),
    (dict(dataset="folder", data_dir="/no/such/place"), "data_dir", ["folder"]),
    (dict(dataset="cifar10", data_dir="/no/such/place"), "data_dir", ["folder"]),
    (dict(pretrained="no/such/file.safetensors"), None, ["no such file", "true, false or a weights file"]),
    (dict(cam_layer="layer9"), None, ["module's dotted name", "did you mean 'layer"]),
    (dict(xai="saliency", smooth="eigen"), "smooth", ["none, gaussian or flip"]),
    (dict(precision="fp16"), None, ["auto, fp32 or bf16"]),
    (dict(device="cuda:99"), None, ["auto, cpu"]),
    (dict(protocol="thesys"), None, ["clean, thesis, thesis_text", "did you mean 'thesis'"]),
    (dict(protocol="thesis", train_fraction=0.0001), "train_fraction", ["train_fraction", "two to halve"]),
    (dict(augment="mixop"), None, ["erase, cutmix, mixup", "did you mean 'mixup'"]),
]


@pytest.mark.parametrize(("values", "name", "allowed"), BAD, ids=[str(values) for values, _, _ in BAD])
def test_refused_in_one_sentence_and_nothing_is_written(tmp_path, values, name, allowed):
    error = refused(tmp_path, **values)
    name = name or next(iter(values))
    text = str(error)
    assert error.name == name
    assert text.startswith(f"{name} = {values.get(name)!r} is refused: ")
    assert all(words in text for words in allowed), text
    assert is_one_sentence(text), text


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_where_there_is_none_is_refused(tmp_path):
    text = str(refused(tmp_path, device="cuda"))
    assert text == "device = 'cuda' is refused: PyTorch sees no CUDA device here; allowed is auto, cpu"


@pytest.mark.parametrize("official", [False, True])
def test_a_folder_with_one_class_is_refused(tmp_path, official):
    for part in ("train", "test") if official else ("",):
        folder = tmp_path / "images" / part / "beagle"
        folder.mkdir(parents=True)
        for k in range(12):
            Image.new("RGB", (32, 32), (20 * k, 9, 9)).save(folder / f"{part}{k}.png")
    error = refused(tmp_path, dataset="folder", data_dir=str(tmp_path / "images"))
    assert error.name == "data_dir" and repr(str(tmp_path / "images")) in str(error)
    assert "beagle" in str(error) and "two" in str(error)
    assert is_one_sentence(str(error).replace(str(tmp_path), ""))


def test_where_no_folder_can_be_made_for_runs(tmp_path):
    (tmp_path / "file").write_text("")
    error = refused(tmp_path, runs_dir=str(tmp_path / "file" / "runs"))
    assert error.name == "runs_dir" and "can be written" in str(error)


def test_weights_that_cannot_be_fetched_are_refused(tmp_path, monkeypatch):
    real = timm.create_model

    def offline(*arguments, pretrained=False, **keywords):
        if pretrained:
            raise OSError("We couldn't connect to the server. Check your connection.\nMore lines.")
        return real(*arguments, **keywords)

    monkeypatch.setattr(timm, "create_model", offline)
    error = refused(tmp_path, pretrained="true")
    assert error.name == "pretrained" and str(error).startswith("pretrained = True is refused: ")
    assert "test_resnet" in str(error) and "-p pretrained FILE.safetensors" in str(error)
    assert is_one_sentence(str(error)), str(error)


# Through papermill


def papermill(tmp_path, *arguments):
    """Run notebook 03 with runs and data under ``tmp_path``, by this interpreter's kernel."""
    tmp_path.mkdir(parents=True, exist_ok=True)
    places = {"PA_RUNS": str(tmp_path / "runs"), "PA_DATA": str(tmp_path / "data")}
    environment = os.environ | places | {"PYTHONPATH": str(home()), "JUPYTER_PREFER_ENV_PATH": "1"}
    command = [
        sys.executable,
        "-m",
        "papermill",
        "notebooks/03_proxy_loop.ipynb",
        str(tmp_path / "out.ipynb"),
    ]
    command += ["--kernel", "python3", "--no-progress-bar", "-p", "figures_dir", str(tmp_path / "figures")]
    return subprocess.run(
        [*command, *arguments],
        cwd=home(),
        env=environment,
        capture_output=True,
        text=True,
    )


REFUSED = {
    "unknown name": (["-p", "treshold", "0.9"], ["treshold = 0.9", "did you mean 'threshold'"]),
    "unknown method": (["-p", "xai", "gradcamm"], ["xai = 'gradcamm'", "gradcam, gradcam++", "did you mean"]),
    "bad schedule": (["-p", "schedule", "5,,p"], ["schedule = '5,,p'", "token 2 of 5,»«,p"]),
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """All of them, two at a time: a kernel takes long to start."""
    folders = {name: tmp_path_factory.mktemp("papermill") for name in REFUSED}
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda name: papermill(folders[name], *REFUSED[name][0]), REFUSED)
        return {name: (folders[name], result) for name, result in zip(REFUSED, results, strict=True)}


@pytest.mark.parametrize("name", REFUSED)
def test_papermill_ends_with_the_sentence_and_nothing_is_written(executed, name):
    folder, result = executed[name]
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ParameterError: ") and all(words in last for words in REFUSED[name][1]), result.stderr
    assert not (folder / "runs").exists() and not list((folder / "figures").glob("*"))
    assert not list(folder.rglob("metrics.jsonl"))


def injected(notebook: Path) -> dict:
    """What the cell that papermill put into a notebook assigns."""
    cells = json.loads(notebook.read_text())["cells"]
    (cell,) = [cell for cell in cells if "injected-parameters" in cell["metadata"].get("tags", [])]
    values = {}
    exec("".join(cell["source"]), {}, values)
    return values


def test_odd_but_good_forms_through_papermill(tmp_path, monkeypatch):
    """``-p schedule 18`` arrives as a number, ``-p pretrained true`` and YAML's ``lr: 1e-3`` as texts."""
    file = tmp_path / "params.yaml"
    file.write_text("lr: 1e-3\nfolds: 40\nbatch_size: auto\naugment: none\ncam_layer: null\n")
    options = ["-p", "schedule", "18", "-p", "pretrained", "true", "-p", "data_dir", "None"]
    result = papermill(tmp_path, "--prepare-only", "-f", str(file), *options)
    assert result.returncode == 0, result.stderr
    values = injected(tmp_path / "out.ipynb")
    assert (values["schedule"], values["pretrained"], values["lr"]) == (
        18,
        "true",
        "1e-3",
    )  # else this tests nothing
    del values["figures_dir"]
    e = Experiment.from_mapping(values)
    assert (e.schedule, e.pretrained, e.lr, e.folds, e.augment) == ("18", True, 0.001, 40, "none")
    assert e.batch_size == "auto" and e.cam_layer is None and e.data_dir is None

    asked, real = [], timm.create_model

    def fetched(*arguments, pretrained=False, **keywords):
        asked.append(pretrained)
        return real(*arguments, **keywords)

    monkeypatch.setattr(timm, "create_model", fetched)
    e = Experiment.from_mapping(values | {"schedule": 1, "train_fraction": 0.02, "device": "cpu"})
    done = run(e, log=lambda _text: None)
    kept = done.manifest["parameters"]
    assert done.finished and asked == [True]
    assert (kept["schedule"], kept["pretrained"], kept["lr"]) == ("1", True, 0.001)
    assert done.metrics["lr"].max() <= 0.001 and len(done.metrics) == 1


def test_a_schedule_may_begin_with_p_when_the_weights_are_given(tmp_path):
    made = run(Experiment(**TINY | {"schedule": "1"}), log=lambda _text: None)
    e = Experiment(**TINY | {"schedule": "p,1", "pretrained": str(made.path / "weights.safetensors")})
    assert run(e, log=lambda _text: None).summary["proxy_images"] > 0
