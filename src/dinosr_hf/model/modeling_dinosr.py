# Copyright 2026 The dinosr-hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
DinoSR (arXiv 2305.10005) for PyTorch, from the waveform to the loss.

The file runs in the order of the data: front end, projection, mask, encoder, teacher, targets, codebooks, prediction
heads, loss; then units and features of unmasked speech; then the heads of fine-tuning. Layers do what their `forward`
says; on CPUs `fast_cpu_dinosr` has faster equivalents, used where its guard `may_use_fast_forms` allows.

`B` batch, `S` samples, `T` frames, `C` channels of the front end or classes, `D` hidden size, `H` attention heads of
`E` dimensions, `N` codebooks, `V` codewords, `M` masked frames, `L` layers that a caller asks for or labels.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    CausalLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
    Wav2Vec2BaseModelOutput,
    XVectorOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput, TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .codebook_dinosr import OnlineCodebooks, perplexity, without_autocast
from .configuration_dinosr import (
    MEL_HOP,
    MEL_WINDOW,
    MELS_PER_FRAME,
    NUM_MELS,
    SAMPLING_RATE,
    DinoSRConfig,
    Length,
)
from .fast_cpu_dinosr import (
    SixteenBitDropout,
    ValidFrames,
    can_convolve,
    convolve,
    convolve_same_length,
    may_use_fast_forms,
    packed_attention_forward,
    valid_frames,
)
from .masking_dinosr import numpy_generator, sample_span_mask, sample_spec_augment

# Exceptions from transformers' model linter. TRF057: @auto_docstring is for files inside of transformers, and these
# docstrings state shapes and errors. TRF013: heads call post_init after their own layers. TRF032: -1e4 is a logit, no
# mask. TRF041: these fields differ by run or head, not by the architecture of a checkpoint.
# trf-ignore: TRF041 reference_padding, freeze_mode, apply_spec_augment, freeze_teacher_step, use_weighted_layer_sum
# trf-ignore: TRF041 num_anchor_labels

# The automatic classes of transformers and our models; a saved folder's `auto_map` is made of it.
AUTO_CLASSES = {
    "AutoModel": "DinoSRModel",
    "AutoModelForPreTraining": "DinoSRForPreTraining",
    "AutoModelForCTC": "DinoSRForCTC",
    "AutoModelForAudioClassification": "DinoSRForSequenceClassification",
    "AutoModelForAudioFrameClassification": "DinoSRForAudioFrameClassification",
    "AutoModelForAudioXVector": "DinoSRForXVector",
}

SOURCES = ("student", "teacher", "student_feed_forward")  # of features
UNIT_SOURCES = ("student", "teacher", "anchor")
NO_UNIT = -1  # the unit of a padded frame


@dataclass
class DinoSRModelOutput(Wav2Vec2BaseModelOutput):  # trf-ignore: TRF057
    """
    Output of `DinoSRModel`.

    Attributes:
        last_hidden_state: (B, T, D), the last layer's output.
        extract_features: (B, T, C), the normalised output of the front end.
        feed_forward_outputs: On request, a tuple of (B, T, D): the output of the layers' feed-forward networks.
        hidden_states: On request, the first layer's input and each layer's output, (B, T, D) each.
        attentions: On request, (B, heads, T, T) a layer; empty unless the model has `attn_implementation="eager"`.
    """

    feed_forward_outputs: tuple[torch.Tensor, ...] | None = None


@dataclass
class DinoSRForPreTrainingOutput(ModelOutput):  # trf-ignore: TRF057
    """
    Output of `DinoSRForPreTraining`. Fields about masked frames are None if nothing was masked.

    Attributes:
        loss: Scalar, nats: `codebook_loss`, or with `anchor_labels` `anchored_loss` of it and `anchor_losses`.
        codebook_loss: Scalar, nats: cross entropy of student and codes, mean over masked frames and codebooks.
        codebook_losses: float32 (N,), nats, mean over masked frames, without gradient.
        num_masked_frames: int64 scalar, `M`.
        target_perplexity: float32 (N,), effective number of codewords of the targets, 1 to V: the exponential of the
            entropy of their distribution.
        prediction_perplexity: float32 (N,), the same for the student's mean prediction.
        num_active_codewords: int64 (N,), codewords that at least one masked frame is assigned to.
        codes: int64 (N, M), the codeword of each masked frame, in the order of (batch, time).
        last_hidden_state: (B, T, D), the student's output.
        hidden_states: On request, the student's: the first layer's input and each layer's output, (B, T, D) each.
        attentions: On request, the student's, as in `DinoSRModelOutput`.
        anchor_losses: float32 (2,), nats, None without `anchor_labels`: cross entropy of the anchor's head and the
            labels, mean over masked and over unmasked frames with a label; 0 where there is none.

    To add up over micro-batches and processes:
        code_counts: int64 (N, V), masked frames of each codeword.
        prediction_sums: float32 (N, V), the student's probabilities summed over masked frames.
        target_energies: float32 (N, 2), `energy_sums` of the teacher's layers before the instance norm.
        feature_energies: float32 (2,), `energy_sums` of the student's `extract_features`.
        num_anchor_frames: int64 (2,), masked and unmasked frames with a label; None without `anchor_labels`.
        num_anchor_hits: int64 (2,), those of them whose label is the most probable one; likewise.
    """

    loss: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None
    codebook_losses: torch.Tensor | None = None
    num_masked_frames: torch.Tensor | None = None
    target_perplexity: torch.Tensor | None = None
    prediction_perplexity: torch.Tensor | None = None
    num_active_codewords: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    code_counts: torch.Tensor | None = None
    prediction_sums: torch.Tensor | None = None
    target_energies: torch.Tensor | None = None
    feature_energies: torch.Tensor | None = None
    anchor_losses: torch.Tensor | None = None
    num_anchor_frames: torch.Tensor | None = None
    num_anchor_hits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def check_input(config: DinoSRConfig, input_values: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raise `ValueError` unless these are waveforms (B, S) of at least a frame, with an attention mask (B, S)."""
    if input_values.dim() != 2:
        raise ValueError(
            f"input_values has shape {tuple(input_values.shape)}, but must be (batch, samples): 16 kHz audio, one"
            " channel. Use the feature extractor to make it."
        )
    if config.num_frames(input_values.shape[1]) < 1:
        raise ValueError(
            f"input_values has {input_values.shape[1]} samples, too few for a single frame, which sees"
            f" {config.receptive_field}. Pad the batch or leave out utterances this short."
        )
    if attention_mask is not None and attention_mask.shape != input_values.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but must be (batch, samples) ="
            f" {tuple(input_values.shape)}: 1 for samples, 0 for padding, in samples and not in frames."
        )


# Front end


class DinoSRConvLayer(GradientCheckpointingLayer):
    """Convolution without padding, layer norm over channels, activation."""

    def __init__(self, config: DinoSRConfig, layer_id: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            config.conv_dim[layer_id - 1] if layer_id > 0 else 1,
            config.conv_dim[layer_id],
            kernel_size=config.conv_kernel[layer_id],
            stride=config.conv_stride[layer_id],
            bias=config.conv_bias,
        )
        self.layer_norm = nn.LayerNorm(config.conv_dim[layer_id])
        self.activation = ACT2FN[config.feat_extract_activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, T) to (B, C, T), T shorter."""
        hidden_states = self.conv(hidden_states)
        hidden_states = self.layer_norm(hidden_states.transpose(1, 2))
        return self.activation(hidden_states).transpose(1, 2)


class DinoSRFeatureEncoder(nn.Module):
    """Convolutions that make 50 frames a second of 16,000 samples."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_layers = nn.ModuleList(DinoSRConvLayer(config, i) for i in range(len(config.conv_dim)))

    def forward(self, input_values: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, S) to (B, C, T), zero outside of `frame_mask`, bool (B, T), unless `reference_padding` is set."""
        if self.config.reference_padding:
            frame_mask = None
        recompute = self.training and getattr(self.conv_layers[0], "gradient_checkpointing", False)
        if may_use_fast_forms(input_values, self) and can_convolve(self.conv_layers):
            num_frames, field = self.config.num_frames(input_values.shape[1]), self.config.receptive_field
            features = convolve(self.conv_layers, input_values, num_frames, field, frame_mask, recompute=recompute)
            return features.transpose(1, 2)
        weight = next(self.parameters(), input_values)
        dtype = weight.dtype if weight.is_floating_point() else input_values.dtype
        hidden_states = input_values[:, None].to(dtype)  # (B, 1, S)
        if recompute and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            hidden_states.requires_grad_()  # reentrant checkpointing needs an input that does
        for conv_layer in self.conv_layers:
            hidden_states = conv_layer(hidden_states)
        return hidden_states if frame_mask is None else hidden_states.masked_fill(~frame_mask[:, None], 0.0)


def _moments_over_time(
    hidden_states: torch.Tensor, frame_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (..., B, T, D) to mean and variance over valid frames, (..., B, 1, D) each."""
    if frame_mask is None:
        variance, mean = torch.var_mean(hidden_states, dim=-2, correction=0, keepdim=True)
        return mean, variance
    weight = frame_mask[..., None].float()  # (B, T, 1)
    weight = weight / weight.sum(dim=-2, keepdim=True).clamp(min=1.0)
    mean = (hidden_states * weight).sum(dim=-2, keepdim=True)
    return mean, ((hidden_states - mean).square() * weight).sum(dim=-2, keepdim=True)


def normalize_over_time(hidden_states: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Apply the instance norm: zero mean and unit variance over the frames of each utterance and channel (Section 3.1).

    (..., B, T, D) to float32 of that shape; `frame_mask` is bool (B, T), True for frames, or None without padding.
    """
    hidden_states = hidden_states.float()
    mean, variance = _moments_over_time(hidden_states, frame_mask)
    return (hidden_states - mean) * torch.rsqrt(variance + 1e-5)


class DinoSRLogMelEncoder(nn.Module):
    """
    Log mel energies in place of the convolutions: 80 every 10 ms, two to a frame, normalised over the utterance.

    Windows of 25 ms and triangular filters on the mel scale of O'Shaughnessy (1987), from 20 Hz to 8 kHz. Without
    weights and in float32 whatever the model's dtype; window and filters are made in `forward`, because neither a
    weight that must stay in float32 nor a buffer survives what is done to models (`bfloat16()`, the meta device).
    """

    _FFT_LENGTH = 512
    _LOWEST_FREQUENCY = 20.0
    # For waveforms of unit variance, energies well below this are noise between words.
    _FLOOR = 1e-2

    def _mel_filters(self, device: torch.device) -> torch.Tensor:
        """float32 (257, 80) for bins from 0 Hz to half the sampling rate; each filter rises to 1 and falls to 0."""
        highest, num_bins = SAMPLING_RATE / 2, self._FFT_LENGTH // 2 + 1
        mels = 2595 * torch.log10(1 + torch.linspace(0, highest, num_bins, dtype=torch.float32, device=device) / 700)
        first, last = (2595 * math.log10(1 + frequency / 700) for frequency in (self._LOWEST_FREQUENCY, highest))
        centres = torch.linspace(first, last, NUM_MELS + 2, dtype=torch.float32, device=device)
        distance = (mels[:, None] - centres[1:-1]).abs() / (centres[1] - centres[0])
        return (1 - distance).clamp(min=0)

    def energies(self, input_values: torch.Tensor) -> torch.Tensor:
        """(B, S) to float32 (B, T, 160), not yet normalised."""
        with without_autocast(input_values.device):
            windows = input_values.float().unfold(-1, MEL_WINDOW, MEL_HOP)  # (B, 2 T or one more, 400)
            windows = windows * torch.hann_window(MEL_WINDOW, dtype=torch.float32, device=windows.device)
            spectrum = torch.fft.rfft(windows, n=self._FFT_LENGTH)
            power = spectrum.real.square() + spectrum.imag.square()  # (B, 2 T or one more, 257)
            energies = (power @ self._mel_filters(power.device) + self._FLOOR).log()  # (B, 2 T or one more, 80)
            # Two windows a frame, by `unfold`, whose length torch.export knows to be `num_frames`.
            return torch.cat(energies.unfold(1, MELS_PER_FRAME, MELS_PER_FRAME).unbind(-1), dim=-1)  # (B, T, 160)

    def forward(self, input_values: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, S) to float32 (B, 160, T), zero outside of `frame_mask`, bool (B, T)."""
        frames = normalize_over_time(self.energies(input_values), frame_mask).transpose(1, 2)
        return frames if frame_mask is None else frames.masked_fill(~frame_mask[:, None], 0.0)


def make_feature_encoder(config: DinoSRConfig) -> DinoSRFeatureEncoder | DinoSRLogMelEncoder:
    """Return the front end that `feature_encoder` names."""
    # CODEPATH: "log_mel" for checkpoints of small models (docs/parity.md, D9), "conv" for the paper's and all others.
    return DinoSRLogMelEncoder() if config.feature_encoder == "log_mel" else DinoSRFeatureEncoder(config)


# Projection


def apply_dropout(signal: torch.Tensor, probability: float) -> torch.Tensor:
    """Set elements to zero with this probability, and scale the others so that the mean stays."""
    if probability == 0:
        return signal
    if may_use_fast_forms(signal):
        return SixteenBitDropout.apply(signal, probability)
    return nn.functional.dropout(signal, probability)


class DinoSRDropout(nn.Dropout):
    """`torch.nn.Dropout`, by `apply_dropout`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Any shape to the same; in evaluation the input itself."""
        return apply_dropout(input, self.p if self.training else 0.0)


class DinoSRLinear(nn.Linear):
    """The projection and the prediction heads: initialised as torch does it (docs/parity.md, D7)."""


class DinoSRFeatureProjection(nn.Module):
    """Layer norm (none after log-mel frames), projection to the transformer's width, dropout."""

    layer_norm: nn.Module

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        # CODEPATH: "conv" checkpoints have the norm, "log_mel" ones do not: their frames are normalised over time, and
        # over channels too they would lose their loudness.
        if config.feature_encoder == "log_mel":
            self.layer_norm = nn.Identity()
        else:
            self.layer_norm = nn.LayerNorm(config.feature_size, eps=config.layer_norm_eps)
        self.projection = DinoSRLinear(config.feature_size, config.hidden_size)
        self.dropout = DinoSRDropout(config.feat_proj_dropout)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, C) to projected (B, T, D) and normalised (B, T, C)."""
        weight = next(self.parameters(), features)
        if weight.is_floating_point():
            features = features.to(weight.dtype)  # mel energies are float32 whatever the model is
        features = self.layer_norm(features)
        return self.dropout(self.projection(features)), features


# Encoder


def zero_padding(hidden_states: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """Set (B, T, D) to zero outside of `frame_mask`, bool (B, T); None: all frames are valid."""
    if frame_mask is None:
        return hidden_states
    frame_mask = frame_mask.to(hidden_states.device)  # `device_map` may have put this layer on another
    return hidden_states.masked_fill(~frame_mask[..., None], 0.0)


class PaddedFrames:
    """The frames of a batch as they are, padding included; the plain form of `fast_cpu_dinosr.ValidFrames`."""

    def __init__(self, frame_mask: torch.Tensor | None = None) -> None:
        self.frame_mask = frame_mask  # bool (B, T), True for frames; None: no padding, or padding that counts

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, T, D), what layers compute on: all of it."""
        return padded

    def unpack(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, D), zero in the padding."""
        return zero_padding(frames, self.frame_mask)


class DinoSRPositionalConv(nn.Conv1d):
    """A positional convolution: initialised as torch does it (docs/parity.md, D7)."""


class DinoSRPositionalConvLayer(nn.Module):
    """Grouped convolution of the same length, layer norm without weights, activation."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        # Not in the configuration: transformers' common tests vary hidden_size alone.
        if config.hidden_size % config.num_conv_pos_embedding_groups:
            raise ValueError(
                f"num_conv_pos_embedding_groups={config.num_conv_pos_embedding_groups} does not divide"
                f" hidden_size={config.hidden_size}. Change one of them."
            )
        self.conv = DinoSRPositionalConv(
            config.hidden_size,
            config.hidden_size,
            kernel_size=config.conv_pos_kernel_size,
            padding=config.conv_pos_kernel_size // 2,
            groups=config.num_conv_pos_embedding_groups,
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size, elementwise_affine=False)
        self.activation = ACT2FN[config.feat_extract_activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        if type(self.conv) is DinoSRPositionalConv and may_use_fast_forms(hidden_states, self):
            hidden_states = convolve_same_length(self.conv, hidden_states)
        else:
            num_frames = hidden_states.shape[1]
            hidden_states = self.conv(hidden_states.transpose(1, 2))[..., :num_frames].transpose(1, 2)
        return self.activation(self.layer_norm(hidden_states))


class DinoSRPositionalConvEmbedding(nn.Module):
    """Relative positions by stacked convolutions over time."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DinoSRPositionalConvLayer(config) for _ in range(config.num_conv_pos_embeddings))

    def forward(self, hidden_states: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, D) to (B, T, D); outside of `frame_mask`, bool (B, T), it is zero before and after every layer."""
        hidden_states = zero_padding(hidden_states, frame_mask)
        for layer in self.layers:
            hidden_states = zero_padding(layer(hidden_states), frame_mask)
        return hidden_states


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
    """Attention written out: query, key, value (B, H, T, E) to (B, T, H, E) and weights (B, H, T, T)."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = apply_dropout(scores.softmax(dim=-1), dropout if module.training else 0.0)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class DinoSRAttention(nn.Module):
    """Multi-head self-attention, by the implementation of transformers that the configuration names."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.is_causal = False
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        frames: PaddedFrames | ValidFrames | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) to (B, T, D) and, where the implementation returns them, weights (B, H, T, T)."""
        heads_last = (*hidden_states.shape[:-1], -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(heads_last).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(heads_last).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(heads_last).transpose(1, 2)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if isinstance(frames, ValidFrames):
            attention_interface, kwargs = packed_attention_forward, {"frames": frames}
        output, weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(output.flatten(2)), weights


class DinoSRFeedForward(nn.Module):
    """Two linear layers. The teacher's targets are made of their output; dropout comes after it."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]
        self.intermediate_dropout = DinoSRDropout(config.activation_dropout)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        hidden_states = self.intermediate_act_fn(self.intermediate_dense(hidden_states))
        return self.output_dense(self.intermediate_dropout(hidden_states))


class DinoSREncoderLayer(GradientCheckpointingLayer):
    """A transformer layer with the norms after the residuals."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.layerdrop = config.layerdrop
        self.attention = DinoSRAttention(config)
        self.dropout = DinoSRDropout(config.hidden_dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = DinoSRFeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        frames: PaddedFrames | ValidFrames | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Run the layer; in training it is skipped with probability `layerdrop`.

        Args:
            hidden_states: (B, T, D).
            attention_mask: Mask of the attention implementation.
            frames: The frames to compute; the output is zero in their padding. None: all.
            **kwargs: For the attention implementation.

        Returns:
            The layer's output (B, T, D) and, as `frames` packs it, the feed-forward network's before dropout and
            residual.
        """
        frames = frames or PaddedFrames()
        layer_input, hidden_states = hidden_states, frames.pack(hidden_states)
        attention_output, _ = self.attention(hidden_states, attention_mask, frames, **kwargs)
        hidden_states = self.layer_norm(hidden_states + self.dropout(attention_output))
        feed_forward_output = self.feed_forward(hidden_states)
        hidden_states = self.final_layer_norm(hidden_states + self.dropout(feed_forward_output))
        hidden_states = frames.unpack(hidden_states)
        if self.training and self.layerdrop > 0:
            # Computed and thrown away, not left out: every parameter gets a gradient in every process, and
            # torch.compile sees no branch.
            keep = torch.rand((), device=hidden_states.device) >= self.layerdrop
            hidden_states = torch.where(keep, hidden_states, layer_input.to(hidden_states.dtype))
        return hidden_states, feed_forward_output


class LayerOutput(NamedTuple):
    """Outputs of a transformer layer and of the feed-forward network in it, each (B, T, D)."""

    hidden_states: torch.Tensor
    feed_forward: torch.Tensor


class DinoSREncoder(nn.Module):
    """Positions and transformer layers."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.config = config
        self.pos_conv_embed = DinoSRPositionalConvEmbedding(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = DinoSRDropout(config.hidden_dropout)
        self.layers = nn.ModuleList(DinoSREncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: torch.Tensor,
        frame_mask: torch.Tensor | None = None,
        return_layers: Sequence[int] = (),
        num_layers: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[int, LayerOutput]]:
        """
        Encode projected features.

        Args:
            hidden_states: (B, T, D).
            frame_mask: bool (B, T), True for frames, False for padding; None: no padding.
            return_layers: Numbers of layers, from 1, whose outputs to return.
            num_layers: Number of layers to compute; None: all.
            **kwargs: For the attention implementation.

        Returns:
            The last layer's output (B, T, D), and the outputs of each of `return_layers`, zero in the padding unless
            `reference_padding` is set.
        """
        # The authors zero the padding once, so it leaks into valid frames at every further convolution. SpidR's
        # reference zeroes it in the positional convolutions alone.
        is_reference, is_spidr = self.config.reference_padding, self.config.head_input == "own_layer"
        input_mask = None if is_reference and is_spidr else frame_mask
        position_mask = None if is_reference and not is_spidr else frame_mask
        layer_mask = None if is_reference else frame_mask
        hidden_states = zero_padding(hidden_states, input_mask)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=frame_mask
        )
        hidden_states = hidden_states + self.pos_conv_embed(hidden_states, position_mask)
        hidden_states = self.dropout(self.layer_norm(hidden_states))

        frames: PaddedFrames | ValidFrames = PaddedFrames(layer_mask)
        wants_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        if may_use_fast_forms(hidden_states, self) and not wants_attentions:
            has_dropout = self.training and self.config.attention_dropout > 0
            frames = valid_frames(self.config, hidden_states, layer_mask, attention_mask, has_dropout) or frames
        layer_outputs = {}
        for number, layer in enumerate(self.layers, start=1):
            hidden_states, feed_forward_output = layer(hidden_states, attention_mask, frames, **kwargs)
            if number in return_layers:
                layer_outputs[number] = LayerOutput(hidden_states, frames.unpack(feed_forward_output))
            if number == num_layers:
                break
        return hidden_states, layer_outputs


# Teacher


class DinoSRTeacher(DinoSREncoder):
    """
    The student's encoder, averaged over updates (paper, Section 3.1). Always in evaluation mode, without gradients.

    With `freeze_mode="copied"` it has copies of convolutions and projection, which follow the student's until the
    freeze.
    """

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.feature_extractor: DinoSRFeatureEncoder | DinoSRLogMelEncoder | None = None
        self.feature_projection: DinoSRFeatureProjection | None = None
        if config.freeze_mode == "copied":
            self.feature_extractor = make_feature_encoder(config)
            self.feature_projection = DinoSRFeatureProjection(config)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "DinoSRTeacher":
        """Stay in evaluation mode."""
        return self

    def front_end_features(
        self, input_values: torch.Tensor, frame_mask: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """(B, S) to features (B, T, D) by the teacher's own front end; None if it has none."""
        if self.feature_extractor is None or self.feature_projection is None:
            return None
        features, _ = self.feature_projection(self.feature_extractor(input_values, frame_mask).transpose(1, 2))
        return features

    def reinitialized_parameters(self) -> set[nn.Parameter]:
        """Return the parameters that do not begin as the student's, by `teacher_init`."""
        # CODEPATH: "random" for SpidR's checkpoints, "student" for all others.
        if self.config.teacher_init == "student":
            return set()
        drawn = ("attention.", "feed_forward.")
        return {p for layer in self.layers for name, p in layer.named_parameters() if name.startswith(drawn)}

    def parameter_pairs(self, student: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Pair each parameter of the teacher with that of a student, a `DinoSRModel`."""
        theirs = dict(student.named_parameters())
        for name, parameter in self.named_parameters():
            yield parameter, theirs[name] if name in theirs else theirs[f"encoder.{name}"]

    @torch.no_grad()
    def ema_update(self, encoder: DinoSREncoder, decay: float) -> None:
        """
        Average the layers, keeping `decay` of the old; copy the positional convolutions (docs/parity.md, T4).

        Raises `ValueError` if the teacher has adapters, is trained, or has too low a precision for an average.
        """
        averaged = (*self.layers.parameters(), *self.layer_norm.parameters())
        followed = (*encoder.layers.parameters(), *encoder.layer_norm.parameters())
        if len(averaged) != len(followed) or any(parameter.requires_grad for parameter in averaged):
            raise ValueError(
                "The teacher has trainable parameters, or other ones than the student, as adapters make them, but it"
                " is the student's average. Merge the adapters first, and leave the teacher's requires_grad False."
            )
        if averaged[0].dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"The model's dtype is {averaged[0].dtype}, in which steps of 1 - {decay:g} are rounded away: the"
                " teacher would hardly move. Load it with dtype=torch.float32, and train with autocast."
            )
        torch._foreach_lerp_(averaged, followed, 1 - decay)
        torch._foreach_copy_(tuple(self.pos_conv_embed.parameters()), tuple(encoder.pos_conv_embed.parameters()))

    @torch.no_grad()
    def copy_front_end(self, extractor: nn.Module, projection: nn.Module) -> None:
        """Copy the student's convolutions and projection if the teacher has its own (docs/parity.md, T8)."""
        if self.feature_extractor is not None and self.feature_projection is not None:
            own = (*self.feature_extractor.parameters(), *self.feature_projection.parameters())
            torch._foreach_copy_(own, (*extractor.parameters(), *projection.parameters()))


def fill_front_end_copies(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """
    Fill in the teacher's copies of the front end, equal to the student's, where a state dict lacks them.

    A pre-hook of `load_state_dict` of `DinoSRForPreTraining`; it changes nothing for models without copies.
    """
    for part in ("feature_extractor.", "feature_projection."):
        if getattr(module.teacher, part[:-1]) is not None:
            student = {key: value for key, value in state_dict.items() if key.startswith(f"{prefix}dinosr.{part}")}
            for key, value in student.items():
                state_dict.setdefault(f"{prefix}teacher.{key[len(prefix) + len('dinosr.') :]}", value)


# Targets


@torch.no_grad()
def energy_sums(hidden_states: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Measure how much of the energy of features changes over time, as sums that add up over batches.

    (..., B, T, D) to float32 (..., 2): squared distances from the mean of each utterance and channel, and squares,
    each summed over utterances, frames and channels. Their ratio is 1 for features with zero mean over each utterance,
    and 0 if all frames of an utterance are alike, which an instance norm hides.
    """
    mean, variance = _moments_over_time(hidden_states.float(), frame_mask)
    energies = torch.stack((variance, variance + mean.square()), dim=-1).sum(dim=-2)  # (..., B, 1, 2)
    num_frames = hidden_states.shape[-2] if frame_mask is None else frame_mask.sum(dim=-1)[:, None, None]
    return (energies * num_frames).sum(dim=(-3, -2))


# Loss


def masked_prediction_losses(logits: torch.Tensor, codes: torch.Tensor) -> DinoSRForPreTrainingOutput:
    """
    Score the student's predictions of the codes, for all codebooks at once (paper, equation 6).

    Args:
        logits: (N, M, V), the student's predictions at masked frames; scored in float32.
        codes: int64 (N, M), the teacher's codewords at these frames.

    Returns:
        An output with losses, perplexities and counts; only `loss`, which is `codebook_loss`, has a gradient. Without
        a masked frame the loss is 0, still with a gradient, so that no process waits for another.
    """
    num_masked_frames = codes.shape[1]
    log_probs = logits.float().log_softmax(dim=-1)
    losses = -log_probs.gather(-1, codes[..., None]).squeeze(-1)  # (N, M)
    codebook_losses = losses.sum(dim=1) / max(num_masked_frames, 1)
    log_probs = log_probs.detach()
    code_counts = codes.new_zeros(log_probs.shape[0], log_probs.shape[2])
    code_counts.scatter_add_(1, codes, torch.ones_like(codes))
    prediction_sums = log_probs.exp().sum(dim=1)
    loss = codebook_losses.mean()
    return DinoSRForPreTrainingOutput(
        loss=loss,
        codebook_loss=loss,
        codebook_losses=codebook_losses.detach(),
        num_masked_frames=codes.new_full((), num_masked_frames),  # made on the device, without a host synchronisation
        target_perplexity=perplexity(code_counts),
        prediction_perplexity=perplexity(prediction_sums),
        num_active_codewords=(code_counts > 0).sum(dim=-1),
        codes=codes,
        code_counts=code_counts,
        prediction_sums=prediction_sums,
    )


def anchor_losses(
    logits: torch.Tensor, labels: torch.Tensor, is_masked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Score the predictions of frame labels from outside, of masked and of unmasked frames apart.

    Args:
        logits: (B, T, A), scored in float32.
        labels: int64 (B, T), negative where there is none.
        is_masked: bool (B, T).

    Returns:
        float32 (2,), nats, the mean over masked and over unmasked frames with a label, 0 without one but still with a
        gradient; and int64 (2,) each, the numbers of these frames and of those with the most probable label.
    """
    parts = torch.stack([is_masked, ~is_masked]) & (labels >= 0)  # (2, B, T)
    log_probs = logits.float().log_softmax(dim=-1)
    losses = -log_probs.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)  # (B, T)
    num_frames = parts.sum(dim=(1, 2))
    means = (losses * parts).sum(dim=(1, 2)) / num_frames.clamp(min=1)
    is_hit = log_probs.detach().argmax(dim=-1) == labels
    return means, num_frames, (parts & is_hit).sum(dim=(1, 2))


def anchored_loss(
    codebook_loss: torch.Tensor, losses: torch.Tensor, num_codebooks: int, weight: float, unmasked_share: float
) -> torch.Tensor:
    """
    Combine the codebooks' loss, a scalar, and `anchor_losses`, float32 (2,), to a scalar, all in nats.

    (N L + w ((1 - u) A_masked + u A_unmasked)) / (N + w): the anchor counts as `weight` codebooks, and unmasked frames
    as `unmasked_share` of the anchor (docs/parity.md, D10).
    """
    masked, unmasked = losses
    anchor = (1 - unmasked_share) * masked + unmasked_share * unmasked
    return (num_codebooks * codebook_loss + weight * anchor) / (num_codebooks + weight)


def check_anchor_labels(config: DinoSRConfig, labels: torch.Tensor, shape: Sequence[int]) -> None:
    """Raise `ValueError` unless these are labels (B, T) of a model with an anchor; values are checked on CPUs only."""
    if config.num_anchor_labels == 0:
        raise ValueError(
            "anchor_labels are given, but num_anchor_labels=0: the model has no head for them. Set num_anchor_labels"
            " in its configuration, or leave anchor_labels out."
        )
    if labels.is_floating_point():
        raise ValueError(f"anchor_labels has dtype {labels.dtype}, but labels are integers. Give them as int64.")
    if labels.shape != shape:
        raise ValueError(
            f"anchor_labels has shape {tuple(labels.shape)}, but must be (batch, frames) = {tuple(shape)}."
        )
    # Elsewhere the check would wait for the device.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.max() >= config.num_anchor_labels:
        raise ValueError(
            f"anchor_labels has the value {int(labels.max())}, but num_anchor_labels={config.num_anchor_labels}. Give"
            " labels below it, and -100 to frames without one."
        )


def check_layers(config: DinoSRConfig, layers: Sequence[int], *, with_codebooks: bool) -> list[int]:
    """Return numbers of layers, from 1, as ints; raise `ValueError` for none, and where there is no such layer."""
    known = config.codebook_layers if with_codebooks else range(1, config.num_hidden_layers + 1)
    found = [int(layer) for layer in layers]
    unknown = [layer for layer in found if layer not in known]
    if unknown or not found:
        what = "has no codebook" if with_codebooks else "does not exist"
        wrong = f"layer={unknown[0]} {what}" if unknown else "layers is empty"
        kind = "Layers with a codebook" if with_codebooks else "Layers of this model"
        raise ValueError(f"{wrong}. {kind}: {', '.join(map(str, known))}.")
    return found


def check_source(source: str, sources: Sequence[str] = SOURCES) -> None:
    """Raise `ValueError` unless `source` is one of `sources`."""
    if source not in sources:
        raise ValueError(f"source={source!r} is unknown. Choose one of {', '.join(sources)}.")


def check_unit_layers(config: DinoSRConfig, layers: Sequence[int], source: str) -> list[int]:
    """Return numbers of layers with units of a source, from 1; raise `ValueError` where there is none."""
    check_source(source, UNIT_SOURCES)
    if source != "anchor":
        return check_layers(config, layers, with_codebooks=True)
    if config.num_anchor_labels == 0:
        raise ValueError(
            "source='anchor' is unknown to this model: it was made with num_anchor_labels=0. Choose one of"
            f" {', '.join(config.unit_sources)}."
        )
    found, last = [int(layer) for layer in layers], config.num_hidden_layers
    if found != [last]:
        raise ValueError(f"source='anchor' has units on the last layer alone, but layers={found}. Give {last}.")
    return found


def without_tf32() -> AbstractContextManager[None]:
    """Convolve in full precision on GPUs: TF32, which torch takes by default, moves frames to other units."""
    now = torch.backends.cudnn
    return now.flags(now.enabled, now.benchmark, now.benchmark_limit, now.deterministic, allow_tf32=False)


# Models


class DinoSRPreTrainedModel(PreTrainedModel):  # trf-ignore: TRF057
    """Base class of the DinoSR models: names, initialisation, frame counts, freezing."""

    config_class = DinoSRConfig
    config: DinoSRConfig
    base_model_prefix = "dinosr"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    # Otherwise `Trainer` takes our losses, means over a batch, for shares of an accumulated one, and adds them up.
    accepts_loss_kwargs = False
    _no_split_modules = ["DinoSREncoderLayer"]
    _can_record_outputs = {
        "hidden_states": DinoSREncoderLayer,
        "attentions": OutputRecorder(DinoSRAttention, index=1, layer_name="encoder"),
    }
    # A pre-training checkpoint loads into every head without a report of these.
    _keys_to_ignore_on_load_unexpected = [r"^teacher\.", r"^codebooks\.", r"^heads\.", r"^anchor_head\."]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside of transformers, `_init_weights` would not see modules without parameters of their own, such
        # as the pre-training model, which copies the student to the teacher. It respects weights that were loaded.
        super()._initialize_weights(module, is_custom_code=False)

    def enable_input_require_grads(self) -> None:
        """Let gradients reach the adapters in checkpointed layers, as PEFT asks for where all else is frozen."""

        def require_grad(module: nn.Module, inputs: tuple) -> None:
            inputs[0].requires_grad_(True)

        encoders = [module for module in self.modules() if isinstance(module, DinoSREncoder)]
        self._require_grads_hooks = [encoder.register_forward_pre_hook(require_grad) for encoder in encoders]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DinoSRLinear | DinoSRPositionalConv):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.Conv1d):
            init.kaiming_normal_(module.weight)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, DinoSRAttention):
            # CODEPATH: "xavier" for SpidR's checkpoints, "normal" for all others.
            if self.config.attention_init == "xavier":
                bound = math.sqrt(3 / 4 / self.config.hidden_size)  # of a matrix (3 D, D), with a gain of 1 / sqrt(2)
                for projection in (module.q_proj, module.k_proj, module.v_proj):
                    init.uniform_(projection.weight, -bound, bound)
                init.xavier_uniform_(module.out_proj.weight)
        elif isinstance(module, DinoSRModel):
            init.uniform_(module.masked_spec_embed)
        elif isinstance(module, OnlineCodebooks):
            init.copy_(module.sums, module.initial_sums())
            init.ones_(module.counts)
            if module.usage is not None:
                init.ones_(module.usage)
        elif isinstance(module, DinoSRForPreTraining):
            reinitialized_parameters = module.teacher.reinitialized_parameters()
            for own, students in module.teacher.parameter_pairs(module.dinosr):
                if own not in reinitialized_parameters:
                    init.copy_(own, students)
        elif isinstance(module, DinoSRMarginLoss):
            init.normal_(module.weight)
        else:
            super()._init_weights(module)
        if isinstance(module, DinoSRClassifier) and module.layer_weights is not None:
            init.constant_(module.layer_weights, 1 / len(module.layer_weights))

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as every transformers model does, our own classes with an `auto_map` of all heads."""
        if type(self).__module__ != __name__:  # a subclass, whose code is elsewhere
            vars(self.config).pop("auto_map", None)
        elif self._auto_class is not None:
            self.config.auto_map = {auto: f"modeling_dinosr.{name}" for auto, name in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, *args, **kwargs)

    def freeze_feature_encoder(self) -> None:
        """Stop training the convolutions, if there are any, as fine-tuning does from its first update."""
        self.base_model.feature_extractor.requires_grad_(False)

    def freeze_base_model(self) -> None:
        """Stop training everything but the head."""
        self.base_model.requires_grad_(False)

    def _get_feat_extract_output_lengths(self, input_lengths: Length) -> Length:
        """Number of frames of so many samples; the name that transformers' speech pipelines look for."""
        return self.config.num_frames(input_lengths)

    def _get_feature_vector_attention_mask(
        self, feature_vector_length: int, attention_mask: torch.Tensor, add_adapter: bool | None = None
    ) -> torch.Tensor | None:
        """`_frame_mask`, by the name that transformers' `SpeechEncoderDecoderModel` calls."""
        return self._frame_mask(attention_mask, feature_vector_length)

    def _frame_mask(self, attention_mask: torch.Tensor | None, num_frames: int) -> torch.Tensor | None:
        """attention_mask (B, S) to bool (B, T), True for frames, False for padding."""
        if attention_mask is None:
            return None
        lengths = self.config.num_frames(attention_mask.long().sum(dim=-1))
        return torch.arange(num_frames, device=attention_mask.device) < lengths[:, None]


class DinoSRModel(DinoSRPreTrainedModel):  # trf-ignore: TRF057
    """
    The DinoSR encoder: speech in, one feature vector every 20 ms out.

    Args:
        config: A `DinoSRConfig`.
    """

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        config.validate_architecture()  # `from_pretrained` sets overrides without a look at them
        self.feature_extractor = make_feature_encoder(config)
        self.feature_projection = DinoSRFeatureProjection(config)
        self.masked_spec_embed = nn.Parameter(torch.empty(config.hidden_size))
        self.encoder = DinoSREncoder(config)
        self.post_init()

    def _mask_features(
        self, features: torch.Tensor, mask_time_indices: torch.Tensor | None, frame_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Replace masked frames of (B, T, D) by the mask embedding; in fine-tuning, draw the masks."""
        over_channels = None
        if mask_time_indices is not None:
            if mask_time_indices.shape != features.shape[:2]:
                raise ValueError(
                    f"mask_time_indices has shape {tuple(mask_time_indices.shape)}, but must be (batch, frames) ="
                    f" {tuple(features.shape[:2])}. `config.num_frames` gives the number of frames of so many samples."
                )
            mask_time_indices = mask_time_indices.to(features.device, torch.bool)
        elif self.training and self.config.apply_spec_augment:
            lengths = None if frame_mask is None else frame_mask.sum(dim=-1).tolist()
            over_time, over_channels = sample_spec_augment(
                self.config, *features.shape[:2], lengths=lengths, generator=numpy_generator(None)
            )
            mask_time_indices = torch.from_numpy(over_time).to(features.device)
        if mask_time_indices is not None:
            mask_embedding = self.masked_spec_embed.to(features.dtype)
            features = torch.where(mask_time_indices[..., None], mask_embedding, features)
        if over_channels is not None:
            features = features.masked_fill(torch.from_numpy(over_channels).to(features.device)[:, None], 0.0)
        return features

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(  # trf-ignore: TRF057
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        feed_forward_layers: Sequence[int] = (),
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | DinoSRModelOutput:
        """
        Encode a batch of waveforms. An utterance's features do not depend on the padding of its batch.

        Args:
            input_values: (B, S), 16 kHz, each utterance with zero mean and unit variance, padded at the end.
            attention_mask: (B, S), 1 for samples, 0 for padding; None: no padding.
            mask_time_indices: bool (B, T), frames to replace by the mask embedding. It replaces the random masks of
                fine-tuning, those over channels too.
            feed_forward_layers: Numbers of layers, from 1, whose feed-forward network's output to return.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `DinoSRModelOutput`. Layers are zero in the padding unless `reference_padding` is set.

        Raises:
            ValueError: If an input has another shape or is too short for a frame, or there is no such layer.
        """
        check_input(self.config, input_values, attention_mask)
        if feed_forward_layers:
            check_layers(self.config, feed_forward_layers, with_codebooks=False)
        frame_mask = self._frame_mask(attention_mask, self.config.num_frames(input_values.shape[1]))
        features = self.feature_extractor(input_values, frame_mask).transpose(1, 2)
        hidden_states, features = self.feature_projection(features)
        hidden_states = self._mask_features(hidden_states, mask_time_indices, frame_mask)
        hidden_states, layers = self.encoder(hidden_states, frame_mask, feed_forward_layers, **kwargs)
        outputs = tuple(layers[number].feed_forward for number in feed_forward_layers)
        return DinoSRModelOutput(
            last_hidden_state=hidden_states, extract_features=features, feed_forward_outputs=outputs or None
        )


class DinoSRForPreTraining(DinoSRPreTrainedModel):  # trf-ignore: TRF057
    """
    DinoSR's self-distillation: a student predicts, for masked frames, the codewords of the teacher's top layers.

    A training step is one or more `forward` with `backward`, the optimizer's step, and one `update_targets`.
    `encode_units` and `layer_features` look at unmasked speech.

    Args:
        config: A `DinoSRConfig`.

    Attributes:
        dinosr: The student.
        heads: N linear layers from the student, see `head_input`, to V codewords.
        teacher: The student's moving average, equal to it at first.
        codebooks: The codewords, in float32 whatever the dtype of the rest.
        anchor_head: A linear layer from the student's last layer to the anchor's labels; None without an anchor.
    """

    _keep_in_fp32_modules_strict = ["codebooks"]
    # What a run may switch off; all else without a place in the model is reported, such as a teacher's front end.
    _keys_to_ignore_on_load_unexpected = [r"^codebooks\.usage$", r"^anchor_head\."]

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.dinosr = DinoSRModel(config)
        self.heads = nn.ModuleList(
            DinoSRLinear(config.hidden_size, config.codebook_size) for _ in range(config.num_codebooks)
        )
        self.anchor_head = (
            DinoSRLinear(config.hidden_size, config.num_anchor_labels) if config.num_anchor_labels else None
        )
        self.teacher = DinoSRTeacher(config)
        self.codebooks = OnlineCodebooks(
            config.num_codebooks, config.codebook_size, config.hidden_size, config.codebook_revival_share
        )
        self.register_load_state_dict_pre_hook(fill_front_end_copies)
        self.post_init()

    def initialize_weights(self) -> None:
        """Freeze what is not trained: transformers makes every parameter trainable after building and loading."""
        super().initialize_weights()
        self.teacher.requires_grad_(False)
        self.codebooks.requires_grad_(False)
        # CODEPATH: "own_layer" for SpidR's checkpoints, "last_layer" for all others.
        if self.config.head_input == "own_layer" and self.anchor_head is None:
            # No loss reads the student's output: its last norm has no gradient, for which other processes would wait.
            self.dinosr.encoder.layers[-1].final_layer_norm.requires_grad_(False)

    def _sample_mask(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Draw the mask of pre-training, bool (B, T)."""
        samples = torch.ones_like(input_values) if attention_mask is None else attention_mask
        num_samples = samples.long().sum(dim=-1).tolist()
        mask = sample_span_mask(
            (len(input_values), self.config.num_frames(input_values.shape[1])),
            self.config.mask_prob,
            self.config.mask_length,
            min_spans=self.config.mask_min_spans,
            lengths=[self.config.num_frames(n) for n in num_samples],
            generator=numpy_generator(generator),
        )
        return torch.from_numpy(mask).to(input_values.device)

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        masked_frames: torch.Tensor | None = None,
        anchor_labels: torch.Tensor | None = None,
        anchor_weight: float = 2.0,
        anchor_unmasked_share: float = 0.5,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | DinoSRForPreTrainingOutput:
        """
        Mask, encode, predict; in training mode also accumulate sums and counts for `update_targets`.

        Args:
            input_values: (B, S), as for `DinoSRModel`.
            attention_mask: (B, S), 1 for samples, 0 for padding; None: no padding.
            mask_time_indices: bool (B, T), frames to mask and predict; padding is left out. None: drawn here in
                training; in evaluation nothing is masked, and there is no loss.
            generator: Source of the masks drawn here; None: torch's global CPU generator.
            masked_frames: int64 (M,), `mask_time_indices.flatten().nonzero()[:, 0]` without padded frames. Not
                checked; it saves a GPU a host synchronisation. None: computed here.
            anchor_labels: int64 (B, T), labels of frames from outside, below `num_anchor_labels`, -100 where there is
                none: what the anchor's head predicts. None: the loss has no anchor, and its head no gradient, which
                stops DistributedDataParallel: give it -100 for batches without labels.
            anchor_weight: Weight of the anchor in the loss, in codebooks.
            anchor_unmasked_share: Share of unmasked frames in the anchor's loss, 0 to 1.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `DinoSRForPreTrainingOutput`.

        Raises:
            ValueError: If an input, mask or labels have another shape, a label is out of range, or there are labels
                without a mask.
        """
        if mask_time_indices is None and self.training:
            check_input(self.config, input_values, attention_mask)
            mask_time_indices = self._sample_mask(input_values, attention_mask, generator)
        if mask_time_indices is None and anchor_labels is not None:
            raise ValueError(
                "anchor_labels are given without mask_time_indices, but in evaluation mode there is no loss without a"
                " mask. Give both, or neither."
            )
        has_own_inputs = self.config.head_input == "own_layer"
        student = self.dinosr(
            input_values,
            attention_mask,
            mask_time_indices=mask_time_indices,
            feed_forward_layers=self.config.codebook_layers if has_own_inputs else (),
            return_dict=True,
            **kwargs,
        )
        output = DinoSRForPreTrainingOutput()
        if mask_time_indices is not None:
            shape = student.extract_features.shape[:2]
            if anchor_labels is not None:
                check_anchor_labels(self.config, anchor_labels, shape)
            frame_mask = self._frame_mask(attention_mask, shape[1])
            if masked_frames is None:
                masked = mask_time_indices.to(student.extract_features.device, torch.bool)
                masked = masked if frame_mask is None else masked & frame_mask
                masked_frames = masked.flatten().nonzero()[:, 0]
            for_student_only = ("output_hidden_states", "output_attentions")
            teacher_kwargs = {name: value for name, value in kwargs.items() if name not in for_student_only}
            output = self._score_masked(input_values, student, frame_mask, masked_frames, **teacher_kwargs)
            if anchor_labels is not None:
                scored = self._score_anchor(student.last_hidden_state, anchor_labels, mask_time_indices, frame_mask)
                output.anchor_losses, output.num_anchor_frames, output.num_anchor_hits = scored
                weights = (self.config.num_codebooks, anchor_weight, anchor_unmasked_share)
                output.loss = anchored_loss(output.loss, scored[0], *weights)  # type: ignore[arg-type] # it has one
        output.last_hidden_state = student.last_hidden_state
        output.hidden_states = student.hidden_states
        output.attentions = student.attentions
        return output

    def _score_masked(
        self,
        input_values: torch.Tensor,
        student: Any,
        frame_mask: torch.Tensor | None,
        masked_frames: torch.Tensor,
        **kwargs: Any,
    ) -> DinoSRForPreTrainingOutput:
        """
        Predict the codewords that the teacher's layers fall on, from a `DinoSRModelOutput`.

        Returns losses and statistics of the M masked frames.
        """
        targets, target_energies = self._targets(input_values, student.extract_features, frame_mask, **kwargs)
        targets = targets.flatten(1, 2).index_select(1, masked_frames)  # (N, M, D)
        codes = self.codebooks(targets)
        if self.training:
            self.codebooks.accumulate(targets, codes)

        def select(states: torch.Tensor) -> torch.Tensor:
            return states.flatten(0, 1).index_select(0, masked_frames)  # (M, D)

        if student.feed_forward_outputs is not None:  # of the heads' own layers
            predictors = [select(states) for states in student.feed_forward_outputs]
        else:
            predictors = [select(student.last_hidden_state)] * len(self.heads)
        logits = [head(states) for head, states in zip(self.heads, predictors, strict=True)]
        output = masked_prediction_losses(torch.stack(logits), codes)  # (N, M, V)
        output.target_energies = target_energies
        output.feature_energies = energy_sums(student.extract_features, frame_mask)
        return output

    @torch.no_grad()
    def _targets(
        self, input_values: torch.Tensor, features: torch.Tensor, frame_mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's normalised targets (N, B, T, D), and the energies of its layers (N, 2)."""
        projected = self.teacher.front_end_features(input_values, frame_mask)
        if projected is None:
            # Without the projection's dropout, which is the student's alone.
            projected = self.dinosr.feature_projection.projection(features.detach())
        _, layers = self.teacher(projected, frame_mask, return_layers=self.config.codebook_layers, **kwargs)
        outputs = torch.stack([layer.feed_forward for layer in layers.values()])
        del layers  # 2 N features of the batch
        # The authors' statistics include the padding.
        targets = normalize_over_time(outputs, None if self.config.reference_padding else frame_mask)
        return targets, energy_sums(outputs, frame_mask)

    def _score_anchor(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        mask_time_indices: torch.Tensor,
        frame_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `anchor_losses` of the student's last layer (B, T, D), without padding."""
        labels = labels.to(hidden_states.device)
        if frame_mask is not None:
            labels = labels.masked_fill(~frame_mask, -100)
        is_masked = mask_time_indices.to(hidden_states.device, torch.bool)
        logits = self.anchor_head(hidden_states)  # type: ignore[misc] # it exists if the labels are in order
        return anchor_losses(logits, labels, is_masked)

    def compute_targets(
        self,
        input_values: torch.Tensor,
        extract_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Compute what is clustered: the teacher's top N layers, normalised over time (paper, Section 3.1).

        Args:
            input_values, attention_mask: As given to the student.
            extract_features: (B, T, C), the student's output of that name.
            **kwargs: For the attention implementation.

        Returns:
            float32 (N, B, T, D).
        """
        frame_mask = self._frame_mask(attention_mask, extract_features.shape[1])
        return self._targets(input_values, extract_features, frame_mask, **kwargs)[0]

    @torch.no_grad()
    def update_targets(self, step: int, *, moves_teacher: bool = True) -> dict[str, float]:
        """
        Move the teacher and commit the codebooks: once after each step of the optimizer.

        The codebooks take what training forward passes accumulated since the last call, over all processes: every
        process must call this. The teacher's layers move towards the student's by exponential average, its positional
        convolutions are copied (paper, equation 1; docs/parity.md, T2 to T8).

        Args:
            step: Number of updates completed, this one included: 1 after the first.
            moves_teacher: Whether the teacher moves; False: the codebooks alone are updated.

        Returns:
            The decays: `codebook_decay`, used if the codebooks' update is due, and `ema_decay`, 1.0 if the teacher
            does not move.

        Raises:
            ValueError: If `step` is less than 1, or the teacher cannot follow: it has adapters, or half precision.
                Nothing has changed then.
        """
        if step < 1:
            raise ValueError(
                f"step={step} must be at least 1: it is the number of completed optimizer steps, 1 after the first."
            )
        ema_decay = self.config.ema_decay_at(step) if moves_teacher else 1.0
        if ema_decay < 1:
            self.teacher.ema_update(self.dinosr.encoder, ema_decay)  # first, as it may refuse to
        num_steps = self.config.codebook_update_steps
        codebook_decay = self.config.codebook_decay_at(max(0, step - num_steps))
        self.codebooks.commit(codebook_decay, is_due=step % num_steps == 0)
        was_reached = self.config.is_freeze_reached_at(step - 1)
        if not was_reached:  # at the freeze step for the last time (T8)
            self.teacher.copy_front_end(self.dinosr.feature_extractor, self.dinosr.feature_projection)
        self.apply_freeze(step)
        return {"codebook_decay": codebook_decay, "ema_decay": ema_decay}

    def apply_freeze(self, step: int) -> bool:
        """
        Freeze the student's front end, which feeds the teacher, from the step of `freeze_front_end_step` on, or of
        `freeze_teacher_step` if `freeze_mode` is "frozen".

        A resumed run calls this before its first forward.

        Args:
            step: Number of updates completed.

        Returns:
            Whether the front end is frozen.
        """
        frozen = self.config.is_front_end_frozen_at(step)
        if frozen:
            for module in (self.dinosr.feature_extractor, self.dinosr.feature_projection):
                for parameter in module.parameters():
                    parameter.requires_grad_(False)
                    parameter.grad = None  # or the optimizer would go on with its momentum
        return frozen

    # Units and features of unmasked speech

    def _check_unmasked(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, name: str) -> None:
        check_input(self.config, input_values, attention_mask)
        if self.training:
            raise ValueError(
                f"{name} was called in training mode, in which the student has dropout. Call model.eval() first."
            )

    @torch.no_grad()
    def layer_features(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layers: Sequence[int] | None = None,
        source: str = "student",
    ) -> torch.Tensor:
        """
        Compute features of layers; layers above the highest of them are not computed.

        An utterance's features do not depend on the padding of its batch, unless `reference_padding` is set.

        Args:
            input_values: (B, S), as for `DinoSRModel`.
            attention_mask: (B, S) or None.
            layers: Numbers of transformer layers, from 1; None: `DinoSRConfig.default_layer`.
            source: "student": the layer's output, as in `hidden_states`. "student_feed_forward": the output of the
                layer's feed-forward network. "teacher": the same of the teacher, which the codebooks cluster after
                normalising it over time (paper, Section 3.1).

        Returns:
            (L, B, T, D), in the order of `layers`, in the dtype of the model.

        Raises:
            ValueError: If an input, a layer or the source is not one of these, or the model is in training mode.
        """
        check_source(source)
        self._check_unmasked(input_values, attention_mask, "layer_features")
        wanted = [self.config.default_layer(source)] if layers is None else layers
        layers = check_layers(self.config, wanted, with_codebooks=False)
        encoder = self.teacher if source == "teacher" else self.dinosr.encoder
        frame_mask = self._frame_mask(attention_mask, self.config.num_frames(input_values.shape[1]))
        with without_tf32():
            features = self.teacher.front_end_features(input_values, frame_mask) if source == "teacher" else None
            if features is None:
                convolved = self.dinosr.feature_extractor(input_values, frame_mask)
                features, _ = self.dinosr.feature_projection(convolved.transpose(1, 2))
            _, outputs = encoder(features, frame_mask, return_layers=layers, num_layers=max(layers))
        chosen = [outputs[layer] for layer in layers]
        if source == "student":
            return torch.stack([layer.hidden_states for layer in chosen])
        return torch.stack([layer.feed_forward for layer in chosen])

    def unit_features(self, layers: Sequence[int], source: str) -> tuple[list[int], str]:
        """Return layers (L, or one for all) and source of the `layer_features` that units of L layers come from."""
        # CODEPATH: "own_layer" for SpidR's checkpoints, "last_layer" for all others; the anchor's head is on the last.
        if source == "student" and self.config.head_input == "own_layer":
            return list(layers), "student_feed_forward"
        return (list(layers), source) if source == "teacher" else ([self.config.num_hidden_layers], "student")

    def unit_head(self, layer: int, source: str) -> nn.Module:
        """Return the prediction head of a layer, or the anchor's; raise `ValueError` if the layer has none."""
        check_source(source, ("student", "anchor"))
        (number,) = check_unit_layers(self.config, [layer], source)
        if source == "anchor":
            return self.anchor_head  # type: ignore[return-value] # it exists if the layer is in order
        return self.heads[number - self.config.codebook_layers[0]]

    def check_unit_request(self, layer: int | None, layers: Sequence[int] | None, source: str) -> list[int]:
        """Return the layers that `layer` or `layers` of `encode_units` ask for; raise `ValueError` as it does."""
        if layer is not None and layers is not None:
            raise ValueError(f"layer={layer} and layers={layers} are both given. Give one of them.")
        wanted = layers if layers is not None else [self.config.default_layer(source) if layer is None else layer]
        return check_unit_layers(self.config, wanted, source)

    @torch.no_grad()
    def encode_units(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layer: int | None = None,
        source: str = "student",
        layers: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compute acoustic units, one codeword (or label) a frame. They do not depend on the padding of the batch.

        Args:
            input_values: (B, S), as for `DinoSRModel`.
            attention_mask: (B, S) or None.
            layer: Number of a transformer layer with a codebook, from 1: the top `num_codebooks` layers have one. The
                anchor's head is on the last layer. None: `DinoSRConfig.default_layer`.
            source: "student": the most probable codeword by that layer's prediction head, from unmasked speech; the
                whole student is computed whatever the layer, unless `head_input` is "own_layer". "teacher": the
                nearest codeword of that layer's codebook to the teacher's output, normalised over the utterance
                (equation 3): what the student learns to predict; the teacher is computed up to the highest layer.
                "anchor": the most probable of the `num_anchor_labels` by the anchor's head, from unmasked speech.
            layers: Numbers of several layers, instead of `layer`.

        Returns:
            Codes int64 (B, T), or with `layers` (L, B, T), -1 in the padding; and the number of frames of each
            utterance, int64 (B,).

        Raises:
            ValueError: If a layer has no units of the source, an input or the source is not one of these, both `layer`
                and `layers` are given, or the model is in training mode.
        """
        chosen = self.check_unit_request(layer, layers, source)
        self._check_unmasked(input_values, attention_mask, "encode_units")
        if attention_mask is not None and self.config.reference_padding:
            codes, lengths = self._units_one_by_one(input_values, attention_mask, chosen, source)
        else:
            codes, lengths = self._units(input_values, attention_mask, chosen, source)
        return codes[0] if layers is None else codes, lengths

    def _units(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, layers: list[int], source: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        frame_mask = self._frame_mask(attention_mask, self.config.num_frames(input_values.shape[1]))
        features = self.layer_features(input_values, attention_mask, *self.unit_features(layers, source))
        if source == "teacher":
            codes = self.teacher_units(normalize_over_time(features, frame_mask), layers)
        else:
            codes = self.student_units(features, layers, source)
        if frame_mask is None:
            return codes, torch.full(codes.shape[1:2], codes.shape[2], device=codes.device)
        return codes.masked_fill(~frame_mask, NO_UNIT), frame_mask.sum(dim=-1)

    def _units_one_by_one(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor, layers: list[int], source: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_units`, for models in which padding would reach into the frames beside it."""
        num_samples = attention_mask.long().sum(dim=-1)
        lengths = self.config.num_frames(num_samples)
        shape = (len(layers), len(input_values), self.config.num_frames(input_values.shape[1]))
        codes = torch.full(shape, NO_UNIT, device=input_values.device)
        for row, (samples, frames) in enumerate(zip(num_samples.tolist(), lengths.tolist(), strict=True)):
            if frames:
                alone, _ = self._units(input_values[row : row + 1, :samples], None, layers, source)
                codes[:, row, :frames] = alone[:, 0]
        return codes, lengths

    @torch.no_grad()
    def student_units(
        self, hidden_states: torch.Tensor, layers: Sequence[int], source: str = "student"
    ) -> torch.Tensor:
        """
        Return each frame's most probable codeword by the prediction heads of L layers with codebooks.

        The `layer_features` that `unit_features` names, (L, ..., D) or (1, ..., D), to int64 (L, ...). With source
        "anchor", to the most probable label of the anchor's head. Raises `ValueError` if a layer has no codebook, or
        the model no anchor.
        """
        heads = [self.unit_head(layer, source) for layer in layers]
        inputs = hidden_states.expand(len(heads), *hidden_states.shape[1:])
        pairs = zip(heads, inputs, strict=True)
        return torch.stack([head(features).float().argmax(dim=-1) for head, features in pairs])

    @torch.no_grad()
    def teacher_units(self, targets: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """
        Return each frame's nearest codeword in the codebooks of L layers (paper, equation 3).

        The teacher's `layer_features`, normalised over time, (L, ..., D) to int64 (L, ...). Raises `ValueError` if a
        layer has no codebook.
        """
        first = self.config.codebook_layers[0]
        numbers = [layer - first for layer in check_layers(self.config, layers, with_codebooks=True)]
        return self.codebooks(targets.flatten(1, -2), numbers).view(targets.shape[:-1])


# Heads


def pad_to_frame(
    config: DinoSRConfig, input_values: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pad waveforms (B, S) that are too short for a frame, as a longer one in their batch would."""
    num_missing = config.receptive_field - input_values.shape[1]
    if num_missing <= 0:
        return input_values, attention_mask
    mask = torch.ones_like(input_values, dtype=torch.long) if attention_mask is None else attention_mask
    return nn.functional.pad(input_values, (0, num_missing)), nn.functional.pad(mask, (0, num_missing))


def mask_padding_logits(config: DinoSRConfig, logits: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
    """
    Give padded frames of (B, T, vocab_size), from `num_frames` int64 (B,) on, all probability to the blank.

    Transformers' pipeline and tokenizers do not leave padding out; so a batch is decoded as its utterances one by one.
    """
    blank = logits.new_full((logits.shape[-1],), -1e4)  # trf-ignore: TRF032 (float16 has this number too)
    blank[config.pad_token_id] = 0.0  # `DinoSRForCTC` refuses None
    is_frame = torch.arange(logits.shape[1], device=logits.device) < num_frames.to(logits.device)[:, None]
    return torch.where(is_frame[..., None], logits, blank)


def ctc_loss(
    config: DinoSRConfig, logits: torch.Tensor, labels: torch.Tensor, num_frames: torch.Tensor
) -> torch.Tensor:
    """
    Compute connectionist temporal classification in nats and float32, reduced as `ctc_loss_reduction` says.

    Logits (B, T, vocab_size), labels int64 (B, L), negative or the blank where there is none, wherever that is, and
    numbers of valid frames int64 (B,) to a scalar. Raises `ValueError` if a label is not below `vocab_size`.
    """
    blank: Any = config.pad_token_id  # `DinoSRForCTC` refuses None
    if not torch.compiler.is_compiling() and labels.numel() and labels.max() >= config.vocab_size:
        raise ValueError(
            f"labels has the value {int(labels.max())}, but vocab_size={config.vocab_size}. Give the model the"
            " tokenizer's vocab_size."
        )
    device = logits.device
    if device.type == "mps":  # where torch 2.13 has no ctc_loss
        logits = logits.cpu()
    labels, num_frames = labels.to(logits.device), num_frames.to(logits.device)
    is_label = (labels >= 0) & (labels != blank)
    first = (~is_label).long().argsort(dim=-1, stable=True)  # the labels of a row before what is none
    with without_autocast(logits.device), torch.backends.cudnn.flags(enabled=False):
        loss = nn.functional.ctc_loss(
            logits.float().log_softmax(dim=-1).transpose(0, 1),
            labels.masked_fill(~is_label, blank).gather(-1, first),
            num_frames,
            is_label.sum(dim=-1),
            blank=blank,
            reduction=config.ctc_loss_reduction,
            zero_infinity=config.ctc_zero_infinity,
        )
    return loss.to(device)


class DinoSRForCTC(DinoSRPreTrainedModel):  # trf-ignore: TRF057
    """
    DinoSR with a linear layer to labels, for connectionist temporal classification; `pad_token_id` is the blank.

    Args:
        config: A `DinoSRConfig` with the `vocab_size` of the tokenizer.

    Raises:
        ValueError: If `pad_token_id` is no label of `vocab_size`.
    """

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        if config.pad_token_id is None or not 0 <= config.pad_token_id < config.vocab_size:
            raise ValueError(
                f"pad_token_id={config.pad_token_id} is the blank of CTC and must be a label below"
                f" vocab_size={config.vocab_size}. Take both from the tokenizer."
            )
        self.dinosr = DinoSRModel(config)
        self.dropout = DinoSRDropout(config.final_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | CausalLMOutput:
        """
        Score labels, and with `labels` compute the loss.

        Args:
            input_values, attention_mask: As for `DinoSRModel`.
            **kwargs: As for `DinoSRModel`.
            labels: int64 (B, L); negative values and the blank, wherever they stand, are no labels.

        Returns:
            `logits` (B, T, vocab_size), the blank's in the padding, and with labels `loss` in nats. Without labels, an
            input too short for a frame has one, of padding.

        Raises:
            ValueError: If a label is not below `vocab_size`.
        """
        if labels is None and input_values.dim() == 2:
            input_values, attention_mask = pad_to_frame(self.config, input_values, attention_mask)
        outputs = self.dinosr(input_values, attention_mask, return_dict=True, **kwargs)
        samples = torch.ones_like(input_values) if attention_mask is None else attention_mask
        num_frames = self.config.num_frames(samples.long().sum(dim=-1))
        logits = mask_padding_logits(self.config, self.lm_head(self.dropout(outputs.last_hidden_state)), num_frames)
        loss = None if labels is None else ctc_loss(self.config, logits, labels, num_frames)
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class DinoSRClassifier(DinoSRPreTrainedModel):  # trf-ignore: TRF013
    """Base class of the classification heads: the encoder, and optionally a learnt average of its layers."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.dinosr = DinoSRModel(config)
        self.num_labels: int = config.num_labels or 0
        self.layer_weights: nn.Parameter | None = None
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.empty(config.num_hidden_layers + 1))

    def _encode(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, Wav2Vec2BaseModelOutput]:
        """Features (B, T, D), of the last layer or averaged over all, and the encoder's output."""
        if self.layer_weights is None:
            outputs = self.dinosr(input_values, attention_mask, return_dict=True, **kwargs)
            return outputs.last_hidden_state, outputs
        returns_hidden_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        outputs = self.dinosr(
            input_values, attention_mask, **{**kwargs, "output_hidden_states": True, "return_dict": True}
        )
        weights = self.layer_weights.softmax(dim=0)
        features = sum(weight * layer for weight, layer in zip(weights, outputs.hidden_states, strict=True))
        if not returns_hidden_states:
            outputs["hidden_states"] = None
        return features, outputs


def mean_over_time(features: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """Average (B, T, C) over valid frames, bool (B, T) or None for all, to (B, C)."""
    if frame_mask is None:
        return features.mean(dim=1)
    frame_mask = frame_mask.to(features.device)
    total = features.masked_fill(~frame_mask[..., None], 0.0).sum(dim=1, dtype=torch.float32)  # float16 has no room
    return (total / frame_mask.sum(dim=1, keepdim=True).clamp(min=1)).to(features.dtype)


def mean_and_deviation_over_time(features: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean and standard deviation of (B, T, C) over valid frames, bool (B, T) or None for all, to (B, 2 C)."""
    dtype, features = features.dtype, features.float()
    mean = mean_over_time(features, frame_mask)
    if frame_mask is None:
        frame_mask = torch.ones(features.shape[:2], dtype=torch.bool)
    frame_mask = frame_mask.to(features.device)
    squares = (features - mean[:, None]).square().masked_fill(~frame_mask[..., None], 0.0).sum(dim=1)
    variance = squares / (frame_mask.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return torch.cat([mean, (variance + 1e-12).sqrt()], dim=-1).to(dtype)


def classification_loss(config: DinoSRConfig, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Compute the mean cross entropy of logits (..., C) and classes int64 (...), -100 for none, to a scalar.

    With `problem_type="multi_label_classification"` it is the binary cross entropy of 0 and 1 (..., C), where negative
    values are no labels. Without any label the loss is 0.
    """
    logits = logits.float()  # sums over many frames overflow float16
    if config.problem_type == "multi_label_classification":
        labels = labels.to(logits.dtype).reshape(logits.shape)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.clamp(min=0), reduction="none")
        is_label = labels >= 0
        return (losses * is_label).sum() / is_label.sum().clamp(min=1)
    total = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


class DinoSRForSequenceClassification(DinoSRClassifier):  # trf-ignore: TRF057
    """
    DinoSR with one decision an utterance: keyword, speaker, language, emotion.

    Args:
        config: A `DinoSRConfig` with `num_labels`; 1 makes it a regression. `problem_type` chooses another loss.
    """

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.projector = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SequenceClassifierOutput:
        """
        Classify utterances, and with `labels` compute the loss.

        Args:
            input_values, attention_mask: As for `DinoSRModel`.
            **kwargs: As for `DinoSRModel`.
            labels: int64 (B,); by `problem_type`, 0 and 1 (B, num_labels) for "multi_label_classification", or float
                (B, num_labels) for the squared error of "regression", which is the default if `num_labels` is 1.

        Returns:
            `logits` (B, num_labels), and with labels `loss`.
        """
        features, outputs = self._encode(input_values, attention_mask, **kwargs)
        features = self.projector(features)
        pooled = mean_over_time(features, self._frame_mask(attention_mask, features.shape[1]))
        logits = self.classifier(pooled)
        default = "regression" if self.num_labels == 1 else None
        loss = None
        if labels is not None and (self.config.problem_type or default) == "regression":
            loss = nn.functional.mse_loss(logits, labels.to(logits.dtype).reshape(logits.shape))
        elif labels is not None:
            loss = classification_loss(self.config, logits, labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def check_one_hot(labels: torch.Tensor, frame_mask: torch.Tensor | None) -> None:
    """Raise `ValueError` unless valid frames of (B, T, C) have one label; on CPUs only: others wait for the device."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    counts = labels.sum(dim=-1)
    wrong = (counts if frame_mask is None else counts.masked_fill(~frame_mask, 1)) != 1
    if wrong.any():
        raise ValueError(
            f"labels has {int(counts[wrong][0])} ones in a frame, but must be one-hot. For none or several labels a"
            " frame, as in diarisation, set problem_type='multi_label_classification' in the configuration."
        )


class DinoSRForAudioFrameClassification(DinoSRClassifier):  # trf-ignore: TRF057
    """
    DinoSR with one decision a frame: phones; with `problem_type="multi_label_classification"` several: diarisation.

    Args:
        config: A `DinoSRConfig` with `num_labels`.
    """

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TokenClassifierOutput:
        """
        Classify frames, and with `labels` compute the loss.

        Args:
            input_values, attention_mask: As for `DinoSRModel`.
            **kwargs: As for `DinoSRModel`.
            labels: int64 (B, T), -100 for frames to ignore, or one-hot (B, T, num_labels); for several labels a frame,
                0 and 1 (B, T, num_labels). Padding is ignored.

        Returns:
            `logits` (B, T, num_labels), and with labels `loss`.

        Raises:
            ValueError: If labels (B, T, num_labels) are not one-hot, without a `problem_type` for others; on CPUs.
        """
        features, outputs = self._encode(input_values, attention_mask, **kwargs)
        logits = self.classifier(features)
        loss = None
        if labels is not None:
            frame_mask = self._frame_mask(attention_mask, logits.shape[1])
            if labels.dim() == 3 and self.config.problem_type != "multi_label_classification":
                check_one_hot(labels, frame_mask)
                labels = labels.argmax(dim=-1)
            if frame_mask is not None:
                labels = labels.masked_fill(~(frame_mask if labels.dim() == 2 else frame_mask[..., None]), -100)
            loss = classification_loss(self.config, logits, labels)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class DinoSRTimeDelayLayer(nn.Module):
    """Dilated convolution over time, then a rectifier."""

    def __init__(self, config: DinoSRConfig, layer_id: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            config.tdnn_dim[max(layer_id - 1, 0)],
            config.tdnn_dim[layer_id],
            kernel_size=config.tdnn_kernel[layer_id],
            dilation=config.tdnn_dilation[layer_id],
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, T) to (B, C, T), T shorter by dilation * (kernel - 1)."""
        return self.conv(hidden_states).relu()


class DinoSRTimeDelayLayers(nn.ModuleList):
    """The frame-level layers of x-vectors."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(DinoSRTimeDelayLayer(config, i) for i in range(len(config.tdnn_dim)))
        spans = zip(config.tdnn_kernel, config.tdnn_dilation, strict=True)
        self.num_frames_lost = sum(dilation * (kernel - 1) for kernel, dilation in spans)

    def check_length(self, num_frames: int) -> None:
        """Raise `ValueError` if no frame is left of an utterance."""
        if num_frames <= self.num_frames_lost:
            raise ValueError(
                f"input_values makes {num_frames} frames, but the time-delay layers need {self.num_frames_lost + 1}."
                " Give longer utterances, or lower tdnn_kernel or tdnn_dilation."
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, T, C) to (B, T - num_frames_lost, C); raises `ValueError` if no frame is left."""
        self.check_length(features.shape[1])
        hidden_states = features.transpose(1, 2)
        for layer in self:
            hidden_states = layer(hidden_states)
        return hidden_states.transpose(1, 2)


class DinoSRMarginLoss(nn.Module):
    """Softmax over cosines with an additive margin for the right class (arXiv 1801.05599, equation 7)."""

    def __init__(self, embedding_size: int, num_labels: int, scale: float = 30.0, margin: float = 0.4) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.weight = nn.Parameter(torch.empty(embedding_size, num_labels))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, E) and labels int64 (B,) to a scalar."""
        normalize = nn.functional.normalize
        cosines = normalize(embeddings, dim=1) @ normalize(self.weight, dim=0)
        right = nn.functional.one_hot(labels.view(-1), cosines.shape[1])
        return nn.functional.cross_entropy(self.scale * (cosines - self.margin * right), labels.view(-1))


class DinoSRForXVector(DinoSRClassifier):  # trf-ignore: TRF057
    """
    DinoSR with a speaker embedding: time-delay layers, then mean and deviation over time (ICASSP 2018, x-vectors).

    Args:
        config: A `DinoSRConfig` with `num_labels` speakers.
    """

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.projector = nn.Linear(config.hidden_size, config.tdnn_dim[0])
        self.tdnn = DinoSRTimeDelayLayers(config)
        self.feature_extractor = nn.Linear(config.tdnn_dim[-1] * 2, config.xvector_output_dim)
        self.classifier = nn.Linear(config.xvector_output_dim, config.xvector_output_dim)
        self.objective = DinoSRMarginLoss(config.xvector_output_dim, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | XVectorOutput:
        """
        Embed utterances, and with `labels` compute the loss.

        Args:
            input_values, attention_mask: As for `DinoSRModel`.
            **kwargs: As for `DinoSRModel`.
            labels: int64 (B,), the speakers.

        Returns:
            `embeddings` and `logits`, each (B, xvector_output_dim), and with labels `loss`.

        Raises:
            ValueError: If the utterances are too short for the time-delay layers.
        """
        features, outputs = self._encode(input_values, attention_mask, **kwargs)
        frame_mask = self._frame_mask(attention_mask, features.shape[1])
        if frame_mask is not None:
            if not torch.compiler.is_compiling():
                self.tdnn.check_length(int(frame_mask.sum(dim=1).min()))
            frame_mask = frame_mask[:, self.tdnn.num_frames_lost :]
        delayed = self.tdnn(self.projector(features))
        embeddings = self.feature_extractor(mean_and_deviation_over_time(delayed, frame_mask))
        logits = self.classifier(embeddings)
        loss = None if labels is None else self.objective(logits, labels)
        both = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return XVectorOutput(loss=loss, logits=logits, embeddings=embeddings, **both)


__all__ = [
    "DinoSRForAudioFrameClassification",
    "DinoSRForCTC",
    "DinoSRForPreTraining",
    "DinoSRForPreTrainingOutput",
    "DinoSRForSequenceClassification",
    "DinoSRForXVector",
    "DinoSRModel",
    "DinoSRPreTrainedModel",
]
