"""Runs paired by seed -> differences with intervals, exact p-values, and what may be said of them.

A seed drives split, initialisation, order and augmentation together, so two arms at one seed are a pair, and everything
here looks at the differences within pairs. Accuracies are fractions in [0, 1]; half a percentage point is 0.005.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pa_core.errors import ParameterError, did_you_mean

MIN_PAIRS_FOR_P_VALUE = 10  # with 5 pairs the smallest possible p-value is 0.06
MAX_PAIRS_FOR_P_VALUE = 24  # 2^24 sums take 128 MB
MIN_PAIRS_FOR_VERDICT = 5  # two differences that happen to agree have an interval of no width
MARGIN = 0.005  # differences within this are too small to matter here
WITHIN_MARGIN = f"within {100 * MARGIN:g} points"
ALPHA = 0.05
GROUP = ["study", "dataset", "model"]
RUN_COLUMNS = (*GROUP, "arm", "seed", "metric", "value", "digest")
COLUMNS = [*GROUP, "arm", "metric", "n", "mean", "sd", "difference", "low", "high", "p_value"]
COLUMNS += ["against", "declared", "p_holm", "p_superior", "verdict"]
COMPONENTS = ("leak", "baseline gap", "extra data", "masking", "total")


def interval(differences: Sequence[float] | np.ndarray, *, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of the differences and its two-sided paired t interval: (mean, low, high); NaN below 2 pairs."""
    d = np.asarray(differences, dtype=float)
    from scipy import stats  # here, because it takes a second, and every notebook imports this module

    mean = float(d.mean()) if len(d) else np.nan
    half = float(stats.t.ppf((1 + level) / 2, len(d) - 1) * stats.sem(d)) if len(d) > 1 else np.nan
    return mean, mean - half, mean + half


def sign_flip(differences: Sequence[float] | np.ndarray) -> float:
    """Exact two-sided p-value of the hypothesis that each difference could as well have had the other sign.

    The share of all 2^n choices of signs whose sum is at least as far from 0 as the observed one (Fisher's test for
    pairs; Edgington & Onghena, Randomization Tests, 2007), at least 2^(1 - n). NaN below MIN_PAIRS_FOR_P_VALUE pairs,
    and a ParameterError above MAX_PAIRS_FOR_P_VALUE. (SciPy's permutation_test takes seconds for 20 pairs.)
    """
    d = np.asarray(differences, dtype=float)
    if len(d) < MIN_PAIRS_FOR_P_VALUE:
        return np.nan
    if len(d) > MAX_PAIRS_FOR_P_VALUE:
        raise ParameterError("seeds", len(d), f"must be at most {MAX_PAIRS_FOR_P_VALUE}: all signs are tried")
    # the first sign stays as it is: with all signs turned, a sum is as far from 0
    sums = reduce(lambda sums, each: np.concatenate([sums + each, sums - each]), d[1:], d[:1])
    tolerance = 1e-9 * np.abs(d).sum()  # sums that are equal on paper differ in their last digits
    return float(np.mean(np.abs(sums) >= abs(d.sum()) - tolerance))


def superiority(differences: Sequence[float] | np.ndarray) -> float:
    """P(A > B): the share of pairs in which the first is higher, a tie counting half (Vargha & Delaney 2000)."""
    d = np.asarray(differences, dtype=float)
    return float(np.mean((d > 0) + 0.5 * (d == 0))) if len(d) else np.nan


def holm(p_values: Sequence[float] | np.ndarray | pd.Series) -> np.ndarray:
    """p-values of a family, adjusted by Holm's method (1979). One that is missing counts as 1 and stays missing."""
    p = np.asarray(p_values, dtype=float)
    from statsmodels.stats.multitest import multipletests  # here, for the same reason

    adjusted = multipletests(np.nan_to_num(p, nan=1.0), method="holm")[1] if len(p) else p
    return np.where(np.isnan(p), np.nan, adjusted)


def verdict(low: float, high: float, *, p: float, n: int = MIN_PAIRS_FOR_VERDICT) -> str:
    """What may be said of a declared contrast of ``n`` pairs with this interval; ``p`` is adjusted over the family.

    ``within 0.5 points`` only where the interval lies within MARGIN and includes 0; ``higher`` and ``lower`` only where
    it excludes 0 and ``p`` is at most ALPHA.
    """
    if np.isnan(low) or np.isnan(high) or n < MIN_PAIRS_FOR_VERDICT:
        return "too few pairs"
    small, includes_zero = max(-low, high) <= MARGIN, low <= 0 <= high
    if includes_zero or not p <= ALPHA:
        return WITHIN_MARGIN if small and includes_zero else "undecided"
    return ("higher" if low > 0 else "lower") + (f", {WITHIN_MARGIN}" if small else "")


class Contrast(NamedTuple):
    """A difference between two arms: ``arm`` minus ``against``."""

    arm: str
    against: str

    @classmethod
    def parse(cls, text: str) -> Contrast:
        """``"salient - permuted"``, with spaces around the minus: an arm's name may hold one."""
        arm, minus, against = (part.strip() for part in str(text).partition(" - "))
        if not (minus and arm and against and arm != against):
            raise ParameterError("contrasts", text, "must be the name of an arm, ' - ', and the name of another")
        return cls(arm, against)

    def __str__(self) -> str:
        return f"{self.arm} - {self.against}"


def compare(
    runs: pd.DataFrame, *, reference: str, declared: Iterable[Contrast] = (), described: Iterable[Contrast] = ()
) -> pd.DataFrame:
    """Every arm beside the reference, and the contrasts.

    Args:
        runs: a row per run and metric, with RUN_COLUMNS; see :func:`checked`.
        reference: the arm that all others are compared with.
        declared: contrasts that were fixed before the first run. They alone have a ``p_value``, a ``p_holm``, adjusted
            over all of them in all datasets and models, and a ``verdict``, all for the test accuracy.
        described: further contrasts.

    Returns:
        A row per dataset, model, metric and (arm, against), with COLUMNS. n, mean and sd (with n - 1) are the arm's
        over the seeds that both have; difference, low and high those of the pairs. Each group begins with the
        reference itself, over all its seeds and without a difference, and then the contrasts.

    Raises:
        ParameterError: an arm has no run, or a declared contrast more pairs than an exact test can take.
    """
    declared, known = list(declared), list(checked(runs)["arm"].unique())
    contrasts = [*declared, *described]
    for name in (reference, *chain.from_iterable(contrasts)):
        if name not in known:
            raise ParameterError("arm", name, f"must be one of {', '.join(known)}{did_you_mean(name, known)}")
    rows = []
    for key, group in runs.groupby([*GROUP, "metric"], sort=False):
        common, arms = dict(zip([*GROUP, "metric"], key, strict=True)), group["arm"].unique()
        values = group.pivot(index="seed", columns="arm", values="value")
        if reference in arms:
            rows.append(common | {"arm": reference, "declared": False} | _measured(values[[reference]].dropna()))
        asked = [c for c in contrasts if {*c} <= {*arms}]
        for c in dict.fromkeys([*asked, *(Contrast(arm, reference) for arm in arms if arm != reference)]):
            test = c in declared and common["metric"] == "test_accuracy"
            pair = values.reindex(columns=c).dropna()
            rows.append(common | c._asdict() | {"declared": test} | _measured(pair, test=test))
    table = pd.DataFrame(rows, columns=COLUMNS)
    family = table[table["declared"].astype(bool)].assign(p_holm=lambda rows: holm(rows["p_value"]))
    said = [verdict(row.low, row.high, p=row.p_holm, n=row.n) for row in family.itertuples()]
    return table.assign(p_holm=family["p_holm"], verdict=pd.Series(said, index=family.index, dtype=object))


def _measured(values: pd.DataFrame, *, test: bool = False) -> dict[str, Any]:
    """Of the values of an arm, a row per seed, and in a second column those of the arm it is compared with."""
    first = values.iloc[:, 0]
    row: dict[str, Any] = {"n": len(first), "mean": first.mean(), "sd": first.std(ddof=1)}
    if values.shape[1] == 1:
        return row
    d = (first - values.iloc[:, 1]).to_numpy()
    row |= dict(zip(("difference", "low", "high"), interval(d), strict=True)) | {"p_superior": superiority(d)}
    return row | ({"p_value": sign_flip(d)} if test else {})


def checked(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs behind a study; a ParameterError where a column or a value is missing, or an arm has a seed twice."""
    for name in RUN_COLUMNS:
        if name not in runs.columns:
            raise ParameterError("runs", list(runs.columns), f"must have a column {name}")
    twice = runs.duplicated([*GROUP, "arm", "seed", "metric"])
    for bad, allowed in ((runs["value"].isna(), "must not be missing"), (twice, "must not be there twice")):
        for row in runs[bad].head(1).itertuples():
            raise ParameterError("runs", f"{row.arm}, seed {row.seed}, {row.metric}", allowed)
    return runs


def decompose(runs: pd.DataFrame, parts: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """What a reported accuracy consists of, beyond the honest one, per seed and exactly.

    - baseline gap: reported - test accuracy of the single stage, where nothing leaks: other images are not as easy.
    - leak: reported - test accuracy of the run itself, minus the baseline gap (a difference in differences). Its
      validation images were trained on in earlier stages, the test images never.
    - extra data: test accuracy of the same schedule without masking - that of the single stage. Each stage draws other
      images, so that more of them are seen than the half that a single stage trains on.
    - masking: test accuracy with masks - without, at the same schedule.

    Their sum is the reported accuracy - the test accuracy of the single stage (the honest one), the row ``total``.

    Args:
        runs: with RUN_COLUMNS and the metrics reported_accuracy and test_accuracy.
        parts: the names of ``arm``, ``unmasked`` (its schedule without masking, or itself) and ``honest`` each.

    Returns:
        A row per dataset, model, part and component, with n (seeds that all three have), mean, and 95 % t interval.
    """
    rows, names = [], ("arm", "unmasked", "honest")
    for key, group in checked(runs).groupby(GROUP, sort=False):
        value = group.pivot(index="seed", columns=["metric", "arm"], values="value")
        for part in parts:
            for name, d in _components(value, **part).items():
                rows.append([*key, *(part[k] for k in names), name, len(d), *interval(d.to_numpy())])
    return pd.DataFrame(rows, columns=[*GROUP, *names, "component", "n", "mean", "low", "high"])


def _components(value: pd.DataFrame, *, arm: str, unmasked: str, honest: str) -> dict[str, pd.Series]:
    """Each component per seed, of the seeds that all three arms have."""
    needed = [("reported_accuracy", arm), ("reported_accuracy", honest)]
    needed += [("test_accuracy", name) for name in (arm, unmasked, honest)]
    for metric, name in needed:
        if (metric, name) not in value.columns:
            raise ParameterError("decomposition", arm, f"must have all its runs; there is no {metric} of {name}")
    v = value[list(dict.fromkeys(needed))].dropna()
    reported, test = v["reported_accuracy"], v["test_accuracy"]
    baseline = reported[honest] - test[honest]
    masking, extra = test[arm] - test[unmasked], test[unmasked] - test[honest]
    found = (reported[arm] - test[arm] - baseline, baseline, extra, masking, reported[arm] - test[honest])
    return dict(zip(COMPONENTS, found, strict=True))
