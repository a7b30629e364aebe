"""Datasets: registry, splits by image id, images decoded once, augmentation in batches.

One link of the package's chain. Inside, a module imports only those before it:

    decode -> workers -> store -> folder -> sources -> splits -> augment -> dataset
"""

from pa_core.data.augment import augment
from pa_core.data.dataset import Dataset, Part, load
from pa_core.data.sources import DATASETS, names

__all__ = ["DATASETS", "Dataset", "Part", "augment", "load", "names"]
