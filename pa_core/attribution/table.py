"""The one table of methods. To add one: a function in a module above, and a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pa_core.attribution import cams, captum_methods, controls, transformers
from pa_core.models import Classifier
from pa_core.params import ParameterError, nearest


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    Attributes:
        compute: where ``grid``, (A, g) -> evidence per channel and place [N, C, h, w]; otherwise Request -> raw
            map [N, S, S].
        about: one line for the README, with the source.
        cost: per image, for the README.
        grid: a class activation map that needs no more than the scoring pass has computed.
        component: the evidence's first principal component is taken instead of its sum.
        dealt: each image gets the map of another one.
        control: it does not look at the network, or not at this image.
        refuse: why it cannot explain a model, or None where it can; without it, it can explain every model.
    """

    compute: Callable[..., Tensor]
    about: str
    cost: str
    grid: bool = False
    component: bool = False
    dealt: bool = False
    control: bool = False
    refuse: Callable[[Classifier], str | None] | None = None


_PASS = "1 forward, backward to the CAM layer"
_GRADIENT = "1 forward and backward"

METHODS: dict[str, Method] = {
    "gradcam": Method(compute=cams.gradcam, grid=True, cost=_PASS, about="Grad-CAM (Selvaraju et al. 2017)"),
    "gradcam++": Method(
        compute=cams.gradcam_plus_plus, grid=True, cost=_PASS, about="Grad-CAM++ (Chattopadhay et al. 2018)"
    ),
    "hirescam": Method(compute=cams.hirescam, grid=True, cost=_PASS, about="HiResCAM (Draelos & Carin 2020)"),
    "xgradcam": Method(compute=cams.xgradcam, grid=True, cost=_PASS, about="XGrad-CAM (Fu et al. 2020)"),
    "layercam": Method(compute=cams.layercam, grid=True, cost=_PASS, about="LayerCAM (Jiang et al. 2021)"),
    "eigencam": Method(
        compute=cams.eigencam,
        grid=True,
        component=True,
        cost=_PASS,
        about="first principal component of A (Eigen-CAM, Muhammad & Yeasin 2020), its sign turned towards g * A",
    ),
    "eigengradcam": Method(
        compute=cams.hirescam,
        grid=True,
        component=True,
        cost=_PASS,
        about="first principal component of g * A (Eigen-CAM with gradients), its sign turned towards g * A",
    ),
    "scorecam": Method(
        compute=cams.scorecam, cost="1 forward per channel of the CAM layer", about="Score-CAM (Wang et al. 2020)"
    ),
    "saliency": Method(
        compute=captum_methods.saliency, cost=_GRADIENT, about="gradient by the pixels (Simonyan et al. 2014), Captum"
    ),
    "input_x_gradient": Method(
        compute=captum_methods.input_x_gradient,
        cost=_GRADIENT,
        about="pixel times gradient (Shrikumar et al. 2016), Captum",
    ),
    "integrated_gradients": Method(
        compute=captum_methods.integrated_gradients,
        cost="32 forward and backward",
        about="integrated gradients from black (Sundararajan et al. 2017), Captum",
    ),
    "smoothgrad": Method(
        compute=captum_methods.smoothgrad,
        cost="16 forward and backward",
        about="mean gradient under noise (Smilkov et al. 2017), Captum",
    ),
    "guided_backprop": Method(
        compute=captum_methods.guided_backprop,
        cost=_GRADIENT,
        about="guided backpropagation (Springenberg et al. 2015), Captum; networks of `nn.ReLU` modules",
        refuse=captum_methods.refuse_guided,
    ),
    "deconvolution": Method(
        compute=captum_methods.deconvolution,
        cost=_GRADIENT,
        about="deconvolution (Zeiler & Fergus 2014), Captum; networks of `nn.ReLU` modules",
        refuse=captum_methods.refuse_deconvolution,
    ),
    "guided_gradcam": Method(
        compute=captum_methods.guided_gradcam,
        cost="2 forward and backward",
        about="Grad-CAM times guided backpropagation (Selvaraju et al. 2017), Captum; networks of `nn.ReLU` modules",
        refuse=captum_methods.refuse_guided,
    ),
    "gradient_shap": Method(
        compute=captum_methods.gradient_shap,
        cost="16 forward and backward",
        about="expected gradients from images of one colour (Lundberg & Lee 2017), Captum",
    ),
    "deeplift": Method(
        compute=captum_methods.deeplift,
        cost="2 forward and backward",
        about="DeepLIFT against black, rescale rule (Shrikumar et al. 2017), Captum; networks whose activations are modules",
        refuse=captum_methods.refuse_deeplift,
    ),
    "occlusion": Method(
        compute=captum_methods.occlusion,
        cost="50 forward",
        about="fall of the logit under a grey square of S / 4 (Zeiler & Fergus 2014), Captum",
    ),
    "attention_rollout": Method(
        compute=transformers.attention_rollout,
        cost="1 forward",
        about="attention through the blocks (Abnar & Zuidema 2020); vision transformers",
        refuse=transformers.refuse_attention,
    ),
    "chefer": Method(
        compute=transformers.chefer,
        cost=_GRADIENT,
        about="attention times its gradient through the blocks (Chefer, Gur & Wolf 2021, ICCV); vision transformers",
        refuse=transformers.refuse_attention,
    ),
    "random": Method(compute=controls.random, control=True, cost="none", about="control: uniform noise per pixel"),
    "random_blur": Method(
        compute=controls.random_blur, control=True, cost="none", about="control: a smooth random field"
    ),
    "center": Method(compute=controls.center, control=True, cost="none", about="control: a Gaussian in the middle"),
    "rectangle": Method(
        compute=controls.rectangle,
        control=True,
        cost="none",
        about="control: rectangles of random place and shape (random erasing, Zhong et al. 2020, at the dose of the threshold)",
    ),
    "edges": Method(compute=controls.edges, control=True, cost="none", about="control: edges of the image (Sobel)"),
    "shuffled": Method(
        compute=cams.gradcam,
        grid=True,
        dealt=True,
        control=True,
        cost=_PASS,
        about="control: the Grad-CAM map of another selected image",
    ),
    "uniform": Method(
        compute=controls.uniform,
        control=True,
        cost="none",
        about="control: a blank map; a quantile masks places at random, an absolute threshold none",
    ),
}
"""All methods, by the name that the parameter ``xai`` takes."""

ALIASES = {"gradcamplusplus": "gradcam++", "gradcampp": "gradcam++"}
SMOOTH = ("none", "gaussian", "eigen", "flip")


def resolve(name: str) -> str:
    """The table's name of a method, from it or an alias; an unknown one is refused with the nearest."""
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise ParameterError(
            "xai", name, f"allowed is one of {', '.join(METHODS)}{nearest(name, [*METHODS, *ALIASES])}"
        )
    return name


def refusal(method: str, model: Classifier) -> str | None:
    """Why a method cannot explain a model, or None where it can. The model is left as found."""
    refuse = METHODS[resolve(method)].refuse
    return None if refuse is None else refuse(model)


def servable(model: Classifier) -> list[str]:
    """The methods that can explain a model, controls aside."""
    reasons = {refuse: refuse(model) for refuse in {row.refuse for row in METHODS.values()} if refuse is not None}
    return [name for name, row in METHODS.items() if not row.control and reasons.get(row.refuse) is None]


def check(method: str, *, smooth: str = "none", model: Classifier | None = None) -> None:
    """Refuse a method that does not exist, that cannot be smoothed in this way, or that cannot explain this model.

    Args:
        model: left as found; without it only what holds for every model is checked.

    Raises:
        ParameterError: naming what would work.
    """
    row = METHODS[resolve(method)]
    if smooth not in SMOOTH:
        raise ParameterError("smooth", smooth, f"allowed is one of {', '.join(SMOOTH)}{nearest(smooth, SMOOTH)}")
    if smooth == "eigen" and not row.grid:
        grids = ", ".join(name for name, other in METHODS.items() if other.grid)
        allowed = f"eigen works on the channels of a CAM; with xai = {method} allowed is none, gaussian or flip, and eigen with {grids}"
        raise ParameterError("smooth", smooth, allowed)
    reason = None if model is None else refusal(method, model)
    if reason is not None:
        raise ParameterError(
            "xai", method, f"{reason}; with {model.name} allowed is one of {', '.join(servable(model))}, or a control"
        )


def fused(method: str, smooth: str) -> bool:
    """Whether ``grids`` can make these maps, together with the logits in one pass."""
    return METHODS[resolve(method)].grid and smooth != "flip"


def markdown() -> str:
    """The table as the README shows it."""
    rows = [f"| {name} | {row.about} | {row.cost} |" for name, row in METHODS.items()]
    return "\n".join(["| xai | what it is | passes per image |", "|---|---|---|", *rows])
