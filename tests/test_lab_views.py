"""Figures and opened runs: what is drawn is what was measured, and a run opens as it was tested."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from pa_core import data, experiment, proxy
from pa_core.errors import ParameterError, RunError
from pa_core.experiment import prepare
from pa_core.files import home
from pa_core.lab import explore, figures, results, statistics
from pa_core.params import FILLS, Experiment

TINY = {"train_fraction": 0.02, "folds": 50, "device": "cpu", "batch_size": 16, "fraction": 0.5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A runs folder with a plain run and one with proxies."""
    folder = tmp_path_factory.mktemp("trained")
    for schedule in ("2", "1,p,1"):
        settings = TINY | {"schedule": schedule, "runs_dir": str(folder)}
        experiment.run(Experiment(**settings), log=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def pair(trained):
    return results.pair_of(results.load(str(trained)), None, str(trained))


@pytest.fixture(scope="module")
def opened(pair):
    return explore.reopen(pair[1])


# Runs opened again


def test_a_plain_run_is_found_for_the_one_with_proxies(trained, pair):
    frame = results.load(str(trained)).set_index("run")
    assert not frame["stale"].any() and len(frame) == 2
    assert [frame["schedule"][run.path.name] for run in pair] == ["2", "1,p,1"]
    paired = results.pairs(results.load(str(trained)))
    for name in ("test_accuracy", "balanced_accuracy"):
        assert paired[name][0] == pair[1].summary[name] and paired[f"plain_{name}"][0] == pair[0].summary[name]
    table = results.class_changes(*pair)
    assert table["recall_proxy"].mean() == pytest.approx(pair[1].summary["balanced_accuracy"])


def test_tensorboard_compares_the_runs_over_the_same_folder(trained):
    from tensorboard.backend.event_processing import data_provider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(trained)).Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(trained))
    context, request = backend_context.Context(base_plugin.TBContext(data_provider=provider)), RequestContext()
    statuses = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN]
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, allowed_statuses=statuses, include_metrics=True
    )
    asked.col_params.add(metric=api_pb2.MetricName(tag="hparam/test_accuracy"))
    groups = list_session_groups.Handler(request, context, "", asked).run().session_groups
    found = {
        group.hparams["schedule"].string_value: value.value
        for group in groups
        for value in group.metric_values
        if value.name.tag == "hparam/test_accuracy"
    }
    assert found == pytest.approx(results.load(str(trained)).set_index("schedule")["test_accuracy"].to_dict())


def test_a_run_opens_again_as_the_classifier_that_was_tested(trained):
    run = results.open_run(results.load(str(trained))["run"][0], str(trained))
    model = run.model()
    part = data.load(**{k: getattr(run.experiment, k) for k in DATA}).test
    with torch.inference_mode():
        guessed = model(part.read(torch.arange(64)).float() / 255).argmax(1)
    names = run.manifest["classes"]
    assert [names[i] for i in guessed.tolist()] == list(run.predictions["predicted"][:64])


DATA = ("dataset", "data_dir", "bad_images", "image_size", "train_fraction", "folds", "fold", "seed")


def test_the_worst_images_come_first_and_proxies_explain_only_those_shown(pair):
    opened = explore.reopen(pair[1], dataset=prepare(pair[1].experiment).dataset)
    before = opened.dataset.train.reads
    made = opened.proxies(count=4)
    assert opened.dataset.train.reads - before == 2 * 4  # explained, masked; of 80
    ids = [opened.dataset.train.ids[i] for i in proxy.Step.load(pair[1].step(1)).positions[:4].tolist()]
    assert ids == list(pair[1].proxies(1)["id"][:4])
    assert torch.equal(made.originals, opened.dataset.train.read(proxy.Step.load(pair[1].step(1)).positions[:4]))
    assert made.mask.float().mean((1, 2)).tolist() == pytest.approx([0.25] * 4, abs=0.01)
    positions, scores = opened.worst(count=5)
    assert scores.loss[positions].tolist() == sorted(scores.loss.tolist(), reverse=True)[:5]
    replayed = explore.reopen(pair[1], pair[1].experiment.replace(protocol="thesis"), dataset=opened.dataset)
    positions, scores = replayed.worst(count=5)  # the predecessor chooses wrong ones at random, whatever select says
    assert len(positions) == 5 and (scores.predicted[positions] != scores.labels[positions]).all()
    other = explore.reopen(pair[1], pair[1].experiment.replace(fill="blur"))
    assert torch.equal(other.proxies(count=4).mask, made.mask)
    assert not torch.equal(other.proxies(count=4).images, made.images)


def test_a_plain_run_shows_what_its_network_would_make(pair):
    plain = explore.reopen(pair[0])
    made = plain.proxies(count=3)
    assert torch.equal(made.originals, plain.dataset.train.read(plain.worst(count=3)[0])) and made.mask.any()


def test_a_stored_step_is_shown_as_it_was_made(pair, opened):
    made, titles = explore.stored_proxies(pair[1], opened.dataset, step=1, count=5)
    stored = proxy.Step.load(pair[1].step(1))
    rows = pair[1].proxies(1)
    assert len(made.images) == len(titles) == 5 and titles[0].startswith(opened.dataset.classes[rows["label"][0]])
    assert torch.equal(made.originals, opened.dataset.train.read(stored.positions[:5]))
    assert made.mask.float().mean((1, 2)).tolist() == pytest.approx(rows["masked_share"][:5].tolist())
    assert torch.equal(made.images.eq(made.originals) | made.mask[:, None], torch.ones_like(made.images).bool())
    assert explore.stored_proxies(pair[0], opened.dataset) == (None, [])


def test_a_run_is_not_opened_on_other_data(pair):
    with pytest.raises(RunError, match="was trained on other data than fashion_mini holds now"):
        explore.reopen(pair[1], pair[1].experiment.replace(seed=5))


def test_two_runs_are_compared_on_ones_own_images(pair, tmp_path):
    part = data.load(**{k: getattr(pair[0].experiment, k) for k in DATA}).test
    (tmp_path / "sub").mkdir()
    for k, image in enumerate(part.read(torch.arange(3))):
        Image.fromarray(image[0].numpy()).resize((40 + k, 50)).save(tmp_path / "sub" / f"{k}.png")
    (tmp_path / "notes.txt").write_text("no image")
    named = {"plain": pair[0], "with proxies": pair[1]}
    before = torch.get_rng_state()
    images, maps, table = explore.compare(named, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(table["image"].unique()) == ["sub/0.png", "sub/1.png", "sub/2.png"] and set(maps) == set(named)
    for name, run in named.items():
        assert maps[name].shape == (3, 28, 28) and 0 <= maps[name].min() <= maps[name].max() <= 1
        assert images[name].shape == (3, 3, 28, 28) and images[name].dtype == torch.uint8
        model = run.model()
        with torch.inference_mode():
            expected = model(images[name].float() / 255).softmax(1).max(1)
        rows = table[table["run"] == name]
        assert list(rows["predicted"]) == [run.manifest["classes"][i] for i in expected.indices.tolist()]
        assert np.allclose(rows["confidence"], expected.values.numpy(), atol=1e-5)
    figure, drawn = figures.compared(images, maps, table)
    assert len(figure.axes) == 3 * 3 and len(drawn) == 6
    (tmp_path / "none").mkdir()
    for missing in ("none", "nowhere"):
        with pytest.raises(ParameterError, match="invalid images=.*must be an image, or a folder with images"):
            explore.compare(named, tmp_path / missing)
    assert len(explore.compare(named, part, count=2)[2]) == 2 * 2


def test_side_by_side_has_every_number_of_the_summaries(pair):
    table = explore.side_by_side({"plain": pair[0], "with proxies": pair[1]})
    assert {"test_accuracy", "balanced_accuracy", "proxy_images", "masked_share"} <= set(table.index)
    assert table["plain"]["proxy_images"] == 0 < table["with proxies"]["proxy_images"]


# Figures


def test_the_figures_of_runs_draw_what_was_measured(trained, pair, opened, tmp_path):
    frame, dataset = results.load(str(trained)), opened.dataset
    figure, table = figures.curves({"plain": pair[0], "with proxies": pair[1]})
    assert len(table) == 4 and len(figure.axes) == 3
    colours = {line.get_label(): line.get_color() for line in figure.axes[1].lines}
    assert colours["plain"] == figures.PLAIN and colours["with proxies"] == figures.PROXIED
    figure, table = figures.with_and_without(results.pairs(frame))
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [
        [pair[0].summary["test_accuracy"], pair[1].summary["test_accuracy"]]
    ]
    figure, table = figures.accuracy_by(frame)
    assert list(table["parameter"]) == ["schedule", "schedule", "xai", "threshold", "weight", "fraction"]
    for drawn in (figures.samples(dataset, per_class=3), figures.class_balance(dataset)):
        assert len(drawn[1])
    figure, table = figures.augmented(dataset, Experiment(augment="flip,crop", seed=3), columns=4, draws=2)
    assert len(table) == 8 and (table["changed_pixels"] > 0).any() and len(figure.axes) == 12
    unchanged = figures.augmented(dataset, Experiment(augment="none"), columns=4, draws=1)[1]
    assert (unchanged["changed_pixels"] == 0).all()
    positions, scores = opened.worst(count=10)
    table = figures.worst(dataset.train, scores, positions, dataset.classes)[1]
    assert list(table["id"]) == [dataset.train.ids[i] for i in positions.tolist()]
    assert figures.worst(dataset.train, scores, positions[:0], dataset.classes)[1].empty


def test_the_figures_of_proxies(opened):
    made = opened.proxies(count=3)
    figure, table = figures.proxies(made, ["$a\nb", "c", "d"])
    assert table["masked_share"].tolist() == pytest.approx(made.mask.float().mean((1, 2)).tolist())
    assert len(figure.axes) == 12 and table["image"][0] == "$a b"
    assert (figures.proxies(made)[1]["changed_share"] <= table["masked_share"]).all()
    assert figures.proxies(None)[1].empty
    figure, table = figures.fills(made)
    assert len(figure.axes) == 3 * (len(FILLS) + 1) and set(table["fill"]) == set(FILLS)
    change = table.groupby("fill")["mean_change"].mean()
    assert change["none"] == 0 < change["mean"]
    table = figures.threshold_by_weight(made)[1]
    shares = table.groupby("threshold")["masked_share"].first()
    assert shares.to_dict() == pytest.approx({0.25: 0.75, 0.5: 0.5, 0.75: 0.25, 0.9: 0.1}, abs=0.001)
    assert (table[table["weight"] == 0]["mean_change"] == 0).all()
    figures.fills(proxy.Proxies(**{name: getattr(made, name)[:0] for name in ("originals", "maps", "mask", "images")}))


def test_the_figures_of_classes():
    names = [f"class {i}" for i in range(40)]
    matrix = pd.DataFrame(np.eye(40, dtype=int) * 3, index=names, columns=names)
    for size in (5, 40):
        figure, table = figures.confusion(matrix.iloc[:size, :size])
        assert len(table) == size**2 and len(figure.axes[0].texts) == (5 if size == 5 else 0)
    change = np.linspace(0.2, -0.2, 40)
    changes = pd.DataFrame(
        {"class": names, "f1_plain": 0.5, "f1_proxy": 0.5 + change, "support": 3, "f1_change": change}
    )
    figure, table = figures.class_changes(changes)
    drawn = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(drawn) == 10 and drawn[-1] == "class 0  (+20.0, n = 3)" and len(table) == 40


def test_the_figures_of_studies():
    generator = np.random.default_rng(0)
    rows = [
        ("x", "d", "m", arm, seed, metric, generator.normal(0.5, 0.1), f"{arm}{seed}")
        for arm in ("plain", "one", "two")
        for seed in range(10)
        for metric in ("test_accuracy", "reported_accuracy")
    ]
    runs = pd.DataFrame(rows, columns=statistics.RUN_COLUMNS)
    table = statistics.compare(runs, reference="plain", declared=[statistics.Contrast.parse("one - two")])
    figure, shown = figures.forest(table)
    dots = figure.axes[0].collections[-1]
    assert list(dots.get_offsets()[:, 0]) == pytest.approx(list(100 * shown["difference"])) and len(shown) == 3
    colours = [to_hex(colour) for colour in dots.get_facecolors()]
    assert [c == figures.DECLARED for c in colours] == list(shown["declared"])
    assert any("within 0.5 points" in text.get_text() for text in figure.legends[0].get_texts())
    plain, values = shown[shown["against"] == "plain"], {"lr": {"one": "0.1", "two": "0.2"}, "fill": {"one": "mean"}}
    figure, _ = figures.forest(plain, around="one", values=values)
    drawn = [list(ax.collections[-1].get_offsets()[:, 0]) for ax in figure.axes]
    points = 100 * plain.set_index("arm")["difference"]
    assert drawn[0] == pytest.approx([points["one"], points["two"]]) and drawn[1] == pytest.approx([points["one"]])
    parts = statistics.decompose(runs, [{"arm": "two", "unmasked": "one", "honest": "plain"}])
    figure, _ = figures.decomposition(parts)
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx(list(100 * parts["mean"]))
    for draw in (figures.forest, figures.decomposition):
        figure, empty = draw(table[:0] if draw is figures.forest else parts[:0])
        assert empty.empty and figure.axes[0].texts


def test_an_album_keeps_figure_data_and_provenance(pair, tmp_path):
    album = figures.Album(figures_dir=str(tmp_path / "figures"), command="papermill x")
    figure, table = figures.curves({"plain": pair[0]})
    path = album.save(figure, "curves", table=table, used=[pair[0], None, pair[1]])
    assert path == tmp_path / "figures" / "curves.png" and Image.open(path).size[0] > 500
    first = path.with_suffix(".svg").read_bytes()
    album.save(figures.curves({"plain": pair[0]})[0], "curves", table=table, used=pair)
    assert path.with_suffix(".svg").read_bytes() == first  # the same figure, the same file
    assert len(pd.read_csv(path.with_suffix(".csv"))) == len(table)
    content = json.loads(path.with_suffix(".json").read_text())
    assert [run["run"] for run in content["runs"]] == [pair[0].path.name, pair[1].path.name]
    assert content["code_versions"] == [pair[0].manifest["code_version"]] and content["command"] == "papermill x"
    assert figures.Album(command="").folder == home() / "figures/quick"
    (tmp_path / "file").write_text("")
    with pytest.raises(ParameterError, match="invalid figures_dir=.*must be a writable folder"):
        figures.Album(figures_dir=str(tmp_path / "file" / "x"), command="")
