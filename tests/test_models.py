"""Models: CAM layer and layout, small inputs, weights from timm or a file, pruning."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pa_core import models
from pa_core.errors import ParameterError
from pa_core.models import create


@pytest.mark.parametrize(
    ("name", "size", "layout", "layer", "changes"),
    [
        ("test_resnet", 28, "NCHW", "forward_features", 4),
        ("resnet18", 64, "NCHW", "forward_features", 2),  # both branches of the last reduction
        ("efficientnet_b0", 28, "NCHW", "forward_features", 2),
        ("convnext_atto", 64, "NCHW", "forward_features", 1),
        ("densenet121", 28, "NCHW", "forward_features", 3),
        ("swin_tiny_patch4_window7_224", 28, "NHWC", "forward_features", 1),
        ("vit_tiny_patch16_224", 64, "tokens", "blocks.11.norm1", 0),
        ("vit_tiny_patch16_224", 28, "tokens", "blocks.11.norm1", 1),
        ("deit_tiny_distilled_patch16_224", 64, "tokens", "blocks.11.norm1", 0),
        ("cait_xxs24_224", 64, "tokens", "blocks.23.norm1", 0),
        ("levit_128s", 64, "tokens", "stages.0", 0),  # an earlier level of features
        ("resnet9", 128, "NCHW", "forward_features", 0),
    ],
)
def test_cam_layer_and_grid(name, size, layout, layer, changes):
    model = create(name, classes=5, image_size=size)
    assert (model.cam.layout, model.cam.layer, len(model.changes)) == (layout, layer, changes), model.changes
    assert min(model.cam.grid) >= 4
    activations, logits = model.forward_cam(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 5)
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), activations)
    spatial = model.cam.spatial(gradient)
    assert spatial.shape[0] == 2 and spatial.shape[2:] == model.cam.grid


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 128), ("resnet18", 224), ("vit_tiny_patch16_224", 224)])
def test_large_inputs_change_nothing(name, size):
    model = create(name, classes=5, image_size=size)
    assert model.changes == () and min(model.cam.grid) >= 4


def test_the_changes_are_named():
    expected = ("layer4.0.conv1", "layer4.0.downsample.0")
    changes = create("test_resnet", classes=2, image_size=64).changes
    assert create("vit_tiny_patch16_224", classes=2, image_size=28).changes == ("patch size 16 -> 7",)
    assert changes == tuple(f"stride of {name} 2 -> 1" for name in expected)
    with pytest.raises(ParameterError, match="invalid image_size=32: must give inception_v3 a heatmap grid of 4x4"):
        create("inception_v3", classes=2, image_size=32)


def test_forward_cam_agrees_with_forward():
    images = torch.rand(3, 3, 64, 64)
    for name in ("test_resnet", "vit_tiny_patch16_224"):
        model = create(name, classes=4, image_size=64)
        torch.testing.assert_close(model.forward_cam(images)[1], model(images), atol=1e-5, rtol=1e-5)


def test_named_cam_layer():
    before = torch.get_rng_state()
    model = create("test_resnet", classes=4, image_size=64, cam_layer="layer3")
    assert torch.equal(torch.get_rng_state(), before)
    assert model.cam.layer == "layer3" and model.cam.grid == (4, 4)
    activations, logits = model.forward_cam(torch.rand(2, 3, 64, 64))
    assert torch.autograd.grad(logits.sum(), activations)[0].abs().sum() > 0
    with pytest.raises(ParameterError, match="cam_layer='layer5'.*did you mean 'layer"):
        create("test_resnet", classes=4, image_size=64, cam_layer="layer5")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("test_vit", "norm"),  # patches after a class-token network's last block have no gradient
        ("efficientnet_b0", "blocks.6.0.se.conv_expand"),  # 1 x 1
        ("test_resnet", "fc"),  # no map
    ],
)
def test_cam_layers_that_say_nothing_about_where_are_refused(name, layer):
    with pytest.raises(
        ParameterError, match=f"invalid cam_layer='{layer}': must be a module that gives a map or patch"
    ):
        create(name, classes=4, image_size=64, cam_layer=layer)


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
    with pytest.raises(ParameterError, match="model='resnet19'.*did you mean 'resnet"):
        create("resnet19", classes=2, image_size=64)
    with pytest.raises(ParameterError, match="model='resnet18.x1'.*a1_in1k"):
        create("resnet18.x1", classes=2, image_size=64)


# Weights


def weights(name="test_resnet", classes=7, size=64):
    network = create(name, classes=classes, image_size=size, seed=5).network
    return {key: value.clone() for key, value in network.state_dict().items()}


@pytest.mark.parametrize("form", ["safetensors", "pth", "wrapped", "converted"])
def test_weights_from_a_file(form, tmp_path):
    state = weights(classes=7)
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, file)
    elif form == "wrapped":
        torch.save({"state_dict": {f"module.network.{k}": v for k, v in state.items()}}, file)
    elif form == "converted":
        torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, file)
    else:
        torch.save(state, file)
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


@pytest.mark.parametrize("fault", ["evil", "garbage", "other", "more", "cut", "absent"])
def test_bad_weight_files(fault, tmp_path):
    file = tmp_path / "w.pth"
    if fault == "evil":
        file.write_bytes(pickle.dumps({"fc.weight": Evil()}))
    elif fault == "garbage":
        file.write_bytes(b"not weights")
    elif fault == "other":
        torch.save({k: v for k, v in weights().items() if "layer4" not in k}, file)
    elif fault == "more":
        torch.save(weights() | {"layer5.weight": torch.zeros(1)}, file)
    elif fault == "cut":
        torch.save(weights(), file)
        file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ParameterError, match=r"^invalid pretrained='.*w.pth': must ") as caught:
        create("test_resnet", classes=7, image_size=28, pretrained=str(file))
    assert "\n" not in str(caught.value) and ". " not in str(caught.value)


def test_weights_that_cannot_be_fetched(monkeypatch):
    """What timm raises without a network (after a minute of trying), and what the user is told."""
    with pytest.raises(ParameterError, match="invalid pretrained=True.*no weights for resnet9"):
        create("resnet9", classes=10, image_size=32, pretrained=True)

    def offline(*_args, pretrained=False, **_keywords):
        assert pretrained
        raise FileNotFoundError("An error happened while trying to locate the file on the Hub. Check your connection.")

    monkeypatch.setattr(models.timm, "create_model", offline)
    with pytest.raises(ParameterError, match=r"-p pretrained FILE\.safetensors.*could not be fetched \(An error"):
        create("test_resnet", classes=2, image_size=28, pretrained=True)


# Pruning


def layers(network):
    return [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def step(model, optimizer, seed=0):
    images = torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    optimizer.step()


def zeros(model):
    return {key: value == 0 for key, value in models.plain_state(model).items() if value.ndim > 1}


def test_the_smallest_weights_of_all_layers_go_and_nothing_else():
    model = create("test_resnet", classes=4, image_size=28)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert models.sparsity(model) == 0
    models.prune(model, 0.5)
    assert models.sparsity(model) == pytest.approx(0.5, abs=1e-5)
    after = models.plain_state(model)
    assert after.keys() == before.keys()
    kept = torch.cat([before[k][after[k] != 0].abs() for k in after if after[k].ndim > 1])
    gone = torch.cat([before[k][after[k] == 0].abs() for k in after if after[k].ndim > 1])
    assert gone.max() <= kept.min()
    assert all(torch.equal(after[k], before[k]) for k in after if after[k].ndim < 2)
    assert all(torch.equal(after[k][after[k] != 0], before[k][after[k] != 0]) for k in after)
    models.prune(model, 0.5)  # half of what is left
    assert models.sparsity(model) == pytest.approx(0.75, abs=1e-5)
    assert sum(int(z.sum()) for z in zeros(model).values()) == round(
        0.75 * sum(m.weight.numel() for m in layers(model))
    )


def test_pruned_weights_stay_zero_and_copies_train_on():
    model = create("test_resnet", classes=4, image_size=28).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    step(model, optimizer)  # so that AdamW has momentum for the weights that go
    models.prune(model, 0.6)
    pruned, before = zeros(model), models.plain_state(model)
    for _ in range(3):
        step(model, optimizer)
    after = models.plain_state(model)
    assert all(bool((after[k][z] == 0).all()) for k, z in pruned.items())
    assert all(not torch.equal(after[k], before[k]) for k in pruned)  # the others are trained
    other = copy.deepcopy(model)  # of a network through which a graph has gone
    step(other, torch.optim.AdamW(other.parameters(), lr=0.01))
    assert all(torch.equal(a, b) for a, b in zip(models.plain_state(model).values(), after.values(), strict=True))
    assert all(torch.equal(zeros(other)[k], zeros(model)[k]) for k in pruned)
    plain = create("test_resnet", classes=4, image_size=28)
    plain.load_state_dict(after)
    images = torch.rand(2, 3, 28, 28)
    torch.testing.assert_close(plain(images), model.eval()(images))


def test_a_pruned_network_is_restored_with_its_optimizer():
    def begin():
        model = create("test_resnet", classes=4, image_size=28).train()
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)  # which stores states by position: before pruning

    model, optimizer = begin()
    step(model, optimizer)
    models.prune(model, 0.5)
    step(model, optimizer)
    state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    again, resumed = begin()
    models.restore_pruning(again, state)
    again.load_state_dict(state)
    resumed.load_state_dict(moments)
    assert models.sparsity(again) == models.sparsity(model)
    for network, its in ((model, optimizer), (again, resumed)):
        models.prune(network, 0.5)
        step(network, its, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    untouched = create("test_resnet", classes=4, image_size=28)
    models.restore_pruning(untouched, untouched.state_dict())
    assert not any(key.endswith("_mask") for key in untouched.state_dict())


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_pruned_networks_can_be_explained(name):
    model = create(name, classes=4, image_size=64)
    plain = model(torch.ones(1, 3, 64, 64))
    models.prune(model, 0.5)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    assert not torch.allclose(model(torch.ones(1, 3, 64, 64)), plain)
    activations, logits = model.forward_cam(images.detach())
    torch.testing.assert_close(logits, model(images), atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(logits.logsumexp(1).sum(), activations)[0].isfinite().all()
    assert torch.autograd.grad(model(images).logsumexp(1).sum(), images)[0].isfinite().all()


def test_pruning_holds_where_a_network_reads_a_weight_without_calling_its_layer():
    model, images = create("eva02_tiny_patch14_224", classes=4, image_size=56), torch.rand(2, 3, 56, 56)
    nn.init.normal_(model.network.head.weight)  # timm begins it near zero
    before = model(images)
    models.prune(model, 0.7)
    plain = create("eva02_tiny_patch14_224", classes=4, image_size=56)
    plain.load_state_dict(models.plain_state(model))
    torch.testing.assert_close(model(images), plain(images))
    assert not torch.allclose(before, plain(images), atol=1e-3)
