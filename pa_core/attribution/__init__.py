"""Images -> heatmaps: where did the network look? One table of methods, each a pure function.

A heatmap is [N, S, S], float32, in [0, 1], on the images' device, 1 where the evidence is strongest. Every map is
scaled per image (minimum to 0, maximum to 1); a map without any variation is 0 everywhere. The model is left as it was
found: gradients, hooks, training mode and RNG. Inside, a module imports only those before it:

    base -> cams -> captum_methods -> transformers -> controls -> table -> maps
"""
# ruff: noqa: F401

from pa_core.attribution.base import Request, as_found, scale
from pa_core.attribution.controls import derangement
from pa_core.attribution.maps import explain, grids, heatmaps, stored, upsampled
from pa_core.attribution.table import METHODS, check, fused, markdown, resolve, supported_methods
