"""Parameters of an experiment: one frozen, flat pydantic model, the same names everywhere.

Each is described here alone: parameters cells, docs/parameters.md and ``papermill --help-notebook`` follow from it.
What cannot be known without torch (dataset, model, explanation method, CUDA) is checked where it is known, before any
training.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import symtable
from collections import namedtuple
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from pa_core.errors import ParameterError, did_you_mean
from pa_core.schedule import EPOCH, PROXY, normal, parse, steps

SCHEMA = 2
"""Incremented when the same parameters would give another result; CHANGELOG.md says what each one changed."""
_MAPS = "xai xai_target cam_layer smooth permute_maps"
_MASKS = "mask_region threshold_mode threshold max_share weight feather proxy_probability"
PROXY_PARAMETERS = frozenset(f"{_MAPS} {_MASKS} select fraction keep_proxies fill overlay copies".split())
"""Parameters of maps and proxies: without a proxy step they have no effect."""
AUGMENTATIONS = ("flip", "rotate", "crop", "erase", "cutmix", "mixup")


def derived_seed(seed: int, *labels: Any) -> int:
    """A seed in [0, 2**63) for one purpose, e.g. ``derived_seed(seed, "order", epoch)``.

    Such streams are independent of each other and of how often any was drawn from: an arm with proxy steps sees the
    same order and augmentation as one without, and a resumed run the same as a whole one.
    """
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *labels]).encode()).digest()[:8], "big") >> 1


def _augment(value: Any) -> str:
    """``crop, flip`` or a list -> ``flip,crop``."""
    names = value if isinstance(value, (list, tuple)) else str(value).split(",")
    names = [str(name).strip().lower() for name in names]
    for name in names if names != ["none"] else []:
        if name not in AUGMENTATIONS or names.count(name) > 1:
            allowed = f"must be none, or any of {', '.join(AUGMENTATIONS)} with commas between them"
            raise ValueError(allowed + did_you_mean(name, AUGMENTATIONS))
    return ",".join(name for name in AUGMENTATIONS if name in names) or "none"


Name = Annotated[str, StringConstraints(to_lower=True)]
Pretrained = bool | Annotated[str, StringConstraints(pattern=r"(?i)\.(safetensors|pth|pt)$")]
Device = Annotated[str, StringConstraints(to_lower=True, pattern=r"(?i)^(auto|cpu|mps|cuda(:\d+)?)$")]
Share = Annotated[float, Gt(0), Le(1)]
Probability = Annotated[float, Ge(0), Le(1)]


def _p(default: Any, description: str) -> Any:
    return Field(default, description=description)


class Experiment(BaseModel):
    """Everything that decides a run; frozen and flat. ParameterError where a value is not allowed."""

    model_config = {"frozen": True, "extra": "forbid", "allow_inf_nan": False}
    # a folder called 101 arrives from the command line as a number
    model_config |= {"coerce_numbers_to_str": True, "str_strip_whitespace": True, "str_min_length": 1}

    # data
    dataset: str = _p("fashion_mini", "a name from pa_core.data.names(), or folder")
    data_dir: str | None = _p(None, "the folder of your images, or of a torchvision dataset")
    bad_images: Literal["refuse", "skip"] = _p("refuse", "what is done about image files that cannot be used")
    image_size: Annotated[int, Ge(16), Le(4096)] | None = _p(None, "pixels per side; none is the dataset's own")
    train_fraction: Share = _p(1.0, "share of the training images that is used, at least one per class")
    folds: Annotated[int, Ge(2), Le(1000)] = _p(5, "number of stratified folds, of which one is for validation")
    fold: Annotated[int, Ge(0)] = _p(0, "the fold for validation, counted from 0")
    # model
    model: str = _p("test_resnet", "any timm name")
    pretrained: Pretrained = _p(False, "true, false, or a weights file (.safetensors, .pth or .pt)")
    # explanation
    xai: Name = _p("gradcam++", "explanation method; docs/methods.md has all")
    xai_target: Literal["predicted", "label"] = _p("predicted", "which class is explained")
    cam_layer: str | None = _p(None, "a module's dotted name: CAMs use its output; none is the model's own")
    smooth: Literal["none", "gaussian", "eigen", "flip"] = _p("none", "how maps are smoothed")
    permute_maps: bool = _p(False, "each image gets the map of another one: the control for where is masked")
    # schedule and selection
    schedule: Annotated[str, StringConstraints(min_length=0), AfterValidator(normal)] = _p(
        "5,p,5", "epochs; between them p proxy step, c forget maps, x0.3 prune, l0.1 scale lr"
    )
    select: Literal["misclassified", "loss", "margin", "entropy", "random", "easiest", "all"] = _p(
        "loss", "how the training images that get a map are selected"
    )
    fraction: Share = _p(0.2, "share of the training images that is selected")
    keep_proxies: Literal["last", "all"] = _p("last", "the proxy steps whose maps are used")
    # masks
    mask_region: Literal["salient", "rest"] = _p("salient", "which pixels are masked")
    threshold_mode: Literal["absolute", "quantile", "deviations"] = _p(
        "quantile", "what threshold is: a map value, a quantile, or standard deviations above the mean"
    )
    threshold: Annotated[float, Ge(0), Le(10)] = _p(0.75, "quantile 0.75 masks exactly a quarter of each image")
    max_share: Share = _p(1.0, "at most this share of an image is masked, the highest values first")
    fill: Literal["zero", "one", "mean", "max", "min", "half_max", "noise", "blur", "patch", "blend", "none"] = _p(
        "mean", "what masked pixels become; pa_core.masking.apply explains each"
    )
    weight: Probability = _p(1.0, "weight of the fill; 0 changes nothing")
    feather: Annotated[int, Ge(0), Le(4096)] = _p(0, "pixels over which the fill fades in from the mask's edge")
    overlay: Literal["replace", "append", "withhold"] = _p(
        "replace", "proxies replace their originals or are appended, or the originals are left out of the loss"
    )
    copies: Annotated[int, Ge(1), Le(1000)] = _p(1, "how many times each proxy is appended")
    proxy_probability: Probability = _p(1.0, "probability that a proxy is masked when a batch draws it")
    # training
    protocol: Literal["clean", "thesis", "thesis_text"] = _p("clean", "thesis and thesis_text replay the predecessor")
    augment: Annotated[str, BeforeValidator(_augment)] = _p(
        "flip,crop", "none, or any of flip, rotate, crop, erase, cutmix, mixup"
    )
    erase_region: Literal["anywhere", "attended", "spared"] = _p(
        "anywhere", "where erase places its rectangle: anywhere, where the map is high, or where it is low"
    )
    erase_probability: Probability = _p(0.5, "probability that erase changes an image")
    mix_labels: Literal["area", "attention"] = _p("area", "what sets the two labels' shares in a cutmix image")
    mix_probability: Probability = _p(0.5, "probability that cutmix or mixup changes an image")
    cutmix_alpha: Annotated[float, Gt(0), Le(1000)] = _p(1.0, "cutmix draws its share from Beta(alpha, alpha)")
    optimizer: Literal["adamw", "sgd"] = _p("adamw", "sgd has Nesterov momentum 0.9")
    lr: Annotated[float, Gt(0)] = _p(1e-3, "highest learning rate")
    weight_decay: Annotated[float, Ge(0)] = _p(1e-2, "decoupled with adamw")
    scheduler: Literal["onecycle", "cosine", "constant"] = _p("onecycle", "learning rate over the whole run")
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = _p(0.0, "share of the label that is spread over all classes")
    batch_size: Annotated[int, Ge(1)] | Literal["auto"] = _p(64, "a whole number of at least 1, or auto")
    # machine
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _p("auto", "auto is bf16 or fp16 on CUDA, fp32 elsewhere")
    tf32: bool = _p(False, "float32 products in TF32, on CUDA")
    deterministic: bool = _p(False, "only deterministic operations: the same result again on CUDA")
    device: Device = _p("auto", "auto, cpu, cuda, cuda:N or mps")
    compile: bool = _p(False, "torch.compile the training step")
    seed: Annotated[int, Ge(0), Lt(2**63)] = _p(0, "seeds split, initialisation, order, augmentation and masks")
    runs_dir: str = _p("runs", "where runs are kept; runs is the repository's folder, or $PA_RUNS")

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(error) from None
        for name, allowed in _contradictions(self):
            raise ParameterError(name, getattr(self, name), allowed)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: Any) -> Any:
        """A value as papermill, YAML or a DataFrame hands it over, in the form that the field's type reads."""
        value = value.item() if hasattr(value, "item") else value  # numpy scalars
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        kind, text = cls.model_fields[info.field_name].annotation, str(value).strip().lower()
        members = get_args(kind) or (kind,)
        if isinstance(value, bool) and {int, float} & {(get_args(m) or [m])[0] for m in members}:
            raise ValueError  # pydantic would read True as 1
        if type(None) in members:
            return None if text == "none" else value
        return text if get_origin(kind) is Literal or text == "auto" else value

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Experiment:
        """An experiment from names and values."""
        return cls(**{str(name): value for name, value in values.items()})

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any], *, also: Iterable[str] = ()) -> Experiment:
        """An experiment from a notebook's variables, ``globals()``; ``also`` names the notebook's own parameters."""
        refuse_unknown(namespace, [*cls.model_fields, *also])
        return cls(**{name: namespace[name] for name in cls.model_fields if name in namespace})

    def replace(self, **changes: Any) -> Experiment:
        """A copy with other values, checked."""
        return type(self)(**{**self.to_dict(), **changes})

    def plain(self) -> Experiment:
        """The plain run of equal length: the same number of epochs, and no event between them."""
        return self.replace(schedule=str(self.length), erase_region="anywhere", mix_labels="area")

    @property
    def length(self) -> int:
        """Training epochs of the schedule; under the predecessor's protocol ``p`` is one, too."""
        events = parse(self.schedule, p_trains=self.protocol != "clean")
        return sum(event.kind == EPOCH for event in events)

    @property
    def keeps_all_proxies(self) -> bool:
        """Whether the maps of every proxy step are used, not only the last one's; the predecessor keeps all."""
        return self.keep_proxies == "all" or self.protocol != "clean"

    @property
    def augmentations(self) -> frozenset[str]:
        return frozenset(self.augment.split(",")) - {"none"}

    @property
    def explains(self) -> bool:
        """Whether proxy steps make maps; if not, they only select images."""
        uses_maps = self.masks or self.erase_region != "anywhere" or self.mix_labels == "attention"
        return uses_maps and steps(self.schedule) > 0

    @property
    def masks(self) -> bool:
        """Whether proxies are masked; with ``fill none`` or ``overlay withhold`` they equal their originals."""
        return self.fill != "none" and (self.overlay != "withhold" or self.protocol != "clean")

    @property
    def explained(self) -> str:
        """The class that is explained: ``label`` (which mixing by attention needs) or ``predicted``."""
        return "label" if self.mix_labels == "attention" else self.xai_target

    def changed(self) -> dict[str, Any]:
        """The parameters that differ from their defaults."""
        return {k: v for k, v in self.to_dict().items() if v != Experiment.model_fields[k].default}

    def effective(self) -> dict[str, Any]:
        """The parameters that differ from their defaults and have an effect on the result."""
        count, clean = steps(self.schedule), self.protocol == "clean"
        rules = [
            # places, and what the data digest, the resolved image size and the weights file's digest stand for
            (True, "data_dir device runs_dir bad_images image_size"),
            (isinstance(self.pretrained, str), "pretrained"),
            (not count, " ".join(PROXY_PARAMETERS)),
            (count == 1, "keep_proxies"),
            (not clean, "select overlay copies keep_proxies"),  # the protocol sets them
            (clean and self.select == "all", "fraction"),
            (clean and self.overlay != "append", "copies"),
            (clean and self.overlay == "withhold", "fill"),
            (not self.masks, _MASKS),
            (not self.explains, _MAPS),
            (self.mix_labels == "attention", "xai_target"),
            ("erase" not in self.augmentations, "erase_region erase_probability"),
            ("cutmix" not in self.augmentations, "mix_labels cutmix_alpha"),
            (not self.augmentations & {"cutmix", "mixup"}, "mix_probability"),
        ]
        unused = {name for applies, names in rules if applies for name in names.split()}
        return {name: value for name, value in self.changed().items() if name not in unused}

    def digest(self, *, data: str, image_size: int, weights: str = "") -> str:
        """The run's identity, SHA-256 (hex); ``weights`` is the digest of the file that ``pretrained`` names."""
        content = {"schema": SCHEMA, "parameters": self.effective(), "data": data, "image_size": image_size}
        text = json.dumps(content | {"weights": weights}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def command(self, notebook: str) -> str:
        """The papermill command that runs a notebook with these parameters."""
        options = [f"-p {name} {shlex.quote(str(value))}" for name, value in self.changed().items()]
        return " ".join([f"papermill notebooks/{notebook}.ipynb {notebook}.out.ipynb", *options])

    def to_dict(self) -> dict[str, Any]:
        """Names and values, as they go into the manifest and a params file."""
        return self.model_dump()


def _contradictions(e: Experiment) -> Iterator[tuple[str, str]]:
    """(name, what it must be) of values that are allowed alone and not together."""
    clean, has_steps = e.protocol == "clean", steps(e.schedule) > 0
    kinds = [event.kind for event in parse(e.schedule, p_trains=not clean)]
    if e.fold >= e.folds:
        yield "fold", f"must be 0 to {e.folds - 1} for folds={e.folds}"
    if PROXY in kinds[: kinds.index(EPOCH)] and e.pretrained is False:
        yield "schedule", "must begin with epochs, or have pretrained weights: an untrained network has learnt nothing"
    if not clean and set(kinds) - {EPOCH, PROXY}:
        yield "schedule", f"must hold epochs and p alone with protocol={e.protocol!r}"
    if e.threshold > 1 and e.threshold_mode != "deviations":
        yield "threshold", f"must be a number from 0 to 1 with threshold_mode={e.threshold_mode!r}"
    everything = e.select == "all" or (e.fraction == 1 and e.select != "misclassified")
    if clean and has_steps and e.overlay == "withhold" and everything:
        yield "overlay", "must be replace or append where all images are selected, or none is left to train on"
    for name, neutral, needed in (("erase_region", "anywhere", "erase"), ("mix_labels", "area", "cutmix")):
        if getattr(e, name) != neutral and (needed not in e.augmentations or not has_steps):
            yield name, f"must be {neutral}, or have maps: augment with {needed} and a schedule with p"


Parameter = namedtuple("Parameter", "name default description allowed choices")
"""One parameter as the documentation and the notebooks show it; ``allowed`` is empty where the description says it."""


def _allowed(field: dict[str, Any]) -> str:
    """A field of the JSON schema -> ``a number above 0, at most 1``."""
    if "enum" in field:
        return f"one of {', '.join(field['enum'])}"
    field, *others = field.get("anyOf", [field])
    word = {"boolean": "true or false", "integer": "a whole number", "number": "a number"}.get(field["type"], "")
    if not word or others not in ([], [{"type": "null"}]):
        return ""
    bounds = {"exclusiveMinimum": "above", "minimum": "of at least", "exclusiveMaximum": "below", "maximum": "at most"}
    limits = ", ".join(f"{bounds[key]} {field[key]}" for key in bounds if key in field)
    return f"{word} {limits}".strip() + ", or none" * len(others)


PARAMETERS: dict[str, Parameter] = {
    name: Parameter(name, field["default"], field["description"], _allowed(field), tuple(field.get("enum", ())))
    for name, field in Experiment.model_json_schema()["properties"].items()
}
"""All parameters, in the order in which they are shown."""
FILLS = PARAMETERS["fill"].choices


def _refusal(error: ValidationError) -> ParameterError:
    """The first thing that pydantic found, in one sentence."""
    first = error.errors()[0]
    name, value, reason = str(first["loc"][0]), first["input"], str(first.get("ctx", {}).get("error", ""))
    if name not in PARAMETERS:
        return _unknown(name, value, PARAMETERS)
    known = PARAMETERS[name]
    if first["type"] in ("string_type", "string_too_short"):
        reason = "must be a text that is not empty: quote it where YAML would take it apart"
    allowed = reason or f"must be {known.allowed or known.description}"
    return ParameterError(name, value, allowed + did_you_mean(value, known.choices))


def _unknown(name: str, value: Any, known: Iterable[str]) -> ParameterError:
    allowed = f"must be a parameter's name{did_you_mean(name, known)}; docs/parameters.md lists them"
    return ParameterError(name, value, allowed)


def markdown() -> str:
    """The table of docs/parameters.md."""
    rows = [
        f"| {p.name} | {'none' if p.default is None else p.default} | {p.description} | {p.allowed} |"
        for p in PARAMETERS.values()
    ]
    return "\n".join(["| name | default | meaning | must be |", "|---|---|---|---|", *rows])


def refuse_unknown(namespace: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse a name that a notebook's parameter cells assign and that is not known: papermill would only warn.

    They begin with ``# Parameters``. papermill puts its own one, of just that line and assignments, after the
    notebook's: then the one before counts too.
    """
    names = list(known)
    cells = [source.lstrip() for source in namespace.get("In", []) if source.lstrip().startswith("# Parameters")]
    injected = bool(cells) and re.match(r"# Parameters\s*\n", cells[-1])
    for source in cells[-2:] if injected else cells[-1:]:
        for symbol in symtable.symtable(source, "parameters", "exec").get_symbols():
            name = symbol.get_name()
            if symbol.is_assigned() and name not in names:
                raise _unknown(name, namespace.get(name), names)
