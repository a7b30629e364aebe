"""Geometry, erasing and mixing: each sample its own parameters, pixels moved exactly, labels by hand."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kstest
from torch.nn import functional as F

from pa_core import augment
from pa_core.augment import ERASE_AREA, ERASE_ASPECT, cutmix, erase, generators, mixup, soft_labels
from pa_core.params import Experiment


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(images: torch.Tensor, kinds: str, seed: int = 0) -> torch.Tensor:
    return augment.moved(images, **geometry(len(images), images.shape[-1], kinds, generators(seed, 1)))


def geometry(n: int, size: int, kinds: str, draws: augment.Draws) -> dict[str, torch.Tensor]:
    return augment.geometry(n, size, kinds=frozenset(kinds.split(",")), draws=draws, device=torch.device("cpu"))


def picture(size: int = 8) -> torch.Tensor:
    """uint8 [1, 3, S, S], no two pixels of a channel alike."""
    return torch.arange(3 * size * size).view(1, 3, size, size).to(torch.uint8)


def shifts(image: torch.Tensor, pad: int) -> list[torch.Tensor]:
    """Every crop of the padded image, by another way: pad with torch, then cut out."""
    size, n = image.shape[-1], 2 * pad + 1
    padded = F.pad(image.float(), (pad,) * 4, mode="reflect").to(image.dtype)
    return [padded[0, :, y : y + size, x : x + size] for y in range(n) for x in range(n)]


def which(images: torch.Tensor, candidates: list[torch.Tensor]) -> list[int]:
    """For each image the one candidate that it is."""
    found = [[i for i, candidate in enumerate(candidates) if torch.equal(image, candidate)] for image in images]
    assert all(len(matches) == 1 for matches in found)
    return [matches[0] for matches in found]


# Geometry


def test_flip_mirrors_about_half_of_the_samples_exactly():
    image = picture()
    out = moved(image.expand(400, -1, -1, -1), "flip")
    assert out.dtype == torch.uint8 and 0.4 < sum(which(out, [image[0], image[0].flip(-1)])) / 400 < 0.6


@pytest.mark.parametrize("size, pad", [(8, 1), (16, 2), (28, 3)])
def test_crop_moves_each_sample_by_up_to_an_eighth(size, pad):
    image, n = torch.rand(1, 3, size, size, generator=generator(1)), (2 * pad + 1) ** 2
    seen = which(moved(image.expand(600, -1, -1, -1), "crop"), shifts(image, pad))
    assert len(set(seen)) == n  # every offset occurs, the centre is not preferred
    assert abs(seen.count(n // 2) / 600 - 1 / n) < 0.05


def test_crop_reflects_at_the_border_as_computed_by_hand():
    # one row of nine pixels (pad 1): moved right by one it reads 1 0 1 2 3 4 5 6 7, moved left 1 .. 8 7
    image = torch.arange(9, dtype=torch.uint8).expand(1, 1, 9, 9)
    rows = {tuple(out[0, 4].tolist()) for out in moved(image.expand(60, -1, -1, -1), "crop")}
    assert rows == {(1, 0, 1, 2, 3, 4, 5, 6, 7), tuple(range(9)), (1, 2, 3, 4, 5, 6, 7, 8, 7)}


def test_flip_and_crop_together_are_a_crop_of_the_image_or_of_its_mirror():
    image = picture()
    out = moved(image.expand(300, -1, -1, -1), "flip,crop")
    assert len(set(which(out, shifts(image, 1) + shifts(image.flip(-1), 1)))) == 18
    assert torch.equal(moved(picture(7), "crop"), picture(7))  # too small to move


def test_rotation_turns_counter_clockwise_each_sample_by_its_own_angle():
    images = torch.rand(4, 3, 6, 6, generator=generator(2))
    turned = augment.moved(images, degrees=torch.tensor([0.0, 90.0, 180.0, -90.0]))
    for i in range(4):
        assert torch.allclose(turned[i], images[i].rot90(i, (1, 2)), atol=1e-5)
    # the point (x, y) = (20, 0) right of the centre goes to (20 cos a, 20 sin a), upwards
    image = torch.zeros(1, 1, 65, 65)
    image[0, 0, 32, 52] = 1
    turned = augment.moved(image, degrees=torch.tensor([15.0]))[0, 0]
    y, x = torch.meshgrid(torch.arange(65.0), torch.arange(65.0), indexing="ij")
    assert ((turned * x).sum() / turned.sum()).item() == pytest.approx(32 + 20 * 0.9659, abs=0.1)
    assert ((turned * y).sum() / turned.sum()).item() == pytest.approx(32 - 20 * 0.2588, abs=0.1)


def test_rotation_leaves_no_empty_corner_and_angles_stay_within_fifteen_degrees():
    images = torch.full((50, 3, 16, 16), 200, dtype=torch.uint8)
    out = moved(images, "rotate")
    assert out.dtype == torch.uint8 and torch.equal(out, images)
    degrees = geometry(2000, 8, "rotate", generators(0, 1))["degrees"]
    assert -15 <= degrees.min() < -14.9 and 14.9 < degrees.max() <= 15
    assert degrees.mean().abs() < 0.5 and len(degrees.unique()) > 1900


@pytest.mark.parametrize("kinds", ["none", "flip", "crop", "rotate", "flip,rotate,crop"])
def test_what_is_marked_in_an_image_and_in_its_map_stays_together(kinds):
    maps = torch.zeros(64, 1, 16, 16)
    maps[..., 4:7, 9:12] = torch.rand(64, 1, 3, 3, generator=generator(3))
    images = (maps * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    before = images.clone()
    move = geometry(64, 16, kinds, generators(5, 2))
    seen, values = augment.moved(images, **move), augment.moved(maps, **move)
    assert ((seen / 255 - values).abs() < 1.01 / 255).all() and torch.equal(images, before)
    assert (kinds == "none") == torch.equal(seen, images)
    rows = torch.tensor([60, 3, 3])
    some = {name: drawn[rows] for name, drawn in move.items()}
    assert torch.equal(augment.moved(maps[rows], **some), values[rows])  # maps of some images alone


# Erasing


def test_erase_takes_a_rectangle_of_noise_of_some_images_anywhere():
    out = erase(torch.full((3000, 1, 32, 32), 2.0), None, region="anywhere", probability=0.3, draws=generator())
    gone = out[:, 0] != 2
    sides = [(int(g.any(1).sum()), int(g.any(0).sum())) for g in gone if g.any()]
    assert 0.27 < len(sides) / len(out) < 0.33
    assert gone.sum() == sum(h * w for h, w in sides)  # full where its rows and columns meet
    shares = torch.tensor([h * w / 32**2 for h, w in sides])
    assert shares.min() > 0.01 and shares.max() < 0.45
    assert shares.mean() == pytest.approx(sum(ERASE_AREA) / 2, abs=0.015)
    ratio = torch.tensor([h / w for h, w in sides if h * w > 100]).log()
    assert ratio.abs().max() < -torch.tensor(ERASE_ASPECT).log() + 0.35  # whole pixels
    assert ratio.mean().abs() < 0.06 and ratio.std() > 0.4  # neither upright nor lying is preferred, and both occur
    share = gone.float().mean(0)
    assert share.min() > 0  # the corners, too
    assert (share - share.flip(0)).abs().max() < 0.03 and (share - share.flip(1)).abs().max() < 0.03
    noise = out[out != 2]
    assert noise.min() >= 0 and noise.max() <= 1 and noise.std() == pytest.approx(12**-0.5, abs=0.03)


def test_erased_regions_have_equal_areas_and_only_their_place_follows_the_map(monkeypatch):
    n, size, seen, real = 64, 16, [], augment._spans
    monkeypatch.setattr(augment, "_spans", lambda boxes, size: seen.append(boxes) or real(boxes, size))
    maps, images = torch.rand(n, size, size, generator=generator(1)) ** 4, torch.full((n, 3, size, size), 2.0)
    maps[-9:] = 0  # images without a map

    def erased(region):
        draws = generator(7)
        out = erase(images, maps, region=region, probability=0.8, draws=draws)
        return out[:, 0] != 2, draws.get_state()

    (first, state), (high, high_state), (low, low_state) = map(erased, ("anywhere", "attended", "spared"))
    assert torch.equal(state, high_state) and torch.equal(state, low_state)
    assert torch.equal(first.sum((1, 2)), high.sum((1, 2))) and torch.equal(first.sum((1, 2)), low.sum((1, 2)))
    seen = [boxes for boxes in seen if boxes.ndim == 3]  # all candidates
    boxes, changed = seen[0].tolist(), 0
    for i in range(n):
        places = [tuple(boxes[side][k][i] for side in range(4)) for k in range(augment.CANDIDATES)]
        means = [maps[i, top:bottom, left:right].mean().item() for top, bottom, left, right in places]
        order = sorted(range(len(means)), key=means.__getitem__)
        best = (0, order[-1], order[0]) if i < n - 9 else (0, 0, 0)
        for mask, k in zip((first[i], high[i], low[i]), best, strict=True):
            top, bottom, left, right = places[k]
            expected = torch.zeros(size, size, dtype=torch.bool)
            expected[top:bottom, left:right] = first[i].any()
            assert torch.equal(mask, expected)
        changed += not torch.equal(high[i], low[i])
    assert len(seen) == 2 and 30 < changed < n


# Mixing


def numbered(n: int = 400, size: int = 16) -> torch.Tensor:
    """float32 [n, 1, S, S]: every pixel of image i is i / n."""
    return (torch.arange(n) / n).view(n, 1, 1, 1).expand(n, 1, size, size)


def test_mixup_blends_some_images_with_a_partner_of_their_own():
    images = numbered()
    out, partner, share = mixup(images, probability=0.75, draws=generator())
    by = share.view(-1, 1, 1, 1)
    assert torch.allclose(out, by * images + (1 - by) * images[partner], atol=1e-6)
    assert sorted(partner.tolist()) == list(range(400)) and 0.7 < (share < 1).float().mean() < 0.8
    drawn = share[share < 1]  # evenly from [0, 1], Beta(1, 1)
    assert drawn.mean() == pytest.approx(0.5, abs=0.05) and drawn.std() == pytest.approx(12**-0.5, abs=0.03)
    assert torch.equal(mixup(images, probability=0, draws=generator())[0], images)


def test_cutmix_shows_the_partner_in_a_rectangle_and_counts_its_pixels():
    images = numbered(size=32)
    out, partner, share = cutmix(images, None, probability=0.75, alpha=1, draws=generator())
    own = out == images
    assert (own | (out == images[partner])).all() and sorted(partner.tolist()) == list(range(400))
    apart = partner != torch.arange(400)
    assert torch.equal(share[apart], own[:, 0].float().mean((1, 2))[apart])
    gone = ~own[:, 0]
    assert torch.equal(gone.sum((1, 2)), gone.any(1).sum(1) * gone.any(2).sum(1))  # full where rows and columns meet
    assert gone.any(1).int().diff(dim=1).abs().sum(1).max() <= 2 and 0.7 < (share < 1).float().mean() < 0.8
    assert torch.equal(cutmix(images, None, probability=0, alpha=1, draws=generator())[2], torch.ones(400))


@pytest.mark.parametrize("alpha", [0.3, 1, 20])
def test_shares_of_cutmix_follow_beta(monkeypatch, alpha):
    drawn, real = [], augment._cut
    monkeypatch.setattr(augment, "_cut", lambda share, *at: drawn.append(share) or real(share, *at))
    cutmix(numbered(4000, 2), None, probability=1, alpha=alpha, draws=generator())
    assert kstest(drawn[0].numpy(), "beta", args=(alpha, alpha)).pvalue > 0.01


UPPER, FLAT = torch.tensor([1.0, 1, 0, 0]), torch.full((4,), 0.5)
ABOVE, LAST_ROW = torch.tensor([0.95 / 3] * 3 + [0.05]), torch.tensor([0.0, 0, 0, 1])


@pytest.mark.parametrize(
    ("maps", "cut", "shares"),  # a value for each row of a map
    [
        # 0.2 of each map lies evenly; the label is half by area, half by what is seen of the maps.
        # upper half cut: of the first is seen 0.2 / 2 = 0.1, of the second 0.5 -> (0.5 + 0.1 / 0.6) / 2;
        # the other way round 0.5 of the second, 0.8 + 0.1 of the first -> (0.5 + 0.5 / 1.4) / 2
        ([UPPER, FLAT], 2, [1 / 3, 3 / 7]),
        ([UPPER, 0 * FLAT], 2, [1 / 3, 3 / 7]),  # without a map: flat
        # three rows cut: of the first is seen 0.05 + 0.8 * 0.05, of the second 0.15, together less than 0.25: by area;
        # the other way round 0.05 + 0.8 of the second and 0.15 + 0.8 * 0.95 of the first -> (0.25 + 0.85 / 1.76) / 2
        ([ABOVE, LAST_ROW], 3, [0.25, 0.125 + 0.425 / 1.76]),
    ],
)
def test_labels_by_attention_by_hand(monkeypatch, maps, cut, shares):
    monkeypatch.setattr(augment, "_cut", lambda *_: torch.tensor([[0, 0], [cut, cut], [0, 0], [4, 4]]))
    images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    rows = torch.stack(maps)[:, :, None].expand(-1, 4, 4)
    mixed, partner, share = cutmix(images, rows, probability=1, alpha=1, draws=generator(1))
    assert partner.tolist() == [1, 0] and mixed[0].mean() == cut / 4
    assert share.tolist() == pytest.approx(shares)


def test_with_flat_maps_attention_is_cutmix_draw_for_draw():
    images = numbered(size=32)
    for flat in (torch.zeros(400, 32, 32), torch.full((400, 32, 32), 0.7)):
        (a, a_draws), (b, b_draws) = ((maps, generator(3)) for maps in (None, flat))
        one = cutmix(images, a, probability=0.5, alpha=0.4, draws=a_draws)
        two = cutmix(images, b, probability=0.5, alpha=0.4, draws=b_draws)
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
        assert torch.allclose(one[2], two[2], atol=1e-6) and torch.equal(a_draws.get_state(), b_draws.get_state())


def test_cutmix_and_mixup_together_take_turns_and_labels_say_what_is_shown():
    images, labels = numbered(), torch.arange(400)
    e = Experiment(augment="cutmix,mixup", mix_probability=1)
    out, targets = augment.change(images, labels, None, classes=400, experiment=e, draws=generators(0, 1))
    flat = (out == out[:, :, :1, :1]).flatten(1).all(1)  # mixup leaves these images of one colour; cutmix hardly ever
    assert 0.4 < flat.float().mean() < 0.6
    assert torch.allclose(targets @ images[:, 0, 0, 0], out.mean((1, 2, 3)), atol=1e-5)
    assert torch.allclose(targets.sum(1), torch.ones(400))
    plain = e.replace(augment="flip")
    kept, same = augment.change(images, labels, None, classes=400, experiment=plain, draws=generators(0, 1))
    assert kept is images and same is labels


def test_soft_labels_by_hand():
    share = torch.tensor([0.75, 0.5, 0.25])
    soft = soft_labels(torch.tensor([0, 2, 1]), torch.tensor([1, 0, 2]), share, classes=4)
    assert soft.tolist() == [[0.75, 0, 0.25, 0], [0.5, 0, 0.5, 0], [0, 1, 0, 0]]


def test_generators_are_of_their_kind_seed_and_epoch():
    drawn = {
        (seed, epoch, name): torch.rand(1, generator=draws).item()
        for seed, epoch in ((0, 1), (0, 2), (1, 1))
        for name, draws in generators(seed, epoch).items()
    }
    assert len(set(drawn.values())) == len(drawn) == 3 * 10
    assert drawn[0, 2, "erase"] == torch.rand(1, generator=generators(0, 2)["erase"]).item()
