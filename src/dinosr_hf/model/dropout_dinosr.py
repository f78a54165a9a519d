"""
Dropout that does not wait for random numbers.

On a CPU torch draws one number of 64 bits for each element, which takes longer than the network's norms and
activations together. A quarter of it is as random for this purpose: 16 bits tell 65,536 shares apart.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_SHARES = 2**16


def draw_kept(shape: Sequence[int], share: float) -> tuple[torch.Tensor, float]:
    """
    Which elements dropout keeps, on a CPU.

    Args:
        shape: Of the tensor.
        share: Of the elements that become zero, 0 to 1, rounded to 65,536ths.

    Returns:
        uint8 of that shape, 1 for what is kept, and the factor that keeps the mean. Which elements, torch's global
        generator says.
    """
    dropped = round(share * _SHARES)
    if dropped == _SHARES:
        return torch.zeros(tuple(shape), dtype=torch.uint8), 0.0
    count = math.prod(shape)
    numbers = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = numbers[:count] >= dropped - _SHARES // 2
    return kept.view(torch.uint8).view(tuple(shape)), _SHARES / (_SHARES - dropped)


class _SixteenBitDropout(torch.autograd.Function):
    """Dropout with a byte an element to remember instead of four."""

    @staticmethod
    def forward(ctx: Any, signal: torch.Tensor, share: float) -> torch.Tensor:
        """Any shape to the same."""
        kept, ctx.factor = draw_kept(signal.shape, share)
        ctx.save_for_backward(kept)
        return torch.mul(signal, kept).mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of the signal."""
        (kept,) = ctx.saved_tensors
        return torch.mul(gradient, kept).mul_(ctx.factor), None


def apply_dropout(signal: torch.Tensor, share: float) -> torch.Tensor:
    """
    Set a share of the elements to zero, and scale the others so that the mean stays.

    Args:
        signal: Of any shape, floating point.
        share: 0 to 1; 0 gives back the signal itself. On a CPU it is rounded to 65,536ths.

    Returns:
        The same shape and dtype. Which elements, torch's global generator says.
    """
    if share == 0:
        return signal
    if signal.device.type != "cpu" or torch.compiler.is_compiling():
        return nn.functional.dropout(signal, share)
    return _SixteenBitDropout.apply(signal, share)


class DinoSRDropout(nn.Dropout):
    """`torch.nn.Dropout`, by `apply_dropout`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Any shape to the same; in evaluation the input itself."""
        return apply_dropout(input, self.p if self.training else 0.0)
