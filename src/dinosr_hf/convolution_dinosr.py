"""
Strided convolutions of a whole batch as matrix products, with channels last.

A batch of waveforms is laid end to end as one long signal (`fold`), each utterance in a length that all strides
divide. Then each layer is one product of frames taken `stride` at a time, and one more for each further `stride` taps
of the kernel: no transposes for the layer norms in between, and one product for all utterances. Frames whose taps
reach into the next utterance are cut off at the end (`unfold`). benchmarks/convolution.py compares it with the usual
form.

`B` batch, `S` samples, `T` frames, `M` frames of the folded batch, `C` channels.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def frames_to_fold(num_frames: int, receptive_field: int, hop: int) -> int:
    """Frames that an utterance takes in the folded batch: its own, and those whose last taps are not its own."""
    return num_frames + -(-max(receptive_field - hop, 0) // hop)


def fold(input_values: torch.Tensor, samples: int) -> torch.Tensor:
    """Waveforms (B, S), cut or padded with zeros to `samples` each, end to end: (B * samples, 1)."""
    return nn.functional.pad(input_values, (0, samples - input_values.shape[1])).reshape(-1, 1)


def unfold(frames: torch.Tensor, batch: int, num_frames: int) -> torch.Tensor:
    """(M, C) to (B, T, C): the frames that an utterance alone has."""
    return frames.unflatten(0, (batch, -1))[:, :num_frames]


class _StridedProducts(torch.autograd.Function):
    """
    The convolution of `strided_conv` with more than one channel in, and its gradients.

    Written out since autograd would allocate a zero-filled gradient of the input for every slice.
    """

    @staticmethod
    def forward(
        ctx: Any, signal: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int
    ) -> torch.Tensor:
        """(M * stride, C) to (M, C_out)."""
        ctx.save_for_backward(signal, weight)
        ctx.stride = stride
        ctx.has_bias = bias is not None
        frames = signal.view(-1, stride * signal.shape[1])
        matrices = _tap_matrices(weight, stride)
        first = frames[:, : matrices[0].shape[0]]
        output = first @ matrices[0] if bias is None else torch.addmm(bias, first, matrices[0])
        for ahead, matrix in enumerate(matrices[1:], start=1):
            output[:-ahead].addmm_(frames[ahead:, : matrix.shape[0]], matrix)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of the signal, the weight and the bias."""
        signal, weight = ctx.saved_tensors
        frames = signal.view(-1, ctx.stride * signal.shape[1])
        gradient = gradient.contiguous()
        matrices = _tap_matrices(weight, ctx.stride)
        of_signal = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            # Taps of the first product write their gradient, so only what they do not reach needs zeros.
            covered = matrices[0].shape[0] == frames.shape[1]
            of_frames = gradient @ matrices[0].T if covered else torch.zeros_like(frames)
            for ahead, matrix in enumerate(matrices):
                if ahead or not covered:
                    target = of_frames[ahead:, : matrix.shape[0]]
                    target.addmm_(gradient[: target.shape[0]], matrix.T)
            of_signal = of_frames.view_as(signal)
        if ctx.needs_input_grad[1]:
            parts = []
            for ahead, matrix in enumerate(matrices):
                part = frames[ahead:, : matrix.shape[0]]
                parts.append(part.T @ gradient[: part.shape[0]])
            channels_out, channels_in, taps = weight.shape
            of_weight = torch.cat(parts).view(taps, channels_in, channels_out).permute(2, 1, 0)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0)
        return of_signal, of_weight, of_bias, None


def _tap_matrices(weight: torch.Tensor, stride: int) -> list[torch.Tensor]:
    """A kernel (C_out, C, taps) as a matrix (taps * C, C_out) for each `stride` of its taps."""
    by_tap = weight.permute(2, 1, 0)
    return [taps.reshape(-1, weight.shape[0]) for taps in by_tap.split(stride)]


def strided_conv(conv: nn.Conv1d, signal: torch.Tensor) -> torch.Tensor:
    """
    A convolution of a signal with channels last.

    Args:
        conv: Without padding, dilation and groups; its parameters are used where they are.
        signal: A folded batch (M * stride, C): behind its end the last frames see zeros. Or a batch that is not
            folded (B, T, C), which goes the usual way.

    Returns:
        (M, C_out), or (B, T, C_out) without the frames that would see beyond the end; in the precision of autocast
        where it is on.
    """
    if signal.dim() == 3:
        return conv(signal.transpose(1, 2)).transpose(1, 2)
    weight, bias, stride = conv.weight, conv.bias, conv.stride[0]
    device = signal.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        signal, weight, bias = signal.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if conv.in_channels == 1:
        # Rows as short as a kernel's taps: their copy is small beside the output, and makes one product of it.
        taps = weight.shape[2]
        rows = nn.functional.pad(signal[:, 0], (0, max(taps - stride, 0))).unfold(0, taps, stride)
        return nn.functional.linear(rows.contiguous(), weight[:, 0], bias)
    return _StridedProducts.apply(signal, weight, bias, stride)
