"""What is said of runs: numbers worked out by hand, and other people's implementations."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pa_core.errors import ParameterError
from pa_core.lab import statistics
from pa_core.lab.statistics import Contrast


def frame(
    arms: dict[str, dict[int, float]], metric: str = "test_accuracy", dataset: str = "fashion_mini"
) -> pd.DataFrame:
    rows = [
        ("x", dataset, "test_resnet", arm, seed, metric, v, f"{arm}{seed}")
        for arm, vs in arms.items()
        for seed, v in vs.items()
    ]
    return pd.DataFrame(rows, columns=statistics.RUN_COLUMNS)


def test_the_interval_by_hand():
    # mean 2, sd sqrt(10 / 4), standard error sqrt(1 / 2), t(0.975, 4) = 2.776445 from the table
    mean, low, high = statistics.interval([0, 1, 2, 3, 4])
    assert mean == 2
    assert (low, high) == pytest.approx((2 - 2.776445 * 0.5**0.5, 2 + 2.776445 * 0.5**0.5), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1, 1).map(lambda x: round(x, 4)), min_size=3, max_size=20).filter(lambda d: np.std(d) > 1e-3)
)
def test_the_interval_is_that_of_scipys_paired_t_test(d):
    expected = stats.ttest_rel(d, np.zeros(len(d))).confidence_interval(0.95)
    assert statistics.interval(d)[1:] == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_an_interval_needs_two_pairs_and_may_have_no_width():
    assert np.isnan(statistics.interval([0.1])[1:]).all() and statistics.interval([0.1])[0] == 0.1
    assert np.isnan(statistics.interval([])).all()
    assert statistics.interval([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)


def test_sign_flips_by_hand():
    assert statistics.sign_flip([1.0] * 10) == 2 / 2**10  # all signs as they are, and all of them turned
    assert statistics.sign_flip([0.0] * 12) == 1
    # nine of one size and one against: sums of 8 or 10, and -8 or -10, are as far from 0: (10 + 1) * 2 of 1,024
    assert statistics.sign_flip([1.0] * 9 + [-1.0]) == 22 / 1024
    # with tenths the same sums differ in their last digits
    assert statistics.sign_flip([0.1] * 9 + [-0.1]) == 22 / 1024


def brute_force(d: list[float]) -> float:
    observed = abs(sum(d))
    sums = [
        abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=len(d))
    ]
    return sum(s >= observed - 1e-9 for s in sums) / len(sums)


def test_sign_flips_are_those_of_a_plain_loop_and_of_scipy():
    generator = np.random.default_rng(0)
    d = generator.normal(0.3, 1, 11).round(3)
    assert statistics.sign_flip(d) == brute_force(list(d))
    theirs = stats.permutation_test(
        (d, np.zeros(11)),
        lambda a, b, axis: (a - b).sum(axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert statistics.sign_flip(d) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_sign_flips_are_exact_for_twenty_pairs():
    # Signs of 1, 2, ..., 20 are Wilcoxon's signed ranks, whose exact distribution SciPy has.
    d = np.arange(1, 21) * np.where(np.arange(20) % 3 == 0, -1.0, 1.0)
    assert statistics.sign_flip(d) == pytest.approx(stats.wilcoxon(d, method="exact").pvalue, abs=1e-12)
    assert statistics.sign_flip(np.full(20, 0.01)) == 2 / 2**20


def test_no_p_value_below_ten_pairs_and_none_that_is_not_exact():
    assert np.isnan(statistics.sign_flip([1.0] * 9))
    with pytest.raises(ParameterError, match="seeds=25: must be at most 24"):
        statistics.sign_flip([1.0] * 25)


def test_superiority_counts_ties_half():
    runs = frame({"a": dict.fromkeys(range(4), 0.5), "b": dict(enumerate([0.6, 0.7, 0.5, 0.4]))})
    assert statistics.compare(runs, reference="a")["p_superior"][1] == (2 + 0.5) / 4


def test_holm_by_hand():
    # the smallest times 3, the next times 2, the last times 1, and never below the one before
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.6]) == pytest.approx([1, 1])
    adjusted = statistics.holm([0.01, np.nan, 0.03])  # a contrast with too few pairs still belongs to the family
    assert adjusted[[0, 2]] == pytest.approx([0.03, 0.06]) and np.isnan(adjusted[1])
    assert len(statistics.holm([])) == 0


@pytest.mark.parametrize(
    ("low", "high", "p", "words"),
    [
        (-0.004, 0.004, 0.6, "within 0.5 points"),
        (-0.005, 0.005, 0.6, "within 0.5 points"),
        (-0.006, 0.004, 0.6, "undecided"),
        (-0.004, 0.0051, 0.6, "undecided"),
        (0.001, 0.004, 0.01, "higher, within 0.5 points"),
        (0.001, 0.02, 0.05, "higher"),
        (0.001, 0.02, 0.051, "undecided"),  # it does not stand up to the family
        (0.001, 0.02, np.nan, "undecided"),  # too few pairs for a p-value
        (-0.004, -0.001, 0.2, "undecided"),
        (-0.02, -0.001, 0.01, "lower"),
        (-0.004, -0.001, 0.01, "lower, within 0.5 points"),
    ],
)
def test_what_is_said_follows_from_interval_and_adjusted_p(low, high, p, words):
    assert statistics.verdict(low, high, p=p, n=5) == words
    assert statistics.verdict(low, high, p=p, n=4) == "too few pairs"


# A whole study


def ten(start: float, step: float = 0.01) -> dict[int, float]:
    return {seed: start + step * seed for seed in range(10)}


def test_a_table_by_hand():
    runs = frame({"plain": {0: 0.5, 1: 0.6, 2: 0.7}, "masked": {2: 0.72, 1: 0.61, 0: 0.53, 9: 0.1}})
    plain, masked = statistics.compare(runs, reference="plain").to_dict("records")
    assert (plain["arm"], plain["n"], plain["mean"], plain["sd"]) == (
        "plain",
        3,
        pytest.approx(0.6),
        pytest.approx(0.1),
    )
    assert pd.isna(plain["difference"]) and pd.isna(plain["against"])
    # paired by seed, whatever the order, and seed 9 has no partner: 0.03, 0.01, 0.02
    assert (masked["arm"], masked["against"], masked["n"]) == ("masked", "plain", 3)
    assert masked["mean"] == pytest.approx(0.62) and masked["difference"] == pytest.approx(0.02)
    half = 4.302653 * 0.01 / 3**0.5  # t(0.975, 2) from the table
    assert (masked["low"], masked["high"]) == pytest.approx((0.02 - half, 0.02 + half), abs=1e-7)
    assert np.isnan(masked["p_value"]) and masked["p_superior"] == 1 and pd.isna(masked["verdict"])
    declared = statistics.compare(runs, reference="plain", declared=[Contrast.parse("masked - plain")]).iloc[1]
    assert np.isnan(declared["p_value"]) and declared["verdict"] == "too few pairs"


def test_only_declared_contrasts_are_adjusted_and_over_all_datasets():
    generator = np.random.default_rng(1)
    arms = {"a": ten(0.5), "b": {s: v + generator.normal(0, 0.01) for s, v in ten(0.51).items()}, "c": ten(0.3, 0.02)}
    runs = pd.concat([frame(arms, dataset=name) for name in ("one", "two")])
    declared = [Contrast.parse("b - a"), Contrast.parse("b - c")]
    table = statistics.compare(runs, reference="a", declared=declared)
    chosen = table[table["declared"]]
    assert list(zip(chosen["dataset"], chosen["arm"], chosen["against"], strict=True)) == [
        ("one", "b", "a"), ("one", "b", "c"), ("two", "b", "a"), ("two", "b", "c"),
    ]  # fmt: skip
    assert list(chosen["p_holm"]) == pytest.approx(statistics.holm(chosen["p_value"]))
    assert (chosen["p_holm"] >= chosen["p_value"]).all() and (chosen["p_holm"] > chosen["p_value"]).any()
    assert table.loc[~table["declared"], ["p_value", "p_holm", "verdict"]].isna().all(axis=None)
    assert table.loc[table["declared"], ["p_value", "p_holm", "verdict"]].notna().all(axis=None)
    assert (table["n"] == 10).all()


def test_described_contrasts_have_an_interval_and_no_p_value():
    runs = frame({"a": ten(0.5), "b": ten(0.6), "c": {seed: 0.65 + 0.012 * seed for seed in range(10)}})
    table = statistics.compare(runs, reference="a", described=[Contrast.parse("c - b"), Contrast.parse("b - a")])
    assert list(zip(table["arm"], table["against"].fillna(""), strict=True)) == [
        ("a", ""),
        ("c", "b"),
        ("b", "a"),
        ("c", "a"),
    ]
    row = table.iloc[1]
    assert row["difference"] == pytest.approx(0.05 + 0.002 * 4.5) and row["low"] < row["difference"] < row["high"]
    assert not row["declared"] and pd.isna(row["p_value"]) and pd.isna(row["verdict"])


def test_other_metrics_are_described_and_not_tested():
    runs = pd.concat([frame({"a": ten(0.5), "b": ten(0.6)}), frame({"a": ten(1), "b": ten(2)}, metric="proxy_epochs")])
    table = statistics.compare(runs, reference="a", declared=[Contrast.parse("b - a")])
    assert list(table.loc[table["declared"], "metric"]) == ["test_accuracy"]
    assert len(table) == 4


def test_what_is_no_study_is_refused():
    runs = frame({"plain": ten(0.5), "masked": ten(0.6)})
    with pytest.raises(ParameterError, match="did you mean 'masked'"):
        statistics.compare(runs, reference="mask")
    with pytest.raises(ParameterError, match="plain, seed 0, test_accuracy.*must not be there twice"):
        statistics.compare(pd.concat([runs, runs.head(1)]), reference="plain")
    many = dict.fromkeys(range(25), 0.5)
    with pytest.raises(ParameterError, match="seeds=25: must be at most 24"):
        statistics.compare(
            frame({"plain": many, "masked": many}), reference="plain", declared=[Contrast.parse("masked - plain")]
        )
    for text in ("plain", "plain-masked", "plain - plain", " - plain"):
        with pytest.raises(ParameterError, match="invalid contrasts=.*must be the name of an arm"):
            Contrast.parse(text)


def test_the_parts_of_a_reported_accuracy_add_up_to_it():
    single, redrawn = {0: 0.50, 1: 0.52}, {0: 0.56, 1: 0.60}
    masked, reported, easy = {0: 0.55, 1: 0.61}, {0: 0.80, 1: 0.86}, {0: 0.51, 1: 0.55}
    runs = pd.concat(
        [
            frame({"18": single, "none": redrawn, "masked": masked}),
            frame({"masked": reported, "18": easy, "none": reported}, metric="reported_accuracy"),
        ]
    )
    parts = [{"arm": arm, "unmasked": unmasked, "honest": "18"} for arm, unmasked in (("masked", "none"), ("18", "18"))]
    table = statistics.decompose(runs, parts)
    whole, alone = (rows.set_index("component") for _, rows in table.groupby("arm", sort=False))
    # validation images are easier than test images by 0.01 and 0.03 where nothing leaks; the rest of 0.25 is the leak
    means = {"leak": 0.23, "baseline gap": 0.02, "extra data": 0.07, "masking": 0.0, "total": 0.32}
    assert whole["mean"].to_dict() == pytest.approx(means)
    assert whole["mean"].drop("total").sum() == pytest.approx(whole["mean"]["total"])
    # masking was -0.01 and +0.01: mean 0, sd 0.0141, t(0.975, 1) = 12.7062
    assert whole.loc["masking", "high"] == pytest.approx(12.7062 * 0.01, abs=1e-5)
    # the leak was 0.24 and 0.22, per seed and not a difference of means: sd 0.0141 too
    assert whole.loc["leak", "high"] == pytest.approx(0.23 + 12.7062 * 0.01, abs=1e-5)
    assert (table["n"] == 2).all()
    assert alone["mean"].to_dict() == pytest.approx(dict.fromkeys(means, 0) | {"baseline gap": 0.02, "total": 0.02})
    with pytest.raises(ParameterError, match="there is no test_accuracy of nobody"):
        statistics.decompose(runs, [{"arm": "masked", "unmasked": "nobody", "honest": "18"}])
