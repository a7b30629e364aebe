"""Golden values: what a run's digest promises, recorded once. See ``record.py`` and ``tests/test_golden.py``."""
