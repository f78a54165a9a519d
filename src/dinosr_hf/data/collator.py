"""
Collate utterances for pre-training: normalised, padded, with span masks.

`B` batch, `S` samples, `T` frames.
"""

import hashlib
import math
import sys
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch

from ..model.configuration_dinosr import DinoSRConfig
from ..model.masking_dinosr import sample_span_mask
from .audio import SAMPLING_RATE, normalize_waveform


def utterance_hash(seed: int, epoch: int, utterance_id: str, purpose: str) -> int:
    """
    Return 128 random bits for an utterance in an epoch, the same on every machine, process and restart.

    `seed` is the run's; `purpose` names the use ("mask", "crop"), so that different uses are independent.
    """
    text = f"{seed}\x1f{epoch}\x1f{purpose}\x1f{utterance_id}".encode("utf-8", "surrogateescape")  # as file names
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def utterance_generator(seed: int, epoch: int, utterance_id: str, purpose: str) -> np.random.Generator:
    """Return a numpy generator seeded with `utterance_hash` of the same arguments."""
    return np.random.Generator(np.random.PCG64(utterance_hash(seed, epoch, utterance_id, purpose)))


def min_maskable_samples(config: DinoSRConfig) -> int:
    """Return the length of the shortest waveform with `config.mask_length` frames, which one span needs."""
    return bisect_left(range(sys.maxsize), config.mask_length, key=config.num_frames)


class PretrainingCollator:
    """
    Collate utterances into the input of `DinoSRForPreTraining` with this configuration.

    The mask of an utterance depends on (the run's seed, its epoch, its id) and its number of frames, not on its batch.
    With `normalize` each waveform gets zero mean and unit variance before padding, as in the paper: a crop by its own
    statistics, where the paper's code takes those of the whole file.
    """

    def __init__(self, config: DinoSRConfig, *, seed: int, normalize: bool = True) -> None:
        self.config = config
        self.seed = seed
        self.normalize = normalize

    def __call__(self, items: Sequence[tuple[str, np.ndarray, int]]) -> dict[str, torch.Tensor]:
        """
        Collate `(utterance id, waveform, epoch)`, waveforms float (S,) at 16 kHz; the epoch is that of a `Crop`.

        Returns `input_values` float32 (B, S), zero where padded; `attention_mask` int64 (B, S), only if lengths
        differ; `mask_time_indices` bool (B, T). Raises `ValueError` if an utterance is too short for a span.
        """
        if not items:
            raise ValueError("A batch needs at least one utterance.")
        lengths = [len(waveform) for _, waveform, _ in items]
        num_frames = [self.config.num_frames(length) for length in lengths]
        if min(num_frames) < self.config.mask_length:
            needed = math.ceil(min_maskable_samples(self.config) / SAMPLING_RATE * 100) / 100  # so that it suffices
            shortest = f"the shortest utterance has {min(num_frames)} frames ({min(lengths):,} samples)"
            advice = f"Raise min_seconds to at least {needed:.2f} or lower mask_length."
            raise ValueError(f"mask_length={self.config.mask_length} does not fit: {shortest}. {advice}")

        input_values = np.zeros((len(items), max(lengths)), dtype=np.float32)
        mask_time_indices = np.zeros((len(items), max(num_frames)), dtype=bool)
        for row, (utterance_id, waveform, epoch) in enumerate(items):
            input_values[row, : lengths[row]] = normalize_waveform(waveform) if self.normalize else waveform
            mask_time_indices[row, : num_frames[row]] = sample_span_mask(
                (1, num_frames[row]),
                self.config.mask_prob,
                self.config.mask_length,
                min_spans=self.config.mask_min_spans,
                generator=utterance_generator(self.seed, epoch, utterance_id, "mask"),
            )[0]

        batch = {"input_values": input_values, "mask_time_indices": mask_time_indices}
        if min(lengths) < max(lengths):
            batch["attention_mask"] = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def silence(self, num_samples: int) -> dict[str, torch.Tensor]:
        """Return a batch of one silent row, nothing masked: it adds nothing to losses, gradients and codebooks."""
        nothing = torch.zeros(1, self.config.num_frames(num_samples), dtype=torch.bool)
        return {"input_values": torch.zeros(1, num_samples), "mask_time_indices": nothing}
