"""Draw fashion_mini from the original Fashion-MNIST files.

    python tests/draw_fashion_mini.py SOURCE OUT

SOURCE is a folder with the four idx files, gzipped, e.g. that of Debian's package
dataset-fashion-mnist. OUT is a folder; ``fashion_mini.npz`` is written there.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np

SEED = 2017
PER_CLASS = {"train": 400, "test": 200}
PREFIX = {"train": "train", "test": "t10k"}


def idx(path: Path) -> np.ndarray:
    """An array of bytes from a gzipped idx file: 0, 0, type 8, number of axes, their lengths
    (big-endian), values.

    Raises:
        ValueError: this is no such file.
    """
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of bytes")
    axes = data[3]
    shape = np.frombuffer(data, dtype=">u4", count=axes, offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


def draw(source: Path) -> dict[str, np.ndarray]:
    """For ``train`` and ``test``: images uint8 [n, 28, 28], labels uint8 [n], rows uint16 [n] in
    the original files.

    Each class gives the same number; rows ascend.
    """
    # The one generator of numpy's whose numbers are promised to stay the same.
    random = np.random.RandomState(SEED)
    drawn = {}
    for part, count in PER_CLASS.items():
        images = idx(source / f"{PREFIX[part]}-images-idx3-ubyte.gz")
        labels = idx(source / f"{PREFIX[part]}-labels-idx1-ubyte.gz")
        chosen = [random.permutation(np.flatnonzero(labels == label))[:count] for label in range(10)]
        rows = np.sort(np.concatenate(chosen))
        drawn |= {f"{part}_images": images[rows], f"{part}_labels": labels[rows]}
        drawn[f"{part}_rows"] = rows.astype(np.uint16)
    return drawn


def main(source: str, out: str) -> None:
    path = Path(out) / "fashion_mini.npz"
    np.savez_compressed(path, **draw(Path(source)))
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
