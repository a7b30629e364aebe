"""Every explanation method on every family of networks, each by timm's smallest classifier."""

import copy

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vgg import ConvMlp
from torch import nn

from pa_core import attribution
from pa_core.attribution import METHODS, heatmaps
from pa_core.errors import ParameterError
from pa_core.models import Cam, Classifier, create, find_cam, prune

SIZE = 32
FAMILIES = {
    "ResNet": "resnet10t",
    "VGG": "vgg11",
    "DenseNet": "densenet121",
    "EfficientNet": "efficientnet_b0",  # timm has a smaller lite0, which lacks the gates and the SiLU
    "MobileNet": "mobilenetv3_small_050",
    "RegNet": "regnetx_002",
    "ConvNeXt": "convnext_zepto_rms",
    "Swin": "swin_tiny_patch4_window7_224",
    "ViT": "vit_tiny_patch16_224",
    "DeiT, distilled": "deit_tiny_distilled_patch16_224",
    "ResNet, pruned": "resnet10t",
}
RELU = {"ResNet", "ResNet, pruned", "VGG", "DenseNet", "RegNet"}
TRANSFORMERS = {"ViT", "DeiT, distilled"}
SERVES = {"attention_rollout": TRANSFORMERS, "chefer": TRANSFORMERS}
SERVES |= dict.fromkeys(("guided_backprop", "deconvolution", "guided_gradcam", "deeplift"), RELU)
"""Which families a method can explain, where it is not all of them. Written out: a refusal too many is seen."""

FEW_CHANNELS = {
    "ResNet, pruned": Cam(layer="layer1", layout="NCHW", grid=(8, 8)),
    "VGG": Cam(layer="features.1", layout="NCHW", grid=(32, 32)),
    "DenseNet": Cam(layer="features.pool0", layout="NCHW", grid=(8, 8)),
    "EfficientNet": Cam(layer="blocks.1", layout="NCHW", grid=(8, 8)),
    "Swin": Cam(layer="layers.0", layout="NHWC", grid=(32, 32)),
}
"""scorecam takes a forward pass per channel, 1,280 of EfficientNet's own CAM layer: here it is shown an earlier one."""

IMAGES = 2
ATOL = 1e-2
"""Sums in another order flip a ReLU here and there: of integrated gradients, 2e-3 has been seen."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name of the family, classifier, images, the classes to explain by the method that found them)"""
    model = build(request.param)
    images = torch.rand(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    return request.param, model, images, {}


def classes(grid, model, images):
    """[N]: per image the class whose map, of this CAM, says most, of all four.

    Untrained networks have maps of which every place speaks against the class, and those are cut off at 0 as a whole.
    """
    targets = [torch.full((len(images),), k) for k in range(4)]
    said = [attribution.grids(model, images, method=grid, target=target)[0].flatten(1).std(1) for target in targets]
    return torch.stack(said).argmax(0)


def build(name):
    if (
        name == "Swin"
    ):  # timm's smallest takes 3 billion operations for an image: at 32 x 32 tokens, half of this file's time
        torch.manual_seed(3)
        network = SwinTransformer(
            SIZE, 1, num_classes=4, embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)
        ).eval()
        network.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
        cam = find_cam(network, SIZE)
        model = Classifier(network, name=FAMILIES[name], classes=4, image_size=SIZE, cam=cam, changes=()).eval()
    else:
        model = create(FAMILIES[name], classes=4, image_size=SIZE, seed=3)
    generator = torch.Generator().manual_seed(4)
    if name == "VGG":  # two layers of the head hold 80 % of its weights, and reading 400 MB is most of a pass
        model.network.pre_logits, model.network.head.fc = ConvMlp(512, 64), nn.Linear(64, 4)
        for parameter in [*model.network.pre_logits.parameters(), model.network.head.fc.bias]:
            nn.init.normal_(parameter, std=0.01, generator=generator)
        model.eval()
    # timm begins some heads as zeros, through which there is no gradient
    for head in heads(model.network):
        nn.init.normal_(head.weight, generator=generator)
    if name.endswith("pruned"):
        prune(model, 0.3)
    return model


def heads(network: nn.Module) -> list[nn.Module]:
    found = network.get_classifier()
    return list(found) if isinstance(found, (tuple, list)) else [found]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_family(method, family):
    name, model, images, found = family
    ids = ["a", "b"]
    if name not in SERVES.get(method, FAMILIES):
        allowed = f"^invalid xai='{method}': must be one of gradcam, .*, or a control, with {model.name}: "
        with pytest.raises(ParameterError, match=allowed):
            attribution.check(method, model=model)
        return
    attribution.check(method, model=model)
    if method == "scorecam" and name in FEW_CHANNELS:
        model = copy.copy(model)
        model.cam = FEW_CHANNELS[name]
    grid = method if attribution.fused(method, "none") else "gradcam"
    if grid not in found:
        found[grid] = classes(grid, model, images)
    target = found[grid]
    maps = heatmaps(model, images, method=method, target=target, ids=ids, seed=1)
    assert maps.shape == (IMAGES, SIZE, SIZE) and maps.dtype == torch.float32
    assert maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1
    if METHODS[method].control:
        return
    assert (maps.flatten(1).amax(1) == 1).all() and (maps.flatten(1).amin(1) == 0).all()  # not constant
    alone = heatmaps(model, images[1:2], method=method, target=target[1:2], ids=ids[1:2], seed=1)
    torch.testing.assert_close(alone[0], maps[1], atol=ATOL, rtol=0)
