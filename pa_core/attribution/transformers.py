"""Explanations from a vision transformer's attention: Request -> raw map [N, S, S].

They need softmax attention of all tokens over all tokens in every block. It is read where timm's attention modules
hand it to their dropout (nothing in eval mode). A fused kernel never forms it, so fusing is switched off for the pass.
A row vector is carried through the blocks from the last to the first: the same product, without a matrix per image.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pa_core.attribution.base import Request, as_found, resize, score
from pa_core.models import Classifier


def attention_rollout(request: Request) -> Tensor:
    """attention, averaged over heads and with the residual as (attention + I) / 2, multiplied through the blocks,
    the row of the token that is read for the logits (Abnar & Zuidema 2020, section 3 and appendix A.1); vision
    transformers.

    It is the same whatever class is explained.
    """
    with torch.no_grad():
        attentions, _ = _forward(request.model, request.images)
        row = _readers(request.model, attentions[0])
        for attention in reversed(attentions):
            row = (row @ attention.float().mean(1) + row) / 2
        return _on_the_image(request, row)


def chefer(request: Request) -> Tensor:
    """R <- R + mean over heads of relu(attention * its gradient) R through the blocks, R = I at first, the row of the
    token that is read for the logits (Chefer, Gur & Wolf 2021, ICCV, eq. 5 and 6); vision transformers.
    """
    with torch.enable_grad():
        attentions, logits = _forward(request.model, request.images.clone().requires_grad_())
        gradients = torch.autograd.grad(score(logits, request.target), attentions)
    row = _readers(request.model, attentions[0])
    for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
        row = row + row @ (attention.detach().float() * gradient.float()).relu().mean(1)
    return _on_the_image(request, row)


def refuse_attention(model: Classifier) -> str | None:
    """Why a model's attention cannot be followed from block to block."""
    device = next(model.parameters()).device
    # without autocast: rows that sum to 1 may not in half precision
    with as_found(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
        attentions, _ = _forward(model, torch.zeros(2, 3, model.image_size, model.image_size, device=device))
    shapes = {a.shape[-2:] if a.ndim == 4 and len(a) == 2 else (0, 1) for a in attentions}
    if len(shapes) != 1 or any(rows != columns or not _side(model, rows) for rows, columns in shapes):
        return f"it needs attention of all tokens over all tokens in every block, and {model.name} has none to be read"
    if any(bool((a < 0).any()) or not torch.allclose(a.sum(-1), a.new_ones(()), atol=1e-3) for a in attentions):
        return f"it needs softmax attention, which {model.name} has not"
    return None


def _forward(model: Classifier, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Attention of every block in order, [N, heads, T, T] each, and the logits."""
    seen: list[Tensor] = []
    module: Any

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output)

    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                stack.callback(setattr, module, "fused_attn", module.fused_attn)
                module.fused_attn = False
            drop = getattr(module, "attn_drop", None)
            if isinstance(drop, nn.Dropout):
                stack.enter_context(drop.register_forward_hook(keep))
        return seen, model(images)


def _readers(model: Classifier, attention: Tensor) -> Tensor:
    """[N, 1, T]: the tokens that the head reads, equally weighted: class tokens (two if distilled), or all patches."""
    network, prefix = model.network, getattr(model.network, "num_prefix_tokens", 0)
    row = torch.zeros(len(attention), 1, attention.shape[-1], device=attention.device)
    if str(getattr(network, "global_pool", "avg")).startswith("token"):
        row[:, :, : prefix - getattr(network, "num_reg_tokens", 0)] = 1
    else:
        row[:, :, prefix:] = 1
    return row / row.sum(-1, keepdim=True)


def _on_the_image(request: Request, row: Tensor) -> Tensor:
    """What falls on the patches, [N, 1, T] -> [N, S, S]."""
    side = _side(request.model, row.shape[-1])
    return resize(row[:, 0, -side * side :].unflatten(1, (side, side)), request.images.shape[-1])


def _side(model: Classifier, tokens: int) -> int:
    """Side of the square of patches, 0 where they make none."""
    patches = max(tokens - getattr(model.network, "num_prefix_tokens", 0), 0)
    return math.isqrt(patches) if math.isqrt(patches) ** 2 == patches else 0
