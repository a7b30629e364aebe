"""Datasets: registry, splits by image id, images decoded once, augmentation in batches.

One link of the package's chain. Inside, a module imports only those before it:

    decode -> workers -> store -> folder -> sources -> splits -> augment -> dataset
"""

from pa_core.data.augment import Mixing, augment, mix
from pa_core.data.dataset import Dataset, Part, load
from pa_core.data.sources import DATASETS, names
from pa_core.data.store import Placement, place, send

__all__ = ["DATASETS", "Dataset", "Mixing", "Part", "Placement", "augment", "load", "mix", "names", "place", "send"]
