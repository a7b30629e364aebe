"""Heatmaps: a toy network by hand, independent implementations on trained networks, and what must be left as found."""

import copy
import subprocess
import sys

import cv2  # noqa: F401  (the grad-cam package needs it; a missing one should be named here)
import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torch.nn.functional as F
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import nn

from pa_core import attribution
from pa_core.attribution import CONTROLS, METHODS, heatmaps
from pa_core.attribution.pixels import RESCALE, contributions
from pa_core.errors import ParameterError
from pa_core.files import home
from pa_core.lab import notebooks
from pa_core.models import Cam, Classifier, create

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
    # w1 = sum(G1 A1) / sum(A1) = 1.4, w2 = -1.6 / 1.4; A1 w1 + A2 w2 = (-.77 .05 .42 .10)
    "xgradcam": [0, 0.28 - 0.32 / 1.4, 0.42, 0.56 - 0.64 / 1.4],
    "layercam": [0.1, 0, 0.3, 1.2],  # relu(G1) A1 + relu(G2) A2
    # A centred: (-.15 -.05 .05 .15), (.45 -.15 -.35 .05); covariance [[.05 -.07] [-.07 .35]]; component ~
    # (-.21658, .97627), projection (.47181 -.13561 -.35252 .01633) against G A summed (-1.5 -.2 .3 1.2): turned
    "eigencam": [0, 0.13561, 0.35252, 0],
    "saliency": [2, 1, 1, 3],  # max over channels of |G|
    "input_x_gradient": [1.5, 0.2, 0.3, 1.2],  # |G1 A1 + G2 A2|
    "integrated_gradients": [1.5, 0.2, 0.3, 1.2],  # a linear function: the same
    "smoothgrad": [2, 1, 1, 3],
    "deeplift": [1.5, 0.2, 0.3, 1.2],
    # against grey: G1 (A1 - .5) + G2 (A2 - .5) = -.4 - .6, .3, -.2, -.3
    "occlusion": [-1, 0.3, -0.2, -0.3],
    # channels scaled to [0, 1]: (0 1/3 2/3 1), (1 .25 0 .5). Logits 1.3333 and -.95; softmax .90749 .09251
    "scorecam": [0.90749 * a + 0.09251 * b for a, b in zip((0.1, 0.2, 0.3, 0.4), (0.8, 0.2, 0.0, 0.4), strict=True)],
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "tokens"])
@pytest.mark.parametrize("method", BY_HAND)
def test_toy_network_by_hand(method, layout):
    expected = torch.tensor(BY_HAND[method], dtype=torch.float32)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    got = heatmaps(toy(layout), IMAGE, method=method, target=torch.tensor([0]))
    assert got.shape == (1, 2, 2) and got.dtype == torch.float32
    assert got.flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-4)


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
    [
        ("gradcam", "GradCAM"),
        ("gradcam++", "GradCAMPlusPlus"),
        ("hirescam", "HiResCAM"),
        ("xgradcam", "XGradCAM"),
        ("layercam", "LayerCAM"),
    ],
)
def test_against_the_grad_cam_package(method, kind, trained):
    model, _, _, images, labels = trained
    ours = heatmaps(model, images, method=method, target=labels).numpy()
    theirs = package(getattr(pytorch_grad_cam, kind), trained)
    assert theirs.max() > 0.9
    np.testing.assert_allclose(ours, theirs, atol=5e-3 if method == "gradcam++" else 1e-4)


def test_scorecam_against_the_grad_cam_package(trained, monkeypatch):
    """The package aligns the corners when it resizes a channel to the image, which nothing here does."""
    model, _, _, images, labels = trained
    monkeypatch.setattr(nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size=size, mode="bilinear"))
    head = model.network.get_classifier().weight
    with torch.no_grad():  # with logits of 1000 the softmax over the channels would pick one channel
        head.div_(1000)
    try:
        theirs, ours = (
            package(pytorch_grad_cam.ScoreCAM, trained),
            heatmaps(model, images, method="scorecam", target=labels),
        )
    finally:
        with torch.no_grad():
            head.mul_(1000)
    np.testing.assert_allclose(
        ours.numpy(), theirs, atol=1e-3
    )  # it divides by the maximum plus 1e-7, and these maps are small


@pytest.mark.parametrize("method", ["eigencam", "eigengradcam"])
def test_eigen_methods_against_the_grad_cam_package(method, trained):
    """The package leaves the sign of the component to chance; ours is turned towards the evidence."""
    model, _, _, images, labels = trained
    activations, logits = model.forward_cam(images)
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), activations)
    evidence = model.cam.spatial(activations.detach() * gradient)
    theirs = get_2d_projection((model.cam.spatial(activations.detach()) if method == "eigencam" else evidence).numpy())
    toward = evidence.sum(1).flatten(1)
    sign = np.sign(((toward - toward.mean(1, keepdim=True)).numpy() * theirs.reshape(len(theirs), -1)).sum(1))
    theirs = torch.from_numpy(theirs * sign[:, None, None]).float().relu()
    theirs = attribution.scale(F.interpolate(theirs[:, None], size=images.shape[-2:], mode="bilinear").squeeze(1))
    ours = heatmaps(model, images, method=method, target=labels)
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=2e-3)


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


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, name):
    """As the proxy step calls it: under autocast, after which maps are float32 all the same."""
    model = create(name, classes=3, image_size=32, seed=1)
    if attribution.reason(method, model) is not None:
        return
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = heatmaps(model, images, method=method, target=torch.tensor([0, 1]))
    assert maps.dtype == torch.float32 and maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1


def state(model, images):
    """Whatever a method may change for a while: gradients, hooks, modes, generators, flags such as fused_attn."""
    plain, modules = (bool, int, float, str, tuple, type(None)), list(model.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "flags": [
            {k: v for k, v in vars(m).items() if isinstance(v, plain)} | {"all": sorted(vars(m))} for m in modules
        ],
        "hooks": [len(getattr(m, kind)) for m in modules for kind in hooks],
        "gradients": [None if p.grad is None else p.grad.sum().item() for p in model.parameters()],
        "requires_grad": [images.requires_grad, *(p.requires_grad for p in model.parameters())],
        "values": [(value.dtype, value.sum().item()) for value in model.state_dict().values()],
        "random": (torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes()),
        "grad_mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_left_as_found(method, trained):
    model, _, _, images, labels = trained
    if attribution.reason(method, model) is not None:
        return
    model.train()
    model.network.get_classifier().eval()  # a mixed mode must survive, too
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)
    before = state(model, images)
    heatmaps(model, images, method=method, target=labels)
    explained(model, images, labels, method)
    attribution.supported_methods(model)
    after = state(model, images)
    for what, found in before.items():
        assert after[what] == found, what
    parameter.grad = None
    model.eval()


@pytest.mark.parametrize("method", ["random", "random_blur", "smoothgrad", "gradient_shap"])
def test_noise_is_seeded_by_id_and_seed(method):
    model, images = create("test_resnet", classes=2, image_size=32, seed=1), torch.rand(3, 3, 32, 32)
    target = torch.zeros(3, dtype=torch.long)
    first = heatmaps(model, images, method=method, target=target, ids=["a", "b", "c"], seed=1)
    alone = heatmaps(model, images[1:2], method=method, target=target[:1], ids=["b"], seed=1)
    torch.testing.assert_close(alone[0], first[1], atol=1e-4, rtol=0)
    for ids, seed in ((["a", "b", "c"], 2), (["d", "e", "f"], 1)):
        other = heatmaps(model, images, method=method, target=target, ids=ids, seed=seed)
        assert ((first - other).abs().flatten(1).amax(1) > 0.01).all()


def test_a_derangement_gives_each_image_another_one_whatever_their_order():
    names = [str(i) for i in range(6)]
    given = attribution.derangement(names, seed=3).tolist()
    assert sorted(given) == list(range(6)) and all(i != k for i, k in enumerate(given))
    turned = attribution.derangement(names[::-1], seed=3)
    assert [5 - int(i) for i in turned.flip(0)] == given
    assert attribution.derangement(names, seed=4).tolist() != given
    with pytest.raises(ParameterError, match="permute_maps=True: must be false where 1 images"):
        attribution.derangement(["a"], seed=3)


@pytest.mark.parametrize("smooth", ["none", "gaussian", "eigen", "flip"])
def test_smoothing(smooth, trained):
    model, _, _, images, labels = trained
    maps = heatmaps(model, images, method="hirescam", target=labels, smooth=smooth)
    assert (
        maps.min() >= 0
        and maps.max() == 1
        and (smooth == "none") == torch.equal(maps, heatmaps(model, images, method="hirescam", target=labels))
    )
    if smooth == "flip":  # a mirrored image has the mirrored map
        mirrored = heatmaps(model, images.flip(-1), method="hirescam", target=labels, smooth="flip")
        torch.testing.assert_close(mirrored.flip(-1), maps, atol=1e-3, rtol=0)


def test_refusals():
    with pytest.raises(ParameterError, match="invalid xai='gradcan': must be one of gradcam, .*did you mean 'gradcam'"):
        attribution.check("gradcan")
    with pytest.raises(ParameterError, match="smooth='eigen': must be none, gaussian or flip with xai=saliency"):
        attribution.check("saliency", smooth="eigen")
    with pytest.raises(ParameterError, match="smooth='gausian'.*did you mean 'gaussian'"):
        attribution.check("gradcam", smooth="gausian")
    assert attribution.fused("gradcampp", "gaussian") and not attribution.fused("scorecam", "none")
    assert attribution.resolve("gradcamplusplus") == attribution.resolve("gradcampp") == "gradcam++"


@pytest.mark.parametrize("method", ["gradcam", "scorecam", "smoothgrad", "occlusion", "random", "center"])
def test_no_images_have_no_maps(method):
    assert heatmaps(toy(), torch.zeros(0, 3, 2, 2), method=method).shape == (0, 2, 2)


def test_no_variation():
    assert attribution.scale(torch.full((1, 4, 4), 3.0)).abs().sum() == 0


# Maps as they are stored


def explained(model, images, labels, method, smooth="none"):
    ids = [str(i) for i in range(len(images))]
    return attribution.explain(model, images, method=method, target=labels, smooth=smooth, ids=ids, seed=2)


@pytest.mark.parametrize(
    ("method", "smooth"),
    [("gradcam++", "none"), ("gradcam", "eigen"), ("gradcam", "gaussian"), ("gradcam", "flip"), ("random", "none")],
)
def test_a_stored_map_is_the_heatmap_at_low_resolution(method, smooth, trained):
    model, _, _, images, labels = trained
    size, low = images.shape[-1], explained(model, images, labels, method, smooth)
    full = heatmaps(model, images, method=method, target=labels, smooth=smooth, seed=2)
    own_grid = smooth in ("none", "eigen") and method != "random"
    assert low.dtype == torch.float16 and low.min() >= 0 and low.max() <= 1
    assert low.shape == ((4, *model.cam.grid) if own_grid else (4, min(size, 56), min(size, 56)))
    again = attribution.upsampled(low, size)
    assert again.shape == (4, size, size) and again.dtype == torch.float32
    assert (again.flatten(1).amax(1) == 1).all() and (again.flatten(1).amin(1) == 0).all()
    if own_grid:  # what float16 leaves
        torch.testing.assert_close(again, full, atol=2e-3, rtol=0)
        with attribution.as_found(model):
            raw, _ = attribution.grids(model, images, method=method, target=labels, smooth=smooth)
        assert torch.equal(attribution.stored(raw), low)
    elif size > 56:  # each place of the small map is a mean of its surroundings, not a sample
        smaller = F.interpolate(full[:, None], size=(56, 56), mode="bilinear", antialias=True)[:, 0]
        torch.testing.assert_close(low.float(), smaller, atol=1e-3, rtol=0)
    else:
        assert torch.equal(low, full.half())


def test_whether_a_method_can_explain_a_model_is_checked_by_heatmaps_alone(monkeypatch):
    model, images = small(nn.GELU()), torch.rand(2, 3, 8, 8)
    with pytest.raises(ParameterError, match="xai='guided_backprop'"):
        heatmaps(model, images, method="guided_backprop")
    monkeypatch.setattr(attribution.methods, "check", lambda *_, **__: pytest.fail("explain must not check"))
    assert explained(model, images, torch.tensor([0, 1]), "guided_backprop").shape == (2, 8, 8)


# Grids: what the scoring pass has computed anyway


@pytest.mark.parametrize("smooth", ["none", "gaussian", "eigen"])
@pytest.mark.parametrize("method", [name for name in METHODS if attribution.fused(name, "none")])
def test_heatmaps_are_the_grids_of_the_pass_that_scores(method, smooth, trained):
    model, _, _, images, _ = trained
    with attribution.as_found(model):
        maps, logits = attribution.grids(model, images, method=method, smooth=smooth)
    assert (
        maps.shape == (4, *model.cam.grid)
        and maps.dtype == torch.float32
        and maps.min() >= 0
        and not maps.requires_grad
    )
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images))
    assert not logits.requires_grad
    expected = heatmaps(model, images, method=method, target=logits.argmax(1), smooth=smooth)
    assert torch.equal(attribution.upsampled(maps, images.shape[-1], smooth=smooth), expected)
    assert torch.equal(heatmaps(model, images, method=method, smooth=smooth), expected)


def test_a_cam_takes_one_forward_pass():
    model, passes = toy(), []
    model.network.forward_features = lambda x, known=model.network.forward_features: passes.append(len(x)) or known(x)
    heatmaps(model, IMAGE, method="gradcam++")
    assert passes == [1]


# Rules for activations, against autograd functions of our own


class Rectifier(torch.autograd.Function):
    """A ReLU whose gradient passes only where it is positive; guided: and where the input was."""

    @staticmethod
    def forward(ctx, x, guided):
        ctx.save_for_backward(x)
        ctx.guided = guided
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient.relu() * (x > 0 if ctx.guided else 1), None


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def with_relu(replacement):
    """A ResNet in which this stands in the place of every nn.ReLU."""
    model = create("test_resnet", classes=3, image_size=32, seed=1).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, replacement)
    return model


RELUS = {
    "one module for all": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "in place, read through another name": Calls(lambda x: x + 0 * F.relu(x, inplace=True)),
    "F.relu": Calls(F.relu),
    "torch.relu": Calls(torch.relu),
    "x.relu": Calls(lambda x: x.relu()),
}


@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("method", ["guided_backprop", "deconvolution", "guided_gradcam"])
def test_rectifier_rules_against_a_network_with_the_rule_built_in(method, relu):
    images, target = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    model = with_relu(RELUS[relu])
    ours = heatmaps(model, images, method=method, target=target)
    ruled = with_relu(Calls(lambda x: Rectifier.apply(x, method != "deconvolution")))
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ruled(x).gather(1, target[:, None]).sum(), x)
    expected = gradient.abs().amax(1)
    if method == "guided_gradcam":
        maps, _ = attribution.grids(model, images, method="gradcam", target=target)
        expected = expected * F.interpolate(maps[:, None], size=images.shape[-2:], mode="bilinear")[:, 0]
    plain = heatmaps(model, images, method="saliency", target=target)
    torch.testing.assert_close(ours, attribution.scale(expected), atol=1e-4, rtol=0)
    assert (ours - plain).abs().max() > 0.1


def small(*layers):
    """A network of our own around some layers."""

    class Net(nn.Module):
        pretrained_cfg = Toy.pretrained_cfg

        def __init__(self):
            super().__init__()
            self.body = copy.deepcopy(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers))
            self.head = nn.Linear(4, 2)

        def forward_features(self, x):
            return self.body(x)

        def forward_head(self, x):
            return self.head(x.mean((2, 3)))

        def forward(self, x):
            return self.forward_head(self.forward_features(x))

    cam = Cam(layer="forward_features", layout="NCHW", grid=(8, 8))
    return Classifier(Net(), name="small", classes=2, image_size=8, cam=cam, changes=()).eval()


POOL = nn.MaxPool2d(3, 2, padding=1)
FURTHER = [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
PIECEWISE = {
    "side by side": [nn.ReLU(), *FURTHER, nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU()],
    "overlapping": [nn.ReLU(), POOL, *FURTHER],
    "rounded up": [nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)],
    "dilated": [nn.ReLU(), nn.MaxPool2d(3, 2, dilation=2)],
    "adaptive": [nn.ReLU(), nn.AdaptiveMaxPool2d(3)],
    "F.max_pool2d": [nn.ReLU(), *FURTHER, Calls(lambda x: F.max_pool2d(x, 2))],
    "smooth": [nn.GELU(), *FURTHER, nn.SiLU(inplace=True), nn.Conv2d(4, 4, 1), nn.Hardswish()],
    "functions": [Calls(F.relu), *FURTHER, Calls(torch.tanh), nn.Conv2d(4, 4, 1), Calls(lambda x: x.sigmoid())],
}


@pytest.mark.parametrize("name", ["resnet10t", "regnetx_002", *PIECEWISE])
def test_deeplift_adds_up_to_the_logit(name):
    layers = PIECEWISE.get(name)
    model = small(*layers) if layers else create(name, classes=2, image_size=32, seed=1)
    model = model.double().eval()
    for module in model.modules():  # a reference that is not the same everywhere
        if isinstance(module, (nn.BatchNorm2d, nn.Conv2d)) and module.bias is not None:
            nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(2))
    size, target = model.image_size, torch.tensor([0, 1, 1])
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)).double()
    request = attribution.Request(model=model, images=images, target=target)
    parts = contributions(request, torch.zeros_like(images), RESCALE).sum((1, 2, 3))
    with torch.no_grad():
        whole = (model(images) - model(torch.zeros_like(images))).gather(1, target[:, None])[:, 0]
    assert attribution.reason("deeplift", model) is None
    torch.testing.assert_close(parts, whole, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("layers", [[nn.ReLU(), *FURTHER, nn.Tanh()], PIECEWISE["side by side"]])
def test_deeplift_against_captum(layers):
    """Captum follows modules alone, and overwrites where windows overlap: so activations, and a pool side by side."""
    from captum.attr import DeepLift

    model, images, target = small(*layers), torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 1])
    # two modules hook the tensor between them: a copy keeps them apart
    for module in (m for m in model.modules() if isinstance(m, (nn.ReLU, nn.Tanh, nn.MaxPool2d))):
        module.register_forward_pre_hook(lambda _module, inputs: (inputs[0].clone(),))
    theirs = DeepLift(model).attribute(images, torch.zeros_like(images), target=target).sum(1).abs()
    ours = heatmaps(model, images, method="deeplift", target=target)
    torch.testing.assert_close(ours, attribution.scale(theirs.detach()), atol=1e-4, rtol=1e-3)


shared = nn.ReLU()
TWICE = [shared, nn.Conv2d(4, 4, 1), shared]


RECTIFIED = {"guided_backprop", "guided_gradcam", "deconvolution"}


@pytest.mark.parametrize(
    ("layers", "refused"),
    [
        ([nn.ReLU()], set()),
        ([nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, 1), nn.ReLU()], set()),
        ([nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), Calls(lambda x: F.max_pool2d(x, 2))], set()),
        ([nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)], set()),
        ([nn.ReLU(), nn.MaxPool2d(3, 2, dilation=2)], set()),
        ([nn.ReLU(), Calls(torch.relu)], set()),
        ([Calls(F.relu)], set()),
        (TWICE, set()),
        ([nn.ReLU(), nn.GroupNorm(2, 4)], {"deeplift"}),
        ([nn.LeakyReLU()], RECTIFIED),
        ([nn.ReLU(), nn.LeakyReLU()], RECTIFIED),
        ([nn.GELU()], RECTIFIED),
        ([nn.ReLU(), nn.SiLU()], RECTIFIED),
        ([nn.ReLU(), Calls(F.hardswish)], RECTIFIED),
        ([nn.ReLU(), nn.ReLU6()], RECTIFIED),
        ([Calls(torch.relu_)], RECTIFIED | {"deeplift"}),
        ([Calls(lambda x: F.relu(x, inplace=True) * 0 + x)], set()),
        ([Calls(lambda x: x.clamp(min=0))], RECTIFIED | {"deeplift"}),
        ([nn.ReLU(), Calls(lambda x: x * x.mean((2, 3), keepdim=True))], RECTIFIED | {"deeplift"}),
    ],
)
@pytest.mark.parametrize("head", ["random", "zero"])
def test_rules_that_would_silently_be_plain_gradients_are_refused(layers, refused, head):
    model = small(*layers)
    if head == "zero":  # as timm begins many: the logits are 0 whatever the layers do
        nn.init.zeros_(model.network.head.weight)
    assert {*RECTIFIED, "deeplift"} - set(attribution.supported_methods(model)) == refused
    for method in refused:
        with pytest.raises(ParameterError, match=f"xai='{method}': must be one of gradcam.* with small: .*small"):
            attribution.check(method, model=model)


# Attention


def by_hand(model, images, target=None):
    """Rollout, or with a target Chefer's relevance, written with explicit matrices on attention that is recomputed."""
    network, x = model.network, (images - model.mean) / model.std
    tokens = network.norm_pre(network._pos_embed(network.patch_embed(x)))
    attentions = []
    for block in network.blocks:
        y, attn = block.norm1(tokens), block.attn
        n, t, c = y.shape
        q, k, v = attn.qkv(y).reshape(n, t, 3, attn.num_heads, c // attn.num_heads).permute(2, 0, 3, 1, 4)
        attentions.append((q @ k.transpose(-2, -1) / (c // attn.num_heads) ** 0.5).softmax(-1))
        tokens = tokens + block.ls1(attn.proj((attentions[-1] @ v).transpose(1, 2).reshape(n, t, c)))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    logits = network.forward_head(network.norm(tokens))
    if target is None:
        weights = [(a.mean(1) + torch.eye(t)) / 2 for a in attentions]
    else:
        gradients = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), attentions)
        weights = [torch.eye(t) + (a * g).relu().mean(1) for a, g in zip(attentions, gradients, strict=True)]
    result = np.stack([np.eye(t)] * n)
    for weight in weights:
        result = weight.detach().double().numpy() @ result
    return result, logits.detach()


VITS = {"class token": ("test_vit", 1, [0]), "distilled": ("deit_tiny_distilled_patch16_224", 2, [0, 1])}


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("fused_attention", [True, False])
@pytest.mark.parametrize("method", ["attention_rollout", "chefer"])
def test_attention_methods_against_explicit_matrices(method, fused_attention, kind):
    name, prefix, read = VITS[kind]
    model = create(name, classes=3, image_size=64, seed=1).eval()
    for head in (model.network.head, getattr(model.network, "head_dist", model.network.head)):
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    for block in model.network.blocks:
        block.attn.fused_attn = fused_attention
    images, target = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    matrix, logits = by_hand(model, images, None if method == "attention_rollout" else target)
    torch.testing.assert_close(logits, model(images).detach(), atol=1e-4, rtol=1e-4)
    patches = torch.from_numpy(matrix[:, read, prefix:].mean(1)).float().unflatten(1, (4, 4))
    expected = attribution.scale(F.interpolate(patches[:, None], size=(64, 64), mode="bilinear")[:, 0])
    ours = heatmaps(model, images, method=method, target=target)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=0)
    assert all(block.attn.fused_attn == fused_attention for block in model.network.blocks)


# Controls


def test_controls_are_what_they_say():
    model, images = toy(), torch.zeros(1, 3, 32, 32)
    images[..., 16:] = 1
    center, edges, uniform = (
        heatmaps(model, images, method=m, target=torch.tensor([0]))[0] for m in ("center", "edges", "uniform")
    )
    torch.testing.assert_close(center, center.flip(0).T.contiguous())
    assert center[15:17, 15:17].min() == 1 and center[0, 0] == 0 and (center[16, 16:].diff() <= 0).all()
    assert edges[:, 15:17].min() > 0.9 and edges[:, :12].max() < 0.05 and edges[:, 20:].max() < 0.05
    assert (uniform == 0).all()


def test_a_smooth_random_field_is_smooth():
    rough, smooth = (
        heatmaps(toy(), torch.rand(4, 3, 32, 32), method=m, target=torch.zeros(4, dtype=torch.long))
        for m in ("random", "random_blur")
    )
    step = lambda maps: float(maps.diff(dim=2).abs().mean() / maps.std())  # noqa: E731
    assert step(smooth) < step(rough) / 5


# The table


def test_every_method_has_a_row_in_docs_methods_md():
    page = (home() / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page.endswith(notebooks.methods() + "\n"), "python -m pa_core.lab.notebooks write"
    rows = [line.replace(r"\|", "").strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["xai", *METHODS] and all(len(row) == 3 and all(row) for row in rows)
    assert [row[0] for row in rows if row[1].startswith("control: ")] == list(CONTROLS)
    assert all(f"`{alias}` for `{name}`" in page for alias, name in attribution.methods.ALIASES.items())


def test_captum_is_loaded_by_the_methods_that_need_it_alone():
    code = "import sys, pa_core.attribution; print('captum' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=home())
    assert done.stdout.strip() == "False", done.stderr
