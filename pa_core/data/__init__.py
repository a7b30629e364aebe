"""Datasets: names, splits by image id, images decoded once.

One link of the package's chain. Inside, a module imports only those before it:

    decode -> cache -> folder -> torchvision_sets -> sources -> splits -> dataset
"""

from pa_core.data.dataset import Dataset, Part, fits, identify, load, send
from pa_core.data.decode import UNREADABLE, read_image
from pa_core.data.sources import DATASETS, names

__all__ = ["DATASETS", "UNREADABLE", "Dataset", "Part", "fits", "identify", "load", "names", "read_image", "send"]
