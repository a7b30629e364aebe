"""Parameters: coercion, refusal in one sentence, identity; schedules."""

import numpy as np
import pytest

from pa_core import schedule
from pa_core.params import Experiment, ParameterError, derived_seed, home, runs_home


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (dict(schedule=18), "18"),  # papermill: -p schedule 18
        (dict(schedule=18.0), "18"),
        (dict(schedule=" 5, P ,5"), "5,p,5"),
        (dict(pretrained="true"), True),  # papermill: -p pretrained true
        (dict(pretrained="False"), False),
        (dict(pretrained="some/where.pth"), "some/where.pth"),
        (dict(lr="1e-3"), 0.001),  # YAML 1.1 reads 1e-3 as text
        (dict(threshold=1), 1.0),
        (dict(batch_size="auto"), "auto"),
        (dict(batch_size="32"), 32),
        (dict(data_dir=101), "101"),  # a folder with a number for a name
        (dict(data_dir="None"), None),
        (dict(fill=None), "none"),  # papermill: -p fill None
        (dict(augment="crop, flip"), "flip,crop"),
        (dict(augment=["rotate"]), "rotate"),
        (dict(seed=np.int64(3)), 3),  # a DataFrame's number
        (dict(device="cuda:1"), "cuda:1"),
        (dict(seed=2**60 + 1), 2**60 + 1),  # not through a float
    ],
)
def test_values_are_kept_in_one_form(given, kept):
    (name,) = given
    value = getattr(Experiment(**given), name)
    assert value == kept and type(value) is type(kept)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(schedule="5,,p"), ["schedule", "5,,p", "token 2", "5,»«,p"]),
        (dict(schedule="p,p"), ["schedule", "token 2"]),
        (dict(schedule="-1"), ["schedule", "token 1", "»-1«"]),
        (dict(schedule=""), ["schedule", "empty"]),
        (dict(schedule="5,q,5"), ["token 2", "»q«"]),
        (dict(schedule="5,p"), ["token 2", "not be trained on"]),
        (dict(schedule="0"), ["token 1"]),
        (dict(schedule="²"), ["token 1"]),
        (dict(schedule="p,5"), ["schedule", "pretrained"]),
        (dict(schedule=["5", "p", "5"]), ["schedule", "quote"]),
        (dict(threshold=1.5), ["threshold", "1.5", "0 to 1"]),
        (dict(threshold=float("nan")), ["threshold"]),
        (dict(fraction=0), ["fraction", "0", "above 0"]),
        (dict(image_size=4), ["image_size", "4", "16"]),
        (dict(batch_size=0), ["batch_size", "0", "at least 1", "auto"]),
        (dict(batch_size=True), ["batch_size"]),
        (dict(select="los"), ["select", "los", "did you mean 'loss'"]),
        (dict(fill="men"), ["fill", "men", "did you mean 'mean'"]),
        (dict(max_share=1.2), ["max_share", "1.2", "above 0 and up to 1"]),
        (dict(feather=True), ["feather", "whole number"]),
        (dict(protocol="theses"), ["protocol", "clean, thesis, thesis_text"]),
        (dict(augment="flip,cutmx"), ["augment", "cutmx", "did you mean 'cutmix'"]),
        (dict(store="disk"), ["store", "disk", "auto, device, mapped"]),
        (dict(augment="flip,flip"), ["augment", "twice"]),
        (dict(pretrained="maybe"), ["pretrained", "maybe", "weights file"]),
        (dict(fold=5), ["fold", "5", "0 to 4"]),
        (dict(seed=-1), ["seed", "-1"]),
        (dict(seed=1.5), ["seed", "1.5"]),
        (dict(lr=0), ["lr", "above 0"]),
        (dict(label_smoothing=1), ["label_smoothing"]),
        (dict(device="gpu"), ["device", "gpu", "cuda"]),
    ],
)
def test_bad_values_are_refused_in_one_sentence(given, words):
    with pytest.raises(ParameterError) as caught:
        Experiment(**given)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 400


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ParameterError, match="treshold.*did you mean 'threshold'"):
        Experiment.from_mapping({"treshold": 0.9})


def test_yaml(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("lr: 1e-3\nschedule: 5,p,5\nxai: gradcam++\nfill: none\n")
    e = Experiment.from_yaml(file)
    assert (e.lr, e.schedule, e.xai, e.fill) == (0.001, "5,p,5", "gradcam++", "none")


def notebook(*cells, **variables):
    """What a kernel's namespace holds after these cells, the last of which is being run."""
    namespace = {}
    for cell in cells:
        exec(cell, namespace)
    return namespace | variables | {"In": ["", *cells, "Experiment.from_notebook(globals())"]}


OURS = "# Parameters of the experiment; see the table\nschedule = '5,p,5'\nxai = 'gradcam'\nfigures_dir = 'figures/quick'\n"


def test_notebook_takes_papermills_values():
    e = Experiment.from_notebook(notebook(OURS, "# Parameters\nxai = 'saliency'\n"), also=["figures_dir"])
    assert (e.schedule, e.xai) == ("5,p,5", "saliency")


def test_notebook_refuses_what_papermill_only_warns_about():
    with pytest.raises(ParameterError, match="treshold.*did you mean 'threshold'"):
        Experiment.from_notebook(notebook(OURS, "# Parameters\ntreshold = 0.9\n"), also=["figures_dir"])


def test_notebook_accepts_a_parameter_that_its_cell_does_not_list():
    e = Experiment.from_notebook(notebook(OURS, "# Parameters\nweight = 0.5\n"), also=["figures_dir"])
    assert e.weight == 0.5


def test_notebook_forgets_a_mistake_that_was_corrected():
    cells = [OURS + "treshold = 0.9\n", OURS]
    namespace = notebook(*cells, other="a variable of the user's own")
    assert Experiment.from_notebook(namespace, also=["figures_dir"]).xai == "gradcam"
    with pytest.raises(ParameterError, match="treshold"):
        Experiment.from_notebook(notebook(cells[0]), also=["figures_dir"])


def test_identity_counts_what_has_an_effect():
    plain = Experiment(schedule="18")
    digest = plain.digest(data="d", image_size=28)
    assert (
        Experiment(schedule="18", xai="random", threshold=0.1).digest(data="d", image_size=28) == digest
    )  # no proxy step
    assert Experiment(schedule="18", device="cpu", runs_dir="x", data_dir="y").digest(data="d", image_size=28) == digest
    assert Experiment(schedule="18", seed=1).digest(data="d", image_size=28) != digest
    assert plain.digest(data="other", image_size=28) != digest
    assert Experiment(xai="random").digest(data="d", image_size=28) != Experiment().digest(data="d", image_size=28)
    weights = Experiment(pretrained="a.pth").digest(data="d", image_size=28, weights="1")
    assert weights == Experiment(pretrained="b.pth").digest(data="d", image_size=28, weights="1")
    assert weights != Experiment(pretrained="a.pth").digest(data="d", image_size=28, weights="2")
    assert weights != Experiment().digest(data="d", image_size=28)


def test_the_identity_of_the_defaults_is_stable():
    """A change here makes every run on disk a stranger: raise SCHEMA only on purpose."""
    assert Experiment().effective() == {}
    assert Experiment().digest(data="d", image_size=28)[:12] == "fa35c238bea5"


def test_plain_run_of_equal_length():
    assert Experiment(schedule="5,p,9,p,4", xai="random").plain().schedule == "18"


def test_schedule_parts():
    assert schedule.parse("5,p,9,p,4") == ("5", "p", "9", "p", "4")
    assert schedule.epochs("5,p,9,p,4") == 18
    assert schedule.steps("5,p,9,p,4") == 2
    assert schedule.stages("2,p,1,3") == ((0, False), (0, False), (1, True), (2, False), (2, False), (2, False))


def test_derived_seeds_are_fixed_and_distinct():
    assert derived_seed(0, "order", 1) == derived_seed(0, "order", 1)
    seeds = {derived_seed(s, name, k) for s in range(3) for name in ("order", "augment") for k in range(50)}
    assert len(seeds) == 300 and all(0 <= s < 2**63 for s in seeds)


def test_places(monkeypatch, tmp_path):
    monkeypatch.delenv("PA_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert runs_home() == home() / "runs"  # whatever the working directory
    assert runs_home("mine") == tmp_path / "mine"
    monkeypatch.setenv("PA_RUNS", str(tmp_path / "elsewhere"))
    assert runs_home() == tmp_path / "elsewhere"
