"""
Metrics of a run: sums and counts, added up over micro-batches, processes and steps, and only then divided.

`N` codebooks, `V` codewords.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..data import SAMPLING_RATE
from ..model.codebook_dinosr import perplexity
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRForPreTrainingOutput


class MetricSums:
    """Metric sums of one log interval, kept on the device of the model: no host synchronisation until `compute`."""

    def __init__(self, config: DinoSRConfig, device: torch.device, *, has_anchor: bool = False) -> None:
        num_codebooks, codebook_size = config.num_codebooks, config.codebook_size
        self._config, self._has_anchor = config, has_anchor
        # One tensor, so that one collective adds up everything: counts, probabilities, losses, energies, frames,
        # samples, padding; the anchor's losses, frames and hits. In float64 counts stay exact for weeks; Apple's GPUs
        # have none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        size = num_codebooks * codebook_size
        self._sizes = [size, size, num_codebooks, 2 * num_codebooks + 2, 3, 6 if has_anchor else 0]
        self._sums = torch.zeros(sum(self._sizes), device=device, dtype=dtype)

    def empty_like(self) -> MetricSums:
        """Return empty sums for the same model and device."""
        return MetricSums(self._config, self._sums.device, has_anchor=self._has_anchor)

    @torch.no_grad()
    def add(self, output: DinoSRForPreTrainingOutput, num_samples: int, num_padded: int) -> None:
        """Add a forward pass with masks (and labels, of an anchor), over so many samples of audio and of padding."""
        assert output.code_counts is not None and output.prediction_sums is not None
        assert output.codebook_losses is not None and output.num_masked_frames is not None
        assert output.target_energies is not None and output.feature_energies is not None
        frames = output.num_masked_frames.to(self._sums.dtype)
        energies = torch.cat([output.target_energies.flatten(), output.feature_energies])
        parts = [
            output.code_counts.flatten(),
            output.prediction_sums.flatten(),
            output.codebook_losses * frames,
            # A batch without masked frames is silence in place of recordings that could not be read.
            torch.where(frames > 0, energies, 0.0),
            frames[None],
            *(self._sums.new_full((1,), number) for number in (num_samples, num_padded)),
        ]
        if self._has_anchor:
            assert output.anchor_losses is not None and output.num_anchor_hits is not None
            assert output.num_anchor_frames is not None
            losses = output.anchor_losses * output.num_anchor_frames
            parts += [losses, output.num_anchor_frames, output.num_anchor_hits]
        self._sums += torch.cat([part.to(self._sums.dtype) for part in parts])

    def merge(self, other: MetricSums) -> None:
        """Add another's sums: those of a step, once its gradient is known to be finite."""
        self._sums += other._sums

    def state_dict(self) -> torch.Tensor:
        """Return this process's sums so far, on the CPU."""
        return self._sums.cpu()

    def load_state_dict(self, state: torch.Tensor) -> None:
        """Go on from a `state_dict`. Raises `ValueError` if it is of another number or size of codebooks."""
        if state.shape != self._sums.shape:
            num_codebooks, codebook_size = self._config.num_codebooks, self._config.codebook_size
            raise ValueError(
                f"The state has {len(state):,} sums, but {num_codebooks} codebooks of {codebook_size} codewords"
                f"{' and an anchor' if self._has_anchor else ''} have {len(self._sums):,}. Give the state of a run of"
                " the same model."
            )
        self._sums.copy_(state)

    def compute(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float | list[float]]:
        """
        Add up over processes, with a function that sums a tensor over them, and divide.

        Returns `loss` (nats per masked frame and codebook) and `codebook_losses`; `target_perplexities` and
        `prediction_perplexities` over all frames of the interval, and `codebook_active_codewords` that were hit in it,
        each with its mean over codebooks; `target_variations` of the teacher's layers with their mean, and
        `feature_variation` of the student's convolutions (shares, 0 to 1, of the energy that changes over time within
        an utterance); `masked_frames`, `seconds` of audio and `padded_share`; with an anchor `anchor_losses` (nats per
        frame) and `anchor_accuracies`, of masked and of unmasked frames, and the numbers of these, `anchor_frames`.
        """
        num_codebooks, codebook_size = self._config.num_codebooks, self._config.codebook_size
        codes, predictions, losses, energies, rest, anchor = torch.split(reduce(self._sums), self._sizes)
        codes = codes.view(num_codebooks, codebook_size)
        frames, num_samples, num_padded = rest.tolist()
        losses = losses / max(frames, 1)
        target, prediction = perplexity(codes), perplexity(predictions.view(num_codebooks, codebook_size))
        active = (codes > 0).sum(dim=1)
        changing, energy = energies.view(num_codebooks + 1, 2).unbind(dim=1)
        *variations, feature_variation = (changing / energy.clamp(min=1e-12)).tolist()
        figures: dict[str, float | list[float]] = {
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
        if self._has_anchor:
            anchor_losses, anchor_frames, hits = anchor.view(3, 2)
            figures["anchor_losses"] = (anchor_losses / anchor_frames.clamp(min=1)).tolist()
            figures["anchor_accuracies"] = (hits / anchor_frames.clamp(min=1)).tolist()
            figures["anchor_frames"] = anchor_frames.tolist()
        return figures
