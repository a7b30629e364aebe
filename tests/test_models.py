"""Models: CAM layer and layout, small inputs, weights from timm or a file."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from pa_core import models
from pa_core.models import create
from pa_core.params import ParameterError


@pytest.mark.parametrize(
    ("name", "size", "layout", "layer"),
    [
        ("test_resnet", 28, "NCHW", "forward_features"),
        ("vgg11", 64, "NCHW", "forward_features"),
        ("efficientnet_b0", 28, "NCHW", "forward_features"),
        ("convnext_atto", 64, "NCHW", "forward_features"),
        ("densenet121", 28, "NCHW", "forward_features"),
        ("swin_tiny_patch4_window7_224", 28, "NHWC", "forward_features"),
        ("vit_tiny_patch16_224", 64, "tokens", "blocks.11.norm1"),
        ("vit_tiny_patch16_224", 28, "tokens", "blocks.11.norm1"),
        ("deit_tiny_distilled_patch16_224", 64, "tokens", "blocks.11.norm1"),
    ],
)
def test_cam_layer_and_grid(name, size, layout, layer):
    model = create(name, classes=5, image_size=size).eval()
    assert (model.cam.layout, model.cam.layer) == (layout, layer)
    assert min(model.cam.grid) >= 4
    activations, logits = model.forward_cam(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 5)
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), activations)
    spatial = model.cam.spatial(gradient)
    assert spatial.shape[0] == 2 and spatial.shape[2:] == model.cam.grid
    assert spatial.abs().sum() > 0  # the patches have a gradient


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 128), ("resnet18", 224), ("vit_tiny_patch16_224", 224)])
def test_large_inputs_change_nothing(name, size):
    model = create(name, classes=5, image_size=size)
    assert model.changes == () and min(model.cam.grid) >= 4


def test_small_inputs_change_as_little_as_possible():
    assert len(create("vgg11", classes=2, image_size=64).changes) == 1  # the last pool alone
    changes = create("resnet18", classes=2, image_size=64).changes
    assert [c.split()[2].split(".")[0] for c in changes] == ["layer4", "layer4"]  # both branches of the last reduction
    assert create("vit_tiny_patch16_224", classes=2, image_size=64).changes == ()
    assert create("vit_tiny_patch16_224", classes=2, image_size=28).changes == ("patch size 16 -> 7",)


def test_forward_cam_agrees_with_forward():
    images = torch.rand(3, 3, 64, 64)
    for name in ("test_resnet", "vit_tiny_patch16_224"):
        model = create(name, classes=4, image_size=64).eval()
        torch.testing.assert_close(model.forward_cam(images)[1], model(images), atol=1e-5, rtol=1e-5)


def test_named_cam_layer():
    model = create("test_resnet", classes=4, image_size=64, cam_layer="layer3").eval()
    assert model.cam.layer == "layer3" and model.cam.grid == (4, 4)
    activations, logits = model.forward_cam(torch.rand(2, 3, 64, 64))
    assert torch.autograd.grad(logits.sum(), activations)[0].abs().sum() > 0
    with pytest.raises(ParameterError, match="cam_layer = 'layer5'.*did you mean 'layer"):
        create("test_resnet", classes=4, image_size=64, cam_layer="layer5")
    with pytest.raises(ParameterError, match="cam_layer = 'fc'"):
        create("test_resnet", classes=4, image_size=64, cam_layer="fc")


def test_naming_a_cam_layer_leaves_the_global_rng_as_found():
    before = torch.get_rng_state()
    create("test_resnet", classes=4, image_size=64, cam_layer="layer3")
    assert torch.equal(torch.get_rng_state(), before)


def test_cam_layers_that_say_nothing_are_refused():
    """Patches after a class-token network's last block have no gradient: the predecessor's silent ViTs."""
    with pytest.raises(ParameterError, match="cam_layer = 'norm'.*no gradient"):
        create("test_vit", classes=4, image_size=64, cam_layer="norm")
    with pytest.raises(ParameterError, match="cam_layer = 'blocks.6.0.se.conv_expand'.*grid is 1x1.*4x4"):
        create("efficientnet_b0", classes=4, image_size=64, cam_layer="blocks.6.0.se.conv_expand")


def test_initialisation_depends_on_the_seed_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    a = create("test_resnet", classes=4, image_size=28, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    b = create("test_resnet", classes=4, image_size=28, seed=1).state_dict()
    c = create("test_resnet", classes=4, image_size=28, seed=2).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["network.conv1.0.weight"], c["network.conv1.0.weight"])


def test_unknown_names():
    with pytest.raises(ParameterError, match="model = 'resnet19'.*did you mean 'resnet"):
        create("resnet19", classes=2, image_size=64)
    with pytest.raises(ParameterError, match="model = 'resnet18.x1'.*a1_in1k"):
        create("resnet18.x1", classes=2, image_size=64)


# Weights


def weights(name="test_resnet", classes=7, size=64):
    network = create(name, classes=classes, image_size=size, seed=5).network
    return {key: value.clone() for key, value in network.state_dict().items()}


@pytest.mark.parametrize("form", ["safetensors", "pth", "wrapped"])
def test_weights_from_a_file(form, tmp_path):
    state = weights(classes=7)
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if form == "wrapped" else state, file)
    same = create("test_resnet", classes=7, image_size=28, pretrained=str(file)).network.state_dict()
    assert all(torch.equal(same[k], state[k]) for k in state)
    fresh = create("test_resnet", classes=3, image_size=28, pretrained=str(file)).network.state_dict()
    assert fresh["fc.weight"].shape == (3, 96)
    assert all(torch.equal(fresh[k], state[k]) for k in state if not k.startswith("fc."))


def test_position_embeddings_are_resampled(tmp_path):
    file = tmp_path / "vit.safetensors"
    save_file(weights("vit_tiny_patch16_224", size=224), file)
    model = create("vit_tiny_patch16_224", classes=7, image_size=64, pretrained=str(file))
    assert model.network.pos_embed.shape[1] == 17
    assert model(torch.rand(1, 3, 64, 64)).isfinite().all()


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('pickled code ran')",))


@pytest.mark.parametrize("kind", ["evil", "garbage", "other", "cut"])
def test_bad_weight_files(kind, tmp_path):
    file = tmp_path / "w.pth"
    if kind == "evil":
        file.write_bytes(pickle.dumps({"fc.weight": Evil()}))
    elif kind == "garbage":
        file.write_bytes(b"not weights")
    elif kind == "other":
        torch.save({k: v for k, v in weights().items() if "layer4" not in k}, file)
    else:
        torch.save(weights(), file)
        file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ParameterError, match="pretrained.*w.pth") as caught:
        create("test_resnet", classes=7, image_size=28, pretrained=str(file))
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_fetched(monkeypatch):
    """What timm raises without a network (after a minute of trying), and what the user is told."""

    def offline(*_args, pretrained=False, **_keywords):
        assert pretrained
        raise FileNotFoundError("An error happened while trying to locate the file on the Hub. Check your connection.")

    monkeypatch.setattr(models.timm, "create_model", offline)
    with pytest.raises(
        ParameterError, match=r"pretrained = True.*could not be fetched.*-p pretrained FILE\.safetensors"
    ):
        create("test_resnet", classes=2, image_size=28, pretrained=True)
    with pytest.raises(ParameterError, match="pretrained = '.*no such file"):
        create("test_resnet", classes=2, image_size=28, pretrained="no/such.safetensors")
