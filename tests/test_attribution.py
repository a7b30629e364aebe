"""Heatmaps: a toy network by hand, independent implementations on trained networks, and what must be left as found."""

import re

import cv2  # noqa: F401  (the grad-cam package needs it; a missing one should be named here)
import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution, LayerGradCam
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import nn

from pa_core import attribution
from pa_core.attribution import METHODS, heatmaps
from pa_core.models import Cam, Classifier, create
from pa_core.params import ParameterError

# A network whose every number can be computed by hand: features are the first two colour channels of a 2 x 2
# image, class 0 is a weighted sum of them, so that the weights are the gradient.

G = torch.tensor([[[1.0, -1.0], [1.0, 3.0]], [[-2.0, 0.0], [0.0, 0.0]]])
A = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.8, 0.2], [0.0, 0.4]]])
IMAGE = torch.cat([A, torch.full((1, 2, 2), 0.7)])[None]


class Toy(nn.Module):
    pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def __init__(self, layout: str):
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(torch.stack([G, -G]))

    def forward_features(self, x):
        x = x[:, :2]
        if self.layout == "NHWC":
            return x.permute(0, 2, 3, 1)
        if self.layout == "tokens":
            return torch.cat([torch.ones(len(x), 1, 2), x.flatten(2).transpose(1, 2)], 1)
        return x

    def forward_head(self, x):
        if self.layout == "NHWC":
            x = x.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            x = x[:, 1:].transpose(1, 2).unflatten(2, (2, 2))
        return torch.einsum("nchw,kchw->nk", x, self.weight)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def toy(layout="NCHW"):
    cam = Cam(layer="forward_features", layout=layout, grid=(2, 2), prefix_tokens=int(layout == "tokens"))
    return Classifier(Toy(layout), name="toy", classes=2, image_size=2, cam=cam, changes=()).eval()


# channel means of G: 1 and -0.5. Maps before scaling, row by row:
BY_HAND = {
    "gradcam": [0, 0.1, 0.3, 0.2],  # relu(A1 - A2 / 2)
    "hirescam": [0, 0, 0.3, 1.2],  # relu(G1 A1 + G2 A2)
    # alpha = 1 / (2 + sum(A1) G1) with sum(A1) = 1 where G1 > 0: 1/3, 1/3, 1/5; w1 = 1/3 + 1/3 + 3/5, w2 = 0
    "gradcam++": [0.1 * 19 / 15, 0.2 * 19 / 15, 0.3 * 19 / 15, 0.4 * 19 / 15],
    # G A centred: (-.25 -.55 -.05 .85), (-1.2 .4 .4 .4); covariance [[1.09 .4] [.4 1.92]]; component ~ (.4, .99139)
    "eigengradcam": [0, 0.17656, 0.37656, 0.73656],
    "saliency": [2, 1, 1, 3],  # max over channels of |G|
    "input_x_gradient": [1.5, 0.2, 0.3, 1.2],  # |G1 A1 + G2 A2|
    "integrated_gradients": [1.5, 0.2, 0.3, 1.2],  # a linear function: the same
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "tokens"])
@pytest.mark.parametrize("method", BY_HAND)
def test_toy_network_by_hand(method, layout):
    expected = torch.tensor(BY_HAND[method])
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    got = heatmaps(toy(layout), IMAGE, method=method, target=torch.tensor([0]))
    assert got.shape == (1, 2, 2) and got.dtype == torch.float32
    assert got.flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_predicted_class_is_explained_by_default():
    model = toy()
    predicted = model(IMAGE).argmax(1)
    explained = {t: heatmaps(model, IMAGE, method="gradcam", target=torch.tensor([t])) for t in (0, 1)}
    assert torch.equal(heatmaps(model, IMAGE, method="gradcam"), explained[int(predicted)])
    assert not torch.equal(explained[0], explained[1])


# Trained networks with biases, one per layout, against independent implementations

NETWORKS = {
    "NCHW": ("test_resnet", 32, lambda n: n.layer4[-1], None),
    "NHWC": ("test_mambaout", 64, lambda n: n.stages[-1], lambda a: a.permute(0, 3, 1, 2)),
    "tokens": ("test_vit", 64, lambda n: n.blocks[-1].norm1, lambda a: a[:, 1:].transpose(1, 2).unflatten(2, (4, 4))),
}


@pytest.fixture(scope="module", params=NETWORKS)
def trained(request):
    """(classifier, target layer, reshape for grad-cam, images, targets)"""
    name, size, layer, reshape = NETWORKS[request.param]
    model = create(name, classes=3, image_size=size, seed=1).train()
    assert model.cam.layout == request.param
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(12, 3, size, size, generator=generator), torch.arange(12) % 3
    for k in range(12):  # each class has its bright corner
        row, column = divmod(k % 3, 2)
        images[k, :, row * size // 2 :, column * size // 2 :] *= 0.3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(6):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # grad-cam adds 1e-6 to a sum of squared gradients: make them large beside it
        model.network.get_classifier().weight.mul_(1000)
    model.eval().requires_grad_(True)
    model.zero_grad()
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("bias"))
    return model, layer(model.network), reshape, images[:4], labels[:4]


def package(kind, trained, **keywords):
    model, layer, reshape, images, labels = trained
    with kind(model=model, target_layers=[layer], reshape_transform=reshape) as cam:
        return cam(input_tensor=images, targets=[ClassifierOutputTarget(int(c)) for c in labels], **keywords)


@pytest.mark.parametrize(
    ("method", "kind"),
    [("gradcam", "GradCAM"), ("gradcam++", "GradCAMPlusPlus"), ("hirescam", "HiResCAM")],
)
def test_against_the_grad_cam_package(method, kind, trained):
    model, _, _, images, labels = trained
    ours = heatmaps(model, images, method=method, target=labels).numpy()
    theirs = package(getattr(pytorch_grad_cam, kind), trained)
    assert theirs.max() > 0.9
    np.testing.assert_allclose(ours, theirs, atol=5e-3 if method == "gradcam++" else 1e-4)


def test_eigengradcam_against_the_grad_cam_package(trained):
    """The package leaves the sign of the component to chance; ours is turned towards the evidence."""
    model, _, _, images, labels = trained
    activations, logits = model.forward_cam(images)
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), activations)
    evidence = model.cam.spatial(activations.detach() * gradient)
    theirs = get_2d_projection(evidence.numpy())
    toward = evidence.sum(1).flatten(1)
    sign = np.sign(((toward - toward.mean(1, keepdim=True)).numpy() * theirs.reshape(len(theirs), -1)).sum(1))
    theirs = torch.from_numpy(theirs * sign[:, None, None]).float().relu()
    theirs = attribution.scale(F.interpolate(theirs[:, None], size=images.shape[-2:], mode="bilinear").squeeze(1))
    ours = heatmaps(model, images, method="eigengradcam", target=labels)
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=2e-3)


def test_gradcam_against_captum(trained):
    model, layer, reshape, images, labels = trained

    class InFront(nn.Module):
        """Captum expects channels first; show it the layer's output in that layout."""

        def __init__(self):
            super().__init__()
            self.inner, self.view = layer, nn.Identity()

        def forward(self, x):
            out = self.inner(x)
            if reshape is None:
                return self.view(out)
            seen = self.view(reshape(out))
            back = seen.permute(0, 2, 3, 1) if out.ndim == 4 else torch.cat([out[:, :1], seen.flatten(2).transpose(1, 2)], 1)
            return back

    where = next(n for n, m in model.named_modules() if m is layer)
    probe = InFront()
    parent = model.get_submodule(where.rsplit(".", 1)[0])
    setattr(parent, where.rsplit(".", 1)[1], probe)
    try:
        theirs = LayerGradCam(model, probe.view).attribute(images, target=labels, relu_attributions=True)
    finally:
        setattr(parent, where.rsplit(".", 1)[1], layer)
    theirs = attribution.scale(LayerAttribution.interpolate(theirs.detach(), images.shape[-2:], "bilinear").squeeze(1))
    ours = heatmaps(model, images, method="gradcam", target=labels)
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-4)


def test_pixel_gradients_against_autograd(trained):
    model, _, _, images, labels = trained
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).gather(1, labels[:, None]).sum(), x)
    for method, raw in (("saliency", gradient.abs().amax(1)), ("input_x_gradient", (images * gradient).sum(1).abs())):
        ours = heatmaps(model, images, method=method, target=labels)
        np.testing.assert_allclose(ours.numpy(), attribution.scale(raw).numpy(), atol=1e-4)


def test_integrated_gradients_against_a_riemann_sum(trained):
    model, _, _, images, labels = trained
    total, nodes = torch.zeros_like(images), 200
    for k in range(nodes):
        x = (images * (k + 0.5) / nodes).requires_grad_()
        total += torch.autograd.grad(model(x).gather(1, labels[:, None]).sum(), x)[0] / nodes
    expected = attribution.scale((images * total).sum(1).abs())
    ours = heatmaps(model, images, method="integrated_gradients", target=labels)
    for mine, theirs in zip(ours, expected, strict=True):
        assert np.corrcoef(mine.flatten(), theirs.flatten())[0, 1] > 0.97


# What holds for every method


def serves(method, model):
    """Whether a method explains a model; if not, it says so instead of giving a map (tests/test_families.py has more)."""
    if attribution.refusal(method, model) is None:
        return True
    with pytest.raises(ParameterError, match=f"xai = '{re.escape(method)}' is refused: .*allowed is one of gradcam, "):
        heatmaps(model, torch.zeros(1, 3, model.image_size, model.image_size), method=method)
    return False


@pytest.mark.parametrize("method", METHODS)
def test_range_and_shape_alone_or_in_a_batch(method, trained):
    model, _, _, images, labels = trained
    if not serves(method, model):
        return
    maps = heatmaps(model, images, method=method, target=labels)
    assert maps.shape == (4, *images.shape[-2:]) and maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1
    assert (maps.flatten(1).std(1) > 0).all() == (method != "uniform")  # ViTs, too, get maps that say something
    if method != "shuffled":
        alone = heatmaps(model, images[2:3], method=method, target=labels[2:3], ids=["2"])
        torch.testing.assert_close(alone[0], maps[2], atol=1e-2, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_left_as_found(method, trained):
    model, _, _, images, labels = trained
    if not serves(method, model):
        return
    model.train()
    model.network.get_classifier().eval()  # a mixed mode must survive, too
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)
    before = {
        "modes": [m.training for m in model.modules()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "rng": torch.get_rng_state(),
        "buffers": [b.clone() for b in model.buffers()],
        "grad_mode": torch.is_grad_enabled(),
    }
    heatmaps(model, images, method=method, target=labels)
    assert [m.training for m in model.modules()] == before["modes"]
    assert [p.requires_grad for p in model.parameters()] == before["requires_grad"]
    for p, gradient in zip(model.parameters(), before["gradients"], strict=True):
        assert (p.grad is None) == (gradient is None) and (gradient is None or torch.equal(p.grad, gradient))
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    assert hooks == before["hooks"]
    assert torch.equal(torch.get_rng_state(), before["rng"])
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before["buffers"], strict=True))
    assert torch.is_grad_enabled() == before["grad_mode"] and not images.requires_grad
    parameter.grad = None
    model.eval()


def test_random_is_seeded_by_id_and_seed():
    model, images = toy(), torch.rand(3, 3, 2, 2)
    first = heatmaps(model, images, method="random", ids=["a", "b", "c"], seed=1)
    assert torch.equal(first[1], heatmaps(model, images[:1], method="random", ids=["b"], seed=1)[0])
    assert not torch.equal(first, heatmaps(model, images, method="random", ids=["a", "b", "c"], seed=2))


def test_shuffled_gives_each_image_the_map_of_another():
    model, images = toy(), torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(6, dtype=torch.long)
    own = heatmaps(model, images, method="gradcam", target=target)
    dealt = heatmaps(model, images, method="shuffled", target=target, seed=3)
    donors = [[k for k in range(6) if torch.allclose(dealt[i], own[k])] for i in range(6)]
    assert sorted(k for (k,) in donors) == list(range(6)) and all(i not in d for i, d in enumerate(donors))
    with pytest.raises(ParameterError, match="shuffled.*two images"):
        heatmaps(model, images[:1], method="shuffled")


@pytest.mark.parametrize("smooth", attribution.SMOOTH)
def test_smoothing(smooth, trained):
    model, _, _, images, labels = trained
    maps = heatmaps(model, images, method="hirescam", target=labels, smooth=smooth)
    assert maps.min() >= 0 and maps.max() == 1 and (smooth == "none") == torch.equal(
        maps, heatmaps(model, images, method="hirescam", target=labels)
    )
    if smooth == "flip":  # a mirrored image has the mirrored map
        mirrored = heatmaps(model, images.flip(-1), method="hirescam", target=labels, smooth="flip")
        torch.testing.assert_close(mirrored.flip(-1), maps, atol=1e-3, rtol=0)


def test_refusals():
    with pytest.raises(ParameterError, match="xai = 'gradcan'.*did you mean 'gradcam'"):
        attribution.check("gradcan")
    with pytest.raises(ParameterError, match="smooth = 'eigen'.*saliency"):
        attribution.check("saliency", smooth="eigen")
    assert attribution.resolve("gradcamplusplus") == attribution.resolve("gradcampp") == "gradcam++"


def test_no_images():
    assert heatmaps(toy(), torch.zeros(0, 3, 2, 2), method="gradcam").shape == (0, 2, 2)


def test_a_constant_map_is_zero():
    assert attribution.scale(torch.full((1, 4, 4), 3.0)).abs().sum() == 0
