"""Parameters of an experiment: one frozen, flat dataclass, the same names everywhere.

Values arrive as papermill, YAML or a DataFrame hand them over (``18`` for a schedule, ``"true"`` for a
boolean, ``"1e-3"`` for a number); :class:`Experiment` coerces and checks them in this one place. What
cannot be known without loading torch (dataset, model, explanation method, CUDA) is checked by the module that
knows it, with the same :class:`ParameterError`, before any training.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pa_core.schedule import PROXY, ScheduleError, epochs, parse, steps

SCHEMA = 1
"""Raised when a parameter changes its meaning, so that old runs are not taken for new ones."""

SELECT = ("misclassified", "loss", "margin", "entropy", "random", "easiest", "all")
FILLS = ("zero", "one", "mean", "max", "min", "half_max", "noise", "blur", "patch", "blend", "none")
PROTOCOLS = ("clean", "thesis", "thesis_text")
AUGMENTATIONS = ("flip", "rotate", "crop", "erase", "cutmix", "mixup")


class ParameterError(ValueError):
    """A parameter's value is refused. The message is one sentence: parameter, value, what is allowed."""

    def __init__(self, name: str, value: Any, allowed: str):
        super().__init__(f"{name} = {value!r} is refused: {allowed}")
        self.name, self.value, self.allowed = name, value, allowed

    def __reduce__(self):  # survives a trip between processes
        return type(self), (self.name, self.value, self.allowed)


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the known name nearest to ``name``, or an empty string."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def derived_seed(seed: int, *labels: Any) -> int:
    """A seed in [0, 2**63) for one purpose, e.g. ``derived_seed(seed, "order", epoch)``.

    Streams derived in this way are independent of each other and of how often any was drawn from, so that
    an arm with proxy steps sees the same order and augmentation as one without, and a resumed run the same as a whole one.
    """
    text = json.dumps([seed, *labels])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def home() -> Path:
    """The repository's root when pa_core is used from a checkout, else the working directory."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else Path.cwd()


def shown(path: Path) -> str:
    """A path as it is printed: within the repository from its root, so that a notebook names nobody's home folder."""
    return path.relative_to(home()).as_posix() if path.is_relative_to(home()) else str(path)


def data_home() -> Path:
    """Where downloads and image caches live: ``$PA_DATA``, else ``data/``; a relative one in the repository."""
    return home() / Path(os.environ.get("PA_DATA") or "data").expanduser()


def runs_home(runs_dir: str = "runs") -> Path:
    """The folder that holds the runs. The default ``"runs"`` is ``$PA_RUNS``, else ``runs/``, a relative one in the
    repository, whatever the working directory; any other relative path is taken from the working directory.
    """
    if runs_dir == "runs":
        return home() / Path(os.environ.get("PA_RUNS") or "runs").expanduser()
    return Path(runs_dir).expanduser().absolute()


# Coercions: a value as it arrives -> the value as it is kept. Each raises ValueError, whose text says what is allowed.


def _integer(low: int, high: int | None = None) -> Callable[[Any], int]:
    allowed = (
        f"allowed is a whole number of at least {low}"
        if high is None
        else f"allowed is a whole number from {low} to {high}"
    )

    def coerce(value: Any) -> int:
        number = _number(value, allowed)
        if number != int(number) or number < low or (high is not None and number > high):
            raise ValueError(allowed)
        return int(number)

    return coerce


def _real(allowed: str, inside: Callable[[float], bool]) -> Callable[[Any], float]:
    def coerce(value: Any) -> float:
        number = _number(value, allowed)
        if not inside(number) or number > 1e300:
            raise ValueError(allowed)
        return float(number)

    return coerce


def _number(value: Any, allowed: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(allowed)
    try:
        number = int(value) if isinstance(value, int) else float(value)
    except ValueError:
        raise ValueError(allowed) from None
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(allowed)
    return number


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).strip().lower() in ("true", "false"):
        return str(value).strip().lower() == "true"
    raise ValueError("allowed is true or false")


def _choice(*allowed: str) -> Callable[[Any], str]:
    one_of = f"one of {', '.join(allowed)}"

    def coerce(value: Any) -> str:
        text = _text(value).strip().lower()
        if text not in allowed:
            raise ValueError(f"allowed is {one_of}{nearest(text, allowed)}")
        return text

    return coerce


def _text(value: Any) -> str:
    # A folder called 101 arrives from the command line as a number; "none" is a value of several choices.
    if isinstance(value, bool) or not isinstance(value, (str, int, float, os.PathLike)) or str(value).strip() == "":
        if value is None:
            return "none"
        raise ValueError("allowed is a text that is not empty")
    return str(value)


def _optional(coerce: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrapped(value: Any) -> Any:
        return None if value is None or str(value).strip().lower() == "none" else coerce(value)

    return wrapped


def _or_auto(coerce: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrapped(value: Any) -> Any:
        if isinstance(value, str) and value.strip().lower() == "auto":
            return "auto"
        try:
            return coerce(value)
        except ValueError as error:
            raise ValueError(f"{error}, or auto") from None

    return wrapped


def _pretrained(value: Any) -> bool | str:
    try:
        return _boolean(value)
    except ValueError:
        if isinstance(value, (str, os.PathLike)) and Path(value).suffix.lower() in (".safetensors", ".pth", ".pt"):
            return str(value)
    raise ValueError("allowed is true, false, or the path of a weights file (.safetensors, .pth or .pt)")


def _schedule(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        raise ValueError("allowed is a text such as 5,p,5: quote it where YAML would take it apart")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        return ",".join(parse("" if value is None else str(value)))
    except ScheduleError as error:
        raise ValueError(str(error)) from None


def _augment(value: Any) -> str:
    names = [str(v) for v in value] if isinstance(value, (list, tuple)) else _text(value).split(",")
    names = [name.strip().lower() for name in names]
    if names == ["none"]:
        return "none"
    allowed = f"allowed is none, or any of {', '.join(AUGMENTATIONS)} with commas between them"
    for name in names:
        if name not in AUGMENTATIONS:
            raise ValueError(f"{name or 'an empty name'} is unknown; {allowed}{nearest(name, AUGMENTATIONS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"a name stands twice; {allowed}")
    return ",".join(name for name in AUGMENTATIONS if name in names)


def _device(value: Any) -> str:
    text = _text(value).strip().lower()
    kind, colon, number = text.partition(":")
    if text in ("auto", "cpu", "cuda", "mps") or (kind == "cuda" and colon and number.isdigit()):
        return text
    raise ValueError("allowed is one of auto, cpu, cuda, cuda:N, mps")


COERCE: dict[str, Callable[[Any], Any]] = {
    "dataset": _text,
    "data_dir": _optional(_text),
    "bad_images": _choice("refuse", "skip"),
    "image_size": _optional(_integer(16, 4096)),
    "train_fraction": _real("allowed is a number above 0 and up to 1", lambda x: 0 < x <= 1),
    "folds": _integer(2, 1000),
    "fold": _integer(0),
    "model": _text,
    "pretrained": _pretrained,
    "xai": lambda value: _text(value).strip().lower(),
    "xai_target": _choice("predicted", "label"),
    "cam_layer": _optional(_text),
    "smooth": _choice("none", "gaussian", "eigen", "flip"),
    "schedule": _schedule,
    "select": _choice(*SELECT),
    "fraction": _real("allowed is a number above 0 and up to 1", lambda x: 0 < x <= 1),
    "mask_region": _choice("salient", "rest"),
    "threshold_mode": _choice("absolute", "quantile"),
    "threshold": _real("allowed is a number from 0 to 1", lambda x: 0 <= x <= 1),
    "max_share": _real("allowed is a number above 0 and up to 1", lambda x: 0 < x <= 1),
    "fill": _choice(*FILLS),
    "weight": _real("allowed is a number from 0 to 1", lambda x: 0 <= x <= 1),
    "feather": _integer(0, 4096),
    "overlay": _choice("replace", "append"),
    "keep_proxies": _choice("last", "all"),
    "protocol": _choice(*PROTOCOLS),
    "augment": _augment,
    "optimizer": _choice("adamw", "sgd"),
    "lr": _real("allowed is a number above 0", lambda x: x > 0),
    "weight_decay": _real("allowed is a number of at least 0", lambda x: x >= 0),
    "scheduler": _choice("onecycle", "cosine", "constant"),
    "label_smoothing": _real("allowed is a number from 0 to below 1", lambda x: 0 <= x < 1),
    "batch_size": _or_auto(_integer(1)),
    "precision": _choice("auto", "fp32", "bf16", "fp16"),
    "device": _device,
    "compile": _boolean,
    "tf32": _boolean,
    "store": _choice("auto", "device", "mapped"),
    "seed": _integer(0, 2**63 - 1),
    "runs_dir": _text,
}

_PROXY_ONLY = frozenset(
    "xai xai_target cam_layer smooth select fraction mask_region threshold_mode threshold max_share fill weight feather "
    "overlay keep_proxies".split()
)
# Neither places nor what the data digest and the resolved image size, which enter the identity, say already
_ELSEWHERE = frozenset("data_dir device store runs_dir bad_images image_size".split())


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides a run. See the README's parameter table for what each name means.

    Raises:
        ParameterError: a value is not allowed.
    """

    dataset: str = "fashion_mini"
    data_dir: str | None = None
    bad_images: str = "refuse"
    image_size: int | None = None
    train_fraction: float = 1.0
    folds: int = 5
    fold: int = 0
    model: str = "test_resnet"
    pretrained: bool | str = False
    xai: str = "gradcam++"
    xai_target: str = "predicted"
    cam_layer: str | None = None
    smooth: str = "none"
    schedule: str = "5,p,5"
    select: str = "loss"
    fraction: float = 0.2
    mask_region: str = "salient"
    threshold_mode: str = "quantile"
    threshold: float = 0.75
    max_share: float = 1.0
    fill: str = "mean"
    weight: float = 1.0
    feather: int = 0
    overlay: str = "replace"
    keep_proxies: str = "last"
    protocol: str = "clean"
    augment: str = "flip,crop"
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-2
    scheduler: str = "onecycle"
    label_smoothing: float = 0.0
    batch_size: int | str = 64
    precision: str = "auto"
    device: str = "auto"
    compile: bool = False
    tf32: bool = False
    store: str = "auto"
    seed: int = 0
    runs_dir: str = "runs"

    def __post_init__(self) -> None:
        for name, coerce in COERCE.items():
            value = getattr(self, name)
            value = value.item() if hasattr(value, "item") else value  # numpy scalars, from a DataFrame
            try:
                object.__setattr__(self, name, coerce(value))
            except ValueError as error:
                raise ParameterError(name, value, str(error)) from None
        if parse(self.schedule)[0] == PROXY and self.pretrained is False:
            allowed = (
                "a schedule that begins with p needs pretrained weights, an untrained network has learnt nothing yet"
            )
            raise ParameterError("schedule", self.schedule, allowed)
        if self.fold >= self.folds:
            raise ParameterError("fold", self.fold, f"allowed is 0 to {self.folds - 1}, for folds = {self.folds}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Experiment:
        """An experiment from names and values; a name that is no parameter is refused with the nearest one."""
        for name in values:
            if name not in COERCE:
                raise ParameterError(
                    str(name),
                    values[name],
                    f"there is no such parameter{nearest(name, COERCE)}; see the parameter table",
                )
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike) -> Experiment:
        """An experiment from a YAML file of names and values."""
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise ParameterError(
                "params file", str(path), f"it cannot be read ({reason}); allowed is a YAML file"
            ) from error
        if not isinstance(values, dict):
            raise ParameterError("params file", str(path), "allowed is a file of lines such as 'lr: 1e-3'")
        return cls.from_mapping(values)

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any], *, also: Iterable[str] = ()) -> Experiment:
        """An experiment from a notebook's variables: ``Experiment.from_notebook(globals())``.

        papermill only warns about a parameter that a notebook does not have, so the names that the
        parameter cells assigned are compared with the parameters here; ``also`` names the notebook's own extra ones.
        """
        refuse_unknown(namespace, [*COERCE, *also])
        return cls(**{name: namespace[name] for name in COERCE if name in namespace})

    def plain(self) -> Experiment:
        """The plain run of equal length: the same number of epochs, no proxy step."""
        return replace(self, schedule=str(self.length))

    @property
    def length(self) -> int:
        """Training epochs of the schedule; under the predecessor's protocol ``p`` is one, too."""
        return epochs(self.schedule, p_trains=self.protocol != "clean")

    @property
    def keeps_all_proxies(self) -> bool:
        """Whether the proxies of every step stay; the predecessor's do."""
        return self.keep_proxies == "all" or self.protocol != "clean"

    def effective(self) -> dict[str, Any]:
        """The parameters that have an effect and differ from their defaults.

        Paths and devices have none on the result; without a proxy step neither has anything that shapes proxies.
        """
        unused = set(_ELSEWHERE)
        if not steps(self.schedule):
            unused |= _PROXY_ONLY
        if steps(self.schedule) == 1:
            unused.add("keep_proxies")
        if self.protocol != "clean":
            unused |= {"select", "overlay", "keep_proxies"}  # the protocol says what is selected, and where proxies go
        elif self.select == "all":
            unused.add("fraction")
        if self.fill == "none":
            unused |= {"weight", "feather", "threshold", "threshold_mode", "max_share", "mask_region"}
            unused |= {"xai", "xai_target", "cam_layer", "smooth"}
        if isinstance(self.pretrained, str):
            unused.add("pretrained")  # the file's content counts, see `digest`
        defaults = type(self)()
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in unused and getattr(self, field.name) != getattr(defaults, field.name)
        }

    def digest(self, *, data: str, image_size: int, weights: str = "") -> str:
        """The run's identity: SHA-256 (hex) of schema number, effective parameters and content.

        Args:
            data: the data digest.
            image_size: as resolved by the dataset.
            weights: digest of the weights file, when ``pretrained`` names one.
        """
        content = {
            "schema": SCHEMA,
            "parameters": self.effective(),
            "data": data,
            "image_size": image_size,
            "weights": weights,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def command(self, notebook: str) -> str:
        """The papermill command that runs a notebook with these parameters."""
        defaults = type(self)()
        options = [
            f"-p {field.name} {shlex.quote(str(getattr(self, field.name)))}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(defaults, field.name)
        ]
        return " ".join([f"papermill notebooks/{notebook}.ipynb {notebook}.out.ipynb", *options])

    def to_dict(self) -> dict[str, Any]:
        """Names and values, as they go into the manifest and a params file."""
        return asdict(self)


def refuse_unknown(namespace: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse a name that a notebook's parameter cells assign and that is not known: ``refuse_unknown(globals(), [...])``."""
    for name in _assigned(namespace.get("In", [])):
        if name not in known:
            allowed = f"there is no such parameter{nearest(name, known)}; see the parameter table"
            raise ParameterError(name, namespace.get(name), allowed)


def _assigned(history: list[str]) -> list[str]:
    """Names assigned by the last parameter cell(s) in an IPython history.

    Parameter cells begin with ``# Parameters``. papermill puts its own one, of just that line and assignments,
    after the notebook's, so then the one before counts too.
    """
    cells = [source for source in history if source.lstrip().startswith("# Parameters")]
    injected = bool(cells) and cells[-1].lstrip().splitlines()[0].strip() == "# Parameters"
    names: list[str] = []
    for source in cells[-2:] if injected else cells[-1:]:
        for node in ast.parse(source).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names
