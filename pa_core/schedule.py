"""A schedule such as ``5,p,9,p,4``: numbers are epochs of training, ``p`` is a proxy step and takes no epoch."""

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


def epochs(text: str) -> int:
    """Number of training epochs: ``epochs("5,p,9") == 14``."""
    return sum(int(token) for token in parse(text) if token != PROXY)


def steps(text: str) -> int:
    """Number of proxy steps: ``steps("5,p,9") == 1``."""
    return parse(text).count(PROXY)


def stages(text: str) -> tuple[tuple[int, bool], ...]:
    """One pair per epoch: (index of its stage, whether a proxy step comes just before it).

    >>> stages("2,p,1")
    ((0, False), (0, False), (1, True))
    """
    result, stage, proxy = [], -1, False
    for token in parse(text):
        if token == PROXY:
            proxy = True
            continue
        stage += 1
        for _ in range(int(token)):
            result.append((stage, proxy))
            proxy = False
    return tuple(result)


def _at(tokens: list[str], i: int, why: str) -> ScheduleError:
    marked = ",".join(f"»{token}«" if j == i else token for j, token in enumerate(tokens))
    allowed = "allowed are numbers of epochs and p with commas between them, such as 5,p,5"
    return ScheduleError(f"token {i + 1} of {marked} is {why}; {allowed}")
