"""Results: one tidy table, read again only where something changed; best-of, pivot and LaTeX tables; runs compared."""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pa_core import data, experiment, figures, results
from pa_core.params import Experiment, ParameterError, home
from pa_core.runs import Run, RunError, write_json

TINY = {"train_fraction": 0.02, "folds": 50, "device": "cpu", "batch_size": 16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A runs folder with a plain run and one with proxies."""
    folder = tmp_path_factory.mktemp("trained")
    for schedule in ("2", "1,p,1"):
        settings = TINY | {"schedule": schedule, "runs_dir": str(folder)}
        experiment.run(Experiment(**settings), log=lambda _: None)
    return folder


def made(home: Path, number: int, *, finished: bool = True, **parameters: object) -> Path:
    """A run's directory, as far as tables read it."""
    e = Experiment(seed=number, **parameters)
    path = home / f"run_{number:04}"
    path.mkdir(parents=True)
    content = {"digest": f"{number:064x}", "parameters": e.to_dict(), "status": "finished" if finished else "running"}
    content |= {"started": f"2025-01-01T00:{number // 60 % 60:02}:{number % 60:02}+00:00", "code_version": "0" * 16}
    content |= dict.fromkeys(["split_digest", "data_digest", "device_name", "precision"], "x")
    content |= {"image_size": 28, "batch_size": 64}
    if finished:
        write_json(
            path / "summary.json", dict.fromkeys(results.MEASURED, 0.5) | {"test_accuracy": number / 1000, "epochs": 2}
        )
    rows = [{"epoch": k, "stage": 0, "train_loss": 1 / k, "val_accuracy": k / 10} for k in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(path / "manifest.json", content)
    return path


def age(home: Path) -> None:
    """As if nothing had been written for a while."""
    for file in home.glob("*/*"):
        os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns - 10**10))


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The runs that are read, in order."""
    seen: list[str] = []
    real = results._row
    monkeypatch.setattr(results, "_row", lambda path: seen.append(path.name) or real(path))
    return seen


def test_a_tidy_row_per_run(tmp_path):
    for number in range(300):
        made(tmp_path, number, finished=number % 3 > 0, schedule="1,p,1" if number % 2 else "2", threshold=number / 300)
    frame = results.load(str(tmp_path))
    assert len(frame) == 300 and frame["run"].is_monotonic_increasing
    assert (frame["status"] == "running").sum() == 100 and frame["test_accuracy"].isna().sum() == 100
    assert frame["threshold"][30] == 0.1 and list(frame["proxy_steps"][:4]) == [0, 1, 0, 1]
    assert frame["stale"].all() and frame["seed"].dtype == np.int64 and "code_version" not in frame
    assert set(results.PARAMETERS) | set(results.MEASURED) <= set(frame.columns)


def test_only_what_changed_is_read_again_and_the_table_is_the_same(tmp_path, counted):
    for number in range(40):
        made(tmp_path, number, finished=number != 7)
    age(tmp_path)
    first = results.load(str(tmp_path))
    assert len(counted) == 40
    pd.testing.assert_frame_equal(results.load(str(tmp_path)), first)
    assert len(counted) == 40
    shutil.rmtree(tmp_path / "run_0003")
    manifest = json.loads((tmp_path / "run_0007/manifest.json").read_text())
    write_json(tmp_path / "run_0007/summary.json", dict.fromkeys(results.MEASURED, 0.25))
    write_json(tmp_path / "run_0007/manifest.json", manifest | {"status": "finished"})
    made(tmp_path, 50)
    frame = results.load(str(tmp_path)).set_index("run")
    assert counted[40:] == ["run_0007", "run_0050"]
    assert (
        "run_0003" not in frame.index
        and frame["status"]["run_0007"] == "finished"
        and frame["test_loss"]["run_0007"] == 0.25
    )
    (tmp_path / ".index.json").unlink()
    pd.testing.assert_frame_equal(results.load(str(tmp_path)), frame.reset_index()[results.load(str(tmp_path)).columns])


def test_a_file_changed_within_the_clocks_grain_is_seen(tmp_path):
    """Same size, same time: what is younger than the clock can tell apart is not taken from the index."""
    path = made(tmp_path, 0) / "summary.json"
    assert results.load(str(tmp_path))["test_loss"][0] == 0.5
    before = path.stat()
    path.write_text(path.read_text().replace("0.5", "0.7"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert results.load(str(tmp_path))["test_loss"][0] == 0.7


@pytest.mark.parametrize("name", ["summary.json", "manifest.json"])
def test_a_change_of_either_file_is_seen(tmp_path, name, counted):
    path = made(tmp_path, 0) / name
    age(tmp_path)
    results.load(str(tmp_path))
    path.write_text(path.read_text().replace("0.5", "0.7").replace('"finished"', '"failed"'))
    frame = results.load(str(tmp_path))
    assert (frame["test_loss"][0], frame["status"][0]) == (
        (0.7, "finished") if name == "summary.json" else (0.5, "failed")
    )
    assert len(counted) == 2


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"\xff\xfe", b'{"columns": 3}', b'{"columns": [], "runs": {}}'])
def test_a_damaged_index_is_made_anew(tmp_path, garbage, counted):
    made(tmp_path, 0)
    age(tmp_path)
    first = results.load(str(tmp_path))
    (tmp_path / ".index.json").write_bytes(garbage)
    pd.testing.assert_frame_equal(results.load(str(tmp_path)), first)
    assert len(counted) == 2
    results.load(str(tmp_path))
    assert len(counted) == 2


def test_runs_that_lie_where_one_may_not_write_are_read(tmp_path, monkeypatch):
    made(tmp_path, 0)

    def refuse(**_keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(results.tempfile, "mkstemp", refuse)
    assert len(results.load(str(tmp_path))) == 1 and not (tmp_path / ".index.json").exists()


LOADER = """
import sys, time
from pa_core import results
end = time.monotonic() + 4
while time.monotonic() < end:
    frame = results.load(sys.argv[1])
    assert frame["status"].isin(["running", "finished"]).all() and frame["run"].is_unique
    done = frame[frame["status"] == "finished"]
    assert done["test_loss"].eq(0.5).all(), done
print(len(frame))
"""


def test_processes_load_while_others_write(tmp_path):
    made(tmp_path, 0)
    environment = os.environ | {"PYTHONPATH": str(home())}
    command = [sys.executable, "-c", LOADER, str(tmp_path)]
    loaders = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    number = 0
    while any(loader.poll() is None for loader in loaders):
        number += 1
        made(tmp_path, number, finished=bool(number % 2))
        time.sleep(0.02)
    for loader in loaders:
        printed, error = loader.communicate()
        assert loader.returncode == 0, error
        assert int(printed) > 10
    assert len(results.load(str(tmp_path))) == number + 1
    assert not list(tmp_path.glob(".index.json?*"))


def test_a_damaged_run_is_named_and_left_out(tmp_path):
    made(tmp_path, 0)
    (made(tmp_path, 1) / "manifest.json").write_text('{"digest": "12')
    with pytest.warns(UserWarning, match=r"run_0001/manifest.json is damaged .* left out"):
        assert list(results.load(str(tmp_path))["run"]) == ["run_0000"]
    with pytest.raises(RunError, match="manifest.json is damaged"):
        Run.load(tmp_path / "run_0001").manifest  # noqa: B018


def test_a_row_per_epoch(tmp_path):
    for number in range(5):
        made(tmp_path, number, lr=(number + 1) / 100)
    frame = results.load(str(tmp_path), epochs=True)
    assert len(frame) == 10 and list(frame["epoch"]) == [1, 2] * 5
    assert list(frame["lr"]) == [0.01, 0.01, 0.02, 0.02, 0.03, 0.03, 0.04, 0.04, 0.05, 0.05]
    assert list(frame["val_accuracy"]) == [0.1, 0.2] * 5 and frame.columns.is_unique
    (tmp_path / "run_0002/metrics.jsonl").write_text("garbage\n")
    with pytest.warns(UserWarning, match="run_0002/metrics.jsonl is damaged: line 1"):
        assert len(results.load(str(tmp_path), epochs=True)) == 8


def test_no_runs_no_rows(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"epochs": True}):
            frame = results.load(str(tmp_path / "none"), **options)
            assert frame.empty and {"run", "status", "stale", "schedule", "proxy_steps"} <= set(frame.columns)


# Tables


@pytest.fixture
def frame() -> pd.DataFrame:
    rows = [
        ("resnet18", "40", 0, 0.70, 0.71),
        ("resnet18", "40", 1, 0.74, 0.73),
        ("resnet18", "20,p,20", 0, 0.72, 0.75),
    ]
    rows += [("vgg_16", "40", 0, 0.60, 0.62), ("vgg_16", "40", 1, 0.99, 0.99)]
    frame = pd.DataFrame(rows, columns=["model", "schedule", "seed", "test_accuracy", "val_accuracy"])
    frame["dataset"], frame["test_loss"] = "cifar100", 1 - frame["test_accuracy"]
    frame["status"] = ["finished"] * 4 + ["failed"]
    frame["digest"], frame["run"] = list("abcde"), list("abcde")
    return frame


def test_the_best_is_of_finished_runs_and_says_of_how_many(frame):
    found = results.best(frame)
    assert list(found["run"]) == ["c", "d"] and list(found["n"]) == [3, 1]
    assert list(results.best(frame, by=["schedule"], value="test_loss")["run"]) == ["c", "b"]
    with pytest.raises(ParameterError, match="value = 'val_acuracy'.*did you mean 'val_accuracy'"):
        results.best(frame, value="val_acuracy")
    with pytest.raises(ParameterError, match="by = 'modle'"):
        results.best(frame, by=["modle"])


def test_a_pivot_has_mean_deviation_and_number(frame):
    table = results.pivot(frame)
    cell = table.loc[("cifar100", "resnet18"), "40"]
    assert cell["mean"] == pytest.approx(0.72) and cell["n"] == 2
    assert cell["sd"] == pytest.approx(0.04 / 2**0.5)  # of two, with n - 1
    single = table.loc[("cifar100", "resnet18"), "20,p,20"]
    assert single["n"] == 1 and np.isnan(single["sd"])
    assert table.loc[("cifar100", "vgg_16"), "20,p,20"].isna().all()
    assert table.columns.tolist() == [(s, k) for s in ("20,p,20", "40") for k in ("mean", "sd", "n")]
    rerun = frame.iloc[[0]].assign(run="a~2")  # is no second sample
    again = results.pivot(pd.concat([frame, rerun], ignore_index=True))
    pd.testing.assert_frame_equal(again, table)


def test_a_pivot_over_two_columns(frame):
    table = results.pivot(frame, rows=["dataset"], columns=["model", "schedule"], value="val_accuracy")
    assert table.loc["cifar100", ("resnet18", "40", "mean")] == pytest.approx(0.72)
    assert "resnet18 / 40" in results.latex(table)


LATEX = r"""\begin{table}
\centering
\caption{Accuracy (\%)}
\label{tab:one}
\begin{tabular}{llrr}
\toprule
dataset & model & 20,p,20 & 40 \\
\midrule
cifar100 & resnet18 & 72.0 (n = 1) & 72.0 $\pm$ 2.8 (n = 2) \\
cifar100 & vgg\_16 & -- & 60.0 (n = 1) \\
\bottomrule
\end{tabular}
\end{table}
"""


def test_the_latex_of_a_pivot(frame):
    assert results.latex(results.pivot(frame), caption="Accuracy (%)", label="tab:one") == LATEX


# Runs opened again


def test_tensorboard_compares_the_runs_over_the_same_folder(trained):
    from tensorboard.backend.event_processing import data_provider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(trained)).Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(trained))
    context, request = backend_context.Context(base_plugin.TBContext(data_provider=provider)), RequestContext()
    found = get_experiment.Handler(request, context, "", api_pb2.GetExperimentRequest(include_metrics=True)).run()
    statuses = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN]
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, allowed_statuses=statuses, include_metrics=True
    )
    for metric in found.metric_infos:
        asked.col_params.add(metric=metric.name)
    groups = list_session_groups.Handler(request, context, "", asked).run().session_groups
    assert {group.hparams["schedule"].string_value for group in groups} == {"2", "1,p,1"}
    assert "hparam/test_accuracy" in {metric.name.tag for metric in found.metric_infos}
    frame = results.load(str(trained)).set_index("schedule")
    for group in groups:
        values = {value.name.tag: value.value for value in group.metric_values}
        assert values["hparam/test_accuracy"] == pytest.approx(
            frame["test_accuracy"][group.hparams["schedule"].string_value]
        )


def test_a_run_opens_again_as_the_classifier_that_was_tested(trained):
    run = results.open_run(results.load(str(trained))["run"][0], str(trained))
    model = run.model()
    part = data.load(dataset="fashion_mini").test
    with torch.inference_mode():
        guessed = model(part.read(torch.arange(64)).float() / 255).argmax(1)
    names = run.manifest["classes"]
    assert [names[i] for i in guessed.tolist()] == list(run.predictions["predicted"][:64])


def test_two_runs_are_compared_on_ones_own_images(trained, tmp_path):
    part = data.load(dataset="fashion_mini").test
    for k, image in enumerate(part.read(torch.arange(3))):
        Image.fromarray(image[0].numpy()).resize((40 + k, 50)).save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("no image")
    opened = {name: results.open_run(name, str(trained)) for name in results.load(str(trained))["run"]}
    before = torch.get_rng_state()
    shown = experiment.compare(opened, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert shown.names == ("0.png", "1.png", "2.png") and set(shown.maps) == set(opened)
    for name, run in opened.items():
        assert shown.maps[name].shape == (3, 28, 28) and 0 <= shown.maps[name].min() <= shown.maps[name].max() <= 1
        assert shown.images[name].shape == (3, 3, 28, 28) and shown.images[name].dtype == torch.uint8
        model = run.model()
        with torch.inference_mode():
            expected = model(shown.images[name].float() / 255).softmax(1).max(1)
        rows = shown.table[shown.table["run"] == name]
        assert list(rows["predicted"]) == [run.manifest["classes"][i] for i in expected.indices.tolist()]
        assert np.allclose(rows["confidence"], expected.values.numpy(), atol=1e-5)
    figure, table = figures.compared(shown)
    assert len(figure.axes) == 3 * 3 and len(table) == 6
    with pytest.raises(ParameterError, match="images = .*allowed is a folder with images, or an image"):
        experiment.compare(opened, tmp_path / "none")
    (tmp_path / "none").mkdir()
    with pytest.raises(ParameterError, match="images"):
        experiment.compare(opened, tmp_path / "none")


# Arms, paired by seed


def swept(**changes: object) -> pd.DataFrame:
    """What a sweep of two arms with three seeds returns, as far as it is compared."""
    rows = []
    for arm, accuracies in {"plain": (0.50, 0.60, 0.70), "proxies": (0.52, 0.61, 0.73)}.items():
        for seed, accuracy in enumerate(accuracies):
            shared = {
                "dataset": "d",
                "model": "m",
                "split_digest": f"split {seed}",
                "data_digest": "x",
                "device_name": "CPU",
            }
            measured = {
                "test_accuracy": accuracy,
                "reported_accuracy": np.nan,
                "proxy_seconds": 2.0 * (arm == "proxies"),
                "train_seconds": 40.0,
            }
            rows.append(
                {"arm": arm, "seed": seed, "status": "finished", "digest": f"{arm} {seed}", "epochs": 20}
                | shared
                | measured
            )
    return pd.DataFrame(rows).assign(**changes)


def test_arms_of_a_sweep_are_compared_by_seed():
    table = results.compare(swept(), reference="plain", declared=["proxies - plain"]).set_index(["metric", "arm"])
    row = table.loc["test_accuracy", "proxies"]
    # differences 0.02, 0.01, 0.03: mean 0.02, sd 0.01, t(0.975, 2) = 4.302653
    assert row["n"] == 3 and row["mean"] == pytest.approx(0.62) and row["difference"] == pytest.approx(0.02)
    assert (row["low"], row["high"]) == pytest.approx(
        (0.02 - 4.302653 * 0.01 / 3**0.5, 0.02 + 4.302653 * 0.01 / 3**0.5), abs=1e-6
    )
    assert row["declared"] and row["verdict"] == "too few pairs" and np.isnan(row["p_value"])
    assert table.loc["proxy_epochs", "proxies"]["mean"] == 1.0  # 2 s of proxy steps, and an epoch takes 2 s
    assert "reported_accuracy" not in table.index.get_level_values("metric")


def test_a_rerun_is_no_second_sample_and_an_unfinished_run_is_none():
    frame = swept()
    more = pd.concat([frame, frame.tail(1), frame.tail(1).assign(status="failed", seed=9, digest="other")])
    pd.testing.assert_frame_equal(results.compare(more, reference="plain"), results.compare(frame, reference="plain"))


def test_runs_that_are_no_pairs_are_not_compared():
    with pytest.raises(RunError, match="the runs of d, seed 0, differ in split_digest"):
        results.compare(swept(split_digest=list("abcdef")), reference="plain")
    with pytest.raises(ParameterError, match="did you mean 'plain'"):
        results.compare(swept(), reference="plane")
    with pytest.raises(ParameterError, match="no such column"):
        results.compare(swept().drop(columns="arm"), reference="plain")
    with pytest.raises(ParameterError, match="stands there twice"):
        results.compare(swept(seed=[0, 0, 2, 0, 1, 2], split_digest="s"), reference="plain")
