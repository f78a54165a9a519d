"""
The network of DinoSR: convolutions over the waveform, projection, positions, transformer; student and teacher alike.

`B` batch, `S` samples, `T` frames, `C` conv channels, `D` hidden size, `N` codebooks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN, GELUActivation
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_dinosr import attend_by_utterance, eager_attention_forward
from .configuration_dinosr import DinoSRConfig
from .convolution_dinosr import convolve_pieces, same_conv
from .dropout_dinosr import DinoSRDropout
from .packing_dinosr import ValidFrames, valid_frames


def is_exact_gelu(activation: nn.Module) -> bool:
    """Whether it is GELU, and no approximation of it."""
    return isinstance(activation, GELUActivation) and activation.act is nn.functional.gelu


def check_input(config: DinoSRConfig, input_values: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Refuse what is no batch of waveforms (B, S) with its attention mask (B, S). Raises `ValueError`."""
    if input_values.dim() != 2:
        raise ValueError(
            f"input_values has shape {tuple(input_values.shape)}, but must be (batch, samples): one channel of"
            " 16 kHz audio an utterance. Use the feature extractor to make it."
        )
    if config.num_frames(input_values.shape[1]) < 1:
        raise ValueError(
            f"input_values has {input_values.shape[1]} samples, too few for a single frame. Pad the batch or leave"
            " such short utterances out."
        )
    if attention_mask is not None and attention_mask.shape != input_values.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but must be (batch, samples) ="
            f" {tuple(input_values.shape)}: 1 for samples, 0 for padding, in samples and not in frames."
        )


class DinoSRConvLayer(nn.Module):
    """Convolution without padding, layer norm over channels, activation."""

    def __init__(self, config: DinoSRConfig, layer_id: int) -> None:
        super().__init__()
        in_channels = config.conv_dim[layer_id - 1] if layer_id > 0 else 1
        self.conv = nn.Conv1d(
            in_channels,
            config.conv_dim[layer_id],
            kernel_size=config.conv_kernel[layer_id],
            stride=config.conv_stride[layer_id],
            bias=config.conv_bias,
        )
        self.layer_norm = nn.LayerNorm(config.conv_dim[layer_id])
        self.activation = ACT2FN[config.feat_extract_activation]

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        """(B, T, C) to (B, T, C), T shorter."""
        convolved = self.conv(signal.transpose(1, 2)).transpose(1, 2)
        return self.activation(self.layer_norm(convolved))


class DinoSRFeatureEncoder(nn.Module):
    """The convolutions that make 50 frames a second out of 16,000 samples."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_layers = nn.ModuleList(DinoSRConvLayer(config, i) for i in range(len(config.conv_dim)))
        self.gradient_checkpointing = False

    def forward(self, input_values: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, S) to (B, C, T), outside of frame_mask, bool (B, T), zero, but not with `reference_padding`."""
        layers = [layer for layer in self.conv_layers if isinstance(layer, DinoSRConvLayer)]
        frames = None if self.config.reference_padding else valid_frames(frame_mask)
        if torch.compiler.is_exporting() or not is_exact_gelu(layers[0].activation):
            features = self.layer_by_layer(input_values).transpose(1, 2)
            return (features if frames is None else frames.unpack(frames.pack(features))).transpose(1, 2)
        features = convolve_pieces(
            input_values,
            [layer.conv for layer in layers],
            [layer.layer_norm for layer in layers],
            self.config.num_frames(input_values.shape[1]),
            self.config.receptive_field,
            frames=frames,
            recompute=self.gradient_checkpointing and self.training,
        )
        return features.transpose(1, 2)

    def layer_by_layer(self, input_values: torch.Tensor) -> torch.Tensor:
        """The same, (B, S) to (B, C, T), as other runtimes are fast at it."""
        signal = input_values[..., None]
        for layer in self.conv_layers:
            signal = layer(signal)
        return signal.transpose(1, 2)


class DinoSRLinear(nn.Linear):
    """A linear layer that starts as torch initialises it: the projection and the prediction heads (D7)."""


class DinoSRFeatureProjection(nn.Module):
    """Layer norm, projection to the transformer's width, dropout."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = DinoSRLinear(config.conv_dim[-1], config.hidden_size)
        self.dropout = DinoSRDropout(config.feat_proj_dropout)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, C) to projected (B, T, D) and normalised (B, T, C)."""
        features = self.layer_norm(features)
        return self.dropout(self.projection(features)), features


class DinoSRPositionalConv(nn.Conv1d):
    """A positional convolution; like `DinoSRLinear` it starts as torch initialises it (D7)."""


class DinoSRPositionalConvLayer(nn.Module):
    """Grouped convolution of the same length, layer norm without weights, activation."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        # Here and not in the configuration: transformers' own tests vary hidden_size alone.
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
        return self.activation(self.layer_norm(same_conv(self.conv, hidden_states)))


class DinoSRPositionalConvEmbedding(nn.Module):
    """Relative positions by stacked convolutions over time."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DinoSRPositionalConvLayer(config) for _ in range(config.num_conv_pos_embeddings))

    def forward(self, hidden_states: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, D) to (B, T, D); frames outside of `frame_mask`, bool (B, T), are zero in front of every layer."""
        for layer in self.layers:
            if frame_mask is not None:
                hidden_states = hidden_states.masked_fill(~frame_mask[..., None], 0.0)
            hidden_states = layer(hidden_states)
        return hidden_states


class DinoSRAttention(nn.Module):
    """Multi-head self-attention, by whichever of transformers' implementations the configuration names."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.is_causal = False
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        frames: ValidFrames | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) or packed (M, D) to the same and, where the implementation has them, weights (B, heads, T, T)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        by_head = [layer(hidden_states).unflatten(-1, (-1, self.head_dim)) for layer in projections]
        dropout = self.dropout if self.training else 0.0
        lengths = self._lengths(hidden_states, attention_mask, frames, dropout)
        if lengths is not None:
            query, key, value = (one.flatten(0, -3) for one in by_head)
            output = attend_by_utterance(query, key, value, lengths, self.scaling, dropout)
            return self.out_proj(output.flatten(1).view_as(hidden_states)), None
        if frames is not None and frames.are_packed:
            by_head = [frames.unpack(one) for one in by_head]
        query, key, value = (one.transpose(1, 2) for one in by_head)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.flatten(2)
        return self.out_proj(output if frames is None else frames.pack(output)), weights

    def _lengths(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        frames: ValidFrames | None,
        dropout: float,
    ) -> Sequence[int] | None:
        """Of the utterances, where attention goes by utterance: in place of sdpa on a CPU, if it is faster."""
        if self.config._attn_implementation != "sdpa" or hidden_states.device.type != "cpu":
            return None
        if frames is not None and frames.are_packed:
            return frames.lengths
        # Without padding torch's own is as fast, but with dropout it writes attention out.
        is_slow = dropout > 0 and attention_mask is None and not torch.compiler.is_compiling()
        return [hidden_states.shape[1]] * hidden_states.shape[0] if is_slow else None


class DinoSRFeedForward(nn.Module):
    """Two linear layers; their output in evaluation mode is what the teacher's targets are made of."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]
        self.intermediate_dropout = DinoSRDropout(config.activation_dropout)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_dropout = DinoSRDropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        hidden_states = self.intermediate_act_fn(self.intermediate_dense(hidden_states))
        return self.output_dropout(self.output_dense(self.intermediate_dropout(hidden_states)))


class DinoSREncoderLayer(GradientCheckpointingLayer):
    """A transformer layer with the norms behind the residuals."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.layerdrop = config.layerdrop
        self.attention = DinoSRAttention(config)
        self.dropout = DinoSRDropout(config.hidden_dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = DinoSRFeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def run(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        frames: ValidFrames | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D), or packed (M, D), to the layer's output and its feed-forward network's output, of that shape."""
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, frames=frames, **kwargs)
        hidden_states = self.layer_norm(hidden_states + self.dropout(attended))
        fed_forward = self.feed_forward(hidden_states)
        return self.final_layer_norm(hidden_states + fed_forward), fed_forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        frames: ValidFrames | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(B, T, D) to (B, T, D); in training the layer is skipped with probability `layerdrop`."""
        if frames is None:
            output, _ = self.run(hidden_states, attention_mask, **kwargs)
        else:
            output = frames.unpack(self.run(frames.pack(hidden_states), attention_mask, frames, **kwargs)[0])
        if self.training and self.layerdrop > 0:
            # Computed and thrown away rather than left out: every parameter gets a gradient in every process, the
            # list of hidden states keeps its length, and torch.compile sees no branch.
            keep = torch.rand((), device=output.device) >= self.layerdrop
            output = torch.where(keep, output, hidden_states.to(output.dtype))
        return output


class DinoSREncoder(nn.Module):
    """Positions and transformer layers."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        self.config = config
        self.pos_conv_embed = DinoSRPositionalConvEmbedding(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = DinoSRDropout(config.hidden_dropout)
        self.layers = nn.ModuleList(DinoSREncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def prepare(
        self, hidden_states: torch.Tensor, frame_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any, ValidFrames | None]:
        """
        Features (B, T, D) and frame_mask bool (B, T) to what the layers take.

        Returns:
            The first layer's input (B, T, D), the attention mask, and what to pack frames with, if they should be.
        """
        if frame_mask is not None:
            hidden_states = hidden_states.masked_fill(~frame_mask[..., None], 0.0)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=frame_mask
        )
        # The authors zero the padding once, so that it leaks into valid frames at every further convolution.
        positions = self.pos_conv_embed(hidden_states, None if self.config.reference_padding else frame_mask)
        frames = None if self.config.reference_padding else valid_frames(frame_mask)
        return self.dropout(self.layer_norm(hidden_states + positions)), attention_mask, frames

    def run_layers(
        self, hidden_states: torch.Tensor, frame_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(B, T, D) and frame_mask bool (B, T) to each layer's output and its feed-forward output, (B, T, D)."""
        hidden_states, attention_mask, frames = self.prepare(hidden_states, frame_mask)
        rows = hidden_states if frames is None else frames.pack(hidden_states)
        for layer in self.layers:
            assert isinstance(layer, DinoSREncoderLayer)
            rows, fed_forward = layer.run(rows, attention_mask, frames, **kwargs)
            yield (rows, fed_forward) if frames is None else (frames.unpack(rows), frames.unpack(fed_forward))

    def forward(
        self, hidden_states: torch.Tensor, frame_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """(B, T, D) and frame_mask bool (B, T) to (B, T, D)."""
        hidden_states, attention_mask, frames = self.prepare(hidden_states, frame_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, frames, **kwargs)
        return hidden_states


class DinoSRTeacher(DinoSREncoder):
    """
    The student's encoder, averaged over updates: it makes the targets (paper, Section 3.1).

    Always in evaluation mode and never trained by gradient. With `freeze_mode="copied"` it has its own copies of
    convolutions and projection, which follow the student's until the freeze.
    """

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.feature_extractor: DinoSRFeatureEncoder | None = None
        self.feature_projection: DinoSRFeatureProjection | None = None
        if config.freeze_mode == "copied":
            self.feature_extractor = DinoSRFeatureEncoder(config)
            self.feature_projection = DinoSRFeatureProjection(config)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "DinoSRTeacher":
        """Nothing changes: a teacher has no training mode."""
        return self

    def forward(
        self, hidden_states: torch.Tensor, frame_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Unmasked features (B, T, D) to the feed-forward outputs of the top layers (N, B, T, D)."""
        outputs = [fed_forward for _, fed_forward in self.run_layers(hidden_states, frame_mask, **kwargs)]
        return torch.stack(outputs[-self.config.num_codebooks :])

    def own_features(self, input_values: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor | None:
        """(B, S) to features (B, T, D) by the teacher's own convolutions and projection; None where it has none."""
        if self.feature_extractor is None or self.feature_projection is None:
            return None
        features, _ = self.feature_projection(self.feature_extractor(input_values, frame_mask).transpose(1, 2))
        return features

    def pairs_with(self, student: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Each parameter of the teacher and the one of the same place in a student, a `DinoSRModel`."""
        theirs = dict(student.named_parameters())
        for name, parameter in self.named_parameters():
            yield parameter, theirs[name] if name in theirs else theirs[f"encoder.{name}"]

    @torch.no_grad()
    def follow(self, encoder: DinoSREncoder, decay: float) -> None:
        """Average the layers, with this share of the old; copy the positional convolutions (docs/parity.md, T4)."""
        averaged = (*self.layers.parameters(), *self.layer_norm.parameters())
        torch._foreach_lerp_(averaged, (*encoder.layers.parameters(), *encoder.layer_norm.parameters()), 1 - decay)
        torch._foreach_copy_(tuple(self.pos_conv_embed.parameters()), tuple(encoder.pos_conv_embed.parameters()))

    @torch.no_grad()
    def copy_front_end(self, extractor: DinoSRFeatureEncoder, projection: DinoSRFeatureProjection) -> None:
        """Copy the student's convolutions and projection, where the teacher has its own (docs/parity.md, T8)."""
        if self.feature_extractor is not None and self.feature_projection is not None:
            torch._foreach_copy_(tuple(self.feature_extractor.parameters()), tuple(extractor.parameters()))
            torch._foreach_copy_(tuple(self.feature_projection.parameters()), tuple(projection.parameters()))


def fill_front_end_copies(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """
    Let a state dict from before there were copies load: they equal the student's. A pre-hook of `load_state_dict` for
    `DinoSRForPreTraining`; it changes nothing for models without copies.
    """
    for part in ("feature_extractor.", "feature_projection."):
        if getattr(module.teacher, part[:-1]) is not None:
            student = {key: value for key, value in state_dict.items() if key.startswith(f"{prefix}dinosr.{part}")}
            for key, value in student.items():
                state_dict.setdefault(f"{prefix}teacher.{key[len(prefix) + len('dinosr.') :]}", value)
