"""Which image is in which part: by id, once, and never the same content on two sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedKFold, train_test_split

from pa_core.data.cache import Catalogue
from pa_core.errors import ParameterError
from pa_core.params import derived_seed


def split(
    images: Catalogue, *, origin: tuple[str, Any], folds: int, fold: int, seed: int, train_fraction: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows (int64, ascending) of ``train``, ``val`` and ``test``, and of those that were dropped as copies.

    The test part is the official one; else a fifth of each class, the same for every seed, fold and number of folds.
    The validation part is the official one; else fold ``fold`` of ``folds``, stratified and shuffled by ``seed``.
    Copies (same digest) follow the first of them. Training copies of a test or official validation image, and official
    validation copies of a test image, are left out. Of each class's training images ``train_fraction`` stays; smaller
    shares are part of larger ones. Images that cannot be used are in no part. ParameterError where an official
    part is empty, a class is too small, or folds are asked for though the validation images are given.
    """
    labels, parts, classes = np.array(images.labels), np.array(images.parts), range(len(images.classes))
    rows = np.flatnonzero([not reason for reason in images.reasons])
    by_part = {part: rows[parts[rows] == part] for part in ("train", "val", "test")}
    given = set(parts)
    for part in given:
        if not len(by_part[part]):
            raise ParameterError(*origin, f"must have an image that can be used in its {part} part")
    for name, value, default in (("folds", folds, 5), ("fold", fold, 0)):
        if "val" in given and value != default:
            raise ParameterError(name, value, f"must be {default}, for the dataset has its own validation images")
    content = np.unique(images.digests, return_inverse=True)[1]
    train, val, test = by_part.values()
    val = val[~np.isin(content[val], content[test])]
    train = train[~np.isin(content[train], content[np.concatenate([test, by_part["val"]])])]
    dropped = np.setdiff1d(rows, np.concatenate([train, val, test]))
    firsts = train[np.sort(np.unique(content[train], return_index=True)[1])]  # the first of each content
    _check_counts(labels[firsts], images.classes, origin, given, folds)
    if "test" not in given:
        # The same for every seed, or another run would train on test images; each class by itself.
        members = [firsts[labels[firsts] == label] for label in classes]
        chosen = np.concatenate([train_test_split(m, test_size=fifth(len(m)), random_state=0)[1] for m in members])
        test = train[np.isin(content[train], content[chosen])]
        train, firsts = np.setdiff1d(train, test), np.setdiff1d(firsts, chosen)
    if "val" not in given:
        kfold = StratifiedKFold(folds, shuffle=True, random_state=derived_seed(seed, "split", "folds") % 2**32)
        chosen = firsts[list(kfold.split(firsts, labels[firsts]))[fold][1]]
        val = train[np.isin(content[train], content[chosen])]
        train = np.setdiff1d(train, val)
    state = derived_seed(seed, "split", "train_fraction", fold) % 2**32
    shuffled = [np.random.RandomState(state).permutation(train[labels[train] == label]) for label in classes]
    train = np.concatenate([some[: max(1, int(train_fraction * len(some) + 0.5))] for some in shuffled])
    return {"train": np.sort(train), "val": val, "test": test}, dropped


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
