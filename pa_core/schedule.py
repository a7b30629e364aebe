"""A schedule such as ``5,p,9,x0.3,4`` as a flat list of events.

Numbers are epochs of training. Between them stand events that take no epoch: ``p`` proxy step; ``c`` forget all maps;
``x0.3`` prune this share of the weights that are left; ``l0.1`` multiply the learning rate from here on. Only under the
predecessor's protocol (``p_trains``) does ``p`` train for an epoch, too, and make its proxies at its end.
"""

from __future__ import annotations

import re
from typing import NamedTuple

EPOCH, PROXY, CLEAR, PRUNE, LR = "epoch", "proxy", "clear", "prune", "lr"
LETTERS = {"p": PROXY, "c": CLEAR, "x": PRUNE, "l": LR}
"""What a token other than a number begins with. To add an event: a letter here, a function in `experiment`."""
BELOW = {PRUNE: 1.0, LR: 1e6}
"""Events that take a number, which must be above 0 and below this."""
TOKENS = "numbers of epochs (1 to 99999), p, c, x0.3 and l0.1 with commas between them, such as 5,p,5"


class Event(NamedTuple):
    """One epoch, or one event between epochs."""

    kind: str  # epoch, proxy, clear, prune or lr
    value: float = 0.0  # the share of prune, the factor of lr
    stage: int = 0  # the epochs of one number, counted from 0, that the event is in or comes after


def parse(text: str, *, p_trains: bool = False) -> tuple[Event, ...]:
    """``"2,p,1"`` -> epoch, epoch, proxy, epoch. ValueError where a token is unknown or would have no effect."""
    events: list[Event] = []
    stage = -1
    for kind, value in _tokens(text):
        trains = int(value) if kind == EPOCH else int(p_trains and kind == PROXY)
        stage += trains > 0
        events += [Event(EPOCH, stage=stage)] * trains
        if kind != EPOCH:
            events.append(Event(kind, value, stage=max(stage, 0)))
    return tuple(events)


def normal(text: str) -> str:
    """A schedule in its canonical form: ``" 5,P, x0.50"`` -> ``"5,p,x0.5"``. Raises as :func:`parse`."""
    letters = {kind: letter for letter, kind in LETTERS.items()}
    numbers = [(kind, str(value).removesuffix(".0") if value else "") for kind, value in _tokens(text)]
    return ",".join(letters.get(kind, "") + number for kind, number in numbers)


def steps(text: str) -> int:
    """Number of proxy steps: ``steps("5,p,9") == 1``."""
    return sum(kind == PROXY for kind, _ in _tokens(text))


def _tokens(text: str) -> list[tuple[str, float]]:
    """(kind, value) of each token, checked."""
    words = [word.strip().lower() for word in text.split(",")]
    if words == [""]:
        raise ValueError(f"must not be empty: {TOKENS}")
    tokens = [_token(word) for word in words]
    kinds = [kind for kind, _ in tokens]
    for i, kind in enumerate(kinds):
        before, allowed = kinds[:i], ""
        if not kind:
            allowed = f"must be one of {TOKENS}"
        elif kind not in (EPOCH, PRUNE) and EPOCH not in kinds[i:]:
            allowed = "must have an epoch after it, or it has no effect"
        elif kind == PROXY and before[-1:] == [PROXY]:
            allowed = "must not be a proxy step right after another"
        elif kind == CLEAR and (PROXY not in before or EPOCH not in before[::-1][: before[::-1].index(PROXY)]):
            allowed = "must have a proxy step before it and an epoch between, or it has no effect"
        if allowed:
            marked = ",".join([*words[:i], f"[{words[i]}]", *words[i + 1 :]])
            raise ValueError(f"token {i + 1} of {marked} {allowed}")
    if EPOCH not in kinds:
        raise ValueError("must have at least one epoch of training, such as 5,p,5")
    return tokens


def _token(word: str) -> tuple[str, float]:
    """(kind, value), the kind empty where the word is no token."""
    if re.fullmatch(r"[0-9]{1,5}", word) and int(word) > 0:
        return EPOCH, int(word)
    kind, number = LETTERS.get(word[:1], ""), word[1:]
    if kind not in BELOW:
        return ("" if number else kind), 0.0
    numeric = re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", number)
    return (kind, float(number)) if numeric and 0 < float(number) < BELOW[kind] else ("", 0.0)
