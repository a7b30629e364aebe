"""Bad input is refused before any training, in one sentence: parameter, value, what it must be.

Odd but good forms, as papermill and YAML hand them over, are accepted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pa_core.errors import ParameterError
from pa_core.experiment import run
from pa_core.files import home
from pa_core.params import Experiment

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


ERASE, CUTMIX = {"augment": "erase"}, {"augment": "cutmix"}
BAD = [
    # what is given, the refused name if it is not the first one, words that say what is allowed
    ({"dataset": "fashion_mni"}, None, ["did you mean 'fashion_mini'", "cifar10", "folder"]),
    ({"dataset": "folder"}, "data_dir", ["folder"]),
    ({"dataset": "folder", "data_dir": "/no/such/place"}, "data_dir", ["folder"]),
    ({"dataset": "cifar10", "data_dir": "/no/such/place"}, "data_dir", ["folder"]),
    ({"image_size": 4}, None, ["of at least 16"]),
    ({"image_size": 32, "model": "inception_v3"}, None, ["inception_v3 a heatmap grid of 4x4 or more (", "may suit"]),
    ({"train_fraction": 1.5}, None, ["above 0, at most 1"]),
    ({"fold": 40}, None, ["0 to 39", "folds=40"]),
    ({"model": "resnet81"}, None, ["timm.list_models()", "did you mean 'resnet"]),
    ({"model": "resnet18.a9_in1k"}, None, ["must be one of resnet18, resnet18.a1_in1k", "a1_in1k"]),
    ({"pretrained": "no/such/file.safetensors"}, None, ["true, false or a weights file", "exists"]),
    ({"pretrained": "maybe"}, None, ["true, false, or a weights file"]),
    ({"cam_layer": "layer9"}, None, ["module's dotted name", "did you mean 'layer"]),
    ({"xai": "gradcamm"}, None, ["gradcam, gradcam++", "uniform", "did you mean 'gradcam'"]),
    ({"xai": "shuffled"}, None, ["one of gradcam"]),
    ({"xai": "attention_rollout"}, None, ["must be one of gradcam", "or a control, with test_resnet"]),
    ({"xai": "saliency", "smooth": "eigen"}, "smooth", ["none, gaussian or flip"]),
    ({"permute_maps": "perhaps"}, None, ["true or false"]),
    ({"permute_maps": True, "fraction": 0.001}, "fraction", ["two images or more"]),
    ({"schedule": "5,,p"}, None, ["token 2 of 5,[],p", "numbers of epochs"]),
    ({"schedule": "1,p,p,1"}, None, ["token 3 of 1,p,[p],1", "right after another"]),
    ({"schedule": "1,p"}, None, ["token 2", "an epoch after it"]),
    ({"schedule": "p,1"}, None, ["begin with epochs", "pretrained weights"]),
    ({"schedule": "1,c,1"}, None, ["a proxy step before it"]),
    ({"schedule": "1,x1.5,1"}, None, ["token 2 of 1,[x1.5],1"]),
    ({"schedule": "1,l0,1"}, None, ["token 2 of 1,[l0],1"]),
    ({"schedule": "1,l,1"}, None, ["token 2 of 1,[l],1"]),
    ({"schedule": "-1"}, None, ["token 1 of [-1]", "1 to 99999"]),
    ({"schedule": -1}, None, ["token 1 of [-1]", "1 to 99999"]),
    ({"schedule": ""}, None, ["empty", "numbers of epochs"]),
    ({"schedule": 0}, None, ["token 1 of [0]"]),
    ({"select": "los"}, None, ["misclassified, loss", "did you mean 'loss'"]),
    ({"fraction": 0}, None, ["above 0, at most 1"]),
    ({"threshold": 1.5}, None, ["from 0 to 1", "quantile"]),
    ({"threshold": 11, "threshold_mode": "deviations"}, None, ["at most 10"]),
    ({"threshold_mode": "deviation"}, None, ["did you mean 'deviations'"]),
    ({"max_share": 0}, None, ["above 0, at most 1"]),
    ({"fill": "men"}, None, ["zero, one, mean", "did you mean 'mean'"]),
    ({"fill": "patch", "batch_size": 1}, "batch_size", ["at least 2", "patch"]),
    ({"feather": -1}, None, ["whole number of at least 0"]),
    ({"feather": 1.5}, None, ["whole number"]),
    ({"fraction": 0.999, "overlay": "withhold"}, None, ["leave images to train on with overlay='withhold'"]),
    ({"overlay": "apend"}, None, ["replace, append, withhold", "did you mean 'append'"]),
    ({"copies": 0}, None, ["of at least 1"]),
    ({"proxy_probability": 1.1}, None, ["at most 1"]),
    ({"erase_region": "attended"}, None, ["augment with erase"]),
    ({"erase_region": "attended", "schedule": "1"} | ERASE, None, ["a schedule with p"]),
    ({"erase_probability": -0.1} | ERASE, None, ["of at least 0"]),
    ({"mix_labels": "attention"}, None, ["augment with cutmix"]),
    ({"mix_labels": "attentoin"} | CUTMIX, None, ["did you mean 'attention'"]),
    ({"mix_probability": 2} | CUTMIX, None, ["at most 1"]),
    ({"cutmix_alpha": 0} | CUTMIX, None, ["above 0"]),
    ({"augment": "mixop"}, None, ["erase, cutmix, mixup", "did you mean 'mixup'"]),
    ({"protocol": "thesys"}, None, ["clean, thesis, thesis_text", "did you mean 'thesis'"]),
    ({"protocol": "thesis", "train_fraction": 0.0001}, "train_fraction", ["two to halve"]),
    ({"protocol": "thesis", "schedule": "1,p,x0.5,1"}, "schedule", ["epochs and p alone"]),
    ({"batch_size": 0}, None, ["at least 1", "auto"]),
    ({"batch_size": 1, "model": "mobilenetv4_conv_small"}, "batch_size", ["must be larger", "hold one alone"]),
    ({"seed": True}, None, ["a whole number"]),
    ({"deterministic": 2}, None, ["true or false"]),
    ({"precision": "fp16"}, None, ["auto, fp32 or bf16"]),
    ({"device": "cuda:99"}, None, ["auto, cpu"]),
    ({"treshold": 0.9}, None, ["a parameter's name", "did you mean 'threshold'"]),
    ({"store": "mapped"}, None, ["a parameter's name"]),
]


@pytest.mark.parametrize(("values", "name", "allowed"), BAD, ids=[str(values) for values, _, _ in BAD])
def test_refused_in_one_sentence_and_nothing_is_written(tmp_path, values, name, allowed):
    error = refused(tmp_path, **values)
    name = name or next(iter(values))
    text = str(error)
    assert error.name == name
    assert text.startswith(f"invalid {name}={values.get(name, TINY.get(name))!r}: ")
    assert all(words in text for words in ["must", *allowed]), text
    assert is_one_sentence(text), text


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_where_there_is_none_is_refused(tmp_path):
    text = str(refused(tmp_path, device="cuda"))
    seen = "PyTorch sees 0 CUDA and 0 MPS devices here"
    assert text == f"invalid device='cuda': must be auto, cpu or a device that is there; {seen}"


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
    text = str(refused(tmp_path, pretrained="true"))
    assert text.startswith(
        "invalid pretrained=True: must be false or a file, as in -p pretrained FILE.safetensors: "
        "timm's weights for test_resnet could not be fetched"
    )
    assert is_one_sentence(text), text


def test_a_file_that_holds_no_weights_is_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"nothing")
    error = refused(tmp_path, pretrained=str(file))
    assert error.name == "pretrained" and "that can be read" in str(error)


# Odd but good forms


def papermill(tmp_path, *arguments):
    """Run notebook 03 with runs and data under ``tmp_path``, by this interpreter's kernel."""
    places = {"PA_RUNS": str(tmp_path / "runs"), "PA_DATA": str(tmp_path / "data")}
    environment = os.environ | places | {"PYTHONPATH": str(home()), "JUPYTER_PREFER_ENV_PATH": "1"}
    command = [sys.executable, "-m", "papermill", "notebooks/03_proxy_loop.ipynb", str(tmp_path / "out.ipynb")]
    command += ["--kernel", "python3", "--no-progress-bar", "-p", "figures_dir", str(tmp_path / "figures"), *arguments]
    return subprocess.run(command, cwd=home(), env=environment, capture_output=True, text=True)


def test_papermill_ends_with_the_sentence_and_nothing_is_written(tmp_path):
    """The other refusals are raised by the same two calls of the notebook."""
    result = papermill(tmp_path, "-p", "xai", "gradcamm")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ParameterError: invalid xai='gradcamm': must be one of gradcam, gradcam++"), result.stderr
    assert not (tmp_path / "runs").exists() and not list((tmp_path / "figures").glob("*"))


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
    assert (values["schedule"], values["pretrained"], values["lr"]) == (18, "true", "1e-3")  # else this tests nothing
    del values["figures_dir"]
    e = Experiment.from_mapping(values)
    assert (e.schedule, e.pretrained, e.lr, e.folds, e.augment) == ("18", True, 0.001, 40, "none")
    assert e.batch_size == "auto" and e.cam_layer is None and e.data_dir is None

    asked, real = [], timm.create_model

    def fetched(*arguments, pretrained=False, **keywords):
        asked.append(pretrained)
        return real(*arguments, **keywords)

    monkeypatch.setattr(timm, "create_model", fetched)
    e = Experiment.from_mapping(values | {"schedule": 1, "train_fraction": np.float64(0.02), "device": "cpu"})
    done = run(e, log=lambda _text: None)
    kept = done.manifest["parameters"]
    assert done.finished and asked == [True]
    assert (kept["schedule"], kept["pretrained"], kept["lr"]) == ("1", True, 0.001)
    assert done.metrics["lr"].max() <= 0.001 and len(done.metrics) == 1


def test_a_schedule_may_begin_with_p_when_the_weights_are_given(tmp_path):
    made = run(Experiment(**TINY | {"schedule": "1"}), log=lambda _text: None)
    e = Experiment(**TINY | {"schedule": "p,1", "pretrained": str(made.path / "weights.safetensors")})
    assert run(e, log=lambda _text: None).summary["proxy_images"] > 0
