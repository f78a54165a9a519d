"""
Attention written out, and attention of one utterance after the other, which needs no mask and little memory.

`B` batch, `T` frames, `H` heads, `E` size of a head, `M` frames of all utterances.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .dropout_dinosr import apply_dropout, draw_kept


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; query, key, value (B, H, T, E) to (B, T, H, E) and weights (B, H, T, T)."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = apply_dropout(scores.softmax(dim=-1), dropout if module.training else 0.0)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _by_head(lengths: Sequence[int], *frames: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Of tensors (M, H, E) a view (H, T, E) for each utterance."""
    for utterance in zip(*(one.split(list(lengths)) for one in frames), strict=True):
        yield [one.transpose(0, 1) for one in utterance]


class _DropoutAttention(torch.autograd.Function):
    """
    Attention with dropout of its weights, that remembers a byte for each weight and makes them again.

    Written out, since autograd would remember them twice, and fill new memory with every step of the way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Sequence[int],
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        """Each (M, H, E) to (M, H, E)."""
        output = torch.empty_like(query)
        masks = []
        for q, k, v, out in _by_head(lengths, query, key, value, output):
            weights = _DropoutAttention._weights(q, k, scaling)
            kept, ctx.factor = draw_kept(weights.shape, dropout)
            out.copy_(torch.bmm(weights.mul_(kept).to(v.dtype), v))
            masks.append(kept)
        ctx.lengths, ctx.scaling = lengths, scaling
        ctx.save_for_backward(query, key, value, *masks)
        return output.mul_(ctx.factor)

    @staticmethod
    def _weights(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
        """(H, T, E) to (H, T, T), in float32 where it is less."""
        scores = torch.bmm(query, key.transpose(1, 2))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scaling)
        return torch.softmax(scores, dim=-1, out=scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of query, key and value."""
        query, key, value, *masks = ctx.saved_tensors
        gradient = gradient * ctx.factor
        gradients = [torch.empty_like(one) for one in (query, key, value)]
        utterances = _by_head(ctx.lengths, query, key, value, gradient, *gradients)
        for (q, k, v, of_out, of_q, of_k, of_v), kept in zip(utterances, masks, strict=True):
            weights = _DropoutAttention._weights(q, k, ctx.scaling)
            of_weights = torch.bmm(of_out, v.transpose(1, 2)).to(weights.dtype).mul_(kept)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_scores = of_scores.mul_(ctx.scaling).to(q.dtype)
            of_v.copy_(torch.bmm(weights.mul_(kept).transpose(1, 2).to(v.dtype), of_out))
            of_q.copy_(torch.bmm(of_scores, k))
            of_k.copy_(torch.bmm(of_scores.transpose(1, 2), q))
        return *gradients, None, None, None


def attend_by_utterance(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    Attention within each of the utterances that lie end to end.

    Args:
        query, key, value: (M, H, E).
        lengths: Frames of each utterance, M in all.
        scaling: Of the products of query and key.
        dropout: Share of the weights that become zero.

    Returns:
        (M, H, E).
    """
    if dropout > 0:
        return _DropoutAttention.apply(query, key, value, lengths, scaling, dropout)
    outputs = [
        nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scaling)[0].transpose(0, 1)
        for q, k, v in _by_head(lengths, query, key, value)
    ]
    return torch.cat(outputs)
