"""A schedule such as ``5,p,9,p,4``: numbers are epochs of training, ``p`` is a proxy step and takes no epoch.

The predecessor's protocol is the exception: there ``p`` trains for an epoch, too, and makes its proxies at its end (``p_trains``).
"""

from __future__ import annotations

PROXY = "p"


class ScheduleError(ValueError):
    """The schedule is refused; the message points at the bad token."""


def parse(text: str) -> tuple[str, ...]:
    """``"5,p,9"`` -> ``("5", "p", "9")``.

    Raises:
        ScheduleError: a token is neither a whole number from 1 to 99999 nor ``p``, a ``p`` has no epoch after
            it or another ``p`` before it, or there is nothing at all.
    """
    tokens = [token.strip().lower() for token in text.split(",")]
    if tokens == [""]:
        raise ScheduleError("it is empty; allowed are numbers of epochs and p with commas between them, such as 5,p,5")
    for i, token in enumerate(tokens):
        # isascii, because "²".isdigit() holds and int("²") fails
        if token != PROXY and not (token.isascii() and token.isdigit() and 0 < int(token) < 100_000):
            raise _at(tokens, i, "neither a number (1 to 99999) nor p")
        if token == PROXY and i == len(tokens) - 1:
            raise _at(tokens, i, "a proxy step with no epoch after it: its proxies would not be trained on")
        if token == PROXY and i > 0 and tokens[i - 1] == PROXY:
            raise _at(tokens, i, "a proxy step right after another")
    return tuple(token if token == PROXY else str(int(token)) for token in tokens)


def epochs(text: str, *, p_trains: bool = False) -> int:
    """Number of training epochs: ``epochs("5,p,9") == 14``, and 15 where ``p`` trains."""
    return sum(p_trains if token == PROXY else int(token) for token in parse(text))


def steps(text: str) -> int:
    """Number of proxy steps: ``steps("5,p,9") == 1``."""
    return parse(text).count(PROXY)


def stages(text: str, *, p_trains: bool = False) -> tuple[tuple[int, bool], ...]:
    """One pair per epoch: (index of its stage, whether a proxy step comes just before it).

    Where ``p`` trains, it is a stage of one epoch, and its proxy step comes before the next stage.

    >>> stages("2,p,1")
    ((0, False), (0, False), (1, True))
    >>> stages("2,p,1", p_trains=True)
    ((0, False), (0, False), (1, False), (2, True))
    """
    result, stage, proxy = [], -1, False
    for token in parse(text):
        if token != PROXY or p_trains:
            stage += 1
            for _ in range(1 if token == PROXY else int(token)):
                result.append((stage, proxy))
                proxy = False
        proxy = token == PROXY
    return tuple(result)


def _at(tokens: list[str], i: int, why: str) -> ScheduleError:
    marked = ",".join(f"»{token}«" if j == i else token for j, token in enumerate(tokens))
    allowed = "allowed are numbers of epochs and p with commas between them, such as 5,p,5"
    return ScheduleError(f"token {i + 1} of {marked} is {why}; {allowed}")
