"""A schedule such as ``5,p,9,x0.3,4`` as a flat list of events.

Numbers are epochs of training. Between them stand events that take no epoch: ``p`` proxy step; ``c`` forget all maps;
``x0.3`` prune this share of the weights that are left; ``l0.1`` multiply the learning rate from here on.

The predecessor's protocol is the exception: there ``p`` trains for an epoch, too, and makes its proxies at its end
(``p_trains``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

EPOCH, PROXY, CLEAR, PRUNE, LR = "epoch", "proxy", "clear", "prune", "lr"
LETTERS = {"p": PROXY, "c": CLEAR, "x": PRUNE, "l": LR}
"""What a token other than a number begins with. To add an event: a letter here, a function in `experiment`."""
BELOW = {PRUNE: 1.0, LR: 1e6}
"""Events that take a number, which must be above 0 and below this."""
TOKENS = "numbers of epochs (1 to 99999), p, c, x0.3 and l0.1 with commas between them, such as 5,p,5"


class ScheduleError(ValueError):
    """The schedule is refused; the message points at the bad token."""


@dataclass(frozen=True)
class Event:
    """One epoch, or one event between epochs.

    Attributes:
        kind: epoch, proxy, clear, prune or lr.
        value: the share of ``prune``, the factor of ``lr``; else 0.
        stage: index of the stage (the epochs of one number, counted from 0) that the event is in, or comes after.
    """

    kind: str
    value: float = 0.0
    stage: int = 0


def parse(text: str, *, p_trains: bool = False) -> tuple[Event, ...]:
    """``"2,p,1"`` -> epoch, epoch, proxy, epoch.

    Raises:
        ScheduleError: a token is unknown or out of its range, or stands where it would have no effect.
    """
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
    return ",".join(f"{letters.get(kind, '')}{number}" for kind, number in numbers)


def epochs(text: str, *, p_trains: bool = False) -> int:
    """Number of training epochs: ``epochs("5,p,9") == 14``, and 15 where ``p`` trains."""
    return sum(event.kind == EPOCH for event in parse(text, p_trains=p_trains))


def steps(text: str) -> int:
    """Number of proxy steps: ``steps("5,p,9") == 1``."""
    return sum(kind == PROXY for kind, _ in _tokens(text))


def _tokens(text: str) -> list[tuple[str, float]]:
    """(kind, value) of each token, checked."""
    words = [word.strip().lower() for word in text.split(",")]
    if words == [""]:
        raise ScheduleError(f"must not be empty: {TOKENS}")
    tokens: list[tuple[str, float]] = []
    for i, word in enumerate(words):
        kind, value = _token(word)
        before = [known for known, _ in tokens]
        after = [following for following in words[i + 1 :] if following.isdigit()]
        if not kind:
            raise _at(words, i, f"must be one of {TOKENS}")
        if kind not in (EPOCH, PRUNE) and not after:
            raise _at(words, i, "must have an epoch after it, or it has no effect")
        if kind == PROXY and before[-1:] == [PROXY]:
            raise _at(words, i, "must not be a proxy step right after another")
        if kind == CLEAR and PROXY not in before:
            raise _at(words, i, "must have a proxy step before it, or there are no maps to forget")
        if kind == CLEAR and EPOCH not in before[::-1][: before[::-1].index(PROXY)]:
            raise _at(words, i, "must have an epoch between it and the proxy step, or that one has no effect")
        tokens.append((kind, value))
    if EPOCH not in [kind for kind, _ in tokens]:
        raise ScheduleError("must have at least one epoch of training, such as 5,p,5")
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


def _at(words: list[str], i: int, allowed: str) -> ScheduleError:
    marked = ",".join(f"[{word}]" if j == i else word for j, word in enumerate(words))
    return ScheduleError(f"token {i + 1} of {marked} {allowed}")
