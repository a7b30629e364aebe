"""Benchmarks: ``make bench``, or one of them, ``make bench BENCH=heatmaps``. They measure; they never pass or fail."""
