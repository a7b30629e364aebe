"""Datasets: names, splits by image id, images decoded once.

A module imports only those before it: decode -> cache -> sources -> splits -> dataset.
"""

from pa_core.data.dataset import Dataset, Part, fits, identify, load, send
from pa_core.data.decode import UNREADABLE, read_image
from pa_core.data.sources import DATASETS, names

__all__ = ["DATASETS", "UNREADABLE", "Dataset", "Part", "fits", "identify", "load", "names", "read_image", "send"]
