"""
Utterances with labels as batches: a fixed amount of audio an optimizer step, whatever the number of processes.

`B` batch, `S` samples at 16 kHz, `L` labels of an utterance.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import SAMPLING_RATE, AudioFileError, LabelledSource, normalize_waveform
from ..data.audio import require
from ..data.batching import sort_in_buckets
from ..data.collator import utterance_generator

logger = logging.getLogger(__name__)


class Example(NamedTuple):
    """An utterance: its place in the data set, float32 (S,) normalised (None: cannot be read), and its target."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which has no use here
    waveform: np.ndarray | None
    label: Any


class LabelledDataset(Dataset):
    """
    The utterances of a `LabelledSource` that are used, read when they are asked for.

    Args:
        source: Recordings and labels.
        targets: What the model is to give for each utterance of `source`: int64 (L,), or one int.
        positions: Which utterances of `source` are used; None: all.
        crop_samples: Of longer utterances a random part of this length is read, another one in each epoch; None: all
            of them.
        speed_change: Each utterance is played at a speed drawn from 1 - this to 1 + this in each epoch, which changes
            its pitch as well (Ko et al., Interspeech 2015, "Audio augmentation for speech recognition").
        seed: Of parts and speeds, with the epoch and the utterance's id.

    Attributes:
        epoch: What parts and speeds are drawn for.
    """

    def __init__(
        self,
        source: LabelledSource,
        targets: Sequence[Any],
        positions: Sequence[int] | None = None,
        *,
        crop_samples: int | None = None,
        speed_change: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.targets = targets
        self.positions = list(range(len(source))) if positions is None else list(positions)
        self.epoch = 0
        self._crop_samples = crop_samples
        self._speed_change = speed_change
        self._seed = seed

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def num_samples(self) -> list[int]:
        """Length of each utterance, or of the part that is read of it."""
        lengths = [self.source.num_samples[position] for position in self.positions]
        return lengths if self._crop_samples is None else [min(length, self._crop_samples) for length in lengths]

    @property
    def ids(self) -> list[str]:
        """Name of each utterance."""
        return [self.source.ids[position] for position in self.positions]

    def _generator(self, position: int, purpose: str) -> np.random.Generator:
        return utterance_generator(self._seed, self.epoch, self.source.ids[position], purpose)

    def _load(self, position: int) -> np.ndarray:
        rest = self.source.num_samples[position] - (self._crop_samples or self.source.num_samples[position])
        if rest <= 0:
            return self.source.load(position)
        start = int(self._generator(position, "crop").integers(rest + 1))
        return self.source.load(position, start, self._crop_samples)

    def _at_another_speed(self, waveform: np.ndarray, position: int) -> np.ndarray:
        if not self._speed_change:
            return waveform
        speed = 1 + self._speed_change * self._generator(position, "speed").uniform(-1, 1)
        return require("soxr").resample(waveform, SAMPLING_RATE * speed, SAMPLING_RATE, quality="HQ")

    def __getitem__(self, index: int) -> Example:
        """The utterance; without a waveform, and with a word in the log, if its recording has gone bad."""
        position = self.positions[index]
        try:
            waveform = self._at_another_speed(self._load(position), position)
        except AudioFileError as error:
            logger.warning("%s is left out: %s", self.source.ids[position], error)
            return Example(index, None, self.targets[position])
        return Example(index, normalize_waveform(waveform), self.targets[position])


class LabelledCollator:
    """
    Pads a batch.

    Args:
        min_samples: Shorter batches are padded to this, which the model needs for a frame (its `receptive_field`).
    """

    def __init__(self, min_samples: int) -> None:
        self.min_samples = min_samples

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """
        Collate what could be read.

        Args:
            examples: Of a `LabelledDataset`.

        Returns:
            `input_values` float32 (B, S), zero where padded; `attention_mask` int64 (B, S); `labels` int64 (B, L),
            -100 where padded, or (B,); `index` int64 (B,), the places in the data set, -1 for a silent row that
            stands in where nothing could be read; `unreadable` int64 (U,), the places of what could not.
        """
        read = [example for example in examples if example.waveform is not None]
        unreadable = [example.index for example in examples if example.waveform is None]
        if not read:
            silence = np.zeros(self.min_samples, dtype=np.float32)
            read = [Example(-1, silence, np.full(1, -100, dtype=np.int64))]
        waveforms = [torch.from_numpy(example.waveform) for example in read]
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        num_samples = max(self.min_samples, int(lengths.max()))
        input_values = torch.zeros(len(read), num_samples)
        for row, waveform in enumerate(waveforms):
            input_values[row, : len(waveform)] = waveform
        targets = [torch.as_tensor(example.label, dtype=torch.int64) for example in read]
        if targets[0].dim() == 0:
            labels = torch.stack(targets)
        else:
            labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
        return {
            "input_values": input_values,
            "attention_mask": (torch.arange(num_samples) < lengths[:, None]).long(),
            "labels": labels,
            "index": torch.tensor([example.index for example in read]),
            "unreadable": torch.tensor(unreadable, dtype=torch.int64),
        }


def _evenly_filled(members: Sequence[int], lengths: np.ndarray, num_pieces: int) -> list[list[int]]:
    """Contiguous pieces of members, longest first, of which the greatest with its padding is as small as can be."""
    ordered = sorted(members, key=lambda member: -lengths[member])

    def fill(cap: int) -> list[list[int]]:
        pieces: list[list[int]] = [[]]
        for member in ordered:
            longest = lengths[pieces[-1][0]] if pieces[-1] else lengths[member]
            if pieces[-1] and longest * (len(pieces[-1]) + 1) > cap:
                pieces.append([])
            pieces[-1].append(member)
        return pieces

    low, high = 0, int(lengths[ordered[0]]) * len(ordered)
    while high - low > 1:
        middle = (low + high) // 2
        if len(fill(middle)) <= num_pieces:
            high = middle
        else:
            low = middle
    pieces = fill(high)
    return pieces + [[] for _ in range(num_pieces - len(pieces))]


class StepBatchSampler(Sampler[list[int]]):
    """
    This process's micro-batches, `num_accumulated` of them an optimizer step, of similar lengths.

    A step has about `step_samples` of audio over all processes and micro-batches together, and each utterance is in
    one step of an epoch. The steps are the same for any number of processes and micro-batches; where a step has fewer
    utterances than there are micro-batches, some of these are empty.

    Args:
        num_samples: Length of each utterance.
        step_samples: Audio of a step.
        num_accumulated: Micro-batches of a step in a process.
        seed: Of the order.
        rank: Of this process.
        world_size: Number of processes.
        num_buckets: As in `plan_epoch`.

    Raises:
        ValueError: If there are no utterances.
    """

    def __init__(
        self,
        num_samples: Sequence[int],
        *,
        step_samples: int,
        num_accumulated: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_buckets: int = 20,
    ) -> None:
        if not num_samples:
            raise ValueError("There are no utterances to train on.")
        self._lengths = np.asarray(num_samples, dtype=np.int64)
        self._num_accumulated = num_accumulated
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_buckets = num_buckets
        self.num_steps = max(1, round(int(self._lengths.sum()) / step_samples))
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_steps * self._num_accumulated

    def set_epoch(self, epoch: int) -> None:
        """Another order from the next iteration on."""
        self.epoch = epoch

    def steps(self, epoch: int) -> list[list[int]]:
        """The utterances of each step of an epoch, over all processes."""
        generator = utterance_generator(self._seed, epoch, "", "plan")
        members = np.arange(len(self._lengths))
        order = sort_in_buckets(members, self._lengths, self._num_buckets, generator)
        ends = np.cumsum(self._lengths[order])
        # As many steps in every epoch, since a resumed run counts with that: the audio is cut into equal parts.
        step_of = ((ends - self._lengths[order] / 2) * self.num_steps / ends[-1]).astype(np.int64)
        steps = [np.asarray(order)[step_of == step].tolist() for step in range(self.num_steps)]
        return [steps[step] for step in generator.permutation(self.num_steps)]

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps(self.epoch):
            num_pieces = self._world_size * self._num_accumulated
            pieces = _evenly_filled(step, self._lengths, num_pieces) if step else [[] for _ in range(num_pieces)]
            yield from pieces[self._rank :: self._world_size]


class LengthBatchSampler(Sampler[list[int]]):
    """
    This process's share of all utterances, once each, longest first, in batches of similar lengths: for evaluation.

    Args:
        num_samples: Length of each utterance.
        micro_samples: Samples of a batch, padding included; an utterance that is longer is a batch of its own.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(self, num_samples: Sequence[int], *, micro_samples: int, rank: int = 0, world_size: int = 1) -> None:
        share = sorted(range(len(num_samples)), key=lambda index: -num_samples[index])[rank::world_size]
        self._batches: list[list[int]] = []
        for index in share:
            if not self._batches or num_samples[self._batches[-1][0]] * (len(self._batches[-1]) + 1) > micro_samples:
                self._batches.append([])
            self._batches[-1].append(index)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


def make_loader(
    dataset: LabelledDataset, sampler: StepBatchSampler | LengthBatchSampler, min_samples: int, num_workers: int
) -> DataLoader:
    """
    The batches of a sampler, read by `num_workers` processes.

    Args:
        dataset: What the sampler's numbers mean.
        sampler: Of batches.
        min_samples: As `LabelledCollator`.
        num_workers: Reading processes; 0: this one.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=LabelledCollator(min_samples),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def hours(num_samples: Sequence[int]) -> float:
    """Hours of audio of so many samples each."""
    return sum(num_samples) / SAMPLING_RATE / 3600
