"""Which image is in which part: by id, once, and never the same content on two sides."""

from __future__ import annotations

import numpy as np

from pa_core.data.decode import Catalogue
from pa_core.errors import ParameterError
from pa_core.params import derived_seed


def split(
    catalogue: Catalogue, *, folds: int, fold: int, seed: int, train_fraction: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows (int64, ascending) of ``train``, ``val`` and ``test``, and of those that were dropped as copies.

    The test part is the official one; else a fifth of each class, the same for every seed, fold and number of folds.
    The validation part is the official one; else fold ``fold`` of ``folds``, stratified and shuffled by ``seed``.
    Copies (same digest) follow the first of them. Training copies of a test or official validation image, and official
    validation copies of a test image, are left out. Of each class's training images ``train_fraction`` stays; smaller
    shares are part of larger ones. ParameterError where a part or class is too small, or folds are without meaning.
    """
    labels, parts = (np.array([getattr(entry, name) for entry in catalogue.entries]) for name in ("label", "part"))
    rows = np.flatnonzero([not entry.reason for entry in catalogue.entries])
    content = np.unique([entry.digest for entry in catalogue.entries], return_inverse=True)[1]  # equal where copies
    given = set(parts.tolist())
    if empty := given - set(parts[rows].tolist()):
        raise ParameterError(*catalogue.origin, f"must have an image that can be used in its {min(empty)} part")
    for name, value, default in (("folds", folds, 5), ("fold", fold, 0)):
        if "val" in given and value != default:
            raise ParameterError(name, value, f"must be {default}, for the dataset has its own validation images")
    train, val, test = (rows[parts[rows] == part] for part in ("train", "val", "test"))
    train = train[~np.isin(content[train], content[np.concatenate([test, val])])]
    val = val[~np.isin(content[val], content[test])]
    dropped = np.setdiff1d(rows, np.concatenate([train, val, test]))
    firsts = train[np.sort(np.unique(content[train], return_index=True)[1])]  # the first of each content
    needed = 1 if "val" in given else folds
    if "test" not in given:  # so many that enough are left once a fifth is set aside
        needed = next(n for n in range(2, 2 * needed + 2) if n - max(1, round(n / 5)) >= needed)
    counts = np.bincount(labels[firsts], minlength=len(catalogue.classes))
    if small := [f"{name} has {n}" for name, n in zip(catalogue.classes, counts, strict=True) if n < needed]:
        text = f"must have at least {needed} different training images of each class with folds = {folds}, and"
        raise ParameterError(*catalogue.origin, f"{text} {len(small)} of {len(counts)} have less: {', '.join(small)}")
    if "test" not in given:
        chosen = drawn(firsts, labels, 0.2, 0)  # the same for every seed, or another run would train on test images
        test = train[np.isin(content[train], content[chosen])]
        train, firsts = np.setdiff1d(train, test), np.setdiff1d(firsts, chosen)
    if "val" not in given:
        state = derived_seed(seed, "split", "folds") % 2**32
        chosen = firsts[stratified_folds(labels[firsts], folds, state) == fold]
        val = train[np.isin(content[train], content[chosen])]
        train = np.setdiff1d(train, val)
    train = drawn(train, labels, train_fraction, derived_seed(seed, "split", "train_fraction", fold) % 2**32)
    return {"train": train, "val": val, "test": test}, dropped


def drawn(rows: np.ndarray, labels: np.ndarray, fraction: float, state: int) -> np.ndarray:
    """A fraction of each class's rows, ascending: rounded, at least one; no class changes another's draw."""
    members = [rows[labels[rows] == label] for label in np.unique(labels[rows])]
    shuffled = [np.random.RandomState(state).permutation(some) for some in members]
    return np.sort(np.concatenate([some[: max(1, int(fraction * len(some) + 0.5))] for some in shuffled]))


def stratified_folds(labels: np.ndarray, folds: int, state: int) -> np.ndarray:
    """The fold of each of n images, int64 [n], as scikit-learn's StratifiedKFold shuffles them, which takes a second to
    import: the classes, in the order of their first images, are dealt to the folds in turn; each is then shuffled."""
    random, found, start = np.random.RandomState(state), np.empty(len(labels), np.int64), 0
    for label in dict.fromkeys(labels.tolist()):
        members = labels == label
        dealt = np.sort(np.arange(start, start + members.sum()) % folds)
        random.shuffle(dealt)
        found[members], start = dealt, start + len(dealt)
    return found
