"""Images -> heatmaps: where did the network look? Each method is a pure function, and a row in docs/methods.md.

A heatmap is [N, S, S], float32, in [0, 1], on the images' device, 1 where the evidence is strongest. Every map is
scaled per image (minimum to 0, maximum to 1); a map without any variation is 0 everywhere. The model is left as it was
found: gradients, hooks, training mode and RNG.
"""
# ruff: noqa: F401

from pa_core.attribution.base import Request, as_found, scale, stored, upsampled
from pa_core.attribution.cams import grids
from pa_core.attribution.controls import CONTROLS, derangement
from pa_core.attribution.methods import METHODS, check, explain, fused, heatmaps, reason, resolve, supported_methods
