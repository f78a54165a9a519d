"""
Dropout that does not wait for random numbers.

On a CPU torch draws one number of 64 bits for each element, which takes longer than the network's norms and
activations together. A quarter of it is as random for this purpose: 16 bits tell 65,536 shares apart.
"""

from typing import Any

import torch
from torch import nn

_SHARES = 2**16


class _SixteenBitDropout(torch.autograd.Function):
    """Dropout of a share in 65,536ths, with a byte an element to remember instead of four."""

    @staticmethod
    def forward(ctx: Any, signal: torch.Tensor, dropped: int) -> torch.Tensor:
        """Any shape to the same; of 65,536 elements `dropped` become zero, and the others are scaled up."""
        numbers = torch.empty(-(-signal.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = (numbers[: signal.numel()] >= dropped - _SHARES // 2).view(signal.shape)
        ctx.save_for_backward(kept)
        ctx.scale = _SHARES / (_SHARES - dropped)
        return torch.where(kept, signal, 0.0).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of the signal."""
        (kept,) = ctx.saved_tensors
        return torch.where(kept, gradient, 0.0) * ctx.scale, None


def apply_dropout(signal: torch.Tensor, share: float) -> torch.Tensor:
    """
    Set a share of the elements to zero, and scale the others so that the mean stays.

    Args:
        signal: Of any shape.
        share: 0 to 1; 0 gives back the signal itself. On a CPU it is rounded to 65,536ths.

    Returns:
        The same shape and dtype. Which elements, torch's global generator says.
    """
    if share == 0:
        return signal
    dropped = round(share * _SHARES)
    if signal.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < dropped < _SHARES:
        return nn.functional.dropout(signal, share)
    return _SixteenBitDropout.apply(signal, dropped)


class DinoSRDropout(nn.Dropout):
    """`torch.nn.Dropout`, by `apply_dropout`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Any shape to the same; in evaluation the input itself."""
        return apply_dropout(input, self.p if self.training else 0.0)
