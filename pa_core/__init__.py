"""Proxy Attention: train, look where the network looked on its worst images, mask that, train on.

The package is a chain: a module imports only modules above it.

    schedule -> params -> data -> models -> attribution -> masking -> selection -> metrics -> runs -> train
    -> proxy -> protocol -> experiment -> statistics -> results -> figures -> sweep -> study

``schedule`` knows nothing but its own text, so it stands first and `params` can refuse a bad one.
Importing ``pa_core`` alone loads none of them; ``from pa_core.experiment import run`` loads torch.
"""

__version__ = "0.1.0"
