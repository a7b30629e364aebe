"""The one table of methods. To add one: a function in a module above, and a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial

from torch import Tensor

from pa_core import params
from pa_core.attribution import cams, controls, transformers
from pa_core.attribution import captum_methods as pixels
from pa_core.errors import ParameterError, did_you_mean
from pa_core.models import Classifier


@dataclass(frozen=True)
class Method:
    """A row of the table. The first paragraph of the docstring of ``compute`` stands in docs/methods.md."""

    compute: Callable[..., Tensor]  # Request -> raw map [N, S, S]; where ``grid``, (A, g) -> evidence [N, C, h, w]
    cost: str = "none"  # passes per image
    _: KW_ONLY
    grid: bool = False  # a class activation map that needs no more than the scoring pass has computed
    component: bool = False  # the evidence's first principal component is taken instead of its sum
    control: bool = False  # it does not look at the network
    refuse: Callable[[Classifier], str | None] = lambda model: None  # why it cannot explain a model; None where it can


_CAM, _GRADIENT = "1 forward, backward to the CAM layer", "1 forward and backward"

METHODS: dict[str, Method] = {
    "gradcam": Method(cams.gradcam, _CAM, grid=True),
    "gradcam++": Method(cams.gradcam_plus_plus, _CAM, grid=True),
    "hirescam": Method(cams.hirescam, _CAM, grid=True),
    "xgradcam": Method(cams.xgradcam, _CAM, grid=True),
    "layercam": Method(cams.layercam, _CAM, grid=True),
    "eigencam": Method(cams.eigencam, _CAM, grid=True, component=True),
    "eigengradcam": Method(cams.eigengradcam, _CAM, grid=True, component=True),
    "scorecam": Method(cams.scorecam, "1 forward per channel of the CAM layer"),
    "saliency": Method(pixels.saliency, _GRADIENT),
    "input_x_gradient": Method(pixels.input_x_gradient, _GRADIENT),
    "integrated_gradients": Method(pixels.integrated_gradients, "32 forward and backward"),
    "smoothgrad": Method(pixels.smoothgrad, "16 forward and backward"),
    "guided_backprop": Method(pixels.guided_backprop, _GRADIENT, refuse=pixels.refuse_guided),
    "deconvolution": Method(pixels.deconvolution, _GRADIENT, refuse=partial(pixels.refuse_guided, once=True)),
    "guided_gradcam": Method(pixels.guided_gradcam, "2 forward and backward", refuse=pixels.refuse_guided),
    "gradient_shap": Method(pixels.gradient_shap, "16 forward and backward"),
    "deeplift": Method(pixels.deeplift, "2 forward and backward", refuse=pixels.refuse_deeplift),
    "occlusion": Method(pixels.occlusion, "50 forward"),
    "attention_rollout": Method(transformers.attention_rollout, "1 forward", refuse=transformers.refuse_attention),
    "chefer": Method(transformers.chefer, _GRADIENT, refuse=transformers.refuse_attention),
    "random": Method(controls.random, control=True),
    "random_blur": Method(controls.random_blur, control=True),
    "center": Method(controls.center, control=True),
    "rectangle": Method(controls.rectangle, control=True),
    "edges": Method(controls.edges, control=True),
    "uniform": Method(controls.uniform, control=True),
}  # by the name that the parameter ``xai`` takes

ALIASES = {"gradcamplusplus": "gradcam++", "gradcampp": "gradcam++"}


def resolve(name: str) -> str:
    """The table's name of a method, from it or an alias; an unknown one is refused with the nearest."""
    name = ALIASES.get(name, name)
    if name not in METHODS:
        allowed = f"must be one of {', '.join(METHODS)}{did_you_mean(name, [*METHODS, *ALIASES])}"
        raise ParameterError("xai", name, allowed)
    return name


def supported_methods(model: Classifier) -> list[str]:
    """The methods that can explain a model, controls aside."""
    reasons = {refuse: refuse(model) for refuse in {row.refuse for row in METHODS.values()}}
    return [name for name, row in METHODS.items() if not row.control and reasons[row.refuse] is None]


def check(method: str, *, smooth: str = "none", model: Classifier | None = None) -> None:
    """Refuse a method that does not exist, that cannot be smoothed in this way, or that cannot explain this model.

    The model is left as found; without it only what holds for every model is checked. ParameterError names what works.
    """
    row = METHODS[resolve(method)]
    if params.Experiment(smooth=smooth).smooth == "eigen" and not row.grid:
        grids = ", ".join(name for name, other in METHODS.items() if other.grid)
        allowed = f"must be none, gaussian or flip with xai={method}; eigen takes the channels of a CAM: {grids}"
        raise ParameterError("smooth", smooth, allowed)
    if model is not None and (reason := row.refuse(model)) is not None:
        allowed = f"must be one of {', '.join(supported_methods(model))}, or a control, with {model.name}: {reason}"
        raise ParameterError("xai", method, allowed)


def fused(method: str, smooth: str) -> bool:
    """Whether ``grids`` can make these maps, together with the logits in one pass."""
    return METHODS[resolve(method)].grid and smooth != "flip"


def markdown() -> str:
    """docs/methods.md: a heading, a paragraph and the table, from the first paragraphs of the methods' docstrings."""
    aliases = ", ".join(f"`{alias}` for `{name}`" for alias, name in ALIASES.items())
    about = (
        "# Explanation methods\n\nThe values of the parameter `xai`. `A` are the activations of the model's CAM layer, "
        "`g` the gradient of the explained logit by them; a CAM is the sum of the given evidence over the channels k, "
        "cut off at 0. A method that cannot explain a model is refused before any training, with a list of those that "
        f"can. Controls do not look at the network. Aliases: {aliases}. "
        "This page is written by `python -m pa_core.attribution`."
    )
    rows = [about, "", "| xai | what it is | passes per image |", "|---|---|---|"]
    for name, row in METHODS.items():
        text = " ".join((row.compute.__doc__ or "").split("\n\n")[0].split()).rstrip(".").replace("|", r"\|")
        rows.append(f"| {name} | {'control: ' * row.control}{text} | {row.cost} |".replace("``", "`"))
    return "\n".join([*rows, ""])
