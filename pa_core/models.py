"""A timm name -> a classifier with its preprocessing, its CAM layer and that layer's layout; its weights; pruning.

A class activation map needs one layer's activations and the logits as a function of them, which timm's forward_features
and forward_head give. In a transformer that reads its class token the last patch tokens have no gradient: there it is
the output of the last block's first norm (Gildenblat, pytorch-grad-cam). No model is known by name here.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.helpers import to_2tuple
from timm.models import load_state_dict, register_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from pa_core.errors import ParameterError, did_you_mean

MIN_GRID = 4  # a heatmap coarser than 4 x 4 says nothing about where
FEATURES = "forward_features"
Network = Any  # a timm network: an nn.Module with forward_features, forward_head, get_classifier and pretrained_cfg


@dataclass(frozen=True)
class Cam:
    """Where class activation maps are taken from."""

    layer: str  # its output: ``forward_features`` or a module's dotted name
    layout: str  # ``NCHW``, ``NHWC`` or ``tokens`` ([N, prefix + h * w, C])
    grid: tuple[int, int]  # (h, w) of the output
    prefix_tokens: int = 0  # class and register tokens before the patch tokens

    def spatial(self, activations: Tensor) -> Tensor:
        """The layer's output (or a gradient of that shape) as [N, C, h, w], whatever its layout."""
        if self.layout == "tokens":
            return activations[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, self.grid)
        return activations.permute(0, 3, 1, 2) if self.layout == "NHWC" else activations


class Classifier(nn.Module):
    """A timm network that owns its preprocessing. ``changes``: what was changed in it to keep a CAM grid of 4 x 4."""

    def __init__(self, network: Network, *, name: str, classes: int, image_size: int, cam: Cam, changes: list[str]):
        super().__init__()
        self.network, self.name, self.classes, self.image_size = network, name, classes, image_size
        self.cam, self.changes = cam, tuple(changes)
        mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.mean, self.std = nn.Buffer(mean, persistent=False), nn.Buffer(std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] in [0, 1], float -> logits [N, classes]."""
        return self.network((images - self.mean) / self.std)

    def forward_cam(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, S, S] in [0, 1] -> (the CAM layer's output, a leaf that requires grad; logits [N, classes])."""
        return _cut(self.network, self.cam.layer, (images - self.mean) / self.std)

    def describe(self) -> dict[str, Any]:
        """What the manifest keeps of the model."""
        parameters = sum(p.numel() for p in self.network.parameters())
        return {"name": self.name, "parameters": parameters, "cam": asdict(self.cam), "changes": list(self.changes)}


def check_name(name: str) -> None:
    """Refuse a name that timm does not know (ParameterError), before anything is loaded."""
    base = name.partition(".")[0]
    known = [base, *timm.list_pretrained(f"{base}.*")] if timm.is_model(base) else timm.list_models()
    if name not in known:
        allowed = f"must be one of {', '.join(known)}" if base in known else "must be a name of timm.list_models()"
        raise ParameterError("model", name, f"{allowed}{did_you_mean(name, known)}")


def create(
    name: str, *, classes: int, image_size: int, pretrained: bool | str = False, cam_layer: str | None = None, seed=0
) -> Classifier:
    """Build a classifier in float32 on the CPU, in eval mode; the global RNG is left as found, ``seed`` initialises.

    Any timm name. ``pretrained`` loads timm's own weights (True) or a file (.safetensors, or .pth/.pt without executing
    pickled code); a head of another number of classes stays fresh. ``cam_layer``: a module, instead of the model's own.
    ParameterError: an unknown name or CAM layer; weights or an image size that do not suit the network.
    """
    check_name(name)

    def build(**options: Any) -> Network:
        torch.manual_seed(seed)
        try:
            return timm.create_model(name, pretrained=pretrained is True, num_classes=classes, **options).eval()
        except (OSError, RuntimeError) as error:  # no connection; or a model for which timm has no weights
            if pretrained is not True:
                raise
            why = f"timm's weights for {name} could not be fetched ({_reason(error)})"
            allowed = f"must be false or a file, as in -p pretrained FILE.safetensors: {why}"
            raise ParameterError("pretrained", pretrained, allowed) from error

    with torch.random.fork_rng(devices=[]):
        ways = ((find, *variant) for find in (_find_cam, _earlier_cam) for variant in _variants(build, image_size))
        for find, network, changes in ways:  # noqa: B007  they are used below
            if cam := find(network, image_size):
                break
        else:
            allowed = f"must give {name} a heatmap grid of 4x4 or more (this size is too small for it, or not taken)"
            raise ParameterError("image_size", image_size, f"{allowed}; another size or model may suit")
        if isinstance(pretrained, str):
            _load_weights(network, Path(pretrained).expanduser())
        if cam_layer is not None and (cam := _cam(network, cam_layer, image_size)) is None:
            names = [name for name, _ in network.named_modules()]
            hint = did_you_mean(cam_layer, names) if cam_layer not in names else ""
            allowed = "must be a module that gives a map or patch tokens of 4x4 or more on which the logits depend"
            raise ParameterError("cam_layer", cam_layer, f"{allowed}: a module's dotted name{hint}")
    return Classifier(network, name=name, classes=classes, image_size=image_size, cam=cam, changes=changes).eval()


def _reason(error: Exception) -> str:
    """The first sentence of an error, on one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...").split(". ")[0]


def _load_weights(network: Network, path: Path) -> None:
    """Load a state dict from a file; a head that does not fit keeps its fresh weights, anything else must fit."""
    own, heads = network.state_dict(), network.get_classifier()  # a distilled transformer has two
    heads = heads if isinstance(heads, (list, tuple)) else [heads]
    heads = tuple(f"{name}." for name, module in network.named_modules() if module in heads)
    # timm's own conversion, which resamples position embeddings; its modules share this name for it
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", lambda state, _: state)
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
        state = convert({key.removeprefix("network."): value for key, value in state.items()}, network)
        # num_batches_tracked has no part in what a network computes, and converted checkpoints leave it out
        for key in [key for key in own if key.startswith(heads) or key.endswith("num_batches_tracked")]:
            if key not in state or state[key].shape != own[key].shape:
                state[key] = own[key]
        network.load_state_dict(state)
    except Exception as error:  # every reader has exceptions of its own for a damaged or unsafe file
        allowed = f"must be true, false or a file of weights that can be read and fit this network ({_reason(error)})"
        raise ParameterError("pretrained", str(path), allowed) from error


def _variants(build: Callable[..., Network], size: int) -> Iterator[tuple[Network, list[str]]]:
    """The network, changed by more and more so that it takes this size with a finer CAM grid, and what was changed.

    A smaller patch (ViT and Swin), or strides of 1: timm's ``output_stride`` would dilate, and misses VGG and DenseNet.
    """
    for options in ({}, {"img_size": size}):  # CaiT, ConViT, XCiT, MaxViT and mixers take it only when they are built
        with suppress(Exception) if options else nullcontext():  # most have no such argument
            network = build(**options)
            embed = getattr(network, "patch_embed", None) if hasattr(network, "set_input_size") else None
            patch: Any = to_2tuple(getattr(embed, "patch_size", 0))[0]
            for p in range(patch, 0, -1):  # attention costs the square of the number of patches
                if size % p == 0 and size // p >= MIN_GRID and (p == patch or size // p <= 32):
                    with suppress(Exception):  # a network refuses a size in any way it likes
                        network.set_input_size(img_size=(size, size), patch_size=(p, p))
                        yield network, [f"patch size {patch} -> {p}"] if p != patch else []
            yield network, []
            if not patch:
                yield from ((network, changes) for changes in _unstride(network))


def _unstride(network: Network) -> Iterator[list[str]]:
    """Set to 1 the strides of the last reduction, then of the last two, and so on; yield all that was done by then."""
    size = max(256, network.pretrained_cfg.get("input_size", (3, 256, 256))[-1])
    strided = {part: name for name, part in network.named_modules() if getattr(part, "stride", 1) not in (1, (1, 1))}
    reduced, levels, changes = {}, [], []  # the resolution that each reduces: branches of a block have the same

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in strided and not any(module.children()) and output.shape[-1] < inputs[0].shape[-1]:
            reduced[module] = inputs[0].shape[-1]

    with suppress(Exception), torch.no_grad(), register_module_forward_hook(watch):  # it may take one size only
        network.forward_features(torch.zeros(1, 3, size, size))
        levels = sorted(set(reduced.values()))
    for level in levels:
        for module in [module for module in reduced if reduced[module] == level]:
            stride = to_2tuple(module.stride)[0]
            if isinstance(module, nn.Conv2d):
                if module.padding == (0, 0) and module.kernel_size[0] > 1:
                    module.padding = "same"  # patches side by side have no padding of their own
            elif to_2tuple(getattr(module, "kernel_size", None))[0] == stride:
                module.kernel_size = (1, 1)  # a pool over tiles: without its stride there is nothing left to pool
            module.stride = (1, 1)
            changes = [*changes, f"stride of {strided[module]} {stride} -> 1"]
        yield changes


def _find_cam(network: Network, size: int) -> Cam | None:
    """The first that is usable: the features where they are a map, a norm of the last block, features of tokens."""
    features = _cam(network, FEATURES, size)
    if features and features.layout != "tokens":
        return features
    names, info = dict(network.named_modules()), getattr(network, "feature_info", None) or []
    levels = [level["module"] for level in info if "module" in level]
    last = levels[-1] if levels else "blocks"
    while isinstance(names.get(last), (nn.Sequential, nn.ModuleList)) and len(names[last]):
        last = f"{last}.{len(names[last]) - 1}"
    parts = names[last].named_children() if last in names else ()
    norms = [f"{last}.{name}" for name, part in parts if "norm" in type(part).__name__.lower()]
    return next(filter(None, (_cam(network, norm, size) for norm in norms)), features)


def _earlier_cam(network: Network, size: int) -> Cam | None:
    """The last level of features that is fine enough, where the last of all is not."""
    levels = [level["module"] for level in getattr(network, "feature_info", None) or [] if "module" in level]
    return next(filter(None, (_cam(network, level, size) for level in reversed(levels))), None)


def _cam(network: Network, layer: str, size: int) -> Cam | None:
    """A layer on which the logits depend, if it gives a map or patch tokens, square as images are, of 4 x 4 or more."""
    try:
        activations, outputs = _cut(network, layer, torch.rand(1, 3, size, size), pre_logits=True)
        (gradient,) = torch.autograd.grad(outputs.float().logsumexp(1).sum(), activations)
    except Exception:  # the layer gives no tensor, is not called or has no influence, or the network refuses the size
        return None
    shape, cams = gradient.shape, []
    if len(shape) == 4:
        cams = [Cam(layer, "NCHW", (shape[2], shape[3])), Cam(layer, "NHWC", (shape[1], shape[2]))]
        cams = cams[::-1] if getattr(network, "output_fmt", "NCHW") == "NHWC" else cams
    elif len(shape) == 3:
        prefixes = (getattr(network, "num_prefix_tokens", 0), 0, 1)
        sides = [(math.isqrt(max(shape[1] - prefix, 0)), prefix) for prefix in prefixes]
        cams = [Cam(layer, "tokens", (side, side), prefix) for side, prefix in sides if side**2 == shape[1] - prefix]
    cam = next((cam for cam in cams if cam.grid[0] == cam.grid[1] >= MIN_GRID), None)
    return cam if cam and cam.spatial(gradient).any() else None


def _cut(network: Network, layer: str, inputs: Tensor, **head: bool) -> tuple[Tensor, Tensor]:
    """Forward pass whose graph begins at a layer: (its output, a leaf; the logits, or what the classifier reads)."""
    leaves: list[Tensor] = []

    def cut(*call: Any) -> Tensor:  # the output, or what a hook gets: (module, inputs, output)
        leaves.append(call[-1].detach().requires_grad_())
        torch.set_grad_enabled(True)  # what came before ran without a graph; the outer no_grad restores the mode
        return leaves[-1].clone()  # because what follows may begin with an in-place activation

    hook = nullcontext() if layer == FEATURES else network.get_submodule(layer).register_forward_hook(cut)
    with torch.no_grad(), hook:
        features = network.forward_features(inputs)
        logits = network.forward_head(cut(features) if layer == FEATURES else features, **head)
    return leaves[-1], logits


MASK, ORIGINAL = "parametrizations.weight.0.mask", "parametrizations.weight.original"  # of a layer, in a state dict


class _Pruned(nn.Module):
    """Keeps entries of a weight at 0, also where a network reads it without calling its layer (BEiT)."""

    def __init__(self, weight: Any):
        super().__init__()
        self.mask = nn.Buffer(torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def _masked(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(Weight, its mask, of ones if it had none) of all convolutions and linear layers, to be changed in place."""
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    for layer in layers:
        if not parametrize.is_parametrized(layer, "weight"):
            parametrize.register_parametrization(layer, "weight", _Pruned(layer.weight), unsafe=True)
    return [(layer.get_parameter(ORIGINAL), layer.get_buffer(MASK)) for layer in layers]


def prune(network: nn.Module, share: float) -> None:
    """Prune this share, in (0, 1], of the weights left, the smallest of all convolutions and linear layers; in place.

    Han et al. 2015; an optimizer's parameters stay valid. torch.nn.utils.prune would hinder copies and misses BEiT's.
    """
    layers = _masked(network)
    left = torch.cat([weight.detach()[mask].abs() for weight, mask in layers]).cpu()
    limit = left.kthvalue(max(round(share * len(left)), 1)).values.item()
    for weight, mask in layers:
        mask &= weight.detach().abs() > limit


def sparsity(network: nn.Module) -> float:
    """Pruned share of the weights that `prune` counts, in [0, 1]."""
    masks = [value for key, value in network.state_dict().items() if key.endswith(MASK)]
    return sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks) if masks else 0.0


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict as before pruning: ``weight``, with zeros, for what pruning keeps of a layer."""
    state = dict(network.state_dict())
    for layer in [key.removesuffix(MASK) for key in state if key.endswith(MASK)]:
        state[f"{layer}weight"] = state.pop(layer + MASK) * state.pop(layer + ORIGINAL)
    return state


def restore_pruning(network: nn.Module, state: dict[str, Any]) -> None:
    """Make the network ready for ``load_state_dict(state)`` where the state is that of a pruned network."""
    if any(key.endswith(MASK) for key in state):
        _masked(network)


def _conv(inputs: int, outputs: int, *pool: nn.Module) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, *pool, nn.BatchNorm2d(outputs), nn.ReLU())


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@register_model
class resnet9(nn.Module):  # timm takes its name from here
    """Page's ResNet-9 for 32 x 32 images (DAWNBench 2018); as in airbench (Jordan 2024) stages pool, then normalise."""

    pretrained_cfg = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616), "input_size": (3, 32, 32)}

    def __init__(self, pretrained: bool = False, *, num_classes: int = 1000, **_: Any):
        super().__init__()
        if pretrained:
            raise RuntimeError("there are no weights for resnet9")
        first = [_conv(3, 64), _conv(64, 128, nn.MaxPool2d(2)), _Residual(_conv(128, 128), _conv(128, 128))]
        middle = [_conv(128, 256, nn.MaxPool2d(2)), _conv(256, 512, nn.MaxPool2d(2))]
        self.features = nn.Sequential(*first, *middle, _Residual(_conv(512, 512), _conv(512, 512)))
        self.fc = nn.Linear(512, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:  # [N, 512, S / 8, S / 8]
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.amax((2, 3))  # the greatest value of each map; logits / 8 are a warm temperature
        return x if pre_logits else self.fc(x) / 8

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.features(x))
