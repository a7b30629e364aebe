"""What a user gets to read when something is refused or a run cannot be used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ParameterError(ValueError):
    """A parameter's value is refused. The message is one sentence: parameter, value, what it must be."""

    def __init__(self, name: str, value: Any, allowed: str):
        super().__init__(f"invalid {name}={value!r}: {allowed}")
        self.name, self.value, self.allowed = name, value, allowed

    def __reduce__(self) -> tuple:  # so that it can be sent between processes
        return type(self), (self.name, self.value, self.allowed)


class RunError(RuntimeError):
    """A run, or one of its files, cannot be used as asked; the message says which and why."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the known name nearest to ``name``, or an empty string."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match and match[0] != name else ""
