"""Explanations from a vision transformer's attention: Request -> raw map [N, S, S].

They need softmax attention of all tokens over all tokens in every block. It is read where timm's attention modules
hand it to their dropout (nothing in eval mode). A fused kernel never forms it, so fusing is switched off for the pass.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pa_core.attribution.base import Request, as_found, explained_logits, resize
from pa_core.models import Classifier


def attention_rollout(request: Request) -> Tensor:
    """product over blocks of (attention averaged over heads + I) / 2 (Abnar & Zuidema 2020, section 3, appendix A.1).

    It is the same whatever class is explained. The halves are left to the scaling.
    """
    with torch.no_grad():
        attentions, _ = _forward(request.model, request.images)
        return _multiplied(request, [attention.float().mean(1) for attention in attentions])


def chefer(request: Request) -> Tensor:
    """product over blocks of I + mean over heads of relu(attention * gradient) (Chefer et al. 2021, eq. 5, 6)."""
    with torch.enable_grad():
        attentions, logits = _forward(request.model, request.images.clone().requires_grad_())
        gradients = torch.autograd.grad(explained_logits(logits, request.target), attentions)
    pairs = zip(attentions, gradients, strict=True)
    return _multiplied(request, [(a.detach().float() * gradient.float()).relu().mean(1) for a, gradient in pairs])


def follows_attention(model: Classifier) -> bool:
    """Whether a model's attention can be followed from block to block."""
    device = next(model.parameters()).device
    # without autocast: rows that sum to 1 may not in half precision
    with as_found(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
        attentions, _ = _forward(model, torch.zeros(2, 3, model.image_size, model.image_size, device=device))
    tokens = attentions[0].shape[-1] if attentions else 0
    patches = max(tokens - getattr(model.network, "num_prefix_tokens", 0), 0)
    whole = [a.ndim == 4 and len(a) == 2 and a.shape[2:] == (tokens, tokens) for a in attentions]  # no windows
    softmax = [bool((a >= 0).all()) and torch.allclose(a.sum(-1), a.new_ones(()), atol=1e-3) for a in attentions]
    return patches > 0 and math.isqrt(patches) ** 2 == patches and all(whole) and all(softmax)


def _forward(model: Classifier, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Attention of every block in order, [N, heads, T, T] each, and the logits."""
    seen: list[Any] = []
    module: Any
    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                stack.callback(setattr, module, "fused_attn", module.fused_attn)
                module.fused_attn = False
            if isinstance(drop := getattr(module, "attn_drop", None), nn.Dropout):
                stack.enter_context(drop.register_forward_hook(lambda _module, _inputs, output: seen.append(output)))
        return seen, model(images)


def _multiplied(request: Request, weights: Sequence[Tensor]) -> Tensor:
    """Product of I + weight, [N, T, T] each, over the blocks: what the tokens that the head reads get from each patch.

    Only a row vector is carried, from the last block to the first: the same product, without a matrix per image.
    """
    network, prefix = request.model.network, getattr(request.model.network, "num_prefix_tokens", 0)
    row = torch.zeros_like(weights[0][:, :1])
    if str(getattr(network, "global_pool", "avg")).startswith("token"):
        row[:, :, : prefix - getattr(network, "num_reg_tokens", 0)] = 1  # class tokens, two if distilled
    else:
        row[:, :, prefix:] = 1
    for weight in reversed(weights):
        row = row + row @ weight
    side = math.isqrt(row.shape[-1] - prefix)
    return resize(row[:, 0, prefix:].unflatten(1, (side, side)), request.images.shape[-1])
