"""Augmentation: each sample its own parameters, pixels moved exactly, the same numbers whatever the
content."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pa_core.data import augment, mix
from pa_core.data.augment import ERASE_AREA, ERASE_ASPECT, _rotate
from pa_core.params import ParameterError

KINDS = [
    "none",
    "flip",
    "rotate",
    "crop",
    "flip,rotate",
    "flip,crop",
    "rotate,crop",
    "flip,rotate,crop",
    "erase",
    "flip,crop,erase",
]
MIXES = ["mixup", "cutmix", "cutmix,mixup"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(size: int = 8) -> torch.Tensor:
    """uint8 [1, 3, S, S], no two pixels of a channel alike."""
    return torch.arange(3 * size * size).view(1, 3, size, size).to(torch.uint8)


def shifts(image: torch.Tensor, pad: int) -> list[torch.Tensor]:
    """Every crop of the padded image, by another way: pad with torch, then cut out."""
    size = image.shape[-1]
    padded = F.pad(image.float(), (pad,) * 4, mode="reflect").to(image.dtype)
    n = 2 * pad + 1
    return [padded[0, :, y : y + size, x : x + size] for y in range(n) for x in range(n)]


def which(images: torch.Tensor, candidates: list[torch.Tensor]) -> list[int]:
    """For each image the one candidate that it is."""
    found = []
    for image in images:
        matches = [i for i, candidate in enumerate(candidates) if torch.equal(image, candidate)]
        assert len(matches) == 1
        found += matches
    return found


def test_none_changes_nothing_and_draws_nothing():
    images, draws = picture(), generator()
    assert augment(images, kinds="none", generator=draws) is images
    assert torch.equal(draws.get_state(), generator().get_state())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_flip_mirrors_about_half_of_the_samples_exactly(dtype):
    image = picture().to(dtype)
    out = augment(image.expand(400, -1, -1, -1), kinds="flip", generator=generator())
    assert out.dtype == dtype
    share = sum(which(out, [image[0], image[0].flip(-1)])) / 400
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("size, pad", [(8, 1), (16, 2), (28, 3)])
def test_crop_moves_each_sample_by_up_to_an_eighth(size, pad):
    image = torch.rand(1, 3, size, size, generator=generator(1))
    out = augment(image.expand(600, -1, -1, -1), kinds="crop", generator=generator())
    seen = which(out, shifts(image, pad))
    assert len(set(seen)) == (2 * pad + 1) ** 2  # every offset occurs
    assert abs(seen.count((2 * pad + 1) ** 2 // 2) / 600 - 1 / (2 * pad + 1) ** 2) < 0.05  # the centre is not preferred


def test_crop_reflects_at_the_border_as_computed_by_hand():
    # One row of nine pixels (pad 1): moved right by one it reads 1 0 1 2 3 4 5 6 7, moved left 1 ..
    # 8 7.
    line = torch.arange(9, dtype=torch.uint8)
    image = line.expand(1, 1, 9, 9)
    rows = {
        tuple(out[0, 4].tolist()) for out in augment(image.expand(60, -1, -1, -1), kinds="crop", generator=generator())
    }
    assert rows == {(1, 0, 1, 2, 3, 4, 5, 6, 7), tuple(range(9)), (1, 2, 3, 4, 5, 6, 7, 8, 7)}


def test_flip_and_crop_together_are_a_crop_of_the_image_or_of_its_mirror():
    image = picture(8)
    out = augment(image.expand(300, -1, -1, -1), kinds="flip,crop", generator=generator())
    assert len(set(which(out, shifts(image, 1) + shifts(image.flip(-1), 1)))) == 18


def test_a_picture_too_small_to_move_stays_where_it_is():
    image = picture(7)
    assert torch.equal(augment(image, kinds="crop", generator=generator()), image)


def test_rotation_turns_counter_clockwise_each_sample_by_its_own_angle():
    images = torch.rand(4, 3, 6, 6, generator=generator(2))
    turned = _rotate(images, torch.tensor([0.0, 90.0, 180.0, -90.0]))
    for i, quarter_turns in enumerate([0, 1, 2, 3]):
        assert torch.allclose(turned[i], images[i].rot90(quarter_turns, (1, 2)), atol=1e-5)


def test_rotation_by_a_small_angle_moves_a_point_as_far_as_trigonometry_says():
    # The point (x, y) = (20, 0) right of the centre goes to (20 cos a, 20 sin a), upwards, for a =
    # 15 degrees.
    image = torch.zeros(1, 1, 65, 65)
    image[0, 0, 32, 52] = 1
    turned = _rotate(image, torch.tensor([15.0]))[0, 0]
    y, x = torch.meshgrid(torch.arange(65.0), torch.arange(65.0), indexing="ij")
    centre = ((turned * x).sum() / turned.sum(), (turned * y).sum() / turned.sum())
    assert centre[0].item() == pytest.approx(32 + 20 * 0.9659, abs=0.1)
    assert centre[1].item() == pytest.approx(32 - 20 * 0.2588, abs=0.1)


def test_rotation_leaves_no_empty_corner_and_keeps_the_dtype():
    images = torch.full((50, 3, 16, 16), 200, dtype=torch.uint8)
    out = augment(images, kinds="rotate", generator=generator())
    assert out.dtype == torch.uint8 and torch.equal(out, images)
    half = augment(images.half() / 255, kinds="rotate", generator=generator())
    assert half.dtype == torch.float16 and torch.allclose(half, images.half() / 255, atol=1e-3)


def test_rotation_angles_stay_within_fifteen_degrees_and_differ():
    image = torch.zeros(1, 1, 65, 65)
    image[0, 0, 32, 52] = 1
    out = augment(image.expand(200, -1, -1, -1), kinds="rotate", generator=generator())[:, 0]
    y = torch.arange(65.0)
    rise = 32 - (out.sum(2) * y).sum(1) / out.sum((1, 2))
    assert rise.abs().max() < 20 * 0.2588 + 0.2
    assert rise.max() > 4 and rise.min() < -4 and len(rise.round(decimals=2).unique()) > 100


@pytest.mark.parametrize("kinds", KINDS)
def test_draws_depend_neither_on_content_nor_on_dtype(kinds):
    states = []
    for images in (
        picture(16).expand(9, -1, -1, -1),
        torch.zeros(9, 3, 16, 16),
        torch.rand(9, 3, 16, 16),
    ):
        draws = generator(5)
        out = augment(images, kinds=kinds, generator=draws)
        assert out.shape == images.shape and out.dtype == images.dtype
        states.append(draws.get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("kinds", KINDS[1:])
def test_the_same_seed_gives_the_same_images_and_another_seed_others(kinds):
    images = torch.randint(0, 256, (32, 3, 16, 16), generator=generator(3)).to(torch.uint8)
    first, again, other = (augment(images, kinds=kinds, generator=generator(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, images)


@pytest.mark.parametrize("kinds", KINDS)
def test_the_input_is_left_as_it_was_and_may_be_empty(kinds):
    images = picture(16).repeat(5, 1, 1, 1)
    before = images.clone()
    augment(images, kinds=kinds, generator=generator())
    assert torch.equal(images, before)
    assert augment(images[:0], kinds=kinds, generator=generator()).shape == (0, 3, 16, 16)


def test_the_order_of_the_names_does_not_matter():
    images = torch.rand(8, 3, 16, 16, generator=generator(4))
    one, other = (
        augment(images, kinds=kinds, generator=generator()) for kinds in ("crop,flip,rotate", "flip,rotate,crop")
    )
    assert torch.equal(one, other)


def test_what_is_drawn_for_flip_rotate_and_crop_stays_what_it_was():
    """A run's images are part of its result; the numbers were taken when only these three kinds existed."""
    images = torch.randint(0, 256, (16, 3, 16, 16), generator=generator(3)).to(torch.uint8)
    weights = torch.arange(images.numel(), dtype=torch.long).view_as(images) % 1009
    sums = [
        int((augment(images, kinds=kinds, generator=generator(7)).long() * weights).sum())
        for kinds in ("flip", "crop", "flip,crop")
    ]
    assert sums == [785520799, 784736952, 788672507]
    angles = (torch.rand(16, generator=generator(7)) * 2 - 1) * 15
    assert torch.equal(augment(images, kinds="rotate", generator=generator(7)), _rotate(images, angles))


def erased(n: int = 3000, size: int = 32) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Images [n, 1, S, S] of a value that noise never has, erased, and height and width of each rectangle."""
    out = augment(torch.full((n, 1, size, size), 2.0), kinds="erase", generator=generator())
    gone = out[:, 0] != 2
    sides = [(int(g.any(1).sum()), int(g.any(0).sum())) for g in gone if g.any()]
    return out, sides


def test_erase_takes_a_rectangle_of_every_second_image():
    out, sides = erased()
    assert 0.46 < len(sides) / len(out) < 0.54
    shares = torch.tensor([h * w / 32**2 for h, w in sides])
    assert shares.min() > 0.01 and shares.max() < 0.45
    assert shares.mean() == pytest.approx(sum(ERASE_AREA) / 2, abs=0.01)
    ratio = torch.tensor([h / w for h, w in sides if h * w > 100]).log()
    assert ratio.abs().max() < -torch.tensor(ERASE_ASPECT).log() + 0.35  # whole pixels
    assert ratio.mean().abs() < 0.05 and ratio.std() > 0.4  # neither upright nor lying is preferred, and both occur


def test_erased_rectangles_lie_anywhere_and_hold_noise():
    out, _ = erased()
    gone = (out[:, 0] != 2).float().mean(0)
    assert gone.min() > 0  # the corners, too
    assert (gone - gone.flip(0)).abs().max() < 0.03 and (gone - gone.flip(1)).abs().max() < 0.03
    noise = out[out != 2]
    assert (
        noise.min() >= 0
        and noise.mean() == pytest.approx(0.5, abs=0.05)
        and noise.std() == pytest.approx(12**-0.5, abs=0.03)
    )
    pixels = augment(torch.full((40, 3, 32, 32), 255, dtype=torch.uint8), kinds="erase", generator=generator())
    assert pixels.dtype == torch.uint8 and len(pixels[pixels != 255].unique()) > 200


def numbered(n: int = 400, size: int = 16) -> torch.Tensor:
    """float32 [n, 1, S, S]: every pixel of image i is i / n."""
    return (torch.arange(n) / n).view(n, 1, 1, 1).expand(n, 1, size, size)


def test_mixup_blends_each_image_with_a_partner_of_its_own():
    images = numbered()
    out, mixing = mix(images, kinds="mixup", generator=generator())
    share = mixing.share.view(-1, 1, 1, 1)
    assert torch.allclose(out, share * images + (1 - share) * images[mixing.partner], atol=1e-6)
    assert sorted(mixing.partner.tolist()) == list(range(400))
    assert len(mixing.share.unique()) > 390 and mixing.share.mean() == pytest.approx(0.5, abs=0.05)
    assert mixing.share.std() == pytest.approx(12**-0.5, abs=0.03)  # even, Beta(1, 1)


def test_cutmix_shows_the_partner_in_a_rectangle_and_counts_its_pixels():
    images = numbered(size=32)
    out, mixing = mix(images, kinds="cutmix", generator=generator())
    for i, image in enumerate(out[:, 0]):
        own, other = image == images[i, 0], image == images[mixing.partner[i], 0]
        assert (own | other).all()
        if mixing.partner[i] != i:
            assert mixing.share[i] == own.float().mean()
            rows, columns = (~own).any(1), (~own).any(0)
            assert (~own).sum() == rows.sum() * columns.sum()  # one rectangle: full where its rows and columns meet
            assert (rows.int().diff().abs().sum() <= 2) and (columns.int().diff().abs().sum() <= 2)
    assert len(mixing.share.unique()) > 100


def test_cutmix_and_mixup_together_take_turns():
    images = numbered()
    out, mixing = mix(images, kinds="cutmix,mixup", generator=generator())
    flat = (out == out[:, :, :1, :1]).flatten(1).all(1)  # mixup leaves these images of one colour; cutmix hardly ever
    assert 0.4 < flat.float().mean() < 0.6
    mean = out.mean((1, 2, 3))
    expected = mixing.share * images[:, 0, 0, 0] + (1 - mixing.share) * images[mixing.partner, 0, 0, 0]
    assert torch.allclose(mean, expected, atol=1e-5)  # what an image shows is what its label says


def test_soft_labels_by_hand():
    from pa_core.data import Mixing

    mixing = Mixing(partner=torch.tensor([1, 0, 2]), share=torch.tensor([0.75, 0.5, 0.25]))
    soft = mixing.targets(torch.tensor([0, 2, 1]), classes=4)
    assert soft.tolist() == [[0.75, 0, 0.25, 0], [0.5, 0, 0.5, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("kinds", MIXES)
def test_mixing_keeps_dtype_and_input_and_is_the_same_for_the_same_seed(kinds):
    images = torch.randint(0, 256, (32, 3, 16, 16), generator=generator(3)).to(torch.uint8)
    before = images.clone()
    (one, a), (two, b), (other, _) = (mix(images, kinds=kinds, generator=generator(s)) for s in (0, 0, 1))
    assert one.dtype == torch.uint8 and torch.equal(images, before)
    assert torch.equal(one, two) and torch.equal(a.share, b.share) and torch.equal(a.partner, b.partner)
    assert not torch.equal(one, other) and not torch.equal(one, images)
    as_float, _ = mix(images.float() / 255, kinds=kinds, generator=generator(0))
    assert (as_float * 255 - one).abs().max() <= 0.51


@pytest.mark.parametrize("kinds", ["none", "flip", "rotate,crop,erase"])
def test_without_mixup_and_cutmix_nothing_is_mixed_or_drawn(kinds):
    images, draws = picture(), generator()
    mixed, mixing = mix(images, kinds=kinds, generator=draws)
    assert mixed is images and mixing is None and torch.equal(draws.get_state(), generator().get_state())


def test_mixing_is_not_the_business_of_augment():
    images, draws = picture(), generator()
    assert augment(images, kinds="cutmix,mixup", generator=draws) is images
    assert torch.equal(draws.get_state(), generator().get_state())


def test_an_unknown_kind_is_refused():
    with pytest.raises(ParameterError, match=r"augment = 'flip,crap' is refused: .*did you mean 'crop'"):
        augment(picture(), kinds="flip,crap", generator=generator())


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", KINDS)
def test_a_gpu_sees_the_same_images(kinds):
    images = torch.randint(0, 256, (64, 3, 32, 32), generator=generator(3)).to(torch.uint8)
    here = augment(images, kinds=kinds, generator=generator())
    there = augment(images.cuda(), kinds=kinds, generator=generator()).cpu()
    if "rotate" in kinds:  # the last bit of an interpolation may differ, and with it a rounding
        assert (here.int() - there.int()).abs().max() <= 1
    else:
        assert torch.equal(here, there)


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", MIXES)
def test_a_gpu_mixes_the_same_images(kinds):
    images = torch.randint(0, 256, (64, 3, 32, 32), generator=generator(3)).to(torch.uint8)
    here, mixing = mix(images, kinds=kinds, generator=generator())
    there, again = mix(images.cuda(), kinds=kinds, generator=generator())
    assert (here.int() - there.cpu().int()).abs().max() <= ("mixup" in kinds)
    assert torch.equal(mixing.partner, again.partner.cpu()) and torch.equal(mixing.share, again.share.cpu())
