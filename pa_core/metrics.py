"""How good are predictions? Accuracies and shares are fractions in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support


def per_class(labels: Sequence[str], predicted: Sequence[str], classes: Sequence[str]) -> pd.DataFrame:
    """Precision, recall, F1 and support, a row per class; 0 where a class was never predicted (scikit-learn)."""
    names = list(classes)
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=names, zero_division=0)
    return pd.DataFrame({"class": names, "precision": precision, "recall": recall, "f1": f1, "support": support})


def confusion(labels: Sequence[str], predicted: Sequence[str], classes: Sequence[str]) -> pd.DataFrame:
    """Counts: a row per true class, a column per predicted one (scikit-learn)."""
    matrix = confusion_matrix(labels, predicted, labels=list(classes))
    return pd.DataFrame(matrix, index=pd.Index(classes, name="true"), columns=pd.Index(classes, name="predicted"))
