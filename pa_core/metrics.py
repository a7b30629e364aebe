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
    """Numbers of the test images for summary.json: logits float32 [N, C], labels int64 [N], on the CPU.

    ``test_loss`` is the mean cross-entropy in nats, ``balanced_accuracy`` the mean recall of the classes that occur.
    """
    predicted = logits.argmax(1)
    return {
        "test_accuracy": float((predicted == labels).double().mean()),
        "test_loss": float(F.cross_entropy(logits, labels)),
        "balanced_accuracy": float(balanced_accuracy_score(labels.numpy(), predicted.numpy())),
    }


def per_class(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Precision, recall, F1 and support, a row per class; 0 where a class was never predicted. Labels int64 [N]."""
    measured = precision_recall_fscore_support(labels, predicted, labels=range(len(classes)), zero_division=0)
    names = ("class", "precision", "recall", "f1", "support")
    return pd.DataFrame(dict(zip(names, (list(classes), *measured), strict=True)))


def confusion(labels: Sequence[str], predicted: Sequence[str], classes: Sequence[str]) -> pd.DataFrame:
    """Counts: a row per true class, a column per predicted one."""
    matrix = confusion_matrix(labels, predicted, labels=list(classes))
    return pd.DataFrame(matrix, index=pd.Index(classes, name="true"), columns=pd.Index(classes, name="predicted"))


def predictions(logits: Tensor, part: Part, classes: Sequence[str]) -> pd.DataFrame:
    """Per image: id, label, predicted, confidence (probability of the predicted class, [0, 1])."""
    confidence, predicted = logits.softmax(1).max(1)
    names = np.array(classes, dtype=object)
    columns = {"id": part.ids, "label": names[part.labels.numpy()], "predicted": names[predicted.numpy()]}
    return pd.DataFrame(columns | {"confidence": confidence.numpy().round(6)})
