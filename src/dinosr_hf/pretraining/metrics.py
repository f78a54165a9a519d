"""
What a run measures: sums and counts, added up over micro-batches, processes and steps, and only then divided.

`N` codebooks, `V` codewords.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..codebook_dinosr import perplexity
from ..data import SAMPLING_RATE
from ..objective_dinosr import DinoSRForPreTrainingOutput


class MetricSums:
    """
    The sums of one log interval, on the device; nothing waits for it until they are read.

    Args:
        num_codebooks: N.
        codebook_size: V.
        device: Where the model's outputs are.
    """

    def __init__(self, num_codebooks: int, codebook_size: int, device: torch.device) -> None:
        self._shape = (num_codebooks, codebook_size)
        # One tensor, so that one collective adds up everything: counts, probabilities, loss, frames, samples, padding.
        # In float64 counts stay exact for weeks; Apple's GPUs have none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        size = 2 * num_codebooks * codebook_size + num_codebooks + 3
        self._sums = torch.zeros(size, device=device, dtype=dtype)

    @torch.no_grad()
    def add(self, output: DinoSRForPreTrainingOutput, num_samples: int, num_padded: int) -> None:
        """
        Add a micro-batch.

        Args:
            output: Of a forward pass with masks.
            num_samples: Samples read, without padding.
            num_padded: Samples of padding.
        """
        assert output.code_counts is not None and output.prediction_sums is not None
        assert output.codebook_losses is not None and output.num_masked_frames is not None
        frames = output.num_masked_frames.to(self._sums.dtype)
        parts = [output.code_counts.flatten(), output.prediction_sums.flatten(), output.codebook_losses * frames]
        audio = self._sums.new_tensor([num_samples, num_padded])
        self._sums += torch.cat([*(part.to(self._sums.dtype) for part in parts), frames[None], audio])

    def compute(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float | list[float]]:
        """
        Add up over processes and divide.

        Args:
            reduce: Sums a tensor over all processes.

        Returns:
            `loss` (nats a masked frame and codebook), `codebook_losses`, `target_perplexity` and
            `prediction_perplexity` (of all frames of the interval together) with their means over codebooks,
            `active_codewords` (hit in the interval), `masked_frames`, `seconds` of audio and `padded_share`.
        """
        num_codebooks, codebook_size = self._shape
        size = num_codebooks * codebook_size
        sums = reduce(self._sums)
        codes, predictions, losses, rest = torch.split(sums, [size, size, num_codebooks, 3])
        frames, num_samples, num_padded = rest.tolist()
        losses = losses / max(frames, 1)
        target = perplexity(codes.view(num_codebooks, codebook_size))
        prediction = perplexity(predictions.view(num_codebooks, codebook_size))
        active = (codes.view(num_codebooks, codebook_size) > 0).sum(dim=1)
        return {
            "loss": losses.mean().item(),
            "target_perplexity": target.mean().item(),
            "prediction_perplexity": prediction.mean().item(),
            "active_codewords": active.float().mean().item(),
            "codebook_losses": losses.tolist(),
            "target_perplexities": target.tolist(),
            "prediction_perplexities": prediction.tolist(),
            "codebook_active_codewords": active.tolist(),
            "masked_frames": frames,
            "seconds": num_samples / SAMPLING_RATE,
            "padded_share": num_padded / max(num_samples + num_padded, 1),
        }
