"""Scores and selection against hand-computed values."""

import math

import pytest
import torch

from pa_core.selection import Scores, count, score, select, some_wrong

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0], [0.5, 0.0]])
LABELS = torch.tensor([0, 0, 1, 1, 0])
# margins: 2, -1, -3, 0, 0.5; wrong: 1, 2, 3 (a tie goes to class 0)


def scores():
    return score(LOGITS, LABELS)


def test_scores_by_hand():
    s = scores()
    assert s.margin.tolist() == [2, -1, -3, 0, 0.5]
    assert s.loss.tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in (2, -1, -3, 0, 0.5)], abs=1e-6)
    assert s.entropy[3].item() == pytest.approx(math.log(2))
    assert s.predicted.tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("by", "fraction", "expected"),
    [
        ("loss", 0.4, [2, 1]),
        ("margin", 0.6, [2, 1, 3]),
        ("misclassified", 1.0, [2, 1, 3]),  # fewer qualify than asked for
        ("misclassified", 0.4, [2, 1]),
        ("entropy", 0.2, [3]),
        ("easiest", 0.4, [0, 4]),
        ("all", 0.2, [0, 1, 2, 3, 4]),
    ],
)
def test_selection_by_hand(by, fraction, expected):
    assert select(scores(), by=by, fraction=fraction).tolist() == expected


def test_equal_scores_keep_the_order_of_the_images():
    tied = score(torch.zeros(50, 2), torch.zeros(50, dtype=torch.long))
    assert select(tied, by="loss", fraction=0.2).tolist() == list(range(10))


def test_random_depends_on_the_seed_alone():
    s = score(torch.randn(100, 3), torch.zeros(100, dtype=torch.long))
    first = select(s, by="random", fraction=0.3, seed=1)
    assert first.tolist() == select(s, by="random", fraction=0.3, seed=1).tolist()
    assert first.tolist() != select(s, by="random", fraction=0.3, seed=2).tolist()
    assert len(set(first.tolist())) == 30


def test_at_least_one_image():
    assert count(3, 0.01) == 1 and count(10, 0.25) == 2 and count(10, 1.0) == 10


def test_the_predecessor_takes_wrong_images_in_random_order_and_not_the_worst_first():
    n = 200
    zeros = torch.zeros(n, dtype=torch.long)
    s = Scores(loss=torch.arange(n).float(), margin=zeros, entropy=zeros, predicted=torch.arange(n) % 2, labels=zeros)
    chosen = some_wrong(s, among=torch.arange(150), fraction=0.3, seed=0)
    assert len(set(chosen.tolist())) == len(chosen) == 23  # 0.3 of the 75 odd ones, rounded up
    assert (chosen % 2 == 1).all() and chosen.max() < 150
    assert set(chosen.tolist()) not in (set(range(149, 149 - 2 * 23, -2)), set(range(1, 2 * 23, 2)))
    assert torch.equal(chosen, some_wrong(s, among=torch.arange(150), fraction=0.3, seed=0))
    assert len(some_wrong(s, among=torch.arange(0, 150, 2), fraction=0.5, seed=0)) == 0
