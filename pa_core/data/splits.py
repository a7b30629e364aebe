"""Which image is in which part: by id, once, and never the same content on two sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.utils import shuffle

from pa_core.params import ParameterError, derived_seed

FIFTH = 5
TEST_SEED = 0
"""The fifth set aside is the same for every seed, or another run would train on test images."""
FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows (int64, ascending) of each part, and those left out as copies."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    dropped: np.ndarray


def split(
    *,
    rows: np.ndarray,
    labels: np.ndarray,
    digests: Sequence[str],
    parts: np.ndarray,
    classes: Sequence[str],
    origin: tuple[str, Any],
    folds: int,
    fold: int,
    seed: int,
    train_fraction: float,
) -> Split:
    """Test, validation and training rows.

    The test part is the official one; else a fifth of each class, the same for every seed, fold and
    number of folds. The validation part is the official one; else fold ``fold`` of ``folds``,
    stratified and shuffled by ``seed``. Copies (same digest) follow the first of them. Training
    copies of a test or official validation image, and such validation copies of a test image, are
    left out.

    Args:
        rows: int64 [n], the rows to split.
        labels, digests, parts: of all N rows; ``parts`` are the official ones.
        classes: names, by label.
        origin: parameter and value to name when the images do not suffice.

    Raises:
        ParameterError: an official part is empty, a class is too small, or folds are asked for
            where the validation images are given.
    """
    by_part = {part: rows[parts[rows] == part] for part in ("train", "val", "test")}
    given = {part for part in by_part if part in parts}
    for part in given:
        if not len(by_part[part]):
            raise ParameterError(*origin, f"no image of its {part} part is left")
    _check_folds(given, folds, fold)
    content = np.unique(np.asarray(digests), return_inverse=True)[1]
    train, val, test = by_part["train"], by_part["val"], by_part["test"]
    kept_val = val[~np.isin(content[val], content[test])]
    kept = train[~np.isin(content[train], content[np.concatenate([test, val])])]
    dropped = np.sort(np.concatenate([np.setdiff1d(train, kept), np.setdiff1d(val, kept_val)]))
    train, val = kept, kept_val
    _check_counts(train, labels, content, classes, origin, given, folds)
    if "test" not in given:
        test, train = _side(train, _fifth(_firsts(train, content), labels), content)
    if "val" not in given:
        firsts = _firsts(train, content)
        kfold = StratifiedKFold(folds, shuffle=True, random_state=_state(seed, "folds"))
        chosen = list(kfold.split(firsts, labels[firsts]))[fold][1]
        val, train = _side(train, firsts[chosen], content)
    return Split(
        train=_fraction(train, labels, train_fraction, _state(seed, "train_fraction", fold)),
        val=np.sort(val),
        test=np.sort(test),
        dropped=dropped,
    )


def _check_folds(given: set[str], folds: int, fold: int) -> None:
    for name, value, default in (("folds", folds, FOLDS), ("fold", fold, 0)):
        if "val" in given and value != default:
            text = "the dataset has its own validation images, so it has no effect"
            raise ParameterError(name, value, f"{text}; allowed is {default}")


def _check_counts(
    train: np.ndarray,
    labels: np.ndarray,
    content: np.ndarray,
    classes: Sequence[str],
    origin: tuple[str, Any],
    given: set[str],
    folds: int,
) -> None:
    """Each class needs an image in each fold, after the fifth for the test."""
    needed, why = (1, []) if "val" in given else (folds, [f"folds = {folds}"])
    if "test" not in given:
        needed = next(n for n in range(2, 2 * needed + 2) if n - _of(n) >= needed)
        why.append("a fifth as test images")
    counts = np.bincount(labels[_firsts(train, content)], minlength=len(classes))
    counted = zip(classes, counts, strict=True)
    if small := [f"{name} has {count}" for name, count in counted if count < needed]:
        purpose = f" for {' and '.join(why)}" if why else ""
        text = f"each class needs at least {needed} different training images{purpose}"
        text = f"{text}, and {len(small)} of {len(classes)} are too small: {', '.join(small)}"
        raise ParameterError(*origin, text)


def _of(n: int) -> int:
    """A fifth of n images: rounded, at least one."""
    return max(1, (2 * n + FIFTH) // (2 * FIFTH))


def _fifth(firsts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A fifth of each class, whatever the other classes hold."""
    chosen = []
    for label in np.unique(labels[firsts]):
        members = firsts[labels[firsts] == label]
        count = _of(len(members))
        chosen.append(train_test_split(members, test_size=count, random_state=TEST_SEED)[1])
    return np.concatenate(chosen)


def _firsts(rows: np.ndarray, content: np.ndarray) -> np.ndarray:
    """The first row of each content."""
    return rows[np.sort(np.unique(content[rows], return_index=True)[1])]


def _side(rows: np.ndarray, chosen: np.ndarray, content: np.ndarray) -> list[np.ndarray]:
    """Rows whose content was chosen, and the others."""
    with_it = np.isin(content[rows], content[chosen])
    return [rows[with_it], rows[~with_it]]


def _fraction(rows: np.ndarray, labels: np.ndarray, fraction: float, state: int) -> np.ndarray:
    """A share of each class, at least one; a smaller share is part of every larger one."""
    chosen = []
    for label in np.unique(labels[rows]):
        members = shuffle(rows[labels[rows] == label], random_state=state)
        chosen.append(members[: max(1, int(fraction * len(members) + 0.5))])
    return np.sort(np.concatenate(chosen))


def _state(seed: int, *purpose: Any) -> int:
    return derived_seed(seed, "split", *purpose) % 2**32
