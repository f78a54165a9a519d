"""
The convolutions over the waveform, as matrix products with channels last; and those of positions.

A batch is cut into pieces of as many frames (`cut`), each in a length that all strides divide, and groups of pieces
are laid end to end. There a layer is one product of frames taken `stride` at a time, and one more for each further
`stride` taps of the kernel, then layer norm and GELU over the last axis, with no transposes between them.
Only the products are remembered for the backward pass, which goes group by group as well and makes the rest again.
tests/model/test_convolution.py has the plain form, benchmarks/convolution.py compares the two.

`B` batch, `S` samples, `T` frames, `P` pieces, `M` frames of a group in a layer, `C` channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .packing_dinosr import ValidFrames

# The largest product of a group on a CPU; smaller ones are slower. Elsewhere the batch is one group.
_GROUP_BYTES = 2**25


def frames_of_piece(num_frames: int, bytes_per_frame: int, limit: int) -> int:
    """Frames of each piece, so that pieces are alike, and below the limit unless a frame alone is above it."""
    num_pieces = -(-num_frames // max(1, limit // bytes_per_frame))
    return -(-num_frames // num_pieces)


def cut(
    input_values: torch.Tensor, num_frames: int, piece_frames: int, hop: int, receptive_field: int
) -> torch.Tensor:
    """
    Waveforms (B, S) to pieces (P, samples), those of an utterance behind one another.

    A piece has the samples of `piece_frames` frames and, from the next piece, what their last taps see of it, rounded
    up to whole hops. Behind the end of the utterance it has zeros.
    """
    num_pieces = 1 if piece_frames == num_frames else -(-num_frames // piece_frames)
    samples = (piece_frames + -(-max(receptive_field - hop, 0) // hop)) * hop
    needed = (num_pieces - 1) * piece_frames * hop + samples
    input_values = nn.functional.pad(input_values, (0, needed - input_values.shape[1]))
    return input_values if num_pieces == 1 else input_values.unfold(1, samples, piece_frames * hop).flatten(0, 1)


def lay_end_to_end(
    input_values: torch.Tensor, lengths: Sequence[int], hop: int, receptive_field: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Waveforms (B, S) with padding to one (1, samples) without, and where its frames are, int64 (M,).

    Each of `lengths` frames brings the samples that they see, rounded up to whole hops; what sees two utterances is no
    frame of either.
    """
    margin = -(-max(receptive_field - hop, 0) // hop)
    waveforms, places, start = [], [], 0
    for waveform, length in zip(input_values.unbind(), lengths, strict=True):
        if length:
            waveform = waveform[: (length - 1) * hop + receptive_field]
            waveforms.append(nn.functional.pad(waveform, (0, (length + margin) * hop - len(waveform))))
            places.append(torch.arange(start, start + length))
            start += length + margin
    return torch.cat(waveforms)[None], torch.cat(places)


@dataclass
class _Layer:
    """A convolution without padding, dilation and groups, and the layer norm behind it."""

    weight: torch.Tensor  # (C_out, C_in, taps)
    bias: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    stride: int
    eps: float

    def __post_init__(self) -> None:
        # For each `stride` of the kernel's taps a matrix (taps * C_in, C_out).
        by_tap = self.weight.permute(2, 1, 0)
        self.matrices = [taps.reshape(-1, self.weight.shape[0]) for taps in by_tap.split(self.stride)]
        # With one channel the kernel is one short product: then rows of taps are copied, and make one product of it.
        self.copies_rows = self.weight.shape[1] == 1
        self.matrix = by_tap.reshape(-1, self.weight.shape[0]) if self.copies_rows else self.matrices[0]

    def rows(self, signal: torch.Tensor) -> torch.Tensor:
        """(M * stride, C_in) to what the first product takes, (M, taps * C_in); behind the end there are zeros."""
        taps = self.weight.shape[2]
        if self.copies_rows:
            padded = nn.functional.pad(signal[:, 0], (0, max(taps - self.stride, 0)))
            return padded.unfold(0, taps, self.stride).contiguous()
        return signal.view(-1, self.stride * signal.shape[1])[:, : self.matrix.shape[0]]

    def further(self, signal: torch.Tensor) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """How many frames ahead each further product looks, what it takes, and its matrix."""
        if self.copies_rows:
            return []
        frames = signal.view(-1, self.stride * signal.shape[1])
        ahead = enumerate(self.matrices[1:], start=1)
        return [(i, frames[i:, : matrix.shape[0]], matrix) for i, matrix in ahead]

    def convolve(self, signal: torch.Tensor) -> torch.Tensor:
        """(M * stride, C_in) to (M, C_out)."""
        first = self.rows(signal)
        output = first @ self.matrix if self.bias is None else torch.addmm(self.bias, first, self.matrix)
        for ahead, frames, matrix in self.further(signal):
            output[:-ahead].addmm_(frames, matrix)
        return output

    def norm(self, convolved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(M, C_out) to the normalised (M, C_out), and means and inverse deviations (M, 1)."""
        return torch.native_layer_norm(convolved, convolved.shape[1:], self.norm_weight, self.norm_bias, self.eps)

    def norm_backward(
        self, gradient: torch.Tensor, convolved: torch.Tensor, mean: torch.Tensor, inverse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of the convolution's output, and of the norm's weight and bias where it has them."""
        affine = self.norm_weight is not None
        return torch.ops.aten.native_layer_norm_backward(
            gradient,
            convolved,
            convolved.shape[1:],
            mean,
            inverse,
            self.norm_weight,
            self.norm_bias,
            [True, affine, affine],
        )

    def weight_gradient(self, gradient: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
        """(taps * C_in, C_out), in the order of the matrices."""
        parts = [self.rows(signal).T @ gradient]
        for ahead, frames, _ in self.further(signal):
            parts.append(frames.T @ gradient[:-ahead])
        return torch.cat(parts)

    def signal_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """(M, C_out) to (M * stride, C_in)."""
        channels = self.weight.shape[1]
        width = self.stride * channels
        # Taps of the first product write the gradient, so only what they do not reach needs zeros.
        covered = self.matrices[0].shape[0] == width
        frames = gradient @ self.matrices[0].T if covered else gradient.new_zeros(len(gradient), width)
        for ahead, matrix in enumerate(self.matrices):
            if ahead or not covered:
                target = frames[ahead:, : matrix.shape[0]]
                target.addmm_(gradient[: len(target)], matrix.T)
        return frames.view(-1, channels)


class _Stack(torch.autograd.Function):
    """
    All layers over all groups, and the gradients.

    Written out, since autograd would remember three tensors a layer instead of one, and could not go group by group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pieces: torch.Tensor,
        piece_frames: int,
        group: int | None,
        strides_and_eps: Sequence[Any],
        recompute: bool,
        *parameters: Any,
    ) -> torch.Tensor:
        """Pieces (P, samples), `group` of them at a time, to (P, frames, C); four parameters a layer."""
        device = pieces.device.type
        autocast = torch.is_autocast_enabled(device)
        # As autocast has it: products in the low precision, norms and activations in float32.
        ctx.low = torch.get_autocast_dtype(device) if autocast else parameters[0].dtype
        ctx.high = torch.float32 if autocast else parameters[0].dtype
        ctx.piece_frames, ctx.group, ctx.strides_and_eps = piece_frames, group, strides_and_eps
        layers = _Stack._layers(ctx, parameters)
        remembers = any(ctx.needs_input_grad) and not recompute
        outputs, products = [], []
        for part in (pieces,) if group is None else pieces.split(group):
            convolved, output = _Stack._forward_group(ctx, layers, part, remembers)
            outputs.append(output.unflatten(0, (part.shape[0], -1))[:, :piece_frames])
            products += convolved
        ctx.save_for_backward(pieces, *parameters, *products)
        ctx.remembers = remembers
        return torch.cat(outputs)

    @staticmethod
    def _layers(ctx: Any, parameters: Sequence[Any]) -> list[_Layer]:
        layers = []
        for i, (stride, eps) in enumerate(ctx.strides_and_eps):
            weight, bias, norm_weight, norm_bias = parameters[4 * i : 4 * i + 4]
            low = None if bias is None else bias.to(ctx.low)
            layers.append(_Layer(weight.to(ctx.low), low, norm_weight, norm_bias, stride, eps))
        return layers

    @staticmethod
    def _forward_group(
        ctx: Any, layers: Sequence[_Layer], pieces: torch.Tensor, remembers: bool
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The layers' products, if they are remembered, and the last layer's output (M, C)."""
        signal, products = pieces.reshape(-1, 1), []
        for layer in layers:
            convolved = layer.convolve(signal.to(ctx.low))
            if remembers:
                products.append(convolved)
            signal = torch.ops.aten.gelu_(layer.norm(convolved.to(ctx.high))[0])
        return products, signal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of the pieces and of all parameters."""
        num_layers = len(ctx.strides_and_eps)
        pieces, *saved = ctx.saved_tensors
        parameters, products = saved[: 4 * num_layers], saved[4 * num_layers :]
        layers = _Stack._layers(ctx, parameters)
        of_pieces = torch.zeros_like(pieces) if ctx.needs_input_grad[0] else None
        sums: list[Any] = [None] * len(parameters)
        group = ctx.group or pieces.shape[0]
        for i, part in enumerate((pieces,) if ctx.group is None else pieces.split(group)):
            if ctx.remembers:
                convolved = products[num_layers * i : num_layers * (i + 1)]
            else:
                convolved, _ = _Stack._forward_group(ctx, layers, part, True)
            of_output = gradient.new_zeros(convolved[-1].shape)
            place = slice(group * i, group * i + part.shape[0])
            of_output.unflatten(0, (part.shape[0], -1))[:, : ctx.piece_frames] = gradient[place]
            of_part = _Stack._backward_group(ctx, layers, part, convolved, of_output, sums)
            if of_pieces is not None and of_part is not None:
                of_pieces[place] = of_part
        for i, layer in enumerate(layers):
            if sums[4 * i] is not None:
                channels_out, channels_in, taps = layer.weight.shape
                sums[4 * i] = sums[4 * i].view(taps, channels_in, channels_out).permute(2, 1, 0)
        return of_pieces, None, None, None, None, *sums

    @staticmethod
    def _backward_group(
        ctx: Any,
        layers: Sequence[_Layer],
        pieces: torch.Tensor,
        products: Sequence[torch.Tensor],
        gradient: torch.Tensor,
        sums: list[Any],
    ) -> torch.Tensor | None:
        """Add the parameters' gradients up in `sums`; the pieces', if it is needed, comes back."""

        def add(place: int, part: torch.Tensor | None) -> None:
            if part is not None and ctx.needs_input_grad[5 + place]:
                sums[place] = part.to(ctx.high) if sums[place] is None else sums[place].add_(part)

        convolved = products[-1].to(ctx.high)
        normed = layers[-1].norm(convolved)
        for i in reversed(range(len(layers))):
            layer, (output, mean, inverse) = layers[i], normed
            torch.ops.aten.gelu_backward.grad_input(gradient, output, grad_input=output)
            of_convolved, of_weight, of_bias = layer.norm_backward(output, convolved, mean, inverse)
            add(4 * i + 2, of_weight)
            add(4 * i + 3, of_bias)
            of_convolved = of_convolved.to(ctx.low)
            if layer.bias is not None:
                add(4 * i + 1, of_convolved.sum(0))
            if i > 0:
                convolved = products[i - 1].to(ctx.high)
                normed = layers[i - 1].norm(convolved)
                signal = nn.functional.gelu(normed[0])
            else:
                signal = pieces.reshape(-1, 1)
            if ctx.needs_input_grad[5 + 4 * i]:
                add(4 * i, layer.weight_gradient(of_convolved, signal.to(ctx.low)))
            if i > 0 or ctx.needs_input_grad[0]:
                gradient = layer.signal_gradient(of_convolved).to(ctx.high)
        return gradient.view_as(pieces) if ctx.needs_input_grad[0] else None


def convolve_pieces(
    input_values: torch.Tensor,
    convs: Sequence[nn.Conv1d],
    norms: Sequence[nn.LayerNorm],
    num_frames: int,
    receptive_field: int,
    *,
    frames: ValidFrames | None = None,
    recompute: bool = False,
    group_bytes: int | None = None,
) -> torch.Tensor:
    """
    Convolutions over waveforms, each with layer norm over channels and exact GELU behind it.

    Args:
        input_values: (B, S).
        convs: Without padding, dilation and groups; their parameters are used where they are.
        norms: One for each.
        num_frames: `T`, what the convolutions make of `S` samples.
        receptive_field: Samples that a frame sees.
        frames: Where the batch has frames; of the padding nothing is computed where they are packed. None: everywhere.
        recompute: Remember nothing for the backward pass but the waveforms: less memory, more time.
        group_bytes: What the largest product of a group may take; None: 32 MiB on a CPU, else without limit.

    Returns:
        (B, T, C), zero outside of `frames`; under autocast the products are in its precision and the result in
        float32.
    """
    strides = [conv.stride[0] for conv in convs]
    hop, sizes = 1, []
    for conv, stride in zip(convs, strides, strict=True):
        hop *= stride
        sizes.append(conv.out_channels / hop)
    if group_bytes is None and input_values.device.type == "cpu" and not torch.compiler.is_compiling():
        group_bytes = _GROUP_BYTES
    places = None
    if frames is not None and frames.are_packed:
        input_values, places = lay_end_to_end(input_values, frames.lengths, hop, receptive_field)
        num_frames = int(places[-1]) + 1
    piece_frames, group = num_frames, None
    if group_bytes is not None:
        bytes_per_frame = int(max(sizes) * hop * input_values.element_size())
        piece_frames = frames_of_piece(num_frames, bytes_per_frame, group_bytes)
        group = max(1, group_bytes // (piece_frames * bytes_per_frame))
    pieces = cut(input_values, num_frames, piece_frames, hop, receptive_field)
    parameters = []
    for conv, norm in zip(convs, norms, strict=True):
        parameters += [conv.weight, conv.bias, norm.weight, norm.bias]
    strides_and_eps = tuple(zip(strides, (norm.eps for norm in norms), strict=True))
    features = _Stack.apply(pieces, piece_frames, group, strides_and_eps, recompute, *parameters)
    features = features.unflatten(0, (input_values.shape[0], -1)).flatten(1, 2)[:, :num_frames]
    if places is not None:
        features = features[0].index_select(0, places)
    return features if frames is None else frames.unpack(features)


def same_conv(conv: nn.Conv1d, signal: torch.Tensor) -> torch.Tensor:
    """
    A convolution that keeps the number of frames, with channels last.

    Args:
        conv: With a padding of half its kernel and a stride of 1; an even kernel's last frame is cut off.
        signal: (B, T, C).

    Returns:
        (B, T, C_out).
    """
    num_frames = signal.shape[1]
    signal = signal.transpose(1, 2)
    if signal.device.type != "cpu" or torch.compiler.is_compiling():
        return conv(signal)[..., :num_frames].transpose(1, 2)
    # As an image of height 1: only for images does torch's CPU backend know channels last.
    image = nn.functional.conv2d(
        signal[:, :, None],
        conv.weight[:, :, None],
        conv.bias,
        padding=(0, conv.kernel_size[0] // 2),
        groups=conv.groups,
    )
    return image[:, :, 0, :num_frames].transpose(1, 2)
