"""A timm name -> a classifier with its preprocessing, its CAM layer and that layer's layout; its weights; pruning.

A class activation map needs the activations ``A`` of one layer and the logits as a function of ``A``. timm's own split
``forward_head(forward_features(x))`` gives both for convolutional networks and for Swin. In a vision transformer that
reads its class token, the patch tokens after the last block have no gradient, so there ``A`` is the output of the last
block's first norm, as is usual (Gildenblat, pytorch-grad-cam). No model is known by name here.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.layers.helpers import to_2tuple
from timm.models import load_state_dict, register_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from pa_core.errors import ParameterError, did_you_mean

MIN_GRID = 4  # a heatmap coarser than 4 x 4 says nothing about where
MAX_TOKENS = 1024  # a smaller patch may not make more of them: attention costs their square
FEATURES = "forward_features"
Network = Any  # a timm network: an nn.Module with forward_features, forward_head, get_classifier and pretrained_cfg


@dataclass(frozen=True, kw_only=True)
class Cam:
    """Where class activation maps are taken from."""

    layer: str  # its output: ``forward_features`` or a module's dotted name
    layout: str  # ``NCHW``, ``NHWC`` or ``tokens`` ([N, prefix + h * w, C])
    grid: tuple[int, int]  # (h, w) of the output
    prefix_tokens: int = 0  # class and register tokens before the patch tokens

    def spatial(self, activations: Tensor) -> Tensor:
        """The layer's output (or a gradient of that shape) as [N, C, h, w], whatever its layout."""
        if self.layout == "NCHW":
            return activations
        if self.layout == "NHWC":
            return activations.permute(0, 3, 1, 2)
        return activations[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, self.grid)


class Classifier(nn.Module):
    """A timm network that owns its preprocessing: pixels in [0, 1] in, logits out."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: Network, *, name: str, classes: int, image_size: int, cam: Cam, changes: tuple[str, ...]
    ):
        super().__init__()
        self.network, self.name, self.classes, self.image_size, self.cam = network, name, classes, image_size, cam
        self.changes = changes  # what was changed in the network to keep a CAM grid of at least 4 x 4, one text each
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] in [0, 1] -> what the network was trained on."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] in [0, 1], float -> logits [N, classes]."""
        return self.network(self.normalise(images))

    def forward_cam(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, S, S] in [0, 1] -> (the CAM layer's output, a leaf that requires grad; logits [N, classes])."""
        return _cut(self.network, self.cam.layer, self.normalise(images))

    def describe(self) -> dict[str, Any]:
        """What the manifest keeps of the model."""
        parameters = sum(p.numel() for p in self.network.parameters())
        return {"name": self.name, "parameters": parameters, "cam": asdict(self.cam), "changes": list(self.changes)}


def check_name(name: str) -> None:
    """Refuse a name that timm does not know (ParameterError), before anything is loaded."""
    base, _, tag = name.partition(".")
    allowed, known = "must be a name of timm.list_models()", timm.list_models()
    if timm.is_model(base):
        known = [base, *timm.list_pretrained(f"{base}.*")]
        allowed = f"must be one of {', '.join(known)}"
    if not timm.is_model(base) or (tag and name not in known):
        raise ParameterError("model", name, f"{allowed}{did_you_mean(name, known)}")


def create(
    name: str,
    *,
    classes: int,
    image_size: int,
    pretrained: bool | str = False,
    cam_layer: str | None = None,
    seed: int = 0,
) -> Classifier:
    """Build a classifier in float32 on the CPU, in eval mode; the global RNG is left as found.

    Any timm name; ``seed`` is that of the initialisation. ``pretrained`` loads timm's own weights (True) or a file
    (.safetensors, or .pth/.pt without executing pickled code); a head of another number of classes stays fresh.
    ``cam_layer`` names a module instead of the model's own CAM layer.
    ParameterError: an unknown name or CAM layer; weights or an image size that do not suit the network.
    """
    check_name(name)

    def build(**options: Any) -> Network:
        torch.manual_seed(seed)
        return timm.create_model(name, pretrained=pretrained is True, num_classes=classes, **options).eval()

    with torch.random.fork_rng(devices=[]):
        try:
            network = build()
        except (OSError, RuntimeError) as error:  # no connection; or a model for which timm has no weights
            if pretrained is not True:
                raise
            why = f"timm's weights for {name} could not be fetched ({_reason(error)})"
            allowed = f"must be false or a file, as in -p pretrained FILE.safetensors: {why}"
            raise ParameterError("pretrained", True, allowed) from error
        try:
            changes, cam = _fit(network, name, image_size)
        except ParameterError as refusal:
            try:  # CaiT, ConViT, XCiT and mixers take the size when they are built, and not later
                network = build(img_size=image_size)
            except Exception:  # most have no such argument
                raise refusal from None
            changes, cam = _fit(network, name, image_size)
        if isinstance(pretrained, str):
            load_weights(network, Path(pretrained).expanduser())
        if cam_layer is not None:
            cam = _named_cam(network, cam_layer, image_size)
    return Classifier(network, name=name, classes=classes, image_size=image_size, cam=cam, changes=changes).eval()


def _reason(error: Exception) -> str:
    """The first sentence of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


def load_weights(network: Network, path: Path) -> None:
    """Load a state dict from a file into a timm network; a head that does not fit keeps its fresh weights.

    ParameterError: the file is no state dict, holds pickled code, or belongs to another network.
    """
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # every reader has exceptions of its own for a damaged or unsafe file
        allowed = f"must be true, false or a file of weights that can be read ({_reason(error)})"
        raise ParameterError("pretrained", str(path), allowed) from error
    state, own = {key.removeprefix("network."): value for key, value in state.items()}, network.state_dict()
    if any(key in own and value.shape != own[key].shape for key, value in state.items()):
        # timm's own conversion, which resamples position embeddings; its modules share this name for it
        convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        state = convert(state, network) if convert else state
    misfits = {key for key, value in state.items() if key not in own or value.shape != own[key].shape}
    heads = [{f"{name}.weight", f"{name}.bias"} for name in _heads(network).values()]
    dropped = set().union(*(head for head in heads if head & misfits))
    # num_batches_tracked has no part in what a network computes, and converted checkpoints leave it out
    missing = {key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked")}.difference(*heads)
    if wrong := sorted((misfits - dropped) | missing):
        built = f"must hold weights of {type(network).__name__} as built here"
        raise ParameterError("pretrained", str(path), f"{built}: {len(wrong)} do not fit or are missing, as {wrong[0]}")
    network.load_state_dict({key: value for key, value in state.items() if key not in dropped}, strict=False)


def _heads(network: Network) -> dict[nn.Module, str]:
    """The final classifier(s) with their dotted names; a distilled transformer has two."""
    heads = network.get_classifier()
    heads = set(heads if isinstance(heads, (list, tuple)) else [heads])
    return {module: name for name, module in network.named_modules() if module in heads}


def find_cam(network: Network, image_size: int, *, min_grid: int = 1) -> Cam:
    """The first layer with a grid of ``min_grid`` or more on which the logits depend, ValueError if there is none.

    In this order: the output of ``forward_features`` if it is a map; the last block's norms, the first of them first;
    that output if it is tokens; the feature levels, the last first. A network may raise anything at a wrong size.
    """
    names = dict(network.named_modules())
    levels = [info["module"] for info in getattr(network, "feature_info", None) or [] if "module" in info]
    layers, features = [FEATURES, *reversed(levels)], _cam(network, FEATURES, image_size)
    if features is None or features.layout == "tokens":
        last = levels[-1] if levels else "blocks"
        while isinstance(names.get(last), (nn.Sequential, nn.ModuleList)) and len(names[last]):
            last = f"{last}.{len(names[last]) - 1}"
        parts = names[last].named_children() if last in names else ()
        layers = [f"{last}.{name}" for name, part in parts if "norm" in type(part).__name__.lower()] + layers
    for layer in layers:
        cam = features if layer == FEATURES else _cam(network, layer, image_size)
        if cam is not None and min(cam.grid) >= min_grid:
            return cam
    raise ValueError(f"no layer of {type(network).__name__} gives a map or patch tokens with a gradient")


def _named_cam(network: Network, layer: str, image_size: int) -> Cam:
    """The CAM layer that the user names."""
    names = [FEATURES, *(name for name, _ in network.named_modules() if name)]
    if layer not in names:
        raise ParameterError("cam_layer", layer, f"must be a module's dotted name{did_you_mean(layer, names)}")
    if (cam := _cam(network, layer, image_size)) is not None and min(cam.grid) >= MIN_GRID:
        return cam
    allowed = "must be a module that gives a map or patch tokens on which the logits depend, on a grid of 4x4 or more"
    raise ParameterError("cam_layer", layer, allowed)


def _cam(network: Network, layer: str, image_size: int) -> Cam | None:
    """A layer, if the logits depend on it. The two equal axes of its output are the spatial ones: images are square."""
    heads = _heads(network)  # left out, because some begin as zeros
    with register_module_forward_hook(lambda module, inputs, _: inputs[0] if module in heads else None):
        try:
            activations, outputs = _cut(network, layer, torch.rand(1, 3, image_size, image_size))
        except (AttributeError, IndexError):  # it gives no tensor, or is not called
            return None
    cam, shape = None, activations.shape
    channels_last = shape[1:2] == shape[-1:] and getattr(network, "output_fmt", "NCHW") == "NHWC"
    if len(shape) == 4 and shape[2] == shape[3] and not channels_last:
        cam = Cam(layer=layer, layout="NCHW", grid=(shape[2], shape[3]))
    elif len(shape) == 4 and shape[1] == shape[2]:
        cam = Cam(layer=layer, layout="NHWC", grid=(shape[1], shape[2]))
    for prefix in (1, 0, getattr(network, "num_prefix_tokens", 0)) if len(shape) == 3 else ():  # the last that fits
        side = math.isqrt(max(shape[1] - prefix, 0))
        if side and side * side == shape[1] - prefix:
            cam = Cam(layer=layer, layout="tokens", grid=(side, side), prefix_tokens=prefix)
    if cam is None:
        return None
    (gradient,) = torch.autograd.grad(outputs.float().logsumexp(1).sum(), activations, allow_unused=True)
    return cam if gradient is not None and bool(cam.spatial(gradient).any()) else None


def _cut(network: Network, layer: str, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Forward pass of a network whose graph begins at a layer: (the layer's output, a leaf; the logits)."""
    leaves: list[Tensor] = []

    def cut(output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        torch.set_grad_enabled(True)  # what came before ran without a graph; the outer no_grad restores the mode
        return leaves[-1].clone()  # because what follows may begin with an in-place activation

    with torch.no_grad():
        if layer == FEATURES:
            logits = network.forward_head(cut(network.forward_features(inputs)))
        else:
            with network.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: cut(output)):
                logits = network(inputs)
    return leaves[-1], logits


def _fit(network: Network, name: str, size: int) -> tuple[tuple[str, ...], Cam]:
    """Let the network take images of this size with a CAM grid of at least 4 x 4, by the least change that does.

    In this order: none; a smaller patch (ViT and Swin); a stride of 1 in the last reduction, then in the last two, and
    so on; an earlier CAM layer. timm's ``output_stride`` would dilate what follows, and knows neither VGG nor DenseNet.
    """
    reasons: list[str] = []

    def usable(*, min_grid: int = 1, **resized: Any) -> Cam | None:
        try:
            if resized:
                network.set_input_size(**resized)
            cam = find_cam(network, size, min_grid=min_grid)
        except Exception as error:  # a network refuses a size in any way it likes; the reason is reported below
            reasons.append(_reason(error))
            return None
        reasons.append(f"its grid would be {cam.grid[0]}x{cam.grid[1]}")
        return cam if min(cam.grid) >= MIN_GRID else None

    changes: list[str] = []
    if hasattr(network, "set_input_size") and hasattr(network, "patch_embed"):
        native: Any = to_2tuple(getattr(network.patch_embed, "patch_size", 0))[0]
        for patch in (p for p in range(native, 0, -1) if size % p == 0 and size // p >= MIN_GRID):
            other: dict[str, Any] = {"patch_size": (patch, patch)} if patch != native else {}
            if (not other or (size // patch) ** 2 <= MAX_TOKENS) and (cam := usable(img_size=(size, size), **other)):
                return ((f"patch size {native} -> {patch}",) if other else ()), cam
    elif cam := usable():
        return (), cam
    else:
        for level in _reductions(network):
            changes += [_unstride(network, module) for module in level]
            if cam := usable():
                return tuple(changes), cam
    if not changes and (cam := usable(min_grid=MIN_GRID)):
        return (f"CAM layer {cam.layer}, the last with a grid of {MIN_GRID}x{MIN_GRID} or more",), cam
    allowed = f"must give {name} a heatmap grid of {MIN_GRID}x{MIN_GRID} or more ({reasons[0]}); another model may suit"
    raise ParameterError("image_size", size, allowed)


def _reductions(network: Network) -> list[list[str]]:
    """Strided modules by the resolution they reduce, the lowest first: a block's branches together."""
    size = max(256, network.pretrained_cfg.get("input_size", (3, 256, 256))[-1])
    names = {module: n for n, module in network.named_modules() if _stride(module) > 1 and not any(module.children())}
    seen: dict[str, int] = {}  # the resolution that each reduces

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in names and output.ndim == 4 and output.shape[-1] < inputs[0].shape[-1]:
            seen[names[module]] = inputs[0].shape[-1]

    try:
        with torch.no_grad(), register_module_forward_hook(watch):
            network.forward_features(torch.zeros(1, 3, size, size))
    except Exception:  # a network that takes one size only: `_fit` tells what it says to the size that is asked for
        return []
    return [[name for name, reduced in seen.items() if reduced == level] for level in sorted(set(seen.values()))]


def _stride(module: nn.Module) -> int:
    stride = to_2tuple(getattr(module, "stride", 1))[0]
    return stride if isinstance(stride, int) else 1


def _unstride(network: Network, name: str) -> str:
    """Set a module's stride to 1 such that it keeps the resolution; weights keep their shapes."""
    before = _stride(module := network.get_submodule(name))
    one: Any = (1, 1) if isinstance(module.stride, tuple) else 1
    if isinstance(module, nn.Conv2d):
        if module.padding == (0, 0) and module.kernel_size[0] > 1:
            module.padding = "same"  # patches side by side have no padding of their own
    elif to_2tuple(getattr(module, "kernel_size", None))[0] == before:
        module.kernel_size = one  # a pool over tiles: without its stride there is nothing left to pool
    module.stride = one
    return f"stride of {name} {before} -> 1"


class _Pruned(nn.Module):
    """Parametrization of a weight of which some entries are 0 whatever the optimizer does.

    torch.nn.utils.prune makes the same weights 0, but only while the layer is called (BEiT reads weights itself), and a
    network cannot be copied after a backward pass.
    """

    mask: Tensor

    def __init__(self, weight: Any):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


MASK, ORIGINAL = "parametrizations.weight.0.mask", "parametrizations.weight.original"  # of a layer, in a state dict


def prune(network: nn.Module, share: float) -> None:
    """Prune this share, in (0, 1], of the weights that are left, those of least magnitude over all layers; in place.

    Counted are convolutions and linear layers, without biases (Han et al. 2015). An optimizer's parameters stay valid.
    """
    layers = [_masked(module) for module in network.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    left = torch.cat([weight.detach()[mask].abs() for weight, mask in layers]).cpu().numpy()
    last = max(round(share * left.size), 1) - 1
    limit = float(np.partition(left, last)[last])
    for weight, mask in layers:
        mask &= weight.detach().abs() > limit


def _masked(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(The layer's own weight; its mask, of ones if it had none), both to be changed in place."""
    if not parametrize.is_parametrized(layer, "weight"):
        parametrize.register_parametrization(layer, "weight", _Pruned(layer.weight), unsafe=True)
    return layer.get_parameter(ORIGINAL), layer.get_buffer(MASK)


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
    for key in state:
        if key.endswith(MASK):
            _masked(network.get_submodule(key.removesuffix(f".{MASK}")))


class ResNet9(nn.Module):
    """Page's ResNet-9 ("How to train your ResNet", DAWNBench 2018), a small and fast network for 32 x 32 images.

    As in airbench (Jordan 2024) a stage pools before it normalises: norm and activation see a quarter of the pixels.
    """

    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training images
    pretrained_cfg = {"mean": mean, "std": std, "input_size": (3, 32, 32)}

    def __init__(self, classes: int):
        super().__init__()
        first = [_conv(3, 64), _conv(64, 128, nn.MaxPool2d(2)), _Residual(_conv(128, 128), _conv(128, 128))]
        middle = [_conv(128, 256, nn.MaxPool2d(2)), _conv(256, 512, nn.MaxPool2d(2))]
        self.features = nn.Sequential(*first, *middle, _Residual(_conv(512, 512), _conv(512, 512)))
        self.fc = nn.Linear(512, classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:  # [N, 512, S / 8, S / 8]
        return self.features(x)

    def forward_head(self, x: Tensor) -> Tensor:  # the greatest value of each map; logits / 8 are a warm temperature
        return self.fc(x.amax((2, 3))) / 8

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.features(x))


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _conv(inputs: int, outputs: int, *pool: nn.Module) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, *pool, nn.BatchNorm2d(outputs), nn.ReLU())


@register_model
def resnet9(pretrained: bool = False, *, num_classes: int = 1000, **_: Any) -> ResNet9:
    """``resnet9`` among timm's names. There are no weights for it."""
    if pretrained:
        raise RuntimeError("there are no weights for resnet9")
    return ResNet9(num_classes)
