"""
What a run measures: sums and counts, added up over micro-batches, processes and steps, and only then divided.

`N` codebooks, `V` codewords.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..data import SAMPLING_RATE
from ..model.codebook_dinosr import perplexity
from ..model.objective_dinosr import DinoSRForPreTrainingOutput


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
        # One tensor, so that one collective adds up everything: counts, probabilities, losses, energies, frames,
        # samples, padding.
        # In float64 counts stay exact for weeks; Apple's GPUs have none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        size = num_codebooks * codebook_size
        self._sizes = [size, size, num_codebooks, 2 * num_codebooks + 2, 3]
        self._sums = torch.zeros(sum(self._sizes), device=device, dtype=dtype)

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
        assert output.target_energies is not None and output.feature_energies is not None
        frames = output.num_masked_frames.to(self._sums.dtype)
        energies = torch.cat([output.target_energies.flatten(), output.feature_energies])
        parts = [
            output.code_counts.flatten(),
            output.prediction_sums.flatten(),
            output.codebook_losses * frames,
            # Where nothing is masked, silence stands in for recordings that could not be read.
            torch.where(frames > 0, energies, 0.0),
            frames[None],
            *(self._sums.new_full((1,), number) for number in (num_samples, num_padded)),
        ]
        self._sums += torch.cat([part.to(self._sums.dtype) for part in parts])

    def merge(self, other: MetricSums) -> None:
        """Add what another has gathered: a step's sums count once the step is known to be good."""
        self._sums += other._sums

    def state_dict(self) -> torch.Tensor:
        """This process's sums so far, on the CPU."""
        return self._sums.cpu()

    def load_state_dict(self, state: torch.Tensor) -> None:
        """
        Go on from a `state_dict`.

        Raises:
            ValueError: If it is of another number or size of codebooks.
        """
        if state.shape != self._sums.shape:
            num_codebooks, codebook_size = self._shape
            raise ValueError(
                f"The state has {len(state):,} sums, but {num_codebooks} codebooks of {codebook_size} codewords have"
                f" {len(self._sums):,}. Give the state of a run of the same model."
            )
        self._sums.copy_(state)

    def compute(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float | list[float]]:
        """
        Add up over processes and divide.

        Args:
            reduce: Sums a tensor over all processes.

        Returns:
            `loss` (nats a masked frame and codebook), `codebook_losses`, `target_perplexity` and
            `prediction_perplexity` (of all frames of the interval together) with their means over codebooks,
            `active_codewords` (hit in the interval), `target_variations` of the teacher's layers with their mean, and
            `feature_variation` of the student's convolutions (shares from 0 to 1 of the energy that changes over time
            within an utterance), `masked_frames`, `seconds` of audio and `padded_share`.
        """
        num_codebooks, codebook_size = self._shape
        codes, predictions, losses, energies, rest = torch.split(reduce(self._sums), self._sizes)
        frames, num_samples, num_padded = rest.tolist()
        losses = losses / max(frames, 1)
        target = perplexity(codes.view(num_codebooks, codebook_size))
        prediction = perplexity(predictions.view(num_codebooks, codebook_size))
        active = (codes.view(num_codebooks, codebook_size) > 0).sum(dim=1)
        changing, energy = energies.view(num_codebooks + 1, 2).unbind(dim=1)
        *variations, feature_variation = (changing / energy.clamp(min=1e-12)).tolist()
        return {
            "loss": losses.mean().item(),
            "target_perplexity": target.mean().item(),
            "prediction_perplexity": prediction.mean().item(),
            "active_codewords": active.float().mean().item(),
            "target_variation": sum(variations) / num_codebooks,
            "feature_variation": feature_variation,
            "codebook_losses": losses.tolist(),
            "target_perplexities": target.tolist(),
            "prediction_perplexities": prediction.tolist(),
            "codebook_active_codewords": active.tolist(),
            "target_variations": variations,
            "masked_frames": frames,
            "seconds": num_samples / SAMPLING_RATE,
            "padded_share": num_padded / max(num_samples + num_padded, 1),
        }
