"""How good are predictions? Accuracies and shares are fractions in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support


def per_class(labels: Sequence[int], predicted: Sequence[int], classes: Sequence[str]) -> pd.DataFrame:
    """Precision, recall, F1 and support, a row per class; 0 where a class was never predicted (scikit-learn)."""
    numbers = list(range(len(classes)))
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0)
    return pd.DataFrame({"class": list(classes), "precision": precision, "recall": recall, "f1": f1, "support": support})


def confusion(labels: Sequence[int], predicted: Sequence[int], classes: Sequence[str]) -> pd.DataFrame:
    """Counts: a row per true class, a column per predicted one (scikit-learn)."""
    matrix = confusion_matrix(labels, predicted, labels=list(range(len(classes))))
    return pd.DataFrame(matrix, index=pd.Index(classes, name="true"), columns=pd.Index(classes, name="predicted"))
