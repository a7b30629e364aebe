"""Values as papermill, YAML or a DataFrame hand them over -> values as an experiment keeps them: types for its fields.

Each function runs before pydantic's own coercion and raises ValueError, whose text says what the value must be.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BeforeValidator, StringConstraints

from pa_core.errors import did_you_mean
from pa_core.schedule import ScheduleError, normal

AUGMENTATIONS = ("flip", "rotate", "crop", "erase", "cutmix", "mixup")


def _text(value: Any) -> Any:
    """A folder called 101 arrives from the command line as a number."""
    plain = isinstance(value, (str, int, float, os.PathLike)) and not isinstance(value, bool)
    if not plain or not str(value).strip():
        raise ValueError("must be a text that is not empty")
    return str(value).strip()


def _schedule(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        raise ValueError("must be a text such as 5,p,5: quote it where YAML would take it apart")
    number = isinstance(value, float) and value.is_integer()
    try:
        return normal("" if value is None else str(int(value) if number else value))
    except ScheduleError as error:
        raise ValueError(str(error)) from None


def _augment(value: Any) -> str:
    names = list(value) if isinstance(value, (list, tuple)) else str("none" if value is None else value).split(",")
    names = [str(name).strip().lower() for name in names]
    if names in (["none"], []):
        return "none"
    allowed = f"must be none, or any of {', '.join(AUGMENTATIONS)} with commas between them"
    for name in names:
        if name not in AUGMENTATIONS or names.count(name) > 1:
            raise ValueError(f"{allowed}{did_you_mean(name, AUGMENTATIONS) if name not in AUGMENTATIONS else ''}")
    return ",".join(name for name in AUGMENTATIONS if name in names)


Text = Annotated[str, BeforeValidator(_text)]
Name = Annotated[str, AfterValidator(str.lower), BeforeValidator(_text)]
Pretrained = bool | Annotated[str, StringConstraints(pattern=r"(?i)\.(safetensors|pth|pt)$")]
Schedule = Annotated[str, BeforeValidator(_schedule)]
Augment = Annotated[str, BeforeValidator(_augment)]
BatchSize = Annotated[int, Ge(1)] | Literal["auto"]
Device = Annotated[str, StringConstraints(to_lower=True, pattern=r"(?i)^(auto|cpu|mps|cuda(:\d+)?)$")]
Share = Annotated[float, Gt(0), Le(1)]
Probability = Annotated[float, Ge(0), Le(1)]
