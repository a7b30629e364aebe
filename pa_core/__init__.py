"""Proxy Attention: train, ask where the network looked, let the next batches use those maps, repeat.

The package is a chain: a module imports only modules above it.

    errors -> files -> schedule -> coerce -> params -> data -> models -> attribution -> masking -> selection -> augment
    -> batch -> metrics -> runs -> device -> train -> proxy -> protocol -> prepare -> experiment -> lab

One run is below; `lab` is for many runs and for looking at them. Importing ``pa_core`` alone loads none of them;
``from pa_core.experiment import run`` loads torch.
"""

__version__ = "0.2.0"
