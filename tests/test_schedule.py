"""Schedules: text -> events, and what is refused."""

from __future__ import annotations

import pytest

from pa_core import schedule
from pa_core.params import Experiment
from pa_core.schedule import Event


def test_events_by_hand():
    assert schedule.parse("2,p,1,x0.3,l0.1,1,c,1") == (
        Event("epoch", stage=0),
        Event("epoch", stage=0),
        Event("proxy", stage=0),
        Event("epoch", stage=1),
        Event("prune", 0.3, stage=1),
        Event("lr", 0.1, stage=1),
        Event("epoch", stage=2),
        Event("clear", stage=2),
        Event("epoch", stage=3),
    )
    assert [event.kind for event in schedule.parse("p,1,x0.5")] == ["proxy", "epoch", "prune"]


def test_the_predecessors_p_trains_for_an_epoch_that_is_a_stage_of_its_own():
    events = schedule.parse("2,p,1,p,1", p_trains=True)
    assert [(event.kind, event.stage) for event in events] == [
        ("epoch", 0),
        ("epoch", 0),
        ("epoch", 1),
        ("proxy", 1),  # it makes its proxies at its end
        ("epoch", 2),
        ("epoch", 3),
        ("proxy", 3),
        ("epoch", 4),
    ]


def test_lengths():
    assert (schedule.steps("5,p,9,p,4"), schedule.steps("18,x0.3")) == (2, 0)
    assert Experiment(schedule="5,p,9,p,4").length == 18
    for text in ("18", "9,p,8", "3,p,4,p,4,p,4"):
        assert Experiment(schedule=text, protocol="thesis").length == 18


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (" 5, P ,5", "5,p,5"),
        ("005,X.50", "5,x0.5"),
        ("5,l2.0,5", "5,l2,5"),
        ("5,l1E-3,5", "5,l0.001,5"),
        ("5,l1e-7,5", "5,l1e-07,5"),
        ("5,x0.123456789,99999", "5,x0.123456789,99999"),  # no digit is lost: it would be another run
    ],
)
def test_one_form(written, kept):
    assert schedule.normal(written) == kept == schedule.normal(kept)
    assert schedule.parse(written) == schedule.parse(kept) != ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must not be empty"),
        ("5,,p", "token 2 of 5,[],p must be one of numbers of epochs (1 to 99999), p, c, x0.3 and l0.1"),
        ("-1", "token 1 of [-1] must be one of"),
        ("0", "token 1"),
        ("100000", "token 1"),
        ("1.5", "token 1"),
        ("²", "token 1"),
        ("5,q,5", "token 2 of 5,[q],5 must be one of"),
        ("5,p1,5", "token 2"),
        ("5,x", "token 2"),
        ("5,x0", "token 2"),
        ("5,x1", "token 2"),
        ("5,x-0.3", "token 2"),
        ("5,xnan", "token 2"),
        ("5,l0,5", "token 2"),
        ("5,l1e6,5", "token 2"),
        ("5,linf,5", "token 2"),
        ("5,p", "token 2 of 5,[p] must have an epoch after it"),
        ("5,l0.1", "token 2 of 5,[l0.1] must have an epoch after it"),
        ("5,p,5,c", "token 4 of 5,p,5,[c] must have an epoch after it"),
        ("p,p,5", "token 2 of p,[p],5 must not be a proxy step right after another"),
        ("5,c,5", "token 2 of 5,[c],5 must have a proxy step before it"),
        ("5,p,c,5", "token 3 of 5,p,[c],5 must have a proxy step before it and an epoch between"),
        ("5,p,1,p,l0.1,c,5", "token 6"),
        ("x0.3", "must have at least one epoch"),
    ],
)
def test_refusals_point_at_the_token(text, words):
    for function in (schedule.parse, schedule.normal):
        with pytest.raises(ValueError) as caught:
            function(text)
        assert words in str(caught.value)
