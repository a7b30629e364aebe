"""How good are predictions? Accuracies and shares are fractions in [0, 1].

To add a number to every run's summary.json, and with it a column to `lab.results`: a line in :func:`summarise`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support
from torch import Tensor
from torch.nn import functional as F

from pa_core.data import Part


def summarise(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Numbers of one part of the data: logits float32 [N, C], labels int64 [N], on the CPU.

    Returns:
        loss: mean cross-entropy, nats. accuracy. balanced_accuracy: mean recall of the classes that occur.
    """
    predicted = logits.argmax(1)
    return {
        "accuracy": float((predicted == labels).double().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
        "balanced_accuracy": float(balanced_accuracy_score(labels.numpy(), predicted.numpy())),
    }


def per_class(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Precision, recall, F1 and support, a row per class; 0 where a class was never predicted (scikit-learn).

    Args:
        labels, predicted: int64 [N], positions among ``classes``.
    """
    numbers = range(len(classes))
    measured = precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0)
    columns = dict(zip(("precision", "recall", "f1", "support"), measured, strict=True))
    return pd.DataFrame({"class": list(classes), **columns})


def confusion(labels: Sequence[str], predicted: Sequence[str], classes: Sequence[str]) -> pd.DataFrame:
    """Counts: a row per true class, a column per predicted one (scikit-learn)."""
    matrix = confusion_matrix(labels, predicted, labels=list(classes))
    return pd.DataFrame(matrix, index=pd.Index(classes, name="true"), columns=pd.Index(classes, name="predicted"))


def predictions(logits: Tensor, part: Part, classes: Sequence[str]) -> pd.DataFrame:
    """Per image: id, label, predicted, confidence (probability of the predicted class, [0, 1])."""
    confidence, predicted = logits.softmax(1).max(1)
    names = {"label": part.labels, "predicted": predicted}
    named = {column: [classes[i] for i in numbers.tolist()] for column, numbers in names.items()}
    return pd.DataFrame({"id": list(part.ids), **named, "confidence": confidence.numpy().round(6)})
