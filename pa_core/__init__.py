"""Proxy Attention: train, ask where the network looked, let the next batches use those maps, repeat.

The package is a chain: a module imports only modules that stand before it.

    errors -> files -> schedule -> params -> data -> models -> attribution -> masking -> selection -> augment
    -> batch -> metrics -> runs -> device -> train -> proxy -> protocol -> experiment -> lab

All up to `experiment` makes one run; `lab` compares and draws runs. ``import pa_core`` alone loads none of it.
"""

__version__ = "0.2.0"
