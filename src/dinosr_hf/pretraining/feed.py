"""The optimizer steps of a run, epoch after epoch, and the position in them that a checkpoint saves."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..data import (
    SAMPLING_RATE,
    Crop,
    MicroBatch,
    MixedSource,
    PlanSummary,
    PretrainingCollator,
    SpeechSource,
    SpeechStream,
    StepDataset,
    StepLoader,
    StreamChangedError,
    plan_epoch,
    summarize_plan,
)
from ..data.collator import FrameLabeler, utterance_speed
from ..data.excerpts import excerpt_of, is_alike
from ..model.configuration_dinosr import DinoSRConfig
from ..utils.command_line import ArgumentError
from ..utils.names import one_line
from .checkpoint_manifest import FeedState
from .pretraining_arguments import DataArguments

logger = logging.getLogger(__name__)

# Recordings of which a second is decoded to recognise them: under a second in all, from a local disk.
_NUM_COMPARED = 32


class Step(NamedTuple):
    """The epoch of an optimizer step, this process's micro-batches of it, and why there are none if data fails."""

    epoch: int
    micro_batches: list[MicroBatch]
    problem: str | None = None


class _StepPlan(NamedTuple):
    """The plan of an epoch, or of a window of a stream."""

    source: SpeechSource
    # Those with an utterance for each process, by their positions among all, which do not depend on the processes.
    steps: dict[int, list[Crop]]
    members: Sequence[tuple[int, int]] | None
    speeds: Sequence[float] | None


def fingerprint(source: SpeechSource | SpeechStream) -> str:
    """Return a digest of the utterances and their lengths, by which a resumed run recognises its data, or "stream"."""
    if isinstance(source, SpeechStream):
        return "stream"
    digest = hashlib.sha256()
    for utterance in source.utterances:
        digest.update(f"{utterance.id}\x1f{utterance.num_samples}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _excerpts(source: SpeechSource | SpeechStream) -> dict[str, list[float]]:
    """
    Return excerpts of a few utterances, the same ones for the same list, by id; none of a stream.

    Utterances that cannot be read are left out: training counts and reports them.
    """
    if isinstance(source, SpeechStream):
        return {}
    found = {
        source.utterances[index].id: excerpt_of(source, index)
        for index in range(0, len(source), -(-len(source) // _NUM_COMPARED))
    }
    return {name: excerpt for name, excerpt in found.items() if excerpt is not None}


class StepFeed:
    """
    Iterate over optimizer steps without end. Step k is the same one for any number of processes and workers.

    Args:
        source: The recordings, or a stream of them.
        data: How they are cut into steps.
        config: Configuration of the model, for the masks.
        seed: Seed of the run.
        rank: Rank of this process.
        world_size: Number of processes.
        pin_memory: As for `DataLoader`.
        anchor: Labels frames; None: steps have no labels.
    """

    def __init__(
        self,
        source: SpeechSource | SpeechStream,
        data: DataArguments,
        config: DinoSRConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        anchor: FrameLabeler | None = None,
    ) -> None:
        self._source, self._data, self._seed = source, data, seed
        self._rank, self._world_size, self._pin_memory = rank, world_size, pin_memory
        self._min_samples, self._max_samples, self._step_samples, self._micro_samples = (
            int(seconds * SAMPLING_RATE)
            for seconds in (data.min_seconds, data.max_seconds, data.step_seconds, data.micro_seconds)
        )
        self._collator = PretrainingCollator(config, seed=seed, anchor=anchor)
        self.fingerprint, self._excerpts = fingerprint(source), _excerpts(source)
        # Position of the next step, and in a stream the state that its window is read again from.
        self._epoch, self._window, self._step = 0, 0, 0
        self._stream_state: dict[str, Any] | None = None

    def advance(self) -> None:
        """Count the step that the iterator returned last as taken; until then a checkpoint comes before it."""
        self._step += 1

    def state_dict(self) -> FeedState:
        """Return the position of the next step, in values that JSON can hold."""
        return {
            "epoch": self._epoch,
            "window": self._window,
            "step": self._step,
            "stream_state": self._stream_state,
            "fingerprint": self.fingerprint,
            "excerpts": self._excerpts,
            "plan": self._plan_options(),
        }

    def load_state_dict(self, state: FeedState) -> None:
        """
        Go on from the position of a `state_dict`.

        If the data or the options that steps depend on have changed, the position is lost, and the next epoch starts
        with a warning. If recordings have the same lengths but other content, there is only a warning.
        """
        before = state["excerpts"]
        if other := sorted(name for name, own in self._excerpts.items() if not is_alike(own, before.get(name))):
            logger.warning(
                f"{len(other):,} of {len(before):,} recordings that were compared have other content than at the"
                f" checkpoint, such as {other[0]}: they were replaced. The run goes on with the new content."
            )
        self._epoch, self._window, self._step = state["epoch"], state["window"], state["step"]
        self._stream_state = state["stream_state"]
        changed = [] if state["fingerprint"] == self.fingerprint else ["the recordings"]
        changed += [name for name, value in self._plan_options().items() if state["plan"].get(name) != value]
        if changed:
            self._epoch, self._window, self._step, self._stream_state = self._epoch + 1, 0, 0, None
            logger.warning(
                f"The position in the data is lost, because {', '.join(changed)} changed since the checkpoint: epoch"
                f" {self._epoch} starts now."
            )

    def _plan_options(self) -> dict[str, Any]:
        """Return the options that the steps of an epoch depend on, besides the recordings."""
        names = ["batching", "step_seconds", "min_seconds", "max_seconds", "num_buckets", "speed_change"]
        names += ["data_weights", "data_temperature"] if len(self._data.data) > 1 else []
        names += ["window_seconds"] if isinstance(self._source, SpeechStream) else []
        return {"seed": self._seed} | {name: getattr(self._data, name) for name in names}

    def _plans(self) -> Iterator[_StepPlan]:
        """Yield the plans from that of the position on: of the source in each epoch, or of windows of a stream."""
        while True:
            if isinstance(self._source, SpeechStream):
                try:
                    yield from self._window_plans(self._source)
                except StreamChangedError as error:
                    self._step = 0
                    logger.warning(f"The position in the stream is lost: {error} Epoch {self._epoch + 1} starts now.")
            else:
                yield self._plan(self._source)
            self._epoch, self._window, self._step, self._stream_state = self._epoch + 1, 0, 0, None

    def _skip_window(self, reason: str) -> None:
        """Go on to the first step of the next window, which may be usable, with a warning."""
        self._step = 0
        logger.warning(f"Skipping window {self._window} of epoch {self._epoch}: {reason}")

    def _window_plans(self, stream: SpeechStream) -> Iterator[_StepPlan]:
        """
        Yield the plans of the rest of an epoch's windows. Raises `ArgumentError` if an epoch has none, and
        `StreamChangedError` if the stream has changed since the position was saved.
        """
        hours, fastest = self._data.window_seconds / 3600, 1 + self._data.speed_change
        at_speed = " at the highest speed" if fastest > 1 else ""
        logger.info(f"Epoch {self._epoch} of the stream: reading the first {hours:.2g} hours.")
        usable, longest_of_all, problem = self._window > 0, 0.0, ""
        for window in stream.windows(self._epoch, self._window, self._stream_state):
            if window.index != self._window:
                self._step = 0
            self._window, self._stream_state = window.index, window.state
            longest = max(utterance.num_samples for utterance in window.source.utterances) / fastest
            longest_of_all = max(longest_of_all, longest)
            if longest < self._min_samples:
                self._skip_window(
                    f"its longest utterance has {longest / SAMPLING_RATE:.2f} s{at_speed}, less than"
                    f" min_seconds={self._data.min_seconds:g}."
                )
                continue
            try:
                plan = self._plan(window.source)
            except ArgumentError as error:
                problem = str(error)
                self._skip_window(problem)
                continue
            usable = True
            yield plan
        if not usable:
            raise ArgumentError(
                problem
                or f"No recording of the stream is at least min_seconds={self._data.min_seconds:g} long (the longest"
                f" has {longest_of_all / SAMPLING_RATE:.3g} s{at_speed}). Lower --min_seconds."
            )

    def summarize(self) -> PlanSummary | None:
        """Summarize the current epoch over all processes; None for a stream, which is not known in advance."""
        return None if isinstance(self._source, SpeechStream) else self._summary(self._plan(self._source))

    def _summary(self, plan: _StepPlan) -> PlanSummary:
        sizes = {"micro_samples": self._micro_samples, "min_samples": self._min_samples}
        return summarize_plan(
            list(plan.steps.values()),
            [utterance.num_samples for utterance in plan.source.utterances],
            world_size=self._world_size,
            **sizes,
            members=plan.members,
            speeds=plan.speeds,
        )

    def _plan(self, source: SpeechSource) -> _StepPlan:
        """Plan the current epoch or window. Raises `ArgumentError` if no step has an utterance for each process."""
        num_samples = [utterance.num_samples for utterance in source.utterances]
        members, world_size = None, self._world_size
        limits = {"min_samples": self._min_samples, "max_samples": self._max_samples}
        if isinstance(source, MixedSource):
            members = source.epoch_members(self._epoch, seed=self._seed, **limits)
        speeds = self._speeds(source, members)
        steps = plan_epoch(
            num_samples,
            seed=self._seed,
            epoch=self._epoch,
            step_samples=self._step_samples,
            **limits,
            mode="pad" if self._data.batching == "pad" else "crop",
            num_buckets=self._data.num_buckets,
            ids=source.ids,
            members=members,
            speeds=speeds,
            window=self._window,
        )
        usable = {position: step for position, step in enumerate(steps) if len(step) >= world_size}
        if not usable:
            raise ArgumentError(
                f"No step has an utterance for each of {world_size} processes: step_seconds="
                f"{self._data.step_seconds:g} is too small. Raise it, lower max_seconds, or use fewer processes."
            )
        if len(usable) < len(steps):
            logger.warning(
                f"Epoch {self._epoch}: skipping {len(steps) - len(usable)} of {len(steps)} steps that have fewer"
                f" utterances than there are processes ({world_size}). Raise step_seconds, or lower max_seconds."
            )
        return _StepPlan(source, usable, members, speeds)

    def _speeds(self, source: SpeechSource, members: Sequence[tuple[int, int]] | None) -> list[float] | None:
        """Return the speed of each member of the epoch; None if all are as recorded."""
        speed_change = self._data.speed_change
        if not speed_change:
            return None
        if members is None:
            members = [(index, self._epoch) for index in range(len(source))]
        return [utterance_speed(self._seed, own, source.utterances[index].id, speed_change) for index, own in members]

    def __iter__(self) -> Iterator[Step]:
        """Yield steps without end. A stream that cannot be read any further ends them with a step that says why."""
        is_first = True
        try:
            for step in self._steps():
                is_first = False
                yield step
        except (OSError, ValueError) as error:
            if is_first or not isinstance(self._source, SpeechStream):
                raise
            yield Step(self._epoch, [], f"{one_line(error).rstrip('.')}.")

    def _steps(self) -> Iterator[Step]:
        is_first = True
        for plan in self._plans():
            if is_first:
                is_first = False
                what = "Window" if isinstance(self._source, SpeechStream) else "Epoch"
                logger.info(f"{what}: {self._summary(plan)}")
            rest = {position: step for position, step in plan.steps.items() if position >= self._step}
            share = (self._rank, self._world_size, self._micro_samples)
            dataset = StepDataset(plan.source, list(rest.values()), self._collator, *share)
            loader = StepLoader(dataset, num_workers=self._data.num_workers, pin_memory=self._pin_memory)
            for self._step, micro_batches in zip(rest, loader, strict=True):
                yield Step(self._epoch, micro_batches)
