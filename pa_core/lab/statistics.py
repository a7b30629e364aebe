"""Runs paired by seed -> differences with intervals, exact p-values, and what may be said of them.

A seed drives split, initialisation, order and augmentation together, so two arms at one seed are a pair, and everything
here looks at the differences within pairs. Accuracies are fractions in [0, 1]; half a percentage point is 0.005.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from pa_core.errors import ParameterError, did_you_mean

MIN_PAIRS_FOR_P_VALUE = 10
"""With 5 pairs the smallest possible p-value is 0.06."""
MAX_PAIRS_FOR_P_VALUE = 24
"""2^24 sums take 128 MB."""
MIN_PAIRS_FOR_VERDICT = 5
"""Two differences that happen to agree have an interval of no width."""
MARGIN = 0.005
"""Differences within this are too small to matter here."""
WITHIN_MARGIN = f"within {100 * MARGIN:g} points"
ALPHA = 0.05
TOO_FEW = "too few pairs"

GROUP = ["study", "dataset", "model"]
RUN_COLUMNS = (*GROUP, "arm", "seed", "metric", "value", "digest")
COLUMNS = (
    *(*GROUP, "arm", "metric", "n", "mean", "sd", "difference", "low", "high", "p_value"),
    *("against", "declared", "p_holm", "p_superior", "verdict"),
)


# Of one list of paired differences


def interval(differences: Sequence[float] | np.ndarray, *, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of the differences and its two-sided paired t interval: (mean, low, high); NaN below 2 pairs."""
    d = np.asarray(differences, dtype=float)
    if len(d) < 2:
        return (float(d.mean()) if len(d) else np.nan), np.nan, np.nan
    mean, half = d.mean(), stats.t.ppf((1 + level) / 2, len(d) - 1) * stats.sem(d)
    return float(mean), float(mean - half), float(mean + half)


def sign_flip(differences: Sequence[float] | np.ndarray) -> float:
    """Exact two-sided p-value of the hypothesis that each difference could as well have had the other sign.

    The share of all 2^n choices of signs whose sum is at least as far from 0 as the observed one (Fisher's test for
    pairs; Edgington & Onghena, Randomization Tests, 2007), at least 2^(1 - n). NaN below MIN_PAIRS_FOR_P_VALUE pairs.

    Raises:
        ValueError: there are more than MAX_PAIRS_FOR_P_VALUE pairs.
    """
    d = np.asarray(differences, dtype=float)
    if len(d) < MIN_PAIRS_FOR_P_VALUE:
        return np.nan
    if len(d) > MAX_PAIRS_FOR_P_VALUE:
        raise ValueError(f"all signs of {len(d)} pairs are too many to try; {MAX_PAIRS_FOR_P_VALUE} pairs are the most")
    sums = d[:1]  # the first sign stays as it is: with all signs turned, a sum is as far from 0
    for each in d[1:]:
        sums = np.concatenate([sums + each, sums - each])
    tolerance = 1e-9 * np.abs(d).sum()  # sums that are equal on paper differ in their last digits
    return float(np.mean(np.abs(sums) >= abs(d.sum()) - tolerance))


def superiority(differences: Sequence[float] | np.ndarray) -> float:
    """P(A > B): the share of pairs in which the first is higher, a tie counting half (Vargha & Delaney 2000)."""
    d = np.asarray(differences, dtype=float)
    return float(np.mean((d > 0) + 0.5 * (d == 0))) if len(d) else np.nan


def holm(p_values: Sequence[float] | np.ndarray | pd.Series) -> np.ndarray:
    """p-values of a family, adjusted by Holm's method (1979). One that is missing counts as 1 and stays missing."""
    p = np.asarray(p_values, dtype=float)
    if len(p) == 0:
        return p
    adjusted = multipletests(np.nan_to_num(p, nan=1.0), method="holm")[1]
    return np.where(np.isnan(p), np.nan, adjusted)


def verdict(low: float, high: float, *, p: float, n: int = MIN_PAIRS_FOR_VERDICT) -> str:
    """What may be said of a declared contrast of ``n`` pairs with this interval; ``p`` is adjusted over the family.

    ``within 0.5 points`` only where the interval lies within MARGIN and includes 0; ``higher`` and ``lower`` only where
    it excludes 0 and ``p`` is at most ALPHA.
    """
    if np.isnan(low) or np.isnan(high) or n < MIN_PAIRS_FOR_VERDICT:
        return TOO_FEW
    small = max(-low, high) <= MARGIN
    if low <= 0 <= high:
        return WITHIN_MARGIN if small else "undecided"
    if not p <= ALPHA:
        return "undecided"
    return ("higher" if low > 0 else "lower") + (f", {WITHIN_MARGIN}" if small else "")


# Of a study


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A difference between two arms: ``arm`` minus ``against``."""

    arm: str
    against: str

    @classmethod
    def parse(cls, text: str) -> Contrast:
        """``"salient - permuted"``, with spaces around the minus: an arm's name may hold one."""
        arm, minus, against = (part.strip() for part in str(text).partition(" - "))
        if not (minus and arm and against and arm != against):
            raise ParameterError("contrasts", text, "must be the name of an arm, ' - ', and the name of another")
        return cls(arm=arm, against=against)

    def __str__(self) -> str:
        return f"{self.arm} - {self.against}"


def compare(
    runs: pd.DataFrame,
    *,
    reference: str,
    declared: Iterable[Contrast] = (),
    described: Iterable[Contrast] = (),
    tested: str = "test_accuracy",
) -> pd.DataFrame:
    """Every arm beside the reference, and the contrasts.

    Args:
        runs: a row per run and metric, with RUN_COLUMNS; see :func:`checked`.
        reference: the arm that all others are compared with.
        declared: contrasts that were fixed before the first run. They alone have a ``p_value``, a ``p_holm``, adjusted
            over all of them in all datasets and models, and a ``verdict``, all for the metric ``tested``.
        described: further contrasts.

    Returns:
        A row per dataset, model, metric and (arm, against), with COLUMNS. n, mean and sd (with n - 1) are the arm's
        over the seeds that both have; difference, low and high those of the pairs. Each group begins with the
        reference itself, over all its seeds and without a difference, and then the contrasts.

    Raises:
        ParameterError: an arm has no run, or a declared contrast more pairs than an exact test can take.
    """
    contrasts = dict.fromkeys([*declared, *described])
    declared = set(declared)
    _check_arms([reference, *(name for c in contrasts for name in (c.arm, c.against))], list(checked(runs)["arm"]))
    rows = []
    for key, group in runs.groupby([*GROUP, "metric"], sort=False):
        values = {arm: rows.set_index("seed")["value"] for arm, rows in group.groupby("arm", sort=False)}
        common = dict(zip([*GROUP, "metric"], key, strict=True))
        others = [Contrast(arm=arm, against=reference) for arm in values if arm != reference]
        if reference in values:
            rows.append(common | {"arm": reference, "declared": False} | _spread(values[reference]))
        for c in dict.fromkeys([*(c for c in contrasts if {c.arm, c.against} <= values.keys()), *others]):
            test = c in declared and common["metric"] == tested
            pair = values[c.arm], values.get(c.against, values[c.arm][:0])
            rows.append(common | {"arm": c.arm, "against": c.against, "declared": test} | _paired(*pair, test=test))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    family = table["declared"].astype(bool)
    table["p_holm"] = pd.Series(holm(table["p_value"][family]), index=table.index[family])
    said = [verdict(row.low, row.high, p=row.p_holm, n=row.n) for row in table[family].itertuples()]
    return table.assign(verdict=pd.Series(said, index=table.index[family], dtype=object))


def _check_arms(asked: Sequence[str], known: Sequence[str]) -> None:
    known = list(dict.fromkeys(known))
    for name in asked:
        if name not in known:
            raise ParameterError("arm", name, f"must be one of {', '.join(known)}{did_you_mean(name, known)}")


def _spread(values: pd.Series) -> dict[str, Any]:
    return {"n": len(values), "mean": values.mean(), "sd": values.std(ddof=1)}


def _paired(arm: pd.Series, against: pd.Series, *, test: bool) -> dict[str, Any]:
    both = arm.index.intersection(against.index)
    if test and len(both) > MAX_PAIRS_FOR_P_VALUE:
        allowed = f"must be at most {MAX_PAIRS_FOR_P_VALUE} for a declared contrast: all signs are tried"
        raise ParameterError("seeds", len(both), allowed)
    row = _spread(arm[both])
    if len(both) == 0:
        return row
    d = (arm[both] - against[both]).to_numpy()
    row |= dict(zip(("difference", "low", "high"), interval(d), strict=True)) | {"p_superior": superiority(d)}
    return row | ({"p_value": sign_flip(d)} if test else {})


def checked(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs behind a study, each once.

    Raises:
        ParameterError: a column or a value is missing, or an arm has a seed twice.
    """
    gone = [name for name in RUN_COLUMNS if name not in runs.columns]
    if gone:
        raise ParameterError("runs", list(runs.columns), f"must have a column {gone[0]}")
    twice = runs.duplicated([*GROUP, "arm", "seed", "metric"])
    for bad, allowed in ((runs["value"].isna(), "must not be missing"), (twice, "must not be there twice")):
        for row in runs[bad].head(1).itertuples():
            raise ParameterError("runs", f"{row.arm}, seed {row.seed}, {row.metric}", allowed)
    return runs


COMPONENTS: tuple[str, ...] = ("leak", "baseline gap", "extra data", "masking", "total")


def decompose(runs: pd.DataFrame, parts: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """What a reported accuracy consists of, beyond the honest one, per seed and exactly.

    - baseline gap: reported - test accuracy of the single stage, where nothing can leak: its validation images are
      easier or harder than the test images, and no more.
    - leak: reported - test accuracy of the run itself, minus the baseline gap (a difference in differences). Its
      validation images were trained on in earlier stages, the test images never.
    - extra data: test accuracy of the same schedule without masking - that of the single stage. Each stage draws other
      images, so that more of them are seen than the half that a single stage trains on.
    - masking: test accuracy with masks - without, at the same schedule.

    Their sum is the reported accuracy - the test accuracy of the single stage (the honest one), the row ``total``.

    Args:
        runs: with RUN_COLUMNS and the metrics reported_accuracy and test_accuracy.
        parts: names of arms: ``arm``, ``unmasked`` (the same schedule without masking; the arm itself where it has
            none) and ``honest`` (the single stage).

    Returns:
        A row per dataset, model, part and component: study, dataset, model, arm, unmasked, honest, component, n (seeds
        that all three have), mean, low, high (95 % t interval).
    """
    rows = []
    for key, group in checked(runs).groupby(GROUP, sort=False):
        value = group.pivot(index="seed", columns=["metric", "arm"], values="value")
        for part in parts:
            common = dict(zip(GROUP, key, strict=True)) | {k: part[k] for k in ("arm", "unmasked", "honest")}
            for name, d in _components(value, **part).items():
                mean, low, high = interval(d.to_numpy())
                rows.append(common | {"component": name, "n": len(d), "mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows, columns=[*GROUP, "arm", "unmasked", "honest", "component", "n", "mean", "low", "high"])


def _components(value: pd.DataFrame, *, arm: str, unmasked: str, honest: str) -> dict[str, pd.Series]:
    """Each component per seed, of the seeds that all three arms have."""
    needed = [("reported_accuracy", name) for name in (arm, honest)]
    needed += [("test_accuracy", name) for name in (arm, unmasked, honest)]
    gone = [f"{metric} of {name}" for metric, name in needed if (metric, name) not in value.columns]
    if gone:
        raise ParameterError("decomposition", arm, f"must have runs of all its arms; there is no {gone[0]}")
    v = value[list(dict.fromkeys(needed))].dropna()
    reported, test = v["reported_accuracy"], v["test_accuracy"]
    baseline = reported[honest] - test[honest]
    masking, extra = test[arm] - test[unmasked], test[unmasked] - test[honest]
    found = (reported[arm] - test[arm] - baseline, baseline, extra, masking, reported[arm] - test[honest])
    return dict(zip(COMPONENTS, found, strict=True))
