"""
A batch of utterances: normalised, padded, with the span masks of pre-training.

`B` batch, `S` samples, `T` frames.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from ..model.masking_dinosr import sample_span_mask
from .audio import SAMPLING_RATE, normalize_waveform


class MaskedFrames(Protocol):
    """What the data pipeline needs of a `DinoSRConfig`."""

    mask_prob: float
    mask_length: int
    mask_min_spans: int

    def num_frames(self, num_samples: int, /) -> int:
        """Frames of a waveform of `num_samples`."""
        ...


def utterance_hash(seed: int, epoch: int, utterance_id: str, purpose: str) -> int:
    """
    128 bits of chance that belong to an utterance in an epoch, the same on every machine, process and restart.

    Args:
        seed: Of the run.
        epoch: From 0.
        utterance_id: Names the utterance within its source.
        purpose: Names the use ("mask", "crop"), so that uses are independent of each other.
    """
    text = "\x1f".join((str(seed), str(epoch), purpose, utterance_id))
    # File names need not be UTF-8.
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def utterance_generator(seed: int, epoch: int, utterance_id: str, purpose: str) -> np.random.Generator:
    """A numpy generator seeded with `utterance_hash` of the same arguments."""
    return np.random.Generator(np.random.PCG64(utterance_hash(seed, epoch, utterance_id, purpose)))


def min_maskable_samples(config: MaskedFrames) -> int:
    """Samples of the shortest waveform that has `config.mask_length` frames: the least that one span needs."""
    high = 1
    while config.num_frames(high) < config.mask_length:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if config.num_frames(middle) < config.mask_length:
            low = middle
        else:
            high = middle
    return high


class PretrainingCollator:
    """
    Turns utterances into the input of `DinoSRForPreTraining`.

    The mask of an utterance depends on (seed, its epoch, its id) and its number of frames, not on its batch.

    Args:
        config: A `DinoSRConfig`; its frame count, `mask_prob`, `mask_length` and `mask_min_spans` are used.
        seed: Seed of the run.
        normalize: Whether each waveform gets zero mean and unit variance before padding (the paper does). What is
            normalised is what is read, so a crop by its own statistics, where the paper's code takes the whole file's.
    """

    def __init__(self, config: MaskedFrames, *, seed: int, normalize: bool = True) -> None:
        self.config = config
        self.seed = seed
        self.normalize = normalize

    def __call__(self, items: Sequence[tuple[str, np.ndarray, int]]) -> dict[str, torch.Tensor]:
        """
        Collate a batch.

        Args:
            items: `(utterance id, waveform, epoch)`, waveforms float (S,) at 16 kHz, epochs from 0; the epoch is
                the utterance's own pass (`Crop.epoch`).

        Returns:
            `input_values` float32 (B, S), zero where padded; `attention_mask` int64 (B, S), only if lengths differ;
            `mask_time_indices` bool (B, T).

        Raises:
            ValueError: If an utterance is too short for a span, or there is none.
        """
        if not items:
            raise ValueError("A batch needs at least one utterance.")
        lengths = [len(waveform) for _, waveform, _ in items]
        num_frames = [self.config.num_frames(length) for length in lengths]
        self._check_frames(lengths, num_frames)

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

        batch = {
            "input_values": torch.from_numpy(input_values),
            "mask_time_indices": torch.from_numpy(mask_time_indices),
        }
        if min(lengths) < max(lengths):
            positions = torch.arange(max(lengths))
            batch["attention_mask"] = (positions < torch.tensor(lengths)[:, None]).long()  # (B, S)
        return batch

    def silence(self, num_samples: int) -> dict[str, torch.Tensor]:
        """
        A batch of one silent row in which nothing is masked: it adds nothing to losses, gradients and codebooks.

        Args:
            num_samples: S, its length.

        Returns:
            `input_values` float32 (1, S) and `mask_time_indices` bool (1, T).
        """
        return {
            "input_values": torch.zeros(1, num_samples),
            "mask_time_indices": torch.zeros(1, self.config.num_frames(num_samples), dtype=torch.bool),
        }

    def _check_frames(self, lengths: Sequence[int], num_frames: Sequence[int]) -> None:
        if min(num_frames) >= self.config.mask_length:
            return
        # Rounded up, so that the advice holds.
        needed = math.ceil(min_maskable_samples(self.config) / SAMPLING_RATE * 100) / 100
        raise ValueError(
            f"mask_length={self.config.mask_length} does not fit: the shortest utterance has {min(num_frames)} frames"
            f" ({min(lengths):,} samples). Raise min_seconds to at least {needed:.2f} or lower mask_length."
        )
