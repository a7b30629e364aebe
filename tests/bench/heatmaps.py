"""Class activation maps per second: one forward pass, ours, the grad-cam package, Captum.

Same network, layer, batch and final output for all: a map of the predicted class per image, resized to it, in [0, 1],
on the device. ``forward`` is the reference: the logits of the same batch, without gradients. Captum has to be told the
class, which takes a forward pass of its own; ``captum, class given`` is its time without that. Without the grad-cam
package, which only the tests need, that contender is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor

from pa_core import attribution, models
from tests.bench import harness

CASES = (("resnet18", 224, 16), ("resnet50", 224, 4), ("resnet18", 64, 64))
"""Network, image size, batch on a CPU; a GPU gets sixteen times as many."""


def run(device: torch.device, rounds: int) -> list[harness.Row]:
    table = []
    for name, size, batch in CASES:
        batch = batch * 16 if device.type == "cuda" else batch
        for method in ("gradcam", "gradcam++"):
            made = contenders(name, size=size, batch=batch, method=method, device=device)
            agree(made)
            works = {who: lambda work=work: len(work()) for who, work in made.items()}
            rates = harness.interleave(works, device=device, rounds=rounds)
            title = f"{method}, {name} at {size}, batch {batch}"
            table += harness.rows(title, rates, reference="forward", device=device)
    return table


def contenders(
    name: str, *, size: int, batch: int, method: str, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """Each gives [N, size, size]; ``forward`` gives logits."""
    model = models.create(name, classes=100, image_size=size).to(device).eval()
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():  # grad-cam adds 1e-7 to a map's range, and fresh networks have small maps
        model.network.get_classifier().weight *= 1e4
    layer = model.network.layer4[-1]

    def forward() -> Tensor:
        with torch.no_grad():
            return model(images)

    def ours() -> Tensor:
        return attribution.heatmaps(model, images, method=method)

    known = forward().argmax(1)

    def captum(target: Tensor | None = None) -> Tensor:
        target = forward().argmax(1) if target is None else target
        maps: Any = LayerGradCam(model, layer).attribute(images, target=target, relu_attributions=True)
        return attribution.scale(F.interpolate(maps.detach(), size=(size, size), mode="bilinear").squeeze(1))

    made = {"forward": forward, harness.OURS: ours}
    if find_spec("pytorch_grad_cam"):
        import pytorch_grad_cam as package

        other = {"gradcam": package.GradCAM, "gradcam++": package.GradCAMPlusPlus}[method]
        explainer = other(model=model, target_layers=[layer])
        # numpy arrays on the CPU, resized and scaled
        made["grad-cam"] = lambda: torch.from_numpy(explainer(input_tensor=images, targets=None)).to(device)
    if method == "gradcam":
        made |= {"captum": captum, "captum, class given": lambda: captum(known)}
    return made


def agree(made: dict[str, Callable[[], Tensor]]) -> None:
    """A contender that computes something else would be no contender."""
    ours = made[harness.OURS]()
    for who in made.keys() - {"forward", harness.OURS}:
        worst = (made[who]() - ours).abs().max()
        if worst > 0.02:  # grad-cam scales before it resizes, with another interpolation
            raise RuntimeError(f"the maps of {who} differ from ours by up to {worst:.3f}")
