"""Which image is in which part: by id, once, and never the same content on two sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedKFold, train_test_split

from pa_core.data.cache import Catalogue
from pa_core.errors import ParameterError
from pa_core.params import derived_seed

DEFAULTS = {"folds": 5, "fold": 0}


def split(
    images: Catalogue, *, origin: tuple[str, Any], folds: int, fold: int, seed: int, train_fraction: float
) -> dict[str, np.ndarray]:
    """Rows (int64, ascending) of ``train``, ``val``, ``test``, and of those ``dropped`` as copies.

    The test part is the official one; else a fifth of each class, the same for every seed, fold and number of folds.
    The validation part is the official one; else fold ``fold`` of ``folds``, stratified and shuffled by ``seed``.
    Copies (same digest) follow the first of them. Training copies of a test or official validation image, and official
    validation copies of a test image, are left out.

    Args:
        images: those with a reason against them are in no part.
        origin: parameter and value to name when the images do not suffice.

    Raises:
        ParameterError: an official part is empty, a class is too small, or folds are asked for where the validation
            images are given.
    """
    labels, parts = np.array(images.labels), np.array(images.parts)
    rows = np.flatnonzero([not reason for reason in images.reasons])
    by_part = {part: rows[parts[rows] == part] for part in ("train", "val", "test")}
    given = set(parts)
    for part in given:
        if not len(by_part[part]):
            raise ParameterError(*origin, f"must have an image that can be used in its {part} part")
    for name, value in (("folds", folds), ("fold", fold)):
        if "val" in given and value != DEFAULTS[name]:
            text = f"must be {DEFAULTS[name]}, for the dataset has its own validation images"
            raise ParameterError(name, value, text)
    content = np.unique(images.digests, return_inverse=True)[1]
    train, val, test = by_part.values()
    val = val[~np.isin(content[val], content[test])]
    train = train[~np.isin(content[train], content[np.concatenate([test, by_part["val"]])])]
    dropped = np.setdiff1d(rows, np.concatenate([train, val, test]))
    _check_counts(labels[_firsts(train, content)], images.classes, origin, given, folds)
    if "test" not in given:
        firsts = _firsts(train, content)
        members = [firsts[labels[firsts] == label] for label in np.unique(labels[firsts])]
        # The same for every seed, or another run would train on test images; and whatever other classes hold.
        fifths = [train_test_split(m, test_size=fifth(len(m)), random_state=0)[1] for m in members]
        test, train = _side(train, np.concatenate(fifths), content)
    if "val" not in given:
        firsts = _firsts(train, content)
        kfold = StratifiedKFold(folds, shuffle=True, random_state=_state(seed, "folds"))
        val, train = _side(train, firsts[list(kfold.split(firsts, labels[firsts]))[fold][1]], content)
    train = _share(train, labels, train_fraction, _state(seed, "train_fraction", fold))
    return {"train": train, "val": np.sort(val), "test": np.sort(test), "dropped": dropped}


def fifth(n: int) -> int:
    """A fifth of n images: rounded, at least one."""
    return max(1, (2 * n + 5) // 10)


def _check_counts(
    labels: np.ndarray, classes: Sequence[str], origin: tuple[str, Any], given: set[str], folds: int
) -> None:
    """Each class needs an image in each fold, after the fifth for the test."""
    needed, why = (1, []) if "val" in given else (folds, [f"folds = {folds}"])
    if "test" not in given:
        needed = next(n for n in range(2, 2 * needed + 2) if n - fifth(n) >= needed)
        why.append("a fifth as test images")
    counts = np.bincount(labels, minlength=len(classes))
    if small := [f"{name} has {count}" for name, count in zip(classes, counts, strict=True) if count < needed]:
        text = f"must have at least {needed} different training images of each class{' for ' * bool(why)}"
        text = f"{text}{' and '.join(why)}, and {len(small)} of {len(classes)} are too small: {', '.join(small)}"
        raise ParameterError(*origin, text)


def _firsts(rows: np.ndarray, content: np.ndarray) -> np.ndarray:
    """The first row of each content."""
    return rows[np.sort(np.unique(content[rows], return_index=True)[1])]


def _side(rows: np.ndarray, chosen: np.ndarray, content: np.ndarray) -> list[np.ndarray]:
    """Rows whose content was chosen, and the others."""
    with_it = np.isin(content[rows], content[chosen])
    return [rows[with_it], rows[~with_it]]


def _share(rows: np.ndarray, labels: np.ndarray, fraction: float, state: int) -> np.ndarray:
    """A share of each class, at least one; a smaller share is part of every larger one."""
    members = [rows[labels[rows] == label] for label in np.unique(labels[rows])]
    shuffled = [np.random.RandomState(state).permutation(some) for some in members]
    return np.sort(np.concatenate([some[: max(1, int(fraction * len(some) + 0.5))] for some in shuffled]))


def _state(seed: int, *purpose: Any) -> int:
    return derived_seed(seed, "split", *purpose) % 2**32
