"""
The objective of DinoSR: what is made of the teacher's layers, and how the student's predictions are scored.

`B` batch, `T` frames, `D` hidden size, `N` codebooks, `V` codewords, `M` masked frames.
"""

from dataclasses import dataclass

import torch
from transformers.utils.generic import ModelOutput

from .codebook_dinosr import perplexity


def _moments_over_time(
    hidden_states: torch.Tensor, frame_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance, (..., B, 1, D) each, over the frames that count of float32 (..., B, T, D)."""
    if frame_mask is None:
        variance, mean = torch.var_mean(hidden_states, dim=-2, correction=0, keepdim=True)
        return mean, variance
    weight = frame_mask[..., None].float()  # (B, T, 1)
    weight = weight / weight.sum(dim=-2, keepdim=True).clamp(min=1.0)
    mean = (hidden_states * weight).sum(dim=-2, keepdim=True)
    return mean, ((hidden_states - mean).square() * weight).sum(dim=-2, keepdim=True)


def normalize_over_time(hidden_states: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Instance norm: zero mean and unit variance over the frames of each utterance and channel (paper, Section 3.1).

    Args:
        hidden_states: (..., B, T, D).
        frame_mask: bool (B, T), the frames that count; None: all.

    Returns:
        float32 (..., B, T, D).
    """
    hidden_states = hidden_states.float()
    mean, variance = _moments_over_time(hidden_states, frame_mask)
    return (hidden_states - mean) * torch.rsqrt(variance + 1e-5)


@torch.no_grad()
def energy_sums(hidden_states: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """
    How much of the energy of features changes over time, as sums that add up over batches.

    The first divided by the second is the *variation*: 1 for features that are zero on average over each utterance,
    0 where all frames of an utterance are alike, which no instance norm shows afterwards.

    Args:
        hidden_states: (..., B, T, D).
        frame_mask: bool (B, T), the frames that count; None: all.

    Returns:
        float32 (..., 2), without gradient: squared distances from the mean of each utterance and channel, and squares,
        each summed over utterances, frames and channels.
    """
    mean, variance = _moments_over_time(hidden_states.float(), frame_mask)
    energies = torch.stack((variance, variance + mean.square()), dim=-1).sum(dim=-2)  # (..., B, 1, 2)
    num_frames = hidden_states.shape[-2] if frame_mask is None else frame_mask.sum(dim=-1)[:, None, None]
    return (energies * num_frames).sum(dim=(-3, -2))


@dataclass
class DinoSRForPreTrainingOutput(ModelOutput):
    """
    Output of `DinoSRForPreTraining`. What is about masked frames is None where nothing was masked.

    Attributes:
        loss: Scalar, nats: cross entropy of student and codes, mean over masked frames and codebooks.
        codebook_losses: float32 (N,), nats, mean over masked frames, without gradient.
        num_masked_frames: int64 scalar, `M`.
        target_perplexity: float32 (N,), how many codewords the targets use, 1 to V.
        prediction_perplexity: float32 (N,), the same of the student's mean prediction.
        num_active_codewords: int64 (N,), codewords that at least one masked frame fell on.
        codes: int64 (N, M), each masked frame's codeword; frames in the order of (batch, time).
        last_hidden_state: (B, T, D), the student's output.
        code_counts: int64 (N, V), masked frames on each codeword: what to add up over micro-batches and processes.
        prediction_sums: float32 (N, V), the student's probabilities summed over masked frames, likewise.
        target_energies: float32 (N, 2), of the teacher's layers before instance norm, all frames: energy that changes
            over time within an utterance, and all energy; likewise to add up. Divided, 0 is a teacher whose frames are
            all alike (`energy_sums`).
        feature_energies: float32 (2,), the same of the student's convolutions (`extract_features` of `DinoSRModel`).
        hidden_states: On demand, the student's: first layer's input and each layer's output, (B, T, D) each.
        attentions: On demand, the student's: (B, heads, T, T) a layer.
    """

    loss: torch.Tensor | None = None
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
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def masked_prediction_losses(logits: torch.Tensor, codes: torch.Tensor) -> DinoSRForPreTrainingOutput:
    """
    Score the student's predictions of the codes, for all codebooks at once (paper, equation 6).

    Args:
        logits: (N, M, V), the student's predictions at masked frames; scored in float32.
        codes: int64 (N, M), the teacher's codewords at these frames.

    Returns:
        An output with losses, perplexities and counts; only `loss` has a gradient. Without a masked frame the loss is
        0, still with a gradient, so that no process waits for another.
    """
    num_masked_frames = codes.shape[1]
    log_probs = logits.float().log_softmax(dim=-1)
    losses = -log_probs.gather(-1, codes[..., None]).squeeze(-1)  # (N, M)
    codebook_losses = losses.sum(dim=1) / max(num_masked_frames, 1)
    log_probs = log_probs.detach()
    code_counts = codes.new_zeros(log_probs.shape[0], log_probs.shape[2])
    code_counts.scatter_add_(1, codes, torch.ones_like(codes))
    prediction_sums = log_probs.exp().sum(dim=1)
    return DinoSRForPreTrainingOutput(
        loss=codebook_losses.mean(),
        codebook_losses=codebook_losses.detach(),
        num_masked_frames=codes.new_full((), num_masked_frames),  # made there, which no one waits for
        target_perplexity=perplexity(code_counts),
        prediction_perplexity=perplexity(prediction_sums),
        num_active_codewords=(code_counts > 0).sum(dim=-1),
        codes=codes,
        code_counts=code_counts,
        prediction_sums=prediction_sums,
    )
