"""Parameters: one form, refusal in one sentence, and an identity that counts what has an effect."""

from __future__ import annotations

import copy
import pickle
import re
import shlex

import numpy as np
import pandas as pd
import pytest

from pa_core import params
from pa_core.errors import ParameterError
from pa_core.files import read_yaml
from pa_core.params import PARAMETERS, Experiment, derived_seed


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (dict(schedule=18), "18"),  # papermill: -p schedule 18
        (dict(schedule=18.0), "18"),
        (dict(schedule=" 5, P ,x.5,5"), "5,p,x0.5,5"),
        (dict(pretrained="true"), True),  # papermill: -p pretrained true
        (dict(pretrained="False"), False),
        (dict(pretrained="some/where.PTH"), "some/where.PTH"),
        (dict(lr="1e-3"), 0.001),  # YAML 1.1 reads 1e-3 as text
        (dict(threshold=1), 1.0),
        (dict(batch_size="Auto"), "auto"),
        (dict(batch_size="32"), 32),
        (dict(batch_size=32.0), 32),
        (dict(data_dir=101), "101"),  # a folder with a number for a name
        (dict(data_dir="None"), None),
        (dict(image_size="none"), None),
        (dict(fill=None), "none"),  # papermill: -p fill None
        (dict(fill=" Blur"), "blur"),
        (dict(xai="GradCAM"), "gradcam"),
        (dict(augment="crop, flip"), "flip,crop"),
        (dict(augment=["rotate"]), "rotate"),
        (dict(augment=[]), "none"),
        (dict(seed=np.int64(3)), 3),  # a DataFrame's number
        (dict(seed=3.0), 3),
        (dict(seed=2**60 + 1), 2**60 + 1),  # not through a float
        (dict(permute_maps=np.True_), True),
        (dict(permute_maps="true"), True),
        (dict(device="cuda:1"), "cuda:1"),
    ],
    ids=str,
)
def test_values_are_kept_in_one_form(given, kept):
    (name,) = given
    made = getattr(Experiment(**given), name)
    assert made == kept and type(made) is type(kept)


ONE_OF = "must be one of "
BAD = [
    ("dataset", " ", "text that is not empty"),
    ("data_dir", "", "text that is not empty"),
    ("bad_images", "skp", ONE_OF + "refuse, skip (did you mean 'skip'?)"),
    ("image_size", 4, "a whole number of at least 16, at most 4096, or none"),
    ("image_size", float("nan"), "a whole number"),
    ("train_fraction", 0, "a number above 0, at most 1"),
    ("folds", 1, "a whole number of at least 2, at most 1000"),
    ("fold", 5, "must be 0 to 4 for folds=5"),
    ("model", True, "text"),
    ("pretrained", "maybe", "true, false, or a weights file"),
    ("xai", None, "text"),
    ("xai_target", "lable", ONE_OF + "predicted, label (did you mean 'label'?)"),
    ("cam_layer", True, "text"),
    ("smooth", "eigne", "did you mean 'eigen'"),
    ("permute_maps", "maybe", "true or false"),
    ("permute_maps", 2, "true or false"),
    ("permute_maps", None, "true or false"),
    ("schedule", "5,,p", "token 2 of 5,[],p"),
    ("schedule", None, "must be a text that is not empty"),
    ("schedule", -1, "token 1 of [-1]"),
    ("schedule", ["5", "p", "5"], "quote it"),
    ("schedule", "p,5", "must begin with epochs, or have pretrained weights"),
    ("schedule", "x0.3,p,5", "must begin with epochs, or have pretrained weights"),
    ("select", "los", "did you mean 'loss'"),
    ("select", 5, ONE_OF + "misclassified, loss"),
    ("fraction", 0, "a number above 0, at most 1"),
    ("keep_proxies", "non", ONE_OF + "last, all"),
    ("mask_region", "salent", "did you mean 'salient'"),
    ("threshold_mode", "deviation", ONE_OF + "absolute, quantile, deviations (did you mean 'deviations'?)"),
    ("threshold", 1.5, "from 0 to 1 with threshold_mode='quantile'"),
    ("threshold", 11, "a number of at least 0, at most 10"),
    ("threshold", float("nan"), "a number"),
    ("max_share", 1.2, "a number above 0, at most 1"),
    ("fill", "men", "did you mean 'mean'"),
    ("weight", -0.1, "a number of at least 0, at most 1"),
    ("feather", 1.5, "a whole number of at least 0, at most 4096"),
    ("feather", True, "a whole number"),
    ("overlay", "apend", ONE_OF + "replace, append, withhold (did you mean 'append'?)"),
    ("copies", 0, "a whole number of at least 1, at most 1000"),
    ("copies", 1001, "a whole number of at least 1, at most 1000"),
    ("copies", 1.5, "a whole number of at least 1"),
    ("proxy_probability", 1.1, "a number of at least 0, at most 1"),
    ("proxy_probability", "often", "a number"),
    ("protocol", "theses", ONE_OF + "clean, thesis, thesis_text (did you mean 'thesis'?)"),
    ("augment", "flip,cutmx", "did you mean 'cutmix'"),
    ("augment", "flip,flip", "none, or any of flip, rotate"),
    ("augment", "", "none, or any of"),
    ("erase_region", "atended", ONE_OF + "anywhere, attended, spared (did you mean 'attended'?)"),
    ("erase_region", "attended", "must be anywhere, or have maps: augment with erase and a schedule with p"),
    ("erase_probability", -1, "a number of at least 0, at most 1"),
    ("mix_labels", "map", ONE_OF + "area, attention"),
    ("mix_labels", "attention", "must be area, or have maps: augment with cutmix and a schedule with p"),
    ("mix_probability", 2, "a number of at least 0, at most 1"),
    ("cutmix_alpha", 0, "a number above 0, at most 1000"),
    ("optimizer", "adam", "did you mean 'adamw'"),
    ("lr", 0, "a number above 0"),
    ("lr", "inf", "a number above 0"),
    ("weight_decay", -1, "a number of at least 0"),
    ("scheduler", "cosin", "did you mean 'cosine'"),
    ("label_smoothing", 1, "a number of at least 0, below 1"),
    ("batch_size", 0, "a whole number of at least 1, or auto"),
    ("batch_size", True, "a whole number of at least 1, or auto"),
    ("precision", "fp23", "did you mean 'fp32'"),
    ("tf32", "on and off", "true or false"),
    ("deterministic", 2, "true or false"),
    ("device", "gpu", "auto, cpu, cuda, cuda:N or mps"),
    ("device", "cuda:x", "auto, cpu, cuda, cuda:N or mps"),
    ("compile", "maybe", "true or false"),
    ("seed", -1, "a whole number of at least 0"),
    ("seed", 1.5, "a whole number of at least 0"),
    ("seed", 2**63, "below 9223372036854775808"),
    ("runs_dir", "", "text that is not empty"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD, ids=str)
def test_bad_values_are_refused_in_one_sentence(name, value, words):
    with pytest.raises(ParameterError) as caught:
        Experiment(**{name: value})
    error, message = caught.value, str(caught.value)
    assert (
        error.name == name and re.match(rf"invalid {name}=.+: (token . of .+ )?must ", message) and words in message
    ), message
    assert "\n" not in message and ". " not in message and len(message) < 300
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.name, again.allowed) == (message, error.name, error.allowed)


def test_every_parameter_has_a_bad_value_and_a_default_that_is_allowed():
    assert {name for name, _, _ in BAD} == set(PARAMETERS) == set(Experiment().to_dict())
    for name, p in PARAMETERS.items():
        assert getattr(Experiment(**{name: p.default}), name) == p.default and p.description


def test_what_is_refused_together_is_allowed_in_its_place():
    for values in (
        dict(erase_region="spared", augment="erase"),
        dict(mix_labels="attention", augment="flip,cutmix"),
        dict(threshold=2, threshold_mode="deviations"),
        dict(schedule="p,5", pretrained=True),
        dict(schedule="p,5", protocol="thesis"),  # there p trains first
        dict(fold=9, folds=10),
    ):
        Experiment(**values)
    for name, values in {
        "erase_region": dict(erase_region="spared", augment="erase", schedule="5"),
        "mix_labels": dict(mix_labels="attention", augment="cutmix", schedule="5"),
        "schedule": dict(protocol="thesis", schedule="5,x0.3"),
        "overlay": dict(overlay="withhold", select="all"),
    }.items():
        with pytest.raises(ParameterError, match=f"invalid {name}="):
            Experiment(**values)


def test_withholding_all_images_is_refused():
    words = "^invalid overlay='withhold': must be replace or append where all images are selected, or none is left"
    for everything in (dict(select="all"), dict(fraction=1), dict(select="random", fraction=1)):
        with pytest.raises(ParameterError, match=words):
            Experiment(overlay="withhold", **everything)
        for others in (dict(schedule="5"), dict(protocol="thesis"), dict(overlay="append")):  # none is withheld
            Experiment(**dict(overlay="withhold") | everything | others)
    Experiment(overlay="withhold", select="misclassified", fraction=1)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ParameterError, match=r"treshold=0.9: .*\(did you mean 'threshold'\?\)"):
        Experiment.from_mapping({"treshold": 0.9})
    with pytest.raises(ParameterError, match="did you mean 'overlay'"):
        Experiment(overlai="append")
    for gone in ("store", "rerun", "until_step"):
        with pytest.raises(ParameterError, match="must be a parameter's name"):
            Experiment(**{gone: None})


def test_yaml_and_dataframes(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("lr: 1e-3\nschedule: 5,p,5\nxai: gradcam++\nfill: none\npermute_maps: yes\ndata_dir: null\n")
    e = Experiment.from_mapping(read_yaml(file))
    assert (e.lr, e.schedule, e.xai, e.fill, e.permute_maps) == (0.001, "5,p,5", "gradcam++", "none", True)
    table = pd.DataFrame([Experiment(seed=seed, data_dir=None).to_dict() for seed in range(2)])
    assert Experiment.from_mapping(table.iloc[1].to_dict()) == Experiment(seed=1)


def test_experiments_are_frozen_copies_are_checked_and_commands_can_be_run():
    given = {"data_dir": "a b", "permute_maps": True}
    e = Experiment(**given, seed=3)
    with pytest.raises(Exception, match="frozen"):
        e.seed = 4
    assert (
        e.replace(seed=4) == Experiment(data_dir="a b", seed=4, permute_maps=True) == copy.deepcopy(e.replace(seed=4))
    )
    with pytest.raises(ParameterError, match="weight"):
        e.replace(weight=2)
    words = shlex.split(e.command("03_proxy_loop"))
    assert words[:3] == ["papermill", "notebooks/03_proxy_loop.ipynb", "03_proxy_loop.out.ipynb"]
    assert Experiment(**dict(zip(words[4::3], words[5::3], strict=True))) == e


# Notebooks


def notebook(*cells, **variables):
    """What a kernel's namespace holds after these cells, the last of which is being run."""
    namespace = {}
    for cell in cells:
        exec(cell, namespace)
    return namespace | variables | {"In": ["", *cells, "Experiment.from_notebook(globals())"]}


OURS = "# Parameters of the experiment; see the table\nschedule = '5,p,5'\nxai: str = 'gradcam'\nfigures_dir = 'x'\n"


def test_notebooks():
    injected = notebook(OURS, "# Parameters\nxai = 'saliency'\nweight = 0.5\n")  # our cell does not list weight
    e = Experiment.from_notebook(injected, also=["figures_dir"])
    assert (e.schedule, e.xai, e.weight) == ("5,p,5", "saliency", 0.5)
    mistaken = "# Parameters\ntreshold = 0.9\n"  # papermill only warns about it
    with pytest.raises(ParameterError, match="treshold=0.9.*did you mean 'threshold'"):
        Experiment.from_notebook(notebook(OURS, mistaken), also=["figures_dir"])
    with pytest.raises(ParameterError, match="figures_dir"):
        Experiment.from_notebook(notebook(OURS))
    corrected = notebook(OURS + "treshold = 0.9\n", OURS, other="a variable of the user's own")
    assert Experiment.from_notebook(corrected, also=["figures_dir"]).xai == "gradcam"
    with pytest.raises(ParameterError, match="treshold"):
        params.refuse_unknown(notebook(OURS + "treshold = 0.9\n"), [*PARAMETERS, "figures_dir"])


# Identity

NOT_CLEAN, NO_STEP, ERASE, CUTMIX = (
    {"protocol": "thesis"},
    {"schedule": "9"},
    {"augment": "erase"},
    {"augment": "cutmix"},
)
ALONE, TWO, APPEND = {"fill": "none"}, {"schedule": "5,p,5,p,5"}, {"overlay": "append"}
WITHHOLD, GUIDED = {"overlay": "withhold"}, {"mix_labels": "attention", **CUTMIX}
ALWAYS = dict(
    dataset="folder", folds=10, fold=1, model="resnet18", pretrained=True, schedule="9,p,1", augment="none",
    optimizer="sgd", lr=0.1, weight_decay=0, scheduler="cosine", label_smoothing=0.1, batch_size=32, precision="fp32",
    tf32=True, deterministic=True, compile=True, seed=1,
)  # fmt: skip
RULES = [
    # name, another value, with what it has an effect, with what it has none
    ("xai", "random", [{}, GUIDED | ALONE, GUIDED | WITHHOLD], [NO_STEP, ALONE, WITHHOLD]),
    ("xai_target", "label", [{}], [NO_STEP, ALONE, WITHHOLD, GUIDED]),
    ("cam_layer", "layer3", [{}], [NO_STEP, ALONE, WITHHOLD]),
    ("smooth", "flip", [{}], [NO_STEP, ALONE, WITHHOLD]),
    ("permute_maps", True, [{}, GUIDED | ALONE], [NO_STEP, ALONE, WITHHOLD]),
    ("select", "random", [{}, ALONE, WITHHOLD], [NO_STEP, NOT_CLEAN]),
    ("fraction", 0.5, [{}, NOT_CLEAN | {"select": "all"}], [NO_STEP, {"select": "all"}]),
    ("keep_proxies", "all", [TWO, TWO | WITHHOLD], [NO_STEP, {}, TWO | NOT_CLEAN]),
    ("mask_region", "rest", [{}], [NO_STEP, ALONE, WITHHOLD]),
    ("threshold_mode", "absolute", [{}], [NO_STEP, ALONE, WITHHOLD]),
    ("threshold", 0.5, [{}], [NO_STEP, ALONE, WITHHOLD, WITHHOLD | GUIDED]),
    ("max_share", 0.5, [{}], [NO_STEP, ALONE, WITHHOLD]),
    ("fill", "zero", [{}, WITHHOLD | NOT_CLEAN], [NO_STEP, WITHHOLD]),
    ("weight", 0.5, [{}, WITHHOLD | NOT_CLEAN], [NO_STEP, ALONE, WITHHOLD]),
    ("feather", 2, [{}], [NO_STEP, ALONE, WITHHOLD]),
    ("overlay", "append", [{}, ALONE], [NO_STEP, NOT_CLEAN]),
    ("copies", 2, [APPEND, APPEND | ALONE], [NO_STEP | APPEND, {}, WITHHOLD, APPEND | NOT_CLEAN]),
    ("proxy_probability", 0.5, [{}], [NO_STEP, ALONE, WITHHOLD]),
    ("erase_region", "spared", [ERASE], []),  # refused where it has none
    ("mix_labels", "attention", [CUTMIX], []),
    ("erase_probability", 0.1, [ERASE, ERASE | NO_STEP], [{}, CUTMIX]),
    ("mix_probability", 0.1, [CUTMIX, {"augment": "mixup"}], [{}, ERASE]),
    ("cutmix_alpha", 0.3, [CUTMIX], [{}, {"augment": "mixup"}]),
    *[(name, "x", [], [{}, NO_STEP]) for name in ("runs_dir", "data_dir")],
    ("device", "cpu", [], [{}, NO_STEP]),
    ("bad_images", "skip", [], [{}]),  # what was skipped is in the data digest
    ("image_size", 32, [], [{}]),  # as it was resolved it enters beside it
    ("train_fraction", 0.5, [{}, NOT_CLEAN], []),
    ("protocol", "thesis", [{}, NO_STEP], []),
    *[(name, value, [{}], []) for name, value in ALWAYS.items()],
]


def identity(**values):
    return Experiment(**values).digest(data="d", image_size=28)


@pytest.mark.parametrize(("name", "value", "counts", "without"), RULES, ids=[rule[0] for rule in RULES])
def test_identity_counts_what_has_an_effect(name, value, counts, without):
    for others in counts:
        assert identity(**others) != identity(**others | {name: value}), others
    for others in without:
        assert identity(**others) == identity(**others | {name: value}), others


def test_the_rules_are_complete():
    assert {name for name, *_ in RULES} == set(PARAMETERS)
    without_step = {name for name, _, _, without in RULES if without and "schedule" in without[0]}
    assert without_step == params.PROXY_PARAMETERS


def test_identity_counts_content():
    assert identity() != Experiment().digest(data="other", image_size=28)
    assert identity() != Experiment().digest(data="d", image_size=32)
    weights = Experiment(pretrained="a.pth").digest(data="d", image_size=28, weights="1")
    assert weights == Experiment(pretrained="b.pth").digest(data="d", image_size=28, weights="1")
    assert weights != Experiment(pretrained="a.pth").digest(data="d", image_size=28, weights="2")
    assert weights != identity()


def test_the_identity_of_the_defaults_is_stable(monkeypatch):
    """A change here makes every run on disk a stranger: raise SCHEMA only on purpose."""
    assert Experiment().effective() == {}
    assert params.SCHEMA == 2 and identity()[:12] == "2e3fb700efbf"
    assert identity(threshold=0.5, seed=3)[:12] == "9065c547ba4c"
    monkeypatch.setattr(params, "SCHEMA", 3)
    assert identity()[:12] != "2e3fb700efbf"


def test_the_plain_run_of_equal_length():
    guided = Experiment(
        schedule="5,p,9,p,x0.3,4", augment="erase,cutmix", erase_region="spared", mix_labels="attention"
    )
    assert guided.plain() == guided.replace(schedule="18", erase_region="anywhere", mix_labels="area")
    assert Experiment(protocol="thesis", schedule="9,p,8").plain().schedule == "18"  # there p trains


def test_derived_seeds_are_fixed_and_distinct():
    assert derived_seed(0, "order", 1) == 8677279991123922410
    seeds = {derived_seed(s, name, k) for s in range(3) for name in ("order", "augment") for k in range(50)}
    assert len(seeds) == 300 and all(0 <= s < 2**63 for s in seeds)
