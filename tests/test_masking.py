"""Masking rules: against hand-computed values, and what must hold for any image and heatmap."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pa_core import masking
from pa_core.params import FILLS

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
    for fill in set(FILLS) - {"blend", "patch"}:
        a = masking.apply(IMAGE, MAP, RIGHT_TOP, fill=fill)
        assert torch.equal(a, masking.apply(IMAGE, 1 - MAP, RIGHT_TOP, fill=fill))
    assert not torch.equal(
        masking.apply(IMAGE, MAP, RIGHT_TOP, fill="max"), masking.apply(IMAGE / 2, MAP, RIGHT_TOP, fill="max")
    )


def test_weight_by_hand():
    proxy = masking.apply(IMAGE, MAP, RIGHT_TOP, fill="max", weight=0.25)
    assert proxy[0, 0, 0, 1].item() == pytest.approx(0.75 * 0.2 + 0.25 * 1.0)
    blend = masking.apply(IMAGE, MAP, RIGHT_TOP, fill="blend", weight=0.5)
    assert blend[0, 0, 0, 1].item() == pytest.approx((1 - 0.5 * 0.9) * 0.2)


def test_absolute_threshold_is_strict():
    assert masking.region(MAP, threshold_mode="absolute", threshold=0.5).tolist() == [[[False, True], [False, False]]]
    assert masking.region(MAP, threshold_mode="absolute", threshold=0.5, mask_region="rest").tolist() == [
        [[True, False], [False, True]]
    ]


def test_deviations_by_hand():
    """MAP has the mean 0.425 and the standard deviation 0.311 (of all pixels): 0.9 is 1.53 of them above, 0.5 0.24."""
    for threshold, masked in ((0, [[0, 1], [1, 0]]), (0.24, [[0, 1], [1, 0]]), (0.25, [[0, 1], [0, 0]]),
                              (1.52, [[0, 1], [0, 0]]), (1.54, [[0, 0], [0, 0]])):  # fmt: skip
        assert masking.region(MAP, threshold_mode="deviations", threshold=threshold).int().tolist() == [masked]
    rest = {"threshold_mode": "deviations", "threshold": 1, "mask_region": "rest"}  # 1 - MAP: 0.9 is 1.04 above
    assert masking.region(MAP, **rest).tolist() == [[[True, False], [False, False]]]
    both = torch.cat([MAP, MAP / 2, MAP * 0, MAP * 0 + 1])  # of each image's own; a constant map has nothing above
    assert masking.region(both, threshold_mode="deviations", threshold=1).flatten(1).sum(1).tolist() == [1, 1, 0, 0]
    many = masking.region(MAP, threshold_mode="deviations", threshold=0, max_share=0.25)
    assert many.tolist() == [[[False, True], [False, False]]]


def test_quantile_takes_the_highest():
    assert masking.region(MAP, threshold=0.75).tolist() == [[[False, True], [False, False]]]
    assert masking.region(MAP, threshold=0.75, mask_region="rest").tolist() == [[[True, False], [False, False]]]
    assert masking.region(MAP, threshold=0.5).tolist() == [[[False, True], [True, False]]]


def test_ties_are_spread_over_the_plateau():
    mask = masking.region(torch.zeros(1, 28, 28), threshold=0.75)[0].float()
    quarters = [mask[a:b, c:d].mean().item() for a, b in ((0, 14), (14, 28)) for c, d in ((0, 14), (14, 28))]
    assert all(0.1 < share < 0.4 for share in quarters)


def test_uint8_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(masking.to_uint8(masking.to_float(values)), values)


def test_unknown_fill():
    with pytest.raises(KeyError, match="purple"):
        masking.apply(IMAGE, MAP, RIGHT_TOP, fill="purple")


def test_patch_takes_the_same_place_of_the_donor():
    donor = torch.rand(1, 3, 2, 2)
    proxy = masking.apply(IMAGE, MAP, RIGHT_TOP, fill="patch", weight=0.5, donors=donor)
    assert torch.equal(proxy[0, :, 0, 1], 0.5 * IMAGE[0, :, 0, 1] + 0.5 * donor[0, :, 0, 1])


def test_noise_has_the_statistics_of_the_image_and_is_its_own():
    images = 0.5 + 0.1 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[1] += 0.1
    everywhere = torch.ones(2, 64, 64, dtype=torch.bool)
    noise = masking.apply(images, images[:, 0], everywhere, fill="noise", ids=["a", "b"])
    assert torch.allclose(noise.mean((2, 3)), images.mean((2, 3)), atol=0.01)
    assert torch.allclose(noise.std((2, 3)), images.std((2, 3)), atol=0.01)
    alone = masking.apply(images[1:], images[1:, 0], everywhere[1:], fill="noise", ids=["b"])
    assert torch.equal(alone, noise[1:]), "noise depends on the other images of the batch"
    assert not torch.equal(
        alone, masking.apply(images[1:], images[1:, 0], everywhere[1:], fill="noise", ids=["b"], seed=1)
    )


def test_blur_is_the_gaussian_of_the_image():
    """A bright pixel becomes the outer product of two normalised Gaussians, sigma = side / 8, cut at two sigma."""
    image = torch.zeros(1, 3, 32, 32)
    image[..., 16, 16] = 1
    blurred = masking.apply(image, image[:, 0], torch.ones(1, 32, 32, dtype=torch.bool), fill="blur")[0, 0]
    line = torch.exp(-((torch.arange(32) - 16.0) ** 2) / (2 * 4**2)) * ((torch.arange(32) - 16).abs() <= 8)
    line = line / line.sum()
    assert torch.allclose(blurred, line[:, None] * line[None], atol=1e-6)


def test_max_share_keeps_the_highest():
    above = {"threshold_mode": "absolute", "threshold": 0.15}
    assert masking.region(MAP, **above).sum() == 3
    assert masking.region(MAP, **above, max_share=0.5).tolist() == [[[False, True], [True, False]]]
    assert masking.region(MAP, **above, max_share=0.25).tolist() == [[[False, True], [False, False]]]
    assert masking.region(MAP, threshold_mode="absolute", threshold=0.6, max_share=0.5).tolist() == [
        [[False, True], [False, False]]
    ]
    assert masking.region(MAP, threshold=0.0, max_share=0.5).tolist() == [[[False, True], [True, False]]]


def test_feather_by_hand():
    mask = torch.zeros(1, 7, 7, dtype=torch.bool)
    mask[0, 1:6, 1:6] = True
    ramp = masking.feathered(mask, feather=2)[0] * 3
    assert ramp.round().int().tolist() == [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 1, 2, 2, 2, 1, 0],
        [0, 1, 2, 3, 2, 1, 0],
        [0, 1, 2, 2, 2, 1, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    corner = torch.zeros(1, 7, 7, dtype=torch.bool)
    corner[0, :3, :3] = True  # the image's border is no edge
    assert (masking.feathered(corner, feather=2)[0, :3, :3] * 3).round().int().tolist() == [
        [3, 2, 1],
        [2, 2, 1],
        [1, 1, 1],
    ]
    proxy = masking.apply(torch.zeros(1, 3, 7, 7), mask.float(), mask, fill="one", weight=0.5, feather=2)
    assert torch.allclose(proxy[0, 1], ramp / 6)


sizes = st.integers(2, 12)
shares = st.floats(0, 1)


@st.composite
def batches(draw):
    """Images, heatmaps (with plateaus, as ReLU makes them) and donors."""
    n, size, seed, levels = (
        draw(st.integers(1, 3)),
        draw(sizes),
        draw(st.integers(0, 10**6)),
        draw(st.sampled_from([1, 2, 3, 1000])),
    )
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, levels, (n, size, size), generator=generator) / max(1, levels - 1)
    images, donors = (torch.rand(n, 3, size, size, generator=generator) for _ in range(2))
    return images, maps, donors


how = {
    "mask_region": st.sampled_from(["salient", "rest"]),
    "threshold_mode": st.sampled_from(["absolute", "quantile", "deviations"]),
    "threshold": shares,
    "max_share": st.floats(0.01, 1),
}


@settings(max_examples=150, deadline=None)
@given(batches(), st.fixed_dictionaries(how), st.sampled_from(FILLS), shares, st.integers(0, 5))
def test_pixels_outside_the_mask_are_unchanged_bit_for_bit(batch, where, fill, weight, feather):
    images, maps, donors = batch
    mask = masking.region(maps, **where)
    proxy = masking.apply(
        images, maps, mask, fill=fill, weight=weight, mask_region=where["mask_region"], feather=feather, donors=donors
    )
    outside = ~mask.unsqueeze(1).expand_as(images)
    assert torch.equal(proxy[outside].view(torch.int32), images[outside].view(torch.int32))
    assert proxy.isfinite().all() and proxy.amin() >= 0 and proxy.amax() <= 1 + 1e-6


@settings(max_examples=100, deadline=None)
@given(batches(), st.fixed_dictionaries(how), shares)
def test_the_masked_area_falls_as_the_threshold_rises(batch, where, other):
    low, high = sorted([where["threshold"], other])
    low_mask, high_mask = (masking.region(batch[1], **(where | {"threshold": t})) for t in (low, high))
    assert (high_mask <= low_mask).all(), "a higher threshold masks a subset"


@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from(FILLS), st.integers(0, 5))
def test_weight_zero_is_the_identity_for_any_batch(batch, fill, feather):
    images, maps, donors = batch
    mask = masking.region(maps, threshold=0.3)
    assert torch.equal(masking.apply(images, maps, mask, fill=fill, weight=0.0, feather=feather, donors=donors), images)


@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from(["salient", "rest"]), shares, st.floats(0.01, 1))
def test_quantile_masks_exactly_its_share_of_each_image(batch, mask_region, q, max_share):
    maps = batch[1]
    pixels = maps[0].numel()
    counts = masking.region(maps, mask_region=mask_region, threshold=q).flatten(1).sum(1)
    assert counts.tolist() == [round((1 - q) * pixels)] * len(maps)
    capped = masking.region(maps, mask_region=mask_region, threshold=q, max_share=max_share).flatten(1).sum(1)
    assert capped.tolist() == [min(round((1 - q) * pixels), round(max_share * pixels))] * len(maps)


@settings(max_examples=100, deadline=None)
@given(batches(), st.fixed_dictionaries(how))
def test_what_is_masked_ranks_above_what_is_not(batch, where):
    maps = 1 - batch[1] if where["mask_region"] == "rest" else batch[1]
    for heatmap, mask in zip(maps, masking.region(batch[1], **where), strict=True):
        if mask.any() and not mask.all():
            assert heatmap[mask].min() >= heatmap[~mask].max()
