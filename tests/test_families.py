"""Every explanation method on every family of networks, each by an instance as small as the family allows.

A RegNet explains as a ResNet does, and has no instance. Controls look at no network: one family. Methods of many passes
see a network as a function alone, scorecam through its CAM layer too: one family per layout, and a pruned one.
"""

import pytest
import timm.models as zoo
import torch
from timm.models import register_model
from torch import nn

from pa_core import attribution
from pa_core.attribution import CONTROLS, METHODS, heatmaps
from pa_core.errors import ParameterError
from pa_core.models import create, prune

SIZE, IMAGES = 32, 2
CONFIGURED = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "input_size": (3, 32, 32)}


def small(name, build, **sizes):
    """Under a timm name: a small network of a family that timm has in large alone."""

    def entry(pretrained=False, *, num_classes, img_size=None, **_):
        network = build(num_classes=num_classes, **sizes)
        network.pretrained_cfg = CONFIGURED
        return network

    entry.__name__ = name
    register_model(entry)
    return name


FAMILIES = {
    "ResNet": "test_resnet",
    "VGG": small("small_vgg", zoo.VGG, cfg=[8, "M", 16, "M", 16, "M", 32, 32, "M"]),
    "DenseNet": small("small_densenet", zoo.DenseNet, growth_rate=8, block_config=(2, 2, 2, 2)),
    "EfficientNet": "test_efficientnet",
    "MobileNet": "mobilenetv3_small_050",
    "ConvNeXt": "test_convnext",
    "Swin": small(
        "small_swin", zoo.SwinTransformer, img_size=SIZE, patch_size=2, embed_dim=24, depths=(2, 2), num_heads=(1, 2)
    ),
    "ViT": "test_vit",
    "DeiT, distilled": small(
        "small_deit", zoo.VisionTransformerDistilled, img_size=SIZE, patch_size=8, embed_dim=48, depth=3, num_heads=3
    ),
    "ResNet, pruned": "test_resnet",
}
RELU = {"ResNet", "ResNet, pruned", "VGG", "DenseNet"}
TRANSFORMERS = {"ViT", "DeiT, distilled"}
SERVES = {"attention_rollout": TRANSFORMERS, "chefer": TRANSFORMERS}
SERVES |= dict.fromkeys(("guided_backprop", "deconvolution", "guided_gradcam", "deeplift"), RELU)
"""Which families a method can explain, where it is not all of them. Written out: a refusal too many is seen."""

LAYOUTS = {"ResNet", "Swin", "ViT", "ResNet, pruned"}
TRIED = dict.fromkeys(("scorecam", "integrated_gradients", "smoothgrad", "gradient_shap", "occlusion"), LAYOUTS)
TRIED |= {name: {"ResNet"} for name in CONTROLS}
CASES = [
    (family, method) for family in FAMILIES for method in METHODS if family in (SERVES | TRIED).get(method, FAMILIES)
]
ATOL = 1e-2
"""Sums in another order flip a ReLU here and there: of integrated gradients, 2e-3 has been seen."""


@pytest.fixture(scope="module")
def family(request):
    """(name of the family, classifier, images, the classes to explain by the CAM that found them)"""
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
    model = create(FAMILIES[name], classes=4, image_size=SIZE, seed=3)
    generator = torch.Generator().manual_seed(4)
    found = model.network.get_classifier()  # timm begins some heads as zeros, through which there is no gradient
    for head in found if isinstance(found, (tuple, list)) else [found]:
        nn.init.normal_(head.weight, generator=generator)
    if name.endswith("pruned"):
        prune(model, 0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_what_cannot_explain_a_family_is_refused(family):
    name, model, _, _ = family
    expected = [m for m in METHODS if m not in CONTROLS and name in SERVES.get(m, FAMILIES)]
    assert attribution.supported_methods(model) == expected
    refused = next(method for method in SERVES if method not in expected)
    allowed = f"^invalid xai='{refused}': must be one of gradcam, .*, or a control, with {model.name}: it "
    with pytest.raises(ParameterError, match=allowed):
        attribution.check(refused, model=model)


@pytest.mark.parametrize(("family", "method"), CASES, indirect=["family"])
def test_every_method_on_every_family(method, family):
    _, model, images, found = family
    ids = ["a", "b"]
    grid = method if attribution.fused(method, "none") else "gradcam"
    if grid not in found:
        found[grid] = classes(grid, model, images)
    target = found[grid]
    maps = heatmaps(model, images, method=method, target=target, ids=ids, seed=1)
    assert maps.shape == (IMAGES, SIZE, SIZE) and maps.dtype == torch.float32
    assert maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1
    if method in CONTROLS:
        return
    assert (maps.flatten(1).amax(1) == 1).all() and (maps.flatten(1).amin(1) == 0).all()  # not constant
    alone = heatmaps(model, images[1:2], method=method, target=target[1:2], ids=ids[1:2], seed=1)
    torch.testing.assert_close(alone[0], maps[1], atol=ATOL, rtol=0)
