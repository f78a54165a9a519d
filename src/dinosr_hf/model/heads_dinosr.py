"""
What the task heads are made of: the CTC loss, pooling over time, and the layers of x-vectors.

`B` batch, `T` frames, `C` channels, `E` embedding size.
"""

import torch
from torch import nn

from .configuration_dinosr import DinoSRConfig


def mask_padding_logits(config: DinoSRConfig, logits: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
    """
    Logits (B, T, vocab_size) whose frames of padding, from `num_frames` int64 (B,) on, are certainly the blank.

    So a batch reads as its utterances do one by one, by anything that takes the best label of each frame; the pipeline
    of transformers and its tokenizers do not leave padding out.
    """
    # Finite, and half precision has it too.
    blank = torch.full((config.vocab_size,), -1e4, dtype=logits.dtype, device=logits.device)
    blank[config.pad_token_id or 0] = 0.0
    is_frame = torch.arange(logits.shape[1], device=logits.device) < num_frames[:, None]
    return torch.where(is_frame[..., None], logits, blank)


def ctc_loss(
    config: DinoSRConfig, logits: torch.Tensor, labels: torch.Tensor, num_frames: torch.Tensor
) -> torch.Tensor:
    """
    Connectionist temporal classification in float32, reduced as the configuration says.

    Args:
        config: Its `vocab_size`, `pad_token_id` (the blank), `ctc_loss_reduction` and `ctc_zero_infinity` count.
        logits: (B, T, vocab_size).
        labels: int64 (B, L), negative where there is no label.
        num_frames: int64 (B,), valid frames.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: For labels outside of the vocabulary.
    """
    if not torch.compiler.is_compiling() and labels.numel() and labels.max() >= config.vocab_size:
        raise ValueError(
            f"labels has the value {int(labels.max())}, but vocab_size={config.vocab_size}. Give the model the"
            " tokenizer's vocab_size."
        )
    is_label = labels >= 0
    with torch.autocast(logits.device.type, enabled=False), torch.backends.cudnn.flags(enabled=False):
        return nn.functional.ctc_loss(
            logits.float().log_softmax(dim=-1).transpose(0, 1),
            labels.masked_fill(~is_label, config.pad_token_id or 0),
            num_frames,
            is_label.sum(dim=-1),
            blank=config.pad_token_id or 0,
            reduction=config.ctc_loss_reduction,
            zero_infinity=config.ctc_zero_infinity,
        )


def mean_over_time(features: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """Features (B, T, C) and bool (B, T), or None for all frames, to their mean (B, C)."""
    if frame_mask is None:
        return features.mean(dim=1)
    total = features.masked_fill(~frame_mask[..., None], 0.0).sum(dim=1)
    return total / frame_mask.sum(dim=1, keepdim=True).clamp(min=1)


def mean_and_deviation_over_time(features: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """Features (B, T, C) and bool (B, T), or None for all, to mean and standard deviation side by side (B, 2 C)."""
    mean = mean_over_time(features, frame_mask)
    if frame_mask is None:
        frame_mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    squares = (features - mean[:, None]).square().masked_fill(~frame_mask[..., None], 0.0).sum(dim=1)
    variance = squares / (frame_mask.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return torch.cat([mean, (variance + 1e-12).sqrt()], dim=-1)


class DinoSRTimeDelayLayer(nn.Module):
    """Dilated convolution over time and rectifier."""

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

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        (B, T, C) to (B, T - num_frames_lost, C).

        Raises:
            ValueError: If that leaves no frame.
        """
        if features.shape[1] <= self.num_frames_lost:
            raise ValueError(
                f"input_values makes {features.shape[1]} frames, but the time-delay layers need"
                f" {self.num_frames_lost + 1}. Give longer utterances, or lower tdnn_kernel or tdnn_dilation."
            )
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
