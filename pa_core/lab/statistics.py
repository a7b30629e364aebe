"""Runs paired by seed -> differences with intervals, exact p-values, and what may be said of them.

A seed drives split, initialisation, order and augmentation together, so two arms at one seed are a pair, and everything
here looks at the differences within pairs. Accuracies are fractions in [0, 1]; half a percentage point is 0.005.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

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


def interval(differences: Sequence[float] | np.ndarray | pd.Series) -> tuple[float, float, float]:
    """Mean of the differences and its two-sided paired 95 % t interval: (mean, low, high); NaN below 2 pairs."""
    from scipy import stats  # here, because it takes a second, and every notebook imports this module

    d = pd.Series(differences, dtype=float)
    mean, half = float(d.mean()), float(stats.t.ppf(0.975, len(d) - 1) * d.sem())
    return mean, mean - half, mean + half


def sign_flip(differences: Sequence[float] | np.ndarray | pd.Series) -> float:
    """Exact two-sided p-value of the hypothesis that each difference could as well have had the other sign.

    The share of all 2^n choices of signs whose sum is at least as far from 0 as the observed one (Edgington & Onghena,
    Randomization Tests, 2007). NaN below MIN_PAIRS_FOR_P_VALUE pairs, ParameterError above MAX_PAIRS_FOR_P_VALUE.
    (SciPy's permutation_test takes seconds for 20 pairs.)
    """
    d = np.asarray(differences, dtype=float)
    if len(d) < MIN_PAIRS_FOR_P_VALUE:
        return np.nan
    if len(d) > MAX_PAIRS_FOR_P_VALUE:
        raise ParameterError("seeds", len(d), f"must be at most {MAX_PAIRS_FOR_P_VALUE}: all signs are tried")
    sums = d[:1]  # the first sign stays as it is: with all signs turned, a sum is as far from 0
    for each in d[1:]:
        sums = np.concatenate([sums + each, sums - each])
    tolerance = 1e-9 * np.abs(d).sum()  # sums that are equal on paper differ in their last digits
    return float(np.mean(np.abs(sums) >= abs(d.sum()) - tolerance))


def holm(p_values: Sequence[float] | np.ndarray | pd.Series) -> np.ndarray:
    """p-values of a family, adjusted by Holm's method (1979). One that is missing counts as 1 and stays missing."""
    from statsmodels.stats.multitest import multipletests  # here, for the same reason

    p = np.asarray(p_values, dtype=float)
    return np.where(np.isnan(p), np.nan, multipletests(np.nan_to_num(p, nan=1.0), method="holm")[1])


def verdict(low: float, high: float, *, p: float, n: int) -> str:
    """What may be said of a declared contrast of ``n`` pairs with this interval; ``p`` is adjusted over the family.

    ``within 0.5 points`` only where the interval lies within MARGIN and includes 0; ``higher`` and ``lower`` only where
    it excludes 0 and ``p`` is at most ALPHA.
    """
    if n < MIN_PAIRS_FOR_VERDICT:
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


def compare(
    runs: pd.DataFrame, *, reference: str, declared: Iterable[Contrast] = (), described: Iterable[Contrast] = ()
) -> pd.DataFrame:
    """Every arm beside the reference, and the contrasts, of runs with RUN_COLUMNS, a row per run and metric.

    ``declared`` contrasts were fixed before the first run. They alone have a ``p_value``, a ``p_holm``, adjusted over
    all of them in all datasets and models, and a ``verdict``, all for the test accuracy.

    Returns a row per dataset, model, metric and (arm, against), with COLUMNS. n, mean and sd (with n - 1) are the arm's
    over the seeds that both have; difference, low and high those of the pairs; p_superior is the share of pairs in
    which the arm is higher, a tie counting half (Vargha & Delaney 2000). Each group begins with the reference itself,
    over all its seeds and without a difference. ParameterError where an arm has no run, or one seed twice, or a
    declared contrast more pairs than an exact test can take.
    """
    declared, known = list(declared), list(runs["arm"].unique())
    contrasts = [*declared, *described]
    for row in runs[runs.duplicated([*GROUP, "arm", "seed", "metric"])].itertuples():
        raise ParameterError("runs", f"{row.arm}, seed {row.seed}, {row.metric}", "must not be there twice")
    for name in (reference, *chain.from_iterable(contrasts)):
        if name not in known:
            raise ParameterError("arm", name, f"must be one of {', '.join(known)}{did_you_mean(name, known)}")
    rows = []
    for key, group in runs.groupby([*GROUP, "metric"], sort=False):
        common, arms = dict(zip([*GROUP, "metric"], key, strict=True)), group["arm"].unique()
        values = group.pivot(index="seed", columns="arm", values="value")
        if reference in arms:
            alone = values[reference].dropna()
            row = {"arm": reference, "declared": False, "n": len(alone), "mean": alone.mean(), "sd": alone.std()}
            rows.append(common | row)
        asked = [c for c in contrasts if {*c} <= {*arms}]
        for c in dict.fromkeys([*asked, *(Contrast(arm, reference) for arm in arms if arm != reference)]):
            test = c in declared and common["metric"] == "test_accuracy"
            pair = values.reindex(columns=c).dropna()
            d = pair[c.arm] - pair[c.against]
            row = {"declared": test, "n": len(d), "mean": pair[c.arm].mean(), "sd": pair[c.arm].std()}
            row |= dict(zip(("difference", "low", "high"), interval(d), strict=True))
            row |= {"p_superior": ((d > 0) + (d == 0) / 2).mean(), "p_value": sign_flip(d) if test else np.nan}
            rows.append(common | c._asdict() | row)
    table = pd.DataFrame(rows, columns=COLUMNS)
    family = table[table["declared"].astype(bool)].assign(p_holm=lambda rows: holm(rows["p_value"]))
    said = [verdict(row.low, row.high, p=row.p_holm, n=row.n) for row in family.itertuples()]
    return table.assign(p_holm=family["p_holm"], verdict=pd.Series(said, index=family.index, dtype=object))


def decompose(runs: pd.DataFrame, parts: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """What a reported accuracy consists of, beyond the honest one, per seed and exactly.

    - baseline gap: reported - test accuracy of the single stage, where nothing leaks: other images are not as easy.
    - leak: reported - test accuracy of the run itself, minus the baseline gap (a difference in differences). Its
      validation images were trained on in earlier stages, the test images never.
    - extra data: test accuracy of the same schedule without masking - that of the single stage. Each stage draws other
      images, so that more of them are seen than the half that a single stage trains on.
    - masking: test accuracy with masks - without, at the same schedule.

    Their sum is the reported accuracy - the test accuracy of the single stage (the honest one), the row ``total``.
    Each part names its ``arm``, ``unmasked`` (the arm's schedule without masking, or itself) and ``honest``. Returns a
    row per dataset, model, part and component, with n (seeds that all three have), mean, and 95 % t interval.
    """
    rows, names = [], ("arm", "unmasked", "honest")
    for key, group in runs.groupby(GROUP, sort=False):
        value = group.pivot(index="seed", columns=["metric", "arm"], values="value")
        for part in parts:
            arm, unmasked, honest = of = [part[name] for name in names]
            needed = dict.fromkeys([("reported_accuracy", arm), ("reported_accuracy", honest)])
            needed |= dict.fromkeys(("test_accuracy", name) for name in of)
            for metric, name in needed.keys() - {*value.columns}:
                raise ParameterError("decomposition", arm, f"must have all its runs; there is no {metric} of {name}")
            v = value[list(needed)].dropna()
            reported, test = v["reported_accuracy"], v["test_accuracy"]
            extra, masking = test[unmasked] - test[honest], test[arm] - test[unmasked]
            gap = reported[honest] - test[honest]
            found = (reported[arm] - test[arm] - gap, gap, extra, masking, reported[arm] - test[honest])
            rows += [[*key, *of, name, len(d), *interval(d)] for name, d in zip(COMPONENTS, found, strict=True)]
    return pd.DataFrame(rows, columns=[*GROUP, *names, "component", "n", "mean", "low", "high"])
