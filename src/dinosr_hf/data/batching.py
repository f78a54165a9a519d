"""
Cut epochs into optimizer steps of a fixed amount of audio, the same for any number of processes and workers.

`plan_epoch` plans an epoch from the lengths alone, `micro_batches` shares a step among the processes and cuts it into
micro-batches that fit a device, and `StepLoader` reads them.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..utils.command_line import check_choice
from .audio import SAMPLING_RATE, AudioFileError, change_speed
from .collator import Item, PretrainingCollator, utterance_generator, utterance_hash
from .packing import equal_parts, pack
from .sources import SpeechSource
from .workers import WorkerLoader

Mode = Literal["crop", "pad"]


class Crop(NamedTuple):
    """A part of an utterance, which is counted in samples at its speed."""

    index: int  # type: ignore[assignment]  # of the utterance in its source; hides tuple.index, which has no use here
    start: int
    num_samples: int
    epoch: int = 0  # the utterance's own pass, which seeds mask, start and speed; in a mixture not always the run's
    speed: float = 1.0  # voice and tempo are that much higher than recorded


def _seconds(num_samples: float) -> str:
    return f"{num_samples:,.0f} samples, {num_samples / SAMPLING_RATE:,.1f} s"


def _lengths_at(num_samples: np.ndarray, speeds: Sequence[float] | None) -> np.ndarray:
    return num_samples if speeds is None else (num_samples / np.asarray(speeds)).astype(np.int64)


def plan_epoch(
    num_samples: Sequence[int],
    *,
    seed: int,
    epoch: int,
    step_samples: int,
    min_samples: int,
    max_samples: int,
    mode: Mode = "crop",
    num_buckets: int = 20,
    ids: Sequence[str] | None = None,
    members: Sequence[tuple[int, int]] | None = None,
    speeds: Sequence[float] | None = None,
    window: int = 0,
) -> list[list[Crop]]:
    """
    Plan the optimizer steps of an epoch, over all processes and micro-batches together.

    Utterances shorter than `min_samples` are left out; longer ones than `max_samples` are cropped. They are sorted by
    length into sliding buckets, so that a step has utterances of similar length, other ones each epoch, and fill one
    step after the other in this order; a last step that is not half full is dropped. Then the steps are shuffled.

    The paper fills the batch of each device in this way, cropped to its shortest utterance, and so mixes lengths
    within a step. Here the whole step is filled and cropped, so that it does not depend on the number of devices. As
    in the paper, the budget counts the audio before this crop.

    Args:
        num_samples: Length of each utterance.
        step_samples: Audio of a step, at most, without padding.
        min_samples: Length of the shortest utterance used.
        max_samples: Length of the longest part of an utterance; at most `step_samples`.
        mode: "crop" (the paper): all parts of a step have the length of its shortest. "pad": they keep their lengths.
            Both have the same utterances in the same steps.
        num_buckets: Number of buckets, each with an equal share of the audio, within which the order is random. More
            buckets mean less cropping or padding, and less mixing.
        ids: Name of each utterance (None: its index); a part starts where (seed, pass, name) and its room say.
        members: (index, pass) of each part of this epoch, as `MixedSource.epoch_members` returns them: an index may
            occur more than once, with another pass each time. None: every utterance once, in pass `epoch`.
        speeds: Speed of each part of this epoch, see `utterance_speed`; all limits hold for the length at this speed.
            None: as recorded.
        window: Index of the window of the epoch, if `num_samples` is a window of a stream.

    Raises `ValueError` if limits contradict each other, or no utterance is long enough.
    """
    check_choice("mode", mode, ("crop", "pad"))
    if num_buckets < 1:
        raise ValueError(f"num_buckets={num_buckets} is out of range: it must be at least 1.")
    if not 1 <= min_samples <= max_samples <= step_samples:
        limits = f"min_samples={min_samples:,}, max_samples={max_samples:,} and step_samples={step_samples:,}"
        reason = "a step holds at least one utterance of the greatest length"
        raise ValueError(f"{limits} must be at least 1 and rise in this order: {reason}.")
    full_lengths = np.asarray(num_samples, dtype=np.int64)
    if ids is not None and len(ids) != len(full_lengths):
        raise ValueError(f"There are {len(ids):,} ids for {len(full_lengths):,} utterances: give one each.")
    if members is None:
        members = [(index, epoch) for index in range(len(full_lengths))]
    indices, passes = np.asarray(members, dtype=np.int64).reshape(-1, 2).T
    full_lengths = _lengths_at(full_lengths[indices], speeds)
    eligible = np.flatnonzero(full_lengths >= min_samples)
    if len(eligible) == 0:
        longest = _seconds(full_lengths.max()) if len(full_lengths) else "there are none"
        limit = f"{min_samples / SAMPLING_RATE:g} s long (min_samples={min_samples:,}, of a run min_seconds)"
        found = f"None of {len(full_lengths):,} utterances is at least {limit}; the longest: {longest}"
        raise ValueError(f"{found}. Lower the minimum, or give other data.")

    lengths = np.minimum(full_lengths, max_samples)
    generator = utterance_generator(seed, epoch, str(window) if window else "", "plan")
    order = sort_in_buckets(eligible, lengths, num_buckets, generator)
    steps = list(pack(order, lengths.tolist().__getitem__, step_samples, padded=False))
    if len(steps) == 1:
        found = f"All {len(eligible):,} utterances together ({_seconds(lengths[eligible].sum())}) are no more than a"
        problem = f"{found} step ({_seconds(step_samples)}): each epoch is one step with all of them"
        warnings.warn(f"{problem}. Lower step_samples (of a run step_seconds), or give more data.", stacklevel=2)
    elif lengths[steps[-1]].sum() * 2 < step_samples:
        del steps[-1]

    def crops(step: list[int]) -> Iterator[Crop]:
        lengths_used = np.full(len(step), lengths[step].min()) if mode == "crop" else lengths[step]
        for member, length in zip(step, lengths_used.tolist(), strict=True):
            room = int(full_lengths[member]) - length
            index, own_epoch = int(indices[member]), int(passes[member])
            name = str(index) if ids is None else ids[index]
            start = utterance_hash(seed, own_epoch, name, "crop") * (room + 1) >> 128 if room else 0
            yield Crop(index, start, length, own_epoch, 1.0 if speeds is None else speeds[member])

    return [list(crops(steps[position])) for position in generator.permutation(len(steps))]


def sort_in_buckets(
    members: np.ndarray, lengths: np.ndarray, num_buckets: int, generator: np.random.Generator
) -> list[int]:
    """Sort members by length, up or down, but in random order within buckets, which have no fixed edges."""
    order = members[np.lexsort((generator.random(len(members)), lengths[members]))]
    ends = np.cumsum(lengths[order])
    order = order[np.argsort(ends + generator.random(len(order)) * ends[-1] / num_buckets, kind="stable")]
    # Down in half of the epochs, so that it is not always the longest that are dropped.
    return (order if generator.random() < 0.5 else order[::-1]).tolist()


def micro_batches(step: Sequence[Crop], *, rank: int, world_size: int, micro_samples: int) -> list[list[Crop]]:
    """
    Cut one process's share of a step into micro-batches that fit a device: at least one, none of them empty.

    Utterances are dealt to the processes in turn, longest first, so that shares are alike; each share is cut into the
    same number of micro-batches, of nearly equal counts. All processes get equally many, unless so few utterances fit
    a micro-batch that some process has fewer utterances than that.

    A micro-batch has at most `micro_samples`, padding included (number of parts times the longest). For one
    micro-batch per process, leave room for an utterance more than `step_samples / world_size`. Raises `ValueError` if
    there are fewer parts than processes, or one part alone is longer than `micro_samples`.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is out of range: it must be at least 0 and less than world_size={world_size}.")
    if len(step) < world_size:
        found = f"A step of {len(step)} utterances ({_seconds(sum(crop.num_samples for crop in step))})"
        problem = f"{found} cannot be shared by {world_size} processes: each needs at least one"
        raise ValueError(f"{problem}. Raise step_samples or use fewer processes.")
    ordered = sorted(step, key=lambda crop: crop.num_samples, reverse=True)
    if ordered[0].num_samples > micro_samples:
        problem = f"micro_samples={micro_samples:,} is less than one utterance ({_seconds(ordered[0].num_samples)})"
        raise ValueError(f"{problem}. Raise micro_samples or lower max_samples.")
    shares = [ordered[first::world_size] for first in range(world_size)]

    def cut(share: list[Crop], count: int) -> list[list[Crop]]:
        return [share[first:last] for first, last in equal_parts(len(share), min(count, len(share)))]

    fewest = math.ceil(sum(crop.num_samples for crop in shares[0]) / micro_samples)
    num_pieces = next(
        count
        for count in range(fewest, len(shares[0]) + 1)
        if all(_padded_size(piece) <= micro_samples for share in shares for piece in cut(share, count))
    )
    return cut(shares[rank], num_pieces)


def _padded_size(piece: Sequence[Crop]) -> int:
    return len(piece) * max(crop.num_samples for crop in piece)


class PlanSummary(NamedTuple):
    """Summary of a plan, audio without padding; `str` of it is one line."""

    num_steps: int
    num_utterances: int  # one that a mixture uses twice counts twice
    num_too_short: int  # at their speed
    num_dropped: int  # left over because they do not fill half a step
    num_micro_batches: int  # forward passes, over all processes
    hours: float
    seconds_per_step: float
    cropped_share: float  # of the audio of the planned utterances
    padded_share: float  # of the model's input

    def __str__(self) -> str:
        return (
            f"{self.num_utterances:,} utterances in {self.num_steps:,} steps of {self.seconds_per_step:,.1f} s"
            f" ({self.num_micro_batches:,} micro-batches, {self.hours:,.2f} h); left out: {self.num_too_short:,} too"
            f" short, {self.num_dropped:,} left over; {self.cropped_share:.1%} of the audio cropped away,"
            f" {self.padded_share:.1%} padding"
        )


def summarize_plan(
    steps: Sequence[Sequence[Crop]],
    num_samples: Sequence[int],
    *,
    min_samples: int,
    world_size: int = 1,
    micro_samples: int,
    members: Sequence[tuple[int, int]] | None = None,
    speeds: Sequence[float] | None = None,
) -> PlanSummary:
    """
    Summarize a plan of `plan_epoch`, and what it leaves out.

    `num_samples`, `min_samples`, `members` and `speeds` are those of `plan_epoch`, and `world_size` and
    `micro_samples`, on which the padding depends, those of `micro_batches`. Raises `ValueError` as these do.
    """
    used = [crop for step in steps for crop in step]
    audio = sum(crop.num_samples for crop in used)
    whole = sum(int(num_samples[crop.index] / crop.speed) for crop in used)
    pieces: list[list[Crop]] = []
    for step, rank in product(steps, range(world_size)):
        pieces += micro_batches(step, rank=rank, world_size=world_size, micro_samples=micro_samples)
    recorded = np.asarray(num_samples)
    indices = range(len(recorded)) if members is None else [index for index, _ in members]
    too_short = _lengths_at(recorded[indices], speeds) < min_samples
    others_too_short = np.delete(recorded, indices) < min_samples  # which a mixture leaves out of its members
    return PlanSummary(
        num_steps=len(steps),
        num_utterances=len(used),
        num_too_short=int(too_short.sum() + others_too_short.sum()),
        num_dropped=int((~too_short).sum()) - len(used),
        num_micro_batches=len(pieces),
        hours=audio / SAMPLING_RATE / 3600,
        seconds_per_step=audio / SAMPLING_RATE / len(steps),
        cropped_share=1 - audio / whole,
        padded_share=1 - audio / sum(map(_padded_size, pieces)),
    )


class SkippedUtterance(NamedTuple):
    """The id of an utterance that could not be used, and why, in a sentence and as the `reason` of its error."""

    utterance_id: str
    message: str
    reason: str


class MicroBatch(NamedTuple):
    """
    The input of one forward pass, made by `PretrainingCollator`, and what was left out.

    If every utterance was skipped, the input is one silent row with nothing masked, which has no loss, so that the
    process takes part in the step.
    """

    inputs: dict[str, torch.Tensor]
    skipped: list[SkippedUtterance]


@dataclass(eq=False)
class StepDataset(Dataset):
    """
    The steps of an epoch, planned by `plan_epoch`, read on demand: item `k` is this process's share of step `k`.

    The fields are those of `micro_batches`. Items do not depend on the worker that reads them.
    """

    source: SpeechSource
    steps: Sequence[Sequence[Crop]]
    collator: PretrainingCollator
    rank: int
    world_size: int
    micro_samples: int

    def __len__(self) -> int:
        return len(self.steps)

    def micro_batches(self, step: int) -> list[list[Crop]]:
        """Return this process's micro-batches of a step, not yet read; see the function `micro_batches`."""
        return micro_batches(
            self.steps[step], rank=self.rank, world_size=self.world_size, micro_samples=self.micro_samples
        )

    def _recorded(self, crop: Crop) -> tuple[int, int]:
        """Return start and length of a crop in its recording; of another speed, a sample more than it needs."""
        if crop.speed == 1:
            return crop.start, crop.num_samples
        start = math.floor(crop.start * crop.speed)
        end = math.ceil((crop.start + crop.num_samples) * crop.speed)
        return start, min(end, self.source.utterances[crop.index].num_samples) - start

    def read(self, piece: Sequence[Crop]) -> MicroBatch:
        """Read and collate a micro-batch, skipping utterances that cannot be read, are not finite or all silence."""
        items: list[Item] = []
        skipped: list[SkippedUtterance] = []
        for crop in piece:
            name = self.source.utterances[crop.index].id
            start, num_samples = self._recorded(crop)
            try:
                waveform = self.source.load(crop.index, start, num_samples)
                if not np.isfinite(waveform).all():
                    raise AudioFileError("The part has samples that are NaN or infinite.", "not finite")
                if waveform.min() == waveform.max():
                    raise AudioFileError(f"All {len(waveform):,} samples of the part are {waveform[0]:g}.", "silent")
            except (AudioFileError, OSError) as error:
                reason = error.reason if isinstance(error, AudioFileError) else "unreadable"
                skipped.append(SkippedUtterance(name, str(error), reason))
            else:
                item = Item(name, waveform, crop.epoch, start)
                if crop.speed != 1:
                    faster = change_speed(waveform, crop.speed)[: crop.num_samples]
                    item = item._replace(waveform=faster, speed=crop.speed, recorded=waveform)
                items.append(item)
        if not items:
            return MicroBatch(self.collator.silence(min(crop.num_samples for crop in piece)), skipped)
        return MicroBatch(self.collator(items), skipped)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        """Read the micro-batches of a step."""
        return [self.read(piece) for piece in self.micro_batches(step)]


class StepLoader:
    """
    Iterate over the steps of an epoch, a list of `MicroBatch` each, read ahead by workers (none: in this process).

    Workers send one micro-batch at a time: a step of an hour of audio for a single device is 230 MB, and workers that
    each hold two of those exhaust the shared memory. They ignore signals to the process group and exit with this
    process (see `workers`).

    Iterating does not change torch's global random state, from which a plain `DataLoader` draws a seed; so a run that
    is resumed, and starts one more iterator than the undisturbed run, sees the same random numbers.
    """

    def __init__(
        self,
        dataset: StepDataset,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        multiprocessing_context: str | None = None,
    ) -> None:
        self._steps = [dataset.micro_batches(step) for step in range(len(dataset))]
        self._loader: DataLoader[Any] = WorkerLoader(
            list(chain.from_iterable(self._steps)),
            batch_size=None,
            collate_fn=dataset.read,
            num_workers=num_workers,
            pin_memory=pin_memory,
            multiprocessing_context=multiprocessing_context if num_workers else None,
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        loaded = iter(self._loader)
        for pieces in self._steps:
            yield [next(loaded) for _ in pieces]
