"""
Batches of labelled utterances, with a fixed amount of audio per optimizer step for any number of processes.

`B` batch, `S` samples at 16 kHz, `L` labels of an utterance.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..data import AudioFileError, LabelledSource, normalize_waveform
from ..data.audio import change_speed
from ..data.batching import sort_in_buckets
from ..data.collator import pad_batch, utterance_generator, utterance_speed
from ..data.packing import pack, pack_evenly

logger = logging.getLogger(__name__)


class Example(NamedTuple):
    """An utterance: its index in the data set, its normalised samples (S,) or None if unreadable, and its target."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which has no use here
    waveform: np.ndarray | None
    label: Any


class LabelledDataset(Dataset):
    """
    Some utterances of a `LabelledSource`, read on demand.

    Args:
        source: Recordings and labels.
        targets: Target of each utterance of `source`: int64 (L,), or one int.
        positions: Positions in `source` of the utterances to use; None: all.
        crop_samples: Length to crop longer utterances to, at random and anew in each epoch; None: no cropping.
        speed_change: Each utterance is played at a speed drawn from 1 - this to 1 + this in each epoch, which changes
            its pitch as well, see `change_speed`.
        seed: Seed of crops and speeds, with the attribute `epoch` and the utterance's id.
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
        self.source, self.targets, self.epoch = source, targets, 0
        self.positions = list(range(len(source)) if positions is None else positions)
        self.ids = [source.ids[position] for position in self.positions]
        lengths = [source.num_samples[position] for position in self.positions]
        self.num_samples = [min(length, crop_samples or length) for length in lengths]  # after cropping
        self._crop_samples, self._speed_change, self._seed = crop_samples, speed_change, seed

    def __len__(self) -> int:
        return len(self.positions)

    def _load(self, position: int) -> np.ndarray:
        draw = self._seed, self.epoch, self.source.ids[position]
        num_samples = self.source.num_samples[position]
        if self._crop_samples is None or num_samples <= self._crop_samples:
            waveform = self.source.load(position)
        else:
            start = int(utterance_generator(*draw, "crop").integers(num_samples - self._crop_samples + 1))
            waveform = self.source.load(position, start, self._crop_samples)
        if self._speed_change:
            waveform = change_speed(waveform, utterance_speed(*draw, self._speed_change))
        return normalize_waveform(waveform)

    def __getitem__(self, index: int) -> Example:
        """Read an utterance; without a waveform, and with a warning, if its recording cannot be read."""
        position, waveform = self.positions[index], None
        try:
            waveform = self._load(position)
        except (AudioFileError, OSError) as error:
            logger.warning("%s is left out: %s", self.source.ids[position], error)
        return Example(index, waveform, self.targets[position])


@dataclass
class LabelledCollator:
    """Pad examples to a batch of at least `min_samples`, the model's `receptive_field`, which a frame needs."""

    min_samples: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """
        Collate the readable examples of a `LabelledDataset`.

        Returns:
            `input_values` float32 (B, S), zero where padded; `attention_mask` int64 (B, S); `labels` int64 (B, L),
            -100 where padded, or (B,); `index` int64 (B,), the indices in the data set, or -1 for one silent row if
            no example is readable; `unreadable` int64 (U,), the indices of the unreadable ones.
        """
        read = [example for example in examples if example.waveform is not None]
        unreadable = [example.index for example in examples if example.waveform is None]
        if not read:
            silence = np.zeros(self.min_samples, dtype=np.float32)
            read = [Example(-1, silence, np.full(1, -100, dtype=np.int64))]
        waves = [example.waveform for example in read if example.waveform is not None]
        input_values, attention_mask = pad_batch(waves, self.min_samples)
        targets = [torch.as_tensor(example.label, dtype=torch.int64) for example in read]
        if targets[0].dim() == 0:
            labels = torch.stack(targets)
        else:
            labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
        return {
            "input_values": input_values,
            "attention_mask": attention_mask,
            "labels": labels,
            "index": torch.tensor([example.index for example in read]),
            "unreadable": torch.tensor(unreadable, dtype=torch.int64),
        }


def count_steps(num_samples: Sequence[int], step_samples: int) -> int:
    """Return the number of steps of an epoch of utterances of these lengths: of about `step_samples`, at least one."""
    return max(1, min(round(sum(num_samples) / step_samples), len(num_samples)))


@dataclass(eq=False)
class StepBatchSampler(Sampler[list[int]]):
    """
    This process's micro-batches for training, `num_accumulated` per optimizer step, of similar lengths.

    A step has about `step_samples` of audio over all processes and micro-batches together, and at least one utterance;
    each is in one step of an epoch. The steps are the same for any number of processes and micro-batches; if a step
    has fewer utterances than there are micro-batches, some of these are empty. `num_samples` are the lengths of the
    utterances (`ValueError` if there are none), and `num_buckets` is that of `plan_epoch`.
    """

    num_samples: Sequence[int]
    _: KW_ONLY
    step_samples: int
    num_accumulated: int
    seed: int
    rank: int = 0
    world_size: int = 1
    num_buckets: int = 20

    def __post_init__(self) -> None:
        if not self.num_samples:
            raise ValueError("There are no utterances to train on.")
        self._lengths = np.asarray(self.num_samples, dtype=np.int64)
        self.num_steps = count_steps(self.num_samples, self.step_samples)
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_steps * self.num_accumulated

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration has."""
        self.epoch = epoch

    def steps(self, epoch: int) -> list[list[int]]:
        """Return the utterances of each step of an epoch, over all processes."""
        generator = utterance_generator(self.seed, epoch, "", "plan")
        members = np.arange(len(self._lengths))
        order = np.array(sort_in_buckets(members, self._lengths, self.num_buckets, generator))
        ends = np.cumsum(self._lengths[order])
        # Cut the audio into equal parts: every epoch must have the same number of steps, for resuming.
        step_of = ((ends - self._lengths[order] / 2) * self.num_steps / ends[-1]).astype(np.int64)
        number = np.arange(self.num_steps)
        # Utterances before a step, beside one in each step before it: a long one may have filled several.
        before = np.maximum.accumulate(np.searchsorted(step_of, number) - number)
        starts = np.minimum(before, len(order) - self.num_steps) + number
        parts = np.split(order, starts[1:])
        return [parts[step].tolist() for step in generator.permutation(self.num_steps)]

    def __iter__(self) -> Iterator[list[int]]:
        lengths = self._lengths.tolist()
        for step in self.steps(self.epoch):
            batches = pack_evenly(step, lengths.__getitem__, self.world_size * self.num_accumulated)
            yield from batches[self.rank :: self.world_size]


class LengthBatchSampler(list[list[int]]):
    """
    This process's batches for evaluation: its share of all utterances, once each, longest first.

    A batch has at most `micro_samples`, padding included; a longer utterance is a batch of its own.
    """

    def __init__(self, num_samples: Sequence[int], *, micro_samples: int, rank: int = 0, world_size: int = 1) -> None:
        share = sorted(range(len(num_samples)), key=num_samples.__getitem__, reverse=True)[rank::world_size]
        super().__init__(pack(share, num_samples.__getitem__, micro_samples))
