"""Proxy Attention: train, ask where the network looked, let the next batches use those maps, repeat.

The package is a chain: a module imports only modules that stand before it.

    errors -> files -> schedule -> params -> data -> models -> attribution -> masking -> selection -> augment
    -> batch -> metrics -> runs -> device -> train -> proxy -> protocol -> prepare -> experiment -> lab

All up to `experiment` makes one run; `lab` compares and draws runs. ``import pa_core`` alone loads no module of it;
``from pa_core.experiment import run`` loads torch.
"""

__version__ = "0.2.0"
