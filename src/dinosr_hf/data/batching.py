"""
Optimizer steps by a budget of audio, the same ones for any number of processes, micro-batches and workers.

An epoch is planned from the lengths alone (`plan_epoch`), a step is shared out among the processes and cut into
micro-batches that fit a device (`micro_batches`), and read when its turn comes (`StepLoader`). `S` samples at 16 kHz.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .audio import SAMPLING_RATE, AudioFileError
from .collator import PretrainingCollator, utterance_generator, utterance_hash
from .sources import SpeechSource
from .workers import shielded_workers, watch_parent

Mode = Literal["crop", "pad"]


class Crop(NamedTuple):
    """
    A part of an utterance.

    Attributes:
        index: Of the utterance in its source.
        start: First sample.
        num_samples: Length.
        epoch: The utterance's own pass, which seeds its mask as it did `start`: the run's epoch, unless a mixture
            uses some utterances more often than others.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which has no use here
    start: int
    num_samples: int
    epoch: int = 0


def _seconds(num_samples: float) -> str:
    return f"{num_samples:,.0f} samples, {num_samples / SAMPLING_RATE:,.1f} s"


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
    window: int = 0,
) -> list[list[Crop]]:
    """
    Plan the optimizer steps of an epoch, over all processes and micro-batches together.

    Utterances shorter than `min_samples` are left out; of longer ones than `max_samples` a part is taken. They are
    sorted by length into sliding buckets, so that a step has utterances of similar length, other ones each epoch; in
    this order they fill one step after the other, and a last one that does not reach half of `step_samples` is
    dropped. Then the steps are shuffled. Each member of the epoch is in at most one step.

    The paper fills the batch of each device in this way, cropped to its shortest utterance, and so mixes lengths
    within a step. Here it is the step that is filled and cropped, so that it does not depend on the number of devices.
    As in the paper, the budget counts what is there before this crop.

    Args:
        num_samples: Length of each utterance.
        seed: Seed of the run.
        epoch: From 0.
        step_samples: Audio of a step, at most, without padding.
        min_samples: Length of the shortest utterance used.
        max_samples: Length of the longest part of an utterance; at most `step_samples`.
        mode: "crop" (the paper): all parts of a step have the length of its shortest. "pad": they keep their lengths.
            Both have the same utterances in the same steps.
        num_buckets: A bucket, within which the order is random, has one part in so many of the audio. More buckets
            mean less cropping or padding, and less mixing.
        ids: Name of each utterance; where a part starts depends on (seed, pass, name) and the room there is. None:
            the index is the name.
        members: (index, pass) of each part of this epoch, as `MixedSource.epoch_members` gives them: an index may
            occur more than once, with another pass each time. None: every utterance once, and its pass is `epoch`.
        window: Which part of an epoch `num_samples` is, from 0, where a stream is read window by window.

    Returns:
        The parts of each step. `summarize_plan` says what the plan comes to.

    Raises:
        ValueError: If limits contradict each other, members are of no utterance, or none is long enough.
    """
    _check_limits(step_samples, min_samples, max_samples, mode, num_buckets)
    full_lengths = np.asarray(num_samples, dtype=np.int64)
    if ids is not None and len(ids) != len(full_lengths):
        raise ValueError(f"There are {len(ids):,} ids for {len(full_lengths):,} utterances: give one each.")
    indices, passes = _members(members, len(full_lengths), epoch)
    full_lengths = full_lengths[indices]
    eligible = np.flatnonzero(full_lengths >= min_samples)
    if len(eligible) == 0:
        longest = _seconds(full_lengths.max()) if len(full_lengths) else "there are none"
        raise ValueError(
            f"None of {len(full_lengths):,} utterances has min_samples={min_samples:,} ({_seconds(min_samples)}); the"
            f" longest: {longest}. Lower min_samples, or give other data."
        )

    lengths = np.minimum(full_lengths, max_samples)
    generator = utterance_generator(seed, epoch, str(window) if window else "", "plan")
    steps = _fill_steps(sort_in_buckets(eligible, lengths, num_buckets, generator), lengths, step_samples)
    if len(steps) == 1:
        warnings.warn(
            f"All {len(eligible):,} utterances together ({_seconds(lengths[eligible].sum())}) are no more than a step"
            f" ({_seconds(step_samples)}): each epoch is one step of what there is. Lower step_samples, or give more"
            " data.",
            stacklevel=2,
        )
    elif lengths[steps[-1]].sum() * 2 < step_samples:
        del steps[-1]

    def crop(member: int, length: int) -> Crop:
        room = int(full_lengths[member]) - length
        index, own_epoch = int(indices[member]), int(passes[member])
        name = str(index) if ids is None else ids[index]
        start = utterance_hash(seed, own_epoch, name, "crop") * (room + 1) >> 128 if room else 0
        return Crop(index, start, length, own_epoch)

    def crops(step: list[int]) -> list[Crop]:
        shortest = int(lengths[step].min())
        return [crop(member, shortest if mode == "crop" else int(lengths[member])) for member in step]

    return [crops(steps[position]) for position in generator.permutation(len(steps))]


def _check_limits(step_samples: int, min_samples: int, max_samples: int, mode: str, num_buckets: int) -> None:
    if mode not in ("crop", "pad"):
        raise ValueError(f"mode={mode!r} is unknown. Choose crop or pad.")
    if num_buckets < 1:
        raise ValueError(f"num_buckets={num_buckets} is out of range: it must be at least 1.")
    if not 1 <= min_samples <= max_samples <= step_samples:
        raise ValueError(
            f"min_samples={min_samples:,}, max_samples={max_samples:,} and step_samples={step_samples:,} must be at"
            " least 1 and rise in this order: a step holds at least one utterance of the greatest length."
        )


def _members(
    members: Sequence[tuple[int, int]] | None, num_utterances: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Index and pass of each member of an epoch."""
    if members is None:
        return np.arange(num_utterances), np.full(num_utterances, epoch)
    indices, passes = np.asarray(members, dtype=np.int64).reshape(-1, 2).T
    if len(indices) and not 0 <= indices.min() <= indices.max() < num_utterances:
        wrong = indices[(indices < 0) | (indices >= num_utterances)][0]
        raise ValueError(
            f"members has the index {wrong}, but there are {num_utterances:,} utterances: give (index, pass) with an"
            f" index of at least 0 and less than {num_utterances}."
        )
    return indices, passes


def sort_in_buckets(
    members: np.ndarray, lengths: np.ndarray, num_buckets: int, generator: np.random.Generator
) -> list[int]:
    """Sorted by length, up or down, but in random order within buckets, which have no fixed edges."""
    order = members[np.lexsort((generator.random(len(members)), lengths[members]))]
    ends = np.cumsum(lengths[order])
    order = order[np.argsort(ends + generator.random(len(order)) * ends[-1] / num_buckets, kind="stable")]
    # Down in every other epoch: it must not always be the longest that are dropped.
    return (order if generator.random() < 0.5 else order[::-1]).tolist()


def _fill_steps(members: list[int], lengths: np.ndarray, step_samples: int) -> list[list[int]]:
    """Cut `members`, in their order, into steps that can take no further one."""
    steps: list[list[int]] = [[]]
    room = step_samples
    for member, length in zip(members, lengths[members].tolist(), strict=True):
        if length > room:
            steps.append([])
            room = step_samples
        steps[-1].append(member)
        room -= length
    return steps


def micro_batches(step: Sequence[Crop], *, rank: int, world_size: int, micro_samples: int) -> list[list[Crop]]:
    """
    One process's share of a step, in pieces that fit a device.

    The utterances go to the processes in turn, longest first, so that shares are alike; each share is cut into equally
    many pieces of nearly equal counts. All processes get the same number of pieces, unless so few utterances fit a
    piece that some process has fewer utterances than that.

    Args:
        step: The parts of a step, as planned.
        rank: Of this process, from 0.
        world_size: Number of processes.
        micro_samples: Samples of a piece, at most, padding included (number of parts times the longest). To get one
            piece a process, leave room for an utterance more than `step_samples / world_size`.

    Returns:
        The pieces, at least one, none of them empty. Over all processes they are the step.

    Raises:
        ValueError: If there are fewer parts than processes, or one part alone is longer than `micro_samples`.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is out of range: it must be at least 0 and less than world_size={world_size}.")
    if len(step) < world_size:
        raise ValueError(
            f"A step of {len(step)} utterances ({_seconds(sum(crop.num_samples for crop in step))}) cannot be shared"
            f" by {world_size} processes: each needs at least one. Raise step_samples or use fewer processes."
        )
    ordered = sorted(step, key=lambda crop: crop.num_samples, reverse=True)
    if ordered[0].num_samples > micro_samples:
        raise ValueError(
            f"micro_samples={micro_samples:,} is less than one utterance ({_seconds(ordered[0].num_samples)}). Raise"
            " micro_samples or lower max_samples."
        )
    shares = [ordered[first::world_size] for first in range(world_size)]
    fewest = math.ceil(sum(crop.num_samples for crop in shares[0]) / micro_samples)
    num_pieces = next(
        count
        for count in range(fewest, len(shares[0]) + 1)
        if all(_padded(piece) <= micro_samples for share in shares for piece in _cut(share, count))
    )
    return _cut(shares[rank], num_pieces)


def _padded(piece: Sequence[Crop]) -> int:
    return len(piece) * max((crop.num_samples for crop in piece), default=0)


def _cut(share: list[Crop], num_pieces: int) -> list[list[Crop]]:
    """Pieces of nearly equal counts, as many as asked for or as there are members."""
    num_pieces = min(num_pieces, len(share))
    edges = [len(share) * piece // num_pieces for piece in range(num_pieces + 1)]
    return [share[first:last] for first, last in pairwise(edges)]


class PlanSummary(NamedTuple):
    """
    What a plan comes to.

    Attributes:
        num_steps: Optimizer steps of the epoch.
        num_utterances: Utterances in them; one that a mixture takes twice counts twice.
        num_too_short: Utterances left out because they are shorter than the least length.
        num_dropped: Utterances left over because they do not fill half a step.
        num_micro_batches: Forward passes of the epoch, over all processes.
        hours: Audio of the epoch, without padding.
        seconds_per_step: Mean audio of a step, without padding.
        cropped_share: Share of the audio of the utterances in the plan that is cropped away.
        padded_share: Share of what the model reads that is padding.
    """

    num_steps: int
    num_utterances: int
    num_too_short: int
    num_dropped: int
    num_micro_batches: int
    hours: float
    seconds_per_step: float
    cropped_share: float
    padded_share: float

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
) -> PlanSummary:
    """
    Say what a plan of `plan_epoch` comes to, and what it leaves out.

    Args:
        steps: The plan.
        num_samples: Length of each utterance, as planned with.
        min_samples: As planned with.
        world_size: Number of processes.
        micro_samples: As for `micro_batches`; the padding depends on it.
        members: As planned with.

    Raises:
        ValueError: As `micro_batches` and `plan_epoch`.
    """
    used = [crop for step in steps for crop in step]
    audio = sum(crop.num_samples for crop in used)
    whole = sum(int(num_samples[crop.index]) for crop in used)
    pieces = [
        piece
        for step in steps
        for rank in range(world_size)
        for piece in micro_batches(step, rank=rank, world_size=world_size, micro_samples=micro_samples)
    ]
    too_short = np.asarray(num_samples) < min_samples
    indices, _ = _members(members, len(num_samples), epoch=0)
    return PlanSummary(
        num_steps=len(steps),
        num_utterances=len(used),
        num_too_short=int(too_short.sum()),
        num_dropped=int((~too_short[indices]).sum()) - len(used),
        num_micro_batches=len(pieces),
        hours=audio / SAMPLING_RATE / 3600,
        seconds_per_step=audio / SAMPLING_RATE / len(steps),
        cropped_share=1 - audio / whole,
        padded_share=1 - audio / sum(map(_padded, pieces)),
    )


class SkippedPart(NamedTuple):
    """A part of an utterance that could not be used: the utterance's id and what is wrong."""

    utterance_id: str
    message: str


class MicroBatch(NamedTuple):
    """
    What one forward pass takes.

    Attributes:
        inputs: For the model, as `PretrainingCollator` makes them. If every part was skipped: one silent row with
            nothing masked, which has no loss, so that the process takes part in the step all the same.
        skipped: What was left out of it.
    """

    inputs: dict[str, torch.Tensor]
    skipped: list[SkippedPart]


def _check_samples(waveform: np.ndarray) -> None:
    if not np.isfinite(waveform).all():
        raise AudioFileError("The part has samples that are NaN or infinite.", "not finite")
    if waveform.min() == waveform.max():
        raise AudioFileError(f"All {len(waveform):,} samples of the part are {waveform[0]:g}.", "silent")


class StepDataset(Dataset):
    """
    The steps of an epoch, read on demand: item `k` is this process's share of step `k`.

    Items depend on their arguments only, not on the worker that reads them. To read with workers, `StepLoader` moves
    single micro-batches between processes rather than whole steps.

    Args:
        source: Where the utterances come from.
        steps: The plan of the epoch.
        collator: Makes batches and masks.
        rank: Of this process.
        world_size: Number of processes.
        micro_samples: As for `micro_batches`.
    """

    def __init__(
        self,
        source: SpeechSource,
        steps: Sequence[Sequence[Crop]],
        collator: PretrainingCollator,
        rank: int,
        world_size: int,
        micro_samples: int,
    ) -> None:
        self.source = source
        self.steps = steps
        self.collator = collator
        self.rank = rank
        self.world_size = world_size
        self.micro_samples = micro_samples

    def __len__(self) -> int:
        return len(self.steps)

    def micro_batches(self, step: int) -> list[list[Crop]]:
        """This process's pieces of a step, not yet read. Raises as `micro_batches`."""
        return micro_batches(
            self.steps[step], rank=self.rank, world_size=self.world_size, micro_samples=self.micro_samples
        )

    def read(self, piece: Sequence[Crop]) -> MicroBatch:
        """
        Read and collate a piece. What has gone bad since it was listed is left out, and said.

        Skipped are files that raise `AudioFileError` or `OSError`, and parts whose samples are not finite or all
        equal (digital silence). Raises as the collator.
        """
        items: list[tuple[str, np.ndarray, int]] = []
        skipped: list[SkippedPart] = []
        for index, start, num_samples, epoch in piece:
            name = self.source.utterances[index].id
            try:
                waveform = self.source.load(index, start, num_samples)
                _check_samples(waveform)
            except (AudioFileError, OSError) as error:
                skipped.append(SkippedPart(name, str(error)))
            else:
                items.append((name, waveform, epoch))
        if not items:
            return MicroBatch(self.collator.silence(min(crop.num_samples for crop in piece)), skipped)
        return MicroBatch(self.collator(items), skipped)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        """The collated micro-batches of a step."""
        return [self.read(piece) for piece in self.micro_batches(step)]


class _PieceDataset(Dataset):
    """The single micro-batches of a `StepDataset`, by (step, piece)."""

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, position: tuple[int, int]) -> MicroBatch:
        step, piece = position
        return self.dataset.read(self.dataset.micro_batches(step)[piece])


class _PieceSampler:
    """(step, piece) for all pieces of the steps from `first_step` on."""

    def __init__(self, dataset: StepDataset, first_step: int) -> None:
        self.dataset = dataset
        self.first_step = first_step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.first_step, len(self.dataset)):
            yield from ((step, piece) for piece in range(len(self.dataset.micro_batches(step))))


class StepLoader:
    """
    Iterates over the steps of an epoch: a list of `MicroBatch` for each, read ahead by workers.

    What travels between processes is one micro-batch at a time. A step of an hour of audio for a single device is
    230 MB, and workers that each hold two of those in shared memory exhaust it.

    Iterating leaves torch's global random state alone, where a plain `DataLoader` draws a seed from it; so a run that
    is resumed, and starts one more iterator than the undisturbed run, sees the same random numbers.

    Workers leave it to this process to decide what a signal to the whole group means, and end when it does (see
    `workers`).

    Args:
        dataset: The steps.
        first_step: Where to begin, for a resume in mid-epoch.
        num_workers: Reading processes; 0 reads in this one.
        pin_memory: As for `DataLoader`.
        multiprocessing_context: "fork", "spawn" or "forkserver"; None for Python's default.

    Raises:
        ValueError: If `first_step` is out of range.
    """

    def __init__(
        self,
        dataset: StepDataset,
        *,
        first_step: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        multiprocessing_context: str | None = None,
    ) -> None:
        if not 0 <= first_step <= len(dataset):
            raise ValueError(f"first_step={first_step} is out of range: the epoch has {len(dataset)} steps.")
        self.dataset = dataset
        self.first_step = first_step
        self._start_method = multiprocessing_context
        self._loader: DataLoader[Any] = DataLoader(
            _PieceDataset(dataset),
            batch_size=None,
            sampler=_PieceSampler(dataset, first_step),
            num_workers=num_workers,
            pin_memory=pin_memory,
            multiprocessing_context=multiprocessing_context if num_workers else None,
            generator=torch.Generator(),
            worker_init_fn=watch_parent,
        )

    def __len__(self) -> int:
        return len(self.dataset) - self.first_step

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        with shielded_workers(self._start_method) if self._loader.num_workers else nullcontext():
            pieces = iter(self._loader)
        for step in range(self.first_step, len(self.dataset)):
            yield [next(pieces) for _ in self.dataset.micro_batches(step)]
