"""Studies: equal terms, from their files to figures, and committed tables that follow from committed runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from pa_core import experiment, masking, train
from pa_core.attribution import heatmaps
from pa_core.errors import ParameterError, RunError
from pa_core.files import home, read_yaml
from pa_core.lab import results, statistics, study, sweep
from pa_core.models import create
from pa_core.params import SCHEMA, Experiment
from pa_core.runs import code_version

FOLDER = home() / "params" / "study"
QUIET = {"log": lambda _text: None}


# The committed study files


@pytest.mark.parametrize("name", study.names())
def test_every_study_file_is_a_study(name):
    read = study.read(name)
    seeds: dict[str, set[int]] = {}
    for job in read.sweep.jobs:
        for label in job.arms:
            seeds.setdefault(study.split(label)[1], set()).add(job.experiment.seed)
    assert read.file.question and read.file.reference in seeds
    assert all(found == set(range(len(found))) for found in seeds.values())


def test_the_primary_study_has_its_arms_contrasts_and_seeds():
    read = study.read("a")
    assert [" - ".join(c) for c in read.file.contrasts] == [
        "salient - shuffled",
        "salient - plain",
        "salient - random erasing",
    ]
    count = pd.Series([study.split(label)[1] for job in read.sweep.jobs for label in job.arms]).value_counts()
    confirmatory = {"plain", "salient", "shuffled", "random erasing"}
    assert {arm: n for arm, n in count.items() if arm in confirmatory} == dict.fromkeys(confirmatory, 20)
    assert (count.drop(list(confirmatory)) >= 10).all()
    by = {study.split(label)[1]: job.experiment for job in read.sweep.jobs for label in job.arms}
    factorial = [by[name] for name in ("salient", "shuffled", "random images salient", "random images shuffled")]
    found = [(e.xai, e.select, e.permute_maps) for e in factorial]
    assert found == [("gradcam", select, permuted) for select in ("loss", "random") for permuted in (False, True)]
    masked = [e for e in by.values() if "p" in e.schedule and e.fill != "none"]
    assert len({(e.threshold_mode, e.threshold, e.fraction, e.fill, e.weight, e.schedule) for e in masked}) == 1
    assert masked[0].threshold_mode == "quantile"


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_arms_file_alone_is_the_studys_run(path):
    name = path.relative_to(FOLDER).parts[0]
    alone = Experiment.from_mapping(read_yaml(path)).replace(seed=3)
    assert alone in [job.experiment for job in study.read(name).sweep.jobs]


# Equal terms


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """4 classes with 50 noise images each: 128 for training."""
    path, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in range(4):
        (path / f"class_{label}").mkdir()
        for number in range(50):
            pixels = generator.integers(0, 200, (32, 32, 3)) + 10 * label
            Image.fromarray(pixels.astype(np.uint8)).save(path / f"class_{label}" / f"{number}.png")
    return path


SHORT = {"24": "3", "25": "4", "8,p,8,p,8": "1,p,1,p,1"}


def test_all_arms_get_the_same_split_draws_steps_and_learning_rates(folder, tmp_path, monkeypatch):
    """The arms of study A as they are, except that data and schedules are small."""
    monkeypatch.setenv("PA_DATA", str(tmp_path / "data"))
    orders, real = [], train.batches

    def watching(n, **keywords):
        made = list(real(n, **keywords))
        orders.append((n, [batch.tolist() for batch in made]))
        return made

    monkeypatch.setattr(train, "batches", watching)
    small = {"dataset": "folder", "data_dir": str(folder), "folds": 5, "train_fraction": 1.0, "batch_size": 16}
    small |= {"seed": 1, "runs_dir": str(tmp_path / "runs")}
    seen = {}
    for path in sorted((FOLDER / "a").glob("*.yaml")):
        e = Experiment.from_mapping(read_yaml(path))
        orders.clear()
        run = experiment.run(e.replace(schedule=SHORT[e.schedule], **small), **QUIET)
        seen[path.stem] = {name: run.manifest[name] for name in ("split_digest", "batch_size")}
        seen[path.stem] |= {
            "n_train": run.summary["n_train"],
            "lr": run.metrics["lr"].tolist(),
            "sizes": [[len(batch) for batch in batches] for _, batches in orders],
            "order": [b for n, b in orders if n == 128],
            "dose": (run.summary["proxy_images"], run.summary["masked_share"]),
        }
    longer, plain = seen.pop("plain_longer"), seen["plain"]
    assert longer["split_digest"] == plain["split_digest"] and len(longer["sizes"]) == 4
    assert longer["order"][:3] == plain["order"]
    for name, arm in seen.items():
        for what in ("split_digest", "batch_size", "n_train", "lr", "sizes"):
            assert arm[what] == plain[what], f"{name} differs in {what}"
        if name not in ("append", "duplicates"):  # there an epoch draws as many of more
            assert arm["order"] == plain["order"], name
    assert seen["append"]["order"] == seen["duplicates"]["order"] == plain["order"][:1]
    dose = [arm["dose"] for arm in seen.values() if arm["dose"][1]]
    assert len(dose) == 9 and set(dose) == {(2 * 26, 0.25)}


def test_a_rectangle_has_the_dose_of_the_other_masks():
    model = create("test_resnet", classes=4, image_size=32)
    maps = heatmaps(model, torch.rand(40, 3, 32, 32), method="rectangle", ids=[str(i) for i in range(40)], seed=5)
    mask = masking.region(maps, threshold_mode="quantile", threshold=0.75)
    assert (mask.flatten(1).sum(1) == 256).all()
    heights, widths = mask.any(2).sum(1), mask.any(1).sum(1)
    # a rectangle, of which the last side may be thinned so that the share is exact
    assert (heights * widths >= 256).all() and (heights * widths - 256 <= 2 * torch.maximum(heights, widths)).all()
    assert len({tuple(m.flatten().tolist()) for m in mask}) >= 38
    assert (heights > 1.5 * widths).any() and (widths > 1.5 * heights).any()


def write(path: Path, **content) -> str:
    arms = {"plain": {"schedule": "2"}, "masked": {"schedule": "1,p,1"}}
    content = {"question": "?", "reference": "plain", "seeds": 2, "arms": arms} | content
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


PLAIN = {"plain": {"schedule": "2"}}
REFUSED = [
    (
        {"arms": PLAIN | {"other": {"schedule": "2", "lr": 0.01}}},
        ["other.lr=0.01", "0.001 as in the reference", "may_d"],
    ),
    ({"arms": PLAIN | {"longer": {"schedule": "3"}}}, ["longer.schedule='3'", "2 epochs", "other_length"]),
    ({"contrasts": ["masked - plane"]}, ["arm='plane'", "did you mean 'plain'"]),
    ({"contrasts": ["masked - plain"], "seeds": 25}, ["seeds=25", "at most 24"]),
    ({"described": ["masked - plane"]}, ["arm='plane'", "did you mean 'plain'"]),
    ({"contrasts": ["masked"]}, ["x: contrasts.0='masked'", "a list such as [salient - permuted]"]),
    ({"reference": "nobody"}, ["nobody", "masked, plain"]),
    ({"seeds": [0, 1]}, ["x: seeds=[0, 1]", "whole number"]),
    ({"seeds": True}, ["x: seeds=True", "whole number"]),
    ({"seeds": None}, ["x: seeds=None", "whole number"]),
    ({"seed": 3}, ["x: seed=3", "did you mean 'seeds'"]),
    ({"arms": PLAIN | {"odd": {"treshold": 1}}}, ["x: arms.odd.treshold=1", "did you mean 'threshold'"]),
    ({"datasets": ["one", "two"]}, ["x: arms.plain", "one set of parameters for each"]),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_unequal_terms_and_slips_are_refused(tmp_path, changes, words):
    with pytest.raises(ParameterError) as error:
        study.read(write(tmp_path / "x.yaml", **changes))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_may_differ_is_said_in_the_file(tmp_path):
    arms = PLAIN | {"other": {"schedule": "3", "lr": 0.01}}
    read = study.read(write(tmp_path / "x.yaml", arms=arms, may_differ=["lr"], other_length=["other"]))
    assert len(read.sweep.jobs) == 4
    with pytest.raises(ParameterError, match="invalid study='aa': must be one of a, "):
        study.read("aa")


# Runs -> tables -> figures


def table(read: study.Study, *, effect: float = 0.02) -> pd.DataFrame:
    """What the sweep of a study would return."""
    for job in read.sweep.jobs:
        job.status = sweep.FINISHED
    frame = sweep.table(read.sweep)
    noise = np.random.default_rng(0).normal(0, 0.004, len(frame))
    frame["test_accuracy"] = 0.8 + 0.01 * frame["seed"] + noise + effect * frame["arm"].str.contains("salient|masked")
    frame["reported_accuracy"] = np.where(frame["protocol"] == "clean", np.nan, frame["test_accuracy"] + 0.1)
    frame["digest"] = [f"{i:064x}" for i in range(len(frame))]
    frame["split_digest"] = [f"split {seed}" for seed in frame["seed"]]
    fixed = {"run": "somewhere", "data_digest": "d", "device_name": "CPU"}
    return frame.assign(**fixed, proxy_seconds=1.0, train_seconds=18.0, epochs=18)


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, check_dtype=False, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["a", "c", "e"])
def test_the_published_tables_follow_from_the_published_runs(name, tmp_path):
    read = study.read(name)
    made = study.publish(read, study.collect(read, table(read)), folder=str(tmp_path))
    runs = pd.read_csv(tmp_path / f"study_{name}_runs.csv")
    assert list(runs.columns) == [*statistics.RUN_COLUMNS, "schema", "code_version"]
    assert set(runs["schema"]) == {SCHEMA} and set(runs["code_version"]) == {code_version()}
    for stem, recomputed in study.tables(read, runs).items():
        same(recomputed, pd.read_csv(tmp_path / f"{stem}.csv"))
        for ending in ("png", "svg", "csv", "json"):
            assert (tmp_path / f"{stem}.{ending}").stat().st_size
    assert [path.stem for path in made] == [f"study_{name}"] + ["study_c_decomposition"] * (name == "c")


def test_a_study_says_what_it_found():
    read = study.read("a")
    made = study.tables(read, study.collect(read, table(read)))["study_a"].set_index(["metric", "arm", "against"])
    row = made.loc["test_accuracy", "salient", "shuffled"]
    assert row["n"] == 20 and row["declared"] and row["low"] < 0.02 < row["high"] and row["verdict"] == "higher"
    assert row["p_holm"] >= row["p_value"] and row["p_value"] < 0.001
    assert made.loc["test_accuracy", "cutmix", "plain"]["n"] == 10
    assert made.loc["proxy_epochs", "salient", "plain"][["p_value", "verdict"]].isna().all()
    for name in ("p_value", "p_holm", "verdict"):
        assert made[name].notna().sum() == 3
    row = made.loc["test_accuracy", "random images salient", "random images shuffled"]
    assert row["n"] == 10 and row["low"] < row["difference"] < row["high"]


def test_a_study_that_is_not_complete_tests_nothing():
    """Else a family would shrink with what is missing, or be looked at until it fits."""
    read = study.read("a")
    runs = study.collect(read, table(read))
    for missing in (runs["arm"] == "random erasing", (runs["arm"] == "salient") & (runs["seed"] == 19)):
        made = study.tables(read, runs[~missing])["study_a"]
        assert made[["p_value", "p_holm", "verdict"]].isna().all(axis=None) and made["difference"].notna().any()


def test_runs_that_are_no_pairs_or_not_there_make_no_table(tmp_path):
    read = study.read(write(tmp_path / "x.yaml"))
    frame = table(read)
    with pytest.raises(RunError, match="differ in split_digest"):
        study.collect(read, frame.assign(split_digest=["a", "b", "a", "c"]))
    with pytest.raises(RunError, match="1 of 4 runs have not finished"):
        study.collect(read, frame.assign(status=[*frame["status"][:3], sweep.FAILED]))
    runs = study.collect(read, frame)
    for name in ("schema", "code_version"):
        with pytest.raises(RunError, match=f"differ in {name}"):
            study.tables(read, runs.assign(**{name: ["x", *["y"] * (len(runs) - 1)]}))


COMMITTED = sorted((home() / "figures").glob("study_*_runs.csv"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_committed_study_follows_from_its_committed_runs(path):
    read = study.read(path.stem.removeprefix("study_").removesuffix("_runs"))
    for stem, recomputed in study.tables(read, pd.read_csv(path)).items():
        same(recomputed, pd.read_csv(path.with_name(f"{stem}.csv")))


def test_one_parameter_at_a_time_has_a_panel_each_around_the_same_arm():
    read = study.read("f")
    made = study.tables(read, study.collect(read, table(read)))["study_f"]
    figure = study.draw(read, "study_f", made)
    labels = {ax.get_title(): [label.get_text() for label in ax.get_yticklabels()] for ax in figure.axes}
    panels = {title: [text.removesuffix(" − plain  (n = 3)") for text in texts] for title, texts in labels.items()}
    assert panels == {
        "threshold": ["0", "0.5", "0.75", "0.9"],
        "weight": ["0.5", "1"],
        "fraction": ["0.05", "0.2", "0.5"],
        "schedule": ["8,p,8,p,8", "4,p,4,p,4,p,4,p,4,p,4"],
        "fill": ["mean", "zero", "blur", "blend"],
    }
    salient = made[(made["arm"] == "salient") & (made["metric"] == "test_accuracy")].iloc[0]
    for ax in figure.axes:
        drawn = list(ax.collections[-1].get_offsets()[:, 0])
        assert any(value == pytest.approx(100 * salient["difference"]) for value in drawn), ax.get_title()
        assert len(drawn) == len(panels[ax.get_title()])


def test_a_study_is_drawn_as_far_as_its_runs_have_finished(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PA_RUNS", str(tmp_path / "runs"))
    file = {
        "base": {"dataset": "folder", "data_dir": str(folder), "batch_size": 16, "protocol": "thesis_text"},
        "datasets": ["Noise"],
        "contrasts": ["masked - plain"],
        "decomposition": [{"arm": "masked", "unmasked": "plain", "honest": "plain"}],
        "other_length": ["masked"],
    }
    read = study.read(write(tmp_path / "some.yaml", **file))
    empty = study.tables(read, study.so_far(read))
    assert [len(made) for made in empty.values()] == [0, 0]
    for name, made in empty.items():
        assert "no " in study.draw(read, name, made).axes[0].texts[0].get_text()
    for job in read.sweep.jobs[:3]:
        experiment.run(job.experiment, **QUIET)
    made = study.tables(read, study.so_far(read))["study_some"].set_index(["metric", "arm"])
    rows = made.loc["test_accuracy"]
    assert dict(rows["n"]) == {"plain": 2, "masked": 1} and rows["dataset"].unique() == ["Noise"]
    assert rows[["p_value", "verdict"]].isna().all(axis=None)
    monkeypatch.setattr(study, "read", lambda _name: read)
    _, shown = study.show("study_some", source="runs")
    same(shown.set_index(["metric", "arm"]), made)
    _, elsewhere = study.show("study_some", source="runs", runs_dir=str(tmp_path / "other"))
    assert elsewhere.empty
    sweep.look_up(read.sweep)
    with pytest.raises(RunError, match="1 of 4 runs have not finished"):
        study.collect(read, sweep.table(read.sweep))
    monkeypatch.setattr(results, "code_version", lambda: "other code")  # as after a change of pa_core
    assert set(results.load()["stale"]) == {True}


def test_what_is_shown_is_what_is_committed(tmp_path, monkeypatch):
    read = study.read("a")
    monkeypatch.setattr(study, "home", lambda: tmp_path)
    monkeypatch.setattr(study, "read", lambda _name: read)
    monkeypatch.setattr(study, "names", lambda: ["a"])
    (tmp_path / "figures").mkdir()
    figure, shown = study.show("study_a")
    assert shown.empty and "no two arms" in figure.axes[0].texts[0].get_text() and study.declared().empty
    study.publish(read, study.collect(read, table(read)), folder=str(tmp_path / "figures"))
    _, shown = study.show("study_a")
    same(shown, pd.read_csv(tmp_path / "figures" / "study_a.csv"))
    found = study.declared()
    contrasts = ["salient - shuffled", "salient - plain", "salient - random erasing"]
    assert list(found["contrast"]) == contrasts and (found["n"] == 20).all()
    first = found.iloc[0]
    assert first["difference"] == pytest.approx(100 * shown[shown["declared"]]["difference"].iloc[0])
    assert first["low"] < first["difference"]
    with pytest.raises(ParameterError, match="invalid studies='commited'.*did you mean 'committed'"):
        study.show("study_a", source="commited")
