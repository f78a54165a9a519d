"""
Collate utterances for pre-training: normalised, padded, with span masks.

`B` batch, `S` samples, `T` frames.
"""

import hashlib
import math
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..model.configuration_dinosr import DinoSRConfig
from ..model.masking_dinosr import sample_span_mask
from .audio import SAMPLING_RATE, normalize_waveform

NO_LABEL = -100  # of a frame without an anchor, as in torch's cross entropy


class Part(NamedTuple):
    """A part of an utterance as it was recorded, before any change of speed."""

    utterance_id: str
    waveform: NDArray[np.float32]  # (S,) at 16 kHz
    start: int  # of the part in the utterance, samples
    num_frames: int  # of the model, which gets the part at another speed
    speed: float = 1.0

    def centres(self, stride: int, field: int) -> NDArray[np.float64]:
        """Return the sample of the part, as recorded, at the centre of each of the model's frames: (T,)."""
        return self.speed * (stride * np.arange(self.num_frames, dtype=np.float64) + field / 2)


# Labels the model's frames of a part: int64 (T,), `NO_LABEL` where there is none. Picklable, for workers.
FrameLabeler = Callable[[Part], NDArray[np.int64]]


class Item(NamedTuple):
    """A part of an utterance, to be collated."""

    utterance_id: str
    waveform: NDArray[np.float32]  # (S,) at 16 kHz, at its speed
    epoch: int  # that of its `Crop`
    start: int = 0  # of the part in the utterance as recorded, samples
    speed: float = 1.0
    recorded: NDArray[np.float32] | None = None  # the part before the change of speed; None: there was none


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


def utterance_speed(seed: int, epoch: int, utterance_id: str, speed_change: float) -> float:
    """Return an utterance's speed in an epoch, uniform between 1 - speed_change and 1 + speed_change."""
    share = utterance_hash(seed, epoch, utterance_id, "speed") / 2**128
    return 1 + speed_change * (2 * share - 1)


def min_maskable_samples(config: DinoSRConfig) -> int:
    """Return the length of the shortest waveform with `config.mask_length` frames, which one span needs."""
    return bisect_left(range(sys.maxsize), config.mask_length, key=config.num_frames)


def pad_batch(waves: Sequence[np.ndarray], min_samples: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad the samples, float32 (S,), of each recording to `input_values` and `attention_mask`, each (B, S)."""
    lengths = torch.tensor([len(wave) for wave in waves])
    values = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wave) for wave in waves], batch_first=True)
    values = torch.nn.functional.pad(values, (0, max(0, min_samples - values.shape[1])))
    return values, (torch.arange(values.shape[1]) < lengths[:, None]).long()


class PretrainingCollator:
    """
    Collate utterances into the input of `DinoSRForPreTraining` with this configuration.

    The mask of an utterance depends on (the run's seed, its epoch, its id) and its number of frames, not on its batch.
    With `normalize` each waveform gets zero mean and unit variance before padding, as in the paper: a crop by its own
    statistics, where the paper's code takes those of the whole file. `anchor` labels frames for `anchor_labels`, by
    the part as recorded; None: batches have no labels.
    """

    def __init__(
        self, config: DinoSRConfig, *, seed: int, normalize: bool = True, anchor: FrameLabeler | None = None
    ) -> None:
        self.config = config
        self.seed = seed
        self.normalize = normalize
        self.anchor = anchor

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """
        Collate parts of utterances.

        Returns `input_values` float32 (B, S), zero where padded; `attention_mask` int64 (B, S), only if lengths
        differ; `mask_time_indices` bool (B, T); with an anchor `anchor_labels` int64 (B, T), `NO_LABEL` where padded.
        Raises `ValueError` if an utterance is too short for a span, or the anchor gives another number of labels.
        """
        if not items:
            raise ValueError("A batch needs at least one utterance.")
        lengths = [len(item.waveform) for item in items]
        num_frames = [self.config.num_frames(length) for length in lengths]
        if min(num_frames) < self.config.mask_length:
            needed = math.ceil(min_maskable_samples(self.config) / SAMPLING_RATE * 100) / 100  # so that it suffices
            shortest = f"the shortest utterance has {min(num_frames)} frames ({min(lengths):,} samples)"
            advice = f"Raise min_seconds to at least {needed:.2f} or lower mask_length."
            raise ValueError(f"mask_length={self.config.mask_length} does not fit: {shortest}. {advice}")

        input_values = np.zeros((len(items), max(lengths)), dtype=np.float32)
        mask_time_indices = np.zeros((len(items), max(num_frames)), dtype=bool)
        for row, item in enumerate(items):
            waveform = normalize_waveform(item.waveform) if self.normalize else item.waveform
            input_values[row, : lengths[row]] = waveform
            mask_time_indices[row, : num_frames[row]] = sample_span_mask(
                (1, num_frames[row]),
                self.config.mask_prob,
                self.config.mask_length,
                min_spans=self.config.mask_min_spans,
                generator=utterance_generator(self.seed, item.epoch, item.utterance_id, "mask"),
            )[0]

        batch = {"input_values": input_values, "mask_time_indices": mask_time_indices}
        if min(lengths) < max(lengths):
            batch["attention_mask"] = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        if self.anchor is not None:
            batch["anchor_labels"] = np.full(mask_time_indices.shape, NO_LABEL, dtype=np.int64)
            for row, item in enumerate(items):
                waveform = item.waveform if item.recorded is None else item.recorded
                labels = self.anchor(Part(item.utterance_id, waveform, item.start, num_frames[row], item.speed))
                if len(labels) != num_frames[row]:
                    raise ValueError(
                        f"The anchor gives {len(labels)} labels for {item.utterance_id!r}, which has {num_frames[row]}"
                        " frames. Make it for the model's frames."
                    )
                batch["anchor_labels"][row, : num_frames[row]] = labels
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def silence(self, num_samples: int) -> dict[str, torch.Tensor]:
        """
        Return a batch of one silent row, nothing masked or labelled.

        It adds nothing to losses, gradients and codebooks.
        """
        nothing = torch.zeros(1, self.config.num_frames(num_samples), dtype=torch.bool)
        batch = {"input_values": torch.zeros(1, num_samples), "mask_time_indices": nothing}
        if self.anchor is not None:
            batch["anchor_labels"] = torch.full(nothing.shape, NO_LABEL)
        return batch
