"""A timm name -> a classifier with its preprocessing, its CAM layer and that layer's layout.

A class activation map needs the activations ``A`` of one layer and the logits as a function of ``A``. timm's own
split ``forward_head(forward_features(x))`` gives both for convolutional networks and for Swin. In a vision
transformer that reads its class token, the patch tokens after the last block have no gradient, so there ``A`` is
the output of the last block's first norm, as is usual (Gildenblat, pytorch-grad-cam). No model is known by name here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict, register_model
from torch import Tensor, nn

from pa_core.params import ParameterError, nearest

MIN_GRID = 4
"""A heatmap coarser than 4 x 4 says nothing about where."""

FEATURES = "forward_features"


@dataclass(frozen=True, kw_only=True)
class Cam:
    """Where class activation maps are taken from.

    Attributes:
        layer: ``forward_features`` (its output), or a module's dotted name (its output).
        layout: ``NCHW``, ``NHWC`` or ``tokens`` ([N, prefix + h * w, C]).
        grid: (h, w) of the layer's output.
        prefix_tokens: class and register tokens before the patch tokens.
    """

    layer: str
    layout: str
    grid: tuple[int, int]
    prefix_tokens: int = 0

    def spatial(self, activations: Tensor) -> Tensor:
        """The layer's output (or a gradient of that shape) as [N, C, h, w], whatever its layout."""
        if self.layout == "NCHW":
            return activations
        if self.layout == "NHWC":
            return activations.permute(0, 3, 1, 2)
        patches = activations[:, self.prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, self.grid)


class Classifier(nn.Module):
    """A timm network that owns its preprocessing: pixels in [0, 1] in, logits out.

    Attributes:
        network: the timm model.
        name: its timm name.
        cam: the CAM layer.
        changes: what was changed in the network to keep a grid of at least 4 x 4, one text each.
    """

    def __init__(
        self, network: nn.Module, *, name: str, classes: int, image_size: int, cam: Cam, changes: tuple[str, ...]
    ):
        super().__init__()
        self.network, self.name, self.classes, self.image_size = network, name, classes, image_size
        self.cam, self.changes = cam, changes
        config = network.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] in [0, 1] -> what the network was trained on."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] in [0, 1], float -> logits [N, classes]."""
        return self.network(self.normalise(images))

    def forward_cam(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Forward pass that can be differentiated from the CAM layer on, and no further back.

        Args:
            images: [N, 3, S, S] in [0, 1].

        Returns:
            activations: the CAM layer's output, in the layer's own layout, a leaf that requires grad.
            logits: [N, classes], a function of ``activations``.
        """
        return _cut(self.network, self.cam.layer, self.normalise(images))

    def describe(self) -> dict[str, Any]:
        """What the manifest keeps of the model."""
        parameters = sum(p.numel() for p in self.network.parameters())
        return {"name": self.name, "parameters": parameters, "cam": asdict(self.cam), "changes": list(self.changes)}


def check_name(name: str) -> None:
    """Refuse a name that timm does not know, before anything is loaded."""
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise ParameterError(
            "model", name, f"allowed is any name of timm.list_models(){nearest(base, timm.list_models())}"
        )
    known = timm.list_pretrained(f"{base}.*")
    if tag and name not in known:
        raise ParameterError(
            "model", name, f"allowed tags of {base} are {', '.join(known) or 'none'}{nearest(name, known)}"
        )


def create(
    name: str,
    *,
    classes: int,
    image_size: int,
    pretrained: bool | str = False,
    cam_layer: str | None = None,
    seed: int = 0,
) -> Classifier:
    """Build a classifier in float32 on the CPU; the global RNG is left as found.

    Args:
        name: any timm name.
        classes: size of the head.
        image_size: S of the images [N, 3, S, S].
        pretrained: timm's own weights (True), or a file: .safetensors, or .pth/.pt loaded without executing
            pickled code. A head of another number of classes is replaced by a fresh one.
        cam_layer: dotted name of a module instead of the model's own CAM layer.
        seed: of the initialisation.

    Raises:
        ParameterError: an unknown name, weights that cannot be had or do not fit, a CAM layer that does not exist, or an
            image size that the network cannot take.
    """
    check_name(name)
    if isinstance(pretrained, str) and not Path(pretrained).expanduser().is_file():
        raise ParameterError(
            "pretrained", pretrained, "there is no such file; allowed is true, false or a weights file"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = (
            _download(name, classes) if pretrained is True else timm.create_model(name, num_classes=classes)
        ).eval()
        try:
            changes, cam = _fit(network, name, image_size)
        except ParameterError as refusal:
            if pretrained is True:
                raise
            network = _built_for(name, classes, image_size, refusal)  # CaiT, ConViT, XCiT, mixers...
            changes, cam = _fit(network, name, image_size)
        if isinstance(pretrained, str):
            load_weights(network, Path(pretrained).expanduser())
        if cam_layer is not None:
            cam = _named_cam(network, cam_layer, image_size)
    return Classifier(network, name=name, classes=classes, image_size=image_size, cam=cam, changes=changes)


def _built_for(name: str, classes: int, image_size: int, refusal: ParameterError) -> nn.Module:
    """A network that takes the size when it is built, and not later; the refusal where there is none."""
    try:
        return timm.create_model(name, num_classes=classes, img_size=image_size).eval()
    except Exception:  # most have no such argument
        raise refusal from None


def _download(name: str, classes: int) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, num_classes=classes)
    except (OSError, RuntimeError) as error:  # no network; or a model for which timm has no weights
        reason = str(error).split(". ")[0].splitlines()[0]
        allowed = (
            f"timm's weights for {name} could not be fetched ({reason}); "
            "give a weights file instead, as in -p pretrained FILE.safetensors"
        )
        raise ParameterError("pretrained", True, allowed) from error


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a state dict from a file into a timm network; a head that does not fit keeps its fresh weights.

    Raises:
        ParameterError: the file is no state dict, holds pickled code, or belongs to another network.
    """
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # every reader has exceptions of its own for a damaged or unsafe file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ParameterError("pretrained", str(path), f"the file cannot be read as weights ({reason})") from error
    state = {key.removeprefix("network."): value for key, value in state.items()}
    own = network.state_dict()
    if any(key in own and value.shape != own[key].shape for key, value in state.items()):
        # timm's own conversion, which resamples position embeddings; its modules share this name for it
        convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        state = convert(state, network) if convert else state
    head = {f"{name}.{part}" for name in _heads(network) for part in ("weight", "bias")}
    replaced = {key for key in head & state.keys() if state[key].shape != own[key].shape}
    state = {
        key: value
        for key, value in state.items()
        if not any(key.rsplit(".", 1)[0] == r.rsplit(".", 1)[0] for r in replaced)
    }
    wrong = [k for k, v in state.items() if k not in own or v.shape != own[k].shape]
    missing = [k for k in own if k not in state and k not in head]
    if wrong or missing:
        allowed = (
            f"the file does not belong to {type(network).__name__} as built here: "
            f"{len(wrong)} entries do not fit{_such_as(wrong)}, {len(missing)} are missing{_such_as(missing)}"
        )
        raise ParameterError("pretrained", str(path), allowed)
    network.load_state_dict(state, strict=False)


def _such_as(names: list[str]) -> str:
    return f" (such as {names[0]})" if names else ""


def _heads(network: nn.Module) -> list[str]:
    """Dotted names of the final classifier(s); a distilled transformer has two."""
    head = network.get_classifier()
    heads = list(head) if isinstance(head, (list, tuple)) else [head]
    return [name for name, module in network.named_modules() if any(module is h for h in heads)]


# The CAM layer


def find_cam(network: nn.Module, image_size: int) -> Cam:
    """The network's own CAM layer, found by what the network gives at this size.

    Candidates in this order: the output of ``forward_features`` if it is a map; the last block's norms, the first of them
    first; that output if it is tokens; the feature levels, the last first. The first one taken that has a grid and
    through which the logits depend on every place of it.

    Raises:
        ValueError: there is none.
        Exception: whatever the network raises at a size it cannot take.
    """
    with torch.no_grad():
        features = network.forward_features(torch.zeros(1, 3, image_size, image_size))
    spatial = isinstance(features, Tensor) and features.ndim == 4
    layers = [FEATURES] if spatial else [*_norms(network), FEATURES]
    layers += [info["module"] for info in reversed(getattr(network, "feature_info", None) or []) if "module" in info]
    for layer in layers:
        cam = _layer_cam(network, layer, image_size)
        if cam is not None and _reaches(network, cam, image_size):
            return cam
    raise ValueError(f"no layer of {type(network).__name__} gives a map or patch tokens with a gradient")


def _norms(network: nn.Module) -> list[str]:
    """Norms that are direct parts of the last block, in order."""
    info = getattr(network, "feature_info", None) or []
    last = info[-1]["module"] if info and "module" in info[-1] else "blocks"
    names = dict(network.named_modules())
    while isinstance(names.get(last), (nn.Sequential, nn.ModuleList)) and len(names[last]):
        last = f"{last}.{len(names[last]) - 1}"
    block = names.get(last)
    if block is None:
        return []
    return [f"{last}.{name}" for name, child in block.named_children() if "norm" in type(child).__name__.lower()]


def _layer_cam(network: nn.Module, layer: str, image_size: int) -> Cam | None:
    if layer == FEATURES:
        with torch.no_grad():
            output = network.forward_features(torch.zeros(1, 3, image_size, image_size))
    else:
        output = _outputs(network, [layer], image_size).get(layer)
    try:
        return None if not isinstance(output, Tensor) else _cam(network, layer, output)
    except ValueError:  # no map: not a candidate
        return None


def _reaches(network: nn.Module, cam: Cam, image_size: int) -> bool:
    """Whether the logits depend on every place of the layer. Some heads begin as zeros, so they are filled for the test."""
    heads = [p for name in _heads(network) for p in network.get_submodule(name).parameters()]
    kept = [p.detach().clone() for p in heads]
    try:
        with torch.no_grad():
            for p in heads:
                p.normal_()
            image = torch.rand(1, 3, image_size, image_size)
        activations, logits = _cut(network, cam.layer, image)
        (gradient,) = torch.autograd.grad(logits.float().logsumexp(1).sum(), activations, allow_unused=True)
        return gradient is not None and bool((cam.spatial(gradient).abs().sum(1) > 0).all())
    finally:
        with torch.no_grad():
            for p, value in zip(heads, kept, strict=True):
                p.copy_(value)


def _named_cam(network: nn.Module, layer: str, image_size: int) -> Cam:
    """The CAM layer that the user names."""
    if layer == FEATURES:
        return find_cam(network, image_size)
    names = [name for name, _ in network.named_modules() if name]
    if layer not in names:
        raise ParameterError("cam_layer", layer, f"allowed is a module's dotted name{nearest(layer, names)}")
    cam = _layer_cam(network, layer, image_size)
    if cam is None:
        raise ParameterError(
            "cam_layer", layer, "allowed is a module that gives a map or patch tokens, [N, C, h, w] or [N, T, C]"
        )
    if min(cam.grid) < MIN_GRID:
        size = "x".join(map(str, cam.grid))
        raise ParameterError("cam_layer", layer, f"its grid is {size}; allowed is one of {MIN_GRID}x{MIN_GRID} or more")
    if not _reaches(network, cam, image_size):
        raise ParameterError(
            "cam_layer", layer, "its patches have no gradient; allowed is a layer that the logits depend on everywhere"
        )
    return cam


def _cut(network: nn.Module, layer: str, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Forward pass of a network whose graph begins at a layer: (the layer's output, a leaf; the logits)."""
    if layer == FEATURES:
        with torch.no_grad():
            activations = network.forward_features(inputs)
        activations = activations.detach().requires_grad_()
        with torch.enable_grad():  # a clone, because a head may begin with an in-place activation
            return activations, network.forward_head(activations.clone())
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        # The graph begins here: what came before ran without one, and the outer no_grad restores the mode.
        torch.set_grad_enabled(True)
        return leaves[-1].clone()

    handle = network.get_submodule(layer).register_forward_hook(cut)
    try:
        with torch.no_grad():
            logits = network(inputs)
    finally:
        handle.remove()
    return leaves[-1], logits


def _outputs(network: nn.Module, layers: list[str], image_size: int) -> dict[str, Tensor]:
    """Outputs (tensors only) of the named modules for one black image."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name] = output

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, image_size, image_size))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _cam(network: nn.Module, layer: str, output: Tensor) -> Cam:
    """Read layout and grid off an output. Images are square, so the two equal axes are the spatial ones."""
    if output.ndim == 4:
        _, first, middle, last = output.shape
        if middle == last and not (first == last and getattr(network, "output_fmt", "NCHW") == "NHWC"):
            return Cam(layer=layer, layout="NCHW", grid=(middle, last))
        if first == middle:
            return Cam(layer=layer, layout="NHWC", grid=(first, middle))
    if output.ndim == 3:
        for prefix in dict.fromkeys((getattr(network, "num_prefix_tokens", 0), 0, 1)):
            side = math.isqrt(max(output.shape[1] - prefix, 0))
            if side and side * side == output.shape[1] - prefix:
                return Cam(layer=layer, layout="tokens", grid=(side, side), prefix_tokens=prefix)
    raise ValueError(f"{layer} gives {list(output.shape)}")


# Small inputs


def _fit(network: nn.Module, name: str, size: int) -> tuple[tuple[str, ...], Cam]:
    """Let the network take images of this size with a CAM grid of at least 4 x 4, by the least change that does.

    In this order: none; a smaller patch (networks that can be resized, ViT and Swin); a stride of 1 in the last
    reduction, then in the last two, and so on (all that comes before stays as it was); an earlier CAM layer.
    """
    reasons: list[str] = []

    def attempt(change: Callable[[], None] | None = None) -> Cam | None:
        try:
            if change is not None:
                change()
            cam = find_cam(network, size)
        except Exception as error:  # a network refuses a size in any way it likes; the reason is reported below
            reasons.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
            return None
        if min(cam.grid) < MIN_GRID:
            reasons.append(f"its grid would be {cam.grid[0]}x{cam.grid[1]}")
            return None
        return cam

    if hasattr(network, "set_input_size") and hasattr(network, "patch_embed"):
        native = _first(getattr(network.patch_embed, "patch_size", 0))
        for patch in _patches(native, size):
            keywords = {} if patch == native else {"patch_size": (patch, patch)}
            cam = attempt(lambda keywords=keywords: network.set_input_size(img_size=(size, size), **keywords))
            if cam:
                return (() if patch == native else (f"patch size {native} -> {patch}",)), cam
    else:
        cam = attempt()
        if cam:
            return (), cam
        changes: list[str] = []
        for level in reversed(_reductions(network, reasons)):
            changes += [_unstride(network, module) for module in level]
            cam = attempt()
            if cam:
                return tuple(changes), cam
        if changes:
            raise _too_small(name, size, reasons)
    cam = _earlier_cam(network, size)
    if cam is None:
        raise _too_small(name, size, reasons)
    return (f"CAM layer {cam.layer}, the last with a grid of {MIN_GRID}x{MIN_GRID} or more",), cam


def _too_small(name: str, size: int, reasons: list[str]) -> ParameterError:
    why = f" ({reasons[0]})" if reasons else ""
    allowed = f"{name} cannot take images of this size with a heatmap grid of {MIN_GRID}x{MIN_GRID} or more{why}"
    return ParameterError("image_size", size, f"{allowed}; allowed is a size that suits the model, or another model")


def _first(value: Any) -> int:
    return int(value[0]) if isinstance(value, (tuple, list)) else int(value)


MOST_TOKENS = 1024
"""A smaller patch may not make more than 32 x 32 of them: attention costs their square."""


def _patches(native: int, size: int) -> list[int]:
    """Patch sizes that divide the image and give a grid of 4 x 4 or more, the largest first."""
    fits = [p for p in range(native, 0, -1) if size % p == 0 and size // p >= MIN_GRID]
    return [p for p in fits if p == native or (size // p) ** 2 <= MOST_TOKENS]


def _reductions(network: nn.Module, reasons: list[str]) -> list[list[str]]:
    """Names of strided modules, grouped by the resolution they reduce, in the order of the forward pass.

    The branches of a residual block reduce the same resolution, so they are changed together. None for a network that
    takes one size only; why goes into ``reasons``.
    """
    size = max(256, network.pretrained_cfg.get("input_size", (3, 256, 256))[-1])
    levels: dict[int, list[str]] = {}
    handles = []

    def watch(name: str):
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] < inputs[0].shape[-1]:
                names = levels.setdefault(inputs[0].shape[-1], [])
                if name not in names:
                    names.append(name)

        return hook

    for name, module in network.named_modules():
        if _stride(module) > 1 and not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(watch(name)))
    try:
        with torch.no_grad():
            network.forward_features(torch.zeros(1, 3, size, size))
    except Exception as error:  # see `_fit`
        reasons.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
        return []
    finally:
        for handle in handles:
            handle.remove()
    return [levels[resolution] for resolution in sorted(levels, reverse=True)]


def _stride(module: nn.Module) -> int:
    stride = getattr(module, "stride", 1)
    stride = stride[0] if isinstance(stride, (tuple, list)) else stride
    return stride if isinstance(stride, int) else 1


def _unstride(network: nn.Module, name: str) -> str:
    """Set a module's stride to 1 such that it keeps the resolution; weights keep their shapes."""
    module = network.get_submodule(name)
    before = _stride(module)
    if isinstance(module, nn.Conv2d):
        module.stride = (1, 1)
        if module.padding == (0, 0) and module.kernel_size[0] > 1:
            module.padding = "same"  # patches side by side have no padding of their own
    elif getattr(module, "kernel_size", None) in (before, (before, before)):
        # a pool over tiles: without its stride there is nothing left to pool
        tile = isinstance(module.kernel_size, tuple)
        module.kernel_size, module.stride = ((1, 1), (1, 1)) if tile else (1, 1)
    else:
        module.stride = (1, 1) if isinstance(module.stride, (tuple, list)) else 1
    return f"stride of {name} {before} -> 1"


def _earlier_cam(network: nn.Module, size: int) -> Cam | None:
    """The last feature level whose grid is large enough; the network itself stays as it is."""
    layers = [info["module"] for info in getattr(network, "feature_info", None) or [] if "module" in info]
    try:
        cams = [_layer_cam(network, layer, size) for layer in reversed(layers)]
    except Exception:  # the network does not run at this size: the attempts before have noted why
        return None
    return next((cam for cam in cams if cam and min(cam.grid) >= MIN_GRID and _reaches(network, cam, size)), None)


# A small, fast network for 32 x 32 images


class ResNet9(nn.Module):
    """Page's ResNet-9 ("How to train your ResNet", DAWNBench 2018): eight convolutions, two of the stages residual.

    As in airbench (Jordan 2024) a stage pools before it normalises, so that norm and activation see a quarter of the pixels.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3):
        super().__init__()
        self.stem = _conv(in_chans, 64)
        self.stage1 = nn.Sequential(_conv(64, 128, pool=2), _Residual(128))
        self.stage2 = _conv(128, 256, pool=2)
        self.stage3 = nn.Sequential(_conv(256, 512, pool=2), _Residual(512))
        self.fc = nn.Linear(512, num_classes)
        self.num_classes, self.num_features = num_classes, 512
        names = (("stem", 64, 1), ("stage1", 128, 2), ("stage2", 256, 4), ("stage3", 512, 8))
        self.feature_info = [{"module": name, "num_chs": width, "reduction": by} for name, width, by in names]

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, C, S, S] -> [N, 512, S / 8, S / 8]"""
        return self.stage3(self.stage2(self.stage1(self.stem(x))))

    def forward_head(self, x: Tensor) -> Tensor:
        """Greatest value of each map, and logits an eighth of the usual size, which takes the place of a warm temperature."""
        return self.fc(x.amax((2, 3))) / 8

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _conv(inputs: int, outputs: int, *, pool: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    pools = [nn.MaxPool2d(pool)] if pool > 1 else []
    return nn.Sequential(convolution, *pools, nn.BatchNorm2d(outputs), nn.ReLU())


@register_model
def resnet9(pretrained: bool = False, *, num_classes: int = 1000, in_chans: int = 3, **_: Any) -> ResNet9:
    """``resnet9`` among timm's names. There are no weights for it."""
    if pretrained:
        raise RuntimeError("there are no weights for resnet9")
    network = ResNet9(num_classes, in_chans)
    # mean and standard deviation of CIFAR-10's training images
    network.pretrained_cfg = {
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "input_size": (3, 32, 32),
    }
    return network
