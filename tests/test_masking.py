"""Masking rules against hand-computed values."""

import pytest
import torch

from pa_core import masking
from pa_core.params import ParameterError

IMAGE = torch.tensor([[[0.0, 0.2], [0.4, 1.0]], [[0.5, 0.5], [0.5, 0.5]], [[0.1, 0.3], [0.5, 0.9]]])[None]
MAP = torch.tensor([[[0.1, 0.9], [0.5, 0.2]]])
RIGHT_TOP = torch.tensor([[[False, True], [False, False]]])


@pytest.mark.parametrize(
    ("fill", "value"),  # at (0, 1) for the three channels, weight 1: statistics of the image, per channel
    [
        ("zero", [0, 0, 0]),
        ("one", [1, 1, 1]),
        ("mean", [0.4, 0.5, 0.45]),
        ("max", [1.0, 0.5, 0.9]),
        ("min", [0.0, 0.5, 0.1]),
        ("half_max", [0.5, 0.25, 0.45]),
        ("blend", [0.02, 0.05, 0.03]),  # (1 - 0.9) * image
        ("none", [0.2, 0.5, 0.3]),
    ],
)
def test_fills_by_hand(fill, value):
    proxy = masking.apply(IMAGE, MAP, RIGHT_TOP, fill=fill)
    assert proxy[0, :, 0, 1].tolist() == pytest.approx(value)
    assert torch.equal(proxy[..., 1, :], IMAGE[..., 1, :]) and torch.equal(proxy[..., 0, 0], IMAGE[..., 0, 0])


def test_fills_do_not_depend_on_the_heatmap():
    """The predecessor filled with statistics of the heatmap."""
    for fill in masking.FILL_VALUES:
        a = masking.apply(IMAGE, MAP, RIGHT_TOP, fill=fill)
        assert torch.equal(a, masking.apply(IMAGE, 1 - MAP, RIGHT_TOP, fill=fill))
    assert not torch.equal(masking.apply(IMAGE, MAP, RIGHT_TOP, fill="max"), masking.apply(IMAGE / 2, MAP, RIGHT_TOP, fill="max"))


def test_weight_by_hand():
    proxy = masking.apply(IMAGE, MAP, RIGHT_TOP, fill="max", weight=0.25)
    assert proxy[0, 0, 0, 1].item() == pytest.approx(0.75 * 0.2 + 0.25 * 1.0)
    blend = masking.apply(IMAGE, MAP, RIGHT_TOP, fill="blend", weight=0.5)
    assert blend[0, 0, 0, 1].item() == pytest.approx((1 - 0.5 * 0.9) * 0.2)


@pytest.mark.parametrize("fill", masking.FILLS)
def test_weight_zero_is_the_identity(fill):
    images = torch.rand(3, 3, 8, 8)
    proxy = masking.apply(images, torch.rand(3, 8, 8), torch.ones(3, 8, 8, dtype=torch.bool), fill=fill, weight=0.0)
    assert torch.equal(proxy, images)


def test_absolute_threshold_is_strict():
    assert masking.region(MAP, threshold_mode="absolute", threshold=0.5).tolist() == [[[False, True], [False, False]]]
    assert masking.region(MAP, threshold_mode="absolute", threshold=0.5, mask_region="rest").tolist() == [[[True, False], [False, True]]]


def test_quantile_takes_the_highest():
    assert masking.region(MAP, threshold=0.75).tolist() == [[[False, True], [False, False]]]
    assert masking.region(MAP, threshold=0.75, mask_region="rest").tolist() == [[[True, False], [False, False]]]
    assert masking.region(MAP, threshold=0.5).tolist() == [[[False, True], [True, False]]]


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["distinct", "plateaus", "constant", "zero"])
def test_quantile_masks_the_exact_share(threshold, kind):
    maps = {
        "distinct": torch.rand(5, 28, 28),
        "plateaus": torch.randint(0, 3, (5, 28, 28)) / 2,
        "constant": torch.ones(5, 28, 28),
        "zero": torch.zeros(5, 28, 28),
    }[kind]
    counts = masking.region(maps, threshold=threshold).flatten(1).sum(1)
    assert counts.tolist() == [round((1 - threshold) * 784)] * 5


def test_ties_are_spread_over_the_plateau():
    mask = masking.region(torch.zeros(1, 28, 28), threshold=0.75)[0].float()
    quarters = [mask[a:b, c:d].mean().item() for a, b in ((0, 14), (14, 28)) for c, d in ((0, 14), (14, 28))]
    assert all(0.1 < share < 0.4 for share in quarters)


def test_uint8_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(masking.to_uint8(masking.to_float(values)), values)


def test_unknown_fill():
    with pytest.raises(ParameterError, match="fill"):
        masking.apply(IMAGE, MAP, RIGHT_TOP, fill="purple")
