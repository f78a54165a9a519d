# SPDX-License-Identifier: Apache-2.0
"""
Faster equivalents of the model's plain layers on CPUs, and the one guard in front of them.

`may_use_fast_forms` decides. Where it says no, the layers do what their `forward` says; where it says yes, they
compute the same numbers (dropout: numbers of the same distribution) in one of these forms:

- `convolve`: the waveform's convolutions, norms and activations as matrix products with channels last;
- `ValidFrames`: a padded batch as one long utterance without padding;
- `attend_by_utterance`: attention within each utterance of such a batch, without a mask;
- `convolve_same_length`: a positional convolution with channels last;
- `SixteenBitDropout`: dropout by 16 random bits an element instead of 64.

Letters of shapes: `B` batch, `S` samples, `T` frames, `M` valid frames of a batch, `C` channels, `D` hidden size, `H`
heads, `E` size of a head, `P` pieces of waveforms.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from transformers.activations import GELUActivation

_GROUP_BYTES = 2**25  # of the largest product: smaller ones are slower, larger ones need more memory
_DROPOUT_LEVELS = 2**16
_PLAIN_LAYERS = (nn.Conv1d, nn.LayerNorm, nn.Linear, nn.ModuleList)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{hooks}" for hooks in _HOOKS)
_is_enabled = True


def set_fast_cpu(enabled: bool) -> bool:
    """Switch the fast forms on (the default) or off for all models of this process; return whether they were on."""
    global _is_enabled
    before, _is_enabled = _is_enabled, bool(enabled)
    return before


def _is_plain(layer: nn.Module, own_module: str) -> bool:
    """Whether a layer has a known type, its own `forward`, ordinary parameters, and no hooks."""
    kind = type(layer)
    return (
        (kind in _PLAIN_LAYERS or kind.__module__ in (own_module, "transformers.activations"))
        and "forward" not in layer.__dict__  # as accelerate's offloading replaces it
        and layer._compiled_call_impl is None
        and not any(
            # transformers leaves hooks behind where a model was asked for `hidden_states` or `attentions`.
            getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
            for name in _HOOKS
            for hook in layer.__dict__[name].values()
        )
        and all(type(parameter) in (nn.Parameter, Tensor, type(None)) for parameter in layer._parameters.values())
    )


def may_use_fast_forms(signal: Tensor, *layers: nn.Module) -> bool:
    """
    Decide whether a computation may take a fast form: the one guard of this file.

    Args:
        signal: Input of the computation.
        *layers: Layers, with all layers inside them, that the fast form may compute without calling them.

    Returns:
        True on a CPU where the fast forms are switched on, nothing traces, compiles or transforms the computation, and
        all layers are plain: no hooks, no parametrisation, none wrapped, quantised or replaced.
    """
    return (
        _is_enabled
        and type(signal) in (Tensor, nn.Parameter)
        and signal.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and torch._C._functorch.peek_interpreter_stack() is None  # torch.func
        and forward_ad._current_level < 0
        and not any(getattr(torch_module, hooks) for hooks in _GLOBAL_HOOKS)
        and all(_is_plain(part, type(layer).__module__) for layer in layers for part in layer.modules())
    )


def draw_dropout_mask(shape: Sequence[int], probability: float) -> tuple[Tensor, float]:
    """
    Draw with torch's global generator which elements dropout keeps.

    The probability of an element to become zero is rounded to 65,536ths. Returns uint8 of that shape, 1 for elements
    to keep, and the factor that keeps the mean.
    """
    dropped = round(probability * _DROPOUT_LEVELS)
    if dropped == _DROPOUT_LEVELS:
        return torch.zeros(tuple(shape), dtype=torch.uint8), 0.0
    count = math.prod(shape)
    numbers = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = numbers[:count] >= dropped - _DROPOUT_LEVELS // 2
    return kept.view(torch.uint8).view(tuple(shape)), _DROPOUT_LEVELS / (_DROPOUT_LEVELS - dropped)


class SixteenBitDropout(torch.autograd.Function):
    """Dropout with a quarter of the random numbers, that saves a byte an element for the backward pass, not four."""

    @staticmethod
    def forward(ctx: Any, signal: Tensor, probability: float) -> Tensor:
        kept, ctx.factor = draw_dropout_mask(signal.shape, probability)
        ctx.save_for_backward(kept)
        return torch.mul(signal, kept).mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return torch.mul(gradient, kept).mul_(ctx.factor), None


class ValidFrames:
    """
    The valid frames of a batch: packed, a padded batch is one long utterance of `M` frames.

    Args:
        frame_mask: bool (B, T), True for frames, padding at the end; None: there is no padding.
        shape: (B, T).

    Attributes:
        lengths: Number of valid frames of each utterance.
    """

    def __init__(self, frame_mask: Tensor | None, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)
        self._indices = None
        self.lengths = [shape[1]] * shape[0]
        if frame_mask is not None and not frame_mask.all():
            self.lengths = frame_mask.sum(dim=-1).tolist()
            self._indices = frame_mask.flatten().nonzero()[:, 0]

    @property
    def has_padding(self) -> bool:
        """Whether a frame of the batch is padding."""
        return self._indices is not None

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...) to (1, M, ...), or itself without padding."""
        return padded if self._indices is None else padded.flatten(0, 1).index_select(0, self._indices)[None]

    def unpack(self, frames: Tensor) -> Tensor:
        """The reverse of `pack`: to (B, T, ...), zero in the padding."""
        if self._indices is None:
            return frames
        padded = frames.new_zeros(math.prod(self._shape), *frames.shape[2:])
        return padded.index_copy_(0, self._indices, frames[0]).unflatten(0, self._shape)


def valid_frames(
    config: Any,
    hidden_states: Tensor,
    frame_mask: Tensor | None,
    attention_mask: Tensor | None,
    has_dropout: bool,
) -> ValidFrames | None:
    """
    Choose the frames of (B, T, D) that transformer layers compute on a CPU, with attention by utterance.

    `frame_mask` is bool (B, T) or None: no padding, or padding that counts (`reference_padding`). Returns None for the
    batch as it is, with the configured attention.
    """
    if config._attn_implementation != "sdpa" or (attention_mask is not None and frame_mask is None):
        return None
    frames = ValidFrames(frame_mask, hidden_states.shape[:2])
    # On a CPU, torch's sdpa is slow with dropout, and without has no second derivative.
    is_better = frames.has_padding or has_dropout or torch.is_grad_enabled()
    return frames if any(frames.lengths) and is_better else None


def _utterances(lengths: Sequence[int], *frames: Tensor) -> Iterator[list[Tensor]]:
    """Views (H, T, E) of each utterance in tensors (M, H, E)."""
    for utterance in zip(*(each.split(list(lengths)) for each in frames), strict=True):
        yield [each.transpose(0, 1) for each in utterance]


def _attention_weights(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(H, T, E) to (H, T, T), at least float32."""
    scores = torch.bmm(query, key.transpose(1, 2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if torch.is_grad_enabled():
        return (scores * scaling).softmax(dim=-1)
    return torch.softmax(scores.mul_(scaling), dim=-1, out=scores)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)


class _TwiceDifferentiable(torch.autograd.Function):
    """torch's attention, whose kernel for CPUs has no second derivative, with one."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        ctx.scaling = scaling
        ctx.save_for_backward(query, key, value)
        return _flash_attention(query, key, value, scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is asked for
            weights = (query @ key.mT * ctx.scaling).softmax(dim=-1)
            return _gradients(ctx, weights @ value, inputs, gradient, create_graph=True)
        with torch.enable_grad():
            query, key, value = inputs = tuple(each.detach().requires_grad_() for each in inputs)
            output = _flash_attention(query, key, value, ctx.scaling)
        return _gradients(ctx, output, inputs, gradient)


def _gradients(
    ctx: Any, output: Tensor, inputs: Sequence[Any], gradient: Tensor, *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """What `backward` returns: the gradients of those inputs that need one, for all arguments of `forward`."""
    needed = [i for i, is_needed in enumerate(ctx.needs_input_grad) if is_needed]
    found = torch.autograd.grad(output, [inputs[i] for i in needed], gradient, create_graph=create_graph)
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, each in zip(needed, found, strict=True):
        gradients[i] = each
    return tuple(gradients)


class _DropoutAttention(torch.autograd.Function):
    """
    Attention with dropout of its weights.

    It saves a byte for each weight and computes the weights again, where autograd would save two floats.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float, dropout: float
    ) -> Tensor:
        output = torch.empty_like(query)
        masks = []
        for q, k, v, out in _utterances(lengths, query, key, value, output):
            weights = _attention_weights(q, k, scaling)
            kept, ctx.factor = draw_dropout_mask(weights.shape, dropout)
            out.copy_(torch.bmm(weights.mul_(kept).to(v.dtype), v))
            masks.append(kept)
        ctx.lengths, ctx.scaling = lengths, scaling
        ctx.save_for_backward(query, key, value, *masks)
        return output.mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *masks = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is asked for
            output = _DropoutAttention._plain(query, key, value, masks, ctx)
            return _gradients(ctx, output, (query, key, value), gradient, create_graph=True)
        gradient = gradient * ctx.factor
        gradients = [torch.empty_like(each) for each in (query, key, value)]
        utterances = _utterances(ctx.lengths, query, key, value, gradient, *gradients)
        for (q, k, v, d_output, d_q, d_k, d_v), kept in zip(utterances, masks, strict=True):
            weights = _attention_weights(q, k, ctx.scaling)
            d_weights = torch.bmm(d_output, v.transpose(1, 2)).to(weights.dtype).mul_(kept)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_scores = d_scores.mul_(ctx.scaling).to(q.dtype)
            d_v.copy_(torch.bmm(weights.mul_(kept).transpose(1, 2).to(v.dtype), d_output))
            d_q.copy_(torch.bmm(d_scores, k))
            d_k.copy_(torch.bmm(d_scores.transpose(1, 2), q))
        return *gradients, None, None, None

    @staticmethod
    def _plain(query: Tensor, key: Tensor, value: Tensor, masks: Sequence[Tensor], ctx: Any) -> Tensor:
        outputs = []
        for (q, k, v), kept in zip(_utterances(ctx.lengths, query, key, value), masks, strict=True):
            weights = _attention_weights(q, k, ctx.scaling) * kept * ctx.factor
            outputs.append(torch.bmm(weights.to(v.dtype), v).transpose(0, 1))
        return torch.cat(outputs)


def attend_by_utterance(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float, dropout: float = 0.0
) -> Tensor:
    """
    Attend within each of several utterances that lie end to end: (M, H, E) each to (M, H, E).

    `lengths` are the numbers of frames of the utterances, whose sum is M.
    """
    if dropout > 0:
        return _DropoutAttention.apply(query, key, value, lengths, scaling, dropout)
    needs_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    attend = _TwiceDifferentiable.apply if needs_gradient else _flash_attention
    outputs = [
        attend(q[None], k[None], v[None], scaling)[0].transpose(0, 1)
        for q, k, v in _utterances(lengths, query, key, value)
    ]
    return torch.cat(outputs)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    frames: ValidFrames,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attend_by_utterance` with the interface of transformers' attention: (B, H, T, E) each to (B, T, H, E)."""
    shape = query.transpose(1, 2).shape
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    return attend_by_utterance(query, key, value, frames.lengths, scaling, dropout).view(shape), None


def convolve_same_length(conv: nn.Conv1d, signal: Tensor) -> Tensor:
    """
    Compute a positional convolution, (B, T, C) to (B, T, C), as an image of height 1.

    torch's CPU convolutions know channels last only for images. The convolution has a stride of 1 and a padding of
    half its kernel; with an even kernel the last frame is cut off.
    """
    image = nn.functional.conv2d(
        signal.transpose(1, 2)[:, :, None],
        conv.weight[:, :, None],
        conv.bias,
        padding=(0, conv.kernel_size[0] // 2),
        groups=conv.groups,
    )
    return image[:, :, 0, : signal.shape[1]].transpose(1, 2)


@dataclass
class _ConvLayer:
    """Parameters of a convolution and of the layer norm after it; the activation after both is exact GELU."""

    weight: Tensor  # (C_out, C_in, taps)
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    stride: int
    eps: float

    def __post_init__(self) -> None:
        # A matrix (taps * C_in, C_out) for each `stride` taps of the kernel.
        by_tap = self.weight.permute(2, 1, 0)
        self.matrices = [taps.reshape(-1, self.weight.shape[0]) for taps in by_tap.split(self.stride)]
        # With one channel the kernel is one short product: rows of taps are copied instead.
        self.copies_rows = self.weight.shape[1] == 1
        self.matrix = by_tap.reshape(-1, self.weight.shape[0]) if self.copies_rows else self.matrices[0]

    def first_rows(self, signal: Tensor) -> Tensor:
        """(M * stride, C_in) to the input (M, taps * C_in) of the first product; after the end there are zeros."""
        taps = self.weight.shape[2]
        if self.copies_rows:
            padded = nn.functional.pad(signal[:, 0], (0, max(taps - self.stride, 0)))
            return padded.unfold(0, taps, self.stride).contiguous()
        return signal.view(-1, self.stride * signal.shape[1])[:, : self.matrix.shape[0]]

    def further_rows(self, signal: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """How many frames ahead each further product looks, its input, and its matrix."""
        if self.copies_rows:
            return []
        frames = signal.view(-1, self.stride * signal.shape[1])
        return [(i, frames[i:, : len(matrix)], matrix) for i, matrix in enumerate(self.matrices) if i]

    def convolve(self, signal: Tensor) -> Tensor:
        """(M * stride, C_in) to (M, C_out)."""
        first = self.first_rows(signal)
        output = first @ self.matrix if self.bias is None else torch.addmm(self.bias, first, self.matrix)
        for ahead, rows, matrix in self.further_rows(signal):
            output[:-ahead].addmm_(rows, matrix)
        return output

    def norm(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(M, C_out) to the normalised (M, C_out), and means and inverse deviations (M, 1)."""
        return torch.native_layer_norm(convolved, convolved.shape[1:], self.norm_weight, self.norm_bias, self.eps)

    def norm_backward(
        self, gradient: Tensor, convolved: Tensor, mean: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of the convolution's output and of the norm's weight and bias."""
        affine = [self.norm_weight, self.norm_bias]
        needed = [True, *(each is not None for each in affine)]
        shape = convolved.shape[1:]
        return torch.ops.aten.native_layer_norm_backward(gradient, convolved, shape, mean, inverse, *affine, needed)

    def weight_gradient(self, gradient: Tensor, signal: Tensor) -> Tensor:
        """(taps * C_in, C_out), in the order of the matrices."""
        parts = [self.first_rows(signal).T @ gradient]
        for ahead, rows, _ in self.further_rows(signal):
            parts.append(rows.T @ gradient[:-ahead])
        return torch.cat(parts)

    def signal_gradient(self, gradient: Tensor) -> Tensor:
        """(M, C_out) to (M * stride, C_in)."""
        width = self.stride * self.weight.shape[1]
        # The first product's taps write the gradient, so only what they do not reach needs zeros.
        covered = self.matrices[0].shape[0] == width
        frames = gradient @ self.matrices[0].T if covered else gradient.new_zeros(len(gradient), width)
        for ahead, matrix in enumerate(self.matrices):
            if ahead or not covered:
                target = frames[ahead:, : matrix.shape[0]]
                target.addmm_(gradient[: len(target)], matrix.T)
        return frames.view(-1, self.weight.shape[1])


class _Plan(NamedTuple):
    """How `_Stack` runs: frames of a piece, pieces of a group, the layers' strides and epsilons, what it saves."""

    piece_frames: int
    group: int
    strides_and_eps: Sequence[tuple[int, float]]
    recompute: bool


class _Stack(torch.autograd.Function):
    """
    All convolutions with their norms and activations, group by group, and the gradients.

    It saves one tensor a layer for the backward pass, where autograd would save three, or none to recompute it all.
    """

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, plan: _Plan, *parameters: Any) -> Tensor:
        """Pieces (P, samples) to (P, frames, C); four parameters a layer."""
        autocast = torch.is_autocast_enabled("cpu")
        # As autocast does it: products in the low precision, norms and activations in float32.
        ctx.low = torch.get_autocast_dtype("cpu") if autocast else parameters[0].dtype
        ctx.high = torch.float32 if autocast else parameters[0].dtype
        ctx.plan = plan
        layers = _Stack._layers(ctx, parameters)
        ctx.saves_products = any(ctx.needs_input_grad) and not plan.recompute
        outputs, products = [], []
        for part in pieces.split(plan.group):
            convolved, output = _Stack._forward_group(ctx, layers, part, ctx.saves_products)
            outputs.append(output.unflatten(0, (part.shape[0], -1))[:, : plan.piece_frames])
            products += convolved
        ctx.save_for_backward(pieces, *parameters, *products)
        return torch.cat(outputs)

    @staticmethod
    def _layers(ctx: Any, parameters: Sequence[Any]) -> list[_ConvLayer]:
        layers = []
        for i, (stride, eps) in enumerate(ctx.plan.strides_and_eps):
            weight, bias, norm_weight, norm_bias = _Stack._in_precision(ctx, parameters[4 * i : 4 * i + 4])
            layers.append(_ConvLayer(weight, bias, norm_weight, norm_bias, stride, eps))
        return layers

    @staticmethod
    def _in_precision(ctx: Any, parameters: Sequence[Any]) -> list[Any]:
        """Weight and bias of a convolution in the precision of products, those of its norm in that of norms."""
        dtypes = (ctx.low, ctx.low, ctx.high, ctx.high)
        return [None if each is None else each.to(dtype) for each, dtype in zip(parameters, dtypes, strict=True)]

    @staticmethod
    def _forward_group(
        ctx: Any, layers: Sequence[_ConvLayer], pieces: Tensor, saves_products: bool
    ) -> tuple[list[Tensor], Tensor]:
        """Each layer's product, if it is to be saved, and the last layer's output (M, C)."""
        signal, products = pieces.reshape(-1, 1), []
        for layer in layers:
            convolved = layer.convolve(signal.to(ctx.low))
            if saves_products:
                products.append(convolved)
            signal = torch.ops.aten.gelu_(layer.norm(convolved.to(ctx.high))[0])
        return products, signal

    @staticmethod
    def _plain(ctx: Any, pieces: Tensor, parameters: Sequence[Any]) -> Tensor:
        """The same in operations that autograd differentiates as often as asked."""
        signal = pieces[:, None].to(ctx.low)
        for i, (stride, eps) in enumerate(ctx.plan.strides_and_eps):
            weight, bias, norm_weight, norm_bias = _Stack._in_precision(ctx, parameters[4 * i : 4 * i + 4])
            convolved = nn.functional.conv1d(signal, weight, bias, stride).transpose(1, 2).to(ctx.high)
            normed = nn.functional.layer_norm(convolved, convolved.shape[2:], norm_weight, norm_bias, eps)
            signal = nn.functional.gelu(normed).to(ctx.low).transpose(1, 2)
        return signal.transpose(1, 2)[:, : ctx.plan.piece_frames].to(ctx.high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the pieces and of all parameters."""
        num_layers = len(ctx.plan.strides_and_eps)
        pieces, *saved = ctx.saved_tensors
        parameters, products = saved[: 4 * num_layers], saved[4 * num_layers :]
        if torch.is_grad_enabled():  # a graph of the gradient is asked for
            output = _Stack._plain(ctx, pieces, parameters)
            return _gradients(ctx, output, (pieces, None, *parameters), gradient, create_graph=True)
        layers = _Stack._layers(ctx, parameters)
        d_pieces = torch.zeros_like(pieces) if ctx.needs_input_grad[0] else None
        sums: list[Any] = [None] * len(parameters)
        for i, part in enumerate(pieces.split(ctx.plan.group)):
            if ctx.saves_products:
                convolved = products[num_layers * i : num_layers * (i + 1)]
            else:
                convolved, _ = _Stack._forward_group(ctx, layers, part, True)
            d_output = gradient.new_zeros(convolved[-1].shape)
            place = slice(ctx.plan.group * i, ctx.plan.group * i + part.shape[0])
            d_output.unflatten(0, (part.shape[0], -1))[:, : ctx.plan.piece_frames] = gradient[place]
            d_part = _Stack._backward_group(ctx, layers, part, convolved, d_output, sums)
            if d_pieces is not None and d_part is not None:
                d_pieces[place] = d_part
        for i, layer in enumerate(layers):
            if sums[4 * i] is not None:
                channels_out, channels_in, taps = layer.weight.shape
                sums[4 * i] = sums[4 * i].view(taps, channels_in, channels_out).permute(2, 1, 0)
        return d_pieces, None, *sums

    @staticmethod
    def _backward_group(
        ctx: Any,
        layers: Sequence[_ConvLayer],
        pieces: Tensor,
        products: Sequence[Tensor],
        gradient: Tensor,
        sums: list[Any],
    ) -> Tensor | None:
        """Add the parameters' gradients to `sums`, and return that of the pieces if it is needed."""

        def add(place: int, part: Tensor | None) -> None:
            if part is not None and ctx.needs_input_grad[2 + place]:
                sums[place] = part.to(ctx.high) if sums[place] is None else sums[place].add_(part)

        convolved = products[-1].to(ctx.high)
        normed = layers[-1].norm(convolved)
        for i in reversed(range(len(layers))):
            layer, (output, mean, inverse) = layers[i], normed
            torch.ops.aten.gelu_backward.grad_input(gradient, output, grad_input=output)
            d_convolved, d_norm_weight, d_norm_bias = layer.norm_backward(output, convolved, mean, inverse)
            add(4 * i + 2, d_norm_weight)
            add(4 * i + 3, d_norm_bias)
            d_convolved = d_convolved.to(ctx.low)
            if layer.bias is not None:
                add(4 * i + 1, d_convolved.sum(0))
            if i > 0:
                convolved = products[i - 1].to(ctx.high)
                normed = layers[i - 1].norm(convolved)
                signal = nn.functional.gelu(normed[0])
            else:
                signal = pieces.reshape(-1, 1)
            if ctx.needs_input_grad[2 + 4 * i]:
                add(4 * i, layer.weight_gradient(d_convolved, signal.to(ctx.low)))
            if i > 0 or ctx.needs_input_grad[0]:
                gradient = layer.signal_gradient(d_convolved).to(ctx.high)
        return gradient.view_as(pieces) if ctx.needs_input_grad[0] else None


def can_convolve(layers: Iterable[Any]) -> bool:
    """Whether `convolve` has a form for these layers: no dilation, groups or padding, and exact GELU."""
    for layer in layers:
        conv, norm, activation = (getattr(layer, name, None) for name in ("conv", "layer_norm", "activation"))
        if type(conv) is not nn.Conv1d or (conv.dilation, conv.groups, conv.padding) != ((1,), 1, (0,)):
            return False
        if type(norm) is not nn.LayerNorm or type(activation) is not GELUActivation:
            return False
        if activation.act is not nn.functional.gelu:
            return False
    return True


def convolve(
    layers: Iterable[Any],
    input_values: Tensor,
    num_frames: int,
    receptive_field: int,
    frame_mask: Tensor | None = None,
    *,
    recompute: bool = False,
    group_bytes: int | None = None,
) -> Tensor:
    """
    Compute convolutions over waveforms, each with layer norm over channels and exact GELU after it.

    The waveforms are cut into pieces of as many frames, in lengths that all strides divide, and a group of pieces lies
    end to end. A layer is one product of frames taken `stride` at a time, and one more for each further `stride` taps.

    Args:
        layers: Layers with `conv`, `layer_norm` and `activation`, for which `can_convolve` is true.
        input_values: (B, S).
        num_frames: Number of frames `T` of the batch.
        receptive_field: Number of samples that a frame sees.
        frame_mask: bool (B, T), True for frames; the padding is not computed. None: there is no padding.
        recompute: Whether the backward pass computes the layers again, for less memory.
        group_bytes: Size of the largest product; None: 32 MiB.

    Returns:
        (B, T, C), zero in the padding; under autocast, float32 from products in its precision.
    """
    hop, channels_per_sample, strides_and_eps = 1, [], []
    parameters: list[Tensor | None] = []
    for layer in layers:
        conv, norm = layer.conv, layer.layer_norm
        hop *= conv.stride[0]
        channels_per_sample.append(conv.out_channels / hop)
        strides_and_eps.append((conv.stride[0], norm.eps))
        parameters += [conv.weight, conv.bias, norm.weight, norm.bias]
    group_bytes = _GROUP_BYTES if group_bytes is None else group_bytes
    frames = ValidFrames(frame_mask, (len(input_values), num_frames))
    if not any(frames.lengths):
        return input_values.new_zeros(len(input_values), num_frames, conv.out_channels)
    if frames.has_padding:
        input_values, places = lay_end_to_end(input_values, frames.lengths, hop, receptive_field)
        num_frames = int(places[-1]) + 1
    bytes_per_frame = int(max(channels_per_sample) * hop * input_values.element_size())
    piece_frames = frames_of_piece(num_frames, bytes_per_frame, group_bytes)
    pieces = cut(input_values, num_frames, piece_frames, hop, receptive_field)
    group = max(1, group_bytes // (piece_frames * bytes_per_frame))
    features = _Stack.apply(pieces, _Plan(piece_frames, group, strides_and_eps, recompute), *parameters)
    features = features.unflatten(0, (len(input_values), -1)).flatten(1, 2)[:, :num_frames]
    return frames.unpack(features.index_select(1, places)) if frames.has_padding else features


def frames_of_piece(num_frames: int, bytes_per_frame: int, limit: int) -> int:
    """Return the number of frames of a piece so that all are alike and, if a frame is, below the limit of bytes."""
    num_pieces = -(-num_frames // max(1, limit // bytes_per_frame))
    return -(-num_frames // num_pieces)


def cut(input_values: Tensor, num_frames: int, piece_frames: int, hop: int, receptive_field: int) -> Tensor:
    """
    Cut waveforms (B, S) into pieces (P, samples), those of an utterance one after another.

    A piece has the samples of `piece_frames` frames and what their last taps see of the next piece, rounded up to
    whole hops; after the end of the utterance it has zeros.
    """
    num_pieces = 1 if piece_frames == num_frames else -(-num_frames // piece_frames)
    samples = (piece_frames + -(-max(receptive_field - hop, 0) // hop)) * hop
    needed = (num_pieces - 1) * piece_frames * hop + samples
    input_values = nn.functional.pad(input_values, (0, needed - input_values.shape[1]))
    return input_values if num_pieces == 1 else input_values.unfold(1, samples, piece_frames * hop).flatten(0, 1)


def lay_end_to_end(
    input_values: Tensor, lengths: Sequence[int], hop: int, receptive_field: int
) -> tuple[Tensor, Tensor]:
    """
    Join waveforms (B, S) with padding to one (1, samples) without, and tell where its frames are, int64 (M,).

    Each of `lengths` frames brings the samples that it sees, rounded up to whole hops; frames that see two utterances
    are left out.
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
