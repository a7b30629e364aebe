"""Results: one tidy table; what may not be compared is left out and said; best-of, pivot and LaTeX; arms and pairs."""

import json
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pa_core import runs
from pa_core.errors import ParameterError, RunError
from pa_core.files import write_json
from pa_core.lab import results
from pa_core.params import PARAMETERS, PROXY_PARAMETERS, SCHEMA, Experiment


def made(home: Path, number: int, *, status: str = "finished", code: str = "", summary=None, **parameters) -> Path:
    """A run's directory, as far as tables read it."""
    e = Experiment(**{"seed": number} | parameters)
    path = home / f"run_{number:04}"
    path.mkdir(parents=True)
    identity = {"data": "data", "image_size": 28}
    content = {"schema": SCHEMA, "digest": e.digest(**identity), "parameters": e.to_dict(), "status": status}
    content |= {"started": f"2025-01-01T00:{number // 60 % 60:02}:{number % 60:02}+00:00", "image_size": 28}
    content |= {"code_version": code or runs.code_version(), "data_digest": "data", "split_digest": "split"}
    content |= {"weights_digest": "", "device_name": "CPU", "precision": "fp32", "batch_size": 64}
    if status == "finished":
        measured = {"test_accuracy": number / 1000, "val_accuracy": 0.5, "balanced_accuracy": 0.4, "epochs": 2}
        write_json(path / "summary.json", measured | (summary or {}))
    rows = [{"epoch": k, "stage": 0, "train_loss": 1 / k, "val_accuracy": k / 10} for k in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(path / "manifest.json", content)
    return path


def test_a_tidy_row_per_run(tmp_path):
    for number in range(60):
        status = "finished" if number % 3 else "running"
        schedule = "1,p,1" if number % 2 else "2"
        made(tmp_path, number, status=status, schedule=schedule, threshold=number / 60, summary={"new_metric": 3})
    (tmp_path / "notes.txt").write_text("no run")
    (tmp_path / "other").mkdir()
    frame = results.load(str(tmp_path))
    assert len(frame) == 60 and frame["run"].is_monotonic_increasing
    assert (frame["status"] == "running").sum() == 20 and frame["test_accuracy"].isna().sum() == 20
    assert frame["threshold"][6] == 0.1 and list(frame["proxy_steps"][:4]) == [0, 1, 0, 1]
    assert not frame["stale"].any() and frame["seed"].dtype == np.int64
    assert {*PARAMETERS, *results.MEASURED} <= set(frame.columns) and frame.columns.is_unique
    assert list(frame["new_metric"].dropna().unique()) == [3]  # whatever a summary measures


def test_no_runs_no_rows(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"epochs": True}):
            frame = results.load(str(tmp_path / "none"), **options)
            assert frame.empty and {"run", "status", "stale", "schedule", "proxy_steps"} <= set(frame.columns)
        assert results.pairs(results.load(str(tmp_path / "none"))).empty
        with pytest.raises(RunError, match="no run under .* was finished by this code"):
            results.pair_of(results.load(str(tmp_path)), None, str(tmp_path))


def test_ten_thousand_runs_load_in_two_seconds(tmp_path):
    paths = [made(tmp_path, 0), made(tmp_path, 1, schedule="1,p,1")]
    texts = [[(path / name).read_bytes() for name in ("manifest.json", "summary.json")] for path in paths]
    for number in range(2, 10_000):
        path = tmp_path / f"run_{number}"
        path.mkdir()
        for name, text in zip(("manifest.json", "summary.json"), texts[number % 2], strict=True):
            (path / name).write_bytes(text)
    seconds = []  # of CPU time: other processes share this machine
    for _ in range(3):
        started = time.process_time()
        assert len(results.load(str(tmp_path))) == 10_000
        seconds.append(time.process_time() - started)
    assert min(seconds) < 2, seconds


def change(path: Path, **changes) -> None:
    content = json.loads((path / "manifest.json").read_text()) | changes
    write_json(path / "manifest.json", {name: value for name, value in content.items() if value is not None})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "manifest.json").write_text('{"digest": "12'), r"1 runs are damaged.*run_0001"),
        (lambda path: (path / "summary.json").write_text("[1]"), r"1 runs are damaged.*run_0001"),
        (lambda path: change(path, digest=None), r"1 runs are damaged.*run_0001 \(manifest.json lacks 'digest'\)"),
        (lambda path: change(path, parameters=3), r"1 runs are damaged.*run_0001"),
        (lambda path: change(path, schema=None), rf"1 runs have another schema than {SCHEMA}.*run_0001"),
        (lambda path: change(path, schema=SCHEMA + 1), rf"1 runs have another schema than {SCHEMA}.*run_0001"),
    ],
)
def test_a_damaged_run_or_one_of_another_schema_is_named_and_left_out(tmp_path, damage, message):
    made(tmp_path, 0)
    damage(made(tmp_path, 1))
    with pytest.warns(UserWarning, match=message) as caught:
        assert list(results.load(str(tmp_path))["run"]) == ["run_0000"]
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_a_run_that_one_schema_1_code_left_is_left_out(tmp_path):
    """Its manifest has no schema, and other parameters."""
    path = made(tmp_path, 0)
    content = json.loads((path / "manifest.json").read_text())
    write_json(
        path / "manifest.json", {"parameters": {"store": "auto"}, **{k: content[k] for k in ("digest", "status")}}
    )
    with pytest.warns(UserWarning, match="another schema"):
        assert results.load(str(tmp_path)).empty


def test_a_row_per_epoch(tmp_path):
    for number in range(5):
        made(tmp_path, number, lr=(number + 1) / 100)
    frame = results.load(str(tmp_path), epochs=True)
    assert len(frame) == 10 and list(frame["epoch"]) == [1, 2] * 5
    assert list(frame["lr"]) == [0.01, 0.01, 0.02, 0.02, 0.03, 0.03, 0.04, 0.04, 0.05, 0.05]
    assert list(frame["val_accuracy"]) == [0.1, 0.2] * 5 and frame.columns.is_unique
    (tmp_path / "run_0002/metrics.jsonl").write_text("garbage\n")
    with pytest.warns(UserWarning, match="1 runs are damaged .*run_0002/metrics.jsonl is damaged"):
        assert len(results.load(str(tmp_path), epochs=True)) == 8


# Pairs


def test_a_run_with_proxies_is_paired_with_the_plain_run_that_shares_all_else(tmp_path):
    made(tmp_path, 100, seed=0, schedule="2", summary={"test_accuracy": 0.7})
    made(tmp_path, 101, seed=0, schedule="3")  # another length
    made(tmp_path, 102, seed=1, schedule="2")  # another seed
    made(tmp_path, 103, seed=0, schedule="2", lr=0.5)  # another parameter
    made(tmp_path, 104, seed=0, schedule="1,p,1", summary={"test_accuracy": 0.75})
    how = {
        "threshold": 0.5,
        "fill": "patch",
        "data_dir": "elsewhere",
        "augment": "flip,erase",
        "erase_region": "attended",
    }
    made(tmp_path, 105, seed=0, schedule="1,p,1", **how)  # its plain run erases, and has not been made
    paired = results.pairs(results.load(str(tmp_path)))
    assert list(zip(paired["run"], paired["plain_run"], strict=True)) == [("run_0104", "run_0100")]
    assert paired["test_accuracy_difference"][0] == pytest.approx(0.05)
    assert set(paired.columns) >= PROXY_PARAMETERS
    made(tmp_path, 106, seed=0, schedule="2", augment="flip,erase")
    assert list(results.pairs(results.load(str(tmp_path)))["plain_run"]) == ["run_0100", "run_0106"]


@pytest.mark.parametrize("name", ["device_name", "split_digest", "batch_size", "precision"])
def test_a_plain_run_made_otherwise_is_no_pair(tmp_path, name):
    made(tmp_path, 0, seed=0, schedule="2")
    change(made(tmp_path, 1, seed=0, schedule="1,p,1"), **{name: 32 if name == "batch_size" else "other"})
    assert results.pairs(results.load(str(tmp_path))).empty


def test_no_table_holds_runs_of_other_code_and_the_number_is_said(tmp_path):
    made(tmp_path, 0, seed=0, schedule="2", code="0" * 16, summary={"val_accuracy": 0.99})
    made(tmp_path, 1, seed=0, schedule="1,p,1")
    made(tmp_path, 2, seed=1, schedule="2")
    frame = results.load(str(tmp_path))
    assert list(frame["stale"]) == [True, False, False]
    arms = frame.assign(arm=["plain", "proxies", "plain"], seed=[0, 1, 1])
    tables = {
        "pairs": lambda: results.pairs(frame)["run"].tolist(),
        "best": lambda: results.best(frame)["run"].tolist(),
        "pivot": lambda: results.pivot(frame)["2"]["n"].tolist(),
        "compare": lambda: results.compare(arms, reference="plain")["n"].unique().tolist(),
    }
    expected = {"pairs": [], "best": ["run_0001"], "pivot": [1], "compare": [1]}
    for name, table in tables.items():
        with pytest.warns(UserWarning, match="^1 finished runs were made by other code than this and are left out$"):
            assert table() == expected[name], name


def test_the_pair_to_open_is_the_named_one_or_the_latest(tmp_path):
    made(tmp_path, 0, seed=0, schedule="2")
    made(tmp_path, 1, seed=0, schedule="1,p,1")
    made(tmp_path, 2, seed=5, schedule="1,p,1")
    frame = results.load(str(tmp_path))
    plain, run = results.pair_of(frame, None, str(tmp_path))
    assert (plain.path.name, run.path.name) == ("run_0000", "run_0001")  # the latest that has a plain run
    plain, run = results.pair_of(frame, "run_0002", str(tmp_path))
    assert plain is None and run.path.name == "run_0002"
    with pytest.raises(ParameterError, match="invalid run_name='run_02': must be a finished run.*did you mean"):
        results.pair_of(frame, "run_02", str(tmp_path))
    opened = results.runs_of(results.pairs(frame), str(tmp_path))
    assert [run.path.name for run in opened] == ["run_0001", "run_0000"]


def test_the_command_names_what_was_asked():
    assert results.command("04_analysis", runs_dir="my runs", images=None) == (
        "papermill notebooks/04_analysis.ipynb 04_analysis.out.ipynb -p runs_dir 'my runs'"
    )


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
    with pytest.raises(ParameterError, match="value='val_acuracy'.*did you mean 'val_accuracy'"):
        results.best(frame, value="val_acuracy")
    with pytest.raises(ParameterError, match="by='modle'"):
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
    twice = pd.concat([frame, frame.iloc[[0]]], ignore_index=True)  # is no second sample
    pd.testing.assert_frame_equal(results.pivot(twice), table)


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
    assert results.latex(results.pivot(frame), caption=r"Accuracy (\%)", label="tab:one") == LATEX


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


def test_a_run_listed_twice_is_no_second_sample_and_an_unfinished_run_is_none():
    frame = swept()
    more = pd.concat([frame, frame.tail(1), frame.tail(1).assign(status="failed", seed=9, digest="other")])
    pd.testing.assert_frame_equal(results.compare(more, reference="plain"), results.compare(frame, reference="plain"))


def test_runs_that_are_no_pairs_are_not_compared():
    with pytest.raises(RunError, match="'d', 'm', 0.* are no pairs: plain, proxies differ in split_digest"):
        results.compare(swept(split_digest=list("abcdef")), reference="plain")
    with pytest.raises(ParameterError, match="did you mean 'plain'"):
        results.compare(swept(), reference="plane")
    with pytest.raises(ParameterError, match="invalid frame='arm': must be a column"):
        results.compare(swept().drop(columns="arm"), reference="plain")
    with pytest.raises(ParameterError, match="must not be there twice"):
        results.compare(swept(seed=[0, 0, 2, 0, 1, 2], split_digest="s"), reference="plain")
