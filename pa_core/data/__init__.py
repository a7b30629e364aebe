"""Datasets: names, splits by image id, images decoded once. In order: decode, sources, splits, dataset."""

from pa_core.data.dataset import Dataset, Part, fits, identify, load, send
from pa_core.data.decode import read_image
from pa_core.data.sources import names

__all__ = ["Dataset", "Part", "fits", "identify", "load", "names", "read_image", "send"]
