"""One batch: which entries a pool has, and what a map does to an image, its label and its part in the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pa_core import batch, masking, proxy, train
from pa_core.attribution import upsampled
from pa_core.augment import generators
from pa_core.batch import Pool
from pa_core.data import Part
from pa_core.params import AUGMENTATIONS, FILLS, Experiment
from pa_core.proxy import Step

N, SIZE, CLASSES = 8, 8, 4


def part_of(images: torch.Tensor) -> Part:
    n = len(images)
    ids = tuple(f"image {i}" for i in range(n))
    store, rows = images.numpy(), np.arange(n)
    return Part(name="train", ids=ids, labels=torch.arange(n) % CLASSES, store=store, rows=rows)


def some_images(n: int = N, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def step(*positions: int, size: int = 4, seed: int = 0) -> Step:
    maps = torch.rand(len(positions), size, size, generator=torch.Generator().manual_seed(seed))
    return Step(positions=torch.tensor(positions), maps=maps.half())


def made(pool: Pool, index=None, *, draws=None, **parameters) -> batch.Batch:
    index = torch.arange(len(pool)) if index is None else torch.tensor(index)
    e = Experiment(**{"augment": "none", "fill": "zero", **parameters})
    images, labels = pool.part.read(pool.origin[index]), pool.labels[index]
    how = {"classes": CLASSES, "pool": pool, "index": index, "experiment": e}
    return batch.make(images, labels, **how, draws=draws or generators(e.seed, 1))


def pooled(*steps: Step, images: torch.Tensor | None = None, **parameters) -> Pool:
    part = part_of(some_images() if images is None else images)
    return proxy.pool(part, Experiment(**{"fill": "zero", **parameters}), steps)


# Pools


@pytest.mark.parametrize(
    ("parameters", "origin", "proxied", "withheld"),
    [
        ({}, [], [1, 2, 3, 4], []),
        ({"overlay": "append"}, [4, 1, 1, 2, 3], [8, 9, 10, 11, 12], []),
        ({"overlay": "append", "copies": 2}, [4, 1, 1, 2, 3] * 2, range(8, 18), []),
        ({"overlay": "append", "fill": "none"}, [4, 1, 1, 2, 3], [], []),  # repeated as they are
        ({"overlay": "withhold"}, [], [], [1, 2, 3, 4]),
        ({"fill": "none"}, [], [], []),
        ({"protocol": "thesis", "overlay": "withhold", "copies": 3}, [4, 1, 1, 2, 3], [8, 9, 10, 11, 12], []),
        ({"protocol": "thesis_text", "overlay": "append"}, [], [1, 2, 3, 4], []),
    ],
    ids=str,
)
def test_pools_by_hand(parameters, origin, proxied, withheld):
    pool = pooled(step(4, 1), step(1, 2, 3, seed=1), **parameters)
    assert pool.origin.tolist() == [*range(N), *origin] and len(pool) == N + len(origin)
    assert pool.labels.tolist() == [i % CLASSES for i in pool.origin.tolist()]
    assert torch.nonzero(pool.proxied).flatten().tolist() == list(proxied)
    assert torch.nonzero(pool.withheld).flatten().tolist() == withheld
    rows = pool.row.tolist()
    assert rows[:N] == [-1, 2, 3, 4, 0, -1, -1, -1]  # of image 1 the later map; beside it both
    assert rows[N:] == [0, 1, 2, 3, 4] * (len(origin) // 5)
    assert pool.maps.equal(torch.cat([step(4, 1).maps, step(1, 2, 3, seed=1).maps]))
    taken = pool.take(torch.tensor([2, 0, 4]))
    assert taken.origin.tolist() == [2, 0, 4] and taken.row.tolist() == [rows[2], rows[0], rows[4]]


def test_a_pool_without_steps_is_the_part():
    pool = pooled()
    assert len(pool) == N and not pool.proxied.any() and (pool.row == -1).all()
    same = made(pool)
    assert torch.equal(same.images, masking.to_float(some_images())) and same.weights is None
    assert same.targets.tolist() == pool.labels.tolist()


# Proxies in the batch


def test_replaced_images_are_masked_by_their_own_map_and_no_other_image_is():
    chosen = step(6, 2, 3)
    pool = pooled(chosen)
    order = [3, 0, 6, 7, 2]
    images, maps = masking.to_float(some_images()), upsampled(chosen.maps, SIZE)
    expected = images.clone()
    mask = masking.region(maps, threshold=0.6)
    expected[chosen.positions] = torch.where(mask[:, None], 0, images[chosen.positions])
    out = made(pool, order, threshold=0.6)
    assert torch.equal(out.images, expected[order]) and out.weights is None
    assert out.targets.tolist() == [i % CLASSES for i in order]  # each keeps its label


def test_appended_proxies_stand_beside_their_originals():
    pool = pooled(step(6, 2), overlay="append", copies=2)
    out = made(pool, overlay="append", copies=2).images
    assert torch.equal(out[:N], masking.to_float(some_images()))
    assert torch.equal(out[8], out[10]) and torch.equal(out[9], out[11])
    assert ((out[8] == 0) | (out[8] == out[6])).all() and (out[8] == 0).all(0).sum() == 16
    assert torch.equal(out[[8, 9]], made(pooled(step(6, 2)), [6, 2]).images)


def test_withheld_images_pass_unchanged_and_have_no_part_in_the_loss():
    out = made(pooled(step(6, 2), overlay="withhold"), [0, 2, 6, 5], overlay="withhold")
    assert torch.equal(out.images, masking.to_float(some_images())[[0, 2, 6, 5]])
    assert out.weights is not None and out.weights.tolist() == [1, 0, 0, 1]
    logits = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = train.weighted_loss(logits, out, label_smoothing=0.1)
    others = torch.nn.functional.cross_entropy(logits[[0, 3]], out.targets[[0, 3]], label_smoothing=0.1)
    assert loss.item() == pytest.approx(others.item())  # the mean over the others
    loss.backward()
    assert logits.grad is not None and logits.grad.abs().sum(1).bool().tolist() == [True, False, False, True]
    alone = made(pooled(step(6, 2), overlay="withhold"), [6, 2], overlay="withhold")
    assert train.weighted_loss(logits[:2], alone, label_smoothing=0).item() == 0


def test_each_draw_masks_with_proxy_probability():
    pool = pooled(step(*range(400)), images=some_images(400))
    plain = masking.to_float(some_images(400))

    def changed(epoch, probability):
        out = made(pool, draws=generators(0, epoch), proxy_probability=probability).images
        return (out != plain).flatten(1).any(1)

    first, second = changed(1, 0.3), changed(2, 0.3)
    assert 0.24 < first.float().mean() < 0.36 and not torch.equal(first, second)
    assert torch.equal(first, changed(1, 0.3)) and changed(1, 1).all() and not changed(1, 0).any()
    assert (first <= changed(1, 0.6)).all()  # the same draws


@pytest.mark.parametrize("kinds", ["flip,crop", "flip,rotate,crop"])
@pytest.mark.parametrize("region", ["salient", "rest"])
def test_the_share_of_a_quantile_is_exact_in_what_the_network_sees(kinds, region):
    pool = pooled(step(*range(64)), images=torch.zeros(64, 3, 16, 16, dtype=torch.uint8))
    out = made(pool, augment=kinds, fill="one", threshold=0.77, mask_region=region).images
    assert (out[:, 0] == 1).sum((1, 2)).tolist() == [round(0.23 * 256)] * 64


@pytest.mark.parametrize("kinds", ["none", "flip", "crop", "rotate", "flip,rotate,crop"])
def test_the_mask_moves_with_its_image(kinds):
    """Each image is black but for one pixel, the peak of its map: whatever moves, the highest places hide it."""
    maps = torch.zeros(64, 16, 16)
    maps[torch.arange(64), torch.arange(64) % 8 + 4, torch.arange(64) // 8 + 4] = 1
    images = (maps * 255).to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()
    pool = pooled(Step(positions=torch.arange(64), maps=maps.half()), images=images)
    seen = made(pool, augment=kinds, fill="none").images
    assert (seen.flatten(1).amax(1) > 0.2).all() and (kinds == "none") == seen.equal(masking.to_float(images))
    assert not made(pool, augment=kinds, threshold=1 - 9 / 256).images.any()  # rotation spreads it


@pytest.mark.parametrize("parameters", [{"weight": 0, "fill": fill} for fill in FILLS] + [{"fill": "none"}], ids=str)
def test_weight_zero_and_no_fill_are_the_batch_without_maps(parameters):
    everything = ",".join(AUGMENTATIONS)
    one = made(pooled(step(*range(N)), **parameters), augment=everything, **parameters)
    other = made(pooled(), augment=everything, **parameters)
    assert torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)


def test_a_patch_is_another_image_of_the_batch_drawn_anew():
    colours = (torch.arange(N) * 20 + 10).to(torch.uint8).view(N, 1, 1, 1).expand(N, 3, SIZE, SIZE).contiguous()
    pool, index, draws = pooled(step(1, 5, 7), images=colours, fill="patch"), [7, 0, 1, 3, 5], generators(0, 1)
    seen = []
    for _ in range(40):
        out = (made(pool, index, fill="patch", draws=draws).images * 255).round().int()
        assert out[1].unique().tolist() == [10] and out[3].unique().tolist() == [70]  # not proxied
        for at, own in ((0, 150), (2, 30), (4, 110)):
            (donor,) = set(out[at].unique().tolist()) - {own}
            assert donor in {150, 10, 30, 70, 110} and (out[at, 0] == donor).sum() == 16
            seen.append((at, donor))
    assert len(set(seen)) == 3 * 4  # each from each other


def test_noise_is_drawn_anew_at_each_draw_and_the_same_again():
    pool, draws = pooled(step(*range(N)), fill="noise"), generators(0, 1)
    one, two = (made(pool, fill="noise", draws=draws).images for _ in range(2))
    assert not torch.equal(one, two) and torch.equal(one, made(pool, fill="noise").images)


def test_maps_guide_erasing_and_mixing_whatever_the_overlay():
    chosen = step(*range(4))
    for guide in ({"augment": "erase", "erase_region": "attended"}, {"augment": "cutmix", "mix_labels": "attention"}):
        guide |= {"erase_probability": 1, "mix_probability": 1}
        flat = [made(pooled(**rest), **guide, **rest) for rest in ({"fill": "none"}, {"overlay": "withhold"})]
        maps = [made(pooled(chosen, **rest), **guide, **rest) for rest in ({"fill": "none"}, {"overlay": "withhold"})]
        for one, other in zip(flat, maps, strict=True):
            assert not (torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets))
        assert torch.equal(maps[0].images, maps[1].images) and torch.equal(maps[0].targets, maps[1].targets)


def test_no_kind_changes_the_draws_of_another():
    """The state of each generator after two batches is the same with one kind, with all of them, and with any map."""
    guides, everything = {"erase_region": "spared", "mix_labels": "attention"}, ",".join(AUGMENTATIONS)

    def states(pool, **parameters):
        draws = generators(0, 1)
        for _ in range(2):
            made(pool, draws=draws, **parameters)
        return {name: draw.get_state() for name, draw in draws.items()}

    fresh = {name: draw.get_state() for name, draw in generators(0, 1).items()}
    mapped, plain = pooled(step(*range(5))), pooled()
    whole = states(mapped, augment=everything, fill="patch", **guides)
    for name in AUGMENTATIONS:
        alone = states(plain, augment=name)
        assert not alone[name].equal(fresh[name]) and alone[name].equal(whole[name]), name
        assert all(alone[other].equal(fresh[other]) for other in AUGMENTATIONS if other != name)
    assert all(states(plain, augment=everything)[name].equal(whole[name]) for name in (*AUGMENTATIONS, "proxy"))
    assert whole["proxy"].equal(states(plain, augment="none")["proxy"])
    assert not whole["patch"].equal(fresh["patch"])  # drawn only where an image is masked
    assert states(plain, fill="patch")["patch"].equal(fresh["patch"])


def test_evaluating_proxies_masks_each_and_nothing_else():
    pool, e = pooled(step(6, 2)), Experiment(fill="zero", proxy_probability=0.01)
    how = {"pool": pool, "index": torch.tensor([0, 2, 6]), "experiment": e, "draws": generators(0, 0)}
    out = batch.unaugmented(some_images()[[0, 2, 6]], **how)
    assert torch.equal(out, made(pool, [0, 2, 6]).images)


def test_permuted_maps_are_a_derangement_and_another_one_for_each_seed():
    part, e, cpu = part_of(some_images()), Experiment(permute_maps=True), torch.device("cpu")
    raw, everything = torch.rand(N, 4, 4, generator=torch.Generator().manual_seed(3)), torch.arange(N)
    dealt = []
    for seed in (1, 2):
        how = {"positions": everything, "explained": part.labels, "seed": seed, "device": cpu, "raw": raw}
        own = proxy.maps_for(None, part, e.replace(permute_maps=False), **how)
        given = proxy.maps_for(None, part, e, **how)
        dealt.append([[i for i in range(N) if given[k].equal(own[i])][0] for k in range(N)])
    assert all(sorted(deal) == list(range(N)) and all(i != k for k, i in enumerate(deal)) for deal in dealt)
    assert dealt[0] != dealt[1]
    one = {"positions": everything[3:4], "explained": part.labels[3:4], "seed": 0, "device": cpu}
    assert len(proxy.maps_for(None, part, e.replace(fill="none"), **one)) == 1  # and no map is made


def test_a_step_that_selected_nothing_leaves_the_maps_of_the_others():
    nothing = Step(positions=torch.zeros(0, dtype=torch.long), maps=torch.zeros(0, 1, 1).half())
    pool = pooled(step(1, 4), nothing, keep_proxies="all")
    assert pool.maps.shape == (2, 4, 4) and pool.proxied.nonzero().flatten().tolist() == [1, 4]
    assert not pooled(nothing).proxied.any()


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", ["flip,crop,erase", "flip,rotate,crop,erase,cutmix,mixup"])
def test_a_gpu_sees_the_same_batch(kinds):
    pool = pooled(step(*range(N)))
    parameters = {"augment": kinds, "erase_region": "attended"}
    here, index = made(pool, **parameters), torch.arange(N)
    e = Experiment(fill="zero", **parameters)
    images, labels = pool.part.read(index).cuda(), pool.labels.cuda()
    there = batch.make(images, labels, classes=CLASSES, pool=pool, index=index, experiment=e, draws=generators(0, 1))
    assert (here.images - there.images.cpu()).abs().max() < (1.01 / 255 if "rotate" in kinds else 1e-6)
    assert torch.allclose(here.targets.float(), there.targets.float().cpu(), atol=1e-6)
