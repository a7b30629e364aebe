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

from pa_core.params import ParameterError, nearest

FEWEST_FOR_P = 10
"""Pairs below which no p-value is given: with 5 the smallest possible one is 0.06."""
FEWEST_FOR_VERDICT = 5
"""Pairs below which nothing is said in words: two that happen to agree would have an interval of no width."""
MOST_FOR_P = 24
"""Pairs above which not all sign flips are looked at any more: 2^24 sums are 128 MB."""
MARGIN = 0.005
"""Half a percentage point: a difference smaller than this is called none."""
ALPHA = 0.05
TOO_FEW = "too few pairs"

RUN_COLUMNS = ("study", "dataset", "model", "arm", "seed", "metric", "value", "digest")
COLUMNS = [
    "study",
    "dataset",
    "model",
    "arm",
    "metric",
    "n",
    "mean",
    "sd",
    "difference",
    "low",
    "high",
    "p_value",
    "against",
    "declared",
    "p_holm",
    "p_superior",
    "verdict",
]


# Of one list of paired differences


def interval(differences: Sequence[float], *, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of the differences and its two-sided paired t interval: (mean, low, high); low and high are NaN below 2 pairs."""
    d = np.asarray(differences, dtype=float)
    if len(d) < 2:
        return (float(d.mean()) if len(d) else np.nan), np.nan, np.nan
    mean, half = d.mean(), stats.t.ppf((1 + level) / 2, len(d) - 1) * stats.sem(d)
    return float(mean), float(mean - half), float(mean + half)


def sign_flip(differences: Sequence[float]) -> float:
    """Exact two-sided p-value of the hypothesis that each difference could as well have had the other sign.

    The share of all 2^n choices of signs whose sum is at least as far from 0 as the observed one (Fisher's randomisation test
    for pairs; Edgington & Onghena, Randomization Tests, 2007). The smallest possible value is 2^(1 - n).

    Returns:
        NaN below FEWEST_FOR_P pairs.

    Raises:
        ValueError: more than MOST_FOR_P pairs.
    """
    d = np.asarray(differences, dtype=float)
    if len(d) < FEWEST_FOR_P:
        return np.nan
    if len(d) > MOST_FOR_P:
        raise ValueError(f"{len(d)} pairs are too many to try all signs; allowed are {FEWEST_FOR_P} to {MOST_FOR_P}")
    sums = d[:1]  # the first sign is left as it is: with all signs turned, a sum is as far from 0
    for each in d[1:]:
        sums = np.concatenate([sums + each, sums - each])
    tolerance = 1e-9 * np.abs(d).sum()  # sums that are equal on paper differ in their last digits
    return float(np.mean(np.abs(sums) >= abs(d.sum()) - tolerance))


def superiority(differences: Sequence[float]) -> float:
    """P(A > B): the share of pairs in which the first is higher, a tie counting half (Vargha & Delaney 2000, within pairs)."""
    d = np.asarray(differences, dtype=float)
    return float(np.mean((d > 0) + 0.5 * (d == 0))) if len(d) else np.nan


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values of a family, adjusted by Holm's method (1979, statsmodels). One that is missing counts as 1 and stays missing."""
    p = np.asarray(p_values, dtype=float)
    if len(p) == 0:
        return p
    adjusted = multipletests(np.nan_to_num(p, nan=1.0), method="holm")[1]
    return np.where(np.isnan(p), np.nan, adjusted)


def verdict(low: float, high: float, *, p: float, margin: float = MARGIN) -> str:
    """What may be said of a declared contrast.

    ``no effect`` only where the interval lies within the margin and does not exclude 0; ``higher`` and ``lower`` only where it
    excludes 0 and ``p``, adjusted over the family, is at most ALPHA.
    """
    if np.isnan(low) or np.isnan(high):
        return TOO_FEW
    small = -margin <= low and high <= margin
    if not (low > 0 or high < 0):
        return "no effect" if small else "undecided"
    if not p <= ALPHA:
        return "undecided"
    return ("higher" if low > 0 else "lower") + (", by less than half a point" if small else "")


# Of a study


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A difference between two arms: ``arm`` minus ``against``."""

    arm: str
    against: str

    @classmethod
    def parse(cls, text: str) -> Contrast:
        """``"salient - shuffled"``, with spaces around the minus: an arm's name may hold one."""
        arm, minus, against = (part.strip() for part in str(text).partition(" - "))
        if not (minus and arm and against and arm != against):
            raise ParameterError("contrasts", text, "allowed is the name of an arm, ' - ', and the name of another")
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
        declared: contrasts that were fixed before the first run. They alone have a ``p_value``, a ``p_holm``, adjusted over all of
            them in all datasets and models, and a ``verdict``, all for the metric ``tested``; every other row is descriptive.
        described: further contrasts.

    Returns:
        A row per dataset, model, metric and (arm, against), with COLUMNS. n, mean and sd (with n - 1) are the arm's over the
        seeds that both have; difference, low and high those of the pairs. Each group begins with the reference itself, over all
        its seeds, without a difference, and the declared contrasts.

    Raises:
        ParameterError: an arm has no run, or a declared contrast more pairs than an exact test can take.
    """
    runs, declared, described = checked(runs), list(declared), list(described)
    known = list(dict.fromkeys(runs["arm"]))
    for name in (reference, *(name for c in (*declared, *described) for name in (c.arm, c.against))):
        if name not in known:
            raise ParameterError(
                "arm", name, f"there is no run of it{nearest(name, known)}; allowed is one of {', '.join(known)}"
            )
    rows = []
    for key, group in runs.groupby(["study", "dataset", "model", "metric"], sort=False):
        values = {arm: rows.set_index("seed")["value"] for arm, rows in group.groupby("arm", sort=False)}
        others = [Contrast(arm=arm, against=reference) for arm in values if arm != reference]
        wanted = dict.fromkeys(
            [*(c for c in (*declared, *described) if c.arm in values and c.against in values), *others]
        )
        common = dict(zip(("study", "dataset", "model", "metric"), key, strict=True))
        if reference in values:
            rows.append(common | {"arm": reference, "declared": False} | _spread(values[reference]))
        for c in wanted:
            pair = values[c.arm], values.get(c.against, values[c.arm][:0])
            test = c in declared and key[3] == tested
            rows.append(common | {"arm": c.arm, "against": c.against, "declared": test} | _row(*pair, test))
    table = pd.DataFrame(rows, columns=COLUMNS)
    family = table["declared"].astype(bool)
    table["p_holm"] = np.nan
    table.loc[family, "p_holm"] = holm(table.loc[family, "p_value"])
    table["verdict"] = [
        np.nan
        if not row.declared
        else verdict(row.low, row.high, p=row.p_holm)
        if row.n >= FEWEST_FOR_VERDICT
        else TOO_FEW
        for row in table.itertuples()
    ]
    return table


def _spread(values: pd.Series) -> dict[str, Any]:
    return {"n": len(values), "mean": values.mean(), "sd": values.std(ddof=1)}


def _row(arm: pd.Series, against: pd.Series, test: bool) -> dict[str, Any]:
    both = arm.index.intersection(against.index, sort=None)
    row = _spread(arm[both])
    if len(both) == 0:
        return row
    d = (arm[both] - against[both]).to_numpy()
    difference, low, high = interval(d)
    row |= {"difference": difference, "low": low, "high": high, "p_superior": superiority(d)}
    if test and len(both) > MOST_FOR_P:
        raise ParameterError(
            "seeds",
            len(both),
            f"all signs of so many pairs cannot be tried; allowed are at most {MOST_FOR_P} for a declared contrast",
        )
    return row | ({"p_value": sign_flip(d)} if test else {})


def checked(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs behind a study, each once.

    Raises:
        ParameterError: a column is missing, a value is, or a seed stands there twice.
    """
    for name in RUN_COLUMNS:
        if name not in runs.columns:
            raise ParameterError(
                "runs", list(runs.columns), f"a column {name} is missing; needed are {', '.join(RUN_COLUMNS)}"
            )
    missing = runs[runs["value"].isna()]
    if len(missing):
        first = missing.iloc[0]
        raise ParameterError(
            "runs",
            f"{first['arm']}, seed {first['seed']}",
            f"its {first['metric']} is missing, of {len(missing)} in all",
        )
    keys = ["study", "dataset", "model", "arm", "seed", "metric"]
    twice = runs[runs.duplicated(keys)]
    if len(twice):
        raise ParameterError(
            "runs",
            f"{twice.iloc[0]['arm']}, seed {twice.iloc[0]['seed']}",
            "it stands there twice; a seed is one sample",
        )
    return runs


def decompose(runs: pd.DataFrame, parts: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """What a reported accuracy consists of, beyond the honest one: leak + extra data + masking, per seed and exactly.

    - leak: reported - test accuracy of the run itself. Its validation images were trained on in earlier stages, the test images
      never.
    - extra data: test accuracy of the same schedule without masking - that of the single stage. Each stage draws other images,
      so that more of them are seen than the half that a single stage trains on.
    - masking: test accuracy with masks - without, at the same schedule.

    Their sum is the reported accuracy - the test accuracy of the single stage (the honest one), the row ``total``.

    Args:
        runs: with RUN_COLUMNS and the metrics reported_accuracy and test_accuracy.
        parts: names of arms: ``arm``, ``unmasked`` (the same schedule without masking; the arm itself where it has none) and
            ``honest`` (the single stage).

    Returns:
        A row per dataset, model, part and component: study, dataset, model, arm, unmasked, honest, component, n (seeds that all
        three have), mean, low, high (95 % t interval).
    """
    rows = []
    for key, group in checked(runs).groupby(["study", "dataset", "model"], sort=False):
        value = group.pivot(index="seed", columns=["metric", "arm"], values="value")
        for part in parts:
            arm, unmasked, honest = part["arm"], part["unmasked"], part["honest"]
            needed = [
                ("reported_accuracy", arm),
                *(("test_accuracy", name) for name in dict.fromkeys((arm, unmasked, honest))),
            ]
            gone = [f"{metric} of {name}" for metric, name in needed if (metric, name) not in value.columns]
            if gone:
                raise ParameterError("decomposition", arm, f"there is no {gone[0]}")
            v = value[needed].dropna()
            reported, test = v["reported_accuracy"][arm], v["test_accuracy"]
            components = {
                "leak": reported - test[arm],
                "extra data": test[unmasked] - test[honest],
                "masking": test[arm] - test[unmasked],
                "total": reported - test[honest],
            }
            for name, differences in components.items():
                mean, low, high = interval(differences.to_numpy())
                common = dict(zip(("study", "dataset", "model"), key, strict=True)) | {
                    "arm": arm,
                    "unmasked": unmasked,
                    "honest": honest,
                }
                rows.append(common | {"component": name, "n": len(v), "mean": mean, "low": low, "high": high})
    return pd.DataFrame(
        rows,
        columns=["study", "dataset", "model", "arm", "unmasked", "honest", "component", "n", "mean", "low", "high"],
    )
